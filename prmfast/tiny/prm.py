"""The tiny process reward model: a small head on the policy's hidden states, step log-probabilities and entropies.

Where a state cannot verify a table fact again, the probability that the policy gave its own step can: wrong results are
rarely the likely ones. What is still to come is read by a small recurrent cell that runs over the hidden states of the
remaining operations, last one first, because ``max`` and ``* 0`` near the end forgive what happens before them. It is
nearly all the PRM knows about a question without an answer.

The PRM is miscalibrated for a reason: its labels say whether ANY of four rollouts from a prefix succeeded, and its
questions have at most five operations, while it is used on questions with up to eight.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prmfast._files import atomic_path, write_text
from prmfast._threads import one_thread
from prmfast.engines.base import StepScores, check_judge_inputs, check_questions, check_score_inputs
from prmfast.tiny.decoder import MAX_LENGTH
from prmfast.tiny.engine import start_ids
from prmfast.tiny.policy import Policy, forward
from prmfast.tiny.task import (
    ASK,
    MAX_STEPS,
    PAD_ID,
    QUESTION_LENGTH,
    STEP_ID,
    VALUE_0,
    VALUES,
    number_of_steps,
    split_steps,
)

FEATURES = (
    "sum log-probability of the results",
    "smallest log-probability of a result",
    "log-probability of the last result",
    "sum of the results' entropies",
    "entropy at the last result",
    "largest entropy at a result",
    "entropy of the next token",
    "log-probability of the likeliest next token",
    "steps done / 8",
    "steps to come / 8",
)
MODEL_TYPE = "prmfast-tiny-prm"


@dataclass(frozen=True, slots=True)
class StepStates:
    """What the head sees, for every position from ``?`` on (T = 20): one teacher-forced pass of the policy."""

    hidden: Tensor  # [N, T, H] the policy's last hidden states
    features: Tensor  # [N, T, 10] in the order of FEATURES
    operations: Tensor  # [N, 8, 2H] hidden states of operator and operand
    steps: Tensor  # [N] number of operations
    done: Tensor  # [N, T] number of finished steps, 0..8

    def take(self, rows: Tensor) -> StepStates:
        """The states of some sequences."""
        return StepStates(*(getattr(self, name)[rows] for name in StepStates.__dataclass_fields__))


@torch.no_grad()
def step_states(policy: Policy, ids: Tensor, *, chunk: int = 1024) -> StepStates:
    """Hidden states, log-probabilities and entropies along sequences ids [N, 37] (question and answer, padded)."""
    parts = [_step_states(policy, rows) for rows in ids.split(chunk)]
    return StepStates(*(torch.cat([getattr(p, name) for p in parts]) for name in StepStates.__dataclass_fields__))


def _step_states(policy: Policy, ids: Tensor) -> StepStates:
    start = QUESTION_LENGTH - 1
    hidden, logits = forward(policy, ids)
    logp = logits[:, start:].log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1)
    answer = ids[:, start:]
    is_result = ((answer >= VALUE_0) & (answer < VALUE_0 + VALUES)).float()
    is_result[:, 0] = 0.0
    token_logp = F.pad(logp[:, :-1].gather(-1, answer[:, 1:, None])[..., 0], (1, 0)) * is_result
    token_entropy = F.pad(entropy[:, :-1], (1, 0)) * is_result
    position = torch.arange(answer.shape[1])
    last = (is_result * position).cummax(1).values.long()  # 0, where both features are 0, before the first result
    done = (answer == STEP_ID).cumsum(1).clamp(max=MAX_STEPS)
    steps = number_of_steps(ids[:, :QUESTION_LENGTH])
    columns = (
        token_logp.cumsum(1),
        token_logp.cummin(1).values,
        token_logp.gather(1, last),
        token_entropy.cumsum(1),
        token_entropy.gather(1, last),
        token_entropy.cummax(1).values,
        entropy,
        logp.amax(-1),
        done / MAX_STEPS,
        (steps[:, None] - done).clamp(min=0) / MAX_STEPS,
    )
    operations = torch.cat([hidden[:, 1:start:2], hidden[:, 2:start:2]], -1)
    return StepStates(hidden[:, start:], torch.stack(columns, -1), operations, steps, done)


class TinyPRMNet(nn.Module):
    """The trainable part: reader of the operations to come, two hidden layers, one logit."""

    feature_mean: Tensor
    feature_std: Tensor

    def __init__(self, policy_width: int = 64, reader_width: int = 32, width: int = 64, state_width: int = 32) -> None:
        super().__init__()
        self.sizes = {
            "policy_width": policy_width,
            "reader_width": reader_width,
            "width": width,
            "state_width": state_width,
        }
        self.register_buffer("feature_mean", torch.zeros(len(FEATURES)))
        self.register_buffer("feature_std", torch.ones(len(FEATURES)))
        self.operation = nn.Linear(2 * policy_width, reader_width)
        self.reader = nn.GRUCell(reader_width, reader_width)
        self.hidden = nn.Linear(policy_width + len(FEATURES) + reader_width, width)
        self.state = nn.Linear(width, state_width)
        self.logit = nn.Linear(state_width, 1)

    def forward(self, states: StepStates, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Logit [R] and hidden state [R, 32] at (sequence, position) pairs; position 0 is ``?``, the empty answer."""
        to_come = self.read(states.operations, states.steps)[rows, states.done[rows, columns]]
        features = (states.features[rows, columns] - self.feature_mean) / self.feature_std
        x = torch.cat([states.hidden[rows, columns], features, to_come], 1)
        state = F.silu(self.state(F.silu(self.hidden(x))))
        return self.logit(state)[:, 0], state

    def read(self, operations: Tensor, steps: Tensor) -> Tensor:
        """Reader states [N, 9, r]: column i has read the operations from the last one back to number i."""
        inputs = F.silu(self.operation(operations))
        state = inputs.new_zeros(len(operations), self.sizes["reader_width"])
        columns = [state]
        for i in reversed(range(MAX_STEPS)):
            state = torch.where((steps > i)[:, None], self.reader(inputs[:, i], state), state)
            columns.append(state)
        return torch.stack(columns[::-1], 1)


