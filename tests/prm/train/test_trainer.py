from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="training needs the extra prmfast[train]: no transformers")
pytest.importorskip("accelerate", reason="training needs the extra prmfast[train]: no accelerate")

from prmfast.prm import AutoPRM
from prmfast.prm.data import OutcomeExample, PairExample, PrefixExample, StepExample
from prmfast.prm.data.conversation import Message
from prmfast.prm.train import (
    LengthBuckets,
    RowLimits,
    StepCollator,
    StepModel,
    StepObjective,
    StepRows,
    last_checkpoint,
)
from prmfast.prm.value_head import ValueHeadPRM
from tests.prm.train.toy import At, backbone, chains, config, losses, trainer

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def start(what: str, folder: Path, **environment: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.prm.train.processes", what, str(folder)],
        cwd=ROOT,
        env=os.environ | environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def same(a: Any, b: Any) -> None:
    mine, other = a.state_dict(), b.state_dict()
    assert mine.keys() == other.keys()
    assert [name for name in mine if not torch.equal(mine[name], other[name])] == []


def last_decides(examples: list[StepExample]) -> list[StepExample]:
    """The same chains with right steps but for the last: what an outcome model can learn from its rows."""
    return [
        StepExample(
            example.question,
            (*["aaaaaa"] * (len(example.steps) - 1), example.steps[-1]),
            (*[1.0] * (len(example.steps) - 1), example.labels[-1]),
        )
        for example in examples
    ]


@pytest.mark.parametrize(
    ("loss", "variant"),
    [("pqm", "pqm"), ("pqm", "theorem"), ("pqm", "first_wrong"), ("bce", "pqm"), ("mse", "pqm"), ("orm", "pqm")],
)
def test_it_learns_the_letter(tmp_path: Path, loss: str, variant: str) -> None:
    data, unseen = chains(), chains(32, seed=1)
    if loss == "orm":
        data, unseen = last_decides(data), last_decides(unseen)
    run = trainer(
        tmp_path,
        data=data,
        loss=loss,
        variant=variant,
        per_device_train_batch_size=8,
        num_train_epochs=6,
        learning_rate=3e-3,
    )
    before = run.evaluate(run.train_dataset)["eval_loss"]
    run.train()
    assert run.evaluate(run.train_dataset)["eval_loss"] < 0.3 * before
    run.save_model()
    prm = AutoPRM.from_pretrained(tmp_path, adapter=run.adapter)
    good, bad = [], []
    for example in unseen:
        text = "\n".join(f"Step {i}: {step}" for i, step in enumerate(example.steps, start=1))
        (scores,) = prm.score([example.question], [[text]])[0]
        judged = list(zip(scores, example.labels, strict=True))
        for score, label in judged[-1:] if loss == "orm" else judged:
            (good if label else bad).append(score)
    assert len(good) > 10
    assert len(bad) > 10
    assert sum(g > b for g in good for b in bad) > 0.95 * len(good) * len(bad)


def test_the_saved_checkpoint_scores_as_the_model_that_was_trained(tmp_path: Path) -> None:
    run = trainer(tmp_path, max_steps=2, adapter=ValueHeadPRM())
    run.train()
    run.save_model()
    prm = AutoPRM.from_pretrained(tmp_path)
    assert isinstance(prm.adapter, ValueHeadPRM)
    rows = StepRows(chains(3), run.adapter, run.processing_class)
    with torch.no_grad():
        batch = StepCollator()([rows[i] for i in range(3)])
        logits = run.model.eval()(*(batch[name] for name in ("input_ids", "attention_mask", "step_positions")))
    for i, example in enumerate(chains(3)):
        text = "\n".join(f"Step {j}: {step}" for j, step in enumerate(example.steps, start=1))
        found = prm.score([example.question], [[text]])[0][0]
        torch.testing.assert_close(torch.tensor(found), logits[i, : len(found), 0].sigmoid())


def test_the_head_sees_step_rows_alone_in_float32() -> None:
    model, tokenizer = backbone()
    made = StepModel(model.bfloat16(), ValueHeadPRM().head(model.config))
    rows = StepRows(chains(4), ValueHeadPRM(), tokenizer)
    batch = StepCollator()([rows[i] for i in range(4)])
    seen = []
    made.head.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0].shape, output.dtype)))
    labels = batch.pop("labels")
    with torch.autocast("cpu", torch.bfloat16):
        logits = made(**batch)
    steps = int((labels != -100).sum())
    assert seen == [((steps, 64), torch.float32)]
    assert logits.shape == (*labels.shape, 1)
    assert bool((logits[labels == -100] == 0).all())


