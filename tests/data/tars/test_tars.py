"""Tars read strictly: formats that tools write, patterns, an error for what is not a whole tar."""

from __future__ import annotations

import io
import os
import random
import shutil
import subprocess
import sys
import tarfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from repa.data.errors import RepaError
from repa.data.tars.names import expand_tars, is_stream, names_tars, present_tars
from repa.data.tars.reader import TarReader, open_tar, split_member

FILES = {
    "a/1.jpg": b"x" * 700,
    "a/1.cls": b"3",
    "empty.txt": b"",
    f"{'d' * 60}/{'e' * 60}/{'f' * 90}.png": b"long" * 200,
    f"{'g' * 130}.json": b"{}",
    "ü/ß.webp": b"y" * 512,
}


def tar(files: dict[str, bytes], form: int = tarfile.PAX_FORMAT, mtime: float = 0) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=form) as file:
        folder = tarfile.TarInfo("a")
        folder.type = tarfile.DIRTYPE
        file.addfile(folder)
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(content), mtime
            file.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def contents(reader: TarReader) -> dict[str, bytes]:
    return {member.name: reader.read() for member in reader}


@pytest.mark.parametrize(
    ("form", "mtime"), [(tarfile.PAX_FORMAT, 0), (tarfile.PAX_FORMAT, 1.5), (tarfile.GNU_FORMAT, 0)]
)
def test_members_are_those_of_tarfile(tmp_path: Path, form: int, mtime: float) -> None:
    path = tmp_path / "a.tar"
    data = tar(FILES, form, mtime)
    path.write_bytes(data)
    with open_tar(str(path)) as reader:
        assert contents(reader) == FILES
    with open_tar(str(path)) as reader:  # by offset, and content skipped
        for member in reader:
            assert data[member.offset : member.offset + member.size] == FILES[member.name]
    with open_tar(f"pipe:cat '{path}'") as reader:
        assert contents(reader) == FILES
    with open_tar(f"pipe:cat '{path}'") as reader:
        assert [member.name for member in reader] == list(FILES)


def test_gnu_tar_and_ustar_prefixes_are_read(tmp_path: Path) -> None:
    for name, content in FILES.items():
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(content)
    for kind in ("gnu", "pax", "ustar", "v7"):
        names = [name for name in FILES if kind != "v7" or len(name) < 90]
        names = [name for name in names if kind != "ustar" or len(name) < 100 or "/" in name]
        path = tmp_path / f"{kind}.tar"
        subprocess.run(
            ["tar", f"--format={kind}", "-cf", path, "-C", tmp_path / "in", *names],
            check=True,
            capture_output=True,
        )
        with open_tar(str(path)) as reader:
            assert contents(reader) == {name: FILES[name] for name in names}, kind


def test_sizes_in_base_256(tmp_path: Path) -> None:
    data = bytearray(tar({"a.bin": b"z" * 600}))
    header = data[512:1024]  # after the folder's
    header[124:136] = b"\x80" + (600).to_bytes(11, "big")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    data[512:1024] = header
    assert contents(TarReader(io.BytesIO(data), "x")) == {"a.bin": b"z" * 600}


@pytest.mark.parametrize("stream", [False, True])
def test_every_cut_is_noticed(tmp_path: Path, stream: bool) -> None:
    data = tar({"a.jpg": b"x" * 700, "a.cls": b"1"})
    end = 512 + 512 + 1024 + 512 + 512
    members = {1024: "", 1024 + 700: ", in a.jpg,", 2048 + 512: ", after a.jpg,", 2561: ", in a.cls,"}
    path = tmp_path / "cut.tar"
    for length in (*range(0, end, 256), end - 1, end):
        path.write_bytes(data[:length])
        place = f"pipe:cat '{path}'" if stream else str(path)
        with (
            pytest.raises(RepaError, match=r"cut off|is empty|is no tar") as caught,
            open_tar(place) as reader,
        ):
            contents(reader)
        assert "\n" not in str(caught.value)
        assert str(path) in str(caught.value)
        said = next((what for stop, what in members.items() if length < stop), ", after a.cls,")
        assert said in str(caught.value)


def test_damage_is_noticed_where_tarfile_takes_it_for_the_end(tmp_path: Path) -> None:
    data = bytearray(tar({"a.jpg": b"x" * 700, "a.cls": b"1"}))
    data[512 + 512 + 1024 + 3] ^= 1
    path = tmp_path / "bad.tar"
    path.write_bytes(data)
    with tarfile.open(path) as file:
        assert file.getnames() == ["a", "a.jpg"]
    with (
        pytest.raises(RepaError, match=r"bad\.tar is damaged at byte 2048, after a\.jpg"),
        open_tar(str(path)) as reader,
    ):
        contents(reader)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("what", ["joined by cat", "a hole"])
