"""The studies of DistRL: every run of the tiny world at the smallest sizes, and what plain GRPO has in common."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(not (ROOT / "benchmarks").is_dir(), reason="the source archive has no benchmarks")


@pytest.mark.slow
def test_the_study_runs_and_its_tables_are_full(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    from benchmarks.distrl_tiny import Sizes, cells, main
    from benchmarks.readme import distrl_tiny

    sizes = Sizes(4, 2, 4, offline=1, sweep=2, imbalance=2, every=1, pool=60, test=8, answers=2, calibration=30)
    output, plot = tmp_path / "study.json", tmp_path / "study.png"
    main(["--seeds", "0", "--jobs", "1", "--output", str(output), "--plot", str(plot)], sizes)
    report = json.loads(output.read_text())
    assert len(report["cells"]) == len(cells(sizes))
    ends = {cell["name"]: cell["curve"][-1][0] for cell in report["cells"] if cell["group"] == "methods"}
    assert len(ends) == 4
    assert set(ends.values()) == {sizes.steps * sizes.prompts * sizes.samples}  # equal rollouts, offline ones included
    text = distrl_tiny(report)
    assert "nan" not in text
    assert text.count("| naive |") == 2
    assert plot.stat().st_size < 80_000
    assert "budgets for the target" in capsys.readouterr().out


def test_a_budget_of_stored_rollouts_misses_as_often_as_draws_without_return() -> None:
    from benchmarks.distrl_tiny import TRUTH, all_wrong

    correct, drawn = torch.tensor([0, 63, 64, 32, 62]), torch.tensor([5, 1, 3, 2, 3])
    two = 32 * 31 / (TRUTH * (TRUTH - 1))
    torch.testing.assert_close(
        all_wrong(correct, drawn),
        torch.tensor([1.0, 1 / 64, 0.0, two, 0.0], dtype=torch.float64),
        rtol=1e-9,
        atol=1e-12,
    )


def test_plain_and_ours_begin_with_the_same_loss_gradient() -> None:
    pytest.importorskip("transformers")
    from benchmarks.distrl_cost import Batch, PlainGRPO, Sizes, ours
    from prmfast.distrl import LoopConfig

    sizes = Sizes(vocabulary=300, width=16, layers=1, prompts=2, samples=2, prompt=3, shortest=2, longest=5)
    batch = Batch(sizes)
    plain = [PlainGRPO(batch, sizes, "cpu", answers_only=only) for only in (False, True)]
    step = ours(batch, sizes, "cpu", LoopConfig.grpo())
    for one in plain:
        one.step()
    step()
    policy = step.__self__.policy.model  # type: ignore[attr-defined]
    for name, parameter in policy.named_parameters():
        for one in plain:
            expected = one.model.get_parameter(name).grad
            torch.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=1e-6, msg=name)
