"""The tiny policy: a two-layer Qwen2 in plain torch, differentiable, with the weights of a Hugging Face checkpoint.

Rotary positions suffice: the fixed layout puts operator i, operand i and result i - 1 at constant distances (16, 15 and
1 tokens) before the place where result i is predicted.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from prmfast.tiny.task import EOS_ID, PAD_ID, VOCAB_SIZE


@dataclass(frozen=True, slots=True)
class PolicyConfig:
    """Sizes of the policy; ``to_hf()`` gives the Qwen2 ``config.json``."""

    hidden_size: int = 64
    intermediate_size: int = 192
    num_hidden_layers: int = 2
    num_attention_heads: int = 2
    max_position_embeddings: int = 64
    rope_theta: float = 100.0
    rms_norm_eps: float = 1e-6
    vocab_size: int = VOCAB_SIZE

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    def to_hf(self) -> dict[str, Any]:
        """Keyword arguments of ``transformers.Qwen2Config`` for this policy."""
        fields = asdict(self)
        theta = fields.pop("rope_theta")
        return {
            **fields,
            "num_key_value_heads": self.num_attention_heads,
            "rope_parameters": {"rope_type": "default", "rope_theta": theta},
            "tie_word_embeddings": True,
            "use_sliding_window": False,
            "bos_token_id": None,
            "eos_token_id": EOS_ID,
            "pad_token_id": PAD_ID,
            "dtype": "float32",
        }

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> PolicyConfig:
        """From the content of a Qwen2 ``config.json``; ValueError when it is not a Qwen2 this decoder computes."""
        if config.get("model_type") != "qwen2":
            raise ValueError(f"model_type must be 'qwen2', got {config.get('model_type')!r}")
        if config["num_key_value_heads"] != config["num_attention_heads"] or not config["tie_word_embeddings"]:
            raise ValueError("the tiny decoder needs as many key-value heads as heads, and tied embeddings")
        names = [name for name in cls.__dataclass_fields__ if name != "rope_theta"]
        return cls(**{name: config[name] for name in names}, rope_theta=config["rope_parameters"]["rope_theta"])


@dataclass(frozen=True, slots=True)
class Layer:
    """Weights of one block; query, key, value and gate, up are fused along their output dimension."""

    input_norm: Tensor  # [H]
    qkv_weight: Tensor  # [3H, H]
    qkv_bias: Tensor  # [3H]
    output_weight: Tensor  # [H, H]
    post_norm: Tensor  # [H]
    gate_up_weight: Tensor  # [2I, H]
    down_weight: Tensor  # [H, I]


@dataclass(frozen=True, slots=True)
class Policy:
    """A Qwen2 causal language model with tied embeddings as plain tensors."""

    config: PolicyConfig
    embedding: Tensor  # [V, H], also the output head
    layers: tuple[Layer, ...]
    norm: Tensor  # [H]

    def parameters(self) -> Iterable[Tensor]:
        """Every weight tensor once."""
        yield self.embedding
        for layer in self.layers:
            yield from (getattr(layer, name) for name in Layer.__dataclass_fields__)
        yield self.norm

    def to(self, dtype: torch.dtype) -> Policy:
        """The same policy in another floating dtype."""
        layers = tuple(
            Layer(*(getattr(layer, name).to(dtype) for name in Layer.__dataclass_fields__)) for layer in self.layers
        )
        return Policy(self.config, self.embedding.to(dtype), layers, self.norm.to(dtype))

    @classmethod
    def random(cls, config: PolicyConfig, *, generator: torch.Generator) -> Policy:
        """Fresh weights that require gradients."""
        h, m = config.hidden_size, config.intermediate_size

        def normal(*shape: int, std: float) -> Tensor:
            return (torch.randn(*shape, generator=generator) * std).requires_grad_()

        deep = (2 * config.num_hidden_layers) ** -0.5
        layers = tuple(
            Layer(
                torch.ones(h, requires_grad=True),
                normal(3 * h, h, std=h**-0.5),
                torch.zeros(3 * h, requires_grad=True),
                normal(h, h, std=h**-0.5 * deep),
                torch.ones(h, requires_grad=True),
                normal(2 * m, h, std=h**-0.5),
                normal(h, m, std=m**-0.5 * deep),
            )
            for _ in range(config.num_hidden_layers)
        )
        return cls(config, normal(config.vocab_size, h, std=0.3), layers, torch.ones(h, requires_grad=True))

    def state_dict(self) -> dict[str, Tensor]:
        """Weights under the names of ``transformers.Qwen2ForCausalLM``, detached and contiguous."""
        state = {"model.embed_tokens.weight": self.embedding, "model.norm.weight": self.norm}
        for i, layer in enumerate(self.layers):
            at = f"model.layers.{i}"
            state[f"{at}.input_layernorm.weight"] = layer.input_norm
            state[f"{at}.post_attention_layernorm.weight"] = layer.post_norm
            for name, weight, bias in zip("qkv", layer.qkv_weight.chunk(3), layer.qkv_bias.chunk(3), strict=True):
                state[f"{at}.self_attn.{name}_proj.weight"] = weight
                state[f"{at}.self_attn.{name}_proj.bias"] = bias
            state[f"{at}.self_attn.o_proj.weight"] = layer.output_weight
            gate, up = layer.gate_up_weight.chunk(2)
            state[f"{at}.mlp.gate_proj.weight"], state[f"{at}.mlp.up_proj.weight"] = gate, up
            state[f"{at}.mlp.down_proj.weight"] = layer.down_weight
        return {name: value.detach().clone().contiguous() for name, value in state.items()}

    @classmethod
    def from_state_dict(cls, config: PolicyConfig, state: dict[str, Tensor]) -> Policy:
        """From the weights of a ``Qwen2ForCausalLM``; KeyError where one is missing."""
        layers = []
        for i in range(config.num_hidden_layers):
            at = f"model.layers.{i}"
            layers.append(
                Layer(
                    state[f"{at}.input_layernorm.weight"],
                    torch.cat([state[f"{at}.self_attn.{name}_proj.weight"] for name in "qkv"]),
                    torch.cat([state[f"{at}.self_attn.{name}_proj.bias"] for name in "qkv"]),
                    state[f"{at}.self_attn.o_proj.weight"],
                    state[f"{at}.post_attention_layernorm.weight"],
                    torch.cat([state[f"{at}.mlp.gate_proj.weight"], state[f"{at}.mlp.up_proj.weight"]]),
                    state[f"{at}.mlp.down_proj.weight"],
                )
            )
        return cls(config, state["model.embed_tokens.weight"], tuple(layers), state["model.norm.weight"])

    @classmethod
    def load(cls, directory: str | Path) -> Policy:
        """From a directory that ``Qwen2ForCausalLM.save_pretrained`` wrote (config.json, model.safetensors)."""
        from safetensors.torch import load_file

        config = PolicyConfig.from_hf(json.loads((Path(directory) / "config.json").read_text()))
        return cls.from_state_dict(config, load_file(Path(directory) / "model.safetensors"))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square normalisation over the last dimension."""
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def rotary_table(config: PolicyConfig, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin [length, head_dim] of positions 0 .. length - 1, the halves repeated as Qwen2 does."""
    half = config.head_dim // 2
    frequency = config.rope_theta ** -(torch.arange(half, dtype=torch.float64) / half)
    angle = torch.arange(length, dtype=torch.float64)[:, None] * frequency
    angle = torch.cat([angle, angle], 1)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [..., T, head_dim] with tables [T, head_dim]."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


def attention_input(x: Tensor, layer: Layer, config: PolicyConfig, tables: tuple[Tensor, Tensor]) -> list[Tensor]:
    """Rotated queries and keys, and values, each [B, heads, T, head_dim], of x [B, T, H]."""
    b, t, _ = x.shape
    qkv = F.linear(rms_norm(x, layer.input_norm, config.rms_norm_eps), layer.qkv_weight, layer.qkv_bias)
    qkv = qkv.view(b, t, 3, config.num_attention_heads, config.head_dim).permute(2, 0, 3, 1, 4)
    q, k = rotate(qkv[:2], *tables)
    return [q, k, qkv[2]]


def feed_forward(x: Tensor, layer: Layer, config: PolicyConfig) -> Tensor:
    """x plus the gated feed-forward block of x [..., H]."""
    both = F.linear(rms_norm(x, layer.post_norm, config.rms_norm_eps), layer.gate_up_weight)
    gate, up = both.chunk(2, -1)
    return x + F.linear(F.silu(gate) * up, layer.down_weight)


def forward(policy: Policy, ids: Tensor, *, start: int = 0) -> tuple[Tensor, Tensor]:
    """Equals ``Qwen2ForCausalLM`` on right-padded ids [B, T]: last hidden states and logits.

    Returns hidden [B, T - start, H] and logits [B, T - start, V], of positions from ``start`` on. Causal, so padding on
    the right changes nothing before it. Differentiable w.r.t. the policy's weights.
    """
    config = policy.config
    x = policy.embedding[ids]
    tables = rotary_table(config, ids.shape[1], x.dtype)
    for i, layer in enumerate(policy.layers):
        q, k, v = attention_input(x, layer, config, tables)
        # The last block's queries before `start` would be thrown away; its keys and values are needed.
        skip = start if i == config.num_hidden_layers - 1 else 0
        seen = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril()[skip:] if skip else None
        mixed = F.scaled_dot_product_attention(q[:, :, skip:], k, v, attn_mask=seen, is_causal=seen is None)
        x = x[:, skip:]
        x = x + F.linear(mixed.transpose(1, 2).reshape(x.shape), layer.output_weight)
        x = feed_forward(x, layer, config)
    x = rms_norm(x, policy.norm, config.rms_norm_eps)
    return x, F.linear(x, policy.embedding)
