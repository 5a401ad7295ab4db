"""Byte ranges of files behind URLs: one request, one answer.

Knows protocols, not archives, and does not try again. http and https are spoken here, since only then can each answer be held
to what was asked: the range, and the state of the file. All other schemes are fsspec's, whose answers tell no state: it is asked
for after each range, which costs a second request.
"""

import atexit
import base64
import http.client
import os
import re
import ssl
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import PurePosixPath
from typing import Any, NamedTuple, Protocol
from urllib.parse import quote, unquote, urljoin, urlsplit, urlunsplit
from urllib.request import getproxies, proxy_bypass

TIMEOUT_S = 20.0
"""Without a byte, and of a connection: servers and balancers that are alive answer within a few seconds."""
LEAST_BYTES_PER_SECOND = 64 << 10
"""Below this, after TIMEOUT_S, an answer is given up: a piece of 4 MiB would take a minute; another connection may do better."""
IDLE = 16
"""Connections that are kept for a server: twice the threads that read."""
REDIRECTS = 5
PIECE_BYTES = 256 << 10
"""Taken off a connection at once."""
SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
STATES = ("ETag", "etag", "md5", "content_md5", "mtime", "LastModified", "last_modified", "updated", "created")
"""What fsspec's file systems call the state of a file, the surest first."""
MOVED = (301, 302, 303, 307, 308)
BUSY = (408, 425, 429)
"""Below 500, and no fault of the request."""


class Pin(NamedTuple):
    """One state of a file: its size, and what its server tells it by, an ETag or the date of its last change."""

    url: str
    size_bytes: int
    state: str

    @property
    def name(self) -> str:
        """The last part of its path."""
        return PurePosixPath(unquote(urlsplit(self.url).path)).name


class Refused(OSError):  # noqa: N818 (an answer, not a fault of this program)
    """An answer that another try would not change."""


class Absent(Refused):
    """There is no such file."""


class Broken(OSError):  # noqa: N818
    """An answer that was no good, or ended early: `found` bytes of it came; wait_s: how long the server asks to be left alone."""

    def __init__(self, why: str, *, found: int = 0, wait_s: float = 0.0) -> None:
        super().__init__(why)
        self.found, self.wait_s = found, wait_s


class Transport(Protocol):
    """Reads files of some schemes; any number of threads may. name: what it is called."""

    name: str

    def pin(self, url: str) -> Pin:
        """Ask for size and state of a file. Raises Refused, and other OSErrors for what may go better later."""

    def read(self, pin: Pin, start: int, out: memoryview) -> None:
        """Read bytes from `start` on, which are there, until `out` is full. Raises Broken with how many came, Refused, other OSErrors."""


def is_url(text: str) -> bool:
    """Tell a URL from a path."""
    return SCHEME.match(text) is not None


def beside(url: str, name: str) -> str:
    """Give the URL of the file `name` in the folder `url`; what stands behind a question mark goes with each request."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc, f"{parts.path.rstrip('/')}/{quote(name)}", parts.query, ""))


def shown(url: str) -> str:
    """Give a URL as it may be shown and kept: without user, password and signature."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def check_same(pin: Pin, now: Pin) -> None:
    """Raise Refused where a file is `now` in another state than the one that is pinned."""
    if now != pin:
        raise Refused(f"it was changed since it was opened: {now[1]:,} bytes of state {now[2]}, not {pin[1]:,} of {pin[2]}; open it anew")


def transport_for(url: str) -> Transport:
    """Give what reads `url`. Raises ImportError naming what to install, ValueError for an unknown scheme."""
    scheme = SCHEME.match(url)
    if scheme is None:
        raise ValueError(f"{url} is no URL, expected one such as https://host/archive or s3://bucket/archive")
    return Http() if scheme[1].lower() in ("http", "https") else Fsspec(url)


class Http:
    """http and https, in ranges."""

    name = "http"

    def pin(self, url: str) -> Pin:
        """Ask for the first byte: the answer tells the size, the state, and whether the server gives ranges."""
        with _answer(url, 0, 0) as response:
            size = _size(response)
            state = _state(response)
            if not state:
                raise Refused("the server tells neither ETag nor Last-Modified of it: a changed file could not be told from this one")
            _fill(response, memoryview(bytearray(min(size, 1))))
        return Pin(url, size, state)

    def read(self, pin: Pin, start: int, out: memoryview) -> None:
        """Read a range, whose answer must be of the state that is pinned."""
        last = start + len(out) - 1
        with _answer(pin.url, start, last) as response:
            check_same(pin, Pin(pin.url, _size(response), _state(response)))
            given = response.headers.get("Content-Range", "").split("/")[0]
            if given != f"bytes {start}-{last}":
                raise Broken(f"the server gives {given!r}, asked for 'bytes {start}-{last}'")
            _fill(response, out)


