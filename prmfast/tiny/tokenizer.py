"""The tiny world's vocabulary as a Hugging Face tokenizer: one word, one token, split at whitespace."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from prmfast._files import write_text
from prmfast.tiny.task import EOS, PAD, TOKEN_ID, UNK


def build_tokenizer() -> Any:
    """A ``transformers.PreTrainedTokenizerFast`` (WordLevel) that agrees with ``task.encode`` and ``task.decode``.

    Needs transformers; a word outside the vocabulary becomes ``<unk>``.
    """
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(WordLevel(dict(TOKEN_ID), unk_token=UNK))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNK,
        padding_side="left",
        model_max_length=64,
        clean_up_tokenization_spaces=False,
    )


def save_tokenizer(directory: Path) -> None:
    """``build_tokenizer().save_pretrained``, under the class name that transformers 4 and 5 both know."""
    build_tokenizer().save_pretrained(directory)
    path = directory / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    write_text(path, json.dumps(config, indent=2, sort_keys=True) + "\n")
