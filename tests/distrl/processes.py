"""What a test starts as a process of its own, and again in one: ``python -m tests.distrl.processes loop FOLDER``."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]


def loops(folder: Path, accelerator: Any = None) -> dict[str, Any]:
    """Histories and weights of short runs; the last of them stops after a step and goes on from its checkpoint."""
    from prmfast.distrl import Loop, LoopConfig
    from prmfast.tiny import TinyLearner, TinyWorld

    world = TinyWorld.load()
    questions = world.questions(40, seed=3, split="train", k_range=(2, 4))
    rates = {"policy_rate": 1e-3, "reward_rate": 1e-3}
    configs = {
        "grpo": LoopConfig.grpo(prompts=3, samples=5, updates=2, mixed_only=True, oversample=2.0, **rates),
        "released": LoopConfig.distrl_released(prompts=5, samples=3, updates=2, answers_per_pass=4, **rates),
        "fixed": LoopConfig.distrl_implicit(prompts=3, samples=3, reference="fixed", **rates),
        "idle": LoopConfig.distrl_ipvrm(prompts=1, samples=1, oversample=2.0, dlw=False, **rates),
        "resumed": LoopConfig.distrl_ipvrm(prompts=3, samples=3, updates=2, **rates),
    }
    found: dict[str, Any] = {}
    for name, config in configs.items():
        for steps in (1, 2) if name == "resumed" else (2,):
            policy = TinyLearner(world.policy.to(torch.float64))
            if accelerator is not None and accelerator.process_index:
                with torch.no_grad():
                    next(iter(policy.parameters())).add_(1.0)  # the main process's weights count
            directory = folder / "checkpoint" if name == "resumed" else None
            loop = Loop(policy, policy.engine, questions, world.verify, config=config, accelerator=accelerator)
            history = loop.run(steps, directory=directory, show=False)
        clock = ("seconds/", "peak_mb/")
        found[name] = {
            "history": [{k: v for k, v in record.items() if not k.startswith(clock)} for record in history],
            "weights": [tensor.detach().clone() for model in loop._models().values() for tensor in model.parameters()],
        }
    return found


def start(what: str, folder: Path, processes: int = 2) -> list[subprocess.Popen[bytes]]:
    """``what`` in gloo processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1"}
    common |= {"MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "CI": "true"}
    return [
        subprocess.Popen(
            [sys.executable, "-m", "tests.distrl.processes", what, str(folder)],
            cwd=ROOT,
            env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        for rank in range(processes)
    ]


def finish(ranks: list[subprocess.Popen[bytes]]) -> None:
    """Waits for all; the assertion shows what a failed one said."""
    said = [process.communicate(timeout=300)[1].decode()[-2000:] for process in ranks]
    assert [process.returncode for process in ranks] == [0] * len(ranks), "\n".join(said)


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[2])
    from accelerate import Accelerator

    state = Accelerator(cpu=True)
    made = loops(folder, state)
    torch.save(made, folder / f"loop-{state.process_index}.pt")
