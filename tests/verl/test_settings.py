"""The published names work, and what contradicts GVPO is refused by name."""

import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from importlib.util import find_spec
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from gvpo.errors import InputError
from gvpo.verl import main
from gvpo.verl.main import _CONFIG, V060, V09, _refuse, check_versions
from gvpo.verl.settings import check, prepare, read_settings

ACTOR = "actor_rollout_ref.actor"
EXPERTS = "megatron.override_transformer_config"
SIZES = [
    f"{ACTOR}.ppo_micro_batch_size_per_gpu=16",
    "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=16",
    "actor_rollout_ref.rollout.n=4",
]
PUBLISHED = [
    "algorithm.adv_estimator=grpo",
    f"{ACTOR}.use_kl_loss=False",
    f"{ACTOR}.policy_loss.loss_mode=gvpo",
    f"{ACTOR}.gvpo_beta=0.1",
    "algorithm.use_kl_in_reward=False",
    "algorithm.norm_adv_by_std_in_grpo=False",
]


def config(*overrides):
    with initialize_config_dir(str(_CONFIG), version_base=None):
        return compose("gvpo_trainer", overrides=[*SIZES, *overrides])


def test_the_published_names_make_the_published_settings():
    given = config(*PUBLISHED)
    assert check(given, PUBLISHED) == []
    settings = read_settings(given)
    assert (settings.beta, settings.reference, settings.scale) == (0.1, "rollout", 1)
    assert settings.updates_per_step(1024) == 4
    prepare(given)
    actor = given.actor_rollout_ref.actor
    assert (actor.policy_loss.loss_mode, actor.loss_agg_mode) == ("gpg", "seq-mean-token-sum")
    assert "gvpo_beta" not in actor
    assert not actor.use_kl_loss
    assert read_settings(given) == settings


def test_published_scale_is_micro_batch_over_n_and_initial_reference_switches_the_worker_on():
    given = config("gvpo.loss_scale=published", "gvpo.reference=initial")
    assert read_settings(given).scale == 16 / 4
    prepare(given)
    assert given.actor_rollout_ref.actor.use_kl_loss
    assert given.actor_rollout_ref.actor.kl_loss_coef == 0
    assert given.actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu == 16


@pytest.mark.slow  # verl's whole configuration is composed for each
@pytest.mark.parametrize(
    ("override", "word"),
    [
        (f"{ACTOR}.use_kl_loss=True", "use_kl_loss"),
        ("algorithm.use_kl_in_reward=True", "use_kl_in_reward"),
        ("algorithm.norm_adv_by_std_in_grpo=True", "norm_adv_by_std_in_grpo"),
        ("algorithm.adv_estimator=gae", "adv_estimator"),
        (f"{ACTOR}.policy_loss.loss_mode=vanilla", "loss_mode"),
        (f"{ACTOR}.entropy_coeff=0.01", "entropy_coeff"),
        ("critic.enable=True", "critic.enable"),
        (f"+{ACTOR}.{EXPERTS}.moe_aux_loss_coeff=0.01", "moe_aux_loss_coeff=0.01 does not go with GVPO"),
        (f"+{ACTOR}.{EXPERTS}.moe_router_load_balancing_type=aux_loss", "balancing_type=aux_loss"),
        ("trainer.use_v1=False", "use_v1"),
        ("algorithm.rollout_correction.rollout_is=token", "rollout_is"),
        ("algorithm.rollout_correction.bypass_mode=True", "bypass_mode"),
        ("gvpo.beta=0", "beta"),
        (f"{ACTOR}.gvpo_beta=-1", "beta"),
        ("gvpo.reference=latest", "gvpo.reference"),
        ("gvpo.loss_scale=sum", "gvpo.loss_scale"),
        ("trainer.v1.trainer_mode=fully_async", "trainer_mode=fully_async does not go with GVPO"),
        ("gvpo.reference=moving", "gvpo.reference=moving and gvpo.reference_every=N"),
        ("gvpo.reference_every=8", "gvpo.reference=moving and gvpo.reference_every=N"),
        ("gvpo.keep_versions=-1", "gvpo.keep_versions=-1 must be a whole number of at least 0"),
        ("gvpo.warn_when=[often]", "The rule 'often'"),
        ("gvpo.max_bad_steps=0", "gvpo.max_bad_steps"),
        ("gvpo.max_bad_steps=null", "gvpo.max_bad_steps"),
        ("gvpo.max_bad_steps=true", "gvpo.max_bad_steps"),
        ("gvpo.beta=low", "gvpo.beta=low must be a finite number above 0"),
        (f"{ACTOR}.gvpo_beta=[1]", "gvpo_beta"),
        ("gvpo.watch_seconds=null", "gvpo.watch_seconds"),
        ("gvpo.poll_seconds=-1", "gvpo.poll_seconds=-1"),
        ("gvpo.leave_out_zero_weights=maybe", "leave_out_zero_weights=maybe"),
        ("+gvpo.betta=0.3", "gvpo.betta is no setting"),
        ("data.train_batch_size=null", "data.train_batch_size=None must be a whole number"),
        (f"{ACTOR}.ppo_mini_batch_size=2.5", "ppo_mini_batch_size=2.5"),
        (f"{ACTOR}.ppo_epochs=0", "ppo_epochs=0"),
        (f"{ACTOR}.ppo_micro_batch_size_per_gpu=few", "ppo_micro_batch_size_per_gpu=few"),
        ("actor_rollout_ref.rollout.n=null", "rollout.n=None"),
        ("actor_rollout_ref.rollout.n=1", "rollout.n=1"),
        ("data.train_batch_size=100", "ppo_mini_batch_size=256"),
        (f"{ACTOR}.ppo_micro_batch_size_per_gpu=null", "ppo_micro_batch_size_per_gpu"),
    ],
)
def test_what_contradicts_gvpo_is_refused_by_name(override, word):
    with pytest.raises(InputError, match=word.replace(".", r"\.")):
        check(config(override))


