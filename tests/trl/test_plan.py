"""`gvpo train --plan` counts what training really takes."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from gvpo.cli import main
from gvpo.trl.arguments import parse_arguments
from gvpo.trl.plan import make_plan
from tests.trl.chat_model import save_chat_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chat_model(tmp_path_factory.mktemp("models") / "chat")


def kept_for_backward(folder: Path, tokens: int, way: list[str]) -> int:
    """Bytes that autograd keeps on a real device, by the storages that it holds."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=way[1] if "--dtype" in way else None)
    body = model.model.train()
    if "--use_peft" in way:
        # In bfloat16 the adapters stay float32, and so does a copy of what they are given.
        model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear"))
    if "--gradient_checkpointing" in way:
        model.gradient_checkpointing_enable()
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen: dict[int, int] = {}
    alive = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        alive.append(tensor)
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        body(input_ids=torch.zeros(1, tokens, dtype=torch.long), use_cache=False)
    return sum(seen.values())


LORA = ["--use_peft", "--lora_target_modules", "all-linear"]


@pytest.mark.parametrize(
    "way", [[], ["--gradient_checkpointing"], LORA, ["--dtype", "bfloat16", *LORA]], ids=" ".join
)
def test_activations_are_at_least_those_of_a_real_forward(model: Path, way: list[str]) -> None:
    off = [] if "--gradient_checkpointing" in way else ["--gradient_checkpointing", "false"]
    plan = make_plan(parse_arguments(["--model_name_or_path", str(model), *off, *way]))
    real = (kept_for_backward(model, 256, way) - kept_for_backward(model, 128, way)) / 128
    assert 0.99 * real <= plan.activation <= 1.35 * real


def test_weights_copies_and_states(model: Path) -> None:
    count = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(model).parameters())
    common = ["--model_name_or_path", str(model)]
    plan = make_plan(parse_arguments([*common, "--reference", "initial", "--optim", "adamw_torch"]))
    assert (plan.parameters, plan.reference, plan.gradients, plan.optimizer) == tuple(
        4 * count * n for n in (1, 1, 1, 2)
    )
    lora = make_plan(
        parse_arguments(
            [*common, "--reference", "initial", "--use_peft", "--lora_target_modules", "all-linear"]
        )
    )
    assert lora.reference == 0
    assert lora.gradients == lora.parameters - plan.parameters  # the adapters and nothing else
    half = [*common, "--dtype", "bfloat16", "--optim", "adamw_torch"]
    base, adapted = (make_plan(parse_arguments([*half, *peft])) for peft in ([], LORA))
    assert adapted.gradients == lora.gradients == adapted.parameters - base.parameters  # float32 all the same
    assert adapted.optimizer == 2 * adapted.gradients
    assert plan.largest_budget > 0
    odd = make_plan(parse_arguments([*common, "--optim", "ademamix"]))
    assert odd.optimizer is None


def test_autocast_keeps_copies_of_the_weights(model: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(model)
    common = ["--model_name_or_path", str(model), "--use_cpu", "true", "--bf16"]
    copies = {flag: make_plan(parse_arguments([*common, flag])).copies for flag in ("true", "false")}
    assert copies == {"true": 2 * base.num_parameters(), "false": 0}
    weights = [sorted(p.shape) for p in base.model.layers.parameters() if p.dim() == 2]
    kept = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dtype == torch.bfloat16 and sorted(tensor.shape) in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autocast("cpu", torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        base.model(input_ids=torch.zeros(1, 7, dtype=torch.long), use_cache=False)
    assert len(kept) == len(weights)


def test_plan_prints_and_writes_nothing(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--plan", "--model_name_or_path", str(model)])
    assert stopped.value.code == 0
    assert "--micro_batch_tokens" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
