"""How large the files of results may be: what the reader refuses, the writer must not write."""

from __future__ import annotations

FILE_LIMIT = 1 << 30  # bytes of a file
ATTRIBUTE_LIMIT = 1 << 24  # bytes of one attribute
ATTRIBUTES_LIMIT = 1 << 25  # bytes of all attributes together
ENTRIES_LIMIT = 1000  # entries of an attribute; ours have one
COUNT_LIMIT = 500  # names in the file; attributes of one object
RANK_LIMIT = 16  # axes of an array
