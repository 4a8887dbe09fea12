"""Beam search against the released trace of [U], and against the laws that any beam search obeys."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from prmfast.engines import Completion, Engine, Judge, StepScores
from prmfast.ias import BeamCandidate, BeamSearch, BeamSearchResult, BeamSettings, compute_n_ias, has_boxed_answer

from .world import uniform

# The released trace.


class FakeEngine:
    """The fake LLM of the vectors as an engine: rows with seeds 42, 43, ... of one prompt are one call's n samples."""

    policy_id = "fake"
    stop = ("\n\n",)

    def __init__(self, fakes: ModuleType, template: str) -> None:
        self.llm, self.tokens, self.template = fakes.FakeLLM(), fakes.tokens, template

    def sample(
        self, prompts: Sequence[str], seeds: Sequence[int], *, prefixes: Sequence[str] | None = None
    ) -> list[Completion]:
        assert prefixes is not None
        starts = [i for i, seed in enumerate(seeds) if seed == 42]
        runs = [range(a, b) for a, b in zip(starts, [*starts[1:], len(seeds)], strict=True)]
        assert [seed - 42 for seed in seeds] == [i - run.start for run in runs for i in run]
        drawn: dict[int, Completion] = {}
        for n in sorted({len(run) for run in runs}):
            some = [run for run in runs if len(run) == n]
            texts = [self.template.replace("{input}", prompts[r.start]) + prefixes[r.start] for r in some]
            outputs = self.llm.generate(texts, SimpleNamespace(n=n, seed=42))
            for run, output in zip(some, outputs, strict=True):
                for i, one in zip(run, output.outputs, strict=True):
                    new, whole = len(self.tokens(one.text)), prefixes[i] + one.text
                    ended = one.text != "out of tokens"
                    drawn[i] = Completion(prompts[i], seeds[i], whole, (0,) * new, new, ended, one.stop_reason)
        return [drawn[i] for i in range(len(prompts))]


class FakeJudge:
    """The fake PRM of the vectors as a judge, of the last step only; [q10, q50, q90] where it has quantiles."""

    prm_id = "fake"

    def __init__(self, fakes: ModuleType, quantiles: bool) -> None:
        self.prm = fakes.FakePRM(quantiles)

    def judge(self, questions: Sequence[str], answers: Sequence[str | None]) -> list[StepScores]:
        rows = [row[0][0] for row in self.prm.score(questions, [[answer or ""] for answer in answers])]
        if not self.prm.q:
            return [StepScores((score,)) for score in rows]
        return [StepScores((row[1],), torch.tensor([row])) for row in rows]


def settings_of(argv: Sequence[str]) -> BeamSettings:
    """The released flags; a later one wins."""
    values = {flag[2:]: value for flag, value in zip(argv, [*argv[1:], ""], strict=True) if flag.startswith("--")}
    return BeamSettings(
        n_generations=int(values["n_generations"]),
        beam_width=int(values["beam_width"]),
        freq=int(values["freq"]),
        max_steps=int(values["max_steps"]),
        ias="M" if "interleave_M" in values else "K" if "interleave_K" in values else "fixed",
        lb_idx=int(values["lb_idx"]) if "lb_idx" in values else None,
    )


def decisions(result: BeamSearchResult, pruned_at: Sequence[int]) -> list[dict[str, list[int]]]:
    """K and M of all questions, prune by prune; a question that has stopped keeps its last ones."""
    made = {(step.question, step.step): step for step in result.steps if step.k is not None}
    rows = []
    for at in pruned_at:
        last = [
            made[q, max(step for question, step in made if question == q and step <= at)]
            for q in range(len(result.answers))
        ]
        rows.append({"K": [int(step.k or 0) for step in last]})
        rows.append({"M": [int(step.m or 0) for step in last], "beams": [step.beams for step in last]})
    return rows


