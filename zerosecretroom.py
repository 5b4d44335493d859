#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = ["websockets>=15,<18", "cryptography>=46"]
# ///
"""ZeroSecretRoom: the relay of end-to-end encrypted rooms. Start it, open the address it prints.

What it can see: room ids, device public keys, signed charters, rosters and commits (who is listed, who is an admin),
sizes, times, addresses of sockets, who is connected. What it cannot see: any key of a room, text, names, titles, file
names, thumbnails, reactions. It keeps everything in memory; on disk lie its TLS key, certificate and identity key.

The socket is wss://HOST/ws/ROOM (ROOM = base64url of the room id, or aaa). A message holds one or more frames, each
behind its u32 length; a frame is a u8 type and the fields that the Wire room gives it. Every frame with a ref is
answered: sent or fault.

    ->  0x01 nonce      begins a login                     <-  0x81 relay      signed answer, run and head
    ->  0x02 login      proof of the device key            <-  0x82 fault      code, text, when to try again
    ->  0x03 hello      what I know, where I stopped       <-  0x83 hi         run and range of the log
    ->  0x04 fetch      what an invite leads to            <-  0x84 leaves     0x85 unit      0x8f evidence
    ->  0x05 join       sealed to each admin               <-  0x86 entry      one of the log: envelope or commit
    ->  0x06 post       an envelope for the log            <-  0x87 ready      everything kept was sent; who is online
    ->  0x07 live       sealed, not kept: seen, presence   <-  0x88 live
    ->  0x08 commit     begins an epoch                    <-  0x89 sent       taken, with its number
    ->  0x09 direct  0x0a welcome  0x0b share: to one      <-  0x8a direct     kept until dack
    ->  0x0c ack     0x0d dack: written down here          <-  0x8b peer       a device came or went
    ->  0x0e leaf    0x0f resync   0x10 request            <-  0x8c joins      0x8d requests  0x8e resyncs
    ->  0x11 invite  0x12 revoke   0x13 evidence           <-  0x90 invite     answer to fetch
    ->  0x14 refuse     an admin turns a join down         <-  0x93 settled    told to the newcomer
    ->  0x15 put  0x16 get  0x17 got  0x18 drop: chunks    <-  0x91 chunk      0x92 nofile
    ->  0x19 ping    0x1a head                             <-  0x99 pong

Map. Each room names only rooms above it.
    Limits       every number, with its unit and its reason
    Errors       PeerFault (told to the peer, the socket stays), OperatorFault (one line on stderr, exit 2)
    Wire         strict bytes <-> frozen dataclasses, and the checks of signed objects; no state
    Rooms        the state: handle(conn, message, now) -> effects; no clock, no socket, no await
    Page         index.html as it is served: hashes, policy, headers; the answers to plain requests
    Certificate  TLS key and certificate, the relay's identity; the only writer of files
    Link         sockets, TLS, outboxes, effects; the only user of asyncio and websockets
    Command      options, start, signals, systemd
"""

from __future__ import annotations

import sys

if sys.version_info < (3, 10):  # noqa: UP036 - an older Python gets as far as this line and no further
    sys.stderr.write(
        f"zerosecretroom: needs Python 3.10 or newer, this is {sys.version_info[0]}.{sys.version_info[1]}: "
        f"install a newer one, or start it with: uv run {__file__}\n"
    )
    raise SystemExit(2)

import argparse
import asyncio
import base64
import bisect
import dataclasses
import datetime
import email.utils
import errno
import gzip
import hashlib
import ipaddress
import itertools
import logging
import os
import re
import signal
import socket
import ssl
import struct
import time
import traceback
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import (
    Annotated,
    Any,
    Generic,
    NamedTuple,
    NoReturn,
    Protocol,
    TypeVar,
    cast,
    get_args,
    get_origin,
    get_type_hints,
)

try:
    from cryptography import x509
    from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature
    from cryptography.x509.oid import ExtendedKeyUsageOID
    from websockets.exceptions import InvalidState
    from websockets.frames import Frame, Opcode
    from websockets.http11 import Request as Handshake
    from websockets.protocol import State
    from websockets.server import ServerProtocol
except ImportError as error:
    sys.stderr.write(
        f"zerosecretroom: {error}: install what it needs with: "
        f"{sys.executable or 'python3'} -m pip install 'websockets>=15,<18' 'cryptography>=46'\n"
    )
    raise SystemExit(2) from None

VERSION = "0.1.0"


