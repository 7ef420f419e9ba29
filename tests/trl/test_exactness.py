"""`GVPOTrainer`'s updates: the formula's, whatever the micro-batches and processes."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model

from gvpo.objective import gvpo_weights
from tests.gloo import run_ranks
from tests.models import (
    gradients,
    literal_logps,
    literal_tokens,
    literal_trusted_loss,
    relative_error,
    tiny_model,
)
from tests.test_objective import literal_loss
from tests.trl.common import CannedTrainer, distance, parameters, trainer

pytestmark = pytest.mark.slow

ROUTES = {
    "rollout, one update": {},
    "rollout, two updates": {"steps_per_generation": 8},
    "rollout, two iterations": {"num_iterations": 2},
    "rollout, steps across generations": {"gradient_accumulation_steps": 6, "steps_per_generation": 4},
    "rollout, several generations a step": {"steps_per_generation": 2},
    "initial": {"reference": "initial"},
    "initial, two iterations": {"reference": "initial", "num_iterations": 2},
    "rollout, two updates, trust": {"steps_per_generation": 8, "trust": 0.05},
    "initial, two iterations, trust": {"reference": "initial", "num_iterations": 2, "trust": 0.05},
    "truncated rows leave": {"mask_truncated_completions": True, "steps_per_generation": 8},
}


def as_arguments(rows):
    """The rows under the names of `gvpo_weights`."""
    renamed = {"policy": "policy_logps", "reference": "reference_logps"}
    return {renamed.get(name, name): values for name, values in rows.items()}


class ComparedTrainer(CannedTrainer):
    """Compares each update with literal autograd, from its own records of rollouts and policies."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.initial = self.twin()
        self.errors, self.losses, self.kl, self.beyond = [], [], [], []
        self.calls = []  # (rows of a slice, policy that sampled it), one for each training_step of a window

    def twin(self):
        model = copy.deepcopy(tiny_model()).double()
        model.load_state_dict(self.model.state_dict())
        return model

    def _generate_and_score_completions(self, inputs):
        self.sampler = self.twin()
        self.rows = super()._generate_and_score_completions(inputs)
        return self.rows

    def _prepare_inputs(self, generation_batch):
        out = super()._prepare_inputs(generation_batch)
        n, j = self.args.per_device_train_batch_size, self._step % self.args.steps_per_generation
        self.calls.append((self.rows, range(j * n, (j + 1) * n), self.sampler))
        return out

    def _update(self, model):
        result = super()._update(model)
        self.compare(result.item())
        return result

    def compare(self, loss):
        twin = self.twin()
        rows = {"policy": [], "reference": [], "rewards": [], "group_ids": [], "mask": []}
        tokens = {"policy": [], "rollout": []}
        for use, (batch, indices, sampler) in enumerate(self.calls):
            index = torch.tensor(list(indices))
            part = copy.copy(batch)
            for name in ("input_ids", "lengths", "completion_mask"):
                setattr(part, name, getattr(batch, name)[index])
            reference = sampler if self.args.reference == "rollout" else self.initial
            tokens["policy"] += literal_tokens(twin, part)
            tokens["rollout"] += literal_tokens(sampler, part)
            rows["policy"].append(torch.stack([row.sum() for row in tokens["policy"][-len(indices) :]]))
            rows["reference"].append(literal_logps(reference, part).detach())
            rows["rewards"].append(batch.rewards[index].double())
            # A slice met again in the same window stands for groups of its own.
            again = sum(b is batch and i == indices for b, i, _ in self.calls[:use])
            rows["group_ids"].append(batch.group_ids[index] * 10 + again)
            rows["mask"].append(batch.valid[index])
        self.calls = []
        rows = {name: torch.cat(values) for name, values in rows.items()}
        expected = literal_loss(**rows, beta=self.args.beta)
        if self.args.trust is None:
            expected.backward()
        else:
            detached = {name: values.detach() for name, values in rows.items()}
            weights = gvpo_weights(**as_arguments(detached), beta=self.args.beta)
            masked, kept, scored = literal_trusted_loss(**tokens, weights=weights, trust=self.args.trust)
            masked.backward()
            self.beyond.append(1 - kept / scored)
        self.kl.append((rows["policy"] - rows["reference"]).abs().mean().item())
        self.errors.append(relative_error(gradients(self.model), gradients(twin)))
        self.losses.append(expected.item())
        self.errors.append(abs(loss / expected.item() - 1))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("route", list(ROUTES))