def test_released_trace(shared_vectors: Path) -> None:
    trace = json.loads((shared_vectors / "calprm_beam_trace.json").read_text())
    template = json.loads((shared_vectors / "calprm_text.json").read_text())["prompt_format"][trace["model_id"]]
    spec = importlib.util.spec_from_file_location("fake_llm", shared_vectors / "fake_llm.py")
    assert spec is not None
    assert spec.loader is not None
    fakes = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fakes)
    questions = [entry["problem"] for entry in trace["questions"]]
    assert {run["name"] for run in trace["runs"]} == {"fixed", "M", "wql_fixed", "wql_M_lb0", "freq1_K", "maxsteps3"}
    for run in trace["runs"]:
        shape = settings_of(run["argv"])
        engine, judge = FakeEngine(fakes, template), FakeJudge(fakes, "--prm_peft_dir" in run["argv"])
        search = BeamSearch(engine, judge, shape, seed=42, variant="released")
        result = search.run(questions, progress=False)
        assert decisions(result, range(shape.freq, shape.max_steps + 1, shape.freq)) == run["decisions"], run["name"]
        for q, expected in enumerate(run["results"]):
            assert [result.answers[q].completion] == expected["generations"], run["name"]
            padding = [0] * (shape.max_steps - result.answers[q].steps)
            assert result.counts("generations")[q] + padding == expected["generation_cnts"], run["name"]
            assert result.counts("n_tokens")[q] + padding == expected["generation_token_cnts"], run["name"]
        assert engine.llm.n_calls == run["llm_generate_calls"], run["name"]
        assert engine.llm.n_samples == result.generations == run["llm_samples"], run["name"]
        assert judge.prm.n_scored == result.scored == run["prm_scored"], run["name"]


def test_what_counts_as_a_boxed_answer(shared_vectors: Path) -> None:
    known = json.loads((shared_vectors / "calprm_text.json").read_text())["contains_boxed"]
    assert {text: has_boxed_answer(text) for text in known} == known


# A small world of letters.


class LetterEngine:
    """Each step is a letter and a dot, by a hash of (prompt, prefix, seed); Z ends the answer."""

    policy_id = "letters"
    stop = (".",)

    def __init__(self, *, keep_stop: bool = True, letters: str = "abcdefgZ") -> None:
        self.keep_stop, self.letters = keep_stop, letters
        self.rows: list[tuple[str, str, int]] = []

    def sample(
        self, prompts: Sequence[str], seeds: Sequence[int], *, prefixes: Sequence[str] | None = None
    ) -> list[Completion]:
        begun = prefixes or [""] * len(prompts)
        self.rows += zip(prompts, begun, seeds, strict=True)
        return [self.one(*row) for row in zip(prompts, begun, seeds, strict=True)]

    def one(self, prompt: str, prefix: str, seed: int) -> Completion:
        letter = self.letters[int(uniform("letter", prompt, prefix, seed) * len(self.letters))].strip()
        ended = letter == "Z"
        text = prefix + letter + ("." if self.keep_stop and not ended else "")
        return Completion(prompt, seed, text, tuple(range(len(text))), 2, True, None if ended else ".")


class EmptySteps(LetterEngine):
    """Two letters, and a break without a letter in two of five steps."""

    stop = ("\n\n",)

    def one(self, prompt: str, prefix: str, seed: int) -> Completion:
        letter = ("a", "b", "", "a", "")[int(uniform("e", prompt, prefix, seed) * 5)]
        return Completion(prompt, seed, prefix + letter, (1,), 1, True, "\n\n")


class OnlyBreaks(EmptySteps):
    def one(self, prompt: str, prefix: str, seed: int) -> Completion:
        letter = "a" if not prefix else ""
        return Completion(prompt, seed, prefix + letter, (1,), 1, True, "\n\n")


class LetterJudge:
    """A score per question and text; remembers what it was asked."""

    prm_id = "letter-judge"

    def __init__(self, columns: int = 0) -> None:
        self.columns = columns
        self.asked: list[tuple[str, str | None]] = []

    @staticmethod
    def score(question: str, answer: str | None) -> float:
        return 0.98 * uniform("score", question, answer or "")

    def judge(self, questions: Sequence[str], answers: Sequence[str | None]) -> list[StepScores]:
        self.asked += zip(questions, answers, strict=True)
        return [self.one(*pair) for pair in zip(questions, answers, strict=True)]

    def one(self, question: str, answer: str | None) -> StepScores:
        score = self.score(question, answer)
        if not self.columns:
            return StepScores((0.5, score))
        around = (torch.arange(self.columns) + 0.5) / self.columns - 0.5
        return StepScores((0.5, score), (score + around * 0.4).clamp(0, 1).expand(2, -1))


