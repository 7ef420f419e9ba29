"""`gvpo verl convert`: the shell still reads the script, and GVPO's own checks pass what it says."""

import pytest
from hydra import compose, initialize_config_dir
from typer.testing import CliRunner

from gvpo.cli import app
from gvpo.errors import InputError
from gvpo.verl.convert import convert_script
from gvpo.verl.main import _CONFIG
from gvpo.verl.settings import check
from tests.verl.shell import arguments

SCRIPT = """#!/usr/bin/env bash
set -x
# python3 -m verl.trainer.main_ppo runs below
train_files="['$HOME/data/gsm8k/train.parquet']"
python3 -m verl.trainer.main_ppo --config-path=./config --config-name='ppo_trainer' \\
    algorithm.adv_estimator=grpo \\
    data.train_files="$train_files" \\
    data.train_batch_size=1024 \\
    actor_rollout_ref.model.path=Qwen/Qwen2-7B-Instruct \\
    actor_rollout_ref.actor.use_kl_loss=True \\
    actor_rollout_ref.actor.kl_loss_coef=0.001 \\
    actor_rollout_ref.actor.entropy_coeff=0.001 \\
    actor_rollout_ref.actor.ppo_mini_batch_size=256 \\
    actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=16 \\
    actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=16 \\
    actor_rollout_ref.rollout.n=5 actor_rollout_ref.actor.clip_ratio_high=0.28 \\
    trainer.total_epochs=15 $@ \\
    actor_rollout_ref.actor.loss_agg_mode="token-mean"
"""


def test_the_converted_script_runs_gvpo_with_settings_that_pass(tmp_path):
    converted = convert_script(SCRIPT)
    words = arguments(converted, tmp_path)
    assert words[:2] == ["-m", "gvpo.verl"]
    kept = [w for w in arguments(SCRIPT, tmp_path)[2:] if not w.startswith("--")]
    changed = ("kl_loss", "entropy_coeff", "clip_ratio", "loss_agg_mode")
    assert {w for w in kept if not any(c in w for c in changed)} <= set(words)
    with initialize_config_dir(str(_CONFIG), version_base=None):
        config = compose("gvpo_trainer", overrides=words[2:])
    assert not any("without effect" in note for note in check(config, words[2:]))
    assert config.actor_rollout_ref.actor.gvpo_beta == 0.1


ARRAYS = """
kl=True
ALGORITHM=(
    algorithm.adv_estimator=grpo
    algorithm.kl_ctrl.kl_coef=0.001
)
ACTOR=(
    actor_rollout_ref.actor.use_kl_loss=${kl}   # which the shell fills in
    actor_rollout_ref.rollout.mode=sync
    "data.train_files=['a b.parquet']"
)
python3 -m verl.trainer.main_ppo "${ALGORITHM[@]}" "${ACTOR[@]}"
"""


def test_overrides_in_arrays_and_variables(tmp_path):
    words = arguments(convert_script(ARRAYS), tmp_path)
    assert sorted(words[2:]) == [
        "actor_rollout_ref.actor.gvpo_beta=0.1",
        "actor_rollout_ref.actor.policy_loss.loss_mode=gvpo",
        "actor_rollout_ref.actor.use_kl_loss=False",
        "algorithm.adv_estimator=grpo",
        "algorithm.norm_adv_by_std_in_grpo=False",
        "data.train_files=['a b.parquet']",
    ]


@pytest.mark.parametrize("quote", ["'", '"'])
def test_quotes_around_a_whole_override_go_with_it(tmp_path, quote):
    given = [
        f"{quote}actor_rollout_ref.actor.{word}{quote}" for word in ("clip_ratio=0.2", "use_kl_loss=True")
    ]
    script = convert_script(f"python3 -m verl.trainer.main_ppo {' '.join(given)} trainer.nnodes=1")
    words = arguments(script, tmp_path)
    assert words[-2:] == ["actor_rollout_ref.actor.use_kl_loss=False", "trainer.nnodes=1"]
    assert all(words)


def test_it_says_each_change_once_and_changes_nothing_twice():
    converted = convert_script(SCRIPT)
    changes = [line for line in converted.splitlines() if line.startswith("#   ")]
    for name in (
        "use_kl_loss",
        "kl_loss_coef",
        "entropy_coeff",
        "clip_ratio_high",
        "loss_agg_mode",
        "gvpo_beta",
    ):
        assert sum(name in change.split()[1] for change in changes) == 1, name
    assert "# python3 -m verl.trainer.main_ppo runs below" in converted
    assert converted.startswith("#!/usr/bin/env bash\n# Converted by")
    assert converted.endswith(" $@\n")  # what ended the command has gone
    again = SCRIPT.replace("python3 -m verl.trainer.main_ppo -", "python3 -m verl.trainer.main_ppo \\\n -")
    assert convert_script(again).count("-m gvpo.verl") == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("echo hello", "verl.trainer.main_ppo"),
        ("python -m verl.trainer.main_ppo algorithm.adv_estimator=gae", "gae"),
        ("python -m verl.trainer.main_ppo --config-name=mine", "mine"),
    ],
)
def test_what_cannot_be_converted_is_refused_with_the_reason(text, words):
    with pytest.raises(InputError, match=words):
        convert_script(text)


def test_the_command_prints_the_script(tmp_path):
    file = tmp_path / "run_grpo.sh"
    file.write_text(SCRIPT)
    result = CliRunner().invoke(app, ["verl", "convert", str(file)])
    assert result.exit_code == 0
    assert result.stdout == convert_script(SCRIPT)
