"""Candidate sets, filters, pairs, penalties and accuracies beside the recorded values: laws and errors."""

from __future__ import annotations

import itertools
import logging
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from prmfast.distrl import (
    filter_and_downsample,
    from_table,
    likely,
    mixed_outcomes,
    pairwise_accuracy,
    prompt_pairs,
    released_candidates,
    rm_score,
    sampled_logp,
    sampled_td,
    sign_accuracy,
    suffix_geometric_mean,
    suffix_mean,
    suffix_sum,
    td_outcome_correlation,
    topk_kl_penalty,
    without_last_token,
)
from prmfast.distrl.candidates import entry_rows, select_rows
from prmfast.ops import Candidates, candidate_td


def room(
    rows: int, columns: int = 9, *, p_min: float = 0.1, seed: int = 0
) -> tuple[Candidates, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    policy, reward = 2 * torch.randn(2, rows, columns, generator=generator, dtype=torch.float64)
    sampled = torch.randint(0, columns, (rows,), generator=generator)
    return candidate_td(policy, reward, p_min=p_min, beta=10.0, sampled=sampled), sampled, policy, reward


def test_sampled_values_are_those_of_the_sampled_token() -> None:
    candidates, sampled, policy, reward = room(20)
    row = torch.arange(20)
    logp, logq = policy.log_softmax(1)[row, sampled], reward.log_softmax(1)[row, sampled]
    torch.testing.assert_close(sampled_logp(candidates, sampled), logp)
    torch.testing.assert_close(sampled_td(candidates, sampled.reshape(4, 5)), (10 * (logq - logp)).reshape(4, 5))


def test_forced_tokens_are_dropped_again() -> None:
    forced, _, policy, reward = room(40)
    free = candidate_td(policy, reward, p_min=0.1, beta=10.0)
    assert len(forced.token_ids) > len(free.token_ids)
    for found, expected in zip(likely(forced), free, strict=True):
        assert torch.equal(found, expected)
    with pytest.raises(ValueError, match="p_min must be > 0 and <= 1, got 0"):
        likely(forced, p_min=0.0)


@settings(max_examples=30, deadline=None)
@given(
    counts=st.lists(st.integers(0, 5), max_size=5),
    top_k=st.integers(1, 4) | st.none(),
    top_p=st.sampled_from([1.0, 0.8, 0.5]),
    p_min=st.sampled_from([0.1, 0.02, 0.0]),
    seed=st.integers(0, 99),
)
def test_released_set(counts: list[int], top_k: int | None, top_p: float, p_min: float, seed: int) -> None:
    rows = sum(counts)
    candidates, sampled, policy, _ = room(rows, p_min=1e-9, seed=seed)
    offsets = torch.tensor([0, *counts]).cumsum(0)
    found = released_candidates(candidates, sampled, offsets=offsets, p_min=p_min, top_k=top_k, top_p=top_p)
    p = policy.softmax(1)
    last = {int(end) - 1 for start, end in itertools.pairwise(offsets) if end > start}
    for t in range(rows):
        mine = found.token_ids[int(found.offsets[t]) : int(found.offsets[t + 1])].tolist()
        others = [i for i in p[t].argsort(descending=True).tolist() if i != int(sampled[t])]
        table = sorted([int(sampled[t]), *others][:top_k], key=lambda i: -float(p[t, i]))
        held = p[t, table].cumsum(0)
        wanted = {
            i
            for place, i in enumerate(table)
            if i == int(sampled[t]) or (p[t, i] > p_min and (top_p == 1 or place == 0 or held[place] <= top_p))
        }
        assert mine == ([] if t in last else sorted(wanted))
    td = without_last_token(torch.ones(rows), offsets=offsets)
    assert [t for t in range(rows) if td[t] == 0] == sorted(last)


def test_tables_become_sorted_rows() -> None:
    ids = torch.tensor([[[5, 2, 9], [1, 1, 0]], [[3, 4, 3], [7, 8, 6]]])
    mask = torch.tensor([[[True, True, True], [False, True, True]], [[True, True, False], [False, False, False]]])
    values = torch.arange(12.0).reshape(2, 2, 3)
    found = from_table(ids, -values, values, mask=mask)
    assert found.offsets.tolist() == [0, 3, 5, 7, 7]
    assert found.token_ids.tolist() == [2, 5, 9, 0, 1, 3, 4]
    assert found.advantage.tolist() == [1, 0, 2, 5, 4, 6, 7]
    assert torch.equal(found.policy_logp, -found.advantage)
    with pytest.raises(ValueError, match="must not hold an id twice in a row, got one in row 1"):
        from_table(ids, values, values, mask=torch.ones_like(mask))
    with pytest.raises(ValueError, match=r"advantage must have shape \(2, 2, 3\) like token_ids, got \(3,\)"):
        from_table(ids, values, torch.zeros(3), mask=mask)


def test_rows_can_be_selected() -> None:
    candidates, *_ = room(10)
    rows = torch.tensor([0, 3, 4, 9])
    found = select_rows(candidates, rows)
    for new, old in enumerate(rows.tolist()):
        mine = candidates.token_ids[entry_rows(candidates) == old]
        assert torch.equal(found.token_ids[entry_rows(found) == new], mine)


def test_missing_sampled_token_is_an_error() -> None:
    _, sampled, policy, reward = room(10)
    free = candidate_td(policy, reward, p_min=0.5)
    with pytest.raises(ValueError, match="candidates must hold the sampled token of every row"):
        sampled_td(free, sampled)
    with pytest.raises(ValueError, match="sampled must have 10 elements, one per row of candidates, got 3"):
        sampled_logp(free, sampled[:3])
    with pytest.raises(ValueError, match="top_k must be >= 1 or None, got 0"):
        released_candidates(free, sampled, offsets=torch.tensor([0, 10]), top_k=0)


def test_mixed_outcomes() -> None:
    outcome = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, math.nan, 0.0, 1.0])
    group = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    assert mixed_outcomes(outcome, group).tolist() == [True, True, False, False, False, False, True, True]
    assert mixed_outcomes(torch.tensor([True, False]), torch.tensor([5, 5])).all()


