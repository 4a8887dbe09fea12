"""Room dist_ppo: the clipped loss over candidates and its gradient, to logits and to hidden states."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from prmfast.bench import inputs
from prmfast.bench.candidate_td import CHUNK, eager_logsumexp
from prmfast.bench.case import DERIVED, FLOOR, Call, Case, Job, Rival, Work, assert_close, op, require
from prmfast.bench.rivals import jitted, to_jax, to_torch
from prmfast.kernels.candidate_td.candidates import Candidates

CLIP_LOW, CLIP_HIGH = 0.2, 0.28
SLICE = 16  # rows that are compared with float64
RIVALS = (
    *("torch eager", "torch eager, log_softmax", "torch eager, closed form, out="),
    *("torch.compile", "torch.compile, log_softmax", "torch.compile, closed form, out=", "jax.jit"),
)
VARIANTS = ("out=", "in place", "fresh", "autograd")
LINEAR_RIVALS = ("GEMMs alone", "torch eager")

Terms = tuple[Tensor, Tensor, Tensor, Tensor]  # row of each candidate, token id, policy_logp, advantage


def terms(candidates: Candidates) -> Terms:
    """Flat candidates with the row of each."""
    rows = torch.repeat_interleave(torch.arange(len(candidates.offsets) - 1), candidates.offsets.diff())
    return rows, candidates.token_ids, candidates.policy_logp, candidates.advantage


def surrogate(logp: Tensor, policy_logp: Tensor, advantage: Tensor, weight: float) -> Tensor:
    """-weight * sum pi_old min(rho A, clip(rho) A)."""
    ratio = (logp - policy_logp).exp()
    clipped = ratio.clamp(1 - CLIP_LOW, 1 + CLIP_HIGH)
    return -weight * (policy_logp.exp() * torch.minimum(ratio * advantage, clipped * advantage)).sum()


def loss_by_logsumexp(logits: Tensor, rows: Tensor, ids: Tensor, policy_logp: Tensor, advantage: Tensor) -> Tensor:
    """Values gathered at the candidates only."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    logp = wide[rows, ids] - torch.logsumexp(wide, 1)[rows]
    return surrogate(logp, policy_logp, advantage, 1 / len(logits))


def loss_by_log_softmax(logits: Tensor, rows: Tensor, ids: Tensor, policy_logp: Tensor, advantage: Tensor) -> Tensor:
    """A whole log-softmax matrix."""
    logp = torch.log_softmax(logits, 1, dtype=torch.float32)[rows, ids]
    return surrogate(logp, policy_logp, advantage, 1 / len(logits))


def slopes(logp: Tensor, policy_logp: Tensor, advantage: Tensor, weight: float) -> tuple[Tensor, Tensor]:
    """The loss and its derivative to every candidate's log-probability."""
    ratio = (logp - policy_logp).exp()
    clipped = ratio.clamp(1 - CLIP_LOW, 1 + CLIP_HIGH)
    open_, shut = ratio * advantage, clipped * advantage
    old = weight * policy_logp.exp()
    inside = (open_ < shut) | (clipped == ratio)
    return -(old * torch.minimum(open_, shut)).sum(), torch.where(inside, -old * open_, 0.0)


def closed_form(
    out: Tensor, logits: Tensor, rows: Tensor, ids: Tensor, policy_logp: Tensor, advantage: Tensor
) -> Tensor:
    """Loss, and the gradient into ``out``, derived by hand: a scaled softmax and one scatter."""
    wide = logits.float()
    total = torch.logsumexp(wide, 1, keepdim=True)
    logp = logits[rows, ids].float() - total[rows, 0]
    loss, slope = slopes(logp, policy_logp, advantage, 1 / len(logits))
    per_row = total.new_zeros(len(logits)).index_add(0, rows, slope)
    out.copy_((wide - total).exp() * -per_row[:, None])
    out.index_put_((rows, ids), slope.to(out.dtype), accumulate=True)
    return loss


