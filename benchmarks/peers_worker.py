"""One peer measuring one problem: reads requests as JSON lines, answers each with one JSON line.

    python benchmarks/peers_worker.py PEER PROBLEM FOLDER THREADS CLOCK

It runs in the environment of the peer, and is started by `peers.py`. Requests: {"do": "setup"}, "gradient",
"product", "block", {"do": "draw", "method": ..., "matvecs": ..., "seed": ...}, {"do": "eigenpairs",
"method": ..., "seed": ..., "path": ...}, or {"do": "density", "method": ..., "seed": ..., "steps": ..., "probes":
...}; setup may say into how many batches to cut the data. Answers hold "seconds", and "values", the estimates of the
trace, "taken", the products that were made where the method chose them, and "nodes", a list for each probe; or
"error". Eigenpairs are written to "path".
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import peers_problems
import torch
from peers_problems import Case
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from landscape.seeds import generator

BLOCK = 16
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
PAIRS = 10
GUESSES = (20, 24, 28, 32, 40)  # numbers of iterations that a user of hessian-eigenthings may hit on
Draw = Callable[[int, int], list[float]]  # (matvecs, seed) -> estimates of the trace
Nodes = Callable[[int, int, int], list[list[float]]]  # (seed, steps, probes) -> nodes of each probe
Pairs = Callable[[int], tuple[Any, Tensor]]  # seed -> the 10 largest eigenvalues, eigenvectors as columns


class Worker:
    """What every peer is asked for; `draws` maps the name of a method to the function that runs it."""

    package: ClassVar[str]

    def __init__(self, case: Case, clock: Callable[[], float]) -> None:
        self.case, self.clock = case, clock
        self.weights = list(case.model.parameters())
        size = (case.parameters, BLOCK)
        self.V = torch.randint(0, 2, size, generator=generator(0, "peers vector", 0)).float() * 2 - 1
        self.v = self.V[:, 0].contiguous()
        self.draws: dict[str, Draw] = {}
        self.pairs: dict[str, Pairs] = {}
        self.densities: dict[str, Nodes] = {}
        self.taken: int | None = None  # products of the last task, where the method chose them

    def counted(self, product: Callable[..., Any]) -> Callable[..., Any]:
        """Return a product that counts its calls."""

        def call(*arguments: Any) -> Any:
            self.taken = (self.taken or 0) + 1
            return product(*arguments)

        return call

    def around(self) -> contextlib.AbstractContextManager[None]:
        """What a user of the peer has to put around it so that it runs on this network at all."""
        if self.case.spec.math_attention:
            return sdpa_kernel(SDPBackend.MATH)
        return contextlib.nullcontext()

    def setup(self) -> None:
        """Make the operator: what is paid once, not per product."""

    def product(self) -> float:
        """Form one product and return v·Hv."""
        raise NotImplementedError

    block: Callable[[], object] | None = None
    """Form the products with 16 vectors at once; None where a peer takes one at a time."""

    def fresh(self) -> None:
        """Get ready for a draw, outside its time."""

    def timed(self, task: Callable[[], Any]) -> tuple[float, Any]:
        began = self.clock()
        result = task()
        return self.clock() - began, result


class PyHessian(Worker):
    package = "PyHessian"

    def setup(self) -> None:
        from pyhessian import hessian

        batches = [(self.case.inputs, self.case.targets)] if self.case.cut is None else self.case.batches()
        data = {"data": batches[0]} if len(batches) == 1 else {"dataloader": batches}
        self.hessian = hessian(self.case.model, self.case.loss, cuda=False, **data)
        self.densities = {"density": self.density}
        self.draws = {"hutchinson": self.hutchinson, "own stop": self.own_stop}
        self.pairs = {
            "defaults": self.power,
            "tol 1e-9": lambda seed: self.power(seed, 1e-9),
        }

    def product(self) -> float:
        from pyhessian.utils import hessian_vector_product

        pieces = self.v.split([w.numel() for w in self.weights])
        v = [piece.view_as(w) for piece, w in zip(pieces, self.weights, strict=True)]
        if self.hessian.full_dataset:
            Hv = self.hessian.dataloader_hv_product(v)[1]
        else:
            Hv = hessian_vector_product(self.hessian.gradsH, self.hessian.params, v)
        return sum((a.double() * b.double()).sum().item() for a, b in zip(v, Hv, strict=True))

    def hutchinson(self, matvecs: int, seed: int) -> list[float]:
        """Take all probes: no running mean is closer to the last than minus infinity."""
        torch.manual_seed(seed)
        return self.hessian.trace(maxIter=matvecs, tol=-float("inf"))

    def own_stop(self, matvecs: int, seed: int) -> list[float]:  # noqa: ARG002
        """Leave everything at its default, and take the mean of what comes back, as its README does."""
        torch.manual_seed(seed)
        samples = self.hessian.trace()
        self.taken = len(samples)
        return [sum(samples) / len(samples)]

    def density(self, seed: int, steps: int, probes: int) -> list[list[float]]:  # noqa: ARG002
        """Take one probe: they run one after the other. PyTorch no longer has the `torch.eig` that it calls."""
        torch.eig = lambda T, eigenvectors: _as_torch_eig(*torch.linalg.eigh(T))  # noqa: ARG005
        torch.manual_seed(seed)
        nodes, _ = self.hessian.density(iter=steps, n_v=1)
        return [[float(node) for node in probe] for probe in nodes]

    def power(self, seed: int, tol: float = 1e-3) -> tuple[Any, Tensor]:
        # `import pyhessian.hessian as module` would give the class of that name.
        module = importlib.import_module("pyhessian.hessian")
        torch.manual_seed(seed)
        plain = module.hessian_vector_product
        module.hessian_vector_product = self.counted(plain)
        try:
            values, vectors = self.hessian.eigenvalues(tol=tol, top_n=PAIRS)
        finally:
            module.hessian_vector_product = plain
        return values, torch.stack([torch.cat([piece.flatten() for piece in v]) for v in vectors], dim=1)


def _as_torch_eig(values: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Return real and imaginary parts of eigenvalues as columns, as PyTorch once did."""
    return torch.stack([values, torch.zeros_like(values)], dim=1), vectors


