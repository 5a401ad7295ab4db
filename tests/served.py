"""A server of files on this machine, which can be told to fail, for the tests of archives behind URLs.

It knows ranges and states of files as real servers do, and notes what it was asked for.
"""

import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

from scdl_gpu.transport import hang_up


class Asked(NamedTuple):
    """A request: path in the folder, first and last byte, and the headers."""

    name: str
    first: int
    last: int
    headers: dict[str, str]


class Server:
    """Serves `folder` at `url`. fault: asked of each request, gives the name of a fault, or None: see `Handler.fail`.

    asked: all requests, in their order. tags: of files, where it is not the time of their last change.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.fault: Callable[[Asked], str | None] = lambda _: None
        self.asked: list[Asked] = []
        self.tags: dict[str, str] = {}
        self._lock = threading.Lock()
        server = self

        class Bound(Handler):
            owner = server

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Bound)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self._thread.start()

    def note(self, asked: Asked) -> str | None:
        """Note a request; give the fault that it is to meet."""
        with self._lock:
            self.asked.append(asked)
            return self.fault(asked)

    def bytes_of(self, suffix: str) -> int:
        """Count the bytes that were asked for of files with this suffix."""
        return sum(asked.last - asked.first + 1 for asked in self.asked if asked.name.endswith(suffix))

    def close(self) -> None:
        """Stop."""
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()
        hang_up()


class Handler(BaseHTTPRequestHandler):
    """Answers one request after the other over a connection."""

    owner: Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else each answer waits for an acknowledgement, 40 ms

    def do_GET(self) -> None:
        """Give a range of a file."""
        name = unquote(urlsplit(self.path).path).strip("/")
        first, last = (int(at) for at in self.headers["Range"].removeprefix("bytes=").split("-"))
        fault = self.owner.note(Asked(name, first, last, dict(self.headers)))
        file = self.owner.folder / name
        if fault is not None and fault not in ("short", "reset", "trickle", "whole", "changed", "shifted", "gzip", "stateless"):
            self.refuse(fault)
        elif not file.is_file():
            self.answer(404, {}, b"")
        else:
            with file.open("rb") as stream:
                stream.seek(first)
                content = stream.read(last - first + 1)
            self.give(file, first, content, fault)

    def give(self, file: Path, first: int, content: bytes, fault: str | None) -> None:
        """Answer with bytes of a file, or with what a fault makes of them."""
        size = file.stat().st_size
        state = {"ETag": self.owner.tags.get(file.name, f'"{file.stat().st_mtime_ns}"')}
        if fault == "changed":
            state = {"ETag": '"other"'}
        if fault == "stateless":
            state = {}
        if fault == "gzip":
            state["Content-Encoding"] = "gzip"
        if fault == "whole":
            self.answer(200, state, file.read_bytes())
        elif not content:
            self.answer(416, state | {"Content-Range": f"bytes */{size}"}, b"")
        else:
            begin = first + (fault == "shifted")
            head = state | {"Content-Range": f"bytes {begin}-{begin + len(content) - 1}/{size}"}
            self.answer(206, head, content, fault=fault)

    def refuse(self, fault: str) -> None:
        """Answer without a file: a status, a status and Retry-After, a redirect, or nothing."""
        if fault == "hang up":
            self.close_connection = True
        elif fault == "silence":
            time.sleep(0.6)
            self.close_connection = True
        elif fault.startswith("to "):
            self.answer(302, {"Location": fault.removeprefix("to ")}, b"")
        else:
            status, _, wait = fault.partition(" ")
            self.answer(int(status), {"Retry-After": wait} if wait else {}, b"")

    def answer(self, status: int, head: dict[str, str], body: bytes, *, fault: str | None = None) -> None:
        """Send an answer; of its body only half where it is to be short, or reset, and slowly where it is to trickle."""
        self.send_response(status)
        for name, value in (head | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        try:
            if fault == "trickle":
                for at in range(0, len(body), 64):
                    self.wfile.write(body[at : at + 64])
                    time.sleep(0.02)
            elif fault in ("short", "reset"):
                self.wfile.write(body[: len(body) // 2])
                self.close_connection = True
                if fault == "reset":
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # an RST, not a FIN
                    self.connection.close()
            else:
                self.wfile.write(body)
        except OSError:  # the other side had enough of it
            self.close_connection = True

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@contextmanager
def serving(folder: Path) -> Iterator[Server]:
    """Serve a folder."""
    server = Server(folder)
    try:
        yield server
    finally:
        server.close()
