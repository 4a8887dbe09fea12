"""Implicit reward models: a policy trained against a fixed reference ([V] IPVRM, Implicit PRM, DPO-RM, Q-RM)."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import TrainingArguments

from prmfast._files import atomic_path
from prmfast.ops import linear_entry_logprob
from prmfast.prm.losses import dpo_rm_loss, implicit_prm_loss, ipvrm_loss, q_rm_loss
from prmfast.prm.losses._common import PADDING, option
from prmfast.prm.train.base import UpdateMeanTrainer, as_examples
from prmfast.prm.train.implicit_rows import Answer, ImplicitRows, collate_answers, pad_answers
from prmfast.prm.train.model import disable_dropout

IMPLICIT_LOSSES = ("ipvrm", "implicit_prm", "dpo_rm", "q_rm")
_REFERENCE = "reference.safetensors"


@dataclass
class ImplicitConfig(TrainingArguments):  # type: ignore[misc]
    """`transformers.TrainingArguments` and what an implicit model adds.

    Args:
        loss: "ipvrm", "implicit_prm", or of pairs "dpo_rm", "q_rm". beta, margin: None takes the loss's own default
            (ipvrm 10 and 5, the others 0.05 and 0). weighting, reduction: of `ipvrm_loss`.
        max_length: tokens of a conversation. disable_dropout: trains without dropout.
    """

    learning_rate: float = 1e-6
    remove_unused_columns: bool | None = False
    loss: str = "ipvrm"
    weighting: str = "uniform"
    reduction: str = "sequence"
    beta: float | None = None
    margin: float | None = None
    max_length: int = 4096
    disable_dropout: bool = True


@dataclass(frozen=True)
class ImplicitObjective:
    """One of `IMPLICIT_LOSSES` of log-ratios, and its units: answers, tokens (ipvrm by token) or pairs."""

    loss: str
    weighting: str
    reduction: str
    beta: float
    margin: float

    def __post_init__(self) -> None:
        option("loss", self.loss, IMPLICIT_LOSSES)
        option("weighting", self.weighting, ("uniform", "early", "late"))
        option("reduction", self.reduction, ("sequence", "token"))

    @property
    def pairs(self) -> bool:
        """Whether it compares two answers."""
        return self.loss in ("dpo_rm", "q_rm")

    def __call__(self, log_ratio: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
        """Mean over the units of log_ratio [S, T] with mask [S, T] and labels [B]; S = 2 B for pairs, else B."""
        kept = labels != PADDING
        if self.pairs:
            chosen, rejected = log_ratio.chunk(2)
            masks = mask.chunk(2)
            loss = dpo_rm_loss if self.loss == "dpo_rm" else q_rm_loss
            return loss(
                chosen[kept],
                rejected[kept],
                chosen_mask=masks[0][kept],
                rejected_mask=masks[1][kept],
                beta=self.beta,
                margin=self.margin,
            )
        arguments = log_ratio[kept], labels[kept]
        common: dict[str, Any] = {"mask": mask[kept], "beta": self.beta, "margin": self.margin}
        if self.loss == "implicit_prm":
            return implicit_prm_loss(*arguments, **common)
        return ipvrm_loss(
            *arguments, weighting=cast(Any, self.weighting), reduction=cast(Any, self.reduction), **common
        )

    def units(self, mask: Tensor, labels: Tensor) -> Tensor:
        """Number of units or their total weight, a float64 scalar."""
        if self.loss != "ipvrm":
            return (labels != PADDING).sum().double()
        count = mask.sum(1).double()
        weight = {"uniform": count, "late": (count + 1) / 2, "early": (count - 1) / 2}[self.weighting]
        weight = torch.where(count > 0, weight, 0.0)
        return weight.sum() if self.reduction == "token" else (weight > 0).sum().double()


class AnswerModel(nn.Module):
    """Log-probabilities of the tokens of answers under a causal language model, without a [B, T, V] tensor.

    lm: of ``AutoModelForCausalLM``, whose logits are its last hidden states times its output layer; ValueError for one
    that adds a bias, caps or scales them.
    """

    def __init__(self, lm: Any) -> None:
        super().__init__()
        layer = lm.get_output_embeddings()
        odd = [name for name in ("final_logit_softcapping", "logit_scale") if getattr(lm.config, name, None)]
        if layer is None or getattr(layer, "bias", None) is not None or odd:
            what = odd[0] if odd else "no output layer or one with a bias"
            raise ValueError(f"lm must have logits that are linear in the hidden states, got {what}")
        self.config = lm.config
        self.lm = lm

    def forward(self, input_ids: Tensor, attention_mask: Tensor, answer_mask: Tensor) -> Tensor:
        """[S, T] float64, 0 where the mask is false; the mask is false in the first column."""
        states = self.lm.base_model(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=False
        ).last_hidden_state
        weight = self.lm.get_output_embeddings().weight
        row, before = answer_mask[:, 1:].nonzero(as_tuple=True)
        found = torch.zeros(input_ids.shape, dtype=torch.float64, device=states.device)
        if not len(row):  # every parameter stays in the graph: processes wait for each other's gradients
            anchor: Tensor = 0.0 * (states.sum() + weight.sum())
            return found + anchor
        with torch.autocast(states.device.type, enabled=False):
            values = linear_entry_logprob(
                states[row, before].to(weight.dtype),
                weight,
                torch.arange(len(row) + 1, device=states.device),
                token_ids=input_ids[row, before + 1],
            )
        return found.index_put((row, before + 1), values)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        """Recomputes the decoder's activations in the backward pass, as the Trainer asks for it."""
        self.lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs=gradient_checkpointing_kwargs)


