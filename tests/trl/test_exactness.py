"""`GVPOTrainer`'s updates: the formula's, whatever the micro-batches and processes."""

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model

from gvpo.trl import GVPOTrainer
from gvpo.trl.backend import AccelerateBackend
from tests.gloo import run_ranks
from tests.models import relative_error, tiny_model
from tests.trl.common import dataset, distance, parameters, trainer
from tests.trl.oracle import Oracle, Records, Snapshots, canned_model, demonstrated

pytestmark = pytest.mark.slow

ROUTES = {
    "one update": {},
    "two updates": {"steps_per_generation": 8},
    "two iterations": {"num_iterations": 2},
    "steps across generations": {"gradient_accumulation_steps": 6, "steps_per_generation": 4},
    "several generations a step": {"steps_per_generation": 2},
    "a slice twice in a step": {"steps_per_generation": 2, "num_iterations": 2, "num_generations": 2},
    "initial": {"reference": "initial"},  # docs/upstream/trl-fused-forward-copy.md
    "initial, two iterations": {"reference": "initial", "num_iterations": 2},
    "initial, a slice twice in a step": {
        "reference": "initial", "steps_per_generation": 1, "num_iterations": 2, "max_steps": 2
    },
    "moving": {"reference": "moving", "reference_every": 2},
    "moving with every update": {"reference": "moving", "reference_every": 1, "num_iterations": 2},
    "moving, steps across generations, trust": {
        "reference": "moving", "reference_every": 3, "trust": 0.05, "max_steps": 5,
        "gradient_accumulation_steps": 6, "steps_per_generation": 4,
    },
    "two updates, trust": {"steps_per_generation": 8, "trust": 0.05},
    "initial, two iterations, trust": {"reference": "initial", "num_iterations": 2, "trust": 0.05},
    "truncated rows leave": {"mask_truncated_completions": True, "steps_per_generation": 8},
    "out of memory": {"at_once": 7, "steps_per_generation": 8},
    "demonstrations": {"demonstrations_per_group": 1, "steps_per_generation": 8},
    "demonstrations in their slots": {
        "demonstrations_per_group": 2,
        "demonstration_slots": [2, 0],
        "steps_per_generation": 8,
    },
    "demonstrations with their own reward, out of memory": {
        "demonstrations_per_group": 1, "demonstration_reward": 2.0, "reference": "initial", "at_once": 7,
    },
    "tools": {"tools": True, "steps_per_generation": 8},
    "tools, trust": {"tools": True, "steps_per_generation": 8, "trust": 0.05},
    "tools, truncated rows leave": {"tools": True, "mask_truncated_completions": True, "num_iterations": 2},
    # Each with so high a ratio that all groups are drawn that may be.
    "replay": {"replay_ratio": 5.0},
    "replay, not too old": {"replay_ratio": 5.0, "replay_max_age": 1},
    "replay, not too many": {"replay_ratio": 5.0, "replay_capacity": 13},
    "replay, two updates": {"replay_ratio": 5.0, "steps_per_generation": 8},
    "replay, initial, truncated rows leave": {
        "replay_ratio": 5.0, "reference": "initial", "mask_truncated_completions": True,
    },
    "replay, re-anchored": {
        "replay_ratio": 5.0, "replay_reference": "current", "tools": True, "steps_per_generation": 8,
    },
    "replay, moving": {"replay_ratio": 5.0, "reference": "moving", "reference_every": 2},
    "replay, re-anchored, moving": {
        "replay_ratio": 5.0, "reference": "moving", "reference_every": 3, "replay_reference": "current"
    },
    "replay, tools": {"replay_ratio": 5.0, "tools": True, "num_iterations": 2},
    "replay, demonstrations": {"replay_ratio": 5.0, "demonstrations_per_group": 1},
}  # fmt: skip
CHECKPOINTED = ("two iterations", "initial", "two updates, trust", "replay, tools")


def prepared(records, snapshots, *, model=None, tools=False, rewards=None, **changes):
    """A trainer that sees the world through `records`."""
    settings = {
        "temperature": 0.7,
        "reward_weights": [1.0, -0.5],
        "max_steps": 4,
        "micro_batch_tokens": 50,
        "learning_rate": 0.1,
        **changes,
    }
    records.temperature = settings["temperature"]
    return trainer(
        GVPOTrainer,
        model=canned_model(records) if model is None else model,
        rewards=rewards or [records.digits, records.lengths],
        train_dataset=demonstrated() if "demonstrations_per_group" in changes else dataset(),
        callbacks=[snapshots],
        rollout_func=records.tools if tools else None,
        **settings,
    )


def compare(args, steps, snapshots, history, within=1e-9):
    """The logged numbers and the parameters of each step with those of the oracle."""
    assert len(steps) == len(snapshots.after) == args.max_steps
    for after, step in zip(snapshots.after, steps, strict=True):
        moved = {name: value - snapshots.before[name] for name, value in step.parameters.items()}
        assert relative_error({n: after[n] - snapshots.before[n] for n in moved}, moved) < within
    logged = [entry for entry in history if "loss" in entry]
    assert [entry["loss"] for entry in logged] == pytest.approx([step.loss for step in steps], rel=1e-4)
    far = [entry.get("gvpo/beyond_trust_fraction", 0) for entry in logged]
    assert far == pytest.approx([step.beyond_trust for step in steps], abs=1e-6)


