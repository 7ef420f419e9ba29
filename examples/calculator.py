"""A model learns when to use a calculator, and to use it well: GVPO with a tool, in a few minutes on a CPU.

    pip install "gvpo[trl]"
    python examples/calculator.py --seed 0 --output runs/calculator

A Llama of 0.1 M parameters first imitates a sloppy teacher, who knows the products of single digits by heart
and not those of two digits; for these he guesses, or calls the tool and often misreads a digit. Then
`GVPOTrainer` rewards right answers, less 0.2 for each call. What is shown for held-out problems are episodes
sampled as in training. With a model from the Hub `tokenizer` and `warm_up` go away: TRL knows how the common
ones call tools.
"""

import argparse
import json
import random
import time
from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

from gvpo.run import plot_curves
from gvpo.trl import GVPOConfig, GVPOTrainer

PRICE = 0.2  # of a call
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% for c in m.tool_calls or [] %}"
    "<call>{{ c.function.name }}({% for name, value in c.function.arguments.items() %}{{ name }}={{ value }}"
    "{% if not loop.last %},{% endif %}{% endfor %})</call>{% endfor %}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
SCHEMA = {  # how a call is read: <call>multiply(a=47,b=83)</call>
    "type": "object",
    "properties": {
        "role": {"const": "assistant"},
        "content": {"type": "string", "x-regex": "^(.*?)(?:<call>|<end>|$)"},
        "tool_calls": {
            "type": "array",
            "x-regex-iterator": "<call>(.*?)</call>",
            "items": {
                "type": "object",
                "properties": {
                    "type": {"const": "function"},
                    "function": {
                        "type": "object",
                        "properties": {
                            "name": {"type": "string", "x-regex": r"^(\w+)\("},
                            "arguments": {
                                "type": "object",
                                "x-regex": r"a=(?P<a>\d+),b=(?P<b>\d+)\)$",
                                "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
                            },
                        },
                    },
                },
            },
        },
    },
}


def multiply(a: int, b: int) -> int:
    """Multiply two numbers.

    Args:
        a: The first.
        b: The second.
    """
    return a * b


def right(completions, answer, **_):
    """1 for the right product in the last message."""
    return [
        float(episode[-1]["content"] == wanted) for episode, wanted in zip(completions, answer, strict=True)
    ]


def calls(completions, **_):
    """How often the tool was called."""
    return [float(sum(len(m.get("tool_calls") or []) for m in episode)) for episode in completions]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A token a character, and some words."""
    special = ["<pad>", "<unk>", "<end>", "<user>", "<assistant>", "<tool>", "<call>", "</call>"]
    vocabulary = {token: i for i, token in enumerate([*special, "multiply", *"0123456789*=,()ab"])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("multiply|."), behavior="isolated")
    inner.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>", eos_token="<end>", padding_side="left",
        additional_special_tokens=special[3:], chat_template=TEMPLATE,
    )  # fmt: skip
    tokenizer.response_schema = SCHEMA
    return tokenizer


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=192, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=64, initializer_range=0.1, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def misread(number: int, rng: random.Random, share: float) -> str:
    """A number, of which sometimes a digit is wrong."""
    digits = list(str(number))
    if rng.random() < share:
        digits[rng.randrange(len(digits))] = rng.choice("0123456789")
    return "".join(digits)


def teach(a: int, b: int, rng: random.Random) -> list[tuple[str, bool]]:
    """The sloppy teacher's episode: pieces of text, and which of them he wrote."""
    prompt = (f"<user>{a}*{b}<end><assistant>", False)
    if rng.random() < 0.5:
        known = a < 10 and b < 10
        answer = misread(a * b, rng, 0.2) if known else str(rng.randrange(100, 9802))
        return [prompt, (f"{answer}<end>", True)]
    left, other = int(misread(a, rng, 0.25)), int(misread(b, rng, 0.25))
    called = f"<call>multiply(a={left},b={other})</call><end>"
    answer = misread(left * other, rng, 0.25)
    return [
        prompt,
        (called, True),
        (f"<tool>{left * other}<end><assistant>", False),
        (f"{answer}<end>", True),
    ]


