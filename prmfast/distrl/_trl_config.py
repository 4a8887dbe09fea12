"""Settings of `prmfast.distrl.trl.DistRLTrainer`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from trl import GRPOConfig

from prmfast.distrl.advantages import AdvantageRule
from prmfast.distrl.config import LoopConfig
from prmfast.distrl.losses import LossRule

_LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo")
_OWN_NAMES = {
    "reward": "rm_loss",
    "reference": "rm_reference",
    "beta": "rm_beta",
    "margin": "rm_margin",
    "reward_rate": "rm_learning_rate",
    "max_norm": "rm_max_grad_norm",
    "reward_variant": "variant",
    "gamma": "gae_gamma",
    "lam": "gae_lambda",
    "alpha": "dist_alpha",
    "dual_clip": "dist_dual_clip",
    "clip_low": "epsilon",
    "clip_high": "epsilon_high",
}
"""What `LoopConfig` and its rules call a setting -> its name here, for messages."""


@dataclass
class DistRLConfig(GRPOConfig):  # type: ignore[misc]
    """`trl.GRPOConfig` with the settings of DistRL, by default those of the paper ([V] arXiv 2604.13197).

    The token-level loss is TRL's: ``loss_type``, ``epsilon`` and ``epsilon_high`` are its own settings, with the
    paper's values as defaults. A generation batch is what the statistics (sigma_V, group means) and the one update of
    the reward model are taken over. ``top_p``, ``top_k``, ``min_p`` and ``repetition_penalty`` shape the draws alone,
    as in TRL: pi_old is the policy at ``temperature``.

    Args:
        variant: "paper" | "released": of the advantages, of Dist-PPO's reduction and of the online weights.
        rm_loss: "ipvrm" | "implicit". rm_reference: "behaviour" (the policy that drew the answers) or "fixed". rm_beta,
            rm_margin, rm_adb, rm_dlw: of `online_ipvrm_loss`; rm_beta scales TD too. rm_learning_rate: of its AdamW,
            constant, without weight decay. rm_max_grad_norm: of its gradient. rm_outcome: which of the reward functions
            says 1 correct, 0 wrong or None; the reward model learns it. All of them together make the outcome's part of
            the advantages.
        gae_gamma, gae_lambda, outcome_weight, td_weight: of `AdvantageRule`.
        dist_alpha, dist_clip_low, dist_clip_high, dist_dual_clip: of `LossRule`. dist_p_min: smallest pi_old of a
            candidate, in (0, 1].

    Raises:
        ValueError: a value out of range, or a setting of TRL that has no meaning for advantages of single tokens.
    """

    loss_type: str = "grpo"
    epsilon_high: float | None = 0.28
    variant: str = "paper"
    rm_loss: str = "ipvrm"
    rm_reference: str = "behaviour"
    rm_beta: float = 10.0
    rm_margin: float = 5.0
    rm_adb: bool = True
    rm_dlw: bool = True
    rm_learning_rate: float = 1e-6
    rm_max_grad_norm: float = 1.0
    rm_outcome: int = 0
    gae_gamma: float = 1.0
    gae_lambda: float = 1.0
    outcome_weight: float = 1.0
    td_weight: float = 1.0
    dist_alpha: float = 0.1
    dist_p_min: float = 0.1
    dist_clip_low: float = 0.2
    dist_clip_high: float = 0.28
    dist_dual_clip: float | None = None

    @classmethod
    def released(cls, output_dir: str, **options: Any) -> DistRLConfig:
        """The released program's: its advantages, token mean, symmetric clip of Dist-PPO, dual clip 3 in both parts."""
        own: dict[str, Any] = {"variant": "released", "loss_type": "dapo", "delta": 3.0, "td_weight": 0.05}
        own |= {"dist_clip_high": 0.2, "dist_dual_clip": 3.0}
        return cls(output_dir, **(own | options))

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, allowed in (
            ("loss_type", _LOSS_TYPES),
            ("rm_loss", ("ipvrm", "implicit")),
            ("importance_sampling_level", ("token",)),
            ("scale_rewards", ("group",)),
            ("multi_objective_aggregation", ("sum_then_normalize",)),
        ):
            if getattr(self, name) not in allowed:
                listed = " or ".join(repr(one) for one in allowed)
                raise ValueError(f"{name} must be {listed} for token-level advantages, got {getattr(self, name)!r}")
        if self.off_policy_mask_threshold is not None:
            rule = "off_policy_mask_threshold must be None for token-level advantages"
            raise ValueError(f"{rule}, got {self.off_policy_mask_threshold}")
        if self.use_vllm and self.vllm_importance_sampling_correction:
            raise ValueError("vllm_importance_sampling_correction must be False where use_vllm is on, got True")
        if not 0 < self.dist_p_min <= 1:
            raise ValueError(f"dist_p_min must be > 0 and <= 1, got {self.dist_p_min}")
        self.rules()

    def rules(self) -> LoopConfig:
        """The method as the loop has it; ValueError under this class's names."""
        high = self.epsilon if self.epsilon_high is None else self.epsilon_high
        try:
            return LoopConfig(
                reward=self.rm_loss,
                reference=self.rm_reference,
                beta=self.rm_beta,
                margin=self.rm_margin,
                adb=self.rm_adb,
                dlw=self.rm_dlw,
                reward_variant=self.variant,
                reward_rate=self.rm_learning_rate,
                max_norm=self.rm_max_grad_norm,
                p_min=self.dist_p_min,
                temperature=self.temperature,
                advantage=AdvantageRule(
                    self.variant, self.gae_gamma, self.gae_lambda, self.outcome_weight, self.td_weight
                ),
                loss=LossRule(
                    self.variant,
                    alpha=self.dist_alpha,
                    clip_low=self.epsilon,
                    clip_high=high,
                    dist_clip_low=self.dist_clip_low,
                    dist_clip_high=self.dist_clip_high,
                    dual_clip=self.dist_dual_clip,
                ),
            )
        except ValueError as error:
            name, _, rest = str(error).partition(" ")
            raise ValueError(f"{_OWN_NAMES.get(name, name)} {rest}") from None
