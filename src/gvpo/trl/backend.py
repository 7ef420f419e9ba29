"""How `GVPOStep` makes and shares gradients under accelerate: DDP, FSDP, mixed precision, loss scaling."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from accelerate.utils import DistributedType
from torch import Tensor, nn

from gvpo.step import Backend

if TYPE_CHECKING:
    from transformers import Trainer


class AccelerateBackend(Backend):
    """Gradients through the accelerator of a transformers `Trainer`."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        several = trainer.accelerator.num_processes > 1
        super().__init__(dist.group.WORLD if several else None)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        accelerator = self.trainer.accelerator
        kwargs: dict[str, Any] = {}
        if accelerator.distributed_type == DistributedType.DEEPSPEED:
            kwargs["scale_wrt_gas"] = False
        # DeepSpeed steps its engine on every backward that it takes for a synchronised one.
        accelerator.gradient_state._set_sync_gradients(last)
        try:
            accelerator.backward(loss, **kwargs)
        finally:
            accelerator.gradient_state._set_sync_gradients(True)

    def without_sync(self, model: nn.Module) -> AbstractContextManager:
        return self.trainer.accelerator.no_sync(model)

    @contextmanager
    def forward_context(self) -> Iterator[None]:
        # accelerate casts inside the model's own forward, which the fused head goes around.
        with self.trainer.compute_loss_context_manager(), self.trainer.accelerator.autocast():
            yield

    def averaged_over(self, model: nn.Module) -> int:
        return self.trainer.accelerator.num_processes

    def collective_forward(self, model: nn.Module) -> bool:
        sharded = (DistributedType.FSDP, DistributedType.DEEPSPEED)
        return self.trainer.accelerator.distributed_type in sharded
