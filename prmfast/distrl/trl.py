"""DistRL in TRL: a GRPOTrainer with an online reward model, token-level advantages and the distribution-level term.

Needs the extra ``trl``; importing this module checks the version that is installed. TRL draws the answers, rewards them
and computes its own loss; `DistRLTrainer` gives that loss advantages [B, T] and adds ``dist_alpha`` times Dist-PPO.
"""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prmfast._files import atomic_path
from prmfast._trl import require_trl
from prmfast.distrl.candidates import concat_rows, slice_rows
from prmfast.distrl.losses import DistPPO
from prmfast.distrl.models import Outputs, check_apart, collect, output_layer, read_out
from prmfast.distrl.processes import Processes
from prmfast.distrl.step import Batch, reward_loss, step_advantages, update
from prmfast.ops import Candidates

require_trl("prmfast.distrl.trl")

from accelerate.utils import is_peft_model  # noqa: E402
from trl import GRPOTrainer  # noqa: E402

from prmfast.distrl._trl_config import DistRLConfig  # noqa: E402

__all__ = ["CHECKPOINT_NAME", "DistRLConfig", "DistRLTrainer"]

logger = logging.getLogger("prmfast.distrl")

CHECKPOINT_NAME = "distrl.pt"


class DistRLTrainer(GRPOTrainer):  # type: ignore[misc]
    """GRPOTrainer with DistRL: after each generation the reward model learns, then TD of its candidates makes the
    advantages; the loss is TRL's with these plus ``dist_alpha`` times Dist-PPO, from the same forward pass.

    Works with gradient accumulation, several iterations and steps per generation, tool masks, PEFT and several
    processes (data parallel). Metrics are TRL's and ``distrl/...``. Checkpoints hold the reward model with its
    optimiser too.

    Args:
        model: as `trl.GRPOTrainer` takes it; its logits are linear in its last hidden states, and it has no learned
            position embeddings, since TRL pads prompts on the left.
        reward_funcs: as `trl.GRPOTrainer` takes them; the one that ``args.rm_outcome`` names verifies.
        args: `DistRLConfig`.
        reward_model: a causal language model with the policy's vocabulary, trained in place; None: a copy of it.
        reference: for ``args.rm_reference="fixed"``; None: a copy of the policy.
        options: of `trl.GRPOTrainer`.

    Raises:
        TypeError, ValueError: a model, a distribution strategy or an argument that is not supported, named.
    """

    def __init__(
        self,
        model: Any,
        reward_funcs: Any,
        args: DistRLConfig,
        *,
        reward_model: Any = None,
        reference: Any = None,
        **options: Any,
    ) -> None:
        if not isinstance(args, DistRLConfig):
            raise TypeError(f"args must be a DistRLConfig, got {type(args).__name__}")
        if reference is not None and args.rm_reference != "fixed":
            raise ValueError(f"reference must be None where rm_reference is {args.rm_reference!r}, got a model")
        super().__init__(model, reward_funcs, args, **options)
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise ValueError("the parameters must be whole on every process, got DeepSpeed or FSDP")
        if self._is_vlm:
            raise ValueError("processing_class must be a tokenizer (text only), got a processor of images")
        if not 0 <= args.rm_outcome < len(self.reward_funcs):
            raise ValueError(f"rm_outcome must be >= 0 and < {len(self.reward_funcs)}, got {args.rm_outcome}")
        self.rules = args.rules()
        self.processes = Processes(self.accelerator)
        self.reward_model = self._placed(self.model, reward_model)
        self.reference = None
        if args.rm_reference == "fixed":
            self.reference = self._placed(self.model, reference).requires_grad_(False)
        for name, held in (("model", self.model), ("reward_model", self.reward_model), ("reference", self.reference)):
            if held is not None:
                _check_model(name, _causal(held), _causal(self.model))
        trained = [p for p in self.reward_model.parameters() if p.requires_grad]
        check_apart("reward_model", trained, self.model.parameters())
        self.processes.copy_from_main(trained)
        self._reward_optimizer = torch.optim.AdamW(trained, lr=args.rm_learning_rate, weight_decay=0.0)
        self._rewards: Tensor | None = None

    def _placed(self, policy: Any, given: Any) -> Any:
        """A given model or a copy of the policy, on the device and without dropout."""
        held = _copy(policy) if given is None else given
        return held.to(self.accelerator.device).eval()

    def _calculate_rewards(self, *arguments: Any, **options: Any) -> Any:
        self._rewards = super()._calculate_rewards(*arguments, **options)
        return self._rewards

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """TRL's batch with ``advantages`` [B, T] and, one per sequence, the rows of its ``candidates``."""
        output: dict[str, Any] = super()._generate_and_score_completions(inputs)
        training = self.model.training
        mask = output["completion_mask"].bool()
        if "tool_mask" in output:
            mask = mask & output["tool_mask"].bool()
        batch = self._batch(output, mask, self.num_generations if training else self.num_generations_eval)
        size = self.args.per_device_train_batch_size if training else self.args.per_device_eval_batch_size
        rows, lengths = range(len(mask)), [range(n) for n in batch.offsets.diff().tolist()]
        of = partial(_Rows, output=output, mask=mask, autocast=self.accelerator.autocast)
        policy = self.accelerator.unwrap_model(self.model)
        policy.eval()  # pi_old is without dropout
        old = base = collect(of(policy), rows, lengths, size)
        policy.train(training)
        if self.reference is not None:
            base = collect(of(self.reference), rows, lengths, size)
        model, record = of(self.reward_model), dict[str, float | None]()
        if training and batch.mask.any():
            record |= self._update_reward(model, lengths, batch, base, size)
        made, _, found = step_advantages(batch, old, base, collect(model, rows, lengths, size), self.rules)
        advantages = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device)
        output["advantages"] = advantages.masked_scatter(mask, made.token.float())
        bounds = batch.offsets.tolist()
        output["candidates"] = [slice_rows(made.candidates, *pair) for pair in pairwise(bounds)]
        mass = made.candidates.policy_logp.double().exp().sum()
        output["candidate_mass"] = self.processes.sum(mass)
        self._report(record | found | {"reasons": float(len(made.reasons))}, training)
        return output

    def _batch(self, output: dict[str, Any], mask: Tensor, answers: int) -> Batch:
        """The sampled tokens, and rewards of all processes as TRL gathered them."""
        rewards = self._rewards
        assert rewards is not None
        unknown = rewards.isnan().all(1)
        outcome = (rewards * self.reward_weights.to(rewards.device)).nansum(1).masked_fill(unknown, torch.nan)
        label = rewards[:, self.args.rm_outcome]
        wrong = label.isfinite() & (label != 0) & (label != 1)
        if bool(wrong.any()):
            name = self.reward_func_names[self.args.rm_outcome]
            rule = f"reward_funcs[{self.args.rm_outcome}] ({name}) must give 0, 1 or None, since rm_outcome names it"
            raise ValueError(f"{rule}; got {float(label[wrong][0]):g}")
        counts = mask.sum(1)
        offsets, every = (torch.cat([n.new_zeros(1), n.cumsum(0)]) for n in (counts, self.processes.gather(counts)))
        group = torch.arange(len(outcome), device=mask.device) // answers
        return Batch(output["completion_ids"][mask], offsets, every, outcome, label, group, self.processes)

    def _update_reward(
        self, model: _Rows, lengths: Sequence[Sequence[int]], batch: Batch, base: Outputs, size: int
    ) -> dict[str, float]:
        """One step of the reward model over the generation batches of all processes; its numbers before the step."""
        temperature = 1.0 if self.reference is not None else self.rules.temperature  # the policy drew at it
        with torch.no_grad():
            base_logp = base.logprob(batch.ids, temperature=temperature)
        record: dict[str, float] = {}

        def loss_of(phi: Outputs) -> Tensor:
            loss, found = reward_loss(phi.logprob(batch.ids) - base_logp, batch, self.rules)
            record.update(found)
            return loss

        loss, norm = update(
            model,
            self._reward_optimizer,
            range(len(lengths)),
            lengths,
            loss_of,
            processes=self.processes,
            max_norm=self.rules.max_norm,
            size=size,
            name="reward model",
        )
        return record | {"rm_loss": loss, "rm_gradient_norm": norm}

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        """TRL's loss, plus alpha times Dist-PPO of the hidden states that it was computed from."""
        policy = _causal(self.accelerator.unwrap_model(self.model))
        with _last_hidden_states(policy) as seen:
            loss: Tensor = super()._compute_loss(model, inputs)
        if not self.rules.loss.alpha:
            return loss
        mask = inputs["completion_mask"].bool()
        if "tool_mask" in inputs:
            mask = mask & inputs["tool_mask"].bool()
        counts = mask.sum(1)
        offsets, candidates = torch.cat([counts.new_zeros(1), counts.cumsum(0)]), concat_rows(inputs["candidates"])
        with torch.autocast(mask.device.type, enabled=False):
            theta = read_out(policy.get_output_embeddings(), _predicting(seen[0], mask))
            rule, temperature = self.rules.loss, self.rules.temperature
            dist = theta.dist_loss(candidates, offsets=offsets, rule=rule, temperature=temperature)
        training = self.model.training
        share = self._share(dist, counts, candidates, inputs["candidate_mass"], training)
        self._report_dist(dist, candidates, len(theta.states), training)
        return loss + self.rules.loss.alpha * share * dist.loss

    def _share(self, dist: DistPPO, counts: Tensor, candidates: Candidates, mass: Tensor, training: bool) -> float:
        """What turns the mean over this micro-batch into its part of the mean over an update, as TRL's loss has it.

        paper: answers without a token count with loss 0. released: the generation batch's mass, scaled to an update.
        """
        accumulated = self.current_gradient_accumulation_steps if training else 1
        if self.rules.loss.variant == "paper":
            return float((counts > 0).float().mean()) / accumulated
        share = self.processes.count * float(candidates.policy_logp.double().exp().sum()) / max(float(mass), 1e-300)
        return share * self.args.steps_per_generation / accumulated if training else share

    def _report_dist(self, dist: DistPPO, candidates: Candidates, tokens: int, training: bool) -> None:
        entries = len(candidates.token_ids)
        sums = [tokens, entries, dist.mass * tokens]
        sums += [entries * n for n in (dist.clip_fraction, dist.dual_clip_fraction, dist.approx_kl)]
        total = torch.tensor(sums, dtype=torch.float64, device=self.accelerator.device)
        tokens_, entries_, mass, clipped, capped, kl = self.processes.sum(total).tolist()
        per_token, per_entry = max(tokens_, 1.0), max(entries_, 1.0)
        self._report(
            {
                "dist_candidates_per_token": entries_ / per_token,
                "dist_mass": mass / per_token,
                "dist_clip_fraction": clipped / per_entry,
                "dist_dual_clip_fraction": capped / per_entry,
                "dist_approx_kl": kl / per_entry,
                "dist_loss": float(self.processes.sum(dist.loss.detach())) / self.processes.count,
            },
            training,
        )

    def _report(self, record: dict[str, float | None], training: bool) -> None:
        """Through TRL's log, which leaves NaN out of its means."""
        for name, value in record.items():
            self._metrics["train" if training else "eval"][f"distrl/{name}"].append(
                torch.nan if value is None else value
            )

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """The reward model first: a checkpoint that TRL has finished is whole."""
        if self.args.should_save:
            folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
            folder.mkdir(parents=True, exist_ok=True)
            state = {"model": self.reward_model.state_dict(), "optimizer": self._reward_optimizer.state_dict()}
            if self.reference is not None:
                state["reference"] = self.reference.state_dict()
            with atomic_path(folder / CHECKPOINT_NAME) as temporary:
                torch.save(state, temporary)
        super()._save_checkpoint(model, trial)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        path = Path(checkpoint) / CHECKPOINT_NAME
        if not path.exists():
            raise ValueError(f"{path} is missing: the checkpoint was written by another trainer")
        state = torch.load(path, weights_only=True, map_location=self.accelerator.device)
        if ("reference" in state) != (self.reference is not None):
            raise ValueError(f"{path} belongs to another rm_reference than {self.args.rm_reference!r}")
        self.reward_model.load_state_dict(state["model"])
        self._reward_optimizer.load_state_dict(state["optimizer"])
        if self.reference is not None:
            self.reference.load_state_dict(state["reference"])


