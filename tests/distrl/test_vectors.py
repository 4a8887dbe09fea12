"""prmfast.distrl against recorded values: the released program of [V] and float64 transcriptions of the paper."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from prmfast.distrl import (
    AdvantageRule,
    LossRule,
    distrl_advantages,
    distrl_loss,
    filter_and_downsample,
    from_table,
    gae,
    group_normalised_outcome,
    pairwise_accuracy,
    prompt_pairs,
    released_candidates,
    sampled_td,
    sign_accuracy,
    suffix_geometric_mean,
    suffix_mean,
    suffix_sum,
    tok_ppo_loss,
    topk_kl_penalty,
    without_last_token,
)
from prmfast.distrl.advantages import Advantages
from prmfast.ops import Candidates, candidate_td
from tests.vectors import Vectors
from tests.vectors import assert_relative as assert_relative_in_its_dtype

DTYPES = {"f32": torch.float32, "f64": torch.float64}
RTOL = {"f32": 1e-5, "f64": 1e-9}
each_size = pytest.mark.parametrize("size", ["f32", "f64"])


def assert_relative(found: Tensor, expected: Tensor, rtol: float) -> None:
    """In float64, where an expected tensor of zeros has a scale."""
    if expected.numel():
        assert_relative_in_its_dtype(found.detach().double(), expected.double(), rtol)
    assert found.shape == expected.shape


def whole_table(td: Tensor) -> Candidates:
    """Every slot of td [B, T, K] as a candidate of its own id."""
    ids = torch.arange(td.shape[2]).expand(td.shape)
    return from_table(ids, torch.zeros_like(td), td, mask=torch.ones_like(td, dtype=torch.bool))


def groups_of(rows: int, n: int) -> Tensor:
    return torch.arange(rows) // n


@each_size
def test_advantages(size: str, shared_vectors: Path) -> None:
    vectors = Vectors(shared_vectors / "distrl_advantages.npz")
    for case in vectors.cases:
        x, y, p = vectors.inputs(case), vectors.outputs(case), case["params"]
        table, mask = x["candidate_td"].to(DTYPES[size]), x["response_mask"]
        td, group = table[..., 0], groups_of(len(table), p["n"])
        weights = {"outcome_weight": p["reward_gt_coef"], "td_weight": p["reward_gae_coef"]}
        released = AdvantageRule(variant="released", gamma=p["gamma"], lam=p["lam"], **weights)
        found = distrl_advantages(whole_table(table), td, x["acc"], group=group, mask=mask, rule=released)
        assert_relative(found.token, y[f"advantages_{size}"], RTOL[size])
        assert found.sigma_v == pytest.approx(float(y["prefix_value_std_f64"]), rel=RTOL[size])
        scaled = y[f"scaled_candidate_td_{size}"][mask]
        assert_relative(found.candidates.advantage.reshape(scaled.shape), scaled, RTOL[size])
        own = group_normalised_outcome(x["acc"], group)
        assert_relative((own[:, None] * mask).double(), y["grpo_f64"], 1e-9)

        paper = AdvantageRule(gamma=p["gamma"], lam=p["lam"])
        found = distrl_advantages(whole_table(table), td, x["acc"], group=group, mask=mask, rule=paper)
        assert_relative(found.token.double(), y["paper_advantages"], RTOL[size])
        assert_relative(
            gae(y["paper_td_group_normed"], mask=mask, gamma=p["gamma"], lam=p["lam"]), y["paper_gae"], 1e-9
        )
        scaled = y["paper_candidate_td"][mask]
        assert_relative(found.candidates.advantage.reshape(scaled.shape).double(), scaled, RTOL[size])
        assert found.sigma_v == pytest.approx(float(y["paper_sigma_v"]), rel=RTOL[size])


@each_size
def test_released_candidates(size: str, shared_vectors: Path) -> None:
    """The set of the program, from the room's: the same tokens, log-probabilities and TD, and no more."""
    vectors = Vectors(shared_vectors / "distrl_candidates.npz")
    for case in vectors.cases:
        x, y, p = vectors.inputs(case), vectors.outputs(case), case["params"]
        mask, tokens = x["response_mask"], x["tokens"]
        columns, dtype = x["old_logits"].shape[-1], DTYPES[size]
        logits = [x[name].reshape(-1, columns).to(dtype) for name in ("old_logits", "rm_logits")]
        room = candidate_td(*logits, p_min=p["min_probability"] / 2, beta=p["beta"], sampled=tokens.reshape(-1))
        found = released_candidates(room, tokens, mask=mask, p_min=p["min_probability"], top_k=p["k"])
        expected = from_table(y["indices"], y[f"old_logp_{size}"], y[f"candidate_td_{size}"], mask=y["candidate_mask"])
        assert torch.equal(found.offsets, expected.offsets)
        assert torch.equal(found.token_ids, expected.token_ids)
        # the program's float64 values belong to float64 logits, which one case stores as float32
        rtol = 1e-5 if x["old_logits"].dtype == torch.float32 else RTOL[size]
        assert_relative(found.policy_logp, expected.policy_logp.to(dtype), rtol)
        torch.testing.assert_close(
            found.advantage, expected.advantage.to(dtype), rtol=rtol, atol=4e-5 if rtol == 1e-5 else 1e-11
        )
        step = without_last_token(sampled_td(room, tokens), mask=mask)
        torch.testing.assert_close(
            step, y[f"step_reward_{size}"].to(dtype), rtol=rtol, atol=4e-5 if rtol == 1e-5 else 1e-11
        )


