"""The same training as `train`, with vLLM in the process: `--model FOLDER`, where vllm is installed."""

from __future__ import annotations

import importlib.util

from benchmarks.gpu import Part, train

ABOUT = train.ABOUT + " Generation by vLLM in colocate mode, 30 % of the memory."


def run(part: Part) -> None:
    what = {"what": "GVPOTrainer, vLLM colocate"}
    if importlib.util.find_spec("vllm") is None:
        part.add({**what, "note": "vllm is not installed: nothing was run"})
    elif part.model is None:
        part.add({**what, "note": "no model was given: --model FOLDER"})
    else:
        options = {"use_vllm": True, "vllm_mode": "colocate", "vllm_gpu_memory_utilization": 0.3}
        part.attempt(what, lambda: train.train(part, **options))
