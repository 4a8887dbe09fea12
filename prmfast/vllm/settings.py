"""What is agreed between the clients of a PRM on vLLM and its worker: settings, requests, and the rows that come back.

vLLM hands settings to every process (``additional_config["prmfast"]``) and a request to the pooler
(``PoolingParams.extra_kwargs["prmfast"]``); only a float32 tensor comes back. This module needs no vLLM.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator
from torch import Tensor
from typing_extensions import Self

KEY = "prmfast"
DEFAULT = "default"
BUDGET_LEVELS = 100
"""Quantiles that a budget is the mean over (prmfast.ias.LEVELS), whatever levels a request wants to see."""
_REFUSED = -1.0  # where a position stands in a row; the message follows, a byte a number


def _ordered(value: list[int]) -> list[int]:
    if value != sorted(value):
        raise ValueError("positions must never fall")
    return value


Probability = Annotated[float, Field(ge=0.0, le=1.0)]
Target = Annotated[float, Field(gt=0.0, lt=1.0)]
Positions = Annotated[list[Annotated[int, Field(ge=0)]], AfterValidator(_ordered)]
Levels = Annotated[int, Field(ge=1, le=10_000)] | Annotated[list[Probability], Field(min_length=1)]


class Checked(BaseModel):
    """A model whose errors name the field, the rule and the place it was given."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @classmethod
    def read(cls, value: Mapping[str, Any] | None, where: str) -> Self:
        """The checked form of ``value``; ValueError names the field, the rule and ``where`` it was given."""
        try:
            return cls.model_validate(dict(value or {}))
        except (ValidationError, TypeError) as error:
            problems = (
                "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}, got {e['input']!r}" for e in error.errors()[:5])
                if isinstance(error, ValidationError)
                else str(error)
            )
            raise ValueError(f"{where}: {problems}") from error


