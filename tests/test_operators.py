"""Operators against dense matrices built by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.sparse.linalg import eigsh, lobpcg
from torch import Tensor, nn

import landscape
from landscape import Problem, Refused
from landscape.operators import Operator

N, INPUTS, CLASSES = 7, 4, 3


def stream(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=stream(seed), dtype=torch.float64)


def dense(A: Operator) -> Tensor:
    return A @ torch.eye(A.shape[0], dtype=A.dtype)


def symmetric(n: int, seed: int = 0) -> Tensor:
    A = randn(n, n, seed=seed)
    return A + A.T


def operator(A: Tensor) -> Operator:
    return Operator((len(A), len(A)), A.dtype, A.device, lambda V: A @ V)


def tanh_net(outputs: int = CLASSES) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(INPUTS, 5), nn.Tanh(), nn.Linear(5, outputs)).double()


def data(targets: Tensor, *, cut: int = 3) -> list[tuple[Tensor, Tensor]]:
    x = randn(len(targets), INPUTS, seed=2)
    return [(x[i : i + cut], targets[i : i + cut]) for i in range(0, len(targets), cut)]


LABELS = torch.tensor([0, 2, 1, 1, 0, 2, 2])


# --- composition --------------------------------------------------------------------------------------


def test_sums_shifts_and_multiples_are_those_of_the_dense_matrices() -> None:
    a, b = symmetric(6, 1), symmetric(6, 2)
    A, B, identity = operator(a), operator(b), torch.eye(6, dtype=torch.float64)
    for made, expected in [
        (A + B, a + b),
        (A - B, a - b),
        (A - 0.5, a - 0.5 * identity),
        (A + 2, a + 2 * identity),
        (3 * A, 3 * a),
        (A * 3, 3 * a),
        (-A, -a),
        (2 * (A - B) + 1, 2 * (a - b) + identity),
    ]:
        assert torch.allclose(dense(made), expected, rtol=0, atol=1e-14)
        vector = randn(6, seed=3)
        assert torch.allclose(made @ vector, expected @ vector, rtol=0, atol=1e-13)


def test_deflation_puts_zeros_in_the_place_of_eigenvalues() -> None:
    a = symmetric(8)
    values, vectors = torch.linalg.eigh(a)
    left = torch.linalg.eigvalsh(dense(operator(a).deflated(values[-3:], vectors[:, -3:])))
    expected = torch.cat([values[:-3], torch.zeros(3, dtype=torch.float64)]).sort().values
    assert torch.allclose(left, expected, rtol=0, atol=1e-12)


def test_a_block_is_the_submatrix() -> None:
    a = symmetric(8)
    assert torch.equal(dense(operator(a).block(2, 5)), a[2:5, 2:5])


def test_a_layers_block_is_the_hessian_of_that_layer_alone() -> None:
    problem = Problem(tanh_net(), F.cross_entropy, data(LABELS))
    start, stop = problem.space.ranges["2.weight"]
    alone = landscape.hessian(problem.replace(parameters="2.weight"))
    block = landscape.hessian(problem).block(start, stop)
    assert torch.allclose(dense(block), dense(alone), rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda A: A.deflated(torch.ones(2), torch.ones(5, 2)), r"allowed is \(k,\) and \(6, k\)"),
        (lambda A: A.block(3, 3), "0 <= start < stop <= 6"),
        (lambda A: A.block(0, 7), "0 <= start < stop <= 6"),
        (lambda A: A + operator(symmetric(5)), "two alike"),
    ],
)
def test_what_does_not_fit_is_refused(make: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make(operator(symmetric(6)))  # type: ignore[operator]


def test_scipy_finds_the_eigenvalues_of_a_network() -> None:
    H = landscape.hessian(Problem(tanh_net(), F.cross_entropy, data(LABELS)))
    expected = torch.linalg.eigvalsh(dense(H)).numpy()
    assert np.allclose(eigsh(H.to_scipy(), k=3, return_eigenvectors=False), expected[-3:], rtol=1e-10)
    start = np.random.default_rng(0).standard_normal((H.shape[0], 3))
    found = lobpcg(H.to_scipy(), start, largest=True, maxiter=200, tol=1e-10)[0]
    assert np.allclose(np.sort(found), expected[-3:], rtol=1e-8)


# --- Fisher information -------------------------------------------------------------------------------


def jacobians(model: nn.Module, x: Tensor) -> Tensor:
    """∂f/∂θ of each example, (N, outputs, n)."""
    rows = []
    for one in x:
        outputs = model(one[None])[0]
        rows.append(
            torch.stack(
                [
                    torch.cat(
                        [g.flatten() for g in torch.autograd.grad(f, model.parameters(), retain_graph=True)]
                    )
                    for f in outputs
                ]
            )
        )
    return torch.stack(rows)


def expectation(model: nn.Module, x: Tensor, slopes: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Mean over examples of Σ_y p(y) g gᵀ, g = Jᵀ s: `slopes` has p (N,) and s (N, outputs) for each y."""
    J = jacobians(model, x)
    total = torch.zeros(J.shape[2], J.shape[2], dtype=torch.float64)
    for p, s in slopes:
        g = torch.einsum("iop,io->ip", J, s)
        total += torch.einsum("i,ip,iq->pq", p, g, g)
    return total / len(x)


