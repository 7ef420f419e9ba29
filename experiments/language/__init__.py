"""A small language model, SmolLM2-135M-Instruct: GVPO beside TRL's trainers, on tasks with verified rewards.

`gvpo lab language --model FOLDER` runs it, on a CPU or with many processes on one GPU:

    tasks.py     the questions, and the rules that check answers
    sources.py   completions that are not the policy's: stale, logged, demonstrated
    methods.py   the trainers, and what they have in common
    measure.py   reward, KL to the start, entropy and different right answers, from samples
    optimum.py   where β aims: the same of π* ∝ π_ref·exp(R/β), from samples of the start
    jobs.py      the runs, shared out among processes; run.py starts those and collects
    report.py    tables and picture
"""

from experiments.language.report import draw

__all__ = ["draw"]