def at(result: BeamSearchResult, question: int, step: int) -> list[BeamCandidate]:
    return [c for c in result.candidates if c.question == question and c.step == step]


QUESTIONS = [f"question {i}" for i in range(12)]
SHAPE = BeamSettings(n_generations=12, beam_width=3, max_steps=6)


def search(shape: BeamSettings = SHAPE, **options: Any) -> BeamSearch:
    engine, judge = options.pop("engine", None) or LetterEngine(), options.pop("judge", None) or LetterJudge()
    return BeamSearch(engine, judge, shape, **options)


def run(shape: BeamSettings = SHAPE, **options: Any) -> BeamSearchResult:
    return search(shape, **options).run(QUESTIONS, progress=False)


def greedy(question: str, width: int, steps: int) -> str:
    """Draw ``width`` steps, keep the best; nothing else."""
    engine, text, drawn = LetterEngine(), "", 0
    for _ in range(steps):
        texts = [engine.one(question, text, drawn + i).text for i in range(width)]
        drawn += width
        text = max(dict.fromkeys(texts), key=lambda t: LetterJudge.score(question, t))
        if text.endswith("Z"):
            break
    return text


def test_one_beam_is_greedy_by_the_prm() -> None:
    result = run(BeamSettings(n_generations=4, beam_width=4, max_steps=7))
    assert [answer.completion for answer in result.answers] == [greedy(q, 4, 7) for q in QUESTIONS]
    assert all(step.k == 1 and step.beams == 1 for step in result.steps)
    assert run(BeamSettings(n_generations=4, beam_width=4, max_steps=7, ias="K")).answers == result.answers


def test_the_fakes_and_every_result_are_what_the_protocols_say() -> None:
    assert isinstance(LetterEngine(), Engine)
    assert isinstance(LetterJudge(), Judge)
    assert run() == run()
    assert run(batch_size=5) == run()
    together, alone = run(), [search().run([q], progress=False) for q in QUESTIONS]
    assert together.answers == tuple(one.answers[0] for one in alone)


@pytest.mark.parametrize("ias", ["fixed", "K", "M", "KM"])
@pytest.mark.parametrize("freq", [1, 2])
@pytest.mark.parametrize("subtrees", [1, 2])
def test_counts_add_up_and_no_chain_is_scored_twice(ias: str, freq: int, subtrees: int) -> None:
    engine, judge = LetterEngine(), LetterJudge(columns=9)
    shape = replace(SHAPE, ias=ias, freq=freq, subtrees=subtrees, lb_idx=1, target=0.9)
    result = run(shape, engine=engine, judge=judge)
    assert len(judge.asked) == len(set(judge.asked)) == result.scored == sum(map(sum, result.counts("scored")))
    assert len(engine.rows) == result.generations == len(result.candidates) == sum(map(sum, result.counts()))
    assert result.n_tokens == 2 * result.generations == sum(map(sum, result.counts("n_tokens")))
    assert len(set(engine.rows)) == len(engine.rows)
    for q in range(len(QUESTIONS)):
        own = [candidate for candidate in result.candidates if candidate.question == q]
        assert len({candidate.seed for candidate in own}) == len(own)  # a seed of its own for each draw


@pytest.mark.parametrize("shape", [SHAPE, replace(SHAPE, ias="KM", target=0.9), replace(SHAPE, freq=3, subtrees=2)])
def test_the_pick_is_the_best_of_the_last_beams(shape: BeamSettings) -> None:
    for q, answer in enumerate((result := run(shape)).answers):
        beams = [c for c in result.candidates if c.question == q and c.fate == "beam"]
        finished = [c for c in beams if c.end == "end token"] or beams
        assert answer.score == max(c.score or 0.0 for c in finished)
        assert answer.finished is any(c.end == "end token" for c in beams)
        assert answer.score == LetterJudge.score(answer.question, answer.completion)


