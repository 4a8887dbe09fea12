"""What the loop asks of a language model, and any Hugging Face causal language model as such."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from prmfast.distrl.advantages import Advantages
from prmfast.distrl.losses import DistPPO, DistRLLoss, LossRule, dist_ppo, distrl_loss, linear_distrl_loss
from prmfast.ops import Candidates, candidate_td, linear_candidate_td, linear_entry_logprob, token_logprob


@dataclass(frozen=True, slots=True)
class Outputs:
    """Next-token distributions of N tokens, row t the one that token t came from.

    states: logits [N, V] (-inf for tokens that are never drawn), or with ``weight`` [V, d], the output layer, the last
    hidden states [N, d]: then no [N, V] tensor is made.
    """

    states: Tensor
    weight: Tensor | None = None

    def logits(self) -> Tensor:
        """[N, V]."""
        return self.states if self.weight is None else self.states @ self.weight.T

    def logprob(self, ids: Tensor, *, temperature: float = 1.0) -> Tensor:
        """log pi(ids[t] | s_t), [N], differentiable; ids int64 [N]."""
        if self.weight is None:
            return token_logprob(self.states, ids, temperature=temperature)
        rows = torch.arange(len(ids) + 1, device=ids.device)
        found = linear_entry_logprob(self.states, self.weight, rows, token_ids=ids, temperature=temperature)
        return found.to(torch.float64 if self.states.dtype == torch.float64 else torch.float32)

    def candidates(
        self, reward: Outputs, *, sampled: Tensor, p_min: float, beta: float, temperature: float = 1.0
    ) -> Candidates:
        """`candidate_td` of this policy at ``temperature`` and of ``reward``, sampled tokens forced in."""
        if self.weight is None or reward.weight is None:
            return candidate_td(
                self.logits(),
                reward.logits(),
                p_min=p_min,
                beta=beta,
                sampled=sampled,
                policy_temperature=temperature,
            )
        return linear_candidate_td(
            self.states,
            reward.states,
            policy_weight=self.weight,
            reward_weight=reward.weight,
            p_min=p_min,
            beta=beta,
            sampled=sampled,
            policy_temperature=temperature,
        )

    def loss(
        self,
        advantages: Advantages,
        *,
        sampled: Tensor,
        old_logp: Tensor,
        offsets: Tensor,
        rule: LossRule,
        temperature: float = 1.0,
        on_policy: bool = False,
    ) -> DistRLLoss:
        """`distrl_loss` or `linear_distrl_loss` of these distributions."""
        of = distrl_loss if self.weight is None else partial(linear_distrl_loss, weight=self.weight)
        return of(
            self.states,
            advantages=advantages,
            sampled=sampled,
            old_logp=old_logp,
            offsets=offsets,
            rule=rule,
            temperature=temperature,
            on_policy=on_policy,
        )

    def dist_loss(
        self, candidates: Candidates, *, offsets: Tensor, rule: LossRule, temperature: float = 1.0
    ) -> DistPPO:
        """`dist_ppo` of these distributions."""
        at = partial(dist_ppo, self.states, candidates, weight=self.weight)
        return at(offsets=offsets, rule=rule, temperature=temperature)


def output_layer(model: Any) -> Any:
    """The output layer of a transformers causal language model; what it makes of hidden states are the logits.

    Raises:
        TypeError: a model without one. ValueError: one that caps or scales what the layer gives.
    """
    layer = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if layer is None:
        raise TypeError(f"model must be a transformers causal LM with an output layer, got {type(model).__name__}")
    config = model.config.get_text_config()
    odd = {name: getattr(config, name, None) for name in _BEHIND_THE_LAYER}
    odd = {name: value for name, value in odd.items() if value is not None and value != _BEHIND_THE_LAYER[name]}
    if odd:
        rule = "model must have no soft cap and no scale behind its output layer"
        raise ValueError(f"{rule}, got {type(model).__name__} with {next(iter(odd))} = {next(iter(odd.values()))}")
    return layer


def read_out(layer: Any, hidden: Tensor) -> Outputs:
    """What an output layer says of hidden states [N, d]: without a bias no [N, V] tensor is made."""
    if getattr(layer, "bias", None) is not None:
        return Outputs(layer(hidden.to(layer.weight.dtype)))
    return Outputs(hidden.to(layer.weight.dtype), layer.weight)


_BEHIND_THE_LAYER = {
    "final_logit_softcapping": 0.0,
    "logit_scale": 1.0,
    "output_multiplier": 1.0,
    "lm_head_multiplier": 1.0,
    "logits_scaling": 1.0,
}
"""Settings of models that cap or scale the logits, and the value with which they do nothing."""


class LanguageModel(Protocol):
    """A language model that can be trained: the policy, the reward model and the reference are three of them."""

    def outputs(self, prompts: Sequence[str], answers: Sequence[Sequence[int]]) -> Outputs:
        """Of the N tokens of all answers, packed; differentiable in `parameters`."""
        ...

    def parameters(self) -> Iterable[Tensor]:
        """The tensors that an optimiser moves."""
        ...

    def state_dict(self) -> Mapping[str, Tensor]:
        """Every tensor by name."""
        ...

    def load_state_dict(self, state: Mapping[str, Tensor]) -> Any:
        """Takes a `state_dict` over, in place: engines that hold the model see it."""
        ...


def check_apart(name: str, trained: Iterable[Tensor], policy: Iterable[Tensor]) -> None:
    """ValueError where a model that is trained beside the policy would train the policy too."""
    own = {id(parameter) for parameter in policy}
    shared = sum(id(parameter) in own for parameter in trained)
    if shared:
        raise ValueError(f"{name} must train no parameter of the policy, got {shared} of them")


class HuggingFaceModel:
    """A transformers causal language model for the loop; no logits are made but where the output layer has a bias.

    model: with ``base_model`` and ``get_output_embeddings()``, whose output layer is what follows the last hidden
    state (no scaling or soft cap behind it). tokenizer: its tokenizer; prompts are encoded with special tokens, as
    `TransformersEngine` does.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        output_layer(model)
        self.model, self.tokenizer = model, tokenizer

    def outputs(self, prompts: Sequence[str], answers: Sequence[Sequence[int]]) -> Outputs:
        """Hidden states and output layer; logits where that layer has a bias. ValueError for an empty prompt."""
        known = {prompt: list(self.tokenizer(prompt)["input_ids"]) for prompt in dict.fromkeys(prompts)}
        starts = [known[prompt] for prompt in prompts]
        for i, start in enumerate(starts):
            if not start:
                raise ValueError(f"prompts[{i}] must have at least one token, got none")
        rows = [start + list(answer) for start, answer in zip(starts, answers, strict=True)]
        width = max(map(len, rows), default=0)
        ids = torch.zeros(len(rows), width, dtype=torch.int64)
        seen, wanted = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
            seen[i, : len(row)] = 1
            wanted[i, len(starts[i]) - 1 : len(row) - 1] = True
        device = self.model.device
        states = self.model.base_model(input_ids=ids.to(device), attention_mask=seen.to(device), use_cache=False)
        return read_out(self.model.get_output_embeddings(), states.last_hidden_state[wanted.to(device)])

    def parameters(self) -> Iterable[Tensor]:
        """Those that require a gradient (with LoRA, the adapters)."""
        return [p for p in self.model.parameters() if p.requires_grad]

    def state_dict(self) -> Mapping[str, Tensor]:
        """Of the model."""
        state: Mapping[str, Tensor] = self.model.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> Any:
        """Into the model."""
        return self.model.load_state_dict(state)


