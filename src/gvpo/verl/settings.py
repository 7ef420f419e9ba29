"""GVPO's settings in a verl configuration: what they are, what contradicts them, what verl is told."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf, open_dict

from gvpo.errors import InputError
from gvpo.replay.options import OffPolicyConfig
from gvpo.run import Rule

DEFAULT_BETA = 0.1
_CONFIG = Path(__file__).parent / "config"
_ACTOR, _ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
_MICRO_BATCH = "micro_batch_size_per_gpu"
_BETAS = ("gvpo.beta", f"{_ACTOR}.gvpo_beta")
SHOWN = "gvpo_shown"  # column of a prompt's demonstrations: tokens and reward by session
_PADDING_TOKENS = 128  # length of the rows that verl pads a batch with


@dataclass(frozen=True)
class Companion:
    """An option of verl's that GVPO depends on.

    Attributes:
        allow: the values that GVPO can work with; the first is the one to set.
        why: the reason why no others.
        add: whether a converted script gets it where it has none.
    """

    allow: list[Any]
    why: str
    add: bool = False

    @property
    def right(self) -> str:
        """The value to set, as Hydra takes it."""
        return "null" if self.allow[0] is None else str(self.allow[0])

    def accepts(self, value: Any) -> bool:
        """Whether GVPO can work with it; where verl's default is off, so is nothing."""
        return value in self.allow or (value is None and False in self.allow)


def companions(section: str = "required") -> dict[str, Companion]:
    """Those of `config/companions.yaml` by name; those `with_demonstrations` are another section."""
    return {name: Companion(**entry) for name, entry in rules(section).items()}


@cache
def rules(section: str, file: str = "companions") -> dict[str, Any]:
    """A section of a file in `config`."""
    return yaml.safe_load((_CONFIG / f"{file}.yaml").read_text(encoding="utf-8"))[section]


@dataclass(frozen=True)
class Settings:
    """What the driver needs to know.

    Attributes:
        beta: β, in units of reward per nat.
        reference: "rollout", "initial" or "moving".
        scale: factor on the gradient of the per-prompt mean; 1 unless `loss_scale=published`.
        mini_batch: prompts in a mini-batch.
        epochs: passes over a rollout's prompts.
        shuffle: whether prompts are drawn into mini-batches at random, by `seed`.
        row_multiple: rows of a mini-batch must be a multiple of this on every rank.
        incidents_dir: where the inputs of skipped updates are kept.
        warn_when, reference_every, keep_versions, leave_out_zero_weights, poll_seconds, watch_seconds,
            max_bad_steps, dump_dir: as in `config/gvpo_trainer.yaml`.
        off_policy: replay and demonstrations.
    """

    beta: float
    reference: str
    scale: float
    mini_batch: int
    epochs: int
    shuffle: bool
    seed: int
    row_multiple: int
    incidents_dir: str
    warn_when: list[str]
    reference_every: int | None
    keep_versions: int
    leave_out_zero_weights: bool
    poll_seconds: float | None
    watch_seconds: float
    max_bad_steps: int
    dump_dir: str | None
    off_policy: OffPolicyConfig = field(default_factory=OffPolicyConfig)

    def updates_per_step(self, prompts: int) -> int:
        """Optimizer updates for a rollout of so many prompts; the last mini-batch may be smaller."""
        return self.epochs * math.ceil(prompts / self.mini_batch)