@pytest.mark.parametrize(
    ("route", "checkpointing"), [*((r, False) for r in ROUTES), *((r, True) for r in CHECKPOINTED)]
)
@pytest.mark.filterwarnings("ignore:.*re-anchors")
def test_a_run_is_the_oracle_s(route, checkpointing):
    """Raw rewards and handed-out tokens in, the parameters of each step out; see `tests.trl.oracle`."""
    changes = dict(ROUTES[route])
    records, snapshots = Records(at_once=changes.pop("at_once", 10**6)), Snapshots()
    run = prepared(records, snapshots, gradient_checkpointing=checkpointing, **changes)
    run.train()
    steps = Oracle([records.generations], run.args).run()
    compare(run.args, steps, snapshots, run.state.log_history)
    # What the route is there for must have happened.
    reused = not {"steps_per_generation": 2, "num_iterations": 2}.items() <= changes.items()
    alone = not changes or changes == {"steps_per_generation": 2}
    assert (max(step.kl for step in steps) > 0.01) is (reused and not alone)
    assert (max(step.beyond_trust for step in steps) > 0.05) is ("trust" in changes)
    assert (max(step.replayed for step in steps) > 0) is ("replay" in route)
    assert (0 < max(records.portions, default=0) <= records.at_once) is ("tools" not in changes)
    rows = [row for generation in records.generations for row in generation]
    assert any(row.demonstration for row in rows) is ("demonstrations" in route)
    assert any(not all(row.counts) for row in rows) is ("tools" in changes)
    assert {tuple(r is None for r in row.rewards) for row in rows} == {
        (False, False), (False, True), (True, True),
    }  # fmt: skip


@pytest.mark.parametrize("reference", ["rollout", "initial"])
def test_parameters_do_not_depend_on_the_micro_batches(reference):
    """Three steps of 32 rows in groups of 4, each rollout used twice."""
    shapes = [(32, 1), (16, 2), (8, 4), (2, 16), (1, 32)]
    runs = [{"per_device_train_batch_size": n, "gradient_accumulation_steps": a} for n, a in shapes]
    runs += [{"micro_batch_tokens": budget} for budget in (1, 33, 100, 10**6)]
    runs += [{"share_prompts": False}]
    ends = []
    for run in runs:
        accumulation = run.get("gradient_accumulation_steps", 4)
        done = trainer(reference=reference, steps_per_generation=2 * accumulation, **run)
        done.train()
        ends.append(parameters(done))
    assert max(distance(end, ends[0]) for end in ends[1:]) < 1e-5


SPREAD = [
    {"reference": "rollout"},
    {"reference": "initial", "demonstrations_per_group": 1},
    {"num_iterations": 2, "gradient_checkpointing": True},
    {"reference": "moving", "reference_every": 2, "num_iterations": 2},
    {"replay_ratio": 5.0, "tools": True, "mask_truncated_completions": True},
    # Groups of 4 cut by the ranks: each holds 6 rows.
    {"per_device_train_batch_size": 6, "gradient_accumulation_steps": 1, "num_iterations": 2, "trust": 0.05},
    {"per_device_train_batch_size": 6, "gradient_accumulation_steps": 1, "demonstrations_per_group": 1},
]


def train_all(rank, world, folder):
    seen = []
    for i, changes in enumerate(SPREAD):
        records, snapshots = Records(rank), Snapshots()
        settings = {"per_device_train_batch_size": 4, "micro_batch_tokens": 40, **changes}
        run = prepared(records, snapshots, output_dir=f"{folder}/{i}", **settings)
        assert run.accelerator.num_processes == world
        run.train()
        seen.append((records.generations, snapshots, run.args, run.state.log_history))
    return seen


def test_two_processes_make_the_updates_of_one(tmp_path):
    for first, second in zip(*run_ranks(train_all, 2, tmp_path), strict=True):
        steps = Oracle([first[0], second[0]], first[2]).run()
        for _, snapshots, args, history in (first, second):
            compare(args, steps, snapshots, history)


@pytest.mark.parametrize("kind", ["new adapter", "adapter of the model"])
def test_lora_measures_against_the_model_it_starts_from(kind):
    """`reference="initial"` without a second copy: S' is that of the policy before training."""
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    records, snapshots = Records(), Snapshots()
    settings = {"reference": "initial", "num_iterations": 2, "learning_rate": 1.0}
    if kind == "new adapter":
        run = prepared(records, snapshots, peft_config=lora, **settings)
    else:
        model = get_peft_model(canned_model(records), lora)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.2)
        run = prepared(records, snapshots, model=model, **settings)
    assert run.ref_model is None
    policy = get_peft_model(tiny_model().double(), lora)
    policy.load_state_dict({n: v for n, v in run.model.state_dict().items() if ".ref." not in n})
    run.train()
    steps = Oracle([records.generations], run.args, policy).run()
    compare(run.args, steps, snapshots, run.state.log_history)
    assert max(step.kl for step in steps) > 0.01


def test_accelerate_does_not_divide_a_gradient_by_the_accumulation_steps():
    """transformers before 5.5.4 tells it of them; after clipping one hardly sees it."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=4)
    weight = torch.ones(1, requires_grad=True)
    AccelerateBackend(accelerator).backward(3 * weight.sum(), last=True)
    assert weight.grad.item() == 3
