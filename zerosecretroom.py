#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = ["websockets>=15,<18", "cryptography>=46"]
# ///
"""ZeroSecretRoom: the relay of end-to-end encrypted rooms. Start it, open the address it prints.

What it can see: room ids, device public keys, signed charters, rosters and commits (who is listed, who is an admin),
sizes, times, addresses of sockets, who is connected. What it cannot see: any key of a room, text, names, titles, file
names, thumbnails, reactions. It keeps everything in memory; on disk lie keys and certificates.

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
    Page         index.html as it is served: hashes, policy, headers; /trust; the answers to plain requests
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
import difflib
import email.utils
import errno
import functools
import gc
import gzip
import hashlib
import html
import http.client
import importlib
import ipaddress
import itertools
import json
import logging
import operator
import os
import plistlib
import re
import signal
import socket
import ssl
import stat
import struct
import time
import traceback
import uuid
import weakref
from base64 import b64encode, urlsafe_b64decode, urlsafe_b64encode
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, fields, is_dataclass, replace
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
    from websockets.protocol import State
    from websockets.server import ServerProtocol

    try:
        from websockets.speedups import apply_mask
    except ImportError:  # a build without its C part
        from websockets.utils import apply_mask
except ImportError as error:
    sys.stderr.write(
        f"zerosecretroom: {error}: install what it needs with: "
        f"{sys.executable or 'python3'} -m pip install 'websockets>=15,<18' 'cryptography>=46'\n"
    )
    raise SystemExit(2) from None

VERSION = "1.0.0"


# ════════════════════════════════════════════════════════════════════════════════════════════════════════════════════
# Limits: every number of the relay, with its unit and its reason. Knows nothing; every later room may ask it.
# ════════════════════════════════════════════════════════════════════════════════════════════════════════════════════
@dataclass(frozen=True, slots=True)
class Limits:
    """What the relay will hold and wait for. Bytes are of stored frames with `overhead` each; seconds are monotonic."""

    ttl: float = 72 * 3600.0  # s: a long weekend offline loses nothing; beyond it vectors heal
    max_memory: int = 1 << 30  # bytes in all rooms: what a small rented machine can spare
    max_room_memory: int = 256 << 20  # bytes a room: four files of the largest size with their messages
    max_file: int = 64 << 20  # bytes of one file before sealing; a larger one passes through a window
    chunk: int = 256 << 10  # bytes of a sealed chunk, the last excepted: what Tink's segments are
    max_message: int = 4 << 20  # bytes of a WebSocket message, many frames: a hello with several rosters
    max_frame: int = 2 << 20  # bytes of one frame: a unit of 1,024 devices with its chain is 0.6 MiB
    max_envelope: int = 512 << 10  # bytes of one sealed event, batch or chunk; a chunk is 256 KiB
    max_sealed: int = 4096  # bytes of one sealed join, welcome excepted: a leaf, two signatures, a name
    file_share: float = 0.875  # of either memory limit: files never crowd out the messages about them
    file_window: int = 16  # chunks in flight for one get: 4 MiB keep 200 Mbit/s busy at 150 ms
    files: int = 1024  # files a room keeps at once: bounds the bookkeeping of empty ones
    overhead: int = 256  # bytes charged for each stored thing beside its own: Python's objects
    sealed_bytes: int = 192  # bytes charged for each that a join is sealed to, beside what is sealed
    parsed: int = 7  # times its own bytes that a unit or a roster takes once it is read: measured 6.2 to 6.9
    signatures: int = 65_536  # remembered as good: 10 MB, and all members of a room at a restart
    cache_bytes: int = 32 << 20  # bytes of rosters remembered as good, and of units: several of the largest
    mark_bytes: int = 64  # bytes charged for each that has a file or waits for it: up to a thousand of both a file
    room_bytes: int = 1792  # bytes charged for a room itself: 1,494 were measured
    seat_bytes: int = 320  # bytes charged for a listed device beside what waits for it
    rooms: int = 20_000  # rooms at once: each costs 2 KB even when empty
    devices: int = 1024  # devices in one roster: a verification takes 0.1 ms each
    devices_a_member: int = 64  # of these of one member: nobody has as many, and gone ones do not count
    newcomers: int = 256  # sockets a room admits that no roster lists, or none yet after a restart
    newcomers_an_address: int = 32  # of these from one address: a class that was invited together
    joins: int = 64  # pending joins a room: one admin answers each within seconds
    joins_an_invite: int = 8  # devices trying one link: the true one and some that read it on the way
    invites: int = 256  # open invites a room
    requests: int = 256  # pending requests a room
    requests_a_device: int = 16  # of these from one device
    max_request: int = 16_384  # bytes of one: the farewell of 64 devices is 4 KB, and all wait in one frame
    evidence: int = 32  # rosters kept as proof of a removal: those the head has not caught up with
    directs: int = 2000  # direct envelopes that wait for one device
    direct_bytes: int = 4 << 20  # bytes of them: beyond, the earliest go, vectors ask again
    roster_step: int = 1024  # how far a roster number may rise at once: it must never be used up
    leap: int = 1 << 24  # the same, and of an epoch, from one branch to another
    number: int = 1 << 48  # none is above it, so that there is always one to follow
    consumed_days: int = 30  # days a used invite stays listed beyond its end
    outbox: int = 16 << 20  # bytes of live frames queued for a slow socket, and of answers to what comes at once
    rooms_an_address: int = 1000  # rooms at once that one address brought: a twentieth of all
    connections: int = 20_000  # sockets at once: 27 KB each make half a GB
    connections_an_address: int = 512  # of these from one IPv4 address or IPv6 /64: a school behind one router
    turned_away: int = 16  # beyond either of the two, at once, that are told why before they are let go
    other_files: int = 32  # descriptors for what is no connection: listeners, the log, certificates being read
    busy_retry_ms: int = 15_000  # ms after which they may try again
    unsent: int = 65_536  # bytes that the system takes of a peer beyond what its line carries just now
    conn_bytes: int = 65_536  # bytes charged for a connection: 27 KB were measured; busy ones take twice that
    connection_share: float = 0.25  # of what rooms and connections have, kept for the latter: full rooms shut no door
    link_share: float = 0.25  # of all memory, for what comes and goes; beyond, whoever holds most of it is cut
    link_least: int = 16 << 20  # bytes of that in any case: four of the largest messages
    messages_at_once: int = 16  # of one socket, before it is seen how much it asked for
    odd_frames: int = 1000  # WebSocket frames a tick that end no message: pings, fragments; pages send some ten
    silence: float = 60.0  # s without a byte before a socket counts as dead: pages ping after 20
    head_bytes: int = 16_384  # bytes of a request head: browsers send 1 KB
    head_seconds: float = 10.0  # s from connecting to a whole request head, TLS included
    answer_seconds: float = 120.0  # s until an answer is taken whole: the page comes through 17 kbit/s
    close_seconds: float = 3.0  # s a farewell may take: 5 s after SIGTERM every socket is gone
    tick_seconds: float = 1.0  # s between two looks of Link at one connection: 20,000 take 30 ms in all
    collect_least: int = 1000  # connections to end before a search for cycles of garbage, which looks at all there is
    join_bytes: int = 262_144  # bytes of frames joined into one message: browsers take that in one go
    large_frame: int = 65_536  # bytes from which copying a frame costs more than a message of its own
    login_timeout: float = 15.0  # s from the socket's opening to a valid login, and from there to what it came for
    slow_seconds: float = 60.0  # s after which a connected device that acks nothing holds back nobody's bytes
    frames_a_message: int = 4096  # taken from one message: with a signature each they keep all others waiting 0.4 s
    frames_a_second: int = 400  # of one device in the long run: a file at 800 Mbit/s, or forty people typing
    frames_at_once: int = 4000  # of one device after a silence: what a page brings that was away for long
    bytes_a_second: int = 32 << 20  # of one device in the long run: 270 Mbit/s
    bytes_at_once: int = 64 << 20  # of one device after a silence: a file of the largest size
    checks_a_second: int = 650  # signatures checked for one device in the long run: a tenth of a core, 0.15 ms each
    checks_at_once: int = 4096  # of one device after a silence: who brings back a room of 1,024 shows 3,072
    checks_unlisted: int = 256  # for one hello of a device not listed, before the next of what it brings is passed over
    rotation_seconds: float = 10.0  # s between two commits on an unchanged roster
    resync_seconds: float = 60.0  # s between two resyncs of one device under one head
    upkeep_seconds: float = 3.0  # s between looks at the certificate's files and its end: two calls of stat
    renewal_retry: float = 3600.0  # s from a renewal that failed to the next: the disk may be full
    sweep_seconds: float = 30.0  # s in which each room is looked at for what time ended: 20,000 take 0.3 s in all
    pressed_share: float = 0.875  # of all memory: above it, what time ended goes within a second
    pressed_seconds: float = 1.0  # s, that second
    full_retry_ms: int = 5000  # ms a sender waits after `full`: acks free bytes within seconds
    demo_ttl: float = 3600.0  # s an event stays in the demo room
    demo_events: int = 200  # events kept there
    demo_file: int = 4 << 20  # bytes of a file there: anyone may post

    @property
    def for_rooms(self) -> int:
        """Bytes for rooms, and for connections as such."""
        return int(self.max_memory * (1 - self.link_share))

    @property
    def for_connections(self) -> int:
        """Bytes of these that rooms leave free for connections to come."""
        return min(self.connections * self.conn_bytes, int(self.for_rooms * self.connection_share))

    @property
    def for_passage(self) -> int:
        """Bytes for what is being received and what waits to be taken."""
        return max(int(self.max_memory * self.link_share), self.link_least)

    @property
    def for_log(self) -> int:
        """Bytes of one room's log: who comes back gets all that it missed at once, and has to be able to take it."""
        return min(self.max_room_memory, self.for_passage // 2)


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

    def read_whole(self, data: bytes, start: int) -> Any:
        """What stands from `start` to the end of the data."""
        reader = Reader(data, start)
        value = self.read(reader)
        reader.end()
        return value

    def write(self, value: Any, before: bytes = b"") -> bytes:
        parts = [codec.write(getattr(value, name)) for name, codec in zip(self.names, self.codecs, strict=True)]
        return b"".join([before, *parts])


@dataclass(frozen=True, slots=True)
class Flat(Record):
    """A record of numbers and fixed bytes, and at most one variable field at its end: read and written in one go, since
    each post and each delivery is one."""

    values: Callable[[Any], tuple[Any, ...]]
    layout: struct.Struct
    sizes: tuple[tuple[int, int], ...]  # of the fixed bytes, by place: a Struct would cut or fill them up
    wide: tuple[int, ...]  # places of u64
    tail: bool

    def read(self, reader: Reader) -> Any:
        values = self._values(reader.data, reader.at)
        reader.at += self.layout.size
        return self.shape(*values[:-1], reader.take(values[-1])) if self.tail else self.shape(*values)

    def read_whole(self, data: bytes, start: int) -> Any:
        values = self._values(data, start)
        end = start + self.layout.size
        over = len(data) - end - (values[-1] if self.tail else 0)
        if over:
            raise Bad("message has trailing bytes" if over > 0 else "message ends too early")
        return self.shape(*values[:-1], data[end:]) if self.tail else self.shape(*values)

    def _values(self, data: bytes, start: int) -> tuple[Any, ...]:
        if start + self.layout.size > len(data):
            raise Bad("message ends too early")
        values = self.layout.unpack_from(data, start)
        for place in self.wide:
            if values[place] > MAX_UINT:
                raise Bad("number above 2^53")
        return values

    def write(self, value: Any, before: bytes = b"") -> bytes:
        return self.pack(self.values(value), before)

    def pack(self, values: tuple[Any, ...], before: bytes = b"") -> bytes:
        for place, size in self.sizes:
            if len(values[place]) != size:
                raise Bad(f"field is not {size} bytes")
        for place in self.wide:
            if values[place] > MAX_UINT:
                raise Bad("number out of range")
        tail = values[-1] if self.tail else b""
        try:
            head = self.layout.pack(*values[:-1], len(tail)) if self.tail else self.layout.pack(*values)
        except struct.error:
            raise Bad("number out of range") from None
        return b"".join([before, head, tail])


UINTS = {1: "B", 2: "H", 4: "I", 8: "Q"}


def flat_of(shape: type[Any], names: tuple[str, ...], codecs: tuple[Codec, ...]) -> Flat | None:
    """The fast layout of a record that has one."""
    tail = bool(codecs) and codecs[-1] == Var(4)
    fixed = codecs[:-1] if tail else codecs
    plain = [each for each in fixed if isinstance(each, Uint | Fixed)]
    if len(plain) != len(fixed) or len(names) < 2:
        return None
    form = "".join(UINTS[each.size] if isinstance(each, Uint) else f"{each.size}s" for each in plain)
    return Flat(
        shape,
        names,
        codecs,
        operator.attrgetter(*names),
        struct.Struct(">" + form + "I" * tail),
        tuple((place, each.size) for place, each in enumerate(plain) if isinstance(each, Fixed)),
        tuple(place for place, each in enumerate(plain) if each == Uint(8)),
        tail,
    )


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
        codecs = tuple(codec_of(hints[name]) for name in names)
        found = RECORDS[shape] = flat_of(shape, names, codecs) or Record(shape, names, codecs)
    return found


def encode(value: Any) -> bytes:
    """Bytes of a shape; raises Bad where a field does not fit its layout."""
    return record_of(type(value)).write(value)


def decode(shape: type[T], data: bytes, start: int = 0) -> T:
    """The shape that `data` is from `start` on, whole; raises Bad."""
    value: T = record_of(shape).read_whole(data, start)
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


def frame_maker(shape: type[Any]) -> Callable[..., bytes]:
    """Bytes of a frame of fixed fields from these, in order: for the two that each post brings about."""
    record, code = record_of(shape), CODES[shape]
    assert isinstance(record, Flat)
    return lambda *values: record.pack(values, code)


event_frame, sent_frame = frame_maker(DownEvent), frame_maker(DownSent)


def decode_frame(data: bytes) -> Any:
    """A frame of either direction; raises Bad."""
    shape = UP.get(data[0]) or DOWN.get(data[0]) if data else None
    if shape is DownEvent and len(data) > 9:
        shape = ENTRIES.get(data[9])
    if shape is None:
        raise Bad("frame is of an unknown type")
    return record_of(shape).read_whole(data, 1)


def split_frames(message: bytes, most: int = MAX_UINT) -> list[bytes]:
    """The frames of one socket message, at least one and no more than `most`; raises Bad."""
    frames: list[bytes] = []
    at = 0
    while at < len(message) or not frames:
        start = at + 4
        at = start + int.from_bytes(message[at:start], "big")
        if at > len(message):
            raise Bad("message ends too early")
        frames.append(message[start:at])
        if len(frames) > most:
            raise Bad("message holds too many frames")
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


@functools.lru_cache(maxsize=256)  # a device that arrives has signed its login, its leaf and its consent
def public_key(point: bytes) -> ec.EllipticCurvePublicKey | None:
    """The key whose point these bytes are, if they are one's."""
    return ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), point) if on_curve(point) else None


def verify_signature(key: bytes, label: str, m: bytes, sig: bytes) -> bool:
    """ECDSA P-256/SHA-256 over E(label, m), signature r || s; False also for a key off the curve."""
    public = public_key(key)
    if public is None:
        return False
    der = encode_dss_signature(int.from_bytes(sig[:32], "big"), int.from_bytes(sig[32:], "big"))
    try:
        public.verify(der, enc(label, m), ec.ECDSA(hashes.SHA256()))
    except InvalidSignature:
        return False
    return True


class Recent(Generic[K, T]):
    """A dict that forgets what was not asked for the longest, so that what it holds never weighs more than `most`."""

    __slots__ = ("_held", "_most", "_weight")

    def __init__(self, most: int) -> None:
        self._held: dict[K, tuple[T, int]] = {}
        self._most, self._weight = most, 0

    def get(self, key: K) -> T | None:
        found = self._held.pop(key, None)
        if found is None:
            return None
        self._held[key] = found
        return found[0]

    def put(self, key: K, value: T, weight: int = 1) -> None:
        while self._held and self._weight + weight > self._most:
            self._weight -= self._held.pop(next(iter(self._held)))[1]
        self._held[key] = value, weight
        self._weight += weight


@dataclass(frozen=True, slots=True)
class Listed:
    """A device of a roster; `sponsor` is the one that linked it, empty for a member's first; `entry` is all of it."""

    sigpub: bytes
    member: bytes
    inv_id: bytes
    sponsor: bytes
    entry: Device


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

    def heeds(self, other: Listing) -> bool:
        """Whether the signer of another roster is an admin of the charter in force here, or of a later one."""
        return other.charter.no > self.charter.no or other.roster.signer in self.admins


@dataclass(frozen=True, slots=True)
class Head:
    """A verified unit; `data` is the full unit as others are given it."""

    ch: bytes
    commit: Commit
    listing: Listing
    unit: Unit
    data: bytes
    slots: Mapping[bytes, Slot]
    line: tuple[Commit, ...]  # the commits since this roster's first, itself included

    @property
    def ancestors(self) -> frozenset[bytes]:
        """Hashes of those before it on this roster."""
        return frozenset(each.parent for each in self.line[1:])


def preferred(new: Head, old: Head) -> bool:
    """Fork choice: whether `new` takes the place of `old`."""
    if new.ch == old.ch or new.ch in old.ancestors:
        return False
    if new.listing.weight != old.listing.weight:
        return new.listing.weight > old.listing.weight
    if old.ch in new.ancestors:
        return True
    return (new.commit.epoch, new.ch) > (old.commit.epoch, old.ch)


def _follows_on(before: Commit, child: Commit) -> None:
    """Raises Forged unless `child` may come right after `before` on one roster."""
    must(before.epoch == child.epoch - 1, "epoch does not follow")
    must(
        (before.room, before.charter, before.roster) == (child.room, child.charter, child.roster),
        "chain goes beyond its roster",
    )


def _grounded(devices: Mapping[bytes, Listed]) -> None:
    """Raises Forged where devices sponsor each other: they would be anybody's."""
    grounded = {b""}
    for dev in devices:
        line: dict[bytes, None] = {}
        while dev in devices and dev not in grounded:
            must(dev not in line, "devices sponsor each other")
            line[dev] = None
            dev = devices[dev].sponsor
        grounded |= line.keys()


class Verifier:
    """Checks signed objects; remembers a bounded number of those that held."""

    __slots__ = ("_heads", "_limits", "_listings", "_signatures", "checked")

    def __init__(self, limits: Limits) -> None:
        self._limits, self.checked = limits, 0  # signatures that were not remembered, good or not
        self._signatures: Recent[bytes, bool] = Recent(limits.signatures)
        self._listings: Recent[bytes, Listing] = Recent(limits.cache_bytes)
        self._heads: Recent[bytes, Head] = Recent(limits.cache_bytes)

    def signature(self, key: bytes, label: str, m: bytes, sig: bytes) -> None:
        """Raises Forged unless `sig` is the signature of `key` over `m` under `label`."""
        name = hashlib.sha256(key + sig + enc(label, m)).digest()
        if self._signatures.get(name):
            return
        self.checked += 1
        must(verify_signature(key, label, m, sig), f"{label} signature does not verify")
        self._signatures.put(name, True)

    def listing(self, room: bytes, proof: Proof) -> Listing:
        """A charter up from the room id and the roster under it, whatever came before them."""
        name = hashlib.sha256(room + encode(proof)).digest()
        found = self._listings.get(name)
        if found is None:
            found = self._listing(room, proof, self._charter(room, proof.charter))
            size = len(proof.charter.m) + len(proof.roster.m)
            self._listings.put(name, found, size * self._limits.parsed)
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
            sponsor = b"" if device.sponsor == ZERO65 else device_id(room, device.sponsor)
            devices[device_id(room, device.sigpub)] = Listed(device.sigpub, member, device.inv_id, sponsor, device)
        must(len(devices) == len(entries) and not devices.keys() & gone.keys(), "a device is listed twice or gone")
        must(all(member.devices for member in roster.members), "a member has no device")
        if any(len(member.devices) > self._limits.devices_a_member for member in roster.members):
            raise PeerFault("too-big", "a member has more devices than this relay takes")
        for dev, (member, device) in zip(devices, entries, strict=True):
            consent = encode(Consent(room, member, dev, device.inv_id))
            self.signature(device.sigpub, "consent", consent, device.consent)
            self._sponsored(room, member, dev, device, devices, gone)
        _grounded(devices)
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
                self._heads.put(name, found, len(data) * self._limits.parsed)
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
        chain, line = self._chain(commit, unit.chain, lender)
        full = Unit(charter, roster, unit.body, unit.sig, unit.tag, unit.slots, chain)
        slots = {slot.dev: slot for slot in decode(Slots, unit.slots).slots}
        self._slots(commit, slots, listing)
        self._born(line, listing, slots)
        return Head(ch, commit, listing, full, encode(full), slots, line)

    def _commit(self, room: bytes, ch: bytes, commit: Commit, unit: Unit, listing: Listing) -> None:
        must(commit.room == room, "commit is of another room")
        must(commit.charter == listing.charter_hash, "commit is of another charter")
        must(commit.roster == listing.roster_hash, "commit is of another roster")
        must((commit.epoch == 0) == (commit.parent == ZERO32), "commit has no parent, or one too many")
        must(commit.slots == Hl("slots", unit.slots), "slots are of another commit")
        must(max(commit.epoch, listing.roster.no) <= self._limits.number, "a number that nothing can follow")
        committer = listing.devices.get(commit.committer)
        if committer is None:
            raise Forged("committer is not listed")
        self.signature(committer.sigpub, "commit", ch, unit.sig)

    def _slots(self, commit: Commit, slots: Mapping[bytes, Slot], listing: Listing) -> None:
        must(commit.committer not in slots, "committer has a slot")
        must(slots.keys() == listing.devices.keys() - {commit.committer}, "slots are not those of the roster")
        must(all(slot.type <= 1 and on_curve(slot.enc) for slot in slots.values()), "slot is of no use")

    def _chain(
        self, commit: Commit, chain: tuple[bytes, ...], lender: Head | None
    ) -> tuple[tuple[bytes, ...], tuple[Commit, ...]]:
        """The bodies since this roster's first commit, each proved by the parent hash in the next; and all the commits
        of that roster, the unit's own last. What a lender has proved is not proved again."""
        if lender and lender.commit.roster == commit.roster:
            whole = (*lender.unit.chain, lender.unit.body)
            must(chain in ((), whole), "chain is not the head's")
            _follows_on(lender.commit, commit)
            return whole, (*lender.line, commit)
        line = [commit]
        for body in reversed(chain):
            must(Hl("commit", body) == line[-1].parent, "chain does not lead to its commit")
            before = decode(Commit, body)
            _follows_on(before, line[-1])
            line.append(before)
        return chain, tuple(reversed(line))

    def _born(self, line: tuple[Commit, ...], listing: Listing, slots: Mapping[bytes, Slot]) -> None:
        """A roster begins with its signer's own commit; rotations alone follow, by whom policy lets. Also where the
        parent is not known here, or an unknown parent would lend any right."""
        first, *rest = line
        commit = line[-1]
        must(first.reason == 0 and first.committer == listing.roster.signer, "changed roster is committed by another")
        must(all(each.reason in (1, 2) for each in rest), "nothing changed")
        answers = commit.reason == 2 and any(slot.type == 1 for slot in slots.values())
        may = listing.charter.who == 0 or commit.committer in listing.admins
        must(may or answers, "rotation is for admins here")

    def leaps(self, new: Head, old: Head) -> None:
        """Raises Forged for numbers so far ahead that they use up what there is: a head from another branch."""
        most = self._limits.leap
        must(new.commit.epoch - old.commit.epoch <= most, "epoch leaps")
        must(new.listing.roster.no - old.listing.roster.no <= most, "roster number leaps")

    def follows(self, new: Head, old: Head, wall_ms: int, asked: frozenset[bytes]) -> None:
        """What a commit may change upon its parent; `asked` are devices whose own member asked to see them go."""
        must(new.commit.epoch == old.commit.epoch + 1, "epoch does not follow")
        one, two = old.listing, new.listing
        must(two.charter.no > one.charter.no or two.charter_hash == one.charter_hash, "charter goes back")
        if two.roster_hash == one.roster_hash:
            return
        least = one.roster.no + (two.charter.no == one.charter.no)
        must(least <= two.roster.no <= one.roster.no + self._limits.roster_step, "roster number is out of range")
        self._kept(one, two)
        self._additions(one, two)
        self._removals(one, two, asked)
        kept = wall_ms - (self._limits.consumed_days - 1) * DAY_MS  # a day's grace: clocks differ
        must(
            all(two.consumed.get(used.inv_id) == used for used in one.consumed.values() if used.expiry > kept),
            "a consumed invite is forgotten",
        )

    def _kept(self, one: Listing, two: Listing) -> None:
        """An entry stays as it was made, or its device would read from elsewhere. The creator's first one alone could
        not name the commit it came by."""
        for dev in one.devices.keys() & two.devices.keys():
            was, now = one.devices[dev], two.devices[dev]
            unnamed = was.inv_id == ZERO16 and was.entry.from_ == ZERO32
            kept = replace(now.entry, from_=ZERO32) if unnamed else now.entry
            must(was.member == now.member and was.entry == kept, "an entry is changed")

    def _additions(self, one: Listing, two: Listing) -> None:
        for dev in two.devices.keys() - one.devices.keys():
            inv_id = two.devices[dev].inv_id
            used = two.consumed.get(inv_id)
            must(inv_id != ZERO16 and used is not None and used.dev == dev, "addition consumes no invite of its own")
            before = one.consumed.get(inv_id)
            must(before is None or before.dev == dev, "invite was consumed before")
            sponsor = two.devices[dev].sponsor
            must(not sponsor or sponsor in two.devices, "device is sponsored by one that is gone")
            start = two.devices[sponsor].entry.from_ if sponsor else ZERO32
            told = start != ZERO32 or (not sponsor and one.charter.history == 0)
            must(not told or two.devices[dev].entry.from_ == start, "device may read from too early")

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


