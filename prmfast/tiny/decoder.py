"""Batched sampling from the tiny policy: KV cache, shared prefixes computed once, counter-based random numbers.

Rollouts of one prompt agree for a while, so the decoder keeps one cache row per distinct prefix and lets it fork where
samples part. The random number of a token is a hash of (prompt, seed, position); the few draws that fall closer to the
edge between two tokens than float32 can tell apart are decided by a float64 forward pass of their own sequence. So a
sample is a function of (prompt, prefix, seed) and never of the batch around it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from prmfast._threads import one_thread
from prmfast.engines.random import uniform
from prmfast.tiny.policy import Policy, attention_input, feed_forward, forward, rms_norm, rotary_table
from prmfast.tiny.task import ANSWER_LENGTH, EOS_ID, PAD_ID, QUESTION_LENGTH, UNK_ID, VOCAB_SIZE

MAX_LENGTH = QUESTION_LENGTH + ANSWER_LENGTH
# Batched float32 matrix products move the cumulative distribution by about 1e-6; closer draws are decided in float64.
_TIE = 2e-5


def distribution(logits: Tensor, temperature: float) -> Tensor:
    """Cumulative next-token distribution [N, V] in float64; padding and unknown tokens are never drawn."""
    logits = logits.double() / temperature
    logits[:, [PAD_ID, UNK_ID]] = -torch.inf
    return logits.softmax(-1).cumsum(-1)


@dataclass(frozen=True, slots=True)
class Samples:
    """Drawn sequences: ids [S, 37] with prompt and answer, padded on the right; length [S]; finished [S] (bool), by an
    end token or a stop token.
    """

    ids: Tensor
    length: Tensor
    finished: Tensor


class Decoder:
    """Samples from a policy with a KV cache; equals sampling token by token from ``forward`` without a cache."""

    def __init__(self, policy: Policy, *, batch_size: int = 1024) -> None:
        """``batch_size``: rows decoded together; it bounds memory (about 38 KB a row) and changes no sample."""
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.policy = policy
        self.batch_size = batch_size
        self._exact = policy.to(torch.float64)
        self._tables = rotary_table(policy.config, 2 * MAX_LENGTH, policy.embedding.dtype)

    @one_thread()
    @torch.no_grad()
    def sample(
        self,
        prompts: Tensor,
        index: Tensor,
        keys: Tensor,
        *,
        temperature: float = 1.0,
        stop_ids: Sequence[int] = (),
    ) -> Samples:
        """One sample per row of ``index``, until an end token, one of ``stop_ids`` or the length limit.

        prompts: int64 [P, L], distinct token sequences padded on the right, L <= 37
        index: int64 [S], which prompt each sample continues · keys: int64 [S] from ``engines.random.sample_keys``
        """
        if not temperature > 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        # Prompts of one length need no padding, and samples of one prompt share the most work.
        order = ((prompts != PAD_ID).sum(1)[index] * len(prompts) + index).argsort(stable=True)
        ids = torch.full((len(index), MAX_LENGTH), PAD_ID)
        length = torch.zeros(len(index), dtype=torch.int64)
        finished = torch.zeros(len(index), dtype=torch.bool)
        for rows in order.split(self.batch_size):
            used, local = index[rows].unique(return_inverse=True)
            run = _Run(self, prompts[used], local, keys[rows], temperature, (EOS_ID, *stop_ids))
            run.finish()
            ids[rows], length[rows], finished[rows] = run.ids, run.length, run.finished
        return Samples(ids, length, finished)

    def exact_distribution(self, ids: Tensor, length: Tensor, temperature: float) -> Tensor:
        """Next-token distribution [N, V] behind the first ``length`` tokens of each row, in float64."""
        _, logits = forward(self._exact, ids[:, : int(length.max())])
        return distribution(logits[torch.arange(len(ids)), length - 1], temperature)


class _Run:
    """One batch of samples on its way through the decoder."""

    def __init__(
        self,
        decoder: Decoder,
        prompts: Tensor,
        index: Tensor,
        keys: Tensor,
        temperature: float,
        ends: Sequence[int],
    ) -> None:
        self.decoder, self.keys, self.temperature, self.ends = decoder, keys, temperature, torch.tensor(ends)
        lengths = (prompts != PAD_ID).sum(1)
        self.length = lengths[index].clone()
        self.ids = torch.full((len(index), MAX_LENGTH), PAD_ID)
        self.ids[:, : prompts.shape[1]] = prompts[index]
        self.finished = torch.zeros(len(index), dtype=torch.bool)
        self.active = (self.length < MAX_LENGTH).nonzero()[:, 0]
        self.node = index[self.active]  # cache row of each active sample
        self._prefill(prompts, lengths)

    def _prefill(self, prompts: Tensor, lengths: Tensor) -> None:
        """Fill the cache from the prompts, padded on the left so that all rows write the same column next."""
        policy, config = self.decoder.policy, self.decoder.policy.config
        n, width = len(prompts), int(lengths.max())
        shift = torch.arange(width) - (width - lengths)[:, None]  # [n, width] position in the prompt, < 0 is padding
        self.masked = bool((shift < 0).any())
        capacity = width + MAX_LENGTH - int(lengths.min())
        self.seen = torch.ones(n, capacity, dtype=torch.bool)
        self.seen[:, :width] = shift >= 0
        causal = torch.ones(width, width, dtype=torch.bool).tril()
        # Padding attends to itself: an empty row of the mask would give NaN.
        mask = (causal & self.seen[:, None, :width]) | torch.eye(width, dtype=torch.bool)
        shape = (config.num_hidden_layers, 2, n, config.num_attention_heads, capacity, config.head_dim)
        self.cache = torch.zeros(shape, dtype=policy.embedding.dtype)
        self.column = width
        tables = tuple(table[:width] for table in self.decoder._tables)
        x = policy.embedding[prompts.gather(1, shift.clamp(min=0))]
        for i, (layer, cache) in enumerate(zip(policy.layers, self.cache, strict=True)):
            q, k, v = attention_input(x, layer, config, (tables[0], tables[1]))
            cache[0, :, :, :width], cache[1, :, :, :width] = k, v
            if i == config.num_hidden_layers - 1:  # only the last position's output is read
                q, x, mask = q[:, :, -1:], x[:, -1:], mask[:, -1:]
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None])
            x = x + F.linear(mixed.transpose(1, 2).reshape(x.shape), layer.output_weight)
            x = feed_forward(x, layer, config)
        self.logits = F.linear(rms_norm(x[:, -1], policy.norm, config.rms_norm_eps), policy.embedding)

    def finish(self) -> None:
        """Draw tokens until every sample has ended."""
        while len(self.active):
            tokens = self._draw()
            ended = torch.isin(tokens, self.ends)
            alive = ~ended & (self.length[self.active] < MAX_LENGTH)
            self.finished[self.active[ended]] = True
            self.active = self.active[alive]
            if len(self.active):
                tokens = self._fork(self.node[alive] * VOCAB_SIZE + tokens[alive])
                self._step(tokens)

    def _draw(self) -> Tensor:
        """Next token of every active sample; written to ids."""
        at = self.length[self.active]
        u = uniform(self.keys[self.active], at)
        cumulative = distribution(self.logits, self.temperature)[self.node]
        close = ((cumulative - u[:, None]).abs() < _TIE).any(1).nonzero()[:, 0]
        if len(close):
            rows = self.active[close]
            cumulative[close] = self.decoder.exact_distribution(self.ids[rows], at[close], self.temperature)
        tokens: Tensor = torch.searchsorted(cumulative, u[:, None], right=True)[:, 0].clamp_(max=VOCAB_SIZE - 1)
        self.ids[self.active, at] = tokens
        self.length[self.active] = at + 1
        return tokens

    def _fork(self, branch: Tensor) -> Tensor:
        """Cache rows for the distinct (row, token) pairs among the samples; returns one token per new row."""
        distinct, self.node = branch.unique(return_inverse=True)
        parent = distinct // VOCAB_SIZE
        tokens: Tensor = distinct % VOCAB_SIZE
        rows = self.cache.shape[2]
        if len(parent) != rows or not torch.equal(parent, torch.arange(rows)):
            shape = (*self.cache.shape[:2], len(parent), *self.cache.shape[3:])
            forked = torch.empty(shape, dtype=self.cache.dtype)
            for new, old in zip(forked.flatten(0, 1), self.cache.flatten(0, 1), strict=True):
                new[:, :, : self.column] = old[:, :, : self.column].index_select(0, parent)
            self.cache, self.seen = forked, self.seen[parent]
        return tokens

    def _step(self, tokens: Tensor) -> None:
        """One token per cache row: extend the cache and compute the next logits."""
        policy, config = self.decoder.policy, self.decoder.policy.config
        at, end = self.column, self.column + 1
        tables = tuple(table[at:end] for table in self.decoder._tables)
        mask = self.seen[:, None, None, :end] if self.masked else None
        x = policy.embedding[tokens][:, None]
        for layer, cache in zip(policy.layers, self.cache, strict=True):
            q, k, v = attention_input(x, layer, config, (tables[0], tables[1]))
            cache[0, :, :, at:end], cache[1, :, :, at:end] = k, v
            mixed = F.scaled_dot_product_attention(q, cache[0, :, :, :end], cache[1, :, :, :end], attn_mask=mask)
            x = x + F.linear(mixed.transpose(1, 2).reshape(x.shape), layer.output_weight)
            x = feed_forward(x, layer, config)
        self.column = end
        self.logits = F.linear(rms_norm(x[:, 0], policy.norm, config.rms_norm_eps), policy.embedding)
