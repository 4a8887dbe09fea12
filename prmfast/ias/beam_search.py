"""Beam search over reasoning steps, guided by a PRM: fixed, or with beams and samples adapted to the instance."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from prmfast._progress import progress as progress_bar
from prmfast._ranges import stage
from prmfast.engines.base import Completion, Engine, Judge, Verifier
from prmfast.ias._beam_result import BeamAnswer, BeamSearchResult
from prmfast.ias._beam_tree import FINISHED, Chain, Rules, Tree
from prmfast.ias._check import probability, question_list, whole
from prmfast.ias._rating import Rating, rate

SUBTREE_SEEDS = 2**32
_BOXED = re.compile(r"\\boxed\{.*\}")


def has_boxed_answer(text: str) -> bool:
    r"""Whether ``text`` holds ``\boxed{...}``, closed on the same line."""
    return _BOXED.search(text) is not None


@dataclass(frozen=True, slots=True)
class BeamSettings:
    """The shape of a search [U, arXiv 2506.09338; NUMERICS 2].

    Args:
        n_generations: steps drawn at the start of a question.
        beam_width: M_max, samples a beam; K_max, the number of beams, is ``n_generations // beam_width``.
        freq: steps between two prunings; between them every beam grows by one sample a step.
        max_steps: no answer gets more.
        max_tokens: once a question has drawn so many tokens in all its chains, it starts no further step.
        max_length: a chain with so many tokens ends; the engine's own limit holds for each step.
        subtrees: searches that never compete, with ``n_generations / subtrees`` first steps and
            ``K_max / subtrees`` beams each, budgets included; diverse verifier tree search (DVTS) has K_max of them.
        ias: "fixed", "K" (IAS-of-K adapts the number of beams), "M" (IAS-of-M the samples a beam) or "KM".
        target: C, the success probability that IAS aims at.
        lb_idx: column of the quantiles that budgets read as lower bound; None reads the median.
    """

    n_generations: int = 16
    beam_width: int = 4
    freq: int = 1
    max_steps: int = 40
    max_tokens: int | None = None
    max_length: int | None = None
    subtrees: int = 1
    ias: Literal["fixed", "K", "M", "KM"] = "fixed"
    target: float = 0.99
    lb_idx: int | None = None

    def __post_init__(self) -> None:
        for name in ("n_generations", "beam_width", "freq", "max_steps", "subtrees"):
            whole(name, getattr(self, name), low=1)
        for name, low in (("max_tokens", 1), ("max_length", 1), ("lb_idx", 0)):
            if getattr(self, name) is not None:
                whole(name, getattr(self, name), low=low)
        if self.ias not in ("fixed", "K", "M", "KM"):
            raise ValueError(f"ias must be 'fixed', 'K', 'M' or 'KM', got {self.ias!r}")
        probability("target", self.target)
        if self.n_generations % self.subtrees:
            raise ValueError(
                f"n_generations must be a multiple of subtrees ({self.subtrees}), got {self.n_generations}"
            )
        if self.n_generations // self.subtrees < self.beam_width:
            raise ValueError(
                f"n_generations must be at least beam_width * subtrees ({self.beam_width * self.subtrees}), "
                f"got {self.n_generations}"
            )

    @property
    def k_max(self) -> int:
        """Beams of one subtree."""
        return self.n_generations // self.subtrees // self.beam_width


@dataclass(frozen=True)
class BeamSearch:
    """Draws answers step by step and keeps those chains that the PRM believes in.

    At first ``n_generations`` steps are drawn. Every ``freq`` steps all chains are rated by their last step, the K best
    by median stay, and each one that has not ended is continued by M samples; both are fixed, or as large as the lower
    bounds of the quantiles ask for (IAS-of-K, IAS-of-M). A chain ends with an end token, an answer, or a length limit;
    ended chains compete for beams like others. The answer is the finished last beam with the highest median.

    A chain goes to the judge once, whole; one that keeps what it has scored computes the new step only.

    ``variant="released"`` is the released program of [U]: equal chains stay side by side, a step without text is a
    candidate like any other, sample i of every beam has seed ``seed + i`` at every step, text is stripped between
    steps, and the pick may be unfinished. By default ("paper") chains are distinct, steps without text are dropped,
    and draw g of subtree i has seed ``seed + i * 2**32 + g``.

    Args:
        engine: made with stop strings, so that a sample is one step.
        judge: the PRM; its quantiles are used where it has some, else its score is taken for the success probability.
            ``ScorerJudge`` makes one of a PRM and a calibrator.
        settings: the shape of the search.
        verifier: ``verify(question, completion)``, to report accuracy; decides nothing.
        is_answer: says of a chain whether it holds its answer, and thereby ends; None leaves that to the end token.
        batch_size: samples per call of the engine, chains per call of the judge.
        seed: of each question's first sample.
        rank_by: chains are ranked by the "median" of their success probability, or by the PRM's own "score"; budgets
            read the quantiles either way.
        variant: "paper" or "released".
    """

    engine: Engine
    judge: Judge
    settings: BeamSettings = field(default_factory=BeamSettings)
    verifier: Verifier | None = None
    is_answer: Callable[[str], bool] | None = has_boxed_answer
    batch_size: int = 1024
    seed: int = 0
    rank_by: Literal["median", "score"] = "median"
    variant: Literal["paper", "released"] = "paper"

    def __post_init__(self) -> None:
        if not isinstance(self.engine, Engine):
            raise TypeError(f"engine must have policy_id and sample(), got {type(self.engine).__name__}")
        if not getattr(self.engine, "stop", True):
            raise ValueError("engine must be made with stop strings, so that a sample is one step, got none")
        if not isinstance(self.judge, Judge):
            raise TypeError(
                "judge must have prm_id and judge() (ScorerJudge makes one of a scorer), "
                f"got {type(self.judge).__name__}"
            )
        if not isinstance(self.settings, BeamSettings):
            raise TypeError(f"settings must be BeamSettings, got {type(self.settings).__name__}")
        whole("batch_size", self.batch_size, low=1)
        whole("seed", self.seed, low=0, high=2**62)
        if self.rank_by not in ("median", "score"):
            raise ValueError(f"rank_by must be 'median' or 'score', got {self.rank_by!r}")
        if self.variant not in ("paper", "released"):
            raise ValueError(f"variant must be 'paper' or 'released', got {self.variant!r}")

    def run(self, questions: Sequence[str], *, progress: bool = True) -> BeamSearchResult:
        """Answers ``questions``, all of them step by step together."""
        question_list(questions)
        search, last = _Search(self, questions), self.settings.max_steps
        with progress_bar(last, "steps", progress) as bar:
            for step in range(1, last + 1):
                if not search.grow(step):
                    bar.advance(last - step + 1)
                    break
                if step % self.settings.freq == 0:
                    search.prune(step)
                bar.advance()
                bar.update(running=search.running)
        with stage("beam_search.pick"):
            return search.result()


class _Search:
    """One run: the subtrees of all questions, and what the judge has said of their chains."""

    def __init__(self, search: BeamSearch, questions: Sequence[str]) -> None:
        shape = search.settings
        self.search, self.questions, self.lb_idx = search, questions, shape.lb_idx
        self.ratings: dict[tuple[int, str], Rating] = {}
        self.rules = Rules(
            k_max=shape.k_max,
            m_max=shape.beam_width,
            adapt_k="K" in shape.ias,
            adapt_m="M" in shape.ias,
            target=shape.target,
            max_length=shape.max_length,
            is_answer=search.is_answer,
            rank_by=search.rank_by,
            released=search.variant == "released",
        )
        self.trees = [
            Tree(q, i, search.seed + i * SUBTREE_SEEDS, shape.n_generations // shape.subtrees, self.rules)
            for q in range(len(questions))
            for i in range(shape.subtrees)
        ]

    @property
    def running(self) -> int:
        """Subtrees that have not stopped."""
        return sum(tree.end is None for tree in self.trees)

    def grow(self, step: int) -> bool:
        """Draws the next step of every running beam; False where there is none."""
        jobs = [(tree, chain, seed) for tree in self.trees for chain, seed in tree.jobs()]
        if not jobs:
            return False
        drawn: dict[int, list[tuple[Chain, Completion]]] = {}
        with stage("beam_search.sample"):
            completions = self._sample(jobs)
        for (tree, chain, _), completion in zip(jobs, completions, strict=True):
            drawn.setdefault(id(tree), []).append((chain, completion))
        for tree in self.trees:
            if id(tree) in drawn:
                tree.grow(step, drawn[id(tree)])
        self._stop_at_max_tokens()
        return True

    def _sample(self, jobs: Sequence[tuple[Tree, Chain, int]]) -> list[Completion]:
        engine, size = self.search.engine, self.search.batch_size
        completions: list[Completion] = []
        for at in range(0, len(jobs), size):
            part = jobs[at : at + size]
            done = engine.sample(
                [self.questions[tree.question] for tree, _, _ in part],
                [seed for _, _, seed in part],
                prefixes=[chain.prefix for _, chain, _ in part],
            )
            if len(done) != len(part):
                raise RuntimeError(f"engine must return one completion per prompt ({len(part)}), got {len(done)}")
            completions += done
        return completions

    def _stop_at_max_tokens(self) -> None:
        limit = self.search.settings.max_tokens
        if limit is None:
            return
        spent = [0] * len(self.questions)
        for tree in self.trees:
            spent[tree.question] += sum(step.n_tokens for step in tree.steps)
        for tree in self.trees:
            if tree.end is None and spent[tree.question] >= limit:
                tree.end = "max_tokens"

    def prune(self, step: int) -> None:
        """Rates the chains of the subtrees that grew at this step, and prunes these."""
        trees = [tree for tree in self.trees if tree.steps[-1].step == step]
        self._rate(trees)
        with stage("beam_search.prune"):
            for tree in trees:
                tree.prune(step)

    def _rate(self, trees: Sequence[Tree]) -> None:
        """Sends to the judge what it has not seen; the released program sends equal new chains side by side."""
        jobs: list[tuple[Tree, str]] = []
        known = set(self.ratings)
        for tree in trees:
            fresh = [chain.text for chain in tree.beams if (tree.question, chain.text) not in known]
            if not self.rules.released:
                fresh = list(dict.fromkeys(fresh))
                known |= {(tree.question, text) for text in fresh}
            jobs += [(tree, text) for text in fresh]
            tree.count_scored(len(fresh))
        judge, size = self.search.judge, self.search.batch_size
        with stage("beam_search.score"):
            for at in range(0, len(jobs), size):
                part = jobs[at : at + size]
                asked, texts = [self.questions[tree.question] for tree, _ in part], [text for _, text in part]
                for (tree, text), rating in zip(part, rate(judge, asked, texts, self.lb_idx), strict=True):
                    self.ratings[tree.question, text] = rating
        for tree in trees:
            for chain in tree.beams:
                chain.rating = self.ratings[tree.question, chain.text]

    def result(self) -> BeamSearchResult:
        """Rates what is left unrated, and picks."""
        self._rate([tree for tree in self.trees if any(chain.rating is None for chain in tree.beams)])
        answers, subtrees = [], self.search.settings.subtrees
        for q, question in enumerate(self.questions):
            answers.append(self._answer(question, self.trees[q * subtrees : (q + 1) * subtrees]))
        return BeamSearchResult(
            tuple(answers),
            tuple(step for tree in self.trees for step in tree.steps),
            tuple(row for tree in self.trees for row in tree.candidates(tree.steps[-1].step)),
            self.search.engine.policy_id,
            self.search.judge.prm_id,
        )

    def _answer(self, question: str, trees: Sequence[Tree]) -> BeamAnswer:
        tree = max(trees, key=lambda tree: tree.key(tree.best()))
        pick, verify = tree.best(), self.search.verifier
        assert pick.rating is not None
        texts = {chain.text for one in trees for chain in one.beams}
        return BeamAnswer(
            question=question,
            completion=pick.text,
            score=pick.rating.score,
            median=pick.rating.median,
            expected=pick.rating.expected,
            finished=pick.end in FINISHED,
            end=tree.end or "max_steps",
            subtree=tree.subtree,
            steps=max(one.steps[-1].step for one in trees),
            generations=sum(one.drawn for one in trees),
            n_tokens=sum(step.n_tokens for one in trees for step in one.steps),
            scored=sum(one.scored for one in trees),
            correct=None if verify is None else bool(verify(question, pick.text)),
            any_correct=None if verify is None else any(verify(question, text) for text in texts),
        )
