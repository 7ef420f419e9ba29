"""`GVPOTrainer`: TRL's `GRPOTrainer` with GVPO's update.

Generation, rewards, logging, checkpoints and the training loop are TRL's. What differs: groups stay whole
(TRL shuffles samples), and an optimizer step is one exact `gvpo.step.GVPOStep` over all its rows, made on
the call of `training_step` that ends its accumulation window.
"""

from __future__ import annotations

import copy
import functools
import math
import textwrap
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache
from torch import Tensor, nn
from transformers import PreTrainedModel
from trl.models.utils import prepare_deepspeed, prepare_fsdp
from trl.trainer.utils import use_adapter

from gvpo.batch import GroupBatch
from gvpo.errors import InputError, NonFiniteError
from gvpo.model.generation import share_prompts
from gvpo.model.logprobs import unwrap
from gvpo.step import GVPOStep, SequenceScorer, StepReport
from gvpo.trl import compat  # noqa: F401  (asserts TRL's private names)
from gvpo.trl.backend import AccelerateBackend
from gvpo.trl.checkpoints import Checkpoints
from gvpo.trl.config import GVPOConfig, check_size
from gvpo.trl.guard import Incidents, guard
from gvpo.trl.health import Health, Watch, tolerate_loggers
from gvpo.trl.memory import Portions
from gvpo.trl.offpolicy import OffPolicy, placeholder, unrewarded
from gvpo.trl.rollouts import Slice, split, window_batch


