"""Losses of implicit reward models: recorded values, the papers' weightings, and the laws of masks."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from prmfast.prm.losses import (
    bce_loss,
    dpo_rm_loss,
    endogenous_rewards,
    implicit_prm_loss,
    ipvrm_loss,
    prefix_value_loss,
    prefix_values,
    q_rm_loss,
    token_log_ratio,
)
from tests.prm.loss_checks import SUFFIX, assert_finite, assert_padding_is_nothing, assert_recorded, value_and_grad
from tests.vectors import Vectors, assert_relative

dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
weightings = pytest.mark.parametrize("weighting", ["uniform", "early", "late"])


def batch(seed: int = 0, rows: int = 5, tokens: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    """Log-ratios, masks with a prompt in front and padding behind (one row empty), labels."""
    generator = torch.Generator().manual_seed(seed)
    log_ratio = 0.4 * torch.randn(rows, tokens, generator=generator, dtype=torch.float64)
    start = torch.randint(0, tokens // 2, (rows, 1), generator=generator)
    stop = start + torch.randint(1, tokens // 2, (rows, 1), generator=generator)
    stop[0] = start[0]
    place = torch.arange(tokens)
    return log_ratio, (place >= start) & (place < stop), torch.randint(0, 2, (rows,), generator=generator)


@dtypes
def test_released_ipvrm(dtype: torch.dtype, shared_vectors: Path) -> None:
    """The released reduction is over tokens; its value head divides by the prefix length as well and has no beta."""
    vectors, size = Vectors(shared_vectors / "ipvrm_offline.npz"), SUFFIX[dtype]
    for case in vectors.cases:
        x, y, p = vectors.inputs(case), vectors.outputs(case), case["params"]
        mask = x["completion_mask"][:, 1:]
        options: dict[str, Any] = {"mask": mask, "margin": p["margin"], "reduction": "token"}
        loss = partial(ipvrm_loss, labels=x["labels"], beta=p["beta"], **options)
        if case["case"] == "large" and dtype == torch.float32:
            assert_finite(loss, x["token_rewards"])
            continue
        assert_recorded(loss, x["token_rewards"], y[f"logp_ratio_loss_{size}"], y[f"logp_ratio_grad_{size}"], dtype)
        values = prefix_values(x["token_rewards"], mask=mask, beta=p["beta"])
        assert_relative(torch.where(mask != 0, values, 0.0), torch.where(mask != 0, y["v_bar_f64"], 0.0), 1e-9)
        length = mask.cumsum(1).clamp_min(1).to(dtype)
        assert_recorded(
            lambda r, n=length, y_=x["labels"], o=options: prefix_value_loss(r / n, y_, **o),
            x["token_rewards"],
            y[f"value_head_loss_{size}"],
            y[f"value_head_grad_{size}"],
            dtype,
        )


@weightings
def test_paper_weightings(weighting: str, shared_vectors: Path) -> None:
    vectors = Vectors(shared_vectors / "ipvrm_weighted_paper.npz")
    for case in vectors.cases:
        x, y, p = vectors.inputs(case), vectors.outputs(case), case["params"]
        for reduction, tail in (("sequence", "mean"), ("token", "pooled")):
            value, grad = value_and_grad(
                partial(
                    ipvrm_loss,
                    labels=x["labels"],
                    mask=x["completion_mask"][:, 1:],
                    beta=p["beta"],
                    margin=p["margin"],
                    weighting=weighting,
                    reduction=reduction,
                ),
                x["token_rewards"],
            )
            slope = f"{weighting}_pooled_grad" if reduction == "token" else f"{weighting}_grad"
            assert_relative(value, y[f"{weighting}_{tail}"], 1e-9)
            assert_relative(grad, y[slope], 1e-9)


@dtypes
def test_released_baselines(dtype: torch.dtype, shared_vectors: Path) -> None:
    """gamma is a margin in both pairwise losses; the value head's score is read at sum(mask) - 1, prompt or not."""
    vectors, size = Vectors(shared_vectors / "ipvrm_baselines.npz"), SUFFIX[dtype]
    for case in vectors.cases:
        x, y, p = vectors.inputs(case), vectors.outputs(case), case["params"]
        mask, labels = x["completion_mask"][:, 1:], x["labels"]
        half, beta = len(labels) // 2, p["beta"]
        rewards, last = x["token_rewards"], mask.sum(1).long()[:, None] - 1
        pair = {"chosen_mask": mask[:half], "rejected_mask": mask[half:], "beta": beta, "margin": p["gamma"]}
        losses = {
            "bt_sum": lambda r, h=half, o=pair: dpo_rm_loss(r[:h], r[h:], **o),
            "bt_mean": lambda r, h=half, o=pair: q_rm_loss(r[:h], r[h:], **o),
            "implicit_prm": partial(implicit_prm_loss, labels=labels, mask=mask, beta=beta),
            "implicit_prm_vh": lambda r, b=beta, at=last, y_=labels: bce_loss(b * r.gather(1, at)[:, 0], y_),
        }
        for name, loss in losses.items():
            assert_recorded(loss, rewards, y[f"{name}_loss_{size}"], y[f"{name}_grad_{size}"], dtype)


