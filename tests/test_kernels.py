"""The cheaper kernels: exact against PyTorch's own in float64, refused where they would not be, put back."""

from __future__ import annotations

import itertools

import pytest
import torch
from cases_base import normal
from hypothesis import given, settings
from hypothesis import strategies as st
from test_problem_untouched import same, snapshot
from torch import Tensor, nn
from torch.nn import functional as F

from landscape import kernels, matmul, testbeds
from landscape.checks import Need
from landscape.convolution import Settings, convolve, linear_pullbacks
from landscape.kernels import NONE, Kernels, active
from landscape.problem import Problem
from landscape.vectors import ParameterSpace, aligned_pieces

CONVOLUTION = Kernels(convolution=True)
FOLDED = Kernels(convolution=True, norm=True)
AFFINE = Kernels(norm=True)
EVERY = Kernels(convolution=True, norm=True, channels_last=True)


def derivatives(function, tensors: list[Tensor], switches: Kernels) -> list[Tensor]:
    """Value, slopes, and the derivatives of a random combination of the slopes, as Hessian products need them."""
    leaves = [t.clone().requires_grad_() for t in tensors]
    with active(switches):
        output = function(*leaves)
        weights = normal(*output.shape, seed=1).to(output)
        # A loss that bends in the output, so that slopes of the outputs depend on the leaves too.
        loss = (weights * output + torch.sin(output)).sum()
        slopes = torch.autograd.grad(loss, leaves, create_graph=True)
        along = [normal(*s.shape, seed=2 + i).to(s) for i, s in enumerate(slopes)]
        bent = torch.autograd.grad(slopes, leaves, along)
    return [t.detach() for t in (output, *slopes, *bent)]


def agree(function, tensors: list[Tensor], switches: Kernels, allowed: float) -> None:
    for found, expected in zip(
        derivatives(function, tensors, switches), derivatives(function, tensors, NONE), strict=True
    ):
        assert found.shape == expected.shape
        scale = max(float(expected.abs().max()), 1e-3)
        assert float((found - expected).abs().max()) <= allowed * scale


# convolution


