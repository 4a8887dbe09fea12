"""Compiles every variant of every Triton kernel for sm_80 and sm_90 without a GPU, and says what each one takes.

``python -m prmfast.kernels.common.ahead_of_time [--json] [room ...]`` in a process without TRITON_INTERPRET: registers,
shared memory and spills of each; exit status 1 where one spills or exceeds what the architecture has. Triton keeps
compiled kernels by the hash of their source (TRITON_CACHE_DIR), so a second run takes seconds.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from prmfast.kernels.common.launch import INTERPRETED, Variant

ROOMS = ("picnn", "ias", "candidate_td", "dist_ppo")


@dataclass(frozen=True, slots=True)
class Architecture:
    """What a block may take: threads, registers and shared memory, from the CUDA programming guide's table."""

    capability: int
    shared_bytes: int
    registers_a_block: int = 65536
    registers_a_thread: int = 255
    threads_a_block: int = 1024


ARCHITECTURES = (Architecture(80, 163 * 1024), Architecture(90, 227 * 1024))


@dataclass(frozen=True, slots=True)
class Resources:
    """Of one variant on one architecture. stack: bytes a thread keeps in local memory, 0 where nothing spills."""

    variant: str
    capability: int
    registers: int
    stack: int
    shared: int
    threads: int

    def problems(self) -> list[str]:
        """What the architecture would refuse, and spills."""
        limits = next(a for a in ARCHITECTURES if a.capability == self.capability)
        found = [
            ("spills: bytes on the stack", self.stack, 0),
            ("shared memory", self.shared, limits.shared_bytes),
            ("registers a block", self.registers * self.threads, limits.registers_a_block),
            ("registers a thread", self.registers, limits.registers_a_thread),
            ("threads a block", self.threads, limits.threads_a_block),
        ]
        return [f"{what} {value} > {most}" for what, value, most in found if value > most]


def variants(room: str) -> Iterator[Variant]:
    """Everything that the room's Triton backend launches."""
    yield from importlib.import_module(f"prmfast.kernels.{room}.triton_impl").variants()


def compile_variant(variant: Variant, architecture: Architecture) -> Resources:
    """Compiles for ``architecture`` and reads the resources from the machine code."""
    names = variant.kernel.arg_names
    missing = set(names) ^ (set(variant.types) | set(variant.constants))
    if missing:
        raise ValueError(f"{variant.name}: arguments without a type or constant, or unknown ones: {sorted(missing)}")
    source = ASTSource(
        variant.kernel,
        signature={name: variant.types.get(name, "constexpr") for name in names},
        constexprs=dict(variant.constants),
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in variant.aligned},
    )
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture.capability, 32), options=options)
    registers, stack = _usage(compiled.asm["cubin"])
    threads = 32 * compiled.metadata.num_warps
    return Resources(variant.name, architecture.capability, registers, stack, compiled.metadata.shared, threads)


def _usage(cubin: bytes) -> tuple[int, int]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        told = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.findall(r"REG:(\d+) STACK:(\d+)", told)
    return max(int(registers) for registers, _ in found), max(int(stack) for _, stack in found)


def compile_rooms(rooms: Sequence[str] = ROOMS, jobs: int = 2) -> list[Resources]:
    """Every variant of ``rooms`` on every architecture."""
    if INTERPRETED:
        raise RuntimeError("kernels are interpreted in this process: unset TRITON_INTERPRET to compile them")
    work = [(variant, architecture) for room in rooms for variant in variants(room) for architecture in ARCHITECTURES]
    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(lambda pair: compile_variant(*pair), work))


def main() -> int:
    """The command of the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rooms", nargs="*", default=ROOMS)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    found = compile_rooms(arguments.rooms or ROOMS)
    if arguments.json:
        print(json.dumps([asdict(r) | {"problems": r.problems()} for r in found], indent=1))
    else:
        for r in found:
            line = f"sm_{r.capability} {r.registers:4} registers {r.stack:5} B stack {r.shared:7} B shared  {r.variant}"
            print("  ".join([line, *r.problems()]))
    return int(any(r.problems() for r in found))


if __name__ == "__main__":
    sys.exit(main())