def test_every_decision_follows_from_the_candidates() -> None:
    """K and M from the definition, and no chain kept that is worse than one let go."""
    shape = replace(SHAPE, ias="KM", lb_idx=1, target=0.9)
    result = run(shape, judge=LetterJudge(columns=9))
    for step in result.steps:
        assert step.k is not None
        rows = [c for c in result.candidates if (c.question, c.subtree) == (step.question, step.subtree)]
        pruned = [c for c in rows if c.fate == "pruned" and c.until == step.step]
        kept = [c for c in rows if c.step <= step.step <= c.until and c not in pruned and c.fate in ("beam", "pruned")]
        kept += [c for c in rows if c.fate == "grown" and c.until == step.step + 1 and c.step <= step.step]
        assert len(kept) == step.beams
        assert len(kept) + len(pruned) == step.candidates
        assert min(c.median or 0 for c in kept) >= max([c.median or 0 for c in pruned], default=0)
        lowers = sorted((c.lower or 0 for c in kept + pruned), reverse=True)
        enough = [
            k for k in range(1, 5) if k == 4 or (k <= len(lowers) and 3 * k >= compute_n_ias(lowers[k - 1], 1, 0.9))
        ]
        assert step.k == min(enough[0], len(lowers))
        assert step.m == min(compute_n_ias(min(c.lower or 0 for c in kept), 4, 0.9), 3)
        assert step.why.startswith(f"K = {step.k}")


def test_chains_may_be_ranked_by_the_raw_score() -> None:
    """A judge whose quantiles turn the order round: the median ranks, or the score does."""

    class Contrary(LetterJudge):
        def one(self, question: str, answer: str | None) -> StepScores:
            score = self.score(question, answer)
            return StepScores((score,), torch.tensor([[1 - score] * 3]))

    by_score = run(judge=Contrary(), rank_by="score")
    assert [a.completion for a in by_score.answers] == [a.completion for a in run().answers]
    by_median = run(judge=Contrary())
    assert by_median.answers != by_score.answers
    for answer in (*by_score.answers, *by_median.answers):
        assert answer.score == LetterJudge.score(answer.question, answer.completion)
        assert answer.median == answer.expected == pytest.approx(1 - answer.score, abs=1e-6)


def test_ias_spends_less_where_the_prm_is_sure() -> None:
    fixed = run()
    for ias in ("K", "M", "KM"):
        adapted = run(replace(SHAPE, ias=ias, target=0.9))
        assert adapted.generations < fixed.generations
    assert run(replace(SHAPE, ias="KM", target=1 - 1e-12)).answers == fixed.answers  # nobody is that sure


def test_subtrees_never_mix() -> None:
    """Subtree i of the search is the search with the seeds of subtree i, alone."""
    shape = replace(SHAPE, subtrees=4)
    together = run(shape, seed=7)
    assert {step.k for step in together.steps} == {1}
    for i in range(4):
        alone = run(replace(SHAPE, n_generations=3, subtrees=1), seed=7 + i * 2**32)
        own = [replace(c, subtree=0) for c in together.candidates if c.subtree == i]
        assert own == list(alone.candidates)
    for q, answer in enumerate(together.answers):
        beams = [c for c in together.candidates if c.question == q and c.fate == "beam"]
        finished = [c for c in beams if c.end is not None] or beams
        assert answer.score == max(c.score or 0 for c in finished)


def test_pruning_waits_for_freq_steps() -> None:
    result = run(replace(SHAPE, freq=3, max_steps=6), engine=LetterEngine(letters="abcdefghijklm"))
    for step in result.steps:
        assert (step.k is None) is (step.step % 3 != 0)
        if step.k is None:
            assert step.scored == 0
    assert result.counts()[0][:3] == [12, *(len({c.text for c in at(result, 0, s)}) for s in (1, 2))]


def test_an_engine_may_drop_the_stop_string() -> None:
    assert run(engine=LetterEngine(keep_stop=False)) == run(engine=LetterEngine(keep_stop=True))


