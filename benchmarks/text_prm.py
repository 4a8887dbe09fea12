"""A small PRM on text features, for benchmarks without a language model: weak, honest, trained in seconds.

Each step is described by its words (TF-IDF, reduced by SVD) and by a few counts, among them whether the sums it states
hold; a step also sees the mean and the maximum over the steps before it. A small network turns that into one score,
trained with any of prmfast's losses.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from threadpoolctl import threadpool_limits
from torch import Tensor, nn

from prmfast.evaluation import Chain
from prmfast.prm import losses

LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "BCE": losses.bce_loss,
    "MSE": losses.mse_loss,
    "ORM": losses.orm_loss,
    "PQM": partial(losses.pqm_loss, normalization="released"),
    "PQM theorem": partial(losses.pqm_loss, variant="theorem"),
    "PQM first wrong": partial(losses.pqm_loss, variant="first_wrong", normalization="released"),
}
_NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?")
_SUM = re.compile(
    r"(-?\d+(?:\.\d+)?)\s*(\+|-|\*|/|×|÷|\\times|\\cdot|\\div)\s*(-?\d+(?:\.\d+)?)\s*=\s*\$?(-?\d+(?:\.\d+)?)"
)
_OPERATIONS: dict[str, Callable[[float, float], float]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: a / b if b else float("nan"),
}
_NAMES = {"×": "*", "\\times": "*", "\\cdot": "*", "÷": "/", "\\div": "/"}


def step_counts(chain: Chain) -> np.ndarray:
    """[H, 8]: place, length, numbers, new ones, equations, sums that hold, sums that do not, share of new numbers."""
    known = set(_NUMBER.findall(chain.question))
    rows = []
    for place, step in enumerate(chain.steps):
        numbers = _NUMBER.findall(step)
        new = [number for number in numbers if number not in known]
        known.update(numbers)
        holds = [_holds(*found) for found in _SUM.findall(step)]
        rows.append(
            [
                np.log1p(place),
                np.log1p(len(step)),
                np.log1p(len(numbers)),
                np.log1p(len(new)),
                np.log1p(step.count("=")),
                float(sum(holds)),
                float(len(holds) - sum(holds)),
                len(new) / max(len(numbers), 1),
            ]
        )
    return np.array(rows)


def _holds(a: str, operation: str, b: str, result: str) -> bool:
    value = _OPERATIONS[_NAMES.get(operation, operation)](float(a), float(b))
    return abs(value - float(result)) <= 0.01 * max(1.0, abs(value))


class TextPRM:
    """Fitted on chains with step labels; `scores` gives one number per step, higher is better (a logit)."""

    def __init__(self, loss: str, *, width: int = 48, epochs: int = 12, seed: int = 0) -> None:
        self.loss, self.width, self.epochs, self.seed = loss, width, epochs, seed

    def fit(self, features: list[np.ndarray], labels: Sequence[Sequence[int]]) -> TextPRM:
        """features: [H, F] per chain; labels: 1 right, 0 wrong per step."""
        torch.manual_seed(self.seed)
        x, y = _pad(features), torch.full((len(labels), max(map(len, labels))), -100)
        for i, row in enumerate(labels):
            y[i, : len(row)] = torch.tensor(row)
        self.network_ = nn.Sequential(
            nn.Linear(x.shape[2], self.width), nn.ReLU(), nn.Dropout(0.3), nn.Linear(self.width, 1)
        )
        optimizer = torch.optim.AdamW(self.network_.parameters(), lr=3e-3, weight_decay=0.05)
        for _ in range(self.epochs):
            for rows in torch.randperm(len(x)).split(64):
                optimizer.zero_grad()
                LOSSES[self.loss](self.network_(x[rows]).squeeze(2), y[rows]).backward()
                optimizer.step()
        self.network_.eval()
        return self

    @torch.no_grad()
    def scores(self, features: list[np.ndarray]) -> list[list[float]]:
        """One score per step of each chain."""
        found = self.network_(_pad(features)).squeeze(2).tolist()
        return [row[: len(chain)] for row, chain in zip(found, features, strict=True)]


class StepFeatures:
    """Words and counts of steps, standardised; fitted on the training chains alone."""

    def __init__(self, *, components: int = 48, characters: bool = False, seed: int = 0) -> None:
        self.components, self.characters, self.seed = components, characters, seed

    def fit(self, chains: Sequence[Chain]) -> StepFeatures:
        """Learns vocabulary, reduction and scales."""
        options = {"analyzer": "char_wb", "ngram_range": (1, 4)} if self.characters else {"ngram_range": (1, 2)}
        self.words_ = TfidfVectorizer(min_df=5, max_features=20_000, sublinear_tf=True, **options)
        table = self.words_.fit_transform([step for chain in chains for step in chain.steps])
        with threadpool_limits(1):  # more threads than idle cores make this many times slower
            self.reduce_ = TruncatedSVD(min(self.components, table.shape[1] - 1), random_state=self.seed).fit(table)
        rows = np.concatenate(self._raw(chains))
        self.mean_, self.scale_ = rows.mean(0), rows.std(0) + 1e-6
        return self

    def transform(self, chains: Sequence[Chain]) -> list[np.ndarray]:
        """[H, 3 F] float32 per chain: the step, then mean and maximum over the steps before it (0 for the first)."""
        result = []
        for raw in self._raw(chains):
            rows = (raw - self.mean_) / self.scale_
            before = np.concatenate([np.zeros_like(rows[:1]), rows[:-1]])
            mean = np.cumsum(before, 0) / np.maximum(np.arange(len(rows))[:, None], 1)
            top = np.maximum.accumulate(np.concatenate([np.full_like(rows[:1], -np.inf), rows[:-1]]))
            top[0] = 0.0
            result.append(np.concatenate([rows, mean, top], 1).astype(np.float32))
        return result

    def _raw(self, chains: Sequence[Chain]) -> list[np.ndarray]:
        words = self.reduce_.transform(self.words_.transform([step for chain in chains for step in chain.steps]))
        cuts = np.cumsum([len(chain.steps) for chain in chains])[:-1]
        counts = map(step_counts, chains)
        return [np.concatenate(both, 1) for both in zip(np.split(words, cuts), counts, strict=True)]


def _pad(features: list[np.ndarray]) -> Tensor:
    x = torch.zeros(len(features), max(map(len, features)), features[0].shape[1])
    for i, chain in enumerate(features):
        x[i, : len(chain)] = torch.from_numpy(chain)
    return x
