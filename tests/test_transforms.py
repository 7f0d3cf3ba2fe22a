"""Rescaling symmetries: how many are found, that they hold, what is refused, and what is said about the rest."""

from __future__ import annotations

import pytest
import torch
from cases_base import normal
from cases_symmetries import (
    BY_NAME,
    FIVE,
    IMAGES,
    TRUTH,
    VECTORS,
    ByItem,
    ByNumpy,
    ControlFlow,
    Net,
    mlp,
    vgg,
)
from cases_symmetries import found as symmetries_of
from torch import Tensor, nn

import landscape
from landscape import testbeds, transforms


@pytest.mark.parametrize("net", TRUTH, ids=lambda net: net.name)
def test_ground_truth(net: Net) -> None:
    """Nodes, layers, how many hold up to a norm's epsilon; each holds in numbers, alone and all together."""
    found = symmetries_of(net.name)
    approximate = sum(not node.exact for node in found.nodes)
    assert (len(found.nodes), len(found.groups), approximate) == (net.nodes, net.groups, net.approximate)
    assert all(group.change <= 1e-14 for group in found.groups if group.exact)
    assert all(1e-17 < group.change <= 1e-3 for group in found.groups if not group.exact)
    assert not found.unknown
    if net.nodes > net.approximate:
        assert found.function_change <= 1e-14
    assert [n for g in found.groups for n in g.nodes] == list(range(net.nodes))


@pytest.mark.slow
@pytest.mark.parametrize(("width", "nodes"), [(16, 1232), (64, 4928)])
def test_resnet20_of_full_width(width: int, nodes: int) -> None:
    found = transforms.find(Net("", lambda: testbeds.resnet20(width), IMAGES, nodes, 33).problem())
    assert (len(found.nodes), len(found.groups)) == (nodes, 33)
    # 112 channels of streams in 3 groups, 336 within blocks in 9, 784 before a BatchNorm in 21 (width 16)
    before = [g for g in found.groups if g.buffers]
    assert (sum(len(g.nodes) for g in before), len(before)) == (49 * width, 21)
    assert max(g.change for g in found.groups) <= 1e-14


@pytest.mark.slow
@pytest.mark.parametrize("frozen", [False, True])
def test_vgg_of_full_width(frozen: bool) -> None:
    problem = Net("", lambda: vgg(64), normal(2, 3, 32, 32), 0, 0).problem()
    found = transforms.find(problem, buffers="frozen" if frozen else "move")
    assert (len(found.nodes), len(found.groups)) == ((2752, 8) if frozen else (5504, 16))


def test_running_means_move_and_are_named() -> None:
    found = symmetries_of("resnet-20 of width 4")
    moving = [g for g in found.groups if g.buffers]
    assert (sum(len(g.nodes) for g in moving), len(moving)) == (196, 21)
    assert moving[0].parameters == ("0.weight", "1.weight")
    assert moving[0].buffers == ("1.running_mean",)
    frozen = symmetries_of("resnet-20, frozen buffers")
    assert not any(g.buffers for g in frozen.groups)


def test_a_summary_says_what_moves_how() -> None:
    lines = str(symmetries_of("mlp")).splitlines()
    assert lines[:2] == [
        "28 nodes in 2 groups",
        "0 0: 16 nodes, exact, 0.weight α^1, 0.bias α^1, 2.weight α^-1",
    ]
    assert lines[-1] == "not included: 4.bias: the network's output, 4"
    assert "up to a norm's ε" in str(symmetries_of("layer and group norm"))


def test_what_is_excluded_is_named_with_its_reason() -> None:
    found = symmetries_of("gelu")
    assert set(found.excluded) == {"0.weight", "0.bias", "2.weight", "2.bias", "4.weight", "4.bias"}
    assert "gelu is not positively homogeneous (1)" in found.excluded["0.bias"]
    assert "output" in found.excluded["4.bias"]
    unused = symmetries_of("unused layer").excluded
    assert unused["never.weight"] == "the outputs do not depend on it"
    with pytest.raises(landscape.Refused, match=r"no rescaling symmetry.*gelu"):
        found.scale(2.0)


