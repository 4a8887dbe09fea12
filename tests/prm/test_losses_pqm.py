"""pqm_loss: the papers' equations, the released programs, and the laws that neither keeps."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from prmfast.prm.losses import pqm_loss, released_pqm_loss
from tests.prm.loss_checks import assert_finite, assert_padding_is_nothing, assert_recorded, value_and_grad
from tests.vectors import Vectors, assert_relative

PAPER: dict[str, dict[str, Any]] = {
    "eq10_printed": {},
    "eq10_officialnorm": {"normalization": "released"},
    "eq12_printed": {"variant": "first_wrong"},
    "eq12_officialnorm": {"variant": "first_wrong", "normalization": "released"},
    "eq9_theorem_order": {"variant": "theorem"},
    "eq9_printed_order": {"variant": "printed"},
}
RELEASED = {"pqm_rank": "pqm", "pqm_ablate": "first_wrong", "pqm_theory": "theorem"}
ALL: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    **{name: partial(pqm_loss, **options) for name, options in PAPER.items()},
    **{name: partial(released_pqm_loss, variant=variant) for name, variant in RELEASED.items()},
}
every_loss = pytest.mark.parametrize("name", ALL)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])


def batch(seed: int = 0, rows: int = 5, steps: int = 7) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scores = 3 * torch.randn(rows, steps, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 2, (rows, steps), generator=generator)
    length = torch.randint(1, steps + 1, (rows,), generator=generator)
    labels[torch.arange(steps) >= length[:, None]] = -100
    return scores, labels


@pytest.mark.parametrize("equation", PAPER)
def test_equations(equation: str, shared_vectors: Path) -> None:
    """Where a row has no correct step the paper divides by zero: there ours is 0, and its gradient too."""
    vectors = Vectors(shared_vectors / "pqm_paper.npz")
    for case in vectors.cases:
        x, y = vectors.inputs(case), vectors.outputs(case)
        value, grad = value_and_grad(
            lambda s, x=x, case=case: pqm_loss(s, x["labels"], zeta=case["params"]["zeta"], **PAPER[equation]),
            x["scores"],
        )
        defined = torch.ones(len(grad), dtype=torch.bool)
        if equation.endswith("_printed"):
            defined = (x["labels"] == 1).any(1)
            assert bool((grad[~defined] == 0).all())
        if bool(defined.all()):
            assert_relative(value, y[f"{equation}_loss"], 1e-9)
        if bool(defined.any()):
            assert_relative(grad[defined], y[f"{equation}_grad"][defined], 1e-9)


@dtypes
@pytest.mark.parametrize("program", RELEASED)
def test_released_programs(program: str, dtype: torch.dtype, shared_vectors: Path) -> None:
    """Equal to what the released programs return; where those overflow, equal to their formula in float64."""
    vectors = Vectors(shared_vectors / f"{program}.npz")
    suffix = "f32" if dtype == torch.float32 else "f64"
    for case in vectors.cases:
        x, y = vectors.inputs(case), vectors.outputs(case)
        loss = partial(
            released_pqm_loss, labels=x["labels"], zeta=float(case["params"]["zeta"]), variant=RELEASED[program]
        )
        value, grad = y[f"loss_{suffix}"], y[f"grad_{suffix}"]
        if case["case"].startswith("scale_") and dtype == torch.float32:
            assert_finite(loss, x["scores"])
        else:
            assert_recorded(loss, x["scores"], value, grad, dtype)


def naive(scores: Tensor, labels: Tensor, zeta: float) -> Tensor:
    """Eq. 10 as it is written, in float64."""
    rows = []
    for s, y in zip(scores, labels, strict=True):
        c, w = s[y == 1], s[y == 0]
        if len(c) == 0:
            rows.append(s.new_zeros(()))
            continue
        chain = torch.cat([s.new_zeros(1), c]).exp()
        below = (w + zeta).exp().sum()
        rows.append(-(chain / (chain.cumsum(0) + below)).log().sum() / len(c))
    return torch.stack(rows).mean()


@given(st.integers(0, 10_000), st.sampled_from([0.0, 2.0, 4.0, 16.0]))
@settings(max_examples=30, deadline=None)
def test_equals_the_naive_line(seed: int, zeta: float) -> None:
    scores, labels = batch(seed)
    value, grad = value_and_grad(lambda s: pqm_loss(s, labels, zeta=zeta), scores)
    truth, slope = value_and_grad(lambda s: naive(s, labels, zeta), scores)
    assert_relative(value, truth, 1e-12)
    assert_relative(grad, slope, 1e-9)


@given(st.integers(0, 10_000), st.sampled_from(list(ALL)))
@settings(max_examples=40, deadline=None)
def test_padding_and_order_of_rows(seed: int, name: str) -> None:
    loss = ALL[name]
    scores, labels = batch(seed)
    assert_padding_is_nothing(lambda s: loss(s, labels), scores, labels == -100)
    value = loss(scores, labels)
    order = torch.randperm(len(scores), generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(loss(scores[order], labels[order]), value, rtol=1e-12, atol=0)
    columns = 0 if name == "pqm_theory" else 3  # the released eq. 9 is the one that padding columns change
    wider = torch.nn.functional.pad(labels, (0, columns, 0, 2), value=-100)
    filled = torch.nn.functional.pad(scores, (0, columns, 0, 2), value=7.0)
    torch.testing.assert_close(loss(filled, wider), value, rtol=1e-12, atol=0)


@every_loss
@pytest.mark.parametrize("scale", [1.0, 100.0, 3e4])
def test_finite(name: str, scale: float) -> None:
    scores, labels = batch(3)
    assert_finite(lambda s: ALL[name](s, labels), scale * scores / 12)


@every_loss
def test_gradcheck(name: str) -> None:
    scores, labels = batch(1, rows=3, steps=5)
    assert torch.autograd.gradcheck(lambda s: ALL[name](s, labels), (scores.requires_grad_(),))


def test_nothing_to_learn_from() -> None:
    for labels in (
        torch.full((3, 4), -100),
        torch.zeros(0, 4, dtype=torch.int64),
        torch.zeros(3, 0, dtype=torch.int64),
    ):
        for loss in ALL.values():
            value, grad = value_and_grad(partial(loss, labels=labels), torch.ones(labels.shape))
            assert value.item() == 0
            assert bool((grad == 0).all())


def test_ranks_as_the_theorem_says() -> None:
    """The loss is least where correct steps rise and wrong ones lie below the prompt by more than zeta."""
    labels = torch.tensor([[1, 1, 0, 0]])
    right = pqm_loss(torch.tensor([[8.0, 16.0, -12.0, -16.0]]), labels)
    assert right < 0.01
    for wrong in ([[16.0, 8.0, -12.0, -16.0]], [[8.0, 16.0, 12.0, -16.0]], [[-8.0, 16.0, -12.0, -16.0]]):
        assert pqm_loss(torch.tensor(wrong), labels) > 1.0


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"labels": torch.tensor([[1, 2]])}, ValueError, r"labels must be 0, 1 or -100, got 2 at \(0, 1\)"),
        ({"labels": torch.tensor([1, 0])}, ValueError, r"labels must have 2 dimension\(s\), got shape \(2,\)"),
        ({"labels": [[1, 0]]}, TypeError, "labels must be a torch.Tensor, got list"),
        ({"scores": torch.zeros(1, 2, dtype=torch.int64)}, TypeError, "scores must have dtype"),
        ({"zeta": float("nan")}, ValueError, "zeta must be finite"),
        ({"variant": "rank"}, ValueError, "variant must be 'pqm' or .* got 'rank'"),
        ({"normalization": "sum"}, ValueError, "normalization must be 'paper' or 'released', got 'sum'"),
        ({"variant": "printed", "normalization": "released"}, ValueError, "must be 'paper' for variant='printed'"),
    ],
)
def test_errors(change: dict[str, Any], error: type[Exception], message: str) -> None:
    given_: dict[str, Any] = {"scores": torch.zeros(1, 2), "labels": torch.tensor([[1, 0]])} | change
    with pytest.raises(error, match=message):
        pqm_loss(**given_)
