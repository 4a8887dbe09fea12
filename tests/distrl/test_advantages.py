"""Advantages: laws that hold whatever the batch, degenerate batches, and errors."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from prmfast.distrl import AdvantageRule, Advantages, distrl_advantages, gae, group_normalised_outcome
from prmfast.distrl.candidates import entry_rows
from prmfast.ops import Candidates
from prmfast.testing import make_candidates

RULES = [AdvantageRule.paper(), AdvantageRule.released(), AdvantageRule(gamma=0.9, lam=0.8)]
each_rule = pytest.mark.parametrize("rule", RULES, ids=["paper", "released", "discounted"])


class Batch:
    """S sequences of random length with candidates, packed."""

    def __init__(self, counts: list[int], *, prompts: int = 2, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.counts, n = counts, sum(counts)
        self.offsets = torch.tensor([0, *counts]).cumsum(0)
        self.td = torch.randn(n, generator=generator, dtype=torch.float64)
        self.outcome = torch.randint(0, 2, (len(counts),), generator=generator).double()
        self.group = torch.arange(len(counts)) % prompts * 7 - 3
        logits = 3 * torch.randn(n, 12, generator=generator, dtype=torch.float64)
        self.candidates = make_candidates(logits, seed=seed, every=5)

    def packed(self, rule: AdvantageRule) -> Advantages:
        return distrl_advantages(
            self.candidates, self.td, self.outcome, group=self.group, offsets=self.offsets, rule=rule
        )

    def padded(self, rule: AdvantageRule, width: int) -> tuple[Advantages, Tensor]:
        """The same with tokens scattered over [S, width], NaN and candidates of no meaning at padding."""
        mask = torch.zeros(len(self.counts), width, dtype=torch.bool)
        for row, count in enumerate(self.counts):
            places = torch.randperm(width, generator=torch.Generator().manual_seed(row))[:count]
            mask[row, places] = True
        td = torch.full(mask.shape, torch.nan, dtype=torch.float64)
        td[mask] = self.td
        sizes = torch.ones(mask.numel(), dtype=torch.int64)
        sizes[mask.reshape(-1)] = self.candidates.offsets.diff()
        offsets = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
        entries = [torch.zeros(int(sizes.sum()), dtype=t.dtype) for t in self.candidates[1:]]
        mine = mask.reshape(-1).repeat_interleave(sizes)
        for own, given_ in zip(entries, self.candidates[1:], strict=True):
            own[mine] = given_
        table = Candidates(offsets, *entries)
        return distrl_advantages(table, td, self.outcome, group=self.group, mask=mask, rule=rule), mask


counts_of = st.lists(st.integers(0, 9), min_size=1, max_size=7)


@settings(max_examples=40, deadline=None)
@given(counts=counts_of, prompts=st.integers(1, 4), seed=st.integers(0, 99), rule=st.sampled_from(RULES))
def test_packed_equals_padded(counts: list[int], prompts: int, seed: int, rule: AdvantageRule) -> None:
    batch = Batch(counts, prompts=prompts, seed=seed)
    packed, (padded, mask) = batch.packed(rule), batch.padded(rule, 11)
    assert torch.equal(padded.token[mask], packed.token)
    assert (padded.token[~mask] == 0).all()
    for own, other in zip(padded.candidates[1:], packed.candidates[1:], strict=True):
        assert torch.equal(own, other)
    rows = mask.reshape(-1).nonzero()[:, 0]
    assert torch.equal(rows[entry_rows(packed.candidates)], entry_rows(padded.candidates))
    assert padded.sigma_v == packed.sigma_v
    assert padded.reasons == packed.reasons
    for value in (packed.token, packed.candidates.advantage, packed.outcome):
        assert value.isfinite().all()


@each_rule
def test_order_of_the_batch_is_irrelevant(rule: AdvantageRule) -> None:
    batch = Batch([4, 7, 1, 3, 6, 2], prompts=3)
    found = batch.packed(rule)
    order = torch.tensor([5, 2, 0, 4, 3, 1])
    places = [torch.arange(int(batch.offsets[i]), int(batch.offsets[i + 1])) for i in order]
    place = torch.cat(places)
    sizes = batch.candidates.offsets.diff()
    entries = torch.cat(
        [torch.arange(int(batch.candidates.offsets[t]), int(batch.candidates.offsets[t + 1])) for t in place]
    )
    shuffled = Candidates(
        torch.cat([sizes.new_zeros(1), sizes[place].cumsum(0)]), *(t[entries] for t in batch.candidates[1:])
    )
    offsets = torch.cat([order.new_zeros(1), batch.offsets.diff()[order].cumsum(0)])
    again = distrl_advantages(
        shuffled, batch.td[place], batch.outcome[order], group=batch.group[order], offsets=offsets, rule=rule
    )
    torch.testing.assert_close(again.token, found.token[place], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(again.candidates.advantage, found.candidates.advantage[entries], rtol=1e-12, atol=0)
    torch.testing.assert_close(again.outcome, found.outcome[order], rtol=1e-12, atol=1e-15)


@settings(max_examples=40, deadline=None)
@given(counts=counts_of, gamma=st.floats(0, 1), lam=st.floats(0, 1), seed=st.integers(0, 99))
def test_gae_is_its_recursion(counts: list[int], gamma: float, lam: float, seed: int) -> None:
    batch = Batch(counts, seed=seed)
    found = gae(batch.td, offsets=batch.offsets, gamma=gamma, lam=lam)
    for start, end in zip(batch.offsets[:-1].tolist(), batch.offsets[1:].tolist(), strict=True):
        after = 0.0
        for t in range(end - 1, start - 1, -1):
            after = float(batch.td[t]) + gamma * lam * after
            assert float(found[t]) == pytest.approx(after, rel=1e-12, abs=1e-12)


def test_gae_ends_are_td_and_monte_carlo() -> None:
    batch = Batch([5, 1, 300])
    assert torch.equal(gae(batch.td, offsets=batch.offsets, lam=0.0), batch.td)
    torch.testing.assert_close(
        gae(batch.td, offsets=batch.offsets)[-300:], batch.td[-300:].flip(0).cumsum(0).flip(0), rtol=1e-12, atol=1e-12
    )
    assert gae(batch.td.to(torch.bfloat16), offsets=batch.offsets).dtype == torch.bfloat16


@settings(max_examples=40, deadline=None)
@given(values=st.lists(st.floats(-5, 5), min_size=1, max_size=12), prompts=st.integers(1, 4))
def test_groups_have_zero_mean_and_unit_std(values: list[float], prompts: int) -> None:
    outcome, group = torch.tensor(values, dtype=torch.float64), torch.arange(len(values)) % prompts
    found = group_normalised_outcome(outcome, group)
    for g in range(min(prompts, len(values))):
        mine = found[group == g]
        assert float(mine.mean()) == pytest.approx(0.0, abs=1e-6)
        if float(outcome[group == g].std(correction=0)) > 1e-6:
            assert float(mine.std(correction=0)) == pytest.approx(1.0, rel=1e-9)


def test_group_of_paper_td_has_zero_mean() -> None:
    """With lam = 0 and no outcome the token advantages are the normalised TD themselves."""
    batch = Batch([4, 7, 1, 3, 6, 2], prompts=2)
    found = batch.packed(AdvantageRule(lam=0.0, outcome_weight=0.0))
    group = batch.group.repeat_interleave(torch.tensor(batch.counts))
    for g in group.unique():
        mine = found.token[group == g]
        assert float(mine.mean()) == pytest.approx(0.0, abs=1e-12)
        assert float(mine.std(correction=0)) == pytest.approx(1.0, rel=1e-7)


def test_candidates_are_scaled_by_sigma_v_alone() -> None:
    batch = Batch([4, 7, 3])
    values = torch.cat([part.cumsum(0) for part in batch.td.split(batch.counts)])
    found = batch.packed(AdvantageRule.paper())
    assert found.sigma_v == pytest.approx(float(values.std(correction=0)), rel=1e-12)
    torch.testing.assert_close(
        found.candidates.advantage, batch.candidates.advantage / found.sigma_v, rtol=1e-7, atol=0
    )
    assert torch.equal(found.candidates.policy_logp, batch.candidates.policy_logp)


def test_a_row_does_not_depend_on_the_size_of_its_neighbours() -> None:
    """Sums within a sequence never pass through a sum of the batch: 1e300 beside it leaves them exact."""
    td = torch.tensor([1e300, 0.1, 0.2, 0.3], dtype=torch.float64)
    found = gae(td, offsets=torch.tensor([0, 1, 4]))
    assert torch.equal(found[1:], gae(td[1:], offsets=torch.tensor([0, 3])))


class TestDegenerate:
    @each_rule
    @pytest.mark.parametrize("value", [0.0, 1.0])
    def test_all_equal_outcomes(self, rule: AdvantageRule, value: float, caplog: pytest.LogCaptureFixture) -> None:
        batch = Batch([3, 4, 2, 5])
        batch.outcome = torch.full((4,), value)
        with caplog.at_level(logging.WARNING, "prmfast.distrl"):
            found = batch.packed(rule)
        assert (found.outcome == 0).all()
        assert found.token.isfinite().all()
        assert found.reasons == (f"no group of 2 has outcomes that differ, all {value:g}: outcome part 0",)
        assert caplog.messages == list(found.reasons)

    @each_rule
    def test_one_token(self, rule: AdvantageRule) -> None:
        found = Batch([1]).packed(rule)
        assert (found.token == 0).all()
        assert (found.candidates.advantage == 0).all()
        assert found.sigma_v == 0
        assert any("no spread" in reason for reason in found.reasons)
        assert found.reasons[-1] == "every advantage is 0: this batch leaves the policy as it is"

    @each_rule
    def test_no_token(self, rule: AdvantageRule) -> None:
        found = Batch([0, 0]).packed(rule)
        assert found.token.shape == (0,)
        assert "no valid token" in found.reasons

    def test_no_sequence(self) -> None:
        found = Batch([]).packed(RULES[0])
        assert "no valid token" in found.reasons

    def test_no_candidates(self) -> None:
        batch = Batch([3, 2])
        batch.candidates = Candidates(torch.zeros(6, dtype=torch.int64), *(t[:0] for t in batch.candidates[1:]))
        found = batch.packed(RULES[0])
        assert "no candidates: the distribution-level part is 0" in found.reasons
        assert (found.token != 0).any()

    @each_rule
    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_a_reward_that_is_no_number(self, rule: AdvantageRule, bad: float) -> None:
        batch = Batch([3, 4, 2, 5], prompts=1)
        batch.outcome = torch.tensor([1.0, bad, 0.0, 0.0])
        found = batch.packed(rule)
        assert found.token.isfinite().all()
        assert found.outcome[1] == 0
        kept = torch.tensor([0, 2, 3])
        assert torch.equal(
            found.outcome[kept], group_normalised_outcome(batch.outcome[kept], batch.group[kept]).double()
        )
        assert found.reasons == (
            "outcome is NaN or infinite in 1 of 4 sequences (first: 1): left out of its group's statistics, "
            "outcome part 0",
        )

    @each_rule
    def test_reward_model_equal_to_the_policy(self, rule: AdvantageRule) -> None:
        batch = Batch([3, 4, 2, 5], prompts=1)
        batch.td.zero_()
        batch.candidates = batch.candidates._replace(advantage=torch.zeros_like(batch.candidates.advantage))
        batch.outcome = torch.tensor([1.0, 0.0, 0.0, 1.0])
        found = batch.packed(rule)
        assert torch.equal(found.token, found.outcome.double().repeat_interleave(torch.tensor(batch.counts)))
        assert any("no spread" in reason for reason in found.reasons)

    @pytest.mark.parametrize("tiny", [1e-30, 1e-9])
    def test_small_td_is_no_degenerate_td(self, tiny: float) -> None:
        batch = Batch([3, 4, 2, 5])
        first = batch.packed(AdvantageRule(outcome_weight=0.0))
        batch.td = batch.td * tiny
        found = batch.packed(AdvantageRule(outcome_weight=0.0))
        assert not any("no spread" in reason for reason in found.reasons)
        assert first.token.isfinite().all()
        assert found.token.isfinite().all()


def test_errors_say_name_rule_and_value() -> None:
    batch = Batch([3, 2])
    options = {"group": batch.group, "offsets": batch.offsets}
    cases: list[tuple[type[Exception], str, dict[str, object]]] = [
        (ValueError, "td must be finite, got inf in row 2", {"td": torch.tensor([0, 0, math.inf, 0, 0])}),
        (ValueError, "td must not be NaN, got NaN in row 0", {"td": torch.full((5,), math.nan)}),
        (TypeError, "td must be floating point, got int64", {"td": torch.zeros(5, dtype=torch.int64)}),
        (
            ValueError,
            "candidates must have 4 rows, one per token of td, got 5",
            {"td": torch.zeros(4), "offsets": torch.tensor([0, 4])},
        ),
        (ValueError, r"outcome must have shape \(2,\), one per sequence, got \(3,\)", {"outcome": torch.zeros(3)}),
        (TypeError, "group must have dtype int64, got float32", {"group": torch.zeros(2)}),
        (ValueError, "offsets must rise from 0 to the 5 tokens of td, got", {"offsets": torch.tensor([0, 3, 4])}),
        (ValueError, "mask and offsets must not both be given", {"mask": torch.ones(5, dtype=torch.bool)}),
        (ValueError, r"td must be \[B, T\], or \[N\] with offsets", {"offsets": None}),
    ]
    for kind, message, change in cases:
        given_ = {"td": batch.td, "outcome": batch.outcome, **options, **change}
        with pytest.raises(kind, match=message):
            distrl_advantages(batch.candidates, given_.pop("td"), given_.pop("outcome"), **given_)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="mask must be a bool tensor, got int64"):
        gae(torch.zeros(2, 3), mask=torch.ones(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"mask must have shape \(2, 3\) like td, got \(3, 2\)"):
        gae(torch.zeros(2, 3), mask=torch.ones(3, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"gae: lam must lie in \[0, 1\], got 1.5"):
        gae(torch.zeros(2, 3), lam=1.5)
    with pytest.raises(ValueError, match="variant must be 'paper' or 'released', got 'both'"):
        AdvantageRule(variant="both")
    with pytest.raises(ValueError, match="td_weight must be >= 0 and finite, got nan"):
        AdvantageRule(td_weight=math.nan)
