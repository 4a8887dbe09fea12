"""The adapters of prmfast/ops/_cuda over emulated kernels: on CPU tensors, every byte they allocate guarded."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.cuda.library import ROOT, Library

_EXTENSION = "prmfast.ops._cuda._extension"
_BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


class Room:
    """What `_C.cuda.<room>` offers, from a library whose functions are called `<room>_<name>`."""

    def __init__(self, library: Library, room: str, **constants: int) -> None:
        self._library, self._room = library, room
        self.__dict__.update(constants)

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: self._library.call(f"{self._room}_{name}", *arguments)

    def workspace_bytes(self, rows: int, columns: int) -> int:
        function = getattr(self._library.handle, f"{self._room}_workspace_bytes")
        function.restype = ctypes.c_int64
        return int(function(ctypes.c_int64(rows), ctypes.c_int64(columns)))


def guarded(library: Library, *size: Any, dtype: torch.dtype = torch.float32, device: Any = None) -> Tensor:
    """`torch.empty` in memory of NaN that faults behind its end."""
    shape = tuple(size[0]) if len(size) == 1 and not isinstance(size[0], int) else size
    bits = _BITS[dtype.itemsize]
    return torch.from_numpy(library.array(shape, bits)).view(dtype)


def guarded_copy(library: Library, x: Tensor, shift: int = 0) -> Tensor:
    """``x`` [T, V], rows packed; the first element stands ``shift`` elements behind a multiple of 16 bytes."""
    rows, columns = x.shape
    memory = guarded(library, shift + rows * columns, dtype=x.dtype)
    out = memory[shift:].view(rows, columns)
    out.copy_(x)
    return out


def adapter(library: Library, room: str, *, offers: object = None, **constants: int) -> ModuleType:
    """prmfast/ops/_cuda/<room>.py with the emulated kernels (a `Room`, or ``offers``) in place of the extension's."""

    @contextlib.contextmanager
    def stream_of(_: Tensor) -> Iterator[int]:
        yield 0

    stub = ModuleType(_EXTENSION)
    cuda = SimpleNamespace(**{room: offers or Room(library, room, **constants)})
    stub.__dict__.update(_C=SimpleNamespace(cuda=cuda), stream_of=stream_of)
    spec = importlib.util.spec_from_file_location(f"emulated_{room}", ROOT / "prmfast" / "ops" / "_cuda" / f"{room}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    before = sys.modules.get(_EXTENSION)
    sys.modules[_EXTENSION] = stub
    try:
        spec.loader.exec_module(module)
    finally:
        if before is None:
            del sys.modules[_EXTENSION]
        else:
            sys.modules[_EXTENSION] = before
    return module
