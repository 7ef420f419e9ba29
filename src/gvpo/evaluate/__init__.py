"""Evaluation of models on verifiable problems, and reports on runs."""

from gvpo.evaluate.statistics import Comparison, Estimate, bootstrap, majority_correct, paired_test, pass_at_k

__all__ = ["Comparison", "Estimate", "bootstrap", "majority_correct", "paired_test", "pass_at_k"]
