"""The work that steps are compared on: models, responses, rewards, and trainers that hold them."""

from __future__ import annotations

import random
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import trl.trainer.utils
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer

from benchmarks.measure import Laps, clock, laps_of
from gvpo.batch import GroupBatch
from gvpo.model.micro_batch import MicroBatch
from gvpo.model.shared_prompts import start_cost
from gvpo.packing import plan_micro_batches
from gvpo.step import GVPOStep, StepReport
from gvpo.trl import GVPOConfig, GVPOTrainer
from gvpo.trl.rollouts import Slice, window_batch

GROUP = 8  # responses a prompt
PER_DEVICE = 8  # rows of a micro-batch of TRL
EOS = 2


@dataclass(frozen=True)
class Workload:
    """An optimizer step's responses and the model that scores them.

    Attributes:
        heavy_tail: completion lengths are log-normal (σ = 1, mean 64, 4 to 256 tokens) after prompts of 16
            to 32 tokens, or else all 64 after prompts of 16.
        prompt_length: tokens of all prompts, if they are to be alike.
        zero_groups: share of groups whose rewards are all equal.
    """

    vocabulary: int = 32_000
    hidden: int = 256
    heavy_tail: bool = True
    zero_groups: float = 0.0
    rows: int = 64
    layers: int = 4
    mean_length: int = 64
    max_length: int = 256
    prompt_length: int | None = None
    seed: int = 0

    def model(self) -> LlamaForCausalLM:
        torch.manual_seed(self.seed)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=self.vocabulary,
                hidden_size=self.hidden,
                intermediate_size=4 * self.hidden,
                num_hidden_layers=self.layers,
                num_attention_heads=4,
                num_key_value_heads=4,
                max_position_embeddings=4 * self.max_length + (self.prompt_length or 0),
                tie_word_embeddings=True,
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=EOS,
            )
        )

    def completions(self) -> list[list[int]]:
        rng = random.Random(self.seed)
        lengths = torch.full((self.rows,), float(self.mean_length))
        if self.heavy_tail:
            tail = torch.randn(self.rows, generator=torch.Generator().manual_seed(self.seed)).exp()
            lengths = (tail / tail.mean() * self.mean_length).round().clamp(4, self.max_length)
        return [[*(rng.randrange(4, self.vocabulary) for _ in range(int(n) - 1)), EOS] for n in lengths]

    def rewards(self) -> list[float]:
        generator = torch.Generator().manual_seed(self.seed + 5)
        rewards = (torch.rand(self.rows, generator=generator) * 3).round(decimals=1).view(-1, GROUP)
        equal = torch.randperm(len(rewards), generator=generator)[: round(len(rewards) * self.zero_groups)]
        rewards[equal] = 0.1
        return rewards.flatten().tolist()

    def prompts(self) -> list[str]:
        rng = random.Random(self.seed)
        count = max(64, self.rows)
        lengths = [rng.randint(16, 32) if self.heavy_tail else 16 for _ in range(count)]
        lengths = [self.prompt_length or length for length in lengths]
        return [" ".join(str(rng.randrange(4, 64)) for _ in range(n)) for n in lengths]

    def batch(self) -> GroupBatch:
        """The responses as a step takes them."""
        prompts = [[int(word) for word in prompt.split()] for prompt in self.prompts()]
        groups = [row // GROUP for row in range(self.rows)]
        return GroupBatch.from_tokens(
            [prompts[group] for group in groups], self.completions(), self.rewards(), groups
        )


def _tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<bos>", "<eos>", "<unk>", *map(str, range(4, 64))]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )


class _Canned:
    """Completions and rewards are given, so that what is left to time is the update."""

    workload: Workload
    outside = 0.0  # seconds in generation, rewards and what TRL does with them
    tokens = 0  # that went through the model, padding included

    def _generate_single_turn(self, prompt_ids: list[list[int]], *_: Any, **__: Any) -> Any:
        return self.workload.completions(), None

    def _generate_and_score_completions(self, *args: Any) -> Any:
        started = clock()
        result = super()._generate_and_score_completions(*args)  # type: ignore[misc]
        self.outside += clock() - started
        return result


class _KeptReport(GVPOStep):
    report: StepReport

    def __call__(self, batch: GroupBatch) -> StepReport:
        self.report = super().__call__(batch)
        return self.report


class CannedGVPO(_Canned, GVPOTrainer):
    def _make_scoring(self) -> None:
        super()._make_scoring()
        self._gvpo_step.__class__ = _KeptReport

    @property
    def report(self) -> StepReport:
        """Of the last update."""
        return self._gvpo_step.report


class CannedGRPO(_Canned, GRPOTrainer):
    compact = False

    def _compute_loss(self, model: Any, inputs: Any) -> Any:
        self.tokens += inputs["prompt_ids"].numel() + inputs["completion_ids"].numel()
        with compact_head() if self.compact else warnings.catch_warnings():
            return super()._compute_loss(model, inputs)


class CannedCompactGRPO(CannedGRPO):
    """TRL whose head scores the completion's positions only, as it does where it has Triton."""

    compact = True


@contextmanager
def compact_head() -> Iterator[None]:
    """Force the compact (chunked) head of TRL 1.16, which it takes on GPUs only."""
    before = trl.trainer.utils._use_triton
    trl.trainer.utils._use_triton = lambda device: True
    try:
        yield
    finally:
        trl.trainer.utils._use_triton = before


TRAINERS: dict[str, type] = {"gvpo": CannedGVPO, "trl": CannedGRPO, "trl, compact head": CannedCompactGRPO}


def trainer(kind: str, work: Workload, **changes: Any) -> Any:
    """A trainer that stands before an optimizer step on `work`, with a model of its own."""
    cls = TRAINERS[kind]
    config = GVPOConfig if issubclass(cls, GVPOTrainer) else GRPOConfig
    rewards = work.rewards()
    settings = {
        "output_dir": tempfile.mkdtemp(),
        "per_device_train_batch_size": PER_DEVICE,
        "gradient_accumulation_steps": work.rows // PER_DEVICE,
        "num_generations": GROUP,
        "max_completion_length": work.max_length,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = type(cls.__name__, (cls,), {"workload": work})(
            work.model(),
            lambda completions, **_: rewards,
            config(**{**settings, **changes}),
            train_dataset=Dataset.from_dict({"prompt": work.prompts()}),
            processing_class=_tokenizer(),
        )
    made.optimizer = None
    made.model_wrapped = made.model
    made.current_gradient_accumulation_steps = made.args.gradient_accumulation_steps
    made.batch = next(iter(made.get_train_dataloader()))
    return made


def update(of: CannedGVPO) -> list[float]:
    """Seconds of one optimizer step's gradient, without generation, rewards and the optimizer.

    The last entries are the step's micro-batches and what follows them.
    """
    before = _calls(of, of.args.gradient_accumulation_steps - 1)
    laps = laps_of(of._gvpo_step)
    of.accelerator.gradient_state._set_sync_gradients(True)
    of.training_step(of.model, of.batch)
    laps()
    return before + laps.seconds


def micro_steps(of: CannedGRPO, calls: int | None = None) -> list[float]:
    """Seconds of one optimizer step of TRL: its number of micro-steps times the fastest of them.

    They are all padded alike and do the same work.
    """
    every = of.args.gradient_accumulation_steps
    return [min(_calls(of, calls or every))] * every


def _calls(of: Any, count: int) -> list[float]:
    of.model.zero_grad(set_to_none=True)
    of.tokens = 0
    seconds = []
    for _ in range(count):
        of.outside = 0.0
        of.accelerator.gradient_state._set_sync_gradients(False)
        started = clock()
        of.training_step(of.model, of.batch, None)
        seconds.append(clock() - started - of.outside)
    return seconds


def rollout(of: CannedGVPO) -> GroupBatch:
    """The rows of the optimizer step that a GVPO trainer stands before."""
    of.accelerator.gradient_state._set_sync_gradients(False)
    of.model.train()
    batch = of._generate_and_score_completions(of.batch)
    return window_batch([Slice(batch, 0)], on_policy=True)


def floor(
    model: LlamaForCausalLM, batch: GroupBatch, weights: torch.Tensor, token_budget: int
) -> Callable[[], list[float]]:
    """Weighted fine-tuning on exactly the rows that have weight: torch's cross-entropy on the positions
    that count, in the same packed micro-batches. What no group-based update with this head can undercut."""
    lengths = batch.lengths.tolist()
    plan = plan_micro_batches(lengths, weights.nonzero()[:, 0].tolist(), token_budget, start_cost(model))
    micros = [MicroBatch.of(batch, rows, lengths) for rows in plan]
    parts = [
        (m.input_ids[:, :-1], m.chosen[:, 1:], m.input_ids[:, 1:][m.chosen[:, 1:]], m.per_token(weights))
        for m in micros
    ]

    def run() -> list[float]:
        laps = Laps()
        model.zero_grad(set_to_none=True)
        for input_ids, chosen, targets, token_weights in parts:
            hidden = model.model(input_ids=input_ids, use_cache=False).last_hidden_state[chosen]
            nll = F.cross_entropy(hidden @ model.lm_head.weight.t(), targets, reduction="none")
            (nll * token_weights.float()).sum().backward()
            laps()
        return laps.seconds

    return run