@st.composite
def convolutions(draw):
    dimensions = draw(st.integers(1, 3))
    groups = draw(st.integers(1, 3))
    several = st.lists(st.integers(1, 3), min_size=dimensions, max_size=dimensions)
    kernel, dilation = draw(several), draw(several)
    padding = draw(
        st.one_of(
            st.lists(st.integers(0, 2), min_size=dimensions, max_size=dimensions),
            st.sampled_from(["same", "valid"]),
            st.integers(0, 2),
        )
    )
    stride = 1 if padding == "same" else draw(st.one_of(several, st.integers(1, 3)))
    image = [d * (k - 1) + 1 + draw(st.integers(0, 3)) for d, k in zip(dilation, kernel, strict=True)]
    inner, outer = groups * draw(st.integers(1, 2)), groups * draw(st.integers(1, 2))
    x = (draw(st.integers(1, 3)), inner, *image)
    weight = (outer, inner // groups, *kernel)
    named = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    return x, weight, draw(st.booleans()), named


@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")  # the usual way's
@settings(max_examples=120, deadline=None, derandomize=True)
@given(convolutions(), st.booleans())
def test_convolutions_of_all_kinds(case, channels_last):
    x, weight, biased, named = case
    function = (F.conv1d, F.conv2d, F.conv3d)[len(x) - 3]
    tensors = [normal(*x, seed=10), normal(*weight, seed=11)] + [normal(weight[0], seed=12)] * biased
    switches = EVERY if channels_last else CONVOLUTION
    agree(lambda *t: function(*t, **named), tensors, switches, 1e-12)


@pytest.mark.parametrize(
    "named",
    [{}, {"stride": 2, "padding": 1}, {"padding": "same"}, {"dilation": 2, "groups": 4}],
    ids=["plain", "strided", "same", "dilated groups"],
)
@pytest.mark.parametrize("switches", [CONVOLUTION, EVERY], ids=["contiguous", "channels_last"])
def test_a_convolution_in_float32(named, switches):
    """Here the kernels are oneDNN's; each is within the rounding of its sums."""
    groups = named.get("groups", 1)
    tensors = [normal(4, 8, 12, 12, seed=13), normal(8, 8 // groups, 3, 3, seed=14), normal(8, seed=15)]
    exact = derivatives(lambda *t: F.conv2d(*t, **named), tensors, NONE)
    single = [t.float() for t in tensors]
    found = derivatives(lambda *t: F.conv2d(*t, **named), single, switches)
    usual = derivatives(lambda *t: F.conv2d(*t, **named), single, NONE)
    for f, u, e in zip(found, usual, exact, strict=True):
        assert float((f - e).norm()) <= 2 * float((u - e).norm()) + 3e-7 * float(e.norm())


@pytest.mark.parametrize("mode", ["zeros", "circular", "reflect", "replicate"])
def test_padding_modes_of_a_layer(mode):
    layer = nn.Conv2d(2, 3, 3, padding=1, padding_mode=mode).double()

    def function(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (x,))

    agree(
        function, [normal(2, 2, 5, 5, seed=16), normal(3, 2, 3, 3, seed=17), normal(3, seed=18)], EVERY, 1e-12
    )


def counted(monkeypatch) -> list[tuple[bool, ...]]:
    """Record what every call of the own convolution's double backward was asked for."""
    found: list[tuple[bool, ...]] = []
    backward = kernels.convolve.__globals__["_Slopes"].backward

    def watched(ctx, *bent):
        found.append(tuple(ctx.needs_input_grad[:3]))
        return backward(ctx, *bent)

    monkeypatch.setattr(kernels.convolve.__globals__["_Slopes"], "backward", staticmethod(watched))
    return found


def test_the_double_backward_is_ours_and_gauss_newton_asks_for_two_convolutions_only(monkeypatch):
    asked = counted(monkeypatch)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Conv2d(2, 2, 2), nn.Flatten()).double()
    data = [(normal(2, 1, 5, 5, seed=20), torch.tensor([0, 3]))]
    problem = Problem(model, nn.CrossEntropyLoss(), data, kernels=CONVOLUTION, products="autodiff")
    v = normal(problem.size, seed=21)
    problem.hvp(v)
    assert sorted(asked) == [(True, False, True), (True, True, True)]
    asked.clear()
    problem.ggn_vp(v)
    assert asked == [(True, False, False)] * 2
    asked.clear()
    problem.replace(kernels=NONE).hvp(v)
    assert not asked


@pytest.mark.parametrize("switches", [CONVOLUTION, FOLDED, EVERY], ids=["convolution", "folded", "every"])
def test_third_derivatives_are_right_too(switches):
    """A loss that holds a gradient penalty needs them in a Hessian product."""
    mean, variance = statistics(3)

    def penalized(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        output = F.batch_norm(F.conv2d(x, weight, bias, padding=1), mean, variance)
        return torch.autograd.grad((output**3).sum(), x, create_graph=True)[0]

    tensors = [normal(2, 2, 4, 4, seed=22), normal(3, 2, 3, 3, seed=23), normal(3, seed=24)]
    agree(penalized, tensors, switches, 1e-11)  # outputs of several hundreds, under a sine


def test_a_linear_pullback_leaves_no_path_to_weights():
    x, w = normal(1, 1, 4, seed=24), normal(1, 1, 2, seed=25).requires_grad_()
    y = convolve(x, w, None, Settings((1,), (0,), (1,), 1))
    u = torch.ones_like(y).requires_grad_()
    with linear_pullbacks():
        pulled = torch.autograd.grad(y, w, u, create_graph=True)[0]
    assert torch.autograd.grad(pulled.sum(), w, allow_unused=True, retain_graph=True) == (None,)
    pushed = torch.autograd.grad(pulled.sum(), u)[0]
    assert torch.allclose(pushed, F.conv1d(x, torch.ones_like(w)))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # PyTorch's own, within jvp
def test_what_is_not_plain_takes_its_usual_way():
    layer, x = nn.Conv2d(1, 2, 3), torch.randn(4, 1, 5, 5, generator=torch.Generator().manual_seed(0))
    expected = layer(x)
    with active(EVERY):
        assert torch.allclose(torch.func.vmap(layer)(x), expected, atol=1e-6)
        assert torch.allclose(layer(x[0]), expected[0], atol=1e-6)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
        assert torch.func.jvp(layer, (x,), (x,))[1].shape == expected.shape
        with pytest.raises(RuntimeError, match="strided"):
            F.conv2d(x, layer.weight, padding="same", stride=2)


# BatchNorm


def statistics(channels: int, far: float = 1.0) -> tuple[Tensor, Tensor]:
    return far * normal(channels, seed=30), normal(channels, seed=31) ** 2 + 0.1


@pytest.mark.parametrize("switches", [AFFINE, FOLDED, EVERY], ids=["affine", "folded", "channels_last"])
@pytest.mark.parametrize("far", [1.0, 1e4], ids=["centred", "far"])
@pytest.mark.parametrize(("affine", "biased"), [*itertools.product([True, False], repeat=2)])
def test_batchnorm_after_a_convolution(switches, far, affine, biased):
    mean, variance = statistics(3, far)
    tensors = [normal(2, 2, 5, 5, seed=32), normal(3, 2, 3, 3, seed=33)]
    tensors += [normal(3, seed=34)] * biased + [normal(3, seed=35), normal(3, seed=36)] * affine

    def function(x: Tensor, weight: Tensor, *rest: Tensor) -> Tensor:
        bias = rest[0] if biased else None
        scale, shift = rest[-2:] if affine else (None, None)
        return F.batch_norm(F.conv2d(x, weight, bias, stride=2, padding=1), mean, variance, scale, shift)

    agree(function, tensors, switches, 1e-10 if far > 1 else 1e-12)


@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 5), (2, 3, 4, 4), (2, 3, 2, 3, 2)], ids=len)
def test_batchnorm_alone(shape):
    mean, variance = statistics(3)
    tensors = [normal(*shape, seed=37), normal(3, seed=38), normal(3, seed=39)]
    agree(lambda x, s, b: F.batch_norm(x, mean, variance, s, b, eps=1e-3), tensors, AFFINE, 1e-12)


