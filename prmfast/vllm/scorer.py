"""A PRM on vLLM as prmfast's other parts see it: `VLLMPRM` offline, `AsyncVLLMPRM` on an event loop."""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from typing_extensions import Self

from prmfast.engines._vllm_streams import last_output
from prmfast.engines.base import StepScores, check_judge_inputs, check_questions, check_score_inputs
from prmfast.vllm.arguments import check_engine, prm_engine_args
from prmfast.vllm.chains import Chain, StepStore, make_chain, next_wave
from prmfast.vllm.settings import DEFAULT, Levels, PRMSettings, RowFormat, StepRequest, StepRows

if TYPE_CHECKING:
    from prmfast.prm.adapter import PRMAdapter

TASK = "token_classify"
LEVELS = 100  # as prmfast.ias: what budgets are averaged over
MAX_STEPS = 200_000


@dataclass(frozen=True, slots=True)
class ScoringStats:
    """Counts since the PRM was made. ``cached_tokens`` of ``prompt_tokens`` were not computed again; ``repeats`` are
    requests that were sent once more without the prefix cache, because it held rows that the client did not know.
    """

    requests: int = 0
    repeats: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    steps_asked: int = 0
    steps_known: int = 0


class _Scoring:
    """What both clients share: chains of text, requests for them, rows that come back."""

    def __init__(
        self,
        config: Any,
        *,
        adapter: PRMAdapter | None,
        tokenizer: Any,
        calibrator: str | None,
        levels: Levels,
        max_steps: int,
    ) -> None:
        self.settings: PRMSettings
        self.settings, self.adapter, self.tokenizer = check_engine(config, adapter, tokenizer)
        self.prm_id = str(self.settings.prm_id)
        self.hidden_width = int(config.model_config.hf_text_config.hidden_size)
        self.max_model_len = int(config.model_config.max_model_len)
        self.request = StepRequest(calibrator=calibrator, levels=levels)
        self.form = RowFormat.of(self.request, self.settings, self.hidden_width)
        self.store = StepStore(max_steps)
        self.stats = ScoringStats()

    def chain(self, question: str, answer: str | None) -> Chain:
        """The prompt of an answer with steps, or of the empty one (None). ValueError where it is too long to serve."""
        steps = [] if answer is None else self.adapter.split_steps(answer)
        encoded = self.adapter.encode(self.tokenizer, question, steps)
        if len(encoded.token_ids) > self.max_model_len:
            raise ValueError(
                f"question and answer must fit into the engine's max_model_len of {self.max_model_len} tokens, "
                f"got {len(encoded.token_ids)} for the question {question[:80]!r}"
            )
        return make_chain(encoded, empty=not steps)

    def ask(self, chain: Chain, request: StepRequest | None = None, *, whole: bool) -> tuple[dict[str, Any], Any]:
        """(prompt, pooling parameters) for a chain; ``whole`` computes every row of it again."""
        from vllm import PoolingParams

        request = (request or self.request).model_copy(
            update={
                "positions": list(chain.encoded.step_positions),
                "history": [float(row[1]) for row in chain.rows],
                "empty": chain.empty,
            }
        )
        params = PoolingParams(task=TASK, extra_kwargs=request.extra_kwargs(), skip_reading_prefix_cache=whole)
        return {"prompt_token_ids": list(chain.encoded.token_ids)}, params

    def take(self, chain: Chain, output: Any, *, repeat: bool = False) -> None:
        """Takes up an answer of the engine. ValueError where the worker refused the request."""
        rows = output.outputs.data.detach().float().cpu()
        self.form.split(rows)  # raises where these are no rows
        self.count(chain, output, repeat=repeat)
        self.store.add(chain, rows)
        self.store.fill(chain)

    def count(self, chain: Chain, output: Any, *, repeat: bool = False) -> None:
        """Adds a request to the statistics."""
        was = self.stats
        self.stats = replace(
            was,
            requests=was.requests + 1,
            repeats=was.repeats + repeat,
            prompt_tokens=was.prompt_tokens + len(output.prompt_token_ids),
            cached_tokens=was.cached_tokens + int(output.num_cached_tokens or 0),
        )

    def recall(self, chain: Chain) -> Chain:
        """Fills a new chain with what is known of it."""
        known = self.store.fill(chain)
        was = self.stats
        self.stats = replace(was, steps_asked=was.steps_asked + len(chain.keys), steps_known=was.steps_known + known)
        return chain

    def rows(self, chain: Chain) -> StepRows:
        """The rows of a complete chain; RuntimeError for one that a full pass has not completed."""
        if not chain.complete:
            raise RuntimeError(
                f"{self.prm_id}: step {len(chain.rows)} of {len(chain.keys)} came back as NaN; the model's activations "
                "overflow: serve it with dtype='bfloat16' or 'float32'"
            )
        return self.form.split(torch.stack(chain.rows))

    def scores(self, chain: Chain | None) -> StepScores:
        """`rows` as the protocols want them; None, an answer without a step, has no row."""
        if chain is None:
            return StepScores((), torch.empty(0, len(self.form.levels)) if self.form.levels else None)
        rows = self.rows(chain)
        return StepScores(tuple(rows.scores.tolist()), rows.quantiles)