def warm_up(model, tokenizer, problems: list[tuple[int, int]], steps: int, rng: random.Random) -> None:
    """Supervised training on the teacher's episodes."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.1)
    for _ in range(steps):
        episodes = [teach(*rng.choice(problems), rng) for _ in range(64)]
        rows = [[(t, own) for text, own in e for t in tokenizer(text)["input_ids"]] for e in episodes]
        width = max(map(len, rows))
        ids = torch.tensor([[t for t, _ in row] + [0] * (width - len(row)) for row in rows])
        labels = torch.tensor(
            [[t if own else -100 for t, own in r] + [-100] * (width - len(r)) for r in rows]
        )
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()


def dataset(problems: list[tuple[int, int]]) -> Dataset:
    prompts = [[{"role": "user", "content": f"{a}*{b}"}] for a, b in problems]
    return Dataset.from_dict({"prompt": prompts, "answer": [str(a * b) for a, b in problems]})


def main(seed: int, output: Path, *, warm_up_steps: int = 1200, steps: int = 80) -> dict:
    started = time.time()
    set_seed(seed)
    rng = random.Random(seed)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    easy = [(a, b) for a in range(10) for b in range(10)]
    hard = [(a, b) for a in range(10, 100) for b in range(10, 100)]
    rng.shuffle(hard)
    held_out, hard = hard[:200], hard[200:]
    problems = easy * (len(hard) // len(easy)) + hard
    warm_up(model, tokenizer, problems, warm_up_steps, rng)
    warmed_up = time.time()
    config = GVPOConfig(
        output_dir=str(output), seed=seed, beta=0.1, reference="initial", max_steps=steps, learning_rate=1e-3,
        num_generations=8, per_device_train_batch_size=256, micro_batch_tokens=8000, max_completion_length=32,
        reward_weights=[1.0, -PRICE], max_tool_calling_iterations=2, tool_timeout=1.0,
        eval_strategy="steps", eval_steps=10, eval_on_start=True, per_device_eval_batch_size=200,
        num_generations_eval=2, logging_steps=5, save_strategy="no", report_to=[], use_cpu=True, bf16=False,
        gradient_checkpointing=False, disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = GVPOTrainer(
        model, [right, calls], config, tools=[multiply], processing_class=tokenizer,
        train_dataset=dataset(problems), eval_dataset={"easy": dataset(easy), "hard": dataset(held_out)},
    )  # fmt: skip
    trainer.train()

    def curve(kind: str, reward: str) -> tuple[list[float], list[float]]:
        entries = [entry for entry in trainer.state.log_history if f"eval_{kind}_runtime" in entry]
        points = [(entry["step"], entry[f"eval_rewards/{reward}/mean"]) for entry in entries]
        return [step for step, _ in points], [value for _, value in points]

    panels = [
        (title, [(f"{kind} problems", *curve(kind, reward)) for kind in ("easy", "hard")])
        for title, reward in (("right answers", "right"), ("calls of the tool", "calls"))
    ]
    plot_curves(
        output / "calculator.png", panels, title="GVPO with a calculator, held out", x="optimizer step"
    )
    summary = {
        f"{kind}_{reward}_{when}": round(curve(kind, reward)[1][place], 3)
        for kind in ("easy", "hard")
        for reward in ("right", "calls")
        for when, place in (("start", 0), ("end", -1))
    }
    summary |= {"seed": seed, "steps": steps, "parameters": sum(p.numel() for p in model.parameters())}
    summary |= {"seconds_warm_up": round(warmed_up - started), "seconds_gvpo": round(time.time() - warmed_up)}
    summary["cpu_seconds"] = round(time.process_time())
    (output / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    print(json.dumps(summary, indent=1))
    return summary


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("runs/calculator"))
    arguments = parser.parse_args()
    main(arguments.seed, arguments.output)