def test_batchnorm_of_the_batch_itself_is_left_alone():
    x = normal(4, 3, seed=40)
    with active(EVERY):
        found = F.batch_norm(x, None, None, training=True)
    assert torch.equal(found, F.batch_norm(x, None, None, training=True))


def test_a_convolution_that_was_written_to_is_not_folded():
    mean, variance = statistics(3)

    def function(x: Tensor, weight: Tensor) -> Tensor:
        return F.batch_norm(F.conv2d(x, weight).relu_(), mean, variance)

    agree(function, [normal(2, 2, 4, 4, seed=41), normal(3, 2, 3, 3, seed=42)], FOLDED, 1e-12)


def test_a_convolution_used_twice_besides_its_batchnorm():
    mean, variance = statistics(2)

    def function(x: Tensor, weight: Tensor) -> Tensor:
        made = F.conv2d(x, weight, padding=1)
        return F.batch_norm(made, mean, variance) * made + F.batch_norm(made, mean, variance)

    agree(function, [normal(2, 2, 4, 4, seed=43), normal(2, 2, 3, 3, seed=44)], FOLDED, 1e-12)


# models


def small_resnet() -> nn.Sequential:
    model = testbeds.resnet20(4, 3, blocks=1)
    for i, module in enumerate(model.modules()):
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean = normal(module.num_features, seed=i).float()
            module.running_var = normal(module.num_features, seed=99 + i).float() ** 2 + 0.5
    return model