# ════════════════════════════════════════════════════════════════════════════════════════════════════════════════════
# Rooms: what the relay holds and the rules by which it changes. Synchronous: no clock, no socket, no await, so every
# message is handled whole or, where it is refused, not at all. Knows Limits, Errors and Wire; only Link calls it.
# ════════════════════════════════════════════════════════════════════════════════════════════════════════════════════
NEW, GREETED, KNOWN, MEMBER = 1, 2, 4, 8  # a socket: opened, nonce answered, device proved, listed and said hello
SEEN, PRESENCE = 2, 3  # types of a group envelope that are not kept; 1 is an event
DIRECT, WELCOME, SHARE = 1, 2, 3  # kinds of a direct
BY_DECISION, LINK_USED, LINK_OVER = 1, 2, 3
LINK, UNLINK, LEAVE, SPLIT = 1, 2, 3, 4  # kinds of a request
DEMO = "aaa"
DEMO_ROOM = Hl("room", DEMO.encode())
CLOSE_LOGIN, CLOSE_UNLISTED, CLOSE_REPLACED, CLOSE_ADDRESS = 4001, 4003, 4004, 4005
CLOSE_BUSY = 1013
NOT_KEPT = "the earliest was not kept for those away: they get it from you or others"


class Identity(Protocol):
    """The relay's own key: `public` is its point, `sign` makes r || s over E(label, m)."""

    @property
    def public(self) -> bytes: ...
    def sign(self, label: str, m: bytes) -> bytes: ...


class Send(NamedTuple):
    """Effect: this frame to each of these sockets, in the order of effects."""

    conns: tuple[Hashable, ...]
    frame: bytes


class Answer(Send):
    """Effect: a frame to the socket that asked, whose place among others does not matter."""

    __slots__ = ()


class Bulk(Send):
    """Effect: a chunk to each of these sockets; what people say does not wait behind it."""

    __slots__ = ()


class Close(NamedTuple):
    """Effect: this socket ends once what is queued for it has gone."""

    conn: Hashable
    code: int
    reason: str


class Wait(NamedTuple):
    """Effect: nothing more is read from this socket for so many seconds."""

    conn: Hashable
    seconds: float


Effects = list[Send | Close | Wait]


class Entry(NamedTuple):
    """One entry of a room's log."""

    no: int
    at: float
    frame: bytes


class Join(NamedTuple):
    """A newcomer's request for admission, sealed to each admin device."""

    sigpub: bytes
    inv_id: bytes
    sealed: Mapping[bytes, bytes]
    at: float


class Asked(NamedTuple):
    """A pending request and the devices it is about."""

    request: Request
    signed: Signed
    devs: frozenset[bytes]


def uncount(counter: Counter[str], key: str) -> None:
    """One less; what came to nothing is forgotten, or keys would pile up."""
    counter[key] -= 1
    if not counter[key]:
        del counter[key]


class Pace:
    """How much a device may send at once: frames, bytes and signatures to be checked, which time brings back. What one
    message brings is taken whole and may go below nothing; then nothing is read until it is made up for."""

    __slots__ = ("_at", "_frames", "_size", "checks")

    def __init__(self, limits: Limits, now: float) -> None:
        self._frames, self._size, self._at = float(limits.frames_at_once), float(limits.bytes_at_once), now
        self.checks = float(limits.checks_at_once)  # signatures that may be checked yet

    def spend(self, frames: int, size: int, checks: int, limits: Limits, now: float) -> float:
        """Seconds until the next message may be read."""
        passed, self._at = now - self._at, now
        self._frames = min(self._frames + passed * limits.frames_a_second, limits.frames_at_once) - frames
        self._size = min(self._size + passed * limits.bytes_a_second, limits.bytes_at_once) - size
        self.checks = min(self.checks + passed * limits.checks_a_second, limits.checks_at_once) - checks
        late = -self._frames / limits.frames_a_second, -self._size / limits.bytes_a_second
        return max(*late, -self.checks / limits.checks_a_second, 0.0)


class Peer:
    """One socket."""

    __slots__ = ("conn", "dev", "inv_id", "nonces", "origin", "pace", "room", "sigpub", "state")

    def __init__(self, conn: Hashable, room: Room, pace: Pace, origin: str) -> None:
        self.conn, self.room, self.state, self.pace, self.origin = conn, room, NEW, pace, origin
        self.dev = self.sigpub = self.nonces = b""
        self.inv_id: bytes | None = None  # an invite it waits to be told of


class Seat:
    """A listed device, present or not."""

    __slots__ = ("cursor", "direct_bytes", "directs", "first", "pace", "peer", "resynced")

    def __init__(self, first: int) -> None:
        self.first = self.cursor = first  # the last log number of before it was listed, and the last it acknowledged
        self.peer: Peer | None = None
        self.pace: Pace | None = None  # its last socket's: who comes back has not forgotten what it sent
        self.directs: dict[int, tuple[int, float, bytes]] | None = None  # tid: kind, since when, frame
        self.direct_bytes = 0
        self.resynced = float("-inf")


class File:
    """Sealed chunks on their way: who has them all, and who waits for which. A streamed one is larger than the relay
    keeps: its sender hears of a chunk once all who take the file have passed it, and it stays a window longer, for one
    whose connection lost what was under way."""

    __slots__ = ("at", "chunks", "count", "floor", "got", "marks", "puts", "size", "streamed", "waits")

    def __init__(self, count: int, at: float, streamed: bool, floor: int) -> None:
        self.count, self.at, self.streamed, self.size = count, at, streamed, 0
        self.floor = floor  # of a streamed one: chunks below have passed
        self.chunks: dict[int, bytes] = {}
        # of a streamed one, by index: who put it (none once it has gone), its ref, bytes
        self.puts: dict[int, tuple[Peer | None, int, int]] = {}
        self.got: set[bytes] = set()
        self.waits: dict[Peer, tuple[int, int]] = {}  # next index, and the first beyond the window
        self.marks = 0  # in both, as they were last charged for

    def next(self, index: int) -> int:
        """The first chunk from this index on that is not here: where its sender may go on."""
        while index in self.chunks:
            index += 1
        return index

    def passing(self) -> int:
        """How many chunks of a streamed one have not passed yet."""
        return sum(index >= self.floor for index in self.chunks)

    def unanswered(self, below: int) -> list[tuple[Peer, int]]:
        """Who put those chunks of a streamed one that have yet to pass, up to an index, and the refs to be answered."""
        puts = (self.puts[index] for index in self.puts if self.floor <= index < below)
        return [(peer, ref) for peer, ref, _ in puts if peer]

    def forget(self, peer: Peer) -> None:
        """Nobody is left to be answered: a connection that has ended is not held by what came of it."""
        self.puts = {index: (None if by is peer else by, ref, size) for index, (by, ref, size) in self.puts.items()}

    def gives(self, index: int) -> bool:
        """Whether all from this index on is here or has yet to come."""
        return index >= self.floor or self.next(index) >= self.floor


class Shelf(Generic[K, T]):
    """Things of one kind that a room keeps: so many, and charged to its memory."""

    __slots__ = ("items", "places", "room")

    def __init__(self, room: Room, places: int) -> None:
        self.room, self.places = weakref.proxy(room), places  # a cycle would outlive its room until it is searched for
        self.items: dict[K, tuple[T, int]] = {}

    def __len__(self) -> int:
        return len(self.items)

    def __contains__(self, key: K) -> bool:
        return key in self.items

    def get(self, key: K) -> T | None:
        found = self.items.get(key)
        return found[0] if found else None

    def values(self) -> list[T]:
        return [value for value, _ in self.items.values()]

    def check(self, key: K, what: str) -> None:
        """Raises Full where there is no place for a new key."""
        if key not in self.items and len(self.items) >= self.places:
            raise Full(f"too many {what} in this room", self.room.limits.full_retry_ms)

    def put(self, key: K, value: T, size: int) -> None:
        self.drop(key)
        size += self.room.limits.overhead
        self.items[key] = value, size
        self.room.charge(size)

    def drop(self, key: K) -> None:
        found = self.items.pop(key, None)
        if found:
            self.room.charge(-found[1])

    def keep(self, wanted: Callable[[K, T], bool]) -> None:
        for key in [key for key, (value, _) in self.items.items() if not wanted(key, value)]:
            self.drop(key)


class Purse:
    """Bytes in use by all rooms together."""

    __slots__ = ("used",)

    def __init__(self) -> None:
        self.used = 0


NO_ENTRIES: deque[Entry] = deque(maxlen=0)  # every empty log: one of its own would be a third of an idle room


class Room:
    """What the relay holds of one room. Its methods never fail: who may change what is judged in Rooms."""

    __slots__ = (
        "__weakref__",
        "acked",
        "attended",
        "conns",
        "demo",
        "evidence",
        "files",
        "head",
        "id",
        "invites",
        "joins",
        "leaves",
        "limits",
        "live",
        "log",
        "logged",
        "newcomers",
        "next",
        "origin",
        "purse",
        "requests",
        "resyncs",
        "revokes",
        "rotated",
        "seats",
        "taken",
        "told",
        "used",
    )

    def __init__(self, room_id: bytes, demo: bool, first: int, limits: Limits, purse: Purse) -> None:
        self.id, self.demo, self.limits, self.purse = room_id, demo, limits, purse
        self.head: Head | None = None
        self.seats: dict[bytes, Seat] = {}
        self.newcomers: dict[bytes, Peer] = {}  # proved their device, but no roster lists it
        self.conns, self.attended, self.used, self.origin = 0, 0.0, 0, ""
        self.log, self.logged = NO_ENTRIES, 0  # and what it is charged for
        self.next = first
        self.acked = False  # since the log was last cut
        self.live: tuple[Hashable, ...] | None = None  # sockets of members; None once that changed
        self.taken: dict[bytes, int] = {}  # commits of late and their log numbers
        self.rotated = self.told = float("-inf")  # the last rotation, and when posters last heard of a loss
        self.files: dict[tuple[bytes, bytes], File] = {}
        self.leaves: Shelf[bytes, tuple[Leaf, Signed]] = Shelf(self, limits.devices)
        self.invites: Shelf[bytes, tuple[Invite, Signed]] = Shelf(self, limits.invites)
        self.revokes: Shelf[bytes, tuple[Revoke, Signed]] = Shelf(self, limits.invites)
        self.requests: Shelf[bytes, Asked] = Shelf(self, limits.requests)
        self.resyncs: Shelf[bytes, Signed] = Shelf(self, limits.devices)
        self.evidence: Shelf[bytes, Listing] = Shelf(self, limits.evidence)
        self.joins: Shelf[bytes, Join] = Shelf(self, limits.joins)
        self.charge(limits.room_bytes)

    # ── bytes ────────────────────────────────────────────────────────────────────────────────────────────────────
    def charge(self, size: int) -> None:
        self.used += size
        self.purse.used += size

    def cost(self, frame: bytes) -> int:
        return len(frame) + self.limits.overhead

    def cost_of_head(self, head: Head | None, devices: int) -> int:
        """What a head with so many seats beside it takes."""
        return self.limits.parsed * (len(head.data) if head else 0) + self.limits.seat_bytes * devices

    # ── the log ──────────────────────────────────────────────────────────────────────────────────────────────────
    def append(self, frame: bytes, now: float) -> None:
        """Adds the entry whose frame was made for the number `next`."""
        if not self.log:
            self.log = deque()
        self.log.append(Entry(self.next, now, frame))
        self.next += 1
        self._log_takes(self.cost(frame))
        if self.demo and len(self.log) > self.limits.demo_events:
            self.forget(1)

    def forget(self, count: int) -> list[Entry]:
        """Drops the earliest entries, and gives them back."""
        gone = [self.log.popleft() for _ in range(count)]
        if not self.log:
            self.log = NO_ENTRIES
        self._log_takes(-sum(self.cost(entry.frame) for entry in gone))
        return gone

    def _log_takes(self, size: int) -> None:
        self.logged += size
        self.charge(size)

    def trim(self) -> None:
        """Drops what every listed device has acknowledged."""
        self.acked = False
        low = 0 if self.demo else min((seat.cursor for seat in self.seats.values()), default=0)
        self.forget(sum(1 for _ in itertools.takewhile(lambda entry: entry.no <= low, self.log)))

    def spare(self, short: int, now: float) -> int | None:
        """How many of the earliest entries free `short` bytes without taking them from a connected device that keeps
        up; None where they do not suffice."""
        if short <= 0:
            return 0
        low = min((seat.cursor for seat in self.seats.values() if seat.peer and not self.demo), default=self.next)
        count = 0
        for entry in self.log:
            if short <= 0 or (entry.no > low and now - entry.at < self.limits.slow_seconds):
                break
            short -= self.cost(entry.frame)
            count += 1
        return count if short <= 0 else None

    # ── members ──────────────────────────────────────────────────────────────────────────────────────────────────
    def members(self) -> tuple[Hashable, ...]:
        """The sockets of all present devices, made once between changes: a post is one frame to this tuple."""
        if self.live is None:
            self.live = tuple(seat.peer.conn for seat in self.seats.values() if seat.peer)
        return self.live

    def others(self, peer: Peer) -> tuple[Hashable, ...]:
        return tuple(conn for conn in self.members() if conn != peer.conn)

    def online(self) -> tuple[bytes, ...]:
        return tuple(dev for dev, seat in self.seats.items() if seat.peer)

    def asked_out(self, *kinds: int) -> frozenset[bytes]:
        """Devices that their own member asked to have out by requests of these kinds."""
        return frozenset(dev for each in self.requests.values() if each.request.kind in kinds for dev in each.devs)

    # ── directs ──────────────────────────────────────────────────────────────────────────────────────────────────
    def drop_direct(self, seat: Seat, tid: int) -> None:
        found = seat.directs.pop(tid, None) if seat.directs else None
        if found:
            seat.direct_bytes -= self.cost(found[2])
            self.charge(-self.cost(found[2]))
        if not seat.directs:
            seat.directs = None

    def empty_seat(self, seat: Seat) -> None:
        self.charge(-seat.direct_bytes)
        seat.direct_bytes, seat.directs = 0, None

    # ── files ────────────────────────────────────────────────────────────────────────────────────────────────────
    def drop_file(self, key: tuple[bytes, bytes]) -> File | None:
        file = self.files.pop(key, None)
        if file:
            self.charge(-file.size - self.limits.overhead * (len(file.chunks) + 1))
            self.charge(-file.marks * self.limits.mark_bytes)
        return file

    def count_marks(self, file: File) -> None:
        """Charges for who has a file and who waits for it, after either changed."""
        before, file.marks = file.marks, len(file.got) + len(file.waits)
        self.charge((file.marks - before) * self.limits.mark_bytes)

    def pass_chunks(self, file: File, low: int) -> list[tuple[Peer, int]]:
        """Counts what is below as passed: who put it, and the refs to be answered. The last window of it stays."""
        answers = file.unanswered(low)
        file.floor = low
        self.drop_chunks(file, low - self.limits.file_window)
        return answers

    def drop_chunks(self, file: File, low: int) -> None:
        """Takes what is below out of a streamed file."""
        for index in [index for index in file.chunks if index < low]:
            del file.chunks[index]
            size = file.puts.pop(index)[2]
            file.size -= size
            self.charge(-size - self.limits.overhead)

    def wanted_by(self, key: tuple[bytes, bytes], file: File) -> bool:
        """Whether some listed device but the author has not said that it has the file."""
        return self.demo or bool(self.seats.keys() - file.got - {key[0]})