def eager_closed_form(out: Tensor, logits: Tensor, *flat: Tensor) -> Tensor:
    """`closed_form` with as few passes as eager torch allows: softmax, scale and scatter in one buffer."""
    rows, ids, policy_logp, advantage = flat
    torch.softmax(logits, 1, out=out)
    loss, slope = slopes(out[rows, ids].float().log(), policy_logp, advantage, 1 / len(logits))
    per_row = slope.new_zeros(len(logits)).index_add(0, rows, slope)
    out.mul_(-per_row[:, None].to(out.dtype))
    out.index_put_((rows, ids), slope.to(out.dtype), accumulate=True)
    return loss


def jax_loss(logits: Any, rows: Any, ids: Any, policy_logp: Any, advantage: Any) -> Any:
    """`loss_by_logsumexp` in jax."""
    jax = require("jax")
    jnp = jax.numpy
    wide = logits.astype(jnp.float32)
    logp = wide[rows, ids] - jax.nn.logsumexp(wide, 1)[rows]
    ratio = jnp.exp(logp - policy_logp)
    clipped = jnp.clip(ratio, 1 - CLIP_LOW, 1 + CLIP_HIGH)
    return -(jnp.exp(policy_logp) * jnp.minimum(ratio * advantage, clipped * advantage)).sum() / len(logits)


def _truth(logits: Tensor, flat: Terms, some: int) -> tuple[float, Tensor]:
    """Loss over all rows and gradient of the first ``some`` rows, in float64, a few rows at a time."""
    rows, ids, policy_logp, advantage = flat
    loss, gradient = 0.0, torch.empty(some, logits.shape[1], dtype=torch.float64)
    for start in range(0, len(logits), some):
        part = logits[start : start + some].double().requires_grad_()
        mine = (rows >= start) & (rows < start + len(part))
        here = (rows[mine] - start, ids[mine], policy_logp[mine].double(), advantage[mine].double())
        value = loss_by_logsumexp(part, *here) * (len(part) / len(logits))
        loss += float(value.detach())
        if start == 0:
            gradient = torch.autograd.grad(value, part)[0]
    return loss, gradient