@contextmanager
def _temporarily(target: Any, **values: Any) -> Iterator[None]:
    before = {name: getattr(target, name) for name in values}
    for name, value in values.items():
        setattr(target, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(target, name, value)


class GVPOTrainer(Checkpoints):
    """Trains a causal language model with GVPO (arXiv 2504.19599) in TRL's `GRPOTrainer`.

    Arguments, data sets and reward functions are those of `trl.GRPOTrainer`, with a `GVPOConfig`.
    Logged besides TRL's metrics: `gvpo/…` of `gvpo.objective.GVPOLoss.metrics`; `loss` is the value of the
    formula before the update. `entropy` is that of the rows that have weight.

    Raises:
        InputError: a reward function that raises, returns the wrong number of values, or nothing but
            None/NaN for a whole generation; images (text models only).
    """

    # The policy's slices that wait for their step, and TRL's own counters.
    _current_train_step_time: float

    _tag_names = ["trl", "gvpo"]  # noqa: RUF012 (as in the parent)
    _name = "GVPO"
    _paper = {  # noqa: RUF012
        "title": "GVPO: Group Variance Policy Optimization for Large Language Model Post-Training",
        "id": "2504.19599",
        "citation": textwrap.dedent("""\
            @article{zhang2025gvpo,
                title   = {{GVPO: Group Variance Policy Optimization for Large Language Model Post-Training}},
                author  = {Zhang, Kaichen and Hong, Yuzhong and Bao, Junwei and Jiang, Hongfei and Song, Yang and Hong, Dingqian and Xiong, Hui},
                journal = {arXiv preprint arXiv:2504.19599},
                year    = 2025
            }"""),  # noqa: E501
    }

    def __init__(
        self,
        model: str | PreTrainedModel,
        reward_funcs: Any = None,
        args: GVPOConfig | None = None,
        *others: Any,
        **kwargs: Any,
    ) -> None:
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            args = GVPOConfig(f"{name.split('/')[-1]}-GVPO")
        if not isinstance(args, GVPOConfig):
            raise InputError(f"args is a {type(args).__name__}; GVPOTrainer needs a gvpo.trl.GVPOConfig.")
        self.incidents = Incidents()
        if reward_funcs is not None:
            funcs = reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]
            reward_funcs = [
                guard(
                    f,
                    self.incidents,
                    group=args.num_generations or 1,
                    timeout=args.reward_timeout,
                    worker=args.reward_worker,
                )
                for f in funcs
            ]
        adapters = hasattr(model, "peft_config") or kwargs.get("peft_config") is not None
        initial = args.reference == "initial"
        twin: nn.Module | None = None
        if initial and not isinstance(model, str) and not adapters:
            # Copied before TRL patches the forward, after which a copy would run the original's weights.
            twin = copy.deepcopy(model)
        # TRL's beta is a KL coefficient; above 0 it makes TRL load a reference model, or keep the adapter's.
        check_size(kwargs.get("train_dataset", others[0] if others else None), args)
        if args.offline is not None:
            kwargs["train_dataset"] = placeholder(args, *others, **kwargs)
            reward_funcs = reward_funcs or unrewarded
        with _temporarily(args, beta=args.beta if initial and twin is None else 0.0):
            super().__init__(model, reward_funcs, args, *others, **kwargs)
        self.beta = 0.0  # TRL would score its padded batches under the reference; this class does it exactly
        if twin is not None:
            self.ref_model = self._prepare_reference(twin)
        self._make_step()
        if not self._gvpo_step.backend.collective_forward(self.model):
            share_prompts(unwrap(self.model))
        self._window: list[Slice] = []
        self._rewards_seen: Tensor | None = None
        self._small_beta_warned = False
        self._token_cap = math.inf  # what memory allowed last time it ran out
        self._portions = Portions()
        self.off_policy = OffPolicy(self)
        self.health = Health(self)
        tolerate_loggers(self.callback_handler.callbacks)
        self.add_callback(Watch(args.warn_when, args.stop_when))
        self._warn_of_settings()

    # ------------------------------------------------------------------------------------------- set-up

    def _prepare_reference(self, model: nn.Module) -> nn.Module:
        model.eval().requires_grad_(False)
        if self.is_deepspeed_enabled:
            return prepare_deepspeed(model, self.accelerator)
        if self.is_fsdp_enabled:
            return prepare_fsdp(model, self.accelerator)
        return self.accelerator.prepare_model(model, evaluation_mode=True)

    def _make_step(self) -> None:
        common: dict[str, Any] = {
            "temperature": self.temperature,
            "backend": AccelerateBackend(self),
            "float32_head": self.args.cast_lm_head_to_fp32,
        }
        self._gvpo_step = GVPOStep(self.model, beta=self.args.beta, trust=self.args.trust, **common)
        # None where the policy scores for its reference: itself at rollout, or without its adapters.
        self._reference_scorer: SequenceScorer | None = None
        if self.args.reference == "initial" and self.ref_model is not None:
            self._reference_scorer = SequenceScorer(self.ref_model, **common)

    def _warn_of_settings(self) -> None:
        args = self.args
        fresh_only = args.offline is None and not args.replay_ratio
        if fresh_only and args.reference == "rollout" and args.updates_per_rollout <= 1:
            warnings.warn(
                f"beta={args.beta} cannot be felt: with reference='rollout' and one update per rollout the "
                "implicit reward is 0 when it is compared, so beta only scales the gradient (and drops out "
                "under Adam). Use reference='initial', or several updates per rollout (by "
                "steps_per_generation or num_iterations), if beta is to act.",
                stacklevel=3,
            )
        narrowed = [
            f"{name}={value}"
            for name, value, neutral in (
                ("top_p", args.top_p, 1.0),
                ("top_k", args.top_k, 0),
                ("min_p", args.min_p, None),
            )
            if value not in (neutral, None)
        ]
        if narrowed:
            warnings.warn(
                f"{', '.join(narrowed)}: GVPO's optimum is unique for samplers that can give every response; "
                "this one cannot.",
                stacklevel=3,
            )

    # ---------------------------------------------------------------------------------- rollouts, rewards

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
        self._rewards_seen = super()._calculate_rewards(*args, **kwargs)
        n = len(self._rewards_seen) // self.accelerator.num_processes
        self._failed_rows = self.health.settle_rewards(self.incidents, n)
        return self._rewards_seen

    def _generate_single_turn(self, prompt_ids: list[list[int]], *others: Any, **kwargs: Any) -> Any:
        sample = super()._generate_single_turn
        if not self.use_vllm and not self._gvpo_step.backend.collective_forward(self.model):
            sample = functools.partial(self._portions, sample)
        ids, logps = self.off_policy.generate(sample, prompt_ids, *others, **kwargs)
        # TRL looks at each completion's last token: an empty one has ended its turn at once.
        processor: Any = self.processing_class
        end = getattr(processor, "tokenizer", processor).eos_token_id
        return [row or [end] for row in ids], None if logps is None else [row or [0.0] for row in logps]

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> GroupBatch:
        """This rank's rows of a generation. Rewards and groups come from all ranks, in rank order."""
        train = self.model.training
        k = self.num_generations if train else self.num_generations_eval
        # Unique over the run, so that groups of two generations in one optimizer step stay apart.
        first_group = self._step * (len(inputs) * self.accelerator.num_processes // k)
        if train and self.off_policy.logged is not None:
            return self.off_policy.logged_batch(inputs, first_group)
        self.off_policy.place_demonstrations(inputs, first_group)
        # Told that generation ends with each optimizer step, TRL leaves out its own padded scoring pass.
        every = self.args.steps_per_generation * self.num_iterations
        with _temporarily(self.args, gradient_accumulation_steps=every):
            out = super()._generate_and_score_completions(inputs)
        if "pixel_values" in out:
            raise InputError("The data set has images, but GVPOTrainer trains text models only.")
        rewards, valid = self._total_rewards()
        valid &= ~self._failed(k)
        n = len(inputs)
        mine = slice(self.accelerator.process_index * n, (self.accelerator.process_index + 1) * n)
        completion_mask = out["completion_mask"]
        not_truncated = completion_mask.any(1)
        scored = completion_mask * out.get("tool_mask", 1)
        self.off_policy.reward_demonstrations(rewards[mine], valid[mine])
        group_ids = first_group + torch.arange(len(rewards), device=rewards.device) // k
        return GroupBatch.from_padded(
            torch.cat([out["prompt_ids"], out["completion_ids"]], 1),
            torch.cat([out["prompt_mask"], completion_mask], 1),
            torch.cat([torch.zeros_like(out["prompt_mask"]), scored], 1),
            rewards[mine],
            group_ids[mine],
            valid=valid[mine] & not_truncated if self.mask_truncated_completions else valid[mine],
        )

    def _failed(self, k: int) -> Tensor:
        """Rows that leave the step because a reward function failed on them, or on one of their group."""
        if self.args.on_reward_error != "drop_group":
            return self._failed_rows
        return self._failed_rows.view(-1, k).any(1).repeat_interleave(k)

    def _total_rewards(self) -> tuple[Tensor, Tensor]:
        """Weighted sum per row, and which rows some reward function could score. float64 where possible."""
        per_function = self._rewards_seen
        assert per_function is not None
        scored = ~per_function.isnan()
        valid = scored.any(1)
        if len(valid) and not valid.any():
            raise InputError(
                f"Every reward function ({', '.join(self.reward_func_names)}) returned None or NaN for all "
                f"{len(valid)} completions of a generation at step {self.state.global_step}: nothing can be "
                "learnt from them. Check that the reward can read the model's answers."
            )
        total = (per_function * self.reward_weights.to(per_function.device)).nansum(1)
        if self.num_iterations > 1 and self.args.beta <= 0.1 and self.model.training:
            self._warn_of_small_beta(total[valid])
        return total, valid

    def _warn_of_small_beta(self, rewards: Tensor) -> None:
        if self._small_beta_warned or not ((rewards == 0) | (rewards == 1)).all():
            return
        self._small_beta_warned = True
        warnings.warn(
            f"beta={self.args.beta} with 0/1 rewards and num_iterations={self.num_iterations}: beta is the "
            "trust region, and a small one puts the target of reused batches far away; 0.2 to 0.5 behaved "
            "best.",
            stacklevel=2,
        )

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        """The slice of the current call in training (generating when due); a whole batch in evaluation."""
        if not self.model.training:
            batch = self._generate_and_score_completions(generation_batch)
            if self.args.reference == "initial":
                batch.reference_logps = self._score_reference(batch)
            return batch
        spg = self.args.steps_per_generation
        if self._step % (spg * self.num_iterations) == 0 or self._buffered_inputs is None:
            batch = self._generate_and_score_completions(generation_batch)
            slices = [Slice(part, self.state.global_step) for part in split(batch, spg)]
            self._attach_reference(slices)
            self.off_policy.store(slices, self._rewards_seen)
            self._buffered_inputs = slices
        return self._buffered_inputs[self._step % spg]

    def _attach_reference(self, slices: list[Slice]) -> None:
        """Score under the reference the slices that will meet another policy than that."""
        late = slices[self._free_slices(len(slices)) :]
        if not late or late[0].batch.reference_logps is not None:  # logged with their reference
            return
        batch = GroupBatch.concatenate([item.batch for item in late])
        sizes = [len(item.batch) for item in late]
        if self.args.trust is not None:
            for item, tokens in zip(late, self._score_rollout(batch).split(sizes), strict=True):
                width = item.batch.input_ids.shape[1]
                item.batch.rollout_logps = tokens[:, :width]
                item.batch.reference_logps = tokens.sum(1)
        if self.args.trust is None or self.args.reference == "initial":
            for item, logps in zip(late, self._score_reference(batch).split(sizes), strict=True):
                item.batch.reference_logps = logps

    def _score_rollout(self, batch: GroupBatch) -> Tensor:
        """log p of each token under the policy as it is, which has just sampled them."""
        self._gvpo_step.model = self.model_wrapped
        self._gvpo_step.token_budget = self._token_budget(batch)
        return self._gvpo_step.token_logps(batch)

    def _free_slices(self, count: int) -> int:
        """How many of a generation's first slices are used in free steps only (see `_is_free`)."""
        kept = self.args.reference == "initial" or self.args.offline is not None or self.args.replay_ratio
        if kept or (self._window and not self._is_free(self._window)):
            return 0
        room = self.current_gradient_accumulation_steps - len(self._window)
        if self.num_iterations > 1:
            return count if count * self.num_iterations <= room else 0
        return min(count, room)

    def _score_reference(self, batch: GroupBatch) -> Tensor:
        if self._reference_scorer is not None:
            self._reference_scorer.token_budget = self._token_budget(batch)
            return self._reference_scorer.sequence_logps(batch)
        if self.args.reference == "rollout":
            return self._score_rollout(batch).sum(1)
        model = self.accelerator.unwrap_model(self.model)
        # TRL keeps a copy of an adapter that was there before training; a new one starts as the base model.
        with use_adapter(model, adapter_name="ref" if "ref" in model.peft_config else None):
            return self._score_rollout(batch).sum(1)

    # ------------------------------------------------------------------------------------------- update

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Collect this call's slice; on the last call of the accumulation window make the whole update."""
        started = time.perf_counter()
        model.train()
        if callable(getattr(self.optimizer, "train", None)):
            self.optimizer.train()
        self._window.append(self._prepare_inputs(inputs))
        loss = torch.zeros((), device=self.accelerator.device)
        update = self.accelerator.sync_gradients
        if update:
            loss = self._update(model)
            self._window = []
        self._step += 1
        self._current_train_step_time += time.perf_counter() - started
        if update:
            self._metrics["train"]["step_time"].append(self._current_train_step_time)
            self._current_train_step_time = 0.0
        return loss

    def _is_free(self, window: list[Slice]) -> bool:
        """Whether the policy is still the one that sampled every row, and that one is the reference."""
        fresh = all(item.policy_step == self.state.global_step for item in window)
        return fresh and self.args.reference == "rollout" and self.args.offline is None

    def _update(self, model: nn.Module) -> Tensor:
        batch = window_batch(self._window, free=self._is_free(self._window))
        batch = self.off_policy.with_replay(batch, self._window)
        self._gvpo_step.model = model
        self._gvpo_step.token_budget = self._token_budget(batch)
        try:
            report = self._gvpo_step(batch)
            if not self.health.gradients_are_finite(model):
                raise NonFiniteError("A gradient is not finite.")
        except NonFiniteError as error:  # on all processes alike
            self.health.bad_step(batch, str(error))
            return torch.zeros((), device=self.accelerator.device)
        self.health.good_step()
        # Creeps back, since one odd batch should not slow down the rest of a run.
        self._token_cap = self._gvpo_step.token_budget if report.retries else self._token_cap * 1.01
        if report.metrics["groups"].item() == 0:
            warnings.warn(
                f"Step {self.state.global_step} makes no update: no group has two responses with a reward.",
                stacklevel=2,
            )
        self._log_report(report)
        every = self.args.torch_empty_cache_steps
        if every is not None and self.state.global_step % every == 0:
            clear_device_cache()
        return report.loss.to(self.accelerator.device, torch.float32)

    def _token_budget(self, batch: GroupBatch) -> int:
        args = self.args
        rows = args.per_device_train_batch_size if self.model.training else args.per_device_eval_batch_size
        wanted = args.micro_batch_tokens or rows * max(1, batch.input_ids.shape[1])
        return max(1, int(min(wanted, self._token_cap)))

    def _log_report(self, report: StepReport) -> None:
        metrics = self._metrics["train"]
        self._log_objective(report.metrics, "train")
        mine = torch.tensor(
            [
                0.0 if report.scored_tokens == 0 else report.entropy * report.scored_tokens,
                report.scored_tokens,
                report.tokens,
                report.useful_tokens,
                report.tokens_beyond_trust,
            ],
            device=self.accelerator.device,
        )
        entropy, scored, tokens, useful, far = self.accelerator.reduce(mine, reduction="sum").tolist()
        if scored:
            metrics["entropy"].append(entropy / scored)
        if tokens:
            metrics["gvpo/useful_token_fraction"].append(useful / tokens)
        if self.args.trust is not None and scored + far:
            metrics["gvpo/beyond_trust_fraction"].append(far / (scored + far))

    def _log_objective(self, values: dict[str, Tensor], mode: str) -> None:
        numbers = torch.stack(list(values.values())).tolist()
        for name, value in zip(values, numbers, strict=True):
            if name != "loss":
                self._metrics[mode][f"gvpo/{name}"].append(value)

    def _compute_loss(self, model: nn.Module, inputs: GroupBatch) -> Tensor:
        """The evaluation loss: the formula's value on fresh responses (in training, see `training_step`)."""
        self._gvpo_step.model = self.model_wrapped
        self._gvpo_step.token_budget = self._token_budget(inputs)
        result, _ = self._gvpo_step.weigh(inputs)
        self._log_objective(result.metrics, "eval")
        return result.loss.to(self.accelerator.device, torch.float32)
