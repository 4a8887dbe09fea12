"""DistRL as a TRL trainer: the embedded policy learns its own task from 8 answers a question, on a CPU in seconds."""

import logging
import os
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is in the package

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from prmfast.distrl.trl import DistRLConfig, DistRLTrainer
from prmfast.tiny import TinyWorld

logging.basicConfig(level=logging.WARNING)  # batches that teach nothing say why
world = TinyWorld.load()


def correct(prompts: list[str], completions: list[str], **_: object) -> list[float]:
    """The verifier; the reward model learns what it says."""
    return [float(world.verify(prompt, answer)) for prompt, answer in zip(prompts, completions, strict=True)]


with tempfile.TemporaryDirectory() as folder:
    settings = DistRLConfig(
        folder,
        **{"num_generations": 8, "per_device_train_batch_size": 32, "max_completion_length": 19, "max_steps": 8},
        **{"learning_rate": 1e-4, "rm_learning_rate": 1e-3, "dist_alpha": 0.1, "logging_steps": 1},
        **{"bf16": False, "save_strategy": "no", "report_to": [], "disable_tqdm": True},
    )
    trainer = DistRLTrainer(
        AutoModelForCausalLM.from_pretrained(world.policy_directory()),
        correct,
        settings,
        train_dataset=Dataset.from_dict({"prompt": world.questions(64, seed=1, split="train")}),
        processing_class=AutoTokenizer.from_pretrained(world.tokenizer_directory()),
    )
    trainer.train()

for step in trainer.state.log_history[:-1]:
    shown = ("reward", "distrl/rm_pairwise_accuracy", "distrl/dist_candidates_per_token", "distrl/dist_mass")
    print(step["step"], *(f"{name.removeprefix('distrl/')} {step[name]:.3f}" for name in shown), sep="  ")
