"""A fitted calibrator on disk: ``config.json`` and ``model.safetensors``, bound together by a hash; no pickle."""

from __future__ import annotations

import hashlib
import importlib
import json
import math
import os
import platform
import shutil
import tempfile
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from prmfast._version import __version__

if TYPE_CHECKING:
    from prmfast.calibration.base import Calibrator

FORMAT_VERSION = 1
CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"

# class name -> module that defines it; a fixed table, so that a config cannot name code to import
REGISTRY: dict[str, str] = {
    "RawScore": "prmfast.calibration.baselines",
    "IsotonicCalibrator": "prmfast.calibration.baselines",
    "PlattCalibrator": "prmfast.calibration.baselines",
    "TemperatureCalibrator": "prmfast.calibration.baselines",
    "LogisticCalibrator": "prmfast.calibration.baselines",
    "QuantileRegressionCalibrator": "prmfast.calibration.quantile_regression",
    "BetaBinomialCalibrator": "prmfast.calibration.beta_binomial",
    "CondOTCalibrator": "prmfast.calibration.condot",
}
_LIBRARIES = ("torch", "numpy", "scikit-learn", "safetensors")


class ArtifactError(RuntimeError):
    """A calibrator cannot be loaded from (or saved to) a folder; the message says why and what to do."""


class Provenance(BaseModel):
    """Where a fitted calibrator comes from: it is valid for this PRM, this policy and data like these only."""

    model_config = ConfigDict(extra="forbid")

    prm_id: str | None = None
    prm_revision: str | None = None
    policy_id: str | None = None
    layer: int | str | None = None
    levels: list[float] | None = None
    data: dict[str, Any] = Field(default_factory=dict)
    metrics: dict[str, Any] = Field(default_factory=dict)


class ArtifactConfig(BaseModel):
    """The whole of ``config.json``. A key it does not know is an error, not a surprise at inference time."""

    model_config = ConfigDict(extra="forbid", strict=True)

    format_version: int
    calibrator: str
    hyperparameters: dict[str, Any]
    hidden_width: int | None
    feature_names: list[str]
    without_score: bool
    fitted: dict[str, Any]
    provenance: Provenance
    prmfast_version: str
    libraries: dict[str, str]
    weights_sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


