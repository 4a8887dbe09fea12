"""What a beam search leaves behind: answers, the decision of every step, and every chain with its fate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import pyarrow as pa

Fate = Literal["grown", "beam", "pruned", "duplicate", "empty step"]


@dataclass(frozen=True, slots=True)
class BeamCandidate:
    """One drawn step and the chain that it ends.

    ``number`` counts the draws of a question's subtree from 1, 0 is the empty answer; ``parent`` is the number of the
    chain that it continues. ``text`` is the whole answer so far, as the judge sees it; ``n_tokens`` counts the new
    tokens. ``score`` is the PRM's; ``median``, ``lower`` and ``expected`` are of its success probability; None where
    the chain was never scored. ``end`` says why nothing follows: "answer", "end token", "length", "empty steps"; None
    where it could go on. ``fate`` is what became of it at step ``until``: "grown" (its children took its place), "beam"
    (it was among the last beams), "pruned", "duplicate" or "empty step".
    """

    question: int
    subtree: int
    number: int
    parent: int
    step: int
    seed: int
    text: str
    n_tokens: int
    end: str | None
    score: float | None
    median: float | None
    lower: float | None
    expected: float | None
    fate: Fate
    until: int


@dataclass(frozen=True, slots=True)
class BeamStep:
    """One step of one subtree.

    ``generations`` steps of ``n_tokens`` tokens in total were drawn; ``candidates`` chains then stood to choose from,
    of which ``scored`` were sent to the judge. Where the step pruned: ``k``, the beams allowed; ``beams``, those kept;
    ``m``, samples a beam in the next step; ``lower``, the bound that decided. None elsewhere.
    """

    question: int
    subtree: int
    step: int
    generations: int
    n_tokens: int
    candidates: int
    scored: int
    k: int | None
    m: int | None
    beams: int
    running: int
    lower: float | None
    why: str


@dataclass(frozen=True, slots=True)
class BeamAnswer:
    """The outcome of a question.

    ``score`` is the PRM's of the picked chain, ``median`` and ``expected`` are of its success probability;
    ``finished``: it ended by an end token or an answer. ``end`` says why its subtree stopped. ``correct`` is the
    verifier's word on the pick, ``any_correct`` on all last beams; None without one.
    """

    question: str
    completion: str
    score: float
    median: float
    expected: float
    finished: bool
    end: str
    subtree: int
    steps: int
    generations: int
    n_tokens: int
    scored: int
    correct: bool | None
    any_correct: bool | None


@dataclass(frozen=True)
class BeamSearchResult:
    """Answers in the order of the questions, the decisions of every step, and every chain."""

    answers: tuple[BeamAnswer, ...]
    steps: tuple[BeamStep, ...]
    candidates: tuple[BeamCandidate, ...]
    policy_id: str
    prm_id: str

    @property
    def generations(self) -> int:
        """Steps drawn in total."""
        return sum(answer.generations for answer in self.answers)

    @property
    def n_tokens(self) -> int:
        """Tokens drawn in total."""
        return sum(answer.n_tokens for answer in self.answers)

    @property
    def scored(self) -> int:
        """Chains sent to the judge in total."""
        return sum(answer.scored for answer in self.answers)

    @property
    def accuracy(self) -> float | None:
        """Share of questions whose picked answer is right; None without a verifier."""
        return self._share("correct")

    @property
    def success(self) -> float | None:
        """Share of questions with a right answer among the last beams; None without a verifier."""
        return self._share("any_correct")

    def counts(self, of: Literal["generations", "n_tokens", "scored"] = "generations") -> list[list[int]]:
        """Per question, one number per step up to the question's last, summed over subtrees."""
        rows = [[0] * answer.steps for answer in self.answers]
        for step in self.steps:
            rows[step.question][step.step - 1] += int(getattr(step, of))
        return rows

    def to_table(self, of: Literal["answers", "steps", "candidates"] = "answers") -> pa.Table:
        """A row per question, per step of a subtree (K, M and why), or per chain; questions by their text."""
        import pyarrow as pa

        rows: dict[str, tuple[Any, ...]] = {
            "answers": self.answers,
            "steps": self.steps,
            "candidates": self.candidates,
        }
        if of not in rows:
            raise ValueError(f"of must be 'answers', 'steps' or 'candidates', got {of!r}")
        table = [{name: getattr(row, name) for name in row.__slots__} for row in rows[of]]
        if of != "answers":
            table = [{**row, "question": self.answers[row["question"]].question} for row in table]
        return pa.Table.from_pylist(table)

    def _share(self, name: str) -> float | None:
        values = [getattr(answer, name) for answer in self.answers]
        return None if None in values else sum(values) / len(values)
