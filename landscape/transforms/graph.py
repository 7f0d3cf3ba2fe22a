"""The graph of a network's forward pass, without in-place writes, as `torch.export` sees it."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.export.graph_signature import InputKind, OutputKind

from landscape import batches as batching
from landscape.errors import Refused

if TYPE_CHECKING:
    from landscape.problem import Problem

Node = torch.fx.Node

# One is not enough: sizes of 1 are special to export, and a batch of one broadcasts.
_EXAMPLES = 2


@dataclass(frozen=True)
class Graph:
    """What a forward pass does.

    Attributes:
        nodes: the operations on which the outputs depend, in order.
        parameters: placeholder -> name of a measured parameter; a tied one by its first name.
        buffers: placeholder -> name of a buffer.
        outputs: the nodes that are outputs.
        unused: measured parameters on which the outputs do not depend.
        rounding: the coarsest rounding of what is computed: of float32 where the model says so.
    """

    nodes: list[Node]
    parameters: dict[Node, str]
    buffers: dict[Node, str]
    outputs: list[Node]
    unused: list[str]
    rounding: float


class _Forward(nn.Module):
    """A problem's outputs as a function of the tensors of a batch; of a black box, its loss.

    Export wants names without dots, which the parameters of a function may have: then they, and the buffers,
    stand here under numbers.

    Attributes:
        parameter_names: what export calls a parameter -> its first name in the model.
        buffer_names: what export calls a buffer -> its name in the model.
    """

    def __init__(self, problem: Problem, piece: Any):
        super().__init__()
        self._problem, self._piece = problem, piece
        model = problem.evaluator.model
        first: dict[int, str] = {}
        for name, p in model.named_parameters():
            first.setdefault(id(p), name)
        self._numbered = any("." in key for m in model.modules() for key in m._parameters)
        if self._numbered:
            held = dict(model.named_parameters())
            self.parameter_names = {f"parameter{i}": name for i, name in enumerate(held)}
            self.buffer_names = {f"buffer{i}": name for i, (name, _) in enumerate(model.named_buffers())}
            self._parameters.update({alias: held[name] for alias, name in self.parameter_names.items()})
            self._buffers.update(zip(self.buffer_names, dict(model.named_buffers()).values(), strict=True))
        else:
            self.model = model
            every = model.named_parameters(remove_duplicate=False)
            self.parameter_names = {f"model.{name}": first[id(p)] for name, p in every}
            self.buffer_names = {f"model.{name}": name for name, _ in model.named_buffers()}

    def forward(self, tensors: list[Tensor]) -> list[Tensor]:
        given = iter(tensors)
        piece = batching.tree_map(lambda _: next(given), self._piece)
        evaluator = self._problem.evaluator
        own = {**self.parameter_names, **self.buffer_names} if self._numbered else {}
        with evaluator.slots.filled({f"model.{name}": getattr(self, alias) for alias, name in own.items()}):
            found = evaluator.outputs(piece) if evaluator.has_outputs else evaluator.loss_of(piece)
        return [t for t in batching.tensors(found) if t.is_floating_point()]


def example(problem: Problem, examples: int = _EXAMPLES) -> Any:
    """The first examples of the data, as one micro-batch; all of it where examples cannot be told apart."""
    weighty = (batch for batch in problem.batches if problem.evaluator.weigh(batch) > 0)
    piece = next(weighty, None)
    if piece is None:
        raise Refused("every batch has weight 0 (no valid target in any); there is nothing to look at")
    try:
        return batching.cut(piece, 0, min(examples, batching.examples(piece)))
    except ValueError:
        return piece


def export(problem: Problem) -> Graph:
    """Export the forward pass of a problem's model in its measured mode.

    In-place writes become operations of their own, which no live tracer shows through a view.

    Args:
        problem: of any form; of one with `forward=` the loss is the output.

    Raises:
        Refused: where the pass depends on the data (control flow, `.item()`, numpy) or cannot be exported.
    """
    piece = example(problem)
    with problem.session(), problem.filled(problem.leaves()), _quiet(), _no_fast_path():
        try:
            module = _Forward(problem, piece)  # within the block: substitutes stand in the model's places
            exported = torch.export.export(module, (batching.tensors(piece),), strict=False)
            exported = exported.run_decompositions({})
        except Exception as failure:  # export raises whatever the model's code raises
            raise Refused(_why(failure)) from failure
    return _graph(exported, module, problem.names)


def _graph(exported: Any, module: _Forward, measured: list[str]) -> Graph:
    nodes = list(exported.graph.nodes)
    by_name = {node.name: node for node in nodes}
    signature = exported.graph_signature
    outputs = [
        by_name[spec.arg.name]
        for spec in signature.output_specs
        if spec.kind == OutputKind.USER_OUTPUT and getattr(spec.arg, "name", None) in by_name
    ]
    needed = _ancestors(outputs)
    for node in needed:
        if any(not isinstance(size, int) for t in _tensors(node.meta.get("val")) for size in t.shape):
            raise Refused(
                f"the shape of what {where(node)} gives depends on the values of the data, so that the network's "
                "symmetries are not known; allowed are shapes that depend on the inputs' shapes alone"
            )
    parameters: dict[Node, str] = {}
    buffers: dict[Node, str] = {}
    for spec in signature.input_specs:
        given = by_name.get(spec.arg.name)
        if given is None or given not in needed:
            continue
        name = module.parameter_names.get(spec.target)
        if spec.kind == InputKind.PARAMETER and name in measured:
            parameters[given] = name
        if spec.kind == InputKind.BUFFER:
            buffers[given] = module.buffer_names[spec.target]
    used = set(parameters.values())
    return Graph(
        [n for n in nodes if n in needed],
        parameters,
        buffers,
        outputs,
        [name for name in measured if name not in used],
        _rounding([n for n in nodes if n in needed], set(parameters)),
    )


def _rounding(nodes: list[Node], moving: set[Node]) -> float:
    """The coarsest rounding of what depends on the parameters."""
    found = [0.0]
    for node in nodes:
        if any(n in moving for n in node.all_input_nodes):
            moving.add(node)
            tensors = _tensors(node.meta.get("val"))
            found += [torch.finfo(t.dtype).eps for t in tensors if t.is_floating_point()]
    return max(found)


def _ancestors(outputs: list[Node]) -> set[Node]:
    found: set[Node] = set()
    left = list(outputs)
    while left:
        node = left.pop()
        if node not in found:
            found.add(node)
            left.extend(node.all_input_nodes)
    return found


def _tensors(val: Any) -> list[Tensor]:
    return [t for t in (val if isinstance(val, tuple | list) else [val]) if isinstance(t, Tensor)]


def where(node: Node) -> str:
    """The module in which an operation stands, else the operation's own name."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    paths = [
        str(entry[0]).removeprefix("L['self'].").removeprefix("model").removeprefix(".") for entry in stack
    ]
    return paths[-1] if paths and paths[-1] else str(node.name)


def _why(failure: Exception) -> str:
    first = next((line.strip() for line in str(failure).splitlines() if line.strip()), "no message")
    return (
        f"the network's graph cannot be read ({type(failure).__name__}: {first}), so that its symmetries are not "
        "known. Its operations must not depend on the values of the data: no `if`, `.item()`, `.tolist()` or "
        "numpy on tensors in the forward pass"
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep export from printing the graph so far where it fails, and from warning about its own code."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


@contextlib.contextmanager
def _no_fast_path() -> Iterator[None]:
    """Let `nn.TransformerEncoderLayer` run as its parts, not as one fused operation."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