# ════════════════════════════════════════════════════════════════════════════════════════════════════════════════════
# Limits: every number of the relay, with its unit and its reason. Knows nothing; every later room may ask it.
# ════════════════════════════════════════════════════════════════════════════════════════════════════════════════════
@dataclass(frozen=True, slots=True)
class Limits:
    """What the relay will hold and wait for. Bytes are of stored frames with `overhead` each; seconds are monotonic."""

    ttl: float = 72 * 3600.0  # s: a long weekend offline loses nothing; beyond it vectors heal
    max_memory: int = 1 << 30  # bytes in all rooms: what a small rented machine can spare
    max_room_memory: int = 256 << 20  # bytes a room: four files of the largest size with their messages
    max_file: int = 64 << 20  # bytes of one file before sealing
    max_message: int = 4 << 20  # bytes of a WebSocket message, many frames: a hello with several rosters
    max_frame: int = 2 << 20  # bytes of one frame: a unit of 1,024 devices with its chain is 0.6 MiB
    max_envelope: int = 512 << 10  # bytes of one sealed event, batch or chunk; a chunk is 256 KiB
    max_sealed: int = 4096  # bytes of one sealed join, welcome excepted: a leaf, two signatures, a name
    file_share: float = 0.875  # of either memory limit: files never crowd out the messages about them
    file_window: int = 16  # chunks in flight for one get: 4 MiB keep 200 Mbit/s busy at 150 ms
    files: int = 1024  # files a room keeps at once: bounds the bookkeeping of empty ones
    overhead: int = 256  # bytes charged for each stored thing beside its own: Python's objects
    rooms: int = 20_000  # rooms at once: each costs 4 KB even when empty
    devices: int = 1024  # devices in one roster: a verification takes 0.1 ms each
    newcomers: int = 256  # sockets a room admits that no roster lists, or none yet after a restart
    joins: int = 64  # pending joins a room: one admin answers each within seconds
    joins_an_invite: int = 8  # devices trying one link: the true one and some that read it on the way
    invites: int = 256  # open invites a room
    requests: int = 256  # pending requests a room
    requests_a_device: int = 16  # of these from one device
    evidence: int = 32  # rosters kept as proof of a removal: those the head has not caught up with
    directs: int = 2000  # direct envelopes that wait for one device
    direct_bytes: int = 4 << 20  # bytes of them: beyond, the earliest go, vectors ask again
    roster_step: int = 1024  # how far a roster number may rise at once: it must never be used up
    consumed_days: int = 30  # days a used invite stays listed beyond its end
    outbox: int = 16 << 20  # bytes of live frames queued for one socket before it counts as too slow
    connections: int = 20_000  # sockets at once: 49 KB each make 1 GB
    silence: float = 60.0  # s without a byte before a socket counts as dead: pages ping after 20
    head_bytes: int = 16_384  # bytes of a request head: browsers send 1 KB
    head_seconds: float = 10.0  # s from connecting to a whole request head, TLS included
    close_seconds: float = 3.0  # s a farewell may take: 5 s after SIGTERM every socket is gone
    tick_seconds: float = 1.0  # s between Link's looks at its connections: 20,000 take 10 ms
    join_bytes: int = 262_144  # bytes of frames joined into one message: browsers take that in one go
    large_frame: int = 65_536  # bytes from which copying a frame costs more than a message of its own
    high_water: int = 65_536  # bytes in a transport before what follows waits outside it, shared by members
    login_timeout: float = 15.0  # s from the socket's opening to a valid login
    slow_seconds: float = 60.0  # s after which a connected device that acks nothing holds back nobody's bytes
    rotation_seconds: float = 10.0  # s between two commits on an unchanged roster
    resync_seconds: float = 60.0  # s between two resyncs of one device
    sweep_seconds: float = 30.0  # s between looks at everything that time ends: 20,000 rooms take 0.1 s
    full_retry_ms: int = 5000  # ms a sender waits after `full`: acks free bytes within seconds
    demo_ttl: float = 3600.0  # s an event stays in the demo room
    demo_events: int = 200  # events kept there
    demo_file: int = 4 << 20  # bytes of a file there: anyone may post


# ════════════════════════════════════════════════════════════════════════════════════════════════════════════════════
# Errors: what a peer did wrong, told to that peer alone. The state is as it was before its message.
#
#   PeerFault(code, text)
#   ├── Bad       bytes that Wire does not allow
#   ├── Forged    a signature, hash or authority that does not hold
#   └── Full      no bytes or places left; carries how long to wait
# ════════════════════════════════════════════════════════════════════════════════════════════════════════════════════
class PeerFault(Exception):
    """A fault frame in the making. `code` is one of FAULTS; `retry_ms` is 0 where trying again is no use."""

    def __init__(self, code: str, text: str, retry_ms: int = 0) -> None:
        super().__init__(text)
        self.code, self.text, self.retry_ms = code, text, retry_ms


class Bad(PeerFault):
    def __init__(self, text: str) -> None:
        super().__init__("bad", text)


class Forged(PeerFault):
    def __init__(self, text: str) -> None:
        super().__init__("forged", text)


class Full(PeerFault):
    def __init__(self, text: str, retry_ms: int) -> None:
        super().__init__("full", text, retry_ms)


# ════════════════════════════════════════════════════════════════════════════════════════════════════════════════════
# Wire: strict bytes <-> frozen dataclasses, labelled hashes, verification of signed objects. Knows no room and no
# socket. A dataclass is its own layout: each annotation says how that field is written, in the order they stand.
# What only members can open (events, vectors, HPKE plaintexts) has no layout here: the relay cannot read it.
# ════════════════════════════════════════════════════════════════════════════════════════════════════════════════════
ZERO16, ZERO32, ZERO65 = bytes(16), bytes(32), bytes(65)
MAX_UINT = (1 << 53) - 1  # JavaScript's numbers are exact up to here
MAX_CHAIN = 256  # commits on one roster: an admin raises its number before there are more

T = TypeVar("T")
K = TypeVar("K", bound=Hashable)


class Reader:
    """Takes fields off bytes; running out, or leaving some over, is Bad."""

    __slots__ = ("at", "data")

    def __init__(self, data: bytes, start: int = 0) -> None:
        self.data, self.at = data, start

    def take(self, size: int) -> bytes:
        start, self.at = self.at, self.at + size
        if self.at > len(self.data):
            raise Bad("message ends too early")
        return self.data[start : self.at]

    def uint(self, size: int) -> int:
        start, self.at = self.at, self.at + size  # not by take: this is called for every field there is
        value = int.from_bytes(self.data[start : self.at], "big")
        if self.at > len(self.data):
            raise Bad("message ends too early")
        if value > MAX_UINT:
            raise Bad("number above 2^53")
        return value

    def var(self, size: int) -> bytes:
        return self.take(self.uint(size))

    def end(self) -> None:
        if self.at != len(self.data):
            raise Bad("message has trailing bytes")


