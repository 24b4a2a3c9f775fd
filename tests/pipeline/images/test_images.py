"""Image sources: order, classes, fingerprints, pixel modes, and what happens to bad files."""

from __future__ import annotations

import hashlib
import os
import pickle
import struct
import sys
import zlib
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from repa.data.errors import RepaError
from repa.pipeline.images.base import ImageSource, UndecodableImage
from repa.pipeline.images.decode import decode_image
from repa.pipeline.images.folder import FolderImages
from repa.pipeline.images.open import open_source


def png(shade: int = 0, size: tuple[int, int] = (8, 8)) -> bytes:
    return encoded(Image.new("RGB", size, (shade, 255 - shade, 7)))


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    stream = BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def write(root: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def test_class_is_the_first_level_folder_and_rows_are_sorted(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "b/2.png": png(1),
            "b/deep/er/1.PNG": png(2),
            "a/z.JPEG": png(3),
            "a b/x.webp": png(4),
            "a/notes.txt": b"x",
            "a/._z.jpg": b"x",
            "a/.thumbs/z.jpg": b"x",
            "list.csv": b"x",
        },
    )
    source: ImageSource = FolderImages(tmp_path)
    assert source.keys == ["a b/x.webp", "a/z.JPEG", "b/2.png", "b/deep/er/1.PNG"]
    assert source.class_names == ("a", "a b", "b")
    assert source.labels.dtype == np.int32
    assert source.labels.tolist() == [1, 0, 2, 2]
    assert len(source) == 4
    assert [path for path, _ in source.skipped] == ["a/._z.jpg", "a/.thumbs", "a/notes.txt", "list.csv"]
    assert source.load(3).getpixel((0, 0)) == (2, 253, 7)
    assert (source.kind, source.name) == ("folder", str(tmp_path))


def test_a_flat_folder_is_one_class(tmp_path: Path) -> None:
    root = write(tmp_path / "pets", {"2.png": png(), "1.png": png(), "meta/info.txt": b"x"})
    source = FolderImages(root)
    assert source.keys == ["1.png", "2.png"]
    assert source.class_names == ("pets",)
    assert source.labels.tolist() == [0, 0]


def test_limit_is_evenly_spaced_and_keeps_the_labels_of_the_whole(tmp_path: Path) -> None:
    write(tmp_path, {f"{name}/{i}.png": png() for name in "abc" for i in range(4)})
    source = FolderImages(tmp_path, limit=5)
    # floor(i * 12 / 5) = 0 2 4 7 9
    assert source.keys == ["a/0.png", "a/2.png", "b/0.png", "b/3.png", "c/1.png"]
    assert source.labels.tolist() == [0, 0, 1, 1, 2]
    assert source.class_names == ("a", "b", "c")
    assert FolderImages(tmp_path, limit=12).keys == FolderImages(tmp_path, limit=99).keys
    assert FolderImages(tmp_path, limit=1).class_names == ("a", "b", "c")


def test_fingerprint_is_the_hash_of_key_label_and_bytes(tmp_path: Path) -> None:
    first, second = png(1), png(2, (9, 9))
    write(tmp_path, {"a/1.png": first, "é/2.png": second})
    lines = f"a/1.png\t0\t{len(first)}\né/2.png\t1\t{len(second)}\n"
    before = FolderImages(tmp_path).fingerprint
    assert before == f"sha256:{hashlib.sha256(lines.encode()).hexdigest()}"
    (tmp_path / "a/1.png").write_bytes(first + b"\0")
    assert FolderImages(tmp_path).fingerprint != before


def test_links_are_followed_and_cycles_are_not(tmp_path: Path) -> None:
    store = write(tmp_path / "store", {"cats/1.png": png(), "2.png": png(5)})
    root = write(tmp_path / "root", {"dogs/1.png": png()})
    (root / "cats").symlink_to(store / "cats")
    (root / "dogs" / "2.png").symlink_to(store / "2.png")
    (root / "dogs" / "up").symlink_to(root)
    source = FolderImages(root)
    assert source.keys == ["cats/1.png", "dogs/1.png", "dogs/2.png"]
    assert source.skipped == [("dogs/up", "link to a folder that contains it")]
    assert source.load(2).getpixel((0, 0)) == (5, 250, 7)
    (root / "dogs" / "gone.png").symlink_to(store / "nothing")
    with pytest.raises(RepaError, match=r"gone\.png is a broken link"):
        FolderImages(root)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a/1.txt": b"x"}, "has no images"),
        ({"a/1.png": b"x", "b/readme.md": b"x"}, "class folder .*b has no images"),
        ({"a/1.png": b"x", "2.png": b"x"}, r"has images \(2\.png, …\) beside folders"),
        ({"a/1\n2.png": b"x"}, "line break"),
        ({"a\rb/1.png": b"x"}, "line break"),
    ],
)
def test_bad_folders_are_one_line(tmp_path: Path, files: dict[str, bytes], message: str) -> None:
    with pytest.raises(RepaError, match=message) as error:
        FolderImages(write(tmp_path, files))
    assert "\n" not in str(error.value)


