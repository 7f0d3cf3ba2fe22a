"""What may not be measured is refused with its cause; what autograd gets wrong is noticed."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.data import DataLoader, TensorDataset

import landscape
from landscape.checks import Need

HESSIAN, GGN, VALUE = frozenset({Need.HESSIAN}), frozenset({Need.GGN}), frozenset({Need.VALUE})


def data(count: int = 12, features: int = 5, classes: int = 3) -> tuple[Tensor, Tensor]:
    draws = torch.Generator().manual_seed(0)
    return torch.randn(count, features, generator=draws), torch.randint(0, classes, (count,), generator=draws)


def net(*middle: nn.Module, first: nn.Module | None = None) -> nn.Sequential:
    layers = [first or nn.Linear(5, 8), *(middle or (nn.Tanh(),)), nn.Linear(8, 3)]
    draws = torch.Generator().manual_seed(1)
    model = nn.Sequential(*layers)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=draws) * 0.5)
    return model


def problem(model: nn.Module | None = None, **options: Any) -> landscape.Problem:
    batches = options.pop("data", [data()])
    return landscape.Problem(model or net(), options.pop("loss", nn.CrossEntropyLoss()), batches, **options)


def test_a_sound_problem_passes_with_small_numbers() -> None:
    report = problem().check(HESSIAN | GGN)
    assert report.products == "autodiff"
    assert report.reason == ""
    assert report.repeat_difference == 0.0
    assert report.product_error < 1e-7
    assert report.symmetry_error < 1e-10
    assert report.loss == pytest.approx(float(problem().value()), rel=1e-7)


@pytest.mark.parametrize("shuffled", ["order", "noise"])
def test_data_that_change_between_passes_are_refused(shuffled: str) -> None:
    x, y = data()
    if shuffled == "order":
        loader: Any = DataLoader(TensorDataset(x, y), batch_size=4, shuffle=True)
    else:
        loader = DataLoader(
            TensorDataset(x, y), batch_size=4, collate_fn=lambda items: (
                torch.stack([i[0] + 0.1 * torch.randn(5) for i in items]), torch.stack([i[1] for i in items]))
        )  # fmt: skip
    with pytest.raises(landscape.Refused, match=r"data changed between two passes.*shuffle=False"):
        problem(data=loader).check(VALUE)


def test_dropout_in_training_mode_is_refused() -> None:
    with pytest.raises(landscape.Refused, match=r"the model is random.*mode='eval'"):
        problem(net(nn.Tanh(), nn.Dropout(0.5)), mode="train").check(VALUE)
    assert problem(net(nn.Tanh(), nn.Dropout(0.5))).check(HESSIAN).product_error < 1e-7


def test_batchnorm_in_training_mode_does_not_add_up() -> None:
    with pytest.raises(landscape.Refused, match="not the sum of its parts"):
        problem(net(nn.BatchNorm1d(8)), mode="train").check(VALUE)


def test_a_mean_over_something_else_needs_a_weight() -> None:
    def over_positive(f: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(f[y > 0], y[y > 0])

    with pytest.raises(landscape.Refused, match=r"weight=lambda batch"):
        problem(loss=over_positive).check(VALUE)
    weighted = problem(loss=over_positive, weight=lambda batch: float((batch[1] > 0).sum()))
    assert weighted.check(VALUE).additivity_error < 1e-5


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_terms_of_both_signs_may_cancel(reduction: str) -> None:
    """A policy gradient's loss: its terms are of order 1, the sums of a batch and of its parts are rounding."""
    x = data(3)[0].repeat(40, 1)
    advantage = torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0, -1.0]).repeat(20)

    def signed(f: Tensor, a: Tensor) -> Tensor:
        terms = a * (f.log_softmax(1)[:, 0] + 0.3)
        return terms.mean() if reduction == "mean" else terms.sum()

    def coupled(f: Tensor, a: Tensor) -> Tensor:
        return signed(f, a) + signed(f, a.abs()) ** 2

    found = problem(loss=signed, data=[(x, advantage)], reduction=reduction, dtype=torch.float32)
    assert found.check(VALUE).additivity_error < 1e-4
    with pytest.raises(landscape.Refused, match="not the sum of its parts"):
        problem(loss=coupled, data=[(data(120)[0], advantage)], reduction=reduction).check(VALUE)


def test_a_loss_divided_by_the_spread_of_its_batch_is_refused() -> None:
    """Of a single example the spread is 0 and the quotient huge: such terms are no scale for rounding."""

    def standardized(f: Tensor, y: Tensor) -> Tensor:
        return ((f[:, 0] - y) / (f[:, 0].std(correction=0) + 1e-8)).mean()

    with pytest.raises(landscape.Refused, match="not the sum of its parts"):
        problem(loss=standardized, weight=lambda batch: float(len(batch[1]))).check(VALUE)


