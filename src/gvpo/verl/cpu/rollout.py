"""A rollout server on Hugging Face `generate` for verl 0.9: whatever requests wait go into one batch.

The trainer's weights come through Ray's object store, from the same workers or from others (verl's checkpoint
engines, without NCCL).
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections import Counter
from collections.abc import AsyncIterable, AsyncIterator, Iterable
from typing import Any

import ray
import torch
from ray.util.queue import Queue
from verl.checkpoint_engine.base import CheckpointEngine, CheckpointEngineRegistry
from verl.workers.rollout.base import BaseRollout
from verl.workers.rollout.replica import RolloutReplica, TokenOutput
from verl.workers.rollout.utils import ensure_async_iterator

from gvpo.verl.cpu.sampling import Request, Response, Sampling, next_batch, row_seed, sample

Weights = Iterable[tuple[str, torch.Tensor]] | AsyncIterable[tuple[str, torch.Tensor]]

_GATHER_SECONDS = 0.02  # how long the first of a batch waits for company


class HFServer:
    """The actor that holds a whole copy of the model at `path`; it serves `most` requests at a time."""

    def __init__(self, path: str, response_length: int, seed: int, most: int) -> None:
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(1)
        self.model = AutoModelForCausalLM.from_pretrained(
            path, attn_implementation="eager", dtype=torch.float32
        ).eval()
        self.response_length, self.seed, self.most = response_length, seed, most
        self.version: int | None = None
        self._seen: Counter[tuple[int, ...]] = Counter()
        self._waiting: list[Request] = []
        self._worker: asyncio.Task[None] | None = None
        self._stop = threading.Event()  # ends what is being generated at its next token
        self._open = asyncio.Event()  # new requests wait for it,
        self._open.set()
        self._rejects = False  # unless they are to go elsewhere

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
        """verl's request for one response; where it is aborted, what there is of it."""
        if self._rejects:
            return _output(Response([], [], "aborted"), self.version)
        await self._open.wait()
        prompt = tuple(int(token) for token in prompt_ids)
        # The n-th response to a prompt under these weights is always the same, however requests are batched.
        seed = row_seed(self.seed, self.version, prompt, self._seen[prompt])
        self._seen[prompt] += 1
        sampling = Sampling.from_verl(sampling_params, self.response_length)
        request = Request(prompt, sampling, seed, asyncio.get_running_loop().create_future())
        self._waiting.append(request)
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._serve())
        version = self.version
        return _output(await request.answer, version)

    async def _serve(self) -> None:
        while self._waiting:
            await asyncio.sleep(_GATHER_SECONDS)
            if self._stop.is_set():
                for request in self._waiting:
                    request.answer.set_result(Response([], [], "aborted"))
                self._waiting = []
                return
            batch = next_batch(self._waiting, self.most)
            self._waiting = [request for request in self._waiting if request not in batch]
            prompts, (sampling, *_), seeds, answers = zip(*batch, strict=True)
            try:
                responses = await asyncio.to_thread(sample, self.model, prompts, sampling, seeds, self._stop)
            except Exception as error:
                for answer in answers:
                    answer.set_exception(error)
                continue
            for answer, response in zip(answers, responses, strict=True):
                answer.set_result(response)

    async def abort_all_requests(self, reject_request: bool = False) -> None:
        """Answer all requests with what there is by now; later ones wait for `resume_generation`.

        With `reject_request` they are answered with nothing, so that the client asks another server.
        """
        self._rejects = reject_request
        self._open.clear()
        self._stop.set()
        if self._worker is not None:
            await self._worker

    async def resume_generation(self) -> None:
        """Generate again."""
        self._rejects = False
        self._stop.clear()
        self._open.set()

    async def _nothing(self, *_: Any, **__: Any) -> None:
        """There is no memory to give back and nothing to profile."""

    wake_up = sleep = clear_kv_cache = release_kv_cache = resume_kv_cache = _nothing
    start_profile = stop_profile = _nothing


def _output(response: Response, version: int | None) -> TokenOutput:
    return TokenOutput(
        token_ids=response.tokens,
        log_probs=response.logps,
        stop_reason=response.reason,
        num_preempted=0,
        extra_fields={"global_steps": version},
    )


class HFReplica(RolloutReplica):
    """One server, whatever the number of workers that it serves."""

    async def launch_servers(self) -> None:
        name, config = _server_name(self.replica_rank), self.config
        actor = ray.remote(HFServer).options(
            name=name, num_cpus=0, num_gpus=0, max_concurrency=self.max_concurrency
        )
        seed = config.seed + self.replica_rank
        server = actor.remote(self.model_config.path, config.response_length, seed, config.max_num_seqs)
        await server.clear_kv_cache.remote()
        self.servers = [server]
        self._server_handle, self._server_address = server, name


class HFServerAdapter(BaseRollout):
    """The workers' side: the first of a replica's sends it the weights."""

    def __init__(self, config: Any, model_config: Any, device_mesh: Any, replica_rank: int = -1) -> None:
        super().__init__(config, model_config, device_mesh)
        rank = int(os.environ["RANK"])
        size = self.config.tensor_model_parallel_size * self.config.data_parallel_size
        self.replica_rank = rank // size if replica_rank == -1 else replica_rank
        self.leads = rank % size == 0

    async def resume(self, tags: list[str]) -> None:
        pass

    async def release(self) -> None:
        pass

    async def update_weights(self, weights: Weights, **kwargs: Any) -> None:
        whole = await _whole(weights)
        if self.leads:
            server = ray.get_actor(_server_name(self.replica_rank))
            await server.load_weights.remote(whole, kwargs.get("global_steps"))


@CheckpointEngineRegistry.register("ray")
class RayCheckpointEngine(CheckpointEngine):
    """verl's `checkpoint_engine.backend=ray`: the first worker queues the model, once a receiver."""

    _queue: Queue | None = None  # of the driver

    def __init__(self, bucket_size: int, is_master: bool = False) -> None:
        self.is_master = is_master

    def prepare(self) -> dict[str, Any]:
        return {}

    @classmethod
    def build_topology(
        cls, actor_wg_world_size: int, rollout_world_size: int, metadata: list[dict]
    ) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
        if cls._queue is None:
            cls._queue = Queue(actor_options={"num_cpus": 0})
        each = {"queue": cls._queue, "receivers": rollout_world_size}
        sizes = (actor_wg_world_size, rollout_world_size)
        actors, rollouts = ({name: [value] * n for name, value in each.items()} for n in sizes)
        return actors, rollouts

    def init_process_group(self, queue: Queue, receivers: int) -> None:
        self.queue, self.receivers = queue, receivers

    def finalize(self) -> None:
        pass

    async def send_weights(self, weights: Weights, global_steps: int | None = None) -> None:
        whole = await _whole(weights)
        for _ in range(self.receivers if self.is_master else 0):
            await self.queue.put_async((global_steps, whole))

    async def receive_weights(
        self, global_steps: int | None = None
    ) -> AsyncIterator[tuple[str, torch.Tensor]]:
        version, whole = await self.queue.get_async()
        while version != global_steps:  # left by a receiver that is gone
            version, whole = await self.queue.get_async()
        for item in whole.items():
            yield item


async def _whole(weights: Weights) -> dict[str, torch.Tensor]:
    # Every rank has to walk through: each tensor is put together from all of them.
    pairs = ensure_async_iterator(weights)
    return {name: tensor.detach().float().cpu().clone() async for name, tensor in pairs}


def _server_name(replica_rank: int) -> str:
    return f"gvpo_hf_server_{replica_rank}"
