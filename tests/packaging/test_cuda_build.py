"""PRMFAST_CUDA=1: compiled where nvcc exists, a clear error where it does not."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.packaging.conftest import QUICK_BUILD, ROOT, run

ASK = "import _C; print(_C.cuda.runtime_version(), _C.cuda.device_count(), hasattr(_C, 'picnn'), _C.__file__)"


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which("nvcc") is None and "CUDA_HOME" not in os.environ, reason="needs nvcc on PATH or CUDA_HOME"
)
def test_the_cuda_build_tells_its_runtime_and_the_devices(tmp_path: Path) -> None:
    folders = ("--build-lib", tmp_path / "lib", "--build-temp", tmp_path / "objects")
    one = {"PRMFAST_CUDA": "1", "PRMFAST_CUDA_ARCHITECTURES": "80"}  # tests/cuda/test_resources.py compiles for all
    quick = {**QUICK_BUILD, "NVCC_APPEND_FLAGS": "-Xptxas=-O1 -Xcicc=-O1"}
    run(sys.executable, "setup.py", "-q", "build_ext", *folders, cwd=ROOT, **one, **quick)
    told = run(sys.executable, "-c", ASK, cwd=tmp_path / "lib" / "prmfast")
    runtime, devices, has_rooms, path = told.split()
    assert int(runtime) >= 12_000
    assert has_rooms == "True"
    if torch.version.cuda is not None or not Path("/proc/driver/nvidia").exists():
        assert int(devices) == torch.cuda.device_count()
    if shutil.which("ldd") is not None:
        assert "libcudart" not in run("ldd", path, cwd=tmp_path)  # linked statically


def test_an_unknown_architecture_is_refused(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--build-temp", str(tmp_path), "--build-lib", str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"PRMFAST_CUDA": "1", "PRMFAST_CUDA_ARCHITECTURES": "80,75", "CUDA_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "PRMFAST_CUDA_ARCHITECTURES must name 80 and 90a, got 75" in done.stderr


def test_the_cuda_build_without_nvcc_says_what_to_do(tmp_path: Path) -> None:
    nowhere = {"PATH": str(tmp_path), "PRMFAST_CUDA": "1"}
    folders = ("--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "objects"))
    environment = {key: value for key, value in os.environ.items() if key != "CUDA_HOME"} | nowhere
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", *folders],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert "PRMFAST_CUDA=1 needs nvcc: set CUDA_HOME or put nvcc on PATH, or unset PRMFAST_CUDA" in done.stderr
    assert not (tmp_path / "lib").exists()
