"""What the rest of prmfast asks of a generation engine and of a process reward model.

An engine draws one more sample of a prompt with a given seed: `Engine` in batches, `StreamingEngine` while others run,
`AsyncEngine` for an event loop. A scorer judges the steps of answers: `Scorer` gives scores and hidden states, `Judge`
scores and, where a calibrator stands beside the PRM, quantiles of the success probability. Budget policies and rollout
pipelines know these protocols and nothing about servers.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

Verifier = Callable[[str, str], bool]
"""``verify(question, completion) -> correct``."""


@dataclass(frozen=True, slots=True)
class Completion:
    """One finished sample; ``finished=False`` means that the length limit was hit.

    ``stop`` is the stop string that ended it, None where an end token or the length limit did. ``cached_tokens`` of its
    prompt (and prefix) were found in the engine's prefix cache.
    """

    prompt: str
    seed: int
    text: str
    token_ids: tuple[int, ...]
    n_tokens: int
    finished: bool
    stop: str | None = None
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Counts since the engine was made. ``prompt_tokens`` of requests taken up, of which ``cached_tokens`` were not
    computed again; ``generated_tokens`` include those of aborted requests.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    finished: int = 0
    aborted: int = 0
    running: int = 0


@dataclass(frozen=True, slots=True)
class StepScores:
    """What a PRM says of one answer: a score in [0, 1] per step, and one for the empty answer.

    ``quantiles`` [steps, M] float32 on the CPU: quantiles of each step's success probability at the levels
    (m + 1/2) / M, from the calibrator that stands beside the PRM; None without one.
    """

    scores: tuple[float, ...]
    quantiles: Tensor | None = None


@runtime_checkable
class Engine(Protocol):
    """Draws one more sample of a prompt with a given seed."""

    policy_id: str

    def sample(
        self, prompts: Sequence[str], seeds: Sequence[int], *, prefixes: Sequence[str] | None = None
    ) -> list[Completion]:
        """One sample per (prompt, seed) or, with ``prefixes``, per (prompt, answer already written, seed).

        ``text`` and ``token_ids`` hold the whole answer: the prefix, where one was given, and what was drawn after it;
        ``n_tokens`` counts the drawn tokens only. The result depends on (prompt, prefix, seed), not on the other rows.
        """
        ...


@runtime_checkable
class StreamingEngine(Engine, Protocol):
    """An engine that takes up samples one at a time while others run: what adaptive sampling needs."""

    def submit(self, prompt: str, seed: int, *, prefix: str = "") -> str:
        """Takes up one more sample and returns its request id at once."""
        ...

    def poll(self) -> list[tuple[str, Completion]]:
        """Lets the engine work a little; the samples finished since the last call. [] with nothing running too."""
        ...

    def abort(self, request_ids: Collection[str]) -> None:
        """Stops these requests; they never come out of `poll`. Unknown and finished ids are no error."""
        ...

    def stats(self) -> EngineStats:
        """Tokens and requests so far."""
        ...


@runtime_checkable
class AsyncEngine(Protocol):
    """An engine on an event loop; cancelling `draw` aborts the request inside the engine."""

    policy_id: str

    async def draw(self, prompt: str, seed: int, *, prefix: str = "") -> Completion:
        """One more sample of a prompt; text and token ids as in `Engine.sample`."""
        ...

    async def stats(self) -> EngineStats:
        """Tokens and requests so far."""
        ...


@runtime_checkable
class Judge(Protocol):
    """A process reward model with its calibrator, if it has one."""

    prm_id: str

    def judge(self, questions: Sequence[str], answers: Sequence[str | None]) -> list[StepScores]:
        """One per (question, answer) pair; answer None is the empty answer, which has one row."""
        ...


@runtime_checkable
class AsyncJudge(Protocol):
    """`Judge` on an event loop, one answer a call."""

    prm_id: str

    async def judge(self, question: str, answer: str | None) -> StepScores:
        """Scores and quantiles of one answer; None is the empty answer, which has one row."""
        ...


@runtime_checkable
class Scorer(Protocol):
    """A process reward model as a budget policy sees it."""

    prm_id: str

    def score(self, questions: Sequence[str], answers: Sequence[Sequence[str]]) -> list[list[list[float]]]:
        """Scores in [0, 1], indexed [question][answer][step]."""
        ...

    def question_state(self, questions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Score [B] and hidden state [B, d] of the empty answer of each question."""
        ...

    def features(self, questions: Sequence[str], answers: Sequence[Sequence[str]]) -> list[list[Tensor]]:
        """Hidden states [steps, d] of each answer, indexed [question][answer]."""
        ...


