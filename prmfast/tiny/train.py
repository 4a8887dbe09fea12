"""Trains the tiny world: ``python -m prmfast.tiny.train DIR`` (about two minutes of one CPU core; needs transformers).

What learns: clean data gives a policy that is right or wrong for ever, and without the fixed layout alignment, not
arithmetic, is what the model fails at. With the layout, rotary positions with base 100 learn the task in about 250
steps of 256 traces; base 10,000, where fewer frequencies tell 15 tokens from 16, does not in 600.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from prmfast._files import write_text
from prmfast._progress import progress as progress_bar
from prmfast.engines.random import sample_keys, text_key
from prmfast.prm.losses._common import PADDING
from prmfast.tiny import task
from prmfast.tiny.decoder import MAX_LENGTH, Decoder
from prmfast.tiny.policy import Policy, PolicyConfig, forward
from prmfast.tiny.prm import StepStates, TinyPRM, TinyPRMNet, step_states
from prmfast.tiny.world import TinyWorld, WorldInfo, draw_questions, info_to_json

MISCALIBRATION = (
    "By design: the PRM learned whether any of 4 rollouts from a prefix succeeded (so its scores are too high), on "
    "questions with at most 5 operations, and is used on questions with up to 8."
)


@dataclass(frozen=True, slots=True)
class TrainSettings:
    """Sizes of the training run; the defaults are those of the shipped weights."""

    seed: int = 0
    policy_steps: int = 450
    policy_batch: int = 256
    policy_rate: float = 4e-3
    prm_questions: int = 12_000
    prm_max_operations: int = 5
    prm_rollouts: int = 4
    prm_epochs: int = 10
    prm_rate: float = 3e-3
    report_questions: int = 400
    report_rollouts: int = 64


def train_world(out_dir: str | Path, settings: TrainSettings | None = None, *, progress: bool = True) -> TinyWorld:
    """Trains policy and PRM; writes ``policy/``, ``tokenizer/``, ``prm/`` and ``world.json`` and reads them back.

    Everything is seeded and runs on one thread (two are slower for matrices this small). Files appear in ``out_dir``
    only when the whole run has succeeded.
    """
    settings = settings or TrainSettings()
    out_dir = Path(out_dir)
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory(dir=out_dir.parent, prefix=f".{out_dir.name}.") as folder:
            _train_into(Path(folder), settings, progress)
            for path in sorted(Path(folder).rglob("*")):
                if path.is_file():
                    target = out_dir / path.relative_to(folder)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    path.chmod(0o644)  # safetensors leaves its files readable by the owner alone
                    os.replace(path, target)
    finally:
        torch.set_num_threads(threads)
    return TinyWorld.load(out_dir)


def _train_into(folder: Path, settings: TrainSettings, progress: bool) -> None:
    clock = [time.process_time()]
    policy = train_policy(settings, progress=progress)
    clock.append(time.process_time())
    save_policy(policy, folder / "policy")
    policy = Policy.load(folder / "policy")
    clock.append(time.process_time())
    ids, rows, columns, labels = prm_examples(policy, settings, progress=progress)
    clock.append(time.process_time())
    states = step_states(policy, ids)
    net = train_prm(states, rows, columns, labels, settings=settings, progress=progress)
    clock.append(time.process_time())
    TinyPRM(policy, net, "in training").save_pretrained(
        folder / "prm", trained_on=MISCALIBRATION, examples=len(labels), seed=settings.seed
    )
    names = ("policy", "saving", "rollouts", "prm")
    seconds = {name: round(clock[i + 1] - clock[i], 1) for i, name in enumerate(names)}
    blank: dict[str, float] = {}
    draft = WorldInfo(MISCALIBRATION, 0.0, (), 0.0, blank, blank, seconds, _numbers(settings))
    write_text(folder / "world.json", info_to_json(draft))
    write_text(folder / "world.json", info_to_json(measure(TinyWorld.load(folder), settings, progress=progress)))


def train_policy(settings: TrainSettings, *, progress: bool = False) -> Policy:
    """A policy trained on noisy traces of the train split; one pass, no example twice."""
    generator = torch.Generator().manual_seed(settings.seed)
    noise = task.fact_noise(generator=generator)
    policy = Policy.random(PolicyConfig(), generator=generator)
    parameters = list(policy.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.01},
        {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=settings.policy_rate, betas=(0.9, 0.98))
    start = task.QUESTION_LENGTH - 1
    with progress_bar(settings.policy_steps, "policy", progress) as bar:
        for step in range(settings.policy_steps):
            _set_rate(optimizer, settings.policy_rate, step, settings.policy_steps)
            questions = _training_questions(settings.policy_batch, generator)
            sequences = task.noisy_traces(questions, noise, generator=generator)
            _, logits = forward(policy, sequences[:, :-1], start=start)
            targets = sequences[:, start + 1 :].flatten()
            loss = F.cross_entropy(logits.flatten(0, 1), targets, ignore_index=task.PAD_ID)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            bar.advance()
            bar.update(loss=loss.item())
    return policy


def _training_questions(n: int, generator: torch.Generator) -> Tensor:
    questions = task.make_questions(3 * n, generator=generator)
    questions = questions[task.split_index(questions) == task.SPLITS.index("train")]
    return questions[:n]


def _set_rate(optimizer: torch.optim.Optimizer, peak: float, step: int, steps: int) -> None:
    """Linear warm-up over 30 steps, then a cosine to 5 % of the peak."""
    cosine = 0.5 + 0.5 * math.cos(math.pi * step / steps)
    for group in optimizer.param_groups:
        group["lr"] = peak * min(1.0, (step + 1) / 30) * (0.05 + 0.95 * cosine)


def save_policy(policy: Policy, directory: Path) -> None:
    """As a Hugging Face checkpoint, through ``Qwen2ForCausalLM.save_pretrained``; the tokenizer goes beside it.

    transformers 5 replaces whatever tokenizer lies in the folder of a Qwen2 model by Qwen2's own, which cannot read
    this vocabulary; in a folder without a model config it loads as it was saved.
    """
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from prmfast.tiny.tokenizer import save_tokenizer

    model = Qwen2ForCausalLM(Qwen2Config(**policy.config.to_hf()))
    missing, unexpected = model.load_state_dict(policy.state_dict(), strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    model.save_pretrained(directory)
    # transformers 4 reads the rotary base here, transformers 5 in rope_parameters.
    config = json.loads((directory / "config.json").read_text()) | {"rope_theta": policy.config.rope_theta}
    write_text(directory / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
    save_tokenizer(directory.parent / "tokenizer")


def prm_examples(
    policy: Policy, settings: TrainSettings, *, progress: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sampled answers ids [N, 37] of short train questions, and labelled places in them.

    Returns ids, rows [R], columns [R] (position from ``?`` = 0) and labels [R]: 1.0 if any of 4 rollouts from there
    ended correctly. Two places per answer: the empty answer, and the end of one random step.
    """
    n, rollouts, decoder = settings.prm_questions, settings.prm_rollouts, Decoder(policy)
    questions = draw_questions(n, seed=settings.seed, k_range=(1, settings.prm_max_operations), split="train")
    empty = F.pad(questions, (0, MAX_LENGTH - questions.shape[1]), value=task.PAD_ID)
    answers = task.true_results(questions)[:, -1]
    streams = torch.arange(n) * 3 + text_key(f"prm {settings.seed}")
    own = decoder.sample(empty, torch.arange(n), sample_keys(streams, torch.zeros(n, dtype=torch.int64)))
    start = task.QUESTION_LENGTH - 1
    # A step ends at ";" or, the last one, at the token before the end token.
    is_end = (own.ids[:, start:] == task.STEP_ID).float()
    is_end[torch.arange(n), own.length - 2 - start] = 1.0
    generator = torch.Generator().manual_seed(settings.seed)
    column = is_end.multinomial(1, generator=generator)[:, 0]
    begun = torch.where(torch.arange(MAX_LENGTH) <= (start + column)[:, None], own.ids, task.PAD_ID)
    labels = []
    with progress_bar(2 * n * rollouts, "PRM labels", progress) as bar:
        for salt, prompts in enumerate((empty, begun)):
            for rows in torch.arange(n).split(2048):
                index = torch.arange(len(rows)).repeat_interleave(rollouts)
                keys = sample_keys((streams[rows] + 1 + salt)[index], torch.arange(rollouts).repeat(len(rows)))
                drawn = decoder.sample(prompts[rows], index, keys)
                good = task.are_correct(drawn.ids, drawn.length, answers[rows][index])
                labels.append(good.view(-1, rollouts).any(1).float())
                bar.advance(len(index))
    columns = torch.cat([torch.zeros(n, dtype=torch.int64), column])
    return own.ids, torch.arange(n).repeat(2), columns, torch.cat(labels)


