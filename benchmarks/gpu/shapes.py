"""Models of random weights in bfloat16 with the shapes of Qwen2.5-0.5B and 7B, and work for them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from benchmarks.workloads import EOS, Workload
from gvpo.batch import GroupBatch

# Dense bfloat16 operations a second, from the vendor's data sheets.
PEAK_OPERATIONS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12}


@dataclass(frozen=True)
class Shape(Workload):
    """A Qwen2 model's shape, and responses of reasoning length."""

    rows: int = 64
    mean_length: int = 512
    max_length: int = 2048
    zero_groups: float = 0.4
    key_value_heads: int = 2
    heads: int = 14
    intermediate: int = 4864
    tied: bool = True
    checkpointing: bool = False
    device: str = "cuda"

    def config(self) -> Qwen2Config:
        return Qwen2Config(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.key_value_heads,
            max_position_embeddings=4 * self.max_length + (self.prompt_length or 0),
            tie_word_embeddings=self.tied,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=EOS,
            use_cache=False,
            architectures=["Qwen2ForCausalLM"],
        )

    def model(self, dtype: torch.dtype = torch.bfloat16) -> Any:
        torch.manual_seed(self.seed)
        with torch.device(self.device):
            model = AutoModelForCausalLM.from_config(self.config(), dtype=dtype)
        if self.checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        return model.train()

    def work(self) -> GroupBatch:
        """The responses as a step takes them, on the device."""
        batch = self.batch()
        return replace(
            batch, **{name: value.to(self.device) for name, value in vars(batch).items() if value is not None}
        )


SHAPES = {
    "0.5B": Shape(vocabulary=151_936, hidden=896, layers=24),
    "7B": Shape(
        vocabulary=152_064,
        hidden=3584,
        layers=28,
        heads=28,
        key_value_heads=4,
        intermediate=18_944,
        tied=False,
        checkpointing=True,
    ),
}


def shapes(device: str, tiny: bool) -> dict[str, Shape]:
    """The shapes on a device; `tiny` ones run anywhere."""
    small: dict[str, Any] = {"vocabulary": 97, "hidden": 16, "layers": 1, "heads": 2, "key_value_heads": 1}
    small |= {"intermediate": 32, "rows": 16, "mean_length": 8, "max_length": 24}
    return {name: replace(shape, device=device, **(small if tiny else {})) for name, shape in SHAPES.items()}


def used(operations: float, seconds: float) -> float | None:
    """Operations as a share of what the device could make; None where that is not known."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    peak = next((peak for known, peak in PEAK_OPERATIONS.items() if known in name), None)
    return peak and operations / seconds / peak
