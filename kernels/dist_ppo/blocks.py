"""linear_dist_ppo in blocks of the vocabulary: one product a block, consumed before the next one is made.

What is done to a block is the backend's: a `Folded` takes logits in, a `Differentiate` turns them into their
gradient. In float64 both are plain torch, for every backend.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from prmfast.kernels.candidate_td.candidates import Candidates
from prmfast.kernels.dist_ppo import tuning
from prmfast.kernels.dist_ppo.reference import Rule, settle


class Spans(NamedTuple):
    """The entries begin[i] .. end[i] of the rows that take part, and which rows these are (None: all)."""

    begin: Tensor
    end: Tensor
    token_ids: Tensor
    rows: Tensor | None

    def of(self, tensor: Tensor) -> Tensor:
        """What belongs to the rows that take part."""
        return tensor if self.rows is None else tensor[self.rows]


class Folded(Protocol):
    """Blocks of logits that were taken in."""

    def add(self, block: Tensor, first: int) -> None:
        """Takes in logits [rows, columns], which may be lost; ``first`` is the token of column 0."""

    def settle(self, row_weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """After the last block: the loss [], log-sum-exp [rows] and d loss / d log pi of every entry [nnz]."""


Fold = Callable[[Candidates, Rule], Folded]
"""Begins with no block; the candidates are those of the rows that take part, at least one in each."""


class Differentiate(Protocol):
    """Logits [rows, columns] become d loss / d logits, in place; ``first`` is the token of column 0."""

    def __call__(
        self, block: Tensor, first: int, spans: Spans, *, lse: Tensor, coefficients: Tensor, temperature: float
    ) -> None:
        """lse [rows] of the rows that take part, coefficients [nnz] of all entries."""


class _Layer:
    """hidden @ weight.T in blocks of columns.

    Logits of half types are float32: rounded to a half type they would lose seven digits. A GPU multiplies half types
    as they are and adds in float32; a CPU multiplies them as float32, and so do both where a gradient is a factor.
    """

    def __init__(self, hidden: Tensor, weight: Tensor) -> None:
        self.dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        self.narrow = hidden.is_cuda and hidden.dtype != self.dtype
        self.hidden, self.weight = hidden if self.narrow else hidden.to(self.dtype), weight
        rows = max(len(hidden), 1)
        # with few rows it is the float32 copy of the weights, and the product for their gradient, that must stay small
        widest = max(rows, 2 * hidden.shape[1])
        self.step = max(tuning.LEAST_COLUMNS, min(len(weight), tuning.BLOCK_BYTES // (widest * self.dtype.itemsize)))
        self.memory = hidden.new_empty(rows * min(self.step, len(weight)), dtype=self.dtype)

    def blocks(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """First token, weights and logits of every block; none where no row takes part."""
        for first in range(0, len(self.weight) if len(self.hidden) else 0, self.step):
            part = self.weight[first : first + self.step].to(self.hidden.dtype)
            out = self.memory[: len(self.hidden) * len(part)].view(len(self.hidden), len(part))
            if self.narrow:
                torch.mm(self.hidden, part.T, out_dtype=self.dtype, out=out)
            else:
                torch.mm(self.hidden, part.T, out=out)
            yield first, part, out


def _within(spans: Spans, first: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """Row, column and number of the entries of a block."""
    counts = spans.end - spans.begin
    row = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
    entry = torch.arange(len(row), device=row.device) + (spans.begin - (counts.cumsum(0) - counts))[row]
    column = spans.token_ids[entry] - first
    inside = (column >= 0) & (column < columns)
    return row[inside], column[inside], entry[inside]


class _FoldedWide:
    """In float64: the log-sum-exp of the rows and the logits of the entries."""

    def __init__(self, candidates: Candidates, rule: Rule) -> None:
        offsets, token_ids = candidates[:2]
        self.candidates, self.rule = candidates, rule
        self.spans = Spans(offsets[:-1], offsets[1:], token_ids, None)
        self.lse = torch.full((len(offsets) - 1,), -torch.inf, dtype=torch.float64, device=offsets.device)
        self.entry_logits = self.lse.new_zeros(len(token_ids))

    def add(self, block: Tensor, first: int) -> None:
        row, column, entry = _within(self.spans, first, block.shape[1])
        self.entry_logits[entry] = block[row, column]
        self.lse = torch.logaddexp(self.lse, block.div_(self.rule.temperature).logsumexp(1))

    def settle(self, row_weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        loss, coefficients = settle(self.entry_logits, self.lse, self.candidates, row_weight, self.rule)
        return loss, self.lse, coefficients


def _differentiate_wide(
    block: Tensor, first: int, spans: Spans, *, lse: Tensor, coefficients: Tensor, temperature: float
) -> None:
    row, _, entry = _within(spans, 0, 2**62)
    total = torch.zeros_like(lse).index_add_(0, row, coefficients[entry])
    row, column, entry = _within(spans, first, block.shape[1])
    block.div_(temperature).sub_(lse[:, None]).exp_().mul_(-total[:, None])
    block.index_put_((row, column), coefficients[entry], accumulate=True)
    block.div_(temperature)


def forward(
    hidden: Tensor, weight: Tensor, candidates: Candidates, *, row_weight: Tensor, rule: Rule, fold: Fold
) -> tuple[Tensor, Tensor, Tensor]:
    """`reference.linear_dist_ppo`. Rows without candidates take no part in any product."""
    offsets = candidates.offsets
    rows = (offsets.diff() > 0).nonzero().squeeze(1)
    everyone = len(rows) == len(hidden)
    if not everyone:
        hidden, row_weight = hidden[rows], row_weight[rows]
        candidates = candidates._replace(offsets=torch.cat([offsets[rows], offsets[-1:]]))
    layer = _Layer(hidden, weight)
    folded = (_FoldedWide if layer.dtype == torch.float64 else fold)(candidates, rule)
    for first, _, block in layer.blocks():
        folded.add(block, first)
    loss, found, coefficients = folded.settle(row_weight)
    if everyone:
        return loss, found, coefficients
    return loss, found.new_zeros(len(offsets) - 1).index_copy_(0, rows, found), coefficients


def _moving(offsets: Tensor, token_ids: Tensor, coefficients: Tensor) -> Spans:
    """The rows with a coefficient that is not zero."""
    count = torch.cat([offsets.new_zeros(1), (coefficients != 0).cumsum(0)])
    begin, end = offsets[:-1], offsets[1:]
    rows = (count[end] > count[begin]).nonzero().squeeze(1)
    if len(rows) == len(begin):
        return Spans(begin.contiguous(), end.contiguous(), token_ids.contiguous(), None)
    return Spans(begin[rows], end[rows], token_ids.contiguous(), rows)


def backward(
    hidden: Tensor,
    weight: Tensor,
    offsets: Tensor,
    *,
    token_ids: Tensor,
    lse: Tensor,
    coefficients: Tensor,
    temperature: float,
    wanted: tuple[bool, bool],
    differentiate: Differentiate,
) -> tuple[Tensor, Tensor]:
    """`reference.linear_dist_ppo_backward`. Rows whose coefficients are all zero take no part in any product."""
    spans = _moving(offsets, token_ids, coefficients)
    layer = _Layer(spans.of(hidden), weight)
    if layer.dtype == torch.float64:
        differentiate = _differentiate_wide
    wide = layer.hidden.to(layer.dtype)
    lse, coefficients = spans.of(lse).contiguous(), coefficients.contiguous()
    d_hidden = wide.new_zeros(wide.shape if wanted[0] else (0,))
    d_weight = weight.new_empty(weight.shape if wanted[1] else (0,))
    if not len(wide):
        d_weight.zero_()
    for first, part, block in layer.blocks():
        differentiate(block, first, spans, lse=lse, coefficients=coefficients, temperature=temperature)
        if wanted[0]:
            d_hidden.addmm_(block, part.to(layer.dtype))
        if wanted[1]:
            into = d_weight[first : first + len(part)]
            if into.dtype == layer.dtype:
                torch.mm(block.T, wide, out=into)
            else:
                into.copy_(torch.mm(block.T, wide))
    if wanted[0] and spans.rows is not None:
        d_hidden = wide.new_zeros(hidden.shape).index_copy_(0, spans.rows, d_hidden)
    return d_hidden.to(hidden.dtype), d_weight
