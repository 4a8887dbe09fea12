"""What ``prmfast env`` prints: versions, the machine, and which backend of each room runs here or why it cannot."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from prmfast._version import __version__
from prmfast.ops._backends import BACKENDS, ROOMS, explain, needs, resolve, why_missing

LIBRARIES = ("torch", "numpy", "scikit-learn", "pyarrow", "triton", "transformers", "vllm")
INSTRUCTION_SETS = ("avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16")


def collect() -> dict[str, Any]:
    """Everything ``prmfast env`` knows, as plain values that `json.dumps` takes; missing things are None.

    Keys: ``versions`` (name -> version), ``cpu`` (model, instruction_sets, cores, torch_threads, OMP_NUM_THREADS),
    ``gpu`` (torch_cuda, usable, devices with name and driver), ``extension`` (missing: reason or None, kernels: the
    instruction set that they run on, cuda_runtime, cuda_devices), ``rooms`` (room -> backend -> None where usable, else
    the reason), ``auto`` (room -> device kind -> the backend that ``backend="auto"`` takes, or why it raises),
    ``on_gpu`` (room -> what auto tries there in turn, each with ``refused``: None or why it takes no call here, and
    ``needs``: what a call must bring), ``PRMFAST_BACKEND``.
    """
    return {
        "versions": {"python": platform.python_version(), "prmfast": __version__} | {n: _version(n) for n in LIBRARIES},
        "cpu": _cpu(),
        "gpu": {"torch_cuda": torch.version.cuda, "usable": torch.cuda.is_available(), "devices": _nvidia_devices()},
        "extension": _extension(),
        "rooms": {room: {backend: why_missing(room, backend) for backend in BACKENDS} for room in ROOMS},
        "auto": {room: {kind: _auto(room, kind) for kind in ("cpu", "cuda")} for room in ROOMS},
        "on_gpu": {room: _on_gpu(room) for room in ROOMS},
        "PRMFAST_BACKEND": os.environ.get("PRMFAST_BACKEND"),
    }


def render(console: Console, facts: dict[str, Any] | None = None) -> None:
    """Prints `collect`'s answer (or ``facts``, an earlier one) as two tables."""
    facts = collect() if facts is None else facts
    console.print(_machine_table(facts))
    console.print(_backend_table(facts))
    console.print(_gpu_table(facts))


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _cpu() -> dict[str, Any]:
    model, flags = platform.processor() or platform.machine(), set[str]()
    listed = Path("/proc/cpuinfo")
    if listed.exists():
        for line in listed.read_text().split("\n\n")[0].splitlines():  # the first core speaks for all
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                model = value.strip()
            elif name.strip() == "flags":
                flags = set(value.split())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "model": model,
        "instruction_sets": [name for name in INSTRUCTION_SETS if name in flags],
        "cores": cores,
        "torch_threads": torch.get_num_threads(),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
    }


def _nvidia_devices() -> list[dict[str, str]]:
    """Name and driver of each GPU as the driver's own tool tells them, also where torch was built without CUDA."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    asked = [tool, "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        told = subprocess.run(asked, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [line.rsplit(",", 1) for line in told.splitlines() if "," in line]
    return [{"name": name.strip(), "driver": driver.strip()} for name, driver in rows]


def _extension() -> dict[str, Any]:
    try:
        from prmfast.ops._cpu._extension import _C
    except ImportError as error:
        return {"missing": str(error), "kernels": None, "cuda_runtime": None, "cuda_devices": None}
    cuda = getattr(_C, "cuda", None)
    if cuda is None:
        return {"missing": None, "kernels": _C.isa(), "cuda_runtime": None, "cuda_devices": None}
    major, rest = divmod(cuda.runtime_version(), 1000)
    runtime = f"{major}.{rest // 10}"
    return {"missing": None, "kernels": _C.isa(), "cuda_runtime": runtime, "cuda_devices": cuda.device_count()}


def _auto(room: str, kind: str) -> str:
    try:
        return resolve(room, kind)
    except (RuntimeError, ValueError) as error:  # PRMFAST_BACKEND names a backend that cannot run there
        return f"raises: {error}"


def _on_gpu(room: str) -> dict[str, dict[str, Any]]:
    tried = explain(room, "cuda")
    return {name: {"refused": refused, "needs": list(needs(room, name))} for name, refused in tried.items()}


def _machine_table(facts: dict[str, Any]) -> Table:
    cpu, gpu, extension = facts["cpu"], facts["gpu"], facts["extension"]
    table = Table("", "", show_header=False, box=None, pad_edge=False)
    for name, value in facts["versions"].items():
        table.add_row(name, value or "not installed")
    table.add_row("CPU", f"{cpu['model']}, {cpu['cores']} cores")
    table.add_row("instruction sets", " ".join(cpu["instruction_sets"]) or "none of those that matter here")
    table.add_row("threads", f"torch {cpu['torch_threads']}, OMP_NUM_THREADS {cpu['OMP_NUM_THREADS'] or 'not set'}")
    table.add_row("torch's CUDA", f"{gpu['torch_cuda'] or 'none'}, {'usable' if gpu['usable'] else 'not usable'} here")
    devices = [f"{device['name']} (driver {device['driver']})" for device in gpu["devices"]]
    table.add_row("GPU", "; ".join(devices) or "none")
    if extension["missing"] is not None:
        built = extension["missing"]
    elif extension["cuda_runtime"] is None:
        built = f"C++ ({extension['kernels']}) only (PRMFAST_CUDA=1 adds CUDA)"
    else:
        built = (
            f"C++ ({extension['kernels']}) and CUDA {extension['cuda_runtime']}, {extension['cuda_devices']} devices"
        )
    table.add_row("extension", built)
    table.add_row("PRMFAST_BACKEND", facts["PRMFAST_BACKEND"] or "not set")
    return table


def _backend_table(facts: dict[str, Any]) -> Table:
    table = Table("room", *BACKENDS, "auto on cpu", "auto on cuda", title="backends")
    for room, reasons in facts["rooms"].items():
        cells = ["usable" if reasons[backend] is None else str(reasons[backend]) for backend in BACKENDS]
        table.add_row(room, *cells, facts["auto"][room]["cpu"], facts["auto"][room]["cuda"])
    return table


def _gpu_table(facts: dict[str, Any]) -> Table:
    """In which order auto tries the backends of a GPU: the first that is here and takes the call."""
    table = Table("room", "tried", "a call must bring", "here", title='backend="auto" on a GPU, in this order')
    for room, tried in facts["on_gpu"].items():
        for backend, told in tried.items():
            table.add_row(room, backend, "; ".join(told["needs"]) or "nothing more", told["refused"] or "usable")
    return table
