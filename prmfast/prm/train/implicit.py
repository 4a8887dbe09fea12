"""Implicit reward models: a policy trained against a fixed reference ([V] IPVRM, Implicit PRM, DPO-RM, Q-RM)."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import TrainingArguments

from prmfast._files import atomic_path, write_json
from prmfast.prm.answers import AnswerModel, answer_logprobs, fingerprint, language_model
from prmfast.prm.implicit import DESCRIPTION
from prmfast.prm.losses import dpo_rm_loss, implicit_prm_loss, ipvrm_loss, q_rm_loss
from prmfast.prm.losses._common import PADDING, option
from prmfast.prm.train.base import UpdateMeanTrainer, as_examples
from prmfast.prm.train.implicit_rows import ImplicitRows, collate_answers
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


class ImplicitTrainer(UpdateMeanTrainer):
    """Trains a language model as an implicit reward model; what it saves is one, and how to score with it.

    `prmfast.prm.load_prm` loads the pair: the policy that was saved and the reference by its name, if it had one.

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
        names = [_name(one) for one in (model, reference)]
        wrapped = AnswerModel(language_model(model))
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
        fixed = wrapped if reference is None else AnswerModel(language_model(reference)).to(args.device)
        self.description = {
            "loss": args.loss,
            "beta": beta,
            "average": args.loss in ("ipvrm", "q_rm"),  # their logits are means over tokens
            "reference": names[0] if reference is None else names[1],
            "reference_fingerprint": fingerprint(fixed),
        }
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

        mark = {"rows": rows.fingerprint, "model": fingerprint(model)}
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
            write_json(Path(folder) / DESCRIPTION, self.description)


def _name(model: Any) -> str | None:
    """Where a model comes from: a folder as an absolute path, or a hub id; None for one that was made here."""
    found = model if isinstance(model, (str, os.PathLike)) else getattr(model, "name_or_path", "")
    name = os.fspath(found or "")
    return str(Path(name).resolve()) if os.path.isdir(name) else name or None