@pytest.mark.parametrize(
    ("override", "word"),
    [
        ("actor_rollout_ref.rollout.log_prob_use_dynamic_bsz=False", "log_prob_use_dynamic_bsz"),
        (f"{ACTOR}.ppo_max_token_len_per_gpu=100", "ppo_max_token_len_per_gpu=100"),
    ],
)
def test_a_dynamic_batch_that_cannot_work_is_refused_with_the_numbers(override, word):
    with pytest.raises(InputError, match=word):
        check(config(f"{ACTOR}.use_dynamic_bsz=True", override))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("trainer.v1.separate_async.parameter_sync_step=2", r"set data\.train_batch_size=512 \(not 1024\)"),
        ("actor_rollout_ref.rollout.nnodes=0", r"generates on GPUs of its own: set .*nnodes"),
        ("actor_rollout_ref.rollout.checkpoint_engine.backend=naive", r"backend=nccl"),
    ],
)
def test_what_the_separate_trainer_wants_is_said_before_ray_starts(override, words):
    separate = [
        "trainer.v1.trainer_mode=separate_async",  # 4 mini-batches of 256 prompts
        "actor_rollout_ref.rollout.nnodes=1",
        "actor_rollout_ref.rollout.checkpoint_engine.backend=nccl",
    ]
    assert check(config(*separate)) == []
    with pytest.raises(InputError, match=words):
        check(config(*separate, override))


def test_old_groups_are_waited_for_and_a_word_on_dropping_them():
    mode = "trainer.v1.trainer_mode=colocate_async"
    assert check(config(mode)) == []
    assert config(mode).trainer.v1.sampler.max_off_policy_strategy == "wait"
    (note,) = check(config(mode, "trainer.v1.sampler.max_off_policy_strategy=drop"))
    assert "discards whole groups" in note
    (note,) = check(config(mode, "algorithm.filter_groups.enable=True"))
    assert "hold it back" in note


def test_a_moving_reference_moves_between_steps():
    moving = ["gvpo.reference=moving", "gvpo.reference_every=6"]  # steps are 4 updates each
    (note,) = check(config(*moving))
    assert "every 8 updates" in note
    given = config("gvpo.reference=moving", "gvpo.reference_every=8")
    assert check(given) == []
    prepare(given)
    assert given.algorithm.rollout_correction is None
    assert not given.actor_rollout_ref.actor.use_kl_loss


