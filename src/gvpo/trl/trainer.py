"""`GVPOTrainer`: TRL's `GRPOTrainer` with GVPO's update.

Generation, rewards, logging, checkpoints and the training loop are TRL's. What differs: groups stay whole
(TRL shuffles samples), and an optimizer step is one exact `gvpo.step.GVPOStep` over all its rows, made on
the call of `training_step` that ends its accumulation window.

It is built in the order in which a response meets it: `gvpo.trl.resume` (checkpoints), `sampling` (sampled,
rewarded, put into groups), `reference` (measured), and here weighed. TRL is known in these four only; the
parts that they call take values and give values.
"""

from __future__ import annotations

import copy
import inspect
import textwrap
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from accelerate.utils.memory import clear_device_cache
from torch import Tensor, nn
from transformers import PreTrainedModel
from trl import GRPOTrainer

from gvpo.batch import GroupBatch
from gvpo.errors import InputError, NonFiniteError
from gvpo.trl import compat, offpolicy  # noqa: F401  (compat asserts TRL's private names)
from gvpo.trl.ahead import write_recipe
from gvpo.trl.backend import AccelerateBackend
from gvpo.trl.config import GVPOConfig, warn_of_settings
from gvpo.trl.guard import guard
from gvpo.trl.health import Health
from gvpo.trl.memory import memory_shares
from gvpo.trl.metrics import Share, Timing, shares_of, timed
from gvpo.trl.reference import ScoringTrainer
from gvpo.trl.resume import temporarily
from gvpo.trl.rollouts import Slice, split, window_batch
from gvpo.trl.vllm import engine_of
from gvpo.trl.watch import Watch, tolerate_loggers


