"""The example of DistRL in TRL, run as a user runs it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "distrl_trl.py"


@pytest.mark.slow
def test_the_example_is_short_and_trains(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    assert len(EXAMPLE.read_text().splitlines()) <= 50
    paths = os.pathsep.join(filter(None, [str(EXAMPLE.parents[1]), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"CI": "true", "PYTHONPATH": paths}
    done = subprocess.run(
        [sys.executable, EXAMPLE], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    lines = re.findall(r"^(\d+)  reward ([0-9.]+)  .*dist_mass (0\.\d+)$", done.stdout, flags=re.MULTILINE)
    assert [int(step) for step, _, _ in lines] == list(range(1, 9))
    assert all(0 <= float(reward) <= 1 for _, reward, _ in lines)
