"""What the rest of prmfast asks of a generation engine and of a process reward model.

An engine draws one more sample of a prompt with a given seed; a scorer judges the steps of answers. Budget policies and
rollout pipelines know these two protocols and nothing about servers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

Verifier = Callable[[str, str], bool]
"""``verify(question, completion) -> correct``."""


@dataclass(frozen=True, slots=True)
class Completion:
    """One finished sample; ``finished=False`` means that the length limit was hit."""

    prompt: str
    seed: int
    text: str
    token_ids: tuple[int, ...]
    n_tokens: int
    finished: bool


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
