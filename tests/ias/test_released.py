"""The released rules of [U] against their vectors, and votes against those of [Q]."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from prmfast.ias import compute_n_ias, determine_k, determine_m, majority_vote, weighted_vote


def test_calprm_vectors(shared_vectors: Path) -> None:
    z = np.load(shared_vectors / "calprm_ias.npz")
    cases = json.loads(str(z["manifest"]))["cases"]
    assert len(cases) > 30
    for case in cases:
        name, params = case["case"], case["params"]
        if name.startswith("N_"):
            denom = float(name.split("_d")[1])
            got = [compute_n_ias(p, denom, params["q"], params["eps"]) for p in z[f"{name}/in/p"]]
            assert got == z[f"{name}/out/N"].tolist(), name
            continue
        ends = np.cumsum(z[f"{name}/in/row_lens"])
        rows = [part.tolist() for part in np.split(z[f"{name}/in/scores_flat"], ends[:-1])]
        for letter, rule in (("K", determine_k), ("M", determine_m)):
            assert rule(rows, **params) == z[f"{name}/out/{letter}_per_row"].tolist(), name
            assert rule(rows, **params, interleave=False) == z[f"{name}/out/{letter}_off"].tolist(), name


def test_quantile_rows_use_the_lower_bound() -> None:
    rows = torch.tensor([[[0.1, 0.5, 0.9], [0.4, 0.6, 0.7]], [[0.99, 1.0, 1.0], [0.8, 0.9, 1.0]]], dtype=torch.float64)
    lower = rows[..., 0].tolist()
    assert determine_m(rows, 16, 2, lb_idx=0) == determine_m(lower, 16, 2)
    assert determine_k(list(rows), 4, 4, lb_idx=0) == determine_k(lower, 4, 4)
    assert determine_m(rows, 16, 2, lb_idx=0) != determine_m(rows, 16, 2, lb_idx=1)


def test_nan_counts_as_eps() -> None:
    assert compute_n_ias(math.nan) == compute_n_ias(0.0) == math.ceil(math.log(0.01) / math.log(1 - 1e-4))


def test_released_errors() -> None:
    with pytest.raises(ValueError, match=r"q must lie in \(0, 1\), got 1.0"):
        compute_n_ias(0.5, q=1.0)
    with pytest.raises(ValueError, match="denom must be finite and > 0, got 0"):
        compute_n_ias(0.5, 0.0)
    with pytest.raises(ValueError, match=r"eps must lie in \(0, 0.5\), got 0.5"):
        compute_n_ias(0.5, eps=0.5)
    with pytest.raises(ValueError, match="at least one score a row, got none in row 1"):
        determine_k([[0.5], []], 4, 4)
    with pytest.raises(ValueError, match="row 0 needs lb_idx"):
        determine_m([[[0.1, 0.2]]], 4, 4)
    with pytest.raises(ValueError, match="leave lb_idx out, got lb_idx=1"):
        determine_m([[0.1, 0.2]], 4, 4, lb_idx=1)
    with pytest.raises(ValueError, match="max_leaves must be >= 1, got 0"):
        determine_m([[0.1]], 4, 0)


def test_pqm_votes(shared_vectors: Path) -> None:
    z = np.load(shared_vectors / "pqm_bon.npz")
    for case in json.loads(str(z["manifest"]))["cases"]:
        name, n = case["case"], case["params"]["n"]
        answers, rewards = z[f"{name}/in/answers"], z[f"{name}/out/reward"]
        got = [
            weighted_vote(a[:n].tolist(), r[:n].tolist(), link="sigmoid") for a, r in zip(answers, rewards, strict=True)
        ]
        assert got == z[f"{name}/out/weighted_vote_answer"].tolist()


def test_votes() -> None:
    assert majority_vote(["a", "b", "b", None, None, None]) == "b"
    assert majority_vote(["b", "a"]) == "b"
    assert majority_vote([None]) is None
    assert majority_vote([]) is None
    assert weighted_vote(["a", "b", "b", None], [0.9, 0.4, 0.4, 5.0]) == "a"
    assert weighted_vote(["a", "b"], [-1000.0, 1000.0], link="sigmoid") == "b"
    with pytest.raises(ValueError, match=r"one entry per answer \(2\), got 1"):
        weighted_vote(["a", "b"], [1.0])
    with pytest.raises(ValueError, match=r"scores must be >= 0, got -1.0 at 1"):
        weighted_vote(["a", "b"], [1.0, -1.0])
    with pytest.raises(ValueError, match="link must be"):
        weighted_vote(["a"], [1.0], link="logit")  # type: ignore[arg-type]
