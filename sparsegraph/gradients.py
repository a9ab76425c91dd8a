"""Gradients of a PyTorch module's parameters over calibration data, for `taylor` and `fisher`.

The only pruning code that needs torch; where there is no module, `sparsegraph.probe` estimates from
runs alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from sparsegraph.errors import UsageError, message

Array = np.ndarray[Any, Any]
Loss = Callable[[Any, int], Any]

_SEED = 0


@dataclass(frozen=True)
class Gradient:
    """Of one parameter, in its shape: `square` is the mean over calls of the squared gradient, of a
    loss if `of_loss`. `relevance` is that of `sparsegraph.relevance`. `parameter` itself tells
    which way a square weight lies in a model that may have turned it."""

    square: Array | None
    of_loss: bool = False
    parameter: Array | None = None
    relevance: Array | None = None


def of_module(
    module: Any, inputs: Iterable[tuple[Any, ...]], loss: Loss | None = None
) -> dict[str, Gradient]:
    """Gradients by parameter name, from one backward pass per item of `inputs`.

    `loss(output, i)` gives the scalar for item `i`, one minibatch. Without one, the outputs are
    summed with random signs: the mean square is then the diagonal of J^T J, how far a weight moves
    the outputs (Hutchinson's estimate; no labels needed). The module's mode is left as it is.
    Raises UsageError without inputs.
    """
    import torch

    named = {name: p for name, p in module.named_parameters() if p.requires_grad}
    square = {name: np.zeros(p.shape) for name, p in named.items()}
    generator, n = torch.Generator().manual_seed(_SEED), 0
    for i, item in enumerate(inputs):
        output = module(*item)
        scalar = _signed_sum(output, generator) if loss is None else loss(output, i)
        found = torch.autograd.grad(scalar, list(named.values()), allow_unused=True)
        for name, gradient in zip(named, found):
            if gradient is not None:
                square[name] += np.square(gradient.detach().cpu().numpy().astype(np.float64))
        n += 1
    if n == 0:
        raise UsageError(message("gradients", "inputs", "none", "at least one", "pass inputs"))
    return {
        name: Gradient(square[name] / n, loss is not None, parameter.detach().cpu().numpy())
        for name, parameter in named.items()
    }


def _signed_sum(output: Any, generator: Any) -> Any:
    import torch

    parts = output if isinstance(output, tuple | list) else (output,)
    if isinstance(output, Mapping):
        parts = tuple(output.values())
    floats = [p for p in parts if isinstance(p, torch.Tensor) and p.is_floating_point()]
    signs = [torch.randint(0, 2, p.shape, generator=generator) * 2 - 1 for p in floats]
    return sum((p * s).sum() for p, s in zip(floats, signs))
