"""Runs `python -m gvpo.verl` on CPUs with a tiny model, and computes its updates by plain autograd."""

import contextlib
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import torch
from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from tests.models import tiny_model
from tests.test_objective import literal_loss

RESPONSE = 12
ROOT = Path(__file__).parents[2]  # its tests are what Ray's processes import, too
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


def make_assets(folder: Path, prompts: int = 24) -> Path:
    """A random model of a few thousand parameters, a token a character, and prompts of several lengths."""
    vocabulary = ["<pad>", "<bos>", "<eos>", "<unk>", *"0123456789+-="]
    inner = Tokenizer(WordLevel({token: i for i, token in enumerate(vocabulary)}, unk_token="<unk>"))
    inner.pre_tokenizer = Split(Regex("."), behavior="isolated")
    inner.decoder = Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )
    tokenizer.chat_template = TEMPLATE
    model = tiny_model("llama", vocab_size=len(vocabulary), max_position_embeddings=256)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    for part in (tokenizer, model):
        part.save_pretrained(folder / "model")
    rows = [
        {
            "data_source": "toy",
            "prompt": [{"role": "user", "content": f"<bos>{i}{'+1' * (i % 4)}="}],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": str(i)},
            "extra_info": {"index": i},
        }
        for i in range(prompts)
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "prompts.parquet")
    return folder


def arguments(assets: Path, output: Path, *extra: str, workers: int = 2) -> list[str]:
    """Overrides of a run of two steps with SGD in float32; later ones win."""
    return [
        "+machine=cpu",
        f"trainer.n_gpus_per_node={workers}",
        "trainer.logger=[console]",
        "trainer.val_before_train=False",
        "trainer.test_freq=-1",
        "trainer.save_freq=-1",
        "trainer.total_training_steps=2",
        "trainer.resume_mode=disable",
        f"trainer.default_local_dir={output / 'checkpoints'}",
        f"data.train_files={assets / 'prompts.parquet'}",
        f"data.val_files={assets / 'prompts.parquet'}",
        "data.max_prompt_length=32",
        f"data.max_response_length={RESPONSE}",
        "data.train_batch_size=4",
        "data.shuffle=False",
        f"actor_rollout_ref.model.path={assets / 'model'}",
        "actor_rollout_ref.actor.optim.optimizer=SGD",
        "actor_rollout_ref.actor.optim.lr=0.05",
        "actor_rollout_ref.actor.optim.weight_decay=0",
        "actor_rollout_ref.actor.optim.clip_grad=1000",
        "actor_rollout_ref.actor.ppo_mini_batch_size=2",
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=2",
        "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=2",
        "actor_rollout_ref.rollout.n=4",
        f"reward.custom_reward_function.path={Path(__file__).with_name('rewards.py')}",
        "gvpo.beta=0.3",
        f"gvpo.dump_dir={output / 'updates'}",
        *extra,
    ]


def start(arguments: list[str], output: Path, **environment: str) -> subprocess.Popen[bytes]:
    """Start a run; what it prints goes to `output/log.txt`."""
    output.mkdir(parents=True, exist_ok=True)
    variables = {**os.environ, "HYDRA_FULL_ERROR": "1", "RAY_DEDUP_LOGS": "0"}
    variables |= {"PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}", **environment}
    with open(output / "log.txt", "ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "gvpo.verl", *arguments],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=variables,
            cwd=output,
            start_new_session=True,
        )


def run(arguments: list[str], output: Path, timeout: float = 380, **environment: str) -> str:
    """Run to the end and return what was printed; whatever happens, nothing stays behind."""
    process = start(arguments, output, **environment)
    try:
        code = process.wait(timeout)
    finally:
        stop(process)
    text = (output / "log.txt").read_text(errors="replace")
    assert code == 0, text[-8000:]
    return text


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a run and the processes of its session."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@dataclass
class Update:
    """An update as dumped, and as plain autograd makes it."""

    dump: dict[str, Any]
    loss: float
    gradient_norm: float
    groups: list[int] = field(default_factory=list)


def replay(
    assets: Path,
    dumps: list[dict[str, Any]],
    *,
    beta: float,
    lr: float,
    reference: str = "rollout",
    scale: float = 1,
    optimizer: str = "SGD",
) -> list[Update]:
    """The same updates in one process: the formula on the model's own logits, autograd, torch's optimizer."""
    model = AutoModelForCausalLM.from_pretrained(assets / "model", attn_implementation="eager").double()
    initial = AutoModelForCausalLM.from_pretrained(assets / "model", attn_implementation="eager").double()
    steps = getattr(torch.optim, optimizer)(model.parameters(), lr=lr, weight_decay=0)
    done, versions, step = [], {}, 0
    for dump in dumps:
        if dump["step"] != step:  # version v is what step v made
            step = dump["step"]
            versions[step - 1] = {f"model.{n}": p.detach().clone() for n, p in model.named_parameters()}
        policy = _logps(model, dump)
        with torch.no_grad():
            if reference == "initial":
                against = _logps(initial, dump)
            else:
                # verl 0.6.0 has no older versions than the one that made the responses.
                latest = torch.full([len(dump["input_ids"])], step - 1)
                each = dump.get("reference_versions", latest).long()
                scored = {
                    version: torch.func.functional_call(_Scorer(model), versions[version], dump)
                    for version in each.unique().tolist()
                }
                against = torch.stack([scored[version][i] for i, version in enumerate(each.tolist())])
        # Rows of a session are one response.
        sessions = list(dict.fromkeys(dump["sessions"]))
        joins = torch.tensor([[float(s == name) for s in dump["sessions"]] for name in sessions]).double()
        rewards = joins @ dump["rewards"].double() / joins.sum(1)
        ids = {prompt: i for i, prompt in enumerate(dict.fromkeys(dump["prompts"]))}
        groups = torch.tensor([ids[prompt] for prompt, _ in sessions])
        every = torch.ones(len(groups), dtype=torch.bool)
        loss = literal_loss(joins @ policy, joins @ against, rewards, groups, beta, every)
        model.zero_grad()
        (scale * loss).backward()
        norm = sum(p.grad.pow(2).sum() for p in model.parameters()).sqrt().item()
        steps.step()
        done.append(Update(dump, loss.item(), norm, torch.bincount(groups).tolist()))
    return done


class _Scorer(torch.nn.Module):
    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, dump: dict[str, Any]) -> torch.Tensor:
        return _logps(self.model, dump)


def _logps(model: torch.nn.Module, dump: dict[str, Any]) -> torch.Tensor:
    rows = []
    for ids, responses, mask in zip(dump["input_ids"], dump["responses"], dump["response_mask"], strict=True):
        logps = model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)[-len(responses) :]
        rows.append((logps.gather(1, responses[:, None])[:, 0] * mask).sum())
    return torch.stack(rows)