def test_nothing_follows_an_end_mark_unseen(tmp_path: Path, what: str, stream: bool) -> None:
    """What tarfile, and webdataset with it, would leave out without a word."""
    if what == "a hole":
        data = bytearray(tar({"a.jpg": b"x" * 700, "a.cls": b"1"}))
        data[2048:3072] = bytes(1024)
        data[3072:3584] = tar({"b.cls": b"2"})[:512]
    else:
        data = bytearray(tar({"a.jpg": b"x" * 700}) + tar({"b.jpg": b"y"}))
    path = tmp_path / "more.tar"
    path.write_bytes(data)
    with tarfile.open(path) as file:
        assert file.getnames() == ["a", "a.jpg"]
    place = f"pipe:cat '{path}'" if stream else str(path)
    with (
        pytest.raises(RepaError, match=r"more\.tar.* goes on after an end mark at byte 2048, after a\.jpg"),
        open_tar(place) as reader,
    ):
        contents(reader)


@pytest.mark.parametrize("value", ["-5", "7x", ""])
def test_a_size_in_pax_records_that_is_none_is_damage(tmp_path: Path, value: str) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as file:
        info = tarfile.TarInfo("a.jpg")
        info.size, info.pax_headers = 3, {"size": value}
        file.addfile(info, io.BytesIO(b"abc"))
    with pytest.raises(RepaError, match=r"x\.tar is damaged at byte 1536"), open_tar(str(path)) as reader:
        list(reader)


@pytest.mark.parametrize("form", ["gnu", "pax"])
def test_a_sparse_file_is_said_to_be_one(tmp_path: Path, form: str) -> None:
    with (tmp_path / "a.jpg").open("wb") as file:
        file.write(b"x" * 4096)
        file.truncate(1 << 20)
        file.seek(1 << 20)
        file.write(b"y" * 4096)
    subprocess.run(["tar", f"--format={form}", "--sparse", "-cf", "s.tar", "a.jpg"], cwd=tmp_path, check=True)
    if (tmp_path / "s.tar").stat().st_size > 1 << 20:
        pytest.skip("this file system has no holes")
    with (
        pytest.raises(RepaError, match=r"holds .*a\.jpg as a sparse file, .*without --sparse"),
        open_tar(str(tmp_path / "s.tar")) as reader,
    ):
        list(reader)


@pytest.mark.parametrize(("mode", "program"), [("w:gz", "gzip"), ("w:xz", "xz"), ("w:bz2", "bzip2")])
def test_a_compressed_tar_is_said_to_be_one(tmp_path: Path, mode: str, program: str) -> None:
    path = tmp_path / "x.tar"
    noise = random.Random(0).randbytes(5000)
    with tarfile.open(path, mode) as file:  # type: ignore[call-overload]
        info = tarfile.TarInfo("a.jpg")
        info.size = len(noise)
        file.addfile(info, io.BytesIO(noise))
    with (
        pytest.raises(RepaError, match=f"is compressed by {program}; unpack it with {program} -d"),
        open_tar(str(path)) as reader,
    ):
        list(reader)


def test_what_is_no_tar_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    for content, what in ((b"no tar" * 500, "no tar"), (b"", "empty")):
        path.write_bytes(content)
        with pytest.raises(RepaError, match=what), open_tar(str(path)) as reader:
            list(reader)
    with pytest.raises(RepaError, match="No such file"), open_tar(str(tmp_path / "none.tar")) as reader:
        list(reader)
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as file:
        link = tarfile.TarInfo("b.jpg")
        link.type, link.linkname = tarfile.LNKTYPE, "a.jpg"
        file.addfile(link)
    with pytest.raises(RepaError, match=r"b\.jpg as a link"):
        list(TarReader(io.BytesIO(stream.getvalue()), "x"))


def test_a_command_that_fails_is_one_line(tmp_path: Path) -> None:
    whole = io.BytesIO(tar({"a.jpg": b"x" * 700}))
    half = tmp_path / "half.tar"
    half.write_bytes(whole.getvalue()[:1500])
    for place, what in (
        ("pipe:false", "status 1"),
        ("pipe:exit 3", "status 3"),
        (f"pipe:cat '{half}'; exit 18", r"status 18, in a\.jpg;"),
        ("nonsense://x/y.tar", "no gopen handler"),
    ):
        with pytest.raises(RepaError, match=what) as caught, open_tar(place) as reader:
            list(reader)
        assert str(caught.value).startswith(f"cannot read {place}: ")
        assert "\n" not in str(caught.value)
    # a whole tar of a command that fails all the same
    path = tmp_path / "a.tar"
    path.write_bytes(whole.getvalue())
    with pytest.raises(RepaError, match="status 5"), open_tar(f"pipe:cat '{path}'; exit 5") as reader:
        list(reader)


