"""One thread count for every library of a benchmark: the environment that has to stand before any of them is loaded."""

from __future__ import annotations

import os
from collections.abc import Mapping


def environment(threads: int, base: Mapping[str, str] | None = None) -> dict[str, str]:
    """``base`` (default: this process's environment) with the thread count of OpenMP, MKL, OpenBLAS, numba and XLA."""
    known = dict(os.environ if base is None else base)
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")
    known |= dict.fromkeys(names, str(threads))
    known["NPROC"] = str(threads)  # the size of XLA's thread pool on CPU
    ours = ("--xla_cpu_multi_thread_eigen", "intra_op_parallelism_threads")
    flags = [flag for flag in known.get("XLA_FLAGS", "").split() if not flag.startswith(ours)]
    if threads == 1:
        flags.append("--xla_cpu_multi_thread_eigen=false")
    known["XLA_FLAGS"] = " ".join([*flags, f"intra_op_parallelism_threads={threads}"])
    known["JAX_PLATFORMS"] = "cpu"
    return known
