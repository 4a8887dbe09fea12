"""Cases one after the other, each in a process of its own, and the results kept after each."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from prmfast._files import write_json
from prmfast._progress import progress
from prmfast.bench.case import Case
from prmfast.bench.machine import describe_gpu, describe_kernels
from prmfast.bench.run_case import Options, Row, request, run_case
from prmfast.bench.threads import environment

KEY = ("room", "op", "size", "dtype", "variant", "threads")


@dataclass(slots=True)
class Results:
    """``runs``: machines, versions, commit and date. ``rows`` and ``scaling``: each points at its run by index.

    ``other``: what else stands in the file, kept as it is.
    """

    runs: list[dict[str, Any]] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    scaling: list[Row] = field(default_factory=list)
    other: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Results:
        """What an earlier run left in ``path``; empty where there is none."""
        if not path.exists():
            return cls()
        known = json.loads(path.read_text(encoding="utf-8"))
        runs, rows, scaling = (known.pop(name, []) for name in ("runs", "rows", "scaling"))
        return cls(runs, rows, scaling, known)

    def add(self, rows: Sequence[Row], run: int, *, scaling: bool) -> None:
        """Puts ``rows`` in the place of earlier ones of the same case."""
        known = self.scaling if scaling else self.rows
        for row in rows:
            key = [row[name] for name in KEY]
            row = {**row, "run": run}
            at = next((i for i, old in enumerate(known) if [old[name] for name in KEY] == key), None)
            if at is None:
                known.append(row)
            else:
                known[at] = row

    def write(self, path: Path) -> None:
        """Atomically; runs that no row points at any more are dropped."""
        used = sorted({row["run"] for row in (*self.rows, *self.scaling)})
        new = {old: i for i, old in enumerate(used)}

        def renumbered(rows: list[Row]) -> list[Row]:
            return [{**row, "run": new[row["run"]]} for row in rows]

        runs = [self.runs[i] for i in used]
        own = {"runs": runs, "rows": renumbered(self.rows), "scaling": renumbered(self.scaling)}
        write_json(path, self.other | own)


def start(case: Case, options: Options) -> list[Row]:
    """The rows of ``case``, from a fresh process with the thread counts in its environment."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="prmfast-bench-") as folder:
        asked, told = Path(folder) / "request.json", Path(folder) / "rows.json"
        write_json(asked, request(case, str(told), options))
        command = [sys.executable, "-m", "prmfast.bench.run_case", str(asked)]
        done = subprocess.run(
            command, env=environment(options.threads), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
        )
        if told.exists():
            found: list[Row] = json.loads(told.read_text(encoding="utf-8"))
            return [{**row, "took": time.perf_counter() - started} for row in found]
    last = done.stdout.decode(errors="replace").strip()[-1500:]
    about = {"room": case.room, "op": case.op, "size": case.size, "dtype": case.dtype, "table": case.table}
    ended = {"threads": options.threads, "status": "crashed", "error": f"exit status {done.returncode}: {last}"}
    return [{**about, **ended, "variant": variant} for variant in case.variants]


def within(case: Case, options: Options) -> list[Row]:
    """The rows of ``case`` from this process: starting CUDA anew would take longer than most cases."""
    started = time.perf_counter()
    try:
        rows = run_case(case, options)
    except Exception as error:  # out of memory, say: the other cases still count
        about = {"room": case.room, "op": case.op, "size": case.size, "dtype": case.dtype, "table": case.table}
        ended = {"threads": options.threads, "status": "crashed", "error": f"{type(error).__name__}: {error}"[:2000]}
        rows = [{**about, **ended, "variant": variant} for variant in case.variants]
    torch.cuda.empty_cache()
    return [{**row, "took": time.perf_counter() - started} for row in rows]


def run(
    cases: Sequence[Case], options: Options, output: Path | None = None, *, show: bool = True
) -> Iterator[list[Row]]:
    """Yields the rows of each case as it ends. ``output`` is written after each one, merged with what it held."""
    results = Results() if output is None else Results.read(output)
    about = describe_gpu() if options.on_gpu else {}
    results.runs.append(describe_kernels(options.threads) | about | {"fast": options.fast})
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(progress(len(cases), "benchmarks", show))
        for case in cases:
            bar.update(case=case.name)
            rows = within(case, options) if options.on_gpu else start(case, options)
            if output is not None:
                results.add(rows, len(results.runs) - 1, scaling=options.scaling)
                results.write(output)
            yield rows
            bar.advance()