@dtypes
def test_released_implicit_prm(dtype: torch.dtype, shared_vectors: Path) -> None:
    """Recorded from log-probabilities of whole answers, some so large that the rounded sigmoid is 0 or 1."""
    vectors, size = Vectors(shared_vectors / "implicitprm.npz"), SUFFIX[dtype]
    cases = [case for case in vectors.cases if case["case"].startswith("ce_")]
    assert cases
    for case in cases:
        x, y, beta = vectors.inputs(case), vectors.outputs(case), case["params"]["beta"]

        def loss(policy: Tensor, variant: str, x: dict[str, Tensor] = x, beta: float = beta) -> Tensor:
            ratio = (policy - x["ref_logps"].to(policy.dtype)).unsqueeze(1)
            return implicit_prm_loss(ratio, x["labels"], beta=beta, variant=variant)

        released = partial(loss, variant="released")
        assert_recorded(released, x["policy_logps"], y[f"loss_{size}"], y[f"grad_{size}"], dtype)
        near = x["ref_logps"] + (x["policy_logps"] - x["ref_logps"]).clamp(-20, 20)
        torch.testing.assert_close(loss(near, "paper"), released(near), rtol=1e-9, atol=0)
        assert_finite(partial(loss, variant="paper"), x["policy_logps"])


@dtypes
def test_log_ratio(dtype: torch.dtype, shared_vectors: Path) -> None:
    vectors = Vectors(shared_vectors / "ipvrm_logratio.npz")
    for case in vectors.cases:
        x, y = vectors.inputs(case), vectors.outputs(case)
        columns = x["policy_logits"].shape[-1]
        reference, ids, weight = (
            x["ref_logits"].reshape(-1, columns).to(dtype),
            x["labels"].reshape(-1),
            x["w"].reshape(-1),
        )
        policy = x["policy_logits"].reshape(-1, columns).to(dtype).requires_grad_()
        reference.requires_grad_()
        found = token_log_ratio(policy, reference, ids)
        truth = y["logratio_f64_of_f64_inputs" if dtype == torch.float64 else "logratio_f32"].reshape(-1).double()
        rtol = 2e-7 if dtype == torch.float64 else 1e-5  # the recorded inputs are rounded to float32
        scale = x["policy_logits"].abs().max()  # a difference of logarithms: relative to what is subtracted
        assert float((found.detach().double() - truth).abs().max() / scale) <= rtol
        (weight.to(dtype) * found).sum().backward()
        assert reference.grad is None
        assert policy.grad is not None
        assert_relative(policy.grad.double(), y["grad_f32"].reshape(-1, columns).double(), 1e-5)


