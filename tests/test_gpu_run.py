"""`make gpu` without a GPU: steps that end, fail, hang or lack a tool, and what is left in the results file."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from prmfast.bench.run import Results


def step(code: str, **options: object) -> gpu.Step:
    return gpu.Step("made up", [sys.executable, "-c", code], **{"limit": 60.0, **options})


def test_a_step_keeps_what_it_said() -> None:
    code = "import os; print(os.environ['WORD']); print('3 passed, 1 skipped in 2s')"
    found = gpu.run(step(code, environment={"WORD": "hello"}), 60)
    assert found["status"] == "ok"
    assert found["output"].startswith("hello")
    assert found["summary"] == "3 passed, 1 skipped"
    assert gpu.run(step("raise SystemExit(3)"), 60)["status"] == "failed"


def test_a_step_that_hangs_is_ended_with_its_children() -> None:
    code = (
        "import subprocess, sys, time; print('begun', flush=True);"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); print(child.pid, flush=True);"
        "time.sleep(60)"
    )
    found = gpu.run(step(code, limit=2.0), 60)
    assert found["status"] == "out of time"
    said = found["output"].split()
    assert said[0] == "begun"
    time.sleep(0.2)
    stat = Path(f"/proc/{said[1]}/stat")
    assert not stat.exists() or stat.read_text().rsplit(")", 1)[1].split()[0] == "Z"


def test_what_is_missing_or_late_is_not_started() -> None:
    never = "raise SystemExit('started')"
    assert gpu.run(step(never, needs="no such tool"), 60) | {"command": ""} == {
        "name": "made up",
        "command": "",
        "status": "skipped",
        "why": "no such tool",
    }
    assert gpu.run(step(never), 1)["status"] == "not run"


def test_steps_and_rows_share_a_file(tmp_path: Path) -> None:
    path = tmp_path / "a" / "gpu.json"
    gpu.write(path, [{"name": "build", "status": "ok"}])
    results = Results.read(path)
    results.runs.append({"gpu": "made up"})
    row = dict.fromkeys(("room", "op", "size", "dtype", "variant", "threads"), "x")
    results.add([row], 0, scaling=False)
    results.write(path)
    gpu.write(path, [{"name": "build", "status": "ok"}, {"name": "kernels", "status": "failed"}])
    known = json.loads(path.read_text())
    assert [s["name"] for s in known["steps"]] == ["build", "kernels"]
    assert known["rows"] == [{**row, "run": 0}]


def test_every_command_is_one_that_this_package_has(tmp_path: Path) -> None:
    listed = {s.name: s for s in gpu.steps(tmp_path / "gpu.json", quick=True)}
    assert [name for name in listed if name.startswith("benchmark")] == [f"benchmark {room}" for room in gpu.ROOMS]
    assert sum(s.limit for s in listed.values() if s.name in ("build", "environment")) < gpu.LIMIT
    found = gpu.run(listed["environment"], 60)
    assert found["status"] == "ok"
    assert json.loads(found["output"])["versions"]["torch"] == torch.__version__.split("+")[0] or "+" in found["output"]
    sanitized, name = gpu.SANITIZED.split("::")
    assert f"def {name}(" in (gpu.ROOT / sanitized).read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_a_benchmark_on_a_gpu_says_that_there_is_none() -> None:
    found = gpu.run(gpu.Step("bench", gpu.python(*gpu.BENCH, "--quick"), 60.0, dict(os.environ)), 60)
    assert found["status"] == "failed"
    assert "--device cuda needs a GPU that torch" in " ".join(found["output"].split())