class _Rows:
    """A model over the padded batch of TRL, as `collect` and `update` ask for it: a "prompt" is the number of a row."""

    def __init__(self, model: Any, *, output: dict[str, Any], mask: Tensor, autocast: Any) -> None:
        self.model, self.mask, self.autocast = model, mask, autocast
        self.ids = torch.cat([output["prompt_ids"], output["completion_ids"]], 1)
        self.seen = torch.cat([output["prompt_mask"], output["completion_mask"]], 1)

    def outputs(self, rows: Sequence[Any], answers: Sequence[Sequence[int]]) -> Outputs:
        """Of the tokens of the mask in these rows."""
        at, lm = torch.tensor(list(rows), device=self.ids.device), _causal(self.model)
        with self.autocast():
            found = lm.base_model(input_ids=self.ids[at], attention_mask=self.seen[at], use_cache=False)
        return read_out(lm.get_output_embeddings(), _predicting(found.last_hidden_state, self.mask[at]))

    def parameters(self) -> list[Tensor]:
        """Those that are trained."""
        return [p for p in self.model.parameters() if p.requires_grad]

    def state_dict(self) -> Any:
        """Of the model."""
        return self.model.state_dict()

    def load_state_dict(self, state: Any) -> Any:
        """Into the model."""
        return self.model.load_state_dict(state)


