"""Images in a trainer: the parameters of each step, from rows that went through the processor one by one."""

import copy
import json
import re
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, Image
from PIL import Image as Pillow
from trl import GRPOTrainer

from gvpo.cli import main
from gvpo.errors import InputError
from gvpo.trl import GVPOTrainer
from gvpo.trl.rollouts import Slice, load_rollouts, save_rollouts
from tests.gloo import run_ranks
from tests.models import relative_error
from tests.test_objective import literal_loss
from tests.trl.common import parameters
from tests.trl.vision import pictures, processor, vision_trainer
from tests.vision import tiny_vision_model, vision_batch

KINDS = ("qwen2.5-vl", "gemma3")
LR, BETA, K = 0.05, 0.5, 4


class Seen:
    """A reward function that remembers what it was asked."""

    __name__ = "seen"

    def __init__(self, equal: int = 0) -> None:
        self.equal = equal  # so many rows at first
        self.rows: list[tuple[Any, list[Any], list[int], float]] = []

    def __call__(self, prompts: Any, completion_ids: Any, images: Any, **_: Any) -> list[float]:
        rewards = [len(set(ids)) / 5 + ids[0] / 50 for ids in completion_ids]
        if not self.rows:
            rewards[: self.equal] = [0.5] * self.equal
        texts = [list(prompt) for prompt in prompts]
        self.rows += zip(texts, images, completion_ids, rewards, strict=True)
        return rewards


