"""`gvpo train --plan`: what each phase of training will need of memory, before anything is loaded.

The model is built of tensors without contents (torch's fake tensors), so that a plan for 70B takes a laptop.
Activations are counted, not guessed: a forward of two lengths, with all that autograd keeps summed. It is
an upper estimate: attention of such tensors keeps a mask and repeated keys that a real one does without.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Column, Table
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM
from trl import get_peft_config

from gvpo.errors import refused
from gvpo.model.determinism import without_noise
from gvpo.model.fused_head import tile_bytes
from gvpo.trl.arguments import TrainArguments

# Bytes that an optimizer keeps for each trained parameter, in units of the parameter's own size or in bytes.
_STATES: dict[str, tuple[float, float]] = {
    "adamw_torch": (2, 0), "adamw_torch_fused": (2, 0), "adamw_8bit": (0, 2), "adamw_bnb_8bit": (0, 2),
    "paged_adamw_32bit": (0, 0), "paged_adamw_8bit": (0, 0), "lion_8bit": (0, 1), "lion_32bit": (0, 4),
    "sgd": (0, 0), "adafactor": (0, 0), "rmsprop": (1, 0), "adagrad": (1, 0),
}  # fmt: skip
_SHORT, _LONG = 8, 16


@dataclass(frozen=True)
class Plan:
    """Bytes on one device, without sharding."""

    parameters: int  # of the policy
    reference: int  # the second copy of the weights, if there is one
    copies: int  # of float32 weights in bfloat16, which autocast keeps for the backward
    gradients: int  # of what is trained
    optimizer: int | None  # its state; None if unknown for this optimizer
    head: int  # the tile of logits and the sums of the gradients of head and embedding
    cache: int  # keys and values of a generation by transformers
    ahead: int  # the weights of another process that generates
    activation: int  # kept for the backward, per token of a micro-batch
    available: int  # free memory of the device

    @property
    def fixed(self) -> int:
        """What the update needs whatever the micro-batches."""
        known = self.parameters + self.reference + self.copies + self.gradients + self.head
        return known + (self.optimizer or 0)

    @property
    def largest_budget(self) -> int:
        """Tokens of the largest micro-batch that fits, with a tenth of the memory left for fragmentation."""
        return max(0, int((0.9 * self.available - self.fixed) / max(1, self.activation)))


def make_plan(arguments: TrainArguments) -> Plan:
    """Count what `gvpo train` would need with these arguments.

    Raises:
        InputError: the model's configuration cannot be loaded.
    """
    training, options = arguments.training, arguments.model
    name = options.model_name_or_path
    trust = bool(getattr(training, "trust_remote_code", False))
    what, advice = f"The configuration of {name} cannot be loaded", "check model_name_or_path"
    with refused(what, advice, (OSError, ValueError)):
        config = AutoConfig.from_pretrained(name, revision=options.model_revision, trust_remote_code=trust)
    wanted = None if options.dtype in (None, "auto") else getattr(torch, options.dtype)
    dtype = wanted or config.dtype or torch.float32
    peft = get_peft_config(options)
    inside = torch.bfloat16 if training.bf16 else dtype
    model = _skeleton(config, dtype, trust, peft)
    activation = _activation_bytes(
        _skeleton(config, inside, trust, peft), bool(training.gradient_checkpointing)
    )
    weights = sum(map(_bytes, model.parameters()))
    trained = [p for p in model.parameters() if p.requires_grad]  # adapters are float32 on any base
    count, size = (sum(f(p) for p in trained) for f in (torch.Tensor.numel, _bytes))
    second = weights if peft is None else 0
    relative, absolute = _STATES.get(str(getattr(training.optim, "value", training.optim)), (None, 0))
    text = config.get_text_config()
    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu and not training.use_cpu else "cpu")
    # Its gradient and that of an embedding of its own are summed in float32.
    sums = 0 if peft is not None else 1 if model.config.tie_word_embeddings else 2
    return Plan(
        parameters=weights,
        reference={"initial": second, "moving": size, "rollout": 0}[training.reference],
        copies=weights // 2 if training.bf16 and dtype == torch.float32 else 0,
        gradients=size,
        optimizer=None if relative is None else int(relative * size + absolute * count),
        head=2 * tile_bytes(device) + 4 * text.vocab_size * text.hidden_size * sums,
        cache=0 if training.use_vllm or training.offline is not None else _cache_bytes(text, training, dtype),
        ahead=weights if training.generate_ahead and training.generate_ahead_devices is None else 0,
        activation=activation,
        available=torch.cuda.mem_get_info()[0] if gpu else psutil.virtual_memory().available,
    )


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _skeleton(config: Any, dtype: torch.dtype, trust: bool, peft: Any) -> Any:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config, dtype=dtype, trust_remote_code=trust, attn_implementation="sdpa"
        )
    if peft is None:
        return model
    from peft import get_peft_model

    return get_peft_model(model, peft, low_cpu_mem_usage=True)


def _activation_bytes(model: Any, checkpointing: bool) -> int:
    """Bytes that autograd keeps for one more token, without the head (whose logits are never kept)."""
    body = getattr(model, "get_base_model", lambda: model)().base_model.train()
    if checkpointing:
        model.gradient_checkpointing_enable()
        if body is not model.base_model:
            model.enable_input_require_grads()

    def kept(length: int) -> int:
        seen: dict[int, int] = {}
        own = {tensor.untyped_storage()._cdata for tensor in held.values()}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                seen[storage._cdata] = storage.nbytes()
            alive.append(tensor)  # or its address might be used again
            return tensor

        alive: list[torch.Tensor] = []
        inputs = {"input_ids": torch.zeros(1, length, dtype=torch.long), "use_cache": False}
        with without_noise(body), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            torch.func.functional_call(body, held, kwargs=inputs)
        return sum(seen.values())

    # The meta device's own tensors do not tell their values, for which masks ask.
    with FakeTensorMode():
        held = {
            name: torch.empty(tensor.shape, dtype=tensor.dtype, requires_grad=tensor.requires_grad)
            for name, tensor in (*body.named_parameters(), *body.named_buffers())
        }
        return max(1, (kept(_LONG) - kept(_SHORT)) // (_LONG - _SHORT))


def _cache_bytes(text: Any, training: Any, dtype: torch.dtype) -> int:
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    rows = training.per_device_train_batch_size * training.steps_per_generation
    # The prompts' length is not known; completions are what grows.
    return 2 * text.num_hidden_layers * heads * width * dtype.itemsize * rows * training.max_completion_length


def show_plan(arguments: TrainArguments, console: Console) -> None:
    """Print the plan as a table and the largest `micro_batch_tokens` that fits."""
    plan, training = make_plan(arguments), arguments.training
    title = f"Memory of {arguments.model.model_name_or_path} on one device, without sharding"
    table = Table("phase", "what", Column("GiB", justify="right"), title=title)
    rows: list[tuple[str, str, int | None]] = [
        ("always", "parameters", plan.parameters),
        ("always", f"reference ({training.reference})", plan.reference),
        ("generation", "keys and values of the completions", plan.cache),
        ("generation", "weights of the process that generates ahead", plan.ahead),
        ("update", "weights in bfloat16 (autocast)", plan.copies),
        ("update", "gradients", plan.gradients),
        ("update", f"optimizer ({getattr(training.optim, 'value', training.optim)})", plan.optimizer),
        ("update", "head: logits in tiles and its gradient", plan.head),
        ("update", "activations of 1,000 tokens", 1000 * plan.activation),
        ("", "available now", plan.available),
    ]
    for phase, what, count in rows:
        table.add_row(phase, what, "unknown" if count is None else f"{count / 2**30:.3f}")
    console.print(table)
    advice = "The update does not fit: use LoRA (--use_peft), a narrower dtype, another optimizer, or shards."
    if budget := plan.largest_budget:
        advice = (
            f"Largest micro-batch that fits: --micro_batch_tokens {budget} (a tenth of the memory left free; "
            "no row may be longer)."
        )
    console.print(advice, soft_wrap=True)