def test_equal_chains_and_empty_steps() -> None:
    """Few letters: duplicates are kept once, steps without text are dropped; the released variant keeps both."""
    ours = run(engine=EmptySteps())
    fates = {c.fate for c in ours.candidates}
    assert {"duplicate", "empty step", "beam", "grown"} <= fates
    for step in ours.steps:
        drawn = at(ours, step.question, step.step)
        dropped = [c for c in drawn if c.fate in ("duplicate", "empty step") and c.until == step.step]
        texts = {c.text for c in drawn if c.fate != "empty step"}
        assert step.candidates == len(texts) == len(drawn) - len(dropped)  # none of these chains ever ends
    released = run(engine=EmptySteps(), variant="released")
    assert {c.fate for c in released.candidates} == {"beam", "grown", "pruned"}


def test_an_answer_that_cannot_go_on_ends_where_it_stands() -> None:
    result = run(engine=OnlyBreaks())
    assert {(a.completion, a.end, a.finished, a.steps) for a in result.answers} == {("a", "empty steps", False, 2)}


def test_stopping_rules() -> None:
    engine = LetterEngine(letters="abc")  # never ends by itself
    assert {(a.end, a.finished) for a in run(engine=engine).answers} == {("max_steps", False)}
    limited = run(replace(SHAPE, max_length=6), engine=engine)
    assert {(a.end, len(a.completion), a.steps) for a in limited.answers} == {("all beams ended", 6, 3)}
    assert {c.end for c in limited.candidates if c.fate == "beam"} == {"length"}
    answered = run(engine=engine, is_answer=lambda text: "c" in text)
    assert all(a.finished and a.completion.index("c") == len(a.completion) - 2 for a in answered.answers)
    budget = run(replace(SHAPE, max_tokens=40), engine=engine)
    for q, answer in enumerate(budget.answers):
        tokens = budget.counts("n_tokens")[q]
        assert answer.end == "max_tokens"
        assert sum(tokens[:-1]) < 40 <= sum(tokens)


def test_a_length_limit_of_the_engine_ends_a_chain() -> None:
    class Cut(LetterEngine):
        def one(self, prompt: str, prefix: str, seed: int) -> Completion:
            return replace(super().one(prompt, prefix, seed), finished=False, stop=None)

    result = run(engine=Cut(letters="abc"))
    assert {(c.end, c.step) for c in result.candidates} == {("length", 1)}
    assert not any(answer.finished for answer in result.answers)


def test_boxed_answers_end_at_a_step_break() -> None:
    class Boxes(LetterEngine):
        def one(self, prompt: str, prefix: str, seed: int) -> Completion:
            text = prefix + r"so \boxed{1}" + "."
            return Completion(prompt, seed, text, (1,), 1, True, ".")

    assert {(a.completion, a.steps) for a in run(engine=Boxes()).answers} == {(r"so \boxed{1}.", 1)}
    assert {a.steps for a in run(engine=Boxes(), is_answer=None).answers} == {6}


def test_verdicts_and_tables() -> None:
    verify: Callable[[str, str], bool] = lambda question, text: text.startswith(("a", "b"))  # noqa: E731
    result = run(verifier=verify)
    assert [a.correct for a in result.answers] == [verify(a.question, a.completion) for a in result.answers]
    assert result.accuracy == sum(bool(a.correct) for a in result.answers) / 12
    assert result.success is not None
    assert result.success >= result.accuracy
    assert run().accuracy is None
    steps, chains = result.to_table("steps").to_pylist(), result.to_table("candidates").to_pylist()
    assert (len(steps), len(chains)) == (len(result.steps), len(result.candidates))
    assert result.to_table().column("completion").to_pylist() == [a.completion for a in result.answers]
    assert steps[0]["question"] == chains[0]["question"] == QUESTIONS[0]
    assert {"k", "m", "why", "lower", "beams", "generations", "n_tokens", "scored"} <= set(steps[0])
    with pytest.raises(ValueError, match="of must be 'answers', 'steps' or 'candidates', got 'rows'"):
        result.to_table("rows")  # type: ignore[arg-type]


