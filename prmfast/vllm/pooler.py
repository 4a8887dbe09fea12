"""The pooler inside vLLM's worker: picks step rows out of every batch by itself, scores and calibrates them there.

vLLM's own STEP pooling turns chunked prefill and prefix caching off, because it sees a prompt as one piece. This one
knows where each piece starts: rows are taken from every chunk as it comes, and tokens of the cached prefix have none.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.pooler import Pooler, PoolingParamsUpdate

from prmfast.prm.heads import StepHead
from prmfast.vllm.estimates import Calibrators, Judged
from prmfast.vllm.settings import PRMSettings, StepRequest, refusal


@dataclass(frozen=True, slots=True)
class _Part:
    """What this batch holds of a request: tokens ``start`` to ``end - 1``."""

    request: StepRequest
    positions: Sequence[int]  # of all steps of the prompt
    start: int
    end: int
    reads_hidden: bool

    def steps_between(self, start: int, end: int) -> int:
        """Number of steps judged at tokens ``start`` to ``end - 1``."""
        return bisect_left(self.positions, end) - bisect_left(self.positions, start)

    @property
    def count(self) -> int:
        """Number of steps judged in this batch."""
        return self.steps_between(self.start, self.end)


class StepPooler(Pooler):
    """Hidden states of a batch -> rows of `prmfast.vllm.settings.RowFormat`, one tensor per finished request."""

    def __init__(self, head: StepHead, settings: PRMSettings, hidden_width: int) -> None:
        super().__init__()
        self.head = head
        self.settings = settings
        self.calibrators = Calibrators(settings, hidden_width)

    def get_supported_tasks(self) -> set[Any]:
        """The one task whose prompts may be cut in pieces."""
        return {"token_classify"}

    def get_pooling_updates(self, task: Any) -> PoolingParamsUpdate:
        """Step tokens are looked for in the prompt."""
        return PoolingParamsUpdate(requires_token_ids=True)

    @torch.no_grad()
    def forward(self, hidden_states: Tensor, pooling_metadata: Any) -> list[Tensor | None]:
        """One entry per request of the batch, in its order; None while the prompt is not finished."""
        cursor = pooling_metadata.get_pooling_cursor()
        scheduled, ends = cursor.num_scheduled_tokens_cpu.tolist(), cursor.seq_lens_cpu.tolist()
        token_ids = pooling_metadata.get_prompt_token_ids_cpu()
        parts: list[_Part | ValueError] = []
        index: list[int] = []
        offset = 0
        for params, ids, count, end in zip(pooling_metadata.pooling_params, token_ids, scheduled, ends, strict=True):
            part = self._part(params.extra_kwargs, ids, end - count, end)
            parts.append(part)
            if isinstance(part, _Part):
                first = bisect_left(part.positions, part.start)
                index += [offset + p - part.start for p in part.positions[first : first + part.count]]
            offset += count
        # an index of its own copies the rows: views would change under torch.compile's buffers
        rows = hidden_states[torch.tensor(index, dtype=torch.int64, device=hidden_states.device)]
        scores = self.head.probability(self.head(rows)).float() if index else rows.new_empty(0, dtype=torch.float32)
        return self._finish(parts, rows, scores, cursor.is_finished().tolist(), pooling_metadata.pooling_states)

    def _part(self, extra_kwargs: Any, token_ids: Tensor, start: int, end: int) -> _Part | ValueError:
        try:
            request = StepRequest.of(extra_kwargs).of_prompt(token_ids.tolist())
            reads_hidden = self.calibrators.reads_hidden(request)
            positions = self._positions(request, token_ids)
        except ValueError as error:
            return error
        return _Part(request, positions, start, end, reads_hidden)

    def _positions(self, request: StepRequest, token_ids: Tensor) -> list[int]:
        if request.positions is not None:
            if request.positions and request.positions[-1] >= len(token_ids):
                raise ValueError(
                    f"positions must lie inside the prompt of {len(token_ids)} tokens, got {request.positions[-1]}"
                )
            return request.positions
        if self.settings.step_token_id is None:
            raise ValueError(
                "positions must be given: this PRM marks steps by no token of their own "
                '(extra_kwargs={"prmfast": {"positions": [...]}})'
            )
        found: list[int] = (token_ids == self.settings.step_token_id).nonzero()[:, 0].tolist()
        return found

    def _finish(
        self,
        parts: Sequence[_Part | ValueError],
        rows: Tensor,
        scores: Tensor,
        finished: Sequence[bool],
        states: Sequence[Any],
    ) -> list[Tensor | None]:
        """Keeps the rows of unfinished requests beside them, answers the finished ones together."""
        out: list[Tensor | None] = [None] * len(parts)
        judged: dict[int, Judged] = {}
        offset = 0
        for i, (part, done, state) in enumerate(zip(parts, finished, states, strict=True)):
            if isinstance(part, ValueError):
                out[i] = refusal(str(part)).to(rows.device) if done else None
                continue
            count = part.count
            piece = slice(offset, offset + count)
            offset += count
            hidden = rows[piece].float() if part.reads_hidden else scores.new_empty(count, 0)
            kept: list[Tensor] = state.hidden_states_cache
            _keep(kept, part, torch.cat((scores[piece, None], hidden), dim=1))
            if done:
                whole = torch.cat(kept[1::2])
                judged[i] = Judged(part.request, part.positions, whole[:, 0], whole[:, 1:])
                kept.clear()
        for i, answer in zip(judged, self.calibrators.rows(list(judged.values())), strict=True):
            out[i] = answer
        return out


def _keep(kept: list[Tensor], part: _Part, rows: Tensor) -> None:
    """Appends the rows of tokens ``part.start`` to ``part.end - 1``; pieces are kept as (first and last token, rows).

    A request that was preempted comes again from an earlier token: what it brings anew replaces what was kept. Where
    it comes back behind the last piece, because others have filled the cache meanwhile, the earlier rows go: a gap
    would look like consecutive steps.
    """
    while kept:
        first, end = kept[-2].tolist()
        if end < part.start:
            kept.clear()
        elif first >= part.start:
            del kept[-2:]
        else:
            kept[-2:] = [torch.tensor((first, part.start)), kept[-1][: part.steps_between(first, part.start)]]
            break
    kept += [torch.tensor((part.start, part.end)), rows]
