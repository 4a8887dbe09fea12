"""The benchmark of losses on the tiny world: its measures on scores made by hand, and the whole run at a tiny size."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from prmfast.tiny import TinyWorld

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(not (ROOT / "benchmarks").is_dir(), reason="the source archive has no benchmarks")


def test_the_truth_ranks_its_own_steps() -> None:
    from benchmarks.ranking_tiny import Answers, ranked

    answers = Answers.draw(TinyWorld.load(), "test", questions=12, samples=2, rollouts=6, seed=0)
    truth = answers.successes.double().numpy()
    own = ranked(truth, answers, 6)
    assert own == dict.fromkeys(own, pytest.approx(1.0))
    turned = ranked(-truth, answers, 6)
    assert turned["spearman"] == pytest.approx(-1.0)
    assert turned["in answer"] == pytest.approx(-1.0)
    assert turned["pairs"] == turned["pairs in answer"] == 0.0
    assert ranked(np.zeros_like(truth), answers, 6)["pairs"] == 0.5
    # the final answer, and padding, do not count
    last = answers.step & (answers.step.flip(1).cumsum(1).flip(1) == 1)
    assert ranked(np.where(last | ~answers.step, -99.0, truth), answers, 6) == own


def test_the_run(tmp_path: Path) -> None:
    from benchmarks.ranking_tiny import LOSSES, main

    sizes = {"train": 12, "train-rollouts": 2, "test": 6, "pool": 8, "ranked": 2, "truth": 4}
    small = [text for name, value in sizes.items() for text in (f"--{name}", str(value))]
    files = ["--output", str(tmp_path / "r.json"), "--plots", str(tmp_path)]
    threads = torch.get_num_threads()
    main(["--seeds", "2", "--jobs", "1", *small, *files])
    assert torch.get_num_threads() == threads
    report = json.loads((tmp_path / "r.json").read_text())
    assert [set(run["losses"]) for run in report["runs"]] == [set(LOSSES)] * 2
    assert {method["loss"] for method in report["methods"]} == set(LOSSES)
    for run in report["runs"]:
        bound = run["without"]["pass@n"]
        assert list(bound) == ["4", "8"]
        for loss in run["losses"].values():
            assert all(row[n] <= bound[n] + 1e-12 for row in loss["bon"].values() for n in bound)
    scores = [run["losses"]["PQM, eq. 10"]["steps"] for run in report["runs"]]
    assert scores[0] != scores[1]
    assert (tmp_path / "ranking_tiny.png").read_bytes()[:4] == b"\x89PNG"
