"""Our update on the device against literal autograd of the formula in float64, row by row, on small models.

Beside each error stands that of torch itself: the same literal autograd in the case's own precision. Half
precision has no other yardstick, for its rounding alone makes errors of percents.
"""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from benchmarks.gpu import Part
from benchmarks.measure import Row
from gvpo import gvpo_weights
from gvpo.batch import GroupBatch
from gvpo.model.fused_head import LogitTransform, WeightedNLL, chunked_logps, widens
from gvpo.step import Backend, GVPOStep
from gvpo.trl.rollouts import select
from tests.models import gradients, literal_gradient, random_batch, relative_error, tiny_model

ABOUT = (
    "error: relative, of the gradient, against literal autograd in float64 of the same weights. torch: "
    "that of literal autograd in the case's own precision. The limit is 1.3 times torch's own, 1e-5 at "
    "least. What has no error of torch's is the difference between two of our own updates. "
    "Qwen2-like models (4 layers, 256 wide, vocabulary 8,192), 24 responses of 6 prompts."
)
BETA = 0.1
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # which deterministic algorithms ask for
SIZES: dict[str, Any] = {
    "vocab_size": 8192,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "head_dim": 64,
    "max_position_embeddings": 512,
    "initializer_range": 0.05,
}
TINY: dict[str, Any] = {"vocab_size": 97, "hidden_size": 64, "num_hidden_layers": 2, "head_dim": 16}
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


