"""The face that every calibrator has: fit, quantile, expected, save_pretrained, from_pretrained."""

from __future__ import annotations

import abc
import inspect
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from typing_extensions import Self

from prmfast.calibration import artifact
from prmfast.calibration.artifact import ArtifactError, Provenance
from prmfast.calibration.data import NO_SCORE, CalibrationData
from prmfast.calibration.features import SCORE_FEATURE_NAMES, logit, score_features

LEVELS = tuple(i / 10 for i in range(11))
Levels = float | Sequence[float] | Tensor
Reads = Literal["score", "features", "context"]


class NotFittedError(RuntimeError):
    """A calibrator was asked for quantiles before ``fit`` or ``from_pretrained``."""


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a fitted calibrator reads of B rows: score [B], features [B, F] or None, hidden [B, d] or None; float32."""

    score: Tensor
    features: Tensor | None
    hidden: Tensor | None

    def __len__(self) -> int:
        return int(self.score.shape[0])

    def rows(self, start: int, stop: int) -> Inputs:
        """Rows ``start`` to ``stop - 1``, for evaluation in chunks."""
        part = slice(start, stop)
        features = None if self.features is None else self.features[part]
        return Inputs(self.score[part], features, None if self.hidden is None else self.hidden[part])


def check_levels(levels: Levels, rows: int, device: torch.device) -> Tensor:
    """``levels`` as float32 [M] or [rows, M] on ``device``; a number is one level. ValueError outside [0, 1]."""
    if isinstance(levels, (str, bytes)):
        raise TypeError(f"levels must be numbers, got {levels!r}")
    try:
        value = torch.as_tensor(levels, dtype=torch.float32, device=device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"levels must be a number, a flat sequence or a tensor, got {type(levels).__name__}") from error
    value = value.reshape(1) if value.ndim == 0 else value
    if value.ndim > 2 or value.numel() == 0 or (value.ndim == 2 and value.shape[0] != rows):
        raise ValueError(f"levels must have shape (M,) or ({rows}, M), got {tuple(value.shape)}")
    outside = ~((value >= 0) & (value <= 1))
    if bool(outside.any()):
        raise ValueError(f"levels must lie in [0, 1], got {value[outside][0].item()}")
    return value


class Calibrator(abc.ABC):
    """Maps what a PRM says of a prefix to the distribution of its success probability.

    A method of one's own implements `_fit`, `_quantile`, `_state` and `_restore`; constructor arguments are kept under
    their own names, as scikit-learn does, and are stored with the artifact.
    """

    # "score": the score alone; "features": score and features; "context": hidden states, or else features
    reads: ClassVar[Reads] = "context"
    hidden_width_: int | None
    feature_names_: tuple[str, ...]
    without_score_: bool
    provenance_: Provenance

    @abc.abstractmethod
    def _fit(
        self,
        data: CalibrationData,
        validation: CalibrationData | None,
        *,
        progress: bool,
        checkpoint_dir: str | os.PathLike[str] | None,
    ) -> None:
        """Fits; ``hidden_width_`` and ``feature_names_`` are set, both data sets are checked against each other."""

    @abc.abstractmethod
    def _quantile(self, inputs: Inputs, levels: Tensor) -> Tensor:
        """Unclipped quantiles [B, M] float32 at checked levels, [M] or [B, M]."""

    @abc.abstractmethod
    def _state(self) -> dict[str, Tensor]:
        """Every fitted number, as tensors."""

    @abc.abstractmethod
    def _restore(self, tensors: Mapping[str, Tensor], fitted: Mapping[str, Any]) -> None:
        """Puts `_state` and `_fitted` back; KeyError, ValueError or RuntimeError if they do not fit."""

    def _fitted(self) -> dict[str, Any]:
        """Fitted values that belong into config.json: choices made, steps taken."""
        return {}

    def fit(
        self,
        data: CalibrationData,
        validation: CalibrationData | None = None,
        *,
        progress: bool = True,
        checkpoint_dir: str | os.PathLike[str] | None = None,
    ) -> Self:
        """Fits on ``data`` and returns self.

        ``validation`` decides when to stop, where the method needs that; without it such a method holds out a fifth of
        the questions of ``data``. ``checkpoint_dir``: a method that can be resumed keeps its state there. A fit that
        fails leaves the calibrator unfitted.
        """
        for name, value in (("data", data), ("validation", validation)):
            if value is not None and not isinstance(value, CalibrationData):
                raise TypeError(f"{name} must be a CalibrationData, got {type(value).__name__}")
        self.hidden_width_ = data.hidden.shape[1] if data.hidden is not None and self.reads == "context" else None
        self.feature_names_ = () if self.reads == "score" else data.feature_names
        self.without_score_ = bool((data.score == NO_SCORE).all())
        self.provenance_ = Provenance(prm_id=data.prm_id, policy_id=data.policy_id, data=data.summary())
        try:
            if validation is not None:
                self._inputs(validation)
            self._fit(data, validation, progress=progress, checkpoint_dir=checkpoint_dir)
        except BaseException:
            del self.provenance_
            raise
        return self

    def quantile(
        self, data: CalibrationData | Tensor, levels: Levels, score: Tensor | None = None, *, clip: bool = True
    ) -> Tensor:
        """Q(level | row): quantiles of the success probability, [B, M] float32.

        ``data`` is a CalibrationData, or the hidden states [B, d] with ``score`` [B] (None only where the calibrator
        was fitted without scores). ``levels``: a number, [M], or
        [B, M] for levels of each row's own, all in [0, 1]. ``clip=False`` gives the raw map, which may leave [0, 1].
        """
        inputs = self._inputs(data, score)
        with torch.no_grad():
            values = self._quantile(inputs, check_levels(levels, len(inputs), inputs.score.device))
        return values.clamp(0.0, 1.0) if clip else values

    def expected(self, data: CalibrationData | Tensor, score: Tensor | None = None) -> Tensor:
        """E[p | row] as [B] float32: trapezoid over the clipped quantiles at levels 0.0, 0.1 ... 1.0 [D sec. 5.2]."""
        return torch.trapezoid(self.quantile(data, LEVELS, score), dx=0.1, dim=1)

    def hyperparameters(self) -> dict[str, Any]:
        """The constructor's arguments by name."""
        return {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}

    def save_pretrained(
        self,
        directory: str | os.PathLike[str],
        *,
        prm_revision: str | None = None,
        layer: int | str | None = None,
        metrics: Mapping[str, Any] | None = None,
    ) -> None:
        """Writes config.json and model.safetensors as one unit; what is given here is added to the provenance."""
        self._check_fitted()
        given = {"prm_revision": prm_revision, "layer": layer, "metrics": None if metrics is None else dict(metrics)}
        self.provenance_ = self.provenance_.model_copy(update={k: v for k, v in given.items() if v is not None})
        artifact.save(self, directory)

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike[str]) -> Self:
        """The calibrator that `save_pretrained` wrote; ArtifactError if damaged, foreign, newer or another class."""
        config = artifact.read_config(directory)
        found = artifact.calibrator_class(config.calibrator)
        if not issubclass(found, cls):
            raise ArtifactError(
                f"{directory} holds a {config.calibrator}, not a {cls.__name__}; "
                f"use {config.calibrator}.from_pretrained or prmfast.calibration.load_calibrator"
            )
        loaded = artifact.build(found, config, directory)
        assert isinstance(loaded, cls)
        return loaded

    def _check_fitted(self) -> None:
        if not hasattr(self, "provenance_"):
            name = type(self).__name__
            raise NotFittedError(f"{name} is not fitted; call fit(data) or {name}.from_pretrained(directory) first")

    def _inputs(self, data: CalibrationData | Tensor, score: Tensor | None = None) -> Inputs:
        """Checked inputs of this fitted calibrator from either form that `quantile` takes."""
        self._check_fitted()
        if isinstance(data, CalibrationData):
            if score is not None:
                raise ValueError("score is part of a CalibrationData; pass it with a tensor of hidden states only")
            inputs = Inputs(data.score, data.features, data.hidden)
            names: tuple[str, ...] = data.feature_names
        elif isinstance(data, Tensor):
            if score is None and self.without_score_:
                score = data.new_full(data.shape[:1], NO_SCORE)
            inputs, names = _from_tensors(data, score), SCORE_FEATURE_NAMES
        else:
            raise TypeError(f"data must be a CalibrationData or a tensor of hidden states, got {type(data).__name__}")
        if self.reads == "score":
            return Inputs(inputs.score, None, None)
        self._check_width(inputs)
        hidden = inputs.hidden if self.hidden_width_ is not None else None
        return Inputs(inputs.score, self._known_features(inputs, names), hidden)

    def _check_width(self, inputs: Inputs) -> None:
        width = None if inputs.hidden is None else inputs.hidden.shape[1]
        if self.hidden_width_ is not None and width != self.hidden_width_:
            had = "none" if width is None else f"width {width}"
            name = type(self).__name__
            raise ValueError(f"{name} was fitted on hidden states of width {self.hidden_width_}, got {had}")

    def _known_features(self, inputs: Inputs, names: tuple[str, ...]) -> Tensor | None:
        """The columns this calibrator was fitted on, in its own order; None if it reads hidden states instead."""
        if names == self.feature_names_:
            return inputs.features
        missing = [name for name in self.feature_names_ if name not in names]
        if missing and self.hidden_width_ is not None:
            return None
        if missing:
            raise ValueError(
                f"{type(self).__name__} was fitted on features {', '.join(self.feature_names_)}; "
                f"{', '.join(missing)} missing: pass a CalibrationData that has them"
            )
        assert inputs.features is not None
        return inputs.features[:, [names.index(name) for name in self.feature_names_]]


