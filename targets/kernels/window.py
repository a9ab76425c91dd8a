"""What kernels of windows share: the window, and the operands of their epilogues."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Window:
    """What of a window changes the code.

    Attributes:
        kernel, stride, dilation: (vertical, horizontal).
        rows: output rows computed together.
        lanes: float32 values in a vector.
    """

    kernel: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    rows: int
    lanes: int

    @property
    def name(self) -> str:
        pairs = zip("ksd", (self.kernel, self.stride, self.dilation))
        return "_".join(f"{k}{a}x{b}" for k, (a, b) in pairs) + f"_r{self.rows}_l{self.lanes}"


def operand_params(kinds: Sequence[str]) -> str:
    """Signature text of the operands of an epilogue: `feature` [channels] or `same` (strides)."""
    strides = "o{0}_image:int32 o{0}_tile:int32 o{0}_row:int32 "
    return "".join(
        f"o{i}:float32* " + (strides.format(i) if kind == "same" else "")
        for i, kind in enumerate(kinds)
    )
