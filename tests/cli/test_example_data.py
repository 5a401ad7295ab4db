"""A file comes whole, checked, and under its name only then, from a server that breaks in every way that servers do."""

import errno
import hashlib
import json
import os
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import write_h5ad

from scdl_gpu.cli import download, example_data
from scdl_gpu.errors import SourceError

CONTENT = bytes(os.urandom(1000)) * 3001
OTHER = CONTENT[::-1]


@dataclass
class Server:
    """What a server has and how it fails. status: 0 is no answer.

    cut: bytes of the body after which the connection breaks, for one answer each.
    """

    content: bytes = CONTENT
    etag: str | None = '"first"'
    ranges: bool = True
    status: int | None = None
    short: int = 0
    cut: list[int] = field(default_factory=list)
    url: str = ""
    requests: list[dict[str, str]] = field(default_factory=list)
    sent: int = 0


def handler_of(server: Server) -> type[BaseHTTPRequestHandler]:
    """Make the handler that answers as `server` says."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            """Say nothing."""

        def do_GET(self) -> None:
            """Answer with the content, or the rest of it."""
            server.requests.append(dict(self.headers.items()))
            if server.status == 0:
                self.close_connection = True
                return
            if server.status is not None:
                self.send_error(server.status)
                return
            asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
            goes_on = asked is not None and server.ranges and self.headers.get("If-Range") == server.etag
            start = int(asked[1]) if asked and goes_on else 0
            self.send_response(206 if goes_on else 200)
            if goes_on:
                self.send_header("Content-Range", f"bytes {start}-{len(server.content) - 1}/{len(server.content)}")
            if server.etag:
                self.send_header("ETag", server.etag)
            self.send_header("Content-Length", str(len(server.content) - start))
            self.end_headers()
            body = server.content[start : len(server.content) - server.short]
            if server.cut:
                body = body[: server.cut.pop(0)]
            self.wfile.write(body)
            server.sent += len(body)

    return Handler


@pytest.fixture
def server() -> Iterator[Server]:
    """Give a server on this machine."""
    state = Server()
    http = ThreadingHTTPServer(("127.0.0.1", 0), handler_of(state))
    state.url = f"http://127.0.0.1:{http.server_port}/file"
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield state
    http.shutdown()
    http.server_close()
    thread.join()


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait for nothing between attempts, and read small blocks."""
    monkeypatch.setattr(download, "WAIT_SECONDS", 0.0)
    monkeypatch.setattr(download, "BLOCK_BYTES", 10_000)


def leave_part(target: Path, content: bytes, url: str, etag: str = '"first"') -> None:
    """Leave what an interrupted download leaves."""
    target.with_name(f"{target.name}.part").write_bytes(content)
    note = {"url": url, "validator": etag, "size_bytes": len(CONTENT)}
    target.with_name(f"{target.name}.part.json").write_text(json.dumps(note))


def test_file_comes_whole(server: Server, tmp_path: Path) -> None:
    """The file is what the server has, under its name, and nothing lies beside it; progress ends at its size."""
    told: list[tuple[int, int | None]] = []
    digest = hashlib.sha256(CONTENT).hexdigest()

    path = download.download(
        server.url, tmp_path / "new" / "x", size_bytes=len(CONTENT), sha256=digest.upper(), progress=lambda *n: told.append(n)
    )

    assert path.read_bytes() == CONTENT
    assert [file.name for file in path.parent.iterdir()] == ["x"]
    assert told[-1] == (len(CONTENT), len(CONTENT))


def test_broken_connections_are_gone_on_with(server: Server, tmp_path: Path) -> None:
    """Connections that break part way are followed by requests for the rest; no byte is sent twice that had come."""
    server.cut = [1_000_000, 0, 700_000, 1]

    download.download(server.url, tmp_path / "x")

    assert (tmp_path / "x").read_bytes() == CONTENT
    assert server.sent == len(CONTENT)
    assert [request.get("Range") for request in server.requests] == [
        None,
        "bytes=1000000-",
        "bytes=1000000-",
        "bytes=1700000-",
        "bytes=1700001-",
    ]
    assert {request["If-Range"] for request in server.requests[1:]} == {'"first"'}


