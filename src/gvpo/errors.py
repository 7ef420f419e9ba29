"""The one exception for bad input."""

from collections.abc import Iterator
from contextlib import contextmanager


class InputError(ValueError):
    """Input from the user that cannot be used.

    Its message is one sentence that says what is wrong, where, and what to do. The command line prints it
    (after `details`, such as the traceback of a user's own function) and exits with code 2.
    """

    def __init__(self, message: str, *, details: str = "") -> None:
        super().__init__(message)
        self.details = details


class NonFiniteError(ValueError):
    """A log-probability, a reward or a gradient of a step is not a finite number."""


_VERL = {"verl", "ray", "hydra", "omegaconf", "tensordict", "transfer_queue"}


def missing_extra(error: ModuleNotFoundError) -> InputError:
    """The sentence for a module that an extra of this package would have brought.

    Raises:
        ModuleNotFoundError: the error itself, where the missing module is one of our own.
    """
    module = (error.name or "").partition(".")[0]
    if module in {"", "gvpo"}:
        raise error
    extra = "verl" if module in _VERL else "trl"
    return InputError(f"The module {module} is not installed: pip install 'gvpo[{extra}]' brings it.")


def first_line(error: BaseException) -> str:
    """An error's message as a part of a sentence."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


@contextmanager
def refused(
    what: str, advice: str, kinds: type[Exception] | tuple[type[Exception], ...] = Exception
) -> Iterator[None]:
    """Errors of these kinds become the sentence "WHAT (REASON): ADVICE."."""
    try:
        yield
    except InputError:
        raise
    except kinds as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise InputError(f"{what} ({reason}): {advice}.") from error
