"""The tiny policy as a model that reinforcement learning trains, and as the engine that samples from it."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from prmfast.distrl.models import Outputs
from prmfast.tiny.decoder import Decoder
from prmfast.tiny.engine import TinyEngine
from prmfast.tiny.policy import Policy, forward
from prmfast.tiny.task import PAD_ID, QUESTION_LENGTH, UNK_ID, parse_question


class TinyLearner:
    """Implements ``prmfast.distrl.models.LanguageModel`` with a copy of ``policy`` that requires gradients."""

    def __init__(self, policy: Policy) -> None:
        self.policy = copy.deepcopy(policy)
        for parameter in self.policy.parameters():
            parameter.requires_grad_()

    def outputs(self, prompts: Sequence[str], answers: Sequence[Sequence[int]]) -> Outputs:
        """Logits of the packed tokens of all answers; padding and unknown tokens have -inf: they are never drawn."""
        if not any(map(len, answers)):
            return Outputs(self.policy.embedding.new_zeros(0, self.policy.config.vocab_size))
        rows = [
            torch.tensor(parse_question(prompt) + list(answer)) for prompt, answer in zip(prompts, answers, strict=True)
        ]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD_ID)
        length = torch.tensor([len(answer) for answer in answers])
        _, logits = forward(self.policy, ids[:, :-1], start=QUESTION_LENGTH - 1)
        wanted = torch.arange(logits.shape[1]) < length[:, None]
        never = F.one_hot(torch.tensor([PAD_ID, UNK_ID]), logits.shape[-1]).any(0)
        return Outputs(logits[wanted].masked_fill(never, -torch.inf))

    def engine(self, policy_id: str = "prmfast/tiny-policy in training", *, temperature: float = 1.0) -> TinyEngine:
        """Samples from the weights as they are now; make a new one after every update."""
        return TinyEngine(Decoder(self.policy), policy_id, temperature=temperature)

    def parameters(self) -> Iterable[Tensor]:
        """Every weight once."""
        return self.policy.parameters()

    def state_dict(self) -> Mapping[str, Tensor]:
        """Weights under the names of ``transformers.Qwen2ForCausalLM``."""
        return self.policy.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copies the weights in."""
        loaded = Policy.from_state_dict(self.policy.config, dict(state))
        with torch.no_grad():
            for own, new in zip(self.policy.parameters(), loaded.parameters(), strict=True):
                own.copy_(new)