@given(st.integers(0, 10_000), st.sampled_from(["uniform", "early", "late"]), st.sampled_from(["sequence", "token"]))
@example(673, "early", "token")  # no sequence has a token with a weight
@example(673, "early", "sequence")
@settings(max_examples=30, deadline=None)
def test_masked_tokens_are_nothing(seed: int, weighting: Any, reduction: Any) -> None:
    log_ratio, mask, labels = batch(seed)
    loss = partial(ipvrm_loss, labels=labels, mask=mask, weighting=weighting, reduction=reduction)
    assert_padding_is_nothing(loss, log_ratio, ~mask)
    value = loss(log_ratio)
    rows = []
    for lr, m, y in zip(log_ratio, mask, labels, strict=True):  # eq. 9, 17 and 18 as they are written
        lr = lr[m]
        t = torch.arange(1, len(lr) + 1, dtype=torch.float64)
        v = 10.0 * lr.cumsum(0) / t
        w = {"uniform": torch.ones_like(t), "late": t / max(len(lr), 1), "early": 1 - t / max(len(lr), 1)}[weighting]
        rows.append((w * -torch.nn.functional.logsigmoid((v - 5.0) if y else -(v + 5.0)), w))
    kept = [(w_l.sum(), w.sum()) for w_l, w in rows if w.sum() > 0]
    if not kept:
        naive = 0.0
    elif reduction == "token":
        naive = sum(a for a, _ in kept) / sum(b for _, b in kept)
    else:
        naive = sum(a / b for a, b in kept) / len(kept)
    torch.testing.assert_close(value, torch.as_tensor(naive, dtype=torch.float64), rtol=1e-10, atol=0)
    for loss in (
        partial(implicit_prm_loss, labels=labels, mask=mask),
        partial(prefix_value_loss, labels=labels, mask=mask),
    ):
        assert_padding_is_nothing(loss, log_ratio, ~mask)
    for pairwise in (dpo_rm_loss, partial(q_rm_loss, beta=2.0, margin=1.0)):
        assert_padding_is_nothing(
            lambda r, f=pairwise: f(r[:2], r[2:4], chosen_mask=mask[:2], rejected_mask=mask[2:4]),
            log_ratio[:4],
            ~mask[:4],
        )


@weightings
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_finite(weighting: Any, scale: float) -> None:
    log_ratio, mask, labels = batch(1)
    assert_finite(partial(ipvrm_loss, labels=labels, mask=mask, weighting=weighting), scale * log_ratio)
    assert_finite(partial(implicit_prm_loss, labels=labels, mask=mask), scale * log_ratio)


@weightings
def test_gradcheck(weighting: Any) -> None:
    log_ratio, mask, labels = batch(2, rows=3, tokens=6)
    soft = torch.tensor([0.25, 1.0, 0.0], dtype=torch.float64)
    margin = torch.tensor([5.0, 0.0, 2.0])
    loss = partial(ipvrm_loss, labels=soft, mask=mask, weighting=weighting, margin=margin, beta=2.0)
    assert torch.autograd.gradcheck(loss, (log_ratio.requires_grad_(),))
    weight = torch.tensor([0.5, 2.0, 1.0])
    implicit = partial(implicit_prm_loss, labels=labels, mask=mask, margin=margin, weight=weight)
    assert torch.autograd.gradcheck(implicit, (log_ratio,))
    for pairwise in (dpo_rm_loss, partial(q_rm_loss, beta=2.0, margin=1.0)):
        assert torch.autograd.gradcheck(lambda r, f=pairwise: f(r[:1], r[1:2], rejected_mask=mask[1:2]), (log_ratio,))


def test_nothing_to_learn_from() -> None:
    for shape in ((2, 4), (0, 4), (2, 0)):
        labels, none = torch.ones(shape[0]), torch.zeros(shape, dtype=torch.bool)
        for weighting in ("uniform", "early", "late"):
            for reduction in ("sequence", "token"):
                loss = partial(ipvrm_loss, labels=labels, mask=none, weighting=weighting, reduction=reduction)
                value, grad = value_and_grad(loss, torch.ones(shape))
                assert value.item() == 0
                assert bool((grad == 0).all())
    value, grad = value_and_grad(lambda r: dpo_rm_loss(r, r), torch.ones(0, 3))
    assert value.item() == 0
    assert grad.shape == (0, 3)


