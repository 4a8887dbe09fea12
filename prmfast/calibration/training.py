"""One resumable training loop: evaluations at even distances, best weights kept, state written at every evaluation."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from prmfast._files import atomic_path
from prmfast._progress import progress

CHECKPOINT_NAME = "fit.pt"


class Trainable(Protocol):
    """What the loop drives."""

    def advance(self, step: int) -> None:
        """One optimisation step."""

    def evaluate(self) -> float:
        """Validation loss, less is better."""

    def weights(self) -> dict[str, Tensor]:
        """A copy of what is kept of the best evaluation."""

    def state(self) -> dict[str, Any]:
        """Everything that a later process needs to go on, tensors and plain values only."""

    def restore(self, state: Mapping[str, Any]) -> None:
        """Puts `state` back."""


@dataclass(frozen=True, slots=True)
class LoopOptions:
    """How long a fit runs and where it may be resumed from.

    steps, evaluations: the validation loss is taken ``evaluations`` times, evenly spread.
    patience, min_delta: stop after ``patience`` evaluations without an improvement of ``min_delta``.
    checkpoint_dir: None, or the folder of the resumable state; ``fingerprint`` names the data and settings it belongs
    to.
    """

    steps: int
    evaluations: int = 60
    patience: int = 175
    min_delta: float = 1e-4
    checkpoint_dir: Path | None = None
    fingerprint: str = ""
    description: str = "fit"
    show: bool = True


@dataclass(slots=True)
class FitRecord:
    """What a finished fit tells: best validation loss and its step, every evaluation, steps run."""

    best_loss: float = float("inf")
    best_step: int = 0
    steps_run: int = 0
    losses: list[float] = field(default_factory=list)
    finished: bool = False


def fingerprint(settings: Mapping[str, Any], *data: str) -> str:
    """A hash of settings and of the data's own fingerprints: a checkpoint of another fit must not be continued."""
    text = json.dumps([settings, data], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def run(trainable: Trainable, options: LoopOptions) -> tuple[dict[str, Tensor], FitRecord]:
    """The best weights and the record. With a checkpoint folder a killed fit continues where it last evaluated."""
    record, best = FitRecord(), trainable.weights()
    path = None if options.checkpoint_dir is None else options.checkpoint_dir / CHECKPOINT_NAME
    if path is not None and path.exists():
        record, best = _resume(trainable, path, options.fingerprint)
    every = max(1, options.steps // options.evaluations)
    with progress(options.steps, options.description, options.show) as bar:
        bar.advance(record.steps_run)
        while not record.finished:
            for step in range(record.steps_run, min(record.steps_run + every, options.steps)):
                trainable.advance(step)
                record.steps_run += 1
                bar.advance()
            loss = trainable.evaluate()
            record.losses.append(loss)
            if loss < record.best_loss - options.min_delta:
                record.best_step = record.steps_run
            if loss < record.best_loss:
                record.best_loss, best = loss, trainable.weights()
            bar.update(loss=loss, best=record.best_loss)
            waited = (record.steps_run - record.best_step) // every
            record.finished = record.steps_run >= options.steps or waited >= options.patience
            if path is not None:
                _save(path, trainable, record, best, options.fingerprint)
    if not torch.isfinite(torch.tensor(record.best_loss)):
        raise RuntimeError(
            f"{options.description}: no evaluation gave a finite loss; scale the inputs or lower the learning rate"
        )
    return best, record


def _save(path: Path, trainable: Trainable, record: FitRecord, best: dict[str, Tensor], mark: str) -> None:
    state = {
        "fingerprint": mark,
        "state": trainable.state(),
        "best": best,
        "record": {name: getattr(record, name) for name in FitRecord.__slots__},
        "rng": torch.get_rng_state(),
        "rng_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }
    with atomic_path(path) as temporary:
        torch.save(state, temporary)


def _resume(trainable: Trainable, path: Path, mark: str) -> tuple[FitRecord, dict[str, Tensor]]:
    try:
        state = torch.load(path, weights_only=True)
        found = state["fingerprint"]
    except Exception as error:
        raise ValueError(
            f"{path} is not a checkpoint of a fit ({error}); remove it or choose another checkpoint_dir"
        ) from error
    if found != mark:
        raise ValueError(
            f"{path} belongs to a fit with other data or settings; remove it or choose another checkpoint_dir"
        )
    trainable.restore(state["state"])
    torch.set_rng_state(state["rng"])
    if state.get("rng_cuda") and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["rng_cuda"])
    return FitRecord(**state["record"]), state["best"]


def checkpoint_folder(root: str | os.PathLike[str] | None, name: str) -> Path | None:
    """The sub-folder of one candidate's fit."""
    return None if root is None else Path(root) / name
