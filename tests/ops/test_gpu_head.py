"""The serving head on a GPU: the launch beside plain torch, alone, in batches and in a CUDA graph."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from prmfast import ops
from prmfast.kernels.ias.reference import ias_budget
from prmfast.ops.serving_head import Served, ServingHead
from prmfast.testing import make_picnn
from tests.ops.device import moved

HERE = torch.cuda.is_available() and "cuda" in ops.available("picnn", "cuda")
pytestmark = pytest.mark.skipif(not HERE, reason="needs a GPU and a build with PRMFAST_CUDA=1")


@pytest.mark.parametrize("batch", [1, 5, 512])
@pytest.mark.parametrize("widths", [(32, 32), (64, 64, 64, 64)], ids=str)
def test_a_captured_head_answers_as_plain_torch_does(batch: int, widths: tuple[int, ...]) -> None:
    g = torch.Generator().manual_seed(0)
    encoder = ((torch.randn(5, 300, generator=g) / 17, torch.randn(5, generator=g)),)
    params = replace(make_picnn(5, widths, dtype=torch.float32, curvature=True), encoder=encoder)
    levels, settings = [(i + 0.5) / 100 for i in range(100)], {"target": 0.9, "n_max": 64}
    head, context = ServingHead(moved(params, "cuda"), levels, **settings), torch.randn(batch, 300, generator=g)
    assert head.fused
    truth = ServingHead(params, levels, **settings).run(context)
    captured = head.capture(batch)
    for tensor in captured.served:
        tensor.zero_()
    captured.context.copy_(context)
    captured.replay()
    found = Served(*(t.cpu() for t in captured.served))
    torch.testing.assert_close(found.quantiles, truth.quantiles, rtol=0, atol=1e-4)
    torch.testing.assert_close(found.expected, truth.expected, rtol=0, atol=1e-4)
    assert torch.equal(found.budget, ias_budget(found.quantiles, 0.9, 64))
    eager = head.run(context.cuda())
    assert all(torch.equal(a.cpu(), b) for a, b in zip(eager, found, strict=True))


def test_a_row_does_not_depend_on_its_batch() -> None:
    params = moved(make_picnn(9, (32, 32), dtype=torch.float32, curvature=True), "cuda")
    head = ServingHead(params, [i / 10 for i in range(11)], target=0.9, n_max=64)
    context = torch.randn(512, 9, generator=torch.Generator().manual_seed(0)).cuda()
    whole = Served(*(t.clone() for t in head.run(context)))
    for first, last in ((0, 1), (3, 5), (100, 331)):
        part = head.run(context[first:last])
        assert all(torch.equal(a, b[first:last]) for a, b in zip(part, whole, strict=True))
