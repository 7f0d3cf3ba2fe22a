"""Metric `class_structure` against explicit matrices, known spectra, and the identities of the decomposition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from dense_classes import Dense, dense, spectrum
from torch import Tensor, nn

import landscape
from landscape import Problem, ggn_trace, testbeds
from landscape.class_structure import embedding, labels, spectra
from landscape.class_structure.gram_tasks import Grams
from landscape.class_structure.grams import Weights, mirrored
from landscape.class_structure.vectors import Source, mean_probabilities
from landscape.class_structure.work import Limits
from landscape.metrics import ClassStructure
from landscape.testbeds import golden
from landscape.testbeds.digits import digits

EXACT = 1e-12
WEIGHTINGS = ("2019", "2020")
FEW = {"spectra": ("hessian", "G"), "probes": 1, "steps": 8}
CASES = [("mlp", "balanced"), ("mlp", "unbalanced"), ("cnn", "unbalanced")]
COUNTS = {"balanced": (6, 6, 6), "unbalanced": (9, 3, 6)}


@pytest.fixture(autouse=True)
def _no_embedding(monkeypatch: pytest.MonkeyPatch) -> None:
    """A t-SNE takes longer than all else here, and has tests of its own."""
    monkeypatch.setattr(embedding, "embed", lambda gram, perplexity: np.zeros((len(gram), 2)))


def mlp() -> nn.Module:
    net = testbeds.mlp([4, 5, 3], nn.Tanh, seed=3).double()
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(2.0)
    return net.eval()


class Conv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(
            nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 2), nn.BatchNorm2d(4), nn.Softplus(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3),
        )  # fmt: skip
        draws = torch.Generator().manual_seed(1)
        for norm in (self.body[1], self.body[4]):
            norm.running_mean.normal_(generator=draws)
            norm.running_var.uniform_(0.5, 2.0, generator=draws)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def cnn() -> nn.Module:
    with testbeds.nets.own_stream(0, "test"):
        return Conv().double().eval()


NETS = {"mlp": (mlp, (4,)), "cnn": (cnn, (1, 6, 6))}


def data(counts: tuple[int, ...], shape: tuple[int, ...] = (4,), seed: int = 0) -> tuple[Tensor, Tensor]:
    draws = torch.Generator().manual_seed(seed)
    y = torch.cat([torch.full((n,), c) for c, n in enumerate(counts)])
    y = y[torch.randperm(len(y), generator=draws)]
    x = torch.randn(len(y), *shape, generator=draws, dtype=torch.float64)
    return x + 0.5 * y.double().view(-1, *(1,) * len(shape)), y


def cut(x: Tensor, y: Tensor, size: int = 5) -> list[tuple[Tensor, Tensor]]:
    return list(zip(x.split(size), y.split(size), strict=True))


def problem_of(
    net: str = "mlp", counts: tuple[int, ...] = (6, 6, 6), **options
) -> tuple[Problem, nn.Module, Tensor, Tensor]:
    make, shape = NETS[net]
    model = make()
    x, y = data(counts, shape)
    return Problem(model, nn.CrossEntropyLoss(), cut(x, y), **options), model, x, y


def source_of(problem: Problem, weighting: str) -> Source:
    layout = labels.read(problem, None, None)
    held = labels.ByClass(problem, layout)
    twin = labels.balanced(problem, layout)
    return Source(twin, held, weighting, mean_probabilities(twin, held))


def matrix(A) -> Tensor:
    return A @ torch.eye(A.shape[0], dtype=torch.float64)


def close(a, b, tolerance: float = EXACT) -> bool:
    a, b = torch.as_tensor(np.asarray(a)), torch.as_tensor(np.asarray(b))
    return float((a - b).abs().max()) <= tolerance * max(1.0, float(b.abs().max()))


@pytest.mark.parametrize(("net", "counts"), CASES)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_the_identities_hold_to_rounding(net: str, weighting: str, counts: str) -> None:
    problem, model, x, y = problem_of(net, COUNTS[counts])
    source, known = source_of(problem, weighting), dense(model, x, y, weighting)
    parts = {name: source.part(name).T @ source.part(name) for name in ("G0", "G1", "G2", "G012")}
    for name in ("G0", "G1", "G2"):
        assert close(parts[name], getattr(known, name)), name
    assert close(parts["G0"] + parts["G1"] + parts["G2"], parts["G012"])
    G = matrix(spectra.operator("G", source, None))
    assert close(G, known.G)
    assert close(parts["G012"] + known.G3, G)
    hess, H = (matrix(spectra.operator(name, source, None)) for name in ("hessian", "hessian-G"))
    assert close(hess, known.hess)
    assert close(H, known.H)
    assert close(G + H, hess)


@pytest.mark.parametrize("counts", COUNTS)
def test_the_class_mean_and_the_mean_of_the_own_output_cancel(counts: str) -> None:
    problem, model, x, y = problem_of("mlp", COUNTS[counts])
    source, known = source_of(problem, "2020"), dense(model, x, y, "2020")
    weights = source.weights
    for c in range(3):
        g_c = -source.pulled(c, torch.from_numpy(weights.means[c : c + 1]))[0]
        g_cc = -source.pulled(c, torch.eye(3, dtype=torch.float64)[c : c + 1])[0]
        assert close(g_c, known.means[c])
        assert close(g_cc, known.own[c])
        w_c, w_cc = weights.totals[c], weights.every[c, c]
        assert close(w_c, known.class_weights[c])
        assert float((w_c * g_c + w_cc * g_cc).abs().max()) <= 1e-14
    # so that A2 lies in the span of A1, smaller by w_c / w_cc
    A2 = sum(
        w**2 / v * torch.outer(g, g)
        for w, v, g in zip(known.class_weights, known.own_weights, known.means, strict=True)
    )
    assert close(A2, known.G0)


@pytest.mark.parametrize(("net", "counts"), CASES)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_everything_stored_is_that_of_the_explicit_matrices(net: str, weighting: str, counts: str) -> None:
    problem, model, x, y = problem_of(net, COUNTS[counts])
    known: Dense = dense(model, x, y, weighting)
    ds = landscape.measure(ClassStructure(weighting, rtol=1e-10, k=12, **FEW), problem)
    assert bool(ds["converged"])
    assert close(ds["eigenvalues_G"], spectrum(known.G)[:12])
    assert close(ds["eigenvalues_hessian"], spectrum(known.hess)[:12], 1e-10)
    for name, A in (
        ("G0", known.G0),
        ("G1", known.G1),
        ("G2", known.G2),
        ("G012", known.G0 + known.G1 + known.G2),
    ):
        values = ds[f"eigenvalues_{name}"].values
        assert close(values, spectrum(A)[: len(values)]), name
    assert close(ds["class_gram"], known.means @ known.means.T)
    lengths = known.means.norm(dim=1)
    assert close(ds["class_cosine"], known.means @ known.means.T / lengths[:, None] / lengths)
    order = torch.cat([torch.where(y == c)[0] for c in range(3)])
    assert ds["example"].values.tolist() == order.tolist()
    assert close(ds["within"], torch.cat(known.within))
    assert float(ds["trace_G3"]) == pytest.approx(float(torch.trace(known.G3)), rel=1e-12)
    _check_composition(ds, known)
    if counts == "unbalanced":
        p = torch.softmax(model(x), 1)
        J = torch.autograd.functional.jacobian(lambda t: _outputs(model, x, t), _theta(model))
        plain = torch.einsum("iam,iab,ibn->mn", J, torch.diag_embed(p) - p[:, :, None] * p[:, None], J) / len(
            x
        )
        assert close(ds["eigenvalues_ggn"], spectrum(plain.detach())[:12])
        assert not close(ds["eigenvalues_ggn"], ds["eigenvalues_G"], 1e-3)
    else:
        assert "eigenvalues_ggn" not in ds


def _check_composition(ds, known: Dense) -> None:
    """The Hessian's leading eigenvectors, taken apart by hand."""
    values, vectors = torch.linalg.eigh(known.hess)
    for k in range(3):
        u = vectors[:, -1 - k]
        for level in ("G0", "G1", "G2", "G3", "H"):
            expected = float(u @ getattr(known, level) @ u / values[-1 - k])
            assert float(ds[f"share_{level}"][k]) == pytest.approx(expected, abs=1e-8), level
        shares = torch.einsum("m,cjmn,n->cj", u, known.pairs, u)
        shares = shares / shares.sum()
        assert close(ds["label_share"][k], shares.sum(1), 1e-8)
        c, j = divmod(int(shares.argmax()), 3)
        words = f"{c} kept" if c == j else f"{c} as {j}"
        assert str(ds["made_by"].values[k]).startswith(f"{words} {100 * float(shares.max()):.0f} %")
    first = torch.linalg.eigh(known.G1)[1][:, -3:]
    top = torch.linalg.eigh(known.G)[1][:, -3:]
    assert float(ds["overlap_G_G1"][2]) == pytest.approx(float((first.T @ top).square().sum() / 3), abs=1e-8)