class Rooms:
    """All rooms. `wall` gives ms since 1970, for expiries that members signed; `now` is seconds of any steady clock."""

    def __init__(
        self,
        limits: Limits,
        identity: Identity,
        run: bytes,
        names: frozenset[str],
        random: Callable[[int], bytes],
        wall: Callable[[], int],
    ) -> None:
        self._limits, self._identity, self._run = limits, identity, run
        self._for_rooms, self._for_connections = limits.for_rooms, limits.for_connections
        self.names = names  # of hosts under which a login counts; another certificate may bring others
        self._random, self._wall = random, wall
        self._verifier = Verifier(limits)
        self._unlisted = Pace(limits, 0.0)  # of all devices that no head lists together: each has as many as it likes
        self._purse = Purse()
        self._linked = 0  # bytes of connections in it
        self._rooms: dict[bytes, Room] = {}
        self._idle: dict[bytes, Room] = {}  # without a socket, the longest so first
        self.refusals: Counter[str] = Counter()  # by code, for the operator
        self._brought: Counter[str] = Counter()  # rooms that are here, by where they came from
        self._peers: dict[Hashable, Peer] = {}
        self._arriving: dict[Hashable, float] = {}  # no login yet, or nothing asked since: until when, in order
        self._acked: set[Room] = set()
        self._turns: deque[bytes] = deque()  # rooms that the sweep has yet to come to
        self._round = 0  # how many it had to when it began with them
        self._owed = 0.0  # how many of them, by the time that passed
        self._first = 1  # log numbers are never used twice in a run
        self._tid = 0
        self._swept = float("-inf")
        self._out: Effects = []
        self._shown = b"", b""  # the unit that was last told as a head, and its frame
        self._handlers = self._table()

    def _table(self) -> dict[type[Any], tuple[int, Callable[[Peer, Any, float], None]]]:
        """Who may say what: the states a frame is allowed in, and its handler."""
        return {
            UpNonce: (NEW, self._nonce),
            UpLogin: (GREETED, self._login),
            UpHello: (KNOWN | MEMBER, self._hello),
            UpFetch: (KNOWN, self._fetch),
            UpJoin: (KNOWN, self._join),
            UpPing: (KNOWN | MEMBER, self._ping),
            UpPost: (MEMBER, self._post),
            UpLive: (MEMBER, self._live),
            UpCommit: (MEMBER, self._commit),
            UpDirect: (MEMBER, self._direct),
            UpWelcome: (MEMBER, self._welcome),
            UpShare: (MEMBER, self._share),
            UpAck: (MEMBER, self._ack),
            UpDack: (MEMBER, self._dack),
            UpLeaf: (MEMBER, self._leaf),
            UpResync: (MEMBER, self._resync),
            UpRequest: (MEMBER, self._request),
            UpInvite: (MEMBER, self._invite),
            UpRevoke: (MEMBER, self._revoke),
            UpEvidence: (MEMBER, self._evidence),
            UpRefuse: (MEMBER, self._refuse),
            UpPut: (MEMBER, self._put),
            UpGet: (MEMBER, self._get),
            UpGot: (MEMBER, self._got),
            UpDrop: (MEMBER, self._drop),
            UpHead: (MEMBER, self._give_head),
        }

    # ── what Link calls ──────────────────────────────────────────────────────────────────────────────────────────
    def enter(self, conn: Hashable, room_path: str, now: float, origin: str = "") -> Effects:
        """A socket opened at /ws/<room_path>. `origin` is where it comes from, if that is one to be counted."""
        try:
            room = self._room_at(room_path, origin)
        except PeerFault as fault:
            self.refusals[fault.code] += 1
            frame = encode_frame(DownFault(0, fault.code, fault.text, fault.retry_ms))
            return [Send((conn,), frame), Close(conn, CLOSE_ADDRESS, fault.code)]
        room.conns += 1
        self._idle.pop(room.id, None)
        self._peers[conn] = Peer(conn, room, Pace(self._limits, now), origin)
        self._arriving[conn] = now + self._limits.login_timeout
        return []

    def handle(self, conn: Hashable, message: bytes, now: float) -> Effects:
        """A message of a socket: each of its frames is taken whole, or refused and told so."""
        return self.handle_all(conn, (message,), now)

    def handle_all(self, conn: Hashable, messages: Sequence[bytes], now: float) -> Effects:
        """Messages of one socket that came together, each as by itself."""
        peer, self._out = self._peers.get(conn), []
        if peer is None:
            return []
        count = asked = 0
        checked = self._verifier.checked
        for message in messages:
            if conn not in self._peers:
                break
            frames: list[bytes] = []
            try:
                frames = split_frames(message, self._limits.frames_a_message)
            except PeerFault as fault:
                self._refused(peer, fault, 0, now)
            count += len(frames) or 1
            for place, data in enumerate(frames):
                if place and asked > self._limits.outbox and conn in self._peers:
                    self._cut_off(peer, now)
                if conn in self._peers:
                    asked += self._frame(peer, data, now)
        size, checks = sum(map(len, messages)) + asked, self._verifier.checked - checked
        if wait := peer.pace.spend(count, size, checks, self._limits, now):
            self._slow_down(peer, wait)
        return self._out

    def _cut_off(self, peer: Peer, now: float) -> None:
        """A few bytes may ask for a head of megabytes, or for a whole log, again and again: who wants more at once than
        a socket's outbox holds gets what there is so far, and no more. Nothing weighs it before all is handled."""
        text = "one message asks for more than this relay answers at once"
        self._tell_fault(peer, PeerFault("busy", text, self._limits.busy_retry_ms))
        self._end(peer, CLOSE_BUSY, "busy", now)

    def _asked(self, peer: Peer, mark: int) -> int:
        """Bytes of what the effects from `mark` on tell this socket alone, but for chunks, which have a window."""
        told = [each for each in self._out[mark:] if isinstance(each, Send) and not isinstance(each, Bulk)]
        return sum(len(each.frame) for each in told if each.conns == (peer.conn,))

    def _slow_down(self, peer: Peer, wait: float) -> None:
        """All that came was taken; what follows waits in the network, which slows the sender down and loses nothing."""
        if peer.conn in self._peers:
            text = "frames come faster than this relay takes them from one device"
            self._tell_fault(peer, PeerFault("busy", text, int(wait * 1000) + 1))
            self._out.append(Wait(peer.conn, wait))

    def leave(self, conn: Hashable, now: float) -> Effects:
        """A socket is gone."""
        self._out = []
        peer = self._peers.get(conn)
        if peer:
            self._forget(peer, now)
        return self._out

    def expire(self, now: float) -> Effects:
        """What time alone does; to be called several times a second, so that there is never much of it at once."""
        self._out = []
        for conn in [*itertools.takewhile(lambda each: self._arriving[each] <= now, self._arriving)]:
            self._end(self._peers[conn], CLOSE_LOGIN, "login timeout", now)
        for room in self._acked:
            room.trim()
        self._acked.clear()
        for room_id in self._due(now):
            if there := self._rooms.get(room_id):
                self._sweep(there, now)
        return self._out

    def _due(self, now: float) -> list[bytes]:
        """The rooms whose turn it is: as many of all as time has passed of that in which each has its turn."""
        pressed = self._in_use() > self._for_rooms * self._limits.pressed_share
        span = self._limits.pressed_seconds if pressed else self._limits.sweep_seconds
        passed, self._swept = now - self._swept, now
        if passed >= span:
            self._turns.clear()
            return [*self._rooms]
        if not self._turns:
            self._turns.extend(self._rooms)
            self._round, self._owed = len(self._turns), 0.0
        self._owed += self._round * passed / span
        count = min(int(self._owed), len(self._turns))
        self._owed -= count
        return [self._turns.popleft() for _ in range(count)]

    def charge(self, size: int) -> bool:
        """Counts bytes of connections. Rooms that nobody is in make place for them; False: that is not enough."""
        self._purse.used += size
        self._linked += size
        idle = self._largest_idle(self._purse.used - self._for_rooms) if size > 0 else []
        for room in idle or ():
            self._forget_room(room)
        return idle is not None

    def counts(self) -> dict[str, int]:
        """For the operator: numbers without ids."""
        return {
            "rooms": len(self._rooms),
            "connections": len(self._peers),
            "bytes": self._purse.used,
            "entries": sum(len(room.log) for room in self._rooms.values()),
            "files": sum(len(room.files) for room in self._rooms.values()),
        }

    # ── sockets and rooms ────────────────────────────────────────────────────────────────────────────────────────
    def _room_at(self, path: str, origin: str) -> Room:
        demo = path == DEMO
        room_id = DEMO_ROOM if demo else unb64u(path)
        if len(room_id) != 32 or (room_id == DEMO_ROOM) != demo:  # that one has its own name
            raise Bad("address is not a room's")
        room = self._rooms.get(room_id)
        if room is None:
            if len(self._rooms) >= self._limits.rooms and not self._idle:
                raise PeerFault("busy", "this relay holds as many rooms as it may", self._limits.full_retry_ms)
            if origin and self._brought[origin] >= self._limits.rooms_an_address:
                raise PeerFault("busy", "too many rooms came from your address", self._limits.full_retry_ms)
            if len(self._rooms) >= self._limits.rooms:
                self._forget_room(next(iter(self._idle.values())))
            room = self._rooms[room_id] = Room(room_id, demo, self._first, self._limits, self._purse)
            room.origin = origin
            self._brought[origin] += 1
        return room

    def _forget_room(self, room: Room) -> None:
        """Nothing is lost by it: the next member to come brings back all that counts."""
        self._purse.used -= room.used
        self._first = max(self._first, room.next)
        self._acked.discard(room)
        del self._rooms[room.id]
        self._idle.pop(room.id, None)
        uncount(self._brought, room.origin)

    def _forget(self, peer: Peer, now: float) -> None:
        room = peer.room
        del self._peers[peer.conn]
        self._arriving.pop(peer.conn, None)
        if room.newcomers.get(peer.dev) is peer:
            del room.newcomers[peer.dev]
        for (author, _), file in room.files.items():
            if author == peer.dev and file.puts:
                file.forget(peer)
            if file.waits.pop(peer, None):
                room.count_marks(file)
                self._pass(room, file, file.floor)
        seat = room.seats.get(peer.dev)
        if seat and seat.peer is peer:
            self._absent(room, peer, seat)
        room.conns -= 1
        if not room.conns:
            room.attended = now
            self._idle[room.id] = room
            if not (room.head or room.log or room.files):
                self._forget_room(room)

    def _absent(self, room: Room, peer: Peer, seat: Seat) -> None:
        seat.peer, room.live = None, None
        if room.demo:
            del room.seats[peer.dev]
            room.charge(-self._limits.seat_bytes)
        self._send(room.members(), DownPeer(peer.dev, 0))

    def _end(self, peer: Peer, code: int, reason: str, now: float) -> None:
        self._out.append(Close(peer.conn, code, reason))
        self._forget(peer, now)

    def _show_cut(self, peer: Peer) -> None:
        """Who was unlinked by another device of its member is shown that device's word."""
        asked = tuple(each.signed for each in peer.room.requests.values() if peer.dev in each.devs)
        if asked:
            self._tell(peer, DownRequests(asked))

    def _turn_away(self, peer: Peer, text: str, now: float) -> None:
        """An unlisted device is shown the head that leaves it out: it judges for itself."""
        if peer.room.head:
            self._tell(peer, DownUnit(peer.room.head.data))
        self._tell(peer, DownFault(0, "unlisted", text, 0))
        self._end(peer, CLOSE_UNLISTED, "unlisted", now)

    # ── effects ──────────────────────────────────────────────────────────────────────────────────────────────────
    def _send(self, conns: tuple[Hashable, ...], frame: Any) -> None:
        if conns:
            self._out.append(Send(conns, encode_frame(frame)))

    def _tell(self, peer: Peer, frame: Any) -> None:
        self._out.append(Send((peer.conn,), encode_frame(frame)))

    def _answer(self, peer: Peer, frame: Any) -> None:
        self._out.append(Answer((peer.conn,), encode_frame(frame)))

    def _tell_fault(self, peer: Peer, fault: PeerFault, ref: int = 0) -> None:
        self.refusals[fault.code] += 1
        self._tell(peer, DownFault(ref, fault.code, fault.text, fault.retry_ms))

    def _tell_head(self, peer: Peer, head: Head) -> None:
        """The frame is made once: whoever asks again and again gets the same bytes."""
        if self._shown[0] is not head.data:
            self._shown = head.data, encode_frame(DownUnit(head.data))
        self._out.append(Send((peer.conn,), self._shown[1]))

    def _frame(self, peer: Peer, data: bytes, now: float) -> int:
        """Takes a frame, or tells what is wrong with it. Returns the bytes that it asked for; what a member missed, it
        may have for the asking, once."""
        mark, frame, state = len(self._out), None, peer.state
        try:
            if len(data) > self._limits.max_frame:
                raise PeerFault("too-big", "frame is larger than this relay takes")
            frame = decode_frame(data)
            states, handler = self._handlers.get(type(frame), (0, None))
            if handler is None or not peer.state & states:
                raise Bad("frame is not expected now")
            handler(peer, frame, now)
        except PeerFault as fault:
            del self._out[mark:]
            self._refused(peer, fault, getattr(frame, "ref", 0), now)
        return self._asked(peer, mark) if peer.state == state else 0

    def _refused(self, peer: Peer, fault: PeerFault, ref: int, now: float) -> None:
        """Who has not logged in yet has one try."""
        self._tell_fault(peer, fault, ref)
        if peer.state < KNOWN:
            self._end(peer, CLOSE_LOGIN, fault.code, now)

    # ── memory ───────────────────────────────────────────────────────────────────────────────────────────────────
    def _afford(self, room: Room, need: int, now: float, share: float = 1.0, entry: int = 0) -> None:
        """Makes room for `need` bytes, or raises Full and leaves all as it was. First goes what all have; then the
        earliest that only absent or silent devices lack; then rooms that nobody is in, or where they do not suffice the
        earliest in a larger room, or in this one. Files make nothing go but rooms that nobody is in. `entry`: of these
        bytes, those that go into the log."""
        limits = self._limits
        over = room.used - share * limits.max_room_memory, self._in_use() - share * self._for_rooms
        log_over = room.logged + entry - limits.for_log if entry else 0
        if max(*over) + need <= 0 and log_over <= 0:
            return
        room.trim()
        log_over = room.logged + entry - limits.for_log if entry else 0
        room_over = room.used + need - limits.max_room_memory
        count = room.spare(max(room_over, log_over), now) if share == 1.0 else 0
        if count is None or (share < 1.0 and room.used + need > share * limits.max_room_memory):
            raise Full("this room holds as much as it may", limits.full_retry_ms)
        short = self._in_use() + need - int(share * self._for_rooms)
        idle = self._largest_idle(short)
        larger = self._largest_log(room, short, now) if idle is None and share == 1.0 else None
        if idle is None and larger is None:
            own = room.spare(short, now) if share == 1.0 else None
            if own is None:
                raise Full("this relay holds as much as it may", limits.full_retry_ms)
            count = max(count, own)
        self._tell_posters(room, room.forget(count), now)
        if larger:
            self._tell_posters(larger[0], larger[0].forget(larger[1]), now)
        for each in idle or ():
            self._forget_room(each)

    def _in_use(self) -> int:
        """Bytes of rooms and connections, and those that are kept for connections yet to come: a relay full of what
        one of its guests wrote still opens its door to all others."""
        return self._purse.used + max(self._for_connections - self._linked, 0)

    def _largest_log(self, room: Room, short: int, now: float) -> tuple[Room, int] | None:
        """The largest room, above this one, whose earliest entries may go for `short` bytes, and how many of them: or
        whoever fills a room or two would silence all the rest. None where there is none. It frees a little more, so
        that a full relay does not look through all rooms for each message."""
        larger = [each for each in self._rooms.values() if each.used > room.used]
        for each in sorted(larger, key=lambda each: each.used, reverse=True):
            count = each.spare(short + self._for_rooms // 1024, now) or each.spare(short, now)
            if count:
                return each, count
        return None

    def _largest_idle(self, short: int) -> list[Room] | None:
        """Rooms that nobody is in, the largest first, which free `short` bytes; None where they do not suffice. They
        free a little more, so that a full relay does not look through all of them for each message."""
        if short <= 0:
            return []
        going: list[Room] = []
        for room in sorted(self._idle.values(), key=lambda each: each.used, reverse=True):
            if short + self._for_rooms // 64 <= 0:
                break
            going.append(room)
            short -= room.used
        return None if short > 0 else going

    def _tell_posters(self, room: Room, gone: list[Entry], now: float) -> None:
        """Whoever posted what the absent can no longer get here, and is present, learns it: now and again is enough.
        Others see it in the range of the log that a hello is answered with."""
        if not gone or now - room.told < self._limits.full_retry_ms / 1000:
            return
        events = [decode_frame(entry.frame) for entry in gone]
        seats = [room.seats.get(dev) for dev in {each.poster for each in events if isinstance(each, DownEvent)}]
        for peer in [seat.peer for seat in seats if seat and seat.peer]:
            room.told = now
            self._tell_fault(peer, Full(NOT_KEPT, self._limits.full_retry_ms))

    def _shelve(self, room: Room, shelf: Shelf[K, T], key: K, value: T, size: int, now: float) -> None:
        self._afford(room, size + self._limits.overhead, now)
        shelf.put(key, value, size)

    def _sweep(self, room: Room, now: float) -> None:
        ttl = self._limits.demo_ttl if room.demo else self._limits.ttl
        old, wall = now - ttl, self._wall()
        room.forget(sum(1 for _ in itertools.takewhile(lambda entry: entry.at <= old, room.log)))
        for seat in room.seats.values():
            for tid in [tid for tid, (_, at, _) in (seat.directs or {}).items() if at <= old]:
                room.drop_direct(seat, tid)
        for key in [key for key, file in room.files.items() if file.at <= old]:
            self._end_file(room, key)
        room.joins.keep(lambda _, join: join.at > old)
        room.requests.keep(lambda _, asked: asked.request.expiry > wall)
        room.invites.keep(lambda _, invite: invite[0].expiry > wall)
        if not room.conns and (room.attended <= old or not (room.head or room.log or room.files)):
            self._forget_room(room)

    # ── arriving ─────────────────────────────────────────────────────────────────────────────────────────────────
    def _nonce(self, peer: Peer, frame: UpNonce, now: float) -> None:
        room = peer.room
        mine = self._random(32)
        m = encode(Relay(self._identity.public, room.id, frame.nonce, mine))
        head = room.head.ch if room.head else ZERO32
        self._tell(peer, DownRelay(m, self._identity.sign("relay", m), self._run, head))
        peer.nonces, peer.state = frame.nonce + mine, GREETED

    def _login(self, peer: Peer, frame: UpLogin, now: float) -> None:
        room, login = peer.room, decode(Login, frame.m)
        if login.relay != self._identity.public:
            raise PeerFault("login", "login is for another relay")
        if self.names and login.host.lower() not in self.names:
            raise PeerFault("host", "login is for a name this relay does not go by")
        if login.room != room.id or login.client_nonce + login.relay_nonce != peer.nonces:
            raise PeerFault("login", "login is for another socket")
        if login.dev != device_id(room.id, frame.sigpub) or not verify_signature(
            frame.sigpub, "login", frame.m, frame.sig
        ):
            raise PeerFault("login", "login is not signed by its device")
        before = room.newcomers.get(login.dev)
        if before is None and login.dev not in room.seats:
            self._make_way(room, peer.origin, now)
        if before:
            self._end(before, CLOSE_REPLACED, "replaced", now)
        peer.dev, peer.sigpub, peer.nonces, peer.state = login.dev, frame.sigpub, b"", KNOWN
        room.newcomers[peer.dev] = peer
        self._arriving.pop(peer.conn, None)  # to the end of those in order
        self._arriving[peer.conn] = now + self._limits.login_timeout

    def _make_way(self, room: Room, origin: str, now: float) -> None:
        """A place at the room's door for one more: whoever stood there longest without a join that waits for an answer
        goes, or strangers who want nothing would keep out everybody else, members after a restart too. Raises busy
        where there is nobody of that kind."""
        limits, there = self._limits, [peer for dev, peer in room.newcomers.items() if dev not in room.seats]
        near = [peer for peer in there if origin and peer.origin == origin]
        crowd = near if len(near) >= limits.newcomers_an_address else there
        if crowd is there and len(there) < limits.newcomers:
            return
        busy = PeerFault("busy", "too many wait at this room's door", limits.full_retry_ms)
        longest = next((peer for peer in crowd if peer.dev not in room.joins), None)
        if longest is None:
            raise busy
        self._tell_fault(longest, busy)
        self._end(longest, CLOSE_BUSY, "busy", now)

    def _ping(self, peer: Peer, frame: UpPing, now: float) -> None:
        self._tell(peer, DownPong(frame.token))

    def _give_head(self, peer: Peer, frame: UpHead, now: float) -> None:
        if peer.room.head is None:
            raise PeerFault("unknown", "room has no head")
        self._tell_head(peer, peer.room.head)

    def _hello(self, peer: Peer, hello: UpHello, now: float) -> None:
        room, limits = peer.room, self._limits
        self._arriving.pop(peer.conn, None)
        if room.demo:
            self._admit(peer, hello, now)
            return
        brought: list[tuple[Sequence[Any], int]] = [
            (hello.evidence, limits.evidence),
            (hello.leaves, limits.devices),
            (hello.requests, limits.requests),
            (hello.invites, limits.invites),
            (hello.revokes, limits.invites),
        ]
        if any(len(objects) > most for objects, most in brought):
            raise PeerFault("too-big", "hello brings more than this relay keeps")
        known = room.head is not None and room.head.data == hello.unit  # as after a restart for all but the first
        new = self._verifier.unit(room.id, hello.unit, room.head) if hello.unit and not known else None
        if new and peer.dev in new.listing.devices and (room.head is None or preferred(new, room.head)):
            if room.head and new.commit.parent == room.head.ch:
                if self._is_rotation(room.head, new) and (wait := self._until_rotation(room, now)) > 0:
                    self._tell_fault(peer, PeerFault("busy", "rotations come too fast", int(wait * 1000) + 1))
                    self._end(peer, CLOSE_BUSY, "busy", now)
                    return
                wished = room.asked_out(UNLINK, LEAVE) | self._wished(room, hello)
                self._verifier.follows(new, room.head, self._wall(), wished)
            elif room.head:
                self._verifier.leaps(new, room.head)
            self._advance(peer, new, hello.unit, now, hello.requests)
        if room.head is None:
            self._tell_fault(peer, PeerFault("unknown", "room is not known here: a member brings it back"))
            return
        self._hear(peer, hello, now)
        if peer.conn not in self._peers:  # turned away by a request that it brought itself
            return
        if peer.dev not in room.seats or peer.dev in room.asked_out(UNLINK):
            self._show_cut(peer)
            self._turn_away(peer, "this device is not listed", now)
            return
        self._admit(peer, hello, now)

    def _wished(self, room: Room, hello: UpHello) -> frozenset[bytes]:
        """Devices that their own member asked to have out, as a hello shows: after a restart this relay knows of no
        wish, and the commit that answers one comes with it."""
        wished = set[bytes]()
        for signed in hello.requests:
            with suppress(PeerFault):
                asked = self._read_request(room, signed)
                wished |= asked.devs if asked.request.kind in (UNLINK, LEAVE) else set()
        return frozenset(wished)

    def _hear(self, peer: Peer, hello: UpHello, now: float) -> None:
        """Second-hand objects of a hello: each counts by its own signature, one that no longer fits is passed over."""
        takers: list[tuple[Callable[[Peer, Any, float], None], tuple[Any, ...]]] = [
            (self._take_leaf, hello.leaves),
            (self._take_evidence, hello.evidence),
            (self._take_request, hello.requests),
            (self._take_revoke, hello.revokes),
            (self._take_invite, hello.invites),
        ]
        before, listed = self._verifier.checked, peer.dev in peer.room.seats
        most = self._checks_unlisted(now) if not listed else sys.maxsize
        for take, objects in takers:
            for each in objects:
                if self._verifier.checked - before >= most or peer.conn not in self._peers:
                    break  # who unlinks itself is gone by that, and perhaps the room with it
                with suppress(PeerFault):
                    take(peer, each, now)
        if not listed:
            self._unlisted.spend(0, 0, self._verifier.checked - before, self._limits, now)
        self._answer_newcomers(peer.room)

    def _checks_unlisted(self, now: float) -> float:
        """Signatures that a hello of a device not listed may have checked. Rosters of its own making would keep
        everybody waiting, and the wait for its next message would be none: it is turned away and comes as another."""
        self._unlisted.spend(0, 0, 0, self._limits, now)
        return min(self._unlisted.checks, self._limits.checks_unlisted)

    def _admit(self, peer: Peer, hello: UpHello, now: float) -> None:
        room, limits = peer.room, self._limits
        last = room.next - 1
        seat = room.seats.get(peer.dev)
        if seat is None:  # only the demo room seats whoever comes
            self._afford(room, limits.seat_bytes, now)
            seat = room.seats[peer.dev] = Seat(0)
            room.charge(limits.seat_bytes)
        before, seat.peer = seat.peer, peer
        if before is None:
            self._send(room.others(peer), DownPeer(peer.dev, 1))
        elif before is not peer:
            self._end(before, CLOSE_REPLACED, "replaced", now)
        room.newcomers.pop(peer.dev, None)
        peer.state, peer.inv_id, room.live = MEMBER, None, None
        seat.pace = peer.pace = seat.pace or peer.pace
        cursor = min(hello.cursor, last) if hello.run == self._run else 0
        seat.cursor = max(seat.cursor, cursor)
        self._acked.add(room)
        self._brief(peer, hello)
        skipped = max(cursor, seat.first)
        missed = [Send((peer.conn,), entry.frame) for entry in room.log if entry.no > skipped]
        self._out.extend(missed)
        if before is peer:  # it was told already, and no page asks again on one socket: each counts like one it sends
            peer.pace.spend(len(missed), 0, 0, limits, now)
        for _, _, frame in (seat.directs or {}).values():
            self._out.append(Send((peer.conn,), frame))
        self._tell(peer, DownReady(room.head.ch if room.head else ZERO32, room.online()))

    def _brief(self, peer: Peer, hello: UpHello) -> None:
        """What a member must know before the log; lists that are empty are left out."""
        room, dev = peer.room, peer.dev
        self._tell(peer, DownHi(self._run, room.log[0].no if room.log else room.next, room.next))
        asked = tuple(asked.signed for asked in room.requests.values())
        if asked:  # before the head: a removal is judged by the wish it answers
            self._tell(peer, DownRequests(asked))
        if room.head and hello.unit != room.head.data and (hello.unit or hello.run != self._run):
            self._tell_head(peer, room.head)
        joins = tuple(
            PendingJoin(by, join.sigpub, join.inv_id, join.sealed[dev])
            for by, (join, _) in room.joins.items.items()
            if dev in join.sealed
        )
        told: list[tuple[type[Any], tuple[Any, ...]]] = [
            (DownLeaves, tuple(signed for _, signed in room.leaves.values())),
            (DownJoins, joins),
            (DownResyncs, tuple(room.resyncs.values())),
            (DownEvidence, tuple(listing.proof for listing in room.evidence.values())),
        ]
        for shape, items in told:
            if items:
                self._tell(peer, shape(items))

    # ── the head ─────────────────────────────────────────────────────────────────────────────────────────────────
    def _commit(self, peer: Peer, frame: UpCommit, now: float) -> None:
        room = peer.room
        head = self._charted(room)
        before = room.taken.get(Hl("commit", decode(Unit, frame.unit).body))
        if before is not None:  # the same again, after a socket that broke before the answer
            self._answer(peer, DownSent(frame.ref, before))
            return
        new = self._verifier.unit(room.id, frame.unit, head)
        if new.commit.parent == head.ch:
            self._verifier.follows(new, head, self._wall(), room.asked_out(UNLINK, LEAVE))
        elif new.listing.charter.no <= head.listing.charter.no:
            raise PeerFault("lost", "another commit came first")
        else:
            self._verifier.leaps(new, head)
        if self._is_rotation(head, new):
            self._may_rotate(room, new, now)
        no = self._advance(peer, new, frame.unit, now)
        if peer.conn in self._peers:
            self._answer(peer, DownSent(frame.ref, no))

    def _is_rotation(self, head: Head, new: Head) -> bool:
        return new.listing.roster_hash == head.listing.roster_hash

    def _until_rotation(self, room: Room, now: float) -> float:
        """Seconds until keys may change again where nothing else does: each costs all members their work."""
        return room.rotated + self._limits.rotation_seconds - now

    def _may_rotate(self, room: Room, new: Head, now: float) -> None:
        listing, wait = new.listing, self._until_rotation(room, now)
        if wait > 0:
            raise PeerFault("slow", "rotations come too fast", int(wait * 1000) + 1)
        if listing.charter.who == 1 and new.commit.committer not in listing.admins:
            answered = [dev for dev, slot in new.slots.items() if slot.type == 1 and dev in room.resyncs]
            must(bool(answered), "rotation is for admins here, and answers no resync")

    def _advance(self, by: Peer, new: Head, uploaded: bytes, now: float, wishes: Sequence[Signed] = ()) -> int:
        """Takes a new head: all present see its commit, then those it leaves out are turned away, those it brings in
        are shown it, and what it settles is dropped. `wishes` are heard while those who made them are listed yet:
        members judge a removal by the wish that it answers."""
        room = by.room
        no = room.next
        frame = encode_frame(DownCommit(no, 2, uploaded))
        before = room.cost_of_head(room.head, len(room.seats))
        growth = room.cost_of_head(new, len(new.listing.devices)) - before
        cost = room.cost(frame)
        self._afford(room, cost + growth, now, entry=cost)
        for wish in wishes:
            if by.conn not in self._peers:  # it was turned away by its own wish, and the room may have gone with it
                return no
            with suppress(PeerFault):
                self._take_request(by, wish, now)
        self._out.extend([Send(room.members(), frame)] if room.members() else [])
        room.append(frame, now)
        room.charge(growth)
        if room.head and self._is_rotation(room.head, new):
            room.rotated = now
        room.head = new
        room.taken[new.ch] = no
        if len(room.taken) > MAX_CHAIN:
            del room.taken[next(iter(room.taken))]
        self._reseat(room, new, no - 1, now)
        self._settle(room, new)
        for peer in [peer for dev, peer in room.newcomers.items() if dev in room.seats and peer is not by]:
            peer.inv_id = None
            self._tell(peer, DownUnit(new.data))
        self._answer_newcomers(room)
        return no

    def _reseat(self, room: Room, new: Head, before: int, now: float) -> None:
        seats, left = {}, []
        for dev in new.listing.devices:
            seats[dev] = room.seats.get(dev) or Seat(before)
        for dev, seat in room.seats.items():
            if dev not in seats:
                room.empty_seat(seat)
                left.append(seat.peer)
        room.seats, room.live = seats, None
        self._acked.add(room)
        for peer in left:
            if peer:
                self._send(room.members(), DownPeer(peer.dev, 0))
                self._turn_away(peer, "this device is no longer listed", now)

    def _settle(self, room: Room, new: Head) -> None:
        listing = new.listing
        for dev in [dev for dev in room.resyncs.items if dev not in new.slots or new.slots[dev].type == 0]:
            if dev in room.seats:  # it was overtaken, not answered: it may ask again at once
                room.seats[dev].resynced = float("-inf")
        room.resyncs.keep(lambda _, __: False)
        room.leaves.keep(lambda dev, _: dev in listing.devices)
        room.requests.keep(lambda _, asked: asked.request.kind != SPLIT and not self._settled(listing, asked))
        room.evidence.keep(
            lambda _, proof: not (proof.gone.keys() <= listing.gone.keys() and proof.weight <= listing.weight)
        )
        room.invites.keep(lambda _, invite: not self._ended(room, invite[0]))
        for dev, join in [(dev, join) for dev, (join, _) in room.joins.items.items()]:
            used = listing.consumed.get(join.inv_id)
            if dev in listing.devices:
                room.joins.drop(dev)
            elif used or dev in listing.gone or join.inv_id not in room.invites:
                self._settle_join(room, dev, LINK_USED if used else BY_DECISION if dev in listing.gone else LINK_OVER)
        for key in [key for key, file in room.files.items() if not room.wanted_by(key, file)]:
            self._end_file(room, key)

    def _settled(self, listing: Listing, asked: Asked) -> bool:
        """A device's wish to go is kept while the charter names it: a member that was away must learn why a junior
        admin could remove it."""
        by, devs = asked.request.dev, asked.devs
        if asked.request.kind in (UNLINK, LEAVE):
            carried_out = devs <= listing.gone.keys() and not devs & {*listing.admins}
            return carried_out or (by in listing.gone and by not in devs)
        if asked.request.kind == LINK and by in listing.devices:
            return all(dev in listing.devices or dev in listing.gone for dev in devs)
        return by not in listing.devices

    def _charted(self, room: Room) -> Head:
        if room.head is None:
            raise PeerFault("refused", "demo room has no roster")
        return room.head

    # ── newcomers ────────────────────────────────────────────────────────────────────────────────────────────────
    def _ended(self, room: Room, invite: Invite) -> str:
        """Why an invite is of no more use: `used`, `over`, or nothing."""
        listing = self._charted(room).listing
        used, revoke = listing.consumed.get(invite.inv_id), room.revokes.get(invite.inv_id)
        if used:
            return "used"
        revoked = revoke and (revoke[0].dev == invite.dev or revoke[0].dev in listing.admins)
        by = listing.admins if invite.kind == 0 else listing.devices
        dead = invite.dev not in by or invite.dev not in listing.devices
        return (
            "over"
            if revoked or dead or invite.expiry <= self._wall() or (invite.charter_no < listing.charter.invites_from)
            else ""
        )

    def _open_invite(self, room: Room, inv_id: bytes) -> tuple[Invite, Signed]:
        """The invite, where it can still be used; raises what a newcomer is told."""
        if room.head is None:
            raise PeerFault("unknown", "room is not known here: a member brings it back")
        held = room.invites.get(inv_id)
        if inv_id in room.head.listing.consumed:
            raise PeerFault("used", "invite was used")
        if held is None and inv_id in room.revokes:
            raise PeerFault("over", "invite was revoked")
        if held is None:
            raise PeerFault("no-invite", "invite is not known here: the one who made it brings it back")
        if self._ended(room, held[0]):
            raise PeerFault("over", "invite is over")
        return held

    def _readers(self, room: Room, invite: Invite) -> set[bytes]:
        """Devices that a join on this invite is sealed to: the admins, or the one that links another of its own."""
        if invite.kind == 1:
            return {invite.dev}
        admins = {dev for dev in self._charted(room).listing.admins if dev in room.seats}
        return admins | {invite.dev}

    def _look_up(self, room: Room, inv_id: bytes) -> DownInvite:
        invite, signed = self._open_invite(room, inv_id)
        found = [room.leaves.get(dev) for dev in sorted(self._readers(room, invite))]
        leaves = tuple(leaf[1] for leaf in found if leaf)
        if not leaves:
            raise PeerFault("no-invite", "no admin's leaf is known here: the next admin to come brings it")
        proof = self._charted(room).listing.proof
        return DownInvite(proof.charter, proof.roster, leaves, signed)

    def _fetch(self, peer: Peer, frame: UpFetch, now: float) -> None:
        room = peer.room
        self._arriving.pop(peer.conn, None)
        if peer.dev in room.seats and room.head:
            self._tell_head(peer, room.head)
            return
        try:
            self._tell(peer, self._look_up(room, frame.inv_id))
            peer.inv_id = None
        except PeerFault as fault:
            peer.inv_id = frame.inv_id if fault.code in ("unknown", "no-invite") else None
            raise

    def _answer_newcomers(self, room: Room) -> None:
        for peer, inv_id in [(peer, peer.inv_id) for peer in room.newcomers.values()]:
            if inv_id is None:
                continue
            try:
                self._tell(peer, self._look_up(room, inv_id))
                peer.inv_id = None
            except PeerFault as fault:
                if fault.code not in ("unknown", "no-invite"):
                    peer.inv_id = None
                    self._tell_fault(peer, fault)

    def _join(self, peer: Peer, frame: UpJoin, now: float) -> None:
        room = peer.room
        self._arriving.pop(peer.conn, None)
        if peer.dev in room.seats and room.head:
            self._tell_head(peer, room.head)
            return
        invite, _ = self._open_invite(room, frame.inv_id)
        readers = self._readers(room, invite)
        sealed = {each.dev: each.ct for each in frame.sealed if each.dev in readers}
        if peer.dev in self._charted(room).listing.gone:
            raise PeerFault("refused", "this device was removed; a new one may join")
        if not sealed:
            raise PeerFault("stale", "join is sealed to no admin of today")
        if any(len(ct) > self._limits.max_sealed for ct in sealed.values()):
            raise PeerFault("too-big", "join is larger than this relay takes")
        rivals = sum(join.inv_id == frame.inv_id for dev, (join, _) in room.joins.items.items() if dev != peer.dev)
        if rivals >= self._limits.joins_an_invite:
            raise PeerFault("busy", "too many try this invite", self._limits.full_retry_ms)
        room.joins.check(peer.dev, "joins")
        size = sum(map(len, sealed.values())) + self._limits.sealed_bytes * len(sealed)
        self._shelve(room, room.joins, peer.dev, Join(peer.sigpub, frame.inv_id, sealed, now), size, now)
        for dev, ct in sealed.items():
            seat = room.seats.get(dev)
            if seat and seat.peer:
                self._tell(seat.peer, DownJoins((PendingJoin(peer.dev, peer.sigpub, frame.inv_id, ct),)))

    def _settle_join(self, room: Room, dev: bytes, code: int) -> None:
        room.joins.drop(dev)
        newcomer = room.newcomers.get(dev)
        if newcomer:
            self._tell(newcomer, DownSettled(dev, code))

    def _refuse(self, peer: Peer, frame: UpRefuse, now: float) -> None:
        join = peer.room.joins.get(frame.dev)
        if frame.code not in (BY_DECISION, LINK_USED, LINK_OVER):
            raise Bad("refusal has an unknown code")
        if join and peer.dev not in join.sealed:
            raise PeerFault("refused", "only those a join is sealed to refuse it")
        if join:
            self._settle_join(peer.room, frame.dev, frame.code)

    # ── the log, and what passes by ──────────────────────────────────────────────────────────────────────────────
    def _under_head(self, room: Room, epoch: int | None, ch: bytes) -> None:
        want = (room.head.commit.epoch, room.head.ch) if room.head else (0, ZERO32)
        if ch != want[1] or epoch not in (None, want[0]):
            raise PeerFault("stale", "head has moved on")

    def _fits(self, ct: bytes) -> None:
        if len(ct) > self._limits.max_envelope:
            raise PeerFault("too-big", "envelope is larger than this relay takes")

    def _post(self, peer: Peer, frame: UpPost, now: float) -> None:
        room = peer.room
        self._under_head(room, frame.epoch, frame.ch)
        self._fits(frame.ct)
        no = room.next
        entry = event_frame(no, 1, peer.dev, frame.epoch, frame.ch, frame.ct)
        cost = room.cost(entry)
        self._afford(room, cost, now, entry=cost)
        room.append(entry, now)
        self._out.append(Send(room.members(), entry))
        self._out.append(Answer((peer.conn,), sent_frame(frame.ref, no)))

    def _live(self, peer: Peer, frame: UpLive, now: float) -> None:
        self._under_head(peer.room, frame.epoch, frame.ch)
        self._fits(frame.ct)
        if frame.type not in (SEEN, PRESENCE):
            raise Bad("live envelope is of an unknown type")
        self._send(peer.room.others(peer), DownLive(frame.type, peer.dev, frame.epoch, frame.ch, frame.ct))

    def _ack(self, peer: Peer, frame: UpAck, now: float) -> None:
        room = peer.room
        seat = room.seats[peer.dev]
        if frame.run == self._run and seat.cursor < frame.no < room.next:
            seat.cursor = frame.no
            self._acked.add(room)

    # ── directs ──────────────────────────────────────────────────────────────────────────────────────────────────
    def _direct(self, peer: Peer, frame: UpDirect, now: float) -> None:
        self._charted(peer.room)
        self._under_head(peer.room, None, frame.ch)
        self._hold(peer, frame.to, DIRECT, frame.ch, frame.leaf_no, frame.ct, now)
        self._answer(peer, DownSent(frame.ref, 0))

    def _welcome(self, peer: Peer, frame: UpWelcome, now: float) -> None:
        if peer.dev not in self._charted(peer.room).listing.admins:
            raise PeerFault("refused", "welcomes are for admins to send")
        self._hold(peer, frame.to, WELCOME, ZERO32, 0, frame.ct, now)
        self._answer(peer, DownSent(frame.ref, 0))

    def _share(self, peer: Peer, frame: UpShare, now: float) -> None:
        listing = self._charted(peer.room).listing
        if frame.to not in listing.admins:
            raise PeerFault("stale", "shares go to admins")
        digest = hashlib.sha256(frame.ct).digest()
        m = encode(Share(peer.room.id, peer.dev, frame.to, frame.inv_id, frame.charter_no, digest))
        self._verifier.signature(peer.sigpub, "share", m, frame.sig)
        content = encode(ShareContent(frame.inv_id, frame.charter_no, frame.ct, frame.sig))
        self._hold(peer, frame.to, SHARE, ZERO32, 0, content, now)
        self._answer(peer, DownSent(frame.ref, 0))

    def _hold(self, peer: Peer, to: bytes, kind: int, ch: bytes, leaf_no: int, ct: bytes, now: float) -> None:
        """Keeps a direct until its device says it has it. Of those of kind 1 the earliest go when there are too many:
        vectors ask for their content again."""
        room, limits = peer.room, self._limits
        seat = room.seats.get(to)
        if seat is None:
            raise PeerFault("stale", "recipient is not listed")
        self._fits(ct)
        frame = encode_frame(DownDirect(self._tid + 1, kind, peer.dev, ch, leaf_no, ct))
        cost, waiting = room.cost(frame), seat.directs or {}
        short, many = seat.direct_bytes + cost - limits.direct_bytes, len(waiting) + 1 - limits.directs
        going = []
        for tid, (old, _, held) in waiting.items():
            if old == DIRECT and (short > 0 or many > 0):
                going.append(tid)
                short, many = short - room.cost(held), many - 1
        if short > 0 or many > 0:
            raise Full("too much waits for that device", limits.full_retry_ms)
        self._afford(room, cost, now)
        for tid in going:
            room.drop_direct(seat, tid)
        self._tid += 1
        seat.directs = seat.directs or {}
        seat.directs[self._tid] = kind, now, frame
        seat.direct_bytes += cost
        room.charge(cost)
        if seat.peer:
            self._out.append(Send((seat.peer.conn,), frame))

    def _dack(self, peer: Peer, frame: UpDack, now: float) -> None:
        seat = peer.room.seats[peer.dev]
        for tid in frame.tids:
            peer.room.drop_direct(seat, tid)

    # ── signed objects that members show ─────────────────────────────────────────────────────────────────────────
    def _listed(self, room: Room, of: bytes, dev: bytes, what: str) -> Listed:
        must(of == room.id, f"{what} is of another room")
        found = self._charted(room).listing.devices.get(dev)
        if found is None:
            raise Forged(f"{what} is of an unlisted device")
        return found

    def _leaf(self, peer: Peer, frame: UpLeaf, now: float) -> None:
        leaf = decode(Leaf, frame.leaf.m)
        must(leaf.sigpub == peer.sigpub, "leaf is of another device")
        self._take_leaf(peer, frame.leaf, now)

    def _take_leaf(self, peer: Peer, signed: Signed, now: float) -> None:
        room, leaf = peer.room, decode(Leaf, signed.m)
        dev = device_id(room.id, leaf.sigpub)
        self._listed(room, leaf.room, dev, "leaf")
        held = room.leaves.get(dev)
        if held and held[0].leaf_no >= leaf.leaf_no:
            return
        must(on_curve(leaf.kempub), "leaf key is not on the curve")
        self._verifier.signature(leaf.sigpub, "leaf", signed.m, signed.sig)
        self._shelve(room, room.leaves, dev, (leaf, signed), len(signed.m), now)
        self._send(room.others(peer), DownLeaves((signed,)))

    def _resync(self, peer: Peer, frame: UpResync, now: float) -> None:
        room, signed = peer.room, frame.resync
        head, seat = self._charted(room), room.seats[peer.dev]
        resync = decode(Resync, signed.m)
        leaf = decode(Leaf, resync.leaf)
        must(resync.room == leaf.room == room.id and leaf.sigpub == peer.sigpub, "resync is of another device")
        must(on_curve(leaf.kempub), "leaf key is not on the curve")
        slot = head.slots.get(peer.dev)
        must(slot is None or leaf.leaf_no > slot.leaf_no, "resync shows a leaf that was used")
        self._verifier.signature(peer.sigpub, "resync", signed.m, signed.sig)
        self._under_head(room, None, resync.head)
        wait = seat.resynced + self._limits.resync_seconds - now
        if wait > 0:
            raise PeerFault("slow", "resyncs come too fast", int(wait * 1000) + 1)
        self._shelve(room, room.resyncs, peer.dev, signed, len(signed.m), now)
        seat.resynced = now
        self._send(room.others(peer), DownResyncs((signed,)))

    def _request(self, peer: Peer, frame: UpRequest, now: float) -> None:
        self._take_request(peer, frame.request, now)

    def _read_request(self, room: Room, signed: Signed) -> Asked:
        request = decode(Request, signed.m)
        listed = self._listed(room, request.room, request.dev, "request")
        self._verifier.signature(listed.sigpub, "request", signed.m, signed.sig)
        return Asked(request, signed, self._about(room, request, listed))

    def _take_request(self, peer: Peer, signed: Signed, now: float) -> None:
        room, limits = peer.room, self._limits
        if len(signed.m) > limits.max_request:
            raise PeerFault("too-big", "request is larger than this relay keeps")
        asked = self._read_request(room, signed)
        request, name = asked.request, Hl("request", signed.m)
        if name in room.requests:
            return
        if request.expiry <= self._wall():
            raise PeerFault("over", "request has expired")
        if request.kind != SPLIT and self._settled(self._charted(room).listing, asked):
            raise PeerFault("refused", "request was settled")
        same = self._same(room, asked)
        mine = sum(each.request.dev == request.dev for each in room.requests.values())
        if mine - len(same) >= limits.requests_a_device:
            raise Full("too many requests of this device", limits.full_retry_ms)
        if not same:
            room.requests.check(name, "requests")
        self._shelve(room, room.requests, name, asked, limits.parsed * len(signed.m), now)
        for old in same:
            room.requests.drop(old)
        self._send(room.others(peer), DownRequests((signed,)))
        if request.kind == UNLINK:  # it may be stolen; who leaves is in until a commit says so
            for dev in asked.devs:
                seat = room.seats.get(dev)
                if seat and seat.peer:
                    self._turn_away(seat.peer, "this device was unlinked", now)

    def _same(self, room: Room, asked: Asked) -> list[bytes]:
        """Names of what a request takes the place of: a device asks once for each that it links."""
        if asked.request.kind != LINK:
            return []
        of = asked.request.dev, LINK, asked.devs
        same = {
            name: each.request
            for name, (each, _) in room.requests.items.items()
            if (each.request.dev, each.request.kind, each.devs) == of
        }
        if any(asked.request.no < each.no for each in same.values()):
            raise PeerFault("stale", "a later request came first")
        return list(same)

    def _about(self, room: Room, request: Request, by: Listed) -> frozenset[bytes]:
        """The devices a request is about: a new one, or some of its own member's."""
        listing = self._charted(room).listing
        if request.kind == LINK:
            leaf = decode(Leaf, decode(LinkBody, request.body).leaf)
            must(leaf.room == room.id, "request links a device of another room")
            return frozenset({device_id(room.id, leaf.sigpub)})
        if request.kind in (UNLINK, LEAVE):
            devs = frozenset(last.dev for last in decode(LastBody, request.body).lasts)
            homes = [listing.devices.get(dev) or listing.gone.get(dev) for dev in devs]
            must(
                bool(devs) and all(home and home.member == by.member for home in homes),
                "request removes another's device",
            )
            return devs
        if request.kind == SPLIT and len(request.body) == 32:
            return frozenset()
        raise Bad("request is of an unknown kind")

    def _invite(self, peer: Peer, frame: UpInvite, now: float) -> None:
        self._take_invite(peer, frame.invite, now)
        self._answer(peer, DownSent(frame.ref, 0))
        self._answer_newcomers(peer.room)

    def _take_invite(self, peer: Peer, signed: Signed, now: float) -> None:
        room, invite = peer.room, decode(Invite, signed.m)
        listed = self._listed(room, invite.room, invite.dev, "invite")
        self._verifier.signature(listed.sigpub, "invite", signed.m, signed.sig)
        if invite.kind > 1 or invite.uses != 1 or invite.inv_id == ZERO16:
            raise Bad("invite is of an unknown kind or has more than one use")
        must(invite.charter_no <= self._charted(room).listing.charter.no, "invite is of a charter to come")
        ended = self._ended(room, invite)
        if ended:
            raise PeerFault(ended, "invite was used" if ended == "used" else "invite is over")
        held = room.invites.get(invite.inv_id)
        if held and held[1].m != signed.m:
            raise PeerFault("refused", "another invite has this id")
        if held is None:
            going = None
            if len(room.invites) >= self._limits.invites:
                going = self._crowding({key: of.dev for key, ((of, _), _) in room.invites.items.items()}, invite.dev)
            if going is None:
                room.invites.check(invite.inv_id, "invites")
            self._shelve(room, room.invites, invite.inv_id, (invite, signed), len(signed.m), now)
            if going:
                room.invites.drop(going)

    def _revoke(self, peer: Peer, frame: UpRevoke, now: float) -> None:
        self._take_revoke(peer, frame.revoke, now)
        self._answer(peer, DownSent(frame.ref, 0))
        self._answer_newcomers(peer.room)

    def _take_revoke(self, peer: Peer, signed: Signed, now: float) -> None:
        room, revoke = peer.room, decode(Revoke, signed.m)
        listed = self._listed(room, revoke.room, revoke.dev, "revoke")
        self._verifier.signature(listed.sigpub, "revoke", signed.m, signed.sig)
        held, admin = room.invites.get(revoke.inv_id), revoke.dev in self._charted(room).listing.admins
        before = room.revokes.get(revoke.inv_id)
        if held and not admin and held[0].dev != revoke.dev:
            raise PeerFault("refused", "invite is another's")
        if before and (before[0].dev == revoke.dev or not admin):
            return
        self._shelve(room, room.revokes, revoke.inv_id, (revoke, signed), len(signed.m), now)
        if len(room.revokes) > self._limits.invites:
            of = {key: held.dev for key, ((held, _), _) in room.revokes.items.items()}
            own = next(key for key, dev in of.items() if dev == revoke.dev)
            room.revokes.drop(self._crowding(of, revoke.dev) or own)
        room.invites.drop(revoke.inv_id)
        for dev in [dev for dev, (join, _) in room.joins.items.items() if join.inv_id == revoke.inv_id]:
            self._settle_join(room, dev, LINK_OVER)

    def _evidence(self, peer: Peer, frame: UpEvidence, now: float) -> None:
        self._take_evidence(peer, Proof(frame.charter, frame.roster), now)

    def _take_evidence(self, peer: Peer, proof: Proof, now: float) -> None:
        """Keeps a roster that removed devices the head still lacks in `gone`, or that outweighs it. Beyond the places
        there are, the lightest goes."""
        room = peer.room
        listing, head = self._verifier.listing(room.id, proof), self._charted(room).listing
        if listing.roster_hash in room.evidence:
            return
        must(head.heeds(listing), "its signer is no admin any more")
        if listing.gone.keys() <= head.gone.keys() and listing.weight <= head.weight:
            return
        lightest = min(room.evidence.values(), key=lambda each: each.weight, default=None)
        crowded = len(room.evidence) >= self._limits.evidence
        if crowded and lightest and lightest.weight > listing.weight:
            raise Full("too much evidence in this room", self._limits.full_retry_ms)
        size = self._limits.parsed * (len(proof.charter.m) + len(proof.roster.m))
        self._shelve(room, room.evidence, listing.roster_hash, listing, size, now)
        if crowded and lightest:
            room.evidence.drop(lightest.roster_hash)
        self._send(room.others(peer), DownEvidence((proof,)))

    # ── files ────────────────────────────────────────────────────────────────────────────────────────────────────
    def _put(self, peer: Peer, frame: UpPut, now: float) -> None:
        room, key, limits = peer.room, (peer.dev, frame.file_id), self._limits
        file, cost = room.files.get(key), len(frame.ct) + limits.overhead
        if frame.index >= frame.count or (file and file.count != frame.count):
            raise Bad("chunk is beyond its file")
        if file and self._known(peer, file, frame):
            return
        streamed = self._streams(room, file, frame)
        self._fits(frame.ct)
        going = self._least_missed(room, peer.dev) if file is None and len(room.files) >= limits.files else None
        if file and streamed and file.floor <= frame.index and file.passing() >= limits.file_window:
            raise Full("nobody takes this file as fast as it comes", limits.full_retry_ms)
        self._afford(room, cost + (0 if file else limits.overhead), now, limits.file_share)
        if going:
            self._end_file(room, going)
        if file is None:
            file = room.files[key] = File(frame.count, now, streamed, frame.index)
            room.charge(limits.overhead)
        elif frame.index < file.floor:  # of a streamed one nobody takes it any more: it begins again, for somebody else
            if streamed:
                room.drop_chunks(file, file.count)
            file.floor = frame.index
        file.chunks[frame.index] = encode_frame(DownChunk(peer.dev, frame.file_id, frame.index, frame.count, frame.ct))
        file.size += len(frame.ct)
        room.charge(cost)
        if streamed:
            file.puts[frame.index] = peer, frame.ref, len(frame.ct)
        else:
            self._answer(peer, DownSent(frame.ref, file.next(frame.index)))
        self._feed(room, file, frame.index)

    def _least_missed(self, room: Room, dev: bytes) -> tuple[bytes, bytes]:
        """The file whose place another of `dev` may have, or one member could hold all of them, and its removal would
        not give them back: the oldest of somebody no longer listed, or else of whoever has most. Raises Full where that
        one would have fewer than `dev` then."""
        orphan = next((key for key in room.files if key[0] not in room.seats), None)
        if orphan:
            return orphan
        going = self._crowding({key: key[0] for key in room.files}, dev)
        if going is None:
            raise Full("too many files in this room", self._limits.full_retry_ms)
        return going

    def _crowding(self, of: Mapping[K, bytes], dev: bytes) -> K | None:
        """The oldest thing of whichever device has most, whose place one of `dev` may have; None where that one would
        have fewer than `dev` then."""
        held = Counter(of.values())
        most, count = held.most_common(1)[0]
        return next(key for key, maker in of.items() if maker == most) if count > held[dev] + 1 else None

    def _known(self, peer: Peer, file: File, frame: UpPut) -> bool:
        """Whether this chunk is here or has passed already; then its sender hears where to go on."""
        here, passed = frame.index in file.chunks, frame.index < file.floor
        if not file.streamed and here:
            self._answer(peer, DownSent(frame.ref, file.next(frame.index)))
        elif passed and ((here and file.gives(frame.index)) or file.waits):
            self._answer(peer, DownSent(frame.ref, file.floor))
        elif here and not passed:
            file.puts[frame.index] = peer, frame.ref, file.puts[frame.index][2]
        else:
            return False
        return True

    def _streams(self, room: Room, file: File | None, frame: UpPut) -> bool:
        """Whether this file is one that the relay does not keep; raises where it does not pass it on either."""
        largest = self._limits.demo_file if room.demo else self._limits.max_file
        # tags take 1/16,384 and the header 40 bytes
        most = -(-(largest + (largest >> 12) + 64) // self._limits.chunk)
        streamed = frame.count > most
        size = (file.size if file else 0) + len(frame.ct)
        if (room.demo and streamed) or (not streamed and size > most * self._limits.chunk):
            raise PeerFault("too-big", "file is larger than this relay keeps")
        return streamed

    def _feed(self, room: Room, file: File, index: int) -> None:
        """The chunk that came goes to all that wait for it in one effect; then each gets what it may have beyond."""
        ready = [peer for peer, (at, until) in file.waits.items() if at == index < until]
        if ready:
            self._out.append(Bulk(tuple(peer.conn for peer in ready), file.chunks[index]))
        reached = file.floor
        for peer in ready:
            _, until = file.waits.pop(peer)
            reached = self._stream(peer, file, index + 1, until)
        room.count_marks(file)
        self._pass(room, file, reached)

    def _stream(self, peer: Peer, file: File, at: int, until: int) -> int:
        while at < until and at in file.chunks:
            self._out.append(Bulk((peer.conn,), file.chunks[at]))
            at += 1
        if at < (file.count if file.streamed else until):
            file.waits[peer] = at, until
        return at

    def _pass(self, room: Room, file: File, reached: int) -> None:
        """What all who take a streamed file have passed is let go of. Who put it gets as much new credit, and hears
        what is wanted next; `reached` counts where nobody takes it any more."""
        low = min((at for at, _ in file.waits.values()), default=reached)
        if file.streamed and low > file.floor:
            for peer, ref in room.pass_chunks(file, low):
                if peer.conn in self._peers:
                    self._answer(peer, DownSent(ref, low))

    def _get(self, peer: Peer, frame: UpGet, now: float) -> None:
        file = peer.room.files.get((frame.dev, frame.file_id))
        at, until = file.waits.pop(peer, (frame.from_, frame.from_)) if file else (0, 0)
        window = min(frame.window, self._limits.file_window)
        if until != frame.from_ or until - at > window:  # asked anew, not on from where the last answer will end
            at = frame.from_
        reached = file.floor if file else 0
        if file is None or not file.gives(at):
            self._tell(peer, DownNoFile(frame.dev, frame.file_id))
        elif window:
            reached = self._stream(peer, file, at, min(frame.from_ + window, file.count))
        if file:  # without a window it is no longer wanted
            peer.room.count_marks(file)
            self._pass(peer.room, file, reached)

    def _got(self, peer: Peer, frame: UpGot, now: float) -> None:
        room, key = peer.room, (frame.dev, frame.file_id)
        file = room.files.get(key)
        if file and not room.demo:
            file.got.add(peer.dev)
            file.waits.pop(peer, None)
            room.count_marks(file)
            self._pass(room, file, file.count)  # where nobody else takes it, all of it has passed
            if file.streamed and not file.waits:
                room.drop_chunks(file, file.floor)
            if not room.wanted_by(key, file):
                self._end_file(room, key)

    def _drop(self, peer: Peer, frame: UpDrop, now: float) -> None:
        self._let_go(peer.room, (peer.dev, frame.file_id))

    def _let_go(self, room: Room, key: tuple[bytes, bytes]) -> File | None:
        file = room.drop_file(key)
        self._send(tuple(peer.conn for peer in file.waits) if file else (), DownNoFile(*key))
        return file

    def _end_file(self, room: Room, key: tuple[bytes, bytes]) -> None:
        """Lets go of a file that nobody needs just now. Whose chunks of it had no answer yet may bring them again."""
        file = self._let_go(room, key)
        for peer, ref in file.unanswered(file.count) if file else ():
            if peer.conn in self._peers:
                self._tell_fault(peer, Full("this file was not kept", self._limits.full_retry_ms), ref)


# ════════════════════════════════════════════════════════════════════════════════════════════════════════════════════
# Errors of the operator: what the person who starts the relay can put right. Told in one line on stderr, exit 2.
# ════════════════════════════════════════════════════════════════════════════════════════════════════════════════════
class OperatorFault(Exception):
    """The relay cannot start, or goes on with what it had. The message says what is wrong and what to do."""


# ════════════════════════════════════════════════════════════════════════════════════════════════════════════════════
# Page: index.html as it is served, the page /trust, and the answer to every request that is not a socket. Reads one
# file, once; bytes in, bytes out. Nothing is filled into index.html, so that the SHA-256 printed at start is that of
# what browsers get; /trust has no script and is filled anew with each certificate.
# ════════════════════════════════════════════════════════════════════════════════════════════════════════════════════
HOST = re.compile(r"[A-Za-z0-9._\-\[\]:]{1,255}")
REQUEST_LINE = re.compile(r"([A-Z]{1,16}) (/[!-~]*) HTTP/(1\.[01])")
SOCKET_KEY = re.compile(r"[A-Za-z0-9+/]{22}==")  # 16 bytes
SOCKET_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
SWITCHING = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: "
FIELD_LINE = re.compile(r"([!#$%&'*+\-.^_`|~0-9A-Za-z]+):([^\r\n\0]*)")
INLINE_BLOCK = re.compile(rb"<(script|style)\b[^>]*>(.*?)</\1\s*>", re.DOTALL | re.IGNORECASE)
SAFETY = {
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(self), microphone=(self), geolocation=()",
    "Cache-Control": "no-cache",
}
BARE_POLICY = "default-src 'none'; frame-ancestors 'none'"


@dataclass(frozen=True, slots=True)
class HttpRequest:
    """The head of a request; `fields` by lower-case name, a repeated one joined by commas."""

    method: str
    target: str
    version: str
    fields: Mapping[str, str]

    @property
    def path(self) -> str:
        return self.target.partition("?")[0]

    @property
    def host(self) -> str:
        """The Host field, or nothing where it could not be put into a header or an address."""
        host = self.fields.get("host", "")
        return host if HOST.fullmatch(host) else ""

    @property
    def head_only(self) -> bool:
        return self.method == "HEAD"

    @property
    def upgrades(self) -> bool:
        return "upgrade" in {option.strip().lower() for option in self.fields.get("connection", "").split(",")}

    @property
    def wants_socket(self) -> bool:
        upgrade = self.fields.get("upgrade", "").lower()
        return self.method == "GET" and upgrade == "websocket" and self.path.startswith("/ws/")


def parse_request(head: bytes) -> HttpRequest | None:
    """A request head up to and with its empty line; None where it is not one."""
    line, *rest = head.decode("latin-1").removesuffix("\r\n\r\n").split("\r\n")
    asked = REQUEST_LINE.fullmatch(line)
    fields: dict[str, str] = {}
    for each in rest:
        field = FIELD_LINE.fullmatch(each)
        if field is None:
            return None
        # Not by the pattern, which would try each blank in each of three parts.
        name, value = field[1].lower(), field[2].strip(" \t")
        fields[name] = f"{fields[name]}, {value}" if name in fields else value
    return HttpRequest(asked[1], asked[2], asked[3], fields) if asked else None


def open_socket(request: HttpRequest) -> bytes:
    """The answer that opens a WebSocket (RFC 6455, 4.2), without extensions; nothing where the request lacks something
    that every browser sends."""
    fields = request.fields
    key = fields.get("sec-websocket-key", "")
    if not request.upgrades or request.version != "1.1" or not SOCKET_KEY.fullmatch(key):
        return b""
    if fields.get("sec-websocket-version") != "13" or fields.keys() & {"content-length", "transfer-encoding"}:
        return b""
    accept = b64encode(hashlib.sha1(key.encode() + SOCKET_GUID, usedforsecurity=False).digest())
    return SWITCHING + accept + b"\r\n\r\n"


def respond(status: str, fields: Mapping[str, str], body: bytes, head_only: bool = False) -> bytes:
    """A whole response; the connection ends with it."""
    named = {
        "Date": email.utils.formatdate(usegmt=True),
        **SAFETY,
        "Content-Security-Policy": BARE_POLICY,
        "Content-Length": str(len(body)),
        "Connection": "close",
        **fields,
    }
    lines = "".join(f"{name}: {value}\r\n" for name, value in named.items())
    return f"HTTP/1.1 {status}\r\n{lines}\r\n".encode("latin-1") + (b"" if head_only else body)


def respond_text(status: str, text: str, head_only: bool = False, **fields: str) -> bytes:
    return respond(status, {"Content-Type": "text/plain; charset=utf-8", **fields}, f"{text}\n".encode(), head_only)


def accepts_gzip(field: str) -> bool:
    for offer in field.split(","):
        coding, _, weight = offer.partition(";")
        if coding.strip().lower() == "gzip":
            return not re.fullmatch(r"\s*q=0(\.0*)?\s*", weight)
    return False


@dataclass(frozen=True, slots=True)
class Document:
    """What everyone gets alike: its bytes, the same compressed, their SHA-256 in hex, and the fields it goes with."""

    body: bytes
    packed: bytes
    sha256: str
    fields: Mapping[str, str]

    @classmethod
    def of(cls, body: bytes, kind: str, **fields: str) -> Document:
        """Underscores in the names of fields stand for hyphens."""
        named = {"Content-Type": kind, **{name.replace("_", "-"): value for name, value in fields.items()}}
        return cls(body, gzip.compress(body, 9, mtime=0), hashlib.sha256(body).hexdigest(), named)

    def answer(self, request: HttpRequest, fields: Mapping[str, str] | None = None) -> bytes:
        tag = f'W/"{self.sha256[:32]}"'
        named = {**self.fields, **(fields or {}), "ETag": tag, "Vary": "Accept-Encoding"}
        known = [each.strip() for each in request.fields.get("if-none-match", "").split(",")]
        if tag in known or "*" in known:
            return respond("304 Not Modified", named, self.body, head_only=True)
        if len(self.packed) < len(self.body) and accepts_gzip(request.fields.get("accept-encoding", "")):
            return respond("200 OK", {**named, "Content-Encoding": "gzip"}, self.packed, request.head_only)
        return respond("200 OK", named, self.body, request.head_only)


def block_hashes(body: bytes) -> dict[str, str]:
    """The sources that let a page's own inline blocks run: for script and style each."""
    found: dict[str, list[str]] = {"script": [], "style": []}
    for kind, block in INLINE_BLOCK.findall(body):
        digest = base64.b64encode(hashlib.sha256(block).digest()).decode()
        found[kind.decode().lower()].append(f"'sha256-{digest}'")
    return {kind: " ".join(hashes) or "'none'" for kind, hashes in found.items()}


# ── /trust: what the certificate warning means, and what to do about it on each kind of device ───────────────────────
PROFILE, CA_FILE = "/ca.mobileconfig", "/ca.crt"
SELF_SIGNED, LOCAL_CA, BROUGHT, PROXY = "self-signed", "local-ca", "brought", "proxy"
HTML = "text/html; charset=utf-8"


@dataclass(frozen=True, slots=True)
class Trust:
    """What is to be told of the certificate in use: who made it (one of the four words above), its SHA-256 as browsers
    show it, its last day, and the local CA as DER where there is one."""

    kind: str
    fingerprint: str = ""
    ends: str = ""
    authority: bytes = b""


class Platform(NamedTuple):
    """A kind of device, in HTML: what it says of a certificate it does not know, and how it comes to trust the CA."""

    name: str
    warning: str
    steps: tuple[str, ...]


PLATFORMS = (
    Platform(
        "iPhone, iPad",
        "Safari says <b>This Connection Is Not Private</b>. Tap <b>Show Details</b>, then <b>view the certificate</b> "
        "to compare it, then <b>visit this website</b>. Some versions then show the page and still refuse its "
        "connection: only a certificate that the phone trusts helps.",
        (
            f'In Safari open <a href="{PROFILE}">the profile</a> and tap <b>Allow</b>. iOS calls it Not Signed.',
            "Settings, General, <b>VPN &amp; Device Management</b>: open the profile, tap <b>More Details</b> and the "
            "certificate to compare it, then <b>Install</b>.",
            "Settings, General, About, <b>Certificate Trust Settings</b>: switch it on. Nothing changes before that.",
        ),
    ),
    Platform(
        "Android",
        "Chrome says <b>Your connection is not private</b>. Tap the sign before the address and open the certificate’s "
        "details to compare it; then <b>Advanced</b>, <b>Proceed</b>.",
        (
            f'Download <a href="{CA_FILE}">the CA certificate</a>.',
            "In Settings search for <b>CA certificate</b> (under Security, Encryption &amp; credentials, Install a "
            "certificate), tap <b>Install anyway</b> and choose <code>zerosecretroom-ca.crt</code>.",
            "Compare it under Trusted credentials, <b>User</b>, and remove it if it differs. Android says from then on "
            "that the network may be monitored; this CA can vouch for this relay only.",
            "Firefox for Android: Settings, About Firefox, tap the logo five times; then Settings, Secret "
            "Settings, <b>Use third party CA certificates</b>.",
        ),
    ),
    Platform(
        "Windows",
        "Edge and Chrome say <b>Your connection isn’t private</b>. Click <b>Not secure</b> before the address and open "
        "the certificate to compare it; then <b>Advanced</b>, <b>Continue</b>.",
        (
            f'Download <a href="{CA_FILE}">the CA certificate</a>, open it and compare it: <b>Details</b> shows an '
            "SHA-1 thumbprint only, so look at its SHA-256 with <code>certutil -hashfile zerosecretroom-ca.crt "
            "SHA256</code>.",
            "<b>Install Certificate</b>, Current User, Place all certificates in the following store, <b>Trusted Root "
            "Certification Authorities</b>. Start the browser again.",
        ),
    ),
    Platform(
        "macOS",
        "Safari says <b>This Connection Is Not Private</b>. Click <b>Show Details</b>, <b>view the certificate</b> to "
        "compare it, then <b>visit this website</b>.",
        (
            f'Download <a href="{CA_FILE}">the CA certificate</a> and open it: Keychain Access adds it.',
            "Double-click it there and compare it. Under <b>Trust</b> choose Always Trust for <b>SSL</b>.",
        ),
    ),
    Platform(
        "Linux, and Firefox on any computer",
        "Firefox says <b>Warning: Potential Security Risk Ahead</b>. Click <b>Advanced</b>, <b>View Certificate</b> to "
        "compare it, then <b>Accept the Risk and Continue</b>.",
        (
            f'Download <a href="{CA_FILE}">the CA certificate</a>; <code>sha256sum zerosecretroom-ca.crt</code> gives '
            "its SHA-256.",
            "Firefox: Settings, Privacy &amp; Security, View Certificates, <b>Authorities</b>, Import; tick "
            "<b>identify websites</b>.",
            "Chromium: <code>chrome://certificate-manager</code>, Local certificates, <b>Installed by you</b>, Import.",
        ),
    ),
)
WHO_VOUCHES = {
    SELF_SIGNED: "The relay made its certificate itself. No authority that your device knows vouches for it, so the "
    "browser warns. What you send is encrypted all the same; the open question is <b>to whom</b>, and the fingerprint "
    "answers it.",
    LOCAL_CA: "The relay’s certificate is signed by a CA of its own. Your browser warns until this device trusts that "
    "CA. What you send is encrypted all the same; the open question is <b>to whom</b>, and the fingerprints answer it.",
    BROUGHT: "Whoever runs this relay brought its certificate. Where your browser does not warn, there is nothing to "
    "do here. Where it does, compare the fingerprint before you go on.",
    PROXY: "The certificate is that of a proxy before the relay. Where your browser does not warn, there is nothing "
    "to do here. Where it does, ask whoever runs the relay before you go on.",
}
COMPARE = (
    '<p class="note"><b>Compare with what whoever runs the relay tells you by another way:</b> aloud, on paper, from '
    "the relay’s own screen. This page proves nothing by itself: who could fake the certificate could fake this page "
    "too. Browsers may leave out the colons.</p>"
)
NO_CA_HERE = (
    "<p>A phone that shows the page and still refuses its connection needs a certificate it trusts. Ask whoever runs "
    "the relay for one, or for a start with <code>--local-ca</code>.</p>"
)
CA_HERE = (
    "<p>The CA can vouch for nothing but this relay’s own names and addresses: whoever stole its key could impersonate "
    "this relay and no other place. Remove it where you installed it, once you use this relay no more.</p>"
)
TRUST_STYLE = """
:root { color-scheme: light; --bg: #eff3f4; --surface: #fafcfc; --ink: #141e1f; --ink-2: #465255; --line: #dbe1e2;
  --accent: #00615c; --tint: #faf0da }
@media (prefers-color-scheme: dark) { :root { color-scheme: dark; --bg: #090f11; --surface: #101719; --ink: #e8eeee;
  --ink-2: #aab5b6; --line: #293234; --accent: #7ad8cf; --tint: #33270d } }
* { box-sizing: border-box }
body { margin: 0 auto; max-inline-size: 44rem; padding: 16px 16px 48px; background: var(--bg); color: var(--ink);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; overflow-wrap: anywhere }
header { display: flex; gap: 10px; align-items: center; min-block-size: 44px; font-weight: 650 }
svg { inline-size: 22px; block-size: 22px; fill: none; stroke: var(--accent) }
h1, h2, h3 { margin: 0; line-height: 1.2; font-weight: 650; letter-spacing: -.01em; text-wrap: balance }
h1 { margin-block: 16px 8px; font-size: clamp(1.75rem, 1.3rem + 1.8vw, 2.5rem) }
h2 { margin-block: 32px 8px; font-size: 1.3125rem }
h3 { display: inline; font-size: 1rem }
p { margin-block: 8px }
a { color: var(--accent); text-underline-offset: .18em }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px }
code, dd { font-family: ui-monospace, "SF Mono", "Cascadia Mono", Menlo, Consolas, "Noto Sans Mono", monospace;
  font-size: .875rem }
dl, details, .note { margin-block: 12px; padding: 12px 16px; border-radius: 14px; background: var(--surface) }
dl, details { border: 1px solid var(--line) }
dt { color: var(--ink-2); font-size: .8125rem }
dd { margin: 0 }
dd + dt { margin-block-start: 12px }
details { padding-block: 0 }
summary { min-block-size: 44px; padding-block: 10px; cursor: pointer }
ol { padding-inline-start: 20px }
li { margin-block: 6px }
.note { background: var(--tint) }
"""
TRUST_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>Is this the right relay? · ZeroSecretRoom</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<style>{style}</style>
</head>
<body>
<header><svg viewBox="0 0 24 24" aria-hidden="true"><circle cx="12" cy="12" r="10" stroke-width="2"
 stroke-dasharray="8.47 2" transform="rotate(-90 12 12)"/><circle cx="12" cy="12" r="5.5" stroke-width="2.5"/></svg>
<a href="/">ZeroSecretRoom</a></header>
<main>
<h1>Is this the right relay?</h1>
<p>{who}</p>
<dl>
{prints}
</dl>
{compare}
{devices}
</main>
</body>
</html>
"""


def trust_document(trust: Trust, page_sha256: str) -> Document:
    """The page /trust. What does not come from this room is escaped."""
    own = trust.kind in (SELF_SIGNED, LOCAL_CA)
    body = TRUST_PAGE.format(
        style=TRUST_STYLE,
        who=WHO_VOUCHES[trust.kind],
        prints="\n".join(trust_prints(trust, page_sha256)),
        compare=COMPARE,
        devices="\n".join(trust_platforms(trust)) if own else "",
    ).encode()
    policy = (
        f"default-src 'none'; style-src {block_hashes(body)['style']}; img-src data:; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'"
    )
    return Document.of(body, HTML, Content_Security_Policy=policy)


def trust_prints(trust: Trust, page_sha256: str) -> Iterator[str]:
    """What there is to compare, with places where a narrow screen may break the line."""
    if trust.fingerprint:
        digits = html.escape(trust.fingerprint).replace(":", ":<wbr>")
        yield f"<dt>Certificate, SHA-256, valid to {html.escape(trust.ends)}</dt><dd>{digits}</dd>"
    if trust.authority:
        digits = hashlib.sha256(trust.authority).digest().hex(":").upper().replace(":", ":<wbr>")
        yield f"<dt>Local CA, SHA-256</dt><dd>{digits}</dd>"
    digits = "<wbr>".join(re.findall(".{8}", page_sha256))
    yield f"<dt>Page, SHA-256, the same in its Settings under About</dt><dd>{digits}</dd>"


def trust_platforms(trust: Trust) -> Iterator[str]:
    yield "<h2>On your device</h2>"
    for platform in PLATFORMS:
        yield f"<details><summary><h3>{platform.name}</h3></summary><p>{platform.warning}</p>"
        if trust.authority:
            steps = "".join(f"<li>{step}</li>" for step in platform.steps)
            yield f"<p>To be asked no more, let it trust the local CA:</p><ol>{steps}</ol>"
        yield "</details>"
    yield CA_HERE if trust.authority else NO_CA_HERE


def profile_of(authority: bytes) -> bytes:
    """Apple's configuration profile that installs a CA. Its identifiers come from the certificate: the same profile
    twice is one, that of another relay or another CA is another."""
    digest = hashlib.sha256(authority).hexdigest()

    def payload(kind: str, **content: object) -> dict[str, object]:
        return {
            "PayloadType": kind,
            "PayloadIdentifier": f"zerosecretroom.{digest[:16]}.{kind}",
            "PayloadUUID": str(uuid.uuid5(uuid.NAMESPACE_OID, f"{digest} {kind}")).upper(),
            "PayloadVersion": 1,
            "PayloadDisplayName": f"ZeroSecretRoom local CA {digest[:8]}",
            **content,
        }

    certificate = payload("com.apple.security.root", PayloadContent=authority)
    return plistlib.dumps(
        payload(
            "Configuration",
            PayloadContent=[certificate],
            PayloadDescription="Lets this device trust one relay of ZeroSecretRoom and no other place.",
            PayloadRemovalDisallowed=False,
        )
    )


def authority_documents(authority: bytes) -> dict[str, Document]:
    # Attached, for Android opens an unnamed certificate in a dialog that only says to go to Settings.
    attached = 'attachment; filename="zerosecretroom-ca.crt"'
    return {
        CA_FILE: Document.of(authority, "application/x-x509-ca-cert", Content_Disposition=attached),
        PROFILE: Document.of(profile_of(authority), "application/x-apple-aspen-config"),
    }


# ── the app that browsers install: a name, an icon and where to begin; nothing of it runs ─────────────────────────────
ICON = b"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 48 48" fill="none" stroke="#00827c">\
<rect width="48" height="48" fill="#eff3f4" stroke="none"/>\
<circle cx="24" cy="24" r="15" stroke-width="3.4" stroke-dasharray="12.7 3" transform="rotate(-90 24 24)"/>\
<circle cx="24" cy="24" r="8" stroke-width="4"/></svg>
"""
MANIFEST = b"""{
  "name": "ZeroSecretRoom",
  "short_name": "ZeroSecretRoom",
  "id": "/",
  "start_url": "/",
  "scope": "/",
  "display": "standalone",
  "background_color": "#eff3f4",
  "theme_color": "#eff3f4",
  "icons": [{"src": "/icon.svg", "sizes": "any", "type": "image/svg+xml"}]
}
"""


def app_documents() -> dict[str, Document]:
    return {
        "/app.webmanifest": Document.of(MANIFEST, "application/manifest+json"),
        "/icon.svg": Document.of(ICON, "image/svg+xml", Content_Security_Policy="default-src 'none'"),
    }


# ── index.html, and the answer to every request ──────────────────────────────────────────────────────────────────────
@dataclass(frozen=True, slots=True)
class Page:
    """index.html, the sources its policy allows, and the other documents by their paths."""

    index: Document
    policy: str
    others: Mapping[str, Document]

    @property
    def sha256(self) -> str:
        return self.index.sha256

    @classmethod
    def of(cls, raw: bytes) -> Page:
        # Browsers hash inline blocks after turning CR LF into LF: what is hashed and served must have that form.
        body = raw.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        allowed = block_hashes(body)
        policy = (
            f"default-src 'none'; script-src {allowed['script']}; style-src {allowed['style']}; "
            "img-src 'self' blob: data:; media-src blob:; connect-src 'self'{socket}; manifest-src 'self'; "
            "worker-src blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; object-src 'none'; "
            "require-trusted-types-for 'script'; trusted-types 'none'"
        )
        return cls(Document.of(body, HTML), policy, app_documents())

    @classmethod
    def load(cls, path: Path) -> Page:
        """Raises OperatorFault where there is no page to read."""
        try:
            return cls.of(path.read_bytes())
        except OSError as error:
            raise OperatorFault(
                f"page {path} cannot be read ({error.strerror}): put index.html there or name it with --page"
            ) from None

    def with_trust(self, trust: Trust) -> Page:
        """The same, with what there is to say of the certificate in use."""
        others = app_documents() | (authority_documents(trust.authority) if trust.authority else {})
        return dataclasses.replace(self, others={"/trust": trust_document(trust, self.sha256), **others})

    def answer(self, request: HttpRequest | None) -> bytes:
        """The response to a request that opens no socket."""
        if request is None:
            return respond_text("400 Bad Request", "this is not an HTTP/1.1 request")
        head_only = request.head_only
        if request.method not in ("GET", "HEAD"):
            return respond_text("405 Method Not Allowed", "only GET and HEAD are answered", Allow="GET, HEAD")
        if not request.host:
            return respond_text("400 Bad Request", "the Host field is missing or malformed", head_only)
        if request.path == "/":
            return self._index(request)
        if document := self.others.get(request.path):
            return document.answer(request)
        if request.path in (CA_FILE, PROFILE):
            text = "this relay has no local CA: /trust says what to do, and --local-ca at its start makes one"
            return respond_text("404 Not Found", text, head_only)
        if request.path.startswith("/ws/"):
            return respond_text(
                "426 Upgrade Required", "rooms are reached through a WebSocket", head_only, Upgrade="websocket"
            )
        return respond_text(
            "404 Not Found",
            "there is nothing here: the page is at /, its certificate is explained at /trust",
            head_only,
        )

    def _index(self, request: HttpRequest) -> bytes:
        # Older Safari leaves wss out of 'self'; a bracketed address is no host-source, so it stands on 'self' alone.
        socket_source = "" if "[" in request.host else f" wss://{request.host}"
        return self.index.answer(request, {"Content-Security-Policy": self.policy.replace("{socket}", socket_source)})


# ════════════════════════════════════════════════════════════════════════════════════════════════════════════════════
# Certificate: the relay's TLS key and certificate and its identity key. The only room that writes files: three, with a
# local CA five, each 0600 and whole or not there. The TLS key outlives its certificates, the identity outlives both:
# clients pin it.
# ════════════════════════════════════════════════════════════════════════════════════════════════════════════════════
TLS_KEY, TLS_CERT, IDENTITY_KEY = "tls-key.pem", "tls-cert.pem", "relay-identity.pem"
CA_KEY, CA_CERT = "ca-key.pem", "ca-cert.pem"
CERT_LIFE = datetime.timedelta(days=825)  # beyond it Apple's systems refuse a leaf
CA_LIFE = datetime.timedelta(days=3652)  # ten years: people install it by hand on every phone
CERT_RENEWAL = datetime.timedelta(days=30)  # left when the next one is made
CLOCK_SLACK = datetime.timedelta(days=1)  # a certificate is valid from then before it was made: clocks differ
LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
KEY_USES = (
    "digital_signature",
    "content_commitment",
    "key_encipherment",
    "data_encipherment",
    "key_agreement",
    "key_cert_sign",
    "crl_sign",
    "encipher_only",
    "decipher_only",
)


class RelayIdentity:
    """The relay's long-lived ECDSA P-256 key, by which rooms know it again under another certificate."""

    def __init__(self, key: ec.EllipticCurvePrivateKey) -> None:
        self._key = key
        self.public = key.public_key().public_bytes(
            serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint
        )

    def sign(self, label: str, m: bytes) -> bytes:
        """r || s, 64 bytes, over E(label, m)."""
        r, s = decode_dss_signature(self._key.sign(enc(label, m), ec.ECDSA(hashes.SHA256())))
        return r.to_bytes(32, "big") + s.to_bytes(32, "big")


def is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


class Authority(NamedTuple):
    """The local CA. `replaced` says that it stands where another one was, which phones may have installed."""

    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate
    replaced: bool = False


class Span(NamedTuple):
    """From when to when a certificate is valid."""

    begins: datetime.datetime
    ends: datetime.datetime


def named(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, common_name)])


