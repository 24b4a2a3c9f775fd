"""Docstrings say one thing in their first sentence, and those of functions begin with a verb.

Many read that sentence alone. A function's says what it does ("Return …", "Write …"), as ruff's D401
asks too. A class and a property are things, and theirs may begin with a noun.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("benchmarks", "commands", "data", "pipeline", "recipes", "trainer")
FILES = [
    *sorted(ROOT.glob("*.py")),
    *(file for room in ROOMS for file in sorted((ROOT / room).rglob("*.py"))),
]

# no verb is one of these, ends as a plural or a participle does, or is followed by "of"
NO_VERBS = frozenset(
    re.findall(
        r"\w+",
        """A After All An And Any As At Before Both But By Each Every Everything For From How If In It Its No
        Nothing On One Only Same Several So Some That The There These This Those Three To Two What When Where
        Whether Which Who Whose Why With Without""",
    )
)
NO_ENDS = re.compile(r"([^s]s|[^de]ed|ing)$")
EXCEPTIONS = frozenset(("Bring", "Feed", "Need", "Embed", "Shed"))


def first_sentence(docstring: str) -> str:
    """Return the first sentence without what stands in backticks."""
    paragraph = re.sub(r"\s+", " ", docstring.strip().split("\n\n")[0])
    text = re.sub(r"``.+?``|`.+?`", "x", paragraph)
    return re.split(r"(?<=[.?!])\s", text, maxsplit=1)[0]


def begins_with_a_verb(sentence: str) -> bool:
    """Tell it by what a verb is not."""
    word, _, rest = sentence.partition(" ")
    plain = word.rstrip(".,")
    if not re.fullmatch(r"[A-Z][a-z]+", plain) or plain in NO_VERBS or rest.startswith("of "):
        return False
    return plain in EXCEPTIONS or not NO_ENDS.search(plain)


def is_property(node: ast.AST) -> bool:
    decorators = [ast.unparse(each) for each in getattr(node, "decorator_list", [])]
    return any(each.rpartition(".")[2] in ("property", "cached_property") for each in decorators)


def findings(text: str) -> Iterator[str]:
    """Yield what is wrong with the docstrings of a module's source."""
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        sentence = first_sentence(ast.get_docstring(node) or "")
        if not sentence:
            continue
        if re.search(r"[:;]", sentence):
            yield f"{node.name}: two things in one sentence: {sentence}"
        elif not (isinstance(node, ast.ClassDef) or is_property(node) or begins_with_a_verb(sentence)):
            yield f"{node.name}: no verb: {sentence}"


@pytest.mark.parametrize(
    ("docstring", "found"),
    [
        ("Return the rows.", 0),
        ("Process `a: b` and pass it on.", 0),
        ("Embed it. The rest: more; and more.", 0),
        ("The rows.", 1),
        ("Rows of a shard.", 1),
        ("Name of a column.", 1),
        ("Whether it is so.", 1),
        ("Returning the rows.", 1),
        ("Return the rows: all of them.", 1),
        ("Return the rows; none if there are none.", 1),
    ],
)
def test_the_rule(docstring: str, found: int) -> None:
    assert len(list(findings(f'def f():\n    """{docstring}"""'))) == found


def test_things_may_be_named() -> None:
    assert not list(
        findings('class C:\n    """The rows."""\n    @property\n    def f():\n        """Rows."""')
    )


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_docstrings(file: Path) -> None:
    assert list(findings(file.read_text())) == []
