"""``prmfast bench --profile``: a trace of torch's profiler, each case's calls of ours in a range of its name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from prmfast.bench.case import Case
from prmfast.bench.run_case import Options

CALLS = 3


def write_trace(cases: Sequence[Case], options: Options, path: Path) -> None:
    """Warm calls of every variant of ``cases``, as a trace for chrome://tracing, Perfetto or TensorBoard."""
    torch.set_num_threads(options.threads)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * options.on_gpu
    jobs = []
    for case in cases:
        with options.placed():
            job = case.make()
        for variant, call in job.ours.items():
            if call.setup is not None:
                call.setup()
            call.run()
            jobs.append((f"{case.name} {variant}".rstrip(), call))
    path.parent.mkdir(parents=True, exist_ok=True)
    with profile(activities=activities, record_shapes=True, profile_memory=True) as recorded:
        for name, call in jobs:
            for _ in range(CALLS):
                if call.setup is not None:
                    call.setup()
                with record_function(name):
                    call.run()
        if options.on_gpu:
            torch.cuda.synchronize()
    recorded.export_chrome_trace(str(path))
