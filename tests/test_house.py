"""The layout of the project: packages, lazy imports, what the wheel must hold."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
NOT_PACKAGES = {"tests", "benchmarks", "build", "dist", "docs"}


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/", check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_package_of_the_tree_is_in_the_list_of_the_wheel() -> None:
    found = {"repa"}
    for init in ROOT.rglob("__init__.py"):
        parts = init.parent.relative_to(ROOT).parts
        if parts and parts[0] not in NOT_PACKAGES and not parts[0].startswith("."):
            found.add(".".join(("repa", *parts)))
    assert found == set(PROJECT["tool"]["setuptools"]["packages"])


def test_every_folder_with_modules_is_a_package() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "*.py"], capture_output=True, text=True, cwd=ROOT, check=False
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    folders = {
        str(Path(name).parent)
        for name in listed.stdout.split()
        if not name.startswith(("tests/", "benchmarks/", "."))
    }
    bare = [folder for folder in folders if not (ROOT / folder / "__init__.py").exists()]
    assert bare == []


def test_help_does_not_import_torch() -> None:
    code = (
        "import sys\n"
        "from repa.cli import main\n"
        "names = ',preprocess,train,sample,cache,cache info,cache verify,demo,bench,compare,recipes,'\n"
        "names += 'distill'\n"
        "for arguments in map(str.split, names.split(',')):\n"
        "    try: main([*arguments, '--help'])\n"
        "    except SystemExit as stop: assert not stop.code, (arguments, stop.code)\n"
        "heavy = {'torch', 'zarr', 'timm', 'diffusers', 'lightning', 'matplotlib', 'PIL'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    assert "Usage" in run_python(code)


def test_importing_the_data_layer_needs_no_torch() -> None:
    run_python(
        "import sys, repa.data.writing.store, repa.data.reading.reader, repa.data.reading.order\n"
        "import repa.data.upkeep.verify\n"
        "assert 'torch' not in sys.modules"
    )


def test_the_trainer_cannot_load_a_teacher_and_modules_exist_once() -> None:
    """From the checkout `import data` would make a second copy of `repa.data`: nothing of ours does."""
    run_python(
        "import pkgutil, importlib, sys, repa.trainer\n"
        "for module in pkgutil.walk_packages(repa.trainer.__path__, 'repa.trainer.'):\n"
        "    importlib.import_module(module.name)\n"
        "assert not any(name.startswith('repa.pipeline') for name in sys.modules)\n"
        "assert not {'timm', 'diffusers'} & set(sys.modules)\n"
        # in the same interpreter: it has taken seconds to import all that
        "import repa.cli, repa.commands.demo.run, repa.pipeline.run\n"
        "assert not {'data', 'pipeline', 'trainer', 'cli', 'commands'} & set(sys.modules)"
    )
