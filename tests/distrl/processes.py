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


def trained(folder: Path, per_device: int, accumulation: int) -> dict[str, Any]:
    """What TRL's trainer logs, and both models: two updates on answers that do not depend on the process; a token of
    each answer comes from elsewhere.
    """
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from prmfast.distrl.trl import DistRLConfig, DistRLTrainer
    from prmfast.tiny import TinyWorld

    world = TinyWorld.load()
    tokenizer = AutoTokenizer.from_pretrained(world.tokenizer_directory())

    def answers(prompts: list[str], trainer: Any) -> dict[str, Any]:
        first = trainer.accelerator.process_index * len(prompts)
        drawn = world.engine.sample(prompts, [first + i for i in range(len(prompts))])
        ids = [list(one.token_ids) for one in drawn]
        return {
            "prompt_ids": [tokenizer(prompt)["input_ids"] for prompt in prompts],
            "completion_ids": ids,
            "logprobs": [[0.0] * len(one) for one in ids],
            "env_mask": [[int(i != 2) for i in range(len(one))] for one in ids],
        }

    def parity(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [float(sum(ids) % 2) for ids in completion_ids]

    args = DistRLConfig(
        str(folder),
        per_device_train_batch_size=per_device,
        gradient_accumulation_steps=accumulation,
        **{"num_generations": 4, "max_steps": 2, "learning_rate": 1e-4, "rm_learning_rate": 1e-3, "seed": 5},
        **{"lr_scheduler_type": "constant", "logging_steps": 1, "save_strategy": "no", "report_to": []},
        **{"use_cpu": True, "bf16": False, "disable_tqdm": True, "gradient_checkpointing": False},
    )
    run = DistRLTrainer(
        AutoModelForCausalLM.from_pretrained(world.policy_directory()).double(),
        parity,
        args,
        train_dataset=Dataset.from_dict({"prompt": world.questions(12, seed=3, split="train", k_range=(2, 4))}),
        processing_class=tokenizer,
        rollout_func=answers,
    )
    run.train()
    # Those of Dist-PPO are means over micro-batches, as all that TRL logs of a loss: they depend on how a batch is cut.
    names = ("loss", "grad_norm", "distrl/rm_loss", "distrl/sigma_v", "distrl/rm_score", "distrl/rm_gradient_norm")
    models = (run.accelerator.unwrap_model(run.model), run.reward_model)
    return {
        "log": [[entry[name] for name in names] for entry in run.state.log_history if "loss" in entry],
        "weights": [tensor.detach().clone() for model in models for tensor in model.parameters()],
    }


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
    if sys.argv[1] == "loop":
        from accelerate import Accelerator

        made = loops(folder, Accelerator(cpu=True))
    else:
        made = trained(folder, per_device=3, accumulation=2)
    torch.save(made, folder / f"{sys.argv[1]}-{os.environ['RANK']}.pt")
