"""`linear_candidate_td` in Triton: products by torch.mm in blocks, and what a row keeps of them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from prmfast.kernels.candidate_td import reference, triton_kernels, tuning
from prmfast.kernels.candidate_td.candidates import Candidates
from prmfast.kernels.candidate_td.triton_forms import Form, forced_ids, raise_fault, scale
from prmfast.kernels.common.launch import Variant, check_device


@dataclass(frozen=True)
class _Block:
    """Logits of some rows and columns of both sides, float32, overwritten when the next block is made."""

    first_row: int
    first_column: int
    policy: Tensor
    reward: Tensor


@dataclass(frozen=True)
class _Products:
    """hidden [T, d] @ weight [V, d]^T of both sides."""

    policy_hidden: Tensor
    reward_hidden: Tensor
    policy_weight: Tensor
    reward_weight: Tensor

    def blocks(self) -> Iterator[_Block]:
        """All rows, then the next columns: a block of weights serves all rows while the cache holds it."""
        rows, columns = len(self.policy_hidden), len(self.policy_weight)
        row_step, column_step = min(rows, tuning.PRODUCT_ROWS), min(columns, tuning.PRODUCT_COLUMNS)
        scratch = self.policy_hidden.new_empty(2, row_step * column_step, dtype=torch.float32)
        for column in range(0, columns, column_step):
            some = slice(column, column + column_step)
            weights = self.policy_weight[some].t(), self.reward_weight[some].t()
            for row in range(0, rows, row_step):
                some = slice(row, row + row_step)
                hidden = self.policy_hidden[some], self.reward_hidden[some]
                yield _Block(row, column, *map(_product, hidden, weights, scratch))


def _product(hidden: Tensor, weight: Tensor, scratch: Tensor) -> Tensor:
    """hidden [n, d] @ weight [d, m] in float32; products of half types are summed in float32 and never rounded."""
    shape = len(hidden), weight.shape[1]
    out = scratch[: shape[0] * shape[1]].view(shape)
    if hidden.dtype == torch.float32:
        return torch.mm(hidden, weight, out=out)
    if hidden.is_cuda and torch.version.hip is None:
        return torch.mm(hidden, weight, out_dtype=torch.float32, out=out)
    return torch.mm(hidden.float(), weight.float(), out=out)


class _State:
    """What rows know after some of their columns (`fold_block_kernel`): read by one launch, written by the next."""

    def __init__(self, rows: int, slots: int, device: torch.device) -> None:
        self.totals = torch.zeros(rows, 4, dtype=torch.float64, device=device)
        self.totals[:, ::2] = -math.inf
        self.counts = torch.zeros(rows, dtype=torch.int32, device=device)
        self.ids = torch.empty(rows, slots, dtype=torch.int64, device=device)
        self.policy, self.reward = torch.empty(2, rows, slots, device=device)

    def tensors(self) -> tuple[Tensor, ...]:
        return self.totals, self.counts, self.ids, self.policy, self.reward


def _form(slots: int) -> Form:
    return Form(
        triton_kernels.fold_block_kernel, {"COLUMNS": tuning.PRODUCT_COLUMNS, "SLOTS": slots}, tuning.FOLD_WARPS
    )


def _folded(
    products: _Products, sampled: Tensor, slots: int, log_p_min: float, temperatures: tuple[float, float]
) -> tuple[_State, Tensor]:
    """The state of all rows after all columns, and both logits of the sampled tokens [T, 2]."""
    rows, device = len(sampled), sampled.device
    old, new = (_State(rows, slots, device) for _ in range(2))
    forced = torch.empty(rows, 2, device=device)
    for block in products.blocks():
        if block.first_row == 0:
            old, new = new, old
        shape = block.policy.stride(0), block.first_row, block.first_column, block.policy.shape[1]
        options = sampled, *map(scale, temperatures), 1 / temperatures[0], log_p_min
        _form(slots).launch(
            len(block.policy), block.policy, block.reward, *shape, *options, *old.tensors(), *new.tensors(), forced
        )
    return new, forced


@dataclass(frozen=True)
class _Side:
    """The softmax of one side, float64 [T]: log p = (x - peak) inverse - log_sum."""

    peak: Tensor
    log_sum: Tensor
    inverse: float

    def log_p(self, row: Tensor, x: Tensor) -> Tensor:
        """Of logits [n] of the rows [n]."""
        return (x.double() - self.peak[row]) * self.inverse - self.log_sum[row]

    def need(self, log_p_min: float) -> Tensor:
        """What x - peak has to reach."""
        return (log_p_min + self.log_sum) / self.inverse


_Entries = tuple[Tensor, ...]
"""Of some candidates: row, id int64, logit of the policy, of the reward model float32, all [n]."""


def _survivors(state: _State, policy: _Side, log_p_min: float) -> _Entries:
    held = torch.arange(state.ids.shape[1], device=state.ids.device) < state.counts[:, None]
    passing = state.policy.double() - policy.peak[:, None] >= policy.need(log_p_min)[:, None]
    row, slot = (held & passing).nonzero(as_tuple=True)
    return row, state.ids[row, slot], state.policy[row, slot], state.reward[row, slot]


def _second_pass(products: _Products, policy: _Side, log_p_min: float) -> _Entries:
    """The candidates from the same products once more, now that the softmax is known: as many as there are."""
    parts: list[_Entries] = []
    need = policy.need(log_p_min)
    for block in products.blocks():
        some = slice(block.first_row, block.first_row + len(block.policy))
        passing = block.policy.double() - policy.peak[some, None] >= need[some, None]
        row, column = passing.nonzero(as_tuple=True)
        parts.append(
            (row + block.first_row, column + block.first_column, block.policy[row, column], block.reward[row, column])
        )
    return tuple(map(torch.cat, zip(*parts, strict=True)))


def _compressed(
    entries: _Entries, policy: _Side, reward: _Side, beta: float, forced: _Entries | None, columns: int
) -> Candidates:
    """``entries`` in any order and one of ``forced`` per row, as compressed rows by increasing id."""
    if forced is not None:
        others = entries[1] != forced[1][entries[0]]
        entries = tuple(torch.cat([e[others], f]) for e, f in zip(entries, forced, strict=True))
    order = (entries[0] * columns + entries[1]).argsort()
    row, token, x, y = (e[order] for e in entries)
    logp, logq = policy.log_p(row, x), reward.log_p(row, y)
    difference = torch.where(logp == logq, 0.0, logq - logp)
    offsets = torch.searchsorted(row, torch.arange(len(policy.peak) + 1, device=row.device))
    return Candidates(offsets, token, logp.float(), (beta * difference).float())


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
    if reference.output_dtype(policy_hidden, reward_hidden) == torch.float64:
        return reference.linear_candidate_td(
            policy_hidden,
            reward_hidden,
            policy_weight=policy_weight,
            reward_weight=reward_weight,
            p_min=p_min,
            beta=beta,
            sampled=sampled,
            policy_temperature=policy_temperature,
            reward_temperature=reward_temperature,
        )
    check_device((policy_hidden, reward_hidden, policy_weight, reward_weight))
    rows, columns = len(policy_hidden), len(policy_weight)
    if rows == 0:
        none = policy_hidden.new_empty(0, dtype=torch.float32)
        return Candidates(none.new_zeros(1, dtype=torch.int64), none.long(), none, none.clone())
    products = _Products(policy_hidden, reward_hidden, policy_weight, reward_weight)
    ids, temperatures = forced_ids(sampled, policy_hidden), (policy_temperature, reward_temperature)
    log_p_min, slots = math.log(p_min) - reference.TOUCH, _slots(p_min)
    state, logits = _folded(products, ids, slots or 2, log_p_min if slots else math.inf, temperatures)
    logs = state.totals[:, 1::2].log()
    if not bool(logs.isfinite().all()):
        raise_fault("linear_candidate_td", policy_logits=logs[:, 0], reward_logits=logs[:, 1])
    policy, reward = (_Side(state.totals[:, 2 * i], logs[:, i], 1 / temperatures[i]) for i in range(2))
    entries = _survivors(state, policy, log_p_min) if slots else _second_pass(products, policy, log_p_min)
    forced = None if sampled is None else (torch.arange(rows, device=ids.device), ids, *logits.unbind(1))
    return _compressed(entries, policy, reward, beta, forced, columns)


def _slots(p_min: float) -> int:
    """Room for all that reach p_min (1 - TOUCH) of a running total, itself right to 1e-5; 0 where that is too much."""
    most = 1.0001 / p_min
    return 0 if most >= tuning.SLOTS else 1 << max(1, math.floor(most).bit_length())


def variants() -> Iterator[Variant]:
    """Everything that the linear variant launches."""
    floats = ("policy", "reward", "slot_policy", "slot_reward", "new_policy", "new_reward", "forced_logits")
    known = dict.fromkeys(floats, "*fp32") | dict.fromkeys(("sampled", "slot_ids", "new_ids"), "*i64")
    known |= {"totals": "*fp64", "new_totals": "*fp64", "counts": "*i32", "new_counts": "*i32"}
    known |= {"stride": "i64"} | dict.fromkeys(("first_row", "first_column", "columns"), "i32")
    known |= {"policy_scale": "fp32", "reward_scale": "fp32", "policy_inverse": "fp64", "log_p_min": "fp64"}
    slots = 2
    while slots <= tuning.SLOTS:
        yield _form(slots).variant(known)
        slots *= 2
