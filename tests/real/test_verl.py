"""SmolLM2 on GSM8K through verl on a CPU: Ray, FSDP, a rollout server; updates are those of the formula."""

from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from gvpo.data import load_prompts
from tests.real.test_training import GSM8K
from tests.verl.harness import arguments, replay, run
from tests.verl.records import updates

ROLLOUT = "actor_rollout_ref.rollout"


def test_updates_on_verl_are_those_of_the_formula(smollm2: Path, tmp_path: Path) -> None:
    (tmp_path / "model").symlink_to(smollm2)
    rows = [
        {
            "data_source": "openai/gsm8k",
            "prompt": row["prompt"],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": row["answer"]},
            "extra_info": {"index": index},
        }
        for index, row in enumerate(load_prompts(f"gsm8k:{GSM8K}", size=4))
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "prompts.parquet")
    small = [
        "trainer.total_training_steps=1",
        "data.train_batch_size=2",
        "data.max_prompt_length=256",
        "data.max_response_length=8",
        "actor_rollout_ref.actor.ppo_mini_batch_size=1",
        "actor_rollout_ref.actor.optim.lr=1e-3",
        f"{ROLLOUT}.n=2",
        f"{ROLLOUT}.checkpoint_engine.update_weights_bucket_megabytes=256",
    ]
    run(arguments(tmp_path, tmp_path / "run", *small, workers=1), tmp_path / "run", timeout=1500)
    dumps = updates(tmp_path / "run" / "updates")
    assert len(dumps) == 2
    for update in replay(tmp_path, dumps, beta=0.3, lr=1e-3):
        metrics = update.dump["metrics"]
        assert metrics["gvpo/loss"] == pytest.approx(update.loss, rel=1e-3, abs=1e-9)
        assert metrics["actor/grad_norm"] == pytest.approx(update.gradient_norm, rel=1e-3)
    assert any(len(set(dump["rewards"].tolist())) > 1 for dump in dumps)
