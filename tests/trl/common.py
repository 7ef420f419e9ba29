"""A tiny task for trainer tests: canned completions where runs must be comparable, real ones elsewhere."""

import random
import tempfile
import warnings
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from gvpo.trl import GVPOConfig, GVPOTrainer
from tests.models import VOCAB, tiny_model

CHARACTERS = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ+"
EOS = 2


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a character, as many tokens as the tiny models have."""
    vocab = {"<pad>": 0, "<bos>": 1, "<eos>": 2, "<unk>": 3}
    vocab |= {c: i for i, c in enumerate(CHARACTERS, start=4)}
    assert len(vocab) == VOCAB
    inner = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
    )


def dataset(n: int = 64) -> Dataset:
    rng = random.Random(0)
    prompts = ["".join(rng.choices(CHARACTERS, k=rng.randint(2, 8))) for _ in range(n)]
    return Dataset.from_dict({"prompt": prompts})


def digit_reward(completions: list[str], **_: Any) -> list[float]:
    """A dense reward. Completions that start with a capital all get the same: equal groups happen."""
    return [
        0.5 if c[:1].isupper() else sum(ch.isdigit() for ch in c) / 4 + 0.05 * len(c) for c in completions
    ]


class CannedTrainer(GVPOTrainer):
    """Completions are a function of prompt, place in the group and step, whatever the processes."""

    def _generate_single_turn(self, prompt_ids: list[list[int]], *_: Any, **__: Any) -> Any:
        k = self.num_generations if self.model.training else self.num_generations_eval
        first = self.accelerator.process_index * len(prompt_ids)
        completions = []
        for i, ids in enumerate(prompt_ids):
            rng = random.Random(f"{ids} {(first + i) % k} {self.state.global_step}")
            tokens = [rng.randrange(4, VOCAB) for _ in range(rng.randint(0, 11))]
            completions.append([*tokens, EOS] if rng.random() < 0.8 else [*tokens, 5])
        return completions, None


def config(**changes: Any) -> GVPOConfig:
    settings: dict[str, Any] = {
        "output_dir": tempfile.mkdtemp(),
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 4,
        "num_generations": 4,
        "max_completion_length": 12,
        "max_steps": 3,
        "learning_rate": 0.05,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1.0,
        "beta": 0.5,
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return GVPOConfig(**{**settings, **changes})


def trainer(
    cls: type[GVPOTrainer] = CannedTrainer, model: Any = None, rewards: Any = digit_reward, **changes: Any
) -> GVPOTrainer:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="beta=.* cannot be felt")
        names = ("peft_config", "eval_dataset", "train_dataset", "callbacks", "rollout_func")
        others = {name: changes.pop(name) for name in names if name in changes}
        return cls(
            tiny_model() if model is None else model,
            rewards,
            config(**changes),
            processing_class=tokenizer(),
            **{"train_dataset": dataset(), **others},
        )


def parameters(of: GVPOTrainer) -> dict[str, torch.Tensor]:
    model = of.accelerator.unwrap_model(of.model)
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Relative distance of two sets of parameters, measured in what training changed."""
    start = dict(tiny_model().named_parameters())
    moved = sum((b[n] - start[n].detach()).double().pow(2).sum() for n in start if n in b)
    apart = sum((a[n] - b[n]).double().pow(2).sum() for n in b)
    assert moved > 0
    return float((apart / moved) ** 0.5)
