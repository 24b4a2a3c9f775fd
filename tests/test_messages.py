"""What common mistakes are answered with, in one file to be read as prose: ``messages.txt``.

Its wording lives there alone; other tests assert the class of an error and its field. After a change of
wording, run ``pytest tests/test_messages.py --update-messages`` and read what has changed.
"""

from __future__ import annotations

import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from repa.cli import main
from repa.data.testing import synthetic_cache

FILE = Path(__file__).with_name("messages.txt")

# each in a folder with the things of `workplace`
COMMANDS = """
preprocess
preprocess --data empty
preprocess --data text
preprocess --data folder --encoder dinov9
preprocess --data folder --encoder demo --encoder demo
preprocess --data folder --encoder demo --resolution 20
preprocess --data folder --encoder demo --resolution 0
preprocess --data folder --encoder demo --batch-size 0
preprocess --data folder --encoder demo --limit 0
preprocess --data folder --encoder demo --feature-dtype float64
preprocess --data folder --encoder demo --compute-dtype half
preprocess --data folder --encoder demo --compress gzip
preprocess --data folder --encoder demo --vae demo --shards auto
preprocess --data folder --encoder demo --vae demo --shards 4
preprocess --data folder --encoder demo --vae demo --resolution 32 --shards 9:12
preprocess --data folder --encoder demo --pool 4
preprocess --data folder --encoder demo --launcher slurm
preprocess --data folder --encoder demo --launcher ray --devices 8
preprocess --data folder --encoder demo --launcher ray --pool 8:1
preprocess --data folder --encoder demo --attention 99
preprocess --data folder --encoder demo --attention one
preprocess --data folder --encoder demo --attention-rank 4
preprocess --data folder --encoder demo --weights demo
preprocess --data folder --encoder demo --vae demo --weights demo=nowhere.pt
preprocess --data folder --encoder demo --vae demo --cache folder
preprocess --data 'tars/{0..3}.tar' --encoder demo
distill --cache nowhere
distill --cache cache
distill --cache cache --encoder dinov9
distill --cache cache --norm group
distill --cache cache --idle 0.755
train
train --cache nowhere
train --cache text
train --cache damaged
train --cache cache --method reqa
train --cache cache --method my_methods:Mine
train --cache cache --model SiT-Q/2
train --cache cache --model SiT-S/2
train --cache cache --model SiT-S/1 --batch-size 4
train --cache cache --model SiT-S/2 --batch-size 4 --method haste
train --cache cache --model SiT-S/2 --batch-size 4 --set method.encoders=dinov2-b
train --cache cache --model DiT-S/1 --batch-size 4 --method none --set objective=flow
train --cache cache --model SiT-S/1 --batch-size 4 --method none --set objective=ddpm
train --cache cache --model DiT-S/1 --batch-size 4 --method reg
train --cache cache --model SiT-S/2 --batch-size 4 --method erw --set method.warmup_depth=8
train --cache cache --model SiT-S/2 --batch-size 4 --method erw --set method.warmup_from=nowhere
train --cache cache --model SiT-S/2 --batch-size 4 --method erw --set method.warmup_from=nowhere --max-steps 9
train --cache cache --method none --set bathc_size=4
train --cache cache --method none --set batch_size=many
train --cache cache --method none --set lr=-1
train --cache cache --method none --set batch_size
train --cache cache --method none --run folder
train --cache cache --method none --config nowhere.yaml
train --cache cache --recipe repa-x
train --cache cache --set recipe=repa-xl-2
recipes haste-xxl
sample
sample --run nowhere
sample --ckpt text
sample --ckpt nowhere.pt
plan --data nowhere
bench sampler
compare nowhere
compare folder
cache info nowhere
cache info text
cache info damaged
cache verify folder
cache merge cache cache --cache whole
cache export cache --out text
cache import tars/shard-000000.tar --cache back
cache import folder --format repa --cache back
cache import folder --format mar --cache back
cache import empty --format fast-dit --cache back
cache import nowhere --format lightningdit --cache back
cache import folder --format dit --cache back
cache import folder --vae demo --cache back
cache seal nowhere
cache drop nobody cache
"""


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a cache and a damaged one, images, an empty folder and a text file where commands run."""
    monkeypatch.chdir(tmp_path)
    synthetic_cache(tmp_path / "cache", num_rows=8)
    synthetic_cache(tmp_path / "damaged", num_rows=8)
    document = tmp_path / "damaged" / "zarr.json"
    text = document.read_text()
    assert '"num_rows": 8' in text
    document.write_text(text.replace('"num_rows": 8', '"num_rows": 9'))
    (tmp_path / "text").write_text("some words: of no kind\n")
    (tmp_path / "empty").mkdir()
    for label in ("cat", "dog"):
        (tmp_path / "folder" / label).mkdir(parents=True)
        Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(tmp_path / "folder" / label / "0.png")
    return tmp_path


def answer(line: str, capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command that fails, and return what it says."""
    with pytest.raises(SystemExit) as stop:
        main(shlex.split(line))
    error = capsys.readouterr().err
    assert stop.value.code == 1, (line, error)
    return error


def test_what_common_mistakes_are_answered_with(
    workplace: Path, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> None:
    answers = [(line, answer(line, capsys)) for line in COMMANDS.strip().splitlines()]
    text = "\n".join(f"$ repa {line}\n{error}" for line, error in answers)
    text = text.replace(str(workplace), "/work")
    if request.config.getoption("--update-messages"):
        FILE.write_text(text)
    assert text.splitlines() == FILE.read_text().splitlines()
