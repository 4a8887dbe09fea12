"""The policy update: equal to a plain float64 transcription, gradients, laws, degenerate batches, errors."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from prmfast.distrl import DistRLLoss, LossRule, distrl_loss, linear_distrl_loss, tok_ppo_loss
from prmfast.distrl.advantages import Advantages
from prmfast.distrl.candidates import entry_rows
from prmfast.ops import Candidates
from prmfast.testing import make_candidates

RULES = [LossRule.paper(), LossRule.released(), LossRule(alpha=0.7, clip_low=0.05, clip_high=0.1, dual_clip=1.5)]
each_rule = pytest.mark.parametrize("rule", RULES, ids=["paper", "released", "narrow"])
COLUMNS = 17


class Update:
    """Packed sequences of ``counts`` tokens with candidates and a policy that moved by ``drift``."""

    def __init__(
        self, counts: list[int], *, drift: float = 0.5, seed: int = 0, dtype: torch.dtype = torch.float64
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        n = sum(counts)
        old = 3 * torch.randn(n, COLUMNS, generator=generator, dtype=torch.float64)
        self.counts, self.offsets = counts, torch.tensor([0, *counts]).cumsum(0)
        self.logits = (old + drift * torch.randn(n, COLUMNS, generator=generator, dtype=torch.float64)).to(dtype)
        self.sampled = torch.randint(0, COLUMNS, (n,), generator=generator)
        self.old_logp = old.log_softmax(1)[torch.arange(n), self.sampled].to(dtype)
        token = torch.randn(n, generator=generator, dtype=torch.float64).to(dtype)
        candidates = make_candidates(old, seed=seed, every=5)
        self.advantages = Advantages(token, candidates, torch.zeros(len(counts)), 1.0)

    def loss(self, rule: LossRule, **options: Any) -> tuple[DistRLLoss, Tensor]:
        leaf = self.logits.clone().requires_grad_()
        given_ = {"sampled": self.sampled, "old_logp": self.old_logp, "offsets": self.offsets, **options}
        found = distrl_loss(leaf, self.advantages, rule=rule, **given_)
        (grad,) = torch.autograd.grad(found.loss, leaf, allow_unused=True)
        return found, torch.zeros_like(leaf) if grad is None else grad

    def padded(self, width: int) -> tuple[Tensor, Advantages, dict[str, Tensor]]:
        mask = torch.zeros(len(self.counts), width, dtype=torch.bool)
        for row, count in enumerate(self.counts):
            mask[row, torch.randperm(width, generator=torch.Generator().manual_seed(row))[:count]] = True
        logits = torch.full((*mask.shape, COLUMNS), torch.nan, dtype=self.logits.dtype)
        token, old_logp = (torch.full(mask.shape, torch.nan, dtype=self.logits.dtype) for _ in range(2))
        sampled = torch.full(mask.shape, -100)
        logits[mask], token[mask] = self.logits, self.advantages.token
        old_logp[mask], sampled[mask] = self.old_logp, self.sampled
        sizes = torch.zeros(mask.numel(), dtype=torch.int64)
        sizes[mask.reshape(-1)] = self.advantages.candidates.offsets.diff()
        offsets = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
        table = Candidates(offsets, *self.advantages.candidates[1:])
        advantages = replace(self.advantages, token=token, candidates=table)
        return logits, advantages, {"sampled": sampled, "old_logp": old_logp, "mask": mask}


def transcription(update: Update, logits: Tensor, rule: LossRule) -> Tensor:
    """Equations 11, 12 and 14 as printed, or the released reduction, in float64 under autograd."""
    logp = logits.double().log_softmax(1)
    candidates, at = update.advantages.candidates, entry_rows(update.advantages.candidates)

    def clip(rho: Tensor, a: Tensor, low: float, high: float) -> Tensor:
        term = torch.minimum(rho * a, rho.clamp(1 - low, 1 + high) * a)
        return term if rule.dual_clip is None else torch.where(a < 0, torch.maximum(term, rule.dual_clip * a), term)

    rho = (logp[torch.arange(len(logp)), update.sampled] - update.old_logp.double()).exp()
    tok = clip(rho, update.advantages.token.double(), rule.clip_low, rule.clip_high)
    old = candidates.policy_logp.double()
    rho = (logp[at, candidates.token_ids] - old).exp()
    entry = old.exp() * clip(rho, candidates.advantage.double(), rule.dist_clip_low, rule.dist_clip_high)
    if rule.variant == "released":
        return -tok.mean() - rule.alpha * entry.sum() / old.exp().sum()
    per_token = tok + rule.alpha * torch.zeros_like(tok).index_add(0, at, entry)
    return -torch.stack([part.mean() for part in per_token.split(update.counts) if len(part)]).mean()


@each_rule
@pytest.mark.parametrize("drift", [0.0, 0.3, 3.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_equals_the_plain_transcription(rule: LossRule, drift: float, dtype: torch.dtype) -> None:
    update = Update([4, 9, 1, 6], drift=drift, dtype=dtype)
    found, grad = update.loss(rule)
    leaf = update.logits.double().requires_grad_()
    expected = transcription(update, leaf, rule)
    (truth,) = torch.autograd.grad(expected, leaf)
    rtol = 1e-9 if dtype == torch.float64 else 1e-5  # released: 1e-8 more tokens
    assert found.loss.item() == pytest.approx(expected.item(), rel=rtol, abs=rtol)
    if drift:  # without drift every ratio is 1 up to rounding, and gradients at a tie are the rounding's
        half = 2.0**-8 if dtype == torch.bfloat16 else 0.0
        torch.testing.assert_close(
            grad.double(), truth, rtol=max(rtol, half), atol=max(rtol, half) * float(truth.abs().max())
        )
        assert float(grad.double().norm()) == pytest.approx(float(truth.norm()), rel=half or 1e-4)


@settings(max_examples=30, deadline=None)
@given(
    counts=st.lists(st.integers(0, 6), min_size=1, max_size=5),
    rule=st.sampled_from(RULES),
    seed=st.integers(0, 99),
)
def test_packed_equals_padded_with_anything_at_padding(counts: list[int], rule: LossRule, seed: int) -> None:
    update = Update(counts, seed=seed)
    packed, grad = update.loss(rule)
    logits, advantages, where = update.padded(8)
    leaf = logits.clone().requires_grad_()
    padded = distrl_loss(leaf, advantages, rule=rule, **where)
    assert padded.metrics() == packed.metrics()
    assert padded.reasons == packed.reasons
    assert padded.loss.isfinite()
    (again,) = torch.autograd.grad(padded.loss, leaf)
    assert torch.equal(again[where["mask"]], grad)
    assert (again[~where["mask"]] == 0).all()


@each_rule
def test_gradcheck(rule: LossRule) -> None:
    update = Update([2, 3], drift=0.4, seed=3)

    def total(logits: Tensor) -> Tensor:
        return distrl_loss(
            logits,
            update.advantages,
            sampled=update.sampled,
            old_logp=update.old_logp,
            offsets=update.offsets,
            rule=rule,
        ).loss

    assert torch.autograd.gradcheck(total, (update.logits.clone().requires_grad_(),))
    logp = update.old_logp + 0.3
    rule_ = {"offsets": update.offsets, "rule": rule}
    assert torch.autograd.gradcheck(
        lambda x: tok_ppo_loss(x, update.old_logp, update.advantages.token, **rule_).loss, (logp.requires_grad_(),)
    )


@each_rule
def test_tok_ppo_is_dist_ppo_of_one_candidate(rule: LossRule) -> None:
    """With the sampled token as the only candidate and weight 1 / pi_old the room gives Tok-PPO."""
    from prmfast.ops import dist_ppo_loss

    update = Update([4, 9, 1], drift=1.0)
    tok = update.loss(rule)[0].tok.loss
    n = len(update.sampled)
    weight = torch.tensor(update.counts, dtype=torch.float64).repeat_interleave(torch.tensor(update.counts)) * 3
    weight = 1 / (weight if rule.variant == "paper" else torch.full((n,), float(n), dtype=torch.float64))
    found = dist_ppo_loss(
        update.logits,
        Candidates(torch.arange(n + 1), update.sampled, update.old_logp, update.advantages.token),
        clip_low=rule.clip_low,
        clip_high=rule.clip_high,
        dual_clip=rule.dual_clip,
        row_weight=weight * (-update.old_logp).exp(),
    )
    assert found.item() == pytest.approx(tok.item(), rel=1e-8)


@each_rule
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_linear_form_equals_the_logits_form(rule: LossRule, dtype: torch.dtype) -> None:
    update = Update([4, 0, 9, 1], drift=0.7, dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    weight = torch.linalg.qr(torch.randn(COLUMNS, COLUMNS, generator=generator, dtype=torch.float64))[0]
    hidden = (update.logits.double() @ weight).to(dtype).requires_grad_()  # hidden @ layer.T = logits
    layer = weight.to(dtype).requires_grad_()
    where = {"sampled": update.sampled, "old_logp": update.old_logp, "offsets": update.offsets}
    logits = hidden.double() @ layer.double().T
    expected = distrl_loss(logits, update.advantages, rule=rule, temperature=1.3, **where)
    found = linear_distrl_loss(hidden, layer, update.advantages, rule=rule, temperature=1.3, **where)
    rtol = 1e-10 if dtype == torch.float64 else 1e-5
    for name, value in expected.metrics().items():
        assert found.metrics()[name] == pytest.approx(value, rel=rtol, abs=rtol), name
    grads = [torch.autograd.grad(x.loss, (hidden, layer)) for x in (found, expected)]
    for own, other in zip(*grads, strict=True):
        torch.testing.assert_close(own, other, rtol=rtol, atol=rtol * float(other.abs().max()))
    with pytest.raises(ValueError, match="hidden must have 14 rows like sampled, got 13"):
        linear_distrl_loss(hidden[1:], layer, update.advantages, **where)
    with pytest.raises(ValueError, match="weight must have width 17 like hidden, got 16"):
        linear_distrl_loss(hidden, layer[:, 1:], update.advantages, **where)


@each_rule
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_on_policy_needs_no_forward_pass(rule: LossRule, dtype: torch.dtype) -> None:
    update = Update([4, 0, 9, 1], drift=0.0, dtype=dtype)
    rtol = 1e-10 if dtype == torch.float64 else 1e-5
    expected, wanted = update.loss(rule)
    found, grad = update.loss(rule, on_policy=True)
    assert found.metrics() == pytest.approx(expected.metrics(), rel=rtol, abs=rtol)
    torch.testing.assert_close(grad, wanted, rtol=rtol, atol=rtol * float(wanted.abs().max()))
    logits, advantages, where = update.padded(9)
    padded = distrl_loss(logits, advantages, rule=rule, on_policy=True, **where)
    assert padded.metrics() == pytest.approx(expected.metrics(), rel=rtol, abs=rtol)
    hidden, layer = update.logits.clone().requires_grad_(), torch.eye(COLUMNS, dtype=dtype, requires_grad=True)
    options = {"sampled": update.sampled, "old_logp": update.old_logp, "offsets": update.offsets, "rule": rule}
    linear = linear_distrl_loss(hidden, layer, update.advantages, on_policy=True, **options)
    assert linear.metrics() == pytest.approx(expected.metrics(), rel=rtol, abs=rtol)
    own = torch.autograd.grad(linear.loss, (hidden, layer))
    for mine, other in zip(own, (wanted, wanted.T @ update.logits), strict=True):
        torch.testing.assert_close(mine, other, rtol=rtol, atol=rtol * float(other.abs().max()))
    moved, _ = Update([4, 0, 9, 1], dtype=dtype).loss(rule, on_policy=True)
    unmoved = expected.metrics()["tok_loss"]
    assert moved.metrics()["tok_loss"] == pytest.approx(unmoved, rel=1e-5)  # old_logp is taken at its word


def test_order_of_the_batch_is_irrelevant() -> None:
    update = Update([4, 9, 1, 6])
    logits, advantages, where = update.padded(9)
    order = torch.tensor([2, 0, 3, 1])
    rows = torch.arange(36).reshape(4, 9)[order].reshape(-1)
    sizes = advantages.candidates.offsets.diff()
    starts = advantages.candidates.offsets
    entries = torch.cat([torch.arange(int(starts[r]), int(starts[r + 1])) for r in rows])
    shuffled = Candidates(
        torch.cat([sizes.new_zeros(1), sizes[rows].cumsum(0)]), *(t[entries] for t in advantages.candidates[1:])
    )
    again = distrl_loss(
        logits[order],
        replace(advantages, token=advantages.token[order], candidates=shuffled),
        **{name: t[order] for name, t in where.items()},
    )
    first = distrl_loss(logits, advantages, **where)
    for name, value in first.metrics().items():
        assert again.metrics()[name] == pytest.approx(value, rel=1e-12, abs=1e-14), name


def test_a_policy_that_did_not_move() -> None:
    """rho = 1: the loss is -mean A, nothing is clipped, no KL, and the gradient is the policy gradient."""
    update = Update([3, 3], drift=0.0)
    update.advantages.candidates.policy_logp.copy_(
        update.logits.log_softmax(1)[entry_rows(update.advantages.candidates), update.advantages.candidates.token_ids]
    )
    found, grad = update.loss(LossRule(alpha=0.0))
    assert found.tok.loss.item() == pytest.approx(-float(update.advantages.token.mean()), rel=1e-12)
    for value in (found.tok.clip_fraction, found.tok.approx_kl, found.tok.k3, found.dist.clip_fraction):
        assert value == pytest.approx(0.0, abs=1e-12)
    leaf = update.logits.clone().requires_grad_()
    logp = leaf.log_softmax(1)[torch.arange(6), update.sampled]
    (expected,) = torch.autograd.grad(-(logp * update.advantages.token).mean(), leaf)
    torch.testing.assert_close(grad, expected, rtol=1e-9, atol=1e-12)


def test_diagnostics_are_what_they_say() -> None:
    update = Update([4, 9, 1, 6], drift=1.0)
    found, _ = update.loss(LossRule.released())
    logp = update.logits.log_softmax(1)
    shift = logp[torch.arange(20), update.sampled] - update.old_logp
    value = update.advantages.token
    outside = ((shift.exp() > 1.28) & (value > 0)) | ((shift.exp() < 0.8) & (value < 0))
    assert found.tok.clip_fraction == pytest.approx(float(outside.double().mean()))
    assert found.tok.clip_fraction > 0
    assert found.tok.dual_clip_fraction == pytest.approx(float(((shift.exp() > 3) & (value < 0)).double().mean()))
    assert found.tok.dual_clip_fraction > 0
    assert found.tok.approx_kl == pytest.approx(-float(shift.mean()))
    assert found.tok.k3 == pytest.approx(float((shift.exp() - 1 - shift).mean()))
    candidates = update.advantages.candidates
    old, new = candidates.policy_logp, logp[entry_rows(candidates), candidates.token_ids]
    assert found.dist.candidates_per_token == len(old) / 20
    assert found.dist.mass == pytest.approx(float(old.exp().sum()) / 20)
    assert found.dist.approx_kl == pytest.approx(float((old.exp() * (old - new)).mean()))
    rho, a = (new - old).exp(), candidates.advantage
    outside = ((rho > 1.2) & (a > 0)) | ((rho < 0.8) & (a < 0))
    assert found.dist.clip_fraction == pytest.approx(float(outside.double().mean()))
    assert found.dist.dual_clip_fraction == pytest.approx(float(((rho > 3) & (a < 0)).double().mean()))


class TestDegenerate:
    @each_rule
    @pytest.mark.parametrize("counts", [[], [0, 0]], ids=["no sequence", "no token"])
    def test_nothing(self, rule: LossRule, counts: list[int], caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.WARNING, "prmfast.distrl"):
            found, _ = Update(counts).loss(rule)
        assert found.loss.item() == 0
        assert all(math.isfinite(value) for value in found.metrics().values())
        assert found.reasons == ("no valid token: the loss is 0",)
        assert caplog.messages == list(found.reasons)

    @each_rule
    def test_no_candidates(self, rule: LossRule) -> None:
        update = Update([1])
        empty = Candidates(torch.zeros(2, dtype=torch.int64), *(t[:0] for t in update.advantages.candidates[1:]))
        update.advantages = replace(update.advantages, candidates=empty)
        found, grad = update.loss(rule)
        assert found.dist.loss.item() == 0
        assert found.loss.item() == found.tok.loss.item() != 0
        assert grad.isfinite().all()
        assert found.reasons == ()

    @each_rule
    def test_no_advantage(self, rule: LossRule, caplog: pytest.LogCaptureFixture) -> None:
        update = Update([3, 2])
        update.advantages.token.zero_()
        update.advantages.candidates.advantage.zero_()
        with caplog.at_level(logging.WARNING, "prmfast.distrl"):
            found, grad = update.loss(rule)
        assert found.loss.item() == 0
        assert (grad == 0).all()
        assert found.reasons == ("every advantage is 0: so is the gradient",)
        assert caplog.messages == list(found.reasons)

    @each_rule
    @pytest.mark.parametrize("far", [-1e4, 1e4])
    def test_ratios_beyond_every_bound(self, rule: LossRule, far: float) -> None:
        logp = torch.tensor([0.0, 0.0, 0.0, -math.inf], requires_grad=True)
        old = torch.tensor([far, far, far, -1.0])
        found = tok_ppo_loss(logp, old, torch.tensor([-1.0, 0.0, 1.0, -1.0]), offsets=torch.tensor([0, 4]), rule=rule)
        (grad,) = torch.autograd.grad(found.loss, logp)
        assert found.loss.isfinite()
        assert grad.isfinite().all()


def test_errors_say_name_rule_and_value() -> None:
    update = Update([3, 2])
    cases: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (
            ValueError,
            "old_logp must be finite, got -inf in row 1",
            {"old_logp": torch.tensor([-1, -math.inf, 0, 0, 0])},
        ),
        (ValueError, "old_logp must not be NaN, got NaN in row 0", {"old_logp": torch.full((5,), math.nan)}),
        (TypeError, "old_logp must be floating point, got int64", {"old_logp": torch.zeros(5, dtype=torch.int64)}),
        (ValueError, r"old_logp must have shape \(5,\), got \(4,\)", {"old_logp": torch.zeros(4)}),
        (
            ValueError,
            r"logits must have shape \(4, 'V'\) like sampled",
            {"sampled": torch.zeros(4, dtype=torch.int64), "offsets": torch.tensor([0, 4])},
        ),
        (ValueError, "sampled must be >= 0 and < V = 17, got -100", {"sampled": torch.full((5,), -100)}),
    ]
    for kind, message, change in cases:
        with pytest.raises(kind, match=message):
            update.loss(LossRule(), **change)
    update.advantages.token[2] = math.nan
    with pytest.raises(ValueError, match=r"advantages\.token must not be NaN, got NaN in row 2"):
        update.loss(LossRule())
    few = replace(update.advantages, token=torch.zeros(5), candidates=make_candidates(torch.zeros(3, 4)))
    update.advantages = few
    with pytest.raises(ValueError, match=r"advantages\.candidates must have 5 rows like sampled, got 3"):
        update.loss(LossRule())
    with pytest.raises(ValueError, match="logp must not be NaN, got NaN in row 0"):
        tok_ppo_loss(torch.tensor([[math.nan]]), torch.zeros(1, 1), torch.zeros(1, 1))
    for change, message in (
        ({"variant": "x"}, "variant must be 'paper' or 'released', got 'x'"),
        ({"alpha": -1.0}, "alpha must be >= 0 and finite, got -1"),
        ({"clip_low": 1.0}, r"clip_low must lie in \[0, 1\), got 1"),
        ({"dist_clip_high": math.inf}, "dist_clip_high must be >= 0 and finite, got inf"),
        ({"dual_clip": 1.0}, "dual_clip must be > 1 or None, got 1"),
    ):
        with pytest.raises(ValueError, match=message):
            LossRule(**change)  # type: ignore[arg-type]
