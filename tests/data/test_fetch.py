"""`bench data fetch` against a server on this machine."""

from __future__ import annotations

import functools
import hashlib
import io
import tarfile
import threading
from http.server import HTTPServer, SimpleHTTPRequestHandler

import pytest
import yaml
from typer.testing import CliRunner

from bench.cli import app

CARD = {
    "name": "own", "title": "My own data", "licence": "free", "homepage": "https://example.org", "image_size": [32, 32],
    "image": "{id}.jpg", "splits": {"train": "train.txt", "val": "val.txt"}, "tasks": {"depth": {"path": "{id}.npy"}},
}  # fmt: skip


class Server(SimpleHTTPRequestHandler):
    """Serves ranges, notes them, and can break off in the middle."""

    ranges: list[str | None] = []
    break_after: int | None = None

    def log_message(self, *args):
        pass

    def do_GET(self):
        path = self.translate_path(self.path)
        asked = self.headers.get("Range")
        type(self).ranges.append(asked)
        try:
            with open(path, "rb") as file:
                content = file.read()
        except OSError:
            return self.send_error(404)
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked else 0
        if start >= len(content):
            return self.send_error(416)
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self.wfile.write(content[start:][: type(self).break_after])


@pytest.fixture
def server(tmp_path):
    Server.ranges, Server.break_after = [], None
    (tmp_path / "www").mkdir()
    running = HTTPServer(("127.0.0.1", 0), functools.partial(Server, directory=str(tmp_path / "www")))
    thread = threading.Thread(target=running.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{running.server_port}"
    running.shutdown()
    running.server_close()


@pytest.fixture
def archive(tmp_path, server):
    """(members) -> a .tgz on the server."""

    def make(members=(("OWN_MT/train.txt", b"a"), ("OWN_MT/images/a.jpg", b"x" * 3000)), link=None):
        path = tmp_path / "www" / "OWN_MT.tgz"
        with tarfile.open(path, "w:gz", compresslevel=0) as out:
            for name, content in members:
                member = tarfile.TarInfo(name)
                member.size = len(content)
                out.addfile(member, io.BytesIO(content))
            if link:
                member = tarfile.TarInfo("OWN_MT/link")
                member.type, member.linkname = tarfile.SYMTYPE, link
                out.addfile(member)
        return path

    return make


def run(tmp_path, server, **fetch):
    settings = {"url": f"{server}/OWN_MT.tgz", "folder": "OWN_MT"} | fetch
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(CARD | {"fetch": settings}))
    return CliRunner().invoke(app, ["data", "fetch", str(tmp_path / "own.yaml"), "--to", str(tmp_path / "data")])


def test_download_verify_and_unpack(tmp_path, server, archive):
    digest = hashlib.sha256(archive().read_bytes()).hexdigest()
    done = run(tmp_path, server, sha256=digest)
    assert done.exit_code == 0, done.output
    assert (tmp_path / "data/OWN_MT/images/a.jpg").read_bytes() == b"x" * 3000
    assert f"use it with --data-root {tmp_path}/data/OWN_MT" in done.output and "as the card says" in done.output
    assert "licence: free" in done.output
    left = {path.name for path in (tmp_path / "data").iterdir()}
    assert left == {"OWN_MT", "OWN_MT.tgz", "OWN_MT.tgz.sha256"}


def test_a_checksum_that_nobody_knows_is_recorded(tmp_path, server, archive):
    digest = hashlib.sha256(archive().read_bytes()).hexdigest()
    done = run(tmp_path, server)
    assert done.exit_code == 0 and f"SHA-256 {digest} (the card knows none" in done.output
    assert (tmp_path / "data/OWN_MT.tgz.sha256").read_text() == f"{digest}  OWN_MT.tgz\n"


def test_another_checksum_is_not_unpacked(tmp_path, server, archive):
    archive()
    done = run(tmp_path, server, sha256="0" * 64)
    assert done.exit_code == 2 and "not the card's 000" in done.output
    assert not (tmp_path / "data/OWN_MT").exists()


