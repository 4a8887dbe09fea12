"""Any Hugging Face causal language model as an engine, one seeded stream of random numbers per sample."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from prmfast.engines.base import Completion, check_sample_inputs
from prmfast.engines.random import sample_keys, text_key, uniform


class TransformersEngine:
    """Implements ``Engine`` with ``model.generate``: samples depend on (prompt, prefix, seed), not on the batch.

    The random number of a token belongs to (prompt, seed, position), so the order and the company of the rows do not
    matter, up to what batched matrix products change in the logits (about 1e-6 of a probability in float32; more in
    half precision). Plain sampling at ``temperature``: penalties, top-k and top-p of the model's generation config are
    not used.

    model: any causal LM with ``generate`` · tokenizer: its tokenizer; the padding side does not matter
    max_new_tokens: length limit behind prompt and prefix · stop: strings that end an answer, kept in its text with
    what else the last token holds
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        max_new_tokens: int = 512,
        temperature: float = 1.0,
        batch_size: int = 32,
        stop: Sequence[str] = (),
        policy_id: str | None = None,
    ) -> None:
        if not hasattr(model, "generate"):
            raise TypeError(f"model must be a transformers causal LM with generate(), got {type(model).__name__}")
        if not callable(tokenizer):
            raise TypeError(f"tokenizer must be a transformers tokenizer, got {type(tokenizer).__name__}")
        if not temperature > 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        for name, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if isinstance(stop, str) or not all(stop):
            raise ValueError(f"stop must be a sequence of non-empty strings, got {stop!r}")
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.batch_size = batch_size
        self.stop = tuple(stop)
        self.policy_id = policy_id or getattr(model.config, "_name_or_path", "") or type(model).__name__
        self._end_ids = _end_ids(model, tokenizer)

    def sample(
        self, prompts: Sequence[str], seeds: Sequence[int], *, prefixes: Sequence[str] | None = None
    ) -> list[Completion]:
        """One answer per (prompt, seed[, prefix]); see ``Engine.sample``.

        Prompt and prefix are tokenised apart, so an answer can be continued from any text. ValueError for an empty
        prompt and where prompt, prefix and ``max_new_tokens`` exceed the model's positions.
        """
        check_sample_inputs(prompts, seeds, prefixes)
        answers = [self._encode(text, special=False) for text in prefixes] if prefixes is not None else None
        answers = answers or [[] for _ in prompts]
        rows = [self._encode(prompt, special=True) for prompt in prompts]
        for i, row in enumerate(rows):
            self._check_length(i, len(row), len(answers[i]))
        done: dict[int, Completion] = {}
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]) + len(answers[i]))
        for at in range(0, len(order), self.batch_size):
            batch = order[at : at + self.batch_size]
            starts = [rows[i] + answers[i] for i in batch]
            keys = sample_keys(
                torch.tensor([text_key(prompts[i]) for i in batch]), torch.tensor([seeds[i] for i in batch])
            )
            for i, (new, finished, stop) in zip(batch, self._generate(starts, keys), strict=True):
                ids = tuple(answers[i] + new)
                done[i] = Completion(prompts[i], seeds[i], self.text(ids), ids, len(new), finished, stop)
        return [done[i] for i in range(len(prompts))]

    @torch.no_grad()
    def logprobs(self, prompts: Sequence[str], token_ids: Sequence[Sequence[int]]) -> list[list[float]]:
        """Natural log-probability, at temperature 1, of each token of an answer behind its prompt.

        ``token_ids`` as in `Completion.token_ids`; one forward pass an answer, so no answer depends on another.
        ValueError for unequal lengths and an empty prompt.
        """
        from prmfast.ops import token_logprob

        if len(token_ids) != len(prompts):
            raise ValueError(f"token_ids must have one entry per prompt ({len(prompts)}), got {len(token_ids)}")
        found: list[list[float]] = []
        for i, (prompt, answer) in enumerate(zip(prompts, token_ids, strict=True)):
            start = self._encode(prompt, special=True)
            if not start:
                raise ValueError(f"prompts[{i}] must have at least one token, got none")
            if not answer:
                found.append([])
                continue
            ids = torch.tensor([[*start, *answer]], device=self.model.device)
            logits = self.model(ids, logits_to_keep=len(answer) + 1).logits[0, :-1]
            found.append(token_logprob(logits, ids[0, len(start) :]).tolist())
        return found

    def text(self, token_ids: Sequence[int]) -> str:
        """The text of the first tokens of an answer, as in `Completion.text`."""
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=True))

    def _encode(self, text: str, *, special: bool) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=special)["input_ids"]) if text else []

    def _check_length(self, i: int, prompt: int, prefix: int) -> None:
        if prompt == 0:
            raise ValueError(f"prompts[{i}] must have at least one token, got none")
        limit = getattr(self.model.config, "max_position_embeddings", None)
        if limit is not None and prompt + prefix + self.max_new_tokens > limit:
            raise ValueError(
                f"prompts[{i}] with its prefix and max_new_tokens must fit into {limit} positions, "
                f"got {prompt} + {prefix} + {self.max_new_tokens}"
            )

    @torch.no_grad()
    def _generate(self, starts: list[list[int]], keys: Tensor) -> list[tuple[list[int], bool, str | None]]:
        """New token ids of each row, whether it ended by itself, and by which stop string."""
        from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

        device = self.model.device
        width = max(map(len, starts))
        ids = torch.full((len(starts), width), self._end_ids[-1])
        mask = torch.zeros_like(ids)
        for i, row in enumerate(starts):
            ids[i, width - len(row) :] = torch.tensor(row)
            mask[i, width - len(row) :] = 1
        draw = _Draw(keys.to(device), (width - mask.sum(1)).to(device), self.temperature)
        ends = _Ends(self.tokenizer, width, torch.tensor(self._end_ids, device=device), self.stop)
        # The draw has happened when generate takes the arg max of what `draw` returns.
        config = GenerationConfig(
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
            eos_token_id=list(self._end_ids),
            pad_token_id=self._end_ids[-1],
        )
        drawn = self.model.generate(
            ids.to(device),
            attention_mask=mask.to(device),
            generation_config=config,
            logits_processor=LogitsProcessorList([draw]),
            stopping_criteria=StoppingCriteriaList([ends]),
        )
        new = drawn[:, width:].tolist()
        return [(row[:n], *end) for row, n, *end in zip(new, ends.length, ends.done, ends.found, strict=True)]


