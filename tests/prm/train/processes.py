"""What a test starts as a process of its own: ``python -m tests.prm.train.processes killed|rank FOLDER``."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import torch

from tests.prm.train.toy import At, chains, losses, trainer


def killed(folder: Path) -> None:
    """Trains with dropout, saves every two steps and dies in step 5 of 12."""
    run = trainer(
        folder,
        dropout=0.2,
        data=chains(24),
        save_strategy="steps",
        save_steps=2,
        callbacks=[At(5, lambda _: os.kill(os.getpid(), signal.SIGKILL))],
    )
    run.train()


def rank(folder: Path) -> None:
    """One of the processes that the environment names; the first one writes its losses and weights."""
    run = trainer(folder, data=chains(42), num_train_epochs=1, loss=os.environ["TOY_LOSS"])
    run.train()
    if run.args.process_index == 0:
        (folder / "losses.json").write_text(json.dumps(losses(run)))
        torch.save(run.accelerator.unwrap_model(run.model).state_dict(), folder / "weights.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"killed": killed, "rank": rank}[sys.argv[1]](Path(sys.argv[2]))
