"""A decoder without language model head and a `StepHead` on its step rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from prmfast.prm.adapter import PRMAdapter
from prmfast.prm.heads import StepHead, ValueHead
from prmfast.prm.train.objective import as_float32


class StepModel(nn.Module):
    """Token ids [B, T] and step positions [B, H] -> logits [B, H, k], 0 where a position is -1.

    The head sees the step rows alone and computes in its own dtype, float32. Parameters have the names of a PQM
    checkpoint (``model.*`` and ``v_head.*``), so that a state dict is one.

    backbone: a transformers decoder without head (``AutoModel``), or one that peft has wrapped
    """

    def __init__(self, backbone: Any, head: StepHead) -> None:
        super().__init__()
        if not isinstance(head, StepHead):
            raise TypeError(f"head must be a StepHead, got {type(head).__name__}")
        self.config = backbone.config
        self._prefix: str = getattr(backbone, "base_model_prefix", "model") or "model"
        self.add_module(self._prefix, backbone)
        self._head = "v_head" if isinstance(head, ValueHead) else "step_head"
        self.add_module(self._head, head)

    @property
    def backbone(self) -> Any:
        """The decoder."""
        return getattr(self, self._prefix)

    @property
    def head(self) -> StepHead:
        """The head."""
        head: StepHead = getattr(self, self._head)
        return head

    def forward(self, input_ids: Tensor, attention_mask: Tensor, step_positions: Tensor) -> Tensor:
        """Logits at the step rows; see the class."""
        states = self.backbone(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        row, step = (step_positions >= 0).nonzero(as_tuple=True)
        logits = as_float32(self.head, states[row, step_positions[row, step]])
        padded = logits.new_zeros(*step_positions.shape, logits.shape[1])
        return padded.index_put((row, step), logits)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        """Recomputes the decoder's activations in the backward pass, as the Trainer asks for it."""
        self.backbone.gradient_checkpointing_enable(gradient_checkpointing_kwargs=gradient_checkpointing_kwargs)


def load_backbone(directory: str, adapter: PRMAdapter, *, dtype: torch.dtype | None = None) -> tuple[Any, Any]:
    """(decoder without head, tokenizer) of a language model, with the adapter's step token added if it is new."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    backbone = AutoModel.from_pretrained(directory, dtype=dtype or "auto", trust_remote_code=False)
    token = adapter.step_token(tokenizer)
    if token is not None and len(tokenizer.encode(token, add_special_tokens=False)) != 1:
        tokenizer.add_special_tokens({"additional_special_tokens": [token]})
    if len(tokenizer) > backbone.config.vocab_size:
        backbone.resize_token_embeddings(len(tokenizer))
    adapter.check(backbone.config, tokenizer)
    return backbone, tokenizer


def disable_dropout(model: nn.Module) -> None:
    """Sets every dropout probability of the model to 0, that of its attention too."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            vars(module)["attention_dropout"] = 0.0
