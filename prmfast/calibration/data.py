"""What calibrators are fitted on: scores, features or hidden states, and k successes of n trials per row."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from prmfast.calibration.features import SCORE_FEATURE_NAMES, score_features

if TYPE_CHECKING:
    import pyarrow as pa

ArrayLike = Any
Unit = Literal["prefix", "question"]
NO_SCORE = 0.5  # stands where the PRM gave no score of its own


@dataclass(frozen=True)
class CalibrationData:
    """N rows, one prefix (or one question) each: what the PRM says, and k of n trials that tell the truth.

    | field | shape, dtype | meaning |
    | --- | --- | --- |
    | score | [N] float32 | the PRM's own score, in [0, 1] |
    | features | [N, F] float32 | score features, named in ``feature_names`` |
    | hidden | [N, d] float32 or None | the PRM's hidden state at the step |
    | successes, trials | [N] int64 | k of n, n >= 1; single outcomes have n = 1 |
    | question | N strings | splits and bootstrap go by these |

    Build it with `from_arrays` or `from_traces`; a row that breaks a rule is named in the ValueError.
    """

    score: Tensor
    features: Tensor
    hidden: Tensor | None
    successes: Tensor
    trials: Tensor
    question: tuple[str, ...]
    feature_names: tuple[str, ...]
    prm_id: str | None = None
    policy_id: str | None = None

    def __post_init__(self) -> None:
        _check(self)

    def __len__(self) -> int:
        return len(self.question)

    def __repr__(self) -> str:
        width = None if self.hidden is None else self.hidden.shape[1]
        questions = len(set(self.question))
        names = ", ".join(self.feature_names)
        return f"CalibrationData({len(self)} rows, {questions} questions, features [{names}], hidden {width})"

    @property
    def target(self) -> Tensor:
        """``successes / trials`` as [N] float32: the estimate p~ of each row's success probability."""
        return (self.successes.double() / self.trials.double()).float()

    @property
    def weight(self) -> Tensor:
        """Trials as [N] float32: the weight that makes a row of k of n worth n single outcomes."""
        return self.trials.float()

    def select(self, index: Tensor | Sequence[int] | slice | np.ndarray[Any, Any]) -> CalibrationData:
        """The rows at ``index`` (integers, a boolean mask or a slice), in that order."""
        if isinstance(index, Tensor):
            index = index.cpu().numpy()
        rows = np.arange(len(self))[index if isinstance(index, slice) else np.asarray(index)]
        picked = torch.from_numpy(rows).to(self.score.device)
        return replace(
            self,
            score=self.score[picked],
            features=self.features[picked],
            hidden=None if self.hidden is None else self.hidden[picked],
            successes=self.successes[picked],
            trials=self.trials[picked],
            question=tuple(self.question[row] for row in rows),
        )

    def to(self, device: str | torch.device) -> CalibrationData:
        """The same rows with every tensor on ``device``."""
        return replace(
            self,
            score=self.score.to(device),
            features=self.features.to(device),
            hidden=None if self.hidden is None else self.hidden.to(device),
            successes=self.successes.to(device),
            trials=self.trials.to(device),
        )

    def question_codes(self) -> Tensor:
        """[N] int64, equal where the question is equal, numbered by the sorted question ids."""
        _, codes = np.unique(np.asarray(self.question, dtype=object).astype(str), return_inverse=True)
        return torch.from_numpy(codes.astype(np.int64))

    def split(self, test_size: float = 0.2, seed: int = 42) -> tuple[CalibrationData, CalibrationData]:
        """(train, test) by question: ``GroupShuffleSplit(test_size=test_size, random_state=seed)`` [D sec. 5]."""
        from sklearn.model_selection import GroupShuffleSplit

        codes = self.question_codes().numpy()
        if len(np.unique(codes)) < 2:
            raise ValueError("a split by question needs at least 2 questions, got 1")
        splitter = GroupShuffleSplit(n_splits=1, test_size=test_size, random_state=seed)
        train, test = next(splitter.split(codes, groups=codes))
        return self.select(train), self.select(test)

    def folds(self, k: int = 5, seed: int = 42) -> Iterator[tuple[CalibrationData, CalibrationData]]:
        """Yields k pairs (train, test); every question is in exactly one test part. The rows' order does not matter."""
        for train, test in self.fold_indices(k, seed):
            yield self.select(train), self.select(test)

    def fold_indices(self, k: int = 5, seed: int = 42) -> list[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]:
        """Row numbers of `folds`, so that out-of-fold predictions can be put back in place."""
        codes = self.question_codes().numpy()
        questions = int(codes.max()) + 1
        if not 2 <= k <= questions:
            raise ValueError(f"k must lie in [2, {questions}] (the number of questions), got {k}")
        fold_of = np.empty(questions, dtype=np.int64)
        fold_of[np.random.default_rng(seed).permutation(questions)] = np.arange(questions) % k
        row_fold = fold_of[codes]
        return [(np.flatnonzero(row_fold != fold), np.flatnonzero(row_fold == fold)) for fold in range(k)]

    def fingerprint(self) -> str:
        """sha256 over every value and name: equal rows in equal order give an equal hash."""
        digest = hashlib.sha256()
        for name in ("score", "features", "hidden", "successes", "trials"):
            tensor = getattr(self, name)
            digest.update(f"{name}:{None if tensor is None else tuple(tensor.shape)};".encode())
            if tensor is not None:
                digest.update(tensor.cpu().contiguous().numpy())
        digest.update("\0".join((*self.feature_names, *self.question)).encode())
        return digest.hexdigest()

    def summary(self) -> dict[str, Any]:
        """JSON-ready description that an artifact keeps of the data it was fitted on."""
        return {
            "rows": len(self),
            "questions": len(set(self.question)),
            "trials": int(self.trials.sum()),
            "success_rate": float(self.successes.sum() / self.trials.sum()),
            "hidden_width": None if self.hidden is None else int(self.hidden.shape[1]),
            "feature_names": list(self.feature_names),
            "sha256": self.fingerprint(),
        }

    @classmethod
    def from_arrays(
        cls,
        *,
        successes: ArrayLike,
        score: ArrayLike = None,
        trials: ArrayLike = None,
        hidden: ArrayLike = None,
        features: ArrayLike = None,
        feature_names: Sequence[str] | None = None,
        question: Sequence[str] | None = None,
        prm_id: str | None = None,
        policy_id: str | None = None,
    ) -> CalibrationData:
        """Checked data from tensors, arrays or lists.

        ``trials`` defaults to 1 for every row, ``question`` to a question of its own per row, ``features`` to what the
        score alone gives (`SCORE_FEATURE_NAMES`). ``score=None`` needs hidden states or features: every row then has
        the score `NO_SCORE`, which tells a calibrator nothing. Raises TypeError for a wrong kind, ValueError for a
        shape or a value.
        """
        if score is None:
            if hidden is None and features is None:
                raise ValueError("score=None needs hidden or features, got none of the three")
            score = torch.full((len(hidden if hidden is not None else features),), NO_SCORE)
        score_ = _floats("score", score)
        if score_.ndim != 1:
            raise ValueError(f"score must have shape (N,), got {tuple(score_.shape)}")
        rows = score_.shape[0]
        successes_ = _integers("successes", successes)
        if features is None:
            if feature_names is not None:
                raise ValueError("feature_names needs features, got features=None")
            features_, names = score_features(score_), SCORE_FEATURE_NAMES
        else:
            features_ = _floats("features", features)
            width = features_.shape[-1] if features_.ndim == 2 else 0
            names = tuple(feature_names) if feature_names is not None else tuple(f"x{i}" for i in range(width))
        return cls(
            score=score_,
            features=features_,
            hidden=None if hidden is None else _floats("hidden", hidden),
            successes=successes_,
            trials=torch.ones_like(successes_) if trials is None else _integers("trials", trials),
            question=tuple(f"row-{i:07d}" for i in range(rows)) if question is None else tuple(map(str, question)),
            feature_names=names,
            prm_id=prm_id,
            policy_id=policy_id,
        )

    @classmethod
    def concat(cls, parts: Sequence[CalibrationData]) -> CalibrationData:
        """The rows of all parts: empty answers and steps, say, for one calibrator that judges both.

        Hidden states are kept where every part has them; ids that differ are joined by a comma. ValueError for no part
        and for parts with different features.
        """
        if not parts:
            raise ValueError("parts must have at least one entry, got 0")
        names = parts[0].feature_names
        for i, part in enumerate(parts):
            if part.feature_names != names:
                raise ValueError(f"parts[{i}] must have the features {', '.join(names)}, got {part.feature_names}")
        hidden = [part.hidden for part in parts if part.hidden is not None]
        prms, policies = ({getattr(part, name) for part in parts} - {None} for name in ("prm_id", "policy_id"))
        return cls(
            score=torch.cat([part.score for part in parts]),
            features=torch.cat([part.features for part in parts]),
            hidden=torch.cat(hidden) if len(hidden) == len(parts) else None,
            successes=torch.cat([part.successes for part in parts]),
            trials=torch.cat([part.trials for part in parts]),
            question=tuple(question for part in parts for question in part.question),
            feature_names=names,
            prm_id=", ".join(sorted(prms)) or None,
            policy_id=", ".join(sorted(policies)) or None,
        )

    @classmethod
    def from_traces(
        cls,
        table: pa.Table | str | os.PathLike[str],
        unit: Unit = "prefix",
        *,
        policy_id: str | None = None,
        prm_id: str | None = None,
    ) -> CalibrationData:
        """Rows of a trace table or file (schema: `prmfast.traces`), of one policy if ``policy_id`` is given.

        A table without a policy column takes ``policy_id`` as its name.

        unit="prefix": a row per scored step; (k, n) are the step's rollouts where present, else (correct, 1).
        unit="question": a row per estimate of a question's success probability. Where the table has ``question_score``:
        one row per question and policy, features of the empty answer, (k, n) from ``question_successes`` and
        ``question_trials`` or, where those are absent, from the outcomes of all its samples. Else the pilot form: a row
        per scored sample with the features of that finished sample, (k, n) = the outcomes of the OTHER samples of the
        same question and policy.

        Rows without any outcome are left out. Raises ValueError when none is left.
        """
        from prmfast.calibration._from_traces import build

        return build(table, unit, policy_id=policy_id, prm_id=prm_id)