class Codec(Protocol):
    def read(self, reader: Reader) -> Any: ...
    def write(self, value: Any) -> bytes: ...


@dataclass(frozen=True, slots=True)
class Uint:
    """A big-endian unsigned integer of `size` bytes, below 2^53."""

    size: int

    def read(self, reader: Reader) -> int:
        return reader.uint(self.size)

    def write(self, value: int) -> bytes:
        if not 0 <= value <= MAX_UINT or value >> 8 * self.size:
            raise Bad("number out of range")
        return value.to_bytes(self.size, "big")


@dataclass(frozen=True, slots=True)
class Fixed:
    """Exactly `size` raw bytes."""

    size: int

    def read(self, reader: Reader) -> bytes:
        return reader.take(self.size)

    def write(self, value: bytes) -> bytes:
        if len(value) != self.size:
            raise Bad(f"field is not {self.size} bytes")
        return value


@dataclass(frozen=True, slots=True)
class Var:
    """Bytes behind a length of `size` bytes."""

    size: int

    def read(self, reader: Reader) -> bytes:
        return reader.var(self.size)

    def write(self, value: bytes) -> bytes:
        if len(value) >> 8 * self.size:
            raise Bad("field is too long")
        return len(value).to_bytes(self.size, "big") + value


@dataclass(frozen=True, slots=True)
class Utf8:
    """Well-formed UTF-8 behind a u16 length."""

    def read(self, reader: Reader) -> str:
        try:
            return reader.var(2).decode()
        except UnicodeDecodeError:
            raise Bad("text is not utf-8") from None

    def write(self, value: str) -> bytes:
        try:
            return Var(2).write(value.encode())
        except UnicodeEncodeError:
            raise Bad("text has a lone surrogate") from None


@dataclass(frozen=True, slots=True)
class ListOf:
    """Items behind a u16 count."""

    item: Codec

    def read(self, reader: Reader) -> tuple[Any, ...]:
        item = self.item
        return tuple([item.read(reader) for _ in range(reader.uint(2))])

    def write(self, value: tuple[Any, ...]) -> bytes:
        return Uint(2).write(len(value)) + b"".join([self.item.write(each) for each in value])


@dataclass(frozen=True, slots=True)
class Record:
    """The fields of a dataclass, one after the other."""

    shape: type[Any]
    names: tuple[str, ...]
    codecs: tuple[Codec, ...]

    def read(self, reader: Reader) -> Any:
        return self.shape(*[codec.read(reader) for codec in self.codecs])

    def write(self, value: Any, before: bytes = b"") -> bytes:
        parts = [codec.write(getattr(value, name)) for name, codec in zip(self.names, self.codecs, strict=True)]
        return b"".join([before, *parts])


U8 = Annotated[int, Uint(1)]
U16 = Annotated[int, Uint(2)]
U32 = Annotated[int, Uint(4)]
U64 = Annotated[int, Uint(8)]
Id = Annotated[bytes, Fixed(16)]
Key = Annotated[bytes, Fixed(32)]
Sig = Annotated[bytes, Fixed(64)]
Point = Annotated[bytes, Fixed(65)]
Big = Annotated[bytes, Var(4)]
Text = Annotated[str, Utf8()]


def codec_of(hint: Any) -> Codec:
    """The codec that an annotation stands for."""
    if isinstance(hint, type) and is_dataclass(hint):
        return record_of(hint)
    if get_origin(hint) is tuple:
        return ListOf(codec_of(get_args(hint)[0]))
    codec: Codec = hint.__metadata__[0]
    return codec


RECORDS: dict[type[Any], Record] = {}


def record_of(shape: type[Any]) -> Record:
    """The layout of a dataclass, worked out once."""
    found = RECORDS.get(shape)
    if found is None:
        hints = get_type_hints(shape, include_extras=True)
        names = tuple(field.name for field in fields(shape))
        found = RECORDS[shape] = Record(shape, names, tuple(codec_of(hints[name]) for name in names))
    return found


def encode(value: Any) -> bytes:
    """Bytes of a shape; raises Bad where a field does not fit its layout."""
    return record_of(type(value)).write(value)


def decode(shape: type[T], data: bytes, start: int = 0) -> T:
    """The shape that `data` is from `start` on, whole; raises Bad."""
    reader = Reader(data, start)
    value: T = record_of(shape).read(reader)
    reader.end()
    return value


def v(data: bytes) -> bytes:
    return Var(2).write(data)


def V(data: bytes) -> bytes:
    return Var(4).write(data)


LABELS = (
    *("charter", "roster", "leaf", "consent", "sponsor", "commit", "invite", "revoke", "share", "request", "resync"),
    *("relay", "login"),  # with the above: what is signed
    *("room", "dev", "member", "slots"),  # with some of the above: what is hashed
)
SIGN_PREFIX = {label: v(b"ZSR1 " + label.encode()) for label in LABELS}
HASH_PREFIX = {label: v(b"ZSR1 #" + label.encode()) for label in LABELS}


def enc(label: str, m: bytes) -> bytes:
    """E(l, m): what a signature covers."""
    return SIGN_PREFIX[label] + V(m)


def Hl(label: str, m: bytes) -> bytes:
    """The labelled SHA-256, 32 bytes."""
    return hashlib.sha256(HASH_PREFIX[label] + V(m)).digest()


def device_id(room: bytes, sigpub: bytes) -> bytes:
    return Hl("dev", room + sigpub)[:16]


def member_id(room: bytes, first_sigpub: bytes) -> bytes:
    return Hl("member", room + first_sigpub)[:16]


