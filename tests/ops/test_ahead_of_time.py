"""Every Triton kernel compiles for sm_80 and sm_90 without a GPU, spills nothing and fits the architecture."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from prmfast.ops._backends import ROOMS, why_missing

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("room", ROOMS)
def test_no_kernel_spills(room: str) -> None:
    if why_missing(room, "triton") is not None:
        pytest.skip(f"{room} has no Triton kernels: {why_missing(room, 'triton')}")
    command = [sys.executable, "-m", "prmfast.kernels.common.ahead_of_time", "--json", room]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    told = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, cwd=ROOT)
    assert told.stdout, told.stderr[-3000:]
    found = json.loads(told.stdout)
    for kernel in found:
        print(kernel)
    assert {kernel["capability"] for kernel in found} == {80, 90}
    assert [kernel for kernel in found if kernel["problems"]] == []
    compiled = {kernel["variant"].split()[0] for kernel in found}
    assert compiled == launched(room), "variants() must list every kernel that the room launches"


def launched(room: str) -> set[str]:
    """The functions of triton_kernels.py that the room's other modules name."""
    folder = ROOT / "kernels" / room
    tree = ast.parse((folder / "triton_kernels.py").read_text())
    functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    others = [path.read_text() for path in folder.glob("*.py") if path.name != "triton_kernels.py"]
    return functions & {name for text in others for name in re.findall(r"kernels\.(\w+)", text)}
