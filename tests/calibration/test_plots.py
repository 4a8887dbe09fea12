from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from prmfast.calibration import plots

pytest.importorskip("matplotlib")

RNG = np.random.default_rng(0)
LEVELS = np.linspace(0, 1, 11)


def labels(axis: object) -> list[str]:
    return [str(text) for text in axis.get_legend_handles_labels()[1]]  # type: ignore[attr-defined]


def test_reliability_shows_bin_means() -> None:
    p = np.repeat([0.2, 0.8], 50)
    y = np.r_[np.zeros(25), np.ones(25), np.ones(50)]
    figure = plots.reliability({"model": torch.from_numpy(p)}, y, bins=2)
    line = figure.axes[0].get_lines()[1]
    np.testing.assert_allclose(line.get_xydata(), [[0.2, 0.5], [0.8, 1.0]])
    assert figure.axes[0].get_ylabel() == "observed success rate"
    assert figure.axes[1].get_xlabel() == "predicted success probability"
    with pytest.raises(ValueError, match=r"predictions\['x'\] must have shape \(100,\), got \(3,\)"):
        plots.reliability({"x": [0.1, 0.2, 0.3]}, y)


def test_only_falling_segments_are_marked_as_crossings() -> None:
    smooth = np.tile(LEVELS, (2, 1))
    fixed = smooth.copy()
    fixed[1, 4] = 0.1
    figure = plots.quantile_curves((LEVELS, smooth), (LEVELS, fixed), truth=[0.5, None])
    assert "crossing: falls as β rises" not in labels(figure.axes[0])
    assert "crossing: falls as β rises" in labels(figure.axes[1])
    marked = figure.axes[1].get_lines()[-1].get_xydata()
    np.testing.assert_allclose(marked[:2], [[0.3, 0.3], [0.4, 0.1]])
    with pytest.raises(ValueError, match="both methods must show the same prefixes, got 2 and 1"):
        plots.quantile_curves((LEVELS, smooth), (LEVELS, fixed[:1]))


def test_frontier_always_has_the_fixed_line() -> None:
    cost, success = np.arange(1.0, 9.0), np.linspace(0.3, 0.9, 8)
    figure = plots.frontier({"CondOT": (cost[::-1], success[::-1])}, fixed=(cost, success), oracle=(cost, success))
    axis = figure.axes[0]
    assert labels(axis) == ["fixed N", "oracle (true p)", "CondOT"]
    assert "samples per question" in axis.get_xlabel()
    assert bool((np.diff(axis.get_lines()[2].get_xdata()) > 0).all())


def test_target_curves_show_the_line_to_keep() -> None:
    targets = np.linspace(0.5, 0.9, 5)
    figure = plots.target_curves({"raw": (targets, targets - 0.2), "CondOT": (targets, targets)})
    axis = figure.axes[0]
    assert labels(axis) == ["success = target", "raw", "CondOT"]
    line = axis.get_lines()[0]
    assert list(line.get_xdata()) == list(line.get_ydata()) == [0.5, 0.9]


def test_pit_histogram_is_a_density() -> None:
    figure = plots.pit_histogram({"a": RNG.random(1000), "b": RNG.beta(2, 2, 1000)}, bins=8)
    for axis in figure.axes:
        assert sum(bar.get_height() for bar in axis.patches[:8]) / 8 == pytest.approx(1.0)


def test_png_is_written_whole(tmp_path: Path) -> None:
    figure = plots.pit_histogram({"a": RNG.random(100)})
    plots.save(figure, tmp_path / "new" / "pit.png")
    assert (tmp_path / "new" / "pit.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["pit.png"]


def test_plots_touch_neither_pyplot_nor_the_backend() -> None:
    code = (
        "import sys; from prmfast.calibration import plots; assert 'matplotlib' not in sys.modules;"
        "plots.pit_histogram({'a': [0.1, 0.9]}); assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