def train_prm(
    states: StepStates,
    rows: Tensor,
    columns: Tensor,
    labels: Tensor,
    *,
    settings: TrainSettings,
    progress: bool = False,
) -> TinyPRMNet:
    """Cross-entropy on the labels at (rows, columns) of the given sequences."""
    net = _new_net(states, states.features[rows, columns], settings)

    def loss(pick: Tensor) -> Tensor:
        logit, _ = net(states.take(rows[pick]), torch.arange(len(pick)), columns[pick])
        return F.binary_cross_entropy_with_logits(logit, labels[pick])

    _fit(net, loss, len(labels), 512, settings, progress)
    return net


def train_step_prm(
    states: StepStates,
    columns: Tensor,
    labels: Tensor,
    loss: Callable[[Tensor, Tensor], Tensor],
    *,
    settings: TrainSettings,
    progress: bool = False,
) -> TinyPRMNet:
    """The same head trained on whole answers, for losses that compare the steps of one: those of `prmfast.prm.losses`.

    columns: [N, H] int64, where the steps of sequence i end (as `step_ends` counts); 0 in padding.
    labels: [N, H] float, what ``loss`` takes for a step; -100 in padding.
    loss: of logits [B, H] and labels [B, H], with 128 answers in a batch (about as many steps as `train_prm` takes).

    ValueError for shapes that do not fit the states.
    """
    answers = len(states.hidden)
    if columns.shape != labels.shape or columns.dim() != 2 or len(columns) != answers:
        raise ValueError(
            f"columns and labels must both be [{answers}, H], got {list(columns.shape)} and {list(labels.shape)}"
        )
    kept = labels != PADDING
    net = _new_net(
        states, states.features[torch.arange(answers)[:, None].expand_as(columns)[kept], columns[kept]], settings
    )

    def batch_loss(pick: Tensor) -> Tensor:
        mine = kept[pick]
        rows = torch.arange(len(pick))[:, None].expand_as(mine)[mine]
        logit, _ = net(states.take(pick), rows, columns[pick][mine])
        return loss(logit.new_zeros(mine.shape).masked_scatter(mine, logit), labels[pick])

    _fit(net, batch_loss, answers, 128, settings, progress)
    return net


