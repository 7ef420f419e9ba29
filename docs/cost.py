"""What the published run may cost on 8 GPUs today: `python docs/cost.py`.

What was measured on one H100 (docs/gpu.md) is read from `benchmarks/results/gpu`; the others are assumed, and
stand here. Each has a pessimistic and an optimistic value, and so has what follows.
"""

import json
from dataclasses import dataclass
from pathlib import Path

MEASURED = Path(__file__).parents[1] / "benchmarks" / "results" / "gpu" / "step.json"
GPUS, PEAK = 8, 989e12  # H100 SXM, bfloat16 FLOP/s without sparsity
WEIGHTS = 7.1e9  # of Qwen2.5-Math-7B that multiply: all but the embeddings
PROMPTS, EPOCHS, PROMPTS_PER_ROLLOUT, K, UPDATES = 7_473 + 7_500, 15, 1_024, 4, 4  # GSM8K and MATH
TEST_PROMPTS, EVALUATE_EVERY = 1_319 + 5_000, 20  # rollouts
MILLION = 1e6


def measured_utilisation() -> float:
    """Of one H100 by a 7B step with gradient checkpointing, 6 operations a weight and useful token."""
    rows = json.loads(MEASURED.read_text(encoding="utf-8"))["rows"]
    return next(row["MFU"] for row in rows if (row["shape"], row["step"]) == ("7B", "gvpo"))


@dataclass(frozen=True)
class Assumptions:
    """What is not known before such a run."""

    completion: float  # mean tokens of a completion; a prompt has 150
    utilisation: float  # as measured; more rows a micro-batch than the 8 measured should do better
    eight: float  # of eight times one GPU's speed, under FSDP
    generated: float  # tokens a second and GPU, 7B under vLLM with large batches
    equal: float  # share of groups whose rewards are all equal: no weight on a free update
    between: float  # seconds a rollout: weights to vLLM, sleep, wake, rewards, waiting for the longest
    price: float  # US dollars an H100-hour, rented
    prompt: float = 150


def cases() -> dict[str, Assumptions]:
    return {
        "pessimistic": Assumptions(700, measured_utilisation(), 0.7, 3_000, 0.2, 60, 4.0),
        "optimistic": Assumptions(400, 0.4, 0.95, 8_000, 0.5, 20, 2.0),
    }


# Engine → forward passes without gradient over a rollout: the reference's, and one before each update on
# which the policy has moved (three of four). In TRL the reference's is without the first update's rows.
SCORED = {"TRL": 0.75 + 0.75, "verl": 1 + 0.75}


def estimate(a: Assumptions, engine: str) -> dict[str, float]:
    """Rollouts, millions of tokens and hours on all GPUs together."""
    rollouts = PROMPTS * EPOCHS // PROMPTS_PER_ROLLOUT
    rows = PROMPTS_PER_ROLLOUT * K
    tokens = rows * (a.prompt + a.completion)
    # The first update of a rollout is free: rows without weight are left out. Later all have some.
    trained = tokens * (1 - a.equal / UPDATES)
    per_token = 6 * WEIGHTS / (PEAK * a.utilisation * a.eight * GPUS)  # seconds
    gradient = trained * per_token
    scoring = SCORED[engine] * tokens * per_token / 4  # a forward is 2 of 8 operations with checkpointing
    generation = rows * a.completion / (a.generated * GPUS)
    evaluations = rollouts // EVALUATE_EVERY * TEST_PROMPTS * a.completion / (a.generated * GPUS)
    parts = {"gradients": gradient, "scoring": scoring, "generation": generation, "between": a.between}
    hours = {name: seconds * rollouts / 3600 for name, seconds in parts.items()}
    hours["evaluation"] = evaluations / 3600
    total = sum(hours.values())
    return {
        "rollouts": rollouts,
        "millions of tokens trained on": trained * rollouts / MILLION,
        **hours,
        "hours": total,
        "H100-hours": total * GPUS,
        "US dollars": total * GPUS * a.price,
    }


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def table(head: list[str], rows: dict[str, list[float]]) -> list[str]:
    ruler = "| --- |" + " ---: |" * (len(head) - 1)
    body = [f"| {name} | " + " | ".join(map(number, values)) + " |" for name, values in rows.items()]
    return ["| " + " | ".join(head) + " |", ruler, *body]


def lines() -> list[str]:
    """Two tables in Markdown: assumptions, and what follows from them."""
    about = {
        "completion": "mean tokens of a completion (prompt: 150)",
        "utilisation": "share of the H100's arithmetic in a gradient",
        "eight": "of eight times one GPU's speed",
        "generated": "tokens generated a second and GPU",
        "equal": "share of groups with equal rewards",
        "between": "seconds a rollout between",
        "price": "US dollars an H100-hour",
    }
    assumed = {text: [getattr(a, name) for a in cases().values()] for name, text in about.items()}
    columns = {f"{engine}, {case}": estimate(a, engine) for engine in SCORED for case, a in cases().items()}
    names = next(iter(columns.values()))
    estimated = {name: [column[name] for column in columns.values()] for name in names}
    return [*table(["assumed", *cases()], assumed), "", *table([f"on {GPUS} GPUs", *columns], estimated)]


if __name__ == "__main__":
    print("\n".join(lines()))
