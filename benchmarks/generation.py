"""Generation with each distinct prompt read once, against `model.generate` as it is."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from transformers import GenerationConfig

from benchmarks.measure import Row, minima, timed
from benchmarks.workloads import GROUP, Workload
from gvpo.model.generation import shared_prompts

ABOUT = (
    "CPU seconds of sampling with transformers, groups of 8, one thread. plain: model.generate. shared: the "
    "same with each distinct prompt prefilled once and its cache repeated (gvpo.model.generation)."
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


def run(small: bool, repeats: int = 8) -> list[Row]:
    if small:
        tiny = Workload(vocabulary=17, hidden=16, layers=1, max_length=32)
        return [compare("tiny", 2, 5, 3, tiny, 1)]
    return [compare(name, *work, repeats) for name, work in WORK.items()]
