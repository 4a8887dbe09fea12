"""Examples as token ids with one label per step row."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypedDict

from torch.utils.data import Dataset

from prmfast.prm.adapter import PRMAdapter
from prmfast.prm.data.schemas import Example, OutcomeExample, PrefixExample, StepExample
from prmfast.prm.losses._common import PADDING


class StepRow(TypedDict):
    """Token ids, and of each step its position and its label (-100: none)."""

    input_ids: list[int]
    step_positions: list[int]
    labels: list[float]


class RowLimits(NamedTuple):
    """Most tokens of a row, each None for no limit; with the meaning they had in TRL.

    total: of prompt and steps; what is behind is cut off. prompt: of what stands before the first step, cut from its
    beginning. completion: of the steps with their separators, cut at the end. A cut step has no label.
    """

    total: int | None = None
    prompt: int | None = None
    completion: int | None = None

    def check(self) -> RowLimits:
        """Itself; ValueError that names a limit under 1."""
        for name, value in zip(("max_length", "max_prompt_length", "max_completion_length"), self, strict=True):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        return self


class StepRows(Dataset[StepRow]):
    """The chains of a training set as an adapter encodes them.

    A `StepExample` has a label at every step, an `OutcomeExample` (its last user message is the question) and a
    `PrefixExample` at the last one. ``rows[len(rows)]`` is an empty row without steps: what fills the last batch.

    Args:
        examples: of `read_examples`; TypeError for a pair, which has no label per step.
        limits: how rows are cut; a row without a labelled step left is left out.
        last_step_only: a label at the last step alone.
        whole: rows that are too long are left out instead of cut, for a loss of the whole chain.
        processes: that tokenise; None: this one.

    Attributes:
        left_out: number of examples that are too long.
    """

    def __init__(
        self,
        examples: Iterable[Example],
        adapter: PRMAdapter,
        tokenizer: Any,
        *,
        limits: RowLimits | None = None,
        last_step_only: bool = False,
        whole: bool = False,
        processes: int | None = None,
    ) -> None:
        if processes is not None and processes < 1:
            raise ValueError(f"processes must be at least 1 or None, got {processes}")
        reader = _Reader(adapter, tokenizer, (limits or RowLimits()).check(), last_step_only, whole)
        rows = _read_all(reader, list(enumerate(examples)), processes)
        self._rows = [row for row in rows if row is not None]
        self.left_out = len(rows) - len(self._rows)

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


@dataclass(frozen=True)
class _Reader:
    """Makes a row of a numbered example, None where it is too long."""

    adapter: PRMAdapter
    tokenizer: Any
    limits: RowLimits
    last_step_only: bool
    whole: bool

    def __call__(self, numbered: tuple[int, Example]) -> StepRow | None:
        number, example = numbered
        try:
            return self._row(example)
        except (TypeError, ValueError) as error:
            raise type(error)(f"examples[{number}]: {error}") from error

    def _row(self, example: Example) -> StepRow | None:
        question, steps, labels = _parts(example, self.adapter)
        chain = self.adapter.encode(self.tokenizer, question, self.adapter.format_steps(steps))
        if self.last_step_only:
            labels = [*[float(PADDING)] * (len(labels) - 1), labels[-1]]
        row: StepRow = {
            "input_ids": list(chain.token_ids),
            "step_positions": list(chain.step_positions),
            "labels": labels,
        }
        limits = self.limits
        if len(chain.token_ids) > min((limit for limit in limits if limit is not None), default=len(chain.token_ids)):
            row = _cut(row, self.adapter.prompt_length(self.tokenizer, question, chain), limits)
        cut = len(row["labels"]) < len(labels)
        return None if cut and (self.whole or set(row["labels"]) <= {PADDING}) else row


def _read_all(reader: _Reader, numbered: list[tuple[int, Example]], processes: int | None) -> list[StepRow | None]:
    if processes in (None, 1):
        return [reader(one) for one in numbered]
    # fork, where there is one: the main module of a script need not be importable, as spawn asks
    kind = "fork" if "fork" in multiprocessing.get_all_start_methods() else None
    with multiprocessing.get_context(kind).Pool(processes, _one_thread) as pool:
        return pool.map(reader, numbered, chunksize=-(-len(numbered) // (4 * (processes or 1))) or 1)


def _one_thread() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a tokenizer's own threads do not live on in a fork


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


def _cut(row: StepRow, prompt: int, limits: RowLimits) -> StepRow:
    """A row within ``limits``, whose prompt has ``prompt`` tokens; nothing behind the last step that is left."""
    drop = 0 if limits.prompt is None else max(0, prompt - limits.prompt)
    ends = [len(row["input_ids"]) - drop if limits.total is None else limits.total]
    if limits.completion is not None:
        ends.append(prompt - drop + limits.completion)
    positions = [position - drop for position in row["step_positions"]]
    kept = sum(position < min(ends) for position in positions)
    return {
        "input_ids": row["input_ids"][drop : drop + positions[kept - 1] + 1] if kept else [],
        "step_positions": positions[:kept],
        "labels": row["labels"][:kept],
    }
