"""How much each weight of a PyTorch module contributes to its outputs: layer-wise relevance.

What explains the output is handed back layer by layer in proportion to what each product added
(epsilon rule: Bach et al. 2015, doi 10.1371/journal.pone.0130140; for pruning: Yeom et al. 2021,
arXiv:1912.08881). Activations pass it on whole, norms are linear with a fixed scale, products of
two activations get half each (AttnLRP: Achtibat et al. 2024, arXiv:2402.05602). Every rule changes
the gradient alone, so that relevance is value times gradient and autograd does the walk. Biases
keep their part; other functions follow their gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any

import numpy as np

from sparsegraph.errors import UsageError, message
from sparsegraph.gradients import Gradient

Array = np.ndarray[Any, Any]
Explain = Callable[[Any, int], Any]
Rule = Callable[..., Any]

EPSILON = 1e-2
"""Over the root mean square of a product's outputs: small sums of large parts say little."""


def of_module(
    module: Any,
    inputs: Iterable[tuple[Any, ...]],
    explain: Explain | None = None,
    *,
    epsilon: float = EPSILON,
) -> dict[str, Gradient]:
    """Mean absolute relevance by parameter name over the items of `inputs`.

    `explain(output, i)` gives the scalar for item `i` that is handed back; without one it is the
    sum of squares of the outputs, of which each starts with its share. The module must be in the
    mode in which it is used; it is left so. Raises UsageError without inputs.
    """
    import torch

    named = {name: p for name, p in module.named_parameters() if p.requires_grad}
    total = {name: np.zeros(p.shape) for name, p in named.items()}
    n = 0
    for i, item in enumerate(inputs):
        with _rules(epsilon):
            output = module(*item)
            scalar = _energy(output) if explain is None else explain(output, i)
        found = torch.autograd.grad(scalar, list(named.values()), allow_unused=True)
        for (name, parameter), gradient in zip(named.items(), found):
            if gradient is not None:
                share = (parameter * gradient).detach().cpu().numpy()
                total[name] += np.abs(share.astype(np.float64))
        n += 1
    if n == 0:
        raise UsageError(message("relevance", "inputs", "none", "at least one", "pass inputs"))
    return {
        name: Gradient(
            square=None, relevance=total[name] / n, parameter=p.detach().cpu().numpy()
        )
        for name, p in named.items()
    }  # fmt: skip


def _energy(output: Any) -> Any:
    parts = output if isinstance(output, tuple | list) else (output,)
    if isinstance(output, Mapping):
        parts = tuple(output.values())
    return sum((p * p.detach()).sum() for p in parts if p.is_floating_point())


def _rules(epsilon: float) -> Any:
    """A mode in which torch functions keep their values and get the gradients of the rules."""
    from torch.overrides import TorchFunctionMode

    class Rules(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            rule = _table().get(func)
            kwargs = kwargs or {}
            if rule is None:
                return func(*args, **kwargs)
            return rule(func, epsilon, *args, **kwargs)

    return Rules()


@cache
def _table() -> dict[Any, Rule]:
    """Rule by torch function, for every name under which a function goes."""
    import torch
    import torch.nn.functional as F

    tensor = torch.Tensor
    rules: dict[Any, Rule] = {F.layer_norm: _layer_norm, torch.layer_norm: _layer_norm}
    for func in (F.linear, torch.conv1d, torch.conv2d, torch.conv3d):
        rules[func] = _product
    for name in ("relu", "tanh", "sigmoid", "relu_", "tanh_", "sigmoid_"):
        rules[getattr(torch, name)] = rules[getattr(tensor, name)] = _activation
    for name in (
        "relu", "relu6", "gelu", "silu", "hardswish", "hardtanh", "leaky_relu", "elu", "mish",
        "tanh", "sigmoid",
    ):  # fmt: skip
        rules[getattr(F, name)] = _activation
    products = (torch.matmul, tensor.matmul, tensor.__matmul__, torch.bmm, tensor.bmm)
    rules |= dict.fromkeys((*products, torch.mul, tensor.mul, tensor.__mul__), _pair)
    return rules | dict.fromkeys((torch.div, tensor.div, tensor.__truediv__), _quotient)


def _product(func: Any, epsilon: float, *args: Any, **kwargs: Any) -> Any:
    """Shares of z in proportion to the parts that add up to it, over z + epsilon in its sign."""
    z = func(*args, **kwargs)
    return _stabilised(z, epsilon)


def _stabilised(z: Any, epsilon: float) -> Any:
    held = z.detach()
    least = epsilon * held.square().mean().sqrt()
    ratio = held.abs() / (held.abs() + least).clamp(min=1e-30)
    return z * ratio + held * (1 - ratio)


def _activation(func: Any, epsilon: float, x: Any, *args: Any, **kwargs: Any) -> Any:
    """All relevance of the output goes to the input, where there is any to carry it."""
    held = x.detach()
    y = func(held.clone(), *args, **kwargs)
    slope = y / held.masked_fill(held == 0, 1)
    return x * slope.masked_fill(held == 0, 0) + y.masked_fill(held != 0, 0)


def _layer_norm(
    func: Any, epsilon: float, x: Any, shape: Any, weight: Any = None, bias: Any = None,
    eps: float = 1e-5, *rest: Any,
) -> Any:  # fmt: skip
    """Linear in x: the scale is what it is for these values."""
    axes = tuple(range(-len(shape), 0))
    centred = x - x.mean(dim=axes, keepdim=True)
    scale = centred.detach().square().mean(dim=axes, keepdim=True).add(eps).sqrt()
    y = centred / scale
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def _pair(func: Any, epsilon: float, a: Any, b: Any, **kwargs: Any) -> Any:
    """A product of two activations: half for each. A weight's product is stabilised instead."""
    import torch

    tensors = [x for x in (a, b) if isinstance(x, torch.Tensor)]
    if len(tensors) < 2 or not all(x.requires_grad for x in tensors):
        return func(a, b, **kwargs)
    if any(x.is_leaf for x in tensors):
        z = func(a, b, **kwargs)
        return z if func in _multiplications() else _stabilised(z, epsilon)
    return 0.5 * (func(a, b.detach(), **kwargs) + func(a.detach(), b, **kwargs))


def _multiplications() -> tuple[Any, ...]:
    import torch

    return torch.mul, torch.Tensor.mul, torch.Tensor.__mul__


def _quotient(func: Any, epsilon: float, a: Any, b: Any, **kwargs: Any) -> Any:
    """Linear in what is divided."""
    import torch

    held = b.detach() if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else b
    return func(a, held, **kwargs)
