"""What all losses share: checks, the dtype they compute in, and means over what is not padding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from prmfast.ops._contract import FLOATS, Check

PADDING = -100  # the label of what is no step or no sample
_LABELS = (*FLOATS, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """float64 for float64, float32 for everything else."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def option(name: str, value: str, allowed: Sequence[str]) -> None:
    """ValueError unless ``value`` is one of ``allowed``."""
    if value not in allowed:
        raise ValueError(f"{name} must be {' or '.join(repr(one) for one in allowed)}, got {value!r}")


def read_labels(check: Check, labels: Tensor, scores: Tensor, *, hard: bool, name: str = "labels") -> Tensor:
    """The tensor ``name`` in the dtype of the computation: of the shape of ``scores``, 0/1 or in [0, 1], or -100."""
    check.tensor(name, labels, ndim=scores.ndim, dtypes=_LABELS)
    check.shape(name, labels, tuple(scores.shape))
    check.same_device("scores", scores, **{name: labels})
    values = labels.detach().to(compute_dtype(scores))
    inside = (values == 0) | (values == 1) if hard else (values >= 0) & (values <= 1)
    bad = ~(inside | (values == PADDING))
    if bool(bad.any()):
        where = tuple(bad.nonzero()[0].tolist())
        rule = "0, 1 or -100" if hard else "in [0, 1] or -100"
        raise ValueError(f"{check.op}: {name} must be {rule}, got {values[where].item():g} at {where}")
    return values


def read_mask(check: Check, mask: Tensor | None, like: Tensor) -> Tensor:
    """``mask`` as booleans of the shape of ``like``; all true for None."""
    if mask is None:
        return torch.ones_like(like, dtype=torch.bool)
    check.tensor("mask", mask, ndim=like.ndim, dtypes=_LABELS)
    check.shape("mask", mask, tuple(like.shape))
    check.same_device("scores", like, mask=mask)
    return mask.detach() != 0


def masked(values: Tensor, mask: Tensor, fill: float = 0.0) -> Tensor:
    """``values`` in the dtype of the computation with ``fill`` where the mask is false, whatever stands there."""
    return torch.where(mask, values.to(compute_dtype(values)), fill)


def ratio(total: Tensor, count: Tensor) -> Tensor:
    """``total / count``, 0 with zero gradient where the count is 0."""
    return torch.where(count > 0, total, 0.0) / torch.where(count > 0, count, 1.0)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of ``values`` over the mask, 0 if it is empty; values must be finite everywhere."""
    return ratio(torch.where(mask, values, 0.0).sum(), mask.sum().to(values.dtype))


def softplus(x: Tensor) -> Tensor:
    """``log(1 + exp(x))`` to full precision for every x: torch's own turns linear at 20."""
    return -torch.nn.functional.logsigmoid(-x)