def test_a_broken_download_goes_on_where_it_stopped(tmp_path, server, archive):
    size = archive().stat().st_size
    Server.break_after = 1000
    done = run(tmp_path, server)
    assert done.exit_code == 2 and f"broke off after 1000 of {size} bytes" in " ".join(done.output.split())
    Server.break_after = None
    assert run(tmp_path, server).exit_code == 0
    assert Server.ranges == [None, "bytes=1000-"]
    assert (tmp_path / "data/OWN_MT/train.txt").read_bytes() == b"a"


def test_what_is_there_is_not_fetched_again(tmp_path, server, archive):
    archive()
    assert run(tmp_path, server).exit_code == 0
    done = run(tmp_path, server)
    assert done.exit_code == 2 and "is there already" in done.output and len(Server.ranges) == 1


@pytest.mark.parametrize(
    ("members", "link"),
    [
        ([("OWN_MT/a", b"a"), ("../evil.txt", b"b")], None),
        ([("OWN_MT/a", b"a"), ("OWN_MT/../../evil.txt", b"b")], None),
        ([("OWN_MT/a", b"a")], "/etc/passwd"),
        ([("OWN_MT/a", b"a")], "../../outside"),
    ],
)
def test_an_archive_that_reaches_outside_is_not_unpacked(tmp_path, server, archive, members, link):
    archive(members, link)
    done = run(tmp_path, server)
    assert (
        done.exit_code == 2
        and "OWN_MT.tgz is not unpacked, do not trust it: " in done.output
        and "Traceback" not in done.output
    )
    assert not list(tmp_path.rglob("evil.txt")) and not (tmp_path / "data/OWN_MT").exists()


def test_a_page_in_place_of_an_archive_is_one_line(tmp_path, server, archive):
    archive().write_bytes(b"<html>not found</html>")
    done = run(tmp_path, server)
    assert done.exit_code == 2 and "is damaged or no tar archive" in done.output
    assert done.output.splitlines()[-1].startswith("error: ")


def test_a_damaged_archive_and_one_of_something_else(tmp_path, server, archive):
    path = archive()
    path.write_bytes(path.read_bytes()[:900])
    done = run(tmp_path, server)
    assert done.exit_code == 2 and "is damaged" in done.output
    (tmp_path / "data/OWN_MT.tgz").unlink()
    archive([("OTHER/a", b"a")])
    done = run(tmp_path, server)
    assert done.exit_code == 2 and "has no folder OWN_MT; it holds OTHER" in done.output
    assert not (tmp_path / "data/OTHER").exists()


def test_an_address_that_is_gone(tmp_path, server):
    done = run(tmp_path, server)
    assert done.exit_code == 2 and "answers 404" in done.output and "is the address still right?" in done.output
    done = run(tmp_path, "http://127.0.0.1:9")
    assert done.exit_code == 2 and "cannot reach http://127.0.0.1:9/OWN_MT.tgz" in " ".join(done.output.split())


def test_the_manual_step_is_explained(tmp_path, server):
    done = run(tmp_path, server, url="", folder="", manual="ask the authors for a link")
    assert (
        done.exit_code == 2 and "own cannot be fetched: ask the authors for a link (https://example.org)" in done.output
    )
    done = CliRunner().invoke(app, ["data", "fetch", "scenes"])
    assert done.exit_code == 2 and "nothing to fetch" in done.output


@pytest.mark.parametrize(
    "fetch", [{"folder": "../x"}, {"folder": "a/b"}, {"folder": ""}, {"sha256": "abc"}, {"manual": "both"}]
)
def test_a_card_whose_fetch_makes_no_sense(tmp_path, server, fetch):
    done = run(tmp_path, server, **fetch)
    assert done.exit_code == 2 and "own.yaml" in done.output and "fetch" in done.output
