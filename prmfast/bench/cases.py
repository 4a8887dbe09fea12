"""Every case, in the one place where sizes stand. The sizes of the acceptance table carry ``table=True``."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from prmfast.bench import candidate_td, dist_ppo, ias, picnn, picnn_step, serving
from prmfast.bench.case import Case
from prmfast.bench.overhead import overhead_case

VOCABULARY = 151_936
GPU_ROWS = 1024  # of logits: 0.3 to 0.6 GB a side, so that bandwidth and not launches is timed
DTYPES = (torch.bfloat16, torch.float32)
GEMMS = ("GEMMs alone",)  # beside 1.2 GB of logits a side; eager torch is compared at the smaller sizes


ALL = {"table": True, "scaling": True, "gpu": True}


def _picnn() -> list[Case]:
    return [
        *(picnn.map_case("softplus", rows, 100).marked(**ALL, graph=True) for rows in (4096, 512, 64)),
        picnn.map_case("leaky_relu", 512, 100).marked(gpu=True, graph=True),
        picnn_step.step_case(512).marked(**ALL),
        *(serving.head_case(rows, 100).marked(gpu=True, cpu=False, graph=True) for rows in (1, 64, 512)),
        serving.head_case(8, 11).marked(quick=True),
        picnn.map_case("softplus", 8, 11).marked(quick=True),
        picnn_step.step_case(16).marked(quick=True),
        overhead_case(picnn.map_case("softplus", 1, 1, 8), "B=1 M=1"),
    ]


def _ias() -> list[Case]:
    sizes = [(64, 11), *((rows, columns) for columns in (11, 100) for rows in (4096, 100_000))]
    budgets = []
    for rows, columns in sizes:
        checked = ias.CHECKED[columns] if rows == 100_000 else 0
        marks = {"table": rows > 64, "scaling": rows != 4096, "gpu": True}
        budgets.append(ias.budget_case(rows, columns, checked).marked(**marks))
    return [
        *budgets,
        *(
            ias.curve_case(rows, columns).marked(table=rows > 64, scaling=rows != 4096, gpu=True)
            for rows, columns in sizes
        ),
        ias.allocate_case(100_000, 100, 800_000).marked(**ALL),
        ias.budget_case(32, 11).marked(quick=True),
        ias.curve_case(32, 11).marked(quick=True),
        ias.allocate_case(32, 11, 256).marked(quick=True),
        overhead_case(ias.budget_case(1, 10), "B=1 M=10").marked(scaling=True),
        overhead_case(ias.curve_case(1, 10), "B=1 M=10"),
        overhead_case(ias.allocate_case(1, 10, 8), "B=1 M=10"),
    ]


def _candidate_td() -> list[Case]:
    return [
        *(candidate_td.candidates_case(d, 256, VOCABULARY).marked(table=True, scaling=True) for d in DTYPES),
        *(candidate_td.candidates_case(d, GPU_ROWS, VOCABULARY).marked(gpu=True, cpu=False) for d in DTYPES),
        *(candidate_td.logprob_case(d, 256, VOCABULARY) for d in DTYPES),
        *(candidate_td.logprob_case(d, GPU_ROWS, VOCABULARY).marked(gpu=True, cpu=False) for d in DTYPES),
        candidate_td.linear_case(2048, 1024, VOCABULARY, GEMMS).marked(table=True, gpu=True),
        candidate_td.linear_case(256, 256, 20_000).marked(scaling=True),
        *(candidate_td.candidates_case(d, 4, 1000).marked(quick=True) for d in DTYPES),
        candidate_td.logprob_case(torch.float32, 4, 1000).marked(quick=True),
        candidate_td.linear_case(8, 32, 1000).marked(quick=True),
        overhead_case(candidate_td.candidates_case(torch.float32, 1, 16), "T=1 V=16"),
        overhead_case(candidate_td.logprob_case(torch.float32, 1, 16), "T=1 V=16"),
        overhead_case(candidate_td.linear_case(1, 8, 16), "T=1 d=8 V=16"),
    ]


def _dist_ppo() -> list[Case]:
    return [
        *(dist_ppo.loss_case(d, 256, VOCABULARY).marked(table=True, scaling=True) for d in DTYPES),
        *(dist_ppo.loss_case(d, GPU_ROWS, VOCABULARY).marked(gpu=True, cpu=False) for d in DTYPES),
        dist_ppo.linear_case(2048, 1024, VOCABULARY, GEMMS).marked(table=True, gpu=True),
        dist_ppo.linear_case(256, 256, 20_000).marked(scaling=True),
        *(dist_ppo.loss_case(d, 4, 1000).marked(quick=True) for d in DTYPES),
        dist_ppo.linear_case(8, 32, 1000).marked(quick=True),
        overhead_case(dist_ppo.loss_case(torch.float32, 1, 16), "T=1 V=16"),
        overhead_case(dist_ppo.linear_case(1, 8, 16), "T=1 d=8 V=16"),
    ]


@functools.cache
def all_cases() -> tuple[Case, ...]:
    """All of them, by room."""
    cases = (*_picnn(), *_ias(), *_candidate_td(), *_dist_ppo())
    assert len({case.name for case in cases}) == len(cases)
    return cases


ROOMS = ("picnn", "ias", "candidate_td", "dist_ppo")


def by_name(name: str) -> Case:
    """The case called ``name``."""
    return next(case for case in all_cases() if case.name == name)


def select(
    rooms: Sequence[str] = (),
    ops: Sequence[str] = (),
    sizes: Sequence[str] = (),
    dtypes: Sequence[str] = (),
    *,
    quick: bool = False,
    scaling: bool = False,
    gpu: bool = False,
) -> list[Case]:
    """Cases of these rooms and ops whose size contains one of ``sizes``; all, or the quick ones. ValueError: none."""

    def wanted(case: Case) -> bool:
        if quick or scaling:
            return case.quick if quick else case.scaling
        return case.gpu if gpu else case.cpu and not case.quick

    found = [
        case
        for case in all_cases()
        if (not rooms or case.room in rooms)
        and (not ops or case.op in ops)
        and (not dtypes or case.dtype in dtypes)
        and (not sizes or any(part in case.size for part in sizes))
        and wanted(case)
    ]
    if not found:
        known = sorted({case.op for case in all_cases()})
        raise ValueError(
            f"no case matches; rooms: {', '.join(ROOMS)}; ops: {', '.join(known)}; see prmfast bench --list"
        )
    return sorted(found, key=lambda case: not case.table)  # a run that is cut off has the rows of the README
