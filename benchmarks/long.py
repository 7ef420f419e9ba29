"""Memory of a whole step on sequences of 8,192 tokens, at several sizes of the vocabulary."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.measure import Row, in_fresh_process, peak_of
from gvpo.batch import GroupBatch
from gvpo.step import GVPOStep

ABOUT = (
    "MiB by which a GVPO step (scoring and gradient; not the first) on a group of two responses raises the "
    "memory of a fresh process at its peak; hidden size 32, 2 layers, float32, one thread, micro-batches of "
    "a row. matrices: gradients of head and embedding, which any method makes. logits: of one row, if kept."
)
TOKENS, PROMPT, HIDDEN = 8192, 512, 32


def peak(vocabulary: int, tokens: int, prompt: int) -> float:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=HIDDEN, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=tokens, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    step = GVPOStep(model, beta=0.1, token_budget=tokens)
    step(_batch(vocabulary, 48, 8))  # the check at first use makes logits of a few tokens, once
    model.zero_grad()
    batch = _batch(vocabulary, tokens, prompt)
    return peak_of(lambda: step(batch))


def _batch(vocabulary: int, tokens: int, prompt: int) -> GroupBatch:
    words = torch.randint(3, vocabulary, (3, tokens)).tolist()
    batch = GroupBatch.from_tokens(
        [words[0][:prompt]] * 2, [row[prompt:] for row in words[1:]], [1.0, 0.0], [0, 0]
    )
    batch.reference_logps = torch.full((2,), -10.0 * tokens)
    return batch


def run(small: bool) -> list[Row]:
    rows: list[Row] = []
    for vocabulary in (97, 131) if small else (32_000, 152_000):
        tokens, prompt = (64, 8) if small else (TOKENS, PROMPT)
        used = (
            peak(vocabulary, tokens, prompt) if small else in_fresh_process(peak, vocabulary, tokens, prompt)
        )
        matrices = 2 * vocabulary * HIDDEN * 4 / 2**20
        rows.append(
            {
                "vocabulary": vocabulary,
                "peak MiB": used,
                "matrices MiB": matrices,
                "the rest MiB": used - matrices,
                "logits MiB": tokens * vocabulary * 4 / 2**20,
            }
        )
    return rows
