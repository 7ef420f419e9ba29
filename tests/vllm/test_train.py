"""`gvpo train` with `use_vllm`, as a process of its own: killed, and gone on with."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vLLM has an environment of its own: make test-vllm")

from tests.vllm.engines import LENGTH, save_model

pytestmark = [pytest.mark.slow, pytest.mark.vllm]

REWARD = """
import os, signal
from pathlib import Path

def digits(completions, trainer_state=None, **_):
    if trainer_state.global_step == 3 and not Path("killed").exists():
        Path("killed").touch()
        os.kill(os.getpid(), signal.SIGKILL)  # the engine is in this process
    return [sum(c.isdigit() for c in text) / 12 for text in completions]
"""
RECIPE = f"""
model_name_or_path: model
dataset_name: prompts.jsonl
chat: false
reward_funcs: ["own_reward:digits"]
output_dir: out
use_vllm: true
vllm_mode: colocate
vllm_max_model_length: {LENGTH}
vllm_engine_kwargs: {{dtype: float32, enforce_eager: true}}
reference: initial
num_generations: 4
max_completion_length: 12
per_device_train_batch_size: 16
gradient_accumulation_steps: 1
learning_rate: 0.01
max_steps: 5
logging_steps: 1
save_steps: 1
"""


def test_gvpo_train_is_killed_and_goes_on(tmp_path: Path) -> None:
    save_model(tmp_path / "model")
    (tmp_path / "own_reward.py").write_text(REWARD)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    rows = [{"prompt": f"{a}+{b}", "answer": str(a + b)} for a in range(8) for b in range(8)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [sys.executable, "-m", "gvpo", "train", "--config", "recipe.yaml", "--resume", "auto"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    first = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert first.returncode == -signal.SIGKILL, first.stderr[-3000:]
    second = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert second.returncode == 0, second.stderr[-3000:]
    assert "Going on from out/checkpoint-3" in second.stdout
    metrics = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in metrics if "loss" in entry] == [1, 2, 3, 4, 5]
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["steps"] == 5
