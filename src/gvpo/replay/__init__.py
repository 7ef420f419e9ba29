"""Off-policy data for GVPO: experience replay, demonstrations, logged completions.

GVPO's optimum does not depend on who sampled the responses (docs/theory.md, fact 1), so they may be old, from
another model, or written by people. The one rule: all responses of a group are measured against the same
reference (fact 6).
"""

from gvpo.replay.buffer import ReplayBuffer
from gvpo.replay.group import Group, Response
from gvpo.replay.sampling import ReplayIndex
from gvpo.replay.view import ReplayView

__all__ = ["Group", "ReplayBuffer", "ReplayIndex", "ReplayView", "Response"]
