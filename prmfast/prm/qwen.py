"""Qwen2.5-Math-PRM-7B / -72B and Qwen2.5-Math-7B-PRM800K: a two-class head at every ``<extra_0>``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from prmfast.prm.adapter import PRMAdapter
from prmfast.prm.heads import ProcessRewardHead

# as in the released code of [U]; the model card says "within \boxed{}": pass that as `system` to follow it
SYSTEM = "Please reason step by step, and put your final answer in \\boxed{}."


class QwenMathPRM(PRMAdapter):
    """ChatML with a system line; steps, split at blank lines, each followed by ``<extra_0>``.

    The released text goes on with ``<|im_end|>``; it stands behind the last row, so it is not encoded.
    """

    name: ClassVar[str] = "qwen2.5-math-prm"
    architectures: ClassVar[tuple[str, ...]] = ("Qwen2ForProcessRewardModel",)
    special_tokens: ClassVar[tuple[str, ...]] = ("<|im_start|>", "<|im_end|>")

    def __init__(self, system: str = SYSTEM) -> None:
        self.system = system

    def head(self, config: Any, tokenizer: Any = None) -> ProcessRewardHead:
        """``score.0`` and ``score.2``."""
        return ProcessRewardHead(config.hidden_size)

    def step_token(self, tokenizer: Any) -> str:
        """``<extra_0>``, id 151651 in the released tokenizers."""
        return "<extra_0>"

    def text(self, question: str, steps: Sequence[str]) -> str:
        """The chat template's text up to and with the last ``<extra_0>``."""
        answer = "".join(f"{step}<extra_0>" for step in steps or [""])
        return (
            f"<|im_start|>system\n{self.system}<|im_end|>\n"
            f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{answer}"
        )
