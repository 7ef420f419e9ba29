"""GVPO in a plain PyTorch loop: no trainer. A tiny random Llama learns to answer with even tokens.

Run it with `python examples/plain_pytorch.py`; it takes some seconds on a CPU. Replace `model`, `prompts` and
`reward` by your own. The reference is the policy as it starts, so that beta acts; sampling is transformers'.
From a uniform reference the optimum is known: even tokens have odds of exp(1 / (8 beta)), a reward of 0.777.
"""

import copy

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from gvpo.batch import GroupBatch
from gvpo.step import GVPOStep, SequenceScorer

BETA, K = 0.1, 8


def reward(completion: list[int]) -> float:
    return sum(token % 2 == 0 for token in completion) / len(completion)


def main(steps: int = 60) -> list[float]:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    reference = SequenceScorer(copy.deepcopy(model).eval())
    step = GVPOStep(model, beta=BETA, token_budget=4096)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    history = []
    print("step, mean reward, explained variance")
    for number in range(1, steps + 1):
        prompts = torch.randint(1, 32, (8, 4)).repeat_interleave(K, 0)  # 8 prompts, a group of K each
        rollout = model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            do_sample=True,
            top_k=0,
            max_new_tokens=8,
        )
        completions = rollout[:, 4:].tolist()
        rewards = [reward(completion) for completion in completions]
        group_ids = torch.arange(len(rewards)) // K
        batch = GroupBatch.from_tokens(prompts.tolist(), completions, rewards, group_ids)
        batch.reference_logps = reference.sequence_logps(batch)
        report = step(batch)  # scores, weighs, makes micro-batches and their gradients
        optimizer.step()
        optimizer.zero_grad()
        history.append(sum(rewards) / len(rewards))
        if number % 10 == 0 or number == 1:
            print(number, f"{history[-1]:.3f}", f"{report.metrics['explained_variance'].item():+.2f}")
    return history


if __name__ == "__main__":
    main()
