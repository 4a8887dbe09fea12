"""The benchmark of small PRMs: every loss learns what can be learned, and the whole run works on the real files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from prmfast.evaluation import Chain, cross_fitted_first_errors, first_error_metrics

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(not (ROOT / "benchmarks").is_dir(), reason="the source archive has no benchmarks")


def sums(count: int, seed: int) -> list[Chain]:
    """Chains of additions; from the first wrong one on, all are wrong, as PQM's labels assume."""
    rng = np.random.default_rng(seed)
    chains = []
    for i in range(count):
        steps = int(rng.integers(2, 6))
        label = int(rng.integers(-1, steps))
        texts = []
        for j in range(steps):
            a, b = rng.integers(2, 90, 2)
            off = int(rng.integers(3, 30)) if 0 <= label <= j else 0
            texts.append(f"We add the numbers: {a} + {b} = {a + b + off}")
        chains.append(Chain(f"question {i}", tuple(texts), label, f"q{seed}-{i}"))
    return chains


@pytest.mark.parametrize("loss", ["BCE", "MSE", "ORM", "PQM", "PQM theorem", "PQM first wrong"])
def test_every_loss_learns(loss: str) -> None:
    from benchmarks.text_prm import StepFeatures, TextPRM

    train, test = sums(250, 0), sums(150, 1)
    features = StepFeatures(components=4).fit(train)
    model = TextPRM(loss, epochs=20).fit(features.transform(train), [chain.step_labels() for chain in train])
    scores = model.scores(features.transform(test))
    assert [len(row) for row in scores] == [len(chain.steps) for chain in test]
    labels = [chain.first_error for chain in test]
    found = cross_fitted_first_errors(scores, labels, [chain.question_id for chain in test])
    by_place = [[-float(i) for i in range(len(chain.steps))] for chain in test]
    blind = cross_fitted_first_errors(by_place, labels, [chain.question_id for chain in test])
    floor = first_error_metrics(blind.predicted, labels).f1
    assert first_error_metrics(found.predicted, labels).f1 > max(0.6, floor + 0.2)


def test_step_counts() -> None:
    from benchmarks.text_prm import step_counts

    chain = Chain("3 apples", ("3 + 4 = 7", "7 \\times 2 = 15 and 9/0 = 1", ""), -1, "q")
    counts = step_counts(chain)
    assert counts[:, 5].tolist() == [1, 0, 0]  # sums that hold
    assert counts[:, 6].tolist() == [0, 2, 0]  # sums that do not
    assert counts[0, 7] == pytest.approx(2 / 3)  # 3 is in the question


def test_the_run(shared_data: Path, tmp_path: Path) -> None:
    from benchmarks.prm_real import FILES, main

    files = ["--output", str(tmp_path / "r.json"), "--plots", str(tmp_path)]
    small = ["--folds", "2", "--limit", "120", "--resamples", "20", "--largest-n", "2", "--losses", "BCE", "PQM"]
    main([str(shared_data), *small, *files, "--seeds", "1", "--quiet"])
    tables = {name: runs[0] for name, runs in json.loads((tmp_path / "r.json").read_text())["tables"].items()}
    assert set(tables) == set(FILES)
    losses = {row["loss"] for row in tables["processbench"]}
    assert losses == {row["loss"] for row in tables["ipvrm_qwen3_0p6b_val"]} == {"BCE", "PQM", "step number"}
    assert {row["n"] for row in tables["game24_gpt4_cot"]} == {1, 2}
    for name in ("processbench.png", "bigbench_mistake.png", "game24_gpt4_cot.png"):
        assert (tmp_path / name).read_bytes()[:4] == b"\x89PNG"
    two = ["--files", "processbench", "--seeds", "2", "--jobs", "1", "--output", str(tmp_path / "two.json")]
    main([str(shared_data), *small, *two, "--quiet"])
    first, second = json.loads((tmp_path / "two.json").read_text())["tables"]["processbench"]
    assert first == tables["processbench"]
    f1 = [{row["loss"]: row["f1"] for row in rows if row["subset"] == "all"} for rows in (first, second)]
    assert f1[0]["step number"] == f1[1]["step number"]  # what is not trained has no seed
    assert f1[0]["BCE"] != f1[1]["BCE"]
