from __future__ import annotations

from pathlib import Path

import pytest
import torch

from prmfast.engines import Engine
from prmfast.tiny import TinyEngine, TinyWorld, task
from prmfast.tiny.train import MISCALIBRATION


def test_shipped_weights_are_small_and_described(world: TinyWorld) -> None:
    folder = TinyWorld.policy_directory().parent
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 2_000_000
    assert not [path for path in folder.rglob("*") if path.suffix in {".bin", ".pt", ".pkl"}]
    info = world.info
    assert info.miscalibration == MISCALIBRATION
    assert 0.5 < info.mean_success < 0.7
    assert info.graded_share >= 0.8
    assert list(info.success_deciles) == sorted(info.success_deciles)
    assert info.prm_empty["rank_correlation"] > 0.6
    assert info.prm_prefix["rank_correlation"] > 0.6


def test_the_stated_success_probabilities_and_bias_hold(world: TinyWorld) -> None:
    questions = world.questions(300, seed=77)
    success = world.true_success(questions, rollouts=24, seed=5) / 24
    assert success.mean().item() == pytest.approx(world.info.mean_success, abs=0.06)
    bias = (world.prm.question_state(questions)[0] - success).mean().item()
    assert bias == pytest.approx(world.info.prm_empty["bias"], abs=0.06)
    assert bias > 0.1  # really miscalibrated


def test_questions_are_stable_distinct_and_split(world: TinyWorld) -> None:
    assert world.questions(50, seed=4) == world.questions(50, seed=4)
    assert world.questions(50, seed=4) != world.questions(50, seed=5)
    drawn = {split: set(world.questions(400, seed=4, split=split)) for split in task.SPLITS}
    assert all(len(found) == 400 for found in drawn.values())
    assert not drawn["train"] & drawn["calibration"]
    assert not drawn["calibration"] & drawn["test"]
    assert not drawn["train"] & drawn["test"]
    assert task.question_id("5 + 9 ?") == "b365c7e1efe0688c"


def test_question_requests_that_cannot_be_met(world: TinyWorld) -> None:
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
        world.questions(0)
    with pytest.raises(ValueError, match="n must be at most about"):
        world.questions(1000, k_range=(1, 1))
    with pytest.raises(ValueError, match="split must be one of train, calibration, test, got 'dev'"):
        world.questions(3, split="dev")


def test_engine_answers_by_prompt_prefix_and_seed(world: TinyWorld) -> None:
    assert isinstance(world.engine, Engine)
    questions = world.questions(6, seed=9)
    together = world.engine.sample(questions * 2, [1] * 6 + [2] * 6)
    alone = [world.engine.sample([q], [s])[0] for s in (1, 2) for q in questions]
    assert together == alone
    assert len({c.text for c in world.engine.sample([questions[0]] * 50, list(range(50)))}) > 1
    for completion in together:
        assert completion.finished
        assert completion.n_tokens == len(completion.token_ids)
        assert task.decode(completion.token_ids) == completion.text
        assert task.final_answer(completion.text) is not None


def test_engine_continues_prefixes(world: TinyWorld) -> None:
    question = world.questions(1, seed=2, k_range=(4, 4))[0]
    full = world.engine.sample([question], [3])[0]
    steps = task.split_steps(full.text)
    prefixes = ["", *(" ".join(steps[: i + 1]) for i in range(len(steps)))]
    again = world.engine.sample([question] * len(prefixes), [3] * len(prefixes), prefixes=prefixes)
    assert [c.text for c in again] == [full.text] * len(prefixes)
    assert [c.token_ids for c in again] == [full.token_ids] * len(prefixes)
    assert [c.n_tokens for c in again] == [full.n_tokens - len(prefix.split()) for prefix in prefixes]
    other = world.engine.sample([question], [4], prefixes=["7 ; 7 ;"])[0]
    assert other.text.startswith("7 ; 7 ;")


def test_engine_stops_at_a_step(world: TinyWorld) -> None:
    """Chained one-step samples with one seed give the whole answer back, and each says what ended it."""
    engine = TinyEngine(world.engine.decoder, world.engine.policy_id, stop=(";",))
    questions = world.questions(6, seed=9, k_range=(2, 5))
    whole = world.engine.sample(questions, list(range(6)))
    for seed, (question, full) in enumerate(zip(questions, whole, strict=True)):
        steps = task.split_steps(full.text)
        text = ""
        for i in range(len(steps)):
            cut = engine.sample([question], [seed], prefixes=[text])[0]
            assert cut.text == " ".join(steps[: i + 1])
            assert (cut.finished, cut.stop) == (True, ";" if i + 1 < len(steps) else None)
            assert cut.n_tokens == (2 if i + 1 < len(steps) else 3)
            text = cut.text
        assert cut.token_ids == full.token_ids
    assert all(completion.stop is None for completion in whole)


