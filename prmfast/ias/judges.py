"""A scorer and a calibrator outside the engine as one judge, and any judge on an event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from prmfast.calibration.judging import quantiles, step_features
from prmfast.engines.base import Judge, Scorer, StepScores, check_judge_inputs
from prmfast.ias._check import whole

if TYPE_CHECKING:
    from prmfast.calibration.base import Calibrator


class ScorerJudge:
    """Implements ``Judge`` with a PRM's scores and hidden states and a fitted calibrator.

    Without a calibrator the raw score is taken for the success probability: ``quantiles`` are then None. ``levels``: M,
    quantiles at (m + 1/2) / M.
    """

    def __init__(self, scorer: Scorer, calibrator: Calibrator | None, *, levels: int = 100) -> None:
        if not isinstance(scorer, Scorer):
            raise TypeError(
                f"scorer must have prm_id, score(), question_state() and features(), got {type(scorer).__name__}"
            )
        whole("levels", levels, low=1)
        self.scorer, self.calibrator, self.levels = scorer, calibrator, levels
        self.prm_id = scorer.prm_id

    def judge(self, questions: Sequence[str], answers: Sequence[str | None]) -> list[StepScores]:
        """Scores and quantiles of every step; of the empty answer where ``answers`` has None."""
        check_judge_inputs(questions, answers)
        empty = [i for i, answer in enumerate(answers) if answer is None]
        written = [(i, answer) for i, answer in enumerate(answers) if answer is not None]
        found = dict(zip(empty, self.first([questions[i] for i in empty]), strict=True))
        asked, texts = [questions[i] for i, _ in written], [answer for _, answer in written]
        steps = self.scores(asked, texts)
        levels = self._quantiles_of_steps(asked, texts, steps)
        for (i, _), scores, rows in zip(written, steps, levels, strict=True):
            found[i] = StepScores(scores, rows)
        return [found[i] for i in range(len(questions))]

    def first(self, questions: Sequence[str]) -> list[StepScores]:
        """One row each: the empty answer."""
        if not questions:
            return []
        score, hidden = self.scorer.question_state(questions)
        score = score.detach().float().cpu()
        found = self._quantiles(score, hidden, step_features(score.double().tolist(), empty=True))
        rows: Sequence[Tensor | None] = [None] * len(questions) if found is None else list(found[:, None])
        return [StepScores((value,), row) for value, row in zip(score.tolist(), rows, strict=True)]

    def scores(self, questions: Sequence[str], answers: Sequence[str]) -> list[tuple[float, ...]]:
        """Scores of the steps of one answer per question."""
        if not questions:
            return []
        rows = self.scorer.score(questions, [[answer] for answer in answers])
        return [tuple(float(score) for score in answers[0]) for answers in rows]

    def last(
        self, questions: Sequence[str], answers: Sequence[str], scores: Sequence[tuple[float, ...]]
    ) -> list[StepScores]:
        """``scores`` as given, with the quantiles [1, M] of the last step only; none for an answer without steps."""
        rows: list[Tensor | None] = [None] * len(scores)
        kept = [i for i, steps in enumerate(scores) if steps]
        if self.calibrator is not None and kept:
            states = self.scorer.features([questions[i] for i in kept], [[answers[i]] for i in kept])
            hidden = torch.stack([state[0][-1] for state in states])
            features = torch.stack([step_features(scores[i])[-1] for i in kept])
            found = self._quantiles(torch.tensor([scores[i][-1] for i in kept]), hidden, features)
            assert found is not None
            for i, row in zip(kept, found[:, None], strict=True):
                rows[i] = row
        return [StepScores(steps, row) for steps, row in zip(scores, rows, strict=True)]

    def _quantiles_of_steps(
        self, questions: Sequence[str], answers: Sequence[str], scores: Sequence[tuple[float, ...]]
    ) -> list[Tensor | None]:
        counts = [len(steps) for steps in scores]
        if self.calibrator is None or not sum(counts):
            return [None if self.calibrator is None else torch.empty(0, self.levels)] * len(scores)
        states = self.scorer.features(questions, [[answer] for answer in answers])
        hidden = torch.cat([state[0] for state in states])
        features = torch.cat([step_features(steps) for steps in scores])
        flat = torch.tensor([score for steps in scores for score in steps])
        found = self._quantiles(flat, hidden, features)
        assert found is not None
        return list(found.split(counts))

    def _quantiles(self, score: Tensor, hidden: Tensor, features: Tensor) -> Tensor | None:
        """Quantiles [B, M] on the CPU."""
        return None if self.calibrator is None else quantiles(self.calibrator, score, hidden, features, self.levels)


class BatchingJudge:
    """Implements ``AsyncJudge`` with a ``Judge``: what is asked while it works is judged in one batch after that.

    The judge runs in a thread, one call at a time. Calls that were cancelled while they waited are not judged.
    """

    def __init__(self, judge: Judge, *, batch_size: int = 64) -> None:
        if not isinstance(judge, Judge):
            raise TypeError(f"judge must have prm_id and judge(), got {type(judge).__name__}")
        whole("batch_size", batch_size, low=1)
        self.inner, self.batch_size = judge, batch_size
        self.prm_id = judge.prm_id
        self._waiting: list[tuple[str, str | None, asyncio.Future[StepScores]]] = []
        self._worker: asyncio.Task[None] | None = None

    async def judge(self, question: str, answer: str | None) -> StepScores:
        """Scores and quantiles of one answer; errors of the judge reach every call of the batch."""
        future: asyncio.Future[StepScores] = asyncio.get_running_loop().create_future()
        self._waiting.append((question, answer, future))
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        return await future

    async def _work(self) -> None:
        while self._waiting:
            batch, self._waiting = self._waiting[: self.batch_size], self._waiting[self.batch_size :]
            batch = [row for row in batch if not row[2].done()]
            if not batch:
                continue
            questions, answers, futures = (list(column) for column in zip(*batch, strict=True))
            try:
                found = await asyncio.to_thread(self.inner.judge, questions, answers)
            except Exception as error:
                for future in futures:
                    if not future.done():
                        future.set_exception(error)
                continue
            for future, scores in zip(futures, found, strict=True):
                if not future.done():
                    future.set_result(scores)
