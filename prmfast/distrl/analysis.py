"""What the token-level scores of a reward model say about outcomes: accuracies within prompts, and a correlation."""

from __future__ import annotations

import torch
from torch import Tensor

from prmfast.distrl._ragged import FLOATS, group_index, layout, per_sequence

_OUTCOMES = (*FLOATS, torch.bool, torch.int64, torch.int32)


def td_outcome_correlation(
    td: Tensor, outcome: Tensor, *, mask: Tensor | None = None, offsets: Tensor | None = None
) -> float | None:
    """Pearson correlation over sequences of their mean TD (the final prefix value v_T up to beta) with the outcome.

    Args:
        td: [B, T], or [N] with ``offsets``.
        outcome: [S]; sequences whose outcome is NaN or infinite, and those without a valid token, are left out.
        mask: bool [B, T]; None: all valid.
        offsets: int64 [S + 1].

    Returns:
        In [-1, 1]; None where there is none: fewer than two sequences, or one side that does not vary.
    """
    op = "td_outcome_correlation"
    where = layout(op, "td", td, mask, offsets)
    per_sequence(op, "outcome", outcome, where.sequences, _OUTCOMES)
    known = outcome.isfinite() & (where.count > 0)
    mean = where.sums(where.pack(td.detach()).double())[known] / where.count[known]
    sides = torch.stack([mean, outcome[known].double()])
    sides = sides - sides.mean(1, keepdim=True) if sides.shape[1] else sides
    norms = sides.norm(dim=1)
    if not bool((norms > 1e-12).all()):
        return None
    return float((sides[0] @ sides[1]) / norms.prod())


def pairwise_accuracy(score: Tensor, outcome: Tensor, *, group: Tensor) -> float:
    """Share of pairs of one prompt with different outcomes whose scores stand in the same order; mean over prompts.

    A prompt without such a pair counts 1/2. Of two equal scores the later sequence counts as not the higher one, as the
    released program of [V] has it.

    Args:
        score: [S], the sum of a sequence's token scores.
        outcome: [S], 0 or 1.
        group: int64 [S].

    Returns:
        In [0, 1]; 1/2 for no sequence at all.
    """
    op = "pairwise_accuracy"
    per_sequence(op, "score", score, len(outcome), FLOATS)
    per_sequence(op, "outcome", outcome, len(score), _OUTCOMES)
    index, groups = group_index(op, group, len(score))
    shares = []
    for g in range(groups):
        mine = index == g
        s, r = score[mine].double(), outcome[mine].double()
        first, second = torch.triu_indices(len(s), len(s), offset=1, device=s.device)
        differ = r[first] != r[second]
        right = ((s[second] > s[first]) == (r[second] > r[first]))[differ].double()
        shares.append(float(right.mean()) if len(right) else 0.5)
    return sum(shares) / len(shares) if shares else 0.5


def sign_accuracy(score: Tensor, outcome: Tensor) -> float:
    """Share of sequences whose score [S] is > 0 where the outcome [S] is 1 and < 0 where it is 0; 0 for none at all.

    For score = log-ratio sums this is the accuracy of sigmoid(score) at the threshold 1/2.
    """
    per_sequence("sign_accuracy", "score", score, len(outcome), FLOATS)
    per_sequence("sign_accuracy", "outcome", outcome, len(score), _OUTCOMES)
    right = score.double().sign() == (2 * outcome.double() - 1).sign()
    return float(right.double().mean()) if len(score) else 0.0