def _floats(name: str, value: ArrayLike) -> Tensor:
    try:
        tensor = value.detach() if isinstance(value, Tensor) else torch.as_tensor(np.asarray(value))
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must be a rectangular array of floats, got {type(value).__name__}") from error
    if not (tensor.is_floating_point() or tensor.dtype in (torch.int64, torch.int32)):
        raise TypeError(f"{name} must be floating point, got {tensor.dtype}")
    return tensor.float()


def _integers(name: str, value: ArrayLike) -> Tensor:
    try:
        tensor = value.detach() if isinstance(value, Tensor) else torch.as_tensor(np.asarray(value))
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must be a flat array of integers, got {type(value).__name__}") from error
    if tensor.is_floating_point() or tensor.is_complex():
        raise TypeError(f"{name} must be integers (or booleans), got {tensor.dtype}")
    return tensor.long()


def _bad_row(name: str, rule: str, values: Tensor, bad: Tensor) -> None:
    flat = bad.reshape(bad.shape[0], -1)
    if bool(flat.any()):
        row = int(flat.any(dim=1).nonzero()[0])
        column = int(flat[row].nonzero()[0])
        value = values.reshape(values.shape[0], -1)[row, column].item()
        where = f"row {row}" if values.ndim == 1 else f"row {row}, column {column}"
        raise ValueError(f"{name} must {rule}, got {value} at {where} ({int(flat.any(dim=1).sum())} such rows)")