class _Draw:
    """Logits processor: leaves only the token that the row's random number picks from its distribution."""

    def __init__(self, keys: Tensor, padding: Tensor, temperature: float) -> None:
        self.keys, self.padding, self.temperature = keys, padding, temperature

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        u = uniform(self.keys, input_ids.shape[1] - self.padding)
        cumulative = (scores.double() / self.temperature).softmax(-1).cumsum(-1)
        tokens = torch.searchsorted(cumulative, u[:, None] * cumulative[:, -1:], right=True)
        picked = torch.full_like(scores, -torch.inf)
        return picked.scatter_(1, tokens.clamp_(max=scores.shape[1] - 1), 0.0)


class _Ends:
    """Stopping criterion: an end token or a stop string; remembers where each row ended."""

    def __init__(self, tokenizer: Any, start: int, end_ids: Tensor, stop: tuple[str, ...]) -> None:
        self.tokenizer, self.start, self.end_ids, self.stop = tokenizer, start, end_ids, stop
        self.done: list[bool] = []
        self.length: list[int] = []
        self.found: list[str | None] = []

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        n = input_ids.shape[1] - self.start
        if not self.done:
            self.done, self.length = [False] * len(input_ids), [0] * len(input_ids)
            self.found = [None] * len(input_ids)
        ended = torch.isin(input_ids[:, -1], self.end_ids).tolist()
        for i in range(len(input_ids)):
            if not self.done[i]:
                self.length[i] = n
                self.found[i] = None if ended[i] else self._stopped(input_ids[i])
                self.done[i] = ended[i] or self.found[i] is not None
        return torch.tensor(self.done, device=input_ids.device)

    def _stopped(self, row: Tensor) -> str | None:
        if not self.stop:
            return None
        # A stop string spans at most as many tokens as it has bytes.
        window = max(len(stop.encode()) for stop in self.stop) + 1
        text = self.tokenizer.decode(row[max(self.start, len(row) - window) :], skip_special_tokens=False)
        return next((stop for stop in self.stop if stop in text), None)


def _end_ids(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """Every end token that the model's generation config, its config or the tokenizer names; ValueError if none."""
    found: list[int] = []
    for owner in (getattr(model, "generation_config", None), model.config, tokenizer):
        value = getattr(owner, "eos_token_id", None)
        found += value if isinstance(value, (list, tuple)) else [value] if value is not None else []
    if not found:
        raise ValueError("model or tokenizer must name an end token, got eos_token_id None in both")
    return tuple(dict.fromkeys(int(value) for value in found))