@pytest.mark.parametrize("model", [ControlFlow, ByNumpy])
def test_control_flow_is_refused_with_its_reason(
    model: type[nn.Module], capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(landscape.Refused, match=r"must not depend on the values.*no `if`"):
        transforms.find(Net("", model, FIVE, 0, 0).problem())
    assert capfd.readouterr() == ("", "")  # export would print the graph


def test_a_value_taken_out_of_a_tensor_is_pinned_and_named() -> None:
    found = transforms.find(Net("", ByItem, FIVE, 0, 0).problem())
    assert not found.nodes
    assert "item" in found.unknown


class Masked(ControlFlow):
    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return h[h > 0]


def test_shapes_that_depend_on_the_data_are_refused() -> None:
    with pytest.raises(landscape.Refused, match="symmetries are not known"):
        transforms.find(Net("", Masked, FIVE, 0, 0).problem())


def test_the_model_is_not_touched() -> None:
    problem = BY_NAME["mobilenet"].problem(mode="train")
    model = problem.evaluator.model
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.get_rng_state()
    transforms.find(problem).random()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(isinstance(p, nn.Parameter) for p in model.parameters())


# scaling


def test_alpha_scale_of_the_first_layer() -> None:
    """Incoming weights and biases times alpha, outgoing ones divided; nothing else moves."""
    there, problem = symmetries_of("mlp").scale(3.0), symmetries_of("mlp").problem
    shapes = [t.flatten() for t in problem.space.split(there.diagonal)]
    factors = {name: set(t.tolist()) for name, t in zip(problem.names, shapes, strict=True)}
    near = {name: [pytest.approx(v) for v in values] for name, values in factors.items()}
    assert near == {
        "0.weight": [3.0], "0.bias": [3.0], "2.weight": [1 / 3], "2.bias": [1.0], "4.weight": [1.0], "4.bias": [1.0],
    }  # fmt: skip
    assert torch.allclose(there.vector, there.diagonal * problem.parameters_vector(), rtol=1e-15)
    assert there.exact
    assert there.function_change <= 1e-14


def test_auto_takes_the_first_exact_layer() -> None:
    found = symmetries_of("resnet-20, training")
    assert not found.groups[0].exact
    assert found.group().parameters[:2] == ("1.weight", "1.bias")
    there = found.scale(2.0, group=0)
    assert not there.exact
    assert 1e-9 < there.function_change < 1e-2


def test_all_layers_several_and_by_name() -> None:
    found = symmetries_of("mlp")
    both = found.scale(2.0, "all").diagonal
    assert torch.equal(both, found.scale(2.0, [0, "2"]).diagonal)
    assert torch.allclose(both, found.scale(2.0, 0).diagonal * found.scale(2.0, 1).diagonal)
    one = found.scale_node(2.0, 17).diagonal
    assert int((one != 1).sum()) == 16 + 1 + 4


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan"), float("inf")])
def test_factors_that_are_not_positive_are_refused(alpha: float) -> None:
    with pytest.raises(ValueError, match="positive"):
        symmetries_of("mlp").scale(alpha)


def test_unknown_groups_and_nodes_are_refused() -> None:
    found = symmetries_of("mlp")
    with pytest.raises(ValueError, match=r"no symmetry group 'x'; allowed .*0 \(0\), 1 \(2\)"):
        found.scale(2.0, "x")
    with pytest.raises(ValueError, match="allowed is 0 to 27"):
        found.scale_node(2.0, 28)
    with pytest.raises(ValueError, match="'move' or 'frozen'"):
        transforms.find(BY_NAME["mlp"].problem(), buffers="thaw")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "name", ["lenet", "vgg-11-bn", "transformer, tied", "u-net", "shared layer without bias"]
)
def test_random_points_of_the_orbit(name: str) -> None:
    found = symmetries_of(name)
    there, again, other = found.random(seed=1), found.random(seed=1), found.random(seed=2)
    assert there.function_change <= 1e-13
    assert torch.equal(there.vector, again.vector)
    assert not torch.equal(there.vector, other.vector)
    assert float((there.diagonal.log()).std()) > 0.3


