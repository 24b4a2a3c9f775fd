"""The flags of a command as fields of a dataclass, with name, type, default and help said once.

Flags that name a folder to write in are parsed by `local_folder`: ``Path`` would make ``s3:/bucket`` of an
address, and a folder of that name.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_type_hints

from ...data.errors import RepaError
from ...data.storage.bucket import is_remote

if TYPE_CHECKING:
    from collections.abc import Callable

Flags = TypeVar("Flags")


def takes_flags(flags: type[Flags]) -> Callable[[Callable[[Flags], None]], Callable[..., None]]:
    """Decorate a function of a dataclass of flags to be the command that typer wants, one parameter a flag.

    typer reads a command's flags from the parameters of a function. A dataclass has the same thing in the
    parameters of its constructor, so those are what typer is shown.

    Args:
        flags: frozen, keyword-only dataclass, each field ``Annotated[type, typer.Option(help=…)] = default``.
    """
    annotations = get_type_hints(flags, include_extras=True)
    parameters = [
        each.replace(annotation=annotations[each.name])
        for each in inspect.signature(flags).parameters.values()
    ]

    def decorate(run: Callable[[Flags], None]) -> Callable[..., None]:
        def command(**values: Any) -> None:
            run(flags(**values))

        shown: Any = command
        shown.__signature__ = inspect.Signature(parameters)
        shown.__doc__ = run.__doc__
        return command

    return decorate


def check_ranges(*numbers: tuple[str, float | None, int, int]) -> None:
    """Refuse numbers out of their range, of which one that is not given is in every.

    Args:
        numbers: flag, value, least and most of each.

    Raises:
        RepaError: the first of them.
    """
    for flag, value, least, most in numbers:
        # not a number is in no range
        if value is not None and not least <= value <= most:
            raise RepaError(f"{flag} {value} is not valid", f"give {least:,} to {most:,}", field=flag)


def local_folder(path: str) -> Path:
    """Return the folder that a flag names.

    Raises:
        RepaError: it is the address of a bucket.
    """
    if is_remote(path):
        raise RepaError(
            f"{path} is in a bucket, where only `repa preprocess` and `repa cache seal`, `repair`, "
            "`drop` and `upgrade` write",
            "name a folder; a cache of a bucket can be copied to one and back",
        )
    return Path(path)


def square_side(text: str) -> int:
    """Return the side in pixels of the square that ``--resolution`` names, as ``512`` or ``512x512``.

    Raises:
        RepaError: it is no number, or no square's.
    """
    match = re.fullmatch(r"([+-]?[0-9]{1,18})(?:[x×]([0-9]{1,18}))?", text)
    if match is None:
        raise RepaError(
            f"--resolution {text!r} is no number of pixels", "give the side of the crop", field="--resolution"
        )
    side = int(match[1])
    if match[2] is not None and int(match[2]) != side:
        raise RepaError(
            f"--resolution {text} is not square, and images are cropped to squares",
            f"give one side, as {min(side, int(match[2]))}",
            field="--resolution",
        )
    return side
