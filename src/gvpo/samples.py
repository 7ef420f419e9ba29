"""What prompts were answered over a training run: `samples.jsonl`, a line for each generation.

A line has the `step` (updates made until then), whether the prompts are `held_out`, the mean reward of every
prompt's completions in `rewards` (keys are digests), and `samples`: a completion each of the prompts that are
followed, which are the first few, or else of one prompt. So its size does not depend on the prompts' length.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, TypeVar

from gvpo.errors import InputError
from gvpo.run import read_metrics

SAMPLES = "samples.jsonl"
# Of trainer.rollout_data_dir and trainer.validation_data_dir in verl; which are held out.
VERL_FOLDERS = (("rollouts", False), ("validation", True))
_FOLLOWED = 6  # prompts of training, and as many held out
_MOST = 2000  # characters of a prompt and of a completion
Line = dict[str, Any]
T = TypeVar("T")


@dataclass(frozen=True)
class Sample:
    """A completion with its prompt and its reward, if it has one."""

    prompt: str
    completion: str
    reward: float | None


def sample_of(recorded: Mapping[str, Any]) -> Sample:
    """What stands in a line's `samples`."""
    return Sample(*(recorded[name] for name in ("prompt", "completion", "reward")))


class Recorder:
    """Makes lines of generations; the prompts followed are those of the first lines.

    Args:
        lines: made before.
    """

    def __init__(self, lines: Sequence[Line] = ()) -> None:
        self._followed: dict[bool, list[str]] = {False: [], True: []}
        for line in lines:
            self._follow(line["held_out"], [sample["key"] for sample in line["samples"]])

    def _follow(self, held_out: bool, keys: Sequence[str]) -> list[str]:
        followed = self._followed[held_out]
        followed += [key for key in keys if key not in followed][: _FOLLOWED - len(followed)]
        return followed

    def line(self, step: int, generation: Sequence[Sample], *, held_out: bool = False) -> Line:
        """The line of a generation, `step` updates into the run."""
        prompts: dict[str, list[Sample]] = {}
        for one in generation:
            key = hashlib.sha256(one.prompt.encode(errors="surrogatepass")).hexdigest()[:12]
            prompts.setdefault(key, []).append(one)
        chosen = [key for key in self._follow(held_out, list(prompts)) if key in prompts] or list(prompts)[:1]
        rewards = {key: [s.reward for s in given if s.reward is not None] for key, given in prompts.items()}
        return {
            "step": step,
            "held_out": held_out,
            "rewards": {key: round(fmean(given), 6) for key, given in rewards.items() if given},
            "samples": [{"key": key, **vars(_clipped(prompts[key][0]))} for key in chosen],
        }


def _clipped(sample: Sample) -> Sample:
    texts = (sample.prompt, sample.completion)
    half = _MOST // 2
    prompt, completion = (t if len(t) <= _MOST else f"{t[:half]}\n…\n{t[-half:]}" for t in texts)
    return Sample(prompt, completion, sample.reward)


def text_of(given: Any) -> str:
    """A prompt or completion as text: of a conversation the last message, images as such."""
    if isinstance(given, str) or not given:
        return given or ""
    content = given[-1].get("content") or ""
    if isinstance(content, str):
        return content
    return "".join(part.get("text") or f"[{part.get('type')}]" for part in content)


def read_samples(run: Path) -> list[Line]:
    """The lines of a run; of verl's, made from all the completions that it wrote.

    Raises:
        InputError: a file is damaged.
    """
    recorder, path = Recorder(), run / SAMPLES
    try:
        lines = [_checked(line) for line in read_metrics(path)]
        for folder, held_out in () if lines else VERL_FOLDERS:
            for path in sorted((run / folder).glob("*.jsonl"), key=lambda file: (len(file.stem), file.stem)):
                if rows := read_metrics(path):
                    generation = [Sample(row["input"], row["output"], float(row["score"])) for row in rows]
                    # verl counts the step that it is making, and validates after it.
                    step = rows[0]["step"] - (not held_out)
                    lines.append(recorder.line(step, generation, held_out=held_out))
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{path} does not hold samples as they were written: remove or repair it."
        ) from error
    return lines


def _checked(line: Line) -> Line:
    Recorder([line])
    samples = {one["key"]: sample_of(one) for one in line["samples"]}
    numbers = [line["step"], *line["rewards"].values(), *(one.reward or 0.0 for one in samples.values())]
    if not math.isfinite(sum(numbers)) or not all(isinstance(one.prompt, str) for one in samples.values()):
        raise ValueError
    return line


@dataclass
class Story:
    """A prompt and completions of it, early, in the middle and late in a run: step and sample."""

    prompt: str
    held_out: bool
    answers: list[tuple[int, Sample]] = field(default_factory=list)


def stories(lines: Sequence[Line]) -> list[Story]:
    """Of prompts that came again, three of their answers; where none did, other prompts in their place.

    At most six prompts of training, and as many held out.
    """
    found: dict[tuple[bool, str], Story] = {}
    for line in lines:
        for one in line["samples"]:
            story = found.setdefault((line["held_out"], one["key"]), Story(one["prompt"], line["held_out"]))
            story.answers.append((line["step"], sample_of(one)))
    again = [story for story in found.values() if story.answers[0][0] < story.answers[-1][0]]
    if not again:
        return _spread(list(found.values()))
    few = [
        one for held_out in (False, True) for one in [s for s in again if s.held_out == held_out][:_FOLLOWED]
    ]
    return [Story(one.prompt, one.held_out, _spread(one.answers)) for one in few]


def _spread(items: list[T]) -> list[T]:
    """The first, the middle and the last."""
    return [items[i] for i in sorted({0, len(items) // 2, len(items) - 1})] if items else []


def by_difficulty(lines: Sequence[Line], *, held_out: bool) -> list[tuple[str, list[float]]]:
    """Mean reward at the prompts' first visit, second, …, of thirds of the range of their first rewards.

    Empty where no prompt came again. A visit counts while half of a third's prompts have had it.
    """
    visits: dict[str, list[float]] = {}
    for line in lines:
        for key, reward in line["rewards"].items() if line["held_out"] == held_out else ():
            visits.setdefault(key, []).append(reward)
    if not any(len(rewards) > 1 for rewards in visits.values()):
        return []
    firsts = [rewards[0] for rewards in visits.values()]
    low, third = min(firsts), (max(firsts) - min(firsts)) / 3
    thirds: dict[int, list[list[float]]] = {}
    for rewards in visits.values():
        thirds.setdefault(min(2, int((rewards[0] - low) / third)) if third else 0, []).append(rewards)
    found = []
    for number, prompts in sorted(thirds.items()):
        label = f"{low + number * third:.2g} to {low + (number + 1) * third:.2g}"
        most = sorted(map(len, prompts), reverse=True)[(len(prompts) - 1) // 2]
        means = [fmean(p[n] for p in prompts if len(p) > n) for n in range(most)]
        found.append((f"{label} (n = {len(prompts)})", means))
    return found
