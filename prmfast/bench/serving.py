"""The serving head: encoded contexts to quantiles, their mean and a budget, for one batch of questions."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from prmfast.bench import inputs
from prmfast.bench.case import Call, Case, Job, Rival, Work, assert_close
from prmfast.bench.ias import N_MAX, TARGET, bit_search_budget
from prmfast.bench.picnn import dual_numbers
from prmfast.bench.rivals import compiled
from prmfast.kernels.picnn.params import PicnnParams

RIVALS = ("torch eager", "torch.compile")


def plain(params: PicnnParams, levels: Tensor, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Quantiles, mean and budget as a user writes them with torch."""
    mapped = dual_numbers(params, context, levels)[1]
    quantiles = torch.sigmoid(mapped).cummax(1).values
    return quantiles, torch.trapezoid(quantiles, levels), bit_search_budget(quantiles, TARGET, N_MAX)


def head_job(rows: int, count: int) -> Job:
    """A head of the calibrator's size behind its encoder, at ``count`` levels."""
    from prmfast.ops import ServingHead, ias_budget

    with torch.no_grad():
        params = replace(inputs.picnn_model().params(), encoder=()).to(dtype=torch.float32)
    context, levels = inputs.normal(rows, inputs.ENCODER[-1], seed=1), inputs.levels(count)
    head = ServingHead(params, levels.tolist(), target=TARGET, n_max=N_MAX, max_batch=rows)

    def in_torch() -> Any:
        with torch.no_grad():
            return plain(params, levels, context)

    def check(out: Any) -> dict[str, float]:
        with torch.no_grad():
            truth = plain(params.to(dtype=torch.float64), levels.double(), context.double())
        assert torch.equal(out.budget, ias_budget(out.quantiles, TARGET, N_MAX, backend="reference")), "budget"
        return {
            "quantile_error": assert_close("quantiles", out.quantiles, truth[0], rtol=0, atol=3e-5),
            "mean_error": assert_close("expected", out.expected, truth[1], rtol=0, atol=3e-5),
        }

    def agree(out: Any, other: Any) -> None:
        assert_close("quantiles", other[0], out.quantiles, rtol=0, atol=1e-4)
        assert float((other[2] != out.budget).double().mean()) <= 0.02, "budgets"

    return Job(
        ours={"": Call(lambda: head.run(context))},
        rivals={
            "torch eager": Rival(lambda: Call(in_torch)),
            "torch.compile": Rival(lambda: compiled(plain, params, levels, context)),
        },
        check=check,
        agree=agree,
        work=Work("none"),
    )


def head_case(rows: int, count: int) -> Case:
    """A case of `prmfast.ops.ServingHead`."""
    return Case(
        room="picnn",
        op="ServingHead",
        size=f"B={rows} M={count}",
        dtype="float32",
        make=functools.partial(head_job, rows, count),
        tiny=functools.partial(head_job, 2, 3),
        rivals=RIVALS,
    )