def policy_case(vectors: Vectors, case: dict[str, Any], dtype: torch.dtype) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    x = vectors.inputs(case)
    logits = x["policy_logits"].to(dtype).requires_grad_()
    old = x["old_logits"].to(dtype).log_softmax(-1)
    return x, logits, old


@each_size
def test_released_policy_loss(size: str, shared_vectors: Path) -> None:
    vectors, dtype, rtol = Vectors(shared_vectors / "distrl_policy_loss.npz"), DTYPES[size], RTOL[size]
    for case in vectors.cases:
        x, logits, old = policy_case(vectors, case, dtype)
        y, p = vectors.outputs(case), case["params"]
        mask, tokens, table = x["response_mask"], x["tokens"], y["indices"]
        candidates = from_table(table, old.gather(-1, table), x["candidate_td"].to(dtype), mask=y["candidate_mask"])
        advantages = Advantages(x["advantages"].to(dtype), candidates, torch.zeros(len(tokens)), 1.0)
        old_logp = old.gather(-1, tokens[..., None])[..., 0]
        rule = LossRule(
            "released",
            0.1,
            p["clip_ratio_low"],
            p["clip_ratio_high"],
            p["cliprange"],
            p["cliprange"],
            p["clip_ratio_c"],
        )
        assert rule == LossRule.released()
        found = distrl_loss(logits, advantages, sampled=tokens, old_logp=old_logp, mask=mask, rule=rule)
        close = {"rel": rtol, "abs": 1e-7 if size == "f32" else 1e-12}
        assert found.tok.loss.item() == pytest.approx(float(y[f"pg_loss_{size}"]), **close)
        # 0 / 0 in the program where no candidate is left; 0 here
        assert found.dist.loss.item() == pytest.approx(float(y[f"topk_pg_loss_{size}"].nan_to_num()), **close)
        for own, name in (
            (found.tok.clip_fraction, "pg_clipfrac"),
            (found.tok.approx_kl, "ppo_kl"),
            (found.dist.clip_fraction, "topk_pg_clipfrac"),
            (found.dist.approx_kl, "topk_ppo_kl"),
        ):
            # the program adds 1e-8 to its counts
            assert own == pytest.approx(float(y[f"{name}_{size}"]), rel=max(rtol, 1e-8), abs=1e-7), name
        for part, name in (
            (found.tok.loss, "glogits_tok"),
            (found.dist.loss, "glogits_dist"),
            (found.loss, "glogits_total"),
        ):
            (grad,) = torch.autograd.grad(part, logits, retain_graph=True)
            assert_relative(grad, y[f"{name}_{size}"].nan_to_num(), rtol)


@each_size
def test_paper_policy_loss(size: str, shared_vectors: Path) -> None:
    vectors, dtype, rtol = Vectors(shared_vectors / "distrl_policy_loss.npz"), DTYPES[size], RTOL[size]
    for case in vectors.cases:
        x, logits, old = policy_case(vectors, case, dtype)
        y, p = vectors.outputs(case), case["params"]
        mask, tokens, table = x["response_mask"], x["tokens"], y["indices"]
        logp = old.gather(-1, table)
        likely = (logp.exp() >= p["min_probability"]) & mask[..., None]
        candidates = from_table(table, logp, x["candidate_td"].to(dtype), mask=likely)
        advantages = Advantages(x["advantages"].to(dtype), candidates, torch.zeros(len(tokens)), 1.0)
        old_logp = old.gather(-1, tokens[..., None])[..., 0]
        found = distrl_loss(logits, advantages, sampled=tokens, old_logp=old_logp, mask=mask)
        close = {"rel": rtol, "abs": 1e-6 if size == "f32" else 1e-12}
        assert found.tok.loss.item() == pytest.approx(float(y["paper_tok_ppo"]), **close)
        assert found.dist.loss.item() == pytest.approx(float(y["paper_dist_ppo"]), **close)
        (grad,) = torch.autograd.grad(found.loss, logits)
        assert_relative(grad.double(), y["paper_glogits_total_alpha0.1"], rtol)


