"""``prmfast evaluate`` on a PRM that was trained here, on stored scores, and on the real files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from click.testing import Result
from typer.testing import CliRunner

pytest.importorskip("transformers", reason="training needs the extra prmfast[train]: no transformers")
pytest.importorskip("accelerate", reason="training needs the extra prmfast[train]: no accelerate")

from prmfast.cli import app
from prmfast.evaluation.answers import final_answer
from prmfast.prm.data import StepExample
from prmfast.prm.transformers_prm import TransformersPRM
from prmfast.prm.value_head import ValueHeadPRM
from tests.prm.models import SIZES, save
from tests.prm.train.test_implicit import language_model
from tests.prm.train.toy import chains, trainer

PNG = b"\x89PNG\r\n\x1a\n"


def prmfast(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["evaluate", *map(str, arguments), "--quiet"], prog_name="prmfast")


def told(tmp_path: Path, *arguments: object) -> dict[str, Any]:
    """What the JSON file says."""
    done = prmfast(*arguments, "--output", tmp_path / "o.json")
    assert done.exit_code == 0, done.output + repr(done.exception)
    found: dict[str, Any] = json.loads((tmp_path / "o.json").read_text())
    return found


def refused(*arguments: object) -> str:
    done = prmfast(*arguments)
    assert done.exit_code == 1, done.output
    assert isinstance(done.exception, SystemExit)
    return " ".join(done.stderr.split())


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def first_error(example: StepExample) -> int:
    return next((i for i, label in enumerate(example.labels) if label == 0), -1)


@pytest.fixture(scope="module")
def prm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A value-head PRM that has learned the toy's letter."""
    folder = tmp_path_factory.mktemp("run") / "toy-prm"
    options = {"per_device_train_batch_size": 8, "num_train_epochs": 6, "learning_rate": 3e-3, "loss": "bce"}
    run = trainer(folder, adapter=ValueHeadPRM(), **options)
    run.train()
    run.save_model()
    return folder


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """90 chains of 7 questions with a first error, and an outcome: whether all steps are right."""
    rows = [
        {
            "problem": example.question,
            "qkey": f"q{i % 7}",
            "steps": list(example.steps),
            "first_error": first_error(example),
            "correct": first_error(example) == -1,
            "pred_answer": "7" if first_error(example) == -1 else str(i % 3),
        }
        for i, example in enumerate(chains(90, seed=1))
    ]
    return write(tmp_path_factory.mktemp("data") / "rows.jsonl", rows)


def test_a_trained_prm(prm: Path, file: Path, tmp_path: Path) -> None:
    done = prmfast(prm, file, "--output", tmp_path / "o.json", "--plots", tmp_path / "plots", "--largest-n", 4)
    assert done.exit_code == 0, done.output
    assert f"toy-prm on {file}: 90 answers" in done.stdout.replace("\n", "")
    found = json.loads((tmp_path / "o.json").read_text())
    f1 = {row["scores"]: row["f1"][0] for row in found["first_error"]}
    assert set(f1) == {"PRM", "step number"}
    assert f1["PRM"] > max(0.9, f1["step number"] + 0.2)
    chosen = {(row["method"], row["n"]): row for row in found["selection"]}
    assert {n for _, n in chosen} == {1, 2, 4}
    for how in ("min", "prod", "last", "mean"):
        assert chosen[f"best of n: {how}", 4]["value"] <= chosen["pass@n", 4]["value"] + 1e-12
        assert f"vote: {how}" in done.stdout
    assert chosen["best of n: min", 4]["over_avg"][1] > 0.2
    assert chosen["majority", 4]["questions"] == 7
    for name in ("first_error.png", "best_of_n.png"):
        assert (tmp_path / "plots" / name).read_bytes().startswith(PNG)


def test_stored_scores_say_what_the_prm_says(prm: Path, file: Path, tmp_path: Path) -> None:
    whole = told(tmp_path, prm, file, "--scores", tmp_path / "kept", "--largest-n", 1)
    traces = tmp_path / "kept" / "traces.parquet"
    again = told(tmp_path, traces, "--largest-n", 1)
    assert again["prm_id"] is None
    assert {**again, "file": "", "prm_id": ""} == {**whole, "file": "", "prm_id": ""}
    table = pq.read_table(traces)
    assert table["problem"].to_pylist() == [json.loads(line)["problem"] for line in file.read_text().splitlines()]
    part = table.slice(0, 30)
    pq.write_table(part.drop(["prm_step_scores"]), tmp_path / "bare.parquet")
    assert "FILE must have the column prm_step_scores" in refused(tmp_path / "bare.parquet")
    assert "--scores must come with a PRM" in refused(traces, "--scores", tmp_path / "other")
    assert "belongs to another run" in refused(prm, file, "--scores", tmp_path / "kept", "--limit", 20)