def test_accumulation_is_one_large_batch(tmp_path: Path) -> None:
    for loss in ("pqm", "bce"):
        one = trainer(tmp_path, data=chains(18), per_device_train_batch_size=8, loss=loss, num_train_epochs=1)
        one.train()
        four = trainer(
            tmp_path,
            data=chains(18),
            per_device_train_batch_size=2,
            gradient_accumulation_steps=4,
            loss=loss,
            num_train_epochs=1,
        )
        four.train()
        assert len(losses(one)) == 3
        torch.testing.assert_close(losses(four), losses(one), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path: Path) -> None:
    pytest.importorskip("torch.distributed")
    if not torch.distributed.is_gloo_available():
        pytest.skip("torch was built without gloo")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [
        start("rank", tmp_path, TOY_LOSS="bce", RANK=str(i), LOCAL_RANK=str(i), OMP_NUM_THREADS="1", **common)
        for i in range(2)
    ]
    one = trainer(tmp_path / "one", data=chains(42), per_device_train_batch_size=8, num_train_epochs=1, loss="bce")
    one.train()
    for process in ranks:
        _, error = process.communicate(timeout=300)
        assert process.returncode == 0, error.decode()[-2000:]
    two = json.loads((tmp_path / "losses.json").read_text())
    assert len(two) == 6  # 42 rows in updates of 8
    torch.testing.assert_close(two, losses(one), rtol=0, atol=1e-5)
    weights = torch.load(tmp_path / "weights.pt")
    assert max(float((weights[k] - v).abs().max()) for k, v in one.model.state_dict().items()) < 1e-4


@pytest.mark.slow
def test_a_killed_run_goes_on_bit_for_bit_with_dropout(tmp_path: Path) -> None:
    process = start("killed", tmp_path / "killed", OMP_NUM_THREADS="1")
    whole = trainer(tmp_path / "whole", dropout=0.2, data=chains(24), save_strategy="steps", save_steps=2)
    whole.train()
    _, error = process.communicate(timeout=300)
    assert process.returncode == -signal.SIGKILL, error.decode()[-2000:]
    torn = tmp_path / "killed" / "checkpoint-6"  # what a kill in the middle of saving leaves
    torn.mkdir()
    (torn / "model.safetensors").write_bytes(b"torn")
    assert last_checkpoint(tmp_path / "killed") == tmp_path / "killed" / "checkpoint-4"
    rest = trainer(tmp_path / "killed", dropout=0.2, data=chains(24), save_strategy="steps", save_steps=2)
    rest.resume()
    assert rest.state.global_step == whole.state.global_step == 12
    assert losses(rest) == losses(whole)
    same(rest.model, whole.model)
    other = trainer(tmp_path / "other", dropout=0.0, data=chains(24))
    other.train()
    assert losses(other) != losses(whole)  # dropout was on


@pytest.mark.parametrize("stop", [4, 6, 8])  # within the first epoch, at its end, within the second
def test_a_stopped_run_goes_on_bit_for_bit(tmp_path: Path, stop: int) -> None:
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": stop, "data": chains(24)}
    whole = trainer(tmp_path / "whole", **options)
    whole.train()

    def halt(control: Any) -> None:
        control.should_training_stop = True

    trainer(tmp_path / "part", callbacks=[At(stop, halt)], **options).train()
    rest = trainer(tmp_path / "part", **options)
    rest.resume()
    assert losses(rest) == losses(whole)
    same(rest.model, whole.model)


def test_buckets_hold_every_row_once_and_depend_on_seed_and_epoch() -> None:
    lengths = [5 + 7 * i % 40 for i in range(301)]
    order = LengthBuckets(lengths, 8, seed=1)
    first = list(order)
    assert len(first) == len(order) == 304
    assert sorted(first) == [*range(301), 301, 301, 301]
    assert first == list(order)
    order.epoch = 1
    assert first != list(order)
    assert first != list(LengthBuckets(lengths, 8, seed=2))
    spread = [
        max(lengths[i] for i in group) - min(lengths[i] for i in group)
        for at in range(0, 304, 8)
        if 301 not in (group := first[at : at + 8])
    ]
    assert sum(spread) / len(spread) < 4  # of a range of 40


