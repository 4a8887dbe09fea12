"""Every CUDA source through nvcc and ptxas, for every architecture: nothing spills and every kernel fits."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
from pathlib import Path
from typing import Any

import pytest
import setuptools

from prmfast.kernels.common.ahead_of_time import Resources
from tests.cuda.library import ROOT, sources_hash

SOURCES = sorted(path.relative_to(ROOT) for path in (ROOT / "csrc").rglob("*.cu"))
HEADERS = sorted([*(ROOT / "csrc").rglob("*.h"), *(ROOT / "csrc").rglob("*.cuh")])
BUILD = ROOT / "build" / "cuda_resources"


@pytest.fixture(scope="module")
def setup() -> dict[str, Any]:
    """What setup.py defines, nothing of it run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", lambda **_: None)
        return runpy.run_path(str(ROOT / "setup.py"))


def kernels_of(told: str, ptx: str, capability: int) -> list[Resources]:
    """From what ``ptxas -v`` says, and the bounds of each kernel's blocks in its PTX."""
    bounds = dict(re.findall(r"\.entry (\w+)\(.*?\.maxntid (\d+)", ptx, re.DOTALL))
    found = []
    for part in told.split("Compiling entry function '")[1:]:
        name = part[: part.index("'")]
        assert name in bounds, f"{name} has no __launch_bounds__"
        stack, stores, loads = re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part
        ).groups()  # type: ignore[union-attr]
        registers = int(re.search(r"Used (\d+) registers", part).group(1))  # type: ignore[union-attr]
        static = re.search(r"(\d+) bytes smem", part)
        local = max(int(stack), int(stores), int(loads))
        shared = 0 if static is None else int(static.group(1))
        found.append(Resources(name, capability, registers, local, shared, int(bounds[name])))
    return found


def compile_source(nvcc: Path, flags: list[str], source: Path, architecture: str, folder: Path) -> list[Resources]:
    target = [f"-gencode=arch=compute_{architecture},code=sm_{architecture}", "-Xptxas=-v"]
    outputs = ["--keep", "--keep-dir", str(folder), "-cubin", "-o", str(folder / "out.cubin")]
    command = [str(nvcc), *flags, *target, *outputs, str(source)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    ptx = (folder / f"{source.stem}.ptx").read_text()
    return kernels_of(done.stdout + done.stderr, ptx, int(architecture.rstrip("a")))


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["80", "90a"])
@pytest.mark.parametrize("source", SOURCES, ids=str)
def test_nothing_spills(setup: dict[str, Any], source: Path, architecture: str, tmp_path: Path) -> None:
    """Kept by what the sources hold: an unchanged kernel is not compiled again."""
    assert list(setup["CUDA_ARCHITECTURES"]) == ["80", "90a"]
    root = setup["cuda_root"]()
    if root is None:
        pytest.skip("needs nvcc on PATH or CUDA_HOME")
    flags, nvcc = setup["NVCC_FLAGS"], root / "bin" / "nvcc"
    key = sources_hash([*HEADERS, ROOT / source], *flags, architecture, str(nvcc.resolve()))
    kept = BUILD / f"{source.stem}-{architecture}-{key}.json"
    if kept.exists():
        found = [Resources(**one) for one in json.loads(kept.read_text())]
    else:
        found = compile_source(nvcc, flags, source, architecture, tmp_path)
    problems = {one.variant: one.problems() for one in found if one.problems()}
    assert problems == {}
    BUILD.mkdir(parents=True, exist_ok=True)
    text = [{name: getattr(one, name) for name in Resources.__slots__} for one in found]
    kept.write_text(json.dumps(text, indent=1))


def test_what_ptxas_says_is_understood() -> None:
    told = """ptxas info    : Compiling entry function '_Z1kPf' for 'sm_90a'
ptxas info    : Function properties for _Z1kPf
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 200 registers, used 1 barriers, 512 bytes smem
"""
    (found,) = kernels_of(told, ".visible .entry _Z1kPf(\n.param .u64 p\n)\n.maxntid 512, 1, 1\n{", 90)
    assert found == Resources("_Z1kPf", 90, 200, 12, 512, 512)
    assert found.problems() == ["spills: bytes on the stack 12 > 0", "registers a block 102400 > 65536"]
