"""A model that vLLM can serve (heads of 32), a trainer with vLLM in it, and how far the two are apart."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from gvpo.trl import GVPOTrainer
from tests.models import SHAPE
from tests.trl.common import config, dataset, digit_reward, tokenizer

FLOAT32 = {"dtype": "float32", "enforce_eager": True}
LENGTH = 64


def save_model(folder: Path, **changes: Any) -> Path:
    torch.manual_seed(0)
    shape = SHAPE | {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1} | changes
    LlamaForCausalLM(LlamaConfig(**shape)).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


class Watched(GVPOTrainer):
    """Measures, at every generation, the engine's log-probability of each token against the trainer's.

    Attributes:
        apart: at each generation, nats a token at most: from the policy as it is, and from the initial one.
        sampled: the completions of each generation.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.apart: list[tuple[float, float]] = []
        self.sampled: list[list[list[int]]] = []
        self._initial = self._current()
        generate = self.vllm_generation.generate

        def watched(*args: Any, **kwargs: Any) -> Any:
            prompts, completions, logps, others = generate(*args, **kwargs)
            now = self._current()
            rows = list(zip(prompts, completions, logps, strict=True))
            self.apart.append((self._distance(now, rows), self._distance(self._initial, rows)))
            self.sampled.append(completions)
            return prompts, completions, logps, others

        self.vllm_generation.generate = watched

    def _current(self) -> LlamaForCausalLM:
        """The policy, read from a file as another program would: with its adapters merged."""
        model = self.accelerator.unwrap_model(self.model)
        twin = type(model.get_base_model() if hasattr(model, "peft_config") else model)(model.config)
        if not hasattr(model, "peft_config"):
            twin.load_state_dict(model.state_dict())
            return twin.eval()
        model.merge_adapter()
        state = {
            name.removeprefix("base_model.model.").replace(".base_layer", ""): value
            for name, value in model.state_dict().items()
            if "lora_" not in name
        }
        twin.load_state_dict(state)
        model.unmerge_adapter()
        return twin.eval()

    @torch.no_grad()
    def _distance(self, model: torch.nn.Module, rows: list[Any]) -> float:
        worst = 0.0
        for prompt, completion, logps in rows:
            ids = torch.tensor([[*prompt, *completion]])
            expected = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            picked = expected.gather(1, ids[0, len(prompt) :, None])[:, 0]
            worst = max(worst, float((picked - torch.tensor(logps)[:, 0]).abs().max()))
        return worst


@contextmanager
def learner(model: Path | str, rewards: Any = digit_reward, **changes: Any) -> Iterator[Watched]:
    """A trainer with vLLM in its process, whose engine is gone afterwards."""
    others = {name: changes.pop(name) for name in ("peft_config", "train_dataset") if name in changes}
    processor = changes.pop("processing_class", None) or tokenizer()
    settings: dict[str, Any] = {
        "use_vllm": True,
        "vllm_mode": "colocate",
        "vllm_max_model_length": LENGTH,
        "reference": "initial",
        "max_steps": 4,
    }
    if changes.get("vllm_mode", "colocate") == "colocate":
        settings["vllm_engine_kwargs"] = FLOAT32
    trainer = Watched(
        str(model),
        rewards,
        config(**settings | changes),
        processing_class=processor,
        **{"train_dataset": dataset(), **others},
    )
    try:
        yield trainer
    finally:
        del trainer.vllm_generation
        gc.collect()
        from vllm.distributed import cleanup_dist_env_and_memory

        cleanup_dist_env_and_memory()
