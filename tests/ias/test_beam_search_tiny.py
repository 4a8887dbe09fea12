"""Beam search on the shipped tiny world: real policy, PRM and calibrator, and the same search through transformers."""

from __future__ import annotations

import pytest

from prmfast.calibration import BetaBinomialCalibrator, CalibrationData
from prmfast.engines import TransformersEngine
from prmfast.ias import BeamSearch, BeamSearchResult, BeamSettings, BestOfN, FixedBudget, ScorerJudge
from prmfast.tiny import TinyEngine, TinyWorld, task

SHAPE = BeamSettings(n_generations=8, beam_width=4, max_steps=10)
HARD = (6, 8)  # operations


@pytest.fixture(scope="module")
def world() -> TinyWorld:
    return TinyWorld.load()


@pytest.fixture(scope="module")
def engine(world: TinyWorld) -> TinyEngine:
    return TinyEngine(world.engine.decoder, world.engine.policy_id, stop=(";",))


@pytest.fixture(scope="module")
def found(world: TinyWorld, engine: TinyEngine) -> BeamSearchResult:
    return BeamSearch(engine, world.prm, SHAPE, world.verify).run(world.questions(40, 5, HARD), progress=False)


def test_more_right_answers_than_best_of_n_with_more_tokens(world: TinyWorld, found: BeamSearchResult) -> None:
    """On questions of many steps the search is ahead by several standard errors (.06) of the accuracy."""
    rival = BestOfN(world.engine, world.prm, None, FixedBudget(8), world.verify, batch_size=512)
    sampled = rival.run([answer.question for answer in found.answers], progress=False)
    alone = sum(bool(v) for s, v in zip(sampled.samples, sampled.verdicts, strict=True) if s.seed == 0) / 40
    assert found.n_tokens <= sampled.n_tokens
    assert found.accuracy is not None
    assert found.accuracy > alone + 0.2
    assert found.accuracy >= (sampled.accuracy or 0)
    assert all(answer.finished and answer.end == "all beams ended" for answer in found.answers)


def test_every_chain_is_what_the_policy_draws(world: TinyWorld, engine: TinyEngine, found: BeamSearchResult) -> None:
    """Each candidate again, alone, from its parent's text and its own seed; and its score, from the whole answer."""
    texts = {(c.question, c.number): c.text for c in found.candidates}
    for c in found.candidates[::17]:
        question = found.answers[c.question].question
        again = engine.sample([question], [c.seed], prefixes=[texts.get((c.question, c.parent), "")])[0]
        assert (again.text, again.n_tokens) == (c.text, c.n_tokens)
        assert task.split_steps(c.text)[:-1] == task.split_steps(texts.get((c.question, c.parent), ""))
        assert (c.end is None) is (again.stop == ";")
        if c.score is not None:
            assert c.score == pytest.approx(world.prm.score([question], [[c.text]])[0][0][-1], abs=1e-5)


def test_the_same_search_through_transformers(world: TinyWorld, found: BeamSearchResult) -> None:
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(world.policy_directory())
    other = TransformersEngine(model, world.tokenizer(), max_new_tokens=4, stop=(";",))
    questions = [answer.question for answer in found.answers[:4]]
    again = BeamSearch(other, world.prm, SHAPE, world.verify).run(questions, progress=False)
    own = [c for c in found.candidates if c.question < 4]
    assert [(c.text, c.seed, c.parent, c.fate, c.until) for c in again.candidates] == [
        (c.text, c.seed, c.parent, c.fate, c.until) for c in own
    ]
    assert [a.completion for a in again.answers] == [a.completion for a in found.answers[:4]]


def test_with_a_calibrator_budgets_follow_its_lower_bound(world: TinyWorld, engine: TinyEngine) -> None:
    data = CalibrationData.from_traces(world.make_traces(60, 2, 4, progress=False, k_range=HARD))
    judge = ScorerJudge(world.prm, BetaBinomialCalibrator(context="mlp").fit(data, progress=False), levels=20)
    questions = world.questions(20, 6, HARD)
    for ias in ("K", "M"):
        shapes = [BeamSettings(16, 4, max_steps=10, ias=ias, lb_idx=at, target=0.9) for at in (1, 10)]  # type: ignore[arg-type]
        low, middle = (BeamSearch(engine, judge, shape).run(questions, progress=False) for shape in shapes)
        fixed = BeamSearch(engine, judge, BeamSettings(16, 4, max_steps=10)).run(questions, progress=False)
        assert middle.n_tokens < low.n_tokens <= fixed.n_tokens
        for c in low.candidates:
            assert c.lower is None or (c.median is not None and c.lower <= c.median)
    ranked = [c for c in fixed.candidates if c.median is not None]
    assert all(c.score != c.median for c in ranked)