@each_size
def test_gradient_to_log_probabilities(size: str, shared_vectors: Path) -> None:
    vectors, dtype = Vectors(shared_vectors / "distrl_policy_loss.npz"), DTYPES[size]
    for case in vectors.cases:
        x, y = vectors.inputs(case), vectors.outputs(case)
        logp = y[f"logp_{size}"][..., 0].clone().requires_grad_()
        found = tok_ppo_loss(
            logp,
            y[f"old_logp_{size}"][..., 0],
            x["advantages"].to(dtype),
            mask=x["response_mask"],
            rule=LossRule.released(),
        )
        (grad,) = torch.autograd.grad(found.loss, logp)
        assert_relative(grad, y[f"gtok_logp_{size}"], RTOL[size])


@each_size
def test_penalties_and_accuracies(size: str, shared_vectors: Path) -> None:
    vectors, dtype, rtol = Vectors(shared_vectors / "distrl_misc.npz"), DTYPES[size], RTOL[size]
    for case in vectors.cases:
        x, y, p = vectors.inputs(case), vectors.outputs(case), case["params"]
        if "score" in x:
            logp = x["policy_logp"].to(dtype), x["ref_logp"].to(dtype)
            for found, name in zip(
                topk_kl_penalty(*logp, threshold=p["threshold"]), ("token_kl", "dist_kl"), strict=True
            ):
                assert_relative(found.double(), y[name], rtol)
            score, mask = x["score"].to(dtype), x["mask"]
            for suffix, name in (
                (suffix_sum, "suffix_sum"),
                (suffix_mean, "suffix_mean"),
                (suffix_geometric_mean, "suffix_geomean"),
            ):
                assert_relative(suffix(score, mask=mask).double(), y[name], rtol)
        else:
            group = groups_of(len(x["acc"]), p["n"])
            total = (x["token_scores"] * x["mask"]).sum(1).to(dtype)
            assert pairwise_accuracy(total, x["acc"], group=group) == pytest.approx(float(y["dpo_acc"]), rel=1e-12)
            assert sign_accuracy(total, x["acc"]) == pytest.approx(float(y["abs_acc"]), rel=1e-7)
            assert_relative(group_normalised_outcome(x["acc"].to(dtype), group)[:, None] * x["mask"], y["grpo"], rtol)


def test_pairs_of_a_prompt(shared_vectors: Path) -> None:
    vectors = Vectors(shared_vectors / "distrl_dporm.npz")
    for case in vectors.cases:
        x, y = vectors.inputs(case), vectors.outputs(case)
        chosen, rejected = prompt_pairs(x["acc"], x["prompt_group_id"], rank=x["rank"])
        assert torch.equal(chosen, y["chosen"])
        assert torch.equal(rejected, y["rejected"])
        scores = x["scores"].clone().requires_grad_()
        total = (scores * x["mask"]).sum(1)
        loss = -torch.nn.functional.logsigmoid(case["params"]["beta"] * (total[chosen] - total[rejected])).sum()
        (grad,) = torch.autograd.grad(loss, scores)
        assert loss.item() == pytest.approx(float(y["loss_sum"]), rel=1e-9)
        assert_relative(grad, y["grad"], 1e-9)


def test_filter(shared_vectors: Path) -> None:
    for case in json.loads((shared_vectors / "distrl_filter.json").read_text()):
        kept = filter_and_downsample(
            torch.tensor(case["acc"]),
            torch.tensor(case["response_len"]),
            group=torch.tensor(case["prompt_group_id"]),
            rank=torch.tensor(case["rank"]),
            max_length=case["max_response_length"],
            oversample_factor=case["oversample_factor"],
        )
        assert kept.index.tolist() == case["kept_index"]
        counts = {"accuracy_too_high": kept.too_high, "accuracy_too_low": kept.too_low, "accuracy_ok": kept.ok}
        assert counts == case["info"]
