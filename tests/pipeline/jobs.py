"""One small labelling job on the tiny world, and the process that kills it.

python -m tests.pipeline.jobs DIRECTORY SEED   forks the job and kills it at random moments until it ends by itself
python -m tests.pipeline.jobs DIRECTORY        runs it until two parts are there, then waits for a signal
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from prmfast.engines import Completion
from prmfast.pipeline import Labeller, LabelRun, LabelSettings, SplitAfter, label_questions
from prmfast.tiny import TinyWorld

QUESTIONS, CHUNK = 18, 2
LIVES = 400  # far more than it takes


class LoudEngine:
    """The tiny engine, telling each call's questions to a file first; ``hold`` makes it wait for a signal."""

    def __init__(self, world: TinyWorld, log: Path, hold: Callable[[], bool] = lambda: False) -> None:
        self.engine, self.log, self.hold = world.engine, log, hold
        self.policy_id, self.temperature = world.engine.policy_id, world.engine.temperature

    def sample(
        self, prompts: Sequence[str], seeds: Sequence[int], *, prefixes: Sequence[str] | None = None
    ) -> list[Completion]:
        with self.log.open("a") as file:
            file.write(json.dumps(sorted(set(prompts))) + "\n")
        if self.hold():
            self.log.with_suffix(".held").touch()
            while True:  # signal.pause() would miss a signal that came just before it
                time.sleep(0.05)
        return self.engine.sample(prompts, seeds, prefixes=prefixes)


def questions(world: TinyWorld) -> list[str]:
    return world.questions(QUESTIONS, seed=5, split="calibration")


def labeller(world: TinyWorld, engine: Any = None, **settings: Any) -> Labeller:
    chosen = LabelSettings(**{"samples": 2, "rollouts": 4, "seed": 3, **settings})
    return Labeller(engine or world.engine, world.verify, world.prm, SplitAfter(";"), chosen)


def run(world: TinyWorld, directory: Path, log: Path, hold: Callable[[], bool] = lambda: False) -> LabelRun:
    engine = LoudEngine(world, log, hold)
    return label_questions(questions(world), directory, labeller(world, engine), chunk_size=CHUNK, progress=False)


def fork(world: TinyWorld, directory: Path, log: Path) -> int:
    """The process id of a child that runs the job; its memory is a copy, so nothing has to be imported again."""
    child = os.fork()
    if child:
        return child
    try:
        run(world, directory, log)
    except BaseException:
        os._exit(1)
    os._exit(0)


def finished(directory: Path) -> list[str]:
    return sorted(path.name for path in (directory / "parts").glob("part-*.parquet"))


def main() -> None:
    directory = Path(sys.argv[1])
    torch.set_num_threads(1)
    world = TinyWorld.load()
    world.engine.sample(questions(world)[:1], [0])  # so that the first life is no slower than the others
    world.prm.score(questions(world)[:1], [["1 ; # 1"]])
    log = directory.with_suffix(".log")
    if len(sys.argv) == 2:
        run(world, directory, log, hold=lambda: len(finished(directory)) >= 2)
        return
    begun = time.perf_counter()
    os.waitpid(fork(world, directory.with_suffix(".whole"), directory.with_suffix(".whole.log")), 0)
    longest = 0.25 * (time.perf_counter() - begun)
    chance = random.Random(int(sys.argv[2]))
    lives = []
    for _ in range(LIVES):
        log.write_text("")
        before = finished(directory)
        child = fork(world, directory, log)
        time.sleep(chance.uniform(0, longest))
        ended, status = os.waitpid(child, os.WNOHANG)
        if not ended:
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
        temporaries = len(list(directory.rglob(".*.part")))
        asked = sorted({text for line in log.read_text().splitlines() for text in json.loads(line)})
        lives.append({"before": before, "asked": asked, "temporaries": temporaries, "status": status})
        if finished(directory) == before:  # on a machine that became slower, no life may be long enough for a part
            longest *= 1.1
        if status == 0:
            break
        assert os.WIFSIGNALED(status), status
    print(json.dumps(lives))


if __name__ == "__main__":
    main()