def _check(data: CalibrationData) -> None:
    rows = len(data.question)
    if rows == 0:
        raise ValueError("data must have at least 1 row, got 0")
    _check_shapes(data, rows)
    _bad_row("score", "lie in [0, 1]", data.score, ~((data.score >= 0) & (data.score <= 1)))
    _bad_row("features", "be finite", data.features, ~torch.isfinite(data.features))
    if data.hidden is not None:
        _bad_row("hidden", "be finite", data.hidden, ~torch.isfinite(data.hidden))
    _bad_row("trials", "be at least 1", data.trials, data.trials < 1)
    _bad_row("successes", "be at least 0", data.successes, data.successes < 0)
    _bad_row("successes", "be at most trials", data.successes, data.successes > data.trials)


def _check_shapes(data: CalibrationData, rows: int) -> None:
    expected: dict[str, tuple[torch.dtype, int]] = {
        "score": (torch.float32, 1),
        "features": (torch.float32, 2),
        "hidden": (torch.float32, 2),
        "successes": (torch.int64, 1),
        "trials": (torch.int64, 1),
    }
    for name, (dtype, ndim) in expected.items():
        tensor = getattr(data, name)
        if tensor is None and name == "hidden":
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.dtype != dtype:
            raise TypeError(f"{name} must be {dtype}, got {tensor.dtype}")
        if tensor.ndim != ndim or tensor.shape[0] != rows:
            shape = f"({rows},)" if ndim == 1 else f"({rows}, width)"
            raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")
        if tensor.device != data.score.device:
            raise ValueError(f"{name} must be on {data.score.device} like score, got {tensor.device}")
    if len(data.feature_names) != data.features.shape[1]:
        raise ValueError(f"feature_names must name {data.features.shape[1]} features, got {len(data.feature_names)}")
