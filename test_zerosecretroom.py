"""Tests of ZeroSecretRoom, from the rules of the house up to people in real browsers.

Sections, each only leaning on earlier ones:

    harness         paths, blocks of the page, polling, media files, one way of using three browser engines
    relay process   a real relay on a free port: start, kill, restart
    node            the page's pure blocks in one node process, driven from here
    house rules     what both files must look like, so that no rule of the house is only a wish
    wire            bytes in both languages, against each other
    suite           published vectors, named outcomes, an independent oracle
    relay           its transitions, and a state machine against a model
    room            every state and event of the client's room
    talk            conversations of pure clients with loss, doubling and tampering
    messages        answers, edits, deletions, reactions, votes: the same for all in whatever order they come
    vault           the passphrase, the lock, export and import, and what a thief of the disk can do
    socket          real TLS sockets, limits, slow readers, restarts, secrecy
    load            limits, hostile bytes, faults, chaos, many relays behind nginx and HAProxy
    browser         two people doing the whole main job in Chromium, Firefox and WebKitGTK
    install         both installers, as text and in booted containers: install, upgrade, roll back, certificates
    bench           ratios against the plainest thing that does the same

`bash .ci/test` installs what they need and runs them; marks: browser, install, and bench, fuzz and distributions (these
three only with `-m`).
"""

from __future__ import annotations

import abc
import ast
import asyncio
import base64
import contextlib
import copy
import datetime
import email.utils
import fcntl
import functools
import gc
import glob
import gzip
import hashlib
import hmac
import html
import http.client
import http.server
import io
import ipaddress
import itertools
import json
import os
import plistlib
import random
import re
import select
import shutil
import signal
import socket
import ssl
import stat
import statistics
import struct
import subprocess
import symtable
import sys
import tempfile
import textwrap
import threading
import time
import tokenize
import tracemalloc
import urllib.error
import urllib.request
import uuid
import wave
import weakref
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Protocol, TypeVar, cast

import cryptography_vectors
import playwright.sync_api as pw
import pytest
import tink  # type: ignore[import-untyped]
import websockets.exceptions
import websockets.sync.server
import zxingcpp
from cryptography import x509
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, utils
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand
from cryptography.x509 import verification
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from pbs_installer import get_download_link
from PIL import Image, ImageDraw
from pyhpke import AEADId, CipherSuite, KDFId, KEMId, KEMKey
from pyhpke.exceptions import OpenError
from tink import secret_key_access, streaming_aead
from tink.proto import aes_gcm_hkdf_streaming_pb2, common_pb2, tink_pb2  # type: ignore[import-untyped]
from websockets.asyncio.client import connect as connect_client
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.frames import Frame, Opcode
from websockets.server import ServerProtocol
from websockets.sync.client import ClientConnection
from websockets.sync.client import connect as connect_socket

import zerosecretroom as zsr

# ══════════════════════════════════════════════════════════════════════════════════════════════════════════════════════
# Harness: what every section may use. Knows the files and the browsers, nothing of rooms or of the protocol.
# ══════════════════════════════════════════════════════════════════════════════════════════════════════════════════════

ROOT = Path(__file__).resolve().parent
PAGE = ROOT / "index.html"
RELAY = ROOT / "zerosecretroom.py"
README = ROOT / "README.md"
NODE_MODULES = ROOT / ".ci" / "node_modules"

T = TypeVar("T")
PATIENCE = 45.0
"""Seconds until a state that should come is given up: far more than it takes, on a machine that has other work too."""


def blocks(html: str) -> dict[str, str]:
    """The script blocks of the page by their id, in order."""
    return dict(re.findall(r'<script id="(room-[^"]+)">(.*?)</script>', html, re.DOTALL))


def eventually(probe: Callable[[], T], what: str = "", timeout: float = PATIENCE) -> T:
    """The first truthy answer of `probe`; an assertion that fails inside it counts as "not yet". It is asked ever less
    often: each question costs a browser the time in which it could do what is waited for."""
    end, last, pause = time.monotonic() + timeout, "nothing", 0.02
    while True:
        try:
            if answer := probe():
                return answer
            last = repr(answer)
        except AssertionError as error:
            last = str(error)
        if time.monotonic() > end:
            raise AssertionError(f"not within {timeout:g} s: {what or probe}; last seen: {last[:2000]}")
        time.sleep(pause)
        pause = min(1.5 * pause, 0.25)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


# ------------------------------------------------------------------------------------------------------------- media --


class Media:
    """Small real files of every kind people send, made when first asked for."""

    LINES = "First line\nsecond line, with ümlaut and 漢字\n"
    PDF = (
        b"%PDF-1.4\n1 0 obj<</Type/Catalog/Pages 2 0 R>>endobj\n2 0 obj<</Type/Pages/Kids[3 0 R]/Count 1>>endobj\n"
        b"3 0 obj<</Type/Page/Parent 2 0 R/MediaBox[0 0 99 99]>>endobj\ntrailer<</Root 1 0 R>>\n%%EOF\n"
    )

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __getitem__(self, name: str) -> Path:
        path = self.folder / name
        if not path.exists():
            self._make(path)
        return path

    def _make(self, path: Path) -> None:
        match path.suffix:
            case ".jpg" | ".png" | ".webp":
                self._picture(640, 400, path.stem).save(path)
            case ".gif":
                first, *rest = [self._picture(120, 80, f"{path.stem}{n}") for n in range(3)]
                first.save(path, save_all=True, append_images=rest, duration=200, loop=0)
            case ".mp4" | ".webm" | ".mkv" | ".mp3" | ".ogg" | ".wav":
                self._film_or_sound(path)
            case ".pdf":
                path.write_bytes(self.PDF)
            case ".zip":
                with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
                    archive.writestr("inside.txt", self.LINES)
            case _:
                path.write_text(self.LINES, encoding="utf-8")

    @staticmethod
    def _picture(width: int, height: int, caption: str) -> Image.Image:
        picture = Image.linear_gradient("L").resize((width, height)).convert("RGB")
        draw = ImageDraw.Draw(picture)
        draw.ellipse((width * 0.3, height * 0.2, width * 0.7, height * 0.8), outline=(0, 160, 150), width=9)
        draw.text((8, 8), caption, fill=(255, 200, 0))
        return picture

    @staticmethod
    def _film_or_sound(path: Path) -> None:
        film = ["-f", "lavfi", "-i", "testsrc=size=160x120:rate=10:duration=1"]
        sound = ["-f", "lavfi", "-i", "sine=frequency=440:duration=1"]
        codecs = {
            ".mp4": [*film, *sound, "-c:v", "libx264", "-pix_fmt", "yuv420p", "-c:a", "aac", "-movflags", "+faststart"],
            ".webm": [*film, *sound, "-c:v", "libvpx", "-c:a", "libopus"],
            ".mkv": [*film, *sound, "-c:v", "libvpx", "-c:a", "libopus"],
        }
        command = ["ffmpeg", "-v", "error", "-nostdin", *codecs.get(path.suffix, sound), str(path)]
        subprocess.run(command, check=True, timeout=60)


@pytest.fixture(scope="session")
def media(tmp_path_factory: pytest.TempPathFactory) -> Media:
    return Media(tmp_path_factory.mktemp("media"))


# ----------------------------------------------------------------------------------------------------------- engines --
# One way of using three engines: Engine.user() -> User, User.find(role, name) -> Spot. A Spot is looked up anew at each
# use and waits until it can be used; roles and names are those the engine (WebKit) or Playwright computes, so that what
# a screen reader meets is what is tested.

Name = str | re.Pattern[str]
PHONE = (390, 844)
LAPTOP = (1280, 800)
NETWORK_CHANGED = "net::ERR_NETWORK_CHANGED"  # what Chromium had under way when another test's machine was plugged in
NETWORK_NOISE = r"WebSocket|wss://|net::ERR_|NetworkError|Failed to load resource"
"""What browsers themselves log when a relay is away; no page can prevent it."""

WATCH_SCRIPT = """
if (!window.testErrors) {
  window.testErrors = [...(window.zsrErrors ?? [])].map(String);
  const note = (kind) => (...what) => window.testErrors.push(`${kind}: ${what.map(String).join(' ')}`);
  for (const kind of ['error', 'warn']) console[kind] = note(kind);
  addEventListener('error', (e) => note('thrown')(e.message));
  addEventListener('unhandledrejection', (e) => note('rejected')(e.reason));
  addEventListener('securitypolicyviolation', (e) => note('policy')(e.violatedDirective, e.blockedURI));
}
"""


class Spot(abc.ABC):
    """The elements that have a role and a name (or match a selector) below another spot, at the moment of each use."""

    @abc.abstractmethod
    def find(self, role: str, name: Name | None = None, *, level: int | None = None) -> Spot: ...

    @abc.abstractmethod
    def css(self, selector: str) -> Spot: ...

    @abc.abstractmethod
    def nth(self, index: int) -> Spot: ...

    @abc.abstractmethod
    def count(self) -> int:
        """How many are on the page and shown now; does not wait."""

    @abc.abstractmethod
    def js(self, function: str) -> Any:
        """What a JavaScript function answers for the one element."""

    @abc.abstractmethod
    def click(self) -> None: ...

    @abc.abstractmethod
    def fill(self, text: str) -> None: ...

    @abc.abstractmethod
    def press(self, keys: str) -> None:
        """One key, with modifiers before it: "Shift+Enter"."""

    @abc.abstractmethod
    def upload(self, *paths: Path) -> None: ...

    @abc.abstractmethod
    def shot(self, path: Path) -> Path: ...

    def text(self) -> str:
        return str(self.js("(e) => e.innerText"))

    def texts(self) -> list[str]:
        return [self.nth(index).text() for index in range(self.count())]

    def value(self) -> str:
        return str(self.js("(e) => e.value"))

    def attribute(self, name: str) -> str | None:
        answer: str | None = self.js(f"(e) => e.getAttribute({json.dumps(name)})")
        return answer

    def appears(self, timeout: float = PATIENCE) -> Spot:
        eventually(self.count, f"{self} appears", timeout)
        return self

    def vanishes(self, timeout: float = PATIENCE) -> None:
        eventually(lambda: not self.count(), f"{self} vanishes", timeout)

    def says(self, what: str, timeout: float = PATIENCE) -> None:
        """Waits until the text contains `what`; line breaks count as spaces."""

        def said() -> bool:
            assert self.count(), "nothing there"
            text = " ".join(self.text().split())
            assert what in text, text
            return True

        eventually(said, f"{self} says {what!r}", timeout)


class User(abc.ABC):
    """One person: a browser profile of its own with one page."""

    engine: str
    excuses: list[str]

    @property
    @abc.abstractmethod
    def page(self) -> Spot: ...

    @abc.abstractmethod
    def goto(self, url: str) -> None: ...

    @abc.abstractmethod
    def reload(self) -> None: ...

    @abc.abstractmethod
    def add_tab(self) -> None:
        """One more tab in the same profile; from now on this one is used."""

    @abc.abstractmethod
    def use_tab(self, number: int) -> None: ...

    @abc.abstractmethod
    def js(self, expression: str) -> Any:
        """What an expression is worth in the page; a promise is awaited. The page's CSP does not stop it."""

    @abc.abstractmethod
    def press(self, keys: str) -> None:
        """One key to whatever has the focus."""

    @abc.abstractmethod
    def size(self, width: int, height: int) -> None: ...

    @abc.abstractmethod
    def shot(self, path: Path) -> Path: ...

    @abc.abstractmethod
    def logged(self) -> list[str]:
        """Errors and warnings of the console and of the page so far."""

    @abc.abstractmethod
    def another_tab(self) -> User:
        """One more page of the same profile; errors of both are counted together."""

    @abc.abstractmethod
    def close(self) -> None: ...

    def find(self, role: str, name: Name | None = None, *, level: int | None = None) -> Spot:
        return self.page.find(role, name, level=level)

    def css(self, selector: str) -> Spot:
        return self.page.css(selector)

    def click(self, role: str, name: Name | None = None) -> None:
        self.find(role, name).click()

    def fill(self, name: Name, text: str) -> None:
        self.find("textbox", name).fill(text)

    def upload(self, *paths: Path) -> None:
        self.css('input[type="file"]').upload(*paths)

    def text_of_page(self) -> str:
        return str(self.js("document.body.innerText"))

    def wait(self, expression: str, timeout: float = PATIENCE) -> Any:
        return eventually(lambda: self.js(expression), expression, timeout)

    def excuse(self, pattern: str = NETWORK_NOISE) -> None:
        """From now on this is expected in the console (a relay that a test kills is noticed by the browser)."""
        self.excuses.append(pattern)

    @property
    def errors(self) -> list[str]:
        excuses = [*self.excuses, NETWORK_CHANGED]
        return [line for line in self.logged() if not any(re.search(pattern, line) for pattern in excuses)]


class Engine(abc.ABC):
    name: str

    @abc.abstractmethod
    def user(self, size: tuple[int, int] = LAPTOP) -> User: ...

    @abc.abstractmethod
    def close(self) -> None: ...


# Chromium and Firefox: Playwright on the system's own builds. ---------------------------------------------------------

CHROMIUM_WITHOUT = (
    # the drop-down of the address bar is two pages of Chromium's own in a process of its own, for each window
    "WebUIOmniboxPopup",
    "WebUIOmniboxAimPopup",
    # what Playwright leaves out itself: of two lists Chromium heeds the last
    "AvoidUnnecessaryBeforeUnloadCheckSync",
    "DestroyProfileOnBrowserClose",
    "DialMediaRouteProvider",
    "GlobalMediaControls",
    "HttpsUpgrades",
    "MediaRouter",
    "NetworkTimeServiceQuerying",
    "OptimizationHints",
    "PaintHolding",
    "ThirdPartyStoragePartitioning",
    "Translate",
)
CHROMIUM_ARGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    f"--disable-features={','.join(CHROMIUM_WITHOUT)}",
]
FIREFOX_PREFERENCES: dict[str, str | float | bool] = {"layout.frame_rate": 20}
"""Without a graphics card each picture is drawn on the processor."""


class PlaywrightEngine(Engine):
    """Runs in a thread of its own: Playwright leaves an event loop running, and other tests want asyncio.run."""

    def __init__(self, name: str, downloads: Path) -> None:
        self.name, self.downloads = name, downloads
        self.thread = ThreadPoolExecutor(1, f"playwright-{name}")
        self.driver: pw.Playwright = self.do(lambda: pw.sync_playwright().start())
        self.browser: pw.Browser = self.do(self._launch)

    def do(self, action: Callable[[], T]) -> T:
        return self.thread.submit(action).result()

    def _launch(self) -> pw.Browser:
        if self.name == "firefox":
            return self.driver.firefox.launch(
                executable_path=program("firefox-esr", "firefox"),
                channel="moz-firefox",
                firefox_user_prefs=FIREFOX_PREFERENCES,
            )
        return self.driver.chromium.launch(
            executable_path=program("chromium", "chromium-browser"),
            args=CHROMIUM_ARGS,
            downloads_path=self.downloads,
        )

    def user(self, size: tuple[int, int] = LAPTOP) -> PlaywrightUser:
        return PlaywrightUser(self, size)

    def close(self) -> None:
        self.do(self.browser.close)
        self.do(self.driver.stop)
        self.thread.shutdown()


class PlaywrightUser(User):
    def __init__(self, engine: PlaywrightEngine, size: tuple[int, int]) -> None:
        self.engine, self.do, self.excuses, self.log = engine.name, engine.do, [], list[str]()
        phone = {"is_mobile": True, "has_touch": True} if engine.name == "chromium" and size[0] < 720 else {}
        viewport: Any = {"width": size[0], "height": size[1]}
        calm = {"ignore_https_errors": True, "locale": "en-GB", "reduced_motion": "reduce"}
        options: dict[str, Any] = {"viewport": viewport, **calm, **phone}
        self.context = self.do(lambda: self.enter(engine, options))
        self.tab = self.do(self._open)
        self.tabs = [self.tab]

    def enter(self, engine: PlaywrightEngine, options: dict[str, Any]) -> pw.BrowserContext:
        return engine.browser.new_context(**options)

    def _open(self) -> pw.Page:
        self.context.set_default_timeout(PATIENCE * 1000)
        tab = self.context.new_page()
        tab.on("pageerror", lambda error: self.log.append(f"thrown: {error}"))
        tab.on("console", self._heard)
        return tab

    def _heard(self, message: pw.ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.log.append(f"{message.type}: {message.text}")

    @property
    def page(self) -> Spot:
        return PlaywrightSpot(self, self.tab.locator(":root"), "the page")

    def goto(self, url: str) -> None:
        self.load(lambda: self.tab.goto(url))

    def reload(self) -> None:
        self.load(self.tab.reload)

    def load(self, begin: Callable[[], object]) -> None:
        """Once more where the machine got an address meanwhile, as the browser itself does that shows the error."""
        try:
            self.do(begin)
        except pw.Error as error:
            if NETWORK_CHANGED not in error.message:
                raise
            self.load(begin)

    def add_tab(self) -> None:
        self.tab = self.do(self._open)
        self.tabs.append(self.tab)

    def use_tab(self, number: int) -> None:
        self.tab = self.tabs[number]
        self.do(self.tab.bring_to_front)

    def js(self, expression: str) -> Any:
        return self.do(lambda: self.tab.evaluate(expression))

    def press(self, keys: str) -> None:
        self.do(lambda: self.tab.keyboard.press(keys))

    def size(self, width: int, height: int) -> None:
        self.do(lambda: self.tab.set_viewport_size({"width": width, "height": height}))

    def shot(self, path: Path) -> Path:
        return self.quietly(lambda: self.tab.screenshot(path=path, caret="initial"), path)

    def quietly(self, take: Callable[[], object], path: Path) -> Path:
        """Playwright puts a style of its own into the page for a picture; Firefox reports that as a refused one."""
        heard = len(self.logged())
        self.do(take)
        self.log[heard:] = [line for line in self.logged()[heard:] if "style-src-elem" not in line]
        return path

    def download(self, button: Spot) -> tuple[str, bytes]:
        """Clicks and waits for a real download: its file name and bytes."""

        def save() -> tuple[str, bytes]:
            assert isinstance(button, PlaywrightSpot)
            with self.tab.expect_download() as started:
                button.locator.click()
            return started.value.suggested_filename, Path(started.value.path()).read_bytes()

        return self.do(save)

    def another_tab(self) -> User:
        other = copy.copy(self)
        other.tab = self.do(other._open)
        return other

    def offline(self, on: bool) -> None:
        self.do(lambda: self.context.set_offline(on))

    def logged(self) -> list[str]:
        if not self.tab.is_closed():
            self.js("0")  # events arrive while a call is under way
        return list(self.log)

    def close(self) -> None:
        self.do(self.context.close)


class PlaywrightSpot(Spot):
    def __init__(self, user: PlaywrightUser, locator: pw.Locator, title: str) -> None:
        self.user, self.do, self.locator, self.title = user, user.do, locator, title

    def __repr__(self) -> str:
        return f"{self.title} in {self.user.engine}"

    def find(self, role: str, name: Name | None = None, *, level: int | None = None) -> Spot:
        kind: Any = role
        found = self.locator.get_by_role(kind, name=name, exact=isinstance(name, str), level=level)
        return PlaywrightSpot(self.user, found, f"{role} {name!r}")

    def css(self, selector: str) -> Spot:
        return PlaywrightSpot(self.user, self.locator.locator(selector), selector)

    def nth(self, index: int) -> Spot:
        return PlaywrightSpot(self.user, self.locator.nth(index), f"{self.title}[{index}]")

    def count(self) -> int:
        return self.do(lambda: self.locator.filter(visible=True).count())

    def js(self, function: str) -> Any:
        return self.do(lambda: self.locator.evaluate(function))

    def click(self) -> None:
        self.do(self.locator.click)

    def fill(self, text: str) -> None:
        self.do(lambda: self.locator.fill(text))

    def press(self, keys: str) -> None:
        self.do(lambda: self.locator.press(keys))

    def upload(self, *paths: Path) -> None:
        self.do(lambda: self.locator.set_input_files(paths))

    def shot(self, path: Path) -> Path:
        return self.user.quietly(lambda: self.locator.screenshot(path=path, caret="initial"), path)


# WebKitGTK: its MiniBrowser through its own driver, over plain W3C WebDriver. -----------------------------------------

ELEMENT = "element-6066-11e4-a52e-4f735466cecf"
KEYS = {"Shift": "\ue008", "Control": "\ue009", "Enter": "\ue007", "Tab": "\ue004", "Escape": "\ue00c", "Space": " "}
KEYS |= {"ArrowUp": "\ue013", "ArrowDown": "\ue015", "Home": "\ue011", "End": "\ue010", "PageUp": "\ue00e"}
ROLES = {
    "button": "button, summary, [role=button], input[type=button]",
    "heading": "h1, h2, h3, h4, h5, h6, [role=heading]",
    "img": "img, [role=img]",
    "link": "a[href], [role=link]",
    "list": "ul, ol, [role=list]",
    "listitem": "li, [role=listitem]",
    "dialog": "dialog, [role=dialog]",
    "article": "article, [role=article]",
    "progressbar": "progress, [role=progressbar]",
    "status": "output, [role=status]",
    "textbox": "textarea, input:not([type]), input[type=text], input[type=url], [role=textbox]",
    "checkbox": "input[type=checkbox], [role=checkbox]",
    "combobox": "select, [role=combobox]",
}
SHOWN_SCRIPT = """
const [selector, name, ...roots] = arguments;
const all = (roots.length ? roots : [document]).flatMap((root) => [...root.querySelectorAll(selector)]);
const shown = (e) => e.checkVisibility({visibilityProperty: true}) && !e.closest('[aria-hidden=true]');
const bare = (texts) => texts.join('').replace(/\\s+/g, '');
const textOf = (id) => document.getElementById(id)?.textContent;
const told = (e) => bare([e.getAttribute('aria-label'), ...(e.getAttribute('aria-labelledby') ?? '').split(' ').map(textOf),
  ...[...e.labels ?? []].map((label) => label.textContent), e.alt, e.title, e.placeholder, e.value, e.textContent]);
const may = (e) => name === null || e.querySelector('[aria-label], [alt], [title]') || told(e).includes(bare([name]));
return all.filter((e) => (e.type === 'file' || shown(e)) && may(e));
"""
"""Those that are shown, but for what cannot have the name: the driver is asked for each computed name one by one."""
FILL_SCRIPT = """
const [field, text] = arguments;
field.focus();
field.value = text;
field.dispatchEvent(new InputEvent('input', {bubbles: true, inputType: 'insertText', data: text}));
"""
RESTS_SCRIPT = """
const [e, done] = arguments, place = () => { const {x, y} = e.getBoundingClientRect(); return `${x} ${y}`; };
e.scrollIntoView({block: 'center', behavior: 'instant'});
let before = place(), still = 0, looks = 0;
const look = () => {
  still = place() === before ? still + 1 : 0;
  before = place();
  if (still === 3 || ++looks === 60) done(still === 3); else setTimeout(look, 16);
};
setTimeout(look, 16);
"""
"""The driver clicks where something was: it has to stand still. It would also stop at the edge of the screen, where
something else may float above it."""
SHADOWS_SCRIPT = """
window.testSheet ??= new CSSStyleSheet();
window.testSheet.replaceSync(arguments[0]);
document.adoptedStyleSheets = [window.testSheet];
"""
SMALL_TOOLBAR = "* { min-width: 0; min-height: 0; padding: 0; margin: 0; font-size: 1px; }"
"""MiniBrowser's toolbar would keep its window from becoming as narrow as a phone."""
NO_MOTION = "[Settings]\ngtk-enable-animations=0\n"
"""What prefers-reduced-motion is to WebKitGTK: it draws on the processor, where a turning ring takes half a core."""


def program(*names: str) -> str:
    found = next(filter(None, map(shutil.which, names)), None)
    assert found, f"not installed: {' or '.join(names)}; bash .ci/test installs it"
    return found


class WebKitEngine(Engine):
    name = "webkit"

    def __init__(self, folder: Path) -> None:
        (folder / "gtk-3.0").mkdir(parents=True)
        (folder / "gtk-3.0" / "gtk.css").write_text(SMALL_TOOLBAR)
        (folder / "gtk-3.0" / "settings.ini").write_text(NO_MOTION)
        self.screen, display = self._start_screen()
        self.users: list[WebKitUser] = []
        self.environment = {
            **os.environ,
            "DISPLAY": f":{display}",
            "GDK_BACKEND": "x11",
            "NO_AT_BRIDGE": "1",
            "DBUS_SESSION_BUS_ADDRESS": "disabled:",
            "XDG_CONFIG_HOME": str(folder),
            "LANGUAGE": "en",
            "WEBKIT_DISABLE_COMPOSITING_MODE": "1",  # without a graphics card OpenGL is reckoned, and dear
        }

    @staticmethod
    def _start_screen() -> tuple[subprocess.Popen[bytes], str]:
        reader, writer = os.pipe()
        command = ["Xvfb", "-displayfd", str(writer), "-screen", "0", "1600x1200x24", "-nolisten", "tcp", "-noreset"]
        screen = subprocess.Popen(command, pass_fds=[writer], stderr=subprocess.DEVNULL)
        os.close(writer)
        with open(reader) as numbers:
            return screen, numbers.readline().strip()

    def user(self, size: tuple[int, int] = LAPTOP) -> WebKitUser:
        self.users.append(WebKitUser(self.environment, size))
        return self.users[-1]

    def close(self) -> None:
        for user in self.users:
            user.close()
        self.screen.terminate()
        self.screen.wait()


class WebDriverError(Exception):
    """What the driver answered instead of a value: `code` as in the W3C specification."""

    def __init__(self, value: dict[str, str]) -> None:
        super().__init__(value.get("message") or value["error"])
        self.code = value["error"]


class WebDriver:
    """One driver process with one session."""

    def __init__(self, environment: dict[str, str]) -> None:
        port = free_port()
        command = ["WebKitWebDriver", f"--port={port}"]
        quiet = subprocess.DEVNULL
        self.process = subprocess.Popen(command, env=environment, stdout=quiet, stderr=quiet)
        self.base = f"http://127.0.0.1:{port}"
        eventually(functools.partial(self._listens, port), "the driver listens")
        browser = {"binary": mini_browser(), "args": ["--automation"]}
        wanted = {"acceptInsecureCerts": True, "webkitgtk:browserOptions": browser}
        self.base += "/session/" + self.call("POST", "/session", capabilities={"alwaysMatch": wanted})["sessionId"]
        self.call("POST", "/timeouts", script=60_000)

    @staticmethod
    def _listens(port: int) -> bool:
        with socket.socket() as knocking:
            return knocking.connect_ex(("127.0.0.1", port)) == 0

    def call(self, method: str, path: str, **body: Any) -> Any:
        data = json.dumps(body).encode() if method == "POST" else None
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.base + path, data, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=90) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            with error:
                raise WebDriverError(json.load(error)["value"]) from None

    def run(self, script: str, *arguments: Any) -> Any:
        return self.call("POST", "/execute/sync", script=script, args=arguments)

    def quit(self) -> None:
        if self.process.poll() is None:
            try:
                self.call("DELETE", "")
            finally:
                self.process.terminate()
                self.process.wait()


class Tab(WebDriver):
    """One tab of several in a session; the driver is told which one is meant before each call."""

    def __init__(self, driver: WebDriver, handle: str) -> None:
        self.process, self.base, self.handle = driver.process, driver.base, handle

    def call(self, method: str, path: str, **body: Any) -> Any:
        if path:
            super().call("POST", "/window", handle=self.handle)
        return super().call(method, path, **body)


def mini_browser() -> str:
    found = sorted(glob.glob("/usr/lib*/*/webkit2gtk-4.*/MiniBrowser"))
    assert found, "not installed: WebKitGTK's MiniBrowser; bash .ci/test installs it"
    return found[-1]


class WebKitUser(User):
    """A MiniBrowser process of its own. Its driver hears no console, so the page is watched from within."""

    engine = "webkit"

    def __init__(self, environment: dict[str, str], size: tuple[int, int]) -> None:
        self.driver, self.excuses, self.log = WebDriver(environment), [], list[str]()
        self.tabs: list[str] = [self.driver.call("GET", "/window")]
        self.size(*size)

    @property
    def page(self) -> Spot:
        return WebKitSpot(self, None, "", None, "the page")

    def goto(self, url: str) -> None:
        self._keep_log()
        self.driver.call("POST", "/url", url=url)
        self.driver.run(WATCH_SCRIPT)

    def reload(self) -> None:
        self._keep_log()
        self.driver.call("POST", "/refresh")
        self.driver.run(WATCH_SCRIPT)

    def add_tab(self) -> None:
        self.tabs.append(self.driver.call("POST", "/window/new", type="tab")["handle"])
        self.use_tab(-1)

    def use_tab(self, number: int) -> None:
        self._keep_log()
        self.driver.call("POST", "/window", handle=self.tabs[number])

    def js(self, expression: str) -> Any:
        script = "const done = arguments[0]; (async () => (%s))().then((v) => done({v}), (e) => done({e: String(e)}))"
        answer = self.driver.call("POST", "/execute/async", script=script % expression, args=[])
        if "e" in answer:
            raise RuntimeError(answer["e"])
        return answer.get("v")

    def press(self, keys: str) -> None:
        codes = [KEYS.get(key, key) for key in keys.split("+")]
        strokes = [{"type": "keyDown", "value": code} for code in codes]
        strokes += [{"type": "keyUp", "value": code} for code in reversed(codes)]
        self.driver.call("POST", "/actions", actions=[{"type": "key", "id": "keyboard", "actions": strokes}])

    def size(self, width: int, height: int) -> None:
        outer = self.driver.call("POST", "/window/rect", width=width, height=height)
        inner = eventually(lambda: self.driver.run("return [innerWidth, innerHeight]"))
        wider, higher = outer["width"] - inner[0], outer["height"] - inner[1]
        self.driver.call("POST", "/window/rect", width=width + wider, height=height + higher)
        self.wait(f"innerWidth === {width} && innerHeight === {height}")

    def shot(self, path: Path) -> Path:
        with self.flat():
            return _save_picture(self.driver.call("GET", "/screenshot"), path)

    @contextmanager
    def flat(self) -> Iterator[None]:
        """Without shadows: over a whole window a picture takes the driver 20 s to reckon them."""
        self.driver.run(SHADOWS_SCRIPT, "*, ::backdrop { box-shadow: none !important }")
        try:
            yield
        finally:
            self.driver.run(SHADOWS_SCRIPT, "")

    def _keep_log(self) -> None:
        self.log += self.driver.run("const seen = window.testErrors ?? []; window.testErrors = []; return seen")

    def logged(self) -> list[str]:
        if self.driver.process.poll() is None:
            self._keep_log()
        return list(self.log)

    def another_tab(self) -> User:
        here, other = self.driver.call("GET", "/window"), copy.copy(self)
        there = self.driver.call("POST", "/window/new", type="tab")["handle"]
        self.driver, other.driver = Tab(self.driver, here), Tab(self.driver, there)
        return other

    def close(self) -> None:
        self.driver.quit()


def _save_picture(encoded: str, path: Path) -> Path:
    path.write_bytes(base64.b64decode(encoded))
    return path


class WebKitSpot(Spot):
    """Those of `selector` below `parent` whose computed label is `name`; or one of the parent's by its index."""

    NOT_YET = ("no such element", "stale element reference", "element click intercepted", "element not interactable")

    def __init__(
        self, user: WebKitUser, parent: WebKitSpot | None, selector: str, name: Name | None, title: str
    ) -> None:
        self.user, self.parent, self.selector, self.name, self.title = user, parent, selector, name, title
        self.index: int | None = None

    def __repr__(self) -> str:
        return f"{self.title} in webkit"

    def find(self, role: str, name: Name | None = None, *, level: int | None = None) -> Spot:
        selector = f"h{level}, [aria-level='{level}']" if level else ROLES.get(role, f"[role={role}]")
        return WebKitSpot(self.user, self, selector, name, f"{role} {name!r}")

    def css(self, selector: str) -> Spot:
        return WebKitSpot(self.user, self, selector, None, selector)

    def nth(self, index: int) -> Spot:
        spot = WebKitSpot(self.user, self, "", None, f"{self.title}[{index}]")
        spot.index = index
        return spot

    def elements(self) -> list[dict[str, str]]:
        if self.parent is None:
            return [self.user.driver.run("return document.documentElement")]
        whole = self.parent.parent is None  # the page need not be asked for
        above = [] if whole else self.parent.elements()
        if not whole and not above:
            return []
        if self.index is not None:
            return above[self.index : self.index + 1] if self.index >= 0 else above[self.index :][:1]
        wanted = self.name if isinstance(self.name, str) else None
        found = self.user.driver.run(SHOWN_SCRIPT, self.selector, wanted, *above)
        return [element for element in found if self.name is None or self._is_named(element)]

    def _is_named(self, element: dict[str, str]) -> bool:
        label = " ".join(self.user.driver.call("GET", f"/element/{element[ELEMENT]}/computedlabel").split())
        return label == self.name if isinstance(self.name, str) else bool(self.name and self.name.search(label))

    def count(self) -> int:
        try:
            return len(self.elements())
        except WebDriverError as error:
            if error.code in self.NOT_YET:
                return 0
            raise

    def _with(self, action: Callable[[dict[str, str]], T]) -> T:
        """Does it to the one element, as soon as there is one and it lets itself be used."""
        done: list[T] = []

        def attempt() -> bool:
            try:
                found = self.elements()
                assert len(found) == 1, f"{len(found)} of {self}"
                done.append(action(found[0]))
            except WebDriverError as error:
                if error.code not in self.NOT_YET:
                    raise
                raise AssertionError(str(error)) from None
            return True

        eventually(attempt, f"{self} can be used")
        return done[0]

    def js(self, function: str) -> Any:
        return self._with(lambda element: self.user.driver.run(f"return ({function})(arguments[0])", element))

    def _send(self, keys: str) -> None:
        self._with(lambda element: self.user.driver.call("POST", f"/element/{element[ELEMENT]}/value", text=keys))

    def click(self) -> None:
        def click(element: dict[str, str]) -> None:
            assert self.user.driver.call("POST", "/execute/async", script=RESTS_SCRIPT, args=[element]), "it moves"
            self.user.driver.call("POST", f"/element/{element[ELEMENT]}/click")

        self._with(click)

    def fill(self, text: str) -> None:
        self._with(lambda element: self.user.driver.run(FILL_SCRIPT, element, text))

    def press(self, keys: str) -> None:
        self.js("(e) => e.focus()")
        self.user.press(keys)

    def upload(self, *paths: Path) -> None:
        self._send("\n".join(map(str, paths)))

    def shot(self, path: Path) -> Path:
        with self.user.flat():
            picture = self._with(lambda found: self.user.driver.call("GET", f"/element/{found[ELEMENT]}/screenshot"))
        return _save_picture(picture, path)


# ---------------------------------------------------------------------------------------------------------- fixtures --

ENGINES = ("chromium", "firefox", "webkit")


class Browsers:
    """The engines that have been asked for; each is started once a worker."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.running: dict[str, Engine] = {}

    def __getitem__(self, name: str) -> Engine:
        if name not in self.running:
            folder = self.folder / name
            self.running[name] = WebKitEngine(folder) if name == "webkit" else PlaywrightEngine(name, folder)
        return self.running[name]

    def close(self) -> None:
        for engine in self.running.values():
            engine.close()


@pytest.fixture(scope="session")
def browsers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browsers]:
    started = Browsers(tmp_path_factory.mktemp("browsers"))
    yield started
    started.close()


Arrive = Callable[..., User]


@pytest.fixture
def arrive(browsers: Browsers, relay: Relay) -> Iterator[Arrive]:
    """arrive("firefox", PHONE) -> User. When the test is over nobody's console may hold an error or a warning.

    It asks for the relay so that consoles are read before that one stops: browsers log a relay that is gone.
    """
    users: list[User] = []

    def one(engine: str, size: tuple[int, int] = LAPTOP) -> User:
        users.append(browsers[engine].user(size))
        return users[-1]

    yield one
    logs = {f"{number} in {user.engine}": user.errors for number, user in enumerate(users)}
    for user in users:
        user.close()
    assert not any(logs.values()), logs


# ======================================================================================================================
# Relay process: the real thing on a free port with a state directory of its own. Start, stop, kill, restart.
# ======================================================================================================================


def shown_at(address: str, port: int) -> x509.Certificate:
    """The certificate that a new connection is shown, whatever it is worth."""
    pem = ssl.get_server_certificate((address, port), timeout=PATIENCE)
    return x509.load_pem_x509_certificate(pem.encode())


class Relay:
    """A relay process. `folder` keeps its state and its output over restarts; the port stays the same, too."""

    def __init__(self, folder: Path, *options: str, page: Path = PAGE, env: dict[str, str] | None = None) -> None:
        self.state, self.out, self.err = folder / "state", folder / "relay.out", folder / "relay.err"
        self.options, self.page, self.env = options, page, env or {}
        self.port = free_port()
        self.process: subprocess.Popen[bytes] | None = None
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def command(self) -> list[str]:
        return [
            sys.executable,
            str(RELAY),
            "--host",
            "127.0.0.1",
            "--port",
            str(self.port),
            "--state-dir",
            str(self.state),
            "--page",
            str(self.page),
            *self.options,
        ]

    def begin(self) -> None:
        with open(self.out, "wb") as out, open(self.err, "ab") as err:
            self.process = subprocess.Popen(self.command, stdout=out, stderr=err, env=relay_environment(self.env))

    def start(self) -> Relay:
        """Returns once it listens."""
        self.begin()
        return self.ready()

    def ready(self) -> Relay:
        eventually(self.listens, f"{self.command} listens")
        return self

    def listens(self) -> bool:
        assert self.process is not None
        if self.process.poll() is not None:
            raise RuntimeError(f"relay ended with {self.process.returncode}: {self.err.read_text()}")
        return b"page " in self.out.read_bytes()  # printed when requests and signals are heeded

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    @property
    def plain(self) -> bool:
        return "--plain" in self.options

    def url(self, path: str = "/") -> str:
        return f"{'http' if self.plain else 'https'}://127.0.0.1:{self.port}{path}"

    def socket_url(self, room_path: str) -> str:
        return f"{'ws' if self.plain else 'wss'}://127.0.0.1:{self.port}/ws/{room_path}"

    @property
    def anchor(self) -> Path:
        """The certificate to trust for this one."""
        if "--cert" in self.options:
            return Path(self.options[self.options.index("--cert") + 1])
        return self.state / (zsr.CA_CERT if "--local-ca" in self.options else zsr.TLS_CERT)

    def trust(self) -> ssl.SSLContext | None:
        """A context that takes this relay's certificate and no other."""
        return None if self.plain else ssl.create_default_context(cafile=str(self.anchor))

    def shown(self) -> x509.Certificate:
        return shown_at("127.0.0.1", self.port)

    def get(self, path: str = "/", method: str = "GET", **fields: str) -> Reply:
        """One request; underscores in the names of fields stand for hyphens."""
        context = self.trust()
        connection = (
            http.client.HTTPSConnection("127.0.0.1", self.port, context=context, timeout=PATIENCE)
            if context
            else http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        )
        with contextlib.closing(connection):
            connection.request(method, path, headers={name.replace("_", "-"): fields[name] for name in fields})
            response = connection.getresponse()
            return Reply(response.status, dict(response.getheaders()), response.read())

    def stop(self) -> int:
        """Asks it to end and returns its exit code."""
        assert self.process is not None
        self.process.terminate()
        return self.process.wait(PATIENCE)

    def kill(self) -> None:
        """Ends it as a power failure would."""
        if self.process is not None:
            self.process.kill()
            self.process.wait(PATIENCE)

    def restart(self) -> Relay:
        """Killed and started on the same port with the same state."""
        self.kill()
        return self.start()

    def signal(self, name: str) -> None:
        os.kill(self.pid, getattr(signal, name))

    def rss(self) -> int:
        """Resident memory in bytes."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        return next(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmRSS"))

    def cpu(self) -> float:
        """Seconds of CPU it has used."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Reply:
    """A response to a plain request; `fields` by lower-case name."""

    def __init__(self, status: int, fields: dict[str, str], body: bytes) -> None:
        self.status, self.body = status, body
        self.fields = {name.lower(): value for name, value in fields.items()}


def relay_environment(extra: dict[str, str]) -> dict[str, str]:
    """This process's environment without what would steer a relay."""
    steering = ("ZSR_", "LISTEN_", "NOTIFY_", "STATE_DIRECTORY", "PYTHON")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(steering)}
    return kept | {"ZSR_LOOP": "asyncio"} | extra  # what most have, wherever the tests run


on_both_loops = pytest.mark.parametrize(
    "relay",
    ["asyncio", pytest.param("uvloop", marks=pytest.mark.skipif(not find_spec("uvloop"), reason="no uvloop here"))],
    indirect=True,
)


class Relays:
    """Fresh relays without options: the next one starts while the last one is used."""

    def __init__(self, tmp_path_factory: pytest.TempPathFactory) -> None:
        self.folders = tmp_path_factory
        self.waiting = self.begun()

    def begun(self) -> Relay:
        made = Relay(self.folders.mktemp("relay"))
        made.begin()
        return made

    def take(self) -> Relay:
        taken, self.waiting = self.waiting.ready(), self.begun()
        return taken


@pytest.fixture(scope="session")
def relays(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Relays]:
    started = Relays(tmp_path_factory)
    yield started
    started.waiting.kill()


@pytest.fixture
def relay(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Relay]:
    """A relay of this test's own, with the options that the test is marked with."""
    marked, loop = request.node.get_closest_marker("relay"), getattr(request, "param", "")
    if marked or loop:
        env = {"ZSR_LOOP": loop} if loop else {}
        made = Relay(tmp_path / "relay", *(marked.args if marked else ()), env=env).start()
    else:
        made = request.getfixturevalue("relays").take()
    yield made
    made.kill()


@pytest.fixture(scope="session")
def lasting_relay(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Relay]:
    """A relay for tests that leave it as it was."""
    made = Relay(tmp_path_factory.mktemp("lasting") / "relay").start()
    yield made
    made.kill()


# ---------------------------------------------------------------------------------------------------------------------
# Node: the page's blocks, lifted out of index.html into one long-lived node process that answers lines of JSON.
#
# The blocks run in a context whose globals are an allow-list, so a block that reaches for the page, the network or a
# clock fails here. The context is handed the host's typed arrays: WebCrypto's results are made of those, and a block's
# own `instanceof Uint8Array` would otherwise refuse them.
# ---------------------------------------------------------------------------------------------------------------------

PURE_BLOCKS = ("room-1-bytes", "room-2-suite", "room-3-wire", "room-4-room")

NODE_MAIN = r"""
'use strict';
const vm = require('node:vm'), readline = require('node:readline');
const kept = new Map();
let nextHandle = 1, context = null, parse = (text) => JSON.parse(text);

const plain = (value) => {
  const proto = Object.getPrototypeOf(value);
  return proto === null || Object.getPrototypeOf(proto) === null;
};
const keep = (value) => { kept.set(nextHandle, value); return {$h: nextHandle++}; };
const code = (value) => {
  if (value === undefined) return null;
  if (value instanceof Uint8Array) return {$b: Buffer.from(value).toString('hex')};
  if (typeof value === 'function' || typeof value === 'symbol') return keep(value);
  if (typeof value === 'bigint') return {$n: String(value)};
  if (typeof value !== 'object' || value === null) return value;
  if (Array.isArray(value)) return value.map(code);
  if (!plain(value)) return keep(value);
  return Object.fromEntries(Object.entries(value).map(([name, item]) => [name, code(item)]));
};
const revive = (value) => {
  if (value === null || typeof value !== 'object') return value;
  if ('$b' in value) return new Uint8Array(Buffer.from(value.$b, 'hex'));
  if ('$n' in value) return BigInt(value.$n);
  if ('$u' in value) return undefined;
  return '$h' in value ? kept.get(value.$h) : value;
};
const find = (target) => {
  if (typeof target === 'number') return kept.get(target);
  const [first, ...rest] = target.split('.');
  return rest.reduce((object, name) => object[name], vm.runInContext(first, context));
};
const operations = {
  begin({blocks, extra}) {
    const globals = {crypto, TextEncoder, TextDecoder, Uint8Array, ArrayBuffer, DataView, structuredClone};
    new Function('globals', 'require', extra)(globals, require);
    context = vm.createContext(globals);
    parse = vm.runInContext('(text, revive) => JSON.parse(text, (name, value) => revive(value))', context);
    for (const [filename, source] of blocks) vm.runInContext(source, context, {filename});
  },
  call({target, args}) {
    const found = find(target);
    return typeof found === 'function' ? found(...args) : found;
  },
  keep: async ({target, args}) => keep(await operations.call({target, args})),
};
const answer = async (text) => {
  try {
    const asked = parse(text, revive);
    for (const handle of asked.drop) kept.delete(handle);
    const value = await operations[asked.do](asked);
    return {ok: asked.do === 'keep' ? value : code(value)};
  } catch (error) {
    if (error?.name === 'Refused') return {refused: error.code, message: error.message};
    return {broken: String(error?.stack ?? error)};
  }
};
readline.createInterface({input: process.stdin}).on('line', async (text) => {
  process.stdout.write(JSON.stringify(await answer(text)) + '\n');
}).on('close', () => process.exit()); // whatever timers the page still has
"""


class Refused(Exception):
    """What a block's own Refused says: `code` for programs, the message for people."""

    def __init__(self, code: str, message: str = "") -> None:
        super().__init__(code, message)
        self.code = code


class NodeBroken(Exception):
    """A block failed in another way than by refusing, or node ended: always a fault of the blocks or of the test."""


class Handle:
    """Something that stays in node: a key, a function, an object whose state matters. Dropped here, it goes there."""

    def __init__(self, node: Node, number: int) -> None:
        self.node, self.number = node, number

    def __call__(self, *args: object) -> Any:
        return self.node.call(self, *args)

    def __del__(self) -> None:
        self.node.dropped.append(self.number)


def page_blocks(names: tuple[str, ...] = PURE_BLOCKS) -> list[tuple[str, str]]:
    """The named script blocks of the page as (id, source), in the order of the page; what is absent is left out."""
    return [(name, source) for name, source in blocks(PAGE.read_text("utf-8")).items() if name in names]


class Node:
    """A node process with some blocks of the page; `extra` is JavaScript that may add to `globals` before they run."""

    ANSWER_WITHIN = 120.0

    def __init__(self, blocks: list[tuple[str, str]], extra: str = "") -> None:
        self.dropped: list[int] = []
        command = ["node", "--eval", NODE_MAIN]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8")
        assert self.process.stdin
        assert self.process.stdout
        self.questions, self.answers = self.process.stdin, self.process.stdout
        self._ask({"do": "begin", "blocks": blocks, "extra": extra})

    def call(self, target: str | Handle, *args: object) -> Any:
        """Call (or read) `Suite.sign` or a kept function. Promises are awaited; functions and keys become handles."""
        return self._ask({"do": "call", "target": self._target(target), "args": args})

    def keep(self, target: str | Handle, *args: object) -> Handle:
        """Like call, but the whole result stays in node, however plain it is."""
        handle = self._ask({"do": "keep", "target": self._target(target), "args": args})
        assert isinstance(handle, Handle)
        return handle

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self.questions.close()
        self.process.wait(10)
        self.answers.close()

    @staticmethod
    def _target(target: str | Handle) -> str | int:
        return target.number if isinstance(target, Handle) else target

    def _ask(self, question: dict[str, object]) -> Any:
        dropped, self.dropped = self.dropped, []
        text = json.dumps({**question, "drop": dropped}, default=self._code)
        self.questions.write(text + "\n")
        self.questions.flush()
        if not select.select([self.answers], [], [], self.ANSWER_WITHIN)[0]:
            self.process.kill()
        line = self.answers.readline()
        if not line:
            raise NodeBroken(f"node ended or was silent for {self.ANSWER_WITHIN:.0f} s")
        return self._result(json.loads(line, object_hook=self._revive))

    @staticmethod
    def _result(answer: dict[str, Any]) -> Any:
        if "refused" in answer:
            raise Refused(answer["refused"], answer["message"])
        if "broken" in answer:
            raise NodeBroken(answer["broken"])
        return answer["ok"]

    def _code(self, value: object) -> dict[str, object]:
        if isinstance(value, bytes | bytearray | memoryview):
            return {"$b": bytes(value).hex()}
        if isinstance(value, Handle):
            return {"$h": value.number}
        raise TypeError(f"{type(value).__name__} does not travel to node")

    def _revive(self, value: dict[str, Any]) -> Any:
        if "$b" in value:
            return bytes.fromhex(value["$b"])
        if "$n" in value:
            return int(value["$n"])
        return Handle(self, value["$h"]) if "$h" in value else value


@pytest.fixture(scope="session")
def node() -> Iterator[Node]:
    """The pure blocks; shared by all tests, since they keep nothing between calls but imported keys."""
    started = Node(page_blocks())
    yield started
    started.close()


class TestNode:
    """The bridge itself: what it carries, and what the blocks cannot reach from there."""

    def test_bytes_text_numbers_and_nested_lists_come_back_as_they_went(self, node: Node) -> None:
        value = {"bytes": b"\x00\xff", "list": [1, "\u00e9\U0001f600", None, True, [b""]], "number": 2**53 - 1}
        assert node.call("Object.assign", {}, value) == value

    def test_a_refusal_carries_its_code(self, node: Node) -> None:
        with pytest.raises(Refused) as caught:
            node.call("Bytes.unhex", "zz")
        assert caught.value.code == "bad"

    def test_another_failure_is_told_from_a_refusal(self, node: Node) -> None:
        with pytest.raises(NodeBroken):
            node.call("Bytes.nothing.at.all")

    def test_keys_and_functions_stay_in_node_and_can_be_used_from_here(self, node: Node) -> None:
        pair = node.call("Suite.signer")
        assert isinstance(pair["key"], Handle)
        assert len(node.call("Suite.sign", pair, "leaf", b"m")) == 64

    @pytest.mark.parametrize(
        "name", ["document", "fetch", "WebSocket", "indexedDB", "setTimeout", "process", "require"]
    )
    def test_pure_blocks_find_no_page_network_clock_or_host(self, node: Node, name: str) -> None:
        with pytest.raises(NodeBroken, match=f"{name} is not defined"):
            node.call(name)


# ══════════════════════════════════════════════════════════════════════════════════════════════════════════════════════
# House rules: what both files must look like. Reads source and runs nothing, but for asking the relay for its policy.
# ══════════════════════════════════════════════════════════════════════════════════════════════════════════════════════

ALLOWED_FILES = {"zerosecretroom.py", "index.html", "test_zerosecretroom.py", "README.md", "LICENSE"}
INSTALLERS = {"install_ubuntu.sh", "install_centos7.sh"}
MOST_LINES = 40

# What a reader in JavaScript finds in a block, as JSON: espree and eslint-scope are what eslint itself reads with.
BLOCK_READER = r"""
const {parse} = require('espree'), {analyze} = require('eslint-scope');
const walk = function* (node, parents = []) {
  yield [node, parents];
  for (const [key, child] of Object.entries(node)) {
    if (key === 'parent') continue;
    for (const each of Array.isArray(child) ? child : [child])
      if (each && typeof each.type === 'string') yield* walk(each, [node, ...parents]);
  }
};
const inside = (node, other) => node.range[0] > other.range[0] && node.range[1] <= other.range[1];
const isFunction = (node) => /Function/.test(node.type);
const keys = (pattern) => pattern.properties.map((property) => property.key.name);
const wanted = (node) => node.type === 'ObjectPattern' ? {names: keys(node)} : {whole: node.name};
const frozen = (node) => node?.type === 'CallExpression' && node.callee.property?.name === 'freeze' &&
  node.arguments[0].type === 'ObjectExpression' ? keys(node.arguments[0]) : null;

/** What counts as another function inside one: the whole declaration of one with a name, of others a block body. */
const others = (functions, node) => functions.filter(([each]) => each !== node && inside(each, node))
  .flatMap(([each, [parent, statement]]) => parent.type === 'VariableDeclarator' ? [statement] :
    parent.type === 'Property' ? [parent] : each.body.type === 'BlockStatement' ? [each.body] : []);

/** The lines that hold code of a function's own: no comments, no lone brackets, no functions inside it. */
const ownLines = (ast, node, inner) => {
  const lines = new Set();
  for (const {type, value, loc, range} of ast.tokens) {
    const within = range[0] > node.body.range[0] && range[1] < node.body.range[1];
    if (!within || (type === 'Punctuator' && /^[\])};,]$/.test(value))) continue;
    if (inner.some((each) => range[0] >= each.range[0] && range[1] <= each.range[1])) continue;
    for (let line = loc.start.line; line <= loc.end.line; line++) lines.add(line);
  }
  return lines.size;
};

const read = ([id, source]) => {
  const options = {ecmaVersion: 2023, sourceType: 'script', loc: true, range: true, tokens: true, comment: true};
  const ast = parse(source, options), all = [...walk(ast)], nodes = all.map(([node]) => node);
  const [directive, room, ...rest] = ast.body, declared = room?.declarations?.[0], call = declared?.init;
  const factory = call?.callee, body = factory?.body?.body ?? [];
  const functions = all.filter(([node]) => isFunction(node) && node !== factory);
  const title = ([node, [parent]]) => node.id?.name ?? parent?.id?.name ?? parent?.key?.name ?? 'a function';
  const members = {};
  for (const node of nodes) {
    if (node.type === 'MemberExpression' && node.object.type === 'Identifier' && !node.computed)
      (members[node.object.name] ??= []).push(node.property.name);
    if (node.type === 'VariableDeclarator' && node.id.type === 'ObjectPattern' && node.init?.type === 'Identifier')
      (members[node.init.name] ??= []).push(...keys(node.id));
  }
  return {
    id, constant: declared?.id.name,
    shape: directive?.directive === 'use strict' && room?.kind === 'const' && !rest.length,
    given: (call?.arguments ?? []).map((node) => node.name), taken: (factory?.params ?? []).map(wanted),
    exports: frozen(body.at(-1)?.argument), members,
    globals: [...new Set(analyze(ast, {ecmaVersion: 2023}).globalScope.through.map((use) => use.identifier.name))],
    names: [...new Set(nodes.flatMap((node) => node.type === 'Identifier' ? [node.name] : []))],
    strings: nodes.flatMap((node) => node.type === 'Literal' && typeof node.value === 'string' ? [node.value] :
      node.type === 'TemplateElement' ? [node.value.cooked] : []),
    asks: nodes.filter((node) => node.type === 'CallExpression' && node.callee.name === 't')
      .flatMap(({arguments: [key]}) => key.type === 'Literal' ? [key.value] : []),
    waits: nodes.some((node) => node.type === 'AwaitExpression' || node.async),
    functions: functions.filter(([node]) => node.body.type === 'BlockStatement').map((each) => ({
      title: title(each), line: each[0].loc.start.line, lines: ownLines(ast, each[0], others(functions, each[0]))})),
  };
};
console.log(JSON.stringify(JSON.parse(require('fs').readFileSync(0, 'utf8')).map(read)));
"""


@functools.cache
def page_text() -> str:
    return PAGE.read_text(encoding="utf-8")


@functools.cache
def rooms() -> tuple[dict[str, Any], ...]:
    """What BLOCK_READER finds in each block of the page, in order."""
    environment = {**os.environ, "NODE_PATH": str(NODE_MODULES)}
    command = ["node", "-e", BLOCK_READER]
    text = json.dumps(list(blocks(page_text()).items()))
    answer = subprocess.run(command, input=text, env=environment, capture_output=True, text=True, timeout=60)
    assert answer.returncode == 0, answer.stderr
    return tuple(json.loads(answer.stdout))


def views() -> list[dict[str, Any]]:
    return [room for room in rooms() if room["id"].startswith("room-8")]


# -------------------------------------------------------------------------------------------------------- the folder --


def tracked_files() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    return [path for path in map(ROOT.joinpath, listed.stdout.splitlines()) if path.is_file()]


def test_the_top_level_holds_the_agreed_files_and_nothing_else() -> None:
    top = {path.relative_to(ROOT).parts[0] for path in tracked_files()}
    visible = {name for name in top if not name.startswith(".")}
    assert visible - INSTALLERS == ALLOWED_FILES


def test_no_file_names_a_machine_or_leaves_something_for_later() -> None:
    here = re.compile(
        r"(^|[^\w.])/(work|farm|tmp/bash[_]jobs)/|[.]library|\b(TO[D]O|FIX[M]E|X[X]X|HA[C]K)\b", re.MULTILINE
    )
    texts = {path: path.read_text(encoding="utf-8") for path in tracked_files() if path.name != "package-lock.json"}
    found = {str(path): match[0] for path, text in texts.items() if (match := here.search(text))}
    assert found == {}


def test_no_file_names_the_host_of_a_registry() -> None:
    hosts = re.compile(r"(?i)pypi\.(org|python)|npmjs\.(org|com)|pythonhosted[.]|deb\.debian[.]|archive\.ubuntu[.]")
    found = {str(path): match[0] for path in tracked_files() if (match := hosts.search(path.read_text("utf-8")))}
    assert found == {}


# -------------------------------------------------------------------------------------------------- the page's rooms --


def test_every_block_is_one_strict_constant() -> None:
    assert [room["id"] for room in rooms() if not room["shape"] or not room["exports"]] == []


def test_blocks_are_all_there_is_of_script_in_the_page() -> None:
    assert len(re.findall(r"<script\b", page_text())) == len(blocks(page_text()))
    assert not re.search(r"<[^>]*\son[a-z]+\s*=", page_text().partition("<script")[0])


def test_a_block_takes_only_what_earlier_blocks_export() -> None:
    exports: dict[str, list[str]] = {}
    for room in rooms():
        wrong = [
            each for given in zip(room["given"], room["taken"], strict=True) for each in missing(*given, room, exports)
        ]
        assert wrong == [], f"{room['id']} takes what no earlier block exports"
        exports[room["constant"]] = room["exports"]


def missing(given: str, taken: dict[str, Any], room: dict[str, Any], exports: dict[str, list[str]]) -> Iterator[str]:
    """What a block takes of an earlier one, destructured or by its whole name, that is not exported there."""
    if given not in exports or taken.get("whole", given) != given:
        yield given
        return
    for name in taken.get("names") or room["members"].get(given, []):
        if name not in exports[given]:
            yield f"{given}.{name}"


def test_a_block_names_no_other_block_but_those_it_takes() -> None:
    constants = {room["constant"] for room in rooms()}
    found = {room["id"]: sorted((constants - set(room["given"])) & set(room["globals"])) for room in rooms()}
    assert {room: names for room, names in found.items() if names} == {}


def test_every_name_a_block_takes_is_used_in_it() -> None:
    for room in rooms():
        source = blocks(page_text())[room["id"]]
        idle = [
            n for taken in room["taken"] for n in taken.get("names", []) if len(re.findall(rf"\b{n}\b", source)) < 2
        ]
        assert idle == [], room["id"]


@pytest.mark.parametrize(
    ("world", "owner"),
    [
        ("crypto", "room-2-suite"),
        ("indexedDB", "room-5-store"),
        ("WebSocket", "room-6-link"),
        ("localStorage", "room-80-memo"),
        ("sessionStorage", "room-80-memo"),
    ],
)
def test_each_door_to_the_world_has_one_owner(world: str, owner: str) -> None:
    users = {
        room["id"] for room in rooms() if world in room["globals"] or world in room["members"].get("globalThis", [])
    }
    assert users - {"room-9-boot"} <= {owner}, f"only {owner} uses {world}; boot may ask whether there is one"


PURE = {"Array", "ArrayBuffer", "BigInt", "Boolean", "DataView", "Error", "Infinity", "JSON", "Map", "Math", "Number"}
PURE |= {"Object", "RangeError", "Set", "String", "TextDecoder", "TextEncoder", "TypeError", "Uint8Array", "undefined"}
PURE |= {"Symbol", "parseInt", "structuredClone", "NaN", "Uint32Array", "Uint16Array", "WeakMap"}


@pytest.mark.parametrize(
    ("block", "also"),
    [
        ("room-1-bytes", {"atob", "btoa"}),
        ("room-2-suite", {"crypto", "Promise"}),
        ("room-3-wire", set[str]()),
        ("room-4-room", set[str]()),
        ("room-72-markdown", set[str]()),
        ("room-80-qr", set[str]()),
    ],
)
def test_pure_blocks_reach_for_nothing_outside(block: str, also: set[str]) -> None:
    room = next(room for room in rooms() if room["id"] == block)
    assert set(room["globals"]) - PURE - also - set(room["given"]) == set()
    assert block == "room-2-suite" or not room["waits"], "pure blocks are synchronous"


def test_nothing_below_the_views_touches_the_page() -> None:
    page = {"document", "window", "HTMLElement", "Element", "Node", "history", "alert", "confirm", "prompt"}
    lower = [room for room in rooms() if room["id"] < "room-8" and room["id"] not in ("room-5-store", "room-6-link")]
    assert {room["id"]: sorted(page & set(room["globals"])) for room in lower if page & set(room["globals"])} == {}


def test_the_views_know_only_the_model() -> None:
    """And how people write, which is pure: what a list shows of a message is cut by the same rules as the message."""
    below = {room["constant"] for room in rooms() if room["id"] < "room-8"} - {"Markdown"}
    assert {room["id"]: sorted(below & set(room["given"])) for room in views() if below & set(room["given"])} == {}


SINKS = {
    "innerHTML",
    "outerHTML",
    "insertAdjacentHTML",
    "createContextualFragment",
    "srcdoc",
    "eval",
    "Function",
    "write",
}
SINKS |= {"setHTMLUnsafe", "parseHTMLUnsafe", "DOMParser", "importScripts", "createPolicy", "execScript"}


def test_no_block_has_a_way_from_text_to_markup_or_script() -> None:
    found = {room["id"]: sorted(SINKS & (set(room["names"]) | set(room["globals"]))) for room in rooms()}
    saves = {"room-73-files": ["write"]}  # into the place on disk that somebody chose
    assert {room: names for room, names in found.items() if names} == saves
    assert [room["id"] for room in rooms() if {"write", "writeln"} & set(room["members"].get("document", []))] == []


def test_chance_comes_from_the_suite_alone() -> None:
    assert [room["id"] for room in rooms() if "random" in room["members"].get("Math", [])] == []


def test_the_policy_holds_the_hash_of_every_block_and_of_the_style() -> None:
    policy = zsr.Page.of(PAGE.read_bytes()).policy
    for kind, open_tag in (("script", r"<script\b[^>]*>"), ("style", r"<style>")):
        inline = re.findall(rf"{open_tag}(.*?)</{kind}>", page_text(), re.DOTALL)
        digests = [base64.b64encode(hashlib.sha256(block.encode()).digest()).decode() for block in inline]
        sources = next(part for part in policy.split("; ") if part.startswith(f"{kind}-src"))
        assert sources == f"{kind}-src " + " ".join(f"'sha256-{digest}'" for digest in digests)


def test_the_map_in_the_head_of_the_page_names_rooms_that_exist() -> None:
    head, *_ = page_text().partition("<style")
    named = set(re.findall(r"room-\d+-[a-z]+", head))
    assert named <= set(blocks(page_text()))
    unnamed = [block for block in blocks(page_text()) if block not in named and f"{block[:6]}x" not in head]
    assert unnamed == []


# ------------------------------------------------------------------------------------------------- the relay's rooms --


class PythonRoom:
    """A banner of the relay and the statements below it."""

    def __init__(self, name: str, first_line: int) -> None:
        self.name, self.first_line = name, first_line
        self.defines: set[str] = set()
        self.uses: set[str] = set()


@functools.cache
def relay_text() -> str:
    return RELAY.read_text(encoding="utf-8")


@functools.cache
def relay_rooms() -> tuple[PythonRoom, ...]:
    lines = relay_text().splitlines()
    banners = [
        (number + 2, re.match(r"# (\w+): ", lines[number + 1]))
        for number, line in enumerate(lines)
        if re.match(r"# ═{20,}", line)
    ]
    found = [PythonRoom("head", 0), *(PythonRoom(title[1], number) for number, title in banners if title)]
    for statement in ast.parse(relay_text()).body:
        room_at(found, statement.lineno).defines |= defined_by(statement)
    for name, line in [*names_in_scopes(symtable.symtable(relay_text(), "relay", "exec")), *names_in_annotations()]:
        room_at(found, line).uses.add(name)
    return tuple(found)


def room_at(found: Iterable[PythonRoom], line: int) -> PythonRoom:
    return [room for room in found if room.first_line <= line][-1]


def defined_by(statement: ast.stmt) -> set[str]:
    match statement:
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
            return {name}
        case ast.Assign() | ast.AnnAssign():
            names = [node for node in ast.walk(statement) if isinstance(node, ast.Name)]
            return {node.id for node in names if isinstance(node.ctx, ast.Store)}
        case _:
            return set()


def names_in_scopes(scope: symtable.SymbolTable) -> Iterator[tuple[str, int]]:
    """Global names used inside functions and classes, with the line of the scope."""
    for child in scope.get_children():
        yield from ((symbol.get_name(), child.get_lineno()) for symbol in child.get_symbols() if symbol.is_global())
        yield from names_in_scopes(child)


def names_in_annotations() -> Iterator[tuple[str, int]]:
    for node in ast.walk(ast.parse(relay_text())):
        for annotation in (getattr(node, "annotation", None), getattr(node, "returns", None)):
            if annotation is not None:
                yield from ((each.id, each.lineno) for each in ast.walk(annotation) if isinstance(each, ast.Name))


def test_the_relay_has_the_rooms_of_its_map_in_that_order() -> None:
    documented = re.search(
        r"^Map\..*?\n(.*?)\n\n", f"{ast.get_docstring(ast.parse(relay_text()))}\n\n", re.MULTILINE | re.DOTALL
    )
    assert documented
    named = [line.split()[0] for line in documented[1].splitlines()]
    assert [room.name for room in relay_rooms()[1:]] == named


def test_no_room_of_the_relay_names_a_later_one() -> None:
    later: set[str] = set()
    for room in reversed(relay_rooms()):
        assert room.uses & later - room.defines == set(), f"{room.name} names what stands below it"
        later |= room.defines


@pytest.mark.parametrize(
    ("name", "owners"),
    [
        ("asyncio", {"Link", "Command"}),
        ("ssl", {"Certificate", "Link", "Command"}),
        ("socket", {"Link", "Command"}),
        ("time", {"Link", "Command"}),
        ("open", {"Certificate"}),
    ],
)
def test_the_relay_opens_each_door_in_its_own_room(name: str, owners: set[str]) -> None:
    assert {room.name for room in relay_rooms() if name in room.uses} <= owners


def test_only_the_room_of_certificates_writes_files() -> None:
    writing = re.compile(r"\b(write_bytes|write_text|os\.open|os\.replace|mkstemp|mkdir)\b")
    lines = enumerate(relay_text().splitlines(), 1)
    assert {room_at(relay_rooms(), number).name for number, line in lines if writing.search(line)} <= {"Certificate"}


# ---------------------------------------------------------------------------------------------------- both languages --


def python_lines(node: ast.FunctionDef | ast.AsyncFunctionDef, tokens: dict[int, bool]) -> int:
    """The lines with code of a function's own: no docstring, comments, lone brackets, functions inside it."""
    body = node.body[1:] if ast.get_docstring(node) is not None else node.body
    own = set(range(body[0].lineno, (node.end_lineno or 0) + 1)) if body else set()
    for inner in ast.walk(node):
        if inner is not node and isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef):
            own -= set(range(inner.lineno, (inner.end_lineno or 0) + 1))
    return sum(tokens.get(line, False) for line in own)


def code_lines(text: str) -> dict[int, bool]:
    """Line -> whether there is more on it than comments and closing brackets."""
    empty = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    lines: dict[int, bool] = {}
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in empty and token.string not in (")", "]", "}", "),", "],", "},", ","):
            lines |= dict.fromkeys(range(token.start[0], token.end[0] + 1), True)
    return lines


@pytest.mark.parametrize("path", [RELAY, ROOT / "test_zerosecretroom.py"], ids=["relay", "tests"])
def test_no_python_body_is_longer_than_forty_lines(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    tokens = code_lines(text)
    functions = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    lengths = {f"{node.name}:{node.lineno}": python_lines(node, tokens) for node in functions}
    assert {name: lines for name, lines in lengths.items() if lines > MOST_LINES} == {}


def test_no_body_of_the_page_is_longer_than_forty_lines() -> None:
    lengths = {f"{r['id']} {f['title']}:{f['line']}": f["lines"] for r in rooms() for f in r["functions"]}
    assert {name: lines for name, lines in lengths.items() if lines > MOST_LINES} == {}


# ------------------------------------------------------------------------------------------------------------ labels --
# The README writes each use of a label as a call: Sign("charter", …), Hl("body", …), E("slot", …), X(…, "epoch", …).


@functools.cache
def page_labels() -> dict[str, set[str]]:
    """sign, hash, info, expand -> their labels, read from the table in room-2-suite."""
    table = re.search(r"const LABELS = (.*?)\n  \}\);", blocks(page_text())["room-2-suite"], re.DOTALL)
    assert table
    code = re.sub(r"/\*.*?\*/", "", table[1], flags=re.DOTALL)
    return {
        use: set(re.findall(r"'([^']+)'", labels))
        for use, labels in re.findall(r"(\w+): [^[]*\[(.*?)\]", code, re.DOTALL)
    }


def test_the_label_table_has_its_four_uses() -> None:
    assert set(page_labels()) == {"sign", "hash", "info", "expand"}


@pytest.mark.parametrize(
    ("use", "call"),
    [("sign", r"Sign\("), ("hash", r"Hl\("), ("info", r"\bE\("), ("expand", r"\bX\([^\"]*?")],
)
def test_readme_and_code_have_the_same_labels(use: str, call: str) -> None:
    published = set(re.findall(rf'{call}"([^"]+)"', README.read_text(encoding="utf-8")))
    assert published == page_labels()[use]


def test_the_relay_uses_no_label_the_page_does_not_know() -> None:
    assert set(zsr.LABELS) <= page_labels()["sign"] | page_labels()["hash"]


def test_the_relay_uses_every_label_of_its_table() -> None:
    rest = re.sub(r"\nLABELS = \(.*?\n\)\n", "\n", relay_text(), count=1, flags=re.DOTALL)
    assert [label for label in zsr.LABELS if f'"{label}"' not in rest] == []


# ----------------------------------------------------------------------------------------------------------- strings --


@functools.cache
def english() -> frozenset[str]:
    table = re.search(r"const en = Object\.freeze\(\{\n(.*?)\n  \}\);", blocks(page_text())["room-81-words"], re.DOTALL)
    assert table
    return frozenset(re.findall(r"'([a-z][\w.-]*)':", table[1]))


def markup_keys() -> set[str]:
    """The static markup holds keys where words will stand: texts, accessible names, placeholders."""
    markup = page_text().partition("<body")[2].partition("<script")[0]
    attributes = re.findall(r'\b(?:aria-label|placeholder|data-list)="([^"]+)"', markup)
    return {*attributes, *re.findall(r"\bdata-t\b[^>]*>([^<]+)<", markup)}


def test_every_string_that_is_asked_for_is_in_the_table() -> None:
    asked = markup_keys() | {key for room in rooms() for key in room["asks"]}
    assert asked - english() == set()


def test_every_string_of_the_table_is_used() -> None:
    strings = {text for room in rooms() for text in room["strings"] if text} | markup_keys()
    source = "".join(code for block, code in blocks(page_text()).items() if block != "room-81-words")
    beginnings = tuple(text for text in strings if text.endswith(".") and text[:-1].replace(".", "").isalpha())
    words = {key for key in strings & english() if any(f"{q}{key}{q}" in source for q in "'\"`")} | markup_keys()
    assert [key for key in sorted(english()) if key not in words and not key.startswith(beginnings)] == []


# ----------------------------------------------------------------------------------------------------------- attacks --
# What a malicious relay or insider must not achieve, as README counts it, and the tests that show it: the relay's, the
# suite's and the whole clients'. There may be more tests of an attack than stand here, but none of these may go.
ATTACKS = {
    1: (
        "a_member_that_no_admin_signed_for_is_refused",
        "who_is_listed_without_an_admins_word_is_sealed_nothing",
    ),
    2: (
        "an_older_charter_or_roster_does_not_replace_the_head",
        "an_older_charter_roster_or_commit_is_not_gone_back_to",
    ),
    3: (
        "a_demoted_admins_roster_and_invites_are_dead",
        "a_demoted_admins_rosters_and_links_are_dead",
    ),
    4: ("a_swapped_leaf_of_an_admin_ends_the_join",),
    5: ("a_forged_welcome_is_refused",),
    6: (
        "a_replayed_join_is_one_admission",
        "a_replayed_join_moves_no_admin",
    ),
    7: (
        "of_two_that_race_with_one_link_one_gets_in_and_the_other_is_told",
        "of_two_that_race_on_one_link_one_gets_in_and_the_other_is_told",
    ),
    8: (
        "a_join_moved_to_another_invite_does_not_open",
        "a_join_moved_to_another_invite_or_room_does_not_open",
    ),
    9: (
        "expired_and_revoked_invites_are_over",
        "an_expired_or_revoked_link_lets_nobody_in_even_where_the_relay_keeps_it",
    ),
    10: (
        "what_is_no_point_is_refused_before_import",
        "what_is_no_point_is_refused_by_every_engine",
        "points_off_the_curve_are_refused_before_use",
    ),
    11: (
        "no_flipped_bit_of_a_frame_passes_for_the_same_frame",
        "no_flipped_bit_of_a_sealed_envelope_opens",
        "a_flipped_bit_in_a_signed_frame_leaves_the_state_unchanged",
        "no_flipped_bit_of_a_frame_changes_anything",
    ),
    12: ("a_replayed_event_is_dropped_also_after_a_reload",),
    13: (
        "what_is_reordered_is_shown_in_the_same_order_to_all",
        "a_file_arrives_although_its_end_was_told_before_it",
    ),
    14: ("a_dropped_event_is_seen_as_missing_and_heals",),
    15: (
        "a_cut_tail_is_called_held_back_after_30_s_and_heals",
        "a_liar_cannot_say_that_anothers_messages_are_held_back",
    ),
    16: ("two_members_are_given_different_commits_and_come_together",),
    17: (
        "what_was_said_in_one_room_fails_in_another",
        "an_event_of_one_room_fails_at_the_members_of_another",
        "a_signed_object_of_one_room_is_refused_in_another_although_known",
    ),
    18: (
        "an_envelope_of_another_epoch_is_stale",
        "an_envelope_of_an_epoch_fails_in_the_next",
    ),
    19: ("a_rewritten_author_fails",),
    20: ("what_an_insider_seals_as_another_is_dropped_and_the_true_one_opens",),
    21: ("who_got_another_secret_than_the_rest_sees_the_tag_fail_and_resyncs",),
    22: (
        "a_commit_that_breaks_a_rule_is_refused",
        "a_parent_that_nobody_knows_lends_no_right",
        "whoever_lacks_the_right_changes_no_roster_and_rotates_for_nobody",
    ),
    23: (
        "a_signature_under_one_label_verifies_under_no_other",
        "a_signature_fits_no_other_content_and_no_other_key",
        "a_signature_under_another_label_is_refused",
        "a_signature_under_another_label_or_over_another_body_fails",
    ),
    24: ("a_removed_member_that_is_still_served_reads_nothing_more",),
    25: ("where_no_rotation_passes_clients_warn_and_then_say_nothing_more",),
    26: (
        "an_older_leaf_does_not_replace_a_newer",
        "an_older_leaf_and_a_leaf_shown_as_a_resync_are_refused",
    ),
    27: (
        "altered_segments_never_open",
        "a_file_cut_at_a_segment_does_not_pass_for_a_shorter_one",
        "tampered_chunks_make_no_file",
    ),
    28: (
        "a_segment_opens_under_no_other_key_and_for_no_other_file",
        "another_files_bytes_and_an_insiders_under_the_same_key_are_not_shown",
    ),
    29: ("two_events_at_one_place_are_an_alarm_for_both",),
    30: (
        "a_counter_of_2_to_the_53_or_more_is_refused",
        "a_length_beyond_the_bytes_is_refused",
        "a_count_is_held_against_the_bytes_before_any_item_is_read",
        "an_impossible_size_is_refused",
        "an_enormous_count_of_rounds_is_refused_unspent",
        "huge_numbers_and_lengths_cost_nothing",
        "huge_counters_and_lamports_stop_nobody",
        "a_huge_vector_is_bounded_work",
        "leaves_of_strangers_are_not_kept",
    ),
    31: (
        "the_relay_signs_nothing_but_its_own_words",
        "the_client_signs_no_login_but_the_one_it_asked_for",
        "a_relay_with_another_key_gets_no_login",
    ),
    32: ("a_socket_that_claims_another_device_is_closed",),
    33: (
        "after_a_restart_any_member_restores_and_a_forged_root_does_not",
        "a_forged_root_leads_no_newcomer_in",
        "a_relay_that_reboots_empty_is_restored_and_its_forged_root_refused",
    ),
    34: (
        "an_ex_members_state_is_replaced_by_any_true_one",
        "an_older_state_and_an_ex_admins_forged_roster_take_nobody_over",
    ),
    35: (
        "a_malleated_signature_verifies_so_it_can_be_no_identity",
        "a_malleated_signature_makes_no_second_object",
        "a_malleated_signature_makes_no_second_event",
    ),
    36: ("what_could_carry_a_script_is_never_shown_inline",),
    37: ("of_two_tabs_one_works_and_the_other_may_take_over",),
    38: ("a_crash_at_any_point_of_sending_loses_and_doubles_nothing",),
    39: (
        "a_wrong_or_missing_passphrase_is_named",
        "an_altered_wrap_does_not_open",
        "what_is_no_wrap_is_refused",
    ),
    40: ("memory_and_log_of_the_relay_hold_no_secret",),
    41: (
        "a_device_is_attached_only_by_its_members_word_and_its_own",
        "a_device_is_attached_by_its_members_word_and_its_own",
    ),
    42: (
        "a_removed_device_never_returns",
        "a_removed_device_is_brought_back_by_nobody",
    ),
    43: (
        "a_newcomer_gets_no_older_words_by_replay_or_by_asking",
        "what_waits_to_be_said_is_not_posted_where_a_newcomer_reads_it",
    ),
    44: (
        "a_login_for_another_host_is_refused",
        "a_login_forwarded_to_another_host_gets_nobody_in",
    ),
}


def test_every_attack_has_its_tests_and_each_was_seen_to_fail_without_what_it_tests() -> None:
    tree = ast.parse(Path(__file__).read_text(encoding="utf-8"))
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    found = {node.name: ast.get_docstring(node) or "" for node in nodes if node.name.startswith("test_attack_")}
    assert list(ATTACKS) == list(range(1, 45))
    listed = {f"test_attack_{number:02}_{words}" for number, tests in ATTACKS.items() for words in tests}
    assert listed - found.keys() == set(), "a test went, or goes by another name"
    assert all(re.match(r"test_attack_(0[1-9]|[123]\d|4[0-4])_[a-z]", name) for name in found)
    shown = re.compile(r"Seen to\s+fail\s+without: |No line\s+alone")
    assert [name for name in sorted(listed) if not shown.search(found[name])] == []


# ------------------------------------------------------------------------------------------------------------ README --


def test_the_readme_lists_the_options_of_the_relay_and_no_others() -> None:
    options = {name for action in zsr.make_parser({})._actions for name in action.option_strings if name[:2] == "--"}
    section = re.search(r"^## Options\n(.*?)(?=^## |\Z)", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert section, "README has no section Options"
    assert set(re.findall(r"`(--[a-z-]+)", section[1])) == options - {"--help"}


# ======================================================================================================================
# Oracle: a second client in Python, for the tests alone. It makes and opens everything that a device can, with other
# libraries than the page's, from ENCODING's tables: what JavaScript seals it opens, and the reverse. Only the layouts
# that the relay knows too are zsr's; labels, hashes, derivations and the layouts of sealed things are its own.
#
#   keys        new_device(room) -> Keys; new_root() -> private key; fresh_leaf(keys) -> Keys with the next leaf
#   signing     sign(key, label, m) -> 64 bytes; signed(key, label, shape) -> zsr.Signed; leaf(keys) -> zsr.Signed
#   rooms       charter(...), entry(...), roster(...), commit(...) -> Made; create(...) -> Made of commit 0
#   epochs      X(...), epoch_of(joiner, ch) -> Epoch, device_key(epoch, dev), group_seal/group_open, open_slot
#   joining     link(...), invite_of(link), invite(...), revoke(...), seal_join/open_join, seal_welcome/open_welcome
#   events      header and body shapes, event(...) -> Item bytes, read_item, seal_direct/open_direct
#   requests    request(...), resync(...), share(...), login(...)
# ======================================================================================================================

PrivateKey = ec.EllipticCurvePrivateKey
ZERO16, ZERO32, ZERO64, ZERO65 = bytes(16), bytes(32), bytes(64), bytes(65)
FAR_FUTURE = 4_102_444_800_000  # ms: the year 2100
HPKE = CipherSuite.new(KEMId.DHKEM_P256_HKDF_SHA256, KDFId.HKDF_SHA256, AEADId.AES256_GCM)


# --------------------------------------------------------------------------------------------- bytes, hashes, keys --
def u(size: int, value: int) -> bytes:
    return value.to_bytes(size, "big")


def small(data: bytes) -> bytes:
    return u(2, len(data)) + data


def large(data: bytes) -> bytes:
    return u(4, len(data)) + data


def E(label: str, m: bytes) -> bytes:
    return small(b"ZSR1 " + label.encode()) + large(m)


def H(label: str, m: bytes) -> bytes:
    return hashlib.sha256(small(b"ZSR1 #" + label.encode()) + large(m)).digest()


def pad(data: bytes) -> bytes:
    """u32 length, data, zeros to 256 * 2^k up to 64 KiB, then to multiples of 64 KiB."""
    size = 256
    while size < len(data) + 4 and size < 65536:
        size *= 2
    if len(data) + 4 > size:
        size = -(-(len(data) + 4) // 65536) * 65536
    return (large(data)).ljust(size, b"\0")


def unpad(data: bytes) -> bytes:
    size = int.from_bytes(data[:4], "big")
    assert pad(data[4 : 4 + size]) == data, "padding is not canonical"
    return data[4 : 4 + size]


def new_key() -> PrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


new_root = new_key


def point(key: PrivateKey) -> bytes:
    """The 65 bytes of a key's public half."""
    form = serialization.PublicFormat.UncompressedPoint
    return key.public_key().public_bytes(serialization.Encoding.X962, form)


def sign(key: PrivateKey, label: str, m: bytes) -> bytes:
    r, s = decode_dss_signature(key.sign(E(label, m), ec.ECDSA(hashes.SHA256())))
    return u(32, r) + u(32, s)


def signed(key: PrivateKey, label: str, shape: Any) -> zsr.Signed:
    m = zsr.encode(shape)
    return zsr.Signed(m, sign(key, label, m))


def room_of(root: PrivateKey) -> bytes:
    return H("room", point(root))


def dev_of(room: bytes, sigpub: bytes) -> bytes:
    return H("dev", room + sigpub)[:16]


def member_of(room: bytes, sigpub: bytes) -> bytes:
    return H("member", room + sigpub)[:16]


@dataclass(frozen=True)
class Keys:
    """A device in one room: its signing pair, its present leaf."""

    room: bytes
    sig: PrivateKey
    kem: PrivateKey
    leaf_no: int = 1

    @property
    def sigpub(self) -> bytes:
        return point(self.sig)

    @functools.cached_property
    def dev(self) -> bytes:
        return dev_of(self.room, self.sigpub)

    @functools.cached_property
    def member(self) -> bytes:
        """The member whose first device this is."""
        return member_of(self.room, self.sigpub)


def new_device(room: bytes) -> Keys:
    return Keys(room, new_key(), new_key())


def fresh_leaf(keys: Keys) -> Keys:
    return replace(keys, kem=new_key(), leaf_no=keys.leaf_no + 1)


def leaf_shape(keys: Keys) -> zsr.Leaf:
    return zsr.Leaf(keys.room, keys.sigpub, point(keys.kem), keys.leaf_no)


def leaf(keys: Keys) -> zsr.Signed:
    return signed(keys.sig, "leaf", leaf_shape(keys))


def leaf_hash(keys: Keys) -> bytes:
    return H("leaf", zsr.encode(leaf_shape(keys)))


# ------------------------------------------------------------------------------------------------- HPKE and epochs --
def hpke_seal(
    to: bytes, info: bytes, plaintext: bytes, aad: bytes = b"", psk: bytes = b"", psk_id: bytes = b""
) -> bytes:
    """enc65 || ct to the point `to`; psk mode where a psk is given."""
    public = KEMKey.from_pyca_cryptography_key(ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), to))
    enc, sender = HPKE.create_sender_context(public, info, psk=psk, psk_id=psk_id)
    return enc + sender.seal(plaintext, aad)


def hpke_open(
    key: PrivateKey, info: bytes, data: bytes, aad: bytes = b"", psk: bytes = b"", psk_id: bytes = b""
) -> bytes:
    recipient = HPKE.create_recipient_context(
        data[:65], KEMKey.from_pyca_cryptography_key(key), info, psk=psk, psk_id=psk_id
    )
    return recipient.open(data[65:], aad)


def varint(n: int) -> bytes:
    """RFC 9000's, as RFC 9420 uses it for vector lengths."""
    return u(1, n) if n < 64 else u(2, n | 0x4000) if n < 16384 else u(4, n | 0x80000000)


def X(secret: bytes, label: str, context: bytes, length: int, prefix: str = "ZSR1 ") -> bytes:
    """RFC 9420 ExpandWithLabel."""
    name = (prefix + label).encode()
    info = u(2, length) + varint(len(name)) + name + varint(len(context)) + context
    return HKDFExpand(hashes.SHA256(), length, info).derive(secret)


def mac(key: bytes, data: bytes) -> bytes:
    return hmac.new(key, data, "sha256").digest()


@dataclass(frozen=True)
class Epoch:
    """The secrets of one epoch."""

    ch: bytes
    joiner: bytes
    init: bytes
    confirm: bytes
    send: bytes

    @property
    def tag(self) -> bytes:
        return mac(self.confirm, self.ch)


def epoch_from_es(es: bytes, ch: bytes, joiner: bytes = b"") -> Epoch:
    return Epoch(ch, joiner, X(es, "init", b"", 32), X(es, "confirm", b"", 32), X(es, "send", b"", 32))


def epoch_of(joiner: bytes, ch: bytes) -> Epoch:
    return epoch_from_es(X(joiner, "epoch", ch, 32), ch, joiner)


def joiner_of(init: bytes, cs: bytes) -> bytes:
    return mac(init, cs)


def device_key(epoch: Epoch, dev: bytes) -> bytes:
    return X(epoch.send, "dev", dev, 32)


def demo_epoch() -> Epoch:
    return epoch_from_es(X(H("room", b"aaa"), "epoch", ZERO32, 32), ZERO32)


def group_aad(kind: int, room: bytes, number: int, ch: bytes, poster: bytes) -> bytes:
    return u(1, 1) + u(1, kind) + room + u(8, number) + ch + poster


def group_seal(epoch: Epoch, kind: int, room: bytes, number: int, poster: bytes, plaintext: bytes) -> bytes:
    """nonce12 || ct of a group envelope; `plaintext` is padded here."""
    nonce, aad = os.urandom(12), group_aad(kind, room, number, epoch.ch, poster)
    return nonce + AESGCM(device_key(epoch, poster)).encrypt(nonce, pad(plaintext), aad)


def group_open(epoch: Epoch, kind: int, room: bytes, number: int, poster: bytes, ct: bytes) -> bytes:
    """Raises InvalidTag where key or aad do not fit."""
    aad = group_aad(kind, room, number, epoch.ch, poster)
    return unpad(AESGCM(device_key(epoch, poster)).decrypt(ct[:12], ct[12:], aad))


# ------------------------------------------------------------------------------------- charters, rosters, commits --
def charter(root: PrivateKey, admins: list[Keys], no: int = 0, invites_from: int = 0, **policy: int) -> zsr.Signed:
    """policy: rotate_after, rotate_hours, who, history, joins."""
    values = {"rotate_after": 100, "rotate_hours": 168, "who": 0, "history": 0, "joins": 0} | policy
    keys = tuple(keys.sigpub for keys in admins)
    return signed(root, "charter", zsr.Charter(room_of(root), point(root), no, invites_from, keys, **values))


Entry = tuple[bytes, zsr.Device]
"""Member id and device entry."""


def entry(
    keys: Keys, inv_id: bytes = ZERO16, from_: bytes = ZERO32, sponsor: Keys | None = None, member: bytes | None = None
) -> Entry:
    """A device with its consent; sponsored by another device of `member` (by default the sponsor's own member)."""
    home = member or (sponsor.member if sponsor else keys.member)
    consent = sign(keys.sig, "consent", zsr.encode(zsr.Consent(keys.room, home, keys.dev, inv_id)))
    proof = ZERO64
    if sponsor:
        proof = sign(sponsor.sig, "sponsor", zsr.encode(zsr.Sponsor(keys.room, home, sponsor.dev, keys.dev, inv_id)))
    by = sponsor.sigpub if sponsor else ZERO65
    return home, zsr.Device(keys.sigpub, inv_id, from_, consent, by, proof)


def gone(keys: Keys, last: int = 0, digest: bytes = ZERO32, member: bytes | None = None) -> zsr.Gone:
    return zsr.Gone(keys.dev, member or keys.member, last, digest)


def used(inv_id: bytes, keys: Keys, expiry: int = FAR_FUTURE) -> zsr.Consumed:
    return zsr.Consumed(inv_id, keys.dev, expiry)


def roster_shape(
    room: bytes,
    under: zsr.Signed,
    signer: Keys,
    no: int,
    entries: list[Entry],
    removed: list[zsr.Gone] | None = None,
    consumed: list[zsr.Consumed] | None = None,
) -> zsr.Roster:
    homes: dict[bytes, list[zsr.Device]] = {}
    for home, device in entries:
        homes.setdefault(home, []).append(device)
    members = tuple(
        zsr.Member(home, tuple(sorted(devices, key=lambda device: device.sigpub)))
        for home, devices in sorted(homes.items())
    )
    out = tuple(sorted(removed or [], key=lambda each: each.dev))
    spent = tuple(sorted(consumed or [], key=lambda each: each.inv_id + each.dev))
    return zsr.Roster(room, no, H("charter", under.m), signer.dev, members, out, spent)


def roster(
    room: bytes,
    under: zsr.Signed,
    signer: Keys,
    no: int,
    entries: list[Entry],
    removed: list[zsr.Gone] | None = None,
    consumed: list[zsr.Consumed] | None = None,
) -> zsr.Signed:
    """A signed roster under the charter `under`, its lists put in order."""
    return signed(signer.sig, "roster", roster_shape(room, under, signer, no, entries, removed, consumed))


@dataclass(frozen=True)
class Made:
    """A commit as its committer holds it: the full unit, the same as an upload upon its parent, the new epoch."""

    unit: zsr.Unit
    upload: bytes
    body: zsr.Commit
    ch: bytes
    epoch: Epoch
    entries: tuple[Entry, ...] = field(default=())

    @property
    def full(self) -> bytes:
        return zsr.encode(self.unit)


def slot_info(room: bytes, number: int, parent: bytes) -> bytes:
    return E("slot", room + u(8, number) + parent)


def slot_aad(committer: bytes, to: Keys, kind: int) -> bytes:
    return committer + to.dev + leaf_hash(to) + u(1, kind)


def commit(
    parent: Made | None,
    under: zsr.Signed,
    listing: zsr.Signed,
    by: Keys,
    to: list[Keys],
    joiners: frozenset[bytes] = frozenset(),
    reason: int = 0,
    asked: bytes = ZERO32,
    number: int | None = None,
    false: Mapping[bytes, bytes] | None = None,
) -> Made:
    """A commit by `by`, with a slot for each of `to` (itself left out) at the leaf given there; `false` tells which
    devices are given another secret than the true one."""
    room, cs = by.room, os.urandom(32)
    number = (parent.body.epoch + 1 if parent else 0) if number is None else number
    before = parent.ch if parent else ZERO32
    joiner = joiner_of(parent.epoch.init if parent else ZERO32, cs)
    info, slots = slot_info(room, number, before), []
    for keys in sorted(to, key=lambda keys: keys.dev):
        if keys.dev != by.dev:
            kind = int(keys.dev in joiners)
            secret = (false or {}).get(keys.dev) or (joiner if kind else cs)
            box = hpke_seal(point(keys.kem), info, secret, slot_aad(by.dev, keys, kind))
            slots.append(zsr.Slot(kind, keys.dev, keys.leaf_no, box[:65], box[65:]))
    m = zsr.encode(zsr.Slots(tuple(slots)))
    body = zsr.Commit(
        room, number, before, H("charter", under.m), H("roster", listing.m), by.dev, reason, asked, H("slots", m)
    )
    data = zsr.encode(body)
    ch = H("commit", data)
    epoch = epoch_of(joiner, ch)
    same = parent is not None and parent.body.roster == body.roster
    chain = (*parent.unit.chain, zsr.encode(parent.body)) if parent and same else ()
    unit = zsr.Unit(zsr.encode(under), zsr.encode(listing), data, sign(by.sig, "commit", ch), epoch.tag, m, chain)
    known = parent is not None and parent.body.charter == body.charter
    upload = replace(unit, charter=b"" if known else unit.charter, roster=b"" if same else unit.roster, chain=())
    return Made(unit, zsr.encode(upload), body, ch, epoch)


def create(root: PrivateKey, creator: Keys, **policy: int) -> Made:
    """Charter 0, roster 0, commit 0."""
    under = charter(root, [creator], **policy)
    entries = [entry(creator)]
    return replace(
        commit(None, under, roster(creator.room, under, creator, 0, entries), creator, []), entries=tuple(entries)
    )


def open_slot(unit: zsr.Unit, keys: Keys, init: bytes = ZERO32) -> Epoch:
    """What `keys` makes of its slot; `init` is the parent epoch's where the slot holds cs. The tag must fit."""
    body = zsr.decode(zsr.Commit, unit.body)
    slot = next(slot for slot in zsr.decode(zsr.Slots, unit.slots).slots if slot.dev == keys.dev)
    info, aad = slot_info(keys.room, body.epoch, body.parent), slot_aad(body.committer, keys, slot.type)
    secret = hpke_open(keys.kem, info, slot.enc + slot.ct, aad)
    epoch = epoch_of(secret if slot.type else joiner_of(init, secret), H("commit", unit.body))
    assert hmac.compare_digest(epoch.tag, unit.tag), "tag does not fit"
    return epoch


# ----------------------------------------------------------------------------------------------- invites and joins --
@dataclass(frozen=True, slots=True)
class Link:
    """The bytes of an invite link."""

    version: zsr.U8
    room: zsr.Key
    kind: zsr.U8
    charter_no: zsr.U64
    inviter: zsr.Id
    relay_fp: zsr.Id
    tok: zsr.Key


def link(inviter: Keys, relay_pub: bytes, kind: int = 0, charter_no: int = 0) -> Link:
    fingerprint = H("relay", relay_pub)[:16]
    return Link(1, inviter.room, kind, charter_no, inviter.dev, fingerprint, os.urandom(32))


def invite_of(made: Link) -> tuple[bytes, bytes]:
    """(inv_id, psk) of a link."""
    context = H("link", zsr.encode(made)[:-32])
    return X(made.tok, "inv id", context, 16), X(made.tok, "inv psk", context, 32)


def invite(
    by: Keys, inv_id: bytes, kind: int = 0, charter_no: int = 0, expiry: int = FAR_FUTURE, uses: int = 1
) -> zsr.Signed:
    return signed(by.sig, "invite", zsr.Invite(by.room, by.dev, inv_id, kind, charter_no, expiry, uses))


def revoke(by: Keys, inv_id: bytes) -> zsr.Signed:
    return signed(by.sig, "revoke", zsr.Revoke(by.room, by.dev, inv_id))


@dataclass(frozen=True, slots=True)
class JoinContent:
    leaf: zsr.Big
    leaf_sig: zsr.Sig
    consent: zsr.Sig
    name: zsr.Text


@dataclass(frozen=True, slots=True)
class Top:
    dev: zsr.Id
    i: zsr.U64
    hash: zsr.Key


@dataclass(frozen=True, slots=True)
class WelcomeContent:
    joiner: zsr.Key
    ch: zsr.Key
    lamport: zsr.U64
    start: tuple[Top, ...]


@dataclass(frozen=True, slots=True)
class SharedPsk:
    psk: zsr.Key
    kind: zsr.U8
    charter_no: zsr.U64
    expiry: zsr.U64


def join_info(room: bytes, inv_id: bytes, to: Keys) -> bytes:
    return E("join", room + inv_id + to.dev + leaf_hash(to))


def seal_join(keys: Keys, to: Keys, inv_id: bytes, psk: bytes, name: str, member: bytes | None = None) -> bytes:
    """The newcomer's join for one admin device; `member` is its home where it is not its own first device."""
    consent = zsr.encode(zsr.Consent(keys.room, member or keys.member, keys.dev, inv_id))
    shown = leaf(keys)
    content = JoinContent(shown.m, shown.sig, sign(keys.sig, "consent", consent), name)
    return hpke_seal(point(to.kem), join_info(keys.room, inv_id, to), zsr.encode(content), psk=psk, psk_id=inv_id)


def open_join(to: Keys, inv_id: bytes, psk: bytes, joinct: bytes) -> JoinContent:
    plain = hpke_open(to.kem, join_info(to.room, inv_id, to), joinct, psk=psk, psk_id=inv_id)
    return zsr.decode(JoinContent, plain)


def welcome_info(room: bytes, inv_id: bytes, admin: bytes, joinct: bytes) -> bytes:
    return E("welcome", room + inv_id + admin + H("joinct", joinct))


def seal_welcome(by: Keys, to: Keys, inv_id: bytes, psk: bytes, joinct: bytes, content: WelcomeContent) -> bytes:
    info = welcome_info(by.room, inv_id, by.dev, joinct)
    return hpke_seal(point(to.kem), info, zsr.encode(content), psk=psk, psk_id=inv_id)


def open_welcome(keys: Keys, admin: bytes, inv_id: bytes, psk: bytes, joinct: bytes, ct: bytes) -> WelcomeContent:
    plain = hpke_open(keys.kem, welcome_info(keys.room, inv_id, admin, joinct), ct, psk=psk, psk_id=inv_id)
    return zsr.decode(WelcomeContent, plain)


def share(by: Keys, to: Keys, inv_id: bytes, content: SharedPsk) -> tuple[bytes, bytes]:
    """(ct, signature) of an invite's psk for another admin."""
    ct = hpke_seal(point(to.kem), E("share", by.room + inv_id + by.dev + to.dev), zsr.encode(content))
    shape = zsr.Share(by.room, by.dev, to.dev, inv_id, content.charter_no, hashlib.sha256(ct).digest())
    return ct, sign(by.sig, "share", zsr.encode(shape))


def open_share(to: Keys, sender: bytes, inv_id: bytes, ct: bytes) -> SharedPsk:
    return zsr.decode(SharedPsk, hpke_open(to.kem, E("share", to.room + inv_id + sender + to.dev), ct))


# ---------------------------------------------------------------------------------------------- events and vectors --
@dataclass(frozen=True, slots=True)
class Header:
    room: zsr.Key
    dev: zsr.Id
    i: zsr.U64
    prev: zsr.Key
    ch: zsr.Key
    lamport: zsr.U64
    time: zsr.U64
    kind: zsr.U8
    body: zsr.Key


@dataclass(frozen=True, slots=True)
class Want:
    dev: zsr.Id
    i: zsr.U64


@dataclass(frozen=True, slots=True)
class Seen:
    room: zsr.Key
    ch: zsr.Key
    dev: zsr.Id
    no: zsr.U64
    full: zsr.U8
    tops: tuple[Top, ...]
    wanted: tuple[Want, ...]


@dataclass(frozen=True)
class Item:
    """An event on its way: header, signature, and the salt and body unless it goes as a header alone."""

    header: bytes
    sig: bytes
    salt: bytes | None = None
    body: bytes = b""

    @property
    def data(self) -> bytes:
        part = u(1, 0) if self.salt is None else u(1, 1) + self.salt + large(self.body)
        return large(self.header) + self.sig + part

    @property
    def hash(self) -> bytes:
        return H("event", self.header)


def body_hash(salt: bytes, body: bytes) -> bytes:
    return H("body", salt + large(body))


def event(
    by: Keys,
    i: int,
    ch: bytes,
    kind: int,
    body: bytes,
    prev: bytes = ZERO32,
    lamport: int = 1,
    time_ms: int = 0,
    label: str = "event",
) -> Item:
    salt = os.urandom(16)
    header = zsr.encode(Header(by.room, by.dev, i, prev, ch, lamport, time_ms, kind, body_hash(salt, body)))
    return Item(header, sign(by.sig, label, header), salt, body)


def take_item(reader: zsr.Reader) -> Item:
    header, sig = reader.var(4), reader.take(64)
    part = reader.uint(1)
    assert part in (0, 1)
    return Item(header, sig, reader.take(16), reader.var(4)) if part else Item(header, sig)


def read_item(data: bytes) -> Item:
    reader = zsr.Reader(data)
    found = take_item(reader)
    reader.end()
    return found


def text_body(text: str, expires: int = 0) -> bytes:
    return u(4, expires) + large(text.encode())


def demo_content(by: Keys, name: str, item: Item) -> bytes:
    return by.sigpub + small(name.encode()) + item.data


def direct_info(room: bytes, ch: bytes, to: Keys) -> bytes:
    return E("direct", room + ch + to.dev + u(8, to.leaf_no))


def seal_direct(
    to: Keys, ch: bytes, items: list[Item], commits: list[bytes] | None = None, rosters: list[bytes] | None = None
) -> bytes:
    lists = [[item.data for item in items], [large(c) for c in commits or []], [large(r) for r in rosters or []]]
    content = b"".join(u(2, len(each)) + b"".join(each) for each in lists)
    return hpke_seal(point(to.kem), direct_info(to.room, ch, to), pad(content + u(2, 0)))


def open_direct(to: Keys, ch: bytes, ct: bytes) -> tuple[list[Item], list[bytes], list[bytes], list[zsr.Signed]]:
    reader = zsr.Reader(unpad(hpke_open(to.kem, direct_info(to.room, ch, to), ct)))
    items = [take_item(reader) for _ in range(reader.uint(2))]
    commits = [reader.var(4) for _ in range(reader.uint(2))]
    rosters = [reader.var(4) for _ in range(reader.uint(2))]
    own = [zsr.Signed(reader.var(4), reader.take(64)) for _ in range(reader.uint(2))]
    reader.end()
    return items, commits, rosters, own


# ------------------------------------------------------------------------------------------------ requests, logins --
def request(by: Keys, kind: int, body: bytes, no: int = 1, expiry: int = FAR_FUTURE) -> zsr.Signed:
    return signed(by.sig, "request", zsr.Request(by.room, by.dev, kind, no, expiry, body))


def farewell(by: Keys, devices: list[Keys], kind: int = 2) -> zsr.Signed:
    """The unlink (2) or leave (3) of a member's own devices."""
    return request(by, kind, zsr.encode(zsr.LastBody(tuple(zsr.Last(keys.dev, 0, ZERO32) for keys in devices))))


def resync(by: Keys, head: bytes) -> zsr.Signed:
    return signed(by.sig, "resync", zsr.Resync(by.room, head, zsr.encode(leaf_shape(by))))


def message_of(*frames: Any) -> bytes:
    return zsr.join_frames([zsr.encode_frame(frame) for frame in frames])


def login(by: Keys, relay_m: bytes, host: str, **changes: Any) -> zsr.UpLogin:
    """The login that answers a relay's nonce; `changes` replace fields of what is signed."""
    said = zsr.decode(zsr.Relay, relay_m)
    shape = zsr.Login(said.relay, host, said.room, said.client_nonce, said.relay_nonce, by.dev)
    made = signed(by.sig, "login", replace(shape, **changes))
    return zsr.UpLogin(made.m, made.sig, by.sigpub)


# ------------------------------------------------------------------------------------- the oracle agrees with itself --
def test_the_oracle_opens_what_it_seals() -> None:
    root = new_root()
    room = room_of(root)
    ann, ben = new_device(room), new_device(room)
    first = create(root, ann)
    made = link(ann, point(new_key()))
    inv_id, psk = invite_of(made)
    joinct = seal_join(ben, ann, inv_id, psk, "Ben")
    assert open_join(ann, inv_id, psk, joinct).name == "Ben"
    with pytest.raises(InvalidTag):
        group_open(first.epoch, 2, room, 0, ann.dev, group_seal(first.epoch, 1, room, 0, ann.dev, b"hello"))
    entries = [*first.entries, entry(ben, inv_id)]
    under = zsr.decode(zsr.Signed, first.unit.charter)
    listing = roster(room, under, ann, 1, entries, consumed=[used(inv_id, ben)])
    second = commit(first, under, listing, ann, [ben], joiners=frozenset({ben.dev}))
    assert open_slot(second.unit, ben) == second.epoch
    content = WelcomeContent(second.epoch.joiner, second.ch, 7, ())
    ct = seal_welcome(ann, ben, inv_id, psk, joinct, content)
    assert open_welcome(ben, ann.dev, inv_id, psk, joinct, ct) == content
    rotated = commit(second, under, listing, ben, [ann], reason=1)
    assert open_slot(rotated.unit, ann, second.epoch.init) == rotated.epoch
    item = event(ann, 1, second.ch, 1, text_body("hi"))
    assert read_item(item.data) == item
    assert open_direct(ben, second.ch, seal_direct(ben, second.ch, [item])) == ([item], [], [], [])


# ======================================================================================================================
# Wire: the same bytes in both languages. The relay's dataclasses, the oracle's and, for what only pages read, the few
# here are the Python side of the tables in room-3-wire; random objects of every line go both ways, and whatever one
# side refuses the other refuses.
# ======================================================================================================================


class LongText:
    """Well-formed UTF-8 behind a u32 length: zsr needs none, the text of an event does."""

    def read(self, reader: zsr.Reader) -> str:
        try:
            return reader.var(4).decode()
        except UnicodeDecodeError:
            raise zsr.Bad("text is not utf-8") from None

    def write(self, value: str) -> bytes:
        return large(value.encode())


class ItemCodec:
    """An event on its way, through the oracle's own reader."""

    def read(self, reader: zsr.Reader) -> Item:
        header, sig, part = reader.var(4), reader.take(64), reader.uint(1)
        if part > 1:
            raise zsr.Bad("part is unknown")
        return Item(header, sig, reader.take(16), reader.var(4)) if part else Item(header, sig)

    def write(self, value: Item) -> bytes:
        return value.data


Long = Annotated[str, LongText()]
Event = Annotated[Item, ItemCodec()]


@dataclass(frozen=True, slots=True)
class ItemContent:
    item: Event


@dataclass(frozen=True, slots=True)
class DemoContent:
    sigpub: zsr.Point
    name: zsr.Text
    item: Event


@dataclass(frozen=True, slots=True)
class DirectContent:
    items: tuple[Event, ...]
    commits: tuple[zsr.Big, ...]
    rosters: tuple[zsr.Big, ...]
    own: tuple[zsr.Signed, ...]


@dataclass(frozen=True, slots=True)
class OwnLink:
    what: zsr.U8
    room: zsr.Key
    sender: zsr.Id
    recipient: zsr.Id
    link: zsr.Big


@dataclass(frozen=True, slots=True)
class OwnLabel:
    what: zsr.U8
    room: zsr.Key
    sender: zsr.Id
    recipient: zsr.Id
    label: zsr.Text


@dataclass(frozen=True, slots=True)
class TypingNote:
    what: zsr.U8


@dataclass(frozen=True, slots=True)
class WantNote:
    what: zsr.U8
    author: zsr.Id
    file_id: zsr.Id
    from_: zsr.U32


@dataclass(frozen=True, slots=True)
class ServingNote:
    what: zsr.U8
    author: zsr.Id
    file_id: zsr.Id


@dataclass(frozen=True, slots=True)
class SplitBody:
    head: zsr.Key


@dataclass(frozen=True, slots=True)
class TextBody:
    expires: zsr.U32
    text: Long


@dataclass(frozen=True, slots=True)
class FileBody:
    file_id: zsr.Id
    fk: zsr.Key
    size: zsr.U64
    expires: zsr.U32
    name: zsr.Text
    type: zsr.Text
    thumb: zsr.Big


@dataclass(frozen=True, slots=True)
class DoneBody:
    event: zsr.Key
    segments: zsr.Key


@dataclass(frozen=True, slots=True)
class ReplyBody:
    target: Top
    expires: zsr.U32
    text: Long


@dataclass(frozen=True, slots=True)
class ReactionBody:
    target: Top
    emoji: zsr.Text


@dataclass(frozen=True, slots=True)
class EditBody:
    target: Top
    text: Long


@dataclass(frozen=True, slots=True)
class DeleteBody:
    target: Top


@dataclass(frozen=True, slots=True)
class ProfileBody:
    name: zsr.Text


@dataclass(frozen=True, slots=True)
class TitleBody:
    title: zsr.Text


@dataclass(frozen=True, slots=True)
class TimerBody:
    seconds: zsr.U32


@dataclass(frozen=True, slots=True)
class PollBody:
    expires: zsr.U32
    many: zsr.U8
    question: zsr.Text
    choices: tuple[zsr.Text, ...]


@dataclass(frozen=True, slots=True)
class VoteBody:
    target: Top
    choices: tuple[zsr.U8, ...]


@dataclass(frozen=True, slots=True)
class PinBody:
    target: Top
    on: zsr.U8


@dataclass(frozen=True, slots=True)
class ReadBody:
    upto: tuple[Want, ...]


EVENT_BODIES = {
    "text": TextBody,
    "file": FileBody,
    "done": DoneBody,
    "reply": ReplyBody,
    "reaction": ReactionBody,
    "edit": EditBody,
    "delete": DeleteBody,
    "profile": ProfileBody,
    "title": TitleBody,
    "timer": TimerBody,
    "poll": PollBody,
    "vote": VoteBody,
    "pin": PinBody,
    "read": ReadBody,
}

SHAPES: dict[str, tuple[type[Any], ...]] = {
    "charter": (zsr.Charter,),
    "roster": (zsr.Roster,),
    "member": (zsr.Member,),
    "device": (zsr.Device,),
    "gone": (zsr.Gone,),
    "consumed": (zsr.Consumed,),
    "leaf": (zsr.Leaf,),
    "consent": (zsr.Consent,),
    "sponsor": (zsr.Sponsor,),
    "commit": (zsr.Commit,),
    "slots": (zsr.Slots,),
    "slot": (zsr.Slot,),
    "header": (Header,),
    "item": (ItemContent,),
    "top": (Top,),
    "want": (Want,),
    "seen": (Seen,),
    "resync": (zsr.Resync,),
    "request": (zsr.Request,),
    "invite": (zsr.Invite,),
    "revoke": (zsr.Revoke,),
    "share": (zsr.Share,),
    "relay": (zsr.Relay,),
    "login": (zsr.Login,),
    "unit": (zsr.Unit,),
    "link": (Link,),
    "demo": (DemoContent,),
    "join": (JoinContent,),
    "welcome": (WelcomeContent,),
    "share_psk": (SharedPsk,),
    "share_box": (zsr.ShareContent,),
    "direct": (DirectContent,),
    "own": (OwnLink, OwnLabel),
    "note": (TypingNote, WantNote, ServingNote),
    "request_link": (zsr.LinkBody,),
    "link_share": (zsr.SealedShare,),
    "request_out": (zsr.LastBody,),
    "request_split": (SplitBody,),
    **{name: (shape,) for name, shape in EVENT_BODIES.items()},
    "evidence": (zsr.Proof,),
    "sealed": (zsr.SealedJoin,),
    "waiting": (zsr.PendingJoin,),
}
"""Every line of SHAPES in room-3-wire with its dataclass; several where the line has alternatives."""

LISTS = (zsr.Slots, zsr.LastBody)
"""Dataclasses that are a bare list in JavaScript."""

CONSTANTS: dict[type[Any], dict[str, int]] = {
    Link: {"version": 1},
    OwnLink: {"what": 1},
    OwnLabel: {"what": 2},
    TypingNote: {"what": 1},
    WantNote: {"what": 2},
    ServingNote: {"what": 3},
    zsr.DownEvent: {"kind": 1},
    zsr.DownCommit: {"kind": 2},
}
ORDERED: dict[type[Any], tuple[str, ...]] = {
    zsr.Member: ("member",),
    zsr.Device: ("sigpub",),
    zsr.Gone: ("dev",),
    zsr.Consumed: ("inv_id", "dev"),
    zsr.Slot: ("dev",),
}
FRAMES: dict[str, list[type[Any]]] = {
    "TO_RELAY": list(zsr.UP.values()),
    "TO_CLIENT": [*zsr.DOWN.values(), zsr.DownCommit],
}


def frame_name(shape: type[Any]) -> str:
    """UpNonce and DownNoFile are nonce and nofile; both kinds of entry are entry."""
    entries = {zsr.DownEvent: "entry", zsr.DownCommit: "entry"}
    return entries.get(shape) or shape.__name__.removeprefix("Up").removeprefix("Down").lower()


def type_name(codec: Any) -> str:
    """A codec as room-3-wire's tables write it."""
    match codec:
        case zsr.Uint(size):
            return f"u{8 * size}"
        case zsr.Fixed(size):
            return str(size)
        case zsr.Var(4):
            return "V"
        case zsr.Utf8():
            return "v"
        case LongText():
            return "T"
        case ItemCodec():
            return "item"
        case zsr.ListOf(item):
            return f"[{type_name(item)}]"
        case zsr.Record(shape) if shape is zsr.Signed:
            return "S"
        case zsr.Record(shape):
            same = {zsr.Last: "top"}
            return same.get(shape) or next(name for name, shapes in SHAPES.items() if shape in shapes)
    raise AssertionError(f"{codec} has no counterpart")


def row_of(shape: type[Any]) -> str:
    """A dataclass as a row of room-3-wire's tables."""
    record, constants = zsr.record_of(shape), CONSTANTS.get(shape, {})
    fields = [(name.rstrip("_"), type_name(codec)) for name, codec in zip(record.names, record.codecs, strict=True)]
    if shape in LISTS:
        return fields[0][1]
    words = [f"{name}={constants[name]}" if name in constants else f"{name}:{kind}" for name, kind in fields]
    return " ".join(words).replace("version=1", "=1")


def to_js(codec: Any, value: Any) -> Any:
    """A value as room-3-wire would have it."""
    match codec:
        case zsr.ListOf(item):
            return [to_js(item, each) for each in value]
        case ItemCodec() if value.salt is None:
            return {"header": value.header, "sig": value.sig, "part": 0}
        case ItemCodec():
            return {"header": value.header, "sig": value.sig, "part": 1, "salt": value.salt, "body": value.body}
        case zsr.Record(shape) if shape is zsr.Signed:
            return zsr.encode(value)
        case zsr.Record(shape) if shape in LISTS or shape is ItemContent:
            return to_js(codec.codecs[0], getattr(value, codec.names[0]))
        case zsr.Record(_, names, codecs):
            made = {
                name.rstrip("_"): to_js(inner, getattr(value, name)) for name, inner in zip(names, codecs, strict=True)
            }
            made.pop("version", None)
            return made
    return value


def as_js(value: Any) -> Any:
    return to_js(zsr.record_of(type(value)), value)


def filled(size: int) -> st.SearchStrategy[bytes]:
    """Bytes whose content matters to nobody, cheap to draw however long."""
    return st.binary(min_size=1, max_size=3).map(lambda seed: hashlib.shake_128(seed).digest(size))


def place(keys: tuple[str, ...], value: Any) -> bytes:
    return b"".join(getattr(value, key) for key in keys)


def values(codec: Any) -> st.SearchStrategy[Any]:
    """What a codec can write."""
    match codec:
        case zsr.Uint(size):
            top = min(256**size - 1, zsr.MAX_UINT)
            return st.sampled_from([0, 1, top]) | st.integers(0, top)
        case zsr.Fixed(size):
            return filled(size)
        case zsr.Var():
            return st.binary(max_size=40)
        case zsr.Utf8() | LongText():
            return st.text(max_size=20)
        case ItemCodec():
            bare = st.builds(Item, st.binary(max_size=40), filled(64))
            return bare | st.builds(Item, st.binary(max_size=40), filled(64), filled(16), st.binary(max_size=40))
        case zsr.ListOf(zsr.Record(shape) as item) if shape in ORDERED:
            keys = ORDERED[shape]
            some = st.lists(values(item), max_size=3, unique_by=lambda each: place(keys, each))
            return some.map(lambda each: tuple(sorted(each, key=lambda one: place(keys, one))))
        case zsr.ListOf(item):
            return st.lists(values(item), max_size=3).map(tuple)
        case zsr.Record(shape, names, codecs):
            constants = CONSTANTS.get(shape, {})
            pairs = zip(names, codecs, strict=True)
            return st.builds(
                shape, **{n: st.just(constants[n]) if n in constants else values(inner) for n, inner in pairs}
            )
    raise AssertionError(f"{codec} has no values")


def objects(*shapes: type[Any]) -> st.SearchStrategy[Any]:
    return st.one_of([values(zsr.record_of(shape)) for shape in shapes])


@st.composite
def altered(draw: st.DrawFn, original: bytes) -> bytes:
    """Bytes near the original: a flipped bit, a cut, an insertion, a piece doubled, a field set to its highest."""
    at = draw(st.integers(0, max(len(original) - 1, 0)))
    to = draw(st.integers(at, len(original)))
    flipped = bytearray(original or b"\x00")
    flipped[at] ^= 1 << draw(st.integers(0, 7))
    size = draw(st.sampled_from([1, 2, 4, 8]))
    choices = [
        bytes(flipped),
        original[:at],
        original[:at] + original[to:],
        original[:at] + draw(st.binary(min_size=1, max_size=4)) + original[at:],
        original[:to] + original[at:],
        original[:at] + b"\xff" * size + original[at + size :],
        original + draw(st.binary(min_size=1, max_size=4)),
    ]
    return draw(st.sampled_from(choices))


REFUSED = "refused"


def js_outcome(node: Node, target: str, data: object) -> Any:
    try:
        return node.call(target, data)
    except Refused as refused:
        return REFUSED if refused.code == "bad" else refused.code


def shape_outcome(shapes: tuple[type[Any], ...], data: bytes) -> Any:
    """What Python makes of the bytes of a shape; alternatives are told apart by their first byte."""
    for shape in shapes:
        constants = CONSTANTS.get(shape)
        if constants is None or data[:1] == bytes(constants.values()):
            try:
                return as_js(zsr.decode(shape, data))
            except zsr.Bad:
                return REFUSED
    return REFUSED


def frame_outcome(direction: str, data: bytes) -> Any:
    try:
        frame = zsr.decode_frame(data)
    except zsr.Bad:
        return REFUSED
    return {"name": frame_name(type(frame)), **as_js(frame)} if type(frame) in FRAMES[direction] else REFUSED


DECODERS = {"TO_RELAY": "Wire.toRelay", "TO_CLIENT": "Wire.toClient"}
ALL_FRAMES = [(direction, shape) for direction, shapes in FRAMES.items() for shape in shapes]
every_shape = pytest.mark.parametrize("name", SHAPES)
every_frame = pytest.mark.parametrize(
    ("direction", "shape"), [pytest.param(*each, id=each[1].__name__) for each in ALL_FRAMES]
)
wire_examples = settings(max_examples=12, deadline=None)
many_examples = settings(max_examples=150, deadline=None)


class TestTables:
    """Both languages write their layouts down once; these are the same layouts."""

    def test_no_shape_is_missing(self, node: Node) -> None:
        assert set(node.call("Wire.SHAPES")) == set(SHAPES)

    @every_shape
    def test_a_shape_has_the_same_fields_in_the_same_order(self, node: Node, name: str) -> None:
        line = node.call("Wire.SHAPES")[name].replace(";256]", "]")
        if name == "item":
            assert line == "header:V sig:64 | part=0 | part=1 salt:16 body:V"
        elif len(SHAPES[name]) > 1:
            assert line == "".join(f" | {row_of(shape)}" for shape in SHAPES[name]).strip()
        else:
            assert line == row_of(SHAPES[name][0])

    @every_frame
    def test_a_frame_has_the_same_type_and_fields(self, node: Node, direction: str, shape: type[Any]) -> None:
        line = node.call(f"Wire.{direction}")[frame_name(shape)]
        head, *alternatives = line.split(" | ")
        lines = [f"{head} {tail}" for tail in alternatives] or [head]
        assert f"=0x{zsr.CODES[shape].hex()} {row_of(shape)}".strip() in lines

    @pytest.mark.parametrize("direction", FRAMES)
    def test_no_frame_is_missing(self, node: Node, direction: str) -> None:
        assert set(node.call(f"Wire.{direction}")) == {frame_name(shape) for shape in FRAMES[direction]}

    def test_the_kinds_of_events_are_numbered_as_published(self, node: Node) -> None:
        assert node.call("Wire.KINDS") == ["", *EVENT_BODIES]

    def test_lists_ascend_by_the_same_fields(self, node: Node) -> None:
        assert node.call("Wire.ORDER") == {type_name(zsr.record_of(s)): list(keys) for s, keys in ORDERED.items()}


class TestAgreement:
    """Random objects have the same bytes in both languages and come back as they were."""

    @every_shape
    @given(data=st.data())
    @wire_examples
    def test_shapes(self, node: Node, name: str, data: st.DataObject) -> None:
        value = data.draw(objects(*SHAPES[name]))
        encoded = zsr.encode(value)
        assert node.call(f"Wire.enc.{name}", as_js(value)) == encoded
        assert node.call(f"Wire.dec.{name}", encoded) == as_js(value)
        assert zsr.decode(type(value), encoded) == value

    @every_frame
    @given(data=st.data())
    @wire_examples
    def test_frames(self, node: Node, direction: str, shape: type[Any], data: st.DataObject) -> None:
        value, name = data.draw(objects(shape)), frame_name(shape)
        encoded = zsr.encode_frame(value)
        assert node.call(f"{DECODERS[direction]}.encode", name, as_js(value)) == encoded
        assert node.call(f"{DECODERS[direction]}.message", name, as_js(value)) == zsr.join_frames([encoded])
        assert node.call(f"{DECODERS[direction]}.decode", encoded) == {"name": name, **as_js(value)}
        assert zsr.decode_frame(encoded) == value

    @given(data=st.data(), name=st.sampled_from(list(SHAPES)))
    @many_examples
    def test_both_make_the_same_of_altered_shapes(self, node: Node, data: st.DataObject, name: str) -> None:
        broken = data.draw(altered(zsr.encode(data.draw(objects(*SHAPES[name])))))
        made = js_outcome(node, f"Wire.dec.{name}", broken)
        assert made == shape_outcome(SHAPES[name], broken)
        if made != REFUSED:
            assert node.call(f"Wire.enc.{name}", made) == broken

    @given(data=st.data(), which=st.sampled_from(ALL_FRAMES))
    @many_examples
    def test_both_make_the_same_of_altered_frames(
        self, node: Node, data: st.DataObject, which: tuple[str, type[Any]]
    ) -> None:
        direction, shape = which
        broken = data.draw(altered(zsr.encode_frame(data.draw(objects(shape)))))
        made = js_outcome(node, f"{DECODERS[direction]}.decode", broken)
        assert made == frame_outcome(direction, broken)
        if made != REFUSED:
            assert node.call(f"{DECODERS[direction]}.encode", made["name"], made) == broken

    @given(broken=st.binary(max_size=60), direction=st.sampled_from(list(FRAMES)))
    @many_examples
    def test_both_make_the_same_of_noise(self, node: Node, broken: bytes, direction: str) -> None:
        assert js_outcome(node, f"{DECODERS[direction]}.decode", broken) == frame_outcome(direction, broken)

    @given(frames=st.lists(st.binary(max_size=20), min_size=1, max_size=4))
    @wire_examples
    def test_messages_of_several_frames(self, node: Node, frames: list[bytes]) -> None:
        message = zsr.join_frames(frames)
        assert node.call("Wire.joinFrames", frames) == message
        assert node.call("Wire.splitFrames", message) == frames == zsr.split_frames(message)

    def test_a_small_frame_does_not_keep_its_message_alive_and_a_large_one_is_not_copied(self, node: Node) -> None:
        message = zsr.join_frames([b"small", bytes(70_000)])
        frames = node.keep("Wire.splitFrames", message)
        buffers = [node.keep("Reflect.get", node.keep("Reflect.get", frames, n), "buffer") for n in range(2)]
        assert [node.call("Reflect.get", each, "byteLength") for each in buffers] == [5, len(message)]

    @pytest.mark.parametrize("message", [b"", b"\x00", b"\x00\x00\x00\x02a", b"\x00\x00\x00\x01ab", b"\xff" * 4])
    def test_a_message_without_a_whole_frame_is_refused(self, node: Node, message: bytes) -> None:
        assert js_outcome(node, "Wire.splitFrames", message) == REFUSED
        with pytest.raises(zsr.Bad):
            zsr.split_frames(message)


A16, B16, C32, D32 = b"A" * 16, b"B" * 16, b"C" * 32, b"D" * 32
SIG = b"S" * 64
FIXED: dict[str, tuple[Any, bytes]] = {
    "consent": ({"room": C32, "member": A16, "dev": B16, "inv_id": bytes(16)}, C32 + A16 + B16 + bytes(16)),
    "want": ({"dev": A16, "i": 2**53 - 1}, A16 + bytes.fromhex("001fffffffffffff")),
    "text": ({"expires": 1, "text": "hé"}, bytes.fromhex("00000001 00000003 68c3a9")),
    "reaction": (
        {"target": {"dev": A16, "i": 258, "hash": C32}, "emoji": "\U0001f600"},
        A16 + bytes.fromhex("0000000000000102") + C32 + bytes.fromhex("0004 f09f9880"),
    ),
    "link": (
        {"room": C32, "kind": 1, "charter_no": 7, "inviter": A16, "relay_fp": B16, "tok": D32},
        b"\x01" + C32 + bytes.fromhex("01 0000000000000007") + A16 + B16 + D32,
    ),
    "item": ({"header": b"hh", "sig": SIG, "part": 0}, bytes.fromhex("00000002 6868") + SIG + b"\x00"),
    "direct": (
        {
            "items": [{"header": b"", "sig": SIG, "part": 1, "salt": A16, "body": b"b"}],
            "commits": [],
            "rosters": [b"r"],
            "own": [large(b"m") + SIG],
        },
        b"\x00\x01"
        + bytes(4)
        + SIG
        + b"\x01"
        + A16
        + bytes.fromhex("00000001 62 0000 0001 00000001 72 0001 00000001 6d")
        + SIG,
    ),
    "own": (
        {"what": 2, "room": C32, "sender": A16, "recipient": B16, "label": "hé"},
        b"\x02" + C32 + A16 + B16 + bytes.fromhex("0003 68c3a9"),
    ),
    "note": ({"what": 3, "author": A16, "file_id": B16}, b"\x03" + A16 + B16),
    "slots": ([], b"\x00\x00"),
}
FIXED_FRAMES: dict[str, tuple[str, dict[str, Any], bytes]] = {
    "ping": ("TO_RELAY", {"token": 5}, bytes.fromhex("19 0000000000000005")),
    "head": ("TO_RELAY", {}, b"\x1a"),
    "dack": ("TO_RELAY", {"tids": [1, 2]}, bytes.fromhex("0d 0002 0000000000000001 0000000000000002")),
    "put": (
        "TO_RELAY",
        {"ref": 9, "file_id": A16, "index": 1, "count": 2, "ct": b"x"},
        bytes.fromhex("15 00000009") + A16 + bytes.fromhex("00000001 00000002 00000001 78"),
    ),
    "fault": (
        "TO_CLIENT",
        {"ref": 3, "code": "full", "text": "", "retry_ms": 5000},
        bytes.fromhex("82 00000003 0004 66756c6c 0000 00001388"),
    ),
    "entry": (
        "TO_CLIENT",
        {"no": 4, "kind": 2, "unit": b"u"},
        bytes.fromhex("86 0000000000000004 02 00000001 75"),
    ),
    "requests": ("TO_CLIENT", {"requests": [large(b"m") + SIG]}, bytes.fromhex("8d 0001 00000001 6d") + SIG),
}


class TestFixedBytes:
    """Bytes worked out by hand."""

    @pytest.mark.parametrize("name", FIXED)
    def test_shapes(self, node: Node, name: str) -> None:
        value, data = FIXED[name]
        assert node.call(f"Wire.enc.{name}", value) == data
        assert node.call(f"Wire.dec.{name}", data) == value

    @pytest.mark.parametrize("name", FIXED_FRAMES)
    def test_frames(self, node: Node, name: str) -> None:
        direction, value, data = FIXED_FRAMES[name]
        assert node.call(f"{DECODERS[direction]}.encode", name, value) == data
        assert node.call(f"{DECODERS[direction]}.decode", data) == {"name": name, **value}

    def test_what_the_page_encodes_goes_to_the_relay_and_what_it_decodes_comes_from_there(self, node: Node) -> None:
        assert node.call("Wire.encodeFrame", "live", {"type": 2, "epoch": 0, "ch": C32, "ct": b""})[0] == 0x07
        assert node.call("Wire.decodeFrame", FIXED_FRAMES["fault"][2])["name"] == "fault"
        assert js_outcome(node, "Wire.decodeFrame", FIXED_FRAMES["ping"][2]) == REFUSED

    def test_a_signed_object_is_its_bytes_and_a_signature(self, node: Node) -> None:
        whole = node.call("Wire.signed", b"m", SIG)
        assert whole == large(b"m") + SIG
        assert node.call("Wire.unsigned", whole) == {"m": b"m", "sig": SIG}
        assert js_outcome(node, "Wire.unsigned", whole + b"\x00") == REFUSED
        assert js_outcome(node, "Wire.unsigned", whole[:-1]) == REFUSED

    def test_a_link_of_the_page_is_a_link_of_the_oracle(self, node: Node) -> None:
        made = link(new_device(C32), point(new_key()), kind=1, charter_no=3)
        text = node.call("Bytes.b64u", node.call("Wire.enc.link", as_js(made)))
        assert text == zsr.b64u(zsr.encode(made))
        assert node.call("Wire.dec.link", node.call("Bytes.unb64u", text)) == as_js(made)


ANY_GONE = {"dev": A16, "member": A16, "last": 1, "hash": C32}
ROSTER = {"room": C32, "no": 1, "charter": D32, "signer": A16, "members": [], "gone": [], "consumed": []}
TIGHT_UNIT = {"charter": b"", "roster": b"", "body": b"", "sig": SIG, "tag": C32, "slots": b""}
UNFIT = {
    "a field is missing": ("want", {"dev": A16}),
    "bytes of a wrong length": ("want", {"dev": A16[:-1], "i": 1}),
    "text for bytes": ("want", {"dev": "A" * 16, "i": 1}),
    "bytes for text": ("title", {"title": b"x"}),
    "bytes for a number": ("want", {"dev": A16, "i": b"\x01"}),
    "a number below zero": ("want", {"dev": A16, "i": -1}),
    "a fraction": ("want", {"dev": A16, "i": 0.5}),
    "2^53": ("want", {"dev": A16, "i": 2**53}),
    "256 for a u8": ("timer", {"seconds": 2**32}),
    "a lone surrogate": ("title", {"title": "\ud800"}),
    "a text over 64 KiB": ("title", {"title": "x" * 65536}),
    "no list": ("slots", {"length": 0}),
    "a list out of order": ("roster", {**ROSTER, "gone": [{**ANY_GONE, "dev": B16}, ANY_GONE]}),
    "an item twice": ("roster", {**ROSTER, "gone": [ANY_GONE, ANY_GONE]}),
    "a chain of 257": ("unit", {**TIGHT_UNIT, "chain": [b""] * 257}),
    "an unknown alternative": ("note", {"what": 4}),
    "no alternative": ("note", {}),
    "nothing": ("consent", None),
}


class TestStrictness:
    """What does not fit its line has no bytes, and bytes that do not fit are nothing."""

    @pytest.mark.parametrize(("name", "value"), UNFIT.values(), ids=UNFIT.keys())
    def test_an_unfit_object_is_refused(self, node: Node, name: str, value: object) -> None:
        with pytest.raises(Refused) as caught:
            node.call(f"Wire.enc.{name}", value)
        assert caught.value.code == "bad"

    def test_a_chain_of_256_fits(self, node: Node) -> None:
        whole = node.call("Wire.enc.unit", {**TIGHT_UNIT, "chain": [b""] * 256})
        assert len(node.call("Wire.dec.unit", whole)["chain"]) == 256
        longer = whole[:-1026] + (257).to_bytes(2, "big") + bytes(4 * 257)
        assert js_outcome(node, "Wire.dec.unit", longer) == REFUSED == shape_outcome((zsr.Unit,), longer)

    @pytest.mark.parametrize(
        ("name", "data"),
        [
            pytest.param("link", b"\x02" + FIXED["link"][1][1:], id="a link of version 2"),
            pytest.param("item", FIXED["item"][1][:-1] + b"\x02", id="an item of part 2"),
            pytest.param("note", b"\x00", id="a note of 0"),
            pytest.param("note", b"\x04" + A16 + B16, id="a note of 4"),
            pytest.param("note", b"", id="a note of nothing"),
        ],
    )
    def test_a_constant_of_a_newer_version_is_refused(self, node: Node, name: str, data: bytes) -> None:
        assert js_outcome(node, f"Wire.dec.{name}", data) == REFUSED

    def test_an_entry_of_an_unknown_kind_is_refused(self, node: Node) -> None:
        data = FIXED_FRAMES["entry"][2]
        later = data[:9] + b"\x03" + data[10:]
        assert js_outcome(node, "Wire.decodeFrame", later) == REFUSED == frame_outcome("TO_CLIENT", later)

    def test_an_unknown_frame_has_no_bytes(self, node: Node) -> None:
        with pytest.raises(Refused):
            node.call("Wire.encodeFrame", "fault", {})

    def test_attack_11_no_flipped_bit_of_a_frame_passes_for_the_same_frame(self, node: Node) -> None:
        """Every frame has one spelling, in both languages: Wire and zsr.Reader.

        Seen to fail without: `end()` of the page's Reader.
        """
        for name, (direction, value, data) in FIXED_FRAMES.items():
            for bit in range(8 * len(data)):
                flipped = bytearray(data)
                flipped[bit // 8] ^= 1 << bit % 8
                made = js_outcome(node, f"{DECODERS[direction]}.decode", bytes(flipped))
                assert made != {"name": name, **value}
                assert made == frame_outcome(direction, bytes(flipped))

    @pytest.mark.parametrize("number", [2**53, 2**63, 2**64 - 1])
    def test_attack_30_a_counter_of_2_to_the_53_or_more_is_refused(self, node: Node, number: int) -> None:
        """Reader: no number that JavaScript cannot count exactly.

        Seen to fail without: `value > Number.MAX_SAFE_INTEGER` in Reader.
        """
        data = A16 + number.to_bytes(8, "big")
        assert js_outcome(node, "Wire.dec.want", data) == REFUSED == shape_outcome((Want,), data)

    @pytest.mark.parametrize(
        ("name", "data"),
        [
            pytest.param("slots", b"\xff\xff", id="a list of 65,535 slots in no bytes"),
            pytest.param("slots", b"\xff\xff" + bytes(138), id="a list of 65,535 slots in one"),
            pytest.param("roster", C32 + bytes(8) + C32 + A16 + b"\xff\xff" + bytes(18), id="members of no devices"),
            pytest.param("resync", C32 + C32 + b"\xff\xff\xff\xff" + bytes(100), id="4 GiB of leaf in 100 bytes"),
            pytest.param("title", b"\xff\xff" + b"x" * 100, id="64 KiB of title in 100 bytes"),
        ],
    )
    def test_attack_30_a_length_beyond_the_bytes_is_refused(self, node: Node, name: str, data: bytes) -> None:
        """Reader.take: no more than there is.

        Seen to fail without: `n > this.left` in Reader.take and end().
        """
        assert js_outcome(node, f"Wire.dec.{name}", data) == REFUSED == shape_outcome(SHAPES[name], data)

    def test_attack_30_a_count_is_held_against_the_bytes_before_any_item_is_read(self, node: Node) -> None:
        """Reader.list: a count is held against the bytes that are left.

        Seen to fail without: `count * least > this.left` in Reader.list.
        """
        data = b"\xff\xff" + bytes(139 * 3)
        with pytest.raises(Refused, match="65535 items announced where 417 bytes are left"):
            node.call("Wire.dec.slots", data)


class TestBytes:
    """Room 1: text, base64url, hexadecimal, integers, padding."""

    @given(data=st.binary(max_size=80))
    @wire_examples
    def test_base64url_and_hexadecimal(self, node: Node, data: bytes) -> None:
        text = base64.urlsafe_b64encode(data).decode().rstrip("=")
        assert node.call("Bytes.b64u", data) == text
        assert node.call("Bytes.unb64u", text) == data
        assert node.call("Bytes.hex", data) == data.hex()
        assert node.call("Bytes.unhex", data.hex()) == data

    @pytest.mark.parametrize("text", ["A", "AA==", "AB", "AAB", "A+", "A/", "A A", "Ä", "AAAAA", "\U0001f600"])
    def test_base64url_has_one_spelling(self, node: Node, text: str) -> None:
        assert js_outcome(node, "Bytes.unb64u", text) == REFUSED

    @pytest.mark.parametrize("text", ["0", "0A", "0x00", "zz", " 00"])
    def test_hexadecimal_has_one_spelling(self, node: Node, text: str) -> None:
        assert js_outcome(node, "Bytes.unhex", text) == REFUSED

    @given(text=st.text(max_size=40))
    @wire_examples
    def test_text(self, node: Node, text: str) -> None:
        assert node.call("Bytes.utf8", text) == text.encode()
        assert node.call("Bytes.text", text.encode()) == text

    @pytest.mark.parametrize("text", ["\ud800", "a\udc00", "\ud800b", "\udfff\ud800"])
    def test_a_lone_surrogate_has_no_bytes(self, node: Node, text: str) -> None:
        assert js_outcome(node, "Bytes.utf8", text) == REFUSED

    @pytest.mark.parametrize(
        "data", [b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xe2\x82", b"a\x80"]
    )
    def test_bytes_that_are_no_utf8_are_no_text(self, node: Node, data: bytes) -> None:
        assert js_outcome(node, "Bytes.text", data) == REFUSED

    def test_a_byte_order_mark_is_text_like_any_other(self, node: Node) -> None:
        assert node.call("Bytes.text", b"\xef\xbb\xbfa") == "\ufeffa"

    @pytest.mark.parametrize("size", [0, 1, 252, 253, 508, 509, 65532, 65533, 131068, 131069])
    def test_padding_fills_its_bucket(self, node: Node, size: int) -> None:
        padded = node.call("Bytes.pad", b"x" * size)
        assert padded == pad(b"x" * size)
        assert node.call("Bytes.unpad", padded) == b"x" * size

    @pytest.mark.parametrize(
        "padded",
        [
            pytest.param(b"", id="nothing"),
            pytest.param(bytes(255), id="no bucket"),
            pytest.param(bytes(512), id="a larger bucket"),
            pytest.param(b"\x00\x00\x00\xfd" + bytes(252), id="more than there is"),
            pytest.param(b"\xff\xff\xff\xff" + bytes(252), id="4 GiB"),
            pytest.param(bytes(255) + b"\x01", id="not zero"),
        ],
    )
    def test_padding_has_one_spelling(self, node: Node, padded: bytes) -> None:
        assert js_outcome(node, "Bytes.unpad", padded) == REFUSED

    @given(one=st.binary(max_size=4), other=st.binary(max_size=4))
    @wire_examples
    def test_byte_strings_have_pythons_order(self, node: Node, one: bytes, other: bytes) -> None:
        order = node.call("Bytes.compare", one, other)
        assert (order > 0) - (order < 0) == (one > other) - (one < other)
        assert node.call("Bytes.equal", one, other) is (one == other)
        assert node.call("Bytes.concat", one, other) == one + other


# ======================================================================================================================
# Suite: published vectors, named outcomes, and Python libraries that open what JavaScript sealed and the reverse.
# ======================================================================================================================

P256 = ec.SECP256R1()
P256_P = 2**256 - 2**224 + 2**192 + 2**96 - 1
P256_N = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
P256_B = 0x5AC635D8AA3A93E7B3EBBD55769886BC651D06B0CC53B0F63BCE3C3E27D2604B
SEGMENT = 262_144
FIRST_SEGMENT = SEGMENT - 40 - 16
NEXT_SEGMENT = SEGMENT - 16
FAST_ROUNDS = 1_000

suite_examples = settings(max_examples=25, deadline=None)
some_bytes = st.binary(max_size=600)


def stretch(key: bytes, context: bytes, length: int) -> bytes:
    """HKDF-Expand, RFC 5869 section 2.3."""
    return HKDFExpand(hashes.SHA256(), length, context).derive(key)


class Pair(NamedTuple):
    """A P-256 pair known here and, after `kem` or `signer`, in node."""

    key: ec.EllipticCurvePrivateKey
    pub: bytes

    @property
    def pkcs8(self) -> bytes:
        form = serialization.PrivateFormat.PKCS8
        return self.key.private_bytes(serialization.Encoding.DER, form, serialization.NoEncryption())

    def kem(self, node: Node) -> Any:
        return node.call("Suite.importKem", self.pkcs8, self.pub)

    def signer(self, node: Node) -> Any:
        return node.call("Suite.importSigner", self.pkcs8, self.pub)


def pair_of(scalar: int | None = None) -> Pair:
    key = ec.generate_private_key(P256) if scalar is None else ec.derive_private_key(scalar, P256)
    return Pair(key, point(key))


def refusal(node: Node, target: str, *args: object) -> str:
    """The code with which a call is refused, or "accepted"."""
    try:
        node.call(target, *args)
    except Refused as refused:
        return refused.code
    return "accepted"


# Rows of three lines: number, result and comment; the public point; scalar and shared x (all but comments base64).
ECDH_POINTS = """\
1 valid normal case
BGLVvTNyr3X+haBAcV0PUCQo4HBGhosL/fph1zGv5E8mrDM6k6nnCoHNWpW1v40TmQ63QcjDiHK0oH0nWgFOMM8=
BhJGXImgI6sXhVsKa86/0/67U674QThke1NS4CwQw0Y= UwINkIsCGTKLZYtSXyZ4DjrhK82VK7Jak7wIleFxQoU=
2 acceptable compressed public key
A2LVvTNyr3X+haBAcV0PUCQo4HBGhosL/fph1zGv5E8m
BhJGXImgI6sXhVsKa86/0/67U674QThke1NS4CwQw0Y= UwINkIsCGTKLZYtSXyZ4DjrhK82VK7Jak7wIleFxQoU=
3 valid shared secret has x-coordinate that satisfies x**2 = 0
BFj9QWiod5VgPisEOQKFvcpuV95gJ/4hHdnSXiIS0p5iCA02vSJNdAVQkpXu0CoXFQ4DsxT5baN0RbDR0pN30Sw=
Cg1iKkfkj2vBA4rOQ4xvUoqgCtK9HaXxPuRr9fYz1xo= AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=
4 valid shared secret has x-coordinate p-3
BKHswkvw0AU9I/X9gN3xc1oZJQOdwRdsWBp+eVFjyLm6LLWk5NUQn0UnV14xN7g9eam8s/rv+Q0qyivtcbtSPn4=
Cg1iKkfkj2vBA4rOQ4xvUoqgCtK9HaXxPuRr9fYz1xo= /////wAAAAEAAAAAAAAAAAAAAAD///////////////w=
8 valid shared secret has x-coordinate 2**96 + 0
BEyWlbdmhDT8hXaayxDw7c+HqWt9XcNHtGuzBLCx0yZ/z12ZO/8qjHdICCMaNPQbM2Z9jr6v0AaJ+jqb+gWkDBw=
Cg1iKkfkj2vBA4rOQ4xvUoqgCtK9HaXxPuRr9fYz1xo= AAAAAAAAAAAAAAAAAAAAAAAAAAEAAAAAAAAAAAAAAAA=
45 valid y-coordinate of the public key is small
BDy8GzG0PxfcIA3XDClEwExssbCCggwjSjALBbd2OETHT94KTvk4h0aXkycOsv8UgofakmWwM0+eJgmqwW6K1QM=
Cg1iKkfkj2vBA4rOQ4xvUoqgCtK9HaXxPuRr9fYz1xo= f///////////////7s8iMP////////////////////8=
51 valid y-coordinate of the public key is large
BDy8GzG0PxfcIA3XDClEwExssbCCggwjSjALBbd2OETHsCH1sAbHeLpobNjxTQDrfXglbZtPzLBh2fZVPpF1Kvw=
Cg1iKkfkj2vBA4rOQ4xvUoqgCtK9HaXxPuRr9fYz1xo= f///////////////7s8iMP////////////////////8=
63 valid y-coordinate of the public key has many trailing 0's
BJoPDj3TFBe72eKYvAaKttXDZzOvJu1nZ29BDIBLiyyhT9N9C1nlyJNIap2Ra/+qju3YxcoyJPc1Vbxqxpq6uM8=
Cg1iKkfkj2vBA4rOQ4xvUoqgCtK9HaXxPuRr9fYz1xo= f///////////////ygiQEf////////////////////8=
69 valid ephemeral key has x-coordinate that satisfies x**2 = 0
BAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAZkhceA4vg9ckM71dhKBrtlQcKvMdrocXKL+FahdPk/Q=
VdVfEbuNoeoxi8pyZvA3ZmJEHqhycKogd/G3cMSFSkg= z+QHfIcwsck4RYHTa/9VQrxBfJ7/XCr8uYzIgpss6Eg=
70 valid ephemeral key has x-coordinate p-3
BP////8AAAABAAAAAAAAAAAAAAAA///////////////8GXGb6/auoT8lyW39fHH1Il1Mj8CetaCrnznpF45VwSE=
VdVfEbuNoeoxi8pyZvA3ZmJEHqhycKogd/G3cMSFSkg= TCVwLRDNEux+d8Txl5I3l21qqAnGRddaWdOZpSN363s=
111 valid edge case for computation of x with projective coordinates
BIUesbhpnRzAHGtgSBOXl9qzmByST574G9H0ZMMYLIcJAShbKufLyr/VvMuUQeszdrSRWV9goewh2+n5crwyq74=
5GHFteY9dbTIwSO/i5zUXnEq8I9+LklKjyVaydgOBYs= bQP+9rNUhA9GQvuhyPzp99HNqK4ntsoBUQ+0RXP9r/s=
117 valid edge case for computation of x with projective coordinates in left to right addition chain
BGau2nbXOYPK8t6SGvOJJozv/SePuezPkocCsfQnG0Px1kbWz4vBGg75fNZMCKEfcvlK9OazyYcLjrOlsDbAT7g=
5GHFteY9dbTIwSO/i5zUXnEq8I9+LklKjyVaydgOBYs= hGLp33lg7OMwieWpjWHaT6rzZg+T1198xeOXtkzRWR0=
199 valid point with coordinate x = 0
BAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAZkhceA4vg9ckM71dhKBrtlQcKvMdrocXKL+FahdPk/Q=
gJxGHYs5FjU3/49e9bl35M25gOcOOKfuCzfMh2cp6f8= QOr7hQyn4I8Z7mRH8Zauq/KS4nOXhW4QbmCmyLSM2yc=
228 valid point with coordinate y = 1
BAnnjU72DQX3UPZjYgkJK8Q8vda0fhGp3iCp/rKlC7lsAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAE=
gJxGHYs5FjU3/49e9bl35M25gOcOOKfuCzfMh2cp6f8= KPZ3V6zCixaEunb/1TSu1C1FuLPxC4KlaZQW7/cZmnQ=
285 valid point with coordinate y = 1 in precomputation or right to left addition chain
BJpEh/z86DlmiOdEnglf6APKolPUvXxm28YmHMnZ+IOlDlJRuuKcWlzfoxvGEQVnGoigGEZzmBWNNbiIKSN8C/8=
gJxGHYs5FjU3/49e9bl35M25gOcOOKfuCzfMh2cp6f8= foP9LD1xO8hdbYXZB4s6CEKCTUEOir3gTaD9ccfZRwU=
315 valid edge case private key
BDECjzN3/I8rGWftqrkCE6ytDan1CJfwj1dTf3jxFnRHQ6GTAYk2O73irEy9FknNxvRRrdcd0vFqioZ/KxfKoWs=
AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAM= haC1hRmyjnCmlOxRmPcsS/2rqjCnD3FDtbHNdTb3Fso=
330 valid CVE-2017-8932
BAI4GYE6yWmEcFkCjqiKHzDfvN4D/HkdOiUsa0EhGILq+T5K5DPMEs8qQ/wO8mQAwOElUIIkzbZJOA8lR5FIpK0=
KiZfi8vcr5TVhRkUHleBJMtA1kpQH7qcEYR7KJZbxzc= TU3oDxU0hQ0mEHWZfjBJMhoIZAgtJKkXhjNmwHJPWuM=
332 invalid point is not on curve
BAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=
fkqlT3FL8B34XFAmm+o6hnIfhK/nT3tB6lirzzR06I0= -
335 invalid point is not on curve
BAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA/////wAAAAEAAAAAAAAAAAAAAAD///////////////8=
fkqlT3FL8B34XFAmm+o6hnIfhK/nT3tB6lirzzR06I0= -
340 invalid point is not on curve
BP////8AAAABAAAAAAAAAAAAAAAA///////////////+AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=
fkqlT3FL8B34XFAmm+o6hnIfhK/nT3tB6lirzzR06I0= -
347 invalid point is not on curve
BP////8AAAABAAAAAAAAAAAAAAAA/////////////////////wAAAAEAAAAAAAAAAAAAAAD///////////////8=
fkqlT3FL8B34XFAmm+o6hnIfhK/nT3tB6lirzzR06I0= -
348 invalid empty
-
fkqlT3FL8B34XFAmm+o6hnIfhK/nT3tB6lirzzR06I0= -
349 invalid invalid public key
Av1L9hdjtGWB/ZF01iNRbPPIHt1A4p/6J3f7bLCuPOU1
b5U/r/NZnmx2LX9Mq/7tCS3irdHfG8V0jGy7clzzVFg= -
350 invalid public key is a low order point on twist
A+/d47Mocqnv/PO5TL9zqns5+Wg+zpEhuYUhZ/Tj2mCb
0n7fD/W2trRldT5xWDcDMsFTtGihvgh60PSQvbmeXwI= -
"""

# The public key; the message in hexadecimal and the signature.
ECDSA_SIGNATURES = """\
1 valid signature malleability
BCknsQUSuuPt3P5GeCgSi60pAyaZGfcIYGnIxN9scyg4x3h5ZOqsAOWSH7FJimD0YGdms9loUAFVjRqXTnNBUT4=
313233343030 K6OovmuU1eyAptnRGQpDbv/lDYWh7uhZuMxq+b1cLhhM1guFXUQvWzx7EetsTgrnUl/nEPq5qnx3pn955vrddg==
2 invalid replaced r by r + n
BCknsQUSuuPt3P5GeCgSi60pAyaZGfcIYGnIxN9scyg4x3h5ZOqsAOWSH7FJimD0YGdms9loUAFVjRqXTnNBUT4=
313233343030 ASujqL1rlNXtgKbZ0RkKQ268zAgzSQaG3qyGNby5v1NpALMp9Hmiu9Clw4TuFJOx9RhqhxOcrF30CHwTS0kVaEfb
4 invalid replaced r by n - r
BCknsQUSuuPt3P5GeCgSi60pAyaZGfcIYGnIxN9scyg4x3h5ZOqsAOWSH7FJimD0YGdms9loUAFVjRqXTnNBUT4=
313233343030 1FxXQJRrKhR/WSYu5vW8kL0B7SgFKLYrOu1fyT8G9zmzKfR5orvQpcOE7hSTsfUYaocTnKxd9Ah8E0tJFWhH2w==
7 invalid replaced s by s + n
BCknsQUSuuPt3P5GeCgSi60pAyaZGfcIYGnIxN9scyg4x3h5ZOqsAOWSH7FJimD0YGdms9loUAFVjRqXTnNBUT4=
313233343030 AbMp9Hiiu9Cmw4TuFJOx9Rgnbg5KU3WSjW/NFgwRy20sALMp9Hmiu9Clw4TuFJOx9RhqhxOcrF30CHwTS0kVaEfb
9 invalid replaced s by s + 2**256
BCknsQUSuuPt3P5GeCgSi60pAyaZGfcIYGnIxN9scyg4x3h5ZOqsAOWSH7FJimD0YGdms9loUAFVjRqXTnNBUT4=
313233343030 AbMp9Hmiu9Clw4TuFJOx9RhqhxOcrF30CHwTS0kVaEfbALMp9Hmiu9Clw4TuFJOx9RhqhxOcrF30CHwTS0kVaEfb
11 invalid Signature with special case values r=0 and s=0
BCknsQUSuuPt3P5GeCgSi60pAyaZGfcIYGnIxN9scyg4x3h5ZOqsAOWSH7FJimD0YGdms9loUAFVjRqXTnNBUT4=
313233343030 AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA==
18 invalid Signature with special case values r=1 and s=0
BCknsQUSuuPt3P5GeCgSi60pAyaZGfcIYGnIxN9scyg4x3h5ZOqsAOWSH7FJimD0YGdms9loUAFVjRqXTnNBUT4=
313233343030 AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAEAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA==
25 invalid Signature with special case values r=n and s=0
BCknsQUSuuPt3P5GeCgSi60pAyaZGfcIYGnIxN9scyg4x3h5ZOqsAOWSH7FJimD0YGdms9loUAFVjRqXTnNBUT4=
313233343030 /////wAAAAD//////////7zm+q2nF56E87nKwvxjJVEAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA==
32 invalid Signature with special case values r=n - 1 and s=0
BCknsQUSuuPt3P5GeCgSi60pAyaZGfcIYGnIxN9scyg4x3h5ZOqsAOWSH7FJimD0YGdms9loUAFVjRqXTnNBUT4=
313233343030 /////wAAAAD//////////7zm+q2nF56E87nKwvxjJVAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA==
46 invalid Signature with special case values r=p and s=0
BCknsQUSuuPt3P5GeCgSi60pAyaZGfcIYGnIxN9scyg4x3h5ZOqsAOWSH7FJimD0YGdms9loUAFVjRqXTnNBUT4=
313233343030 /////wAAAAEAAAAAAAAAAAAAAAD///////////////8AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA==
61 valid special case hash
BCknsQUSuuPt3P5GeCgSi60pAyaZGfcIYGnIxN9scyg4x3h5ZOqsAOWSH7FJimD0YGdms9loUAFVjRqXTnNBUT4=
343236343739373234 Fq6pZKL2UG1veMgckfx+i97X05dzhEjeHhmg7FgL8mYlLNdiEwxmZ8/ot7xH0n14OR6OgMV40c04w/8DO+ko6Q==
62 valid special case hash
BCknsQUSuuPt3P5GeCgSi60pAyaZGfcIYGnIxN9scyg4x3h5ZOqsAOWSH7FJimD0YGdms9loUAFVjRqXTnNBUT4=
37313338363834383931 nMmL4jR9Rpv0dt/Ca5tzPfLSbW71JK+RfGZbrMsjyIIJNJZFnv/i2NcHJ7gkYvYdDsG3hHkp0Q6mMdrLFrVsMg==
115 valid k*G has a large x-coordinate
BArZlQAojUZpQAMdcqn1RFpNQ3hGQIVb8KaYdNLeX+EDxQEebvLELc1Q1dPSn5mubrosgMkkT0xUIvCXn/DDul4=
313233343030 AAAAAAAAAAAAAAAAAAAAAEMZBVNY6GF7DEY1PQOc2qv/////AAAAAP//////////vOb6racXnoTzucrC/GMlTg==
116 invalid r too large
BArZlQAojUZpQAMdcqn1RFpNQ3hGQIVb8KaYdNLeX+EDxQEebvLELc1Q1dPSn5mubrosgMkkT0xUIvCXn/DDul4=
313233343030 /////wAAAAEAAAAAAAAAAAAAAAD///////////////z/////AAAAAP//////////vOb6racXnoTzucrC/GMlTg==
117 valid r,s are large
BKsF/Z0N4muc5vSBllLZ/GkZPQqjmPD7qAE+CcWCIEVUGSNScSKMeGdZCV0St1rwaS3UED8Z9qjDL0lDWh6bjUU=
313233343030 /////wAAAAD//////////7zm+q2nF56E87nKwvxjJU//////AAAAAP//////////vOb6racXnoTzucrC/GMlTg==
118 valid r and s^-1 have a large Hamming weight
BICYTzmh/zioamiqQgG2vl37/s+HYhlxCwe632/dTGxWEf65c5DZgm56Bt+0GHHJQNdEFe08rCCJ8URQGbtV7ZU=
313233343030 f/////////////////////////////////////////2QkTW9tnmShhcPXq0t5PZRFFP+UJFPPfLeVKNjg9+N1A==
120 valid small r and s
BKca9k3lEmpKTgK3ki1mzpQVzoikydJVFNkQgshyWslXXUdyPI++WAuzaf7JwmZdjjCkNbmTJkVILnyfEehyKWs=
313233343030 AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAUAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAQ==
121 invalid incorrect size of signature
BKca9k3lEmpKTgK3ki1mzpQVzoikydJVFNkQgshyWslXXUdyPI++WAuzaf7JwmZdjjCkNbmTJkVILnyfEehyKWs=
313233343030 BQE=
136 invalid r is larger than n
BNA+sJkTzCDGqNAHDw2NKn9jUn+vpEEX/Oa9HvKqSuPEbV3z9FrFj6M0xtECOBsxILeiRVYA3K/z0ahFUU8Sv0Y=
313233343030 /////wAAAAD//////////7zm+q2nF56E87nKwvxjJVcAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAABw==
137 invalid s is larger than n
BDpyR2KRVxGTtNEJssN7WfKAfo/pz/2ATqze2QPnfKDaWS28dP7gynUIzHvCgrDFGhQyhv9TxgExZo56CSnk7QQ=
313233343030 AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAb/////AAAAAP//////////vOb6racXnoTzucrC/HX72A==
152 valid s == 1
BIrrNopwJ6TWSr3qNzkMDB1qJvOZ4tlzTeHrPQ4ZNzh0Bb0Tg0cV4duum4dc8HvVXhtmkcf3U2rvOxm/ekrfV20=
313233343030 VVVVVQAAAABVVVVVVVVVVT73qOSNB9+BppNDllQhDHAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAQ==
153 invalid s == 0
BIrrNopwJ6TWSr3qNzkMDB1qJvOZ4tlzTeHrPQ4ZNzh0Bb0Tg0cV4duum4dc8HvVXhtmkcf3U2rvOxm/ekrfV20=
313233343030 VVVVVQAAAABVVVVVVVVVVT73qOSNB9+BppNDllQhDHAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA==
169 invalid point at infinity during verify
BLUz1Gld1bjF4HdX5V5uUW9+LIj6AjniP2Do7AfdcPKHGxNO5YzFgyeEVoY/M8OoXYgffUo5hQFD4p1OrwCa/kc=
313233343030 f////4AAAAB//////////95zfVbTi89CedzlYX4xkqhVVVVVAAAAAFVVVVVVVVVVPveo5I0H34Gmk0OWVCEMcA==
170 valid edge case for signature malleability
BPUNNxuRv7HX0U4TI1I7w6qMvyxX+eKE3mKMi0U2eHuG+UrYh6yU1SckfNLn0MixKRxVPJcwQFOAsUy7IJ9fot0=
313233343030 f////4AAAAB//////////95zfVbTi89CedzlYX4xkql/////gAAAAH//////////3nN9VtOLz0J53OVhfjGSqA==
172 valid u1 == 1
BGnaA2RzTS5TD+zpQBkmX++3gaDxsI9siJe99lV5J8i4ZtLTx9zVGLI9cmlg8Gmtcakz2G74q7zOiyD3HiqEcAI=
313233343030 VVVVVQAAAABVVVVVVVVVVT73qOSNB9+BppNDllQhDHC7WlL0L5ySYe1DYfWUIqHjADbnwysnDIgHpBn+ymBQIw==
173 valid u1 == n - 1
BNitwAAjqO3AJXbitj4+MGIaRx4rIyBiAYe/Bnoawf8yM+K1DsCYB6zLNhMf/5XtEqCahrTqlpCqMoYVdrojYuE=
313233343030 VVVVVQAAAABVVVVVVVVVVT73qOSNB9+BppNDllQhDHBEpa0K0GNtnxK8ngpr3V4cvLAS6nvwkfzsFbDEMgLVLg==
174 valid u2 == 1
BDYjrJc87QpW+m2ILwOn1cftygLPx7JAH6s2kNvnWreFjbBpCOZLKGE9pyV+c385eT2o5xO6BkO5LpuzJSvn+P4=
313233343030 VVVVVQAAAABVVVVVVVVVVT73qOSNB9+BppNDllQhDHBVVVVVAAAAAFVVVVVVVVVVPveo5I0H34Gmk0OWVCEMcA==
175 valid u2 == n - 1
BM8E6nfpYiUj2JS5P/UtwwJ7MZWVA7b6OJDl4EJj+SLx6FKPt8AGs5g8i4QA5XtO1xdAwvOXVDiCEZm+3q7Ksuk=
313233343030 VVVVVQAAAABVVVVVVVVVVT73qOSNB9+BppNDllQhDHCqqqqqAAAAAKqqqqqqqqqqfe9RyRoPvwNNJocsqEIY4Q==
204 valid point duplication during verification
BFuBL9Uhqvppg1qEnM5vvetpg7RC0kRP5w4TTAJ/xGljg4pA8qNgkukATpLY2UDPVjhVDOZyzouNThXrpUmSSek=
313233343030 byNHyrfddoWP4FVaw7yZBIxKrK/ftry+BepsQsSTRWm7cmZgI1eTqplXph524AwsQ1EJz5oV3WJNU/QwEEeFaw==
205 invalid duplication bug
BFuBL9Uhqvppg1qEnM5vvetpg7RC0kRP5w4TTAJ/xGljfHW/DFyfbRf/sW0nJr8wqceq8xqNMXRyseoUWrZtthY=
313233343030 byNHyrfddoWP4FVaw7yZBIxKrK/ftry+BepsQsSTRWm7cmZgI1eTqplXph524AwsQ1EJz5oV3WJNU/QwEEeFaw==
206 invalid point with x-coordinate 0
BGrdqCuQJhsPMZ+qDYeGZaa22kl/CckDF2Iiw0rP73KmR+b1DcxArV2bWfdgK7Ii+tcaQb9eH530lZo2TGLkiNk=
313233343030 AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAFVVVVVAAAAAFVVVVVVVVVVPveo5I0H34Gmk0OWVCEMcA==
208 invalid comparison with point at infinity
BN2G07X0oT6FEQg7eAAggcU/9GfxHr2YpRpjPbdmZdJQRdXIIAyJ8voQ2Ek0kibSHY367W/41cs+G34XR068GPc=
313233343030 VVVVVQAAAABVVVVVVVVVVT73qOSNB9+BppNDllQhDHAzMzMzAAAAADMzMzMzMzMzJcfLvFSeUudj8fVaMno6qQ==
209 valid extreme value for k and edgecase s
BE/qVbMssyrKDBLEzQq/tOZLD1pRbleMAWWRqT9aD7zF19P9ELK+ZoxUeyEva7FMiPD+zTiopLLHhe075izksoA=
313233343030 fPJ7GI0DT36KUjgDBLUaw8CJaeJ38hs1pgtI/EdmmXhVVVVVAAAAAFVVVVVVVVVVPveo5I0H34Gmk0OWVCEMcA==
221 invalid public key shares x-coordinate with generator
BGsX0fLhLEJH+Lzm5WOkQPJ3A32BLeszoPShOUXYmMKWT+NC4v4af5uO5+tKfA+eFivOM1drMV7Oy7ZAaDe/UfU=
313233343030 u1pS9C+ckmHtQ2H1lCKh4wA258MrJwyIB6QZ/spgUCMkkkkkbbbbbdttttttttttrUWRhoWVqO5r9fhk/3vgwg==
225 valid pseudorandom signature
BASq7HNjVybyE/uKnmTaO4Yy5BSVqUTQBFtSLrpyQPrVh9kxV5iqo6W6AXdXh87QXqr3tOCfyB1tGqVG6DZdUl0=
- spKmGTOfblZ6MFyVHA3LzELRbkfyGfnpjnbgnYdws0oBd+YEksWoJC928Hv+NmG95Z7CoXzlvS2rKr69+Jpi4g==
229 valid x-coordinate of the public key has many trailing 0's
BE8zfM/WdyaoBeTxYArihJ3zgH7KEXOAI5+9gWkAAAAA7Z3qEkzIw5ZBZBHpiMMPQn61BK9DoxRs1d9+pgZm1oU=
4d657373616765 1DTiYqSeq3eB41OjVl5IJVDdD9Xe+gE8fyl0Xv81afGbDAqT8mf7YFL9gHe+dpwrmJUxlde8EN6EQhgwXGuheg==
247 valid y-coordinate of the public key is small
BLy7KRTHnwReqm7LvGEoFrO+XS1nlnB9gSXp+FHBivAVAAAAABNSu0oPoupMzrmrY91oSt5aESe88wCmmKcZO8I=
4d657373616765 MSMEKEBVYNy4j7WmRoNq6psjoj3Zc9y+gBTIe4sg6wcPk0TW6BLOFmZGdHaUpBsKr5c3ThnzxfuL1649m9C+/w==
250 valid y-coordinate of the public key is large
BLy7KRTHnwReqm7LvGEoFrO+XS1nlnB9gSXp+FHBivAV/////uytRLbwXRWzMUZUnCKXtSKl7thDDP9ZZ1jmxD0=
4d657373616765 19cMWBrp4/ZtxqSAvwN64j+KHkohNv5LA6pp8Mols1aJxGD4paXCu7qWLIo+6DOkE+hWWOYqWeKvQdkSfMRyJA==
253 valid r = 5, x = 5 is valid
BCZNeWoNq5s3bTTupv4pfd4ce3PlOUS8lsjx6KaFC7bJz1MIAg7tRgxkndrmHU74u3mVgRPxBr769PGIdtEqXmQ=
68656c6c6f2c20776f726c64 AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAX/////AAAAAP//////////vOb6racXnoTzucrC/GMlTg==
254 invalid r = 6, x = 5 is invalid
BK3XZnflSpLnm77janDhdUg4Jz7Es5KV5AGKWHKQp/xz8kDWJWQslD5hDYDZU8XGuKEnYKYkujuQoLeQJ1Xhrnk=
68656c6c6f2c20776f726c64 AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAb/////AAAAAP//////////vOb6racXnoTzucrC/GMlTg==
255 invalid r = 5 + n, x = 5 is invalid; r was not reduced mod n
BCZNeWoNq5s3bTTupv4pfd4ce3PlOUS8lsjx6KaFC7bJz1MIAg7tRgxkndrmHU74u3mVgRPxBr769PGIdtEqXmQ=
68656c6c6f2c20776f726c64 /////wAAAAD//////////7zm+q2nF56E87nKwvxjJVb/////AAAAAP//////////vOb6racXnoTzucrC/GMlTg==
256 invalid r = n - 3, x = n - 2 is invalid
BOfkndgoEkMnRP7+cj9/aWYyFK0bhcArJlC0ygNUdDoyUiPFHEFfRXrsacsBm749J1hbOPi3nDnf6mwnwvDYFGo=
68656c6c6f2c20776f726c64 /////wAAAAD//////////7zm+q2nF56E87nKwvxjJU7/////AAAAAP//////////vOb6racXnoTzucrC/GMlTg==
257 valid r = 3, x = n + 3 is the smallest possible x with a reduction
BM4kyZAy1SrG6tI8CuPsaO9B5RooH9RXgIyDE219zOkOj3oVS1UenznFknk1eqSRsqYr3rwrt4YTiD/HKTbAV+A=
68656c6c6f2c20776f726c64 AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAP/////AAAAAP//////////vOb6racXnoTzucrC/GMlTg==
258 invalid r = 4, x = n + 3 is invalid
BMmBx13f05EDh+sUcJj+VljEOqqjTGgc1tUUtq1ba6ptFPvdtTpubbGOkGArxg8uc21iV2X38sykvnb07szxLBg=
68656c6c6f2c20776f726c64 AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAT/////AAAAAP//////////vOb6racXnoTzucrC/GMlTg==
259 invalid r = p - n + 5, x = 5 is invalid; r is too large to compare r + n with x
BA7FBbwZsUpD4FZ4zM8HpEPT6HGi4ZtopNqRhZoGUPMkdzAOT2TpmC2U3/XSlEKLs3zJvmYRfK6cOJ0tSV9ouYc=
68656c6c6f2c20776f726c64 AAAAAAAAAAAAAAAAAAAAAEMZBVNY6GF7DEY1PQOc2rP/////AAAAAP//////////vOb6racXnoTzucrC/GMlTg==
260 invalid r = 2^256 - n + 5, x = 5 is invalid; r + n is too large to compare r + n with x, and overflows 2^256 bits
BNQs4h5zDz0qhOlJgoV0tNzut31PiVVnNfNPugMCjuPtMtr4v9Pwp6CCEXCED04DIFZyI4azXZvdT09FBpb0+1I=
68656c6c6f2c20776f726c64 AAAAAP////8AAAAAAAAAAEMZBVJY6GF7DEY1PQOc2rT/////AAAAAP//////////vOb6racXnoTzucrC/GMlTg==
262 valid s = n - 2^128
BGlVpywNrU7WA1b3aSZJuVH6jqR0vxzJVJuWxo3keC364BL/wk6SxyvnH/JiLuflSdy1nntwj2khxNTqKVEuKro=
68656c6c6f2c20776f726c64 X206oNMnwTcCUT1CmfKXqxgvz2cPlikfqxlXLnpuAcT/////AAAAAP/////////+vOb6racXnoTzucrC/GMlUQ==
"""

# Key and nonce; aad, plaintext, ciphertext with tag.
GCM_BOXES = """\
91 valid Ktv
kqzj40jNghCSzZIao1RjdCmatGIJaRvCi4dS0X8SPCA= ABEiM0RVZneImaq7
AAAAAP////8= AAECAwQFBgcICQ== 4nq90tKlPS8Ta5pKJXlSkwG8+3HHjUBg9Sw=
92 valid Ktv
KdOkT4cj3GQCORAMNlQjoxKTSsgCOSEqw980IaIJgSM= ABEiM0RVZneImaq7
qrvM3e7/ - Kn13+lJrglDLKWB4kmtQIA==
93 valid Pseudorandom
gLoxksgDzpZeo3HV/wc88PQ7aiq1drIIQm4RQJwJubA= TaW/jf1YUsHqEjed
- - R3GnxASkcpZs6o9zyL/heg==
94 valid Pseudorandom
zFa2gFUut1AI9UhLTLgD+lBj69bquR9qtq70kWp2YnM= meI+xImFvM3uq2Dx
- Kg== BmM8HpcD73RP//tA7fnRQ1U=
97 valid Pseudorandom
WdTq+03gz8fT25mo9UsV17OfCsyNppdjsBnBaZ+HZ0o= L8sbOKmecbhHQK2b
- VJs2WvkT87CBExzLa4JViA== 9YwWaQEi11NWkH/Za1cPyih1LCAVMJKBj6uiozRkDW4=
98 valid Pseudorandom
OyRY2BduFiHAzCTAwOJMHoDXL37pFJpLFmF2YpYW0BE= Raqj5dFtLULcA0Rd
- P/FRSxxQORWRjwwMMQlKbh8= c6a29F9szFEx4H8sqh8uL1Ytc3nsHbWVLU6V0ww0Cxsd
103 valid Pseudorandom
/wCJ7ocKSjn2RbCl2ndPelkR6WlvycrWRkUsKqhZWhI= vCp3V9DOLYsfFMzZ
lyq04GOQyq6Pmd1uIYe+bH/ywIokvhbv dIsoAxYh2V7mGBK0tPR9BMb8L/M= qSnufmfHovkbvOxjiaPK9Dq0kwXr7Gd0uVXniVkcgi2rc54S
128 valid special case
ABEiM0RVZneImaq7zN3u/xAhMkNUZXaHmKm6y9zt/g8= AAAAAAAAAAAAAAAA
- VhAI+gemj1xhKFzQE0ZOrw== Iyk+mwfKfRsMrnzEialzs/////////////////////8=
129 valid special case
ABEiM0RVZneImaq7zN3u/xAhMkNUZXaHmKm6y9zt/g8= ////////////////
- xhUiRM6hl40+C8J0z4wLOw== fLb8fGq8AJ7+lVGpnzakIQAAAAAAAAAAAAAAAAAAAAA=
130 invalid Flipped bit 0 in tag
AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8= UFFSU1RVVldYWVpb
- ICEiIyQlJicoKSorLC0uLw== sgYUV8B1n8F0nxdO4cyt+p3o/vbYqxvxv4hyMuq1kN0=
137 invalid Flipped bit 63 in tag
AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8= UFFSU1RVVldYWVpb
- ICEiIyQlJicoKSorLC0uLw== sgYUV8B1n8F0nxdO4cyt+pzo/vbYqxtxv4hyMuq1kN0=
146 invalid Flipped bit 121 in tag
AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8= UFFSU1RVVldYWVpb
- ICEiIyQlJicoKSorLC0uLw== sgYUV8B1n8F0nxdO4cyt+pzo/vbYqxvxv4hyMuq1kN8=
148 invalid Flipped bit 127 in tag
AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8= UFFSU1RVVldYWVpb
- ICEiIyQlJicoKSorLC0uLw== sgYUV8B1n8F0nxdO4cyt+pzo/vbYqxvxv4hyMuq1kF0=
151 invalid Flipped bits 63 and 127 in tag
AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8= UFFSU1RVVldYWVpb
- ICEiIyQlJicoKSorLC0uLw== sgYUV8B1n8F0nxdO4cyt+pzo/vbYqxtxv4hyMuq1kF0=
152 invalid all bits of tag flipped
AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8= UFFSU1RVVldYWVpb
- ICEiIyQlJicoKSorLC0uLw== sgYUV8B1n8F0nxdO4cyt+mMXAQknVOQOQHeNzRVKbyI=
153 invalid Tag changed to all zero
AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8= UFFSU1RVVldYWVpb
- ICEiIyQlJicoKSorLC0uLw== sgYUV8B1n8F0nxdO4cyt+gAAAAAAAAAAAAAAAAAAAAA=
154 invalid tag changed to all 1
AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8= UFFSU1RVVldYWVpb
- ICEiIyQlJicoKSorLC0uLw== sgYUV8B1n8F0nxdO4cyt+v////////////////////8=
155 invalid msbs changed in tag
AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8= UFFSU1RVVldYWVpb
- ICEiIyQlJicoKSorLC0uLw== sgYUV8B1n8F0nxdO4cyt+hxofnZYK5txPwjysmo1EF0=
156 invalid lsbs changed in tag
AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8= UFFSU1RVVldYWVpb
- ICEiIyQlJicoKSorLC0uLw== sgYUV8B1n8F0nxdO4cyt+p3p//fZqhrwvolzM+u0kdw=
"""


def decoded(text: str) -> bytes:
    return b"" if text == "-" else base64.b64decode(text)


def cases(table: str) -> list[Any]:
    """The rows of a table, three lines each, as (valid, fields) with number and comment as the test's id."""
    lines = table.splitlines()
    rows = []
    for head, second, third in zip(lines[::3], lines[1::3], lines[2::3], strict=True):
        number, result, comment = head.split(" ", 2)
        rows.append(pytest.param(result, [*second.split(), *third.split()], id=f"{number} {comment}"))
    return rows


def hpke_vectors() -> Iterator[Any]:
    with cryptography_vectors.open_vector_file("HPKE/test-vectors.json", "r") as file:
        for vector in json.load(file):
            if (vector["kem_id"], vector["kdf_id"], vector["aead_id"]) == (0x0010, 0x0001, 0x0002):
                yield {
                    name: bytes.fromhex(value) if isinstance(value, str) else value for name, value in vector.items()
                }


def hpke_vector(mode: int) -> tuple[Any, bytes, bytes, bytes]:
    """The vector of a mode with aad, plaintext and box of its first sealing, the only one a single shot makes."""
    vector = next(vector for vector in hpke_vectors() if vector["mode"] == mode)
    aad, pt, ct = (bytes.fromhex(vector["encryptions"][0][name]) for name in ("aad", "pt", "ct"))
    return vector, aad, pt, vector["enc"] + ct


def vector_pair(vector: Any, whose: str) -> Pair:
    return pair_of(int.from_bytes(vector[f"sk{whose}m"], "big"))


class TestHpkeVectors:
    """RFC 9180 appendix A.3's suite with AES-256-GCM: the published keys give the published bytes."""

    def test_base_mode_seals_and_opens_the_published_box(self, node: Node) -> None:
        vector, aad, pt, box = hpke_vector(0)
        recipient, ephemeral = vector_pair(vector, "R"), vector_pair(vector, "E").kem(node)
        assert node.call("Suite.sealBase", recipient.pub, vector["info"], aad, pt, ephemeral) == box
        assert node.call("Suite.openBase", recipient.kem(node), vector["info"], aad, box) == pt

    def test_psk_mode_seals_and_opens_the_published_box(self, node: Node) -> None:
        vector, aad, pt, box = hpke_vector(1)
        recipient, ephemeral = vector_pair(vector, "R"), vector_pair(vector, "E").kem(node)
        psk = (vector["psk"], vector["psk_id"])
        assert node.call("Suite.sealPsk", recipient.pub, *psk, vector["info"], aad, pt, ephemeral) == box
        assert node.call("Suite.openPsk", recipient.kem(node), *psk, vector["info"], aad, box) == pt

    @pytest.mark.parametrize("mode", [1, 2, 3], ids=["psk", "auth", "auth_psk"])
    def test_base_mode_opens_no_box_of_another_mode(self, node: Node, mode: int) -> None:
        vector, aad, _, box = hpke_vector(mode)
        recipient = vector_pair(vector, "R").kem(node)
        assert refusal(node, "Suite.openBase", recipient, vector["info"], aad, box) == "sealed"

    @pytest.mark.parametrize("mode", [0, 2, 3], ids=["base", "auth", "auth_psk"])
    def test_psk_mode_opens_no_box_of_another_mode(self, node: Node, mode: int) -> None:
        vector, aad, _, box = hpke_vector(mode)
        recipient, psk = vector_pair(vector, "R").kem(node), hpke_vector(1)[0]
        args = (recipient, psk["psk"], psk["psk_id"], vector["info"], aad, box)
        assert refusal(node, "Suite.openPsk", *args) == "sealed"


class TestExpandWithLabelVectors:
    """crypto-basics of the MLS working group, cipher suite 2; only the prefix differs from ours."""

    @pytest.mark.parametrize(
        ("label", "secret", "context", "length", "out"),
        [
            pytest.param(
                "ExpandWithLabel",
                "194d4e81c3f9fcfbc40e2cf3f5b104d0f51e71b5a7f1e4ddd70cc8d4a3620e5f",
                "453c420d63ecb1a8da89d3569770c42bad572864f3709d1e9dd19a0961cbf5e1",
                16,
                "5710680c556304f4aec67aab4abbc1b1",
                id="expand_with_label",
            ),
            pytest.param(
                "DeriveSecret",
                "7165576616048aa145d20f7c1d460e2d9d8bbde882bc3bb0750d50e369809f99",
                "",
                32,
                "1ecafd3d40cb32cae416e09bc01da56357d00cb094f74e3c69c2969216e50afc",
                id="derive_secret",
            ),
            pytest.param(
                "DeriveTreeSecret",
                "62db8a06300e98dbfd2c831e18544873cec3a2c1ba852fcee8423ff3c08e397e",
                f"{2694881440:08x}",
                32,
                "298ab27d2e621d9fc079126d9ffce5259fa0d58697267b40bfadf805b01d0d3c",
                id="derive_tree_secret",
            ),
        ],
    )
    def test_the_published_output(
        self, node: Node, label: str, secret: str, context: str, length: int, out: str
    ) -> None:
        made = node.call("Suite.expand", bytes.fromhex(secret), label, bytes.fromhex(context), length, "MLS 1.0 ")
        assert made.hex() == out

    def test_no_published_label_passes_without_its_prefix(self, node: Node) -> None:
        assert refusal(node, "Suite.expand", bytes(32), "ExpandWithLabel", b"", 32) == "bad"

    @pytest.mark.parametrize(("size", "length"), [(63, b"\x3f"), (64, b"\x40\x40"), (16384, b"\x80\x00\x40\x00")])
    def test_a_context_length_is_a_varint_in_its_shortest_form(self, node: Node, size: int, length: bytes) -> None:
        context = bytes(size)
        label = b"\x00\x20" + b"\x0aZSR1 epoch" + length + context
        assert node.call("Suite.expand", bytes(32), "epoch", context, 32) == stretch(bytes(32), label, 32)


def wycheproof_box(dh: bytes, enc: bytes, recipient: Pair) -> bytes:
    """An HPKE base box (empty info, aad and plaintext) of an encapsulation whose Diffie-Hellman value is known."""
    kem, hpke = b"HPKE-v1KEM\x00\x10", b"HPKE-v1HPKE\x00\x10\x00\x01\x00\x02"
    prk = mac(bytes(32), kem + b"eae_prk" + dh)
    shared = stretch(prk, b"\x00\x20" + kem + b"shared_secret" + enc + recipient.pub, 32)
    hashed = [mac(bytes(32), hpke + label) for label in (b"psk_id_hash", b"info_hash")]
    context, secret = b"\x00" + b"".join(hashed), mac(shared, hpke + b"secret")
    key = stretch(secret, b"\x00\x20" + hpke + b"key" + context, 32)
    nonce = stretch(secret, b"\x00\x0c" + hpke + b"base_nonce" + context, 12)
    return enc + AESGCM(key).encrypt(nonce, b"", b"")


class TestWycheproof:
    """Project Wycheproof's cases that a careless suite gets wrong."""

    @pytest.mark.parametrize(("result", "fields"), cases(ECDH_POINTS))
    def test_ecdh_with_an_extreme_point_opens_and_with_no_point_is_refused(
        self, node: Node, result: str, fields: list[str]
    ) -> None:
        enc, scalar, dh = map(decoded, fields)
        recipient = pair_of(int.from_bytes(scalar, "big"))
        box = wycheproof_box(dh, enc, recipient)
        if result == "valid":
            assert node.call("Suite.openBase", recipient.kem(node), b"", b"", box) == b""
        else:  # "acceptable" is a compressed point: here a point has one encoding
            assert refusal(node, "Suite.openBase", recipient.kem(node), b"", b"", box) == "sealed"
            assert refusal(node, "Suite.sealBase", enc, b"", b"", b"") == "point"

    @pytest.mark.parametrize(("result", "fields"), cases(ECDSA_SIGNATURES))
    def test_a_signature_verifies_exactly_where_it_is_valid(self, node: Node, result: str, fields: list[str]) -> None:
        pub, message, sig = decoded(fields[0]), fields[1].strip("-"), decoded(fields[2])
        assert node.call("Suite.verifyRaw", pub, bytes.fromhex(message), sig) is (result == "valid")

    @pytest.mark.parametrize(("result", "fields"), cases(GCM_BOXES))
    def test_aes_gcm_opens_exactly_where_the_tag_is_valid(self, node: Node, result: str, fields: list[str]) -> None:
        key, nonce, aad, plaintext, box = map(decoded, fields)
        if result == "valid":
            assert node.call("Suite.open", key, aad, nonce + box) == plaintext
        else:
            assert refusal(node, "Suite.open", key, aad, nonce + box) == "sealed"


def root_mod_p(square: int) -> int | None:
    root = pow(square, (P256_P + 1) // 4, P256_P)  # p is 3 mod 4
    return root if root * root % P256_P == square else None


def point_with_small_x() -> tuple[int, int]:
    """A point whose x also has a second spelling, x + p, in 32 bytes."""
    for x in itertools.count(1):
        if (y := root_mod_p((x**3 - 3 * x + P256_B) % P256_P)) is not None:
            return x, y
    raise AssertionError("unreachable")


def spelled(x: int, y: int, first: int = 4) -> bytes:
    return bytes([first]) + x.to_bytes(32, "big") + y.to_bytes(32, "big")


SMALL_X, SMALL_Y = point_with_small_x()
GOOD = pair_of(7).pub
BAD_POINTS = {
    "next to the curve": GOOD[:-1] + bytes([GOOD[-1] ^ 1]),
    "x and y exchanged": GOOD[:1] + GOOD[33:] + GOOD[1:33],
    "x above p": spelled(SMALL_X + P256_P, SMALL_Y),
    "x is p": spelled(P256_P, root_mod_p(P256_B) or 0),
    "all ones": spelled(2**256 - 1, 2**256 - 1),
    "on another curve, b is 0": spelled(4, root_mod_p(4**3 - 3 * 4) or 0),
    "zero, zero": spelled(0, 0),
    "infinity in 65 bytes": bytes(65),
    "infinity in one byte": bytes(1),
    "nothing": b"",
    "compressed": bytes([2 + GOOD[-1] % 2]) + GOOD[1:33],
    "hybrid": bytes([6 + GOOD[-1] % 2]) + GOOD[1:],
    "one byte short": GOOD[:-1],
    "one byte over": GOOD + b"\x00",
}


class TestPoints:
    """A public key is looked at before any engine imports it."""

    @pytest.mark.parametrize("point", [GOOD, pair_of(1).pub, pair_of(P256_N - 1).pub, spelled(SMALL_X, SMALL_Y)])
    def test_points_of_the_curve_pass(self, node: Node, point: bytes) -> None:
        assert node.call("Suite.onCurve", point) is True

    @pytest.mark.parametrize("point", BAD_POINTS.values(), ids=BAD_POINTS.keys())
    def test_attack_10_what_is_no_point_is_refused_before_import(self, node: Node, point: bytes) -> None:
        """Suite.onCurve and checkPoint stand before each import.

        Seen to fail without: `=== 0n` in Suite.onCurve (any x and y below p); `x < P && y < P`; checkPoint in
        importPair.
        """
        assert node.call("Suite.onCurve", point) is False
        assert node.call("Suite.verify", point, "leaf", b"m", bytes(63) + b"\x01") is False
        pair, own = pair_of(), node.call("Suite.kem")
        assert refusal(node, "Suite.sealBase", point, b"", b"", b"") == "point"
        assert refusal(node, "Suite.sealPsk", point, bytes(32), b"id", b"", b"", b"") == "point"
        assert refusal(node, "Suite.openBase", own, b"", b"", point.ljust(65, b"\x00")[:65] + bytes(32)) == "sealed"
        assert refusal(node, "Suite.importSigner", pair.pkcs8, point) == "point"
        assert refusal(node, "Suite.importKem", pair.pkcs8, point) == "point"

    @given(x=st.integers(0, P256_P - 1), up=st.booleans())
    @suite_examples
    def test_both_languages_agree_on_what_is_on_the_curve(self, node: Node, x: int, up: bool) -> None:
        square = (x**3 - 3 * x + P256_B) % P256_P
        root = root_mod_p(square)
        y = root or 0
        point = spelled(x, P256_P - y if up and y else y)
        assert node.call("Suite.onCurve", point) is (root is not None)
        assert zsr.on_curve(point) is (root is not None)


POINT_CASES = r"""
'use strict';
const PointCases = (() => {
  const {concat, unhex, zeros} = Bytes, none = zeros(0);
  const told = async (work) => { try { await work(); return 'taken'; } catch (e) { return e.code ?? String(e); } };
  const refused = async (hex) => {
    const point = unhex(hex), own = await Suite.kem(), pkcs8 = await Suite.exportKey(await Suite.signer());
    const enc = concat(point, zeros(65)).slice(0, 65), sig = new Uint8Array(64).fill(1);
    return [await Suite.verify(point, 'leaf', none, sig), await told(() => Suite.sealBase(point, none, none, none)),
      await told(() => Suite.sealPsk(point, zeros(32), zeros(1), none, none, none)),
      await told(() => Suite.openBase(own, none, none, concat(enc, zeros(32)))),
      await told(() => Suite.importSigner(pkcs8, point)), await told(() => Suite.importKem(pkcs8, point))];
  };
  return {refused};
})();
"""


@pytest.fixture(scope="module")
def suite_page() -> Iterator[BlocksPage]:
    page = BlocksPage([*page_blocks(("room-1-bytes", "room-2-suite")), ("points", POINT_CASES)])
    yield page
    page.close()


@pytest.mark.browser
@pytest.mark.parametrize(
    "engine", [pytest.param(name, marks=pytest.mark.xdist_group(f"store-{name}")) for name in ENGINES]
)
def test_attack_10_what_is_no_point_is_refused_by_every_engine(
    browsers: Browsers, suite_page: BlocksPage, engine: str
) -> None:
    """Suite.checkPoint stands before each import, for WebKit imports any x and y and derives bits from them.

    Seen to fail without: checkPoint in importPoint, sealTo and onCurve in openWith.
    """
    user = browsers[engine].user()
    user.goto(suite_page.url)
    for name, point in BAD_POINTS.items():
        told = user.js(f"PointCases.refused({point.hex()!r})")
        assert told == [False, "point", "point", "sealed", "point", "point"], name
    errors = user.errors
    user.close()
    assert not errors


class TestSignatures:
    """Sign(l, m) = ECDSA P-256, SHA-256, over E(l, m), raw r || s."""

    @given(m=some_bytes)
    @suite_examples
    def test_python_verifies_what_javascript_signed(self, node: Node, m: bytes) -> None:
        pair = node.call("Suite.signer")
        sig = node.call("Suite.sign", pair, "event", m)
        der = utils.encode_dss_signature(int.from_bytes(sig[:32], "big"), int.from_bytes(sig[32:], "big"))
        key = ec.EllipticCurvePublicKey.from_encoded_point(P256, pair["pub"])
        key.verify(der, E("event", m), ec.ECDSA(hashes.SHA256()))

    @given(m=some_bytes)
    @suite_examples
    def test_javascript_verifies_what_python_signed(self, node: Node, m: bytes) -> None:
        pair = pair_of()
        assert node.call("Suite.verify", pair.pub, "event", m, sign(pair.key, "event", m)) is True

    def test_attack_23_a_signature_under_one_label_verifies_under_no_other(self, node: Node) -> None:
        """Suite.verify over E(label, m).

        Seen to fail without: the label in E().
        """
        pair, labels = node.call("Suite.signer"), node.call("Suite.LABELS")["sign"]
        for signed, asked in itertools.product(labels, repeat=2):
            sig = node.call("Suite.sign", pair, signed, b"m")
            assert node.call("Suite.verify", pair["pub"], asked, b"m", sig) is (signed == asked)

    def test_attack_23_a_signature_fits_no_other_content_and_no_other_key(self, node: Node) -> None:
        """Suite.verifyRaw over all of m, under this key.

        Seen to fail without: `m` in Suite.sign and verify (its first byte alone).
        """
        pair, other = node.call("Suite.signer"), node.call("Suite.signer")
        sig = node.call("Suite.sign", pair, "leaf", b"m")
        assert node.call("Suite.verify", pair["pub"], "leaf", b"m\x00", sig) is False
        assert node.call("Suite.verify", other["pub"], "leaf", b"m", sig) is False

    def test_attack_35_a_malleated_signature_verifies_so_it_can_be_no_identity(self, node: Node) -> None:
        """What the others have to live with. No line alone can be taken away: nothing is checked here."""
        pair = node.call("Suite.signer")
        sig = node.call("Suite.sign", pair, "event", b"m")
        other = sig[:32] + (P256_N - int.from_bytes(sig[32:], "big")).to_bytes(32, "big")
        assert other != sig
        assert node.call("Suite.verify", pair["pub"], "event", b"m", other) is True

    @pytest.mark.parametrize(
        "spell",
        [
            pytest.param(lambda sig: b"", id="nothing"),
            pytest.param(lambda sig: sig[:-1], id="one byte short"),
            pytest.param(lambda sig: sig + b"\x00", id="one byte over"),
            pytest.param(lambda sig: bytes(64), id="zeros"),
            pytest.param(lambda sig: bytes(32) + sig[32:], id="r is zero"),
            pytest.param(lambda sig: sig[:32] + bytes(32), id="s is zero"),
            pytest.param(lambda sig: P256_N.to_bytes(32, "big") + sig[32:], id="r is n"),
            pytest.param(lambda sig: sig[:32] + P256_N.to_bytes(32, "big"), id="s is n"),
            pytest.param(lambda sig: sig[32:] + sig[:32], id="r and s exchanged"),
            pytest.param(
                lambda sig: utils.encode_dss_signature(
                    int.from_bytes(sig[:32], "big"), int.from_bytes(sig[32:], "big")
                ),
                id="der",
            ),
        ],
    )
    def test_a_misspelled_signature_is_false_and_never_an_error(self, node: Node, spell: Any) -> None:
        pair = node.call("Suite.signer")
        sig = node.call("Suite.sign", pair, "event", b"m")
        assert node.call("Suite.verify", pair["pub"], "event", b"m", spell(sig)) is False

    def test_an_unknown_label_signs_and_verifies_nothing(self, node: Node) -> None:
        pair = node.call("Suite.signer")
        assert refusal(node, "Suite.sign", pair, "evnet", b"m") == "bad"
        assert refusal(node, "Suite.verify", pair["pub"], "evnet", b"m", bytes(64)) == "bad"

    def test_pairs_survive_storage_as_pkcs8(self, node: Node) -> None:
        signer, kem = node.call("Suite.signer"), node.call("Suite.kem")
        signer_again = node.call("Suite.importSigner", node.call("Suite.exportKey", signer), signer["pub"])
        kem_again = node.call("Suite.importKem", node.call("Suite.exportKey", kem), kem["pub"])
        sig = node.call("Suite.sign", signer_again, "leaf", b"m")
        assert node.call("Suite.verify", signer["pub"], "leaf", b"m", sig) is True
        box = node.call("Suite.sealBase", kem["pub"], b"", b"", b"x")
        assert node.call("Suite.openBase", kem_again, b"", b"", box) == b"x"

    def test_a_damaged_private_key_is_refused(self, node: Node) -> None:
        pair = pair_of()
        assert refusal(node, "Suite.importSigner", pair.pkcs8[:-3], pair.pub) == "bad"
        assert refusal(node, "Suite.importKem", b"", pair.pub) == "bad"


class TestHpkeBothWays:
    """pyhpke opens what JavaScript sealed and the reverse; nothing opens with one input changed."""

    @given(info=some_bytes, aad=some_bytes, plaintext=some_bytes)
    @suite_examples
    def test_python_opens_what_javascript_sealed(self, node: Node, info: bytes, aad: bytes, plaintext: bytes) -> None:
        pair, psk = pair_of(), b"\x07" * 32
        box = node.call("Suite.sealBase", pair.pub, info, aad, plaintext)
        assert hpke_open(pair.key, info, box, aad) == plaintext
        box = node.call("Suite.sealPsk", pair.pub, psk, b"id", info, aad, plaintext)
        assert hpke_open(pair.key, info, box, aad, psk, b"id") == plaintext

    @given(info=some_bytes, aad=some_bytes, plaintext=some_bytes)
    @suite_examples
    def test_javascript_opens_what_python_sealed(self, node: Node, info: bytes, aad: bytes, plaintext: bytes) -> None:
        pair, psk = pair_of(), b"\x07" * 32
        own = pair.kem(node)
        box = hpke_seal(pair.pub, info, plaintext, aad)
        assert node.call("Suite.openBase", own, info, aad, box) == plaintext
        box = hpke_seal(pair.pub, info, plaintext, aad, psk, b"id")
        assert node.call("Suite.openPsk", own, psk, b"id", info, aad, box) == plaintext

    @pytest.mark.parametrize("changed", ["recipient", "psk", "psk_id", "info", "aad", "enc", "ct", "cut", "empty"])
    def test_with_one_input_changed_it_does_not_open(self, node: Node, changed: str) -> None:
        pair, other = node.call("Suite.kem"), node.call("Suite.kem")
        box = node.call("Suite.sealPsk", pair["pub"], bytes(32), b"id", b"info", b"aad", b"plaintext")
        changes = {"enc": other["pub"] + box[65:], "ct": box[:-1] + bytes([box[-1] ^ 1]), "cut": box[:80], "empty": b""}
        args = [
            other if changed == "recipient" else pair,
            b"\x01" * 32 if changed == "psk" else bytes(32),
            b"di" if changed == "psk_id" else b"id",
            b"" if changed == "info" else b"info",
            b"" if changed == "aad" else b"aad",
            changes.get(changed, box),
        ]
        assert refusal(node, "Suite.openPsk", *args) == "sealed"

    @pytest.mark.parametrize(("psk", "psk_id"), [(b"", b"id"), (bytes(31), b"id"), (bytes(32), b"")])
    def test_a_short_or_nameless_psk_is_refused(self, node: Node, psk: bytes, psk_id: bytes) -> None:
        pair = node.call("Suite.kem")
        assert refusal(node, "Suite.sealPsk", pair["pub"], psk, psk_id, b"", b"", b"") == "bad"
        assert refusal(node, "Suite.openPsk", pair, psk, psk_id, b"", b"", bytes(100)) == "bad"

    def test_two_boxes_of_the_same_are_different(self, node: Node) -> None:
        pair = node.call("Suite.kem")
        assert len({node.call("Suite.sealBase", pair["pub"], b"", b"", b"x") for _ in range(3)}) == 3


key32 = st.binary(min_size=32, max_size=32)
id16 = st.binary(min_size=16, max_size=16)


class TestSchedule:
    """Every equation of the key schedule and every labelled hash, against a few lines of Python."""

    @given(m=some_bytes)
    @suite_examples
    def test_labelled_hashes_and_infos(self, node: Node, m: bytes) -> None:
        labels = node.call("Suite.LABELS")
        for label in labels["hash"]:
            assert node.call("Suite.hash", label, m) == H(label, m)
        for label in labels["info"]:
            assert node.call("Suite.info", label, m[:5], m[5:]) == E(label, m)
        assert node.call("Suite.sha256", m) == hashlib.sha256(m).digest()

    @given(init=key32, cs=key32, ch=key32, dev=id16)
    @suite_examples
    def test_an_epoch(self, node: Node, init: bytes, cs: bytes, ch: bytes, dev: bytes) -> None:
        joiner = mac(init, cs)
        assert node.call("Suite.joinerOf", init, cs) == joiner
        es = X(joiner, "epoch", ch, 32)
        keys = {label: X(es, label, b"", 32) for label in ("init", "confirm", "send")}
        assert node.call("Suite.epoch", joiner, ch) == keys
        assert node.call("Suite.tag", keys["confirm"], ch) == mac(keys["confirm"], ch)
        assert node.call("Suite.deviceKey", keys["send"], dev) == X(keys["send"], "dev", dev, 32)

    @given(tok=key32, head=some_bytes)
    @suite_examples
    def test_an_invite(self, node: Node, tok: bytes, head: bytes) -> None:
        context = H("link", head)
        made = {"inv_id": X(tok, "inv id", context, 16), "psk": X(tok, "inv psk", context, 32)}
        made["next"] = X(tok, "inv next", context, 32)
        assert node.call("Suite.invite", tok, head) == made

    def test_no_label_stands_twice_in_a_table_and_unknown_ones_are_refused(self, node: Node) -> None:
        for labels in node.call("Suite.LABELS").values():
            assert len(set(labels)) == len(labels)
        assert refusal(node, "Suite.hash", "rom", b"") == "bad"
        assert refusal(node, "Suite.info", "charter", b"") == "bad"

    def test_the_relay_labels_as_the_page_does(self, node: Node) -> None:
        assert zsr.enc("login", b"m") == E("login", b"m")
        assert zsr.Hl("commit", b"m") == H("commit", b"m")
        assert node.call("Suite.hash", "commit", b"m") == zsr.Hl("commit", b"m")


class TestEnvelopes:
    """seal(key, aad, plaintext) = nonce12 || AES-256-GCM."""

    @given(key=key32, aad=some_bytes, plaintext=some_bytes)
    @suite_examples
    def test_both_languages_open_each_others(self, node: Node, key: bytes, aad: bytes, plaintext: bytes) -> None:
        box = node.call("Suite.seal", key, aad, plaintext)
        assert AESGCM(key).decrypt(box[:12], box[12:], aad) == plaintext
        nonce = bytes(range(12))
        assert node.call("Suite.open", key, aad, nonce + AESGCM(key).encrypt(nonce, plaintext, aad)) == plaintext

    @pytest.mark.parametrize("size", [0, 11, 12, 27])
    def test_what_is_too_short_for_nonce_and_tag_does_not_open(self, node: Node, size: int) -> None:
        assert refusal(node, "Suite.open", bytes(32), b"", bytes(size)) == "sealed"

    @pytest.mark.parametrize("size", [0, 16, 24, 31, 33])
    def test_no_key_but_one_of_32_bytes_is_used(self, node: Node, size: int) -> None:
        assert refusal(node, "Suite.seal", bytes(size), b"", b"") == "bad"
        assert refusal(node, "Suite.open", bytes(size), b"", bytes(40)) == "bad"

    def test_nonces_do_not_repeat(self, node: Node) -> None:
        assert len({node.call("Suite.seal", bytes(32), b"", b"")[:12] for _ in range(100)}) == 100

    def test_attack_11_no_flipped_bit_of_a_sealed_envelope_opens(self, node: Node) -> None:
        """AES-GCM over plaintext and aad.

        Seen to fail without: `additionalData` and the tag (a constant for what does not open).
        """
        box = node.call("Suite.seal", bytes(32), b"aad", b"text")
        for bit in range(8 * len(box)):
            flipped = bytearray(box)
            flipped[bit // 8] ^= 1 << bit % 8
            assert refusal(node, "Suite.open", bytes(32), b"aad", flipped) == "sealed"


def tink_streaming(fk: bytes) -> Any:
    """Tink's own AES-GCM-HKDF streaming with our parameters and this key."""
    streaming_aead.register()
    params = aes_gcm_hkdf_streaming_pb2.AesGcmHkdfStreamingParams(
        ciphertext_segment_size=SEGMENT, derived_key_size=32, hkdf_hash_type=common_pb2.SHA256
    )
    key = aes_gcm_hkdf_streaming_pb2.AesGcmHkdfStreamingKey(params=params, key_value=fk)
    data = tink_pb2.KeyData(
        type_url="type.googleapis.com/google.crypto.tink.AesGcmHkdfStreamingKey",
        value=key.SerializeToString(),
        key_material_type=tink_pb2.KeyData.SYMMETRIC,
    )
    entry = tink_pb2.Keyset.Key(key_data=data, status=tink_pb2.ENABLED, key_id=1, output_prefix_type=tink_pb2.RAW)
    keyset = tink_pb2.Keyset(primary_key_id=1, key=[entry]).SerializeToString()
    return tink.proto_keyset_format.parse(keyset, secret_key_access.TOKEN).primitive(streaming_aead.StreamingAead)


def tink_sealed(fk: bytes, info: bytes, plaintext: bytes) -> bytes:
    class Kept(io.BytesIO):
        def close(self) -> None:
            """Tink closes what it writes to; the bytes are wanted afterwards."""

    out = Kept()
    with tink_streaming(fk).new_encrypting_stream(out, info) as stream:
        stream.write(plaintext)
    return out.getvalue()


def segments(sealed: bytes) -> list[bytes]:
    return [sealed[at : at + SEGMENT] for at in range(0, len(sealed), SEGMENT)]


def sealed_segments(node: Node, fk: bytes, info: bytes, plaintext: bytes) -> list[bytes]:
    sealer = node.call("Suite.fileSealer", fk, info, len(plaintext))
    return [sealer["seal"](index, plaintext[slice(*sealer["offsets"](index))]) for index in range(sealer["count"])]


def opened(node: Node, fk: bytes, info: bytes, size: int, sealed: list[bytes]) -> bytes:
    opener = node.call("Suite.fileOpener", fk, info, size)
    return b"".join(opener["open"](index, segment) for index, segment in enumerate(sealed))


@pytest.fixture(scope="module")
def photo(node: Node) -> tuple[bytes, bytes, list[bytes]]:
    """A file of three segments: its key, plaintext and sealed segments under b"info"."""
    fk, plaintext = b"k" * 32, bytes(i * 31 % 251 for i in range(FIRST_SEGMENT + NEXT_SEGMENT + 1000))
    return fk, plaintext, sealed_segments(node, fk, b"info", plaintext)


FILE_SIZES = {
    "nothing": 0,
    "one byte": 1,
    "one byte below a full first segment": FIRST_SEGMENT - 1,
    "a full first segment": FIRST_SEGMENT,
    "one byte in the second": FIRST_SEGMENT + 1,
    "two full segments": FIRST_SEGMENT + NEXT_SEGMENT,
    "one byte in the third": FIRST_SEGMENT + NEXT_SEGMENT + 1,
}


class TestFiles:
    """Tink's AES-GCM-HKDF streaming: Tink itself opens ours and we open Tink's."""

    @pytest.mark.parametrize("size", FILE_SIZES.values(), ids=FILE_SIZES.keys())
    def test_tink_and_the_page_open_each_others_files(self, node: Node, size: int) -> None:
        fk, info, plaintext = (
            b"k" * 32,
            E("file", b"room dev file"),
            b"0123456789abcde" * (size // 15 + 1),
        )
        plaintext = plaintext[:size]
        ours = b"".join(sealed_segments(node, fk, info, plaintext))
        assert tink_streaming(fk).new_decrypting_stream(io.BytesIO(ours), info).read() == plaintext
        theirs = segments(tink_sealed(fk, info, plaintext))
        assert opened(node, fk, info, size, theirs) == plaintext

    def test_the_layout_covers_every_byte_once(self, node: Node) -> None:
        size = FIRST_SEGMENT + 2 * NEXT_SEGMENT + 5
        opener = node.call("Suite.fileOpener", bytes(32), b"", size)
        bounds = [opener["offsets"](index) for index in range(opener["count"])]
        assert bounds[0][0] == 0
        assert bounds[-1][1] == size
        assert all(one[1] == other[0] for one, other in itertools.pairwise(bounds))

    def test_segments_open_in_any_order_after_the_first(
        self, node: Node, photo: tuple[bytes, bytes, list[bytes]]
    ) -> None:
        fk, plaintext, sealed = photo
        opener = node.call("Suite.fileOpener", fk, b"info", len(plaintext))
        parts = {index: opener["open"](index, sealed[index]) for index in (0, 2, 1)}
        assert parts[0] + parts[1] + parts[2] == plaintext

    def test_before_the_first_segment_no_other_opens(self, node: Node, photo: tuple[bytes, bytes, list[bytes]]) -> None:
        fk, plaintext, sealed = photo
        opener = node.call("Suite.fileOpener", fk, b"info", len(plaintext))
        with pytest.raises(Refused) as caught:
            opener["open"](1, sealed[1])
        assert caught.value.code == "order"

    @pytest.mark.parametrize(
        "tamper",
        [
            pytest.param(lambda s: [s[0], s[2]], id="a middle segment stripped"),
            pytest.param(lambda s: [s[0], s[0], s[2]], id="the first doubled"),
            pytest.param(lambda s: [s[0], s[1], s[1]], id="a middle one doubled"),
            pytest.param(lambda s: [s[1], s[0], s[2]], id="the first two exchanged"),
            pytest.param(lambda s: [s[0], s[2], s[1]], id="the last two exchanged"),
            pytest.param(lambda s: [s[0], s[1], s[2][:-1]], id="the last one cut"),
            pytest.param(lambda s: [s[0], s[1], s[2][:16]], id="the last one cut to a tag"),
            pytest.param(lambda s: [s[0], s[1], b""], id="the last one empty"),
            pytest.param(lambda s: [s[0], s[1][:-1], s[2]], id="a middle one cut"),
            pytest.param(lambda s: [s[0][1:], s[1], s[2]], id="the header cut"),
            pytest.param(lambda s: [b"\x29" + s[0][1:], s[1], s[2]], id="another header length"),
            pytest.param(lambda s: [s[0][:1] + b"\x00" * 32 + s[0][33:], s[1], s[2]], id="another salt"),
            pytest.param(lambda s: [s[0][:33] + b"\x00" * 7 + s[0][40:], s[1], s[2]], id="another nonce prefix"),
            pytest.param(lambda s: [s[0], s[1][:-1] + bytes([s[1][-1] ^ 1]), s[2]], id="a bit flipped"),
            pytest.param(lambda s: [s[0], s[1], s[2] + b"\x00"], id="a byte added"),
        ],
    )
    def test_attack_27_altered_segments_never_open(
        self, node: Node, photo: tuple[bytes, bytes, list[bytes]], tamper: Any
    ) -> None:
        """fileOpener: AES-GCM under a key and a nonce that hold header, index and end.

        Seen to fail without: `segment.length !== …`, header and index in fileNonce.
        """
        fk, plaintext, sealed = photo
        with pytest.raises(Refused) as caught:
            opened(node, fk, b"info", len(plaintext), tamper(sealed))
        assert caught.value.code == "sealed"

    @pytest.mark.parametrize("size", [FIRST_SEGMENT + NEXT_SEGMENT, FIRST_SEGMENT, FIRST_SEGMENT + NEXT_SEGMENT + 999])
    def test_attack_27_a_file_cut_at_a_segment_does_not_pass_for_a_shorter_one(
        self, node: Node, photo: tuple[bytes, bytes, list[bytes]], size: int
    ) -> None:
        """fileNonce marks the last segment.

        Seen to fail without: `last` in fileNonce.
        """
        fk, _, sealed = photo
        with pytest.raises(Refused) as caught:
            opened(node, fk, b"info", size, sealed[: -(-(size + 40) // NEXT_SEGMENT)])
        assert caught.value.code == "sealed"

    def test_attack_28_a_segment_opens_under_no_other_key_and_for_no_other_file(
        self, node: Node, photo: tuple[bytes, bytes, list[bytes]]
    ) -> None:
        """fileKey: HKDF over fk with the file's info.

        Seen to fail without: `info` in fileKey.
        """
        fk, plaintext, sealed = photo
        for key, info in ((b"j" * 32, b"info"), (fk, b"another")):
            opener = node.call("Suite.fileOpener", key, info, len(plaintext))
            with pytest.raises(Refused):
                opener["open"](0, sealed[0])

    def test_a_segment_is_sealed_once_and_only_at_its_size(self, node: Node) -> None:
        sealer = node.call("Suite.fileSealer", bytes(32), b"", 10)
        for index, plaintext in ((0, bytes(9)), (0, bytes(11)), (1, b""), (-1, b"")):
            with pytest.raises(Refused):
                sealer["seal"](index, plaintext)
        sealer["seal"](0, bytes(10))
        with pytest.raises(Refused, match="segment 0 is sealed already"):
            sealer["seal"](0, bytes(10))

    @pytest.mark.parametrize("size", [-1, 0.5, 2**53, 2**52])
    def test_attack_30_an_impossible_size_is_refused(self, node: Node, size: float) -> None:
        """Suite.layout: a size is a number of bytes, and its segments have numbers.

        Seen to fail without: the check in Suite.layout.
        """
        assert refusal(node, "Suite.fileOpener", bytes(32), b"", size) == "bad"

    def test_a_file_key_has_32_bytes(self, node: Node) -> None:
        assert refusal(node, "Suite.fileSealer", bytes(31), b"", 1) == "bad"


class TestStoreKey:
    """Records under the store key, and that key under a passphrase."""

    def test_a_record_opens_under_its_own_name_and_version_alone(self, node: Node) -> None:
        key, name = node.call("Suite.storeKey"), bytes(32) + small(b"meta")
        box = node.call("Suite.sealRecord", key, name, 3, b"record")
        assert node.call("Suite.openRecord", key, name, 3, box) == b"record"
        aad = E("store", name + (3).to_bytes(8, "big"))
        assert AESGCM(key).decrypt(box[:12], box[12:], aad) == b"record"
        assert refusal(node, "Suite.openRecord", key, name, 2, box) == "sealed"
        assert refusal(node, "Suite.openRecord", key, name + b"x", 3, box) == "sealed"
        assert refusal(node, "Suite.openRecord", bytes(32), name, 3, box) == "sealed"
        assert refusal(node, "Suite.openRecord", key, name, 3, box[:-1] + bytes([box[-1] ^ 1])) == "sealed"

    def test_without_a_passphrase_the_key_is_kept_as_it_is(self, node: Node) -> None:
        key = node.call("Suite.storeKey")
        wrapped = node.call("Suite.wrapStoreKey", key, None)
        assert wrapped == b"\x00" + key
        assert node.call("Suite.unwrapStoreKey", wrapped, None) == key

    def test_with_a_passphrase_it_is_wrapped_as_published(self, node: Node) -> None:
        key, phrase = node.call("Suite.storeKey"), "correct horse \u00e4\u99ac"
        wrapped = node.call("Suite.wrapStoreKey", key, phrase, FAST_ROUNDS)
        head, count, salt, nonce, box = wrapped[:1], wrapped[1:5], wrapped[5:21], wrapped[21:33], wrapped[33:]
        assert (head, int.from_bytes(count, "big")) == (b"\x01", FAST_ROUNDS)
        derived = hashlib.pbkdf2_hmac("sha256", phrase.encode(), salt, FAST_ROUNDS)
        assert AESGCM(derived).decrypt(nonce, box, E("wrap", count + salt)) == key
        assert node.call("Suite.unwrapStoreKey", wrapped, phrase) == key

    def test_the_usual_count_of_rounds_is_600_000(self, node: Node) -> None:
        wrapped = node.call("Suite.wrapStoreKey", bytes(32), "p")
        assert int.from_bytes(wrapped[1:5], "big") == 600_000
        assert node.call("Suite.unwrapStoreKey", wrapped, "p") == bytes(32)

    @pytest.mark.parametrize("phrase", ["", "P", "p ", None], ids=repr)
    def test_attack_39_a_wrong_or_missing_passphrase_is_named(self, node: Node, phrase: str | None) -> None:
        """unwrapStoreKey names it, and answers nothing else.

        Seen to fail without: `.catch(() => { throw wrong(); })` in unwrapStoreKey.
        """
        wrapped = node.call("Suite.wrapStoreKey", bytes(32), "p", FAST_ROUNDS)
        assert refusal(node, "Suite.unwrapStoreKey", wrapped, phrase) == "passphrase"

    @pytest.mark.parametrize("at", range(1, 81, 8))
    def test_attack_39_an_altered_wrap_does_not_open(self, node: Node, at: int) -> None:
        """AES-GCM with count and salt in the aad.

        Seen to fail without: the aad of the wrap, and the key from it (any wrap opens).
        """
        wrapped = bytearray(node.call("Suite.wrapStoreKey", bytes(32), "p", FAST_ROUNDS))
        wrapped[at] ^= 1
        assert refusal(node, "Suite.unwrapStoreKey", wrapped, "p") in {"passphrase", "bad"}

    @pytest.mark.parametrize(
        "wrapped", [b"", b"\x00" + bytes(31), b"\x00" + bytes(33), b"\x02" + bytes(80), b"\x01" + bytes(80)]
    )
    def test_attack_39_what_is_no_wrap_is_refused(self, node: Node, wrapped: bytes) -> None:
        """unwrapStoreKey looks at form and length first.

        Seen to fail without: `'this is no wrapped store key'`.
        """
        assert refusal(node, "Suite.unwrapStoreKey", wrapped, "p") in {"passphrase", "bad"}

    def test_attack_30_an_enormous_count_of_rounds_is_refused_unspent(self, node: Node) -> None:
        """unwrapStoreKey spends no more rounds than MOST_ROUNDS.

        Seen to fail without: `count > MOST_ROUNDS`.
        """
        wrapped = b"\x01" + b"\xff\xff\xff\xff" + bytes(76)
        assert refusal(node, "Suite.unwrapStoreKey", wrapped, "p") == "bad"


# ======================================================================================================================
# QR codes: drawn by the page's own encoder, rasterised by Pillow, read back by a decoder that knows nothing of it.
# ======================================================================================================================

QR_CAPACITY = (0, 14, 26, 42, 62, 84, 106, 122, 152, 180, 213, 251, 287, 331, 362, 412)
"""Bytes that level M holds by version (ISO/IEC 18004, table 7); version 0 stands for nothing."""


@pytest.fixture(scope="module")
def encoder() -> Iterator[Node]:
    started = Node(page_blocks(("room-80-qr",)))
    yield started
    started.close()


def read_back(path: str, size: int) -> tuple[bytes, str]:
    """What the decoder makes of the SVG path, with the quiet zone of four modules: the bytes and the level."""
    scale, quiet = 4, 4
    image = Image.new("L", ((size + 2 * quiet) * scale,) * 2, 255)
    draw = ImageDraw.Draw(image)
    for x, y, run in (map(int, found) for found in re.findall(r"M(\d+) (\d+)h(\d+)v1h-\3z", path)):
        left, top = (x + quiet) * scale, (y + quiet) * scale
        draw.rectangle((left, top, left + run * scale - 1, top + scale - 1), 0)
    found = zxingcpp.read_barcodes(image, zxingcpp.BarcodeFormats([zxingcpp.BarcodeFormat.QRCode]))
    assert len(found) == 1
    return found[0].bytes, found[0].ec_level


def drawn(encoder: Node, data: bytes | str) -> tuple[int, str]:
    """The code's version and its path, checked to be the path's whole text."""
    code = encoder.keep("Qr.encode", data)
    path = str(encoder.call("Qr.path", code))
    assert re.fullmatch(r"(M\d+ \d+h(\d+)v1h-\2z)+", path)
    return int(encoder.call("Qr.encode", data)["version"]), path


class TestQr:
    @pytest.mark.parametrize("version", range(1, 16))
    def test_every_version_is_read_back_at_its_shortest_and_longest(self, encoder: Node, version: int) -> None:
        source = random.Random(version)
        for length in (QR_CAPACITY[version - 1] + 1, QR_CAPACITY[version] - 1, QR_CAPACITY[version]):
            data = source.randbytes(length)
            chosen, path = drawn(encoder, data)
            assert chosen == version
            assert read_back(path, 17 + 4 * version) == (data, "M")

    def test_text_is_utf_8_and_links_come_back_as_they_were(self, encoder: Node) -> None:
        link = "https://192.168.100.200:8443/#1." + "aZ09-_" * 25
        for text in (link, "ümlaut 漢字 😀"):
            version, path = drawn(encoder, text)
            assert read_back(path, 17 + 4 * version)[0] == text.encode()

    def test_all_eight_masks_occur_so_that_all_were_scored(self, encoder: Node) -> None:
        source = random.Random(18004)
        codes = (encoder.call("Qr.encode", source.randbytes(40)) for _ in range(64))
        shown = ("".join(str(int(code["get"](column, 8))) for column in (2, 3, 4)) for code in codes)
        assert {int(bits, 2) ^ 0b101 for bits in shown} == set(range(8))  # the format's own mask over those three

    def test_the_longest_text_fits_and_one_byte_more_is_refused(self, encoder: Node) -> None:
        assert encoder.call("Qr.encode", bytes(QR_CAPACITY[15]))["size"] == 77
        with pytest.raises(NodeBroken, match="413 bytes are too many for a qr code of version 15"):
            encoder.call("Qr.encode", bytes(QR_CAPACITY[15] + 1))


# ======================================================================================================================
# Relay: the rooms alone, without sockets or a clock. Tables of what each message causes, whole; what a hostile client
# gets for its pains (attack_NN as numbered in README); and a random walk beside a model made of lists and dicts.
# ======================================================================================================================

RUN = b"run of this test"
HOST = "relay.example"
WALL = 1_800_000_000_000  # ms
STRANGE_POINTS = {
    "off the curve": b"\x04" + u(32, 5) + u(32, 7),
    "x = p": b"\x04" + u(32, zsr.P256_P) + u(32, 7),
    "infinity": bytes(65),
    "hybrid form": b"\x06" + point(new_key())[1:],
}


class OracleIdentity:
    """The relay's key as the oracle has it."""

    def __init__(self) -> None:
        self.key = new_key()
        self.public = point(self.key)

    def sign(self, label: str, m: bytes) -> bytes:
        return sign(self.key, label, m)


IDENTITY = OracleIdentity()
Told = tuple[tuple[str, ...], Any]
"""Who is told, and the frame; or ((who,), zsr.Close)."""


class Desk:
    """A relay's rooms with sockets that are names, and a clock that the test winds."""

    def __init__(self, room: bytes, names: frozenset[str] = frozenset(), **limits: Any) -> None:
        self.path, self.now, self.wall, self.names, self.run = zsr.b64u(room), 1000.0, WALL, names, RUN
        self.limits = zsr.Limits(**limits)
        self.boot()

    def boot(self, run: bytes = RUN) -> None:
        """As after a restart: nothing is known."""
        self.run = run
        self.rooms = zsr.Rooms(self.limits, IDENTITY, run, self.names, os.urandom, lambda: self.wall)

    def told(self, effects: zsr.Effects) -> list[Told]:
        """Effects as the tests compare them: who is told, and who is online, in the order of their names."""
        return [
            (tuple(sorted(map(str, effect.conns))), in_order(zsr.decode_frame(effect.frame)))
            if isinstance(effect, zsr.Send)
            else ((str(effect.conn),), effect)
            for effect in effects
        ]

    def say(self, name: str, *frames: Any) -> list[Told]:
        message = zsr.join_frames(map(zsr.encode_frame, frames))
        return self.told(self.rooms.handle(name, message, self.now))

    def leave(self, name: str) -> list[Told]:
        return self.told(self.rooms.leave(name, self.now))

    def expire(self, seconds: float = 0.0) -> list[Told]:
        self.now, self.wall = self.now + seconds, self.wall + int(seconds * 1000)
        return self.told(self.rooms.expire(self.now))

    def greet(self, name: str) -> zsr.DownRelay:
        assert self.rooms.enter(name, self.path, self.now) == []
        [(_, answer)] = self.say(name, zsr.UpNonce(os.urandom(32)))
        assert isinstance(answer, zsr.DownRelay)
        return answer

    def login(self, name: str, keys: Keys) -> None:
        answer = self.greet(name)
        assert self.say(name, login(keys, answer.m, HOST)) == []

    def come(
        self, name: str, keys: Keys, made: Made | None = None, cursor: int = 0, run: bytes | None = None, **shown: Any
    ) -> list[Told]:
        """Login and hello."""
        self.login(name, keys)
        return self.say(name, hello(made, cursor, self.run if run is None else run, **shown))

    @property
    def room(self) -> zsr.Room:
        return self.rooms._rooms[zsr.Hl("room", b"aaa") if self.path == "aaa" else zsr.unb64u(self.path)]


def in_order(frame: Any) -> Any:
    return replace(frame, online=tuple(sorted(frame.online))) if isinstance(frame, zsr.DownReady) else frame


def hello(made: Made | None = None, cursor: int = 0, run: bytes = RUN, **shown: Any) -> zsr.UpHello:
    lists = dict.fromkeys(("leaves", "evidence", "requests", "invites", "revokes"), ()) | shown
    return zsr.UpHello(run, cursor, made.full if made else b"", **{k: tuple(v) for k, v in lists.items()})


def heard(told: list[Told], name: str) -> list[Any]:
    """What one socket is told."""
    return [frame for names, frame in told if name in names]


def faults(told: list[Told]) -> list[str]:
    return [frame.code for _, frame in told if isinstance(frame, zsr.DownFault)]


@dataclass
class House:
    """A room of three members, one device each: ann is its only admin."""

    root: PrivateKey
    ann: Keys
    ben: Keys
    cat: Keys
    first: Made
    made: Made

    @property
    def room(self) -> bytes:
        return self.ann.room

    @property
    def everyone(self) -> list[Keys]:
        return [self.ann, self.ben, self.cat]

    @property
    def under(self) -> zsr.Signed:
        return zsr.decode(zsr.Signed, self.made.unit.charter)

    @property
    def spent(self) -> list[zsr.Consumed]:
        return list(zsr.decode(zsr.Roster, zsr.decode(zsr.Signed, self.made.unit.roster).m).consumed)


def house(**policy: int) -> House:
    root = new_root()
    room = room_of(root)
    ann, ben, cat = sorted((new_device(room) for _ in range(3)), key=lambda keys: keys.dev)
    first = create(root, ann, **policy)
    under = zsr.decode(zsr.Signed, first.unit.charter)
    entries = [*first.entries, entry(ben, b"b" * 16), entry(cat, b"c" * 16)]
    listing = roster(room, under, ann, 1, entries, consumed=[used(b"b" * 16, ben), used(b"c" * 16, cat)])
    made = commit(first, under, listing, ann, [ben, cat], joiners=frozenset({ben.dev, cat.dev}))
    return House(root, ann, ben, cat, first, replace(made, entries=tuple(entries)))


@pytest.fixture(scope="module")
def home() -> House:
    return house()


@pytest.fixture
def desk(home: House) -> Desk:
    """All three present."""
    return full_desk(home)


def full_desk(home: House, **limits: Any) -> Desk:
    desk = Desk(home.room, **limits)
    leaves = [leaf(keys) for keys in (home.ann, home.ben, home.cat)]
    desk.come("ann", home.ann, home.made, leaves=leaves)
    desk.come("ben", home.ben, home.made)
    desk.come("cat", home.cat, home.made)
    return desk


def next_roster(
    home: House,
    no: int = 2,
    add: list[Entry] | None = None,
    removed: list[Keys] | None = None,
    spent: list[zsr.Consumed] | None = None,
    by: Keys | None = None,
) -> zsr.Signed:
    away = {keys.sigpub for keys in removed or []}
    entries = [each for each in home.made.entries if each[1].sigpub not in away] + (add or [])
    lost = [gone(keys) for keys in removed or []]
    return roster(home.room, home.under, by or home.ann, no, entries, lost, [*home.spent, *(spent or [])])


def removal(home: House, out: Keys, no: int = 2) -> Made:
    stay = [keys for keys in (home.ann, home.ben, home.cat) if keys.dev != out.dev]
    return commit(home.made, home.under, next_roster(home, no, removed=[out]), home.ann, stay)


def post(home: House, ref: int = 1, ct: bytes = b"sealed", made: Made | None = None) -> zsr.UpPost:
    at = made or home.made
    return zsr.UpPost(ref, at.body.epoch, at.ch, ct)


def counted(room: zsr.Room) -> int:
    """The bytes a room holds, added up anew."""
    each, whole = room.limits.overhead, room.limits.parsed
    shelves = (room.leaves, room.invites, room.revokes, room.requests, room.resyncs, room.evidence, room.joins)
    return (
        sum(len(entry.frame) + each for entry in room.log)
        + sum(size for shelf in shelves for _, size in shelf.items.values())
        + sum(len(held[2]) + each for seat in room.seats.values() for held in (seat.directs or {}).values())
        + sum(file.size + each * (len(file.chunks) + 1) for file in room.files.values())
        + (whole * len(room.head.data) if room.head else 0)
        + room.limits.room_bytes
        + room.limits.seat_bytes * len(room.seats)
    )


def snapshot(desk: Desk) -> tuple[Any, ...]:
    """All that a refused message must leave as it was."""
    room = desk.room
    return (
        room.head, tuple(room.log), room.next, room.used, desk.rooms._purse.used, dict(room.leaves.items),
        dict(room.invites.items), dict(room.revokes.items), dict(room.requests.items), dict(room.resyncs.items),
        dict(room.evidence.items), dict(room.joins.items), {key: dict(file.chunks) for key, file in room.files.items()},
        {dev: (seat.cursor, seat.peer, dict(seat.directs or {})) for dev, seat in room.seats.items()},
        {conn: (peer.state, peer.dev) for conn, peer in desk.rooms._peers.items()},
    )  # fmt: skip


def refused(desk: Desk, name: str, frame: Any) -> str:
    """The one fault a frame is answered with; asserts that nothing else happened."""
    before = snapshot(desk)
    told = desk.say(name, frame)
    assert snapshot(desk) == before
    [(names, fault)] = told
    assert names == (name,)
    assert isinstance(fault, zsr.DownFault)
    return fault.code


# ------------------------------------------------------------------------------------------------- arriving, leaving --
def test_a_nonce_is_answered_by_the_relays_signed_words_and_the_head(home: House) -> None:
    desk = Desk(home.room)
    answer = desk.greet("ann")
    said = zsr.decode(zsr.Relay, answer.m)
    assert (said.relay, said.room, answer.run, answer.head) == (IDENTITY.public, home.room, RUN, ZERO32)
    assert zsr.verify_signature(IDENTITY.public, "relay", answer.m, answer.sig)
    desk.come("first", home.ann, home.made)
    assert desk.greet("ben").head == home.made.ch


def test_the_first_member_brings_the_room_back(home: House) -> None:
    desk = Desk(home.room)
    shown = leaf(home.ann)
    assert desk.come("ann", home.ann, home.made, run=ZERO16, leaves=[shown]) == [
        (("ann",), zsr.DownHi(RUN, 1, 2)),
        (("ann",), zsr.DownLeaves((shown,))),
        (("ann",), zsr.DownCommit(1, 2, home.made.full)),
        (("ann",), zsr.DownReady(home.made.ch, (home.ann.dev,))),
    ]


def test_a_member_that_comes_back_gets_what_it_has_not_acknowledged(desk: Desk, home: House) -> None:
    desk.say("ann", post(home, 1, b"one"), post(home, 2, b"two"))
    desk.say("ben", zsr.UpAck(RUN, 2))
    assert desk.leave("ben") == [(("ann", "cat"), zsr.DownPeer(home.ben.dev, 0))]
    assert desk.come("ben2", home.ben, cursor=2) == [
        (("ann", "cat"), zsr.DownPeer(home.ben.dev, 1)),
        (("ben2",), zsr.DownHi(RUN, 1, 4)),
        (("ben2",), zsr.DownLeaves(tuple(signed for _, signed in desk.room.leaves.values()))),
        (("ben2",), zsr.DownEvent(3, 1, home.ann.dev, 1, home.made.ch, b"two")),
        (("ben2",), zsr.DownReady(home.made.ch, (home.ann.dev, home.ben.dev, home.cat.dev))),
    ]


def test_a_cursor_of_another_run_or_beyond_the_log_counts_for_nothing(desk: Desk, home: House) -> None:
    desk.say("ann", post(home))
    desk.leave("ben")
    told = desk.come("ben2", home.ben, cursor=2, run=b"x" * 16)
    assert [f.no for f in heard(told, "ben2") if isinstance(f, (zsr.DownCommit, zsr.DownEvent))] == [1, 2]
    desk.leave("ben2")
    told = desk.come("ben3", home.ben, cursor=zsr.MAX_UINT)
    assert desk.room.seats[home.ben.dev].cursor == 2


def test_a_bare_hello_of_another_run_is_shown_the_head(desk: Desk, home: House) -> None:
    desk.leave("ben")
    told = desk.come("ben2", home.ben, run=ZERO16)
    assert heard(told, "ben2")[1] == zsr.DownUnit(home.made.full)


def test_a_newer_socket_of_a_device_replaces_the_older(desk: Desk, home: House) -> None:
    told = desk.come("again", home.ann, home.made)
    assert (("ann",), zsr.Close("ann", 4004, "replaced")) in told
    assert desk.say("ann", post(home)) == []
    assert desk.leave("ann") == []
    assert not any(isinstance(frame, zsr.DownPeer) for _, frame in told)
    assert set(desk.say("again", post(home))[0][0]) == {"again", "ben", "cat"}


def test_who_is_not_listed_is_shown_the_head_and_let_go(desk: Desk, home: House) -> None:
    stranger = new_device(home.room)
    assert desk.come("eve", stranger) == [
        (("eve",), zsr.DownUnit(home.made.full)),
        (("eve",), zsr.DownFault(0, "unlisted", "this device is not listed", 0)),
        (("eve",), zsr.Close("eve", 4003, "unlisted")),
    ]


def test_a_path_that_is_no_room_is_closed_at_once(home: House) -> None:
    desk = Desk(home.room)
    for path in ("", "abc", zsr.b64u(home.room) + "=", zsr.b64u(home.room)[:-1] + "!", "b" * 43):
        assert desk.told(desk.rooms.enter("x", path, 0.0))[-1][1].code == 4005
    assert desk.rooms.counts()["connections"] == 0


def test_a_socket_that_never_logs_in_is_closed(home: House) -> None:
    desk = Desk(home.room, login_timeout=15.0)
    desk.greet("slow")
    desk.come("ann", home.ann, home.made)
    assert desk.expire(14.0) == []
    assert desk.expire(1.0) == [(("slow",), zsr.Close("slow", 4001, "login timeout"))]


@pytest.mark.parametrize("frame", [zsr.UpFetch(ZERO16), zsr.UpPing(1), zsr.UpAck(RUN, 1), zsr.UpHead()])
def test_before_login_only_nonce_and_login_are_heard(home: House, frame: Any) -> None:
    desk = Desk(home.room)
    desk.greet("x")
    told = desk.say("x", frame)
    assert faults(told) == ["bad"]
    assert told[-1][1] == zsr.Close("x", 4001, "bad")


def test_a_room_nobody_vouches_for_is_forgotten_with_its_last_socket(home: House) -> None:
    desk = Desk(home.room)
    desk.login("x", home.ann)
    assert faults(desk.say("x", hello())) == ["unknown"]
    assert desk.rooms.counts()["rooms"] == 1
    desk.leave("x")
    assert desk.rooms.counts()["rooms"] == 0


def test_log_numbers_are_not_used_twice_in_a_run(home: House) -> None:
    desk = Desk(home.room, ttl=10.0, sweep_seconds=0.0)
    desk.come("ann", home.ann, home.made)
    desk.say("ann", post(home))
    desk.leave("ann")
    desk.expire(11.0)
    assert desk.rooms.counts() == {"rooms": 0, "connections": 0, "bytes": 0, "entries": 0, "files": 0}
    assert heard(desk.come("ann", home.ann, home.made, cursor=2), "ann")[1] == zsr.DownCommit(3, 2, home.made.full)


# ----------------------------------------------------------------------------------------------------- what passes --
def test_a_post_is_one_frame_to_all_and_a_number_for_its_poster(desk: Desk, home: House) -> None:
    effects = desk.rooms.handle("ann", message_of(post(home, 7)), desk.now)
    assert [type(effect) for effect in effects] == [zsr.Send, zsr.Answer]
    assert desk.told(effects) == [
        (("ann", "ben", "cat"), zsr.DownEvent(2, 1, home.ann.dev, 1, home.made.ch, b"sealed")),
        (("ann",), zsr.DownSent(7, 2)),
    ]
    again = desk.rooms.handle("ben", message_of(post(home)), desk.now)
    assert isinstance(effects[0], zsr.Send)
    assert isinstance(again[0], zsr.Send)
    assert again[0].conns is effects[0].conns, "the tuple of members is made once"


def test_frames_of_one_message_are_taken_or_refused_each_by_itself(desk: Desk, home: House) -> None:
    stale = replace(post(home, 2), ch=ZERO32)
    told = desk.say("ann", post(home, 1), stale, zsr.UpPing(9))
    assert heard(told, "ann")[1:] == [
        zsr.DownSent(1, 2), zsr.DownFault(2, "stale", "head has moved on", 0), zsr.DownPong(9),
    ]  # fmt: skip


def test_a_live_envelope_goes_to_the_others_and_is_not_kept(desk: Desk, home: House) -> None:
    for kind in (2, 3):
        frame = zsr.UpLive(kind, 1, home.made.ch, b"sealed")
        assert desk.say("ben", frame) == [
            (("ann", "cat"), zsr.DownLive(kind, home.ben.dev, 1, home.made.ch, b"sealed"))
        ]
    assert refused(desk, "ben", zsr.UpLive(1, 1, home.made.ch, b"")) == "bad"
    assert refused(desk, "ben", zsr.UpLive(2, 2, home.made.ch, b"")) == "stale"
    assert len(desk.room.log) == 1


def test_an_entry_goes_when_all_listed_have_acknowledged_it(desk: Desk, home: House) -> None:
    desk.say("ann", post(home))
    for name in ("ann", "ben"):
        desk.say(name, zsr.UpAck(RUN, 2))
    desk.leave("cat")
    desk.expire()
    assert [entry.no for entry in desk.room.log] == [1, 2]
    desk.come("cat2", home.cat)
    desk.say("cat2", zsr.UpAck(b"x" * 16, 2), zsr.UpAck(RUN, 3))
    desk.expire()
    assert [entry.no for entry in desk.room.log] == [1, 2], "neither another run's ack nor one of the future counts"
    desk.say("cat2", zsr.UpAck(RUN, 1))
    desk.expire()
    assert [entry.no for entry in desk.room.log] == [2]


def test_time_ends_entries_and_directs_that_nobody_took(home: House) -> None:
    desk = full_desk(home, ttl=100.0, sweep_seconds=0.0)
    desk.leave("cat")
    desk.say("ann", post(home), zsr.UpDirect(2, home.cat.dev, home.made.ch, 1, b"direct"))
    desk.expire(99.0)
    desk.say("ann", post(home))
    desk.expire(1.5)
    assert [entry.no for entry in desk.room.log] == [3]
    assert desk.room.seats[home.cat.dev].directs is None
    assert desk.room.used == counted(desk.room) == desk.rooms._purse.used


def test_a_direct_waits_for_its_device_until_it_is_acknowledged(desk: Desk, home: House) -> None:
    frame = zsr.UpDirect(3, home.cat.dev, home.made.ch, 5, b"direct")
    sealed = zsr.DownDirect(1, 1, home.ann.dev, home.made.ch, 5, b"direct")
    assert desk.say("ann", frame) == [(("cat",), sealed), (("ann",), zsr.DownSent(3, 0))]
    desk.leave("cat")
    assert sealed in heard(desk.come("cat2", home.cat), "cat2")
    desk.say("cat2", zsr.UpDack((1, 99)))
    desk.leave("cat2")
    assert sealed not in heard(desk.come("cat3", home.cat), "cat3")


def test_the_earliest_directs_go_when_too_many_wait_but_never_a_welcome(home: House) -> None:
    desk = full_desk(home, directs=3)
    desk.leave("cat")
    desk.say("ann", zsr.UpWelcome(1, home.cat.dev, b"welcome"))
    for n in range(4):
        assert faults(desk.say("ann", zsr.UpDirect(2, home.cat.dev, home.made.ch, 1, b"%d" % n))) == []
    told = heard(desk.come("cat2", home.cat), "cat2")
    assert [frame.ct for frame in told if isinstance(frame, zsr.DownDirect)] == [b"welcome", b"2", b"3"]
    for _ in range(2):
        desk.say("ann", zsr.UpWelcome(1, home.cat.dev, b"welcome"))
    assert refused(desk, "ann", zsr.UpWelcome(1, home.cat.dev, b"one more")) == "full"


def test_directs_are_refused_off_the_head_and_to_the_unlisted(desk: Desk, home: House) -> None:
    assert refused(desk, "ann", zsr.UpDirect(1, home.cat.dev, ZERO32, 1, b"")) == "stale"
    assert refused(desk, "ann", zsr.UpDirect(1, b"n" * 16, home.made.ch, 1, b"")) == "stale"
    assert refused(desk, "ben", zsr.UpWelcome(1, home.cat.dev, b"")) == "refused"


def test_a_share_goes_to_an_admin_if_its_sender_signed_it(desk: Desk, home: House) -> None:
    ct, sig = share(home.ben, home.ann, b"i" * 16, SharedPsk(b"p" * 32, 0, 0, FAR_FUTURE))
    told = desk.say("ben", zsr.UpShare(1, home.ann.dev, b"i" * 16, 0, ct, sig))
    [carried] = [frame for frame in heard(told, "ann") if isinstance(frame, zsr.DownDirect)]
    content = zsr.decode(zsr.ShareContent, carried.ct)
    assert (carried.kind, content.sig) == (3, sig)
    assert open_share(home.ann, home.ben.dev, content.inv_id, content.ct).psk == b"p" * 32
    assert refused(desk, "cat", zsr.UpShare(1, home.ann.dev, b"i" * 16, 0, ct, sig)) == "forged"
    assert refused(desk, "ann", zsr.UpShare(1, home.ben.dev, b"i" * 16, 0, ct, sig)) == "stale"


def test_a_ping_is_answered_and_the_head_shown_on_request(desk: Desk, home: House) -> None:
    told = desk.say("ann", zsr.UpPing(5), zsr.UpHead())
    assert told == [(("ann",), zsr.DownPong(5)), (("ann",), zsr.DownUnit(home.made.full))]


# -------------------------------------------------------------------------------------------------------- commits --
def test_a_commit_upon_the_head_is_an_entry_for_all_and_the_new_head(desk: Desk, home: House) -> None:
    rotated = commit(
        home.made, home.under, zsr.decode(zsr.Signed, home.made.unit.roster), home.ben, [home.ann, home.cat], reason=1
    )
    assert desk.say("ben", zsr.UpCommit(4, rotated.upload)) == [
        (("ann", "ben", "cat"), zsr.DownCommit(2, 2, rotated.upload)),
        (("ben",), zsr.DownSent(4, 2)),
    ]
    assert desk.room.head is not None
    assert desk.room.head.data == rotated.full
    assert refused(desk, "ann", post(home)) == "stale"
    assert desk.say("ben", zsr.UpCommit(5, rotated.upload)) == [(("ben",), zsr.DownSent(5, 2))]


def test_the_loser_of_a_race_is_told(desk: Desk, home: House) -> None:
    listing = zsr.decode(zsr.Signed, home.made.unit.roster)
    one = commit(home.made, home.under, listing, home.ann, [home.ben, home.cat], reason=1)
    other = commit(home.made, home.under, listing, home.ben, [home.ann, home.cat], reason=1)
    desk.say("ann", zsr.UpCommit(1, one.upload))
    assert refused(desk, "ben", zsr.UpCommit(1, other.full and zsr.encode(other.unit))) == "lost"
    again = commit(one, home.under, listing, home.ben, [home.ann, home.cat], reason=1)
    assert refused(desk, "ben", zsr.UpCommit(2, again.upload)) == "slow"
    desk.now += 10.0
    assert faults(desk.say("ben", zsr.UpCommit(2, again.upload))) == []


def test_a_removed_member_is_shown_why_and_let_go(desk: Desk, home: House) -> None:
    out = removal(home, home.ben)
    assert desk.say("ann", zsr.UpCommit(1, out.upload)) == [
        (("ann", "ben", "cat"), zsr.DownCommit(2, 2, out.upload)),
        (("ann", "cat"), zsr.DownPeer(home.ben.dev, 0)),
        (("ben",), zsr.DownUnit(out.full)),
        (("ben",), zsr.DownFault(0, "unlisted", "this device is no longer listed", 0)),
        (("ben",), zsr.Close("ben", 4003, "unlisted")),
        (("ann",), zsr.DownSent(1, 2)),
    ]
    assert desk.say("ben", post(home)) == []
    assert desk.room.used == counted(desk.room)


def test_the_relay_extends_the_chain_and_refuses_one_that_is_too_long(home: House) -> None:
    desk = full_desk(home, rotation_seconds=0.0)
    listing, head = zsr.decode(zsr.Signed, home.made.unit.roster), home.made
    for _ in range(3):
        head = commit(head, home.under, listing, home.ann, home.everyone, reason=1)
        assert faults(desk.say("ann", zsr.UpCommit(1, head.upload))) == []
    assert desk.room.head is not None
    assert desk.room.head.unit.chain == head.unit.chain
    assert len(head.unit.chain) == 3
    assert zsr.Verifier(zsr.Limits()).unit(home.room, head.full, None).ancestors == desk.room.head.ancestors


def test_a_higher_charter_needs_no_parent_match(desk: Desk, home: House) -> None:
    desk.say("ann", zsr.UpCommit(1, removal(home, home.ben).upload))
    under = charter(home.root, [home.ann, home.cat], no=1)
    listing = roster(home.room, under, home.ann, 5, list(home.made.entries), consumed=home.spent)
    other = commit(home.made, under, listing, home.ann, [home.ben, home.cat])
    assert faults(desk.say("ann", zsr.UpCommit(2, other.full))) == []
    assert desk.room.head is not None
    assert desk.room.head.ch == other.ch


def test_fork_choice_is_that_of_section_5(home: House) -> None:
    verifier = zsr.Verifier(zsr.Limits())

    def head(made: Made) -> zsr.Head:
        return verifier.unit(home.room, made.full, None)

    same = zsr.decode(zsr.Signed, home.made.unit.roster)
    child = commit(home.made, home.under, same, home.ann, home.everyone, reason=1)
    grandchild = commit(child, home.under, same, home.ben, home.everyone, reason=1)
    rival = commit(home.made, home.under, same, home.cat, home.everyone, reason=1)
    heavier = commit(home.made, home.under, next_roster(home, 2), home.ann, home.everyone)
    senior = charter(home.root, [home.ben, home.ann], no=1)
    by_ann = commit(
        home.made, senior, roster(home.room, senior, home.ann, 2, list(home.made.entries)), home.ann, home.everyone
    )
    by_ben = commit(
        home.made, senior, roster(home.room, senior, home.ben, 2, list(home.made.entries)), home.ben, home.everyone
    )
    order = [head(made) for made in (home.first, home.made, child, grandchild, heavier, by_ann, by_ben)]
    for low, one in enumerate(order):
        for high, other in enumerate(order):
            assert zsr.preferred(other, one) == (high > low), (low, high)
    pair = sorted((head(child), head(rival)), key=lambda each: each.ch)
    assert zsr.preferred(pair[1], pair[0])
    assert not zsr.preferred(pair[0], pair[1])
    assert zsr.preferred(head(grandchild), head(rival)), "higher epoch before larger ch"


def test_a_heavier_unit_in_a_hello_becomes_the_head_and_others_see_it(desk: Desk, home: House) -> None:
    desk.leave("ann")
    heavier = commit(home.made, home.under, next_roster(home, 3), home.ann, [home.ben, home.cat])
    told = desk.come("ann2", home.ann, heavier)
    assert told[0] == (("ben", "cat"), zsr.DownCommit(2, 2, heavier.full))
    assert told[-1] == (("ann2",), zsr.DownReady(heavier.ch, (home.ann.dev, home.ben.dev, home.cat.dev)))
    lighter = desk.say("ben", hello(home.made, cursor=2))
    assert lighter[1] == (("ben",), zsr.DownUnit(heavier.full))
    assert desk.room.head is not None
    assert desk.room.head.ch == heavier.ch


def test_only_admins_rotate_where_policy_says_so_unless_a_resync_is_answered() -> None:
    home = house(who=1)
    desk = full_desk(home)
    listing = zsr.decode(zsr.Signed, home.made.unit.roster)
    for reason in (1, 2):
        mine = commit(home.made, home.under, listing, home.ben, [home.ann, home.cat], reason=reason)
        assert refused(desk, "ben", zsr.UpCommit(1, mine.upload)) == "forged"
    cat = fresh_leaf(home.cat)
    asked = resync(cat, home.made.ch)
    assert desk.say("cat", zsr.UpResync(asked)) == [(("ann", "ben"), zsr.DownResyncs((asked,)))]
    answer = commit(home.made, home.under, listing, home.ben, [home.ann, cat], frozenset({cat.dev}), reason=2)
    assert faults(desk.say("ben", zsr.UpCommit(2, answer.upload))) == []
    assert open_slot(answer.unit, cat) == answer.epoch
    assert len(desk.room.resyncs) == 0, "a new head ends them"


def test_resyncs_are_one_a_minute_and_with_a_new_leaf(desk: Desk, home: House) -> None:
    assert refused(desk, "cat", zsr.UpResync(resync(home.cat, home.made.ch))) == "forged"
    cat = fresh_leaf(home.cat)
    assert refused(desk, "cat", zsr.UpResync(resync(cat, ZERO32))) == "stale"
    assert refused(desk, "ben", zsr.UpResync(resync(cat, home.made.ch))) == "forged"
    desk.say("cat", zsr.UpResync(resync(cat, home.made.ch)))
    assert refused(desk, "cat", zsr.UpResync(resync(fresh_leaf(cat), home.made.ch))) == "slow"
    desk.now += 60.0
    assert faults(desk.say("cat", zsr.UpResync(resync(fresh_leaf(cat), home.made.ch)))) == []


def test_a_resync_that_a_commit_overtook_may_be_asked_again_at_once(home: House) -> None:
    desk = full_desk(home)
    listing = zsr.decode(zsr.Signed, home.made.unit.roster)
    cat = fresh_leaf(home.cat)
    desk.say("cat", zsr.UpResync(resync(cat, home.made.ch)))
    other = commit(home.made, home.under, listing, home.ben, [home.ann, cat], reason=1)
    assert faults(desk.say("ben", zsr.UpCommit(1, other.upload))) == []
    again = fresh_leaf(cat)
    assert faults(desk.say("cat", zsr.UpResync(resync(again, other.ch)))) == []
    desk.now += 10.0
    answer = commit(other, home.under, listing, home.ann, [home.ben, again], frozenset({again.dev}), reason=2)
    assert faults(desk.say("ann", zsr.UpCommit(2, answer.upload))) == []
    assert refused(desk, "cat", zsr.UpResync(resync(fresh_leaf(again), answer.ch))) == "slow"


# --------------------------------------------------------------------------------------------- invites, joins, links --
@dataclass
class Door:
    """An open invite and one at the door."""

    desk: Desk
    home: House
    inv_id: bytes
    psk: bytes
    shown: zsr.Signed
    new: Keys

    def sealed(self, keys: Keys | None = None) -> zsr.UpJoin:
        ct = seal_join(keys or self.new, self.home.ann, self.inv_id, self.psk, "new")
        return zsr.UpJoin(self.inv_id, (zsr.SealedJoin(self.home.ann.dev, ct),))

    def admission(self, keys: Keys | None = None, no: int = 2) -> Made:
        who = keys or self.new
        listing = next_roster(self.home, no, [entry(who, self.inv_id)], spent=[used(self.inv_id, who)])
        to = [self.home.ben, self.home.cat, who]
        return commit(self.home.made, self.home.under, listing, self.home.ann, to, frozenset({who.dev}))


@pytest.fixture
def door(desk: Desk, home: House) -> Door:
    inv_id, psk = invite_of(link(home.ann, IDENTITY.public))
    shown = invite(home.ann, inv_id, expiry=WALL + 1_000_000)
    assert desk.say("ann", zsr.UpInvite(1, shown)) == [(("ann",), zsr.DownSent(1, 0))]
    desk.login("new", (new := new_device(home.room)))
    return Door(desk, home, inv_id, psk, shown, new)


def test_a_newcomer_fetches_joins_and_is_let_in(door: Door) -> None:
    desk, home, new = door.desk, door.home, door.new
    proof = zsr.Proof(home.under, zsr.decode(zsr.Signed, home.made.unit.roster))
    ann_leaf = desk.room.leaves.items[home.ann.dev][0][1]
    assert desk.say("new", zsr.UpFetch(door.inv_id)) == [
        (("new",), zsr.DownInvite(proof.charter, proof.roster, (ann_leaf,), door.shown))
    ]
    join = door.sealed()
    waiting = zsr.DownJoins((zsr.PendingJoin(new.dev, new.sigpub, door.inv_id, join.sealed[0].ct),))
    assert desk.say("new", join) == [(("ann",), waiting)]
    made = door.admission()
    told = desk.say("ann", zsr.UpCommit(1, made.upload), zsr.UpWelcome(2, new.dev, b"welcome"))
    assert heard(told, "new") == [zsr.DownUnit(made.full)]
    told = desk.say("new", hello())
    assert heard(told, "new") == [
        zsr.DownHi(RUN, 1, 3), zsr.DownLeaves((*[signed for _, signed in desk.room.leaves.values()],)),
        zsr.DownCommit(2, 2, made.upload), zsr.DownDirect(1, 2, home.ann.dev, ZERO32, 0, b"welcome"),
        zsr.DownReady(made.ch, tuple(sorted(desk.room.online()))),
    ]  # fmt: skip
    assert len(desk.room.joins) == len(desk.room.invites) == 0


def test_an_admin_that_comes_later_is_told_of_the_joins(door: Door) -> None:
    door.desk.leave("ann")
    assert door.desk.say("new", door.sealed()) == []
    told = door.desk.come("ann2", door.home.ann, door.home.made)
    assert [frame.joins[0].dev for frame in heard(told, "ann2") if isinstance(frame, zsr.DownJoins)] == [door.new.dev]
    told = door.desk.come("ben2", door.home.ben, door.home.made)
    assert not any(isinstance(frame, zsr.DownJoins) for frame in heard(told, "ben2")), "it could open none"


@pytest.mark.parametrize("code", [1, 2, 3])
def test_a_refusal_reaches_the_newcomer(door: Door, code: int) -> None:
    door.desk.say("new", door.sealed())
    assert refused(door.desk, "ben", zsr.UpRefuse(door.new.dev, code)) == "refused"
    assert refused(door.desk, "ann", zsr.UpRefuse(door.new.dev, 9)) == "bad"
    told = door.desk.say("ann", zsr.UpRefuse(door.new.dev, code))
    assert told == [(("new",), zsr.DownSettled(door.new.dev, code))]


def test_a_newcomer_that_is_too_early_is_answered_when_the_room_is_back(home: House) -> None:
    desk, new = Desk(home.room), new_device(home.room)
    inv_id, _ = invite_of(link(home.ann, IDENTITY.public))
    desk.login("new", new)
    assert faults(desk.say("new", zsr.UpFetch(inv_id))) == ["unknown"]
    told = desk.come("ben", home.ben, home.made)
    assert heard(told, "new") == []
    told = desk.come("ann", home.ann, home.made, leaves=[leaf(home.ann)], invites=[invite(home.ann, inv_id)])
    assert [type(frame) for frame in heard(told, "new")] == [zsr.DownInvite]


def test_joins_are_bounded_an_invite_and_a_room(home: House) -> None:
    desk = full_desk(home, joins=3, joins_an_invite=2)
    for n in range(2):
        inv_id, _ = invite_of(link(home.ann, IDENTITY.public))
        desk.say("ann", zsr.UpInvite(1, invite(home.ann, inv_id)))
        codes = []
        for k in range(3):
            desk.login(f"new{n}{k}", new_device(home.room))
            join = zsr.UpJoin(inv_id, (zsr.SealedJoin(home.ann.dev, b"sealed"),))
            codes += faults(desk.say(f"new{n}{k}", join)) or ["ok"]
        assert codes == [["ok", "ok", "busy"], ["ok", "full", "full"]][n]
    too_big = zsr.UpJoin(inv_id, (zsr.SealedJoin(home.ann.dev, bytes(5000)),))
    assert refused(desk, "new10", too_big) == "too-big"
    assert refused(desk, "new10", zsr.UpJoin(inv_id, (zsr.SealedJoin(home.cat.dev, b""),))) == "stale"


def test_a_device_invite_is_any_members_and_opened_by_its_maker(desk: Desk, home: House) -> None:
    inv_id, _ = invite_of(link(home.ben, IDENTITY.public, kind=1))
    assert refused(desk, "ben", zsr.UpInvite(1, invite(home.ben, inv_id))) == "over", "members' invites are for admins"
    assert faults(desk.say("ben", zsr.UpInvite(1, invite(home.ben, inv_id, kind=1)))) == []
    desk.login("new", new_device(home.room))
    [(_, found)] = desk.say("new", zsr.UpFetch(inv_id))
    assert {zsr.decode(zsr.Leaf, each.m).sigpub for each in found.leaves} == {home.ben.sigpub}
    told = desk.say("new", zsr.UpJoin(inv_id, (zsr.SealedJoin(home.ben.dev, b"sealed"),)))
    assert [names for names, _ in told] == [("ben",)]


def test_removed_devices_do_not_join_again(door: Door) -> None:
    desk, home = door.desk, door.home
    desk.say("ann", zsr.UpCommit(1, removal(home, home.ben).upload))
    desk.login("ben2", home.ben)
    assert refused(desk, "ben2", door.sealed(home.ben)) == "refused"


# ------------------------------------------------------------------------------------------- requests and evidence --
def test_a_request_is_shown_to_all_until_it_is_settled(desk: Desk, home: House) -> None:
    mine = farewell(home.ben, [home.ben], kind=3)
    assert desk.say("ben", zsr.UpRequest(mine)) == [(("ann", "cat"), zsr.DownRequests((mine,)))]
    assert desk.say("cat", zsr.UpRequest(mine)) == []
    desk.leave("ann")
    told = desk.come("ann2", home.ann, home.made)
    assert zsr.DownRequests((mine,)) in heard(told, "ann2")
    desk.say("ann2", zsr.UpCommit(1, removal(home, home.ben).upload))
    assert len(desk.room.requests) == 0
    assert refused(desk, "cat", zsr.UpRequest(mine)) == "forged", "its signer is not listed any more"


def test_an_unlink_closes_that_socket_at_once_and_keeps_it_out() -> None:
    home = house()
    tab = new_device(home.room)
    both = [*home.made.entries, entry(tab, b"t" * 16, sponsor=home.ben)]
    listing = roster(home.room, home.under, home.ann, 2, both, consumed=[*home.spent, used(b"t" * 16, tab)])
    made = commit(home.made, home.under, listing, home.ann, [home.ben, home.cat, tab])
    desk = Desk(home.room)
    for name, keys in (("ann", home.ann), ("ben", home.ben), ("tab", tab)):
        desk.come(name, keys, made)
    told = desk.say("ben", zsr.UpRequest(farewell(home.ben, [tab])))
    assert [type(frame) for frame in heard(told, "tab")] == [
        zsr.DownRequests, zsr.DownUnit, zsr.DownFault, zsr.Close,
    ]  # fmt: skip
    assert faults(desk.come("tab2", tab, made)) == ["unlisted"]
    assert refused(desk, "ben", zsr.UpRequest(farewell(home.ben, [home.ann]))) == "forged"


def test_requests_end_with_their_time_and_are_bounded(home: House) -> None:
    desk = full_desk(home, requests_a_device=2, requests=3, sweep_seconds=0.0)
    assert refused(desk, "ben", zsr.UpRequest(request(home.ben, 4, bytes(32), expiry=WALL))) == "over"
    assert refused(desk, "ben", zsr.UpRequest(request(home.ben, 9, b""))) == "bad"
    for keys, name in ((home.ben, "ben"), (home.cat, "cat")):
        for no in (1, 2):
            told = desk.say(name, zsr.UpRequest(request(keys, 4, bytes(32), no, expiry=WALL + 5000)))
            assert faults(told) == (["full"] if (name, no) == ("cat", 2) else [])
    assert refused(desk, "ben", zsr.UpRequest(request(home.ben, 4, bytes(32), 3))) == "full"
    desk.expire(6.0)
    assert len(desk.room.requests) == 0
    assert desk.room.used == counted(desk.room)


def test_evidence_of_a_removal_is_shown_until_the_head_caught_up(desk: Desk, home: House) -> None:
    out = removal(home, home.cat, no=3)
    proof = zsr.Proof(home.under, zsr.decode(zsr.Signed, out.unit.roster))
    assert desk.say("ben", zsr.UpEvidence(proof.charter, proof.roster)) == [
        (("ann", "cat"), zsr.DownEvidence((proof,)))
    ]
    assert desk.say("ben", zsr.UpEvidence(proof.charter, proof.roster)) == []
    desk.leave("ann")
    assert zsr.DownEvidence((proof,)) in heard(desk.come("ann2", home.ann, home.made), "ann2")
    desk.say("ann2", zsr.UpCommit(1, out.upload))
    assert len(desk.room.evidence) == 0


# ---------------------------------------------------------------------------------------------------------- files --
def put(index: int, count: int, ct: bytes = b"chunk", ref: int = 1, file_id: bytes = b"f" * 16) -> zsr.UpPut:
    return zsr.UpPut(ref, file_id, index, count, ct)


def test_chunks_come_as_they_are_put_within_the_window_asked_for(desk: Desk, home: House) -> None:
    def chunk(index: int) -> zsr.DownChunk:
        return zsr.DownChunk(home.ann.dev, b"f" * 16, index, 4, b"chunk")

    def get(start: int, window: int) -> zsr.UpGet:
        return zsr.UpGet(home.ann.dev, b"f" * 16, start, window)

    assert desk.say("ben", get(0, 2)) == [(("ben",), zsr.DownNoFile(home.ann.dev, b"f" * 16))]
    assert desk.say("ann", put(0, 4)) == [(("ann",), zsr.DownSent(1, 1))]
    assert desk.say("ben", get(0, 3)) == [(("ben",), chunk(0))]
    assert desk.say("cat", get(1, 1)) == []
    assert desk.say("ann", put(2, 4)) == [(("ann",), zsr.DownSent(1, 3))], "they wait for an earlier one"
    assert desk.say("ann", put(1, 4)) == [
        (("ann",), zsr.DownSent(1, 3)), (("ben", "cat"), chunk(1)), (("ben",), chunk(2)),
    ]  # fmt: skip
    assert desk.say("ann", put(3, 4)) == [(("ann",), zsr.DownSent(1, 4))], "both windows are used up"
    assert desk.say("ben", get(3, 9)) == [(("ben",), chunk(3))]
    assert desk.say("ann", put(0, 4)) == [(("ann",), zsr.DownSent(1, 4))], "the same again: all the rest is here"
    assert refused(desk, "ann", put(4, 4)) == refused(desk, "ann", put(0, 5)) == "bad"


def test_a_file_goes_when_all_have_it_or_its_author_drops_it(desk: Desk, home: House) -> None:
    got = zsr.UpGot(home.ann.dev, b"f" * 16)
    desk.say("ann", put(1, 2))
    desk.say("ben", got)
    assert len(desk.room.files) == 1, "only a part of it came again, after a restart: who lacked that has it now"
    desk.say("cat", got)
    assert len(desk.room.files) == 0
    assert desk.room.used == counted(desk.room)
    desk.say("ann", put(0, 2))
    desk.say("ben", zsr.UpGet(home.ann.dev, b"f" * 16, 1, 1))
    assert desk.say("cat", zsr.UpDrop(b"f" * 16)) == [], "only the author's own"
    assert desk.say("ann", zsr.UpDrop(b"f" * 16)) == [(("ben",), zsr.DownNoFile(home.ann.dev, b"f" * 16))]


def test_a_file_no_longer_waits_for_who_was_removed(desk: Desk, home: House) -> None:
    desk.say("ann", put(0, 1))
    desk.say("ben", zsr.UpGot(home.ann.dev, b"f" * 16))
    desk.say("ann", zsr.UpCommit(1, removal(home, home.cat).upload))
    assert len(desk.room.files) == 0


def test_files_are_bounded_and_leave_place_for_messages(home: House) -> None:
    desk = full_desk(home, max_file=10_000, chunk=10_100, max_room_memory=80_000, file_share=0.5)
    assert refused(desk, "ann", put(0, 1, bytes(10_200))) == "too-big"
    answers = [faults(desk.say("ann", put(0, 1, bytes(5000), file_id=b"%016d" % n))) for n in range(8)]
    assert answers[0] == []
    assert answers[-1] == ["full"]
    assert desk.room.used <= 40_000
    assert faults(desk.say("ann", post(home, ct=bytes(9_000)))) == []


def test_a_file_that_the_relay_lost_may_begin_again_before_where_it_goes_on(desk: Desk, home: House) -> None:
    get = zsr.UpGet(home.ann.dev, b"f" * 16, 0, 4)
    desk.say("ann", put(2, 4))
    assert heard(desk.say("ben", get), "ben") == [zsr.DownNoFile(home.ann.dev, b"f" * 16)]
    assert faults(desk.say("ann", put(0, 4))) == []
    assert [chunk.index for chunk in heard(desk.say("ben", get), "ben")] == [0]
    assert [chunk.index for chunk in heard(desk.say("ann", put(1, 4)), "ben")] == [1, 2]


class Stream:
    """Ann's file of 100 chunks at a relay that keeps files of 4: it passes through a window of 3."""

    def __init__(self, home: House) -> None:
        self.ann, self.ref = home.ann.dev, 0
        self.desk = full_desk(home, max_file=3900, chunk=1000, file_window=3)

    def puts(self, index: int) -> list[Told]:
        self.ref = index + 1
        return self.desk.say("ann", put(index, 100, bytes(1000), ref=self.ref))

    def get(self, name: str, start: int, window: int) -> list[Told]:
        return self.desk.say(name, zsr.UpGet(self.ann, b"f" * 16, start, window))

    def chunk(self, index: int) -> zsr.DownChunk:
        return zsr.DownChunk(self.ann, b"f" * 16, index, 100, bytes(1000))

    @property
    def file(self) -> zsr.File:
        (file,) = self.desk.room.files.values()
        assert self.desk.room.used == counted(self.desk.room)
        return file


@pytest.fixture
def stream(home: House) -> Stream:
    return Stream(home)


def test_a_file_beyond_the_limit_passes_through_a_window(stream: Stream) -> None:
    assert [stream.puts(n) for n in range(3)] == [[], [], []], "nobody takes it: no answer, so no credit"
    assert faults(stream.puts(3)) == ["full"]
    assert stream.get("ben", 0, 2) == [
        (("ben",), stream.chunk(0)), (("ben",), stream.chunk(1)),
        (("ann",), zsr.DownSent(1, 2)), (("ann",), zsr.DownSent(2, 2)),
    ]  # fmt: skip
    assert stream.puts(3) == []
    assert stream.get("ben", 2, 3) == [
        (("ben",), stream.chunk(2)), (("ben",), stream.chunk(3)),
        (("ann",), zsr.DownSent(3, 4)), (("ann",), zsr.DownSent(4, 4)),
    ]  # fmt: skip
    assert stream.puts(4) == [(("ben",), stream.chunk(4)), (("ann",), zsr.DownSent(5, 5))]
    assert list(stream.file.chunks) == [2, 3, 4], "the last window stays"
    stream.desk.say("ben", zsr.UpGot(stream.ann, b"f" * 16))
    assert stream.file.size == 0, "until it is there for certain"


def test_what_was_under_way_to_a_connection_that_broke_comes_again_from_the_relay(stream: Stream, home: House) -> None:
    for n in range(5):
        stream.puts(n)
        stream.get("ben", n, 1)
    stream.desk.leave("ben")
    assert stream.puts(5) == [], "nobody takes it"
    stream.desk.come("ben", home.ben, home.made)
    assert stream.get("ben", 1, 3) == [(("ben",), zsr.DownNoFile(stream.ann, b"f" * 16))], "that is gone"
    assert stream.get("ben", 3, 2) == [(("ben",), stream.chunk(3)), (("ben",), stream.chunk(4))]
    assert stream.puts(3) == [(("ann",), zsr.DownSent(4, 5))], "the sender need not bring it once more"
    assert stream.get("ben", 5, 1) == [(("ben",), stream.chunk(5)), (("ann",), zsr.DownSent(6, 6))]


def test_the_slowest_of_those_who_take_a_streamed_file_sets_the_pace(stream: Stream) -> None:
    for n in range(5):
        stream.puts(n)
        stream.get("ben", n, 1)
    assert stream.get("cat", 0, 3) == [(("cat",), zsr.DownNoFile(stream.ann, b"f" * 16))], "that has passed"
    stream.get("ben", 5, 3)
    assert stream.get("cat", 5, 1) == []
    assert stream.puts(5) == [(("ben", "cat"), stream.chunk(5)), (("ann",), zsr.DownSent(6, 6))]
    assert stream.puts(6) == [(("ben",), stream.chunk(6))], "cat has asked for no more yet"
    assert stream.desk.say("cat", zsr.UpGet(stream.ann, b"f" * 16, 6, 0)) == [(("ann",), zsr.DownSent(7, 7))], (
        "who pauses holds nobody up"
    )
    stream.get("cat", 7, 1)
    stream.puts(7)
    stream.get("ben", 8, 3)
    stream.puts(8)
    assert (("ann",), zsr.DownSent(9, 9)) in stream.desk.leave("cat")


def test_the_sender_of_a_streamed_file_is_told_where_to_go_on(stream: Stream, home: House) -> None:
    for n in range(3):
        stream.puts(n)
    stream.get("ben", 0, 3)
    stream.puts(3)
    stream.desk.leave("ann")
    stream.get("ben", 3, 3)
    stream.desk.come("ann", home.ann, home.made)
    assert stream.puts(1) == [(("ann",), zsr.DownSent(2, 4))], "1 to 3 have passed"
    assert stream.puts(4) == [(("ben",), stream.chunk(4)), (("ann",), zsr.DownSent(5, 5))]
    stream.desk.leave("ben")
    assert stream.puts(0) == [], "nobody takes it any more, so it begins again for who asked for that"
    assert stream.get("cat", 0, 1) == [(("cat",), stream.chunk(0)), (("ann",), zsr.DownSent(1, 1))]


def test_a_streamed_file_ends_for_each_who_has_it(stream: Stream) -> None:
    stream.puts(99)
    assert stream.get("ben", 99, 1) == [(("ben",), stream.chunk(99)), (("ann",), zsr.DownSent(100, 100))]
    got = zsr.UpGot(stream.ann, b"f" * 16)
    stream.desk.say("ben", got)
    assert stream.file.floor == 100
    assert stream.puts(98) == [], "the sender missed an answer, and nobody takes it any more"
    assert stream.desk.say("ben", got) == [(("ann",), zsr.DownSent(99, 100))]
    stream.desk.say("cat", got)
    assert stream.desk.room.files == {}


def test_who_waits_with_a_streamed_file_hears_that_it_was_not_kept(stream: Stream) -> None:
    """And not who takes it back. What has passed was answered already."""
    for n in range(3):
        stream.puts(n)
    stream.get("ben", 0, 1)
    told = stream.desk.expire(stream.desk.limits.ttl + 1)
    assert [(who, frame.code, frame.ref) for who, frame in told if isinstance(frame, zsr.DownFault)] == [
        (("ann",), "full", 2),
        (("ann",), "full", 3),
    ]
    assert (("ben",), zsr.DownNoFile(stream.ann, b"f" * 16)) in told
    assert stream.desk.room.files == {}
    stream.puts(1)
    assert stream.desk.say("ann", zsr.UpDrop(b"f" * 16)) == []


# ------------------------------------------------------------------------------------------------------- demo room --
def test_anyone_enters_the_demo_room_and_finds_its_last_events() -> None:
    desk = Desk(b"", demo_events=3, demo_ttl=100.0, demo_file=1000, chunk=1070, sweep_seconds=0.0)
    desk.path = "aaa"
    room = H("room", b"aaa")
    ann, ben = new_device(room), new_device(room)
    said = zsr.UpPost(1, 0, ZERO32, b"sealed")
    assert [type(frame) for _, frame in desk.come("ann", ann)] == [zsr.DownHi, zsr.DownReady]
    for _ in range(5):
        desk.say("ann", said)
    desk.say("ann", zsr.UpAck(RUN, 5))
    assert desk.expire(1.0) == []
    told = desk.come("ben", ben)
    assert told[0] == (("ann",), zsr.DownPeer(ben.dev, 1))
    assert [frame.no for frame in heard(told, "ben") if isinstance(frame, zsr.DownEvent)] == [3, 4, 5]
    live = zsr.UpLive(3, 0, ZERO32, b"typing")
    assert desk.say("ben", live) == [(("ann",), zsr.DownLive(3, ben.dev, 0, ZERO32, b"typing"))]
    assert refused(desk, "ann", put(0, 1, bytes(1100))) == "too-big"
    assert refused(desk, "ann", put(0, 100, bytes(1000))) == "too-big", "nothing streams there"
    desk.say("ann", put(0, 1))
    assert heard(desk.say("ben", zsr.UpGet(ann.dev, b"f" * 16, 0, 1)), "ben")[0].ct == b"chunk"
    desk.say("ben", zsr.UpGot(ann.dev, b"f" * 16))
    assert len(desk.room.files) == 1, "in the demo room nobody's word ends a file"
    for frame in (
        zsr.UpDirect(1, ben.dev, ZERO32, 1, b""),
        zsr.UpWelcome(1, ben.dev, b""),
        zsr.UpCommit(1, b""),
        zsr.UpInvite(1, invite(ann, b"i" * 16)),
        zsr.UpRequest(request(ann, 4, bytes(32))),
        zsr.UpHead(),
    ):
        assert refused(desk, "ann", frame) in ("refused", "unknown")
    desk.leave("ann")
    desk.leave("ben")
    desk.expire(101.0)
    assert desk.rooms.counts()["rooms"] == 0
    assert desk.rooms.counts()["bytes"] == 0


# --------------------------------------------------------------------------------------------------------- memory --
def test_when_bytes_run_out_absent_devices_lose_the_earliest_and_present_ones_nothing(home: House) -> None:
    desk = full_desk(home)
    room = desk.rooms._limits.max_room_memory
    base = desk.room.used
    desk = full_desk(home, max_room_memory=base + 10_000)
    assert room > base
    desk.leave("cat")
    heard_of = []
    for _n in range(30):
        heard_of += [each for each in desk.say("ann", post(home, ct=bytes(700))) if isinstance(each[1], zsr.DownFault)]
        for name in ("ann", "ben"):
            desk.say(name, zsr.UpAck(RUN, desk.room.next - 1))
    assert heard_of == [(("ann",), zsr.DownFault(0, "full", zsr.NOT_KEPT, 5000))], "once, for a while"
    assert desk.room.used <= base + 10_000
    assert desk.room.log[0].no > 1
    for _n in range(15):
        told = desk.say("ann", post(home, ct=bytes(700)))
        desk.say("ann", zsr.UpAck(RUN, desk.room.next - 1))
    assert faults(told) == ["full"], "ben is present and has not acknowledged"
    assert heard(told, "ann")[0].retry_ms > 0
    desk.now += desk.limits.slow_seconds
    told = desk.say("ann", post(home, ct=bytes(700)))
    assert [text for _, frame in told if isinstance(frame, zsr.DownFault) for text in [frame.text]] == [zsr.NOT_KEPT]
    assert any(isinstance(frame, zsr.DownSent) for _, frame in told), "who stays silent holds back nobody"


def test_rooms_nobody_is_in_make_place_for_those_in_use(home: House) -> None:
    desk = full_desk(home, max_memory=120_000)
    desk.say("ann", post(home, ct=bytes(30_000)))
    for name in ("ann", "ben", "cat"):
        desk.leave(name)
    other = house()
    desk.path = zsr.b64u(other.room)
    desk.come("a", other.ann, other.made)
    assert desk.rooms.counts()["rooms"] == 2
    assert faults(desk.say("a", post(other, ct=bytes(30_000)))) == []
    assert desk.rooms.counts()["rooms"] == 1
    assert desk.rooms._purse.used == counted(desk.room)
    assert refused(desk, "a", post(other, ct=bytes(40_000))) == "full"


def test_an_envelope_or_frame_beyond_the_limits_is_refused(home: House) -> None:
    desk = full_desk(home, max_envelope=1000, max_frame=20_000)
    assert refused(desk, "ann", post(home, ct=bytes(1001))) == "too-big"
    assert refused(desk, "ann", post(home, ct=bytes(20_001))) == "too-big"


# ------------------------------------------------------------------------------------ attacks, as README counts them --
def test_attack_01_a_member_that_no_admin_signed_for_is_refused(desk: Desk, home: House) -> None:
    """Verifier._listing: an admin of the charter has signed the roster; Verifier._additions: it consumes an invite.

    Seen to fail without: the signature in Verifier._listing, with Verifier._born's committer; `addition consumes no
    invite of its own`.
    """
    eve = new_device(home.room)
    add, spent = [entry(eve, b"e" * 16)], [used(b"e" * 16, eve)]
    by_ben, as_ann = next_roster(home, 2, add, spent=spent, by=home.ben), next_roster(home, 2, add, spent=spent)
    for listing in (by_ben, replace(as_ann, sig=sign(home.ben.sig, "roster", as_ann.m))):
        made = commit(home.made, home.under, listing, home.ben, [*home.everyone, eve])
        assert refused(desk, "ben", zsr.UpCommit(1, made.upload)) == "forged"
        assert refused(desk, "ben", hello(made)) == "forged"
    mine = commit(home.made, home.under, next_roster(home, 2, [entry(eve, b"e" * 16)]), home.ann, [*home.everyone, eve])
    assert refused(desk, "ann", zsr.UpCommit(1, mine.upload)) == "forged", "nobody comes in without an invite"


def test_attack_02_an_older_charter_or_roster_does_not_replace_the_head(desk: Desk, home: House) -> None:
    """preferred() by weight, Verifier.follows: a charter does not go back.

    Seen to fail without: `preferred(new, room.head)` in Rooms._hello; `charter goes back`.
    """
    under = charter(home.root, [home.ann], no=1)
    listing = roster(home.room, under, home.ann, 2, list(home.made.entries), consumed=home.spent)
    newer = commit(home.made, under, listing, home.ann, home.everyone)
    desk.say("ann", zsr.UpCommit(1, newer.upload))
    told = desk.say("ben", hello(home.made, cursor=1))
    assert desk.room.head is not None
    assert desk.room.head.ch == newer.ch
    assert (("ben",), zsr.DownUnit(newer.full)) in told
    back = commit(newer, home.under, next_roster(home, 3), home.ann, home.everyone)
    assert refused(desk, "ann", zsr.UpCommit(2, back.full)) == "forged"


def test_attack_03_a_demoted_admins_roster_and_invites_are_dead(door: Door) -> None:
    """Verifier._listing asks the charter in force; Rooms._ended asks it for admins and the oldest invite that counts.

    Seen to fail without: `roster is not signed by an admin`, its key taken from the roster; `invite.dev not in by` in
    Rooms._ended; `invite.charter_no < listing.charter.invites_from`.
    """
    desk, home = door.desk, door.home
    under = charter(home.root, [home.ben], no=1, invites_from=1)
    listing = roster(home.room, under, home.ben, 2, list(home.made.entries), consumed=home.spent)
    demoted = commit(home.made, under, listing, home.ben, home.everyone)
    told = desk.say("new", zsr.UpFetch(b"n" * 16))
    assert faults(told) == ["no-invite"]
    desk.say("new", door.sealed())
    told = desk.say("ben", zsr.UpCommit(1, demoted.upload))
    assert heard(told, "new") == [zsr.DownSettled(door.new.dev, 3)]
    assert refused(desk, "new", zsr.UpJoin(door.inv_id, ())) == "no-invite"
    assert refused(desk, "ann", zsr.UpInvite(1, invite(home.ann, b"i" * 16, charter_no=1))) == "over"
    assert refused(desk, "ben", zsr.UpInvite(1, invite(home.ben, b"i" * 16, charter_no=0))) == "over"
    forged = roster(home.room, under, home.ann, 3, list(home.made.entries), consumed=home.spent)
    assert (
        refused(desk, "ann", zsr.UpCommit(1, commit(demoted, under, forged, home.ann, home.everyone).upload))
        == "forged"
    )


def test_attack_06_a_replayed_join_is_one_admission(door: Door) -> None:
    """Rooms._join: one place a device, and none for who is listed.

    Seen to fail without: `if peer.dev in room.seats and room.head` in Rooms._join.
    """
    join = door.sealed()
    door.desk.say("new", join)
    door.desk.say("new", join)
    assert len(door.desk.room.joins) == 1
    door.desk.say("ann", zsr.UpCommit(1, door.admission().upload))
    assert [type(frame) for _, frame in door.desk.say("new", join)] == [zsr.DownUnit]
    assert len(door.desk.room.joins) == 0


def test_attack_07_of_two_that_race_with_one_link_one_gets_in_and_the_other_is_told(door: Door) -> None:
    """Verifier._additions, Verifier._listing and Rooms._settle: an invite is for the first.

    Seen to fail without: `invite was consumed before` and `a consumed invite is forgotten`; the code in Rooms._settle.
    """
    desk, home, rival = door.desk, door.home, new_device(door.home.room)
    desk.login("rival", rival)
    desk.say("new", door.sealed())
    desk.say("rival", door.sealed(rival))
    made = door.admission()
    told = desk.say("ann", zsr.UpCommit(1, made.upload))
    assert heard(told, "rival") == [zsr.DownSettled(rival.dev, 2)]
    assert refused(desk, "rival", zsr.UpFetch(door.inv_id)) == "used"
    again = door.admission(rival)
    assert refused(desk, "ann", zsr.UpCommit(2, zsr.encode(again.unit))) == "lost"
    entries = [*home.made.entries, entry(door.new, door.inv_id), entry(rival, door.inv_id)]
    both = roster(
        home.room,
        home.under,
        home.ann,
        3,
        entries,
        consumed=[*home.spent, used(door.inv_id, door.new), used(door.inv_id, rival)],
    )
    assert (
        refused(
            desk,
            "ann",
            zsr.UpCommit(3, commit(made, home.under, both, home.ann, [*home.everyone, door.new, rival]).upload),
        )
        == "forged"
    )
    swapped = roster(home.room, home.under, home.ann, 3, entries, consumed=[*home.spent, used(door.inv_id, rival)])
    assert (
        refused(
            desk,
            "ann",
            zsr.UpCommit(3, commit(made, home.under, swapped, home.ann, [*home.everyone, door.new, rival]).upload),
        )
        == "forged"
    )


def test_attack_08_a_join_moved_to_another_invite_does_not_open(door: Door) -> None:
    """The psk and the info are those of one invite in one room; Rooms._listed: signed for this room.

    Seen to fail without: `must(of == room.id, …)` in Rooms._listed, with the device's listing.
    """
    inv_id, psk = invite_of(link(door.home.ann, IDENTITY.public))
    joinct = door.sealed().sealed[0].ct
    assert open_join(door.home.ann, door.inv_id, door.psk, joinct).name == "new"
    strangers = replace(door.home.ann, room=b"r" * 32)
    for keys, other_id, other_psk in (
        (door.home.ann, inv_id, door.psk),
        (door.home.ann, door.inv_id, psk),
        (strangers, door.inv_id, door.psk),
    ):
        with pytest.raises(OpenError):
            open_join(keys, other_id, other_psk, joinct)
    other = house()
    desk = full_desk(other)
    assert refused(desk, "ann", zsr.UpInvite(1, door.shown)) == "forged"


def test_attack_09_expired_and_revoked_invites_are_over(door: Door) -> None:
    """Rooms._ended and Rooms._open_invite: what is revoked or expired is over, and stays so.

    Seen to fail without: `room.revokes` in Rooms._ended and _open_invite; `invite.expiry <= self._wall()`; `invite is
    another's` in Rooms._take_revoke.
    """
    desk, home = door.desk, door.home
    desk.say("new", door.sealed())
    told = desk.say("ann", zsr.UpRevoke(3, revoke(home.ann, door.inv_id)))
    assert told == [(("new",), zsr.DownSettled(door.new.dev, 3)), (("ann",), zsr.DownSent(3, 0))]
    assert refused(desk, "new", zsr.UpFetch(door.inv_id)) == "over"
    assert refused(desk, "new", door.sealed()) == "over"
    assert refused(desk, "ann", zsr.UpInvite(1, door.shown)) == "over", "nor does it come back"
    assert refused(desk, "cat", zsr.UpRevoke(1, invite(home.cat, b"i" * 16))) == "bad"
    other, _ = invite_of(link(home.ann, IDENTITY.public))
    desk.say("ann", zsr.UpInvite(1, invite(home.ann, other, expiry=WALL + 1000)))
    assert refused(desk, "ben", zsr.UpRevoke(1, revoke(home.ben, other))) == "refused"
    desk.wall += 1000
    assert refused(desk, "new", zsr.UpFetch(other)) == "over"
    assert refused(desk, "ann", zsr.UpInvite(1, invite(home.ann, b"i" * 16, expiry=desk.wall))) == "over"


@pytest.mark.parametrize("name", STRANGE_POINTS)
def test_attack_10_points_off_the_curve_are_refused_before_use(desk: Desk, home: House, name: str) -> None:
    """on_curve() before each use of a point.

    Seen to fail without: on_curve in Rooms._take_leaf; on_curve in Rooms._resync; on_curve in verify_signature.
    """
    strange = STRANGE_POINTS[name]
    assert not zsr.on_curve(strange)
    assert not zsr.verify_signature(strange, "leaf", b"", bytes(64))
    shape = replace(leaf_shape(fresh_leaf(home.ann)), kempub=strange)
    assert refused(desk, "ann", zsr.UpLeaf(signed(home.ann.sig, "leaf", shape))) == "forged"
    asked = zsr.Resync(home.room, home.made.ch, zsr.encode(shape))
    assert refused(desk, "ann", zsr.UpResync(signed(home.ann.sig, "resync", asked))) == "forged"
    bad_admin = zsr.decode(zsr.Charter, home.under.m)
    under = signed(home.root, "charter", replace(bad_admin, no=1, admins=(home.ann.sigpub, strange)))
    listing = roster(home.room, under, home.ann, 2, list(home.made.entries), consumed=home.spent)
    assert (
        refused(desk, "ann", zsr.UpCommit(1, commit(home.made, under, listing, home.ann, home.everyone).upload))
        == "forged"
    )
    other = Desk(home.room)
    answer = other.greet("x")
    said = login(home.ann, answer.m, HOST, dev=dev_of(home.room, strange))
    assert faults(other.say("x", replace(said, sigpub=strange))) == ["login"]


def hostile_frames(home: House) -> list[Any]:
    """One of each frame a member may say, each accepted as it stands."""
    cat = fresh_leaf(home.ann)
    ct, sig = share(home.ann, home.ann, b"i" * 16, SharedPsk(b"p" * 32, 0, 0, FAR_FUTURE))
    proof = zsr.decode(zsr.Signed, removal(home, home.cat).unit.roster)
    return [
        zsr.UpCommit(1, removal(home, home.ben).upload), zsr.UpLeaf(leaf(cat)),
        zsr.UpResync(resync(cat, home.made.ch)), zsr.UpRequest(farewell(home.ann, [home.ann], 3)),
        zsr.UpInvite(1, invite(home.ann, b"i" * 16)), zsr.UpRevoke(1, revoke(home.ann, b"i" * 16)),
        zsr.UpEvidence(home.under, proof), zsr.UpShare(1, home.ann.dev, b"i" * 16, 0, ct, sig),
    ]  # fmt: skip


def test_attack_11_a_flipped_bit_in_a_signed_frame_leaves_the_state_unchanged(home: House) -> None:
    """Signatures and hashes over all that is signed; the rest has no second spelling.

    Seen to fail without: the signature of a leaf; the hash of the slots; the signature of a share.
    """
    desk = full_desk(home)
    before = snapshot(desk)
    for frame in hostile_frames(home):
        data = zsr.encode_frame(frame)
        ref = 40 if hasattr(frame, "ref") else 8  # type and ref are the sender's own affair
        tag = data.find(zsr.decode(zsr.Unit, frame.unit).tag) if isinstance(frame, zsr.UpCommit) else -40
        for bit in range(ref, len(data) * 8, 37):
            if tag <= bit // 8 < tag + 32:  # only members hold the key that it needs
                continue
            flipped = bytearray(data)
            flipped[bit // 8] ^= 1 << bit % 8
            told = desk.told(desk.rooms.handle("ann", zsr.V(bytes(flipped)), desk.now))
            assert snapshot(desk) == before, (type(frame), bit)
            assert all(names == ("ann",) for names, _ in told)
        assert set(faults(full_desk(home).say("ann", frame))) <= {"unlisted"}, "ben is told that he is removed"


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=400))
def test_attack_11_noise_is_answered_by_a_fault_and_changes_nothing(noise: bytes) -> None:
    desk = full_desk(SHARED)
    before = snapshot(desk)
    told = desk.told(desk.rooms.handle("ann", noise, desk.now))
    assert snapshot(desk) == before
    assert all(names == ("ann",) for names, _ in told)


def test_attack_17_what_was_said_in_one_room_fails_in_another(desk: Desk, home: House) -> None:
    """Each signed object names its room, and so do the ids of devices that it names.

    No line alone can be taken away: without the rooms of charter, roster and commit the consents of another room fail.
    """
    other = house()
    strange = full_desk(other)
    for frame in hostile_frames(home):
        assert refused(strange, "ann", frame) in ("forged", "stale", "bad")
    assert refused(strange, "ann", post(home)) == "stale"
    assert refused(strange, "ann", hello(home.made)) == "forged"


def test_attack_18_an_envelope_of_another_epoch_is_stale(desk: Desk, home: House) -> None:
    """Rooms._under_head: an envelope is taken under the head alone.

    Seen to fail without: `raise PeerFault("stale", …)` in Rooms._under_head.
    """
    assert refused(desk, "ann", post(home, made=home.first)) == "stale"
    assert refused(desk, "ann", replace(post(home), epoch=2)) == "stale"


def test_attack_23_a_signature_under_another_label_is_refused(desk: Desk, home: House) -> None:
    """verify_signature over E(label, m).

    Seen to fail without: the signature of an invite.
    """
    shape = zsr.Invite(home.room, home.ann.dev, b"i" * 16, 0, 0, FAR_FUTURE, 1)
    for label in ("revoke", "request", "leaf", "consent"):
        made = signed(home.ann.sig, label, shape)
        assert refused(desk, "ann", zsr.UpInvite(1, made)) == "forged"


def test_attack_26_an_older_leaf_does_not_replace_a_newer(desk: Desk, home: House) -> None:
    """Rooms._take_leaf keeps the highest, Rooms._leaf takes one's own.

    Seen to fail without: `held[0].leaf_no >= leaf.leaf_no`; `leaf is of another device`.
    """
    newer = fresh_leaf(home.ben)
    desk.say("ben", zsr.UpLeaf(leaf(newer)))
    assert desk.say("ann", hello(home.made, cursor=1, leaves=[leaf(home.ben)]))[0][0] == ("ann",)
    kept = desk.room.leaves.get(home.ben.dev)
    assert kept is not None
    assert kept[0].leaf_no == newer.leaf_no
    assert refused(desk, "ann", zsr.UpLeaf(leaf(newer))) == "forged", "a leaf frame is for one's own"


def test_attack_30_huge_numbers_and_lengths_cost_nothing(desk: Desk, home: House) -> None:
    """Reader counts what is left before it reads; Rooms bounds steps, windows and lists.

    Seen to fail without: `self._limits.roster_step`; the sizes in Rooms._hello.
    """
    huge = zsr.MAX_UINT
    assert desk.say("ann", zsr.UpAck(RUN, huge)) == []
    assert desk.say("ann", zsr.UpDack((huge,) * 5000)) == []
    assert desk.say("ann", zsr.UpGet(home.ann.dev, b"f" * 16, 2**32 - 1, 2**32 - 1)) != []
    desk.say("ann", put(0, 2**32 - 1))
    assert desk.say("ann", zsr.UpGet(home.ann.dev, b"f" * 16, 1, 2**32 - 1)) == [(("ann",), zsr.DownSent(1, 1))]
    listing = next_roster(home, 2 + zsr.Limits().roster_step)
    made = commit(home.made, home.under, listing, home.ann, home.everyone)
    assert refused(desk, "ann", zsr.UpCommit(1, made.upload)) == "forged"
    for data in (b"\x0d\xff\xff", b"\x06" + b"\0" * 44 + b"\xff\xff\xff\xff", b"\x03" + b"\xff" * 24, b"\xff", b""):
        told = desk.told(desk.rooms.handle("ann", zsr.V(data), desk.now))
        assert faults(told) == ["bad"]
    told = desk.told(desk.rooms.handle("ann", b"\xff\xff\xff\xff", desk.now))
    assert faults(told) == ["bad"]
    crowd = [leaf(home.ann)] * (zsr.Limits().devices + 1)
    assert refused(desk, "ann", hello(home.made, leaves=crowd)) == "too-big"


def test_attack_31_the_relay_signs_nothing_but_its_own_words(home: House) -> None:
    """Rooms._nonce signs its own words under its own label; Rooms._login takes the answer to them alone.

    Seen to fail without: `login.relay != self._identity.public`; `login is for another socket`.
    """
    desk = Desk(home.room)
    answer = desk.greet("x")
    m = zsr.encode(zsr.Relay(IDENTITY.public, home.room, b"n" * 32, b"m" * 32))
    assert len(answer.m) == len(m)
    assert not zsr.verify_signature(IDENTITY.public, "login", answer.m, answer.sig)
    for change in ({"relay": point(new_key())}, {"room": b"r" * 32}, {"client_nonce": ZERO32}, {"relay_nonce": ZERO32}):
        desk = Desk(home.room)
        told = desk.say("x", login(home.ann, desk.greet("x").m, HOST, **change))
        assert faults(told) == ["login"]
        assert told[-1][1] == zsr.Close("x", 4001, "login")
    desk = Desk(home.room)
    desk.greet("x")
    assert faults(desk.say("x", zsr.UpLogin(leaf(home.ann).m, leaf(home.ann).sig, home.ann.sigpub))) == ["bad"]


def test_attack_32_a_socket_that_claims_another_device_is_closed(desk: Desk, home: House) -> None:
    """Rooms._login: the device id is that of the key, and the key has signed.

    Seen to fail without: `login.dev != device_id(…)`; verify_signature in Rooms._login.
    """
    eve = new_device(home.room)
    for dev, sigpub in itertools.product((home.ann.dev, eve.dev), (home.ann.sigpub, eve.sigpub)):
        if (dev, sigpub) == (eve.dev, eve.sigpub):
            continue
        said = login(eve, desk.greet("eve").m, HOST, dev=dev)
        told = desk.say("eve", replace(said, sigpub=sigpub))
        assert faults(told) == ["login"]
        assert desk.say("eve", hello(home.made)) == []
    assert set(desk.say("ann", post(home))[0][0]) == {"ann", "ben", "cat"}


def test_attack_33_after_a_restart_any_member_restores_and_a_forged_root_does_not(desk: Desk, home: House) -> None:
    """Verifier._charter: the room's id is the hash of its root key.

    Seen to fail without: `Hl("room", charter.root)`.
    """
    desk.boot(b"another run, 16b")
    false = new_root()
    true = zsr.decode(zsr.Charter, home.under.m)
    forged = signed(false, "charter", replace(true, root=point(false), admins=(home.ben.sigpub,)))
    listing = roster(home.room, forged, home.ben, 9, list(home.made.entries))
    desk.login("ben", home.ben)
    assert refused(desk, "ben", hello(commit(None, forged, listing, home.ben, home.everyone))) == "forged"
    told = desk.come("cat", home.cat, home.made)
    assert desk.room.head is not None
    assert desk.room.head.data == home.made.full
    assert heard(told, "ben") == [zsr.DownUnit(home.made.full)], "who came first is told that its room is back"


def test_attack_34_an_ex_members_state_is_replaced_by_any_true_one(home: House) -> None:
    """preferred(): the charter first, then the number of the roster.

    Seen to fail without: `self.charter.no` in Listing.weight; `preferred(new, room.head)` in Rooms._hello (who came
    first stays).
    """
    desk, out = Desk(home.room), removal(home, home.ben)
    desk.come("ben", home.ben, home.made)
    assert desk.room.head is not None
    assert desk.room.head.ch == home.made.ch
    told = desk.come("cat", home.cat, out)
    assert heard(told, "ben")[0] == zsr.DownCommit(2, 2, out.full)
    assert faults(told) == ["unlisted"]
    assert (("ben",), zsr.Close("ben", 4003, "unlisted")) in told
    under = charter(home.root, [home.cat], no=1)
    listing = roster(home.room, under, home.cat, 3, list(out.entries) or list(home.made.entries), consumed=home.spent)
    newer = commit(out, under, listing, home.cat, home.everyone)
    ex_admin = roster(home.room, home.under, home.ann, 900, [entry(home.ann), entry(home.ben, b"b" * 16)])
    forged = commit(out, home.under, ex_admin, home.ann, [home.ben])
    desk.boot()
    desk.come("ann", home.ann, forged)
    desk.come("cat", home.cat, newer)
    assert desk.room.head is not None
    assert desk.room.head.ch == newer.ch, "the charter counts before the roster number"


def test_attack_35_a_malleated_signature_makes_no_second_object(desk: Desk, home: House) -> None:
    """A request is known by the hash of what was signed, never by the signature.

    Seen to fail without: `signed.m` alone in the name of a request.
    """
    order = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
    made = farewell(home.ben, [home.ben], 3)
    twin = replace(made, sig=made.sig[:32] + u(32, order - int.from_bytes(made.sig[32:], "big")))
    assert zsr.verify_signature(home.ben.sigpub, "request", twin.m, twin.sig)
    desk.say("ben", zsr.UpRequest(made))
    assert desk.say("ann", zsr.UpRequest(twin)) == []
    assert len(desk.room.requests) == 1


def test_attack_41_a_device_is_attached_only_by_its_members_word_and_its_own(desk: Desk, home: House) -> None:
    """Verifier._devices wants consent, Verifier._sponsored the word of that member.

    Seen to fail without: `device is sponsored by another member`; the consent; `member id is not of its first device`.
    """
    eve = new_device(home.room)
    by_cat = entry(eve, b"e" * 16, sponsor=home.cat, member=home.ben.member)
    unwilling = (home.ben.member, replace(entry(eve, b"e" * 16, sponsor=home.ben)[1], consent=bytes(64)))
    alone = entry(eve, b"e" * 16, member=home.ben.member)
    for attached in (by_cat, unwilling, alone):
        listing = next_roster(home, 2, [attached], spent=[used(b"e" * 16, eve)])
        assert (
            refused(
                desk,
                "ann",
                zsr.UpCommit(1, commit(home.made, home.under, listing, home.ann, [*home.everyone, eve]).upload),
            )
            == "forged"
        )


def test_attack_41_a_device_that_is_gone_sponsors_none(desk: Desk, home: House) -> None:
    eve = new_device(home.room)
    added = entry(eve, b"e" * 16, sponsor=home.ben)
    listing = next_roster(home, 2, [added], removed=[home.ben], spent=[used(b"e" * 16, eve)])
    made = commit(home.made, home.under, listing, home.ann, [home.cat, eve])
    assert refused(desk, "ann", zsr.UpCommit(1, made.upload)) == "forged"


def test_attack_42_a_removed_device_never_returns(home: House) -> None:
    """Verifier._devices: gone is not listed; Verifier._removals: gone stays gone.

    Seen to fail without: `a gone device is forgotten`; `a device is listed twice or gone`.
    """
    desk, out = full_desk(home), removal(home, home.ben)
    desk.say("ann", zsr.UpCommit(1, out.upload))
    back = roster(home.room, home.under, home.ann, 3, list(home.made.entries), consumed=home.spent)
    assert (
        refused(desk, "ann", zsr.UpCommit(2, commit(out, home.under, back, home.ann, home.everyone).upload)) == "forged"
    )
    both = roster(home.room, home.under, home.ann, 3, list(home.made.entries), [gone(home.ben)], home.spent)
    assert (
        refused(desk, "ann", zsr.UpCommit(2, commit(out, home.under, both, home.ann, home.everyone).upload)) == "forged"
    )


def test_attack_44_a_login_for_another_host_is_refused(home: House) -> None:
    """Rooms._login: a relay that knows its names takes logins for these alone.

    Seen to fail without: `raise PeerFault("host", …)`.
    """
    desk = Desk(home.room, names=frozenset({"relay.example", "203.0.113.7"}))
    told = desk.say("x", login(home.ann, desk.greet("x").m, "evil.example"))
    assert faults(told) == ["host"]
    assert told[-1][1] == zsr.Close("x", 4001, "host")
    assert desk.say("y", login(home.ann, desk.greet("y").m, "Relay.Example")) == []
    assert Desk(home.room).come("z", home.ann, home.made), "a relay that knows no name of its own takes any"


def commits_that_break_a_rule(home: House) -> dict[str, Made]:
    """By what the relay says of each."""
    same = zsr.decode(zsr.Signed, home.made.unit.roster)
    fewer = [each for each in home.made.entries if each[1].sigpub != home.cat.sigpub]
    out, under, all_ = removal(home, home.cat), home.under, home.everyone
    pair, eve = [home.ann, home.ben], new_device(home.room)
    turn = commit(home.made, under, same, home.ann, all_, reason=1)
    vanished = roster(home.room, under, home.ann, 2, fewer, consumed=home.spent)
    forgotten = roster(home.room, under, home.ann, 2, list(home.made.entries))
    unborn = zsr.encode(replace(home.made.body, epoch=7))
    leap = replace(turn.body, epoch=8, parent=H("commit", unborn))
    jump = replace(
        turn.unit,
        body=zsr.encode(leap),
        chain=(unborn,),
        sig=sign(home.ann.sig, "commit", H("commit", zsr.encode(leap))),
    )
    return {
        "nothing changed": commit(home.made, under, same, home.ann, all_, reason=0),
        "nothing changed ": commit(home.made, under, same, home.ann, all_, reason=3),
        "epoch does not follow": commit(home.made, under, same, home.ann, all_, reason=1, number=9),
        "changed roster is committed by another": commit(home.made, under, next_roster(home, 2), home.ben, all_),
        "roster number is out of range": commit(
            home.made, under, next_roster(home, 1, removed=[home.cat]), home.ann, pair),
        "a device vanishes without being gone": commit(home.made, under, vanished, home.ann, pair),
        "a consumed invite is forgotten": commit(home.made, under, forgotten, home.ann, all_),
        "slots are of another commit": replace(turn, upload=zsr.encode(replace(turn.unit, slots=out.unit.slots))),
        "commit signature does not verify": replace(turn, upload=zsr.encode(replace(turn.unit, sig=out.unit.sig))),
        "slots are not those of the roster": commit(home.made, under, same, home.ann, [*all_, eve], reason=1),
        "slots are not those of the roster ": commit(home.made, under, same, home.ann, [home.ben], reason=1),
        "committer is not listed": commit(home.made, under, same, eve, all_, reason=1),
        "chain is not the head's": replace(turn, upload=zsr.encode(replace(turn.unit, chain=(home.first.unit.body,)))),
        "chain does not lead to its commit": replace(
            turn, upload=zsr.encode(replace(turn.unit, body=zsr.encode(leap), sig=jump.sig, chain=(home.first.unit.body,)))),
    }  # fmt: skip


def test_attack_22_a_commit_that_breaks_a_rule_is_refused(home: House) -> None:
    """Verifier._commit, _slots, _chain, _born and follows, of which each says what it refuses.

    Seen to fail without: each of its `must`: nothing changed; changed roster is committed by another; roster number is
    out of range; a device vanishes without being gone; a consumed invite is forgotten; slots are of another commit;
    slots are not those of the roster; chain does not lead to its commit; commit signature does not verify.
    """
    desk = full_desk(home)
    for what, made in commits_that_break_a_rule(home).items():
        before = snapshot(desk)
        [(_, fault)] = desk.say("ann", zsr.UpCommit(1, made.upload))
        assert (fault.code, fault.text) == ("forged", what.strip())
        assert snapshot(desk) == before


def test_attack_22_a_parent_that_nobody_knows_lends_no_right() -> None:
    """Verifier._born judges a unit by itself: neither a leap past commits nobody signed, nor a stranger as parent, lets
    a member rotate where admins do, or commit a roster that an admin signed.

    Seen to fail without: each `must` of Verifier._born.
    """
    for who, reasons in ((1, (1, 2)), (0, (0, 3))):
        home = house(who=who)
        desk, listing = full_desk(home), zsr.decode(zsr.Signed, home.made.unit.roster)
        between = commit(home.made, home.under, listing, home.ann, home.everyone, reason=1)
        for reason in reasons:
            made = commit(between, home.under, listing, home.ben, home.everyone, reason=reason)
            assert refused(desk, "ben", hello(made)) == "forged"
        taken = commit(between, home.under, next_roster(home, 9), home.ben, home.everyone)
        assert refused(desk, "ben", hello(taken)) == "forged"


def test_a_junior_admin_removes_a_senior_one_only_at_that_members_own_request(home: House) -> None:
    under = charter(home.root, [home.ann, home.ben], no=1)
    listing = roster(home.room, under, home.ann, 2, list(home.made.entries), consumed=home.spent)
    both = commit(home.made, under, listing, home.ann, [home.ben, home.cat])
    desk = full_desk(home)
    desk.say("ann", zsr.UpCommit(1, both.upload))
    left = [each for each in home.made.entries if each[1].sigpub != home.ann.sigpub]
    coup = roster(home.room, under, home.ben, 3, left, [gone(home.ann)], home.spent)
    made = commit(both, under, coup, home.ben, [home.cat])
    assert refused(desk, "ben", zsr.UpCommit(2, made.upload)) == "forged"
    desk.say("ann", zsr.UpRequest(farewell(home.ann, [home.ann], 3)))
    assert faults(desk.say("ben", zsr.UpCommit(3, made.upload))) == ["unlisted"]


# ------------------------------------------------------------------------------------------------- the random walk --
SHARED = house()
NAMES = ("ann", "ben", "cat")
TTL, SLOW = 100.0, 20.0


@dataclass
class ModelEntry:
    no: int
    at: float
    cost: int
    what: bytes


class RelayWalk(RuleBasedStateMachine):
    """Three members come and go, post, acknowledge, wait and restart the relay; beside it a model made of lists."""

    @initialize()
    def begin(self) -> None:
        self.restarts, self.desk = 0, Desk(SHARED.room)
        self.desk.limits = zsr.Limits(ttl=TTL, slow_seconds=SLOW, sweep_seconds=0.0, directs=4)
        self.acked = dict.fromkeys(NAMES, 0)  # each member's own cursor, kept by the member
        self.reboot()

    def reboot(self) -> None:
        self.restarts += 1
        self.desk.boot(b"run %012d" % self.restarts)
        self.log: list[ModelEntry] = []
        self.next, self.base = 1, 0
        self.cursor = dict.fromkeys(NAMES, 0)
        self.on: dict[str, str] = {}
        self.directs: dict[str, dict[int, tuple[float, bytes]]] = {name: {} for name in NAMES}
        self.known = False
        self.acked = dict.fromkeys(NAMES, 0)

    def keys(self, name: str) -> Keys:
        found: Keys = getattr(SHARED, name)
        return found

    def cost(self, frame: Any) -> int:
        return len(zsr.encode_frame(frame)) + self.desk.limits.overhead

    def trim(self) -> None:
        low = min(self.cursor.values())
        self.log = [entry for entry in self.log if entry.no > low]

    def affords(self, cost: int) -> bool:
        """What `_afford` is to do, in its simplest form."""

        self.lost: list[ModelEntry] = []

        def short() -> int:
            used = self.base + sum(entry.cost for entry in self.log) + self.direct_bytes()
            return used + cost - self.desk.limits.max_room_memory

        if short() <= 0:
            return True
        self.trim()
        low, kept = min(self.cursor[name] for name in self.on), list(self.log)
        while short() > 0 and self.log and (self.log[0].no <= low or self.desk.now - self.log[0].at >= SLOW):
            self.log.pop(0)
        if short() <= 0:
            self.lost = kept[: len(kept) - len(self.log)]
            return True
        self.log = kept
        return False

    def direct_bytes(self) -> int:
        empty = self.cost(zsr.DownDirect(1, 1, ZERO16, ZERO32, 1, b""))
        return sum(empty + len(ct) for waiting in self.directs.values() for _, ct in waiting.values())

    @rule(name=st.sampled_from(NAMES))
    def come(self, name: str) -> None:
        if name in self.on:
            return
        socket_name = f"{name}{self.restarts}.{self.desk.now}.{self.next}"
        full = not self.known
        told = self.desk.come(socket_name, self.keys(name), SHARED.made if full else None, self.acked[name])
        if not self.known:
            self.known = True
            entry_frame = zsr.DownCommit(1, 2, SHARED.made.full)
            self.log, self.next = [ModelEntry(1, self.desk.now, self.cost(entry_frame), SHARED.made.full)], 2
            self.base = counted(self.desk.room) - self.log[0].cost
            tight = self.base + self.log[0].cost + 4000
            self.desk.limits = replace(self.desk.limits, max_room_memory=tight)
            self.desk.rooms._limits = self.desk.room.limits = self.desk.limits
        self.cursor[name] = max(self.cursor[name], self.acked[name])
        self.on[name] = socket_name
        mine = heard(told, socket_name)
        entries = [frame for frame in mine if isinstance(frame, (zsr.DownCommit, zsr.DownEvent))]
        assert [frame.no for frame in entries] == [entry.no for entry in self.log if entry.no > self.acked[name]]
        assert [getattr(frame, "ct", getattr(frame, "unit", None)) for frame in entries] == [
            entry.what for entry in self.log if entry.no > self.acked[name]
        ]
        waiting = [(frame.tid, frame.ct) for frame in mine if isinstance(frame, zsr.DownDirect)]
        assert waiting == [(tid, ct) for tid, (_, ct) in self.directs[name].items()]
        assert set(mine[-1].online) == {self.keys(each).dev for each in self.on}

    @precondition(lambda self: self.on)
    @rule(data=st.data())
    def go(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.on)))
        told = self.desk.leave(self.on.pop(name))
        assert told == ([(tuple(told[0][0]), zsr.DownPeer(self.keys(name).dev, 0))] if self.on else [])

    @precondition(lambda self: self.on)
    @rule(data=st.data(), size=st.integers(0, 1500))
    def post(self, data: st.DataObject, size: int) -> None:
        name = data.draw(st.sampled_from(sorted(self.on)))
        ct = os.urandom(size)
        frame = zsr.DownEvent(self.next, 1, self.keys(name).dev, 1, SHARED.made.ch, ct)
        told = self.desk.say(self.on[name], zsr.UpPost(5, 1, SHARED.made.ch, ct))
        if self.affords(self.cost(frame)):
            assert not faults(told) or self.lost, "who posted is told of a loss where there was one"
            told = [each for each in told if not isinstance(each[1], zsr.DownFault)]
            assert told[0][1] == frame
            assert set(told[0][0]) == set(self.on.values())
            assert told[1:] == [((self.on[name],), zsr.DownSent(5, self.next))]
            self.log.append(ModelEntry(self.next, self.desk.now, self.cost(frame), ct))
            self.next += 1
        else:
            assert faults(told) == ["full"]

    @precondition(lambda self: self.on)
    @rule(data=st.data())
    def ack(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.on)))
        no = data.draw(st.integers(self.acked[name], self.next - 1))
        assert self.desk.say(self.on[name], zsr.UpAck(self.desk.run, no)) == []
        self.acked[name] = no
        self.cursor[name] = max(self.cursor[name], no)

    @precondition(lambda self: self.on)
    @rule(data=st.data(), to=st.sampled_from(NAMES))
    def direct(self, data: st.DataObject, to: str) -> None:
        name = data.draw(st.sampled_from(sorted(self.on)))
        told = self.desk.say(self.on[name], zsr.UpDirect(6, self.keys(to).dev, SHARED.made.ch, 1, b"direct"))
        cost = self.cost(zsr.DownDirect(1, 1, ZERO16, ZERO32, 1, b"direct"))
        if not self.affords(cost):
            assert faults(told) == ["full"]
            return
        told = [each for each in told if not isinstance(each[1], zsr.DownFault)]
        if len(self.directs[to]) == 4:
            del self.directs[to][min(self.directs[to])]
        self.directs[to][self.desk.rooms._tid] = (self.desk.now, b"direct")
        assert told[-1] == ((self.on[name],), zsr.DownSent(6, 0))
        assert (len(told) == 2) == (to in self.on)

    @precondition(lambda self: self.on)
    @rule(data=st.data())
    def dack(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.on)))
        tids = tuple(data.draw(st.lists(st.sampled_from(sorted(self.directs[name]) or [0]), unique=True)))
        assert self.desk.say(self.on[name], zsr.UpDack(tids)) == []
        for tid in tids:
            self.directs[name].pop(tid, None)

    @rule(seconds=st.sampled_from([0.0, 1.0, 30.0, 90.0]))
    def wait(self, seconds: float) -> None:
        self.desk.expire(seconds)
        if not self.known:
            return
        self.trim()
        old = self.desk.now - TTL
        self.log = [entry for entry in self.log if entry.at > old]
        for name, waiting in self.directs.items():
            self.directs[name] = {tid: held for tid, held in waiting.items() if held[0] > old}
        if not self.on and not self.desk.rooms.counts()["rooms"]:
            self.reboot()  # for its members a room forgotten is a relay restarted, but for the run

    @rule()
    def restart(self) -> None:
        self.reboot()

    @invariant()
    def all_is_as_the_model_says(self) -> None:
        if not self.known:
            return
        room = self.desk.room
        assert {name: room.seats[self.keys(name).dev].cursor for name in NAMES} == self.cursor
        assert [entry.no for entry in room.log] == [entry.no for entry in self.log]
        assert room.used == self.desk.rooms._purse.used == counted(room) <= self.desk.limits.max_room_memory
        assert set(room.members()) == set(self.on.values())


RelayWalk.TestCase.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
test_a_random_walk_of_three_members_and_a_relay_agrees_with_the_model = RelayWalk.TestCase


# ======================================================================================================================
# Store: one list of cases, run over an IndexedDB in node and over those of three browser engines, with the real suite.
# Each case is JavaScript, for the store is used from there; it answers plain values and the test says what they must be.
# ======================================================================================================================

STORE_BLOCKS = ("room-1-bytes", "room-2-suite", "room-5-store")
NODE_STORAGE = """
const {indexedDB, IDBKeyRange, IDBObjectStore} = require('fake-indexeddb');
Object.assign(globals, {indexedDB, IDBKeyRange, IDBObjectStore, setTimeout, clearTimeout});
"""
STORE_CASES = r"""
'use strict';
const StoreCases = (() => {
  const ROOM = 'a1'.repeat(32), OTHER = 'b2'.repeat(32), DEV = 'c3'.repeat(16), DEV2 = 'd4'.repeat(16), FILE = 'e5'.repeat(16);
  const bytes = (...values) => Uint8Array.from(values);
  const list = (value) => value && [...value];
  const fault = (promise) => promise.then(() => 'no fault', (error) => error.code ?? String(error));
  const promised = (request) => new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
  const sealedWith = (key) => ({
    seal: (name, version, value) => Suite.sealRecord(key, name, version, value),
    open: (name, version, value) => Suite.openRecord(key, name, version, value),
  });
  const start = async (name, more = {}) => Store.open(name, {...sealedWith(await Suite.storeKey()), ...more});
  const event = (lam, dev, i, room = ROOM, value = bytes(i)) => ({put: 'event', room, lam, dev, i, value});
  const meta = (key, ...values) => ({put: 'meta', key, value: bytes(...values)});
  const place = ({lam, dev, i}) => `${lam} ${dev.slice(0, 2)} ${i}`;

  /** a connection of its own beside the store's: what another tab, or a hand in the developer tools, can do */
  const beside = async (name, work) => {
    const db = await promised(indexedDB.open(name));
    const answer = await work((table) => db.transaction(table, 'readwrite').objectStore(table));
    db.close();
    return answer;
  };
  const erase = (name) => promised(indexedDB.deleteDatabase(name));
  const watched = () => {
    const seen = [], ears = [];
    const hear = (what) => { for (const [type, go] of ears) if (type === what) go(); };
    const env = {...timers, IDBKeyRange, addEventListener: (...ear) => ears.push(ear), indexedDB: {open: (...asked) => {
      const request = indexedDB.open(...asked);
      request.addEventListener('success', () => seen.push(request.result));
      return request;
    }}};
    return {seen, env, hear};
  };
  const timers = {setTimeout: (run, ms) => setTimeout(run, ms), clearTimeout: (timer) => clearTimeout(timer)};
  const impatient = {clearTimeout: timers.clearTimeout, setTimeout: (run) => setTimeout(run, 50), IDBKeyRange};

  return {
    async keeps() {
      const store = await start('keeps');
      await store.tx([meta('me', 1, 2), meta(`room:${ROOM}`, 3), meta(`room:${OTHER}`, 4), event(5, DEV, 1),
        {put: 'chunk', room: ROOM, file: FILE, n: 0, value: bytes(6, 7, 8).subarray(1)}]);
      await store.tx([meta('me', 9)]);
      return {me: list(await store.meta('me')), none: await store.meta('nothing'),
        rooms: (await store.metas('room:')).map(([key, value]) => [key, list(value)]), all: (await store.metas('')).length,
        event: list((await store.event(ROOM, DEV, 1)).value), noEvent: await store.event(ROOM, DEV, 2),
        chunk: list(await store.chunk(ROOM, FILE, 0)), noChunk: await store.chunk(ROOM, FILE, 1)};
    },
    async orders() {
      const store = await start('orders');
      await store.tx([event(7, DEV, 2), event(3, DEV2, 1), event(3, DEV, 1), event(12, DEV2, 2), event(8, DEV, 1, OTHER), event(200, DEV, 3)]);
      const pages = [];
      for (let before = null, page; !page || page.length; before = page.length ? [page.at(-1).lam, page.at(-1).dev, page.at(-1).i] : before) {
        page = await store.events(ROOM, {before, limit: 2});
        pages.push(page.map(place));
      }
      return {pages, counts: [await store.count(ROOM), await store.count(OTHER), await store.count(FILE)],
        of: (await store.eventsOf(ROOM, DEV, 2, 9)).map(place), none: await store.eventsOf(ROOM, DEV, 3, 2)};
    },
    async changes() {
      const store = await start('changes');
      const chunk = (n, size, file = FILE) => ({put: 'chunk', room: ROOM, file, n, value: new Uint8Array(size)});
      await store.tx([meta('gone', 1), event(1, DEV, 1), event(2, DEV, 2), chunk(0, 5), chunk(2, 7), chunk(0, 3, DEV)]);
      const before = await store.chunks(ROOM, FILE);
      await store.tx([{del: 'meta', key: 'gone'}, {del: 'event', room: ROOM, lam: 1, dev: DEV, i: 1},
        {del: 'chunks', room: ROOM, file: FILE}, event(2, DEV, 2, ROOM, bytes(9))]);
      return {before, after: await store.chunks(ROOM, FILE), sibling: (await store.chunks(ROOM, DEV)).bytes,
        gone: await store.meta('gone'), events: (await store.events(ROOM, {limit: 9})).map(({i, value}) => [i, ...value])};
    },
    async wipes() {
      const store = await start('wipes');
      const all = (room) => [meta(`room:${room}:core`, 1), meta(`${room}:x`, 1), event(1, DEV, 1, room), event(2, DEV, 2, room),
        {put: 'chunk', room, file: FILE, n: 0, value: bytes(1)}];
      await store.tx([...all(ROOM), ...all(OTHER), meta('me', 1)]);
      await store.wipe(ROOM);
      return {metas: (await store.metas('')).map(([key]) => key.replaceAll(OTHER, 'other')),
        events: [await store.count(ROOM), await store.count(OTHER)],
        chunks: [(await store.chunks(ROOM, FILE)).count, (await store.chunks(OTHER, FILE)).count]};
    },
    async wholeOrNothing() {
      const store = await start('whole');
      await store.tx([event(4, DEV, 1)]);
      const clash = await fault(store.tx([meta('me', 1), event(5, DEV, 1)]));
      const unknown = await fault(store.tx([meta('me', 1), {put: 'rumour', value: bytes(1)}]));
      await store.tx([]);
      return {clash, unknown, me: await store.meta('me'), kept: (await store.events(ROOM, {limit: 9})).map(place)};
    },
    async hides() {
      const store = await start('hides');
      const canary = Bytes.utf8('canary in a coal mine');
      await store.tx([{put: 'meta', key: 'me', value: canary}, event(1, DEV, 1, ROOM, canary)]);
      return beside('hides', async (table) => {
        const records = [...await promised(table('meta').getAll()), ...await promised(table('events').getAll())];
        const texts = records.map(({ct}) => Array.from(new Uint8Array(ct), (byte) => String.fromCharCode(byte)).join(''));
        return {count: records.length, seen: texts.some((text) => text.includes('canary')),
          buffers: records.every(({ct}) => ct instanceof ArrayBuffer), size: records[0].ct.byteLength - canary.length};
      });
    },
    async storesNoMoreThanTheView() {
      const store = await start('views');
      await store.tx([{put: 'chunk', room: ROOM, file: FILE, n: 0, value: new Uint8Array(1000).subarray(10, 14)}]);
      return beside('views', async (table) => (await promised(table('chunks').getAll()))[0].data.byteLength);
    },
    async damaged() {
      const store = await start('damaged');
      await store.tx([meta('one', 1), meta('two', 2), event(1, DEV, 1)]);
      const change = (table, key, how) => beside('damaged', async (open) => {
        const record = await promised(open(table).get(key));
        return promised(open(table).put(how(record)));
      });
      const flip = (record) => ({...record, ct: Uint8Array.from(new Uint8Array(record.ct), (byte, at) => at === 20 ? byte ^ 1 : byte).buffer});
      const place = [ROOM, 1, DEV, 1];
      await change('meta', 'one', flip);
      await change('events', place, flip);
      const found = [await fault(store.meta('one')), await fault(store.metas('')), await fault(store.event(ROOM, DEV, 1)),
        await fault(store.events(ROOM, {limit: 5})), await fault(store.eventsOf(ROOM, DEV, 1, 1))];
      await change('meta', 'one', flip);
      await change('events', place, flip);
      const healed = [list(await store.meta('one')), list((await store.event(ROOM, DEV, 1)).value)];
      await change('meta', 'two', (record) => ({...record, k: 'one'}));
      const moved = await fault(store.meta('one'));
      await change('meta', 'two', (record) => ({...record, version: 2}));
      return {found, healed, moved, version: await fault(store.meta('two'))};
    },
    async wrongKey() {
      const right = sealedWith(await Suite.storeKey());
      const first = await Store.open('wrong', right);
      await first.tx([meta('me', 1)]);
      const stranger = await start('wrong');
      const refused = await fault(stranger.meta('me'));
      return {refused, still: list(await first.meta('me'))};
    },
    async storeKey() {
      const [one, two] = [await start('key'), await start('key')];
      const before = await one.key();
      const kept = await Promise.all([one.keepKey(bytes(1)), two.keepKey(bytes(2))]);
      await one.tx([meta('key', 5)]);
      const after = await two.key();
      await one.tx([{put: 'key', value: bytes(3)}]);
      return {before, agreed: kept[0][0] === kept[1][0] && after[0] === kept[0][0], metas: (await one.metas('')).length,
        replaced: list(await two.key())};
    },
    async erased() {
      const lost = [];
      const store = await start('erased', {lost: (code) => lost.push(code)});
      await store.tx([meta('me', 1)]);
      await erase('erased');
      const read = await fault(store.meta('me')), write = await fault(store.tx([meta('me', 2)]));
      const again = await start('erased');
      return {lost, read, write, me: await again.meta('me')};
    },
    async erasedUnseen() {
      const {seen, env} = watched();
      const store = await start('unseen', {env});
      seen[0].close();
      await erase('unseen');
      const read = await fault(store.meta('me'));
      const fresh = await promised(indexedDB.open('unseen'));
      const tables = fresh.objectStoreNames.length;
      fresh.close();
      return {read, tables};
    },
    async reconnects() {
      const {seen, env} = watched();
      const store = await start('reconnects', {env});
      await store.tx([meta('me', 1)]);
      seen[0].close();
      const [me] = await Promise.all([store.meta('me'), store.tx([meta('you', 2)]), store.count(ROOM)]);
      return {me: list(me), you: list(await store.meta('you')), connections: seen.length};
    },
    async newer() {
      const lost = [];
      const store = await start('newer', {lost: (code) => lost.push(code)});
      (await promised(indexedDB.open('newer', 2))).close();
      return {lost, call: await fault(store.meta('me')), open: await fault(start('newer'))};
    },
    async leaves() {
      const left = watched(), store = await start('leaves'), gone = await start('leaves', {env: left.env});
      const {put} = IDBObjectStore.prototype;
      IDBObjectStore.prototype.put = function leave(...given) {
        Promise.resolve().then(() => left.hear('pagehide'));
        return put.apply(this, given);
      };
      const saying = fault(gone.tx([{put: 'key', value: bytes(7)}]));
      let found = null;
      for (let looks = 0; looks < 50 && !found; looks += 1) found = await store.key();
      IDBObjectStore.prototype.put = put;
      left.hear('pageshow');
      return {found: list(found), said: await saying};
    },
    async neverWaits() {
      const mute = {...impatient, indexedDB: {open: () => ({})}};
      const denied = {...impatient, indexedDB: {open: () => { throw Object.assign(new Error('no'), {name: 'SecurityError'}); }}};
      const other = await promised(indexedDB.open('waits'));
      const erasing = erase('waits');
      const queued = await fault(start('waits', {env: {...impatient, indexedDB}}));
      other.close();
      await erasing;
      const left = await promised(indexedDB.open('waits'));
      const tables = left.objectStoreNames.length;
      left.close();
      return {mute: await fault(start('mute', {env: mute})), denied: await fault(start('denied', {env: denied})),
        none: await fault(start('none', {env: impatient})), queued, tables};
    },
    async takes() {
      const key = await Suite.storeKey(), first = await Store.open('takes', sealedWith(key)), said = [];
      await first.claim();
      await first.tx([meta('me', 1)]);
      const second = await Store.open('takes', sealedWith(key));
      const racing = [fault(first.tx([meta('me', 2), event(1, DEV, 1)])), second.claim()];
      const read = list(await second.meta('me'));
      said.push(...await Promise.all(racing));
      const between = list(await second.meta('me'));
      const chunk = {put: 'chunk', room: ROOM, file: FILE, n: 0, value: bytes(1)};
      said.push(await fault(first.tx([meta('me', 3)])), await fault(first.wipe(ROOM)), await fault(first.tx([chunk])));
      said.push(await fault(second.tx([meta('me', 4)])), await fault(second.tx([chunk])));
      return {said, late: said[0] === 'no fault' || between[0] === 1, read: read[0] <= 2, me: list(await first.meta('me'))};
    },
    /** chunks that are written while a transaction holds the records: the other way round waits as little */
    async aside() {
      const store = await start('aside'), db = await promised(indexedDB.open('aside'));
      await store.claim();
      const held = db.transaction('meta', 'readwrite').objectStore('meta');
      let written = false;
      const writing = store.tx([{put: 'chunk', room: ROOM, file: FILE, n: 0, value: bytes(1)}]).then(() => { written = true; });
      for (let n = 0; n < 5000 && !written; n += 1) await promised(held.get('me'));   // it lives while it is asked
      const beside = written;
      held.transaction.abort();
      await writing;
      db.close();
      return beside;
    },
    async closes() {
      const store = await start('closes');
      await store.close();
      return fault(store.meta('me'));
    },
    async full() {
      const store = await start('full');
      await store.tx([meta('me', 1)]);
      const noise = () => Bytes.concat(...Array.from({length: 16}, () => Suite.random(65536)));     // engines compress
      const fill = (n) => store.tx([{put: 'chunk', room: ROOM, file: FILE, n, value: noise()}, meta('me', 2)]);
      let outcome = 'no fault';
      for (let n = 0; n < 64 && outcome === 'no fault'; n += 1) outcome = await fault(fill(n));
      const me = list(await store.meta('me'));
      await store.tx([{del: 'chunks', room: ROOM, file: FILE}]);
      return {outcome, me, then: await fault(store.tx([{put: 'chunk', room: ROOM, file: FILE, n: 0, value: bytes(1)}]))};
    },
    async holds() {
      const first = await Store.hold('one');
      const second = await Store.hold('one'), elsewhere = await Store.hold('two');
      await first();
      const third = await Store.hold('one');
      return [first, second, elsewhere, third].map((release) => typeof release);
    },
    async steals() {
      const events = [];
      const first = await Store.hold('prize', {stolen: () => events.push('stolen')});
      const second = await Store.hold('prize', {takeover: true, stolen: () => events.push('stolen again')});
      await first();
      const third = await Store.hold('prize');
      await second();
      return {events, third, free: typeof await Store.hold('prize')};
    },
    async freesWithTheTab() {
      const frame = document.body.appendChild(document.createElement('iframe'));
      await new Promise((resolve) => { frame.onload = resolve; frame.src = location.href; });
      await frame.contentWindow.eval('Store.hold("tab").then(() => 0)');
      const held = await Store.hold('tab');
      frame.remove();
      let release = null;
      while (!release) release = await Store.hold('tab');
      return {held, free: typeof release};
    },
    async space() {
      const {usage, quota, persisted} = await Store.space();
      return [typeof usage, typeof quota, typeof persisted];
    },
    // Firefox asks the person, who may never answer: the page must never wait for it, so neither does this.
    persists: async () => {
      const asked = Store.persist();
      const answer = await Promise.race([asked, new Promise((go) => setTimeout(go, 500, 'asked'))]);
      return asked instanceof Promise && (answer === 'asked' ? 'asked' : typeof answer);
    },
    async writes(value) {
      const store = await Store.open('reload', sealedWith(new Uint8Array(32)));
      await store.tx([meta('me', value)]);
      return list(await store.meta('me'));
    },
    async reads() {
      return list(await (await Store.open('reload', sealedWith(new Uint8Array(32)))).meta('me'));
    },
  };
})();
"""

Case = Callable[..., Any]


class BlocksPage:
    """A page of some blocks and nothing else, on an origin that counts as secure."""

    def __init__(self, sources: list[tuple[str, str]]) -> None:
        scripts = "".join(f"<script>{source}</script>\n" for _, source in sources)
        self.body = f"<!doctype html><meta charset=utf-8><link rel=icon href='data:,'><body>\n{scripts}".encode()
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self.server.server_port}/"
        self.thread = threading.Thread(target=self.server.serve_forever)
        self.thread.start()

    def _handler(self) -> type[http.server.BaseHTTPRequestHandler]:
        body = self.body

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(200)
                self.send_header("Content-Type", "text/html; charset=utf-8")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                """Says nothing: pytest's output is for tests."""

        return Handler

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture(scope="module")
def store_page() -> Iterator[BlocksPage]:
    page = BlocksPage([*page_blocks(STORE_BLOCKS), ("cases", STORE_CASES)])
    yield page
    page.close()


@pytest.fixture(scope="module")
def case(request: pytest.FixtureRequest) -> Iterator[Case]:
    """Runs a case by its name where the parameter says: in node, or with someone's page of blocks in an engine."""
    if request.param == "node":
        node = Node([*page_blocks(STORE_BLOCKS), ("cases", STORE_CASES)], NODE_STORAGE)
        yield lambda name: node.call(f"StoreCases.{name}")
        node.close()
        return
    user: User = request.getfixturevalue("browsers")[request.param].user()
    user.goto(request.getfixturevalue("store_page").url)
    yield lambda name, *given: user.js(f"StoreCases.{name}(...{json.dumps(given)})")
    errors = user.errors
    user.close()
    assert not errors


STORE_ENGINES = [
    pytest.param(name, marks=[pytest.mark.browser, pytest.mark.xdist_group(f"store-{name}")]) for name in ENGINES
]
everywhere = pytest.mark.parametrize("case", ["node", *STORE_ENGINES], indirect=True, scope="module")
in_browsers = pytest.mark.parametrize("case", STORE_ENGINES, indirect=True, scope="module")


@everywhere
class TestStore:
    """What is put is there, whole or not at all, sealed; and every way to fail has a name."""

    def test_values_come_back_as_they_were_put(self, case: Case) -> None:
        rooms = [["room:" + "a1" * 32, [3]], ["room:" + "b2" * 32, [4]]]
        assert case("keeps") == {
            "me": [9],
            "none": None,
            "rooms": rooms,
            "all": 3,
            "event": [1],
            "noEvent": None,
            "chunk": [7, 8],
            "noChunk": None,
        }

    def test_pages_go_from_the_newest_event_back_by_lamport_device_and_number(self, case: Case) -> None:
        answer = case("orders")
        assert answer["pages"] == [["200 c3 3", "12 d4 2"], ["7 c3 2", "3 d4 1"], ["3 c3 1"], []]
        assert answer["counts"] == [5, 1, 0]
        assert answer["of"] == ["7 c3 2", "200 c3 3"]
        assert answer["none"] == []

    def test_records_are_replaced_and_deleted_and_files_counted(self, case: Case) -> None:
        answer = case("changes")
        assert answer["before"] == {"count": 2, "bytes": 12, "held": [0, 2]}
        assert answer["after"] == {"count": 0, "bytes": 0, "held": []}
        assert (answer["sibling"], answer["gone"], answer["events"]) == (3, None, [[2, 9]])

    def test_a_wiped_room_leaves_nothing_and_takes_nothing_else_along(self, case: Case) -> None:
        answer = case("wipes")
        assert answer == {"metas": ["other:x", "me", "room:other:core"], "events": [0, 2], "chunks": [0, 1]}

    def test_a_transaction_is_kept_whole_or_not_at_all(self, case: Case) -> None:
        answer = case("wholeOrNothing")
        assert answer["clash"] == "clash"
        assert "knows no rumour" in answer["unknown"]
        assert (answer["me"], answer["kept"]) == (None, ["4 c3 1"])

    def test_nothing_lies_in_the_clear_and_all_of_it_is_array_buffers(self, case: Case) -> None:
        assert case("hides") == {"count": 2, "seen": False, "buffers": True, "size": 12 + 16}

    def test_a_view_does_not_drag_its_buffer_into_the_store(self, case: Case) -> None:
        assert case("storesNoMoreThanTheView") == 4

    def test_an_altered_or_exchanged_record_is_damaged_and_nothing_is_overwritten(self, case: Case) -> None:
        answer = case("damaged")
        assert answer["found"] == ["damaged"] * 5
        assert answer["healed"] == [[1], [1]]
        assert (answer["moved"], answer["version"]) == ("damaged", "damaged")

    def test_a_wrong_key_reads_nothing_and_harms_nothing(self, case: Case) -> None:
        assert case("wrongKey") == {"refused": "damaged", "still": [1]}

    def test_two_new_tabs_agree_on_one_store_key(self, case: Case) -> None:
        assert case("storeKey") == {"before": None, "agreed": True, "metas": 1, "replaced": [3]}

    def test_erasing_in_another_tab_is_told_and_nothing_is_laid_anew(self, case: Case) -> None:
        assert case("erased") == {"lost": ["missing"], "read": "missing", "write": "missing", "me": None}

    def test_a_store_that_was_erased_unseen_is_missing_rather_than_empty(self, case: Case) -> None:
        assert case("erasedUnseen") == {"read": "missing", "tables": 0}

    def test_a_dropped_connection_is_made_again_without_the_caller_noticing(self, case: Case) -> None:
        assert case("reconnects") == {"me": [1], "you": [2], "connections": 2}

    def test_what_was_being_written_as_the_page_was_left_is_there(self, case: Case) -> None:
        """Seen to fail without: commit in the store's conclude; what is under way was given up then."""
        assert case("leaves") == {"found": [7], "said": "no fault"}

    def test_a_newer_page_in_another_tab_is_told(self, case: Case) -> None:
        assert case("newer") == {"lost": ["newer"], "call": "newer", "open": "newer"}

    def test_storage_that_is_silent_denied_or_absent_is_a_fault_and_never_a_wait(self, case: Case) -> None:
        answer = case("neverWaits")
        assert (answer["mute"], answer["denied"], answer["none"]) == ("blocked", "missing", "missing")
        assert (answer["queued"], answer["tables"]) == ("blocked", 0)

    def test_of_two_tabs_only_the_last_one_that_took_the_store_writes(self, case: Case) -> None:
        answer = case("takes")
        assert answer["said"][2:] == ["missing", "missing", "missing", "no fault", "no fault"]
        assert answer["said"][0] in {"no fault", "missing"}
        assert (answer["late"], answer["read"], answer["me"]) == (True, True, [4])

    def test_a_closed_store_answers_with_a_fault(self, case: Case) -> None:
        assert case("closes") == "missing"


@pytest.mark.parametrize("case", ["node"], indirect=True, scope="module")
def test_chunks_and_records_do_not_wait_for_each_other(case: Case) -> None:
    """Where the engine lets more than one write at a time: Firefox does not, nor does Chromium in private windows."""
    assert case("aside") is True


@in_browsers
class TestTabs:
    """The lock that lets one tab work on a room, and what the browser says of its disk."""

    def test_one_holds_a_name_until_it_lets_go(self, case: Case) -> None:
        assert case("holds") == ["function", "object", "function", "function"]

    def test_a_takeover_tells_the_one_that_held_it(self, case: Case) -> None:
        assert case("steals") == {"events": ["stolen"], "third": None, "free": "function"}

    def test_a_lock_goes_with_its_tab(self, case: Case) -> None:
        assert case("freesWithTheTab") == {"held": None, "free": "function"}

    def test_the_disk_is_told_in_numbers(self, case: Case) -> None:
        assert case("space") == ["number", "number", "boolean"]

    def test_the_answer_to_the_wish_to_stay_is_yes_or_no_or_up_to_the_person(
        self, case: Case, request: pytest.FixtureRequest
    ) -> None:
        assert case("persists") == ("asked" if "firefox" in request.node.name else "boolean")


@pytest.mark.browser
class TestDisk:
    @pytest.mark.parametrize("engine", ENGINES)
    def test_a_transaction_outlives_a_reload(
        self, arrive: Callable[..., User], store_page: BlocksPage, engine: str
    ) -> None:
        user = arrive(engine)
        user.goto(store_page.url)
        assert user.js("StoreCases.writes(7)") == [7]
        user.reload()
        assert user.js("StoreCases.reads()") == [7]

    def test_a_full_disk_is_told_and_what_was_there_stays(self, browsers: Browsers, store_page: BlocksPage) -> None:
        user = browsers["chromium"].user()
        assert isinstance(user, PlaywrightUser)
        user.goto(store_page.url)
        limit = {"origin": store_page.url.rstrip("/"), "quotaSize": 8_000_000}
        session = user.do(lambda: user.context.new_cdp_session(user.tab))
        user.do(lambda: session.send("Storage.overrideQuotaForOrigin", limit))
        answer = user.js("StoreCases.full()")
        user.close()
        assert answer == {"outcome": "full", "me": [2], "then": "no fault"}


# ======================================================================================================================
# Link: over real sockets to a real server, with the clock and the browser's events in the test's hand. A timer of the
# link fires only when the test lets time pass, so every wait is checked to the millisecond and nothing is slept.
# ======================================================================================================================

LINK_BLOCKS = ("room-1-bytes", "room-6-link")
NODE_SOCKET = "Object.assign(globals, {WebSocket: require('ws'), EventTarget, Event});"
LINK_RIG = r"""
'use strict';
const Rig = (() => {
  const REMOVED = 4003;
  let line, env, log, now, timers;

  class Counted extends EventTarget {
    types = new Set();
    addEventListener(type, listener) { this.types.add(type); super.addEventListener(type, listener); }
    removeEventListener(type, listener) { this.types.delete(type); super.removeEventListener(type, listener); }
  }
  const browser = (protocol) => Object.assign(new Counted(), {
    WebSocket, location: {protocol}, navigator: {onLine: true}, Date: {now: () => now},
    document: Object.assign(new Counted(), {visibilityState: 'visible'}),
    setTimeout(run, ms) { const timer = {run, due: now + ms}; timers.add(timer); return timer; },
    clearTimeout: (timer) => timers.delete(timer),
  });
  const note = (on, more) => log.push({on, ...more});
  const owner = {
    open: () => note('open'),
    message: (bytes) => note('message', {text: Bytes.text(bytes)}),
    closed(closed) { note('closed', closed); if (closed.code === REMOVED) line.close(); },
    waiting: (until) => note('waiting', {ms: until - now}),
    beat() { note('beat'); return Bytes.utf8('ping'); },
  };
  return {
    connect(url, spread = 0, protocol = 'http:') {
      [env, log, now, timers] = [browser(protocol), [], 1e12, new Set()];
      line = Link.connect(url, owner, {random: () => spread, env});
    },
    pass_time(ms) {
      const end = now + ms;
      const next = () => [...timers].filter(({due}) => due <= end).sort((a, b) => a.due - b.due)[0];
      for (let timer = next(); timer; timer = next()) {
        timers.delete(timer);
        now = timer.due;
        timer.run();
      }
      now = end;
    },
    happens: (type) => (type === 'visibilitychange' ? env.document : env).dispatchEvent(new Event(type)),
    show(state) { env.document.visibilityState = state; Rig.happens('visibilitychange'); },
    offline: () => { env.navigator.onLine = false; },
    left: () => [timers.size, env.types.size + env.document.types.size],
    log: () => log,
    send: (bytes) => line.send(bytes),
    fill: (count, size) => { for (let n = 0; n < count; n += 1) line.send(new Uint8Array(size)); },
    buffered: () => line.buffered(),
    retry: () => line.retry(),
    hold: (ms) => line.hold(ms),
    close: () => line.close(),
  };
})();
"""

CLOSED = {"on": "closed", "code": 1006, "everOpened": True, "never": False}


class Peer:
    """A real server on a port of its own; its mood says what it does with who comes and with what it hears."""

    def __init__(self, port: int = 0) -> None:
        self.mood = "answers"
        self.heard: list[bytes | str] = []
        self.met: list[websockets.sync.server.ServerConnection] = []
        self.over = threading.Event()
        self.server = websockets.sync.server.serve(self._talk, "127.0.0.1", port, ping_interval=None, close_timeout=1)
        self.port: int = self.server.socket.getsockname()[1]
        self.url = f"ws://127.0.0.1:{self.port}/"
        self.thread = threading.Thread(target=self.server.serve_forever)
        self.thread.start()

    def _talk(self, connection: websockets.sync.server.ServerConnection) -> None:
        self.met.append(connection)
        with contextlib.suppress(websockets.exceptions.ConnectionClosed):
            if self.mood == "refuses":
                connection.close(4001, "full")
            elif self.mood == "stalls":
                self.over.wait()
            for message in connection:
                self.heard.append(message)
                if self.mood == "answers":
                    connection.send(b"pong")

    def stop(self) -> None:
        self.over.set()
        self.server.shutdown()
        self.thread.join()


class Line:
    """The rig in node: a link under test, its log, and the time it lives in."""

    def __init__(self, node: Node) -> None:
        self.node = node

    def __getattr__(self, name: str) -> Any:
        return lambda *given: self.node.call(f"Rig.{name}", *given)

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [entry for entry in self.log() if entry["on"] == kind]

    def comes(self, kind: str, count: int = 1) -> dict[str, Any]:
        """The newest log entry of a kind, once there are so many."""
        return eventually(lambda: self.of(kind)[count - 1 :], f"{count} times {kind}")[-1]

    def opened(self, url: str, *more: object) -> None:
        self.connect(url, *more)
        self.comes("open")


@pytest.fixture(scope="module")
def link_node() -> Iterator[Node]:
    started = Node([*page_blocks(LINK_BLOCKS), ("rig", LINK_RIG)], NODE_SOCKET)
    yield started
    started.close()


@pytest.fixture
def line(link_node: Node) -> Iterator[Line]:
    one = Line(link_node)
    yield one
    one.close()


@pytest.fixture
def peer() -> Iterator[Peer]:
    one = Peer()
    yield one
    one.stop()


@pytest.fixture
def nowhere() -> str:
    """An address where nobody listens."""
    return f"ws://127.0.0.1:{free_port()}/"


@pytest.fixture
def silent_port() -> Iterator[str]:
    """An address that accepts connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"ws://127.0.0.1:{listener.getsockname()[1]}/"


class TestMoving:
    def test_bytes_go_both_ways_and_text_frames_are_dropped(self, line: Line, peer: Peer) -> None:
        line.opened(peer.url)
        assert line.send(b"\x00\xff") is True
        line.comes("message")
        peer.met[0].send("text")
        peer.met[0].send(b"bytes")
        line.comes("message", 2)
        assert peer.heard == [b"\x00\xff"]
        assert [entry["text"] for entry in line.of("message")] == ["pong", "bytes"]

    def test_without_an_open_socket_nothing_is_taken(self, line: Line, nowhere: str) -> None:
        line.connect(nowhere)
        assert line.send(b"early") is False
        line.comes("waiting")
        assert line.send(b"late") is False
        assert line.buffered() == 0

    def test_an_address_that_no_socket_can_have_throws_at_once(self, link_node: Node) -> None:
        with pytest.raises(NodeBroken, match="SyntaxError"):
            link_node.call("Link.connect", "nonsense", {}, {})


class TestTryingAgain:
    @pytest.mark.parametrize(
        ("spread", "waits"),
        [
            (0, [500, 1000, 2000, 4000, 8000, 15000, 15000]),
            (0.5, [750, 1500, 3000, 6000, 12000, 22500, 22500]),
            (1, [1000, 2000, 4000, 8000, 16000, 30000, 30000]),
        ],
    )
    def test_waits_double_up_to_half_a_minute_within_their_spread(
        self, line: Line, nowhere: str, spread: float, waits: list[int]
    ) -> None:
        line.connect(nowhere, spread)
        for count, wait in enumerate(waits, 1):
            assert line.comes("waiting", count)["ms"] == wait
            line.pass_time(wait)
        assert line.left()[0] == 1

    @pytest.mark.parametrize(("spread", "asked"), [(0, 8000), (0.5, 12_000)])
    def test_one_wait_is_as_long_as_the_other_side_asked_for(
        self, line: Line, nowhere: str, spread: float, asked: int
    ) -> None:
        line.connect(nowhere, spread)
        first = line.comes("waiting")["ms"]
        line.hold(8000)
        line.pass_time(first)
        assert line.comes("waiting", 2)["ms"] == asked
        line.pass_time(asked)
        assert line.comes("waiting", 3)["ms"] == 2000 * (1 + spread)

    def test_a_relay_that_restarts_is_found_again(self, line: Line, peer: Peer) -> None:
        line.opened(peer.url)
        peer.stop()
        assert line.comes("closed") == {**CLOSED, "code": 1001, "reason": "", "triedMs": 0}
        line.pass_time(line.comes("waiting")["ms"])
        line.comes("waiting", 2)
        again = Peer(peer.port)
        line.pass_time(1000)
        line.comes("open", 2)
        line.close()
        again.stop()

    def test_opening_alone_does_not_shorten_the_waits_but_five_good_seconds_do(self, line: Line, peer: Peer) -> None:
        peer.mood = "refuses"
        line.connect(peer.url)
        for count, wait in enumerate((500, 1000, 2000), 1):
            assert line.comes("closed", count)["code"] == 4001
            assert line.comes("waiting", count)["ms"] == wait
            peer.mood = "refuses" if count < 3 else "answers"
            line.pass_time(wait)
        line.comes("open", 4)
        line.pass_time(5000)
        peer.met[-1].close(1012)
        assert line.comes("waiting", 4)["ms"] == 500

    def test_a_try_that_is_never_answered_ends_after_ten_seconds(self, line: Line, silent_port: str) -> None:
        line.connect(silent_port)
        line.pass_time(9_999)
        assert line.log() == []
        line.pass_time(1)
        unanswered = {**CLOSED, "everOpened": False, "reason": "unanswered", "triedMs": 10_000}
        assert line.log() == [unanswered, {"on": "waiting", "ms": 500}]

    def test_three_tries_from_an_https_page_that_never_opened_say_never(self, line: Line, nowhere: str) -> None:
        line.connect(nowhere, 0, "https:")
        for count in (1, 2, 3):
            line.pass_time(line.comes("waiting", count)["ms"])
        line.comes("closed", 4)
        assert [entry["never"] for entry in line.of("closed")] == [False, False, True, True]

    def test_never_is_not_said_offline_nor_from_a_file_nor_after_one_success(
        self, line: Line, nowhere: str, peer: Peer
    ) -> None:
        for url, protocol in ((nowhere, "https:"), (nowhere, "file:"), (peer.url, "https:")):
            line.connect(url, 0, protocol)
            if protocol == "https:" and url == nowhere:
                line.offline()
            if url == peer.url:
                line.comes("open")
                peer.stop()
            for count in (1, 2, 3):
                line.pass_time(line.comes("waiting", count)["ms"])
            assert not line.comes("closed", 4)["never"]
            line.close()

    @pytest.mark.parametrize("event", ["online", "pageshow", "visibilitychange"])
    def test_what_waits_tries_at_once_when_the_page_wakes(self, line: Line, nowhere: str, event: str) -> None:
        line.connect(nowhere)
        line.comes("waiting")
        line.happens(event)
        line.comes("closed", 2)

    def test_what_hangs_in_a_try_begins_anew_when_the_page_wakes(self, line: Line, silent_port: str) -> None:
        line.connect(silent_port)
        line.pass_time(3_999)
        line.happens("online")
        assert line.log() == []
        line.pass_time(1)
        line.happens("online")
        assert [entry["on"] for entry in line.log()] == ["closed"]
        assert line.left()[0] == 1

    def test_a_person_may_ask_for_a_try_and_for_short_waits_again(self, line: Line, nowhere: str) -> None:
        line.connect(nowhere)
        for count in (1, 2, 3):
            line.pass_time(line.comes("waiting", count)["ms"])
        line.comes("waiting", 4)
        line.retry()
        assert line.comes("waiting", 5)["ms"] == 500


class TestSilence:
    def test_after_twenty_seconds_it_asks_and_an_answer_satisfies_it(self, line: Line, peer: Peer) -> None:
        line.opened(peer.url)
        line.pass_time(19_999)
        assert line.of("beat") == []
        line.pass_time(1)
        line.comes("message")
        line.pass_time(19_999)
        assert len(line.of("beat")) == 1
        line.pass_time(1)
        line.comes("message", 2)
        assert peer.heard == [b"ping", b"ping"]

    def test_whatever_is_heard_puts_the_question_off(self, line: Line, peer: Peer) -> None:
        line.opened(peer.url)
        line.pass_time(15_000)
        peer.met[0].send(b"news")
        line.comes("message")
        line.pass_time(19_999)
        assert line.of("beat") == []
        line.pass_time(1)
        assert len(line.of("beat")) == 1

    def test_ten_seconds_without_an_answer_are_the_end_of_a_connection(self, line: Line, peer: Peer) -> None:
        peer.mood = "is mute"
        line.opened(peer.url)
        line.pass_time(29_999)
        assert line.of("closed") == []
        line.pass_time(1)
        assert line.of("closed") == [{**CLOSED, "reason": "silent", "triedMs": 30_000}]
        line.pass_time(500)
        line.comes("open", 2)

    def test_a_line_that_may_be_slow_gets_twice_the_patience_until_it_answers_at_once(
        self, line: Line, peer: Peer
    ) -> None:
        """Of a large message nothing is heard until it is whole: at the same patience it would never come."""
        peer.mood = "is mute"
        line.opened(peer.url)
        for number, seconds in enumerate((10, 20, 40, 80, 80), 1):
            line.pass_time(20_000 + 1000 * seconds - 1)
            assert len(line.of("closed")) == number - 1
            line.pass_time(1)
            assert line.comes("closed", number)["reason"] == "silent"
            line.pass_time(500)
            line.comes("open", number + 1)
        line.pass_time(20_000)
        eventually(lambda: len(peer.heard) == 6, "it is asked")
        peer.met[-1].send(b"pong")
        line.comes("message")
        line.pass_time(29_999)
        assert len(line.of("closed")) == 5
        line.pass_time(1)
        assert len(line.of("closed")) == 6

    @pytest.mark.parametrize("event", ["online", "offline", "pageshow", "visibilitychange"])
    def test_a_page_that_wakes_gives_an_open_socket_four_seconds(self, line: Line, peer: Peer, event: str) -> None:
        peer.mood = "is mute"
        line.opened(peer.url)
        line.happens(event)
        assert len(line.of("beat")) == 1
        line.pass_time(3_999)
        assert line.of("closed") == []
        line.pass_time(1)
        assert line.comes("closed")["reason"] == "silent"

    def test_a_hidden_page_asks_nothing_until_it_is_seen_again(self, line: Line, peer: Peer) -> None:
        line.opened(peer.url)
        line.show("hidden")
        line.pass_time(90_000)
        assert line.of("beat") == []
        line.show("visible")
        assert len(line.of("beat")) == 1

    def test_a_question_behind_a_moving_upload_is_waited_for(self, line: Line, peer: Peer) -> None:
        peer.mood = "stalls"
        line.opened(peer.url)
        line.fill(64, 1 << 18)
        line.pass_time(20_000)
        full = line.buffered()
        for _ in range(32):
            peer.met[0].recv()
        eventually(lambda: line.buffered() < full, "the upload moves")
        line.pass_time(10_000)
        assert line.of("closed") == []
        eventually(lambda: line.pass_time(10_000) or line.of("closed"), "an upload that stands still is given up")
        assert line.comes("closed")["reason"] == "silent"


class TestEnding:
    def test_closing_leaves_no_timer_no_listener_and_no_word(self, line: Line, peer: Peer) -> None:
        line.opened(peer.url)
        line.close()
        assert line.left() == [0, 0]
        eventually(lambda: peer.met[0].close_code, "the peer hears of it")
        line.pass_time(100_000)
        line.retry()
        assert [entry["on"] for entry in line.log()] == ["open"]
        assert line.send(b"x") is False

    def test_closing_while_it_tries_or_waits_leaves_nothing_either(
        self, line: Line, nowhere: str, silent_port: str
    ) -> None:
        line.connect(silent_port)
        assert line.left() == [1, 4]
        line.close()
        assert line.left() == [0, 0]
        line.connect(nowhere)
        line.comes("waiting")
        line.close()
        assert line.left() == [0, 0]

    def test_an_owner_may_close_it_when_told_that_it_is_closed(self, line: Line, peer: Peer) -> None:
        line.opened(peer.url)
        peer.met[0].close(4003, "removed")
        assert line.comes("closed")["code"] == 4003
        assert line.left() == [0, 0]
        assert line.of("waiting") == []


# ---------------------------------------------------------------------------------------------------------------------
# Talk: whole clients (every room of the page but the views) and the pure relay, with the wires between them in our
# hands. The clients run in node on IndexedDB's reference implementation; their clock, chance and sockets are the
# laboratory's, so that a schedule of losses, kills and crashes is a list of numbers and can be run again.
# ---------------------------------------------------------------------------------------------------------------------

CLIENT_BLOCKS = r"room-[1-7]"

LAB_GLOBALS = r"""
const {IDBFactory, IDBKeyRange} = require('fake-indexeddb');
const quiet = {addEventListener() {}, removeEventListener() {}};
Object.assign(globals, {indexedDB: new IDBFactory(), IDBFactory, IDBKeyRange, Blob, queueMicrotask, setTimeout, clearTimeout, setImmediate, performance, Date,
  location: {origin: 'https://relay.test', host: 'relay.test', hostname: 'relay.test', protocol: 'https:'}, navigator: {onLine: true},
  document: {visibilityState: 'visible', ...quiet}, ...quiet});
globals.faults = [];
globals.reportError = (e) => { globals.faults.push(String(e?.stack ?? e)); };
// what the engine reckons elsewhere is waited for, however busy the machine is
const counted = (work) => { globals.reckoning += 1; return work.finally(() => { globals.reckoning -= 1; }); };
const subtle = new Proxy(crypto.subtle, {get: (real, name) => (...given) => counted(real[name](...given))});
globals.reckoning = 0;
globals.crypto = {subtle, getRandomValues: (array) => crypto.getRandomValues(array)};
globals.globalThis = globals;
"""

LAB = r"""
'use strict';
const Lab = (() => {
  const clients = new Map(), MIB = 2 ** 20, sizes = {keep: 64 * MIB, auto: 64 * MIB};
  let time = 0, serial = 0;
  const world = (client) => ({
    sizes, now: () => time, wall: () => 1_700_000_000_000 + time, random: () => client.dice(),
    later: (ms, run) => { if (!client.dead) client.timers.push({at: time + ms, run}); },
    connect: (url, owner) => {
      const line = {id: 0, url, owner, open: false, closed: false};
      const begin = () => { line.id = serial += 1; line.open = false; client.lines.set(line.id, line); client.out.push({id: line.id, connect: url}); };
      line.again = () => { if (!line.closed && !client.dead) begin(); };
      begin();
      return {send: (b) => { if (line.open && !client.dead && !client.mute) client.out.push({id: line.id, bytes: b}); return line.open; },
        retry: () => { if (!line.open && !client.lines.has(line.id)) begin(); },
        close: () => { line.closed = true; line.open = false; client.out.push({id: line.id, close: true}); },
        hold: () => undefined, buffered: () => 0};
    },
  });
  const start = async (name, seed) => {
    let x = seed;
    const client = {name, out: [], timers: [], lines: new Map(), dead: false, mute: false, model: null, dice: () => (x = (x * 48271) % 2147483647) / 2147483647};
    clients.set(name, client);
    client.session = await Session.start({name, world: world(client), onChange: (m) => { client.model = m; }});
    for (const id of client.session.rooms.keys()) if (client.session.rooms.get(id).view.state === 'member') await client.session.dispatch({do: 'go', to: {at: 'room', id}});
    await idle(name);
  };
  const idle = async (name) => {
    const client = clients.get(name);
    for (let quiet = 0; quiet < 3; quiet += 1) {
      for (const talk of client.session?.rooms.values() ?? []) await Promise.all([talk.idle(), talk.chunks]);
      await new Promise((go) => { setImmediate(go); });
      if (reckoning) quiet = 0;
    }
    await new Promise((go) => { setTimeout(go); });
  };
  const out = (name) => clients.get(name).out.splice(0);
  const line = (name, id) => clients.get(name).lines.get(id);
  const opened = async (name, id) => { const l = line(name, id); l.open = true; l.owner.open(); await idle(name); return out(name); };
  const message = async (name, id, bytes) => { const l = line(name, id); if (l?.open) l.owner.message(bytes); await idle(name); return out(name); };
  /** among says something while messages lie there unheard; how far the log was heard when it was kept. */
  const among = async (name, id, messages, room, text) => {
    const l = line(name, id);
    for (const bytes of messages) l.owner.message(bytes);
    await clients.get(name).session.dispatch({do: 'send', text});
    const no = cursor(name, room);
    await idle(name);
    return no;
  };
  const lost = async (name, id, code = 1006) => {
    const l = line(name, id);
    if (!l) return [];
    l.open = false; clients.get(name).lines.delete(id);
    if (l.closed) return out(name);
    l.owner.closed({code, reason: '', everOpened: true, triedMs: 0, never: false});
    if (l.closed) { await idle(name); return out(name); }
    l.owner.waiting(time + 1000);
    clients.get(name).timers.push({at: time + 1000, run: l.again});
    await idle(name);
    return out(name);
  };
  const pass = async (names) => {
    const late = names.filter((name) => clients.get(name).timers.some((t) => t.at <= time));
    await Promise.all(late.map((name) => {
      const client = clients.get(name), due = client.timers.filter((t) => t.at <= time);
      client.timers = client.timers.filter((t) => t.at > time);
      for (const t of due.sort((a, b) => a.at - b.at)) t.run();
      return idle(name);
    }));
    return late.map((name) => [name, out(name)]);
  };
  const advance = (ms) => { time += ms; };
  const next = () => Math.min(Infinity, ...[...clients.values()].flatMap((c) => c.timers.map((t) => t.at))) - time;
  const crash = (name) => { const c = clients.get(name); c.dead = true; c.timers = []; c.out = []; };
  /** forget ends all clients with their disks, so that many rooms after each other fit into one node. */
  const forget = () => { clients.clear(); globalThis.indexedDB = new IDBFactory(); };
  const mute = (name, on) => { clients.get(name).mute = on; };
  /** disk says when the bytes of files that people choose can be read. */
  const disk = {reads: Promise.resolve(), wakes: () => undefined};
  const sleep = () => { disk.reads = new Promise((go) => { disk.wakes = () => go(); }); };
  const wake = async (name) => { disk.wakes(); await idle(name); return out(name); };
  const file = ({bytes, type, name}) => {
    const blob = new Blob([bytes], {type}), cut = blob.slice.bind(blob);
    return Object.assign(blob, {name, slice: (...range) => ({arrayBuffer: async () => { await disk.reads; return cut(...range).arrayBuffer(); }})});
  };
  const dispatch = async (name, intent) => {
    if (intent.files) intent.files = intent.files.map(file);
    if (intent.source) intent.source = new Blob([intent.source]);
    const result = await clients.get(name).session.dispatch(intent);
    await idle(name);
    return result ?? null;
  };
  /** resize changes up to what size files are kept sealed by their author and fetched unasked. */
  const resize = (keep, auto) => { Object.assign(sizes, {keep, auto}); };
  /** ask and answer are dispatch in two halves, for what waits on others. */
  const ask = async (name, intent) => {
    const client = clients.get(name);
    client.asked = client.session.dispatch(intent).then((result) => ({result}), (fault) => ({fault}));
    await idle(name);
  };
  const answer = async (name) => {
    const {result, fault} = await clients.get(name).asked;
    await idle(name);
    if (fault) throw fault;
    return result ?? null;
  };
  const model = (name) => clients.get(name).session.model();
  const state = (name, id) => {
    const {s, view} = clients.get(name).session.rooms.get(id);
    return {head: s.head?.ch ?? '', target: s.target?.ch ?? '', pending: s.pending?.unit.ch ?? '', epoch: s.head?.epoch ?? -1, asks: [...s.asks.keys()],
      leaves: [...s.leaves].map(([d, l]) => [d, l.no]), outbox: [...s.outbox.keys()], lacking: [...s.lacking.keys()], alarms: s.alarms, lost: s.lost, split: s.split,
      devices: [...(s.head?.devices.keys() ?? [])], next: s.nextI, view: view.state, met: view.met.size, dev: s.dev, authors: [...s.authors].map(([d, a]) => [d, a.top, [...a.ahead.keys()]])};
  };
  const left = async (name) => [...clients.get(name).lines.keys(), ...await clients.get(name).session.store.metas('room:')];
  const stored = async (name, id) => (await clients.get(name).session.store.events(id, {before: null, limit: 100000})).map((e) => [e.lam, e.dev, e.i,
    Notary.contentOf(Keeper.unrecord(e.value).item)]).map(([lam, dev, i, c]) => [lam, dev, i, c.kind, c.whole && c.kind === 'text' ? c.body.text : '']);
  const facts = async (name, id) => {
    const {session} = clients.get(name), talk = session.rooms.get(id);
    if (!talk) return {state: ''};
    const {s, view, desk: {notes}} = talk, h = s.head, of = (map, what) => Object.fromEntries([...map?.values() ?? []].map((e) => [e.dev, e[what]]));
    const events = (await session.store.events(id, {before: null, limit: 100000})).map((e) => [e, Notary.contentOf(Keeper.unrecord(e.value).item)]);
    return {dev: s.dev, state: view.state, join: view.join?.state ?? '', by: view.join?.by ?? '', link: view.join?.inv_id ?? '', links: [...view.invites.keys()], notes, alarms: s.alarms, outbox: [...s.outbox.keys()], requests: view.requests.size,
      undone: Object.entries({pending: s.pending, target: s.target, split: s.split, lost: s.lost}).filter(([, x]) => x).map(([k]) => k),
      stays: talk.members.waits().some((n) => n.text === 'stays'), wishes: [...s.removing, ...s.want.keys(), ...s.amend.promote, ...s.amend.demote, ...Object.keys(s.amend.policy)],
      head: h && {ch: h.ch, epoch: h.epoch, admins: h.admins}, devices: of(h?.devices, 'from'), gone: of(h?.gone, 'last'),
      members: Object.fromEntries([...s.devices].map(([d, e]) => [d, e.member])), tops: Object.fromEntries([...s.authors].map(([d, a]) => [d, a.top])),
      known: [...s.known.values()].map((k) => [k.ch, k.parent, k.roster]), rosters: [...s.rosters].map(([r, x]) => [r, [...x.devices]]),
      events: events.map(([e, c]) => [e.lam, e.dev, e.i, c.ch, c.kind, c.whole, c.whole && c.kind === 'text' ? c.body.text : ''])};
  };
  const wall = () => 1_700_000_000_000 + time;
  const cursor = (name, id) => clients.get(name).session.rooms.get(id).s.cursor.no;
  const rooms = (name) => [...clients.get(name).session.rooms.keys()];
  const dev = (name, id) => clients.get(name).session.rooms.get(id).s.dev;
  const invites = (name, id) => [...clients.get(name).session.rooms.get(id).view.invites.keys()];
  const blob = async (name, file) => new Uint8Array(await (await clients.get(name).session.dispatch({do: 'blob', file})).arrayBuffer());
  const unveil = async (name, key) => {
    const blob = await clients.get(name).session.dispatch({do: 'open', key});
    await idle(name);
    return new Uint8Array(await blob.arrayBuffer());
  };
  const touch = async (name) => { clients.get(name).session.touch(); await idle(name); };
  const session = (name) => clients.get(name).session;
  /** forge signs an event that the page itself would not make; key names the message that it speaks of. */
  const forge = async (name, id, kind, key, body) => {
    const talk = clients.get(name).session.rooms.get(id), e = await talk.desk.enqueue((b) => talk.events.entry(b, key));
    if (!e) throw new Bytes.Refused('bad', 'nothing there to speak of');
    await talk.say({kind, body: {...body, target: {dev: Bytes.unhex(e.dev), i: e.i, hash: Bytes.unhex(e.hash)}}});
    await idle(name);
    return out(name);
  };
  const fading = (name, id) => [...clients.get(name).session.rooms.get(id).events.fade.table.keys()];
  const faults = () => globalThis.faults.splice(0);
  /** decree commits what an admin wants: a charter with other admins or policy (of the root's holder), devices out. */
  const decree = async (name, id, {admins, policy, invites_from, without = []}) => {
    const talk = clients.get(name).session.rooms.get(id), {desk} = talk, {me, s} = desk;
    await desk.enqueue(async () => {
      for (const dev of without) s.removing.add(dev);
      if (!admins && !policy && invites_from === undefined) return;
      const {head} = s, m = Wire.enc.charter({room: me.room, root: me.root.pub, no: head.cno + 1,
        invites_from: invites_from ?? head.invites_from, ...head.policy, ...policy,
        admins: (admins ?? head.admins).map((d) => Bytes.unhex(head.devices.get(d).sigpub))});
      const charterS = Wire.signed(m, await Suite.sign(me.root, 'charter', m)), gone = new Map(head.gone);
      for (const dev of without) {
        const a = s.authors.get(dev);
        gone.set(dev, {dev, member: Room.memberOf(s, dev), last: a?.top ?? 0, hash: a?.topHash ?? Room.ZERO});
      }
      const devices = [...head.devices.values()].filter((d) => !gone.has(d.dev));
      const plan = {rno: head.rno + 1, changed: true, reason: 0, devices, gone: [...gone.values()],
        consumed: head.consumed, joiners: new Set(), adds: [], request: Room.ZERO};
      s.pending = await Notary.commitOn(me, head, plan,
        {init: s.keys.get(head.ch).init, charterS, leafOf: (d) => s.leaves.get(d)});
      s.dirty.add('epoch');
    });
    await idle(name);
    return out(name);
  };
  /** queue: a line that carries a segment in `each` ms and answers after `trip` ms, every eighth time `late` ms later: the
   *  window at last, and the longest that what was said meanwhile had to wait. */
  const queue = (trip, each, late = 0) => {
    const flow = new Flow.Flow(), under = [];
    let now = 0, free = 0, most = 0;
    for (let n = 0; n < 400; n += 1) {
      while (!flow.free) { const {at, k} = under.shift(); now = Math.max(now, at); flow.done(k, now); }
      flow.put(n, now);
      free = Math.max(now, free) + each;
      if (n > 200) most = Math.max(most, free - now);
      under.push({at: free + trip + (n % 8 ? 0 : late), k: n});
    }
    return [Math.floor(flow.window), most];
  };
  return {among, cursor, faults, fading, forget, forge, decree, facts, start, opened, message, lost, pass, advance, next, crash, mute, sleep, wake, dispatch, ask, answer, model, state, stored, left, out, blob, unveil, dev, invites, rooms, wall, touch, session, resize, queue};
})();
"""


@dataclass(eq=False)
class Wire:
    """A socket in the laboratory: what lies on it towards the client, frame by frame."""

    client: str
    id: int
    inbox: list[bytes] = field(default_factory=list)
    closing: int = 0  # the code that the relay closes with


class Laboratory:
    """Clients by name, the relay, and everything that is under way between them."""

    def __init__(self, node: Node, seed: int = 1, **limits: Any) -> None:
        self.node, self.dice = node, random.Random(seed)
        self.limits = zsr.Limits(**limits)
        self.identity = MemoryIdentity(new_key())
        self.wires: dict[int, Wire] = {}
        self.upward: list[tuple[int, bytes]] = []
        self.clock = 1000.0
        self.wall = int(node.call("Lab.wall"))
        self.tamper: Any = None
        self.names: list[str] = []
        self.runs = 0
        self.boot()

    # -- the relay
    def boot(self) -> None:
        """A relay that knows nothing: the first one, or the one after a kill."""
        self.runs += 1
        self.rooms = zsr.Rooms(
            self.limits,
            self.identity,
            self.dice.randbytes(16),
            frozenset(),
            self.dice.randbytes,
            lambda: self.wall,
        )

    def kill(self) -> None:
        wires, self.wires, self.upward = list(self.wires.values()), {}, []
        self.boot()
        for wire in wires:
            self._heed(wire.client, self.node.call("Lab.lost", wire.client, wire.id))

    def cut(self, name: str) -> None:
        """The network of one client is gone, with all that was on it."""
        for wire in [w for w in self.wires.values() if w.client == name]:
            self._end(wire)

    def _end(self, wire: Wire) -> None:
        del self.wires[wire.id]
        self.upward = [(i, m) for i, m in self.upward if i != wire.id]
        self._effects(self.rooms.leave(wire, self.clock))
        self._heed(wire.client, self.node.call("Lab.lost", wire.client, wire.id, wire.closing or 1006))

    def _effects(self, effects: zsr.Effects) -> None:
        for effect in effects:
            if isinstance(effect, zsr.Send):
                for conn in effect.conns:
                    assert isinstance(conn, Wire)
                    conn.inbox.append(effect.frame)
            elif isinstance(effect, zsr.Close):
                assert isinstance(effect.conn, Wire)
                effect.conn.closing = effect.code

    # -- clients
    def start(self, *names: str) -> None:
        for name in names:
            self.names.append(name)
            self.node.call("Lab.start", name, self.dice.randrange(1, 2**31 - 1))
            self._heed(name, self.node.call("Lab.out", name))

    def crash(self, name: str) -> None:
        """The page is killed and opened again: only what was stored is left."""
        self.node.call("Lab.crash", name)
        for wire in [w for w in self.wires.values() if w.client == name]:
            del self.wires[wire.id]
            self.upward = [(i, m) for i, m in self.upward if i != wire.id]
            self._effects(self.rooms.leave(wire, self.clock))
        self.node.call("Lab.start", name, self.dice.randrange(1, 2**31 - 1))
        self._heed(name, self.node.call("Lab.out", name))

    def away(self, name: str) -> None:
        """The page is closed, for a while: start() opens it again."""
        self.node.call("Lab.crash", name)
        for wire in [w for w in self.wires.values() if w.client == name]:
            del self.wires[wire.id]
            self.upward = [(i, m) for i, m in self.upward if i != wire.id]
            self._effects(self.rooms.leave(wire, self.clock))
        self.names.remove(name)

    def _heed(self, name: str, out: list[dict[str, Any]]) -> None:
        for word in out:
            if "connect" in word:
                wire = self.wires[word["id"]] = Wire(name, word["id"])
                self._effects(self.rooms.enter(wire, word["connect"].rsplit("/", 1)[1], self.clock))
                self._heed(name, self.node.call("Lab.opened", name, wire.id))
            elif "close" in word and word["id"] in self.wires:
                self._end(self.wires[word["id"]])
            elif "bytes" in word and word["id"] in self.wires:  # what was said as the line broke is lost
                self.upward.append((word["id"], word["bytes"]))

    def do(self, who: str, do: str, /, **intent: Any) -> Any:
        result = self.node.call("Lab.dispatch", who, {"do": do, **intent})
        self._heed(who, self.node.call("Lab.out", who))
        return result

    def sleep(self) -> None:
        """Files that people choose from now on cannot be read yet."""
        self.node.call("Lab.sleep")

    def wake(self, who: str) -> None:
        self._heed(who, self.node.call("Lab.wake", who))

    # -- the wires
    def moves(self) -> list[tuple[str, int]]:
        ready = [("up", n) for n in sorted({i for i, _ in self.upward})]
        return ready + [("down", w.id) for w in self.wires.values() if w.inbox or w.closing]

    def move(self, kind: str, wire_id: int) -> None:
        wire = self.wires.get(wire_id)
        if wire is not None:
            self._move_up(wire) if kind == "up" else self._move_down(wire)

    def _move_up(self, wire: Wire) -> None:
        at = next(k for k, (i, _) in enumerate(self.upward) if i == wire.id)
        _, message = self.upward.pop(at)
        self._effects(self.rooms.handle(wire, message, self.clock))

    def _move_down(self, wire: Wire) -> None:
        frames, wire.inbox = wire.inbox, []
        if self.tamper:
            frames = self.tamper(wire.client, frames)
        if frames:
            self._heed(wire.client, self.node.call("Lab.message", wire.client, wire.id, zsr.join_frames(frames)))
        if wire.closing and wire.id in self.wires:
            self._end(wire)

    def tick(self, seconds: float) -> None:
        self.clock += seconds
        self.wall += int(seconds * 1000)
        self.node.call("Lab.advance", int(seconds * 1000))
        self._effects(self.rooms.expire(self.clock))
        for name, out in self.node.call("Lab.pass", self.names):
            self._heed(name, out)

    def drain(self, limit: int = 20_000) -> None:
        """Deliver until nothing is under way."""
        for _ in range(limit):
            moves = self.moves()
            if not moves:
                return
            self.move(*self.dice.choice(moves))
        raise AssertionError("the conversation never comes to rest")

    def settle(self, seconds: float = 40.0) -> None:
        """Deliver, let time pass, deliver again: long enough for every reconnect, vector and hand-over."""
        end = self.clock + seconds
        while self.clock < end:
            self.drain()
            self.tick(0.5 if end - self.clock > seconds - 5 else 1.5)
        self.drain()

    # -- what people see
    def model(self, name: str) -> Any:
        return self.node.call("Lab.model", name)

    def room(self, name: str) -> Any:
        return self.model(name)["room"]

    def member(self, who: str, name: str) -> Any:
        """A member as somebody sees it."""
        return next(m for m in self.room(who)["members"] if m["name"] == name)

    def texts(self, name: str) -> list[str]:
        return [m["text"] for m in self.room(name)["messages"] if m["kind"] == "text"]

    def stored(self, name: str, room: str) -> list[Any]:
        return list(self.node.call("Lab.stored", name, room))

    def left(self, name: str) -> list[Any]:
        """Connections, and what is stored of rooms."""
        return list(self.node.call("Lab.left", name))

    def facts(self, name: str, room: str) -> Any:
        return self.node.call("Lab.facts", name, room)

    def state(self, name: str, room: str) -> Any:
        return self.node.call("Lab.state", name, room)

    # -- stories
    def create(self, name: str, title: str = "Boat") -> str:
        room = self.do(name, "create", title=title, name=name, own=False)["id"]
        self.settle(1)
        return str(room)

    def invite(self, admin: str) -> str:
        return str(self.do(admin, "invite")["link"])

    def join(self, admin: str, *names: str) -> None:
        for name in names:
            link = self.invite(admin)
            self.do(name, "link", text=link)
            self.do(name, "join", name=name)
            self.settle(6)
            assert self.model(name)["at"] == "room", self.model(name)["invited"]

    def follow(self, link: str, *names: str, seconds: float = 8) -> None:
        for name in names:
            self.do(name, "link", text=link)
            self.do(name, "join", name=name)
        self.settle(seconds)

    def linked(self, owner: str, device: str, *rooms: str, seconds: float = 8) -> None:
        """Another device of one's own follows the link into these rooms."""
        self.follow(self.do(owner, "linkDevice", rooms=list(rooms))["link"], device, seconds=seconds)

    def appoint(self, room: str, root: str, *admins: str, policy: dict[str, int] | None = None) -> None:
        """A charter that names these people's devices as admins."""
        devs = [self.node.call("Lab.dev", name, room) for name in admins]
        self._heed(root, self.node.call("Lab.decree", root, room, {"admins": devs, "policy": policy or {}}))
        self.settle(4)

    def dismissed(self, name: str, *texts: str) -> None:
        """These notes were to be read there, no others, and are put away."""
        notes = self.room(name)["notes"]
        assert [note["text"] for note in notes] == list(texts), (name, notes)
        for note in notes:
            self.do(name, "dismiss", id=note["id"])


@dataclass(frozen=True)
class MemoryIdentity:
    key: PrivateKey

    @property
    def public(self) -> bytes:
        return point(self.key)

    def sign(self, label: str, m: bytes) -> bytes:
        return sign(self.key, label, m)


@pytest.fixture(scope="session")
def clients() -> Iterator[Node]:
    names = tuple(name for name in blocks(PAGE.read_text("utf-8")) if re.match(CLIENT_BLOCKS, name))
    started = Node([*page_blocks(names), ("lab", LAB)], LAB_GLOBALS)
    yield started
    started.close()


SERIAL = iter(range(1, 1_000_000))


@pytest.fixture
def lab(clients: Node) -> Laboratory:
    return Laboratory(clients)


def room_of_three(lab: Laboratory) -> tuple[str, list[str]]:
    """A room with Ana, who made it, Bob and Cleo."""
    people = [f"{name}{next(SERIAL)}" for name in ("ana", "bob", "cleo")]
    lab.start(*people)
    room = lab.create(people[0])
    lab.join(people[0], *people[1:])
    return room, people


def agree(lab: Laboratory, room: str, people: list[str], texts: list[str]) -> None:
    """Everyone ends with the same messages, each once, in the same order, delivered, without an alarm."""
    seen = [[row for row in lab.stored(name, room) if row[3] == "text"] for name in people]
    for name, rows in zip(people, seen, strict=True):
        assert sorted(row[4] for row in rows) == sorted(texts), name
        assert rows == seen[0], name
        state = lab.state(name, room)
        assert not any(state[what] for what in ("alarms", "outbox", "lost", "split")), (name, state)
    assert len({lab.state(name, room)["head"] for name in people}) == 1
    assert lab.node.call("Lab.faults") == []


class TestConversation:
    def test_a_friend_joins_by_link_and_both_talk(self, lab: Laboratory) -> None:
        ana, bob = f"ana{next(SERIAL)}", f"bob{next(SERIAL)}"
        lab.start(ana, bob)
        room = lab.create(ana, "Harbour")
        lab.join(ana, bob)
        lab.do(ana, "send", text="hello\nBob")
        lab.do(bob, "send", text="hi \U0001f600")
        lab.settle(10)
        assert lab.room(bob)["title"] == "Harbour"
        assert {m["name"] for m in lab.room(bob)["members"]} == {ana, bob}
        agree(lab, room, [ana, bob], ["hello\nBob", "hi \U0001f600"])
        assert {m["state"] for m in lab.room(ana)["messages"] if m["mine"] and m["kind"] == "text"} == {"delivered"}

    def test_what_was_written_offline_goes_out_after_a_reload(self, lab: Laboratory) -> None:
        room, people = room_of_three(lab)
        lab.cut(people[1])
        lab.do(people[1], "send", text="from the tunnel")
        lab.crash(people[1])
        lab.settle()
        agree(lab, room, people, ["from the tunnel"])

    def test_one_who_was_away_gets_everything_after_a_relay_kill(self, lab: Laboratory) -> None:
        room, people = room_of_three(lab)
        lab.node.call("Lab.crash", people[2])
        for wire in [w for w in lab.wires.values() if w.client == people[2]]:
            del lab.wires[wire.id]
        lab.names.remove(people[2])
        for n in range(5):
            lab.do(people[n % 2], "send", text=f"m{n}")
        lab.settle(5)
        lab.kill()
        lab.settle(10)
        lab.start(people[2])
        lab.settle()
        agree(lab, room, people, [f"m{n}" for n in range(5)])

    def test_what_is_said_does_not_wait_for_all_that_came_meanwhile(self, lab: Laboratory) -> None:
        room, (ana, bob, cleo) = room_of_three(lab)
        wire = next(w for w in lab.wires.values() if w.client == cleo)
        said = [f"m{n}" for n in range(200)]
        for text in said:
            lab.do(ana, "send", text=text)
            while any(number != wire.id for _, number in lab.moves()):
                lab.move(*next(each for each in lab.moves() if each[1] != wire.id))
        messages, wire.inbox = [zsr.join_frames([frame]) for frame in wire.inbox], []
        before = lab.node.call("Lab.cursor", cleo, room)
        heard = lab.node.call("Lab.among", cleo, wire.id, messages, room, "in between")
        lab._heed(cleo, lab.node.call("Lab.out", cleo))
        assert before <= heard <= before + 128, "two pieces of work of 64 frames at most"
        assert lab.node.call("Lab.cursor", cleo, room) >= before + 200
        lab.settle()
        agree(lab, room, [ana, bob, cleo], [*said, "in between"])

    def test_a_newcomer_sees_names_and_title_but_nothing_from_before(self, lab: Laboratory) -> None:
        ana, bob = f"ana{next(SERIAL)}", f"bob{next(SERIAL)}"
        lab.start(ana, bob)
        room = lab.create(ana)
        lab.do(ana, "send", text="before")
        lab.join(ana, bob)
        lab.do(ana, "send", text="after")
        lab.settle()
        assert lab.texts(bob) == ["after"]
        kinds = [m["kind"] for m in lab.room(ana)["messages"]]
        assert kinds[-3:] == ["text", "joined", "text"], "who comes stands below what was said before"
        assert all(row[4] != "before" for row in lab.stored(bob, room))
        assert lab.texts(ana) == ["before", "after"]

    def test_a_link_admits_one_and_tells_the_second(self, lab: Laboratory) -> None:
        people = [f"{name}{next(SERIAL)}" for name in ("ana", "bob", "eve")]
        lab.start(*people)
        lab.create(people[0])
        link = lab.invite(people[0])
        for name in people[1:]:
            lab.do(name, "link", text=link)
            lab.do(name, "join", name=name)
            lab.settle(8)
        assert lab.model(people[1])["at"] == "room"
        assert lab.model(people[2])["invited"]["state"] == "used"
        assert lab.left(people[2]) != [], "it may have been the relay's mistake"
        lab.do(people[2], "go", to={"at": "start"})
        assert lab.left(people[2]) == []
        assert lab.left(people[1]) != []
        assert len(lab.room(people[0])["members"]) == 2

    def test_keys_rotate_and_talk_goes_on(self, lab: Laboratory) -> None:
        room, people = room_of_three(lab)
        said = [f"m{n}" for n in range(120)]
        for n, text in enumerate(said):
            lab.do(people[n % 3], "send", text=text)
            if n % 10 == 9:
                lab.settle(2)
        epoch = lab.state(people[0], room)["epoch"]
        lab.settle(60)
        assert lab.state(people[0], room)["epoch"] > 2, epoch
        agree(lab, room, people, said)

    def test_a_file_arrives_whole_and_again_after_a_relay_kill(self, lab: Laboratory) -> None:
        _, people = room_of_three(lab)
        content = random.Random(7).randbytes(700_000)
        lab.cut(people[2])
        lab.do(people[0], "files", files=[{"name": "a.bin", "type": "application/octet-stream", "bytes": content}])
        lab.settle(10)
        lab.kill()
        lab.settle(60)
        for name in people[1:]:
            files = [m["file"] for m in lab.room(name)["messages"] if m["file"]]
            assert [(f["name"], f["state"]) for f in files] == [("a.bin", "here")], name
            assert lab.node.call("Lab.blob", name, files[0]["id"]) == content


def fresh(*names: str) -> list[str]:
    """Names that no client has had."""
    return [f"{name}{next(SERIAL)}" for name in names]


class TestDevices:
    def test_an_added_laptop_has_name_and_history_and_is_no_second_member(self, lab: Laboratory) -> None:
        room, (ana, bob, cleo) = room_of_three(lab)
        said = [f"m{n}" for n in range(4)]
        for n, text in enumerate(said):
            lab.do((ana, bob)[n % 2], "send", text=text)
        lab.settle(4)
        (laptop,) = fresh("laptop")
        lab.start(laptop)
        lab.linked(ana, laptop, room)
        lab.settle(10)
        assert lab.model(laptop)["at"] == "room", lab.model(laptop)["invited"]
        mine, theirs = lab.room(laptop), lab.room(bob)
        assert (mine["title"], mine["me"]["name"], mine["me"]["member"]) == ("Boat", ana, lab.room(ana)["me"]["member"])
        assert {m["name"]: m["devices"] for m in theirs["members"]} == {ana: 2, bob: 1, cleo: 1}
        assert [m["author"] for m in theirs["messages"] if m["kind"] == "linked"] == [ana]
        assert lab.texts(laptop) == lab.texts(ana)
        assert sorted(lab.texts(laptop)) == said
        for name in (ana, laptop):
            assert {(d["name"], d["you"], d["online"]) for d in lab.room(name)["devices"]} >= {
                (laptop, name == laptop, True)
            }
        assert [m["kind"] for m in mine["messages"]].count("missing") == 0
        for name in (bob, cleo):
            (note,) = lab.room(name)["notes"]
            assert (note["text"], note["level"], note["action"]) == ("memberKey", "warn", "verify")
            assert note["params"] == {"name": ana, "member": mine["me"]["member"]}
        assert lab.room(ana)["notes"] == mine["notes"] == []
        lab.cut(cleo)
        lab.do(laptop, "send", text="from the laptop")
        lab.do(laptop, "rename", name="Anna")
        lab.drain()
        assert [lab.room(name)["messages"][-1]["state"] for name in (ana, laptop)] == ["sent", "sent"]
        lab.settle(10)
        agree(lab, room, [ana, bob, cleo, laptop], [*said, "from the laptop"])
        assert [lab.room(name)["messages"][-1]["state"] for name in (ana, laptop)] == ["delivered", "delivered"]
        assert lab.room(ana)["me"]["name"] == lab.room(laptop)["me"]["name"] == "Anna"

    def test_a_members_laptop_waits_for_an_admin_over_all_restarts(self, lab: Laboratory) -> None:
        room, (ana, bob, cleo) = room_of_three(lab)
        lab.do(bob, "send", text="before")
        lab.settle(4)
        lab.away(ana)
        (laptop,) = fresh("laptop")
        lab.start(laptop)
        lab.linked(bob, laptop, room)
        dev = lab.node.call("Lab.dev", laptop, room)
        assert lab.room(bob)["linking"] == [{"dev": dev, "name": laptop, "awaits": [ana]}]
        assert lab.model(laptop)["invited"]["state"] == "waiting"
        assert lab.room(cleo)["linking"] == []
        lab.crash(bob)
        lab.settle(2)
        assert lab.room(bob)["linking"] == [{"dev": dev, "name": laptop, "awaits": [ana]}]
        lab.away(bob)
        lab.crash(cleo)
        lab.kill()
        lab.settle(4)
        lab.start(ana)
        lab.settle(8)
        assert lab.room(laptop)["id"] == room, "Cleo has kept the request"
        lab.start(bob)
        lab.settle(12)
        assert {m["name"]: m["devices"] for m in lab.room(cleo)["members"]} == {ana: 1, bob: 2, cleo: 1}
        assert lab.room(bob)["linking"] == []
        lab.do(laptop, "send", text="after")
        lab.settle(10)
        agree(lab, room, [ana, bob, cleo, laptop], ["before", "after"])
        assert lab.texts(laptop) == ["before", "after"]

    def test_the_other_rooms_follow_in_one_go(self, lab: Laboratory) -> None:
        ana, bob, laptop = fresh("ana", "bob", "laptop")
        lab.start(ana, bob, laptop)
        rooms = []
        for title in ("One", "Two", "Three"):
            rooms.append(lab.create(ana, title))
            lab.do(ana, "go", to={"at": "start"})
        lab.do(ana, "go", to={"at": "room", "id": rooms[1]})
        lab.do(ana, "send", text="in room two")
        lab.linked(ana, laptop, *rooms[:2], seconds=20)
        assert {r["title"] for r in lab.model(laptop)["rooms"]} == {"One", "Two"}
        lab.do(laptop, "go", to={"at": "room", "id": rooms[1]})
        lab.settle(8)
        assert lab.texts(laptop) == ["in room two"]
        assert [d["name"] for d in lab.room(laptop)["devices"] if d["you"]] == [laptop]
        assert len(lab.room(ana)["devices"]) == 2
        lab.do(ana, "go", to={"at": "room", "id": rooms[2]})
        assert len(lab.room(ana)["devices"]) == 1

    def test_a_revoked_device_link_leads_nowhere_in_no_room(self, lab: Laboratory) -> None:
        ana, laptop = fresh("ana", "laptop")
        lab.start(ana, laptop)
        one, two = lab.create(ana, "One"), lab.create(ana, "Two")
        lab.do(ana, "go", to={"at": "room", "id": one})
        made = lab.do(ana, "linkDevice", rooms=[one, two])
        lab.do(ana, "revoke", id=made["id"])
        assert lab.node.call("Lab.invites", ana, one) == lab.node.call("Lab.invites", ana, two) == []
        lab.follow(made["link"], laptop)
        assert lab.model(laptop)["invited"]["state"] == "over"


class TestMembership:
    def kinds(self, lab: Laboratory, who: str) -> list[tuple[str, str, str]]:
        rows = lab.room(who)["messages"]
        return [(m["kind"], m["author"], m["text"]) for m in rows if m["kind"] in ("gone", "left", "admin", "plain")]

    def test_a_removed_friend_is_told_keeps_what_it_has_and_gets_nothing_more(self, lab: Laboratory) -> None:
        room, (ana, bob, cleo) = room_of_three(lab)
        lab.do(ana, "send", text="before")
        lab.settle(6)
        lab.do(ana, "remove", member=lab.member(ana, bob)["id"])
        lab.do(cleo, "send", text="at the same time")
        lab.settle(12)
        assert lab.room(bob)["state"] == "removed"
        assert [note["text"] for note in lab.room(bob)["notes"]] == ["removed"]
        assert "before" in lab.texts(bob)
        lab.do(ana, "send", text="after")
        lab.settle(20)
        assert "after" not in lab.texts(bob)
        agree(lab, room, [ana, cleo], ["before", "at the same time", "after"])
        assert {m["name"] for m in lab.room(cleo)["members"]} == {ana, cleo}
        assert self.kinds(lab, cleo) == self.kinds(lab, ana) == [("gone", ana, bob)]
        with pytest.raises(Refused, match="unlisted"):
            lab.do(bob, "send", text="let me in")

    def test_a_rotation_that_decides_what_newcomers_read_comes_before_them(self, lab: Laboratory) -> None:
        """Seen to fail without: SINCE_ROTATION in Epochs.rejected."""
        ana, bob = fresh("ana", "bob")
        lab.start(ana, bob)
        lab.create(ana)
        lab.do(ana, "policy", history=1)
        lab.settle(12)
        for text in ("secret", "secret, too"):
            lab.do(ana, "rotate")
            lab.do(ana, "send", text=text)
            lab.settle(1)
        lab.do(ana, "rotate")
        lab.settle(1)
        lab.follow(lab.invite(ana), bob, seconds=40)
        lab.do(ana, "send", text="welcome")
        lab.settle(3)
        assert lab.texts(bob) == ["welcome"]

    def test_when_somebody_was_seen_last_is_known_after_a_reload_too(self, lab: Laboratory) -> None:
        room, (ana, bob, cleo) = room_of_three(lab)
        lab.settle(600)
        gone = lab.wall
        lab.away(bob)
        lab.settle(1000)
        assert [lab.member(name, bob)["seen"] - gone for name in (ana, cleo)] == [0, 0]
        cut = lab.wall
        lab.cut(ana)
        assert lab.member(ana, bob)["seen"] == 0, "who is offline itself cannot tell"
        lab.away(cleo)
        lab.settle(20)
        lab.crash(ana)
        lab.settle(5)
        assert [lab.member(ana, name)["seen"] for name in (bob, cleo)] == [gone, cut]
        lab.start(cleo)
        lab.settle(20)
        lab.do(ana, "remove", member=lab.member(ana, bob)["id"])
        lab.settle(15)
        lab.away(cleo)
        lab.settle(1)
        assert lab.state(ana, room)["met"] == 1, "who is listed no more is forgotten"

    def test_a_rotation_that_comes_too_early_keeps_nobody_waiting(self, lab: Laboratory) -> None:
        """Seen to fail without: Epochs.rejected."""
        ana, bob = fresh("ana", "bob")
        lab.start(ana, bob)
        room = lab.create(ana)
        for _ in range(2):
            lab.do(ana, "rotate")
            lab.settle(1)
        lab.follow(lab.invite(ana), bob, seconds=2)
        assert lab.model(bob)["at"] == "room"
        lab.do(ana, "rotate")
        lab.settle(1)
        before = lab.state(ana, room)["epoch"]
        lab.settle(12)
        assert lab.state(ana, room)["epoch"] == before + 1, "it comes later"

    def test_a_link_asked_for_before_the_relay_answered_waits_for_it_and_names_it(self, lab: Laboratory) -> None:
        ana, bob = fresh("ana", "bob")
        lab.start(ana, bob)
        lab.do(ana, "create", title="Boat", name=ana, own=False)
        lab.node.call("Lab.ask", ana, {"do": "invite"})
        assert lab.room(ana)["invites"] == []
        lab.settle(1)
        link = lab.node.call("Lab.answer", ana)["link"]
        named = zsr.unb64u(link.partition("#1.")[2])[58:74]
        assert named == zsr.Hl("relay", lab.identity.public)[:16]
        lab.settle(1)
        lab.follow(link, bob)
        assert lab.model(bob)["at"] == "room", lab.model(bob)["invited"]

    def test_a_link_of_a_room_that_is_closed_before_the_relay_answered_is_not_waited_for(self, lab: Laboratory) -> None:
        ana = f"ana{next(SERIAL)}"
        lab.start(ana)
        lab.do(ana, "create", title="Boat", name=ana, own=False)
        lab.node.call("Lab.ask", ana, {"do": "invite"})
        lab.do(ana, "forgetRoom")
        with pytest.raises(Refused, match="removed"):
            lab.node.call("Lab.answer", ana)

    def test_a_removal_survives_the_admins_crash_and_a_relay_that_forgets(self, lab: Laboratory) -> None:
        room, (ana, bob, cleo) = room_of_three(lab)
        lab.cut(ana)
        lab.do(ana, "remove", member=lab.member(ana, bob)["id"])
        assert lab.member(ana, bob)["removing"]
        lab.crash(ana)
        lab.kill()
        lab.settle(20)
        assert lab.room(bob)["state"] == "removed"
        lab.kill()  # and its removal is shown to the next relay by those who stayed, before Bob shows an older head
        lab.settle(20)
        assert len(lab.room(cleo)["members"]) == 2
        lab.do(cleo, "send", text="alone now")
        lab.settle(10)
        agree(lab, room, [ana, cleo], ["alone now"])

    def test_a_room_with_more_past_than_a_relay_takes_at_once_comes_back(self, clients: Node) -> None:
        """Removals, revoked and open links of a year: what each of them shows a relay that forgot stays bounded."""
        lab = Laboratory(clients, evidence=1)
        room, (ana, bob, cleo) = room_of_three(lab)
        for name in (bob, cleo):
            lab.do(ana, "remove", member=lab.member(ana, name)["id"])
            lab.settle(8)
        (dora,) = fresh("dora")
        lab.start(dora)
        lab.join(ana, dora)
        for _ in range(13):
            lab.do(ana, "revoke", id=lab.do(ana, "invite", uses=20)["id"])
        lab.settle(2)
        lab.kill()
        lab.settle(12)
        assert lab.room(ana)["connection"]["state"] == "connected"
        lab.do(ana, "send", text="still here")
        lab.settle(6)
        agree(lab, room, [ana, dora], ["still here"])

    def test_a_member_leaves_by_its_own_word_also_while_no_admin_is_here(self, lab: Laboratory) -> None:
        room, (ana, bob, cleo) = room_of_three(lab)
        lab.away(ana)
        lab.do(bob, "leaveRoom")
        lab.settle(4)
        assert lab.member(cleo, bob)["removing"]
        assert [(n["text"], n["params"]["admins"]) for n in lab.room(bob)["notes"]] == [("leaving", ana)]
        lab.do(cleo, "send", text="he goes")  # sealed to nobody before he is out
        lab.settle(4)
        assert "he goes" not in lab.texts(bob)
        assert [(n["text"], n["params"]) for n in lab.room(cleo)["notes"]] == [
            ("unsealed", {"name": bob, "admins": ana})
        ]
        lab.away(bob)
        lab.kill()
        lab.settle(4)
        lab.start(ana)
        lab.settle(12)
        lab.start(bob)
        lab.settle(8)
        assert lab.room(bob)["state"] == "left"
        assert lab.room(bob)["notes"] == []
        agree(lab, room, [ana, cleo], ["he goes"])
        assert self.kinds(lab, ana) == [("left", bob, "")]
        assert lab.room(cleo)["notes"] == []

    def test_keys_that_one_member_alone_has_used_up_are_changed_by_whoever_answers(self, lab: Laboratory) -> None:
        """What a relay lost before others saw it counts for its author alone, who may be no admin."""
        room, (ana, bob, cleo) = room_of_three(lab)
        lab.do(ana, "policy", who=1, rotate_after=1)
        lab.settle(8)
        for name in (ana, cleo):
            lab.away(name)
        lines = [f"line {n}" for n in range(8)]
        for line in lines:
            lab.do(bob, "send", text=line)
            lab.settle(1)
        assert lab.room(bob)["stale"] == "refuse"
        lab.kill()
        for name in (cleo, ana):
            lab.start(name)
            lab.settle(20)
        agree(lab, room, [ana, bob, cleo], lines)

    def test_of_all_admins_who_leave_at_once_the_most_senior_stays_until_another_is_named(
        self, lab: Laboratory
    ) -> None:
        room, (ana, bob, cleo) = room_of_three(lab)
        lab.do(ana, "makeAdmin", member=lab.member(ana, bob)["id"])
        lab.settle(8)
        for name in (ana, bob):
            lab.do(name, "leaveRoom")
        lab.settle(12)
        assert [lab.room(name)["state"] for name in (ana, bob, cleo)] == ["member", "left", "member"]
        assert [note["text"] for note in lab.room(ana)["notes"]] == ["stays"]
        lab.do(cleo, "send", text="who is left?")
        lab.kill()
        lab.settle(12)
        assert "who is left?" in lab.texts(ana)
        lab.do(ana, "makeAdmin", member=lab.member(ana, cleo)["id"])
        lab.settle(12)
        assert lab.room(ana)["state"] == "left"
        lab.do(cleo, "send", text="I am")
        lab.settle(4)
        agree(lab, room, [cleo], ["who is left?", "I am"])
        assert self.kinds(lab, cleo)[1:] == [("left", bob, ""), ("admin", ana, cleo), ("left", ana, "")]

    def test_a_device_that_a_later_admin_brings_in_has_what_was_said_before_that_admin_came(
        self, lab: Laboratory
    ) -> None:
        ana, bob, cleo, laptop = fresh("ana", "bob", "cleo", "laptop")
        lab.start(ana, bob, cleo, laptop)
        room = lab.create(ana)
        lab.do(ana, "policy", history=1)
        lab.settle(4)
        lab.do(ana, "rotate")
        lab.settle(4)
        lab.join(ana, bob)
        lab.do(ana, "policy", history=0)
        lab.do(ana, "send", text="before Cleo")
        lab.settle(4)
        lab.do(bob, "send", text="me too")
        lab.settle(4)
        lab.join(ana, cleo)
        lab.do(ana, "makeAdmin", member=lab.member(ana, cleo)["id"])
        lab.settle(8)
        lab.away(ana)
        lab.linked(bob, laptop, room, seconds=20)
        assert lab.texts(laptop) == ["before Cleo", "me too"]
        assert lab.texts(cleo) == []

    @pytest.mark.parametrize("welcomed", [True, False])
    def test_a_device_that_two_admins_bring_in_reads_from_where_the_one_lets_it_whose_commit_wins(
        self, clients: Node, *, welcomed: bool
    ) -> None:
        """The other came later than the device's member, and what it does not know was not to be counted: that was said
        to a device that came in by its welcome first, and to one that never got another."""
        lab, (ana, bob, cleo, laptop) = Stage(clients), fresh("ana", "bob", "cleo", "laptop")
        lab.start(ana, bob, cleo, laptop)
        room = lab.create(ana)
        lab.join(ana, bob)
        for name in (ana, bob):
            lab.do(name, "send", text="before Cleo")
            lab.settle(4)
        lab.join(ana, cleo)
        lab.do(ana, "makeAdmin", member=lab.member(ana, cleo)["id"])
        lab.settle(8)
        lab.away(cleo)
        link = lab.do(bob, "linkDevice", rooms=[room])["link"]
        lab.settle(2)
        lab.do(laptop, "link", text=link)
        lab.do(laptop, "join", name=laptop)
        while lab.state(ana, room)["pending"] == "":
            lab.move(*lab.moves()[0])
        lab.away(ana)  # its commit is on its disk and has not left
        lab.start(cleo)
        mute = {lab.dev(cleo, room)}

        def unwelcoming(name: str, told: list[Any]) -> list[Any]:
            return [f for f in told if not (name == laptop and isinstance(f, zsr.DownDirect) and f.sender in mute)]

        lab.lie = None if welcomed else unwelcoming
        lab.settle(4)
        assert lab.state(laptop, room)["view"] == ("member" if welcomed else "joining")
        for name in (bob, cleo, laptop):
            lab.away(name)
        lab.kill()
        lab.start(ana)
        lab.settle(8)
        mute = {lab.dev(ana, room)}
        lab.start(bob, cleo, laptop)
        lab.settle(12)
        mute = set()
        lab.settle(20)
        agree(lab, room, [ana, bob, laptop], ["before Cleo", "before Cleo"])
        assert lab.texts(cleo) == []

    def test_whose_wish_to_leave_waits_keeps_the_other_devices_too(self, lab: Laboratory) -> None:
        room, (ana, bob, cleo) = room_of_three(lab)
        (laptop,) = fresh("laptop")
        lab.start(laptop)
        lab.linked(ana, laptop, room)
        lab.do(ana, "makeAdmin", member=lab.member(ana, bob)["id"])
        lab.settle(8)
        for name in (ana, bob):
            lab.do(name, "leaveRoom")
        lab.settle(12)
        assert [lab.room(name)["state"] for name in (ana, laptop, bob)] == ["member", "member", "left"]
        lab.do(laptop, "send", text="from the laptop")
        lab.settle(8)
        lab.cut(laptop)
        lab.settle(8)
        agree(lab, room, [ana, laptop, cleo], ["from the laptop"])
        assert lab.state(laptop, room)["outbox"] == []
        lab.do(laptop, "makeAdmin", member=lab.member(laptop, cleo)["id"])
        lab.settle(12)
        assert [lab.room(name)["state"] for name in (ana, laptop, cleo)] == ["left", "left", "member"]

    def test_a_newcomer_whose_coming_lost_a_race_is_brought_in_again(self, lab: Laboratory) -> None:
        room, (ana, bob, cleo) = room_of_three(lab)
        lab.do(ana, "makeAdmin", member=lab.member(ana, bob)["id"])
        lab.settle(8)
        (dora,) = fresh("dora")
        lab.start(dora)
        lab.do(dora, "link", text=lab.invite(bob))
        lab.settle(1)
        lab.do(ana, "policy", joins=1)  # a heavier charter, which the relay takes after bob's commit, and in its place
        lab.do(dora, "join", name=dora)
        while moves := [move for move in lab.moves() if lab.wires[move[1]].client != ana]:
            lab.move(*moves[0])
        assert lab.model(dora)["at"] == "room"
        lab.settle(4)
        assert (lab.room(dora)["state"], lab.room(dora)["notes"]) == ("member", [])
        lab.settle(20)
        lab.do(dora, "send", text="here again")
        lab.settle(12)
        agree(lab, room, [ana, bob, cleo, dora], ["here again"])

    def test_a_wish_about_a_device_that_one_has_not_heard_of_yet_is_heeded(self, lab: Laboratory) -> None:
        room, (ana, bob, cleo) = room_of_three(lab)
        (laptop,) = fresh("laptop")
        lab.start(laptop)
        lab.do(ana, "makeAdmin", member=lab.member(ana, bob)["id"])
        lab.settle(8)
        lab.away(bob)
        lab.linked(ana, laptop, room)
        lab.do(ana, "leaveRoom")
        lab.settle(4)
        lab.away(ana)
        lab.start(bob)
        lab.settle(20)
        assert lab.room(laptop)["state"] == "left"
        assert {m["name"] for m in lab.room(bob)["members"]} == {bob, cleo}

    def test_who_leaves_takes_along_the_only_admin_that_can_let_it_out(self, lab: Laboratory) -> None:
        ana, bob = fresh("ana", "bob")
        lab.start(ana, bob)
        room = lab.create(ana)
        lab.join(ana, bob)
        lab.away(bob)
        lab.do(ana, "makeAdmin", member=lab.member(ana, bob)["id"])
        lab.settle(12)
        lab.do(ana, "rotate")
        lab.settle(12)
        lab.do(ana, "leaveRoom")
        lab.settle(2)
        lab.kill()
        lab.boot()
        lab.start(bob)
        lab.settle(80)
        assert (lab.room(ana)["state"], lab.room(bob)["state"]) == ("left", "member")
        assert list(lab.state(bob, room)["devices"]) == [lab.state(bob, room)["dev"]]

    def newcomer(self, lab: Laboratory, *steps: tuple[int, str]) -> tuple[str, str, str]:
        """Ana unlinks her laptop and leaves, the last member, while a phone of hers is being linked: after so many
        moves of what is under way, each step."""
        ana, laptop, phone = fresh("ana", "laptop", "phone")
        for name in (ana, laptop, phone):
            lab.start(name)
        room = lab.create(ana)
        lab.linked(ana, laptop, room)
        link, lost = lab.do(ana, "linkDevice", rooms=[room])["link"], lab.state(laptop, room)["dev"]
        lab.settle(2)
        lab.do(phone, "link", text=link)
        lab.do(phone, "join", name=phone)
        for moves, step in steps:
            for _ in range(moves):
                lab.move(*lab.moves()[0])
            lab.do(ana, step, **({"dev": lost} if step == "removeDevice" else {}))
        lab.settle(20)
        return room, ana, phone

    def test_a_wish_is_heeded_that_also_names_who_was_out_before_the_reader_came(self, clients: Node) -> None:
        lab = Laboratory(clients, 6)
        room, ana, phone = self.newcomer(lab, (3, "rotate"), (2, "removeDevice"), (0, "leaveRoom"))
        assert (lab.room(ana)["state"], lab.room(phone)["state"]) == ("left", "member")
        assert list(lab.state(phone, room)["devices"]) == [lab.state(phone, room)["dev"]]

    def test_who_comes_in_while_its_own_member_leaves_is_shown_the_room_that_it_has_left(self, clients: Node) -> None:
        lab = Laboratory(clients, 40)
        _, ana, phone = self.newcomer(lab, (5, "removeDevice"), (5, "leaveRoom"))
        assert (lab.model(phone)["at"], lab.model(phone)["invited"]) == ("room", None)
        assert (lab.room(ana)["state"], lab.room(phone)["state"]) == ("left", "left")

    def test_who_leaves_last_is_out_at_once(self, lab: Laboratory) -> None:
        (ana,) = fresh("ana")
        lab.start(ana)
        lab.create(ana)
        lab.do(ana, "leaveRoom")
        assert lab.room(ana)["state"] == "left"
        assert lab.room(ana)["notes"] == []

    def test_who_leaves_last_stays_for_whoever_is_just_coming_in(self, lab: Laboratory) -> None:
        ana, bob = fresh("ana", "bob")
        lab.start(ana, bob)
        room = lab.create(ana)
        link = lab.invite(ana)
        lab.settle(2)
        lab.do(bob, "link", text=link)
        lab.do(bob, "join", name=bob)
        while lab.state(ana, room)["pending"] == "":
            lab.move(*lab.moves()[0])
        lab.do(ana, "leaveRoom")
        assert lab.room(ana)["state"] == "left"
        lab.settle(12)
        assert [lab.room(name)["state"] for name in (ana, bob)] == ["member", "member"]
        assert [note["text"] for note in lab.room(ana)["notes"]] == ["stays"]
        lab.do(ana, "makeAdmin", member=lab.member(ana, bob)["id"])
        lab.settle(12)
        assert [lab.room(name)["state"] for name in (ana, bob)] == ["left", "member"]

    def test_what_was_said_by_one_whose_coming_lost_a_race_for_good_reaches_all_who_may_read_it(
        self, lab: Laboratory
    ) -> None:
        room, (ana, bob, cleo) = room_of_three(lab)
        dora, erin = fresh("dora", "erin")
        lab.start(dora, erin)
        lab.do(ana, "policy", history=2)
        lab.do(ana, "makeAdmin", member=lab.member(ana, bob)["id"])
        lab.settle(8)
        lab.node.call("Lab.mute", ana, True)
        lab.do(ana, "remove", member=lab.member(ana, bob)["id"])
        lab.away(ana)  # its commit is on its disk and has not left
        lab.join(bob, dora)
        lab.do(dora, "send", text="hello from Dora")
        lab.settle(8)
        assert lab.texts(cleo) == ["hello from Dora"]
        for name in (bob, cleo, dora):
            lab.away(name)
        lab.kill()
        lab.start(ana)
        lab.settle(8)
        lab.start(cleo)
        lab.settle(20)
        lab.join(ana, erin)
        lab.settle(20)
        assert len(lab.state(ana, room)["devices"]) == 3
        agree(lab, room, [ana, cleo, erin], ["hello from Dora"])

    def test_a_newcomer_whose_link_a_charter_ended_is_told_by_a_relay_that_forgot(self, clients: Node) -> None:
        lab = Stage(clients)
        _, (ana, bob, _) = room_of_three(lab)
        lab.do(ana, "policy", joins=1)
        lab.do(ana, "makeAdmin", member=lab.member(ana, bob)["id"])
        lab.settle(8)
        (dora,) = fresh("dora")
        lab.start(dora)
        lab.do(dora, "link", text=lab.do(ana, "invite")["link"])
        lab.do(dora, "join", name=dora)
        lab.settle(4)
        assert lab.model(dora)["invited"]["state"] == "waiting"
        lab.lie = lambda name, frames: [] if name == dora else frames
        lab.do(ana, "unmakeAdmin", member=lab.member(ana, bob)["id"])
        lab.settle(8)
        lab.lie = None
        lab.kill()
        lab.settle(12)
        assert lab.model(dora)["invited"]["state"] == "over"

    def test_admins_are_made_and_unmade_by_the_creator_alone(self, lab: Laboratory) -> None:
        room, (ana, bob, cleo) = room_of_three(lab)
        assert not lab.member(bob, cleo)["may"]["promote"]
        with pytest.raises(Refused, match="not-creator"):
            lab.do(bob, "makeAdmin", member=lab.member(bob, cleo)["id"])
        lab.do(ana, "makeAdmin", member=lab.member(ana, bob)["id"])
        lab.settle(8)
        assert [lab.member(cleo, name)["admin"] for name in (ana, bob, cleo)] == [True, True, False]
        (dora,) = fresh("dora")
        lab.start(dora)
        lab.join(bob, dora)
        assert not lab.member(bob, ana)["may"]["remove"], "a senior admin is not a junior's to remove"
        link = lab.invite(bob)
        lab.do(ana, "unmakeAdmin", member=lab.member(ana, bob)["id"])
        lab.settle(8)
        assert [lab.member(cleo, name)["admin"] for name in (ana, bob, cleo)] == [True, False, False]
        (eve,) = fresh("eve")
        lab.start(eve)
        lab.follow(link, eve)
        assert lab.model(eve)["invited"]["state"] == "over", "the links of one who is no admin any more are dead"
        agree(lab, room, [ana, bob, cleo, dora], [])

    def test_the_last_admin_names_another_before_it_leaves(self, lab: Laboratory) -> None:
        room, (ana, bob, cleo) = room_of_three(lab)
        assert lab.room(ana)["lastAdmin"]
        with pytest.raises(Refused, match="last-admin"):
            lab.do(ana, "leaveRoom")
        lab.do(ana, "makeAdmin", member=lab.member(ana, bob)["id"])
        lab.settle(8)
        lab.do(ana, "leaveRoom")
        lab.settle(12)
        assert lab.room(ana)["state"] == "left"
        assert {m["name"] for m in lab.room(cleo)["members"]} == {bob, cleo}
        assert lab.room(cleo)["notes"] == []
        (dora,) = fresh("dora")
        lab.start(dora)
        lab.join(bob, dora)
        lab.do(dora, "send", text="the room lives on")
        lab.settle(10)
        agree(lab, room, [bob, cleo, dora], ["the room lives on"])

    def test_who_was_away_learns_of_a_senior_admins_leaving_after_a_relay_restart(self, lab: Laboratory) -> None:
        room, (ana, bob, cleo) = room_of_three(lab)
        lab.do(ana, "makeAdmin", member=lab.member(ana, bob)["id"])
        lab.settle(8)
        lab.away(cleo)
        lab.do(ana, "leaveRoom")
        lab.settle(12)
        lab.start(cleo)
        lab.settle(12)
        assert {m["name"] for m in lab.room(cleo)["members"]} == {bob, cleo}
        assert lab.room(cleo)["notes"] == []
        agree(lab, room, [bob, cleo], [])

    def test_a_lost_phone_is_put_out_at_once_and_for_good(self, lab: Laboratory) -> None:
        room, (ana, bob, cleo) = room_of_three(lab)
        (phone,) = fresh("phone")
        lab.start(phone)
        lab.linked(bob, phone, room)
        lab.dismissed(ana, "memberKey")
        lab.dismissed(cleo, "memberKey")
        lab.away(ana)
        (lost,) = [d["dev"] for d in lab.room(bob)["devices"] if not d["you"]]
        lab.do(bob, "removeDevice", dev=lost)
        lab.settle(2)
        assert [d["online"] for d in lab.room(bob)["devices"] if not d["you"]] == [False]
        assert [note["text"] for note in lab.room(phone)["notes"]] == ["unlinked"]
        lab.do(cleo, "send", text="not for the thief")
        lab.settle(6)
        assert "not for the thief" not in lab.texts(phone)
        lab.start(ana)
        lab.settle(12)
        assert (lab.texts(bob), lab.texts(phone)) == (["not for the thief"], [])
        assert lab.member(cleo, bob)["devices"] == 1
        agree(lab, room, [ana, bob, cleo], ["not for the thief"])

    def test_the_creators_second_device_rules_when_the_first_is_lost(self, lab: Laboratory) -> None:
        room, (ana, bob, cleo) = room_of_three(lab)
        (laptop,) = fresh("laptop")
        lab.start(laptop)
        lab.linked(ana, laptop, room)
        lab.settle(10)
        assert all(lab.room(laptop)["me"][what] for what in ("creator", "admin"))
        assert not lab.room(bob)["me"]["creator"]
        lab.away(ana)
        (first,) = [d["dev"] for d in lab.room(laptop)["devices"] if not d["you"]]
        lab.do(laptop, "removeDevice", dev=first)
        lab.settle(12)
        assert lab.member(bob, ana)["devices"] == 1
        lab.do(laptop, "makeAdmin", member=lab.member(laptop, bob)["id"])
        lab.settle(12)
        assert lab.member(cleo, bob)["admin"]
        agree(lab, room, [laptop, bob, cleo], [])

    def test_rules_are_changed_by_the_creator_and_hold(self, lab: Laboratory) -> None:
        room, (ana, bob, cleo) = room_of_three(lab)
        lab.do(ana, "policy", rotate_after=3, history=2)
        lab.settle(8)
        assert lab.room(cleo)["policy"] == {"rotate_after": 3, "rotate_hours": 168, "who": 0, "history": 2, "joins": 0}
        epoch = lab.state(ana, room)["epoch"]
        for n in range(6):
            lab.do((bob, cleo)[n % 2], "send", text=f"m{n}")
            lab.settle(12)
        assert lab.state(ana, room)["epoch"] >= epoch + 1
        (dora,) = fresh("dora")
        lab.start(dora)
        lab.join(ana, dora)
        lab.settle(20)
        agree(lab, room, [ana, bob, cleo, dora], [f"m{n}" for n in range(6)])
        with pytest.raises(Refused, match="bad"):
            lab.do(ana, "policy", rotate_after=0)
        with pytest.raises(Refused, match="not-creator"):
            lab.do(bob, "policy", who=1)

    def test_keys_change_on_demand_and_by_admins_alone_where_the_rules_say_so(self, lab: Laboratory) -> None:
        room, (ana, bob, cleo) = room_of_three(lab)
        epoch = lab.state(ana, room)["epoch"]
        lab.do(bob, "rotate")
        lab.settle(14)
        assert lab.state(ana, room)["epoch"] == epoch + 1
        lab.do(ana, "policy", who=1)
        lab.settle(14)
        for name in (ana, bob, cleo):
            shown = [m["author"] for m in lab.room(name)["messages"] if m["kind"] == "rotated"]
            assert shown == [bob], "told once, and nothing of the new rules"
        assert not lab.room(bob)["me"]["rotates"]
        with pytest.raises(Refused, match="not-admin"):
            lab.do(bob, "rotate")
        agree(lab, room, [ana, bob, cleo], [])

    def test_keys_change_after_so_many_hours_before_anything_is_sealed_with_them(self, lab: Laboratory) -> None:
        room, (ana, bob, cleo) = room_of_three(lab)
        lab.do(ana, "policy", rotate_hours=1)
        lab.settle(8)
        epoch = lab.state(ana, room)["epoch"]
        lab.do(bob, "send", text="within the hour")
        lab.settle(8)
        assert lab.state(bob, room)["epoch"] == epoch
        for _ in range(80):
            lab.tick(50)
            lab.drain()
        lab.do(bob, "send", text="an hour later")
        lab.settle(12)
        assert lab.state(cleo, room)["epoch"] == epoch + 1
        assert lab.room(cleo)["stale"] == ""
        agree(lab, room, [ana, bob, cleo], ["within the hour", "an hour later"])

    @pytest.mark.parametrize(("history", "seen"), [(0, []), (1, ["m1", "m2"]), (2, ["m0", "m1", "m2"])])
    def test_newcomers_read_from_where_the_rules_say(self, lab: Laboratory, history: int, seen: list[str]) -> None:
        room, (ana, bob, cleo) = room_of_three(lab)
        lab.do(ana, "policy", history=history)
        lab.settle(8)
        lab.do(bob, "send", text="m0")
        lab.settle(4)
        lab.do(ana, "rotate")
        lab.settle(14)
        lab.do(cleo, "send", text="m1")
        lab.settle(4)
        lab.do(ana, "send", text="m2")
        lab.settle(8)
        (dora,) = fresh("dora")
        lab.start(dora)
        lab.join(ana, dora)
        lab.settle(20)
        assert lab.texts(dora) == seen
        assert sorted(row[4] for row in lab.stored(dora, room) if row[4]) == seen
        assert [m["kind"] for m in lab.room(dora)["messages"]].count("missing") == 0
        agree(lab, room, [ana, bob, cleo], ["m0", "m1", "m2"])

    def test_two_weeks_away_and_nothing_is_missing(self, clients: Node) -> None:
        lab = Laboratory(clients, ttl=3600.0)
        room, (ana, bob, cleo) = room_of_three(lab)
        lab.do(ana, "policy", rotate_after=3)
        lab.settle(8)
        lab.away(cleo)
        said = [f"m{n}" for n in range(12)]
        for n, text in enumerate(said):
            lab.do((ana, bob)[n % 2], "send", text=text)
            lab.settle(12)
        for _ in range(14):
            lab.tick(86_400)
            lab.settle(4)
        lab.kill()
        lab.settle(8)
        lab.start(cleo)
        lab.settle(90)
        assert lab.texts(cleo) == said
        assert lab.room(cleo)["notes"] == []
        agree(lab, room, [ana, bob, cleo], said)

    def test_two_people_compare_numbers_and_a_changed_one_is_refused(self, lab: Laboratory) -> None:
        _, (ana, bob, cleo) = room_of_three(lab)
        mine = lab.do(ana, "safety", member=lab.member(ana, bob)["id"])
        theirs = lab.do(bob, "safety", member=lab.member(bob, ana)["id"])
        assert (mine, len(mine["groups"])) == (theirs, 12)
        assert mine != lab.do(ana, "safety", member=lab.member(ana, cleo)["id"])
        assert mine["code"] == "ZSR1 " + "".join(mine["groups"])
        assert lab.do(ana, "safety", member="") == lab.do(cleo, "safety", member="")
        with pytest.raises(Refused, match="mismatch"):
            lab.do(ana, "verify", member=lab.member(ana, bob)["id"], number="1" * 30)
        assert not lab.member(ana, bob)["verified"]
        lab.do(ana, "verify", member=lab.member(ana, bob)["id"], number=theirs["code"])
        lab.crash(ana)
        assert [lab.member(ana, name)["verified"] for name in (bob, cleo)] == [True, False]

    def test_stale_keys_are_told_and_then_nothing_is_sealed_with_them(self, clients: Node) -> None:
        lab = Laboratory(clients, rotation_seconds=1e6)  # this relay takes one change of keys, and never another
        ana, bob = fresh("ana", "bob")
        lab.start(ana, bob)
        room = lab.create(ana)
        lab.join(ana, bob)
        lab.do(ana, "policy", rotate_after=2)
        lab.settle(12)
        lab.do(ana, "rotate")
        lab.settle(12)
        for n in range(8):
            assert lab.room(ana)["stale"] == ("" if n < 4 else "warn"), n
            lab.do(ana, "send", text=f"m{n}")
            lab.settle(3)
        lab.do(ana, "send", text="m8")
        lab.settle(12)
        assert lab.room(ana)["stale"] == "refuse"
        assert lab.room(ana)["messages"][-1]["state"] == "sending"
        assert lab.texts(bob) == [f"m{n}" for n in range(8)], "four times the limit, and nothing beyond"
        lab.kill()
        lab.settle(20)
        assert lab.room(ana)["stale"] == ""
        agree(lab, room, [ana, bob], [f"m{n}" for n in range(9)])


class TestInvites:
    def test_a_link_of_three_uses_admits_three_and_tells_the_fourth(self, lab: Laboratory) -> None:
        ana, *friends = fresh("ana", "bob", "cleo", "dora", "eve")
        lab.start(ana, *friends)
        room = lab.create(ana)
        made = lab.do(ana, "invite", uses=3, hours=1)
        assert made["expiry"] == lab.node.call("Lab.wall") + 3_600_000
        assert lab.room(ana)["invites"] == [{"id": made["id"], "expiry": made["expiry"], "uses": 3, "left": 3}]
        lab.follow(made["link"], friends[0], friends[1], seconds=14)
        assert [i["left"] for i in lab.room(ana)["invites"]] == [1]
        lab.kill()
        lab.settle(4)
        lab.follow(made["link"], friends[2], seconds=10)
        assert [lab.model(name)["at"] for name in friends[:3]] == ["room"] * 3
        assert lab.room(ana)["invites"] == []
        lab.follow(made["link"], friends[3], seconds=10)
        assert lab.model(friends[3])["invited"]["state"] == "used"
        lab.do(ana, "send", text="all three")
        lab.settle(10)
        agree(lab, room, [ana, *friends[:3]], ["all three"])

    def test_the_end_of_a_bunch_is_told_and_revoking_it_ends_all_uses(self, lab: Laboratory) -> None:
        ana, bob, cleo, dora = fresh("ana", "bob", "cleo", "dora")
        lab.start(ana, bob, cleo, dora)
        lab.create(ana)
        made, short = lab.do(ana, "invite", uses=3), lab.do(ana, "invite", uses=2, hours=1)
        lab.follow(made["link"], bob)
        lab.do(ana, "revoke", id=made["id"])
        assert [i["id"] for i in lab.room(ana)["invites"]] == [short["id"]]
        lab.follow(made["link"], cleo)
        assert lab.model(cleo)["invited"]["state"] == "over"
        lab.kill()
        lab.settle(4)
        lab.follow(made["link"], cleo)
        assert lab.model(cleo)["invited"]["state"] == "over", "also at a relay that has forgotten"
        for _ in range(8):
            lab.tick(500)
            lab.drain()
        assert lab.room(ana)["invites"] == []
        lab.follow(short["link"], dora)
        assert lab.model(dora)["invited"]["state"] == "over"

    def test_a_preview_that_opens_a_link_changes_nothing(self, lab: Laboratory) -> None:
        ana, bob, robot = fresh("ana", "bob", "robot")
        lab.start(ana, bob, robot)
        lab.create(ana)
        link_ = lab.invite(ana)
        for _ in range(2):
            lab.do(robot, "link", text=link_)
            lab.settle(2)
        assert [w.client for w in lab.wires.values()] == [ana], "nothing has reached the relay"
        lab.do(bob, "link", text=link_)
        lab.follow(link_, bob)
        assert lab.model(bob)["at"] == "room"
        lab.do(bob, "link", text=link_)
        assert lab.model(bob)["at"] == "room", "the second time it leads to the room one is in"

    @pytest.mark.parametrize(("how", "fault"), [({"uses": 0}, "bad"), ({"uses": 21}, "bad"), ({"hours": 0}, "bad")])
    def test_uses_and_hours_have_bounds(self, lab: Laboratory, how: dict[str, int], fault: str) -> None:
        (ana,) = fresh("ana")
        lab.start(ana)
        lab.create(ana)
        with pytest.raises(Refused) as refused_:
            lab.do(ana, "invite", **how)
        assert refused_.value.code == fault

    def test_any_admin_device_lets_in_by_any_admins_link(self, lab: Laboratory) -> None:
        room, (ana, bob, cleo) = room_of_three(lab)
        dora, eve = fresh("dora", "eve")
        lab.start(dora, eve)
        made = lab.do(ana, "invite", uses=3)
        lab.appoint(room, ana, ana, bob)
        assert [i["left"] for i in lab.room(bob)["invites"]] == [3], "a new admin gets a share of what is open"
        later = lab.do(ana, "invite")
        lab.settle(2)
        lab.away(ana)
        lab.kill()
        lab.settle(4)
        lab.follow(made["link"], dora)
        assert lab.model(dora)["invited"]["state"] == "over", "no relay knows an invite before one of its makers comes"
        lab.start(ana)
        lab.settle(4)
        lab.away(ana)
        lab.settle(8)
        assert lab.model(dora)["at"] == "room"
        lab.follow(later["link"], eve)
        assert lab.model(eve)["at"] == "room"
        assert [i["left"] for i in lab.room(bob)["invites"]] == [2]
        lab.start(ana)
        lab.settle(10)
        assert [i["left"] for i in lab.room(ana)["invites"]] == [2]
        lab.do(cleo, "send", text="all here")
        lab.settle(8)
        agree(lab, room, [ana, bob, cleo, dora, eve], ["all here"])

    def test_a_link_revoked_by_another_admin_is_over_for_all(self, lab: Laboratory) -> None:
        room, (ana, bob, _) = room_of_three(lab)
        (dora,) = fresh("dora")
        lab.start(dora)
        lab.appoint(room, ana, ana, bob)
        made = lab.do(ana, "invite", uses=2)
        lab.settle(2)
        lab.do(bob, "revoke", id=lab.room(bob)["invites"][0]["id"])
        lab.settle(2)
        assert lab.room(ana)["invites"] == lab.room(bob)["invites"] == []
        lab.away(bob)
        lab.kill()
        lab.settle(4)
        lab.follow(made["link"], dora)
        assert lab.model(dora)["invited"]["state"] == "over"
        assert len(lab.room(ana)["members"]) == 3

    def test_two_admins_at_once_admit_one_and_both_newcomers_are_told(self, lab: Laboratory) -> None:
        room, (ana, bob, cleo) = room_of_three(lab)
        lab.appoint(room, ana, ana, bob)
        dora, eve = fresh("dora", "eve")
        lab.start(dora, eve)
        lab.follow(lab.invite(ana), dora, eve, seconds=10)
        inside = [name for name in (dora, eve) if lab.model(name)["at"] == "room"]
        (outside,) = {dora, eve} - set(inside)
        assert lab.model(outside)["invited"]["state"] == "used"
        lab.do(cleo, "send", text="one of them")
        lab.settle(8)
        agree(lab, room, [ana, bob, cleo, *inside], ["one of them"])


def with_marks(lab: Laboratory, name: str) -> Any:
    """The room with its marks, which are reckoned once they are asked for."""

    def reckoned() -> Any:
        room = lab.room(name)
        lab.settle(1)
        return room if all(len(each["mark"]) == 32 for each in [*room["members"], *room["waiting"]]) else None

    return eventually(reckoned, "all marks are reckoned")


class TestAsk:
    def asking(self, lab: Laboratory) -> tuple[str, list[str]]:
        room, people = room_of_three(lab)
        lab.appoint(room, people[0], *people[:2], policy={"joins": 1})
        return room, people

    def test_who_waits_is_shown_with_name_and_fingerprint_and_let_in_on_a_yes(self, lab: Laboratory) -> None:
        room, (ana, bob, cleo) = self.asking(lab)
        (dora,) = fresh("dora")
        lab.start(dora)
        lab.follow(lab.invite(ana), dora)
        invited = lab.model(dora)["invited"]
        assert (invited["state"], len(invited["fingerprint"].split())) == ("waiting", 6)
        for name in (ana, bob):
            (waits,) = lab.room(name)["waiting"]
            assert (waits["name"], waits["fingerprint"]) == (dora, invited["fingerprint"])
            assert not waits["device"]
        assert lab.room(cleo)["waiting"] == []
        lab.crash(bob)
        lab.kill()
        lab.settle(4)
        (still,) = with_marks(lab, bob)["waiting"]
        assert still["dev"] == waits["dev"], "it survives the page and the relay"
        lab.do(bob, "admit", dev=waits["dev"])
        lab.settle(8)
        assert lab.model(dora)["at"] == "room"
        marks = {m["name"]: m["mark"] for m in with_marks(lab, bob)["members"]}
        assert marks[dora] == still["mark"], "who asked looks the same inside"
        assert lab.room(ana)["waiting"] == lab.room(bob)["waiting"] == []
        lab.do(dora, "send", text="thanks")
        lab.settle(8)
        agree(lab, room, [ana, bob, cleo, dora], ["thanks"])

    def test_the_first_answer_counts(self, lab: Laboratory) -> None:
        room, (ana, bob, _) = self.asking(lab)
        (dora,) = fresh("dora")
        lab.start(dora)
        made = lab.do(ana, "invite")
        lab.settle(2)
        lab.away(ana)
        lab.follow(made["link"], dora)
        (waits,) = lab.room(bob)["waiting"]
        lab.do(bob, "refuse", dev=waits["dev"])
        lab.settle(3)
        assert lab.model(dora)["invited"]["state"] == "refused"
        assert lab.left(dora) == [], "nothing of Dora's was kept"
        lab.start(ana)
        lab.settle(4)
        assert lab.room(ana)["waiting"] == lab.room(ana)["invites"] == []
        assert lab.do(ana, "admit", dev=waits["dev"]) is None
        lab.settle(4)
        lab.follow(made["link"], dora)
        assert lab.model(dora)["invited"]["state"] == "over"
        assert len(lab.state(ana, room)["devices"]) == 3

    def test_waiting_ends_with_the_invite(self, lab: Laboratory) -> None:
        _, (ana, bob, _) = self.asking(lab)
        dora, eve = fresh("dora", "eve")
        lab.start(dora, eve)
        made, brief = lab.do(ana, "invite"), lab.do(ana, "invite", hours=1)
        lab.follow(made["link"], dora)
        lab.follow(brief["link"], eve)
        assert len(lab.room(ana)["waiting"]) == len(lab.room(bob)["waiting"]) == 2
        lab.do(ana, "revoke", id=made["id"])
        lab.settle(3)
        assert lab.model(dora)["invited"]["state"] == "over"
        assert [w["name"] for w in lab.room(bob)["waiting"]] == [w["name"] for w in lab.room(ana)["waiting"]] == [eve]
        for _ in range(9):
            lab.tick(500)
            lab.drain()
        assert lab.room(ana)["waiting"] == lab.room(bob)["waiting"] == []

    def test_a_members_device_is_asked_for_too_and_an_admins_own_is_not(self, lab: Laboratory) -> None:
        room, (ana, bob, cleo) = self.asking(lab)
        laptop, tablet = fresh("laptop", "tablet")
        lab.start(laptop, tablet)
        lab.linked(cleo, laptop, room)
        (waits,) = lab.room(bob)["waiting"]
        assert (waits["name"], waits["device"]) == (cleo, True)
        assert lab.room(cleo)["linking"][0]["name"] == laptop
        lab.do(bob, "admit", dev=waits["dev"])
        lab.settle(8)
        assert lab.model(laptop)["at"] == "room"
        lab.linked(ana, tablet, room)
        assert lab.model(tablet)["at"] == "room"
        assert {m["name"]: m["devices"] for m in lab.room(bob)["members"]} == {ana: 2, bob: 1, cleo: 2}


SCHEDULES = st.lists(
    st.tuples(
        st.sampled_from(["send"] * 6 + ["move"] * 8 + ["tick", "cut", "crash", "kill", "mute"]), st.integers(0, 2**16)
    ),
    max_size=60,
)


@given(schedule=SCHEDULES, seed=st.integers(1, 2**31))
@settings(
    max_examples=12,
    deadline=None,
    phases=[Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink],
    suppress_health_check=list(HealthCheck),
)
def test_no_schedule_of_losses_kills_and_crashes_loses_or_doubles_a_message(
    clients: Node, schedule: list[tuple[str, int]], seed: int
) -> None:
    lab = Laboratory(clients, seed)
    room, people = room_of_three(lab)
    said: list[str] = []
    for op, x in schedule:
        name = people[x % 3]
        if op == "send":
            said.append(f"m{len(said)}")
            lab.do(name, "send", text=said[-1])
        elif op == "move" and (moves := lab.moves()):
            for _ in range(1 + x % 7):
                if moves := lab.moves():
                    lab.move(*moves[x % len(moves)])
        elif op == "tick":
            lab.tick(0.1 + x % 40 / 10)
        elif op == "cut":
            lab.cut(name)
        elif op == "crash":
            lab.crash(name)
        elif op == "kill":
            lab.kill()
        elif op == "mute":  # accepted and on the disk, and the page dies before a byte of it has left
            clients.call("Lab.mute", name, True)
            said.append(f"m{len(said)}")
            lab.do(name, "send", text=said[-1])
            lab.crash(name)
    lab.settle(60)
    agree(lab, room, people, said)


class Saga:
    """A room over whose people a schedule goes, and what was meant to come of it."""

    MOST = 7
    OPS = (
        *("send",) * 8,
        *("move",) * 10,
        *("tick",) * 4,
        *("cut", "cut", "crash", "crash", "kill", "mute", "away", "back", "back", "hour"),
        *("join", "join", "again", "link", "link", "remove", "remove", "leave", "unlink"),
        *("promote", "promote", "demote", "rotate", "rotate", "policy", "admit"),
    )

    def __init__(self, lab: Laboratory, history: int) -> None:
        self.lab = lab
        self.room, self.people = room_of_three(lab)
        self.asleep: set[str] = set()
        self.said: dict[str, str] = {}
        self.links: list[str] = []
        self.out: dict[str, str] = {}
        self.leaving: set[str] = set()  # members
        if history:
            lab.do(self.people[0], "policy", history=history)
            lab.settle(4)

    def facts(self, name: str) -> Any:
        return self.lab.facts(name, self.room)

    def seen(self, name: str) -> Any:
        """The room as this person sees it, or nothing where it is not in it."""
        if name in self.asleep:
            return None
        model = self.lab.model(name)
        if model["at"] != "room" and any(r["id"] == self.room and r["state"] == "member" for r in model["rooms"]):
            self.lab.do(name, "go", to={"at": "room", "id": self.room})
            model = self.lab.model(name)
        return model["room"] if model["at"] == "room" and model["room"]["state"] == "member" else None

    def who(self, x: int, may: Callable[[Any], Any]) -> tuple[str, Any]:
        """Somebody who is here and may do it, and the room as it is there."""
        found = [(name, room) for name in self.people if (room := self.seen(name)) and may(room)]
        return found[x % len(found)] if found else ("", None)

    def newcomer(self, link: str) -> None:
        if len(self.people) < self.MOST:
            (name,) = fresh("new")
            self.people.append(name)
            self.lab.start(name)
            self.lab.do(name, "link", text=link)
            self.lab.do(name, "join", name=name)

    def do(self, op: str, x: int) -> None:
        with contextlib.suppress(Refused):
            getattr(self, op)(x)

    def send(self, x: int) -> None:
        if name := self.who(x, bool)[0]:
            text = f"m{len(self.said)}"
            self.lab.do(name, "send", text=text)
            self.said[text] = name

    def mute(self, x: int) -> None:
        """Accepted and on the disk, and the page dies before a byte of it has left."""
        if name := self.who(x, bool)[0]:
            self.lab.node.call("Lab.mute", name, True)
            self.send(x)
            self.lab.crash(name)

    def move(self, x: int) -> None:
        for _ in range(1 + x % 12):
            if moves := self.lab.moves():
                self.lab.move(*moves[x % len(moves)])

    def tick(self, x: int) -> None:
        self.lab.tick(0.1 + x % 60 / 10)

    def hour(self, x: int) -> None:
        self.lab.tick(3600 * (1 + x % 3))

    def kill(self, _: int) -> None:
        self.lab.kill()

    def cut(self, x: int) -> None:
        self.lab.cut(self.people[x % len(self.people)])

    def crash(self, x: int) -> None:
        name = self.people[x % len(self.people)]
        if name not in self.asleep:
            self.lab.crash(name)

    def away(self, x: int) -> None:
        name = self.people[x % len(self.people)]
        if name not in self.asleep:
            self.asleep.add(name)
            self.lab.away(name)

    def back(self, x: int) -> None:
        if self.asleep:
            name = sorted(self.asleep)[x % len(self.asleep)]
            self.asleep.remove(name)
            self.lab.start(name)

    def join(self, x: int) -> None:
        if name := self.who(x, lambda room: room["me"]["admin"])[0]:
            self.links.append(self.lab.do(name, "invite", uses=1 + x % 2)["link"])
            self.newcomer(self.links[-1])

    def again(self, x: int) -> None:
        if self.links:
            self.newcomer(self.links[x % len(self.links)])

    def link(self, x: int) -> None:
        if len(self.people) < self.MOST and (name := self.who(x, bool)[0]):
            self.newcomer(self.lab.do(name, "linkDevice", rooms=[self.room])["link"])

    def upon(self, x: int, right: str, do: str) -> None:
        """Somebody who may do it does it to one of those who it may be done to."""
        name, room = self.who(x, lambda room: any(m["may"][right] for m in room["members"]))
        if name:
            able = [m["id"] for m in room["members"] if m["may"][right]]
            self.lab.do(name, do, member=able[x // 16 % len(able)])

    def remove(self, x: int) -> None:
        self.upon(x, "remove", "remove")

    def promote(self, x: int) -> None:
        self.upon(x, "promote", "makeAdmin")

    def demote(self, x: int) -> None:
        self.upon(x, "demote", "unmakeAdmin")

    def leave(self, x: int) -> None:
        if name := self.who(x, bool)[0]:
            self.lab.do(name, "leaveRoom")
            f = self.facts(name)
            for dev in (d for d in f["devices"] if f["members"][d] == f["members"][f["dev"]]):
                self.out.setdefault(dev, "left")  # one that was unlinked before may call it that
            self.leaving.add(f["members"][f["dev"]])

    def unlink(self, x: int) -> None:
        name, room = self.who(x, lambda room: len(room["devices"]) > 1)
        if name:
            dev = next(d["dev"] for d in room["devices"] if not d["you"])
            self.lab.do(name, "removeDevice", dev=dev)
            self.out.setdefault(dev, "removed")

    def rotate(self, x: int) -> None:
        if name := self.who(x, lambda room: room["me"]["rotates"])[0]:
            self.lab.do(name, "rotate")

    def policy(self, x: int) -> None:
        y = x // 16
        rules = [{"rotate_after": 1 + y % 9}, {"history": y % 3}, {"who": y % 2}, {"joins": y % 2}]
        if name := self.who(x, lambda room: room["me"]["creator"])[0]:
            self.lab.do(name, "policy", **rules[x % 4])

    def admit(self, x: int, *, yes: bool = False) -> None:
        name, room = self.who(x, lambda room: room["waiting"])
        if name:
            self.lab.do(name, "admit" if yes or x % 4 else "refuse", dev=room["waiting"][0]["dev"])

    # -- the end
    def end(self) -> None:
        """Everybody comes back, and there is time for all that is due."""
        while self.asleep:
            self.back(0)
        for seconds in (40, 30, 300):
            self.lab.settle(seconds)
            for x in range(self.MOST):
                self.admit(x, yes=True)
            self.lab.settle(10)
            if not any(self.wrong()):
                break
        wrong = [*self.wrong(), *self.lab.node.call("Lab.faults")]
        assert not wrong, "\n".join(wrong)

    def wrong(self) -> Iterator[str]:
        """What is not as the protocol promises, in words."""
        met = {name: f for name in self.people if (f := self.facts(name))["state"]}
        heads = [f for f in met.values() if f["head"] and f["dev"] in f["devices"] and f["state"] == "member"]
        if heads:
            head = max(heads, key=lambda f: f["head"]["epoch"])
            inside = {name: f for name, f in met.items() if f["dev"] in head["devices"]}
            yield from self.members(head, inside, met)
            yield from self.held(head, inside, met)

    def members(self, head: Any, inside: dict[str, Any], met: dict[str, Any]) -> Iterator[str]:
        admins = {name for name, f in inside.items() if f["dev"] in head["head"]["admins"]}
        listed = {dev: head["members"][dev] for dev in head["head"]["admins"] if dev in head["devices"]}
        alone = len({head["members"][dev] for dev in head["devices"]}) == 1  # who leaves last is out by that
        stays = all(dev in self.out or member in self.leaving for dev, member in listed.items())
        if strangers := set(head["devices"]) - {f["dev"] for f in met.values()}:
            yield f"listed and nobody's: {strangers}"
        for name, f in met.items():
            bad = [n for n in f["notes"] if n["level"] == "alarm" or n["text"] == "heldBack"]
            if f["alarms"] or bad:
                yield f"{name} is alarmed: {f['alarms']} {bad}"
            if name in inside:
                if f["head"] != head["head"] or f["devices"] != head["devices"]:
                    yield f"{name} has another head than the rest: {f['state']} {f['join']} {f['undone']}"
                told = f["stays"] or f["state"] in ("removed", *(("left",) if alone else ()))
                if not (stays and told) if f["dev"] in self.out else f["state"] != "member":
                    yield f"{name} is listed and {f['state']}; own word: {self.out.get(f['dev'])}"
                if f["outbox"] or f["undone"] or f["wishes"]:
                    yield f"{name} has left undone {f['outbox']} {f['undone']} {f['wishes']}"
            elif f["head"] and f["state"] not in self.ends(f):
                yield f"{name} is out and does not know: {f['state']} {self.out.get(f['dev'])} {f['undone']}"
            elif not f["head"] and f["state"] == "joining" and f["dev"] not in head["gone"]:
                able = any(f["link"] in met[who]["links"] for who in (inside if f["by"] and admins else admins))
                if able and f["join"] in ("new", "waiting", "admitted"):
                    yield f"{name} was never let in: {f['join']}"

    def ends(self, f: Any) -> set[str]:
        """What a device that is out may call it: one that came while its member was leaving has left with it."""
        word = self.out.get(f["dev"], "removed")
        return {word, "left"} if f["members"].get(f["dev"]) in self.leaving else {word}

    def held(self, head: Any, inside: dict[str, Any], met: dict[str, Any]) -> Iterator[str]:
        known = {ch: (parent, roster) for f in met.values() for ch, parent, roster in f["known"]}
        rosters = {roster: set(devices) for f in met.values() for roster, devices in f["rosters"]}
        froms = {d: start for f in met.values() for d, start in f["devices"].items()}

        def entitled(dev: str, ch: str) -> bool:
            if ch in known and dev in rosters[known[ch][1]]:
                return True
            while ch in known and dev not in rosters[known[ch][1]]:
                if ch == froms.get(dev):
                    return True
                ch = known[ch][0]
            return False

        def hidden(dev: str, i: int) -> bool:
            return bool(i > head["gone"].get(dev, i))

        pool = {(dev, i): row for f in inside.values() for row in f["events"] for dev, i in [row[1:3]]}
        whole = {(r[1], r[2]): r for f in inside.values() for r in f["events"] if r[5] and not hidden(r[1], r[2])}
        for name, f in met.items():
            mine = {(r[1], r[2]): r for r in f["events"]}
            for (dev, i), row in mine.items():
                if row[5] and dev != f["dev"] and not entitled(f["dev"], row[3]):
                    yield f"{name} has the body of {dev}.{i}, {row[6]!r}, and may not"
            if name not in inside:
                continue
            for (dev, i), row in whole.items():
                if entitled(f["dev"], row[3]) and not (mine.get((dev, i)) or [0] * 6)[5]:
                    yield f"{name} lacks {dev}.{i}, {row[6]!r}: top {f['tops'].get(dev)}"
                if mine.get((dev, i), row)[:5] != row[:5]:
                    yield f"{name} has another {dev}.{i}"
            for dev in {d for d, _ in pool}:
                at = dev, f["tops"].get(dev, 0) + 1
                if at in pool and not hidden(*at):
                    yield f"{name} is kept back {at}"
        for text, name in self.said.items():
            if name in inside and [r[6] for r in inside[name]["events"]].count(text) != 1:
                yield f"{text} of {name} is not there once"


SEARCHED = int(os.environ.get("ZSR_SCHEDULES", "0"))


def played(few: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Plays random schedules, each of which takes seconds: so few in an ordinary run, the same each time, or as many new
    ones as ZSR_SCHEDULES says."""
    count = SEARCHED or few
    chosen = settings(
        max_examples=count,
        derandomize=not SEARCHED,
        deadline=None,
        database=None,
        phases=[Phase.explicit, Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    return lambda test: pytest.mark.timeout(240 + 60 * count)(chosen(test))


STEP = st.tuples(st.sampled_from(Saga.OPS), st.integers(0, 2**10))
STEPS = st.integers(0, 50).flatmap(lambda n: st.lists(STEP, min_size=n, max_size=n))  # lists() alone makes mostly few


@given(
    schedule=STEPS,
    seed=st.integers(1, 2**31),
    history=st.integers(0, 2),
)
@played(10)
def test_no_schedule_of_joins_removals_and_losses_leaves_anyone_astray(
    clients: Node, schedule: list[tuple[str, int]], seed: int, history: int
) -> None:
    clients.call("Lab.forget")
    saga = Saga(Laboratory(clients, seed), history)
    for op, x in schedule:
        saga.do(op, x)
    saga.end()


# ======================================================================================================================
# Markdown: text to a tree, without a page. What is no mark stays as it was written, and nothing is lost on the way.
# ======================================================================================================================


@pytest.fixture(scope="session")
def markdown() -> Iterator[Node]:
    started = Node(page_blocks(("room-72-markdown",)))
    yield started
    started.close()


def as_text(kids: list[Any]) -> str:
    """A tree written down again, with brackets for marks: em(...), code(...)."""
    return "".join(kid if isinstance(kid, str) else f"{kid['as']}({as_text(kid['kids'])})" for kid in kids)


def as_blocks(parsed: list[Any]) -> list[str]:
    """Blocks written down: their kind and what is in them."""
    inner: dict[str, Callable[[Any], str]] = {
        "text": lambda b: as_text(b["kids"]),
        "pre": lambda b: f"{b['lang']}|{b['text']}",
        "quote": lambda b: " / ".join(as_blocks(b["kids"])),
        "list": lambda b: f"{b['start']}|" + "|".join(as_text(item) for item in b["items"]),
    }
    return [f"{block['as']}: {inner[block['as']](block)}" for block in parsed]


class TestMarkdown:
    @pytest.mark.parametrize(
        ("text", "meant"),
        [
            ("plain, two\nlines\n\nand one", ["text: plain, two\nlines\n\nand one"]),
            ("**bold** __too__ *it* _it_ ~~no~~", ["text: strong(bold) strong(too) em(it) em(it) del(no)"]),
            ("**bold with *italic* in it**", ["text: strong(bold with em(italic) in it)"]),
            ("这是**重点**内容", ["text: 这是strong(重点)内容"]),
            ("`**not bold**` and ``a ` in it``", ["text: code(**not bold**) and code(a ` in it)"]),
            ("snake_case_name 2*3*4 a ** b ** c * d", ["text: snake_case_name 2*3*4 a ** b ** c * d"]),
            ("https://x.test/_a_*b* *so*", ["text: https://x.test/_a_*b* em(so)"]),
            ("*open and `open", ["text: *open and `open"]),
            ("```sh\nls *\n\n> x\n```\nafter", ["pre: sh|ls *\n\n> x", "text: after"]),
            ("```\nnever closed", ["pre: |never closed"]),
            ("> said\n> **loud**\n> - one\nme", ["quote: text: said\nstrong(loud) / list: 0|one", "text: me"]),
            ("to buy:\n- tea\n* *milk*\n\nthen", ["text: to buy:", "list: 0|tea|em(milk)", "text: then"]),
            ("3. c\n4. d", ["list: 3|c|d"]),
            ("1984. A year", ["text: 1984. A year"]),
            ("-5 degrees, 1.5 m", ["text: -5 degrees, 1.5 m"]),
            ("<b>no</b> [a](javascript:x)", ["text: <b>no</b> [a](javascript:x)"]),
        ],
    )
    def test_light_marks_mean_what_people_expect(self, markdown: Node, text: str, meant: list[str]) -> None:
        assert as_blocks(markdown.call("Markdown.parse", text)) == meant

    @pytest.mark.parametrize(
        ("text", "line"),
        [
            ("**so** `x`\n> a\n> b\n- c\n```\nd\n```", "so x a b c d"),
            (f"*{'a' * 200}* b", "a" * 160),
            ("```\n```", "```\n```"),
        ],
    )
    def test_a_quote_shows_the_words_alone(self, markdown: Node, text: str, line: str) -> None:
        assert markdown.call("Markdown.bare", text) == line

    @given(text=st.text(alphabet="ab *_~`>-1.\n#漢", max_size=200))
    @settings(max_examples=200, deadline=None, database=None)
    def test_no_letter_is_lost_and_no_mark_is_made_up(self, markdown: Node, text: str) -> None:
        told = "".join(as_blocks(markdown.call("Markdown.parse", text)))
        words = re.sub(r"(text|pre|quote|list|em|del|strong|code)[:(]", "", told)
        assert re.findall("[ab漢#]", words) == re.findall("[ab漢#]", text)

    @pytest.mark.parametrize("piece", ["*a ", "_a", "`", "``a", "> ", "- a\n", "~~a ~", "**a*", "```\n", "https://"])
    def test_the_work_does_not_grow_faster_than_a_message_can(self, markdown: Node, piece: str) -> None:
        """A text as long as the page lets through comes back at all: the bridge gives up after two minutes."""
        assert markdown.call("Markdown.parse", piece * (16_384 // len(piece)))


# ======================================================================================================================
# Messages: what people do to messages after they were said: answers, edits, deletions, reactions, votes, pins. All of it
# is a pure function of the events that a device holds, so whoever holds the same events sees the same.
# ======================================================================================================================


def rows(lab: Laboratory, name: str) -> list[dict[str, Any]]:
    """The messages as everyone has to see them alike: without what differs by who looks, and who came when."""
    seen = []
    for m in lab.room(name)["messages"]:
        if m["kind"] not in ("text", "file", "poll", "deleted"):
            continue
        poll = m["poll"] and [(each["text"], each["names"]) for each in m["poll"]["options"]]
        quote = m["quote"] and (m["quote"]["key"], m["quote"]["author"], m["quote"]["text"])
        reactions = [(each["emoji"], each["names"]) for each in m["reactions"]]
        same = {what: m[what] for what in ("key", "kind", "author", "text", "edits", "pinned", "expires")}
        seen.append({**same, "poll": poll, "quote": quote, "reactions": reactions})
    return seen


def message(lab: Laboratory, name: str, text: str) -> dict[str, Any]:
    """The one message with that text."""
    (found,) = [m for m in lab.room(name)["messages"] if m["text"] == text]
    return cast("dict[str, Any]", found)


def key_of(lab: Laboratory, name: str, text: str) -> str:
    return str(message(lab, name, text)["key"])


def forge(lab: Laboratory, name: str, room: str, kind: str, key: str, **body: Any) -> None:
    """An event that the page of an honest member would not make, signed by that member all the same."""
    lab._heed(name, lab.node.call("Lab.forge", name, room, kind, key, body))


class TestMessages:
    def test_a_reply_shows_what_it_answers_also_after_that_was_edited_or_deleted(self, lab: Laboratory) -> None:
        _, (ana, bob, cleo) = room_of_three(lab)
        lab.do(ana, "send", text="ferry at nine")
        lab.settle(3)
        lab.do(bob, "send", text="too early", key=key_of(lab, bob, "ferry at nine"))
        lab.settle(3)
        for name in (ana, bob, cleo):
            quote = message(lab, name, "too early")["quote"]
            assert (quote["author"], quote["text"]) == (ana, "ferry at nine")
        lab.do(ana, "edit", key=key_of(lab, ana, "ferry at nine"), text="ferry at ten")
        lab.settle(3)
        assert [message(lab, name, "too early")["quote"]["text"] for name in (ana, bob, cleo)] == ["ferry at ten"] * 3
        lab.do(ana, "delete", keys=[key_of(lab, ana, "ferry at ten")])
        lab.settle(3)
        assert [message(lab, name, "too early")["quote"]["text"] for name in (ana, bob, cleo)] == [""] * 3

    def test_an_edit_keeps_the_earlier_wordings_and_reaches_those_who_were_away(self, lab: Laboratory) -> None:
        _, (ana, bob, cleo) = room_of_three(lab)
        lab.do(ana, "send", text="one")
        lab.settle(3)
        lab.away(cleo)
        for before, text in (("one", "two"), ("two", "*three*")):
            lab.do(ana, "edit", key=message(lab, ana, before)["key"], text=text)
        lab.settle(3)
        lab.start(cleo)
        lab.settle(12)
        for name in (ana, bob, cleo):
            assert [each["text"] for each in message(lab, name, "*three*")["edits"]] == ["one", "two"]
            assert lab.model(name)["rooms"][0]["last"]["text"] == "three", "a list shows words, not marks"

    def test_a_deleted_message_is_gone_from_every_disk_with_its_edits(self, lab: Laboratory) -> None:
        room, (ana, bob, cleo) = room_of_three(lab)
        lab.do(ana, "send", text="before")
        lab.do(ana, "send", text="secret")
        lab.settle(3)
        lab.do(ana, "edit", key=key_of(lab, ana, "secret"), text="secret, again")
        lab.settle(3)
        lab.do(ana, "delete", keys=[key_of(lab, ana, "secret, again")])
        lab.settle(12)
        for name in (ana, bob, cleo):
            events = lab.facts(name, room)["events"]
            assert [e[4] for e in events if e[5] and e[4] in ("text", "edit", "delete")] == ["delete", "text"], name
            assert [m["kind"] for m in lab.room(name)["messages"]][-1] == "deleted"
            assert lab.model(name)["rooms"][0]["last"]["text"] == "before"
        agree(lab, room, [ana, bob, cleo], ["before", ""])

    def test_an_edit_or_delete_by_someone_else_has_no_effect(self, lab: Laboratory) -> None:
        room, (ana, bob, cleo) = room_of_three(lab)
        lab.do(ana, "send", text="mine alone")
        lab.settle(3)
        key = key_of(lab, bob, "mine alone")
        for do, what in (("edit", {"key": key, "text": "never"}), ("delete", {"keys": [key]})):
            with pytest.raises(Refused, match="someone else"):
                lab.do(bob, do, **what)
        forge(lab, bob, room, "edit", key, text="never said")
        forge(lab, bob, room, "delete", key)
        lab.settle(12)
        for name in (ana, bob, cleo):
            m = message(lab, name, "mine alone")
            assert (m["kind"], m["edits"]) == ("text", [])
            lab.crash(name)
        lab.settle(6)
        assert all(message(lab, name, "mine alone")["edits"] == [] for name in (ana, bob, cleo))

    def test_what_lasts_is_not_undone_by_its_authors_delete(self, lab: Laboratory) -> None:
        """A deletion of a deletion, of a name or of a vote would bring back, or leave, a matter of who came first."""
        room, (ana, bob, _) = room_of_three(lab)
        lab.do(ana, "send", text="gone for good")
        lab.settle(3)
        lab.do(ana, "delete", keys=[key_of(lab, ana, "gone for good")])
        lab.settle(3)
        facts = lab.facts(ana, room)
        events = {kind: f"{dev}.{i}" for _, dev, i, _, kind, *_ in facts["events"] if dev == facts["dev"]}
        forge(lab, ana, room, "delete", events["delete"])
        forge(lab, ana, room, "delete", events["profile"])
        lab.settle(12)
        for name in (ana, bob):
            kinds = [(kind, whole) for *_, kind, whole, _ in lab.facts(name, room)["events"]]
            assert "gone for good" not in lab.texts(name)
            assert kinds.count(("delete", True)) == 3
            assert ("profile", False) not in kinds

    def test_reactions_are_counted_once_a_person_and_taken_back(self, lab: Laboratory) -> None:
        _, (ana, bob, cleo) = room_of_three(lab)
        lab.do(ana, "send", text="cake?")
        lab.settle(3)
        key = key_of(lab, bob, "cake?")
        for name in (bob, cleo):
            lab.do(name, "react", key=key, emoji="🎂")
        lab.do(bob, "react", key=key, emoji="👍🏽")
        lab.settle(3)
        assert [(r["emoji"], sorted(r["names"])) for r in message(lab, ana, "cake?")["reactions"]] == [
            ("🎂", [bob, cleo]),
            ("👍🏽", [bob]),
        ]
        lab.do(bob, "react", key=key, emoji="🎂")
        lab.settle(3)
        assert [r["names"] for r in message(lab, ana, "cake?")["reactions"]] == [[cleo], [bob]]
        for letters in ("no", "1", "<b>", "🎂🎂"):
            with pytest.raises(Refused):
                lab.do(bob, "react", key=key, emoji=letters)

    def test_a_poll_counts_the_last_fair_vote_of_each(self, lab: Laboratory) -> None:
        room, (ana, bob, cleo) = room_of_three(lab)
        lab.do(ana, "poll", question="When?", choices=["Sat", "Sun", " "], many=False)
        lab.settle(3)
        key = key_of(lab, bob, "When?")
        for name, votes in ((ana, [[0]]), (bob, [[0], [1]]), (cleo, [[1], []])):
            for choices in votes:
                lab.do(name, "vote", key=key, choices=choices)
        lab.settle(3)
        poll = message(lab, cleo, "When?")["poll"]
        assert [(o["text"], o["names"]) for o in poll["options"]] == [("Sat", [ana]), ("Sun", [bob])]
        forge(lab, bob, room, "vote", key, choices=[0, 1])
        forge(lab, ana, room, "vote", key, choices=[7])
        lab.settle(3)
        assert [o["names"] for o in message(lab, cleo, "When?")["poll"]["options"]] == [[], []]
        for offered in (["one"], ["same", "same "], []):
            with pytest.raises(Refused):
                lab.do(ana, "poll", question="?", choices=offered, many=False)

    def test_pins_hold_for_all_and_the_last_word_counts(self, lab: Laboratory) -> None:
        _, (ana, bob, cleo) = room_of_three(lab)
        for text in ("first", "second"):
            lab.do(ana, "send", text=text)
            lab.settle(3)
            lab.do(bob, "pin", key=key_of(lab, bob, text), on=True)
        lab.settle(3)
        assert [[p["text"] for p in lab.room(name)["pins"]] for name in (ana, bob, cleo)] == [["second", "first"]] * 3
        lab.do(cleo, "pin", key=key_of(lab, cleo, "second"), on=False)
        lab.settle(3)
        lab.crash(ana)
        lab.settle(3)
        assert [[p["text"] for p in lab.room(name)["pins"]] for name in (ana, bob, cleo)] == [["first"]] * 3

    def test_what_is_answered_or_pinned_far_above_is_found(self, lab: Laboratory) -> None:
        _, (ana, bob, _) = room_of_three(lab)
        lab.do(ana, "send", text="long ago")
        lab.do(ana, "edit", key=key_of(lab, ana, "long ago"), text="long, long ago")
        lab.settle(3)
        key = key_of(lab, bob, "long, long ago")
        for n in range(130):
            lab.do(ana, "send", text=f"line {n}")
        lab.settle(6)
        lab.crash(bob)
        lab.settle(6)
        assert key not in [m["key"] for m in lab.room(bob)["messages"]]
        lab.do(bob, "send", text="remember?", key=key)
        lab.do(bob, "pin", key=key, on=True)
        assert not message(lab, bob, "remember?")["quote"]["loaded"], "what lies further up is read when it is shown"
        lab.settle(3)
        assert message(lab, bob, "remember?")["quote"]["text"] == "long, long ago"
        assert [p["text"] for p in lab.room(bob)["pins"]] == ["long, long ago"]
        assert lab.do(bob, "reach", key=key)
        assert message(lab, bob, "long, long ago")["edits"]

    def test_what_is_forwarded_is_said_again_in_the_other_room(self, lab: Laboratory) -> None:
        _, (ana, bob, _) = room_of_three(lab)
        lab.do(ana, "send", text="over there")
        other = lab.create(ana, "Elsewhere")
        here, there = sorted(lab.node.call("Lab.rooms", ana), key=lambda room: room == other)
        lab.do(ana, "go", to={"at": "room", "id": here})
        key = key_of(lab, ana, "over there")
        lab.do(ana, "edit", key=key, text="over there!")
        lab.do(ana, "forward", keys=[key], to=[there])
        lab.do(ana, "go", to={"at": "room", "id": there})
        assert lab.texts(ana) == ["over there!"]
        with pytest.raises(Refused):
            lab.do(bob, "forward", keys=["00.1"], to=[there])

    def test_a_draft_outlives_the_page_and_what_is_cleared_is_only_hidden(self, lab: Laboratory) -> None:
        room, (ana, *_) = room_of_three(lab)
        lab.do(ana, "send", text="old")
        lab.do(ana, "draft", id=room, text="not yet")
        lab.do(ana, "clear")
        assert lab.texts(ana) == []
        lab.do(ana, "send", text="new")
        assert lab.texts(ana) == ["new"]
        lab.crash(ana)
        lab.settle(3)
        assert lab.texts(ana) == ["old", "new"]
        assert [lab.room(ana)["draft"], lab.model(ana)["rooms"][0]["draft"]] == ["not yet"] * 2
        lab.do(ana, "send", text="now", written=True)
        lab.crash(ana)
        assert (lab.texts(ana)[-1], lab.room(ana)["draft"]) == ("now", "")

    def test_in_the_demo_room_all_of_it_works_without_a_disk(self, lab: Laboratory) -> None:
        dora, emil = fresh("dora", "emil")
        lab.start(dora, emil)
        for name in (dora, emil):
            lab.do(name, "demo", name=name)
        lab.settle(3)
        lab.do(dora, "send", text="anyone?")
        lab.settle(3)
        key = key_of(lab, emil, "anyone?")
        lab.do(emil, "send", text="me", key=key)
        lab.do(emil, "react", key=key, emoji="👍")
        lab.settle(3)
        lab.do(dora, "edit", key=key, text="anyone here?")
        lab.settle(3)
        for name in (dora, emil):
            m = message(lab, name, "anyone here?")
            assert ([r["names"] for r in m["reactions"]], len(m["edits"])) == ([[emil]], 1)
            assert message(lab, name, "me")["quote"]["text"] == "anyone here?"
        lab.do(emil, "react", key=key, emoji="👍")
        with pytest.raises(Refused, match="someone else"):
            lab.do(emil, "delete", keys=[key])
        lab.settle(3)
        assert [message(lab, name, "anyone here?")["reactions"] for name in (dora, emil)] == [[], []]
        lab.do(dora, "delete", keys=[key])
        lab.settle(3)
        assert [lab.texts(name) for name in (dora, emil)] == [["me"], ["me"]]


class TestDisappearing:
    """Body, file and edits go from each device; there the time counts from when the message is first seen."""

    @staticmethod
    def sees(lab: Laboratory, name: str, text: str) -> None:
        lab.do(name, "read", key=key_of(lab, name, text))

    @staticmethod
    def bodies(lab: Laboratory, name: str, room: str) -> list[str]:
        return [kind for *_, kind, whole, _ in lab.facts(name, room)["events"] if whole and kind in ("text", "edit")]

    def test_a_message_goes_from_every_device_and_disk(self, lab: Laboratory) -> None:
        room, (ana, bob, cleo) = room_of_three(lab)
        lab.do(ana, "timer", seconds=5)
        lab.settle(3)
        assert [lab.room(name)["timer"] for name in (ana, bob, cleo)] == [5, 5, 5]
        lab.do(bob, "send", text="soon gone")
        lab.drain()
        lab.do(bob, "edit", key=key_of(lab, bob, "soon gone"), text="soon gone!")
        lab.drain()
        for name in (ana, cleo):
            self.sees(lab, name, "soon gone!")
        lab.settle(2)
        assert [lab.texts(name) for name in (ana, bob, cleo)] == [["soon gone!"]] * 3
        lab.settle(6)
        for name in (ana, bob, cleo):
            assert lab.texts(name) == []
            assert self.bodies(lab, name, room) == []
            assert lab.model(name)["rooms"][0]["last"] is None
            assert lab.node.call("Lab.fading", name, room) == []
        agree(lab, room, [ana, bob, cleo], [""])

    def test_what_was_not_seen_waits_and_a_closed_page_makes_up_for_it(self, lab: Laboratory) -> None:
        room, (ana, bob, _) = room_of_three(lab)
        lab.do(ana, "timer", seconds=30)
        lab.do(ana, "send", text="for bob")
        lab.settle(60)
        assert lab.texts(ana) == []
        assert lab.texts(bob) == ["for bob"], "nobody there has seen it"
        self.sees(lab, bob, "for bob")
        lab.settle(2)
        lab.away(bob)
        lab.settle(40)
        lab.start(bob)
        lab.settle(3)
        assert lab.texts(bob) == []
        assert self.bodies(lab, bob, room) == []

    def test_a_timer_counts_for_new_messages_alone_and_is_for_admins(self, lab: Laboratory) -> None:
        room, (ana, bob, cleo) = room_of_three(lab)
        lab.do(ana, "send", text="stays")
        lab.settle(3)
        key = key_of(lab, bob, "stays")
        with pytest.raises(Refused, match="admins"):
            lab.do(bob, "timer", seconds=5)
        forge(lab, bob, room, "timer", key, seconds=5)
        lab.settle(3)
        assert [lab.room(name)["timer"] for name in (ana, bob, cleo)] == [0, 0, 0]
        for seconds in (1, 4, 2_419_201):
            with pytest.raises(Refused):
                lab.do(ana, "timer", seconds=seconds)
        lab.do(ana, "timer", seconds=5)
        self.sees(lab, bob, "stays")
        lab.do(bob, "send", text="says its own time", expires=60)
        lab.settle(20)
        assert lab.texts(bob) == ["stays", "says its own time"]
        lab.settle(60)
        assert lab.texts(bob) == ["stays"]

    def test_what_nobody_looks_at_for_four_weeks_counts_as_seen(self, lab: Laboratory) -> None:
        room, (ana, bob, _) = room_of_three(lab)
        lab.do(ana, "send", text="unseen", expires=5)
        lab.settle(3)
        lab.tick(2_419_200)
        lab.tick(30)
        lab.settle(3)
        assert self.bodies(lab, bob, room) == []

    def test_a_newcomer_entitled_to_it_does_not_go_on_asking_for_what_is_gone(self, lab: Laboratory) -> None:
        ana, bob, cleo = fresh("ana", "bob", "cleo")
        lab.start(ana, bob, cleo)
        room = lab.create(ana)
        lab.do(ana, "policy", history=2)
        lab.join(ana, bob)
        lab.do(ana, "send", text="soon gone", expires=5)
        lab.do(ana, "send", text="stays")
        lab.settle(3)
        self.sees(lab, bob, "stays")
        lab.settle(10)
        assert [lab.texts(name) for name in (ana, bob)] == [["stays"]] * 2
        lab.join(ana, cleo)
        lab.settle(20)
        assert lab.texts(cleo) == ["stays"]
        assert lab.state(cleo, room)["lacking"] == []


class TestViewOnce:
    """A photo that each member opens once: then it is off that member's devices, and all know who has opened it."""

    LIGHT = b"light and shade"

    def send(self, lab: Laboratory, name: str) -> None:
        lab.do(name, "files", files=[{"name": "photo.jpeg", "type": "image/jpeg", "bytes": self.LIGHT}], once=True)
        lab.settle(10)

    @staticmethod
    def open(lab: Laboratory, name: str, key: str) -> bytes:
        photo: bytes = lab.node.call("Lab.unveil", name, key)
        lab._heed(name, lab.node.call("Lab.out", name))
        return photo

    @staticmethod
    def photos(lab: Laboratory, name: str) -> list[dict[str, Any]]:
        return [m for m in lab.room(name)["messages"] if m["once"]]

    def test_it_opens_once_and_goes_from_all_devices_of_who_opened_it(self, lab: Laboratory) -> None:
        room, (ana, bob, cleo) = room_of_three(lab)
        (laptop,) = fresh("laptop")
        lab.start(laptop)
        lab.linked(bob, laptop, room)
        self.send(lab, ana)
        (photo,) = self.photos(lab, bob)
        assert (photo["file"]["state"], photo["expires"], len(self.photos(lab, laptop))) == ("here", 0, 1)
        with pytest.raises(Refused, match="not to be opened"):
            lab.do(ana, "open", key=photo["key"])
        with pytest.raises(Refused, match="opens once"):
            lab.do(cleo, "forward", keys=[photo["key"]], to=[room])
        assert self.open(lab, bob, photo["key"]) == self.LIGHT
        with pytest.raises(Refused):
            lab.do(bob, "open", key=photo["key"])
        lab.crash(bob)
        lab.settle(8)
        for name in (bob, laptop):
            assert (self.photos(lab, name), lab.room(name)["files"]) == ([], [])
            assert lab.node.call("Lab.fading", name, room) == []
        assert [self.photos(lab, name)[0]["opened"] for name in (ana, cleo)] == [[bob], [bob]]
        assert self.open(lab, cleo, photo["key"]) == self.LIGHT
        lab.settle(3)
        assert sorted(self.photos(lab, ana)[0]["opened"]) == [bob, cleo]

    def test_who_never_opens_it_loses_it(self, lab: Laboratory) -> None:
        _, (ana, bob, _) = room_of_three(lab)
        self.send(lab, ana)
        lab.do(bob, "read", key=self.photos(lab, bob)[0]["key"])
        lab.tick(2_419_200)
        lab.tick(30)
        lab.settle(3)
        assert [self.photos(lab, name) for name in (ana, bob)] == [[], []]
        assert lab.room(bob)["files"] == []


class TestReadMarks:
    def test_the_author_sees_who_has_read_it_and_who_shows_nothing(self, lab: Laboratory) -> None:
        _, (ana, bob, cleo) = room_of_three(lab)
        lab.do(cleo, "reads", on=False)
        for n in range(3):
            lab.do(ana, "send", text=f"line {n}")
        lab.settle(3)
        for name in (bob, cleo):
            lab.do(name, "read", key=key_of(lab, name, "line 1"))
        lab.settle(8)
        assert [message(lab, ana, f"line {n}")["read"] for n in range(3)] == [[bob], [bob], []]
        lab.do(cleo, "reads", on=True)
        for _ in range(3):
            for name in (bob, cleo):
                lab.do(name, "read", key=key_of(lab, name, "line 2"))
        lab.crash(ana)
        lab.settle(8)
        assert [sorted(message(lab, ana, f"line {n}")["read"]) for n in range(3)] == [[bob, cleo]] * 3

    def test_a_hundred_messages_read_cost_one_event(self, lab: Laboratory) -> None:
        room, (ana, bob, _) = room_of_three(lab)
        for n in range(20):
            lab.do(ana, "send", text=f"line {n}")
        lab.settle(3)
        for n in range(20):
            lab.do(bob, "read", key=key_of(lab, bob, f"line {n}"))
        lab.settle(8)
        assert [kind for *_, kind, _, _ in lab.facts(ana, room)["events"]].count("read") == 1


class Party:
    """Three members who say and do to messages whatever a list of numbers says, while frames move in any order."""

    OPS = ("say", "reply", "edit", "delete", "react", "poll", "vote", "pin", "forge", "move", "cut", "crash", "kill")

    def __init__(self, lab: Laboratory) -> None:
        self.lab = lab
        self.room, self.people = room_of_three(lab)
        self.said = 0

    def do(self, op: str, x: int) -> None:
        name = self.people[x % 3]
        if op in ("cut", "crash"):
            getattr(self.lab, op)(name)
        elif op == "kill":
            self.lab.kill()
        elif op == "move":
            for _ in range(x % 8):
                if moves := self.lab.moves():
                    self.lab.move(*moves[x % len(moves)])
        else:
            with contextlib.suppress(Refused):
                self._deed(op, name, x // 3)

    def _deed(self, op: str, name: str, x: int) -> None:
        shown = [m for m in self.lab.room(name)["messages"] if m["kind"] in ("text", "poll")]
        mail = [m["key"] for m in shown if op != "forge" or not m["mine"]] or ["00" * 16 + ".1"]
        key, do = mail[x % len(mail)], functools.partial(self.lab.do, name)
        self.said += 1
        deeds: dict[str, Callable[[], Any]] = {
            "say": lambda: do("send", text=f"text {self.said}"),
            "reply": lambda: do("send", text=f"reply {self.said}", key=key),
            "edit": lambda: do("edit", key=key, text=f"edit {self.said}"),
            "delete": lambda: do("delete", keys=[key]),
            "react": lambda: do("react", key=key, emoji="👍🎉"[x % 2]),
            "poll": lambda: do("poll", question=f"poll {self.said}", choices=["a", "b"], many=x % 2 == 0),
            "vote": lambda: do("vote", key=key, choices=[x % 2]),
            "pin": lambda: do("pin", key=key, on=x % 3 > 0),
            "forge": lambda: forge(self.lab, name, self.room, ("edit", "delete")[x % 2], key, text="forged"),
        }
        deeds[op]()

    def end(self) -> None:
        """All see the same, also from the disk alone, and nobody's words came from another."""
        self.lab.settle(60)
        seen = [rows(self.lab, name) for name in self.people]
        assert seen[1] == seen[0]
        assert seen[2] == seen[0]
        assert not [m for m in seen[0] if m["text"] == "forged"]
        for name in self.people:
            self.lab.crash(name)
        self.lab.settle(20)
        assert [rows(self.lab, name) for name in self.people] == seen
        assert self.lab.node.call("Lab.faults") == []


@given(
    schedule=st.lists(st.tuples(st.sampled_from(Party.OPS), st.integers(0, 2**10)), min_size=10, max_size=60),
    seed=st.integers(1, 2**31),
)
@played(5)
def test_all_see_the_same_in_whatever_order_events_arrive(
    clients: Node, schedule: list[tuple[str, int]], seed: int
) -> None:
    party = Party(Laboratory(clients, seed))
    for op, x in schedule:
        party.do(op, x)
    party.end()


# ---------------------------------------------------------------------------------------------------------------------
# Freight: files in the laboratory whose way breaks off, and what then crosses the wires a second time. Real page, real
# relay; every segment that is put or arrives is counted.
# ---------------------------------------------------------------------------------------------------------------------

SEGMENT_BYTES = 262_144


class Freight(Laboratory):
    """Counts the segments that pass, and can stop the world when enough of them have."""

    def __init__(self, node: Node, seed: int = 1, **limits: Any) -> None:
        self.puts = list[tuple[str, int]]()  # who gave the relay which segment
        self.came = list[tuple[str, int]]()  # to whom which segment came
        self.held = 0  # the most bytes the relay held
        self.unheard = ""  # who hears no answer
        super().__init__(node, seed, **limits)

    def _move_up(self, wire: Wire) -> None:
        message = next(m for i, m in self.upward if i == wire.id)
        for data in zsr.split_frames(message):
            frame = zsr.decode_frame(data)
            if isinstance(frame, zsr.UpPut):
                self.puts.append((wire.client, frame.index))
        super()._move_up(wire)
        self.held = max(self.held, self.rooms.counts()["bytes"])

    def _move_down(self, wire: Wire) -> None:
        frames = [zsr.decode_frame(data) for data in wire.inbox]
        self.came += [(wire.client, frame.index) for frame in frames if isinstance(frame, zsr.DownChunk)]
        if wire.client == self.unheard:
            wire.inbox = [zsr.encode_frame(frame) for frame in frames if not isinstance(frame, zsr.DownSent)]
        super()._move_down(wire)

    def until(self, what: Callable[[], bool]) -> None:
        """Deliver, one message after another, until it is so."""
        for _ in range(5000):
            if what():
                return
            moves = self.moves()
            if moves:
                self.move(*self.dice.choice(moves))
            else:
                self.tick(0.25)
        raise AssertionError("it never came to that")

    def wander(self, moves: int) -> None:
        """So many deliveries in any order, and now and then a little time."""
        for _ in range(moves):
            if (ways := self.moves()) and self.dice.random() < 0.9:
                self.move(*self.dice.choice(ways))
            else:
                self.tick(0.25)

    def twice(self, who: str) -> int:
        """How many segments this one gave to the relay, or was brought by it, more than once."""
        return max(
            len(list(seen)) - len(set(seen))
            for seen in ([n for name, n in told if name == who] for told in (self.puts, self.came))
        )

    def file(self, name: str) -> Any:
        (file,) = [m["file"] for m in self.room(name)["messages"] if m["file"]]
        return file

    def has(self, content: bytes, *names: str) -> None:
        for name in names:
            file = self.file(name)
            assert file["state"] == "here", (name, file)
            assert self.node.call("Lab.blob", name, file["id"]) == content, name
        assert self.node.call("Lab.faults") == []


@contextmanager
def freight_of(clients: Node, seed: int = 1, **limits: Any) -> Iterator[Freight]:
    """A relay that keeps files of 4 MiB; the sizes that a test sets for the clients end with it."""
    try:
        yield Freight(clients, seed, max_file=4 << 20, **limits)
    finally:
        clients.call("Lab.resize", 64 << 20, 64 << 20)


@pytest.fixture
def freight(clients: Node) -> Iterator[Freight]:
    with freight_of(clients) as one:
        yield one


def sent_file(lab: Freight, segments: int, people: int = 3) -> tuple[list[str], bytes]:
    """Ana has sent a file of so many segments, and it has just begun to move."""
    names = fresh("ana", "bob", "cleo")[:people]
    lab.start(*names)
    lab.create(names[0])
    lab.join(names[0], *names[1:])
    content = lab.dice.randbytes((segments - 1) * (SEGMENT_BYTES - 16) + 100)
    lab.do(names[0], "files", files=[{"name": "a.bin", "type": "", "bytes": content}])
    return names, content


def test_who_was_removed_is_not_offered_what_is_not_to_be_had(freight: Freight) -> None:
    (ana, bob, cleo), content = sent_file(freight, 15)
    freight.until(lambda: bob in [name for name, _ in freight.came])
    freight.do(bob, "pause", file=freight.file(bob)["id"])
    freight.do(ana, "remove", member=freight.member(ana, bob)["id"])
    freight.settle(15)
    assert freight.room(bob)["state"] == "removed"
    assert (freight.file(bob)["state"], freight.file(bob)["why"]) == ("failed", "outside")
    freight.has(content, ana, cleo)


@pytest.mark.parametrize("how", ["sender's socket", "receiver's socket", "receiver's page", "sender's page", "relay"])
def test_a_file_goes_on_where_it_broke_off(freight: Freight, how: str) -> None:
    (ana, bob, cleo), content = sent_file(freight, 12)
    freight.until(lambda: len([n for name, n in freight.came if name == bob]) >= 5)
    gone = {
        "sender's socket": lambda: freight.cut(ana),
        "receiver's socket": lambda: freight.cut(bob),
        "receiver's page": lambda: freight.crash(bob),
        "sender's page": lambda: freight.crash(ana),
        "relay": freight.kill,
    }[how]
    gone()
    freight.settle(40)
    freight.has(content, bob, cleo)
    assert freight.file(ana)["state"] == "here"
    assert freight.twice(bob) <= 1, freight.came
    assert how == "relay" or freight.twice(ana) <= 1, "what the relay had before its restart, nobody but it had"
    assert freight.rooms.counts()["files"] == 0, "all have it"


def test_a_file_may_break_off_again_and_again(freight: Freight) -> None:
    names, content = sent_file(freight, 12)
    for number in range(8):
        count = len(freight.came)
        freight.until(lambda count=count: len(freight.came) > count or not freight.rooms.counts()["files"])  # type: ignore[misc]
        if number % 3:
            freight.cut(names[number % 2])
        else:
            freight.kill()
    freight.settle(60)
    freight.has(content, *names[1:])


def test_what_is_sealed_while_the_connection_comes_goes_out(freight: Freight) -> None:
    """Seen to fail without giving in Files.goOn while it is being sealed: it stood at nothing until the next connection."""
    ana, bob = fresh("ana", "bob")
    freight.start(ana, bob)
    freight.create(ana)
    freight.join(ana, bob)
    freight.cut(ana)
    freight.sleep()
    content = freight.dice.randbytes(400_000)
    freight.do(ana, "files", files=[{"name": "a.bin", "type": "", "bytes": content}])
    freight.settle(4)
    assert [freight.file(name)["done"] for name in (ana, bob)] == [0, 0]
    freight.wake(ana)
    freight.settle(4)
    freight.has(content, ana, bob)


def offered(lab: Freight, segments: int) -> tuple[list[str], bytes]:
    """Ana has offered a file that is larger than the relay keeps; nobody takes it yet."""
    lab.node.call("Lab.resize", 1 << 20, 1 << 20)
    names, content = sent_file(lab, segments)
    lab.settle(4)
    assert [lab.file(name)["state"] for name in names] == ["moving", "offered", "offered"]
    assert lab.file(names[0])["why"] == "taker"
    return names, content


def fetch(lab: Freight, name: str) -> None:
    lab.do(name, "fetch", file=lab.file(name)["id"])


def test_a_file_of_any_size_passes_through_a_bounded_window(clients: Node, freight: Freight) -> None:
    (ana, bob, cleo), content = offered(freight, 44)
    fetch(freight, bob)
    freight.until(lambda: len(freight.came) > 10)
    assert freight.file(ana)["done"] > 0, "the sender sees how far it is"
    freight.settle(20)
    freight.has(content, bob)
    assert freight.file(ana)["state"] == "here"
    assert freight.held < 9 << 20, "of 11 MiB the relay never held more than two windows"
    assert (freight.twice(ana), freight.twice(bob)) == (0, 0)
    freight.away(cleo)
    freight.start(cleo)
    freight.settle(8)
    fetch(freight, cleo)
    freight.settle(30)
    freight.has(content, cleo)
    assert freight.twice(cleo) == 0


@pytest.mark.parametrize("how", ["sender's socket", "receiver's socket", "receiver's page", "relay"])
def test_a_streamed_file_goes_on_where_it_broke_off(freight: Freight, how: str) -> None:
    (ana, bob, _), content = offered(freight, 28)
    fetch(freight, bob)
    freight.until(lambda: len(freight.came) >= 15)
    gone = {
        "sender's socket": lambda: freight.cut(ana),
        "receiver's socket": lambda: freight.cut(bob),
        "receiver's page": lambda: freight.crash(bob),
        "relay": freight.kill,
    }[how]
    gone()
    freight.settle(50)
    freight.has(content, bob)
    assert freight.twice(bob) <= 1, freight.came
    assert freight.twice(ana) <= (16 if how == "relay" else 1), "what was under way only the relay had"


def test_a_streamed_file_waits_for_its_taker_however_long(clients: Node) -> None:
    """The relay forgets what it held of it after its time."""
    with freight_of(clients, ttl=20.0) as freight:
        (_, bob, _), content = offered(freight, 28)
        freight.until(lambda: not freight.rooms.counts()["files"])
        fetch(freight, bob)
        freight.settle(50)
        freight.has(content, bob)


@given(
    schedule=st.lists(
        st.tuples(st.integers(1, 60), st.sampled_from(["ana", "bob", "both", "page", "relay"])), min_size=1, max_size=8
    ),
    seed=st.integers(1, 2**31),
)
@example(schedule=[(1, "bob"), (1, "relay")], seed=1)
@example(schedule=[(60, "both")], seed=65)
@played(5)
def test_a_streamed_file_arrives_wherever_its_way_breaks(
    clients: Node, schedule: list[tuple[int, str]], seed: int
) -> None:
    """Seen to fail without: the wake of a sender that waits for an answer which the relay lost (Files.give)."""
    with freight_of(clients, seed) as freight:
        (ana, bob, _), content = offered(freight, 28)
        fetch(freight, bob)
        for moves, gone in schedule:
            freight.wander(moves)
            if gone == "relay":
                freight.kill()
            if gone == "page":
                freight.crash(bob)
            for name in (name for name, word in ((ana, "ana"), (bob, "bob")) if gone in (word, "both")):
                freight.cut(name)
        freight.settle(50)
        freight.has(content, bob)
        assert freight.file(ana)["state"] == "here"


def test_who_holds_a_streamed_file_says_so_again_where_its_sender_missed_it(freight: Freight) -> None:
    """Both were cut off at the end, and nobody else wants what the sender gives once more."""
    (ana, bob, _), content = offered(freight, 28)
    fetch(freight, bob)
    freight.until(lambda: (ana, 27) in freight.puts)
    freight.cut(ana)
    freight.unheard = ana
    freight.until(lambda: bool(freight.file(bob)["state"] == "here"))
    freight.until(lambda: all(freight.wires[wire].client != bob for wire, _ in freight.upward))
    for _ in range(2):
        freight.away(bob)
        freight.start(bob)
        freight.until(lambda: freight.room(bob)["connection"]["state"] == "connected")
    freight.away(bob)
    freight.unheard = ""
    freight.cut(ana)
    freight.settle(10)
    assert freight.file(ana)["state"] == "moving"
    freight.start(bob)
    freight.settle(10)
    assert freight.file(ana)["state"] == "here"
    freight.has(content, bob)


def test_a_source_chosen_again_must_be_the_same(freight: Freight) -> None:
    (ana, bob, _), content = offered(freight, 28)
    fetch(freight, bob)
    freight.until(lambda: len(freight.came) >= 15)
    freight.crash(ana)
    freight.settle(10)
    file = freight.file(ana)
    assert (file["state"], file["why"]) == ("failed", "source")
    with pytest.raises(Refused, match="size"):
        freight.do(ana, "attach", file=file["id"], source=content + b"x")
    before = len(freight.puts)
    changed = content[:3_000_000] + b"x" + content[3_000_001:]
    freight.do(ana, "attach", file=file["id"], source=changed)
    freight.settle(10)
    assert (freight.file(ana)["state"], freight.file(ana)["why"]) == ("failed", "changed")
    assert [n for _, n in freight.puts[before:] if n >= 3_000_000 // SEGMENT_BYTES] == []
    freight.do(ana, "attach", file=file["id"], source=content)
    freight.settle(30)
    freight.has(content, bob)
    assert freight.twice(bob) <= 1


def test_who_pauses_takes_no_more_while_others_do(freight: Freight) -> None:
    (_, bob, cleo), content = sent_file(freight, 15)
    freight.until(lambda: bob in [name for name, _ in freight.came])
    freight.do(bob, "pause", file=freight.file(bob)["id"])
    freight.settle(15)
    freight.has(content, cleo)
    file = freight.file(bob)
    assert (file["state"], 0 < file["done"] < len(content)) == ("paused", True)
    fetch(freight, bob)
    freight.settle(15)
    freight.has(content, bob)


def test_a_transfer_rests_at_either_end_and_goes_on(freight: Freight) -> None:
    (ana, bob, cleo), content = sent_file(freight, 14)
    freight.until(lambda: len(freight.puts) >= 3)
    freight.do(ana, "pause", file=freight.file(ana)["id"])
    freight.until(lambda: bob in [name for name, _ in freight.came])
    freight.do(bob, "pause", file=freight.file(bob)["id"])
    assert [freight.file(name)["state"] for name in (ana, bob)] == ["paused", "paused"]
    freight.settle(15)
    rest = freight.file(ana)["done"], freight.file(bob)["done"]
    freight.settle(15)
    assert (freight.file(ana)["done"], freight.file(bob)["done"]) == rest
    assert 0 < rest[1] <= rest[0] < len(content)
    freight.crash(bob)
    assert freight.file(bob)["state"] == "paused"
    for name in (ana, bob):
        fetch(freight, name)
    freight.settle(40)
    freight.has(content, bob, cleo)
    assert freight.twice(bob) <= 1


@pytest.mark.parametrize("how", ["flipped", "dropped", "swapped", "doubled", "truncated"])
def test_a_file_whose_chunks_were_tampered_with_is_not_shown_and_recovers(freight: Freight, how: str) -> None:
    tampered = list[int]()

    def lie(name: str, frames: list[bytes]) -> list[bytes]:
        seen = [zsr.decode_frame(frame) for frame in frames]
        at = [n for n, frame in enumerate(seen) if isinstance(frame, zsr.DownChunk) and frame.index == 3]
        if name != bob or not at or len(tampered) > 1:
            return frames
        tampered.append(at[0])
        chunk = seen[at[0]]
        assert isinstance(chunk, zsr.DownChunk)
        changed = {
            "flipped": [replace(chunk, ct=chunk.ct[:-1] + bytes([chunk.ct[-1] ^ 1]))],
            "dropped": [],
            "swapped": [replace(chunk, index=4), replace(chunk, index=3, ct=bytes(len(chunk.ct)))],
            "doubled": [replace(chunk, index=2), replace(chunk, index=3, ct=chunk.ct + chunk.ct)],
            "truncated": [replace(chunk, ct=chunk.ct[:-1])],
        }[how]
        return [*frames[: at[0]], *map(zsr.encode_frame, changed), *frames[at[0] + 1 :]]

    (_, bob, _), content = sent_file(freight, 9)
    freight.tamper = lie
    freight.until(lambda: len(tampered) == 1)
    assert freight.file(bob)["state"] == "moving"
    assert how == "dropped" or freight.file(bob)["why"] == "broken"
    freight.settle(60)
    assert len(tampered) == 2
    freight.has(content, bob)


def test_several_files_to_several_people_all_arrive(freight: Freight) -> None:
    (ana, bob, cleo), _ = sent_file(freight, 3)
    contents = [freight.dice.randbytes(400_000 + n) for n in range(6)]
    freight.do(ana, "files", files=[{"name": f"{n}.bin", "type": "", "bytes": c} for n, c in enumerate(contents)])
    freight.do(bob, "files", files=[{"name": "empty.bin", "type": "", "bytes": b""}])
    freight.settle(40)
    for name in (bob, cleo):
        files = {m["file"]["name"]: m["file"] for m in freight.room(name)["messages"] if m["file"]}
        assert {file["state"] for file in files.values()} == {"here"}
        for n, content in enumerate(contents):
            assert freight.node.call("Lab.blob", name, files[f"{n}.bin"]["id"]) == content


def test_the_window_of_a_file_grows_on_a_long_line_and_stays_short_on_a_slow_one(clients: Node) -> None:
    window, wait = clients.call("Lab.queue", 2, 10.5)
    assert 2 <= window <= 4
    assert wait <= 40, "ms that what people say stands in the queue"
    window, _ = clients.call("Lab.queue", 20, 210)
    assert window == 2
    for late in (0, 80):  # a busy machine
        window, _ = clients.call("Lab.queue", 150, 10.5, late)
        assert window >= 15, "15.3 keep the line busy"


# ---------------------------------------------------------------------------------------------------------------------
# Luggage: what is done to files before they leave: photos lose their place, folders become archives. Pillow writes and
# reads the photos, zipfile the archives.
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def luggage() -> Iterator[Node]:
    helper = """const Pack = (() => ({pack: async (files) => {
      const packed = await Zip.pack(files.map(({path, bytes, time}) => ({path, blob: new Blob([bytes]), time})));
      return new Uint8Array(await packed.arrayBuffer());
    }}))();"""
    started = Node(
        [*page_blocks(("room-84-strip", "room-84-zip")), ("pack", helper)], "Object.assign(globals, {Blob});"
    )
    yield started
    started.close()


PLACE = {1: "N", 2: (52.0, 31.0, 12.0), 3: "E", 4: (13.0, 24.0, 36.0)}


def photo_with_place(kind: str, orientation: int = 6, **more: bytes) -> bytes:
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = orientation, "Camera"
    exif.get_ifd(0x8825).update(PLACE)
    out = io.BytesIO()
    picture = Image.new("RGB", (64, 48), "teal")
    jpeg = {"progressive": True, "comment": b"at home"} if kind == "JPEG" else {}
    picture.save(out, kind, exif=exif.tobytes(), **jpeg, **more)
    return out.getvalue()


@pytest.mark.parametrize("orientation", [1, 6, 8])
def test_a_jpeg_keeps_its_picture_and_which_way_is_up_alone(luggage: Node, orientation: int) -> None:
    photo = photo_with_place("JPEG", orientation)
    after = photo_with_place("JPEG")  # what cameras append: another picture with a place of its own
    parts = luggage.call("Strip.jpeg", photo + after)
    stripped = b"".join(parts)
    for known in (b"Camera", b"at home"):
        assert known in photo
        assert known not in stripped
    with Image.open(io.BytesIO(stripped)) as one, Image.open(io.BytesIO(photo)) as other:
        assert one.tobytes() == other.tobytes()
        assert dict(one.getexif()) == ({} if orientation == 1 else {0x0112: orientation})
    assert len(stripped) < len(photo)


@pytest.mark.parametrize("how", [{}, {"progressive": True}, {"comment": b"\xff\xc0 no frame", "quality": 5}])
@pytest.mark.parametrize("size", [(1, 1), (320, 241), (17, 2000)])
def test_a_jpeg_tells_how_large_it_is(luggage: Node, size: tuple[int, int], how: dict[str, Any]) -> None:
    out = io.BytesIO()
    Image.new("RGB", size, "teal").save(out, "JPEG", **how)
    assert luggage.call("Strip.extent", out.getvalue()) == list(size)
    assert luggage.call("Strip.extent", out.getvalue()[:20]) is None


XMP = (
    b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF><exif:GPSLatitude>52,31.2N</exif:GPSLatitude></rdf:RDF></x:xmpmeta>'
)


@pytest.mark.parametrize("kind", ["WEBP", "AVIF"])
def test_a_boxed_photo_loses_the_place_and_no_byte_moves(luggage: Node, kind: str) -> None:
    photo = photo_with_place(kind, xmp=XMP)
    assert XMP in photo
    (stripped,) = luggage.call("Strip.boxed", photo)
    assert len(stripped) == len(photo)
    assert b"GPS" not in stripped
    with Image.open(io.BytesIO(stripped)) as one, Image.open(io.BytesIO(photo)) as other:
        assert dict(other.getexif().get_ifd(0x8825)) != {}
        assert dict(one.getexif().get_ifd(0x8825)) == {}
        assert one.getexif()[0x010F] == "Camera"
        assert one.tobytes() == other.tobytes()


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=300), st.integers(0, 200))
def test_what_is_no_photo_is_left_alone_whatever_it_is(luggage: Node, noise: bytes, at: int) -> None:
    photo = photo_with_place("JPEG")
    luggage.call("Strip.jpeg", photo[:at] + noise + photo[at + len(noise) :])
    luggage.call("Strip.boxed", noise + b"II*\0\x08\0\0\0" + noise)
    for kind in ("WEBP", "AVIF"):
        boxed = photo_with_place(kind, xmp=XMP)
        luggage.call("Strip.boxed", boxed[:at] + noise + boxed[at + len(noise) :])
    assert luggage.call("Strip.jpeg", b"PNG" + noise) is None


def test_an_archive_holds_every_file_with_its_path_once(luggage: Node) -> None:
    files = {
        "Trip/a.txt": b"one", "Trip/deep/\u00fcml\u00e4ut \u6f22.bin": bytes(range(256)) * 40, "Trip/empty": b"",
        "../../etc/passwd": b"no way out", "\\\\host\\c.txt": b"nor there",
    }  # fmt: skip
    listed = [{"path": path, "bytes": data, "time": 1_700_000_000_000} for path, data in files.items()]
    packed = luggage.call("Pack.pack", [*listed, listed[0]])
    with zipfile.ZipFile(io.BytesIO(packed)) as archive:
        assert archive.testzip() is None
        assert {each.filename: archive.read(each) for each in archive.infolist()} == {
            "Trip/a.txt": b"one", "Trip/a (2).txt": b"one", "Trip/deep/\u00fcml\u00e4ut \u6f22.bin": bytes(range(256)) * 40,
            "Trip/empty": b"", "etc/passwd": b"no way out", "host/c.txt": b"nor there",
        }  # fmt: skip
        assert {each.compress_type for each in archive.infolist()} == {zipfile.ZIP_STORED}


# ---------------------------------------------------------------------------------------------------------------------
# Attacks: the malicious relay and the malicious insider against whole clients, numbered as in README. The relay's half
# stands with the relay; here the wires lie and the members lie, and the clients have to notice. An insider is a client
# of the laboratory whose disk the attacker has read: all keys of a true member, used by the oracle.
#
# Each docstring names the check that defends, and the line without which the test was seen to fail.
# ---------------------------------------------------------------------------------------------------------------------

THIEF = r"""
'use strict';
const Thief = (() => {
  const steal = async (name, id) => {
    let key = Suite.storeKey();
    const store = await Store.open(name, {
      seal: (n, v, b) => Suite.sealRecord(key, n, v, b), open: (n, v, b) => Suite.openRecord(key, n, v, b)});
    key = await Suite.unwrapStoreKey(await store.keepKey(await Suite.wrapStoreKey(key, null)), null);
    const {me, s} = await Keeper.load(store, id), {ch, epoch, wire} = s.head, {init, send} = s.keys.get(ch);
    store.close();
    const leaf_no = Math.max(...me.leaves.keys()), kem = await Suite.exportKey(me.leaves.get(leaf_no).pair);
    return {sig: await Suite.exportKey(me.sig), root: me.root && await Suite.exportKey(me.root), kem, leaf_no, ch: Bytes.unhex(ch), epoch, unit: wire, init, send,
      next: s.nextI, last: Bytes.unhex(s.lastHash), lamport: s.lamport,
      leaves: [...s.leaves].map(([dev, l]) => [Bytes.unhex(dev), l.no, l.kempub])};
  };
  return {steal};
})();
"""

ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
FAR = 2**53 - 1
"""The largest number that the protocol writes."""


@dataclass(frozen=True)
class Insider:
    """What lies on a member's disk: its keys, the epoch's, and where its chain of events stands."""

    keys: Keys
    epoch: Epoch
    number: int
    next: int
    last: bytes
    lamport: int
    seen: int
    unit: zsr.Unit
    leaves: dict[bytes, tuple[int, bytes]]
    root: PrivateKey | None = None

    @property
    def head(self) -> Made:
        """The head as who made it would hold it, to build upon."""
        return Made(self.unit, b"", zsr.decode(zsr.Commit, self.unit.body), self.epoch.ch, self.epoch)

    @property
    def under(self) -> zsr.Signed:
        return zsr.decode(zsr.Signed, self.unit.charter)

    @property
    def signed_roster(self) -> zsr.Signed:
        return zsr.decode(zsr.Signed, self.unit.roster)

    @property
    def listed(self) -> zsr.Roster:
        return zsr.decode(zsr.Roster, self.signed_roster.m)

    @property
    def entries(self) -> list[Entry]:
        return [(one.member, device) for one in self.listed.members for device in one.devices]

    def roster(
        self,
        add: Iterable[Entry] = (),
        drop: Iterable[Keys] = (),
        removed: Iterable[zsr.Gone] | None = None,
        consumed: Iterable[zsr.Consumed] | None = None,
        by: Keys | None = None,
        no: int | None = None,
        under: zsr.Signed | None = None,
    ) -> zsr.Signed:
        """The next roster as `by` would sign it: devices added and dropped, `gone` and `consumed` as they were."""
        was, out = self.listed, {keys.sigpub for keys in drop}
        entries = [*(each for each in self.entries if each[1].sigpub not in out), *add]
        lost = list(was.gone if removed is None else removed)
        spent = list(was.consumed if consumed is None else consumed)
        number = was.no + 1 if no is None else no
        return roster(self.keys.room, under or self.under, by or self.keys, number, entries, lost, spent)

    def text(self, words: str, i: int = 0, lamport: int = 0, **how: Any) -> Item:
        """The next event of this member, unless `i` and what follows say otherwise."""
        by = how.pop("by", self.keys)
        chain = {"prev": self.last} | how
        return event(
            by, i or self.next, self.epoch.ch, 1, text_body(words), lamport=lamport or self.lamport + 1, **chain
        )

    def envelope(self, item: bytes, no: int, poster: bytes = b"", **how: Any) -> zsr.DownEvent:
        """A group envelope as the relay would hand it on."""
        poster = poster or self.keys.dev
        ct = group_seal(self.epoch, 1, self.keys.room, self.number, poster, item)
        return replace(zsr.DownEvent(no, 1, poster, self.number, self.epoch.ch, ct), **how)

    def direct(self, to: bytes, *items: Item, tid: int = 2**40) -> zsr.DownDirect:
        no, kempub = self.leaves[to]
        content = u(2, len(items)) + b"".join(item.data for item in items) + 3 * u(2, 0)
        info = E("direct", self.keys.room + self.epoch.ch + to + u(8, no))
        ct = hpke_seal(kempub, info, pad(content))
        return zsr.DownDirect(tid, 1, self.keys.dev, self.epoch.ch, no, ct)

    def vector(self, tops: list[Top], wanted: list[Want] | None = None, later: int = 1) -> zsr.DownLive:
        shape = Seen(
            self.keys.room, self.epoch.ch, self.keys.dev, self.seen + later, 1, tuple(tops), tuple(wanted or ())
        )
        plain = zsr.encode(signed(self.keys.sig, "seen", shape))
        ct = group_seal(self.epoch, 2, self.keys.room, self.number, self.keys.dev, plain)
        return zsr.DownLive(2, self.keys.dev, self.number, self.epoch.ch, ct)


class Stage(Laboratory):
    """The laboratory with a liar in it: what goes down to each client can be read, changed, kept back and invented."""

    def __init__(self, node: Node, seed: int = 1, **limits: Any) -> None:
        super().__init__(node, seed, **limits)
        self.tamper = self._through
        self.down: dict[str, list[Any]] = {}
        self.up: dict[str, list[Any]] = {}
        self.lie: Callable[[str, list[Any]], list[Any]] | None = None

    def _through(self, name: str, frames: list[bytes]) -> list[bytes]:
        told = [zsr.decode_frame(frame) for frame in frames]
        self.down.setdefault(name, []).extend(told)
        return [zsr.encode_frame(frame) for frame in (self.lie(name, told) if self.lie else told)]

    def move(self, kind: str, wire_id: int) -> None:
        if kind == "up" and wire_id in self.wires:
            message = next(m for i, m in self.upward if i == wire_id)
            self.up.setdefault(self.wires[wire_id].client, []).extend(map(zsr.decode_frame, zsr.split_frames(message)))
        super().move(kind, wire_id)

    def feed(self, name: str, *frames: Any) -> None:
        """Frames that no honest relay sent, on the client's newest socket."""
        data = zsr.join_frames(frame if isinstance(frame, bytes) else zsr.encode_frame(frame) for frame in frames)
        wire = max(wire.id for wire in self.wires.values() if wire.client == name)
        self._heed(name, self.node.call("Lab.message", name, wire, data))

    def number(self, name: str) -> int:
        """The log number that this client waits for."""
        return 1 + max(e.no for e in self.heard(name, zsr.DownEvent) + self.heard(name, zsr.DownCommit))

    def heard(self, name: str, kind: type[T]) -> list[T]:
        """What was sent down to a client so far, of one kind."""
        return [frame for frame in self.down.get(name, []) if isinstance(frame, kind)]

    def said(self, name: str, kind: type[T]) -> list[T]:
        """What is on its way up from a client, of one kind."""
        ids = {wire.id for wire in self.wires.values() if wire.client == name}
        frames = [f for i, m in self.upward if i in ids for f in map(zsr.decode_frame, zsr.split_frames(m))]
        return [frame for frame in frames if isinstance(frame, kind)]

    def steal(self, name: str, room: str) -> Insider:
        self.drain()
        loot = self.node.call("Thief.steal", name, room)
        keys = Keys(bytes.fromhex(room), private(loot["sig"]), private(loot["kem"]), loot["leaf_no"])
        epoch = Epoch(loot["ch"], b"", loot["init"], b"", loot["send"])
        leaves = {dev: (no, kempub) for dev, no, kempub in loot["leaves"]}
        unit = zsr.decode(zsr.Unit, loot["unit"])
        return Insider(
            keys,
            epoch,
            loot["epoch"],
            loot["next"],
            loot["last"],
            loot["lamport"],
            self.told(keys, epoch),
            unit,
            leaves,
            loot["root"] and private(loot["root"]),
        )

    def decree(self, name: str, room: str, **what: Any) -> None:
        """What an admin wants done is done, by its own client: see Lab.decree."""
        self._heed(name, self.node.call("Lab.decree", name, room, what))
        self.settle(4)

    def show(self, name: str, *made: Made) -> None:
        """Units that no honest relay has, as its head and as the next commits of its log."""
        for n, one in enumerate(made):
            self.feed(name, zsr.DownUnit(one.full), zsr.DownCommit(10**6 + n, 2, one.full))

    def say(self, name: str, *frames: Any) -> None:
        """Frames that a client never said, on its own socket: what its thief would say there."""
        wire = max(wire.id for wire in self.wires.values() if wire.client == name)
        self.upward.append((wire, zsr.join_frames(map(zsr.encode_frame, frames))))

    def restore(self, by: Keys, head: Made) -> None:
        """The relay has just lost all, and is shown this by one who is no client of the laboratory."""
        wire = self.wires[-1] = Wire("nobody", -1)

        def talk(*frames: Any) -> Any:
            self._effects(self.rooms.handle(wire, zsr.join_frames(map(zsr.encode_frame, frames)), self.clock))
            return zsr.decode_frame(wire.inbox.pop(0)) if wire.inbox else None

        self.rooms.enter(wire, zsr.b64u(by.room), self.clock)
        greeting = talk(zsr.UpNonce(bytes(32)))
        talk(login(by, greeting.m, "relay.test"), hello(head))
        assert self.rooms._rooms[by.room].head is not None
        del self.wires[-1]

    def again(self, *names: str) -> None:
        """These connect anew, and learn what the true relay has."""
        for name in names:
            self.cut(name)
        self.settle(6)

    def told(self, keys: Keys, epoch: Epoch) -> int:
        """The number of the last vector that this member told anybody in this epoch."""
        lives = [f for name in self.names for f in self.heard(name, zsr.DownLive) if (f.type, f.ch) == (2, epoch.ch)]
        plain = [group_open(epoch, 2, keys.room, f.epoch, f.poster, f.ct) for f in lives if f.poster == keys.dev]
        return max([zsr.decode(Seen, zsr.decode(zsr.Signed, one).m).no for one in plain], default=0)

    def notes(self, name: str) -> list[tuple[str, str]]:
        """Warnings and alarms, and whom they name."""
        return [(n["text"], n["params"].get("name", "")) for n in self.room(name)["notes"]]

    def false(self, name: str) -> list[tuple[str, str]]:
        """Warnings that an attack must not cause: that somebody made an impossible roster is the truth."""
        return [note for note in self.notes(name) if note[0] != "roster"]

    def believes(self, name: str, room: str) -> Any:
        """All that an attack must leave as it was: the state, the events on the disk, what is unread."""
        model = self.model(name)
        unread = [(item["id"], item["unread"]) for item in model["rooms"]]
        return self.state(name, room), self.stored(name, room), unread, model["room"] and self.false(name)

    def dev(self, name: str, room: str) -> bytes:
        return bytes.fromhex(self.state(name, room)["dev"])

    def meet(self, *names: str) -> tuple[str, list[str]]:
        """A room of these, made by the first one; all is quiet."""
        people = [f"{name}{next(SERIAL)}" for name in names]
        self.start(*people)
        room = self.create(people[0])
        self.join(people[0], *people[1:])
        return room, people

    def talk(self, room: str, people: list[str], before: list[str]) -> None:
        """Normal talk goes on: all say something, and all have all of it, once, in one order, without an alarm."""
        for name in people:
            self.do(name, "send", text=f"still here, {name}")
        self.settle(12)
        agree(self, room, people, [*before, *[f"still here, {name}" for name in people]])
        assert all(self.false(name) == [] for name in people)


def dropping(victim: str, *kinds: type[Any]) -> Callable[[str, list[Any]], list[Any]]:
    """A relay that keeps frames of these kinds from one client."""
    return lambda name, frames: [f for f in frames if name != victim or not isinstance(f, kinds)]


def catching(victim: str, kind: type[T], into: list[T]) -> Callable[[str, list[Any]], list[Any]]:
    """A relay that takes frames of one kind from the wire to a client, to use them later."""

    def take(name: str, frames: list[Any]) -> list[Any]:
        into.extend(f for f in frames if name == victim and isinstance(f, kind))
        return [f for f in frames if name != victim or not isinstance(f, kind)]

    return take


def private(pkcs8: bytes) -> PrivateKey:
    key = serialization.load_der_private_key(pkcs8, None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    return key


def malleated(item: Item) -> Item:
    """The same event with the other signature that verifies."""
    return replace(item, sig=item.sig[:32] + u(32, ORDER - int.from_bytes(item.sig[32:], "big")))


@pytest.fixture(scope="session")
def looted() -> Iterator[Node]:
    names = tuple(name for name in blocks(PAGE.read_text("utf-8")) if re.match(CLIENT_BLOCKS, name))
    started = Node([*page_blocks(names), ("lab", LAB), ("thief", THIEF)], LAB_GLOBALS)
    yield started
    started.close()


@pytest.fixture
def stage(looted: Node) -> Stage:
    return Stage(looted)


@contextlib.contextmanager
def unmoved(stage: Stage, room: str, *names: str) -> Iterator[None]:
    """What happens inside leaves these clients exactly as they were."""
    before = [stage.believes(name, room) for name in names]
    yield
    assert [stage.believes(name, room) for name in names] == before


# -------------------------------------------------------------------------------------- replayed, dropped, held back --
def test_attack_12_a_replayed_event_is_dropped_also_after_a_reload(stage: Stage) -> None:
    """Room.take knows an event by (dev, i) and its hash, from the disk and not from memory.

    Seen to fail without: `return complete(s, e, held);` in Room.take, and without the store in Desk.kept.
    """
    room, (ana, bob) = stage.meet("ana", "bob")
    stage.do(bob, "go", to={"at": "start"})
    stage.do(ana, "send", text="once")
    stage.settle(6)
    (entry,) = [e for e in stage.heard(bob, zsr.DownEvent) if e.poster == stage.dev(ana, room)][-1:]
    insider = stage.steal(ana, room)
    for again in range(2):
        with unmoved(stage, room, bob):
            stage.feed(bob, *[replace(entry, no=entry.no + n + 10 * again) for n in range(4)])
            item = read_item(group_open(insider.epoch, 1, insider.keys.room, entry.epoch, entry.poster, entry.ct))
            stage.feed(bob, insider.direct(stage.dev(bob, room), item, item))
        stage.crash(bob)
        stage.drain()
    stage.do(bob, "go", to={"at": "room", "id": room})
    assert stage.texts(bob) == ["once"]
    stage.talk(room, [ana, bob], ["once"])


def test_attack_13_what_is_reordered_is_shown_in_the_same_order_to_all(stage: Stage) -> None:
    """Timeline.order: (lamport, dev, i), whatever the relay's numbers say.

    Seen to fail without: `order(w.entries[mid], e) < 0` in Timeline.place.
    """
    room, (ana, bob) = stage.meet("ana", "bob")
    held: list[zsr.DownEvent] = []
    stage.lie = catching(bob, zsr.DownEvent, held)
    said = [f"m{n}" for n in range(6)]
    for text in said:
        stage.do(ana, "send", text=text)
    stage.drain()
    stage.lie = None
    numbers = [entry.no for entry in held]
    stage.dice.shuffle(held)
    for no, entry in zip(numbers, held, strict=True):
        stage.feed(bob, replace(entry, no=no))
    assert stage.texts(bob) == stage.texts(ana) == said
    stage.talk(room, [ana, bob], said)


def test_attack_14_a_dropped_event_is_seen_as_missing_and_heals(stage: Stage) -> None:
    """Room.gaps shows the hole that the chain proves, Room.lacks has it handed over, nobody is accused.

    Seen to fail without: `of Room.gaps(s)` in Timeline.rows, and without handRanges in Delivery.hand.
    """
    room, (ana, bob) = stage.meet("ana", "bob")
    stage.do(ana, "send", text="dropped")
    stage.lie = dropping(bob, zsr.DownEvent)
    stage.drain()
    stage.lie = None
    stage.do(ana, "send", text="after it")
    stage.drain()
    assert [m["kind"] for m in stage.room(bob)["messages"]][-2:] == ["missing", "text"]
    assert stage.texts(bob) == ["after it"]
    assert stage.notes(bob) == []
    stage.settle(12)
    assert "missing" not in [m["kind"] for m in stage.room(bob)["messages"]]
    stage.talk(room, [ana, bob], ["dropped", "after it"])


def test_a_gap_that_nobody_here_can_fill_is_spoken_of_ever_more_rarely(stage: Stage) -> None:
    """Seen to fail without `2 ** Math.min(this.idle, IDLE)` in Delivery.attend."""
    room, (ana, bob, cleo) = stage.meet("ana", "bob", "cleo")
    stage.do(ana, "send", text="dropped")
    both = [dropping(name, zsr.DownEvent) for name in (bob, cleo)]
    stage.lie = lambda name, frames: both[1](name, both[0](name, frames))
    stage.drain()
    stage.lie = None
    stage.do(ana, "send", text="after it")
    stage.drain()
    stage.away(ana)

    def vectors(seconds: int) -> int:
        before = len(stage.up[bob])
        stage.settle(seconds)
        return sum(isinstance(frame, zsr.UpLive) and frame.type == 2 for frame in stage.up[bob][before:])

    minutes = [vectors(60) for _ in range(12)]
    assert minutes[0] >= 4
    assert sum(minutes[6:]) <= minutes[0]
    stage.start(ana)
    stage.settle(12)
    stage.talk(room, [ana, bob, cleo], ["dropped", "after it"])


def test_attack_15_a_cut_tail_is_called_held_back_after_30_s_and_heals(stage: Stage) -> None:
    """Room.behind compares the peers' vectors with what is here; Delivery.tick says so after half a minute.

    Seen to fail without: the note in Delivery.tick, its 30 s, the filter in attend, and AGAIN_MS in seen.
    """
    room, (ana, bob) = stage.meet("ana", "bob")
    stage.do(ana, "send", text="the tail")
    stage.lie = dropping(bob, zsr.DownEvent, zsr.DownDirect)
    stage.settle(25)
    assert stage.notes(bob) == [], "no alarm before its time"
    stage.settle(15)
    assert stage.notes(bob) == [("heldBack", ana)]
    assert stage.notes(ana) == []
    assert stage.texts(bob) == []
    stage.lie = None
    stage.settle(20)
    assert stage.texts(bob) == ["the tail"]
    stage.talk(room, [ana, bob], ["the tail"])


def test_attack_15_a_liar_cannot_say_that_anothers_messages_are_held_back(stage: Stage) -> None:
    """An author's own vector overrides others' claims about its top (section 7).

    Seen to fail without: `dev === s.dev`, or `s.peers.get(dev)?.fresh`, in Room.behind; or the filter in Room.heard.
    """
    room, (ana, bob, mal) = stage.meet("ana", "bob", "mal")
    insider = stage.steal(mal, room)
    tops = [Top(dev, 10**6, b"h" * 32) for dev in (stage.dev(ana, room), stage.dev(bob, room), b"nobody at all 16")]
    for n in range(1, 20):
        stage.feed(ana, insider.vector(tops, later=n))
        stage.settle(2)
        assert stage.notes(ana) == []
    stage.talk(room, [ana, bob, mal], [])


# ---------------------------------------------------------------------------------------- insiders and their events --
def test_attack_29_two_events_at_one_place_are_an_alarm_for_both(stage: Stage) -> None:
    """Room.take alarms at another hash under a true signature; Delivery.compare brings the two events together.

    Seen to fail without: `if (held && held.hash !== e.hash)` in Room.take, and without `this.compare` in Delivery.seen.
    """
    room, (ana, bob, mal) = stage.meet("ana", "bob", "mal")
    insider = stage.steal(mal, room)
    for name, text in ((ana, "yes"), (bob, "no")):
        stage.feed(name, insider.envelope(insider.text(text).data, stage.number(name)))
    assert (stage.texts(ana), stage.texts(bob)) == (["yes"], ["no"])
    assert stage.notes(ana) == stage.notes(bob) == []
    stage.settle(12)
    assert stage.notes(ana) == stage.notes(bob) == [("equivocation", mal)]
    assert (stage.texts(ana), stage.texts(bob)) == (["yes"], ["no"]), "nothing is replaced"
    for name in (ana, bob):
        alarms = stage.state(name, room)["alarms"]
        assert [(a["kind"], a["dev"], a["i"]) for a in alarms] == [
            ("equivocation", insider.keys.dev.hex(), insider.next)
        ]
        stage.do(name, "send", text=f"go on, {name}")
    stage.settle(12)
    assert all(set(stage.texts(name)[-2:]) == {f"go on, {ana}", f"go on, {bob}"} for name in (ana, bob))


def test_attack_20_what_an_insider_seals_as_another_is_dropped_and_the_true_one_opens(stage: Stage) -> None:
    """Notary.readItem verifies under the key that the roster lists for the author.

    Seen to fail without: `await verify(unhex(pub), label, header, sig);` in readItem.
    """
    room, (ana, bob, mal) = stage.meet("ana", "bob", "mal")
    insider, victim = stage.steal(mal, room), stage.steal(bob, room)
    made = victim.text("I am Bob")
    forged = replace(made, sig=sign(insider.keys.sig, "event", made.header))
    with unmoved(stage, room, ana):
        stage.feed(ana, insider.envelope(forged.data, stage.number(ana), poster=victim.keys.dev))
        stage.feed(ana, insider.direct(stage.dev(ana, room), forged))
    stage.do(bob, "send", text="true")
    stage.settle(8)
    stage.talk(room, [ana, bob, mal], ["true"])


def test_attack_19_a_rewritten_author_fails(stage: Stage) -> None:
    """The poster is in key and AAD, the author under the signature, and both are one: Delivery.envelope.

    Seen to fail without: `if (e.dev !== poster)` in Delivery.envelope.
    """
    room, (ana, bob, mal) = stage.meet("ana", "bob", "mal")
    insider, held = stage.steal(mal, room), list[zsr.DownEvent]()
    stage.lie = catching(ana, zsr.DownEvent, held)
    stage.do(bob, "send", text="by Bob")
    stage.drain()
    stage.lie = None
    (entry,) = held
    item = read_item(group_open(insider.epoch, 1, insider.keys.room, entry.epoch, entry.poster, entry.ct))
    renamed = replace(item, header=item.header[:32] + insider.keys.dev + item.header[48:])
    with unmoved(stage, room, ana):
        stage.feed(ana, replace(entry, poster=insider.keys.dev), insider.envelope(item.data, entry.no + 1))
        stage.feed(ana, insider.envelope(renamed.data, entry.no + 2), insider.direct(stage.dev(ana, room), renamed))
    stage.settle(8)
    assert [(m["author"], m["text"]) for m in stage.room(ana)["messages"] if m["kind"] == "text"] == [(bob, "by Bob")]
    stage.talk(room, [ana, bob, mal], ["by Bob"])


def test_attack_17_an_event_of_one_room_fails_at_the_members_of_another(stage: Stage) -> None:
    """Keys, device ids and the header's room: Notary.readItem refuses an event of another room even from its author.

    Seen to fail without: `must(equal(h.room, room), 'event of another room');` in readItem.
    """
    one, (ana, bob) = stage.meet("ana", "bob")
    stage.do(bob, "send", text="in room one")
    stage.drain()
    (entry,) = stage.heard(ana, zsr.DownEvent)[-1:]
    there = stage.steal(bob, one)
    stage.do(ana, "go", to={"at": "start"})
    two = stage.create(ana, "Two")
    stage.join(ana, bob)
    insider = stage.steal(bob, two)
    said = read_item(group_open(there.epoch, 1, there.keys.room, entry.epoch, entry.poster, entry.ct))
    made = insider.text("moved")
    moved = replace(made, header=bytes.fromhex(one) + made.header[32:])
    moved = replace(moved, sig=sign(insider.keys.sig, "event", moved.header))
    with unmoved(stage, two, ana):
        stage.feed(ana, entry, replace(entry, no=10**6), replace(entry, no=10**6 + 1, ch=insider.epoch.ch))
        stage.feed(ana, insider.direct(stage.dev(ana, two), said, moved), insider.envelope(moved.data, 10**6 + 2))
    stage.talk(two, [ana, bob], [])


def test_attack_18_an_envelope_of_an_epoch_fails_in_the_next(stage: Stage) -> None:
    """Room.enter forgets the send key of the epoch before; epoch and ch are in the AAD of what comes after.

    Seen to fail without: `send: null` in Room.enter.
    """
    room, (ana, bob) = stage.meet("ana", "bob")
    cleo, held = f"cleo{next(SERIAL)}", list[zsr.DownEvent]()
    stage.lie = catching(ana, zsr.DownEvent, held)
    stage.do(bob, "send", text="before Cleo")
    stage.drain()
    stage.lie = dropping(ana, zsr.DownEvent)
    stage.start(cleo)
    stage.do(cleo, "link", text=stage.invite(ana))
    stage.do(cleo, "join", name=cleo)
    stage.settle(2)
    entry, head = held[0], stage.state(ana, room)
    assert head["epoch"] > entry.epoch
    with unmoved(stage, room, ana):
        later = stage.number(ana) + 100
        stage.feed(ana, replace(entry, no=later), replace(entry, no=later + 1, epoch=head["epoch"]))
        stage.feed(ana, replace(entry, no=later + 2, epoch=head["epoch"], ch=bytes.fromhex(head["head"])))
    assert stage.texts(ana) == []
    stage.lie = None
    stage.settle(12)
    assert stage.texts(ana) == ["before Cleo"], "and from its author's hand it comes all the same"
    for name in (ana, bob, cleo):
        stage.do(name, "send", text="all here")
    stage.settle(12)
    assert [stage.texts(name) for name in (ana, bob)] == [["before Cleo", *["all here"] * 3]] * 2
    assert stage.texts(cleo) == ["all here"] * 3


def test_attack_23_a_signature_under_another_label_or_over_another_body_fails(stage: Stage) -> None:
    """Sign binds its label, the header binds the body's hash: Notary.readItem.

    Seen to fail without: `label` in readItem's verify (any label accepted), and without `'body of another event'`.
    """
    room, (ana, mal) = stage.meet("ana", "mal")
    insider, to = stage.steal(mal, room), stage.dev(ana, room)
    made, other = insider.text("signed as an event"), insider.text("another body")
    labels = [label for label in stage.node.call("Suite.LABELS")["sign"] if label != "event"]
    forged = [replace(made, sig=sign(insider.keys.sig, label, made.header)) for label in labels]
    forged += [replace(made, body=other.body), replace(made, salt=other.salt), replace(made, sig=other.sig)]
    with unmoved(stage, room, ana):
        for item in forged:
            stage.feed(ana, insider.direct(to, item))
        for n, item in enumerate(forged):
            stage.feed(ana, insider.envelope(item.data, stage.number(ana) + n))
    stage.talk(room, [ana, mal], [])


def test_attack_35_a_malleated_signature_makes_no_second_event(stage: Stage) -> None:
    """Identity is (dev, i) and H(header), never the signature: Notary.readItem, Room.take.

    Seen to fail without: `hash: old.hash` in Events.take, where the bytes of the whole item are compared instead.
    """
    room, (ana, mal) = stage.meet("ana", "mal")
    stage.do(ana, "go", to={"at": "start"})
    insider, to, held = stage.steal(mal, room), stage.dev(ana, room), list[zsr.DownEvent]()
    stage.lie = catching(ana, zsr.DownEvent, held)
    stage.do(mal, "send", text="once")
    stage.drain()
    stage.lie = None
    item = read_item(group_open(insider.epoch, 1, insider.keys.room, held[0].epoch, held[0].poster, held[0].ct))
    twin = malleated(item)
    stage.feed(ana, insider.direct(to, twin))
    with unmoved(stage, room, ana):
        stage.feed(ana, insider.direct(to, item, twin, item), held[0], insider.envelope(twin.data, held[0].no + 1))
    stage.do(ana, "go", to={"at": "room", "id": room})
    stage.talk(room, [ana, mal], ["once"])


def test_attack_30_huge_counters_and_lamports_stop_nobody(stage: Stage) -> None:
    """Room.lamportFault bounds the steps that it sees, Room.nextLamport those that this device makes itself.

    Seen to fail without: `Math.min` in Room.nextLamport, and without `if (lamportFault(at, e))` in Room.take.
    """
    room, (ana, mal) = stage.meet("ana", "mal")
    insider, to = stage.steal(mal, room), stage.dev(ana, room)
    with unmoved(stage, room, ana):
        stage.feed(ana, insider.direct(to, insider.text("a leap", lamport=FAR)))
        stage.feed(ana, insider.direct(to, insider.text("a leap", lamport=insider.lamport + 2**24 + 1)))
        stage.feed(ana, insider.direct(to, insider.text("no number", i=0, lamport=1, prev=ZERO32)))
    far = [event(insider.keys, i, insider.epoch.ch, 99, b"", b"p" * 32, lamport=FAR - 1) for i in (10**6, FAR - 1)]
    stage.feed(ana, insider.direct(to, *far))
    assert [ahead for _, _, ahead in stage.state(ana, room)["authors"] if ahead] == [[10**6, FAR - 1]]
    stage.talk(room, [ana, mal], [])
    stage.crash(ana)
    stage.settle(4)
    stage.do(ana, "go", to={"at": "room", "id": room})
    assert len(stage.texts(ana)) == 2


def test_attack_30_a_huge_vector_is_bounded_work(stage: Stage) -> None:
    """Delivery.seen looks at one top an author, Room.heard at authors that a roster ever listed.

    Seen to fail without: one top an author in Delivery.seen (667 envelopes for one vector).
    """
    room, (ana, mal) = stage.meet("ana", "mal")
    stage.do(ana, "send", text="one")
    stage.settle(6)
    insider, mine = stage.steal(mal, room), stage.dev(ana, room)
    lies = [Top(mine, 1 + n % 3, u(32, n + 1)) for n in range(2000)]
    strangers = [Top(u(16, n + 1), FAR, b"h" * 32) for n in range(2000)]
    wishes = [Want(mine, n) for n in range(1, 2000)]
    stage.drain()
    stage.feed(ana, insider.vector([*lies, *strangers], wishes))
    assert len(stage.said(ana, zsr.UpDirect)) <= 4
    stage.talk(room, [ana, mal], ["one"])


# ----------------------------------------------------------------------------------------------- the way into a room --
@dataclass(frozen=True)
class Threshold:
    """Bob follows a link to Ana's room, and what the relay wants to show him is still in its hands."""

    ana: str
    bob: str
    room: str
    shown: zsr.DownInvite


def threshold(stage: Stage) -> Threshold:
    room, (ana,) = stage.meet("ana")
    bob, held = f"bob{next(SERIAL)}", list[zsr.DownInvite]()
    stage.start(bob)
    stage.lie = catching(bob, zsr.DownInvite, held)
    stage.do(bob, "link", text=stage.invite(ana))
    stage.do(bob, "join", name=bob)
    stage.drain()
    stage.lie = None
    return Threshold(ana, bob, room, held[-1])


def enters(stage: Stage, at: Threshold) -> None:
    """The true answer leads in."""
    stage.feed(at.bob, at.shown)
    stage.settle(6)
    assert stage.model(at.bob)["at"] == "room"
    stage.talk(at.room, [at.ana, at.bob], [])


def test_attack_04_a_swapped_leaf_of_an_admin_ends_the_join(stage: Stage) -> None:
    """Notary.readLeaf and Joins.invited: the leaf is signed by a device that the charter calls an admin.

    Seen to fail without: `await verify(l.sigpub, 'leaf', m, sig);` in readLeaf, and without `'leaf of nobody who may let in'`.
    """
    at = threshold(stage)
    (true,) = at.shown.leaves
    shape, evil = zsr.decode(zsr.Leaf, true.m), new_device(bytes.fromhex(at.room))
    swapped = zsr.encode(replace(shape, kempub=point(evil.kem)))
    forged = [zsr.Signed(swapped, true.sig), zsr.Signed(swapped, sign(evil.sig, "leaf", swapped)), leaf(evil)]
    for one in forged:
        stage.feed(at.bob, replace(at.shown, leaves=(one,)), replace(at.shown, leaves=(true, one)))
        assert stage.said(at.bob, zsr.UpJoin) == []
    enters(stage, at)


def test_attack_33_a_forged_root_leads_no_newcomer_in(stage: Stage) -> None:
    """Notary.readCharter: the room's id is the hash of its root key.

    Seen to fail without: `equal(await Suite.hash('room', c.root), room)` in readCharter.
    """
    at, root = threshold(stage), new_root()
    evil = new_device(bytes.fromhex(at.room))
    true = zsr.decode(zsr.Charter, at.shown.charter.m)
    forged = signed(root, "charter", replace(true, root=point(root), admins=(evil.sigpub, *true.admins)))
    members = zsr.decode(zsr.Roster, at.shown.roster.m).members
    listed = [(one.member, device) for one in members for device in one.devices]
    listing = roster(evil.room, forged, evil, 0, [*listed, entry(evil)])
    stage.feed(at.bob, zsr.DownInvite(forged, listing, (leaf(evil),), at.shown.invite))
    assert stage.said(at.bob, zsr.UpJoin) == []
    enters(stage, at)


def test_attack_33_a_relay_that_reboots_empty_is_restored_and_its_forged_root_refused(stage: Stage) -> None:
    """Notary.readCharter again, and behind it Room.consider: the root never changes.

    Seen to fail without: both of the checks named.
    """
    room, (ana, mal) = stage.meet("ana", "mal")
    stage.do(ana, "send", text="before")
    stage.settle(4)
    insider, root = stage.steal(mal, room), new_root()
    true = zsr.decode(zsr.Signed, insider.unit.charter)
    shape = replace(zsr.decode(zsr.Charter, true.m), root=point(root), no=9, admins=(insider.keys.sigpub,))
    forged = signed(root, "charter", shape)
    members = zsr.decode(zsr.Roster, zsr.decode(zsr.Signed, insider.unit.roster).m).members
    listed = [(one.member, device) for one in members for device in one.devices]
    listing = roster(insider.keys.room, forged, insider.keys, 99, listed)
    slot = zsr.Slots((zsr.Slot(0, stage.dev(ana, room), 1, point(new_key()), bytes(48)),))
    body = replace(
        zsr.decode(zsr.Commit, insider.unit.body), charter=H("charter", forged.m), roster=H("roster", listing.m)
    )
    body = replace(body, committer=insider.keys.dev, slots=H("slots", zsr.encode(slot)), epoch=99)
    data = zsr.encode(body)
    sig = sign(insider.keys.sig, "commit", H("commit", data))
    unit = zsr.Unit(zsr.encode(forged), zsr.encode(listing), data, sig, bytes(32), zsr.encode(slot), ())
    stage.kill()
    stage.settle(4)
    with unmoved(stage, room, ana):
        stage.feed(ana, zsr.DownUnit(zsr.encode(unit)), zsr.DownCommit(10**6, 2, zsr.encode(unit)))
        assert stage.said(ana, zsr.UpResync) == []
    stage.talk(room, [ana, mal], ["before"])


def test_attack_05_a_forged_welcome_is_refused(stage: Stage) -> None:
    """Notary.openWelcome: only who holds the link's psk, and has seen the request, can seal one; not even a member.

    Seen to fail without: the psk in openWelcome (one of zeros accepted as well).
    """
    room, (ana, mal) = stage.meet("ana", "mal")
    insider, bob = stage.steal(mal, room), f"bob{next(SERIAL)}"
    held = list[zsr.DownDirect]()
    stage.start(bob)
    stage.lie = catching(bob, zsr.DownDirect, held)
    stage.do(bob, "link", text=stage.invite(ana))
    stage.do(bob, "join", name=bob)
    stage.drain()
    (commit_,) = stage.heard(mal, zsr.DownCommit)[-1:]
    epoch = open_slot(zsr.decode(zsr.Unit, commit_.unit), insider.keys, insider.epoch.init)
    asked = [f for f in stage.up[bob] if isinstance(f, zsr.UpJoin)][-1]
    shown = next(f for f in stage.up[bob] if isinstance(f, zsr.UpHello)).leaves[0]
    kempub = zsr.decode(zsr.Leaf, shown.m).kempub
    content = zsr.encode(WelcomeContent(epoch.joiner, epoch.ch, 0, (Top(stage.dev(ana, room), 10**6, b"h" * 32),)))
    for by in (stage.dev(ana, room), insider.keys.dev):
        info = welcome_info(insider.keys.room, asked.inv_id, by, asked.sealed[0].ct)
        for ct in (hpke_seal(kempub, info, content), hpke_seal(kempub, info, content, b"", bytes(32), asked.inv_id)):
            stage.feed(bob, zsr.DownDirect(2**40, 2, by, ZERO32, 0, ct))
    assert stage.model(bob)["at"] == "invited"
    stage.lie = None
    stage.feed(bob, *held)
    stage.settle(6)
    assert stage.model(bob)["at"] == "room"
    stage.talk(room, [ana, bob, mal], [])


def test_attack_06_a_replayed_join_moves_no_admin(stage: Stage) -> None:
    """Joins.asked: who is listed is not asked for again, and is not turned away either.

    Seen to fail without: `head.devices.has(who)` and `used.dev !== who`, both, in Joins.asked.
    """
    room, (ana, bob) = stage.meet("ana", "bob")
    replayed = [f for f in stage.heard(ana, zsr.DownJoins) if f.joins]
    assert replayed
    for _ in range(2):
        with unmoved(stage, room, ana):
            stage.feed(ana, *replayed, *replayed)
            assert not stage.said(ana, zsr.UpRefuse)
            assert not stage.said(ana, zsr.UpCommit)
        stage.crash(ana)
        stage.settle(3)
        stage.do(ana, "go", to={"at": "room", "id": room})
    stage.talk(room, [ana, bob], [])


def test_attack_07_of_two_that_race_on_one_link_one_gets_in_and_the_other_is_told(stage: Stage) -> None:
    """Room.addable: an invite counts for the first device, even where both requests lie on the table at once.

    Seen to fail without: `(used.get(w.inv_id) ?? w.dev) !== w.dev` in Room.addable and `'invite was consumed before'`.
    """
    room, (ana,) = stage.meet("ana")
    bob, eve = (f"{name}{next(SERIAL)}" for name in ("bob", "eve"))
    held, link_ = list[zsr.DownJoins](), stage.invite(ana)
    stage.start(bob, eve)
    stage.lie = catching(ana, zsr.DownJoins, held)
    for name in (bob, eve):
        stage.do(name, "link", text=link_)
        stage.do(name, "join", name=name)
        stage.drain()
    joins = {join.dev: join for frame in held for join in frame.joins}
    assert len(joins) == 2, "both are on their way"
    stage.feed(ana, zsr.DownJoins(tuple(joins.values())))
    stage.lie = None
    stage.settle(8)
    inside = [name for name in (bob, eve) if stage.model(name)["at"] == "room"]
    (outside,) = {bob, eve} - set(inside)
    assert stage.model(outside)["invited"]["state"] == "used"
    assert [m["name"] for m in stage.room(ana)["members"] if not m["you"]] == inside
    stage.dismissed(ana, "linkReused")
    stage.talk(room, [ana, *inside], [])


def test_attack_07_of_two_that_two_admins_admit_on_one_link_one_gets_in_and_all_are_told(stage: Stage) -> None:
    """The relay takes one commit; Joins.prune drops who lost the race, and tells both it and its admin.

    Seen to fail without: `if (taken) this.late(b, dev);` in Joins.prune.
    """
    room, (ana, bob, cleo) = stage.meet("ana", "bob", "cleo")
    stage.appoint(room, ana, ana, bob)
    dora, eve = fresh("dora", "eve")
    stage.start(dora, eve)
    link_, held = stage.invite(ana), dict[str, zsr.PendingJoin]()
    stage.settle(2)

    def keep_joins(name: str, frames: list[Any]) -> list[Any]:
        for frame in frames:
            held.update({name + j.dev.hex(): j for j in frame.joins} if isinstance(frame, zsr.DownJoins) else {})
        return [f for f in frames if not isinstance(f, zsr.DownJoins | zsr.DownSettled)]

    stage.lie = keep_joins
    for name in (dora, eve):
        stage.do(name, "link", text=link_)
        stage.do(name, "join", name=name)
        stage.drain()
    for admin, newcomer in ((ana, dora), (bob, eve)):
        stage.feed(admin, zsr.DownJoins((held[admin + stage.dev(newcomer, room).hex()],)))
    assert all(stage.said(name, zsr.UpCommit) for name in (ana, bob)), "both admit at once"
    stage.drain()
    stage.lie = None
    stage.settle(8)
    inside = [name for name in (dora, eve) if stage.model(name)["at"] == "room"]
    (outside,) = {dora, eve} - set(inside)
    loser = {dora: ana, eve: bob}[outside]
    assert stage.up[loser].count(zsr.UpRefuse(stage.dev(outside, room), 2)) == 1
    stage.dismissed(loser, "linkReused")
    assert stage.model(outside)["invited"]["state"] != "admitted"
    assert {m["name"] for m in stage.room(cleo)["members"]} == {ana, bob, cleo, *inside}
    stage.talk(room, [ana, bob, cleo, *inside], [])


def test_attack_07_no_admin_admits_a_second_one_on_a_used_link(stage: Stage) -> None:
    """Room.additionFault: what an invite was consumed for stays so, whatever an admin signs.

    Seen to fail without: `return 'invite was consumed before'`.
    """
    room, (mal, bob) = stage.meet("mal", "bob")
    admin, eve = stage.steal(mal, room), new_device(bytes.fromhex(room))
    (spent,) = spent_in(admin)
    unit = zsr.encode(
        upon(admin, [*listed_in(admin.unit), entry(eve, spent.inv_id)], [], [spent, used(spent.inv_id, eve)])
    )
    with unmoved(stage, room, bob):
        stage.feed(bob, zsr.DownUnit(unit), zsr.DownCommit(stage.number(bob) + 100, 2, unit))
        assert stage.said(bob, zsr.UpResync) == []


def test_attack_08_a_join_moved_to_another_invite_or_room_does_not_open(stage: Stage) -> None:
    """Notary.openJoin: the psk and the info are those of one invite, in one room; the consent names it a third time. No
    line alone can be taken away: the key itself is another.

    Seen to fail without: psk and info in openJoin and sealJoin (constants: any invite, any room).
    """
    one, (ana,) = stage.meet("ana")
    stage.do(ana, "go", to={"at": "start"})
    two = stage.create(ana, "Two")
    bob, held = f"bob{next(SERIAL)}", list[zsr.DownJoins]()
    first, second = stage.do(ana, "invite"), stage.do(ana, "invite")
    stage.start(bob)
    stage.lie = catching(ana, zsr.DownJoins, held)
    stage.do(bob, "link", text=first["link"])
    stage.do(bob, "join", name=bob)
    stage.drain()
    stage.lie = None
    ((join,),) = [frame.joins for frame in held if frame.joins]
    assert join.inv_id.hex() == first["id"]
    with unmoved(stage, two, ana):
        stage.feed(ana, zsr.DownJoins((replace(join, inv_id=bytes.fromhex(second["id"])),)))
        assert stage.said(ana, zsr.UpCommit) == []
    assert stage.state(ana, one)["devices"] == [stage.dev(ana, one).hex()]
    stage.feed(ana, *held)
    stage.settle(6)
    assert stage.model(bob)["at"] == "room"
    cleo = f"cleo{next(SERIAL)}"
    stage.start(cleo)
    stage.do(cleo, "link", text=second["link"])
    stage.do(cleo, "join", name=cleo)
    stage.settle(8)
    stage.talk(two, [ana, bob, cleo], [])


def listed_in(unit: zsr.Unit) -> list[Entry]:
    members = zsr.decode(zsr.Roster, zsr.decode(zsr.Signed, unit.roster).m).members
    return [(one.member, device) for one in members for device in one.devices]


def upon(insider: Insider, entries: list[Entry], removed: list[zsr.Gone], consumed: list[zsr.Consumed]) -> zsr.Unit:
    """A commit upon the insider's head with a roster of its making, signed as an admin signs; its slots open nothing."""
    unit, by = insider.unit, insider.keys
    under, body = zsr.decode(zsr.Signed, unit.charter), zsr.decode(zsr.Commit, unit.body)
    no = zsr.decode(zsr.Roster, zsr.decode(zsr.Signed, unit.roster).m).no + 1
    listing = roster(by.room, under, by, no, entries, removed, consumed)
    devs = sorted({H("dev", by.room + device.sigpub)[:16] for _, device in entries} - {by.dev})
    slots = zsr.encode(zsr.Slots(tuple(zsr.Slot(1, dev, 9, point(new_key()), bytes(48)) for dev in devs)))
    data = zsr.encode(
        replace(
            body,
            epoch=body.epoch + 1,
            parent=insider.epoch.ch,
            roster=H("roster", listing.m),
            committer=by.dev,
            reason=0,
            slots=H("slots", slots),
        )
    )
    sig = sign(by.sig, "commit", H("commit", data))
    return zsr.Unit(unit.charter, zsr.encode(listing), data, sig, bytes(32), slots, ())


def test_attack_41_an_admin_attaches_no_device_to_who_did_not_sponsor_it_or_without_its_consent(stage: Stage) -> None:
    """Notary.readEntry, for whole rosters: the device's own consent, and the word of one of that member's devices.

    Seen to fail without: `await verify(unhex(e.sigpub), 'consent', ...)`, without `must(member === e.member ...)`, and
    without `verify(unhex(e.sponsor), 'sponsor', ...)` in readEntry.
    """
    room, (mal, bob) = stage.meet("mal", "bob")
    admin, victim, eve = stage.steal(mal, room), stage.steal(bob, room), new_device(bytes.fromhex(room))
    inv, home = b"e" * 16, victim.keys.member
    by_mal = entry(eve, inv, sponsor=admin.keys, member=home)
    unwilling = (home, replace(entry(eve, inv, sponsor=victim.keys)[1], consent=bytes(64)))
    unsponsored = (home, replace(entry(eve, inv, sponsor=victim.keys)[1], sponsor_sig=by_mal[1].sponsor_sig))
    with unmoved(stage, room, bob):
        for n, attached in enumerate((by_mal, unwilling, unsponsored)):
            unit = zsr.encode(upon(admin, [*listed_in(admin.unit), attached], [], [*spent_in(admin), used(inv, eve)]))
            stage.feed(bob, zsr.DownUnit(unit), zsr.DownCommit(stage.number(bob) + 100 + n, 2, unit))
            assert stage.said(bob, zsr.UpResync) == []
    willing = [*listed_in(admin.unit), entry(eve, inv, sponsor=victim.keys)]
    true = zsr.encode(upon(admin, willing, [], [*spent_in(admin), used(inv, eve)]))
    stage.feed(bob, zsr.DownUnit(true))
    assert stage.said(bob, zsr.UpResync), "and with both it is believed"


def spent_in(insider: Insider) -> list[zsr.Consumed]:
    return list(zsr.decode(zsr.Roster, zsr.decode(zsr.Signed, insider.unit.roster).m).consumed)


def test_attack_41_a_request_attaches_only_what_its_sender_sponsors(stage: Stage) -> None:
    """Notary.readLink checks consent and sponsorship for the member whose device signed the request.

    Seen to fail without: `await readEntry(...)` in Notary.wanted.
    """
    room, (ana, bob, mal) = stage.meet("ana", "bob", "mal")
    insider, victim, eve = stage.steal(mal, room), stage.steal(bob, room), new_device(bytes.fromhex(room))
    boss = stage.dev(ana, room)
    _, kempub = insider.leaves[boss]
    inv, psk, shown = b"e" * 16, b"p" * 32, leaf(eve)
    psk_ct = hpke_seal(
        kempub, E("share", eve.room + inv + insider.keys.dev + boss), zsr.encode(SharedPsk(psk, 1, 0, FAR_FUTURE))
    )
    share_m = zsr.encode(zsr.Share(eve.room, insider.keys.dev, boss, inv, 0, hashlib.sha256(psk_ct).digest()))
    sealed = zsr.SealedShare(boss, psk_ct, sign(insider.keys.sig, "share", share_m))

    def asks(attached: Entry) -> zsr.DownRequests:
        made = attached[1]
        body = zsr.LinkBody(shown.m, shown.sig, made.consent, made.sponsor_sig, inv, b"j" * 32, (sealed,))
        return zsr.DownRequests((request(insider.keys, 1, zsr.encode(body), no=10**12, expiry=stage.wall + 10**6),))

    for_bob, by_bob = (
        entry(eve, inv, sponsor=insider.keys, member=victim.keys.member),
        entry(eve, inv, sponsor=victim.keys),
    )
    unwilling = replace(entry(eve, inv, sponsor=insider.keys)[1], consent=bytes(64))
    for attached in (for_bob, by_bob, (b"", unwilling)):
        stage.feed(ana, asks(attached))
        stage.do(ana, "send", text="nothing is stuck")
        assert stage.said(ana, zsr.UpCommit) == []
    stage.feed(ana, asks(entry(eve, inv, sponsor=insider.keys)))
    assert stage.said(ana, zsr.UpCommit), "its own it may"


def test_attack_30_a_member_fills_nobodys_disk_with_devices_it_invents(stage: Stage) -> None:
    """Joins.linked keeps of one device's link requests as many as a relay does.

    Seen to fail without: `if (!old && this.crowded(by.dev)) return;`, and without `r.expiry > world.wall() + MOST_MS`.
    """
    room, (_, bob, mal) = stage.meet("ana", "bob", "mal")
    insider = stage.steal(mal, room)

    def asks(expiry: int) -> zsr.Signed:
        eve, inv = new_device(bytes.fromhex(room)), os.urandom(16)
        shown, made = leaf(eve), entry(eve, inv, sponsor=insider.keys)[1]
        body = zsr.LinkBody(shown.m, shown.sig, made.consent, made.sponsor_sig, inv, bytes(32), ())
        return request(insider.keys, 1, zsr.encode(body), no=10**12, expiry=expiry)

    for days, kept in ((40, 0), (20, 16)):
        stage.feed(bob, zsr.DownRequests(tuple(asks(stage.wall + days * 86_400_000) for _ in range(20))))
        assert stage.facts(bob, room)["requests"] == kept


def test_attack_41_the_relay_speaks_for_no_own_device(stage: Stage) -> None:
    """Joins.confided: what own devices tell each other is signed by one of one's own member.

    Seen to fail without: `await Notary.verify(unhex(by.sigpub), 'own', m, sig);`, and without
    `by?.member !== me.member`, in Joins.confided.
    """
    room, (ana, mal) = stage.meet("ana", "mal")
    (laptop,) = fresh("laptop")
    stage.start(laptop)
    stage.linked(ana, laptop, room)
    insider, mine = stage.steal(mal, room), stage.dev(laptop, room)
    own = stage.steal(ana, room)
    there = new_device(bytes.fromhex(room))
    lure = zsr.encode(link(replace_room(there), stage.identity.public, kind=1))
    no, kempub = insider.leaves[mine]

    def says(sender: bytes, by: PrivateKey, what: Any) -> zsr.DownDirect:
        content = 3 * u(2, 0) + u(2, 1) + zsr.encode(signed(by, "own", what))
        ct = hpke_seal(kempub, E("direct", insider.keys.room + insider.epoch.ch + mine + u(8, no)), pad(content))
        return zsr.DownDirect(2**40, 1, sender, insider.epoch.ch, no, ct)

    rooms = len(stage.model(laptop)["rooms"])
    of = insider.keys.room
    with unmoved(stage, room, laptop):
        stage.feed(laptop, says(own.keys.dev, insider.keys.sig, OwnLink(1, of, own.keys.dev, mine, lure)))
        stage.feed(laptop, says(insider.keys.dev, insider.keys.sig, OwnLink(1, of, insider.keys.dev, mine, lure)))
        stage.feed(laptop, says(own.keys.dev, own.keys.sig, OwnLink(1, of, own.keys.dev, own.keys.dev, lure)))
        stage.settle(2)
    assert len(stage.model(laptop)["rooms"]) == rooms
    assert stage.node.call("Lab.rooms", laptop) == [room]
    stage.feed(laptop, says(own.keys.dev, own.keys.sig, OwnLabel(2, of, own.keys.dev, mine, "kitchen")))
    assert "kitchen" in [d["name"] for d in stage.room(laptop)["devices"]]


def replace_room(keys: Keys) -> Keys:
    """The same device in another room."""
    return replace(keys, room=os.urandom(32))


def test_attack_42_neither_an_old_join_nor_a_gone_sponsor_brings_a_device_in(stage: Stage) -> None:
    """Room.fault: no roster lists a device in `gone`; Room.additionFault: none is added that one in `gone` sponsored.

    Seen to fail without: `return 'a gone device is listed'` in fault, and without `'sponsored by a device that is
    gone'` in additionFault.
    """
    room, (mal, ana, bob) = stage.meet("mal", "ana", "bob")
    admin, victim = stage.steal(mal, room), stage.steal(bob, room)
    eve, inv, dev = new_device(bytes.fromhex(room)), b"e" * 16, victim.keys.dev
    without = [e for e in listed_in(admin.unit) if H("dev", admin.keys.room + e[1].sigpub)[:16] != dev]
    sponsored = entry(eve, inv, sponsor=victim.keys)
    out = [gone(victim.keys)]
    unit = zsr.encode(upon(admin, [*without, sponsored], out, [*spent_in(admin), used(inv, eve)]))
    back = zsr.encode(upon(admin, listed_in(admin.unit), out, spent_in(admin)))
    with unmoved(stage, room, ana):
        for n, one in enumerate((unit, back)):
            stage.feed(ana, zsr.DownUnit(one), zsr.DownCommit(stage.number(ana) + 100 + n, 2, one))
            assert stage.said(ana, zsr.UpResync) == []
    stage.cut(ana)
    stage.settle(4)
    stage.talk(room, [mal, ana, bob], [])


def test_attack_42_no_request_brings_a_removed_device_back(stage: Stage) -> None:
    """Joins.linked passes over a device that is gone, Joins.prune drops it, and Room.addable adds none.

    Seen to fail without: `gone.has(dev)` in linked and prune and `out.has(w.dev)` in addable, all three.
    """
    room, (ana, bob) = stage.meet("ana", "bob")
    (laptop,) = fresh("laptop")
    stage.start(laptop)
    stage.linked(bob, laptop, room)
    asked = stage.heard(ana, zsr.DownRequests)
    owner, lost = stage.steal(bob, room), stage.steal(laptop, room)
    commits = sum(isinstance(f, zsr.UpCommit) for f in stage.up[ana])
    stage.decree(ana, room, without=[stage.dev(laptop, room).hex()])
    stage.settle(4)
    assert len(stage.state(ana, room)["devices"]) == 2
    owner = stage.steal(bob, room)
    _, kempub = owner.leaves[stage.dev(ana, room)]
    for inv in (b"e" * 16, b"f" * 16):
        made, shown = entry(lost.keys, inv, sponsor=owner.keys)[1], leaf(lost.keys)
        to, by = stage.dev(ana, room), owner.keys.dev
        ct = hpke_seal(
            kempub, E("share", owner.keys.room + inv + by + to), zsr.encode(SharedPsk(ZERO32, 1, 0, FAR_FUTURE))
        )
        share_m = zsr.encode(zsr.Share(owner.keys.room, by, to, inv, 0, hashlib.sha256(ct).digest()))
        sealed = zsr.SealedShare(to, ct, sign(owner.keys.sig, "share", share_m))
        body = zsr.LinkBody(shown.m, shown.sig, made.consent, made.sponsor_sig, inv, ZERO32, (sealed,))
        stage.feed(
            ana,
            *asked,
            zsr.DownRequests((request(owner.keys, 1, zsr.encode(body), no=10**13, expiry=stage.wall + 10**6),)),
        )
        stage.settle(3)
    assert len(stage.state(ana, room)["devices"]) == 2
    assert sum(isinstance(f, zsr.UpCommit) for f in stage.up[ana]) == commits + 1, "it was not even tried"


def test_a_share_is_believed_only_from_an_admin_of_the_head(stage: Stage) -> None:
    """Joins.shared and Notary.openShare: who shares the way in is an admin, and has signed for this invite and me.

    Seen to fail without: `!s.head?.admins.includes(by)` in Joins.shared, and without
    `await verify(unhex(by.sigpub), 'share', m, sig);` in openShare.
    """
    room, (ana, bob, mal) = stage.meet("ana", "bob", "mal")
    stage.appoint(room, ana, ana, bob)
    insider, boss = stage.steal(mal, room), stage.steal(ana, room)
    to, inv = stage.dev(bob, room), b"e" * 16
    _, kempub = insider.leaves[to]

    def shares(sender: Keys, by: PrivateKey, recipient: bytes = to) -> zsr.DownDirect:
        info = E("share", sender.room + inv + sender.dev + to)
        ct = hpke_seal(kempub, info, zsr.encode(SharedPsk(b"p" * 32, 0, 0, FAR_FUTURE)))
        m = zsr.encode(zsr.Share(sender.room, sender.dev, recipient, inv, 0, hashlib.sha256(ct).digest()))
        box = zsr.encode(zsr.ShareContent(inv, 0, ct, sign(by, "share", m)))
        return zsr.DownDirect(2**40, 3, sender.dev, ZERO32, 0, box)

    stage.feed(bob, shares(insider.keys, insider.keys.sig), shares(boss.keys, insider.keys.sig))
    stage.feed(bob, shares(boss.keys, boss.keys.sig, insider.keys.dev))
    assert stage.room(bob)["invites"] == []
    stage.feed(bob, shares(boss.keys, boss.keys.sig))
    assert [i["expiry"] for i in stage.room(bob)["invites"]] == [FAR_FUTURE]


def test_attack_43_a_newcomer_gets_no_older_words_by_replay_or_by_asking(stage: Stage) -> None:
    """Room.handable: a body goes only to whom Room.entitled says yes; the relay alone has nothing to show.

    Seen to fail without: `may === false` in Room.handable (everyone is entitled).
    """
    room, (ana,) = stage.meet("ana")
    stage.do(ana, "send", text="before")
    stage.settle(3)
    mal = f"mal{next(SERIAL)}"
    stage.start(mal)
    stage.join(ana, mal)
    insider, mine = stage.steal(mal, room), stage.dev(ana, room)
    with unmoved(stage, room, mal):
        stage.feed(mal, *[replace(e, no=10**6 + n) for n, e in enumerate(stage.heard(ana, zsr.DownEvent))])
    stage.feed(ana, insider.vector([], [Want(mine, i) for i in range(1, 9)]))
    stage.settle(6)
    directs = [f for f in stage.up[ana] if isinstance(f, zsr.UpDirect) and f.leaf_no == insider.keys.leaf_no]
    items = [item for f in directs for item in open_direct(insider.keys, f.ch, f.ct)[0]]
    assert items
    bodies = [item.body for item in items if item.salt is not None]
    assert all(b"before" not in body for body in bodies)
    stage.do(mal, "send", text="anything before?")
    stage.settle(12)
    assert (stage.texts(ana), stage.texts(mal)) == (["before", "anything before?"], ["anything before?"])


# ------------------------------------------------------------------------------------- commits, rosters, charters --
def test_attack_01_who_is_listed_without_an_admins_word_is_sealed_nothing(stage: Stage) -> None:
    """Notary.readRoster: an admin of the charter has signed the roster. Room.fault and bornFault stand behind it.

    Seen to fail without: `must(at >= 0, …)` in readRoster and the signer's rule in Room.fault and bornFault (a member's
    own key taken); `await verify(charter.fields.admins[at], 'roster', m, sig);` there and `first.committer !==
    u.signer` in bornFault.
    """
    room, (ana, mal) = stage.meet("ana", "mal")
    insider, victim, eve = stage.steal(mal, room), stage.steal(ana, room), new_device(bytes.fromhex(room))
    added: dict[str, Any] = {
        "add": [entry(eve, b"e" * 16)],
        "consumed": [*insider.listed.consumed, used(b"e" * 16, eve)],
    }
    by_mal, as_ana = insider.roster(**added), insider.roster(by=victim.keys, **added)
    as_ana = replace(as_ana, sig=sign(insider.keys.sig, "roster", as_ana.m))
    to = [victim.keys, insider.keys, eve]
    forged = [commit(insider.head, insider.under, listing, insider.keys, to) for listing in (by_mal, as_ana)]
    with unmoved(stage, room, ana):
        stage.show(ana, *forged)
        assert not stage.said(ana, zsr.UpDirect) + stage.said(ana, zsr.UpResync)
    stage.again(ana)
    stage.talk(room, [ana, mal], [])


def test_attack_02_an_older_charter_roster_or_commit_is_not_gone_back_to(stage: Stage) -> None:
    """Room.weigh puts the charter first; Room.childFault lets no child go back; Room.consider knows its ancestors.

    Seen to fail without: `a.cno - b.cno` in Room.weigh; `c.cno < p.cno` in Room.childFault.
    """
    room, (ana, mal) = stage.meet("ana", "mal")
    early = stage.steal(ana, room)
    stage.decree(ana, room, policy={"rotate_after": 50})
    now, victim = stage.steal(ana, room), stage.steal(mal, room)
    to = [now.keys, victim.keys]
    assert zsr.decode(zsr.Charter, now.under.m).no == 1
    older = [f for f in stage.heard(mal, zsr.DownCommit) + stage.heard(mal, zsr.DownUnit) if f.unit != now.head.full]
    back = now.roster(under=early.under, no=900)
    with unmoved(stage, room, mal):
        stage.feed(mal, *older, *[replace(f, no=10**6) for f in older if isinstance(f, zsr.DownCommit)])
        stage.show(mal, early.head)
        stage.show(
            mal, commit(early.head, early.under, early.roster(no=900), early.keys, to, frozenset({victim.keys.dev}))
        )
        stage.show(mal, commit(now.head, early.under, now.roster(under=early.under), now.keys, to))
        stage.show(mal, commit(early.head, early.under, back, early.keys, to, frozenset({victim.keys.dev}), number=99))
    stage.again(mal)
    stage.talk(room, [ana, mal], [])


def test_attack_03_a_demoted_admins_rosters_and_links_are_dead(stage: Stage) -> None:
    """Notary.readRoster asks the charter in force; Room.weigh puts it before roster numbers; Joins.stands asks it for
    the oldest invite that counts.

    Seen to fail without: `a.cno - b.cno` in Room.weigh; `invite.charter_no < invites_from` in Joins.stands; `must(at >=
    0, …)` in readRoster with the signer's rule in Room.fault.
    """
    room, (ana, bob, mal) = stage.meet("ana", "bob", "mal")
    stage.decree(ana, room, admins=[stage.dev(ana, room).hex(), stage.dev(mal, room).hex()])
    then, link_ = stage.steal(mal, room), stage.invite(mal)
    stage.decree(ana, room, admins=[stage.dev(ana, room).hex()], invites_from=2)
    insider, victim = stage.steal(mal, room), stage.steal(bob, room)
    to = [stage.steal(ana, room).keys, victim.keys, insider.keys]
    joiners = frozenset(keys.dev for keys in to)
    with unmoved(stage, room, bob):
        stage.show(bob, commit(insider.head, insider.under, insider.roster(), insider.keys, to))
        stage.show(bob, commit(then.head, then.under, then.roster(no=900), insider.keys, to, joiners))
        stage.show(bob, commit(insider.head, then.under, insider.roster(under=then.under), insider.keys, to, joiners))
    cleo, shown = f"cleo{next(SERIAL)}", next(f.invite for f in stage.up[mal] if isinstance(f, zsr.UpInvite))
    stage.start(cleo)
    stage.do(cleo, "link", text=link_)
    stage.do(cleo, "join", name=cleo)
    stage.lie = dropping(cleo, zsr.DownFault)
    stage.drain()
    stage.feed(cleo, zsr.DownInvite(insider.under, insider.signed_roster, tuple(leaf(keys) for keys in to[:1]), shown))
    assert stage.said(cleo, zsr.UpJoin) == []
    assert stage.model(cleo)["invited"]["state"] == "over"
    stage.lie = None
    stage.again(bob)
    stage.talk(room, [ana, bob, mal], [])


def test_attack_16_two_members_are_given_different_commits_and_come_together(stage: Stage) -> None:
    """The keys of two commits differ, so what is said in one opens in the other for nobody; Room.prefer brings all to
    one of them, and what was said comes by hand.

    Seen to fail without: the last line of Room.prefer (no commit of equal weight is given up); `unhex(ch)` in groupAad
    together with K_dev of each epoch (one key for all).
    """
    room, (ana, bob, mal) = stage.meet("ana", "bob", "mal")
    insider = stage.steal(mal, room)
    to = [stage.steal(name, room).keys for name in (ana, bob)] + [insider.keys]
    here, there = (commit(insider.head, insider.under, insider.signed_roster, insider.keys, to, reason=1) for _ in "ab")
    stage.cut(mal)
    for name, made in ((ana, here), (bob, there)):
        stage.feed(name, zsr.DownCommit(stage.number(name), 2, made.full))
        assert stage.state(name, room)["head"] == made.ch.hex()
        stage.do(name, "send", text=f"by {name}")
    posts = {name: stage.said(name, zsr.UpPost) for name in (ana, bob)}
    for name, made, other in ((ana, here, bob), (bob, there, ana)):
        (posted,) = posts[other]
        before = stage.stored(name, room)
        for ch in (posted.ch, made.ch):
            stage.feed(name, zsr.DownEvent(10**6, 1, stage.dev(other, room), posted.epoch, ch, posted.ct))
        assert stage.stored(name, room) == before
    stage.again(ana, bob)
    stage.settle(30)
    assert stage.state(ana, room)["head"] == stage.state(bob, room)["head"]
    assert sorted(stage.texts(ana)) == sorted([f"by {ana}", f"by {bob}"])
    stage.talk(room, [ana, bob, mal], stage.texts(ana))


@pytest.mark.parametrize("joiner", [False, True])
def test_attack_21_who_got_another_secret_than_the_rest_sees_the_tag_fail_and_resyncs(
    stage: Stage, joiner: bool
) -> None:
    """Notary.keysFrom compares the tag; where it fails nothing is entered and Epochs.resync asks to be taken along.

    Seen to fail without: the tag in Notary.keysFrom; `await epochs.resync(b);` in Talk.due.
    """
    room, (ana, bob, mal) = stage.meet("ana", "bob", "mal")
    insider, victim, other = (stage.steal(name, room) for name in (mal, bob, ana))
    to, joiners = [victim.keys, other.keys], frozenset({victim.keys.dev}) if joiner else frozenset[bytes]()
    false = {victim.keys.dev: b"another secret, of 32 bytes here"}
    made = commit(insider.head, insider.under, insider.signed_roster, insider.keys, to, joiners, reason=1, false=false)
    asked = list[zsr.DownResyncs]()
    stage.say(mal, zsr.UpCommit(1, made.upload))
    stage.lie = catching(ana, zsr.DownResyncs, asked)
    stage.drain()
    state = stage.state(bob, room)
    assert (state["head"], state["target"]) == (insider.epoch.ch.hex(), made.ch.hex())
    assert [f for f in stage.up[bob] if isinstance(f, zsr.UpResync)]
    stage.do(bob, "send", text="not before all is well")
    assert stage.said(bob, zsr.UpPost) == []
    stage.lie = None
    stage.feed(ana, *asked)
    stage.settle(20)
    stage.do(bob, "go", to={"at": "room", "id": room})
    heads = {stage.state(name, room)["head"] for name in (ana, bob, mal)}
    assert len(heads) == 1
    assert heads.isdisjoint({made.ch.hex(), insider.epoch.ch.hex()})
    stage.talk(room, [ana, bob, mal], ["not before all is well"])


def test_attack_30_a_relay_that_refuses_every_commit_is_not_answered_at_the_speed_of_the_network(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Epochs.rejected builds what was refused anew; more than two times only after a while.

    Seen to fail without: `|| unit.roster !== s.head?.roster` in Epochs.rejected.
    """
    _, (ana, bob, cleo) = stage.meet("ana", "bob", "cleo")
    asked = list[Any]()

    def refuse(*of: Any) -> None:
        asked.append(of)
        raise zsr.PeerFault("slow", "never", 1)

    with monkeypatch.context() as patched:
        patched.setattr(stage.rooms, "_advance", refuse)
        stage.do(ana, "remove", member=stage.member(ana, bob)["id"])
        stage.do(ana, "rotate")
        stage.settle(30)
    assert 2 <= len(asked) <= 12
    stage.settle(60)
    assert {m["name"] for m in stage.room(cleo)["members"]} == {ana, cleo}


def forged_commits(ana: Insider, bob: Insider, mal: Insider, gone_: Keys) -> dict[str, Made]:
    """What a member, or an admin beyond its rights, makes of a room where admins alone rotate: Ana is the senior admin,
    Bob the junior one, Mal a member; a fourth is gone."""
    to, eve, inv = [ana.keys, bob.keys, mal.keys], new_device(ana.keys.room), b"e" * 16
    all_ = frozenset(keys.dev for keys in to)
    was, spent, fresh = ana.listed, list(ana.listed.consumed), used(inv, eve)
    between = commit(ana.head, ana.under, ana.signed_roster, ana.keys, to, reason=1)

    def by(who: Keys, listing: zsr.Signed, parent: Made = ana.head, extra: Iterable[Keys] = (), **how: Any) -> Made:
        return commit(parent, ana.under, listing, who, [*to, *extra], how.pop("joiners", all_), **how)

    def out(*dropped: Keys) -> list[Keys]:
        return [keys for keys in to if keys not in dropped]

    def less(listing: zsr.Signed, *dropped: Keys) -> Made:
        return commit(ana.head, ana.under, listing, ana.keys, out(*dropped), all_)

    first = next(device for _, device in ana.entries if device.sigpub == mal.keys.sigpub)
    again = [spent_ for spent_ in spent if spent_.inv_id != first.inv_id]
    coup = bob.roster(drop=[ana.keys], removed=[*was.gone, gone(ana.keys)])
    return {
        "a member rotates": by(mal.keys, ana.signed_roster, reason=1, joiners=frozenset()),
        "a member rotates, and calls it a resync": by(mal.keys, ana.signed_roster, reason=2, joiners=frozenset()),
        "a member rotates for no reason": by(mal.keys, ana.signed_roster, reason=0),
        "a member rotates for a reason unheard of": by(mal.keys, ana.signed_roster, reason=3),
        "a roster begins with a rotation": by(ana.keys, ana.roster(), reason=1),
        "a member leaps past a commit that nobody signed": by(mal.keys, ana.signed_roster, between, reason=1),
        "a member commits a roster of Ana's": by(mal.keys, ana.roster()),
        "and leaps with it": by(mal.keys, ana.roster(), between),
        "an admin commits a roster of another's": by(bob.keys, ana.roster()),
        "the number stands still": by(ana.keys, ana.roster(no=was.no, consumed=[*spent, fresh])),
        "the number leaps": by(ana.keys, ana.roster(no=was.no + 1025)),
        "the epoch leaps": by(ana.keys, ana.roster(), number=ana.number + 2),
        "a device vanishes": less(ana.roster(drop=[mal.keys]), mal.keys),
        "a gone device is forgotten": by(ana.keys, ana.roster(removed=[])),
        "a gone device returns": by(
            ana.keys, ana.roster([entry(gone_, b"g" * 16)], consumed=[*spent, used(b"g" * 16, gone_)]), extra=[gone_]),
        "an addition consumes nothing": by(ana.keys, ana.roster([entry(eve, inv)]), extra=[eve]),
        "an invite is consumed twice": by(
            ana.keys, ana.roster([entry(eve, first.inv_id)], consumed=[*again, used(first.inv_id, eve)]), extra=[eve]),
        "an admin removes a senior one": commit(ana.head, ana.under, coup, bob.keys, out(ana.keys), all_),
        "an admin is neither listed nor gone": commit(
            ana.head, ana.under, bob.roster(drop=[ana.keys]), bob.keys, out(ana.keys), all_),
        "a device has no slot": commit(ana.head, ana.under, ana.roster(), ana.keys, out(mal.keys), all_),
        "a stranger has one": by(ana.keys, ana.roster(), extra=[eve]),
        "a device is listed twice": by(
            ana.keys, ana.roster([(eve.member, replace(first, inv_id=inv))], consumed=[*spent, fresh])),
    }  # fmt: skip


def test_attack_22_whoever_lacks_the_right_changes_no_roster_and_rotates_for_nobody(stage: Stage) -> None:
    """Room.fault and bornFault judge a unit by itself, childFault as a child of the head.

    Seen to fail without: `first.reason !== 0` in bornFault; `first.committer !== u.signer` in bornFault; `'nothing
    changed'` in bornFault; `'rotation by a member'` in bornFault; `answers` there (any rotation may call itself a
    resync); `'epoch does not follow'` in childFault; `c.rno < least`; `c.rno > p.rno + LEAP`; `'gone is forgotten'`;
    `'a device vanishes'`; `'invite was consumed before'`; `'invite is not consumed'`; `'an admin removes a more senior
    one'`; `'an admin is neither listed nor gone'` and `'a device vanishes'`; `'slots do not match the roster'`; `'a
    device is listed twice'` in readDevices.
    """
    room, (ana, bob, mal, out) = stage.meet("ana", "bob", "mal", "out")
    last = stage.steal(out, room).keys
    stage.decree(ana, room, without=[last.dev.hex()])
    admins = [stage.dev(name, room).hex() for name in (ana, bob)]
    stage.decree(ana, room, admins=admins, policy={"who": 1})
    made = forged_commits(stage.steal(ana, room), stage.steal(bob, room), stage.steal(mal, room), last)
    for what, one in made.items():
        for name in (bob, mal):
            before = stage.believes(name, room)
            stage.show(name, one)
            assert stage.believes(name, room) == before, what
    stage.again(bob, mal)
    stage.talk(room, [ana, bob, mal], [])


def test_attack_24_a_removed_member_that_is_still_served_reads_nothing_more(stage: Stage) -> None:
    """Room.plan drops it from the roster, Notary.sealSlots seals to the roster alone, cs is fresh.

    Seen to fail without: `filter((e) => !gone.has(e.dev))` in Room.newRoster, so that the removal never comes;
    `Suite.random(32)` for cs in commitOn (zeros).
    """
    room, (ana, bob, mal) = stage.meet("ana", "bob", "mal")
    insider = stage.steal(mal, room)
    stage.decree(ana, room, without=[insider.keys.dev.hex()])
    assert stage.room(mal) is None or stage.state(mal, room)["view"] == "removed"
    since = len(stage.down[bob])
    for name in (ana, bob):
        stage.do(name, "send", text=f"without Mal, says {name}")
    stage.settle(8)
    served = [*stage.heard(bob, zsr.DownCommit)[-1:], *stage.down[bob][since:], *stage.heard(ana, zsr.DownEvent)[-2:]]
    stage.crash(mal)
    with unmoved(stage, room, mal):
        stage.feed(mal, *served)
    unit = zsr.decode(zsr.Unit, served[0].unit)
    with pytest.raises(StopIteration):
        open_slot(unit, insider.keys, insider.epoch.init)
    ch, slots = H("commit", unit.body), zsr.decode(zsr.Slots, unit.slots).slots
    known = [epoch_of(joiner_of(insider.epoch.init, cs), ch) for cs in (ZERO32, insider.epoch.init, insider.epoch.send)]
    events = [f for f in served if isinstance(f, zsr.DownEvent | zsr.DownLive)]
    assert slots
    assert {type(f) for f in events} == {zsr.DownEvent, zsr.DownLive}
    for frame in events:
        kind = 1 if isinstance(frame, zsr.DownEvent) else frame.type
        for epoch in (insider.epoch, replace(insider.epoch, ch=frame.ch), *known):
            with pytest.raises(InvalidTag):
                group_open(epoch, kind, insider.keys.room, frame.epoch, frame.poster, frame.ct)
    stage.talk(room, [ana, bob], [f"without Mal, says {name}" for name in (ana, bob)])


def test_attack_25_where_no_rotation_passes_clients_warn_and_then_say_nothing_more(looted: Node) -> None:
    """Room.stale: at twice what policy lets a key serve people are warned, at four times Delivery.post and hand keep
    what is said in the outbox, until somebody's rotation has passed.

    Seen to fail without: `desk.stale === 'refuse'` in Delivery.post.
    """
    stage = Stage(looted, rotation_seconds=1e6)
    room, (ana, bob) = stage.meet("ana", "bob")
    stage.decree(ana, room, policy={"rotate_after": 4})
    said, shown = list[str](), list[str]()
    while "refuse" not in shown and len(said) < 60:
        said.append(f"m{len(said)}")
        stage.do(bob, "send", text=said[-1])
        stage.settle(1.5)
        shown.append(stage.room(bob)["stale"])
    assert 3 <= shown.count("warn") <= 12, shown
    assert stage.room(ana)["stale"] in ("warn", "refuse")
    stage.do(bob, "send", text="not under these keys")
    stage.settle(12)
    assert "not under these keys" not in stage.texts(ana)
    assert stage.state(bob, room)["outbox"]
    stage.rooms._limits = zsr.Limits()
    stage.again(ana, bob)
    stage.settle(40)
    assert [stage.room(name)["stale"] for name in (ana, bob)] == ["", ""]
    stage.talk(room, [ana, bob], [*said, "not under these keys"])


def test_attack_26_an_older_leaf_and_a_leaf_shown_as_a_resync_are_refused(stage: Stage) -> None:
    """Epochs.leaf keeps the highest of listed devices; Epochs.asks wants a signed resync of this head with a leaf that
    no commit has used.

    Seen to fail without: `?.no ?? -1) >= leaf.no` in Epochs.leaf; `'resync with an older leaf'` in Epochs.asks; `await
    Notary.verify(l.sigpub, 'resync', m, sig);`; `hex(r.head) !== s.head.ch`; `'resync by an unlisted device'` and the
    key from the leaf itself; `leaf?.hash !== …`.
    """
    room, (ana, bob, mal) = stage.meet("ana", "bob", "mal")
    old, now = stage.steal(bob, room), stage.steal(mal, room)
    stage.lie = dropping(ana, zsr.DownLeaves)
    stage.decree(ana, room, policy={"rotate_after": 99})
    new, strange = stage.steal(bob, room), new_device(old.keys.room)
    assert new.keys.leaf_no > old.keys.leaf_no
    with unmoved(stage, room, ana):
        stage.feed(ana, zsr.DownResyncs((resync(old.keys, new.epoch.ch),)))
    stage.lie = None
    stage.again(ana)
    plain = leaf(new.keys)
    made = zsr.Resync(new.keys.room, new.epoch.ch, plain.m)
    lies = [
        resync(new.keys, old.epoch.ch),
        resync(fresh_leaf(new.keys), new.epoch.ch),
        zsr.Signed(zsr.encode(made), plain.sig),
        zsr.Signed(zsr.encode(made), sign(now.keys.sig, "resync", zsr.encode(made))),
        signed(new.keys.sig, "leaf", made),
        signed(strange.sig, "resync", replace(made, leaf=leaf(strange).m)),
        plain,
    ]
    with unmoved(stage, room, ana):
        stage.feed(ana, zsr.DownLeaves((leaf(old.keys), leaf(replace(new.keys, leaf_no=1)), leaf(strange))))
        for lie in lies:
            stage.feed(ana, zsr.DownResyncs((lie,)))
    stage.settle(3)
    assert stage.said(ana, zsr.UpCommit) == []
    stage.talk(room, [ana, bob, mal], [])


def test_attack_34_an_older_state_and_an_ex_admins_forged_roster_take_nobody_over(stage: Stage) -> None:
    """Room.weigh: the charter that root made when the admin went counts before any roster number; the true state goes
    back to the relay with the first who has it (Epochs.hello).

    Seen to fail without: `a.cno - b.cno` in Room.weigh; the unit in Epochs.hello.
    """
    room, (ana, bob, mal) = stage.meet("ana", "bob", "mal")
    stage.do(bob, "send", text="before")
    stage.settle(4)
    stage.decree(ana, room, admins=[stage.dev(name, room).hex() for name in (ana, mal)])
    insider = stage.steal(mal, room)
    stage.decree(ana, room, admins=[stage.dev(ana, room).hex()], without=[insider.keys.dev.hex()])
    truth = stage.state(bob, room)["head"]
    to = [insider.keys, *[stage.steal(name, room).keys for name in (ana, bob)]]
    joiners = frozenset(keys.dev for keys in to)
    forged = commit(insider.head, insider.under, insider.roster(no=900), insider.keys, to, joiners)
    for head in (insider.head, forged):
        with unmoved(stage, room, ana, bob):
            stage.show(ana, head)
            stage.show(bob, head)
        stage.kill()
        stage.restore(insider.keys, head)
        stage.settle(12)
        assert {stage.state(name, room)["head"] for name in (ana, bob)} == {truth}
    stage.talk(room, [ana, bob], ["before"])


def test_attack_41_a_device_is_attached_by_its_members_word_and_its_own(stage: Stage) -> None:
    """Notary.readEntry: the device's own consent, and the sponsorship of a device of that member's.

    Seen to fail without: `await verify(unhex(e.sigpub), 'consent', …)` in readEntry; `must(first === e.member, …)`;
    `must(member === e.member && …)`; the sponsor's signature.
    """
    room, (ana, bob, mal) = stage.meet("ana", "bob", "mal")
    admin, victim, insider = (stage.steal(name, room) for name in (ana, bob, mal))
    eve, inv = new_device(admin.keys.room), b"e" * 16
    home = next(member for member, device in admin.entries if device.sigpub == victim.keys.sigpub)
    true = entry(eve, inv, sponsor=victim.keys, member=home)
    other = entry(eve, inv, sponsor=victim.keys, member=insider.keys.member)
    lies: list[Entry] = [
        entry(eve, inv, sponsor=insider.keys, member=home),
        entry(eve, inv, sponsor=eve, member=home),
        entry(eve, inv, member=home),
        (home, replace(true[1], consent=other[1].consent)),
        (home, replace(true[1], consent=sign(victim.keys.sig, "consent", b"he would"))),
        (home, replace(true[1], sponsor_sig=entry(eve, inv, sponsor=insider.keys, member=home)[1].sponsor_sig)),
        (home, replace(true[1], inv_id=b"f" * 16)),
        (home, replace(true[1], sponsor=ZERO65, sponsor_sig=ZERO64)),
    ]
    to = [admin.keys, victim.keys, insider.keys, eve]
    spent = [*admin.listed.consumed, used(inv, eve), used(b"f" * 16, eve)]
    for lie in lies:
        listing = admin.roster([lie], consumed=spent)
        with unmoved(stage, room, bob):
            stage.show(bob, commit(admin.head, admin.under, listing, admin.keys, to))
    stage.again(bob)
    stage.talk(room, [ana, bob, mal], [])


def test_attack_42_a_removed_device_is_brought_back_by_nobody(stage: Stage) -> None:
    """Room.fault, childFault and additionFault; and by a leap past them Room.outcasts: nobody seals to a device whose
    removal it has seen, and the next admin removes it once more.

    Seen to fail without: `'a gone device is listed'` in Room.fault, `'a gone device returns'` and `'gone is
    forgotten'`; `s.evidence` in Room.outcasts.
    """
    room, (ana, bob, mal) = stage.meet("ana", "bob", "mal")
    before, old = stage.steal(ana, room), stage.steal(mal, room)
    stage.decree(ana, room, without=[old.keys.dev.hex()])
    admin, victim = stage.steal(ana, room), stage.steal(bob, room)
    own = next(each for each in before.entries if each[1].sigpub == old.keys.sigpub)
    self_ = entry(old.keys, b"s" * 16)
    spent = [*admin.listed.consumed, used(b"s" * 16, old.keys)]
    to = [admin.keys, victim.keys, old.keys]
    joiners = frozenset(keys.dev for keys in to)
    with unmoved(stage, room, bob):
        for back in (own, self_):
            for lost in (admin.listed.gone, ()):
                listing = admin.roster([back], removed=lost, consumed=spent)
                stage.show(bob, commit(admin.head, admin.under, listing, admin.keys, to, joiners))
        stage.show(bob, commit(old.head, old.under, old.signed_roster, old.keys, to, joiners, reason=1))
    leap = commit(admin.head, admin.under, admin.roster([own], removed=[]), admin.keys, to, joiners, number=10**6)
    leap = commit(leap, admin.under, admin.roster([own], removed=[], no=900), admin.keys, to, joiners)
    stage.show(bob, leap)
    stage.do(bob, "send", text="not to Mal")
    sealed = stage.said(bob, zsr.UpPost) + stage.said(bob, zsr.UpLive)
    assert sealed == []
    assert [f for f in stage.said(bob, zsr.UpDirect) if f.to == old.keys.dev] == []
    stage.again(ana, bob)
    stage.settle(20)
    for name in (ana, bob):
        assert old.keys.dev.hex() not in stage.state(name, room)["devices"]
    stage.talk(room, [ana, bob], ["not to Mal"])


def test_attack_30_leaves_of_strangers_are_not_kept(stage: Stage) -> None:
    """Epochs.leaf keeps those of devices that a roster has listed: whoever makes keys could fill the disk.

    Seen to fail without: `!s.devices.has(leaf.dev)` in Epochs.leaf.
    """
    room, (ana, bob) = stage.meet("ana", "bob")
    crowd = tuple(leaf(new_device(bytes.fromhex(room))) for _ in range(50))
    with unmoved(stage, room, ana):
        stage.feed(ana, zsr.DownLeaves(crowd))
    stage.talk(room, [ana, bob], [])


def test_attack_17_a_signed_object_of_one_room_is_refused_in_another_although_known(stage: Stage) -> None:
    """What has verified is remembered by room: Notary.readLeaf and readCharter.

    Seen to fail without: `hex(room)` in the names of what Notary.once remembers.
    """
    one, (ana, bob) = stage.meet("ana", "bob")
    stage.do(ana, "go", to={"at": "start"})
    two, loot = stage.create(ana, "Two"), stage.steal(bob, one)
    for shown in (leaf(loot.keys), loot.under):
        reads = "Notary.readLeaf" if shown.m == leaf(loot.keys).m else "Notary.readCharter"
        data = zsr.encode(shown)
        stage.node.call(reads, bytes.fromhex(one), data)
        with pytest.raises(Refused):
            stage.node.call(reads, bytes.fromhex(two), data)
    stage.join(ana, bob)
    stage.talk(two, [ana, bob], [])


@dataclass(frozen=True)
class Upload:
    """Ana has sent a file of three segments; what the relay tells Bob of it is in our hands. Mal is a member, too."""

    room: str
    ana: str
    bob: str
    content: bytes
    insider: Insider
    told: list[zsr.DownEvent]
    chunks: list[zsr.DownChunk]

    def file(self, stage: Stage) -> Any:
        (file,) = [m["file"] for m in stage.room(self.bob)["messages"] if m["file"]]
        return file

    def arrives(self, stage: Stage) -> None:
        """With an honest relay it is here, and is what was sent."""
        stage.again(self.bob)
        stage.settle(20)
        file = self.file(stage)
        assert file["state"] == "here"
        assert stage.node.call("Lab.blob", self.bob, file["id"]) == self.content

    def frames(self, pieces: Iterable[bytes], numbers: Iterable[int] | None = None) -> list[zsr.DownChunk]:
        listed = list(pieces)
        numbered = zip(range(len(listed)) if numbers is None else numbers, listed, strict=True)
        return [replace(self.chunks[0], index=n, ct=piece) for n, piece in numbered]


def upload(stage: Stage, size: int = 600_000) -> Upload:
    room, (ana, bob, mal) = stage.meet("ana", "bob", "mal")
    content, held = stage.dice.randbytes(size), list[Any]()
    stage.lie = catching(bob, object, held)
    stage.do(ana, "files", files=[{"name": "a.bin", "type": "", "bytes": content}])
    stage.drain()
    told = [f for f in held if isinstance(f, zsr.DownEvent)]
    stage.feed(bob, told[0])
    stage.settle(3)
    insider = stage.steal(mal, room)
    stage.lie = None
    chunks = {f.index: f for f in held if isinstance(f, zsr.DownChunk)}
    return Upload(room, ana, bob, content, insider, told, [chunks[n] for n in sorted(chunks)])


@pytest.mark.parametrize("how", ["stripped", "reordered", "doubled", "cut", "grown", "counted anew", "misnumbered"])
def test_attack_27_tampered_chunks_make_no_file(stage: Stage, how: str) -> None:
    """Files.chunk takes the next segment alone, Files.opens opens each before it is kept, file-done names all.

    Seen to fail without: `if (!plain) return;` in Files.chunk and the hash in Files.settle.
    """
    sent = upload(stage)
    a, b, c = (chunk.ct for chunk in sent.chunks)
    lies = {
        "stripped": sent.frames([a, c]),
        "reordered": sent.frames([a, c, b]),
        "doubled": sent.frames([a, a, b, b, c]),
        "cut": sent.frames([a, b, c[:-1]]),
        "grown": sent.frames([a, b, c + b"x"]),
        "counted anew": [replace(chunk, count=2) for chunk in sent.frames([a, b])],
        "misnumbered": sent.frames([c, b, a, c, a, c], [2, 1, 0, 0, 0, 2**32 - 1]),
    }
    stage.feed(sent.bob, *sent.told, *lies[how])
    assert sent.file(stage)["state"] == "moving"
    sent.arrives(stage)


def test_attack_28_another_files_bytes_and_an_insiders_under_the_same_key_are_not_shown(stage: Stage) -> None:
    """Files.opens: the key is bound to author and file; Files.settle: file-done, of the author alone, names the bytes.

    Seen to fail without: the hash in Files.settle; `x.dev === dev` in Files.finished; `if (!plain) return;` in
    Files.chunk.
    """
    sent = upload(stage)
    insider, author = sent.insider, stage.dev(sent.ana, sent.room)
    entry_, room = sent.told[0], insider.keys.room
    shown = read_item(group_open(insider.epoch, 1, room, entry_.epoch, entry_.poster, entry_.ct))
    body, evil = zsr.decode(FileBody, shown.body), stage.dice.randbytes(len(sent.content))
    for dev, file_id, fk in (
        (author, b"another file_id!", body.fk),
        (insider.keys.dev, body.file_id, body.fk),
        (author, body.file_id, b"k" * 32),
    ):
        stage.feed(sent.bob, *sent.frames(seal_file(stage.node, fk, E("file", room + dev + file_id), evil)))
        assert sent.file(stage)["done"] == 0
    same = seal_file(stage.node, body.fk, E("file", room + author + body.file_id), evil)
    hashes = b"".join(hashlib.sha256(piece).digest() for piece in same)
    named = H("segments", room + body.file_id + u(8, body.size) + u(4, len(same)) + hashes)
    said = shown.hash + named
    done = event(insider.keys, insider.next, insider.epoch.ch, 3, said, insider.last, insider.lamport + 9)
    stage.feed(sent.bob, insider.direct(stage.dev(sent.bob, sent.room), done), *sent.frames(same))
    assert sent.file(stage)["state"] == "moving", "another than its author says that it is whole"
    stage.feed(sent.bob, sent.told[1])
    eventually(lambda: bool(sent.file(stage)["why"] == "broken"), "the bytes are not those that its author named")
    assert sent.file(stage)["state"] == "moving"
    sent.arrives(stage)


def seal_file(node: Node, fk: bytes, info: bytes, content: bytes) -> list[bytes]:
    """A file's segments as the page itself seals them."""
    sealer = node.call("Suite.fileSealer", fk, info, len(content))
    pieces = []
    for n in range(int(sealer["count"])):
        start, end = sealer["offsets"](n)
        pieces.append(sealer["seal"](n, content[int(start) : int(end)]))
    return pieces


def test_attack_13_a_file_arrives_although_its_end_was_told_before_it(stage: Stage) -> None:
    """Events.early: what names a file's bytes may come before the file itself, from a relay that reorders.

    Seen to fail without: `await this.early(b, e)` in Events.show.
    """
    room, (ana, bob) = stage.meet("ana", "bob")
    content, held = stage.dice.randbytes(1000), list[zsr.DownEvent]()
    stage.lie = catching(bob, zsr.DownEvent, held)
    stage.do(ana, "files", files=[{"name": "a.bin", "type": "", "bytes": content}])
    stage.drain()
    stage.lie = None
    numbers = [entry.no for entry in held]
    assert len(held) == 2
    for no, entry in zip(numbers, reversed(held), strict=True):
        stage.feed(bob, replace(entry, no=no))
    stage.settle(20)
    (file,) = [m["file"] for m in stage.room(bob)["messages"] if m["file"]]
    assert file["state"] == "here"
    assert stage.node.call("Lab.blob", bob, file["id"]) == content
    stage.talk(room, [ana, bob], [])


def test_attack_09_an_expired_or_revoked_link_lets_nobody_in_even_where_the_relay_keeps_it(stage: Stage) -> None:
    """Joins.asked: the admin itself knows when its links end, and which it has revoked.

    Seen to fail without: `invite.expiry < desk.world.wall()` in Joins.asked and `w.expiry < wall` in Room.addable;
    `view.invites.delete(id)` in Joins.revoke.
    """
    room, (ana,) = stage.meet("ana")
    for how in ("expired", "revoked"):
        bob, held, made = f"bob{next(SERIAL)}", list[zsr.DownJoins](), stage.do(ana, "invite")
        stage.start(bob)
        stage.do(bob, "link", text=made["link"])
        stage.do(bob, "join", name=bob)
        stage.lie = catching(ana, zsr.DownJoins, held)
        stage.drain()
        stage.lie = None
        assert held
        if how == "expired":
            stage.node.call("Lab.advance", 72 * 3_600_000 + 1)
        else:
            stage.do(ana, "revoke", id=made["id"])
        with unmoved(stage, room, ana):
            stage.feed(ana, *held)
            assert [f.code for f in stage.said(ana, zsr.UpRefuse)] == [3]
            assert stage.said(ana, zsr.UpCommit) == []
        stage.settle(6)
        assert stage.model(bob)["invited"]["state"] == "over"
    cleo = f"cleo{next(SERIAL)}"
    stage.start(cleo)
    stage.join(ana, cleo)
    stage.talk(room, [ana, cleo], [])


def test_attack_43_what_waits_to_be_said_is_not_posted_where_a_newcomer_reads_it(stage: Stage) -> None:
    """Room.posts: to the group goes only what all its devices may read, however often the relay loses it.

    Seen to fail without: `listed.every(...)` in Room.posts.
    """
    room, (ana, bob) = stage.meet("ana", "bob")
    stage.cut(bob)
    stage.do(ana, "send", text="before Mal")
    stage.lie = lambda name, frames: [] if name == bob else frames
    mal = f"mal{next(SERIAL)}"
    stage.start(mal)
    stage.join(ana, mal)
    insider = stage.steal(mal, room)
    for _ in range(2):
        stage.kill()
        stage.settle(6)
    stage.lie = None
    stage.settle(20)
    posts = [f for f in stage.heard(mal, zsr.DownEvent) if f.ch == insider.epoch.ch]
    assert posts
    opened_ = [
        group_open(insider.epoch, 1, insider.keys.room, f.epoch, f.poster, f.ct)
        for f in posts
        if f.poster != insider.keys.dev
    ]
    assert all(b"before Mal" not in plain for plain in opened_)
    assert stage.texts(bob) == ["before Mal"]
    assert stage.texts(mal) == []


# ---------------------------------------------------------------------------------------- sockets, noise and crashes --
def greeting(stage: Stage, victim: str) -> zsr.DownRelay:
    """A client comes back, and what the relay answers its nonce stays in the relay's hands."""
    held = list[zsr.DownRelay]()
    stage.lie = catching(victim, zsr.DownRelay, held)
    stage.cut(victim)
    stage.tick(2)
    stage.drain()
    stage.lie = None
    return held[-1]


def test_attack_31_the_client_signs_no_login_but_the_one_it_asked_for(stage: Stage) -> None:
    """Door.checked: the relay's own words, over this nonce and this room.

    Seen to fail without: `client_nonce`, or `room`, or `Notary.verify(relay.relay, ...)` in Door.checked.
    """
    _, (_, bob) = stage.meet("ana", "bob")
    true, key, thief = greeting(stage, bob), stage.identity, MemoryIdentity(new_key())
    said = zsr.decode(zsr.Relay, true.m)
    login_m = zsr.encode(zsr.Login(key.public, "relay.test", said.room, said.client_nonce, said.relay_nonce, b"d" * 16))
    changed = [zsr.encode(replace(said, client_nonce=b"n" * 32)), zsr.encode(replace(said, room=b"r" * 32))]
    forged = [(m, key.sign("relay", m)) for m in (*changed, login_m, true.m + b"x")]
    forged += [(true.m, key.sign("login", true.m)), (true.m, thief.sign("relay", true.m))]
    for m, sig in forged:
        stage.feed(bob, replace(true, m=m, sig=sig))
        assert stage.said(bob, zsr.UpLogin) == []
    stage.feed(bob, true)
    (made,) = stage.said(bob, zsr.UpLogin)
    assert zsr.decode(zsr.Login, made.m).host == "relay.test"
    stage.settle(3)
    assert (stage.room(bob)["connection"]["state"], stage.notes(bob)) == ("connected", [])


def test_attack_31_a_relay_with_another_key_gets_no_login(stage: Stage) -> None:
    """Desk.pinned: the key that the link named stays the relay's key; another one is shown and explained.

    Seen to fail without: `if (this.view.relay === fingerprint) return true;` in Desk.pinned (any key passes).
    """
    _, (_, bob) = stage.meet("ana", "bob")
    true, thief = greeting(stage, bob), MemoryIdentity(new_key())
    m = zsr.encode(replace(zsr.decode(zsr.Relay, true.m), relay=thief.public))
    stage.feed(bob, replace(true, m=m, sig=thief.sign("relay", m)))
    assert stage.said(bob, zsr.UpLogin) == []
    stage.settle(3)
    assert stage.notes(bob) == [("relayKey", "")]
    assert stage.room(bob)["connection"]["state"] == "offline"


def test_attack_31_a_newcomer_is_told_that_this_is_not_the_relay_of_the_link(stage: Stage) -> None:
    """Session.invited: the newcomer's page ends its wait, and says that the link was not made for this relay.

    Seen to fail without: `relayKey: 'broken'` in Session's SHUT (the page waits for ever).
    """
    _, (ana,) = stage.meet("ana")
    link, bob = stage.invite(ana), f"bob{next(SERIAL)}"
    stage.identity = MemoryIdentity(new_key())
    stage.kill()
    stage.start(bob)
    stage.follow(link, bob)
    assert stage.model(bob)["invited"]["state"] == "broken"
    assert stage.said(bob, zsr.UpLogin) == []


def test_what_nobody_holds_any_more_of_who_has_left_is_not_held_back(stage: Stage) -> None:
    """Room.behind: a peer that began to count after somebody's last word says the same top as one that has it all."""
    ana, bob, dora = fresh("ana", "bob", "dora")
    stage.start(ana, bob, dora)
    room = stage.create(ana)
    stage.do(ana, "send", text="long ago")
    of_ana = stage.dev(ana, room)

    def withheld(f: Any) -> bool:
        return isinstance(f, zsr.DownDirect | zsr.DownEvent) and f.kind == 1 and getattr(f, "poster", of_ana) == of_ana

    stage.lie = lambda name, frames: [f for f in frames if name == ana or not withheld(f)]
    stage.join(ana, bob)
    stage.do(ana, "policy", history=2)
    stage.settle(4)
    stage.join(ana, dora)
    stage.do(ana, "makeAdmin", member=stage.member(ana, bob)["id"])
    stage.settle(4)
    stage.do(ana, "leaveRoom")
    stage.settle(8)
    stage.lie = None
    stage.settle(60)
    assert stage.room(ana)["state"] == "left"
    stage.talk(room, [bob, dora], [])


def test_vectors_that_did_not_come_are_asked_for(stage: Stage) -> None:
    """Delivery.tick: without them a message would stay Sent until somebody speaks again."""
    room, (ana, bob, cleo) = stage.meet("ana", "bob", "cleo")
    stage.lie = dropping(bob, zsr.DownLive)
    stage.do(bob, "send", text="who has this?")
    stage.settle(8)
    stage.lie = None
    assert stage.state(bob, room)["outbox"]
    stage.settle(25)
    assert stage.state(bob, room)["outbox"] == []
    said = {name: len(stage.heard(name, zsr.DownLive)) for name in (ana, bob, cleo)}
    stage.settle(120)
    assert said == {name: len(stage.heard(name, zsr.DownLive)) for name in (ana, bob, cleo)}, "they fall silent"
    stage.talk(room, [ana, bob, cleo], ["who has this?"])


def test_before_the_login_nothing_is_said_that_the_relay_would_not_take(stage: Stage) -> None:
    """A link made between a socket's nonce and its login goes out with the hello; the socket stays."""
    _, (ana,) = stage.meet("ana")
    true, dan = greeting(stage, ana), f"dan{next(SERIAL)}"
    link = stage.invite(ana)
    assert stage.said(ana, zsr.UpInvite) == []
    stage.feed(ana, true)
    stage.settle(2)
    assert [fault for fault in stage.heard(ana, zsr.DownFault) if fault.code == "bad"] == []
    stage.start(dan)
    stage.follow(link, dan)
    assert stage.model(dan)["at"] == "room"


def test_attack_44_a_login_forwarded_to_another_host_gets_nobody_in(stage: Stage) -> None:
    """Door.login signs the host that this page connects to; a relay that goes by other names only refuses it.

    Seen to fail without: `host: this.host` in Door.login (the relay's own name signed).
    """
    names = frozenset({"true.test"})
    stage.rooms = zsr.Rooms(
        stage.limits, stage.identity, bytes(16), names, stage.dice.randbytes, lambda: 1_700_000_000_000
    )
    ana = f"ana{next(SERIAL)}"
    stage.start(ana)
    stage.create(ana)
    stage.settle(3)
    assert stage.notes(ana) == [("host", "")]
    assert stage.room(ana)["connection"]["state"] != "connected"
    assert stage.heard(ana, zsr.DownReady) == []


def test_a_newcomer_under_an_address_that_the_relay_does_not_go_by_is_told(stage: Stage) -> None:
    _, (ana,) = stage.meet("ana")
    link, bob = stage.invite(ana), f"bob{next(SERIAL)}"
    stage.rooms.names = frozenset({"true.test"})
    stage.start(bob)
    stage.follow(link, bob)
    assert stage.model(bob)["invited"]["state"] == "host"
    stage.rooms.names = frozenset()
    stage.settle(8)
    assert stage.model(bob)["at"] == "room", "another try may go well"


def flipped(data: bytes, bit: int) -> bytes:
    return data[: bit // 8] + bytes([data[bit // 8] ^ 128 >> bit % 8]) + data[bit // 8 + 1 :]


def one_of_each_frame(stage: Stage) -> tuple[str, list[str], dict[type[Any], list[Any]]]:
    """A room where nearly all has happened, and what Bob was told of each kind: the first, and what he has not seen yet."""
    room, (ana, bob) = stage.meet("ana", "bob")
    stage.do(bob, "files", files=[{"name": "b.bin", "type": "", "bytes": bytes(1000)}])
    stage.settle(4)
    stage.decree(ana, room, admins=[stage.dev(ana, room).hex(), stage.dev(bob, room).hex()])
    mal, cleo = f"mal{next(SERIAL)}", f"cleo{next(SERIAL)}"
    stage.start(mal, cleo)
    stage.join(ana, mal)
    stage.decree(ana, room, without=[stage.dev(mal, room).hex()])
    stage.again(bob)
    stage.do(ana, "files", files=[{"name": "a.bin", "type": "", "bytes": bytes(3000)}])
    stage.settle(4)
    held = list[Any]()
    stage.lie = catching(bob, object, held)
    stage.do(ana, "send", text="zero")
    stage.drain()
    stage.do(cleo, "link", text=stage.invite(ana))
    stage.do(cleo, "join", name=cleo)
    stage.drain()
    insider = stage.steal(cleo, room)
    stage.say(cleo, zsr.UpResync(resync(fresh_leaf(insider.keys), insider.epoch.ch)))
    stage.do(ana, "send", text="one")
    stage.do(ana, "typing")
    stage.tick(3)
    stage.drain()
    kinds: dict[type[Any], list[Any]] = {}
    for kind in dict.fromkeys(map(type, stage.down[bob])):
        unseen = [frame for frame in held if isinstance(frame, kind)]
        told = [frame for frame in stage.down[bob] if isinstance(frame, kind)]
        kinds[kind] = [told[0], *unseen[:1], *unseen[1:][-1:]]
    return room, [ana, bob, cleo], kinds


def test_attack_11_no_flipped_bit_of_a_frame_changes_anything(stage: Stage) -> None:
    """AES-GCM with all public fields in the AAD, signatures, hashes; and Delivery.envelope for the epoch's number. What
    the relay says in its own name (numbers of its log, who is here) changes nothing of what is believed or kept.

    Seen to fail without: `keys.epoch !== f.epoch` in Delivery.envelope; the hash of the slots in readUnit.
    """
    room, (ana, bob, cleo), kinds = one_of_each_frame(stage)
    assert len(kinds) >= 14, sorted(kind.__name__ for kind in kinds)
    unseen = {zsr.DownEvent, zsr.DownCommit, zsr.DownLive, zsr.DownLeaves, zsr.DownSettled}
    assert len(unseen & kinds.keys()) >= 4

    def kept() -> Any:
        state, stored, unread, _ = stage.believes(bob, room)
        return state, stored, unread, [n for n in stage.room(bob)["notes"] if n["level"] != "info"]

    before, numbers = kept(), itertools.count(10**6)
    for kind, frames in kinds.items():
        for frame in frames:
            logged = kind in (zsr.DownEvent, zsr.DownCommit)
            size = len(zsr.encode_frame(frame))
            for bit in [8 * 34 - 1, *stage.dice.sample(range(8 * (9 if logged else 1), 8 * size), 8)]:
                later = replace(frame, no=next(numbers)) if logged else frame  # the log's numbers: the relay's own
                data = zsr.encode_frame(later)
                tag = data.find(zsr.decode(zsr.Unit, frame.unit).tag) if hasattr(frame, "unit") else -40
                if bit < 8 * size and not tag <= bit // 8 < tag + 32:
                    stage.feed(bob, flipped(data, bit))
                    assert kept() == before, (kind.__name__, bit)
    assert stage.node.call("Lab.faults") == []
    stage.lie = None
    stage.again(bob)
    stage.settle(12)
    for name in (ana, bob, cleo):
        stage.do(name, "send", text=f"still here, {name}")
    stage.settle(12)
    assert stage.texts(ana) == stage.texts(bob)
    assert sorted(stage.texts(bob)) == sorted(["zero", "one", *[f"still here, {name}" for name in (ana, bob, cleo)]])


def test_attack_38_a_crash_at_any_point_of_sending_loses_and_doubles_nothing(stage: Stage) -> None:
    """Events.make keeps the event in the transaction that accepts it; the outbox does the rest.

    Seen to fail without: `this.keep(b, e);` in Events.make. (Without the outbox the vectors still deliver.)
    """
    room, (ana, bob) = stage.meet("ana", "bob")

    def to_the_relay() -> None:
        for kind, wire in stage.moves():
            if kind == "up":
                stage.move(kind, wire)

    points: list[Callable[[], object]] = [list, list, to_the_relay, stage.drain, stage.kill]
    for n, on_its_way in enumerate(points):
        stage.node.call("Lab.mute", bob, n == 0)
        stage.do(bob, "send", text=f"m{n}")
        on_its_way()
        stage.crash(bob)
        stage.settle(4)
        stage.do(bob, "go", to={"at": "room", "id": room})
    stage.talk(room, [ana, bob], [f"m{n}" for n in range(len(points))])


# ======================================================================================================================
# Vault: the store as a whole: its passphrase, its lock, export and import. Clients of the laboratory, whose disk can be
# read and changed by hand; an export is opened and made by the oracle, too, from what README says of its bytes.
# ======================================================================================================================

DISK = r"""
'use strict';
const Disk = (() => {
  const promised = (request) => new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
  const hexed = (value) => value instanceof ArrayBuffer ? Bytes.hex(new Uint8Array(value)) : value;
  const beside = async (name, work) => {
    const db = await promised(indexedDB.open(name));
    try { return await work((table, mode = 'readonly') => db.transaction(table, mode).objectStore(table)); } finally { db.close(); }
  };
  /** all that lies there, byte by byte */
  const dump = (name) => beside(name, async (open) => {
    const tables = [];
    for (const table of ['meta', 'events', 'chunks']) tables.push(await promised(open(table).getAll()));
    // without who is at work there, which every start says anew
    return JSON.stringify(tables.map((table) => table.filter(({no}) => no === undefined)), (_, value) => hexed(value));
  });
  /** flips a bit of one record: of the record that `key` names, or of the first of a table */
  const flip = (name, table, key, at) => beside(name, async (open) => {
    const all = () => promised(open(table).getAll());
    const record = key === null ? (await all()).find(({no}) => no === undefined) : await promised(open(table).get(key));
    const bytes = new Uint8Array(record.ct ?? record.data);
    bytes[at] ^= 1;
    await promised(open(table, 'readwrite').put(record));
  });
  const remove = (name, table, key) => beside(name, (open) => promised(open(table, 'readwrite').delete(key)));
  const keys = (name) => beside(name, async (open) => (await promised(open('meta').getAllKeys())).map(String).filter((key) => key !== 'owner'));
  const names = async () => (await indexedDB.databases()).map((one) => one.name);
  const bytes = async (blob) => new Uint8Array(await blob.arrayBuffer());
  const code = (promise) => promise.then(() => '', (error) => error.code ?? String(error));
  const fault = (name, intent) => code(Lab.dispatch(name, intent));
  const file = (data) => new Blob([data]);
  const take = (name, data, passphrase) => Lab.dispatch(name, {do: 'import', file: file(data), passphrase});
  /** what an import says of each of many altered files */
  const tries = async (name, files, passphrase) => {
    const said = new Map();
    for (const data of files) {
      const how = await code(Lab.session(name).dispatch({do: 'import', file: file(data), passphrase}));
      said.set(how, (said.get(how) ?? 0) + 1);
    }
    return Object.fromEntries(said);
  };
  const flips = (name, data, passphrase, step) => tries(name, (function* each() {
    for (let at = 0; at < data.length; at += step) {
      const other = data.slice();
      other[at] ^= 1 << at % 8;
      yield other;
    }
  })(), passphrase);
  const cuts = (name, data, passphrase, step) => tries(name, (function* each() {
    for (let end = 0; end < data.length; end += step) yield data.slice(0, end);
  })(), passphrase);
  /** a file that is another one when it is read for the second time */
  const fickle = (name, data, at, passphrase) => {
    let read = 0;
    const second = data.slice();
    second[at] ^= 1;
    const slice = (from, to) => new Blob([((from === 0 && (read += 1)) || read) > 1 ? second : data]).slice(from, to);
    return code(Lab.dispatch(name, {do: 'import', file: {size: data.length, slice}, passphrase}));
  };
  const race = async (name, intents) => { await Promise.all(intents.map((intent) => Lab.dispatch(name, intent))); };
  /** an import that ends before its last step */
  const half = async (name, data, passphrase) => {
    let steps = 0;
    const {store} = Lab.session(name);
    const dying = {...store, tx: (ops) => (ops.some((op) => op.del) ? new Promise(() => { steps = -1; }) : store.tx(ops))};
    Archive.restore(dying, new Blob([data]), passphrase, () => false);
    while (steps === 0) await new Promise((go) => { setTimeout(go); });
  };
  return {race, half, dump, flip, remove, keys, names, bytes, fault, take, tries, flips, cuts, fickle};
})();
"""

PHRASE = "four random words here"


@pytest.fixture(scope="session")
def disks() -> Iterator[Node]:
    names = tuple(name for name in blocks(PAGE.read_text("utf-8")) if re.match(CLIENT_BLOCKS, name))
    started = Node([*page_blocks(names), ("lab", LAB), ("disk", DISK)], LAB_GLOBALS)
    yield started
    started.close()


class Safe(Stage):
    """The laboratory with hands on the disks in it."""

    def disk(self, do: str, name: str, *given: object) -> Any:
        """Something done to a client's disk, beside the client."""
        return self.node.call(f"Disk.{do}", name, *given)

    def fault(self, who: str, do: str, **intent: Any) -> str:
        """The code that an intent is refused with, or ''."""
        said = self.node.call("Disk.fault", who, {"do": do, **intent})
        self._heed(who, self.node.call("Lab.out", who))
        return str(said)

    def at(self, name: str) -> str:
        return str(self.model(name)["at"])

    def shut(self, name: str) -> None:
        self.do(name, "lock")
        assert self.at(name) == "locked"

    def open(self, name: str, passphrase: str = PHRASE) -> None:
        self.do(name, "unlock", passphrase=passphrase)
        assert self.at(name) != "locked"

    def exported(self, name: str, **how: Any) -> bytes:
        blob = self.do(name, "export", passphrase=PHRASE, **how)
        return bytes(self.node.call("Disk.bytes", blob))

    def imported(self, name: str, data: bytes, passphrase: str = PHRASE) -> Any:
        told = self.node.call("Disk.take", name, data, passphrase)
        self._heed(name, self.node.call("Lab.out", name))
        return told


@pytest.fixture
def safe(disks: Node) -> Safe:
    return Safe(disks)


def with_passphrase(safe: Safe) -> tuple[str, list[str]]:
    """A room of two that have said something; the first one has a passphrase."""
    room, people = safe.meet("ana", "bob")
    safe.do(people[0], "send", text="before")
    safe.settle(10)
    safe.do(people[0], "passphrase", old="", next=PHRASE)
    return room, people


class TestPassphrase:
    """Set, changed, removed; locked and unlocked: without it there is no key, no room and no word on the wire."""

    def test_a_reload_is_locked_and_the_right_passphrase_brings_all_back(self, safe: Safe) -> None:
        room, people = with_passphrase(safe)
        safe.crash(people[0])
        assert (safe.at(people[0]), safe.model(people[0])["rooms"]) == ("locked", [])
        assert safe.model(people[0])["lock"]["set"]
        assert not [wire for wire in safe.wires.values() if wire.client == people[0]], "nothing is sent while locked"
        safe.crash(people[0])
        assert safe.at(people[0]) == "locked"
        safe.open(people[0])
        safe.do(people[0], "go", to={"at": "room", "id": room})
        safe.do(people[0], "send", text="after")
        safe.settle()
        agree(safe, room, people, ["before", "after"])

    def test_locking_ends_all_rooms_and_unlocking_leads_back_to_the_one_that_was_open(self, safe: Safe) -> None:
        room, people = with_passphrase(safe)
        safe.shut(people[0])
        safe.drain()
        assert not [wire for wire in safe.wires.values() if wire.client == people[0]]
        safe.do(people[1], "send", text="while locked")
        safe.settle(5)
        for intent in ({"do": "send", "text": "no"}, {"do": "export", "passphrase": PHRASE}, {"do": "lock"}):
            assert safe.fault(people[0], **intent) == "locked"
        safe.open(people[0])
        safe.settle()
        assert safe.room(people[0])["id"] == room
        agree(safe, room, people, ["before", "while locked"])

    def test_a_link_that_was_opened_while_locked_is_followed_after_unlocking(self, safe: Safe) -> None:
        _, people = with_passphrase(safe)
        link = safe.invite(people[0])
        zoe = f"zoe{next(SERIAL)}"
        safe.start(zoe)
        safe.do(zoe, "passphrase", old="", next=PHRASE)
        safe.crash(zoe)
        safe.do(zoe, "link", text=link)
        assert safe.at(zoe) == "locked"
        safe.open(zoe)
        assert safe.at(zoe) == "invited"
        safe.do(zoe, "join", name=zoe)
        safe.settle(6)
        assert safe.at(zoe) == "room"

    def test_it_is_changed_with_the_old_one_alone_and_removed_too(self, safe: Safe) -> None:
        _, (ana, _) = with_passphrase(safe)
        other = "another passphrase"
        for old in ("", "wrong", PHRASE + " "):
            assert safe.fault(ana, "passphrase", old=old, next=other) == "passphrase"
            assert safe.fault(ana, "passphrase", old=old, next="") == "passphrase"
        safe.do(ana, "passphrase", old=PHRASE, next=other)
        safe.crash(ana)
        assert safe.fault(ana, "unlock", passphrase=PHRASE) == "passphrase"
        safe.open(ana, other)
        safe.do(ana, "passphrase", old=other, next="")
        assert not safe.model(ana)["lock"]["set"]
        assert safe.fault(ana, "lock") == "no-passphrase"
        safe.crash(ana)
        assert safe.at(ana) == "room"

    @pytest.mark.parametrize("next_one", ["", "short", "1234567", "\U0001f600" * 7])
    def test_a_short_one_is_weak_and_changes_nothing(self, safe: Safe, next_one: str) -> None:
        ana = f"ana{next(SERIAL)}"
        safe.start(ana)
        before = safe.disk("dump", ana)
        assert safe.fault(ana, "passphrase", old="", next=next_one) == "weak"
        assert safe.fault(ana, "export", passphrase=next_one) == "weak"
        assert safe.disk("dump", ana) == before

    def test_two_unlocks_and_locks_at_once_end_as_the_last_one_says(self, safe: Safe) -> None:
        room, people = with_passphrase(safe)
        both = [{"do": "lock"}, {"do": "unlock", "passphrase": PHRASE}, {"do": "unlock", "passphrase": PHRASE}]
        safe.node.call("Disk.race", people[0], both)
        safe._heed(people[0], safe.node.call("Lab.out", people[0]))
        safe.settle()
        agree(safe, room, people, ["before"])

    def test_idle_minutes_lock_it_and_whoever_is_at_work_is_left_alone(self, safe: Safe) -> None:
        _, (ana, bob) = with_passphrase(safe)
        for wrong in (-1, 0.5, 1441, "5", None):
            assert safe.fault(ana, "autolock", minutes=wrong) == "bad"
        safe.do(ana, "autolock", minutes=5)
        for _ in range(3):
            safe.tick(200)
            safe.node.call("Lab.touch", ana)
        assert safe.at(ana) == "room"
        safe.do(bob, "send", text="that others talk is no work")
        safe.tick(299)
        assert safe.at(ana) == "room"
        safe.tick(2)
        assert safe.at(ana) == "locked"
        safe.open(ana)
        assert safe.model(ana)["lock"] == {"set": True, "minutes": 5}, "the minutes are kept"
        safe.tick(301)
        assert safe.at(ana) == "locked"

    def test_who_comes_back_from_a_sleep_finds_it_locked_before_any_timer_ran(self, safe: Safe) -> None:
        _, (ana, _) = with_passphrase(safe)
        safe.do(ana, "autolock", minutes=1)
        safe.node.call("Lab.advance", 3_600_000)
        safe.node.call("Lab.touch", ana)
        assert safe.at(ana) == "locked"

    def test_without_a_passphrase_or_minutes_nothing_locks(self, safe: Safe) -> None:
        ana = f"ana{next(SERIAL)}"
        safe.start(ana)
        safe.do(ana, "autolock", minutes=1)
        safe.tick(3600)
        assert safe.at(ana) == "start"
        safe.do(ana, "autolock", minutes=0)
        safe.do(ana, "passphrase", old="", next=PHRASE)
        safe.tick(3600)
        assert safe.at(ana) == "start"


def test_attack_39_a_wrong_passphrase_or_altered_records_overwrite_nothing(safe: Safe) -> None:
    """A thief of the disk guesses, flips bits of the wrapped key and of each record, and takes the key away.

    Mutation seen to fail here: Vault.open goes on with another key where the passphrase is wrong. Names left out of the
    AAD of records: TestStoreKey and TestStore fail.
    """
    room, (ana, bob) = with_passphrase(safe)
    safe.crash(ana)
    disk = safe.disk("dump", ana)
    for guess in ("", "wrong", PHRASE.upper(), PHRASE + " ", "x" * 10_000):
        assert safe.fault(ana, "unlock", passphrase=guess) == "passphrase"
    for at in (0, 1, 3, 4, 20, 21, 32, 33, 64, 80):
        safe.disk("flip", ana, "meta", ["key"], at)
        assert safe.fault(ana, "unlock", passphrase=PHRASE) in {"passphrase", "damaged"}
        assert (safe.at(ana), safe.model(ana)["rooms"]) == ("locked", [])
        safe.disk("flip", ana, "meta", ["key"], at)
    for part in ("me", "epoch", "core", "peers", "view"):
        for at in (0, 11, 12, 40, -1):
            safe.disk("flip", ana, "meta", f"room:{room}:{part}", at if at >= 0 else 30)
            assert safe.fault(ana, "unlock", passphrase=PHRASE) == "damaged"
            assert (safe.at(ana), safe.model(ana)["rooms"]) == ("locked", [])
            safe.disk("flip", ana, "meta", f"room:{room}:{part}", at if at >= 0 else 30)
    assert safe.disk("dump", ana) == disk
    safe.open(ana)
    safe.settle()
    agree(safe, room, [ana, bob], ["before"])


def test_attack_39_records_without_their_key_are_damaged_and_get_no_new_one(safe: Safe) -> None:
    """The store key is taken away. Mutation seen to fail: Store.keepKey puts a key whenever there is none."""
    _, (ana, _) = safe.meet("ana", "bob")
    safe.disk("remove", ana, "meta", ["key"])
    before = safe.disk("dump", ana)
    with pytest.raises(NodeBroken, match="the key of the stored records is gone"):
        safe.crash(ana)
    assert safe.disk("dump", ana) == before


def test_attack_39_an_altered_event_is_told_and_not_written_over(safe: Safe) -> None:
    """A bit of a stored event is flipped. Mutation seen to fail: Store.opened answers zero bytes."""
    _, (ana, _) = safe.meet("ana", "bob")
    safe.do(ana, "send", text="mine")
    safe.settle(10)
    safe.cut(ana)
    safe.disk("flip", ana, "events", None, 40)
    before = json.loads(safe.disk("dump", ana))[1]
    with pytest.raises(NodeBroken, match="does not open"):
        safe.crash(ana)
    assert json.loads(safe.disk("dump", ana))[1] == before


class TestErase:
    def test_nothing_is_left_and_the_page_begins_anew(self, safe: Safe) -> None:
        _, people = with_passphrase(safe)
        safe.do(people[0], "erase")
        assert (safe.at(people[0]), safe.model(people[0])["rooms"]) == ("start", [])
        assert safe.model(people[0])["lock"] == {"set": False, "minutes": 0}
        assert safe.disk("keys", people[0]) == ["key"], "a new store with a new key"
        safe.create(people[0], "Anew")
        assert safe.at(people[0]) == "room"

    def test_it_works_from_the_locked_screen(self, safe: Safe) -> None:
        _, people = with_passphrase(safe)
        safe.crash(people[0])
        safe.do(people[0], "erase")
        assert safe.at(people[0]) == "start"
        safe.crash(people[0])
        assert safe.at(people[0]) == "start"


class TestReminder:
    """An export is worth a reminder where the browser may throw the rooms away, and only then."""

    def remind(self, safe: Safe, name: str) -> bool:
        safe.do(name, "go", to={"at": "start"})
        return bool(safe.model(name)["storage"]["remind"])

    def test_it_comes_after_a_day_and_goes_for_thirty_with_an_export_or_a_no(self, safe: Safe) -> None:
        ana, day = f"ana{next(SERIAL)}", 86_400
        safe.start(ana)
        safe.tick(120)
        assert not self.remind(safe, ana), "there is nothing to lose"
        safe.create(ana)
        safe.tick(3700)
        assert not self.remind(safe, ana)
        safe.tick(day + 3700)
        safe.tick(1)
        assert self.remind(safe, ana)
        safe.do(ana, "dismissReminder")
        assert not self.remind(safe, ana)
        safe.tick(30 * day + 3700)
        assert self.remind(safe, ana)
        safe.do(ana, "export", passphrase=PHRASE)
        assert not self.remind(safe, ana)
        safe.crash(ana)
        safe.tick(120)
        assert not self.remind(safe, ana), "the export is remembered"

    def test_twenty_messages_are_enough_but_not_in_the_first_minute(self, safe: Safe) -> None:
        ana = f"ana{next(SERIAL)}"
        safe.start(ana)
        safe.create(ana)
        for n in range(20):
            safe.do(ana, "send", text=f"line {n}")
        safe.crash(ana)
        assert not self.remind(safe, ana)
        safe.tick(62)
        assert self.remind(safe, ana)


# ------------------------------------------------------------------------------------------------ export and import --
@dataclass(frozen=True)
class Export:
    """An export as README has it: magic, version, count, salt, and parts sealed so that none can go or move."""

    count: int
    salt: bytes
    parts: list[bytes]

    @staticmethod
    def aad(count: int, salt: bytes, index: int, last: bool) -> bytes:
        return E("export", u(4, count) + salt) + u(8, index) + u(1, int(last))

    @classmethod
    def open(cls, data: bytes, passphrase: str = PHRASE) -> Export:
        assert data[:5] == b"ZSRX\x01"
        count, salt, sealed, at = int.from_bytes(data[5:9], "big"), data[9:25], list[bytes](), 25
        while at < len(data):
            size = int.from_bytes(data[at : at + 4], "big")
            sealed.append(data[at + 4 : at + 4 + size])
            at += 4 + size
        key = AESGCM(hashlib.pbkdf2_hmac("sha256", passphrase.encode(), salt, count))
        opened = [
            key.decrypt(box[:12], box[12:], cls.aad(count, salt, index, index == len(sealed) - 1))
            for index, box in enumerate(sealed)
        ]
        return cls(count, salt, opened)

    def seal(self, passphrase: str = PHRASE) -> bytes:
        key = AESGCM(hashlib.pbkdf2_hmac("sha256", passphrase.encode(), self.salt, self.count))
        out, last = b"ZSRX\x01" + u(4, self.count) + self.salt, len(self.parts) - 1
        for index, part in enumerate(self.parts):
            nonce = os.urandom(12)
            out += large(nonce + key.encrypt(nonce, part, self.aad(self.count, self.salt, index, index == last)))
        return out

    def records(self) -> list[tuple[str, tuple[Any, ...]]]:
        return [record for part in self.parts for record in self.read(part)]

    @staticmethod
    def read(part: bytes) -> Iterator[tuple[str, tuple[Any, ...]]]:
        reader = io.BytesIO(part)

        def number(size: int) -> int:
            return int.from_bytes(reader.read(size), "big")

        while kind := reader.read(1):
            if kind == b"\x01":
                yield "meta", (reader.read(number(2)).decode(), reader.read(number(4)))
            elif kind == b"\x02":
                yield "event", (reader.read(32), number(8), reader.read(16), number(8), reader.read(number(4)))
            else:
                assert kind == b"\x03"
                yield "chunk", (reader.read(32), reader.read(32), number(4), reader.read(number(4)))

    @staticmethod
    def write(kind: str, fields: tuple[Any, ...]) -> bytes:
        *where, value = fields
        if kind == "meta":
            return bytes(b"\x01" + small(where[0].encode()) + large(value))
        if kind == "event":
            return bytes(b"\x02" + where[0] + u(8, where[1]) + where[2] + u(8, where[3]) + large(value))
        return bytes(b"\x03" + where[0] + where[1] + u(4, where[2]) + large(value))

    def split(self, each: int, count: int = 1) -> Export:
        """The same records under another key, some to a part."""
        records = [self.write(*record) for record in self.records()]
        parts = [b"".join(records[n : n + each]) for n in range(0, len(records), each)]
        return Export(count, os.urandom(16), parts or [b""])


def test_an_export_is_what_the_readme_says(safe: Safe) -> None:
    """The oracle opens it: every record, event and chunk of every room, and nothing of the store's own key."""
    room, (ana, bob) = safe.meet("ana", "bob")
    content = os.urandom(1_500_000)
    safe.do(bob, "send", text="hear, hear")
    safe.do(ana, "files", files=[{"name": "a.bin", "type": "", "bytes": content}])
    safe.settle(10)
    data = safe.exported(bob)
    export = Export.open(data)
    assert export.count == 600_000
    assert [len(part) > 2**20 for part in export.parts] == [True, False]
    metas = {fields[0]: fields[1] for kind, fields in export.records() if kind == "meta"}
    assert {f"room:{room}:{part}" for part in ("me", "epoch", "core", "peers", "view")} <= metas.keys()
    events = [fields for kind, fields in export.records() if kind == "event"]
    assert any(b"hear, hear" in value for *_, value in events)
    assert len(events) == len(safe.stored(bob, room))
    chunks = [fields for kind, fields in export.records() if kind == "chunk"]
    assert sum(len(value) for *_, value in chunks) == 1_500_000 + 40 + 6 * 16
    assert [n for _, _, n, _ in chunks] == list(range(6))
    without = Export.open(safe.exported(bob, files=False))
    assert [kind for kind, _ in without.records() if kind == "chunk"] == []
    with pytest.raises(InvalidTag):
        Export.open(data, PHRASE + " ")


def test_an_import_brings_everything_to_another_browser(safe: Safe) -> None:
    room, (ana, bob) = safe.meet("ana", "bob")
    new, content = f"new{next(SERIAL)}", os.urandom(300_000)
    for n in range(30):
        safe.do((ana, bob)[n % 2], "send", text=f"line {n}")
    safe.do(ana, "files", files=[{"name": "a.bin", "type": "", "bytes": content}])
    safe.settle(10)
    data = safe.exported(bob)
    safe.start(new)
    assert safe.imported(new, data) == {"added": 1, "kept": 0}
    assert safe.stored(new, room) == safe.stored(bob, room)
    safe.do(new, "go", to={"at": "room", "id": room})
    assert safe.texts(new) == safe.texts(bob)
    file = next(m["file"]["id"] for m in safe.room(new)["messages"] if m["file"])
    assert safe.node.call("Lab.blob", new, file) == content
    assert safe.imported(new, data) == {"added": 0, "kept": 1}
    safe.crash(new)
    assert safe.stored(new, room) == safe.stored(bob, room)


@pytest.mark.parametrize("who", ["receiver", "author"])
def test_a_photo_to_view_once_does_not_leave_by_an_export(safe: Safe, who: str) -> None:
    """Neither its bytes nor its key, by the oracle; the message says where it is, and nobody is asked for it."""
    room, (ana, bob) = safe.meet("ana", "bob")
    (new, again), name = fresh("new", "again"), bob if who == "receiver" else ana
    content, photo = os.urandom(300_000), {"name": "photo.jpeg", "type": "image/jpeg", "bytes": os.urandom(5000)}
    safe.do(ana, "files", files=[{"name": "a.bin", "type": "", "bytes": content}])
    safe.settle(10)
    safe.do(ana, "files", files=[photo], once=True)
    safe.settle(10)
    assert any("image/jpeg" in str(m["file"]) for m in safe.room(name)["messages"])
    data = safe.exported(name)
    records = Export.open(data).records()
    assert len([kind for kind, _ in records if kind == "chunk"]) == 2
    assert len([1 for kind, fields in records if kind == "meta" and ":file:" in fields[0]]) == 1
    events = [fields[-1] for kind, fields in records if kind == "event"]
    assert len(events) == len(safe.stored(name, room)), "its header is there: no chain has a gap"
    assert not any(b"image/jpeg" in value for value in events)
    safe.start(new)
    safe.imported(new, data)
    safe.do(new, "go", to={"at": "room", "id": room})
    for _ in range(2):
        (shown,) = [m for m in safe.room(new)["messages"] if m["kind"] == "away"]
        assert (shown["author"], shown["file"], shown["once"]) == (ana, None, False)
        assert [m["file"]["name"] for m in safe.room(new)["messages"] if m["file"]] == ["a.bin"]
        safe.settle(30)
    assert safe.state(new, room)["lacking"] == []
    safe.start(again)
    safe.imported(again, safe.exported(new))
    safe.do(again, "go", to={"at": "room", "id": room})
    assert [m["kind"] for m in safe.room(again)["messages"]].count("away") == 1


class TestRelink:
    """What comes from an export speaks as a new device, which puts the old one out."""

    LINES = ("one", "two", "three", "four")

    def scene(self, safe: Safe) -> tuple[str, str, str, str]:
        """Ana's room with Bob, who have talked, and an empty browser."""
        room, (ana, bob) = safe.meet("ana", "bob")
        for n, text in enumerate(self.LINES):
            safe.do((ana, bob)[n % 2], "send", text=text)
        safe.settle(10)
        (new,) = fresh("new")
        safe.start(new)
        return room, ana, bob, new

    def bring(self, safe: Safe, new: str, data: bytes, room: str) -> None:
        safe.imported(new, data)
        safe.do(new, "go", to={"at": "room", "id": room})

    def linked(self, safe: Safe, room: str, old: tuple[str, int], here: list[str], texts: list[str]) -> None:
        """All agree, in one order, and the old device has said nothing since the export and is out."""
        agree(safe, room, here, texts)
        for name in here:
            rows = safe.stored(name, room)
            assert max(row[2] for row in rows if row[1] == old[0]) <= old[1], "the old key has signed something"
            assert old[0] not in safe.state(name, room)["devices"]
            assert [m["devices"] for m in safe.room(name)["members"]] == [1] * len(here)
            assert not safe.room(name)["restored"]

    def muted(self, safe: Safe, new: str, old: str) -> None:
        """As the old device this browser has posted nothing and told no vector."""
        dev, seen = "", set[str]()
        for frame in safe.up[new]:
            if isinstance(frame, zsr.UpLogin):
                dev = zsr.decode(zsr.Login, frame.m).dev.hex()
                seen.add(dev)
            tells = isinstance(frame, zsr.UpPost) or (isinstance(frame, zsr.UpLive) and frame.type == 2)
            assert not (dev == old and tells)
        assert len(seen) == 2

    def last(self, safe: Safe, name: str, room: str) -> tuple[str, int]:
        state = safe.state(name, room)
        return state["dev"], state["next"] - 1

    @pytest.mark.parametrize("mover", ["member", "creator"])
    @pytest.mark.parametrize("original", ["gone", "online"])
    def test_a_browser_goes_on_where_the_export_ended(self, safe: Safe, mover: str, original: str) -> None:
        """Mutations seen to fail: no `view.next` in Events.make, Delivery.post, Delivery.vector; no b.anew in become."""
        room, ana, bob, new = self.scene(safe)
        who, other = (bob, ana) if mover == "member" else (ana, bob)
        safe.cut(who)
        safe.do(who, "send", text="in the outbox")
        old, data = self.last(safe, who, room), safe.exported(who)
        rows = safe.stored(who, room)
        if original == "gone":
            safe.away(who)
        self.bring(safe, new, data, room)
        assert safe.stored(new, room) == rows
        shown = safe.room(new)
        assert (shown["restored"], [note["text"] for note in shown["notes"]]) == (True, ["restored"])
        for intent in ({"do": "send", "text": "no"}, {"do": "retitle", "title": "no"}, {"do": "rename", "name": "no"}):
            assert safe.fault(new, **intent) == "restored"
        safe.settle(30)
        shown = safe.room(new)
        assert (shown["restored"], shown["notes"], shown["state"]) == (False, [], "member")
        assert [shown["me"][what] for what in ("name", "admin", "creator")] == [who, *[mover == "creator"] * 2]
        assert [row for row in safe.stored(new, room) if row[:3] in [r[:3] for r in rows]] == rows
        safe.do(new, "send", text="from the new one")
        safe.do(other, "send", text="heard")
        safe.settle(30)
        here = [other, new]
        self.muted(safe, new, old[0])
        self.linked(safe, room, old, here, [*self.LINES, "in the outbox", "from the new one", "heard"])
        if original == "online":
            for _ in range(3):
                safe.settle(60)
            shown = safe.room(who)
            assert (shown["state"], [note["text"] for note in shown["notes"]]) == ("removed", ["unlinked"])
            assert "heard" not in safe.texts(who)
        if mover == "creator":
            safe.do(new, "makeAdmin", member=safe.member(new, bob)["id"])
            safe.settle(10)
            assert safe.room(bob)["me"]["admin"]

    def test_a_member_waits_for_an_admin_and_both_browsers_say_what_is_going_on(self, safe: Safe) -> None:
        """Mutation seen to fail: no Door.stepBack, so that both put each other out for ever."""
        room, ana, bob, new = self.scene(safe)
        safe.away(ana)
        old = self.last(safe, bob, room)
        self.bring(safe, new, safe.exported(bob), room)
        safe.settle(10)
        (note,) = safe.room(new)["notes"]
        assert (note["text"], note["params"]) == ("restored.waits", {"names": ana})
        assert safe.room(bob)["connection"]["why"] == "replaced"
        safe.up.clear()
        for _ in range(15):
            safe.settle(60)
        logins = [len([f for f in safe.up.get(name, []) if isinstance(f, zsr.UpLogin)]) for name in (bob, new)]
        assert 1 <= max(logins) <= 6, "each lets the other be for longer and longer"
        safe.crash(new)
        safe.start(ana)
        for _ in range(3):
            safe.settle(60)
        safe.do(new, "send", text="let in")
        safe.settle(20)
        self.linked(safe, room, old, [ana, new], [*self.LINES, "let in"])

    def test_who_is_alone_needs_nobody_and_a_second_import_of_one_export_is_told(self, safe: Safe) -> None:
        ana, new, third = fresh("ana", "new", "third")
        safe.start(ana, new, third)
        room = safe.create(ana)
        safe.do(ana, "send", text="alone")
        safe.settle(5)
        old, data = self.last(safe, ana, room), safe.exported(ana)
        safe.do(ana, "rotate")
        safe.settle(5)
        safe.away(ana)
        self.bring(safe, new, data, room)
        safe.settle(30)
        safe.do(new, "send", text="on the new one")
        safe.settle(5)
        self.linked(safe, room, old, [new], ["alone", "on the new one"])
        assert [safe.room(new)["me"][what] for what in ("admin", "creator")] == [True, True]
        self.bring(safe, third, data, room)
        safe.settle(30)
        assert safe.room(third)["state"] == "removed"
        assert safe.texts(third) == ["alone"]

    @pytest.mark.parametrize(("mover", "lost"), [("member", True), ("creator", False)])
    def test_killed_at_any_step_it_ends_well(self, safe: Safe, mover: str, lost: bool) -> None:
        """After each message that comes in; lost: what it made of that is stored, but was never sent."""
        room, ana, bob, new = self.scene(safe)
        who, other = (bob, ana) if mover == "member" else (ana, bob)
        texts, steps = list(self.LINES), 0
        for step in range(60):
            old, data = self.last(safe, who, room), Export.open(safe.exported(who)).split(1000).seal()
            safe.away(who)
            self.bring(safe, new, data, room)
            steps = self.kill_at(safe, new, step, lost)
            safe.settle(40)
            safe.do(new, "send", text=f"step {step}")
            safe.settle(20)
            texts.append(f"step {step}")
            self.linked(safe, room, old, [other, new], texts)
            if steps < step:
                break
            who, (new,) = new, fresh("new")
            safe.start(new)
        assert 5 < steps < 60

    def kill_at(self, safe: Safe, new: str, step: int, lost: bool) -> int:
        """Deliver; the step-th message to the new browser is its last one. How many there were."""
        steps = 0
        for _ in range(400):
            moves = safe.moves()
            if not moves:
                return steps
            kind, wire = safe.dice.choice(moves)
            mine = kind == "down" and safe.wires[wire].client == new
            if mine and steps == step:
                safe.node.call("Lab.mute", new, lost)
            safe.move(kind, wire)
            if mine and steps == step:
                safe.crash(new)
                return steps
            steps += mine
        raise AssertionError("the conversation never comes to rest")


@pytest.fixture(scope="module")
def sample(disks: Node) -> bytes:
    """A small export in four parts or more, under a key that is quickly derived."""
    safe, ana = Safe(disks), f"ana{next(SERIAL)}"
    safe.start(ana)
    safe.create(ana)
    safe.do(ana, "send", text="kept")
    return Export.open(safe.exported(ana)).split(2).seal()


class TestAltered:
    """Attack 39 on an export: whatever is done to it, nothing is written and the fault has a name.

    Mutations seen to fail: a survey of the first part alone; no sweep when an import breaks off. The AAD of
    Suite.exportBox without the index, the last one or the head: the oracle does not open it."""

    @pytest.fixture
    def new(self, safe: Safe) -> Iterator[str]:
        name = f"new{next(SERIAL)}"
        safe.start(name)
        before = safe.disk("dump", name)
        yield name
        assert safe.disk("dump", name) == before
        assert safe.model(name)["rooms"] == []

    def test_attack_39_no_flipped_byte_passes(self, safe: Safe, new: str, sample: bytes) -> None:
        three = Export(1, bytes(16), [b"", b"", b""]).seal()
        for data, step in ((three, 1), (sample, 7)):
            said = safe.disk("flips", new, data, PHRASE, step)
            assert set(said) <= {"passphrase", "archive"}
            assert sum(said.values()) == -(-len(data) // step)

    def test_attack_39_no_cut_passes(self, safe: Safe, new: str, sample: bytes) -> None:
        three = Export(1, bytes(16), [b"", b"", b""]).seal()
        for data, step in ((three, 1), (sample, 7)):
            said = safe.disk("cuts", new, data, PHRASE, step)
            assert set(said) <= {"passphrase", "archive"}
            assert sum(said.values()) == -(-len(data) // step)

    @given(data=st.data())
    @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    def test_attack_39_no_other_order_of_parts_passes(
        self, safe: Safe, new: str, sample: bytes, data: st.DataObject
    ) -> None:
        head, rest, parts = sample[:25], sample[25:], list[bytes]()
        while rest:
            size = 4 + int.from_bytes(rest[:4], "big")
            parts.append(rest[:size])
            rest = rest[size:]
        order = data.draw(st.lists(st.sampled_from(range(len(parts))), max_size=len(parts) + 1))
        if order != list(range(len(parts))):
            other = head + b"".join(parts[n] for n in order)
            assert set(safe.disk("tries", new, [other], PHRASE)) <= {"passphrase", "archive"}

    @pytest.mark.parametrize(
        "data",
        [b"", b"ZSRX", b"ZSRX\x01" + bytes(20), b"ZSRX\x02" + bytes(60), b"PK\x03\x04" * 20]
        + [b"ZSRX\x01" + u(4, count) + bytes(16) + large(bytes(40)) for count in (0, 2**32 - 1, 10_000_001)],
    )
    def test_attack_39_what_is_no_export_is_refused(self, safe: Safe, new: str, data: bytes) -> None:
        assert set(safe.disk("tries", new, [data], PHRASE)) == {"archive"}

    @pytest.mark.parametrize("phrase", ["", "wrong passphrase", PHRASE + " "])
    def test_attack_39_a_wrong_passphrase_is_named(self, safe: Safe, new: str, sample: bytes, phrase: str) -> None:
        assert safe.disk("tries", new, [sample], phrase) == {"passphrase": 1}

    def test_attack_39_rooms_that_could_not_be_opened_are_refused(self, safe: Safe, new: str, sample: bytes) -> None:
        export = Export.open(sample)
        for left_out in ("me", "view"):
            records = [r for r in export.records() if not r[1][0] or not str(r[1][0]).endswith(f":{left_out}")]
            parts = [Export.write(*record) for record in records]
            assert safe.disk("tries", new, [Export(1, bytes(16), parts).seal()], PHRASE) == {"archive": 1}
        for stray in (b"\x04", b"\x01" + small(b"settings") + large(b"{}"), b"\x02" + bytes(31)):
            parts = [*export.parts, stray]
            assert safe.disk("tries", new, [Export(1, bytes(16), parts).seal()], PHRASE) == {"archive": 1}

    def test_attack_39_a_file_that_changes_while_it_is_read_leaves_nothing(
        self, safe: Safe, new: str, sample: bytes
    ) -> None:
        for at in (20, 30, len(sample) // 2, len(sample) - 1):
            assert safe.disk("fickle", new, sample, at, PHRASE) in {"passphrase", "archive"}
            assert safe.disk("keys", new) == ["key"]


def test_an_import_that_a_crash_cut_short_leaves_nothing(safe: Safe, sample: bytes) -> None:
    new = f"new{next(SERIAL)}"
    safe.start(new)
    before = safe.disk("dump", new)
    safe.node.call("Disk.half", new, sample, PHRASE)
    assert safe.disk("dump", new) != before
    safe.crash(new)
    assert safe.disk("dump", new) == before
    assert safe.imported(new, sample) == {"added": 1, "kept": 0}
    safe.crash(new)
    assert safe.model(new)["rooms"][0]["title"] == "Boat"


def test_what_the_oracle_packs_the_page_takes(safe: Safe, sample: bytes) -> None:
    for each in (1, 3, 1000):
        new = f"new{next(SERIAL)}"
        safe.start(new)
        assert safe.imported(new, Export.open(sample).split(each, 2).seal()) == {"added": 1, "kept": 0}


# ======================================================================================================================
# Socket: the relay as a process, over real TLS. Options, certificate, page, origins, limits, slow readers, the end.
# ======================================================================================================================


class Served(Protocol):
    """Where a caller finds a relay."""

    def socket_url(self, room_path: str) -> str: ...
    def trust(self) -> ssl.SSLContext | None: ...


class Caller:
    """A client that speaks frames. Frames that came with others wait for the next `hear`."""

    socket: ClientConnection

    def __init__(self, relay: Served, room_path: str, **options: Any) -> None:
        usual: dict[str, Any] = {"compression": None, "proxy": None, "max_size": None, "close_timeout": 1}
        self.connection = connect_socket(relay.socket_url(room_path), ssl=relay.trust(), **(usual | options))
        self.waiting: list[Any] = []
        self.passed: list[Any] = []
        self.sizes: list[int] = []  # frames in each message

    def __enter__(self) -> Caller:
        self.socket = self.connection.__enter__()
        return self

    def __exit__(self, *what: Any) -> None:
        self.connection.__exit__(*what)

    def say(self, *frames: Any) -> None:
        self.socket.send(message_of(*frames))

    def hear(self, kind: type[T], timeout: float = PATIENCE) -> T:
        """The next frame of this kind; what comes before it is passed over."""
        while True:
            while self.waiting:
                frame = self.waiting.pop(0)
                if isinstance(frame, kind):
                    return frame
                self.passed.append(frame)
            message = self.socket.recv(timeout)
            assert isinstance(message, bytes)
            self.waiting = [zsr.decode_frame(data) for data in zsr.split_frames(message)]
            self.sizes.append(len(self.waiting))

    def login(self, keys: Keys) -> zsr.DownRelay:
        self.say(zsr.UpNonce(os.urandom(32)))
        said = self.hear(zsr.DownRelay)
        self.say(login(keys, said.m, "127.0.0.1"))
        return said

    def hello(self, keys: Keys, made: Made | None, cursor: int = 0) -> zsr.DownReady:
        said = self.login(keys)
        self.say(zsr.UpHello(said.run, cursor, made.full if made else b"", (leaf(keys),), (), (), (), ()))
        return self.hear(zsr.DownReady)

    def closed(self, timeout: float = PATIENCE) -> int:
        """The code with which the relay ends this socket."""
        end = time.monotonic() + timeout
        with contextlib.suppress(ConnectionClosed):
            while True:
                self.socket.recv(max(0.0, end - time.monotonic()))
        assert self.socket.close_code is not None
        return self.socket.close_code


@contextlib.contextmanager
def present(relay: Served, keys: Keys, made: Made | None) -> Iterator[Caller]:
    with Caller(relay, zsr.b64u(keys.room)) as caller:
        caller.hello(keys, made)
        yield caller


@contextlib.contextmanager
def three(relay: Served, home: House) -> Iterator[tuple[Caller, Caller, Caller]]:
    with contextlib.ExitStack() as stack:
        ann = stack.enter_context(present(relay, home.ann, home.made))
        ben = stack.enter_context(present(relay, home.ben, None))
        yield ann, ben, stack.enter_context(present(relay, home.cat, None))


def envelope(home: House, size: int, ref: int = 1) -> zsr.UpPost:
    return zsr.UpPost(ref, home.made.body.epoch, home.made.ch, bytes(size))


def run_relay(*options: str, env: dict[str, str] | None = None, code: str = "") -> subprocess.CompletedProcess[str]:
    """The relay with options that make it end at once."""
    command = [sys.executable, *(["-c", code] if code else [str(RELAY)]), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, env=relay_environment(env or {}))


def trust_text(relay: Relay) -> str:
    """What stands in /trust, without its markup."""
    reply = relay.get("/trust")
    assert reply.status == 200
    return html.unescape(re.sub(r"<[^>]*>", "", re.sub(r"<style>.*</style>", "", reply.body.decode(), flags=re.DOTALL)))


# ------------------------------------------------------------------------------------------------------- the command --


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--port", "99999"], "argument --port: '99999' is not a port from 0 to 65535"),
        (["--port", "-1"], "argument --port: '-1' is not a port from 0 to 65535"),
        (["--port", "http"], "argument --port: 'http' is not a port from 0 to 65535"),
        (["--ttl", "soon"], "argument --ttl: 'soon' is not a time such as"),
        (["--ttl", "0h"], "argument --ttl: '0h' is not a time such as"),
        (["--max-memory", "lots"], "argument --max-memory: 'lots' is not a size such as 64M or 1G"),
        (["--max-file", "0"], "argument --max-file: '0' is not a size"),
        (["--max-file", "1G"], "--max-file 1G does not fit a room's memory: raise --max-room-memory"),
        (["--max-memory", "64M", "--max-room-memory", "65M"], "--max-room-memory 65M is above --max-memory 64M"),
        (["--name", "https://chat.example.org"], "argument --name: 'https://chat.example.org' is not a host name"),
        (["--log-level", "loud"], "argument --log-level: 'loud' is not one of debug, info, warning, error"),
        (["--cert", "cert.pem"], "--cert and --key go together"),
        (["--plain", "--cert", "a", "--key", "b"], "--plain speaks no TLS"),
        (
            ["--local-ca", "--cert", "a", "--key", "b"],
            "--local-ca makes a certificate of the relay's own: --cert brings",
        ),
        (
            ["--local-ca", "--plain"],
            "--local-ca makes a certificate of the relay's own: --plain speaks no TLS; leave out",
        ),
        (["--plain", "--host", "0.0.0.0"], "--plain on 0.0.0.0 would send everything unencrypted"),
        (["--host", "/run/zsr.sock"], "--host /run/zsr.sock is a Unix socket, for a proxy that has the certificate"),
        (["--plain", "--host", "/nowhere/zsr.sock"], "cannot listen on /nowhere/zsr.sock: No such file or directory"),
        (["--plain", "--host", "example.org"], "--plain on example.org would send everything unencrypted"),
        (["--page", "/nowhere/index.html"], "page /nowhere/index.html cannot be read (No such file or directory)"),
        (["--limit", "romms=5"], "argument --limit: 'romms=5' names no limit; is it rooms?"),
        (["--limit", "rooms=many"], "argument --limit: 'many' is not a size"),
        (["--limit", "file_share=2"], "argument --limit: 'file_share=2' is a share: it must be below 1"),
        (
            ["--trusted-proxy", "proxy.example"],
            "argument --trusted-proxy: 'proxy.example' is not an address or network",
        ),
        (["--bogus"], "unrecognized arguments: --bogus"),
        (["--max-mem", "1G"], "unrecognized arguments: --max-mem 1G"),
    ],
)
def test_a_bad_option_is_one_line_and_exit_2(options: list[str], complaint: str, tmp_path: Path) -> None:
    ended = run_relay("--state-dir", str(tmp_path), *options)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.count("\n") == 1
    assert ended.stderr.startswith("zerosecretroom: ")
    assert complaint in ended.stderr


@pytest.mark.parametrize(
    ("variable", "value", "complaint"),
    [
        ("ZSR_PORT", "x", "ZSR_PORT: 'x' is not a port"),
        ("ZSR_LOCAL_CA", "maybe", "ZSR_LOCAL_CA: 'maybe' is neither 1 nor 0"),
        ("ZSR_PLAIN", "maybe", "ZSR_PLAIN: 'maybe' is neither 1 nor 0"),
        ("ZSR_MAX_ROOM_MEMORY", "-5M", "ZSR_MAX_ROOM_MEMORY: '-5M' is not a size"),
        ("ZSR_NAME", "good.example, b@d", "ZSR_NAME: 'b@d' is not a host name"),
    ],
)
def test_a_bad_variable_is_one_line_and_exit_2(variable: str, value: str, complaint: str) -> None:
    ended = run_relay(env={variable: value})
    assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (2, "", 1)
    assert complaint in ended.stderr


def test_every_option_has_a_variable_and_the_command_line_wins() -> None:
    environ = {
        "ZSR_HOST": "127.0.0.1",
        "ZSR_PORT": "1",
        "ZSR_NAME": "A.example,[2001:DB8::1]",
        "ZSR_STATE_DIR": "/s",
        "ZSR_CERT": "/c",
        "ZSR_KEY": "/k",
        "ZSR_LOCAL_CA": "0",
        "ZSR_PAGE": "/p",
        "ZSR_TTL": "2h",
        "ZSR_MAX_MEMORY": "2G",
        "ZSR_MAX_ROOM_MEMORY": "1G",
        "ZSR_MAX_FILE": "128MiB",
        "ZSR_LIMIT": "rooms=9,head-seconds=2m",
        "ZSR_TRUSTED_PROXY": "127.0.0.1, 10.0.0.0/8",
        "ZSR_MONITOR": "192.0.2.7",
        "ZSR_STATUS": "0",
        "ZSR_LOG_JSON": "1",
        "ZSR_LOG_ADDRESSES": "1",
        "ZSR_ALLOW_NULL_ORIGIN": "yes",
        "ZSR_PLAIN": "0",
        "ZSR_LOOP": "UVLOOP",
        "ZSR_LOG_LEVEL": "DEBUG",
    }
    options = zsr.read_options([], environ)
    assert (options.host, options.port, options.name) == ("127.0.0.1", 1, ["a.example", "2001:db8::1"])
    paths = [options.state_dir, options.cert, options.key, options.page]
    assert paths == [Path("/s"), Path("/c"), Path("/k"), Path("/p")]
    limits = options.limits
    assert (limits.ttl, limits.max_memory) == (7200, 2 << 30)
    assert (limits.max_room_memory, limits.max_file) == (1 << 30, 128 << 20)
    assert (options.allow_null_origin, options.plain, options.log_level) == (True, False, "debug")
    assert not options.local_ca
    assert (options.log_json, options.log_addresses, options.status, options.loop) == (True, True, False, "uvloop")
    assert (limits.rooms, limits.head_seconds) == (9, 120.0)
    assert list(map(str, options.trusted_proxy)) == ["127.0.0.1/32", "10.0.0.0/8"]
    assert zsr.read_options([], {"ZSR_LOCAL_CA": "1"}).local_ca
    named = {action.dest for action in zsr.make_parser({})._actions} - {"help", "version"}
    assert {"ZSR_" + name.upper() for name in named} == set(environ)
    assert zsr.read_options(["--port", "2", "--ttl", "90"], environ).port == 2
    assert zsr.read_options(["--name", "b.example"], environ).name[-1] == "b.example"


@pytest.mark.parametrize(
    ("text", "size"),
    [("64M", 64 << 20), ("1g", 1 << 30), ("1.5K", 1536), ("7", 7), ("2 MiB", 2 << 20), ("1T", 1 << 40)],
)
def test_sizes_are_read_as_people_write_them(text: str, size: int) -> None:
    assert zsr.parse_size(text) == size


@pytest.mark.parametrize(("text", "seconds"), [("90", 90), ("90s", 90), ("1.5h", 5400), ("30m", 1800), ("7d", 604800)])
def test_times_are_read_as_people_write_them(text: str, seconds: float) -> None:
    assert zsr.parse_span(text) == seconds


def test_limits_that_were_not_set_shrink_to_fit() -> None:
    limits = zsr.read_options(["--max-memory", "16M"], {}).limits
    assert limits.max_room_memory == 16 << 20
    assert limits.max_file <= limits.max_room_memory * limits.file_share


def test_the_version_is_told() -> None:
    ended = run_relay("--version")
    assert (ended.returncode, ended.stdout) == (0, f"zerosecretroom {zsr.VERSION}\n")


@pytest.mark.parametrize("package", ["websockets", "cryptography"])
def test_a_missing_package_is_named_with_the_command_that_installs_it(package: str) -> None:
    hide = f"import runpy, sys; sys.modules[{package!r}] = None; runpy.run_path({str(RELAY)!r}, run_name='__main__')"
    ended = run_relay(code=hide)
    assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (2, "", 1)
    assert package in ended.stderr
    assert "-m pip install 'websockets>=15,<18' 'cryptography>=46'" in ended.stderr


def test_an_older_python_is_told_what_is_needed() -> None:
    ast.parse(RELAY.read_text(), feature_version=(3, 8))  # it must get as far as the check
    old = "import runpy, sys; sys.version_info = (3, 9, 1); "
    ended = run_relay(code=f"{old}runpy.run_path({str(RELAY)!r}, run_name='__main__')")
    assert ended.returncode == 2
    assert "needs Python 3.10 or newer, this is 3.9: install a newer one, or start it with: uv run " in ended.stderr


def test_the_inline_metadata_is_what_the_check_says() -> None:
    metadata = re.search(r"^# /// script\n(.*?)^# ///$", RELAY.read_text(), re.MULTILINE | re.DOTALL)
    assert metadata
    assert 'requires-python = ">=3.10"' in metadata[1]
    assert 'dependencies = ["websockets>=15,<18", "cryptography>=46"]' in metadata[1]


def test_a_taken_port_is_told_in_one_line(lasting_relay: Relay, tmp_path: Path) -> None:
    ended = run_relay(
        "--host", "127.0.0.1", "--port", str(lasting_relay.port), "--state-dir", str(tmp_path), "--page", str(PAGE)
    )
    assert ended.returncode == 2
    assert f"cannot listen on 127.0.0.1 port {lasting_relay.port}: another program has it" in ended.stderr


def test_the_start_tells_where_to_go_and_what_to_compare(lasting_relay: Relay) -> None:
    told = lasting_relay.out.read_text()
    assert f"open         https://127.0.0.1:{lasting_relay.port}/\n" in told
    assert f"demo room    https://127.0.0.1:{lasting_relay.port}/#aaa" in told
    der = ssl.PEM_cert_to_DER_cert((lasting_relay.state / zsr.TLS_CERT).read_text())
    assert f"SHA-256 {hashlib.sha256(der).digest().hex(':').upper()}\n" in told
    assert f"trust        https://127.0.0.1:{lasting_relay.port}/trust explains it" in told
    assert f"page         SHA-256 {hashlib.sha256(lasting_relay.get().body).hexdigest()}\n" in told
    assert "--name HOST" in told


def test_names_close_the_note_and_are_offered_first(tmp_path: Path) -> None:
    relay = Relay(tmp_path, "--name", "chat.example", "--name", "2001:db8::7").start()
    try:
        told = relay.out.read_text()
        assert told.index(f"https://chat.example:{relay.port}/") < told.index(f"https://[2001:db8::7]:{relay.port}/")
        assert "--name HOST" not in told
        with Caller(relay, zsr.b64u(bytes(32))) as caller:
            caller.login(new_device(bytes(32)))
            assert caller.hear(zsr.DownFault).code == "host"
    finally:
        relay.kill()


def test_all_addresses_of_the_machine_are_offered_unless_one_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    options = zsr.read_options(["--port", "0"], {})
    with zsr.listen(options.host, 0) as listener:
        port = listener.getsockname()[1]
        urls = zsr.addresses(options, listener)
        assert urls == [
            *(f"https://{zsr.in_url(each)}:{port}/" for each in zsr.own_addresses()),
            f"https://localhost:{port}/",
        ]
        with socket.create_connection(("127.0.0.1", port)):
            pass


# --------------------------------------------------------------------------------------------------- the certificate --

NOW = datetime.datetime(2030, 1, 1, tzinfo=datetime.timezone.utc)


def test_the_certificate_is_what_browsers_take() -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    made = zsr.build_certificate(key, ["localhost", "192.0.2.1", "::1", "chat.example"], NOW)
    extensions = made.extensions
    names = extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["chat.example", "localhost"]
    assert set(map(str, names.get_values_for_type(x509.IPAddress))) == {"192.0.2.1", "::1"}
    assert list(extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) == [x509.OID_SERVER_AUTH]
    assert not extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert made.not_valid_before_utc < NOW
    assert made.not_valid_after_utc - made.not_valid_before_utc <= datetime.timedelta(days=825)
    made.verify_directly_issued_by(made)


def test_a_certificate_is_kept_until_it_ends_soon_or_names_are_added_and_always_with_its_key(tmp_path: Path) -> None:
    first = zsr.load_or_make_certificate(tmp_path, ["localhost"], NOW)
    assert zsr.load_or_make_certificate(tmp_path, ["localhost"], NOW + datetime.timedelta(days=700)) == first
    wider = zsr.load_or_make_certificate(tmp_path, ["localhost", "192.0.2.9"], NOW)
    assert wider != first
    assert zsr.load_or_make_certificate(tmp_path, ["localhost"], NOW) == wider
    later = zsr.load_or_make_certificate(tmp_path, ["localhost"], NOW + datetime.timedelta(days=800))
    assert later.not_valid_after_utc > wider.not_valid_after_utc
    assert first.public_key() == wider.public_key() == later.public_key()


def test_a_certificate_of_another_key_or_a_damaged_one_is_made_anew(tmp_path: Path) -> None:
    first = zsr.load_or_make_certificate(tmp_path, ["localhost"], NOW)
    (tmp_path / zsr.TLS_KEY).unlink()
    second = zsr.load_or_make_certificate(tmp_path, ["localhost"], NOW)
    assert first.public_key() != second.public_key()
    (tmp_path / zsr.TLS_CERT).write_text("rubbish")
    assert zsr.load_or_make_certificate(tmp_path, ["localhost"], NOW).public_key() == second.public_key()


# ------------------------------------------------------------------------------------------------------ the local CA --

OWN = zsr.LOOPBACK | {"chat.example", "192.0.2.1", "2001:db8::7"}


def make_authority(state: Path, needed: Iterable[str] = OWN, now: datetime.datetime = NOW) -> zsr.Authority:
    return zsr.load_or_make_authority(state, frozenset(needed), frozenset(), now)


def pem(*certificates: x509.Certificate) -> bytes:
    return b"".join(each.public_bytes(serialization.Encoding.PEM) for each in certificates)


def is_trusted(name: str, authority: x509.Certificate, leaf: x509.Certificate, now: datetime.datetime = NOW) -> bool:
    """Whether a device that trusts this CA alone takes the leaf for a server of that name: two verifiers, one answer."""
    subject = x509.IPAddress(ipaddress.ip_address(name)) if zsr.is_address(name) else x509.DNSName(name)
    policy = verification.PolicyBuilder().store(verification.Store([authority])).time(now)
    try:
        policy.build_server_verifier(subject).verify(leaf, [])
        trusted = True
    except verification.VerificationError:
        trusted = False
    assert openssl_trusts(name, authority, leaf, now) == trusted
    return trusted


def openssl_trusts(
    name: str, authority: x509.Certificate, leaf: x509.Certificate, now: datetime.datetime, between: bytes = b""
) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        for file, content in (("ca", pem(authority)), ("leaf", pem(leaf)), ("between", between or pem(leaf))):
            Path(folder, file).write_bytes(content)
        kind = "-verify_ip" if zsr.is_address(name) else "-verify_hostname"
        command = f"openssl verify -x509_strict -purpose sslserver -no-CApath -no-CAstore -attime {now.timestamp():.0f}"
        asked = [*command.split(), kind, name, "-CAfile", "ca", "-untrusted", "between", "leaf"]
        ended = subprocess.run(asked, cwd=folder, capture_output=True, text=True, timeout=PATIENCE)
    assert "error" in ended.stderr or ended.stdout == "leaf: OK\n", ended
    return ended.returncode == 0


@pytest.mark.parametrize("name", sorted(OWN))
def test_a_device_with_the_local_ca_trusts_the_relay_under_each_of_its_names(name: str, tmp_path: Path) -> None:
    authority = make_authority(tmp_path)
    leaf = zsr.load_or_make_certificate(tmp_path, OWN, NOW, authority)
    assert is_trusted(name, authority.certificate, leaf)
    assert not is_trusted(name, make_authority(tmp_path, {"other.example"}).certificate, leaf)


@pytest.mark.parametrize("name", ["bank.example", "example", "notchat.example", "192.0.2.2", "2001:db8::8"])
@pytest.mark.parametrize("beside", [(), ("chat.example", "192.0.2.1")])
def test_a_stolen_ca_key_vouches_for_no_other_place(name: str, beside: tuple[str, ...], tmp_path: Path) -> None:
    authority = make_authority(tmp_path)
    forged = zsr.build_certificate(ec.generate_private_key(ec.SECP256R1()), [name, *beside], NOW, authority)
    assert not is_trusted(name, authority.certificate, forged)
    for each in beside:
        assert not is_trusted(each, authority.certificate, forged)


def test_a_local_ca_makes_no_other_ca(tmp_path: Path) -> None:
    authority = make_authority(tmp_path)
    key = ec.generate_private_key(ec.SECP256R1())
    template = zsr.build_authority(key, OWN, NOW)
    extensions = [(each.value, each.critical) for each in template.extensions if each.oid not in OF_THE_KEYS]
    span = zsr.Span(template.not_valid_before_utc, template.not_valid_after_utc)
    signed = (authority.certificate.subject, authority.key, span)
    between = zsr.sign_certificate(template.subject, key.public_key(), *signed, *extensions)
    leaf = zsr.build_certificate(ec.generate_private_key(ec.SECP256R1()), OWN, NOW, zsr.Authority(key, between))
    assert openssl_trusts("chat.example", template, leaf, NOW)
    assert not openssl_trusts("chat.example", authority.certificate, leaf, NOW, pem(between))


OF_THE_KEYS = (
    x509.OID_SUBJECT_KEY_IDENTIFIER,
    x509.OID_AUTHORITY_KEY_IDENTIFIER,
    x509.OID_EXTENDED_KEY_USAGE,
)


def test_the_local_ca_and_its_leaf_are_what_phones_take(tmp_path: Path) -> None:
    authority = make_authority(tmp_path)
    leaf = zsr.load_or_make_certificate(tmp_path, OWN, NOW, authority)
    extensions = authority.certificate.extensions
    constraints = extensions.get_extension_for_class(x509.NameConstraints)
    assert constraints.critical
    assert constraints.value.excluded_subtrees is None
    assert {str(tree.value) for tree in constraints.value.permitted_subtrees or ()} == {
        *("localhost", "chat.example", "127.0.0.1/32", "192.0.2.1/32", "::1/128", "2001:db8::7/128")
    }
    basic = extensions.get_extension_for_class(x509.BasicConstraints)
    assert (basic.critical, basic.value.ca, basic.value.path_length) == (True, True, 0)
    uses = extensions.get_extension_for_class(x509.KeyUsage).value
    assert (uses.key_cert_sign, uses.crl_sign, uses.digital_signature) == (True, False, False)
    assert list(extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) == [x509.OID_SERVER_AUTH]
    assert authority.certificate.not_valid_after_utc - NOW > datetime.timedelta(days=3650)
    assert leaf.not_valid_after_utc - leaf.not_valid_before_utc <= datetime.timedelta(days=825)
    assert list(leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) == [x509.OID_SERVER_AUTH]
    assert not leaf.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o600}


def test_a_ca_is_always_constrained_for_both_kinds_of_name() -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    authority = zsr.Authority(key, zsr.build_authority(key, [], NOW))
    for name in ("bank.example", "192.0.2.2", "2001:db8::8"):
        forged = zsr.build_certificate(ec.generate_private_key(ec.SECP256R1()), [name], NOW, authority)
        assert not is_trusted(name, authority.certificate, forged)


def test_a_ca_is_kept_until_a_name_is_needed_that_it_cannot_vouch_for(tmp_path: Path) -> None:
    first = make_authority(tmp_path)
    assert not first.replaced
    for fewer in (OWN, {"localhost"}):
        kept = make_authority(tmp_path, fewer, NOW + datetime.timedelta(days=3000))
        assert (kept.certificate, kept.replaced) == (first.certificate, False)
    second = make_authority(tmp_path, {*OWN, "new.example"})
    assert second.replaced
    assert second.certificate.public_key() != first.certificate.public_key()
    assert second.certificate.subject != first.certificate.subject
    assert make_authority(tmp_path, {*OWN, "new.example"}).certificate == second.certificate


def test_a_ca_that_ends_soon_is_replaced_and_no_leaf_outlives_its_ca(tmp_path: Path) -> None:
    first, late = make_authority(tmp_path), NOW + datetime.timedelta(days=3600)
    leaf = zsr.load_or_make_certificate(tmp_path, OWN, late, first)
    assert leaf.not_valid_after_utc == first.certificate.not_valid_after_utc
    assert is_trusted("192.0.2.1", first.certificate, leaf, late)
    second = make_authority(tmp_path, OWN, NOW + datetime.timedelta(days=3640))
    assert second.replaced


@pytest.mark.parametrize("lost", [zsr.CA_KEY, zsr.CA_CERT])
def test_a_ca_whose_half_was_lost_is_made_anew(lost: str, tmp_path: Path) -> None:
    first = make_authority(tmp_path)
    (tmp_path / lost).unlink()
    second = make_authority(tmp_path)
    assert second.certificate != first.certificate
    assert second.replaced is (lost == zsr.CA_KEY)
    assert make_authority(tmp_path).certificate == second.certificate
    assert is_trusted("::1", second.certificate, zsr.load_or_make_certificate(tmp_path, OWN, NOW, second))


def test_the_leaf_follows_its_issuer_with_the_same_key(tmp_path: Path) -> None:
    alone = zsr.load_or_make_certificate(tmp_path, OWN, NOW)
    first = make_authority(tmp_path)
    under = zsr.load_or_make_certificate(tmp_path, OWN, NOW, first)
    assert zsr.load_or_make_certificate(tmp_path, OWN, NOW, first) == under
    second = make_authority(tmp_path, {*OWN, "new.example"})
    moved = zsr.load_or_make_certificate(tmp_path, OWN, NOW, second)
    again = zsr.load_or_make_certificate(tmp_path, OWN, NOW)
    assert is_trusted("chat.example", second.certificate, moved)
    assert [zsr.signed_by(each, each) for each in (alone, under, moved, again)] == [True, False, False, True]
    assert alone.public_key() == under.public_key() == moved.public_key() == again.public_key()


def test_addresses_that_come_and_go_cost_no_ca_where_names_were_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def credentials(*names: str) -> zsr.Credentials:
        named = [part for name in names for part in ("--name", name)]
        return zsr.load_credentials(zsr.read_options(["--local-ca", "--state-dir", str(tmp_path), *named], {}))

    def covered(by: zsr.Credentials) -> frozenset[str]:
        assert by.leaf
        return zsr.certificate_names(by.leaf)

    monkeypatch.setattr(zsr, "own_addresses", lambda: ["192.0.2.1"])
    named = credentials("chat.example")
    monkeypatch.setattr(zsr, "own_addresses", lambda: ["192.0.2.77"])
    kept = credentials("chat.example")
    assert (kept.authority, kept.leaf) == (named.authority, named.leaf)
    assert "192.0.2.77" not in covered(kept)
    nameless = credentials()
    assert nameless.authority != named.authority
    assert covered(nameless) == zsr.LOOPBACK | {"192.0.2.77"}


@pytest.mark.relay("--local-ca")
def test_a_relay_with_a_local_ca_is_trusted_by_who_has_that_and_hands_it_out(relay: Relay) -> None:
    names = {zsr.TLS_KEY, zsr.TLS_CERT, zsr.IDENTITY_KEY, zsr.CA_KEY, zsr.CA_CERT}
    assert {path.name for path in relay.state.iterdir()} == names
    assert {stat.S_IMODE(path.stat().st_mode) for path in relay.state.iterdir()} == {0o600}
    with Caller(relay, "aaa") as caller:  # checks the chain
        caller.say(zsr.UpNonce(bytes(32)))
        caller.hear(zsr.DownRelay)
    der = ssl.PEM_cert_to_DER_cert((relay.state / zsr.CA_CERT).read_text())
    told = relay.out.read_text()
    assert f"local CA     SHA-256 {hashlib.sha256(der).digest().hex(':').upper()}\n" in told
    assert f"https://127.0.0.1:{relay.port}/trust" in told
    reply = relay.get("/ca.crt")
    assert (reply.status, reply.body) == (200, der)
    assert reply.fields["content-type"] == "application/x-x509-ca-cert"
    assert reply.fields["content-disposition"] == 'attachment; filename="zerosecretroom-ca.crt"'
    head = relay.get("/ca.crt", "HEAD")
    assert (head.status, head.body, head.fields["content-length"]) == (200, b"", str(len(der)))
    before, first = relay.get("/ca.mobileconfig"), relay.shown()
    relay.restart()
    assert relay.get("/ca.mobileconfig").body == before.body
    assert relay.shown() == first
    assert relay.err.read_text() == ""


@pytest.mark.relay("--local-ca")
def test_the_profile_holds_the_ca_and_nothing_else(relay: Relay, tmp_path: Path) -> None:
    reply = relay.get("/ca.mobileconfig")
    assert (reply.status, reply.fields["content-type"]) == (200, "application/x-apple-aspen-config")
    profile = plistlib.loads(reply.body)
    (payload,) = profile["PayloadContent"]
    assert payload["PayloadContent"] == relay.get("/ca.crt").body
    assert (profile["PayloadType"], payload["PayloadType"]) == ("Configuration", "com.apple.security.root")
    assert {profile["PayloadVersion"], payload["PayloadVersion"]} == {1}
    assert uuid.UUID(profile["PayloadUUID"]) != uuid.UUID(payload["PayloadUUID"])
    assert profile["PayloadIdentifier"] != payload["PayloadIdentifier"]
    other = plistlib.loads(zsr.profile_of(pem(make_authority(tmp_path).certificate)))
    assert other["PayloadUUID"] != profile["PayloadUUID"]
    assert other["PayloadIdentifier"] != profile["PayloadIdentifier"]


@pytest.mark.relay("--local-ca")
def test_the_leaf_alone_is_served_and_that_suffices(relay: Relay) -> None:
    asked = f"openssl s_client -connect 127.0.0.1:{relay.port} -verify_ip 127.0.0.1 -no-CApath -showcerts -CAfile"
    command = [*asked.split(), str(relay.anchor)]
    ended = subprocess.run(command, input="", capture_output=True, text=True, timeout=PATIENCE)
    assert "Verify return code: 0 (ok)" in ended.stdout
    assert ended.stdout.count("-----BEGIN CERTIFICATE-----") == 1


def test_a_name_beyond_the_ca_is_told_to_the_operator(tmp_path: Path) -> None:
    relay = Relay(tmp_path, "--local-ca", "--name", "one.example").start()
    try:
        before = relay.get("/ca.crt").body
        assert relay.err.read_text() == ""
        relay.kill()
        relay.options = (*relay.options, "--name", "two.example")
        relay.start()
        assert relay.get("/ca.crt").body != before
        told = (
            "WARNING the local CA was made anew, for new names or its age: phones must install it again from /trust\n"
        )
        assert relay.err.read_text() == told
    finally:
        relay.kill()


# ---------------------------------------------------------------------------------------------------- keys and files --


@pytest.mark.parametrize("content", [b"", b"rubbish", b"-----BEGIN PRIVATE KEY-----\nAA\n-----END PRIVATE KEY-----\n"])
def test_a_damaged_key_is_never_replaced_in_silence(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / zsr.IDENTITY_KEY
    path.write_bytes(content)
    with pytest.raises(zsr.OperatorFault, match="is not a readable P-256 key: restore it, or delete it"):
        zsr.load_or_make_key(path)
    assert path.read_bytes() == content


def test_the_identity_signs_as_clients_verify(tmp_path: Path) -> None:
    identity = zsr.RelayIdentity(zsr.load_or_make_key(tmp_path / zsr.IDENTITY_KEY))
    again = zsr.RelayIdentity(zsr.load_or_make_key(tmp_path / zsr.IDENTITY_KEY))
    assert identity.public == again.public
    assert zsr.verify_signature(identity.public, "relay", b"m", again.sign("relay", b"m"))
    assert not zsr.verify_signature(identity.public, "login", b"m", again.sign("relay", b"m"))


def test_nothing_is_written_but_three_private_files(relay: Relay, home: House) -> None:
    before = {path: path.stat().st_mtime_ns for path in relay.state.iterdir()}
    assert {path.name for path in before} == {zsr.TLS_KEY, zsr.TLS_CERT, zsr.IDENTITY_KEY}
    assert {stat.S_IMODE(path.stat().st_mode) for path in before} == {0o600}
    assert stat.S_IMODE(relay.state.stat().st_mode) == 0o700
    with three(relay, home) as (ann, ben, _):
        ann.say(envelope(home, 300))
        ben.hear(zsr.DownEvent)
        opened = [os.readlink(link) for link in Path(f"/proc/{relay.pid}/fd").iterdir()]
    assert {path: path.stat().st_mtime_ns for path in relay.state.iterdir()} == before
    files = {each for each in opened if each.startswith("/") and not each.startswith("/dev/")}
    assert files == {str(relay.out), str(relay.err)}


def test_a_key_that_others_may_read_is_closed_to_them(tmp_path: Path) -> None:
    zsr.load_or_make_key(tmp_path / "key.pem")
    (tmp_path / "key.pem").chmod(0o644)
    zsr.load_or_make_key(tmp_path / "key.pem")
    assert stat.S_IMODE((tmp_path / "key.pem").stat().st_mode) == 0o600


def test_identity_and_key_outlive_a_kill(relay: Relay) -> None:
    """The certificate does, too, unless this machine has a new address by then: a container that boots brings one."""

    def shown() -> tuple[bytes, Any]:
        with Caller(relay, "aaa") as caller:
            caller.say(zsr.UpNonce(bytes(32)))
            told = zsr.decode(zsr.Relay, caller.hear(zsr.DownRelay).m)
        return told.relay, relay.shown().public_key()

    before = shown()
    relay.restart()
    assert shown() == before


# --------------------------------------------------------------------------------- another certificate while it runs --


LOOKS_OFTEN = ("--limit", "upkeep_seconds=1")


class Brought:
    """A relay with a certificate of its operator's, and pairs to put in its place."""

    def __init__(self, folder: Path) -> None:
        self.cert, self.key = folder / "own" / "cert.pem", folder / "own" / "key.pem"
        self.folder = folder
        self.cert.parent.mkdir()
        self.first = self.pair("first", "127.0.0.1", "mine.example")
        self.put(self.first)
        options = ("--cert", str(self.cert), "--key", str(self.key), "--log-level", "debug")
        self.relay = Relay(folder / "r", *options, *LOOKS_OFTEN).start()

    def pair(self, name: str, *names: str) -> Path:
        folder = self.folder / name
        folder.mkdir()
        zsr.load_or_make_certificate(folder, names, datetime.datetime.now(datetime.timezone.utc))
        return folder

    def put(self, pair: Path) -> None:
        shutil.copy(pair / zsr.TLS_CERT, self.cert)
        shutil.copy(pair / zsr.TLS_KEY, self.key)

    def shows(self, pair: Path) -> bool:
        return self.relay.shown() == x509.load_pem_x509_certificate((pair / zsr.TLS_CERT).read_bytes())

    def complains(self, times: int) -> bool:
        return self.complaints() == times

    def complaints(self) -> int:
        """Every line of the log says that a certificate was or was not taken; how many say the latter."""
        lines = [line for line in self.relay.err.read_text().splitlines() if not line.startswith("DEBUG ")]
        refused = [line for line in lines if line.startswith("ERROR certificate not reloaded: ")]
        assert len(refused) + lines.count("INFO certificate reloaded") == len(lines), lines
        return len(refused)


@pytest.fixture
def brought(tmp_path: Path) -> Iterator[Brought]:
    made = Brought(tmp_path)
    yield made
    made.relay.kill()


def looks_again(relay: Relay) -> None:
    """Returns once a relay that logs its sweeps, one a second, and looks at its certificate as often, has done so."""

    def sweeps() -> int:
        return relay.err.read_text().count(" connections, ")

    enough = sweeps() + 2
    eventually(lambda: sweeps() > enough, "it looked again")


def lives(caller: Caller) -> bool:
    caller.say(zsr.UpPing(7))
    return caller.hear(zsr.DownPong) is not None


def test_an_operators_certificate_is_used_and_names_its_hosts(brought: Brought) -> None:
    assert brought.shows(brought.first)
    told = brought.relay.out.read_text()
    assert "self-signed" not in told
    assert "/trust" not in told
    assert "--name HOST" not in told
    assert [path.name for path in brought.relay.state.iterdir()] == [zsr.IDENTITY_KEY]


def test_a_pair_that_is_half_written_or_does_not_fit_changes_nothing_and_is_one_line(
    brought: Brought, home: House
) -> None:
    other, whole = brought.pair("other", "127.0.0.1"), brought.cert.read_bytes()
    broken: list[tuple[Path, bytes | None]] = [
        (brought.cert, (other / zsr.TLS_CERT).read_bytes()),
        (brought.cert, whole[: len(whole) // 2]),
        (brought.cert, whole + whole[: len(whole) // 2]),
        (brought.cert, b""),
        (brought.cert, None),
        (brought.key, (other / zsr.TLS_KEY).read_bytes()[:-40]),
        (brought.key, None),
    ]
    with present(brought.relay, home.ann, home.made) as caller:
        for number, (path, content) in enumerate(broken, 1):
            brought.put(brought.first)
            path.unlink() if content is None else path.write_bytes(content)
            brought.relay.signal("SIGHUP")
            eventually(functools.partial(brought.complains, number), f"{path.name} {number} is refused")
            assert brought.shows(brought.first)
        assert lives(caller)
    brought.put(brought.first)
    assert zsr.fingerprint(brought.relay.shown()) in trust_text(brought.relay)


def test_on_a_signal_new_connections_get_the_new_certificate_and_open_ones_live_on(
    brought: Brought, home: House
) -> None:
    other = brought.pair("other", "mine.example")
    with present(brought.relay, home.ann, home.made) as before, Caller(brought.relay, zsr.b64u(bytes(32))) as stranger:
        brought.put(other)
        brought.relay.signal("SIGHUP")
        eventually(lambda: brought.shows(other), "the new one is served")
        assert lives(before)
        stranger.login(new_device(bytes(32)))  # at 127.0.0.1, which the new one does not name
        assert stranger.hear(zsr.DownFault).code == "host"
    assert brought.complaints() == 0


def test_files_that_change_are_loaded_without_a_signal_once_they_fit(brought: Brought, home: House) -> None:
    other = brought.pair("other", "127.0.0.1")
    with present(brought.relay, home.ann, home.made) as caller:
        shutil.copy(other / zsr.TLS_CERT, brought.cert)
        eventually(lambda: brought.complaints() == 1, "half a pair is refused")
        looks_again(brought.relay)
        assert brought.shows(brought.first)
        replacement = brought.key.with_suffix(".new")
        shutil.copy(other / zsr.TLS_KEY, replacement)
        replacement.replace(brought.key)
        eventually(lambda: brought.shows(other), "the new one is served")
        assert lives(caller)
    assert brought.complaints() == 1
    assert zsr.fingerprint(brought.relay.shown()) in trust_text(brought.relay)


class Years(Relay):
    """A relay whose calendar the test turns; what it shows may be valid only then."""

    later = 0

    @property
    def calendar(self) -> Path:
        return self.out.with_name("days")

    @property
    def command(self) -> list[str]:
        code = f"""import datetime, pathlib, sys; sys.path.insert(0, {str(ROOT)!r})
import zerosecretroom as zsr
now, calendar = zsr.utc_now, pathlib.Path({str(self.calendar)!r})
zsr.utc_now = lambda: now() + datetime.timedelta(days=int(calendar.read_text()))
raise SystemExit(zsr.main())"""
        return [sys.executable, "-c", code, *super().command[2:]]

    def wait(self, days: int) -> None:
        written = self.calendar.with_suffix(".new")
        written.write_text(str(days))
        written.replace(self.calendar)
        self.later = days

    @property
    def today(self) -> datetime.datetime:
        return datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(days=self.later)

    def trust(self) -> ssl.SSLContext:
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        return context


@contextmanager
def years(folder: Path, *options: str) -> Iterator[Years]:
    folder.mkdir(exist_ok=True)
    relay = Years(folder, *options, *LOOKS_OFTEN)
    relay.wait(0)
    relay.start()
    try:
        yield relay
    finally:
        relay.kill()


@pytest.mark.parametrize("options", [(), ("--local-ca",)], ids=["self-signed", "local-ca"])
def test_a_relay_that_runs_for_years_renews_its_certificate_in_time(
    options: tuple[str, ...], tmp_path: Path, home: House
) -> None:
    with years(tmp_path, *options) as relay, present(relay, home.ann, home.made) as caller:
        before = relay.shown()
        relay.wait(800)
        eventually(lambda: relay.shown() != before, "renewed")
        after = relay.shown()
        assert after.public_key() == before.public_key()
        assert before.not_valid_after_utc > relay.today > after.not_valid_before_utc
        assert after.not_valid_after_utc - relay.today > datetime.timedelta(days=800)
        anchor = x509.load_pem_x509_certificate(relay.anchor.read_bytes())
        assert is_trusted("127.0.0.1", anchor, after, relay.today) if options else anchor == after
        assert zsr.fingerprint(after) in trust_text(relay)
        assert zsr.fingerprint(before) not in trust_text(relay)
        assert lives(caller)
        assert relay.err.read_text() == "INFO certificate reloaded\n"


def test_a_ca_that_ends_is_replaced_while_the_relay_runs(tmp_path: Path, home: House) -> None:
    with years(tmp_path, "--local-ca") as relay, present(relay, home.ann, home.made) as caller:
        before = relay.get("/ca.crt").body
        relay.wait(3640)
        eventually(lambda: relay.get("/ca.crt").body != before, "another CA")
        anchor = x509.load_der_x509_certificate(relay.get("/ca.crt").body)
        assert is_trusted("127.0.0.1", anchor, relay.shown(), relay.today)
        assert lives(caller)
        assert "phones must install it again from /trust" in relay.err.read_text()


def test_a_renewal_that_fails_is_told_once_and_changes_nothing(tmp_path: Path) -> None:
    with years(tmp_path, "--log-level", "debug") as relay:

        def log_of(line: str) -> int:
            return relay.err.read_text().count(line)

        before = relay.shown()
        (relay.state / zsr.TLS_CERT).unlink()
        (relay.state / zsr.TLS_CERT).mkdir()
        relay.wait(800)
        eventually(lambda: log_of("certificate not reloaded: "), "told")
        looks_again(relay)
        assert relay.shown() == before
        (relay.state / zsr.TLS_CERT).rmdir()
        relay.signal("SIGHUP")
        eventually(lambda: relay.shown() != before, "renewed")
        assert log_of("certificate not reloaded: ") == 1


def test_a_certificate_that_does_not_fit_its_key_is_one_line(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        zsr.load_or_make_certificate(tmp_path / name, ["localhost"], NOW)
    ended = run_relay(
        "--cert",
        str(tmp_path / "one" / zsr.TLS_CERT),
        "--key",
        str(tmp_path / "two" / zsr.TLS_KEY),
        "--state-dir",
        str(tmp_path / "state"),
        "--page",
        str(PAGE),
        "--port",
        "0",
    )
    assert (ended.returncode, ended.stderr.count("\n")) == (2, 1)
    assert "must be a PEM chain and its unencrypted key" in ended.stderr


# ---------------------------------------------------------------------------------------------------------- the page --


def test_the_page_is_served_as_it_lies_on_disk_with_all_its_headers(lasting_relay: Relay) -> None:
    reply = lasting_relay.get()
    assert reply.status == 200
    assert reply.body == PAGE.read_bytes().replace(b"\r\n", b"\n")
    fields = reply.fields
    assert email.utils.parsedate_to_datetime(fields.pop("date"))
    policy = dict(part.split(" ", 1) for part in fields.pop("content-security-policy").split("; "))
    assert "unsafe" not in str(policy)
    assert policy["default-src"] == policy["base-uri"] == policy["form-action"] == policy["frame-ancestors"] == "'none'"
    assert policy["connect-src"] == f"'self' wss://127.0.0.1:{lasting_relay.port}"
    assert (policy["require-trusted-types-for"], policy["trusted-types"]) == ("'script'", "'none'")
    assert fields == {
        "referrer-policy": "no-referrer",
        "x-content-type-options": "nosniff",
        "x-frame-options": "DENY",
        "cross-origin-opener-policy": "same-origin",
        "cross-origin-resource-policy": "same-origin",
        "permissions-policy": "camera=(self), microphone=(self), geolocation=()",
        "cache-control": "no-cache",
        "content-type": "text/html; charset=utf-8",
        "content-length": str(len(reply.body)),
        "connection": "close",
        "vary": "Accept-Encoding",
        "etag": f'W/"{hashlib.sha256(reply.body).hexdigest()[:32]}"',
    }


def test_line_ends_do_not_change_what_is_served_or_allowed() -> None:
    one, two = zsr.Page.of(b"<script>\na\n</script>"), zsr.Page.of(b"<script>\r\na\r</script>")
    assert one == two
    digest = base64.b64encode(hashlib.sha256(b"\na\n").digest()).decode()
    assert f"script-src 'sha256-{digest}'; style-src 'none'" in one.policy


def test_the_page_is_compressed_for_who_takes_it(lasting_relay: Relay) -> None:
    plain = lasting_relay.get().body
    packed = lasting_relay.get(Accept_Encoding="br, gzip;q=0.5")
    assert packed.fields["content-encoding"] == "gzip"
    assert gzip.decompress(packed.body) == plain
    assert int(packed.fields["content-length"]) == len(packed.body) < len(plain)
    for refusal in ("", "br", "gzip;q=0", "gzip; q=0.0"):
        assert "content-encoding" not in lasting_relay.get(Accept_Encoding=refusal).fields


NO_CA = b"this relay has no local CA: /trust says what to do, and --local-ca at its start makes one\n"


def test_a_known_page_is_not_sent_again(lasting_relay: Relay) -> None:
    tag = lasting_relay.get().fields["etag"]
    for known in (tag, f'"other", {tag}', "*"):
        reply = lasting_relay.get(If_None_Match=known)
        assert (reply.status, reply.body, reply.fields["etag"]) == (304, b"", tag)
    assert lasting_relay.get(If_None_Match='"other"').status == 200


@pytest.mark.parametrize(
    ("method", "path", "status", "body"),
    [
        ("GET", "/healthz", 200, b"ok\n"),
        ("HEAD", "/healthz", 200, b""),
        ("HEAD", "/", 200, b""),
        ("GET", "/?from=somewhere", 200, None),
        ("GET", "/nothing", 404, b"there is nothing here: the page is at /, its certificate is explained at /trust\n"),
        ("GET", "/ca.crt", 404, NO_CA),
        ("GET", "/ca.mobileconfig", 404, NO_CA),
        ("HEAD", "/trust", 200, b""),
        ("POST", "/trust", 405, None),
        ("GET", "/../etc/passwd", 404, None),
        ("POST", "/", 405, b"only GET and HEAD are answered\n"),
        ("DELETE", "/healthz", 405, None),
        ("GET", "/ws/aaa", 426, b"rooms are reached through a WebSocket\n"),
    ],
)
def test_other_requests_are_answered_plainly(
    lasting_relay: Relay, method: str, path: str, status: int, body: bytes | None
) -> None:
    reply = lasting_relay.get(path, method)
    assert reply.status == status
    assert body is None or reply.body == body
    assert reply.fields["x-content-type-options"] == "nosniff"
    assert "server" not in reply.fields
    if status == 405:
        assert reply.fields["allow"] == "GET, HEAD"
    if method == "HEAD":
        assert int(reply.fields["content-length"]) > 0


# ------------------------------------------------------------------------------------------------------------ /trust --


@pytest.mark.parametrize("options", [(), ("--local-ca",)], ids=["self-signed", "local-ca"])
def test_trust_shows_what_to_compare_and_on_each_device_what_to_do(options: tuple[str, ...], tmp_path: Path) -> None:
    relay = Relay(tmp_path, *options).start()
    try:
        text, told = trust_text(relay), relay.out.read_text()
        assert zsr.fingerprint(relay.shown()) in text
        assert relay.shown().not_valid_after_utc.date().isoformat() in text
        for line in re.findall("SHA-256 (.*)", told):
            assert line in text
        for platform in ("iPhone, iPad", "Android", "Windows", "macOS", "Linux, and Firefox"):
            assert platform in text
        links = set(re.findall(r'href="([^"]*)"', relay.get("/trust").body.decode())) - {"data:,"}
        assert links == ({"/", "/ca.crt", "/ca.mobileconfig"} if options else {"/"})
        assert {relay.get(link).status for link in links} == {200}
        assert ("start with --local-ca" in text) is not bool(options)
    finally:
        relay.kill()


def test_trust_is_served_as_safely_as_the_page(lasting_relay: Relay) -> None:
    reply, page = lasting_relay.get("/trust"), lasting_relay.get()
    style = re.findall(rb"<style>(.*?)</style>", reply.body, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(style[0]).digest()).decode()
    assert (len(style), reply.fields["content-security-policy"]) == (
        1,
        f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'",
    )
    assert b"<script" not in reply.body
    assert b" style=" not in reply.body
    own = {"date", "content-security-policy", "content-length", "etag"}
    assert {name: reply.fields[name] for name in reply.fields if name not in own} == {
        name: page.fields[name] for name in page.fields if name not in own
    }
    assert reply.fields["etag"] == f'W/"{hashlib.sha256(reply.body).hexdigest()[:32]}"'
    assert lasting_relay.get("/trust", If_None_Match=reply.fields["etag"]).status == 304
    packed = lasting_relay.get("/trust", Accept_Encoding="gzip")
    assert packed.fields["content-encoding"] == "gzip"
    assert gzip.decompress(packed.body) == reply.body
    assert len(packed.body) < 8192


def test_trust_is_short_where_the_certificate_is_not_the_relays(brought: Brought, tmp_path: Path) -> None:
    text = trust_text(brought.relay)
    assert "brought its certificate" in text
    assert zsr.fingerprint(brought.relay.shown()) in text
    assert "On your device" not in text
    assert brought.relay.get("/ca.crt").status == 404
    plain = Relay(tmp_path / "plain", "--plain").start()
    try:
        assert "that of a proxy" in trust_text(plain)
        assert hashlib.sha256(plain.get().body).hexdigest() in trust_text(plain)
    finally:
        plain.kill()


EACH_TRUST = [
    zsr.Trust(zsr.SELF_SIGNED, "AA:BB", "2030-01-01"),
    zsr.Trust(zsr.LOCAL_CA, "AA:BB", "2030-01-01", b"der"),
    zsr.Trust(zsr.BROUGHT, "AA:BB", "2030-01-01"),
    zsr.Trust(zsr.PROXY),
]


def test_trust_is_valid_html_whatever_it_tells(tmp_path: Path) -> None:
    for trust in EACH_TRUST:
        (tmp_path / f"{trust.kind}.html").write_bytes(zsr.trust_document(trust, "0" * 64).body)
    program = str(NODE_MODULES / ".bin" / "html-validate")
    validate = [program, "--max-warnings", "0", "--config", str(ROOT / ".htmlvalidate.json")]
    ended = subprocess.run([*validate, *tmp_path.iterdir()], capture_output=True, text=True, timeout=PATIENCE)
    assert (ended.returncode, ended.stdout) == (0, "")


def test_trust_escapes_what_it_is_told() -> None:
    body = zsr.trust_document(zsr.Trust(zsr.SELF_SIGNED, "<b>&", "<i>"), "0" * 64).body
    assert b"&lt;b&gt;&amp;" in body
    assert b"valid to &lt;i&gt;" in body


# ------------------------------------------------------------------------------------------------------ malformed heads --


def plain_get(link: LinkThread, path: str, method: str = "GET", **fields: str) -> Reply:
    """One request without TLS; underscores in the names of fields stand for hyphens."""
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", link.port, timeout=PATIENCE)) as connection:
        connection.request(method, path, headers={name.replace("_", "-"): fields[name] for name in fields})
        response = connection.getresponse()
        return Reply(response.status, dict(response.getheaders()), response.read())


def tls_socket(relay: Relay, context: ssl.SSLContext) -> ssl.SSLSocket:
    raw = socket.create_connection(("127.0.0.1", relay.port), PATIENCE)
    return context.wrap_socket(raw, server_hostname="127.0.0.1")


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"GET / HTTP/1.1\r\nHost: a;script-src *\r\n\r\n", b"400"),
        (b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", b"400"),
        (b"GET / HTTP/1.1\r\n\r\n", b"400"),
        (b"GET / HTTP/1.1\r\nHost : a\r\n\r\n", b"400"),
        (b"GET / HTTP/1.1\r\nHost: a\r\n folded\r\n\r\n", b"400"),
        (b"GET  / HTTP/1.1\r\nHost: a\r\n\r\n", b"400"),
        (b"GET / HTTP/2.0\r\nHost: a\r\n\r\n", b"400"),
        (b"\r\n\r\n", b"400"),
        (b"GET /healthz HTTP/1.0\r\n\r\n", b"200"),
        (b"GET / HTTP/1.1\r\nHost: a\r\nCookie: " + b"x" * 20_000, b"431"),
        (b"GET /ws/aaa HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\n\r\n", b"426"),
        (b"GET /ws/aaa HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n", b"400"),
    ],
)
def test_malformed_heads_are_refused(lasting_relay: Relay, head: bytes, status: bytes) -> None:
    context = lasting_relay.trust()
    assert context
    with tls_socket(lasting_relay, context) as tls:
        tls.sendall(head)
        assert tls.recv(64).split()[1] == status


def test_a_head_may_come_byte_by_byte_and_a_bracketed_host_gets_no_source_of_its_own(lasting_relay: Relay) -> None:
    context = lasting_relay.trust()
    assert context
    with tls_socket(lasting_relay, context) as tls:
        for byte in b"GET / HTTP/1.1\r\nHost: [::1]:8443\r\n\r\n":
            tls.sendall(bytes([byte]))
        answer = tls.recv(4096)
        assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
        assert b"connect-src 'self'; " in answer
        assert tls.selected_alpn_protocol() is None


def test_alpn_offers_http_1_1_and_tls_begins_at_1_2(lasting_relay: Relay) -> None:
    context = lasting_relay.trust()
    assert context
    context.set_alpn_protocols(["h2", "http/1.1"])
    with tls_socket(lasting_relay, context) as tls:
        assert tls.selected_alpn_protocol() == "http/1.1"
    assert zsr.tls_context(lasting_relay.state / zsr.TLS_CERT, lasting_relay.state / zsr.TLS_KEY).minimum_version == 771


def test_plain_http_is_led_to_https(lasting_relay: Relay) -> None:
    def ask(request: bytes) -> bytes:
        with socket.create_connection(("127.0.0.1", lasting_relay.port), PATIENCE) as raw:
            raw.sendall(request)
            return b"".join(iter(lambda: raw.recv(4096), b""))

    answer = ask(f"GET /x?y HTTP/1.1\r\nHost: 127.0.0.1:{lasting_relay.port}\r\n\r\n".encode())
    place = f"https://127.0.0.1:{lasting_relay.port}/x?y".encode()
    assert answer.startswith(b"HTTP/1.1 307 ")
    assert b"\r\nLocation: " + place + b"\r\n" in answer
    assert answer.endswith(b"this port speaks TLS only: open " + place + b"\n")
    assert ask(b"GET / HTTP/1.1\r\n\r\n").startswith(b"HTTP/1.1 400 ")
    assert ask(b"SSH-2.0-x\r\n\r\n").startswith(b"HTTP/1.1 400 ")


# ---------------------------------------------------------------------------------------------------------- origins --


def knock(relay: Relay, origin: str | None, host: str = "") -> int:
    """The status with which a socket of this origin is answered."""
    fields = {"Host": host} if host else {}
    try:
        with connect_socket(
            relay.socket_url("aaa"),
            ssl=relay.trust(),
            compression=None,
            proxy=None,
            additional_headers=fields,
            origin=cast("Any", origin),
        ):
            return 101
    except InvalidStatus as refused:
        return refused.response.status_code


def test_only_pages_of_the_same_origin_open_sockets(lasting_relay: Relay) -> None:
    port = lasting_relay.port
    assert knock(lasting_relay, None) == 101
    assert knock(lasting_relay, f"https://127.0.0.1:{port}") == 101
    for origin in (
        f"http://127.0.0.1:{port}",
        "https://127.0.0.1",
        f"https://127.0.0.1:{port}.evil.example",
        "https://evil.example",
        "null",
        "",
        f"https://localhost:{port}",
    ):
        assert knock(lasting_relay, origin) == 403, origin


@pytest.mark.parametrize(
    ("origin", "host", "same"),
    [
        ("https://chat.example", "chat.example", True),
        ("https://chat.example", "chat.example:443", True),
        ("https://CHAT.example", "chat.EXAMPLE", True),
        ("https://chat.example:8443", "chat.example", False),
        ("https://chat.example:80", "chat.example", False),
        ("http://chat.example", "chat.example", False),
        ("chat.example", "chat.example", False),
    ],
)
def test_an_origin_is_compared_as_browsers_write_it(origin: str, host: str, same: bool) -> None:
    assert zsr.same_origin(origin, host, ("https",)) is same


def test_a_page_from_disk_may_come_if_the_operator_says_so(tmp_path: Path) -> None:
    relay = Relay(tmp_path, "--allow-null-origin").start()
    try:
        assert (knock(relay, "null"), knock(relay, "https://evil.example")) == (101, 403)
    finally:
        relay.kill()


def test_behind_a_proxy_it_speaks_plainly_on_loopback_and_keeps_no_certificate(tmp_path: Path, home: House) -> None:
    relay = Relay(tmp_path, "--plain").start()
    try:
        assert relay.get().status == 200
        assert [path.name for path in relay.state.iterdir()] == [zsr.IDENTITY_KEY]
        with present(relay, home.ann, home.made):
            pass
        place = f"127.0.0.1:{relay.port}"
        assert [knock(relay, f"{scheme}://{place}") for scheme in ("https", "http")] == [101, 101]
    finally:
        relay.kill()


# ----------------------------------------------------------------------------------------------------------- frames --


@on_both_loops
def test_members_talk_through_real_sockets(relay: Relay, home: House) -> None:
    with three(relay, home) as (ann, ben, cat):
        ann.say(envelope(home, 300, ref=7))
        assert ann.hear(zsr.DownSent).ref == 7
        assert ben.hear(zsr.DownEvent).ct == cat.hear(zsr.DownEvent).ct == bytes(300)
        ben.say(zsr.UpPing(5))
        assert ben.hear(zsr.DownPong).token == 5


@on_both_loops
def test_frames_of_one_tick_come_in_one_message_and_in_order(relay: Relay, home: House) -> None:
    with three(relay, home) as (ann, ben, _):
        ann.sizes.clear()
        ben.sizes.clear()
        ann.say(*(envelope(home, 300 + ref, ref) for ref in range(50)))
        assert [len(ben.hear(zsr.DownEvent).ct) for _ in range(50)] == [300 + ref for ref in range(50)]
        assert len(ben.sizes) < 10
        assert [ann.hear(zsr.DownSent).ref for _ in range(50)] == list(range(50))
        assert len(ann.sizes) < 12  # its entries and its numbers, in the same messages


@on_both_loops
def test_each_member_gets_its_own_frames_between_the_common_ones(relay: Relay, home: House) -> None:
    with three(relay, home) as callers:
        for caller, letter in zip(callers, b"abc", strict=True):
            posts = [zsr.UpPost(ref, home.made.body.epoch, home.made.ch, bytes([letter]) * 40) for ref in range(30)]
            caller.say(*posts)
        seen = []
        for caller in callers:
            numbers: list[tuple[int, bytes]] = []
            refs: list[int] = []
            while len(numbers) < 90 or len(refs) < 30:
                frame = caller.hear(object)
                if isinstance(frame, zsr.DownEvent):
                    numbers.append((frame.no, frame.ct))
                elif isinstance(frame, zsr.DownSent):
                    assert frame.no in {no for no, _ in numbers}, "an answer comes with what it is about, or after it"
                    refs.append(frame.ref)
            assert refs == list(range(30))
            seen.append(numbers)
        assert seen[0] == seen[1] == seen[2]
        assert [no for no, _ in seen[0]] == sorted(no for no, _ in seen[0])


@on_both_loops
def test_large_frames_and_fragmented_messages_pass_whole(relay: Relay, home: House) -> None:
    chunk = os.urandom(262_144)
    with three(relay, home) as (ann, ben, _):
        frame = zsr.encode_frame(zsr.UpPut(1, b"f" * 16, 0, 1, chunk))
        message = zsr.join_frames([frame])
        ann.socket.send([message[:1000], message[1000:200_000], message[200_000:]])
        ann.hear(zsr.DownSent)
        ben.say(zsr.UpPing(1), zsr.UpGet(home.ann.dev, b"f" * 16, 0, 4), zsr.UpPing(2))
        assert [ben.hear(zsr.DownPong).token for _ in range(2)] == [1, 2], "chunks come when nothing else does"
        assert ben.hear(zsr.DownChunk).ct == chunk


@pytest.mark.parametrize(
    ("message", "code"),
    [("text", 1003), (bytes(8 << 20), 1009)],
    ids=["text", "too big"],
)
def test_what_no_page_would_send_ends_the_socket(relay: Relay, home: House, message: str | bytes, code: int) -> None:
    with present(relay, home.ann, home.made) as ann:
        with contextlib.suppress(ConnectionClosed):
            ann.socket.send(message)
        assert ann.closed() == code


def loop_of(relay: Relay) -> str:
    """Which one waits for sockets in this process."""
    return "uvloop" if "/uvloop/loop." in Path(f"/proc/{relay.pid}/maps").read_text() else "asyncio"


def test_uvloop_is_taken_where_it_is_installed_unless_the_operator_says_otherwise(tmp_path: Path) -> None:
    stub = tmp_path / "uvloop.py"
    stub.write_text("raise ImportError('no module of this name')")
    without = {"PYTHONPATH": str(tmp_path)}
    cases = [("auto", without, "asyncio"), ("asyncio", {}, "asyncio")]
    cases += [("auto", {}, "uvloop"), ("uvloop", {}, "uvloop")] if find_spec("uvloop") else []
    for asked, env, taken in cases:
        made = Relay(tmp_path / f"{asked}{len(env)}", env={"ZSR_LOOP": asked, **env}).start()
        try:
            assert loop_of(made) == taken, asked
            assert made.get("/healthz").body == b"ok\n"
            assert made.stop() == 0
        finally:
            made.kill()
    with pytest.raises(RuntimeError, match=r"relay ended with 2: .*--loop uvloop: no module of this name: pip install"):
        Relay(tmp_path / "none", env={"ZSR_LOOP": "uvloop", **without}).start()


@on_both_loops
def test_rubbish_in_a_message_leaves_others_alone(relay: Relay, home: House) -> None:
    with three(relay, home) as (ann, ben, cat):
        ann.socket.send(b"\x00\x00")
        assert ann.hear(zsr.DownFault).code == "bad"
        ben.say(envelope(home, 10))
        assert cat.hear(zsr.DownEvent).ct == bytes(10)
        assert "bug" not in relay.err.read_text()


def test_a_full_room_is_refused_to_the_sender(tmp_path: Path, home: House) -> None:
    relay = Relay(tmp_path, "--max-memory", "1M", "--max-room-memory", "1M").start()
    try:
        with three(relay, home) as (ann, _, _):
            for ref in range(20):
                ann.say(envelope(home, 100_000, ref))
            fault = ann.hear(zsr.DownFault)
            assert fault.code == "full"
            assert fault.retry_ms > 0
            assert fault.ref > 3
    finally:
        relay.kill()


def test_logs_at_debug_level_hold_numbers_only(tmp_path: Path, home: House) -> None:
    relay = Relay(tmp_path, "--log-level", "debug").start()
    canary = b"canary in an envelope"
    try:
        with three(relay, home) as (ann, ben, _):
            ann.say(zsr.UpPost(1, home.made.body.epoch, home.made.ch, canary))
            assert ben.hear(zsr.DownEvent).ct == canary
            ann.socket.send(b"\x00\x00\x00\x09" + canary)
        relay.stop()
        logged = relay.err.read_text()
        assert "connections" in logged
        for secret in (canary.decode(), "127.0.0.1", home.ann.dev.hex(), zsr.b64u(home.room), "canary"):
            assert secret not in logged
    finally:
        relay.kill()


# ----------------------------------------------------------------------------------------------- slow, silent, ended --


def narrow_socket(port: int) -> socket.socket:
    """A connection whose system takes little before it is read from."""
    raw = socket.socket()
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
    raw.settimeout(PATIENCE)
    raw.connect(("127.0.0.1", port))
    return raw


class LinkThread:
    """The same Link and Rooms on plain loopback with limits of the test's choice, for what takes a minute otherwise."""

    kind = zsr.Link

    def __init__(self, proxies: Iterable[zsr.Network] = (), page: bytes = b"", **limits: Any) -> None:
        self.limits = replace(zsr.Limits(), tick_seconds=0.05, **limits)
        self.proxies, self.page = list(proxies), page
        self.listener = zsr.listen("127.0.0.1", 0)
        self.port: int = self.listener.getsockname()[1]
        self.started, self.thread = threading.Event(), threading.Thread(target=lambda: asyncio.run(self.run()))

    async def run(self) -> None:
        self.loop, self.ended = asyncio.get_running_loop(), asyncio.Event()
        identity = zsr.RelayIdentity(new_key())
        rooms = zsr.Rooms(self.limits, identity, os.urandom(16), frozenset(), os.urandom, lambda: WALL)
        self.link = self.kind(rooms, zsr.Page.of(self.page), self.limits, None, proxies=self.proxies)
        await self.link.start([self.listener])
        self.started.set()
        await self.ended.wait()
        await self.link.stop()
        self.places = dict(self.link._places)

    def __enter__(self) -> LinkThread:
        self.thread.start()
        assert self.started.wait(PATIENCE)
        return self

    def __exit__(self, *_: object) -> None:
        self.loop.call_soon_threadsafe(self.ended.set)
        self.thread.join(PATIENCE)

    def socket_url(self, room_path: str) -> str:
        return f"ws://127.0.0.1:{self.port}/ws/{room_path}"

    def trust(self) -> None:
        return None

    def raw(self) -> socket.socket:
        return narrow_socket(self.port)


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Python does not search for cycles of garbage meanwhile: what is freed is freed by itself, and nothing waits."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@contextlib.contextmanager
def slow_caller(relay: Relay, keys: Keys) -> Iterator[Caller]:
    """A member that has said hello, and whose system and library take little before its caller reads."""
    with Caller(relay, zsr.b64u(keys.room), sock=narrow_socket(relay.port), max_queue=1) as caller:
        said = caller.login(keys)
        caller.say(zsr.UpHello(said.run, 0, b"", (leaf(keys),), (), (), (), ()))
        yield caller


def raw_handshake(raw: socket.socket) -> None:
    raw.sendall(
        b"GET /ws/aaa HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n"
    )
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        head += raw.recv(1)
    assert head.startswith(b"HTTP/1.1 101 ")


@on_both_loops
def test_a_slow_reader_is_cut_and_others_do_not_wait_for_it(relay: Relay, home: House) -> None:
    with contextlib.ExitStack() as stack:
        ann = stack.enter_context(present(relay, home.ann, home.made))
        ben = stack.enter_context(present(relay, home.ben, None))
        cat = stack.enter_context(slow_caller(relay, home.cat))
        slowest = 0.0
        for ref in range(400):  # 24 MB: its outbox, and what the system between holds
            began = time.monotonic()
            ann.say(envelope(home, 60_000, ref))
            ann.hear(zsr.DownSent)
            assert len(ben.hear(zsr.DownEvent).ct) == 60_000
            slowest = max(slowest, time.monotonic() - began)
        ben.say(zsr.UpPing(1))
        ben.hear(zsr.DownPong)
        gone = [frame for frame in ben.passed if isinstance(frame, zsr.DownPeer) and not frame.online]
        assert [frame.dev for frame in gone] == [home.cat.dev]
        assert slowest < 5
        assert relay.rss() < 250 << 20
        assert cat.closed() in (1013, 1006)
    with present(relay, home.cat, None) as again:  # its place in the log is still there
        again.say(zsr.UpPing(1))
        again.hear(zsr.DownPong)


def test_a_long_absence_is_made_up_for_however_slow_the_reader(relay: Relay, home: House) -> None:
    with present(relay, home.ann, home.made) as ann:
        for ref in range(400):
            ann.say(envelope(home, 60_000, ref))
            ann.hear(zsr.DownSent)
        with slow_caller(relay, home.cat) as cat:  # 24 MB, more than a slow member may be owed of live frames
            for _ in range(400):
                assert len(cat.hear(zsr.DownEvent).ct) == 60_000


def test_who_asks_without_reading_is_not_listened_to() -> None:
    """Answers to one's own requests are not held without end: the relay stops reading, so that sending blocks."""
    with LinkThread(outbox=1 << 20) as link, link.raw() as raw:
        raw_handshake(raw)
        said = message_of(zsr.UpNonce(bytes(32)))
        raw.sendall(masked(said))
        answer = raw.recv(4096)
        relay_frame = zsr.decode_frame(zsr.split_frames(answer[4:])[0])
        logged_in = login(new_device(H("room", b"aaa")), relay_frame.m, "127.0.0.1")
        raw.sendall(masked(message_of(logged_in)))
        pings = masked(message_of(*[zsr.UpPing(1)] * 4000))
        raw.settimeout(2)
        with pytest.raises(TimeoutError):
            flood(raw, pings * 600)  # 31 MB


def flood(raw: socket.socket, data: bytes) -> None:
    """Sends for as long as the other side takes something within the socket's timeout."""
    view = memoryview(data)
    while view:
        view = view[raw.send(view[:65536]) :]


def masked(message: bytes) -> bytes:
    """A WebSocket frame as clients send it, masked with zeros."""
    return struct.pack(">BBQ", 0x82, 0xFF, len(message)) + bytes(4) + message


def test_what_waits_until_answers_are_gone_is_taken_in_the_end_and_missed_by_nobody(home: House) -> None:
    with LinkThread(outbox=100) as link, three(link, home) as (ann, ben, cat):
        for ref in range(200):
            ann.say(envelope(home, 10 + ref, ref))
        for caller in (ann, ben, cat):
            assert [len(caller.hear(zsr.DownEvent).ct) for _ in range(200)] == [10 + ref for ref in range(200)]


def test_a_socket_without_a_sign_of_life_is_closed() -> None:
    with LinkThread(silence=0.6) as link, link.raw() as raw:
        raw_handshake(raw)
        received = b"".join(iter(lambda: raw.recv(4096), b""))
        assert received.startswith(b"\x89\x00")  # asked first
        assert received[2:6] == struct.pack(">BBH", 0x88, 8, 4002)
        assert received[6:] == b"silent"


def test_a_page_that_says_nothing_but_lives_stays() -> None:
    with LinkThread(silence=0.6) as link, Caller(link, "aaa") as caller:
        with pytest.raises(TimeoutError):
            caller.socket.recv(2.0)
        caller.say(zsr.UpNonce(bytes(32)))
        caller.hear(zsr.DownRelay)


def test_who_does_not_ask_for_anything_is_let_go() -> None:
    with LinkThread(head_seconds=0.3) as link, link.raw() as mute, link.raw() as dripping:
        dripping.sendall(b"GET / HT")
        assert mute.recv(1) == b""
        assert dripping.recv(1) == b""


def asks_for_page(link: LinkThread, raw: socket.socket) -> float:
    """When it had the answer's first bytes, and no more."""
    raw.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    assert raw.recv(9) == b"HTTP/1.1 "
    return time.monotonic()


LONG_PAGE = bytes(16 << 20)  # more than the system takes of it at once


def test_a_page_comes_whole_through_the_slowest_line() -> None:
    with LinkThread(page=LONG_PAGE, close_seconds=0.1) as link, link.raw() as slow:
        begun = asks_for_page(link, slow)
        eventually(lambda: link.link._swept > begun + 1, "the relay looked at it long after a farewell's time")
        assert sum(map(len, iter(lambda: slow.recv(1 << 20), b""))) > len(LONG_PAGE)


def test_who_never_takes_the_page_is_let_go() -> None:
    with LinkThread(page=LONG_PAGE, answer_seconds=0.3) as link, link.raw() as mute:
        asks_for_page(link, mute)
        eventually(lambda: not link.link._conns, "its connection is gone")


def test_the_demo_room_has_one_address() -> None:
    demo = H("room", b"aaa")
    with LinkThread() as link, Caller(link, zsr.b64u(demo)) as squatter, Caller(link, "aaa") as guest:
        guest.hello(new_device(demo), None)
        assert squatter.closed() == 4005


def test_a_socket_that_never_logs_in_is_closed_by_its_rooms() -> None:
    with LinkThread(login_timeout=0.3) as link, Caller(link, "aaa") as caller:
        assert caller.closed() == 4001


def ended(raw: socket.socket) -> bool:
    """Whether the other side let go, politely or not."""
    try:
        return raw.recv(1) == b""
    except ConnectionError:
        return True


@on_both_loops
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_everyone_is_told_when_the_relay_ends(relay: Relay, home: House, name: str) -> None:
    with three(relay, home) as (ann, ben, _):  # the third reads nothing: it must not hold the end up
        for _ in range(2):
            ann.say(*(envelope(home, 60_000, ref) for ref in range(60)))
        for _ in range(120):
            ann.hear(zsr.DownSent)
        with socket.create_connection(("127.0.0.1", relay.port)):
            began = time.monotonic()
            relay.signal(name)
            assert (ann.closed(), ben.closed()) == (1001, 1001)
            assert relay.process
            assert relay.process.wait(PATIENCE) == 0
            assert time.monotonic() - began < 5
    assert relay.err.read_text() == ""


def test_a_hang_up_signal_ends_nothing(relay: Relay) -> None:
    relay.signal("SIGHUP")
    assert relay.get("/healthz").body == b"ok\n"


# ---------------------------------------------------------------------------------------------------------- systemd --

ACTIVATE = (
    "import os, sys; os.dup2(int(sys.argv[1]), 3); os.set_inheritable(3, True); "
    "os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS='1'); os.execv(sys.executable, sys.argv[2:])"
)


class Activated(Relay):
    """A relay that is handed its listening socket."""

    listener: socket.socket

    @property
    def command(self) -> list[str]:
        return [sys.executable, "-c", ACTIVATE, str(self.listener.fileno()), *super().command]


def test_a_socket_from_systemd_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    relay = Activated(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as relay.listener:
        os.set_inheritable(relay.listener.fileno(), True)
        popen = subprocess.Popen
        monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: popen(*a, pass_fds=[relay.listener.fileno()], **k))
        try:
            relay.start()
            assert relay.port != relay.listener.getsockname()[1]
            relay.port = relay.listener.getsockname()[1]
            assert f"127.0.0.1:{relay.port}/" in relay.out.read_text()
            assert relay.get("/healthz").body == b"ok\n"
        finally:
            relay.kill()


@pytest.mark.parametrize("abstract", [False, True])
def test_systemd_is_told_of_start_and_end(tmp_path: Path, abstract: bool) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as told:
        told.settimeout(PATIENCE)
        address = f"@zsr-test-{os.getpid()}" if abstract else str(tmp_path / "n")
        told.bind("\0" + address[1:] if abstract else address)
        relay = Relay(tmp_path / "r", env={"NOTIFY_SOCKET": address}).start()
        try:
            assert told.recv(99) == b"READY=1"
            assert relay.get("/healthz").status == 200
            assert relay.stop() == 0
            assert told.recv(99) == b"STOPPING=1"
        finally:
            relay.kill()


def test_sockets_meant_for_another_process_are_left_alone() -> None:
    assert zsr.passed_sockets({"LISTEN_PID": "1", "LISTEN_FDS": "1"}) == []
    assert zsr.passed_sockets({}) == []
    with pytest.raises(zsr.OperatorFault, match="sockets that systemd passed"):
        zsr.passed_sockets({"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "many"})


# ---------------------------------------------------------------------------------------------------------------------
# Story: whole clients in node over real TLS sockets to a real relay process, which is killed and looked into.
# ---------------------------------------------------------------------------------------------------------------------

REAL_GLOBALS = r"""
process.env.NODE_TLS_REJECT_UNAUTHORIZED = '0';
process.removeAllListeners('warning');
const Socket = require('ws'), {IDBFactory, IDBKeyRange} = require('fake-indexeddb');
const quiet = {addEventListener() {}, removeEventListener() {}};
class WebSocket extends Socket { constructor(url) { super(url, {origin: new URL(url).origin.replace('wss', 'https'), perMessageDeflate: false}); } }
Object.assign(globals, {indexedDB: new IDBFactory(), IDBKeyRange, WebSocket, Blob, URL, queueMicrotask, setTimeout, clearTimeout, performance, Date,
  location: {origin: '', host: '', hostname: '', protocol: 'https:'}, navigator: {onLine: true}, document: {visibilityState: 'visible', ...quiet}, ...quiet});
globals.reportError = (e) => { throw e; };
globals.globalThis = globals;
"""

PEOPLE = r"""
'use strict';
const People = (() => {
  const people = new Map();
  const start = async (name, port) => {
    const base = {origin: `https://127.0.0.1:${port}`, host: `127.0.0.1:${port}`, hostname: '127.0.0.1', protocol: 'https:'};
    people.set(name, await Session.start({name: `${name}:${port}`, base, onChange() {}}));
  };
  const dispatch = async (name, intent) => {
    if (intent.files) intent.files = intent.files.map((f) => Object.assign(new Blob([f.bytes], {type: f.type}), {name: f.name}));
    return await people.get(name).dispatch(intent) ?? null;
  };
  const model = (name) => people.get(name).model();
  const texts = async (name, room) => (await people.get(name).store.events(room, {before: null, limit: 100000})).map((e) =>
    Notary.contentOf(Keeper.unrecord(e.value).item)).filter((c) => c.whole && c.kind === 'text').map((c) => c.body.text).reverse();
  const secrets = (name, room) => {
    const {s, view} = people.get(name).rooms.get(room);
    return [...s.keys.values()].flatMap((k) => [k.init, k.send]).concat([...view.invites.values()].map((i) => i.psk)).filter(Boolean);
  };
  const calm = (name, room) => { const {s} = people.get(name).rooms.get(room); return s.outbox.size === 0 && s.alarms.length === 0; };
  const retry = (name) => people.get(name).dispatch({do: 'reconnect'});
  const close = () => { for (const p of people.values()) for (const r of p.rooms.values()) r.close(); people.clear(); };
  return {start, dispatch, model, texts, secrets, calm, retry, close};
})();
"""


@pytest.fixture
def people(relay: Relay) -> Iterator[Node]:
    names = tuple(name for name in blocks(PAGE.read_text("utf-8")) if re.match(CLIENT_BLOCKS, name))
    started = Node([*page_blocks(names), ("people", PEOPLE)], REAL_GLOBALS)
    yield started
    started.call("People.close")
    started.close()


def say(people: Node, name: str, do: str, **intent: Any) -> Any:
    return people.call("People.dispatch", name, {"do": do, **intent})


def gather(people: Node, relay: Relay, *names: str) -> str:
    """A room of these people; the first one makes it. Returns its id."""
    for name in names:
        people.call("People.start", name, relay.port)
    room = str(
        people.call("People.dispatch", names[0], {"do": "create", "title": TITLE, "name": names[0], "own": False})["id"]
    )
    eventually(lambda: people.call("People.model", names[0])["room"]["connection"]["state"] == "connected")
    for name in names[1:]:
        link = say(people, names[0], "invite")["link"]
        say(people, name, "link", text=link)
        people.call("People.dispatch", name, {"do": "join", "name": name})
        eventually(lambda name=name: people.call("People.model", name)["at"] == "room", f"{name} is in")  # type: ignore[misc]
    return room


TITLE = "canary-title-5b1f"
KILLS, MESSAGES = 50, 200


def test_fifty_kills_in_a_conversation_of_two_hundred_messages_lose_and_double_nothing(
    people: Node, relay: Relay
) -> None:
    names, dice = ("ana", "bob", "cleo"), random.Random(2026)
    room = gather(people, relay, *names)
    over = threading.Event()

    def killer() -> None:
        for _ in range(KILLS):
            over.wait(dice.uniform(0.0, 0.6))
            relay.restart()
        over.set()

    thread = threading.Thread(target=killer)
    thread.start()
    said: list[str] = []
    while len(said) < MESSAGES or not over.is_set():
        if len(said) < MESSAGES:
            said.append(f"message {len(said)}")
            say(people, names[len(said) % 3], "send", text=said[-1])
        over.wait(0.2 if len(said) < MESSAGES else 0.5)
        for name in names:
            people.call("People.retry", name)
    thread.join()

    def complete() -> bool:
        return all(sorted(people.call("People.texts", name, room)) == sorted(said) for name in names)

    eventually(complete, "all have all", 60)
    eventually(lambda: all(people.call("People.calm", name, room) for name in names), "all delivered, no alarm", 60)
    assert people.call("People.texts", "ana", room) == people.call("People.texts", "bob", room)
    assert people.call("People.texts", "bob", room) == people.call("People.texts", "cleo", room)


def memory_of(pid: int) -> bytes:
    """Everything that the process has written to its memory."""
    parts = []
    with open(f"/proc/{pid}/maps") as maps, open(f"/proc/{pid}/mem", "rb", 0) as memory:
        for line in maps:
            span, rights, *_ = line.split()
            first, last = (int(x, 16) for x in span.split("-"))
            if rights.startswith("rw") and "[vvar" not in line:
                memory.seek(first)
                parts.append(memory.read(last - first))
    return b"".join(parts)


def test_attack_40_memory_and_log_of_the_relay_hold_no_secret(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """The relay is given nothing but what is sealed or public: Notary.sealGroup, sealDirect, sealSlots.

    Seen to fail without: the seal of events (sent as they are).
    """
    relay = Relay(tmp_path / "relay", "--log-level", "debug").start()
    names = tuple(n for n in blocks(PAGE.read_text("utf-8")) if re.match(CLIENT_BLOCKS, n))
    people = Node([*page_blocks(names), ("people", PEOPLE)], REAL_GLOBALS)
    request.addfinalizer(relay.kill)
    request.addfinalizer(people.close)
    who = ("canary-name-ana-77", "canary-name-bob-78")
    room = gather(people, relay, *who)
    content = b"canary-content-" * 20_000
    say(people, who[0], "files", files=[{"name": "canary-file-name.txt", "type": "text/canary", "bytes": content}])
    for n in range(5):
        say(people, who[n % 2], "send", text=f"canary-text-{n}")

    def arrived() -> bool:
        messages = people.call("People.model", who[1])["room"]["messages"]
        return len(messages) >= 6 and any(m["file"] and m["file"]["state"] == "here" for m in messages)

    eventually(arrived, "text and file arrive")
    say(people, who[0], "invite")
    dump = memory_of(relay.pid) + relay.out.read_bytes() + relay.err.read_bytes()
    assert bytes.fromhex(room) in dump, "a search that finds nothing at all proves nothing"
    assert b"canary-" not in dump
    assert "canary-".encode("utf-16-le") not in dump
    keys = [key for name in who for key in people.call("People.secrets", name, room)]
    assert len(keys) >= 4
    for key in keys:
        assert key not in dump
        assert key.hex().encode() not in dump
    people.call("People.close")


# ══════════════════════════════════════════════════════════════════════════════════════════════════════════════════════
# Load: what the relay does where there is too much of something: limits, hostile input, faults, many relays. What time
# would take minutes for is wound by hand or limited to less; sockets, signals and kills are real.
# ══════════════════════════════════════════════════════════════════════════════════════════════════════════════════════


def only(told: list[Told]) -> Any:
    """The one frame that is told."""
    [(_, frame)] = told
    return frame


# ------------------------------------------------------------------------------------------------------------ memory --


def fill(desk: Desk, home: House, size: int) -> Told:
    """One member of a room posts, and leaves."""
    desk.path = zsr.b64u(home.room)
    name = f"ann of {desk.path}"
    desk.come(name, home.ann, home.made)
    answers = desk.say(name, post(home, ct=bytes(size)))
    desk.leave(name)
    return answers[-1]


def test_where_bytes_run_out_the_largest_room_nobody_is_in_goes_and_its_members_see_it() -> None:
    small, large, used = house(), house(), house()
    desk = Desk(small.room, max_memory=400_000)
    for home, size in ((large, 90_000), (small, 30_000)):
        fill(desk, home, size)
    desk.path = zsr.b64u(used.room)
    desk.come("user", used.ann, used.made)
    while len(desk.rooms._rooms) == 3:
        assert faults(desk.say("user", post(used, ct=bytes(10_000)))) == []
    assert set(desk.rooms._rooms) == {small.room, used.room}
    desk.path = zsr.b64u(large.room)
    told = heard(desk.come("again", large.ann, large.made, cursor=2), "again")
    assert told[0].first > 2, "the range of the log begins beyond what was posted: its sender sees that it is not kept"
    assert not any(isinstance(frame, zsr.DownEvent) for frame in told)


def test_what_time_ended_goes_within_a_second_where_bytes_run_out(home: House) -> None:
    def held(**limits: Any) -> int:
        desk = full_desk(home, ttl=100.0, **limits)
        desk.expire()
        for name in ("ann", "ben", "cat"):
            desk.leave(name)
        fill(desk, home, 60_000)
        desk.come("ann", home.ann)
        desk.now += 99.5
        desk.say("ann", post(home, ct=b"young"))
        desk.rooms._swept = desk.now
        desk.expire(1.0)
        return len(desk.room.log)

    assert held() == 3
    assert held(max_memory=110_000) == 1


def test_what_time_ended_goes_a_few_rooms_at_a_time() -> None:
    """All of them at once would keep everybody waiting; and none has to wait longer than a sweep may take."""
    desk = Desk(b"", ttl=100.0, sweep_seconds=30.0)
    desk.expire()
    homes = [house() for _ in range(60)]
    for home in homes:
        fill(desk, home, 10)
    desk.rooms._swept = desk.now = desk.now + 100.0
    here = [desk.rooms.counts()["rooms"]]
    while here[-1]:
        desk.expire(1.0)
        here.append(desk.rooms.counts()["rooms"])
    assert max(before - after for before, after in itertools.pairwise(here)) <= 3
    assert len(here) <= 33
    assert desk.rooms._purse.used == 0


def test_a_room_that_is_forgotten_frees_its_memory_at_once(home: House) -> None:
    """Not when Python next searches all there is for cycles of garbage."""
    desk = Desk(home.room, ttl=10.0, sweep_seconds=0.0)
    with uncollected():
        desk.come("ann", home.ann, home.made, leaves=(leaf(home.ann),))
        desk.say("ann", post(home), zsr.UpPut(2, bytes(16), 2, 0, b"chunk"))
        there = weakref.ref(desk.room)
        desk.leave("ann")
        desk.expire(11.0)
        assert there() is None


def test_what_is_charged_is_what_python_takes() -> None:
    """Rooms of many sizes, filled with what members may bring: what their objects take is not more than is charged."""
    homes = [crowd(size) for size in (3, 8, 20, 60)]
    shown = [(members, made, [leaf(each) for each in members]) for members, made in homes]
    desk = Desk(homes[0][0][0].room)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for members, made, leaves in shown:
            desk.path = zsr.b64u(members[0].room)
            desk.come(f"{desk.path}", members[0], made, leaves=leaves)
            for _ in range(50):
                desk.say(desk.path, zsr.UpPost(1, made.body.epoch, made.ch, os.urandom(300)))
                desk.say(desk.path, zsr.UpDirect(1, members[1].dev, made.ch, 1, os.urandom(300)))
            for index in range(4):
                desk.say(desk.path, zsr.UpPut(1, b"f" * 16, index, 9, os.urandom(30_000)))
        desk.rooms._verifier = zsr.Verifier(desk.limits)  # the memory of what was verified has a limit of its own
        gc.collect()
        taken = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert 0.5 < taken / desk.rooms.counts()["bytes"] < 1.05


def test_an_idle_room_takes_less_than_two_kilobytes_and_what_is_charged_for_it() -> None:
    limits, purse = zsr.Limits(), zsr.Purse()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        rooms = {key: zsr.Room(key, False, 1, limits, purse) for key in map(struct.Struct(">32xI").pack, range(1000))}
        for room in rooms.values():
            room.append(bytes(300), 0.0)
            room.forget(1)
        taken = (tracemalloc.get_traced_memory()[0] - before) / len(rooms)
    finally:
        tracemalloc.stop()
    assert taken <= limits.room_bytes <= 2048
    assert purse.used == len(rooms) * limits.room_bytes


def test_what_was_verified_is_remembered_up_to_a_weight() -> None:
    recent: zsr.Recent[int, str] = zsr.Recent(10)
    recent.put(1, "one", 4)
    recent.put(2, "two", 4)
    assert recent.get(1) == "one"
    recent.put(3, "three", 6)
    assert [recent.get(each) for each in (1, 2, 3)] == ["one", None, "three"]


# -------------------------------------------------------------------------------------------------- pace of a device --


def test_a_device_that_sends_too_fast_is_told_and_waited_for_and_nothing_is_lost(home: House) -> None:
    desk = full_desk(home, frames_at_once=10, frames_a_second=5)
    told = desk.say("ann", *(post(home, ref) for ref in range(20)))
    assert [frame.ref for frame in heard(told, "ann") if isinstance(frame, zsr.DownSent)] == [*range(20)]
    fault, wait = heard(told, "ann")[-2:]
    assert (fault.ref, fault.code) == (0, "busy")
    assert wait.seconds == pytest.approx(2.6)  # nonce, login and hello were the first three of the twenty-three
    assert fault.retry_ms == int(wait.seconds * 1000) + 1
    assert faults(desk.say("ben", post(home))) == [], "the others have a pace of their own"


def test_bytes_have_a_pace_too_and_time_brings_both_back(home: House) -> None:
    desk = full_desk(home, bytes_at_once=10_000, bytes_a_second=1000)
    desk.now += 10.0
    assert faults(desk.say("ann", post(home, ct=bytes(9_000)))) == []
    assert faults(desk.say("ann", post(home, ct=bytes(2_000)))) == ["busy"]
    desk.now += 4.0
    assert faults(desk.say("ann", post(home, ct=bytes(2_000)))) == []
    desk.now += 3600.0
    assert faults(desk.say("ann", post(home, ct=bytes(9_000)))) == []
    assert faults(desk.say("ann", post(home, ct=bytes(9_000)))) == ["busy"], "a long silence is not saved up"


def test_who_comes_back_has_the_pace_it_left_with(home: House) -> None:
    desk = full_desk(home, frames_at_once=10, frames_a_second=5)
    assert faults(desk.say("ann", *[zsr.UpPing(1)] * 12)) == ["busy"]
    desk.leave("ann")
    desk.come("ann2", home.ann)
    assert faults(desk.say("ann2", zsr.UpPing(1))) == ["busy"]


def test_a_message_of_more_frames_than_are_taken_at_once_is_refused_whole(home: House) -> None:
    desk = full_desk(home, frames_a_message=3)
    assert len(desk.say("ann", *[zsr.UpPing(1)] * 3)) == 3
    assert faults(desk.say("ann", *[zsr.UpPing(1)] * 4)) == ["bad"]


def test_a_member_has_so_many_devices(home: House) -> None:
    desk = full_desk(home, devices_a_member=2)
    tabs = [new_device(home.room) for _ in range(2)]
    added = [entry(tab, bytes([n]) * 16, sponsor=home.ben) for n, tab in enumerate(tabs, 1)]
    spent = [used(bytes([n]) * 16, tab) for n, tab in enumerate(tabs, 1)]

    def upload(count: int) -> bytes:
        listing = next_roster(home, 2, added[:count], spent=spent[:count])
        return commit(home.made, home.under, listing, home.ann, [*home.everyone, *tabs[:count]]).upload

    assert refused(desk, "ann", zsr.UpCommit(1, upload(2))) == "too-big"
    assert faults(desk.say("ann", zsr.UpCommit(1, upload(1)))) == []


def test_rubbish_is_counted_like_all_else(home: House) -> None:
    desk = full_desk(home, frames_at_once=5, frames_a_second=1)
    told = [faults(desk.told(desk.rooms.handle("ann", b"", desk.now))) for _ in range(3)]
    assert told == [["bad"], ["bad"], ["bad", "busy"]]


# ----------------------------------------------------------------------------------------------- places and counts --


@pytest.mark.parametrize(
    ("address", "place"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("127.0.0.1", ""),
        ("::1", ""),
        ("::ffff:127.0.0.1", ""),
        ("unknown", ""),
    ],
)
def test_a_place_is_an_address_or_the_64_of_one(address: str, place: str) -> None:
    assert zsr.place_of(address) == place


@pytest.mark.parametrize(
    ("field", "client"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("198.51.100.9, 192.0.2.7", "192.0.2.7"),  # the first was written by whoever asks
        ("192.0.2.7, 10.1.2.3", "192.0.2.7"),  # through two of ours
        ("10.1.2.3", ""),
        ("", ""),
        ("2001:db8::1", "2001:db8::1"),
        ("192.0.2.7, ", ""),
    ],
)
def test_of_the_forwarded_the_last_that_is_no_proxy_of_ours_counts(field: str, client: str) -> None:
    assert zsr.forwarded_for(field, [zsr.parse_network("10.0.0.0/8")]) == client


def test_rooms_that_one_address_brings_are_counted_until_they_are_forgotten() -> None:
    one, two, three = house(), house(), house()
    desk = Desk(one.room, rooms_an_address=2)

    def enter(name: str, home: House, origin: str) -> list[str]:
        return faults(desk.told(desk.rooms.enter(name, zsr.b64u(home.room), desk.now, origin)))

    assert enter("a", one, "192.0.2.7") == enter("b", two, "192.0.2.7") == []
    assert enter("c", three, "192.0.2.7") == ["busy"]
    assert enter("d", one, "192.0.2.7") == enter("e", three, "192.0.2.8") == enter("f", house(), "") == []
    desk.leave("b")
    assert enter("g", house(), "192.0.2.7") == []


def behind(link: Served, address: str, room: str = "aaa") -> Caller:
    """A socket that a proxy says is someone else's."""
    return Caller(link, room, additional_headers={"X-Forwarded-For": address})


LOCAL = [zsr.parse_network("127.0.0.1")]


def test_an_address_has_so_many_connections_and_is_told_when_to_try_again() -> None:
    with LinkThread(connections_an_address=2, proxies=LOCAL) as link, contextlib.ExitStack() as stack:
        for _ in range(2):
            stack.enter_context(behind(link, "192.0.2.7"))
        with behind(link, "192.0.2.7") as third:
            fault = third.hear(zsr.DownFault)
            assert (fault.code, fault.text) == ("busy", "too many connections come from your address")
            assert fault.retry_ms == link.limits.busy_retry_ms
            assert third.closed() == 1013
        with behind(link, "2001:db8::1") as one, behind(link, "192.0.2.8") as other:
            for caller in (one, other):
                caller.say(zsr.UpNonce(bytes(32)))
                caller.hear(zsr.DownRelay)
        reply = plain_get(link, "/", X_Forwarded_For="192.0.2.7")
        assert (reply.status, reply.fields["retry-after"]) == (503, "15")
    assert link.places == {}, "who has gone is not counted"


def test_a_forwarded_address_counts_only_from_a_trusted_proxy() -> None:
    with (
        LinkThread(connections_an_address=1) as link,
        behind(link, "192.0.2.7") as one,
        behind(link, "192.0.2.7") as two,
    ):
        for caller in (one, two):
            caller.say(zsr.UpNonce(bytes(32)))
            caller.hear(zsr.DownRelay)


def test_beyond_all_connections_some_are_told_why_and_others_let_go() -> None:
    with LinkThread(connections=2, turned_away=1) as link, link.raw() as one, link.raw() as two:
        for raw in (one, two):
            raw_handshake(raw)
        with link.raw() as third, link.raw() as fourth:
            assert ended(fourth)
            raw_handshake(third)
            assert b"this relay has as many connections as it may" in third.recv(4096)
        one.close()
        eventually(lambda: plain_get(link, "/healthz").status == 200, "there is a place again")


@pytest.mark.relay("--limit", "connections=2", "--limit", "turned_away=9", "--limit", "busy_retry_ms=3000")
def test_the_page_shows_a_limit_counts_down_and_recovers(people: Node, relay: Relay) -> None:
    def connection() -> Any:
        return people.call("People.model", "ana")["room"]["connection"]

    with Caller(relay, "aaa"), Caller(relay, "aaa"):
        people.call("People.start", "ana", relay.port)
        people.call("People.dispatch", "ana", {"do": "create", "title": "title", "name": "ana", "own": False})
        eventually(lambda: connection()["why"] == "busy" and connection()["retryAt"] > 0, "told, with a time")
        assert connection()["state"] != "connected"
    eventually(lambda: connection() == {"state": "connected", "why": "", "retryAt": 0}, "recovered by itself")


@pytest.mark.relay("--limit", "frames_at_once=30", "--limit", "frames_a_second=5")
def test_a_page_that_is_slowed_down_says_so_and_loses_nothing(people: Node, relay: Relay) -> None:
    room = gather(people, relay, "ana", "bob")
    said = [f"message {n}" for n in range(30)]
    for text in said:
        say(people, "ana", "send", text=text)
    eventually(lambda: people.call("People.model", "ana")["room"]["connection"]["why"] == "busy", "told")
    eventually(lambda: people.call("People.texts", "bob", room) == said, "all arrive", 90)
    eventually(lambda: people.call("People.model", "ana")["room"]["connection"]["why"] == "", "and it is over")


def test_the_memory_of_connections_counts() -> None:
    with LinkThread(max_memory=400_000) as link, contextlib.ExitStack() as stack:
        for _ in range(4):
            raw_handshake(stack.enter_context(link.raw()))
        assert ended(stack.enter_context(link.raw()))


# --------------------------------------------------------------------------------------------------------- being seen --


def metrics(relay: Relay) -> dict[str, float]:
    reply = relay.get("/metrics")
    assert (reply.status, reply.fields["content-type"]) == (200, "text/plain; version=0.0.4; charset=utf-8")
    lines = [line for line in reply.body.decode().splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


def test_metrics_are_counts_without_ids(relay: Relay, home: House) -> None:
    with three(relay, home) as (ann, ben, _):
        ann.say(envelope(home, 10_000), replace(envelope(home, 10), ch=ZERO32))
        ann.hear(zsr.DownSent)
        ben.hear(zsr.DownEvent)
        assert knock(relay, "https://evil.example") == 403
        found = metrics(relay)
        assert (found["zsr_rooms"], found["zsr_connections"]) == (1, 4)  # the one that asks is the fourth
        assert found["zsr_bytes_held"] > 10_000
        assert found["zsr_deliveries_total"] >= 3
        assert found['zsr_refusals_total{reason="stale"}'] == found['zsr_refusals_total{reason="origin"}'] == 1
        text = relay.get("/metrics").body.decode()
        assert re.sub(r"[a-z_]+|[{}=\"#.+\-\s]|\d{1,12}|TYPE|e", "", text) == "", "names and numbers alone"


def test_health_and_metrics_are_told_to_this_machine_and_to_whom_the_operator_says(tmp_path: Path) -> None:
    def asked(relay: Relay, **fields: str) -> list[int]:
        return [relay.get(path, **fields).status for path in ("/healthz", "/metrics")]

    proxied = Relay(
        tmp_path / "proxied", "--plain", "--trusted-proxy", "127.0.0.1", "--monitor", "192.0.2.0/24"
    ).start()
    try:
        assert asked(proxied) == [200, 200]
        assert asked(proxied, X_Forwarded_For="192.0.2.9") == [200, 200]
        assert asked(proxied, X_Forwarded_For="198.51.100.9") == [403, 403]
    finally:
        proxied.kill()
    unaware = Relay(tmp_path / "unaware", "--plain").start()  # a proxy of which nobody told lets all the world in
    try:
        assert asked(unaware, X_Forwarded_For="198.51.100.9") == [403, 403]
        assert asked(unaware) == [200, 200]
    finally:
        unaware.kill()


def test_logs_are_json_and_name_addresses_on_request_only(tmp_path: Path) -> None:
    limits = ("--plain", "--trusted-proxy", "127.0.0.1", "--limit", "connections_an_address=1", "--log-json")

    def logged(name: str, *options: str) -> list[dict[str, str]]:
        relay = Relay(tmp_path / name, *limits, *options).start()
        try:
            with behind(relay, "192.0.2.7"), behind(relay, "192.0.2.7") as second:
                assert second.closed() == 1013
            relay.stop()
            return [json.loads(line) for line in relay.err.read_text().splitlines()]
        finally:
            relay.kill()

    assert logged("silent") == []
    [line] = logged("asked", "--log-addresses")
    assert line["message"] == "turned away 192.0.2.7: too many connections come from your address"
    assert line["level"] == "info"
    assert datetime.datetime.fromisoformat(line["time"]).tzinfo


def test_the_status_is_one_line_about_the_relay_that_runs(relay: Relay, home: House) -> None:
    with present(relay, home.ann, home.made):
        ended = run_relay("--status", "--host", "127.0.0.1", "--port", str(relay.port))
    assert (ended.returncode, ended.stderr, ended.stdout.count("\n")) == (0, "", 1)
    assert re.match(r"connections 2  rooms 1  held \d\.\dM  passing 0\.0M  deliveries \d+/s  ", ended.stdout)
    ended = run_relay("--status", "--host", "127.0.0.1", "--port", str(free_port()))
    assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (2, "", 1)
    assert "no relay answers at 127.0.0.1 port" in ended.stderr


# ------------------------------------------------------------------------------------------------------ hostile bytes --


def frame_of(opcode: int, data: bytes = b"", fin: bool = True) -> bytes:
    """A WebSocket frame as clients send it, masked with zeros."""
    size = len(data)
    head = struct.pack(">BB", opcode | fin << 7, 0x80 | min(size, 126))
    return head + (struct.pack(">H", size) if size > 125 else b"") + bytes(4) + data


def code_of(raw: socket.socket) -> int:
    """The code of the close frame that a socket ends with; 0 where there is none."""
    data = b""
    with contextlib.suppress(ConnectionError):
        data = b"".join(iter(lambda: raw.recv(65536), b""))
    at = data.rfind(b"\x88", 0, len(data) - 3)
    return int.from_bytes(data[at + 2 : at + 4], "big") if at >= 0 else 0


@pytest.mark.parametrize(
    "flood_of",
    [frame_of(9), frame_of(10, b"x"), frame_of(0, fin=False), frame_of(0, b"x", fin=False)],
    ids=["pings", "pongs", "empty fragments", "fragments of one byte"],
)
def test_a_flood_of_frames_that_end_no_message_is_cut(flood_of: bytes) -> None:
    with LinkThread(odd_frames=500, close_seconds=0.2) as link, link.raw() as raw:
        raw_handshake(raw)
        began = frame_of(2, b"x", fin=False) if flood_of[0] & 15 == 0 else b""
        with contextlib.suppress(ConnectionError):
            raw.sendall(began + flood_of * 20_000)
        assert code_of(raw) in (1008, 0)
        with Caller(link, "aaa") as caller:
            caller.say(zsr.UpNonce(bytes(32)))
            caller.hear(zsr.DownRelay)


BLANKS = b" " * 12_000


@pytest.mark.timeout(10)
@pytest.mark.parametrize("value", [BLANKS + b"\0", b"a" + BLANKS + b"b", b"a" + BLANKS + b"\0"])
def test_a_head_is_read_in_a_moment_whatever_blanks_it_has(value: bytes) -> None:
    """It comes back at all: in the cube of these blanks that would be hours."""
    read = zsr.parse_request(b"GET / HTTP/1.1\r\nHost: a\r\nX:" + value + b"\r\n\r\n")
    assert (read is None) == (b"\0" in value)
    assert read is None or read.fields["x"] == value.decode()


FORBIDDEN = [b"\x82\x01x", struct.pack(">BBQ", 0x82, 0xFF, 1 << 30) + bytes(4), frame_of(1, b"x")]


@pytest.mark.parametrize("first", FORBIDDEN, ids=["not masked", "too large", "text"])
def test_who_goes_on_after_the_relays_farewell_is_let_go(first: bytes) -> None:
    with LinkThread(close_seconds=0.3) as link, link.raw() as raw:
        raw_handshake(raw)
        raw.sendall(first)
        end = time.monotonic() + PATIENCE
        with contextlib.suppress(OSError):
            while link.link._conns and time.monotonic() < end:
                raw.sendall(b"x")
                time.sleep(0.05)
        assert not link.link._conns


def test_a_flood_after_the_relays_farewell_is_not_looked_at() -> None:
    with LinkThread(odd_frames=500, close_seconds=3600.0) as link, link.raw() as raw:
        raw_handshake(raw)
        raw.sendall(frame_of(1, b"x"))
        assert raw.recv(1) == b"\x88"
        raw.sendall(frame_of(9) * 20_000)
        eventually(lambda: [conn._sieve for conn in link.link._conns] == [None], "nothing of it is looked at any more")


def nearly_whole(link: LinkThread, size: int, before: bytes = b"") -> socket.socket:
    """A connection that lacks the last byte of a message, once the relay has the others."""
    raw = link.raw()
    raw_handshake(raw)
    raw.sendall(before + masked(bytes(size))[:-1])
    eventually(lambda: link.link._held >= size, "what came is counted")
    return raw


def pieces_held() -> int:
    """Bytes of messages that are not whole, wherever a parser of websockets still has some."""
    parsers = [each for each in gc.get_objects() if isinstance(each, ServerProtocol)]
    return sum(len(each.reader.buffer) for each in parsers)


@pytest.mark.parametrize("before", [b"", frame_of(1, b"x")], ids=["open", "after the relay's farewell"])
def test_a_message_that_is_not_whole_is_counted_and_goes_with_its_connection(before: bytes) -> None:
    with uncollected(), LinkThread(close_seconds=PATIENCE) as link:
        nearly_whole(link, 1 << 20, before).close()
        eventually(lambda: not link.link._conns and not link.link._held, "it is gone")
        assert pieces_held() < 1 << 19


def test_who_is_cut_gives_back_what_its_message_took() -> None:
    with uncollected(), LinkThread(close_seconds=PATIENCE) as link, nearly_whole(link, 1 << 20):
        (conn,) = link.link._conns
        link.loop.call_soon_threadsafe(conn.cut, 1013, "too slow")
        eventually(lambda: not link.link._held, "nothing of it is counted")
        assert pieces_held() < 1 << 19


def test_frames_that_wait_are_counted_however_small() -> None:
    with LinkThread() as link:
        conn = zsr.Conn(link.link)
        conn._events.extend([Frame(Opcode.PING, b"")] * 1000)
        link.loop.call_soon_threadsafe(conn._weigh)
        eventually(lambda: conn.held >= 100_000, "each is counted as an object")
        conn._events.clear()
        link.loop.call_soon_threadsafe(conn._weigh)
        eventually(lambda: not link.link._held, "and no longer")


def test_a_message_beyond_the_limit_is_refused_however_small_the_limit() -> None:
    with LinkThread(max_message=1000) as link, link.raw() as raw:
        raw_handshake(raw)
        raw.sendall(frame_of(2, bytes(1001)))
        assert code_of(raw) == 1009


def test_all_others_hear_of_who_is_cut_while_frames_go_out(home: House) -> None:
    """Whoever had theirs already and whoever had not: cat is cut at her turn, in the middle."""
    for turns in itertools.permutations(("ann", "ben", "cat")):
        with LinkThread(outbox=100_000) as link, three(link, home) as (ann, ben, cat):
            callers = {"ann": ann, "ben": ben, "cat": cat}
            room = link.link._rooms._rooms[home.room]
            peers = {name: cast(zsr.Peer, room.seats[getattr(home, name).dev].peer) for name in callers}
            conns, others = {name: peer.conn for name, peer in peers.items()}, room.others(peers["cat"])

            def tick(turns: Any = turns, link: LinkThread = link, conns: Any = conns, others: Any = others) -> None:
                link.link._send(others, zsr.encode_frame(zsr.DownPong(1)), None)
                conns["cat"]._blocked = True
                link.link._send((conns["cat"],), bytes(100_001), None)
                link.link._dirty = dict.fromkeys(conns[name] for name in turns)  # type: ignore[assignment]

            link.loop.call_soon_threadsafe(tick)
            for caller in (ann, ben):
                told = caller.hear(zsr.DownPeer, 5)
                while told.online or told.dev != home.cat.dev:
                    told = caller.hear(zsr.DownPeer, 5)


def test_who_says_farewell_while_much_waits_for_it_is_answered(relay: Relay) -> None:
    demo, context = H("room", b"aaa"), relay.trust()
    assert context
    with (
        Caller(relay, "aaa") as ann,
        context.wrap_socket(narrow_socket(relay.port), server_hostname="127.0.0.1") as tls,
    ):
        ann.hello(new_device(demo), None)
        raw_handshake(tls)
        tls.sendall(masked(message_of(zsr.UpNonce(bytes(32)))))
        said = zsr.decode_frame(zsr.split_frames(tls.recv(4096)[4:])[0])
        keys = new_device(demo)
        tls.sendall(masked(message_of(login(keys, said.m, "127.0.0.1"))))
        tls.sendall(masked(message_of(hello(None, leaves=[leaf(keys)]))))
        ann.hear(zsr.DownPeer)
        for ref in range(100):
            ann.say(zsr.UpPost(ref, 0, bytes(32), bytes(60_000)))
            ann.hear(zsr.DownSent)
        tls.sendall(frame_of(8, b"\x03\xe8"))
        gone = ann.hear(zsr.DownPeer)
        while gone.online:
            gone = ann.hear(zsr.DownPeer)
        assert b"".join(iter(lambda: tls.recv(65536), b"")).endswith(b"\x88\x02\x03\xe8")
    assert "bug" not in relay.err.read_text()


def test_messages_that_never_end_take_their_share_of_memory_and_no_more() -> None:
    """Many connections, each with a message that is nearly whole: who holds most goes, others do not notice."""
    with LinkThread(link_share=0.0, link_least=2 << 20) as link, contextlib.ExitStack() as stack:
        caller = stack.enter_context(Caller(link, "aaa"))
        hostile = [stack.enter_context(link.raw()) for _ in range(8)]
        for raw in hostile:
            raw_handshake(raw)
            with contextlib.suppress(ConnectionError):
                raw.sendall(masked(bytes(1 << 20))[:-1])
        caller.say(zsr.UpNonce(bytes(32)))
        caller.hear(zsr.DownRelay)
        eventually(lambda: link.link._held <= 2 << 20, "what comes and goes has its share")
        assert sum(map(is_over, hostile)) >= 6


def is_over(raw: socket.socket) -> bool:
    """Whether the other side has ended it, without waiting."""
    raw.settimeout(0.5)
    try:
        return raw.recv(64) != b"" or True
    except TimeoutError:
        return False
    except ConnectionError:
        return True


def calls_of(work: Callable[[], object]) -> int:
    """How many Python functions are entered, a measure of work that no other process disturbs."""
    calls = 0

    def count(_frame: object, event: str, _argument: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(None)
    return calls


def member_frames(home: House) -> list[bytes]:
    """One of each frame that a member sends, most of them good."""
    shown, ch = leaf(fresh_leaf(home.ann)), home.made.ch
    frames: list[Any] = [
        zsr.UpNonce(bytes(32)), zsr.UpFetch(b"i" * 16), zsr.UpPing(7), zsr.UpHead(), hello(home.made, leaves=[shown]),
        post(home), zsr.UpLive(2, 1, ch, b"live"), zsr.UpAck(RUN, 1), zsr.UpDack((1, 2, 3)), zsr.UpLeaf(shown),
        zsr.UpDirect(3, home.cat.dev, ch, 1, b"direct"), zsr.UpWelcome(4, home.ben.dev, b"welcome"),
        zsr.UpInvite(5, invite(home.ann, b"i" * 16)), zsr.UpRequest(request(home.ann, 4, bytes(32))), put(0, 2),
        zsr.UpGet(home.ann.dev, b"f" * 16, 0, 9), zsr.UpGot(home.ann.dev, b"f" * 16), zsr.UpDrop(b"f" * 16),
        zsr.UpRefuse(home.ben.dev, 1), *hostile_frames(home),
    ]  # fmt: skip
    return [zsr.encode_frame(frame) for frame in frames]


MEMBER_FRAMES = member_frames(SHARED)


@st.composite
def bent(draw: st.DrawFn) -> bytes:
    """A frame of a member, with a piece of it replaced, left out or doubled."""
    data = draw(st.sampled_from(MEMBER_FRAMES))
    start = draw(st.integers(0, len(data)))
    stop = min(len(data), start + draw(st.integers(0, 8)))
    filling = draw(st.one_of(st.binary(max_size=8), st.just(data[start : start + 64]), st.just(b"\xff" * 8)))
    return data[:start] + filling + data[stop:]


@settings(max_examples=400, deadline=None)
@given(bent())
def test_a_bent_frame_is_read_as_what_it_spells_or_refused_within_its_size(data: bytes) -> None:
    read: list[Any] = []

    def work() -> None:
        with contextlib.suppress(zsr.Bad):
            read.append(zsr.decode_frame(data))

    assert calls_of(work) < 60 + 8 * len(data)
    assert [zsr.encode_frame(frame) for frame in read] in ([], [data]), "there is one spelling"


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(bent(), min_size=1, max_size=4))
def test_whatever_members_send_what_is_refused_changes_nothing_and_what_is_held_is_counted(sent: list[bytes]) -> None:
    desk = full_desk(SHARED, max_room_memory=60_000, directs=2, files=1, invites=2, requests=2)
    for data in sent:
        before = snapshot(desk)
        told = desk.told(desk.rooms.handle("ann", zsr.V(data), desk.now))
        if faults(told) and not any(isinstance(frame, zsr.Close) for _, frame in told):
            assert snapshot(desk) == before
        assert desk.room.used == counted(desk.room) == desk.rooms._purse.used <= desk.limits.max_room_memory


def test_a_member_that_never_acknowledges_holds_nothing_back_for_long(home: House) -> None:
    desk = full_desk(home, max_room_memory=60_000)
    answers: list[list[str]] = []
    for _ in range(200):
        desk.now += 1.0
        answers.append([code for code in faults(desk.say("ann", post(home, ct=bytes(500)))) if code != "full"])
        for name in ("ann", "ben"):
            desk.say(name, zsr.UpAck(RUN, desk.room.next - 1), zsr.UpAck(RUN, zsr.MAX_UINT))
    assert answers == [[]] * 200
    assert desk.room.used <= 60_000


SMUGGLED = b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n"


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"GET http://evil.example/ HTTP/1.1\r\nHost: a\r\n\r\n", b"400"),
        (b"GET //evil.example/ HTTP/1.1\r\nHost: a\r\n\r\n", b"404"),
        (b"GET /..%2f..%2fetc/passwd HTTP/1.1\r\nHost: a\r\n\r\n", b"404"),
        (b"GET /%2e%2e/zerosecretroom.py HTTP/1.1\r\nHost: a\r\n\r\n", b"404"),
        (b"GET /index.html\0.png HTTP/1.1\r\nHost: a\r\n\r\n", b"400"),
        (b"GET /\xff HTTP/1.1\r\nHost: a\r\n\r\n", b"400"),
        (b"GET /trust\x20HTTP/1.1\r\nX: HTTP/1.1\r\nHost: a\r\n\r\n", b"200"),
        (b"OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n", b"400"),
        (b"CONNECT a:443 HTTP/1.1\r\nHost: a\r\n\r\n", b"400"),
        (b"GET / HTTP/1.1\r\nHost: a\r\nX\0: b\r\n\r\n", b"400"),
        (b"GET / HTTP/1.1\r\nHost: a\nInjected: b\r\n\r\n", b"400"),
        (b"GET / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n" + SMUGGLED, b"200"),
        (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 999\r\n\r\n" + SMUGGLED, b"405"),
        (b"GET / HTTP/1.1\r\nHost: a\r\n" + b"A: b\r\n" * 3000, b"431"),
        (b"GET /ws/aaa HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
         b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: short\r\n\r\n", b"400"),
        (b"GET /ws/aaa HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 8\r\n"
         b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n", b"400"),
    ],
)  # fmt: skip
def test_tricks_with_paths_and_fields_get_one_plain_answer(lasting_relay: Relay, head: bytes, status: bytes) -> None:
    context = lasting_relay.trust()
    assert context
    with tls_socket(lasting_relay, context) as tls:
        with contextlib.suppress(ConnectionError):
            tls.sendall(head)
        answer = b"".join(iter(lambda: tls.recv(65536), b""))
    assert answer.split()[1] == status
    assert len(re.findall(rb"HTTP/1\.1 \d{3} ", answer)) == 1, "what follows a head is no second request"
    assert b"root:x:" not in answer
    assert b"Injected" not in answer


OPENING = {
    "Host": "a",
    "Upgrade": "websocket",
    "Connection": "Upgrade",
    "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
    "Sec-WebSocket-Version": "13",
}


def opening_answer(version: str = "1.1", **changed: str) -> bytes:
    """The answer to RFC 6455's own example of an opening, with some of its fields changed."""
    fields = OPENING | {name.replace("_", "-"): value for name, value in changed.items()}
    head = f"GET /ws/aaa HTTP/{version}\r\n" + "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    request = zsr.parse_request(head.encode() + b"\r\n")
    assert request
    return zsr.open_socket(request)


@pytest.mark.parametrize("connection", ["Upgrade", "keep-alive, Upgrade", "keep-alive,upgrade"])
def test_an_opening_is_answered_as_in_rfc_6455(connection: str) -> None:
    status, *fields = opening_answer(Connection=connection).removesuffix(b"\r\n\r\n").split(b"\r\n")
    assert status == b"HTTP/1.1 101 Switching Protocols"
    assert sorted(fields) == [
        b"Connection: Upgrade", b"Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=", b"Upgrade: websocket",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "changed",
    [
        {"version": "1.0"},
        {"Connection": "close"},
        {"Connection": "Upgraded"},
        {"Sec_WebSocket_Key": ""},
        {"Sec_WebSocket_Key": "dGhlIHNhbXBsZSBub25jZQ=="[:-4]},
        {"Sec_WebSocket_Key": "dGhlIHNhbXBsZSBub25jZSE="},
        {"Sec_WebSocket_Key": "dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="},
        {"Sec_WebSocket_Version": "8"},
        {"Sec_WebSocket_Version": "13, 8"},
        {"Content_Length": "5"},
        {"Transfer_Encoding": "chunked"},
    ],
)
def test_half_an_opening_opens_nothing(changed: dict[str, str]) -> None:
    assert opening_answer(**changed) == b""


def test_a_connection_that_ended_is_freed_at_once() -> None:
    """Not when Python next searches all there is for cycles of garbage, which the relay seldom has done."""
    with uncollected(), LinkThread() as link:
        for farewell in (True, False):
            raw = link.raw()
            raw_handshake(raw)
            if farewell:
                raw.sendall(bytes.fromhex("888200000000" + "03e8"))
                assert raw.recv(1) == b"\x88"
            raw.close()
        eventually(lambda: not link.link._conns, "both are gone")
        link.loop.call_soon_threadsafe(link.link._round.clear)
        eventually(lambda: not any(isinstance(each, zsr.Conn) for each in gc.get_objects()), "nothing is left")


@pytest.mark.relay("--limit", "head_seconds=1", "--limit", "login_timeout=1", "--limit", "close_seconds=1")
def test_whoever_drips_is_let_go_in_every_phase(relay: Relay) -> None:
    context = relay.trust()
    assert context
    hello_of_tls = client_hello()
    with contextlib.ExitStack() as stack:

        def opened() -> socket.socket:
            return stack.enter_context(socket.create_connection(("127.0.0.1", relay.port), PATIENCE))

        in_tls, in_head, silent_one = opened(), opened(), opened()
        late = stack.enter_context(Caller(relay, "aaa"))
        greeted = stack.enter_context(Caller(relay, "aaa"))
        greeted.say(zsr.UpNonce(bytes(32)))
        greeted.hear(zsr.DownRelay)
        tls = stack.enter_context(context.wrap_socket(in_head, server_hostname="127.0.0.1"))
        end = time.monotonic() + 30
        while time.monotonic() < end and hello_of_tls:
            try:
                in_tls.sendall(hello_of_tls[:1])
                tls.sendall(b"G")
            except OSError:
                break
            hello_of_tls = hello_of_tls[1:]
            time.sleep(0.2)  # the pace of the one who drips; the relay's clock decides when that is over
        assert ended(in_tls)
        assert ended(silent_one)
        assert late.closed() == greeted.closed() == 4001
        eventually(lambda: metrics(relay)["zsr_connections"] == 1, "all gone but who asks")


def client_hello() -> bytes:
    """The first bytes of a TLS client."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = ssl.create_default_context().wrap_bio(incoming, outgoing, server_hostname="localhost")
    with contextlib.suppress(ssl.SSLWantReadError):
        tls.do_handshake()
    return outgoing.read()


def test_what_tls_says_of_itself_is_taken_before_others_have_their_turn(relay: Relay) -> None:
    """Connections share the buffer that TLS writes to: an alert left in it would go to whoever sends next."""
    shared = ssl.MemoryBIO()
    pipe = zsr.Tls(zsr.tls_context(relay.state / zsr.TLS_CERT, relay.state / zsr.TLS_KEY), shared)
    context, incoming, outgoing = relay.trust(), ssl.MemoryBIO(), ssl.MemoryBIO()
    assert context
    client = context.wrap_bio(incoming, outgoing, server_hostname="localhost")
    with contextlib.suppress(ssl.SSLWantReadError):
        client.do_handshake()
    assert list(pipe.receive(outgoing.read())) == [b""]
    incoming.write(pipe.pending())
    client.do_handshake()
    client.write(b"the last word")
    received = iter(pipe.receive(outgoing.read() + b"\x17\x03\x03\x00\x20" + bytes(32)))
    assert (next(received), shared.pending) == (b"the last word", 0)
    with pytest.raises(ssl.SSLError):
        next(received)
    assert pipe.pending()


async def junk_logins(relay: Relay, count: int) -> set[int | None]:
    """So many logins with wrong keys, nonces and signatures, 64 at a time; the codes with which they were ended."""
    eve, room, codes = new_device(bytes(32)), zsr.b64u(bytes(32)), set[int | None]()
    url, context, numbers = relay.socket_url(room), relay.trust(), iter(range(count))

    def junk(n: int, said: zsr.DownRelay) -> zsr.UpLogin:
        frame = login(eve, said.m, "127.0.0.1")
        wrong = [{"sig": os.urandom(64)}, {"sigpub": os.urandom(65)}, {"m": os.urandom(300)}][n % 3]
        return replace(frame, **wrong)

    async def keep_on() -> None:
        for n in numbers:
            async with connect_client(url, ssl=context, compression=None, proxy=None) as one:
                await one.send(message_of(zsr.UpNonce(os.urandom(32))))
                (said,) = zsr.split_frames(cast(bytes, await one.recv()))
                await one.send(message_of(junk(n, zsr.decode_frame(said))))
                await one.wait_closed()
            codes.add(one.close_code)

    await asyncio.gather(*[keep_on() for _ in range(64)])
    return codes


@pytest.mark.parametrize("count", [300, pytest.param(100_000, marks=[pytest.mark.fuzz, pytest.mark.timeout(3600)])])
def test_junk_logins_leave_nothing_behind(relay: Relay, count: int) -> None:
    """Each costs its sender a connection, and the relay nothing that lasts."""
    asyncio.run(junk_logins(relay, 64))
    before = relay.rss()
    assert asyncio.run(junk_logins(relay, count)) == {4001}
    eventually(lambda: metrics(relay)["zsr_connections"] == 1, "nobody stays")
    found = metrics(relay)
    assert (found["zsr_rooms"], found["zsr_entries"]) == (0, 0)
    assert found["zsr_bytes_held"] <= zsr.Limits().conn_bytes
    assert relay.rss() - before < 20 << 20
    assert relay.err.read_text() == ""


ABOVE = 128 << 20  # bytes that the process may take beyond --max-memory, as README says


def test_under_a_mixture_of_floods_the_process_stays_within_its_memory(tmp_path: Path) -> None:
    """Strangers that never end a message, members that fill rooms, who read nothing, and hold files."""
    relay = Relay(
        tmp_path, "--max-memory", "64M", "--limit", "bytes_a_second=1G", "--limit", "bytes_at_once=1G"
    ).start()
    highest = 0
    try:
        with contextlib.ExitStack() as stack:
            for _ in range(30):
                caller = stack.enter_context(Caller(relay, "aaa"))
                with contextlib.suppress(OSError, ConnectionClosed):
                    caller.socket.send([bytes(3 << 20)])
            for _ in range(4):
                full = house()
                ann = stack.enter_context(present(relay, full.ann, full.made))
                stack.enter_context(slow_caller(relay, full.ben))
                with contextlib.suppress(ConnectionClosed, TimeoutError):
                    for ref in range(160):
                        ann.say(envelope(full, 200_000, ref))
                    for index in range(40):
                        ann.say(zsr.UpPut(1000 + index, b"f" * 16, index, 60, bytes(262_144)))
                    ann.say(zsr.UpPing(99))
                    ann.hear(zsr.DownPong)
                highest = max(highest, relay.rss())
            assert metrics(relay)["zsr_bytes_held"] <= 64 << 20
        assert highest < (64 << 20) + ABOVE
        assert highest > 40 << 20, "there was something to be held"
    finally:
        relay.kill()


@pytest.mark.fuzz
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("target", ["wire", "rooms"])
def test_atheris_finds_nothing_but_faults(target: str) -> None:
    """Coverage-guided: `pip install atheris`, then `-m fuzz`; ZSR_FUZZ_RUNS says how many inputs."""
    pytest.importorskip("atheris")
    runs = os.environ.get("ZSR_FUZZ_RUNS", "200000")
    command = [sys.executable, "-c", FUZZ, target, f"-runs={runs}", "-max_len=2000", "-seed=1"]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert f"Done {runs}" in ended.stderr


class EchoLink(zsr.Link):
    """Link without Rooms: every message goes back as it came."""

    def enter(self, conn: zsr.Conn, room_path: str) -> None: ...

    def depart(self, conn: zsr.Conn) -> None: ...

    def handle(self, conn: zsr.Conn, messages: list[bytes]) -> None:
        for message in messages:
            conn._hold((zsr.binary_header(len(message)), message))
        conn.flush()


class EchoThread(LinkThread):
    kind = EchoLink


@pytest.mark.fuzz
@pytest.mark.timeout(1800)
def test_autobahn_finds_what_it_should_in_the_sockets(tmp_path: Path) -> None:
    """`wstest` of the package autobahntestsuite, which needs Python 2.7, must be found. Its cases of compression are left
    out, for none is offered. Text is refused with 1003 wherever a case sends some: messages are binary."""
    if not (client := shutil.which("wstest")):
        pytest.skip("AUTOBAHN NOT TRIED: no wstest is installed")
    with EchoThread(login_timeout=1800.0, max_message=32 << 20, outbox=64 << 20, odd_frames=1 << 20) as link:
        cases = [f"{group}.*" for group in (1, 2, 3, 4, 5, 6, 7, 9, 10)]
        servers = [{"agent": "link", "url": link.socket_url("aaa")}]
        spec = {"outdir": str(tmp_path), "servers": servers, "cases": cases, "exclude-cases": []}
        (tmp_path / "spec.json").write_text(json.dumps(spec | {"exclude-agent-cases": {}}))
        command = [client, "-m", "fuzzingclient", "-s", str(tmp_path / "spec.json")]
        subprocess.run(command, check=True, capture_output=True, timeout=1500)
    found = json.loads((tmp_path / "index.json").read_text())["link"]
    passed = [name for name, each in found.items() if each["behavior"] != "FAILED"]
    text = [name for name, each in found.items() if each["behavior"] == "FAILED" and each["remoteCloseCode"] == 1003]
    print(f"\n{len(found)} cases: {len(passed)} passed, {len(text)} sent text and were refused")
    # websockets sees an error in a close amid the fragments of a message, and says 1002 where the case expects 1000
    assert set(found) - set(passed) - set(text) == {"7.1.5"}
    binary = re.compile(r"(1\.2|2|3|4\.[12]|7\.[3579]|7\.13|9\.[2468])\.\d+$")
    assert [name for name in text if binary.match(name)] == []


FUZZ = textwrap.dedent("""
    import sys
    import atheris

    with atheris.instrument_imports(include=["zerosecretroom"]):
        import zerosecretroom as zsr
    import test_zerosecretroom as tests

    def wire(data):
        try:
            assert zsr.encode_frame(zsr.decode_frame(data)) == data
        except zsr.Bad:
            pass

    def rooms(data):
        place = data[0] % len(tests.MEMBER_FRAMES) if data else 0
        bent = tests.MEMBER_FRAMES[place][: data[1] if len(data) > 1 else 0] + data[2:]
        desk = tests.full_desk(tests.SHARED, max_room_memory=60_000)
        desk.rooms.handle("ann", zsr.V(bent), desk.now)
        assert desk.room.used == tests.counted(desk.room) == desk.rooms._purse.used <= 60_000

    target = {"wire": wire, "rooms": rooms}[sys.argv.pop(1)]
    atheris.Setup(sys.argv, target)
    atheris.Fuzz()
""")


# ------------------------------------------------------------------------------------------------------------ faults --


@pytest.mark.relay("--limit", "silence=2")
def test_who_was_silent_only_while_the_relay_was_stopped_stays(relay: Relay, home: House) -> None:
    with present(relay, home.ann, home.made) as ann:
        relay.signal("SIGSTOP")
        time.sleep(4)  # twice the silence that ends a connection
        relay.signal("SIGCONT")
        for n in range(30):  # several looks at all connections
            ann.say(zsr.UpPing(n))
            assert ann.hear(zsr.DownPong).token == n
            time.sleep(0.1)


def test_a_clock_that_jumps_ends_what_was_signed_until_then_and_nothing_else(home: House) -> None:
    desk = full_desk(home, sweep_seconds=0.0)
    soon = desk.wall + 60_000
    desk.say("ann", zsr.UpInvite(1, invite(home.ann, b"i" * 16, expiry=soon)), post(home), put(0, 2))
    for jump in (-(10**11), +(10**11)):
        desk.wall += jump
        assert desk.expire(0.5) == []
        assert [len(desk.room.log), len(desk.room.files), len(desk.room.members())] == [2, 1, 3]
    desk.wall += 61_000
    desk.expire(0.5)
    assert len(desk.room.invites) == 0
    assert faults(desk.say("ann", post(home))) == []


def within(script: str, *command: str) -> list[str]:
    """A command among mounts of its own, which a shell script makes before."""
    return ["unshare", "--mount", "sh", "-ec", f'{script}; exec "$@"', "sh", *command]


def in_own_mount(script: str, *command: str) -> subprocess.CompletedProcess[str]:
    asked = within(script, *command)
    return subprocess.run(asked, capture_output=True, text=True, timeout=PATIENCE, env=relay_environment({}))


class ReadOnly(Relay):
    """A relay that may not write into its state directory."""

    @property
    def command(self) -> list[str]:
        return within(
            f"mount --bind {self.state} {self.state} && mount -o remount,bind,ro {self.state}", *super().command
        )


@pytest.fixture
def mounts() -> None:
    if reason := why_no_machine():
        pytest.skip(reason)


@pytest.mark.usefixtures("mounts")
def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    relay = Relay(tmp_path)
    relay.state.mkdir()
    ended = in_own_mount(f"mount -t tmpfs -o size=4k none {relay.state}", *relay.command)
    assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (2, "", 1)
    assert "cannot be written (No space left on device): make room there or use --state-dir" in ended.stderr


@pytest.mark.usefixtures("mounts")
def test_a_state_directory_that_is_read_only_serves_as_long_as_all_is_there(tmp_path: Path) -> None:
    relay = ReadOnly(tmp_path)
    relay.state.mkdir()
    ended = subprocess.run(relay.command, capture_output=True, text=True, timeout=PATIENCE, env=relay_environment({}))
    assert (ended.returncode, ended.stderr.count("\n")) == (2, 1)
    assert "cannot be written (Read-only file system)" in ended.stderr
    Relay(tmp_path).start().stop()
    assert relay.start().stop() == 0, "it goes politely"
    assert relay.err.read_text() == ""
    assert "  page  " in relay.out.read_text()


class Narrow(Relay):
    """A relay with few file descriptors."""

    @property
    def command(self) -> list[str]:
        return ["prlimit", "--nofile=80:80", *super().command]


def test_where_descriptors_run_out_members_stay_and_others_are_told_or_wait(tmp_path: Path, home: House) -> None:
    relay = Narrow(tmp_path).start()
    try:
        with contextlib.ExitStack() as stack:
            ann = stack.enter_context(present(relay, home.ann, home.made))
            crowd = [stack.enter_context(socket.create_connection(("127.0.0.1", relay.port))) for _ in range(31)]
            with Caller(relay, "aaa") as late:
                assert late.hear(zsr.DownFault).text == "this relay has as many connections as it may"
            crowd += [stack.enter_context(socket.create_connection(("127.0.0.1", relay.port))) for _ in range(60)]
            ann.say(zsr.UpPing(1))
            assert ann.hear(zsr.DownPong).token == 1
            for raw in crowd:
                raw.close()
            eventually(lambda: metrics(relay)["zsr_connections"] == 2, "the others are gone")
        assert "bug" not in relay.err.read_text()
    finally:
        relay.kill()


class Weather:
    """A network between clients and a relay: latency, stalls and resets by dice; none once it is calm."""

    def __init__(self, port: int, seed: int) -> None:
        self.target, self.dice, self.calm = port, random.Random(seed), False
        self.counts = dict.fromkeys(("connections", "resets", "stalls", "refused"), 0)
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self.listener.getsockname()[1]
        self.started, self.thread = threading.Event(), threading.Thread(target=lambda: asyncio.run(self.blow()))

    async def blow(self) -> None:
        self.loop, self.over = asyncio.get_running_loop(), asyncio.Event()
        server = await asyncio.start_server(self.carry, sock=self.listener)
        self.started.set()
        await self.over.wait()
        server.close()
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()

    async def carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.counts["connections"] += 1
        try:
            there, back = await asyncio.open_connection("127.0.0.1", self.target)
        except OSError:
            self.counts["refused"] += 1
            writer.transport.abort()
            return
        both = [asyncio.ensure_future(self.pass_on(*way)) for way in ((reader, back), (there, writer))]
        try:
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in both:
                way.cancel()
            for end in (writer, back):
                end.transport.abort()

    async def pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                if not self.calm:
                    luck = self.dice.random()
                    if luck < 0.01:
                        self.counts["resets"] += 1
                        return
                    self.counts["stalls"] += luck < 0.03
                    await asyncio.sleep(self.dice.uniform(0.5, 2.0) if luck < 0.03 else self.dice.uniform(0.0, 0.05))
                writer.write(data)
                await writer.drain()

    def __enter__(self) -> Weather:
        self.thread.start()
        assert self.started.wait(PATIENCE)
        return self

    def __exit__(self, *_: object) -> None:
        self.loop.call_soon_threadsafe(self.over.set)
        self.thread.join(PATIENCE)


CHAOS_SECONDS = float(os.environ.get("ZSR_CHAOS_SECONDS", "10"))
CHAOS_SEED = int(os.environ.get("ZSR_CHAOS_SEED", "20261122"))
CHAOS_ROOMS, CHAOS_MEMBERS = (5, 6) if CHAOS_SECONDS > 60 else (2, 3)


@pytest.mark.timeout(600 + 2 * CHAOS_SECONDS)
def test_in_chaos_every_member_ends_with_every_message_once_and_in_its_senders_order(
    people: Node, relay: Relay
) -> None:
    """Resets, stalls, latency, kills and stops. ZSR_CHAOS_SECONDS=600 makes it 30 clients in 5 rooms."""
    dice = random.Random(CHAOS_SEED)
    counts = dict.fromkeys(("messages", "kills", "stops"), 0)
    with Weather(relay.port, CHAOS_SEED) as weather:
        weather.calm = True
        members = {n: [f"room{n}-{m}" for m in range(CHAOS_MEMBERS)] for n in range(CHAOS_ROOMS)}
        rooms = {n: gather(people, cast("Relay", weather), *names) for n, names in members.items()}
        said: dict[str, list[str]] = {name: [] for names in members.values() for name in names}
        weather.calm, end, fault_at = False, time.monotonic() + CHAOS_SECONDS, time.monotonic() + 2
        while time.monotonic() < end:
            name = dice.choice([*said])
            said[name].append(f"{name} says {len(said[name])}")
            say(people, name, "send", text=said[name][-1])
            counts["messages"] += 1
            time.sleep(dice.uniform(0.0, 0.3))
            if time.monotonic() > fault_at:
                trouble(relay, dice, counts)
                fault_at = time.monotonic() + dice.uniform(1, 4)
                for each in said:
                    people.call("People.retry", each)
        weather.calm = True

        def complete(n: int, name: str) -> bool:
            texts = people.call("People.texts", name, rooms[n])
            return len(texts) >= sum(len(said[each]) for each in members[n])

        for n, names in members.items():
            for name in names:
                people.call("People.retry", name)
                eventually(lambda n=n, name=name: complete(n, name), f"{name} has all", 180)  # type: ignore[misc]
        for n, names in members.items():
            for name in names:
                texts = people.call("People.texts", name, rooms[n])
                for other in names:
                    assert [text for text in texts if text.startswith(f"{other} ")] == said[other]
                assert len(texts) == sum(len(said[each]) for each in names)
    print(
        f"\nchaos: seed {CHAOS_SEED}, {CHAOS_SECONDS:g} s, {len(said)} clients, {len(rooms)} rooms, {counts}, {weather.counts}"
    )


def trouble(relay: Relay, dice: random.Random, counts: dict[str, int]) -> None:
    """A power failure, or a machine that stands still for a while."""
    if dice.random() < 0.5:
        relay.restart()
        counts["kills"] += 1
    else:
        relay.signal("SIGSTOP")
        time.sleep(dice.uniform(0.2, 1.5))
        relay.signal("SIGCONT")
        counts["stops"] += 1


# -------------------------------------------------------------------------------------------------------- many relays --


class AtPath(Relay):
    """A relay on a Unix socket."""

    @property
    def path(self) -> Path:
        return self.state.parent / "relay.sock"

    @property
    def command(self) -> list[str]:
        return [*super().command, "--host", str(self.path)]

    def ask(self, path: str) -> bytes:
        with socket.socket(socket.AF_UNIX) as raw:
            raw.connect(str(self.path))
            raw.sendall(f"GET {path} HTTP/1.1\r\nHost: a\r\n\r\n".encode())
            return b"".join(iter(lambda: raw.recv(65536), b""))


def test_a_unix_socket_serves_a_proxy_and_a_stale_one_is_replaced(tmp_path: Path) -> None:
    relay = AtPath(tmp_path, "--plain")
    try:
        relay.start()
        assert stat.S_IMODE(relay.path.stat().st_mode) == 0o660
        assert relay.ask("/healthz").endswith(b"ok\n")
        second = run_relay(*relay.command[2:])
        assert (second.returncode, second.stderr.count("\n")) == (2, 1)
        assert f"cannot listen on {relay.path}: another program has it" in second.stderr
        relay.restart()
        assert relay.ask("/").startswith(b"HTTP/1.1 200 ")
    finally:
        relay.kill()


class Fleet:
    """Relays with one identity behind a real proxy, as README configures it."""

    def __init__(self, folder: Path, kind: str, size: int) -> None:
        self.folder, self.kind, self.port = folder, kind, free_port()
        self.relays: list[Relay] = []
        self.process: subprocess.Popen[bytes] | None = None
        folder.mkdir(exist_ok=True)
        zsr.load_or_make_certificate(folder, ["localhost", "127.0.0.1"], datetime.datetime.now(datetime.timezone.utc))
        both = (folder / zsr.TLS_CERT).read_bytes() + (folder / zsr.TLS_KEY).read_bytes()
        (folder / "both.pem").write_bytes(both)
        for _ in range(size):
            self.grow()

    def grow(self) -> None:
        relay = Relay(self.folder / f"relay{len(self.relays)}", "--plain", "--trusted-proxy", "127.0.0.1")
        relay.state.mkdir(parents=True)
        if self.relays:
            shutil.copy(self.relays[0].state / zsr.IDENTITY_KEY, relay.state)
        self.relays.append(relay.start())

    def config(self) -> str:
        """README's, with this test's places in it."""
        block = re.search(rf"^```{self.kind}\n(.*?)^```$", README.read_text("utf-8"), re.MULTILINE | re.DOTALL)
        assert block
        text, line = block[1], re.findall(r"^  server .*\n", block[1], re.MULTILINE)
        mine = "".join(
            line[0].replace("9101", str(each.port)).replace("r1", f"r{n}") for n, each in enumerate(self.relays, 1)
        )
        text = text.replace("".join(line), mine).replace("stop-after 10s", "stop-after 1s")
        text = text.replace("bind :443", f"bind 127.0.0.1:{self.port}").replace(
            "listen 443", f"listen 127.0.0.1:{self.port}"
        )
        text = text.replace("/etc/ssl/chat.key", str(self.folder / zsr.TLS_KEY))
        text = text.replace("/etc/ssl/chat.pem", str(self.folder / "both.pem"))
        if self.kind == "haproxy":
            return text
        kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        spare = " ".join(f"{kind}_temp_path {self.folder / kind};" for kind in kinds)
        outside = f"daemon off; pid {self.folder}/nginx.pid; error_log stderr; worker_shutdown_timeout 1s; user root;"
        return f"{outside} events {{}} http {{ access_log off; {spare} {text} }}"

    def start(self) -> Fleet:
        """Starts the proxy, or lets it read its configuration anew as its packages do."""
        before, path = self.process, self.folder / "proxy.conf"
        path.write_text(self.config())
        with open(self.folder / "proxy.log", "ab") as log:
            if self.kind == "nginx" and before is not None:
                before.send_signal(signal.SIGHUP)
            else:
                haproxy = ["haproxy", "-db", "-f", str(path)]
                command = ["nginx", "-c", str(path)] if self.kind == "nginx" else haproxy
                self.process = subprocess.Popen(command, stdout=log, stderr=log)
        if self.kind == "haproxy" and before is not None:
            before.kill()
            before.wait(PATIENCE)
        eventually(lambda: self.knock() == 200, f"{self.kind} listens")
        return self

    def knock(self) -> int:
        """The status of the page through the proxy; 0 where nobody listens."""
        context = ssl.create_default_context(cafile=str(self.folder / zsr.TLS_CERT))
        asked = http.client.HTTPSConnection("127.0.0.1", self.port, context=context, timeout=PATIENCE)
        with contextlib.closing(asked), contextlib.suppress(OSError):
            asked.request("GET", "/")
            return asked.getresponse().status
        return 0

    def socket_url(self, room_path: str) -> str:
        return f"wss://127.0.0.1:{self.port}/ws/{room_path}"

    def trust(self) -> ssl.SSLContext:
        """TLS 1.2: in 1.3 a ticket comes after the handshake, and a caller's two threads, of which one reads and one
        writes, then now and again lose what is written."""
        context = ssl.create_default_context(cafile=str(self.folder / zsr.TLS_CERT))
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        return context

    def rooms(self) -> list[int]:
        """How many each relay that runs holds."""
        alive = [each for each in self.relays if each.process and each.process.poll() is None]
        return [int(metrics(each)["zsr_rooms"]) for each in alive]

    def close(self) -> None:
        for relay in self.relays:
            relay.kill()
        if self.process is not None:
            self.process.terminate()
            self.process.wait(PATIENCE)


@pytest.fixture(params=["nginx", "haproxy"])
def fleet(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Fleet]:
    made = Fleet(tmp_path / "fleet", request.param, 3)
    try:
        yield made.start()
    finally:
        made.close()


def test_a_fleet_splits_no_room_and_loses_nothing_over_a_kill_and_a_fourth_relay(fleet: Fleet) -> None:
    """Forty rooms of two, so that no relay is left without one. Their members talk while a relay is down and comes
    back, and after one more joined."""
    homes = [house() for _ in range(40)]

    def all_talk(homes: list[House]) -> None:
        """Each room's two come anew and hear each other."""
        for at in homes:
            with present(fleet, at.ann, at.made) as ann, present(fleet, at.ben, at.made) as ben:
                text = os.urandom(40)
                ann.say(replace(envelope(at, 0), ct=text))
                ann.hear(zsr.DownSent)
                while ben.hear(zsr.DownEvent).ct != text:
                    pass

    def lost_home(at: House) -> bool:
        try:
            with Caller(fleet, zsr.b64u(at.room)) as caller:
                caller.login(at.ann)
        except (InvalidStatus, ConnectionClosed, OSError, EOFError):
            return True
        return False

    all_talk(homes)
    assert (sum(fleet.rooms()), min(fleet.rooms()) > 0) == (40, True), "each room on one relay, each relay with some"
    down = fleet.relays[1]
    theirs = metrics(down)["zsr_rooms"]
    down.kill()
    lost = [at for at in homes if lost_home(at)]
    assert len(lost) == theirs, "strictly: no other relay takes its rooms"
    all_talk([at for at in homes if at not in lost])
    down.start()
    all_talk(homes)
    assert sum(fleet.rooms()) == 40
    before = fleet.rooms()
    fleet.grow()
    with present(fleet, homes[0].ann, homes[0].made) as stays:
        fleet.start()
        eventually(lambda: is_closed(stays), "sockets of the old configuration end")
    all_talk(homes)
    eventually(lambda: metrics(fleet.relays[3])["zsr_rooms"] > 0, "the fourth has some")
    moved = int(metrics(fleet.relays[3])["zsr_rooms"])
    assert fleet.rooms()[:3] == before, "rooms that nobody is in any more stay where they were, until their time ends"
    assert moved < 40


def is_closed(caller: Caller) -> bool:
    with contextlib.suppress(TimeoutError):
        try:
            caller.socket.recv(0.2)
        except ConnectionClosed:
            return True
    return False


def test_whole_clients_lose_nothing_when_their_fleet_grows(fleet: Fleet, people: Node) -> None:
    """Pages that know the relay's key: a room that moves is no new relay to them, and what waited is not lost."""
    rooms = {(f"ann{n}", f"bob{n}"): gather(people, cast("Relay", fleet), f"ann{n}", f"bob{n}") for n in range(4)}
    for ann, _ in rooms:
        say(people, ann, "send", text="before")
    fleet.grow()
    fleet.start()
    for ann, bob in rooms:
        say(people, bob, "send", text="after")
        for name in (ann, bob):
            people.call("People.retry", name)
    for (ann, bob), room in rooms.items():
        for name in (ann, bob):
            eventually(
                lambda name=name, room=room: sorted(people.call("People.texts", name, room)) == ["after", "before"],  # type: ignore[misc]
                f"{name} has both",
            )
            assert people.call("People.calm", name, room) or people.call("People.model", name)["room"]["notes"] == []


def test_who_comes_through_a_proxy_is_counted_by_the_proxys_word_alone(fleet: Fleet) -> None:
    """The proxy overwrites what clients claim: on this machine it says loopback, which is not counted."""
    with behind(fleet, "192.0.2.7") as one:
        one.say(zsr.UpNonce(bytes(32)))
        one.hear(zsr.DownRelay)
        [place] = {relay.get("/metrics", X_Forwarded_For="192.0.2.7").status for relay in fleet.relays}
        assert place == 403
        context = fleet.trust()
        asked = http.client.HTTPSConnection("127.0.0.1", fleet.port, context=context, timeout=PATIENCE)
        with contextlib.closing(asked):
            asked.request("GET", "/metrics", headers={"X-Forwarded-For": "192.0.2.7"})
            assert asked.getresponse().status == 200, "the proxy's word is this machine's"


# ══════════════════════════════════════════════════════════════════════════════════════════════════════════════════════
# Browser: people doing the whole main job on a real relay. Only the page's promised names are used to find things, so
# what passes here can be done with a screen reader too. Every test ends with consoles that hold no error or warning.
# ══════════════════════════════════════════════════════════════════════════════════════════════════════════════════════


def on_engines(*names: str) -> pytest.MarkDecorator:
    """One test for each engine. Where the page's own logic is tested and no engine's, one of them does it, each in turn."""
    return pytest.mark.parametrize(
        "engine", [pytest.param(name, marks=pytest.mark.browser) for name in names or ENGINES]
    )


# -------------------------------------------------------------------------------------------- what people do and see --


def make_room(user: User, relay: Relay, room: str = "Harbour", name: str = "Ann", *, own: bool = False) -> None:
    if not user.css("dialog[open]").count():
        user.goto(relay.url())
        user.click("button", "New room")
    form = user.find("dialog", "New room")
    form.find("textbox", "Room name").fill(room)
    form.find("textbox", "Your name").fill(name)
    if own:
        form.find("checkbox", "Only my own devices").click()
    form.find("button", "Create").click()
    if own:
        user.find("dialog", "Link a device").find("button", "Close").click()
    user.find("heading", room, level=1).appears()


def make_link(user: User) -> str:
    user.click("button", "Invite")
    dialog = user.find("dialog", re.compile("^Invite to "))
    box = dialog.find("textbox", "Invite link")

    def made() -> str:
        link = box.value()
        if not link and "This link has been used" in dialog.text():  # while the dialog opened
            dialog.find("button", "New link").click()
        return link

    link = eventually(made, "a link is made")
    user.press("Escape")
    box.vanishes()
    return link


def ask_in(user: User, link: str, name: str) -> None:
    user.goto(link)
    user.find("heading", "You are invited").appears()
    user.fill("Your name", name)
    user.click("button", "Join")


def join_by(user: User, link: str, name: str, room: str = "Harbour") -> None:
    ask_in(user, link, name)
    is_in(user, room)
    is_connected(user)


def is_in(user: User, room: str) -> None:
    heading = user.find("heading", room, level=1)

    def opened() -> bool:
        assert heading.count(), user.text_of_page()
        return True

    eventually(opened, f"{room} opens")


def is_connected(user: User) -> None:
    status = user.find("status", "Connection")
    eventually(lambda: status.text().strip().startswith("Connected"), "connected")


def choose(where: Spot, name: str, value: str) -> None:
    set_value = f"(e) => {{ e.value = '{value}'; e.dispatchEvent(new Event('change', {{bubbles: true}})); }}"
    where.find("combobox", name).js(set_value)


def write(user: User, text: str) -> None:
    box = user.find("textbox", "Message")
    box.fill(text)
    box.press("Enter")


def articles(user: User) -> list[str]:
    """What stands in each message, in order: text, time, state."""
    log = user.find("log", "Messages")
    shown: list[str] = log.js("(log) => [...log.querySelectorAll('article')].map((e) => e.innerText)")
    return shown


def article(user: User, text: str) -> str:
    """The one message with that text; fails where there is none or more than one."""
    found = [each for each in articles(user) if text in each]
    assert len(found) == 1, f"{len(found)} messages with {text!r} in {articles(user)}"
    return found[0]


def hears(user: User, *texts: str) -> None:
    for text in texts:
        eventually(functools.partial(article, user, text), f"{text!r} arrives")


def is_delivered(user: User, text: str) -> None:
    eventually(lambda: "Delivered" in article(user, text), f"{text!r} is delivered")


def numbered(user: User, word: str = "line") -> list[str]:
    """The texts `line 1`, `line 2`, … as shown, in order."""
    return re.findall(rf"\b{word} \d+\b", "\n".join(articles(user)))


def shows_lines(user: User, expected: list[str]) -> None:
    eventually(lambda: sorted(numbered(user)) == expected, f"{len(expected)} lines, each once")


def has_file(user: User, name: str) -> None:
    """A file is here whole: only then is there no progress and a button to save it."""
    user.find("button", f"Download {name}").appears()
    user.find("progressbar", name).vanishes()


def brings(sender: User, taker: User, *paths: Path) -> None:
    """Somebody sends files, and all of them are there."""
    sender.upload(*paths)
    for path in paths:
        has_file(taker, path.name)


@dataclass(frozen=True)
class Saved:
    name: str
    type: str
    sha256: str


SAVES_SCRIPT = """(() => {
  if (window.testSaves) return;
  const make = URL.createObjectURL, blobs = new Map();
  window.testSaves = [];
  URL.createObjectURL = (blob) => { const url = make.call(URL, blob); blobs.set(url, blob); return url; };
  addEventListener('click', async (event) => {
    const link = event.target.closest?.('a[download]');
    if (!link) return;
    event.preventDefault();
    const blob = blobs.get(link.href), digest = await crypto.subtle.digest('SHA-256', await blob.arrayBuffer());
    const sha256 = [...new Uint8Array(digest)].map((byte) => byte.toString(16).padStart(2, '0')).join('');
    window.testSaves.push({name: link.download, type: blob.type, sha256});
  }, true);
})()"""


def save(user: User, name: str) -> Saved:
    """Presses the button that saves a file and catches what the page hands to the browser."""
    user.js(SAVES_SCRIPT)
    before = user.js("testSaves.length")
    user.click("button", f"Download {name}")
    return Saved(**user.wait(f"testSaves[{before}]"))


def meet(arrive: Arrive, relay: Relay, first: str, second: str = "") -> tuple[User, User]:
    """Ann on a laptop has made a room, Bob has joined it on a phone."""
    ann, bob = arrive(first), arrive(second or first, PHONE)
    make_room(ann, relay)
    join_by(bob, make_link(ann), "Bob")
    return ann, bob


@contextmanager
def page_without_socket(relay: Relay) -> Iterator[None]:
    """In the place of a killed relay: something that serves the page and refuses the socket."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found = self.path == "/"
            self.send_response(200 if found else 404)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.end_headers()
            self.wfile.write(PAGE.read_bytes() if found else b"")

        def log_message(self, *_: Any) -> None: ...

    class Server(http.server.ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: Any) -> None:
            """Browsers hang up on certificates they have not accepted yet."""

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(relay.state / zsr.TLS_CERT, relay.state / zsr.TLS_KEY)
    with Server(("127.0.0.1", relay.port), Handler) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield
        server.shutdown()


def read_code(picture: Path) -> list[str]:
    with Image.open(picture) as image:
        return [code.text for code in zxingcpp.read_barcodes(image.convert("L"))]


# ------------------------------------------------------------------------------------------------------ the main job --


@pytest.mark.parametrize(
    ("first", "second"),
    [
        pytest.param(one, other, marks=pytest.mark.browser)
        for one, other in [*zip(ENGINES, ENGINES, strict=True), ("chromium", "firefox"), ("webkit", "chromium")]
    ],
)
def test_two_people_meet_by_a_link_and_talk(
    arrive: Arrive, relay: Relay, media: Media, first: str, second: str
) -> None:
    ann, bob = meet(arrive, relay, first, second)
    assert "#1." not in bob.js("location.href"), "the secret of the link stays in the address"
    letter = "Moin Bob 👋🏽\nsecond line\n\nsee https://example.org/a?b=1#c. 漢字"
    write(ann, letter)
    hears(bob, letter)
    is_delivered(ann, "Moin Bob")
    link = bob.find("link", "https://example.org/a?b=1#c")
    assert link.attribute("href") == "https://example.org/a?b=1#c"
    assert "noopener" in (link.attribute("rel") or "")
    write(bob, "🌊")
    hears(ann, "🌊")
    is_delivered(bob, "🌊")
    assert bob.find("article", re.compile("^Ann")).count() == 1
    assert ann.find("article", re.compile("^Bob")).count() == 1
    assert ann.find("log", "Messages").find("heading").texts() == ["Today"]
    bob.upload(media["beach.jpg"])
    ann.find("img", "beach.jpg").appears()
    assert save(ann, "beach.jpg").sha256 == sha256(media["beach.jpg"].read_bytes())


@on_engines("webkit")
def test_everybody_sees_who_is_there_and_who_has_a_message(arrive: Arrive, relay: Relay, engine: str) -> None:
    ann, bob = meet(arrive, relay, engine)
    ann.click("button", "Members")
    people = ann.find("dialog", "Members").find("list", "Members")
    eventually(lambda: people.text().count("Online") == 2, "both are online")
    assert "Bob" in people.text()
    assert "Admin" in people.text()
    ann.press("Escape")
    write(ann, "who has it?")
    is_delivered(ann, "who has it?")
    ann.click("button", "Delivered")
    ann.find("dialog", "Who has it").says("Bob")
    ann.press("Escape")
    bob.find("textbox", "Message").press("h")
    eventually(lambda: "Bob is typing" in ann.css("body").text(), "Bob is seen typing")
    bob.close()
    ann.click("button", "Members")
    eventually(lambda: people.text().count("Offline") == 1, "Bob has gone")
    assert re.search("Offline, last seen [0-9]", people.text())


@on_engines()
def test_who_asked_waits_on_whatever_is_opened_meanwhile(arrive: Arrive, relay: Relay, engine: str) -> None:
    """One request a person: the same link again, and another one, lead to the one that waits, and so does the list."""
    ann, zoe = arrive(engine), arrive(engine, PHONE)
    make_room(ann, relay)
    links, home = (make_link(ann), make_link(ann)), ann.js("location.href")
    ann.goto("about:blank")
    ask_in(zoe, links[0], "Zoe")
    shows(zoe, "Waiting for an admin")
    print_ = zoe.css("#invited-print").text()
    zoe.reload()
    shows(zoe, "Waiting for an admin")
    zoe.click("button", "To the start")
    zoe.find("list", "Rooms").says("Waiting to be let in")
    zoe.find("list", "Rooms").find("link").click()
    for link in (None, *links):
        if link:
            zoe.goto("about:blank")
            zoe.goto(link)
        shows(zoe, "Waiting for an admin")
        assert zoe.css("#invited-print").text() == print_
    ann.goto(home)
    zoe.find("heading", "Harbour", level=1).appears()
    people = people_of(ann)
    eventually(lambda: people.text().count("Online") == 2, "both are here")
    assert people.text().count("Zoe") == 1


@on_engines()
def test_an_invitation_outlives_a_reload_and_nothing_else(arrive: Arrive, relay: Relay, engine: str) -> None:
    ann, bob = arrive(engine), arrive(engine, PHONE)
    make_room(ann, relay)
    bob.goto(make_link(ann))
    for _ in range(2):
        bob.find("heading", "You are invited").appears()
        bob.reload()
    bob.click("button", "To the start")
    bob.find("button", "New room").appears()
    bob.reload()
    bob.find("button", "New room").appears()
    assert bob.js("sessionStorage.length") == 0


@on_engines("firefox")
def test_who_was_in_a_room_is_told_what_joining_again_means(arrive: Arrive, relay: Relay, engine: str) -> None:
    ann, bob = meet(arrive, relay, engine)
    side(bob, "Settings").find("button", "Leave room").click()
    answer(bob, "Leave Harbour", "Leave")
    close_side(bob, "Settings")
    bob.goto(make_link(ann))
    shows(bob, "what this device kept of it is deleted")


@on_engines("firefox")
def test_a_link_works_once(arrive: Arrive, relay: Relay, engine: str) -> None:
    ann, bob, cem = arrive(engine), arrive(engine, PHONE), arrive(engine, PHONE)
    make_room(ann, relay)
    link = make_link(ann)
    join_by(bob, link, "Bob")
    ask_in(cem, link, "Cem")
    eventually(lambda: "This link has been used" in cem.css("body").text(), "Cem is told")
    eventually(lambda: any("used" in text for text in cem.find("alert").texts()), "Cem hears it as an alert")
    assert not cem.find("log", "Messages").count()


def device_link(user: User, *, choose: bool = False) -> str:
    """A link for one more device, with all rooms."""
    devices = user.find("dialog", "Devices")
    if not devices.count():
        user.click("button", "Devices")
    devices.find("button", "Link a device").click()
    if choose:
        user.find("dialog", "Link a device").find("button", "Make link").click()
    box = user.find("textbox", "Device link")
    link = eventually(box.value, "a link is made")
    user.press("Escape")
    box.vanishes()
    return link


def link_by(user: User, link: str, device: str) -> None:
    user.goto(link)
    user.find("heading", "Link this device").appears()
    user.fill("Device name", device)
    user.css("#invited-join").click()


@on_engines()
def test_add_a_laptop(arrive: Arrive, relay: Relay, engine: str) -> None:
    """Ann's second device has her name, her rooms and what was said there; Bob's waits for Ann, whoever reloads."""
    ann, bob = meet(arrive, relay, engine)
    write(ann, "from before")
    hears(bob, "from before")
    laptop = arrive(engine)
    link_by(laptop, device_link(ann), "Kitchen laptop")
    laptop.find("heading", "Harbour", level=1).appears()
    hears(laptop, "from before")
    eventually(lambda: "Ann linked a device" in bob.css("body").text(), "Bob sees that Ann has one more device")
    assert "has changed" in bob.css("body").text(), "and is warned of one more key"
    assert "has changed" not in ann.css("body").text()
    write(laptop, "from the laptop")
    hears(ann, "from the laptop")
    hears(bob, "from the laptop")
    assert bob.find("article", re.compile("^Ann")).count() >= 2, "one person, however many devices"
    if not ann.find("dialog", "Devices").count():
        ann.click("button", "Devices")
    devices = ann.find("dialog", "Devices").find("list", "Devices")
    eventually(lambda: "Kitchen laptop" in devices.text(), "the new device is listed by its name")
    bobs = device_link(bob)
    away = ann.js("location.href")
    for one in (ann, laptop):
        one.goto("about:blank")
    tablet = arrive(engine, PHONE)
    link_by(tablet, bobs, "Tablet")
    if not bob.find("dialog", "Devices").count():
        bob.click("button", "Devices")
    waiting = bob.find("dialog", "Devices").find("list", "On their way")
    eventually(lambda: "Waiting for Ann" in waiting.text(), "Bob sees who is awaited")
    tablet.find("heading", "Link this device").appears()
    ann.goto(away)
    tablet.find("heading", "Harbour", level=1).appears()
    hears(tablet, "from before", "from the laptop")
    write(tablet, "all in")
    hears(ann, "all in")


@on_engines("firefox")
def test_all_ones_rooms_come_along_to_a_new_device(arrive: Arrive, relay: Relay, engine: str) -> None:
    ann, laptop = arrive(engine), arrive(engine)
    make_room(ann, relay, "Harbour")
    write(ann, "ahoy")
    ann.goto(relay.url())
    make_room(ann, relay, "Kitchen")
    link_by(laptop, device_link(ann, choose=True), "Laptop")
    laptop.find("heading", "Kitchen", level=1).appears()
    rooms = laptop.css("#rooms")
    eventually(lambda: "Harbour" in rooms.text(), "the other room has come along")


@on_engines("webkit")
def test_a_revoked_link_lets_nobody_in(arrive: Arrive, relay: Relay, engine: str) -> None:
    ann, bob = arrive(engine), arrive(engine, PHONE)
    make_room(ann, relay)
    link = make_link(ann)
    ann.click("button", "Invite")
    ann.find("list", "Open invites").find("button", "Revoke").click()
    ann.find("list", "Open invites").find("button", "Revoke").vanishes()
    ask_in(bob, link, "Bob")
    eventually(lambda: any("This link has ended" in text for text in bob.find("alert").texts()), "Bob is told")


SHUT_AT_ONCE_SCRIPT = """(() => {
  const box = document.getElementById('invite-link'), {get, set} = Object.getOwnPropertyDescriptor(HTMLInputElement.prototype, 'value');
  Object.defineProperty(box, 'value', {get, configurable: true, set(link) {
    set.call(this, link);
    if (!link) return;
    delete box.value;
    box.closest('dialog').close();
  }});
})()"""


@on_engines("chromium")
def test_a_link_that_was_used_since_its_dialog_was_shut_is_not_shown_again(
    arrive: Arrive, relay: Relay, engine: str
) -> None:
    """Seen to fail without: what Invite.render notes of links that are not shown."""
    ann, bob = arrive(engine), arrive(engine)
    make_room(ann, relay)
    ann.js(SHUT_AT_ONCE_SCRIPT)
    ann.click("button", "Invite")
    link = ann.wait("document.getElementById('invite-link').value")
    join_by(bob, link, "Bob")
    eventually(lambda: "Bob joined" in ann.text_of_page(), "Bob is in")
    assert make_link(ann) != link


@on_engines("chromium")
def test_a_link_for_five_lets_in_one_after_the_other(arrive: Arrive, relay: Relay, engine: str) -> None:
    ann, bob, cem = arrive(engine), arrive(engine, PHONE), arrive(engine, PHONE)
    make_room(ann, relay)
    first = make_link(ann)
    ann.click("button", "Invite")
    dialog = ann.find("dialog", "Invite to Harbour")
    choose(dialog, "Lets in", "5")
    dialog.find("button", "New link").click()
    box = dialog.find("textbox", "Invite link")
    eventually(lambda: box.value() not in ("", first), "another link is made")
    dialog.says("It lets in 5 people")
    link = box.value()
    join_by(bob, link, "Bob")
    join_by(cem, link, "Cem")
    eventually(lambda: "5 people, 2 in" in dialog.find("list", "Open invites").text(), "two of five are in")


@on_engines("webkit")
def test_a_device_is_linked_and_stands_in_the_list(arrive: Arrive, relay: Relay, engine: str) -> None:
    ann, bob = meet(arrive, relay, engine)
    bob.click("button", "Devices")
    bob.click("button", "Link a device")
    link = eventually(bob.find("textbox", "Device link").value, "a link is made")
    bob.press("Escape")
    tablet = arrive(engine)
    tablet.goto(link)
    tablet.find("heading", "Link this device").appears()
    assert tablet.find("textbox", "Device name").value(), "the browser has a name for itself"
    tablet.fill("Device name", "Bob's tablet")
    tablet.click("button", "Join")
    tablet.find("heading", "Harbour", level=1).appears()
    devices = bob.find("dialog", "Devices").find("list", "Devices")
    devices.find("button", "Remove device Bob's tablet").appears()
    assert devices.text().count("This device") == 1
    write(tablet, "from the tablet")
    hears(ann, "from the tablet")
    assert ann.find("article", re.compile("^Bob")).count() == 1
    ann.click("button", "Members")
    people = ann.find("dialog", "Members").find("list", "Members")
    eventually(lambda: people.text().replace("\xa0", " ").count("2 devices") == 1, "one Bob with two devices")
    assert people.text().count("Bob") == 1


@on_engines()
def test_the_code_on_the_screen_is_the_link(arrive: Arrive, relay: Relay, engine: str, tmp_path: Path) -> None:
    ann, picture = arrive(engine, PHONE), tmp_path / "screen.png"
    make_room(ann, relay)
    ann.click("button", "Invite")
    link = eventually(ann.find("textbox", "Invite link").value, "a link is made")
    assert link.startswith(relay.url("/#1."))
    for size in (PHONE, LAPTOP):
        ann.size(*size)
        eventually(lambda: read_code(ann.shot(picture)) == [link], "the code reads as the link")


@on_engines()
def test_the_demo_room_is_open_to_anyone(arrive: Arrive, relay: Relay, engine: str) -> None:
    dora, emil = arrive(engine), arrive(engine, PHONE)
    dora.goto(relay.url())
    dora.click("button", "Demo room")
    emil.goto(relay.url("/#/wschat?rid=aaa&uid=Emil"))
    for user in (dora, emil):
        is_connected(user)
        user.css("body").says("Not private: anyone can enter and read.")
    write(emil, "anyone here?")
    hears(dora, "anyone here?")
    assert dora.find("article", re.compile("^Emil")).count() == 1
    write(dora, "me")
    hears(emil, "me")


# ---------------------------------------------------------------------------------------------------------- messages --


def said(user: User, text: str) -> Spot:
    """The one article with that text."""
    at = eventually(lambda: [n for n, shown in enumerate(articles(user)) if text in shown], f"{text!r} stands there")
    assert len(at) == 1, articles(user)
    return user.find("log", "Messages").find("article").nth(at[0])


def is_without(user: User, text: str) -> bool:
    return not [each for each in articles(user) if text in each]


def act(user: User, text: str, item: str) -> None:
    """Chooses an item of a message's menu."""
    said(user, text).find("button", "More").click()
    user.find("menuitem", item).click()


def finger(spot: Spot, *moves: int) -> None:
    """A finger is put on a message and moved so far to the right, in steps; it stays there unless it moves."""
    spot.js(
        "(e) => { const fire = (type, x) => e.dispatchEvent(new PointerEvent(type, {bubbles: true, pointerType: 'touch',"
        " isPrimary: true, pointerId: 7, clientX: 50 + x, clientY: 50})); fire('pointerdown', 0);"
        f" for (const x of {list(moves)}) fire('pointermove', x); if ({len(moves)}) fire('pointerup', 0); }}"
    )


@on_engines()
def test_what_is_answered_may_go_and_an_edit_is_not_delivered_before_it_is(
    arrive: Arrive, relay: Relay, engine: str
) -> None:
    """Seen to fail without: Composer.lose; `last` in Face.row."""
    ann, bob = meet(arrive, relay, engine)
    write(ann, "soon gone")
    hears(bob, "soon gone")
    act(bob, "soon gone", "Reply")
    bob.find("textbox", "Message").fill("an answer")
    bob.css("#about").says("Reply to Ann: soon gone")
    act(ann, "soon gone", "Delete")
    bob.css("#about").vanishes()
    bob.find("textbox", "Message").press("Enter")
    hears(ann, "an answer")
    is_delivered(bob, "an answer")
    bob.excuse()
    ann.excuse()
    relay.kill()
    act(bob, "an answer", "Edit")
    bob.find("textbox", "Message").fill("a better one")
    bob.find("textbox", "Message").press("Enter")
    eventually(lambda: "Sending" in article(bob, "a better one"), "it waits")
    relay.start()
    hears(ann, "a better one")
    is_delivered(bob, "a better one")


@on_engines("chromium")
def test_an_answer_and_an_edit_wait_while_another_room_is_open(arrive: Arrive, relay: Relay, engine: str) -> None:
    """Seen to fail without: Composer.stash; the complaint in Composer.send."""
    ann = arrive(engine)
    make_room(ann, relay)
    write(ann, "ferry at nine")
    ann.click("button", "New room")
    make_room(ann, relay, "Garden")
    rooms, box = ann.find("list", "Rooms"), ann.find("textbox", "Message")

    def look_elsewhere() -> None:
        for room in ("Garden", "Harbour"):
            rooms.find("link", re.compile(room)).click()
            ann.find("heading", room, level=1).appears()
            ann.css("#about").vanishes() if room == "Garden" else ann.css("#about").appears()

    rooms.find("link", re.compile("Harbour")).click()
    act(ann, "ferry at nine", "Reply")
    box.fill("too early")
    look_elsewhere()
    assert box.value() == "too early"
    box.press("Enter")
    eventually(lambda: "ferry at nine" in article(ann, "too early"), "it quotes what it answers")
    act(ann, "too early", "Edit")
    box.fill("")
    box.press("Enter")
    ann.find("alert").says("Nothing is left of the message. To take it back, delete it.")
    box.fill("at ten")
    look_elsewhere()
    assert box.value() == "at ten"
    box.press("Enter")
    hears(ann, "at ten")
    assert "edited" in article(ann, "at ten")
    assert box.value() == ""


def answer_and_react(ann: User, bob: User) -> None:
    said(bob, "ferry at nine").find("button", "More").click()
    items = [bob.find("menuitem").nth(n).text().strip() for n in range(bob.find("menuitem").count())]
    assert items[:2] == ["Reply", "React"]
    assert "Copy" in items
    assert not {"Edit", "Delete"} & set(items), "not on others' messages"
    bob.press("Escape")
    bob.find("menuitem", "Reply").vanishes()
    act(bob, "ferry at nine", "Reply")
    bob.css("#about-text").says("Reply to Ann: ferry at nine")
    write(bob, "too early")
    hears(ann, "too early")
    assert "ferry at nine" in article(ann, "too early"), "the answered one is quoted"
    act(bob, "too early", "React")
    bob.find("menuitemcheckbox", "🎂").click()
    said(ann, "too early").find("button", "🎂 1: Bob").appears()
    said(ann, "too early").find("button", "🎂 1: Bob").click()
    said(bob, "too early").find("button", re.compile("🎂 2: ")).appears()
    assert said(bob, "too early").find("button", re.compile("🎂 2: ")).attribute("aria-pressed") == "true"


def edit(ann: User, bob: User) -> None:
    write(ann, "meet **here** `a*b` @Bob <i>x</i>")
    hears(bob, "meet here a*b @Bob <i>x</i>")
    act(ann, "meet here", "Edit")
    box = ann.find("textbox", "Message")
    assert box.value() == "meet **here** `a*b` @Bob <i>x</i>"
    box.fill("meet **there**\n\n1. by foot\n2. by boat")
    box.press("Enter")
    hears(bob, "meet there")
    assert said(bob, "meet there").css("ol").js("(list) => getComputedStyle(list).listStyleType") == "decimal"
    said(bob, "meet there").find("button", "Edited, show earlier versions").click()
    bob.find("dialog", "Earlier versions").says("meet here a*b @Bob <i>x</i>")
    bob.press("Escape")


def swipe_and_press(bob: User) -> None:
    finger(said(bob, "meet there"), 20, 70)
    bob.css("#about-text").says("Reply to Ann: meet there")
    bob.find("button", "Cancel").click()
    finger(said(bob, "meet there"), 20, 30)
    assert not bob.css("#about-text").count(), "a short move is no swipe"
    finger(said(bob, "meet there"))
    bob.find("menuitem", "Reply").appears()
    bob.press("Escape")


@on_engines()
def test_a_message_is_answered_reacted_to_edited_copied_and_deleted(arrive: Arrive, relay: Relay, engine: str) -> None:
    ann, bob = meet(arrive, relay, engine)
    write(ann, "ferry at nine")
    hears(bob, "ferry at nine")
    answer_and_react(ann, bob)
    edit(ann, bob)
    swipe_and_press(bob)
    act(ann, "meet there", "Copy")
    assert ann.find("menuitem").count() == 0
    act(ann, "meet there", "Delete")
    eventually(lambda: "Ann deleted a message" in bob.css("body").text(), "Bob sees that it is gone")
    assert "there" not in "".join(articles(bob))
    assert "You deleted a message" in ann.css("body").text()
    said(bob, "too early").find("button", re.compile("^Ann")).click()
    bob.wait("document.activeElement.matches('article') && document.activeElement.innerText.includes('ferry at nine')")


def pin_and_vote(ann: User, bob: User) -> None:
    act(bob, "ferry at nine", "Pin")
    ann.css("#pinned").says("Ann ferry at nine")
    ann.css("#pinned").click()
    ann.wait("document.activeElement.matches('article')")
    ann.click("button", "Poll or timer")
    ann.find("menuitem", "Poll").click()
    poll = ann.find("dialog", "New poll")
    poll.find("textbox", "Question").fill("When?")
    poll.find("button", "Send poll").click()
    poll.says("A poll needs at least two different choices.")
    poll.find("textbox", "Choices, one a line").fill("Sat\nSun")
    poll.find("button", "Send poll").click()
    bob.find("button", "Sun, 0 votes").click()
    ann.find("button", "Sun, 1 vote").appears()


def mention_and_command(ann: User, bob: User) -> None:
    box = bob.find("textbox", "Message")
    box.fill("hey @a")
    bob.find("option", "Ann").appears()
    box.press("Enter")
    assert box.value() == "hey @Ann "
    box.press("Enter")
    hears(ann, "hey @Ann")
    assert ann.css(".at.me").text() == "@Ann"
    write(bob, "/nick Robert")
    write(bob, "/me waves")
    hears(ann, "Robert waves")
    write(bob, "/wave")
    bob.css("#say").says("There is no command /wave")
    assert box.value() == "/wave"
    bob.click("button", "Dismiss")
    write(bob, "//etc/hosts")
    hears(ann, "/etc/hosts")
    assert not [text for text in articles(ann) if "/wave" in text or "/nick" in text]
    write(ann, "/help")
    ann.find("dialog", "Commands and keys").says("Hides what stands here")
    ann.press("Escape")


def forward(ann: User) -> None:
    act(ann, "hey @Ann", "Select")
    said(ann, "ferry at nine").find("checkbox", "Select").click()
    picked = ann.css("#picked")
    picked.says("2 selected")
    assert not picked.find("button", "Delete").count(), "one of them is Robert's"
    picked.find("button", "Forward").click()
    ann.find("dialog", "Forward").find("checkbox", "Kitchen").click()
    ann.find("dialog", "Forward").find("button", "Forward").click()
    picked.vanishes()
    eventually(lambda: "hey @Ann" in ann.css("#rooms").text(), "it stands in the other room")


def let_disappear(ann: User, bob: User) -> None:
    bob.click("button", "Poll or timer")
    bob.find("menuitem", "This message disappears").click()
    bob.find("menuitem", "After 5 seconds").click()
    write(bob, "soon gone")
    hears(ann, "soon gone")
    for user in (ann, bob):
        eventually(functools.partial(is_without, user, "soon gone"), "it goes from both")
    act(ann, "ferry at nine", "Who has it")
    eventually(lambda: "Read" in ann.find("dialog", "Who has it").text(), "Robert is seen to have read it")
    ann.press("Escape")
    ann.click("button", "Settings")
    choose(ann.find("dialog", "Settings"), "Disappearing messages", "3600")
    eventually(lambda: "Ann set disappearing messages: After 1 hour." in bob.css("body").text(), "all are told")


def send_once(user: User, photo: Path) -> None:
    user.click("button", "Poll or timer")
    user.find("menuitem", "Photo to view once").click()
    user.css("#about").says("Your next photo can be viewed once")
    user.upload(photo)


def view_once(ann: User, bob: User, photo: Path) -> None:
    send_once(bob, photo)
    ann.find("button", "View photo").click()
    shown = ann.find("dialog", "Photo to view once")
    eventually(lambda: shown.find("img").js("(e) => e.naturalWidth") > 0, "it is shown")
    ann.press("Escape")
    ann.css("article .file").vanishes()
    bob.css("article .file").says("Viewed by Ann")
    assert not bob.find("button", "View photo").count()


def keep_a_draft(bob: User) -> None:
    box = bob.find("textbox", "Message")
    box.fill("not sent yet")
    bob.click("button", "Rooms")
    rooms = bob.find("list", "Rooms")
    rooms.says("Draft: not sent yet")
    bob.reload()
    rooms.says("Draft: not sent yet")
    rooms.find("link").click()
    eventually(lambda: box.value() == "not sent yet", "the draft outlives the page")


@on_engines("chromium")
def test_people_pin_vote_mention_forward_and_use_commands(
    arrive: Arrive, relay: Relay, media: Media, engine: str
) -> None:
    ann = arrive(engine)
    make_room(ann, relay, "Kitchen")
    bob = arrive(engine, PHONE)
    ann.goto(relay.url())
    make_room(ann, relay)
    join_by(bob, make_link(ann), "Bob")
    write(ann, "ferry at nine")
    hears(bob, "ferry at nine")
    pin_and_vote(ann, bob)
    mention_and_command(ann, bob)
    forward(ann)
    view_once(ann, bob, media["photo.jpg"])
    let_disappear(ann, bob)
    keep_a_draft(bob)


# ------------------------------------------------------------------------------------------------------------- files --

PICTURES = ("photo.jpg", "drawing.png", "moving.gif", "small.webp")
FILMS = ("clip.mp4", "clip.webm", "clip.mkv")
SOUNDS = ("voice.mp3", "voice.wav")
OTHERS = ("paper.pdf", "bundle.zip", "notes.txt", "ümläut 漢字 %20.bin")


@on_engines()
def test_files_of_every_kind_arrive_with_their_bytes(arrive: Arrive, relay: Relay, media: Media, engine: str) -> None:
    ann, bob = meet(arrive, relay, engine)
    names = [*PICTURES, *FILMS, *SOUNDS, *OTHERS]
    ann.upload(*[media[name] for name in names])
    for name in names:
        bob.find("button", f"Download {name}").appears()
    for name in PICTURES:
        picture = bob.find("img", name).appears()
        picture.js("(e) => e.scrollIntoView()")  # what is far from the screen is not loaded
        whole = "(e) => e.naturalWidth >= 120 && !('small' in e.dataset)"
        eventually(functools.partial(picture.js, whole), f"{name} is shown")
    for kind, name in [*(("video", film) for film in FILMS), *(("audio", sound) for sound in SOUNDS)]:
        player = bob.css(f'{kind}[aria-label="{name}"]').appears()
        player.js("(e) => e.scrollIntoView()")
        eventually(functools.partial(player.js, "(e) => e.controls && e.duration > 0.5"), f"{name} can be played")
    for name in names:
        has_file(bob, name)
        assert name in article(bob, name)
        assert save(bob, name) == Saved(name, "application/octet-stream", sha256(media[name].read_bytes())), name


@on_engines()
def test_files_go_to_the_room_that_was_open_when_they_were_chosen(
    arrive: Arrive, relay: Relay, media: Media, engine: str
) -> None:
    """Seen to fail without: the room in Composer.deliver."""
    ann = arrive(engine)
    make_room(ann, relay)
    ann.click("button", "New room")
    make_room(ann, relay, "Garden")
    ann.js("window.createImageBitmap = () => new Promise((go) => { window.goOn = () => go(new ImageData(2, 2)); }), 0")
    ann.upload(media["photo.jpg"])
    ann.wait("!!window.goOn")
    rooms = ann.find("list", "Rooms")
    rooms.find("link", re.compile("Harbour")).click()
    ann.find("heading", "Harbour", level=1).appears()
    ann.js("goOn()")
    eventually(lambda: "photo.jpg" in rooms.find("link", re.compile("Garden")).text(), "it is in the other room")
    assert not ann.find("button", "Download photo.jpg").count()
    rooms.find("link", re.compile("Garden")).click()
    has_file(ann, "photo.jpg")


@on_engines("chromium")
def test_what_is_done_while_another_room_opens_is_done_in_the_room_that_is_shown(
    arrive: Arrive, relay: Relay, engine: str
) -> None:
    """Seen to fail without: the room that Views.wire names with every intent."""
    ann = arrive(engine)
    make_room(ann, relay)
    harbour = ann.js("location.hash.slice(4)")
    ann.click("button", "New room")
    make_room(ann, relay, "Garden")
    opens = f"Session.dispatch({{do: 'go', to: {{at: 'room', id: {harbour!r}}}}})"
    says = "document.getElementById('write').dispatchEvent(new Event('submit', {cancelable: true}))"
    ann.fill("Message", "for the garden")
    ann.js(f"(({opens}), {says}, 0)")
    ann.find("heading", "Harbour", level=1).appears()
    rooms = ann.find("list", "Rooms")
    eventually(lambda: "for the garden" in rooms.find("link", re.compile("Garden")).text(), "it is said there")
    assert not articles(ann)


@on_engines("chromium")
def test_a_saved_file_reaches_the_disk(arrive: Arrive, relay: Relay, media: Media, engine: str) -> None:
    ann, bob = meet(arrive, relay, engine)
    ann.upload(media["notes.txt"])
    has_file(bob, "notes.txt")
    assert isinstance(bob, PlaywrightUser)
    saved = bob.download(bob.find("button", "Download notes.txt"))
    assert saved == ("notes.txt", media["notes.txt"].read_bytes())


GIVE_SCRIPT = """(() => {
  const data = new DataTransfer();
  data.items.add(new File(['%(name)s inside'], '%(name)s', {type: 'text/plain'}));
  const event = new Event('%(kind)s', {bubbles: true, cancelable: true});
  Object.defineProperty(event, '%(holder)s', {value: data});
  document.activeElement.dispatchEvent(event);
})()"""


@on_engines()
def test_files_come_in_by_paste_and_drop_too(arrive: Arrive, relay: Relay, engine: str) -> None:
    ann, bob = meet(arrive, relay, engine)
    for kind, holder in (("paste", "clipboardData"), ("drop", "dataTransfer")):
        ann.js(GIVE_SCRIPT % {"kind": kind, "holder": holder, "name": f"{kind}.txt"})
        has_file(bob, f"{kind}.txt")
        assert save(bob, f"{kind}.txt").sha256 == sha256(f"{kind}.txt inside".encode())


class SlowLine:
    """Between browsers and their relay: so many bytes a second each way, with the short queue of a good router. Stands
    for the relay where an address is asked for."""

    def __init__(self, relay: Relay, rate: float) -> None:
        self.relay, self.rate, self.port = relay, rate, free_port()
        self.free = {"up": 0.0, "down": 0.0}  # until when each direction is taken
        self.carried = {"up": 0, "down": 0}  # bytes
        self.lock = threading.Lock()
        self.sockets = set[socket.socket]()
        self.listener = self.short(socket.socket())
        self.listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.listener.bind(("127.0.0.1", self.port))
        self.listener.listen(64)
        self.threads = list[threading.Thread]()
        self.run(self.accept)

    def run(self, work: Callable[..., None], *args: Any) -> None:
        self.threads.append(threading.Thread(target=work, args=args, daemon=True))
        self.threads[-1].start()

    @staticmethod
    def short(end: socket.socket) -> socket.socket:
        for queue in (socket.SO_RCVBUF, socket.SO_SNDBUF):
            end.setsockopt(socket.SOL_SOCKET, queue, 64 << 10)
        return end

    def url(self, path: str = "/") -> str:
        return f"https://127.0.0.1:{self.port}{path}"

    def accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self.listener.accept()
                far = self.short(socket.socket())
                self.sockets |= {near, far}
                if far.connect_ex(("127.0.0.1", self.relay.port)):
                    near.close()
                    continue
                for one, other, way in ((near, far, "up"), (far, near, "down")):
                    self.run(self.carry, one, other, way)

    def carry(self, source: socket.socket, sink: socket.socket, way: str) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(32 << 10):
                with self.lock:
                    now = time.monotonic()
                    self.carried[way] += len(data)
                    self.free[way] = until = max(now, self.free[way]) + len(data) / self.rate
                time.sleep(max(0.0, until - now))
                sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def cut(self) -> None:
        """Every connection breaks."""
        for end in tuple(self.sockets):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)
        self.threads[0].join()
        self.cut()
        for thread in self.threads:
            thread.join()
        for end in (self.listener, *self.sockets):
            end.close()


@contextmanager
def slow_line(relay: Relay, rate: float) -> Iterator[SlowLine]:
    line = SlowLine(relay, rate)
    try:
        yield line
    finally:
        line.close()


def press(user: User, name: str) -> None:
    user.find("button", name).appears()
    user.click("button", name)


FILE_SCRIPT = """(() => {
  const file = {id: 'f', name: 'a.txt', size: 1, type: 'text/plain', thumb: null, state: 'here', done: 1, rate: 0, left: 0};
  const of = (more) => ({key: 'k', mine: true, once: false, file: more && {...file, ...more}});
  const shown = Media.show(of(%s));
  shown.update(of(%s));
  return `${shown.node.querySelectorAll('button').length} ${shown.node.textContent}`;
})()"""


@on_engines("chromium")
def test_a_file_may_go_a_moment_before_its_message(arrive: Arrive, relay: Relay, engine: str) -> None:
    """Seen to fail without: `if (!m.file) return;` in Media.show. A page threw when a photo was viewed once."""
    ann = arrive(engine)
    ann.goto(relay.url())
    assert "a.txt" in ann.js(FILE_SCRIPT % ("{why: ''}", "null"))


@on_engines("chromium")
def test_a_file_that_was_not_sent_is_no_matter_of_who_is_out(arrive: Arrive, relay: Relay, engine: str) -> None:
    """Seen to fail without: `file.why === 'outside'` in Media.card."""
    ann = arrive(engine)
    ann.goto(relay.url())
    failed = "{state: 'failed', why: '%s'}"
    assert ann.js(FILE_SCRIPT % (failed % "source", failed % "changed")).startswith("1 ")
    assert ann.js(FILE_SCRIPT % (failed % "source", failed % "outside")).startswith("0 ")


@on_engines("chromium", "firefox")
def test_no_menu_of_a_message_is_cut_off(arrive: Arrive, relay: Relay, media: Media, engine: str) -> None:
    """Seen to fail without: the class `in` in Menu.show."""
    ann, bob = meet(arrive, relay, engine)
    write(bob, "hi")
    hears(ann, "hi")
    brings(ann, ann, *[media[name] for name in PICTURES[:3]])
    for width, number in itertools.product((900, 1000, 1280), range(4)):
        ann.size(width, 800)
        ann.css(".more").nth(number).js("(e) => e.click()")
        box = "(e) => [e.getBoundingClientRect().left, e.getBoundingClientRect().right]"
        left, right = ann.css(".menu[role=menu]").js(box)
        edge = ann.js("document.getElementById('log').getBoundingClientRect().left")
        assert edge <= left < right <= width, (width, number)
        ann.press("Escape")


@on_engines("chromium")
def test_a_transfer_is_paused_reloaded_cut_and_goes_on(
    arrive: Arrive, relay: Relay, tmp_path: Path, engine: str
) -> None:
    content = random.Random(4).randbytes(6 << 20)
    (tmp_path / "long.bin").write_bytes(content)
    with slow_line(relay, 2e6) as line:
        ann, bob = meet(arrive, cast("Relay", line), engine)
        for user in (ann, bob):
            user.excuse()
        ann.upload(tmp_path / "long.bin")
        bob.find("progressbar", "long.bin").appears()
        press(bob, "Pause")
        eventually(lambda: "Paused, " in article(bob, "long.bin"), "it pauses")
        write(ann, "still talking")
        hears(bob, "still talking")
        bob.reload()
        press(bob, "Go on")
        bob.find("progressbar", "long.bin").appears()
        line.cut()
        has_file(bob, "long.bin")
        assert save(bob, "long.bin").sha256 == sha256(content)


@pytest.mark.relay("--max-file", "1M")
@on_engines()
def test_a_file_larger_than_the_relay_keeps_arrives(arrive: Arrive, relay: Relay, tmp_path: Path, engine: str) -> None:
    content = random.Random(5).randbytes(3 << 20)
    (tmp_path / "long.bin").write_bytes(content)
    ann, bob = meet(arrive, relay, engine)
    ann.upload(tmp_path / "long.bin")
    has_file(bob, "long.bin")
    assert save(bob, "long.bin").sha256 == sha256(content)
    has_file(ann, "long.bin")


HEIGHTS_SCRIPT = """(() => {
  const look = () => {
    for (const e of document.querySelectorAll('figure.media')) heights.add(e.offsetHeight);
    requestAnimationFrame(look);
  };
  window.heights = new Set();
  look();
})()"""
DRAWN_SCRIPT = "[...document.querySelectorAll('.shot img')].filter((e) => e.complete && !('small' in e.dataset)).length"


@on_engines()
def test_a_photo_takes_its_place_before_it_is_drawn(arrive: Arrive, relay: Relay, media: Media, engine: str) -> None:
    """Seen to fail without: Media.foreshow."""
    ann = arrive(engine)
    make_room(ann, relay)
    ann.upload(media["photo.jpg"])
    has_file(ann, "photo.jpg")
    ann.goto(relay.url("/trust"))
    ann.goto(relay.url())
    ann.find("list", "Rooms").appears()
    ann.js(HEIGHTS_SCRIPT)
    ann.find("list", "Rooms").find("link", re.compile("Harbour")).click()
    ann.wait(f"{DRAWN_SCRIPT} === 1")
    ann.js("new Promise((go) => requestAnimationFrame(() => requestAnimationFrame(() => go(0))))")
    assert ann.js("heights.size") == 1, ann.js("[...heights]")


@on_engines()
def test_photos_travel_without_their_place_and_with_a_small_picture(
    arrive: Arrive, relay: Relay, media: Media, tmp_path: Path, engine: str
) -> None:
    names = ("one.jpg", "two.jpg")
    for name in names:
        (tmp_path / name).write_bytes(photo_with_place("JPEG", 1))
    ann, bob = meet(arrive, relay, engine)
    brings(ann, bob, *[tmp_path / name for name in names])
    for name in names:
        assert save(bob, name).sha256 != sha256((tmp_path / name).read_bytes())
    bob.find("img", "one.jpg").appears()
    eventually(lambda: bob.js("[...document.querySelectorAll('.msg.pic')].length") == 2, "both stand as pictures")
    bob.css('button[title="Open one.jpg"]').click()
    assert bob.css("#show-frame img").js("(e) => e.alt") == "one.jpg"
    press(bob, "Next picture")
    assert bob.css("#show-frame img").js("(e) => e.alt") == "two.jpg"
    bob.js("document.getElementById('d-show').dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowLeft'}))")
    assert bob.css("#show-frame img").js("(e) => e.alt") == "one.jpg"


@on_engines("chromium")
def test_files_are_saved_together_deleted_from_the_device_and_fetched_again(
    arrive: Arrive, relay: Relay, tmp_path: Path, engine: str
) -> None:
    files = {"a.txt": b"one", "b.bin": bytes(5000)}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    ann, bob = meet(arrive, relay, engine)
    bob.click("button", "Settings")
    bob.js("Object.assign(document.getElementById('set-fetch'), {value: '0'}).dispatchEvent(new Event('change'))")
    ann.upload(*[tmp_path / name for name in files])
    for name in files:
        bob.find("button", f"Download {name}").appears()
    bob.find("status", re.compile("Connected")).count()
    assert bob.js("document.querySelectorAll('#shelf li').length") == 0, "nothing was fetched unasked"
    bob.js("document.getElementById('d-settings').close()")
    for name, data in files.items():
        assert save(bob, name).sha256 == sha256(data)
    bob.click("button", "Settings")
    shelf = bob.find("list", "Files on this device")
    press(bob, "Save all")
    assert bob.wait("testSaves[2]?.name") == "Harbour, files.zip"
    press(bob, "Delete b.bin from this device")
    eventually(lambda: "b.bin" not in shelf.text(), "it is gone")
    bob.js("document.getElementById('d-settings').close()")
    assert "Deleted from this device" in article(bob, "b.bin")
    assert save(bob, "b.bin").sha256 == sha256(files["b.bin"])


# a tone of the page's own in the place of a microphone
TONE_SCRIPT = """(() => {
  const context = new AudioContext(), tone = context.createOscillator(), end = context.createMediaStreamDestination();
  tone.connect(end);
  tone.start();
  context.resume();
  navigator.mediaDevices.getUserMedia = async () => end.stream.clone();
})()"""
HOLD_SCRIPT = """(() => {
  const e = document.getElementById('voice');
  e.setPointerCapture = () => {};
  e.dispatchEvent(new PointerEvent('%s', {pointerId: 1, clientX: %d, clientY: 0}));
})()"""


@on_engines("chromium", "firefox")
def test_a_voice_note_is_recorded_while_the_button_is_held(arrive: Arrive, relay: Relay, engine: str) -> None:
    ann, bob = meet(arrive, relay, engine)
    ann.js(TONE_SCRIPT)
    ann.js(HOLD_SCRIPT % ("pointerdown", 0))
    ann.css("#voice-said").says("Recording")
    ann.js("new Promise((go) => setTimeout(() => go(0), 1200))")  # what is spoken takes its time
    ann.js(HOLD_SCRIPT % ("pointerup", 200))
    eventually(lambda: ann.css("#voice-said").text() == "", "it is dropped")
    ann.js(HOLD_SCRIPT % ("pointerdown", 0))
    ann.css("#voice-said").says("Recording")
    ann.js("new Promise((go) => setTimeout(() => go(0), 1200))")
    ann.js(HOLD_SCRIPT % ("pointerup", 0))
    player = bob.css('audio[aria-label^="Voice note"]').appears()
    eventually(functools.partial(player.js, "(e) => e.readyState > 0"), "it can be played")
    assert bob.js("document.querySelectorAll('audio').length") == 1, "the one let go elsewhere was not sent"


ROWS_SCRIPT = """[...document.querySelectorAll('.shot')].map((e) => e.getBoundingClientRect()).map(({top, width}) =>
  [Math.round(top), Math.round(width)])"""


@on_engines()
def test_photos_of_one_run_stand_in_rows_and_an_odd_one_takes_a_whole_one(
    arrive: Arrive, relay: Relay, media: Media, engine: str
) -> None:
    ann = arrive(engine)
    make_room(ann, relay)
    brings(ann, ann, *[media[name] for name in PICTURES[:3]])
    for text, size in (("", LAPTOP), ("one more thing", LAPTOP), ("or two", PHONE)):  # whatever is drawn again later
        ann.size(*size)
        if text:
            write(ann, text)
            hears(ann, text)
        (first, width), (second, width_2), (third, whole) = ann.js(ROWS_SCRIPT)
        assert first == second < third, text
        assert width == width_2, text
        assert whole > 2 * width, text


BARS_SCRIPT = """([...document.querySelectorAll('.wave path')].map((e) =>
  [...e.getAttribute('d').matchAll(/v([0-9.]+)/g)].map(([, height]) => Number(height) > 20 ? 1 : Number(height) < 6 ? 0 : height)))"""


def silence_and_tone(path: Path) -> Path:
    """A second of each."""
    with wave.open(str(path), "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(16_000)
        sound.writeframes(bytes(32_000) + struct.pack("<16h", *[16_000] * 8, *[-16_000] * 8) * 1000)
    return path


@on_engines()
def test_a_sound_is_drawn_as_loud_as_it_is_and_as_far_as_it_was_played(
    arrive: Arrive, relay: Relay, tmp_path: Path, engine: str
) -> None:
    ann = arrive(engine)
    make_room(ann, relay)
    ann.upload(silence_and_tone(tmp_path / "whistle.wav"))
    eventually(lambda: re.search(r"0:02 · 64\s*kB", article(ann, "whistle.wav")), "it says how long it is")
    low, high = [0] * 24, [1] * 24
    eventually(lambda: ann.js(BARS_SCRIPT) == [[], low + high], "each part is as high as it is loud")
    ann.css("audio").js("(e) => { e.currentTime = 1.5; }")
    eventually(lambda: ann.js(BARS_SCRIPT) == [low + high[12:], high[12:]], "three quarters were played")


EVIL = "<script>window.pwned = 1</script><svg xmlns='http://www.w3.org/2000/svg' onload='window.pwned = 1'/>"
EVIL_NAMES = (
    "page.html",
    "drawing.svg",
    "data.xhtml",
    "javascript:pwned=1.htm",
    "photo.png.svg",
    "&lt;img src=x&gt;.xml",
)


@on_engines()
def test_attack_36_what_could_carry_a_script_is_never_shown_inline(
    arrive: Arrive, relay: Relay, tmp_path: Path, engine: str
) -> None:
    """Media knows by name what it shows, and serves all else as application/octet-stream.

    Seen to fail without: the table of what is shown inline (SVG, HTML and XML added).
    """
    ann, bob = meet(arrive, relay, engine)
    for name in EVIL_NAMES:
        (tmp_path / name).write_text(EVIL)
    (tmp_path / "photo.png").write_text(EVIL)
    ann.upload(*[tmp_path / name for name in (*EVIL_NAMES, "photo.png")])
    write(ann, "<img src=x onerror=pwned=1> javascript:pwned=1 data:text/html,<script>pwned=1</script>")
    for name in EVIL_NAMES:
        has_file(bob, name)
    for name in EVIL_NAMES:
        assert save(bob, name).type == "application/octet-stream"
    hears(bob, "<img src=x onerror=pwned=1>")
    assert bob.js("window.pwned ?? document.querySelectorAll('iframe, object, embed, article svg image').length") == 0
    assert bob.js("[...document.querySelectorAll('article a')].map((e) => e.protocol)") == []
    shown = "[...document.querySelectorAll('article img, article video, article audio')]"
    assert bob.js(f"{shown}.filter((e) => e.src && !e.src.startsWith('blob:')).length") == 0
    for user in (ann, bob):
        user.excuse("photo.png")


def shows_harbour(user: User) -> None:
    user.find("list", "Rooms").find("link", re.compile("Harbour")).click()
    user.find("heading", "Harbour", level=1).appears()
    is_connected(user)


@on_engines("chromium")
def test_attack_37_of_two_tabs_one_works_and_the_other_may_take_over(arrive: Arrive, relay: Relay, engine: str) -> None:
    """Session.hold: one lock a store, so that two tabs never sign two events at one place; Session.yield stops who
    loses it.

    Seen to fail without: `'second-tab'` in Session.start; Session.yield where the lock is stolen.
    """
    ann, bob = meet(arrive, relay, engine)
    say = "Session.dispatch({do: 'send', text: 'line 9'}).then(() => 'sent', (e) => e.code ?? String(e))"
    ann.add_tab()
    ann.goto(relay.url())
    ann.find("alert").says("Two tabs at once")
    assert ann.js(say) != "sent"
    ann.use_tab(0)
    write(ann, "line 1")
    hears(bob, "line 1")
    ann.use_tab(1)
    ann.click("button", "Use it here")
    shows_harbour(ann)
    write(ann, "line 2")
    hears(bob, "line 2")
    ann.use_tab(0)
    ann.find("alert").says("opened in another tab")
    assert ann.js(say) != "sent"
    ann.use_tab(1)
    write(bob, "line 3")
    hears(ann, "line 3")
    for user in (ann, bob):
        shows_lines(user, ["line 1", "line 2", "line 3"])
        assert user.find("alert").count() == 0


# ----------------------------------------------------------------------------------------------- what has to survive --


@on_engines("webkit")
def test_a_page_that_is_left_keeps_nobody_from_its_storage(arrive: Arrive, relay: Relay, engine: str) -> None:
    """Seen to fail without giving up what is under way (connection in the store): two in a hundred were blank for ever."""
    ann = arrive(engine)
    make_room(ann, relay)
    write(ann, "still here")
    hears(ann, "still here")
    there = ann.js("location.href")
    for _ in range(12):
        ann.goto("about:blank")
        ann.goto(there)
        hears(ann, "still here")


BUSY_STORE_SCRIPT = """new Promise((held) => {
  indexedDB.open('zsr').onsuccess = ({target}) => {
    const table = target.result.transaction(['meta'], 'readwrite').objectStore('meta');
    const again = () => { if (!window.enough) table.count().onsuccess = again; held(true); };
    again();
  };
})"""


@on_engines("chromium")
def test_a_page_that_does_not_get_its_storage_says_so_and_goes_on_once_it_does(
    arrive: Arrive, relay: Relay, engine: str
) -> None:
    ann = arrive(engine)
    make_room(ann, relay)
    there = ann.js("location.href")
    ann.goto(relay.url("/trust"))
    ann.js(BUSY_STORE_SCRIPT)
    late = ann.another_tab()
    late.goto(there)
    late.css("body").says("The browser does not give this page what it keeps for it.")
    ann.js("void (window.enough = true)")
    is_in(late, "Harbour")


@on_engines()
def test_a_reload_keeps_messages_files_and_rooms(arrive: Arrive, relay: Relay, media: Media, engine: str) -> None:
    ann, bob = meet(arrive, relay, engine)
    write(ann, "line 1")
    ann.upload(media["photo.jpg"])
    bob.find("img", "photo.jpg").appears()
    write(bob, "line 2")
    hears(ann, "line 2")
    for user in (ann, bob):
        user.reload()
        user.find("heading", "Harbour", level=1).appears()
        is_connected(user)
        user.find("img", "photo.jpg").appears()
        assert numbered(user) == ["line 1", "line 2"]
        assert save(user, "photo.jpg").sha256 == sha256(media["photo.jpg"].read_bytes())
    write(bob, "line 3")
    hears(ann, "line 3")
    is_delivered(bob, "line 3")
    bob.click("button", "Rooms")
    bob.find("list", "Rooms").find("link", re.compile("Harbour")).click()
    hears(bob, "line 3")


@on_engines()
def test_a_relay_killed_in_mid_conversation_loses_and_doubles_nothing(
    arrive: Arrive, relay: Relay, media: Media, engine: str
) -> None:
    ann, bob = meet(arrive, relay, engine)
    for user in (ann, bob):
        user.excuse()
    for number in range(1, 21):
        write((ann, bob)[number % 2], f"line {number}")
        if number in (7, 14):
            relay.kill()
        if number in (10, 17):
            relay.start()
    expected = sorted(f"line {number}" for number in range(1, 21))
    for user in (ann, bob):
        is_connected(user)
        shows_lines(user, expected)
    assert numbered(ann) == numbered(bob), "both see one order"
    is_delivered(ann, "line 20")
    ann.upload(media["photo.jpg"])
    bob.find("img", "photo.jpg").appears()


@on_engines("firefox")
def test_what_was_written_offline_survives_a_reload_and_goes_out_later(
    arrive: Arrive, relay: Relay, engine: str
) -> None:
    ann, bob = meet(arrive, relay, engine)
    for user in (ann, bob):
        user.excuse()
    relay.kill()
    with page_without_socket(relay):
        eventually(lambda: not ann.find("status", "Connection").text().strip().startswith("Connected"), "Ann is told")
        write(ann, "kept for you")
        assert "Sending" in eventually(lambda: article(ann, "kept for you"))
        ann.reload()
        hears(ann, "kept for you")
        assert "Sending" in article(ann, "kept for you")
        assert "kept for you" not in "".join(articles(bob))
    relay.start()
    hears(bob, "kept for you")
    is_delivered(ann, "kept for you")


@on_engines("chromium")
def test_a_page_whose_socket_never_opens_says_what_that_means(arrive: Arrive, relay: Relay, engine: str) -> None:
    ann = arrive(engine, PHONE)
    make_room(ann, relay)
    ann.excuse()
    relay.kill()
    with page_without_socket(relay):
        ann.reload()
        ann.find("alert").says("The page loads but its connection is refused.")
    relay.start()
    is_connected(ann)


@pytest.mark.relay("--local-ca")
@on_engines()
def test_trust_can_be_read_on_a_phone(arrive: Arrive, relay: Relay, engine: str) -> None:
    ann = arrive(engine, PHONE)
    ann.goto(relay.url("/trust"))
    ann.find("heading", "Is this the right relay?", level=1).appears()
    ann.css("summary").nth(0).click()
    ann.find("link", "the profile").appears()
    ann.js("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    for width in (PHONE[0], 320):
        ann.size(width, PHONE[1])
        ann.wait(f"innerWidth === {width}")
        assert ann.js("document.documentElement.scrollWidth") <= width
    ground = ann.js("getComputedStyle(document.body).backgroundColor")
    assert ground in ("rgb(239, 243, 244)", "rgb(9, 15, 17)"), "its style is allowed"
    ann.click("link", "ZeroSecretRoom")
    ann.find("button", "New room").appears()


@on_engines("firefox")
def test_unread_messages_are_counted_in_each_room(arrive: Arrive, relay: Relay, engine: str) -> None:
    ann, bob = arrive(engine), arrive(engine)
    make_room(ann, relay, "Harbour")
    join_by(bob, make_link(ann), "Bob", "Harbour")
    ann.click("button", "New room")
    make_room(ann, relay, "Dunes")
    join_by(bob, make_link(ann), "Bob", "Dunes")
    rooms_of = {user: user.find("list", "Rooms") for user in (ann, bob)}
    rooms_of[ann].find("link", re.compile("Harbour")).click()
    for number in (1, 2):
        write(ann, f"line {number}")
    harbour = rooms_of[bob].find("link", re.compile("Harbour"))
    harbour.says("2 unread")
    assert "unread" not in rooms_of[bob].find("link", re.compile("Dunes")).text()
    assert bob.js("document.title").startswith("(2)")
    harbour.click()
    assert eventually(lambda: numbered(bob)) == ["line 1", "line 2"]
    eventually(lambda: "unread" not in harbour.text(), "read is read")
    assert not bob.js("document.title").startswith("(")


# ----------------------------------------------------------------------------------------------- the store, two tabs --


def fault_of(user: User, do: str, **intent: Any) -> str:
    """The code with which the page refuses an intent that its own screens would not offer now, or ''."""
    what = json.dumps({"do": do, **intent})
    return str(user.js(f"Session.dispatch({what}).then(() => '', (e) => e.code ?? String(e))"))


def in_settings(user: User, button: str) -> Spot:
    """Presses a button of the dialog Settings and gives the dialog that asks."""
    user.click("button", "Settings")
    user.find("dialog", "Settings").find("button", button).click()
    return user.css("#d-pass").appears()


def passphrases(user: User, button: str, **fields: str) -> None:
    dialog = in_settings(user, button)
    for field_name, text in fields.items():
        dialog.css(f"#pass-{field_name}").fill(text)
    dialog.css("#pass-go").click()
    dialog.vanishes()
    user.find("dialog", "Settings").find("button", "Close").click()


def is_locked(user: User) -> None:
    user.find("heading", "Locked").appears()
    assert user.css("article, .item").count() == 0
    assert not user.js("document.body.innerText.includes('line ')"), "nothing of a room is left in the page"
    assert fault_of(user, "send", text="no") == "locked"


def unlock(user: User, passphrase: str) -> None:
    user.css("#locked-pass").fill(passphrase)
    user.click("button", "Unlock")


@on_engines()
def test_a_passphrase_is_set_asked_for_changed_and_removed(arrive: Arrive, relay: Relay, engine: str) -> None:
    ann, bob = meet(arrive, relay, engine)
    write(ann, "line 1")
    hears(bob, "line 1")
    dialog = in_settings(ann, "Set passphrase")
    for field_name in ("next", "again"):
        dialog.css(f"#pass-{field_name}").fill("short")
    dialog.css("#pass-go").click()
    dialog.css("#pass-bad").says("too short")
    for field_name in ("next", "again"):
        dialog.css(f"#pass-{field_name}").fill(PHRASE)
    dialog.css("#pass-go").click()
    dialog.vanishes()
    ann.reload()
    is_locked(ann)
    write(bob, "line 2")
    unlock(ann, "wrong passphrase")
    ann.find("alert").says("Nothing was changed")
    is_locked(ann)
    unlock(ann, PHRASE)
    ann.find("heading", "Harbour", level=1).appears()
    hears(ann, "line 2")
    assert numbered(ann) == ["line 1", "line 2"]
    passphrases(ann, "Change passphrase", old=PHRASE, next="something else", again="something else")
    ann.reload()
    is_locked(ann)
    assert fault_of(ann, "unlock", passphrase=PHRASE) == "passphrase"
    unlock(ann, "something else")
    ann.find("heading", "Harbour", level=1).appears()
    is_connected(ann)
    passphrases(ann, "Remove passphrase", old="something else")
    ann.reload()
    hears(ann, "line 2")
    write(ann, "line 3")
    hears(bob, "line 3")


def is_another_page(user: User, mark: str) -> bool:
    """Whether the page that had this mark is gone, and the next one is there; neither can be asked in between."""
    with contextlib.suppress(pw.Error, WebDriverError, RuntimeError):
        return bool(user.js(f"window.{mark} === undefined && document.readyState === 'complete'"))
    return False


SLEEP_SCRIPT = """(() => {
  const {now} = Date;
  Date.now = () => now() + %d;
  dispatchEvent(new Event('focus'));
})()"""
"""The machine slept for so many milliseconds, and the page is looked at again."""


@on_engines("webkit")
def test_an_idle_page_locks_itself_and_a_link_waits_for_the_passphrase(
    arrive: Arrive, relay: Relay, engine: str
) -> None:
    ann, bob = meet(arrive, relay, engine)
    write(ann, "line 1")
    passphrases(ann, "Set passphrase", next=PHRASE, again=PHRASE)
    ann.js("Session.dispatch({do: 'autolock', minutes: 5}).then(() => 0)")
    ann.js(SLEEP_SCRIPT % 200_000)
    assert fault_of(ann, "typing") == ""
    ann.js(SLEEP_SCRIPT % 301_000)
    is_locked(ann)
    unlock(ann, PHRASE)
    hears(ann, "line 1")
    bob.click("button", "Rooms")
    bob.click("button", "New room")
    make_room(bob, relay, "Dunes", "Bob")
    link = make_link(bob)
    ann.goto(link)
    ann.reload()  # to the same page with another fragment nothing is loaded
    ann.find("heading", "Locked").appears()
    ann.js(f"location.hash = {json.dumps(link[link.index('#') :])}")
    unlock(ann, PHRASE)
    ann.find("heading", "You are invited").appears()
    assert ann.js("location.hash") == ""


def erase_all(user: User) -> None:
    user.js("void (window.erased = false)")
    user.click("button", "Erase everything on this device")
    user.click("button", "Erase")
    user.click("button", "Erase for good")
    eventually(lambda: is_another_page(user, "erased"), "the page loads anew")
    user.find("button", "New room").appears()


def is_erased(user: User) -> None:
    """Behind a passphrase, from the locked page, and for good."""
    passphrases(user, "Set passphrase", next=PHRASE, again=PHRASE)
    user.reload()
    is_locked(user)
    erase_all(user)
    user.reload()
    user.find("button", "New room").appears()


@on_engines()
def test_everything_goes_to_another_browser_and_is_erased_here(
    arrive: Arrive, relay: Relay, media: Media, engine: str
) -> None:
    ann, bob = meet(arrive, relay, engine)
    new = arrive(engine)
    write(ann, "line 1")
    ann.css("#files").upload(media["photo.jpg"])
    has_file(bob, "photo.jpg")
    write(bob, "line 2")
    hears(ann, "line 2")
    packed = ann.js(
        f"Session.dispatch({{do: 'export', passphrase: {json.dumps(PHRASE)}}}).then((b) => new Promise((go) => "
        "{ const r = new FileReader(); r.onload = () => go(r.result.split(',')[1]); r.readAsDataURL(b); }))"
    )
    new.goto(relay.url())
    new.find("button", "New room").appears()

    def brings(passphrase: str, data: str) -> Any:
        given = json.dumps([data, passphrase])
        return new.js(
            f"(([data, passphrase]) => Session.dispatch({{do: 'import', passphrase, file: new Blob([Uint8Array.from("
            f"atob(data), (c) => c.charCodeAt(0))])}}).catch((e) => e.code ?? String(e)))({given})"
        )

    assert brings("wrong passphrase", packed) == "passphrase"
    assert brings(PHRASE, packed[: len(packed) // 8 * 4]) == "archive"
    assert new.find("list", "Rooms").count() == 0
    assert brings(PHRASE, packed) == {"added": 1, "kept": 0}
    assert brings(PHRASE, packed) == {"added": 0, "kept": 1}
    new.find("list", "Rooms").find("link", re.compile("Harbour")).click()
    hears(new, "line 2")
    assert numbered(new) == ["line 1", "line 2"]
    eventually(lambda: "Ann linked a device" in new.text_of_page(), "it is in, and the log stands still")
    assert save(new, "photo.jpg").sha256 == sha256(media["photo.jpg"].read_bytes())
    write(new, "line 3")
    hears(bob, "line 3")
    write(bob, "line 4")
    hears(new, "line 4")
    assert numbered(new) == numbered(bob) == [f"line {n}" for n in (1, 2, 3, 4)]
    eventually(lambda: "Another browser is connected" in ann.text_of_page(), "the old browser says why it waits")
    ann.click("button", "Try now")
    eventually(lambda: "Another device of yours put this one out" in ann.text_of_page(), "and then that it is out")
    assert numbered(ann) == ["line 1", "line 2"]
    is_erased(ann)
    assert ann.find("list", "Rooms").count() == 0
    assert "Harbour" not in ann.text_of_page()
    for user in (ann, bob, new):
        user.excuse()


FLIP_SCRIPT = """new Promise((done, fail) => {
  const asked = indexedDB.open('zsr');
  asked.onsuccess = () => {
    const db = asked.result, table = db.transaction('meta', 'readwrite').objectStore('meta'), all = table.getAll();
    all.onsuccess = () => {
      const sum = all.result.filter((r) => r.no === undefined).map((r) => String(r.k) + new Uint8Array(r.ct).join());
      const record = all.result.find(({k}) => String(k).endsWith(%s));
      if (record) { new Uint8Array(record.ct)[30] ^= 1; table.put(record); }
      table.transaction.oncomplete = () => { db.close(); done(sum.join('|')); };
    };
  };
  asked.onerror = () => fail(asked.error);
})"""
"""Flips a bit of the record whose name ends so, and tells what all records were before."""


@on_engines("firefox")
def test_attack_39_in_a_browser_guesses_and_altered_records_overwrite_nothing(
    arrive: Arrive, relay: Relay, engine: str
) -> None:
    """The wrapped key, then a record, altered beside the page; see the mutations of attack 39 in the laboratory."""
    ann = arrive(engine)
    make_room(ann, relay)
    write(ann, "line 1")
    passphrases(ann, "Set passphrase", next=PHRASE, again=PHRASE)
    ann.reload()
    ann.find("heading", "Locked").appears()
    before = ann.js(FLIP_SCRIPT % "'nothing'")
    for record, code in (("key", "passphrase"), (":core", "damaged"), (":me", "damaged")):
        ann.js(FLIP_SCRIPT % json.dumps(record))
        for guess in ("wrong passphrase", PHRASE):
            assert fault_of(ann, "unlock", passphrase=guess) == (code if guess == PHRASE else "passphrase")
        ann.js(FLIP_SCRIPT % json.dumps(record))
    assert ann.js(FLIP_SCRIPT % "'nothing'") == before
    unlock(ann, PHRASE)
    hears(ann, "line 1")


LINE_SCRIPT = """(() => {
  const mark = new Uint8Array(32), room = {id: 'room', mark, members: [], me: {name: ''}, older: false, typing: [], own: false, demo: false};
  Log.render({...room, messages: [{key: 'line', kind: 'linked', member: 'member', author: '%s', text: '', mark, mine: false,
    time: Date.now(), lam: 1, file: null, state: '', why: '', held: [], awaited: []}]});
  return document.querySelector('.sys').textContent;                // at once: the page at work shows no room
})()"""


@on_engines("chromium")
def test_a_line_about_a_member_takes_the_name_that_comes_later(arrive: Arrive, relay: Relay, engine: str) -> None:
    user = arrive(engine)
    user.goto(relay.url())
    for name, said in (("", "No name"), ("Bob", "Bob")):
        assert user.js(LINE_SCRIPT % name).startswith(said)


@on_engines("chromium")
def test_what_is_damaged_says_so_and_can_be_begun_anew(arrive: Arrive, relay: Relay, engine: str) -> None:
    ann = arrive(engine)
    ann.excuse("does not open")
    make_room(ann, relay)
    ann.goto(relay.url("/trust"))  # no page that would write it anew
    ann.js(FLIP_SCRIPT % json.dumps(":core"))
    ann.goto(relay.url())
    ann.css("body").says("does not open any more")
    erase_all(ann)
    make_room(ann, relay, "Haven")


@on_engines()
def test_attack_37_of_two_tabs_one_works_and_nothing_is_signed_twice(arrive: Arrive, relay: Relay, engine: str) -> None:
    """The second tab says so and may take over; what the first one was writing then is sent once, or not at all.

    Mutation: `taken` in Store's keep never true, and a `yield` that closes the vault last. Seen to fail here in every
    second run, as a race does, and always in TestStore (only the last one that took the store writes)."""
    ann, bob = meet(arrive, relay, engine)
    write(ann, "line 1")
    hears(bob, "line 1")
    other = ann.another_tab()
    other.goto(relay.url())
    other.find("heading", "Your rooms are open in another tab").appears()
    assert fault_of(other, "send", text="no") == "starting"
    write(ann, "line 2")
    hears(bob, "line 2")
    ann.js(
        "(() => { window.accepted = []; for (let n = 3; n < 60; n++) Session.dispatch({do: 'send', text: `line ${n}`})"
        ".then(() => accepted.push(`line ${n}`), () => 0); })()"
    )
    other.click("button", "Use it here")
    other.find("list", "Rooms").find("link", re.compile("Harbour")).click()
    ann.find("heading", "Your rooms are open in another tab").appears()
    ann.css("body").says("Your rooms were opened in another tab.")
    assert fault_of(ann, "send", text="no") == "locked"
    write(other, "line 60")
    hears(bob, "line 60")
    accepted = set(ann.js("accepted"))
    eventually(lambda: accepted <= set(numbered(bob)), "what was accepted arrives")
    assert len(set(numbered(bob))) == len(numbered(bob))
    eventually(lambda: numbered(other) == numbered(bob), "both see the same")
    for user in (other, bob):
        assert "two different messages" not in user.text_of_page()


# ----------------------------------------------------------------------------------------- a year with other people --


def side(user: User, name: str) -> Spot:
    """The dialog Members, Devices or Settings of the open room."""
    dialog = user.find("dialog", name)
    if not dialog.count():
        user.click("button", name)
    return dialog.appears()


def let_admins_decide(settings: Spot) -> None:
    """From now on an admin has to say yes to whoever joins."""
    choose(settings, "Who joins", "1")
    settings.find("button", "Save rules").click()
    settings.says("Saved.")


def close_side(user: User, name: str) -> None:
    user.find("dialog", name).find("button", "Close").click()


def people_of(user: User) -> Spot:
    return side(user, "Members").find("list", "Members")


def answer(user: User, question: str, yes: str) -> str:
    """Says yes to what the page asks before it acts; gives what it had to say."""
    dialog = user.find("dialog", question).appears()
    text = dialog.text()
    dialog.find("button", yes).click()
    user.css("#d-sure").vanishes()
    return text


def shows(user: User, text: str) -> None:
    eventually(lambda: text in " ".join(user.text_of_page().split()), f"{text!r} is shown")


def is_calm(user: User) -> bool:
    return not any("Warning:" in text for text in user.find("alert").texts())


def digits_of(dialog: Spot) -> list[str]:
    """The groups of the safety number, once they are there."""
    return eventually(lambda: dialog.css("#digits").text().split(), "there is a number")


@on_engines()
def test_back_closes_what_is_open_before_it_leaves_the_room(arrive: Arrive, relay: Relay, engine: str) -> None:
    ann = arrive(engine, PHONE)
    make_room(ann, relay)
    for name in ("Members", "Settings"):
        side(ann, name)
        ann.js("history.back()")
        ann.find("dialog", name).vanishes()
        ann.find("heading", "Harbour", level=1).appears()
    ann.js("history.back()")
    ann.find("list", "Rooms").appears()
    ann.find("heading", "Harbour", level=1).vanishes()


def deletes_the_room(user: User) -> None:
    dialog = side(user, "Settings")
    assert not dialog.find("button", "Leave room").count()
    dialog.find("button", "Delete this room from this device").click()
    answer(user, "Delete this room from this device", "Delete room")
    user.find("button", "New room").appears()
    assert "Harbour" not in user.text_of_page()


def leaves_there(user: User, sender: User, path: Path) -> None:
    """Somebody fetches nothing unasked, and so not this file either."""
    user.js("localStorage.setItem('zsr.fetch', '0')")
    sender.upload(path)
    user.find("button", f"Download {path.name}").appears()


@on_engines()
def test_story_a_friend_is_removed(arrive: Arrive, relay: Relay, media: Media, engine: str) -> None:
    """Who is removed is told at once and keeps what was there; the others talk on; the name alone lets nobody back."""
    ann, bob = meet(arrive, relay, engine)
    cem, other = arrive(engine, PHONE), arrive(engine, PHONE)
    join_by(cem, make_link(ann), "Cem")
    leaves_there(cem, ann, media["notes.txt"])
    write(ann, "line 1")
    hears(bob, "line 1")
    write(cem, "line 2")
    hears(ann, "line 2")
    hears(cem, "line 1")
    assert not people_of(bob).find("button", "Remove Cem").count(), "only admins remove"
    close_side(bob, "Members")
    people_of(ann).find("button", "Remove Cem").click()
    assert "Cem gets nothing that is written after" in answer(ann, "Remove Cem", "Remove from the room")
    shows(cem, "You were removed from this room.")
    cem.find("textbox", "Message").vanishes()
    cem.find("button", "Download notes.txt").vanishes()
    assert "Only members can send and get files." in article(cem, "notes.txt")
    assert "asked to leave" not in cem.text_of_page()
    for user in (ann, bob):
        shows(user, "Ann removed Cem.")
    people_of(ann).says("Bob")
    eventually(lambda: "Cem" not in people_of(ann).text(), "Cem is not listed any more")
    close_side(ann, "Members")
    write(bob, "line 3")
    hears(ann, "line 3")
    is_delivered(bob, "line 3")
    cem.reload()
    shows(cem, "You were removed from this room.")
    assert numbered(cem) == ["line 1", "line 2"]
    join_by(other, make_link(ann), "cem")
    for user in (ann, bob):
        shows(user, "Somebody else here goes by cem")
    ann.click("button", "Verify cem")
    ann.find("dialog", "Verify cem").says("Safety number")
    ann.press("Escape")
    write(other, "line 4")
    hears(bob, "line 4")
    is_delivered(other, "line 4")
    assert numbered(cem) == ["line 1", "line 2"], "nothing reaches who was removed"
    deletes_the_room(cem)


@on_engines()
def test_story_a_phone_is_lost(arrive: Arrive, relay: Relay, engine: str) -> None:
    """Bob, no admin, removes his phone while no admin is there: it is shut out at once, and out of the keys later."""
    ann, bob = arrive(engine), arrive(engine)
    make_room(ann, relay)
    join_by(bob, make_link(ann), "Bob")
    phone = arrive(engine, PHONE)
    link_by(phone, device_link(bob), "Phone")
    phone.find("heading", "Harbour", level=1).appears()
    is_connected(phone)
    write(phone, "line 1")
    hears(bob, "line 1")
    is_delivered(phone, "line 1")
    home = ann.js("location.href")
    ann.goto("about:blank")
    devices = side(bob, "Devices").find("list", "Devices")
    devices.find("button", "Remove device Phone").click()
    assert "The relay shuts it out now" in answer(bob, "Remove device Phone", "Remove this device")
    devices.says("Waiting for Ann to remove it")
    shows(bob, "goes out once Ann is back")
    shows(phone, "Another device of yours put this one out of the room.")
    phone.find("textbox", "Message").vanishes()
    write(bob, "line 2")
    ann.goto(home)
    hears(ann, "line 2")
    eventually(lambda: "Phone" not in devices.text(), "the phone is gone from the list")
    is_delivered(bob, "line 2")
    write(ann, "line 3")
    hears(bob, "line 3")
    is_delivered(ann, "line 3")
    phone.reload()
    shows(phone, "What you have stays readable")
    assert numbered(phone) == ["line 1"]
    assert people_of(ann).text().count("Bob") == 1
    assert "devices" not in people_of(ann).text().replace("\xa0", " ")
    for user in (ann, bob):
        assert is_calm(user)


def comes_and_goes(dora: User, ann: User, bob: User) -> None:
    join_by(dora, make_link(ann), "Dora")
    write(dora, "line 5")
    hears(ann, "line 5")
    hears(bob, "line 5")
    people_of(ann).find("button", "Remove Dora").click()
    answer(ann, "Remove Dora", "Remove from the room")
    close_side(ann, "Members")
    shows(dora, "You were removed from this room.")
    dora.goto("about:blank")


@pytest.mark.relay("--ttl", "30s", "--limit", "rotation_seconds=1")
@on_engines()
def test_story_two_weeks_away(arrive: Arrive, relay: Relay, engine: str) -> None:
    """Cem closes the page. Keys change, people come and go, the relay keeps nothing; then Cem has all, as the others."""
    ann, bob = meet(arrive, relay, engine)
    cem, dora = arrive(engine, PHONE), arrive(engine)
    join_by(cem, make_link(ann), "Cem")
    for user in (ann, bob, cem):
        user.excuse()
    write(cem, "line 1")
    hears(ann, "line 1")
    hears(bob, "line 1")
    home = cem.js("location.href")
    cem.goto("about:blank")
    write(ann, "line 2")
    hears(bob, "line 2")
    for number in (3, 4):
        side(ann, "Settings").find("button", "Rotate keys now").click()
        ann.find("dialog", "Settings").says("The keys change now.")
        shows(bob, "Keys rotated.")
        write(bob, f"line {number}")
        hears(ann, f"line {number}")
    close_side(ann, "Settings")
    comes_and_goes(dora, ann, bob)
    relay.restart()
    is_connected(ann)
    is_connected(bob)
    write(ann, "line 6")
    hears(bob, "line 6")
    bob.goto("about:blank")
    cem.goto(home)
    is_connected(cem)
    hears(cem, *(f"line {number}" for number in range(1, 7)))
    assert numbered(cem) == numbered(ann)
    write(cem, "line 7")
    hears(ann, "line 7")
    assert cem.find("article", re.compile("^Dora")).count() == 1
    for user in (ann, cem):
        assert "missing here" not in user.text_of_page()
        assert is_calm(user)


@on_engines("firefox")
def test_story_two_people_compare_their_numbers(arrive: Arrive, relay: Relay, engine: str) -> None:
    ann, bob = meet(arrive, relay, engine)
    numbers = []
    for user, other in ((ann, "Bob"), (bob, "Ann")):
        people_of(user).find("button", f"Verify {other}").click()
        dialog = user.find("dialog", f"Verify {other}")
        numbers.append("".join(digits_of(dialog)))
        assert re.fullmatch(r"\d{30}", numbers[-1])
        dialog.find("img", "QR code").appears()
    assert numbers[0] == numbers[1]
    dialog = ann.find("dialog", "Verify Bob")
    wrong = f"{numbers[1][:-1]}{(int(numbers[1][-1]) + 1) % 10}"
    for typed, told in ((wrong, "Warning: the numbers differ."), (numbers[1][:-1], "This one has 29")):
        dialog.find("textbox", "Their number").fill(typed)
        dialog.find("button", "Compare").click()
        dialog.says(told)
    dialog.find("button", "Close").click()
    assert "verified" not in people_of(ann).text()
    people_of(ann).find("button", "Verify Bob").click()
    dialog.find("button", "Show all of it").click()
    eventually(lambda: len(digits_of(dialog)) == 12, "all of it is shown")
    dialog.find("textbox", "Their number").fill(" ".join(re.findall("\\d{5}", numbers[1])))
    dialog.find("button", "Compare").click()
    dialog.says("It matches: Bob is verified now.")
    dialog.find("button", "Close").click()
    people_of(ann).says("verified")
    ann.reload()
    people_of(ann).says("verified")
    bob.find("dialog", "Verify Ann").find("button", "We compared it aloud: it matches").click()
    bob.find("dialog", "Verify Ann").says("It matches: Ann is verified now.")
    bob.find("dialog", "Verify Ann").find("button", "Not verified any more").click()
    bob.find("dialog", "Verify Ann").find("button", "Close").click()
    eventually(lambda: "verified" not in people_of(bob).text(), "the mark is taken back")
    rooms = []
    for user in (ann, bob):
        side(user, "Members").find("button", "Verify this room").click()
        rooms.append(digits_of(user.find("dialog", "Verify this room")))
    assert rooms[0] == rooms[1]


def may_not_leave(user: User, dialog: Any) -> None:
    dialog.find("button", "Leave room").click()
    question = user.find("dialog", "Leave Harbour")
    question.says("You are the only admin here.")
    assert not question.find("button", "Leave").count()
    question.find("button", "Not now").click()
    assert fault_of(user, "leaveRoom") == "last-admin"


@on_engines("webkit")
def test_story_an_admin_says_yes_and_the_creator_leaves(arrive: Arrive, relay: Relay, engine: str) -> None:
    ann, bob = meet(arrive, relay, engine)
    cem, dora = arrive(engine, PHONE), arrive(engine, PHONE)
    dialog = side(ann, "Settings")
    may_not_leave(ann, dialog)
    let_admins_decide(dialog)
    people_of(ann).find("button", "Make admin Bob").click()
    shows(bob, "Ann made Bob an admin.")
    side(bob, "Settings").says("Whoever an admin says yes to")
    close_side(bob, "Settings")
    close_side(ann, "Members")
    for newcomer, name in ((cem, "Cem"), (dora, "Dora")):
        ask_in(newcomer, make_link(ann), name)
        newcomer.find("heading", "You are invited").appears()
        waiting = bob.find("list", "Waiting to be let in")
        waiting.says(f"{name} asks to be let in")
        mine = eventually(newcomer.css("#invited-print").text, "the newcomer sees the fingerprint")
        assert mine in waiting.text()
        bob.click("button", f"{'Refuse' if newcomer is cem else 'Let in'} {name}")
        waiting.vanishes()
    shows(cem, "An admin did not let you in.")
    dora.find("heading", "Harbour", level=1).appears()
    ann.find("list", "Waiting to be let in").vanishes()
    write(dora, "line 1")
    hears(ann, "line 1")
    side(ann, "Settings").find("button", "Leave room").click()
    assert "The others are told" in answer(ann, "Leave Harbour", "Leave")
    shows(ann, "You left this room.")
    ann.find("textbox", "Message").vanishes()
    for user in (bob, dora):
        shows(user, "Ann left.")
    write(bob, "line 2")
    hears(dora, "line 2")
    assert numbered(ann) == ["line 1"]
    people_of(bob).find("button", "Remove Dora").click()
    answer(bob, "Remove Dora", "Remove from the room")
    shows(dora, "You were removed from this room.")


@on_engines("chromium")
def test_story_the_relay_has_another_key(arrive: Arrive, relay: Relay, engine: str) -> None:
    ann, bob = meet(arrive, relay, engine)
    for user in (ann, bob):
        user.excuse()
    relay.kill()
    (relay.state / zsr.IDENTITY_KEY).unlink()
    relay.start()
    for user in (ann, bob):
        user.css("#notes").says("Warning: this relay has a new key.")
    write(ann, "line 1")
    assert "Sending" in eventually(lambda: article(ann, "line 1"))
    for user in (ann, bob):
        user.click("button", "Use the new key")
        assert "Do this only if" in answer(user, "Use the new key", "Use this key")
        is_connected(user)
        eventually(functools.partial(is_calm, user), "the alarm is over")
    hears(bob, "line 1")
    is_delivered(ann, "line 1")
    bob.reload()
    is_connected(bob)
    assert "new key" not in bob.text_of_page()


# ------------------------------------------------------------------------------------------------------ long, narrow --


FILL_ROOM_SCRIPT = """(async () => {
  const draw = window.requestAnimationFrame, held = [];
  window.requestAnimationFrame = (show) => held.push(show); // drawn once at the end, not one by one
  for (let n = 1; n <= %d; n++) await Session.dispatch({do: 'send', text: `line ${n}`});
  window.requestAnimationFrame = draw;
  for (const show of held) draw(show);
})()"""


def fill_room(user: User | PlainPage, count: int) -> None:
    """Sends `line 1` to `line COUNT` from the page itself: typing them would take hours."""
    user.js(FILL_ROOM_SCRIPT % count)


@on_engines()
def test_a_reader_who_scrolled_up_stays_there_and_is_told_what_comes(arrive: Arrive, relay: Relay, engine: str) -> None:
    ann, bob = meet(arrive, relay, engine)
    fill_room(ann, 60)
    hears(bob, "line 60")
    log = bob.find("log", "Messages")
    log.js("(e) => { e.scrollTop = 200; }")
    pill = bob.find("button", re.compile("below$"))
    pill.appears()
    place = log.js("(e) => e.scrollTop")
    write(ann, "news")
    pill = bob.find("button", "1 new message")
    pill.appears()
    assert abs(log.js("(e) => e.scrollTop") - place) < 2
    pill.click()
    eventually(lambda: log.js("(e) => e.scrollHeight - e.scrollTop - e.clientHeight") < 2, "the end is in sight")
    pill.vanishes()
    for lines in (8, 9):  # the field takes room from the log
        bob.fill("Message", "one more line\n" * lines)
    write(ann, "more")
    hears(bob, "more")
    eventually(lambda: log.js("(e) => e.scrollHeight - e.scrollTop - e.clientHeight") < 2, "it stays in sight")
    assert not bob.find("button", re.compile("below$|new message")).count()
    place = log.js(PRESS_SCRIPT % "pointerdown")
    write(ann, "under the finger")
    hears(bob, "under the finger")
    assert log.js("(e) => e.scrollTop") == place
    log.js(PRESS_SCRIPT % "pointerup")
    eventually(lambda: log.js("(e) => e.scrollHeight - e.scrollTop - e.clientHeight") < 2, "the end comes afterwards")


PRESS_SCRIPT = "(e) => { e.dispatchEvent(new PointerEvent('%s', {bubbles: true})); return e.scrollTop; }"


def open_long_room(user: User, relay: Relay, count: int) -> float:
    """Makes a room with that many messages, comes back to it later, and gives the seconds until its end is in sight."""
    make_room(user, relay, own=True)
    fill_room(user, count)
    user.goto(relay.url("/healthz"))
    user.goto(relay.url())
    room = user.find("list", "Rooms").find("link", re.compile("Harbour")).appears()
    start = time.monotonic()
    room.click()
    hears(user, f"line {count}")
    return time.monotonic() - start


@on_engines("chromium")
def test_a_long_room_opens_at_its_end_and_loads_more_upwards(arrive: Arrive, relay: Relay, engine: str) -> None:
    ann = arrive(engine)
    open_long_room(ann, relay, 1500)
    assert 20 <= len(articles(ann)) <= 600, "the end is loaded, not everything"
    log = ann.find("log", "Messages")
    assert log.js("(e) => e.scrollHeight - e.scrollTop - e.clientHeight") < 2
    first = numbered(ann)[0]
    log.js("(e) => { e.scrollTop = 0; }")
    eventually(lambda: numbered(ann)[0] != first, "more is loaded above")
    shown = numbered(ann)
    start = int(shown[0].split()[1])
    assert shown == [f"line {number}" for number in range(start, start + len(shown))]


WORD = "Donaudampfschifffahrtselektrizitätenhauptbetriebswerkbauunterbeamtengesellschaft"
OVERFLOW_SCRIPT = """(() => {
  const wide = document.documentElement.scrollWidth > innerWidth ? ['page'] : [];
  const shown = (e) => e.checkVisibility() && getComputedStyle(e).position !== 'absolute';
  for (const e of document.querySelectorAll('body *')) {
    const box = e.getBoundingClientRect();
    if (shown(e) && box.width > 1 && (box.right > innerWidth + 1 || box.left < -1) && !e.closest('svg, [hidden], pre > *'))
      wide.push(`${e.localName}#${e.id} ${e.className} ${Math.round(box.left)}..${Math.round(box.right)}`);
  }
  return wide;
})()"""


@on_engines()
def test_nothing_is_wider_than_the_screen(arrive: Arrive, relay: Relay, media: Media, engine: str) -> None:
    ann = arrive(engine)
    for width in (360, 1440):
        ann.size(width, 740)
        ann.goto(relay.url())
        ann.find("heading").nth(0).appears()
        assert ann.js(OVERFLOW_SCRIPT) == []
        ann.click("button", "New room")
        assert ann.js(OVERFLOW_SCRIPT) == []
        make_room(ann, relay, WORD[:80], WORD[:40])
        write(ann, f"{WORD * 3} https://example.org/{'long/' * 40}")
        ann.upload(media["photo.jpg"], media["clip.mp4"], media["voice.mp3"], media[f"{WORD}.zip"])
        has_file(ann, f"{WORD}.zip")
        assert ann.js(OVERFLOW_SCRIPT) == []
        for name in ("Invite", "Members", "Devices", "Settings"):
            ann.click("button", name)
            assert ann.js(OVERFLOW_SCRIPT) == [], name
            ann.press("Escape")


@on_engines()
def test_the_main_job_can_be_done_with_the_keyboard_alone(arrive: Arrive, relay: Relay, engine: str) -> None:
    ann = arrive(engine)
    ann.goto(relay.url())
    tab_to(ann, "New room")
    ann.press("Enter")
    ann.find("textbox", "Room name").appears()
    type_in(ann, "Pier")
    tab_to(ann, "Your name")
    type_in(ann, "Ann")
    ann.press("Enter")
    ann.find("heading", "Pier", level=1).appears()
    is_connected(ann)
    tab_to(ann, "Invite")
    ann.press("Enter")
    ann.find("textbox", "Invite link").appears()
    ann.press("Escape")
    ann.find("textbox", "Invite link").vanishes()
    assert focused(ann) == "Invite", "focus returns to what opened the dialog"
    tab_to(ann, "Message")
    type_in(ann, "by hand")
    ann.press("Shift+Enter")
    type_in(ann, "two")
    ann.press("Enter")
    hears(ann, "by hand\ntwo")
    assert focused(ann) == "Message"


RING_SCRIPT = """(() => {
  const e = document.activeElement, parts = [e, e.parentElement].flatMap((n) => [[n], [n, '::before'], [n, '::after']]);
  const look = () => parts.map((part) => getComputedStyle(...part)).map((s) => s.outline + s.boxShadow).join();
  const focused = look();
  e.blur();
  const plain = look();
  e.focus({focusVisible: true});
  return focused !== plain;
})()"""


def focused(user: User) -> str:
    """The name of what has the focus: its label or its text."""
    label = "e.getAttribute('aria-label') ?? e.labels?.[0]?.textContent ?? e.textContent"
    name: str = user.js(f"((e) => ({label}).trim())(document.activeElement)")
    return name


def tab_to(user: User, name: str) -> None:
    passed = []
    for _ in range(40):
        if focused(user) == name:
            assert user.js(RING_SCRIPT), f"{name} does not show its focus"
            return
        passed.append(focused(user)[:40])
        user.press("Tab")
    raise AssertionError(f"{name} is not reached with Tab: {passed}")


def type_in(user: User, text: str) -> None:
    for letter in text:
        user.press("Space" if letter == " " else letter)


@on_engines("firefox")
def test_theme_title_and_name_can_be_changed(arrive: Arrive, relay: Relay, engine: str) -> None:
    ann, bob = meet(arrive, relay, engine)
    ann.click("button", "Settings")
    settings = ann.find("dialog", "Settings")
    settings.find("textbox", "Your name").fill("Anna")
    settings.find("textbox", "Your name").press("Enter")
    settings.find("textbox", "Room name").fill("Quay")
    settings.find("textbox", "Room name").press("Enter")
    bob.find("heading", "Quay", level=1).appears()
    choose(settings, "Theme", "dark")
    assert ann.js("getComputedStyle(document.body).backgroundColor") == "rgb(9, 15, 17)"
    assert zsr.Page.of(PAGE.read_bytes()).sha256 in settings.text().replace(" ", "")
    ann.press("Escape")
    write(ann, "hello from Anna")
    hears(bob, "hello from Anna")
    eventually(bob.find("article", re.compile("^Anna")).count, "the new name is shown")


# ======================================================================================================================
# Looks: what people choose a client for. Languages, search, notifications, the first minute, what each screen looks
# like and to whom it can be read, and how soon it is there.
# ======================================================================================================================

# --------------------------------------------------------------------------------------------------------- languages --

WORDS_BLOCKS = ("room-80-memo", "room-81-tongues", "room-81-words")
COLUMNS = pytest.mark.parametrize("column", [1, 2], ids=["Deutsch", "中文"])


@functools.cache
def english_rows() -> dict[str, Any]:
    """key -> text, or its plural forms: the English table as the page reads it."""
    table = re.search(r"const en = (Object\.freeze\(\{\n.*?\n  \}\));", page_text(), re.DOTALL)
    assert table
    return dict(in_node([("en", f"const English = {table[1]};")], "English"))


@functools.cache
def foreign_rows(column: int) -> dict[str, Any]:
    return dict(in_node(page_blocks(WORDS_BLOCKS[1:2]), "Tongues.table", column))


def in_node(code: list[tuple[str, str]], target: str, *args: object) -> Any:
    node = Node(code)
    try:
        return node.call(target, *args)
    finally:
        node.close()


def forms(row: Any) -> list[str]:
    return [row] if isinstance(row, str) else list(row.values())


def places(text: str) -> set[str]:
    return set(re.findall(r"\{(\w+)\}", text))


@COLUMNS
def test_every_string_is_in_each_language(column: int) -> None:
    assert sorted(set(english_rows()) - set(foreign_rows(column))) == []


@COLUMNS
def test_no_language_has_a_string_that_the_page_does_not(column: int) -> None:
    assert sorted(set(foreign_rows(column)) - set(english_rows())) == []


@COLUMNS
def test_no_string_is_empty_and_none_stands_twice(column: int) -> None:
    assert [key for key, row in foreign_rows(column).items() if not all(map(str.strip, forms(row)))] == []
    lines = re.findall(r"^([a-z][\w.-]*)\|", blocks(page_text())["room-81-tongues"], re.MULTILINE)
    assert sorted({key for key in lines if lines.count(key) > 1}) == []


@COLUMNS
def test_places_are_the_same_in_each_language(column: int) -> None:
    """The last form is the one for many, which has all places; one that counts may leave its number out."""
    wrong = {}
    for key in set(english_rows()) & set(foreign_rows(column)):
        here, there = forms(english_rows()[key]), forms(foreign_rows(column)[key])
        if places(here[-1]) != places(there[-1]) or not set().union(*map(places, there)) <= set().union(
            *map(places, here)
        ):
            wrong[key] = there
    assert wrong == {}


def test_german_counts_where_english_does() -> None:
    table = foreign_rows(1)
    assert [
        k for k, row in english_rows().items() if k in table and isinstance(row, str) != isinstance(table[k], str)
    ] == []


@COLUMNS
def test_an_alarm_begins_with_its_word_in_each_language(column: int) -> None:
    table = foreign_rows(column)
    alarms = [key for key, row in english_rows().items() if str(row).startswith(english_rows()["warning"] + " ")]
    assert len(alarms) > 10
    assert [key for key in alarms if not table[key].startswith(table["warning"])] == []


@pytest.mark.parametrize(
    ("browser", "one", "many", "date"),
    [
        (["de-DE", "en"], "1 neue Nachricht", "1.234 neue Nachrichten", "Gestern"),
        (["fr", "zh-CN"], "1 条新消息", "1,234 条新消息", "昨天"),
        (["fr", "en-GB", "de"], "1 new message", "1,234 new messages", "Yesterday"),
        ([], "1 new message", "1,234 new messages", "Yesterday"),
    ],
    ids=["German", "Chinese", "English", "none of them"],
)
def test_the_page_speaks_the_first_language_of_the_browser_that_it_knows(
    browser: list[str], one: str, many: str, date: str
) -> None:
    words = Node(page_blocks(WORDS_BLOCKS), f"globals.navigator = {{languages: {json.dumps(browser)}}};")
    try:
        assert words.call("Words.t", "log.new", {"n": 1}) == one
        assert words.call("Words.t", "log.new", {"n": 1234}) == many
        assert words.call("Words.day", (time.time() - 86_400) * 1000) == date
    finally:
        words.close()


def test_a_string_that_is_not_translated_yet_is_shown_in_english() -> None:
    code = [(name, re.sub(r"(?m)^start\.new\|.*\n", "", source)) for name, source in page_blocks(WORDS_BLOCKS)]
    words = Node(code, "globals.navigator = {languages: ['de']};")
    try:
        assert words.call("Words.t", "start.new") == english_rows()["start.new"]
        assert words.call("Words.t", "start.demo") == foreign_rows(1)["start.demo"]
    finally:
        words.close()


SHOWN_TEXTS_SCRIPT = """(() => {
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_ELEMENT), found = new Set();
  for (let e = walk.nextNode(); e; e = walk.nextNode()) {
    if (!e.checkVisibility() || e.matches('script, style')) continue;
    for (const name of ['aria-label', 'title', 'placeholder']) if (e.hasAttribute(name)) found.add(e.getAttribute(name));
    for (const n of e.childNodes) if (n.nodeType === 3 && n.data.trim()) found.add(n.data.trim());
  }
  return [...found];
})()"""


def english_left(user: User) -> list[str]:
    """English texts that stand on the screen although German has others for them."""
    here, german = english_rows(), foreign_rows(1)
    other = {row for key, row in here.items() if isinstance(row, str) and row not in forms(german[key])}
    return sorted(set(user.js(SHOWN_TEXTS_SCRIPT)) & (other - {row for each in german.values() for row in forms(each)}))


@on_engines("chromium")
def test_the_language_changes_at_once_everywhere_and_is_kept(arrive: Arrive, relay: Relay, engine: str) -> None:
    ann = arrive(engine)
    make_room(ann, relay)
    write(ann, "guten Tag")
    ann.click("button", "Settings")
    choose(ann.find("dialog", "Settings"), "Language", "de")
    assert ann.js("document.documentElement.lang") == "de"
    assert english_left(ann) == []
    for button, title in (("Mitglieder", "Mitglieder"), ("Geräte", "Geräte"), ("Einladen", "In Harbour einladen")):
        ann.click("button", button)
        ann.find("heading", title, level=2).appears()
        assert english_left(ann) == [], button
        ann.size(320, 640)
        assert ann.js(OVERFLOW_SCRIPT) + ann.js(CUT_SCRIPT) == [], f"German words do not fit: {button}"
        ann.size(*LAPTOP)
    ann.press("Escape")
    ann.reload()
    ann.find("log", "Nachrichten").says("guten Tag")
    ann.click("button", "Räume")
    ann.find("button", "Neuer Raum").nth(0).appears()
    assert english_left(ann) == []
    ann.click("button", "Einstellungen")
    choose(ann.css("#d-settings"), "Sprache", "en")
    ann.find("button", "Demo room").appears()
    assert ann.js("document.documentElement.lang") == "en"


# --------------------------------------------------------------------------------------------------------- this page --


@on_engines("chromium")
def test_the_page_saves_itself_as_it_was_served(arrive: Arrive, relay: Relay, engine: str) -> None:
    ann = arrive(engine)
    ann.goto(relay.url())
    ann.click("button", "Settings")
    about = ann.find("dialog", "Settings").find("region", "About")
    about.says("1.0.0")
    eventually(lambda: zsr.Page.of(PAGE.read_bytes()).sha256 in about.text().replace(" ", ""), "the hash is shown")
    assert isinstance(ann, PlaywrightUser)
    name, saved = ann.download(about.find("button", "Save this page"))
    assert (name, saved) == ("zerosecretroom.html", PAGE.read_bytes())


# -------------------------------------------------------------------------------------------------------- every view --
# One walk through all that the page can show, for whoever looks at it: axe, or a camera.

View = tuple[str, User]


def tour(ann: User, bob: User, cem: User, relay: Relay, media: Media) -> Iterator[View]:
    """Each view by its name, on the screen of the one who sees it."""
    yield from tour_of_the_start(ann, bob, relay)
    yield from tour_of_a_room(ann, bob, media)
    yield from tour_of_messages(ann, bob)
    yield from tour_of_the_composer(ann, bob, media)
    yield from tour_of_the_dialogs(ann)
    yield from tour_of_the_door(ann, cem)
    yield from tour_of_troubles(ann, bob, relay)
    yield from tour_of_the_rest(ann, bob, relay)


def tour_of_the_start(ann: User, bob: User, relay: Relay) -> Iterator[View]:
    ann.goto(relay.url())
    ann.find("button", "New room").appears()
    yield "start", ann
    ann.click("button", "New room")
    yield "new room", ann
    make_room(ann, relay)
    is_connected(ann)
    yield "empty room", ann
    ann.click("button", "Invite")
    link = eventually(ann.find("textbox", "Invite link").value, "a link is made")
    yield "invite", ann
    ann.press("Escape")
    bob.goto(link)
    bob.find("heading", "You are invited").appears()
    yield "invited", bob
    join_by(bob, link, "Bob")


def tour_of_a_room(ann: User, bob: User, media: Media) -> Iterator[View]:
    write(ann, "Moin Bob, the ferry leaves at seven. See https://example.org/timetable")
    hears(bob, "timetable")
    write(bob, "I bring the bread 🥖")
    write(bob, "A longer one, so that there are lines to break: the harbour was quiet and the gulls slept.")
    hears(ann, "gulls slept")
    for user, names in ((ann, ("photo.jpg",)), (bob, ("notes.pdf", "voice.mp3"))):
        for name in names:
            user.upload(media[name])
            has_file(ann, name)
            has_file(bob, name)
    write(ann, "See you there")
    is_delivered(ann, "See you there")
    yield "room", ann
    yield "room of the other", bob
    bob.find("article", re.compile("^Ann")).nth(0).find("button", "More").click()
    bob.find("menuitem", "Reply").appears()
    yield "menu of a message", bob
    bob.click("menuitem", "Reply")
    yield "an answer", bob
    bob.press("Escape")
    ann.css(".state[data-s=delivered]").nth(-1).click()
    yield "who has it", ann
    ann.press("Escape")
    ann.css("article .shot").click()
    ann.find("dialog", "photo.jpg").appears()
    yield "picture", ann
    ann.press("Escape")


LETTER = """**Bring** a _warm_ coat, ~~not two~~, and mind:

> The last boat does not wait.

- bread
- `rope 12mm`, @Ann

```
07:00 harbour   09:40 island
17:15 island    19:50 harbour
```"""


def tour_of_messages(ann: User, bob: User) -> Iterator[View]:
    write(bob, LETTER)
    write(bob, "\n".join(f"{hour}:00 the harbour was quiet and the gulls slept" for hour in range(1, 40)))
    hears(ann, "rope 12mm", "39:00")
    yield "a long text", ann
    act(ann, "rope 12mm", "React")
    yield "reactions to choose", ann
    ann.find("menuitemcheckbox", "🎂").click()
    act(bob, "I bring the bread", "Pin")
    write(ann, "The boat leaves at eihgt")
    act(ann, "eihgt", "Edit")
    yield "editing", ann
    write(ann, "The boat leaves at eight")
    write(ann, "wrong room, sorry")
    act(ann, "wrong room", "Delete")
    act(bob, "at eight", "Reply")
    write(bob, "eight is fine")
    hears(ann, "eight is fine")
    ask(ann, "Which day, if the forecast holds?", "Saturday, with the early boat", "Sunday")
    bob.find("button", "Sunday, 0 votes").click()
    ann.find("button", "Sunday, 1 vote").appears()
    ann.css("#pinned").says("I bring the bread")
    yield "answers and a poll", ann
    yield "answers and a poll, of the other", bob
    ann.click("button", "Edited, show earlier versions")
    yield "earlier versions", ann
    ann.press("Escape")
    act(ann, "eight is fine", "Select")
    said(ann, "rope 12mm").find("checkbox", "Select").click()
    yield "selected", ann
    ann.css("#picked").find("button", "Forward").click()
    yield "forward", ann
    ann.press("Escape")
    ann.css("#picked").find("button", "Cancel").click()


def ask(user: User, question: str, *choices: str) -> None:
    user.click("button", "Poll or timer")
    user.find("menuitem", "Poll").click()
    poll = user.find("dialog", "New poll")
    poll.find("textbox", "Question").fill(question)
    poll.find("textbox", "Choices, one a line").fill("\n".join(choices))
    poll.find("button", "Send poll").click()
    poll.vanishes()


def tour_of_the_composer(ann: User, bob: User, media: Media) -> Iterator[View]:
    ann.click("button", "Poll or timer")
    yield "more to send", ann
    ann.find("menuitem", "Poll").click()
    yield "new poll", ann
    ann.press("Escape")
    box = bob.find("textbox", "Message")
    box.fill("hey @a")
    bob.find("option", "Ann").appears()
    ann.css("#typing").says("Bob")
    yield "a mention", bob
    yield "someone is typing", ann
    box.fill("")
    send_once(bob, media["photo.png"])
    ann.find("button", "View photo").appears()
    bob.upload(*(media[name] for name in ("beach.jpg", "boat.jpg", "gull.png", "clip.mp4", "bundle.zip")))
    for name in ("gull.png", "clip.mp4", "bundle.zip"):
        has_file(ann, name)
    yield "photos and a film", ann
    write(ann, "/help")
    ann.find("dialog", "Commands and keys").appears()
    yield "commands and keys", ann
    ann.press("Escape")


def tour_of_the_door(ann: User, cem: User) -> Iterator[View]:
    """Cem has to wait, is refused, and tries the link again; it may also be damaged on its way."""
    let_admins_decide(side(ann, "Settings"))
    close_side(ann, "Settings")
    link = make_link(ann)
    ask_in(cem, link, "Cem")
    ann.find("list", "Waiting to be let in").says("Cem asks to be let in")
    cem.css("#invited-print").appears()
    yield "waiting to be let in", cem
    yield "someone waits", ann
    ann.click("button", "Refuse Cem")
    shows(cem, "An admin did not let you in.")
    yield "refused", cem
    cem.click("button", "To the start")
    ask_in(cem, link, "Cem")
    shows(cem, "This link has ended. Ask for a new one.")
    yield "a link that has ended", cem
    cem.goto(f"{link}x")
    cem.css("#say").appears()
    yield "a damaged link", cem
    cem.goto("about:blank")


def tour_of_troubles(ann: User, bob: User, relay: Relay) -> Iterator[View]:
    """Behind a slow line, which makes it another address: transfers that rest, someone removed, then no line at all."""
    for user in (ann, bob):
        user.excuse()
    with slow_line(relay, 5e5) as line, tempfile.TemporaryDirectory() as folder:
        make_room(ann, cast("Relay", line), "Pier")
        is_connected(ann)
        join_by(bob, make_link(ann), "Bob", "Pier")
        film = Path(folder, "harbour-pan.mov")
        film.write_bytes(bytes(4 << 20))
        ann.upload(film)
        bob.find("progressbar", film.name).appears()
        eventually(lambda: "left" in article(bob, film.name), "its time is told")
        yield "a file on its way", ann
        yield "a file that comes", bob
        press(bob, "Pause")
        eventually(lambda: "Paused, " in article(bob, film.name), "it pauses")
        yield "a file that rests", bob
        people_of(ann).find("button", "Remove Bob").click()
        answer(ann, "Remove Bob", "Remove from the room")
        close_side(ann, "Members")
        shows(bob, "You were removed from this room.")
        yield "removed", bob
        bob.goto(relay.url())
    ann.find("button", "Try now").appears()
    write(ann, "Does this go out?")
    yield "written offline", ann
    ann.goto(relay.url())


def tour_of_the_dialogs(ann: User) -> Iterator[View]:
    ann.click("button", "Members")
    yield "members", ann
    ann.click("button", "Verify Bob")
    ann.find("dialog", "Verify Bob").appears()
    yield "verify", ann
    ann.press("Escape")
    ann.click("button", "Remove Bob")
    yield "a question", ann
    ann.press("Escape")
    close_side(ann, "Members")
    ann.click("button", "Devices")
    yield "devices", ann
    ann.click("button", "Link a device")
    yield "link a device", ann
    ann.press("Escape")
    close_side(ann, "Devices")
    ann.click("button", "Search")
    ann.find("textbox", "Words").fill("ferry")
    ann.css("#hits mark").appears()
    yield "search", ann
    choose(ann.find("dialog", "Search"), "Kind", "photo")
    ann.find("textbox", "Words").fill("")
    ann.css("#hits .tile img").appears()
    yield "gallery", ann
    close_side(ann, "Search")
    ann.click("button", "Settings")
    yield "settings", ann
    ann.click("button", "Set passphrase")
    yield "passphrase", ann
    ann.press("Escape")
    close_side(ann, "Settings")


def tour_of_the_rest(ann: User, bob: User, relay: Relay) -> Iterator[View]:
    ann.find("list", "Rooms").appears()
    yield "rooms", ann
    ann.click("button", "Demo room")
    is_in(ann, "Demo room")
    yield "demo room", ann
    bob.add_tab()
    bob.goto(relay.url())
    bob.find("button", "Use it here").appears()
    yield "second tab", bob
    bob.use_tab(0)
    bob.find("list", "Rooms").find("link", re.compile("Harbour")).click()
    is_in(bob, "Harbour")
    passphrases(bob, "Set passphrase", next="four words are better", again="four words are better")
    bob.click("button", "Settings")
    bob.click("button", "Lock now")
    bob.find("button", "Unlock").appears()
    yield "locked", bob
    relay.kill()
    ann.find("button", "Try now").appears()
    yield "offline", ann
    (relay.state / zsr.IDENTITY_KEY).unlink()
    relay.start()
    ann.click("button", "Rooms")
    ann.find("list", "Rooms").find("link", re.compile("Harbour")).click()
    ann.css("#notes").says("Warning: this relay has a new key.")
    yield "an alarm", ann


AXE = "node_modules/axe-core/axe.min.js"
AXE_SCRIPT = """axe.run(document, {runOnly: ['wcag2a', 'wcag2aa', 'wcag21a', 'wcag21aa', 'wcag22aa', 'best-practice']}).then(
  ({violations}) => violations.map(({id, nodes}) => `${id}: ${nodes.map(({html, any}) =>
    `${html.slice(0, 160)} ${any.map(({message}) => message).join(' ')}`).join(' | ')}`))"""
THEMES = ("light", "dark")


def axe_finds(user: User) -> dict[str, list[str]]:
    """What axe has against the view, by theme; themes in which it has nothing are left out."""
    if not user.js("'axe' in window"):
        user.js((ROOT / ".ci" / AXE).read_text("utf-8") + ";0")
    now = user.js("document.documentElement.dataset.theme")
    found = {}
    for theme in THEMES:
        user.js(f"void (document.documentElement.dataset.theme = '{theme}')")
        found[theme] = user.js(AXE_SCRIPT)
    user.js(f"void (document.documentElement.dataset.theme = '{now}')")
    return {theme: finds for theme, finds in found.items() if finds}


SPACED_SCRIPT = """(() => {
  const sheet = new CSSStyleSheet();
  sheet.replaceSync(`* { line-height: 1.5 !important; letter-spacing: .12em !important; word-spacing: .16em !important }
    p { margin-block-end: 2em !important }`);
  document.adoptedStyleSheets = [sheet];
})()"""
CUT_SCRIPT = """[...document.querySelectorAll('button, label, h1, h2, h3, p, dt, dd, .hint, .count')].filter((e) =>
  e.checkVisibility() && !e.matches('.vh') && ['hidden', 'clip'].includes(getComputedStyle(e).overflowY) &&
  getComputedStyle(e).textOverflow !== 'ellipsis' && e.scrollHeight > e.clientHeight + 2).map((e) => e.outerHTML.slice(0, 120))
"""


@pytest.mark.timeout(600)
@on_engines("chromium")
def test_axe_finds_nothing_in_any_view_and_zoom_and_spacing_cut_nothing(
    arrive: Arrive, relay: Relay, media: Media, engine: str
) -> None:
    """1280 pixels at 400 % are 320 wide (WCAG 1.4.10); the spacing is that of 1.4.12."""
    ann, bob, cem = arrive(engine), arrive(engine, PHONE), arrive(engine, PHONE)
    seen, found = [], {}
    for view, user in tour(ann, bob, cem, relay, media):
        seen.append(view)
        found[f"{view}, axe"] = axe_finds(user)
        size = user.js("[innerWidth, innerHeight]")
        user.js(SPACED_SCRIPT)
        for zoomed in ((640, 400), (320, 600)):
            user.size(*zoomed)
            found[f"{view}, {zoomed}"] = user.js(OVERFLOW_SCRIPT) + user.js(CUT_SCRIPT)
        user.js("void (document.adoptedStyleSheets = [])")
        user.size(*size)
    assert len(seen) > 40
    faults = {view: finds for view, finds in found.items() if finds}
    assert not faults, json.dumps(faults, indent=1)


@on_engines("chromium")
def test_axe_would_find_something(arrive: Arrive, relay: Relay, engine: str) -> None:
    ann = arrive(engine)
    ann.goto(relay.url())
    ann.find("button", "New room").appears()
    ann.js("void document.getElementById('start-new').replaceChildren()")
    assert "button-name" in str(axe_finds(ann)["dark"])
    ann.js("void document.documentElement.style.setProperty('--ink', 'var(--surface)')")
    assert "color-contrast" in str(axe_finds(ann)["dark"])


@pytest.mark.parametrize("size", [PHONE, LAPTOP], ids=["phone", "laptop"])
@on_engines("firefox")
def test_dialogs_take_the_focus_and_give_it_back(
    arrive: Arrive, relay: Relay, engine: str, size: tuple[int, int]
) -> None:
    ann = arrive(engine, size)
    make_room(ann, relay)
    is_connected(ann)
    homes = {"Invite": "Invite to Harbour", "Members": "Members", "Devices": "Devices", "Search": "Words"}
    for button, home in {**homes, "Settings": "Settings"}.items():
        ann.find("button", button).press("Enter")
        eventually(lambda home=home: focused(ann) == home, f"{home} has the focus")  # type: ignore[misc]
        ann.press("Escape")
        eventually(lambda button=button: focused(ann) == button, f"the focus returns to {button}")  # type: ignore[misc]


TARGETS_SCRIPT = """[...document.querySelectorAll('button, a[href], input, select, textarea')].filter((e) =>
  e.checkVisibility() && e.type !== 'file' && !e.closest('.text, .prose')).map((e) => {
  const own = e.closest('label.check') ?? e, box = own.getBoundingClientRect(), wide = getComputedStyle(own, '::after');
  const grown = wide.content === 'none' || wide.position !== 'absolute' ? [0, 0] : [wide.width, wide.height].map(parseFloat);
  return [e.getAttribute('aria-label') ?? e.id, Math.max(box.width, grown[0]), Math.max(box.height, grown[1])];
}).filter(([, width, height]) => Math.min(width, height) < %d)"""


@on_engines("chromium")
def test_fingers_hit_what_they_mean_and_the_keyboard_hides_no_field(arrive: Arrive, relay: Relay, engine: str) -> None:
    """44 pixels with a coarse pointer; 24 (WCAG 2.5.8) for what stands in a line of text."""
    ann, bob = arrive(engine, PHONE), arrive(engine, PHONE)
    ann.goto(relay.url())
    ann.find("button", "New room").appears()
    assert ann.js(TARGETS_SCRIPT % 44) == []
    make_room(ann, relay)
    join_by(bob, make_link(ann), "Bob")
    write(ann, "hello")
    hears(bob, "hello")
    for user in (ann, bob):
        assert user.js(TARGETS_SCRIPT % 24) == []
    for button in ("Invite", "Members", "Devices", "Search", "Settings"):
        ann.click("button", button)
        assert ann.js(TARGETS_SCRIPT.replace("document", "document.querySelector('dialog[open]')") % 44) == [], button
        ann.press("Escape")
    ann.size(390, 400)  # what a keyboard leaves of the page: interactive-widget=resizes-content
    ann.css("#text").click()
    assert ann.js("document.getElementById('write').getBoundingClientRect().bottom <= innerHeight")
    assert ann.js("document.getElementById('log').clientHeight") > 150


# ------------------------------------------------------------------------------------------------------------ colours --
# Every text and every mark on each ground it can stand on, reckoned from the tokens (WCAG 1.4.3, 1.4.11).

THEME_RULES = {"light": ":root", "dark": ":root[data-theme=dark]"}
THEME_RULES |= {"contrast": ":root[data-theme=contrast]", "contrast-dark": ":root[data-theme=contrast-dark]"}
GROUNDS = ("bg", "surface", "raised", "field", "slip", "own", "tint")


@functools.cache
def tokens(theme: str) -> dict[str, str]:
    style = page_text().partition("<style>")[2].partition("</style>")[0]

    def of(rule: str) -> dict[str, str]:
        body = re.search(rf"^{re.escape(rule)} \{{(.*?)^\}}", style, re.DOTALL | re.MULTILINE)
        assert body, rule
        return dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", body[1]))

    return of(":root") | of(THEME_RULES[theme])


def luminance(colour: str) -> float:
    parts = (int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5))
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    """(L1 + 0.05) / (L2 + 0.05), WCAG 2.2."""
    darker, lighter = sorted((luminance(one), luminance(other)))
    return (lighter + 0.05) / (darker + 0.05)


@pytest.mark.parametrize("theme", THEME_RULES)
def test_texts_and_marks_stand_out_from_every_ground(theme: str) -> None:
    colour, most = tokens(theme), 7.0 if theme.startswith("contrast") else 4.5
    texts = {
        "ink": (*GROUNDS, "mark"),
        "ink-2": GROUNDS,
        "ink-3": ("bg", "surface", "raised", "field"),
        "accent-ink": GROUNDS,
    }
    texts |= {
        "danger": (*GROUNDS, "danger-tint"),
        "warn": ("surface", "bg", "warn-tint"),
        "on-accent": ("accent", "accent-up"),
    }
    texts |= {"ink ": ("danger-tint", "warn-tint")}
    marks = {"line-2": ("bg", "surface", "raised", "field"), "focus": GROUNDS}
    marks |= {f"h{n}": ("bg", "surface", "raised", "tint") for n in range(10)}
    ratios = {(ink, on): (contrast(colour[ink.strip()], colour[on]), most) for ink in texts for on in texts[ink]}
    ratios |= {(ink, on): (contrast(colour[ink], colour[on]), 3.0) for ink in marks for on in marks[ink]}
    assert {pair: round(ratio, 2) for pair, (ratio, least) in ratios.items() if ratio < least} == {}


# ------------------------------------------------------------------------------------------------------------ search --

SEARCH_BLOCKS = ("room-78-search",)
SEARCH_RIG = r"""
'use strict';
// Rows as they stand in a store: an item is what it says, and Notary and Keeper hand it out. Rooms are who is who.
const hex = (x) => x, Bytes = {hex};
const Room = {key: (dev, i) => `${dev}.${i}`, memberOf: (s, dev) => s[dev] ?? ''};
const Keeper = {unrecord: (value) => ({item: value})};
const Notary = {contentOf: (item) => item};
const Timeline = {once: ({kind, body}) => kind === 'file' && body.expires === 1};
"""
SEARCH_CASES = r"""
'use strict';
const Cases = (() => {
  const s = {a1: 'ann', a2: 'ann', b1: 'bob'}, names = {a1: 'Ann', a2: 'Ann', b1: 'Bob'};
  const talk = (id) => ({id, s, view: {title: {text: id}}, desk: {me: {dev: 'a1', room: id}, nameOf: (d) => names[d],
    files: {model: (file) => ({id: file})}}});
  let lam = 0, index, stored;
  const event = (kind, body, dev = 'b1', room = 'pier') => {
    lam += 1;
    return {put: 'event', room, lam, dev, i: lam, value: {kind, time: lam, body, whole: body !== null}};
  };
  const page = async (room, after, limit) => stored.filter((e) => e.room === room && e.lam > (after?.[0] ?? 0)).slice(0, limit);
  const store = {eventsAfter: page, tx: async (ops) => { stored.push(...ops); }};
  const find = (words, more = {}) => {
    const found = index.find({words, kind: '', person: '', room: '', ...more}, [talk('pier'), talk('quay')]);
    return [found.total, ...found.hits.map(({parts}) => parts.map(([text, hit]) => (hit ? `[${text}]` : text)).join(''))];
  };
  const begin = async (...events) => {
    [index, stored] = [new Search.Index(), events];
    while (!await index.more(store, ['pier', 'quay']));
  };
  const later = (...ops) => index.watched(store).tx(ops);
  return {
    async words() {
      await begin(event('text', {text: 'The FÄHRE leaves'}), event('text', {text: 'no ferry'}), event('reply', {text: '渡轮七点开'}),
        event('profile', {name: 'ferry'}), event('text', null));
      return [find('fahre'), find('ferry'), find('the leaves'), find('leaves early'), find('七点'), find('')];
    },
    async kinds() {
      const file = (name, type) => event('file', {name, type, file_id: name, thumb: []});
      await begin(file('beach.jpg', 'image/jpeg'), file('odd.PNG', ''), file('plan.pdf', 'application/pdf'),
        event('text', {text: 'see https://example.org'}), event('text', {text: 'see you'}, 'a2', 'quay'));
      return [find('', {kind: 'photo'}), find('', {kind: 'file'}), find('', {kind: 'link'}), find('see', {person: 'Ann'}),
        find('see', {room: 'quay'}), find('see', {room: 'pier', person: 'Ann'})];
    },
    async follows() {
      const said = event('text', {text: 'at seven'});
      await begin(said);
      const answers = [find('seven')];
      await later(event('text', {text: 'by seven'}, 'a1'));
      answers.push(find('seven'));
      const edit = (dev, text) => event('edit', {text, target: {dev: said.dev, i: said.i}}, dev);
      await later(edit('a1', 'at nine'));
      answers.push(find('nine'));
      await later(edit('b1', 'at eight'));
      answers.push(find('eight'), find('seven'));
      await later({...said, value: {kind: 'text', time: 1, body: null, whole: false}});
      answers.push(find('eight'), find('at'));
      await later({...stored[1], put: undefined, del: 'event'});
      answers.push(find('by'));
      index.forget('pier');
      return [...answers, find('seven')];
    },
    async races() {
      const said = event('text', {text: 'secret'});
      [index, stored] = [new Search.Index(), [said]];
      const held = {...store, eventsAfter: async (...asked) => {
        const found = await page(...asked);
        index.saw({...said, value: {kind: 'text', time: 1, body: null, whole: false}});
        return found;
      }};
      while (!await index.more(held, ['pier']));
      return find('secret');
    },
    async many(count) {
      await begin(...Array.from({length: count}, (_, n) => event('text', {text: `line ${n} of the log, as long as people write`})));
      const [total] = find(`line ${count - 7} `), [all, ...hits] = find('line');
      return [total, all, hits.length];
    },
    again(times) { for (let n = 0; n < times; n += 1) find(`line 4${n}`); },
    excerpt: () => Search.cut(`${'a'.repeat(100)} needle ${'b'.repeat(300)}`, ['needle']).map(([text, hit]) => [text.length, hit]),
  };
})();
"""


@pytest.fixture(scope="module")
def search() -> Iterator[Node]:
    started = Node([("rig", SEARCH_RIG), *page_blocks(SEARCH_BLOCKS), ("cases", SEARCH_CASES)])
    yield started
    started.close()


def test_words_are_found_whatever_their_case_and_accents(search: Node) -> None:
    assert search.call("Cases.words") == [
        [1, "The [FÄHRE] leaves"],
        [1, "no [ferry]"],
        [1, "[The] FÄHRE [leaves]"],
        [0],
        [1, "渡轮[七点]开"],
        [0],
    ]


def test_kinds_people_and_rooms_narrow_it_down(search: Node) -> None:
    assert search.call("Cases.kinds") == [
        [2, "odd.PNG", "beach.jpg"],
        [1, "plan.pdf"],
        [1, "see https://example.org"],
        [1, "[see] you"],
        [1, "[see] you"],
        [0],
    ]


def test_what_is_written_edited_and_deleted_is_found_accordingly(search: Node) -> None:
    """An edit by someone else has no effect, and what is deleted leaves no word behind."""
    assert search.call("Cases.follows") == [
        [1, "at [seven]"],
        [2, "by [seven]", "at [seven]"],
        [0],
        [1, "at [eight]"],
        [1, "by [seven]"],
        [0],
        [0],
        [0],
        [0],
    ]


def test_what_is_deleted_while_the_store_is_read_is_not_found(search: Node) -> None:
    assert search.call("Cases.races") == [0]


def test_thousands_of_messages_are_read_by_pages_and_the_newest_shown(search: Node) -> None:
    assert search.call("Cases.many", 5000) == [1, 5000, 100]


def test_an_excerpt_begins_a_little_before_the_first_hit(search: Node) -> None:
    assert search.call("Cases.excerpt") == [[41, False], [6, True], [114, False], [1, False]]


@on_engines("chromium")
def test_what_was_said_is_found_in_all_rooms_and_jumped_to(
    arrive: Arrive, relay: Relay, media: Media, engine: str
) -> None:
    ann = arrive(engine)
    make_room(ann, relay, "Pier")
    is_connected(ann)
    write(ann, "the ferry leaves at seven")
    hears(ann, "at seven")
    ann.upload(media["photo.jpg"])
    has_file(ann, "photo.jpg")
    fill_room(ann, 400)
    ann.click("button", "Rooms")
    make_room(ann, relay, "Quay")
    ann.click("button", "Search")
    box = ann.find("dialog", "Search")
    assert focused(ann) == "Words"
    box.find("textbox", "Words").fill("FERRY")
    hit = box.find("button", re.compile("Pier"))
    eventually(hit.count, "it is found")
    assert box.css("mark").text() == "ferry"
    hit.click()
    is_in(ann, "Pier")
    eventually(lambda: "at seven" in ann.js("document.activeElement.innerText"), "it has the focus")
    assert ann.js(
        "(({top, bottom}) => top > 0 && bottom < innerHeight)(document.activeElement.getBoundingClientRect())"
    )
    ann.click("button", "Search")
    box.find("textbox", "Words").fill("")
    choose(box, "Kind", "photo")
    box.find("button", re.compile(r"^photo\.jpg")).appears()
    box.find("textbox", "Words").fill("nowhere")
    box.find("status").says("Nothing found for “nowhere” on this device.")
    ann.press("Escape")
    eventually(lambda: focused(ann) == "Search", "the focus returns")


# ----------------------------------------------------------------------------------------------------------- alerts --

WATCHED_NOTES_SCRIPT = """(() => {
  const {Notification: Real} = window;
  window.told = [];
  window.asked = 0;
  window.Notification = class extends Real {
    constructor(title, options) { super(title, options); told.push([title, options.body]); }
    static async requestPermission() { window.asked += 1; return Real.permission; }
  };
})()"""
"""What the browser is asked to show. A page in a test always has the focus: that it is hidden is said by hand."""
HIDDEN_SCRIPT = """(() => {
  Object.defineProperty(document, 'hidden', {configurable: true, get: () => %s});
  document.dispatchEvent(new Event('visibilitychange'));
})()"""


@on_engines("chromium")
def test_who_looks_elsewhere_is_told_and_reads_words_only_if_they_chose_that(
    arrive: Arrive, relay: Relay, engine: str
) -> None:
    ann, bob = meet(arrive, relay, engine)
    assert isinstance(ann, PlaywrightUser)
    context = ann.context
    ann.do(lambda: context.grant_permissions(["notifications"]))
    ann.js(WATCHED_NOTES_SCRIPT)
    plain_icon = ann.js("document.querySelector('link[rel=icon]').href")
    settings = ann.find("dialog", "Settings")
    ann.click("button", "Settings")
    assert ann.js("asked") == 0, "the browser is asked by a button only"
    settings.find("button", "Turn on notifications").click()
    settings.find("button", "Turn off notifications").appears()
    for text, told in (("one", ["ZeroSecretRoom", "1 new message"]), ("two", ["Harbour", "Bob: two"])):
        ann.js(HIDDEN_SCRIPT % "true")
        write(bob, text)
        ann.wait("told.length")
        assert ann.js("told.splice(0)") == [told]
        ann.wait("document.title.startsWith('(1)')")
        assert ann.js("document.querySelector('link[rel=icon]').href") != plain_icon
        ann.js(HIDDEN_SCRIPT % "false")
        ann.wait("!document.title.startsWith('(')")
        assert ann.js("document.querySelector('link[rel=icon]').href") == plain_icon
        settings.find("checkbox", "Show names and text").click()
    settings.find("checkbox", "Mute this room").click()
    settings.find("button", "Close").click()
    ann.find("img", "Muted").appears()
    ann.js(HIDDEN_SCRIPT % "true")
    write(bob, "three")
    hears(ann, "three")
    assert (ann.js("told"), ann.js("document.title")) == ([], "Harbour · ZeroSecretRoom")
    ann.reload()
    ann.find("img", "Muted").appears()


def test_the_page_can_be_installed(lasting_relay: Relay) -> None:
    assert '<link rel="manifest" href="/app.webmanifest">' in page_text()
    reply = lasting_relay.get("/app.webmanifest")
    assert (reply.status, reply.fields["content-type"]) == (200, "application/manifest+json")
    manifest = json.loads(reply.body)
    assert (manifest["start_url"], manifest["display"]) == ("/", "standalone")
    icon = lasting_relay.get(manifest["icons"][0]["src"])
    assert (icon.status, icon.fields["content-type"]) == (200, manifest["icons"][0]["type"])
    assert icon.body.startswith(b"<svg ")


# --------------------------------------------------------------------------------------------------- the first minute --

CAMERA_SCRIPT = """(() => {
  window.BarcodeDetector = class {
    static async getSupportedFormats() { return ['qr_code']; }
    async detect() { return ['WIFI:S:cafe;;', window.code ?? ''].map((rawValue) => ({rawValue})); }
  };
  navigator.mediaDevices.getUserMedia = async () => {
    const seen = document.createElement('canvas'), stream = seen.captureStream();
    seen.getContext('2d').fillRect(0, 0, 9, 9);
    return stream;
  };
})()"""
"""A camera and a reader of codes: the browsers here have neither. What the reader sees, the test says."""


PASTE_SCRIPT = """((text) => {
  const paste = Object.assign(new Event('paste', {bubbles: true}), {clipboardData: {getData: () => text}});
  document.body.dispatchEvent(paste);
})(%s)"""


@on_engines("chromium")
def test_from_phone_to_laptop_in_two_steps(arrive: Arrive, relay: Relay, engine: str, tmp_path: Path) -> None:
    """One click shows the QR code; the other device scans it on its start page, and both are in."""
    laptop, phone = arrive(engine), arrive(engine, PHONE)
    laptop.goto(relay.url())
    laptop.click("button", "Only my own devices")
    made = laptop.find("dialog", "Link a device")
    link = eventually(made.find("textbox", "Device link").value, "a link is made")
    assert read_code(made.find("img", "QR code").shot(tmp_path / "code.png")) == [link]
    assert isinstance(phone, PlaywrightUser)
    phone.do(lambda: phone.context.add_init_script(CAMERA_SCRIPT))
    phone.goto(relay.url())
    phone.click("button", "Scan a QR code")
    phone.find("button", "Stop scanning").appears()
    phone.js(f"void (window.code = {json.dumps(link)})")
    phone.find("button", "Join").click()
    is_in(phone, "My devices")
    laptop.press("Escape")
    write(laptop, "across the table")
    hears(phone, "across the table")
    laptop.click("button", "Rooms")
    laptop.click("button", "Only my own devices")
    is_in(laptop, "My devices")
    laptop.find("dialog", "Link a device").find("img", "QR code").appears()
    assert laptop.css(".item").count() == 1, "the room is there already"


@on_engines("firefox")
def test_a_link_in_a_message_that_is_pasted_anywhere_on_the_start_page_joins(
    arrive: Arrive, relay: Relay, engine: str
) -> None:
    ann, bob = arrive(engine), arrive(engine, PHONE)
    make_room(ann, relay)
    link = make_link(ann)
    bob.goto(relay.url())
    bob.find("button", "New room").appears()
    assert bob.find("button", "Scan a QR code").count() == 0, "no button for what the browser cannot do"
    bob.js(PASTE_SCRIPT % json.dumps(f"Join my room {link}"))
    bob.find("heading", "You are invited").appears()


# ----------------------------------------------------------------------------------------------------------- speed --


@on_engines("chromium")
def test_who_has_never_been_here_need_not_wait_for_the_disk(arrive: Arrive, relay: Relay, engine: str) -> None:
    """A store that does not open delays nobody who has nothing in it; who has rooms sees no start without them."""
    ann = arrive(engine)
    assert isinstance(ann, PlaywrightUser)
    ann.do(lambda: ann.context.add_init_script("IDBFactory.prototype.open = () => new EventTarget()"))
    ann.goto(relay.url())
    ann.find("button", "New room").appears()
    ann.js("void localStorage.setItem('zsr-known', '')")
    ann.reload()
    assert not ann.js("document.getElementById('app').checkVisibility()")


def lighthouse(relay: Relay, folder: Path, *categories: str) -> dict[str, Any]:
    """The audit of the start page, with the browser of the system; its certificate is nobody's."""
    answer = folder / "lighthouse.json"
    command = [str(ROOT / ".ci/node_modules/.bin/lighthouse"), relay.url(), "--quiet", "--preset=desktop"]
    command += ["--output=json", f"--output-path={answer}", f"--only-categories={','.join(categories)}"]
    command += ["--chrome-flags=--headless=new --ignore-certificate-errors " + " ".join(CHROMIUM_ARGS)]
    with tempfile.TemporaryDirectory() as short:  # a socket lies in it, whose path must not be long
        environment = {**os.environ, "CHROME_PATH": program("chromium", "chromium-browser"), "TMPDIR": short}
        run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180)
    assert run.returncode == 0, run.stderr
    return dict(json.loads(answer.read_text("utf-8")))


@pytest.mark.browser
def test_lighthouse_finds_nothing_against_the_start_page(relay: Relay, tmp_path: Path) -> None:
    report = lighthouse(relay, tmp_path, "accessibility", "best-practices")
    wrong = [name for name, audit in report["audits"].items() if audit["score"] not in (None, 1)]
    assert {name: each["score"] for name, each in report["categories"].items()} == {
        "accessibility": 1,
        "best-practices": 1,
    }, wrong


# ======================================================================================================================
# Install: both installers, as text and for real. A Debian tree, made once and kept, is booted with systemd for each
# test: what the test writes lies in memory above the tree and is gone with it. The machine has a network of its own
# with an address that this one reaches, and no way to any other; packages lie in it at hand.
#
#   Site        what a download address serves: both files and both installers with pins of their own
#   Machine     a booted system: sh(script), install(...), get(path), stop(); freeze() makes it a layer for others
# ======================================================================================================================

UBUNTU, CENTOS7 = (ROOT / f"install_{name}.sh" for name in ("ubuntu", "centos7"))
BOTH_INSTALLERS = pytest.mark.parametrize("script", [UBUNTU, CENTOS7], ids=lambda path: path.stem)
SERVICE, STATE = "zerosecretroom.service", "/var/lib/zerosecretroom"
COMMON = "# ── from here to the end both installers are the same "


def functions(script: str) -> list[str]:
    return re.findall(r"^(\w+)\(\) ?\{", script, re.MULTILINE)


def called(function: str, *stubs: str, script: Path = UBUNTU) -> str:
    """What one function of an installer prints, with others replaced."""
    definitions = script.read_text(encoding="utf-8").rpartition("\n{ main")[0]
    program = "\n".join([definitions, "set_defaults", *stubs, function])
    return subprocess.run(["bash"], input=program, capture_output=True, text=True, check=True, timeout=60).stdout


def install_line(name: str) -> str:
    """The one line of README that installs with this script."""
    (line,) = re.findall(rf"^curl .*/{name} .*$", README.read_text(encoding="utf-8"), re.MULTILINE)
    return str(line)


def shell(script: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    """An installer on this machine, where it may look and must not change anything."""
    command = ["bash", str(script), *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)


# ------------------------------------------------------------------------------------------------------------ as text --


def test_both_installers_are_one_text_but_for_what_is_the_distributions_own() -> None:
    ubuntu, centos7 = (path.read_text(encoding="utf-8") for path in (UBUNTU, CENTOS7))
    own, common = ubuntu.split(COMMON)
    assert centos7.split(COMMON)[1] == common
    assert functions(ubuntu) == functions(centos7)
    assert functions(own) == functions(centos7.split(COMMON)[0])
    assert functions(ubuntu)[-1] == "main"
    assert common.endswith('\n}\n\n{ main "$@" </dev/null; }\n')


@BOTH_INSTALLERS
def test_the_pins_are_those_of_the_files(script: Path) -> None:
    told = shell(script, "--version").stdout
    assert told.splitlines()[0] == f"{script.name} {zsr.VERSION}"
    for path in (RELAY, PAGE):
        assert sha256(path.read_bytes()) in told, f"{script.name} pins another {path.name}: run bash .ci/pin"


def requirements() -> list[str]:
    """What an installer asks pip for."""
    return called('printf "%s\\n" "${REQUIREMENTS[@]}"').splitlines()


def test_the_installers_bring_what_the_relay_says_it_needs() -> None:
    needed: list[str] = json.loads(
        re.findall(r"^# dependencies = (.*)$", RELAY.read_text(encoding="utf-8"), re.MULTILINE)[0]
    )
    assert requirements() == needed


def test_pinning_anew_writes_both_installers(tmp_path: Path) -> None:
    for path in (RELAY, PAGE, UBUNTU, CENTOS7):
        shutil.copy(path, tmp_path)
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "pin", tmp_path / ".ci")
    changed = RELAY.read_text(encoding="utf-8").replace(f'VERSION = "{zsr.VERSION}"', 'VERSION = "9.8.7"')
    (tmp_path / RELAY.name).write_text(changed, encoding="utf-8")
    subprocess.run(["bash", str(tmp_path / ".ci" / "pin")], check=True, timeout=60)
    for path in (UBUNTU, CENTOS7):
        told = shell(tmp_path / path.name, "--version").stdout
        assert f"{path.name} 9.8.7" in told
        assert sha256(changed.encode()) in told
        assert sha256(PAGE.read_bytes()) in told


@BOTH_INSTALLERS
def test_a_download_cut_off_anywhere_runs_nothing(script: Path) -> None:
    """bash says with -x what it runs; the whole script says so as well, which shows that this can be seen."""

    def runs(text: str) -> list[str]:
        command = ["bash", "-x", "-s", "--", "--help"]
        done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=60)
        return [line for line in done.stderr.splitlines() if line.startswith("+")] + done.stdout.splitlines()

    whole = script.read_text(encoding="utf-8")
    assert len(runs(whole)) > 20
    ends = [match.end() for match in re.finditer("\n", whole)][:-1]
    if script == CENTOS7:  # from there on it is the text of the other
        ends = [end for end in ends if end < whole.index(COMMON)]
    ends += range(whole.rindex("{ main"), len(whole) - 2)
    with ThreadPoolExecutor(2) as pool:
        ran = dict(zip(ends, pool.map(lambda end: runs(whole[:end]), ends), strict=True))
    assert {end: lines for end, lines in ran.items() if lines} == {}


@BOTH_INSTALLERS
def test_readme_names_the_line_that_installs(script: Path) -> None:
    assert f"{called('echo $BASE', script=script).strip()}/{script.name}" in install_line(script.name)


@pytest.mark.filterwarnings("ignore:open_text is deprecated")  # how that package reads its list
@pytest.mark.parametrize("architecture", ["x86_64", "aarch64"])
def test_the_standalone_python_has_the_sum_that_others_know(architecture: str) -> None:
    """Its archive is too large to fetch in every run, but a package that installs such builds lists their sums."""
    asked = ['download() { echo "$1"; }', 'has_sha256() { echo "$2"; exit; }', "say() { :; }", "TMP=/nowhere"]
    url, pinned = called("get_standalone_python", *asked, f"uname() {{ echo {architecture}; }}").split()
    version = re.findall(r"/cpython-([\d.]+)", url)[0]
    assert get_download_link(version, architecture, "linux")[1] == (url, pinned)


@pytest.mark.parametrize("way", ["bash <(cat {0}) --dry-run", "cat {0} | bash -s -- --dry-run", "bash {0} --dry-run"])
def test_only_a_clone_takes_the_files_beside_it(way: str) -> None:
    told = as_program("bash", "-c", way.format(UBUNTU), cwd=ROOT)
    source = str(ROOT) if way.startswith("bash {0}") else called("echo $BASE").strip()
    assert f"zerosecretroom.py and index.html from {source}\n" in told


@BOTH_INSTALLERS
@pytest.mark.parametrize(
    ("arguments", "env", "complaint"),
    [
        (["--bogus"], {}, "unknown option --bogus"),
        (["extra"], {}, "unknown option extra"),
        (["--domain"], {}, "--domain needs a name"),
        (["--domain", "https://chat.example.org/"], {}, "'https://chat.example.org/' is no host name"),
        (["--domain=a b"], {}, "'a b' is no host name"),
        ([], {"ZSR_ACME": "yes"}, "ZSR_ACME is 'yes'"),
    ],
)
def test_what_an_installer_does_not_understand_it_says_in_one_line(
    script: Path, arguments: list[str], env: dict[str, str], complaint: str
) -> None:
    done = shell(script, *arguments, **env)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(f"error: {complaint}")
    assert done.stderr.count("\n") == 1


@BOTH_INSTALLERS
def test_help_lists_the_options_and_the_variables(script: Path) -> None:
    text = script.read_text(encoding="utf-8")
    told = shell(script, "--help").stdout
    assert set(re.findall(r"^ +(--[a-z-]+)", told, re.MULTILINE)) == {
        *("--help", "--dry-run", "--uninstall", "--version", "--acme", "--domain")
    }
    read = set(re.findall(r"\$\{(ZSR_[A-Z_0-9]+)", text)) - {"ZSR_PURGE"}
    assert read <= set(re.findall(r"\bZSR_[A-Z_0-9]+", told))


def test_a_dry_run_says_what_would_be_done() -> None:
    told = shell(
        UBUNTU, "--dry-run", "--domain", "chat.example.org", "--acme", ZSR_PORT="8443", PATH=os.environ["PATH"]
    )
    assert told.returncode == 0, told.stderr
    assert "nothing was changed" in told.stdout
    for what in (f"from {ROOT}", "port 8443", "trusted, for chat.example.org"):
        assert what in told.stdout


def test_the_settings_file_offers_every_option_that_is_left_to_the_operator() -> None:
    installed = {"page", "state-dir", "host", "plain"}  # as the installer has them: TLS on a socket from systemd
    commands = {"help", "version", "status"}
    parser = zsr.make_parser({})
    options = {name[2:] for action in parser._actions for name in action.option_strings if name.startswith("--")}
    offered = re.findall(r"^#ZSR_([A-Z_]+)=", called("print_settings"), re.MULTILINE)
    assert {name.lower().replace("_", "-") for name in offered} == options - installed - commands


@pytest.mark.parametrize(
    ("has", "public", "private"),
    [
        ("198.51.100.7 10.0.0.5", "198.51.100.7", "10.0.0.5"),
        ("192.168.1.9 172.17.0.1", "", "192.168.1.9,172.17.0.1"),
        ("172.32.0.1 100.128.0.1", "172.32.0.1,100.128.0.1", ""),
        ("100.64.0.1 169.254.1.1", "", "100.64.0.1,169.254.1.1"),
        ("198.51.100.7 2001:db8::7", "198.51.100.7,2001:db8::7", ""),
        ("2001:db8::7 fd00::1", "2001:db8::7", "fd00::1"),
        ("10.0.0.5 2001:db8::7", "", "2001:db8::7,10.0.0.5"),
        ("", "", ""),
    ],
)
def test_an_address_counts_as_public_only_if_people_can_use_it(has: str, public: str, private: str) -> None:
    """With a private IPv4 address alone the machine is behind NAT: people come by an address that it does not know."""
    stub = f"hostname() {{ echo '{has}'; }}"
    assert called("own_addresses public", stub) == public
    assert called("own_addresses private", stub) == private


# Directives of systemd.service, .exec, .unit, .socket, .kill and .resource-control of version 219, as far as used.
SYSTEMD_219 = set(
    re.findall(
        r"\w+",
        """
    Description Documentation Requires After Type User Group EnvironmentFile Environment ExecStart ExecReload Restart
    RestartSec TimeoutStartSec TimeoutStopSec SyslogIdentifier UMask LimitNOFILE LimitCORE OOMScoreAdjust
    NoNewPrivileges CapabilityBoundingSet PrivateTmp PrivateDevices PrivateNetwork RestrictAddressFamilies
    SystemCallArchitectures SystemCallFilter SystemCallErrorNumber MemoryLimit ProtectSystem ProtectHome
    ReadOnlyDirectories ReadWriteDirectories InaccessibleDirectories WantedBy ListenStream Backlog KeepAlive
    """,
    )
)


@pytest.mark.parametrize("unit", ["print_socket", "print_service"])
def test_the_units_for_systemd_219_use_only_what_it_knows(unit: str) -> None:
    old = called(unit, "PORT=443", "systemd_version() { echo 219; }")
    assert set(re.findall(r"^(\w+)=", old, re.MULTILINE)) - SYSTEMD_219 == set()
    assert re.findall(r"^ProtectSystem=(.*)", old, re.MULTILINE) in ([], ["full"])


# ----------------------------------------------------------------------------------------------------------- for real --

TREE_PACKAGES = "apt,systemd,systemd-sysv,dbus,python3,curl,ca-certificates,iproute2"
LATER_PACKAGES = "python3-venv qrencode"
"""What the installer asks apt for: the archives lie in the tree, not yet installed."""


def as_program(*command: str, **options: Any) -> str:
    told: str = subprocess.run(command, check=True, capture_output=True, text=True, **options).stdout
    return told


WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))


@contextmanager
def one_at_a_time() -> Iterator[None]:
    """Other workers wait at the same place."""
    folder = ROOT / ".ci" / "out"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "machines.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def kept(folder: Path, stamp: str, make: Callable[[Path], None]) -> Path:
    """A folder that is made anew only when what is asked for changes."""
    said = folder.with_name(f"{folder.name}.stamp")
    with one_at_a_time():
        if not said.exists() or said.read_text() != stamp:
            said.unlink(missing_ok=True)
            shutil.rmtree(folder, ignore_errors=True)
            make(folder)
            said.write_text(stamp)
    return folder


@dataclass(frozen=True)
class Release:
    """A distribution's release: what mmdebstrap knows of it, and the Python (X.Y) it brings if that suffices."""

    suite: str
    python: str = ""
    options: tuple[str, ...] = ()
    more: str = ""
    unified: bool = False  # its systemd knows control groups of version 2 only
    early: str = "true"  # what is to be done before its packages are set up

    def make_tree(self, folder: Path) -> None:
        later = f'chroot "$1" apt-get clean; chroot "$1" apt-get install -qq --download-only -y {LATER_PACKAGES}'
        command = ["mmdebstrap", "--quiet", "--variant=minbase", "--skip=cleanup/apt", *self.options]
        command += [f"--include={TREE_PACKAGES}{self.more}", "--aptopt=Apt::Install-Recommends false"]
        offline = """--customize-hook=echo 'Acquire::Retries "0";' >"$1/etc/apt/apt.conf.d/99offline\""""
        hooks = [f"--extract-hook={self.early}", f"--customize-hook={later}", offline]
        as_program(*command, *hooks, self.suite, str(folder), timeout=PATIENCE * 20)


BOOKWORM = Release("bookworm", "3.11", more=",pebble")
WALLED = Release("bookworm", "3.11", more=",ufw,firewalld")


def make_wheels(folder: Path, python: str, requirements: list[str]) -> None:
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    only = ["--only-binary=:all:", f"--python-version={python}"]
    as_program(*pip, *only, f"--dest={folder}", *requirements, timeout=PATIENCE * 10)


class Site:
    """A folder that a machine downloads from. publish() puts both files there, and installers that pin them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True)
        shutil.copytree(ROOT / ".ci", folder / ".ci", ignore=lambda at, names: set(names) - {"pin"})
        self.publish()

    def publish(self, program: str | None = None, page: str | None = None) -> None:
        for path, text in ((RELAY, program), (PAGE, page)):
            (self.folder / path.name).write_text(text or path.read_text(encoding="utf-8"), encoding="utf-8")
        for path in (UBUNTU, CENTOS7):
            shutil.copy(path, self.folder)
        as_program("bash", str(self.folder / ".ci" / "pin"))


def memory_limit(name: str) -> Path | None:
    """Where the limit of a new control group for memory stands, of version 1 or 2; None where the kernel gives none."""
    for root, limit in (("memory", "memory.limit_in_bytes"), ("", "memory.max")):
        group = Path("/sys/fs/cgroup") / root / name
        with contextlib.suppress(OSError):
            group.mkdir()
            if (group / limit).exists():
                return group / limit
            group.rmdir()
    return None


class Machine:
    """A booted Debian or Ubuntu. `layers` lie below what it writes, the topmost first."""

    count = 0

    def __init__(
        self, folder: Path, layers: list[Path], wheels: Path | None = None, memory: int = 0, unified: bool = False
    ) -> None:
        """`wheels` is what its pip knows instead of an index, `memory` how many bytes it has (0: as many as there are),
        `unified` whether its control groups are of version 2 though the kernel's are not."""
        Machine.count += 1
        self.folder, self.layers, self.wheels = folder, layers, wheels or WHEELS
        self.unified = unified
        self.name = f"z{os.getpid() % 100000}n{Machine.count}"
        self.limit = memory_limit(self.name) if memory else None
        if self.limit:
            self.limit.write_text(str(memory))
        self.upper, self.root, self.site = folder / "upper", folder / "root", Site(folder / "site")

    def start(self) -> Machine:
        for each in (self.upper, self.folder / "work", self.root):
            each.mkdir()
        lower = ":".join(map(str, self.layers))
        options = f"lowerdir={lower},upperdir={self.upper},workdir={self.folder / 'work'}"
        as_program("mount", "-t", "overlay", "overlay", "-o", options, str(self.root))
        self.boot()
        return self

    def boot(self) -> None:
        """Returns when its services run."""
        enter = ["sh", "-c", f'echo $$ >{self.limit.parent}/cgroup.procs && exec "$@"', "sh"] if self.limit else []
        command = [*enter, "systemd-nspawn", "-q", "-D", str(self.root), "-M", self.name]
        command += ["--register=no", "--keep-unit"]
        command += ["--network-veth", "--kill-signal=SIGRTMIN+3", "--resolv-conf=off", "--timezone=off"]
        command += [f"--bind-ro={self.site.folder}:/srv/site", f"--bind-ro={self.wheels}:/srv/wheels", "--boot"]
        env = os.environ | ({"SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1"} if self.unified else {})
        with open(self.folder / "console", "ab") as console:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=console, stderr=console, start_new_session=True, env=env
            )
        eventually(self.is_up, f"{self.name} is up")
        with one_at_a_time():
            taken = as_program("ip", "addr")
            own = range(16 * (WORKER % 16), 256, 4)  # a worker's machines are all at one address: their relay knows it
            third = next(each for each in own if f"198.51.100.{each + 1}/" not in taken)
            self.address = f"198.51.100.{third + 2}"
            as_program("ip", "addr", "add", f"198.51.100.{third + 1}/30", "dev", f"ve-{self.name}")
        as_program("ip", "link", "set", f"ve-{self.name}", "addrgenmode", "none", "up")  # no second address later
        self.sh(f"ip addr add {self.address}/30 dev host0 && ip link set host0 up")
        self.sh("printf '[global]\\nno-index = true\\nfind-links = /srv/wheels\\n' >/etc/pip.conf")
        serve = "cd /srv/site && exec python3 -m http.server -b 127.0.0.1 8000"
        self.sh(f"systemd-run -q --unit=site sh -c '{serve}'")
        eventually(
            lambda: self.run("curl", "-fso", "/dev/null", f"{SITE}/index.html").returncode == 0, "the site answers"
        )

    @property
    def leader(self) -> str:
        """Process id of the machine's systemd."""
        if self.process.poll() is not None:
            raise RuntimeError((self.folder / "console").read_text(errors="replace"))
        return Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()[0]

    def is_up(self) -> bool:
        with contextlib.suppress(IndexError):
            return self.run("systemctl", "is-system-running").stdout.strip() in ("running", "degraded")
        return False

    def run(self, *command: str, **env: str) -> subprocess.CompletedProcess[str]:
        inside = ["nsenter", "-t", self.leader, "-m", "-u", "-i", "-n", "-p", "-C", "-r", "-w"]
        clean = ["env", "-i", "PATH=/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "TERM=dumb"]
        settings = [f"{name}={value}" for name, value in env.items()]
        return subprocess.run(
            [*inside, *clean, *settings, *command],
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=200,
        )

    def sh(self, script: str, **env: str) -> str:
        """What a script prints that has to succeed."""
        done = self.run("bash", "-c", f"set -eu -o pipefail; {script}", **env)
        assert done.returncode == 0, f"{script}: {done.stdout}{done.stderr}"
        return done.stdout

    def install(self, *arguments: str, script: str = UBUNTU.name, **env: str) -> subprocess.CompletedProcess[str]:
        """By the line of README, with this machine's own address in it and arguments behind it."""
        line = install_line(script).replace(called("echo $BASE").strip(), SITE)
        pipe = line.removesuffix("sudo bash") + f"bash -s -- {' '.join(arguments)}"
        return self.run("bash", "-c", f"set -o pipefail; {pipe}", **({"ZSR_BASE": SITE} | env))

    def releases(self) -> list[str]:
        return self.sh("ls /opt/zerosecretroom/releases").split()

    def current(self) -> str:
        return self.sh("basename $(readlink -f /opt/zerosecretroom/current)").strip()

    def page_hash(self, port: int = 443) -> str:
        """SHA-256 of the page that is served."""
        return self.sh(f"curl -ksf https://127.0.0.1:{port}/ | sha256sum")[:64]

    def stop(self) -> None:
        """Pulls the plug: an orderly shutdown may wait for minutes, and what is written stays written."""
        if self.process.poll() is None:
            os.kill(int(self.leader), signal.SIGKILL)
            self.process.wait(PATIENCE)
        as_program("umount", str(self.root))
        if self.limit:
            self.limit.parent.rmdir()

    def freeze(self) -> list[Path]:
        """Stopped for good; what it has become is a layer for others."""
        self.stop()
        return [self.upper, *self.layers]


SITE = "http://127.0.0.1:8000"
WHEELS = ROOT / ".ci" / "out" / "wheels"


def why_no_machine() -> str:
    """What stands against booting a system here; empty if nothing does."""
    if os.geteuid() != 0:
        return "booting a container needs root"
    tried = subprocess.run(["unshare", "-mpf", "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True, text=True)
    return tried.stderr.strip()


def tree_of(release: Release) -> Path:
    """A bare system of that release, with the archives of what the installer asks for."""
    stamp = f"{release.suite} {release.options} {TREE_PACKAGES}{release.more} {LATER_PACKAGES}"
    return kept(WHEELS.with_name(release.suite + release.more.replace(",", "-")), stamp, release.make_tree)


@pytest.fixture(scope="session")
def layers() -> list[Path]:
    """The bare tree. It is made anew, with the wheels, when what it is made of changes."""
    if reason := why_no_machine():
        pytest.skip(f"INSTALLERS NOT TRIED: {reason}")
    asked = [*requirements(), called('echo "$CERTBOT"').strip()]
    kept(WHEELS, f"{BOOKWORM.python} {asked}", lambda folder: make_wheels(folder, BOOKWORM.python, asked))
    return [tree_of(BOOKWORM)]


@pytest.fixture(scope="session")
def memory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder in memory, where overlays lie."""
    folder = tmp_path_factory.mktemp("machines")
    as_program("mount", "-t", "tmpfs", "tmpfs", str(folder))
    yield folder
    as_program("umount", "--lazy", str(folder))


Boot = Callable[[list[Path]], Machine]


@pytest.fixture
def boot(memory: Path) -> Iterator[Boot]:
    started: list[Machine] = []

    def one(below: list[Path]) -> Machine:
        folder = memory / f"{Machine.count}"
        folder.mkdir()
        started.append(Machine(folder, below).start())
        return started[-1]

    yield one
    for machine in started:
        if machine.process.poll() is None:
            machine.stop()


@dataclass(frozen=True)
class Installed:
    """What a fresh machine became by the line of README."""

    layers: list[Path]
    told: str
    address: str
    seconds: float
    limited: bool


@pytest.fixture(scope="session")
def installed(memory: Path, layers: list[Path]) -> Installed:
    (folder := memory / "installed").mkdir()
    machine = Machine(folder, layers, memory=512 << 20).start()
    begun = time.monotonic()
    done = machine.install()
    seconds = time.monotonic() - begun
    assert done.returncode == 0, done.stdout + done.stderr
    return Installed(machine.freeze(), done.stdout, machine.address, seconds, limited=machine.limit is not None)


@pytest.fixture(scope="session")
def emptied(memory: Path, installed: Installed) -> list[Path]:
    """A machine with the packages that the installer asks for, and without anything else of it."""
    (folder := memory / "emptied").mkdir()
    machine = Machine(folder, installed.layers).start()
    assert machine.install("--uninstall", ZSR_PURGE="1").returncode == 0
    return machine.freeze()


def on_a_machine(test: Callable[..., None]) -> Callable[..., None]:
    marked: Callable[..., None] = pytest.mark.install(test)
    return marked


def decode(terminal: str) -> list[str]:
    """The QR codes in what a terminal shows: each character is two cells, one above the other."""
    rows = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in terminal.splitlines() if re.search("[▀▄█]", line)]
    width = max(map(len, rows))
    cells = [[" ▀".find(c) > 0 or c == "█" for c in row.ljust(width)] for row in rows]
    below = [[" ▄".find(c) > 0 or c == "█" for c in row.ljust(width)] for row in rows]
    lines = [line for pair in zip(cells, below, strict=True) for line in pair]
    picture = Image.new("L", (width, len(lines)), 0)
    picture.putdata([255 if cell else 0 for line in lines for cell in line])
    return [code.text for code in zxingcpp.read_barcodes(picture.resize((width * 8, len(lines) * 8)))]


@on_a_machine
def test_one_line_installs_it_and_says_where_it_is(installed: Installed, boot: Boot) -> None:
    assert f"  open         https://{installed.address}/\n" in installed.told
    assert decode(installed.told) == [f"https://{installed.address}/"]
    assert f"  page         SHA-256 {sha256(PAGE.read_bytes())}\n" in installed.told
    machine = boot(installed.layers)
    assert machine.sh("curl -ksf https://127.0.0.1/healthz") == "ok\n"
    certificate = shown_at(machine.address, 443)
    assert f"  certificate  SHA-256 {zsr.fingerprint(certificate)}\n" in installed.told
    assert installed.address in zsr.certificate_names(certificate)
    assert machine.sh("cat /etc/zerosecretroom.env").count("\nZSR_") == 3


def disk_of(*folders: Path) -> int:
    """Bytes that these take."""
    told = as_program("du", "-sx", "--block-size=1", *map(str, folders))
    return sum(int(line.split()[0]) for line in told.splitlines())


@on_a_machine
def test_half_a_gigabyte_of_memory_and_one_of_disk_suffice(installed: Installed) -> None:
    """The machine was installed within a control group of 512 MB, the disk it writes to included."""
    assert disk_of(*installed.layers) < 1 << 30
    if not installed.limited:
        pytest.skip("MEMORY NOT LIMITED: this kernel lets no control group count memory")


def exposure(machine: Machine) -> float:
    """What systemd makes of the service's unit, from 0 to 10."""
    told = machine.sh(f"systemd-analyze security --no-pager {SERVICE}")
    print(told)
    return float(re.findall(r"Overall exposure level for \S+: ([\d.]+)", told)[0])


@on_a_machine
def test_the_service_is_shut_in(installed: Installed, boot: Boot) -> None:
    machine = boot(installed.layers)
    units = "/etc/systemd/system/zerosecretroom.socket /etc/systemd/system/zerosecretroom.service"
    assert machine.run("systemd-analyze", "verify", *units.split()).stderr == ""
    assert exposure(machine) <= 0.5
    machine.sh(f"systemctl start {SERVICE}")
    pid = machine.sh(f"systemctl show -p MainPID --value {SERVICE}").strip()
    assert machine.sh(f"stat -c %U /proc/{pid}") == "zerosecretroom\n"
    assert machine.sh(f"stat -c '%a %U' {STATE} {STATE}/*").split("\n")[:-1] == [
        "700 zerosecretroom",
        *["600 zerosecretroom"] * 3,
    ]
    old = called("print_service", "PORT=443", "systemd_version() { echo 219; }")
    (machine.site.folder / "old.service").write_text(old)
    machine.sh(f"cp /srv/site/old.service /etc/systemd/system/{SERVICE}")
    machine.sh(f"systemctl daemon-reload && systemctl restart {SERVICE} && curl -ksf https://127.0.0.1/healthz")


@pytest.mark.browser
@on_a_machine
def test_people_chat_before_and_after_an_upgrade_and_nobody_is_refused(
    installed: Installed, boot: Boot, arrive: Arrive, relay: Relay, capsys: pytest.CaptureFixture[str]
) -> None:
    """The upgrade is by README's other line. Packages being at hand, the time from the pipe to a message is printed."""
    machine = boot(installed.layers)
    begun = time.monotonic()
    ann, bob = arrive("chromium"), arrive("chromium", PHONE)
    ann.goto(f"https://{machine.address}/")
    ann.click("button", "New room")
    make_room(ann, relay)
    join_by(bob, make_link(ann), "Bob")
    write(ann, "before the upgrade")
    hears(bob, "before the upgrade")
    seconds = installed.seconds + time.monotonic() - begun
    with capsys.disabled():
        print(f"\nfrom the pipe to the first message: {seconds:.0f} s, of which {installed.seconds:.0f} s install")
    is_delivered(ann, "before the upgrade")
    for user in (ann, bob):
        user.excuse()
    ask = "curl -kso /dev/null https://127.0.0.1/healthz || echo $? >>/tmp/faults; sleep 0.1"
    machine.sh(f"systemd-run -q --unit=asking bash -c 'while [ ! -e /tmp/enough ]; do {ask}; done'")
    before = machine.current()
    machine.site.publish(page=PAGE.read_text(encoding="utf-8") + "<!-- a newer page -->\n")
    machine.sh(f"bash <(curl -L -s {SITE}/{UBUNTU.name})", ZSR_BASE=SITE)
    machine.sh("touch /tmp/enough")
    eventually(lambda: machine.run("systemctl", "is-active", "asking").returncode != 0, "the last question is answered")
    refused = "7"
    assert refused not in machine.sh("touch /tmp/faults && cat /tmp/faults").split()
    assert sorted(machine.releases()) == sorted([before, machine.current()])
    assert before != machine.current()
    assert machine.page_hash() == sha256((machine.site.folder / PAGE.name).read_bytes())
    is_connected(bob)
    write(bob, "after the upgrade")
    hears(ann, "after the upgrade")
    is_delivered(bob, "after the upgrade")


@on_a_machine
def test_what_is_not_what_it_should_be_leaves_the_old_one_running(installed: Installed, boot: Boot) -> None:
    """A changed download; a release that does not start, with other settings: each time all is as before."""
    machine = boot(installed.layers)
    before, settings = machine.current(), machine.sh("cat /etc/zerosecretroom.env")

    def is_as_before() -> bool:
        assert machine.current() == before
        assert machine.releases() == [before]
        assert machine.sh("cat /etc/zerosecretroom.env") == settings
        return machine.page_hash() == sha256(PAGE.read_bytes())

    with open(machine.site.folder / PAGE.name, "a") as page:
        page.write("<!-- somebody else's -->")
    done = machine.install()
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "index.html from http://127.0.0.1:8000 has another SHA-256" in done.stderr
    assert is_as_before()

    starts = "    page = Page.load(options.page)"
    machine.site.publish(program=RELAY.read_text(encoding="utf-8").replace(starts, "    raise SystemExit('no')"))
    done = machine.install(ZSR_PORT="444", ZSR_TTL="1h")
    assert done.returncode == 1
    assert "the new release does not start" in done.stderr
    assert done.stderr.endswith(f"back to the release before, {before}, which runs\n")
    assert is_as_before()


@on_a_machine
def test_a_first_release_that_does_not_start_leaves_nothing(emptied: list[Path], boot: Boot) -> None:
    machine = boot(emptied)
    machine.sh("systemd-run -q --unit=other python3 -m http.server 443")
    eventually(lambda: machine.run("curl", "-so/dev/null", "http://127.0.0.1:443/").returncode == 0, "443 is taken")
    done = machine.install()
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert done.stderr.startswith("error: port 443 is taken by another program")
    done = machine.install(ZSR_PORT="8443", ZSR_BASE="http://127.0.0.1:1")
    assert (done.returncode, done.stderr.splitlines()[-1][:6]) == (1, "error:")
    assert "cannot be downloaded: is this machine online" in done.stderr
    assert machine.run("test", "-e", "/opt/zerosecretroom").returncode == 1
    assert machine.run("id", "zerosecretroom").returncode == 1
    done = machine.install(ZSR_PORT="8443", PIP_FIND_LINKS="/nowhere")
    assert done.returncode == 1
    assert "Python packages cannot be installed" in done.stderr.splitlines()[-1]
    assert machine.releases() == []
    done = machine.install(ZSR_PORT="8443", ZSR_TTL="soon")
    assert done.returncode == 1
    assert "this was the first release, so the service is gone again" in done.stderr
    left = "/opt/zerosecretroom/current /etc/zerosecretroom.env /etc/systemd/system/zerosecretroom.*"
    assert machine.sh(f"ls -d {left} 2>/dev/null || true") == ""
    assert machine.releases() == []


@on_a_machine
def test_uninstalling_keeps_the_keys_unless_told_to_purge(installed: Installed, boot: Boot) -> None:
    """Also: another port by a second run, and an active firewall, whose command is a stub that writes down its calls."""
    machine = boot(installed.layers)
    keys = machine.sh(f"sha256sum {STATE}/*.pem")
    ufw = 'echo "$@" >>/tmp/ufw; [ "$1" = status ] || exit 0; echo "Status: active"; exec seq 30000'  # a long answer
    machine.sh(f"printf '#!/bin/sh\\n%s\\n' '{ufw}' >/usr/local/bin/ufw && chmod +x /usr/local/bin/ufw")
    done = machine.install(ZSR_PORT="8443")
    assert done.returncode == 0, done.stderr
    assert f"https://{installed.address}:8443/" in done.stdout
    assert "allow 8443/tcp" in machine.sh("cat /tmp/ufw")
    assert machine.page_hash(8443) == sha256(PAGE.read_bytes())
    assert machine.run("curl", "-ks", "https://127.0.0.1/").returncode != 0
    assert machine.install("--uninstall").returncode == 0
    assert "delete allow 8443/tcp" in machine.sh("cat /tmp/ufw")
    gone = "/opt/zerosecretroom /etc/systemd/system/zerosecretroom* /etc/systemd/system/*/zerosecretroom*"
    assert machine.sh(f"ls -d {gone} 2>/dev/null || true") == ""
    assert machine.run("curl", "-ks", "https://127.0.0.1:8443/").returncode != 0
    assert machine.sh(f"sha256sum {STATE}/*.pem") == keys
    assert machine.install("--uninstall", ZSR_PURGE="1").returncode == 0
    kept_files = f"{STATE}* /etc/zerosecretroom*"
    assert machine.sh(f"ls -d {kept_files} 2>/dev/null || true") == ""
    assert machine.run("id", "zerosecretroom").returncode == 1


@on_a_machine
def test_a_clone_installs_its_own_files_and_a_moved_server_keeps_its_keys(
    installed: Installed, emptied: list[Path], boot: Boot
) -> None:
    """Without any way to download; the keys were copied by root, as from a backup."""
    machine = boot(emptied)
    machine.sh("cp -r /srv/site /root/clone && echo >>/root/clone/index.html && systemctl stop site")
    done = machine.run("bash", "/root/clone/install_ubuntu.sh")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "/root/clone/index.html is not the one install_ubuntu.sh knows" in done.stderr
    machine.sh(f"mkdir {STATE}")
    for name in (zsr.TLS_KEY, zsr.IDENTITY_KEY):
        shutil.copy(installed.layers[0] / STATE[1:] / name, machine.root / STATE[1:])
    done = machine.run("bash", "/root/clone/install_ubuntu.sh", ZSR_OWN_FILES="1", ZSR_NAME="chat.example.org")
    assert done.returncode == 0, done.stderr
    assert "open         https://chat.example.org/" in done.stdout
    assert machine.page_hash() == sha256(PAGE.read_bytes() + b"\n")
    for name in (zsr.TLS_KEY, zsr.IDENTITY_KEY):
        same = [(top / STATE[1:] / name).read_bytes() for top in (installed.layers[0], machine.upper)]
        assert same[0] == same[1]


@on_a_machine
def test_the_other_installer_brings_a_python_of_its_own(emptied: list[Path], boot: Boot) -> None:
    """install_centos7.sh with an old Python, systemd 219's units and firewalld. Limit: this is Debian with yum, rpm's
    Python and firewall-cmd replaced by stubs, and the standalone Python is Debian's in an archive of the same shape;
    neither systemd 219 itself nor SELinux has been met."""
    machine = boot(emptied)
    stubs = {
        "python3": 'echo "Python 3.6.8"; exit 1',
        "yum": "echo 'Could not resolve host'; exit 1",
        "firewall-cmd": 'echo "$@" >>/tmp/firewalld; [ "$2" != --query-port=443/tcp ]',
        "hostname": "echo 10.0.0.7",
    }
    for name, body in stubs.items():
        (machine.site.folder / name).write_text(f"#!/bin/sh\n{body}\n")
        machine.sh(f"install -m 755 /srv/site/{name} /usr/local/bin/{name}")
    hide = "mv /usr/bin/python3.11 /tmp/python/bin/python3"
    machine.sh(f"rm /usr/bin/qrencode; mkdir -p /tmp/python/bin; {hide}")
    machine.sh("tar -czf /root/python.tar.gz -C /tmp python")
    bring = {"ZSR_PYTHON_URL": f"{SITE}/python.tar.gz", "script": CENTOS7.name}
    shutil.copy(machine.root / "root" / "python.tar.gz", machine.site.folder)
    refused = machine.install(**bring)
    assert refused.returncode == 1
    assert refused.stderr.splitlines()[-1].startswith("error: set ZSR_PYTHON_SHA256 to the SHA-256 of ")
    refused = machine.install(ZSR_PYTHON_SHA256="0" * 64, **bring)
    assert refused.returncode == 1
    assert "python.tar.gz has another SHA-256 than expected" in refused.stderr.splitlines()[-1]
    known = sha256((machine.site.folder / "python.tar.gz").read_bytes())
    done = machine.install(ZSR_PYTHON_SHA256=known, **bring)
    assert done.returncode == 0, done.stdout + done.stderr
    assert machine.sh("curl -ksf https://127.0.0.1/healthz") == "ok\n"
    assert f"/opt/zerosecretroom/python/{known[:12]}" in machine.sh("cat /opt/zerosecretroom/current/venv/pyvenv.cfg")
    assert "--permanent --add-port=443/tcp" in machine.sh("cat /tmp/firewalld")
    assert "open         https://10.0.0.7/" in done.stdout
    assert "put the public address into ZSR_NAME" in done.stdout
    assert "QR code      not shown" in done.stdout
    again = machine.install(ZSR_PYTHON_SHA256=known, **bring)
    assert again.returncode == 0, again.stderr
    assert "fetching a standalone one" not in again.stdout


SIGN_IN = 'for each in auth account; do echo "$each required pam_permit.so" >"$1/etc/pam.d/common-$each"; done'
"""systemd 229 changes its users before anybody may sign in."""


def ubuntu(suite: str, python: str = "", unified: bool = False, early: str = "true") -> Release:
    keyring = os.environ.get("ZSR_UBUNTU_KEYRING", "/usr/share/keyrings/ubuntu-archive-keyring.gpg")
    return Release(suite, python, ("--components=main,universe", f"--keyring={keyring}"), unified=unified, early=early)


RELEASES = [
    Release("bullseye"),
    Release("trixie", "3.13"),
    ubuntu("xenial", early=SIGN_IN),
    ubuntu("bionic"),
    ubuntu("focal"),
    ubuntu("jammy", "3.10"),
    ubuntu("noble", "3.12"),
    ubuntu("resolute", "3.14", unified=True),
]

CARRIED_PYTHON = """#!/bin/sh
here=$(dirname "$(dirname "$(readlink -f "$0")")")
exec "$here/lib/ld.so" --argv0 "$0" --library-path "$here/lib" "$here/bin/python3.11" "$@"
"""


def carry_python(tree: Path, archive: Path) -> None:
    """An archive of the shape of a standalone Python: that of a tree, with its own libraries and their loader."""
    folder = archive.with_suffix("") / "python"
    modules = folder / "lib" / "python3.11"
    (folder / "bin").mkdir(parents=True)
    shutil.copytree(tree / "usr" / "lib" / "python3.11", modules, symlinks=True)
    for package in ("python3.11-venv_*", "python3-pip-whl_*", "python3-setuptools-whl_*"):
        (found,) = (tree / "var" / "cache" / "apt" / "archives").glob(f"{package}.deb")
        as_program("dpkg-deb", "-x", str(found), str(folder.parent / "deb"))
    shutil.copytree(folder.parent / "deb" / "usr" / "lib" / "python3.11", modules, dirs_exist_ok=True)
    shutil.copytree(folder.parent / "deb" / "usr" / "share" / "python-wheels", modules / "ensurepip" / "wheels")
    start = modules / "ensurepip" / "__init__.py"
    own = "os.path.join(os.path.dirname(__file__), 'wheels')"
    start.write_text(start.read_text().replace("sysconfig.get_config_var('WHEEL_PKG_DIR')", own))
    shutil.copy(tree / "usr" / "bin" / "python3.11", folder / "bin")
    for library in (tree / "usr" / "lib" / "x86_64-linux-gnu").glob("lib*.so.*"):
        if library.is_file():
            shutil.copy(library, folder / "lib")
    shutil.copy(tree / "lib64" / "ld-linux-x86-64.so.2", folder / "lib" / "ld.so")
    (folder / "bin" / "python3").write_text(CARRIED_PYTHON)
    (folder / "bin" / "python3").chmod(0o755)
    as_program("tar", "-czf", str(archive), "-C", str(folder.parent), "python")


@pytest.mark.distributions
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("release", RELEASES, ids=lambda release: release.suite)
def test_it_runs_on_every_release_it_names(release: Release, layers: list[Path], memory: Path) -> None:
    """Install by pipe, second run, uninstall; for Ubuntu ZSR_UBUNTU_KEYRING says where its archive's keys lie. Limit:
    where a standalone Python is fetched, it is Debian's with its libraries, in an archive of the same shape."""
    python = release.python or BOOKWORM.python
    asked = requirements()
    wheels = kept(
        WHEELS.with_name(f"wheels-{python}"),
        f"{asked} +",
        lambda at: make_wheels(at, python, [*asked, "pip", "typing-extensions"]),
    )
    (folder := memory / release.suite).mkdir()
    machine = Machine(folder, [tree_of(release)], wheels, 512 << 20, release.unified).start()
    try:
        bring: dict[str, str] = {}
        if not release.python:
            archive = machine.site.folder / "python.tar.gz"
            carry_python(layers[0], archive)
            bring = {"ZSR_PYTHON_URL": f"{SITE}/{archive.name}", "ZSR_PYTHON_SHA256": sha256(archive.read_bytes())}
        done = machine.install(**bring)
        assert done.returncode == 0, done.stdout + done.stderr
        assert f"  open         https://{machine.address}/\n" in done.stdout
        assert decode(done.stdout) == [f"https://{machine.address}/"]
        assert ("fetching a standalone one" in done.stdout) is bool(bring)
        assert machine.sh("curl -ksf https://127.0.0.1/healthz") == "ok\n"
        again = machine.install(**bring)
        assert again.returncode == 0, again.stdout + again.stderr
        assert machine.page_hash() == sha256(PAGE.read_bytes())
        if machine.sh("systemctl --version").split()[1] >= "247":
            assert exposure(machine) <= 0.5
        assert disk_of(*machine.layers, machine.upper) < 1 << 30
        assert machine.install("--uninstall", ZSR_PURGE="1").returncode == 0
        assert machine.run("curl", "-ksf", "https://127.0.0.1/healthz").returncode == 7
    finally:
        machine.stop()


def lets_in(machine: Machine, port: int) -> bool:
    """Whether one who is not on the machine reaches a plain server there, which the machine itself does."""
    machine.sh(f"systemd-run -q --unit=plain python3 -m http.server {port}")
    at_home = functools.partial(machine.run, "curl", "-sfo", "/dev/null", f"http://127.0.0.1:{port}/")
    eventually(lambda: at_home().returncode == 0, "the plain server answers")
    try:
        with socket.create_connection((machine.address, port), 3):  # seconds: one firewall refuses, the other is silent
            return True
    except OSError:
        return False
    finally:
        machine.sh("systemctl stop plain")


@pytest.mark.distributions
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("wall", "up"),
    [("ufw", "systemctl disable -q --now firewalld; ufw --force enable"), ("firewalld", "systemctl start firewalld")],
)
def test_a_firewall_lets_people_in_while_the_relay_is_there(
    wall: str, up: str, layers: list[Path], memory: Path
) -> None:
    """With Debian's own ufw and firewalld, and the kernel's nftables below them."""
    (folder := memory / wall).mkdir()
    machine = Machine(folder, [tree_of(WALLED)]).start()
    try:
        machine.sh(up)
        assert not lets_in(machine, 443)
        done = machine.install()
        assert done.returncode == 0, done.stdout + done.stderr
        assert "firewall: port 443 opened" in done.stdout
        assert shown_at(machine.address, 443)
        assert "firewall" not in machine.install().stdout
        assert machine.install("--uninstall").returncode == 0
        assert not lets_in(machine, 443)
    finally:
        machine.stop()


PEBBLE = {
    "listenAddress": "127.0.0.1:14000",
    "managementListenAddress": "127.0.0.1:15000",
    "certificate": "/srv/site/acme.pem",
    "privateKey": "/srv/site/acme.key",
    "httpPort": 80,
    "tlsPort": 443,
}


def start_pebble(machine: Machine) -> dict[str, str]:
    """An ACME server inside the machine, and the variables that lead there."""
    key = ec.generate_private_key(ec.SECP256R1())
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    certificate = zsr.build_certificate(key, ["127.0.0.1"], datetime.datetime.now(datetime.timezone.utc))
    (machine.site.folder / "acme.key").write_bytes(private)
    (machine.site.folder / "acme.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    (machine.site.folder / "pebble.json").write_text(json.dumps({"pebble": PEBBLE}))
    trust = {"REQUESTS_CA_BUNDLE": "/srv/site/acme.pem"}
    quick = "-E PEBBLE_VA_NOSLEEP=1 -E PEBBLE_WFE_NONCEREJECT=0"
    machine.sh(f"systemd-run -q --unit=pebble {quick} pebble -config /srv/site/pebble.json")
    directory = "https://127.0.0.1:14000/dir"
    eventually(lambda: machine.run("curl", "-kso/dev/null", directory).returncode == 0, "pebble listens")
    return trust | {"ZSR_ACME_SERVER": directory}


def leaf_of(machine: Machine) -> x509.Certificate:
    return x509.load_pem_x509_certificate(ssl.get_server_certificate((machine.address, 443)).encode())


@on_a_machine
def test_a_trusted_certificate_is_fetched_and_renewed_without_dropping_a_socket(
    installed: Installed, boot: Boot
) -> None:
    """certbot against Pebble, for a name and for the bare address; where that fails, the certificate before stays."""
    machine = boot(installed.layers)
    own = leaf_of(machine)
    failed = machine.install("--acme", ZSR_ACME_SERVER="https://127.0.0.1:14000/dir")
    assert failed.returncode == 3
    assert "no trusted certificate, it goes on with the one it had: " in failed.stderr.splitlines()[-1]
    assert leaf_of(machine) == own
    lead = start_pebble(machine)
    machine.sh("echo 127.0.0.1 chat.example.org >>/etc/hosts")
    done = machine.install("--acme", "--domain", "chat.example.org", **lead)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "its own: browsers warn" not in done.stdout
    first = leaf_of(machine)
    assert "Pebble" in first.issuer.rfc4514_string()
    assert zsr.certificate_names(first) == {"chat.example.org"}
    assert f"SHA-256 {zsr.fingerprint(first)}" in done.stdout
    assert machine.run("systemctl", "is-enabled", "zerosecretroom-acme.timer").stdout == "enabled\n"
    machine.sh("systemctl start zerosecretroom-acme.service")
    pid = machine.sh(f"systemctl show -p MainPID --value {SERVICE}")
    renew = "/opt/zerosecretroom/acme/certbot renew --force-renewal --no-random-sleep-on-renew --quiet"
    machine.sh(renew, **lead)
    eventually(lambda: leaf_of(machine) != first, "the new certificate is served")
    with connect_socket(f"wss://{machine.address}/ws/aaa", ssl=ssl._create_unverified_context()) as talk:
        machine.sh(f"systemctl reload {SERVICE}")
        assert talk.ping().wait(PATIENCE)
    assert machine.sh(f"systemctl show -p MainPID --value {SERVICE}") == pid
    assert machine.sh("stat -c '%a %G' /etc/zerosecretroom/*.pem") == "640 zerosecretroom\n" * 2
    assert len(machine.releases()) == 2, "this one and the one before are kept"
    done = machine.install("--acme", ZSR_NAME=machine.address, **lead)
    assert done.returncode == 0, done.stdout + done.stderr
    assert zsr.certificate_names(leaf_of(machine)) == {machine.address}
    assert machine.install("--uninstall").returncode == 0
    assert "\nZSR_CERT=" not in machine.sh("cat /etc/zerosecretroom.env"), "nobody renews it any more"


# ======================================================================================================================
# Bench: the relay's CPU time a delivery and its memory a connection over TLS, beside a bare broadcast server made of
# `websockets` in the same run. Members log in with keys of their own to a real room and acknowledge what they get.
# ======================================================================================================================

BARE_SERVER = textwrap.dedent("""
    import asyncio, ssl, sys
    from websockets.asyncio.server import broadcast, serve

    async def main():
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(sys.argv[1], sys.argv[2])
        present = set()

        async def member(socket):
            present.add(socket)
            async for message in socket:
                broadcast(present, message)

        # no signs of life: a full load keeps their answers waiting for longer than it waits for them
        options = dict(ssl=context, compression=None, ping_interval=None)
        async with serve(member, "127.0.0.1", int(sys.argv[3]), **options) as server:
            print("page ", flush=True)
            await server.wait_closed()

    asyncio.run(main())
""")
CIPHERTEXT = bytes(251)  # a post of 300 bytes
POST = zsr.UpPost(1, 1, bytes(32), CIPHERTEXT)
MESSAGE = len(zsr.encode_frame(POST))
ACK_SECONDS = 0.25  # between two acknowledgements of a member, each for all that came meanwhile
BURST = 8  # posts of each sender a round: enough that the relay never waits for the load
HANDSHAKE = (
    "GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)


class BareServer(Relay):
    """The plainest server that delivers each message to everyone."""

    def __init__(self, folder: Path, model: Relay) -> None:
        super().__init__(folder)
        self.state = model.state

    @property
    def command(self) -> list[str]:
        files = [str(self.state / zsr.TLS_CERT), str(self.state / zsr.TLS_KEY)]
        return [sys.executable, "-c", BARE_SERVER, *files, str(self.port)]

    async def connect(self) -> LoadClient:
        return await connect(self, "/ws/aaa")

    def post(self, size: int) -> bytes:
        """A message that the server passes on."""
        return bytes(size)


class LoadClient(asyncio.Protocol):
    """One connection of the load: WebSocket messages in and out with as little work as can be."""

    head = 0x82  # of the messages it sends: binary

    def __init__(self, path: str) -> None:
        self.path, self.data, self.open = path, bytearray(), False
        self.messages: asyncio.Queue[bytes] | None = asyncio.Queue()
        self.load: Load | Trickle | None = None
        self.gone = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        transport.write(HANDSHAKE.format(path=self.path).encode())

    def data_received(self, data: bytes) -> None:
        self.data += data
        if not self.open:
            head, end, rest = self.data.partition(b"\r\n\r\n")
            if not end:
                return
            assert head.startswith(b"HTTP/1.1 101"), bytes(head)
            self.data, self.open = rest, True
        while message := self.take():
            if self.load:
                self.load.received(self, message)
            elif self.messages:
                self.messages.put_nowait(message)

    def connection_lost(self, exc: Exception | None) -> None:
        self.gone.set()
        if isinstance(self.load, Load) and not self.load.done.done():
            self.load.done.set_exception(exc or ConnectionError("the server hung up"))

    def take(self) -> bytes:
        """The next whole message, or nothing."""
        if len(self.data) < 2:
            return b""
        start, size = 2, self.data[1] & 127
        if size > 125:
            start = 4 if size == 126 else 10
            if len(self.data) < start:
                return b""
            size = int.from_bytes(self.data[2:start], "big")
        if len(self.data) < max(start, start + size):
            return b""
        message, opcode = bytes(self.data[start : start + size]), self.data[0] & 15
        del self.data[: start + size]
        if opcode != 9:
            return message
        self.transport.write(bytes((0x8A, 0x80, 0, 0, 0, 0)))  # a sign of life: others may take a minute to come
        return self.take()

    def send(self, message: bytes) -> None:
        size = len(message)
        narrow = size < 65536
        head = struct.pack(">BBH" if narrow else ">BBQ", self.head, 0xFE if narrow else 0xFF, size)
        self.transport.write(head + bytes(4) + message)  # masked with zeros

    def say(self, *frames: Any) -> None:
        self.send(message_of(*frames))

    async def hear(self, kind: type[Any]) -> Any:
        assert self.messages
        while True:
            for data in zsr.split_frames(await self.messages.get()):
                frame = zsr.decode_frame(data)
                assert not isinstance(frame, zsr.DownFault), frame
                if isinstance(frame, kind):
                    return frame


class SocketIoClient(LoadClient):
    """The same to a server of socket.io 4: engine.io's packets in text messages."""

    head = 0x81

    def take(self) -> bytes:
        message = super().take()
        if message != b"2":
            return message
        self.send(b"3")  # a sign of life
        return self.take()


class Load:
    """Rounds in which some send a burst each, and which end when everyone has heard everything."""

    def __init__(self, audience: Audience, rounds: int, senders: int = 100, burst: int = BURST) -> None:
        self.clients, self.post, self.rounds, self.run = audience.clients, audience.post, rounds, audience.run
        self.senders, self.burst = audience.clients[:senders], burst
        self.deliveries = len(self.clients) * len(self.senders) * burst
        self.due = dict.fromkeys(self.clients, time.monotonic() + ACK_SECONDS)
        self.done = asyncio.get_running_loop().create_future()

    def begin(self) -> None:
        self.missing = self.deliveries
        for client in self.clients:
            client.load = self
        for client in self.senders:
            for _ in range(self.burst):
                client.send(self.post)

    def received(self, client: LoadClient, message: bytes) -> None:
        heard = self.count(message)
        self.missing -= heard
        if self.run and time.monotonic() >= self.due[client]:
            self.due[client] = time.monotonic() + ACK_SECONDS
            self.acknowledge(client, message)
        if heard and self.missing == 0:  # an answer that comes after the last delivery ends no round
            self.rounds -= 1
            if self.rounds:
                self.begin()
            else:
                self.done.set_result(None)

    def count(self, message: bytes) -> int:
        """Deliveries in a message: the entries among its frames."""
        if not self.run:
            return 1
        assert message[4] != 0x82, zsr.decode_frame(zsr.split_frames(message)[0])
        at = entries = 0
        while at < len(message):
            entries += message[at + 4] == 0x86
            at += 4 + int.from_bytes(message[at : at + 4], "big")
        return entries

    def acknowledge(self, client: LoadClient, message: bytes) -> None:
        frames = map(zsr.decode_frame, zsr.split_frames(message))
        last = max((frame.no for frame in frames if isinstance(frame, zsr.DownEvent)), default=0)
        if last:
            client.say(zsr.UpAck(self.run, last))


def crowd(size: int) -> tuple[list[Keys], Made]:
    """A room with `size` members of one device each."""
    root = new_root()
    members = [new_device(room_of(root)) for _ in range(size)]
    first = create(root, members[0])
    under = zsr.decode(zsr.Signed, first.unit.charter)
    invites = [struct.pack(">QQ", 1, number) for number in range(size)]
    entries = [*first.entries, *(entry(keys, inv) for keys, inv in zip(members[1:], invites, strict=False))]
    consumed = [used(inv, keys) for keys, inv in zip(members[1:], invites, strict=False)]
    listing = roster(members[0].room, under, members[0], 1, entries, consumed=consumed)
    made = commit(first, under, listing, members[0], members, joiners=frozenset(keys.dev for keys in members))
    return members, replace(made, entries=tuple(entries))


async def connect(server: Relay, path: str, kind: type[LoadClient] = LoadClient) -> LoadClient:
    loop = asyncio.get_running_loop()
    _, client = await loop.create_connection(lambda: kind(path), "127.0.0.1", server.port, ssl=server.trust())
    return client


async def enter(server: Relay, keys: Keys, made: Made | None) -> tuple[LoadClient, bytes]:
    """A logged-in member that has said hello, and the relay's run."""
    client = await connect(server, "/ws/" + zsr.b64u(keys.room))
    client.say(zsr.UpNonce(os.urandom(32)))
    said = await client.hear(zsr.DownRelay)
    client.say(
        login(keys, said.m, "127.0.0.1"),
        zsr.UpHello(said.run, 0, made.full if made else b"", (leaf(keys),), (), (), (), ()),
    )
    await client.hear(zsr.DownReady)
    return client, said.run


async def leave_all(clients: list[LoadClient]) -> None:
    """Hangs up, and returns once the connections are closed: the loop may end then."""
    for client in clients:
        client.load = None
        client.transport.abort()
    for client in clients:
        await client.gone.wait()


class Audience(NamedTuple):
    """All members of one room of one server."""

    server: Relay
    clients: list[LoadClient]
    post: bytes
    run: bytes  # of a relay, which gets acknowledgements
    memory: float  # KB a connection

    async def measure(self, rounds: int, senders: int = 100, burst: int = BURST) -> float:
        """Microseconds of the server's CPU time a delivery, when all send as fast as they hear."""
        load = Load(self, rounds, senders, burst)
        before = self.server.cpu()
        load.begin()
        await asyncio.wait_for(load.done, 240)
        return (self.server.cpu() - before) * 1e6 / (load.deliveries * rounds)

    async def leave(self) -> None:
        await leave_all(self.clients)


async def gather_at_relay(server: Relay, size: int) -> Audience:
    members, made = crowd(size)
    first, run = await enter(server, members[0], made)
    before = server.rss()
    clients = [first] + [(await enter(server, keys, None))[0] for keys in members[1:]]
    memory = (server.rss() - before) / 1024 / (size - 1)
    post = zsr.encode_frame(replace(POST, epoch=made.body.epoch, ch=made.ch))
    return Audience(server, clients, zsr.join_frames([post]), run, memory)


async def gather_at_bare(server: BareServer, size: int) -> Audience:
    """Each that comes is heard by all before the next: else what is broadcast might pass it by."""
    clients: list[LoadClient] = []
    before = 0
    for number in range(size):
        before = server.rss() if number == 1 else before
        clients.append(await server.connect())
        clients[-1].send(server.post(4))
        for client in clients:
            assert client.messages
            await client.messages.get()
    return Audience(server, clients, server.post(MESSAGE), b"", (server.rss() - before) / 1024 / (size - 1))


NODE_SERVER = """
const {readFileSync} = require('fs'), [cert, key, port] = process.argv.slice(1);
const https = require('https').createServer({cert: readFileSync(cert), key: readFileSync(key)});
%s
https.listen(Number(port), '127.0.0.1', () => console.log('page '));
"""


class WsServer(BareServer):
    """The same in node, with the package `ws`."""

    script = """
        const {WebSocketServer} = require('ws'), all = new WebSocketServer({server: https, perMessageDeflate: false});
        all.on('connection', (one) => one.on('message', (data) => {
          for (const other of all.clients) other.send(data, {binary: true});
        }));"""

    @property
    def command(self) -> list[str]:
        files = [str(self.state / zsr.TLS_CERT), str(self.state / zsr.TLS_KEY)]
        return ["node", "-e", NODE_SERVER % self.script, *files, str(self.port)]


class SocketIoServer(WsServer):
    """The same with socket.io, which most chats of this kind are made with."""

    script = """
        const all = new (require('socket.io').Server)(https, {transports: ['websocket'], serveClient: false});
        all.on('connection', (one) => one.on('m', (text) => all.emit('m', text)));"""

    async def connect(self) -> LoadClient:
        client = await connect(self, "/socket.io/?EIO=4&transport=websocket", SocketIoClient)
        assert client.messages
        assert (await client.messages.get()).startswith(b"0{")
        client.send(b"40")
        assert (await client.messages.get()).startswith(b"40{")
        return client

    def post(self, size: int) -> bytes:
        return b'42["m","' + b"x" * size + b'"]'


@pytest.fixture
def peers(tmp_path: Path) -> Iterator[tuple[Relay, dict[str, BareServer]]]:
    """A relay, and by name what it is compared with."""
    with contextlib.ExitStack() as stack:
        relay = Relay(tmp_path / "relay", "--log-level", "warning")
        kinds = {"bare": BareServer, "ws": WsServer, "socket.io": SocketIoServer}
        others = {name: kind(tmp_path / name, relay) for name, kind in kinds.items()}
        for server in (relay, *others.values()):
            stack.callback(server.kill)
            server.start()
        yield relay, others


async def compare(
    relay: Relay, peers: dict[str, BareServer], size: int, turns: int, **load: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Microseconds a delivery and KB a connection, by name; turns alternate, since a machine's pace drifts."""
    audiences = {"relay": await gather_at_relay(relay, size)}
    for name, server in peers.items():
        audiences[name] = await gather_at_bare(server, size)
    costs = [{name: await audience.measure(**load) for name, audience in audiences.items()} for _ in range(turns)]
    for audience in audiences.values():
        await audience.leave()
    middle = {name: statistics.median(cost[name] for cost in costs) for name in audiences}
    return middle, {name: audience.memory for name, audience in audiences.items()}


def show_costs(title: str, costs: dict[str, float], unit: str) -> dict[str, float]:
    """The relay's part of what each other takes."""
    ratios = {name: costs["relay"] / cost for name, cost in costs.items() if name != "relay"}
    others = ", ".join(f"{ratios[name]:.2f} of {name} ({costs[name]:.2f})" for name in ratios)
    print(f"\n{title}: {costs['relay']:.2f} {unit}, {others}")
    return ratios


@pytest.mark.bench
@pytest.mark.timeout(1800)  # a thousand arrive one after another, at each
@pytest.mark.parametrize(("size", "rounds", "share"), [(100, 10, 1 / 2), (1000, 1, 1 / 3)])
def test_a_delivery_costs_a_part_of_what_others_take(
    peers: tuple[Relay, dict[str, BareServer]], size: int, rounds: int, share: float
) -> None:
    costs, memory = asyncio.run(compare(*peers, size, 3, rounds=rounds))
    ratios = show_costs(f"a delivery among {size}, saturated", costs, "us")
    show_costs(f"a connection among {size}", memory, "KB")
    assert memory["relay"] <= 50
    assert ratios["bare"] <= 0.15
    assert max(ratios["ws"], ratios["socket.io"]) <= share


@pytest.mark.bench
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("size", [100, 1000])
def test_one_message_at_a_time_costs_no_more_than_with_others(
    peers: tuple[Relay, dict[str, BareServer]], size: int
) -> None:
    costs, _ = asyncio.run(compare(*peers, size, 7, rounds=50_000 // size, senders=1, burst=1))
    ratios = show_costs(f"a delivery among {size}, one at a time", costs, "us")
    assert max(ratios.values()) <= 1


DEVICES = int(os.environ.get("ZSR_BENCH_DEVICES", "10000"))
STORM = DEVICES // 2
DELIVERIES_A_SECOND = 2000


async def enter_all(server: Relay, rooms: list[tuple[list[Keys], Made]]) -> list[LoadClient]:
    """Every member of every room, fifty at a time, each with what brings its room back."""
    gate = asyncio.Semaphore(50)

    async def one(keys: Keys, made: Made) -> LoadClient:
        async with gate:
            return (await enter(server, keys, made))[0]

    return await asyncio.gather(*(one(keys, made) for members, made in rooms for keys in members))


class Trickle:
    """Posts at a steady pace, to one room of five after another, and how long each member waited for each."""

    def __init__(self, clients: list[LoadClient], rooms: list[tuple[list[Keys], Made]]) -> None:
        self.rooms = [clients[start : start + 5] for start in range(0, len(clients), 5)]
        frames = [zsr.encode_frame(replace(POST, epoch=made.body.epoch, ch=made.ch)) for _, made in rooms]
        self.posts = [zsr.join_frames([frame]) for frame in frames]
        self.places = {client: place for place, room in enumerate(self.rooms) for client in room}
        self.sent: dict[int, float] = {}
        self.waits: list[float] = []
        for client in clients:
            client.load = self

    def received(self, client: LoadClient, message: bytes) -> None:
        if entries := sum(frame[0] == 0x86 for frame in zsr.split_frames(message)):  # who is there may come before any
            self.waits += [time.monotonic() - self.sent[self.places[client]]] * entries

    async def run(self, rooms: int, seconds: float) -> tuple[float, float]:
        """Milliseconds that half of the deliveries, and all but a hundredth, took at most. All members are in this one
        process, whose own search for cycles of garbage would stop them all for half a second: it waits meanwhile."""
        with uncollected():
            return await self.measured(rooms, seconds)

    async def measured(self, rooms: int, seconds: float) -> tuple[float, float]:
        self.waits.clear()
        begun, pause = time.monotonic(), 5 / DELIVERIES_A_SECOND
        for number in range(int(seconds / pause)):
            await asyncio.sleep(begun + number * pause - time.monotonic())
            place = number % rooms
            self.sent[place] = time.monotonic()
            self.rooms[place][number % 5].send(self.posts[place])
        due, late = 5 * int(seconds / pause), time.monotonic() + 60
        while len(self.waits) < due and time.monotonic() < late:
            await asyncio.sleep(0.1)
        waits = sorted(self.waits)
        assert len(waits) == due
        return waits[len(waits) // 2] * 1000, waits[len(waits) * 99 // 100] * 1000


@pytest.mark.bench
@pytest.mark.timeout(3600)
def test_many_devices_fit_are_answered_and_all_come_back_after_a_kill(tmp_path: Path) -> None:
    """10,000 connected devices in rooms of five; half of them reconnect at once after a kill. ZSR_BENCH_DEVICES: how many."""
    relay, rooms = Relay(tmp_path, "--log-level", "warning").start(), [crowd(5) for _ in range(DEVICES // 5)]

    async def measured() -> tuple[float, float, int]:
        before = relay.rss()
        clients = await enter_all(relay, rooms)
        memory = relay.rss()
        entries = int(metrics(relay)["zsr_rooms"])
        trickle = Trickle(clients, rooms)
        for count in (len(rooms), 100):
            half, most = await trickle.run(count, 15)
            print(
                f"\n{DELIVERIES_A_SECOND} deliveries a second to {count} rooms: median {half:.1f} ms, p99 {most:.1f} ms"
            )
        await leave_all(clients)
        relay.restart()
        idle = relay.cpu()
        clients = await enter_all(relay, rooms[: STORM // 5])
        storm = relay.cpu() - idle
        assert (entries, int(metrics(relay)["zsr_rooms"])) == (len(rooms), STORM // 5), "none was refused"
        await leave_all(clients)
        return (memory - before) / 1024 / DEVICES, storm, memory

    try:
        each, storm, memory = asyncio.run(measured())
    finally:
        relay.kill()
    print(
        f"\n{DEVICES} devices in {len(rooms)} rooms: {memory / (1 << 20):.0f} MB, {each:.0f} KB each with its room; "
        f"{STORM} members restored after a kill with {storm:.1f} s of CPU, {storm / STORM * 1000:.2f} ms each"
    )
    assert memory < 600 << 20 or DEVICES > 10_000
    assert storm < 10 * STORM / 5000


@pytest.mark.bench
@pytest.mark.timeout(600)
def test_two_relays_carry_twice_as_much(tmp_path: Path) -> None:
    """By the CPU time of each: on two cores the load takes a part of both."""
    relays = [Relay(tmp_path / name, "--log-level", "warning") for name in "ab"]

    async def measured() -> tuple[float, float]:
        audiences = [await gather_at_relay(relay, 100) for relay in relays]
        alone = [await audience.measure(10) for audience in audiences]
        both = await asyncio.gather(*(audience.measure(10) for audience in audiences))
        for audience in audiences:
            await audience.leave()
        return statistics.mean(alone), statistics.mean(both)

    try:
        for relay in relays:
            relay.start()
        alone, both = asyncio.run(measured())
    finally:
        for relay in relays:
            relay.kill()
    print(
        f"\n100 members at each of two relays: {2e6 / both:,.0f} deliveries a second, {alone / both:.2f} of twice one"
    )


# ══════════════════════════════════════════════════════════════════════════════════════════════════════════════════════
# Bench of the page: what sealing costs people, as ratios against the plainest thing that does the same in the same run:
# a file over a bare socket, a page with nothing in it, a short room. Absolute numbers stand beside for orientation.
# ══════════════════════════════════════════════════════════════════════════════════════════════════════════════════════

FILE_BYTES = 20 * 2**20
ROUNDS = 9

BARE_PAGE_SERVER = textwrap.dedent("""
    import asyncio, http, ssl, sys
    from websockets.asyncio.server import broadcast, serve

    async def main():
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(sys.argv[1], sys.argv[2])
        present = set()

        def page(connection, request):
            if request.path == "/":
                answer = connection.respond(http.HTTPStatus.OK, "<!doctype html><link rel=icon href=data:,><p>bare")
                del answer.headers["Content-Type"]
                answer.headers["Content-Type"] = "text/html"
                return answer

        async def member(socket):
            present.add(socket)
            async for message in socket:
                broadcast(present - {socket}, message)

        options = dict(ssl=context, compression=None, max_size=None, process_request=page)
        async with serve(member, "127.0.0.1", int(sys.argv[3]), **options) as server:
            print("page ", flush=True)
            await server.wait_closed()

    asyncio.run(main())
""")

BARE_SCRIPT = """(() => {
  window.socket = new WebSocket(location.href.replace('http', 'ws') + 'socket');
  socket.binaryType = 'arraybuffer';
  return new Promise((open) => { socket.onopen = () => open(true); });
})()"""
BARE_RECEIVE_SCRIPT = """(() => {
  const parts = [];
  let size = 0;
  window.arrived = new Promise((there) => {
    socket.onmessage = ({data}) => {
      parts.push(data);
      size += data.byteLength;
      if (size === %d) there([Date.now(), new Blob(parts).size]);
    };
  });
})()"""
RANDOM_BYTES_SCRIPT = """(() => {
  window.content = new Uint8Array(%d);
  for (let at = 0; at < content.length; at += 65536) crypto.getRandomValues(content.subarray(at, at + 65536));
})()"""
BARE_SEND_SCRIPT = """(() => {
  const begun = Date.now(), part = 262144;
  for (let at = 0; at < content.length; at += part) socket.send(content.subarray(at, at + part));
  return begun;
})()"""
SEND_SCRIPT = """(() => {
  const begun = Date.now();
  Session.dispatch({do: 'files', files: [new File([content], '%s', {type: 'video/mp4'})]});
  return begun;
})()"""
# a film gets its player when it is here whole, not before; nobody asks the page meanwhile, which would cost it time
RECEIVE_SCRIPT = """(() => {
  window.arrived = new Promise((there) => {
    const watch = new MutationObserver(() => {
      if (!document.querySelector('video[aria-label="%s"]')) return;
      watch.disconnect();
      there(Date.now());
    });
    watch.observe(document.body, {childList: true, subtree: true});
  });
})()"""


class BarePageServer(Relay):
    """Serves an empty page and passes each message on to everyone else."""

    def __init__(self, folder: Path, model: Relay) -> None:
        super().__init__(folder)
        self.state = model.state

    @property
    def command(self) -> list[str]:
        files = [str(self.state / zsr.TLS_CERT), str(self.state / zsr.TLS_KEY)]
        return [sys.executable, "-c", BARE_PAGE_SERVER, *files, str(self.port)]


@pytest.fixture
def bare(tmp_path: Path, relay: Relay) -> Iterator[BarePageServer]:
    server = BarePageServer(tmp_path / "bare", relay)
    server.start()
    yield server
    server.kill()


def show(title: str, ratio: float, detail: str) -> None:
    print(f"\n{title}: {ratio:.2f} ({detail})")


class PlainChromium:
    """A browser that is told and asked what the bench wants and nothing else: Playwright has each message of a socket
    copied to itself, which takes half as much of the processor as carrying it does."""

    def __init__(self, line: ClientConnection) -> None:
        self.line, self.asked = line, 0

    def ask(self, method: str, session: str = "", **parameters: Any) -> Any:
        """One command of the Chrome DevTools Protocol and its answer."""
        self.asked += 1
        to = {"sessionId": session} if session else {}
        self.line.send(json.dumps({"id": self.asked, "method": method, "params": parameters, **to}))
        while (said := json.loads(self.line.recv(PATIENCE * 4))).get("id") != self.asked:
            pass
        assert "error" not in said, said
        return said["result"]

    def page(self, url: str, first: str = "") -> PlainPage:
        """In a profile of its own; `first` is a script that runs before those of the page."""
        profile = self.ask("Target.createBrowserContext")["browserContextId"]
        target = self.ask("Target.createTarget", url="about:blank", browserContextId=profile)["targetId"]
        page = PlainPage(self, self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"], profile)
        if first:
            self.ask("Page.enable", page.session)
            self.ask("Page.addScriptToEvaluateOnNewDocument", page.session, source=first)
        self.ask("Page.navigate", page.session, url=url)
        page.wait("location.host && document.readyState === 'complete'")
        return page


class PlainPage:
    def __init__(self, browser: PlainChromium, session: str, profile: str) -> None:
        self.browser, self.session, self.profile = browser, session, profile

    def js(self, expression: str) -> Any:
        """What an expression, or its promise, comes to."""
        how = {"expression": expression, "awaitPromise": True, "returnByValue": True}
        said = self.browser.ask("Runtime.evaluate", self.session, **how)
        assert "exceptionDetails" not in said, said
        return said["result"].get("value")

    def wait(self, expression: str, timeout: float = PATIENCE) -> Any:
        return eventually(lambda: self.js(expression), expression, timeout)

    def close(self) -> None:
        self.browser.ask("Target.disposeBrowserContext", browserContextId=self.profile)


@pytest.fixture
def plain(tmp_path: Path) -> Iterator[PlainChromium]:
    options = ("--headless=new", "--ignore-certificate-errors", "--remote-debugging-port=0")
    command = [program("chromium", "chromium-browser"), *CHROMIUM_ARGS, *options, f"--user-data-dir={tmp_path}"]
    told = tmp_path / "DevToolsActivePort"
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            port, path = eventually(lambda: told.read_text().split()[:2] if told.exists() else [], "it is told where")
            with connect_socket(f"ws://127.0.0.1:{port}{path}", max_size=None, compression=None, proxy=None) as line:
                yield PlainChromium(line)
        finally:
            process.terminate()


def gathered(browser: PlainChromium, *places: str) -> list[PlainPage]:
    """So many people in a room, each at an address of the same relay."""
    ann = browser.page(places[0])
    ann.wait("!document.getElementById('v-start').hidden")
    ann.js("Session.dispatch({do: 'create', title: 'Harbour', name: 'Ann', own: false}).then(() => 0)")
    crew = [ann]
    for place in places[1:]:
        link = ann.js("Session.dispatch({do: 'invite'}).then(({link}) => link)")
        crew.append(browser.page(link.replace(places[0], place)))
        crew[-1].wait("!document.getElementById('v-invited').hidden")
        crew[-1].js(f"Session.dispatch({{do: 'join', name: 'Bob {len(crew)}'}}).then(() => 0)")
        crew[-1].wait("!document.getElementById('v-room').hidden")
    for user in crew:
        user.wait("document.getElementById('room-link').dataset.s === 'connected'")
    return crew


def over_bare_socket(browser: PlainChromium, bare: BarePageServer) -> Callable[[int], float]:
    """What carries the bytes once, from page to page, and answers with the seconds."""
    sender, receiver = browser.page(bare.url()), browser.page(bare.url())
    for user in (sender, receiver):
        user.js(BARE_SCRIPT)
    sender.js(RANDOM_BYTES_SCRIPT % FILE_BYTES)

    def carry(_: int) -> float:
        receiver.js(BARE_RECEIVE_SCRIPT % FILE_BYTES)
        begun = sender.js(BARE_SEND_SCRIPT)
        arrived, size = receiver.js("arrived")
        assert size == FILE_BYTES
        return float(arrived - begun) / 1000

    return carry


def carried_to(ann: PlainPage, others: list[PlainPage], number: int) -> float:
    """Seconds until all of the others have a film of Ann's."""
    for user in others:
        user.js(RECEIVE_SCRIPT % f"{number}.mp4")
    begun = ann.js(SEND_SCRIPT % f"{number}.mp4")
    return max(float(user.js("arrived") - begun) / 1000 for user in others)


def sealed_in_room(browser: PlainChromium, relay: Relay) -> Callable[[int], float]:
    ann, bob = gathered(browser, relay.url(), relay.url())
    ann.js(RANDOM_BYTES_SCRIPT % FILE_BYTES)

    return functools.partial(carried_to, ann, [bob])


@pytest.mark.bench
@pytest.mark.xdist_group("bench")
def test_a_20_mb_file_beside_a_bare_socket(plain: PlainChromium, relay: Relay, bare: BarePageServer) -> None:
    """In turn, so that a machine that is slower for a while is so for both."""
    ways = over_bare_socket(plain, bare), sealed_in_room(plain, relay)
    unsealed, sealed = map(statistics.median, zip(*[[carry(n) for carry in ways] for n in range(ROUNDS)], strict=True))
    show("20 MB browser to browser, sealed / bare socket", sealed / unsealed, f"{sealed:.2f} s / {unsealed:.2f} s")


class Harbour(Relay):
    """A relay in a network of its own, which each person reaches by a line of 200 Mbit/s each way: the kernel's own, so
    that nothing is taken from the processor for it. The n-th line is at `at(n)`."""

    RATE = 200e6 / 8  # bytes a second

    def __init__(self, folder: Path, lines: int) -> None:
        super().__init__(folder, *(word for n in range(lines) for word in ("--name", f"10.77.{n}.2")))
        self.net, self.lines = f"zsr-{os.getpid()}", lines

    @property
    def command(self) -> list[str]:
        return ["ip", "netns", "exec", self.net, *(word.replace("127.0.0.1", "0.0.0.0") for word in super().command)]

    def start(self) -> Harbour:
        as_program("ip", "netns", "add", self.net)
        inside = ("ip", "netns", "exec", self.net)
        for n in range(self.lines):
            near, far = f"zsr{n}", "line" + str(n)
            as_program("ip", "link", "add", near, "type", "veth", "peer", "name", far, "netns", self.net)
            for way, end, address in (((), near, f"10.77.{n}.1/24"), (inside, far, f"10.77.{n}.2/24")):
                as_program(*way, "ip", "address", "add", address, "dev", end)
                as_program(*way, "ip", "link", "set", end, "up")
                limit = ("tbf", "rate", "200mbit", "burst", "64kb", "latency", "50ms")
                as_program(*way, "tc", "qdisc", "add", "dev", end, "root", *limit)
        super().start()
        return self

    def kill(self) -> None:
        super().kill()
        as_program("ip", "netns", "delete", self.net)

    def at(self, line: int) -> str:
        return f"https://10.77.{line}.2:{self.port}/"

    def url(self, path: str = "/") -> str:
        return self.at(0).removesuffix("/") + path


@pytest.fixture
def harbour(tmp_path: Path) -> Iterator[Harbour]:
    if reason := why_no_machine():
        pytest.skip(f"LINES NOT TRIED: {reason}")
    made = Harbour(tmp_path / "harbour", 5)
    try:
        yield made.start()
    finally:
        made.kill()


TEXT_SCRIPT = """(() => {
  const said = new Map();
  window.waits = [];
  window.sayNow = (n) => { said.set(String(n), Date.now()); Session.dispatch({do: 'send', text: 'tick ' + n}); };
})()"""
HEAR_SCRIPT = """(() => {
  window.heardAt = {};
  new MutationObserver(() => {
    for (const e of document.querySelectorAll('article .text')) {
      const n = /^tick (\\d+)$/.exec(e.textContent)?.[1];
      if (n && !heardAt[n]) heardAt[n] = Date.now();
    }
  }).observe(document.getElementById('log'), {childList: true, subtree: true});
})()"""


def text_latencies(ann: PlainPage, bob: PlainPage, numbers: range, pause: float) -> list[float]:
    """Seconds from writing until each of these texts stands in the other's log."""
    begun = {}
    for n in numbers:
        begun[n] = ann.js(f"(() => {{ const at = Date.now(); sayNow({n}); return at; }})()")
        time.sleep(pause)
    bob.wait(f"heardAt['{numbers[-1]}']", 60)
    heard_at = bob.js("heardAt")
    return [(heard_at[str(n)] - begun[n]) / 1000 for n in numbers]


def p95(values: list[float]) -> float:
    return sorted(values)[int(len(values) * 0.95) - 1]


@pytest.mark.bench
@pytest.mark.xdist_group("bench")
@pytest.mark.parametrize("receivers", [1, 4])
def test_20_mb_over_200_mbit_arrive_while_they_are_sent(plain: PlainChromium, harbour: Harbour, receivers: int) -> None:
    ann, *others = gathered(plain, *map(harbour.at, range(receivers + 1)))
    ann.js(RANDOM_BYTES_SCRIPT % FILE_BYTES)
    times = [carried_to(ann, others, number) for number in range(ROUNDS)]
    took, bare = statistics.median(times), FILE_BYTES / harbour.RATE
    show(f"20 MB to {receivers} over lines of 200 Mbit/s / a line alone", took / bare, f"{took:.2f} s / {bare:.2f} s")


@pytest.mark.bench
@pytest.mark.xdist_group("bench")
def test_text_hardly_waits_for_a_file(plain: PlainChromium, harbour: Harbour) -> None:
    ann, bob = gathered(plain, harbour.at(0), harbour.at(1))
    ann.js(TEXT_SCRIPT)
    bob.js(HEAR_SCRIPT)
    alone = text_latencies(ann, bob, range(40), 0.1)
    ann.js(RANDOM_BYTES_SCRIPT % (60 << 20))
    ann.js(SEND_SCRIPT % "long.mp4")
    beside = text_latencies(ann, bob, range(100, 130), 0.1)
    show("p95 of text beside a file / alone", p95(beside) / p95(alone), f"{p95(beside):.3f} s / {p95(alone):.3f} s")


LONG_FILE = int(os.environ.get("ZSR_BENCH_MIB", "128")) << 20
BREAKS = int(os.environ.get("ZSR_BENCH_RESETS", "6")), int(os.environ.get("ZSR_BENCH_KILLS", "1"))


class ResidentUser(PlaywrightUser):
    """One whose profile lies on the disk: that of the others lies in memory, and so do the files they keep."""

    def __init__(self, engine: PlaywrightEngine, folder: Path) -> None:
        self.folder = folder
        super().__init__(engine, LAPTOP)

    def enter(self, engine: PlaywrightEngine, options: dict[str, Any]) -> pw.BrowserContext:
        return engine.driver.chromium.launch_persistent_context(
            self.folder, executable_path=program("chromium", "chromium-browser"), args=CHROMIUM_ARGS, **options
        )

    def heap(self) -> float:
        """Bytes that the page's scripts hold, those of buffers included."""
        watch = self.do(lambda: self.context.new_cdp_session(self.tab))
        usage = self.do(lambda: watch.send("Runtime.getHeapUsage"))
        self.do(watch.detach)
        return float(usage["usedSize"] + usage.get("embedderHeapUsedSize", 0) + usage.get("backingStorageSize", 0))

    def saved_digest(self, name: str) -> str:
        """Presses the button that saves a file; SHA-256 of what came to the disk."""

        def save() -> str:
            with self.tab.expect_download(timeout=1_800_000) as started:
                self.tab.get_by_role("button", name=f"Download {name}").click()
            return digest_of(Path(started.value.path()))

        return self.do(save)


def digest_of(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


@pytest.fixture
def residents(browsers: Browsers, tmp_path: Path) -> Iterator[tuple[ResidentUser, ResidentUser]]:
    engine = browsers["chromium"]
    assert isinstance(engine, PlaywrightEngine)
    ann, bob = ResidentUser(engine, tmp_path / "ann"), ResidentUser(engine, tmp_path / "bob")
    yield ann, bob
    for user in (ann, bob):
        user.close()


def long_file(folder: Path) -> Path:
    dice = random.Random(6)
    with open(folder / "long.bin", "wb") as file:
        for _ in range(LONG_FILE >> 20):
            file.write(dice.randbytes(1 << 20))
    return folder / "long.bin"


PROGRESS_SCRIPT = """(() => {
  const bar = document.querySelector('article progress');
  return bar ? bar.value : document.querySelector('button[aria-label="Download long.bin"]') ? 1 : 0;
})()"""


def offer_long_file(ann: User, bob: User, relay: Relay, path: Path) -> None:
    """None of it moves before somebody asks for it: what is counted from here on is the whole file."""
    make_room(ann, relay)
    join_by(bob, make_link(ann), "Bob")
    bob.js("void delete window.showSaveFilePicker")
    ann.upload(path)
    bob.find("button", "Download long.bin").appears()


def begin_long_file(bob: User) -> None:
    bob.click("button", "Download long.bin")
    bob.find("progressbar", "long.bin").appears()


@pytest.mark.bench
@pytest.mark.xdist_group("bench")
@pytest.mark.timeout(7200)
def test_a_large_file_survives_resets_and_kills(
    residents: tuple[ResidentUser, ResidentUser], relay: Relay, tmp_path: Path
) -> None:
    """ZSR_BENCH_MIB: how large (2048 with 20 resets and 3 kills needs 10 GB of disk), _RESETS and _KILLS: how often."""
    dice, path, (ann, bob) = random.Random(6), long_file(tmp_path), residents
    with slow_line(relay, 1e9) as line:
        offer_long_file(ann, bob, cast("Relay", line), path)
        before, begun = line.carried["up"], time.monotonic()
        begin_long_file(bob)
        breaks = [line.cut] * BREAKS[0] + [relay.restart] * BREAKS[1]
        dice.shuffle(breaks)
        for at, break_ in zip(sorted(dice.random() for _ in breaks), breaks, strict=True):
            bob.wait(f"{PROGRESS_SCRIPT} >= {at}", 1800)
            break_()
        bob.wait(f"{PROGRESS_SCRIPT} === 1", 1800)
        again, took = (line.carried["up"] - before) / LONG_FILE - 1, time.monotonic() - begun
        assert bob.saved_digest("long.bin") == digest_of(path)
    title = f"{LONG_FILE >> 20} MiB, {BREAKS[0]} resets, {BREAKS[1]} kills: carried beyond its size"
    show(title, again, f"{again:.2%}, {took:.0f} s")
    assert again < 0.02 or LONG_FILE < 2 << 30


@pytest.mark.bench
@pytest.mark.xdist_group("bench")
@pytest.mark.timeout(7200)
def test_a_file_of_any_size_passes_from_disk_to_disk_without_filling_memory(
    residents: tuple[ResidentUser, ResidentUser], relay: Relay, tmp_path: Path
) -> None:
    """ZSR_BENCH_MIB: how large; 8192 needs 40 GB of disk."""
    path, (ann, bob) = long_file(tmp_path), residents
    offer_long_file(ann, bob, relay, path)
    most = first = (relay.rss(), ann.heap(), bob.heap())
    begun = time.monotonic()
    begin_long_file(bob)

    def passed() -> bool:
        nonlocal most
        most = cast("Any", tuple(map(max, most, (relay.rss(), ann.heap(), bob.heap()))))
        return bool(bob.js(f"{PROGRESS_SCRIPT} === 1"))

    eventually(passed, "it has arrived", 7200)
    took = time.monotonic() - begun
    assert bob.saved_digest("long.bin") == digest_of(path)
    growth = [(high - low) / 2**20 for high, low in zip(most, first, strict=True)]
    show(
        f"{LONG_FILE >> 20} MiB from disk to disk, MiB a second",
        (LONG_FILE >> 20) / took,
        "grown by relay {:.0f}, sender's heap {:.0f}, receiver's heap {:.0f} MiB".format(*growth),
    )
    assert growth[0] < 64
    assert max(growth[1:]) < 150


USABLE_SCRIPT = """addEventListener('load', () => { window.usable ??= performance.now(); });
new MutationObserver((_, watch) => {
  if (![...document.querySelectorAll('button')].some((e) => e.checkVisibility() && e.innerText === 'New room')) return;
  watch.disconnect();
  window.usable = performance.now();
}).observe(document, {subtree: true, attributeFilter: ['hidden']});"""


def usable_ms(browser: PlainChromium, url: str) -> float:
    """From navigation until something on the page can be used, or an empty one is there, by the page's own clock; in
    profiles that have never seen it."""
    times = []
    for _ in range(3 * ROUNDS):
        page = browser.page(url, USABLE_SCRIPT)
        times.append(page.wait("window.usable"))
        page.close()
    return float(statistics.median(times))


@pytest.mark.bench
@pytest.mark.xdist_group("bench")
def test_the_page_is_soon_usable(plain: PlainChromium, relay: Relay, bare: BarePageServer) -> None:
    full, empty = usable_ms(plain, relay.url()), usable_ms(plain, bare.url())
    show("navigation to usable page / to an empty page", full / empty, f"{full:.0f} ms / {empty:.0f} ms")
    assert full < 3000


@pytest.mark.bench
@pytest.mark.xdist_group("bench")
def test_loading_costs_little_of_the_processor(arrive: Arrive, relay: Relay) -> None:
    """CPU time of the page's main thread: it is the same on a busy machine."""
    costs: dict[str, list[float]] = {"ScriptDuration": [], "LayoutDuration": [], "TaskDuration": []}
    for _ in range(ROUNDS):
        user = arrive("chromium")
        assert isinstance(user, PlaywrightUser)
        watch = user.do(lambda user=user: user.context.new_cdp_session(user.tab))  # type: ignore[misc]
        user.do(lambda watch=watch: watch.send("Performance.enable", {"timeDomain": "threadTicks"}))  # type: ignore[misc]
        user.goto(relay.url())
        user.find("button", "New room").appears()
        metrics = user.do(lambda watch=watch: watch.send("Performance.getMetrics"))["metrics"]  # type: ignore[misc]
        for name, times in costs.items():
            times.append(next(m["value"] for m in metrics if m["name"] == name))
        user.close()
    script, layout, task = (statistics.median(times) * 1000 for times in costs.values())
    show("ms of CPU to a usable page", task, f"scripts {script:.0f} ms, layout {layout:.0f} ms")
    assert task < 1000


@pytest.mark.bench
@pytest.mark.xdist_group("bench")
def test_lighthouse_has_little_against_the_speed(relay: Relay, tmp_path: Path) -> None:
    report = lighthouse(relay, tmp_path, "performance")
    audits = ("first-contentful-paint", "largest-contentful-paint", "total-blocking-time", "cumulative-layout-shift")
    detail = ", ".join(f"{name} {report['audits'][name]['displayValue']}" for name in audits)
    show("Lighthouse, performance", report["categories"]["performance"]["score"], detail)
    assert report["audits"]["cumulative-layout-shift"]["score"] == 1


TIMERS_SCRIPT = """(() => {
  window.fired = 0;
  for (const name of ['setTimeout', 'requestAnimationFrame', 'setInterval']) {
    const real = window[name].bind(window);
    window[name] = (run, ...more) => real((...args) => { window.fired += 1; return run(...args); }, ...more);
  }
})()"""


@pytest.mark.bench
@pytest.mark.xdist_group("bench")
def test_an_idle_room_costs_no_timers(arrive: Arrive, relay: Relay) -> None:
    ann = arrive("chromium")
    assert isinstance(ann, PlaywrightUser)
    ann.do(lambda: ann.context.add_init_script(TIMERS_SCRIPT))
    make_room(ann, relay)
    is_connected(ann)
    ann.js("new Promise((go) => { const done = setTimeout; setTimeout(() => { window.fired = 0; go(); }, 3000); })")
    ann.js("new Promise((go) => setTimeout(go, 10000))")
    fired = ann.js("window.fired") - 1  # the one that ended the wait
    show("timers fired in 10 s of an idle room", fired, "setTimeout, setInterval, animation frames")
    assert fired <= 1


@pytest.mark.bench
@pytest.mark.xdist_group("bench")
def test_fifty_thousand_messages_are_searched_at_once(search: Node) -> None:
    """CPU time of node, which is V8 as in Chromium."""
    begun = search_seconds(search)
    search.call("Cases.many", 50_000)
    built = search_seconds(search)
    search.call("Cases.again", 20)
    show(
        "ms of CPU a search in 50,000 messages",
        (search_seconds(search) - built) * 1000 / 20,
        f"reading them {built - begun:.2f} s without opening their seals",
    )


def search_seconds(search: Node) -> float:
    fields = Path(f"/proc/{search.process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.bench
@pytest.mark.xdist_group("bench")
def test_the_page_travels_compressed(relay: Relay) -> None:
    packed = relay.get("/", Accept_Encoding="gzip")
    assert packed.fields["content-encoding"] == "gzip"
    raw = len(PAGE.read_bytes())
    show("page compressed / raw", len(packed.body) / raw, f"{len(packed.body):,} / {raw:,} bytes")


@pytest.mark.bench
@pytest.mark.xdist_group("bench")
def test_ten_thousand_messages_open_as_quickly_as_a_hundred(arrive: Arrive, relay: Relay) -> None:
    short, long = (open_long_room(arrive("chromium"), relay, count) for count in (100, 10_000))
    show("opening a room of 10,000 messages / of 100", long / short, f"{long:.2f} s / {short:.2f} s")
    assert long < 2


FLOOD = 1000
# what holds a page up while messages come and somebody types: tasks of 50 ms and more, and from a key to the next frame
WATCH_FRAMES_SCRIPT = """((box, log) => {
  window.long = [];
  window.keys = [];
  new PerformanceObserver((list) => list.getEntries().forEach((e) => long.push(e.duration))).observe({type: 'longtask'});
  const type = setInterval(() => {
    const begun = performance.now();
    box.value += 'a';
    box.dispatchEvent(new InputEvent('input', {bubbles: true}));
    requestAnimationFrame(() => keys.push(performance.now() - begun));
  }, 100);
  new MutationObserver((_, watch) => {
    let last = log;
    while (last.lastElementChild && !last.matches('article, p')) last = last.lastElementChild;
    if (!last.textContent.includes('line %d')) return;
    clearInterval(type);
    watch.disconnect();
    requestAnimationFrame(() => setTimeout(() => { window.flooded = true; }, 100));
  }).observe(log, {childList: true, subtree: true});
})(%s)"""
BARE_FLOOD_SCRIPT = """(async () => {
  for (let n = 1; n <= %d; n += 1) {
    socket.send(new TextEncoder().encode(`line ${n}`));
    if (n %% 10 === 0) await new Promise((go) => setTimeout(go));
  }
})()"""
BARE_LOG_SCRIPT = """(() => {
  document.body.innerHTML = '<textarea></textarea><div><div></div></div>';
  socket.onmessage = ({data}) => {
    const line = document.createElement('p');
    line.textContent = new TextDecoder().decode(data);
    document.querySelector('div > div').append(line);
    scrollTo(0, document.body.scrollHeight);
  };
})()"""


def held_up(user: PlainPage) -> tuple[float, float]:
    """Milliseconds: the longest task, and from a key to the frame after it (p95)."""
    user.wait("window.flooded", 120)
    return max(user.js("long"), default=0.0), p95(user.js("keys"))


@pytest.mark.bench
@pytest.mark.xdist_group("bench")
def test_a_thousand_messages_come_in_without_holding_the_page_up(
    plain: PlainChromium, relay: Relay, bare: BarePageServer
) -> None:
    sender, receiver = plain.page(bare.url()), plain.page(bare.url())
    for user in (sender, receiver):
        user.js(BARE_SCRIPT)
    receiver.js(BARE_LOG_SCRIPT)
    receiver.js(WATCH_FRAMES_SCRIPT % (FLOOD, "document.querySelector('textarea'), document.querySelector('div')"))
    sender.js(BARE_FLOOD_SCRIPT % FLOOD)
    bare_task, bare_key = held_up(receiver)
    ann, bob = gathered(plain, relay.url(), relay.url())
    bob.js(WATCH_FRAMES_SCRIPT % (FLOOD, "document.getElementById('text'), document.getElementById('thread')"))
    fill_room(ann, FLOOD)
    task, key = held_up(bob)
    show(f"{FLOOD} messages come in: longest task, ms", task, f"appending bare paragraphs {bare_task:.0f} ms")
    show("key to frame meanwhile, p95, sealed / bare", key / bare_key, f"{key:.0f} ms / {bare_key:.0f} ms")


# the room at work is caught where a piece of work ends; then it lets in 98 people at once, and a second device of 50
CROWD_SCRIPT = """(async (size, linked) => {
  const {me, s} = desk, zero = Room.ZERO;
  window.crowd ??= [];
  await desk.enqueue(async () => {
    for (let n = 0; n < size; n += 1) {
      const f = await Notary.newMe(me.room, null), by = linked ? crowd[n] : null, inv_id = Suite.random(16);
      const member = (by ?? f).member, leaf = f.leaves.get(1), dev = Bytes.unhex(f.dev);
      const m = Wire.enc.consent({room: me.room, member: Bytes.unhex(member), dev, inv_id});
      const sponsor = by && Wire.enc.sponsor(
        {room: me.room, member: Bytes.unhex(member), sponsor_dev: Bytes.unhex(by.dev), dev, inv_id});
      s.want.set(f.dev, {dev: f.dev, sigpub: Bytes.hex(f.sig.pub), member, inv_id: Bytes.hex(inv_id),
        consent: Bytes.hex(await Suite.sign(f.sig, 'consent', m)), sponsor: by ? Bytes.hex(by.sig.pub) : '0'.repeat(130),
        sponsor_sig: by ? Bytes.hex(await Suite.sign(by.sig, 'sponsor', sponsor)) : '0'.repeat(128),
        from: null, expiry: Date.now() + 3600000, psk: Suite.random(32), joinct: Suite.random(32), request: zero, name: '',
        leaf: {no: 1, signed: leaf.signed, sigpub: Bytes.hex(f.sig.pub), kempub: leaf.pair.pub, hash: leaf.hash}});
      crowd.push(f);
    }
  });
})(%s)"""
PLAIN_SEALS_SCRIPT = """(async () => {
  const to = await crypto.subtle.generateKey({name: 'ECDH', namedCurve: 'P-256'}, false, ['deriveBits']), begun = Date.now();
  await Promise.all(Array.from({length: 149}, async () => {
    const own = await crypto.subtle.generateKey({name: 'ECDH', namedCurve: 'P-256'}, false, ['deriveBits']);
    const bits = await crypto.subtle.deriveBits({name: 'ECDH', public: to.publicKey}, own.privateKey, 256);
    const key = await crypto.subtle.importKey('raw', bits, 'AES-GCM', false, ['encrypt']);
    await crypto.subtle.encrypt({name: 'AES-GCM', iv: new Uint8Array(12)}, key, new Uint8Array(32));
  }));
  return Date.now() - begun;
})()"""
COMMITS_SCRIPT = """(() => {
  const {prototype} = Desk.Desk, {commit} = prototype;
  window.heads = [];
  prototype.commit = async function (b) {
    await commit.call(this, b);
    window.desk = this;
    if (this.s.head && window.heads.at(-1)?.ch !== this.s.head.ch) window.heads.push({ch: this.s.head.ch, at: Date.now()});
  };
})()"""


@pytest.mark.bench
@pytest.mark.xdist_group("bench")
def test_a_commit_of_150_devices_is_sealed_sent_and_opened_in_a_moment(arrive: Arrive, relay: Relay) -> None:
    ann, bob = meet(arrive, relay, "chromium")
    for user in (ann, bob):
        user.js(COMMITS_SCRIPT)
        user.js("Session.dispatch({do: 'rename', name: 'Somebody'}).then(() => 0)")
        user.wait("window.desk && desk.s.head && desk.s.link.live")
    for crowd, size in (("98, false", 100), ("50, true", 150)):
        ann.js(CROWD_SCRIPT % crowd)
        for user in (ann, bob):
            user.wait(f"desk.s.head.devices.size === {size}", 60)
    times, bare = [], []
    for number in range(ROUNDS):
        before = ann.js("desk.s.head.ch")
        bare.append(float(ann.js(PLAIN_SEALS_SCRIPT)) / 1000)
        begun = ann.js(
            f"(() => {{ const at = Date.now(); Session.dispatch({{do: 'policy', rotate_after: {200 + number}}}); return at; }})()"
        )
        ends = [user.wait(f"heads.at(-1).ch !== '{before}' && heads.at(-1).at", 60) for user in (ann, bob)]
        times.append((max(ends) - begun) / 1000)
    link_ = make_link(ann)
    cleo = arrive("chromium")
    cleo.goto(relay.url())
    cleo.find("button", "New room").appears()
    cleo.js(COMMITS_SCRIPT)
    begun = cleo.js(
        f"Session.dispatch({{do: 'link', text: {json.dumps(link_)}}})"
        ".then(() => { const at = Date.now(); Session.dispatch({do: 'join', name: 'Cleo'}); return at; })"
    )
    joined = (cleo.wait("window.heads.length && heads[0].at", 60) - begun) / 1000
    plain, sealed = statistics.median(bare), statistics.median(times)
    show(
        "commit to 150 devices of 100 members until opened / 149 bare seals",
        sealed / plain,
        f"{sealed:.2f} s / {plain:.2f} s; a join {joined:.2f} s",
    )
    assert sealed <= 1.5
    assert joined <= 1.5
