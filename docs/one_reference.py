"""Draws `assets/one-reference.png`, from numbers that `gvpo_loss` computes: `python docs/one_reference.py`.

Four responses at the optimum of reference A. Measured against A alone their residuals are 0; with the
log-probabilities of two of them taken from another reference, B, they are not.
"""

from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from gvpo import gvpo_loss

BETA = 0.3
REWARDS = torch.tensor([0.0, 0.35, 0.7, 1.0], dtype=torch.float64)
A = torch.tensor([-7.0, -5.5, -8.0, -6.0], dtype=torch.float64)
B = torch.tensor([-7.4, -6.7, -8.3, -8.1], dtype=torch.float64)  # the same policy, some updates later
FROM_B = torch.tensor([False, True, False, True])
POLICY = A + REWARDS / BETA - 1.2  # log π* = log π_A + R/β − log Z(x)
COLORS = {False: "#1f77b4", True: "#d95f02"}


def panel(axis, reference: torch.Tensor, title: str) -> None:
    implicit = BETA * (POLICY - reference)
    result = gvpo_loss(POLICY, reference, REWARDS, torch.zeros(4, dtype=torch.long), beta=BETA)
    offset = (implicit - REWARDS).mean()
    residuals = implicit - REWARDS - offset
    line = torch.tensor([-0.1, 1.1], dtype=torch.float64)
    axis.plot(line, line + offset, color="0.6", zorder=1)
    axis.annotate(
        r"$R_\theta = R$ + constant",
        (0.62, float(0.62 + offset)),
        xytext=(-96, 12),
        textcoords="offset points",
        color="0.45",
    )
    mixed = bool((reference != A).any())
    for i in range(4):
        other = mixed and bool(FROM_B[i])
        x, y = float(REWARDS[i]), float(implicit[i])
        if abs(residuals[i]) > 0.02:
            axis.annotate(
                "",
                (x, y - float(residuals[i])),
                xytext=(x, y),
                arrowprops={"arrowstyle": "->", "color": "crimson", "lw": 1.8},
            )
        axis.scatter([x], [y], s=70, color=COLORS[other], zorder=3)
        axis.annotate(
            f"S′ under {'B' if other else 'A'}",
            (x, y),
            xytext=(-20, 10) if other else (9, -11),
            textcoords="offset points",
            fontsize=8,
        )
    axis.set_title(f"{title}\nloss {result.loss.item():.3f}", fontsize=10)
    axis.set_xlabel("reward R")
    axis.set_xlim(-0.12, 1.3)
    axis.set_ylim(-0.8, 1.5)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def main() -> None:
    figure = Figure(figsize=(9, 4.2), dpi=140, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    panel(left, A, "One reference: the optimum of A is at rest")
    panel(right, torch.where(FROM_B, B, A), "Two references in one group: pushed off the optimum")
    left.set_ylabel(r"implicit reward $R_\theta$ = β (S − S′)")
    path = Path(__file__).parent / "assets" / "one-reference.png"
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path)


if __name__ == "__main__":
    main()
