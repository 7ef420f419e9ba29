"""Adapters of PEFT, and 4-bit bases under them: every update is the formula's on what is trained."""

import copy

import pytest
import torch
from peft import (
    IA3Config,
    LoHaConfig,
    LoraConfig,
    OFTConfig,
    PromptTuningConfig,
    TaskType,
    VeraConfig,
    get_peft_model,
)
from transformers import BitsAndBytesConfig, LlamaForCausalLM

from gvpo.errors import InputError
from gvpo.step import GVPOStep
from tests.models import gradients, literal_gradient, random_batch, relative_error, tiny_model
from tests.trl.oracle import CannedModel, Oracle, Records, Snapshots, canned_model
from tests.trl.test_exactness import compare, prepared

pytestmark = pytest.mark.slow

BOTH = ["q_proj", "v_proj"]
ADAPTERS = {
    "LoRA": LoraConfig(r=4, target_modules="all-linear"),
    "rsLoRA": LoraConfig(r=4, target_modules=BOTH, use_rslora=True),
    "DoRA": LoraConfig(r=4, target_modules=BOTH, use_dora=True),
    "LoRA, a head that is trained whole": LoraConfig(r=4, target_modules=BOTH, modules_to_save=["lm_head"]),
    "LoRA, some tokens trained": LoraConfig(r=4, target_modules=BOTH, trainable_token_indices=[5, 6, 7]),
    "IA3": IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "LoHa": LoHaConfig(r=4, target_modules=BOTH),
    "OFT": OFTConfig(oft_block_size=4, r=0, target_modules=BOTH),
    "VeRA": VeraConfig(r=4, target_modules=["q_proj"]),
}
SETTINGS = {"reference": "initial", "num_iterations": 2, "learning_rate": 1.0, "max_steps": 2}


def trained_values(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def check(run, records, snapshots, policy, within=1e-9):
    """Train, and compare with the oracle that starts as `policy`, an adapted twin of the model."""
    with torch.no_grad():
        for name, value in trained_values(run.model).items():
            policy.get_parameter(name).copy_(value)
    run.train()
    steps = Oracle([records.generations], run.args, policy).run()
    compare(run.args, steps, snapshots, run.state.log_history, within)
    assert max(step.kl for step in steps) > 1e-3


@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapters_are_trained_by_the_formula_against_the_model_they_start_from(kind):
    records, snapshots, config = Records(), Snapshots(), ADAPTERS[kind]
    run = prepared(
        records, snapshots, model=canned_model(records), peft_config=copy.deepcopy(config), **SETTINGS
    )
    check(run, records, snapshots, get_peft_model(tiny_model().double(), copy.deepcopy(config)))


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=4, target_modules=BOTH, init_lora_weights="pissa"),
        LoraConfig(r=4, target_modules=BOTH, init_lora_weights=False),
        PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=3),
    ],
    ids=["PiSSA", "random", "prompt tuning"],
)
def test_adapters_that_do_not_start_as_their_base_have_no_initial_reference(config):
    """PiSSA takes what it starts with out of the base: without it the model is another one."""

    def made(**changes):
        records, snapshots = Records(), Snapshots()
        settings = {"model": canned_model(records).float(), "peft_config": copy.deepcopy(config)}
        return prepared(records, snapshots, **settings, **{**SETTINGS, **changes}), records, snapshots

    with pytest.raises(
        InputError, match=r"not start as the model that it is put on .* use reference='rollout'"
    ):
        made()[0].train()
    run, *seen = made(reference="rollout")
    if isinstance(config, PromptTuningConfig):  # see tests/model/test_head.py
        run.train()
    else:
        check(run, *seen, get_peft_model(tiny_model(), copy.deepcopy(config)).double(), within=1e-4)


@pytest.mark.parametrize("kind", ["LoRA, a head that is trained whole", "PiSSA"])
def test_a_moving_reference_is_the_adapter_as_it_was(kind):
    """Also where the adapter does not start as its base: all that is trained is kept, whatever it is."""
    pissa = LoraConfig(r=4, target_modules=BOTH, init_lora_weights="pissa")
    config = {**ADAPTERS, "PiSSA": pissa}[kind]
    records, snapshots = Records(), Snapshots()
    settings = SETTINGS | {"reference": "moving", "reference_every": 2, "max_steps": 4}
    model = canned_model(records).float()
    run = prepared(records, snapshots, model=model, peft_config=copy.deepcopy(config), **settings)
    policy = get_peft_model(tiny_model(), copy.deepcopy(config)).double()
    check(run, records, snapshots, policy, within=1e-4)