def test_each_update_is_the_formula_s(route, checkpointing):
    run = trainer(
        ComparedTrainer,
        max_steps=4,
        micro_batch_tokens=50,
        gradient_checkpointing=checkpointing,
        **ROUTES[route],
    )
    run.train()
    assert len(run.errors) == 8
    assert max(run.errors) < 1e-5, run.errors
    # Where several updates share a rollout, policy and reference must really have come apart.
    assert (max(run.kl) > 0.01) is (
        route not in ("rollout, one update", "rollout, several generations a step")
    )
    logged = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert logged == pytest.approx(run.losses, rel=1e-4)
    far = [entry.get("gvpo/beyond_trust_fraction", 0) for entry in run.state.log_history if "loss" in entry]
    assert (max(far) > 0.05) is ("trust" in route)
    if run.beyond:
        assert far == pytest.approx(run.beyond, abs=1e-6)


@pytest.mark.parametrize("reference", ["rollout", "initial"])
def test_parameters_do_not_depend_on_the_micro_batches(reference):
    """Three steps of 32 rows in groups of 4, each rollout used twice."""
    shapes = [(32, 1), (16, 2), (8, 4), (2, 16), (1, 32)]
    runs = [{"per_device_train_batch_size": n, "gradient_accumulation_steps": a} for n, a in shapes]
    runs += [{"micro_batch_tokens": budget} for budget in (1, 33, 100, 10**6)]
    ends = []
    for run in runs:
        accumulation = run.get("gradient_accumulation_steps", 4)
        done = trainer(reference=reference, steps_per_generation=2 * accumulation, **run)
        done.train()
        ends.append(parameters(done))
    assert max(distance(end, ends[0]) for end in ends[1:]) < 1e-5


# Under these an optimizer step has the same groups on one process as on two.
SPREAD = [
    {"per_device_train_batch_size": 4, "reference": "rollout"},
    {"per_device_train_batch_size": 4, "reference": "initial"},
    {"per_device_train_batch_size": 4, "num_iterations": 2, "gradient_checkpointing": True},
    # Groups of 4 cut by the ranks: each holds 6 rows.
    {
        "per_device_train_batch_size": 6,
        "gradient_accumulation_steps": 1,
        "micro_batch_tokens": 40,
        "num_iterations": 2,
    },
]


def train_all(rank, world):
    ends = []
    for changes in SPREAD:
        run = trainer(**changes)
        assert run.accelerator.num_processes == world
        run.train()
        ends.append((parameters(run), [entry["loss"] for entry in run.state.log_history if "loss" in entry]))
    return ends


def test_two_processes_make_the_updates_of_one():
    ranks = run_ranks(train_all, 2)
    for i, changes in enumerate(SPREAD):
        rows = 2 * changes["per_device_train_batch_size"]
        alone = trainer(**{**changes, "per_device_train_batch_size": rows})
        alone.train()
        expected = [entry["loss"] for entry in alone.state.log_history if "loss" in entry]
        for ends in ranks:
            end, losses = ends[i]
            assert distance(end, parameters(alone)) < 1e-5
            assert losses == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("kind", ["new adapter", "adapter of the model"])
def test_lora_measures_against_the_model_it_starts_from(kind, tmp_path):
    """`reference="initial"` without a second copy: S' is that of the policy before training."""
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    if kind == "new adapter":
        run = trainer(reference="initial", peft_config=lora)
    else:
        torch.manual_seed(3)
        model = get_peft_model(tiny_model(), lora)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.2)
        run = trainer(model=model, reference="initial")
    assert run.ref_model is None
    seen = []

    def compare(batch):
        logps = original(batch)
        seen.append((batch, logps))
        return logps

    original, run._score_reference = run._score_reference, compare
    before = run._gvpo_step.sequence_logps
    run.train()
    first, logps = seen[0]
    # At the start policy and reference are the same; later they are not.
    assert run.state.log_history[0]["gvpo/kl"] == pytest.approx(0, abs=1e-5)
    assert abs(run.state.log_history[2]["gvpo/kl"]) > 1e-4
    after = before(first)
    assert (after - logps).abs().max() > 1e-3
    torch.testing.assert_close(original(first), logps, rtol=1e-5, atol=1e-4)