class TinyPRM:
    """Implements ``Scorer`` and ``Judge``: scores in [0, 1] of every step, and of the answer not yet begun.

    The scores are too high, by construction: trained on any-of-4 labels of questions with at most 5 operations.
    ``features`` and ``question_state`` give the input of the last layer (32 numbers) for a calibrator.
    """

    def __init__(self, policy: Policy, net: TinyPRMNet, prm_id: str) -> None:
        self.policy = policy
        self.net = net.eval().requires_grad_(False)
        self.prm_id = prm_id

    def score(self, questions: Sequence[str], answers: Sequence[Sequence[str]]) -> list[list[list[float]]]:
        """Scores [question][answer][step]; a step ends at ``;`` or with the answer, as in ``task.split_steps``."""
        return [[score.tolist() for score, _ in row] for row in self.step_outputs(questions, answers)]

    def features(self, questions: Sequence[str], answers: Sequence[Sequence[str]]) -> list[list[Tensor]]:
        """Hidden states [steps, 32] of every answer, indexed [question][answer]."""
        return [[state for _, state in row] for row in self.step_outputs(questions, answers)]

    @one_thread()
    def question_state(self, questions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Score [B] and hidden state [B, 32] of the empty answer of each question."""
        check_questions(questions)
        if not questions:
            return torch.empty(0), torch.empty(0, self.net.sizes["state_width"])
        states = step_states(self.policy, _padded([start_ids(question, "") for question in questions]))
        rows = torch.arange(len(questions))
        logit, state = self.net(states, rows, torch.zeros_like(rows))
        return logit.sigmoid(), state

    def judge(self, questions: Sequence[str], answers: Sequence[str | None]) -> list[StepScores]:
        """Scores of one answer per question, without quantiles; None is the empty answer; see ``Judge.judge``."""
        check_judge_inputs(questions, answers)
        empty = [question for question, answer in zip(questions, answers, strict=True) if answer is None]
        firsts = iter(self.question_state(empty)[0].tolist())
        rows = iter(self.score(questions, [[] if answer is None else [answer] for answer in answers]))
        return [
            StepScores((next(firsts),) if answer is None else tuple(row[0]))
            for answer, row in zip(answers, rows, strict=True)
        ]

    @one_thread()
    def step_outputs(
        self, questions: Sequence[str], answers: Sequence[Sequence[str]]
    ) -> list[list[tuple[Tensor, Tensor]]]:
        """Score [steps] and hidden states [steps, 32] of every answer, in one pass over the distinct ones.

        ValueError for unequal lengths or malformed text, TypeError for a bare string where a list of answers belongs.
        """
        check_score_inputs(questions, answers)
        pairs = [(question, text) for question, row in zip(questions, answers, strict=True) for text in row]
        judged = dict(zip(dict.fromkeys(pairs), self._judge(list(dict.fromkeys(pairs))), strict=True))
        return [[judged[question, text] for text in row] for question, row in zip(questions, answers, strict=True)]

    def _judge(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[Tensor, Tensor]]:
        if not pairs:
            return []
        ids = _padded([start_ids(question, text) for question, text in pairs])
        rows, columns, counts = [], [], []
        for i, (_, text) in enumerate(pairs):
            ends = step_ends(text)
            rows += [i] * len(ends)
            columns += ends
            counts.append(len(ends))
        row, column = torch.tensor(rows, dtype=torch.int64), torch.tensor(columns, dtype=torch.int64)
        logit, state = self.net(step_states(self.policy, ids), row, column)
        return list(zip(logit.sigmoid().split(counts), state.split(counts), strict=True))

    def save_pretrained(self, directory: str | Path, **extra: object) -> None:
        """config.json and model.safetensors; ``extra`` goes into the config."""
        from safetensors.torch import save_file

        config = {"model_type": MODEL_TYPE, "features": FEATURES, "ends_at": ASK, **self.net.sizes, **extra}
        with atomic_path(Path(directory) / "model.safetensors") as path:
            save_file(self.net.state_dict(), path, metadata={"format": "pt"})
        write_text(Path(directory) / "config.json", json.dumps(config, indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, directory: str | Path, policy: Policy) -> TinyPRM:
        """From a directory that ``save_pretrained`` wrote; the PRM id holds a digest of the weights."""
        from safetensors.torch import load_file

        directory = Path(directory)
        config = json.loads((directory / "config.json").read_text())
        if config.get("model_type") != MODEL_TYPE:
            raise ValueError(f"model_type must be {MODEL_TYPE!r}, got {config.get('model_type')!r} in {directory}")
        net = TinyPRMNet(*(config[name] for name in ("policy_width", "reader_width", "width", "state_width")))
        net.load_state_dict(load_file(directory / "model.safetensors"))
        return cls(policy, net, f"prmfast/tiny-prm@{file_digest(directory / 'model.safetensors')}")


def step_ends(answer: str) -> list[int]:
    """Positions of the last tokens of the steps, counted from ``?`` = 0."""
    ends, at = [], 0
    for step in split_steps(answer):
        at += len(step.split())
        ends.append(at)
    return ends


def file_digest(path: Path) -> str:
    """First 12 hex digits of the SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]


def _padded(rows: Sequence[Sequence[int]]) -> Tensor:
    ids = torch.full((len(rows), MAX_LENGTH), PAD_ID)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
    return ids