def test_download_goes_on_in_another_process(server: Server, tmp_path: Path) -> None:
    """What an earlier call left is gone on with."""
    leave_part(tmp_path / "x", CONTENT[:2_000_000], server.url)

    download.download(server.url, tmp_path / "x")

    assert (tmp_path / "x").read_bytes() == CONTENT
    assert server.sent == len(CONTENT) - 2_000_000


def test_complete_part_is_not_fetched_again(server: Server, tmp_path: Path) -> None:
    """A part that has all bytes of its version is put in place without a request."""
    leave_part(tmp_path / "x", CONTENT, server.url)

    download.download(server.url, tmp_path / "x")

    assert (tmp_path / "x").read_bytes() == CONTENT
    assert server.requests == []


@pytest.mark.parametrize("change", ["etag", "no ranges", "no etag", "another address", "damaged note"])
def test_part_of_another_version_is_begun_anew(server: Server, tmp_path: Path, change: str) -> None:
    """Where the server has another version, knows no ranges or no version, or the part is of something else, all is fetched."""
    leave_part(tmp_path / "x", OTHER[:2_000_000], server.url if change != "another address" else "http://elsewhere/x")
    if change == "etag":
        server.etag = '"second"'
    if change == "no ranges":
        server.ranges = False
    if change == "no etag":
        server.etag = None
    if change == "damaged note":
        (tmp_path / "x.part.json").write_text("{")

    download.download(server.url, tmp_path / "x")

    assert (tmp_path / "x").read_bytes() == CONTENT
    assert server.sent == len(CONTENT)


def test_server_without_ranges_that_breaks_is_asked_anew(server: Server, tmp_path: Path) -> None:
    """Without ranges a broken connection begins at the front, and the file is right all the same."""
    server.ranges, server.cut = False, [1_000_000, 2_000_000]

    download.download(server.url, tmp_path / "x")

    assert (tmp_path / "x").read_bytes() == CONTENT


def test_weak_etag_is_not_trusted(server: Server, tmp_path: Path) -> None:
    """A weak ETag promises no equal bytes: nothing is resumed by it."""
    server.etag, server.cut = 'W/"first"', [1_000_000]

    download.download(server.url, tmp_path / "x")

    assert (tmp_path / "x").read_bytes() == CONTENT
    assert [request.get("Range") for request in server.requests] == [None, None]


