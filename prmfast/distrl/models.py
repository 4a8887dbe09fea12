"""What the loop asks of a language model, and any Hugging Face causal language model as such."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor


class LanguageModel(Protocol):
    """A language model that can be trained: the policy, the reward model and the reference are three of them."""

    def logits(self, prompts: Sequence[str], answers: Sequence[Sequence[int]]) -> Tensor:
        """[N, V] of the N tokens of all answers, packed: row t gives the distribution that token t came from.

        -inf for tokens that are never drawn. Differentiable in `parameters`.
        """
        ...

    def parameters(self) -> Iterable[Tensor]:
        """The tensors that an optimiser moves."""
        ...

    def state_dict(self) -> Mapping[str, Tensor]:
        """Every tensor by name."""
        ...

    def load_state_dict(self, state: Mapping[str, Tensor]) -> Any:
        """Takes a `state_dict` over, in place: engines that hold the model see it."""
        ...


class HuggingFaceModel:
    """A transformers causal language model for the loop; no logits of prompts or padding are made.

    model: with ``base_model`` and ``get_output_embeddings()``, whose output layer is what follows the last hidden
    state (no scaling or soft cap behind it). tokenizer: its tokenizer; prompts are encoded with special tokens, as
    `TransformersEngine` does.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        if not hasattr(model, "get_output_embeddings") or model.get_output_embeddings() is None:
            raise TypeError(f"model must be a transformers causal LM with an output layer, got {type(model).__name__}")
        if getattr(model.config, "final_logit_softcapping", None):
            raise ValueError(f"model must have no soft cap behind its output layer, got {type(model).__name__}")
        self.model, self.tokenizer = model, tokenizer

    def logits(self, prompts: Sequence[str], answers: Sequence[Sequence[int]]) -> Tensor:
        """As `LanguageModel.logits`. ValueError for a prompt without a token."""
        known = {prompt: list(self.tokenizer(prompt)["input_ids"]) for prompt in dict.fromkeys(prompts)}
        starts = [known[prompt] for prompt in prompts]
        for i, start in enumerate(starts):
            if not start:
                raise ValueError(f"prompts[{i}] must have at least one token, got none")
        rows = [start + list(answer) for start, answer in zip(starts, answers, strict=True)]
        width = max(map(len, rows), default=0)
        ids = torch.zeros(len(rows), width, dtype=torch.int64)
        seen, wanted = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
            seen[i, : len(row)] = 1
            wanted[i, len(starts[i]) - 1 : len(row) - 1] = True
        device = self.model.device
        states = self.model.base_model(input_ids=ids.to(device), attention_mask=seen.to(device), use_cache=False)
        logits: Tensor = self.model.get_output_embeddings()(states.last_hidden_state[wanted.to(device)])
        return logits

    def parameters(self) -> Iterable[Tensor]:
        """Those that require a gradient (with LoRA, the adapters)."""
        return [p for p in self.model.parameters() if p.requires_grad]

    def state_dict(self) -> Mapping[str, Tensor]:
        """Of the model."""
        state: Mapping[str, Tensor] = self.model.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> Any:
        """Into the model."""
        return self.model.load_state_dict(state)
