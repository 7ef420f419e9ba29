"""What becomes of each option of the installed `GRPOConfig`: `python -m benchmarks.options --write`.

Refusals and their reasons are those of `gvpo.trl.config`; what is said here of the others goes into
docs/migration.md. An option that TRL adds is in neither, and `tests/benchmarks/test_options.py` fails.
"""

from __future__ import annotations

import re
import sys
from dataclasses import fields
from pathlib import Path

from transformers import TrainingArguments
from trl import GRPOConfig

from gvpo.trl.config import REFUSED

PAGE = Path(__file__).parents[1] / "docs" / "migration.md"
_MARKS = re.compile(r"(<!--options-->\n).*?(<!--/options-->)", re.DOTALL)

# Taken, with something to say.
EXPLAINED: dict[str, str] = {
    "beta": "another quantity: the temperature of the implicit reward $\\beta\\log(\\pi/\\pi_\\text{ref})$, "
    "above 0 (default 0.1). GRPO's KL coefficient has no counterpart: KL control *is* β",
    "num_generations": "the same, k ≥ 2",
    "num_iterations steps_per_generation": "the same; reused batches want β of 0.2 to 0.5 with 0/1 rewards",
    "generation_batch_size": "the same; sizes by which an optimizer step would tear groups are refused",
    "pad_to_multiple_of": "without effect on the update: micro-batches are as long as their longest row",
    "top_p top_k min_p": "the same, with a warning where they narrow the sampler: the optimum is unique for "
    "samplers that can give every response",
    "vllm_structured_outputs_regex": "the same; the optimum is then that among the responses which match",
    "router_aux_loss_coef": "the balancing loss of the whole step; `None` is 0, not the model's own "
    "coefficient ([experts](engines/trl.md#mixtures-of-experts))",
    "mask_truncated_completions": "the same: truncated rows leave their group",
    "cast_lm_head_to_fp32": "the same, in the fused head too",
    "shuffle_dataset": "the same, also where [prompts are chosen](guide/dynamic.md) by GVPO",
}
# Taken as they are.
SAME = """
model_init_kwargs trust_remote_code num_generations_eval max_completion_length
ds3_gather_for_generation temperature generation_kwargs chat_template_kwargs repetition_penalty
cache_implementation use_vllm vllm_mode vllm_model_impl vllm_enable_sleep_mode vllm_server_base_url
vllm_server_host vllm_server_port vllm_server_timeout vllm_group_port vllm_gpu_memory_utilization
vllm_max_model_length vllm_tensor_parallel_size reward_weights max_tool_calling_iterations
log_completions log_multimodal num_completions_to_print log_unique_prompts log_completions_hub_repo
use_transformers_continuous_batching transformers_continuous_batching_config use_transformers_paged
""".split()  # noqa: SIM905


def explained() -> dict[str, str]:
    """What is said of each option that is not simply the same; refusals last."""
    given = {name: text for names, text in EXPLAINED.items() for name in names.split()}
    return given | {name: f"refused: {reason}" for name, reason in REFUSED.items()}


def unexplained(config: type[GRPOConfig] = GRPOConfig) -> list[str]:
    """TRL's own options that are neither taken, refused nor explained."""
    known = {field.name for field in fields(TrainingArguments)} | {*explained(), *SAME}
    return [field.name for field in fields(config) if field.name not in known]


def table() -> str:
    """Options with the same to say of them in one row."""
    there = {field.name for field in fields(GRPOConfig)}
    rows: dict[str, list[str]] = {}
    for name, text in [*explained().items(), *((name, "the same") for name in SAME)]:
        if name in there:
            rows.setdefault(text, []).append(f"`{name}`")
    rows["the same"].append("and the others of `TrainingArguments`")
    lines = [f"| {', '.join(names)} | {said} |\n" for said, names in rows.items()]
    return "| GRPO option | in GVPO |\n| --- | --- |\n" + "".join(lines)


def rewritten(page: str) -> str:
    """The page with the table of the installed TRL between its marks."""
    return _MARKS.sub(lambda match: match[1] + table() + match[2], page)


def main() -> None:
    if "--write" in sys.argv:
        PAGE.write_text(rewritten(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(table(), *(f"unexplained: {name}" for name in unexplained()), sep="\n")


if __name__ == "__main__":
    main()
