"""The floors, the tools, and that what is written about the package is true."""

from __future__ import annotations

import ast
import configparser
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "landscape"

# Floor of each module; a package's base lies below its siblings. A file imports only from lower floors.
FLOORS = [
    {"_version", "errors", "limits"},
    {
        "allocator",
        "atomic",
        "foreign",
        "opening",
        "processes",
        "provenance",
        "record",
        "refinement",
        "seeds",
        "stages",
        "vectors",
    },
    {"bookkeeping", "checkpoint_files", "parcel", "tensor_file"},
    {
        "grids",
        "batches",
        "checkpoints",
        "convolution",
        "guard",
        "kernels",
        "lock",
        "losses",
        "matmul",
        "reading",
        "scales",
        "parameter_shards",
        "plain_passes",
        "strict",
        "tensors",
    },
    {"netcdf", "reading_server"},
    {"results", "ranks", "rounds"},
    {"parts", "sharded"},
    {
        "arguments",
        "products",
        "evaluator",
        "averages",
        "product_checks",
        "checks",
        "accuracy",
        "folding",
        "kinks",
        "in_place",
        "ways",
        "passes",
        "displaced",
    },
    {"problem"},
    {"linear_maps", "sharded_parameters", "uses"},
    {
        "capture",
        "curvature_columns",
        "example_norms",
        "gradient_readings",
        "output_curvature",
        "paths",
        "per_example",
    },
    {
        "ggn_passes",
        "ggn_trace",
        "ggn_diagonal",
        "structure",
        "inputs",
        "divergence",
        "layer_rows",
        "example_outputs",
        "example_streams",
    },
    {"memory", "operators", "example_scalars", "example_hessians"},
    {"input_checks", "attacks"},
    {"residual"},
    {
        "transforms.system",
        "transforms.verdicts",
        "transforms.exponents",
        "transforms.graph",
        "transforms.labels",
        "transforms.transformed",
    },
    {"transforms.fields", "transforms.layout"},
    {"transforms.rules", "transforms.balance", "transforms.verification"},
    {
        "transforms.label_rules",
        "transforms.rules_elementwise",
        "transforms.rules_layers",
        "transforms.rules_norms",
        "transforms.rules_shape",
    },
    {"transforms.nullspace", "transforms.permutations", "transforms.smooth"},
    {"transforms.symmetries"},
    {"transforms"},
    {"second_differences", "loss_differences"},
    {
        "estimators.calibration",
        "estimators.probes",
        "estimators.radius",
        "estimators.radial",
        "estimators.regions",
        "estimators.stopping",
        "estimators.log_mean",
    },
    {"estimators.search"},
    {"estimators.krylov"},
    {
        "estimators.apgd",
        "estimators.ascent",
        "estimators.eigen",
        "estimators.hutchinson",
        "estimators.hutchpp",
        "estimators.lbfgsb",
        "estimators.power",
        "estimators.stacks",
        "estimators.xtrace",
    },
    {"estimators.lanczos", "estimators.planes", "estimators.quadrature", "estimators.deflation"},
    {"estimators.smoothing", "estimators.outliers"},
    {"estimators.density"},
    {"estimators.logdet"},
    {"estimators"},
    {"directions.base"},
    {"directions.drawn", "directions.of_loss", "directions.paths"},
    {"directions", "norms"},
    {"planes"},
    {"traces.plan", "traces.deflation"},
    {"traces.estimate", "traces.probing"},
    {"traces.mapped", "traces.pilot"},
    {"traces.values"},
    {"traces.choice"},
    {"traces"},
    {"preconditioners"},
    {"sharpness.scaling", "sharpness.function", "sharpness.curvature", "sharpness.settings"},
    {"sharpness.search", "sharpness.noise", "sharpness.estimate"},
    {"sharpness.trial"},
    {"sharpness"},
    {"class_structure.grams", "class_structure.labels", "class_structure.work"},
    {"class_structure.vectors", "class_structure.embedding"},
    {"class_structure.spectra"},
    {"class_structure.outliers"},
    {"class_structure.gram_tasks", "class_structure.spectrum_tasks", "class_structure.summary"},
    {"class_structure"},
    {"metrics.base_journal"},
    {"metrics.base"},
    {"metrics.registry", "metrics.base_ends", "metrics.base_trace"},
    {"metrics.*"},
    {"metrics"},
    {"plots.style", "plots.words"},
    {"identity"},
    {"shares"},
    {"journal", "sharing"},
    {"merging"},
    {"plots.class_panels"},
    {"run", "plots", "testbeds.*", "testbeds", "training.*", "training"},
    {"plots.*"},
    {"plots.surface"},
]
# Within a floor, from the bottom up.
ORDER = {
    "foreign": 1,
    "products": 0, "evaluator": 0, "averages": 1, "product_checks": 2, "checks": 3, "convolution": 0,
    "matmul": 0, "kernels": 1,
    "directions.paths": 1, "accuracy": 0, "kinks": 0, "folding": 0, "in_place": 0, "ways": 1, "passes": 2,
    "displaced": 3,
    "transforms.fields": 0, "transforms.layout": 1, "curvature_columns": 0, "output_curvature": 1,
    "example_norms": 0, "gradient_readings": 1, "ggn_passes": 0, "ggn_trace": 1, "ggn_diagonal": 1, "layer_rows": 1,
    "example_scalars": 0, "example_hessians": 1,
    "testbeds.nets": 0, "testbeds.digits": 1, "testbeds.train": 1, "testbeds.golden": 2, "testbeds": 3,
    "training.layers": 0, "training.spectral": 0, "training.low_curvature": 1, "training": 2,
}  # fmt: skip
TORCH_FREE = {"results", "record", "atomic", "provenance", "strict", "netcdf", "tensors", "plots", "plots.*"}
TORCH_FREE |= {
    "bookkeeping",
    "limits",
    "opening",
    "parcel",
    "reading",
    "reading_server",
    "tensor_file",
    "checkpoint_files",
    "foreign",
}
TORCH_FREE |= {"training.coreset"}


