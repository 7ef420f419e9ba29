"""`GVPOTrainer` as TRL's users expect it: resume, evaluation, precision, cards, logs, warnings."""

import inspect
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import ParallelismConfig
from datasets import Dataset

from gvpo.errors import InputError
from gvpo.trl import GVPOConfig, GVPOTrainer
from tests.models import tiny_model
from tests.trl.common import (
    CannedTrainer,
    config,
    dataset,
    digit_reward,
    distance,
    parameters,
    tokenizer,
    trainer,
)


def test_resumed_run_is_the_run_that_was_never_stopped(tmp_path: Path) -> None:
    """Real sampling, AdamW and a schedule; stopped in the middle of a rollout's four updates."""
    settings: dict[str, Any] = {
        "output_dir": str(tmp_path),
        "steps_per_generation": 16,
        "max_steps": 6,
        "optim": "adamw_torch",
        "lr_scheduler_type": "linear",
        "learning_rate": 0.01,
        "save_strategy": "steps",
        "save_steps": 3,
    }
    whole = trainer(GVPOTrainer, **settings)
    whole.train()
    again = trainer(GVPOTrainer, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert all(value.equal(parameters(again)[name]) for name, value in parameters(whole).items())
    clocks = ("time", "runtime", "per_second", "profiling", "memory")

    def history(run: GVPOTrainer) -> list[dict[str, Any]]:
        return [
            {key: value for key, value in entry.items() if not any(clock in key for clock in clocks)}
            for entry in run.state.log_history[:6]
        ]

    assert history(again) == history(whole)


def test_checkpoint_of_another_layout_gets_new_rollouts_and_says_so(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"output_dir": str(tmp_path), "save_strategy": "steps", "save_steps": 1}
    trainer(**settings, steps_per_generation=8).train()
    again = trainer(**settings, steps_per_generation=4, max_steps=4)
    with pytest.warns(UserWarning, match="rollouts in flight were not restored"):
        again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 4


def test_evaluation_reports_the_formula_on_fresh_responses() -> None:
    run = trainer(
        reference="initial",
        eval_dataset=dataset(8),
        eval_strategy="steps",
        eval_steps=2,
        per_device_eval_batch_size=8,
        max_steps=2,
    )
    run.train()
    entry = next(entry for entry in run.state.log_history if "eval_loss" in entry)
    assert entry["eval_loss"] > 0
    assert entry["eval_gvpo/reward_variance"] > 0
    assert abs(entry["eval_gvpo/kl"]) > 0


@pytest.mark.parametrize("checkpointing", [False, True])
def test_bf16_stays_near_float32(checkpointing: bool) -> None:
    ends = []
    for bf16 in (False, True):
        run = trainer(bf16=bf16, reference="initial", gradient_checkpointing=checkpointing)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="The fused head does not give")
            run.train()
        ends.append(parameters(run))
    assert all(value.isfinite().all() for value in ends[1].values())
    assert 0 < distance(ends[1], ends[0]) < 0.1


def test_rows_without_a_reward_leave_their_group() -> None:
    def partial(completions: list[str], **_: Any) -> list[float | None]:
        values = digit_reward(completions)
        return [None if i % 3 == 0 else float("nan") if i % 7 == 0 else v for i, v in enumerate(values)]

    run = trainer(rewards=partial, max_steps=1)
    run.train()
    entry = run.state.log_history[0]
    assert torch.isfinite(torch.tensor(entry["loss"]))
    assert entry["gvpo/groups"] + entry["gvpo/groups_dropped"] == 8
    assert entry["loss"] > 0


def test_step_without_a_whole_group_makes_no_update() -> None:
    def one_in_eight(completions: list[str], **_: Any) -> list[float | None]:
        return [1.0 if i % 8 == 0 else None for i in range(len(completions))]

    run = trainer(rewards=one_in_eight, max_steps=1)
    before = parameters(run)
    with pytest.warns(UserWarning, match="makes no update"):
        run.train()
    assert all(value.equal(before[name]) for name, value in parameters(run).items())


def test_rewards_are_weighted_and_each_is_logged() -> None:
    def ones(completions: list[str], **_: Any) -> list[float]:
        return [1.0] * len(completions)

    run = trainer(rewards=[digit_reward, ones], reward_weights=[1.0, 0.5], max_steps=1)
    run.train()
    entry = run.state.log_history[0]
    assert entry["rewards/ones/mean"] == 1.0
    assert entry["reward"] == pytest.approx(entry["rewards/digit_reward/mean"] + 0.5, rel=1e-5)


