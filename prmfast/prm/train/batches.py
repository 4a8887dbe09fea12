"""Batches of rows of like length, in an order that seed and epoch alone decide, and their padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

from prmfast.prm.losses._common import PADDING
from prmfast.prm.train.rows import StepRow

_BUCKET = 32  # updates among which rows are sorted by length


class LengthBuckets(Sampler[int]):
    """Row numbers in shuffled groups of ``update`` rows of like length.

    The order depends on (seed, epoch) and ``update`` alone, not on the number of processes that share an update. The
    last group is filled up with the number ``len(lengths)``, an empty row, so that every row counts once per epoch.

    lengths: tokens of each row · update: rows of one optimiser step, all processes and accumulation steps together
    """

    def __init__(self, lengths: Sequence[int], update: int, *, seed: int) -> None:
        if update < 1:
            raise ValueError(f"update must be at least 1, got {update}")
        self._lengths = np.asarray(lengths, dtype=np.int64)
        self._update, self._seed = update, seed
        self.epoch = 0

    def __len__(self) -> int:
        return -(-len(self._lengths) // self._update) * self._update

    def __iter__(self) -> Iterator[int]:
        random = np.random.default_rng([self._seed, self.epoch])
        order = random.permutation(len(self._lengths))
        size = _BUCKET * self._update
        buckets = [order[at : at + size] for at in range(0, len(order), size)]
        ordered = [bucket[np.argsort(self._lengths[bucket], kind="stable")] for bucket in buckets]
        filler = np.full(len(self) - len(order), len(order))
        updates = np.concatenate([*ordered, filler]).reshape(-1, self._update)
        return iter(updates[random.permutation(len(updates))].ravel().tolist())


class StepCollator:
    """Rows as ``input_ids``, ``attention_mask`` [B, T] and ``step_positions``, ``labels`` [B, H].

    Tokens are padded with id 0 behind the end of a row, where a causal model does not look, positions with -1, labels
    (float32) with -100.
    """

    def __call__(self, rows: Sequence[StepRow]) -> dict[str, Tensor]:
        """The batch of ``rows``; H is at least 1."""
        width = max(len(row["input_ids"]) for row in rows)
        steps = max(1, *(len(row["labels"]) for row in rows))
        ids = torch.zeros(len(rows), width, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        positions = torch.full((len(rows), steps), -1, dtype=torch.int64)
        labels = torch.full((len(rows), steps), float(PADDING))
        for i, row in enumerate(rows):
            ids[i, : len(row["input_ids"])] = torch.tensor(row["input_ids"])
            mask[i, : len(row["input_ids"])] = 1
            positions[i, : len(row["labels"])] = torch.tensor(row["step_positions"], dtype=torch.int64)
            labels[i, : len(row["labels"])] = torch.tensor(row["labels"])
        return {"input_ids": ids, "attention_mask": mask, "step_positions": positions, "labels": labels}
