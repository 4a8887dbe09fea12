"""What a training script for TRL's PRMTrainer brings: its rows, its config's fields, its token classifier."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="training needs the extra prmfast[train]: no transformers")
pytest.importorskip("accelerate", reason="training needs the extra prmfast[train]: no accelerate")

from transformers import LlamaConfig, LlamaForTokenClassification

from prmfast.prm import AutoPRM, StepSeparatorPRM
from prmfast.prm.data import StepExample
from prmfast.prm.train import PRMConfig, PRMTrainer, RowLimits, StepRows
from prmfast.prm.value_head import ValueHeadPRM
from tests.prm.models import SIZES, byte_level
from tests.prm.train.toy import chains

ROWS = [
    {"prompt": e.question, "completions": list(e.steps), "labels": [label == 1 for label in e.labels]}
    for e in chains(40)
]
FIELDS = {
    "learning_rate": 1e-5,
    "logging_steps": 10,
    "max_length": 1024,
    "max_prompt_length": 512,
    "max_completion_length": None,
    "disable_dropout": True,
    "step_separator": "\n",
    "train_on_last_step_only": False,
    "dataset_num_proc": None,
    "average_tokens_across_devices": True,
}


def tokenizer(begin: bool = False) -> Any:
    made = byte_level(("<|endoftext|>", "<s>"))
    if begin:
        made.bos_token = "<s>"
    return made


def classifier(made: Any) -> Any:
    torch.manual_seed(0)
    sizes = SIZES | {"initializer_range": 0.05}
    return LlamaForTokenClassification(LlamaConfig(vocab_size=len(made), num_labels=2, **sizes))


def row(limits: RowLimits, begin: bool = False, **options: Any) -> tuple[list[int], list[int], list[float]]:
    """Ids, positions and labels of a prompt of five bytes and two steps of three and two, with a separator of two."""
    example = StepExample("abcde", ("fgh", "ij"), (1.0, 0.0))
    rows = StepRows([example], StepSeparatorPRM("\n\n"), tokenizer(begin), limits=limits, **options)
    if not len(rows):
        return [], [], []
    return rows[0]["input_ids"], rows[0]["step_positions"], rows[0]["labels"]


def test_fields_and_defaults(tmp_path: Path) -> None:
    config = PRMConfig(output_dir=str(tmp_path), report_to=[])
    assert {name: getattr(config, name) for name in FIELDS} == FIELDS
    assert PRMConfig(output_dir=str(tmp_path), report_to=[], **(FIELDS | {"step_separator": ";"})).step_separator == ";"


def test_rows_and_their_limits() -> None:
    whole = tokenizer()("abcdefgh\n\nij\n\n")["input_ids"]
    begin = tokenizer().convert_tokens_to_ids("<s>")
    assert row(RowLimits()) == (whole, [9, 13], [1, 0])
    assert row(RowLimits(), begin=True) == ([begin, *whole], [10, 14], [1, 0])
    assert row(RowLimits(prompt=3)) == (whole[2:], [7, 11], [1, 0])  # from the left
    assert row(RowLimits(prompt=3), begin=True) == (whole[2:], [7, 11], [1, 0])  # the begin token goes first
    assert row(RowLimits(completion=8)) == (whole[:10], [9], [1])  # from the right
    assert row(RowLimits(completion=9)) == (whole, [9, 13], [1, 0])
    assert row(RowLimits(total=13)) == (whole[:10], [9], [1])
    assert row(RowLimits(total=9)) == ([], [], [])  # no label is left
    assert row(RowLimits(total=8, prompt=3)) == (whole[2:10], [7], [1])
    assert row(RowLimits(total=11, prompt=3, completion=5)) == (whole[2:10], [7], [1])
    assert row(RowLimits(), last_step_only=True) == (whole, [9, 13], [-100, 0])


def test_other_templates_lose_the_beginning_of_their_prompt() -> None:
    made = byte_level(("<|endoftext|>", "[PRM]"))
    adapter, example = ValueHeadPRM(prompt="train"), StepExample("abcde", ("f",), (1.0,))
    whole = StepRows([example], adapter, made)[0]["input_ids"]
    cut = StepRows([example], adapter, made, limits=RowLimits(prompt=4))[0]
    assert made.decode(cut["input_ids"]) == "ST]\nStep 1: f [PRM]"
    assert cut["input_ids"] == whole[-len(cut["input_ids"]) :]
    assert cut["step_positions"] == [len(cut["input_ids"]) - 1]


def test_processes_give_the_same_rows() -> None:
    one = StepRows(chains(9), StepSeparatorPRM(), tokenizer(), limits=RowLimits(prompt=4))
    two = StepRows(chains(9), StepSeparatorPRM(), tokenizer(), limits=RowLimits(prompt=4), processes=2)
    assert [one[i] for i in range(9)] == [two[i] for i in range(9)]


def test_a_script_for_trl_trains_here(tmp_path: Path) -> None:
    """A token classifier, rows of prompt, completions and labels, and a dict of TRL's fields."""
    made = tokenizer(begin=True)
    model = classifier(made)
    args = PRMConfig(
        output_dir=str(tmp_path),
        loss="bce",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        save_strategy="no",
        num_train_epochs=8,
        per_device_train_batch_size=8,
        **(FIELDS | {"learning_rate": 3e-3, "max_length": 200, "step_separator": "\n\n", "logging_steps": 1}),
    )
    run = PRMTrainer(model=model, args=args, train_dataset=ROWS, eval_dataset=ROWS[:8], processing_class=made)
    two = [run.train_dataset[i] for i in range(2)]
    with torch.no_grad():
        batch = run.data_collator(two)
        logits = model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        mine = run.model.eval()(*(batch[name] for name in ("input_ids", "attention_mask", "step_positions")))
    odds = logits[..., 1] - logits[..., 0]
    for i, one in enumerate(two):  # before training: the classifier's log odds at the separators
        torch.testing.assert_close(mine[i, : len(one["labels"]), 0], odds[i, one["step_positions"]])
    before = run.evaluate()["eval_loss"]
    run.train()
    assert run.evaluate()["eval_loss"] < 0.3 * before
    run.save_model()
    prm = AutoPRM.from_pretrained(tmp_path)
    assert isinstance(prm.adapter, StepSeparatorPRM)
    assert prm.adapter.separator == "\n\n"
    (found,) = prm.score_steps(["Q0"], [["aaaaaa", "bbbbbb"]])  # in the toy, b is right
    assert found[0] < 0.3 < 0.7 < found[1]
    assert found == prm.score(["Q0"], [["aaaaaa\n\nbbbbbb"]])[0][0]


def test_only_the_last_step_is_trained_on(tmp_path: Path) -> None:
    made = tokenizer()
    options: dict[str, Any] = {"report_to": [], "use_cpu": True, "loss": "bce", "train_on_last_step_only": True}
    args = PRMConfig(output_dir=str(tmp_path), **options)
    run = PRMTrainer(classifier(made), args, ROWS[:8], ROWS[:8], made)
    for i, given in enumerate(ROWS[:8]):
        labels = [float(label) for label in given["labels"]]
        assert run.train_dataset[i]["labels"] == [*[-100.0] * (len(labels) - 1), labels[-1]]
        assert run.eval_dataset[i]["labels"] == labels
