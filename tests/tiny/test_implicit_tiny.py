"""The benchmark of implicit models: its labels and batches by hand, and the whole command at tiny sizes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from prmfast.tiny import TinyWorld

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(not (ROOT / "benchmarks").is_dir(), reason="the source archive has no benchmarks")

QUESTION = "5 + 9 max 4 * 2 _ _ _ _ _ _ _ _ _ _ ?"  # 1, 4, 8 modulo 13


def test_the_first_wrong_step() -> None:
    from benchmarks.implicit_tiny import first_wrong

    expected = {
        "1 ; 4 ; 8 ; # 8": -1,
        "2 ; 4 ; 8 ; # 8": 0,  # max forgives it: the answer is right
        "1 ; 4 ; 9 ; # 9": 2,
        "1 ; 4 ; 8 ; # 7": 3,
        "1 ; 4 ; # 4": 2,
        "1 ; 4 ; 8 ;": 2,  # cut off: nothing wrong before its end
        "1 ; 4 ; 8 ; 8 ; # 8": 3,
    }
    assert first_wrong([QUESTION] * len(expected), list(expected)) == list(expected.values())


def test_pairs_and_batches() -> None:
    from benchmarks.implicit_tiny import batches, draw, pairs

    answers = draw(TinyWorld.load(), "train", (12, 4), 3)
    found = pairs(answers, 0)
    used = [row for pair in found for row in pair]
    assert len(found) > 4
    assert len(used) == len(set(used))
    for right, wrong in found:
        assert answers.prompts[right] == answers.prompts[wrong]
        assert (answers.correct[right], answers.correct[wrong]) == (1, 0)
    drawn = list(batches([1, 2, 3, 4, 5], 2, 5, 0))
    assert len(drawn) == 5
    assert sorted(row for batch in drawn[:3] for row in batch) == [0, 1, 2, 3, 4]  # an epoch


def test_training_begins_at_the_reference_and_lowers_the_loss() -> None:
    from benchmarks.implicit_tiny import METHODS, QUICK, batch_loss, draw, pairs, train
    from prmfast.tiny import TinyLearner

    world = TinyWorld.load()
    answers = draw(world, "train", (8, 4), 5)
    rows = [row for column in zip(*pairs(answers, 0), strict=True) for row in column]
    for name in ("IPVRM, uniform", "DPO-RM"):
        method = replace(METHODS[name], rate=1e-3)
        before = batch_loss(TinyLearner(world.policy), method, answers, rows).item()
        at_zero = method.loss.keywords.get("margin", 0.0)  # type: ignore[attr-defined]
        assert before == pytest.approx(torch.nn.functional.softplus(torch.tensor(at_zero)).item(), rel=1e-4)
        trained = train(world, method, answers, replace(QUICK, updates=12, batch=16), 0)
        assert batch_loss(trained, method, answers, rows).item() < 0.95 * before


def test_the_command(tmp_path: Path) -> None:
    from benchmarks.implicit_tiny import BASELINE, METHODS, main
    from benchmarks.readme import implicit_tiny

    output, plot = tmp_path / "r.json", tmp_path / "p.png"
    main(["--quick", "--seeds", "1", "--jobs", "1", "--output", str(output), "--plot", str(plot)])
    result = json.loads(output.read_text())
    (run,) = result["seeds"]
    assert list(run) == [*METHODS, BASELINE, "random answer", "majority", "pass@n"]
    assert set(run["DPO-RM"]) == set(run[BASELINE])
    assert all(0 <= value <= 1 for name, value in run["DPO-RM"].items() if "spearman" not in name)
    assert all(run["random answer"][name] <= run["pass@n"][name] for name in run["pass@n"])
    assert plot.read_bytes()[:4] == b"\x89PNG"
    assert implicit_tiny(result).count("\n| ") == 1 + 1 + len(METHODS) + 4
