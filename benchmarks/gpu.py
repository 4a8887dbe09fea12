"""``make gpu``: builds, tests, sanitizes and benchmarks all on this machine's GPU, in one call under ten minutes.

Needs torch with CUDA, triton, nvcc and pybind11, and no network. Steps run one after the other, each in a process of
its own with a limit; what each one said and how long it took is written to benchmarks/results/<gpu>.json as it ends, so
a run that is cut off leaves what it had. Exit status 1 where any step failed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prmfast._files import write_json

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
LIMIT = 570.0
"""Seconds of the whole run: what is left when a step's turn comes is the most it may take."""

ROOMS = ("candidate_td", "dist_ppo", "picnn", "ias")
"""Of the benchmarks, in the order in which a run that is cut off is most useful."""

BENCH = ("-m", "prmfast.cli", "bench", "--device", "cuda")
SANITIZED = "tests/ops/test_gpu.py::test_every_kernel_once"
TAIL = 6000


@dataclass(frozen=True, slots=True)
class Step:
    """A command, the most seconds it may take, and what it needs that is missing here, if anything is.

    optional: its failure is told, but the run is not failed.
    """

    name: str
    command: list[str]
    limit: float
    environment: dict[str, str] = field(default_factory=dict)
    needs: str | None = None
    optional: bool = False


def python(*arguments: str) -> list[str]:
    """This interpreter."""
    return [sys.executable, *arguments]


def pytest(*arguments: str) -> list[str]:
    """The suite, on as many processes as the machine can take where pytest-xdist is there."""
    parallel = ["-n", str(min(8, os.cpu_count() or 1)), "--dist", "loadgroup"] if _importable("xdist") else []
    return python("-m", "pytest", "-q", "-p", "no:cacheprovider", *parallel, *arguments)


def _importable(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def _sanitizer() -> str | None:
    beside = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin" / "compute-sanitizer"
    return shutil.which("compute-sanitizer") or (str(beside) if beside.exists() else None)


def steps(output: Path, *, quick: bool) -> Iterator[Step]:
    """Everything, the proof of correctness before the benchmarks."""
    jobs = str(os.cpu_count() or 1)
    build = {"PRMFAST_CUDA": "1", "PRMFAST_BUILD_JOBS": jobs, "PRMFAST_CUDA_ARCHITECTURES": architecture()}
    yield Step("build", python("setup.py", "-q", "build_ext", "--inplace"), 240, build)
    told = "import json; from prmfast._env import collect; print(json.dumps(collect()))"
    yield Step("environment", python("-c", told), 60)
    # the rooms first: of a run that is cut off they say most
    yield Step("kernels", pytest("tests/ops", "tests/cuda", "-m", "not slow"), 240)
    tool = _sanitizer()
    for check in ("memcheck", "racecheck"):
        command = [tool or "compute-sanitizer", "--tool", check, "--error-exitcode", "9", "--target-processes", "all"]
        missing = None if tool else "compute-sanitizer is neither on PATH nor in CUDA_HOME/bin"
        command += python("-m", "pytest", "-q", "-x", SANITIZED)
        yield Step(check, command, 90, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, missing)
    for room in ROOMS:
        quickly = ["--quick"] if quick else []
        command = python(*BENCH, "--room", room, "--output", str(output), "--quiet")
        yield Step(f"benchmark {room}", command + quickly, 150)
    yield Step("profile", python(*_profile(output)), 60, optional=True)
    rest = ["--ignore=tests/ops", "--ignore=tests/cuda", "--ignore=tests/packaging"]
    yield Step("suite", pytest("tests", *rest, "-m", "not slow"), 240)


def _profile(output: Path) -> list[str]:
    trace = output.with_suffix(".trace.json.gz")
    return [*BENCH, "--room", "ias", "--size", "B=64 M=11", "--profile", str(trace)]


def run(step: Step, seconds: float) -> dict[str, Any]:
    """What became of ``step``."""
    about: dict[str, Any] = {"name": step.name, "command": " ".join(step.command)}
    if step.needs is not None:
        return about | {"status": "skipped", "why": step.needs}
    if seconds < 5:
        return about | {"status": "not run", "why": f"the run's {LIMIT:.0f} s were over"}
    started = time.perf_counter()
    environment = {**os.environ, **step.environment, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        step.command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        told, _ = process.communicate(timeout=min(step.limit, seconds))
        status = "ok" if process.returncode == 0 else "failed"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        told, _ = process.communicate()
        status = "out of time"
    about |= {"status": status, "seconds": round(time.perf_counter() - started, 1), "output": told[-TAIL:]}
    counted = re.search(r"(?:\d+ (?:passed|failed|skipped|errors?|warnings?)(?:, )?)+", told)
    return about | ({"summary": counted[0]} if counted else {})


def architecture() -> str:
    """What this GPU is built for: 90a has instructions that no other takes."""
    import torch

    return "90a" if torch.cuda.is_available() and torch.cuda.get_device_capability(0) == (9, 0) else "80"


def device() -> str:
    """The GPU's name as a file's: letters, digits and dashes."""
    import torch

    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(0).lower()).strip("-")


def write(path: Path, finished: list[dict[str, Any]]) -> None:
    """Puts the steps beside the rows that the benchmarks wrote."""
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"steps": finished} | {key: value for key, value in known.items() if key != "steps"})


def main() -> int:
    """The command of the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny benchmarks: does everything run?")
    parser.add_argument("--only", action="append", default=[], help="steps whose name contains this text; repeatable")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/<gpu>.json")
    arguments = parser.parse_args()
    output = arguments.output or RESULTS / f"{device()}.json"
    began, finished = time.perf_counter(), []
    for step in steps(output, quick=arguments.quick):
        if arguments.only and not any(part in step.name for part in arguments.only):
            continue
        print(f"== {step.name} ({time.perf_counter() - began:.0f} s)", flush=True)
        found = run(step, LIMIT - (time.perf_counter() - began))
        found["optional"] = step.optional
        finished.append(found)
        write(output, finished)
        shown = found.get("summary") or found.get("why") or ""
        print(f"   {found['status']} {shown}", flush=True)
        if found["status"] not in ("ok", "skipped"):
            print(found.get("output", ""), flush=True)
        if step.name == "build" and found["status"] != "ok":
            break
    bad = [step["name"] for step in finished if step["status"] not in ("ok", "skipped") and not step["optional"]]
    print(f"== {output}: " + (f"not ok: {', '.join(bad)}" if bad else "all ok"))
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
