"""TRL's own losses, fed with log-probabilities instead of a model.

The classes below run `_compute_loss` of TRL's trainers unchanged; what is replaced is the forward pass that
would have made the log-probabilities. Advantages, which TRL's trainers make while they generate, are written
here as TRL defines them.
"""

from __future__ import annotations

from collections import defaultdict
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from trl import DPOTrainer, GRPOTrainer, RLOOTrainer

from experiments.responses import Responses
from gvpo.errors import InputError

if TYPE_CHECKING:
    from jaxtyping import Float

_ACCELERATOR = SimpleNamespace(
    num_processes=1,
    device=torch.device("cpu"),
    gather=lambda x: x,
    gather_for_metrics=lambda x: x,
    reduce=lambda x, reduction: x,
)
_TRAINING = SimpleNamespace(training=True)


def _require(trainer: type, names: tuple[str, ...]) -> None:
    missing = [name for name in names if not hasattr(trainer, name)]
    if missing:
        raise InputError(
            f"gvpo lab compares with the losses of TRL 1.16, whose {trainer.__name__} has "
            f"{', '.join(missing)}; the installed TRL does not."
        )


_require(GRPOTrainer, ("_compute_loss", "_get_per_token_logps_and_entropies"))
_require(RLOOTrainer, ("_compute_loss", "_get_per_token_logps_and_entropies"))
_require(DPOTrainer, ("_compute_loss", "compute_ref_log_probs"))


class _Fed:
    """In place of a trainer's constructor and forward pass."""

    _logps: Tensor

    def __init__(self, **settings: Any) -> None:
        self.model = _TRAINING
        self.accelerator = _ACCELERATOR
        self.aux_loss_enabled = False
        self.__dict__.update(settings)

    def _get_per_token_logps_and_entropies(self, *_: Any, **__: Any) -> tuple[Tensor, Tensor, None]:
        return self._logps, torch.zeros_like(self._logps), None

    def evaluate_loss(self, responses: Responses, **inputs: Any) -> Float[Tensor, ""]:
        self._metrics: Any = {"train": defaultdict(list)}
        self._logps = responses.policy
        nothing = responses.mask.new_zeros(len(responses.mask), 0, dtype=torch.long)
        mask = responses.mask.to(responses.policy.dtype)
        batch = {
            "prompt_ids": nothing,
            "prompt_mask": nothing,
            "completion_ids": torch.zeros_like(responses.mask, dtype=torch.long),
            "completion_mask": mask,
            **inputs,
        }
        return self._compute_loss(None, batch)  # type: ignore[attr-defined]


class _FedGRPO(_Fed, GRPOTrainer):
    pass


class _FedRLOO(_Fed, RLOOTrainer):
    pass


class GRPO:
    """`GRPOTrainer`'s loss.

    Args:
        kl: coefficient of the k3 estimate of KL(π‖π_ref) (TRL's `beta`).
        corrected: multiply k3 by the ratio (TRL's `use_bias_correction_kl`).
        epsilon: the ratio is clipped to 1 ± epsilon.
        standardise: divide advantages by the group's standard deviation (TRL's `scale_rewards`).
        loss_type: TRL's; "dr_grpo" is Dr. GRPO's together with `standardise=False`.
        level: "sequence" is GSPO.
        cap: know μ: weigh by the policy at rollout / μ, one weight a response, truncated at `cap` (TRL's
            correction for an inference engine whose probabilities are reported).
        by_token: one such weight a token (TRL's "token_truncate") instead.
    """

    def __init__(
        self,
        *,
        kl: float = 0.0,
        corrected: bool = False,
        epsilon: float = 0.2,
        standardise: bool = True,
        loss_type: str = "grpo",
        level: str = "token",
        cap: float | None = None,
        by_token: bool = False,
    ) -> None:
        self.standardise, self.cap, self.by_token = standardise, cap, by_token
        self._trainer = _FedGRPO(
            args=SimpleNamespace(use_bias_correction_kl=corrected, delta=None),
            beta=kl,
            loss_type=loss_type,
            importance_sampling_level=level,
            epsilon_low=epsilon,
            epsilon_high=epsilon,
            top_entropy_quantile=1.0,
            off_policy_mask_threshold=None,
            _entropy_bonus_enabled=False,
            current_gradient_accumulation_steps=1,
            use_vllm=cap is not None,
            vllm_importance_sampling_correction=cap is not None,
        )

    def __call__(self, responses: Responses) -> Float[Tensor, ""]:
        rewards = responses.grouped_rewards
        advantages = rewards - rewards.mean(1, keepdim=True)
        if self.standardise:
            advantages = advantages / (rewards.std(1, keepdim=True) + 1e-4)
        self._trainer.max_completion_length = responses.policy.shape[1]
        inputs = {"advantages": advantages.flatten(), "old_per_token_logps": responses.rollout}
        if self.cap is not None:
            moved = (responses.rollout.sum(1) - responses.behaviour)[:, None]
            if self.by_token:
                assert responses.behaviour_tokens is not None
                moved = responses.rollout - responses.behaviour_tokens
            inputs["importance_sampling_ratio"] = moved.exp().clamp(max=self.cap)
        return self._trainer.evaluate_loss(responses, ref_per_token_logps=responses.reference, **inputs)


