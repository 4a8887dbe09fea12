"""Score heads of released process reward models: from hidden states at step rows to probabilities.

Every head takes the last-layer hidden state (behind the final norm) at the step's row [NUMERICS 4] and names the
checkpoint's tensors that it is made of, so that any loader can hand them over.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping

import torch
from torch import Tensor, nn


class StepHead(nn.Module, abc.ABC):
    """Hidden states [n, d] -> logits [n, k] -> probability [n] that a step is right.

    The head computes in the dtype of its own parameters (float32 unless cast): few rows go through it, and half
    precision would show in the scores.
    """

    @property
    def checkpoint_names(self) -> tuple[str, ...]:
        """The checkpoint's tensors that `load` needs; by default the head's own parameter names."""
        return tuple(name for name, _ in self.named_parameters())

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Copies the checkpoint's tensors into the head; names other than `checkpoint_names` are passed over.

        KeyError for a missing tensor, ValueError for a shape that does not fit; both name the tensor.
        """
        for name, parameter in self.named_parameters():
            self._copy(name, parameter, self._get(tensors, name))

    @abc.abstractmethod
    def forward(self, hidden: Tensor) -> Tensor:
        """Logits [n, k] of hidden states [n, d]."""

    @abc.abstractmethod
    def probability(self, logits: Tensor) -> Tensor:
        """Probability in [0, 1], [n], of logits [n, k]; computed in float32 at least."""

    @abc.abstractmethod
    def log_odds(self) -> tuple[nn.Module, Tensor, Tensor]:
        """(trunk, weight [d'], bias []): ``sigmoid(trunk(hidden) @ weight + bias)`` is the probability.

        What a `QuantileHead` starts from. Exact for every head but `ReasonEvalHead`.
        """

    def _get(self, tensors: Mapping[str, Tensor], name: str) -> Tensor:
        if name not in tensors:
            raise KeyError(f"{type(self).__name__} needs the tensor {name!r}, which the checkpoint does not have")
        return tensors[name]

    def _copy(self, name: str, parameter: nn.Parameter, value: Tensor) -> None:
        if parameter.shape != value.shape:
            raise ValueError(
                f"{type(self).__name__}: tensor {name!r} must have shape {tuple(parameter.shape)}, "
                f"got {tuple(value.shape)}: the checkpoint is another architecture's"
            )
        with torch.no_grad():
            parameter.copy_(value)


def _exact(values: Tensor) -> Tensor:
    """float32 at least: what a softmax over two classes needs."""
    return values if values.dtype == torch.float64 else values.float()


class ProcessRewardHead(StepHead):
    """Qwen2.5-Math-PRM: ``score.0`` Linear d -> d, ReLU, ``score.2`` Linear d -> 2; softmax[..., 1]."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.score = nn.Sequential(nn.Linear(hidden_size, hidden_size), nn.ReLU(), nn.Linear(hidden_size, 2))

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits [n, 2] (wrong, right)."""
        logits: Tensor = self.score(hidden.to(next(self.score.parameters()).dtype))
        return logits

    def probability(self, logits: Tensor) -> Tensor:
        """``softmax(logits)[:, 1]``."""
        return _exact(logits).softmax(-1)[:, 1]

    def log_odds(self) -> tuple[nn.Module, Tensor, Tensor]:
        """W = w[1] - w[0], b = b[1] - b[0] behind the first layer and its ReLU."""
        last = self.score[2]
        assert isinstance(last, nn.Linear)
        return self.score[:2], last.weight[1] - last.weight[0], last.bias[1] - last.bias[0]


