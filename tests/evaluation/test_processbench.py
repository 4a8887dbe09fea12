"""Chains with a first error: read, scored by a real PRM, reported without choosing a threshold on what it reports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from prmfast.evaluation import (
    Chain,
    first_error_metrics,
    first_error_table,
    read_chains,
    score_chains,
    selection_table,
)
from prmfast.evaluation.plots import selection_curves, threshold_curves
from prmfast.prm import AutoPRM, TransformersPRM
from tests.evaluation.test_best_of_n import make_pools
from tests.prm.models import save


def chains_and_scores(count: int = 160, noise: float = 0.2) -> tuple[list[Chain], list[list[float]]]:
    """Scores that fall at the first error, with noise."""
    rng = np.random.default_rng(1)
    chains, scores = [], []
    for i in range(count):
        steps = int(rng.integers(1, 6))
        label = int(rng.integers(-1, steps))
        chain = Chain(f"question {i % 50}", tuple(f"step {j}" for j in range(steps)), label, f"q{i % 50}", "ab"[i % 2])
        chains.append(chain)
        scores.append((0.3 + 0.4 * np.array(chain.step_labels()) + noise * rng.standard_normal(steps)).tolist())
    return chains, scores


def test_table() -> None:
    chains, scores = chains_and_scores()
    rows = {row["subset"]: row for row in first_error_table(scores, chains, resamples=200)}
    assert set(rows) == {"a", "b", "all"}
    assert rows["a"]["chains"] + rows["b"]["chains"] == rows["all"]["chains"] == 160
    every = rows["all"]
    value, low, high = every["f1"]
    assert low < value < high
    assert value <= every["same_chains"] + 1e-12
    assert 2 / value == pytest.approx(1 / every["accuracy_error"] + 1 / every["accuracy_correct"])
    blind = [[0.5] * len(chain.steps) for chain in chains]
    assert first_error_table(blind, chains, resamples=10)[-1]["f1"][0] == 0
    perfect = [[float(label) for label in chain.step_labels()] for chain in chains]
    assert first_error_table(perfect, chains, resamples=10)[-1]["f1"] == (1.0, 1.0, 1.0)
    with pytest.raises(ValueError, match=r"step_scores must have one entry per chain \(160\), got 1"):
        first_error_table(scores[:1], chains)


class TextScorer:
    """The same PRM without `StepScorer`: it splits the text of an answer itself."""

    def __init__(self, prm: TransformersPRM) -> None:
        self.prm_id, self.score = prm.prm_id, prm.score
        self.question_state, self.features = prm.question_state, prm.features


@pytest.mark.parametrize("kind", ["qwen", "pqm", "shepherd", "reasoneval"])
def test_scoring_by_a_transformers_prm(kind: str, tmp_path: Path) -> None:
    """Batches keep the order and change nothing, and steps given as they are have the scores of the whole answer."""
    chains = [
        Chain(f"What is {i}+1?", tuple(f"step {j}: {i}+{j}" for j in range(1 + i % 3)), -1, f"q{i}") for i in range(7)
    ]
    folder, _, _ = save(kind, tmp_path / f"tiny-{kind}")
    adapter = "math-shepherd" if kind == "shepherd" else None
    prm = AutoPRM.from_pretrained(folder, dtype=torch.float64, adapter=adapter)
    found = score_chains(prm, chains, batch_size=3)
    for chain, scores in zip(chains, found, strict=True):
        answer = "\n\n".join(prm.adapter.format_steps(chain.steps))
        assert scores == pytest.approx(prm.score([chain.question], [[answer]])[0][0], rel=1e-6)
    broken = Chain("q", ("one\n\nmore", "two"), -1, "q")
    assert len(score_chains(prm, [broken])[0]) == 2
    if kind == "qwen":
        split = TextScorer(prm)
        assert np.allclose(np.concatenate(score_chains(split, chains)), np.concatenate(found), rtol=1e-6, atol=0)
        message = r"chain 7: .*tiny-qwen sees 3 steps, the chain has 2; separator must be"
        with pytest.raises(ValueError, match=message):
            score_chains(split, [*chains, broken], batch_size=3)


def test_real_files(shared_data: Path) -> None:
    for name, count, subsets in (("processbench", 1771, 4), ("bigbench_mistake", 1173, 5)):
        chains = read_chains(shared_data / f"{name}.parquet")
        assert len(chains) == count
        assert len({chain.subset for chain in chains}) == subsets
    assert sum(chain.first_error == -1 for chain in read_chains(shared_data / "processbench.parquet")) == 607
    never = first_error_metrics([-1] * len(chains), [chain.first_error for chain in chains])
    assert (never.f1, never.accuracy_correct) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"problem": None}, "row 1: problem must be a string, got NoneType"),
        ({"steps": []}, r"row 1: steps must be a list of strings, not empty, got \[\]"),
        ({"label": 2}, r"row 1: first_error must be an integer in \[-1, 2\), got 2"),
    ],
)
def test_rows_are_checked(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    good = {"problem": "p", "steps": ["a", "b"], "label": -1}
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in (good, good | change)))
    with pytest.raises(ValueError, match=message):
        read_chains(path)
    path.write_text(json.dumps(good))
    assert read_chains(path) == [Chain("p", ("a", "b"), -1, "p")]


def test_plots() -> None:
    chains, scores = chains_and_scores()
    labels = [chain.first_error for chain in chains]
    figure = threshold_curves(
        {"prm": scores, "blind": [[0.5 + 0.01 * i for i in range(len(chain))] for chain in scores]}, labels
    )
    curve, mark, *_ = figure.axes[0].lines
    assert mark.get_ydata()[0] >= max(curve.get_ydata()) - 1e-12
    rows = selection_table(make_pools(), [1, 4, 16], trials=5, resamples=20)
    axis = selection_curves(rows).axes[0]
    assert {text.get_text() for text in axis.get_legend().get_texts()} == {row["method"] for row in rows}