class _Columns:
    """An operator that gives curvlinops' products a few columns at a time: its own vmap over all of them
    would not fit into memory.
    """

    def __init__(self, operator: Any, columns: int) -> None:
        self.operator, self.columns = operator, columns
        self.shape, self.device, self.dtype = operator.shape, operator.device, operator.dtype

    def __matmul__(self, V: Tensor) -> Tensor:
        if V.dim() == 1:
            return self.operator @ V
        return torch.cat([self.operator @ part for part in V.split(self.columns, dim=1)], dim=1)


class Curvlinops(Worker):
    package = "curvlinops-for-pytorch"

    def setup(self) -> None:
        from curvlinops import HessianLinearOperator, hutchpp_trace, xtrace

        operator = HessianLinearOperator(
            self.case.model, self.case.loss, self.weights, self.case.batches(), check_deterministic=False
        )
        self.operator = _Columns(operator, self.case.spec.columns)
        functions = {"hutch++": hutchpp_trace, "xtrace": xtrace}
        self.draws = {name: self._seeded(function) for name, function in functions.items()}
        self.draws["hutchinson"] = self.hutchinson
        self.pairs = {"scipy eigsh": self.arpack}
        self.densities = {"fast_lanczos": self.fast_lanczos}

    def fast_lanczos(self, seed: int, steps: int, probes: int) -> list[list[float]]:  # noqa: ARG002
        """Take one probe, without the search for the spectrum's ends that it makes once before all probes."""
        from curvlinops.papyan2020traces.spectrum import fast_lanczos

        torch.manual_seed(seed)
        return [fast_lanczos(self.operator.operator, steps)[0].tolist()]

    def arpack(self, seed: int) -> tuple[Any, Tensor]:
        import numpy as np
        from scipy.sparse.linalg import LinearOperator, eigsh

        H = self.operator.operator.to_scipy()
        A = LinearOperator(H.shape, matvec=self.counted(H.matvec), dtype=H.dtype)
        v0 = np.random.default_rng(seed).normal(size=H.shape[0])
        values, vectors = eigsh(A, PAIRS, which="LA", tol=1e-3, v0=v0)
        return values, torch.from_numpy(vectors)

    def _seeded(self, function: Callable[..., Tensor]) -> Draw:
        def draw(matvecs: int, seed: int) -> list[float]:
            torch.manual_seed(seed)
            return [function(self.operator, matvecs).item()]

        return draw

    def hutchinson(self, matvecs: int, seed: int) -> list[float]:
        """Call it for one probe at a time: it returns only means, and the variance is wanted."""
        from curvlinops import hutchinson_trace

        torch.manual_seed(seed)
        return [hutchinson_trace(self.operator, 1).item() for _ in range(matvecs)]

    def product(self) -> float:
        return torch.dot(self.v.double(), (self.operator @ self.v).double()).item()

    def block(self) -> object:
        return self.operator @ self.V


