"""Generation that runs ahead by vLLM: the other process's engine has the weights that it was told of."""

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM has an environment of its own: make test-vllm")

from transformers import AutoModelForCausalLM

from tests.trl.oracle import Row, Snapshots
from tests.trl.test_ahead import Seen, ahead
from tests.vllm.engines import FLOAT32, LENGTH, save_model

pytestmark = [pytest.mark.slow, pytest.mark.vllm]


@torch.no_grad()
def likelihood(model: Any, rows: list[Row]) -> float:
    """Mean log p of a token."""
    found = []
    for row in rows:
        logps = model(input_ids=torch.tensor([row.prompt + row.completion])).logits[0, :-1].log_softmax(-1)
        picked = logps.gather(1, torch.tensor(row.prompt + row.completion)[1:, None])
        found.append(picked[len(row.prompt) - 1 :, 0])
    return float(torch.cat(found).mean())


def test_each_rollout_is_of_the_version_that_it_names(tmp_path: Path) -> None:
    """Of all versions it is likeliest under that by which it was sampled."""
    folder, records, snapshots = save_model(tmp_path / "model"), Seen(), Snapshots()
    run = ahead(
        tmp_path / "run",
        model=str(folder),
        rewards=[records.digits],
        callbacks=[snapshots],
        use_vllm=True,
        vllm_mode="colocate",
        vllm_max_model_length=LENGTH,
        vllm_engine_kwargs=FLOAT32,
        reference="initial",
        learning_rate=1.0,
        max_grad_norm=10.0,
    )
    assert not run.use_vllm
    run.train()
    versions = []
    for parameters in (snapshots.before, *snapshots.after):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        model.load_state_dict(parameters, strict=False)
        versions.append(model.eval())
    for number, rows in enumerate(records.generations):
        scores = [likelihood(model, rows) for model in versions]
        print(number, scores)
        assert max(range(len(scores)), key=scores.__getitem__) == max(0, number - 1)
