"""What an update takes, as laws: groups stay whole, sizes fit, and the gradient does not notice."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from gvpo.verl.minibatches import choose_rows, split_prompts


@given(st.integers(1, 30), st.integers(1, 12), st.integers(1, 3), st.none() | st.integers(0, 9))
def test_each_epoch_takes_each_prompt_once_in_mini_batches_of_the_size(prompts, size, epochs, seed):
    batches = list(split_prompts(range(prompts), size, epochs, seed))
    per_epoch = -(-prompts // size)
    assert len(batches) == epochs * per_epoch
    for epoch in range(epochs):
        mine = batches[epoch * per_epoch : (epoch + 1) * per_epoch]
        assert sorted(p for batch in mine for p in batch) == list(range(prompts))
        assert all(len(batch) == size for batch in mine[:-1])
    assert batches == list(split_prompts(range(prompts), size, epochs, seed))


@given(st.lists(st.sampled_from([0.0, 0.0, -0.3, 0.7]), min_size=1, max_size=40), st.integers(1, 9))
def test_rows_of_weight_stay_and_the_fewest_others_fill_up(weights, multiple):
    real = len(weights)
    padding = -real % multiple
    every = torch.tensor(weights + [0.0] * padding)
    lengths = [10 + i % 5 for i in range(real)] + [1] * padding
    chosen = choose_rows(every, lengths, multiple, padding=padding)
    used = {i for i, weight in enumerate(weights) if weight}
    assert used <= set(chosen)
    assert len(set(chosen)) == len(chosen)
    assert len(chosen) % multiple == 0
    assert len(chosen) - len(used) < multiple or not used
    idle = [i for i in range(real) if i not in used]
    filling = [i for i in chosen if i not in used]
    # Padding rows only where real rows do not suffice.
    assert all(i < real for i in filling) or set(idle) <= set(chosen)
