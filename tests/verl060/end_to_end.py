"""A whole run of verl 0.6.0 on CPUs: `make test-verl060`, in an environment of its own.

The name keeps this file out of the other tests, whose environment has verl 0.9.
"""

from importlib.metadata import version

import pytest

from gvpo.verl.cpu import use
from tests.verl.harness import RESPONSE, ROOT, make_assets, replay, run
from tests.verl.records import updates

ACTOR, ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"


def arguments(assets, output, *extra, workers=2):
    precision = [
        f"++{ACTOR}.fsdp_config.mixed_precision.{n}_dtype=fp32" for n in ("param", "reduce", "buffer")
    ]
    return [
        "trainer.device=cuda",  # what verl 0.6.0 asks Ray for; there is none
        f"trainer.n_gpus_per_node={workers}",
        "trainer.nnodes=1",
        "trainer.logger=[console]",
        "trainer.val_before_train=False",
        "trainer.test_freq=-1",
        "trainer.save_freq=-1",
        "trainer.total_training_steps=2",
        "trainer.resume_mode=disable",
        f"trainer.default_local_dir={output / 'checkpoints'}",
        "ray_kwargs.ray_init.num_cpus=32",
        f"+ray_kwargs.ray_init.num_gpus={workers}",
        "+ray_kwargs.ray_init.include_dashboard=False",
        "+ray_kwargs.ray_init.object_store_memory=200000000",
        f"data.train_files={assets / 'prompts.parquet'}",
        f"data.val_files={assets / 'prompts.parquet'}",
        "data.max_prompt_length=32",
        f"data.max_response_length={RESPONSE}",
        "data.dataloader_num_workers=0",
        "data.filter_overlong_prompts=False",
        "data.shuffle=False",
        f"actor_rollout_ref.model.path={assets / 'model'}",
        "+actor_rollout_ref.model.override_config._attn_implementation=eager",
        "actor_rollout_ref.model.use_remove_padding=False",
        "actor_rollout_ref.model.enable_gradient_checkpointing=False",
        f"{ACTOR}.strategy=fsdp2",
        f"{ACTOR}.use_torch_compile=False",
        f"++{ACTOR}.fsdp_config.model_dtype=fp32",
        *precision,
        f"{ACTOR}.optim.lr=1e-3",
        f"{ACTOR}.optim.weight_decay=0",
        f"{ACTOR}.grad_clip=1000",
        f"{ACTOR}.ppo_mini_batch_size=2",
        f"{ACTOR}.ppo_micro_batch_size_per_gpu=2",
        f"{ROLLOUT}.name=hf",
        f"{ROLLOUT}.mode=sync",
        f"{ROLLOUT}.n=4",
        f"{ROLLOUT}.tensor_model_parallel_size=1",
        f"{ROLLOUT}.log_prob_micro_batch_size_per_gpu=4",
        f"custom_reward_function.path={ROOT / 'tests' / 'verl' / 'rewards.py'}",
        f"{ACTOR}.policy_loss.loss_mode=gvpo",
        f"{ACTOR}.gvpo_beta=0.3",
        f"gvpo.dump_dir={output / 'updates'}",
        *extra,
    ]


@pytest.mark.parametrize(
    ("extra", "groups"),
    [
        (["data.train_batch_size=4"], [[4, 4], [4, 4]]),
        (["data.train_batch_size=5", f"{ACTOR}.ppo_epochs=2"], [[4, 4], [4, 4], [4]] * 2),
    ],
    ids=["published", "ragged-two-epochs"],
)
def test_updates_are_those_of_the_formula(tmp_path, extra, groups):
    assert version("verl") == "0.6.0"
    assets = make_assets(tmp_path / "assets")
    environment = {
        **use(),
        "VERL_USE_EXTERNAL_MODULES": "tests.verl060.cpu",
        "VERL_PLATFORM": "",
    }
    run(arguments(assets, tmp_path, *extra), tmp_path, **environment)
    done = replay(assets, updates(tmp_path / "updates"), beta=0.3, lr=1e-3, optimizer="AdamW")
    assert [update.groups for update in done] == groups * 2
    assert any(abs(update.dump["metrics"]["gvpo/kl"]) > 1e-3 for update in done)
    for update in done:
        assert update.dump["metrics"]["gvpo/loss"] == pytest.approx(update.loss, rel=1e-3)
        assert update.dump["metrics"]["actor/grad_norm"] == pytest.approx(update.gradient_norm, rel=1e-3)