def logps(model: Any, prepare: Any, seen: Seen) -> torch.Tensor:
    """S of each row: the processor is given one prompt and its images."""
    sums = []
    for prompt, images, completion, _ in seen.rows:
        text = prepare.apply_chat_template([prompt], add_generation_prompt=True, tokenize=False)
        given = dict(prepare(images=[images] if images else None, text=text, return_tensors="pt"))
        if "pixel_values" in given:
            given["pixel_values"] = given["pixel_values"].double()
        n = len(completion)
        ids = given["input_ids"] = torch.cat([given["input_ids"], torch.tensor([completion])], 1)
        given["attention_mask"] = torch.ones_like(ids)
        for name in {"token_type_ids", "mm_token_type_ids"} & given.keys():
            given[name] = torch.cat([given[name], torch.zeros(1, n, dtype=torch.long)], 1)
        all_logps = model(**given).logits[0, :-1].log_softmax(-1)
        sums.append(all_logps.gather(1, ids[0, 1:, None])[-n:].sum())
    return torch.stack(sums)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "changes",
    [{}, {"micro_batch_tokens": 1}, {"dynamic_sampling": "resample"}],
    ids=["one cut", "another", "a group resampled"],
)
def test_two_updates_are_the_formula_s(kind: str, changes: dict[str, Any]) -> None:
    """Of one rollout with one image, two and none in its prompts; the second is off-policy."""
    model, seen = tiny_vision_model(kind), Seen(K if "dynamic_sampling" in changes else 0)
    literal = copy.deepcopy(model)
    settings = {"num_iterations": 2, "max_grad_norm": 0, "gradient_accumulation_steps": 4, **changes}
    run = vision_trainer(kind, model=model, reward=seen, max_steps=2, train_dataset=pictures(8), **settings)
    run.train()
    if seen.equal:  # the last group was asked in the place of the first
        seen.rows = seen.rows[-K:] + seen.rows[K:-K]
    assert {len(images) for _, images, _, _ in seen.rows} == {0, 1, 2}
    prepare, start = processor(kind), {n: p.detach().clone() for n, p in literal.named_parameters()}
    n = len(seen.rows)
    rewards = torch.tensor([row[-1] for row in seen.rows], dtype=torch.float64)
    with torch.no_grad():
        reference = logps(literal, prepare, seen)
    for _ in range(2):
        literal.zero_grad()
        policy = logps(literal, prepare, seen)
        mask = torch.ones(n, dtype=torch.bool)
        literal_loss(policy, reference, rewards, torch.arange(n) // K, BETA, mask).backward()
        with torch.no_grad():
            for value in literal.parameters():
                if value.grad is not None:
                    value -= LR * value.grad
    want = {name: value.detach() - start[name] for name, value in literal.named_parameters()}
    got = {name: value - start[name] for name, value in parameters(run).items()}
    assert want["model.language_model.embed_tokens.weight"].abs().max() > 1e-3
    assert relative_error(got, want) < 1e-5


def of_rank(rank: int, world: int, kind: str) -> dict[str, torch.Tensor]:
    run = vision_trainer(kind, max_steps=2, num_iterations=2, per_device_train_batch_size=8 // world)
    run.train()
    return parameters(run)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_make_the_updates_of_one(kind: str) -> None:
    start = {n: p.detach() for n, p in tiny_vision_model(kind).named_parameters()}
    want = {n: p - start[n] for n, p in of_rank(0, 1, kind).items()}
    for got in run_ranks(of_rank, 2, kind):
        assert relative_error({n: p - start[n] for n, p in got.items()}, want) < 1e-5


def stored(data: bytes) -> Dataset:
    row = {"prompt": [{"role": "user", "content": "what"}], "image": {"bytes": data, "path": None}}
    return Dataset.from_list([row] * 16).cast_column("image", Image())


def test_an_image_that_cannot_be_read_is_named() -> None:
    png = BytesIO()
    Pillow.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(png, "png")
    for data in (b"no image", png.getvalue()[:500]):
        with pytest.raises(InputError, match=r"The image in the data set of .*what.* cannot be read"):
            vision_trainer("gemma3", train_dataset=stored(data), max_steps=1).train()
    missing = [{"prompt": [{"role": "user", "content": "what"}], "image": "nowhere.png"}] * 16
    with pytest.raises(InputError, match=r"The image nowhere\.png .* cannot be read"):
        vision_trainer("gemma3", train_dataset=Dataset.from_list(missing), max_steps=1).train()


def test_images_are_not_replayed_nor_demonstrated() -> None:
    with pytest.raises(InputError, match="replay_ratio does not go with images in prompts"):
        vision_trainer("gemma3", GVPOTrainer, replay_ratio=1.0, max_steps=1).train()
    shown = pictures().add_column("demonstrations", [["7"]] * 16)
    with pytest.raises(InputError, match="demonstrations_per_group does not go with images in prompts"):
        vision_trainer(
            "gemma3", GVPOTrainer, demonstrations_per_group=1, max_steps=1, train_dataset=shown
        ).train()


def test_an_engine_is_told_none_for_a_row_without_images() -> None:
    """And a processor an empty list: TRL gives both what the other wants."""
    run, told = vision_trainer("gemma3", GVPOTrainer, max_steps=1, train_dataset=pictures(4)), []
    original = GRPOTrainer._generate_single_turn

    def listen(self: Any, prompt_ids: Any, images: Any, *others: Any, **more: Any) -> Any:
        told.extend(images)
        return original(self, prompt_ids, images, *others, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GRPOTrainer, "_generate_single_turn", listen)
        run.train()
    assert {None if some is None else len(some) for some in told} == {None, 1, 2}


def test_rollouts_in_flight_keep_their_images(tmp_path: Any) -> None:
    batch = vision_batch("qwen2.5-vl")
    save_rollouts(tmp_path / "r.safetensors", [Slice(batch, 3)], {})
    (item,), _ = load_rollouts(tmp_path / "r.safetensors", torch.device("cpu"))
    for row in range(len(batch)):
        want = batch.images.arguments([row], batch.input_ids[row : row + 1])  # type: ignore[union-attr]
        got = item.batch.images.arguments([row], batch.input_ids[row : row + 1])  # type: ignore[union-attr]
        assert got.keys() == want.keys()
        assert all(torch.equal(got[name], want[name]) for name in want)


def test_a_data_set_s_images_are_read_in_their_turn() -> None:
    run = vision_trainer("gemma3", train_dataset=pictures(), max_steps=1)
    assert "bytes" in run.train_dataset[0]["images"][0]


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A working directory with a model, pictures and questions; and the command that trains on them."""
    monkeypatch.chdir(tmp_path)
    model = tiny_vision_model("gemma3", torch.float32)
    model.save_pretrained("model")
    processor("gemma3").save_pretrained("model")
    noise = np.random.default_rng(0)
    rows = []
    for i in range(4):
        Pillow.fromarray(noise.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(f"{i}.png")
        rows.append({"question": f"how{i}", "answer": str(i), "picture": f"{i}.png"})
    Path("shop.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return [
        "train", "--model_name_or_path", "model", "--dataset_name", "shop.jsonl", "--image_column", "picture",
        "--output_dir", "out", "--reward_funcs", "length:8", "--num_generations", "4", "--max_steps", "1",
        "--per_device_train_batch_size", "8", "--gradient_accumulation_steps", "1", "--report_to", "none",
        "--max_completion_length", "8",
    ]  # fmt: skip


def test_the_command_trains_on_images(shop: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(shop)
    assert stopped.value.code == 0, capfd.readouterr().err
    summary = json.loads(Path("out/summary.json").read_text())
    assert summary["steps"] == 1


def test_the_command_names_an_image_that_cannot_be_read(
    shop: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    for i in range(4):
        Path(f"{i}.png").write_bytes(b"no picture")
    with pytest.raises(SystemExit) as stopped:
        main(shop)
    assert stopped.value.code == 2
    errors = capfd.readouterr().err
    assert re.search(
        r"^gvpo: The image \d\.png of the prompt .* cannot be read \(cannot identify", errors, re.M
    )
    assert "Traceback" not in errors
