"""vLLM as TRL makes it, with any of its arguments, and on a CPU too."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from requests import RequestException
from safetensors.torch import save_file
from trl.generation import vllm_generation
from trl.generation.vllm_client import VLLMClient

from gvpo.errors import InputError, first_line, refused
from gvpo.trl.checkpoint import last_checkpoint
from gvpo.trl.config import GVPOConfig
from gvpo.trl.resume import temporarily


class FileClient(VLLMClient):
    """Pushes weights to `vllm serve` through a file: TRL's own way, NCCL, needs GPUs.

    The server must see the same temporary folder, and have been started with `gvpo.vllm.WeightFile`.
    """

    def init_communicator(self, device: Any = 0) -> None:
        """Nothing to open."""

    def update_named_params(self, metadata: Any, named_params: Iterator[tuple[str, torch.Tensor]]) -> None:
        with TemporaryDirectory(prefix="gvpo-weights-") as folder:
            path = str(Path(folder, "weights.safetensors"))
            save_file({name: value.contiguous() for name, value in named_params}, path)
            self._post(f"{self.base_url}/collective_rpc", json={"method": "load_weight_file", "args": [path]})


@contextmanager
def engine_of(args: GVPOConfig) -> Iterator[None]:
    """Within this context TRL makes its vLLM engine, or the client of a server, as `args` say."""
    make = getattr(vllm_generation, "LLM", None)
    if not args.use_vllm or make is None:  # TRL says how to install it
        yield
        return
    own: Any = args.vllm_engine_kwargs or {}

    def engine(**kwargs: Any) -> Any:
        with refused(f"vllm_engine_kwargs={own} does not suit vLLM", "leave out what it names", TypeError):
            return make(**kwargs | own)

    client = FileClient if args.device.type == "cpu" else VLLMClient
    with temporarily(vllm_generation, LLM=engine, VLLMClient=client):
        yield


@contextmanager
def engine_errors(args: GVPOConfig) -> Iterator[None]:
    """Within this context a server that has gone, and prompts that vLLM refuses, are one sentence."""
    try:
        yield
    except RequestException as error:
        where = last_checkpoint(args.output_dir) or "the beginning: there is no checkpoint yet"
        raise InputError(
            f"vLLM's server is gone ({first_line(error)}): start it again, and go on from {where}."
        ) from error
    except Exception as error:
        # Of vLLM in this process, or, without a type of its own, of TRL's client.
        if type(error).__module__ != "vllm.exceptions" and not str(error).startswith("Request failed: 4"):
            raise
        raise InputError(
            f"vLLM does not take the prompts ({first_line(error)}): look at their lengths and at "
            "vllm_max_model_length, or at the server's --max-model-len."
        ) from error