def test_a_sum_declared_as_mean_is_refused() -> None:
    def total(f: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(f, y, reduction="sum")

    with pytest.raises(landscape.Refused, match="reduction='sum'"):
        problem(loss=total).check(VALUE)
    assert problem(loss=total, reduction="sum").check(VALUE).loss == pytest.approx(
        float(problem().value()), rel=1e-6
    )
    with pytest.raises(ValueError, match=r"the loss has reduction='sum'.*declared with reduction='mean'"):
        problem(loss=nn.CrossEntropyLoss(reduction="sum"))


@pytest.mark.parametrize(
    ("spoil", "cause"),
    [("weights", "parameters 0.bias are not finite"), ("data", "the data hold values that are not finite")],
)
def test_a_loss_that_is_not_finite_names_batch_and_cause(spoil: str, cause: str) -> None:
    model, (x, y) = net(), data()
    if spoil == "weights":
        with torch.no_grad():
            model[0].bias[2] = math.nan
    else:
        x[7, 1] = math.nan
    batch = 0 if spoil == "weights" else 1
    with pytest.raises(landscape.Refused, match=rf"not finite \(nan or inf\) from batch {batch} on: {cause}"):
        problem(model, data=[(x[:5], y[:5]), (x[5:], y[5:])]).check(VALUE)


def test_a_loss_per_example_is_refused() -> None:
    with pytest.raises(ValueError, match="reduction='none'"):
        problem(loss=nn.CrossEntropyLoss(reduction="none"))
    with pytest.raises(landscape.Refused, match=r"shape \(12,\); allowed is one number per batch"):
        problem(loss=lambda f, y: (f.sum(1) - y) ** 2).value()


def test_a_model_without_trainable_parameters_is_refused() -> None:
    with pytest.raises(ValueError, match="no parameter to measure"):
        problem(net().requires_grad_(False))


def test_unknown_parameters_name_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"no parameter matches '0.wieght'; the nearest are 0.weight"):
        problem(parameters="0.wieght")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"data": iter([data()])}, TypeError, "can be read only once"),
        ({"data": TensorDataset(*data())}, TypeError, "DataLoader\\(dataset"),
        ({"data": 3}, TypeError, "re-iterable"),
        ({"reduction": "none"}, ValueError, "reduction is 'none'; allowed is 'mean' or 'sum'"),
        ({"microbatch": 0}, ValueError, "microbatch is 0"),
        ({"dtype": torch.int64}, ValueError, "real floating-point"),
        ({"forward": lambda m, b: 0}, TypeError, "give either loss"),
    ],
)
def test_arguments_that_do_not_fit_are_named(options: dict[str, Any], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        problem(**options)


def test_no_data_and_no_weight_are_refused() -> None:
    with pytest.raises(ValueError, match="yields no batch"):
        problem(data=[]).value()
    x, _ = data()
    ignored = [(x, torch.full((12,), -100))]
    with pytest.raises(landscape.Refused, match="every batch has weight 0"):
        problem(data=ignored).value()


# --- second derivatives -----------------------------------------------------------------------------


def dense_hessian(p: landscape.Problem) -> Tensor:
    """Float64 differences of gradients along every axis; nothing of reverse-over-reverse."""
    p = p.replace(dtype=torch.float64)
    theta, rows, h = p.parameters_vector(), [], 1e-5
    for i in range(p.size):
        e = torch.zeros_like(theta)
        e[i] = h
        rows.append((p.at(theta + e).gradient() - p.at(theta - e).gradient()) / (2 * h))
    return torch.stack(rows)


def legacy_weight_norm() -> nn.Module:
    with pytest.warns(FutureWarning):
        return nn.utils.weight_norm(nn.Linear(5, 8))


@pytest.mark.parametrize(
    "make", [lambda: weight_norm(nn.Linear(5, 8)), legacy_weight_norm], ids=["new", "legacy"]
)
def test_weight_norm_is_caught_and_measured_right(make: Any) -> None:
    model = net(first=make())
    sound = problem(model)
    reference = dense_hessian(sound)
    eye = torch.eye(sound.size)
    wrong = sound.replace(products="autodiff").hvp(eye).double()
    report = sound.check(HESSIAN)
    if torch.allclose(wrong, reference, rtol=1e-3, atol=1e-4):
        assert report.products == "autodiff"  # a PyTorch that has mended it
        return
    assert report.products == "difference"
    assert report.product_error > 0.01
    assert "second derivative is wrong" in report.reason
    ds = landscape.measure(landscape.metrics.Trace(), sound)
    assert ds.attrs["products"] == "difference"
    assert float(ds["trace"]) == pytest.approx(float(reference.trace()), rel=1e-6)
    with pytest.raises(landscape.Refused, match="products='auto'"):
        sound.replace(products="autodiff").check(HESSIAN)
    state = {k: v.dtype for k, v in model.state_dict().items()}
    assert set(state.values()) == {torch.float32}
    assert model(data()[0]).dtype == torch.float32


class Bag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bag, self.out = nn.EmbeddingBag(10, 4, mode="mean"), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.bag(x)))


