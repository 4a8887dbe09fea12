"""One chunk of questions to rows of the trace table: a function of the chunk and of what the labeller holds."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import pyarrow as pa

from prmfast.engines.base import Completion, Engine, Scorer, Verifier
from prmfast.pipeline.features import PolicyLogProbs, question_columns, step_columns, step_logprobs
from prmfast.pipeline.labels import RULES, Chain, Rule, StepLabels, label_by_bisection, label_exhaustively
from prmfast.pipeline.rollouts import Prefix, draw, roll_out, stream_seed
from prmfast.pipeline.steps import SplitAfter, Splitter, cut, prefixes
from prmfast.traces import SCHEMA, validate

# Columns beside those of prmfast.traces, which keeps columns that it does not know.
EXTRA: dict[str, Any] = {
    "seed": pa.int64(),
    "n_tokens": pa.int64(),
    "finished": pa.bool_(),
    "step_labels": pa.list_(pa.bool_()),
    "first_error": pa.int64(),
    "rollouts": pa.int64(),
    "step_logprobs": pa.list_(pa.float64()),
}


@dataclass(frozen=True, slots=True)
class LabelSettings:
    """What is drawn and how it is read.

    Args:
        samples: answers of each question.
        rollouts: n fresh completions of each prefix that is asked about, and of each question; 0: no labels.
        search: "exhaustive" rolls out every step, "bisection" only what it needs for the first error. Calibrators want
            "exhaustive": the prefixes that bisection asks about are no fair sample of all.
        rule: hard labels: "any" of the n rollouts succeeded, or "all" of them.
        seed: of every draw.
        hidden_states: keep the PRM's hidden states, by far the largest columns.
        logprobs: keep the policy's log-probability of each step; the engine must offer `PolicyLogProbs`.
    """

    samples: int = 4
    rollouts: int = 8
    search: Literal["exhaustive", "bisection"] = "exhaustive"
    rule: Rule = "any"
    seed: int = 0
    hidden_states: bool = True
    logprobs: bool = False

    def __post_init__(self) -> None:
        for name, low in (("samples", 1), ("rollouts", 0), ("seed", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an int, got {type(value).__name__}")
            if value < low:
                raise ValueError(f"{name} must be at least {low}, got {value}")
        if self.search not in ("exhaustive", "bisection"):
            raise ValueError(f"search must be exhaustive or bisection, got {self.search!r}")
        if self.rule not in RULES:
            raise ValueError(f"rule must be one of {', '.join(RULES)}, got {self.rule!r}")


@dataclass(frozen=True)
class Labeller:
    """Labels questions: samples answers, judges them, rolls out their prefixes, extracts the PRM's features.

    A row depends on (question_id, question, prompt) and on the labeller alone, not on the chunk around it, up to what
    an engine or a PRM computes differently in another batch. It can be pickled, and maps a table of questions to one
    of traces: other processes may share the work of a run by questions.

    A sample that hit the length limit counts as it stands. A rollout gets the engine's length limit anew, behind its
    prefix: leave room for both.

    Args:
        engine: draws samples and continues prefixes.
        verifier: ``verify(question, completion)``; see `MathVerifier`.
        scorer: the PRM whose scores and hidden states are kept; None: there is none yet.
        splitter: cuts an answer into the steps that the scorer sees too.
        settings: how much is drawn.
    """

    engine: Engine
    verifier: Verifier
    scorer: Scorer | None = None
    splitter: Splitter = field(default_factory=SplitAfter)
    settings: LabelSettings = field(default_factory=LabelSettings)

    def __post_init__(self) -> None:
        if not isinstance(self.engine, Engine):
            raise TypeError(f"engine must have policy_id and sample(), got {type(self.engine).__name__}")
        if self.scorer is not None and not isinstance(self.scorer, Scorer):
            raise TypeError(
                f"scorer must have prm_id, score(), question_state() and features(), got {type(self.scorer).__name__}"
            )
        for name in ("verifier", "splitter"):
            if not callable(getattr(self, name)):
                raise TypeError(f"{name} must be callable, got {type(getattr(self, name)).__name__}")
        if self.settings.logprobs and not isinstance(self.engine, PolicyLogProbs):
            raise TypeError(f"logprobs=True needs an engine with logprobs(), got {type(self.engine).__name__}")

    @property
    def identity(self) -> dict[str, Any]:
        """What the rows depend on besides the questions, as JSON values: a manifest pins it."""
        drawing = ("temperature", "max_new_tokens", "stop")  # where an engine says so, they change what it draws
        return {
            "policy_id": self.engine.policy_id,
            "engine": {name: _json(getattr(self.engine, name)) for name in drawing if hasattr(self.engine, name)},
            "prm_id": None if self.scorer is None else self.scorer.prm_id,
            "verifier": getattr(self.verifier, "verifier_id", None) or _name(self.verifier),
            "splitter": _name(self.splitter),
            "settings": asdict(self.settings),
        }

    def __call__(self, batch: Sequence[str] | pa.Table) -> pa.Table:
        """Trace rows of a chunk of questions, texts or a table; see `question_table`.

        The rows of a question stand together, in the order of the questions; columns as in ``prmfast.traces``, and
        seed, n_tokens, finished, step_labels, first_error (-1: none), rollouts (drawn for this row), step_logprobs.
        """
        questions = question_table(batch).to_pylist()
        s = self.settings
        rows = [(row, j) for row in questions for j in range(s.samples)]
        seeds = [stream_seed(s.seed, f"sample {j}", row["question_id"]) for row, j in rows]
        done = draw(self.engine, [row["prompt"] for row, _ in rows], seeds)
        pieces = [cut(self.splitter, completion.text) for completion in done]
        correct = [bool(self.verifier(row["question"], c.text)) for (row, _), c in zip(rows, done, strict=True)]
        columns: dict[str, list[Any]] = {
            "question_id": [row["question_id"] for row, _ in rows],
            "question": [row["question"] for row, _ in rows],
            "policy_id": [self.engine.policy_id] * len(rows),
            "sample_id": [str(j) for _, j in rows],
            "completion": [completion.text for completion in done],
            "steps": [[piece.strip() for piece in parts] for parts in pieces],
            "correct": correct,
            "seed": seeds,
            "n_tokens": [completion.n_tokens for completion in done],
            "finished": [completion.finished for completion in done],
        }
        if self.scorer is not None:
            columns |= self._judge(self.scorer, questions, done, pieces)
        if s.rollouts:
            columns |= self._label(questions, pieces, correct)
        if isinstance(self.engine, PolicyLogProbs) and s.logprobs:
            columns["step_logprobs"] = step_logprobs(self.engine, [row["prompt"] for row, _ in rows], done, pieces)
        return self._table(columns)

    def _judge(
        self, scorer: Scorer, questions: list[dict[str, str]], done: list[Completion], pieces: list[list[str]]
    ) -> dict[str, list[Any]]:
        n, hidden = self.settings.samples, self.settings.hidden_states
        texts = [row["question"] for row in questions]
        answers = [[c.text for c in done[i * n : (i + 1) * n]] for i in range(len(questions))]
        counts = [list(map(len, pieces[i * n : (i + 1) * n])) for i in range(len(questions))]
        per_question = question_columns(scorer, texts, hidden=hidden)
        repeated = {name: [value for value in column for _ in range(n)] for name, column in per_question.items()}
        return step_columns(scorer, texts, answers, counts, hidden=hidden) | repeated

    def _label(
        self, questions: list[dict[str, str]], pieces: list[list[str]], correct: list[bool]
    ) -> dict[str, list[Any]]:
        s = self.settings
        begun = [prefixes(parts) for parts in pieces]

        def prefix(row: dict[str, str], text: str, stream: str) -> Prefix:
            return Prefix(row["question_id"], row["question"], row["prompt"], text, stream)

        def count(asked: Sequence[tuple[int, int]]) -> list[int]:
            starts = [
                prefix(questions[i // s.samples], begun[i][t], f"sample {i % s.samples} step {t}") for i, t in asked
            ]
            return roll_out(self.engine, self.verifier, starts, s.rollouts, s.seed)

        label = label_exhaustively if s.search == "exhaustive" else label_by_bisection
        chains = [Chain(len(parts), right) for parts, right in zip(pieces, correct, strict=True)]
        found: list[StepLabels] = label(chains, count, s.rollouts, s.rule)
        starts = [prefix(row, "", "question") for row in questions]
        at_question = roll_out(self.engine, self.verifier, starts, s.rollouts, s.seed)
        return {
            "step_successes": [list(labels.successes) for labels in found],
            "step_trials": [list(labels.trials) for labels in found],
            "question_successes": [k for k in at_question for _ in range(s.samples)],
            "question_trials": [s.rollouts] * len(chains),
            "step_labels": [list(labels.labels) for labels in found],
            "first_error": [labels.first_error for labels in found],
            "rollouts": [labels.rollouts for labels in found],
        }

    def _table(self, columns: dict[str, list[Any]]) -> pa.Table:
        kinds = SCHEMA | EXTRA
        metadata = None if self.scorer is None else {"prm_id": self.scorer.prm_id}
        names = [name for name in kinds if name in columns]
        schema = pa.schema([(name, kinds[name]) for name in names], metadata=metadata)
        return validate(pa.table([pa.array(columns[name], kinds[name]) for name in names], schema=schema))


def question_table(questions: Sequence[str] | pa.Table) -> pa.Table:
    """Questions as a table (question_id, question, prompt: string), from texts or from a table with a question column.

    ``question_id`` is a hash of the text and ``prompt``, what the engine is given, the text itself where there is no
    such column. ValueError for no question, an empty or null entry and an id that appears twice.
    """
    if isinstance(questions, str):
        raise TypeError("questions must be a sequence of strings or a pyarrow.Table, got one string")
    if isinstance(questions, pa.Table):
        if "question" not in questions.column_names:
            has = ", ".join(questions.column_names) or "no columns"
            raise ValueError(f"questions must have a column question, got {has}")
        columns = {name: questions.column(name).to_pylist() for name in _COLUMNS if name in questions.column_names}
    else:
        columns = {"question": list(questions)}
    texts = columns["question"]
    if not texts:
        raise ValueError("questions must have at least one entry, got 0")
    for name, values in columns.items():
        for i, value in enumerate(values):
            if not isinstance(value, str):
                raise TypeError(f"questions[{i}]: {name} must be a string, got {type(value).__name__}")
            if not value:
                raise ValueError(f"questions[{i}]: {name} must not be empty, got ''")
    ids = columns.get("question_id") or [_question_id(text) for text in texts]
    first: dict[str, int] = {}
    for i, name in enumerate(ids):
        if first.setdefault(name, i) != i:
            raise ValueError(f"questions[{i}]: question_id must appear once, got {name!r} as in row {first[name]}")
    return pa.table(
        {"question_id": ids, "question": texts, "prompt": columns.get("prompt", texts)},
        schema=pa.schema([(name, pa.string()) for name in _COLUMNS]),
    )


_COLUMNS = ("question_id", "question", "prompt")


def _question_id(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _json(value: object) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _name(function: object) -> str:
    """A callable's name: that of a function or method, the repr of a dataclass."""
    if hasattr(function, "__qualname__"):
        return f"{getattr(function, '__module__', '')}.{function.__qualname__}"
    if hasattr(function, "__dataclass_fields__"):
        return repr(function)
    return f"{type(function).__module__}.{type(function).__qualname__}"
