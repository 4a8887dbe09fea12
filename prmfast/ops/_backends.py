"""Which backend runs a room: one table, imported lazily, and one rule for ``auto``."""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from prmfast.kernels.picnn.tuning import CUDA_DEEPEST, CUDA_NARROWEST, CUDA_WIDEST, TRITON_WIDEST

BACKENDS = ("reference", "cpu", "triton", "cuda")

_MODULES: dict[str, dict[str, str]] = {
    "picnn": {
        "reference": "prmfast.kernels.picnn.reference",
        "cpu": "prmfast.ops._cpu.picnn",
        "cuda": "prmfast.ops._cuda.picnn",
        "triton": "prmfast.kernels.picnn.triton_impl",
    },
    "ias": {
        "reference": "prmfast.kernels.ias.reference",
        "cpu": "prmfast.ops._cpu.ias",
        "triton": "prmfast.kernels.ias.triton_impl",
    },
    "candidate_td": {
        "reference": "prmfast.kernels.candidate_td.reference",
        "cpu": "prmfast.ops._cpu.candidate_td",
        "cuda": "prmfast.ops._cuda.candidate_td",
        "triton": "prmfast.kernels.candidate_td.triton_impl",
    },
    "dist_ppo": {
        "reference": "prmfast.kernels.dist_ppo.reference",
        "cpu": "prmfast.ops._cpu.dist_ppo",
        "cuda": "prmfast.ops._cuda.dist_ppo",
        "triton": "prmfast.kernels.dist_ppo.triton_impl",
    },
}
ROOMS = tuple(_MODULES)
_KINDS = {"reference": ("cpu", "cuda", "mps", "xpu", "meta"), "cpu": ("cpu",), "triton": ("cuda",), "cuda": ("cuda",)}


@dataclass(frozen=True, slots=True)
class Condition:
    """What a call must bring for a backend to take it; a fact that nobody told counts as brought."""

    fact: str
    rule: str
    holds: Callable[[Any], bool]


_AMPERE = Condition("capability", "a GPU of compute capability 8.0 or newer", lambda capability: capability >= (8, 0))
_NO_FLOAT64 = Condition("dtype", "float32, bfloat16 or float16", lambda dtype: dtype != torch.float64)

_ON_LOGITS = Condition("op", "an op on logits, not a linear one", lambda op: not op.startswith("linear"))

_CONDITIONS: dict[tuple[str, str], tuple[Condition, ...]] = {
    ("picnn", "cuda"): (
        _AMPERE,
        Condition(
            "widths",
            f"at most {CUDA_DEEPEST} hidden layers, the widest more than {CUDA_NARROWEST} and at most {CUDA_WIDEST}",
            lambda widths: len(widths) <= CUDA_DEEPEST and CUDA_NARROWEST < max(widths) <= CUDA_WIDEST,
        ),
    ),
    ("picnn", "triton"): (
        _AMPERE,
        Condition("widths", f"hidden layers at most {TRITON_WIDEST} wide", lambda widths: max(widths) <= TRITON_WIDEST),
    ),
    ("candidate_td", "cuda"): (
        _AMPERE,
        _NO_FLOAT64,
        Condition("p_min", "p_min >= 1 / 15: a row has 16 slots", lambda p_min: p_min >= 1 / 15),
        _ON_LOGITS,
    ),
    ("dist_ppo", "cuda"): (_AMPERE, _NO_FLOAT64, _ON_LOGITS),
}
"""What the backends of a GPU need beyond being there; those without a line take every call."""

_PREFERRED = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}
"""What ``auto`` tries on a kind of device, in this order; other kinds have the reference."""


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


