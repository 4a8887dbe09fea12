from __future__ import annotations

from pathlib import Path

import pytest
import torch

from prmfast.prm.losses import bce_loss
from prmfast.tiny import TinyWorld, TrainSettings, task, train_world
from prmfast.tiny.engine import start_ids
from prmfast.tiny.prm import _padded, step_ends, step_states
from prmfast.tiny.train import prm_examples, train_policy, train_prm, train_step_prm

SMALL = TrainSettings(
    policy_steps=4, policy_batch=32, prm_questions=80, prm_epochs=1, report_questions=6, report_rollouts=4
)


def test_a_few_steps_write_a_world_that_loads(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    world = train_world(tmp_path / "world", SMALL, progress=False)
    names = {path.relative_to(tmp_path / "world").as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert {"world.json", "policy/config.json", "policy/model.safetensors", "tokenizer/tokenizer.json"} <= names
    assert {"prm/config.json", "prm/model.safetensors"} <= names
    assert [path.name for path in tmp_path.iterdir()] == ["world"]
    assert world.info.settings["policy_steps"] == 4
    again = train_world(tmp_path / "again", SMALL, progress=False)
    assert again.engine.policy_id == world.engine.policy_id
    assert again.prm.prm_id == world.prm.prm_id


def test_nothing_is_left_behind_by_a_failed_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("prmfast.tiny.train.train_policy", fail)
    with pytest.raises(KeyboardInterrupt):
        train_world(tmp_path / "world", SMALL, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_policy_training_is_seeded() -> None:
    first, second = (train_policy(SMALL) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    other = train_policy(TrainSettings(seed=1, policy_steps=4, policy_batch=32))
    assert not torch.equal(first.embedding, other.embedding)


def test_prm_examples_are_any_of_four_labels_of_short_train_questions(world: TinyWorld) -> None:
    settings = TrainSettings(prm_questions=400)
    ids, rows, columns, labels = prm_examples(world.policy, settings)
    assert ids.shape == (400, 37)
    assert len(rows) == len(columns) == len(labels) == 800
    questions = ids[:, : task.QUESTION_LENGTH]
    assert task.number_of_steps(questions).max() == 5
    assert (task.split_index(questions) == task.SPLITS.index("train")).all()
    # Marked places are "?" and ends of steps.
    assert (columns[:400] == 0).all()
    marked = ids[torch.arange(400), task.QUESTION_LENGTH - 1 + columns[400:]]
    following = ids[torch.arange(400), task.QUESTION_LENGTH + columns[400:]]
    assert ((marked == task.STEP_ID) | (following == task.EOS_ID)).all()
    truth = world.true_success([task.decode(row) for row in questions.tolist()], rollouts=16) / 16
    any_of_four = (1 - (1 - truth) ** 4).mean()
    assert labels[:400].mean().item() == pytest.approx(any_of_four.item(), abs=0.06)
    assert labels[:400].mean() > truth.mean() + 0.1


def test_whole_answers_train_the_head_that_single_steps_train(world: TinyWorld) -> None:
    """Cross-entropy of one full batch is the same with an answer or a step in a row; padding never counts."""
    traces = world.make_traces(20, 1, 4, progress=False, split="train").to_pylist()
    ids = _padded([start_ids(row["question"], row["completion"]) for row in traces])
    states, ends = step_states(world.policy, ids), [step_ends(row["completion"]) for row in traces]
    columns = torch.zeros(len(ends), 12, dtype=torch.int64)
    labels = torch.full((len(ends), 12), -100.0)
    for i, row in enumerate(ends):
        columns[i, : len(row)] = torch.tensor(row)
        labels[i, : len(row)] = torch.tensor(traces[i]["step_successes"]).clamp(max=1).float()
    kept = labels != -100
    settings = TrainSettings(prm_epochs=12)
    whole = train_step_prm(states, columns, labels, bce_loss, settings=settings)
    rows = torch.arange(len(ends)).repeat_interleave(kept.sum(1))
    single = train_prm(states, rows, columns[kept], labels[kept], settings=settings)
    for (name, mine), theirs in zip(whole.state_dict().items(), single.state_dict().values(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
    untrained = train_step_prm(states, columns, labels, bce_loss, settings=TrainSettings(prm_epochs=0))
    assert (whole.logit.weight - untrained.logit.weight).abs().max() > 1e-3
    with pytest.raises(ValueError, match=r"columns and labels must both be \[20, H\], got \[20, 12\] and \[20, 3\]"):
        train_step_prm(states, columns, labels[:, :3], bce_loss, settings=settings)
