# %% [markdown]
# # GVPO from the formula, in 60 lines
#
# One prompt, eight possible answers, a policy that is a table of eight numbers: small enough that the
# optimum is known, and that what GVPO promises can be looked at. Only the last cell uses the package.
#
# This page is what `make notebooks` made of `examples/notebooks/formula.py`, which `python` runs as well (in
# seconds) and `jupytext --to ipynb` makes a notebook: seed 0.
#
# For $k$ responses to a prompt, with rewards $R_i$ and log-probabilities $S_i$ under the policy and $S'_i$
# under a reference, GVPO fits the *implicit reward* $R_\theta = \beta\,(S - S')$ to the reward by least
# squares, up to a constant:
#
# $$\mathcal L = \frac{1}{2(k-1)} \sum_i
# \left[(R_{\theta,i} - \overline{R_\theta}) - (R_i - \overline R)\right]^2$$

# %%
import matplotlib.pyplot as plt
import torch

from gvpo import gvpo_weights

torch.set_default_dtype(torch.float64)


def gvpo(policy_logps, reference_logps, rewards, beta):
    implicit = beta * (policy_logps - reference_logps)
    residual = (implicit - implicit.mean()) - (rewards - rewards.mean())
    return residual.square().sum() / (2 * (len(rewards) - 1))


# %% [markdown]
# ## The world
#
# The policy starts as the reference. Rewards are graded: answer 6 is best, 7 nearly as good, 4 half-way. What
# is looked for is the policy of the largest
# $\mathbb E[R] - \beta\,\mathrm{KL}(\pi\,\|\,\pi_\text{ref})$, and it has a closed form:
# $\pi^* \propto \pi_\text{ref} \exp(R/\beta)$. Of a language model nobody can compute it; here we can.

# %%
BETA, K, STEPS = 0.25, 8, 1000
reference = torch.tensor([0.30, 0.25, 0.15, 0.10, 0.08, 0.06, 0.04, 0.02]).log()
rewards = torch.tensor([0.0, 0.2, 0.1, 0.6, 0.0, 1.0, 0.9, 0.3])
optimum = (reference + rewards / BETA).log_softmax(-1)


def kl(log_p, log_q):
    return float((log_p.exp() * (log_p - log_q)).sum())


# %% [markdown]
# ## Whoever samples
#
# Each update sees eight answers and their rewards. They are sampled by the policy, by the reference, by
# chance, or by somebody whose taste is the reference's upside down. *The learner is not told.* Beside GVPO
# runs what is usual: GRPO's normalised advantages, with a k3 penalty for the distance to the reference and β
# as its coefficient.


# %%
def grpo(policy_logps, reference_logps, rewards, beta):
    advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
    gap = reference_logps - policy_logps
    ratio = (policy_logps - policy_logps.detach()).exp()
    return (beta * (gap.exp() - gap - 1) - advantages * ratio).mean()


def train(loss, sampler, beta=BETA):
    torch.manual_seed(0)
    table = reference.clone().requires_grad_()
    optimizer, distances = torch.optim.Adam([table], lr=0.02), []
    for _ in range(STEPS):
        policy = table.log_softmax(-1)
        distances.append(max(kl(policy.detach(), optimum), 1e-17))
        chances = policy.detach().exp() if sampler is None else sampler
        answers = torch.multinomial(chances, K, replacement=True)
        optimizer.zero_grad()
        loss(policy[answers], reference[answers], rewards[answers], beta).backward()
        optimizer.step()
    return table.detach().log_softmax(-1), distances


samplers = {"the policy": None, "the reference": reference.exp(), "chance": torch.ones(8) / 8}
samplers["upside down"] = reference.exp().flip(0)
found = {(loss, who): train(loss, samplers[who]) for loss in (gvpo, grpo) for who in samplers}
for (loss, who), (policy, distances) in found.items():
    name, reward = loss.__name__, float(policy.exp() @ rewards)
    print(f"{name} from {who:13}  KL to π* {distances[-1]:.0e}   reward {reward:.3f}")
print(f"the optimum itself has a reward of {float(optimum.exp() @ rewards):.3f}")

# %% [markdown]
# GVPO comes to the same policy from all four samplers, and ever nearer: its loss is zero nowhere else
# ([fact 1](../theory.md#fact-1-the-optimum-is-unique)). GRPO comes to four different ones, and to π* not
# from its own samples either: advantages divided by a standard deviation belong to another objective.
#
# This is one setting for both, untuned. [Evidence](../evidence.md#optimum) has eight algorithms, each with
# the best of eight settings, and where GVPO has no lead: REINFORCE with β·KL in the reward and a
# leave-one-out baseline makes the same update.

# %%
figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
for (loss, who), (_, distances) in found.items():
    label = loss.__name__ if who == "chance" else None
    axes[0].semilogy(distances, color="C0" if loss is gvpo else "C3", lw=1, label=label)
axes[0].set(title="Four samplers each", xlabel="update", ylabel="KL to π* (nats)")
for place, (name, log_p) in enumerate(
    {"reference": reference, "GVPO, from chance": found[gvpo, "chance"][0], "π*": optimum}.items()
):
    axes[1].bar(torch.arange(1, 9) + 0.27 * (place - 1), log_p.exp(), 0.27, label=name)
axes[1].set(title="Where it ends", xlabel="answer", ylabel="probability")
for axis in axes:
    axis.legend(frameon=False)
plt.show()

# %% [markdown]
# ## What β does
#
# An answer better by 1 becomes $e^{1/\beta}$ times as likely against the other as it was under the
# reference. Small β: much reward, far away. Large β: close to the reference. Each line is trained from
# chance.

# %%
for beta in (0.1, 0.25, 0.5, 1.0):
    policy, _ = train(gvpo, samplers["chance"], beta)
    reward, distance = float(policy.exp() @ rewards), kl(policy, reference)
    print(f"β {beta:4}   reward {reward:.3f}   KL to the reference {distance:.3f} nats")

# %% [markdown]
# ## Why the size of a batch does not matter
#
# The derivative in each $S_i$ is a plain number, a *weight*, and `gvpo_weights` computes it without a graph.
# A step is a weighted log-likelihood, $-\sum_i w_i S_i$, which may be cut into micro-batches, over processes
# and in any order ([fact 2](../theory.md#fact-2-the-loss-is-quadratic-its-gradient-linear-in-s)). That is how
# the trainers do it.

# %%
logps, zeros = torch.randn(K).requires_grad_(), torch.zeros(K)
gvpo(logps, zeros, rewards, BETA).backward()
weights = gvpo_weights(logps.detach(), zeros, rewards, torch.zeros(K, dtype=torch.long), beta=BETA)
print(f"the largest difference to autograd: {float((logps.grad + weights).abs().max()):.0e}")

# %% [markdown]
# Next: [a language model on your own reward](own_reward.md), [learning from logs](logs.md),
# [the seven facts](../theory.md). A loop without a trainer for a language model: `examples/plain_pytorch.py`.
