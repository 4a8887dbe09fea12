"""Shared fixtures: the vectors and the real data beside the repository, read in place."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported: its kernels run on CPU tensors, on any machine

SHARED = Path(os.environ.get("PRMFAST_SHARED", Path(__file__).resolve().parents[2] / "shared"))


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def _folder(name: str) -> Path:
    path = SHARED / name
    if not path.is_dir():
        pytest.skip(f"{path} is absent (set PRMFAST_SHARED to the folder that holds {name}/)")
    return path


@pytest.fixture(scope="session")
def shared_vectors() -> Path:
    return _folder("vectors")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    return _folder("data")
