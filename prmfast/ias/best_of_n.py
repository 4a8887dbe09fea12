"""Best-of-N with a budget per question, drawn live from an engine."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from prmfast._progress import progress as progress_bar
from prmfast._ranges import stage
from prmfast.calibration.data import CalibrationData
from prmfast.calibration.features import FEATURE_NAMES, prefix_features, question_features
from prmfast.engines.base import Engine, Scorer, Verifier
from prmfast.ias._check import whole
from prmfast.ias._journal import Journal, Sample
from prmfast.ias.policies import BudgetPolicy, BudgetState

if TYPE_CHECKING:
    import pyarrow as pa

    from prmfast.calibration.base import Calibrator

Aggregate = Literal["last", "min", "product", "mean"]
_AGGREGATES: dict[str, Callable[[Sequence[float]], float]] = {
    "last": lambda scores: scores[-1],
    "min": min,
    "product": math.prod,
    "mean": lambda scores: math.fsum(scores) / len(scores),
}


def aggregate_score(step_scores: Sequence[float], aggregate: str = "last") -> float:
    """An answer's score from its step scores: "last" | "min" | "product" | "mean"; 0 for an answer without steps."""
    if aggregate not in _AGGREGATES:
        raise ValueError(f"aggregate must be one of {', '.join(_AGGREGATES)}, got {aggregate!r}")
    return _AGGREGATES[aggregate](step_scores) if step_scores else 0.0


@dataclass(frozen=True, slots=True)
class Decision:
    """What was said of a question in a round: ``budget`` samples in total, of which ``drawn`` existed by then."""

    question: int
    round: int
    drawn: int
    budget: int
    expected: float
    why: str


