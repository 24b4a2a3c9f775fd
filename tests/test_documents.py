"""README and the pages of docs: links lead somewhere, and every command is one that the program takes."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer
from repa.cli import app

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
LINK = re.compile(r"\]\(([^)\s]+)\)")
# of a line: the launcher before a command, and where the shell would cut it off
BEFORE = re.compile(r"^(?:.*(?:\$\(which repa\)|--no-python repa|--membind=0 repa|srun [-\w= ]*repa) )")


def without_code(text: str) -> str:
    """Return a page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", without_code(page.read_text(encoding="utf-8")), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands(text: str) -> list[str]:
    """Return every `repa …` of a page's blocks of commands, indented ones too."""
    joined = re.sub(r"\\\n\s*", "", text)
    fenced = "\n".join(re.findall(r"^```bash\n(.*?)^```$", joined, flags=re.MULTILINE | re.DOTALL))
    lines = re.findall(r"^    (.+)$", joined, flags=re.MULTILINE) + fenced.splitlines()
    found = []
    for line in lines:
        for part in re.sub(r"(^|\s+)#.*", "", line).split("&&"):
            command = BEFORE.sub("repa ", part.strip())
            if command.startswith("repa ") and "…" not in command:
                found.append(command)
    return list(dict.fromkeys(found))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for link in LINK.findall(without_code(page.read_text(encoding="utf-8"))):
        if "://" in link:
            continue
        place, _, anchor = link.partition("#")
        target = (page.parent / place) if place else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


@pytest.mark.parametrize("page", PAGES[1:], ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_parses(page: Path) -> None:
    """Every flag is there, and every value is of its type; nothing is run. README's are those of test_cli."""
    program = typer.main.get_command(app)
    refused = []
    for line in commands(page.read_text(encoding="utf-8")):
        command, words = program, shlex.split(line)[1:]
        while hasattr(command, "commands") and words and not words[0].startswith("-"):
            command = command.commands[words.pop(0)]
        try:
            command.make_context(line, words)
        except Exception as error:
            refused.append((line, repr(error)))
    assert refused == []
