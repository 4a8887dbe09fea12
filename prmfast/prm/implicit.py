"""A trained implicit reward model as a PRM: prefix values from the log-ratios of policy and reference ([V])."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from prmfast.calibration.judging import check_calibrator, quantiles, step_features
from prmfast.engines.base import StepScores, check_judge_inputs, check_questions, check_score_inputs
from prmfast.prm.adapter import PRMError
from prmfast.prm.answers import Answer, AnswerModel, fingerprint, language_model, pad_answers
from prmfast.prm.data.conversation import Message, conversation_texts
from prmfast.prm.step_rewards import Protocol, step_rewards

if TYPE_CHECKING:
    from prmfast.calibration.base import Calibrator

DESCRIPTION = "implicit_prm.json"  # what `ImplicitTrainer` saves beside the policy


@dataclass(frozen=True, slots=True)
class TokenRatios:
    """One answer: ``log_ratio`` [T] of its tokens up to the last step's end, where steps end in it, states there.

    log_ratio: float64, log pi - log pi_ref. step_ends: indices into it, rising. hidden: [steps, d] float32, of the
    policy.
    """

    log_ratio: npt.NDArray[np.float64]
    step_ends: tuple[int, ...]
    hidden: Tensor


class ImplicitPRM:
    """Implements `Scorer`, `StepScorer` and `Judge` with a policy and its reference; `load_prm` makes one.

    A step's score is ``sigmoid(beta * sum of log pi - log pi_ref)`` over the answer's tokens up to the step's end, or
    with protocol="process" over its own tokens; with ``average`` the sum is divided by their number, which gives
    IPVRM's P(correct | prefix). The empty answer has the value 0 and the score 1/2, whatever the question: nothing is
    said of it. Question and answer are written as in training, by the tokenizer's chat template; what closes the turn
    is not scored.

    Args:
        policy, reference: of ``AutoModelForCausalLM``, of one vocabulary. tokenizer: the policy's, a fast one.
        beta, average: of the loss that trained the policy. protocol: "prefix" or "process".
        separator: what stands between the steps of an answer.
        prm_id, calibrator, levels, batch_size: see `TransformersPRM`.
    """

    def __init__(
        self,
        policy: Any,
        reference: Any,
        tokenizer: Any,
        *,
        beta: float,
        prm_id: str,
        average: bool = True,
        protocol: Protocol = "prefix",
        separator: str = "\n\n",
        calibrator: Calibrator | None = None,
        levels: int = 100,
        batch_size: int = 8,
    ) -> None:
        for name, value in (("levels", levels), ("batch_size", batch_size)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if policy.config.vocab_size != reference.config.vocab_size:
            raise PRMError(
                f"policy and reference must have one vocabulary, got {policy.config.vocab_size} and "
                f"{reference.config.vocab_size} entries"
            )
        if not getattr(tokenizer, "is_fast", False) or not getattr(tokenizer, "chat_template", None):
            raise PRMError("tokenizer must be a fast one with a chat template; load the one that was saved in training")
        self.policy, self.reference = AnswerModel(policy).eval(), AnswerModel(reference).eval()
        self.tokenizer = tokenizer
        self.beta, self.average, self.protocol, self.separator = float(beta), average, protocol, separator
        self.prm_id, self.levels, self.batch_size = prm_id, levels, batch_size
        self.hidden_width = int(policy.config.hidden_size)
        if calibrator is not None:
            check_calibrator(calibrator, prm_id=prm_id, hidden_width=self.hidden_width)
        self.calibrator = calibrator

    def log_ratios(self, questions: Sequence[str], answers: Sequence[Sequence[str]]) -> list[TokenRatios]:
        """Log-ratios of one answer per question, given as its steps; errors as in `judge`."""
        check_score_inputs(questions, answers)
        texts = [self.separator.join(steps) for steps in answers]
        gap = len(self.separator)
        ends = [[end - gap for end in accumulate(len(step) + gap for step in steps)] for steps in answers]
        return self._ratios(questions, texts, ends, [f"answers[{i}]" for i in range(len(answers))])

    def step_scores(self, ratios: TokenRatios, protocol: Protocol | None = None) -> list[float]:
        """Scores in [0, 1] of the steps of one answer; ``protocol`` None is the PRM's own."""
        from scipy.special import expit

        values = step_rewards(
            ratios.log_ratio,
            ratios.step_ends,
            beta=self.beta,
            protocol=protocol or self.protocol,
            average=self.average,
        )
        return [float(score) for score in expit(values)]

    def split_steps(self, answer: str) -> list[str]:
        """The steps of an answer: its parts between ``separator``, without empty ones."""
        return [part for part in answer.split(self.separator) if part.strip()]

    def score_steps(self, questions: Sequence[str], answers: Sequence[Sequence[str]]) -> list[list[float]]:
        """Scores [question][step] of one answer per question, given as its steps. Errors as in `judge`."""
        return [self.step_scores(one) for one in self.log_ratios(questions, answers)]

    def score(self, questions: Sequence[str], answers: Sequence[Sequence[str]]) -> list[list[list[float]]]:
        """Scores [question][answer][step] in [0, 1]; an answer without steps has none. Errors as in `judge`."""
        return [[self.step_scores(one) for one in row] for row in self._rows(questions, answers)]

    def features(self, questions: Sequence[str], answers: Sequence[Sequence[str]]) -> list[list[Tensor]]:
        """The policy's last hidden states [steps, d] at the steps' ends, [question][answer], float32 on the CPU."""
        return [[one.hidden for one in row] for row in self._rows(questions, answers)]

    def question_state(self, questions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Score [B], 1/2 of every question, and the policy's hidden state [B, d] behind the prompt, float32."""
        check_questions(questions)
        count = len(questions)
        found = self._ratios(
            questions, [""] * count, [[]] * count, [f"questions[{i}]" for i in range(count)], prompt=True
        )
        hidden = [one.hidden for one in found]
        return torch.full((len(questions),), 0.5), torch.cat(hidden) if hidden else torch.empty(0, self.hidden_width)

    def judge(self, questions: Sequence[str], answers: Sequence[str | None]) -> list[StepScores]:
        """Scores, and quantiles with a calibrator, of every (question, answer) pair; None is the empty answer.

        TypeError for a bare string; ValueError for unequal lengths, a step without a token or text that the chat
        template changes, and for more tokens than the models have positions; the message names the row.
        """
        check_judge_inputs(questions, answers)
        empty = [i for i, answer in enumerate(answers) if answer is None]
        written = [i for i, answer in enumerate(answers) if answer is not None]
        score, hidden = self.question_state([questions[i] for i in empty])
        found = {i: (score[at : at + 1].tolist(), hidden[at : at + 1]) for at, i in enumerate(empty)}
        rows = self._rows([questions[i] for i in written], [[str(answers[i])] for i in written])
        found |= {i: (self.step_scores(row[0]), row[0].hidden) for i, row in zip(written, rows, strict=True)}
        return [self._judged(*found[i], empty=answer is None) for i, answer in enumerate(answers)]

    def _judged(self, scores: list[float], hidden: Tensor, *, empty: bool) -> StepScores:
        if self.calibrator is None:
            return StepScores(tuple(scores))
        if not scores:
            return StepScores((), torch.empty(0, self.levels))
        features = step_features(scores, empty=empty)
        return StepScores(
            tuple(scores), quantiles(self.calibrator, torch.tensor(scores), hidden, features, self.levels)
        )

    def _rows(self, questions: Sequence[str], answers: Sequence[Sequence[str]]) -> list[list[TokenRatios]]:
        check_score_inputs(questions, answers)
        pairs = [(i, j, text) for i, row in enumerate(answers) for j, text in enumerate(row)]
        ends = []
        for _, _, text in pairs:
            parts = text.split(self.separator)
            gap = len(self.separator)
            stops = [end - gap for end in accumulate(len(part) + gap for part in parts)]
            ends.append([stop for stop, part in zip(stops, parts, strict=True) if part.strip()])
        names = [f"answers[{i}][{j}]" for i, j, _ in pairs]
        found = iter(self._ratios([questions[i] for i, _, _ in pairs], [text for *_, text in pairs], ends, names))
        return [[next(found) for _ in row] for row in answers]

    def _ratios(
        self,
        questions: Sequence[str],
        texts: Sequence[str],
        ends: Sequence[Sequence[int]],
        names: Sequence[str],
        *,
        prompt: bool = False,
    ) -> list[TokenRatios]:
        """Log-ratios of answers whose steps end before the characters ``ends``; with ``prompt`` the prompt's state."""
        nothing = TokenRatios(np.empty(0), (), torch.empty(0, self.hidden_width))
        found = [nothing] * len(texts)
        encoded = []
        for i, (question, text, stops, name) in enumerate(zip(questions, texts, ends, names, strict=True)):
            if stops or prompt:
                encoded.append((i, *self._encode(question, text, stops, name)))
        encoded.sort(key=lambda row: len(row[1].token_ids))
        for at in range(0, len(encoded), self.batch_size):
            batch = encoded[at : at + self.batch_size]
            for (i, *_), ratios in zip(batch, self._forward(batch), strict=True):
                found[i] = ratios
        return found

    def _encode(self, question: str, text: str, stops: Sequence[int], name: str) -> tuple[Answer, int, tuple[int, ...]]:
        """The conversation up to the last step's end, its prompt's length, and the steps' last tokens behind that."""
        before, after = conversation_texts([Message("user", question), Message("assistant", text)], self.tokenizer)
        start = after.find(text.strip())
        if start < 0:
            raise ValueError(f"{name}: the chat template must leave the answer as it is, it gives {after[:80]!r}")
        shift = start - (len(text) - len(text.lstrip()))
        prompt = [int(token) for token in self.tokenizer(before, add_special_tokens=False)["input_ids"]]
        told = self.tokenizer(after, add_special_tokens=False, return_offsets_mapping=True)
        begins = [begin for begin, _ in told["offset_mapping"]]
        last = [int(np.searchsorted(begins, min(stop, len(text.rstrip())) + shift)) - 1 for stop in stops]
        if any(b <= a for a, b in zip([-1, *last], last, strict=False)):
            raise ValueError(f"{name}: every step must have a token of its own, got {text!r:.80}")
        answer = [int(token) for token in told["input_ids"]][: last[-1] + 1 if last else 0]
        limit = getattr(self.policy.config, "max_position_embeddings", None)
        if limit is not None and len(prompt) + len(answer) > limit:
            raise ValueError(
                f"{name} with its question must fit into the PRM's {limit} positions, got "
                f"{len(prompt) + len(answer)} tokens"
            )
        mask = (False,) * len(prompt) + (True,) * len(answer)
        return Answer((*prompt, *answer), mask), len(prompt), tuple(last)

    @torch.no_grad()
    def _forward(self, batch: Sequence[tuple[int, Answer, int, tuple[int, ...]]]) -> list[TokenRatios]:
        device = next(self.policy.parameters()).device
        inputs = {name: value.to(device) for name, value in pad_answers([row[1] for row in batch]).items()}
        policy, states = self.policy.with_states(**inputs)
        ratio = (policy - self.reference(**inputs)).cpu().numpy()
        found = []
        for (_, answer, start, ends), row, hidden in zip(batch, ratio, states, strict=True):
            rows = [start + end for end in ends] if ends else [start - 1]
            found.append(TokenRatios(row[start : len(answer.token_ids)], ends, hidden[rows].float().cpu()))
        return found


def load_implicit_prm(
    directory: str | os.PathLike[str],
    *,
    reference: str | os.PathLike[str] | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    prm_id: str | None = None,
    **options: Any,
) -> ImplicitPRM:
    """The policy that `ImplicitTrainer` saved in a folder, with its reference.

    reference: folder or hub id, where it is not the one that training named. dtype: of both; None takes each
    checkpoint's. prm_id: defaults to the folder's name. options: of `ImplicitPRM`.

    PRMError where the folder was not saved by it, training knew no name of the reference, or the reference has other
    weights than in training.
    """
    from transformers import AutoTokenizer

    folder = Path(directory)
    try:
        description = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise PRMError(f"{folder} has no {DESCRIPTION}: ImplicitTrainer did not save it") from error
    name = reference or description["reference"]
    if name is None:
        raise PRMError(f"{folder}: its reference was made in training and has no name; load it with reference=")
    fixed = language_model(name)
    if fingerprint(AnswerModel(fixed)) != description["reference_fingerprint"]:
        raise PRMError(f"{folder}: {os.fspath(name)} has other weights than the reference of its training")
    policy = language_model(folder)
    return ImplicitPRM(
        policy.to(device=device or "cpu", dtype=dtype or policy.dtype),
        fixed.to(device=device or "cpu", dtype=dtype or fixed.dtype),
        AutoTokenizer.from_pretrained(folder, trust_remote_code=False),
        prm_id=prm_id or folder.resolve().name,
        **{"beta": description["beta"], "average": description["average"], **options},
    )
