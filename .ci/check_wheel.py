"""Check that a built wheel holds every package of the list, every tracked module and the demo's files."""

from __future__ import annotations

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main(wheel: str) -> None:
    """Exit 1 with the list of what is missing from the wheel."""
    names = set(zipfile.ZipFile(wheel).namelist())
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    wanted = {package.replace(".", "/") + "/__init__.py" for package in packages}
    for name in tracked.stdout.split():
        inside = not name.startswith(("tests/", "docs/", "benchmarks/", "."))
        if inside and (
            name.endswith(".py") or name.startswith(("pipeline/demo/", "trainer/reports/templates/"))
        ):
            wanted.add(f"repa/{name}")
    missing = sorted(wanted - names)
    if missing:
        sys.exit("the wheel lacks " + ", ".join(missing))
    surplus = sorted(name for name in names if name.startswith(("repa/tests/", "repa/benchmarks/")))
    if surplus:
        sys.exit("the wheel holds what is not of the package: " + ", ".join(surplus))
    print(f"{Path(wheel).name}: {len(wanted)} wanted files are in it")


if __name__ == "__main__":
    main(sys.argv[1])