def b64u(data: bytes) -> str:
    return urlsafe_b64encode(data).rstrip(b"=").decode()


def unb64u(text: str) -> bytes:
    """Canonical unpadded base64url; raises Bad."""
    try:
        data = urlsafe_b64decode(text + "=" * (-len(text) % 4))
    except ValueError:
        raise Bad("address is not base64url") from None
    if b64u(data) != text:
        raise Bad("address is not canonical base64url")
    return data


def ascending(keys: Iterable[bytes], what: str) -> None:
    if any(one >= other for one, other in itertools.pairwise(keys)):
        raise Bad(f"{what} are not in ascending order, each once")


# ── objects that are signed or hashed ────────────────────────────────────────────────────────────────────────────────
@dataclass(frozen=True, slots=True)
class Signed:
    """S: the bytes as their signer made them and the signature over them; hashed and kept as received."""

    m: Big
    sig: Sig


@dataclass(frozen=True, slots=True)
class Charter:
    room: Key
    root: Point
    no: U64
    invites_from: U64
    admins: tuple[Point, ...]
    rotate_after: U32
    rotate_hours: U16
    who: U8
    history: U8
    joins: U8


@dataclass(frozen=True, slots=True)
class Device:
    sigpub: Point
    inv_id: Id
    from_: Key
    consent: Sig
    sponsor: Point
    sponsor_sig: Sig


@dataclass(frozen=True, slots=True)
class Member:
    member: Id
    devices: tuple[Device, ...]

    def __post_init__(self) -> None:
        ascending((device.sigpub for device in self.devices), "devices")


@dataclass(frozen=True, slots=True)
class Gone:
    dev: Id
    member: Id
    last: U64
    hash: Key


@dataclass(frozen=True, slots=True)
class Consumed:
    inv_id: Id
    dev: Id
    expiry: U64


@dataclass(frozen=True, slots=True)
class Roster:
    room: Key
    no: U64
    charter: Key
    signer: Id
    members: tuple[Member, ...]
    gone: tuple[Gone, ...]
    consumed: tuple[Consumed, ...]

    def __post_init__(self) -> None:
        ascending((member.member for member in self.members), "members")
        ascending((gone.dev for gone in self.gone), "gone devices")
        ascending((used.inv_id + used.dev for used in self.consumed), "consumed invites")


@dataclass(frozen=True, slots=True)
class Leaf:
    room: Key
    sigpub: Point
    kempub: Point
    leaf_no: U64


@dataclass(frozen=True, slots=True)
class Consent:
    room: Key
    member: Id
    dev: Id
    inv_id: Id


@dataclass(frozen=True, slots=True)
class Sponsor:
    room: Key
    member: Id
    sponsor_dev: Id
    dev: Id
    inv_id: Id


@dataclass(frozen=True, slots=True)
class Commit:
    room: Key
    epoch: U64
    parent: Key
    charter: Key
    roster: Key
    committer: Id
    reason: U8
    request: Key
    slots: Key


@dataclass(frozen=True, slots=True)
class Slot:
    type: U8
    dev: Id
    leaf_no: U64
    enc: Point
    ct: Annotated[bytes, Fixed(48)]


@dataclass(frozen=True, slots=True)
class Slots:
    """The list alone, with its count."""

    slots: tuple[Slot, ...]

    def __post_init__(self) -> None:
        ascending((slot.dev for slot in self.slots), "slots")


@dataclass(frozen=True, slots=True)
class Resync:
    room: Key
    head: Key
    leaf: Big


@dataclass(frozen=True, slots=True)
class Request:
    room: Key
    dev: Id
    kind: U8
    no: U64
    expiry: U64
    body: Big


@dataclass(frozen=True, slots=True)
class LinkBody:
    """Body of a request of kind 1: a member's device asks that its new device be admitted."""

    leaf: Big
    leaf_sig: Sig
    consent: Sig
    sponsor_sig: Sig
    inv_id: Id
    joinct: Key
    shares: tuple[SealedShare, ...]


@dataclass(frozen=True, slots=True)
class SealedShare:
    dev: Id
    ct: Big
    sig: Sig


@dataclass(frozen=True, slots=True)
class Last:
    dev: Id
    i: U64
    hash: Key


@dataclass(frozen=True, slots=True)
class LastBody:
    """Body of a request of kind 2 or 3: the devices to go, each with its last event."""

    lasts: tuple[Last, ...]


@dataclass(frozen=True, slots=True)
class Invite:
    room: Key
    dev: Id
    inv_id: Id
    kind: U8
    charter_no: U64
    expiry: U64
    uses: U8


@dataclass(frozen=True, slots=True)
class Revoke:
    room: Key
    dev: Id
    inv_id: Id


@dataclass(frozen=True, slots=True)
class Share:
    room: Key
    sender: Id
    recipient: Id
    inv_id: Id
    charter_no: U64
    digest: Key


@dataclass(frozen=True, slots=True)
class Relay:
    relay: Point
    room: Key
    client_nonce: Key
    relay_nonce: Key


@dataclass(frozen=True, slots=True)
class Login:
    relay: Point
    host: Text
    room: Key
    client_nonce: Key
    relay_nonce: Key
    dev: Id


@dataclass(frozen=True, slots=True)
class Unit:
    """A commit with all that judges it. Empty charter and roster: as the parent's (in uploads and log entries)."""

    charter: Big
    roster: Big
    body: Big
    sig: Sig
    tag: Key
    slots: Big
    chain: tuple[Big, ...]

    def __post_init__(self) -> None:
        if len(self.chain) > MAX_CHAIN:
            raise Bad("chain is longer than 256 commits")


