"""One subtree of a beam search: chains of steps, how they grow, which of them stay."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

from prmfast.engines.base import Completion
from prmfast.ias._beam_result import BeamCandidate, BeamStep, Fate
from prmfast.ias._rating import Rating
from prmfast.ias.released import compute_n_ias, determine_k, determine_m

FINISHED = ("answer", "end token")


@dataclass(eq=False, slots=True)
class Chain:
    """An answer begun: ``text`` for the judge, ``prefix`` for the engine, which continues it."""

    number: int
    parent: int
    step: int
    seed: int
    text: str
    prefix: str
    n_tokens: int
    end: str | None = None
    rating: Rating | None = None
    fate: Fate = "beam"
    until: int = 0

    @property
    def lower(self) -> float:
        """What budgets are computed from."""
        assert self.rating is not None
        return self.rating.lower


@dataclass(frozen=True, slots=True)
class Rules:
    """What a subtree needs of the settings; ``k_max`` and ``m_max`` are its own."""

    k_max: int
    m_max: int
    adapt_k: bool
    adapt_m: bool
    target: float
    max_length: int | None
    is_answer: Callable[[str], bool] | None
    rank_by: Literal["median", "score"]
    released: bool


@dataclass(eq=False)
class Tree:
    """Beams of one subtree and everything that led to them; it stops where ``end`` is set."""

    question: int
    subtree: int
    first_seed: int
    samples: int
    rules: Rules
    beams: list[Chain] = field(default_factory=lambda: [Chain(0, 0, 0, 0, "", "", 0)])
    end: str | None = None
    drawn: int = 0
    chains: list[Chain] = field(default_factory=list)
    steps: list[BeamStep] = field(default_factory=list)
    scored: int = 0

    def jobs(self) -> list[tuple[Chain, int]]:
        """(chain, seed) of every sample of the next step; none once the subtree has stopped."""
        if self.end is not None:
            return []
        parents = [chain for chain in self.beams if chain.end is None for _ in range(self.samples)]
        if self.rules.released:  # every prompt gets the seeds of one call with n samples, at every step
            return [(chain, self.first_seed + i % self.samples) for i, chain in enumerate(parents)]
        return [(chain, self.first_seed + self.drawn + i) for i, chain in enumerate(parents)]

    def grow(self, step: int, drawn: list[tuple[Chain, Completion]]) -> None:
        """Puts the children of every running beam in its place; ended beams stay where they are."""
        children: dict[int, list[Chain]] = {}
        for parent, completion in drawn:
            self.drawn += 1
            child = self._child(step, parent, completion)
            self.chains.append(child)
            children.setdefault(parent.number, []).append(child)
        grown = [chain for beam in self.beams for chain in ([beam] if beam.end else children[beam.number])]
        fresh = grown if self.rules.released else _distinct(grown, {beam.number: beam for beam in self.beams}, step)
        if fresh:
            for beam in self.beams:
                if beam.end is None:
                    beam.fate, beam.until = "grown", step
            self.beams = fresh
        else:
            for beam in self.beams:
                beam.end = beam.end or "empty steps"
        self.samples = 1
        if all(beam.end for beam in self.beams):
            self.end = "all beams ended" if fresh else "empty steps"
        self.steps.append(
            BeamStep(
                question=self.question,
                subtree=self.subtree,
                step=step,
                generations=len(drawn),
                n_tokens=sum(completion.n_tokens for _, completion in drawn),
                candidates=len(self.beams),
                scored=0,
                k=None,
                m=None,
                beams=len(self.beams),
                running=sum(beam.end is None for beam in self.beams),
                lower=None,
                why="no pruning at this step",
            )
        )

    def prune(self, step: int) -> None:
        """Keeps the K best beams and decides on M; every beam has been rated."""
        rules, lowers = self.rules, [chain.lower for chain in self.beams]
        k = determine_k([lowers], rules.m_max, rules.k_max, interleave=rules.adapt_k, q=rules.target)[0]
        ranked = sorted(self.beams, key=lambda chain: -self.rank(chain))
        for chain in ranked[k:]:
            chain.fate, chain.until = "pruned", step
        self.beams = ranked[:k]
        kept = [chain.lower for chain in self.beams]
        self.samples = determine_m([kept], rules.m_max, rules.k_max, interleave=rules.adapt_m, q=rules.target)[0]
        if self.end is None and all(beam.end for beam in self.beams):
            self.end = "all beams ended"
        weakest = sorted(lowers, reverse=True)[min(k, len(lowers)) - 1]
        self.steps[-1] = replace(
            self.steps[-1],
            k=k,
            m=self.samples,
            beams=len(self.beams),
            running=sum(beam.end is None for beam in self.beams),
            lower=min(kept) if rules.adapt_m else weakest,
            why=self._why(k, weakest, min(kept)),
        )

    def _why(self, k: int, weakest: float, least: float) -> str:
        """The comparisons behind K and M in words."""
        rules, words = self.rules, []
        if rules.adapt_k:
            needed = compute_n_ias(weakest, 1.0, rules.target)
            relation = ">=" if k * rules.m_max >= needed else "<"
            words.append(f"K = {k}: {k} x {rules.m_max} samples {relation} {needed} for lower bound {weakest:.4f}")
        if rules.adapt_m:
            needed = compute_n_ias(least, rules.k_max, rules.target)
            words.append(f"M = {self.samples}: {needed} a beam for lower bound {least:.4f}, at most {rules.m_max}")
        return "; ".join(words) or "fixed"

    def _child(self, step: int, parent: Chain, completion: Completion) -> Chain:
        """The chain that a sample makes of ``parent``: its texts, and whether it ends there."""
        text, stop = completion.text, completion.stop
        if stop is None:
            prefix = text
        elif self.rules.released:
            body = text.strip()
            prefix = body if body.endswith(stop) else body + stop
        else:  # an engine may keep the stop string in the text or drop it
            prefix = text if stop in text[len(parent.prefix) :] else text + stop
        judged, length = prefix.strip(), len(completion.token_ids)
        if self.rules.is_answer is not None and self.rules.is_answer(judged):
            end: str | None = "answer"
        elif stop is None:
            end = "end token" if completion.finished else "length"
        else:
            end = "length" if self.rules.max_length is not None and length >= self.rules.max_length else None
        return Chain(self.drawn, parent.number, step, completion.seed, judged, prefix, completion.n_tokens, end)

    def best(self) -> Chain:
        """The beam that ranks first, the earlier among equals; finished answers come before unfinished ones."""
        return max(self.beams, key=self.key)

    def key(self, chain: Chain) -> tuple[bool, float]:
        """Sorts chains for the final pick; the released program does not ask whether an answer is finished."""
        return (chain.end in FINISHED and not self.rules.released, self.rank(chain))

    def rank(self, chain: Chain) -> float:
        """What chains are ranked by."""
        assert chain.rating is not None
        return chain.rating.score if self.rules.rank_by == "score" else chain.rating.median

    def count_scored(self, n: int) -> None:
        """Notes that ``n`` chains of the last step were sent to the judge."""
        self.steps[-1] = replace(self.steps[-1], scored=self.steps[-1].scored + n)
        self.scored += n

    def candidates(self, last_step: int) -> list[BeamCandidate]:
        """Every chain as a public record."""
        return [
            BeamCandidate(
                question=self.question,
                subtree=self.subtree,
                number=chain.number,
                parent=chain.parent,
                step=chain.step,
                seed=chain.seed,
                text=chain.text,
                n_tokens=chain.n_tokens,
                end=chain.end,
                score=None if chain.rating is None else chain.rating.score,
                median=None if chain.rating is None else chain.rating.median,
                lower=None if chain.rating is None else chain.rating.lower,
                expected=None if chain.rating is None else chain.rating.expected,
                fate=chain.fate,
                until=last_step if chain.fate == "beam" else chain.until,
            )
            for chain in self.chains
        ]


def _distinct(grown: list[Chain], parents: dict[int, Chain], step: int) -> list[Chain]:
    """Without steps that add nothing to an answer that goes on, and without second copies of a chain."""
    kept: dict[tuple[str, bool], Chain] = {}
    for chain in grown:
        key = (chain.text, chain.end is None)
        parent = parents.get(chain.parent)
        if chain.step == step and chain.end is None and parent is not None and chain.text == parent.text:
            chain.fate, chain.until = "empty step", step
        elif key in kept:
            chain.fate, chain.until = "duplicate", step
        else:
            kept[key] = chain
    return list(kept.values())