def test_fisher_is_the_expectation_over_the_models_own_labels() -> None:
    model, x = tanh_net(), randn(N, INPUTS, seed=2)
    f = model(x).detach()
    p = f.softmax(1)
    one_hot = torch.eye(CLASSES, dtype=torch.float64)
    expected = expectation(model, x, [(p[:, c], p - one_hot[c]) for c in range(CLASSES)])
    found = dense(landscape.fisher(Problem(model, nn.CrossEntropyLoss(), data(LABELS))))
    assert torch.allclose(found, expected, rtol=0, atol=1e-14)


def test_fisher_of_binary_labels_and_of_counts() -> None:
    model, x = tanh_net(1), randn(N, INPUTS, seed=2)
    f = model(x).detach()
    p = f.sigmoid()
    bernoulli = expectation(model, x, [(1 - p[:, 0], p), (p[:, 0], p - 1)])
    targets = (LABELS > 0).double()[:, None]
    found = dense(landscape.fisher(Problem(model, nn.BCEWithLogitsLoss(), data(targets))))
    assert torch.allclose(found, bernoulli, rtol=0, atol=1e-14)
    rate = f.exp()
    counts = [(torch.exp(k * f - rate - math.lgamma(k + 1))[:, 0], rate - k) for k in range(80)]
    found = dense(landscape.fisher(Problem(model, nn.PoissonNLLLoss(), data(LABELS.double()[:, None]))))
    assert torch.allclose(found, expectation(model, x, counts), rtol=0, atol=1e-12)


def test_fisher_of_a_squared_error_is_that_of_a_gaussian() -> None:
    model, x = tanh_net(2), randn(N, INPUTS, seed=2)
    # ℓ = ‖f − y‖²/2 over 2 outputs is −log p of y ~ N(f, 1): s = f − y, whose covariance is the identity.
    units = torch.eye(2, dtype=torch.float64)
    expected = expectation(
        model, x, [(torch.ones(N, dtype=torch.float64), units[o].expand(N, 2)) for o in range(2)]
    )
    found = dense(landscape.fisher(Problem(model, nn.MSELoss(), data(randn(N, 2, seed=5)))))
    assert torch.allclose(found, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (nn.CrossEntropyLoss(weight=torch.ones(CLASSES)), "has weights"),
        (nn.CrossEntropyLoss(label_smoothing=0.1), "smooths its labels"),
        (nn.HuberLoss(), "huber_loss"),
        (lambda f, t: F.cross_entropy(2 * f, t), "not known to be one"),
        (nn.PoissonNLLLoss(log_input=False), "rates"),
        (nn.BCEWithLogitsLoss(pos_weight=torch.ones(1)), "has weights"),
    ],
)
def test_a_loss_that_is_no_likelihood_is_refused(loss: object, words: str) -> None:
    with pytest.raises(Refused, match=words):
        landscape.fisher(Problem(tanh_net(), loss, data(LABELS)))  # type: ignore[arg-type]


# --- input Hessian ------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", [0, 4, 6])
def test_the_input_hessian_of_a_linear_softmax_is_closed(index: int) -> None:
    torch.manual_seed(0)
    model = nn.Linear(INPUTS, CLASSES).double()
    problem = Problem(model, F.cross_entropy, data(LABELS))
    p = model(randn(N, INPUTS, seed=2)[index]).softmax(0).detach()
    W = model.weight.detach()
    expected = W.T @ (torch.diag(p) - torch.outer(p, p)) @ W
    assert torch.allclose(
        dense(landscape.input_hessian(problem, example=index)), expected, rtol=0, atol=1e-15
    )


