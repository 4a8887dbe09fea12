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
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prmfast._files import atomic_path
from prmfast._progress import progress as progress_bar
from prmfast.distrl.advantages import Advantages
from prmfast.distrl.config import LoopConfig
from prmfast.distrl.models import LanguageModel, Outputs, check_apart, collect
from prmfast.distrl.phases import Phases
from prmfast.distrl.processes import Processes
from prmfast.distrl.rollouts import Reward, Rollouts, choose, draw, joined
from prmfast.distrl.step import Batch, policy_loss, reward_loss, step_advantages, update
from prmfast.engines.base import Engine
from prmfast.ops import ias_allocate

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
        reward_model: starts the online reward model; default: a copy of the policy. Trained in place, with parameters
            of its own.
        reference: of ``config.reference="fixed"``; default: a copy of the policy.
        quantiles: with ``config.adaptive``, what a calibrator says of prompts: quantiles [B, M] of the probability that
            an answer is correct; `ias_allocate` spreads the answers of a step by them.
        device: where the models stand, for the memory measurement and packed tokens.
        accelerator: an `accelerate.Accelerator`: its processes share the prompts of a step, then the answers that are
            kept, and do what one process does. Every process makes the same `Loop`; the weights it begins with are
            the main process's, which also writes the checkpoints and reports the steps.
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
        accelerator: Any = None,
    ) -> None:
        self.processes = Processes(accelerator)
        self.drawn = math.ceil(config.prompts * config.oversample)
        if len(questions) < self.drawn:
            raise ValueError(f"questions must be at least {self.drawn} (prompts * oversample), got {len(questions)}")
        if self.drawn < self.processes.count:
            rule = f"at least the number of processes, {self.processes.count}"
            raise ValueError(f"config.prompts * config.oversample must be {rule}, got {self.drawn}")
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
        adam = partial(torch.optim.AdamW, weight_decay=0.0, fused=True)  # one pass over the weights, no copies of them
        self._optimizers = {"policy": adam(policy.parameters(), lr=config.policy_rate)}
        if config.reward != "none":
            self.reward_model = copy.deepcopy(policy) if reward_model is None else reward_model
            parameters = list(self.reward_model.parameters())
            check_apart("reward_model", parameters, policy.parameters())
            self._optimizers["reward"] = adam(parameters, lr=config.reward_rate)
            if config.reference == "fixed":
                self.reference = copy.deepcopy(policy) if reference is None else reference
        for model in self._models().values():
            self.processes.copy_from_main(model.parameters())

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
        main = self.processes.main
        with progress_bar(steps, "distrl", show and main) as bar:
            bar.advance(self.step)
            while self.step < steps:
                record = self.advance()
                bar.advance()
                bar.update(reward=record["outcome"], loss=record.get("loss", 0.0))
                if on_step is not None and main:
                    on_step(self.step, record)
                if path is not None and (self.step % every == 0 or self.step == steps):
                    if main:
                        self._save(path)
                    self.processes.wait()
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
            kept, batch = self._share(kept)
            with phases("old"):
                old = self._outputs(self.policy, kept)
            base = old
            if self.reference is not None:
                with phases("reference"):
                    base = self._outputs(self.reference, kept)
            if self.reward_model is not None:
                with phases("reward"):
                    record |= self._update_reward(kept, batch, base)
            with phases("advantages"):
                reward = None if self.reward_model is None else self._outputs(self.reward_model, kept)
                advantages, old_logp, found = step_advantages(batch, old, base, reward, self.config)
            states = old.states if old.weight is not None else None
            del old, base, reward
            with phases("policy"):
                record |= self._update_policy(kept, batch, advantages, old_logp, states)
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
        own = self.processes.share(len(prompts))
        drawn = draw(self.engine(), prompts[own], counts[own], self.reward, first_seed=first)
        return joined(self.processes.objects(drawn), counts)

    def _share(self, kept: Rollouts) -> tuple[Rollouts, Batch]:
        """This process's answers, and the batch. A process that none is left for has one without a token: it takes part
        in what all do together.
        """
        share = self.processes.share(len(kept.answers))
        own = kept.take(torch.arange(len(kept.answers))[share])
        if not own.answers:
            own = replace(kept.take(torch.tensor([0])), answers=((),))
        ids, offsets, whole = (t.to(self.device) for t in (own.token_ids, own.offsets, kept.offsets))
        outcome, group = kept.outcome.to(self.device), kept.group.to(self.device)
        return own, Batch(ids, offsets, whole, outcome, outcome, group, self.processes)

    def _outputs(self, model: LanguageModel, rollouts: Rollouts) -> Outputs:
        return collect(model, rollouts.prompts, rollouts.answers, self.config.answers_per_pass)

    def _update_reward(self, own: Rollouts, batch: Batch, base: Outputs) -> dict[str, Any]:
        """One step of the reward model on answers with a known outcome; its accuracy before the step."""
        assert self.reward_model is not None
        temperature = self.config.temperature if self.reference is None else 1.0  # the behaviour policy is what sampled
        with torch.no_grad():
            base_logp = base.logprob(batch.ids, temperature=temperature)
        if not bool(batch.label.isfinite().any()):
            return {"rm_loss": 0.0}
        record: dict[str, Any] = {}

        def loss_of(phi: Outputs) -> Tensor:
            loss, found = reward_loss(phi.logprob(batch.ids) - base_logp, batch, self.config)
            record.update(found)
            return loss

        record["rm_loss"], _ = self._descend("reward", self.reward_model, own, loss_of)
        return record

    def _update_policy(
        self, own: Rollouts, batch: Batch, advantages: Advantages, old_logp: Tensor, states: Tensor | None
    ) -> dict[str, float]:
        """``states``: hidden states of the policy that ``old_logp`` is of. Where the first update finds them again, bit
        by bit (no dropout), its log-sum-exp is known and is not computed again.
        """
        record: dict[str, float] = {}

        def loss_of(theta: Outputs, first: bool) -> Tensor:
            rule, temperature = self.config.loss, self.config.temperature
            same = first and states is not None and torch.equal(theta.states, states)
            at = partial(theta.loss, sampled=batch.ids, old_logp=old_logp, offsets=batch.offsets, on_policy=same)
            loss, found = policy_loss(at(advantages, rule=rule, temperature=temperature), batch, self.config)
            record.update(found)
            return loss

        for i in range(self.config.updates):
            _, norm = self._descend("policy", self.policy, own, partial(loss_of, first=i == 0))
        return record | {"gradient_norm": norm}

    def _descend(
        self, name: str, model: LanguageModel, own: Rollouts, loss_of: Callable[[Outputs], Tensor]
    ) -> tuple[float, float]:
        return update(
            model,
            self._optimizers[name],
            own.prompts,
            own.answers,
            loss_of,
            processes=self.processes,
            max_norm=self.config.max_norm,
            size=self.config.answers_per_pass,
            name=name,
        )

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