def used_for(use: str) -> x509.KeyUsage:
    return x509.KeyUsage(**{each: each == use for each in KEY_USES})


def sign_certificate(
    subject: x509.Name,
    public: ec.EllipticCurvePublicKey,
    issuer: x509.Name,
    signer: ec.EllipticCurvePrivateKey,
    span: Span,
    *extensions: tuple[x509.ExtensionType, bool],
) -> x509.Certificate:
    """A certificate with these extensions, each critical or not, and the identifiers of both keys."""
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(span.begins)
        .not_valid_after(span.ends)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
    )
    for extension, critical in extensions:
        builder = builder.add_extension(extension, critical)
    return builder.sign(signer, hashes.SHA256())


def build_certificate(
    key: ec.EllipticCurvePrivateKey,
    names: Iterable[str],
    now: datetime.datetime,
    authority: Authority | None = None,
) -> x509.Certificate:
    """A server certificate over addresses and host names, signed by the local CA or else by itself."""
    subject = named("ZeroSecretRoom relay")
    begins = now - CLOCK_SLACK
    issuer, signer, ends = subject, key, begins + CERT_LIFE
    if authority is not None:
        issuer, signer = authority.certificate.subject, authority.key
        ends = min(ends, authority.certificate.not_valid_after_utc)
    alternatives: list[x509.GeneralName] = [
        x509.IPAddress(ipaddress.ip_address(name)) if is_address(name) else x509.DNSName(name) for name in sorted(names)
    ]
    return sign_certificate(
        subject,
        key.public_key(),
        issuer,
        signer,
        Span(begins, ends),
        (x509.SubjectAlternativeName(alternatives), False),
        (x509.BasicConstraints(ca=False, path_length=None), True),
        (used_for("digital_signature"), True),
    )


