"""One case in a process of its own: memory, correctness, rivals, interleaved rounds; its rows as JSON.

``python -m prmfast.bench.run_case OPTIONS.json`` is what `prmfast.bench.run` starts: a crash, or memory that a rival
keeps, then spoils no other case.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from prmfast._files import write_json
from prmfast.bench import ceilings, gpu, memory, timing
from prmfast.bench.case import DERIVED, FLOOR, NATURAL, Call, Case, Job, Unavailable

Row = dict[str, Any]

GPU_ROUNDS, GPU_SAMPLE = 11, 2e-3
"""Rounds on a GPU and seconds of a sample in each: everything at full size must fit into minutes there."""

COMPILED = ("compile", "jax", "numba")
"""Rivals with such a word in their name compile in their first call."""


@dataclass(frozen=True, slots=True)
class Options:
    """How a case is run. rivals: names, or parts of names, to keep; None keeps all. fast: short rounds, for tests.

    device: "cpu", or "cuda" for tensors of a GPU, timed by events.
    """

    threads: int = 1
    rivals: tuple[str, ...] | None = None
    fast: bool = False
    scaling: bool = False
    device: str = "cpu"

    @property
    def on_gpu(self) -> bool:
        """Timed on a GPU."""
        return self.device == "cuda"

    def placed(self) -> Any:
        """A context in which new tensors stand on the device; none for the CPU, where it would cost every call."""
        return torch.device(self.device) if self.on_gpu else contextlib.nullcontext()


def run_case(case: Case, options: Options) -> list[Row]:
    """The rows of ``case``, one per variant of ours. Never raises for what a rival does."""
    torch.set_num_threads(options.threads)
    about = _about(case, options)
    with options.placed():
        tiny = case.tiny()
    for call in tiny.ours.values():
        _once(call)
    del tiny
    with options.placed():
        job = case.make()
    rows, calls, known = [], {}, dict[str, float]()
    out: Any = None
    for variant, call in job.ours.items():
        row = about | {"variant": variant}
        rows.append(row)
        try:
            out, facts, known[f"ours {variant}"] = _checked(job, call, options)
            row |= facts
        except Exception as error:  # whatever our op does wrong is a failed row, not the end of the run
            row |= {"status": "failed", "error": f"{type(error).__name__}: {error}"[:2000]}
            continue
        calls[f"ours {variant}"] = call
    if not calls:
        return rows
    if options.scaling:
        return _scaling(rows, calls, options)
    rivals = _rivals(job, out, options, calls, known)
    del out
    replays = _replays(case, rows, calls) if options.on_gpu else {}
    samples = _rounds(calls | replays | ceilings.calls(job.work.ceiling, options.device), options, known)
    for row in rows:
        if row["status"] == "ok":
            _judge(row, job, samples, rivals, options)
    return rows


def _replays(case: Case, rows: Sequence[Row], calls: Mapping[str, Call]) -> dict[str, Call]:
    """Ours as CUDA graphs, where the case says that a capture is possible; a row keeps why one was not."""
    found = {}
    for row in rows:
        name = f"ours {row['variant']}"
        if case.graph and name in calls:
            try:
                found[f"graph {row['variant']}"] = gpu.captured(calls[name])
            except RuntimeError as error:
                row["graph"] = f"not captured: {error}"[:300]
    return found


def _about(case: Case, options: Options) -> Row:
    marks = {"room": case.room, "op": case.op, "size": case.size, "dtype": case.dtype, "table": case.table}
    backend = _backend(case.room, options.device)
    where = {"threads": options.threads, "device": options.device, "backend": backend}
    return marks | where | {"load": os.getloadavg()[0]}


def _backend(room: str, device: str) -> str | None:
    from prmfast.ops import resolve

    try:
        return resolve(room, device)
    except (RuntimeError, ValueError):
        return None


def _once(call: Call) -> Any:
    if call.setup is not None:
        call.setup()
    return call.run()


def _measured(job: Job, call: Call, options: Options) -> tuple[Any, int | None, float]:
    """The output, extra peak memory and seconds of one call."""
    if call.setup is not None:
        call.setup()
    start = time.perf_counter()
    out, extra = (gpu if options.on_gpu else memory).extra_peak(call.run, job.buffers)
    return out, extra, time.perf_counter() - start


def _checked(job: Job, call: Call, options: Options) -> tuple[Any, Row, float]:
    """The output of ours, what is known after it was judged, and its seconds."""
    out, extra, seconds = _measured(job, call, options)
    with options.placed():
        return out, {"status": "ok", "errors": job.check(out), "extra_peak_bytes": extra}, seconds


def _rivals(job: Job, out: Any, options: Options, calls: dict[str, Call], known: dict[str, float]) -> list[Row]:
    """Builds each rival, compares its output with ours, and adds those that do the same job to ``calls``."""
    found = []
    for name, rival in job.rivals.items():
        if options.rivals is not None and not any(part in name for part in options.rivals):
            continue
        about: Row = {"name": name, "kind": rival.kind}
        found.append(about)
        free = gpu.free_bytes() if options.on_gpu else memory.available_bytes()
        if free is not None and rival.extra_bytes > 0.8 * free:
            about["status"] = f"needs about {rival.extra_bytes / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
            continue
        try:
            with options.placed():
                call = rival.build()
            other, extra, seconds = _measured(job, call, options)
            if rival.kind != FLOOR:
                with options.placed():
                    job.agree(out, other)
            del other
            if any(word in name for word in COMPILED):  # the first call compiled
                _, extra, seconds = _measured(job, call, options)
            about["extra_peak_bytes"] = extra
        except Unavailable as error:
            about["status"] = str(error)
        except AssertionError as error:
            about["status"] = f"another answer: {error}"[:500]
        except Exception as error:
            about["status"] = f"{type(error).__name__}: {error}"[:500]
        else:
            about["status"] = "ok"
            calls[name], known[name] = call, seconds
    return found


def _rounds(calls: Mapping[str, Call], options: Options, known: Mapping[str, float]) -> dict[str, timing.Samples]:
    clock = gpu.sample if options.on_gpu else timing.sample
    if options.fast:
        return timing.interleave(calls, rounds=3, min_sample=1e-3, clock=clock)
    if options.on_gpu:
        return timing.interleave(calls, rounds=GPU_ROUNDS, min_sample=GPU_SAMPLE, clock=clock)
    return timing.interleave(calls, known=known)


def _timed(samples: timing.Samples) -> Row:
    return {"seconds": timing.spread(samples.seconds), "busy_cores": statistics.median(samples.busy)}


def _judge(row: Row, job: Job, samples: Mapping[str, timing.Samples], rivals: Sequence[Row], options: Options) -> None:
    mine = samples[f"ours {row['variant']}"]
    row |= _timed(mine) | {"rounds": len(mine.seconds), "rivals": []}
    for rival in rivals:
        entry = dict(rival)
        if rival["status"] == "ok":
            entry |= _timed(samples[rival["name"]])
            entry["ratio"] = timing.spread(timing.ratios(samples[rival["name"]], mine))
        row["rivals"].append(entry)
    row["best"] = {kind: best_of(row["rivals"], kind) for kind in (NATURAL, DERIVED, FLOOR)}
    if job.work.ceiling != "none":
        row["ceiling"] = _share(job, mine, samples, options.device)
    if f"graph {row['variant']}" in samples:
        row["graph"] = timing.spread(samples[f"graph {row['variant']}"].seconds)


def best_of(rivals: Sequence[Row], kind: str) -> str | None:
    """The fastest rival of ``kind``."""
    done = [rival for rival in rivals if rival["kind"] == kind and rival["status"] == "ok"]
    return min(done, key=lambda rival: float(rival["ratio"]["median"]))["name"] if done else None


def _share(job: Job, mine: timing.Samples, samples: Mapping[str, timing.Samples], device: str) -> Row:
    """Of what the machine could do in the same round: the work that cannot be avoided, per second."""
    work = job.work
    ways = [s.seconds for name, s in samples.items() if name.startswith("ceiling")]
    rates = [ceilings.work_per_call(work.ceiling, device) / min(way) for way in zip(*ways, strict=True)]
    shares = [work.amount / own / rate for own, rate in zip(mine.seconds, rates, strict=True)]
    return {
        "kind": work.ceiling,
        "unit": ceilings.UNITS[work.ceiling],
        "work": work.amount,
        "counted": work.note,
        "avoidable": work.avoidable,
        "rate": timing.spread([rate / 1e9 for rate in rates]),
        "share": timing.spread(shares),
    }


def _scaling(rows: list[Row], calls: Mapping[str, Call], options: Options) -> list[Row]:
    """Ours on one thread and on ``options.threads``, in alternating rounds of the same process."""

    def at(threads: int, call: Call) -> Call:
        def setup() -> None:
            torch.set_num_threads(threads)
            if call.setup is not None:
                call.setup()

        if call.setup is not None:
            return Call(call.run, setup)
        return Call(_Switched(threads, call), None)

    both = {f"{name} @{n}": at(n, call) for name, call in calls.items() for n in (1, options.threads)}
    samples = timing.interleave(both, rounds=5 if options.fast else None, budget=8.0)
    for row in rows:
        if row["status"] == "ok":
            one, many = (samples[f"ours {row['variant']} @{n}"] for n in (1, options.threads))
            row |= {"one_thread": _timed(one), "threads_used": _timed(many)}
            row["speedup"] = timing.spread(timing.ratios(one, many))
    return rows


class _Switched:
    """A call at a thread count; the count is set only where it changes, which costs nothing within a sample."""

    def __init__(self, threads: int, call: Call) -> None:
        self.threads, self.call = threads, call

    def __call__(self) -> Any:
        if torch.get_num_threads() != self.threads:
            torch.set_num_threads(self.threads)
        return self.call.run()


def main(path: str) -> None:
    """Reads ``{"case": name, "output": path, ...options}`` and writes the rows."""
    from prmfast.bench.cases import by_name

    with open(path, encoding="utf-8") as file:
        asked = json.load(file)
    name, output, rivals = asked.pop("case"), asked.pop("output"), asked.pop("rivals")
    options = Options(**asked, rivals=None if rivals is None else tuple(rivals))
    write_json(output, run_case(by_name(name), options))


def request(case: Case, output: str, options: Options) -> Row:
    """What `main` reads."""
    return {"case": case.name, "output": output, **asdict(options)}


if __name__ == "__main__":
    main(sys.argv[1])