@dataclass(frozen=True, slots=True)
class Proof:
    """A roster and its charter, as shown to prove removals."""

    charter: Signed
    roster: Signed


# ── frames of a client ───────────────────────────────────────────────────────────────────────────────────────────────
@dataclass(frozen=True, slots=True)
class UpNonce:
    nonce: Key


@dataclass(frozen=True, slots=True)
class UpLogin:
    m: Big
    sig: Sig
    sigpub: Point


@dataclass(frozen=True, slots=True)
class UpHello:
    run: Id
    cursor: U64
    unit: Big
    leaves: tuple[Signed, ...]
    evidence: tuple[Proof, ...]
    requests: tuple[Signed, ...]
    invites: tuple[Signed, ...]
    revokes: tuple[Signed, ...]


@dataclass(frozen=True, slots=True)
class UpFetch:
    inv_id: Id


@dataclass(frozen=True, slots=True)
class SealedJoin:
    dev: Id
    ct: Big


@dataclass(frozen=True, slots=True)
class UpJoin:
    inv_id: Id
    sealed: tuple[SealedJoin, ...]


@dataclass(frozen=True, slots=True)
class UpPost:
    ref: U32
    epoch: U64
    ch: Key
    ct: Big


@dataclass(frozen=True, slots=True)
class UpLive:
    type: U8
    epoch: U64
    ch: Key
    ct: Big


@dataclass(frozen=True, slots=True)
class UpCommit:
    ref: U32
    unit: Big


@dataclass(frozen=True, slots=True)
class UpDirect:
    ref: U32
    to: Id
    ch: Key
    leaf_no: U64
    ct: Big


@dataclass(frozen=True, slots=True)
class UpWelcome:
    ref: U32
    to: Id
    ct: Big


@dataclass(frozen=True, slots=True)
class UpShare:
    ref: U32
    to: Id
    inv_id: Id
    charter_no: U64
    ct: Big
    sig: Sig


@dataclass(frozen=True, slots=True)
class UpAck:
    run: Id
    no: U64


@dataclass(frozen=True, slots=True)
class UpDack:
    tids: tuple[U64, ...]


@dataclass(frozen=True, slots=True)
class UpLeaf:
    leaf: Signed


@dataclass(frozen=True, slots=True)
class UpResync:
    resync: Signed


@dataclass(frozen=True, slots=True)
class UpRequest:
    request: Signed


@dataclass(frozen=True, slots=True)
class UpInvite:
    ref: U32
    invite: Signed


@dataclass(frozen=True, slots=True)
class UpRevoke:
    ref: U32
    revoke: Signed


@dataclass(frozen=True, slots=True)
class UpEvidence:
    charter: Signed
    roster: Signed


@dataclass(frozen=True, slots=True)
class UpRefuse:
    dev: Id
    code: U8


@dataclass(frozen=True, slots=True)
class UpPut:
    ref: U32
    file_id: Id
    index: U32
    count: U32
    ct: Big


@dataclass(frozen=True, slots=True)
class UpGet:
    dev: Id
    file_id: Id
    from_: U32
    window: U32


@dataclass(frozen=True, slots=True)
class UpGot:
    dev: Id
    file_id: Id


@dataclass(frozen=True, slots=True)
class UpDrop:
    file_id: Id


@dataclass(frozen=True, slots=True)
class UpPing:
    token: U64


@dataclass(frozen=True, slots=True)
class UpHead:
    pass


# ── frames of the relay ──────────────────────────────────────────────────────────────────────────────────────────────
@dataclass(frozen=True, slots=True)
class DownRelay:
    m: Big
    sig: Sig
    run: Id
    head: Key


@dataclass(frozen=True, slots=True)
class DownFault:
    ref: U32
    code: Text
    text: Text
    retry_ms: U32


@dataclass(frozen=True, slots=True)
class DownHi:
    run: Id
    first: U64
    next: U64


@dataclass(frozen=True, slots=True)
class DownLeaves:
    leaves: tuple[Signed, ...]


@dataclass(frozen=True, slots=True)
class DownUnit:
    unit: Big


@dataclass(frozen=True, slots=True)
class DownEvent:
    """Entry of kind 1."""

    no: U64
    kind: U8
    poster: Id
    epoch: U64
    ch: Key
    ct: Big


@dataclass(frozen=True, slots=True)
class DownCommit:
    """Entry of kind 2."""

    no: U64
    kind: U8
    unit: Big


@dataclass(frozen=True, slots=True)
class DownReady:
    head: Key
    online: tuple[Id, ...]


@dataclass(frozen=True, slots=True)
class DownLive:
    type: U8
    poster: Id
    epoch: U64
    ch: Key
    ct: Big


@dataclass(frozen=True, slots=True)
class DownSent:
    ref: U32
    no: U64


@dataclass(frozen=True, slots=True)
class DownDirect:
    tid: U64
    kind: U8
    sender: Id
    ch: Key
    leaf_no: U64
    ct: Big


@dataclass(frozen=True, slots=True)
class ShareContent:
    """What `ct` of a direct of kind 3 holds."""

    inv_id: Id
    charter_no: U64
    ct: Big
    sig: Sig


@dataclass(frozen=True, slots=True)
class DownPeer:
    dev: Id
    online: U8


@dataclass(frozen=True, slots=True)
class PendingJoin:
    dev: Id
    sigpub: Point
    inv_id: Id
    ct: Big


@dataclass(frozen=True, slots=True)
class DownJoins:
    joins: tuple[PendingJoin, ...]


@dataclass(frozen=True, slots=True)
class DownRequests:
    requests: tuple[Signed, ...]


@dataclass(frozen=True, slots=True)
class DownResyncs:
    resyncs: tuple[Signed, ...]


