"""Losses on single steps and the pinball loss, against the recorded values of the released trainers."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from prmfast.prm.losses import bce_loss, mse_loss, orm_loss, weighted_quantile_loss
from tests.prm.loss_checks import (
    RTOL,
    SUFFIX,
    assert_finite,
    assert_padding_is_nothing,
    assert_recorded,
    value_and_grad,
)
from tests.vectors import Vectors, assert_relative

LOSSES = {"nce": partial(bce_loss, variant="released"), "mse": mse_loss, "orm": partial(orm_loss, variant="released")}
PAPER = {"nce": bce_loss, "mse": mse_loss, "orm": orm_loss}
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])


def batch(seed: int = 0, rows: int = 4, steps: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scores = 3 * torch.randn(rows, steps, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 2, (rows, steps), generator=generator)
    labels[torch.rand(rows, steps, generator=generator) < 0.3] = -100
    return scores, labels


@dtypes
def test_released_baselines(dtype: torch.dtype, shared_vectors: Path) -> None:
    """Recorded from scores of whole sequences, of which the released trainer takes the step tokens."""
    vectors = Vectors(shared_vectors / "pqm_pointwise.npz")
    for case in vectors.cases:
        x, y = vectors.inputs(case), vectors.outputs(case)
        kind, size = case["params"]["loss_type"], SUFFIX[dtype]
        assert torch.equal(x["has_neg"] != 0, (x["step_labels"] == 0).any(1))

        def loss(values: Tensor, x: dict[str, Tensor] = x, kind: str = kind) -> Tensor:
            return LOSSES[kind](values.gather(1, x["special_tokens"]), x["step_labels"])

        assert_recorded(loss, x["values"], y[f"loss_{size}"], y[f"grad_{size}"], dtype)
        moderate = x["values"].clamp(-8, 8)
        torch.testing.assert_close(
            PAPER[kind](moderate.gather(1, x["special_tokens"]), x["step_labels"]), loss(moderate), rtol=1e-10, atol=0
        )


def test_soft_labels_are_expectations() -> None:
    """Cross-entropy and squared error of a success rate: the mean over outcomes drawn with it, up to the variance."""
    scores, rates = batch()[0][0], torch.tensor([0.0, 0.125, 0.5, 0.75, 1.0, 0.3], dtype=torch.float64)
    for loss, spread in ((bce_loss, 0.0), (mse_loss, (rates * (1 - rates)).mean())):
        one = torch.stack([loss(s, torch.ones(())[None]) for s in scores[:, None]])
        zero = torch.stack([loss(s, torch.zeros(())[None]) for s in scores[:, None]])
        mixed = (rates * one + (1 - rates) * zero).mean() - spread
        torch.testing.assert_close(loss(scores, rates), mixed, rtol=1e-12, atol=0)


@given(st.integers(0, 10_000), st.sampled_from(sorted(PAPER)))
@settings(max_examples=25, deadline=None)
def test_padding(seed: int, kind: str) -> None:
    scores, labels = batch(seed)
    for loss in (PAPER[kind], LOSSES[kind]):
        assert_padding_is_nothing(partial(loss, labels=labels), scores, labels == -100)
        wider = torch.nn.functional.pad(labels, (2, 3, 0, 2), value=-100)
        filled = torch.nn.functional.pad(scores, (2, 3, 0, 2), value=9.0)
        torch.testing.assert_close(loss(filled, wider), loss(scores, labels), rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", PAPER)
def test_finite_and_gradcheck(kind: str) -> None:
    scores, labels = batch(2)
    for scale in (1.0, 1e4):
        assert_finite(partial(PAPER[kind], labels=labels), scale * scores)
        value, grad = value_and_grad(partial(LOSSES[kind], labels=labels), scale * scores)
        assert bool(torch.isfinite(value))
        assert bool(torch.isfinite(grad).all())
    assert torch.autograd.gradcheck(partial(PAPER[kind], labels=labels), (scores.requires_grad_(),))
    for empty in (torch.full((3, 4), -100), torch.zeros(0, 4, dtype=torch.int64), torch.zeros(3, 0, dtype=torch.int64)):
        value, grad = value_and_grad(partial(PAPER[kind], labels=empty), torch.ones(empty.shape))
        assert value.item() == 0
        assert bool((grad == 0).all())


def test_orm_reads_the_last_step_and_the_whole_row() -> None:
    labels = torch.tensor([[1, 0, 1, -100], [1, 1, -100, -100]])
    value, grad = value_and_grad(partial(orm_loss, labels=labels), torch.zeros(2, 4))
    assert value.item() == pytest.approx(0.6931471805599453)
    assert torch.equal(grad, torch.tensor([[0, 0, 0.25, 0], [0, -0.25, 0, 0]], dtype=torch.float64))


@dtypes
def test_pinball(dtype: torch.dtype, shared_vectors: Path) -> None:
    """Levels stay exact; rounded to bfloat16 as the released trainer does, they give its other recorded values."""
    vectors = Vectors(shared_vectors / "calprm_wql.npz")
    size = SUFFIX[dtype]
    for case in vectors.cases:
        x, y = vectors.inputs(case), vectors.outputs(case)
        exact = case["params"]["quantiles"]
        rounded = torch.tensor(exact, dtype=torch.float64).bfloat16().double()
        for levels, tail in ((exact, ""), (rounded, "_qbf16")):
            loss = partial(weighted_quantile_loss, targets=x["targets"].to(dtype), levels=levels)
            assert_recorded(
                lambda s, loss=loss: loss(torch.sigmoid(s)),
                x["logits"],
                y[f"loss_{size}{tail}"],
                y[f"glogits_{size}{tail}"],
                dtype,
            )
            scores = torch.sigmoid(x["logits"].to(dtype))
            _, slope = value_and_grad(loss, scores, dtype)
            assert_relative(scores.double(), y[f"scores_{size}"].double(), RTOL[dtype])
            assert_relative(slope.double(), y[f"gscores_{size}{tail}"].double(), RTOL[dtype])


def test_pinball_laws() -> None:
    """Padding rows never count, a tie has the gradient half way, and the minimiser is the quantile."""
    generator = torch.Generator().manual_seed(0)
    quantiles = torch.rand(6, 3, generator=generator, dtype=torch.float64)
    targets = torch.tensor([0.0, 0.5, -100.0, 1.0, 0.25, -100.0], dtype=torch.float64)
    levels = [0.1, 0.5, 0.9]
    loss = partial(weighted_quantile_loss, targets=targets, levels=levels)
    assert_padding_is_nothing(loss, quantiles, (targets < 0)[:, None].expand(6, 3))
    torch.testing.assert_close(
        loss(quantiles),
        weighted_quantile_loss(quantiles[targets >= 0], targets[targets >= 0], levels),
        rtol=1e-12,
        atol=0,
    )
    _, tie = value_and_grad(
        partial(weighted_quantile_loss, targets=torch.tensor([0.5]), levels=levels), torch.full((1, 3), 0.5)
    )
    torch.testing.assert_close(tie, (0.5 - torch.tensor([levels], dtype=torch.float64)) / 3)
    sample = torch.rand(2001, generator=generator, dtype=torch.float64)
    grid = torch.linspace(0, 1, 201, dtype=torch.float64)
    for level in levels:
        risk = torch.stack([weighted_quantile_loss(g.expand(2001, 1), sample, [level]) for g in grid])
        assert abs(float(grid[risk.argmin()]) - float(sample.quantile(level))) <= 0.005
    value, grad = value_and_grad(
        partial(weighted_quantile_loss, targets=torch.full((2,), -100.0), levels=levels), torch.rand(2, 3)
    )
    assert value.item() == 0
    assert bool((grad == 0).all())


@pytest.mark.parametrize(
    ("loss", "change", "error", "message"),
    [
        (bce_loss, {"labels": torch.tensor([[1.5, 0.0]])}, ValueError, r"labels must be in \[0, 1\] or -100, got 1.5"),
        (mse_loss, {"labels": torch.tensor([[float("nan"), 0.0]])}, ValueError, r"got nan at \(0, 0\)"),
        (bce_loss, {"variant": "nce"}, ValueError, "variant must be 'paper' or 'released', got 'nce'"),
        (orm_loss, {"labels": torch.tensor([[0.5, 0.0]])}, ValueError, "labels must be 0, 1 or -100, got 0.5"),
        (orm_loss, {"scores": torch.zeros(2), "labels": torch.zeros(2)}, ValueError, "scores must have 2 dimension"),
        (mse_loss, {"scores": [[0.0, 1.0]]}, TypeError, "scores must be a torch.Tensor, got list"),
        (mse_loss, {"labels": torch.zeros(1, 3)}, ValueError, r"labels must have shape \(1, 2\), got \(1, 3\)"),
    ],
)
def test_errors(loss: Any, change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        loss(**({"scores": torch.zeros(1, 2), "labels": torch.tensor([[1, 0]])} | change))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"levels": [0.5, 1.5]}, ValueError, r"levels must lie in \[0, 1\], got \[0.5, 1.5\]"),
        ({"levels": [0.5]}, ValueError, r"levels must have shape \(2,\), got \(1,\)"),
        ({"targets": torch.tensor([2.0])}, ValueError, r"targets must be in \[0, 1\] or -100, got 2 at \(0,\)"),
    ],
)
def test_pinball_errors(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        weighted_quantile_loss(
            **({"quantiles": torch.zeros(1, 2), "targets": torch.tensor([0.5]), "levels": [0.1, 0.9]} | change)
        )