def _theta(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def _outputs(model: nn.Module, x: Tensor, theta: Tensor) -> Tensor:
    from dense_classes import outputs_of

    return outputs_of(model, x, theta)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_eigenvalues_are_ordered_and_ranks_bounded(weighting: str) -> None:
    problem, *_ = problem_of("mlp", (7, 5, 9))
    ds = landscape.measure(ClassStructure(weighting, rtol=1e-10, k=9, **FEW), problem)
    G, G012, G1 = (ds[f"eigenvalues_{name}"].values for name in ("G", "G012", "G1"))
    assert (G[:9] >= G012[:9] * (1 - 1e-9)).all()
    assert (G012[:3] >= G1[:3] * (1 - 1e-9)).all()
    size = ds["eigenvalues_G012"].values[0] * 1e-13
    ranks = {name: int((ds[f"eigenvalues_{name}"].values > size).sum()) for name in ("G0", "G1", "G2")}
    assert ranks["G0"] <= 3
    assert ranks["G1"] <= 3
    assert ranks["G2"] <= 3 * (3 - 2)


class Linear(nn.Module):
    """f = W x + b with the b of each example in its input."""

    def __init__(self, D: int, C: int) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.zeros(C, D, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        D = self.W.shape[1]
        return x[:, :D] @ self.W.T + x[:, D:]


def test_the_spectrum_of_theorem_8_1() -> None:
    """x = t e_c + z with E z = 0, E z zᵀ = I, and the same probabilities for all: JMLR 21 (252), Theorem 8.1."""
    C, D, alpha, s = 4, 6, 0.2, 3.0
    k, q = alpha / (C - 1), 2 - alpha * C / (C - 1)
    z = D**0.5 * torch.cat([torch.eye(D), -torch.eye(D)]).double()
    x, y = [], []
    for c in range(C):
        p = torch.full((C,), alpha / (C - 1), dtype=torch.float64)
        p[c] = 1 - alpha
        x.append(torch.cat([z + s**0.5 * torch.eye(D, dtype=torch.float64)[c], p.log().expand(2 * D, C)], 1))
        y += [c] * (2 * D)
    problem = Problem(Linear(D, C), nn.CrossEntropyLoss(), cut(torch.cat(x), torch.tensor(y), 7))
    ds = landscape.measure(ClassStructure(k=C * D, rtol=1e-12, **FEW), problem)
    expected = (
        [k * (s * (1 - alpha) + q)] * C
        + [k * (s / C + q)] * (C * (C - 2))
        + [k * q] * ((D - C) * (C - 1))
        + [0.0] * D
    )
    assert close(ds["eigenvalues_G"], sorted(expected, reverse=True))
    # the mean of z is 0, so the class means have no noise: G1 has the class part of the top eigenvalues alone
    assert float(ds["eigenvalues_G1"][0]) < float(ds["eigenvalues_G"][0])


def test_softmax_regression_on_the_digits() -> None:
    """DEFINITIONS: 170 examples of each class, l2 = 1e-3, at the minimum over these examples."""
    x, y = digits(torch.float64)
    rows = torch.cat([torch.where(y == c)[0][:170] for c in range(10)])
    model = nn.Linear(64, 10, bias=False, dtype=torch.float64)
    with torch.no_grad():
        model.weight.copy_(golden._newton(x[rows], nn.functional.one_hot(y[rows], 10).double()))
    problem = Problem(model, nn.CrossEntropyLoss(), cut(x, y, 600))
    ds = landscape.measure(ClassStructure(per_class=170, **{**FEW, "steps": 40}), problem)
    found = ds["eigenvalues_G"].values[:10].round(4)
    assert found.tolist() == [0.4198, 0.3053, 0.2418, 0.2010, 0.1661, 0.1551, 0.1345, 0.1210, 0.0948, 0.0312]
    first = ds["eigenvalues_G1"].values
    assert (first[0].round(4), first[8].round(4)) == (0.0817, 0.0164)
    assert float(ds["overlap_G_G1"][8]) == pytest.approx(0.976, abs=6e-4)
    assert ds["spectrum_outliers"].values.tolist() == [9, 9]


@pytest.mark.parametrize("capacity", [2, 3, 4, 8, 12])
def test_inner_products_in_lots_that_fit_are_the_same(capacity: int) -> None:
    """From one output of a class at a time to two classes, each vector made anew for every lot."""
    problem, *_ = problem_of("mlp", (9, 3, 6))
    source = source_of(problem, "2020")
    V = torch.cat([source.pulled(c, torch.eye(3, dtype=torch.float64)) for c in range(3)])
    expected = (V @ V.T).numpy()
    within = landscape.evaluate(ClassStructure("2020", k=1, spectra=()), problem)["within"]
    limits = Limits(capacity, 0, 1 << 20, 2, 1e-3, 1, 1, 0, True)
    size = max(1, capacity // 6)
    rows, found = [], []
    for block in [range(lo, min(lo + size, 3)) for lo in range(0, 3, size)]:
        task = Grams(source, limits, block)
        state = task.start()
        while (units := task.result(state)) is None:
            state = task.step(state)
        rows += [unit["rows"] for unit in units]
        found += [unit["within"] for unit in units]
    assert close(mirrored(np.array(rows)), expected)
    counts = (9, 3, 6)
    assert close(np.concatenate([one[:n] for one, n in zip(found, counts, strict=True)]), within)
    memory = 4 * 8 * problem.size * capacity
    assert ClassStructure().block_size(problem, memory) == size


def test_the_result_does_not_depend_on_the_batches() -> None:
    model, (x, y) = mlp(), data((9, 3, 6))
    metric = ClassStructure(k=4, rtol=1e-10, **FEW)
    found = [
        landscape.measure(metric, Problem(model, nn.CrossEntropyLoss(), cut(x, y, size), microbatch=small))
        for size, small in ((18, None), (4, None), (5, 2))
    ]
    for other in found[1:]:
        for name in ("gram", "within", "eigenvalues_hessian", "class_cosine", "mean_probability"):
            assert close(other[name], found[0][name]), name


def of_my_own(f: Tensor, target: Tensor) -> Tensor:
    return nn.functional.cross_entropy(f, target)


def test_a_sum_a_function_smoothed_labels_and_ignored_ones() -> None:
    model, (x, y) = mlp(), data((9, 3, 6))
    metric = ClassStructure(k=4, rtol=1e-10, **FEW)
    plain = landscape.measure(metric, Problem(model, nn.CrossEntropyLoss(), cut(x, y)))
    same = {
        "sum": Problem(model, nn.CrossEntropyLoss(reduction="sum"), cut(x, y), reduction="sum"),
        "function": Problem(model, of_my_own, cut(x, y), weight=lambda batch: len(batch[1])),
        "ignored": Problem(
            model, nn.CrossEntropyLoss(), cut(torch.cat([x, x[:3]]), torch.cat([y, torch.tensor([-100] * 3)]))
        ),
    }  # fmt: skip
    for what, problem in same.items():
        found = landscape.measure(metric, problem)
        for name in ("eigenvalues_G", "eigenvalues_hessian", "within"):
            assert close(found[name], plain[name]), (what, name)
    scaled = landscape.measure(
        metric,
        Problem(
            model, lambda f, t: 2.0**-27 * of_my_own(f, t), cut(x, y), weight=lambda batch: len(batch[1])
        ),
    )
    for name in ("eigenvalues_G", "eigenvalues_G1", "eigenvalues_G012", "eigenvalues_hessian", "within"):
        assert close(2.0**27 * scaled[name], plain[name]), name
    for name in ("gram", "class_gram", "label_share", "share_G1"):
        assert close(scaled[name], plain[name]), name
    smooth = landscape.measure(metric, Problem(model, nn.CrossEntropyLoss(label_smoothing=0.1), cut(x, y)))
    assert close(smooth["eigenvalues_G"], plain["eigenvalues_G"])


def test_products_by_differences_agree() -> None:
    problem, model, x, y = problem_of("mlp", (9, 3, 6), products="difference")
    known = dense(model, x, y, "2019")
    few = {**FEW, "spectra": ("hessian-G",), "steps": 30}
    ds = landscape.measure(ClassStructure(k=3, rtol=1e-5, **few), problem)
    assert float(ds["spectrum_top"][0, 0]) == pytest.approx(float(spectrum(known.H)[0]), rel=1e-4)
    assert close(ds["within"], torch.cat(known.within), 1e-6)
    assert close(ds["eigenvalues_G"], spectrum(known.G)[:3], 1e-5)


def test_a_problem_that_was_moved_is_measured_where_it_is() -> None:
    """Also within one session, in which much is kept."""
    problem, model, x, y = problem_of("mlp", (9, 3, 6))
    moved = problem.at(0.5 * problem.parameters_vector())
    metric = ClassStructure(k=2, spectra=(), rtol=1e-10)
    with problem.session():
        found = [landscape.evaluate(metric, one) for one in (problem, moved)]
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.5)
    known = dense(model, x, y, "2019")
    assert close(found[1]["eigenvalues_G1"], spectrum(known.G1)[:3])
    assert close(found[1]["eigenvalues_G"], spectrum(known.G)[:2])
    assert not close(found[0]["eigenvalues_G1"], found[1]["eigenvalues_G1"], 1e-3)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.inner(x)[0][:, -1])


def others() -> dict[str, tuple[nn.Module, Tensor, dict]]:
    draws = torch.Generator().manual_seed(4)
    with testbeds.nets.own_stream(0, "others"):
        return {
            "attention, tied weights": (
                testbeds.gpt(8, 1, 2, 5, 7),
                torch.randint(7, (18, 5), generator=draws),
                {"output": lambda model, batch: model(batch[0])[:, -1, :3]},
            ),
            "recurrent": (Recurrent(), torch.randn(18, 4, 3, generator=draws), {}),
            "residual": (
                testbeds.resnet20(2, 3, channels=1, blocks=1),
                torch.randn(18, 1, 8, 8, generator=draws),
                {},
            ),
        }


@pytest.mark.parametrize("name", ["attention, tied weights", "recurrent", "residual"])
def test_on_other_models_the_parts_add_up_to_the_trace(name: str) -> None:
    model, x, options = others()[name]
    y = torch.arange(18) % 3
    x = x.double() if x.is_floating_point() else x
    problem = Problem(model.double().eval(), nn.CrossEntropyLoss(), cut(x, y, 7), **options)
    ds = landscape.measure(ClassStructure(k=5, spectra=(), rtol=1e-8), problem)
    whole = float(ds["eigenvalues_G012"].sum()) + float(ds["trace_G3"])
    assert whole == pytest.approx(ggn_trace.exact(problem).trace, rel=1e-12)
    V = landscape.estimators.eigsh(landscape.ggn(problem), 5, rtol=1e-8, seed=1)
    assert ds["eigenvalues_G"].values == pytest.approx(V.values.numpy(), rel=1e-6)
    shares = sum(ds[f"share_{level}"].values for level in ("G0", "G1", "G2", "G3", "H"))
    assert shares == pytest.approx(np.ones(5))


def test_some_classes_and_the_first_examples_of_each() -> None:
    problem, model, x, y = problem_of("mlp", (9, 3, 6))
    rows = torch.cat([torch.where(y == c)[0][:4] for c in (0, 2)]).sort().values
    known = dense(model, x[rows], y[rows], "2020", labels=[0, 2])
    metric = ClassStructure("2020", classes=(0, 2), per_class=4, rtol=1e-10, k=5, **FEW)
    ds = landscape.measure(metric, problem)
    assert ds["class_count"].values.tolist() == [4, 4]
    assert close(ds["eigenvalues_G"], spectrum(known.G)[:5])
    assert close(ds["eigenvalues_G2"][:4], spectrum(known.G2)[:4])
    assert close(ds["eigenvalues_G1"][:2], spectrum(known.G1)[:2])
    assert "eigenvalues_ggn" in ds  # of all the data


def test_knockouts_are_subtracted_and_projected() -> None:
    problem, model, x, y = problem_of("mlp", (9, 3, 6))
    source, known = source_of(problem, "2019"), dense(model, x, y, "2019")
    G012 = known.G0 + known.G1 + known.G2
    for name, B in (("G0", known.G0), ("G1", known.G1), ("G2", known.G2), ("G012", G012)):
        U, sizes, _ = torch.linalg.svd(B)
        U = U[:, sizes > 1e-12 * sizes[0]]
        P = torch.eye(len(B), dtype=torch.float64) - U @ U.T
        for base, A in (("hessian", known.hess), ("G", known.G)):
            assert close(matrix(spectra.operator(f"{base}-{name}", source, source.part(name))), A - B)
            assert close(
                matrix(spectra.operator(f"{base}/{name}", source, source.part(name))), P @ A @ P, 1e-9
            )
    names = ("G", "G-G012", "G/G012", "hessian/G1")
    ds = landscape.measure(ClassStructure(spectra=names, probes=2, steps=40, k=3), problem)
    assert ds["spectrum"].values.tolist() == list(names)
    top = ds["spectrum_top"].values[:, 0]
    assert top[0] == pytest.approx(float(spectrum(known.G)[0]), rel=1e-9)
    assert top[1] == pytest.approx(float(spectrum(known.G3)[0]), rel=1e-9)


def test_a_sketch_is_right_on_average_and_within_its_error() -> None:
    """E ⟨Sx, Sy⟩ = ⟨x, y⟩ with variance at most (‖x‖²‖y‖² + ⟨x, y⟩²) / d."""
    model, (x, y) = mlp(), data((6, 6, 6))
    problem = Problem(model, nn.CrossEntropyLoss(), cut(x, y))
    exact = landscape.evaluate(ClassStructure(k=2, spectra=(), attribution=False), problem)["gram"]
    d, seeds = 16, 200
    metric = ClassStructure(k=2, spectra=(), attribution=False, sketch=d)
    source = source_of(problem, "2019")
    errors = []
    for seed in range(seeds):
        task = Grams(source, Limits(9, d, 1 << 20, 2, 1e-3, 1, 1, seed, False), range(3))
        state = task.start()
        while task.result(state) is None:
            state = task.step(state)
        rows = state["rows"].reshape(9, d)
        errors.append(rows @ rows.T - exact)
    squares = np.diag(exact)
    allowed = (squares[:, None] * squares + exact**2) / d
    errors_ = np.array(errors)
    # 81 entries, 200 seeds: a mean 5 standard errors off has probability 1e-6 each
    assert (np.abs(errors_.mean(0)) <= 5 * np.sqrt(allowed / seeds)).all()
    assert (errors_.var(0) <= 2 * allowed).all()
    # a sketch as long as the vectors is the vectors
    whole = landscape.evaluate(ClassStructure(k=2, spectra=(), attribution=False, sketch=64), problem)
    assert "gram" not in whole
    assert close(whole["eigenvalues_G2"][:3], landscape.evaluate(
        ClassStructure(k=2, spectra=(), attribution=False), problem)["eigenvalues_G2"][:3])  # fmt: skip
    assert metric.sketch == d


def test_weights_of_a_class_that_is_sure_of_itself() -> None:
    sure = np.array([[1.0, 0.0, 0.0], [0.1, 0.8, 0.1]])
    weights = Weights.of("2020", sure, np.array([0, 1]))
    assert np.isfinite(weights.means).all()
    assert weights.totals.tolist() == pytest.approx([0.0, 0.1])