def build_authority(key: ec.EllipticCurvePrivateKey, names: Iterable[str], now: datetime.datetime) -> x509.Certificate:
    """A CA that can vouch for servers of these names and addresses and for nothing else (RFC 5280, 4.2.1.10).

    Loopback is always among them: a kind of name of which none is permitted would not be constrained at all.
    """
    permitted: list[x509.GeneralName] = [
        x509.IPAddress(ipaddress.ip_network(name)) if is_address(name) else x509.DNSName(name)
        for name in sorted(LOOPBACK.union(names))
    ]
    mark = x509.SubjectKeyIdentifier.from_public_key(key.public_key()).digest[:4].hex()
    subject = named(f"ZeroSecretRoom local CA {mark}")  # two of them on one phone must not be taken for one another
    begins = now - CLOCK_SLACK
    return sign_certificate(
        subject,
        key.public_key(),
        subject,
        key,
        Span(begins, begins + CA_LIFE),
        (x509.NameConstraints(permitted_subtrees=permitted, excluded_subtrees=None), True),
        (x509.BasicConstraints(ca=True, path_length=0), True),
        (used_for("key_cert_sign"), True),
    )


def certificate_names(certificate: x509.Certificate) -> frozenset[str]:
    """The addresses and host names a certificate is for; a wildcard names no host."""
    return frozenset(name for name in _alternative_names(certificate) if "*" not in name)