class ImplicitTrainer(UpdateMeanTrainer):
    """Trains a language model as an implicit reward model; what it saves is a language model.

    The reference's log-probabilities are computed once, before training, and kept in ``args.output_dir``. Updates,
    batches and resumption are as in `PRMTrainer`. Sharded parameters (FSDP, ZeRO-3) are not supported: the output
    layer's weight is used outside of its own module.

    Args:
        model: a folder or hub id, or a model of ``AutoModelForCausalLM``. args: an `ImplicitConfig`.
        train_dataset, eval_dataset: a file or rows for `read_examples`, or examples: outcomes, or pairs for "dpo_rm"
            and "q_rm".
        processing_class: the tokenizer, with a chat template; needed unless ``model`` is a name.
        reference: like ``model``; None is the model as it is given.
        options: of `transformers.Trainer`.
    """

    def __init__(
        self,
        model: Any,
        args: ImplicitConfig,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        *,
        reference: Any = None,
        **options: Any,
    ) -> None:
        own = (10.0, 5.0) if args.loss == "ipvrm" else (0.05, 0.0)
        beta = own[0] if args.beta is None else args.beta
        margin = own[1] if args.margin is None else args.margin
        self.objective = ImplicitObjective(args.loss, args.weighting, args.reduction, beta, margin)
        if isinstance(model, (str, os.PathLike)):
            from transformers import AutoTokenizer

            processing_class = processing_class or AutoTokenizer.from_pretrained(model, trust_remote_code=False)
        if processing_class is None:
            raise ValueError("processing_class must be the tokenizer unless model is a name, got None")
        wrapped = AnswerModel(_language_model(model))
        if args.disable_dropout:
            disable_dropout(wrapped)
        sets = [self._rows(data, args, processing_class) for data in (train_dataset, eval_dataset)]
        super().__init__(
            model=wrapped,
            args=args,
            data_collator=collate_answers,
            train_dataset=sets[0],
            eval_dataset=sets[1],
            processing_class=processing_class,
            **options,
        )
        fixed = wrapped if reference is None else AnswerModel(_language_model(reference)).to(args.device)
        for name, rows in zip(("train", "eval"), sets, strict=True):
            if rows is not None:
                self._add_reference(fixed, rows, Path(args.output_dir) / f"{name}_{_REFERENCE}")

    def _rows(self, data: Any, args: ImplicitConfig, tokenizer: Any) -> ImplicitRows | None:
        if data is None:
            return None
        rows = ImplicitRows(as_examples(data), tokenizer, max_length=args.max_length, pairs=self.objective.pairs)
        if len(rows) == 0:
            raise ValueError("a data set must have at least one example, got none")
        return rows

    def _add_reference(self, model: AnswerModel, rows: ImplicitRows, path: Path) -> None:
        """Computes the reference, or reads it where a file of the same rows and model is there; one process writes."""
        from safetensors import safe_open
        from safetensors.torch import save_file

        mark = {"rows": rows.fingerprint, "model": _fingerprint(model)}
        with self.args.main_process_first(local=False, desc="reference log-probabilities"):
            known = None
            if path.exists():
                with safe_open(path, framework="pt") as file:
                    known = file.get_tensor("logprob") if file.metadata() == mark else None
            if known is None:
                known = torch.cat(answer_logprobs(model, rows.answers, batch_size=self.args.eval_batch_size))
                with atomic_path(path) as temporary:
                    save_file({"logprob": known}, temporary, metadata=mark)
        rows.set_reference(known.split([sum(answer.mask) for answer in rows.answers]))

    def batch_loss(self, model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The objective's mean, and the sum of each answer's log-ratios [B] (of pairs, the difference)."""
        mask = inputs["answer_mask"]
        policy = model(inputs["input_ids"], inputs["attention_mask"], mask)
        log_ratio = (policy - inputs["reference"]).float()
        total = torch.where(mask, log_ratio, 0.0).sum(1)
        if self.objective.pairs:
            total = total[: len(total) // 2] - total[len(total) // 2 :]
        return self.objective(log_ratio, mask, inputs["labels"]), total

    def batch_units(self, inputs: dict[str, Tensor]) -> Tensor:
        """The objective's units."""
        return self.objective.units(inputs["answer_mask"], inputs["labels"])

    def _trained(self) -> Any:
        return self.accelerator.unwrap_model(self.model).lm

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, self._trained())

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = output_dir or self.args.output_dir
        if self.args.should_save:
            self._trained().save_pretrained(folder)
            self.processing_class.save_pretrained(folder)


@torch.no_grad()
def answer_logprobs(model: AnswerModel, answers: Sequence[Answer], *, batch_size: int = 8) -> list[Tensor]:
    """Log-probabilities of the masked tokens of each answer, float64 on the CPU."""
    training = model.training
    model.eval()
    device = next(model.parameters()).device
    order = sorted(range(len(answers)), key=lambda i: len(answers[i].token_ids))
    found: list[Tensor] = [torch.empty(0)] * len(answers)
    for at in range(0, len(order), batch_size):
        some = order[at : at + batch_size]
        batch = {name: value.to(device) for name, value in pad_answers([answers[i] for i in some]).items()}
        values = model(**batch)
        for i, row, mask in zip(some, values, batch["answer_mask"], strict=True):
            found[i] = row[mask].cpu()
    model.train(training)
    return found


def _language_model(model: Any) -> Any:
    """A causal language model by name, or as it is."""
    if not isinstance(model, (str, os.PathLike)):
        return model
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model, dtype="auto", trust_remote_code=False)


def _fingerprint(model: nn.Module) -> str:
    """SHA-256 of the first numbers of every parameter: tells other weights without reading all of them."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(name.encode())
        digest.update(parameter.detach().flatten()[:64].double().cpu().numpy().tobytes())
    return digest.hexdigest()
