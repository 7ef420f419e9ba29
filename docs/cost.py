"""What the published run might cost, by estimate from stated assumptions: `python docs/cost.py`."""

PARAMETERS = 7.6e9
PROMPTS = 7_473 + 7_500  # GSM8K and MATH, before overlong prompts are dropped
RESPONSES, EPOCHS, PROMPTS_PER_ROLLOUT = 4, 15, 1_024
PROMPT_TOKENS, COMPLETION_TOKENS = 150, 500  # assumed means
PEAK, UTILISATION = 989e12, 0.35  # an H100's bf16 FLOP/s, and the share of it that training reaches
GENERATED_PER_SECOND = 8_000  # tokens per H100, a model of 7 B under vLLM with large batches
PRICES = (2.0, 4.0)  # US dollars per H100-hour, rented


def main() -> None:
    rollouts = PROMPTS * EPOCHS // PROMPTS_PER_ROLLOUT
    sequences = rollouts * PROMPTS_PER_ROLLOUT * RESPONSES
    tokens = sequences * (PROMPT_TOKENS + COMPLETION_TOKENS)
    # Forward, backward and the forward again of gradient checkpointing; three updates of four also score.
    per_token = PARAMETERS * (6 + 2 + 2 * 3 / 4)
    training = tokens * per_token / (PEAK * UTILISATION) / 3600
    generation = sequences * COMPLETION_TOKENS / GENERATED_PER_SECOND / 3600
    total = training + generation
    rows = [
        ("rollouts, updates", f"{rollouts}, {4 * rollouts}"),
        ("responses", f"{sequences / 1e6:.2f} million"),
        ("tokens trained on", f"{tokens / 1e6:.0f} million"),
        ("training", f"{training:.0f} H100-hours"),
        ("generation", f"{generation:.0f} H100-hours"),
        ("together", f"{total:.0f} H100-hours, about {total / 8:.0f} h on 8 GPUs"),
        ("rented", f"{total * PRICES[0]:.0f}–{total * PRICES[1]:.0f} US dollars"),
    ]
    print("| estimate | |\n| --- | ---: |")
    for name, value in rows:
        print(f"| {name} | {value} |")


if __name__ == "__main__":
    main()
