"""Makes the CPU rollout take its time, so that updates overtake it; verl imports this in every process."""

import time

from transformers import LogitsProcessor, LogitsProcessorList

from gvpo.verl.cpu.sampling import Sampling

SECONDS = 0.05  # a token

_processors = Sampling.processors


class _Nap(LogitsProcessor):
    def __call__(self, input_ids, scores):
        time.sleep(SECONDS)
        return scores


def _slowly(self, seeds):
    return LogitsProcessorList([_Nap(), *_processors(self, seeds)])


Sampling.processors = _slowly
