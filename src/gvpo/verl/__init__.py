"""GVPO on verl: `python -m gvpo.verl <Hydra overrides>`. Importing this package imports no engine."""

import os

TRAINERS = ("sync", "colocate_async", "separate_async")  # verl's names
EXTERNAL = "VERL_USE_EXTERNAL_MODULES"


def have_verl_import(module: str) -> str:
    """Have verl import our `module`, in this process and its children; returns all that it is to import."""
    others = [name for name in os.environ.get(EXTERNAL, "").split(",") if name]
    os.environ[EXTERNAL] = ",".join(dict.fromkeys([*others, module]))
    return os.environ[EXTERNAL]
