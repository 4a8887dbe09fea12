"""What the worker adds to scores: quantiles, their mean and budgets, by calibrators beside the PRM's head."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prmfast.calibration import load_calibrator
from prmfast.calibration.artifact import ArtifactError
from prmfast.calibration.base import Calibrator
from prmfast.calibration.data import CalibrationData
from prmfast.calibration.features import FEATURE_NAMES, SCORE_FEATURE_NAMES
from prmfast.calibration.judging import check_calibrator, step_features
from prmfast.ops import ias_budget
from prmfast.vllm.settings import BUDGET_LEVELS, PRMSettings, RowFormat, StepRequest, level_values


@dataclass(frozen=True, slots=True)
class Judged:
    """A request whose prefill is done: rows of its last n steps, as many as were computed.

    positions: of all its steps · scores [n], hidden [n, d] float32, on the worker's device; d is 0 where nobody asks
    """

    request: StepRequest
    positions: Sequence[int]
    scores: Tensor
    hidden: Tensor


@dataclass(frozen=True, slots=True)
class _Estimates:
    quantiles: Tensor  # [n, M] at the levels to be shown
    expected: Tensor  # [n]
    midpoints: Tensor  # [n, BUDGET_LEVELS], or [n, 0] where no budget is asked for


class Calibrators:
    """The configured artifacts, loaded and checked; they answer all finished requests of a batch together."""

    def __init__(self, settings: PRMSettings, hidden_width: int) -> None:
        self.settings, self.hidden_width = settings, hidden_width
        self._by_name = {
            name: load_checked(name, directory, settings, hidden_width)
            for name, directory in settings.calibrator.items()
        }

    def reads_hidden(self, request: StepRequest) -> bool:
        """Whether hidden states must be kept for ``request``; ValueError for a calibrator that is not configured."""
        name = self.settings.chosen(request)
        return request.hidden or (name is not None and self._by_name[name].hidden_width_ is not None)

    def rows(self, judged: Sequence[Judged]) -> list[Tensor]:
        """The answers, float32 [n, `RowFormat.width`]."""
        formats = [RowFormat.of(item.request, self.settings, self.hidden_width) for item in judged]
        groups: dict[tuple[str, tuple[float, ...], bool], list[int]] = {}
        for i, item in enumerate(judged):
            name = self.settings.chosen(item.request)
            if name is not None and len(item.scores):
                groups.setdefault((name, formats[i].levels, bool(item.request.targets)), []).append(i)
        estimates: dict[int, _Estimates] = {}
        for (name, levels, budgets), members in groups.items():
            made = self._estimate(self._by_name[name], levels, budgets, [judged[i] for i in members])
            estimates.update(zip(members, made, strict=True))
        return [_row(item, form, estimates.get(i)) for i, (item, form) in enumerate(zip(judged, formats, strict=True))]

    def _estimate(
        self, calibrator: Calibrator, levels: Sequence[float], budgets: bool, judged: Sequence[Judged]
    ) -> list[_Estimates]:
        shown, hidden_levels = list(levels), level_values(BUDGET_LEVELS) if budgets else []
        scores = torch.cat([item.scores for item in judged])
        known = torch.isfinite(scores)
        features = None
        if reads_history(calibrator):
            features = torch.cat([_features(item) for item in judged]).to(scores.device)
            known &= torch.isfinite(features).all(1)
        hidden = None
        if calibrator.hidden_width_ is not None:
            hidden = torch.cat([item.hidden for item in judged])
            known &= torch.isfinite(hidden).all(1)
        quantiles = scores.new_full((len(scores), len(shown) + len(hidden_levels)), torch.nan)
        expected = torch.full_like(scores, torch.nan)
        if bool(known.any()):
            data = CalibrationData.from_arrays(
                score=scores[known],
                successes=torch.zeros_like(scores[known], dtype=torch.int64),
                features=None if features is None else features[known],
                feature_names=None if features is None else FEATURE_NAMES,
                hidden=None if hidden is None else hidden[known],
            )
            quantiles[known] = calibrator.quantile(data, shown + hidden_levels).to(quantiles)
            expected[known] = calibrator.expected(data).to(expected)
        counts = [len(item.scores) for item in judged]
        return [
            _Estimates(part[:, : len(shown)], mean, part[:, len(shown) :])
            for part, mean in zip(quantiles.split(counts), expected.split(counts), strict=True)
        ]


def load_checked(name: str, directory: str, settings: PRMSettings, hidden_width: int) -> Calibrator:
    """A saved calibrator that fits this PRM, this policy and this width; ArtifactError, with its name, if not."""
    try:
        with _plain_torch():
            calibrator = load_calibrator(directory)
        check_calibrator(calibrator, prm_id=settings.prm_id, policy_id=settings.policy_id, hidden_width=hidden_width)
    except ArtifactError as error:
        raise ArtifactError(f"calibrator {name!r} ({directory}): {error}") from error
    return calibrator


def reads_history(calibrator: Calibrator) -> bool:
    """Whether a row's quantiles depend on the scores of the steps before it."""
    return calibrator.hidden_width_ is None and not set(calibrator.feature_names_) <= set(SCORE_FEATURE_NAMES)


def _features(item: Judged) -> Tensor:
    """`FEATURE_NAMES` [n, F] float32 of the computed steps, on the CPU; NaN where earlier scores are not known."""
    scores = item.scores.tolist()
    if item.request.empty:
        return step_features(scores, empty=True).float()
    before = len(item.positions) - len(scores)
    if len(item.request.history) < before:
        return torch.full((len(scores), len(FEATURE_NAMES)), torch.nan)
    return step_features([*item.request.history[:before], *scores])[before:].float()


def _row(item: Judged, form: RowFormat, estimates: _Estimates | None) -> Tensor:
    n, scores = len(item.scores), item.scores
    positions = torch.tensor(item.positions[len(item.positions) - n :], dtype=torch.float32, device=scores.device)
    columns = [positions[:, None], scores[:, None]]
    spread = scores[:, None]  # without a calibrator the score is taken for the probability: eq. 4
    if form.levels and estimates is not None:
        columns += [estimates.expected[:, None], estimates.quantiles]
        spread = estimates.midpoints
    elif form.levels:
        columns.append(scores.new_empty(n, 1 + len(form.levels)))  # n is 0
    columns += [_budget(spread, target, item.request.n_max) for target in item.request.targets]
    if form.hidden:
        columns.append(item.hidden)
    return torch.cat(columns, dim=1)


def _budget(quantiles: Tensor, target: float, n_max: int) -> Tensor:
    """`ias_budget` as [n, 1] float32; NaN where a row has no quantiles."""
    out = quantiles.new_full((len(quantiles), 1), torch.nan)
    known = torch.isfinite(quantiles).all(1)
    if bool(known.any()):
        out[known, 0] = ias_budget(quantiles[known], target, n_max).to(out)
    return out


@contextlib.contextmanager
def _plain_torch() -> Iterator[None]:
    """float32 on the CPU: vLLM makes models under the checkpoint's dtype and the device, which would round weights."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(before)
