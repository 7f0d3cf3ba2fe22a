"""Networks of low curvature on the digits: E ‖∇f‖, E ‖∇²f‖, E C_f, accuracy, and robustness.

    python figures/lcnn_table.py [--out figures/lcnn_table.png] [--seeds 3]

One convolutional network with BatchNorm is trained in seven ways: as it is, converted (`to_low_curvature` with
its penalty), with a penalty on input gradients, both, with CURE, with softplus of fixed β and stronger weight
decay, and on adversarial examples. After Srinivas et al. 2022 (arXiv 2206.07144), whose networks are ResNet-18 on
CIFAR. f is the loss of the true label; averages are over test data that was not trained on, then over seeds.
Prints both tables, and draws the robustness.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor, nn

import landscape
from landscape import training
from landscape.metrics import InputCurvature, Robustness
from landscape.seeds import generator
from landscape.testbeds import split
from landscape.testbeds.digits import digits
from landscape.testbeds.nets import own_stream

EPOCHS, BATCH, LEARNING_RATE, DECAY = 30, 64, 0.05, 5e-4
BETA, STEP, CURE = 10.0, 0.5, 1.0  # β of fixed softplus; h of CURE, in grey levels of [0, 1], and its weight
GRADIENT, ATTACK = 0.05, 0.5  # weight of the penalty on gradients; radius of training on adversarial examples
EPSILON = (0.1, 0.25, 0.5, 0.75, 1.0)
# Weights of the penalty on β and on |log γ|. With those of the paper, 0.01 and 0.01, E C_f falls less here.
ON_BETA, ON_GAMMA = 1e-3, 0.4
COLOURS = ("#000000", "#0072B2", "#009E73", "#56B4E9", "#CC79A7", "#E69F00", "#D55E00")

Extra = Callable[[nn.Module, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Way:
    """How a network is trained: what becomes of it first, what is added to the loss, weight decay, attacks."""

    convert: Callable[[nn.Module], nn.Module] = lambda model: model
    extra: tuple[Extra, ...] = ()
    decay: float = DECAY
    attacked: bool = False


@dataclass(frozen=True)
class Outcome:
    """What one trained network shows on the test data."""

    gradient: float
    hessian: float
    curvature: float
    accuracy: float
    robust: np.ndarray
    change: np.ndarray


def network(seed: int) -> nn.Module:
    """Two convolutions with BatchNorm and a linear layer, on images (1, 8, 8)."""
    with own_stream(seed, "lcnn_table"):
        return nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10),
        )  # fmt: skip


def low_curvature(model: nn.Module) -> nn.Module:
    """Convert the network."""
    return training.to_low_curvature(model, torch.zeros(1, 1, 8, 8))


def softplus(model: nn.Module) -> nn.Module:
    """Put softplus of fixed β in the place of ReLUs."""
    for i, module in enumerate(model):
        if isinstance(module, nn.ReLU):
            model[i] = training.CenteredSoftplus(BETA, learnable=False)
    return model


def losses(model: nn.Module, y: Tensor) -> Callable[[Tensor], Tensor]:
    """The loss of each example as a function of the inputs."""
    return lambda x: F.cross_entropy(model(x), y, reduction="none")


def on_layers(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:  # noqa: ARG001
    """The penalty on β and γ."""
    return training.low_curvature_penalty(model, ON_BETA, ON_GAMMA)


def on_gradients(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The penalty on input gradients."""
    return GRADIENT * training.gradient_penalty(losses(model, y), x)


def on_curvature(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """CURE."""
    return CURE * training.cure_penalty(losses(model, y), x, STEP)


WAYS = {
    "Standard": Way(),
    "LCNN": Way(low_curvature, (on_layers,)),
    "GradReg": Way(extra=(on_gradients,)),
    "LCNN+GradReg": Way(low_curvature, (on_layers, on_gradients)),
    "CURE": Way(extra=(on_curvature,)),
    "Softplus+WD": Way(softplus, decay=5e-3),
    "AdvTrain": Way(attacked=True),
}


def train(way: Way, seed: int) -> nn.Module:
    """Train with SGD on four fifths of the digits; the rate falls along half a cosine."""
    (x, y), _ = split(*digits())
    x = x.view(-1, 1, 8, 8)
    model = way.convert(network(seed)).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=0.9, weight_decay=way.decay)
    fall = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
    order = generator(seed, "lcnn_table", 0)
    for _ in range(EPOCHS):
        for chosen in torch.randperm(len(x), generator=order).split(BATCH):
            inputs, targets = x[chosen], y[chosen]
            if way.attacked:
                inputs = attacked(model, inputs, targets)
            optimizer.zero_grad()
            value = F.cross_entropy(model(inputs), targets)
            sum((extra(model, inputs, targets) for extra in way.extra), value).backward()
            optimizer.step()
        fall.step()
    return model.eval()