def interpreted() -> bool:
    """Triton kernels run in its interpreter, on CPU tensors too."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _kinds(backend: str) -> tuple[str, ...]:
    """The kinds of device that ``backend`` runs on."""
    return ("cuda", "cpu") if backend == "triton" and interpreted() else _KINDS[backend]


def available(room: str, device: str | torch.device = "cpu") -> tuple[str, ...]:
    """The backends of ``room`` that run on ``device`` here, the slow truth (``reference``) first."""
    kind = torch.device(device).type
    return tuple(b for b in BACKENDS if kind in _kinds(b) and why_missing(room, b) is None)


def resolve(room: str, device: str | torch.device = "cpu", backend: str = "auto", **facts: Any) -> str:
    """The backend that a call with this ``backend`` argument takes on ``device``.

    ``auto`` takes the environment variable PRMFAST_BACKEND where it is set, else the fastest that is here and takes a
    call of these ``facts`` (dtype and whatever the room's conditions ask; see `explain`). A named backend that cannot
    be used raises: ValueError for an unknown name, a wrong device or a call that it does not take, RuntimeError where
    it is missing.
    """
    kind = device.type if isinstance(device, torch.device) else torch.device(device).type
    if backend == "auto":
        backend = os.environ.get("PRMFAST_BACKEND", "auto")
    if kind == "cuda":
        facts = {"capability": _capability(str(device)), **facts}
        if backend != "auto":
            return _named(room, kind, backend, facts)
        return next(b for b in _PREFERRED[kind] if _refusal(room, b, facts) is None)
    return _resolve(room, kind, backend)


def explain(room: str, device: str | torch.device = "cpu", **facts: Any) -> dict[str, str | None]:
    """What ``auto`` tries on ``device`` in its order, each with None where it takes such a call, else why not."""
    kind = torch.device(device).type
    if kind == "cuda":
        facts = {"capability": _capability(str(device)), **facts}
    tried = [backend for backend in _PREFERRED.get(kind, ("reference",)) if backend in _MODULES[room]]
    return {backend: _refusal(room, backend, facts) for backend in tried}


def needs(room: str, backend: str) -> tuple[str, ...]:
    """What a call must bring so that ``backend`` of ``room`` takes it, in words."""
    return tuple(condition.rule for condition in _CONDITIONS.get((room, backend), ()))


@functools.cache
def _resolve(room: str, kind: str, backend: str) -> str:
    if backend == "auto":
        return next(b for b in _PREFERRED.get(kind, ("reference",)) if why_missing(room, b) is None)
    return _named(room, kind, backend, {})


def _refusal(room: str, backend: str, facts: dict[str, Any]) -> str | None:
    """Why ``backend`` does not take a call of these facts here."""
    reason = why_missing(room, backend)
    if reason is not None:
        return reason
    for need in _CONDITIONS.get((room, backend), ()):
        told = facts.get(need.fact)
        if told is not None and not need.holds(told):
            return f"it needs {need.rule}, got {told}"
    return None


def _named(room: str, kind: str, backend: str, facts: dict[str, Any]) -> str:
    reason = why_missing(room, backend)
    usable = ", ".join(available(room, kind))
    if reason is not None:
        raise RuntimeError(f"backend={backend!r} of {room} cannot be used here: {reason}; usable on {kind}: {usable}")
    if kind not in _kinds(backend):
        raise ValueError(
            f"backend={backend!r} runs on {'/'.join(_kinds(backend))}, got tensors on {kind}; usable: {usable}"
        )
    refused = _refusal(room, backend, facts)
    if refused is not None:
        raise ValueError(f"backend={backend!r} of {room} does not take this call: {refused}; usable: {usable}")
    return backend


@functools.cache
def _capability(device: str) -> tuple[int, int] | None:
    """Of a device that is there and NVIDIA's."""
    if not torch.cuda.is_available() or torch.version.hip is not None:
        return None
    return torch.cuda.get_device_capability(device)


# all that torch.compiler.assume_constant_result does, without its import of torch._dynamo (1.5 s)
resolve._dynamo_marked_constant = True  # type: ignore[attr-defined]
