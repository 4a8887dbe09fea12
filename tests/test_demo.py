"""The demo end to end, on few questions and few steps: every stage runs, every file is there, the page is whole."""

from __future__ import annotations

import html
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from rich.console import Console

from prmfast.calibration.study import Study
from prmfast.demo import DemoResult, run, run_demo
from prmfast.traces import read_traces

TESTS = 20

pytestmark = pytest.mark.xdist_group("demo")  # one worker: the demo runs once


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[DemoResult, Path, str]]:
    directory = tmp_path_factory.mktemp("demo") / "report"
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        sizes = {"TEST_QUESTIONS": TESTS, "POOL": 8, "ROLLOUTS": 4, "N_MAX": 8, "_STEPS": 8}
        sizes |= {"LIVE_TARGETS": (0.7, 0.9), "LIVE_FIXED": (1, 4)}
        for name, value in sizes.items():
            patch.setattr(run, name, value)
        printed = io.StringIO()
        torch.set_num_threads(2)  # not what the demo sets
        try:
            result = run_demo(
                directory, train=False, questions=50, seed=0, progress=False, console=Console(file=printed, width=160)
            )
            assert torch.get_num_threads() == 2
        finally:
            torch.set_num_threads(threads)
        yield result, directory, printed.getvalue()


@pytest.mark.slow
def test_every_file_is_there(done: tuple[DemoResult, Path, str]) -> None:
    _, directory, _ = done
    files = {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}
    assert files == {
        *("index.html", "traces.parquet", "frontier.json", "study/study.json"),
        *("reliability.png", "quantiles.png", "targets.png", "frontier.png", "pit.png"),
        *(
            f"study/{unit}/{method}/{name}"
            for unit in ("prefix", "question")
            for method in run.METHODS
            for name in ("config.json", "model.safetensors")
        ),
    }
    for name in ("reliability", "quantiles", "targets", "frontier", "pit"):
        assert (directory / f"{name}.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    table = read_traces(directory / "traces.parquet")
    assert (table.num_rows, len(set(table["question_id"].to_pylist()))) == (100, 50)
    assert list(Study.load(directory / "study").calibrators["prefix"]) == list(run.METHODS)


@pytest.mark.slow
def test_the_page_is_whole(done: tuple[DemoResult, Path, str]) -> None:
    result, directory, _ = done
    page = (directory / "index.html").read_text()
    text = html.unescape(page)
    assert page.startswith("<!doctype html>")
    assert page.rstrip().endswith("</html>")
    assert not re.search(r"\{\{|\}\}|\{%|%\}|\bnone\b|\bNone\b|object at 0x", page)
    assert result.world.info.miscalibration in text
    for method in run.METHODS:
        assert text.count(f"<td>{method}</td>") >= 2  # prefix and question level
    for source in re.findall(r'src="([^"]+)"', page):
        assert (directory / source).is_file()
    assert text.count("<tr") - text.count("<th>method</th>") == (
        len(result.live) + sum(row.target is not None for row in result.frontier.rows) + 2 * len(run.METHODS)
    )
    assert "CondOT's map increases by construction: 0.0 %" in text


@pytest.mark.slow
def test_the_live_runs(done: tuple[DemoResult, Path, str]) -> None:
    result, _, _ = done
    names = [(row.method, row.target) for row in result.live]
    assert names == [
        *(("fixed N = 1", None), ("fixed N = 4", None), ("condot, mean N = 4", None)),
        *((name, target) for target in (0.7, 0.9) for name in (*run.SPENDERS, "oracle")),
    ]
    by_name = dict(zip(names, result.live, strict=True))
    assert by_name[("fixed N = 4", None)].mean_drawn == 4
    assert by_name[("condot, mean N = 4", None)].mean_drawn <= 4
    for row in result.live:
        assert 0 <= row.accuracy <= row.success <= 1
        assert row.tokens > 0
        assert row.mean_drawn <= 8
        assert (row.at_target is None) == (row.fixed_for_as_many is None) == (row.target is None)
    for target in (0.7, 0.9):
        oracle = by_name[("oracle", target)]
        assert oracle.at_target == 1  # it knows what is needed, up to n_max
        assert oracle.saved is not None
        assert oracle.saved >= 0


@pytest.mark.slow
def test_the_replay(done: tuple[DemoResult, Path, str]) -> None:
    result, directory, _ = done
    rows = json.loads((directory / "frontier.json").read_text(), parse_constant=pytest.fail)
    assert [(row["method"], row["target"]) for row in rows] == [(r.method, r.target) for r in result.frontier.rows]
    assert {row["method"] for row in rows} == {*run.SPENDERS, "fixed", "oracle"}
    assert [row["asked"] for row in rows if row["method"] == "fixed"] == list(range(1, 9))


@pytest.mark.slow
def test_the_summary_in_the_terminal(done: tuple[DemoResult, Path, str]) -> None:
    result, directory, printed = done
    text = " ".join(printed.split())
    assert f"live best-of-N on {TESTS} unseen questions" in text
    assert " ".join(result.world.info.miscalibration.split()) in text
    stages = ("answers and Monte-Carlo labels", "calibrators", "live best-of-N", "replay", "report")
    assert all(stage in text for stage in stages)
    assert set(result.seconds) >= set(stages)
    assert f"report: {directory / 'index.html'}" in text
    assert all(f"{method} 0." in text for method in run.METHODS)


def test_threads_come_back_after_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no world")

    monkeypatch.setattr(run, "_world", fail)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with pytest.raises(RuntimeError, match="no world"):
            run_demo(tmp_path, train=False, questions=50, seed=0, progress=False, console=Console(file=io.StringIO()))
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)
    assert list(tmp_path.iterdir()) == []