def has_wildcard(certificate: x509.Certificate) -> bool:
    """Whether a certificate is for hosts that it does not list."""
    return any("*" in name for name in _alternative_names(certificate))


def _alternative_names(certificate: x509.Certificate) -> list[str]:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    hosts = [name.lower() for name in names.get_values_for_type(x509.DNSName)]
    return hosts + [str(address) for address in names.get_values_for_type(x509.IPAddress)]


def constrained_names(authority: x509.Certificate) -> frozenset[str]:
    """The addresses and host names that a local CA can vouch for; none where it is not one of this relay's making."""
    try:
        trees = authority.extensions.get_extension_for_class(x509.NameConstraints).value.permitted_subtrees or []
    except x509.ExtensionNotFound:
        return frozenset()
    return frozenset(str(tree.value).rpartition("/")[0] or str(tree.value) for tree in trees)


def renewal_time(certificate: x509.Certificate) -> datetime.datetime:
    return certificate.not_valid_after_utc - CERT_RENEWAL


def signed_by(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(issuer)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def still_serves(
    certificate: x509.Certificate, public: ec.EllipticCurvePublicKey, names: Iterable[str], now: datetime.datetime
) -> bool:
    """Whether a kept certificate is of this key, covers these names and does not end soon."""
    return (
        certificate.public_key() == public
        and frozenset(names) <= certificate_names(certificate) | constrained_names(certificate)
        and certificate.not_valid_before_utc <= now < renewal_time(certificate)
    )


def fingerprint(certificate: x509.Certificate) -> str:
    """SHA-256 as browsers show it."""
    return certificate.fingerprint(hashes.SHA256()).hex(":").upper()


def open_state(path: Path) -> Path:
    """The state directory, made where it is missing."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.joinpath(TLS_KEY).exists()
    except OSError as error:
        raise OperatorFault(
            f"state directory {path} cannot be used ({error.strerror}): name another with --state-dir"
        ) from None
    return path


def write_private(path: Path, data: bytes) -> None:
    """A file that only its owner reads, whole or not there."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with suppress(FileNotFoundError):
            temporary.unlink()
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise OperatorFault(
            f"{path} cannot be written ({error.strerror}): make room there or use --state-dir"
        ) from None


def make_key(path: Path) -> ec.EllipticCurvePrivateKey:
    key = ec.generate_private_key(ec.SECP256R1())
    pem, pkcs8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    write_private(path, key.private_bytes(pem, pkcs8, serialization.NoEncryption()))
    return key


def load_or_make_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """The P-256 key in a file, made at the first start. One that others may read is closed to them."""
    try:
        if stat.S_IMODE(path.stat().st_mode) != 0o600:  # a file system that is read-only now may hold it all the same
            path.chmod(0o600)
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except FileNotFoundError:
        key = make_key(path)
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        raise OperatorFault(f"{path} is not a readable P-256 key: restore it, or delete it and clients will be warned")
    return key


def load_or_make_certificate(
    state: Path, names: Iterable[str], now: datetime.datetime, authority: Authority | None = None
) -> x509.Certificate:
    """The certificate of a state directory, renewed with the same key when it no longer serves; without a CA
    self-signed."""
    key, path = load_or_make_key(state / TLS_KEY), state / TLS_CERT
    with suppress(OSError, ValueError):
        kept = x509.load_pem_x509_certificate(path.read_bytes())
        issuer = authority.certificate if authority is not None else kept
        if still_serves(kept, key.public_key(), names, now) and signed_by(kept, issuer):
            return kept
    certificate = build_certificate(key, names, now, authority)
    write_private(path, certificate.public_bytes(serialization.Encoding.PEM))
    return certificate


def load_or_make_authority(
    state: Path, needed: frozenset[str], known: frozenset[str], now: datetime.datetime
) -> Authority:
    """The local CA of a state directory; another one when it ends soon or cannot vouch for a name that is needed.

    The other one has another key: a phone that has both would not know which constraints a certificate is under.
    """
    key, path = load_or_make_key(state / CA_KEY), state / CA_CERT
    with suppress(OSError, ValueError):
        kept = x509.load_pem_x509_certificate(path.read_bytes())
        if still_serves(kept, key.public_key(), needed, now):
            return Authority(key, kept)
    replaced = path.exists()
    if replaced:
        key = make_key(state / CA_KEY)
    certificate = build_authority(key, needed | known, now)
    write_private(path, certificate.public_bytes(serialization.Encoding.PEM))
    return Authority(key, certificate, replaced)


def load_certificate(path: Path) -> x509.Certificate:
    """The operator's leaf certificate, the first of its chain. A chain with a damaged part is refused."""
    try:
        return x509.load_pem_x509_certificates(path.read_bytes())[0]
    except (OSError, ValueError) as error:
        raise OperatorFault(
            f"certificate {path} cannot be read ({error}): --cert takes a PEM chain, leaf first"
        ) from None


def tls_context(cert: Path, key: Path) -> ssl.SSLContext:
    """A context made anew from two PEM files, so that a failed reload leaves the one in use as it was."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    context.num_tickets = 0  # a resumption key in memory would outlive the session it opens
    context.options |= ssl.OP_NO_TICKET  # the same for TLS 1.2
    try:
        context.load_cert_chain(cert, key, password=_no_password)
    except (OSError, ValueError) as error:
        raise OperatorFault(
            f"{cert} and {key} do not load ({error}): they must be a PEM chain and its unencrypted key"
        ) from None
    return context


def _no_password() -> str:
    raise ValueError("the key is encrypted")  # otherwise OpenSSL would ask on the terminal


# ════════════════════════════════════════════════════════════════════════════════════════════════════════════════════
# Link: sockets. One port: bytes -> TLS -> request head -> page, or WebSocket messages -> Rooms -> effects -> outboxes.
# The only user of asyncio and websockets. It knows connections and frames, never what is in them. One connection is
# one object with no task and no timer of its own; frames of one loop tick leave as one message a member.
#
# TLS runs here over memory buffers rather than in asyncio's transport: 27 KB a connection instead of 48 (and 290 with
# asyncio's own buffer size) at the same CPU, without touching private attributes, and plain http is told by one byte.
# ════════════════════════════════════════════════════════════════════════════════════════════════════════════════════
log = logging.getLogger("zerosecretroom")
silent = logging.getLogger("zerosecretroom.websockets")  # at debug level websockets would log payloads
silent.setLevel(logging.CRITICAL + 1)

CLOSE_GOING_AWAY, CLOSE_NOT_BYTES, CLOSE_ODD, CLOSE_BUG, CLOSE_TOO_SLOW, CLOSE_SILENT = (
    1001,
    1003,
    1008,
    1011,
    1013,
    4002,
)
LOOKS = 10  # a tick: each is at a part of the connections, or the others would wait for all of it
TLS_RECORD = 16384  # bytes: OpenSSL's buffers never shrink, so nothing larger goes through them at once
TLS_HANDSHAKE = 0x16
HEAD, ANSWERED, OPEN, CLOSING, GONE = "head", "answered", "open", "closing", "gone"

OUT_OF_DESCRIPTORS = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
THIS_MACHINE = ("127.0.0.1",)  # where who comes through a Unix socket is

Message = tuple[bytes, ...]  # the bytes of a WebSocket message, in pieces so that a large frame is not copied


class Pipe(Protocol):
    """What lies between a socket and the bytes meant by it."""

    def receive(self, data: bytes) -> Iterable[bytes]: ...
    def send(self, pieces: Message) -> bytes: ...
    def pending(self) -> bytes: ...
    def close(self) -> bytes: ...


class Clear:
    """No encryption: behind a proxy, or to tell a browser that it should have used https."""

    __slots__ = ()

    def receive(self, data: bytes) -> Iterable[bytes]:
        """In pieces as TLS has them, so that a flood of the smallest frames is met before all of it is parsed."""
        return (data[start : start + TLS_RECORD] for start in range(0, len(data), TLS_RECORD))

    def send(self, pieces: Message) -> bytes:
        return b"".join(pieces)

    def pending(self) -> bytes:
        return b""

    def close(self) -> bytes:
        return b""


class Tls:
    """The server's side of TLS over memory buffers. ssl.SSLError means that the connection is of no more use.

    All connections write to one buffer, `outgoing`, and take what is theirs before another has its turn: OpenSSL's
    buffers never shrink, and a single one stays in the processor's cache."""

    __slots__ = ("_incoming", "_outgoing", "_said", "_shaken", "_tls")

    def __init__(self, context: ssl.SSLContext, outgoing: ssl.MemoryBIO) -> None:
        self._incoming, self._outgoing = ssl.MemoryBIO(), outgoing
        self._tls = context.wrap_bio(self._incoming, outgoing, server_side=True)
        self._shaken = False
        self._said = b""  # by TLS itself, not sent yet

    def receive(self, data: bytes) -> Iterable[bytes]:
        """What the records in it hold, joined: a member that posts in a burst is then read in one go."""
        view = memoryview(data)
        for start in range(0, len(data), TLS_RECORD):
            self._incoming.write(view[start : start + TLS_RECORD])
            pieces: list[bytes] = []
            ended: ssl.SSLError | None = None
            try:
                self._read(pieces)
            except ssl.SSLWantReadError:
                pass
            except ssl.SSLError as error:
                ended = error
            finally:
                self._said += self._outgoing.read()
            yield b"".join(pieces)  # what came before a farewell counts
            if ended is not None:
                raise ended

    def _read(self, pieces: list[bytes]) -> None:
        if not self._shaken:
            self._tls.do_handshake()
            self._shaken = True
        while self._incoming.pending:  # asking for more than there is costs as much as a record
            piece = self._tls.read(TLS_RECORD)
            if not piece:
                raise ssl.SSLZeroReturnError
            pieces.append(piece)

    def send(self, pieces: Message) -> bytes:
        try:
            for piece in pieces:
                if len(piece) <= TLS_RECORD:
                    self._tls.write(piece)
                    continue
                view = memoryview(piece)
                for start in range(0, len(piece), TLS_RECORD):
                    self._tls.write(view[start : start + TLS_RECORD])
        finally:
            records = self.pending()
        return records

    def pending(self) -> bytes:
        said, self._said = self._said, b""
        return said + self._outgoing.read()

    def close(self) -> bytes:
        with suppress(ssl.SSLError, ValueError):
            self._tls.unwrap()
        return self.pending()


def binary_header(size: int) -> bytes:
    """The first bytes of an unmasked binary WebSocket message (RFC 6455, 5.2)."""
    if size < 126:
        return struct.pack(">BB", 0x82, size)
    return struct.pack(">BBH", 0x82, 126, size) if size < 65536 else struct.pack(">BBQ", 0x82, 127, size)


LAST, MASKED, CONTROL, LONGEST_HEAD = 0x80, 0x80, 0x08, 14  # of WebSocket frames (RFC 6455, 5.2)
WHOLE_MESSAGE = LAST | 2  # binary


def frame_span(data: bytes, at: int) -> tuple[int, int]:
    """Where the content of the frame at `at` begins, and where it ends; 0 as long as its head is not whole."""
    if len(data) < at + 2:
        return 0, 0
    size, begin = data[at + 1] & 0x7F, at + 2
    if size > 125:
        begin += 2 if size == 126 else 8
        size = int.from_bytes(data[at + 2 : begin], "big")
    if data[at + 1] & MASKED:
        begin += 4
    return (begin, begin + size) if begin <= len(data) else (0, 0)


class Sieve:
    """Takes whole binary messages, which is what pages send, out of what a socket received. All else goes to
    websockets, which is the judge of frames but takes several times as long; to it those messages never were."""

    __slots__ = ("_fragments", "_head", "_judge", "_left", "_most", "coming")

    def __init__(self, judge: Callable[[], ServerProtocol], most: int) -> None:
        self._judge, self._most = judge, most
        self._head = b""  # of a frame whose head is not whole
        self._left = 0  # bytes to come of one whose head is
        self._fragments = False  # whether the last frame of a message is to come
        self.coming = 0  # bytes received of a frame that is not whole

    def receive(self, data: bytes) -> list[bytes | Frame]:
        """Messages that came whole, and websockets' frames between them."""
        received: list[bytes | Frame] = []
        at = 0
        while at < len(data):
            if data[at] == WHOLE_MESSAGE and not (self.coming or self._fragments):
                begin, end = frame_span(data, at)
                if 0 < end <= len(data) and data[at + 1] & MASKED and end - begin <= self._most:
                    received.append(apply_mask(data[begin:end], data[begin - 4 : begin]))
                    at = end
                    continue
            start, at = at, self._end_of_part(data, at)
            judge = self._judge()
            judge.receive_data(data[start:at])
            received += [event for event in judge.events_received() if isinstance(event, Frame)]
            if judge.close_rcvd is not None or judge.parser_exc is not None:
                break  # its farewell, or what no client may say: nothing after it counts
        return received

    def _end_of_part(self, data: bytes, at: int) -> int:
        """How far what belongs to the same frame as the byte at `at` reaches."""
        if not self._left:
            head = self._head + data[at : at + LONGEST_HEAD]
            _, end = frame_span(head, 0)
            if not end:
                self._head, self.coming = head, len(head)
                return len(data)
            self._left, self._head = end - len(self._head), b""
            if not head[0] & CONTROL:
                self._fragments = not head[0] & LAST
        size = min(self._left, len(data) - at)
        self._left -= size
        self.coming = self.coming + size if self._left else 0
        return at + size


Network = ipaddress.IPv4Network | ipaddress.IPv6Network


def read_address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """An address as sockets and proxies write it; one of IPv4 that came over IPv6 is what it is."""
    try:
        address = ipaddress.ip_address(text.strip().strip("[]").partition("%")[0])
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


def place_of(text: str) -> str:
    """What counts as one place: an IPv4 address, or the /64 that one customer has of IPv6. Nothing for this machine."""
    address = read_address(text)
    if address is None or address.is_loopback:
        return ""
    return str(address) if address.version == 4 else str(ipaddress.IPv6Network((int(address) >> 64 << 64, 64)))


def is_trusted(text: str, proxies: Sequence[Network]) -> bool:
    address = read_address(text) if proxies else None
    return address is not None and any(address in network for network in proxies)


def forwarded_for(field: str, proxies: Sequence[Network]) -> str:
    """Whom the last trusted proxy saw: the last address of X-Forwarded-For that is none of theirs. What stands before
    it anybody may have written."""
    for each in reversed(field.split(",")):
        if not is_trusted(each, proxies):
            return each.strip()
    return ""


def same_origin(origin: str, host: str, schemes: Sequence[str]) -> bool:
    """Whether an Origin field is the address under which the page was loaded, default ports left out or not."""
    scheme, _, place = origin.partition("://")
    default = {"https": ":443", "http": ":80"}.get(scheme, "")
    return scheme in schemes and place.lower().removesuffix(default) == host.lower().removesuffix(default)


class Crowd:
    """Frames of one tick to the same members, kept once. In a busy room each delivery is then a copy of its bytes."""

    __slots__ = ("_messages", "conns", "pieces")

    def __init__(self, conns: Sequence[Conn]) -> None:
        self.conns = conns
        self.pieces: list[bytes] = []  # V(frame)
        self._messages: list[Message] = []

    def messages(self, most: int) -> list[Message]:
        """All of it, joined for the first member and as good for the others: servers do not mask."""
        if not self._messages:
            self._messages = packed(self.pieces, most)
        return self._messages


def joined(pieces: Sequence[bytes]) -> Message:
    """One WebSocket message."""
    return (b"".join((binary_header(sum(map(len, pieces))), *pieces)),)


def packed(pieces: Sequence[bytes], most: int) -> list[Message]:
    """WebSocket messages of at most so many bytes, where a single piece is not larger."""
    ends = [0, *itertools.accumulate(map(len, pieces))]
    messages, start = [], 0
    while start < len(pieces):
        full = bisect.bisect_right(ends, ends[start] + most) - 1
        stop = max(full, start + 1)
        messages.append(joined(pieces[start:stop]))
        start = stop
    return messages


class Conn(asyncio.Protocol):
    """One connection. Rooms sees it as an opaque key."""

    __slots__ = (
        "_answers",
        "_backlog",
        "_blocked",
        "_bulk",
        "_events",
        "_hint",
        "_link",
        "_odd",
        "_parts",
        "_pipe",
        "_received",
        "_sieve",
        "_size",
        "_socket",
        "_start",
        "_transport",
        "_waits",
        "address",
        "answers",
        "crowd",
        "entered",
        "heard",
        "held",
        "outbox",
        "pinged",
        "place",
        "state",
    )

    def __init__(self, link: Link) -> None:
        self._link = link
        self._pipe: Pipe | None = None
        self._hint = False  # plain http came where TLS is spoken
        self._received = bytearray()  # of the request head
        self._socket: ServerProtocol | None = None
        self._sieve: Sieve | None = None
        self._events: deque[bytes | Frame] = deque()  # received, not yet handed to Rooms
        self._parts = bytearray()  # of a fragmented message
        self._odd = 0  # frames of this tick that ended no message
        self._waits = False  # it sent too fast: nothing is read for a while
        self._backlog: deque[Message] = deque()  # what the transport has no room for
        self._bulk: deque[Message] = deque()  # chunks that wait until nothing else does
        self._size = 0  # bytes in both
        self._answers = 0  # bytes unsent, at most, that this peer asked for itself
        self._blocked = False
        self.state = HEAD
        self.crowd: Crowd | None = None  # frames of this tick that others get as well
        self._start = 0  # how many of these are dealt with
        self.outbox: list[tuple[int, bytes]] = []  # V(frame) for this member alone, and how many of the crowd's before
        self.answers: list[bytes] = []  # V(frame), after all others
        self.entered = False
        self.pinged = False
        self.heard = 0.0
        self.held = 0  # bytes that come and go, as Link counts them
        self.address = self.place = ""  # where it comes from, and what counts as one place

    # ── from asyncio ─────────────────────────────────────────────────────────────────────────────────────────────────
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport = cast(asyncio.Transport, transport)  # uvloop's is none by name
        self._transport = transport
        transport.set_write_buffer_limits(0)  # what the system does not take waits here, shared by members
        self._keep_kernel_queue_short(transport)
        self.heard = self._link.now()
        self.address = (transport.get_extra_info("peername") or THIS_MACHINE)[0]
        if not self._link.admit(self):
            transport.abort()

    def _keep_kernel_queue_short(self, transport: asyncio.Transport) -> None:
        """What the kernel has taken cannot be overtaken: it gets only what the line is about to carry."""
        option, socket_ = getattr(socket, "TCP_NOTSENT_LOWAT", None), transport.get_extra_info("socket")
        if option is not None and socket_ is not None:
            with suppress(OSError):
                socket_.setsockopt(socket.IPPROTO_TCP, option, self._link.limits.unsent)

    def data_received(self, data: bytes) -> None:
        if self._pipe is None:
            self._pipe = self._choose_pipe(data)
        if self.state == OPEN:  # a head and a farewell have a time in all, or a byte a minute would hold them open
            self.heard, self.pinged = self._link.now(), False
        try:
            for plain in self._pipe.receive(data):
                self._read(plain)
        except ssl.SSLError:
            self._end()
        if pending := self._pipe.pending():
            self._transport.write(pending)

    def pause_writing(self) -> None:
        self._blocked = True
        self._weigh()

    def resume_writing(self) -> None:
        self._blocked = False
        self._weigh()
        if self.state == OPEN:
            self.heard = self._link.now()
        self._pump()

    def connection_lost(self, error: Exception | None) -> None:
        self.state, self._blocked = GONE, False
        self._forget()
        self._link.lost(self)

    # ── bytes in ─────────────────────────────────────────────────────────────────────────────────────────────────────
    def _choose_pipe(self, data: bytes) -> Pipe:
        context = self._link.context
        if context is not None and data[0] == TLS_HANDSHAKE:
            return Tls(context, self._link.outgoing)
        self._hint = context is not None
        return Clear()

    def _read(self, plain: bytes) -> None:
        if self.state == HEAD:
            self._read_head(plain)
        elif self._sieve is not None:
            self._read_socket(self._sieve.receive(plain))

    def _read_head(self, plain: bytes) -> None:
        self._received += plain
        head, end, rest = self._received.partition(b"\r\n\r\n")
        if len(head) > self._link.limits.head_bytes:
            self._respond(respond_text("431 Request Header Fields Too Large", "the request head is too long"))
        elif end:
            self._received.clear()
            self._answer(bytes(head + end), bytes(rest))

    def _answer(self, head: bytes, rest: bytes) -> None:
        request = parse_request(head)
        if self._hint:
            self._respond(use_https(request))
        elif request is None:
            self._respond(self._link.page.answer(request))
        elif busy := self._link.too_many(self, request):
            self._turn_away(request, busy)
        elif report := self._link.report(self, request):
            self._respond(report)
        elif not request.wants_socket:
            self._respond(self._link.page.answer(request))
        elif refusal := self._link.refusal(self, request):
            self._respond(respond_text("403 Forbidden", refusal))
        elif self._upgrade(request):
            self.entered = True
            self._link.enter(self, request.path.removeprefix("/ws/"))
            self._read(rest)

    def _turn_away(self, request: HttpRequest, busy: PeerFault) -> None:
        """Says why there is no place now, where the one who asks can read it: pages see no status of a socket."""
        if not request.wants_socket:
            seconds = str(busy.retry_ms // 1000)
            self._respond(
                respond_text("503 Service Unavailable", busy.text, request.head_only, **{"Retry-After": seconds})
            )
        elif self._upgrade(request):
            frame = encode_frame(DownFault(0, busy.code, busy.text, busy.retry_ms))
            self.post(len(frame).to_bytes(4, "big") + frame)
            self.close(CLOSE_BUSY, busy.code)

    def _respond(self, response: bytes) -> None:
        self._write((response,))
        self._end(ANSWERED)

    def _upgrade(self, request: HttpRequest) -> bool:
        """Whether this is a WebSocket from now on. The answer is made here: websockets takes several times as long."""
        answer = open_socket(request)
        if not answer:
            status = "400 Bad Request" if request.upgrades else "426 Upgrade Required"
            asked = {"Upgrade": "websocket", "Sec-WebSocket-Version": "13"}
            text = "this is no opening of a WebSocket of version 13"
            self._respond(respond_text(status, text, request.head_only, **asked))
            return False
        self._write((answer,))
        self._sieve = Sieve(self._judge, self._link.limits.max_message)
        self.state, self.heard = OPEN, self._link.now()
        return True

    def _judge(self) -> ServerProtocol:
        """websockets, once something else than a whole message comes or goes: with most that is their farewell, and it
        takes 4 KB."""
        if self._socket is None:
            most = self._link.limits.max_message
            self._socket = ServerProtocol(state=State.OPEN, max_size=most, logger=silent)
        return self._socket

    def _dismiss(self) -> None:
        """Looks at nothing that still comes. A parser of websockets refers to itself, and to all it has of a message:
        by itself that would go when Python next searches all there is for cycles of garbage."""
        if self._socket is not None:
            self._socket.parser.close()
            self._socket.parser_exc = None
        self._socket = self._sieve = None

    def _read_socket(self, received: list[bytes | Frame]) -> None:
        if self.state == OPEN:
            self._events.extend(received)
            self._work()
        else:  # its farewell is waited for, and little else
            self._odd += len(received)
        self._weigh()
        if self._socket is None:
            return
        if self._socket.close_rcvd is not None:
            farewell = tuple(filter(None, self._socket.data_to_send()))
            self._forget()  # it takes no more but the answer
            self._transmit(farewell)
            self._end()
            return
        self._emit(self._socket)
        if self._socket.parser_exc is not None and self.state == OPEN:  # a close frame says why
            self._start_closing()
        if self._socket.parser_exc is not None or (self.state != OPEN and self._odd > self._link.limits.odd_frames):
            self._dismiss()  # what still comes is not worth a reset
            self._weigh()

    def _work(self) -> None:
        """Hands what was received to Rooms, as long as the peer also takes what it asked for."""
        while self._events and self.state == OPEN and not self._waits and self._answers < self._link.limits.outbox:
            if messages := self._messages():
                self._link.handle(self, messages)
        if self._odd > self._link.limits.odd_frames:
            self.cut(CLOSE_ODD, "too many frames that end no message")
        if (self._events or self._waits) and self.state == OPEN:
            self._transport.pause_reading()

    def _messages(self) -> list[bytes]:
        """Some of the whole messages among what was received: what is done once for all of them is cheap."""
        messages: list[bytes] = []
        while self._events and len(messages) < self._link.limits.messages_at_once:
            frame = self._events[0]
            if isinstance(frame, bytes):
                self._events.popleft()
                messages.append(frame)
                continue
            if frame.opcode is Opcode.TEXT:
                if not messages:
                    self.close(CLOSE_NOT_BYTES, "messages are binary")
                    self._events.clear()
                break
            self._events.popleft()
            if frame.opcode is not Opcode.BINARY and frame.opcode is not Opcode.CONT:
                self._odd += 1
            elif frame.fin and not self._parts:
                messages.append(bytes(frame.data))
            else:
                self._assemble(frame, messages)
        return messages

    def _assemble(self, frame: Frame, messages: list[bytes]) -> None:
        self._parts += frame.data
        if frame.fin:
            messages.append(bytes(self._parts))
            self._parts.clear()
        else:
            self._odd += 1

    def wait(self, seconds: float) -> None:
        """Reads nothing for a while."""
        if self.state == OPEN:
            self._waits = True
            self._transport.pause_reading()
            self._link.later(seconds, self._waited)

    def _waited(self) -> None:
        self._waits = False
        self.heard = self._link.now()  # what it sent meanwhile could not be heard
        self._read_on()

    def _read_on(self) -> None:
        if not self._waits and self.state != GONE:
            self._transport.resume_reading()
            self._work()
            self._weigh()

    # ── bytes out ────────────────────────────────────────────────────────────────────────────────────────────────────
    def post(self, frame: bytes) -> None:
        """Takes a frame into the outbox; the caller sees to the flush."""
        self.outbox.append((len(self.crowd.pieces) if self.crowd else 0, frame))

    def post_large(self, frame: bytes) -> None:
        """Takes a frame that goes as a message of its own, by reference; the caller sees to the flush."""
        if self.state == OPEN:
            self._pack(self._take())
            self._hold((binary_header(4 + len(frame)) + len(frame).to_bytes(4, "big"), frame))

    def post_bulk(self, frame: bytes) -> None:
        """Takes a chunk, which goes when nothing else does; the caller sees to the flush."""
        if self.state == OPEN:
            self._bulk.append((binary_header(4 + len(frame)) + len(frame).to_bytes(4, "big"), frame))
            self._size += sum(map(len, self._bulk[-1]))

    def charge(self, size: int) -> None:
        """Counts bytes that this peer caused for itself: they do not make it a slow one."""
        self._answers += size

    def flush(self) -> None:
        """Sends what this tick brought, as one message where it is not too much."""
        crowd = self.crowd if self.state == OPEN and not (self.outbox or self._start) else None
        if crowd is None:
            pieces = self._take()
        self.crowd, self._start = None, 0  # before anything is sent: that may bring more to send
        if crowd is not None:  # exactly what the others get
            self._share(crowd.messages(self._link.limits.join_bytes))
        elif self.state == OPEN:
            self._pack(pieces)
            self._pump()

    def _share(self, messages: list[Message]) -> None:
        """Sends what others get as well, and behind it the answers that only this member gets."""
        own = joined(self.answers) if self.answers else ()
        self.answers.clear()
        if len(messages) > 1 or self._blocked or self._backlog or self._bulk:
            for message in filter(None, (*messages, own)):
                self._hold(message)
            self._pump()
        else:
            self._transmit(messages[0] + own)
            self._go_on()

    def _take(self) -> list[bytes]:
        """Empties outbox and crowd, in the order in which the frames came."""
        shared = self.crowd.pieces if self.crowd else []
        taken, at = [], self._start
        for place, piece in self.outbox:
            taken += shared[at:place]
            taken.append(piece)
            at = place
        taken += shared[at:]
        taken += self.answers
        self._start = len(shared)
        self.outbox.clear()
        self.answers.clear()
        return taken

    def _pack(self, pieces: Sequence[bytes]) -> None:
        """Moves what was taken into the backlog, as messages of a size that browsers take in one go."""
        for message in packed(pieces, self._link.limits.join_bytes):
            self._hold(message)

    def _hold(self, message: Message) -> None:
        self._backlog.append(message)
        self._size += sum(map(len, message))

    def _emit(self, socket_: ServerProtocol) -> None:
        """Sends what the WebSocket protocol itself has to say."""
        if message := tuple(filter(None, socket_.data_to_send())):
            self._write(message)

    def _write(self, message: Message) -> None:
        """Sends behind all that waits already."""
        if self._blocked or self._backlog:
            self._hold(message)
            self._weigh()
            self._check()
        else:
            self._transmit(message)

    def _transmit(self, message: Message) -> None:
        try:
            if self._pipe is not None:
                self._transport.write(self._pipe.send(message))
        except ssl.SSLError:  # nothing goes through it any more, and whoever sends here has others to serve
            self._transport.abort()

    def _pump(self) -> None:
        """Sends of the backlog what the transport takes, then goes on with what was received meanwhile."""
        while (self._backlog or self._bulk) and not self._blocked:
            message = (self._backlog or self._bulk).popleft()
            self._size -= sum(map(len, message))
            self._transmit(message)
        self._weigh()
        if self._backlog or self._bulk:
            self._check()
        else:
            self._go_on()

    def _go_on(self) -> None:
        """All is sent: what waited for that is taken, though not in the middle of a flush."""
        self._answers = 0
        if self._events:
            self._link.later(0, self._read_on)

    def _check(self) -> None:
        """Cuts a peer that does not take what others send: in Rooms its place in the log stays."""
        if self.state == OPEN and self._size - self._answers > self._link.limits.outbox:
            self.cut(CLOSE_TOO_SLOW, "too slow")

    def _weigh(self) -> None:
        """Tells Link what waits here for this peer, or came from it and was not dealt with."""
        held = self._size + len(self._parts)
        if self._sieve is not None:
            held += self._sieve.coming
        if self._events:
            held += sum(len(each if isinstance(each, bytes) else each.data) for each in self._events)
            held += self._link.limits.overhead * len(self._events)
        if self._blocked:
            held += self._transport.get_write_buffer_size()
        if held != self.held:
            change, self.held = held - self.held, held
            self._link.weigh(change)

    def begin_tick(self) -> None:
        self._odd = 0

    # ── the end ──────────────────────────────────────────────────────────────────────────────────────────────────────
    def close(self, code: int, reason: str) -> None:
        """Sends what is in the outbox and a close frame; the answer to it, or the sweep, ends the connection."""
        if self.state != OPEN:
            return
        self._pack(self._take())
        self._size -= sum(len(piece) for message in self._bulk for piece in message)
        self._bulk.clear()  # nothing may follow a close frame, and chunks are asked for again
        judge = self._judge()
        with suppress(InvalidState):  # the peer was faster
            judge.send_close(code, reason)
        self._start_closing()
        for piece in filter(None, judge.data_to_send()):
            self._hold((piece,))
        self._pump()

    def cut(self, code: int, reason: str) -> None:
        """Closes without what waits, which would keep the close frame from arriving."""
        self._link.cuts += 1
        self._forget()
        self.close(code, reason)

    def ping(self) -> None:
        """Asks for a sign of life, which browsers give without waking their page."""
        self.pinged = True
        judge = self._judge()
        judge.send_ping(b"")
        self._emit(judge)

    def abort(self) -> None:
        self._transport.abort()

    def _start_closing(self, state: str = CLOSING) -> None:
        self.state, self.heard = state, self._link.now()
        self._transport.resume_reading()  # the answer to a close frame
        self._link.depart(self)

    def _end(self, state: str = CLOSING) -> None:
        """Ends the connection once the transport is empty."""
        self._start_closing(state)
        self._dismiss()
        if self._pipe is not None:
            self._transport.write(self._pipe.close())
        self._transport.close()

    def _forget(self) -> None:
        self._take()
        for held in (self._events, self._parts, self._backlog, self._bulk):
            held.clear()
        self._size = 0
        self._dismiss()
        self._weigh()


def use_https(request: HttpRequest | None) -> bytes:
    """The answer to plain http where TLS is spoken: browsers follow it, people can read it."""
    place = f"https://{request.host}{request.target}" if request and request.host else "https://"
    text = f"this port speaks TLS only: open {place}" if request else "this port speaks TLS only"
    if request is None or not request.host:
        return respond_text("400 Bad Request", text)
    return respond_text("307 Temporary Redirect", text, request.head_only, Location=place)


class Link:
    """All connections and the rooms behind them; carries out effects."""

    def __init__(
        self,
        rooms: Rooms,
        page: Page,
        limits: Limits,
        context: ssl.SSLContext | None,
        allow_null_origin: bool = False,
        proxies: Sequence[Network] = (),
        monitors: Sequence[Network] = (),
        log_addresses: bool = False,
    ) -> None:
        self.page, self.limits, self.context = page, limits, context
        self._proxies = proxies  # whose word on where a connection comes from counts
        self._monitors = monitors  # who may read /metrics and /healthz beside this machine
        self._log_addresses = log_addresses
        self._refusals: Counter[str] = Counter()  # of connections, by reason
        self.now = time.monotonic
        self._rooms = rooms
        self._allow_null_origin = allow_null_origin
        self._conns: set[Conn] = set()
        self._places: Counter[str] = Counter()  # connections, by where they come from
        self._held = 0  # bytes that come and go
        self._relieving = False
        self._patience = {  # s in a state
            HEAD: limits.head_seconds,
            ANSWERED: limits.answer_seconds,
            CLOSING: limits.close_seconds,
        }
        self._dirty: set[Conn] = set()
        self._flushing = False
        self._servers: list[asyncio.Server] = []
        self.outgoing = ssl.MemoryBIO()  # see Tls
        self._empty = asyncio.Event()
        self._sweeper: asyncio.TimerHandle | None = None
        self._swept = self.now()
        self._look = 0  # which part of the tick this is
        self._round: list[Conn] = []  # whom this tick looks at
        self._ended = 0  # connections, since cycles of garbage were last searched for
        self._messages = self._deliveries = self.cuts = 0

    async def start(self, listeners: Iterable[socket.socket]) -> None:
        self._loop = asyncio.get_running_loop()
        self._loop.set_exception_handler(lambda _, context: self._report(context.get("exception")))
        for listener in listeners:
            self._servers.append(await self._loop.create_server(lambda: Conn(self), sock=listener, backlog=512))
        self._sweep()

    def _report(self, error: BaseException | None) -> None:
        if isinstance(error, OSError) and error.errno in OUT_OF_DESCRIPTORS:
            self._refusals["descriptors"] += 1
            if self._refusals["descriptors"] == 1:
                log.error("no file descriptors left, so new connections wait: raise the limit that ulimit -n shows")
        else:
            report_bug(error)

    async def stop(self) -> None:
        """Takes leave of everyone; whoever does not answer in time is dropped."""
        for server in self._servers:
            server.close()
        if self._sweeper is not None:
            self._sweeper.cancel()
        for conn in list(self._conns):
            conn.entered = False  # the rooms end with this process: nobody needs to be told who left
            if conn.state == OPEN:
                conn.close(CLOSE_GOING_AWAY, "relay is stopping")
            elif conn.state == HEAD:
                conn.abort()
        if self._conns:
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._empty.wait(), self.limits.close_seconds)
        for conn in self._conns:
            conn.abort()

    # ── asked by connections ─────────────────────────────────────────────────────────────────────────────────────────
    def admit(self, conn: Conn) -> bool:
        """Whether a new connection is listened to. Some are that will only be told why they cannot stay."""
        self._conns.add(conn)
        self._empty.clear()
        room = self._rooms.charge(self.limits.conn_bytes)
        if not is_trusted(conn.address, self._proxies):
            self._settle(conn, conn.address)
        over = max(self._beyond(), self._beyond_place(conn))
        if room and over <= self.limits.turned_away:
            return True
        self._turned_away(conn, "connections", "not listened to")
        return False

    def _turned_away(self, conn: Conn, reason: str, text: str) -> None:
        self._refusals[reason] += 1
        if self._log_addresses:
            log.info("turned away %s: %s", conn.address, text)

    def _settle(self, conn: Conn, address: str) -> None:
        conn.address, conn.place = address, place_of(address)
        if conn.place:
            self._places[conn.place] += 1

    def _beyond(self) -> int:
        return len(self._conns) - self.limits.connections

    def _beyond_place(self, conn: Conn) -> int:
        return self._places[conn.place] - self.limits.connections_an_address if conn.place else 0

    def too_many(self, conn: Conn, request: HttpRequest) -> PeerFault | None:
        """Why this connection cannot stay, known once its head says whom a proxy sends."""
        if not conn.place and is_trusted(conn.address, self._proxies):
            self._settle(conn, forwarded_for(request.fields.get("x-forwarded-for", ""), self._proxies) or conn.address)
        if self._beyond_place(conn) > 0:
            text = "too many connections come from your address"
        elif self._beyond() > 0:
            text = "this relay has as many connections as it may"
        else:
            return None
        self._turned_away(conn, "connections", text)
        return PeerFault("busy", text, self.limits.busy_retry_ms)

    def lost(self, conn: Conn) -> None:
        self._ended += 1
        self._conns.discard(conn)
        self._rooms.charge(-self.limits.conn_bytes)
        if conn.place:
            uncount(self._places, conn.place)
        self.depart(conn)
        if not self._conns:
            self._empty.set()

    def weigh(self, change: int) -> None:
        """Counts bytes that come and go."""
        self._held += change
        if change > 0 and self._held > self.limits.for_passage and not self._relieving:
            self._relieving = True  # a close frame that is not taken weighs something, too
            try:
                self._relieve()
            finally:
                self._relieving = False

    def later(self, seconds: float, action: Callable[[], None]) -> None:
        self._loop.call_later(seconds, action)

    def depart(self, conn: Conn) -> None:
        """Rooms hears of the end at its beginning: who is being cut is no longer there for the others."""
        if conn.entered:
            conn.entered = False
            self._transit(None, self._rooms.leave, conn)

    def report(self, conn: Conn, request: HttpRequest) -> bytes | None:
        """The answer to a request about the relay's health, which is this machine's business unless the operator says
        whose else it is. Whoever comes through a proxy of which nobody told is not on this machine."""
        if request.method not in ("GET", "HEAD") or request.path not in ("/healthz", "/metrics"):
            return None
        address = read_address(conn.address)
        passed_on = "x-forwarded-for" in request.fields and not self._proxies
        here = address is not None and address.is_loopback and not passed_on
        if not here and not is_trusted(conn.address, self._monitors):
            return respond_text(
                "403 Forbidden", "only this machine may ask; --monitor allows others", request.head_only
            )
        if request.path == "/healthz":
            return respond_text("200 OK", "ok", request.head_only)
        kind = "text/plain; version=0.0.4; charset=utf-8"
        return respond("200 OK", {"Content-Type": kind}, self._metrics().encode(), request.head_only)

    def _metrics(self) -> str:
        """Numbers without ids, as Prometheus reads them."""
        counts, cpu = self._rooms.counts(), time.process_time()
        gauges = {
            "connections": len(self._conns),
            "rooms": counts["rooms"],
            "bytes_held": counts["bytes"],
            "bytes_passing": self._held,
            "entries": counts["entries"],
            "files": counts["files"],
        }
        totals = {"messages": self._messages, "deliveries": self._deliveries, "cuts": self.cuts, "cpu_seconds": cpu}
        refusals = self._rooms.refusals + self._refusals
        lines = [f"# TYPE zsr_{name} gauge\nzsr_{name} {value}" for name, value in gauges.items()]
        lines += [f"# TYPE zsr_{name}_total counter\nzsr_{name}_total {value}" for name, value in totals.items()]
        lines += ["# TYPE zsr_refusals_total counter"]
        lines += [f'zsr_refusals_total{{reason="{reason}"}} {count}' for reason, count in sorted(refusals.items())]
        return "\n".join(lines) + "\n"

    def refusal(self, conn: Conn, request: HttpRequest) -> str:
        """Why this request opens no socket; nothing if it may."""
        text = self._wrong_origin(request)
        if text:
            self._turned_away(conn, "origin", text)
        return text

    def _wrong_origin(self, request: HttpRequest) -> str:
        origin = request.fields.get("origin")
        if origin is None:  # no browser: there is no page that could be lying in wait
            return ""
        if origin == "null":
            return "" if self._allow_null_origin else "a page opened from disk needs --allow-null-origin at the relay"
        schemes = ("https",) if self.context is not None else ("https", "http")
        if request.host and same_origin(origin, request.host, schemes):
            return ""
        return "the page is from another origin; a proxy must pass the Host field on"

    def enter(self, conn: Conn, room_path: str) -> None:
        self._transit(conn, functools.partial(self._rooms.enter, origin=conn.place), conn, room_path)

    def handle(self, conn: Conn, messages: list[bytes]) -> None:
        self._messages += len(messages)
        self._transit(conn, self._rooms.handle_all, conn, messages)

    # ── effects ──────────────────────────────────────────────────────────────────────────────────────────────────────
    def _transit(self, cause: Conn | None, transition: Callable[..., Effects], *arguments: object) -> None:
        """One transition of Rooms and what follows from it. A bug costs the connection that met it."""
        try:
            effects = transition(*arguments, self.now())
        except Exception as error:
            report_bug(error)
            if cause is not None:
                cause.cut(CLOSE_BUG, "relay failed")
            return
        for effect in effects:
            if isinstance(effect, Bulk):
                self._bulk(cast("Sequence[Conn]", effect.conns), effect.frame)
            elif isinstance(effect, Answer):
                self._answer(cast("Sequence[Conn]", effect.conns)[0], effect.frame)
            elif isinstance(effect, Send):
                self._send(cast("Sequence[Conn]", effect.conns), effect.frame, cause)
            elif isinstance(effect, Wait):
                cast(Conn, effect.conn).wait(effect.seconds)
            else:
                cast(Conn, effect.conn).close(effect.code, effect.reason)

    def _answer(self, conn: Conn, frame: bytes) -> None:
        """Keeps answers apart, so that in a busy room a member that posts still gets the same message as the others."""
        self._wake()
        conn.answers.append(len(frame).to_bytes(4, "big") + frame)
        conn.charge(len(frame))
        self._dirty.add(conn)

    def _bulk(self, conns: Sequence[Conn], frame: bytes) -> None:
        self._deliveries += len(conns)
        self._wake()
        for conn in conns:
            conn.post_bulk(frame)
            conn.charge(len(frame))  # within a window that each of them asked for
        self._dirty.update(conns)

    def _wake(self) -> None:
        if not self._dirty:
            self._loop.call_soon(self._flush)

    def _send(self, conns: Sequence[Conn], frame: bytes, cause: Conn | None) -> None:
        self._deliveries += len(conns)
        self._wake()
        if len(frame) >= self.limits.large_frame:
            for conn in conns:
                conn.post_large(frame)
        else:
            piece = len(frame).to_bytes(4, "big") + frame
            if len(conns) > 1 and (crowd := self._crowd(conns)):
                crowd.pieces.append(piece)
                return
            for conn in conns:
                conn.post(piece)
        if cause is not None and len(conns) == 1 and conns[0] is cause:
            cause.charge(len(frame))
        self._dirty.update(conns)

    def _crowd(self, conns: Sequence[Conn]) -> Crowd | None:
        """The crowd that these are in this tick; a member is in one, and the first that is needed is the largest."""
        if self._flushing:  # somebody is being cut: some of these have had their crowd's frames, others have not
            return None
        crowd = conns[0].crowd
        if crowd is not None:
            return crowd if crowd.conns is conns or crowd.conns == conns else None
        if any(conn.crowd for conn in conns):
            return None
        crowd = Crowd(conns)
        for conn in conns:
            conn.crowd = crowd
        self._dirty.update(conns)
        return crowd

    def _flush(self) -> None:
        dirty, self._dirty, self._flushing = self._dirty, set(), True
        for conn in dirty:
            conn.flush()
        self._flushing = False

    # ── time ─────────────────────────────────────────────────────────────────────────────────────────────────────────
    def _sweep(self) -> None:
        """A part of a tick's work: all of it at once would keep whoever says something waiting."""
        now = self.now()
        # Where this process was stopped, what peers said meanwhile could not be heard: that is no silence of theirs.
        away, self._swept = now - self._swept - 2 * self.limits.tick_seconds, now
        if away > 0:
            for conn in self._conns:
                conn.heard += away
        if self._look == 0:
            self._begin_tick()
        for conn in self._round[self._look :: LOOKS]:
            conn.begin_tick()
            self._examine(conn, now - conn.heard)
        self._look = (self._look + 1) % LOOKS
        self._transit(None, self._rooms.expire)
        self._sweeper = self._loop.call_later(self.limits.tick_seconds / LOOKS, self._sweep)

    def _begin_tick(self) -> None:
        self._round = list(self._conns)
        log.debug(
            "%d connections, %d messages in, %d frames out, %d cut",
            len(self._conns),
            self._messages,
            self._deliveries,
            self.cuts,
        )
        if self._ended > max(self.limits.collect_least, len(self._conns)):
            self._ended = 0
            gc.collect()

    def _examine(self, conn: Conn, quiet: float) -> None:
        if conn.state == OPEN and quiet > self.limits.silence:
            conn.cut(CLOSE_SILENT, "silent")
        elif conn.state == OPEN and quiet > self.limits.silence / 2 and not conn.pinged:
            conn.ping()
        elif quiet > self._patience.get(conn.state, quiet):
            conn.abort()

    def _relieve(self) -> None:
        """Cuts those that hold most of what comes and goes, until there is some place again."""
        over = self._held - self.limits.for_passage * self.limits.pressed_share
        for conn in sorted(self._conns, key=lambda each: each.held, reverse=True):
            if over <= 0:
                return
            over -= conn.held
            conn.cut(CLOSE_TOO_SLOW, "too slow")
            if conn.held:  # the transport keeps what it has, and this one does not take it
                conn.abort()


def report_bug(error: BaseException | None) -> None:
    """Logs where it happened and nothing of what: messages of exceptions may quote what peers sent."""
    places = traceback.extract_tb(error.__traceback__) if error else []
    log.error("bug: %s at %s", type(error).__name__, " ".join(f"{place.name}:{place.lineno}" for place in places))


# ════════════════════════════════════════════════════════════════════════════════════════════════════════════════════
# Command: options, start, signals, systemd. Names every other room, is named by none.
# ════════════════════════════════════════════════════════════════════════════════════════════════════════════════════
SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", re.IGNORECASE)
SPAN = re.compile(r"(\d+(?:\.\d+)?)\s*([smhd]?)", re.IGNORECASE)
HOST_NAME = re.compile(r"(?=.{1,253}\Z)[a-z0-9_]([a-z0-9_-]{0,62})(\.[a-z0-9_]([a-z0-9_-]{0,62}))*")
TRUE, FALSE = ("1", "true", "yes", "on"), ("", "0", "false", "no", "off")
LEVELS = ("debug", "info", "warning", "error")
LOOPS = ("auto", "asyncio", "uvloop")
ANYWHERE = "*"


def parse_size(text: str) -> int:
    found = SIZE.fullmatch(text.strip())
    size = int(float(found[1]) * 1024 ** " KMGT".index(found[2].upper() or " ")) if found else 0
    if size <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 64M or 1G")
    return size


def parse_span(text: str) -> float:
    found = SPAN.fullmatch(text.strip())
    seconds = float(found[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[found[2].lower() or "s"] if found else 0.0
    if seconds <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a time such as 90s, 30m, 72h or 7d")
    return seconds


def parse_port(text: str) -> int:
    if not (text.isascii() and text.isdigit()) or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port from 0 to 65535")
    return int(text)


def parse_name(text: str) -> str:
    """A host name or address as `new URL(...).hostname` spells it, IPv6 without its brackets."""
    name = text.strip().lower().removeprefix("[").removesuffix("]").removesuffix(".")
    if is_address(name):
        return str(ipaddress.ip_address(name))
    with suppress(UnicodeError):
        name = name.encode("idna").decode()
    if not HOST_NAME.fullmatch(name):
        raise argparse.ArgumentTypeError(f"{text!r} is not a host name or address: give it without https:// and port")
    return name


def parse_network(text: str) -> Network:
    try:
        return ipaddress.ip_network(text.strip().strip("[]"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not an address or network such as 10.0.0.0/8") from None


def parse_limit(text: str) -> tuple[str, float]:
    """A field of Limits and its new value, which is a size, a time or a number as the field is."""
    name, _, value = text.partition("=")
    name = name.strip().replace("-", "_")
    kinds = {field.name: type(field.default) for field in fields(Limits)}
    if name not in kinds:
        near = difflib.get_close_matches(name, kinds, 1)
        raise argparse.ArgumentTypeError(f"{text!r} names no limit" + (f"; is it {near[0]}?" if near else ""))
    number = parse_size(value) if kinds[name] is int else parse_span(value)
    if name.endswith("_share") and number >= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is a share: it must be below 1")
    return name, number


def parse_level(text: str) -> str:
    if text.lower() not in LEVELS:
        raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(LEVELS)}")
    return text.lower()


def parse_loop(text: str) -> str:
    if text.lower() not in LOOPS:
        raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(LOOPS)}")
    return text.lower()


def parse_switch(text: str) -> bool:
    if text.strip().lower() not in TRUE + FALSE:
        raise argparse.ArgumentTypeError(f"{text!r} is neither 1 nor 0")
    return text.strip().lower() in TRUE


class Parser(argparse.ArgumentParser):
    """Complains in one line."""

    def error(self, message: str) -> NoReturn:
        raise OperatorFault(f"{message} (--help lists the options)")


def human(size: int) -> str:
    return f"{size >> 30}G" if size % (1 << 30) == 0 else f"{size / (1 << 20):g}M"


def default_state_dir(environ: Mapping[str, str]) -> Path:
    """systemd's choice, else the usual place for a program's own state."""
    if "STATE_DIRECTORY" in environ:
        return Path(environ["STATE_DIRECTORY"].partition(":")[0])
    base = environ.get("XDG_STATE_HOME") or os.path.join(environ.get("HOME") or os.path.expanduser("~"), ".local/state")
    return Path(base, "zerosecretroom")


def make_parser(environ: Mapping[str, str]) -> Parser:
    """Every option, with what the environment says as its default."""
    parser = Parser(
        prog="zerosecretroom.py",
        description="The relay of end-to-end encrypted rooms.",
        allow_abbrev=False,
        epilog="Each option can also be set as ZSR_ and its name, such as ZSR_MAX_FILE=256M; the command line wins. "
        "Those that may be repeated take several values there, separated by commas.",
    )
    limits = Limits()

    def option(name: str, parse: Callable[[str], object], default: object, text: str) -> None:
        parser.add_argument(
            f"--{name}",
            type=parse,
            metavar=name.rpartition("-")[2].upper(),
            help=text,
            default=from_environment(environ, name, parse, default),
        )

    def switch(name: str, text: str) -> None:
        parser.add_argument(
            f"--{name}", action="store_true", help=text, default=from_environment(environ, name, parse_switch, False)
        )

    def several(name: str, parse: Callable[[str], object], metavar: str, text: str) -> None:
        variable = "ZSR_" + name.upper().replace("-", "_")
        given = [each for each in re.split(r"[,\s]+", environ.get(variable, "")) if each]
        default = [read_value(variable, parse, each) for each in given]
        parser.add_argument(f"--{name}", type=parse, action="append", metavar=metavar, help=text, default=default)

    option("host", str, None, "address to listen on (all; with --plain 127.0.0.1), or a Unix socket's path")
    option("port", parse_port, 8443, "port for page and socket (8443); 0 takes a free one")
    several("name", parse_name, "NAME", "host name or address under which people reach this relay; may be repeated")
    option("state-dir", Path, default_state_dir(environ), "where certificate and identity key are kept")
    option("cert", Path, None, "your own certificate chain, PEM")
    option("key", Path, None, "its key, PEM")
    switch("local-ca", "a CA of the relay's own, for phones that refuse a self-signed certificate; see /trust")
    option("page", Path, Path(__file__).resolve().with_name("index.html"), "the page (index.html beside this file)")
    option("ttl", parse_span, limits.ttl, f"how long undelivered messages are kept ({limits.ttl / 3600:g}h)")
    option("max-memory", parse_size, limits.max_memory, f"bytes held in all rooms ({human(limits.max_memory)})")
    option("max-room-memory", parse_size, None, f"bytes held for a room ({human(limits.max_room_memory)})")
    option("max-file", parse_size, None, f"largest file ({human(limits.max_file)})")
    several("limit", parse_limit, "NAME=VALUE", "any other number of the room Limits in this file; may be repeated")
    several(
        "trusted-proxy", parse_network, "ADDRESS", "proxy whose X-Forwarded-For counts, or a network; may be repeated"
    )
    switch("allow-null-origin", "let the page connect when opened from disk")
    switch("plain", "no TLS: on this machine only, or behind a proxy on it")
    several(
        "monitor", parse_network, "ADDRESS", "who may read /metrics and /healthz beside this machine; may be repeated"
    )
    switch("status", "show what the relay that runs here with the same options does, and start none")
    option("loop", parse_loop, "auto", "what waits for sockets: asyncio, uvloop, or uvloop if it is installed (auto)")
    switch("log-json", "log lines as JSON")
    switch("log-addresses", "log the addresses of those who are turned away")
    option("log-level", parse_level, "info", f"{', '.join(LEVELS)}; none shows texts, names or keys")
    parser.add_argument("--version", action="version", version=f"zerosecretroom {VERSION}")
    return parser


def from_environment(environ: Mapping[str, str], name: str, parse: Callable[[str], object], default: object) -> object:
    variable = "ZSR_" + name.upper().replace("-", "_")
    return read_value(variable, parse, environ[variable]) if environ.get(variable) else default


def read_value(variable: str, parse: Callable[[str], T], text: str) -> T:
    try:
        return parse(text)
    except argparse.ArgumentTypeError as error:
        raise OperatorFault(f"{variable}: {error}") from None


def read_limits(options: argparse.Namespace) -> Limits:
    """The limits as the operator set them; what was not set shrinks to fit."""
    limits = Limits()
    room = options.max_room_memory or min(limits.max_room_memory, options.max_memory)
    if room > options.max_memory:
        raise OperatorFault(f"--max-room-memory {human(room)} is above --max-memory {human(options.max_memory)}")
    most = int(room * limits.file_share)
    file = options.max_file or min(limits.max_file, most)
    if file > most:
        raise OperatorFault(f"--max-file {human(file)} does not fit a room's memory: raise --max-room-memory as well")
    limits = dataclasses.replace(
        limits, ttl=options.ttl, max_memory=options.max_memory, max_room_memory=room, max_file=file
    )
    return dataclasses.replace(limits, **dict(options.limit))


def read_options(argv: Sequence[str] | None, environ: Mapping[str, str]) -> argparse.Namespace:
    """What the operator wants, checked for contradictions. Raises OperatorFault."""
    options = make_parser(environ).parse_args(argv)
    options.limits = read_limits(options)
    if (options.cert is None) != (options.key is None):
        raise OperatorFault("--cert and --key go together: give both, or neither for a certificate of the relay's own")
    if options.plain and options.cert is not None:
        raise OperatorFault("--plain speaks no TLS: leave out --cert and --key, the proxy has them")
    if options.local_ca and (options.plain or options.cert is not None):
        other = "--plain speaks no TLS" if options.plain else "--cert brings a certificate that the CA would not sign"
        raise OperatorFault(f"--local-ca makes a certificate of the relay's own: {other}; leave out one of them")
    options.host = options.host or ("127.0.0.1" if options.plain else ANYWHERE)
    if options.plain and not is_loopback(options.host) and not is_path(options.host):
        raise OperatorFault(f"--plain on {options.host} would send everything unencrypted: use --host 127.0.0.1")
    if is_path(options.host) and not options.plain:
        raise OperatorFault(
            f"--host {options.host} is a Unix socket, for a proxy that has the certificate: add --plain"
        )
    return options


def is_loopback(host: str) -> bool:
    return host == "localhost" or (is_address(host) and ipaddress.ip_address(host).is_loopback)


# ── addresses and sockets ────────────────────────────────────────────────────────────────────────────────────────────
def own_addresses() -> list[str]:
    """This machine's lasting addresses, the one towards other networks first; loopback left out."""
    found: list[str] = []
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # sends nothing: it asks which address would be used
        found.append(str(probe.getsockname()[0]))
    if sys.platform == "linux":
        found += interface_addresses()
    return [each for each in dict.fromkeys(found) if not ipaddress.ip_address(each).is_loopback]


def interface_addresses() -> Iterator[str]:
    """Linux: IPv4 of each interface, then global IPv6 but for the temporary ones, which change by the day."""
    import fcntl  # not on every system

    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # a service may be denied both
        for _, name in socket.if_nameindex():
            with suppress(OSError):  # an interface without an address
                reply = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, struct.pack("256s", name.encode()))
                yield socket.inet_ntoa(reply[20:24])
    with suppress(OSError):
        for line in Path("/proc/net/if_inet6").read_text().splitlines():
            digits, _, _, scope, flags, _ = line.split()
            if scope == "00" and not int(flags, 16) & IFA_F_TEMPORARY:
                yield str(ipaddress.IPv6Address(bytes.fromhex(digits)))


SIOCGIFADDR, IFA_F_TEMPORARY = 0x8915, 0x01


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; on all addresses it takes IPv4 and IPv6 alike, and a path is a Unix socket."""
    try:
        if is_path(host):
            return listen_at(Path(host))
        if host == ANYWHERE and socket.has_dualstack_ipv6():
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=512)
        where = "0.0.0.0" if host == ANYWHERE else host
        family = socket.getaddrinfo(where, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((where, port), family=family, backlog=512)
    except OSError as error:
        remedy = {
            errno.EADDRINUSE: "another program has it; choose another --port",
            errno.EACCES: "ports below 1024 need root, or a systemd socket; choose another --port",
        }
        where = host if is_path(host) else f"{host} port {port}"
        raise OperatorFault(
            f"cannot listen on {where}: {remedy.get(error.errno or 0, error.strerror or str(error))}"
        ) from None


def is_path(host: str) -> bool:
    return host.startswith("/")


def listen_at(path: Path) -> socket.socket:
    """A Unix socket for the relay's user and group. One that a relay left behind is replaced; one in use is not."""
    listener = socket.socket(socket.AF_UNIX)
    if path.is_socket():
        with closing(socket.socket(socket.AF_UNIX)) as probe:
            if probe.connect_ex(str(path)) == 0:
                raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
        path.unlink()
    listener.bind(str(path))
    path.chmod(0o660)
    listener.listen(512)
    return listener


def passed_sockets(environ: Mapping[str, str]) -> list[socket.socket]:
    """The listening sockets that systemd handed over, from descriptor 3 on."""
    if environ.get("LISTEN_PID") != str(os.getpid()):
        return []
    try:
        return [socket.socket(fileno=3 + each) for each in range(int(environ.get("LISTEN_FDS", "0")))]
    except (ValueError, OSError) as error:
        raise OperatorFault(f"the sockets that systemd passed are of no use ({error}): see LISTEN_FDS") from None


def is_local_only(listener: socket.socket) -> bool:
    return listener.family == getattr(socket, "AF_UNIX", None) or is_loopback(listener.getsockname()[0])


def notify(environ: Mapping[str, str], state: str) -> None:
    """Tells systemd, if it asked to be told."""
    address = environ.get("NOTIFY_SOCKET", "")
    if address:
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as messenger:
            messenger.connect("\0" + address[1:] if address.startswith("@") else address)
            messenger.sendall(state.encode())


def within_file_limit(limits: Limits) -> Limits:
    """A connection is a descriptor, and many systems give 1,024 unless asked. Where there are fewer than connections
    are allowed, those who come too late are told so instead of waiting."""
    with suppress(ImportError, OSError, ValueError):
        import resource  # not on every system

        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        if hard != resource.RLIM_INFINITY:
            most = hard - limits.other_files - limits.turned_away
            return dataclasses.replace(limits, connections=max(1, min(limits.connections, most)))
    return limits


# ── start ────────────────────────────────────────────────────────────────────────────────────────────────────────────
def in_url(name: str) -> str:
    return f"[{name}]" if ":" in name else name


def utc_now() -> datetime.datetime:
    return datetime.datetime.now(datetime.timezone.utc)


Stamps = tuple[tuple[int, int, int], ...]


def stamps(options: argparse.Namespace) -> Stamps:
    """What tells whether the operator's files are still the same: inode, time and size of each that is there."""
    found = []
    for path in (options.cert, options.key):
        with suppress(OSError, TypeError):  # it is being replaced, or none was named
            status = os.stat(path)
            found.append((status.st_ino, status.st_mtime_ns, status.st_size))
    return tuple(found)


class Credentials(NamedTuple):
    """What new connections are shown, nothing where no TLS is spoken; `files` as stamped before the reading."""

    files: Stamps = ()
    context: ssl.SSLContext | None = None
    leaf: x509.Certificate | None = None
    authority: x509.Certificate | None = None


def load_credentials(options: argparse.Namespace) -> Credentials:
    """The operator's certificate, or the relay's own, made anew where it no longer serves."""
    if options.plain:
        return Credentials()
    if options.cert is not None:
        files = stamps(options)
        return Credentials(files, tls_context(options.cert, options.key), load_certificate(options.cert))
    state, now = options.state_dir, utc_now()
    names = own_names(options)
    authority = load_authority(options, names, now) if options.local_ca else None
    if authority is not None:
        names &= constrained_names(authority.certificate)
    leaf = load_or_make_certificate(state, names, now, authority)
    # The leaf alone, also under a local CA: a device has that one installed, and believes none that is sent along.
    context = tls_context(state / TLS_CERT, state / TLS_KEY)
    return Credentials((), context, leaf, authority.certificate if authority is not None else None)


def named_by_operator(options: argparse.Namespace) -> frozenset[str]:
    host = {str(ipaddress.ip_address(options.host))} if is_address(options.host) else set()
    return frozenset(host.union(options.name))


def own_names(options: argparse.Namespace) -> frozenset[str]:
    """All that a certificate of the relay's own is for."""
    return LOOPBACK | named_by_operator(options) | frozenset(own_addresses())


def load_authority(options: argparse.Namespace, names: frozenset[str], now: datetime.datetime) -> Authority:
    """The local CA. Where the operator named something, addresses that come and go are no reason for another one."""
    needed = LOOPBACK | named_by_operator(options) if options.name else names
    authority = load_or_make_authority(options.state_dir, needed, names, now)
    if authority.replaced:
        log.warning("the local CA was made anew, for new names or its age: phones must install it again from /trust")
    return authority


def trust_in(options: argparse.Namespace, credentials: Credentials) -> Trust:
    """What /trust tells of these."""
    if credentials.leaf is None:
        return Trust(PROXY)
    authority = credentials.authority
    own = LOCAL_CA if authority is not None else SELF_SIGNED
    return Trust(
        BROUGHT if options.cert is not None else own,
        fingerprint(credentials.leaf),
        credentials.leaf.not_valid_after_utc.date().isoformat(),
        authority.public_bytes(serialization.Encoding.DER) if authority is not None else b"",
    )


def known_names(options: argparse.Namespace, certificate: x509.Certificate | None) -> frozenset[str]:
    """Hosts under which a login counts, as URLs spell them; none means any. A certificate with a wildcard is for more
    hosts than it lists, so --name alone tells them."""
    given = certificate if options.cert is not None else None
    own = frozenset() if given is None or has_wildcard(given) else certificate_names(given)
    return frozenset(in_url(name) for name in own | set(options.name))


def addresses(options: argparse.Namespace, listener: socket.socket) -> list[str]:
    """Where the page can be opened, the best one first."""
    if listener.family == getattr(socket, "AF_UNIX", None):
        return [f"https://{in_url(name)}/" for name in options.name]
    port = listener.getsockname()[1]
    scheme, default = ("http", 80) if options.plain else ("https", 443)
    hosts = [*options.name, *(own_addresses() if options.host == ANYWHERE else [options.host])]
    hosts += ["localhost"] if options.host == ANYWHERE or is_loopback(options.host) else []
    return [f"{scheme}://{in_url(host)}{'' if port == default else f':{port}'}/" for host in dict.fromkeys(hosts)]


def announcement(urls: Sequence[str], page: Page, credentials: Credentials, names: frozenset[str], own: bool) -> str:
    """What the operator wants to read at the start; `own` where the certificate is of the relay's making."""
    lines = [f"ZeroSecretRoom {VERSION}"] + [f"  open         {url}" for url in urls]
    lines += [f"  demo room    {url}#aaa (public: anyone can read it)" for url in urls[:1]]
    if credentials.leaf is not None:
        lines.append(f"  certificate  SHA-256 {fingerprint(credentials.leaf)}")
    if credentials.authority is not None:
        lines.append("               of a local CA: devices warn until they trust it; compare this before they do")
        lines.append(f"  local CA     SHA-256 {fingerprint(credentials.authority)}")
    elif own:
        lines.append("               self-signed: browsers warn once; compare this before you go on")
    if own:
        lines += [f"  trust        {url}trust explains it, device by device" for url in urls[:1]]
    lines.append(f"  page         SHA-256 {page.sha256}")
    if not names:
        lines.append("  note         no names are known, so logins meant for any host are taken; --name HOST closes")
        lines.append("               the attack in which another server forwards your members' logins to this one")
    return "\n".join(lines)


class Upkeep:
    """Keeps what new connections are shown in step with the operator's files and the calendar. Open ones live on."""

    def __init__(self, options: argparse.Namespace, rooms: Rooms, link: Link, credentials: Credentials) -> None:
        self._options, self._rooms, self._link = options, rooms, link
        self._tried = self._seen = credentials.files
        self._renewal = self._due(credentials)

    def run(self) -> None:
        """Looks now and again until the loop ends."""
        asyncio.get_running_loop().call_later(self._options.limits.upkeep_seconds, self.run)
        self.look()

    def look(self) -> None:
        """Reloads when the time has come, and when files changed and then rested: a pair is not copied at once."""
        before, self._seen = self._seen, stamps(self._options)
        changed = before == self._seen != self._tried
        if changed or (self._renewal is not None and utc_now() >= self._renewal):
            self.reload()

    def reload(self) -> None:
        """New connections get the certificate that now lies on disk; one that does not load changes nothing."""
        self._tried = stamps(self._options)
        try:
            credentials = load_credentials(self._options)
        except OperatorFault as fault:
            log.error("certificate not reloaded: %s", fault)
            self._renewal = self._renewal and utc_now() + datetime.timedelta(seconds=self._options.limits.renewal_retry)
            return
        self._show(credentials)
        log.info("certificate reloaded")

    def _show(self, credentials: Credentials) -> None:
        page = self._link.page.with_trust(trust_in(self._options, credentials))
        names = known_names(self._options, credentials.leaf)
        self._link.page, self._link.context, self._rooms.names = page, credentials.context, names
        self._tried, self._renewal = credentials.files, self._due(credentials)

    def _due(self, credentials: Credentials) -> datetime.datetime | None:
        """When the relay's own certificate has to be made anew; the operator's is for the operator to renew."""
        if credentials.leaf is None or self._options.cert is not None:
            return None
        return renewal_time(credentials.leaf)


async def serve(
    upkeep: Upkeep, link: Link, listeners: Sequence[socket.socket], environ: Mapping[str, str], told: str
) -> None:
    """Runs until SIGTERM or SIGINT; prints `told` when signals and requests are heeded."""
    loop, stopping = asyncio.get_running_loop(), asyncio.Event()

    def on(name: str, action: Callable[[], None]) -> None:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), lambda *_: loop.call_soon_threadsafe(action))

    await link.start(listeners)
    on("SIGTERM", stopping.set)
    on("SIGINT", stopping.set)
    on("SIGHUP", upkeep.reload)
    upkeep.run()
    print(told, flush=True)
    notify(environ, "READY=1")
    await stopping.wait()
    notify(environ, "STOPPING=1")
    await link.stop()


