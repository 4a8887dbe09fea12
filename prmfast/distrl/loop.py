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
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prmfast._files import atomic_path
from prmfast._progress import progress as progress_bar
from prmfast.distrl.advantages import AdvantageRule, Advantages, distrl_advantages, outcome_advantages
from prmfast.distrl.analysis import pairwise_accuracy, sign_accuracy, td_outcome_correlation
from prmfast.distrl.candidates import likely, released_candidates, sampled_logp, sampled_td, without_last_token
from prmfast.distrl.losses import LossRule
from prmfast.distrl.models import LanguageModel, Outputs
from prmfast.distrl.phases import Phases
from prmfast.distrl.rollouts import Reward, Rollouts, choose, draw
from prmfast.engines.base import Engine
from prmfast.prm.losses import implicit_prm_loss, online_ipvrm_loss, online_terms

logger = logging.getLogger("prmfast.distrl")

CHECKPOINT_NAME = "distrl.pt"


@dataclass(frozen=True, slots=True)
class LoopConfig:
    """One method with its sizes.

    prompts, samples: prompts of a step and answers of each. oversample: how many times as many prompts are drawn, those
    that teach being kept; mixed_only keeps no others. seed: of prompts and answers.
    reward: "none" | "ipvrm" | "implicit", the online reward model. reference: what its log-ratio is taken against,
    "behaviour" (the policy that sampled) or "fixed" (the policy at the start). beta, margin, adb, dlw: of its loss
    (`online_ipvrm_loss`, or `implicit_prm_loss` with the terms of `online_terms`); beta scales TD too. reward_variant:
    "paper" | "released".
    p_min: of candidates. baseline: outcomes are normalised over the "prompt" or over the whole "batch".
    advantage, loss: `AdvantageRule` and `LossRule`; updates: policy updates a step; rates of AdamW; temperature of
    sampling. max_norm: of each gradient.
    """

    prompts: int = 32
    samples: int = 8
    oversample: float = 1.0
    mixed_only: bool = False
    seed: int = 0
    reward: str = "ipvrm"
    reference: str = "behaviour"
    beta: float = 10.0
    margin: float = 5.0
    adb: bool = True
    dlw: bool = True
    reward_variant: str = "paper"
    p_min: float = 0.1
    baseline: str = "prompt"
    advantage: AdvantageRule = field(default_factory=AdvantageRule)
    loss: LossRule = field(default_factory=LossRule)
    updates: int = 1
    policy_rate: float = 1e-6
    reward_rate: float = 1e-6
    temperature: float = 1.0
    max_norm: float = 1.0

    def __post_init__(self) -> None:
        for name, allowed in (
            ("reward", ("none", "ipvrm", "implicit")),
            ("reference", ("behaviour", "fixed")),
            ("reward_variant", ("paper", "released")),
            ("baseline", ("prompt", "batch")),
        ):
            if getattr(self, name) not in allowed:
                listed = " or ".join(repr(one) for one in allowed)
                raise ValueError(f"{name} must be {listed}, got {getattr(self, name)!r}")
        for name in ("prompts", "samples", "updates"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        for name in ("beta", "policy_rate", "reward_rate", "temperature", "max_norm"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be > 0 and finite, got {getattr(self, name)}")
        if not 1 <= self.oversample < math.inf:
            raise ValueError(f"oversample must be >= 1 and finite, got {self.oversample}")
        if self.reward == "none" and self.loss.alpha:
            raise ValueError(f"loss.alpha must be 0 where reward is 'none', got {self.loss.alpha}")

    @classmethod
    def distrl_ipvrm(cls, **changes: Any) -> LoopConfig:
        """The paper's method: IPVRM with ADB and DLW, token and distribution-level updates."""
        return cls(**changes)

    @classmethod
    def distrl_released(cls, **changes: Any) -> LoopConfig:
        """What the released program computes under that name: its advantages, losses, sets and online weights."""
        rules = {"advantage": AdvantageRule.released(), "loss": LossRule.released()}
        return replace(cls(reward_variant="released", **rules), **changes)  # type: ignore[arg-type]

    @classmethod
    def distrl_implicit(cls, **changes: Any) -> LoopConfig:
        """The same with an implicit PRM, trained on whole answers (beta 0.05, no margin)."""
        return replace(cls(reward="implicit", beta=0.05, margin=0.0, adb=False, dlw=False), **changes)

    @classmethod
    def grpo_ipvrm(cls, **changes: Any) -> LoopConfig:
        """Outcome and TD advantages of the sampled tokens, no distribution-level term."""
        return replace(cls(loss=LossRule(alpha=0.0)), **changes)

    @classmethod
    def prime(cls, **changes: Any) -> LoopConfig:
        """PRIME-style: implicit PRM against the fixed reference, Monte-Carlo token rewards, no candidates."""
        plain = cls.distrl_implicit(reference="fixed", loss=LossRule(alpha=0.0))
        return replace(plain, **changes)

    @classmethod
    def grpo(cls, **changes: Any) -> LoopConfig:
        """Group-normalised outcomes, clip 1 - 0.20 .. 1 + 0.28, no reward model."""
        return replace(cls(reward="none", loss=LossRule(alpha=0.0)), **changes)

    @classmethod
    def reinforce(cls, **changes: Any) -> LoopConfig:
        """Outcomes normalised over the whole batch, one update of a batch (where no ratio is clipped)."""
        return replace(cls.grpo(baseline="batch"), **changes)


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
        device: torch.device | str = "cpu",
    ) -> None:
        self.drawn = math.ceil(config.prompts * config.oversample)
        if len(questions) < self.drawn:
            raise ValueError(f"questions must be at least {self.drawn} (prompts * oversample), got {len(questions)}")
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
            with torch.no_grad(), phases("old"):
                old = self.policy.outputs(kept.prompts, kept.answers)
            base = old if self.reference is None else self._reference_outputs(kept, phases)
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
        seeds = range(first, first + self.config.samples)
        return draw(self.engine(), [self.questions[i] for i in picked], seeds, self.reward)

    def _reference_outputs(self, kept: Rollouts, phases: Phases) -> Outputs:
        assert self.reference is not None
        with torch.no_grad(), phases("reference"):
            return self.reference.outputs(kept.prompts, kept.answers)

    def _update_reward(self, batch: _Batch, base: Outputs) -> dict[str, Any]:
        """One step of the reward model on answers with a known outcome; its accuracy before the step."""
        assert self.reward_model is not None
        config, known = self.config, batch.outcome.isfinite()
        phi = self.reward_model.outputs(batch.rollouts.prompts, batch.rollouts.answers)
        temperature = config.temperature if self.reference is None else 1.0  # the behaviour policy is what sampled
        with torch.no_grad():
            base_logp = base.logprob(batch.ids, temperature=temperature)
        ratio = phi.logprob(batch.ids) - base_logp
        table, mask = batch.padded(ratio), batch.mask
        labels, groups, table, mask = batch.outcome[known], batch.rollouts.group[known.cpu()], table[known], mask[known]
        if not len(labels):
            return {"rm_loss": 0.0}
        groups = groups.to(labels.device)
        if config.reward == "ipvrm":
            shape = {"beta": config.beta, "margin": config.margin, "adb": config.adb, "dlw": config.dlw}
            loss = online_ipvrm_loss(table, labels, groups, mask=mask, variant=config.reward_variant, **shape)  # type: ignore[arg-type]
        else:
            terms = online_terms(labels, groups, margin=config.margin, adb=config.adb, dlw=config.dlw)
            loss = implicit_prm_loss(
                table, labels, mask=mask, beta=config.beta, margin=terms.margin, weight=terms.weight
            )
        self._descend("reward", loss, self.reward_model)
        score = torch.where(mask, table.detach(), 0.0).sum(1)
        return {
            "rm_loss": loss.item(),
            "rm_pairwise_accuracy": pairwise_accuracy(score, labels, group=groups),
            "rm_sign_accuracy": sign_accuracy(score, labels),
        }

    @torch.no_grad()
    def _advantages(
        self, batch: _Batch, old: Outputs, base: Outputs
    ) -> tuple[Advantages, Tensor, dict[str, float | None]]:
        """Advantages, log pi_old of the sampled tokens, and what was measured on the way."""
        config, offsets = self.config, batch.offsets
        group = batch.rollouts.group.to(batch.outcome.device)
        if config.baseline == "batch":
            group = torch.zeros_like(group)
        if self.reward_model is None:
            logp = old.logprob(batch.ids, temperature=config.temperature)
            return outcome_advantages(batch.outcome, group=group, offsets=offsets), logp, {}
        reward = self.reward_model.outputs(batch.rollouts.prompts, batch.rollouts.answers)
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
        if config.advantage.variant == "released":
            td = without_last_token(td, offsets=offsets)
        if config.loss.variant == "released":
            chosen = released_candidates(found, batch.ids, offsets=offsets, p_min=config.p_min)
        else:
            chosen = likely(found, p_min=config.p_min)
        made = distrl_advantages(chosen, td, batch.outcome, group=group, offsets=offsets, rule=config.advantage)
        correlation = td_outcome_correlation(td, batch.outcome, offsets=offsets)
        return made, logp, {"td_outcome_correlation": correlation, "sigma_v": made.sigma_v}

    def _update_policy(self, batch: _Batch, advantages: Advantages, old_logp: Tensor) -> dict[str, float]:
        metrics: dict[str, float] = {}
        for _ in range(self.config.updates):
            found = self.policy.outputs(batch.rollouts.prompts, batch.rollouts.answers).loss(
                advantages,
                sampled=batch.ids,
                old_logp=old_logp,
                offsets=batch.offsets,
                rule=self.config.loss,
                temperature=self.config.temperature,
            )
            norm = self._descend("policy", found.loss, self.policy)
            metrics = found.metrics() | {"gradient_norm": norm}
        return metrics

    def _descend(self, name: str, loss: Tensor, model: LanguageModel) -> float:
        """One step of AdamW; a gradient that is not finite leaves the weights as they are, with a logged reason."""
        optimizer, parameters = self._optimizers[name], list(model.parameters())
        optimizer.zero_grad()
        loss.backward()
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, self.config.max_norm))
        if math.isfinite(norm):
            optimizer.step()
        else:
            logger.warning("the gradient norm of the %s is %s: step %d leaves it as it is", name, norm, self.step)
        return norm

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
        self.outcome = rollouts.outcome.to(device)
        length = self.offsets.diff()
        self.mask = torch.arange(int(length.max()), device=device) < length[:, None]

    def padded(self, packed: Tensor) -> Tensor:
        """[N] -> [S, T], 0 at padding; differentiable."""
        return packed.new_zeros(self.mask.shape).masked_scatter(self.mask, packed)
