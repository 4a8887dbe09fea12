"""Answers drawn for a batch of prompts, verified, as packed tokens."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prmfast.distrl.filtering import filter_and_downsample, mixed_outcomes
from prmfast.engines.base import Engine

logger = logging.getLogger("prmfast.distrl")

Reward = Callable[[str, str], float]
"""``reward(question, completion)``: 1.0 correct, 0.0 wrong (a bool will do); NaN where it cannot be told."""


@dataclass(frozen=True, slots=True)
class Rollouts:
    """S answers, packed: tokens of answer s are ``token_ids[offsets[s] : offsets[s + 1]]``.

    prompts: S strings. answers: S tuples of token ids. group: int64 [S], the prompt's number in the batch.
    outcome: float32 [S]. finished: bool [S], ended before the length limit.
    """

    prompts: tuple[str, ...]
    answers: tuple[tuple[int, ...], ...]
    group: Tensor
    outcome: Tensor
    finished: Tensor

    @property
    def length(self) -> Tensor:
        """int64 [S]."""
        return torch.tensor([len(answer) for answer in self.answers], dtype=torch.int64)

    @property
    def offsets(self) -> Tensor:
        """int64 [S + 1]."""
        return torch.cat([torch.zeros(1, dtype=torch.int64), self.length.cumsum(0)])

    @property
    def token_ids(self) -> Tensor:
        """int64 [N]."""
        return torch.tensor([token for answer in self.answers for token in answer], dtype=torch.int64)

    def take(self, index: Tensor) -> Rollouts:
        """The answers of these numbers (int64 [n]), in this order."""
        rows = index.tolist()
        prompts, answers = tuple(self.prompts[i] for i in rows), tuple(self.answers[i] for i in rows)
        return Rollouts(prompts, answers, self.group[index], self.outcome[index], self.finished[index])


def draw(engine: Engine, prompts: Sequence[str], counts: Sequence[int], reward: Reward, *, first_seed: int) -> Rollouts:
    """``counts[i]`` answers of prompt i with the seeds first_seed, first_seed + 1, ..., verified.

    Raises:
        ValueError: a reward that is infinite, with its prompt.
    """
    asked = [prompt for prompt, count in zip(prompts, counts, strict=True) for _ in range(count)]
    drawn = engine.sample(asked, [first_seed + i for count in counts for i in range(count)])
    outcome = [float(reward(prompt, completion.text)) for prompt, completion in zip(asked, drawn, strict=True)]
    for prompt, value in zip(asked, outcome, strict=True):
        if value in (float("inf"), float("-inf")):
            raise ValueError(f"reward must be finite or NaN, got {value} for prompt {prompt!r}")
    group = torch.arange(len(prompts)).repeat_interleave(torch.tensor(list(counts), dtype=torch.int64))
    finished = torch.tensor([completion.finished for completion in drawn], dtype=torch.bool)
    answers = tuple(tuple(completion.token_ids) for completion in drawn)
    return Rollouts(tuple(asked), answers, group, torch.tensor(outcome), finished)


def joined(parts: Sequence[Rollouts], counts: Sequence[int]) -> Rollouts:
    """Rollouts of consecutive prompts as one, ``counts[i]`` answers of prompt i."""
    group = torch.arange(len(counts)).repeat_interleave(torch.tensor(list(counts), dtype=torch.int64))
    prompts = tuple(prompt for part in parts for prompt in part.prompts)
    answers = tuple(answer for part in parts for answer in part.answers)
    outcome, finished = (torch.cat([getattr(part, name) for part in parts]) for name in ("outcome", "finished"))
    return Rollouts(prompts, answers, group, outcome, finished)


def choose(rollouts: Rollouts, *, prompts: int, mixed_only: bool) -> tuple[Rollouts, tuple[str, ...]]:
    """At most ``prompts`` prompts of an oversampled batch, those that teach first; with ``mixed_only`` no others.

    A prompt teaches where its outcomes differ and no answer was cut off; see `filter_and_downsample`.
    """
    drawn = int(rollouts.group.max()) + 1 if len(rollouts.group) else 0
    reasons: tuple[str, ...] = ()
    if drawn > prompts:
        cut = torch.where(rollouts.finished, 0, 2)  # lengths that only say whether the limit was hit
        kept = filter_and_downsample(rollouts.outcome, cut, group=rollouts.group, max_length=3, prompts=prompts)
        rollouts, reasons = rollouts.take(kept.index), kept.reasons
    if mixed_only:
        rows = mixed_outcomes(rollouts.outcome, rollouts.group).nonzero()[:, 0]
        if len(rows) == 0:
            reasons += ("no prompt has outcomes that differ: nothing is kept",)
            logger.warning(reasons[-1])
        rollouts = rollouts.take(rows)
    return rollouts, reasons
