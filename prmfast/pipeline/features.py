"""What a PRM and the policy itself say of an answer, step by step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Protocol, runtime_checkable

from prmfast.engines.base import Completion, Scorer


@runtime_checkable
class PolicyLogProbs(Protocol):
    """An engine that can say how likely its policy finds an answer."""

    def logprobs(self, prompts: Sequence[str], token_ids: Sequence[Sequence[int]]) -> list[list[float]]:
        """Natural log-probability, at temperature 1, of each token of an answer behind its prompt."""
        ...

    def text(self, token_ids: Sequence[int]) -> str:
        """The text of the first tokens of an answer, as in `Completion.text`, with the white space behind them."""
        ...


def question_columns(scorer: Scorer, questions: Sequence[str], *, hidden: bool) -> dict[str, list[Any]]:
    """question_score and, with ``hidden``, question_hidden: one value per question."""
    score, state = scorer.question_state(questions)
    if len(score) != len(questions):
        raise RuntimeError(f"question_state must return one score per question ({len(questions)}), got {len(score)}")
    columns: dict[str, list[Any]] = {"question_score": score.double().cpu().tolist()}
    return columns | ({"question_hidden": state.float().cpu().tolist()} if hidden else {})


def step_columns(
    scorer: Scorer,
    questions: Sequence[str],
    answers: Sequence[Sequence[str]],
    counts: Sequence[Sequence[int]],
    *,
    hidden: bool,
) -> dict[str, list[Any]]:
    """prm_step_scores and, with ``hidden``, hidden_states: one list per answer, [] for an answer without steps.

    ValueError where the PRM sees another number of steps in an answer than ``counts`` says.
    """
    # An answer without steps is nothing to judge; some PRMs give it the row of the empty answer.
    asked = [[text for text, n in zip(*pair, strict=True) if n] for pair in zip(answers, counts, strict=True)]
    columns: dict[str, list[Any]] = {"prm_step_scores": scorer.score(questions, asked)}
    if hidden:
        states = scorer.features(questions, asked)
        columns["hidden_states"] = [[state.float().cpu().tolist() for state in row] for row in states]
    return {name: _spread(name, column, answers, counts) for name, column in columns.items()}


def _spread(
    name: str, found: list[list[Any]], answers: Sequence[Sequence[str]], counts: Sequence[Sequence[int]]
) -> list[Any]:
    flat = []
    for row, texts, steps in zip(found, answers, counts, strict=True):
        values = iter(row)
        for text, n in zip(texts, steps, strict=True):
            value = next(values) if n else []
            if len(value) != n:
                raise ValueError(
                    f"splitter and PRM must cut an answer into the same steps, got {n} and {len(value)} ({name}) for "
                    f"{text!r}; give the Labeller the PRM's own splitter"
                )
            flat.append(value)
    return flat


def step_logprobs(
    engine: PolicyLogProbs, prompts: Sequence[str], done: Sequence[Completion], pieces: Sequence[Sequence[str]]
) -> list[list[float]]:
    """Log-probability of each step: the sum over its tokens, the end token with the last step.

    A token that reaches over the end of a step belongs to that step.
    """
    found = engine.logprobs(prompts, [completion.token_ids for completion in done])
    rows = []
    for completion, values, parts in zip(done, found, pieces, strict=True):
        ends, length = [0], 0
        for part in parts[:-1]:
            length += len(part)
            ends.append(_tokens_of(engine, completion, length))
        ends.append(len(values))
        rows.append([math.fsum(values[a:b]) for a, b in pairwise(ends)] if parts else [])
    return rows


def _tokens_of(engine: PolicyLogProbs, completion: Completion, length: int) -> int:
    """The smallest number of tokens whose text has at least ``length`` characters."""
    low, high = 0, len(completion.token_ids)
    while low < high:
        middle = (low + high) // 2
        if len(engine.text(completion.token_ids[:middle])) >= length:
            high = middle
        else:
            low = middle + 1
    return low
