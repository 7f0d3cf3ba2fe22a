"""The metric `evidence` against the exact evidence of Bayesian linear regression, and SGD's noise scale."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import landscape
from landscape import Problem, Refused
from landscape.metrics import Evidence
from landscape.metrics.evidence import noise_scale

PRECISION = 0.7


def unit_noise(f: Tensor, y: Tensor) -> Tensor:
    """-ln N(y; f, 1), the mean over a batch."""
    return ((f - y) ** 2 / 2 + math.log(2 * math.pi) / 2).mean()


def regression(
    features: int, examples: int, seed: int = 0, variance: float = 1.0
) -> tuple[nn.Module, Tensor, Tensor]:
    """A linear model at the maximum of its posterior, for noise of this variance."""
    draws = torch.Generator().manual_seed(seed)
    X = torch.randn(examples, features, generator=draws, dtype=torch.float64)
    X *= torch.logspace(0, -1.5, features, dtype=torch.float64)
    y = X @ torch.randn(features, 1, generator=draws, dtype=torch.float64)
    y += variance**0.5 * torch.randn(examples, 1, generator=draws, dtype=torch.float64)
    model = nn.Linear(features, 1, bias=False).double()
    inverse = X.T @ X / variance + PRECISION * torch.eye(features, dtype=torch.float64)
    with torch.no_grad():
        model.weight.copy_(torch.linalg.solve(inverse, X.T @ y / variance).T)
    return model, X, y


def exact_evidence(X: Tensor, y: Tensor, variance: float = 1.0) -> float:
    """ln N(y; 0, variance I + X Xᵀ / λ)."""
    K = variance * torch.eye(len(X), dtype=torch.float64) + X @ X.T / PRECISION
    fit = (y.T @ torch.linalg.solve(K, y)).item()
    return -0.5 * (fit + torch.linalg.slogdet(K).logabsdet.item() + len(X) * math.log(2 * math.pi))


def cut(X: Tensor, y: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    return [(X[i : i + size], y[i : i + size]) for i in range(0, len(X), size)]


@pytest.mark.parametrize("curvature", ["ggn", "hessian"])
@pytest.mark.parametrize("size", [13, 40])
def test_the_dense_evidence_of_linear_regression_is_exact(curvature: str, size: int) -> None:
    model, X, y = regression(7, 40)
    problem = Problem(model, unit_noise, cut(X, y, size))
    ds = landscape.measure(Evidence(prior_precision=PRECISION, curvature=curvature), problem)
    assert float(ds["log_evidence"]) == pytest.approx(exact_evidence(X, y), abs=1e-10)
    assert ds.attrs["way"] == "dense"
    hessian = X.T @ X + PRECISION * torch.eye(7, dtype=torch.float64)
    logdet = torch.linalg.slogdet(hessian).logabsdet.item()
    assert float(ds["logdet"]) == pytest.approx(logdet, abs=1e-10)
    assert float(ds["log_occam_factor"]) == pytest.approx(3.5 * math.log(PRECISION) - logdet / 2, abs=1e-10)
    assert float(ds["gradient_norm"]) < 1e-10
    assert bool(ds["converged"])


@pytest.mark.parametrize(
    ("loss", "reduction", "variance"),
    [(nn.MSELoss(), "mean", 0.5), (nn.MSELoss(reduction="sum"), "sum", 0.5)],
)
def test_pytorchs_squared_error_is_a_gaussian_of_variance_one_half(
    loss: nn.Module, reduction: str, variance: float
) -> None:
    model, X, y = regression(5, 30, variance=variance)
    problem = Problem(model, loss, cut(X, y, 7), reduction=reduction)
    ds = landscape.measure(Evidence(prior_precision=PRECISION), problem)
    assert float(ds["log_evidence"]) == pytest.approx(exact_evidence(X, y, variance), abs=1e-10)
    assert ds.attrs["likelihood"] == "Gaussian of variance 1/2"


def test_the_stochastic_evidence_is_within_its_error() -> None:
    """120 runs: the number inside ±1.96 stderr is below 105 with probability 3e-4 where 95 % are inside."""
    model, X, y = regression(60, 90)
    problem = Problem(model, unit_noise, cut(X, y, 90))
    truth = exact_evidence(X, y)
    inside, errors = 0, []
    for seed in range(120):
        metric = Evidence(prior_precision=PRECISION, method="lanczos", probes=4, steps=25)
        ds = landscape.evaluate(metric, problem, seed=seed)
        off = float(ds["log_evidence"]) - truth
        inside += abs(off) <= 1.96 * float(ds["log_evidence_stderr"])
        errors.append(float(ds["log_evidence_stderr"]))
    assert inside >= 105
    assert max(errors) < 0.05 * abs(truth)


def test_an_indefinite_hessian_is_refused_and_named() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    X, y = torch.randn(20, 3, dtype=torch.float64), 5 * torch.randn(20, 1, dtype=torch.float64)
    problem = Problem(model, unit_noise, [(X, y)])
    with pytest.raises(Refused, match="lambda_min"):
        landscape.measure(Evidence(prior_precision=0.01, curvature="hessian"), problem)
    assert math.isfinite(float(landscape.measure(Evidence(prior_precision=0.01), problem)["log_evidence"]))


@pytest.mark.parametrize("loss", [nn.HuberLoss(), nn.CrossEntropyLoss(label_smoothing=0.1)])
def test_a_loss_that_is_no_likelihood_is_refused(loss: nn.Module) -> None:
    model = nn.Linear(3, 2).double()
    y = (
        torch.randn(4, 2, dtype=torch.float64)
        if isinstance(loss, nn.HuberLoss)
        else torch.tensor([0, 1, 1, 0])
    )
    problem = Problem(model, loss, [(torch.randn(4, 3, dtype=torch.float64), y)])
    with pytest.raises(Refused, match="in nats"):
        landscape.measure(Evidence(), problem)


def test_cross_entropy_by_quadrature() -> None:
    """One weight: the evidence integral by quadrature, to which Laplace's approximation converges."""
    draws = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 1, generator=draws, dtype=torch.float64)
    y = (torch.rand(4000, generator=draws) < torch.sigmoid(1.3 * x[:, 0])).double()[:, None]
    w = np.linspace(0.9, 1.7, 4001)
    logits = x.numpy() * w
    cost = (np.logaddexp(0, logits) - y.numpy() * logits).sum(0) + PRECISION / 2 * w**2
    best = w[cost.argmin()]
    density = np.exp(cost.min() - cost) * math.sqrt(PRECISION / (2 * math.pi))
    exact = math.log(np.trapezoid(density, w)) - cost.min()
    model = nn.Linear(1, 1, bias=False).double()
    with torch.no_grad():
        model.weight.fill_(best)
    ds = landscape.measure(
        Evidence(prior_precision=PRECISION), Problem(model, nn.BCEWithLogitsLoss(), cut(x, y, 999))
    )
    assert float(ds["log_evidence"]) == pytest.approx(exact, abs=1e-3)


def test_the_noise_scale() -> None:
    assert noise_scale(0.1, 32, 1024) == pytest.approx(0.1 * 31)
    assert noise_scale(0.1, 32, 1024, momentum=0.9) == pytest.approx(31.0)
    assert noise_scale(0.1, 8, 8) == 0.0
    model, X, y = regression(3, 20)
    metric = Evidence(learning_rate=0.5, batch_size=5, momentum=0.5)
    ds = landscape.measure(metric, Problem(model, unit_noise, cut(X, y, 20)))
    assert float(ds["noise_scale"]) == pytest.approx(3.0)
    for wrong in ((0.0, 1, 2), (0.1, 3, 2), (0.1, 0, 2), (0.1, 1, 2, 1.0)):
        with pytest.raises(ValueError, match="allowed is"):
            noise_scale(*wrong)
    with pytest.raises(ValueError, match="needs both"):
        Evidence(learning_rate=0.1)
