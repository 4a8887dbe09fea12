"""What a benchmark case is: an op at a size, our calls, the rivals, the truth, and the work that cannot be avoided."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

INSTALL = 'pip install "prmfast[bench]"'

NATURAL = "natural"
"""A rival that computes the formula as a user writes it."""

DERIVED = "derived"
"""A rival that was given this package's own derivation (bit search, closed-form gradient), in another runtime."""

FLOOR = "floor"
"""Not a rival: a part of the work that nobody can avoid, timed alone."""


class Unavailable(RuntimeError):
    """A rival that cannot run here; the message says why and, where that helps, what to install."""


@dataclass(frozen=True, slots=True)
class Call:
    """``run`` is timed; ``setup`` runs before each call and is not (restores what an in-place op overwrote)."""

    run: Callable[[], Any]
    setup: Callable[[], object] | None = None


@dataclass(frozen=True, slots=True)
class Rival:
    """A callable built on first use: libraries are imported and functions compiled only when it is timed.

    extra_bytes: what it needs beyond inputs and outputs, about; more than the machine has free skips it.
    """

    build: Callable[[], Call]
    kind: str = NATURAL
    extra_bytes: float = 0


@dataclass(frozen=True, slots=True)
class Work:
    """What the job must do at least, in the unit of one ceiling of `prmfast.bench.ceilings`, and where it came from.

    avoidable: it is the work of evaluating the formula as it stands, and ours may do less: shares above 1 can occur.
    """

    ceiling: str  # read | copy | gemm | none
    amount: float = 0.0  # bytes, or floating-point operations
    note: str = ""
    avoidable: bool = False


@dataclass(slots=True)
class Job:
    """A case with its inputs in memory.

    ours: our calls by variant; every variant's output goes through ``check``.
    rivals: by name; every output is compared with ours by ``agree`` before it is timed.
    check: raises AssertionError where the output is not right against float64; returns measured errors by name.
    buffers: tensors made beforehand that a call may write into, so that they are not counted as its memory.
    """

    ours: Mapping[str, Call]
    rivals: Mapping[str, Rival]
    check: Callable[[Any], dict[str, float]]
    agree: Callable[[Any, Any], None]
    work: Work
    buffers: tuple[Tensor, ...] = ()


@dataclass(frozen=True, slots=True)
class Case:
    """A job that can be made.

    tiny: makes the same job at a size that runs in microseconds, to load code before memory is measured.
    quick: part of ``--quick``. table: part of the README. scaling: part of ``--scaling``. cpu, gpu: part of a
    run on that device. graph: ours can be captured as a CUDA graph.
    """

    room: str
    op: str
    size: str
    dtype: str
    make: Callable[[], Job]
    tiny: Callable[[], Job]
    rivals: tuple[str, ...]
    variants: tuple[str, ...] = ("",)
    quick: bool = False
    table: bool = False
    scaling: bool = False
    cpu: bool = True
    gpu: bool = False
    graph: bool = False

    @property
    def name(self) -> str:
        """``room/op/dtype/size``, unique."""
        return f"{self.room}/{self.op}/{self.dtype}/{self.size}"

    def marked(self, **marks: bool) -> Case:
        """The same case with these of its last fields changed."""
        return replace(self, **marks)  # type: ignore[arg-type]


def require(library: str) -> Any:
    """The imported ``library``; Unavailable with the command that installs it."""
    import importlib

    try:
        return importlib.import_module(library)
    except ImportError as error:
        raise Unavailable(f"not installed: {INSTALL}") from error


def op(name: str) -> Callable[..., Any]:
    """``prmfast.ops``'s function ``name``."""
    from prmfast import ops

    found: Callable[..., Any] = getattr(ops, name)
    return found


def assert_close(name: str, got: Tensor, truth: Tensor, *, rtol: float, atol: float) -> float:
    """The largest absolute error; AssertionError where one exceeds ``atol + rtol * |truth|`` or shapes differ."""
    import torch

    if tuple(got.shape) != tuple(truth.shape):
        raise AssertionError(f"{name}: shape {tuple(got.shape)}, expected {tuple(truth.shape)}")
    if got.numel() == 0:
        return 0.0
    error = (got.double() - truth.double()).abs()
    both = torch.isinf(truth) & (got == truth)  # a masked token's -inf
    error = torch.where(both, 0.0, error)
    bad = ~(error <= atol + rtol * truth.double().abs())
    if bool((bad & ~both).any()):
        where = tuple(int(i) for i in (bad & ~both).nonzero()[0])
        raise AssertionError(
            f"{name}: {float(got[where]):.9g} at {where}, expected {float(truth[where]):.9g} (rtol {rtol}, atol {atol})"
        )
    return float(error.max())