def make_loop(name: str) -> asyncio.AbstractEventLoop:
    """uvloop is quicker where there is little to do at a time; nothing else depends on it. Raises OperatorFault."""
    try:
        new = asyncio.new_event_loop if name == "asyncio" else importlib.import_module("uvloop").new_event_loop
    except ImportError as error:
        if name == "uvloop":
            raise OperatorFault(f"--loop uvloop: {error}: pip install uvloop, or leave the option out") from None
        new = asyncio.new_event_loop
    return cast(asyncio.AbstractEventLoop, new())


def settle_memory() -> None:
    """Leaves what lives from now on to Link where cycles of garbage are searched for among all objects: Python does so
    whenever there are a quarter more, which with 10,000 connections takes 0.3 s, and nobody is answered meanwhile. The
    young ones, where exceptions leave theirs, it goes on searching by itself."""
    gc.collect()
    gc.freeze()  # modules stay
    young, middle, _ = gc.get_threshold()
    gc.set_threshold(young, middle, 2**31 - 1)


def run(options: argparse.Namespace, environ: Mapping[str, str]) -> None:
    page = Page.load(options.page)
    identity = RelayIdentity(load_or_make_key(open_state(options.state_dir) / IDENTITY_KEY))
    credentials = load_credentials(options)
    names = known_names(options, credentials.leaf)
    listeners = passed_sockets(environ) or [listen(options.host, options.port)]
    if options.plain and not all(map(is_local_only, listeners)):
        raise OperatorFault("--plain on a socket that other machines reach would send everything unencrypted")
    options.limits = within_file_limit(options.limits)
    own = credentials.leaf is not None and options.cert is None
    told = announcement(addresses(options, listeners[0]), page, credentials, names, own)
    rooms = Rooms(options.limits, identity, os.urandom(16), names, os.urandom, lambda: time.time_ns() // 1_000_000)

    async def start() -> None:
        shown = page.with_trust(trust_in(options, credentials))
        limits, null = options.limits, options.allow_null_origin
        asked = (options.trusted_proxy, options.monitor, options.log_addresses)
        link = Link(rooms, shown, limits, credentials.context, null, *asked)
        await serve(Upkeep(options, rooms, link, credentials), link, listeners, environ, told)

    settle_memory()
    with closing(make_loop(options.loop)) as loop:
        loop.run_until_complete(start())


# ── being watched ────────────────────────────────────────────────────────────────────────────────────────────────────
class JsonLines(logging.Formatter):
    """A log record as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        at = datetime.datetime.fromtimestamp(record.created, datetime.timezone.utc)
        said = {"time": at.isoformat(timespec="milliseconds"), "level": record.levelname.lower()}
        return json.dumps({**said, "message": record.getMessage()})


def begin_log(options: argparse.Namespace) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines() if options.log_json else logging.Formatter("%(levelname)s %(message)s"))
    logging.basicConfig(level=options.log_level.upper(), handlers=[handler])


def read_metrics(options: argparse.Namespace) -> dict[str, float]:
    """What the relay on this machine counts; refusals are added up. Raises OperatorFault where none answers."""
    host = "127.0.0.1" if options.host == ANYWHERE else options.host
    # whose certificate it is does not matter: nothing is told to it, and it is on this machine
    asked: http.client.HTTPConnection = (
        http.client.HTTPConnection(host, options.port, timeout=5)
        if options.plain
        else http.client.HTTPSConnection(host, options.port, timeout=5, context=ssl._create_unverified_context())
    )
    found: dict[str, float] = {}
    try:
        with closing(asked):
            asked.request("GET", "/metrics")
            for line in asked.getresponse().read().decode().splitlines():
                name, _, value = line.rpartition(" ")
                name = name.partition("{")[0].removeprefix("zsr_")
                if not line.startswith("#"):
                    found[name] = found.get(name, 0.0) + float(value)
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise OperatorFault(f"no relay answers at {host} port {options.port} ({error}): give its --port") from None
    return found


def status_line(before: Mapping[str, float], after: Mapping[str, float], seconds: float) -> str:
    """The present numbers, and what happened a second since those before."""

    def pace(name: str) -> float:
        return (after[name] - before[name]) / seconds

    return (
        f"connections {after['connections']:.0f}  rooms {after['rooms']:.0f}  "
        f"held {after['bytes_held'] / (1 << 20):.1f}M  passing {after['bytes_passing'] / (1 << 20):.1f}M  "
        f"deliveries {pace('deliveries_total'):.0f}/s  refusals {after.get('refusals_total', 0):.0f}  "
        f"CPU {pace('cpu_seconds_total'):.0%}"
    )


def show_status(options: argparse.Namespace) -> None:
    """One line, renewed each second on a terminal and else printed once."""
    live, before, at = sys.stdout.isatty(), read_metrics(options), time.monotonic()
    with suppress(KeyboardInterrupt):
        while True:
            time.sleep(1)
            after, now = read_metrics(options), time.monotonic()
            print(
                ("\r\033[K" if live else "") + status_line(before, after, now - at),
                end="" if live else "\n",
                flush=True,
            )
            before, at = after, now
            if not live:
                return
    print()


def main(argv: Sequence[str] | None = None) -> int:
    try:
        options = read_options(argv, os.environ)
        begin_log(options)
        if options.status:
            show_status(options)
        else:
            run(options, os.environ)
    except OperatorFault as fault:
        print(f"zerosecretroom: {fault}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
