"""Archives: what is damaged, cut off or leads elsewhere leaves nothing behind."""

import contextlib
import hashlib
import http.server
import io
import tarfile
import threading
import zipfile

import pytest

from cat.data.sets.archives import ArchiveError, download, unpack

CONTENT = bytes(range(256)) * 1000


def zipped(path, *names):
    with zipfile.ZipFile(path, "w") as file:
        for name in names:
            file.writestr(name, CONTENT)
    return path


def tarred(path, *members, mode="w:gz"):
    with tarfile.open(path, mode) as file:
        for member in members:
            info = tarfile.TarInfo(member) if isinstance(member, str) else member
            info.size = len(CONTENT) if info.isreg() else 0
            file.addfile(info, io.BytesIO(CONTENT))
    return path


def link(name, target, kind=tarfile.SYMTYPE):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def unpacked(archive, folder, check=lambda folder: None):
    unpack(archive, folder, check, progress=False)
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("mode", ["zip", "w", "w:gz", "w:bz2", "w:xz"])
def test_what_is_in_it(tmp_path, mode):
    names = ("a/b.wav", "a/c/d.wav", "./e.wav")
    archive = tmp_path / "archive"
    zipped(archive, *names) if mode == "zip" else tarred(archive, *names, mode=mode)
    assert unpacked(archive, tmp_path / "out") == {"a/b.wav": CONTENT, "a/c/d.wav": CONTENT, "e.wav": CONTENT}


@pytest.mark.parametrize(
    "make",
    [
        lambda path: zipped(path, "a.wav", "../b.wav"),
        lambda path: zipped(path, "a.wav", "/tmp/b.wav"),
        lambda path: zipped(path, "a.wav", "c\\..\\b.wav"),
        lambda path: tarred(path, "a.wav", "../b.wav"),
        lambda path: tarred(path, "a.wav", link("b", "../..")),
        lambda path: tarred(path, "a.wav", link("b", "/etc/passwd", tarfile.LNKTYPE)),
        lambda path: tarred(path, "a.wav", link("b", "", tarfile.FIFOTYPE)),
    ],
)
def test_what_leads_out_of_it(tmp_path, make):
    archive = make(tmp_path / "archive")
    with pytest.raises(ArchiveError, match="it is not the archive of"):
        unpacked(archive, tmp_path / "place/out")
    assert list((tmp_path / "place").iterdir()) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["archive", "place"]


@pytest.mark.parametrize("kind", ["zip", "tar.gz", "tar"])
@pytest.mark.parametrize("damage", ["cut", "flipped", "nothing", "text"])
def test_a_damaged_one(tmp_path, kind, damage):
    archive = tmp_path / f"archive.{kind}"
    names = ("a.wav", "b.wav")
    zipped(archive, *names) if kind == "zip" else tarred(archive, *names, mode="w" if kind == "tar" else "w:gz")
    whole = archive.read_bytes()
    middle = 256512 if kind == "tar" else len(whole) // 2  # of a plain tar, the header of the second file
    damaged = {"cut": whole[: middle - 1000], "nothing": b"", "text": b"<html>not found</html>" * 100}
    damaged["flipped"] = (
        whole[:middle] + bytes(byte ^ 255 for byte in whole[middle : middle + 64]) + whole[middle + 64 :]
    )
    archive.write_bytes(damaged[damage])
    with pytest.raises(ArchiveError, match=rf"archive\.{kind}: .*; download it again$"):
        unpacked(archive, tmp_path / "place/out")
    assert list((tmp_path / "place").iterdir()) == []


def test_what_is_not_wanted_leaves_nothing(tmp_path):
    def check(folder):
        assert (folder / "a.wav").is_file()
        raise ValueError("not this one")

    with pytest.raises(ValueError, match="not this one"):
        unpacked(zipped(tmp_path / "archive", "a.wav"), tmp_path / "place/out", check)
    assert list((tmp_path / "place").iterdir()) == []


# --- downloads -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def server(answer):
    """A server on this machine that gives `answer(handler)` to every request; its address."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            answer(self)

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{running.server_address[1]}/a.zip"
        finally:
            running.shutdown()
            thread.join()


def give(content, announced=None):
    def answer(handler):
        handler.send_response(200)
        handler.send_header("Content-Length", str(announced or len(content)))
        handler.end_headers()
        handler.wfile.write(content)

    return answer


def test_a_download(tmp_path):
    with server(give(CONTENT)) as url:
        download(url, tmp_path / "a.zip", hashlib.sha256(CONTENT).hexdigest(), progress=True)
        assert (tmp_path / "a.zip").read_bytes() == CONTENT
        download(url, tmp_path / "b.zip", None, progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.zip", "b.zip"]


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (
            give(CONTENT, announced=len(CONTENT) + 1),
            r"the download broke off \(256000 of 256001 bytes came\); try again",
        ),
        (give(CONTENT[:-1]), r"its SHA-256 is [0-9a-f]{64}; expected .*\. Try again, or download it elsewhere"),
        (
            lambda handler: handler.send_error(404),
            r"cannot be downloaded \(Not Found\); download it elsewhere and give",
        ),
    ],
)
def test_half_a_download_never_looks_whole(tmp_path, answer, words):
    with server(answer) as url, pytest.raises(ArchiveError, match=words):
        download(url, tmp_path / "a.zip", hashlib.sha256(CONTENT).hexdigest(), progress=False)
    assert list(tmp_path.iterdir()) == []


def test_no_network(tmp_path):
    with pytest.raises(ArchiveError, match=r"cannot be downloaded .*; download it elsewhere and give its path"):
        download("http://127.0.0.1:9/a.zip", tmp_path / "a.zip", None, progress=False)
    assert list(tmp_path.iterdir()) == []
