"""Generation with each distinct prompt read once, against `model.generate` as it is.

Beside tiny models SmolLM2-135M-Instruct is evaluated, where `gvpo.model.smollm2` finds it.
"""

from __future__ import annotations

import random
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import torch
from datasets import Dataset
from transformers import AutoTokenizer, GenerationConfig

from benchmarks.measure import Row, minima, timed
from benchmarks.workloads import GROUP, Workload
from gvpo.errors import InputError
from gvpo.evaluate.evaluation import Settings, sample_all
from gvpo.evaluate.sampling import SamplingOptions, TransformersSampler
from gvpo.model import generation
from gvpo.model.generation import shared_prompts
from gvpo.model.smollm2 import smollm2
from gvpo.run import RunDirectory

ABOUT = (
    "CPU seconds of sampling with transformers, groups of 8, one thread. plain: model.generate. shared: the "
    "same with each distinct prompt prefilled once and its cache repeated. gvpo eval: 8 prompts of 12 to 300 "
    "words, 8 samples each, 32 at a time; plain: in the order of the data, nothing shared."
)

# (work, prompts, prompt tokens, new tokens, model)
WORK = {
    "quickstart: 256 rows, 7 + 4 tokens, V 17, d 64, 2 layers": (
        32,
        7,
        4,
        Workload(vocabulary=17, hidden=64, layers=2, max_length=32),
    ),
    "64 rows, 64 + 32 tokens, V 32k, d 256, 4 layers": (8, 64, 32, Workload()),
    "64 rows, 512 + 32 tokens, V 32k, d 256, 4 layers": (8, 512, 32, Workload()),
}


def compare(name: str, count: int, length: int, new: int, work: Workload, repeats: int) -> Row:
    torch.manual_seed(0)
    model = work.model().eval()
    ids = torch.randint(3, work.vocabulary, (count, length)).repeat_interleave(GROUP, 0)
    config = GenerationConfig(
        do_sample=True, max_new_tokens=new, min_new_tokens=new, top_k=0, pad_token_id=0, eos_token_id=2
    )
    mask = torch.ones_like(ids)
    outputs = {}

    def job(kind: str) -> None:
        torch.manual_seed(0)
        with shared_prompts(model) if kind == "shared" else nullcontext():
            outputs[kind] = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)

    best = minima({kind: timed(lambda k=kind: job(k)) for kind in ("plain", "shared")}, repeats)
    return {
        "work": name,
        **{f"{kind} s": seconds for kind, seconds in best.items()},
        "plain / shared": best["plain"] / best["shared"],
        "tokens that differ": int((outputs["plain"] != outputs["shared"]).sum()),
    }


def evaluate(name: str, folder: Path, new: int) -> Row:
    """`gvpo eval`'s sampling, and the same in the data's order without anything shared."""
    rng = random.Random(0)
    words = [round(12 * 25 ** (i / 7)) for i in range(8)]  # of the prompts, 12 to 300
    rng.shuffle(words)
    texts = [" ".join(rng.choices(["cat", "dog", "mat", "sun"], k=n)) for n in words]
    prompts = Dataset.from_dict({"prompt": texts, "answer": [""] * 8})
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    options = SamplingOptions(1.0, 1.0, new)
    sampler = TransformersSampler(str(folder), tokenizer, options, chat=False)
    sampler.generation.min_new_tokens = new

    def shared() -> None:
        settings = Settings(model=name, data="words", samples=8, sampling=options)
        with TemporaryDirectory() as aside:
            sample_all(settings, prompts, RunDirectory(aside), lambda: sampler)

    def plain() -> None:
        rows = [text for text in texts for _ in range(8)]
        with patch.object(generation, "shared_prompts", lambda model: nullcontext()):
            for start in range(0, len(rows), 32):
                sampler.sample(rows[start : start + 32], start)

    best = minima({"plain": timed(plain), "shared": timed(shared)}, 0)
    times = {f"{kind} s": seconds for kind, seconds in best.items()}
    return {"work": name, **times, "plain / shared": best["plain"] / best["shared"]}


def run(small: bool, repeats: int = 8) -> list[Row]:
    if small:
        tiny = Workload(vocabulary=17, hidden=16, layers=1, max_length=32)
        return [compare("tiny", 2, 5, 3, tiny, 1)]
    rows = [compare(name, *work, repeats) for name, work in WORK.items()]
    try:
        return [*rows, evaluate("gvpo eval: SmolLM2-135M, 64 samples of 16 tokens", smollm2(), 16)]
    except InputError:  # neither the Hub nor the package
        return rows
