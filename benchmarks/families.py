"""Which models are exact, and by which way: families of transformers × adapters, against literal autograd.

Each is tiny, random, in float64 and in train mode, with every noise that its configuration knows set to 0.1;
the formula is differentiated on its own logits in evaluation mode, a row at a time.
"""

from __future__ import annotations

import copy
import re
import warnings
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from benchmarks.measure import Row
from gvpo.errors import InputError
from gvpo.step import GVPOStep
from tests.models import gradients, literal_gradient, random_batch, relative_error

ABOUT = "way to the log-probabilities, and error of the gradient relative to literal autograd in float64."
BETA, TEMPERATURE = 0.4, 0.7
ADAPTERS = ("bare", "LoRA", "DoRA", "LoRA on the head", "DoRA on the head")

_SIZES: dict[str, Any] = {
    "vocab_size": 67,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
}
_GQA = {"num_key_value_heads": 2, "intermediate_size": 48}
_MOE = {**_GQA, "num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2}
_ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
# Where PEFT does not take "all-linear": experts that are one tensor, and Mamba's kernels.
_TARGETS = {
    **dict.fromkeys(
        ("phimoe", "mixtral", "qwen3_moe", "olmoe", "gpt_oss", "jamba", "qwen3_next"), _ATTENTION
    ),
    "deepseek_v3": ["q_a_proj", "q_b_proj", "o_proj"],
    "mamba": ["in_proj", "x_proj"],
    "mamba2": ["in_proj"],
    "falcon_h1": [*_ATTENTION, "in_proj", "gate_proj"],
}
_MAMBA2 = {"head_dim": 8, "num_heads": 8, "state_size": 8, "n_groups": 2, "chunk_size": 16}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("llama", _GQA),
    "Mistral, sliding window": ("mistral", {**_GQA, "sliding_window": 8}),
    "Qwen2, tied": ("qwen2", {**_GQA, "tie_word_embeddings": True}),
    "Qwen3": ("qwen3", {**_GQA, "head_dim": 8}),
    "Gemma": ("gemma", {**_GQA, "head_dim": 8}),
    "Gemma 2": ("gemma2", {**_GQA, "head_dim": 8, "sliding_window": 8, "final_logit_softcapping": 5.0}),
    "Gemma 3": ("gemma3_text", {**_GQA, "head_dim": 8, "sliding_window": 8, "final_logit_softcapping": 5.0}),
    "Cohere": ("cohere", {**_GQA, "logit_scale": 0.25}),
    "Cohere 2": ("cohere2", {**_GQA, "logit_scale": 0.25, "sliding_window": 8}),
    "Granite": ("granite", {**_GQA, "logits_scaling": 3.0}),
    "Granite MoE": ("granitemoe", {**_MOE, "logits_scaling": 3.0}),
    "Phi-3": ("phi3", _GQA),
    "Phi-MoE": ("phimoe", {**_MOE, "lm_head_bias": True}),
    "Mixtral": ("mixtral", _MOE),
    "Qwen3-MoE": ("qwen3_moe", {**_MOE, "moe_intermediate_size": 24, "head_dim": 8}),
    "OLMoE": ("olmoe", _MOE),
    "DeepSeek-V3": (
        "deepseek_v3",
        {
            **_MOE, "num_key_value_heads": 4, "moe_intermediate_size": 24, "n_routed_experts": 4,
            "n_group": 2, "topk_group": 1, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 8, "v_head_dim": 8, "first_k_dense_replace": 1,
        },
    ),
    "GPT-OSS": ("gpt_oss", {**_MOE, "head_dim": 8, "sliding_window": 8}),
    "RecurrentGemma": (
        "recurrent_gemma",
        {**_GQA, "num_hidden_layers": 3, "lru_width": 32, "logits_soft_cap": 5.0, "attention_window_size": 8},
    ),
    "Mamba": ("mamba", {"state_size": 8, "time_step_rank": 4}),
    "Mamba 2": ("mamba2", _MAMBA2),
    "Falcon-H1": (
        "falcon_h1",
        {
            **_GQA, "lm_head_multiplier": 0.3, "mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8,
            "mamba_n_groups": 2, "mamba_d_state": 8, "mamba_chunk_size": 16,
        },
    ),
    "xLSTM": (
        "xlstm",
        {"num_heads": 4, "num_blocks": 2, "output_logit_soft_cap": 5.0, "mlstm_round_up_to_multiple_of": 8},
    ),
    "HyperCLOVA X": ("hyperclovax", {**_GQA, "logits_scaling": 3.0}),
    "nanochat": ("nanochat", {**_GQA, "final_logit_softcapping": 5.0}),
    "GPT": ("openai-gpt", {}),
    "CTRL": ("ctrl", {"dff": 48}),
    "MPT": ("mpt", {}),
    "BioGPT": ("biogpt", {"intermediate_size": 48}),
    "ModernBERT decoder": ("modernbert-decoder", {"intermediate_size": 48}),
    "Nemotron": ("nemotron", _GQA),
    "Jamba": (
        "jamba",
        {
            **_MOE, "mamba_d_state": 8, "mamba_dt_rank": 4, "attn_layer_period": 2, "attn_layer_offset": 1,
            "use_mamba_kernels": False,
        },
    ),
    "LFM2": ("lfm2", {**_GQA, "layer_types": ["conv", "full_attention"]}),
    "Qwen3-Next": (
        "qwen3_next",
        {
            **_MOE, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24, "head_dim": 8,
            "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
            "linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"],
        },
    ),
    "Gemma 3n": (
        "gemma3n_text",
        {
            **_GQA, "head_dim": 8, "num_kv_shared_layers": 0, "intermediate_size": [48, 48],
            "layer_types": ["sliding_attention", "full_attention"], "activation_sparsity_pattern": [0.0, 0.0],
            "vocab_size_per_layer_input": 67, "hidden_size_per_layer_input": 8, "laurel_rank": 4,
        },
    ),
    "GPT-2": ("gpt2", {}),
    "GPT-J": ("gptj", {"rotary_dim": 4}),
    "GPT-NeoX": ("gpt_neox", {"intermediate_size": 48}),
    "OPT": ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 16}),
    "Bloom": ("bloom", {}),
    "Falcon": ("falcon", {"alibi": False}),
    "StableLM": ("stablelm", {**_GQA, "use_qkv_bias": True}),
    "OLMo": ("olmo", _GQA),
    "OLMo 2": ("olmo2", _GQA),
    "StarCoder2": ("starcoder2", _GQA),
    "XGLM": ("xglm", {"d_model": 32, "ffn_dim": 48, "attention_heads": 4, "num_layers": 2}),
    "BERT, not causal": ("bert", {"intermediate_size": 48}),
    "RWKV, rescale_every=0": ("rwkv", {"attention_hidden_size": 32, "rescale_every": 0}),
}  # fmt: skip


