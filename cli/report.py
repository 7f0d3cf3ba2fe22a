"""Results as text and as JSON, from a Record or an `xarray.Dataset` alike; needs no torch."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from landscape.plots import plus_minus

_MOST_ENTRIES = 20  # a headline with more entries than this is a picture, not a list
_MOST_IN_JSON = 10_000


@dataclass(frozen=True)
class Estimate:
    """One number, and its standard error or the residual of its eigenpair (None where it has none)."""

    name: str
    value: float
    stderr: float | None
    residual: float | None = None

    @property
    def text(self) -> str:
        """The number with as many digits as its error allows."""
        # a plain minus, so that the number can be copied into a program
        text = plus_minus(self.value, self.stderr).replace("−", "-")
        return f"{text} (exact)" if self.stderr == 0 else text

    @property
    def relative(self) -> str:
        """The error in per cent of the value; a residual as the bound that it is; empty where there is none."""
        if self.residual is not None and self.value:
            return f"<= {100 * abs(self.residual / self.value):.2g} %"
        if not self.stderr or not self.value or not math.isfinite(self.stderr / self.value):
            return ""
        return f"{100 * abs(self.stderr / self.value):.2g} %"


@dataclass(frozen=True)
class Summary:
    """What there is to say about one measurement in a line or two."""

    metric: str
    estimates: list[Estimate]
    converged: bool | None
    matvecs: int | None
    seconds: float | None
    path: Path | None


def summarize(result: Any, path: Path | None = None) -> Summary:
    """Return the headline, the other estimates, and the cost of a measurement.

    Args:
        result: a `landscape.results.Record` or an `xarray.Dataset`.
        path: its file.
    """
    metric = str(result.attrs.get("metric", path.stem if path else "?"))
    headline = str(result.attrs.get("headline", metric))
    found = _entries(result, headline)
    for name in result.variables:
        told = any(f"{name}_{error}" in result for error in ("stderr", "residual_norm"))
        named = name in result.attrs.get("told", [])
        if named and result[name].ndim == 1:
            found += _entries(result, name)
        elif (
            (told or named)
            and result[name].ndim == 0
            and name != headline
            and math.isfinite(float(result[name]))
        ):
            found.append(_scalar(result, name))
    return Summary(metric, found, _converged(result), _whole(lookup(result, "matvecs")),
                   _real(lookup(result, "wall_seconds")), path)  # fmt: skip


def lookup(result: Any, name: str) -> Any:
    """Return a variable or an attribute of a measurement as a plain value, None where there is neither."""
    if name not in result:
        return result.attrs.get(name)
    return _list(result[name])


def table(rows: Iterable[Summary]) -> str:
    """Return the results of a run, one line for each estimate; the headline stands first."""
    lines: list[tuple[str, ...]] = [
        ("measure", "estimate", "error", "converged", "products", "seconds", "file")
    ]
    for row in rows:
        for index, estimate in enumerate(row.estimates):
            once = index == 0
            lines.append((
                estimate.name if once else f"  {estimate.name}",
                estimate.text,
                estimate.relative,
                {True: "yes", False: "NO", None: ""}[row.converged] if once else "",
                "" if row.matvecs is None or not once else str(row.matvecs),
                "" if row.seconds is None or not once else f"{row.seconds:.1f}",
                "" if row.path is None or not once else str(row.path),
            ))  # fmt: skip
    return aligned(lines)


def aligned(lines: list[tuple[str, ...]]) -> str:
    """Return rows of cells as text with straight columns."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def as_json(result: Any, path: Path | None = None) -> dict[str, Any]:
    """Return a measurement as plain values: estimates, attributes, variables.

    Of what was measured unit by unit, and of large arrays, only the shape is told; the file has the numbers.
    """
    summary = summarize(result, path)
    variables: dict[str, Any] = {}
    for name in result.variables:
        data = result[name]
        data = getattr(data, "values", data)
        dims = getattr(result.variables[name], "dims", ())
        units = result.attrs.get("unit") in dims and name not in {
            result.attrs.get("headline"),
            "residual_norm",
        }
        small = data.size <= _MOST_IN_JSON and not units
        variables[name] = {"dims": list(dims), "shape": list(data.shape)} | (
            {"data": data.tolist()} if small else {}
        )
    content = {
        "file": None if path is None else str(path),
        "metric": summary.metric,
        "estimates": {e.name: _in_json(e) for e in summary.estimates},
        "converged": summary.converged,
        "matvecs": summary.matvecs,
        "seconds": summary.seconds,
        "attributes": {name: _decoded(value) for name, value in result.attrs.items()},
        "variables": variables,
    }
    cleaned: dict[str, Any] = _plain(content)
    return cleaned


def _in_json(estimate: Estimate) -> dict[str, Any]:
    residual = {} if estimate.residual is None else {"residual_norm": estimate.residual}
    return {"value": estimate.value, "stderr": estimate.stderr, **residual}


def dump(content: Any) -> str:
    """Return JSON that any reader takes: NaN is null, the infinities are texts."""
    return json.dumps(_plain(content), indent=2, ensure_ascii=False, allow_nan=False)


def _decoded(value: Any) -> Any:
    """Return what an attribute that holds JSON stands for."""
    if isinstance(value, str) and value.startswith("{"):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


def _entries(result: Any, headline: str) -> list[Estimate]:
    """Return the headline's numbers: one, or one for each entry of its only axis."""
    if headline not in result:
        return []
    values = result[headline]
    if values.ndim == 0:
        return [_scalar(result, headline)]
    if values.ndim > 1 or values.size > _MOST_ENTRIES:
        return []
    dim = result.variables[headline].dims[0]
    labels = _list(result[dim]) if dim in result else list(range(values.size))
    none = [None] * values.size
    errors = _list(result[f"{headline}_stderr"]) if f"{headline}_stderr" in result else none
    residuals = _list(result["residual_norm"]) if "residual_norm" in result else none
    return [
        Estimate(
            f"{headline}({dim}={f'{label:g}' if isinstance(label, float) else label})",
            float(value), error, residual,
        )
        for label, value, error, residual in zip(labels, _list(values), errors, residuals, strict=True)
    ]  # fmt: skip


def _scalar(result: Any, name: str) -> Estimate:
    error = float(result[f"{name}_stderr"]) if f"{name}_stderr" in result else None
    own = f"{name}_residual_norm"
    own = own if own in result or name != result.attrs.get("headline") else "residual_norm"
    return Estimate(name, float(result[name]), error, float(result[own]) if own in result else None)


def _converged(result: Any) -> bool | None:
    if "converged" not in result:
        return None
    return bool(result["converged"].all())


def _list(array: Any) -> Any:
    """Return numpy's or xarray's array as plain values."""
    return getattr(array, "values", array).tolist()


def _whole(value: Any) -> int | None:
    return int(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _real(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value if isinstance(value, str | int | float | bool) or value is None else str(value)
