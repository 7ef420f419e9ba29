"""GVPO on verl: `python -m gvpo.verl <Hydra overrides>`. Importing this package imports no engine."""