class Eigenthings(Worker):
    package = "hessian-eigenthings"

    def setup(self) -> None:
        from hessian_eigenthings import HessianOperator, hutch_plus_plus, hutchinson, supervised_loss

        loss = supervised_loss(self.case.loss)
        self.operator = HessianOperator(self.case.model, self.case.batches(), loss)
        # The seed is given: without one, every call draws the same numbers.
        self.draws = {
            "hutch++": lambda m, seed: [hutch_plus_plus(self.operator, num_matvecs=m, seed=seed).estimate],
            "hutchinson": lambda m, seed: hutchinson(
                self.operator, num_samples=m, seed=seed
            ).samples.tolist(),
        }
        self.pairs = {f"lanczos {guess}": partial(self.lanczos, guess) for guess in GUESSES}
        self.densities = {"spectral_density": self.spectral_density}

    def spectral_density(self, seed: int, steps: int, probes: int) -> list[list[float]]:  # noqa: ARG002
        """Take one probe: they run one after the other."""
        from hessian_eigenthings.algorithms.spectral_density import spectral_density

        found = spectral_density(self.operator, num_runs=1, lanczos_steps=steps, seed=seed)
        return found.raw_eigenvalues.tolist()

    def lanczos(self, iterations: int, seed: int) -> tuple[Any, Tensor]:
        from hessian_eigenthings import lanczos

        self.taken = iterations
        result = lanczos(self.operator, k=PAIRS, max_iter=iterations, which="LA", seed=seed)
        vectors = torch.as_tensor(result.eigenvectors)
        return result.eigenvalues, vectors.T if vectors.shape[0] == PAIRS else vectors

    def product(self) -> float:
        return torch.dot(self.v.double(), self.operator.matvec(self.v).double()).item()


