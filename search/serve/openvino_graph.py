"""``openvino``: the graph of a decoder with its cache as state, which OpenVINO runs, and its tokenizer beside.

Low ranks stay two products, narrow MLPs stay narrow, thin heads stay thin: in the products, in attention and in the
cache. What was left out is not in the graph. Every other layer is the dense weight that it stands for.

Values have one width in all layers, that of the widest: openvino_genai 2026.4 allots its cache by one, and with several
says something else than the graph does. Keys have that of their layer.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from rankfront.methods import InputError
from rankfront.methods.dense import put_dense
from rankfront.methods.integer_matrix import FactorModule
from rankfront.methods.layers_joint import CACHED, AbsentLinear, FromHeadsLinear, HeadsLinear, PlainLinear
from rankfront.methods.layers_low_rank import LowRankEmbedding, LowRankLinear
from rankfront.methods.unfused import fuse, unfused_in
from rankfront.search.errors import ExportError
from rankfront.search.inputs.model import count_parameters
from rankfront.search.serve.llama_like import check_graph
from rankfront.search.serve.structure import ATTENTION, Structure

FILE, TOKENIZER, DETOKENIZER = "openvino_model.xml", "openvino_tokenizer.xml", "openvino_detokenizer.xml"
KEPT = (LowRankLinear, LowRankEmbedding, PlainLinear, HeadsLinear, FromHeadsLinear, AbsentLinear)  # as they run here
EXAMPLE = (2, 3, 2)  # sequences, tokens that are cached, new ones: more than one of each, or they are taken for fixed
INPUTS = ("input_ids", "attention_mask", "position_ids", "beam_idx")
THIN = "rankfront_thin"  # attention as transformers calls it while the graph is read
Shapes = Mapping[int, tuple[tuple[int, int], tuple[int, int]]]  # layer -> (heads, width) of its keys and values


def available() -> bool:
    """Whether OpenVINO, and what converts tokenizers to it, are installed."""
    return all(importlib.util.find_spec(name) is not None for name in ("openvino", "openvino_tokenizers"))


def write_openvino(structure: Structure, folder: Path, tokenizer: Any) -> int:
    """Write ``structure`` and its ``tokenizer`` to ``folder``, in 16 bits where it runs in as many; how many values it
    stores.

    Raises `InputError` where OpenVINO is not installed, or the model or its tokenizer have no form there; `ExportError`
    where it cannot read the model.
    """
    if not available():
        raise InputError("--format openvino is written by OpenVINO itself: pip install 'rankfront[openvino]'")
    check_graph(structure.config)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the trace: what it takes for fixed is the same at every length
        prepared = _prepared(structure)
        shapes = _cache_shapes(prepared)
        graph = _graph(prepared, shapes)
    _save_tokenizer(tokenizer, folder)
    openvino = importlib.import_module("openvino")
    openvino.save_model(graph, folder / FILE, compress_to_fp16=structure.dtype != torch.float32)
    structure.config.save_pretrained(folder)
    structure.model.generation_config.save_pretrained(folder)
    return count_parameters(prepared)


# -- the model to read the graph of


def _prepared(structure: Structure) -> Any:
    """A copy of the model, in fp32, with what has no form of its own multiplied out."""
    model = copy.deepcopy(structure.model).float().eval()
    factored = {path: module for path, module in model.named_modules() if hasattr(module, "full_bias")}
    apart = tuple(f"{path}." for path in unfused_in(model))  # what runs depends on the tokens there: nothing to trace
    others = [path for path, module in factored.items() if not isinstance(module, KEPT) or path.startswith(apart)]
    put_dense(model, copy.deepcopy(structure.skeleton), others, torch.float32)
    fuse(model)
    for module in factored.values():
        if isinstance(module, FactorModule):
            module.make_full()
        if isinstance(module, LowRankLinear):
            module.joined = None
    for site in structure.sites:
        last = model.get_submodule(site.anchor.path)
        if isinstance(last, AbsentLinear):  # added to the residual stream, whatever came before it
            _let(last, partial(_zeros, last.rows))
            if site.roles == ATTENTION:
                model.get_submodule(site.anchor.path.rpartition(".")[0]).left_out = True
    widest = max((values for _, (_, values) in _cache_shapes(model).values()), default=0)
    for attention in list(model.modules()):
        if any(isinstance(child, HeadsLinear) and child.cached for child in attention.children()):
            _thin(attention, widest)
    model.config._attn_implementation = THIN
    return model


def _thin(attention: nn.Module, width: int) -> None:
    """Let an attention read its cache as it is stored: queries meet thin keys, values and what they add up to have
    ``width`` dimensions a head."""
    for child in attention.children():
        if isinstance(child, HeadsLinear) and child.cached == CACHED["key"]:
            child.widened = _same  # type: ignore[method-assign]
        if isinstance(child, HeadsLinear) and child.cached == CACHED["value"]:
            child.thinned = partial(_first, width)  # type: ignore[method-assign]
            child.widened = _same  # type: ignore[method-assign]
            for reader in attention.children():
                if isinstance(reader, FromHeadsLinear):
                    reader.width = width


def _let(module: nn.Module, forward: Callable[[Tensor], Tensor]) -> None:
    """Let a module of a copy run as something else."""
    module.forward = forward  # type: ignore[method-assign]


def _first(width: int, states: Tensor) -> Tensor:
    return states[..., :width]


def _same(states: Tensor) -> Tensor:
    return states


def _zeros(rows: int, x: Tensor) -> Tensor:
    return torch.zeros(rows)


def _attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **named: Any) -> Any:
    """Attention of queries (batch, heads, tokens, width) on keys that may be thin, which queries then are too; of one
    that was left out anything of the right shape."""
    if getattr(module, "left_out", False):
        return query.transpose(1, 2), None
    if key.shape[-1] != query.shape[-1]:
        own = next(child for child in module.children() if isinstance(child, HeadsLinear) and not child.cached)
        query = own.thinned(query)
    return sdpa_attention_forward(module, query, key, value, mask, **named)


AttentionInterface.register(THIN, _attend)
AttentionMaskInterface.register(THIN, sdpa_mask)


class Given(DynamicCache):
    """A cache of what is ``past``, layer -> keys and values, that remembers what it is ``now``."""

    def __init__(self, past: Mapping[int, tuple[Tensor, ...]]) -> None:
        super().__init__()
        self.past, self.now = past, dict[int, tuple[Tensor, ...]]()

    def update(self, keys: Tensor, values: Tensor, layer: int, *more: Any, **named: Any) -> tuple[Tensor, Tensor]:
        if layer in self.past:
            keys, values = (torch.cat(pair, 2) for pair in zip(self.past[layer], (keys, values), strict=True))
        self.now[layer] = keys, values
        return keys, values

    def get_seq_length(self, *more: Any, **named: Any) -> int:
        return 0  # positions and mask are given


class Step(nn.Module):
    """Logits of new tokens and the cache after them, as a function of tensors alone."""

    def __init__(self, model: Any, layers: Sequence[int]) -> None:
        super().__init__()
        self.model, self.layers = model, layers

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, beam_idx: Tensor, *past: Tensor
    ) -> tuple[Tensor, ...]:
        own = [states.index_select(0, beam_idx) for states in past]
        cache = Given({layer: (own[2 * i], own[2 * i + 1]) for i, layer in enumerate(self.layers)})
        places = torch.arange(attention_mask.shape[1])
        causal = places[None, :] <= places[-input_ids.shape[1] :, None]  # (new, all)
        allowed = causal[None] & attention_mask[:, None, :].bool()
        mask = torch.where(allowed, 0.0, torch.finfo(torch.float32).min)[:, None]  # (batch, 1, new, all)
        logits = self.model(
            input_ids=input_ids, attention_mask=mask, position_ids=position_ids, past_key_values=cache, use_cache=True
        ).logits
        return logits, *(states for layer in self.layers for states in cache.now[layer])


def _cache_shapes(model: Any) -> Shapes:
    """What each layer caches; attentions that were left out cache nothing."""
    cache = Given({})
    model(input_ids=torch.zeros(1, 2, dtype=torch.long), past_key_values=cache, use_cache=True)
    gone = {getattr(module, "layer_idx", None) for module in model.modules() if getattr(module, "left_out", False)}
    found = {layer: tuple((each.shape[1], each.shape[3]) for each in pair) for layer, pair in cache.now.items()}
    return cast(Shapes, {layer: pair for layer, pair in found.items() if layer not in gone})


# -- the graph


def _graph(model: Any, shapes: Shapes) -> Any:
    """The graph of ``model`` with its cache as state, of inputs input_ids, attention_mask, position_ids, beam_idx."""
    openvino = importlib.import_module("openvino")
    stateful = importlib.import_module("openvino._offline_transformations").apply_make_stateful_transformation
    count, past, new = EXAMPLE
    cached = [torch.zeros(count, heads, past, width) for pair in shapes.values() for heads, width in pair]
    positions = torch.arange(past, past + new).repeat(count, 1)
    ids, mask = torch.zeros(count, new, dtype=torch.long), torch.ones(count, past + new, dtype=torch.long)
    example = (ids, mask, positions, torch.arange(count, dtype=torch.int32), *cached)
    try:
        graph = openvino.convert_model(Step(model, list(shapes)), example_input=example)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise ExportError(
            f"OpenVINO cannot read the graph of a {type(model).__name__} ({reason}): use --format dense or plain"
        ) from error
    names = [f"{layer}.{role}" for layer in shapes for role in ("key", "value")]
    before, after = [f"past_key_values.{name}" for name in names], [f"present.{name}" for name in names]
    for port, name in zip(graph.inputs, [*INPUTS, *before], strict=True):
        port.get_tensor().set_names({name})
    for port, name in zip(graph.outputs, ["logits", *after], strict=True):
        port.get_tensor().set_names({name})
    for port, tensor in zip(graph.inputs[4:], cached, strict=True):
        port.get_node().set_partial_shape(openvino.PartialShape([-1, tensor.shape[1], -1, tensor.shape[3]]))
    graph.validate_nodes_and_infer_types()
    if names:
        stateful(graph, dict(zip(before, after, strict=True)))
        _start_empty(graph)
    return graph


def _start_empty(graph: Any) -> None:
    """Let every state begin with no tokens, of as many sequences as there are ids: by default it has none."""
    opset = importlib.import_module("openvino.opset13")

    def number(value: int) -> Any:
        return opset.constant(np.array([value], dtype=np.int64))

    count = opset.gather(opset.shape_of(graph.input("input_ids"), output_type="i64"), number(0), number(0))
    for node in graph.get_ops():
        if node.get_type_name() == "ReadValue":
            _, *others = (number(size.min_length) for size in node.get_output_partial_shape(0))
            zero = opset.constant(0.0, dtype=node.get_output_element_type(0))
            node.set_arguments([opset.broadcast(zero, opset.concat([count, *others], 0))])
    graph.validate_nodes_and_infer_types()


def _save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write what splits and joins text in OpenVINO; `InputError` where it has nothing like ``tokenizer``."""
    openvino = importlib.import_module("openvino")
    convert = importlib.import_module("openvino_tokenizers").convert_tokenizer
    try:
        both = convert(tokenizer, with_detokenizer=True)
    except (RuntimeError, ValueError, TypeError, KeyError, AttributeError, NotImplementedError) as error:
        raise InputError(
            f"OpenVINO has no tokenizer like {type(tokenizer).__name__} ({error}): use --format plain or dense"
        ) from error
    for graph, name in zip(both, (TOKENIZER, DETOKENIZER), strict=True):
        openvino.save_model(graph, folder / name)