class VLLMPRM:
    """A PRM, and its calibrator if there is one, on an offline vLLM engine: implements `Judge` and `Scorer`.

    Steps that were judged before are not computed again: their rows are kept here, their keys and values in vLLM's
    prefix cache. The numbers are those of a full pass, in whatever order chains grow; where the cache holds a prefix
    whose rows are not known here (or has lost one whose rows are), the chain is computed again.

    Args:
        llm: ``vllm.LLM(**prm_engine_args(model, ...))``.
        adapter, tokenizer: of the prompts; by default those that the engine was started with.
        calibrator: name of a configured one, "default" for the first if there is any, None for scores alone.
        levels: of the quantiles; a number M stands for the midpoints (m + 1/2) / M.
        max_steps: rows kept here, least recently used go first (8 bytes and 4 a level each, and what Python adds).
    """

    def __init__(
        self,
        llm: Any,
        *,
        adapter: PRMAdapter | None = None,
        tokenizer: Any = None,
        calibrator: str | None = DEFAULT,
        levels: Levels = LEVELS,
        max_steps: int = MAX_STEPS,
    ) -> None:
        self.llm = llm
        self._scoring = _Scoring(
            llm.llm_engine.vllm_config,
            adapter=adapter,
            tokenizer=tokenizer,
            calibrator=calibrator,
            levels=levels,
            max_steps=max_steps,
        )
        self.prm_id = self._scoring.prm_id

    @classmethod
    def from_pretrained(cls, model: str, *, calibrator: Any = None, levels: Levels = LEVELS, **engine: Any) -> Self:
        """Starts the engine too; ``engine`` goes to `prm_engine_args`."""
        arguments = prm_engine_args(model, calibrator=calibrator, **engine)
        from vllm import LLM

        return cls(LLM(**arguments), levels=levels)

    @property
    def stats(self) -> ScoringStats:
        """Requests, tokens and steps so far."""
        return self._scoring.stats

    def forget(self) -> None:
        """Drops the rows kept here and the engine's prefix cache: the next call computes everything."""
        self._scoring.store.clear()
        self.llm.reset_prefix_cache()

    def judge(self, questions: Sequence[str], answers: Sequence[str | None]) -> list[StepScores]:
        """Scores and quantiles [steps, M] of each (question, answer) pair; answer None is the empty answer.

        An answer without a step has none. TypeError for a bare string, ValueError for unequal lengths.
        """
        check_judge_inputs(questions, answers)
        return [self._scoring.scores(chain) for chain in self._known(questions, answers)]

    def rows(self, questions: Sequence[str], answers: Sequence[str | None]) -> list[StepRows | None]:
        """As `judge`, with positions and E[p] too; None for an answer without a step."""
        check_judge_inputs(questions, answers)
        return [None if chain is None else self._scoring.rows(chain) for chain in self._known(questions, answers)]

    def score(self, questions: Sequence[str], answers: Sequence[Sequence[str]]) -> list[list[list[float]]]:
        """Scores in [0, 1], indexed [question][answer][step]; see `Scorer.score`."""
        flat = self.judge(*_pairs(questions, answers))
        return [list(map(_score_list, part)) for part in _by_question(flat, answers)]

    def question_state(self, questions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Score [B] and hidden state [B, d] float32 of the empty answer of each question, computed anew."""
        check_questions(questions)
        if not questions:
            return torch.empty(0), torch.empty(0, self._scoring.hidden_width)
        rows = self._hidden([self._scoring.chain(question, None) for question in questions])
        return torch.cat([row.scores for row in rows]), torch.cat([_hidden(row) for row in rows])

    def features(self, questions: Sequence[str], answers: Sequence[Sequence[str]]) -> list[list[Tensor]]:
        """Hidden states [steps, d] float32 of each answer, indexed [question][answer], computed anew."""
        flat_questions, flat = _pairs(questions, answers)
        chains = self._chains(flat_questions, flat)
        rows = iter(self._hidden([chain for chain in chains if chain is not None]))
        nothing = torch.empty(0, self._scoring.hidden_width)
        states = [nothing if chain is None else _hidden(next(rows)) for chain in chains]
        return _by_question(states, answers)

    def _chains(self, questions: Sequence[str], answers: Sequence[str | None]) -> list[Chain | None]:
        """A chain per pair, None for an answer without a step."""
        split = self._scoring.adapter.split_steps
        return [
            None if answer is not None and not split(answer) else self._scoring.chain(question, answer)
            for question, answer in zip(questions, answers, strict=True)
        ]

    def _known(self, questions: Sequence[str], answers: Sequence[str | None]) -> list[Chain | None]:
        """As `_chains`, every chain complete."""
        pairs = list(zip(questions, answers, strict=True))
        distinct = dict.fromkeys(pairs)
        chains = dict(zip(distinct, self._chains(*zip(*distinct, strict=True)) if distinct else [], strict=True))
        held = [self._scoring.recall(chain) for chain in chains.values() if chain is not None]
        while wave := next_wave(held):
            self._send(wave, whole=False)
            self._send([chain for chain in wave if not chain.complete], whole=True)
            for chain in wave:
                self._scoring.rows(chain)  # raises unless complete now, so that this loop ends
            for chain in held:
                self._scoring.store.fill(chain)
        return [chains[pair] for pair in pairs]

    def _send(self, chains: Sequence[Chain], *, whole: bool) -> None:
        outputs = self._encode([self._scoring.ask(chain, whole=whole) for chain in chains])
        for chain, output in zip(chains, outputs, strict=True):
            self._scoring.take(chain, output, repeat=whole)

    def _encode(self, requests: Sequence[tuple[dict[str, Any], Any]]) -> list[Any]:
        if not requests:
            return []
        prompts, params = zip(*requests, strict=True)
        return list(self.llm.encode(list(prompts), list(params), pooling_task=TASK, use_tqdm=False))

    def _hidden(self, chains: Sequence[Chain]) -> list[StepRows]:
        """Scores and hidden states of whole passes, which are too wide to keep."""
        request = StepRequest(calibrator=None, hidden=True)
        form = RowFormat.of(request, self._scoring.settings, self._scoring.hidden_width)
        outputs = self._encode([self._scoring.ask(chain, request, whole=True) for chain in chains])
        for chain, output in zip(chains, outputs, strict=True):
            self._scoring.count(chain, output)
        return [form.split(output.outputs.data) for output in outputs]


class AsyncVLLMPRM:
    """`VLLMPRM` on an event loop, over ``vllm.v1.engine.async_llm.AsyncLLM``: implements `AsyncJudge`.

    Arguments as `VLLMPRM`; one object belongs to one event loop. Cancelling `judge` aborts its request in the engine.
    """

    def __init__(
        self,
        engine: Any,
        *,
        adapter: PRMAdapter | None = None,
        tokenizer: Any = None,
        calibrator: str | None = DEFAULT,
        levels: Levels = LEVELS,
        max_steps: int = MAX_STEPS,
    ) -> None:
        self.engine = engine
        self._scoring = _Scoring(
            engine.vllm_config,
            adapter=adapter,
            tokenizer=tokenizer,
            calibrator=calibrator,
            levels=levels,
            max_steps=max_steps,
        )
        self.prm_id = self._scoring.prm_id
        self._ids = (f"prm-{uuid.uuid4().hex[:8]}-{i}" for i in itertools.count())

    @property
    def stats(self) -> ScoringStats:
        """Requests, tokens and steps so far."""
        return self._scoring.stats

    async def judge(self, question: str, answer: str | None) -> StepScores:
        """Scores and quantiles [steps, M] of one answer; None is the empty answer."""
        if answer is not None and not self._scoring.adapter.split_steps(answer):
            return self._scoring.scores(None)
        chain = self._scoring.recall(self._scoring.chain(question, answer))
        for whole in (False, True):
            if not chain.complete:
                self._scoring.take(chain, await self._encode(chain, whole=whole), repeat=whole)
        return self._scoring.scores(chain)

    async def _encode(self, chain: Chain, *, whole: bool) -> Any:
        prompt, params = self._scoring.ask(chain, whole=whole)
        request_id = next(self._ids)
        outputs = self.engine.encode(prompt, params, request_id=request_id)
        output = await last_output(outputs, lambda: self.engine.abort(request_id))
        if output is None or not output.finished:
            raise RuntimeError(f"{self.prm_id}: the engine ended a request without an answer; was it shut down?")
        return output


def _pairs(questions: Sequence[str], answers: Sequence[Sequence[str]]) -> tuple[list[str], list[str]]:
    check_score_inputs(questions, answers)
    pairs = [(question, text) for question, row in zip(questions, answers, strict=True) for text in row]
    return [question for question, _ in pairs], [text for _, text in pairs]


def _by_question(flat: Iterable[Any], answers: Sequence[Sequence[str]]) -> list[list[Any]]:
    values = iter(flat)
    return [[next(values) for _ in row] for row in answers]


def _score_list(scores: StepScores) -> list[float]:
    return list(scores.scores)


def _hidden(rows: StepRows) -> Tensor:
    assert rows.hidden is not None
    return rows.hidden
