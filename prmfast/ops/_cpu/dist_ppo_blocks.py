"""linear_dist_ppo in blocks of the vocabulary: one product a block, consumed before the next one is made."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from prmfast.kernels.candidate_td.candidates import Candidates
from prmfast.kernels.dist_ppo import tuning
from prmfast.kernels.dist_ppo.reference import Rule, settle
from prmfast.ops._cpu._extension import _C

_ALL = 2**62


class _Spans(NamedTuple):
    """The entries begin[i] .. end[i] of the rows that take part, and which rows these are (None: all)."""

    begin: Tensor
    end: Tensor
    token_ids: Tensor
    rows: Tensor | None

    def addresses(self) -> tuple[int, int, int]:
        return self.begin.data_ptr(), self.end.data_ptr(), self.token_ids.data_ptr()

    def of(self, tensor: Tensor) -> Tensor:
        return tensor if self.rows is None else tensor[self.rows]


def _taking_part(offsets: Tensor, token_ids: Tensor, wanted: Tensor) -> _Spans:
    rows = None if bool(wanted.all()) else wanted.nonzero().squeeze(1)
    begin, end = offsets[:-1], offsets[1:]
    if rows is not None:
        begin, end = begin[rows], end[rows]
    return _Spans(begin.contiguous(), end.contiguous(), token_ids.contiguous(), rows)


class _Layer:
    """hidden @ weight.T in blocks of columns.

    The half types are multiplied as float32: their products would be rounded to a half type, which costs the logits
    seven digits, and on a CPU without matrix instructions for them they are slower besides.
    """

    def __init__(self, hidden: Tensor, weight: Tensor) -> None:
        self.dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        self.hidden, self.weight = hidden.to(self.dtype), weight
        rows = max(len(hidden), 1)
        # with few rows it is the float32 copy of the weights, and the product for their gradient, that must stay small
        widest = max(rows, 2 * hidden.shape[1])
        self.step = max(
            tuning.LEAST_COLUMNS, min(len(weight), tuning.BLOCK_BYTES // (widest * self.hidden.element_size()))
        )
        self.memory = hidden.new_empty(rows * min(self.step, len(weight)), dtype=self.dtype)

    def firsts(self) -> range:
        return range(0, len(self.weight), self.step)

    def part(self, first: int) -> Tensor:
        return self.weight[first : first + self.step].to(self.dtype)

    def block(self, part: Tensor) -> Tensor:
        out = self.memory[: len(self.hidden) * len(part)].view(len(self.hidden), len(part))
        return torch.mm(self.hidden, part.T, out=out)


def _view(block: Tensor) -> tuple[int, int, int, int]:
    return block.data_ptr(), *block.shape, block.stride(0)


def _within(spans: _Spans, first: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """Row, column and number of the entries of a block."""
    counts = spans.end - spans.begin
    row = torch.repeat_interleave(torch.arange(len(counts)), counts)
    entry = torch.arange(len(row)) + (spans.begin - (counts.cumsum(0) - counts))[row]
    column = spans.token_ids[entry] - first
    inside = (column >= 0) & (column < columns)
    return row[inside], column[inside], entry[inside]


class _Absorbed:
    """Log-sum-exp of the rows and logits of the entries, block by block."""

    def __init__(self, layer: _Layer, spans: _Spans, temperature: float) -> None:
        rows = len(layer.hidden)
        self.spans, self.temperature, self.wide = spans, temperature, layer.dtype == torch.float64
        self.reference = torch.full((rows,), -torch.inf if self.wide else 0.0, dtype=torch.float64)
        self.sum = torch.zeros(rows, dtype=torch.float64)
        self.entry_logits = torch.zeros(len(spans.token_ids), dtype=layer.dtype)

    def add(self, block: Tensor, first: int) -> None:
        if self.wide:  # the reference is the log-sum-exp itself
            row, column, entry = _within(self.spans, first, block.shape[1])
            self.entry_logits[entry] = block[row, column]
            self.reference = torch.logaddexp(self.reference, block.div_(self.temperature).logsumexp(1))
            return
        held = self.reference.data_ptr(), self.sum.data_ptr(), self.entry_logits.data_ptr()
        _C.dist_ppo.absorb_block(
            _view(block), first, self.spans.addresses(), self.temperature, *held, torch.get_num_threads()
        )

    def finish(self) -> Tensor:
        """Log-sum-exp of the rows."""
        if self.wide:
            return self.reference
        lse = torch.empty(len(self.sum), dtype=torch.float64)
        held = self.reference.data_ptr(), self.sum.data_ptr(), len(lse)
        entry_logits = self.entry_logits.data_ptr()
        _C.dist_ppo.finish_blocks(*held, self.spans.addresses(), entry_logits, self.temperature, lse.data_ptr())
        return lse


def linear_dist_ppo(
    hidden: Tensor, weight: Tensor, candidates: Candidates, *, row_weight: Tensor, rule: Rule
) -> tuple[Tensor, Tensor, Tensor]:
    """See the reference. Rows without candidates take no part in any product."""
    spans = _taking_part(candidates.offsets, candidates.token_ids, candidates.offsets.diff() > 0)
    layer = _Layer(spans.of(hidden), weight)
    absorbed = _Absorbed(layer, spans, rule.temperature)
    if len(layer.hidden):
        for first in layer.firsts():
            absorbed.add(layer.block(layer.part(first)), first)
    lse = torch.zeros(len(hidden), dtype=torch.float64)
    lse[... if spans.rows is None else spans.rows] = absorbed.finish()
    loss, coefficients = settle(absorbed.entry_logits, lse, candidates, row_weight, rule)
    return loss, lse, coefficients


def _differentiate(
    block: Tensor, first: int, spans: _Spans, *, lse: Tensor, coefficients: Tensor, temperature: float
) -> None:
    """The block of logits becomes its part of d loss / d logits."""
    if block.dtype == torch.float64:
        every, _, number = _within(spans, 0, _ALL)
        total = torch.zeros_like(lse).index_add_(0, every, coefficients[number])
        row, column, entry = _within(spans, first, block.shape[1])
        block.div_(temperature).sub_(lse[:, None]).exp_().mul_(-total[:, None])
        block.index_put_((row, column), coefficients[entry], accumulate=True)
        block.div_(temperature)
        return
    held = lse.data_ptr(), coefficients.data_ptr()
    _C.dist_ppo.differentiate_block(_view(block), first, spans.addresses(), *held, temperature, torch.get_num_threads())


def linear_dist_ppo_backward(
    hidden: Tensor,
    weight: Tensor,
    offsets: Tensor,
    *,
    token_ids: Tensor,
    lse: Tensor,
    coefficients: Tensor,
    temperature: float,
    wanted: tuple[bool, bool],
) -> tuple[Tensor, Tensor]:
    """See the reference. Rows whose coefficients are all zero (clipped, or no candidates) take no part."""
    moving = torch.cat([offsets.new_zeros(1), (coefficients != 0).cumsum(0)])
    spans = _taking_part(offsets, token_ids, moving[offsets[1:]] > moving[offsets[:-1]])
    layer = _Layer(spans.of(hidden), weight)
    state = {"lse": spans.of(lse).contiguous(), "coefficients": coefficients.contiguous()}
    d_hidden = torch.zeros(layer.hidden.shape if wanted[0] else (0,), dtype=layer.dtype)
    d_weight = torch.empty(weight.shape if wanted[1] else (0,), dtype=weight.dtype)
    if not len(layer.hidden):
        d_weight.zero_()
    for first in layer.firsts() if len(layer.hidden) else ():
        part = layer.part(first)
        block = layer.block(part)
        _differentiate(block, first, spans, temperature=temperature, **state)
        if wanted[0]:
            d_hidden.addmm_(block, part)
        if wanted[1]:
            into = d_weight[first : first + layer.step]
            if into.dtype == layer.dtype:
                torch.mm(block.T, layer.hidden, out=into)
            else:
                into.copy_(torch.mm(block.T, layer.hidden))
    if wanted[0] and spans.rows is not None:
        d_hidden = torch.zeros(hidden.shape, dtype=layer.dtype).index_copy_(0, spans.rows, d_hidden)
    return d_hidden.to(hidden.dtype), d_weight
