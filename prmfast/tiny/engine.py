"""The tiny policy behind the engine protocol."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from prmfast._threads import one_thread
from prmfast.engines.base import Completion, check_sample_inputs
from prmfast.engines.random import sample_keys, text_key
from prmfast.tiny.decoder import MAX_LENGTH, Decoder
from prmfast.tiny.policy import forward
from prmfast.tiny.task import PAD_ID, QUESTION_LENGTH, TOKEN_ID, UNK_ID, decode, encode, parse_question


class TinyEngine:
    """Implements ``prmfast.engines.Engine`` with the tiny world's own batched decoder.

    A sample is a function of (prompt, prefix, seed). The random numbers belong to (prompt, seed, position), so a sample
    continued from one of its own prefixes with its own seed gives itself back. ``stop``: words that end a sample and
    stay in its text; with ``(";",)`` a sample is one step.
    """

    def __init__(self, decoder: Decoder, policy_id: str, *, temperature: float = 1.0, stop: Sequence[str] = ()) -> None:
        if not temperature > 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        self.decoder = decoder
        self.policy_id = policy_id
        self.temperature = temperature
        self.stop = _stop_words(stop)

    def sample(
        self, prompts: Sequence[str], seeds: Sequence[int], *, prefixes: Sequence[str] | None = None
    ) -> list[Completion]:
        """One answer per (prompt, seed[, prefix]); see ``Engine.sample``. ValueError for a malformed question."""
        check_sample_inputs(prompts, seeds, prefixes)
        if not prompts:
            return []
        starts = list(zip(prompts, prefixes if prefixes is not None else [""] * len(prompts), strict=True))
        distinct = {start: i for i, start in enumerate(dict.fromkeys(starts))}
        rows = torch.full((len(distinct), MAX_LENGTH), PAD_ID)
        for (prompt, prefix), i in distinct.items():
            ids = start_ids(prompt, prefix)
            rows[i, : len(ids)] = torch.tensor(ids)
        prompt_keys = {prompt: text_key(prompt) for prompt in dict.fromkeys(prompts)}
        keys = sample_keys(torch.tensor([prompt_keys[prompt] for prompt in prompts]), torch.tensor(seeds))
        index = torch.tensor([distinct[start] for start in starts])
        drawn = self.decoder.sample(rows, index, keys, temperature=self.temperature, stop_ids=list(self.stop))
        start_lengths = (rows != PAD_ID).sum(1)[index].tolist()
        return [
            Completion(
                prompt,
                seed,
                text=decode(ids[QUESTION_LENGTH:length]),
                token_ids=tuple(ids[QUESTION_LENGTH:length]),
                n_tokens=length - start,
                finished=finished,
                stop=self.stop.get(ids[length - 1]) if length > start else None,
            )
            for prompt, seed, ids, length, start, finished in zip(
                prompts,
                seeds,
                drawn.ids.tolist(),
                drawn.length.tolist(),
                start_lengths,
                drawn.finished.tolist(),
                strict=True,
            )
        ]

    @one_thread()
    @torch.no_grad()
    def logprobs(self, prompts: Sequence[str], token_ids: Sequence[Sequence[int]]) -> list[list[float]]:
        """Natural log-probability, at temperature 1, of each token of an answer behind its prompt.

        Padding and unknown tokens are never drawn: the others share their probability. ValueError for unequal lengths.
        """
        if len(token_ids) != len(prompts):
            raise ValueError(f"token_ids must have one entry per prompt ({len(prompts)}), got {len(token_ids)}")
        found: list[list[float]] = []
        rows = list(zip(prompts, token_ids, strict=True))
        for at in range(0, len(rows), self.decoder.batch_size):
            part = rows[at : at + self.decoder.batch_size]
            ids = torch.full((len(part), MAX_LENGTH), PAD_ID)
            for row, (prompt, answer) in zip(ids, part, strict=True):
                row[: QUESTION_LENGTH + len(answer)] = torch.tensor([*parse_question(prompt), *answer])
            logits = forward(self.decoder.policy, ids[:, :-1], start=QUESTION_LENGTH - 1)[1]
            logits[..., [PAD_ID, UNK_ID]] = -torch.inf
            values = logits.log_softmax(-1).gather(-1, ids[:, QUESTION_LENGTH:, None])[..., 0].tolist()
            found += [row[: len(answer)] for row, (_, answer) in zip(values, part, strict=True)]
        return found

    def text(self, token_ids: Sequence[int]) -> str:
        """The text of the first tokens of an answer, with the space behind the last of them."""
        return decode(token_ids) + " "


def _stop_words(stop: Sequence[str]) -> dict[int, str]:
    if isinstance(stop, str):
        raise TypeError(f"stop must be a sequence of words, got one string {stop!r}")
    for word in stop:
        if TOKEN_ID.get(word, UNK_ID) <= UNK_ID:
            raise ValueError(f"stop must hold words of the tiny vocabulary, got {word!r}")
    return {TOKEN_ID[word]: word for word in stop}


def start_ids(prompt: str, prefix: str) -> list[int]:
    """Token ids of a question and an answer begun; ValueError for a malformed question or a prefix too long."""
    ids = parse_question(prompt) + encode(prefix)
    if len(ids) > MAX_LENGTH:
        limit = MAX_LENGTH - QUESTION_LENGTH
        raise ValueError(f"prefix must have at most {limit} tokens, got {len(ids) - QUESTION_LENGTH}")
    if min(ids) <= UNK_ID:  # padding, end and unknown come first in the vocabulary
        raise ValueError(f"prefix must not hold special tokens, got {prefix!r}")
    return ids
