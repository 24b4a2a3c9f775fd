"""Callbacks of Lightning that a run adds to its own, named in ``trainer.callbacks``.

A name is that of an entry point of the group ``repa.callbacks``, or ``my_package.my_module:MyCallback``. The
latter runs the module, so it must come from the command line, as with methods: see `data.outside`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..data.edge import printable
from ..data.errors import RepaError
from ..data.outside import find_outside

if TYPE_CHECKING:
    from collections.abc import Iterable

    from lightning.pytorch.callbacks import Callback

GROUP = "repa.callbacks"
SETTING = "trainer.callbacks"
FLAG = f"--set {SETTING}="
EXAMPLE = "my_package.my_module:MyCallback"
_SHOWN = 200  # characters of the reason that somebody's code gives


def find_callback(name: str, *, may_import: bool = False) -> Any:
    """Return what makes the callback of a name, a class or a function.

    Raises:
        RepaError: there is none of that name, or its module may not or cannot be imported.
    """
    return find_outside(name, group=GROUP, flag=FLAG, what="callback", example=EXAMPLE, may_import=may_import)


def make_callbacks(names: Iterable[str]) -> list[Callback]:
    """Make the callbacks of a run, each without arguments.

    Raises:
        RepaError: one cannot be had or made, is no callback, or keeps a state that no checkpoint can hold.
    """
    from lightning.pytorch.callbacks import Callback

    made: list[Callback] = []
    for name in names:
        make = find_callback(name)
        try:
            callback = make()
        except Exception as error:  # of code from outside
            reason = printable(" ".join(f"{type(error).__name__}: {error}".split()))[:_SHOWN]
            raise RepaError(
                f"callback {name} cannot be made ({reason})",
                "name a class or a function that needs no arguments",
                field=SETTING,
            ) from error
        if not isinstance(callback, Callback):
            raise RepaError(
                f"{name} makes a {type(callback).__name__}, and no callback",
                "make it a subclass of lightning.pytorch.Callback",
                field=SETTING,
            )
        check_state(name, callback.state_dict())
        made.append(callback)
    return made


def check_state(name: str, state: Any) -> None:
    """Check that a callback's state can be read from a checkpoint again, where nothing runs code.

    Raises:
        RepaError: it holds something else than numbers, texts, tensors, and lists and dictionaries of them.
    """
    wrong = _not_plain(state)
    if wrong is not None:
        raise RepaError(
            f"the state of callback {name} holds a {wrong}, which a checkpoint cannot give back",
            "have its state_dict return numbers, texts, tensors, lists and dictionaries",
            field=SETTING,
        )


def _not_plain(value: Any) -> str | None:
    from torch import Tensor

    if value is None or isinstance(value, Tensor) or type(value) in (bool, int, float, str, bytes):
        return None
    if type(value) is dict:
        return next((wrong for pair in value.items() for each in pair if (wrong := _not_plain(each))), None)
    if type(value) in (list, tuple):
        return next((wrong for each in value if (wrong := _not_plain(each))), None)
    return type(value).__name__
