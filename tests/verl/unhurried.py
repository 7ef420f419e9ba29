"""Makes the CPU rollout slow and the newest request first; verl imports this in every process.

So an update finds a batch at work, and what it interrupts, which verl asks for again a second later, comes
before the step's new prompts, which alone would be enough for the next update.
"""

from gvpo.verl.cpu import sampling

SECONDS = 0.05  # a token, in the first batch after new weights:
SLOWER = 1.2  # each batch after it takes longer, so that an update of any length finds one at work

_oldest_first = sampling.next_batch


class _Unhurried(sampling._Stop):
    batches = 0  # since the last abort

    def __init__(self, event):
        super().__init__(event)
        _Unhurried.batches += 1

    def __call__(self, *arguments, **named):
        if self.event.wait(SECONDS * SLOWER**self.batches):
            _Unhurried.batches = 0
        return super().__call__(*arguments, **named)


def _newest_first(waiting, most):
    return _oldest_first(waiting[::-1], most)


sampling._Stop = _Unhurried
sampling.next_batch = _newest_first