def _fill(response: http.client.HTTPResponse, out: memoryview) -> None:
    """Take the answer until `out` is full. Raises Broken."""
    found, end = 0, time.monotonic() + TIMEOUT_S + len(out) / LEAST_BYTES_PER_SECOND
    while found < len(out):
        try:
            piece = response.read1(min(PIECE_BYTES, len(out) - found))
        except (OSError, http.client.HTTPException) as error:
            raise Broken(f"{type(error).__name__}: {error}", found=found) from error
        if not piece:
            raise Broken(f"the answer ended after {found:,} of {len(out):,} bytes", found=found)
        out[found : found + len(piece)] = piece
        found += len(piece)
        if found < len(out) and time.monotonic() > end:
            raise Broken(f"{found:,} of {len(out):,} bytes came, slower than {LEAST_BYTES_PER_SECOND:,} a second", found=found)


def _size(response: http.client.HTTPResponse) -> int:
    """Tell the size of a file of which a range came. Raises Refused, Absent, Broken for an answer that is none."""
    status, given = response.status, response.headers.get("Content-Range", "")
    if response.headers.get("Content-Encoding", "identity") != "identity":
        raise Refused(f"the server gives it compressed ({response.headers['Content-Encoding']}), as no range can be read")
    total = given.rpartition("/")[2]
    if status == 206 and total.isdecimal():
        return int(total)
    if (status == 416 and total == "0") or (status == 200 and response.headers.get("Content-Length") == "0"):
        return 0
    if status in (200, 206):
        raise Refused(f"the server answers {status} with Content-Range {given!r}: it gives no ranges, only the whole; use one that does")
    why = f"the server answers {status} {response.reason}"
    if status in (404, 410):
        raise Absent(why)
    if status in BUSY or status >= 500:
        after = response.headers.get("Retry-After", "")
        raise Broken(why, wait_s=float(after) if after.isdecimal() else 0.0)
    raise Refused(f"{why}, of {total} bytes" if status == 416 else why)


def _state(response: http.client.HTTPResponse) -> str:
    return response.headers.get("ETag") or response.headers.get("Last-Modified") or ""


@contextmanager
def _answer(url: str, first: int, last: int) -> Iterator[http.client.HTTPResponse]:
    """Ask for bytes first..last, wherever redirects lead. Raises Refused, and other OSErrors."""
    headers = {"Range": f"bytes={first}-{last}", "Accept-Encoding": "identity", "User-Agent": "scdl_gpu"}
    for _ in range(REDIRECTS + 1):
        with _exchange(url, headers) as response:
            if response.status not in MOVED:
                yield response
                return
            there = urljoin(url, response.headers.get("Location", ""))
        if not there.startswith("https://") and not (there.startswith("http://") and url.startswith("http://")):
            raise Refused(f"the server redirects to {shown(there)}, which is not followed")
        url = there
    raise Refused(f"the server redirects more than {REDIRECTS} times")


class _Server(NamedTuple):
    """Whom connections lead to; they stay with the process that made them. address: host and port, as the URL has them."""

    pid: int
    scheme: str
    host: str
    port: int
    address: str


class _Line(NamedTuple):
    """A connection. prefix: what a request over it puts before the path: nothing, or of a proxy the server's address."""

    connection: http.client.HTTPConnection
    prefix: str


_idle: dict[_Server, deque[_Line]] = {}


def hang_up() -> None:
    """Close the connections of this process that are kept and not in use; done when it ends."""
    for server in [server for server in _idle if server.pid == os.getpid()]:
        for line in _idle.pop(server):
            line.connection.close()


@contextmanager
def _exchange(url: str, headers: dict[str, str]) -> Iterator[http.client.HTTPResponse]:
    """Send one request and give its answer; the connection is kept where that was read to its end."""
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    server = _Server(os.getpid(), parts.scheme, parts.hostname or "", port, parts.netloc.rpartition("@")[2])
    target = urlunsplit(("", "", parts.path or "/", parts.query, ""))
    if parts.username is not None:
        secret = f"{unquote(parts.username)}:{unquote(parts.password or '')}".encode()
        headers = headers | {"Authorization": f"Basic {base64.b64encode(secret).decode()}"}
    line, response = _ask(server, target, headers)
    is_kept = False
    try:
        yield response
        if response.length == 0 and not response.will_close:
            response.read()  # nothing is left of it, and the connection is told so
            if not _idle:
                atexit.register(hang_up)
            is_kept = len(_idle.setdefault(server, deque())) < IDLE
    finally:
        response.close()
        if is_kept:
            _idle.setdefault(server, deque()).append(line)
        else:
            line.connection.close()


