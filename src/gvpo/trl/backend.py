"""How `GVPOStep` makes and shares gradients under accelerate: DDP, FSDP, mixed precision, loss scaling."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn

from gvpo.step import Backend


class AccelerateBackend(Backend):
    """Gradients through an `accelerate.Accelerator`."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        # By which accelerate divides what it is given; transformers sets more than 1 before 5.5.4.
        accelerator.gradient_accumulation_steps = 1
        super().__init__(dist.group.WORLD if accelerator.num_processes > 1 else None)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        kwargs: dict[str, Any] = {}
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            kwargs["scale_wrt_gas"] = False
        # DeepSpeed steps its engine on every backward that it takes for a synchronised one.
        self.accelerator.gradient_state._set_sync_gradients(last)
        try:
            self.accelerator.backward(loss, **kwargs)
        finally:
            self.accelerator.gradient_state._set_sync_gradients(True)

    def without_sync(self, model: nn.Module) -> AbstractContextManager:
        return self.accelerator.no_sync(model)

    def forward_context(self) -> AbstractContextManager:
        # accelerate casts inside the model's own forward, which the fused head goes around.
        return self.accelerator.autocast()

    def averaged_over(self, model: nn.Module) -> int:
        return self.accelerator.num_processes

    def collective_forward(self, model: nn.Module) -> bool:
        sharded = (DistributedType.FSDP, DistributedType.DEEPSPEED)
        return self.accelerator.distributed_type in sharded