def test_bad_roots_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(RepaError, match="does not exist"):
        FolderImages(tmp_path / "nowhere")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(RepaError, match="is a file, not a folder"):
        FolderImages(tmp_path / "file")
    with pytest.raises(RepaError, match="--limit 0"):
        open_source(str(tmp_path), limit=0)
    write(tmp_path, {"a/1.png": png()})
    (tmp_path / "empty").mkdir()
    with pytest.raises(RepaError, match=r"class folder .*empty has no images"):
        FolderImages(tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="other file systems refuse such names")
def test_a_name_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path) + b"/a"
    os.mkdir(folder)
    with open(folder + b"/caf\xe9.png", "wb") as file:
        file.write(png())
    with pytest.raises(RepaError, match=r"b'a/caf\\xe9\.png' .* is not UTF-8"):
        FolderImages(tmp_path)


def test_files_that_cannot_be_read_stop_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = FolderImages(write(tmp_path, {"a/1.png": png(), "a/2.png": png()}))
    (tmp_path / "a/2.png").unlink()
    with pytest.raises(RepaError, match=r"2\.png has vanished"):
        source.load(1)

    # root may read anything, so permissions are taken away by hand
    def refuse(path: Path, most: int) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("repa.pipeline.images.folder.read_regular", refuse)
    with pytest.raises(RepaError, match=r"1\.png cannot be read \(Permission denied\)"):
        source.load(0)
    monkeypatch.undo()

    def refuse_listing(path: str) -> None:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "scandir", refuse_listing)
    with pytest.raises(RepaError, match=r"cannot be listed \(Permission denied\)"):
        FolderImages(tmp_path)


def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    root = write(tmp_path / "root", {"a/1.png": png(), "a/2.png": png()})
    source = FolderImages(root)
    os.mkfifo(root / "a/fifo.png")
    with pytest.raises(RepaError, match="named pipe"):
        FolderImages(root)
    (root / "a/fifo.png").rename(root / "a/2.png")  # after the folder was listed
    with pytest.raises(RepaError, match="named pipe"):
        source.load(1)
    (root / "a/2.png").unlink()
    (root / "a/2.png").symlink_to("/dev/zero")
    with pytest.raises(RepaError, match="a device"):
        FolderImages(root)
    with pytest.raises(RepaError, match="a device"):
        source.load(1)


def test_sources_travel_to_other_processes(tmp_path: Path) -> None:
    source = FolderImages(write(tmp_path, {"a/1.png": png(9)}))
    copy = pickle.loads(pickle.dumps(source))
    assert copy.keys == source.keys
    assert copy.load(0).getpixel((0, 0)) == (9, 246, 7)


def test_demo_is_a_source() -> None:
    source = open_source("demo", limit=24)
    assert (len(source), source.kind, list(source.skipped)) == (24, "demo", [])
    assert source.load(0).mode == "RGB"
    assert len(open_source("demo")) == 2048
    with pytest.raises(RepaError) as caught:
        open_source("demo", limit=10**12)
    assert caught.value.field == "--limit"


