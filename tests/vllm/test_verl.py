"""verl 0.9 with its own vLLM rollout, on a CPU: each push of weights arrives, and GVPO updates."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

pytest.importorskip("vllm", reason="vLLM has an environment of its own: make test-vllm")
pytest.importorskip("verl", reason="verl is not installed in this environment")

from tests.models import SHAPE
from tests.trl.chat_model import save_chat_model

pytestmark = [pytest.mark.slow, pytest.mark.vllm]

REWARD = "def letters(solution_str, **_):\n    return len(set(solution_str)) / 16\n"
OPTIONS = """
+machine=cpu trainer.n_gpus_per_node=1 data.train_batch_size=8 data.max_prompt_length=64
data.max_response_length=16 data.train_files=train.parquet data.val_files=train.parquet
actor_rollout_ref.model.path=model actor_rollout_ref.actor.optim.lr=1e-2
actor_rollout_ref.actor.ppo_mini_batch_size=8 actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=8
actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=8 actor_rollout_ref.rollout.n=4
reward.custom_reward_function.path=reward.py reward.custom_reward_function.name=letters
trainer.total_training_steps=3 trainer.val_before_train=False trainer.test_freq=-1 trainer.save_freq=-1
actor_rollout_ref.rollout.name=vllm actor_rollout_ref.rollout.dtype=float32
actor_rollout_ref.rollout.enforce_eager=True actor_rollout_ref.rollout.max_model_len=128
actor_rollout_ref.rollout.free_cache_engine=False +actor_rollout_ref.rollout.enable_sleep_mode=False
actor_rollout_ref.rollout.gpu_memory_utilization=0.1 actor_rollout_ref.rollout.calculate_log_probs=True
"""


def save_model(folder: Path) -> None:
    """A chat model with heads that vLLM takes."""
    save_chat_model(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    own = {
        "hidden_size": 64,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": len(tokenizer),
    }
    ends = {
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
    }
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SHAPE | own | ends, tie_word_embeddings=True)).save_pretrained(folder)


@pytest.mark.timeout(900)
def test_verl_s_engine_has_the_weights_of_every_update(tmp_path: Path) -> None:
    save_model(tmp_path / "model")
    (tmp_path / "reward.py").write_text(REWARD)
    rows = [
        {
            "data_source": "sums",
            "prompt": [{"role": "user", "content": f"{a}+{b}="}],
            "ability": "arithmetic",
            "reward_model": {"style": "rule", "ground_truth": str(a + b)},
            "extra_info": {"index": 4 * a + b},
        }
        for a in range(8)
        for b in range(4)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train.parquet")
    options = [re.sub(r"=((\w+)\.(parquet|py)|model)$", rf"={tmp_path}/\1", word) for word in OPTIONS.split()]
    metrics = tmp_path / "metrics.jsonl"
    environment = os.environ | {"VERL_FILE_LOGGER_PATH": str(metrics), "HF_HUB_OFFLINE": "1"}
    environment["RAY_memory_monitor_refresh_ms"] = "0"  # it would kill workers for what others take
    command = [sys.executable, "-m", "gvpo.verl", *options, 'trainer.logger=["console","file"]']
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
    steps = [json.loads(line)["data"] for line in metrics.read_text().splitlines()]
    steps = [step for step in steps if "gvpo/loss" in step]
    assert len(steps) == 3
    # Probabilities of the sampled tokens, engine against trainer, float32.
    assert max(step["training/rollout_probs_diff_max"] for step in steps) < 1e-5
    assert all(step["actor/grad_norm"] > 0 for step in steps)
