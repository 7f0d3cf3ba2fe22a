"""Where an error came from: the user's own code, or ours."""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from landscape.ranks import Team


def cause(error: BaseException) -> str:
    """Return what went wrong in the user's code and where, in one line."""
    text = " ".join(str(error).split())
    text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if is_users(frame.filename)]
    if isinstance(error, SyntaxError) and error.filename:
        return f"{text[:300]} ({Path(error.filename).name}, line {error.lineno})"
    return (
        f"{text[:300]} ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else text[:300]
    )


def is_users(filename: str) -> bool:
    """Return whether a source file is the user's own: not ours, not installed, not Python's."""
    if filename.startswith("<"):
        return False
    path = Path(filename).resolve()
    ours = [Path(__file__).resolve().parent]
    ours += [Path(folder).resolve() for folder in getattr(sys.modules.get("landscape"), "__path__", [])]
    library = Path(os.__file__).resolve().parent
    installed = {"site-packages", "dist-packages"} & set(path.parts)
    return not installed and not any(path.is_relative_to(folder) for folder in [*ours, library])


def team() -> Team | None:
    """Return the ranks that this process measured with, None where it was alone."""
    ranks = sys.modules.get("landscape.ranks")  # not loaded where nothing was measured
    found: Team | None = ranks.current() if ranks is not None else None
    return found
