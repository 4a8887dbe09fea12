"""PQM and other value-head PRMs (TRL's ``v_head.summary``): one number per step at ``[PRM]``."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import Any, ClassVar, Literal

from prmfast.prm.adapter import PRMAdapter
from prmfast.prm.heads import ValueHead

PROMPTS = {
    "eval": (
        "Below is an instruction that describes a task.\nWrite a response that appropriately completes the request.\n\n"
        "### Instruction:\n{question}\n\n### Response: Let's think step by step"
    ),
    "train": "[INST] {question} [/INST]",
}
_STEP = re.compile(r"Step \d+:")


class ValueHeadPRM(PRMAdapter):
    """PQM [Q]: the prompt, then one line per step, each ending in `` [PRM]``.

    prompt: the released code scores with one ("eval") and trains with another ("train")
    variant: how an answer's steps are numbered. "paper": from 1. "released": by their place among the raw parts of the
        split, so that an answer that begins with "Step 1:" begins with "Step 2:" here.
    """

    name: ClassVar[str] = "pqm"
    architectures: ClassVar[tuple[str, ...]] = ("ValueHeadPRM", "AutoModelForCausalLMWithValueHead")

    def __init__(
        self, prompt: Literal["eval", "train"] = "eval", variant: Literal["paper", "released"] = "paper"
    ) -> None:
        if prompt not in PROMPTS:
            raise ValueError(f"prompt must be 'eval' or 'train', got {prompt!r}")
        if variant not in ("paper", "released"):
            raise ValueError(f"variant must be 'paper' or 'released', got {variant!r}")
        self.prompt = prompt
        self.variant = variant

    def matches(self, config: Any, tensors: Collection[str] = ()) -> bool:
        """Its architecture names, or a value head among the checkpoint's tensors."""
        return super().matches(config) or "v_head.summary.weight" in tensors

    def head(self, config: Any, tokenizer: Any = None) -> ValueHead:
        """``v_head.summary``."""
        return ValueHead(config.hidden_size)

    def step_token(self, tokenizer: Any) -> str:
        """``[PRM]``, a special token that training added."""
        return "[PRM]"

    def split_steps(self, answer: str) -> list[str]:
        """Parts between "Step k:", numbered again: the number is part of a step's text."""
        parts = list(enumerate((part.strip() for part in _STEP.split(self.without_marks(answer))), start=1))
        parts = [(number, part) for number, part in parts if part]
        if self.variant == "paper":
            parts = [(number, part) for number, (_, part) in enumerate(parts, start=1)]
        return [f"Step {number}: {part}" for number, part in parts]

    def format_steps(self, steps: Sequence[str]) -> list[str]:
        """With "Step k:" in front of each step that does not begin with a number of its own."""
        return [step if _STEP.match(step) else f"Step {number}: {step}" for number, step in enumerate(steps, start=1)]

    def text(self, question: str, steps: Sequence[str]) -> str:
        """Prompt, line break, steps."""
        answer = "\n".join(f"{step} [PRM]" for step in steps or [""])
        return PROMPTS[self.prompt].replace("{question}", question) + "\n" + answer
