"""ReasonEval-7B / -34B: three classes at the last token of each step, no step token in what the model reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from prmfast.prm.adapter import EncodedChain, PRMAdapter, PRMError
from prmfast.prm.heads import ReasonEvalHead

Variant = Literal["paper", "released"]


class ReasonEval(PRMAdapter):
    """A question and an answer; steps are tokenised apart and the separators between them left out again.

    ``variant="paper"`` judges a step at its last token, as training does. ``variant="released"`` repeats the released
    scoring of the 7B model, whose separator is also its start token: its index is one token too early.
    """

    name: ClassVar[str] = "reasoneval"
    architectures: ClassVar[tuple[str, ...]] = ("ReasonEval_7B", "ReasonEval_34B")

    def __init__(self, variant: Variant = "paper") -> None:
        if variant not in ("paper", "released"):
            raise ValueError(f"variant must be 'paper' or 'released', got {variant!r}")
        self.variant = variant

    def head(self, config: Any, tokenizer: Any = None) -> ReasonEvalHead:
        """``score_head``, with the config's ``use_bias``; ValueError where ``score_dimension`` is not 3."""
        classes = getattr(config, "score_dimension", 3)
        if classes != 3:
            raise ValueError(f"config.score_dimension must be 3 (negative, neutral, positive), got {classes}")
        return ReasonEvalHead(config.hidden_size, bias=bool(getattr(config, "use_bias", False)))

    def step_token(self, tokenizer: Any) -> None:
        """None: boundaries are derived and sent along as positions."""
        return None

    def check(self, config: Any, tokenizer: Any) -> None:
        """PRMError where the tokenizer has no separator, or is another model's."""
        super().check(config, tokenizer)
        self._separator(tokenizer)

    def text(self, question: str, steps: Sequence[str]) -> str:
        """What the model reads, as text: the separators are left out again before it sees them."""
        return f"Question:\n{question}\nAnswer:\nLet's think step by step.\n" + "".join(steps)

    def encode(self, tokenizer: Any, question: str, steps: Sequence[str]) -> EncodedChain:
        """Token ids without separators and the rows that judge the steps; see `PRMAdapter.encode`.

        ValueError for a step without a token: it would be judged at the row of the step before.
        """
        mark = self._separator(tokenizer)
        ids = tokenizer("".join(f"{part}{mark}" for part in (self.text(question, []), *steps)))["input_ids"]
        kept, bounds, early = self.remove_separators(ids, int(tokenizer.convert_tokens_to_ids(mark)))
        if len(bounds) == len(steps) + 1:
            for i in range(len(steps)):
                if bounds[i + 1] == bounds[i]:
                    raise ValueError(f"steps[{i}] must have at least one token, got {steps[i]!r}")
        ends = bounds[1:] if steps else bounds
        return self.chain(kept, [end - early for end in ends], steps)

    def remove_separators(self, token_ids: Sequence[int], separator: int) -> tuple[list[int], list[int], int]:
        """(ids without separators, index of the last token of the prompt and of every step, how early to read).

        A separator at the front is the start token and stays.
        """
        ids = [int(token) for token in token_ids]
        starts = bool(ids) and ids[0] == separator
        kept: list[int] = ids[:1] if starts else []
        bounds = []
        for token in ids[1:] if starts else ids:
            if token == separator:
                bounds.append(len(kept) - 1)
            else:
                kept.append(token)
        return kept, bounds, int(starts and self.variant == "released")

    def _separator(self, tokenizer: Any) -> str:
        token = getattr(tokenizer, "pad_token", None)
        if token is None or tokenizer.encode(token, add_special_tokens=False) != [tokenizer.pad_token_id]:
            raise PRMError(
                f"{self.name}: the tokenizer's pad_token separates the steps and must be one token, got {token!r}; "
                'load the tokenizer that was released with the checkpoint, or set tokenizer.pad_token = "<s>"'
            )
        return str(token)
