"""The plain text of TRL's PRM training: a prompt and steps, each judged at the last token of a separator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from prmfast.prm.adapter import EncodedChain, PRMAdapter
from prmfast.prm.heads import ValueHead


class StepSeparatorPRM(PRMAdapter):
    r"""What `prmfast.prm.train.PRMTrainer` trains with a ``step_separator``, as TRL's PRMTrainer did.

    The prompt and every step are tokenised apart and put together, the begin token in front if the tokenizer has one.
    The separator may also stand inside of a step: rows are known by position, not by a token.
    """

    name: ClassVar[str] = "step-separator"
    architectures: ClassVar[tuple[str, ...]] = ("StepSeparatorPRM",)

    def __init__(self, separator: str = "\n") -> None:
        if not isinstance(separator, str):
            raise TypeError(f"separator must be a string, got {type(separator).__name__}")
        if not separator:
            raise ValueError("separator must not be empty, got ''")
        self.separator = separator

    def configured(self, config: Any) -> StepSeparatorPRM:
        """With the separator that training wrote to the config."""
        return StepSeparatorPRM(getattr(config, "prm_step_separator", self.separator))

    def head(self, config: Any, tokenizer: Any = None) -> ValueHead:
        """``v_head.summary``."""
        return ValueHead(config.hidden_size)

    def step_token(self, tokenizer: Any) -> None:
        """None: positions are sent along."""
        return None

    def text(self, question: str, steps: Sequence[str]) -> str:
        """Prompt and steps in one string; `encode` reads them part by part."""
        return question + "".join(f"{step}{self.separator}" for step in steps or [""])

    def encode(self, tokenizer: Any, question: str, steps: Sequence[str]) -> EncodedChain:
        """Token ids, and the last token of the separator behind each step; see `PRMAdapter.encode`."""
        ids, mark = self._prompt(tokenizer, question), self._ids(tokenizer, self.separator)
        if not mark:
            raise ValueError(f"separator must have a token in this tokenizer, got {self.separator!r}")
        rows = []
        for step in steps or [""]:
            ids += [*self._ids(tokenizer, step), *mark]
            rows.append(len(ids) - 1)
        return self.chain(ids, rows, steps)

    def prompt_length(self, tokenizer: Any, question: str, chain: EncodedChain) -> int:
        """Tokens of the prompt, with the begin token."""
        return len(self._prompt(tokenizer, question))

    def _prompt(self, tokenizer: Any, question: str) -> list[int]:
        begin = getattr(tokenizer, "bos_token_id", None)
        return [*([] if begin is None else [int(begin)]), *self._ids(tokenizer, question)]

    def _ids(self, tokenizer: Any, text: str) -> list[int]:
        return [int(token) for token in tokenizer(text, add_special_tokens=False)["input_ids"]]
