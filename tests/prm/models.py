"""Tokenizers and tiny random checkpoints in the layouts of the released PRMs; nothing is downloaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    LlamaPreTrainedModel,
    MistralConfig,
    MistralForCausalLM,
    MistralModel,
    MistralPreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2Model,
    Qwen2PreTrainedModel,
)

SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
}
CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<extra_0>")


def byte_level(
    special: tuple[str, ...] | dict[str, int], merges: tuple[tuple[str, str], ...] = (("s", "t"), ("Ġ", "S"))
) -> Any:
    """Bytes as tokens 0..255 in the order of the byte-level alphabet, the merges, the special tokens.

    The special tokens follow, or have ids of their own.
    """
    pieces = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in merges)]
    vocabulary = {piece: i for i, piece in enumerate(pieces)} | (special if isinstance(special, dict) else {})
    special = tuple(special)
    tokenizer = Tokenizer(models.BPE(vocabulary, list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=special[0], eos_token=special[0])


def sentencepiece(
    *, tag: str = "joined", scheme: str = "metaspace", pad: str | None = None, released: bool = False
) -> Any:
    """Mistral's kind: ▁ for spaces, byte fallback for line breaks, <s> in front; id 1 is <s>.

    tag: " ки" is one token ("joined"), or "▁" and "ки" ("apart"), or missing ("none")
    released: "▁+", "▁-" and the tag have the ids of the released tokenizer
    scheme: where the first ▁ comes from; "metaspace" as files are written today, "prepend" as they were
    """
    merges = [("▁", "▁"), ("▁", "+"), ("▁", "-"), ("S", "t"), ("▁", "St"), ("e", "p")]
    merges += {"joined": [("к", "и"), ("▁", "ки")], "apart": [("к", "и")], "none": []}[tag]
    letters = ["▁", *(chr(i) for i in range(33, 127)), *([] if tag == "none" else "ки")]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *map("".join, merges), *letters]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    if released:
        vocabulary |= {"▁+": 648, "▁-": 387, "▁ки" if tag == "joined" else "ки": 12902}
    bpe = models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True)
    tokenizer = Tokenizer(bpe)
    if scheme == "prepend":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in ("<unk>", "<s>", "</s>")])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token=pad
    )


def with_end(tokenizer: Any) -> Any:
    """The same tokenizer, appending its end token to every text."""
    single = f"{tokenizer.bos_token or ''} $A {tokenizer.eos_token}".strip()
    special = [token for token in (tokenizer.bos_token, tokenizer.eos_token) if token is not None]
    pairs = [(token, tokenizer.convert_tokens_to_ids(token)) for token in special]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=pairs)
    return tokenizer


class Qwen2ForProcessRewardModel(Qwen2PreTrainedModel):
    """The layout of the hub's remote code: backbone, and two linear layers on its last hidden states."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = Qwen2Model(config)
        width = config.hidden_size
        self.score = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2))
        self.post_init()

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.score(self.model(input_ids).last_hidden_state)


class ReasonEval_7B(MistralPreTrainedModel):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = MistralModel(config)
        self.score_head = nn.Linear(config.hidden_size, config.score_dimension, bias=config.use_bias)
        self.post_init()

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.score_head(self.model(input_ids).last_hidden_state)


class ReasonEval_34B(LlamaPreTrainedModel):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = LlamaModel(config)
        self.score_head = nn.Linear(config.hidden_size, config.score_dimension, bias=config.use_bias)
        self.post_init()

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.score_head(self.model(input_ids).last_hidden_state)


class LlamaWithValueHead(LlamaPreTrainedModel):
    """What TRL writes: a causal language model and ``v_head.summary`` beside it."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = LlamaModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.v_head = nn.ModuleDict({"summary": nn.Linear(config.hidden_size, 1)})
        self.post_init()

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.v_head["summary"](self.model(input_ids).last_hidden_state)


def make(kind: str, seed: int = 0, **options: Any) -> tuple[Any, Any]:
    """(model float32 with random weights, tokenizer) of a released PRM's layout."""
    torch.manual_seed(seed)
    if kind == "qwen":
        tokenizer = byte_level(CHATML)
        model: Any = Qwen2ForProcessRewardModel(Qwen2Config(vocab_size=len(tokenizer) + 3, **SIZES, **options))
    elif kind == "shepherd":
        tokenizer = sentencepiece()
        model = MistralForCausalLM(MistralConfig(vocab_size=len(tokenizer), **SIZES, **options))
    elif kind == "shepherd-llama":
        tokenizer = sentencepiece(tag="apart", scheme="prepend")
        model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **SIZES, **options))
    elif kind == "reasoneval":
        tokenizer = sentencepiece(pad="<s>")
        config = MistralConfig(vocab_size=len(tokenizer), score_dimension=3, use_bias=False, **SIZES, **options)
        model = ReasonEval_7B(config)
    elif kind == "reasoneval-34b":
        tokenizer = sentencepiece(pad="</s>")
        config = LlamaConfig(vocab_size=len(tokenizer), score_dimension=3, use_bias=True, **SIZES, **options)
        model = ReasonEval_34B(config)
    else:
        tokenizer = byte_level(("<|endoftext|>", "[PRM]"))
        model = LlamaWithValueHead(LlamaConfig(vocab_size=len(tokenizer), **SIZES, **options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.3)
    return model.eval(), tokenizer


def save(kind: str, folder: Path, **options: Any) -> tuple[Path, Any, Any]:
    """(folder that AutoPRM reads, the reference model in float64, its tokenizer)."""
    model, tokenizer = make(kind, **options)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    if kind == "pqm":  # TRL leaves the language model's name in the config
        config["architectures"] = ["LlamaForCausalLM"]
    if kind == "qwen":  # the hub's config points at remote code
        config["auto_map"] = {
            "AutoConfig": "configuration_qwen2_rm.Qwen2RMConfig",
            "AutoModel": "modeling_qwen2_rm.Qwen2ForProcessRewardModel",
        }
    path.write_text(json.dumps(config))
    return folder, model.double(), tokenizer