class GVPOTrainer(ScoringTrainer):
    """Trains a causal language model with GVPO (arXiv 2504.19599) in TRL's `GRPOTrainer`.

    Arguments, data sets and reward functions are those of `trl.GRPOTrainer`, with a `GVPOConfig`.
    Logged besides TRL's metrics: `gvpo/…` of `gvpo.objective.GVPOLoss.metrics`; `loss` is the value of the
    formula before the update. `entropy` is that of the rows that have weight.

    Attributes:
        on_generation: called with each generation of all processes: prompts, completions, total rewards (NaN
            where there is none), and whether it is one of training.
        replay: the replay buffer and how it is sampled (`gvpo.trl.offpolicy.Replay`), if there is one.

    Raises:
        InputError: a reward function that raises, returns the wrong number of values, or nothing but
            None/NaN for a whole generation; an image that cannot be read, or images with replay or
            demonstrations.
    """

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
        bound = inspect.signature(GRPOTrainer.__init__).bind(
            self, model, reward_funcs, args, *others, **kwargs
        )
        given = {name: value for name, value in bound.arguments.items() if name != "self"}
        held = getattr(model, "peft_config", {})
        adapters = bool(held) or given.get("peft_config") is not None
        initial = args.reference == "initial"
        if initial and held and "default" not in held:
            raise InputError(
                f"reference='initial' needs a copy of the adapter {', '.join(held)}, and TRL copies only "
                "one of the name 'default': call it so."
            )
        twin: nn.Module | None = None
        if initial and not isinstance(model, str) and not adapters:
            # Copied before TRL patches the forward, after which a copy would run the original's weights.
            twin = copy.deepcopy(model)
        self._look_after(given, args)
        own = len(given["reward_funcs"] or [])
        # TRL's beta is a KL coefficient; above 0 it makes TRL load a reference model, or keep the adapter's.
        kept = {"beta": args.beta if initial and twin is None else 0.0, "router_aux_loss_coef": 0.0}
        if args.generate_ahead:
            kept["use_vllm"] = False  # the other process has it
            if args.process_index == 0:
                write_recipe(args, given)
        with temporarily(args, **kept), engine_of(args):
            super().__init__(**given)
        self.beta = 0.0  # TRL would score its padded batches under the reference; this class does it exactly
        if twin is not None:
            self.ref_model = self._prepare_reference(twin)
        # The environments' own rewards, which TRL has added: one is asked once, whatever befalls the others.
        self.reward_funcs[own:] = [
            guard(f, self.incidents, group=1, environment=name)
            for f, name in zip(self.reward_funcs[own:], self.reward_func_names[own:], strict=True)
        ]
        self.timing = Timing(self._metrics["train"], self.accelerator.device)
        self._backend = AccelerateBackend(self.accelerator)
        self._make_scoring()
        self._make_sampling()
        self.health = self.checkpointed["health"] = Health(args.max_bad_steps)
        self._window: list[Slice] = []
        self._awaits_optimizer: GroupBatch | None = None  # the batch whose gradient is in place
        tolerate_loggers(self.callback_handler.callbacks)
        self.add_callback(self.timing)
        self.add_callback(Watch(args.warn_when, args.stop_when))
        warn_of_settings(args)

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        """The slice of the current call in training (generating when due); a whole batch in evaluation."""
        self.incidents.rounds.clear()
        if not self.model.training:
            batch = self._generate_and_score_completions(generation_batch)
            if self.args.reference != "rollout":
                batch.reference_logps = self._score_reference(batch)
            return batch
        spg = self.args.steps_per_generation
        if self._step % (spg * self.num_iterations) == 0 or self._buffered_inputs is None:
            if self.ahead is not None:
                with self.timing.during("generation"):
                    self.ahead.take(self._step // (spg * self.num_iterations), self.state.global_step)
            if self.dynamic is None:
                generation = self._sample(generation_batch)
            else:
                generation, shares = self.dynamic(generation_batch, self._sample)
                self._log(shares)
            sampled = self.state.global_step if self.ahead is None else self.ahead.version
            if self.ahead is not None and self.args.reference == "rollout":
                logps = self.ahead.reference_logps(len(generation.batch))
                generation.batch.reference_logps = logps.to(generation.batch.rewards.device)
            moved = self.moving and self.moving.step
            reference = {"rollout": sampled, "moving": moved}.get(self.args.reference) or 0
            slices = [Slice(part, sampled, reference) for part in split(generation.batch, spg)]
            self._attach_reference(slices)
            if self.replay is not None:
                whole = GroupBatch.concatenate([item.batch for item in slices])
                named = dict(zip(self.reward_func_names, generation.components.T, strict=True))
                self.replay.store(whole, sampled, reference, named, generation.given)
            self._buffered_inputs = slices
        return self._buffered_inputs[self._step % spg]

    # ------------------------------------------------------------------------------------------- update

    def train(
        self, resume_from_checkpoint: str | Path | bool | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        self._window, self._awaits_optimizer = [], None  # of an earlier call that was interrupted
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            if self.ahead is not None:
                self.ahead.stop()

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Collect this call's slice; on the last call of the accumulation window make the whole update."""
        model.train()
        if callable(getattr(self.optimizer, "train", None)):
            self.optimizer.train()
        self._window.append(self._prepare_inputs(inputs))
        loss = torch.zeros((), device=self.accelerator.device)
        if self.accelerator.sync_gradients:
            loss = self._update(model)
            self._window = []
        self._step += 1
        return loss

    def _update(self, model: nn.Module) -> Tensor:
        batch = window_batch(self._window, on_policy=self._is_on_policy(self._window))
        if self.replay is not None:
            batch = self._with_replay(self.replay, batch)
        self._awaits_optimizer = None
        try:
            with self.timing.during("update"):
                report = self._step_for(batch, model)(batch)
        except NonFiniteError as error:  # on all processes alike
            self._skip_step(batch, str(error))
            return torch.zeros((), device=self.accelerator.device)
        if report.retries:
            self._token_ceiling.most = self._gvpo_step.token_budget
        else:
            self._token_ceiling.rise()
        if report.metrics["groups"].item() == 0:
            self.health.good_step()
            warnings.warn(
                f"Step {self.state.global_step} makes no update: no group has two responses with a reward.",
                stacklevel=2,
            )
        else:
            self._awaits_optimizer = batch
        self._log_objective(report.metrics)
        shares = shares_of(report, batch, with_trust=self.args.trust is not None)
        shares |= self._ages()
        self._log(shares | memory_shares(self.accelerator.device))
        every = self.args.torch_empty_cache_steps
        if every is not None and self.state.global_step % every == 0:
            clear_device_cache()
        return report.loss.to(self.accelerator.device, torch.float32)

    def _ages(self) -> dict[str, Share]:
        """Updates since the step's fresh rows were sampled, and since the policy was their reference."""
        if self.ahead is None and self.moving is None:
            return {}
        now = self.state.global_step
        ages = [now - item.policy_step for item in self._window]
        reference = [now - item.reference_step for item in self._window]
        return {
            "staleness/age_mean": Share(sum(ages), len(ages)),
            "staleness/age_max": Share(max(ages), len(ages), largest=True),
            "staleness/reference_age": Share(sum(reference), len(ages)),
        }

    def _with_replay(self, replay: offpolicy.Replay, batch: GroupBatch) -> GroupBatch:
        """The batch of an optimizer step and its share of replayed groups."""
        oldest = min(item.policy_step for item in self._window)
        batch, replayed, shares = replay.draw(batch, self.state.global_step, oldest)
        self._log(shares)
        if self.args.replay_reference == "current" and self.args.reference != "rollout":
            replayed.reference_logps = self._score_reference(replayed)
        # Also without any groups: all processes must take the same way.
        parts = [p if p.reference_logps is not None else p.as_on_policy() for p in (batch, replayed)]
        return GroupBatch.concatenate(parts)

    @timed("update")
    def _clip_grad_norm(self, model: nn.Module) -> Any:
        return super()._clip_grad_norm(model) if self._awaits_optimizer is not None else None

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The norm that clipping has found; if it is not finite, the step is not made."""
        batch, self._awaits_optimizer = self._awaits_optimizer, None
        scaler = self.accelerator.scaler
        if scaler is not None:  # it refuses a step without any gradient
            self.optimizer.scaler = None if batch is None else scaler
        if batch is None:
            return 0.0
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if scaler is not None or self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            self.health.good_step()  # bad gradients are looked after there
            return norm
        whole = norm.full_tensor() if hasattr(norm, "full_tensor") else torch.as_tensor(norm)
        if whole.isfinite().item():
            self.health.good_step()
            return norm
        self._skip_step(batch, "A gradient is not finite.")
        return 0.0

    def _skip_step(self, batch: GroupBatch, why: str) -> None:
        step, rank = self.state.global_step, self.accelerator.process_index
        self.model.zero_grad(set_to_none=True)
        self._metrics["train"]["gvpo/steps_skipped"].append(1.0)
        path = Path(self.args.output_dir) / "incidents" / f"step-{step}-rank-{rank}.safetensors"
        self.health.bad_step(batch, why, step=step, path=path)

    def _compute_loss(self, model: nn.Module, inputs: GroupBatch) -> Tensor:
        """The evaluation loss: the formula's value on fresh responses (in training, see `training_step`)."""
        result, _ = self._step_for(inputs).weigh(inputs)
        self._log_objective(result.metrics)
        return result.loss.to(self.accelerator.device, torch.float32)

    def _log_objective(self, values: Mapping[str, Tensor]) -> None:
        numbers = torch.stack(list(values.values())).tolist()
        for name, value in zip(values, numbers, strict=True):
            if name != "loss":
                self._metrics[self._mode][f"gvpo/{name}"].append(value)
