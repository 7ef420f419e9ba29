"""Tiny vision-language models, their processors, and batches with images."""

from typing import Any

import torch
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from gvpo.batch import GroupBatch
from gvpo.images import Images
from tests.models import SHAPE, VOCAB

IMAGE, BEGIN, END = VOCAB, VOCAB + 1, VOCAB + 2  # tokens besides those of the text models
WIDTH = 4  # pixels of a patch


def tiny_vision_model(kind: str, dtype: torch.dtype = torch.float64, **changes: Any) -> PreTrainedModel:
    """Randomly initialised, in evaluation mode, the same at each call."""
    torch.manual_seed(0)
    text: dict[str, Any] = {**SHAPE, "vocab_size": VOCAB + 5, "head_dim": 8, "tie_word_embeddings": True}
    if kind == "qwen2.5-vl":
        text |= {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}, **changes}
        text["rope_parameters"]["rope_theta"] = 10_000.0
        vision: dict[str, Any] = {
            "depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "patch_size": WIDTH,
            "out_hidden_size": 32, "window_size": 4 * WIDTH, "fullatt_block_indexes": [1],
            "initializer_range": 0.2,
        }  # fmt: skip
        config: Any = Qwen2_5_VLConfig(
            text_config=text, vision_config=vision, image_token_id=IMAGE, video_token_id=IMAGE + 3,
            vision_start_token_id=BEGIN, vision_end_token_id=END, tie_word_embeddings=True,
        )  # fmt: skip
        model: Any = Qwen2_5_VLForConditionalGeneration(config)
    elif kind == "qwen3-vl":
        text |= {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}}
        vision = {
            "depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "patch_size": WIDTH,
            "out_hidden_size": 32, "num_position_embeddings": 16, "deepstack_visual_indexes": [0],
            "initializer_range": 0.2,
        }  # fmt: skip
        config = Qwen3VLConfig(
            text_config=text, vision_config=vision, image_token_id=IMAGE, video_token_id=IMAGE + 3,
            vision_start_token_id=BEGIN, vision_end_token_id=END, tie_word_embeddings=True,
        )  # fmt: skip
        model = Qwen3VLForConditionalGeneration(config)
    else:
        text |= {"sliding_window": 8, "query_pre_attn_scalar": 8, **changes}
        vision = {
            "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
            "patch_size": WIDTH, "image_size": 4 * WIDTH, "vision_use_head": False,
        }  # fmt: skip
        config = Gemma3Config(
            text_config=text, vision_config=vision, image_token_index=IMAGE, boi_token_index=BEGIN,
            eoi_token_index=END, mm_tokens_per_image=4, initializer_range=0.2,
        )  # fmt: skip
        model = Gemma3ForConditionalGeneration(config)
        torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight, std=0.2)
    return model.to(dtype).eval()


def random_images(kind: str, count: int, generator: torch.Generator) -> tuple[dict[str, torch.Tensor], int]:
    """What a processor makes of so many images, and how many tokens stand for each."""
    if kind.startswith("qwen"):
        grid = torch.tensor([[1, 4, 4], [1, 2, 4]])[torch.randint(2, (), generator=generator)].expand(
            count, 3
        )
        patches = int(grid.prod(1).sum())
        pixels = torch.randn(patches, 3 * 2 * WIDTH**2, generator=generator, dtype=torch.float64)
        return {"pixel_values": pixels, "image_grid_thw": grid}, patches // count // 4
    pixels = torch.randn(count, 3, 4 * WIDTH, 4 * WIDTH, generator=generator, dtype=torch.float64)
    return {"pixel_values": pixels}, 4


def vision_batch(kind: str, k: int = 3, seed: int = 0, *, reference: bool = True) -> GroupBatch:
    """Groups with one image, two images, none, and the first's tokens with another image; in random order."""
    generator = torch.Generator().manual_seed(seed)

    def words(low: int, high: int) -> list[int]:
        n = int(torch.randint(low, high, (), generator=generator))
        return torch.randint(3, VOCAB, (n,), generator=generator).tolist()

    prompts: list[list[int]] = []
    sets: list[dict[str, torch.Tensor] | None] = []
    for count in (1, 2, 0):
        images, width = random_images(kind, count, generator) if count else (None, 0)
        shown = [t for _ in range(count) for t in [BEGIN, *[IMAGE] * width, END, *words(1, 4)]]
        prompts.append([*words(12, 18), *shown, *words(8, 16)])
        sets.append(images)
    prompts.append(prompts[0])
    assert sets[0] is not None
    sets.append({name: v + 1 if name == "pixel_values" else v for name, v in sets[0].items()})
    order = torch.randperm(4 * k, generator=generator).tolist()
    batch = GroupBatch.from_tokens(
        [prompts[i // k] for i in order],
        [words(1, 9) for _ in order],
        torch.rand(4 * k, generator=generator, dtype=torch.float64),
        [i // k for i in order],
    )
    types = "mm_token_type_ids" if kind.startswith("qwen") else "token_type_ids"
    batch.images = Images.of([sets[i // k] for i in order], torch.device("cpu"), IMAGE, types)
    if reference:
        batch.reference_logps = torch.randn(4 * k, generator=generator, dtype=torch.float64) * 3 - 20
    return batch


def literal_vision_logps(model: torch.nn.Module, batch: GroupBatch) -> torch.Tensor:
    """S of each row, run on its own with its own images."""
    sums = []
    for i, length in enumerate(batch.lengths.tolist()):
        ids = batch.input_ids[i : i + 1, :length]
        more = {} if batch.images is None else batch.images.arguments([i], ids)
        logps = (
            model(input_ids=ids, attention_mask=torch.ones_like(ids), **more).logits[0, :-1].log_softmax(-1)
        )
        picked = logps.gather(1, ids[0, 1:, None])[:, 0]
        sums.append(picked[batch.completion_mask[i, 1:length]].sum())
    return torch.stack(sums)
