"""Advantages of sampled tokens and of candidates, [V] arXiv 2604.13197 eq. 13 and 23-29, and as its program has them.

Everything here is a constant of the policy update: computed in float64, returned in the dtype of its input, detached.
Tokens are padded, [B, T] with a bool mask, or packed, [N] with offsets [S + 1]; candidates are CSR rows over the
flattened tokens. A batch that cannot teach anything says so in ``reasons`` and on the logger ``prmfast.distrl``.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from prmfast.distrl._ragged import FLOATS, Layout, finite, group_index, group_mean_std, layout, per_sequence
from prmfast.distrl.candidates import keep_rows
from prmfast.ops import Candidates

logger = logging.getLogger("prmfast.distrl")

_OUTCOMES = (*FLOATS, torch.bool, torch.int64, torch.int32)
_TD_EPS = 1e-8
_OUTCOME_FLOOR = 1e-6
_NO_SPREAD = 1e-6
"""sigma_V below this share of the largest prefix value is rounding: no scale can be read from it."""


@dataclass(frozen=True, slots=True)
class AdvantageRule:
    """How advantages are made: ``AdvantageRule.paper()`` or ``AdvantageRule.released()``, which are two methods.

    paper: TD of sampled tokens divided by sigma_V and normalised over the prompt group, then GAE. released: TD centred
    by the mean of the minibatch, GAE, whitened over the minibatch.

    variant: "paper" | "released". gamma, lam: of GAE, in [0, 1]; lam 0 is the TD estimate, lam 1 Monte Carlo.
    outcome_weight, td_weight: of the group-normalised outcome and of the GAE part in the token advantage.
    """

    variant: str = "paper"
    gamma: float = 1.0
    lam: float = 1.0
    outcome_weight: float = 1.0
    td_weight: float = 1.0

    def __post_init__(self) -> None:
        if self.variant not in ("paper", "released"):
            raise ValueError(f"variant must be 'paper' or 'released', got {self.variant!r}")
        _discounts("AdvantageRule", self.gamma, self.lam)
        for name in ("outcome_weight", "td_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be >= 0 and finite, got {getattr(self, name)}")

    @classmethod
    def paper(cls) -> AdvantageRule:
        """A = (r - mu) / s + GAE of TD normalised over the prompt group; gamma = lambda = 1."""
        return cls()

    @classmethod
    def released(cls) -> AdvantageRule:
        """A = (r - mu) / s + 0.05 whiten(GAE of centred TD)."""
        return cls(variant="released", td_weight=0.05)


@dataclass(frozen=True, slots=True)
class Advantages:
    """What a policy update needs, detached.

    token: in the shape of ``td``, 0 at padding. candidates: the given rows with advantage TD / sigma_V.
    outcome: [S], group-normalised. sigma_v: the scale. reasons: why parts of the batch teach nothing, if any do.
    """

    token: Tensor
    candidates: Candidates
    outcome: Tensor
    sigma_v: float
    reasons: tuple[str, ...] = ()


def _discounts(op: str, gamma: float, lam: float) -> None:
    for name, value in (("gamma", gamma), ("lam", lam)):
        if not 0 <= value <= 1:
            raise ValueError(f"{op}: {name} must lie in [0, 1], got {value}")


def gae(
    td: Tensor,
    *,
    mask: Tensor | None = None,
    offsets: Tensor | None = None,
    gamma: float = 1.0,
    lam: float = 1.0,
) -> Tensor:
    """Equals ``A_t = td_t + gamma * lam * A_(t+1)`` over the valid tokens of each sequence.

    Generalised advantage estimation from TD errors: ``lam=0`` is the TD estimate, ``lam=1`` Monte Carlo (the sum of
    what follows). Tokens that the mask leaves out are skipped, as if they did not stand in the sequence.

    Args:
        td: [B, T], or [N] with ``offsets``; floating.
        mask: bool [B, T], valid tokens; None: all.
        offsets: int64 [S + 1] of packed sequences, rising from 0 to N.
        gamma: in [0, 1].
        lam: in [0, 1].

    Returns:
        In the shape and dtype of ``td``, 0 at padding; computed in float64, not differentiable.

    Raises:
        TypeError: a kind or dtype that is not accepted. ValueError: shapes or ranges that do not fit, a valid token
            whose td is NaN or infinite.
    """
    where = layout("gae", "td", td, mask, offsets)
    _discounts("gae", gamma, lam)
    packed = _valid("gae", "td", td, where)
    return where.unpack(where.discounted_suffix_sums(packed, gamma * lam)).to(td.dtype)


def _valid(op: str, name: str, values: Tensor, where: Layout) -> Tensor:
    """The valid tokens in float64, all finite."""
    if values.dtype not in FLOATS:
        raise TypeError(f"{op}: {name} must be floating point, got {str(values.dtype).removeprefix('torch.')}")
    packed = where.pack(values.detach()).double()
    finite(op, name, packed)
    return packed


def group_normalised_outcome(outcome: Tensor, group: Tensor) -> Tensor:
    """Equals ``(r - mean) / max(std, 1e-6)`` over the sequences of one prompt, population std: GRPO's advantage.

    Args:
        outcome: [S] floating, bool or integer. NaN and infinities (a verifier that failed) are left out of mean and std
            and give 0.
        group: int64 [S], the prompt of each sequence; any ids, in any order.

    Returns:
        [S] in the dtype of ``outcome`` (float32 where it is not floating). 0 where all outcomes of a group are equal.

    Raises:
        TypeError, ValueError: as `gae`.
    """
    op = "group_normalised_outcome"
    per_sequence(op, "outcome", outcome, len(group) if isinstance(group, Tensor) else 0, _OUTCOMES)
    index, groups = group_index(op, group, len(outcome))
    known = outcome.isfinite()
    values = outcome.detach()[known].double()
    mean, std = group_mean_std(values, index[known], groups)
    out = torch.zeros(len(outcome), dtype=torch.float64, device=outcome.device)
    out[known] = (values - mean[index[known]]) / std.clamp(min=_OUTCOME_FLOOR)[index[known]]
    return out.to(outcome.dtype if outcome.is_floating_point() else torch.float32)


def distrl_advantages(
    candidates: Candidates,
    td: Tensor,
    outcome: Tensor,
    *,
    group: Tensor,
    mask: Tensor | None = None,
    offsets: Tensor | None = None,
    rule: AdvantageRule | None = None,
) -> Advantages:
    """Equals ``token = w_r (r - mu) / s + w_td GAE(normalised td)``, ``candidates.advantage = TD / sigma_V``.

    sigma_V is the population standard deviation of the prefix values cumsum(td) over the valid tokens of the minibatch.

    Args:
        candidates: CSR, one row per token of the flattened ``td`` (B T padded or N packed rows), as `candidate_td`
            gives them. Rows at padding are emptied.
        td: A_TD of the sampled tokens (`sampled_td`), [B, T], or [N] with ``offsets``.
        outcome: [S] verified rewards; see `group_normalised_outcome` for NaN.
        group: int64 [S], the prompt of each sequence.
        mask: bool [B, T]; None: all valid.
        offsets: int64 [S + 1] of packed sequences.
        rule: `AdvantageRule`; default ``AdvantageRule.paper()``.

    Returns:
        `Advantages`. Where prefix values have no spread (one token, or one constant) there is no scale, and the
        candidates' advantages are 0.

    Raises:
        TypeError, ValueError: as `gae`; ValueError also for candidates whose rows do not fit ``td``.
    """
    op, rule = "distrl_advantages", rule or AdvantageRule()
    where = layout(op, "td", td, mask, offsets)
    if len(candidates.offsets) != where.rows + 1:
        raise ValueError(
            f"{op}: candidates must have {where.rows} rows, one per token of td, got {len(candidates.offsets) - 1}"
        )
    finite(op, "candidates.advantage", candidates.advantage)
    packed = _valid(op, "td", td, where)
    per_sequence(op, "outcome", outcome, where.sequences, _OUTCOMES)
    index, groups = group_index(op, group, where.sequences)
    reasons = _about_outcomes(outcome, index, groups)
    sigma, spread = _sigma_v(where.prefix_sums(packed))
    scale = (sigma + _TD_EPS if rule.variant == "paper" else max(sigma, _OUTCOME_FLOOR)) if spread else math.inf
    kept = keep_rows(candidates, where)
    kept = kept._replace(advantage=(kept.advantage.double() / scale).to(kept.advantage.dtype))
    if rule.variant == "paper":
        normed = _group_normed(packed / scale, index[where.sequence], groups)
        part = where.discounted_suffix_sums(normed, rule.gamma * rule.lam)
    else:
        part = _released_part(packed / scale, where, rule)
    own = group_normalised_outcome(outcome.double(), group)
    token = rule.outcome_weight * own[where.sequence] + rule.td_weight * part
    reasons += _about_td(where, kept, spread, sigma)
    if not bool((token != 0).any()) and not bool((kept.advantage != 0).any()):
        reasons.append("every advantage is 0: this batch leaves the policy as it is")
    for reason in reasons:
        logger.warning(reason)
    dtype = outcome.dtype if outcome.is_floating_point() else torch.float32
    return Advantages(where.unpack(token).to(td.dtype), kept, own.to(dtype), sigma, tuple(reasons))


def outcome_advantages(
    outcome: Tensor,
    *,
    group: Tensor,
    offsets: Tensor,
) -> Advantages:
    """GRPO's advantages: the group-normalised outcome at every token of packed sequences, and no candidates.

    Args:
        outcome: [S], as in `group_normalised_outcome`.
        group: int64 [S].
        offsets: int64 [S + 1].

    Returns:
        `Advantages` with ``token`` float32 [N], empty rows of candidates and sigma_v 0.

    Raises:
        TypeError, ValueError: as `gae`.
    """
    op = "outcome_advantages"
    tokens = outcome.new_zeros(int(offsets[-1]) if len(offsets) else 0, dtype=torch.float32)
    where = layout(op, "tokens", tokens, None, offsets)
    per_sequence(op, "outcome", outcome, where.sequences, _OUTCOMES)
    index, groups = group_index(op, group, where.sequences)
    reasons = _about_outcomes(outcome, index, groups)
    if len(tokens) == 0:
        reasons.append("no valid token")
    for reason in reasons:
        logger.warning(reason)
    own = group_normalised_outcome(outcome, group).float()
    none = Candidates(offsets.new_zeros(len(tokens) + 1), offsets.new_empty(0), tokens[:0], tokens[:0])
    return Advantages(own[where.sequence], none, own, 0.0, tuple(reasons))


def _sigma_v(prefix_values: Tensor) -> tuple[float, bool]:
    """sigma_V, and whether it is more than rounding."""
    if len(prefix_values) == 0:
        return 0.0, False
    sigma = float(prefix_values.std(correction=0))
    return sigma, sigma > _NO_SPREAD * float(prefix_values.abs().max())


def _group_normed(td: Tensor, index: Tensor, groups: int) -> Tensor:
    """TD of sampled tokens, zero mean and unit std over the tokens of each prompt group."""
    mean, std = group_mean_std(td, index, groups)
    return (td - mean[index]) / (std[index] + _TD_EPS)


def _released_part(td: Tensor, where: Layout, rule: AdvantageRule) -> Tensor:
    """whiten(GAE of centred TD); 0 for fewer than two tokens, where the released program stops."""
    n = len(td)
    if n < 2:
        return torch.zeros_like(td)
    raw = where.discounted_suffix_sums(td - td.mean(), rule.gamma * rule.lam)
    count = torch.tensor([n, n - 1], dtype=torch.float32)  # as the program counts tokens
    bessel = float(count[0] / count[1])
    return (raw - raw.mean()) * (raw.var(correction=0) * bessel + _TD_EPS).rsqrt()


def _about_outcomes(outcome: Tensor, index: Tensor, groups: int) -> list[str]:
    known = outcome.isfinite()
    reasons = []
    if not bool(known.all()):
        bad = (~known).nonzero()[:, 0]
        reasons.append(
            f"outcome is NaN or infinite in {len(bad)} of {len(outcome)} sequences (first: {int(bad[0])}): "
            "left out of its group's statistics, outcome part 0"
        )
    values = outcome[known].double()
    if len(values):
        _, std = group_mean_std(values, index[known], groups)
        if not bool((std > 0).any()):
            same = f", all {float(values[0]):g}" if bool((values == values[0]).all()) else ""
            reasons.append(f"no group of {groups} has outcomes that differ{same}: outcome part 0")
    return reasons


def _about_td(where: Layout, kept: Candidates, spread: bool, sigma: float) -> list[str]:
    if len(where.place) == 0:
        return ["no valid token"]
    reasons = []
    if not spread:
        reasons.append(f"prefix values have no spread (sigma_V {sigma:.3g}): there is no scale, TD parts are 0")
    if len(kept.token_ids) == 0:
        reasons.append("no candidates: the distribution-level part is 0")
    return reasons