def deep_png(values: np.ndarray) -> bytes:
    """A PNG of 16 bits a channel, uint16 [H, W] grey or [H, W, 3] colour, written by hand (PNG 1.2, 4.1)."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = values.shape[:2]
    header = struct.pack(">IIBBBBB", width, height, 16, 2 if values.ndim == 3 else 0, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def test_16_bit_grey_keeps_its_high_byte_like_16_bit_colour() -> None:
    values = np.array([[0, 255, 256, 300], [32768, 40000, 65280, 65535]], dtype=np.uint16)
    expected = [[0, 0, 1, 1], [128, 156, 255, 255]]
    grey = np.asarray(decode_image(deep_png(values)))
    assert grey.shape == (2, 4, 3)
    assert grey[..., 0].tolist() == expected
    colour = np.asarray(decode_image(deep_png(np.stack([values] * 3, axis=2))))
    assert np.array_equal(grey, colour)


def noise(channels: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (8, 8, channels), dtype=np.uint8)


def test_grey_bilevel_and_alpha() -> None:
    grey = noise(1)[..., 0]
    repeated = np.stack([grey] * 3, axis=2)
    assert np.array_equal(decode_image(encoded(Image.fromarray(grey))), repeated)
    bilevel = Image.fromarray(grey).convert("1")
    assert np.array_equal(
        np.asarray(decode_image(encoded(bilevel)))[..., 0],
        np.where(np.asarray(bilevel), 255, 0),
    )
    # alpha is dropped: the colour under a transparent pixel shows
    four = noise(4)
    four[0, 0] = (10, 20, 30, 0)
    assert np.array_equal(decode_image(encoded(Image.fromarray(four))), four[..., :3])
    two = Image.merge("LA", (Image.fromarray(grey), Image.fromarray(four[..., 3])))
    assert np.array_equal(decode_image(encoded(two)), repeated)
    assert np.array_equal(
        decode_image(encoded(Image.fromarray(four), "WEBP", lossless=True, exact=True)), four[..., :3]
    )


def test_palette_with_transparency_keeps_its_colours() -> None:
    palette = Image.fromarray(noise(3)).quantize(16)
    expected = np.asarray(palette.convert("RGB"))
    for transparency in (3, bytes([0, 128, 255, 10])):
        assert np.array_equal(decode_image(encoded(palette, transparency=transparency)), expected)


def test_cmyk_is_pillows_plain_conversion() -> None:
    content = encoded(Image.frombytes("CMYK", (8, 8), noise(4).tobytes()), "JPEG")
    with Image.open(BytesIO(content)) as image:
        assert image.mode == "CMYK"
        assert np.array_equal(decode_image(content), image.convert("RGB"))


def test_exif_orientation_is_ignored_unless_asked_for() -> None:
    pixels = np.zeros((8, 16, 3), dtype=np.uint8)
    pixels[:, :8] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # turned a quarter clockwise to be seen upright
    content = encoded(Image.fromarray(pixels), "JPEG", exif=exif, quality=100)
    plain = np.asarray(decode_image(content))
    assert plain.shape == (8, 16, 3)
    turned = np.asarray(decode_image(content, apply_exif=True))
    assert np.array_equal(turned, np.rot90(plain, k=-1))


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "GIF"])
def test_animations_give_their_first_frame(kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    content = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    with Image.open(BytesIO(content)) as image:
        assert image.n_frames == 2
    assert decode_image(content).getpixel((4, 4)) == (255, 0, 0)


def test_the_content_decides_not_the_name(tmp_path: Path) -> None:
    source = FolderImages(write(tmp_path, {"a/really-a-png.JPEG": png(4)}))
    assert source.load(0).getpixel((0, 0)) == (4, 251, 7)


def jpeg() -> bytes:
    return encoded(
        Image.fromarray(np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)), "JPEG"
    )


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", r"^empty file \(0 bytes\)$"),
        (b"this is a text named .jpg", "^not a JPEG, PNG or WebP image$"),
        (b"<html>404</html>" * 100, "^not a JPEG, PNG or WebP image$"),
        (jpeg()[:700], "truncated"),
        (jpeg()[:30], None),
        (png(0, (64, 64))[:60], None),
        (encoded(Image.new("RGB", (64, 64)), "WEBP")[:30], None),
        (png(0, (64, 64))[:-20] + b"\0" * 20, None),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", "^not a JPEG, PNG or WebP image$"),
    ],
    ids=["empty", "text", "html", "cut", "head", "png-cut", "webp-cut", "png-zeroed", "eps"],
)
def test_broken_content_is_undecodable_for_a_short_reproducible_reason(
    content: bytes, reason: str | None
) -> None:
    reasons = set()
    for _ in range(2):
        with pytest.raises(UndecodableImage, match=reason) as error:
            decode_image(content)
        reasons.add(error.value.reason)
    (text,) = reasons
    assert 0 < len(text) <= 160
    assert "\n" not in text
    assert "0x" not in text


@pytest.mark.parametrize(
    "limit", [4000, 3000, 1000]
)  # a warning of Pillow's up to twice the limit, then an error
def test_decompression_bombs_are_undecodable(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    content = png(0, (64, 64))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(UndecodableImage, match=f"^more than {limit:,} pixels"):
        decode_image(content)
