"""What a loop runs: one method with its sizes, or a method it is compared with."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

from prmfast.distrl.advantages import AdvantageRule
from prmfast.distrl.losses import LossRule


@dataclass(frozen=True, slots=True)
class LoopConfig:
    """One method with its sizes.

    prompts, samples: prompts of a step and answers of each. oversample: how many times as many prompts are drawn, those
    that teach being kept; mixed_only keeps no others. seed: of prompts and answers.
    reward: "none" | "ipvrm" | "implicit", the online reward model. reference: what its log-ratio is taken against,
    "behaviour" (the policy that sampled) or "fixed" (the policy at the start). beta, margin, adb, dlw: of its loss
    (`online_ipvrm_loss`, or `implicit_prm_loss` with the terms of `online_terms`); beta scales TD too. reward_variant:
    "paper" | "released".
    p_min: of candidates. baseline: outcomes are normalised over the "prompt" or over the whole "batch".
    advantage, loss: `AdvantageRule` and `LossRule`; updates: policy updates a step; rates of AdamW; temperature of
    sampling. max_norm: of each gradient. answers_per_pass: how many answers a forward and backward pass of a model
    holds, None for all; it changes memory and time, not results, as long as the model has no dropout.
    adaptive: prompts * samples answers are spread over the prompts by their success probabilities (`Loop`'s
    ``quantiles``), min_samples to max_samples each.
    """

    prompts: int = 32
    samples: int = 8
    oversample: float = 1.0
    mixed_only: bool = False
    seed: int = 0
    reward: str = "ipvrm"
    reference: str = "behaviour"
    beta: float = 10.0
    margin: float = 5.0
    adb: bool = True
    dlw: bool = True
    reward_variant: str = "paper"
    p_min: float = 0.1
    baseline: str = "prompt"
    advantage: AdvantageRule = field(default_factory=AdvantageRule)
    loss: LossRule = field(default_factory=LossRule)
    updates: int = 1
    policy_rate: float = 1e-6
    reward_rate: float = 1e-6
    temperature: float = 1.0
    max_norm: float = 1.0
    answers_per_pass: int | None = None
    adaptive: bool = False
    min_samples: int = 2
    max_samples: int = 64

    def __post_init__(self) -> None:
        for name, allowed in (
            ("reward", ("none", "ipvrm", "implicit")),
            ("reference", ("behaviour", "fixed")),
            ("reward_variant", ("paper", "released")),
            ("baseline", ("prompt", "batch")),
        ):
            if getattr(self, name) not in allowed:
                listed = " or ".join(repr(one) for one in allowed)
                raise ValueError(f"{name} must be {listed}, got {getattr(self, name)!r}")
        for name in ("prompts", "samples", "updates"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        for name in ("beta", "policy_rate", "reward_rate", "temperature", "max_norm"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be > 0 and finite, got {getattr(self, name)}")
        if not 1 <= self.oversample < math.inf:
            raise ValueError(f"oversample must be >= 1 and finite, got {self.oversample}")
        if self.answers_per_pass is not None and self.answers_per_pass < 1:
            raise ValueError(f"answers_per_pass must be >= 1 or None, got {self.answers_per_pass}")
        if not 1 <= self.min_samples <= self.samples <= self.max_samples and self.adaptive:
            bounds = f"{self.min_samples} <= {self.samples} <= {self.max_samples}"
            raise ValueError(f"1 <= min_samples <= samples <= max_samples must hold, got {bounds}")
        if self.adaptive and self.oversample > 1:
            raise ValueError(f"oversample must be 1 where adaptive is on, got {self.oversample}")
        if self.reward == "none" and self.loss.alpha:
            raise ValueError(f"loss.alpha must be 0 where reward is 'none', got {self.loss.alpha}")

    @classmethod
    def distrl_ipvrm(cls, **changes: Any) -> LoopConfig:
        """The paper's method: IPVRM with ADB and DLW, token and distribution-level updates."""
        return cls(**changes)

    @classmethod
    def distrl_released(cls, **changes: Any) -> LoopConfig:
        """What the released program computes under that name: its advantages, losses, sets and online weights."""
        rules = {"advantage": AdvantageRule.released(), "loss": LossRule.released()}
        return replace(cls(reward_variant="released", **rules), **changes)  # type: ignore[arg-type]

    @classmethod
    def distrl_implicit(cls, **changes: Any) -> LoopConfig:
        """The same with an implicit PRM, trained on whole answers (beta 0.05, no margin)."""
        return replace(cls(reward="implicit", beta=0.05, margin=0.0, adb=False, dlw=False), **changes)

    @classmethod
    def grpo_ipvrm(cls, **changes: Any) -> LoopConfig:
        """Outcome and TD advantages of the sampled tokens, no distribution-level term."""
        return replace(cls(loss=LossRule(alpha=0.0)), **changes)

    @classmethod
    def prime(cls, **changes: Any) -> LoopConfig:
        """PRIME-style: implicit PRM against the fixed reference, Monte-Carlo token rewards, no candidates."""
        plain = cls.distrl_implicit(reference="fixed", loss=LossRule(alpha=0.0))
        return replace(plain, **changes)

    @classmethod
    def grpo(cls, **changes: Any) -> LoopConfig:
        """Group-normalised outcomes, clip 1 - 0.20 .. 1 + 0.28, no reward model."""
        return replace(cls(reward="none", loss=LossRule(alpha=0.0)), **changes)

    @classmethod
    def reinforce(cls, **changes: Any) -> LoopConfig:
        """Outcomes normalised over the whole batch, one update of a batch (where no ratio is clipped)."""
        return replace(cls.grpo(baseline="batch"), **changes)