class Mixed(Backend):
    """Autocast, and for float16 a loss scaler, as an engine would have them."""

    def __init__(self, device: str, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.device, self.dtype = device, dtype
        self.scale = 2.0**12 if dtype is FP16 else 1.0

    def forward_context(self) -> AbstractContextManager:
        return nullcontext() if self.dtype is None else torch.autocast(self.device, self.dtype)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        (loss * self.scale).backward()


@dataclass(frozen=True)
class Case:
    """A model, how it is run, and how the step's rows are cut."""

    name: str
    kind: str = "untied"  # of `tests.models.tiny_model`
    dtype: torch.dtype = BF16
    autocast: torch.dtype | None = None
    reference: bool = False
    share: bool = True
    budget: int = 2000
    tile_bytes: int | None = None
    float32_head: bool = False
    checkpointing: bool = False
    lora: bool = False
    products: str = "highest"  # "high" is TensorFloat32, which transformers turns on for float32 training

    def model(self, device: str, tiny: bool) -> Any:
        made = tiny_model(self.kind, **{**SIZES, **(TINY if tiny else {})}).to(device)
        for parameter in made.parameters():  # `to` would round the rotary embedding's buffers, too
            parameter.data = parameter.data.to(self.dtype)
        if self.lora:
            adapter = LoraConfig(r=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
            made = get_peft_model(made, adapter, autocast_adapter_dtype=False)
        if self.checkpointing:
            made.gradient_checkpointing_enable({"use_reentrant": False})
        return made.train()

    def update(
        self, model: Any, batch: GroupBatch, device: str, **changes: Any
    ) -> tuple[dict[str, Tensor], str]:
        """Our gradient on a copy of the model, and how prompts were shared."""
        case, model = replace(self, **changes), copy.deepcopy(model)
        backend = Mixed(device, case.autocast)
        step = GVPOStep(
            model,
            beta=BETA,
            token_budget=case.budget,
            backend=backend,
            share_prompts=case.share,
            float32_head=case.float32_head,
        )
        step.scorer.tile_bytes = case.tile_bytes
        # Small models are not worth it on a GPU, where sharing costs calls.
        with patch("gvpo.scoring.prompt_cost", lambda model: 0.0), precision(case.products):
            report = step(batch)
        way = step._way if report.shared_prompts else "whole"
        head = "fused" if step.scorer.fused else "own logits"
        return {n: g.double() / backend.scale for n, g in gradients(model).items()}, f"{head}, {way} prompts"

    def literal(self, model: Any, batch: GroupBatch, device: str) -> dict[str, Tensor]:
        with Mixed(device, self.autocast).forward_context(), precision(self.products):
            return literal_gradient(copy.deepcopy(model), batch, BETA)[0]


@contextmanager
def precision(products: str) -> Iterator[None]:
    """Of products in float32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(products)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


CASES = [
    Case("float32, reference is the policy", dtype=FP32),
    Case("float32, scored", dtype=FP32, reference=True),
    Case("float32, soft caps and a window", kind="softcap", dtype=FP32, reference=True),
    Case("TensorFloat32, scored", dtype=FP32, reference=True, products="high"),
    Case("bfloat16, reference is the policy"),
    Case("bfloat16, scored", reference=True),
    Case("bfloat16, whole rows", share=False),
    Case("bfloat16, tied head", kind="llama"),
    Case("bfloat16, biases (Qwen2)", kind="qwen2"),
    Case("bfloat16, soft caps and a window", kind="softcap"),
    Case("bfloat16, many tiles", tile_bytes=4 * 8192 * 16),
    Case("bfloat16, head in float32", float32_head=True),
    Case("bfloat16, checkpointed", checkpointing=True),
    Case("bfloat16, LoRA", lora=True),
    Case("bfloat16, LoRA, checkpointed", lora=True, checkpointing=True),
    Case("autocast to bfloat16", dtype=FP32, autocast=BF16),
    Case("autocast to bfloat16, scored", dtype=FP32, autocast=BF16, reference=True),
    Case("autocast to float16, scaled loss", dtype=FP32, autocast=FP16),
    Case("autocast to float16, tied head, checkpointed", "llama", FP32, FP16, checkpointing=True),
]


def work(reference: bool, device: str, tiny: bool) -> GroupBatch:
    """Ragged rows whose prompts are worth sharing."""
    sizes = {"groups": 3, "k": 3} if tiny else {"groups": 6, "k": 4}
    batch = random_batch(**sizes, reference=reference, prompt=(30, 90))
    return replace(batch, **{n: v.to(device) for n, v in vars(batch).items() if v is not None})


def judged(error: float, torch_s: float | None, limit: float, **others: Any) -> Row:
    return {"error": error, "torch": torch_s, "limit": limit, "within": error <= limit, **others}


def outcome(case: Case, device: str, tiny: bool = False) -> Row:
    """How far our update is from the formula, and torch's own."""
    model, batch = case.model(device, tiny), work(case.reference, device, tiny)
    expected, _ = literal_gradient(copy.deepcopy(model).double(), batch, BETA)
    own = relative_error(case.literal(model, batch, device), expected)
    got, way = case.update(model, batch, device)
    return judged(relative_error(got, expected), own, max(1e-5, 1.3 * own), way=way)


def invariance(dtype: torch.dtype, device: str, tiny: bool = False) -> list[tuple[str, Callable[[], Row]]]:
    """Differences between two of our own updates, of the same rows in other cuts, orders and padding."""
    case = Case("", dtype=dtype, reference=True)
    model, batch = case.model(device, tiny), work(True, device, tiny)
    first, _ = case.update(model, batch, device)
    expected, _ = literal_gradient(copy.deepcopy(model).double(), batch, BETA)
    limit = max(1e-5, 1.3 * relative_error(case.literal(model, batch, device), expected))
    noise = torch.randint(3, 60, (len(batch), 64), device=device)
    wide = torch.cat([batch.input_ids, noise], 1), torch.cat([batch.completion_mask, noise < 0], 1)
    padded = replace(batch, input_ids=wide[0], completion_mask=wide[1])
    shuffled = select(
        batch, torch.randperm(len(batch), generator=torch.Generator().manual_seed(1)).to(device)
    )
    name = str(dtype).removeprefix("torch.")
    ways: dict[str, tuple[GroupBatch, dict[str, Any]]] = {
        "made twice": (batch, {}),
        "a row at a time": (batch, {"budget": 1}),
        "in another order": (shuffled, {}),
        "padded with noise": (padded, {}),
        "prompts shared or not": (batch, {"share": False}),
    }

    def difference(rows: GroupBatch, changes: dict[str, Any]) -> Row:
        got, way = case.update(model, rows, device, **changes)
        return judged(relative_error(got, first), None, limit, way=way)

    def repeated() -> Row:
        torch.use_deterministic_algorithms(True)
        try:
            (one, _), (other, way) = (case.update(model, batch, device) for _ in range(2))
        finally:
            torch.use_deterministic_algorithms(False)
        return judged(relative_error(other, one), None, 0.0, way=way)

    return [(f"{name}, made twice by deterministic algorithms", repeated)] + [
        (f"{name}, {what}", lambda rows=rows, changes=changes: difference(rows, changes))
        for what, (rows, changes) in ways.items()
    ]


def statistics(device: str) -> Row:
    """Weights against those that the CPU computes."""
    generator = torch.Generator().manual_seed(0)
    policy, reference, rewards = torch.randn(3, 4096, generator=generator, dtype=torch.float64)
    ids = torch.randint(512, (4096,), generator=generator)
    expected = gvpo_weights(policy, reference, rewards, ids)
    got = gvpo_weights(*(x.to(device) for x in (policy, reference, rewards, ids)))
    error = ((got.cpu() - expected).norm() / expected.norm()).item()
    return judged(error, None, 1e-12, way="float64")


def head(device: str, dtype: torch.dtype, softcap: float | None = None, tile: int = 48) -> Row:
    """The fused head alone, gradients of hidden states and weights together, against autograd in float64."""
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(200, 256, generator=generator).to(device, dtype).requires_grad_()
    w = (torch.randn(8192, 256, generator=generator) / 8).to(device, dtype).requires_grad_()
    targets = torch.randint(8192, (200,), generator=generator).to(device)
    weights = torch.randn(200, generator=generator).to(device)
    transform = LogitTransform(0.7, softcap=softcap)

    def literal(h: Tensor, w: Tensor) -> dict[str, Tensor]:
        logits = h @ w.t()
        logits = (logits if softcap is None else softcap * (logits / softcap).tanh()) / 0.7
        logps = logits.to(torch.promote_types(logits.dtype, FP32)).log_softmax(-1)
        chosen = logps.gather(1, targets[:, None])[:, 0]
        return dict(zip("hw", torch.autograd.grad(-(chosen * weights.to(chosen)).sum(), (h, w)), strict=True))

    wide = [x.detach().double().requires_grad_() for x in (h, w)]
    expected = literal(*wide)
    nll, logps, _ = WeightedNLL.apply(h, w, None, targets, weights, transform, tile, None)
    got = dict(zip("hw", torch.autograd.grad(nll, (h, w)), strict=True))
    torch.testing.assert_close(
        logps, chunked_logps(h, w, None, targets, transform, 200), rtol=1e-3, atol=1e-3
    )
    own = relative_error(literal(h, w), expected)
    products = "float32" if widens(h.device, dtype) or dtype is FP32 else "rounded"
    return judged(relative_error(got, expected), own, max(1e-5, 1.3 * own), way=f"products {products}")


def run(part: Part) -> None:
    device = part.device
    jobs: list[tuple[str, Callable[[], Row]]] = [("weights, against the CPU's", lambda: statistics(device))]
    for dtype in (FP32, BF16, FP16):
        name = str(dtype).removeprefix("torch.")
        jobs.append((f"head alone, {name}", lambda dtype=dtype: head(device, dtype)))
        jobs.append((f"head alone, {name}, soft cap", lambda dtype=dtype: head(device, dtype, softcap=5.0)))
    jobs += [(case.name, lambda case=case: outcome(case, device, part.tiny)) for case in CASES]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, job in jobs:
            part.attempt({"case": name}, job)
        for dtype in (FP32, BF16):
            with part.surviving({"case": f"{dtype}, cuts, orders and padding"}):
                for name, job in invariance(dtype, device, part.tiny):
                    part.attempt({"case": name}, job)
    wrong = [row["case"] for row in part.rows if not row.get("within")]
    assert not wrong, f"beyond their limit, or not finished: {'; '.join(wrong)}"