class TestFilter:
    def test_a_batch_that_teaches_nothing_says_so(self, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.WARNING, "prmfast.distrl"):
            found = filter_and_downsample(
                torch.ones(4), torch.full((4,), 5), group=torch.tensor([0, 0, 1, 1]), max_length=9
            )
        assert found.index.tolist() == [0, 1, 2, 3]
        assert found.reasons == ("2 of 2 kept prompts teach nothing (accuracy or length outside the limits)",)
        assert caplog.messages == list(found.reasons)

    def test_unknown_reward(self) -> None:
        found = filter_and_downsample(
            torch.tensor([1.0, math.nan, 0.0, 1.0]),
            torch.full((4,), 5),
            group=torch.tensor([0, 0, 1, 1]),
            max_length=9,
            oversample_factor=2.0,
        )
        assert found.index.tolist() == [2, 3]
        assert (found.too_high, found.too_low, found.ok, found.too_long) == (0, 0, 1, 0)

    def test_nothing_left(self) -> None:
        found = filter_and_downsample(
            torch.tensor([1.0, 0.0]),
            torch.tensor([1, 2]),
            group=torch.zeros(2, dtype=torch.int64),
            max_length=9,
            oversample_factor=3,
        )
        assert len(found.index) == 0
        assert found.reasons == ("no prompt kept: 2 sequences / 3 hold no prompt of 2",)
        none = torch.zeros(0, dtype=torch.int64)
        assert filter_and_downsample(none.float(), none, group=none, max_length=9).reasons

    @settings(max_examples=40, deadline=None)
    @given(prompts=st.integers(1, 6), n=st.integers(1, 4), factor=st.floats(1, 3), seed=st.integers(0, 99))
    def test_whole_prompts_teaching_ones_first(self, prompts: int, n: int, factor: float, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        size = prompts * n
        group = (torch.arange(size) % prompts)[torch.randperm(size, generator=generator)]
        outcome = torch.randint(0, 2, (size,), generator=generator).double()
        length = torch.randint(1, 12, (size,), generator=generator)
        found = filter_and_downsample(outcome, length, group=group, max_length=11, oversample_factor=factor)
        assert len(found.index) == int(size // factor) // n * n
        ids = group[found.index].reshape(-1, n) if len(found.index) else torch.zeros(0, n)
        assert (ids == ids[:, :1]).all()
        assert found.too_high + found.too_low + found.ok == prompts
        teaches = [
            0 < float(outcome[group == g].mean()) < 1 and int(length[group == g].max()) < 10 for g in range(prompts)
        ]
        kept = [int(g) for g in ids[:, 0]]
        assert kept == sorted(range(prompts), key=lambda g: (not teaches[g], g))[: len(kept)]

    def test_errors(self) -> None:
        with pytest.raises(ValueError, match="as many sequences for every prompt, got 1 to 2"):
            filter_and_downsample(torch.zeros(3), torch.ones(3).long(), group=torch.tensor([0, 0, 1]), max_length=5)
        with pytest.raises(ValueError, match=r"oversample_factor must be >= 1 and finite, got 0\.5"):
            filter_and_downsample(
                torch.zeros(2), torch.ones(2).long(), group=torch.zeros(2).long(), max_length=5, oversample_factor=0.5
            )
        with pytest.raises(TypeError, match="length must have dtype int64, got float32"):
            filter_and_downsample(torch.zeros(2), torch.ones(2), group=torch.zeros(2).long(), max_length=5)


def test_pairs_leave_out_what_has_no_partner() -> None:
    outcome = torch.tensor([1, 0, 1, 1, 0, math.nan, 1, 0.5])
    chosen, rejected = prompt_pairs(outcome, torch.tensor([4, 4, 4, 2, 2, 2, 9, 9]))
    assert chosen.tolist() == [3, 0]
    assert rejected.tolist() == [4, 1]


def test_accuracies_of_a_perfect_and_of_a_reversed_score() -> None:
    outcome, group = torch.tensor([1.0, 0, 1, 0, 1, 1]), torch.tensor([0, 0, 1, 1, 2, 2])
    score = 2 * outcome - 1
    assert pairwise_accuracy(score, outcome, group=group) == pytest.approx((1 + 1 + 0.5) / 3)
    assert pairwise_accuracy(-score, outcome, group=group) == pytest.approx((0 + 0 + 0.5) / 3)
    assert sign_accuracy(score, outcome) == 1
    assert sign_accuracy(-score, outcome) == 0
    flat, pair = torch.zeros(2), torch.zeros(2, dtype=torch.int64)  # equal scores: the earlier one counts as lower
    assert pairwise_accuracy(flat, torch.tensor([0.0, 1.0]), group=pair) == 1
    assert pairwise_accuracy(flat, torch.tensor([1.0, 0.0]), group=pair) == 0
    none = torch.zeros(0)
    assert sign_accuracy(none, none) == 0
    assert pairwise_accuracy(none, none, group=none.long()) == 0.5


def test_correlation_of_td_with_outcome() -> None:
    outcome = torch.tensor([1.0, 0.0, 1.0, math.nan, 0.0])
    td = torch.tensor([[3.0, 1.0], [-1.0, 0.0], [2.0, 9.0], [5.0, 5.0], [0.5, 0.5]])
    mask = torch.tensor([[1, 1], [1, 1], [1, 0], [1, 1], [1, 1]]).bool()
    means, known = torch.tensor([2.0, -0.5, 2.0, 0.5]), torch.tensor([1.0, 0.0, 1.0, 0.0])
    expected = float(torch.corrcoef(torch.stack([means, known]))[0, 1])
    assert td_outcome_correlation(td, outcome, mask=mask) == pytest.approx(expected, rel=1e-6)
    tokens = torch.stack([td[mask], outcome[:, None].expand(5, 2)[mask]])[:, [0, 1, 2, 3, 4, 7, 8]]
    per_token = td_outcome_correlation(td, outcome, mask=mask, level="token")
    assert per_token == pytest.approx(float(torch.corrcoef(tokens)[0, 1]), rel=1e-6)
    with pytest.raises(ValueError, match="level must be 'sequence' or 'token', got 'prompt'"):
        td_outcome_correlation(td, outcome, mask=mask, level="prompt")
    assert td_outcome_correlation(td, torch.ones(5), mask=mask) is None
    assert td_outcome_correlation(torch.zeros_like(td), outcome, mask=mask) is None
    assert td_outcome_correlation(td[:0], outcome[:0]) is None


def test_rm_score_is_the_mean_log_odds_of_whole_answers() -> None:
    td = torch.tensor([[3.0, 1.0], [-1.0, math.nan], [math.nan, math.nan]])
    mask = torch.tensor([[1, 1], [1, 0], [0, 0]]).bool()
    assert rm_score(td, mask=mask) == pytest.approx((2.0 - 1.0) / 2)
    assert rm_score(td, mask=mask, reward="implicit") == pytest.approx((4.0 - 1.0) / 2)
    assert rm_score(td[mask], offsets=torch.tensor([0, 2, 3, 3])) == pytest.approx((2.0 - 1.0) / 2)
    assert rm_score(td[:0]) == 0
    with pytest.raises(ValueError, match="reward must be 'ipvrm' or 'implicit', got 'none'"):
        rm_score(td, mask=mask, reward="none")


def test_suffix_statistics() -> None:
    values = torch.tensor([[2.0, -9.0, 8.0, 1.0], [4.0, 4.0, 4.0, 4.0]], dtype=torch.float64)
    mask = torch.tensor([[True, False, True, True], [False, False, False, False]])
    assert suffix_sum(values, mask=mask).tolist() == [[11, 0, 9, 1], [0, 0, 0, 0]]
    torch.testing.assert_close(
        suffix_mean(values, mask=mask)[0], torch.tensor([11 / 3, 0, 4.5, 1], dtype=torch.float64)
    )
    geometric = suffix_geometric_mean(values, mask=mask)[0]
    torch.testing.assert_close(geometric, torch.tensor([16 ** (1 / 3), 0, 8**0.5, 1], dtype=torch.float64))
    zero = suffix_geometric_mean(torch.tensor([[0.0, 4.0]]))
    assert zero.tolist() == [[0.0, 4.0]]
    with pytest.raises(ValueError, match="values must be >= 0, got -9"):
        suffix_geometric_mean(values)


class TestKlPenalty:
    def test_full_distribution_is_the_kl(self) -> None:
        p, q = (torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).log_softmax(-1)
        token, whole = topk_kl_penalty(p, q)
        torch.testing.assert_close(
            whole, (p.exp() * (p - q)).sum(-1), rtol=1e-9, atol=1e-4
        )  # the rest bucket holds 1e-5
        assert (token >= 0).all()

    def test_masked_tokens_and_gradients_stay_finite(self) -> None:
        p = torch.tensor([[-0.1, -math.inf, -3.0]], dtype=torch.float64, requires_grad=True)
        q = torch.tensor([[-200.0, -math.inf, -3.0]], dtype=torch.float64)
        token, whole = topk_kl_penalty(p, q)
        (grad,) = torch.autograd.grad(token.sum() + whole.sum(), p)
        for value in (token, whole, grad):
            assert value.isfinite().all()
        token, _ = topk_kl_penalty(q, p.detach())  # exp(200) of the estimate
        assert token.item() == 10
        assert topk_kl_penalty(p.detach(), q)[0].item() == 10  # 19, of a ratio taken as exp(-20)

    def test_gradcheck(self) -> None:
        logits = torch.randn(4, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        q = torch.randn(4, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).log_softmax(-1)[:, :3]
        assert torch.autograd.gradcheck(
            lambda x: topk_kl_penalty(x.log_softmax(-1)[:, :3], q), (logits.requires_grad_(),)
        )

    def test_errors(self) -> None:
        with pytest.raises(ValueError, match="threshold must be >= 0, got -1"):
            topk_kl_penalty(torch.zeros(1), torch.zeros(1), threshold=-1)
        with pytest.raises(ValueError, match="must have one shape"):
            topk_kl_penalty(torch.zeros(2, 1), torch.zeros(2, 2))
        with pytest.raises(TypeError, match="ref_logp must be a floating tensor, got int64"):
            topk_kl_penalty(torch.zeros(1), torch.zeros(1).long())