def test_model_card_and_tracker_know_gvpo(tmp_path: Path) -> None:
    run = trainer(output_dir=str(tmp_path), report_to=["tensorboard"], max_steps=1)
    run.train()
    run.create_model_card(model_name="my-model")
    card = (tmp_path / "README.md").read_text()
    assert "GVPO" in card
    assert "2504.19599" in card
    assert "GRPO" not in card
    events = [
        p for p in tmp_path.rglob("events.out.tfevents*") if b"gvpo/explained_variance" in p.read_bytes()
    ]
    assert events


@pytest.mark.parametrize("kind", ["tp_size", "cp_size", "sp_size"])
def test_processes_that_share_sequences_are_refused(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=f"{kind}=2, but GVPOTrainer gives each process rows of its own"):
        config(parallelism_config=ParallelismConfig(**{kind: 2}))
    config(parallelism_config=ParallelismConfig(dp_shard_size=2))
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    monkeypatch.setenv(f"PARALLELISM_CONFIG_{kind.upper()}", "2")
    with pytest.raises(InputError, match=f"{kind}=2"):
        config()


def test_plain_grpo_config_is_refused() -> None:
    from trl import GRPOConfig

    arguments = GRPOConfig("unused", use_cpu=True, bf16=False, per_device_train_batch_size=8)
    with pytest.raises(InputError, match=r"needs a gvpo\.trl\.GVPOConfig"):
        GVPOTrainer(tiny_model(), digit_reward, arguments, train_dataset=dataset())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "cannot be felt"),
        ({"reference": "initial", "top_p": 0.9}, "top_p=0.9"),
        ({"reference": "initial", "top_k": 20}, "top_k=20"),
    ],
)
def test_settings_that_defeat_the_method_are_warned_about(changes: dict[str, Any], words: str) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        CannedTrainer(
            tiny_model(),
            digit_reward,
            config(**changes),
            train_dataset=dataset(),
            processing_class=tokenizer(),
        )
    assert any(words in str(w.message) for w in caught)


def test_small_beta_on_reused_batches_of_right_and_wrong_is_warned_about() -> None:
    def zero_one(completions: list[str], **_: Any) -> list[float]:
        return [float(c[:1].isdigit()) for c in completions]

    run = trainer(rewards=zero_one, num_iterations=2, beta=0.1, max_steps=1)
    with pytest.warns(UserWarning, match="beta is the trust region"):
        run.train()


def test_a_data_set_smaller_than_a_generation_says_so() -> None:
    with pytest.raises(InputError, match=r"has 1 prompt\(s\), but a generation takes 8"):
        GVPOTrainer(
            tiny_model(),
            digit_reward,
            config(),
            train_dataset=Dataset.from_dict({"prompt": ["12"]}),
            processing_class=tokenizer(),
        )


def test_public_names_and_defaults() -> None:
    """What users write must not change unawares."""
    import gvpo
    import gvpo.trl

    core = {"GVPOLoss", "GVPOStep", "GroupBatch", "SequenceScorer", "gvpo_loss", "gvpo_weights"}
    assert set(gvpo.__all__) == core | {"__version__"}
    assert sorted(gvpo.trl.__all__) == ["GVPOConfig", "GVPOTrainer"]
    signature = (
        "(policy_logps, reference_logps, rewards, group_ids, *, beta=0.1, mask=None, process_group=None)"
    )
    for function in (gvpo.gvpo_weights, gvpo.gvpo_loss):
        found = inspect.signature(function)
        bare = [p.replace(annotation=inspect.Parameter.empty) for p in found.parameters.values()]
        assert str(found.replace(parameters=bare, return_annotation=inspect.Signature.empty)) == signature
    names = list(inspect.signature(GVPOTrainer.__init__).parameters)
    assert names[:4] == ["self", "model", "reward_funcs", "args"]
    fields = GVPOConfig.__dataclass_fields__
    own = {
        "beta": 0.1,
        "reference": "rollout",
        "micro_batch_tokens": None,
        "share_prompts": True,
        "trust": None,
        "disable_dropout": True,
    }
    assert {name: fields[name].default for name in own} == own


def test_a_float32_head_is_asked_for_by_trl_s_option() -> None:
    made = trainer(cast_lm_head_to_fp32=True, reference="initial")
    assert made._gvpo_step.scorer.float32_head
    assert made._reference_scorer is not None
    assert made._reference_scorer.scorer.float32_head
