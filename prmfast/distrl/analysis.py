"""What the token-level scores of a reward model say about outcomes: accuracies within prompts, and a correlation."""

from __future__ import annotations

import torch
from torch import Tensor

from prmfast.distrl._ragged import FLOATS, group_index, layout, per_sequence

_OUTCOMES = (*FLOATS, torch.bool, torch.int64, torch.int32)


def td_outcome_correlation(
    td: Tensor,
    outcome: Tensor,
    *,
    mask: Tensor | None = None,
    offsets: Tensor | None = None,
    level: str = "sequence",
) -> float | None:
    """Pearson correlation of TD with the outcome of the sequence it stands in.

    Over sequences, of their mean TD (the final prefix value v_T), or over tokens, of TD itself.

    Args:
        td: [B, T], or [N] with ``offsets``.
        outcome: [S]; sequences whose outcome is NaN or infinite, and those without a valid token, are left out.
        mask: bool [B, T]; None: all valid.
        offsets: int64 [S + 1].
        level: "sequence" | "token".

    Returns:
        In [-1, 1]; None where there is none: fewer than two of them, or one side that does not vary.
    """
    op = "td_outcome_correlation"
    where = layout(op, "td", td, mask, offsets)
    per_sequence(op, "outcome", outcome, where.sequences, _OUTCOMES)
    known = outcome.isfinite() & (where.count > 0)
    if level not in ("sequence", "token"):
        raise ValueError(f"{op}: level must be 'sequence' or 'token', got {level!r}")
    packed = where.pack(td.detach()).double()
    if level == "sequence":
        sides = torch.stack([where.sums(packed)[known] / where.count[known], outcome[known].double()])
    else:
        here = known[where.sequence]
        sides = torch.stack([packed[here], outcome.double()[where.sequence][here]])
    sides = sides - sides.mean(1, keepdim=True) if sides.shape[1] else sides
    norms = sides.norm(dim=1)
    if not bool((norms > 1e-12).all()):
        return None
    return float((sides[0] @ sides[1]) / norms.prod())


def rm_score(
    td: Tensor,
    *,
    mask: Tensor | None = None,
    offsets: Tensor | None = None,
    reward: str = "ipvrm",
) -> float:
    """Mean over answers of what a reward model says of the whole answer, in log-odds of being correct: the RM score.

    Of IPVRM it is the prefix value at the last token, ``v_T = 1/T sum_t td_t``, of an implicit PRM ``sum_t td_t``, for
    td = beta * log-ratio. This is our reading of [V] eq. 19; the released program logs the mean of td over all tokens
    of a batch, where long answers count more.

    Args:
        td: [B, T], or [N] with ``offsets``.
        mask: bool [B, T]; None: all valid.
        offsets: int64 [S + 1].
        reward: "ipvrm" | "implicit".

    Returns:
        0 where no sequence has a valid token; sequences without one are left out.
    """
    if reward not in ("ipvrm", "implicit"):
        raise ValueError(f"rm_score: reward must be 'ipvrm' or 'implicit', got {reward!r}")
    where = layout("rm_score", "td", td, mask, offsets)
    total, some = where.sums(where.pack(td.detach()).double()), where.count > 0
    scores = (total / where.count if reward == "ipvrm" else total)[some]
    return float(scores.mean()) if len(scores) else 0.0


def pairwise_accuracy(score: Tensor, outcome: Tensor, *, group: Tensor) -> float:
    """Share of pairs of one prompt with different outcomes whose scores stand in the same order; mean over prompts.

    Pairs weigh by the difference of their outcomes. A prompt without such a pair counts 1/2. Of two equal scores the
    earlier sequence's counts as the lower one, as the released program of [V] has it.

    Args:
        score: [S], the sum of a sequence's token scores.
        outcome: [S].
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
        gap = r[first] - r[second]
        right = (s[first] > s[second]) == (gap > 0)
        total = float(gap.abs().sum())
        shares.append(float((right * gap.abs()).sum()) / total if total else 0.5)
    return sum(shares) / len(shares) if shares else 0.5


def sign_accuracy(score: Tensor, outcome: Tensor) -> float:
    """Share of sequences whose score [S] is > 0 where the outcome [S] is 1 and < 0 where it is 0; 0 for none at all.

    For score = log-ratio sums this is the accuracy of sigmoid(score) at the threshold 1/2.
    """
    per_sequence("sign_accuracy", "score", score, len(outcome), FLOATS)
    per_sequence("sign_accuracy", "outcome", outcome, len(score), _OUTCOMES)
    right = score.double().sign() == (2 * outcome.double() - 1).sign()
    return float(right.double().mean()) if len(score) else 0.0