class Ours(Worker):
    package = "landscape"

    def around(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def setup(self) -> None:
        self.problem = ours_problem(self.case)
        self.draws = {"trace": lambda _, seed: [ours_trace(self.problem, seed)], "measure()": self.whole}
        if not self.case.spec.piecewise_linear:  # else both are the same exact way
            layers = partial(ours_trace, per_layer=True)
            self.draws["trace per tensor"] = lambda _, seed: [layers(self.problem, seed)]
        plain = partial(self.eigsh, copies=False, block=1)
        self.pairs = {"eigsh": self.eigsh, "eigsh, block=1, copies=False": plain}
        self.densities = {
            "lockstep": self.density,
            "one chain": lambda seed, steps, probes: self.density(seed, steps, 1),  # noqa: ARG005
            "evaluate()": self.whole_density,
        }

    def eigsh(self, seed: int, **options: Any) -> tuple[Any, Tensor]:
        """Keep the graphs of products for the time of the solve, as `measure()` does."""
        import landscape

        with self.problem.session(), self.problem.keeping_graphs():
            result = landscape.estimators.eigsh(landscape.hessian(self.problem), PAIRS, seed=seed, **options)
        self.taken = result.matvecs
        return result.values, result.vectors

    def density(self, seed: int, steps: int, probes: int) -> list[list[float]]:
        import landscape

        with self.problem.session(), self.problem.keeping_graphs():
            found = landscape.estimators.density(landscape.hessian(self.problem), probes, steps, seed)
        return _nodes(found.chains)

    def whole_density(self, seed: int, steps: int, probes: int) -> list[list[float]]:
        """Take the metric as it comes, with its band and its outliers."""
        import landscape
        from landscape.estimators.lanczos import Chains

        metric = landscape.metrics.Density(probes=probes, steps=steps)
        record = landscape.evaluate(metric, self.problem, seed)
        return _nodes(Chains(record["alpha"], record["beta"]))

    def fresh(self) -> None:
        self.problem = ours_problem(self.case)  # so that nothing is kept from the draw before

    def whole(self, matvecs: int, seed: int) -> list[float]:  # noqa: ARG002
        with tempfile.TemporaryDirectory() as folder:
            return [ours_measure(self.problem, seed, Path(folder))]

    def product(self) -> float:
        return torch.dot(self.v.double(), self.problem.hvp(self.v).double()).item()

    def block(self) -> object:
        return self.problem.hvp(self.V)


def _nodes(chains: Any) -> list[list[float]]:
    """Return the eigenvalues of the tridiagonal matrices as they are, none merged with another."""
    from landscape.estimators.quadrature import gauss

    return [gauss(alpha, beta).nodes.tolist() for alpha, beta in chains.rows()]


def ours_problem(case: Case) -> Any:
    """Return the problem as a user of `landscape` states it."""
    import landscape

    data = [(case.inputs, case.targets)] if case.cut is None else case.batches()
    return landscape.Problem(case.model, case.loss, data, microbatch=case.spec.microbatch)


def ours_trace(problem: Any, seed: int, per_layer: bool = False) -> float:
    """Return our estimate of Tr H: the estimator alone, without `check()` and without a file."""
    import landscape

    return float(landscape.evaluate(_ours_metric(problem, per_layer), problem, seed)["trace"])


def ours_measure(problem: Any, seed: int, folder: Path) -> float:
    """Return our estimate of Tr H from a whole `measure()`, with its checks and its file."""
    import landscape

    return float(landscape.measure(_ours_metric(problem), problem, out=folder, seed=seed)["trace"])


def _ours_metric(problem: Any, per_layer: bool = False) -> Any:
    """Return the metric of who wants the total, as no peer gives more: exact where the network allows.

    At most 64 probes of a large one; the driver judges the error itself.
    """
    import landscape

    most = 1024 if problem.size < 300_000 else 64
    return landscape.metrics.Trace(rtol=0.01, max_probes=most, per_layer=per_layer)


WORKERS: dict[str, type[Worker]] = {
    "ours": Ours,
    "pyhessian": PyHessian,
    "curvlinops": Curvlinops,
    "eigenthings": Eigenthings,
}


def answer(worker: Worker, request: dict[str, Any]) -> dict[str, Any]:
    """Do what is asked for and say how long it took."""
    what = request["do"]
    if what == "gradient":
        return {"seconds": worker.timed(worker.case.gradient)[0]}
    with worker.around():
        if what == "setup":
            worker.case = dataclasses.replace(worker.case, cut=request.get("cut"))
            seconds, _ = worker.timed(worker.setup)
            versions = {name: version(name) for name in ("torch", "numpy")} | {"peer": _version(worker)}
            return {"seconds": seconds, "versions": versions, "methods": list(worker.draws),
                    "eigenpairs": list(worker.pairs), "density": list(worker.densities)}  # fmt: skip
        if what == "product":
            seconds, value = worker.timed(worker.product)
            return {"seconds": seconds, "values": [value]}
        if what == "block":
            if worker.block is None:
                return {"seconds": None}
            return {"seconds": worker.timed(worker.block)[0] / BLOCK}
        if what == "eigenpairs":
            worker.taken = None
            seconds, (values, vectors) = worker.timed(
                lambda: worker.pairs[request["method"]](request["seed"])
            )
            kept = torch.as_tensor(values).double(), vectors.double()
            torch.save({"values": kept[0], "vectors": kept[1]}, request["path"])
            return {"seconds": seconds, "taken": worker.taken}
        if what == "density":
            run = partial(
                worker.densities[request["method"]], request["seed"], request["steps"], request["probes"]
            )
            seconds, nodes = worker.timed(run)
            return {"seconds": seconds / len(nodes), "nodes": nodes}
        worker.fresh()
        draw = worker.draws[request["method"]]
        seconds, values = worker.timed(lambda: draw(request["matvecs"], request["seed"]))
        return {"seconds": seconds, "values": [float(value) for value in values], "taken": worker.taken}


def _version(worker: Worker) -> str:
    if isinstance(worker, Ours):
        import landscape

        return landscape.__version__
    return version(worker.package)


def _requests() -> Iterator[dict[str, Any]]:
    for line in sys.stdin:
        yield json.loads(line)


def main() -> None:
    name, problem, folder, threads, clock = sys.argv[1:]
    torch.set_num_threads(int(threads))
    # What a peer prints must not stand between the answers.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    worker = WORKERS[name](peers_problems.load(Path(folder), problem), CLOCKS[clock])
    for request in _requests():
        try:
            reply = answer(worker, request)
        except Exception as error:  # noqa: BLE001  (a peer may raise anything; the table says what)
            reply = {"error": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
        print(json.dumps(reply), file=answers)


if __name__ == "__main__":
    main()