def _new_net(states: StepStates, seen: Tensor, settings: TrainSettings) -> TinyPRMNet:
    """Seeded weights; features [R, 10] of the labelled steps give the scales."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        net = TinyPRMNet(states.hidden.shape[-1])
    net.feature_mean.copy_(seen.mean(0))
    net.feature_std.copy_(seen.std(0).clamp(min=1e-3))
    return net


def _fit(
    net: TinyPRMNet,
    batch_loss: Callable[[Tensor], Tensor],
    count: int,
    size: int,
    settings: TrainSettings,
    progress: bool,
) -> None:
    """``prm_epochs`` passes over ``count`` examples in random batches; ``batch_loss`` takes their numbers [size]."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=settings.prm_rate, weight_decay=0.01)
    generator = torch.Generator().manual_seed(settings.seed)
    per_epoch = math.ceil(count / size)
    steps = settings.prm_epochs * per_epoch
    with progress_bar(steps, "PRM", progress) as bar:
        for step in range(steps):
            if step % per_epoch == 0:
                batches = torch.randperm(count, generator=generator).split(size)
            _set_rate(optimizer, settings.prm_rate, step, steps)
            loss = batch_loss(batches[step % per_epoch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            bar.advance()
            bar.update(loss=loss.item())


def measure(world: TinyWorld, settings: TrainSettings, *, progress: bool = False) -> WorldInfo:
    """What ``world.json`` reports, on test questions with 1 to 8 operations."""
    n, rollouts = settings.report_questions, settings.report_rollouts
    table = world.make_traces(n, 1, rollouts, seed=settings.seed, progress=progress, split="test")
    success = torch.tensor(table["question_successes"].to_pylist()) / rollouts
    columns = (table[name].combine_chunks().flatten() for name in ("prm_step_scores", "step_successes"))
    steps = [torch.tensor(column.to_pylist()) for column in columns]
    deciles = torch.quantile(success, torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9])).tolist()
    return WorldInfo(
        MISCALIBRATION,
        round(success.mean().item(), 3),
        tuple(round(value, 3) for value in deciles),
        round(((success > 0.1) & (success < 0.9)).float().mean().item(), 3),
        _agreement(torch.tensor(table["question_score"].to_pylist()), success),
        _agreement(steps[0], steps[1] / rollouts),
        world.info.training_seconds,
        _numbers(settings),
    )


def _agreement(score: Tensor, success: Tensor) -> dict[str, float]:
    """Spearman's rank correlation, bias, Brier score and its irreducible part of scores against success shares."""
    ranks = torch.stack([_ranks(score), _ranks(success)])
    noise = (success * (1 - success)).mean()
    values = {
        "rank_correlation": torch.corrcoef(ranks)[0, 1].nan_to_num(),
        "bias": (score - success).mean(),
        "brier": ((score - success) ** 2).mean() + noise,
        "irreducible": noise,
    }
    return {name: round(value.item(), 3) for name, value in values.items()}


def _ranks(x: Tensor) -> Tensor:
    """Ranks with ties at their mean."""
    _, inverse, counts = x.unique(return_inverse=True, return_counts=True)
    mean_rank: Tensor = counts.cumsum(0) - (counts - 1) / 2
    return mean_rank[inverse]


def _numbers(settings: TrainSettings) -> dict[str, float]:
    return {name: getattr(settings, name) for name in TrainSettings.__dataclass_fields__}


def main() -> None:
    """Command line: the output directory and the seed."""
    parser = argparse.ArgumentParser(prog="python -m prmfast.tiny.train", description="Train the tiny world.")
    parser.add_argument("out_dir", type=Path, help="directory that gets policy/, tokenizer/, prm/ and world.json")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    world = train_world(arguments.out_dir, TrainSettings(seed=arguments.seed))
    print(info_to_json(world.info), end="")


if __name__ == "__main__":
    main()
