"""The embedded default: a small policy, its PRM and its task, trained by this repository's own script.

``TinyWorld.load()`` gives all of it from shipped weights in milliseconds; ``train_world(directory)`` makes them anew.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prmfast.tiny.engine import TinyEngine
    from prmfast.tiny.learner import TinyLearner
    from prmfast.tiny.prm import TinyPRM
    from prmfast.tiny.train import TrainSettings, train_world
    from prmfast.tiny.world import TinyWorld, WorldInfo

__all__ = ["TinyEngine", "TinyLearner", "TinyPRM", "TinyWorld", "TrainSettings", "WorldInfo", "train_world"]

_HOME = {
    "TinyEngine": "engine",
    "TinyLearner": "learner",
    "TinyPRM": "prm",
    "TinyWorld": "world",
    "TrainSettings": "train",
    "WorldInfo": "world",
    "train_world": "train",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"prmfast.tiny.{_HOME[name]}"), name)
    raise AttributeError(f"module 'prmfast.tiny' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
