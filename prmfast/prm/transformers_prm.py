"""A process reward model on transformers: one forward pass for all steps of a chain, batches of chains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from prmfast.calibration.judging import check_calibrator, quantiles, step_features
from prmfast.engines.base import StepScores, check_judge_inputs, check_questions, check_score_inputs
from prmfast.prm.adapter import EncodedChain, PRMAdapter
from prmfast.prm.heads import StepHead

if TYPE_CHECKING:
    from prmfast.calibration.base import Calibrator


@dataclass(frozen=True, slots=True)
class _Judged:
    """Scores [steps] float32 and hidden states [steps, d] of one chain, on the CPU."""

    score: Tensor
    hidden: Tensor


class TransformersPRM:
    """Implements `Scorer` and `Judge` on a transformers backbone; `AutoPRM.from_pretrained` makes one.

    Only the backbone runs: the head sees the step rows, a causal PRM's vocabulary two rows of ``lm_head``. Chains are
    batched by length and padded behind their end, where a causal model does not look.

    Args:
        model: a transformers decoder without head (``AutoModel``), [B, T] token ids -> ``last_hidden_state`` [B, T, d].
        head: from ``adapter.head``, with its tensors loaded; stays in its own dtype (float32).
        tokenizer: the checkpoint's. adapter: the PRM's template.
        prm_id: names the PRM in journals and in the provenance of calibrators.
        calibrator: fitted for this PRM; `judge` then gives quantiles at ``levels`` levels. ArtifactError for another's.
        batch_size: chains per forward pass.
    """

    def __init__(
        self,
        model: Any,
        head: StepHead,
        tokenizer: Any,
        adapter: PRMAdapter,
        *,
        prm_id: str,
        calibrator: Calibrator | None = None,
        levels: int = 100,
        batch_size: int = 16,
    ) -> None:
        for name, value in (("levels", levels), ("batch_size", batch_size)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not isinstance(head, StepHead):
            raise TypeError(f"head must be a StepHead, got {type(head).__name__}")
        adapter.check(model.config, tokenizer)
        self.model = model.eval()
        self.head = head.to(model.device).eval()
        self.tokenizer = tokenizer
        self.adapter = adapter
        self.prm_id = prm_id
        self.levels = levels
        self.batch_size = batch_size
        self.hidden_width = int(model.config.hidden_size)
        if calibrator is not None:
            check_calibrator(calibrator, prm_id=prm_id, hidden_width=self.hidden_width)
        self.calibrator = calibrator

    def score(self, questions: Sequence[str], answers: Sequence[Sequence[str]]) -> list[list[list[float]]]:
        """Scores [question][answer][step] in [0, 1]; an answer without steps has none. Errors as in `judge`."""
        return [[chain.score.tolist() for chain in row] for row in self._rows(questions, answers)]

    def split_steps(self, answer: str) -> list[str]:
        """The steps that the PRM sees in an answer."""
        return self.adapter.split_steps(answer)

    def score_steps(self, questions: Sequence[str], answers: Sequence[Sequence[str]]) -> list[list[float]]:
        """Scores [question][step] in [0, 1] of one answer per question, given as its steps; they are not split again.

        Steps lose the template's own marks. Errors as in `judge`, but for a step token in a step.
        """
        check_score_inputs(questions, answers)
        clean = self.adapter.without_marks
        chains = [[clean(step) for step in self.adapter.format_steps(steps)] for steps in answers]
        names = [f"answers[{i}]" for i in _range(answers)]
        return [one.score.tolist() for one in self._judge_steps(list(zip(questions, chains, strict=True)), names)]

    def features(self, questions: Sequence[str], answers: Sequence[Sequence[str]]) -> list[list[Tensor]]:
        """Hidden states [steps, d] of each answer, [question][answer]: the head's input, float32 on the CPU."""
        return [[chain.hidden for chain in row] for row in self._rows(questions, answers)]

    def question_state(self, questions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Score [B] and hidden state [B, d] of the empty answer of each question, float32 on the CPU."""
        check_questions(questions)
        chains = self._judge(
            [(question, None) for question in questions], [f"questions[{i}]" for i in _range(questions)]
        )
        if not chains:
            return torch.empty(0), torch.empty(0, self.hidden_width)
        return torch.cat([chain.score for chain in chains]), torch.cat([chain.hidden for chain in chains])

    def judge(self, questions: Sequence[str], answers: Sequence[str | None]) -> list[StepScores]:
        """Scores, and quantiles with a calibrator, of every (question, answer) pair; None is the empty answer.

        TypeError for a bare string, ValueError for unequal lengths, a step token in the text, or a chain of more tokens
        than the model has positions; the message names the row.
        """
        check_judge_inputs(questions, answers)
        chains = self._judge(list(zip(questions, answers, strict=True)), [f"answers[{i}]" for i in _range(answers)])
        if self.calibrator is None:
            return [StepScores(tuple(chain.score.tolist())) for chain in chains]
        values = self._quantiles(self.calibrator, chains, answers)
        return [StepScores(tuple(chain.score.tolist()), rows) for chain, rows in zip(chains, values, strict=True)]

    def _quantiles(
        self, calibrator: Calibrator, chains: Sequence[_Judged], answers: Sequence[str | None]
    ) -> list[Tensor]:
        """Quantiles [steps, M] of every chain, one call of the calibrator for all."""
        if not chains:
            return []
        score = torch.cat([chain.score for chain in chains])
        hidden = torch.cat([chain.hidden for chain in chains])
        features = torch.cat(
            [
                step_features(chain.score.tolist(), empty=answer is None)
                for chain, answer in zip(chains, answers, strict=True)
            ]
        )
        counts = [len(chain.score) for chain in chains]
        return list(quantiles(calibrator, score, hidden, features, self.levels).split(counts))

    def _rows(self, questions: Sequence[str], answers: Sequence[Sequence[str]]) -> list[list[_Judged]]:
        check_score_inputs(questions, answers)
        pairs = [(question, text) for question, row in zip(questions, answers, strict=True) for text in row]
        chains = iter(self._judge(pairs, [f"answers[{i}][{j}]" for i, row in enumerate(answers) for j in _range(row)]))
        return [[next(chains) for _ in row] for row in answers]

    def _judge(self, pairs: Sequence[tuple[str, str | None]], names: Sequence[str]) -> list[_Judged]:
        """Every pair's scores and states."""
        split = [(q, None if answer is None else self.adapter.split_steps(answer)) for q, answer in pairs]
        return self._judge_steps(split, names)

    def _judge_steps(self, chains: Sequence[tuple[str, list[str] | None]], names: Sequence[str]) -> list[_Judged]:
        """Scores and states of questions with steps, None for the empty answer.

        Equal chains run once, an answer without steps does not run.
        """
        encoded = [
            self._encode(question, steps or [], name) if steps or steps is None else None
            for (question, steps), name in zip(chains, names, strict=True)
        ]
        distinct = sorted({chain for chain in encoded if chain is not None}, key=lambda chain: len(chain.token_ids))
        done: dict[EncodedChain | None, _Judged] = {None: _Judged(torch.empty(0), torch.empty(0, self.hidden_width))}
        for at in range(0, len(distinct), self.batch_size):
            batch = distinct[at : at + self.batch_size]
            done.update(zip(batch, self._forward(batch), strict=True))
        return [done[chain] for chain in encoded]

    def _encode(self, question: str, steps: Sequence[str], name: str) -> EncodedChain:
        try:
            chain = self.adapter.encode(self.tokenizer, question, steps)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        limit = getattr(self.model.config, "max_position_embeddings", None)
        if limit is not None and len(chain.token_ids) > limit:
            raise ValueError(
                f"{name} with its question must fit into the PRM's {limit} positions, got {len(chain.token_ids)} tokens"
            )
        return chain

    @torch.no_grad()
    def _forward(self, batch: Sequence[EncodedChain]) -> list[_Judged]:
        device = self.model.device
        lengths = torch.tensor([len(chain.token_ids) for chain in batch])
        ids = torch.zeros(len(batch), int(lengths.max()), dtype=torch.int64)
        for row, chain in zip(ids, batch, strict=True):
            row[: len(chain.token_ids)] = torch.tensor(chain.token_ids)
        mask = torch.arange(ids.shape[1]) < lengths[:, None]
        states = self.model(input_ids=ids.to(device), attention_mask=mask.long().to(device), use_cache=False)
        counts = [len(chain.step_positions) for chain in batch]
        rows = torch.arange(len(batch)).repeat_interleave(torch.tensor(counts))
        columns = torch.tensor([position for chain in batch for position in chain.step_positions])
        hidden = states.last_hidden_state[rows.to(device), columns.to(device)]
        score = self.head.probability(self.head(hidden))
        parts = zip(score.float().cpu().split(counts), hidden.float().cpu().split(counts), strict=True)
        return [_Judged(*part) for part in parts]


def _range(values: Sequence[Any]) -> range:
    return range(len(values))