def _plain(value: Any) -> Any:
    """JSON-ready copy: tuples to lists, tensors and numpy scalars to numbers, NaN and infinity to None."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (str, int, bool)):
        return value
    kind = type(value).__name__
    raise ArtifactError(f"a {kind} cannot be stored in {CONFIG_NAME}: use numbers, strings, lists and dicts")


def library_versions() -> dict[str, str]:
    """Versions of what the numbers depend on, by distribution name; absent ones are left out."""
    found = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def save(calibrator: Calibrator, directory: str | os.PathLike[str]) -> None:
    """Writes both files as one unit: a new folder appears whole; in an existing one the config is replaced last.

    A process killed between the two replacements leaves a pair whose hash does not agree, and loading says so.
    """
    from safetensors.torch import save as to_bytes

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in calibrator._state().items()}
    # one metadata key only: safetensors writes several in random order, and equal calibrators should give equal files
    weights = to_bytes(tensors, metadata={"format": "pt"})
    config = ArtifactConfig(
        format_version=FORMAT_VERSION,
        calibrator=type(calibrator).__name__,
        hyperparameters=_plain(calibrator.hyperparameters()),
        hidden_width=calibrator.hidden_width_,
        feature_names=list(calibrator.feature_names_),
        without_score=calibrator.without_score_,
        fitted=_plain(calibrator._fitted()),
        provenance=Provenance(**_plain(calibrator.provenance_.model_dump())),
        prmfast_version=__version__,
        libraries=library_versions(),
        weights_sha256=hashlib.sha256(weights).hexdigest(),
    )
    text = json.dumps(config.model_dump(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    _write_pair(Path(directory), weights, text.encode("utf-8"))


def _write_pair(target: Path, weights: bytes, config: bytes) -> None:
    if target.exists() and not target.is_dir():
        raise ArtifactError(f"{target} is a file; save_pretrained needs a folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.", suffix=".part"))
    try:
        for name, content in ((WEIGHTS_NAME, weights), (CONFIG_NAME, config)):
            with (scratch / name).open("wb") as handle:
                handle.write(content)
                handle.flush()
                os.fsync(handle.fileno())
        if target.is_dir():
            os.replace(scratch / WEIGHTS_NAME, target / WEIGHTS_NAME)
            os.replace(scratch / CONFIG_NAME, target / CONFIG_NAME)
        else:
            umask = os.umask(0)
            os.umask(umask)
            scratch.chmod(0o777 & ~umask)
            os.replace(scratch, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def read_config(directory: str | os.PathLike[str]) -> ArtifactConfig:
    """The checked ``config.json`` of a folder, without touching its weights. Raises ArtifactError."""
    path = Path(directory) / CONFIG_NAME
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ArtifactError(f"{path} does not exist; save_pretrained writes it beside {WEIGHTS_NAME}") from error
    except (json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
        raise ArtifactError(f"{path} is damaged ({error}); fit and save the calibrator again") from error
    if not isinstance(raw, dict) or "format_version" not in raw or "calibrator" not in raw:
        raise ArtifactError(f"{path} is not a prmfast calibrator: it needs format_version and calibrator")
    found = raw["format_version"]
    if not isinstance(found, int) or isinstance(found, bool) or found < 1:
        raise ArtifactError(f"{path}: format_version must be a positive integer, got {found!r}")
    if found > FORMAT_VERSION:
        raise ArtifactError(
            f"{path} has format_version {found}, prmfast {__version__} reads up to {FORMAT_VERSION}; upgrade prmfast"
        )
    try:
        return ArtifactConfig.model_validate(raw)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()[:5])
        raise ArtifactError(f"{path} breaks format_version {found}: {problems}; save the calibrator again") from error


def read_weights(directory: str | os.PathLike[str], sha256: str) -> dict[str, Tensor]:
    """The tensors of a folder, only if the file is the one that its config was written for. Raises ArtifactError."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    path = Path(directory) / WEIGHTS_NAME
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise ArtifactError(f"{path} does not exist, but {CONFIG_NAME} does; copy both files or save again") from error
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise ArtifactError(
            f"{path} is not the file {CONFIG_NAME} was written for (sha256 {found[:12]}, expected {sha256[:12]}): "
            "it is damaged, or a save was interrupted; restore both files or save again"
        )
    try:
        return load(content)
    except SafetensorError as error:
        raise ArtifactError(f"{path} is not a safetensors file ({error}); fit and save the calibrator again") from error


def calibrator_class(name: str) -> type[Calibrator]:
    """The class that a config names, imported from the fixed table `REGISTRY`; ArtifactError for another name."""
    if name not in REGISTRY:
        known = ", ".join(sorted(REGISTRY))
        raise ArtifactError(f"unknown calibrator {name!r}; prmfast {__version__} knows {known}")
    found: type[Calibrator] = getattr(importlib.import_module(REGISTRY[name]), name)
    return found


def load(directory: str | os.PathLike[str]) -> Calibrator:
    """The calibrator saved in ``directory``, of whatever class its config names."""
    config = read_config(directory)
    return build(calibrator_class(config.calibrator), config, directory)


def build(cls: type[Calibrator], config: ArtifactConfig, directory: str | os.PathLike[str]) -> Calibrator:
    """A fitted ``cls`` from a checked config and the weights beside it."""
    tensors = read_weights(directory, config.weights_sha256)
    try:
        calibrator = cls(**config.hyperparameters)
        calibrator.hidden_width_ = config.hidden_width
        calibrator.feature_names_ = tuple(config.feature_names)
        calibrator.without_score_ = config.without_score
        calibrator.provenance_ = config.provenance
        calibrator._restore(tensors, config.fitted)
    except (TypeError, ValueError, KeyError, RuntimeError) as error:
        why = " ".join(str(error).split())
        raise ArtifactError(
            f"{directory}: {CONFIG_NAME} and {WEIGHTS_NAME} do not describe a {cls.__name__} ({why}); save it again"
        ) from error
    return calibrator
