"""Studies: several calibrators on one split by question, kept in a folder, continued after an interruption."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from prmfast.calibration import (
    ArtifactError,
    BetaBinomialCalibrator,
    CalibrationData,
    Calibrator,
    CondOTCalibrator,
    QuantileRegressionCalibrator,
    study,
)
from prmfast.calibration.study import METHODS, Factory, Study, calibrate, midpoint_levels, question_mark
from tests.handmade import traces, with_column

LEVELS = torch.tensor([0.05, 0.5, 0.95])
NETWORKS: dict[str, Factory] = {
    "raw": METHODS["raw"],
    "isotonic": METHODS["isotonic"],
    "qr": lambda seed: QuantileRegressionCalibrator("mlp", steps=6, seed=seed),
    "beta-binomial": lambda seed: BetaBinomialCalibrator(steps=6, context="mlp", seed=seed),
    "condot": lambda seed: CondOTCalibrator(steps=6, context="mlp", seed=seed),
}
FAST = ("raw", "isotonic", "logistic")

pytestmark = pytest.mark.xdist_group("study")  # one worker: the networks are fitted once


def fit(table: pa.Table, directory: Path, methods: Any = FAST, **options: Any) -> Study:
    return calibrate(table, directory, methods=methods, progress=False, **options)


def listing(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())


def bytes_of(directory: Path) -> dict[str, bytes]:
    return {name: (directory / name).read_bytes() for name in listing(directory)}


def quantiles(found: Study, table: pa.Table) -> dict[tuple[str, str], torch.Tensor]:
    return {
        (unit, name): calibrator.quantile(CalibrationData.from_traces(table, unit=unit), LEVELS)
        for unit, calibrators in found.calibrators.items()
        for name, calibrator in calibrators.items()
    }


@pytest.fixture(scope="module")
def table() -> pa.Table:
    return traces(40, 2, hidden=True, rollouts=4)


@pytest.fixture(scope="module")
def whole(table: pa.Table, tmp_path_factory: pytest.TempPathFactory) -> tuple[Study, Path]:
    directory = tmp_path_factory.mktemp("study")
    return fit(table, directory, NETWORKS), directory


def test_round_trip(whole: tuple[Study, Path], table: pa.Table) -> None:
    made, directory = whole
    loaded = Study.load(directory)
    assert (loaded.training, loaded.seed) == (made.training, 42)
    assert {unit: list(names) for unit, names in loaded.calibrators.items()} == {
        unit: list(NETWORKS) for unit in ("prefix", "question")
    }
    before, after = quantiles(made, table), quantiles(loaded, table)
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert made.evaluate(table, resamples=20) == loaded.evaluate(table, resamples=20)


def test_what_is_written(whole: tuple[Study, Path]) -> None:
    _, directory = whole
    artifacts = [
        f"{unit}/{name}/{file}"
        for unit in ("prefix", "question")
        for name in NETWORKS
        for file in ("config.json", "model.safetensors")
    ]
    assert listing(directory) == sorted([*artifacts, "study.json"])
    assert not any(path.name.startswith(".") for path in directory.rglob("*"))
    described = json.loads((directory / "study.json").read_text())
    assert described["units"] == {unit: list(NETWORKS) for unit in ("prefix", "question")}
    assert (described["format_version"], described["seed"], described["test_size"]) == (1, 42, 0.2)
    assert len(described["training"]) == 32


def test_calibrators_know_their_rows(whole: tuple[Study, Path], table: pa.Table) -> None:
    made, _ = whole
    for unit, calibrators in made.calibrators.items():
        data = CalibrationData.from_traces(table, unit=unit)
        mine = [question_mark(q) in made.training for q in data.question]
        for calibrator in calibrators.values():
            assert calibrator.provenance_.data["questions"] == 32
            assert calibrator.provenance_.data["rows"] == sum(mine)
            assert calibrator.provenance_.policy_id == "small"


def test_both_units_share_one_split_that_rows_do_not_change(table: pa.Table, tmp_path: Path) -> None:
    both = fit(table, tmp_path / "both", ["raw"])
    for unit in ("prefix", "question"):
        assert fit(table, tmp_path / unit, ["raw"], units=[unit]).training == both.training
    backwards = table.take(list(reversed(range(table.num_rows))))
    assert fit(backwards, tmp_path / "backwards", ["raw"]).training == both.training
    assert fit(table, tmp_path / "seed", ["raw"], seed=7).training != both.training
    assert len(fit(table, tmp_path / "half", ["raw"], test_size=0.5).training) == 20


def test_unseen(whole: tuple[Study, Path], table: pa.Table) -> None:
    made, _ = whole
    everything = {question_mark(q) for q in set(table["question_id"].to_pylist())}
    rests = {}
    for unit in ("prefix", "question"):
        data = CalibrationData.from_traces(table, unit=unit)
        rest = made.unseen(data)
        rests[unit] = set(rest.question)
        assert {question_mark(q) for q in rest.question} == everything - made.training
        kept = [i for i, q in enumerate(data.question) if question_mark(q) not in made.training]
        assert torch.equal(rest.score, data.score[kept])
        with pytest.raises(ValueError, match=r"every one of 32 questions was fitted on; evaluate on other traces"):
            made.unseen(data.select([i for i in range(len(data)) if i not in kept]))
    assert rests["prefix"] == rests["question"]
    assert len(rests["prefix"]) == 8


def test_evaluate_judges_unseen_questions_unless_told(whole: tuple[Study, Path], table: pa.Table) -> None:
    made, _ = whole
    found = made.evaluate(table, resamples=20)
    data = CalibrationData.from_traces(table, unit="question")
    rest = made.unseen(data)
    assert list(found) == ["prefix", "question"]
    assert list(found["question"]) == list(NETWORKS)
    for rows, metrics in ((rest, found), (data, made.evaluate(table, include_training=True, resamples=20))):
        brier = float(((rows.score - rows.target) ** 2).mean())
        value, low, high = metrics["question"]["raw"]["brier"]
        assert value == pytest.approx(brier, rel=1e-5)
        assert low < value < high
    assert found["prefix"]["condot"]["crossing_rate"].value == 0


def test_evaluate_leaves_out_what_the_traces_cannot_give(whole: tuple[Study, Path], tmp_path: Path) -> None:
    single = traces(12, 1, question_score=False, seed=5)  # one sample each: prefixes only
    made = fit(traces(20, 2, question_score=False), tmp_path)
    assert list(made.calibrators) == ["prefix", "question"]
    assert list(made.evaluate(single, include_training=True, resamples=20)) == ["prefix"]
    with pytest.raises(ValueError, match=r"the traces hold no scored answer with a known outcome$"):
        made.evaluate(with_column(single, "prm_step_scores", [None] * 12))


def test_a_unit_whose_questions_were_all_fitted_on_does_not_hide_the_other(tmp_path: Path) -> None:
    # 16 single answers and one question with several: wherever that falls, the prefixes can be judged
    many, few = traces(16, 1, question_score=False), traces(1, 5, question_score=False, seed=1)
    few = with_column(few, "question_id", ["several"] * 5)
    table = pa.concat_tables([many, few])
    seeds = range(20)
    made = [fit(table, tmp_path / str(seed), ["raw"], units=["prefix"], seed=seed) for seed in seeds]
    seen = next(seed for seed in seeds if question_mark("several") in made[seed].training)
    both = fit(table, tmp_path / "both", ["raw"], seed=seen)
    assert list(both.calibrators) == ["prefix", "question"]
    assert list(both.evaluate(table, resamples=20)) == ["prefix"]
    assert list(both.evaluate(table, include_training=True, resamples=20)) == ["prefix", "question"]
    fitted_on = table.filter(pa.array([question_mark(q) in both.training for q in table["question_id"].to_pylist()]))
    with pytest.raises(ValueError, match="was fitted on"):
        both.evaluate(fitted_on)


def test_one_policy(tmp_path: Path) -> None:
    table = traces(12, 2, policies=("small", "large"))
    made = fit(table, tmp_path, ["raw"], policy_id="large", prm_id="the prm")
    provenance = made.calibrators["question"]["raw"].provenance_
    assert (provenance.policy_id, provenance.prm_id) == ("large", "the prm")
    small, large = (
        made.evaluate(table, policy_id=p, resamples=20)["prefix"]["raw"]["brier"] for p in ("small", "large")
    )
    rows = made.unseen(CalibrationData.from_traces(table, policy_id="large"))
    assert large.value == pytest.approx(float(((rows.score - rows.target) ** 2).mean()), rel=1e-5)
    assert small.value != large.value


def test_methods_by_name_are_the_table(table: pa.Table, tmp_path: Path) -> None:
    chosen = study.chosen_methods(None)
    assert chosen == METHODS
    made = fit(table, tmp_path, ["isotonic", "raw"], units=["question"])
    assert [type(c).__name__ for c in made.calibrators["question"].values()] == ["IsotonicCalibrator", "RawScore"]
    seeded = METHODS["condot-crps"](9)
    assert isinstance(seeded, CondOTCalibrator)
    assert (seeded.objective, seeded.seed) == ("crps", 9)


def test_factories_get_the_seed(table: pa.Table, tmp_path: Path) -> None:
    seeds: list[int] = []

    def make(seed: int) -> Calibrator:
        seeds.append(seed)
        return METHODS["raw"](seed)

    made = fit(table, tmp_path, {"mine": make}, seed=3)
    assert seeds == [3, 3]
    assert list(made.calibrators["prefix"]) == ["mine"]
    assert Study.load(tmp_path).seed == 3


def unscored(table: pa.Table) -> pa.Table:
    return table.select(["question_id", "policy_id", "correct"])


@pytest.mark.parametrize(
    ("change", "options", "error", "message"),
    [
        (None, {"methods": ["raw", "best"]}, ValueError, "methods must be among raw, isotonic, .*, got best$"),
        (None, {"methods": []}, ValueError, "methods must be among .*, got none"),
        (None, {"test_size": 0}, ValueError, r"test_size must lie in \(0, 1\), got 0"),
        (None, {"test_size": 1.5}, ValueError, r"test_size must lie in \(0, 1\), got 1.5"),
        (None, {"test_size": float("nan")}, ValueError, r"test_size must lie in \(0, 1\), got nan"),
        (None, {"units": ["answer"]}, ValueError, "unit must be 'prefix' or 'question', got 'answer'"),
        (None, {"policy_id": "nobody"}, ValueError, "policy_id must be one of small, got 'nobody'"),
        (unscored, {}, ValueError, "the traces hold no scored answer with a known outcome"),
        (unscored, {"units": ["prefix"]}, ValueError, "unit='prefix' needs rows with a PRM score .* got none of 80"),
        (lambda t: t.slice(0, 2), {}, ValueError, "a split by question needs at least 2 questions, got 1"),
        (lambda t: t.slice(0, 0), {}, ValueError, "the table must have at least 1 row, got 0 rows"),
        (lambda t: t.drop_columns(["correct"]), {}, ValueError, "correct must be a column"),
    ],
)
def test_errors_write_nothing(
    table: pa.Table,
    tmp_path: Path,
    change: Callable[[pa.Table], pa.Table] | None,
    options: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        fit(table if change is None else change(table), tmp_path / "study", **options)
    assert not (tmp_path / "study").exists()


def test_an_interrupted_study_continues_and_ends_alike(
    whole: tuple[Study, Path], table: pa.Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prmfast.calibration import training

    _, uninterrupted = whole
    saved = training._save
    count = 0

    def save(*arguments: Any) -> None:
        nonlocal count
        count += 1
        saved(*arguments)
        if count == 9:  # qr evaluates six times: in the middle of the second network's fit
            raise KeyboardInterrupt

    monkeypatch.setattr(training, "_save", save)
    with pytest.raises(KeyboardInterrupt):
        fit(table, tmp_path, NETWORKS)
    assert not (tmp_path / "study.json").exists()
    assert (tmp_path / ".checkpoints").is_dir()
    with pytest.raises(ArtifactError, match=r"study.json does not exist; `prmfast calibrate TRACES -o "):
        Study.load(tmp_path)
    fit(table, tmp_path, NETWORKS)
    assert count == 9 + 3 + 6 + 3 * 6  # no evaluation was made twice
    assert not (tmp_path / ".checkpoints").exists()
    assert bytes_of(tmp_path) == bytes_of(uninterrupted)


def test_a_factory_that_fails_leaves_no_study(table: pa.Table, tmp_path: Path) -> None:
    def broken(seed: int) -> Calibrator:
        raise RuntimeError("no second method")

    with pytest.raises(RuntimeError, match="no second method"):
        fit(table, tmp_path / "broken", {"raw": METHODS["raw"], "isotonic": broken})
    assert not (tmp_path / "broken" / "study.json").exists()
    names = ["raw", "isotonic"]
    fit(table, tmp_path / "broken", names)
    fit(table, tmp_path / "fine", names)
    assert bytes_of(tmp_path / "broken") == bytes_of(tmp_path / "fine")


def test_an_older_study_never_stands_beside_newer_calibrators(table: pa.Table, tmp_path: Path) -> None:
    # else its list of training questions would vouch for calibrators that were fitted on others
    fit(table, tmp_path, ["raw", "isotonic"])

    def broken(seed: int) -> Calibrator:
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        fit(table, tmp_path, {"isotonic": METHODS["isotonic"], "raw": broken}, seed=1)
    with pytest.raises(ArtifactError, match="does not exist"):
        Study.load(tmp_path)
    made = fit(table, tmp_path, ["isotonic", "raw"], seed=1)
    assert Study.load(tmp_path).training == made.training


@pytest.fixture
def small(table: pa.Table, tmp_path: Path) -> Path:
    fit(table, tmp_path, ["raw"], units=["question"])
    return tmp_path


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is damaged"),
        (b"{", "is damaged"),
        (b"\xff\xfe", "is damaged"),
        (b"[1, 2]", "is damaged"),
        (b"{}", r"is damaged \(format_version: Field required"),
    ],
)
def test_a_damaged_study(small: Path, content: bytes, message: str) -> None:
    (small / "study.json").write_bytes(content)
    with pytest.raises(ArtifactError, match=rf"study.json {message}.*run `prmfast calibrate` again"):
        Study.load(small)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 2}, "has format_version 2, prmfast .* reads up to 1; upgrade prmfast"),
        ({"format_version": "1"}, "is damaged"),
        ({"format_version": 2, "units": 3}, "has format_version 2"),
        ({"seed": None}, r"is damaged \(seed"),
        ({"training": 5}, r"is damaged \(training"),
        ({"units": ["question"]}, r"is damaged \(units"),
        ({"units": {"answer": ["raw"]}}, r"is damaged \(units"),
        ({"units": {"question": ["raw", "gone"]}}, r"question/gone/config.json does not exist"),
    ],
)
def test_a_newer_or_edited_study(small: Path, changes: dict[str, Any], message: str) -> None:
    path = small / "study.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(ArtifactError, match=message):
        Study.load(small)


def test_damaged_weights_are_noticed(small: Path) -> None:
    (small / "question" / "raw" / "model.safetensors").write_bytes(b"")
    with pytest.raises(ArtifactError, match=r"model\.safetensors is not the file"):
        Study.load(small)


@pytest.mark.parametrize("count", [1, 4, 100])
def test_midpoint_levels(count: int) -> None:
    levels = midpoint_levels(count)
    assert levels.shape == (count,)
    assert float(levels.mean()) == pytest.approx(0.5)
    assert float((levels**2).mean()) == pytest.approx(1 / 3, abs=1 / (12 * count**2) + 1e-6)
    assert levels[0].item() == pytest.approx(0.5 / count)
