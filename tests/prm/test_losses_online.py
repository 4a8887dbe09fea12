"""The online IPVRM loss: margins and weights from the success rate of each prompt."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prmfast.prm.losses import implicit_prm_loss, ipvrm_loss, online_ipvrm_loss, online_terms
from tests.prm.loss_checks import (
    RTOL,
    SUFFIX,
    assert_finite,
    assert_padding_is_nothing,
    assert_recorded,
    value_and_grad,
)
from tests.prm.test_losses_implicit import batch
from tests.vectors import Vectors, assert_relative


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
def test_recorded(dtype: torch.dtype, shared_vectors: Path) -> None:
    vectors, size = Vectors(shared_vectors / "ipvrm_online.npz"), SUFFIX[dtype]
    for case in vectors.cases:
        x, y, p = vectors.inputs(case), vectors.outputs(case), case["params"]
        labels, groups, mask = x["acc"], x["prompt_group_id"], x["mask"]
        options = {"margin": p["base_margin"], "adb": p["use_adb"], "dlw": p["use_dlw"]}
        terms = online_terms(labels, groups, variant="released", dtype=dtype, **options)
        assert_relative(terms.margin.double(), y["margin"].double(), 1e-6)  # recorded in float32
        assert_relative(terms.weight.double(), y["dlw_weight"].double(), 1e-6)
        loss = partial(online_ipvrm_loss, labels=labels, groups=groups, mask=mask, beta=p["beta"])
        if dtype == torch.float64:
            # the released margins and weights are float32 numbers, so that its float64 loss is right to 1e-7 only
            value, grad = value_and_grad(partial(loss, variant="released", **options), x["log_ratio"])
            assert_relative(value, y["loss_f64"], 2e-7)
            assert_relative(grad, y["grad_f64"], 2e-7)
            value, grad = value_and_grad(partial(loss, margin=p["base_margin"]), x["log_ratio"])
            assert_relative(value, y["paper_eq15_loss"], 1e-9)
            assert_relative(grad, y["paper_eq15_grad"], 1e-9)
        else:
            recorded = partial(loss, variant="released", **options)
            assert_recorded(recorded, x["log_ratio"], y[f"loss_{size}"], y[f"grad_{size}"], dtype)
            implicit = partial(implicit_prm_loss, labels=labels, mask=mask, margin=terms.margin, weight=terms.weight)
            assert_recorded(implicit, x["log_ratio"], y["implicitprm_loss_f32"], y["implicitprm_grad_f32"], dtype)
        plain = online_ipvrm_loss(
            x["log_ratio"].to(dtype), labels, groups, mask=mask, beta=p["beta"], adb=False, dlw=False
        )
        assert_relative(plain.double(), y["loss_default_margin_f32"].double(), RTOL[torch.float32])


def test_terms_by_hand() -> None:
    """Three correct of four: an easy prompt, where a correct answer proves little and a wrong one much."""
    labels, groups = torch.tensor([1, 1, 0, 1, 0, 1]), torch.tensor([7, 7, 7, 7, 3, 3])
    shift = torch.log(torch.tensor(3.0)).item()
    margin, weight = online_terms(labels, groups)
    assert margin.tolist() == pytest.approx([5 - shift, 5 - shift, 5 + shift, 5 - shift, 5.0, 5.0])
    assert weight.tolist() == pytest.approx([0.25, 0.25, 0.75, 0.25, 0.5, 0.5])
    margin, weight = online_terms(labels, groups, variant="released")
    assert weight.tolist() == pytest.approx([2 / 3, 2 / 3, 2.0, 2 / 3, 1.0, 1.0])
    margin, weight = online_terms(torch.tensor([1, 1, 0]), torch.tensor([0, 0, 1]))
    limit = torch.logit(torch.tensor(1 - 1e-6, dtype=torch.float64)).item()
    assert margin.tolist() == pytest.approx([5 - limit, 5 - limit, 5 - limit], rel=1e-6)
    assert weight.tolist() == [0, 0, 0]
    margin, weight = online_terms(torch.tensor([1, 1, 0]), torch.tensor([0, 0, 1]), variant="released", dlw=False)
    assert margin.tolist() == [5, 5, 5]
    assert weight.tolist() == [0, 0, 0]


@given(st.integers(0, 10_000), st.sampled_from(["paper", "released"]), st.booleans(), st.booleans())
@settings(max_examples=25, deadline=None)
def test_padding_and_order(seed: int, variant: Any, adb: bool, dlw: bool) -> None:
    log_ratio, mask, labels = batch(seed)
    groups = torch.randint(0, 2, (len(labels),), generator=torch.Generator().manual_seed(seed))
    options = {"variant": variant, "adb": adb, "dlw": dlw}
    loss = partial(online_ipvrm_loss, labels=labels, groups=groups, mask=mask, **options)
    assert_padding_is_nothing(loss, log_ratio, ~mask)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed + 1))
    shuffled = online_ipvrm_loss(log_ratio[order], labels[order], 5 - 3 * groups[order], mask=mask[order], **options)
    torch.testing.assert_close(shuffled, loss(log_ratio), rtol=1e-12, atol=1e-15)


def test_plain_online_loss_is_the_offline_one() -> None:
    log_ratio, mask, labels = batch(4)
    mask[0, 2] = True  # no empty row: the offline mean leaves such rows out, the online one counts them
    plain = online_ipvrm_loss(log_ratio, labels, torch.arange(5), mask=mask, adb=False, dlw=False)
    torch.testing.assert_close(plain, ipvrm_loss(log_ratio, labels, mask=mask), rtol=1e-12, atol=0)


def test_finite_gradcheck_and_nothing() -> None:
    log_ratio, mask, labels = batch(5)
    groups = torch.tensor([0, 0, 0, 1, 1])
    labels[:] = torch.tensor([1, 0, 1, 1, 0])
    for variant in ("paper", "released"):
        loss = partial(online_ipvrm_loss, labels=labels, groups=groups, mask=mask, variant=variant)
        for scale in (1.0, 1e4):
            assert_finite(loss, scale * log_ratio)
        assert torch.autograd.gradcheck(loss, (log_ratio.clone().requires_grad_(),))
        value, grad = value_and_grad(partial(loss, mask=torch.zeros_like(mask)), log_ratio)
        assert value.item() == 0
        assert bool((grad == 0).all())
        empty = torch.zeros(0, dtype=torch.int64)
        assert online_ipvrm_loss(torch.zeros(0, 3), empty, empty, variant=variant).item() == 0


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"labels": torch.tensor([1.0, 0.5])}, ValueError, "labels must be 0, 1 or -100, got 0.5"),
        ({"labels": torch.tensor([1, -100])}, ValueError, "labels must be 0 or 1, got -100 at row 1"),
        ({"labels": torch.tensor([1, 0, 1])}, ValueError, r"labels must have shape \(2,\), got \(3,\)"),
        ({"groups": torch.tensor([1.0, 0.0])}, TypeError, "groups must have dtype int64 | int32, got float32"),
        ({"groups": torch.tensor([1])}, ValueError, r"groups must have shape \(2,\), got \(1,\)"),
        ({"variant": "old"}, ValueError, "variant must be 'paper' or 'released', got 'old'"),
    ],
)
def test_errors(change: dict[str, Any], error: type[Exception], message: str) -> None:
    given_ = {"log_ratio": torch.zeros(2, 4), "labels": torch.tensor([1, 0]), "groups": torch.tensor([0, 0])}
    with pytest.raises(error, match=message):
        online_ipvrm_loss(**(given_ | change))
