"""Memory that runs out in the middle of a step."""

import torch
import torch.distributed as dist
from torch import Tensor

from gvpo.step import Backend


class OutOfMemory(Backend):
    """Runs out of memory after a micro-batch's backward: at each try after the next one of `at`."""

    def __init__(self, at: list[int], process_group: dist.ProcessGroup | None = None) -> None:
        super().__init__(process_group)
        self.at, self.index = at, 0

    def backward(self, loss: Tensor, *, last: bool) -> None:
        super().backward(loss, last=last)
        fails = self.index in self.at[:1]
        self.index = 0 if last or fails else self.index + 1
        if fails:
            self.at.pop(0)
            raise torch.OutOfMemoryError("injected")
