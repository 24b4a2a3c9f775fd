"""A real S3 server (moto's) on loopback, and what puts a cache into its bucket."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from ports import free_port

obstore = pytest.importorskip("obstore")
pytest.importorskip("moto")
pytest.importorskip("flask")

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def s3_server() -> Iterator[str]:
    """The address of a server of its own process, when it answers."""
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            while True:
                assert process.poll() is None, "the server has ended"
                try:
                    socket.create_connection(("127.0.0.1", port)).close()
                    break
                except ConnectionRefusedError:
                    time.sleep(0.05)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()


def empty(address: str) -> None:
    """Leave a server with nothing but an empty bucket ``bucket``."""
    for path, method in (("moto-api/reset", "POST"), ("bucket", "PUT")):
        urllib.request.urlopen(urllib.request.Request(f"{address}/{path}", method=method)).close()


def lead_to(patch: pytest.MonkeyPatch, address: str) -> None:
    """Set the environment variables of a client of that server, which is not asked for long if it is away."""
    patch.setattr("repa.data.storage.object_store._RETRIES", 2)
    patch.setenv("AWS_ACCESS_KEY_ID", "key")
    patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    patch.setenv("AWS_REGION", "us-east-1")
    patch.setenv("AWS_ENDPOINT_URL", address)
    patch.setenv("AWS_ALLOW_HTTP", "true")


def unfinished_uploads(address: str, root: object) -> list[str]:
    """The names of objects below an address whose uploads are neither completed nor aborted."""
    import boto3

    prefix = str(root).removeprefix("s3://bucket/")
    client = boto3.client("s3", endpoint_url=address, region_name="us-east-1")
    found = client.list_multipart_uploads(Bucket="bucket").get("Uploads", [])
    return [each["Key"] for each in found if each["Key"].startswith(prefix)]


def objects_of(url: str) -> dict[str, bytes]:
    """Name → bytes of every object of a prefix."""
    store = obstore.store.from_url(url)
    names = [each["path"] for page in obstore.list(store) for each in page]
    return {name: bytes(obstore.get(store, name).bytes()) for name in names}


def upload(path: Path, url: str) -> Any:
    """Copy a folder into a bucket, file by file; the store of its prefix."""
    store = obstore.store.from_url(url)
    for file in path.rglob("*"):
        if file.is_file():
            obstore.put(store, str(file.relative_to(path)), file.read_bytes())
    return store
