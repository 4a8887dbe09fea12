from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from prmfast.engines import Judge, Scorer
from prmfast.tiny import TinyPRM, TinyWorld, task


@pytest.fixture(scope="module")
def samples(world: TinyWorld) -> tuple[list[str], list[list[str]]]:
    questions = world.questions(20, seed=3)
    drawn = world.engine.sample([q for q in questions for _ in range(3)], list(range(60)))
    return questions, [[c.text for c in drawn[3 * i : 3 * i + 3]] for i in range(20)]


def test_it_is_a_scorer_with_ids_that_name_the_weights(world: TinyWorld) -> None:
    assert isinstance(world.prm, Scorer)
    assert world.prm.prm_id.startswith("prmfast/tiny-prm@")


def test_as_a_judge_it_scores_one_answer_a_question(
    world: TinyWorld, samples: tuple[list[str], list[list[str]]]
) -> None:
    questions, answers = samples[0], [row[0] if i % 3 else None for i, row in enumerate(samples[1])]
    judged = world.prm.judge(questions, answers)
    assert isinstance(world.prm, Judge)
    assert all(row.quantiles is None for row in judged)
    empty = world.prm.question_state(questions)[0].tolist()
    whole = world.prm.score(questions, samples[1])
    for i, row in enumerate(judged):
        assert row.scores == pytest.approx(whole[i][0] if i % 3 else [empty[i]], abs=1e-5)
    with pytest.raises(ValueError, match=r"answers must have one entry per question \(20\), got 19"):
        world.prm.judge(questions, answers[1:])
    with pytest.raises(TypeError, match=r"must be a sequence of strings( or None)?, got one string"):
        world.prm.judge(questions, "1 ;")


def test_one_score_and_one_state_per_step(world: TinyWorld, samples: tuple[list[str], list[list[str]]]) -> None:
    scores, states = world.prm.score(*samples), world.prm.features(*samples)
    for row, score_row, state_row in zip(samples[1], scores, states, strict=True):
        for text, score, state in zip(row, score_row, state_row, strict=True):
            assert len(score) == len(task.split_steps(text))
            assert all(0 <= value <= 1 for value in score)
            assert state.shape == (len(score), 32)


def test_state_is_the_input_of_the_last_layer(world: TinyWorld, samples: tuple[list[str], list[list[str]]]) -> None:
    score, state = world.prm.question_state(samples[0])
    torch.testing.assert_close(world.prm.net.logit(state)[:, 0].sigmoid(), score)
    scores, states = world.prm.score(*samples), world.prm.features(*samples)
    torch.testing.assert_close(world.prm.net.logit(states[4][1])[:, 0].sigmoid(), torch.tensor(scores[4][1]))


def test_a_step_is_judged_without_looking_ahead(world: TinyWorld, samples: tuple[list[str], list[list[str]]]) -> None:
    questions, answers = samples
    whole = world.prm.score(questions, answers)
    for question, row, scores in zip(questions[:6], answers, whole, strict=False):
        for text, score in zip(row, scores, strict=True):
            steps = task.split_steps(text)
            prefixes = [" ".join(steps[: i + 1]) for i in range(len(steps))]
            alone = [parts[-1] for parts in world.prm.score([question], [prefixes])[0]]
            assert score == pytest.approx(alone, abs=1e-5)


def test_empty_answers(world: TinyWorld) -> None:
    question = world.questions(1)[0]
    assert world.prm.score([], []) == []
    assert world.prm.score([question], [[]]) == [[]]
    assert world.prm.score([question], [[""]]) == [[[]]]
    assert world.prm.features([question], [[""]])[0][0].shape == (0, 32)
    score, state = world.prm.question_state([])
    assert (score.shape, state.shape) == ((0,), (0, 32))


def test_the_question_matters_before_any_step(world: TinyWorld) -> None:
    score, state = world.prm.question_state(world.questions(50, seed=1))
    assert score.shape == (50,)
    assert state.shape == (50, 32)
    assert score.std() > 0.02


def test_bad_input_is_named(world: TinyWorld) -> None:
    question = world.questions(1)[0]
    with pytest.raises(ValueError, match=r"answers must have one entry per question \(1\), got 2"):
        world.prm.score([question], [["1 ;"], ["2 ;"]])
    with pytest.raises(TypeError, match=r"answers\[0\] must be a sequence of strings, got one string"):
        world.prm.score([question], ["1 ;"])
    with pytest.raises(TypeError, match="questions must be a sequence of strings"):
        world.prm.question_state(question)
    with pytest.raises(ValueError, match="question must read"):
        world.prm.question_state(["1 + 1"])
    with pytest.raises(ValueError, match="got 'x'"):
        world.prm.score([question], [["x ;"]])
    with pytest.raises(ValueError, match="at most 19 tokens, got 20"):
        world.prm.score([question], [["1 ; " * 10]])


def test_save_and_load(world: TinyWorld, tmp_path: Path) -> None:
    world.prm.save_pretrained(tmp_path, note="a test")
    again = TinyPRM.from_pretrained(tmp_path, world.policy)
    questions = world.questions(5)
    assert again.prm_id == world.prm.prm_id
    assert torch.equal(again.question_state(questions)[1], world.prm.question_state(questions)[1])
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "other"}))
    with pytest.raises(ValueError, match="model_type must be 'prmfast-tiny-prm', got 'other'"):
        TinyPRM.from_pretrained(tmp_path, world.policy)
