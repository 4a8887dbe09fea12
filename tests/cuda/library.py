"""Compiles CUDA sources with g++ against the stand-ins of `include`, and calls what comes out through ctypes."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
BUILD = ROOT / "build" / "emulated"
FLAGS = (
    "-std=c++17", "-O1", "-fPIC", "-shared", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-DPRMFAST_EMULATE",
    f"-I{HERE / 'include'}", f"-I{ROOT / 'csrc'}",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Launched:
    """One launch as the emulator saw it."""

    blocks: int
    threads: int
    cluster: int
    shared_bytes: int


class Library:
    """A compiled library; every call of a function that returns a message raises RuntimeError with it."""

    def __init__(self, path: Path) -> None:
        self.handle = ctypes.CDLL(str(path))
        self.handle.emulate_memory.restype = ctypes.c_void_p
        for name in ("bytes_read", "bytes_written", "launches"):
            getattr(self.handle, f"emulate_{name}").restype = ctypes.c_long

    def call(self, name: str, *arguments: object) -> None:
        """Arguments: int (64 bit), float (double), bool (int) or an array or None (its address)."""
        function = getattr(self.handle, name)
        function.restype = ctypes.c_char_p
        told = function(*(_argument(a) for a in arguments))
        if told is not None:
            raise RuntimeError(told.decode())

    def on(
        self,
        capability: int = 90,
        *,
        shared_bytes: int | None = None,
        multiprocessors: int = 4,
        backwards: bool = False,
    ) -> Library:
        """Makes the device look like this, and forgets what was counted."""
        from prmfast.kernels.common.ahead_of_time import ARCHITECTURES  # imports triton

        if shared_bytes is None:
            shared_bytes = next(a.shared_bytes for a in ARCHITECTURES if a.capability == capability)
        self.handle.emulate_device(capability, ctypes.c_long(shared_bytes), multiprocessors, int(backwards))
        self.handle.emulate_reset()
        return self

    def array(self, shape: int | tuple[int, ...], dtype: np.typing.DTypeLike, alignment: int = 16) -> np.ndarray:
        """All bits set (NaN); the byte behind its end, rounded up to ``alignment``, faults. Never freed."""
        shape = (shape,) if isinstance(shape, int) else shape
        count = int(np.prod(shape))
        size = count * np.dtype(dtype).itemsize
        address = self.handle.emulate_memory(ctypes.c_long(size), ctypes.c_long(alignment))
        raw = (ctypes.c_ubyte * size).from_address(address)
        return np.frombuffer(raw, dtype=dtype, count=count).reshape(shape)

    def copy(self, values: np.ndarray, alignment: int = 16) -> np.ndarray:
        """``values`` in memory as of `array`."""
        out = self.array(values.shape, values.dtype, alignment)
        out[...] = values
        return out

    @property
    def bytes_read(self) -> int:
        """From global memory since `on`, as far as the wrappers of csrc/common/cuda did it."""
        return int(self.handle.emulate_bytes_read())

    @property
    def bytes_written(self) -> int:
        """To global memory since `on`, likewise."""
        return int(self.handle.emulate_bytes_written())

    @property
    def launches(self) -> list[Launched]:
        """Every launch since `on`."""
        found = []
        for i in range(self.handle.emulate_launches()):
            out = (ctypes.c_long * 4)()
            self.handle.emulate_launch(ctypes.c_long(i), out)
            found.append(Launched(*out))
        return found


def _argument(value: object) -> object:
    if value is None:
        return ctypes.c_void_p(None)
    if isinstance(value, np.ndarray):
        return ctypes.c_void_p(value.ctypes.data)
    if isinstance(value, bool):
        return ctypes.c_int(value)
    if isinstance(value, int):
        return ctypes.c_int64(value)
    if isinstance(value, float):
        return ctypes.c_double(value)
    return value


def sources_hash(files: Iterable[Path], *more: str) -> str:
    """Of what the files hold."""
    digest = hashlib.sha256("\0".join(more).encode())
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def build(name: str, *sources: str) -> Library:
    """The library of ``sources`` (relative to the repository), compiled unless one of the same sources is there."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("needs g++ (or CXX)")
    headers = sorted([*(HERE / "include").iterdir(), *(ROOT / "csrc").rglob("*.h"), *(ROOT / "csrc").rglob("*.cuh")])
    files = [ROOT / source for source in sources]
    path = BUILD / f"{name}-{sources_hash([*headers, *files], compiler, *FLAGS)}.so"
    if not path.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}")
        subprocess.run([compiler, *FLAGS, "-x", "c++", *map(str, files), "-o", str(part)], check=True)
        part.replace(path)
    return Library(path)
