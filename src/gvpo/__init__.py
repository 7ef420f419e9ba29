"""Group Variance Policy Optimization (arXiv 2504.19599): the exact core.

The engines live in `gvpo.trl` and `gvpo.verl` and are imported only when asked for.
"""

from typing import TYPE_CHECKING, Any

from gvpo._version import __version__
from gvpo.objective import GVPOLoss, gvpo_loss, gvpo_weights

if TYPE_CHECKING:
    from gvpo.batch import GroupBatch
    from gvpo.scoring import SequenceScorer
    from gvpo.step import GVPOStep

__all__ = [
    "GVPOLoss",
    "GVPOStep",
    "GroupBatch",
    "SequenceScorer",
    "__version__",
    "gvpo_loss",
    "gvpo_weights",
]


def __getattr__(name: str) -> Any:
    # Not at import: the step brings torch.distributed, a second for which the command line need not wait.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from gvpo import step

    return getattr(step, name)
