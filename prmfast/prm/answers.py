"""Answers under a causal language model: log-probabilities of their tokens, without a [B, T, V] tensor."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from prmfast.ops import linear_entry_logprob


class Answer(NamedTuple):
    """Token ids; whether each is one of the answer's behind another token; the reference log-probability of those."""

    token_ids: tuple[int, ...]
    mask: tuple[bool, ...]
    reference: Tensor | None = None


def pad_answers(answers: Sequence[Answer]) -> dict[str, Tensor]:
    """``input_ids``, ``attention_mask`` and ``answer_mask`` [S, T]."""
    shape = len(answers), max(len(answer.token_ids) for answer in answers)
    ids, mask = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
    chosen = torch.zeros(shape, dtype=torch.bool)
    for i, answer in enumerate(answers):
        ids[i, : len(answer.token_ids)] = torch.tensor(answer.token_ids)
        mask[i, : len(answer.token_ids)] = 1
        chosen[i, : len(answer.mask)] = torch.tensor(answer.mask)
    return {"input_ids": ids, "attention_mask": mask, "answer_mask": chosen}


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
        return self.with_states(input_ids, attention_mask, answer_mask)[0]

    def with_states(self, input_ids: Tensor, attention_mask: Tensor, answer_mask: Tensor) -> tuple[Tensor, Tensor]:
        """What `forward` gives, and the last hidden states [S, T, d]."""
        states = self.lm.base_model(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=False
        ).last_hidden_state
        weight = self.lm.get_output_embeddings().weight
        row, before = answer_mask[:, 1:].nonzero(as_tuple=True)
        found = torch.zeros(input_ids.shape, dtype=torch.float64, device=states.device)
        if not len(row):  # every parameter stays in the graph: processes wait for each other's gradients
            anchor: Tensor = 0.0 * (states.sum() + weight.sum())
            return found + anchor, states
        with torch.autocast(states.device.type, enabled=False):
            values = linear_entry_logprob(
                states[row, before].to(weight.dtype),
                weight,
                torch.arange(len(row) + 1, device=states.device),
                token_ids=input_ids[row, before + 1],
            )
        return found.index_put((row, before + 1), values), states

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        """Recomputes the decoder's activations in the backward pass, as the Trainer asks for it."""
        self.lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs=gradient_checkpointing_kwargs)


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


def language_model(model: Any) -> Any:
    """A causal language model by name, or as it is."""
    if not isinstance(model, (str, os.PathLike)):
        return model
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model, dtype="auto", trust_remote_code=False)


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of the first numbers of every parameter: tells other weights without reading all of them."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(name.encode())
        digest.update(parameter.detach().flatten()[:64].double().cpu().numpy().tobytes())
    return digest.hexdigest()
