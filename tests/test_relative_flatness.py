"""Relative flatness against the sum over pairs of neurons, from a dense Hessian."""

from __future__ import annotations

import pytest
import torch
from cases_base import labels, normal
from test_adaptive import classified, dense, network, of
from torch import Tensor, nn

import landscape
from landscape import Problem, Refused
from landscape.metrics import RelativeFlatness


def pairs(W: Tensor, H: Tensor) -> float:
    """Σ_{s,s'} ⟨w_s, w_s'⟩ tr H_ss' by a loop; W (rows, columns), H over its entries in that order."""
    rows, columns = W.shape
    blocks = H.reshape(rows, columns, rows, columns)
    return sum(
        float(W[s] @ W[t]) * float(blocks[s, :, t, :].trace()) for s in range(rows) for t in range(rows)
    )


def moved_first(H: Tensor, shape: tuple[int, ...], axis: int) -> Tensor:
    """A Hessian over a tensor's entries, with the entries in the order of the tensor whose `axis` is first."""
    order = torch.arange(len(H)).reshape(shape).movedim(axis, 0).reshape(-1)
    return H[order][:, order]


@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh])
@pytest.mark.parametrize("layer", ["0.weight", "2.weight", "4.weight"])
def test_each_layer_of_a_network(layer: str, activation: type[nn.Module], curvature: str) -> None:
    problem = classified(network(activation), 4)
    part = problem.only(layer)
    W = part.parameters_vector().reshape(part.space.shapes[0])
    expected = pairs(W, dense(part, curvature))
    record = landscape.evaluate(RelativeFlatness(layer=layer, curvature=curvature, method="exact"), problem)
    assert float(record["relative_flatness"]) == pytest.approx(expected, rel=1e-9)
    smooth = activation is nn.Tanh and layer != "4.weight" and curvature == "hessian"
    assert record.attrs["way"] == ("unit_vectors" if smooth else "layers")
    assert record["layer"].tolist() == [layer]
    vectors = landscape.evaluate(
        RelativeFlatness(layer=layer, curvature=curvature, method="hutchinson", rtol=0.05, max_probes=256),
        problem,
    )
    off = abs(float(vectors["relative_flatness"]) - expected)
    assert off <= 5 * float(vectors["relative_flatness_stderr"])  # one draw; calibrated below


def test_softmax_regression_in_closed_form() -> None:
    """κ = E ‖x‖² tr(W Wᵀ (diag p - p pᵀ))."""
    model = nn.Linear(4, 3).double()
    with torch.no_grad():
        model.weight.copy_(normal(3, 4))
    problem = classified(model, 4)
    x = torch.cat([batch[0] for batch in problem.batches])
    p = torch.softmax(model(x), 1).detach()
    M = model.weight.detach() @ model.weight.detach().T
    bent = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    expected = (x.square().sum(1) * torch.einsum("st,nst->n", M, bent)).mean()
    assert of(RelativeFlatness(), problem) == pytest.approx(float(expected), rel=1e-12)


def test_the_last_layer_unless_told_otherwise_and_several_add_up() -> None:
    problem = classified(network(), 4)
    each = [of(RelativeFlatness(layer=f"{i}.weight"), problem) for i in (0, 2, 4)]
    assert of(RelativeFlatness(), problem) == each[2]
    record = landscape.evaluate(RelativeFlatness(layer="*"), problem)
    assert record["layer"].tolist() == ["0.weight", "2.weight", "4.weight"]
    assert record["layer_relative_flatness"].tolist() == pytest.approx(each, rel=1e-10)
    assert float(record["relative_flatness"]) == pytest.approx(sum(each), rel=1e-10)