CorrectedGRPO = partial(GRPO, corrected=True)
DrGRPO = partial(CorrectedGRPO, standardise=False, loss_type="dr_grpo")
GSPO = partial(GRPO, level="sequence")


class RLOO:
    """`RLOOTrainer`'s loss, with KL in the reward and the leave-one-out baseline.

    Args:
        kl: β, what a nat of log π/π_ref costs.
        fresh: take π in that cost, and the ratio, at the policy as it is. Else as at rollout, where TRL takes
            it, with the ratio to it clipped: on the first update after a rollout that is the same.
        epsilon: where the ratio is clipped.
        cap: know μ: weigh by π/μ, truncated at `cap`.
    """

    def __init__(
        self, *, kl: float = 0.0, fresh: bool = True, epsilon: float = 0.2, cap: float | None = None
    ) -> None:
        self.kl, self.fresh, self.cap = kl, fresh, cap
        self._trainer = _FedRLOO(epsilon_low=epsilon, epsilon_high=epsilon)

    def __call__(self, responses: Responses) -> Float[Tensor, ""]:
        old = (responses.policy.detach() if self.fresh else responses.rollout).sum(1)
        rewards = (responses.rewards - self.kl * (old - responses.reference.sum(1))).view(-1, responses.k)
        others = (rewards.sum(1, keepdim=True) - rewards) / (responses.k - 1)
        advantages = (rewards - others).flatten()
        if self.cap is not None:
            advantages = advantages * (old - responses.behaviour).exp().clamp(max=self.cap)
        return self._trainer.evaluate_loss(responses, old_logps=old, advantages=advantages)


class DPO:
    """`DPOTrainer`'s sigmoid loss on the best against the worst response of each group.

    Groups whose rewards are all equal make no pair; the mean is over all groups.
    """

    def __init__(self, *, beta: float) -> None:
        self._trainer: Any = DPOTrainer.__new__(DPOTrainer)
        self._trainer.__dict__.update(
            model=_TRAINING,
            accelerator=_ACCELERATOR,
            aux_loss_enabled=False,
            ld_alpha=None,
            precompute_ref_logps=True,
            f_divergence_type="reverse_kl",
            loss_types=["sigmoid"],
            loss_weights=[1.0],
            use_weighting=False,
            beta=beta,
            _total_train_tokens=0,
            _tp_size=1,
        )

    def __call__(self, responses: Responses) -> Float[Tensor, ""]:
        rewards = responses.grouped_rewards
        first = torch.arange(len(rewards)) * responses.k
        best, worst = first + rewards.argmax(1), first + rewards.argmin(1)
        differ = responses.rewards[best] > responses.rewards[worst]
        if not differ.any():
            return responses.policy.sum() * 0
        rows = torch.cat([best[differ], worst[differ]])
        mask = torch.nn.functional.pad(responses.mask[rows].long(), (1, 0))
        chosen, rejected = responses.reference.sum(1)[rows].chunk(2)
        self._trainer._metrics = {"train": defaultdict(list)}
        loss = self._trainer._compute_loss(
            lambda **_: _outputs(responses.policy[rows]),
            {
                "input_ids": mask,
                "attention_mask": torch.ones_like(mask),
                "completion_mask": mask,
                "ref_chosen_logps": chosen,
                "ref_rejected_logps": rejected,
            },
            return_outputs=False,
        )
        return loss * differ.sum() / len(rewards)


def _outputs(logps: Tensor) -> SimpleNamespace:
    """A forward pass as `DPOTrainer` sees it; all but the log-probabilities are for its log."""
    nothing = torch.zeros_like(logps).detach()
    return SimpleNamespace(log_probs=logps, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool())
