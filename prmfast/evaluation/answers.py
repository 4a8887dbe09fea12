"""Answers of a file as an evaluation needs them: steps and their first error, outcomes, final answers, scores."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from prmfast.evaluation.processbench import Chain, chain_of_row
from prmfast.prm.data import read_rows
from prmfast.prm.data.schemas import math_shepherd, stepwise

if TYPE_CHECKING:
    import pyarrow as pa

SCORES = {"prm_step_scores": "PRM", "prm_process_scores": "process"}  # columns of scored files: names in tables
_QUESTIONS = ("question", "problem", "puzzle", "prompt")
_IDS = ("question_id", "qkey")
_ANSWER = re.compile(r"answer:((?:(?!answer:).)+)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class StoredAnswer:
    """One row of a file.

    steps: None where the PRM is to split ``completion`` itself. first_error: index of the first wrong step, -1 for
    none, None where it is not known. correct: None where it is not known. answer: the final answer, for votes.
    """

    question_id: str
    question: str
    completion: str
    steps: tuple[str, ...] | None = None
    first_error: int | None = None
    correct: bool | None = None
    answer: str | None = None
    policy_id: str = ""
    subset: str = ""

    def chain(self) -> Chain:
        """The answer with its first error; TypeError where that is not known."""
        if self.steps is None or self.first_error is None:
            raise TypeError(f"an answer to {self.question_id!r} must have steps and a first error to be a chain")
        return Chain(self.question, self.steps, self.first_error, self.question_id, self.subset)


def read_answer_table(path: str | os.PathLike[str], *, limit: int | None = None) -> pa.Table:
    """The rows of a .parquet, .jsonl or .json file, or at most ``limit`` of them, spread evenly over it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if os.fspath(path).endswith(".parquet"):
        try:
            table = pq.read_table(os.fspath(path))
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise ValueError(f"{os.fspath(path)} must be parquet: {str(error).splitlines()[0]}") from error
    else:
        table = pa.Table.from_pylist(list(read_rows(path)))
    if table.num_rows == 0:
        raise ValueError(f"{os.fspath(path)} must have at least one row, got none")
    if limit is None or limit >= table.num_rows:
        return table
    return table.take([i * table.num_rows // limit for i in range(limit)])


def read_answers(
    table: pa.Table,
    *,
    source: str = "answers",
    question_column: str | None = None,
    policy_id: str | None = None,
    scored: bool = False,
) -> tuple[list[StoredAnswer], list[int]]:
    """The answers of a table, and the number of the row of each.

    A row has one of these forms; ``correct`` (boolean, 0, 1 or null) may stand in any:

    - ``steps`` and ``first_error`` or an integer ``label``, -1 for none (ProcessBench, BIG-Bench Mistake)
    - ``prompt``, ``completions``, ``labels``; or ``input``, ``label`` (Math-Shepherd): the first label under 1 is the
      first error
    - ``completion``, ``step_labels`` of its lines behind the first, 2 where a step is right (Game of 24)
    - ``completion``, and perhaps ``steps``: outcomes alone

    The question is ``question``, problem, puzzle or prompt, its id ``question_id``, qkey or its text; ``pred_answer``
    is the final answer, otherwise what is boxed or stands behind "Answer:" in the completion. policy_id: only rows
    whose policy_id or model is this, where there is such a column. scored: questions need no text, an id will do.
    ValueError that names the row.
    """
    if question_column is not None and question_column not in table.column_names:
        raise ValueError(f"question_column must be one of {', '.join(table.column_names)}, got {question_column!r}")
    found, rows, policies = [], [], set()
    for number, row in enumerate(table.to_pylist()):
        policy = str(row.get("policy_id") or row.get("model") or "")
        policies.add(policy)
        if policy_id is not None and policies != {""} and policy != policy_id:
            continue
        found.append(_answer(row, f"{source}: row {number}", question_column, policy, scored))
        rows.append(number)
    if not found:
        raise ValueError(f"policy_id must be one of {', '.join(sorted(policies))}, got {policy_id!r}")
    return found, rows


def read_scores(table: pa.Table, answers: Sequence[StoredAnswer], rows: Sequence[int]) -> dict[str, list[Any]]:
    """Step scores of ``answers`` that the table carries, by name; None where an answer has none.

    Columns: prm_step_scores, and prm_process_scores where an implicit model gave both. ValueError without the first,
    for a score outside of [0, 1], and for other than one score per step.
    """
    present = {column: name for column, name in SCORES.items() if column in table.column_names}
    if "prm_step_scores" not in present:
        raise ValueError(
            "FILE must have the column prm_step_scores to be evaluated without a PRM, got "
            f"{', '.join(table.column_names)}"
        )
    if len(present) == 2:
        present["prm_step_scores"] = "prefix"
    scores: dict[str, list[Any]] = {}
    for column, name in present.items():
        values = table.column(column).to_pylist()
        scores[name] = [values[row] for row in rows]
        for answer, row, found in zip(answers, rows, scores[name], strict=True):
            if found is None:
                continue
            if any(score is None or not 0 <= score <= 1 for score in found):
                raise ValueError(f"row {row}: {column} must lie in [0, 1], got {found!r:.80}")
            if answer.steps is not None and len(found) != len(answer.steps):
                raise ValueError(f"row {row}: {column} must have one entry per step ({len(answer.steps)}), got {found}")
    return scores


def _answer(row: Mapping[str, Any], where: str, question_column: str | None, policy: str, scored: bool) -> StoredAnswer:
    steps, first, subset = _steps(row, where)
    completion = row.get("completion")
    if completion is None:
        completion = "\n\n".join(steps or ())
    elif not isinstance(completion, str):
        raise ValueError(f"{where}: completion must be a string, got {type(completion).__name__}")
    if steps is None and not row.get("completion"):
        raise ValueError(f"{where}: must have a completion or steps, got {', '.join(sorted(row))}")
    question = _question(row, where, question_column, scored)
    correct = row.get("correct")
    if correct not in (None, 0, 1):
        raise ValueError(f"{where}: correct must be a boolean, 0, 1 or null, got {correct!r}")
    given = row.get("pred_answer")
    return StoredAnswer(
        question_id=next((str(row[name]) for name in _IDS if row.get(name) is not None), question),
        question=question,
        completion=completion,
        steps=steps,
        first_error=first,
        correct=None if correct is None else bool(correct),
        answer=str(given) if given is not None else final_answer(completion),
        policy_id=policy,
        subset=subset,
    )


def _question(row: Mapping[str, Any], where: str, column: str | None, scored: bool) -> str:
    if column is None and isinstance(row.get("input"), str) and "label" in row:
        return math_shepherd(row).question
    names = _QUESTIONS if column is None else (column,)
    for name in names:
        if isinstance(row.get(name), str):
            return str(row[name])
    ids = [str(row[name]) for name in _IDS if row.get(name) is not None]
    if column is None and ids and scored:
        return ids[0]
    raise ValueError(f"{where}: must have a question in {' or '.join(names)}, got {', '.join(sorted(row))}")


def _steps(row: Mapping[str, Any], where: str) -> tuple[tuple[str, ...] | None, int | None, str]:
    """(steps, first error, subset) as far as the row says."""
    subset = str(row.get("subset") or row.get("task") or "")
    try:
        if "completions" in row and "labels" in row:
            example = stepwise(row)
        elif "input" in row and isinstance(row.get("label"), str):
            example = math_shepherd(row)
        else:
            example = None
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    if example is not None:
        if not set(example.labels) <= {0.0, 1.0}:
            raise ValueError(f"{where}: labels must be 0 or 1 to have a first error, got {example.labels}")
        return example.steps, next((i for i, label in enumerate(example.labels) if label == 0), -1), subset
    if "step_labels" in row:
        steps, first = step_lines(row)
        return steps, first if steps else None, subset
    if row.get("first_error", row.get("label")) is not None and "steps" in row:
        chain = chain_of_row(row, where)
        return chain.steps, chain.first_error, subset
    given = row.get("steps")
    return (None if given is None else tuple(given)), None, subset


def step_lines(row: Mapping[str, Any]) -> tuple[tuple[str, ...], int]:
    """Steps and first error of an answer to the Game of 24: its lines behind the first, as many as have a label.

    A step is right while 24 can still be reached, which is the label 2.
    """
    labels = row["step_labels"]
    steps = tuple(line for line in row["completion"].split("\n")[1:] if line.strip())[: len(labels)]
    return steps, next((i for i, label in enumerate(labels[: len(steps)]) if label != 2), -1)


def final_answer(completion: str) -> str | None:
    r"""What the last ``\boxed{}`` holds, otherwise what stands behind the last "Answer:"; None without either."""
    start = completion.rfind("\\boxed{")
    if start >= 0:
        depth, begin = 0, start + len("\\boxed{")
        for at in range(begin, len(completion)):
            if completion[at] == "}" and depth == 0:
                return completion[begin:at].strip()
            depth += {"{": 1, "}": -1}.get(completion[at], 0)
    said = _ANSWER.findall(completion)
    return said[-1].strip(" $.\t\r") or None if said else None