def modules() -> list[tuple[str, Path]]:
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found.append((name, path))
    return [m for m in found if m[0]]


def floor_of(name: str) -> tuple[int, int]:
    for level, names in enumerate(FLOORS):
        if name in names:
            return level, ORDER.get(name, 0)
    package = name.split(".", maxsplit=1)[0] + ".*"
    for level, names in enumerate(FLOORS):
        if package in names:
            return level, ORDER.get(name, 0)
    raise AssertionError(f"landscape.{name} stands on no floor: add it to FLOORS")


def imports_of(path: Path) -> set[str]:
    """Names under landscape that a file imports when it runs (not for type checking alone)."""
    known = {name for name, _ in modules()}
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            return
        if isinstance(node, ast.Import):
            found.update(
                a.name.removeprefix("landscape.") for a in node.names if a.name.startswith("landscape.")
            )
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "landscape":
            base = (node.module or "").removeprefix("landscape").removeprefix(".")
            for alias in node.names:
                full = f"{base}.{alias.name}".removeprefix(".")
                found.add(full if full in known else base)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text()))
    return found - {""}


@pytest.mark.parametrize(("name", "path"), modules(), ids=lambda v: v if isinstance(v, str) else "")
def test_a_file_imports_only_from_lower_floors(name: str, path: Path) -> None:
    own = floor_of(name)
    wrong = {i: floor_of(i) for i in imports_of(path) if floor_of(i) >= own and i != name}
    assert not wrong, f"landscape.{name} (floor {own}) imports {wrong}"


@pytest.mark.parametrize(("name", "path"), modules(), ids=lambda v: v if isinstance(v, str) else "")
def test_only_floors_that_need_torch_import_it(name: str, path: Path) -> None:
    if name in TORCH_FREE or f"{name.split('.', maxsplit=1)[0]}.*" in TORCH_FREE:
        assert not re.search(r"^\s*(import torch\b|from torch\b)", path.read_text(), re.M)


def test_no_reader_of_results_loads_torch() -> None:
    script = "import sys, landscape.results, landscape.plots; print(sorted({'torch', 'xarray'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "command",
    [
        ["ruff", "check", "."],
        ["ruff", "format", "--check", "."],
        ["mypy"],
    ],
    ids=" ".join,
)
def test_tools_are_content(command: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def setup() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def test_every_package_is_installed() -> None:
    listed = set(setup()["options"]["packages"].split())
    there = {
        ".".join(p.parent.relative_to(ROOT).parts)
        for p in PACKAGE.rglob("__init__.py")
        if "__pycache__" not in p.parts
    }
    assert listed == there | {"landscape_cli"}


def test_constraints_pin_every_dependency_exactly() -> None:
    pins = dict(
        line.split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line and line[0] != "#"
    )
    assert pins["torch"] == "2.13.0"
    extras = setup()["options.extras_require"]
    wanted = "\n".join([setup()["options"]["install_requires"], *extras.values()]).split()
    names = {re.split(r"[<>=]", w)[0].lower() for w in wanted}
    assert names <= {p.lower() for p in pins}


def test_no_peer_is_imported() -> None:
    for _, path in modules():
        assert not re.search(
            r"import (pyhessian|curvlinops|hessian_eigenthings|loss_landscapes)", path.read_text()
        )


def test_pyproject_holds_only_what_setup_cfg_cannot() -> None:
    tables = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert set(tables) == {"build-system", "tool"}
    assert set(tables["tool"]) == {"ruff"}
