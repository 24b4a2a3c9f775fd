"""The page: what it says of runs, what it may not say together, and folders that others have spoiled."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image
from repa.data.errors import RepaError
from repa.trainer.reports.page import compare_runs
from repa.trainer.reports.runs import read_runs
from run_folders import make_run, write_figures, write_preview

if TYPE_CHECKING:
    from pathlib import Path


class Page(HTMLParser):
    """The elements of a page, its text, and the cells of its tables."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: list[list[list[str]]] = []
        self.text = ""
        self._cell: list[str] | None = None
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self._cell = []

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th") and self._cell is not None:
            self.tables[-1][-1].append("".join(self._cell).strip())
            self._cell = None

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._cell is not None:
            self._cell.append(data)

    def with_heading(self, heading: str) -> list[list[list[str]]]:
        return [table for table in self.tables if heading in table[0]]

    def count(self, tag: str) -> int:
        return sum(each == tag for each, _ in self.tags)


def page_of(*folders: Path, steps: tuple[int, ...] = ()) -> tuple[Page, list[str]]:
    html, notes = compare_runs(folders, steps)
    return Page(html), notes


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two seeds of one setting and a third run of another method, all with previews."""
    root = tmp_path_factory.mktemp("runs")
    quick = {"steps": 100, "log_every": 10, "previews": (50, 100)}
    return [
        make_run(root / "none-0", seed=0, **quick),
        make_run(root / "none-1", seed=1, mfu=0.25, device="NVIDIA H100", **quick),
        make_run(root / "repa", method="repa", method__depth=2, **quick),
    ]


def test_numbers_of_runs(seeds: list[Path]) -> None:
    page, notes = page_of(*seeds)
    assert notes == []
    (cost,) = page.with_heading("MFU")
    rows = {row[0]: dict(zip(cost[0], row, strict=True)) for row in cost[1:]}
    # 100 steps of 32 images at 300 a second, and a tenth more on the wall
    assert rows["none-1"] == {
        "run": "none-1",
        "steps": "100",
        "images seen": "3,200",
        "devices": "1 × NVIDIA H100",
        "images/s": "300",
        "device-hours": f"{1.1 * 3200 / 300 / 3600:.3g}",
        "bytes read": "26.2 MB",
        "peak memory": "2.5 GB",
        "MFU": "25.0 %",
    }
    assert rows["none-0"]["MFU"] == "–"
    (held_out,) = page.with_heading("averaged weights")
    assert [row[0] for row in held_out[1:]] == [
        "none-0",
        "none-1",
        "repa",
        "none (2 seeds): mean ± deviation",
    ]
    values = [float(row[2]) for row in held_out[1:3]]
    mean, deviation = (float(each) for each in held_out[-1][2].split(" ± "))
    assert mean == pytest.approx(sum(values) / 2, rel=1e-3)
    assert deviation == pytest.approx(abs(values[0] - values[1]) / 2**0.5, rel=0.05)
    (settings,) = [table for table in page.tables if table[0][0] == "setting" and len(table[0]) == 4]
    assert ["seed", "0", "1", "0"] in settings
    assert ["method.name", "none", "none", "repa"] in settings
    assert not any(row[0] == "batch_size" for row in settings)


def test_charts_have_a_title_values_and_three_axes(seeds: list[Path]) -> None:
    page, _ = page_of(*seeds)
    charts = [attributes for tag, attributes in page.tags if tag == "svg" and attributes.get("role") == "img"]
    for axis in ("steps", "images", "hours"):
        assert sum(f"by-{axis}" in (each["class"] or "") for each in charts) * 3 == len(charts)
    identifiers = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    for each in charts:
        assert set((each["aria-labelledby"] or "").split()) <= identifiers
    # loss, both held-out losses, velocity, gradient norm, repa and its weight
    assert len(charts) == 3 * 7
    assert page.count("desc") == len(charts)
    (loss,) = [table for table in page.tables if table[0] == ["step", "none (2 seeds)", "repa"]][:1]
    assert loss[-1][0] == "100"


def test_samples_of_the_same_noise_lie_side_by_side(seeds: list[Path]) -> None:
    page, _ = page_of(*seeds, steps=(100,))
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert [each["alt"] for each in images] == [
        f"Samples of {name} after 100 steps" for name in ("none-0", "repa", "none-1")
    ]
    assert all((each["src"] or "").startswith("data:image/png;base64,") for each in images)
    assert sum(attributes.get("class") == "grids" for _, attributes in page.tags) == 2
    with pytest.raises(RepaError) as caught:
        compare_runs(seeds, (70,))
    assert caught.value.field == "--step"
    assert len([tag for tag, _ in page_of(*seeds)[0].tags if tag == "img"]) == 6


def test_figures_of_another_count_or_reference_never_share_a_column(seeds: list[Path]) -> None:
    first, second, third = seeds
    write_figures(
        first,
        {"value": "30", "step": "50"},
        {"value": "20"},
        {"metric": "precision", "k": "3", "value": "0.5"},
    )
    write_figures(
        second,
        {"value": "22"},
        {"value": "7", "N": "50000"},
        {"metric": "precision", "k": "5", "value": "0.6"},
    )
    write_figures(
        third, {"value": "9", "reference_sha256": "sha256:other"}, {"value": "3", "guidance": "4.0"}
    )
    try:
        page, notes = page_of(*seeds)
    finally:
        for folder in seeds:
            (folder / "evaluation.csv").unlink()
    assert notes == []
    tables = page.with_heading("images seen")
    found = [
        {
            (row[0], heading): row[column]
            for row in table[1:]
            for column, heading in enumerate(table[0])
            if column > 3
        }
        for table in tables
        if "at step" in table[0]
    ]
    fid, three, five = (
        f"{name}inception, sha256:ee)" for name in ("fid (", "precision (k 3, ", "precision (k 5, ")
    )
    assert len(found) == 4
    assert found[0]["none-0", fid] == "20"  # of the last step
    assert found[0]["none-1", fid] == "22"
    assert found[0]["none (2 seeds): mean ± deviation", fid] == "21 ± 1.4"
    assert (found[0]["none-0", three], found[0]["none-0", five]) == ("0.5", "–")
    assert found[0]["none (2 seeds): mean ± deviation", three] == "–"
    assert found[1:] == [{("none-1", fid): "7"}, {("repa", fid): "9"}, {("repa", fid): "3"}]
    # of one run at two steps: a curve
    assert sum("fid" in heading for table in page.tables for heading in table[0]) == 4
    assert page.text.count("Values of fid") == 1


def test_curves_of_other_rows_or_protocols_are_other_charts(tmp_path: Path) -> None:
    quick = {"steps": 50, "log_every": 10}
    runs = [
        make_run(tmp_path / "a", **quick),
        make_run(tmp_path / "b", lr=1e-3, **quick),
        make_run(tmp_path / "c", holdout=64, **quick),
    ]
    for run in runs:
        lines = (run / "metrics.csv").read_text().splitlines()
        added = [f"{lines[0]},fd/demo@64", *(f"{line},{number}" for number, line in enumerate(lines[1:]))]
        (run / "metrics.csv").write_text("\n".join(added) + "\n")
    (runs[1] / "config.yaml").write_text(
        (runs[1] / "config.yaml").read_text().replace("cache: cache", "cache: d")
    )
    page, notes = page_of(*runs)
    assert notes == []
    titles = [heading for heading in page.text.splitlines() if heading.startswith("Values of")]
    assert titles.count("Values of loss") == 1
    # of three, two have other held-out rows; one has another cache, and with it another reference
    assert titles.count("Values of held_out_ema") == 3
    assert titles.count("Values of fd/demo@64") == 2
    assert sum(table[0] == ["step", "a", "c"] for table in page.tables) == 1


def test_losses_of_other_latents_are_other_charts(tmp_path: Path) -> None:
    quick = {"steps": 50, "log_every": 10}
    runs = [
        make_run(tmp_path / "a", **quick),
        make_run(tmp_path / "b", latents="demo/patch", **quick),
        make_run(tmp_path / "c", lr=1e-3, **quick),
    ]
    page, notes = page_of(*runs)
    assert notes == []
    titles = [heading for heading in page.text.splitlines() if heading.startswith("Values of")]
    assert titles.count("Values of loss") == titles.count("Values of velocity") == 2
    assert titles.count("Values of gradient_norm") == 1
    headings = [table[0] for table in page.tables]
    assert headings.count(["step", "a", "c"]) == headings.count(["step", "b"]) == 4  # held-out losses too


MARKUP = "<script>alert(1)</script>\"'&{{ 7 * 7 }}"


def test_text_of_others_only_appears(tmp_path: Path) -> None:
    run = make_run(tmp_path / MARKUP.replace("/", "⁄"), steps=50, log_every=10, previews=(50,))
    right_to_left = "\u202e"
    (run / "config.yaml").write_text(
        json.dumps({"batch_size": 8, MARKUP: MARKUP, "method": {"name": MARKUP}, "b": right_to_left})
    )
    (run / "metrics.csv").write_text(f"step,{MARKUP.replace(',', '')}\n1,2\n")
    changed = [{"key": MARKUP, "before": MARKUP, "now": None}, 5]
    starts = [{"device": MARKUP, "devices": 1, "changed": changed, "first_step": 0}]
    (run / "run.json").write_text(json.dumps({"starts": starts}))
    write_figures(run, {"metric": MARKUP, "reference": MARKUP, "network": MARKUP, "images_seen": MARKUP})
    page, _ = page_of(run)
    assert page.count("script") == 0
    known = {
        "html",
        "head",
        "meta",
        "link",
        "title",
        "style",
        "body",
        "header",
        "h1",
        "nav",
        "a",
        "main",
        "section",
    }
    known |= {
        "h2",
        "h3",
        "div",
        "fieldset",
        "legend",
        "label",
        "input",
        "svg",
        "path",
        "span",
        "p",
        "figure",
        "g",
        "desc",
    }
    known |= {
        "figcaption",
        "text",
        "circle",
        "details",
        "summary",
        "table",
        "thead",
        "tbody",
        "tr",
        "th",
        "td",
        "img",
    }
    assert {tag for tag, _ in page.tags} <= known | {"ul", "li", "footer"}
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert page.text.count("<script>alert(1)") > 5
    assert "49" not in re.findall(r"\d+", page.text)
    assert right_to_left not in page.text
    policy = next(attributes["content"] for _, attributes in page.tags if "http-equiv" in attributes)
    assert "default-src 'none'" in (policy or "")
    assert not any((attributes.get("src") or "data:").startswith("http") for _, attributes in page.tags)


DAMAGE: dict[str, tuple[str, bytes]] = {
    "no yaml": ("config.yaml", b"a: [\n"),
    "a list of settings": ("config.yaml", b"- 1\n"),
    "no text": ("config.yaml", b"\xff\xfe\x00"),
    "unknown settings": ("config.yaml", b"batch_size: many\nwhatever: {1: 2, 2020-01-01: .nan}\n"),
    "no batch": ("config.yaml", b"batch_size: -3\nmax_steps: {}\n"),
    "half a line": ("metrics.csv", b"step,loss\n1,2\n2,3\n3,"),
    "words": ("metrics.csv", b"step,loss\n1,2\n2,three\n4,5\n"),
    "not finite": ("metrics.csv", b"step,loss\n1,nan\n2,inf\n3,-inf\n4,1e9999\n"),
    "huge": ("metrics.csv", b"step,loss\n1,1e308\n2,-1e308\n999999999999999999,1\n"),
    "steps that go back": ("metrics.csv", b"step,loss\n9,1\n3,2\n9,4\n0,1\n"),
    "no header": ("metrics.csv", b"1,2\n"),
    "empty": ("metrics.csv", b""),
    "wide": (
        "metrics.csv",
        b"step," + b",".join(b"m%d" % i for i in range(900)) + b"\n1" + b",1" * 900 + b"\n",
    ),
    "no numbers": ("timing.csv", b"step,images_per_second\n1,-5\n2,0\n"),
    "times of no sense": (
        "timing.csv",
        b"step,images_per_second,seconds,devices,peak_memory\n1,1,inf,nan,nan\n5,1,1e308,1e308,-1\n",
    ),
    "no json": ("run.json", b"{"),
    "starts of no sense": (
        "run.json",
        b'{"starts": [{"first_step": 3, "devices": "x", "device": 5, "changed": 7}]}',
    ),
    "no table": ("evaluation.csv", b'\x00\xff\n"\n'),
    "a short line": ("evaluation.csv", b"metric,value,N\nfid,3,5\nfid,4\nfid,5,5\n"),
    "no figure": ("evaluation.csv", b"metric,value\nfid,many\n"),
    "not a number": (
        "evaluation.csv",
        b"metric,value,step\nfid,nan,1\nfid,inf,2\nfid,1e308,99999999999999999999\n",
    ),
    "no picture": ("samples/step-00000050.png", b"\x89PNG\r\n\x1a\n" + b"0" * 99),
    "another picture": (
        "samples/step-00000050.png",
        b"<svg xmlns='http://www.w3.org/2000/svg' onload='alert(1)'/>",
    ),
}
SAID = {
    "no yaml",
    "a list of settings",
    "no text",
    "unknown settings",
    "no batch",
    "words",
    "no header",
    "wide",
    "no json",
}
SAID |= {"no table", "a short line", "no figure", "no picture", "another picture"}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_is_damaged_is_a_note(tmp_path: Path, damage: str) -> None:
    whole = make_run(tmp_path / "whole", steps=50, log_every=10, previews=(50,))
    spoiled = make_run(
        tmp_path / "spoiled", steps=50, log_every=10, previews=(50,), method="repa", method__depth=2
    )
    write_figures(whole, {})
    name, content = DAMAGE[damage]
    (spoiled / name).write_bytes(content)
    page, notes = page_of(whole, spoiled)
    assert all("\n" not in note and note in page.text for note in notes)
    if damage in SAID - {"wide"}:
        assert [note.partition(":")[0] for note in notes] == ["spoiled"]
    else:
        assert len(notes) == (damage == "wide")
    assert "whole" in page.text
    (cost,) = page.with_heading("MFU")
    assert [row[0] for row in cost[1:]] == ["whole", "spoiled"]
    assert "alert" not in page.text


def test_a_picture_too_large_and_files_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "run", steps=50, log_every=10)
    large = write_preview(run, 50, 1200)
    page, notes = page_of(run)
    assert notes == []
    (image,) = [attributes for tag, attributes in page.tags if tag == "img"]
    assert (image["width"], image["height"]) == ("1024", "1024")
    assert (image["src"] or "").startswith("data:image/jpeg;base64,")
    with monkeypatch.context() as patch:
        patch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
        assert len(page_of(run)[1]) == 1
    large.unlink()
    large.mkdir()
    (run / "timing.csv").unlink()
    (run / "timing.csv").mkdir()
    page, notes = page_of(run)
    assert len(notes) == 2
    assert "img" not in {tag for tag, _ in page.tags}


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=50, log_every=10)
    (tmp_path / "empty").mkdir()
    for wrong in (
        [run, tmp_path / "nowhere"],
        [run, tmp_path / "empty"],
        [run, tmp_path / "run" / ".." / "run"],
    ):
        with pytest.raises(RepaError) as caught:
            compare_runs(wrong)
        assert caught.value.field == "RUN"
        assert caught.value.remedy


def test_names_are_as_short_as_tells_them_apart(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / name, steps=50, log_every=10) for name in ("a/x/run", "b/x/run", "c")]
    assert [run.name for run in read_runs(folders[:2])] == ["a/x/run", "b/x/run"]
    assert [run.name for run in read_runs(folders[1:])] == ["run", "c"]


def test_runs_of_before_costs_were_recorded(tmp_path: Path) -> None:
    run = make_run(tmp_path / "old", steps=50, log_every=10)
    (run / "timing.csv").write_text(
        "step,images_per_second\n" + "".join(f"{step},20\n" for step in range(10, 51, 10))
    )
    page, _ = page_of(run)
    (cost,) = page.with_heading("MFU")
    row = dict(zip(cost[0], cost[1], strict=True))
    assert row["device-hours"] == f"≈ {50 * 32 / 20 / 3600:.3g}"
    assert (row["bytes read"], row["peak memory"]) == ("–", "–")
    rows: list[Any] = [each for each in page.tags if each[1].get("id") == "axis-hours"]
    assert len(rows) == 1


def test_a_page_of_many_runs_stays_small(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path / f"run{number}", steps=1000, log_every=1, lr=1e-4 * (number + 1))
        for number in range(6)
    ]
    html, notes = compare_runs(runs)
    assert notes == []
    assert len(html.encode()) < 1_000_000
    assert html.count("dash0") > 0
