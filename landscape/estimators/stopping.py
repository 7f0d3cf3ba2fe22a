"""At which numbers of probes a tolerance is tested: few, fixed, and never far apart."""

from __future__ import annotations

import itertools


def stopping_counts(first: int, most: int) -> list[int]:
    """Return first, 2, 3, 4, 6, 8, 12, 16, ... times `first` as far as they are below `most`, then `most`.

    They are fixed, so that a result does not depend on where an earlier run ended. Neighbours differ by a
    third or a half: doubling would make a third more probes than are needed, and twice as many at worst. A
    test at every count would stop too often at an error that came out small by chance.

    >>> stopping_counts(16, 100)
    [16, 32, 48, 64, 96, 100]
    """
    powers = (first << i for i in itertools.count())
    counts = itertools.chain([first], itertools.chain.from_iterable((2 * p, 3 * p) for p in powers))
    return [*itertools.takewhile(lambda count: count < most, counts), most]
