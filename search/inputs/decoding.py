"""Decoding token by token with a cache of keys and values, many sequences at once.

Three parts of what transformers runs are slow on a CPU and are replaced. Weights are prepacked. Attention of one query
to the cached keys runs as matrix products over the query heads that share a key head (grouped-query attention, Ainslie
et al. 2305.13245) instead of torch's kernel for many queries. The cache is allocated once instead of copied for every
token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from rankfront.methods.prepacked import prepacked
from rankfront.objectives._caches import cache_of


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """Softmax attention softmax(scale · q kᵀ + mask) v of one query per head; the softmax is taken in fp32.

    Shapes: ``query`` (B, H, 1, d), ``key`` (B, G, T, d), ``value`` (B, G, T, e), G a divisor of H, ``mask`` additive or
    boolean (true: seen) and broadcast to (B, H, 1, T) -> (B, H, 1, e). ``scale`` is 1/√d where it is None.
    """
    batch, heads, _, width = query.shape
    grouped = query.reshape(batch, key.shape[1], -1, width)  # (B, G, H/G, d)
    scores = torch.matmul(grouped, key.transpose(-1, -2)).float() * (width**-0.5 if scale is None else scale)
    if mask is not None:
        wide = scores.view(batch, heads, 1, -1)
        wide = wide.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else wide + mask
        scores = wide.view(scores.shape)
    return torch.matmul(scores.softmax(-1).to(value.dtype), value).view(batch, heads, 1, -1)


class _OneQuery(TorchFunctionMode):
    """Within, torch's attention on the CPU is `attend` where there is one query per head."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is scaled_dot_product_attention and self._fits(*args, **kwargs):
            query, key, value = args
            return attend(query, key, value, kwargs.get("attn_mask"), kwargs.get("scale"))
        return func(*args, **kwargs)

    @staticmethod
    def _fits(query: Tensor, *rest: Tensor, dropout_p: float = 0.0, is_causal: bool = False, **_: Any) -> bool:
        one = query.dim() == 4 and query.shape[2] == 1 and query.device.type == "cpu"
        return one and len(rest) == 2 and not dropout_p and not is_causal


class _Allocated(DynamicLayer):
    """A layer of the cache with room for ``length`` positions, which starts with what ``layer`` holds."""

    def __init__(self, layer: DynamicLayer, length: int) -> None:
        super().__init__()
        self.lazy_initialization(layer.keys, layer.values)
        self.room = [each.new_empty(*each.shape[:2], length, each.shape[3]) for each in (layer.keys, layer.values)]
        self.update(layer.keys, layer.values)

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        start = self.get_seq_length()
        for room, new in zip(self.room, (key_states, value_states), strict=True):
            room[:, :, start : start + new.shape[2]] = new
        self.keys, self.values = (room[:, :, : start + key_states.shape[2]] for room in self.room)
        return self.keys, self.values


@contextmanager
def decoder(model: Any, length: int) -> Iterator[Callable[[Tensor], Tensor]]:
    """A function of the next token ids (B, 1) that gives the logits (B, V) after them, for up to ``length`` tokens.

    Models without a cache read all of them again for every token.
    """
    cache: dict[str, Any] = {}
    seen: list[Tensor] = []

    def step(ids: Tensor) -> Tensor:
        nonlocal cache
        seen[:] = [ids] if cache else [*seen, ids]
        out = model(input_ids=torch.cat(seen, dim=1), use_cache=True, **cache)
        before, cache = cache, cache_of(out)
        grown = cache.get("past_key_values")
        if not before and isinstance(grown, DynamicCache):
            grown.layers[:] = [
                _Allocated(each, length) if type(each) is DynamicLayer and each.keys is not None else each
                for each in grown.layers
            ]
        logits: Tensor = out.logits[:, -1]
        return logits

    with prepacked(model), _OneQuery():
        yield step


def cache_bytes(model: Any) -> int:
    """Bytes of keys and values of one position, as the configuration has them; 0 where it does not say."""
    config = model.config.get_text_config(decoder=True)
    heads = getattr(config, "num_attention_heads", 0)
    shared = getattr(config, "num_key_value_heads", None) or heads
    width = getattr(config, "head_dim", None) or config.hidden_size // max(heads, 1)
    return int(2 * config.num_hidden_layers * shared * width * model.dtype.itemsize)