@runtime_checkable
class StepScorer(Protocol):
    """A process reward model that takes steps as they are, where a `Scorer` splits the text of an answer itself."""

    prm_id: str

    def score_steps(self, questions: Sequence[str], answers: Sequence[Sequence[str]]) -> list[list[float]]:
        """Scores in [0, 1], indexed [question][step], of one answer per question, given as its steps."""
        ...


def check_sample_inputs(
    prompts: Sequence[str], seeds: Sequence[int], prefixes: Sequence[str] | None
) -> Sequence[str] | None:
    """The checks every engine's ``sample`` makes first; returns ``prefixes``.

    TypeError for a bare string or a seed that is not an int, ValueError for unequal lengths or a negative seed.
    """
    for name, value in (("prompts", prompts), ("prefixes", prefixes)):
        if isinstance(value, str):
            raise TypeError(f"{name} must be a sequence of strings, got one string {value!r}")
    if len(seeds) != len(prompts):
        raise ValueError(f"seeds must have one entry per prompt ({len(prompts)}), got {len(seeds)}")
    if prefixes is not None and len(prefixes) != len(prompts):
        raise ValueError(f"prefixes must have one entry per prompt ({len(prompts)}), got {len(prefixes)}")
    for i, seed in enumerate(seeds):
        if not isinstance(seed, int) or isinstance(seed, bool):
            raise TypeError(f"seeds[{i}] must be an int, got {type(seed).__name__}")
        if not 0 <= seed < 2**63:
            raise ValueError(f"seeds[{i}] must lie in [0, 2**63), got {seed}")
    return prefixes


def check_judge_inputs(questions: Sequence[str], answers: Sequence[str | None]) -> None:
    """The checks every ``judge`` makes first: strings, one answer or None per question.

    TypeError for a bare string or another type, ValueError for unequal lengths.
    """
    _check_strings("questions", questions)
    if isinstance(answers, str):
        raise TypeError(f"answers must be a sequence of strings or None, got one string {answers!r}")
    _check_lengths(questions, answers)
    for i, answer in enumerate(answers):
        if answer is not None and not isinstance(answer, str):
            raise TypeError(f"answers[{i}] must be a string or None, got {type(answer).__name__}")


def check_score_inputs(questions: Sequence[str], answers: Sequence[Sequence[str]]) -> None:
    """The checks every ``score`` and ``features`` makes first: a row of strings per question; errors as above."""
    _check_strings("questions", questions)
    _check_lengths(questions, answers)
    for i, row in enumerate(answers):
        _check_strings(f"answers[{i}]", row)


def check_questions(questions: Sequence[str]) -> None:
    """The check every ``question_state`` makes first: TypeError unless all are strings, in a sequence."""
    _check_strings("questions", questions)


def _check_lengths(questions: Sequence[str], answers: Sequence[object]) -> None:
    if len(answers) != len(questions):
        raise ValueError(f"answers must have one entry per question ({len(questions)}), got {len(answers)}")


def _check_strings(name: str, values: Sequence[str]) -> None:
    if isinstance(values, str):
        raise TypeError(f"{name} must be a sequence of strings, got one string {values!r}")
    for i, value in enumerate(values):
        if not isinstance(value, str):
            raise TypeError(f"{name}[{i}] must be a string, got {type(value).__name__}")