def test_data_in_single_examples_and_without_weight() -> None:
    """A micro-batch of one is no reason to look at one example; a batch without a target is skipped."""
    net = BY_NAME["vgg-11-bn"]
    assert len(transforms.find(net.problem(microbatch=1)).nodes) == net.nodes
    model, nothing = mlp(8, 6, 3).double(), torch.full((4,), -100)
    data = [(VECTORS, nothing), (VECTORS, torch.zeros(4, dtype=torch.int64))]
    problem = landscape.Problem(model, nn.CrossEntropyLoss(), data)
    assert len(transforms.find(problem).nodes) == 6
    with pytest.raises(landscape.Refused, match="weight 0"):
        transforms.find(landscape.Problem(model, nn.CrossEntropyLoss(), data[:1]))


def test_float32_loses_only_rounding() -> None:
    problem = BY_NAME["mobilenet"].problem(dtype=torch.float32)
    found = transforms.find(problem)
    assert max(g.change for g in found.groups) <= 1e-14  # verified in float64
    assert 1e-9 < found.random().function_change < 1e-4


def test_moving_again_starts_where_it_stands() -> None:
    """Buffers included: there and back is where it began."""
    problem = BY_NAME["mobilenet"].problem()
    there = symmetries_of("mobilenet").scale(3.0, "all")
    back = transforms.find(there.problem).scale(1 / 3.0, "all")
    assert torch.allclose(back.vector, problem.parameters_vector(), rtol=1e-14)
    for name, buffer in problem.buffers().items():
        assert torch.allclose(back.problem.buffers()[name], buffer, rtol=1e-14), name


def test_a_transformation_that_changes_the_function_is_refused() -> None:
    problem = BY_NAME["mlp"].problem()
    diagonal = torch.full((problem.size,), 2.0, dtype=torch.float64)
    with pytest.raises(landscape.Refused, match="changes the function"):
        transforms.transformed.moved(problem, diagonal=diagonal, buffers={}, exact=True, name="doubling")


def test_black_boxes_and_any_batch() -> None:
    """The loss stands for the outputs; a batch can be any nest."""
    model, y = mlp(8, 6, 3).double(), torch.zeros(4, dtype=torch.int64)

    def step(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(model(batch["x"]), batch["y"])

    data = [{"x": VECTORS, "y": y}]
    black = landscape.Problem(model, forward=step, data=data)
    open_ = landscape.Problem(
        model, nn.CrossEntropyLoss(), data, output=lambda m, b: m(b["x"]), target=lambda b: b["y"]
    )
    for problem in (black, open_):
        found = transforms.find(problem)
        assert (len(found.nodes), len(found.groups)) == (6, 1)
        assert found.scale(5.0).function_change <= 1e-14


def test_functions_of_parameters() -> None:
    parameters = {"in.w": normal(6, 5), "in.b": normal(6), "out": normal(3, 6, seed=1)}

    def f(p: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.relu(x @ p["in.w"].T + p["in.b"]) @ p["out"].T

    problem = landscape.Problem(f, nn.MSELoss(), [(FIVE, torch.zeros(4, 3).double())], parameters=parameters)
    found = transforms.find(problem)
    assert (len(found.nodes), len(found.groups)) == (6, 1)
    assert found.groups[0].parameters == ("in.w", "in.b", "out")


def test_exponents_other_than_one() -> None:
    """A layer that is used twice: the one after it takes the square."""
    found = symmetries_of("shared layer without bias")
    assert {abs(p) for node in found.nodes for each in node.exponents.values() for p in each} == {1.0, 2.0}
