"""GVPO in Hugging Face TRL: change `GRPOConfig` and `GRPOTrainer` to `GVPOConfig` and `GVPOTrainer`."""

from gvpo.trl.config import GVPOConfig
from gvpo.trl.trainer import GVPOTrainer

__all__ = ["GVPOConfig", "GVPOTrainer"]