def read_settings(config: DictConfig) -> Settings:
    """The settings of a configuration that `prepare` has been through or not.

    Raises:
        InputError: a value that GVPO cannot work with, by name.
    """
    _check_values(config)
    actor, rollout, gvpo = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout, config.gvpo
    published = gvpo.loss_scale == "published"
    sizes = []
    if not actor.use_dynamic_bsz:
        sizes = [actor.ppo_micro_batch_size_per_gpu, rollout.log_prob_micro_batch_size_per_gpu]
    if published and not sizes:
        raise InputError(
            "gvpo.loss_scale=published is defined by actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu: "
            "set it, and use_dynamic_bsz=False."
        )
    if sizes and gvpo.reference == "initial":
        sizes.append(_reference_micro_batch(config))
    as_they_are = {setting.name for setting in fields(Settings)} & gvpo.keys()
    return Settings(
        beta=_beta(config),
        scale=sizes[0] / rollout.n if published else 1.0,
        mini_batch=actor.ppo_mini_batch_size,
        epochs=gvpo.get("epochs", None) or actor.ppo_epochs,
        shuffle=bool(actor.shuffle),
        seed=actor.get("data_loader_seed", None) or 0,
        row_multiple=math.lcm(*sizes),
        incidents_dir=f"{config.trainer.default_local_dir}/incidents",
        warn_when=[str(rule) for rule in gvpo.warn_when],
        off_policy=_off_policy(gvpo, rollout.n),
        **{name: gvpo[name] for name in as_they_are - {"beta", "epochs", "warn_when"}},
    )


def _off_policy(gvpo: DictConfig, group_size: int) -> OffPolicyConfig:
    given: Any = OmegaConf.to_container(gvpo, resolve=True)
    names = {option.name for option in fields(OffPolicyConfig)} & given.keys()
    options = OffPolicyConfig(**{name: given[name] for name in names})
    options.check_off_policy(group_size)
    return options


def check(config: DictConfig, overrides: Sequence[str] = ()) -> list[str]:
    """What is worth a word but no refusal, a sentence each.

    The `overrides` of the command line tell what the user asked for from verl's defaults.

    Raises:
        InputError: a companion that contradicts GVPO, or sizes that cannot work, with the values to change.
    """
    if "gvpo" not in config:
        raise InputError(
            "the configuration has no section gvpo: leave --config-name out, and write overrides."
        )
    known = rules("gvpo", "gvpo_trainer")
    if unknown := [name for name in config.gvpo if name not in known]:
        raise InputError(f"gvpo.{unknown[0]} is no setting: there are {', '.join(known)}.")
    for name, value, companion in _refused(config, "required"):
        raise InputError(
            f"{name}={value} does not go with GVPO: {companion.why}; set {name}={companion.right}."
        )
    settings = read_settings(config)
    _check_sizes(config, settings)
    _check_separate(config)
    if settings.off_policy.demonstrations_per_group:
        for name, value, companion in _refused(config, "with_demonstrations"):
            raise InputError(
                f"gvpo.demonstrations_per_group does not go with {name}={value}: {companion.why}; leave one "
                "out."
            )
    attention = "actor_rollout_ref.model.override_config.attn_implementation"
    kind = OmegaConf.select(config, attention, default=None) or "flash_attention_2"
    if (ranks := _ranks_of_a_sequence(config.actor_rollout_ref.actor)) > 1 and not kind.startswith("flash"):
        raise InputError(
            f"{ranks} workers share a sequence, which verl's FSDP workers do in flash attention only: set "
            f"{attention}=flash_attention_2 (not {kind}), or ulysses_sequence_parallel_size=1."
        )
    notes = []
    given = {override.lstrip("+").partition("=")[0] for override in overrides}
    inert = rules("inert")
    if idle := [name for name in inert if name in given]:
        notes.append(
            f"{', '.join(idle)}: without effect ({', '.join(dict.fromkeys(inert[n] for n in idle))})."
        )
    prompts = config.data.train_batch_size
    if settings.reference == "rollout" and settings.updates_per_step(prompts) == 1:
        notes.append(
            "one update for each rollout with the rollout policy as reference: beta only scales the "
            "gradient, which Adam undoes. It acts with ppo_mini_batch_size below train_batch_size, "
            "ppo_epochs above 1, or gvpo.reference=initial."
        )
    return notes + _notes_on_age(config, settings)