def test_sequences_are_shared_in_flash_attention_only():
    """verl patches no other kind, and would compute something else without a word."""
    ulysses = f"{ACTOR}.ulysses_sequence_parallel_size=2"
    attention = "+actor_rollout_ref.model.override_config.attn_implementation"
    check(config(ulysses))
    check(config(ulysses, f"{attention}=flash_attention_3"))
    with pytest.raises(InputError, match=r"2 workers share a sequence.* \(not sdpa\)"):
        check(config(ulysses, f"{attention}=sdpa"))
    with pytest.raises(InputError, match="flash attention only"):
        check(config(f"{ACTOR}.fsdp_config.ulysses_sequence_parallel_size=4", f"{attention}=eager"))


def test_verl_has_no_worker_that_shares_prompts():
    """Why `use_prefix_grouper` is refused; where this fails, that, docs/engines/verl.md and
    docs/upstream/verl-prefix-grouper.md want a look."""
    sources = list(Path(find_spec("verl").origin).parent.rglob("*.py"))
    assert any(path.name == "prefix_grouper_utils.py" for path in sources)
    assert [path for path in sources if "prefix_grouper_utils" in path.read_text(encoding="utf-8")] == []


def test_two_different_betas_are_refused_and_equal_ones_are_not():
    with pytest.raises(InputError, match="give one"):
        check(config("gvpo.beta=0.2", f"{ACTOR}.gvpo_beta=0.1"))
    assert read_settings(config("gvpo.beta=0.2", f"{ACTOR}.gvpo_beta=0.2")).beta == 0.2


def test_a_word_on_options_without_effect_and_on_a_beta_that_cannot_be_felt():
    given = [f"{ACTOR}.clip_ratio=0.3", f"{ACTOR}.ppo_mini_batch_size=1024"]
    clipping, beta = check(config(*given), given)
    assert "clip_ratio" in clipping
    assert "beta" in beta


@pytest.mark.parametrize(
    ("installed", "words"),
    [
        ("0.8.2", "0.9.1"),
        ("0.9.1rc1", "0.9.1"),
        ("0.10.0.dev1", "0.9.1"),
        ("0.6.1", "0.6.0"),
        (None, "not installed"),
    ],
)
def test_other_versions_of_verl_are_refused_with_the_range(monkeypatch, installed, words):
    monkeypatch.setattr(main, "version", _versions(verl=installed))
    with pytest.raises(InputError, match=words):
        check_versions()


@pytest.mark.parametrize(
    ("installed", "adapter"),
    [
        ("0.9.1", V09),
        ("0.9.1+local", V09),
        ("0.9.2rc1", V09),
        ("0.9.10", V09),
        ("0.6.0", V060),
    ],
)
def test_versions_of_verl_and_their_adapters(monkeypatch, capsys, installed, adapter):
    monkeypatch.setattr(main, "version", _versions(verl=installed, TransferQueue="0.1.11"))
    assert check_versions() == adapter
    assert ("newer" in capsys.readouterr().out) == (installed in ("0.9.2rc1", "0.9.10"))


def test_bad_input_that_a_process_of_rays_found_is_a_sentence_and_code_2(capsys):
    from ray.exceptions import RayTaskError

    told = RayTaskError("run", "a long traceback", InputError("3 updates in a row.")).as_instanceof_cause()
    with pytest.raises(SystemExit) as ended:
        _refuse(told)
    assert isinstance(told, InputError)
    assert ended.value.code == 2
    assert capsys.readouterr().err == "gvpo: 3 updates in a row.\n"


def test_a_configuration_file_of_ones_own_is_refused():
    with pytest.raises(InputError, match="--config-name"):
        check(OmegaConf.create({"trainer": {}}))


def test_missing_transfer_queue_says_what_to_install(monkeypatch):
    monkeypatch.setattr(main, "version", _versions(verl="0.9.1"))
    with pytest.raises(InputError, match="pip install TransferQueue"):
        check_versions()


@pytest.mark.slow
def test_bad_input_ends_the_command_in_seconds_with_one_sentence_and_code_2(tmp_path):
    words = [sys.executable, "-m", "gvpo.verl", *SIZES, f"{ACTOR}.use_kl_loss=True"]
    result = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 2, result.stderr
    assert result.stderr.count("\n") == 1
    assert "use_kl_loss=True does not go with GVPO" in result.stderr
    assert list(tmp_path.iterdir()) == []


def _versions(**installed):
    def version(package):
        if installed.get(package) is None:
            raise PackageNotFoundError(package)
        return installed[package]

    return version