def _from_tensors(hidden: Tensor, score: Tensor | None) -> Inputs:
    if not isinstance(score, Tensor):
        raise TypeError(f"score must be a tensor [B] beside hidden states, got {type(score).__name__}")
    for name, value, ndim in (("data (hidden states)", hidden, 2), ("score", score, 1)):
        if not value.is_floating_point():
            raise TypeError(f"{name} must be floating point, got {value.dtype}")
        if value.ndim != ndim:
            raise ValueError(f"{name} must have {ndim} dimension{'s' * (ndim > 1)}, got shape {tuple(value.shape)}")
        if not bool(torch.isfinite(value).all()):
            row = int((~torch.isfinite(value)).reshape(len(value), -1).any(dim=1).nonzero()[0])
            raise ValueError(f"{name} must be finite, got NaN or infinity at row {row}")
    if len(hidden) != len(score):
        raise ValueError(f"score must have shape ({len(hidden)},), got {tuple(score.shape)}")
    if score.device != hidden.device:
        raise ValueError(f"score must be on {hidden.device} like the hidden states, got {score.device}")
    if bool(((score < 0) | (score > 1)).any()):
        row = int(((score < 0) | (score > 1)).nonzero()[0])
        raise ValueError(f"score must lie in [0, 1], got {score[row].item()} at row {row}")
    return Inputs(score.float(), score_features(score.float()), hidden.float())


def context_matrix(inputs: Inputs) -> Tensor:
    """What a network reads: [hidden, logit score], or [features, logit score] without hidden states."""
    source = inputs.features if inputs.hidden is None else inputs.hidden
    if source is None:
        raise ValueError("a network needs hidden states or features, got neither")
    return torch.cat((source, logit(inputs.score)[:, None]), dim=1)


class Standardiser(torch.nn.Module):
    """(x - mean) / std by column, as buffers of a network; a constant column becomes 0."""

    mean: Tensor
    scale: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("scale", torch.ones(width))

    def fit(self, values: Tensor) -> Standardiser:
        """Takes mean and population standard deviation of ``values`` [N, width] in float64."""
        exact = values.double()
        std = exact.std(dim=0, correction=0)
        constant = std <= 1e-6 * exact.abs().amax(dim=0).clamp(min=1e-30)
        self.mean.copy_(exact.mean(dim=0))
        self.scale.copy_(torch.where(constant, torch.ones_like(std), std))
        return self

    def forward(self, values: Tensor) -> Tensor:
        """Standardised values, same shape."""
        return (values - self.mean) / self.scale
