"""GVPO's settings in a verl configuration: what they are, what contradicts them, what verl is told."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from gvpo.errors import InputError

DEFAULT_BETA = 0.1
_PADDING_TOKENS = 128  # length of the rows that verl pads a batch with

# name, the only value that GVPO can work with, why
_COMPANIONS: tuple[tuple[str, Any, str], ...] = (
    (
        "actor_rollout_ref.actor.policy_loss.loss_mode",
        "gvpo",
        "gvpo.verl trains with no other loss; use verl.trainer.main_ppo for that",
    ),
    (
        "algorithm.adv_estimator",
        "grpo",
        "it is what keeps the responses to a prompt together",
    ),
    (
        "algorithm.norm_adv_by_std_in_grpo",
        False,
        "dividing rewards by their standard deviation changes the reward that GVPO's optimum is defined by",
    ),
    (
        "actor_rollout_ref.actor.use_kl_loss",
        False,
        "the KL term is part of GVPO's objective, with beta as its coefficient; a second moves the optimum",
    ),
    (
        "algorithm.use_kl_in_reward",
        False,
        "the KL term is part of GVPO's objective, with beta as its coefficient; a second moves the optimum",
    ),
    ("actor_rollout_ref.actor.entropy_coeff", 0, "an entropy bonus moves the optimum; raise beta instead"),
    ("algorithm.use_pf_ppo", False, "it draws rows again by weight and so changes the groups"),
    ("actor_rollout_ref.actor.use_prefix_grouper", False, "rows of a group are not kept in one micro-batch"),
    ("critic.enable", (None, False), "GVPO has no critic"),
    ("distillation.enabled", (None, False), "distillation adds a loss of its own"),
    ("trainer.use_v1", (None, True), "only verl's V1 trainer is supported"),
    ("trainer.v1.trainer_mode", (None, "sync"), "the asynchronous trainers are not tested with GVPO"),
    ("algorithm.rollout_is", (None, False), "GVPO needs no importance weights, whatever engine sampled"),
    (
        "algorithm.rollout_correction.rollout_is",
        None,
        "GVPO needs no importance weights, whatever engine sampled",
    ),
    (
        "algorithm.rollout_correction.rollout_rs",
        None,
        "GVPO needs no correction, whatever engine sampled",
    ),
    (
        "algorithm.rollout_correction.bypass_mode",
        (None, False),
        "the reference must be scored by the same engine as the policy",
    ),
)
# Options of other objectives, which the published scripts carry along.
_INERT = (
    "actor_rollout_ref.actor.clip_ratio",
    "actor_rollout_ref.actor.clip_ratio_low",
    "actor_rollout_ref.actor.clip_ratio_high",
    "actor_rollout_ref.actor.clip_ratio_c",
    "actor_rollout_ref.actor.kl_loss_coef",
    "actor_rollout_ref.actor.kl_loss_type",
    "actor_rollout_ref.actor.loss_agg_mode",
    "actor_rollout_ref.actor.loss_scale_factor",
    "algorithm.kl_ctrl.kl_coef",
    "algorithm.lam",
    "algorithm.gamma",
)


@dataclass(frozen=True)
class Settings:
    """What the driver needs to know.

    Attributes:
        beta: β, in units of reward per nat.
        reference: "rollout" or "initial".
        scale: factor on the gradient of the per-prompt mean; 1 unless `loss_scale=published`.
        mini_batch: prompts in a mini-batch.
        epochs: passes over a rollout's prompts.
        shuffle: whether prompts are drawn into mini-batches at random, by `seed`.
        row_multiple: rows of a mini-batch must be a multiple of this on every rank.
        micro_batch: rows of a training micro-batch on one rank; None with dynamic batch size.
        leave_out_zero_weights, poll_seconds, watch_seconds, dump_dir: as in `gvpo_trainer.yaml`.
    """

    beta: float
    reference: str
    scale: float
    mini_batch: int
    epochs: int
    shuffle: bool
    seed: int
    row_multiple: int
    micro_batch: int | None
    leave_out_zero_weights: bool
    poll_seconds: float | None
    watch_seconds: float
    dump_dir: str | None

    def updates_per_step(self, prompts: int) -> int:
        """Optimizer updates for a rollout of so many prompts; the last mini-batch may be smaller."""
        return self.epochs * math.ceil(prompts / self.mini_batch)


def read_settings(config: DictConfig) -> Settings:
    """The settings of a configuration that `prepare` has been through or not.

    Raises:
        InputError: a value that GVPO cannot work with, by name.
    """
    actor, rollout = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout
    gvpo = config.gvpo
    reference, loss_scale = gvpo.reference, gvpo.loss_scale
    if reference not in ("rollout", "initial"):
        raise InputError(f"gvpo.reference={reference} is not known: choose rollout or initial.")
    if loss_scale not in ("mean", "published"):
        raise InputError(f"gvpo.loss_scale={loss_scale} is not known: choose mean or published.")
    dynamic = bool(actor.use_dynamic_bsz)
    micro_batch = None if dynamic else actor.ppo_micro_batch_size_per_gpu
    if loss_scale == "published" and micro_batch is None:
        raise InputError(
            "gvpo.loss_scale=published is defined by actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu: "
            "set it, and use_dynamic_bsz=False."
        )
    row_multiple = 1
    if not dynamic:
        sizes = [micro_batch, rollout.log_prob_micro_batch_size_per_gpu]
        if reference == "initial":
            sizes.append(_reference_micro_batch(config))
        row_multiple = math.lcm(*(int(size) for size in sizes if size))
    return Settings(
        beta=_beta(config),
        reference=reference,
        scale=micro_batch / rollout.n if loss_scale == "published" else 1.0,
        mini_batch=actor.ppo_mini_batch_size,
        epochs=gvpo.get("epochs", None) or actor.ppo_epochs,
        shuffle=bool(actor.shuffle),
        seed=actor.get("data_loader_seed", None) or 0,
        row_multiple=row_multiple,
        micro_batch=micro_batch,
        leave_out_zero_weights=bool(gvpo.leave_out_zero_weights),
        poll_seconds=gvpo.poll_seconds,
        watch_seconds=gvpo.watch_seconds,
        dump_dir=gvpo.dump_dir,
    )


def check(config: DictConfig, overrides: Sequence[str] = ()) -> list[str]:
    """What is worth a word but no refusal, a sentence each.

    Args:
        config: the user's configuration.
        overrides: the overrides of the command line, to tell what the user asked for from verl's defaults.

    Raises:
        InputError: a companion that contradicts GVPO, or sizes that cannot work, with the values to change.
    """
    if "gvpo" not in config:
        raise InputError(
            "the configuration has no section gvpo: leave --config-name out, and write overrides."
        )
    for name, wanted, reason in _COMPANIONS:
        value = OmegaConf.select(config, name, default=None)
        allowed = wanted if isinstance(wanted, tuple) else (wanted,)
        if value not in allowed and not (value is None and False in allowed):
            right = next((choice for choice in allowed if choice is not None), "null")
            raise InputError(f"{name}={value} does not go with GVPO: {reason}; set {name}={right}.")
    settings = read_settings(config)
    _check_sizes(config, settings)
    notes = []
    given = {override.lstrip("+").partition("=")[0] for override in overrides}
    inert = [name for name in _INERT if name in given]
    if inert:
        notes.append(f"{', '.join(inert)}: without effect, GVPO has neither clipping nor a separate KL term.")
    prompts = config.data.train_batch_size
    if settings.reference == "rollout" and settings.updates_per_step(prompts) == 1:
        notes.append(
            "one update for each rollout with the rollout policy as reference: beta only scales the "
            "gradient, which Adam undoes. It acts with ppo_mini_batch_size below train_batch_size, "
            "ppo_epochs above 1, or gvpo.reference=initial."
        )
    return notes


def prepare(config: DictConfig) -> None:
    """Turn the user's configuration into the one that verl's own code runs, in place.

    The driver sends weights w; the stock `gpg` loss with `seq-mean-token-sum` is then −Σ w S, whose gradient
    is GVPO's (docs/theory.md, fact 2).
    """
    actor = config.actor_rollout_ref.actor
    beta, reference = _beta(config), config.gvpo.reference
    with open_dict(config):
        config.gvpo.beta = beta
        actor.pop("gvpo_beta", None)
        actor.policy_loss.loss_mode = "gpg"
        actor.loss_agg_mode = "seq-mean-token-sum"
        if reference == "initial":
            # This is what makes verl build its reference worker; with coefficient 0 the term is 0.
            actor.use_kl_loss = True
            actor.kl_loss_coef = 0.0
            if not actor.use_dynamic_bsz:
                config.actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu = _reference_micro_batch(
                    config
                )


def _beta(config: DictConfig) -> float:
    ours = config.gvpo.beta
    published = config.actor_rollout_ref.actor.get("gvpo_beta", None)
    if ours is not None and published is not None and float(ours) != float(published):
        raise InputError(
            f"gvpo.beta={ours} and actor_rollout_ref.actor.gvpo_beta={published} are one thing: give one."
        )
    beta = (
        DEFAULT_BETA if ours is None and published is None else float(ours if ours is not None else published)
    )
    if not (math.isfinite(beta) and beta > 0):
        raise InputError(f"beta must be a finite number above 0, got {beta}; the published setting is 0.1.")
    return beta


def _reference_micro_batch(config: DictConfig) -> int | None:
    ref, rollout = config.actor_rollout_ref.ref, config.actor_rollout_ref.rollout
    return ref.get("log_prob_micro_batch_size_per_gpu", None) or rollout.log_prob_micro_batch_size_per_gpu


def _check_sizes(config: DictConfig, settings: Settings) -> None:
    actor, rollout = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout
    prompts = config.data.train_batch_size
    if rollout.n < 2:
        raise InputError(
            f"actor_rollout_ref.rollout.n={rollout.n}: one response has no variance; set it to 2 or more."
        )
    if not 1 <= settings.mini_batch <= prompts:
        raise InputError(
            f"actor_rollout_ref.actor.ppo_mini_batch_size={settings.mini_batch} prompts do not fit "
            f"data.train_batch_size={prompts}: set the first to at most the second."
        )
    if settings.epochs < 1:
        raise InputError(f"actor_rollout_ref.actor.ppo_epochs={settings.epochs}: set it to 1 or more.")
    if actor.use_dynamic_bsz:
        _check_dynamic(config)
        return
    for name in ("actor.ppo_micro_batch_size_per_gpu", "rollout.log_prob_micro_batch_size_per_gpu"):
        size = OmegaConf.select(config.actor_rollout_ref, name)
        if not size or size < 1:
            raise InputError(
                f"actor_rollout_ref.{name}={size}: set how many rows one worker computes at a time, or "
                "actor_rollout_ref.actor.use_dynamic_bsz=True with "
                "actor_rollout_ref.rollout.log_prob_use_dynamic_bsz=True."
            )


def _check_dynamic(config: DictConfig) -> None:
    actor, rollout = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout
    if not rollout.log_prob_use_dynamic_bsz:
        raise InputError(
            "actor_rollout_ref.actor.use_dynamic_bsz=True needs "
            "actor_rollout_ref.rollout.log_prob_use_dynamic_bsz=True as well."
        )
    longest = max(config.data.max_prompt_length + config.data.max_response_length, _PADDING_TOKENS)
    # Ranks that share a sequence share its tokens.
    shared = ("ulysses_sequence_parallel_size", "fsdp_config.ulysses_sequence_parallel_size")
    ranks = max(
        OmegaConf.select(actor, name, default=1) for name in (*shared, "megatron.context_parallel_size")
    )
    for name, value in (
        ("actor.ppo_max_token_len_per_gpu", actor.ppo_max_token_len_per_gpu),
        ("rollout.log_prob_max_token_len_per_gpu", rollout.log_prob_max_token_len_per_gpu),
    ):
        if value * ranks < longest:
            raise InputError(
                f"actor_rollout_ref.{name}={value} tokens cannot hold one row: set it to {longest} or "
                "more, which data.max_prompt_length + data.max_response_length or a padding row may take."
            )
