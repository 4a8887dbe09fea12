from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from prmfast.calibration import (
    ArtifactError,
    BetaBinomialCalibrator,
    CalibrationData,
    Calibrator,
    IsotonicCalibrator,
    LogisticCalibrator,
    NotFittedError,
    PlattCalibrator,
    QuantileRegressionCalibrator,
    RawScore,
    TemperatureCalibrator,
    artifact,
    load_calibrator,
)

MAKERS: dict[str, Callable[[], Calibrator]] = {
    "raw": RawScore,
    "isotonic": lambda: IsotonicCalibrator(spread="bins", bins=4),
    "platt": PlattCalibrator,
    "temperature": TemperatureCalibrator,
    "logistic": lambda: LogisticCalibrator(spread="bins"),
    "qr-linear": lambda: QuantileRegressionCalibrator("linear", levels=(0.1, 0.5, 0.9), steps=20),
    "qr-mlp": lambda: QuantileRegressionCalibrator("mlp", link="sigmoid", sort=True, encoder=(8,), steps=20),
    "beta-binomial": lambda: BetaBinomialCalibrator(steps=20),
    "beta-binomial-summary": lambda: BetaBinomialCalibrator(context="summary", steps=20),
}


@pytest.fixture(scope="module")
def data() -> CalibrationData:
    rng = np.random.default_rng(0)
    score = rng.random(240)
    return CalibrationData.from_arrays(
        score=score,
        hidden=rng.normal(size=(240, 6)),
        successes=rng.binomial(4, score),
        trials=np.full(240, 4),
        question=[f"q{i % 30}" for i in range(240)],
        prm_id="prm",
        policy_id="policy",
    )


@pytest.fixture
def saved(data: CalibrationData, tmp_path: Path) -> Path:
    folder = tmp_path / "artifact"
    IsotonicCalibrator().fit(data).save_pretrained(
        folder, prm_revision="abc", layer=-1, metrics={"brier": (0.1, np.nan)}
    )
    return folder


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("name", MAKERS)
def test_a_loaded_calibrator_is_bitwise_the_saved_one(name: str, data: CalibrationData, tmp_path: Path) -> None:
    fitted = MAKERS[name]().fit(data, progress=False)
    fitted.save_pretrained(tmp_path / "a")
    loaded = type(fitted).from_pretrained(tmp_path / "a")
    levels = [0.0, 0.07, 0.5, 0.9, 1.0]
    assert torch.equal(loaded.quantile(data, levels, clip=False), fitted.quantile(data, levels, clip=False))
    assert torch.equal(loaded.expected(data), fitted.expected(data))
    assert loaded.hyperparameters() == fitted.hyperparameters()
    assert type(load_calibrator(tmp_path / "a")) is type(fitted)
    loaded.save_pretrained(tmp_path / "b")
    assert (tmp_path / "a/config.json").read_bytes() == (tmp_path / "b/config.json").read_bytes()
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


def test_every_registered_class_can_be_imported() -> None:
    for name in artifact.REGISTRY:
        assert artifact.calibrator_class(name).__name__ == name


def test_config_pins_where_the_calibrator_comes_from(saved: Path, data: CalibrationData) -> None:
    config = json.loads((saved / "config.json").read_text())
    provenance = config["provenance"]
    assert (provenance["prm_id"], provenance["policy_id"], provenance["prm_revision"]) == ("prm", "policy", "abc")
    assert (provenance["layer"], provenance["metrics"]) == (-1, {"brier": [0.1, None]})
    assert provenance["data"]["sha256"] == data.fingerprint()
    assert config["prmfast_version"]
    assert {"python", "torch", "scikit-learn"} <= set(config["libraries"])
    assert sorted(path.name for path in saved.iterdir()) == ["config.json", "model.safetensors"]


def test_levels_are_pinned(data: CalibrationData, tmp_path: Path) -> None:
    QuantileRegressionCalibrator(levels=(0.1, 0.9), steps=2).fit(data, progress=False).save_pretrained(tmp_path / "qr")
    assert artifact.read_config(tmp_path / "qr").provenance.levels == [0.1, 0.9]


