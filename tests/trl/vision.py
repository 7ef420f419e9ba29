"""Vision-language trainers on canned completions: tiny models, transformers' own processors, made offline."""

import random
from typing import Any

import numpy as np
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as Pillow
from tokenizers import AddedToken
from transformers import (
    Gemma3ImageProcessorPil,
    Gemma3Processor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessorPil,
)

from tests.trl.common import CHARACTERS, CannedTrainer, config, tokenizer
from tests.vision import WIDTH, tiny_vision_model

_CHAT = (
    "{% for message in messages %}{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] }}"
    "{% endif %}{% endfor %}{% endif %}+{% endfor %}"
)


class _WithoutVideos(Qwen2_5_VLProcessor):
    """Its part for videos needs torchvision."""

    def check_argument_for_proper_class(self, *_: Any) -> Any:
        return object


def processor(kind: str) -> Any:
    """As from `AutoProcessor.from_pretrained`, of the tiny model of this kind."""
    words = tokenizer()
    if kind == "qwen2.5-vl":
        names = ["<|image_pad|>", "<|vision_start|>", "<|vision_end|>", "<|video_pad|>"]
        words.add_special_tokens({"additional_special_tokens": [AddedToken(n) for n in names]})
        chat = _CHAT.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
        words.chat_template = chat
        images = Qwen2VLImageProcessorPil(patch_size=WIDTH, min_pixels=64, max_pixels=256, merge_size=2)
        return _WithoutVideos(images, words, None, chat_template=chat)
    names = ["<image_soft_token>", "<start_of_image>", "<end_of_image>"]
    words.add_special_tokens({"additional_special_tokens": [AddedToken(n) for n in names]})
    words = PreTrainedTokenizerFast(
        tokenizer_object=words.backend_tokenizer,
        padding_side="left",
        extra_special_tokens=dict(zip(("image_token", "boi_token", "eoi_token"), names, strict=True)),
        **{f"{name}_token": f"<{name}>" for name in ("pad", "bos", "eos", "unk")},
    )
    words.chat_template = chat = _CHAT.replace("IMAGE", "<start_of_image>")
    images = Gemma3ImageProcessorPil(size={"height": 4 * WIDTH, "width": 4 * WIDTH})
    return Gemma3Processor(images, words, chat_template=chat, image_seq_length=4)


def pictures(n: int = 16) -> Dataset:
    """Prompts with one image, with two, and with none."""
    rng, noise = random.Random(0), np.random.default_rng(0)
    rows = []
    for i in range(n):
        text = "".join(rng.choices(CHARACTERS, k=rng.randint(10, 16)))
        sizes = [(16, 16), (8, 16)][: (1, 2, 0, 1)[i % 4]]
        images = [Pillow.fromarray(noise.integers(0, 256, (*s, 3), dtype=np.uint8)) for s in sizes]
        rows.append({"prompt": [{"role": "user", "content": text}], "images": images})
    message = {"role": Value("string"), "content": Value("string")}
    return Dataset.from_list(rows, features=Features({"prompt": [message], "images": List(Image())}))


def reward(completions: list[Any], **_: Any) -> list[float]:
    return [
        sum(ch.isdigit() for ch in c[0]["content"]) / 4 + 0.05 * len(c[0]["content"]) for c in completions
    ]


def vision_trainer(kind: str, cls: Any = CannedTrainer, model: Any = None, **changes: Any) -> Any:
    dataset, rewards = changes.pop("train_dataset", None), changes.pop("reward", reward)
    return cls(
        tiny_vision_model(kind) if model is None else model,
        rewards,
        config(**{"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, **changes}),
        processing_class=processor(kind),
        train_dataset=pictures() if dataset is None else dataset,
    )