@dataclass(frozen=True, slots=True)
class DownEvidence:
    evidence: tuple[Proof, ...]


@dataclass(frozen=True, slots=True)
class DownInvite:
    charter: Signed
    roster: Signed
    leaves: tuple[Signed, ...]
    invite: Signed


@dataclass(frozen=True, slots=True)
class DownChunk:
    dev: Id
    file_id: Id
    index: U32
    count: U32
    ct: Big


@dataclass(frozen=True, slots=True)
class DownNoFile:
    dev: Id
    file_id: Id


@dataclass(frozen=True, slots=True)
class DownSettled:
    dev: Id
    code: U8


@dataclass(frozen=True, slots=True)
class DownPong:
    token: U64


UP: Mapping[int, type[Any]] = dict(
    enumerate(
        (
            UpNonce,
            UpLogin,
            UpHello,
            UpFetch,
            UpJoin,
            UpPost,
            UpLive,
            UpCommit,
            UpDirect,
            UpWelcome,
            UpShare,
            UpAck,
            UpDack,
            UpLeaf,
            UpResync,
            UpRequest,
            UpInvite,
            UpRevoke,
            UpEvidence,
            UpRefuse,
            UpPut,
            UpGet,
            UpGot,
            UpDrop,
            UpPing,
            UpHead,
        ),
        0x01,
    )
)
DOWN: Mapping[int, type[Any]] = {
    0x81: DownRelay,
    0x82: DownFault,
    0x83: DownHi,
    0x84: DownLeaves,
    0x85: DownUnit,
    0x86: DownEvent,
    0x87: DownReady,
    0x88: DownLive,
    0x89: DownSent,
    0x8A: DownDirect,
    0x8B: DownPeer,
    0x8C: DownJoins,
    0x8D: DownRequests,
    0x8E: DownResyncs,
    0x8F: DownEvidence,
    0x90: DownInvite,
    0x91: DownChunk,
    0x92: DownNoFile,
    0x93: DownSettled,
    0x99: DownPong,
}
ENTRIES: Mapping[int, type[Any]] = {1: DownEvent, 2: DownCommit}  # both are type 0x86; their kind tells them apart
CODES: Mapping[type[Any], bytes] = {shape: bytes([code]) for code, shape in [*UP.items(), *DOWN.items()]} | {
    DownCommit: b"\x86"
}
FAULTS = frozenset(
    {
        "bad",
        "forged",
        "login",
        "host",
        "unlisted",
        "unknown",
        "stale",
        "lost",
        "full",
        "slow",
        "too-big",
        "busy",
        "no-invite",
        "used",
        "over",
        "refused",
    }
)


def encode_frame(frame: Any) -> bytes:
    return record_of(type(frame)).write(frame, CODES[type(frame)])


def decode_frame(data: bytes) -> Any:
    """A frame of either direction; raises Bad."""
    shape = UP.get(data[0]) or DOWN.get(data[0]) if data else None
    if shape is DownEvent and len(data) > 9:
        shape = ENTRIES.get(data[9])
    if shape is None:
        raise Bad("frame is of an unknown type")
    return decode(shape, data, 1)


def split_frames(message: bytes) -> list[bytes]:
    """The frames of one socket message, at least one; raises Bad."""
    reader = Reader(message)
    frames = [reader.var(4)]
    while reader.at < len(message):
        frames.append(reader.var(4))
    return frames


def join_frames(frames: Iterable[bytes]) -> bytes:
    return b"".join([V(frame) for frame in frames])


# ── verification: pure functions of bytes; each signature and each unit once ─────────────────────────────────────────
P256_P = 2**256 - 2**224 + 2**192 + 2**96 - 1
P256_B = 0x5AC635D8AA3A93E7B3EBBD55769886BC651D06B0CC53B0F63BCE3C3E27D2604B
DAY_MS = 86_400_000


def on_curve(point: bytes) -> bool:
    """Whether 65 bytes are an uncompressed point of P-256; the point at infinity has no such form."""
    if len(point) != 65 or point[0] != 4:
        return False
    x, y = int.from_bytes(point[1:33], "big"), int.from_bytes(point[33:], "big")
    return x < P256_P and y < P256_P and (y * y - x * x * x + 3 * x - P256_B) % P256_P == 0


def must(holds: bool, text: str) -> None:
    if not holds:
        raise Forged(text)


def verify_signature(key: bytes, label: str, m: bytes, sig: bytes) -> bool:
    """ECDSA P-256/SHA-256 over E(label, m), signature r || s; False also for a key off the curve."""
    if not on_curve(key):
        return False
    public = ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), key)
    der = encode_dss_signature(int.from_bytes(sig[:32], "big"), int.from_bytes(sig[32:], "big"))
    try:
        public.verify(der, enc(label, m), ec.ECDSA(hashes.SHA256()))
    except InvalidSignature:
        return False
    return True


class Recent(Generic[K, T]):
    """A dict that forgets what was not asked for the longest."""

    __slots__ = ("items", "places")

    def __init__(self, places: int) -> None:
        self.items: dict[K, T] = {}
        self.places = places

    def get(self, key: K) -> T | None:
        value = self.items.pop(key, None)
        if value is not None:
            self.items[key] = value
        return value

    def put(self, key: K, value: T) -> None:
        if len(self.items) >= self.places:
            del self.items[next(iter(self.items))]
        self.items[key] = value


@dataclass(frozen=True, slots=True)
class Listed:
    """A device of a roster."""

    sigpub: bytes
    member: bytes
    inv_id: bytes


