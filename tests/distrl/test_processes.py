"""Two gloo processes do what one does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from prmfast._threads import one_thread
from prmfast.distrl import Loop, LoopConfig
from prmfast.tiny import TinyLearner, TinyWorld
from tests.distrl.processes import finish, loops, start, trained


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    if not torch.distributed.is_gloo_available():
        pytest.skip("torch was built without gloo")
    ranks = start("loop", tmp_path)
    (tmp_path / "one").mkdir()
    with one_thread():
        one = loops(tmp_path / "one")
    finish(ranks)
    two: list[dict[str, Any]] = [torch.load(tmp_path / f"loop-{rank}.pt") for rank in range(2)]
    for name, expected in one.items():
        assert all(record["gradient_norm"] > 0 for record in expected["history"]), name
        for found in two:
            for own, other in zip(found[name]["history"], expected["history"], strict=True):
                assert own.keys() == other.keys()
                numbers = {key for key, value in other.items() if isinstance(value, float | int)}
                assert all(own[key] == other[key] for key in own.keys() - numbers), name
                for key in numbers:
                    assert own[key] == pytest.approx(other[key], rel=1e-5, abs=1e-9), (name, key)
            for mine, theirs in zip(found[name]["weights"], expected["weights"], strict=True):
                torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)
        for a, b in zip(two[0][name]["weights"], two[1][name]["weights"], strict=True):
            assert torch.equal(a, b), name
    assert (tmp_path / "checkpoint" / "distrl.pt").exists()


@pytest.mark.slow
def test_two_processes_of_the_trl_trainer_equal_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups are split between the processes; an update is made of two accumulated micro-batches there, of one here."""
    pytest.importorskip("trl")
    if not torch.distributed.is_gloo_available():
        pytest.skip("torch was built without gloo")
    monkeypatch.setenv("CI", "true")
    ranks = start("trl", tmp_path)
    with one_thread():
        one = trained(tmp_path / "one", per_device=12, accumulation=1)
    finish(ranks)
    for rank in range(2):
        two = torch.load(tmp_path / f"trl-{rank}.pt")
        torch.testing.assert_close(torch.tensor(two["log"]), torch.tensor(one["log"]), rtol=1e-4, atol=1e-5)
        for mine, theirs in zip(two["weights"], one["weights"], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)


def test_fewer_prompts_than_processes_are_refused() -> None:
    accelerator = type("FourProcesses", (), {"num_processes": 4, "process_index": 0})()
    world = TinyWorld.load()
    policy = TinyLearner(world.policy)
    with pytest.raises(ValueError, match=r"oversample must be at least the number of processes, 4, got 3"):
        Loop(
            policy,
            policy.engine,
            ["a", "b", "c"],
            world.verify,
            config=LoopConfig.grpo(prompts=3),
            accelerator=accelerator,
        )