def test_one_adapter_of_several_is_trained():
    config = ADAPTERS["rsLoRA"]
    records, snapshots = Records(), Snapshots()

    def adapted(model):
        model = get_peft_model(model, config)
        torch.manual_seed(1)
        model.add_adapter("other", LoraConfig(r=2, target_modules=["k_proj"], init_lora_weights=False))
        return model

    run = prepared(records, snapshots, model=adapted(canned_model(records)), **SETTINGS)
    check(run, records, snapshots, adapted(tiny_model().double()))
    assert not any(".other." in name for name in trained_values(run.model))
    again = Records()
    both = adapted(canned_model(again))
    both.base_model.set_adapter(["default", "other"])
    with pytest.raises(InputError, match="not start as the model that it is put on"):
        prepared(again, Snapshots(), model=both, **SETTINGS).train()
    named = get_peft_model(canned_model(records), config, adapter_name="mine")
    with pytest.raises(InputError, match=r"adapter mine, .* call it so"):
        prepared(Records(), Snapshots(), model=named, **SETTINGS)


# ------------------------------------------------------------------------------------------------- 4 bits


@pytest.fixture
def shape():
    """A multiple of bitsandbytes' blocks in each direction."""
    return {"hidden_size": 64, "intermediate_size": 128}


@pytest.fixture
def quantised(tmp_path, shape):
    """Loads the tiny model in 4 bits, and a twin of what these 4 bits stand for."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    tiny_model("untied", **shape).save_pretrained(tmp_path / "model")

    def load(**changes):
        settings = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_compute_dtype": torch.float32,
        }
        bits = BitsAndBytesConfig(**{**settings, **changes})
        model = LlamaForCausalLM.from_pretrained(
            tmp_path / "model", quantization_config=bits, dtype=torch.float32
        )
        twin = tiny_model("untied", **shape)
        for name, module in model.named_modules():
            if isinstance(module, bitsandbytes.nn.Linear4bit):
                weight = bitsandbytes.functional.dequantize_4bit(
                    module.weight.data, module.weight.quant_state
                )
                twin.get_submodule(name).weight.data = weight.float()
        return model, twin.double()

    return load


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"bnb_4bit_use_double_quant": True},
        {"bnb_4bit_quant_type": "fp4"},
        {"llm_int8_skip_modules": ["none"]},  # the head in 4 bits, too
    ],
)
@pytest.mark.filterwarnings("ignore:The fused head does not give", "ignore:Prompts are not shared")
def test_a_step_on_four_bits_is_that_of_the_model_they_stand_for(quantised, changes):
    """Scored first without gradients, as it is after a rollout; prompts are shared."""
    model, twin = quantised(**changes)
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    model, twin = get_peft_model(model, lora), get_peft_model(twin, lora)
    for name, value in trained_values(model).items():
        twin.get_parameter(name).data = value.detach().double()
    for batch in (random_batch(reference=True), random_batch(reference=True, prompt=(40, 50))):
        model.zero_grad()
        step = GVPOStep(model, beta=0.5, token_budget=200)
        report = step(batch)
        want, loss = literal_gradient(twin, batch, 0.5)
        assert relative_error(gradients(model), want) < 1e-5
        assert report.loss.item() == pytest.approx(loss, rel=1e-5)
    whole_head = "llm_int8_skip_modules" not in changes
    assert step.scorer.fused is whole_head
    assert (report.shared_prompts > 0) is whole_head


def test_a_run_on_four_bits_is_the_oracle_s(quantised):
    records, snapshots = Records(), Snapshots()
    model, twin = quantised()
    model.__class__, model.records = CannedModel, records
    lora = ADAPTERS["LoRA"]
    run = prepared(records, snapshots, model=model, peft_config=lora, **SETTINGS)
    for value in trained_values(run.model).values():
        value.data = value.data.float()  # TRL makes QLoRA's adapters bfloat16
    check(run, records, snapshots, get_peft_model(twin, lora).double(), within=1e-4)


def test_weights_packed_for_inference_are_refused(quantised):
    """bitsandbytes packs weights on some CPUs in evaluation mode, and lets no gradient through."""
    model, _ = quantised()
    model.eval()
    with torch.no_grad():
        model(torch.tensor([[5, 6, 7]]))
    if not model.model.layers[0].mlp.up_proj.support_avx512bf16_for_cpu:
        pytest.skip("not on this CPU")
    with pytest.raises(InputError, match="4-bit weights are packed for inference: load the model anew"):
        GVPOStep(get_peft_model(model, ADAPTERS["LoRA"]))
