"""Weights on their way from the trainer to a rollout server on a CPU."""

import asyncio

import torch

from gvpo.verl.cpu.rollout import RayCheckpointEngine


class Line(asyncio.Queue):
    """As `ray.util.queue.Queue`, within a process."""

    put_async, get_async = asyncio.Queue.put, asyncio.Queue.get


def test_weights_that_a_lost_server_left_are_passed_over():
    async def received():
        line = Line()
        trainer, server = RayCheckpointEngine(1, is_master=True), RayCheckpointEngine(1)
        trainer.init_process_group(line, receivers=2)
        server.init_process_group(line, receivers=2)
        for step in (1, 2):
            await trainer.send_weights([("w", torch.tensor([float(step)]))], global_steps=step)
        return [{n: float(w) async for n, w in server.receive_weights(global_steps=2)} for _ in range(2)]

    assert asyncio.run(received()) == [{"w": 2.0}, {"w": 2.0}]
