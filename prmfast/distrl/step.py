"""What a step computes from the outputs of its models, over the answers of all processes: the loop and the TRL trainer
share it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from prmfast.distrl.advantages import Advantages, distrl_advantages, outcome_advantages
from prmfast.distrl.analysis import pairwise_accuracy, rm_score, sign_accuracy, td_outcome_correlation
from prmfast.distrl.candidates import likely, released_candidates, sampled_logp, sampled_td, without_last_token
from prmfast.distrl.config import LoopConfig
from prmfast.distrl.losses import DistRLLoss
from prmfast.distrl.models import LanguageModel, Outputs, descend
from prmfast.distrl.processes import Processes
from prmfast.prm.losses import implicit_prm_loss, online_ipvrm_loss, online_terms

logger = logging.getLogger("prmfast.distrl")


@dataclass(frozen=True)
class Batch:
    """The sampled tokens of this process, and what is known of the answers of all of them.

    ids: int64 [N], tokens of this process's answers; offsets: int64 [S + 1]. all_offsets: int64 [G + 1] of the G
    answers of all processes, this one's among them. outcome: [G], what advantages are made of; label: [G], what the
    reward model learns, 1 correct and 0 wrong; both NaN where unknown. group: int64 [G], the prompt.
    """

    ids: Tensor
    offsets: Tensor
    all_offsets: Tensor
    outcome: Tensor
    label: Tensor
    group: Tensor
    processes: Processes

    @cached_property
    def mask(self) -> Tensor:
        """bool [G, T]: the tokens of all answers, padded on the right."""
        length = self.all_offsets.diff()
        longest = int(length.max()) if len(length) else 0
        return torch.arange(longest, device=length.device) < length[:, None]

    def padded(self, packed: Tensor) -> Tensor:
        """[tokens of all processes] -> [G, T], 0 at padding; differentiable."""
        return packed.new_zeros(self.mask.shape).masked_scatter(self.mask, packed)


def reward_loss(log_ratio: Tensor, batch: Batch, config: LoopConfig) -> tuple[Tensor, dict[str, float]]:
    """Loss of the reward model over the answers of all processes with a known label, differentiable in ``log_ratio``
    [N] of this process; and how well it told right from wrong. A loss of 0 where no label is known.
    """
    known = batch.label.isfinite()
    every = batch.padded(batch.processes.joined(log_ratio))
    table, labels, groups, mask = every[known], batch.label[known], batch.group[known], batch.mask[known]
    if not len(labels):
        return 0.0 * log_ratio.sum(), {}
    score = torch.where(mask, table.detach(), 0.0).sum(1)
    record = {
        "rm_pairwise_accuracy": pairwise_accuracy(score, labels, group=groups),
        "rm_sign_accuracy": sign_accuracy(score, labels),
    }
    shape: dict[str, Any] = {"margin": config.margin, "adb": config.adb, "dlw": config.dlw}
    shape["variant"] = config.reward_variant
    if config.reward == "ipvrm":
        return online_ipvrm_loss(table, labels, groups, mask=mask, beta=config.beta, **shape), record
    terms = online_terms(labels, groups, **shape)
    loss = implicit_prm_loss(table, labels, mask=mask, beta=config.beta, margin=terms.margin, weight=terms.weight)
    return loss, record


@torch.no_grad()
def step_advantages(
    batch: Batch, old: Outputs, base: Outputs, reward: Outputs | None, config: LoopConfig
) -> tuple[Advantages, Tensor, dict[str, float | None]]:
    """Advantages of this process's tokens, log pi_old of those sampled, [N], and what was measured on the way.

    old: the policy that sampled; base: what the reward model's log-ratios are taken against, ``old`` itself or a fixed
    reference; reward: the reward model, None for outcomes alone. Statistics are those of all processes' answers.
    """
    processes = batch.processes
    rows = processes.own_rows(len(batch.ids))
    if reward is None:
        group = torch.zeros_like(batch.group) if config.baseline == "batch" else batch.group
        logp = old.logprob(batch.ids, temperature=config.temperature)
        made = outcome_advantages(batch.outcome, group=group, offsets=batch.all_offsets)
        return _own(made, processes, rows), logp, {}
    against_old = partial(
        old.candidates,
        sampled=batch.ids,
        p_min=config.p_min,
        beta=config.beta,
        temperature=config.temperature,
    )
    found = against_old(reward)
    if base is not old:  # log phi - log ref = (log phi - log old) - (log ref - log old)
        found = found._replace(advantage=found.advantage - against_old(base).advantage)
    offsets = batch.all_offsets
    logp, td = sampled_logp(found, batch.ids), processes.gather(sampled_td(found, batch.ids))
    score = rm_score(td, offsets=offsets, reward=config.reward)
    if config.advantage.variant == "released":
        td = without_last_token(td, offsets=offsets)
    if config.loss.variant == "released":
        chosen = released_candidates(found, batch.ids, offsets=batch.offsets, p_min=config.p_min)
    else:
        chosen = likely(found, p_min=config.p_min)
    chosen = processes.gather_candidates(chosen)
    group = torch.zeros_like(batch.group) if config.baseline == "batch" else batch.group
    made = distrl_advantages(chosen, td, batch.outcome, group=group, offsets=offsets, rule=config.advantage)
    correlation = td_outcome_correlation(td, batch.outcome, offsets=offsets)
    measured = {"td_outcome_correlation": correlation, "sigma_v": made.sigma_v, "rm_score": score}
    return _own(made, processes, rows), logp, measured


def _own(made: Advantages, processes: Processes, rows: slice) -> Advantages:
    """What belongs to this process's tokens."""
    if processes.count == 1:
        return made
    candidates = processes.own_candidates(made.candidates, rows)
    return Advantages(made.token[rows], candidates, made.outcome, made.sigma_v, made.reasons)