def test_stages_have_stable_names_in_a_profile() -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as recorded:
        run()
    names = {event.key for event in recorded.key_averages() if event.key.startswith("prmfast.")}
    assert names == {f"prmfast.beam_search.{stage}" for stage in ("sample", "score", "prune", "pick")}


# Bad input.


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"n_generations": 0}, ValueError, "n_generations must be >= 1, got 0"),
        ({"beam_width": 2.0}, TypeError, "beam_width must be an int, got float"),
        ({"freq": 0}, ValueError, "freq must be >= 1, got 0"),
        ({"max_tokens": 0}, ValueError, "max_tokens must be >= 1, got 0"),
        ({"lb_idx": -1}, ValueError, "lb_idx must be >= 0, got -1"),
        ({"ias": "L"}, ValueError, "ias must be 'fixed', 'K', 'M' or 'KM', got 'L'"),
        ({"target": 1.0}, ValueError, r"target must lie in \(0, 1\), got 1.0"),
        (
            {"n_generations": 10, "subtrees": 3},
            ValueError,
            r"n_generations must be a multiple of subtrees \(3\), got 10",
        ),
        (
            {"n_generations": 8, "beam_width": 4, "subtrees": 4},
            ValueError,
            r"n_generations must be at least beam_width \* subtrees \(16\), got 8",
        ),
    ],
)
def test_settings_say_what_is_wrong(values: dict[str, Any], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        BeamSettings(**values)


class Silent(LetterEngine):
    stop = ()  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"engine": object()}, TypeError, r"engine must have policy_id and sample\(\), got object"),
        ({"engine": Silent()}, ValueError, "engine must be made with stop strings"),
        ({"judge": object()}, TypeError, r"judge must have prm_id and judge\(\) .*, got object"),
        ({"shape": {"freq": 1}}, TypeError, "settings must be BeamSettings, got dict"),
        ({"seed": -1}, ValueError, "seed must be >= 0"),
        ({"rank_by": "mean"}, ValueError, "rank_by must be 'median' or 'score', got 'mean'"),
        ({"variant": "mine"}, ValueError, "variant must be 'paper' or 'released', got 'mine'"),
    ],
)
def test_a_search_says_what_is_wrong(options: dict[str, Any], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        search(**options)


class Wrong(LetterJudge):
    """Says what it is told to say."""

    def __init__(self, answer: StepScores, drop: int = 0) -> None:
        super().__init__()
        self.answer, self.drop = answer, drop

    def judge(self, questions: Sequence[str], answers: Sequence[str | None]) -> list[StepScores]:
        return [self.answer] * (len(questions) - self.drop)


@pytest.mark.parametrize(
    ("judge", "shape", "error", "message"),
    [
        (Wrong(StepScores(())), SHAPE, ValueError, "judge must return at least one score an answer, got none for"),
        (Wrong(StepScores((float("nan"),))), SHAPE, ValueError, "judge must not return NaN, got NaN for"),
        (Wrong(StepScores((0.5,)), drop=1), SHAPE, RuntimeError, "judge must return one entry per answer"),
        (
            Wrong(StepScores((0.5,))),
            replace(SHAPE, lb_idx=0),
            ValueError,
            "lb_idx must be None for a judge without quantiles",
        ),
        (
            Wrong(StepScores((0.5,), torch.full((1, 3), 0.5))),
            replace(SHAPE, lb_idx=3),
            ValueError,
            "lb_idx must be < 3, the number of quantiles, got 3",
        ),
        (Wrong(StepScores((0.5,), torch.full((1, 3), torch.nan))), SHAPE, ValueError, "judge must not return NaN"),
    ],
)
def test_what_a_judge_may_not_say(judge: LetterJudge, shape: BeamSettings, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        run(shape, judge=judge)


def test_questions_are_checked() -> None:
    for bad in ("one question", [1, 2]):
        with pytest.raises(TypeError, match="questions must be a sequence of strings"):
            search().run(bad)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="questions must have at least one entry, got 0"):
        search().run([])