def test_an_interrupted_call_continues(prm: Path, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    score = TransformersPRM.score_steps

    def interrupted(self: Any, questions: Any, answers: Any) -> Any:
        calls.append(len(questions))
        if calls == [64, 26]:
            raise KeyboardInterrupt
        return score(self, questions, answers)

    monkeypatch.setattr(TransformersPRM, "score_steps", interrupted)
    options = (prm, file, "--scores", tmp_path / "kept", "--largest-n", 1)
    done = prmfast(*options)
    assert done.exit_code == 130
    assert "the same command continues in" in done.stdout
    found = told(tmp_path, *options)
    assert calls == [64, 26, 26]
    assert found["first_error"] == told(tmp_path, *options)["first_error"]
    assert calls == [64, 26, 26]


def test_the_threshold_comes_from_other_questions(prm: Path, file: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    judged = write(tmp_path / "judged.jsonl", rows[:30])
    others = [row | {"qkey": f"other {i}"} for i, row in enumerate(rows[30:])]
    found = told(tmp_path, prm, judged, "--threshold-file", write(tmp_path / "others.jsonl", others))
    same = told(tmp_path, prm, judged, "--threshold-file", write(tmp_path / "both.jsonl", [*rows[:30], *others]))
    assert found["thresholds"] == same["thresholds"]  # questions that are judged choose nothing
    assert set(found["thresholds"]) == {"PRM", "step number"}
    assert found["first_error"][0]["f1"][0] > 0.8
    assert "must have other questions" in refused(prm, judged, "--threshold-file", judged)


def test_every_form_of_a_file(prm: Path, file: Path, tmp_path: Path) -> None:
    """ProcessBench, stepwise and Math-Shepherd rows of the same chains give one table."""
    examples = chains(40, seed=2)
    forms = {
        "processbench": [{"problem": e.question, "steps": e.steps, "label": first_error(e)} for e in examples],
        "stepwise": [
            {"prompt": e.question, "completions": e.steps, "labels": [label == 1 for label in e.labels]}
            for e in examples
        ],
        "shepherd": [
            {
                "input": e.question + "".join(f"Step {j}: {s} ки\n" for j, s in enumerate(e.steps, 1)),
                "label": e.question
                + "".join(f"Step {j}: {s} {'-+'[e.labels[j - 1] == 1]}\n" for j, s in enumerate(e.steps, 1)),
            }
            for e in examples
        ],
    }
    tables = [told(tmp_path, prm, write(tmp_path / f"{name}.jsonl", rows)) for name, rows in forms.items()]
    assert tables[0]["first_error"] == tables[1]["first_error"] == tables[2]["first_error"]
    assert all(table["selection"] == [] for table in tables)
    outcomes = [{"question": e.question, "completion": "\n".join(e.steps), "correct": None} for e in examples]
    assert "give nothing to judge" in refused(prm, write(tmp_path / "outcomes.jsonl", outcomes))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"steps": ["a"], "first_error": 0}, "row 0: problem must be a string"),
        (
            {"problem": "p", "steps": ["a"], "first_error": 3},
            r"row 0: first_error must be an integer in [-1, 1), got 3",
        ),
        ({"problem": "p", "completion": "a", "correct": 2}, "row 0: correct must be a boolean, 0, 1 or null, got 2"),
        ({"problem": "p"}, "row 0: must have a completion or steps, got problem"),
        ({"completion": "a"}, "row 0: must have a question in question or problem or puzzle or prompt"),
        ({"prompt": "p", "completions": ["a"], "labels": [0.5]}, "row 0: labels must be 0 or 1 to have a first error"),
    ],
)
def test_rows_are_checked(prm: Path, tmp_path: Path, row: dict[str, Any], message: str) -> None:
    assert message in refused(prm, write(tmp_path / "rows.jsonl", [row]))


def test_what_is_asked_of_the_wrong_kind(prm: Path, file: Path, tmp_path: Path) -> None:
    assert "--include-training must come with a study" in refused(prm, file, "--include-training")
    assert "study.json does not exist" in refused(tmp_path, file)
    assert "must be given FILE, or DIRECTORY and FILE, got 3 paths" in refused(prm, file, file)
    (tmp_path / "study.json").write_text("{}")
    assert "only a PRM takes" in refused(tmp_path, file, "--limit", 3)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{1} or \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        ("Answer: 3\nAnswer: $4$.", "4"),
        ("**Answer: Answer: $ 7 $", "7"),
        (r"\boxed{1", None),
        ("nothing", None),
    ],
)
def test_final_answers(text: str, answer: str | None) -> None:
    assert final_answer(text) == answer


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A value-head PRM and an implicit one (of two random models) with room for the real answers."""
    from prmfast.prm.train import ImplicitConfig, ImplicitTrainer
    from tests.prm.train.test_implicit import outcomes

    folder = tmp_path_factory.mktemp("untrained")
    sizes = {"max_position_embeddings": 16384, "num_hidden_layers": 1}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in sizes.items():
            patch.setitem(SIZES, name, value)
        save("pqm", folder / "value")
        base, tokenizer = language_model()
    base.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    args = ImplicitConfig(output_dir=str(folder / "implicit"), use_cpu=True, report_to=[], max_steps=1, seed=0)
    run = ImplicitTrainer(str(folder / "base"), args, outcomes(8))
    run.train()
    run.save_model()
    return {"value": folder / "value", "implicit": folder / "implicit"}


@pytest.mark.parametrize(
    ("kind", "name", "rows", "first", "selection"),
    [
        ("value", "processbench", range(0, 1771, 80), True, False),
        ("value", "game24_gpt4_cot", range(0, 5000, 33), True, True),
        ("implicit", "game24_gpt4_cot", range(0, 5000, 33), True, True),
        ("value", "ipvrm_qwen3_0p6b_val", range(8), False, True),
    ],
)
def test_real_files(
    shared_data: Path, untrained: dict[str, Path], tmp_path: Path, kind: str, name: str, rows: range, first: bool,
    selection: bool,
) -> None:  # fmt: skip
    pq.write_table(pq.read_table(shared_data / f"{name}.parquet").take(list(rows)), tmp_path / "rows.parquet")
    found = told(tmp_path, untrained[kind], tmp_path / "rows.parquet", "--largest-n", 2, "--plots", tmp_path)
    assert found["answers"] == len(rows)
    protocols = {"value": {"PRM"}, "implicit": {"prefix", "process"}}[kind]
    assert {row["scores"] for row in found["first_error"]} == (protocols | {"step number"} if first else set())
    assert bool(found["selection"]) == selection
    assert (tmp_path / "first_error.png").exists() == first
    assert (tmp_path / "best_of_n.png").exists() == selection
