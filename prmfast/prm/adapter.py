"""What is particular to one process reward model: its prompt, its step token, its head."""

from __future__ import annotations

import abc
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, ClassVar

from prmfast.prm.heads import StepHead


class PRMError(RuntimeError):
    """A checkpoint, tokenizer or calibrator does not fit the PRM; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class EncodedChain:
    """A question with its steps as the PRM reads it.

    ``step_positions`` [steps] are indices into ``token_ids``, never decreasing: the rows whose hidden state judges the
    steps. The empty answer has one. Nothing behind the last step is encoded, a causal model does not see it anyway.
    """

    token_ids: tuple[int, ...]
    step_positions: tuple[int, ...]


class PRMAdapter(abc.ABC):
    """One released PRM. Stateless but for the constructor's options; `prmfast.prm`'s docstring shows a new one.

    ``incremental``: appending a step never changes the token ids before it, so a scorer may keep what it has computed.
    """

    name: ClassVar[str]
    architectures: ClassVar[tuple[str, ...]] = ()
    special_tokens: ClassVar[tuple[str, ...]] = ()  # that the template is made of; each must be one token
    incremental: ClassVar[bool] = True
    separator: str = "\n\n"

    def matches(self, config: Any, tensors: Collection[str] = ()) -> bool:
        """Whether a checkpoint is this PRM's, by its config (``architectures``) and the names of its tensors."""
        return bool(set(self.architectures) & set(getattr(config, "architectures", None) or ()))

    def configured(self, config: Any) -> PRMAdapter:
        """This adapter with the options that a checkpoint's config has for it; without any, itself."""
        return self

    @abc.abstractmethod
    def head(self, config: Any, tokenizer: Any = None) -> StepHead:
        """The untrained head for a model config; its tensors come through `StepHead.load`.

        Only a head that picks rows of the vocabulary (Math-Shepherd) needs the tokenizer, ValueError without it.
        """

    @abc.abstractmethod
    def step_token(self, tokenizer: Any) -> str | None:
        """The token at whose rows steps are judged; None where steps have no token of their own (ReasonEval).

        ``tokenizer`` may be None: the name of the token does not depend on it.
        """

    @abc.abstractmethod
    def text(self, question: str, steps: Sequence[str]) -> str:
        """The prompt up to and with the last step's token; no step is the empty answer."""

    def step_token_id(self, tokenizer: Any) -> int | None:
        """Id of the step token: the step rows are exactly the positions of this id in ``token_ids``.

        None where rows cannot be found from token ids alone: `EncodedChain.step_positions` must be sent along.
        PRMError where the tokenizer does not have the token.
        """
        token = self.step_token(tokenizer)
        if token is None:
            return None
        return self._one_token(tokenizer, token)

    def check(self, config: Any, tokenizer: Any) -> None:
        """PRMError where the tokenizer is not this PRM's or not this model's: what a loader calls first."""
        for token in self.special_tokens:
            self._one_token(tokenizer, token)
        self.step_token_id(tokenizer)
        largest = max(tokenizer.get_vocab().values())
        if largest >= config.vocab_size:
            raise PRMError(
                f"{self.name}: the tokenizer has a token id {largest}, the model's vocabulary {config.vocab_size} "
                "entries; load the tokenizer that was released with the checkpoint"
            )

    def _one_token(self, tokenizer: Any, token: str) -> int:
        found = tokenizer.encode(token, add_special_tokens=False)
        if len(found) != 1 or found[0] == getattr(tokenizer, "unk_token_id", None):
            raise PRMError(
                f"{self.name}: the tokenizer must have {token!r} as one token, it reads it as {list(found)}; load the "
                "tokenizer that was released with the checkpoint"
            )
        return int(found[0])

    def split_steps(self, answer: str) -> list[str]:
        """The steps of an answer: its parts between ``separator``, without empty ones; marks left out."""
        return [part for part in self.without_marks(answer).split(self.separator) if part.strip()]

    def without_marks(self, answer: str) -> str:
        """``answer`` without the template's own tokens: a policy that writes them would mark steps of its own."""
        step_token = self.step_token(None)
        marks = [*self.special_tokens, *([step_token] if step_token is not None else [])]
        while any(mark in answer for mark in marks):  # what is left may join to a mark again
            for mark in marks:
                answer = answer.replace(mark, "")
        return answer

    def format_steps(self, steps: Sequence[str]) -> list[str]:
        """Steps of a data set as `split_steps` would give them: what `encode` is to read in training; as they are."""
        return list(steps)

    def encode(self, tokenizer: Any, question: str, steps: Sequence[str]) -> EncodedChain:
        """Token ids and step rows of a question and its steps; no step is the empty answer, judged by one row.

        ValueError where the question or a step contains the step token itself.
        """
        mark = self.step_token_id(tokenizer)
        ids = [int(token) for token in tokenizer(self.text(question, steps))["input_ids"]]
        positions = [i for i, token in enumerate(ids) if token == mark]
        return self.chain(ids[: positions[-1] + 1] if positions else ids, positions, steps)

    def prompt_length(self, tokenizer: Any, question: str, chain: EncodedChain) -> int:
        """Tokens of ``chain`` that stand before its first step: those that the empty answer's has too."""
        empty = self.encode(tokenizer, question, []).token_ids
        common = takewhile(lambda pair: pair[0] == pair[1], zip(chain.token_ids, empty, strict=False))
        return sum(1 for _ in common)

    def chain(self, token_ids: Sequence[int], positions: Sequence[int], steps: Sequence[str]) -> EncodedChain:
        """A checked `EncodedChain`; ValueError unless there is one row per step."""
        expected = max(len(steps), 1)
        if len(positions) != expected:
            raise ValueError(
                f"{self.name}: a chain of {len(steps)} steps must have {expected} rows, found {len(positions)}: "
                "question and steps must not contain the step token"
            )
        return EncodedChain(tuple(token_ids), tuple(positions))
