"""What the CUDA backends take, and that the ops tell them what they ask for."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

from prmfast import ops
from prmfast.ops import _backends
from prmfast.testing import make_inputs, make_picnn


@pytest.fixture
def everything_is_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_backends, "why_missing", lambda room, backend: None)
    monkeypatch.setattr(_backends, "_capability", lambda device: (9, 0))
    monkeypatch.delenv("PRMFAST_BACKEND", raising=False)


@pytest.mark.usefixtures("everything_is_here")
@pytest.mark.parametrize(
    ("room", "facts", "refused"),
    [
        ("candidate_td", {"op": "candidate_td", "dtype": torch.bfloat16, "p_min": 0.1}, None),
        ("candidate_td", {"op": "candidate_td", "dtype": torch.float32, "p_min": 1 / 15}, None),
        ("candidate_td", {"op": "token_logprob", "dtype": torch.float16}, None),
        ("candidate_td", {"op": "candidate_td", "dtype": torch.float32, "p_min": 0.06}, "p_min >= 1 / 15.*got 0.06"),
        ("candidate_td", {"op": "candidate_td", "dtype": torch.float64, "p_min": 0.1}, "float32, bfloat16 or float16"),
        ("candidate_td", {"op": "linear_candidate_td", "dtype": torch.float32, "p_min": 0.1}, "an op on logits"),
        ("dist_ppo", {"op": "dist_ppo", "dtype": torch.float32}, None),
        ("dist_ppo", {"op": "dist_ppo", "dtype": torch.float64}, "float32, bfloat16 or float16"),
        ("dist_ppo", {"op": "linear_dist_ppo", "dtype": torch.float32}, "an op on logits"),
        ("picnn", {"widths": (64,) * 6, "dtype": torch.float64}, None),
        ("picnn", {"widths": (8, 65)}, "at most 6 hidden layers, the widest .* at most 64, got .8, 65."),
        ("picnn", {"widths": (32,) * 7}, "at most 6 hidden layers"),
        ("picnn", {"widths": (8, 16)}, ".*the widest more than 16"),
    ],
)
def test_auto_goes_on_where_cuda_does_not_take_the_call(room: str, facts: dict[str, Any], refused: str | None) -> None:
    if refused is None:
        assert ops.resolve(room, "cuda", **facts) == ops.resolve(room, "cuda", "cuda", **facts) == "cuda"
        return
    assert ops.resolve(room, "cuda", **facts) == "triton"
    with pytest.raises(ValueError, match=f"does not take this call: it needs {refused}"):
        ops.resolve(room, "cuda", "cuda", **facts)


def test_the_ops_tell_what_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[Any, ...]] = []

    def resolve(room: str, device: object, backend: str, **facts: Any) -> str:
        told.append((room, facts["op"], facts["dtype"], facts.get("p_min")))
        return "reference"

    for room in ("candidate_td", "dist_ppo"):
        monkeypatch.setattr(importlib.import_module(f"prmfast.ops.{room}"), "resolve", resolve)
    made = make_inputs("candidate_td", 3, 20, dtype=torch.float32)
    p, q = made["policy_logits"], made["reward_logits"]
    found = ops.candidate_td(p, q.double(), p_min=0.2)
    ops.token_logprob(q.bfloat16().requires_grad_(), torch.zeros(3, dtype=torch.int64)).sum().backward()
    hidden, weight = torch.ones(3, 4, requires_grad=True), torch.zeros(20, 4)
    ops.linear_candidate_td(hidden, hidden, policy_weight=weight, reward_weight=weight, p_min=0.3)
    ops.dist_ppo_loss(p.requires_grad_(), found).backward()
    ops.dist_ppo_loss_and_grad(p.detach(), found)
    ops.linear_dist_ppo_loss(hidden, weight, found).backward()
    room, other, single = "candidate_td", "dist_ppo", torch.float32
    assert told == [
        (room, "candidate_td", torch.float64, 0.2),
        *2 * [(room, "token_logprob", torch.bfloat16, None)],
        (room, "linear_candidate_td", single, 0.3),
        *3 * [(other, "dist_ppo", single, None)],
        *2 * [(other, "linear_dist_ppo", single, None)],
    ]


def test_picnn_tells_its_widths(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[Any, ...]] = []

    def resolve(room: str, device: object, backend: str, **facts: Any) -> str:
        told.append((room, facts["dtype"], facts["widths"]))
        return "reference"

    monkeypatch.setattr(importlib.import_module("prmfast.ops.picnn"), "resolve", resolve)
    ops.picnn_step(make_picnn(5, (7, 3), dtype=torch.float32), torch.zeros(2, 5), torch.zeros(2, 4))
    assert told == [("picnn", torch.float32, (7, 3))]
