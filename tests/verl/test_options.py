"""Other reference and scale, epochs in random order, verl's group filter: also the formula's updates."""

from collections import Counter

import pytest

from tests.verl.harness import arguments, make_assets, replay, run
from tests.verl.records import updates

pytestmark = [pytest.mark.slow, pytest.mark.cluster]


@pytest.mark.timeout(400)
def test_initial_reference_published_scale_shuffled_epochs_and_filtered_groups(tmp_path):
    assets = make_assets(tmp_path / "assets")
    extra = [
        "gvpo.reference=initial",
        "gvpo.loss_scale=published",
        "actor_rollout_ref.actor.ppo_epochs=2",
        "actor_rollout_ref.actor.shuffle=True",
        "actor_rollout_ref.rollout.n=5",
        "data.train_batch_size=3",
        "algorithm.filter_groups.enable=True",  # prompts 1 and 6 have equal rewards
    ]
    run(arguments(assets, tmp_path, *extra), tmp_path)
    done = replay(assets, updates(tmp_path / "updates"), beta=0.3, lr=0.05, reference="initial", scale=2 / 5)
    assert [update.groups for update in done] == [[5, 5], [5]] * 4
    first, again = (set(update.dump["prompts"]) for update in (done[0], done[2]))
    assert first != again  # each epoch has its own mini-batches
    for update in done:
        rewards = {*zip(update.dump["prompts"], update.dump["rewards"].tolist(), strict=True)}
        assert min(Counter(prompt for prompt, _ in rewards).values()) > 1
        assert update.dump["metrics"]["gvpo/loss"] == pytest.approx(update.loss, rel=1e-3)
        assert update.dump["metrics"]["actor/grad_norm"] == pytest.approx(update.gradient_norm, rel=1e-3)
