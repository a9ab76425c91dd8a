"""How long work tells how far it is."""

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called with the stage, the steps done and the steps in all."""


def silent(stage: str, done: int, total: int) -> None:
    """Progress of a caller that asked for none."""
