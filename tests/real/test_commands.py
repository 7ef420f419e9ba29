"""SmolLM2 through the commands: checkpoint, resume, evaluate, report; and the plan against what it takes."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from benchmarks.measure import in_fresh_process
from benchmarks.plan import WAYS, measure
from gvpo.cli import main
from tests.real.test_training import GSM8K

DATA = f"gsm8k:{GSM8K}"


def gvpo(*words: str | Path) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([str(word) for word in words])
    assert stopped.value.code == 0


def test_a_run_that_goes_on_from_a_checkpoint_ends_bitwise_alike(smollm2: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.json").write_text(
        json.dumps(
            {
                "model_name_or_path": str(smollm2),
                "dataset_name": DATA,
                "dataset_size": 8,
                "reward_funcs": "tests.real.test_training:digits",
                "reference": "initial",
                "num_generations": 2,
                "per_device_train_batch_size": 4,
                "max_completion_length": 6,
                "micro_batch_tokens": 512,
                "max_steps": 3,
                "save_steps": 2,
                "logging_steps": 1,
                "report_to": "none",
            }
        )
    )
    train = ("train", "--config", tmp_path / "recipe.json", "--resume", "auto", "--output_dir")
    gvpo(*train, tmp_path / "whole")
    (tmp_path / "resumed").mkdir()
    shutil.move(tmp_path / "whole" / "checkpoint-2", tmp_path / "resumed")
    gvpo(*train, tmp_path / "resumed")
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "resumed"))
    assert all(value.equal(b[name]) for name, value in a.items())
    start = load_file(smollm2 / "model.safetensors")
    assert not all(value.equal(start[name]) for name, value in a.items())


def test_eval_and_report(smollm2: Path, tmp_path: Path) -> None:
    run = tmp_path / "eval"
    small = ("--size", "2", "--samples", "2", "--max-tokens", "12")
    gvpo("eval", "--model", smollm2, "--data", DATA, "--output", run, *small)
    gvpo("report", run, "--output", tmp_path / "report.html")
    metrics = json.loads((run / "summary.json").read_text())["metrics"]
    assert {"pass@1", "pass@2", "maj@2", "truncated"} <= metrics.keys()
    assert metrics["truncated"]["mean"] >= 0.5  # nobody solves GSM8K in 12 tokens
    page = (tmp_path / "report.html").read_text()
    assert "SmolLM, trained by Hugging Face" in page  # the template's system prompt was sent


@pytest.mark.parametrize("way", WAYS)
def test_the_plan_is_within_a_fifth_of_what_training_takes(way: str, smollm2: Path) -> None:
    row = in_fresh_process(measure, str(smollm2), way)
    assert 0.8 <= row["planned / measured"] <= 1.2, row
