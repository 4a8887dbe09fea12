"""Which checkpoint of a killed run is whole."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path


def last_checkpoint(directory: str | os.PathLike[str], *, processes: int = 1) -> Path | None:
    """The last ``checkpoint-N`` folder that the Trainer finished writing before it was killed; None if there is none.

    Its state file is what is written last; every process also leaves a file with the state of its random numbers.
    """
    folder = Path(directory)
    found = sorted(
        (int(match[1]), path)
        for path in (folder.iterdir() if folder.is_dir() else ())
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name))
    )
    for step, path in reversed(found):
        names = ["rng_state.pth"] if processes == 1 else [f"rng_state_{rank}.pth" for rank in range(processes)]
        if all((path / name).exists() for name in names) and _step(path / "trainer_state.json") == step:
            return path
    return None


def _step(path: Path) -> int | None:
    """The step that a state file names; None where it is absent or torn."""
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    step = state.get("global_step") if isinstance(state, dict) else None
    return step if isinstance(step, int) else None