def loss_job(dtype: torch.dtype, rows: int, vocabulary: int) -> Job:
    """dist_ppo_loss_and_grad into a buffer, in place and fresh; dist_ppo_loss through autograd."""
    policy, logits = inputs.logits(rows, vocabulary, dtype)
    candidates = eager_logsumexp(policy, policy)
    del policy
    spread = inputs.normal(len(candidates.token_ids), seed=4)
    candidates = candidates._replace(advantage=spread)
    flat = terms(candidates)
    options: dict[str, Any] = {"clip_low": CLIP_LOW, "clip_high": CLIP_HIGH}
    leaf = logits.detach().requires_grad_()
    out, work = torch.zeros_like(logits), logits.clone()

    def forward_backward(loss_of: Callable[..., Tensor]) -> Any:
        loss = loss_of()
        return loss.detach(), torch.autograd.grad(loss, leaf)[0]

    def into_buffer(function: Callable[..., Tensor]) -> Any:
        with torch.no_grad():
            return function(out, logits, *flat), out

    def compiled_loss(function: Callable[..., Tensor]) -> Call:
        fast = torch.compile(function, dynamic=False)
        return Call(lambda: forward_backward(lambda: fast(leaf, *flat)))

    def in_jax() -> Call:
        return jitted(require("jax").value_and_grad(jax_loss), *to_jax((logits, *flat)))

    some, wide = min(SLICE, rows), dtype == torch.float32
    truth_loss, truth = _truth(logits, flat, some)

    def check(got: Any) -> dict[str, float]:
        scale = float(truth.abs().max())
        found = {
            "loss_error": abs(float(got[0]) - truth_loss),
            "gradient_error_over_max": float((got[1][:some].double() - truth).abs().max()) / scale,
        }
        assert found["loss_error"] <= 2e-5 * max(1.0, abs(truth_loss)), found
        assert found["gradient_error_over_max"] <= (1e-4 if wide else 1e-2), found
        return found

    def agree(_: Any, other: Any) -> None:  # with the truth: an in-place call may have overwritten our output
        gradient = other[1] if isinstance(other[1], Tensor) else to_torch(other[1][:some].astype("float32"))
        scale = float(truth.abs().max())
        assert abs(float(other[0]) - truth_loss) <= (1e-4 if wide else 2e-2) * max(1.0, abs(truth_loss)), "loss"
        assert_close("gradient", gradient[:some], truth, rtol=0, atol=(1e-3 if wide else 3e-2) * scale)

    size = 4.0 * rows * vocabulary
    both = op("dist_ppo_loss_and_grad")
    return Job(
        ours={
            "out=": Call(lambda: both(logits, candidates, out=out, **options)),
            "in place": Call(lambda: both(work, candidates, out=work, **options), setup=lambda: work.copy_(logits)),
            "fresh": Call(lambda: both(logits, candidates, **options)),
            "autograd": Call(lambda: forward_backward(lambda: op("dist_ppo_loss")(leaf, candidates, **options))),
        },
        rivals={
            "torch eager": Rival(
                lambda: Call(lambda: forward_backward(lambda: loss_by_logsumexp(leaf, *flat))), extra_bytes=3 * size
            ),
            "torch eager, log_softmax": Rival(
                lambda: Call(lambda: forward_backward(lambda: loss_by_log_softmax(leaf, *flat))), extra_bytes=3 * size
            ),
            "torch eager, closed form, out=": Rival(
                lambda: Call(lambda: into_buffer(eager_closed_form)), DERIVED, extra_bytes=size
            ),
            "torch.compile": Rival(lambda: compiled_loss(loss_by_logsumexp), extra_bytes=2 * size),
            "torch.compile, log_softmax": Rival(lambda: compiled_loss(loss_by_log_softmax), extra_bytes=2 * size),
            "torch.compile, closed form, out=": Rival(
                lambda: Call(functools.partial(into_buffer, torch.compile(closed_form, dynamic=False))), DERIVED
            ),
            "jax.jit": Rival(in_jax, extra_bytes=3 * size),
        },
        check=check,
        agree=agree,
        work=Work("copy", 2.0 * rows * vocabulary * logits.element_size(), "logits read once, gradient written once"),
        buffers=(out, work),
    )


def three_gemms(hidden: Tensor, weight: Tensor) -> Callable[[], None]:
    """Logits, gradient to the hidden states and gradient to the weight, by vocabulary chunks: nothing but the GEMMs."""
    rows = len(hidden)
    space, d_hidden, d_weight = hidden.new_zeros(rows * CHUNK), torch.zeros_like(hidden), torch.zeros_like(weight)

    def run() -> None:
        for part, d_part in zip(weight.split(CHUNK), d_weight.split(CHUNK), strict=True):
            block = space[: rows * len(part)].view(rows, len(part))
            torch.mm(hidden, part.T, out=block)
            d_hidden.addmm_(block, part, alpha=0.0)
            torch.mm(block.T, hidden, out=d_part)

    return run