class ReasonEvalHead(StepHead):
    """ReasonEval: ``score_head`` Linear d -> 3 (negative, neutral, positive).

    The probability is the validity score, neutral or positive. `redundancy` is the other score of its paper.
    """

    def __init__(self, hidden_size: int, *, bias: bool = False) -> None:
        super().__init__()
        self.score_head = nn.Linear(hidden_size, 3, bias=bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits [n, 3] (negative, neutral, positive)."""
        logits: Tensor = self.score_head(hidden.to(self.score_head.weight.dtype))
        return logits

    def probability(self, logits: Tensor) -> Tensor:
        """``softmax(logits)[:, 1] + softmax(logits)[:, 2]``."""
        return _exact(logits).softmax(-1)[:, 1:].sum(-1).clamp(max=1.0)

    def redundancy(self, logits: Tensor) -> Tensor:
        """``softmax(logits)[:, 1]``, [n]: the step is valid and adds nothing."""
        return _exact(logits).softmax(-1)[:, 1]

    def log_odds(self) -> tuple[nn.Module, Tensor, Tensor]:
        """((w1 - w0) + (w2 - w0)) / 2, as released: the mean of two log odds, not the log odds of the sum."""
        w = self.score_head.weight
        b = w.new_zeros(3) if self.score_head.bias is None else self.score_head.bias
        return nn.Identity(), (w[1] + w[2]) / 2 - w[0], (b[1] + b[2]) / 2 - b[0]


class TokenPairHead(StepHead):
    """A causal language model that says "+" or "-" (Math-Shepherd): two rows of ``lm_head``; softmax.

    rows: token ids of (good, bad) · tied: the checkpoint has no ``lm_head.weight`` of its own and uses the embedding
    """

    def __init__(self, hidden_size: int, rows: tuple[int, int], *, tied: bool = False) -> None:
        super().__init__()
        if len(rows) != 2 or rows[0] == rows[1] or min(rows) < 0:
            raise ValueError(f"rows must be the token ids of two different tokens (good, bad), got {rows}")
        self.rows = (int(rows[0]), int(rows[1]))
        self.source = "model.embed_tokens.weight" if tied else "lm_head.weight"
        self.weight = nn.Parameter(torch.zeros(2, hidden_size))

    @property
    def checkpoint_names(self) -> tuple[str, ...]:
        """``lm_head.weight`` [V, d], or the embedding where the two are tied."""
        return (self.source,)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Copies two rows of ``lm_head.weight``; ValueError where its vocabulary ends before one of them."""
        table = self._get(tensors, self.source)
        if max(self.rows) >= table.shape[0]:
            raise ValueError(
                f"TokenPairHead: tensor {self.source!r} has {table.shape[0]} rows, token {max(self.rows)} is not among "
                "them: the tokenizer is another model's"
            )
        self._copy(self.source, self.weight, table[list(self.rows)])

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits [n, 2] of (good, bad): never the whole vocabulary's."""
        return hidden.to(self.weight.dtype) @ self.weight.T

    def probability(self, logits: Tensor) -> Tensor:
        """``softmax(logits)[:, 0]``: the good token's share of the two."""
        return _exact(logits).softmax(-1)[:, 0]

    def log_odds(self) -> tuple[nn.Module, Tensor, Tensor]:
        """The good token's row minus the bad one's; no bias."""
        return nn.Identity(), self.weight[0] - self.weight[1], self.weight.new_zeros(())


class ValueHead(StepHead):
    """One number per row (PQM, and every TRL value head): ``v_head.summary`` Linear d -> 1; sigmoid."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.summary = nn.Linear(hidden_size, 1)

    @property
    def checkpoint_names(self) -> tuple[str, ...]:
        """``v_head.summary.weight`` and ``v_head.summary.bias``."""
        return tuple(f"v_head.{name}" for name, _ in self.named_parameters())

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Copies ``v_head.summary.weight`` and ``v_head.summary.bias``."""
        for name, parameter in self.named_parameters():
            self._copy(f"v_head.{name}", parameter, self._get(tensors, f"v_head.{name}"))

    def forward(self, hidden: Tensor) -> Tensor:
        """Values [n, 1]: Q of PQM, not squashed."""
        logits: Tensor = self.summary(hidden.to(self.summary.weight.dtype))
        return logits

    def probability(self, logits: Tensor) -> Tensor:
        """``sigmoid(logits)[:, 0]``."""
        return _exact(logits)[:, 0].sigmoid()

    def log_odds(self) -> tuple[nn.Module, Tensor, Tensor]:
        """The head itself."""
        return nn.Identity(), self.summary.weight[0], self.summary.bias[0]


class QuantileHead(StepHead):
    """M quantiles of the success probability [U]: ``sigmoid`` of a Linear d' -> M behind the base head's trunk.

    Make it with `from_head`: before training every quantile then equals the base PRM's probability (for
    `ReasonEvalHead` up to its averaged log odds). The released code leaves the biases of two PRMs random; not here.
    """

    def __init__(self, trunk: nn.Module, width: int, quantiles: int) -> None:
        super().__init__()
        if quantiles < 1:
            raise ValueError(f"quantiles must be at least 1, got {quantiles}")
        self.trunk = trunk
        self.quantiles = nn.Linear(width, quantiles)

    @classmethod
    def from_head(cls, head: StepHead, quantiles: int) -> QuantileHead:
        """``quantiles`` copies of the base head's log odds; a copy, the base head stays as it is."""
        import copy

        if not isinstance(head, StepHead) or isinstance(head, QuantileHead):
            raise TypeError(f"head must be a StepHead with one probability, got {type(head).__name__}")
        trunk, weight, bias = head.log_odds()
        made = cls(copy.deepcopy(trunk), weight.shape[0], quantiles).to(weight)
        with torch.no_grad():
            made.quantiles.weight.copy_(weight.expand_as(made.quantiles.weight))
            made.quantiles.bias.copy_(bias.expand_as(made.quantiles.bias))
        return made

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits [n, M]; their sigmoid are the quantiles."""
        logits: Tensor = self.quantiles(self.trunk(hidden.to(self.quantiles.weight.dtype)))
        return logits

    def probability(self, logits: Tensor) -> Tensor:
        """The median column's sigmoid: QR's point estimate [NUMERICS 1]; the lower middle one for an even M."""
        return _exact(logits)[:, (logits.shape[1] - 1) // 2].sigmoid()

    def log_odds(self) -> tuple[nn.Module, Tensor, Tensor]:
        """The median column."""
        middle = (self.quantiles.out_features - 1) // 2
        return self.trunk, self.quantiles.weight[middle], self.quantiles.bias[middle]