@dataclass(frozen=True, slots=True)
class Listing:
    """A verified charter and roster, by device id."""

    proof: Proof
    charter: Charter
    roster: Roster
    charter_hash: bytes
    roster_hash: bytes
    admins: tuple[bytes, ...]
    devices: Mapping[bytes, Listed]
    gone: Mapping[bytes, Gone]
    consumed: Mapping[bytes, Consumed]

    @property
    def weight(self) -> tuple[int, int, int, bytes]:
        """W: charter number, roster number, seniority of the roster's signer, H(roster)."""
        return self.charter.no, self.roster.no, -self.admins.index(self.roster.signer), self.roster_hash


@dataclass(frozen=True, slots=True)
class Head:
    """A verified unit; `data` is the full unit as others are given it."""

    ch: bytes
    commit: Commit
    listing: Listing
    unit: Unit
    data: bytes
    slots: Mapping[bytes, Slot]
    ancestors: frozenset[bytes]


def preferred(new: Head, old: Head) -> bool:
    """Fork choice: whether `new` takes the place of `old`."""
    if new.ch == old.ch or new.ch in old.ancestors:
        return False
    if new.listing.weight != old.listing.weight:
        return new.listing.weight > old.listing.weight
    if old.ch in new.ancestors:
        return True
    return (new.commit.epoch, new.ch) > (old.commit.epoch, old.ch)


