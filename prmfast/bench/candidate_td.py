"""Room candidate_td: likely tokens and their advantages, from logits or hidden states; log-probabilities of ids."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from prmfast.bench import inputs
from prmfast.bench.case import FLOOR, Call, Case, Job, Rival, Unavailable, Work, assert_close, op, require
from prmfast.bench.rivals import compiled, jitted, to_jax, to_torch
from prmfast.kernels.candidate_td.candidates import Candidates

P_MIN, BETA, TOUCH = 0.1, 10.0, 1e-5
LIMIT = math.log(P_MIN) - TOUCH
MOST = 10  # candidates of a row at this p_min
SLICE = 24  # rows that are compared with float64
CHUNK = 4096  # vocabulary rows of one GEMM of the floor
RIVALS = ("torch eager", "torch eager, log_softmax", "torch.compile", "torch.compile, top 10", "jax.jit")
LOGPROB_RIVALS = ("torch eager", "torch eager, log_softmax", "torch.compile", "jax.jit")
LINEAR_RIVALS = ("GEMMs alone", "torch eager")


def from_mask(mask: Tensor, policy_logp: Tensor, advantage: Tensor) -> Candidates:
    """CSR rows of a [T, V] mask and the values of its true entries."""
    counts = mask.sum(1)
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return Candidates(offsets, mask.nonzero()[:, 1], policy_logp, advantage)


def normalisers(policy: Tensor, reward: Tensor) -> tuple[Tensor, Tensor]:
    """logsumexp of both sides; half types are summed in float32."""
    policy_sum = torch.logsumexp(policy.float(), 1, keepdim=True)
    return policy_sum, torch.logsumexp(reward.float(), 1, keepdim=True)


def _gathered(policy: Tensor, reward: Tensor, sums: tuple[Tensor, Tensor]) -> Candidates:
    policy_sum, reward_sum = sums
    least = policy_sum + LIMIT
    likely = policy >= least.to(policy.dtype) - (0 if policy.dtype == torch.float32 else 0.1)  # no float32 copy
    rows, ids = likely.nonzero(as_tuple=True)
    if policy.dtype != torch.float32:
        keep = policy[rows, ids].float() >= least[rows, 0]
        rows, ids = rows[keep], ids[keep]
    policy_logp = policy[rows, ids].float() - policy_sum[rows, 0]
    advantage = BETA * (reward[rows, ids].float() - reward_sum[rows, 0] - policy_logp)
    offsets = torch.cat([rows.new_zeros(1), torch.bincount(rows, minlength=len(policy)).cumsum(0)])
    return Candidates(offsets, ids, policy_logp, advantage)


def eager_logsumexp(policy: Tensor, reward: Tensor) -> Candidates:
    """Two logsumexp, one mask, values gathered at the candidates only."""
    return _gathered(policy, reward, normalisers(policy, reward))


def eager_log_softmax(policy: Tensor, reward: Tensor) -> Candidates:
    """Two whole log-softmax matrices."""
    policy_logp = torch.log_softmax(policy, 1, dtype=torch.float32)
    reward_logp = torch.log_softmax(reward, 1, dtype=torch.float32)
    mask = policy_logp >= LIMIT
    chosen = policy_logp[mask]
    return from_mask(mask, chosen, BETA * (reward_logp[mask] - chosen))


def compiled_candidates(policy: Tensor, reward: Tensor) -> Call:
    """The two normalisers are compiled into fused passes; the ragged rest is eager (inductor's own mask is slower)."""
    passes = compiled(normalisers, policy, reward)
    return Call(lambda: _gathered(policy, reward, passes.run()))


def top_candidates(policy: Tensor, reward: Tensor) -> tuple[Tensor, ...]:
    """The ten likeliest of every row, padded with a mask instead of CSR rows."""
    policy_sum, reward_sum = normalisers(policy, reward)
    top, ids = torch.topk(policy, min(MOST, policy.shape[1]), 1)
    policy_logp = top.float() - policy_sum
    advantage = BETA * (reward.gather(1, ids).float() - reward_sum - policy_logp)
    return policy_logp >= LIMIT, ids, policy_logp, advantage


def jax_candidates(policy: Any, reward: Any) -> Any:
    """`top_candidates` in jax."""
    jax = require("jax")
    jnp = jax.numpy
    policy, reward = policy.astype(jnp.float32), reward.astype(jnp.float32)
    policy_sum = jax.nn.logsumexp(policy, 1, keepdims=True)
    reward_sum = jax.nn.logsumexp(reward, 1, keepdims=True)
    top, ids = jax.lax.top_k(policy, MOST)
    policy_logp = top - policy_sum
    advantage = BETA * (jnp.take_along_axis(reward, ids, 1) - reward_sum - policy_logp)
    return policy_logp >= LIMIT, ids, policy_logp, advantage


def from_padded(out: Any) -> Candidates:
    """CSR rows of `jax_candidates`, by increasing token id."""
    mask, ids, policy_logp, advantage = (to_torch(part) for part in out)
    order = torch.where(mask, ids.long(), 1 << 40).sort(1).indices
    mask, ids, policy_logp, advantage = (part.gather(1, order) for part in (mask, ids, policy_logp, advantage))
    counts = mask.sum(1)
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return Candidates(offsets, ids[mask].long(), policy_logp[mask], advantage[mask])


def same_candidates(out: Candidates, other: Any, *, atol: float, loose: bool = False) -> dict[str, float]:
    """Equal sets, and values within ``atol``; with ``loose`` a token within 1e-3 of p_min may be on one side only."""
    truth = other if isinstance(other, Candidates) else from_padded(other)
    assert len(out.offsets) == len(truth.offsets), "other rows"
    if loose:
        out, truth = _common(out, truth)
    assert torch.equal(out.offsets, truth.offsets), "rows have other numbers of candidates"
    assert torch.equal(out.token_ids, truth.token_ids), "other candidates"
    return {
        "policy_logp_error": assert_close("policy_logp", out.policy_logp, truth.policy_logp, rtol=0, atol=atol),
        "advantage_error": assert_close("advantage", out.advantage, truth.advantage, rtol=1e-5, atol=2 * BETA * atol),
    }


def _common(a: Candidates, b: Candidates) -> tuple[Candidates, Candidates]:
    """Both without the tokens whose probability is within 1e-3 of p_min, relative."""

    def clear(c: Candidates) -> Candidates:
        keep = (c.policy_logp - math.log(P_MIN)).abs() > 1e-3
        counts = torch.zeros(len(c.offsets), dtype=torch.int64)
        counts[1:] = keep.cumsum(0)[c.offsets[1:] - 1]
        counts[1:][c.offsets[1:] == 0] = 0
        return Candidates(counts, c.token_ids[keep], c.policy_logp[keep], c.advantage[keep])

    return clear(a), clear(b)


def head(candidates: Candidates, rows: int) -> Candidates:
    """The first ``rows`` rows."""
    end = int(candidates.offsets[rows])
    _, ids, logp, advantage = candidates
    return Candidates(candidates.offsets[: rows + 1], ids[:end], logp[:end], advantage[:end])


def candidates_job(dtype: torch.dtype, rows: int, vocabulary: int) -> Job:
    """candidate_td from two logit matrices."""
    policy, reward = inputs.logits(rows, vocabulary, dtype)

    def check(out: Any) -> dict[str, float]:
        some = min(SLICE, rows)
        truth = eager_logsumexp_double(policy[:some], reward[:some])
        return same_candidates(head(out, some), truth, atol=2e-5) | {"candidates": float(len(out.token_ids))}

    def agree(out: Any, other: Any) -> None:
        same_candidates(out, other, atol=1e-4, loose=True)

    size = 4.0 * rows * vocabulary
    return Job(
        ours={"": Call(lambda: op("candidate_td")(policy, reward, p_min=P_MIN, beta=BETA))},
        rivals={
            "torch eager": Rival(lambda: Call(lambda: eager_logsumexp(policy, reward)), extra_bytes=3 * size),
            "torch eager, log_softmax": Rival(
                lambda: Call(lambda: eager_log_softmax(policy, reward)), extra_bytes=3 * size
            ),
            "torch.compile": Rival(lambda: compiled_candidates(policy, reward), extra_bytes=size),
            "torch.compile, top 10": Rival(lambda: compiled(top_candidates, policy, reward), extra_bytes=size),
            "jax.jit": Rival(lambda: jitted(jax_candidates, *to_jax((policy, reward))), extra_bytes=3 * size),
        },
        check=check,
        agree=agree,
        work=Work("read", 2.0 * rows * vocabulary * policy.element_size(), "both matrices once"),
    )


def eager_logsumexp_double(policy: Tensor, reward: Tensor) -> Candidates:
    """The definition in float64."""
    policy_logp = torch.log_softmax(policy.double(), 1)
    reward_logp = torch.log_softmax(reward.double(), 1)
    mask = policy_logp >= LIMIT
    return from_mask(mask, policy_logp[mask], BETA * (reward_logp[mask] - policy_logp[mask]))


def logprob_job(dtype: torch.dtype, rows: int, vocabulary: int) -> Job:
    """token_logprob of one id per row, no gradient."""
    logits, _ = inputs.logits(rows, vocabulary, dtype)
    ids = inputs.ids(rows, vocabulary, 3)

    def by_logsumexp(x: Tensor, chosen: Tensor) -> Tensor:
        return x.gather(1, chosen[:, None])[:, 0].float() - torch.logsumexp(x.float(), 1)

    def by_log_softmax(x: Tensor, chosen: Tensor) -> Tensor:
        return torch.log_softmax(x, 1, dtype=torch.float32).gather(1, chosen[:, None])[:, 0]

    def in_jax(x: Any, chosen: Any) -> Any:
        jax = require("jax")
        wide = x.astype(jax.numpy.float32)
        return jax.numpy.take_along_axis(wide, chosen[:, None], 1)[:, 0] - jax.nn.logsumexp(wide, 1)

    def check(out: Any) -> dict[str, float]:
        some = min(SLICE, rows)
        truth = torch.log_softmax(logits[:some].double(), 1).gather(1, ids[:some, None])[:, 0]
        return {"max_error": assert_close("logprob", out[:some], truth, rtol=0, atol=1e-4)}

    def agree(out: Any, other: Any) -> None:
        assert_close("logprob", to_torch(other), out, rtol=1e-5, atol=1e-4)

    def in_liger() -> Call:  # turns its input into the gradient
        try:
            from liger_kernel.transformers.functional import liger_cross_entropy
        except ImportError as error:
            raise Unavailable("not installed: pip install liger-kernel") from error
        work = logits.clone()
        return Call(lambda: -liger_cross_entropy(work, ids, reduction="none"), lambda: work.copy_(logits))

    size = 4.0 * rows * vocabulary
    return Job(
        ours={"": Call(lambda: op("token_logprob")(logits, ids))},
        rivals={
            **({"Liger-Kernel": Rival(in_liger, extra_bytes=size)} if logits.is_cuda else {}),
            "torch eager": Rival(lambda: Call(lambda: by_logsumexp(logits, ids)), extra_bytes=2 * size),
            "torch eager, log_softmax": Rival(lambda: Call(lambda: by_log_softmax(logits, ids)), extra_bytes=2 * size),
            "torch.compile": Rival(lambda: compiled(by_logsumexp, logits, ids)),
            "jax.jit": Rival(lambda: jitted(in_jax, *to_jax((logits, ids))), extra_bytes=size),
        },
        check=check,
        agree=agree,
        work=Work("read", float(rows * vocabulary * logits.element_size()), "the matrix once"),
    )


def gemms(pairs: list[tuple[Tensor, Tensor]]) -> Callable[[], None]:
    """``hidden @ weight.T`` of every pair, by vocabulary chunks into one buffer: nothing but the GEMMs."""
    rows = len(pairs[0][0])
    space = pairs[0][0].new_zeros(rows * CHUNK)

    def run() -> None:
        for hidden, weight in pairs:
            for part in weight.split(CHUNK):
                torch.mm(hidden, part.T, out=space[: rows * len(part)].view(rows, len(part)))

    return run


def linear_job(rows: int, width: int, vocabulary: int, kept: tuple[str, ...] = LINEAR_RIVALS) -> Job:
    """linear_candidate_td: from hidden states and lm_head weights, beside the rivals that are ``kept``."""
    hidden, reward_hidden, weight, reward_weight = inputs.linear(rows, width, vocabulary)
    options = {"policy_weight": weight, "reward_weight": reward_weight, "p_min": P_MIN, "beta": BETA}

    def eager() -> Candidates:
        return eager_logsumexp(hidden @ weight.T, reward_hidden @ reward_weight.T)

    def check(out: Any) -> dict[str, float]:
        some = min(8, rows)
        policy = torch.empty(some, vocabulary, dtype=torch.float64)
        reward = torch.empty_like(policy)
        for start in range(0, vocabulary, CHUNK):
            part = slice(start, start + CHUNK)
            policy[:, part] = hidden[:some].double() @ weight[part].double().T
            reward[:, part] = reward_hidden[:some].double() @ reward_weight[part].double().T
        truth = eager_logsumexp_double(policy, reward)
        found = same_candidates(head(out, some), truth, atol=1e-4, loose=True)
        return found | {"candidates": float(len(out.token_ids))}

    def agree(out: Any, other: Any) -> None:
        same_candidates(out, other, atol=2e-4, loose=True)

    size = 4.0 * rows * vocabulary
    rivals = {
        "GEMMs alone": Rival(
            lambda: Call(gemms([(hidden, weight), (reward_hidden, reward_weight)])), FLOOR, 4.0 * rows * CHUNK
        ),
        "torch eager": Rival(lambda: Call(eager), extra_bytes=4.3 * size),
    }
    return Job(
        ours={"": Call(lambda: op("linear_candidate_td")(hidden, reward_hidden, **options))},
        rivals={name: rivals[name] for name in kept},
        check=check,
        agree=agree,
        work=Work("gemm", 4.0 * rows * width * vocabulary, "two GEMMs"),
    )


def candidates_case(dtype: torch.dtype, rows: int, vocabulary: int) -> Case:
    """A case of candidate_td."""
    return Case(
        room="candidate_td",
        op="candidate_td",
        size=f"T={rows} V={vocabulary}",
        dtype=str(dtype).removeprefix("torch."),
        make=functools.partial(candidates_job, dtype, rows, vocabulary),
        tiny=functools.partial(candidates_job, dtype, 2, 40),
        rivals=RIVALS,
    )


def logprob_case(dtype: torch.dtype, rows: int, vocabulary: int) -> Case:
    """A case of token_logprob."""
    return Case(
        room="candidate_td",
        op="token_logprob",
        size=f"T={rows} V={vocabulary}",
        dtype=str(dtype).removeprefix("torch."),
        make=functools.partial(logprob_job, dtype, rows, vocabulary),
        tiny=functools.partial(logprob_job, dtype, 2, 40),
        rivals=LOGPROB_RIVALS,
    )


def linear_case(rows: int, width: int, vocabulary: int, rivals: tuple[str, ...] = LINEAR_RIVALS) -> Case:
    """A case of linear_candidate_td."""
    return Case(
        room="candidate_td",
        op="linear_candidate_td",
        size=f"T={rows} d={width} V={vocabulary}",
        dtype="float32",
        make=functools.partial(linear_job, rows, width, vocabulary, rivals),
        tiny=functools.partial(linear_job, 2, 8, 40, rivals),
        rivals=rivals,
    )
