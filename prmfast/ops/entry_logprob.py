"""Log-probabilities of a ragged set of tokens, differentiable, with the kernels of the room dist_ppo.

Any objective of a few tokens a row can be written on them in plain torch, and costs one pass over the vocabulary
forward and one backward, however many terms it has.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from prmfast.kernels.candidate_td.candidates import Candidates
from prmfast.kernels.dist_ppo.reference import entry_rows
from prmfast.ops._contract import Check
from prmfast.ops._dist_ppo_checks import check_all, check_layer, check_rows

_Derivative = tuple[Tensor | None, ...]


def _neutral(offsets: Tensor, token_ids: Tensor) -> list[Tensor]:
    """Candidates whose loss and gradient are 0: the room's forward pass then gives the log-sum-exp of their rows."""
    zeros = torch.zeros(token_ids.shape, dtype=torch.float64, device=token_ids.device)
    return [offsets, token_ids, zeros, zeros]


class _Entries(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        offsets: Tensor,
        token_ids: Tensor,
        temperature: float,
        backend: str,
        lse: Tensor | None,
    ) -> Tensor:
        if lse is None:
            rule = [0.0, 0.0, 2.0, temperature]
            _, lse, _ = torch.ops.prmfast.dist_ppo(logits, _neutral(offsets, token_ids), None, rule, backend)
        ctx.save_for_backward(logits, offsets, token_ids, lse)
        ctx.temperature, ctx.backend = temperature, backend
        rows = entry_rows(offsets)
        found: Tensor = logits[rows, token_ids].double() / temperature - lse[rows]
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> _Derivative:
        logits, *state = ctx.saved_tensors
        out = torch.ops.prmfast.dist_ppo_backward(
            grad.new_ones(()), logits, *state, grad.contiguous(), ctx.temperature, ctx.backend
        )
        return out, None, None, None, None, None


class _LinearEntries(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        offsets: Tensor,
        token_ids: Tensor,
        temperature: float,
        backend: str,
        lse: Tensor | None,
    ) -> Tensor:
        if lse is None:
            rule, entries = [0.0, 0.0, 2.0, temperature], _neutral(offsets, token_ids)
            _, lse, _ = torch.ops.prmfast.linear_dist_ppo(hidden, weight, entries, None, rule, backend)
        ctx.save_for_backward(hidden, weight, offsets, token_ids, lse)
        ctx.temperature, ctx.backend = temperature, backend
        rows = entry_rows(offsets)
        found: Tensor = (hidden[rows].double() * weight[token_ids].double()).sum(1) / temperature - lse[rows]
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> _Derivative:
        wanted = list(ctx.needs_input_grad[:2])
        d_hidden, d_weight = torch.ops.prmfast.linear_dist_ppo_backward(
            grad.new_ones(()), *ctx.saved_tensors, grad.contiguous(), ctx.temperature, wanted, ctx.backend
        )
        return d_hidden if wanted[0] else None, d_weight if wanted[1] else None, None, None, None, None, None


def _check(
    check: Check,
    like: Tensor,
    vocabulary: int,
    offsets: Tensor,
    *,
    token_ids: Tensor,
    temperature: float,
    lse: Tensor | None,
) -> tuple[float, Tensor | None]:
    """The temperature, and a known ``lse`` as the room's forward pass would have left it: 0 in rows without entries.

    Where it is not known, that pass checks the entries.
    """
    check.tensor("offsets", offsets, ndim=1, dtypes=(torch.int64,))
    check.shape("offsets", offsets, (like.shape[0] + 1,))
    check.tensor("token_ids", token_ids, ndim=1, dtypes=(torch.int64,))
    number = check.number("temperature", temperature)
    if not 0 < number < math.inf:
        raise ValueError(f"{check.op}: temperature must be > 0 and finite, got {temperature}")
    if lse is None:
        return number, None
    check.tensor("lse", lse, ndim=1, dtypes=(torch.float64,))
    check.shape("lse", lse, (like.shape[0],))
    check.same_device("the logits", like, lse=lse)
    check_all(check, Candidates(*_neutral(offsets, token_ids)), None, like=like, vocabulary=vocabulary)
    known = lse.detach().masked_fill(offsets.diff() == 0, 0.0)
    check_rows(check, known)
    return number, known


def entry_logprob(
    logits: Tensor,
    offsets: Tensor,
    token_ids: Tensor,
    *,
    temperature: float = 1.0,
    backend: str = "auto",
    lse: Tensor | None = None,
) -> Tensor:
    """Equals ``log_softmax(logits / temperature, 1)[rows, token_ids]``, rows = the CSR row of every entry.

    No [T, V] tensor is made before the backward pass, which makes one: the gradient.

    Args:
        logits: [T, V] float32 | float64 | float16 | bfloat16; rows may be strided. A row without entries is not read.
        offsets: int64 [T + 1], CSR as in `Candidates`.
        token_ids: int64 [nnz], increasing within a row.
        temperature: > 0.
        backend: of the room dist_ppo.
        lse: float64 [T], log-sum-exp of the rows of ``logits / temperature``, where it is known: no pass over the
            vocabulary is made forward. Finite in rows with entries; taken as it is, and differentiated as what it is.

    Returns:
        float64 [nnz]. Differentiable once, in the logits.

    Raises:
        TypeError, ValueError, RuntimeError: as `dist_ppo_loss`.
    """
    check = Check("entry_logprob")
    check.tensor("logits", logits, ndim=2)
    temperature, lse = _check(
        check, logits, logits.shape[1], offsets, token_ids=token_ids, temperature=temperature, lse=lse
    )
    found: Tensor = _Entries.apply(  # type: ignore[no-untyped-call]
        logits, offsets, token_ids, temperature, backend, lse
    )
    return found


def linear_entry_logprob(
    hidden: Tensor,
    weight: Tensor,
    offsets: Tensor,
    *,
    token_ids: Tensor,
    temperature: float = 1.0,
    backend: str = "auto",
    lse: Tensor | None = None,
) -> Tensor:
    """Equals ``entry_logprob(hidden @ weight.T, offsets, token_ids)`` without the [T, V] logits or their gradient.

    Args:
        hidden: [T, d] float32 | float64 | float16 | bfloat16.
        weight: [V, d], the output layer, in the hidden states' dtype.
        offsets: as in `entry_logprob`.
        token_ids: as in `entry_logprob`.
        temperature: > 0.
        backend: of the room dist_ppo.
        lse: as in `entry_logprob`.

    Returns:
        float64 [nnz]. Differentiable once, in hidden and weight.

    Raises:
        TypeError, ValueError, RuntimeError: as `linear_dist_ppo_loss`.
    """
    check = Check("linear_entry_logprob")
    check_layer(check, hidden, weight)
    temperature, lse = _check(
        check, hidden, len(weight), offsets, token_ids=token_ids, temperature=temperature, lse=lse
    )
    found: Tensor = _LinearEntries.apply(  # type: ignore[no-untyped-call]
        hidden, weight, offsets, token_ids, temperature, backend, lse
    )
    return found