def build(family: str, adapter: str) -> PreTrainedModel:
    """A family's model in train mode and float64, its noise on, its adapters away from the identity."""
    torch.manual_seed(0)
    model_type, sizes = FAMILIES[family]
    config = AutoConfig.for_model(model_type, **{**_SIZES, **sizes})
    for name, value in vars(config).items():
        if re.search("drop|jitter|noise", name) and isinstance(value, float):
            setattr(config, name, 0.1)
    config.use_cache = False
    config._experts_implementation = "eager"  # the others know no float64
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64)
    if adapter != "bare":
        head = next(n for n, m in model.named_modules() if m is model.get_output_embeddings())
        on_head, of_type = [head.rpartition(".")[2]], _TARGETS.get(config.model_type, "all-linear")
        lora = LoraConfig(
            r=4,
            lora_dropout=0.1,
            use_dora="DoRA" in adapter,
            target_modules=on_head if "head" in adapter else of_type,
        )
        model = get_peft_model(model, lora, autocast_adapter_dtype=False)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.2)
    return model.train()


def outcome(family: str, adapter: str) -> tuple[str, float]:
    """How the update of a family with an adapter is made, and its relative error (NaN if refused)."""
    model, batch = build(family, adapter), random_batch(groups=2, k=3, reference=True, equal_groups=0)
    expected, _ = literal_gradient(copy.deepcopy(model).eval(), batch, BETA, TEMPERATURE)
    step = GVPOStep(model, beta=BETA, temperature=TEMPERATURE, token_budget=90)
    try:
        step(batch)
    except InputError as refusal:
        return f"refused: {refusal}", float("nan")
    return ("fused" if step.scorer.fused else "own logits"), relative_error(gradients(model), expected)


def run(tiny: bool) -> list[Row]:
    rows = []
    for family in list(FAMILIES)[:: 12 if tiny else 1]:
        row: Row = {"family": family}
        for adapter in ADAPTERS:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                way, error = outcome(family, adapter)
            row[adapter] = "refused" if way.startswith("refused") else f"{way}, {error:.0e}"
        rows.append(row)
    return rows
