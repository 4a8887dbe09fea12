"""A copy of the tree to build from, and fresh environments that download nothing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LEFT_OUT = shutil.ignore_patterns(".*", "*.so", "*.egg-info", "__pycache__", "build", "dist", "results", "demo-report")
SHIPPED = ("csrc", "kernels", "prmfast", "tests")
SHIPPED_FILES = (
    *("pyproject.toml", "setup.py", "MANIFEST.in", "constraints.txt", "Makefile"),
    *("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE"),
)


QUICK_BUILD = {"CXXFLAGS": "-O1"}  # a third of -O3's time: what is packaged is tested here, not how fast it is


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Standard output of ``command``; its whole output in the error where it fails."""
    known = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PRMFAST_CUDA")}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=known | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{command} in {cwd} ended with {done.returncode}:\n{done.stdout[-8000:]}"
    return done.stdout


def copy_tree(target: Path) -> Path:
    """The sources alone, links kept as links: builds leave no trace in the repository."""
    target.mkdir()
    for folder in SHIPPED:
        shutil.copytree(ROOT / folder, target / folder, symlinks=True, ignore=LEFT_OUT)
    for name in SHIPPED_FILES:
        shutil.copy(ROOT / name, target / name)
    return target


def make_environment(target: Path) -> Path:
    """The python of a fresh environment that sees this one's packages behind its own, as plain paths."""
    run(sys.executable, "-m", "venv", "--without-pip", target, cwd=target.parent)
    site = next((target / "lib").glob("python*/site-packages"))
    paths = dict.fromkeys([sysconfig.get_paths()["purelib"], sysconfig.get_paths()["platlib"]])
    (site / "borrowed.pth").write_text("\n".join(paths) + "\n")
    return target / "bin" / "python"


def pip_install(python: Path, *what: str | Path) -> None:
    """Installs into ``python``'s environment without looking at an index or at what the borrowed packages hold."""
    options = ("--no-index", "--no-deps", "--no-build-isolation", "--ignore-installed")
    run(sys.executable, "-m", "pip", "--python", python, "install", *options, *what, cwd=python.parent)


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the sdist, and the wheel that was built from it."""
    base = tmp_path_factory.mktemp("distribution")
    tree = copy_tree(base / "tree")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", base / "dist", tree, cwd=base, **QUICK_BUILD)
    return base / "dist"