class Verifier:
    """Checks signed objects; remembers a bounded number of those that held."""

    __slots__ = ("_heads", "_limits", "_listings", "_signatures")

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._signatures: Recent[bytes, bool] = Recent(65_536)
        self._listings: Recent[bytes, Listing] = Recent(64)
        self._heads: Recent[bytes, Head] = Recent(16)

    def signature(self, key: bytes, label: str, m: bytes, sig: bytes) -> None:
        """Raises Forged unless `sig` is the signature of `key` over `m` under `label`."""
        name = hashlib.sha256(key + sig + enc(label, m)).digest()
        if self._signatures.get(name):
            return
        must(verify_signature(key, label, m, sig), f"{label} signature does not verify")
        self._signatures.put(name, True)

    def listing(self, room: bytes, proof: Proof) -> Listing:
        """A charter up from the room id and the roster under it, whatever came before them."""
        name = hashlib.sha256(room + encode(proof)).digest()
        found = self._listings.get(name)
        if found is None:
            found = self._listing(room, proof, self._charter(room, proof.charter))
            self._listings.put(name, found)
        return found

    def _charter(self, room: bytes, signed: Signed) -> Charter:
        charter = decode(Charter, signed.m)
        must(charter.room == room == Hl("room", charter.root), "charter is of another room")
        must(charter.who <= 1 and charter.history <= 2 and charter.joins <= 1, "charter has an unknown policy")
        must(0 < len(charter.admins) <= self._limits.devices, "charter names no admin, or too many")
        must(len(set(charter.admins)) == len(charter.admins), "charter names an admin twice")
        must(all(map(on_curve, charter.admins)), "admin key is not on the curve")
        self.signature(charter.root, "charter", signed.m, signed.sig)
        return charter

    def _listing(self, room: bytes, proof: Proof, charter: Charter) -> Listing:
        roster, charter_hash = decode(Roster, proof.roster.m), Hl("charter", proof.charter.m)
        must(roster.room == room and roster.charter == charter_hash, "roster is of another charter")
        admins = tuple(device_id(room, key) for key in charter.admins)
        must(roster.signer in admins, "roster is not signed by an admin")
        key = charter.admins[admins.index(roster.signer)]
        self.signature(key, "roster", proof.roster.m, proof.roster.sig)
        gone = {each.dev: each for each in roster.gone}
        listing = Listing(
            proof,
            charter,
            roster,
            charter_hash,
            Hl("roster", proof.roster.m),
            admins,
            self._devices(room, roster, gone),
            gone,
            {each.inv_id: each for each in roster.consumed},
        )
        must(len(listing.consumed) == len(roster.consumed), "an invite is consumed twice")
        must(all(dev in listing.devices or dev in gone for dev in admins), "an admin is neither listed nor gone")
        return listing

    def _devices(self, room: bytes, roster: Roster, gone: Mapping[bytes, Gone]) -> dict[bytes, Listed]:
        devices: dict[bytes, Listed] = {}
        entries = [(member.member, device) for member in roster.members for device in member.devices]
        must(0 < len(entries) <= self._limits.devices, "roster lists no device, or too many")
        for member, device in entries:
            devices[device_id(room, device.sigpub)] = Listed(device.sigpub, member, device.inv_id)
        must(len(devices) == len(entries) and not devices.keys() & gone.keys(), "a device is listed twice or gone")
        must(all(member.devices for member in roster.members), "a member has no device")
        for dev, (member, device) in zip(devices, entries, strict=True):
            consent = encode(Consent(room, member, dev, device.inv_id))
            self.signature(device.sigpub, "consent", consent, device.consent)
            self._sponsored(room, member, dev, device, devices, gone)
        return devices

    def _sponsored(
        self,
        room: bytes,
        member: bytes,
        dev: bytes,
        device: Device,
        devices: Mapping[bytes, Listed],
        gone: Mapping[bytes, Gone],
    ) -> None:
        """A member's first device names the member; every other was brought in by one of that member's."""
        if device.sponsor == ZERO65:
            must(member == member_id(room, device.sigpub), "member id is not of its first device")
            return
        by = device_id(room, device.sponsor)
        home = devices.get(by) or gone.get(by)
        must(home is not None and home.member == member and by != dev, "device is sponsored by another member")
        m = encode(Sponsor(room, member, by, dev, device.inv_id))
        self.signature(device.sponsor, "sponsor", m, device.sponsor_sig)

    def unit(self, room: bytes, data: bytes, parent: Head | None) -> Head:
        """A unit by itself; `parent` lends charter, roster and ancestry where the unit is its child and leaves them
        out. What it may change upon that parent is `follows`."""
        name = hashlib.sha256(room + data).digest()
        found = self._heads.get(name)
        if found is None:
            found = self._unit(room, decode(Unit, data), parent)
            if found.data == data:  # full, so that no parent had a say
                self._heads.put(name, found)
        return found

    def _unit(self, room: bytes, unit: Unit, parent: Head | None) -> Head:
        commit, ch = decode(Commit, unit.body), Hl("commit", unit.body)
        lender = parent if parent is not None and parent.ch == commit.parent else None
        if lender is None and not (unit.charter and unit.roster):
            raise Bad("unit lacks its charter or roster")
        charter = unit.charter or (lender.unit.charter if lender else b"")
        roster = unit.roster or (lender.unit.roster if lender else b"")
        listing = self.listing(room, Proof(decode(Signed, charter), decode(Signed, roster)))
        self._commit(room, ch, commit, unit, listing)
        chain = self._chain(commit, unit.chain, lender)
        full = Unit(charter, roster, unit.body, unit.sig, unit.tag, unit.slots, chain)
        slots = {slot.dev: slot for slot in decode(Slots, unit.slots).slots}
        self._slots(commit, slots, listing)
        return Head(ch, commit, listing, full, encode(full), slots, frozenset(Hl("commit", body) for body in chain))

    def _commit(self, room: bytes, ch: bytes, commit: Commit, unit: Unit, listing: Listing) -> None:
        must(commit.room == room, "commit is of another room")
        must(commit.charter == listing.charter_hash, "commit is of another charter")
        must(commit.roster == listing.roster_hash, "commit is of another roster")
        must(commit.reason <= 2, "commit has an unknown reason")
        must((commit.epoch == 0) == (commit.parent == ZERO32), "commit has no parent, or one too many")
        must(commit.slots == Hl("slots", unit.slots), "slots are of another commit")
        committer = listing.devices.get(commit.committer)
        if committer is None:
            raise Forged("committer is not listed")
        self.signature(committer.sigpub, "commit", ch, unit.sig)

    def _slots(self, commit: Commit, slots: Mapping[bytes, Slot], listing: Listing) -> None:
        must(commit.committer not in slots, "committer has a slot")
        must(slots.keys() <= listing.devices.keys(), "slot is of an unlisted device")
        must(all(slot.type <= 1 and on_curve(slot.enc) for slot in slots.values()), "slot is of no use")

    def _chain(self, commit: Commit, chain: tuple[bytes, ...], lender: Head | None) -> tuple[bytes, ...]:
        """The bodies since this roster's first commit, each proved by the parent hash in the next."""
        if lender and lender.commit.roster == commit.roster:
            must(chain in ((), (*lender.unit.chain, lender.unit.body)), "chain is not the head's")
            chain = (*lender.unit.chain, lender.unit.body)
        child = commit
        for body in reversed(chain):
            must(Hl("commit", body) == child.parent, "chain does not lead to its commit")
            before = decode(Commit, body)
            must(before.epoch == child.epoch - 1, "epoch does not follow")
            must(
                (before.room, before.charter, before.roster) == (child.room, child.charter, child.roster),
                "chain goes beyond its roster",
            )
            child = before
        return chain

    def follows(self, new: Head, old: Head, wall_ms: int, asked: frozenset[bytes]) -> None:
        """What a commit may change upon its parent; `asked` are devices whose own member asked to see them go."""
        must(new.commit.epoch == old.commit.epoch + 1, "epoch does not follow")
        one, two = old.listing, new.listing
        must(two.charter.no > one.charter.no or two.charter_hash == one.charter_hash, "charter goes back")
        if two.roster_hash == one.roster_hash:
            must(new.commit.reason != 0, "nothing changed")
            by_admin = two.charter.who == 0 or new.commit.committer in two.admins
            must(by_admin or new.commit.reason == 2, "rotation is for admins here")
            return
        must(new.commit.committer == two.roster.signer, "changed roster is committed by another")
        least = one.roster.no + (two.charter.no == one.charter.no)
        must(least <= two.roster.no <= one.roster.no + self._limits.roster_step, "roster number is out of range")
        self._additions(one, two)
        self._removals(one, two, asked)
        kept = wall_ms - (self._limits.consumed_days - 1) * DAY_MS  # a day's grace: clocks differ
        must(
            all(two.consumed.get(used.inv_id) == used for used in one.consumed.values() if used.expiry > kept),
            "a consumed invite is forgotten",
        )

    def _additions(self, one: Listing, two: Listing) -> None:
        for dev in two.devices.keys() - one.devices.keys():
            inv_id = two.devices[dev].inv_id
            used = two.consumed.get(inv_id)
            must(inv_id != ZERO16 and used is not None and used.dev == dev, "addition consumes no invite of its own")
            before = one.consumed.get(inv_id)
            must(before is None or before.dev == dev, "invite was consumed before")

    def _removals(self, one: Listing, two: Listing, asked: frozenset[bytes]) -> None:
        for was in one.gone.values():
            now = two.gone.get(was.dev)
            must(now is not None and now.member == was.member and now.last >= was.last, "a gone device is forgotten")
        must(one.devices.keys() - two.devices.keys() <= two.gone.keys(), "a device vanishes without being gone")
        if two.charter.no > one.charter.no:  # root has spoken
            return
        rank = two.admins.index(two.roster.signer)
        for dev in two.gone.keys() - one.gone.keys() - asked:
            must(dev not in two.admins[:rank], "an admin removes a more senior one")
