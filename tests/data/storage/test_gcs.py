"""A cache in a bucket of Google Cloud Storage: a server on loopback that speaks as much of its XML API.

Source: cloud.google.com/storage/docs/xml-api, "GET Object" and "GET Bucket (List Objects)", version 2.
"""

from __future__ import annotations

import json
import threading
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

import numpy as np
import pytest
from repa.data.errors import CacheError, RepaError
from repa.data.format.columns import ColumnSpec
from repa.data.format.opening import read_keys
from repa.data.reading.loader import CacheLoader
from repa.data.reading.reader import CacheReader
from repa.data.storage.bucket import cache_path
from repa.data.testing import expected_row, synthetic_cache
from repa.data.upkeep.info import cache_info
from repa.data.upkeep.verify import verify_cache

pytest.importorskip("obstore")

if TYPE_CHECKING:
    from collections.abc import Iterator

COLUMNS = {
    "sd-vae/moments": ColumnSpec(shape=(8, 4, 4), dtype="float32"),
    "demo/patch": ColumnSpec(shape=(4, 16), dtype="float16"),
    "demo/cls": ColumnSpec(shape=(16,), dtype="float16", compressor="zstd"),
}
ROWS, INVALID, VIEWS = 45, {5: "text"}, ("original", "mirrored")
URL = "gs://bucket/some/cache"
PAGE = 7  # objects of an answer to a listing


class Bucket(BaseHTTPRequestHandler):
    """Objects of one bucket, by their names; those of ``denied`` may not be read."""

    protocol_version = "HTTP/1.1"
    wbufsize = 64 << 10  # an answer is one packet
    objects: ClassVar[dict[str, bytes]]
    denied: ClassVar[set[str]]

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        _, bucket, *name = url.path.split("/", 2)
        if bucket != "bucket":
            self.answer(404, b"")
        elif name:
            self.get(unquote(name[0]))
        else:
            self.list({key: values[0] for key, values in parse_qs(url.query).items()})

    def get(self, name: str) -> None:
        if name in self.denied or name not in self.objects:
            self.answer(403 if name in self.denied else 404, b"")
            return
        data = self.objects[name]
        asked = self.headers.get("Range")
        if asked is None:
            self.answer(200, data)
            return
        first, last = (int(end) for end in asked.removeprefix("bytes=").split("-"))
        part = data[first : last + 1]
        self.answer(206, part, {"Content-Range": f"bytes {first}-{first + len(part) - 1}/{len(data)}"})

    def list(self, query: dict[str, str]) -> None:
        assert query["list-type"] == "2"
        names = sorted(name for name in self.objects if name.startswith(query.get("prefix", "")))
        first = int(query.get("continuation-token", 0))
        rest = len(names) > first + PAGE
        contents = "".join(
            f"<Contents><Key>{escape(name)}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
            f'<ETag>"x"</ETag><Size>{len(self.objects[name])}</Size></Contents>'
            for name in names[first : first + PAGE]
        )
        token = f"<NextContinuationToken>{first + PAGE}</NextContinuationToken>" if rest else ""
        text = f"<ListBucketResult><IsTruncated>{str(rest).lower()}</IsTruncated>{token}{contents}"
        self.answer(200, f"{text}</ListBucketResult>".encode(), {"Content-Type": "application/xml"})

    def answer(self, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        own = {"Content-Length": str(len(data)), "ETag": '"x"', "Last-Modified": formatdate(0, usegmt=True)}
        for name, value in {**own, **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gcs") / "cache"
    synthetic_cache(path, num_rows=ROWS, columns=COLUMNS, invalid=INVALID, views=VIEWS)
    return path


@pytest.fixture
def bucket(local: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Bucket]]:
    """The cache in the bucket, and the environment that leads to it."""

    class Own(Bucket):
        objects: ClassVar = {
            f"some/cache/{file.relative_to(local)}": file.read_bytes()
            for file in local.rglob("*")
            if file.is_file()
        }
        denied: ClassVar = set()

    with ThreadingHTTPServer(("127.0.0.1", 0), Own) as server:
        server.daemon_threads = True  # a client keeps its connections
        server.block_on_close = False
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        account = {
            "gcs_base_url": f"http://127.0.0.1:{server.server_port}",
            "disable_oauth": True,
            "client_email": "",
            "private_key": "",
            "private_key_id": "",
        }
        monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT_KEY", json.dumps(account))
        try:
            yield Own
        finally:
            server.shutdown()
            thread.join()


def test_rows_are_those_of_the_folder_to_the_bit(bucket: type[Bucket], local: Path) -> None:
    reader, there = CacheReader(URL, list(COLUMNS)), CacheReader(local, list(COLUMNS))
    assert str(reader.path) == URL
    assert reader.manifest == there.manifest
    assert reader.labels.tolist() == there.labels.tolist()
    assert read_keys(reader.path, reader.manifest) == read_keys(local, there.manifest)
    for view in range(2):
        rows, views = reader.valid_rows, np.full(ROWS - 1, view)
        out = {name: np.empty((ROWS - 1, *spec.shape), spec.numpy_dtype) for name, spec in COLUMNS.items()}
        reader.read_rows(rows, list(COLUMNS), out, views=views)
        for name, spec in COLUMNS.items():
            for place, row in enumerate(rows.tolist()):
                expected = expected_row(name, row, spec, view=view)
                assert out[name][place].tobytes() == expected.tobytes()


def test_batches_info_and_verify(bucket: type[Bucket], local: Path) -> None:
    columns = ["sd-vae/moments", "demo/patch"]
    batches = []
    for place in (URL, local):
        reader = CacheReader(place, columns)
        loader = CacheLoader(
            reader, rows=reader.valid_rows, batch_size=12, last_image=36, columns_at=lambda step: columns
        )
        batches.append(list(loader))
    for ours, theirs in zip(*batches, strict=True):
        assert ours.rows.tolist() == theirs.rows.tolist()
        assert all(ours.columns[name].equal(theirs.columns[name]) for name in columns)
    ours, theirs = cache_info(cache_path(URL)), cache_info(local)
    assert (ours.sources, ours.total_bytes) == (theirs.sources, theirs.total_bytes)
    assert verify_cache(cache_path(URL)) == []
    bucket.objects.pop("some/cache/commits/demo/1.json")
    (finding,) = verify_cache(cache_path(URL))
    assert (finding.source, finding.shard) == ("demo", 1)
    assert "repa preprocess" in finding.remedy


def test_what_is_not_there_or_may_not_be_read_is_one_line(bucket: type[Bucket]) -> None:
    with pytest.raises(CacheError, match="there is no cache at gs://bucket/nothing"):
        CacheReader("gs://bucket/nothing", [])
    bucket.denied.add("some/cache/keys.txt")
    with pytest.raises(RepaError, match=rf"cannot read {URL}/keys.txt: .*the credentials") as caught:
        verify_cache(cache_path(URL))
    assert "\n" not in str(caught.value)
