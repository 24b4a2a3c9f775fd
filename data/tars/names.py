"""The tars that a text names by patterns of paths, objects of a bucket, pipes and URLs."""

from __future__ import annotations

import os
import re
from pathlib import Path

from ..errors import RepaError
from ..storage.files import os_errors
from ..storage.regular import other_kind
from ..units import counted

MAX_PATTERN = 100_000  # tars that one pattern may name

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"([0-9]+)\.\.([0-9]+)")
_MAX_DIGITS = 18  # of an end of a range
_PIPE = "pipe:"
_STREAM = re.compile(rf"{_PIPE}|[a-z][a-z0-9+.-]*://")
_WILD = "*?["
# how the name of a compressed tar may end: told apart, not read
_ENDINGS = ("gz", "xz", "bz2", "zst")


def is_stream(tar: str) -> bool:
    """Tell whether a name is a pipe or URL, which can only be read from its beginning on."""
    return _STREAM.match(tar) is not None


def names_tars(text: str) -> bool:
    """Tell whether a text names tars rather than a folder."""
    if is_stream(text):
        return text.startswith(_PIPE) or ".tar" in text.rsplit("/", 1)[-1]
    last = text.rstrip("/").rsplit("/", 1)[-1].lower()
    return last.endswith((".tar", ".tgz", *(f".tar.{end}" for end in _ENDINGS))) and not Path(text).is_dir()


def command_in(text: str) -> str | None:
    """Return the first shell command that opening a text as tars would run, None where it would run none.

    Raises:
        RepaError: the pattern names too many.
    """
    return next((tar for tar in _braces(text) if tar.startswith(_PIPE)), None)


def expand_tars(pattern: str) -> list[str]:
    """List the tars that a pattern names, in their order.

    ``{0000..0146}`` counts, with leading zeros if its ends have them, ``{a,b}`` lists, as in a shell. In
    paths ``*``, ``?`` and ``[…]`` match, sorted by code point.

    Raises:
        RepaError: nothing matches, a tar is named twice, or the pattern names too many.
    """
    tars: list[str] = []
    for each in _braces(pattern):
        if is_stream(each) or not any(sign in each for sign in _WILD) or Path(each).exists():
            tars.append(each)
            continue
        root = Path(each).anchor
        found = sorted(str(path) for path in Path(root or ".").glob(each[len(root) :]))
        if not found:
            raise RepaError(f"no tar matches {each}", "check the pattern")
        # a file may be named as a pipe is written
        tars += [f"./{tar}" if is_stream(tar) else tar for tar in found]
    if len(set(tars)) < len(tars):
        twice = next(tar for tar in tars if tars.count(tar) > 1)
        raise RepaError(f"{pattern} names {twice} twice", "name each tar once")
    return tars


def present_tars(pattern: str) -> list[str]:
    """List what `expand_tars` does, of tars that are there as far as can be told without opening any.

    Raises:
        RepaError: as there; or one is missing, or is no file.
    """
    tars = expand_tars(pattern)
    missing = []
    for tar in tars:
        if is_stream(tar):
            continue
        with os_errors("read", Path(tar)):
            try:
                kind = other_kind(os.stat(tar).st_mode)
            except (FileNotFoundError, NotADirectoryError):
                missing.append(tar)
                continue
        if kind == "a folder":
            raise _is_folder(tar)
        if kind:
            raise RepaError(
                f"tar {tar} is {kind}, not a file", "copy what it gives into a file, and name that"
            )
    if missing and len(tars) == 1:
        raise RepaError(f"tar {missing[0]} is missing", "look at its name, or fetch it")
    if missing:
        raise RepaError(
            f"{pattern} names {len(tars)} tars, of which {counted(len(missing), 'tar')} cannot be found, "
            f"first {missing[0]}",
            "fetch what is missing, or name only tars that are there",
        )
    return tars


def _is_folder(tar: str) -> RepaError:
    names = sorted(path.name for path in Path(tar).glob("*.tar"))
    if names:
        return RepaError(f"{tar} is a folder", f"name the tars in it, '{Path(tar) / '*.tar'}'")
    if (Path(tar) / "zarr.json").exists():
        return RepaError(
            f"{tar} is a cache, not tars of one",
            f"write its tars with `repa cache export {tar} --out OUT`",
        )
    return RepaError(
        f"{tar} is a folder without tars", "name tars, as 'OUT/*.tar' of `repa cache export --out OUT`"
    )


def _braces(pattern: str) -> list[str]:
    done, todo = [], [pattern]
    while todo:
        text = todo.pop()
        for match in _BRACES.finditer(text):
            values = _brace_values(match.group(1), pattern)
            if values is not None:
                todo += [f"{text[: match.start()]}{value}{text[match.end() :]}" for value in values[::-1]]
                break
        else:
            done.append(text)
        if len(done) + len(todo) > MAX_PATTERN:
            raise RepaError(f"{pattern} names more than {MAX_PATTERN:,} tars", "name fewer")
    return done


def _brace_values(inside: str, pattern: str) -> list[str] | None:
    match = _RANGE.fullmatch(inside)
    if match is None:
        return inside.split(",") if "," in inside else None
    first, last = match.groups()
    if max(len(first), len(last)) > _MAX_DIGITS:
        raise RepaError(f"{pattern[:80]} counts tars by more than {_MAX_DIGITS} digits", "write fewer digits")
    padded = any(len(end) > 1 and end[0] == "0" for end in (first, last))
    width = max(len(first), len(last)) if padded else 0
    step = 1 if int(first) <= int(last) else -1
    if abs(int(last) - int(first)) >= MAX_PATTERN:
        raise RepaError(f"{pattern} names more than {MAX_PATTERN:,} tars", "name fewer")
    return [str(number).zfill(width) for number in range(int(first), int(last) + step, step)]
