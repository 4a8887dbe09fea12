"""The embedded default: a small policy, its PRM and its task, trained by this repository's own script.

``TinyWorld.load()`` gives all of it from shipped weights in milliseconds; ``train_world(directory)`` makes them anew.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from prmfast._lazy import lazy_names

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

__getattr__, __dir__ = lazy_names(__name__, _HOME, __all__)
