"""GVPO on verl: `python -m gvpo.verl <Hydra overrides>`. Importing this package imports no engine."""

TRAINERS = ("sync", "colocate_async", "separate_async")  # verl's names
