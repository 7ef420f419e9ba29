"""verl 0.6.0 on CPUs, for this test alone: what it asks of an accelerator, and a Hugging Face rollout.

verl imports this module in every process when VERL_USE_EXTERNAL_MODULES names it. Nothing of what is tested
is touched: trainer, actor, loss and optimizer are verl's.
"""

import contextlib
import os

import torch
import torch.distributed as dist
import verl.utils.device
import verl.utils.profiler.performance
from transformers import AutoModelForCausalLM
from verl.workers.rollout.base import _ROLLOUT_REGISTRY, BaseRollout
from verl.workers.rollout.hf_rollout import HFRollout


def _nothing(*_, **__):
    return None


def _zero(*_, **__):
    return 0


for _name in ("memory_allocated", "memory_reserved", "max_memory_allocated", "max_memory_reserved"):
    setattr(torch.cpu, _name, _zero)
for _name in ("empty_cache", "ipc_collect", "reset_peak_memory_stats"):
    setattr(torch.cpu, _name, _nothing)
torch.cpu.get_rng_state = lambda *_: torch.get_rng_state()
torch.cpu.set_rng_state = lambda state, *_: torch.set_rng_state(state)
torch.cpu.manual_seed = lambda seed: _nothing(torch.manual_seed(seed))
torch.cpu.mem_get_info = lambda *_: (1 << 33, 1 << 34)
torch.cpu.get_device_name = lambda *_: "CPU"
# Gradients are compared in float32, and verl 0.6.0 computes in bfloat16 wherever it can.
torch.autocast = lambda *_, **__: contextlib.nullcontext()
verl.utils.device.get_nccl_backend = lambda: "gloo"

_init_process_group = dist.init_process_group


def _init(backend=None, *args, **kwargs):
    # One device type twice is an error in torch.
    return _init_process_group("cpu:gloo" if backend == "cpu:gloo,cpu:gloo" else backend, *args, **kwargs)


def _times(seconds, k=10):
    # gloo does not gather numbers without a dimension.
    mine = torch.tensor([seconds])
    every = [torch.zeros(1) for _ in range(dist.get_world_size())]
    dist.all_gather(every, mine)
    return 0.0, min(every).item(), max(every).item()


class HFSyncRollout(HFRollout):
    """Each worker generates with a whole copy of the model."""

    def __init__(self, config, model_config, device_mesh):
        BaseRollout.__init__(self, config, model_config, device_mesh)
        self.module = AutoModelForCausalLM.from_pretrained(
            model_config.local_path, attn_implementation="eager", dtype=torch.float32
        ).eval()
        self.sleep_level = 2
        torch.manual_seed(int(os.environ["RANK"]))

    async def resume(self, tags):
        pass

    async def release(self):
        pass

    async def update_weights(self, weights, **_):
        missing, unexpected = self.module.load_state_dict(dict(weights), strict=False)
        assert set(missing) <= {"lm_head.weight"}, missing
        assert not unexpected, unexpected


dist.init_process_group = _init
verl.utils.profiler.performance.topk_reduce_ratio_min_max = _times
_ROLLOUT_REGISTRY["hf", "sync"] = f"{__name__}.HFSyncRollout"
