"""One file over HTTP into a directory: resumed where it was left, checked, and there whole or not at all.

Knows HTTP as far as a large file needs it, from the standard library. What has come lies beside the target as NAME.part,
with NAME.part.json saying of which version it is (ETag, else Last-Modified, and the size): it is gone on with only where the
server confirms that version (If-Range), and begun anew where not. The price of trusting nobody: a checksum, where there is one,
is computed over the whole file at the end.
"""

import fcntl
import hashlib
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import Self

from scdl_gpu.errors import SourceError

BLOCK_BYTES = 1 << 20
ATTEMPTS = 5
"""Connections that may break one after the other without a byte between them."""
WAIT_SECONDS = 1.0
"""Before the second attempt, and twice as long before each further one."""
TIMEOUT_SECONDS = 30.0
PASSING = (408, 425, 429, 500, 502, 503, 504)
"""HTTP answers that may be another a moment later."""
AGAIN = "what has come is kept: run the command again to go on"

Progress = Callable[[int, int | None], None]
"""Told the bytes that are there, and of how many (None: the server does not say)."""


@dataclass(frozen=True, slots=True)
class Version:
    """Which version of a file a server has: its validator for If-Range, and its size."""

    url: str
    validator: str | None
    size_bytes: int | None

    @classmethod
    def of(cls, url: str, response: HTTPResponse) -> Self:
        """Read it from an answer. A weak ETag does not promise equal bytes, so it is none."""
        etag = response.headers.get("ETag")
        strong = etag if etag and not etag.startswith("W/") else None
        return cls(url, strong or response.headers.get("Last-Modified"), _whole_size(response))

    @classmethod
    def stored(cls, path: Path) -> Self | None:
        """Read what `store` has written, None where it is not there or no such thing."""
        try:
            return cls(**json.loads(path.read_text()))
        except (OSError, ValueError, TypeError):
            return None

    def store(self, path: Path) -> None:
        """Write it down."""
        path.write_text(json.dumps(asdict(self)))


class _BrokenError(Exception):
    """A connection that ended early, or an answer that may be another a moment later."""


def download(
    url: str, target: Path, *, size_bytes: int | None = None, sha256: str | None = None, progress: Progress = lambda *_: None
) -> Path:
    """Bring the file at `url` to `target`, going on with what an earlier call left; returns `target`.

    size_bytes, sha256: what the file must have, where that is known. Retries broken connections, each time from where it was.
    Raises SourceError naming what went wrong and the way out; then nothing is at `target`.
    """
    if not url.startswith(("http://", "https://")):
        raise SourceError(f"{url}: expected an address that begins with http:// or https://")
    part, note = (target.with_name(f"{target.name}{suffix}") for suffix in (".part", ".part.json"))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with part.open("ab") as file, _alone(file.fileno(), part):
            version = _fetch_all(url, part, note, progress)
            file.flush()
            _check(part, note, version, size_bytes, sha256)
            os.fsync(file.fileno())
            part.replace(target)
            note.unlink(missing_ok=True)
    except OSError as error:
        raise SourceError(
            f"{target}: cannot be written ({error.strerror or error}); free space or choose another directory; {AGAIN}"
        ) from error
    return target


