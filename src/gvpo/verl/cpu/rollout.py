"""A rollout server on Hugging Face `generate` for verl 0.9: whatever requests wait go into one batch."""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

import ray
import torch
from verl.workers.rollout.base import BaseRollout
from verl.workers.rollout.replica import RolloutReplica, TokenOutput

from gvpo.verl.cpu.sampling import Response, Sampling, row_seed, sample

_MAX_ROWS = 512  # of one batch
_GATHER_SECONDS = 0.02  # how long the first of a batch waits for company


class _Request(NamedTuple):
    prompt: tuple[int, ...]
    sampling: Sampling
    seed: int
    answer: asyncio.Future[Response]


class HFServer:
    """The actor that holds a whole copy of the model at `path`."""

    def __init__(self, path: str, response_length: int, seed: int) -> None:
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(1)
        self.model = AutoModelForCausalLM.from_pretrained(
            path, attn_implementation="eager", dtype=torch.float32
        ).eval()
        self.response_length, self.seed = response_length, seed
        self.version: int | None = None
        self._seen: Counter[tuple[int, ...]] = Counter()
        self._waiting: list[_Request] = []
        self._worker: asyncio.Task[None] | None = None

    async def load_weights(self, weights: dict[str, torch.Tensor], version: int | None) -> None:
        """Take over the trainer's weights, all of them."""
        missing, unexpected = self.model.load_state_dict(weights, strict=False)
        self.model.tie_weights()
        missing = set(missing) - set(getattr(self.model, "all_tied_weights_keys", ()))
        if missing or unexpected:
            raise RuntimeError(
                "The trainer's weights do not fit the rollout's model: "
                f"{sorted(missing)} are missing, {sorted(unexpected)} unknown."
            )
        self.version = version
        self._seen.clear()

    async def generate(
        self, request_id: str, prompt_ids: Any, sampling_params: dict[str, Any], **_: Any
    ) -> TokenOutput:
        """verl's request for one response."""
        prompt = tuple(int(token) for token in prompt_ids)
        # The n-th response to a prompt under these weights is always the same, however requests are batched.
        seed = row_seed(self.seed, self.version, prompt, self._seen[prompt])
        self._seen[prompt] += 1
        sampling = Sampling.from_verl(sampling_params, self.response_length)
        request = _Request(prompt, sampling, seed, asyncio.get_running_loop().create_future())
        self._waiting.append(request)
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._serve())
        response = await request.answer
        return TokenOutput(
            token_ids=response.tokens,
            log_probs=response.logps,
            stop_reason="completed" if response.ended else "length",
            num_preempted=0,
            extra_fields={"global_steps": self.version},
        )

    async def _serve(self) -> None:
        while self._waiting:
            await asyncio.sleep(_GATHER_SECONDS)
            sampling = self._waiting[0].sampling
            batch = [request for request in self._waiting if request.sampling == sampling][:_MAX_ROWS]
            self._waiting = [request for request in self._waiting if request not in batch]
            prompts, _, seeds, answers = zip(*batch, strict=True)
            try:
                responses = await asyncio.to_thread(sample, self.model, prompts, sampling, seeds)
            except Exception as error:
                for answer in answers:
                    answer.set_exception(error)
                continue
            for answer, response in zip(answers, responses, strict=True):
                answer.set_result(response)

    async def _nothing(self, *_: Any, **__: Any) -> None:
        """There is no memory to give back and nothing to profile."""

    wake_up = sleep = clear_kv_cache = release_kv_cache = resume_kv_cache = _nothing
    abort_all_requests = resume_generation = start_profile = stop_profile = _nothing


class HFReplica(RolloutReplica):
    """One server, whatever the number of workers that it serves."""

    async def launch_servers(self) -> None:
        name = _server_name(self.replica_rank)
        server = (
            ray.remote(HFServer)
            .options(name=name, num_cpus=0, num_gpus=0, max_concurrency=self.max_concurrency)
            .remote(self.model_config.path, self.config.response_length, self.config.seed + self.replica_rank)
        )
        await server.clear_kv_cache.remote()
        self.servers = [server]
        self._server_handle, self._server_address = server, name


class HFServerAdapter(BaseRollout):
    """The trainer's side: the first worker of a replica sends it the weights through Ray's object store."""

    def __init__(self, config: Any, model_config: Any, device_mesh: Any, replica_rank: int = -1) -> None:
        super().__init__(config, model_config, device_mesh)
        rank = int(os.environ["RANK"])
        size = self.config.tensor_model_parallel_size * self.config.data_parallel_size
        self.replica_rank = rank // size if replica_rank == -1 else replica_rank
        self.leads = rank % size == 0
        self.sleep_level = 2

    async def resume(self, tags: list[str]) -> None:
        pass

    async def release(self) -> None:
        pass

    async def update_weights(
        self, weights: Iterable[tuple[str, torch.Tensor]], wire_format: str = "named_tensors", **kwargs: Any
    ) -> None:
        if wire_format != "named_tensors":
            raise NotImplementedError(f"The Hugging Face rollout takes whole tensors, not {wire_format}.")
        # Every rank has to walk through: each tensor is put together from all of them.
        whole = {name: tensor.detach().float().cpu().clone() for name, tensor in weights}
        if self.leads:
            server = ray.get_actor(_server_name(self.replica_rank))
            await server.load_weights.remote(whole, kwargs.get("global_steps"))


def _server_name(replica_rank: int) -> str:
    return f"gvpo_hf_server_{replica_rank}"
