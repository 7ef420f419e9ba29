"""Prompt data sets with verifiable answers, for TRL and verl alike."""

from gvpo.data.prompts import iterate_prompts, load_prompts

__all__ = ["iterate_prompts", "load_prompts"]
