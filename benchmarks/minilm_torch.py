"""MiniLM as a PyTorch module, for the criteria that need gradients; see `sparsegraph.minilm`.

The loss of a batch of pairs is the cross entropy of finding each text by its first sentence; what
relevance explains is the similarity of the two.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from sparsegraph import relevance
from sparsegraph.gradients import Gradient, of_module

Array = np.ndarray[Any, Any]
Feed = Mapping[str, Array]

_HEADS, _EPSILON, _MASKED = 12, 1e-12, -10000.0
_BATCH = 8  # pairs
_SHARPNESS = 20.0  # of the softmax over similarities, as sentence encoders are trained


class Encoder(nn.Module):
    """`forward(ids, mask)` gives unit embeddings; parameters carry the checkpoint's names."""

    def __init__(self, weights: Mapping[str, Array]) -> None:
        super().__init__()
        for name, array in weights.items():
            *path, last = name.split(".")
            home: nn.Module = self
            for part in path:
                if part not in home._modules:
                    home.add_module(part, nn.Module())
                home = home.get_submodule(part)
            home.register_parameter(last, nn.Parameter(torch.tensor(np.array(array))))

    def forward(self, ids: Any, mask: Any) -> Any:
        """int64 [batch, tokens] twice -> [batch, features]."""
        w = dict(self.named_parameters())
        x = w["embeddings.word_embeddings.weight"][ids]
        x = x + w["embeddings.token_type_embeddings.weight"][0]
        x = x + w["embeddings.position_embeddings.weight"][: ids.shape[1]]
        x = _norm(w, "embeddings.LayerNorm", x)
        off = (1.0 - mask[:, None, None, :].float()) * _MASKED
        n_layers = sum(name.endswith("attention.self.query.weight") for name in w)
        for i in range(n_layers):
            scope = f"encoder.layer.{i}"
            x = _norm(w, f"{scope}.attention.output.LayerNorm", _attention(w, scope, x, off) + x)
            hidden = F.gelu(_linear(w, f"{scope}.intermediate.dense", x))
            x = _norm(
                w, f"{scope}.output.LayerNorm", _linear(w, f"{scope}.output.dense", hidden) + x
            )
        kept = mask[:, :, None].float()
        mean = (x * kept).sum(dim=1) / kept.sum(dim=1)
        return mean / mean.norm(dim=1, keepdim=True)


def _linear(w: Mapping[str, Any], scope: str, x: Any) -> Any:
    return F.linear(x, w[f"{scope}.weight"], w[f"{scope}.bias"])


def _norm(w: Mapping[str, Any], scope: str, x: Any) -> Any:
    return F.layer_norm(x, x.shape[-1:], w[f"{scope}.weight"], w[f"{scope}.bias"], _EPSILON)


def _attention(w: Mapping[str, Any], scope: str, x: Any, off: Any) -> Any:
    batch, tokens, features = x.shape
    heads = {}
    for part in ("query", "key", "value"):
        flat = _linear(w, f"{scope}.attention.self.{part}", x)
        heads[part] = flat.view(batch, tokens, _HEADS, features // _HEADS).transpose(1, 2)
    scores = heads["query"] @ heads["key"].transpose(2, 3) / (features // _HEADS) ** 0.5
    context = torch.softmax(scores + off, dim=-1) @ heads["value"]
    joined = context.transpose(1, 2).reshape(batch, tokens, features)
    return _linear(w, f"{scope}.attention.output.dense", joined)


def gradients(
    method: str, weights: Mapping[str, Array], queries: Sequence[Feed], documents: Sequence[Feed]
) -> dict[str, Gradient]:
    """What `method` (taylor, fisher, relevance) needs, by parameter name, from pairs of texts."""
    module = Encoder(weights).eval()
    items = [
        (_Side.of(queries[i : i + _BATCH]), _Side.of(documents[i : i + _BATCH]))
        for i in range(0, len(queries), _BATCH)
    ]
    job = _Pairs(module)
    if method == "relevance":
        return relevance.of_module(job, items, lambda y, i: torch.trace(y))
    return of_module(job, items, lambda y, i: _loss(y))


def _loss(similarity: Any) -> Any:
    return F.cross_entropy(_SHARPNESS * similarity, torch.arange(len(similarity)))


class _Side(tuple[Any, Any]):
    """(ids, mask) of some texts, cut to the longest."""

    @staticmethod
    def of(feeds: Sequence[Feed]) -> _Side:
        ids, mask = (
            torch.tensor(np.concatenate([feed[name] for feed in feeds]))
            for name in ("input_ids", "attention_mask")
        )
        longest = int(mask.sum(dim=1).max())
        return _Side((ids[:, :longest], mask[:, :longest]))


class _Pairs(nn.Module):
    """Similarities [queries, documents]; its parameters are the encoder's, by the same names."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self._encoder = [encoder]  # in a list: its names get no prefix

    def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
        return self._encoder[0].named_parameters(*args, **kwargs)

    def forward(self, queries: _Side, documents: _Side) -> Any:
        encoder = self._encoder[0]
        return encoder(*queries) @ encoder(*documents).T