def update(
    model: LanguageModel,
    optimizer: torch.optim.Optimizer,
    prompts: Sequence[Any],
    answers: Sequence[Sequence[int]],
    loss_of: Callable[[Outputs], Tensor],
    *,
    processes: Processes,
    max_norm: float,
    size: int | None,
    name: str,
) -> tuple[float, float]:
    """One step of the optimiser along the sum of the processes' gradients; the loss and the norm of that sum.

    A gradient that is not finite moves nothing, which is logged under ``name``.
    """
    parameters = list(model.parameters())
    optimizer.zero_grad()
    loss = descend(model, prompts, answers, loss_of, size)
    processes.sum_gradients(parameters)
    norm = float(torch.nn.utils.clip_grad_norm_(parameters, max_norm))
    if math.isfinite(norm):
        optimizer.step()
    else:
        logger.warning("the gradient norm of the %s is %s: this step leaves it as it is", name, norm)
    return loss, norm


def policy_loss(found: DistRLLoss, batch: Batch, config: LoopConfig) -> tuple[Tensor, dict[str, float]]:
    """This process's part of the loss over all answers, the parts summing to it; and the numbers of the whole."""
    numbers = found.metrics()
    if batch.processes.count == 1:
        return found.loss, numbers
    tokens, filled = len(batch.ids), int((batch.offsets.diff() > 0).sum())
    own = torch.tensor(
        [tokens, filled, found.dist.candidates_per_token * tokens, found.dist.mass * tokens],
        dtype=torch.float64,
        device=batch.ids.device,
    )
    of_tokens, of_answers, of_entries, of_mass = (own / batch.processes.sum(own).clamp(min=1e-300)).tolist()
    paper = config.loss.variant == "paper"
    shares = {"tok_loss": of_answers if paper else of_tokens, "dist_loss": of_answers if paper else of_mass}
    loss = shares["tok_loss"] * found.tok.loss
    if config.loss.alpha:
        loss = loss + config.loss.alpha * shares["dist_loss"] * found.dist.loss
    per_entry = ("dist_clip_fraction", "dist_dual_clip_fraction", "dist_approx_kl")
    shares |= {name: of_entries if name in per_entry else of_tokens for name in numbers if name not in shares}
    parts = torch.tensor([numbers[name] * share for name, share in shares.items()], dtype=own.dtype, device=own.device)
    record = dict(zip(shares, batch.processes.sum(parts).tolist(), strict=True))
    return loss, record | {"loss": record["tok_loss"] + config.loss.alpha * record["dist_loss"]}
