"""`prmfast._C.cuda.picnn` as the bindings offer it, with the kernels in the emulator: adapters run on CPU tensors."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from tests.cuda.library import Library, build

SOURCES = (
    "csrc/picnn/levels_cuda.cu",
    "csrc/picnn/interpolate_cuda.cu",
    "csrc/picnn/head_cuda.cu",
    "tests/cuda/picnn_shim.cpp",
)
_INT, _LONG, _BOOL = ctypes.c_int, ctypes.c_int64, ctypes.c_bool


class _NetworkOf(ctypes.Structure):
    _fields_ = [(name, _LONG) for name in ("widths", "softplus", "square_first", "relu_gate", "curvature")] + [
        (name, ctypes.c_double) for name in ("negative_slope", "curvature_floor")
    ]


class _LevelsCall(ctypes.Structure):
    _fields_ = [
        ("rows", _LONG), ("row_stride", _LONG), ("levels", _LONG), ("level_stride", _LONG), ("count", _LONG),
        ("m", _INT), ("tolerance", ctypes.c_float), ("value", _LONG), ("gradient", _LONG),
    ]  # fmt: skip


class _HeadCall(ctypes.Structure):
    _fields_ = [
        ("input", _LONG), ("input_stride", _LONG), ("weight", _LONG), ("bias", _LONG), ("inputs", _INT),
        ("fragments", _LONG), ("levels", _LONG), ("quadrature", _LONG), ("target", _LONG), ("target_stride", _LONG),
        ("n_max", _INT), ("sigmoid", _BOOL), ("count", _LONG), ("m", _INT), ("quantiles", _LONG), ("expected", _LONG),
        ("budget", _LONG),
    ]  # fmt: skip


class Network:
    """As `_C.cuda.picnn.Network`."""

    def __init__(self, library: Library, *, widths: tuple[int, ...], **options: Any) -> None:
        self.widths = np.array(widths, np.int64)
        self.options = _NetworkOf(widths=len(widths), **options)
        row, self.bytes = np.zeros(1, np.int64), np.zeros(2, np.int64)
        library.call("picnn_network", self.widths, ctypes.byref(self.options), row, self.bytes)
        self.row = int(row[0])

    def fragment_bytes(self, split: bool) -> int:
        return int(self.bytes[int(split)])

    def arguments(self, wz: list[int]) -> tuple[object, ...]:
        return self.widths, ctypes.byref(self.options), np.array(wz, np.uint64)


class EmulatedPicnn:
    """As the module `_C.cuda.picnn`."""

    def __init__(self) -> None:
        self.library = build("picnn", *SOURCES)

    def Network(self, **options: Any) -> Network:
        return Network(self.library, **options)

    def forward(self, *, network: Network, wz: list[int], split: bool, stream: int, **call: int) -> None:
        assert stream == 0
        self.library.call("picnn_forward", *network.arguments(wz), ctypes.byref(_LevelsCall(**call)), split)

    def prepare(self, *, network: Network, wz: list[int], split: bool, fragments: int, stream: int) -> None:
        assert stream == 0
        self.library.call("picnn_prepare", *network.arguments(wz), split, fragments)

    def serve(self, *, network: Network, wz: list[int], split: bool, stream: int, **call: Any) -> None:
        assert stream == 0
        self.library.call("picnn_serve", *network.arguments(wz), ctypes.byref(_HeadCall(**call)), split)