def _check_separate(config: DictConfig) -> None:
    """Say in a sentence what verl's trainer with GPUs of its own for rollouts asserts when Ray is up."""
    if OmegaConf.select(config, "trainer.v1.trainer_mode") != "separate_async":
        return
    mode, parts = "trainer.v1.trainer_mode=separate_async", "trainer.v1.separate_async.parameter_sync_step"
    rollout, prompts = config.actor_rollout_ref.rollout, config.data.train_batch_size
    mini, steps = config.actor_rollout_ref.actor.ppo_mini_batch_size, OmegaConf.select(config, parts)
    if prompts != mini * steps:
        raise InputError(
            f"{mode} trains {parts}={steps} mini-batches of {_ACTOR}.ppo_mini_batch_size={mini} prompts "
            f"for each weight sync: set data.train_batch_size={mini * steps} (not {prompts})."
        )
    if not (rollout.nnodes and rollout.n_gpus_per_node):
        raise InputError(
            f"{mode} generates on GPUs of its own: set {_ROLLOUT}.nnodes and {_ROLLOUT}.n_gpus_per_node."
        )
    if rollout.checkpoint_engine.backend == "naive":
        raise InputError(
            f"{mode} sends weights to other GPUs: set {_ROLLOUT}.checkpoint_engine.backend=nccl, or "
            "another but naive."
        )


def _refused(config: DictConfig, section: str) -> Iterator[tuple[str, Any, Companion]]:
    for name, companion in companions(section).items():
        value = OmegaConf.select(config, name, default=None)
        if not companion.accepts(value):
            yield name, value, companion


