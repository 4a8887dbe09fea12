"""Room candidate_td on the compiled CUDA backend: float32, bfloat16 and float16 logits, p_min of at least 1 / 15.

The linear variant is the reference's: no call of it is resolved to this backend.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from prmfast.kernels.candidate_td.candidates import Candidates
from prmfast.kernels.candidate_td.reference import linear_candidate_td, output_dtype, row_error
from prmfast.kernels.common.rows import contiguous_columns
from prmfast.ops._cuda._extension import _C, stream_of

__all__ = ["candidate_td", "linear_candidate_td", "padded", "token_logprob", "token_logprob_backward"]

_CODE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_POLICY_FAULT = -1


class Padded(NamedTuple):
    """Rows in slots by increasing id; a slot that is not taken holds id -1 and log-probability -inf.

    token_ids: int32 [T, SLOTS]. policy_logp, advantage: float32 [T, SLOTS].
    counts: int32 [T], how many slots are taken; -1 where the policy's logits of a row have no softmax, -2 where the
    reward model's have none.
    """

    token_ids: Tensor
    policy_logp: Tensor
    advantage: Tensor
    counts: Tensor


def _view(logits: Tensor) -> tuple[int, int, int]:
    """Pointer, dtype code, row stride."""
    return logits.data_ptr(), _CODE[logits.dtype], logits.stride(0)


def _workspace(logits: Tensor, sides: int) -> Tensor:
    size = sides * _C.cuda.candidate_td.workspace_bytes(*logits.shape)
    return torch.empty(size, dtype=torch.uint8, device=logits.device)


def padded(
    policy_logits: Tensor,
    reward_logits: Tensor,
    *,
    p_min: float,
    beta: float,
    sampled: Tensor | None,
    policy_temperature: float,
    reward_temperature: float,
) -> Padded:
    """Of logits [T, V], float32, bfloat16 or float16 each, in three launches that wait for nothing.

    Once a workspace is warm in torch's allocator this can be captured into a CUDA graph.
    """
    policy, reward = contiguous_columns(policy_logits), contiguous_columns(reward_logits)
    rows, device = len(policy), policy.device
    slots = (rows, _C.cuda.candidate_td.SLOTS)
    found = Padded(
        torch.empty(slots, dtype=torch.int32, device=device),
        torch.empty(slots, dtype=torch.float32, device=device),
        torch.empty(slots, dtype=torch.float32, device=device),
        torch.empty(rows, dtype=torch.int32, device=device),
    )
    workspace = _workspace(policy, 2)
    forced = None if sampled is None else sampled.contiguous()
    with stream_of(policy) as stream:
        _C.cuda.candidate_td.candidates(
            *_view(policy),
            *_view(reward),
            *policy.shape,
            *(p_min, beta, policy_temperature, reward_temperature),
            0 if forced is None else forced.data_ptr(),
            workspace.data_ptr(),
            *(field.data_ptr() for field in found),
            stream,
        )
    return found


def _fault(logits: Tensor, row: int, op: str, name: str) -> ValueError:
    x = logits[row]
    kind = "NaN" if bool(x.isnan().any()) else "+inf" if bool((x == torch.inf).any()) else "only -inf"
    return row_error(op, name, kind, row)


def candidate_td(
    policy_logits: Tensor,
    reward_logits: Tensor,
    *,
    p_min: float,
    beta: float,
    sampled: Tensor | None,
    policy_temperature: float,
    reward_temperature: float,
) -> Candidates:
    """See the reference. One wait for the device: the number of candidates."""
    found = padded(
        policy_logits,
        reward_logits,
        p_min=p_min,
        beta=beta,
        sampled=sampled,
        policy_temperature=policy_temperature,
        reward_temperature=reward_temperature,
    )
    rows, device = len(found.counts), found.counts.device
    offsets = torch.zeros(rows + 1, dtype=torch.int64, device=device)
    torch.cumsum(found.counts, 0, out=offsets[1:])
    least, entries = torch.stack([found.counts.amin().long(), offsets[-1]]).tolist() if rows else (0, 0)
    if least < 0:
        row = int((found.counts < 0).nonzero()[0])
        if int(found.counts[row]) == _POLICY_FAULT:
            raise _fault(policy_logits, row, "candidate_td", "policy_logits")
        raise _fault(reward_logits, row, "candidate_td", "reward_logits")
    out = Candidates(
        offsets,
        torch.empty(entries, dtype=torch.int64, device=device),
        torch.empty(entries, dtype=torch.float32, device=device),
        torch.empty(entries, dtype=torch.float32, device=device),
    )
    with stream_of(offsets) as stream:
        pointers = [field.data_ptr() for field in found]
        _C.cuda.candidate_td.compact(*pointers, rows, *(field.data_ptr() for field in out), stream)
    return out


def token_logprob(logits: Tensor, ids: Tensor, *, temperature: float) -> tuple[Tensor, Tensor]:
    """See the reference."""
    held, held_ids = contiguous_columns(logits), ids.contiguous()
    logp = torch.empty(len(held), dtype=output_dtype(held), device=held.device)
    norm = torch.empty(len(held), 2, dtype=torch.float64, device=held.device)
    workspace = _workspace(held, 1)
    pointers = (held_ids.data_ptr(), workspace.data_ptr(), logp.data_ptr(), norm.data_ptr())
    with stream_of(held) as stream:
        _C.cuda.candidate_td.token_logprob(*_view(held), *held.shape, temperature, *pointers, stream)
    bad = ~norm[:, 1].isfinite()
    if bool(bad.any()):
        raise _fault(logits, int(bad.nonzero()[0]), "token_logprob", "logits")
    return logp, norm


def token_logprob_backward(grad: Tensor, logits: Tensor, ids: Tensor, norm: Tensor, *, temperature: float) -> Tensor:
    """See the reference."""
    held, held_ids = contiguous_columns(logits), ids.contiguous()
    weight, norms = grad.double().contiguous(), norm.contiguous()
    out = torch.empty(held.shape, dtype=held.dtype, device=held.device)
    pointers = (held_ids.data_ptr(), norms.data_ptr(), weight.data_ptr(), out.data_ptr())
    with stream_of(held) as stream:
        _C.cuda.candidate_td.token_logprob_backward(*_view(held), *held.shape, temperature, *pointers, stream)
    return out
