"""Steps of SmolLM2 on GSM8K through `GVPOTrainer`, against literal autograd of the formula in float32."""

import copy
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from gvpo.batch import GroupBatch
from gvpo.data import load_prompts
from gvpo.step import GVPOStep
from gvpo.trl import GVPOConfig, GVPOTrainer
from tests.models import gradients, literal_gradient, literal_logps, relative_error
from tests.trl.oracle import trained

GSM8K = Path(__file__).parents[1] / "fixtures" / "rewards" / "gsm8k.jsonl"
BETA = 0.1
WAYS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {},
    "checkpointing": {"gradient_checkpointing": True},
    "bf16": {"bf16": True},
}
Record = tuple[GroupBatch, dict[str, torch.Tensor], dict[str, torch.Tensor]]  # with parameters and gradients


def digits(completions: list[Any], **_: Any) -> list[float]:
    """A dense reward, so that every row has a weight."""
    return [
        len(set(text[0]["content"])) / 16 + sum(map(str.isdigit, text[0]["content"])) for text in completions
    ]


@pytest.fixture
def records(monkeypatch: pytest.MonkeyPatch) -> list[Record]:
    """Each step's batch, the parameters that it met and the gradients that it made."""
    seen: list[Record] = []
    plain = GVPOStep.__call__

    def recorded(self: GVPOStep, batch: GroupBatch) -> Any:
        before = trained(self.model)
        report = plain(self, batch)
        seen.append((batch, before, gradients(self.model)))
        return report

    monkeypatch.setattr(GVPOStep, "__call__", recorded)
    return seen


def load(folder: Path, way: str) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    return get_peft_model(model, lora) if way == "lora" else model


@pytest.mark.parametrize("way", WAYS)
def test_gradients_are_those_of_float32_autograd(
    way: str, smollm2: Path, tmp_path: Path, records: list[Record]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2, padding_side="left")
    prompts = load_prompts(f"gsm8k:{GSM8K}", size=8)
    model, twin = load(smollm2, way), load(smollm2, way)
    initial = copy.deepcopy(twin)
    settings = {"bf16": False, "gradient_checkpointing": False, **WAYS[way]}
    args = GVPOConfig(
        str(tmp_path), beta=BETA, reference="initial", num_generations=2, per_device_train_batch_size=4,
        max_completion_length=8, learning_rate=1e-2, optim="sgd", max_steps=2, micro_batch_tokens=180,
        use_cpu=True, save_strategy="no", report_to=[], disable_tqdm=True, seed=0, **settings,
    )  # fmt: skip
    GVPOTrainer(model, digits, args, train_dataset=prompts, processing_class=tokenizer).train()

    assert len(records) == 2
    for step, (batch, before, got) in enumerate(records):
        text = tokenizer.decode(batch.input_ids[0])
        assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
        assert text.count("<|im_start|>assistant\n") == text.count('the final answer after "####".') == 1
        assert batch.reference_logps is not None
        with torch.no_grad():
            reference = literal_logps(initial, batch)
        assert (batch.reference_logps - reference).abs().max() < (1.0 if way == "bf16" else 1e-3)
        twin.load_state_dict(before, strict=False)
        want, _ = literal_gradient(twin, batch, BETA)
        tolerance = 1e-4
        if way == "bf16":  # as near as plain autograd in bfloat16 is
            with torch.autocast("cpu", torch.bfloat16):
                rounded, _ = literal_gradient(twin, batch, BETA)
            tolerance = 1.2 * relative_error(rounded, want)
            assert tolerance < 0.3
        assert relative_error(got, want) < tolerance, step
    if way == "full":
        check_cuts(twin, *records[1][::2])


def check_cuts(model: Any, batch: GroupBatch, want: dict[str, torch.Tensor]) -> None:
    """Other micro-batches and another order of rows give the same gradient."""
    order = torch.tensor([2, 0, 3, 1])
    values = {field.name: getattr(batch, field.name) for field in fields(batch)}
    shuffled = GroupBatch(
        **{name: value if value is None else value[order] for name, value in values.items()}
    )
    for budget, rows in ((10_000, batch), (130, shuffled)):
        model.zero_grad()
        GVPOStep(model, beta=BETA, token_budget=budget)(rows)
        assert relative_error(gradients(model), want) < 1e-5
