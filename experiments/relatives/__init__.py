"""GVPO beside its relatives (docs/relatives.md): formulas in `losses.py`, `beside.py` the experiment."""

from experiments.relatives.beside import draw, jobs, run_job, summary, tables

__all__ = ["draw", "jobs", "run_job", "summary", "tables"]
