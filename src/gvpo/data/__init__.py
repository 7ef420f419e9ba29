"""Prompt data sets with verifiable answers, for TRL and verl alike."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gvpo.data.prompts import iterate_prompts, load_prompts

__all__ = ["iterate_prompts", "load_prompts"]


def __getattr__(name: str) -> Any:
    # Not at import: the command line needs this package's command alone, and `datasets` takes a second.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from gvpo.data import prompts

    return getattr(prompts, name)