def test_unfitted_calibrators_cannot_be_saved(tmp_path: Path) -> None:
    with pytest.raises(
        NotFittedError, match=r"IsotonicCalibrator is not fitted; call fit\(data\) or IsotonicCalibrator"
    ):
        IsotonicCalibrator().save_pretrained(tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_another_class(saved: Path) -> None:
    with pytest.raises(ArtifactError, match=r"holds a IsotonicCalibrator, not a PlattCalibrator; use Isotonic"):
        PlattCalibrator.from_pretrained(saved)
    assert isinstance(Calibrator.from_pretrained(saved), IsotonicCalibrator)


def test_foreign_class_is_not_imported(saved: Path) -> None:
    edit_config(saved, calibrator="os.system")
    with pytest.raises(
        ArtifactError, match=r"unknown calibrator 'os.system'; prmfast .* knows BetaBinomialCalibrator, "
    ):
        load_calibrator(saved)


def test_newer_format(saved: Path) -> None:
    edit_config(saved, format_version=99, what_is_new=1)
    with pytest.raises(ArtifactError, match=r"has format_version 99, prmfast .* reads up to 1; upgrade prmfast"):
        load_calibrator(saved)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": "1"}, r"format_version must be a positive integer, got '1'"),
        ({"format_version": 0}, r"format_version must be a positive integer, got 0"),
        ({"surprise": 1}, r"breaks format_version 1: surprise: Extra inputs are not permitted; save"),
        ({"feature_names": "last"}, r"feature_names: Input should be a valid list"),
        ({"provenance": {"prm": "x"}}, r"provenance.prm: Extra inputs"),
        ({"weights_sha256": "0"}, r"weights_sha256: String should match"),
        (
            {"weights_sha256": "0" * 64},
            r"is not the file config.json was written for .*restore both files or save again",
        ),
        ({"hyperparameters": {"spread": "wide", "bins": 20}}, r"do not describe a IsotonicCalibrator \(spread must be"),
        ({"hyperparameters": {"colour": "red"}}, r"do not describe a IsotonicCalibrator .*colour"),
        ({"calibrator": "PlattCalibrator"}, r"do not describe a PlattCalibrator \('centre'\); save it again"),
    ],
)
def test_edited_configs(saved: Path, changes: dict[str, Any], message: str) -> None:
    edit_config(saved, **changes)
    with pytest.raises(ArtifactError, match=message):
        load_calibrator(saved)


@pytest.mark.parametrize("content", [b"", b"{", b"[1, 2]", b'{"model_type": "qwen2"}', b"\xff\xfe"])
def test_damaged_config(saved: Path, content: bytes) -> None:
    (saved / "config.json").write_bytes(content)
    with pytest.raises(ArtifactError, match=r"config.json is (damaged|not a prmfast calibrator)"):
        load_calibrator(saved)


def test_missing_files(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"nowhere/config.json does not exist; save_pretrained writes it"):
        load_calibrator(tmp_path / "nowhere")
    (saved / "model.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"model.safetensors does not exist, but config.json does; copy both"):
        load_calibrator(saved)


def test_every_flipped_byte_of_the_weights_is_noticed(saved: Path) -> None:
    path = saved / "model.safetensors"
    content = path.read_bytes()
    for at in range(0, len(content), max(1, len(content) // 40)):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        with pytest.raises(ArtifactError, match=r"is not the file config\.json was written for"):
            load_calibrator(saved)
    path.write_bytes(content[:-1])
    with pytest.raises(ArtifactError, match="is not the file"):
        load_calibrator(saved)


def test_weights_that_are_not_safetensors(saved: Path) -> None:
    import hashlib

    content = b"not tensors at all"
    (saved / "model.safetensors").write_bytes(content)
    edit_config(saved, weights_sha256=hashlib.sha256(content).hexdigest())
    with pytest.raises(ArtifactError, match="is not a safetensors file"):
        load_calibrator(saved)


def test_weights_of_another_shape(data: CalibrationData, tmp_path: Path) -> None:
    import hashlib

    BetaBinomialCalibrator(steps=2).fit(data, progress=False).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["network.head.weight"] = tensors["network.head.weight"][:2].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    digest = hashlib.sha256((tmp_path / "model.safetensors").read_bytes()).hexdigest()
    edit_config(tmp_path, weights_sha256=digest)
    with pytest.raises(ArtifactError, match=r"do not describe a BetaBinomialCalibrator \(.*size mismatch"):
        load_calibrator(tmp_path)


def test_saving_over_an_old_artifact_replaces_it_and_keeps_other_files(saved: Path, data: CalibrationData) -> None:
    (saved / "notes.txt").write_text("mine")
    PlattCalibrator().fit(data).save_pretrained(saved)
    assert isinstance(load_calibrator(saved), PlattCalibrator)
    assert (saved / "notes.txt").read_text() == "mine"
    assert sorted(path.name for path in saved.parent.iterdir()) == ["artifact"]


def test_a_save_that_fails_leaves_the_old_artifact(
    saved: Path, data: CalibrationData, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    fitted = PlattCalibrator().fit(data)
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        fitted.save_pretrained(saved)
    with pytest.raises(OSError, match="disk full"):
        fitted.save_pretrained(saved.parent / "new")
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    assert [path.name for path in saved.parent.iterdir()] == ["artifact"]


def test_a_process_killed_between_the_two_files_is_noticed(
    saved: Path, data: CalibrationData, monkeypatch: pytest.MonkeyPatch
) -> None:
    fitted, replace = PlattCalibrator().fit(data), os.replace

    def stop_before_config(source: Any, target: Any) -> None:
        if Path(target).name == "config.json":
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", stop_before_config)
    with pytest.raises(KeyboardInterrupt):
        fitted.save_pretrained(saved)
    with pytest.raises(ArtifactError, match="a save was interrupted"):
        load_calibrator(saved)


def test_a_file_in_the_way(data: CalibrationData, tmp_path: Path) -> None:
    (tmp_path / "x").write_text("")
    with pytest.raises(ArtifactError, match="is a file; save_pretrained needs a folder"):
        RawScore().fit(data).save_pretrained(tmp_path / "x")


def test_what_is_not_json_cannot_be_stored(data: CalibrationData, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"a object cannot be stored in config.json"):
        RawScore().fit(data).save_pretrained(tmp_path / "x", metrics={"brier": object()})
    assert list(tmp_path.iterdir()) == []