def _notes_on_age(config: DictConfig, settings: Settings) -> list[str]:
    notes, asynchronous = [], OmegaConf.select(config, "trainer.v1.trainer_mode") not in (None, "sync")
    per_step = settings.updates_per_step(config.data.train_batch_size)
    if settings.reference_every and settings.reference_every % per_step:
        versions = math.ceil(settings.reference_every / per_step)
        notes.append(
            f"gvpo.reference_every={settings.reference_every}: the reference moves between steps, of "
            f"{per_step} updates each, and so every {versions * per_step} updates."
        )
    if asynchronous and config.trainer.v1.sampler.max_off_policy_strategy == "drop":
        notes.append(
            "trainer.v1.sampler.max_off_policy_strategy=drop discards whole groups for their age, those of "
            "slow prompts first; GVPO can use them: wait, which is gvpo.verl's default."
        )
    filtered = OmegaConf.select(config, "algorithm.filter_groups.enable", default=False)
    if filtered and (asynchronous or settings.reference != "rollout"):
        notes.append(
            "algorithm.filter_groups drops groups of equal rewards, which have weight where the policy is "
            "not their reference: here they hold it back."
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
        if config.gvpo.demonstrations_per_group:
            agent = config.actor_rollout_ref.rollout.agent
            agent.default_agent_loop = "gvpo_demonstrating"
            agent.agent_loop_config_path = str(_CONFIG / "agents.yaml")
        config.gvpo.beta = beta
        actor.pop("gvpo_beta", None)
        actor.policy_loss.loss_mode = "gpg"
        actor.loss_agg_mode = "seq-mean-token-sum"
        if reference != "rollout":
            # verl would compare engine and trainer by the old policy, which nobody scores.
            config.algorithm.rollout_correction = None
        if reference == "initial":
            # This is what makes verl build its reference worker; with coefficient 0 the term is 0.
            actor.use_kl_loss = True
            actor.kl_loss_coef = 0.0
            if not actor.use_dynamic_bsz:
                rows = _reference_micro_batch(config)
                config.actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu = rows


def _check_values(config: DictConfig) -> None:
    """Refuse values of another kind than they must be, verl's own among them that updates are cut by."""
    for name, rule in rules("values").items():
        value = OmegaConf.select(config, name)
        if value is None and rule.get("optional"):
            continue
        if "choices" in rule:
            fits = value in rule["choices"]
            wanted = f"is not known: choose {' or '.join(map(str, rule['choices']))}"
        elif "least" in rule:
            fits = type(value) is int and value >= rule["least"]
            wanted = f"must be a whole number of at least {rule['least']}"
        else:
            fits = type(value) in (int, float) and 0 < value < math.inf
            wanted = "must be a finite number above 0"
        if not fits:
            raise InputError(f"{name}={value} {wanted}.")
    if (config.gvpo.reference == "moving") != (config.gvpo.reference_every is not None):
        raise InputError(
            "gvpo.reference=moving and gvpo.reference_every=N, in updates, need each other: give both."
        )
    for rule in config.gvpo.warn_when:
        Rule.parse(str(rule))
    dynamic = config.actor_rollout_ref.actor.use_dynamic_bsz
    for name in () if dynamic else (f"{_ACTOR}.ppo_{_MICRO_BATCH}", f"{_ROLLOUT}.log_prob_{_MICRO_BATCH}"):
        if type(size := OmegaConf.select(config, name)) is not int or size < 1:
            raise InputError(
                f"{name}={size}: set how many rows one worker computes at a time, or "
                f"{_ACTOR}.use_dynamic_bsz=True with {_ROLLOUT}.log_prob_use_dynamic_bsz=True."
            )


def _beta(config: DictConfig) -> float:
    given = [OmegaConf.select(config, name) for name in ("gvpo.beta", f"{_ACTOR}.gvpo_beta")]
    betas = {value for value in given if value is not None} or {DEFAULT_BETA}
    if len(betas) > 1:
        raise InputError(f"gvpo.beta={given[0]} and {_ACTOR}.gvpo_beta={given[1]} are one thing: give one.")
    return float(betas.pop())


def _reference_micro_batch(config: DictConfig) -> int | None:
    ref, rollout = config.actor_rollout_ref.ref, config.actor_rollout_ref.rollout
    return ref.get("log_prob_micro_batch_size_per_gpu", None) or rollout.log_prob_micro_batch_size_per_gpu


def _ranks_of_a_sequence(actor: DictConfig, *others: str) -> int:
    """How many ranks share a sequence, and so its tokens: by Ulysses, or by `others`."""
    ulysses = ("ulysses_sequence_parallel_size", "fsdp_config.ulysses_sequence_parallel_size")
    return int(max(OmegaConf.select(actor, name, default=1) for name in (*ulysses, *others)))


def _check_sizes(config: DictConfig, settings: Settings) -> None:
    actor, rollout = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout
    prompts = config.data.train_batch_size
    if rollout.n < 2:
        raise InputError(f"{_ROLLOUT}.n={rollout.n}: one response has no variance; set it to 2 or more.")
    if settings.mini_batch > prompts:
        raise InputError(
            f"{_ACTOR}.ppo_mini_batch_size={settings.mini_batch} prompts do not fit "
            f"data.train_batch_size={prompts}: set the first to at most the second."
        )
    if not actor.use_dynamic_bsz:
        return
    if not rollout.log_prob_use_dynamic_bsz:
        raise InputError(
            f"{_ACTOR}.use_dynamic_bsz=True needs {_ROLLOUT}.log_prob_use_dynamic_bsz=True as well."
        )
    longest = max(config.data.max_prompt_length + config.data.max_response_length, _PADDING_TOKENS)
    ranks = _ranks_of_a_sequence(actor, "megatron.context_parallel_size")
    for name in (f"{_ACTOR}.ppo_max_token_len_per_gpu", f"{_ROLLOUT}.log_prob_max_token_len_per_gpu"):
        if (tokens := OmegaConf.select(config, name)) * ranks < longest:
            raise InputError(
                f"{name}={tokens} tokens cannot hold one row: set it to {longest} or more, which "
                "data.max_prompt_length + data.max_response_length or a padding row may take."
            )
