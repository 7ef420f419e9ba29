"""The one exception for bad input."""


class InputError(ValueError):
    """Input from the user that cannot be used.

    Its message is one sentence that says what is wrong, where, and what to do. The command line prints it
    and exits with code 2.
    """


class NonFiniteError(ValueError):
    """A log-probability, a reward or a gradient of a step is not a finite number."""
