"""Verifiable rewards: what a completion's final answer is, and whether it is right."""

from gvpo.rewards.extraction import Answer, extract_answer
from gvpo.rewards.functions import accuracy, compute_score, exact, format, length, reasoning_gym
from gvpo.rewards.pool import VerifierPool
from gvpo.rewards.registry import REWARDS, combine, load_reward
from gvpo.rewards.verification import Verdict, answers_equal, verify

__all__ = [
    "REWARDS",
    "Answer",
    "Verdict",
    "VerifierPool",
    "accuracy",
    "answers_equal",
    "combine",
    "compute_score",
    "exact",
    "extract_answer",
    "format",
    "length",
    "load_reward",
    "reasoning_gym",
    "verify",
]
