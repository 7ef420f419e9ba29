"""The example scripts ask for what they say they do."""

from pathlib import Path

from hydra import compose, initialize_config_dir

from gvpo.verl.main import _CONFIG
from gvpo.verl.settings import check, read_settings
from tests.verl.shell import arguments

EXAMPLES = Path(__file__).parents[2] / "examples" / "verl"


def test_the_published_run_has_the_published_settings(tmp_path):
    words = arguments((EXAMPLES / "run_qwen2.5-math-7b_gvpo.sh").read_text(), tmp_path)
    assert words[:2] == ["-m", "gvpo.verl"]
    with initialize_config_dir(str(_CONFIG), version_base=None):
        config = compose("gvpo_trainer", overrides=words[2:])
    assert check(config, words[2:]) == []
    settings = read_settings(config)
    assert (settings.beta, settings.reference, settings.mini_batch) == (0.1, "rollout", 256)
    assert settings.updates_per_step(config.data.train_batch_size) == 4
    assert config.actor_rollout_ref.rollout.n == 4


def test_the_run_on_cpus_has_settings_that_pass(tmp_path):
    words = arguments("MODEL=m DATA=d\n" + (EXAMPLES / "run_cpu.sh").read_text(), tmp_path)
    with initialize_config_dir(str(_CONFIG), version_base=None):
        config = compose("gvpo_trainer", overrides=words[2:])
    assert check(config, words[2:]) == []
    assert (config.trainer.device, config.actor_rollout_ref.rollout.name) == ("cpu", "hf")
    assert config.trainer.n_gpus_per_node == 2
