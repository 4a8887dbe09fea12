"""Stored samples by question, and what drawing n of them without replacement gives."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from prmfast.ias._aggregate import aggregate_score

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True)
class Outcomes:
    """By question and by n = 0..S samples drawn: P(any is right), and P(the highest scored is right).

    Both [Q, S + 1] float64, ``best`` None without scores; beyond a question's own pool they stay as at its size.
    """

    success: Tensor
    best: Tensor | None


@dataclass(frozen=True)
class ReplayPool:
    """Stored samples of Q (question, policy) pairs, at most S each.

    | field | shape | meaning |
    | --- | --- | --- |
    | question | Q strings | bootstrap goes by these |
    | policy | Q strings | who answered |
    | size | [Q] int64 | samples of this pair, >= 1; the slots behind are padding |
    | correct | [Q, S] bool | |
    | score | [Q, S] float64 or None | uncalibrated final score, for best-of-N |
    """

    question: tuple[str, ...]
    policy: tuple[str, ...]
    size: Tensor
    correct: Tensor
    score: Tensor | None = None

    def __post_init__(self) -> None:
        rows = len(self.question)
        if rows == 0:
            raise ValueError("a pool must have at least 1 question, got 0")
        if self.correct.dtype != torch.bool or self.correct.ndim != 2 or self.correct.shape[0] != rows:
            raise ValueError(
                f"correct must be bool of shape ({rows}, S), got {self.correct.dtype} {tuple(self.correct.shape)}"
            )
        if len(self.policy) != rows or tuple(self.size.shape) != (rows,):
            raise ValueError(
                f"policy and size must have {rows} entries, got {len(self.policy)} and {tuple(self.size.shape)}"
            )
        if bool(((self.size < 1) | (self.size > self.correct.shape[1])).any()):
            raise ValueError(
                f"size must lie in [1, {self.correct.shape[1]}], got {self.size.min()} to {self.size.max()}"
            )
        if self.score is not None:
            if self.score.shape != self.correct.shape:
                raise ValueError(f"score must have shape {tuple(self.correct.shape)}, got {tuple(self.score.shape)}")
            if bool((torch.isnan(self.score) & self.filled).any()):
                raise ValueError("score must not be NaN")

    def __len__(self) -> int:
        return len(self.question)

    @property
    def filled(self) -> Tensor:
        """[Q, S] bool: slots that hold a sample."""
        return torch.arange(self.correct.shape[1]) < self.size[:, None]

    @property
    def truth(self) -> Tensor:
        """[Q] float64: share of right answers among all of a question's samples."""
        return (self.correct & self.filled).sum(1).double() / self.size.double()

    @classmethod
    def from_table(
        cls,
        table: pa.Table | str | os.PathLike[str],
        *,
        policy_id: str | None = None,
        aggregate: str = "last",
        scored: bool | None = None,
    ) -> ReplayPool:
        """The samples of a trace table or parquet file (schema: `prmfast.traces`) whose ``correct`` is known.

        Args:
            table: the traces. policy_id: only this policy's.
            aggregate: final score from the step scores: "last" | "min" | "product" | "mean".
            scored: True keeps scored samples only; False leaves scores out; None uses them if every sample has one.

        Questions stand in the order of their first row. ValueError where no row is left.
        """
        rows = [row for row in _read(table) if policy_id is None or row[1] == policy_id]
        if scored:
            rows = [row for row in rows if row[3] is not None]
        if not rows:
            raise ValueError(f"no {'scored ' if scored else ''}sample with known correctness (policy_id={policy_id!r})")
        use_scores = scored is not False and all(row[3] is not None for row in rows)
        groups: dict[tuple[str, str], list[tuple[bool, float]]] = {}
        for question, policy, correct, steps in rows:
            groups.setdefault((question, policy), []).append(
                (correct, aggregate_score(steps or (), aggregate) if use_scores else 0.0)
            )
        most = max(map(len, groups.values()))
        correct_ = torch.zeros(len(groups), most, dtype=torch.bool)
        score_ = torch.zeros(len(groups), most, dtype=torch.float64)
        for i, group in enumerate(groups.values()):
            correct_[i, : len(group)] = torch.tensor([c for c, _ in group])
            score_[i, : len(group)] = torch.tensor([s for _, s in group], dtype=torch.float64)
        names = list(groups)
        sizes = torch.tensor([len(group) for group in groups.values()])
        return cls(
            tuple(q for q, _ in names), tuple(p for _, p in names), sizes, correct_, score_ if use_scores else None
        )

    def exact(self) -> Outcomes:
        """Expectations over all subsets: hypergeometric for the success, by ranks for the best; nothing is drawn."""
        slots = self.correct.shape[1]
        size = self.size.double()[:, None]
        wrong = size - (self.correct & self.filled).sum(1, keepdim=True)
        j = torch.arange(slots, dtype=torch.float64)
        # P(n wrong ones) = prod_{j<n} (wrong - j) / (size - j)
        ratio = torch.where(self.filled, (wrong - j).clamp(min=0) / (size - j).clamp(min=1), 1.0)
        success = torch.cat([torch.zeros_like(size), 1 - ratio.cumprod(1)], 1)
        if self.score is None:
            return Outcomes(success, None)
        right = self._right_by_rank()
        best = torch.zeros_like(success)
        for n in range(1, slots + 1):
            drawn = size.clamp(max=n)
            # P(none of the r best is drawn) = prod_{j<r} (size - n - j) / (size - j); its steps: P(r is the best drawn)
            none = (((size - drawn - j).clamp(min=0) / (size - j).clamp(min=1)) * self.filled).cumprod(1)
            before = torch.cat([torch.ones_like(size), none[:, :-1]], 1)
            best[:, n] = ((before - none) * right).sum(1)
        return Outcomes(success, best)

    def sampled(self, trials: int, seed: int) -> Outcomes:
        """Means over ``trials`` random orders of every pool; the first n of an order are what a budget of n draws."""
        generator = torch.Generator().manual_seed(seed)
        slots = self.correct.shape[1]
        success = torch.zeros(len(self), slots + 1, dtype=torch.float64)
        best = torch.zeros_like(success)
        place = torch.arange(slots)
        for _ in range(trials):
            keys = torch.rand(len(self), slots, generator=generator).masked_fill_(~self.filled, 2.0)
            order = keys.argsort(1)
            right = (self.correct & self.filled).gather(1, order)
            success[:, 1:] += right.int().cummax(1).values
            if self.score is not None:
                score = self.score.masked_fill(~self.filled, -torch.inf).gather(1, order)
                highest = score.cummax(1).values
                earlier = torch.cat([torch.full_like(highest[:, :1], -torch.inf), highest[:, :-1]], 1)
                leads = torch.where(score > earlier, place, 0).cummax(1).values  # the first among equals stays
                best[:, 1:] += right.gather(1, leads)
        return Outcomes(success / trials, None if self.score is None else best / trials)

    def _right_by_rank(self) -> Tensor:
        """[Q, S]: right answers by falling score; equal scores share their mean, as any of them may be drawn first."""
        assert self.score is not None
        score, order = self.score.masked_fill(~self.filled, -torch.inf).sort(1, descending=True)
        right = (self.correct & self.filled).gather(1, order).double()
        starts = torch.cat([torch.zeros(len(self), 1, dtype=torch.int64), (score[:, 1:] < score[:, :-1]).long()], 1)
        group = starts.cumsum(1)
        zeros = torch.zeros_like(right)
        filled = self.filled.double()
        mean = zeros.scatter_add(1, group, right * filled) / zeros.scatter_add(1, group, filled).clamp(min=1)
        return mean.gather(1, group) * filled


def _read(table: Any) -> Iterator[tuple[str, str, bool, list[float] | None]]:
    from prmfast.traces import read_traces, validate

    checked = read_traces(table) if isinstance(table, (str, os.PathLike)) else validate(table)
    rows = checked.num_rows
    steps = (
        checked.column("prm_step_scores").to_pylist() if "prm_step_scores" in checked.column_names else [None] * rows
    )
    names = (checked.column(name).to_pylist() for name in ("question_id", "policy_id", "correct"))
    return (row for row in zip(*names, steps, strict=True) if row[2] is not None)
