"""A page of text without a font: letters of straight strokes, dark on white, as text detectors see.

feed = {"x": lettering.page(320, 320)}      # [1, 3, height, width], normalised as for ImageNet
"""

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

_STROKES = {
    "A": "0 6 2 0 4 6|1 4 3 4", "E": "4 0 0 0 0 6 4 6|0 3 3 3", "F": "4 0 0 0 0 6|0 3 3 3",
    "H": "0 0 0 6|4 0 4 6|0 3 4 3", "I": "2 0 2 6", "K": "0 0 0 6|4 0 0 3 4 6", "L": "0 0 0 6 4 6",
    "M": "0 6 0 0 2 3 4 0 4 6", "N": "0 6 0 0 4 6 4 0", "T": "0 0 4 0|2 0 2 6", "V": "0 0 2 6 4 0",
    "W": "0 0 1 6 2 2 3 6 4 0", "X": "0 0 4 6|4 0 0 6", "Y": "0 0 2 3 4 0|2 3 2 6",
    "Z": "0 0 4 0 0 6 4 6", " ": "",
}  # fmt: skip
"""Corners of each stroke as x and y, on a grid of 4 by 6."""
_LINES = (("THE HIVE", 28), ("MAKE TEN", 20), ("AN EXIT", 34), ("WALK A MILE", 24))
"""Words and their height in pixels."""
_WHITE, _INK, _LEFT = 1.0, 0.9, 16
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

Image = NDArray[np.float64]


def page(height: int, width: int) -> NDArray[np.float32]:
    """Four lines of words, cut off at the border."""
    ink, top = np.zeros((height, width)), _LEFT
    for text, size in _LINES:
        line = np.hstack([_letter(mark, size) for mark in text])[: height - top, : width - _LEFT]
        ink[top : top + len(line), _LEFT : _LEFT + line.shape[1]] = line
        top += 2 * size
    grey = _WHITE - _INK * ink
    colours = [(grey - mean) / std for mean, std in zip(_MEAN, _STD)]
    return np.stack(colours)[None].astype(np.float32)


def _letter(mark: str, size: int) -> Image:
    """How black each pixel is, by its distance from the strokes."""
    step = size / 6
    y, x = np.mgrid[: size + 4, : int(5.5 * step) + 2].astype(np.float64)
    distance = np.full(x.shape, np.inf)
    for stroke in filter(None, _STROKES[mark].split("|")):
        corners = np.array(stroke.split(), np.float64).reshape(-1, 2) * step + 2
        for a, b in pairwise(corners):
            distance = np.minimum(distance, _from_stroke(x, y, a, b))
    return np.clip(size / 14 + 0.5 - distance, 0, 1)


def _from_stroke(x: Image, y: Image, a: Image, b: Image) -> Image:
    along = ((x - a[0]) * (b - a)[0] + (y - a[1]) * (b - a)[1]) / ((b - a) ** 2).sum()
    nearest = a[:, None, None] + np.clip(along, 0, 1) * (b - a)[:, None, None]
    return np.asarray(np.hypot(x - nearest[0], y - nearest[1]))
