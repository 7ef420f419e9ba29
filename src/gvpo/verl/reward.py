"""The reward that `python -m gvpo.verl` uses unless told otherwise; verl loads this file by its path."""

from gvpo.rewards import compute_score

__all__ = ["compute_score"]