def attacked(model: nn.Module, x: Tensor, y: Tensor, steps: int = 3) -> Tensor:
    """Adversarial examples by projected gradient ascent in the L2 ball."""
    move = torch.zeros_like(x)
    model.eval()
    for _ in range(steps):
        slope = training.penalties.input_gradients(losses(model, y), x + move).detach()
        move = move + ATTACK / 2 * slope / slope.flatten(1).norm(dim=1).clamp(min=1e-12).view(-1, 1, 1, 1)
        length = move.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        move = move * (ATTACK / length.clamp(min=ATTACK))
    model.train()
    return x + move


def outcome(model: nn.Module) -> Outcome:
    """Measure on the test data."""
    _, (x, y) = split(*digits())
    problem = landscape.Problem(model, nn.CrossEntropyLoss(), [(x.view(-1, 1, 8, 8), y)])
    curved = landscape.measure(InputCurvature(probes=0), problem)
    robust = landscape.measure(Robustness(epsilon=EPSILON, steps=10), problem)
    means = (
        float(curved[f"mean_{name}"]) for name in ("gradient_norm", "hessian_norm", "normalized_curvature")
    )
    return Outcome(
        *means, float(robust["accuracy"]), robust["adversarial_accuracy"].values, robust["gradient_robustness"].values
    )  # fmt: skip


def table(found: dict[str, list[Outcome]]) -> str:
    """Return both tables: means over seeds, with half the range."""
    lines = [f"{'':14}{'E ‖∇f‖':>16}{'E ‖∇²f‖':>18}{'E C_f':>16}{'accuracy (%)':>18}"]
    for name, runs in found.items():
        columns = (("gradient", 1), ("hessian", 1), ("curvature", 1), ("accuracy", 100))
        cells = [np.array([factor * getattr(run, key) for run in runs]) for key, factor in columns]
        lines.append(f"{name:14}" + "".join(f"{c.mean():10.3f} ± {np.ptp(c) / 2:.3f}" for c in cells))
    lines += ["", "accuracy under attack (%), ε =  " + "  ".join(f"{e:6g}" for e in EPSILON)]
    for name, runs in found.items():
        robust = 100 * np.mean([run.robust for run in runs], axis=0)
        lines.append(f"{name:30}  " + "  ".join(f"{r:6.1f}" for r in robust))
    return "\n".join(lines)


def draw(figure: Figure, found: dict[str, list[Outcome]]) -> None:
    """Draw accuracy under attack and the change of gradients against ε; bars reach over all seeds."""
    left, right = figure.subplots(1, 2)
    for (name, runs), colour in zip(found.items(), COLOURS, strict=True):
        robust = 100 * np.array([[run.accuracy, *run.robust] for run in runs])
        change = np.array([run.change for run in runs])
        for axes, x, values in ((left, (0.0, *EPSILON), robust), (right, EPSILON, change)):
            mean = values.mean(axis=0)
            bars = np.abs(np.stack([values.min(axis=0), values.max(axis=0)]) - mean)
            style = "-" if name in {"Standard", "LCNN", "GradReg", "LCNN+GradReg"} else "--"
            axes.errorbar(x, mean, yerr=bars, color=colour, linestyle=style, marker="o", markersize=3,
                          linewidth=1.1, elinewidth=0.7, capsize=1.5, label=name)  # fmt: skip
    left.set_ylim(0, 102)
    left.set_ylabel("accuracy under attack (%)", fontsize=8)
    right.set_ylabel("relative change of the gradient", fontsize=8)
    right.set_yscale("log")
    for axes in (left, right):
        axes.set_xlabel("ε, length of the displacement", fontsize=8)
        axes.set_xlim(left=0)
        axes.tick_params(labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(
        *left.get_legend_handles_labels(), loc="outside lower center", ncols=7, fontsize=7, frameon=False
    )


def main() -> None:
    """Train, measure, print and draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".png"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--way", choices=WAYS, action="append", help="only these; nothing is drawn then")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, list[Outcome]] = {}
    for name in arguments.way or WAYS:
        found[name] = [outcome(train(WAYS[name], seed)) for seed in range(arguments.seeds)]
        print(table({name: found[name]}).splitlines()[1], flush=True)
    print(f"\n{table(found)}")
    if arguments.way:
        return
    figure = Figure(figsize=(7.0, 3.0), layout="constrained")
    FigureCanvasAgg(figure)
    draw(figure, found)
    title = f"Digits, a convolutional network trained in seven ways; {arguments.seeds} seeds, bars over all"
    figure.suptitle(title, fontsize=8)
    figure.savefig(arguments.out, dpi=200, metadata={"Software": None})


if __name__ == "__main__":
    main()
