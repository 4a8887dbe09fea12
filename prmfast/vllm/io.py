"""vLLM's IO processor for PRMs: one request with a question and many answers, numbers per step as JSON.

POST /pooling {"model": ..., "task": "plugin", "data": {"question": "...", "answers": ["...", null]}}
llm.encode({"data": {...}}, pooling_task="plugin")
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from pydantic import Field
from vllm import PoolingParams
from vllm.plugins.io_processors.interface import IOProcessor

from prmfast.prm.adapter import EncodedChain
from prmfast.vllm.arguments import check_engine
from prmfast.vllm.settings import (
    DEFAULT,
    Checked,
    Levels,
    PromptRows,
    RowFormat,
    StepRequest,
    Target,
    prompt_key,
)

TASK = "token_classify"
_WAITING = 4096  # requests whose answers may be awaited at a time; those of clients that went away are forgotten


class ScoreData(Checked):
    """The ``data`` of a request.

    Attributes:
        question: the question. answers: each a text, a list of steps, or null for the empty answer; at least one.
        calibrator, levels, targets, n_max: see `prmfast.vllm.StepRequest`.
    """

    question: str
    answers: list[str | list[str] | None] = Field(min_length=1)
    calibrator: str | None = DEFAULT
    levels: Levels | None = None
    targets: list[Target] = Field(default_factory=list)
    n_max: int = 64


@dataclass(frozen=True, slots=True)
class Asked:
    """A checked request: what to ask, and the chain of each answer (None where an answer has no step)."""

    request: StepRequest
    form: RowFormat
    chains: tuple[EncodedChain | None, ...]


_asked: ContextVar[Asked] = ContextVar("asked")


class PRMIOProcessor(IOProcessor):
    """Turns `ScoreData` into prompts and rows into JSON, with the engine's own adapter and tokenizer."""

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(vllm_config, *args, **kwargs)
        self.settings, self.adapter, self.tokenizer = check_engine(vllm_config, None, None)
        self.hidden_width = int(vllm_config.model_config.hf_config.hidden_size)
        self._waiting: OrderedDict[str | None, Asked] = OrderedDict()

    def parse_data(self, data: object) -> Asked:
        """Checks ``data``; ValueError says which field breaks which rule."""
        if not isinstance(data, dict):
            raise ValueError(f"data must be an object with question and answers, got {type(data).__name__}")
        given = ScoreData.read(data, "data")
        chains = tuple(self._chain(given.question, answer) for answer in given.answers)
        rows = {
            prompt_key(chain.token_ids): PromptRows(positions=list(chain.step_positions), empty=answer is None)
            for chain, answer in zip(chains, given.answers, strict=True)
            if chain is not None
        }
        if not rows:
            raise ValueError("data: answers must have at least one step, or be null for the empty answer")
        options = given.model_dump(include={"calibrator", "levels", "targets", "n_max"})
        request = StepRequest.read({**options, "by_prompt": rows}, "data")
        asked = Asked(request, RowFormat.of(request, self.settings, self.hidden_width), chains)
        # vLLM asks for the parameters of this request next, in the same context and without naming it
        _asked.set(asked)
        return asked

    def merge_pooling_params(self, params: PoolingParams | None = None) -> PoolingParams:
        """The parameters of the request that `parse_data` saw last in this context."""
        params = params or PoolingParams()
        params.task = TASK  # vLLM's second model runner knows no task "plugin"
        params.extra_kwargs = _asked.get().request.extra_kwargs()
        params.skip_reading_prefix_cache = True
        return params

    def pre_process(self, prompt: Asked, request_id: str | None = None, **kwargs: Any) -> list[Any]:
        """One prompt per answer that has a step."""
        self._waiting[request_id] = prompt
        while len(self._waiting) > _WAITING:
            self._waiting.popitem(last=False)
        return [{"prompt_token_ids": list(chain.token_ids)} for chain in prompt.chains if chain is not None]

    def post_process(self, model_output: Sequence[Any], request_id: str | None = None, **kwargs: Any) -> dict[str, Any]:
        """``{"prm_id", "levels", "answers": [{"scores", "expected", "quantiles", "budgets", "positions"}, ...]}``."""
        asked = self._waiting.pop(request_id)
        outputs = iter(model_output)
        return {
            "prm_id": self.settings.prm_id,
            "levels": list(asked.form.levels),
            "answers": [
                {"scores": [], "positions": []} if chain is None else _json(asked.form, next(outputs).outputs.data)
                for chain in asked.chains
            ],
        }

    def _chain(self, question: str, answer: str | list[str] | None) -> EncodedChain | None:
        steps = self.adapter.split_steps(answer) if isinstance(answer, str) else list(answer or ())
        return self.adapter.encode(self.tokenizer, question, steps) if steps or answer is None else None


def _json(form: RowFormat, data: Any) -> dict[str, Any]:
    """The rows of one answer, lists by step; without a calibrator there are neither means nor quantiles."""
    rows = form.split(data)
    named = {
        "scores": rows.scores,
        "positions": rows.positions,
        "expected": rows.expected,
        "quantiles": rows.quantiles,
        "budgets": rows.budgets,
    }
    return {name: value.tolist() for name, value in named.items() if value is not None}
