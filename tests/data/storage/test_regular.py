"""Files of others: what is no file is an error, and not waited for."""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING

import pytest
from repa.data.storage import descriptors
from repa.data.storage.descriptors import OpenFile
from repa.data.storage.regular import read_regular

if TYPE_CHECKING:
    from pathlib import Path


def test_files_and_links_to_files(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"bytes")
    (tmp_path / "link").symlink_to("file")
    assert read_regular(tmp_path / "link") == b"bytes"


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket"))
        for place in (tmp_path / "fifo", tmp_path / "socket", tmp_path, "/dev/zero"):
            descriptors = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc") else 0
            with pytest.raises(OSError, match=r"not a file|No such device"):
                read_regular(place)
            if descriptors:
                assert len(os.listdir("/proc/self/fd")) == descriptors


def test_a_fifo_in_the_place_of_a_cache_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    file = OpenFile(str(tmp_path / "fifo"))
    with pytest.raises(OSError, match="seek"):
        os.pread(file.descriptor, 1, 0)


def test_a_file_is_closed_after_the_names_of_its_module_are_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As at the end of an interpreter in which a traceback or a notebook still holds a cache."""
    (tmp_path / "file").write_bytes(b"1")
    file = OpenFile(str(tmp_path / "file"))
    descriptor = file.descriptor
    monkeypatch.setattr(descriptors, "os", None)
    file.__del__()
    monkeypatch.undo()
    with pytest.raises(OSError, match="descriptor"):
        os.fstat(descriptor)
    file.descriptor = -1
