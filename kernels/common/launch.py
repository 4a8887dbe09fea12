"""Where Triton kernels run, and what each of them is compiled to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from torch import Tensor

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""TRITON_INTERPRET=1 was set when triton was imported: kernels run on CPU tensors, slowly, on any machine."""

POINTERS = {
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
"""How a signature names a pointer to elements of a dtype."""


@dataclass(frozen=True)
class Variant:
    """One compiled form of a kernel, as ahead-of-time compilation makes it.

    types: of every argument that is no constant, by name: "*fp32", "i32", "fp32".
    constants: value of every constexpr.
    aligned: arguments known to be multiples of 16, which is what triton finds of torch's pointers at run time.
    """

    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 1
    aligned: tuple[str, ...] = field(default=())

    @property
    def name(self) -> str:
        """Kernel, dtypes of its pointers and constants in one line."""
        pointers = "/".join(dict.fromkeys(t[1:] for t in self.types.values() if t.startswith("*")))
        constants = " ".join(f"{name}={value}" for name, value in self.constants.items())
        return f"{self.kernel.__name__} [{pointers}] {constants}".rstrip()


def pointers_of(types: Mapping[str, str]) -> tuple[str, ...]:
    """The names of the pointers, all of which torch aligns unless a caller offers a slice."""
    return tuple(name for name, kind in types.items() if kind.startswith("*"))


def check_device(tensors: Iterable[Tensor]) -> None:
    """RuntimeError where the tensors are on no GPU although the kernels are compiled for one."""
    if not INTERPRETED and any(tensor.device.type != "cuda" for tensor in tensors):
        raise RuntimeError("Triton kernels run on CUDA tensors, or on CPU tensors under TRITON_INTERPRET=1")
