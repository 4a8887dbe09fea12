"""The policy update: Tok-PPO on sampled tokens, Dist-PPO on candidates, [V] arXiv 2604.13197 eq. 11, 12, 14."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from prmfast.distrl._ragged import FLOATS, Layout, finite, layout
from prmfast.distrl.advantages import Advantages
from prmfast.distrl.candidates import entry_rows, keep_rows
from prmfast.kernels.dist_ppo.reference import Rule, terms
from prmfast.ops import Candidates, entry_logprob, linear_entry_logprob
from prmfast.ops._contract import Check
from prmfast.ops._dist_ppo_checks import check_layer

logger = logging.getLogger("prmfast.distrl")

_COUNT_EPS = 1e-8
_MAX_LOG_RATIO = 60.0
"""Beyond e^60 the ratio stays where it is, so that float32 holds its products."""


@dataclass(frozen=True, slots=True)
class LossRule:
    """Clipping, reduction and weights: ``LossRule.paper()`` or ``LossRule.released()``, which are two methods.

    paper: per sequence (1/T) sum_t, then the mean over sequences. released: Tok-PPO is the mean over the tokens of the
    batch, Dist-PPO sum(pi_old l) / sum(pi_old) over its candidates.

    variant: "paper" | "released". alpha: weight of Dist-PPO, >= 0; 0 leaves it out. clip_low in [0, 1), clip_high >= 0:
    of Tok-PPO. dist_clip_low, dist_clip_high: of Dist-PPO. dual_clip: > 1 or None: bound c * A where A < 0, of both.
    """

    variant: str = "paper"
    alpha: float = 0.1
    clip_low: float = 0.2
    clip_high: float = 0.28
    dist_clip_low: float = 0.2
    dist_clip_high: float = 0.28
    dual_clip: float | None = None

    def __post_init__(self) -> None:
        if self.variant not in ("paper", "released"):
            raise ValueError(f"variant must be 'paper' or 'released', got {self.variant!r}")
        if not 0 <= self.alpha < math.inf:
            raise ValueError(f"alpha must be >= 0 and finite, got {self.alpha}")
        for name in ("clip_low", "dist_clip_low"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must lie in [0, 1), got {getattr(self, name)}")
        for name in ("clip_high", "dist_clip_high"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be >= 0 and finite, got {getattr(self, name)}")
        if self.dual_clip is not None and not self.dual_clip > 1:
            raise ValueError(f"dual_clip must be > 1 or None, got {self.dual_clip}")

    @classmethod
    def paper(cls) -> LossRule:
        """Clip 1 - 0.20 .. 1 + 0.28 in both parts, no dual clip, alpha 0.1."""
        return cls()

    @classmethod
    def released(cls) -> LossRule:
        """Dual clip 3 in both parts, Dist-PPO clipped symmetrically at 0.2."""
        return cls(variant="released", dist_clip_high=0.2, dual_clip=3.0)


@dataclass(frozen=True, slots=True)
class TokPPO:
    """``loss``: scalar, differentiable. Shares of valid tokens: ``clip_fraction`` (the clipped branch counts),
    ``dual_clip_fraction``. ``approx_kl``: mean log pi_old - log pi_theta, and ``k3``: mean rho - 1 - log rho, >= 0.
    """

    loss: Tensor
    clip_fraction: float
    dual_clip_fraction: float
    approx_kl: float
    k3: float


@dataclass(frozen=True, slots=True)
class DistPPO:
    """``loss``: scalar, differentiable. Shares of the candidates: ``clip_fraction``, ``dual_clip_fraction``.

    approx_kl: sum of pi_old (log pi_old - log pi_theta) over candidates, divided by their number. candidates_per_token,
    mass: mean size of a valid token's set, and its mean probability under pi_old.
    """

    loss: Tensor
    clip_fraction: float
    dual_clip_fraction: float
    approx_kl: float
    candidates_per_token: float
    mass: float


@dataclass(frozen=True, slots=True)
class DistRLLoss:
    """``loss`` = tok.loss + alpha * dist.loss, differentiable; ``reasons``: why it has no gradient, if it has none."""

    loss: Tensor
    tok: TokPPO
    dist: DistPPO
    reasons: tuple[str, ...] = ()

    def metrics(self) -> dict[str, float]:
        """All numbers by name (``loss``, ``tok_loss``, ``dist_mass``, ...), for a log."""
        out = {"loss": self.loss.item()}
        for name, part in (("tok", self.tok), ("dist", self.dist)):
            out |= {
                f"{name}_{field}": float(getattr(part, field)) for field in part.__dataclass_fields__ if field != "loss"
            }
            out[f"{name}_loss"] = part.loss.item()
        return out


def tok_ppo_loss(
    logp: Tensor,
    old_logp: Tensor,
    advantage: Tensor,
    *,
    mask: Tensor | None = None,
    offsets: Tensor | None = None,
    rule: LossRule | None = None,
) -> TokPPO:
    """Equals ``-mean_s (1/T_s) sum_t min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A)``.

    rho = exp(logp - old_logp), the importance ratio of the sampled token.
    ``rule.variant="released"``: the mean over the tokens of the batch; with ``dual_clip`` c the term is at least c A
    where A < 0. Sequences without a valid token do not count; without any the loss is 0.

    Args:
        logp: log pi_theta of the sampled tokens, [B, T], or [N] with ``offsets``; floating, differentiable.
        old_logp: log pi_old of the same tokens, same shape, finite at valid tokens.
        advantage: same shape, finite at valid tokens.
        mask: bool [B, T]; None: all valid. Padding is not read.
        offsets: int64 [S + 1] of packed sequences.
        rule: `LossRule`; default ``LossRule.paper()``.

    Returns:
        `TokPPO`; its loss in the dtype of ``logp``.

    Raises:
        TypeError: a kind or dtype that is not accepted. ValueError: shapes that do not fit, a valid token whose
            old_logp or advantage is NaN or infinite, or whose logp is NaN or +inf (named).
    """
    op, rule = "tok_ppo_loss", rule or LossRule()
    where = layout(op, "logp", logp, mask, offsets)
    for name, value in (("logp", logp), ("old_logp", old_logp), ("advantage", advantage)):
        _same(op, name, value, logp.shape)
    new, old, value = where.pack(logp), where.pack(old_logp.detach()), where.pack(advantage.detach())
    finite(op, "old_logp", old)
    finite(op, "advantage", value)
    finite(op, "logp", torch.where(new.detach().isneginf(), 0.0, new.detach()))
    return _tok_ppo(new, old.to(new.dtype), value.to(new.dtype), where, rule)


def _same(op: str, name: str, value: object, shape: torch.Size) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(value).__name__}")
    if value.dtype not in FLOATS:
        raise TypeError(f"{op}: {name} must be floating point, got {str(value.dtype).removeprefix('torch.')}")
    if value.shape != shape:
        raise ValueError(f"{op}: {name} must have shape {tuple(shape)}, got {tuple(value.shape)}")


def _tok_ppo(new: Tensor, old: Tensor, value: Tensor, where: Layout, rule: LossRule) -> TokPPO:
    """On valid tokens [N]."""
    log_ratio = (new - old).clamp(max=_MAX_LOG_RATIO)
    ratio = log_ratio.exp()
    free, clipped = ratio * value, ratio.clamp(1 - rule.clip_low, 1 + rule.clip_high) * value
    term = torch.minimum(free, clipped)
    capped = torch.zeros_like(value, dtype=torch.bool)
    if rule.dual_clip is not None:
        floor = rule.dual_clip * value
        capped = (value < 0) & (term < floor)
        term = torch.where(value < 0, torch.maximum(term, floor), term)
    loss = -(term * _token_weight(where, rule.variant).to(term.dtype)).sum()
    n = max(len(value), 1)
    with torch.no_grad():
        shift = log_ratio.double()
        return TokPPO(
            loss,
            float((clipped < free).sum()) / n,
            float(capped.sum()) / n,
            float(torch.where(shift.isneginf(), 0.0, -shift).sum()) / n,
            float((torch.where(shift.isneginf(), 0.0, shift.expm1() - shift)).sum()) / n,
        )


def _token_weight(where: Layout, variant: str) -> Tensor:
    """The weight of every valid token [N], float64: 1 / (S T_s) or 1 / N."""
    count = where.count.double()
    if variant == "released":
        return torch.full_like(where.sequence, 1, dtype=torch.float64) / (count.sum() + _COUNT_EPS)
    return 1 / (count[where.sequence] * (where.count > 0).sum())


def distrl_loss(
    logits: Tensor,
    advantages: Advantages,
    *,
    sampled: Tensor,
    old_logp: Tensor,
    mask: Tensor | None = None,
    offsets: Tensor | None = None,
    rule: LossRule | None = None,
    temperature: float = 1.0,
    on_policy: bool = False,
    backend: str = "auto",
) -> DistRLLoss:
    """Equals ``L_tok + alpha * L_dist``, [V] eq. 14: `tok_ppo_loss` of sampled tokens, Dist-PPO of candidates.

    Both parts share one pass over the logits in the room dist_ppo (`entry_logprob`), and one in the backward pass: no
    log-softmax [T, V] is made, and one gradient.

    Args:
        logits: of pi_theta, [B, T, V], or [N, V] with ``offsets``: row t predicts the sampled token t. Any floating
            dtype. Rows at padding are not read.
        advantages: of `distrl_advantages` on the same tokens.
        sampled: int64 [B, T] or [N]; anything at padding.
        old_logp: log pi_old of the sampled tokens, [B, T] or [N], finite at valid tokens.
        mask: bool [B, T]; None: all valid.
        offsets: int64 [S + 1] of packed sequences.
        rule: `LossRule`; default ``LossRule.paper()``.
        temperature: > 0, divides the logits.
        on_policy: promises that old_logp is what these logits give, as in the first update after sampling. It then
            tells their log-sum-exp, and no pass over the vocabulary is made forward.
        backend: of the room dist_ppo.

    Returns:
        `DistRLLoss`, float32 (float64 for float64 logits). Where no term has a gradient, ``reasons`` and the logger
        ``prmfast.distrl`` say why.

    Raises:
        TypeError, ValueError: as `tok_ppo_loss` and `prmfast.ops.dist_ppo_loss`.
    """
    op = "distrl_loss"
    where = layout(op, "sampled", sampled, mask, offsets)
    if not isinstance(logits, Tensor):
        raise TypeError(f"{op}: logits must be a torch.Tensor, got {type(logits).__name__}")
    if tuple(logits.shape[:-1]) != where.shape:
        raise ValueError(f"{op}: logits must have shape {(*where.shape, 'V')} like sampled, got {tuple(logits.shape)}")
    columns = logits.shape[-1]
    tokens = _tokens(op, advantages, sampled, old_logp, where, columns)
    of = partial(entry_logprob, logits.reshape(-1, columns), temperature=temperature, backend=backend)
    logp = _entry_logp(of, tokens, where, columns, on_policy)
    return _total(logp, tokens, where, rule or LossRule(), logits.dtype)


def linear_distrl_loss(
    hidden: Tensor,
    weight: Tensor,
    advantages: Advantages,
    *,
    sampled: Tensor,
    old_logp: Tensor,
    offsets: Tensor,
    rule: LossRule | None = None,
    temperature: float = 1.0,
    on_policy: bool = False,
    backend: str = "auto",
) -> DistRLLoss:
    """Equals ``distrl_loss(hidden @ weight.T, ...)`` without the [N, V] logits or their gradient.

    Args:
        hidden: last hidden states of pi_theta, [N, d], packed.
        weight: [V, d], its output layer, in the hidden states' dtype.
        advantages: as in `distrl_loss`, and so are the others.
        sampled: int64 [N].
        old_logp: [N].
        offsets: int64 [S + 1].
        rule: `LossRule`; default ``LossRule.paper()``.
        temperature: > 0.
        on_policy: as in `distrl_loss`.
        backend: of the room dist_ppo.

    Returns:
        As `distrl_loss`; differentiable in hidden and weight.

    Raises:
        As `distrl_loss`.
    """
    op = "linear_distrl_loss"
    where = layout(op, "sampled", sampled, None, offsets)
    check_layer(Check(op), hidden, weight)
    if len(hidden) != where.rows:
        raise ValueError(f"{op}: hidden must have {where.rows} rows like sampled, got {len(hidden)}")
    tokens = _tokens(op, advantages, sampled, old_logp, where, len(weight))
    of = partial(linear_entry_logprob, hidden, weight, temperature=temperature, backend=backend)
    logp = _entry_logp(of, tokens, where, len(weight), on_policy)
    return _total(logp, tokens, where, rule or LossRule(), hidden.dtype)


def dist_ppo(
    states: Tensor,
    candidates: Candidates,
    *,
    offsets: Tensor,
    weight: Tensor | None = None,
    rule: LossRule | None = None,
    temperature: float = 1.0,
    backend: str = "auto",
) -> DistPPO:
    """The distribution-level part of `distrl_loss` alone, beside a token-level loss of another program.

    Args:
        states: of pi_theta, logits [N, V], or with ``weight`` [V, d], the output layer, the last hidden states [N, d].
        candidates: CSR, N rows, with the advantages of `distrl_advantages`.
        offsets: int64 [S + 1] of packed sequences.
        weight: in the states' dtype.
        rule: `LossRule`; default ``LossRule.paper()``. Its alpha and the clipping of sampled tokens are not used.
        temperature: > 0, divides the logits.
        backend: of the room dist_ppo.

    Returns:
        `DistPPO`, differentiable in states and weight.

    Raises:
        TypeError, ValueError: as `prmfast.ops.dist_ppo_loss`; ValueError for candidates of another number of rows.
    """
    op, rule = "dist_ppo", rule or LossRule()
    if len(candidates.offsets) != len(states) + 1:
        raise ValueError(
            f"{op}: candidates must have {len(states)} rows like states, got {len(candidates.offsets) - 1}"
        )
    where = layout(op, "states", states[:, 0].detach(), None, offsets)
    starts, ids = candidates.offsets, candidates.token_ids
    options: dict[str, Any] = {"temperature": temperature, "backend": backend}
    if weight is None:
        logp = entry_logprob(states, starts, ids, **options)
    else:
        logp = linear_entry_logprob(states, weight, starts, token_ids=ids, **options)
    return _dist_part(logp, candidates, where, rule, states.dtype)


@dataclass(slots=True)
class _Tokens:
    """The constants of an update: of valid tokens [N], and the candidates; then where each stands among the entries."""

    ids: Tensor
    old_logp: Tensor
    advantage: Tensor
    candidates: Candidates
    place: Tensor | None = None

    def entries(self, where: Layout, columns: int) -> tuple[Tensor, Tensor]:
        """CSR offsets and token ids of sampled tokens and candidates together, each once; remembers their places."""
        keys = [entry_rows(self.candidates) * columns + self.candidates.token_ids, where.place * columns + self.ids]
        entries, self.place = torch.cat(keys).unique(return_inverse=True)
        counts = torch.bincount(entries // max(columns, 1), minlength=where.rows)
        return torch.cat([counts.new_zeros(1), counts.cumsum(0)]), entries % max(columns, 1)


def _entry_logp(of: Callable[..., Tensor], tokens: _Tokens, where: Layout, columns: int, on_policy: bool) -> Tensor:
    """Log-probabilities of the entries; ``of`` is `entry_logprob` or `linear_entry_logprob` but for these.

    Where ``old_logp`` is of the same distributions, their log-sum-exp is a sampled token's logit minus it; that logit
    is what ``of`` gives for a log-sum-exp of 0.
    """
    lse = None
    if on_policy:
        counts = where.unpack(torch.ones_like(tokens.ids)).reshape(-1)
        offsets, zero = torch.cat([counts.new_zeros(1), counts.cumsum(0)]), tokens.old_logp.new_zeros(where.rows)
        with torch.no_grad():
            logits = of(offsets, token_ids=tokens.ids, lse=zero)
        lse = where.unpack(logits - tokens.old_logp).reshape(-1)
    starts, ids = tokens.entries(where, columns)
    return of(starts, token_ids=ids, lse=lse)


def _tokens(op: str, advantages: Advantages, sampled: Tensor, old_logp: Tensor, where: Layout, columns: int) -> _Tokens:
    """Checked."""
    if sampled.dtype != torch.int64:
        raise TypeError(f"{op}: sampled must have dtype int64, got {str(sampled.dtype).removeprefix('torch.')}")
    _same(op, "old_logp", old_logp, sampled.shape)
    _same(op, "advantages.token", advantages.token, sampled.shape)
    if len(advantages.candidates.offsets) != where.rows + 1:
        got = len(advantages.candidates.offsets) - 1
        raise ValueError(f"{op}: advantages.candidates must have {where.rows} rows like sampled, got {got}")
    ids, old, value = (where.pack(t.detach()) for t in (sampled, old_logp, advantages.token))
    finite(op, "old_logp", old)
    finite(op, "advantages.token", value)
    candidates = keep_rows(advantages.candidates, where)
    for name, held in (("sampled", ids), ("advantages.candidates.token_ids", candidates.token_ids)):
        outside = (held < 0) | (held >= columns)
        if bool(outside.any()):
            raise ValueError(f"{op}: {name} must be >= 0 and < V = {columns}, got {int(held[outside][0])}")
    finite(op, "advantages.candidates.advantage", candidates.advantage)
    return _Tokens(ids, old.double(), value.double(), candidates)


def _total(entry_logp: Tensor, tokens: _Tokens, where: Layout, rule: LossRule, dtype: torch.dtype) -> DistRLLoss:
    """Both parts from the log-probabilities of the entries, in float64."""
    candidates = tokens.candidates
    at = entry_logp[tokens.place]
    split = len(candidates.token_ids)
    tok = _tok_ppo(at[split:], tokens.old_logp, tokens.advantage, where, rule)
    dist = _dist_part(at[:split], candidates, where, rule, torch.float64)
    total = tok.loss + rule.alpha * dist.loss if rule.alpha else tok.loss
    result = torch.float64 if dtype == torch.float64 else torch.float32
    tok, dist = replace(tok, loss=tok.loss.to(result)), replace(dist, loss=dist.loss.to(result))
    return DistRLLoss(total.to(result), tok, dist, _reasons(where, tokens.advantage, candidates, rule))


def _dist_part(new: Tensor, candidates: Candidates, where: Layout, rule: LossRule, dtype: torch.dtype) -> DistPPO:
    """From the log-probabilities of the candidates; the loss in float64 or float32, as ``dtype`` says."""
    weight = _row_weight(candidates, where, rule.variant)[entry_rows(candidates)]
    clip = Rule(rule.dist_clip_low, rule.dist_clip_high, rule.dual_clip, 1.0)
    loss = -(weight * terms(new, candidates, clip)).sum()
    result = torch.float64 if dtype == torch.float64 else torch.float32
    return _dist_ppo(loss.to(result), new.detach(), candidates, where, rule)


def _row_weight(candidates: Candidates, where: Layout, variant: str) -> Tensor:
    """Of all rows, float64: 1 / (S T_s), or 1 / sum(pi_old) over all candidates."""
    if variant == "paper":
        weight = torch.zeros(where.rows, dtype=torch.float64, device=where.place.device)
        return weight.index_copy(0, where.place, _token_weight(where, variant))
    mass = candidates.policy_logp.double().exp().sum()
    return (1 / mass if float(mass) else mass).expand(where.rows)


def _dist_ppo(loss: Tensor, new: Tensor, candidates: Candidates, where: Layout, rule: LossRule) -> DistPPO:
    """The loss with its diagnostics; entries without a finite log-probability count as neither clipped nor moved."""
    known = new.isfinite() & candidates.policy_logp.isfinite()
    old, value = candidates.policy_logp.double()[known], candidates.advantage.double()[known]
    ratio = (new[known] - old).clamp(max=_MAX_LOG_RATIO).exp()
    free, clipped = ratio * value, ratio.clamp(1 - rule.dist_clip_low, 1 + rule.dist_clip_high) * value
    capped = torch.zeros_like(value, dtype=torch.bool)
    if rule.dual_clip is not None:
        capped = (value < 0) & (torch.minimum(free, clipped) < rule.dual_clip * value)
    entries, tokens = len(candidates.token_ids), max(len(where.place), 1)
    return DistPPO(
        loss,
        float((clipped < free).sum()) / max(entries, 1),
        float(capped.sum()) / max(entries, 1),
        float((old.exp() * (old - new[known])).sum()) / max(entries, 1),
        entries / tokens,
        float(candidates.policy_logp.double().exp().sum()) / tokens,
    )


def _reasons(where: Layout, token: Tensor, candidates: Candidates, rule: LossRule) -> tuple[str, ...]:
    tok, dist = bool((token != 0).any()), bool(rule.alpha) and bool((candidates.advantage != 0).any())
    if tok or dist:
        return ()
    reason = "no valid token: the loss is 0" if len(where.place) == 0 else "every advantage is 0: so is the gradient"
    logger.warning(reason)
    return (reason,)
