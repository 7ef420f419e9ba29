"""What importing verl does in every process of a run: `gvpo.verl.main` names this module to verl.

Where TRL is installed, verl 0.9 and before reach into TRL's model with a value head, which TRL 1.16 no longer
has. GVPO has no critic and needs none: verl is told that there is no TRL.
"""

from __future__ import annotations

import sys

import verl.utils.import_utils


def _no_trl() -> bool:
    return False


verl.utils.import_utils.is_trl_available = _no_trl
for _name in ("verl.models.transformers.monkey_patch", "verl.utils.model"):
    if _name in sys.modules:  # it has taken the name over already
        sys.modules[_name].is_trl_available = _no_trl  # type: ignore[attr-defined]
