"""`GVPOConfig`: TRL's `GRPOConfig`, less what has no meaning in GVPO, plus the choice of the reference."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Literal

from accelerate import ParallelismConfig
from torch import Tensor
from trl import GRPOConfig

from gvpo.errors import InputError
from gvpo.replay.options import OffPolicyConfig
from gvpo.run import Rule
from gvpo.trl.ahead import AheadConfig, check_ahead
from gvpo.trl.dynamic import DynamicConfig, check_dynamic
from gvpo.trl.health_config import HealthConfig

_AS_IT_SAMPLES = "the policy is scored and updated as it samples"

# Options of GRPO that GVPO gives no meaning to, and why. They are accepted at their default only.
REFUSED: dict[str, str] = {
    "off_policy_mask_threshold": "GVPO learns from off-policy responses instead of masking them",
    "loss_type": "the loss is GVPO's",
    "scale_rewards": "GVPO fits the rewards as they are; to scale them, scale beta",
    "multi_objective_aggregation": "GVPO fits the weighted sum of the rewards as they are",
    "top_entropy_quantile": "GVPO's weights belong to whole sequences, not to chosen tokens",
    "sync_ref_model": "a group's reference must stay fixed: reference='moving' has that",
    "ref_model_mixup_alpha": "sync_ref_model has no meaning in GVPO",
    "ref_model_sync_steps": "sync_ref_model has no meaning in GVPO",
    "use_liger_kernel": "GVPO brings its own fused head, which Liger's forward would replace",
    "disable_dropout": f"{_AS_IT_SAMPLES}, so without dropout",
    "neftune_noise_alpha": f"{_AS_IT_SAMPLES}, so without noise",
}
for _reason, _names in {
    "GVPO has no probability ratio that could be clipped or corrected": (
        "epsilon epsilon_high delta importance_sampling_level use_bias_correction_kl sapo_temperature_neg "
        "sapo_temperature_pos vespo_k_pos vespo_lambda_pos vespo_k_neg vespo_lambda_neg"
    ),
    "GVPO's optimum fixes the policy's entropy through beta": (
        "entropy_coef use_adaptive_entropy entropy_coef_min entropy_coef_max entropy_coef_delta "
        "entropy_target"
    ),
    "GVPO needs no behaviour probabilities, so nothing corrects for the inference engine's": (
        "vllm_importance_sampling_correction vllm_importance_sampling_mode vllm_importance_sampling_cap "
        "vllm_importance_sampling_clip_max vllm_importance_sampling_clip_min"
    ),
}.items():
    REFUSED |= dict.fromkeys(_names.split(), _reason)

_CHOICES = {
    "reference": ("rollout", "initial", "moving"),
    "dynamic_sampling": ("none", "resample", "replay"),
    "on_reward_error": ("error", "drop_row", "drop_group"),
}
# What values must be, where they are not None.
_RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "micro_batch_tokens": (lambda n: n >= 1, "at least 1 token"),
    "trust": (lambda share: 0 < share < 1, "a share between 0 and 1, such as 0.2"),
    "router_aux_loss_coef": (lambda value: 0 <= value < math.inf, "a finite number of 0 or more"),
    "generate_ahead": (lambda n: n >= 0, "a number of rollouts, 0 or more"),
    "max_resamples": (lambda n: n >= 1, "at least 1"),
    "easy_fraction": (lambda share: 0 <= share <= 1, "a share between 0 and 1"),
    "hard_fraction": (lambda share: 0 <= share <= 1, "a share between 0 and 1"),
    "easy_threshold": (math.isfinite, "a mean reward"),
    "hard_threshold": (math.isfinite, "a mean reward"),
    "reward_error_tolerance": (lambda share: 0 <= share <= 1, "from 0 to 1"),
    "reward_timeout": (lambda seconds: seconds > 0, "above 0 seconds"),
    "tool_timeout": (lambda seconds: seconds > 0, "above 0 seconds"),
    "max_bad_steps": (lambda n: n >= 1, "at least 1"),
}


@dataclass
class GVPOConfig(OffPolicyConfig, AheadConfig, DynamicConfig, HealthConfig, GRPOConfig):
    """Training arguments of `GVPOTrainer`: those of `trl.GRPOConfig`, with the differences below.

    For replay, demonstrations and logged completions see `OffPolicyConfig`; for the choice of prompts
    `DynamicConfig`; for generation in another process `AheadConfig`; for bad numbers `HealthConfig`.

    `per_device_train_batch_size × gradient_accumulation_steps × processes` responses make an optimizer step,
    as in TRL. How they are cut into micro-batches has no influence on the update.

    Args:
        beta: temperature of the implicit reward β·log(π/π_ref), in reward per nat; above 0. *Not* the KL
            coefficient that `beta` is in GRPO.
        reference: π_ref. "rollout" is the policy that sampled the responses; "initial" is the policy as
            training starts (with LoRA, the base model without adapters: no second copy); "moving" is the
            policy after the last update whose number `reference_every` divides. Groups keep the reference
            that they were scored with.
        reference_every: updates after which a moving reference becomes the policy.
        micro_batch_tokens: padded tokens per micro-batch of the update. Default:
            `per_device_train_batch_size` times the longest row, which is what TRL would run at once.
        share_prompts: in scoring and update, read what responses begin with once for all of them, where that
            is less work and the model allows it. It changes memory and speed, never the update.
        trust: for rollouts that are used for several updates: leave out the gradient of tokens whose
            probability has already moved by more than this share since the rollout (0.2, say), in the
            direction of their row's weight. Not part of the published algorithm; off by default.
        router_aux_loss_coef: for mixtures of experts: coefficient of the load-balancing loss of the whole
            optimizer step, over all processes. None is 0 (and not the model's own, as in GRPO): no such loss.
        vllm_engine_kwargs: more arguments of `vllm.LLM`, or others than TRL's, such as {"dtype": "float32"};
            with `use_vllm` in colocate mode.

    Raises:
        InputError: for options of GRPO that have no meaning here (each by name and with the reason), and
            for settings under which an optimizer step would see a part of a group only.
    """

    beta: float = 0.1
    reference: Literal["rollout", "initial", "moving"] = "rollout"
    reference_every: int | None = None
    micro_batch_tokens: int | None = None
    share_prompts: bool = True
    trust: float | None = None
    router_aux_loss_coef: float | None = None  # TRL has it from 1.16 on
    vllm_engine_kwargs: dict | str | None = None
    # TRL's, at the only values that have a meaning here:
    loss_type: str = "gvpo"
    scale_rewards: str = "none"
    vllm_importance_sampling_correction: bool = False
    disable_dropout: bool = True

    _VALID_DICT_FIELDS = [*GRPOConfig._VALID_DICT_FIELDS, "vllm_engine_kwargs"]  # noqa: RUF012 (as in the parent)

    def __post_init__(self) -> None:
        self._check_gvpo()
        super().__post_init__()
        # TRL turns False into "none"; what is left over was meant.
        self._refuse()
        check_windows(self)
        assert self.num_generations is not None
        self.check_off_policy(self.num_generations)
        given = "offline" if self.offline is not None else "demonstrations_per_group"
        if getattr(self, given) and self.remove_unused_columns:
            raise InputError(f"{given} needs remove_unused_columns=False (the default here).")
        check_dynamic(self)
        check_ahead(self)
        for text in (*self.warn_when, *self.stop_when):
            Rule.parse(text)
        if self.vllm_engine_kwargs and not (self.use_vllm and self.vllm_mode == "colocate"):
            raise InputError(
                "vllm_engine_kwargs are for use_vllm with vllm_mode='colocate': vllm serve gives a server "
                "its own."
            )

    def _check_gvpo(self) -> None:
        if not (isinstance(self.beta, int | float) and math.isfinite(self.beta) and self.beta > 0):
            raise InputError(
                f"beta={self.beta!r}, but GVPO needs a finite beta above 0 (the published setting is 0.1): "
                "it is the temperature of the implicit reward, not a KL coefficient that could be off."
            )
        for name, known in _CHOICES.items():
            if (value := getattr(self, name)) not in known:
                choices = ", ".join(map(repr, known[:-1]))
                raise InputError(f"{name}={value!r} is unknown: use {choices} or {known[-1]!r}.")
        for name, (holds, words) in _RANGES.items():
            if (value := getattr(self, name)) is not None and not holds(value):
                raise InputError(f"{name}={value} must be {words}.")
        every = self.reference_every
        if (self.reference == "moving") != (every is not None) or (every is not None and every < 1):
            raise InputError(
                f"reference={self.reference!r} and reference_every={every}: a moving reference, and no "
                "other, needs the number of updates after which it follows the policy, 1 or more."
            )
        if self.num_generations is None or self.num_generations < 2:
            raise InputError(
                f"num_generations={self.num_generations}, but GVPO fits the differences within a prompt's "
                "group: sample 2 or more responses per prompt."
            )
        if self.trust is not None and (self.replays or self.offline is not None):
            raise InputError(
                "trust needs to know how likely each token was when it was sampled, which is not kept with "
                f"{'replayed groups' if self.replays else 'logged completions'}: leave trust out there."
            )
        if str(getattr(self.optim, "value", self.optim)) in ("lomo", "adalomo"):
            raise InputError(
                f"optim={self.optim} updates parameters during the backward of each micro-batch, but an "
                "update must not depend on how rows are cut into micro-batches: use another optimizer."
            )
        if self.parallelism_config or os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG") == "true":
            shared = self.parallelism_config or ParallelismConfig()  # by accelerate launch
            for name in ("tp_size", "cp_size", "sp_size"):
                if getattr(shared, name) > 1:
                    raise InputError(
                        f"parallelism_config has {name}={getattr(shared, name)}, but GVPOTrainer gives each "
                        "process rows of its own, and processes that share sequences would count them more "
                        "than once: leave it at 1, shard with FSDP, or use Ulysses on verl."
                    )

    def _refuse(self) -> None:
        defaults: dict[str, Any] = {f.name: f.default for f in fields(self)}
        for name, reason in REFUSED.items():
            if name in defaults and (value := getattr(self, name)) != defaults[name]:
                raise InputError(
                    f"{name}={value!r} has no meaning in GVPO ({reason}): remove it or leave it at "
                    f"{defaults[name]!r}."
                )

    @property
    def replays(self) -> bool:
        """Whether groups are stored, to come back."""
        return bool(self.replay_ratio) or self.dynamic_sampling == "replay"

    @property
    def prompts_per_generation(self) -> int:
        """Groups of one generation, over all processes."""
        assert self.generation_batch_size is not None
        assert self.num_generations is not None
        return self.generation_batch_size // self.num_generations

    @property
    def updates_per_rollout(self) -> float:
        """Optimizer steps made with the responses of one generation."""
        assert self.steps_per_generation is not None
        return self.steps_per_generation * self.num_iterations / self.gradient_accumulation_steps


def check_windows(args: GVPOConfig) -> None:
    """Raise an InputError if an optimizer step would see a part of a group only.

    A generation's rows lie rank after rank, groups next to each other; each rank cuts its own rows into
    `steps_per_generation` slices, and an optimizer step takes `gradient_accumulation_steps` slices from every
    rank. So steps end at multiples of the greatest common divisor of both.
    """
    per_device, accumulation = args.per_device_train_batch_size, args.gradient_accumulation_steps
    assert args.steps_per_generation is not None
    slices = math.gcd(accumulation, args.steps_per_generation)
    if slices < args.steps_per_generation and slices * per_device % args.num_generations:
        raise InputError(
            f"An optimizer step would end inside a group of num_generations={args.num_generations}: with "
            f"per_device_train_batch_size={per_device}, gradient_accumulation_steps={accumulation}, "
            f"steps_per_generation={args.steps_per_generation} and {args.world_size} process(es), a step "
            f"takes {per_device * accumulation} rows of each process. Make per_device_train_batch_size × "
            "gradient_accumulation_steps a multiple of num_generations (and per_device_train_batch_size × "
            "steps_per_generation too if there are several processes)."
        )


def check_size(dataset: Any, args: GVPOConfig) -> None:
    """Raise an InputError for a data set that does not fill one generation: TRL would train on nothing."""
    needed = args.prompts_per_generation
    if hasattr(dataset, "__len__") and len(dataset) < needed:
        raise InputError(
            f"The data set has {len(dataset)} prompt(s), but a generation takes {needed} "
            f"(generation_batch_size={args.generation_batch_size} in groups of {args.num_generations}): give "
            "more prompts, or make per_device_train_batch_size or gradient_accumulation_steps smaller."
        )


def warn_of_settings(args: GVPOConfig) -> None:
    """Warn where a setting defeats the method."""
    fresh_only = args.offline is None and not args.replays and not args.generate_ahead
    newest = args.reference == "rollout" or args.reference_every == 1
    if fresh_only and newest and args.updates_per_rollout <= 1:
        warnings.warn(
            f"beta={args.beta} cannot be felt: with reference={args.reference!r} and one update per rollout "
            "the implicit reward is 0 when it is compared, so beta only scales the gradient (and drops out "
            "under Adam). Use reference='initial', or several updates per rollout (by "
            "steps_per_generation or num_iterations), if beta is to act.",
            stacklevel=3,
        )
    neutral = {"top_p": (1.0,), "top_k": (0,), "min_p": ()}
    values = {name: getattr(args, name) for name in neutral}
    narrowed = [f"{n}={v}" for n, v in values.items() if v is not None and v not in neutral[n]]
    if narrowed:
        warnings.warn(
            f"{', '.join(narrowed)}: GVPO's optimum is unique for samplers that can give every response; "
            "this one cannot.",
            stacklevel=3,
        )


def warn_of_small_beta(args: GVPOConfig, rewards: Tensor) -> None:
    """Warn if batches of right and wrong answers are reused with a beta that is small for that."""
    if args.num_iterations > 1 and args.beta <= 0.1 and ((rewards == 0) | (rewards == 1)).all():
        warnings.warn(
            f"beta={args.beta} with 0/1 rewards and num_iterations={args.num_iterations}: beta is the trust "
            "region, and a small one puts the target of reused batches far away; 0.2 to 0.5 behaved best.",
            stacklevel=3,
        )
