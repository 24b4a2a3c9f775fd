"""What a method may need of its settings, and of the blocks that they name."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from ...data.units import counted
from .base import Problem, Requirement

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from .base import Method, MethodConfig


class HasPreset(Requirement):
    """Need settings that the user or the preset of the backbone's size says.

    Args:
        settings: names of the settings.
    """

    def __init__(self, *settings: str) -> None:
        self._settings = settings

    def problems(self, method: Method) -> Iterator[Problem]:
        """Report all settings without a value together."""
        missing = [f"method.{name}" for name in self._settings if not _is_set(method, name)]
        if not missing:
            return
        backbone = method.backbone
        size = f"size {backbone.size_name}" if backbone.size_name else f"a backbone of depth {backbone.depth}"
        example = _example(method)
        values = [f"--set {key}={_written(getattr(example, key.partition('.')[2], '…'))}" for key in missing]
        yield Problem(
            what=f"{type(method).__name__} has no preset for {size} (it has for "
            f"{', '.join(method.presets) or 'none'}), and nothing says {', '.join(missing)}",
            remedy=f"set what is missing, for example `{' '.join(values)}`",
            field=missing[0],
        )


class DepthWithin(Requirement):
    """Need blocks that the backbone has.

    Args:
        settings: names of the settings, each a block counted from 1 or several of them.
    """

    def __init__(self, *settings: str) -> None:
        self._settings = settings

    def problems(self, method: Method) -> Iterator[Problem]:
        """Report each setting that names a block outside the backbone."""
        for name in self._settings:
            outside = [block for block in blocks_of(method, name) if not method.backbone.has_block(block)]
            if outside:
                depth = method.backbone.depth
                yield Problem(
                    what=f"method.{name} is {listed(outside)}, the backbone has blocks 1 to {depth}",
                    remedy=f"set a block from 1 to {depth}, for example "
                    f"`--set method.{name}={max(1, depth // 3)}`",
                    field=f"method.{name}",
                )

    def fits(self, preset: MethodConfig, depth: int) -> bool:
        """Return whether the blocks of a preset lie in a backbone of some depth."""
        blocks = [block for name in self._settings for block in _as_blocks(getattr(preset, name))]
        return max(blocks, default=0) <= depth


class Paired(Requirement):
    """Need two lists of blocks that can be paired in order.

    Args:
        first: name of a setting.
        second: name of another.
    """

    def __init__(self, first: str, second: str) -> None:
        self._names = first, second

    def problems(self, method: Method) -> Iterator[Problem]:
        """Report lists of different lengths."""
        first, second = (blocks_of(method, name) for name in self._names)
        if first and second and len(first) != len(second):
            yield Problem(
                what=f"method.{self._names[0]} has {counted(len(first), 'block')} ({listed(first)}), "
                f"method.{self._names[1]} {len(second)} ({listed(second)})",
                remedy="name as many of the one as of the other: they are paired in order",
                field=f"method.{self._names[0]}",
            )


class AlignsFirst(Requirement):
    """Need alignment in the first step at least.

    Args:
        stop: name of the setting that says the first step without.
        warmup: name of the setting that says how many steps warm up before; empty where none do.
    """

    def __init__(self, stop: str, *, warmup: str = "") -> None:
        self._stop, self._warmup = stop, warmup

    def problems(self, method: Method) -> Iterator[Problem]:
        """Report an end before the first step, or before the first after the warm-up."""
        stop = getattr(method.config, self._stop)
        first = getattr(method.config, self._warmup) if self._warmup else 0
        if stop is not None and stop <= first:
            step = f"step {first}, the first after the warm-up" if first else "the first step"
            yield Problem(
                what=f"method.{self._stop} is {stop}: the alignment would end before {step}",
                remedy=f"set method.{self._stop} to a later step, or train without alignment: --method none",
                field=f"method.{self._stop}",
            )


class Deeper(Requirement):
    """Need one block behind another.

    Args:
        setting: name of the setting that says the one.
        than: name of the setting that says the other.
    """

    def __init__(self, setting: str, *, than: str) -> None:
        self._setting, self._than = setting, than

    def problems(self, method: Method) -> Iterator[Problem]:
        """Report a block that is the other or lies before it."""
        later, earlier = (blocks_of(method, name) for name in (self._setting, self._than))
        if later and earlier and min(later) <= max(earlier):
            yield Problem(
                what=f"method.{self._setting} is {listed(later)}, and has to lie behind "
                f"method.{self._than}, {listed(earlier)}",
                remedy=f"set a deeper method.{self._setting}, or a method.{self._than} below {min(later)}",
                field=f"method.{self._setting}",
            )


class Where(Requirement):
    """Need others only where a setting is on.

    Args:
        setting: its name; 0, none and nothing are off.
        needs: what is needed then.
    """

    def __init__(self, setting: str, *needs: Requirement) -> None:
        self._setting, self._needs = setting, needs

    def problems(self, method: Method) -> Iterator[Problem]:
        """Report what the others report, where the setting is on."""
        if getattr(method.config, self._setting):
            for need in self._needs:
                yield from need.problems(method)


class SameTokens(Requirement):
    """Need two blocks whose outputs have the same tokens, in number, grid and width.

    Args:
        first: name of the setting that says the one block.
        second: name of the setting that says the other.
    """

    def __init__(self, first: str, second: str) -> None:
        self._names = first, second

    def problems(self, method: Method) -> Iterator[Problem]:
        """Report blocks whose tokens cannot be compared one with one."""
        facts = method.backbone
        blocks = [block for name in self._names for block in blocks_of(method, name)]
        if len(blocks) < len(self._names) or not all(facts.has_block(block) for block in blocks):
            return
        tokens = {block: (facts.grid_of(block), facts.width_of(block)) for block in range(1, facts.depth + 1)}
        first, second = blocks
        if tokens[first] != tokens[second]:
            alike = [block for block in tokens if tokens[block] == tokens[first] and block != first]
            nearest = min(alike, key=lambda block: abs(block - second), default=first)
            said = [
                f"{rows}×{columns} tokens of {width} channels"
                for (rows, columns), width in (tokens[block] for block in blocks)
            ]
            yield Problem(
                what=f"block {first} of the backbone has {said[0]}, block {second} {said[1]}",
                remedy="set blocks whose tokens are alike, for example "
                f"`--set method.{self._names[1]}={nearest}`",
                field=f"method.{self._names[0]}",
            )


class TakesEffect(Requirement):
    """Need a setting to be left alone where it would do nothing.

    Args:
        setting: its name.
        unless: name and value of another setting, with which this one has none.
        where: name of another setting → its values, with any of which this one has an effect.
    """

    def __init__(
        self, setting: str, *, unless: tuple[str, Any] | None = None, **where: tuple[Any, ...]
    ) -> None:
        self._setting, self._unless, self._where = setting, unless, where

    def problems(self, method: Method) -> Iterator[Problem]:
        """Report a setting that is no default and has no effect."""
        value = getattr(method.asked, self._setting)
        default = getattr(method.config_class(), self._setting)
        if value == default:
            return
        written = f"method.{self._setting}={value}"
        leave = f"leave it at {str(default).lower()}" if default != "" else "leave it out"
        if self._unless is not None and getattr(method.config, self._unless[0]) == self._unless[1]:
            name, other = self._unless
            yield Problem(
                what=f"{written} has no effect with method.{name}={str(other).lower()}",
                remedy=f"{leave}, or set another method.{name}",
                field=f"method.{self._setting}",
            )
        if not self._where or any(getattr(method.config, name) in all_ for name, all_ in self._where.items()):
            return
        needed = [f"method.{name}={listed(values, ' or ').lower()}" for name, values in self._where.items()]
        yield Problem(
            what=f"{written} has no effect without {listed(needed, ' or ')}",
            remedy=f"{leave}, or set {needed[0]}",
            field=f"method.{self._setting}",
        )


class NoGroupEmpty(Requirement):
    """Need a token at least in each group that the tokens of an image fall into.

    Args:
        share: name of the setting that says the groups' sizes.
    """

    def __init__(self, share: str) -> None:
        self._share = share

    def problems(self, method: Method) -> Iterator[Problem]:
        """Report a group without tokens, whose time nothing would have."""
        tokens = math.prod(method.backbone.grid)
        for law in filter(None, map(method.token_times, method.phases())):
            sizes = law.sizes(tokens)
            if 0 in sizes:
                yield Problem(
                    what=f"method.{self._share}={getattr(method.config, self._share)} makes groups of "
                    f"{listed(sizes, ' and ')} of the backbone's {counted(tokens, 'token')}",
                    remedy=f"set method.{self._share} between {1 / tokens:.3g} and {1 - 1 / tokens:.3g}",
                    field=f"method.{self._share}",
                )


def _is_set(method: Method, name: str) -> bool:
    return getattr(method.config, name) not in (None, ())


def blocks_of(method: Method, setting: str) -> tuple[int, ...]:
    """Return the blocks that a setting names, counted from 1."""
    return _as_blocks(getattr(method.config, setting))


def _as_blocks(value: Any) -> tuple[int, ...]:
    """Return the blocks that a setting names, which are one, several or none."""
    if value is None:
        return ()
    return (value,) if isinstance(value, int) else tuple(value)


def ranges(blocks: Sequence[int]) -> str:
    """Write ascending blocks as ``1-5, 11-15``."""
    starts = [block for block in blocks if block - 1 not in blocks]
    ends = [block for block in blocks if block + 1 not in blocks]
    return listed(f"{a}-{b}" if a < b else a for a, b in zip(starts, ends, strict=True))


def listed(values: Iterable[object], separator: str = ", ") -> str:
    """Write values one after the other."""
    return separator.join(map(str, values))


def _written(value: Any) -> str:
    """Write a value as ``--set`` reads it."""
    return f"[{listed(value, ',')}]" if isinstance(value, tuple) else str(value)


def _example(method: Method) -> MethodConfig | None:
    """Return the preset to show, B's if its blocks lie in this backbone, else the first in the table."""
    blocks = [each for each in method.requires if isinstance(each, DepthWithin)]
    common = method.presets.get("B")
    if common is not None and all(each.fits(common, method.backbone.depth) for each in blocks):
        return common
    return next(iter(method.presets.values()), None)
