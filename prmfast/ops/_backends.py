"""Which backend runs a room: one table, imported lazily, and one rule for ``auto``."""

from __future__ import annotations

import functools
import importlib
import os
from types import ModuleType

import torch

BACKENDS = ("reference", "cpu", "triton", "cuda")

_MODULES: dict[str, dict[str, str]] = {
    "picnn": {"reference": "prmfast.kernels.picnn.reference", "cpu": "prmfast.ops._cpu.picnn"},
    "ias": {"reference": "prmfast.kernels.ias.reference", "cpu": "prmfast.ops._cpu.ias"},
    "candidate_td": {
        "reference": "prmfast.kernels.candidate_td.reference",
        "cpu": "prmfast.ops._cpu.candidate_td",
    },
    "dist_ppo": {"reference": "prmfast.kernels.dist_ppo.reference", "cpu": "prmfast.ops._cpu.dist_ppo"},
}
ROOMS = tuple(_MODULES)
_DEVICES = {"reference": ("cpu", "cuda", "mps", "xpu", "meta"), "cpu": ("cpu",), "triton": ("cuda",), "cuda": ("cuda",)}


@functools.cache
def load(room: str, backend: str) -> ModuleType:
    """The module that implements ``room`` on ``backend``; ImportError where it cannot run here."""
    return importlib.import_module(_MODULES[room][backend])


@functools.cache
def why_missing(room: str, backend: str) -> str | None:
    """None where ``backend`` of ``room`` can be used on this machine, else the reason in one line."""
    if room not in _MODULES:
        raise ValueError(f"room must be one of {ROOMS}, got {room!r}")
    if backend not in BACKENDS:
        raise ValueError(f"backend must be 'auto' or one of {BACKENDS}, got {backend!r}")
    if backend not in _MODULES[room]:
        return "not part of this version"
    try:
        load(room, backend)
    except ImportError as error:
        return str(error)
    return None


def available(room: str, device: str | torch.device = "cpu") -> tuple[str, ...]:
    """The backends of ``room`` that run on ``device`` here, the slow truth (``reference``) first."""
    kind = torch.device(device).type
    return tuple(b for b in BACKENDS if kind in _DEVICES[b] and why_missing(room, b) is None)


def resolve(room: str, device: str | torch.device = "cpu", backend: str = "auto") -> str:
    """The backend that a call with this ``backend`` argument takes on ``device``.

    ``auto`` takes the environment variable PRMFAST_BACKEND where it is set, else the last of `available`. A named
    backend
    that cannot be used raises: ValueError for an unknown name or a wrong device, RuntimeError where it is missing.
    """
    kind = device.type if isinstance(device, torch.device) else torch.device(device).type
    if backend == "auto":
        backend = os.environ.get("PRMFAST_BACKEND", "auto")
    return _resolve(room, kind, backend)


@functools.cache
def _resolve(room: str, kind: str, backend: str) -> str:
    if backend == "auto":
        return available(room, kind)[-1]
    reason = why_missing(room, backend)
    usable = ", ".join(available(room, kind))
    if reason is not None:
        raise RuntimeError(f"backend={backend!r} of {room} cannot be used here: {reason}; usable on {kind}: {usable}")
    if kind not in _DEVICES[backend]:
        raise ValueError(
            f"backend={backend!r} runs on {'/'.join(_DEVICES[backend])}, got tensors on {kind}; usable: {usable}"
        )
    return backend


# all that torch.compiler.assume_constant_result does, without its import of torch._dynamo (1.5 s)
resolve._dynamo_marked_constant = True  # type: ignore[attr-defined]