class Head(nn.Module):
    """Pools what comes to three numbers."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1).unflatten(1, (3, -1)).tanh().mean(2)


@pytest.mark.parametrize(
    ("layer", "axis", "groups"),
    [
        (nn.Conv2d(2, 3, 2), 0, 1),
        (nn.Conv2d(4, 6, 2, groups=2), 0, 2),
        (nn.Conv2d(3, 6, 2, groups=3, stride=2), 0, 3),
        (nn.Conv1d(2, 9, 1), 0, 1),
        (nn.ConvTranspose2d(2, 3, 2, stride=2), 1, 1),
        (nn.Linear(6, 3), 0, 1),
        (nn.Linear(2, 9), 0, 1),
    ],
    ids=str,
)
@pytest.mark.parametrize("method", ["exact", "probes"])
def test_kinds_of_layers(layer: nn.Module, axis: int, groups: int, method: str) -> None:
    """With more neurons than inputs and fewer; groups stand on inputs of their own."""
    if isinstance(layer, nn.Linear):
        shape = (layer.in_features,)
    else:
        shape = (layer.in_channels,) + ((5,) if isinstance(layer, nn.Conv1d) else (4, 5))
    with torch.no_grad():
        layer.double().weight.copy_(normal(*layer.weight.shape))
    problem = classified(nn.Sequential(layer, Head()), *shape)
    part = problem.only("0.weight")
    H = moved_first(dense(part), tuple(layer.weight.shape), axis)
    W = layer.weight.detach().movedim(axis, 0).flatten(1)
    size = W.numel() // groups
    expected = sum(
        pairs(w, H[g * size : (g + 1) * size, g * size : (g + 1) * size])
        for g, w in enumerate(W.chunk(groups))
    )
    if method == "exact":
        assert of(RelativeFlatness(method="exact"), problem) == pytest.approx(expected, rel=1e-9)
        return
    record = landscape.evaluate(RelativeFlatness(method="hutchinson", rtol=0.02, max_probes=128), problem)
    assert float(record["relative_flatness"]) == pytest.approx(
        expected, abs=5 * float(record["relative_flatness_stderr"])
    )


def test_a_matrix_that_stands_the_other_way() -> None:
    """x @ W of a functional model: the neurons are the columns."""
    W = normal(4, 3)
    x, y = normal(8, 4, seed=2), labels(8, 3)
    functional = Problem(lambda p, x: x @ p["w"], nn.CrossEntropyLoss(), [(x, y)], parameters={"w": W})
    layer = nn.Linear(4, 3, bias=False).double()
    with torch.no_grad():
        layer.weight.copy_(W.T)
    expected = of(RelativeFlatness(), Problem(layer, nn.CrossEntropyLoss(), [(x, y)]))
    assert of(RelativeFlatness(), functional) == pytest.approx(expected, rel=1e-12)


def test_an_embedding_is_a_layer_on_unit_vectors() -> None:
    table = normal(5, 3)
    tokens, y = labels((8, 1), 5), labels(8, 3, seed=1)
    embedded = nn.Sequential(nn.Embedding(5, 3), nn.Flatten()).double()
    layer = nn.Linear(5, 3, bias=False).double()
    with torch.no_grad():
        embedded[0].weight.copy_(table)
        layer.weight.copy_(table.T)
    one_hot = nn.functional.one_hot(tokens[:, 0], 5).double()
    expected = of(RelativeFlatness(), Problem(layer, nn.CrossEntropyLoss(), [(one_hot, y)]))
    found = of(RelativeFlatness(), Problem(embedded, nn.CrossEntropyLoss(), [(tokens, y)]))
    assert found == pytest.approx(expected, rel=1e-12)


def test_the_interval_of_probes_covers_the_truth() -> None:
    """60 runs: fewer than 49 inside has probability 5e-5 where 95 % are inside (binomial)."""
    problem = classified(network(nn.Tanh), 4)
    truth = of(RelativeFlatness(layer="2.weight", method="exact"), problem)
    metric = RelativeFlatness(layer="2.weight", method="hutchinson", rtol=0.0, max_probes=16)
    inside = 0
    for seed in range(60):
        record = landscape.evaluate(metric, problem, seed)
        inside += abs(float(record["relative_flatness"]) - truth) <= 1.96 * float(
            record["relative_flatness_stderr"]
        )
    assert inside >= 49


def test_a_part_of_a_problem_on_other_data_keeps_them() -> None:
    """In another precision too, where products and checks are made."""
    problem = classified(network(), 4)
    few = next(iter(problem.batches))
    part = problem.only("2.weight").on([few])
    assert float(part.replace(dtype=torch.float32).value()) == pytest.approx(float(part.value()), rel=1e-6)
    assert float(part.value()) != pytest.approx(float(problem.value()), rel=1e-3)


def test_what_has_no_neurons_is_refused() -> None:
    problem = classified(network(), 4)
    with pytest.raises(Refused, match=r"the nearest are 0.weight"):
        of(RelativeFlatness(layer="nope"), problem)
    with pytest.raises(Refused, match="no weights of a layer"):
        of(RelativeFlatness(layer="*.bias"), problem)
    biases = Problem(network(), nn.CrossEntropyLoss(), list(problem.batches), parameters="*.bias")
    with pytest.raises(Refused, match="measured parameters hold no weights"):
        of(RelativeFlatness(), biases)
    tied = nn.Sequential(nn.Embedding(3, 3), nn.Flatten(), nn.Linear(3, 3, bias=False)).double()
    tied[2].weight = tied[0].weight
    with pytest.raises(Refused, match="embedding and matrix product"):
        of(RelativeFlatness(), Problem(tied, nn.CrossEntropyLoss(), [(labels((6, 1), 3), labels(6, 3))]))
    black_box = Problem(
        network(), forward=lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1]), data=list(problem.batches)
    )
    with pytest.raises(Refused, match="output="):
        of(RelativeFlatness(), black_box)
