"""The loop of DistRL, and of the methods it is compared with: one code path, a configuration each.

A step: rollouts of the policy, verified; an online update of the reward model; TD of candidates; advantages; an update
of the policy. ``LoopConfig.grpo()``, ``.grpo_ipvrm()``, ``.distrl_ipvrm()``, ``.distrl_released()``,
``.distrl_implicit()``, ``.prime()`` and ``.reinforce()`` differ in numbers alone.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prmfast._files import atomic_path
from prmfast._progress import progress as progress_bar
from prmfast.distrl.advantages import Advantages, distrl_advantages, outcome_advantages
from prmfast.distrl.analysis import pairwise_accuracy, rm_score, sign_accuracy, td_outcome_correlation
from prmfast.distrl.candidates import likely, released_candidates, sampled_logp, sampled_td, without_last_token
from prmfast.distrl.config import LoopConfig
from prmfast.distrl.losses import DistRLLoss
from prmfast.distrl.models import LanguageModel, Outputs, collect, descend
from prmfast.distrl.phases import Phases
from prmfast.distrl.rollouts import Reward, Rollouts, choose, draw
from prmfast.engines.base import Engine
from prmfast.ops import ias_allocate
from prmfast.prm.losses import implicit_prm_loss, online_ipvrm_loss, online_terms

logger = logging.getLogger("prmfast.distrl")

CHECKPOINT_NAME = "distrl.pt"


class Loop:
    """Trains ``policy`` in place.

    Args:
        policy: a `LanguageModel`.
        engine: gives an engine that samples from the policy as it is now, at ``config.temperature``.
        questions: prompts to draw from, at least ``config.prompts * config.oversample``.
        reward: the verifier; `Reward`.
        config: `LoopConfig`.
        reward_model: starts the online reward model; default: a copy of the policy. Trained in place.
        reference: of ``config.reference="fixed"``; default: a copy of the policy.
        quantiles: with ``config.adaptive``, what a calibrator says of prompts: quantiles [B, M] of the probability that
            an answer is correct; `ias_allocate` spreads the answers of a step by them.
        device: where the models stand, for the memory measurement and packed tokens.
    """

    def __init__(
        self,
        policy: LanguageModel,
        engine: Callable[[], Engine],
        questions: Sequence[str],
        reward: Reward,
        *,
        config: LoopConfig,
        reward_model: LanguageModel | None = None,
        reference: LanguageModel | None = None,
        quantiles: Callable[[Sequence[str]], Tensor] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.drawn = math.ceil(config.prompts * config.oversample)
        if len(questions) < self.drawn:
            raise ValueError(f"questions must be at least {self.drawn} (prompts * oversample), got {len(questions)}")
        if config.adaptive != (quantiles is not None):
            given = "None" if quantiles is None else "a function"
            raise ValueError(f"quantiles must be given where config.adaptive is on and only there, got {given}")
        if reward_model is not None and config.reward == "none":
            raise ValueError("reward_model must be None where config.reward is 'none', got a model")
        if reference is not None and (config.reward == "none" or config.reference != "fixed"):
            raise ValueError("reference must be None where config.reference is not 'fixed', got a model")
        self.quantiles = quantiles
        self.policy, self.engine, self.questions, self.reward, self.config = policy, engine, questions, reward, config
        self.device, self.step, self.history = device, 0, list[dict[str, Any]]()
        self.reward_model: LanguageModel | None = None
        self.reference: LanguageModel | None = None
        self._optimizers = {"policy": torch.optim.AdamW(policy.parameters(), lr=config.policy_rate, weight_decay=0.0)}
        if config.reward != "none":
            self.reward_model = copy.deepcopy(policy) if reward_model is None else reward_model
            parameters = self.reward_model.parameters()
            self._optimizers["reward"] = torch.optim.AdamW(parameters, lr=config.reward_rate, weight_decay=0.0)
            if config.reference == "fixed":
                self.reference = copy.deepcopy(policy) if reference is None else reference

    def run(
        self,
        steps: int,
        *,
        directory: str | os.PathLike[str] | None = None,
        every: int = 10,
        on_step: Callable[[int, dict[str, Any]], None] | None = None,
        show: bool = True,
    ) -> list[dict[str, Any]]:
        """Trains until step ``steps`` and returns one record of numbers (and ``reasons``) per step.

        directory: a checkpoint is written there every ``every`` steps and at the end; where one of the same
        configuration lies, the loop goes on from it, bit-equal on the CPU. on_step: gets (step, record), for a logger
        (`tensorboard_logger`). show: a progress bar.

        Raises:
            ValueError: a checkpoint of another configuration, or a file that is none.
        """
        path = None if directory is None else Path(directory) / CHECKPOINT_NAME
        if path is not None and path.exists():
            self._restore(path)
        with progress_bar(steps, "distrl", show) as bar:
            bar.advance(self.step)
            while self.step < steps:
                record = self.advance()
                bar.advance()
                bar.update(reward=record["outcome"], loss=record.get("loss", 0.0))
                if on_step is not None:
                    on_step(self.step, record)
                if path is not None and (self.step % every == 0 or self.step == steps):
                    self._save(path)
        return self.history

    def advance(self) -> dict[str, Any]:
        """One step of training; its record is the last of ``history`` too."""
        phases = Phases(self.device)
        with phases("rollout"):
            drawn = self._rollouts()
        kept, reasons = choose(drawn, prompts=self.config.prompts, mixed_only=self.config.mixed_only)
        known = drawn.outcome[drawn.outcome.isfinite()]
        record: dict[str, Any] = {
            "outcome": float(known.mean()) if len(known) else 0.0,
            "answers": len(kept.answers),
            "tokens": int(kept.length.sum()),
            "finished": float(drawn.finished.float().mean()),
        }
        if record["tokens"]:
            batch = _Batch(kept, self.device)
            with phases("old"):
                old = self._outputs(self.policy, kept)
            base = old
            if self.reference is not None:
                with phases("reference"):
                    base = self._outputs(self.reference, kept)
            if self.reward_model is not None:
                with phases("reward"):
                    record |= self._update_reward(batch, base)
            with phases("advantages"):
                advantages, old_logp, found = self._advantages(batch, old, base)
            del old, base
            with phases("policy"):
                record |= self._update_policy(batch, advantages, old_logp)
            reasons += advantages.reasons
            record |= found
        else:
            reasons += ("no token was kept: the policy stays as it is",)
            logger.warning(reasons[-1])
        self.step += 1
        self.history.append(record | phases.metrics() | {"step": self.step, "reasons": list(reasons)})
        return self.history[-1]

    def _rollouts(self) -> Rollouts:
        """Drawn anew from (seed, step) alone: nothing has to be remembered between steps."""
        key = hashlib.blake2b(f"{self.config.seed} {self.step}".encode(), digest_size=7).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key, "little"))
        picked = torch.randperm(len(self.questions), generator=generator)[: self.drawn].tolist()
        first = int(torch.randint(0, 2**40, (), generator=generator)) * 2**20
        prompts, config = [self.questions[i] for i in picked], self.config
        counts = [config.samples] * len(prompts)
        if self.quantiles is not None:
            total, most = config.prompts * config.samples, config.max_samples
            counts = ias_allocate(self.quantiles(prompts), total, most, n_min=config.min_samples).tolist()
        return draw(self.engine(), prompts, counts, self.reward, first_seed=first)

    def _outputs(self, model: LanguageModel, rollouts: Rollouts) -> Outputs:
        return collect(model, rollouts.prompts, rollouts.answers, self.config.answers_per_pass)

    def _update_reward(self, batch: _Batch, base: Outputs) -> dict[str, Any]:
        """One step of the reward model on answers with a known outcome; its accuracy before the step."""
        assert self.reward_model is not None
        config, known = self.config, batch.outcome.isfinite()
        temperature = config.temperature if self.reference is None else 1.0  # the behaviour policy is what sampled
        with torch.no_grad():
            base_logp = base.logprob(batch.ids, temperature=temperature)
        labels, groups, mask = batch.outcome[known], batch.group[known], batch.mask[known]
        if not len(labels):
            return {"rm_loss": 0.0}
        record: dict[str, Any] = {}

        def loss_of(phi: Outputs) -> Tensor:
            table = batch.padded(phi.logprob(batch.ids) - base_logp)[known]
            score = torch.where(mask, table.detach(), 0.0).sum(1)
            record["rm_pairwise_accuracy"] = pairwise_accuracy(score, labels, group=groups)
            record["rm_sign_accuracy"] = sign_accuracy(score, labels)
            return self._reward_loss(table, labels, groups, mask)

        record["rm_loss"], _ = self._descend("reward", self.reward_model, batch, loss_of)
        return record

    def _reward_loss(self, table: Tensor, labels: Tensor, groups: Tensor, mask: Tensor) -> Tensor:
        """Of log-ratios [S, T]."""
        config = self.config
        shape: dict[str, Any] = {"margin": config.margin, "adb": config.adb, "dlw": config.dlw}
        shape["variant"] = config.reward_variant
        if config.reward == "ipvrm":
            return online_ipvrm_loss(table, labels, groups, mask=mask, beta=config.beta, **shape)
        terms = online_terms(labels, groups, **shape)
        return implicit_prm_loss(table, labels, mask=mask, beta=config.beta, margin=terms.margin, weight=terms.weight)

    @torch.no_grad()
    def _advantages(
        self, batch: _Batch, old: Outputs, base: Outputs
    ) -> tuple[Advantages, Tensor, dict[str, float | None]]:
        """Advantages, log pi_old of the sampled tokens, and what was measured on the way."""
        config, offsets = self.config, batch.offsets
        group = torch.zeros_like(batch.group) if config.baseline == "batch" else batch.group
        if self.reward_model is None:
            logp = old.logprob(batch.ids, temperature=config.temperature)
            return outcome_advantages(batch.outcome, group=group, offsets=offsets), logp, {}
        reward = self._outputs(self.reward_model, batch.rollouts)
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
        logp, td = sampled_logp(found, batch.ids), sampled_td(found, batch.ids)
        score = rm_score(td, offsets=offsets, reward=config.reward)
        if config.advantage.variant == "released":
            td = without_last_token(td, offsets=offsets)
        if config.loss.variant == "released":
            chosen = released_candidates(found, batch.ids, offsets=offsets, p_min=config.p_min)
        else:
            chosen = likely(found, p_min=config.p_min)
        made = distrl_advantages(chosen, td, batch.outcome, group=group, offsets=offsets, rule=config.advantage)
        correlation = td_outcome_correlation(td, batch.outcome, offsets=offsets)
        return made, logp, {"td_outcome_correlation": correlation, "sigma_v": made.sigma_v, "rm_score": score}

    def _update_policy(self, batch: _Batch, advantages: Advantages, old_logp: Tensor) -> dict[str, float]:
        found: list[DistRLLoss] = []

        def loss_of(theta: Outputs) -> Tensor:
            rule, temperature = self.config.loss, self.config.temperature
            at = partial(theta.loss, sampled=batch.ids, old_logp=old_logp, offsets=batch.offsets)
            found.append(at(advantages, rule=rule, temperature=temperature))
            return found[-1].loss

        for _ in range(self.config.updates):
            _, norm = self._descend("policy", self.policy, batch, loss_of)
        return found[-1].metrics() | {"gradient_norm": norm}

    def _descend(
        self, name: str, model: LanguageModel, batch: _Batch, loss_of: Callable[[Outputs], Tensor]
    ) -> tuple[float, float]:
        """One step of AdamW; loss and gradient norm. A gradient that is not finite moves nothing, which is logged."""
        optimizer, parameters = self._optimizers[name], list(model.parameters())
        optimizer.zero_grad()
        loss = descend(model, batch.rollouts.prompts, batch.rollouts.answers, loss_of, self.config.answers_per_pass)
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, self.config.max_norm))
        if math.isfinite(norm):
            optimizer.step()
        else:
            logger.warning("the gradient norm of the %s is %s: step %d leaves it as it is", name, norm, self.step)
        return loss, norm

    def _fingerprint(self) -> str:
        return hashlib.sha256(json.dumps([asdict(self.config), list(self.questions)]).encode()).hexdigest()

    def _models(self) -> dict[str, LanguageModel]:
        named = {"policy": self.policy, "reward": self.reward_model, "reference": self.reference}
        return {name: model for name, model in named.items() if model is not None}

    def _save(self, path: Path) -> None:
        state = {
            "fingerprint": self._fingerprint(),
            "step": self.step,
            "history": self.history,
            "models": {name: dict(model.state_dict()) for name, model in self._models().items()},
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self._optimizers.items()},
        }
        with atomic_path(path) as temporary:
            torch.save(state, temporary)

    def _restore(self, path: Path) -> None:
        try:
            state = torch.load(path, weights_only=True, map_location=self.device)
            found = state["fingerprint"]
        except Exception as error:
            raise ValueError(
                f"{path} is not a checkpoint of a loop ({error}); remove it or choose another directory"
            ) from error
        if found != self._fingerprint():
            raise ValueError(f"{path} belongs to another configuration; remove it or choose another directory")
        for name, model in self._models().items():
            model.load_state_dict(state["models"][name])
        for name, optimizer in self._optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
        self.step, self.history = state["step"], state["history"]


class _Batch:
    """Rollouts as tensors on the device."""

    def __init__(self, rollouts: Rollouts, device: torch.device | str) -> None:
        self.rollouts = rollouts
        self.ids, self.offsets = rollouts.token_ids.to(device), rollouts.offsets.to(device)
        self.outcome, self.group = rollouts.outcome.to(device), rollouts.group.to(device)
        length = self.offsets.diff()
        self.mask = torch.arange(int(length.max()), device=device) < length[:, None]

    def padded(self, packed: Tensor) -> Tensor:
        """[N] -> [S, T], 0 at padding; differentiable."""
        return packed.new_zeros(self.mask.shape).masked_scatter(self.mask, packed)