@dataclass(frozen=True, slots=True)
class Answer:
    """The outcome of a question; completion, score and seed are None where the budget was 0.

    ``correct`` is the verifier's word on the picked completion, ``any_correct`` on all that were drawn; None without
    one.
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


@dataclass(frozen=True)
class BestOfNResult:
    """Answers in the order of the questions, every decision, and every sample with its verdict."""

    answers: tuple[Answer, ...]
    decisions: tuple[Decision, ...]
    samples: tuple[Sample, ...]
    verdicts: tuple[bool | None, ...]
    policy_id: str
    prm_id: str

    @property
    def mean_drawn(self) -> float:
        """Samples per question."""
        return sum(answer.drawn for answer in self.answers) / len(self.answers)

    @property
    def n_tokens(self) -> int:
        """Tokens drawn in total."""
        return sum(answer.n_tokens for answer in self.answers)

    @property
    def accuracy(self) -> float | None:
        """Share of questions whose picked answer is right; None without a verifier. No answer is not right."""
        return self._share("correct")

    @property
    def success(self) -> float | None:
        """Share of questions with any right answer among those drawn: what a target bounds. None without a verifier."""
        return self._share("any_correct")

    def to_table(self, of: Literal["answers", "decisions", "samples"] = "answers") -> pa.Table:
        """A row per question, per decision (round, drawn, budget, expected, why), or per sample as a trace."""
        import pyarrow as pa

        if of == "answers":
            return pa.Table.from_pylist([_fields(row) for row in self.answers])
        if of == "decisions":
            return pa.Table.from_pylist(
                [{**_fields(row), "question": self.answers[row.question].question} for row in self.decisions]
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


@dataclass(frozen=True)
class BestOfN:
    """Draws as many answers of each question as ``policy`` asks for and picks the one that the PRM scores highest.

    The first estimate is the PRM's word on the empty answer, made a distribution by ``calibrator``; the pick goes by
    the UNCALIBRATED score of the finished answer ([D] arXiv 2605.06785), the first drawn among equals. A question's
    samples have the seeds ``seed``, ``seed + 1``, ...: whatever the policy, the first N of a question are the same.

    Args:
        engine: draws samples. scorer: the PRM.
        calibrator: a fitted calibrator; None takes the PRM's raw score for the success probability.
        policy: who decides on N; asked once a round until nobody wants more.
        verifier: ``verify(question, completion)``, to report accuracy; decides nothing.
        levels: M, quantiles at (m + 1/2) / M.
        batch_size: samples per call of the engine, questions per call of the scorer.
        seed: of each question's first sample.
        n_max: no question gets more, whatever the policy says.
        aggregate: final score of an answer from its step scores: "last" | "min" | "product" | "mean".
    """

    engine: Engine
    scorer: Scorer
    calibrator: Calibrator | None
    policy: BudgetPolicy
    verifier: Verifier | None = None
    levels: int = 100
    batch_size: int = 64
    seed: int = 0
    n_max: int = 64
    aggregate: Aggregate = "last"

    def __post_init__(self) -> None:
        if not isinstance(self.engine, Engine):
            raise TypeError(f"engine must have policy_id and sample(), got {type(self.engine).__name__}")
        if not isinstance(self.scorer, Scorer):
            raise TypeError(
                f"scorer must have prm_id, score(), question_state() and features(), got {type(self.scorer).__name__}"
            )
        if not isinstance(self.policy, BudgetPolicy):
            raise TypeError(f"policy must be a BudgetPolicy, got {type(self.policy).__name__}")
        for name, low in (("levels", 1), ("batch_size", 1), ("seed", 0), ("n_max", 1)):
            whole(name, getattr(self, name), low=low)
        aggregate_score((), self.aggregate)

    def run(
        self, questions: Sequence[str], *, progress: bool = True, journal: str | os.PathLike[str] | None = None
    ) -> BestOfNResult:
        """Answers ``questions``.

        With ``journal``, every sample is appended to that file as soon as it is scored; a later run with the same
        file goes through the same rounds and decisions and draws only what is missing.
        """
        _check_questions(questions)
        book = Journal(journal, questions, {"policy_id": self.engine.policy_id, "prm_id": self.scorer.prm_id})
        with stage("best_of_n.first_estimate"):
            quantiles = self._first_estimate(questions, progress)
        expected = quantiles.double().mean(1).tolist()
        samples: list[list[Sample]] = [[] for _ in questions]
        candidates: list[list[Tensor]] = [[] for _ in questions]
        decisions: list[Decision] = []
        active, number = set(range(len(questions))), 0
        while active:
            number += 1
            with stage("best_of_n.budget"):
                asked = self._ask(quantiles, samples, candidates)
            wanted = {i: n for i, n in enumerate(asked) if min(n, self.n_max) > len(samples[i])}
            for i in sorted(active | set(wanted)):
                decisions.append(self._decision(i, number, len(samples[i]), asked[i], expected[i]))
            jobs = [(i, self.seed + k) for i, n in wanted.items() for k in range(len(samples[i]), min(n, self.n_max))]
            self._draw(questions, jobs, book, samples, candidates, f"round {number}", progress)
            active = set(wanted)
        with stage("best_of_n.pick"):
            return self._result(questions, samples, decisions, expected)

    def _first_estimate(self, questions: Sequence[str], progress: bool) -> Tensor:
        parts: list[Tensor] = []
        with progress_bar(len(questions), "first estimates", progress) as bar:
            for start in range(0, len(questions), self.batch_size):
                part = questions[start : start + self.batch_size]
                score, hidden = self.scorer.question_state(part)
                features = question_features(score.double().cpu().numpy())
                parts.append(self._quantiles(score, hidden, torch.from_numpy(features)))
                bar.advance(len(part))
        return torch.cat(parts)

    def _quantiles(self, score: Tensor, hidden: Tensor, features: Tensor) -> Tensor:
        """Quantiles [B, M] on the CPU; the raw score as one quantile without a calibrator."""
        score = score.detach().float().cpu()
        if self.calibrator is None:
            return score[:, None]
        data = CalibrationData.from_arrays(
            score=score,
            successes=torch.zeros(len(score), dtype=torch.int64),
            hidden=hidden.detach().float().cpu(),
            features=features.float(),
            feature_names=FEATURE_NAMES,
        )
        levels = (torch.arange(self.levels, dtype=torch.float64) + 0.5) / self.levels
        return self.calibrator.quantile(data, levels.float()).cpu()

    def _ask(self, quantiles: Tensor, samples: list[list[Sample]], candidates: list[list[Tensor]]) -> list[int]:
        drawn = torch.tensor([len(row) for row in samples])
        if self.policy.uses_candidates and int(drawn.max()):
            width = next(row[0] for row in candidates if row).shape[0]
            table = torch.zeros(len(samples), int(drawn.max()), width)
            for i, row in enumerate(candidates):
                if row:
                    table[i, : len(row)] = torch.stack(row)
            filled = torch.arange(table.shape[1]) < drawn[:, None]
            state = BudgetState(quantiles, drawn, table, filled)
        else:
            state = BudgetState(quantiles, drawn)
        budget = self.policy.budget(state)
        if tuple(budget.shape) != tuple(drawn.shape) or budget.is_floating_point():
            raise ValueError(
                f"{type(self.policy).__name__}.budget must return integers [{len(samples)}], "
                f"got {budget.dtype} {tuple(budget.shape)}"
            )
        return [int(n) for n in budget.tolist()]

    def _decision(self, question: int, number: int, drawn: int, asked: int, expected: float) -> Decision:
        budget = min(asked, self.n_max)
        if budget > drawn:
            why = f"first estimate: E[p] = {expected:.3f}" if number == 1 else "not enough yet"
        else:
            why = "n_max reached" if drawn >= min(self.n_max, getattr(self.policy, "n_max", self.n_max)) else "enough"
        if asked > self.n_max:
            why += f"; {asked} asked for, n_max = {self.n_max}"
        return Decision(question, number, drawn, budget, expected, why)

    def _draw(
        self,
        questions: Sequence[str],
        jobs: list[tuple[int, int]],
        book: Journal,
        samples: list[list[Sample]],
        candidates: list[list[Tensor]],
        title: str,
        progress: bool,
    ) -> None:
        """Carries out ``jobs`` (question, seed) in order, those in the journal without the engine."""
        with progress_bar(len(jobs), title, progress and bool(jobs)) as bar:
            for start in range(0, len(jobs), self.batch_size):
                chunk = jobs[start : start + self.batch_size]
                missing = [job for job in chunk if book.get(*job) is None]
                if missing:
                    book.add(self._sample(questions, missing))
                found = [sample for job in chunk if (sample := book.get(*job)) is not None]
                for sample in found:
                    samples[sample.question].append(sample)
                if self.policy.uses_candidates:
                    with stage("best_of_n.quantiles"):
                        rows = self._candidate_quantiles(questions, found)
                    for sample, row in zip(found, rows, strict=True):
                        candidates[sample.question].append(row)
                bar.advance(len(chunk))

    def _sample(self, questions: Sequence[str], jobs: list[tuple[int, int]]) -> list[Sample]:
        with stage("best_of_n.sample"):
            done = self.engine.sample([questions[i] for i, _ in jobs], [seed for _, seed in jobs])
        if len(done) != len(jobs):
            raise RuntimeError(f"engine must return one completion per prompt ({len(jobs)}), got {len(done)}")
        with stage("best_of_n.score"):
            scores = self.scorer.score([questions[i] for i, _ in jobs], [[completion.text] for completion in done])
        rows = []
        for (i, seed), completion, answers in zip(jobs, done, scores, strict=True):
            steps = tuple(float(score) for score in answers[0])
            if any(math.isnan(score) for score in steps):
                raise ValueError(f"scorer must not return NaN, got NaN for an answer of question {i}")
            rows.append(Sample(i, seed, completion.text, steps, completion.n_tokens, completion.finished))
        return rows

    def _candidate_quantiles(self, questions: Sequence[str], samples: list[Sample]) -> list[Tensor]:
        """Each finished answer's quantiles [M']: the calibrator's word on its last step; p = 0 without steps."""
        scored = [sample for sample in samples if sample.step_scores]
        width = 1 if self.calibrator is None else self.levels
        rows = {id(sample): torch.zeros(width) for sample in samples}
        if scored:
            states = self.scorer.features([questions[s.question] for s in scored], [[s.completion] for s in scored])
            hidden = torch.stack([answers[0][-1] for answers in states])
            features = torch.stack([torch.from_numpy(prefix_features(s.step_scores)[-1]) for s in scored])
            last = torch.tensor([s.step_scores[-1] for s in scored])
            rows.update(zip(map(id, scored), self._quantiles(last, hidden, features), strict=True))
        return [rows[id(sample)] for sample in samples]

    def _result(
        self, questions: Sequence[str], samples: list[list[Sample]], decisions: list[Decision], expected: list[float]
    ) -> BestOfNResult:
        answers, flat, verdicts = [], [], []
        for question, drawn, p in zip(questions, samples, expected, strict=True):
            own = [None if self.verifier is None else bool(self.verifier(question, s.completion)) for s in drawn]
            scores = [aggregate_score(s.step_scores, self.aggregate) for s in drawn]
            pick = max(range(len(drawn)), key=scores.__getitem__) if drawn else None
            known = self.verifier is not None
            answers.append(
                Answer(
                    question=question,
                    completion=None if pick is None else drawn[pick].completion,
                    score=None if pick is None else scores[pick],
                    seed=None if pick is None else drawn[pick].seed,
                    expected=p,
                    drawn=len(drawn),
                    n_tokens=sum(s.n_tokens for s in drawn),
                    correct=(pick is not None and bool(own[pick])) if known else None,
                    any_correct=any(own) if known else None,
                )
            )
            flat += drawn
            verdicts += own
        return BestOfNResult(
            tuple(answers), tuple(decisions), tuple(flat), tuple(verdicts), self.engine.policy_id, self.scorer.prm_id
        )


def _check_questions(questions: Sequence[str]) -> None:
    if isinstance(questions, str) or not all(isinstance(question, str) for question in questions):
        raise TypeError("questions must be a sequence of strings")
    if len(questions) == 0:
        raise ValueError("questions must have at least one entry, got 0")


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
