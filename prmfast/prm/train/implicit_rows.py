"""Conversations with an outcome, or pairs of answers, as token ids with a mask over the answer."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from prmfast.prm.answers import Answer, pad_answers
from prmfast.prm.data import Example, OutcomeExample, PairExample, encode_conversation
from prmfast.prm.data.conversation import Message
from prmfast.prm.losses._common import PADDING


class ImplicitRow(NamedTuple):
    """One answer and its label, or a chosen and a rejected answer and the label 1; -100 for an empty row."""

    answers: tuple[Answer, ...]
    label: float


class ImplicitRows(Dataset[ImplicitRow]):
    """A training set of an implicit model: `OutcomeExample` alone, or with ``pairs`` `PairExample` alone.

    Conversations are encoded by the tokenizer's chat template and cut from the front to ``max_length`` tokens
    (`encode_conversation`). ``rows[len(rows)]`` is an empty row. TypeError for another kind of example.
    """

    def __init__(self, examples: Iterable[Example], tokenizer: Any, *, max_length: int, pairs: bool) -> None:
        wanted = PairExample if pairs else OutcomeExample
        self._pairs = pairs
        self._rows = []
        for number, example in enumerate(examples):
            if not isinstance(example, wanted):
                raise TypeError(f"examples[{number}] must be a {wanted.__name__}, got {type(example).__name__}")
            self._rows.append(_row(example, tokenizer, max_length))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> ImplicitRow:
        if index == len(self._rows):
            empty = Answer((0,), (False,), torch.empty(0, dtype=torch.float64))
            return ImplicitRow((empty,) * (2 if self._pairs else 1), float(PADDING))
        return self._rows[index]

    @property
    def lengths(self) -> list[int]:
        """Tokens of the longest answer of each row, prompt included."""
        return [max(len(answer.token_ids) for answer in row.answers) for row in self._rows]

    @property
    def answers(self) -> list[Answer]:
        """All answers, row by row."""
        return [answer for row in self._rows for answer in row.answers]

    @property
    def fingerprint(self) -> str:
        """SHA-256 of ids and masks."""
        digest = hashlib.sha256()
        for answer in self.answers:
            digest.update(repr((answer.token_ids, answer.mask)).encode())
        return digest.hexdigest()

    def set_reference(self, values: Sequence[Tensor]) -> None:
        """Gives every answer, in the order of ``answers``, the log-probabilities of its masked tokens, float64."""
        left = iter(values)
        self._rows = [
            row._replace(answers=tuple(answer._replace(reference=next(left)) for answer in row.answers))
            for row in self._rows
        ]


def _row(example: Example, tokenizer: Any, max_length: int) -> ImplicitRow:
    if isinstance(example, PairExample):
        both = [(*example.prompt, Message("assistant", text)) for text in (example.chosen, example.rejected)]
        return ImplicitRow(tuple(_answer(conversation, tokenizer, max_length) for conversation in both), 1.0)
    assert isinstance(example, OutcomeExample)
    return ImplicitRow((_answer(example.conversation, tokenizer, max_length),), example.label)


def _answer(conversation: Sequence[Message], tokenizer: Any, max_length: int) -> Answer:
    encoded = encode_conversation(conversation, tokenizer, max_length=max_length)
    return Answer(encoded.token_ids, (False, *encoded.answer_mask[1:]))  # nothing predicts the first token


def collate_answers(rows: Sequence[ImplicitRow]) -> dict[str, Tensor]:
    """``labels`` [B], and of all S answers, first ones first: ids, masks and ``reference`` [S, T] float64.

    Ids are padded with 0 behind the end; ``reference`` is left out where the rows have none.
    """
    answers = [row.answers[i] for i in range(len(rows[0].answers)) for row in rows]
    batch = pad_answers(answers)
    batch["labels"] = torch.tensor([row.label for row in rows])
    if all(answer.reference is not None for answer in answers):
        batch["reference"] = torch.zeros(batch["input_ids"].shape, dtype=torch.float64)
        batch["reference"][batch["answer_mask"]] = torch.cat([a.reference for a in answers if a.reference is not None])
    return batch
