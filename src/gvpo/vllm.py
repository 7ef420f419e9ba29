"""What vLLM lacks on a CPU, by its own registries: a plugin and a worker extension.

vLLM loads `register` in each of its processes (entry point `vllm.general_plugins`); on a GPU it does nothing.
What it steers around, and how it is to be mended there: docs/upstream/vllm-cpu-weights.md.
"""

import warnings
from typing import Any


def register() -> None:
    """Keep the weights of vLLM's CPU layers plain, so that they can be loaded again.

    vLLM packs them for its kernels and empties the parameter: loading them again fails, or leaves a head that
    is tied to the embedding as it was, without a word.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    from torch.nn.functional import linear
    from vllm.model_executor.layers import utils

    pack = getattr(utils, "dispatch_cpu_unquantized_gemm", None)
    if pack is None:
        warnings.warn(
            "This vLLM packs the weights of CPU layers in a way that gvpo does not know: train with it on "
            "a GPU, or take vLLM 0.31.",
            stacklevel=2,
        )
        return

    def keep(layer: Any, remove_weight: bool) -> None:
        if layer.weight.is_meta or layer.weight.ndim != 2:
            pack(layer, remove_weight)
        else:
            layer.cpu_linear = linear

    utils.dispatch_cpu_unquantized_gemm = keep


class WeightFile:
    """A worker that loads weights from a file: `vllm serve … --worker-extension-cls gvpo.vllm.WeightFile`."""

    model_runner: Any  # vLLM's

    def load_weight_file(self, path: str) -> None:
        """Load the safetensors file at `path`, whose names are those of the trained model."""
        from safetensors.torch import load_file

        self.model_runner.model.load_weights(load_file(path).items())
