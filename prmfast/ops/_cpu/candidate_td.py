"""Room candidate_td on the compiled CPU backend."""

from __future__ import annotations

import torch
from torch import Tensor

from prmfast.kernels.candidate_td import tuning
from prmfast.kernels.candidate_td.candidates import Candidates
from prmfast.kernels.candidate_td.reference import output_dtype, row_error
from prmfast.kernels.common.rows import contiguous_columns
from prmfast.ops._cpu._extension import _C

__all__ = ["candidate_td", "linear_candidate_td", "token_logprob", "token_logprob_backward"]

_CODE = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


def _view(logits: Tensor) -> tuple[int, int, int]:
    """Pointer, dtype code, row stride."""
    return logits.data_ptr(), _CODE[logits.dtype], logits.stride(0)


def _ids(ids: Tensor | None) -> tuple[Tensor | None, int]:
    held = None if ids is None else ids.contiguous()
    return held, 0 if held is None else held.data_ptr()


def _collect(op: str, result: object, rows: int, like: Tensor, dtype: torch.dtype) -> Candidates:
    invalid = result.invalid()  # type: ignore[attr-defined]
    if invalid is not None:
        row, policy, kind = invalid
        raise row_error(op, "policy_logits" if policy else "reward_logits", kind, row)
    entries = result.entries()  # type: ignore[attr-defined]
    offsets, token_ids = (like.new_empty(n, dtype=torch.int64) for n in (rows + 1, entries))
    logp, advantage = (like.new_empty(entries, dtype=dtype) for _ in range(2))
    write = getattr(result, "write_f64" if dtype == torch.float64 else "write_f32")
    write(offsets.data_ptr(), token_ids.data_ptr(), logp.data_ptr(), advantage.data_ptr())
    return Candidates(offsets, token_ids, logp, advantage)


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
    """See the reference."""
    dtype = output_dtype(policy_logits, reward_logits)
    if dtype == torch.float64:  # beside a float64 side, the other one is summed in float64 too
        policy_logits, reward_logits = policy_logits.double(), reward_logits.double()
    policy, reward = contiguous_columns(policy_logits), contiguous_columns(reward_logits)
    _held, ids = _ids(sampled)
    options = _C.candidate_td.Options(p_min, beta, policy_temperature, reward_temperature)
    result = _C.candidate_td.run(*_view(policy), *_view(reward), *policy.shape, options, ids, torch.get_num_threads())
    return _collect("candidate_td", result, len(policy), policy, dtype)


class _Side:
    """One side of the linear variant: blocks of its logits, in buffers that are made once.

    Half types are widened block by block and multiplied in float32: exact products, float32 sums, and as fast as
    anything on a CPU without matrix units for them, where torch's bfloat16 product takes several times as long.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, rows: int, columns: int, dtype: torch.dtype) -> None:
        self.hidden, self.weight = hidden, weight
        self._logits = hidden.new_empty(rows * columns, dtype=dtype)
        widen = hidden.dtype != dtype
        self._hidden = hidden.new_empty(rows, hidden.shape[1], dtype=dtype) if widen else None
        self._weight = weight.new_empty(columns, weight.shape[1], dtype=dtype) if widen else None

    def columns(self, first: int, end: int) -> None:
        """The block of the weight that the next logits are made of."""
        block = self.weight[first:end]
        self._columns = block if self._weight is None else self._weight[: end - first].copy_(block)

    def logits(self, first: int, end: int) -> Tensor:
        """Logits of these rows and the current columns, until the next call."""
        block = self.hidden[first:end]
        rows = block if self._hidden is None else self._hidden[: end - first].copy_(block)
        shape = (len(rows), len(self._columns))
        return torch.mm(rows, self._columns.t(), out=self._logits[: shape[0] * shape[1]].view(shape))


def linear_candidate_td(
    policy_hidden: Tensor,
    reward_hidden: Tensor,
    *,
    policy_weight: Tensor,
    reward_weight: Tensor,
    p_min: float,
    beta: float,
    sampled: Tensor | None,
    policy_temperature: float,
    reward_temperature: float,
) -> Candidates:
    """See the reference."""
    rows, columns = len(policy_hidden), len(policy_weight)
    dtype = output_dtype(policy_hidden, reward_hidden)
    most = max(1, tuning.WIDENED_ELEMENTS // max(1, policy_hidden.shape[1], reward_hidden.shape[1]))
    row_step, column_step = max(1, min(rows, tuning.BLOCK_ROWS, most)), min(columns, tuning.BLOCK_COLUMNS, most)
    policy = _Side(policy_hidden, policy_weight, row_step, column_step, dtype)
    reward = _Side(reward_hidden, reward_weight, row_step, column_step, dtype)
    _held, ids = _ids(sampled)
    options = _C.candidate_td.Options(p_min, beta, policy_temperature, reward_temperature)
    state = _C.candidate_td.Rows(rows, options, ids)
    threads = torch.get_num_threads()
    for column in range(0, columns, column_step):
        end_column = min(column + column_step, columns)
        policy.columns(column, end_column)
        reward.columns(column, end_column)
        for row in range(0, rows, row_step):
            end_row = min(row + row_step, rows)
            blocks = policy.logits(row, end_row), reward.logits(row, end_row)
            state.add(*_view(blocks[0]), *_view(blocks[1]), row, end_row - row, column, end_column - column, threads)
    return _collect("linear_candidate_td", state.finish(), rows, policy_hidden, dtype)


def token_logprob(logits: Tensor, ids: Tensor, *, temperature: float) -> tuple[Tensor, Tensor]:
    """See the reference."""
    held, held_ids = contiguous_columns(logits), ids.contiguous()
    logp, norm = held.new_empty(len(held), dtype=torch.float64), held.new_empty(len(held), 2, dtype=torch.float64)
    outputs = (held_ids.data_ptr(), logp.data_ptr(), norm.data_ptr())
    invalid = _C.candidate_td.token_logprob(*_view(held), *held.shape, temperature, *outputs, torch.get_num_threads())
    if invalid is not None:
        raise row_error("token_logprob", "logits", invalid[2], invalid[0])
    return logp.to(output_dtype(logits)), norm


def token_logprob_backward(grad: Tensor, logits: Tensor, ids: Tensor, norm: Tensor, *, temperature: float) -> Tensor:
    """See the reference."""
    held, held_ids = contiguous_columns(logits), ids.contiguous()
    weight, norms = grad.double().contiguous(), norm.contiguous()
    out = held.new_empty(held.shape)
    pointers = (held_ids.data_ptr(), norms.data_ptr(), weight.data_ptr(), out.data_ptr())
    _C.candidate_td.token_logprob_backward(*_view(held), *held.shape, temperature, *pointers, torch.get_num_threads())
    return out
