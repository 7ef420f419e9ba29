"""The private names of TRL and transformers that `gvpo.trl` leans on, asserted at import."""

from __future__ import annotations

import trl
from trl import GRPOTrainer

_METHODS = [
    "_calculate_rewards", "_clip_grad_norm", "_compute_loss", "_generate_and_score_completions",
    "_generate_single_turn", "_get_grad_norm", "_get_output_dir", "_get_train_sampler",
    "_load_from_checkpoint", "_load_optimizer_and_scheduler", "_prepare_inputs", "_push_from_checkpoint",
    "_save_checkpoint", "training_step",
]  # fmt: skip
_ATTRIBUTES = [
    "_buffered_inputs", "_logs", "_metrics", "_step", "mask_truncated_completions",
    "num_generations_eval", "ref_model", "reward_funcs", "reward_weights", "temperature",
]  # fmt: skip


def assert_names() -> None:
    """Raise an ImportError that says what this version of TRL lacks."""
    missing = [name for name in _METHODS if not hasattr(GRPOTrainer, name)]
    # What `__init__` assigns stands among the names of its code.
    assigned = GRPOTrainer.__init__.__code__.co_names
    missing += [name for name in _ATTRIBUTES if name not in assigned]
    if missing:
        raise ImportError(
            f"gvpo.trl works with TRL 1.10 to 1.16; in TRL {trl.__version__} the GRPOTrainer has no "
            f"{', '.join(missing)}. Install a version between, or tell the GVPO developers of the new one."
        )


assert_names()