def _passes(
    prompts: Sequence[Any], answers: Sequence[Sequence[int]], size: int | None
) -> Iterator[tuple[Sequence[Any], Sequence[Sequence[int]]]]:
    """Pieces of at most ``size`` answers that have a token."""
    step = max(len(prompts), 1) if size is None else size
    for at in range(0, len(prompts), step):
        piece = prompts[at : at + step], answers[at : at + step]
        if any(map(len, piece[1])):
            yield piece


@torch.no_grad()
def collect(
    model: LanguageModel, prompts: Sequence[Any], answers: Sequence[Sequence[int]], size: int | None
) -> Outputs:
    """``model.outputs`` in passes of ``size`` answers, without a graph; there is at least one prompt."""
    pieces = list(_passes(prompts, answers, size)) or [(prompts[:1], [()])]
    parts = [model.outputs(*piece) for piece in pieces]
    return Outputs(torch.cat([part.states for part in parts]), parts[0].weight)


def descend(
    model: LanguageModel,
    prompts: Sequence[Any],
    answers: Sequence[Sequence[int]],
    loss_of: Callable[[Outputs], Tensor],
    size: int | None,
) -> float:
    """``loss_of(model.outputs(prompts, answers)).backward()`` in passes of ``size`` answers; the loss.

    The loss is that of the whole batch: a first pass without a graph gives its outputs and the gradient to them, a
    second one takes that gradient to the weights, piece by piece.
    """
    if size is None or len(prompts) <= size:
        loss = loss_of(model.outputs(prompts, answers))
        if loss.requires_grad:  # answers without a token need no graph
            loss.backward()
        return loss.item()
    whole = collect(model, prompts, answers, size)
    states = whole.states.requires_grad_()
    loss = loss_of(Outputs(states, whole.weight))
    loss.backward()
    assert states.grad is not None
    at = 0
    for piece in _passes(prompts, answers, size):
        part = model.outputs(*piece).states
        part.backward(states.grad[at : at + len(part)])
        at += len(part)
    return loss.item()
