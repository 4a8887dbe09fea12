"""Math-Shepherd (math-shepherd-mistral-7b-prm): a causal language model that says "+" or "-" at the tag ``ки``."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, ClassVar

from prmfast.prm.adapter import EncodedChain, PRMAdapter, PRMError
from prmfast.prm.heads import TokenPairHead

TAG = "ки"


class MathShepherd(PRMAdapter):
    """``question step ки``, then ``separator`` and the next step: plain text, no chat template.

    The separator is that of the released code of [U]; the model card uses one line break (``separator="\\n"``). The
    checkpoint is an ordinary causal language model, and its config cannot tell it from others: it matches where its
    name or folder holds "shepherd", or under the architecture name ``MathShepherdPRM``.
    """

    name: ClassVar[str] = "math-shepherd"
    architectures: ClassVar[tuple[str, ...]] = ("MathShepherdPRM",)
    language_models: ClassVar[tuple[str, ...]] = ("MistralForCausalLM", "LlamaForCausalLM")

    def __init__(self, separator: str = "\n\n") -> None:
        if not separator or separator.strip():
            raise ValueError(f"separator must be white space, got {separator!r}")
        self.separator = separator

    def matches(self, config: Any, tensors: Collection[str] = ()) -> bool:
        """Its architecture name, or a causal language model called "shepherd"."""
        found = set(getattr(config, "architectures", None) or ())
        named = "shepherd" in str(getattr(config, "_name_or_path", "")).lower()
        return super().matches(config) or (named and bool(found & set(self.language_models)))

    def head(self, config: Any, tokenizer: Any = None) -> TokenPairHead:
        """The rows "+" and "-" of ``lm_head``; needs the tokenizer."""
        if tokenizer is None:
            raise ValueError('tokenizer must be given: the head is the rows "+" and "-" of its vocabulary, got None')
        rows = tokenizer.encode("+ -", add_special_tokens=False)
        if len(rows) != 2 or rows[0] == rows[1]:
            raise PRMError(
                f'{self.name}: the tokenizer must read "+ -" as two tokens, it reads {list(rows)}; load the tokenizer '
                "that was released with the checkpoint"
            )
        tied = bool(getattr(config, "tie_word_embeddings", False))
        return TokenPairHead(config.hidden_size, (int(rows[0]), int(rows[1])), tied=tied)

    def step_token(self, tokenizer: Any) -> str:
        """``ки``, id 12902 in the released tokenizer."""
        return TAG

    def step_token_id(self, tokenizer: Any) -> int:
        """Id of the last token of ``ки``, as released; PRMError where the tokenizer does not know it."""
        return self._tag(tokenizer)[-1]

    def text(self, question: str, steps: Sequence[str]) -> str:
        """The whole chain as released."""
        return f"{question} " + self.separator.join(f"{step} {TAG}" for step in steps or [""])

    def encode(self, tokenizer: Any, question: str, steps: Sequence[str]) -> EncodedChain:
        """Part by part, so that a later step cannot change the ids of an earlier one; see `PRMAdapter.encode`."""
        tag = self._tag(tokenizer)
        ids: list[int] = []
        for i, step in enumerate(steps or [""]):
            ids += self._part(tokenizer, f"{question} {step}" if i == 0 else self.separator + step, tag, first=i == 0)
        return self.chain(ids, [i for i, token in enumerate(ids) if token == tag[-1]], steps)

    def _part(self, tokenizer: Any, text: str, tag: list[int], *, first: bool) -> list[int]:
        """Ids of ``text`` and the tag behind it; ``text`` stands behind another tag unless it is the first."""
        ids = self._ids(tokenizer, f"{text} {TAG}", tag, first=first)
        if ids[-1] == tag[-1]:
            return ids
        return [*self._ids(tokenizer, text, tag, first=first), *tag]  # white space swallowed the tag's own

    def _ids(self, tokenizer: Any, text: str, tag: list[int], *, first: bool) -> list[int]:
        if first:
            whole = [int(i) for i in tokenizer(text)["input_ids"]]
            return whole[:-1] if whole[-1] == tokenizer.eos_token_id else whole
        ids = [int(i) for i in tokenizer.encode(TAG + text, add_special_tokens=False)]
        if ids[: len(tag)] != tag:
            raise PRMError(
                f"{self.name}: the tokenizer reads {TAG + self.separator!r} as {ids[: len(tag) + 1]}, not as the tag "
                f"{tag} and a separator; load the tokenizer that was released with the checkpoint"
            )
        return ids[len(tag) :]

    def _tag(self, tokenizer: Any) -> list[int]:
        ids = [int(i) for i in tokenizer.encode(TAG, add_special_tokens=False)]
        unknown = getattr(tokenizer, "unk_token_id", None)
        if not 1 <= len(ids) <= 2 or unknown in ids:
            raise PRMError(
                f"{self.name}: the tokenizer must have the step tag {TAG!r} as a token, it reads it as {ids}; load the "
                "tokenizer that was released with the checkpoint"
            )
        return ids
