"""The one exception for bad input."""


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


def first_line(error: BaseException) -> str:
    """An error's message as a part of a sentence."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
