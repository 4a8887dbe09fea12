"""A study: several calibrators fitted on the same traces and kept side by side, with the questions they were fitted on.

    DIR/study.json                        which questions trained, which methods and units there are
    DIR/<unit>/<method>/                  one artifact each (config.json + model.safetensors)

``prefix`` answers "how good is this partial answer" (a row per scored step), ``question`` answers "how many samples
does this question need" (a row per question, or per pilot sample where the empty answer was not scored).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from prmfast._files import write_text
from prmfast._progress import progress as progress_bar
from prmfast._version import __version__
from prmfast.calibration import artifact, metrics
from prmfast.calibration.artifact import ArtifactError
from prmfast.calibration.base import Calibrator
from prmfast.calibration.baselines import IsotonicCalibrator, LogisticCalibrator, PlattCalibrator, RawScore
from prmfast.calibration.beta_binomial import BetaBinomialCalibrator
from prmfast.calibration.condot import CondOTCalibrator
from prmfast.calibration.data import CalibrationData, Unit
from prmfast.calibration.quantile_regression import QuantileRegressionCalibrator

if TYPE_CHECKING:
    import pyarrow as pa

FORMAT_VERSION = 1
STUDY_NAME = "study.json"
UNITS: tuple[Unit, ...] = ("prefix", "question")
_CHECKPOINTS = ".checkpoints"

Factory = Callable[[int], Calibrator]  # of a seed

METHODS: dict[str, Factory] = {
    "raw": lambda seed: RawScore(),
    "isotonic": lambda seed: IsotonicCalibrator(),
    "platt": lambda seed: PlattCalibrator(),
    "logistic": lambda seed: LogisticCalibrator(),
    "qr": lambda seed: QuantileRegressionCalibrator(head="mlp", seed=seed),
    "beta-binomial": lambda seed: BetaBinomialCalibrator(seed=seed),
    "condot-dual": lambda seed: CondOTCalibrator("dual", seed=seed),
    "condot-crps": lambda seed: CondOTCalibrator("crps", seed=seed),
    "condot": lambda seed: CondOTCalibrator("binomial", seed=seed),
}


class _StudyFile(BaseModel):
    """The whole of study.json."""

    model_config = ConfigDict(extra="forbid", strict=True)

    format_version: int
    prmfast_version: str
    seed: int
    test_size: float
    units: dict[Unit, list[str]]
    training: list[str]


@dataclass(frozen=True)
class Study:
    """Fitted calibrators by unit and method, and the marks of the questions that they have seen."""

    calibrators: Mapping[Unit, Mapping[str, Calibrator]]
    training: frozenset[str]
    seed: int

    def unseen(self, data: CalibrationData) -> CalibrationData:
        """The rows of questions that no calibrator was fitted on; ValueError where none is left."""
        kept = self._is_unseen(data)
        if not kept.any():
            raise ValueError(
                f"every one of {len(set(data.question))} questions was fitted on; "
                "evaluate on other traces, or include the training questions on purpose"
            )
        return data.select(kept)

    def _is_unseen(self, data: CalibrationData) -> npt.NDArray[np.bool_]:
        return np.array([question_mark(q) not in self.training for q in data.question])

    def evaluate(
        self,
        table: pa.Table,
        *,
        include_training: bool = False,
        resamples: int = 1000,
        policy_id: str | None = None,
        progress: bool = False,
    ) -> dict[Unit, dict[str, dict[str, metrics.Interval]]]:
        """Every metric with its 95 % interval by question, by unit and method, on the questions not fitted on.

        A unit that the traces cannot give, or with no unseen question, is left out; ValueError where none is left.
        ``policy_id``: this policy's answers only.
        """
        rows = {u: r for u, r in unit_data(table, None, policy_id=policy_id).items() if u in self.calibrators}
        if not rows:
            raise ValueError(f"the traces have no rows of the units that were fitted ({', '.join(self.calibrators)})")
        if not include_training:
            judged = {unit: data for unit, data in rows.items() if self._is_unseen(data).any()}
            rows = {unit: self.unseen(data) for unit, data in (judged or rows).items()}
        found: dict[Unit, dict[str, dict[str, metrics.Interval]]] = {}
        with progress_bar(sum(len(self.calibrators[unit]) for unit in rows), "judging", progress) as bar:
            for unit, data in rows.items():
                found[unit] = {}
                for name, calibrator in self.calibrators[unit].items():
                    found[unit][name] = metrics.summary(calibrator, data, n=resamples, seed=self.seed)
                    bar.advance()
        return found

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> Study:
        """What `calibrate` wrote; ArtifactError where it is missing, damaged or newer than this version."""
        path = Path(directory) / STUDY_NAME
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise ArtifactError(
                f"{path} does not exist; `prmfast calibrate TRACES -o {directory}` writes it"
            ) from error
        except (OSError, ValueError) as error:
            raise ArtifactError(f"{path} is damaged ({error!r}); run `prmfast calibrate` again") from error
        version = raw.get("format_version") if isinstance(raw, dict) else None
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise ArtifactError(
                f"{path} has format_version {version}, prmfast {__version__} reads up to {FORMAT_VERSION}; "
                "upgrade prmfast"
            )
        try:
            found = _StudyFile.model_validate(raw)
        except ValidationError as error:
            problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()[:5])
            raise ArtifactError(f"{path} is damaged ({problems}); run `prmfast calibrate` again") from error
        calibrators: dict[Unit, dict[str, Calibrator]] = {
            unit: {name: artifact.load(Path(directory) / unit / name) for name in names}
            for unit, names in found.units.items()
        }
        return cls(calibrators, frozenset(found.training), found.seed)


def question_mark(question: str) -> str:
    """A short hash of a question id, as study.json keeps it."""
    return hashlib.sha256(question.encode()).hexdigest()[:16]


def training_questions(questions: Iterable[str], *, test_size: float, seed: int) -> frozenset[str]:
    """Marks of the questions to fit on: a split of the sorted distinct ids that does not depend on rows or units."""
    from sklearn.model_selection import ShuffleSplit

    names = sorted(set(questions))
    if len(names) < 2:
        raise ValueError(f"a split by question needs at least 2 questions, got {len(names)}")
    train, _ = next(ShuffleSplit(n_splits=1, test_size=test_size, random_state=seed).split(names))
    return frozenset(question_mark(names[i]) for i in train)


def unit_data(table: pa.Table, units: Sequence[Unit] | None, **ids: str | None) -> dict[Unit, CalibrationData]:
    """Rows by unit. ``units=None`` takes those that the traces can give; a named one that they cannot is an error."""
    found: dict[Unit, CalibrationData] = {}
    for unit in UNITS if units is None else units:
        try:
            found[unit] = CalibrationData.from_traces(table, unit=unit, **ids)
        except ValueError as error:
            if units is not None or "needs rows with a PRM score" not in str(error):
                raise
    if not found:
        raise ValueError("the traces hold no scored answer with a known outcome")
    return found


def chosen_methods(methods: Sequence[str] | Mapping[str, Factory] | None) -> dict[str, Factory]:
    """Factories by name; ValueError for a name that `METHODS` does not have."""
    if isinstance(methods, Mapping):
        return dict(methods)
    names = list(METHODS) if methods is None else list(methods)
    unknown = [name for name in names if name not in METHODS]
    if unknown or not names:
        raise ValueError(f"methods must be among {', '.join(METHODS)}, got {', '.join(unknown) or 'none'}")
    return {name: METHODS[name] for name in names}


def calibrate(
    table: pa.Table,
    directory: str | os.PathLike[str],
    *,
    methods: Sequence[str] | Mapping[str, Factory] | None = None,
    units: Sequence[Unit] | None = None,
    test_size: float = 0.2,
    seed: int = 42,
    policy_id: str | None = None,
    prm_id: str | None = None,
    progress: bool = True,
) -> Study:
    """Fits ``methods`` on a share of the questions of ``table`` and saves them to ``directory``.

    Killed at any moment and called again with the same arguments, it continues: finished fits are not repeated. The
    folder becomes a study only with its last file.

    Args:
        table: validated traces (`prmfast.traces`).
        methods: names of `METHODS` (all by default), or factories of one's own by name: seed -> calibrator.
        units: "prefix", "question"; by default those that the traces can give.
        test_size: share of the questions that no calibrator sees.
        seed: of the split and of every fit.
        policy_id: fit on this policy's answers only. prm_id: recorded with the artifacts.
    """
    factories = chosen_methods(methods)
    if not 0 < test_size < 1:
        raise ValueError(f"test_size must lie in (0, 1), got {test_size}")
    data = unit_data(table, units, policy_id=policy_id, prm_id=prm_id)
    everything = {q for rows in data.values() for q in rows.question}
    training = training_questions(everything, test_size=test_size, seed=seed)
    root = Path(directory)
    # an older study's questions must never stand beside this one's calibrators
    (root / STUDY_NAME).unlink(missing_ok=True)
    fitted: dict[Unit, dict[str, Calibrator]] = {}
    for unit, rows in data.items():
        train = rows.select(np.array([question_mark(q) in training for q in rows.question]))
        fitted[unit] = {}
        for name, make in factories.items():
            calibrator = make(seed)
            calibrator.fit(train, progress=progress, checkpoint_dir=root / _CHECKPOINTS / unit / name)
            calibrator.save_pretrained(root / unit / name)
            fitted[unit][name] = calibrator
    described = _StudyFile(
        format_version=FORMAT_VERSION,
        prmfast_version=__version__,
        seed=seed,
        test_size=test_size,
        units={unit: list(factories) for unit in data},
        training=sorted(training),
    )
    write_text(root / STUDY_NAME, json.dumps(described.model_dump(), indent=1) + "\n")
    shutil.rmtree(root / _CHECKPOINTS, ignore_errors=True)
    return Study(fitted, training, seed)


def midpoint_levels(count: int = 100) -> torch.Tensor:
    """(m + 1/2) / count: the mean of quantiles at these levels is the integral of the quantile function."""
    return (torch.arange(count) + 0.5) / count