def test_rows_of_every_kind_of_example() -> None:
    _, tokenizer = backbone()
    adapter = ValueHeadPRM()
    said = (Message("user", "Q"), Message("assistant", "Step 1: a\nStep 2: b"))
    rows = StepRows(
        [
            StepExample("Q", ("a", "b"), (1.0, 0.0)),
            PrefixExample("Q", "Step 1: a\nStep 2: b", 0.25),
            PrefixExample("Q", "", 0.5),
            OutcomeExample(said, 1.0),
        ],
        adapter,
        tokenizer,
    )
    assert [row["labels"] for row in map(rows.__getitem__, range(4))] == [[1, 0], [-100, 0.25], [0.5], [-100, 1]]
    assert rows[0]["input_ids"] == rows[1]["input_ids"] == rows[3]["input_ids"]
    assert rows[0]["input_ids"] == list(adapter.encode(tokenizer, "Q", ["Step 1: a", "Step 2: b"]).token_ids)
    with pytest.raises(TypeError, match=r"examples\[0\].*PairExample"):
        StepRows([PairExample(said[:1], "a", "b")], adapter, tokenizer)


def test_long_chains_are_cut_behind_a_step_or_left_out() -> None:
    _, tokenizer = backbone()
    example = StepExample("Q", ("a", "b", "b"), (1.0, 0.0, 0.0))
    full = StepRows([example], ValueHeadPRM(), tokenizer)[0]
    limit = full["step_positions"][1] + 3
    (cut,) = (StepRows([example], ValueHeadPRM(), tokenizer, limits=RowLimits(limit))[0],)
    assert cut["labels"] == [1, 0]
    assert cut["input_ids"] == full["input_ids"][: full["step_positions"][1] + 1]
    whole = StepRows([example], ValueHeadPRM(), tokenizer, limits=RowLimits(limit), whole=True)
    assert (len(whole), whole.left_out) == (0, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "hinge"}, "loss must be 'pqm' or 'bce' or 'mse' or 'orm', got 'hinge'"),
        ({"variant": "eq11"}, "variant must be"),
        ({"variant": "theorem", "normalization": "released"}, "normalization must be 'paper'"),
        ({"max_length": 0}, "max_length must be at least 1, got 0"),
        ({"max_prompt_length": 0}, "max_prompt_length must be at least 1, got 0"),
        ({"dataset_num_proc": 0}, "processes must be at least 1 or None, got 0"),
        ({"max_length": 3}, "at most max_length=3 tokens"),
    ],
)
def test_bad_options_are_named(tmp_path: Path, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, **options)


def test_soft_labels_need_a_pointwise_loss(tmp_path: Path) -> None:
    soft = [StepExample("Q", ("a", "b"), (1.0, 0.25))]
    with pytest.raises(ValueError, match=r"labels must be 0 or 1 for loss='pqm', got 0.25 in row 0"):
        trainer(tmp_path, data=soft)
    trainer(tmp_path, data=soft, loss="mse", num_train_epochs=1).train()


def test_the_loss_of_an_update_is_made_of_units() -> None:
    labels = torch.tensor([[1.0, 0.0, -100], [1, -100, -100], [-100, -100, -100]])
    logits = torch.randn(3, 3, 1, generator=torch.Generator().manual_seed(0))
    for loss, units in (("pqm", 2), ("orm", 2), ("bce", 3), ("mse", 3)):
        objective = StepObjective(loss)
        assert int(objective.units(labels)) == units
        parts = [objective(logits[i : i + 1], labels[i : i + 1]) * objective.units(labels[i : i + 1]) for i in range(3)]
        torch.testing.assert_close(sum(parts) / units, objective(logits, labels))


def test_evaluation_gives_the_loss(tmp_path: Path) -> None:
    model, tokenizer = backbone()
    from prmfast.prm.train import PRMTrainer

    run = PRMTrainer(model, config(tmp_path), chains(8), chains(8), tokenizer)
    found = run.evaluate()["eval_loss"]
    batch = StepCollator()([run.eval_dataset[i] for i in range(8)])
    labels = batch.pop("labels")
    with torch.no_grad():
        expected = run.objective(run.model.eval()(**batch), labels)
    assert found == pytest.approx(float(expected), rel=1e-5)
