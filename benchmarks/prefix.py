"""What running a group's prompt once in the update would give: an estimate, not a feature.

The k rows of a group run their prompt k times. Sharing it would save at most (k−1)/k of what prompts cost,
which is the time of a step less that of the same completions after prompts of one token.
"""

from __future__ import annotations

from dataclasses import replace

from benchmarks.measure import Row, laps_of, minima
from benchmarks.workloads import GROUP, PER_DEVICE, Workload
from gvpo.step import GVPOStep

ABOUT = (
    "CPU seconds of a free step (64 rows in groups of 8, completions of 64 tokens, 4 layers, d 256, one "
    "thread), the same after prompts of one token, and the most that sharing each group's prompt in the "
    "update could save: (k−1)/k of the difference."
)

WORK = Workload(heavy_tail=False)


def measure(vocabulary: int, length: int, work: Workload, repeats: int) -> Row:
    jobs = {}
    for name, prompt in (("whole", length), ("short", 1)):
        sized = replace(work, vocabulary=vocabulary, prompt_length=prompt)
        step = GVPOStep(sized.model(), token_budget=PER_DEVICE * (length + work.mean_length))
        batch = sized.batch()

        def job(step: GVPOStep = step, batch=batch) -> list[float]:
            step.model.zero_grad(set_to_none=True)
            laps = laps_of(step)
            step(batch)
            laps()
            return laps.seconds

        jobs[name] = job
    best = minima(jobs, repeats)
    saved = (best["whole"] - best["short"]) * (GROUP - 1) / GROUP
    return {
        "vocabulary": vocabulary,
        "prompt tokens": length,
        "step s": best["whole"],
        "prompts of one token s": best["short"],
        "sharing would save at most": saved / best["whole"],
    }


def run(small: bool, repeats: int = 4) -> list[Row]:
    if small:
        return [measure(97, 8, replace(WORK, hidden=16, layers=1, rows=16, mean_length=8, max_length=24), 1)]
    return [measure(32_000, length, WORK, repeats) for length in (16, 64, 256, 1024)]
