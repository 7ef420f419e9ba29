"""What responses are measured against: log-probabilities under the policy and under the reference."""

from __future__ import annotations

from typing import Any

from accelerate.utils import DistributedType
from torch import Tensor, nn
from trl.models.utils import prepare_deepspeed, prepare_fsdp
from trl.trainer.utils import use_adapter

from gvpo.batch import GroupBatch
from gvpo.errors import InputError
from gvpo.step import GVPOStep, SequenceScorer
from gvpo.trl.memory import Ceiling
from gvpo.trl.metrics import timed
from gvpo.trl.moving import MovingReference
from gvpo.trl.rollouts import Slice, select, used_within
from gvpo.trl.sampling import SamplingTrainer


class ScoringTrainer(SamplingTrainer):
    """Scores slices under the reference, once."""

    _window: list[Slice]

    def _make_scoring(self) -> None:
        args = self.args
        common: dict[str, Any] = {
            "temperature": self.temperature,
            "backend": self._backend,
            "float32_head": args.cast_lm_head_to_fp32,
            "share_prompts": args.share_prompts,
        }
        coefficient = args.router_aux_loss_coef or 0.0
        self._gvpo_step = GVPOStep(
            self.model, beta=args.beta, trust=args.trust, router_aux_loss_coef=coefficient, **common
        )
        weigh = self.timing.during("scoring")(self._gvpo_step.weigh)
        self._gvpo_step.weigh = weigh  # type: ignore[method-assign]
        # None where the policy scores for its reference: itself at rollout, or without its adapters.
        self._reference_scorer: SequenceScorer | None = None
        if args.reference == "initial" and self.ref_model is not None:
            self._reference_scorer = SequenceScorer(self.ref_model, **common)
        self._start_checked = False
        self.moving = self._make_moving()
        self._token_ceiling = self.checkpointed["tokens"] = Ceiling()

    def _prepare_reference(self, model: nn.Module) -> nn.Module:
        model.eval().requires_grad_(False)
        if self.is_deepspeed_enabled:
            return prepare_deepspeed(model, self.accelerator)
        if self.is_fsdp_enabled:
            return prepare_fsdp(model, self.accelerator)
        return self.accelerator.prepare_model(model, evaluation_mode=True)

    def _make_moving(self) -> MovingReference | None:
        if self.args.reference != "moving":
            return None
        sharded = self.accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
        if sharded and not self.accelerator.is_fsdp2:
            raise InputError(
                "reference='moving' puts a copy in the parameters' place, which DeepSpeed and FSDP 1 do not "
                "let it: use DDP or FSDP 2 (fsdp_version: 2)."
            )
        assert self.args.reference_every is not None
        rank = self.accelerator.process_index
        moving = MovingReference(self.args.reference_every, lambda: self.model_wrapped, rank)
        self.checkpointed["reference"] = moving
        self.add_callback(moving)
        return moving

    @timed("reference")
    def _attach_reference(self, slices: list[Slice]) -> None:
        """Score under the reference the slices that will meet another policy than that."""
        on_policy = 0  # so many slices are used while the policy is the one that sampled them
        if self.replay is None and self._is_on_policy([*self._window, *slices]):
            room = self.current_gradient_accumulation_steps - len(self._window)
            on_policy = used_within(room, len(slices), self.num_iterations)
        scored = slices[on_policy:]
        if not scored or scored[0].batch.reference_logps is not None:  # logged with their reference
            return
        batch = GroupBatch.concatenate([item.batch for item in scored])
        sizes = [len(item.batch) for item in scored]
        if self.args.trust is not None:
            for item, tokens in zip(scored, self._score_policy(batch).split(sizes), strict=True):
                width = item.batch.input_ids.shape[1]
                item.batch.rollout_logps = tokens[:, :width]
                item.batch.reference_logps = tokens.sum(1)
        if self.args.trust is None or self.args.reference != "rollout":
            for item, logps in zip(scored, self._score_reference(batch).split(sizes), strict=True):
                item.batch.reference_logps = logps

    def _is_on_policy(self, slices: list[Slice]) -> bool:
        """Whether the policy is still the one that sampled every row, and that one is the reference."""
        now = self.state.global_step
        fresh = all(item.policy_step == item.reference_step == now for item in slices)
        return fresh and self.args.reference != "initial" and self.offline is None

    def sampled(self, prompts: list[Any]) -> tuple[list[list[int]], list[list[int]], Tensor]:
        """k responses to each prompt, by rows: prompt, completion, and S under the policy that sampled."""
        self._without_tokens = None
        rows = [prompt for prompt in prompts for _ in range(self.num_generations)]
        prompt_ids, completions, *_ = self._generate(rows)
        none: list[int] = self._without_tokens or []
        for row in none:
            completions[row] = []
        batch = GroupBatch.from_tokens(
            prompt_ids, completions, [0.0] * len(rows), list(range(len(rows))), device=self.accelerator.device
        )
        self._metrics["train"].clear()
        return prompt_ids, completions, self._score_policy(batch).sum(1)

    def _score_policy(self, batch: GroupBatch) -> Tensor:
        """log p of each token under the policy as it is; S' if it is that of the rollout, or bare."""
        return self._step_for(batch).token_logps(batch)

    def _step_for(self, batch: GroupBatch, model: nn.Module | None = None) -> GVPOStep:
        self._gvpo_step.model = self.model_wrapped if model is None else model
        self._gvpo_step.token_budget = self._token_budget(batch)
        return self._gvpo_step

    @timed("reference")
    def _score_reference(self, batch: GroupBatch) -> Tensor:
        if self._reference_scorer is not None:
            self._reference_scorer.token_budget = self._token_budget(batch)
            return self._reference_scorer.sequence_logps(batch)
        if self.args.reference == "rollout":
            return self._score_policy(batch).sum(1)
        if self.moving is not None:
            with self.moving.in_place(self.state.global_step):
                return self._score_policy(batch).sum(1)
        model = self.accelerator.unwrap_model(self.model)
        first = None
        if self.state.global_step == 0 and not self._start_checked:
            first = self._score_policy(select(batch, slice(0, 1))).sum(1)
        # TRL keeps a copy of an adapter that was there before training; a new one starts as the base model.
        with use_adapter(model, adapter_name="ref" if "ref" in model.peft_config else None):
            reference = self._score_policy(batch).sum(1)
        if first is not None:
            self._check_start((first - reference[:1]).abs() / batch.lengths[:1])
        return reference

    def _check_start(self, apart: Tensor) -> None:
        """Raise an InputError if the policy, before its first update, is not the reference: nats a token."""
        self._start_checked = True
        error = float(self.accelerator.gather(apart).max())
        if error > (2e-3 if self.accelerator.mixed_precision == "no" else 0.05):
            raise InputError(
                f"The adapter does not start as the model that it is put on ({error:.2g} nats a token off), "
                "which therefore is not the initial policy: use reference='rollout', or an adapter that "
                "changes nothing at first (LoRA with init_lora_weights=True, say)."
            )

    def _token_budget(self, batch: GroupBatch) -> int:
        args = self.args
        rows = args.per_device_train_batch_size if self.model.training else args.per_device_eval_batch_size
        wanted = args.micro_batch_tokens or rows * max(1, batch.input_ids.shape[1])
        return max(1, int(min(wanted, self._token_ceiling.most)))
