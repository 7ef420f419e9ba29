"""How the trainer comes to its rows: sampled, rewarded, put into groups; TRL's methods where GVPO differs."""

from __future__ import annotations

import functools
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from gvpo.batch import GroupBatch
from gvpo.errors import InputError
from gvpo.model.generation import shared_prompts
from gvpo.model.logprobs import unwrap
from gvpo.trl import offpolicy
from gvpo.trl.ahead import Ahead, check_trainer
from gvpo.trl.backend import AccelerateBackend
from gvpo.trl.config import GVPOConfig, check_size, warn_of_small_beta
from gvpo.trl.dynamic import DynamicSampling, Generation
from gvpo.trl.episodes import Environments, check_rollout, limited
from gvpo.trl.guard import Incidents, guard
from gvpo.trl.images import images_of, read, unread
from gvpo.trl.memory import Portions
from gvpo.trl.metrics import Share, Timing, gathered, timed
from gvpo.trl.resume import ResumableTrainer, temporarily
from gvpo.trl.vllm import engine_errors


class SamplingTrainer(ResumableTrainer):
    """The methods stand in the order in which a response meets them."""

    args: GVPOConfig
    timing: Timing
    _backend: AccelerateBackend
    on_generation: Callable[[list[Any], list[Any], list[float], bool], None] | None = None

    # ------------------------------------------------------------------------------------------- set-up

    def _look_after(self, given: dict[str, Any], args: GVPOConfig) -> None:
        """Of TRL's arguments: functions guarded, images read in their turn, rows for logged completions."""
        tolerated = 0.0 if args.on_reward_error == "error" else args.reward_error_tolerance
        self.incidents = Incidents(tolerated, args.world_size)
        if (funcs := given["reward_funcs"]) is not None:
            how: dict[str, Any] = {"timeout": args.reward_timeout, "worker": args.reward_worker}
            group = args.num_generations or 1
            funcs = funcs if isinstance(funcs, list) else [funcs]
            given["reward_funcs"] = [guard(f, self.incidents, group=group, **how) for f in funcs]
        for name in ("train_dataset", "eval_dataset"):
            given[name] = unread(given.get(name))
        dataset = given["train_dataset"]
        check_size(dataset, args)
        if args.offline is not None:
            if dataset is not None:
                raise InputError(
                    f"offline={args.offline} is the training data: give no train_dataset besides."
                )
            # Until TRL has the tokenizer that logged completions are read with.
            given["train_dataset"] = offpolicy.Offline.dataset(args.prompts_per_generation)
            given["reward_funcs"] = given["reward_funcs"] or [offpolicy.unrewarded]
        self._environments = Environments(args.tool_timeout)
        if (factory := given.get("environment_factory")) is not None:
            given["environment_factory"] = self._environments.made_by(factory)
        if given.get("tools"):
            given["tools"] = [limited(tool, args.tool_timeout) for tool in given["tools"]]
        if (rollout := given.get("rollout_func")) is not None:
            given["rollout_func"] = functools.partial(self._roll_out, rollout)

    def _make_sampling(self) -> None:
        args, accelerator = self.args, self.accelerator
        world, rank = accelerator.num_processes, accelerator.process_index
        self._portions = self.checkpointed["portions"] = Portions()
        self._collective = self._backend.collective_forward(self.model)
        self._rewards_seen = torch.empty(0, 0)
        self._without_tokens: list[int] | None = None
        self._given: offpolicy.Given = []  # demonstrations in the rows being generated
        self._check_turns()
        model = accelerator.unwrap_model(self.model)
        options = dict(args.chat_template_kwargs or {})
        if getattr(self, "tools", None):  # as in the prompts of a generation
            options["tools"] = self.tools
        encoder = offpolicy.encoder_for(
            model, self.processing_class, getattr(self, "chat_template", None), options
        )
        self.offline = self.demonstrations = self.dynamic = self.ahead = self.replay = None
        if args.offline is not None:
            self.offline = offpolicy.Offline(args.offline, args, encoder)
            self.train_dataset = self.offline.dataset(len(self.offline.groups))
        if args.demonstrations_per_group:
            for name in ("rollout_func", "tools", "environments"):
                if getattr(self, name, None):
                    raise InputError(
                        f"demonstrations_per_group does not go with {name}: completions are single turns."
                    )
            self.demonstrations = offpolicy.demonstrations_of(args, encoder, self.train_dataset)
        if args.chooses_prompts:
            gather = accelerator.gather
            self.dynamic = DynamicSampling(args, self.train_dataset, rank=rank, world=world, gather=gather)
            self.checkpointed["prompts"] = self.dynamic.prompts
        if args.generate_ahead:
            check_trainer(self)
            self.ahead = Ahead(args, self.train_dataset, model, self._rollouts, rank)
            self.checkpointed["ahead"] = self.ahead
        if args.replays:
            self.replay = offpolicy.Replay(args, encoder, rank=rank, world=world)
            self.checkpointed["replay"] = self.replay

    def _check_turns(self) -> None:
        """Processes make different numbers of turns: none may wait for another in one."""
        server = self.use_vllm and (self.vllm_mode == "server" or self.args.vllm_tensor_parallel_size > 1)
        together = server or (self._collective and not self.use_vllm)
        if getattr(self, "tools", None) and self.accelerator.num_processes > 1 and together:
            raise InputError(
                "With tools, processes make different numbers of turns and so must generate each on its own: "
                "use DDP, or vllm_mode='colocate' with vllm_tensor_parallel_size=1."
            )

    def _rollouts(self) -> int:
        """Of the whole run."""
        each = self.args.steps_per_generation * self.num_iterations
        return -(-self.state.max_steps * self.args.gradient_accumulation_steps // each)

    # ------------------------------------------------------------------------------------------ sampling

    def _tokenize_prompts(self, prompts: list[Any]) -> Any:
        ids, images, fields = super()._tokenize_prompts(prompts)
        # Processors know an empty list for a row without images, but not TRL's None.
        return ids, None if images is None else [some or [] for some in images], fields

    @timed("generation")
    def _generate_single_turn(self, prompt_ids: list[list[int]], *others: Any, **kwargs: Any) -> Any:
        sample = super()._generate_single_turn
        images = bool(others) and others[0] is not None
        if images:
            self._refuse_to_store_images()
            others = ([some or None for some in others[0]], *others[1:])  # as vLLM knows rows without
        # Images are not cut into portions: TRL has those of all rows in one.
        ahead = self.ahead if self.model.training else None
        alone = not self._collective and not self.use_vllm and not images and ahead is None
        if ahead is not None:
            sample = ahead.sample
        if alone:
            sample = functools.partial(self._portions, sample)
        with shared_prompts(unwrap(self.model)) if alone else engine_errors(self.args):
            whole = self.use_vllm or ahead is not None  # which have every group whole
            ids, logps = offpolicy.complete(sample, self._given, whole, prompt_ids, *others, **kwargs)
        if self._without_tokens is not None:  # a later turn of a conversation with tools
            return ids, logps
        return self._ended(ids), None if logps is None else [row or [0.0] for row in logps]

    def _refuse_to_store_images(self) -> None:
        parts = {"replay_ratio": self.replay, "demonstrations_per_group": self.demonstrations}
        for name, part in (parts | {"generate_ahead": self.ahead}).items():
            if part is not None:
                raise InputError(
                    f"{name} does not go with images in prompts, which are not stored: leave one out."
                )

    def _ended(self, ids: list[list[int]]) -> list[list[int]]:
        """Completions with a token each, as TRL looks at the last one; notes which were without."""
        self._without_tokens = [i for i, row in enumerate(ids) if not row]
        processor: Any = self.processing_class
        end = getattr(processor, "tokenizer", processor).eos_token_id
        return [row or [end] for row in ids]

    @timed("generation")
    def _roll_out(self, function: Any, prompts: list[Any], trainer: Any) -> dict[str, Any]:
        """What a `rollout_func` returned."""
        out = dict(function(prompts, trainer))
        check_rollout(out, len(prompts), tools=bool(getattr(self, "tools", None)))
        out["completion_ids"] = self._ended(out["completion_ids"])
        fill = {"logprobs": [0.0], "env_mask": [1]}
        return out | {name: [row or fill[name] for row in out[name]] for name in fill if out.get(name)}

    # ------------------------------------------------------------------------------------------- rewards

    @timed("rewards")
    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, *others: Any) -> Tensor:
        for row, environment in enumerate(getattr(self, "environments", None) or []):
            if (error := self._environments.failure(environment)) is not None:
                why = f"could not be reset ({type(error).__name__}: {error})"
                trace = "".join(traceback.format_exception(error))
                name = f"Environment {type(environment).__name__}"
                self.incidents.add(row, name, why, trace, prompts[row], completions[row])
        rewards = self._rewards_seen = super()._calculate_rewards(inputs, prompts, completions, *others)
        rank, step = self.accelerator.process_index, self.state.global_step
        path = Path(self.args.output_dir) / "incidents" / f"rewards-rank-{rank}.jsonl"
        mine, first = self.incidents.drain(path, step)
        failed = torch.zeros(len(rewards) // self.accelerator.num_processes, dtype=torch.bool)
        failed[sorted(mine)] = True
        failed = self._failed_rows = self.accelerator.gather(failed.to(self.accelerator.device))
        if failed.any():
            self._metrics[self._mode]["gvpo/reward_incidents"].append(float(failed.sum()))
        self.incidents.judge(failed, first, step, path.parent)
        return rewards

    def _total_rewards(self) -> tuple[Float[Tensor, "all_rows"], Bool[Tensor, "all_rows"]]:
        """The weighted sum for each row of all processes, and which rows some reward function could score."""
        rewards = self._rewards_seen
        valid = ~rewards.isnan().all(1)
        # A part of a generation, where rows are asked again, may lack them.
        if len(valid) and not valid.any() and len(self.incidents.rounds) <= 1:
            raise InputError(
                f"Every reward function ({', '.join(self.reward_func_names)}) returned None or NaN for all "
                f"{len(valid)} completions of a generation at step {self.state.global_step}: nothing can be "
                "learnt from them. Check that the reward can read the model's answers."
            )
        return (rewards * self.reward_weights.to(rewards.device)).nansum(1), valid

    # -------------------------------------------------------------------------------------------- groups

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> GroupBatch:
        """This process's rows of a generation. Rewards and groups come from all processes, in rank order."""
        training, n, inputs = self.model.training, len(inputs), read(inputs)
        k = self.num_generations if training else self.num_generations_eval
        first_row = self.accelerator.process_index * n
        # Unique over the run, so that groups of two generations in one optimizer step stay apart.
        first_group = self._step * (n * self.accelerator.num_processes // k)
        if training and self.offline is not None:
            batch, shares = self.offline.batch(inputs, first_row, first_group, self.accelerator.device)
            self._log(shares)
            return batch
        shown = self.demonstrations if training else None
        self._given = [] if shown is None else offpolicy.place(shown, inputs, first_row, first_group)
        self._without_tokens = None
        # Told that generation ends with each optimizer step, TRL leaves out its own padded scoring pass.
        every = self.args.steps_per_generation * self.num_iterations
        with temporarily(self.args, gradient_accumulation_steps=every):
            out = super()._generate_and_score_completions(inputs)
        pictures = images_of(out, self.accelerator.unwrap_model(self.model))
        if pictures is not None:
            self._refuse_to_store_images()
        mine = slice(first_row, first_row + n)
        rewards, valid = self._total_rewards()
        if self.on_generation is not None:
            asked, answered = (list(self._logs[n])[-len(rewards) :] for n in ("prompt", "completion"))
            self.on_generation(asked, answered, rewards.masked_fill(~valid, torch.nan).tolist(), training)
        if training:
            warn_of_small_beta(self.args, rewards[valid])
        rewards, valid, failed = rewards[mine], valid[mine], self._failed_rows[mine].clone()
        if shown is None:
            valid &= ~failed
        else:
            reward = self.args.demonstration_reward
            self._log(offpolicy.reward_demonstrations(rewards, valid, failed, self._given, reward))
        if self.args.on_reward_error == "drop_group":
            valid &= ~self._failed_rows.view(-1, k).any(1).repeat_interleave(k)[mine]
        completion_mask = out["completion_mask"]
        if self.mask_truncated_completions:
            valid = valid & completion_mask.any(1)
        if self._without_tokens:  # the end that TRL was given was not sampled: S = 0
            completion_mask[self._without_tokens] = 0
        rows = torch.arange(first_row, first_row + n, device=rewards.device)
        return GroupBatch.from_padded(
            torch.cat([out["prompt_ids"], out["completion_ids"]], 1),
            torch.cat([out["prompt_mask"], completion_mask], 1),
            torch.cat([torch.zeros_like(out["prompt_mask"]), completion_mask * out.get("tool_mask", 1)], 1),
            rewards,
            first_group + rows // k,
            valid=valid,
            images=pictures,
        )

    def _sample(self, inputs: list[dict[str, Any]]) -> Generation:
        batch = self._generate_and_score_completions(inputs)
        first_row = self.accelerator.process_index * len(inputs)
        components = self._rewards_seen[first_row : first_row + len(inputs)]
        return Generation(batch, components, self._given)

    # ------------------------------------------------------------------------------------------- metrics

    @property
    def _mode(self) -> str:
        return "train" if self.model.training else "eval"

    def _log(self, shares: Mapping[str, Share]) -> None:
        """Log what each process has a share of."""
        for name, value in gathered(shares, self.accelerator.gather, self.accelerator.device).items():
            self._metrics[self._mode][name].append(value)
