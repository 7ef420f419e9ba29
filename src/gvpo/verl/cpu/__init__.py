"""verl without a GPU: a CPU platform and a Hugging Face rollout, registered from outside verl 0.9.

`python -m gvpo.verl +machine=cpu …` is all that it takes: the settings are in `gvpo/verl/config/machine`, and
verl imports `gvpo.verl.cpu.register` in every process since `use()` names it in VERL_USE_EXTERNAL_MODULES.
For trying verl on a laptop and for tests; nothing here is fast.
"""

from __future__ import annotations

import os

from gvpo.verl import EXTERNAL, have_verl_import

MODULE = "gvpo.verl.cpu.register"
OVERRIDE = "+machine=cpu"


def use() -> dict[str, str]:
    """Set up this process and its children for verl on CPUs; call it before verl is imported.

    Returns:
        The environment variables that were set, for Ray's `runtime_env` on other machines.
    """
    wanted = {
        EXTERNAL: have_verl_import(MODULE),
        "VERL_PLATFORM": "cpu",
        # The key under which verl keeps its FSDP engine; the engine itself asks the platform.
        "VERL_ENGINE_DEVICE": "cuda",
        # Ray would hide the pretended GPUs from actors that ask for none.
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "OMP_NUM_THREADS": "1",
        "TQ_NUM_THREADS": "1",
        # Ray makes its workers nice, which starves them on a busy laptop.
        "RAY_worker_niceness": "0",
        "TOKENIZERS_PARALLELISM": "false",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    os.environ.update(wanted)
    return wanted
