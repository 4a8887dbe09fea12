"""Which prompts of an oversampled batch are kept: those whose outcomes differ come first."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from prmfast.distrl._ragged import FLOATS, group_index, group_mean_std, per_sequence

logger = logging.getLogger("prmfast.distrl")

_OUTCOMES = (*FLOATS, torch.bool, torch.int64, torch.int32)


@dataclass(frozen=True, slots=True)
class Kept:
    """index: int64 [kept] sequences, prompt by prompt. Counts of prompts: too_high, too_low and ok by accuracy, and
    too_long. reasons: why prompts that teach nothing are among the kept, if they are.
    """

    index: Tensor
    too_high: int
    too_low: int
    ok: int
    too_long: int
    reasons: tuple[str, ...] = ()


def mixed_outcomes(outcome: Tensor, group: Tensor) -> Tensor:
    """Sequences of prompts whose outcomes differ, bool [S]: the only ones with a group-normalised advantage.

    Args:
        outcome: [S] floating, bool or integer; NaN and infinities are left out, and their sequences are not taken.
        group: int64 [S].

    Raises:
        TypeError, ValueError: a kind, dtype or shape that does not fit.
    """
    op = "mixed_outcomes"
    per_sequence(op, "outcome", outcome, len(group), _OUTCOMES)
    index, groups = group_index(op, group, len(outcome))
    known = outcome.isfinite()
    _, std = group_mean_std(outcome[known].double(), index[known], groups)
    return known & (std[index] > 0)


def filter_and_downsample(
    outcome: Tensor,
    length: Tensor,
    *,
    group: Tensor,
    max_length: int,
    oversample_factor: float = 1.0,
    rank: Tensor | None = None,
    accuracy: tuple[float, float] = (0.01, 0.99),
    prompts: int | None = None,
) -> Kept:
    """Keeps ``floor(floor(S / factor) / n)`` prompts of n sequences: first those that teach, then the others.

    A prompt teaches where its mean outcome lies within ``accuracy`` and its longest answer is shorter than
    ``max_length - 1`` (it was not cut off). Within both classes prompts go by their id: the released rule of [V].

    Args:
        outcome: [S], 0 or 1; a prompt with a NaN or infinite one does not teach.
        length: int64 [S], tokens of each answer.
        group: int64 [S] prompt ids, every prompt with as many sequences.
        max_length: the generation limit, >= 1.
        oversample_factor: >= 1, how many times more was sampled than is kept.
        rank: int64 [S], the order of sequences within their prompt; None: as they come.
        accuracy: lowest and highest mean outcome that teaches, inclusive.
        prompts: how many prompts to keep, at most all; None: as ``oversample_factor`` says.

    Returns:
        `Kept`; kept prompts that do not teach are named in ``reasons`` and on the logger ``prmfast.distrl``.

    Raises:
        TypeError, ValueError: a kind, shape or range that does not fit; prompts of different size.
    """
    op, s = "filter_and_downsample", len(outcome)
    per_sequence(op, "outcome", outcome, s, _OUTCOMES)
    per_sequence(op, "length", length, s, (torch.int64,))
    rank = torch.arange(s, device=outcome.device) if rank is None else rank
    per_sequence(op, "rank", rank, s, (torch.int64,))
    if not 1 <= oversample_factor < math.inf:
        raise ValueError(f"{op}: oversample_factor must be >= 1 and finite, got {oversample_factor}")
    if prompts is not None and prompts < 1:
        raise ValueError(f"{op}: prompts must be >= 1 or None, got {prompts}")
    if max_length < 1:
        raise ValueError(f"{op}: max_length must be >= 1, got {max_length}")
    index, groups = group_index(op, group, s)
    if s == 0:
        return Kept(index, 0, 0, 0, 0, ("no sequence: nothing to keep",))
    size = torch.bincount(index, minlength=groups)
    n = int(size[0])
    if not bool((size == n).all()):
        sizes = f"{int(size.min())} to {int(size.max())}"
        raise ValueError(f"{op}: group must have as many sequences for every prompt, got {sizes}")
    mean = outcome.new_zeros(groups, dtype=torch.float64).index_add(0, index, outcome.double()) / n
    longest = length.new_zeros(groups).scatter_reduce(0, index, length, "amax", include_self=False)
    known = mean.isfinite()
    high, low, long = known & (mean > accuracy[1]), known & (mean < accuracy[0]), longest >= max_length - 1
    within = known & ~high & ~low
    teaches = within & ~long
    order = (~teaches).long().argsort(stable=True)  # groups are numbered by increasing id
    wanted = int(s // oversample_factor) // n if prompts is None else min(prompts, groups)
    chosen = order[:wanted]
    by_rank = rank.argsort(stable=True)
    members = by_rank[index[by_rank].argsort(stable=True)].reshape(groups, n)
    idle = int((~teaches[chosen]).sum())
    reasons = [f"{idle} of {wanted} kept prompts teach nothing (accuracy or length outside the limits)"] if idle else []
    if wanted == 0:
        reasons.append(f"no prompt kept: {s} sequences / {oversample_factor:g} hold no prompt of {n}")
    for reason in reasons:
        logger.warning(reason)
    too_high, too_low, ok, too_long = (int(x.sum()) for x in (high, low, within, long))
    return Kept(members[chosen].reshape(-1), too_high, too_low, ok, too_long, tuple(reasons))


def prompt_pairs(outcome: Tensor, group: Tensor, *, rank: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Pairs (chosen, rejected) of one prompt: its i-th correct with its i-th wrong sequence.

    Args:
        outcome: [S]; > 1/2 is correct. NaN is in no pair.
        group: int64 [S] prompt ids.
        rank: int64 [S], the order within a prompt; None: as they come.

    Returns:
        Two int64 [pairs] of sequence numbers, prompts by increasing id; empty where no prompt has both.
    """
    op = "prompt_pairs"
    per_sequence(op, "outcome", outcome, len(group), _OUTCOMES)
    rank = torch.arange(len(outcome), device=outcome.device) if rank is None else rank
    per_sequence(op, "rank", rank, len(outcome), (torch.int64,))
    index, groups = group_index(op, group, len(outcome))
    order = rank.argsort(stable=True)
    order = order[index[order].argsort(stable=True)]
    value = outcome[order].double()
    chosen, rejected = [], []
    for g in range(groups):
        mine = index[order] == g
        right, wrong = order[mine & (value > 0.5)], order[mine & (value <= 0.5)]
        pairs = min(len(right), len(wrong))
        chosen.append(right[:pairs])
        rejected.append(wrong[:pairs])
    none = order.new_empty(0)
    return torch.cat([none, *chosen]), torch.cat([none, *rejected])