@pytest.mark.parametrize(
    ("stop", "error", "message"),
    [
        (";", TypeError, "stop must be a sequence of words, got one string ';'"),
        (("; ;",), ValueError, "stop must hold words of the tiny vocabulary, got '; ;'"),
        (("<eos>",), ValueError, "stop must hold words of the tiny vocabulary, got '<eos>'"),
    ],
)
def test_engine_refuses_odd_stop_words(world: TinyWorld, stop: tuple[str, ...], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        TinyEngine(world.engine.decoder, "p", stop=stop)


def test_engine_length_limit_is_reported(world: TinyWorld) -> None:
    question = world.questions(1)[0]
    full = world.engine.sample([question], [0], prefixes=["1 ; " * 9 + "1"])[0]
    assert (full.finished, full.n_tokens, len(full.token_ids)) == (False, 0, 19)


@pytest.mark.parametrize(
    ("arguments", "prefixes", "error", "message"),
    [
        ((["a"], [1, 2]), None, ValueError, r"seeds must have one entry per prompt \(1\), got 2"),
        ((["a"], [1]), ["", ""], ValueError, r"prefixes must have one entry per prompt \(1\), got 2"),
        (("a", [1]), None, TypeError, "prompts must be a sequence of strings"),
        ((["a"], [1]), "x", TypeError, "prefixes must be a sequence of strings"),
        ((["a"], [1.0]), None, TypeError, r"seeds\[0\] must be an int, got float"),
        ((["a"], [-1]), None, ValueError, r"seeds\[0\] must lie in \[0, 2\*\*63\), got -1"),
        ((["a"], [1]), None, ValueError, "question must read"),
    ],
)
def test_engine_errors(
    world: TinyWorld, arguments: tuple[list[str], list[int]], prefixes: list[str], error: type, message: str
) -> None:
    with pytest.raises(error, match=message):
        world.engine.sample(*arguments, prefixes=prefixes)


def test_engine_refuses_odd_prefixes_and_temperatures(world: TinyWorld) -> None:
    question = world.questions(1)
    assert world.engine.sample([], []) == []
    with pytest.raises(ValueError, match="special tokens"):
        world.engine.sample(question, [1], prefixes=["1 ; <eos>"])
    with pytest.raises(ValueError, match="at most 19 tokens, got 22"):
        world.engine.sample(question, [1], prefixes=["1 ; " * 11])
    with pytest.raises(ValueError, match="temperature must be positive, got 0"):
        TinyEngine(world.engine.decoder, "p", temperature=0)


def test_truth_is_reproducible_and_agrees_with_the_engine(world: TinyWorld) -> None:
    questions = world.questions(20, seed=8)
    truth = world.true_success(questions, rollouts=64, seed=1)
    assert torch.equal(truth, world.true_success(questions, rollouts=64, seed=1))
    assert torch.equal(truth[5:9], world.true_success(questions[5:9], rollouts=64, seed=1))
    assert not torch.equal(truth, world.true_success(questions, rollouts=64, seed=2))
    drawn = world.engine.sample([q for q in questions for _ in range(64)], list(range(64)) * 20)
    live = torch.tensor([world.verify(c.prompt, c.text) for c in drawn]).view(20, 64).sum(1)
    assert ((truth - live) / 64).abs().mean() < 0.1
    assert ((truth - live) / 64).mean().abs() < 0.05
    assert not torch.equal(truth, live)


def test_truth_of_prefixes(world: TinyWorld) -> None:
    question = world.questions(1, seed=3, k_range=(3, 3))[0]
    answer = task.answer_of(question)
    ended = [f"1 ; 2 ; 3 ; # {answer}", f"1 ; 2 ; 3 ; # {(answer + 1) % 13}", "1 ; # 2 ;"]
    assert world.true_success([question] * 3, ended, rollouts=16).tolist() == [16, 0, 0]
    with pytest.raises(ValueError, match=r"prefixes must have one entry per question \(1\), got 2"):
        world.true_success([question], ["", ""])
    with pytest.raises(ValueError, match="rollouts must be at least 1, got 0"):
        world.true_success([question], rollouts=0)


def test_traces(world: TinyWorld) -> None:
    pytest.importorskip("pyarrow")
    from prmfast.traces import validate

    table = world.make_traces(30, 3, 4, seed=6, progress=False)
    assert table.equals(world.make_traces(30, 3, 4, seed=6, progress=False))
    assert table.equals(validate(table))
    assert table.num_rows == 90
    rows = table.to_pylist()
    assert {row["question"] for row in rows} == set(world.questions(30, seed=6, split="calibration"))
    for row in rows:
        n = len(row["steps"])
        assert row["question_id"] == task.question_id(row["question"])
        assert row["policy_id"] == world.engine.policy_id
        assert row["correct"] == world.verify(row["question"], row["completion"])
        assert [len(row[name]) for name in ("prm_step_scores", "hidden_states", "step_successes")] == [n] * 3
        assert row["step_trials"] == [4] * n
        assert row["question_trials"] == 4
        assert row["step_successes"][-1] == 4 * row["correct"]
        assert len(row["question_hidden"]) == 32
    scores = world.prm.score([rows[4]["question"]], [[rows[4]["completion"]]])[0][0]
    assert rows[4]["prm_step_scores"] == pytest.approx(scores, abs=1e-5)
    # Rollouts of equal prefixes in two samples are draws of their own.
    first = {}
    for row in rows:
        first.setdefault((row["question"], row["steps"][0]), []).append(row["step_successes"][0])
    assert any(len(set(counts)) > 1 for counts in first.values())


def test_traces_without_rollouts_and_bad_sizes(world: TinyWorld) -> None:
    pytest.importorskip("pyarrow")
    table = world.make_traces(3, 1, 0, progress=False, split="test", k_range=(2, 2))
    assert "step_successes" not in table.column_names
    for arguments in ((0, 1, 1), (1, 0, 1), (1, 1, -1)):
        with pytest.raises(ValueError, match="must be at least"):
            world.make_traces(*arguments, progress=False)


def test_a_missing_file_is_reported(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="world"):
        TinyWorld.load(tmp_path)
