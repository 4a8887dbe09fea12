"""A small honest world: questions that name their success probability, a policy that has it, a noisy PRM."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from statistics import NormalDist

import torch
from torch import Tensor

from prmfast.calibration.data import CalibrationData
from prmfast.engines.base import Completion, StepScores


def uniform(*parts: object) -> float:
    """A number in [0, 1) that depends on ``parts`` only."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:6], "big") / 2**48


def question(index: int, p: float) -> str:
    return f"question {index} p={p:.4f}"


def p_of(text: str) -> float:
    return float(text.split("p=")[1])


def verify(question: str, completion: str) -> bool:
    return completion.startswith("right")


class BernoulliEngine:
    """Right with the probability that the question names; after ``fail_after`` samples it stops, as if killed."""

    policy_id = "bernoulli"

    def __init__(self, fail_after: int | None = None) -> None:
        self.calls: list[tuple[str, int]] = []
        self.fail_after = fail_after

    def sample(
        self, prompts: Sequence[str], seeds: Sequence[int], *, prefixes: Sequence[str] | None = None
    ) -> list[Completion]:
        if self.fail_after is not None and len(self.calls) + len(prompts) > self.fail_after:
            raise KeyboardInterrupt
        self.calls += zip(prompts, seeds, strict=True)
        return [self.one(prompt, seed) for prompt, seed in zip(prompts, seeds, strict=True)]

    @staticmethod
    def one(prompt: str, seed: int) -> Completion:
        right = uniform(prompt, seed) < p_of(prompt)
        text = f"{'right' if right else 'wrong'} {seed}\n\nso much for {prompt}"
        return Completion(prompt, seed, text, (1, 2, 3), 3 + seed % 2, finished=True)


class NoisyPRM:
    """Scores two steps an answer, right answers mostly higher; the empty answer's score is p pushed towards 1."""

    prm_id = "noisy"

    def score(self, questions: Sequence[str], answers: Sequence[Sequence[str]]) -> list[list[list[float]]]:
        return [[self.steps(q, a) for a in group] for q, group in zip(questions, answers, strict=True)]

    @staticmethod
    def steps(q: str, a: str) -> list[float]:
        first = 0.5 + 0.4 * uniform("first", q, a)
        return [first, 0.6 * uniform("last", q, a) + 0.4 * verify(q, a)] if a else []

    def question_state(self, questions: Sequence[str]) -> tuple[Tensor, Tensor]:
        p = torch.tensor([p_of(q) for q in questions])
        return p**0.5, torch.stack([p, 1 - p], 1)

    def features(self, questions: Sequence[str], answers: Sequence[Sequence[str]]) -> list[list[Tensor]]:
        return [
            [torch.tensor([[s, 1 - s] for s in self.steps(q, a)]) for a in group]
            for q, group in zip(questions, answers, strict=True)
        ]


class KnowsP:
    """The calibrated posterior of this world: a spread around hidden[0] whose mean is hidden[0]."""

    def quantile(self, data: CalibrationData, levels: Tensor) -> Tensor:
        assert data.hidden is not None
        p = data.hidden[:, :1]
        return p + (levels - 0.5) * 2 * torch.minimum(p, 1 - p) * 0.5


PRIOR = (0.05, 0.2, 0.4, 0.7)


def prior_questions(n: int) -> list[str]:
    """Questions whose success probabilities are drawn from ``PRIOR``."""
    return [question(i, PRIOR[int(4 * uniform("which", i))]) for i in range(n)]


class BayesJudge:
    """A calibrated PRM: knows ``PRIOR`` of a question, and reads a score N(+-1, 1) of an answer by Bayes' rule."""

    prm_id = "bayes"

    def judge(self, questions: Sequence[str], answers: Sequence[str | None]) -> list[StepScores]:
        return [self.one(q, a) for q, a in zip(questions, answers, strict=True)]

    @staticmethod
    def one(q: str, a: str | None) -> StepScores:
        base = sum(PRIOR) / len(PRIOR)
        if a is None:
            return StepScores((base,), torch.tensor([PRIOR]))
        score = NormalDist(1.0 if verify(q, a) else -1.0).inv_cdf(uniform("score", q, a) + 2**-50)
        odds = base / (1 - base) * math.exp(2 * score)
        right = odds / (1 + odds)
        return StepScores((right,), torch.full((1, len(PRIOR)), right))