def _predicting(hidden: Tensor, mask: Tensor) -> Tensor:
    """Of states [B, P + T, d], those that the tokens of ``mask`` [B, T] came from, [N, d]."""
    return hidden[:, -mask.shape[1] - 1 : -1][mask]


def _causal(model: Any) -> Any:
    """The causal language model, within PEFT's wrapper if there is one."""
    return model.get_base_model() if is_peft_model(model) else model


def _copy(model: Any) -> Any:
    """A copy without the forward methods that TRL has put on the model, which would run the original."""
    held = copy.deepcopy(model)
    for module in held.modules():
        vars(module).pop("forward", None)
    return held


@contextlib.contextmanager
def _last_hidden_states(causal: Any) -> Iterator[list[Tensor]]:
    """Collects what the decoder gives to the output layer."""
    seen: list[Tensor] = []
    handle = causal.base_model.register_forward_hook(lambda *call: seen.append(call[-1].last_hidden_state))
    try:
        yield seen
    finally:
        handle.remove()


def _check_model(name: str, causal: Any, policy: Any) -> None:
    """TypeError or ValueError for what cannot be computed from hidden states, or not under padding on the left."""
    try:
        layer = output_layer(causal)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from None
    columns = policy.get_output_embeddings().weight.shape[0]
    if layer.weight.shape[0] != columns:
        raise ValueError(f"{name} must have the {columns} columns of the policy, got {layer.weight.shape[0]}")
    tokens = causal.get_input_embeddings()
    limit = getattr(causal.config.get_text_config(), "max_position_embeddings", None)
    for module in causal.base_model.modules():
        if isinstance(module, torch.nn.Embedding) and module is not tokens and module.num_embeddings == limit:
            raise ValueError(f"{name} must have no learned position embeddings, got {type(causal).__name__}")
