"""Training on a GPU: the CPU's updates, mixed precision, loss scaling, real shortage of memory, resuming."""

import copy
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

from gvpo.cli import main
from gvpo.step import GVPOStep
from gvpo.trl import GVPOTrainer
from tests.models import gradients, random_batch, relative_error, tiny_model
from tests.trl.chat_model import save_chat_model
from tests.trl.common import CannedTrainer, distance, parameters, trainer
from tests.trl.test_half import HalfTrainer

pytestmark = pytest.mark.gpu


def trained(device: str, cls: type[GVPOTrainer] = CannedTrainer, **changes: Any) -> GVPOTrainer:
    resume = changes.pop("resume", None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = trainer(cls, use_cpu=device == "cpu", **changes)
        made.train(resume)
    assert made.model.device.type == device
    return made


def result(of: GVPOTrainer) -> dict[str, torch.Tensor]:
    return {name: value.float().cpu() for name, value in parameters(of).items()}


@pytest.mark.parametrize(
    "changes",
    [
        {"reference": "initial"},
        {"replay_ratio": 1.0},
        {"steps_per_generation": 8, "trust": 0.2},
        {"num_iterations": 2, "gradient_checkpointing": True},
    ],
    ids=lambda changes: ", ".join(changes),
)
def test_updates_are_the_cpu_s(changes: dict[str, Any], device: str, tmp_path: Path) -> None:
    there = result(trained(device, output_dir=str(tmp_path / "there"), **changes))
    here = result(trained("cpu", output_dir=str(tmp_path / "here"), **changes))
    assert distance(there, here) < 1e-3


def test_bfloat16_is_near_float32(device: str) -> None:
    assert distance(result(trained(device, bf16=True)), result(trained("cpu"))) < 0.2


def test_lora_against_the_base_model(device: str) -> None:
    adapter = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    made = trained(device, peft_config=adapter, reference="initial", bf16=True)
    assert all(entry["gvpo/kl"] == entry["gvpo/kl"] for entry in made.state.log_history if "gvpo/kl" in entry)
    assert any(v.abs().sum() > 0 for n, v in result(made).items() if "lora_B" in n)


def test_float16_with_a_loss_scaler(device: str) -> None:
    options: dict[str, Any] = {"optim": "adamw_torch", "learning_rate": 0.01, "reference": "initial"}
    made = trained(device, HalfTrainer, fp16=True, **options)
    assert isinstance(made, HalfTrainer)
    assert made.moved() == [True] * 3
    there = result(made)
    assert distance(there, result(trained("cpu", **options))) < 0.3


class Broken(HalfTrainer):
    """Its gradient is infinite in the second step."""

    def train(self, *args: Any, **kwargs: Any) -> Any:
        weight = list(self.model.parameters())[1]
        weight.register_hook(lambda g: g * torch.inf if self.state.global_step == 1 else g)
        return super().train(*args, **kwargs)


def test_a_step_that_overflows_is_left_out_and_the_scale_halved(device: str) -> None:
    made = trained(device, Broken, fp16=True, optim="adamw_torch", learning_rate=0.01)
    assert isinstance(made, Broken)
    assert made.moved() == [True, False, True]
    assert made.scales == [2.0**10, 2.0**10, 2.0**9]


def test_a_resumed_run_ends_like_one_that_was_not_stopped(device: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "output_dir": str(tmp_path / "run"),
        "save_strategy": "steps",
        "save_steps": 1,
        "reference": "initial",
        "steps_per_generation": 8,
        "optim": "adamw_torch",
        "learning_rate": 0.01,
    }
    whole = result(trained(device, **options))
    last = tmp_path / "run" / "checkpoint-1"
    assert distance(result(trained(device, resume=str(last), **options)), whole) < 1e-3


def characters(completions: list[str], **_: Any) -> list[float]:
    return [len(set(completion)) / 32 for completion in completions]


def test_gvpo_train_generates_saves_and_resumes(
    device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_chat_model(tmp_path / "chat")
    argv = [
        "train", "--model_name_or_path", "chat", "--dataset_name", "arithmetic", "--dataset_size", "16",
        "--reward_funcs", "tests.gpu.test_training:characters", "--num_generations", "4",
        "--per_device_train_batch_size", "8", "--gradient_accumulation_steps", "2", "--max_steps", "4",
        "--max_completion_length", "8", "--save_steps", "2", "--logging_steps", "1", "--output_dir", "out",
        "--report_to", "none", "--learning_rate", "0.001", "--reference", "initial",
        *(["--use_cpu", "true", "--bf16", "false"] if device == "cpu" else []),
    ]  # fmt: skip

    def steps() -> list[int]:
        with pytest.raises(SystemExit) as stopped:
            main(argv)
        assert stopped.value.code == 0
        lines = [json.loads(line) for line in Path("out/metrics.jsonl").read_text().splitlines()]
        assert json.loads(Path("out/summary.json").read_text())["steps"] == 4
        return [line["step"] for line in lines if "loss" in line]

    assert steps() == [1, 2, 3, 4]
    shutil.rmtree("out/checkpoint-4")
    argv += ["--resume", "auto"]
    assert steps() == [1, 2, 3, 4]


def test_a_step_that_runs_out_of_memory_is_made_again(device: str) -> None:
    """For real: the process gets little of the device."""
    if device == "cpu":
        pytest.skip("it takes a GPU to run out of its memory")
    sizes = {
        "vocab_size": 8192,
        "hidden_size": 512,
        "intermediate_size": 2048,
        "max_position_embeddings": 1024,
    }
    model = tiny_model("untied", **sizes, num_hidden_layers=8, initializer_range=0.02).to(device)
    batch = random_batch(groups=64, k=8, prompt=(80, 100))
    for name, value in vars(batch).items():
        setattr(batch, name, None if value is None else value.to(device))
    peaks = {}
    for budget in (1 << 20, 1000):
        twin = copy.deepcopy(model)
        torch.cuda.reset_peak_memory_stats()
        GVPOStep(twin, token_budget=budget, share_prompts=False)(batch)
        peaks[budget] = torch.cuda.max_memory_allocated()
        expected = gradients(twin)
        del twin
    assert peaks[1 << 20] > 1.5 * peaks[1000]
    torch.cuda.empty_cache()
    room = (peaks[1 << 20] + peaks[1000]) / 2
    torch.cuda.set_per_process_memory_fraction(room / torch.cuda.get_device_properties(0).total_memory)
    try:
        with pytest.warns(UserWarning, match="Out of memory: made again"):
            report = GVPOStep(model, token_budget=1 << 20, share_prompts=False)(batch)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()
    assert report.retries
    assert relative_error(gradients(model), expected) < 3e-5


def test_prompts_are_shared_under_tensorfloat32(device: str) -> None:
    """Its rounding is no difference; and the check leaves the switch as it was."""
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8, "initializer_range": 0.1}
    model = tiny_model("untied", **sizes).to(device)
    batch = random_batch(groups=4, k=4, prompt=(80, 100))
    for name, value in vars(batch).items():
        setattr(batch, name, None if value is None else value.to(device))
    step = GVPOStep(model)
    torch.set_float32_matmul_precision("high")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            step(batch)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert step._way in ("merged", "copied")
