"""The command line as a user meets it: what it prints and writes, and one red line where something is wrong."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import Result
from typer.testing import CliRunner

from prmfast.calibration import study
from prmfast.calibration.metrics import Interval
from prmfast.cli import app, interval_text, parse_targets
from tests.handmade import traces, with_column

FAST = ("raw", "isotonic", "logistic")
METHOD_OPTIONS = tuple(part for name in FAST for part in ("--method", name))
PNG = b"\x89PNG\r\n\x1a\n"


def prmfast(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="prmfast")


def ok(*arguments: object) -> str:
    done = prmfast(*arguments)
    assert done.exit_code == 0, done.output + (repr(done.exception) if done.exception else "")
    return done.stdout


def refused(*arguments: object) -> str:
    """The one line on standard error of a command that ends with status 1."""
    done = prmfast(*arguments)
    assert done.exit_code == 1, done.output
    assert isinstance(done.exception, SystemExit)  # another exception is a traceback to the user
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("error: ")
    return done.stderr


def strict_json(path: Path) -> Any:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


def listing(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*")}


@pytest.fixture(scope="module")
def table() -> pa.Table:
    return traces(30, 6)


@pytest.fixture(scope="module")
def folder(table: pa.Table, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """traces.parquet and a study of the fast methods."""
    directory = tmp_path_factory.mktemp("cli")
    pq.write_table(table, directory / "traces.parquet")
    ok("calibrate", directory / "traces.parquet", "-o", directory / "study", *METHOD_OPTIONS, "--quiet")
    return directory


@pytest.mark.parametrize("command", [(), ("calibrate",), ("evaluate",), ("replay",), ("demo",), ("env",)], ids=" ".join)
def test_help(command: tuple[str, ...]) -> None:
    text = ok(*command, "--help")
    assert f"Usage: prmfast {' '.join(command)}".rstrip() in text
    expected = {
        (): ("calibrate", "evaluate", "replay", "demo", "env"),
        ("calibrate",): ("--method", "--unit", "--test-size", "--seed", "--policy-id", "--quiet"),
        ("evaluate",): ("--include-training", "--output"),
        ("replay",): ("--target", "--n-max", "--exact", "--plot"),
        ("demo",): ("--train", "--questions"),
        ("env",): (),
    }[command]
    assert all(word in text for word in expected)


def test_env() -> None:
    text = ok("env")
    assert "prmfast" in text
    assert "torch" in text
    assert "reference" in text


def test_demo_wants_enough_questions() -> None:
    done = prmfast("demo", "--questions", 10)
    assert done.exit_code == 2
    assert "50" in done.stderr


def test_demo_passes_its_options(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import prmfast.demo

    seen: dict[str, Any] = {}
    monkeypatch.setattr(prmfast.demo, "run_demo", lambda output, **options: seen.update(options, output=output))
    ok("demo", "-o", tmp_path, "--questions", 60, "--seed", 3, "--quiet")
    seen.pop("console")
    assert seen == {"output": tmp_path, "train": False, "questions": 60, "seed": 3, "progress": False}


def test_calibrate_prints_what_it_found(table: pa.Table, tmp_path: Path) -> None:
    pq.write_table(table, tmp_path / "t.parquet")
    text = ok("calibrate", tmp_path / "t.parquet", "-o", tmp_path / "s", "--method", "raw", "--unit", "question")
    assert f"question: 1 calibrators in {tmp_path / 's' / 'question'}" in text
    assert "question level, questions not fitted on; value [95 % interval by question]" in text
    assert "prefix" not in text
    assert listing(tmp_path / "s") == {
        *("study.json", "question", "question/raw"),
        *("question/raw/config.json", "question/raw/model.safetensors"),
    }


def test_calibrate_takes_every_method_and_unit_by_default(
    table: pa.Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study, "METHODS", {name: study.METHODS[name] for name in ("raw", "platt")})
    pq.write_table(table, tmp_path / "t.parquet")
    ok("calibrate", tmp_path / "t.parquet", "-o", tmp_path / "s", "--seed", 5, "--test-size", 0.5, "--prm-id", "a/prm")
    described = strict_json(tmp_path / "s" / "study.json")
    assert described["units"] == {"prefix": ["raw", "platt"], "question": ["raw", "platt"]}
    assert (described["seed"], described["test_size"], len(described["training"])) == (5, 0.5, 15)
    assert strict_json(tmp_path / "s" / "prefix" / "raw" / "config.json")["provenance"]["prm_id"] == "a/prm"


def test_evaluate(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "new" / "metrics.json"
    text = ok("evaluate", folder / "study", folder / "traces.parquet", "--output", output)
    found = strict_json(output)
    assert list(found) == ["prefix", "question"]
    for unit, methods in found.items():
        assert f"{unit} level, questions not fitted on" in text
        assert list(methods) == list(FAST)
        for name, metrics in methods.items():
            assert set(metrics) >= {"brier", "ece", "wql", "area", "crossing_rate", "spearman"}
            value, low, high = metrics["brier"]
            assert low < value < high
            assert f"{value:.3f} [{low:.3f}, {high:.3f}]" in next(
                line for line in text.split(f"{unit} level")[1].splitlines() if name in line
            )
    everything = ok("evaluate", folder / "study", folder / "traces.parquet", "--include-training")
    assert "all questions" in everything
    assert everything != text


def test_metrics_without_a_value_are_null(table: pa.Table, tmp_path: Path) -> None:
    # the same score and outcome everywhere: no ranks, no positives
    rows = table.num_rows
    flat = with_column(with_column(table, "prm_step_scores", [[0.5]] * rows), "correct", [False] * rows)
    flat = flat.drop_columns(["question_score", "steps", "completion"])
    pq.write_table(flat, tmp_path / "t.parquet")
    text = ok("calibrate", tmp_path / "t.parquet", "-o", tmp_path / "s", "--method", "raw")
    assert "nan" not in text
    ok("evaluate", tmp_path / "s", tmp_path / "t.parquet", "--output", tmp_path / "m.json")
    found = strict_json(tmp_path / "m.json")["question"]["raw"]
    assert found["spearman"] == [None] * 3
    assert found["brier"][0] == 0.25


def test_replay(folder: Path, tmp_path: Path) -> None:
    output, plot = tmp_path / "frontier.json", tmp_path / "plots" / "frontier.png"
    options = ("--target", "0.5:0.9:3", "--n-max", 8, "--output", output, "--plot", plot)
    text = ok("replay", folder / "study", folder / "traces.parquet", *options)
    assert "6 questions, 6 question-policy pairs, 36 stored samples" in text
    assert "the first scored sample" not in text
    rows = strict_json(output)
    assert [(row["method"], row["target"]) for row in rows] == [
        *((name, pytest.approx(target)) for name in FAST for target in (0.5, 0.7, 0.9)),
        *(("fixed", None),) * 4,
        *(("oracle", pytest.approx(target)) for target in (0.5, 0.7, 0.9)),
    ]
    assert [row["asked"] for row in rows if row["method"] == "fixed"] == [1, 2, 4, 6]
    assert plot.read_bytes().startswith(PNG)
    for method in (*FAST, "fixed", "oracle"):
        assert any(line.startswith(f"│ {method} ") for line in text.splitlines())
    whole = ok("replay", folder / "study", folder / "traces.parquet", "--target", 0.8, "--include-training")
    assert "30 questions, 30 question-policy pairs, 180 stored samples" in whole
    assert listing(tmp_path) == {"frontier.json", "plots", "plots/frontier.png"}


def test_replay_is_repeatable_and_exact_needs_no_trials(folder: Path, tmp_path: Path) -> None:
    def rows(*options: object) -> Any:
        output = tmp_path / "rows.json"
        ok("replay", folder / "study", folder / "traces.parquet", "--target", 0.8, "--output", output, *options)
        return strict_json(output)

    assert rows("--trials", 5) == rows("--trials", 5)
    assert rows("--trials", 5) != rows("--trials", 5, "--seed", 1)
    assert rows("--exact") == rows("--exact", "--trials", 5)


def test_replay_says_that_a_pilot_speaks(tmp_path: Path) -> None:
    pq.write_table(traces(12, 4, question_score=False), tmp_path / "t.parquet")
    ok("calibrate", tmp_path / "t.parquet", "-o", tmp_path / "s", "--method", "raw")
    text = ok("replay", tmp_path / "s", tmp_path / "t.parquet", "--target", 0.8, "--include-training")
    assert "12 questions, 12 question-policy pairs, 36 stored samples" in text
    assert "no question_score: the first scored sample of each pair speaks for it" in text


def test_policy_id(tmp_path: Path) -> None:
    table = traces(12, 3, policies=("small", "large"))
    path, nameless = tmp_path / "t.parquet", tmp_path / "nameless.parquet"
    pq.write_table(table, path)
    pq.write_table(table.drop_columns(["policy_id"]), nameless)
    ok("calibrate", path, "-o", tmp_path / "s", "--method", "raw", "--policy-id", "large")
    config = strict_json(tmp_path / "s" / "question" / "raw" / "config.json")
    assert config["provenance"]["policy_id"] == "large"
    text = ok("replay", tmp_path / "s", path, "--target", 0.8, "--include-training", "--policy-id", "large")
    assert "12 questions, 12 question-policy pairs, 36 stored samples" in text
    whole, one = (ok("evaluate", tmp_path / "s", path, *options) for options in ((), ("--policy-id", "large")))
    assert whole != one
    hint = "name the policy with policy_id=... (command line: --policy-id)"
    for command in (("calibrate", nameless, "-o", tmp_path / "n"), ("evaluate", tmp_path / "s", nameless)):
        assert hint in refused(*command)
    single = traces(12, 3).drop_columns(["policy_id"])
    pq.write_table(single, nameless)
    ok("calibrate", nameless, "-o", tmp_path / "n", "--method", "raw", "--policy-id", "mine")
    ok("evaluate", tmp_path / "n", nameless, "--policy-id", "mine")
    ok("replay", tmp_path / "n", nameless, "--policy-id", "mine", "--target", 0.8, "--exact")


@pytest.mark.parametrize(
    ("text", "targets"),
    [
        ("0.9", [0.9]),
        ("0.5:0.9:3", [0.5, 0.7, 0.9]),
        ("0.5:0.9:1", [0.5]),
        ("0.9:0.5:2", [0.9, 0.5]),
        ("0.5:0.999:10", [0.5 + 0.499 * i / 9 for i in range(10)]),
    ],
)
def test_parse_targets(text: str, targets: list[float]) -> None:
    assert parse_targets(text) == pytest.approx(targets)
    assert parse_targets(text)[-1] <= max(targets)


@pytest.mark.parametrize("text", ["", "high", "0.5:0.9", "0.5:0.9:x", "0.5:0.9:2.5", "0.5:0.9:0", "0.5:0.9:3:4", ":"])
def test_targets_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match=r"target must be a number or LOW:HIGH:COUNT"):
        parse_targets(text)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (Interval(math.nan, math.nan, math.nan), "-"),
        (Interval(0.5, 0.5, 0.5), "0.500"),
        (Interval(0.5, 0.4, 0.65), "0.500 [0.400, 0.650]"),
    ],
)
def test_interval_text(value: Interval | None, text: str) -> None:
    assert interval_text(value) == text


def broken(column: str, row: int, value: object) -> Callable[[pa.Table], pa.Table]:
    def change(table: pa.Table) -> pa.Table:
        values = table[column].to_pylist()
        values[row] = value
        return with_column(table, column, values)

    return change


BAD_TRACES: list[Any] = [
    pytest.param(lambda t: t.slice(0, 0), "the table must have at least 1 row, got 0 rows", id="empty"),
    pytest.param(lambda t: t.drop_columns(["correct"]), "correct must be a column, got question_id, ", id="no-column"),
    pytest.param(
        broken("prm_step_scores", 4, [math.nan]), "row 4: prm_step_scores must lie in [0, 1], got nan", id="nan"
    ),
    pytest.param(broken("question_score", 6, 1.5), "row 6: question_score must lie in [0, 1], got 1.5", id="range"),
]


@pytest.mark.parametrize(("change", "message"), BAD_TRACES)
@pytest.mark.parametrize("command", ["calibrate", "evaluate", "replay"])
def test_bad_traces(
    folder: Path, table: pa.Table, tmp_path: Path, command: str, change: Callable[[pa.Table], pa.Table], message: str
) -> None:
    path, output = tmp_path / "bad.parquet", tmp_path / "out"
    pq.write_table(change(table), path)
    where = ("-o", output) if command == "calibrate" else ("--output", output)
    line = refused(command, *(() if command == "calibrate" else (folder / "study",)), path, *where)
    assert message in line
    assert str(path) in line
    assert listing(tmp_path) == {"bad.parquet"}


def test_a_missing_file_and_a_file_that_is_no_parquet(folder: Path, tmp_path: Path) -> None:
    absent, text = tmp_path / "absent.parquet", tmp_path / "text.parquet"
    text.write_text("question_id,correct\n")
    for path, message in ((absent, "absent.parquet"), (text, "must be parquet")):
        assert message in refused("calibrate", path, "-o", tmp_path / "s")
        assert message in refused("evaluate", folder / "study", path)
        assert message in refused("replay", folder / "study", path, "--plot", tmp_path / "p.png")
    assert listing(tmp_path) == {"text.parquet"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--method", "best"), "methods must be among raw, isotonic, platt, "),
        (("--method", "raw", "--test-size", "1"), "test_size must lie in (0, 1), got 1.0"),
        (("--method", "raw", "--unit", "answer"), "unit must be 'prefix' or 'question', got 'answer'"),
        (("--method", "raw", "--policy-id", "nobody"), "policy_id must be one of small, got 'nobody'"),
    ],
    ids=lambda value: value[-1] if isinstance(value, tuple) else "",
)
def test_calibrate_refuses(folder: Path, tmp_path: Path, options: tuple[str, ...], message: str) -> None:
    assert message in refused("calibrate", folder / "traces.parquet", "-o", tmp_path / "s", *options)
    assert listing(tmp_path) == set()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--target", "high"), "target must be a number or LOW:HIGH:COUNT, got 'high'"),
        (("--target", "1"), "targets must lie in (0, 1), got 1.0"),
        (("--target", "0:0.9:3"), "targets must lie in (0, 1), got 0.0"),
        (("--target", "nan"), "targets must lie in (0, 1), got nan"),
        (("--n-max", "0"), "n_max must be >= 1, got 0"),
        (("--trials", "0"), "trials must be >= 1, got 0"),
        (("--seed", "-1"), "seed must be >= 0, got -1"),
        (("--policy-id", "nobody"), "policy_id must be one of small, got 'nobody'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_replay_refuses(folder: Path, tmp_path: Path, options: tuple[str, ...], message: str) -> None:
    where = ("--output", tmp_path / "o.json", "--plot", tmp_path / "p.png")
    assert message in refused("replay", folder / "study", folder / "traces.parquet", *options, *where)
    assert listing(tmp_path) == set()


def test_a_folder_without_a_study_or_with_a_damaged_one(folder: Path, tmp_path: Path) -> None:
    for command in ("evaluate", "replay"):
        line = refused(command, tmp_path, folder / "traces.parquet")
        assert f"{tmp_path / 'study.json'} does not exist; `prmfast calibrate TRACES -o {tmp_path}` writes it" in line
    (tmp_path / "study.json").write_text("{")
    assert "study.json is damaged" in refused("evaluate", tmp_path, folder / "traces.parquet")


def test_a_file_where_a_folder_should_be(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("mine")
    refused("calibrate", folder / "traces.parquet", "-o", path, "--method", "raw")
    refused("evaluate", path, folder / "traces.parquet")
    done = prmfast("evaluate", folder / "study", folder / "traces.parquet", "--output", path / "m.json", "--quiet")
    assert done.exit_code == 1
    assert done.stderr.startswith("error: ")
    assert path.read_text() == "mine"
    assert listing(tmp_path) == {"file"}


def test_a_study_without_question_level_calibrators(tmp_path: Path) -> None:
    pq.write_table(traces(10, 1, question_score=False), tmp_path / "t.parquet")
    ok("calibrate", tmp_path / "t.parquet", "-o", tmp_path / "s", "--method", "raw")
    assert "has no question-level calibrators" in refused("replay", tmp_path / "s", tmp_path / "t.parquet")


def test_traces_that_were_all_fitted_on(folder: Path, table: pa.Table, tmp_path: Path) -> None:
    training = strict_json(folder / "study" / "study.json")["training"]
    seen = [study.question_mark(question) in training for question in table["question_id"].to_pylist()]
    pq.write_table(table.filter(pa.array(seen)), tmp_path / "t.parquet")
    for command in ("evaluate", "replay"):
        assert "every one of 24 questions was fitted on" in refused(command, folder / "study", tmp_path / "t.parquet")
        ok(command, folder / "study", tmp_path / "t.parquet", "--include-training")


def test_an_error_of_our_own_keeps_its_traceback(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(study.Study, "load", fail)
    done = prmfast("evaluate", folder / "study", folder / "traces.parquet")
    assert isinstance(done.exception, ZeroDivisionError)


def test_the_console_script(folder: Path, tmp_path: Path) -> None:
    script = Path(sysconfig.get_path("scripts")) / "prmfast"
    if not script.exists():
        pytest.skip(f"{script} is absent: prmfast is not installed here")

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [script, *map(str, arguments)],
            capture_output=True,
            text=True,
            check=False,
            cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    done = run(
        "replay", folder / "study", folder / "traces.parquet", "--target", "0.8", "--exact", "--output", "o.json"
    )
    assert done.returncode == 0, done.stderr
    assert "replay without replacement" in done.stdout
    assert len(max(done.stdout.splitlines(), key=len)) <= 180
    assert len(strict_json(tmp_path / "o.json")) == 3 + 4 + 1
    bad = run("replay", folder / "study", "absent.parquet", "--output", "p.json")
    assert (bad.returncode, bad.stdout) == (1, "")
    assert len(bad.stderr.splitlines()) == 1
    assert bad.stderr.startswith("error: ")
    assert listing(tmp_path) == {"o.json"}


def test_real_traces(shared_data: Path, tmp_path: Path) -> None:
    path = shared_data / "math500_iid_samples.parquet"
    text = ok("calibrate", path, "-o", tmp_path / "s", *METHOD_OPTIONS, "--quiet")
    assert "prefix level" in text
    assert "question level" in text
    ok("evaluate", tmp_path / "s", path, "--output", tmp_path / "m.json")
    metrics = strict_json(tmp_path / "m.json")
    for name in ("isotonic", "logistic"):
        for unit in ("prefix", "question"):
            assert metrics[unit][name]["brier"][0] < metrics[unit]["raw"]["brier"][0]
    # 10 unseen questions have several samples; all 50 show what the methods cost
    options = ("--target", "0.5:0.999:10", "--exact", "--include-training", "--output", tmp_path / "f.json")
    text = ok("replay", tmp_path / "s", path, *options)
    assert "no question_score: the first scored sample of each pair speaks for it" in text
    rows = strict_json(tmp_path / "f.json")
    raw, isotonic = ([row for row in rows if row["method"] == name] for name in ("raw", "isotonic"))
    assert len(raw) == len(isotonic) == 10
    assert sum(row["method"] in ("fixed", "oracle") for row in rows) > 10
    for low, high in zip(raw, isotonic, strict=True):
        assert low["target"] == high["target"]
        assert low["success"] < high["success"]
    assert all(row["success_high"] < row["target"] for row in raw[4:])
    ok("replay", tmp_path / "s", path, "--target", "0.5:0.999:10", "--exact")
