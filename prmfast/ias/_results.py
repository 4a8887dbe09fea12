"""What a best-of-N run returns: answers, decisions, samples, and their tables."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, cast

from prmfast.engines.base import Verifier
from prmfast.ias._journal import Sample
from prmfast.ias._rules import Decision, Evidence
from prmfast.ias.controller import Outcome

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True, slots=True)
class Answer:
    """The outcome of a question; completion, score and seed are None where nothing was drawn.

    ``correct`` is the verifier's word on the picked completion, ``any_correct`` on all that were drawn; None without
    one. ``drawn`` and ``n_tokens`` are of the samples that count. ``surplus`` samples finished too late to count,
    ``aborted`` ones were given up; both depend on timing and compare as equal. ``expired``: the deadline came first.
    """

    question: str
    completion: str | None
    score: float | None
    seed: int | None
    expected: float
    drawn: int
    n_tokens: int
    correct: bool | None
    any_correct: bool | None
    expired: bool = False
    surplus: int = field(default=0, compare=False)
    surplus_tokens: int = field(default=0, compare=False)
    aborted: int = field(default=0, compare=False)


@dataclass(frozen=True)
class BestOfNResult:
    """Answers in the order of the questions, every decision, and every sample that counts with its verdict.

    ``aborted_tokens`` were generated for samples that were given up, as the engine's statistics say.
    """

    answers: tuple[Answer, ...]
    decisions: tuple[Decision, ...]
    samples: tuple[Sample, ...]
    verdicts: tuple[bool | None, ...]
    policy_id: str
    prm_id: str
    aborted_tokens: int = field(default=0, compare=False)

    @property
    def mean_drawn(self) -> float:
        """Samples per question, of those that count."""
        return sum(answer.drawn for answer in self.answers) / len(self.answers)

    @property
    def n_tokens(self) -> int:
        """Tokens drawn in total: of samples that count, came too late, or were given up."""
        return sum(answer.n_tokens + answer.surplus_tokens for answer in self.answers) + self.aborted_tokens

    @property
    def accuracy(self) -> float | None:
        """Share of questions whose picked answer is right; None without a verifier. No answer is not right."""
        return self._share("correct")

    @property
    def success(self) -> float | None:
        """Share of questions with any right answer among those drawn: what a target bounds. None without a verifier."""
        return self._share("any_correct")

    def to_table(self, of: Literal["answers", "decisions", "samples"] = "answers") -> pa.Table:
        """A row per question, per decision (the fields of `Decision`), or per sample as a trace."""
        import pyarrow as pa

        if of == "answers":
            return pa.Table.from_pylist([_fields(row) for row in self.answers])
        if of == "decisions":
            return pa.Table.from_pylist(
                [{**_fields(row), "question": self.answers[cast(int, row.question)].question} for row in self.decisions]
            )
        if of != "samples":
            raise ValueError(f"of must be 'answers', 'decisions' or 'samples', got {of!r}")
        names = [answer.question for answer in self.answers]
        rows = [
            _trace(sample, names[sample.question], verdict)
            for sample, verdict in zip(self.samples, self.verdicts, strict=True)
        ]
        return pa.Table.from_pylist([{**row, "policy_id": self.policy_id} for row in rows], schema=_trace_schema())

    def _share(self, name: str) -> float | None:
        values = [getattr(answer, name) for answer in self.answers]
        return None if None in values else sum(values) / len(values)


def collect(
    questions: Sequence[str],
    outcomes: Sequence[Outcome],
    verifier: Verifier | None,
    ids: tuple[str, str],
    aborted_tokens: int = 0,
) -> BestOfNResult:
    """The result of a run from its outcomes, in the order of the questions; ``ids``: policy and PRM."""
    answers, samples, verdicts, decisions = [], [], [], []
    for i, (question, outcome) in enumerate(zip(questions, outcomes, strict=True)):
        own = [None if verifier is None else bool(verifier(question, e.completion.text)) for e in outcome.used]
        answers.append(_answer(question, outcome, own, known=verifier is not None))
        samples += [sample_of(i, evidence) for evidence in outcome.used]
        verdicts += own
        decisions += [replace(decision, question=i) for decision in outcome.decisions]
    decisions.sort(key=lambda decision: decision.round)  # questions stay in order within a round
    return BestOfNResult(tuple(answers), tuple(decisions), tuple(samples), tuple(verdicts), *ids, aborted_tokens)


def sample_of(question: int, evidence: Evidence) -> Sample:
    """A judged completion as results and journals keep it."""
    done, steps = evidence.completion, tuple(float(score) for score in evidence.scores.scores)
    return Sample(question, evidence.seed, done.text, steps, done.n_tokens, done.finished)


def _answer(question: str, outcome: Outcome, verdicts: Sequence[bool | None], *, known: bool) -> Answer:
    pick = outcome.pick
    chosen = None if pick is None else outcome.used[pick]
    return Answer(
        question=question,
        completion=None if chosen is None else chosen.completion.text,
        score=outcome.score,
        seed=None if chosen is None else chosen.seed,
        expected=outcome.expected,
        drawn=len(outcome.used),
        n_tokens=sum(evidence.completion.n_tokens for evidence in outcome.used),
        correct=(pick is not None and bool(verdicts[pick])) if known else None,
        any_correct=any(verdicts) if known else None,
        expired=outcome.expired,
        surplus=len(outcome.surplus),
        surplus_tokens=sum(evidence.completion.n_tokens for evidence in outcome.surplus),
        aborted=len(outcome.aborted),
    )


def _fields(row: Any) -> dict[str, Any]:
    return {name: getattr(row, name) for name in row.__slots__}


def _trace(sample: Sample, question: str, verdict: bool | None) -> dict[str, Any]:
    return {
        "question_id": hashlib.sha1(question.encode()).hexdigest(),
        "question": question,
        "sample_id": f"{sample.question}-{sample.seed}",
        "completion": sample.completion,
        "prm_step_scores": list(sample.step_scores) or None,
        "correct": verdict,
        "n_tokens": sample.n_tokens,
        "finished": sample.finished,
    }


def _trace_schema() -> Any:
    import pyarrow as pa

    from prmfast.traces import SCHEMA

    names = ("question_id", "question", "policy_id", "sample_id", "completion", "prm_step_scores", "correct")
    return pa.schema([*((name, SCHEMA[name]) for name in names), ("n_tokens", pa.int64()), ("finished", pa.bool_())])
