"""Parts of a job array, and their merge: the bits of one process, and a name for what is missing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jobs
import numpy as np
import pytest
from test_ranks import measured
from test_run import Draws, same

import landscape
from landscape import merging, metrics, parts, results
from landscape.metrics import registry
from landscape.results import Record, Variable


def merged(name: str, out: Path, count: int, **options: Any) -> Any:
    """Run parts, in an order of their own, and merge, as often as a further round is asked for."""
    path = out / f"{name}.h5"
    for _ in range(8):
        for index in (*range(2, count + 1), 1):
            measured(name, out, part=(index, count), **options)
        if not merging.merge(path).further:
            return results.read(path).to_xarray()
    raise AssertionError("eight rounds")


@pytest.mark.parametrize("name", sorted(registry.registered()))
def test_merged_parts_are_the_bits_of_one_process(name: str, tmp_path: Path) -> None:
    alone = measured(name, tmp_path / "one")
    together = merged(name, tmp_path / "parts", 3)
    assert same(alone, together)
    assert together.attrs["complete"]
    assert together.attrs["exit_code"] == alone.attrs["exit_code"]
    assert same(alone, landscape.open(tmp_path / "parts" / f"{name}.h5"))
    assert same(alone, measured(name, tmp_path / "parts"))  # it is complete: nothing is measured again
    assert not list((tmp_path / "parts/.parts").glob("*.h5"))


def part(index: int, count: int, out: Path, **settings: Any) -> Any:
    options = {"part": (index, count), **settings.pop("options", {})}
    return landscape.measure(Draws(rounds=1, **settings), jobs.problem(), out=out, **options)


def test_a_merge_names_what_is_missing_and_changes_nothing(tmp_path: Path) -> None:
    for index in (1, 3):
        part(index, 4, tmp_path)
    before = (tmp_path / "draws.h5").read_bytes()
    with pytest.raises(landscape.Refused, match=r"draw 3-5 \(of 7\) not measured: part 2/4 missing; run it"):
        merging.merge(tmp_path / "draws.h5", Draws)
    assert (tmp_path / "draws.h5").read_bytes() == before
    assert len(parts.paths(tmp_path / "draws.h5")) == 2
    part(2, 4, tmp_path)
    assert merging.merge(tmp_path / "draws.h5", Draws).further == 0
    assert same(landscape.open(tmp_path / "draws.h5"), landscape.measure(Draws(rounds=1), jobs.problem()))


def test_a_merge_without_parts_says_how_to_run_them(tmp_path: Path) -> None:
    part(4, 4, tmp_path)  # there are three blocks
    with pytest.raises(landscape.Refused, match="part 1/4, 2/4, 3/4 missing"):
        merging.merge(tmp_path / "draws.h5", Draws)
    parts.remove(parts.path_of(tmp_path / "draws.h5", 4, 4))
    with pytest.raises(landscape.Refused, match="no part of this round is there; run the parts first"):
        merging.merge(tmp_path / "draws.h5", Draws)
    with pytest.raises(landscape.ResultsError, match="no such file"):
        merging.merge(tmp_path / "absent.h5", Draws)


def test_an_interrupted_part_goes_on(tmp_path: Path) -> None:
    whole = landscape.measure(Draws(rounds=4), jobs.problem())

    def stop(_: object) -> None:
        raise KeyboardInterrupt

    for _ in range(4):
        for index in (1, 2):
            with pytest.raises(KeyboardInterrupt):
                landscape.measure(
                    Draws(rounds=4), jobs.problem(), out=tmp_path, part=(index, 2), progress=stop
                )
        with pytest.raises(landscape.Refused, match=r"part [12]/2 \(not finished\)"):
            merging.merge(tmp_path / "draws.h5", Draws)
        for index in (2, 1):
            landscape.measure(Draws(rounds=4), jobs.problem(), out=tmp_path, part=(index, 2))
        further = merging.merge(tmp_path / "draws.h5", Draws).further
    assert further == 0
    assert same(whole, landscape.open(tmp_path / "draws.h5"))


def test_parts_of_another_measurement_are_refused(tmp_path: Path) -> None:
    part(1, 2, tmp_path)
    for options, named in (({"seed": 1}, "the seed"), ({"memory": 1 << 20}, "the memory")):
        with pytest.raises(landscape.Refused, match=f"holds another measurement; different: {named}"):
            part(2, 2, tmp_path, options=options)
    part(2, 2, tmp_path / "other", options={"seed": 1})
    name = "draws.part-2-of-2.h5"
    (tmp_path / "other/.parts" / name).replace(tmp_path / ".parts" / name)
    with pytest.raises(
        landscape.Refused, match=r"part of another measurement; different: the seed \(0 in the file, 1"
    ):
        merging.merge(tmp_path / "draws.h5", Draws)


def test_a_larger_demand_goes_through_parts_too(tmp_path: Path) -> None:
    settings = {"method": "hutchinson", "rtol": 0.0}
    landscape.measure(metrics.Trace(max_probes=20, **settings), jobs.problem(), out=tmp_path, memory=20_000)
    larger = metrics.Trace(max_probes=64, **settings)
    for _ in range(2):
        for index in (1, 2):
            landscape.measure(larger, jobs.problem(), out=tmp_path, memory=20_000, part=(index, 2))
        done = merging.merge(tmp_path / "trace.h5")
    assert done.further == 0
    serial = landscape.measure(
        metrics.Trace(max_probes=20, **settings), jobs.problem(), out=tmp_path / "s", memory=20_000
    )
    serial = landscape.measure(larger, jobs.problem(), out=tmp_path / "s", memory=20_000)
    assert same(serial, landscape.open(tmp_path / "trace.h5"))
    assert json.loads(done.record.attrs["configuration"])["max_probes"] == 64


def test_one_process_takes_over_what_parts_left(tmp_path: Path) -> None:
    seen: list[int] = []
    part(1, 2, tmp_path)
    ds = landscape.measure(
        Draws(rounds=1), jobs.problem(), out=tmp_path, progress=lambda p: seen.append(p.done)
    )
    assert seen == [7]  # blocks 0-2 and 6 were there
    assert same(ds, landscape.measure(Draws(rounds=1), jobs.problem()))
    assert not parts.paths(tmp_path / "draws.h5")


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    for wrong in ((0, 4), (5, 4), (1, 0)):
        with pytest.raises(ValueError, match=r"part is .*; allowed is i/n"):
            part(*wrong, tmp_path)
    with pytest.raises(ValueError, match="needs a place"):
        landscape.measure(Draws(), jobs.problem(), part=(1, 2))
    with pytest.raises(ValueError, match="undo the other parts"):
        part(1, 2, tmp_path, options={"overwrite": True})
    with pytest.raises(ValueError, match="'units', 'data', 'none'"):
        landscape.measure(Draws(), jobs.problem(), shard="half")  # type: ignore[arg-type]


def test_files_that_are_no_parts_are_refused(tmp_path: Path) -> None:
    part(1, 2, tmp_path)
    part(2, 2, tmp_path)
    place = parts.path_of(tmp_path / "draws.h5", 2, 2)
    found = results.read(place)
    for harm, words in (
        (lambda r: r.attrs.pop("part"), "is no part of a measurement; delete it"),
        (lambda r: r.attrs.pop("configuration"), "is no part of a measurement"),
        (lambda r: r.variables.pop("done"), "is no part of a measurement"),
        (_widened, "draw_value has shape"),
    ):
        wrong = Record(dict(found.variables), dict(found.attrs))
        harm(wrong)
        results.write(place, wrong)
        with pytest.raises(landscape.ResultsError, match=words):
            merging.merge(tmp_path / "draws.h5", Draws)
    results.write(place, found)
    assert merging.merge(tmp_path / "draws.h5", Draws).further == 0


def _widened(record: Record) -> None:
    values = record["draw_value"]
    record.variables["draw_value"] = Variable(("draw", "more"), np.stack([values, values], axis=1))
