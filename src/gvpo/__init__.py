"""Group Variance Policy Optimization (arXiv 2504.19599): the exact core.

The engines live in `gvpo.trl` and are imported only when asked for.
"""

from gvpo._version import __version__
from gvpo.objective import GVPOLoss, gvpo_loss, gvpo_weights

__all__ = ["GVPOLoss", "__version__", "gvpo_loss", "gvpo_weights"]
