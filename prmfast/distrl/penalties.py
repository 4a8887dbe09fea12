"""KL penalties of the released program of [V], and masked suffix statistics of token scores."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from prmfast.distrl._ragged import FLOATS, layout

_REST_FLOOR = 1e-5
_MAX_LOG_RATIO = 60.0


def topk_kl_penalty(policy_logp: Tensor, ref_logp: Tensor, *, threshold: float = 0.0) -> tuple[Tensor, Tensor]:
    """Equals ``(exp(d) - 1 - d, sum_c p (log p - log q) + rest)``, d = (log q - log p)[..., 0].

    p is the policy, q the reference, on the k likeliest tokens; slot 0 is the sampled one. ``rest`` is the same term of
    the probability outside the k tokens, as one bucket that holds at least 1e-5.

    Args:
        policy_logp: [.., K] floating, log-probabilities; differentiable.
        ref_logp: [.., K], of the same tokens.
        threshold: >= 0; a log-ratio log p - log q below it in magnitude adds nothing, in both penalties.

    Returns:
        token penalty [..] (the k3 estimate) and distribution penalty [..].

    Raises:
        TypeError: not floating. ValueError: shapes that differ, no slot, threshold < 0.
    """
    op = "topk_kl_penalty"
    for name, value in (("policy_logp", policy_logp), ("ref_logp", ref_logp)):
        if not isinstance(value, Tensor) or value.dtype not in FLOATS:
            got = str(value.dtype).removeprefix("torch.") if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"{op}: {name} must be a floating tensor, got {got}")
    if policy_logp.shape != ref_logp.shape or policy_logp.ndim == 0 or policy_logp.shape[-1] == 0:
        shapes = f"{tuple(policy_logp.shape)} and {tuple(ref_logp.shape)}"
        raise ValueError(f"{op}: policy_logp and ref_logp must have one shape [.., K], K >= 1, got {shapes}")
    if not threshold >= 0:
        raise ValueError(f"{op}: threshold must be >= 0, got {threshold}")
    d = (ref_logp - policy_logp)[..., 0].clamp(max=_MAX_LOG_RATIO)
    token = torch.where(d.abs() < threshold, 0.0, d.expm1() - d)
    rest = [(1 - x.exp().sum(-1, keepdim=True)).clamp(min=_REST_FLOOR).log() for x in (policy_logp, ref_logp)]
    p, q = (torch.cat(pair, -1) for pair in zip((policy_logp, ref_logp), rest, strict=True))
    # a token of probability 0 adds 0, not NaN
    shift = torch.where(p.isneginf(), 0.0, p - q)
    return token, (p.exp() * torch.where(shift.abs() < threshold, 0.0, shift)).sum(-1)


def _suffix(
    op: str, values: Tensor, mask: Tensor | None, offsets: Tensor | None, finish: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    where = layout(op, "values", values, mask, offsets)
    packed = where.pack(values).double()
    sums = where.discounted_suffix_sums(packed, 1.0)
    left = where.discounted_suffix_sums(torch.ones_like(packed), 1.0)
    return where.unpack(finish(sums, left)).to(values.dtype)


def suffix_sum(values: Tensor, *, mask: Tensor | None = None, offsets: Tensor | None = None) -> Tensor:
    """Sum of a token's value and all valid ones after it; [B, T] with a mask or [N] with offsets, 0 at padding."""
    return _suffix("suffix_sum", values, mask, offsets, lambda sums, _: sums)


def suffix_mean(values: Tensor, *, mask: Tensor | None = None, offsets: Tensor | None = None) -> Tensor:
    """Mean of a token's value and all valid ones after it; as `suffix_sum`."""
    return _suffix("suffix_mean", values, mask, offsets, lambda sums, left: sums / left)


def suffix_geometric_mean(values: Tensor, *, mask: Tensor | None = None, offsets: Tensor | None = None) -> Tensor:
    """Geometric mean of a token's value and all valid ones after it, values >= 0; as `suffix_sum`.

    Raises:
        ValueError: a valid value below 0, besides what `suffix_sum` raises.
    """
    op = "suffix_geometric_mean"
    valid = layout(op, "values", values, mask, offsets).pack(values)
    if bool((valid < 0).any()):
        raise ValueError(f"{op}: values must be >= 0, got {float(valid[valid < 0][0])}")
    return _suffix(op, values.log(), mask, offsets, lambda sums, left: (sums / left).exp())
