"""Examples as token ids with one label per step row."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypedDict

from torch.utils.data import Dataset

from prmfast.prm.adapter import PRMAdapter
from prmfast.prm.data.schemas import Example, OutcomeExample, PrefixExample, StepExample
from prmfast.prm.losses._common import PADDING


class StepRow(TypedDict):
    """Token ids, and of each step its position and its label (-100: none)."""

    input_ids: list[int]
    step_positions: list[int]
    labels: list[float]


class StepRows(Dataset[StepRow]):
    """The chains of a training set as an adapter encodes them.

    A `StepExample` has a label at every step, an `OutcomeExample` (its last user message is the question) and a
    `PrefixExample` at the last one. ``rows[len(rows)]`` is an empty row without steps: what fills the last batch.

    Args:
        examples: of `read_examples`; TypeError for a pair, which has no label per step.
        max_length: tokens of a row; steps that end behind it are cut off, a row without a labelled step left is left
            out. None keeps everything.
        last_step_only: a label at the last step alone.
        whole: rows that are too long are left out instead of cut, for a loss of the whole chain.

    Attributes:
        left_out: number of examples that are too long.
    """

    def __init__(
        self,
        examples: Iterable[Example],
        adapter: PRMAdapter,
        tokenizer: Any,
        *,
        max_length: int | None = None,
        last_step_only: bool = False,
        whole: bool = False,
    ) -> None:
        if max_length is not None and max_length < 1:
            raise ValueError(f"max_length must be at least 1, got {max_length}")
        self._adapter, self._tokenizer = adapter, tokenizer
        self._rows: list[StepRow] = []
        self.left_out = 0
        for number, example in enumerate(examples):
            try:
                row = self._read(example, last_step_only)
            except (TypeError, ValueError) as error:
                raise type(error)(f"examples[{number}]: {error}") from error
            cut = row if max_length is None else _cut(row, max_length)
            if len(cut["labels"]) < len(row["labels"]) and (whole or set(cut["labels"]) <= {PADDING}):
                self.left_out += 1
                continue
            self._rows.append(cut)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> StepRow:
        if index == len(self._rows):
            return {"input_ids": [0], "step_positions": [], "labels": []}
        return self._rows[index]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row."""
        return [len(row["input_ids"]) for row in self._rows]

    def _read(self, example: Example, last_step_only: bool) -> StepRow:
        question, steps, labels = _parts(example, self._adapter)
        chain = self._adapter.encode(self._tokenizer, question, self._adapter.format_steps(steps))
        if last_step_only:
            labels = [*[float(PADDING)] * (len(labels) - 1), labels[-1]]
        return {
            "input_ids": list(chain.token_ids),
            "step_positions": list(chain.step_positions),
            "labels": labels,
        }


def _parts(example: Example, adapter: PRMAdapter) -> tuple[str, Sequence[str], list[float]]:
    """Question, steps and a label per row (one for the empty answer)."""
    if isinstance(example, StepExample):
        return example.question, example.steps, list(example.labels)
    if isinstance(example, PrefixExample):
        question, answer, label = example.question, example.prefix, example.success_prob
    elif isinstance(example, OutcomeExample):
        asked = [message.content for message in example.conversation[:-1] if message.role == "user"]
        if not asked:
            raise ValueError("conversation must have a user's message before the answer, got none")
        question, answer, label = asked[-1], example.conversation[-1].content, example.label
    else:
        raise TypeError(f"a value head learns from steps, prefixes or outcomes, got {type(example).__name__}")
    steps = adapter.split_steps(answer)
    return question, steps, [*[float(PADDING)] * (max(len(steps), 1) - 1), label]


def _cut(row: StepRow, max_length: int) -> StepRow:
    """The steps whose row is among the first ``max_length`` tokens; nothing behind the last one."""
    kept = sum(position < max_length for position in row["step_positions"])
    end = row["step_positions"][kept - 1] + 1 if kept else 0
    return {
        "input_ids": row["input_ids"][:end],
        "step_positions": row["step_positions"][:kept],
        "labels": row["labels"][:kept],
    }
