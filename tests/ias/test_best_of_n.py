"""Best-of-N against a small honest world: budgets, prefixes, picks, journals, tables."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from prmfast.calibration import CalibrationData, IsotonicCalibrator
from prmfast.ias import (
    BestOfN,
    BestOfNResult,
    BudgetPolicy,
    BudgetState,
    FixedBudget,
    GlobalBudget,
    PointBudget,
    TargetBudget,
    TauStopping,
    aggregate_score,
)
from prmfast.ops import ias_budget
from prmfast.traces import validate

from .world import BernoulliEngine, KnowsP, NoisyPRM, question, uniform, verify

QUESTIONS = [question(i, 0.02 + 0.9 * uniform("p", i)) for i in range(60)]


def runner(policy: BudgetPolicy, engine: BernoulliEngine | None = None, **options: Any) -> BestOfN:
    options = {"calibrator": KnowsP(), "verifier": verify, "batch_size": 16, **options}
    return BestOfN(engine or BernoulliEngine(), NoisyPRM(), options.pop("calibrator"), policy, **options)


def run(policy: BudgetPolicy, engine: BernoulliEngine | None = None, **options: Any) -> BestOfNResult:
    return runner(policy, engine, **options).run(QUESTIONS, progress=False)


def test_stages_have_stable_names_in_a_profile() -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as recorded:
        run(TauStopping(0.5, 0.9, 4))
    names = {event.key for event in recorded.key_averages() if event.key.startswith("prmfast.")}
    stages = ("first_estimate", "budget", "sample", "score", "quantiles", "pick")
    assert names == {f"prmfast.best_of_n.{stage}" for stage in stages}


def test_draws_what_the_policy_says_and_picks_the_highest_raw_score() -> None:
    engine = BernoulliEngine()
    result = run(TargetBudget(0.9, 64), engine)
    p = NoisyPRM().question_state(QUESTIONS)[1][:, :1]
    spread = p + ((torch.arange(100) + 0.5) / 100 - 0.5) * 2 * torch.minimum(p, 1 - p) * 0.5
    assert [a.drawn for a in result.answers] == ias_budget(spread, 0.9, 64).tolist()
    assert len(engine.calls) == len(set(engine.calls)) == sum(a.drawn for a in result.answers)
    for answer in result.answers:
        texts = [BernoulliEngine.one(answer.question, seed) for seed in range(answer.drawn)]
        scores = [NoisyPRM.steps(answer.question, c.text)[-1] for c in texts]
        best = max(range(len(scores)), key=scores.__getitem__)
        assert (answer.seed, answer.completion, answer.score) == (best, texts[best].text, scores[best])
        assert answer.correct is texts[best].text.startswith("right")
        assert answer.any_correct is any(c.text.startswith("right") for c in texts)
        assert answer.n_tokens == sum(c.n_tokens for c in texts)
    assert result.accuracy == sum(bool(a.correct) for a in result.answers) / 60
    assert result.n_tokens == sum(a.n_tokens for a in result.answers)
    assert result.mean_drawn == len(engine.calls) / 60


def test_adaptive_runs_are_prefixes_of_fixed_ones() -> None:
    fixed = {(s.question, s.seed): s for s in run(FixedBudget(64), seed=100).samples}
    adaptive = run(TargetBudget(0.8, 64), seed=100).samples
    assert all(fixed[s.question, s.seed] == s for s in adaptive)
    for i in range(60):
        seeds = [s.seed for s in adaptive if s.question == i]
        assert seeds == list(range(100, 100 + len(seeds)))


def test_batch_size_changes_nothing() -> None:
    assert run(TargetBudget(0.8, 64), batch_size=7) == run(TargetBudget(0.8, 64), batch_size=1000)


def test_calibrated_target_is_reached_and_the_raw_score_misses_it() -> None:
    many = [question(i, 0.1 + 0.8 * uniform("p", i)) for i in range(1500)]
    good = runner(TargetBudget(0.8, 64), batch_size=512).run(many, progress=False)
    raw = runner(PointBudget(0.8, 64), calibrator=None, batch_size=512).run(many, progress=False)
    assert good.success is not None
    assert raw.success is not None
    error = (0.8 * 0.2 / 1500) ** 0.5
    assert good.success > 0.8 - 3 * error  # the hardest question needs fewer than 64
    assert raw.success < 0.8 - 3 * error
    assert raw.mean_drawn < good.mean_drawn


def test_a_real_calibrator() -> None:
    scores, _ = NoisyPRM().question_state(QUESTIONS)
    right = [sum(verify(q, BernoulliEngine.one(q, 10_000 + s).text) for s in range(20)) for q in QUESTIONS]
    data = CalibrationData.from_arrays(score=scores, successes=right, trials=[20] * 60)
    result = run(TargetBudget(0.9, 64), calibrator=IsotonicCalibrator().fit(data, progress=False))
    raw = run(TargetBudget(0.9, 64), calibrator=None)
    assert result.mean_drawn > raw.mean_drawn  # the PRM flatters: sqrt(p) for p


def test_rounds_until_a_candidate_is_good_enough() -> None:
    engine = BernoulliEngine()
    result = run(TauStopping(0.5, 0.9, 12, step=3), engine, calibrator=None)
    for i, answer in enumerate(result.answers):
        last = [NoisyPRM.steps(answer.question, BernoulliEngine.one(answer.question, s).text)[-1] for s in range(12)]
        first_good = next((k for k, score in enumerate(last) if score >= 0.9), 11)
        assert answer.drawn == (first_good // 3 + 1) * 3
        own = [d for d in result.decisions if d.question == i]
        assert [d.round for d in own] == list(range(1, len(own) + 1))
        assert [d.drawn for d in own] == list(range(0, answer.drawn + 1, 3))
        assert own[-1].why == ("n_max reached" if answer.drawn == 12 else "enough")
    assert max(d.round for d in result.decisions) == 5


def test_tau_stopping_with_quantiles_of_candidates() -> None:
    result = run(TauStopping(0.05, 0.9, 6), calibrator=KnowsP())
    # KnowsP reads the candidate's own hidden state, whose first entry is the last step's score.
    for answer in result.answers:
        last = torch.tensor(
            [NoisyPRM.steps(answer.question, BernoulliEngine.one(answer.question, s).text)[-1] for s in range(6)]
        )
        low = last - 0.45 * torch.minimum(last, 1 - last)
        assert answer.drawn == next((k + 1 for k in range(6) if low[k] >= 0.9), 6)


def test_global_budget_spends_the_total_and_may_leave_a_question_out() -> None:
    result = run(GlobalBudget(64, total=50))
    assert sum(a.drawn for a in result.answers) == 50
    skipped = [a for a in result.answers if a.drawn == 0]
    assert skipped
    assert all(
        (a.completion, a.score, a.seed, a.correct, a.any_correct) == (None, None, None, False, False) for a in skipped
    )
    assert result.accuracy is not None


def test_n_max_caps_the_policy_and_says_so() -> None:
    result = run(FixedBudget(9), n_max=4)
    assert {a.drawn for a in result.answers} == {4}
    first, second = (d for d in result.decisions if d.question == 0)
    assert "9 asked for, n_max = 4" in first.why
    assert (first.round, first.drawn, first.budget) == (1, 0, 4)
    assert (second.round, second.drawn, second.why) == (2, 4, "n_max reached; 9 asked for, n_max = 4")


def test_without_verifier() -> None:
    result = run(FixedBudget(2), verifier=None)
    assert result.accuracy is None
    assert result.success is None
    assert result.answers[0].correct is None
    assert set(result.verdicts) == {None}


def test_tables() -> None:
    result = run(TargetBudget(0.7, 8))
    answers = result.to_table()
    assert answers.num_rows == 60
    assert answers.column("drawn").to_pylist() == [a.drawn for a in result.answers]
    decisions = result.to_table("decisions")
    said = {"question", "round", "drawn", "budget", "expected", "why"}
    assert set(decisions.column_names) == said | {"success", "solved", "time"}
    assert decisions.num_rows == len(result.decisions)
    traces = validate(result.to_table("samples"))
    assert traces.num_rows == sum(a.drawn for a in result.answers)
    assert traces.column("correct").to_pylist() == list(result.verdicts)
    with pytest.raises(ValueError, match="of must be"):
        result.to_table("tokens")  # type: ignore[arg-type]


# --- journals


@pytest.mark.parametrize("policy", [TargetBudget(0.8, 32), TauStopping(0.05, 0.95, 9, step=4)])
def test_an_interrupted_run_draws_nothing_twice(policy: BudgetPolicy, tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    whole = run(policy)
    calls: list[tuple[str, int]] = []
    for allowed in (40, 70, 0):
        engine = BernoulliEngine(fail_after=allowed)
        with pytest.raises(KeyboardInterrupt):
            runner(policy, engine).run(QUESTIONS, progress=False, journal=path)
        calls += engine.calls
    engine = BernoulliEngine()
    assert runner(policy, engine).run(QUESTIONS, progress=False, journal=path) == whole
    calls += engine.calls
    assert len(calls) == len(set(calls)) == len(whole.samples)
    idle = BernoulliEngine(fail_after=0)
    assert runner(policy, idle).run(QUESTIONS, progress=False, journal=path) == whole


def test_a_torn_last_line_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    whole = runner(FixedBudget(3)).run(QUESTIONS, progress=False, journal=path)
    content = path.read_bytes()
    path.write_bytes(content[:-25])
    engine = BernoulliEngine()
    assert runner(FixedBudget(3), engine).run(QUESTIONS, progress=False, journal=path) == whole
    assert len(engine.calls) == 1
    assert path.read_bytes() == content


def test_another_policy_may_go_on_with_a_journal(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    runner(FixedBudget(2)).run(QUESTIONS, progress=False, journal=path)
    engine = BernoulliEngine()
    assert runner(FixedBudget(5), engine, aggregate="mean").run(QUESTIONS, progress=False, journal=path) == run(
        FixedBudget(5), aggregate="mean"
    )
    assert len(engine.calls) == 3 * 60


def test_foreign_and_damaged_journals(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    runner(FixedBudget(1)).run(QUESTIONS, progress=False, journal=path)
    with pytest.raises(ValueError, match="must be of questions"):
        runner(FixedBudget(1)).run(QUESTIONS[1:], progress=False, journal=path)
    other = BernoulliEngine()
    other.policy_id = "other"
    with pytest.raises(ValueError, match="must be of policy_id = 'other', got 'bernoulli'"):
        runner(FixedBudget(1), other).run(QUESTIONS, progress=False, journal=path)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], "{", *lines[2:]]) + "\n")
    with pytest.raises(ValueError, match="damaged in line 2"):
        runner(FixedBudget(1)).run(QUESTIONS, progress=False, journal=path)
    path.write_text("# notes\n")
    with pytest.raises(ValueError, match="is not a prmfast journal"):
        runner(FixedBudget(1)).run(QUESTIONS, progress=False, journal=path)
    assert path.read_text() == "# notes\n"


# --- scores and errors


def test_aggregate_score() -> None:
    steps = [0.5, 0.25, 0.8]
    expected = {"last": 0.8, "min": 0.25, "product": 0.1, "mean": 1.55 / 3}
    assert {name: aggregate_score(steps, name) for name in expected} == pytest.approx(expected)
    assert aggregate_score([], "min") == 0.0
    with pytest.raises(ValueError, match="aggregate must be one of last, min, product, mean, got 'max'"):
        aggregate_score(steps, "max")


class FloatPolicy(BudgetPolicy):
    def budget(self, state: BudgetState) -> torch.Tensor:
        return torch.ones(len(state))


class ShortEngine(BernoulliEngine):
    def sample(self, prompts: Any, seeds: Any, *, prefixes: Any = None) -> Any:
        return super().sample(prompts, seeds)[1:]


class NanPRM(NoisyPRM):
    def score(self, questions: Any, answers: Any) -> Any:
        return [[[float("nan")] for _ in group] for group in answers]


GOOD = runner(FixedBudget(2))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: replace(GOOD, engine=object()), TypeError, "engine must have policy_id and sample"),
        (lambda: replace(GOOD, scorer=object()), TypeError, "scorer must have prm_id"),
        (lambda: replace(GOOD, policy=3), TypeError, "policy must be a BudgetPolicy, got int"),
        (lambda: replace(GOOD, levels=0), ValueError, "levels must be >= 1, got 0"),
        (lambda: replace(GOOD, batch_size=0), ValueError, "batch_size must be >= 1, got 0"),
        (lambda: replace(GOOD, seed=-1), ValueError, "seed must be >= 0, got -1"),
        (lambda: replace(GOOD, n_max=0), ValueError, "n_max must be >= 1, got 0"),
        (lambda: replace(GOOD, aggregate="max"), ValueError, "aggregate must be one of"),
        (lambda: GOOD.run([]), ValueError, "questions must have at least one entry, got 0"),
        (lambda: GOOD.run("why?"), TypeError, "questions must be a sequence of strings"),
        (
            lambda: replace(GOOD, policy=FloatPolicy()).run(QUESTIONS, progress=False),
            ValueError,
            "must return integers",
        ),
        (
            lambda: replace(GOOD, engine=ShortEngine()).run(QUESTIONS, progress=False),
            RuntimeError,
            "one completion per prompt",
        ),
        (
            lambda: replace(GOOD, scorer=NanPRM()).run(QUESTIONS, progress=False),
            ValueError,
            "scorer must not return NaN",
        ),
    ],
)
def test_errors(make: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()
