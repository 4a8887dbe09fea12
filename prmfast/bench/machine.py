"""Where and with what a benchmark ran."""

from __future__ import annotations

import datetime
import os
import platform
import re
import subprocess
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

LIBRARIES = ("prmfast", "torch", "numpy", "scikit-learn")
RIVALS = ("jax", "numba")


def describe(libraries: Sequence[str] = LIBRARIES) -> dict[str, object]:
    """CPU model, cores, versions and commit."""
    model = platform.processor()
    if Path("/proc/cpuinfo").exists():
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        model = names[0].split(":", 1)[1].strip() if names else model
    versions = {}
    for name in libraries:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": versions,
        "commit": commit(),
    }


def describe_kernels(threads: int) -> dict[str, object]:
    """`describe` with the rivals' versions, instruction sets, threads, compiler, load and date."""
    from prmfast._env import collect

    facts = collect()["cpu"]
    return describe((*LIBRARIES[:3], *RIVALS)) | {
        "instruction_sets": facts["instruction_sets"],
        "usable_cores": facts["cores"],
        "threads": threads,
        "compiler": compiler(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def describe_gpu() -> dict[str, object]:
    """The GPU of this process and what drives it."""
    import torch

    from prmfast._env import collect

    facts = collect()
    about = torch.cuda.get_device_properties(0)
    return {
        "gpu": about.name,
        "capability": f"{about.major}.{about.minor}",
        "multiprocessors": about.multi_processor_count,
        "driver": next((device["driver"] for device in facts["gpu"]["devices"]), None),
        "cuda": {"torch": torch.version.cuda, "extension": facts["extension"]["cuda_runtime"]},
        "triton": facts["versions"]["triton"],
    }


def commit() -> str:
    """The commit of the sources in use, ``-dirty`` where tracked files differ from it; empty outside a repository."""
    here = Path(__file__).resolve().parent

    def git(*asked: str) -> str:
        try:
            return subprocess.run(["git", *asked], cwd=here, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return ""

    tracked = git("ls-files", "--error-unmatch", str(Path(__file__).resolve()))  # not a repository around the wheel
    if not tracked:
        return ""
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":!/benchmarks/results", ":!/README.md")
    return git("rev-parse", "--short", "HEAD") + ("-dirty" if changed else "")


def compiler() -> str | None:
    """The compiler that built the extension, as the extension itself says."""
    for path in Path(__file__).resolve().parents[1].glob("_C*.so"):
        found = re.search(rb"(GCC: \([^)\0]*\) [0-9.]+|clang version [0-9.]+)", path.read_bytes())
        if found:
            return found[1].decode()
    return None
