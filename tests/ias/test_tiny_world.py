"""The shipped tiny policy and PRM, live: a calibrated target is met, the raw score misses it, replay agrees."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from prmfast.calibration import BetaBinomialCalibrator, CalibrationData, Calibrator, CondOTCalibrator
from prmfast.calibration.features import FEATURE_NAMES, question_features
from prmfast.engines import TransformersEngine
from prmfast.ias import BestOfN, FixedBudget, PointBudget, ReplayPool, TargetBudget, replay
from prmfast.tiny import TinyWorld

TARGET, QUESTIONS = 0.8, 300
ERROR = (TARGET * (1 - TARGET) / QUESTIONS) ** 0.5


@pytest.fixture(scope="module")
def world() -> TinyWorld:
    return TinyWorld.load()


@pytest.fixture(scope="module", params=[BetaBinomialCalibrator, CondOTCalibrator])
def calibrator(world: TinyWorld, request: pytest.FixtureRequest) -> Calibrator:
    questions = world.questions(250, seed=1, split="calibration")
    score, hidden = world.prm.question_state(questions)
    data = CalibrationData.from_arrays(
        score=score,
        hidden=hidden,
        features=question_features(score.double().numpy()),
        feature_names=FEATURE_NAMES,
        successes=world.true_success(questions, rollouts=8),
        trials=torch.full((250,), 8),
    )
    fitted: Calibrator = request.param(context="mlp").fit(data, progress=False)
    return fitted


@pytest.mark.slow
def test_live_best_of_n(world: TinyWorld, calibrator: Calibrator, tmp_path: Path) -> None:
    questions, journal = world.questions(QUESTIONS, seed=2), tmp_path / "run.jsonl"

    def run(*method: object) -> BestOfN:
        return BestOfN(world.engine, world.prm, *method, world.verify, batch_size=512)  # type: ignore[arg-type]

    good = run(calibrator, TargetBudget(TARGET, 64)).run(questions, progress=False, journal=journal)
    raw = run(None, PointBudget(TARGET, 64)).run(questions, progress=False, journal=journal)
    assert good.success is not None
    assert good.accuracy is not None
    assert raw.success is not None
    assert good.success > TARGET - 3 * ERROR
    assert raw.success < TARGET - 3 * ERROR
    assert good.accuracy <= good.success

    fixed = run(None, FixedBudget(16)).run(questions, progress=False, journal=journal)
    pool = ReplayPool.from_table(fixed.to_table("samples"))
    assert pool.size.tolist() == [16] * QUESTIONS
    drawn = torch.tensor([answer.drawn for answer in good.answers])
    replayed = replay(pool, {"same budgets": drawn}, exact=True, targets=[TARGET]).rows[0]
    assert abs(replayed.success.value - good.success) < 3 * ERROR


def test_the_same_samples_from_transformers(world: TinyWorld) -> None:
    """Another engine on the same checkpoint, another loop, the same seeds: the same answers and the same pick."""
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(world.policy_directory())
    engine = TransformersEngine(model, world.tokenizer(), max_new_tokens=20, stop=())
    questions = world.questions(6, seed=3)
    own, other = (
        BestOfN(drawn_from, world.prm, None, FixedBudget(3), world.verify).run(questions, progress=False)
        for drawn_from in (world.engine, engine)
    )
    assert [a.completion for a in own.answers] == [a.completion for a in other.answers]
    assert [a.correct for a in own.answers] == [a.correct for a in other.answers]