def images(count: int = 6) -> list[tuple[Tensor, Tensor]]:
    return [(normal(count, 3, 8, 8, seed=50).float(), torch.arange(count) % 3)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("switches", [CONVOLUTION, FOLDED, EVERY], ids=["convolution", "folded", "every"])
def test_products_of_a_residual_network(switches, dtype):
    exact = Problem(small_resnet(), nn.CrossEntropyLoss(), images(), dtype=torch.float64, kernels=NONE)
    problem = exact.replace(dtype=dtype, kernels=switches)
    V = normal(problem.size, 3, seed=51)
    allowed = 50 * torch.finfo(dtype).eps
    for found, expected in ((problem.hvp(V), exact.hvp(V)), (problem.ggn_vp(V), exact.ggn_vp(V))):
        assert float((found - expected).norm() / expected.norm()) <= allowed


def test_a_column_does_not_depend_on_its_block():
    problem = Problem(small_resnet(), nn.CrossEntropyLoss(), images(), microbatch=4)
    V = normal(problem.size, 3, seed=52).float()
    block = problem.hvp(V)
    assert torch.equal(block[:, 2], problem.hvp(V[:, 2]))
    assert torch.equal(block[:, 1:], problem.hvp(V[:, 1:]))
    assert torch.equal(block[:, 1:2], problem.hvp(V[:, 1:2].clone()))


class Viewing(nn.Module):
    """As the models of many tutorials: a view that images in channels_last order do not have."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 2, 3), nn.Linear(72, 3)

    def forward(self, x: Tensor) -> Tensor:
        made = self.first(x)
        return self.second(made.view(len(made), -1))


def test_a_model_that_needs_the_ordinary_memory_order():
    exact = Problem(Viewing(), nn.CrossEntropyLoss(), images(), dtype=torch.float64, kernels=NONE)
    problem = exact.replace(dtype=torch.float32, kernels=EVERY)
    v = normal(problem.size, seed=53)
    found, expected = problem.hvp(v), exact.hvp(v)
    assert float((found - expected).norm() / expected.norm()) <= 1e-5
    assert problem.kernels == FOLDED
    assert problem.cost.matvecs == 2  # the failed attempt is not one; the other is of `exact`


def test_the_users_own_bad_view_is_told():
    class Bad(Viewing):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.transpose(2, 3)[..., :7]).view(5)

    problem = Problem(Bad(), nn.CrossEntropyLoss(), images(), kernels=EVERY)
    with pytest.raises(RuntimeError):
        problem.hvp(torch.ones(problem.size))


# what is put back, and what is told


def test_everything_is_put_back():
    problem = Problem(small_resnet(), nn.CrossEntropyLoss(), images())
    model = problem.evaluator.model
    before, precision = snapshot(model), torch.backends.mkldnn.matmul.fp32_precision
    problem.hvp(torch.ones(problem.size))
    problem.check(frozenset({Need.HESSIAN}))
    assert same(snapshot(model), before)
    assert torch.backends.mkldnn.matmul.fp32_precision == precision
    assert not torch.overrides._get_current_function_mode_stack()


def test_everything_is_put_back_after_an_exception():
    def broken(output: Tensor, target: Tensor) -> Tensor:
        assert torch.overrides._get_current_function_mode_stack()
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
        raise ZeroDivisionError

    switches = Kernels(convolution=True, norm=True, matmul="bf16")
    problem = Problem(small_resnet(), broken, images(), kernels=switches, products="autodiff")
    before, precision = snapshot(problem.evaluator.model), torch.backends.mkldnn.matmul.fp32_precision
    for product in (problem.hvp, problem.ggn_vp):
        with pytest.raises(ZeroDivisionError):
            product(torch.ones(problem.size))
        assert same(snapshot(problem.evaluator.model), before)
        assert torch.backends.mkldnn.matmul.fp32_precision == precision
        assert not torch.overrides._get_current_function_mode_stack()


@pytest.fixture
def fresh_probe():
    matmul.faster_is_exact.cache_clear()
    yield
    matmul.faster_is_exact.cache_clear()


@pytest.mark.parametrize(
    ("faster", "exact"), [(4e-7, True), (8e-7, True), (2e-3, False), (float("nan"), False)]
)
def test_the_probe_refuses_what_computes_in_bf16(monkeypatch, fresh_probe, faster, exact):
    monkeypatch.setattr(matmul, "error", lambda p: {"bf16": faster, "none": 2e-7}[p])
    assert matmul.faster_is_exact() is exact
    chosen = kernels.choose(torch.device("cpu"), torch.float32)
    assert chosen.matmul == ("bf16" if exact else "default")
    assert kernels.choose(torch.device("cpu"), torch.float64).matmul == "default"


def test_the_probe_sees_operands_rounded_to_bf16(monkeypatch, fresh_probe):
    """As a processor with matrix units would compute, by true rounding of one operand in every product."""
    linear, bmm = F.linear, torch.bmm

    def rounded(t: Tensor) -> Tensor:
        reduced = torch.backends.mkldnn.matmul.fp32_precision == "bf16"
        return t.bfloat16().float() if reduced else t

    monkeypatch.setattr(torch, "bmm", lambda a, b: bmm(rounded(a), b))
    assert matmul.error("none") < 1e-6
    assert matmul.error("bf16") > 1e-3
    assert not matmul.faster_is_exact()
    monkeypatch.setattr(torch, "bmm", bmm)
    monkeypatch.setattr(matmul.functional, "linear", lambda a, b, c: linear(rounded(a), b, c))
    assert matmul.error("bf16") > 1e-3


def test_a_precision_that_the_user_has_set_stands(monkeypatch):
    monkeypatch.setattr(matmul, "faster_is_exact", lambda: True)
    setting = torch.backends.mkldnn.matmul
    assert kernels.choose(torch.device("cpu"), torch.float32).matmul == "bf16"
    setting.fp32_precision = "ieee"
    try:
        assert kernels.choose(torch.device("cpu"), torch.float32).matmul == "default"
    finally:
        setting.fp32_precision = "none"


def test_what_was_chosen_can_be_stored():
    problem = Problem(small_resnet(), nn.CrossEntropyLoss(), images())
    assert problem.kernels == kernels.choose(problem.device, problem.dtype)
    assert problem.kernels.as_dict() == {
        "convolution": True, "norm": True, "channels_last": True, "matmul": problem.kernels.matmul,
        "kinks": True,
    }  # fmt: skip
    assert problem.replace(kernels=NONE).kernels == NONE
    assert problem.at(problem.parameters_vector()).kernels == problem.kernels
    assert kernels.choose(torch.device("cuda"), torch.float32) == NONE


# vectors


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("k", [None, 1, 3])
def test_pieces_are_aligned_copies_of_the_vectors(k, dtype):
    space = ParameterSpace(
        {"a": torch.zeros(3), "b": torch.zeros(2, 5), "c": torch.zeros(()), "d": torch.zeros(16)}
    )
    V = normal(space.size, *([] if k is None else [k]), seed=60).to(dtype)
    for held in (V, V.reshape(space.size, -1).T.contiguous().T.reshape(V.shape)):
        pieces = aligned_pieces(held, space)
        assert len(pieces) == (k or 1)
        for j, row in enumerate(pieces):
            assert torch.equal(space.flatten(row), V if k is None else V[:, j])
            assert [tuple(p.shape) for p in row] == space.shapes
            assert all(p.data_ptr() % 64 == 0 and p.is_contiguous() for p in row)


def test_an_aligned_vector_is_not_copied():
    space = ParameterSpace({"a": torch.zeros(16, 4), "b": torch.zeros(32)})
    v = torch.zeros(space.size)
    (pieces,) = aligned_pieces(v, space)
    assert [p.data_ptr() - v.data_ptr() for p in pieces] == [0, 256]
