"""The CPU rollout's sampling: independent of the batch, and from the right distribution."""

import asyncio
import threading
import warnings

import pytest
import torch

from gvpo.verl.cpu.sampling import Sampling, row_seed, sample
from tests.models import tiny_model

PROMPTS = [[5, 6, 7], [9, 10, 11, 12, 13], [8]]


def model():
    made = tiny_model("llama").eval()
    made.generation_config.eos_token_id, made.generation_config.pad_token_id = 2, 0
    return made


def test_a_row_does_not_depend_on_its_batch():
    lm, how = model(), Sampling(max_tokens=9)
    seeds = [row_seed("row", i) for i in range(3)]
    together = sample(lm, PROMPTS, how, seeds)
    alone = [sample(lm, [prompt], how, [seed])[0] for prompt, seed in zip(PROMPTS, seeds, strict=True)]
    assert [r.tokens for r in together] == [r.tokens for r in alone]
    assert sample(lm, PROMPTS, how, seeds) == together
    assert sample(lm, PROMPTS, how, [s + 1 for s in seeds]) != together


def test_log_probabilities_are_the_models_at_the_temperature():
    lm = model()
    (response,) = sample(lm, PROMPTS[:1], Sampling(max_tokens=6, temperature=0.7), [3])
    ids = torch.tensor([PROMPTS[0] + response.tokens])
    logps = (lm(ids).logits[0, len(PROMPTS[0]) - 1 : -1] / 0.7).log_softmax(-1)
    picked = logps.gather(1, torch.tensor(response.tokens)[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(response.logps), picked, rtol=1e-4, atol=1e-5)


def test_tokens_come_from_the_softmax_and_top_k_cuts_it():
    lm, n = model(), 4000
    for how, temperature, top_k in (
        (Sampling(max_tokens=1), 1.0, None),
        (Sampling(max_tokens=1, temperature=0.5, top_k=5), 0.5, 5),
    ):
        drawn = sample(lm, [PROMPTS[0]] * n, how, list(range(n)))
        logits = lm(torch.tensor(PROMPTS[:1])).logits[0, -1] / temperature
        if top_k:
            logits[logits < logits.topk(top_k).values.min()] = -torch.inf
        expected = logits.softmax(-1)
        got = torch.bincount(torch.tensor([r.tokens[0] for r in drawn]), minlength=len(expected)) / n
        deviation = (got - expected).abs() / (expected * (1 - expected) / n).sqrt().clamp(min=1e-3)
        assert deviation.max() < 4.5


def test_greedy_and_the_end_of_a_sequence():
    lm = model()
    with torch.no_grad():
        lm.lm_head.weight[2] = 100 * lm.model.norm.weight  # the end becomes likely
    responses = sample(lm, PROMPTS, Sampling(max_tokens=8, temperature=0), [0, 1, 2])
    assert responses == sample(lm, PROMPTS, Sampling(max_tokens=8, temperature=0), [7, 8, 9])
    for response in sample(lm, PROMPTS * 20, Sampling(max_tokens=8), list(range(60))):
        assert (response.reason == "completed") == (response.tokens[-1] == 2)
        assert 2 not in response.tokens[:-1]
        assert len(response.tokens) == len(response.logps) <= 8
        assert response.reason == "completed" or len(response.tokens) == 8


def test_generation_that_is_stopped_gives_what_there_is():
    class Third(threading.Event):
        looks = 0

        def is_set(self):
            self.looks += 1
            return self.looks >= 3

    lm, how = model(), Sampling(max_tokens=20)
    whole = sample(lm, PROMPTS, how, [1, 2, 3])
    assert all(len(response.tokens) > 3 for response in whole)
    for response, part in zip(whole, sample(lm, PROMPTS, how, [1, 2, 3], Third()), strict=True):
        assert (part.tokens, part.reason) == (response.tokens[:3], "aborted")


@pytest.fixture
def server(tmp_path):
    with warnings.catch_warnings():  # of engines that are not installed
        warnings.simplefilter("ignore")
        from gvpo.verl.cpu.rollout import HFServer
    model().save_pretrained(tmp_path)
    return HFServer(str(tmp_path), response_length=4000, seed=0, most=2)


def test_aborted_requests_are_answered_and_later_ones_wait_or_are_turned_away(server):
    def ask(prompt):
        return asyncio.create_task(server.generate("id", prompt, {"temperature": 1.0}))

    async def scene():
        server.version = 4
        ends, server.model.generation_config.eos_token_id = server.model.generation_config.eos_token_id, []
        busy = [ask([5, 6, i]) for i in range(3)]  # the third waits for the other two
        await asyncio.sleep(0.1)
        await server.abort_all_requests()
        parts = await asyncio.gather(*busy)
        later = ask([7])
        await asyncio.sleep(0.05)
        assert not later.done()
        server.version = 5
        server.model.generation_config.eos_token_id = ends
        await server.resume_generation()
        whole = await later
        await server.abort_all_requests(reject_request=True)
        return parts, whole, await server.generate("id", [8], {})

    parts, whole, turned_away = asyncio.run(scene())
    assert {part.stop_reason for part in parts} == {"aborted"}
    assert all(0 < len(part.token_ids) < 4000 for part in parts[:2])
    assert parts[2].token_ids == turned_away.token_ids == []
    assert [part.extra_fields["global_steps"] for part in (*parts, whole)] == [4, 4, 4, 5]
    assert whole.stop_reason in ("completed", "length")
    assert turned_away.stop_reason == "aborted"