@contextmanager
def _alone(fd: int, part: Path) -> Iterator[None]:
    """Keep a second process from writing to the same part."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise SourceError(f"{part}: another process is fetching it; wait for that, or choose another directory") from error
    yield


def _fetch_all(url: str, part: Path, note: Path, progress: Progress) -> Version:
    """Fetch until the file is complete; gives up after ATTEMPTS without a byte."""
    failures = 0
    while True:
        before = part.stat().st_size
        try:
            return _fetch(url, part, note, progress)
        except _BrokenError as error:
            failures = 1 if part.stat().st_size > before else failures + 1
            if failures >= ATTEMPTS:
                raise SourceError(f"{url}: {error}, {ATTEMPTS} times; check the network and proxies; {AGAIN}") from error
        time.sleep(WAIT_SECONDS * 2 ** (failures - 1))


def _fetch(url: str, part: Path, note: Path, progress: Progress) -> Version:
    """Ask once, from where `part` ends if it is of the version that the server has; raises _BrokenError where it ends early."""
    have, known = part.stat().st_size, Version.stored(note)
    headers = {"User-Agent": "scdl-gpu", "Accept-Encoding": "identity"}
    if have and known is not None and known.url == url and known.validator is not None:
        if have == known.size_bytes:
            return known
        headers |= {"Range": f"bytes={have}-", "If-Range": known.validator}
    with _open(urllib.request.Request(url, headers=headers)) as response:
        version = Version.of(url, response)
        goes_on = response.status == 206 and "Range" in headers and _begins_at(response, have)
        if response.status == 206 and not goes_on:
            raise SourceError(f"{url}: the server sent another range than it was asked for; remove {part} and run the command again")
        with part.open("r+b") as file:
            start = have if goes_on else 0
            file.truncate(start)
            version.store(note)
            _copy(response, file.fileno(), start, version.size_bytes, progress)
    return version


@contextmanager
def _open(request: urllib.request.Request) -> Iterator[HTTPResponse]:
    """Open an address; SourceError where trying again cannot help, _BrokenError where it can."""
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as response:
            yield response
    except urllib.error.HTTPError as error:
        if error.code in PASSING:
            raise _BrokenError(f"the server answers {error.code} {error.reason}") from error
        cure = "the file has moved or is gone" if error.code in (404, 410) else "see what the server wants"
        raise SourceError(f"{request.full_url}: the server answers {error.code} {error.reason}; {cure}") from error
    except urllib.error.URLError as error:
        raise _BrokenError(f"no connection ({getattr(error.reason, 'strerror', None) or error.reason})") from error
    except (HTTPException, ConnectionError, TimeoutError) as error:  # while the answer's head was awaited
        raise _BrokenError(f"no answer ({str(error) or type(error).__name__})") from error


def _copy(response: HTTPResponse, fd: int, start: int, size_bytes: int | None, progress: Progress) -> None:
    """Append the body at `start`; _BrokenError where it ends before `size_bytes`."""
    n = start
    progress(n, size_bytes)
    while True:
        try:
            block = response.read(BLOCK_BYTES)
        except (HTTPException, ConnectionError, TimeoutError) as error:
            raise _BrokenError(f"the connection broke after {n:,} bytes ({str(error) or type(error).__name__})") from error
        if not block:
            break
        written = 0
        while written < len(block):
            written += os.pwrite(fd, memoryview(block)[written:], n + written)
        n += len(block)
        progress(n, size_bytes)
    if size_bytes is not None and n < size_bytes:
        raise _BrokenError(f"the connection ended after {n:,} of {size_bytes:,} bytes")


def _check(part: Path, note: Path, version: Version, size_bytes: int | None, sha256: str | None) -> None:
    """Refuse a file of another size or checksum, and remove it: going on with it could not help."""
    found = part.stat().st_size
    faults = [
        f"has {found:,} bytes, expected {wanted:,} ({who})"
        for wanted, who in ((version.size_bytes, "says the server"), (size_bytes, "as it is known here"))
        if wanted is not None and wanted != found
    ]
    if sha256 is not None and not faults:
        with part.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        faults += [f"has SHA-256 {digest}, expected {sha256}"] if digest != sha256.lower() else []
    if faults:
        for path in (part, note):
            with suppress(FileNotFoundError):
                path.unlink()
        raise SourceError(f"{version.url}: what came {faults[0]}; the file was changed there, or damaged on the way: it was removed")


def _whole_size(response: HTTPResponse) -> int | None:
    """Return the size of the whole file, None where the answer does not tell."""
    if response.status == 206:
        total = response.headers.get("Content-Range", "").rpartition("/")[2]
    else:
        total = response.headers.get("Content-Length", "")
    return int(total) if total.isdigit() else None


def _begins_at(response: HTTPResponse, start: int) -> bool:
    return response.headers.get("Content-Range", "").startswith(f"bytes {start}-")