def linear_job(rows: int, width: int, vocabulary: int, kept: tuple[str, ...] = LINEAR_RIVALS) -> Job:
    """linear_dist_ppo_loss forward and backward, to hidden states and weight, beside the rivals that are ``kept``."""
    old_hidden, hidden, old_weight, weight = inputs.linear(rows, width, vocabulary)
    found = []
    for part in old_hidden.split(64):
        logits = part @ old_weight.T
        found.append(terms(eager_logsumexp(logits, logits)))
    del old_hidden, old_weight
    counts = torch.cat([torch.bincount(f[0], minlength=len(p)) for f, p in zip(found, hidden.split(64), strict=True)])
    ids, policy_logp = (torch.cat([f[i] for f in found]) for i in (1, 2))
    advantage = inputs.normal(len(ids), seed=4)
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    candidates = Candidates(offsets, ids, policy_logp, advantage)
    flat = terms(candidates)
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]

    def forward_backward(loss_of: Callable[..., Tensor]) -> Any:
        loss = loss_of()
        return (loss.detach(), *torch.autograd.grad(loss, leaves))

    def ours() -> Any:
        options: dict[str, Any] = {"clip_low": CLIP_LOW, "clip_high": CLIP_HIGH}
        return forward_backward(lambda: op("linear_dist_ppo_loss")(hidden, weight, candidates, **options))

    def check(got: Any) -> dict[str, float]:
        truth_loss, some = 0.0, min(8, rows)
        with torch.no_grad():
            for start in range(0, rows, 128):
                part = hidden[start : start + 128] @ weight.T  # float32 products, everything after in float64
                mine = (flat[0] >= start) & (flat[0] < start + len(part))
                here = (flat[0][mine] - start, *(f[mine] for f in flat[1:]))
                truth_loss += float(loss_by_logsumexp(part.double(), *here)) * len(part) / rows
        leaf = (hidden[:some].detach().double() @ weight.detach().double().T).requires_grad_()
        mine = flat[0] < some
        loss = loss_by_logsumexp(leaf, *(f[mine] for f in flat)) * (some / rows)
        d_hidden = torch.autograd.grad(loss, leaf)[0] @ weight.detach().double()
        errors = {
            "loss_error": abs(float(got[0]) - truth_loss),
            "d_hidden_error_over_max": float((got[1][:some].double() - d_hidden).abs().max() / d_hidden.abs().max()),
        }
        assert errors["loss_error"] <= 1e-4 * max(1.0, abs(truth_loss)), errors
        assert errors["d_hidden_error_over_max"] <= 1e-3, errors
        return errors

    def agree(out: Any, other: Any) -> None:
        for name, mine, theirs in zip(("loss", "d_hidden", "d_weight"), out, other, strict=True):
            assert_close(name, theirs, mine, rtol=0, atol=1e-3 * float(mine.abs().max()))

    size = 4.0 * rows * vocabulary
    rivals = {
        "GEMMs alone": Rival(
            lambda: Call(three_gemms(hidden.detach(), weight.detach())), FLOOR, 4.0 * width * (rows + vocabulary)
        ),
        "torch eager": Rival(
            lambda: Call(lambda: forward_backward(lambda: loss_by_logsumexp(hidden @ weight.T, *flat))),
            extra_bytes=3.3 * size,
        ),
    }
    return Job(
        ours={"": Call(ours)},
        rivals={name: rivals[name] for name in kept},
        check=check,
        agree=agree,
        work=Work("gemm", 6.0 * rows * width * vocabulary, "three GEMMs; a fourth makes the logits again"),
    )


def loss_case(dtype: torch.dtype, rows: int, vocabulary: int) -> Case:
    """A case of dist_ppo_loss_and_grad and dist_ppo_loss."""
    return Case(
        room="dist_ppo",
        op="dist_ppo_loss_and_grad",
        size=f"T={rows} V={vocabulary}",
        dtype=str(dtype).removeprefix("torch."),
        make=functools.partial(loss_job, dtype, rows, vocabulary),
        tiny=functools.partial(loss_job, dtype, 2, 40),
        rivals=RIVALS,
        variants=VARIANTS,
    )


def linear_case(rows: int, width: int, vocabulary: int, rivals: tuple[str, ...] = LINEAR_RIVALS) -> Case:
    """A case of linear_dist_ppo_loss."""
    return Case(
        room="dist_ppo",
        op="linear_dist_ppo_loss",
        size=f"T={rows} d={width} V={vocabulary}",
        dtype="float32",
        make=functools.partial(linear_job, rows, width, vocabulary, rivals),
        tiny=functools.partial(linear_job, 2, 8, 40, rivals),
        rivals=rivals,
    )
