"""The example of the README, run as a user runs it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "adaptive_best_of_n.py"


def test_the_example_is_short_and_says_what_was_saved(tmp_path: Path) -> None:
    assert len(EXAMPLE.read_text().splitlines()) <= 40
    done = subprocess.run([sys.executable, EXAMPLE], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    adaptive, fixed, saved = done.stdout.strip().splitlines()[-3:]
    solved, tokens = re.fullmatch(r"adaptive, target 0.9: (0\.\d+|1\.000) solved, (\d+) tokens", adaptive).groups()  # type: ignore[union-attr]
    others, more = re.fullmatch(r"fixed, N = \d+: (0\.\d+|1\.000) solved, (\d+) tokens", fixed).groups()  # type: ignore[union-attr]
    assert float(solved) >= 0.9
    assert float(others) >= float(solved)
    assert saved == f"tokens saved at equal success: {1 - int(tokens) / int(more):.0%}"
