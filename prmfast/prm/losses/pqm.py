"""The ranking losses of PQM ([Q] arXiv 2410.11287, eq. 9, 10 and 12) through log-sum-exp of pairs of steps."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from prmfast.ops._contract import Check
from prmfast.prm.losses._common import PADDING, masked, masked_mean, option, ratio, read_labels, softplus

PQMVariant = Literal["pqm", "theorem", "printed", "first_wrong"]
ReleasedVariant = Literal["pqm", "theorem", "first_wrong"]
Normalization = Literal["paper", "released"]
_RELEASED_EPS = 1e-5  # the released programs add it to every denominator


def pqm_loss(
    scores: Tensor,
    labels: Tensor,
    *,
    zeta: float = 4.0,
    variant: PQMVariant = "pqm",
    normalization: Normalization = "paper",
) -> Tensor:
    """``-1/|C| sum_t log(exp(Q_ct) / (sum_{q<=t} exp(Q_cq) + sum_w exp(Q_w + zeta)))``, Q_c0 = 0 for the prompt.

    Correct steps c_1, c_2, ... are to rise above the prompt and above each other, wrong steps w to lie ``zeta`` below.

    scores: [B, H] Q values (logits), float16 | bfloat16 | float32 | float64; float64 is kept, the others compute in
    float32.
    labels: [B, H], 1 for a correct step, 0 for a wrong one, -100 for padding, which may hold anything and never counts.
    variant: "pqm" is eq. 10. "first_wrong" is eq. 12: only the first wrong step stands for w. "theorem" is eq. 9, the
    full ranking w_n < ... < w_1 < prompt < c_1 < c_2 ..., over the number of steps; "printed" is eq. 9 with the wrong
    steps in the order that its text prints, w_1 < ... < w_n.
    normalization: of eq. 10 and 12. "paper" sums t = 0, 1, ... and divides by |C|; a row without a correct step gives
    0. "released" has the term t = 0 only in rows with a wrong step and divides by |C| + [there is a wrong step].

    returns: the mean over the rows that have a step, 0 with zero gradient if none has. Finite for scores within 1e37.
    What the released programs return to the last digit: `released_pqm_loss`.
    """
    check = Check("pqm_loss")
    option("pqm_loss: variant", variant, ("pqm", "theorem", "printed", "first_wrong"))
    option("pqm_loss: normalization", normalization, ("paper", "released"))
    if normalization == "released" and variant in ("theorem", "printed"):
        raise ValueError(
            f"pqm_loss: normalization must be 'paper' for variant={variant!r}, got 'released'; "
            "released_pqm_loss(variant='theorem') is the released form of eq. 9"
        )
    chain = _Chain(check, scores, labels, zeta)
    if variant in ("theorem", "printed"):
        prompt, steps = chain.terms(chain.wrong, ranked="falling" if variant == "theorem" else "rising")
        return chain.mean(ratio(prompt + steps.sum(1), chain.length))
    first = chain.wrong & (chain.wrong.cumsum(1) == 1)
    prompt, steps = chain.terms(chain.wrong if variant == "pqm" else first)
    return chain.mean(_choice(chain, prompt, steps, released=normalization == "released"))


def released_pqm_loss(scores: Tensor, labels: Tensor, *, zeta: float = 4.0, variant: ReleasedVariant = "pqm") -> Tensor:
    """What the released programs of [Q] compute, their quirks included, but finite where they overflow.

    Arguments and result as in `pqm_loss`; every denominator has 1e-5 more. "pqm" is eq. 10 with the released
    normalization. "first_wrong" is their ablation of eq. 12: ``zeta`` is not used, and the first wrong step is taken to
    be number |C| of the row, whatever its label, which is right for labels like 1 1 1 0 0. "theorem" is their eq. 9:
    correct steps and prompt over n + 1 for a row of n steps, wrong steps over n and without the last column (so that
    padding behind the last step matters), and each correct step but one of the first column counted twice in its own
    denominator.
    """
    check = Check("released_pqm_loss")
    option("released_pqm_loss: variant", variant, ("pqm", "theorem", "first_wrong"))
    chain = _Chain(check, scores, labels, 0.0 if variant == "first_wrong" else zeta, floor=math.log(_RELEASED_EPS))
    if variant == "theorem":
        prompt, steps = chain.terms(chain.wrong, ranked="falling", twice=True)
        prompt = torch.where(chain.has_wrong, prompt, 0.0)
        above = prompt + torch.where(chain.correct, steps, 0.0).sum(1)
        below = torch.where(chain.wrong, steps, 0.0)[:, :-1].sum(1)
        return chain.mean(ratio(above, chain.length + 1) + ratio(below, chain.length))
    wrong = chain.wrong
    if variant == "first_wrong":
        place = torch.arange(wrong.shape[1], device=wrong.device)
        wrong = (place == chain.correct.sum(1, keepdim=True)) & chain.has_wrong.unsqueeze(1) & chain.step
    prompt, steps = chain.terms(wrong)
    return chain.mean(_choice(chain, prompt, steps, released=True))


def _choice(chain: _Chain, prompt: Tensor, steps: Tensor, *, released: bool) -> Tensor:
    """[B] eq. 10 and 12 from their terms."""
    count = chain.correct.sum(1).to(steps.dtype)
    total = torch.where(chain.correct, steps, 0.0).sum(1)
    if released:
        return ratio(torch.where(chain.has_wrong, prompt, 0.0) + total, count + chain.has_wrong)
    return ratio(prompt + total, count)


class _Chain:
    """A batch of chains of steps, and the terms -log(exp(own) / (exp(own) + sum of exp(others))) of its rankings."""

    def __init__(
        self, check: Check, scores: Tensor, labels: Tensor, zeta: float, *, floor: float | None = None
    ) -> None:
        check.tensor("scores", scores, ndim=2)
        self.zeta, self.floor = check.number("zeta", zeta), floor
        if not math.isfinite(self.zeta):
            raise ValueError(f"{check.op}: zeta must be finite, got {zeta}")
        marks = read_labels(check, labels, scores, hard=True)
        self.correct, self.wrong, self.step = marks == 1, marks == 0, marks != PADDING
        self.has_wrong = self.wrong.any(1)
        self.length = self.step.sum(1).to(marks.dtype)
        self.score = masked(scores, self.step)

    def mean(self, per_row: Tensor) -> Tensor:
        """Mean over the rows that have a step."""
        return masked_mean(per_row, self.step.any(1))

    def terms(
        self, below: Tensor, *, ranked: Literal["falling", "rising"] | None = None, twice: bool = False
    ) -> tuple[Tensor, Tensor]:
        """The terms of the prompt [B] and of all steps [B, H], 0 in padding and, unless ``ranked``, at wrong steps.

        Prompt and correct steps beat the steps ``below`` [B, H], correct ones also the prompt and the correct ones
        before them. ``ranked``: wrong steps beat the wrong ones after them ("falling") or before them ("rising").
        ``twice``: correct steps but of the first column also stand among their own others.
        """
        value, good, bad, under = (
            torch.nn.functional.pad(part, (1, 0), value=prompt)
            for part, prompt in ((self.score, 0.0), (self.correct, True), (self.wrong, False), (below, False))
        )
        place = torch.arange(value.shape[1], device=value.device)
        before = place < place.unsqueeze(1)  # [own, other]: all masks below are [B, own, other]
        winner = good.unsqueeze(2)
        passed, fixed = winner & good.unsqueeze(1) & before, winner & under.unsqueeze(1)
        others = passed | fixed
        if ranked is not None:
            others = others | (bad.unsqueeze(2) & bad.unsqueeze(1) & (before.T if ranked == "falling" else before))
        if twice:
            others = others | (winner & torch.diag_embed(place > 1))
        zeta = torch.tensor(self.zeta, dtype=value.dtype, device=value.device)
        # below and passed at once is only what the released "first wrong step" of mixed rows can be: counted both ways
        shift = torch.where(fixed, torch.where(passed, softplus(zeta), zeta), 0.0)
        terms = torch.where(good if ranked is None else good | bad, self._beat(value, others, shift), 0.0)
        return terms[:, 0], terms[:, 1:]

    def _beat(self, value: Tensor, others: Tensor, shift: Tensor) -> Tensor:
        """[B, J] ``log(1 + sum_j exp(value_j + shift_tj - value_t))`` over the others [B, t, j] of each t."""
        nothing = torch.finfo(value.dtype).min / 4  # a number, so that no -inf meets another
        rival = value.unsqueeze(1)
        # differences from the largest, not sums of large numbers: float32 holds 1e-5 for scores of any size
        top = torch.where(others, rival, nothing).detach().amax(2, keepdim=True)
        top = torch.where(others.any(2, keepdim=True), top, 0.0)
        if self.floor is not None:
            top = top.clamp_min(self.floor)
        exponent = torch.where(others, (rival - top) + shift, nothing)
        if self.floor is not None:
            exponent = torch.cat([exponent, self.floor - top], 2)
        return softplus(torch.logsumexp(exponent, 2) + (top.squeeze(2) - value))