def test_the_input_hessian_does_not_depend_on_company_or_kind_of_batch() -> None:
    model, x = tanh_net(2), randn(N, INPUTS, seed=2)
    y = randn(N, 2, seed=5)

    def loss_of(one: Tensor) -> Tensor:
        return ((model(one[None]) - y[3]) ** 2).mean()

    expected = torch.autograd.functional.hessian(loss_of, x[3])
    pairs = Problem(model, nn.MSELoss(), data(y))
    mapping = Problem(
        model,
        nn.MSELoss(),
        [{"a": x[:, :2], "b": x[:, 2:], "y": y / 2}],
        output=lambda m, batch: m(torch.cat([batch["a"], batch["b"]], 1)),
        target=lambda batch: batch["y"] * 2,
    )
    black_box = Problem(model, forward=lambda m, batch: F.mse_loss(m(batch[0]), batch[1]), data=data(y))
    for problem in (pairs, mapping, black_box):
        assert torch.allclose(
            dense(landscape.input_hessian(problem, example=3)), expected, rtol=0, atol=1e-14
        )


def test_an_input_without_a_derivative_or_an_unknown_one_is_refused() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5, 3), nn.Flatten(), nn.Linear(6, 2))
    tokens = Problem(model, F.cross_entropy, [(torch.tensor([[0, 1], [2, 3]]), torch.tensor([0, 1]))])
    with pytest.raises(Refused, match="token ids"):
        landscape.input_hessian(tokens, example=0)
    with pytest.raises(IndexError, match="allowed is 0 to 1"):
        landscape.input_hessian(tokens, example=2)
    mapping = Problem(model, forward=lambda m, b: m(b["x"]).sum(), data=[{"x": torch.zeros(1, 2)}])
    with pytest.raises(Refused, match="which part"):
        landscape.input_hessian(mapping, example=0)


# --- empirical Fisher matrix and parts of the parameters ----------------------------------------------


def per_example(model: nn.Module, x: Tensor, loss_of: object) -> Tensor:
    rows = []
    for i in range(len(x)):
        slopes = torch.autograd.grad(loss_of(model(x[i : i + 1]), i), model.parameters())  # type: ignore[operator]
        rows.append(torch.cat([g.flatten() for g in slopes]))
    return torch.stack(rows)


@pytest.mark.parametrize("cut", [1, 3, 7])
def test_the_empirical_fisher_averages_outer_products_of_gradients(cut: int) -> None:
    model, x = tanh_net(), randn(N, INPUTS, seed=2)
    g = per_example(model, x, lambda f, i: F.cross_entropy(f, LABELS[i : i + 1]))
    found = dense(landscape.empirical_fisher(Problem(model, F.cross_entropy, data(LABELS, cut=cut))))
    assert torch.allclose(found, g.T @ g / N, rtol=0, atol=1e-15)


def test_the_empirical_fisher_of_sums_and_of_ignored_labels() -> None:
    model, x = tanh_net(2), randn(N, INPUTS, seed=2)
    y = randn(N, 2, seed=5)
    g = per_example(model, x, lambda f, i: ((f - y[i]) ** 2).mean())
    summed = Problem(model, nn.MSELoss(reduction="sum"), data(y), reduction="sum")
    assert torch.allclose(dense(landscape.empirical_fisher(summed)), g.T @ g / N, rtol=0, atol=1e-13)
    labels = torch.tensor([0, -100, 1, 1, 0, -100, 0])
    kept = labels >= 0
    g = per_example(model, x[kept], lambda f, i: F.cross_entropy(f, labels[kept][i : i + 1]))
    ignoring = Problem(model, nn.CrossEntropyLoss(), data(labels, cut=2))
    assert torch.allclose(dense(landscape.empirical_fisher(ignoring)), g.T @ g / 5, rtol=0, atol=1e-14)


def test_a_part_of_the_parameters_stays_where_it_was_moved() -> None:
    problem = Problem(tanh_net(), F.cross_entropy, data(LABELS))
    moved = problem.at(problem.parameters_vector() + 0.3 * randn(problem.size, seed=9))
    for whole in (problem, moved):
        part = whole.only(["0.weight", "2.bias"])
        assert part.names == ["0.weight", "2.bias"]
        rows = torch.cat([torch.arange(*whole.space.ranges[name]) for name in part.names])
        expected = dense(landscape.hessian(whole))[rows][:, rows]
        assert torch.allclose(dense(landscape.hessian(part)), expected, rtol=0, atol=1e-14)
        assert float(part.value()) == float(whole.value())
        elsewhere = part.at(part.parameters_vector() * 1.1).replace(microbatch=2)
        vector = whole.parameters_vector()
        vector[rows] *= 1.1
        assert float(elsewhere.value()) == pytest.approx(float(whole.at(vector).value()), rel=1e-14)
        again = part.only("2.bias")
        assert torch.allclose(dense(landscape.hessian(again)), expected[-3:, -3:], rtol=0, atol=1e-14)
    assert problem.only("2.bias").fingerprint() != moved.only("2.bias").fingerprint()
    with pytest.raises(ValueError, match=r"no parameter matches '2.bia'; the nearest are 2.bias"):
        problem.only("2.bia")