def test_body_that_stays_short_is_an_error(server: Server, tmp_path: Path) -> None:
    """A server that never sends the last bytes is given up on, and what came is kept for another time."""
    server.short = 10

    with pytest.raises(SourceError, match=r"ended after 3,000,990 of 3,001,000 bytes|broke after 3,000,990 bytes.*kept"):
        download.download(server.url, tmp_path / "x")

    assert not (tmp_path / "x").exists()
    assert (tmp_path / "x.part").read_bytes() == CONTENT[:-10]
    server.short = 0
    download.download(server.url, tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == CONTENT


@pytest.mark.parametrize("wanted", [{"sha256": "0" * 64}, {"size_bytes": 5}])
def test_wrong_file_is_refused_and_removed(server: Server, tmp_path: Path, wanted: dict) -> None:
    """Another checksum or size than the known one is refused, and nothing is left to go on with."""
    with pytest.raises(SourceError, match=r"SHA-256 \w+, expected 0{64}|3,001,000 bytes, expected 5"):
        download.download(server.url, tmp_path / "x", **wanted)

    assert list(tmp_path.iterdir()) == []


def test_missing_file_is_named(server: Server, tmp_path: Path) -> None:
    """404 is not asked twice; the error has the address and what it means."""
    server.status = 404

    with pytest.raises(SourceError, match=rf"^{server.url}: the server answers 404 Not Found; the file has moved or is gone$"):
        download.download(server.url, tmp_path / "x")

    assert len(server.requests) == 1


@pytest.mark.parametrize(("status", "said"), [(503, "answers 503 Service Unavailable"), (0, r"no answer \(.*\)")])
def test_busy_server_is_asked_again(server: Server, tmp_path: Path, status: int, said: str) -> None:
    """A 503, or no answer at all, is asked again as a broken connection is, then named."""
    server.status = status

    with pytest.raises(SourceError, match=f"{said}, 5 times"):
        download.download(server.url, tmp_path / "x")

    assert len(server.requests) == download.ATTEMPTS


@pytest.mark.parametrize(
    ("url", "said"),
    [("http://127.0.0.1:9/x", "no connection"), ("http://no-such-host.invalid/x", "no connection"), ("ftp://x/y", "http://")],
)
def test_no_network_is_named(tmp_path: Path, url: str, said: str) -> None:
    """A server that cannot be reached, and an address that is none, are named with the way out."""
    with pytest.raises(SourceError, match=said):
        download.download(url, tmp_path / "x")

    assert not (tmp_path / "x").exists()


def test_full_disk_is_named_and_gone_on_with(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that fills up is named; what came is kept, and gone on with when there is space."""
    real = os.pwrite

    def fill(fd: int, data: bytes, offset: int) -> int:
        if offset >= 2_000_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", fill)

    with pytest.raises(SourceError, match=r"x: cannot be written \(No space left on device\); free space"):
        download.download(server.url, tmp_path / "x")

    monkeypatch.setattr(os, "pwrite", real)
    download.download(server.url, tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == CONTENT
    assert "Range" in server.requests[-1]


def test_second_process_is_refused(server: Server, tmp_path: Path) -> None:
    """Two that fetch to one place would mix their bytes: the second is refused."""
    with (
        (tmp_path / "x.part").open("ab") as file,
        download._alone(file.fileno(), tmp_path),
        pytest.raises(SourceError, match="another process"),
    ):
        download.download(server.url, tmp_path / "x")


@pytest.fixture
def example(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Server:
    """Give a server with a small h5ad, whose counts are what the command expects."""
    monkeypatch.setattr(example_data, "N_CELLS", 60)
    monkeypatch.setattr(example_data, "N_GENES", 40)
    server.content = write_h5ad(tmp_path / "source.h5ad").read_bytes()
    return server


def test_command_fetches_and_checks(run: Callable, example: Server, tmp_path: Path) -> None:
    """The command fetches the file, records its size and checksum, names the next command; a second time it fetches nothing."""
    out = tmp_path / "out"
    digest = hashlib.sha256(example.content).hexdigest()

    first, second = (run("example-data", out, "--url", example.url) for _ in range(2))

    path = out / example_data.NAME
    assert (first.exit_code, second.exit_code) == (0, 0), first.stderr + second.stderr
    assert path.read_bytes() == example.content
    assert json.loads(path.with_suffix(".json").read_text()) == {"url": example.url, "size_bytes": len(example.content), "sha256": digest}
    assert f"scdl-gpu convert {path} cells" in first.stdout
    assert f"{digest} (none is published" in first.stdout
    assert first.stdout == second.stdout
    assert len(example.requests) == 1


@pytest.mark.parametrize("content", ["not HDF5", "other counts"])
def test_command_refuses_another_file(run: Callable, example: Server, tmp_path: Path, content: str) -> None:
    """What is no h5ad, or has other cells and genes, is refused in one line and removed."""
    example.content = b"<html>log in</html>" if content == "not HDF5" else write_h5ad(tmp_path / "other.h5ad", 61).read_bytes()

    result = run("example-data", tmp_path / "out", "--url", example.url)

    assert result.exit_code == 1
    assert re.fullmatch(r"error: .*(not an HDF5 file|no h5ad|HDF5|61 cells x 40 genes, expected 60 x 40).*\n", result.stderr), result.stderr
    assert list((tmp_path / "out").iterdir()) == []


def test_command_compares_a_checksum(run: Callable, example: Server, tmp_path: Path) -> None:
    """A checksum that was asked for is compared, of a file that comes and of one that is there."""
    wrong = run("example-data", tmp_path / "out", "--url", example.url, "--sha256", "0" * 64)
    run("example-data", tmp_path / "out", "--url", example.url)

    there = run("example-data", tmp_path / "out", "--url", example.url, "--sha256", "1" * 64)

    assert (wrong.exit_code, there.exit_code) == (1, 1)
    assert "expected " + "0" * 64 in wrong.stderr
    assert "expected " + "1" * 64 in there.stderr


def test_defaults_are_the_reference_example() -> None:
    """The address and counts are those of bionemo-scdl's README: 25,382 x 34,455 are 874,536,810 values."""
    assert example_data.N_CELLS * example_data.N_GENES == 874_536_810
    assert example_data.URL.endswith("/97e96fb1-8caf-4f08-9174-27308eabd4ea.h5ad")