class PRMSettings(Checked):
    """What an engine is started with. `prmfast.vllm.prm_engine_args` writes it.

    Attributes:
        adapter: name of the `prmfast.prm` adapter that made the prompt's template and the head.
        prm_id, policy_id: of the PRM, and of the policy whose answers it judges, if that is known: calibrators fitted
            for others are refused.
        step_token_id: rows of requests without ``positions``; None where the PRM marks its steps by no token.
        calibrator: a folder, which is called "default", or folders by name. The first one is the default.
        levels: quantiles for requests that name none; a number stands for that many midpoints.
    """

    adapter: str | None = None
    prm_id: str | None = None
    policy_id: str | None = None
    step_token_id: Annotated[int, Field(ge=0)] | None = None
    calibrator: dict[str, str] = Field(default_factory=dict)
    levels: Levels = Field(default=[0.1, 0.5, 0.9])

    @field_validator("calibrator", mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        if value is None:
            return {}
        return {DEFAULT: value} if isinstance(value, str) else value

    @classmethod
    def of(cls, additional_config: Any) -> Self:
        """The settings inside vLLM's ``additional_config``; ValueError if they break a rule."""
        given = additional_config.get(KEY) if isinstance(additional_config, Mapping) else None
        return cls.read(given, f'additional_config["{KEY}"]')

    def chosen(self, request: StepRequest) -> str | None:
        """The calibrator that ``request`` asks for; ValueError for a name that was not configured."""
        if request.calibrator == DEFAULT and DEFAULT not in self.calibrator:
            return next(iter(self.calibrator), None)
        if request.calibrator is not None and request.calibrator not in self.calibrator:
            known = ", ".join(self.calibrator) or "none"
            raise ValueError(f"calibrator must be one of those configured ({known}), got {request.calibrator!r}")
        return request.calibrator


class PromptRows(Checked):
    """The rows of one prompt: see `StepRequest`."""

    positions: Positions
    empty: bool = False


class StepRequest(Checked):
    """What is asked of one prompt.

    Attributes:
        positions: of the tokens whose hidden states are judged, never falling; None: wherever the step token stands.
        calibrator: a configured name, "default" for the first one if there is any, None for raw scores.
        levels: of the quantiles that come back; a number M stands for the midpoints (m + 1/2) / M; None: as configured.
        targets, n_max: for each target C the smallest N with ``mean_m[1 - (1 - q_m)^N] >= C``, else n_max.
        history: scores of the first steps, known from before. Calibrators that read features of all steps so far need
            those of the steps that lie in the prefix cache, which are not computed again.
        empty: the row judges the empty answer, whose features differ from those of a first step.
        hidden: hidden states come back too, for calibration data.
        by_prompt: ``positions`` and ``empty`` of several prompts by `prompt_key`; a plugin
            request of vLLM's has one set of parameters for all its prompts.
    """

    positions: Positions | None = None
    calibrator: str | None = DEFAULT
    levels: Levels | None = None
    targets: list[Target] = Field(default_factory=list)
    n_max: Annotated[int, Field(ge=1, le=1 << 20)] = 64
    history: list[Probability] = Field(default_factory=list)
    empty: bool = False
    hidden: bool = False
    by_prompt: dict[str, PromptRows] = Field(default_factory=dict)

    def of_prompt(self, token_ids: Sequence[int]) -> StepRequest:
        """What is asked of one of several prompts; of the one prompt, where there is no table of them."""
        if not self.by_prompt:
            return self
        found = self.by_prompt.get(prompt_key(token_ids))
        if found is None:
            raise ValueError(f"by_prompt must have an entry per prompt, found none for one of {len(token_ids)} tokens")
        return self.model_copy(update={"positions": found.positions, "empty": found.empty})

    @classmethod
    def of(cls, extra_kwargs: Any) -> Self:
        """The request inside a ``PoolingParams.extra_kwargs``; all defaults where there is none."""
        given = extra_kwargs.get(KEY) if isinstance(extra_kwargs, Mapping) else None
        return cls.read(given, f'extra_kwargs["{KEY}"]')

    def extra_kwargs(self) -> dict[str, Any]:
        """What ``PoolingParams(extra_kwargs=...)`` takes; defaults are left out."""
        return {KEY: self.model_dump(exclude_defaults=True)}


def prompt_key(token_ids: Sequence[int]) -> str:
    """What a prompt is known by in `StepRequest.by_prompt`."""
    return hashlib.blake2b(array("q", token_ids).tobytes(), digest_size=16).hexdigest()


def level_values(levels: Levels) -> list[float]:
    """Levels as numbers: those given, or M midpoints (m + 1/2) / M."""
    return [(m + 0.5) / levels for m in range(levels)] if isinstance(levels, int) else list(levels)


@dataclass(frozen=True, slots=True)
class StepRows:
    """What the engine says of n judged steps; on the CPU, float32 but for positions and budgets (int64).

    positions [n], scores [n], expected [n], quantiles [n, M], budgets [n, targets], hidden [n, d]; None where the
    request or the engine has nothing of the kind. Where a calibrator needed scores that nobody gave, the quantiles are
    NaN and the budget is 0.
    """

    positions: Tensor
    scores: Tensor
    expected: Tensor | None
    quantiles: Tensor | None
    budgets: Tensor | None
    hidden: Tensor | None


@dataclass(frozen=True, slots=True)
class RowFormat:
    """Columns of the answer to a request: position, score, [E[p], quantiles], budgets, [hidden state]."""

    levels: tuple[float, ...]  # () without a calibrator
    targets: int
    hidden: int

    @classmethod
    def of(cls, request: StepRequest, settings: PRMSettings, hidden_width: int) -> RowFormat:
        """The columns that both sides agree on; ValueError for a calibrator that is not configured."""
        calibrated = settings.chosen(request) is not None
        levels = level_values(settings.levels if request.levels is None else request.levels) if calibrated else []
        return cls(tuple(levels), len(request.targets), hidden_width if request.hidden else 0)

    @property
    def width(self) -> int:
        """Number of columns."""
        return 2 + (1 + len(self.levels) if self.levels else 0) + self.targets + self.hidden

    def split(self, rows: Tensor) -> StepRows:
        """The parts of ``rows`` [n, width]. ValueError with the worker's own words where it refused the request."""
        rows = rows.detach().float().cpu()
        if len(rows) == 1 and rows[0, 0] == _REFUSED:
            raise ValueError(bytes(rows[0, 1:].to(torch.uint8).tolist()).decode("utf-8"))
        if rows.ndim != 2 or rows.shape[1] != self.width:
            raise ValueError(f"rows must have shape (n, {self.width}) for this request, got {tuple(rows.shape)}")
        calibrated = 1 if self.levels else 0
        sizes = [1, 1, calibrated, len(self.levels), self.targets, self.hidden]
        position, score, expected, quantiles, budgets, hidden = rows.split(sizes, dim=1)
        return StepRows(
            position[:, 0].long(),
            score[:, 0],
            expected[:, 0] if calibrated else None,
            quantiles if calibrated else None,
            budgets.nan_to_num(nan=0.0).long() if self.targets else None,
            hidden if self.hidden else None,
        )


def refusal(message: str) -> Tensor:
    """The answer to a request that cannot be served: an exception in the worker would end every other request too."""
    return torch.tensor([[_REFUSED, *message.encode("utf-8")]], dtype=torch.float32)
