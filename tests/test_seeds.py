from __future__ import annotations

import pytest
import torch

from landscape import seeds


def first(seed: int, name: str, index: int) -> int:
    return int(torch.randint(2**62, (), generator=seeds.generator(seed, name, index)))


def test_streams_of_one_measurement_are_all_distinct() -> None:
    # 40 000 seeds hashed to 32 bits would collide with probability 17 %; the bijection never does.
    seen = {seeds.generator(7, "trace", i).initial_seed() for i in range(40_000)}
    assert len(seen) == 40_000
    assert max(seen) < 2**32


def test_neighbouring_seeds_share_no_stream() -> None:
    # A tool that seeds its replicates s, s+1, ... has run k of seed s equal to run k-1 of seed s+1.
    a = [first(0, "trace", i) for i in range(200)]
    b = [first(1, "trace", i) for i in range(200)]
    assert not set(a) & set(b)


def test_names_and_units_matter_and_repeat() -> None:
    assert first(0, "trace", 0) == first(0, "trace", 0)
    assert (
        len({first(0, "trace", 0), first(0, "density", 0), first(0, "trace", 1), first(-1, "trace", 0)}) == 4
    )


def test_streams_are_uncorrelated() -> None:
    signs = torch.stack([torch.randn(4000, generator=seeds.generator(0, "x", i)) for i in range(50)])
    correlation = torch.corrcoef(signs) - torch.eye(50)
    # 1225 pairs, each N(0, 1/4000): a maximum above 5.5 sd has probability below 1e-4.
    assert correlation.abs().max() < 5.5 / 4000**0.5


def test_an_index_out_of_range_is_named() -> None:
    with pytest.raises(ValueError, match="unit index -1 is out of range"):
        seeds.generator(0, "trace", -1)