def _ask(server: _Server, target: str, headers: dict[str, str]) -> tuple[_Line, http.client.HTTPResponse]:
    """Send a request over a connection that was kept, or, where the server closed those meanwhile, over a new one."""
    while True:
        try:
            line, is_new = _idle[server].pop(), False
        except (KeyError, IndexError):
            line, is_new = _connected(server), True
        try:
            line.connection.request("GET", line.prefix + target, headers=headers)
            return line, line.connection.getresponse()
        except TimeoutError as error:
            line.connection.close()
            raise Broken(f"no answer within {TIMEOUT_S:g} s") from error
        except ssl.SSLCertVerificationError as error:
            line.connection.close()
            raise Refused(str(error)) from error
        except (OSError, http.client.HTTPException) as error:
            line.connection.close()
            if is_new:
                raise Broken(f"{type(error).__name__}: {error}") from error


def _connected(server: _Server) -> _Line:
    """Make a connection, through the proxy that the environment names for the scheme, if it does."""
    via = None if proxy_bypass(server.address) else getproxies().get(server.scheme)
    proxy = None if via is None else urlsplit(via if "//" in via else f"//{via}")
    host, port = (server.host, server.port) if proxy is None else (proxy.hostname or "", proxy.port or 80)
    if server.scheme == "http":
        return _Line(http.client.HTTPConnection(host, port, timeout=TIMEOUT_S), "" if proxy is None else f"http://{server.address}")
    connection = http.client.HTTPSConnection(host, port, timeout=TIMEOUT_S, context=_context())
    if proxy is not None:
        connection.set_tunnel(server.host, server.port)
    return _Line(connection, "")


@cache
def _context() -> ssl.SSLContext:
    return ssl.create_default_context()


class Fsspec:
    """Any scheme that fsspec knows."""

    def __init__(self, url: str) -> None:
        import fsspec

        scheme = urlsplit(url).scheme
        try:
            fs, _ = fsspec.core.url_to_fs(url, use_listings_cache=False)
        except ImportError as error:
            raise ImportError(f"{scheme}:// needs a package that is not there ({error}); for s3: '.[remote]' of a checkout") from error
        self._fs: Any = fs
        self.name = f"fsspec {fsspec.__version__} ({scheme})"

    def pin(self, url: str) -> Pin:
        """Ask for the facts of the file."""
        with _told():
            info = self._fs.info(self._fs._strip_protocol(url))
        size, state = info.get("size"), next((str(info[name]) for name in STATES if info.get(name) is not None), "")
        if info.get("type") == "directory":
            raise Absent("it is a directory")
        if type(size) is not int or not state:
            raise Refused(f"{self.name} does not tell its size and its state: a changed file could not be told from this one")
        return Pin(url, size, state)

    def read(self, pin: Pin, start: int, out: memoryview) -> None:
        """Read a range, and see whether the file is still the one that is pinned."""
        with _told():
            found = self._fs.cat_file(self._fs._strip_protocol(pin.url), start=start, end=start + len(out))
        check_same(pin, self.pin(pin.url))
        out[: len(found)] = found[: len(out)]
        if len(found) != len(out):
            raise Broken(f"{len(found):,} of {len(out):,} bytes came", found=min(len(found), len(out)))


@contextmanager
def _told() -> Iterator[None]:
    """Sort the errors of file systems; those of their libraries are no OSErrors, and are known once those are loaded."""
    names = (("botocore.exceptions", "BotoCoreError"), ("aiohttp", "ClientError"))
    faults: tuple[type[Exception], ...] = (OSError, *(getattr(sys.modules[name], kind) for name, kind in names if name in sys.modules))
    try:
        yield
    except (FileNotFoundError, IsADirectoryError) as error:
        raise Absent(str(error) or "there is no such file") from error
    except PermissionError as error:
        raise Refused(str(error) or "access is denied") from error
    except faults as error:
        raise Broken(f"{type(error).__name__}: {error}") from error