def test_a_layer_without_second_derivative_is_measured_by_differences() -> None:
    draws = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, 10, (12, 6), generator=draws)
    p = problem(Bag(), data=[(tokens, data()[1])])
    report = p.check(HESSIAN)
    assert report.products == "difference"
    assert "no second derivative" in report.reason
    reference = dense_hessian(p)
    found = p.replace(products="difference").hvp(torch.eye(p.size))
    assert float((found - reference).norm() / reference.norm()) < 1e-6


class Halver(torch.autograd.Function):
    """x² with a backward pass whose own derivative is wrong."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x.detach() * g


class Squares(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Halver.apply(x)


def test_a_custom_function_with_a_wrong_second_derivative_is_caught() -> None:
    p = problem(net(nn.Tanh(), Squares()))
    report = p.check(HESSIAN)
    assert report.products == "difference"
    reference = dense_hessian(p)
    found = p.replace(products="difference").hvp(torch.eye(p.size))
    assert float((found - reference).norm() / reference.norm()) < 1e-6


def test_kinks_are_not_mistaken_for_defects() -> None:
    """Dead units, zero biases and ties put θ on kinks; the products are right all the same."""
    model = net(nn.ReLU())
    with torch.no_grad():
        model[0].bias.zero_()
        model[0].weight[:4] = 0.0
    x, y = data()
    x[:6] = 0.0
    report = problem(model, data=[(x, y)]).check(HESSIAN)
    assert report.products == "autodiff"
    assert report.product_error < 1e-6


def test_a_model_that_cannot_run_in_float64_is_checked_in_its_own_dtype() -> None:
    class Single(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = net()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x.float())

    report = problem(Single()).check(HESSIAN)
    assert report.products == "autodiff"
    assert report.product_error < 1e-2


def test_differences_scale_with_the_vector() -> None:
    """A Rademacher probe has norm √n; a step that ignores it leaves the quadratic region."""
    p = problem(products="difference")
    v = torch.randn(p.size, generator=torch.Generator().manual_seed(0))
    small, large = p.hvp(v * 1e-4) * 1e4, p.hvp(v * 1e4) * 1e-4
    exact = problem(products="autodiff").hvp(v)
    assert float((small - exact).norm() / exact.norm()) < 1e-5
    assert float((large - exact).norm() / exact.norm()) < 1e-5


def test_a_parameter_used_past_its_module_is_noticed() -> None:
    class Hoarder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(5, 3)
            self.kept = [self.inner.weight]

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.kept[0].T + self.inner.bias

    with pytest.raises(landscape.Refused, match=r"uses inner.weight through a reference of its own"):
        problem(Hoarder()).check(VALUE)


def test_targets_that_are_no_tensor_are_refused() -> None:
    x, y = data()
    pairs = problem(data=[(x, (y, y))], loss=lambda f, t: F.cross_entropy(f, t[0]), weight=lambda b: 12.0)
    with pytest.raises(landscape.Refused, match="target=lambda batch"):
        pairs.targets()


def test_saturated_probabilities_do_not_break_binary_cross_entropy() -> None:
    p = torch.tensor([[0.0, 0.3], [1.0, 0.6]])
    box = landscape.Problem(
        lambda q, x: p + 0 * x + 0.1 * torch.tanh(q["w"]) * torch.tensor([[0.0, 1.0], [0.0, 1.0]]),
        nn.BCELoss(), [(torch.zeros(2, 2), torch.tensor([[0.0, 1.0], [1.0, 0.0]]))],
        parameters={"w": torch.full((2,), 0.2)}, products="autodiff",
    )  # fmt: skip
    H = box.hvp(torch.eye(2))
    assert H.isfinite().all()
    assert float((H - dense_hessian(box)).norm()) < 1e-5


# --- outputs are needed -----------------------------------------------------------------------------


def test_a_black_box_has_a_hessian_but_no_outputs() -> None:
    loss = nn.CrossEntropyLoss()
    box = landscape.Problem(net(), forward=lambda m, b: loss(m(b[0]), b[1]), data=[data()])
    assert box.check(HESSIAN).product_error < 1e-7
    for refused in (
        lambda: box.ggn_vp(torch.ones(box.size)),
        lambda: landscape.ggn(box),
        box.losses,
        box.targets,
        lambda: box.check(GGN),
        lambda: landscape.measure(landscape.metrics.Trace(curvature="ggn"), box),
    ):
        with pytest.raises(landscape.Refused, match="output="):
            refused()
