"""Whether a rank may open as many files as its cache has, which is known before step 0."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...data.machine import open_files_allowed
from ...data.reading.reader import CacheReader

if TYPE_CHECKING:
    from .checked import Checked

LEAST_OPEN_FILES = 256
"""A rank without a shard has some dozens open, a training that saves while others read some more."""
_FLAG = "ulimit -n"


def check_open_files(found: Checked) -> None:
    """Refuse a limit of open files that a run meets sooner or later, and note one that slows reading.

    Args:
        found: a run whose reader is open; gets the problem or the warning.
    """
    allowed = open_files_allowed()
    if allowed < LEAST_OPEN_FILES:
        found.add(
            f"this process may open {allowed:,} files, and a training needs {LEAST_OPEN_FILES}",
            f"raise the limit, `ulimit -n {2 * LEAST_OPEN_FILES}`, or have its hard limit raised",
            field=_FLAG,
        )
        return
    if not isinstance(found.reader, CacheReader) or found.manifest is None:
        return
    reader = found.reader
    files = len(reader.columns) * found.manifest.num_shards
    if reader.is_local and files > reader.max_open_files and 2 * files > allowed:
        found.warnings.append(
            f"the columns of this run are {files:,} files and a rank keeps {reader.max_open_files:,} of them "
            f"open, so that rows open theirs anew; raise the limit of open files, `ulimit -n {2 * files}`"
        )