def test_pairs_are_summed_as_in_the_online_trainer(shared_vectors: Path) -> None:
    vectors = Vectors(shared_vectors / "distrl_dporm.npz")
    for case in vectors.cases:
        x, y = vectors.inputs(case), vectors.outputs(case)

        def loss(scores: Tensor, x: dict[str, Tensor] = x, y: dict[str, Tensor] = y, p: Any = case["params"]) -> Tensor:
            first, second = y["chosen"], y["rejected"]
            masks = {"chosen_mask": x["mask"][first], "rejected_mask": x["mask"][second]}
            return dpo_rm_loss(scores[first], scores[second], beta=p["beta"], reduction="sum", **masks)

        value, grad = value_and_grad(loss, x["scores"])
        assert_relative(value, y["loss_sum"].double(), 1e-7)  # recorded from float32 outcomes
        assert_relative(grad, y["grad"].double(), 1e-7)


def test_endogenous_rewards_telescope() -> None:
    """Their sum is the log-probability of the tokens plus the value of the first state, for every alpha."""
    logits = torch.randn(7, 11, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ids = torch.tensor([3, 0, 10, 5, 5, 1, 2])
    for alpha in (0.5, 1.0, 3.0):
        found = endogenous_rewards(logits, ids, alpha=alpha)
        logp = (logits / alpha).log_softmax(1).gather(1, ids[:, None])[:, 0]
        start = alpha * torch.logsumexp(logits[0] / alpha, 0)
        torch.testing.assert_close(found.sum(), alpha * logp.sum() + start)
        torch.testing.assert_close(found[-1], logits[-1, 2])
    assert endogenous_rewards(logits[:0], ids[:0]).shape == (0,)
    with pytest.raises(ValueError, match="alpha must be > 0, got 0"):
        endogenous_rewards(logits, ids, alpha=0.0)


@pytest.mark.parametrize(
    ("loss", "change", "error", "message"),
    [
        (ipvrm_loss, {"labels": torch.tensor([1, -100])}, ValueError, r"labels must be in \[0, 1\], got -100 at row 1"),
        (ipvrm_loss, {"labels": torch.ones(3)}, ValueError, r"labels must have shape \(2,\), got \(3,\)"),
        (ipvrm_loss, {"mask": torch.ones(2, 3)}, ValueError, r"mask must have shape \(2, 4\), got \(2, 3\)"),
        (ipvrm_loss, {"margin": torch.ones(3)}, ValueError, r"margin must have shape \(2,\), got \(3,\)"),
        (ipvrm_loss, {"margin": "5"}, TypeError, "margin must be a number or a tensor, got str"),
        (ipvrm_loss, {"weighting": "middle"}, ValueError, "weighting must be 'uniform' or 'early' or 'late', got"),
        (ipvrm_loss, {"reduction": "mean"}, ValueError, "reduction must be 'sequence' or 'token', got 'mean'"),
        (implicit_prm_loss, {"variant": "x"}, ValueError, "variant must be 'paper' or 'released', got 'x'"),
        (implicit_prm_loss, {"variant": "released", "margin": 1.0}, ValueError, "margin must be 0 for variant='rel"),
        (implicit_prm_loss, {"weight": torch.ones(1)}, ValueError, r"weight must have shape \(2,\), got \(1,\)"),
    ],
)
def test_errors(loss: Any, change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        loss(**({"log_ratio": torch.zeros(2, 4), "labels": torch.tensor([1, 0])} | change))


def test_pair_errors() -> None:
    with pytest.raises(ValueError, match="rejected must have 2 rows like chosen, got 3"):
        dpo_rm_loss(torch.zeros(2, 4), torch.zeros(3, 4))
    with pytest.raises(ValueError, match="reduction must be 'mean' or 'sum', got 'token'"):
        q_rm_loss(torch.zeros(2, 4), torch.zeros(2, 4), beta=1.0, margin=0.0, reduction="token")  # type: ignore[arg-type]