def test_through_http(tmp_path: Path) -> None:
    if shutil.which("curl") is None:
        pytest.skip("webdataset opens URLs by curl")
    (tmp_path / "a.tar").write_bytes(tar(FILES))

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            with open_tar(f"http://127.0.0.1:{server.server_port}/a.tar") as reader:
                assert contents(reader) == FILES
            with (
                pytest.raises(RepaError, match=r"none\.tar: its command ended with status 22"),
                open_tar(f"http://127.0.0.1:{server.server_port}/none.tar") as reader,
            ):
                contents(reader)
        finally:
            server.shutdown()
            thread.join()


def test_without_webdataset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "webdataset.gopen", None)
    with pytest.raises(RepaError, match=r"pip install 'repa\[tars\]'"), open_tar("pipe:cat x.tar"):
        pass


def test_who_stops_early_breaks_no_pipe(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(tar({f"{number}.bin": bytes(50_000) for number in range(40)}))
    with open_tar(f"pipe:cat '{path}'") as reader:
        assert next(iter(reader)).name == "0.bin"


def test_patterns_are_those_of_a_shell(tmp_path: Path) -> None:
    assert expand_tars("t-{0008..0011}.tar") == ["t-0008.tar", "t-0009.tar", "t-0010.tar", "t-0011.tar"]
    assert expand_tars("{a,b}/{2..0}.tar") == [
        "a/2.tar",
        "a/1.tar",
        "a/0.tar",
        "b/2.tar",
        "b/1.tar",
        "b/0.tar",
    ]
    assert expand_tars("{0..10}.tar")[:2] == ["0.tar", "1.tar"]
    assert expand_tars("{x}.tar") == ["{x}.tar"]
    assert expand_tars("pipe:cat *{1..2}.tar") == ["pipe:cat *1.tar", "pipe:cat *2.tar"]
    for name in ("b", "a", "c"):
        (tmp_path / f"{name}.tar").touch()
    assert expand_tars(f"{tmp_path}/*.tar") == [f"{tmp_path}/{name}.tar" for name in "abc"]
    assert expand_tars(f"{tmp_path}/[ab].tar") == [f"{tmp_path}/{name}.tar" for name in "ab"]
    for pattern, what in (
        (f"{tmp_path}/*.zip", "no tar matches"),
        ("{1,1}.tar", "names 1.tar twice"),
        ("{0..99999999}.tar", "more than"),
        ("{0..9999}{0..9999}.tar", "more than"),
    ):
        with pytest.raises(RepaError, match=what):
            expand_tars(pattern)


def test_a_file_that_is_named_as_a_pipe_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pipe:touch owned;.tar").touch()
    assert expand_tars("*.tar") == ["./pipe:touch owned;.tar"]
    assert not is_stream(expand_tars("*.tar")[0])


def test_what_names_tars(tmp_path: Path) -> None:
    (tmp_path / "folder.tar").mkdir()
    assert names_tars("a/train-{0..3}.tar")
    assert names_tars("*.tar")
    assert all(names_tars(f"x.{end}") for end in ("tar.gz", "tgz", "tar.xz", "tar.bz2", "tar.zst"))
    assert names_tars("pipe:aws s3 cp s3://b/x.tar -")
    assert names_tars("https://host/x-{0..3}.tar?key=1")
    assert not names_tars("s3://bucket/cache")
    assert not names_tars(str(tmp_path / "folder.tar"))
    assert not names_tars("images")
    assert is_stream("pipe:cat x")
    assert not is_stream("C/x.tar")


def test_keys_are_those_of_webdataset() -> None:
    from webdataset.tariterators import base_plus_ext

    for name in ("a.jpg", "x.y/a.b.JPG", "./a/b.cls", "noext", "dir.d/noext", ".hidden", "a/.x.y"):
        base, field = base_plus_ext(name)
        assert split_member(name) == (None if base is None else (base, field.lower()))
    assert split_member("__repa__/shard.json") is None


def test_a_tar_that_is_no_file_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.tar")
    with pytest.raises(RepaError, match="named pipe"):
        present_tars(str(tmp_path / "a.tar"))
    with pytest.raises(RepaError, match="named pipe"), open_tar(str(tmp_path / "a.tar")):
        pass


def test_ranges_that_no_number_counts() -> None:
    for pattern in (f"a-{{0..{'9' * 5000}}}.tar", f"a-{{{'0' * 5000}1..2}}.tar", "a-{0..999999999}.tar"):
        with pytest.raises(RepaError) as caught:
            expand_tars(pattern)
        assert len(str(caught.value)) < 300
