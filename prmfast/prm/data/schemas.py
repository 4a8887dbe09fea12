"""What the rows of a training set say, once read: one frozen dataclass per kind of supervision, and its parser."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from prmfast.prm.data.conversation import Message, read_messages

_STEP = re.compile(r"Step \d+:")
_TAG = "ки"  # ends every step of a Math-Shepherd input; its label text has + or - there


class Example:
    """A row of a training set."""


@dataclass(frozen=True, slots=True)
class StepExample(Example):
    """A chain of steps with a label each: 1 right, 0 wrong, or a success rate between."""

    question: str
    steps: tuple[str, ...]
    labels: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class OutcomeExample(Example):
    """A conversation whose last message is an answer, and the answer's label in [0, 1]."""

    conversation: tuple[Message, ...]
    label: float


@dataclass(frozen=True, slots=True)
class PairExample(Example):
    """Two answers to the same messages, the first one better."""

    prompt: tuple[Message, ...]
    chosen: str
    rejected: str


@dataclass(frozen=True, slots=True)
class PrefixExample(Example):
    """The beginning of an answer and the share of its rollouts that end right."""

    question: str
    prefix: str
    success_prob: float


def math_shepherd(row: Mapping[str, Any]) -> StepExample:
    """``input`` ("question Step 1: ... ки\\nStep 2: ... ки") and ``label``, the same text with + or - for ки.

    The question is what stands before the first "Step k:"; steps are stripped and lose their number. ValueError where
    the two texts have different numbers of steps, or a step of the label ends neither in + nor in -.
    """
    question, *steps = _STEP.split(_text(row, "input"))
    signs = [part.strip()[-1:] for part in _STEP.split(_text(row, "label"))[1:]]
    if not steps:
        raise ValueError(f'input must have a "Step k:", got {_shown(row["input"])}')
    if len(signs) != len(steps):
        raise ValueError(f"label must have {len(steps)} steps like input, got {len(signs)}")
    for i, sign in enumerate(signs, start=1):
        if sign not in ("+", "-"):
            raise ValueError(f"label must end every step in + or -, step {i} ends in {sign!r}")
    labels = tuple(1.0 if sign == "+" else 0.0 for sign in signs)
    return StepExample(question, tuple(step.replace(_TAG, "").strip() for step in steps), labels)


def stepwise(row: Mapping[str, Any]) -> StepExample:
    """``prompt``, ``completions`` (the steps) and ``labels`` (booleans or numbers in [0, 1], one per step)."""
    steps, labels = row["completions"], row["labels"]
    if isinstance(steps, str) or not all(isinstance(step, str) for step in steps):
        raise ValueError(f"completions must be a list of strings, got {_shown(steps)}")
    if isinstance(labels, str) or len(labels) != len(steps):
        raise ValueError(f"labels must have one entry per completion ({len(steps)}), got {_shown(labels)}")
    if len(steps) == 0:
        raise ValueError("completions must not be empty, got []")
    read = tuple(_rate(f"labels[{i}]", label) for i, label in enumerate(labels))
    return StepExample(_text(row, "prompt"), tuple(steps), read)


def pointwise(row: Mapping[str, Any]) -> OutcomeExample:
    """``conversation`` (messages, the last one the assistant's) and ``label`` in [0, 1]."""
    messages = read_messages("conversation", row["conversation"])
    if messages[-1].role != "assistant":
        raise ValueError(f"conversation must end with the assistant's message, got role {messages[-1].role!r}")
    return OutcomeExample(messages, _rate("label", row["label"]))


def pairwise(row: Mapping[str, Any]) -> PairExample:
    """``chosen`` and ``rejected``: whole conversations with a common beginning, or answers to ``prompt``.

    ``prompt`` is a string (a user's message) or messages; answers are strings or one assistant message.
    """
    chosen, rejected = _answer(row, "chosen"), _answer(row, "rejected")
    prompt = row.get("prompt")
    if prompt is None:
        if len(chosen) < 2 or chosen[:-1] != rejected[:-1]:
            raise ValueError(
                "chosen and rejected must be conversations that differ in the last message alone, or answers to a "
                f"column prompt, got {len(chosen)} and {len(rejected)} messages"
            )
        before = chosen[:-1]
    else:
        if len(chosen) != 1 or len(rejected) != 1:
            raise ValueError(f"chosen and rejected must be one answer to prompt, got {len(chosen)} and {len(rejected)}")
        before = (Message("user", prompt),) if isinstance(prompt, str) else read_messages("prompt", prompt)
    return PairExample(before, chosen[-1].content, rejected[-1].content)


def success_rate(row: Mapping[str, Any]) -> PrefixExample:
    """``question``, ``reasoning_prefix`` (may be empty: the question itself) and ``success_prob`` in [0, 1]."""
    return PrefixExample(
        _text(row, "question"), _text(row, "reasoning_prefix"), _rate("success_prob", row["success_prob"])
    )


def _answer(row: Mapping[str, Any], name: str) -> tuple[Message, ...]:
    value = row[name]
    if isinstance(value, str):
        return (Message("assistant", value),)
    messages = read_messages(name, value)
    if messages[-1].role != "assistant":
        raise ValueError(f"{name} must end with the assistant's message, got role {messages[-1].role!r}")
    return messages


def _text(row: Mapping[str, Any], name: str) -> str:
    if not isinstance(row[name], str):
        raise ValueError(f"{name} must be a string, got {type(row[name]).__name__}")
    return str(row[name])


def _rate(name: str, value: Any) -> float:
    if not isinstance(value, (bool, int, float)) or math.isnan(value) or not 0 <= value <= 1:
        raise ValueError(f"{name} must be a boolean or a number in [0, 1], got {_shown(value)}")
    return float(value)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
