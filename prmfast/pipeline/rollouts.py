"""Drawing: the first pass and the rollouts of prefixes, each with a seed that follows from what it is of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from prmfast.engines.base import Completion, Engine, Verifier
from prmfast.engines.random import text_key

_SAMPLES_A_CALL = 8192


@dataclass(frozen=True, slots=True)
class Prefix:
    """An answer begun. ``stream`` tells its rollouts from those of the same text in another place."""

    question_id: str
    question: str
    prompt: str
    text: str
    stream: str


def stream_seed(seed: int, stream: str, question_id: str) -> int:
    """The engine's seed in [0, 2**63) of one draw: a hash of the run's seed, of what is drawn and of the question."""
    return text_key(f"{seed}|{stream}|{question_id}") & (2**63 - 1)


def draw(
    engine: Engine, prompts: Sequence[str], seeds: Sequence[int], begun: Sequence[str] | None = None
) -> list[Completion]:
    """``engine.sample`` in calls of at most 8192 samples; RuntimeError where it does not return one per prompt."""
    done: list[Completion] = []
    for at in range(0, len(prompts), _SAMPLES_A_CALL):
        part = slice(at, at + _SAMPLES_A_CALL)
        found = engine.sample(prompts[part], seeds[part], prefixes=None if begun is None else begun[part])
        if len(found) != len(prompts[part]):
            raise RuntimeError(f"engine must return one completion per prompt ({len(prompts[part])}), got {len(found)}")
        done += found
    return done


def roll_out(engine: Engine, verifier: Verifier, prefixes: Sequence[Prefix], n: int, seed: int) -> list[int]:
    """How many of n fresh completions of each prefix are right; rollouts of two prefixes are independent."""
    rows = [(prefix, r) for prefix in prefixes for r in range(n)]
    done = draw(
        engine,
        [prefix.prompt for prefix, _ in rows],
        [stream_seed(seed, f"{prefix.stream} rollout {r}", prefix.question_id) for prefix, r in rows],
        [prefix.text for prefix, _ in rows],
    )
    right = [bool(verifier(prefix.question, c.text)) for (prefix, _), c in zip(rows, done, strict=True)]
    return [sum(right[i * n : (i + 1) * n]) for i in range(len(prefixes))]
