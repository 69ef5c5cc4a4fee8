"""Linears of vLLM that run factors. Its processes import this file, which registers itself there.

vLLM has queries, keys and values in one linear, gate and up in another. Each of their parts runs as the layer that it
is in transformers, with the products of vLLM.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.models.registry import ModelRegistry

from rankfront.methods import InputError
from rankfront.methods.layers import empty_replacement
from rankfront.methods.loading import KEY, Replacements
from rankfront.search.serve.vllm_plugin import BASES, check_export

SHARDS = {"q": 0, "k": 1, "v": 2}  # vLLM's names of the parts of an attention's linear; of others, it has numbers


@register_quantization_config(KEY)
class ExportConfig(QuantizationConfig):
    """What stands in the place of which linears."""

    def __init__(self, wanted: Replacements) -> None:
        super().__init__()
        self.wanted = wanted
        self.shared: dict[str, nn.Parameter] = {}  # tensors of several modules, by the name that they are stored under
        self.products: dict[int, Product] = {}  # by the parameter

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> ExportConfig:
        wanted = Replacements(config["modules"], config["tied"], config["joined"])
        check_export(config["base"], wanted)
        return cls(wanted)

    def get_name(self) -> Any:
        return KEY

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    def get_quant_method(self, layer: nn.Module, prefix: str) -> LinearMethodBase | None:
        if not isinstance(layer, LinearBase):
            return None
        parent, _, own = prefix.rpartition(".")
        paths = [f"{parent}.{name}" for name in self.packed_modules_mapping.get(own, [own])]
        treated = any(path in self.wanted.modules for path in paths)
        return FactoredMethod(self, paths) if treated else UnquantizedLinearMethod()


class FactoredMethod(LinearMethodBase):
    """Runs, in one linear of vLLM, what stands in the place of the modules at ``paths``."""

    def __init__(self, export: ExportConfig, paths: Sequence[str]) -> None:
        self.export, self.paths = export, paths
        self.waiting: set[str] = set()  # tensors that are not loaded yet

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        if layer.tp_size > 1:
            raise InputError(f"exports run on one device and tensor_parallel_size is {layer.tp_size}: leave it at 1")
        layer.parts = nn.ModuleList()
        for path, rows in zip(self.paths, output_partition_sizes, strict=True):
            with torch.device("meta"):
                dense = nn.Linear(input_size, rows, layer.has_bias, dtype=params_dtype)
            spec = self.export.wanted.modules.get(path, {"kind": "plain", "rows": rows, "columns": input_size})
            part = empty_replacement(dense, spec["kind"], spec).to_empty(device=torch.get_default_device())
            layer.parts.append(part.requires_grad_(False))
            self._share(path, part)
        for name in self._names(layer):  # vLLM loads a tensor by the loader of the linear's parameter of that name
            named = nn.Parameter(torch.empty(0, dtype=params_dtype), requires_grad=False)
            named.weight_loader = partial(self._load, layer, name)  # type: ignore[attr-defined]
            layer.register_parameter(name, named)
        layer.weight_loader = partial(self._load, layer, "bias")  # of the bias, which vLLM makes after this

    def _share(self, path: str, part: nn.Module) -> None:
        tied, shared = self.export.wanted.tied, self.export.shared
        for name, tensor in part.state_dict(keep_vars=True).items():
            own = f"{path}.{name}"
            source = tied.get(own, own)
            if source in tied.values():
                setattr(part, name, shared.setdefault(source, tensor))
            if source == own:
                self.waiting.add(own)

    @staticmethod
    def _names(layer: Any) -> set[str]:
        return {name for part in layer.parts for name in part.state_dict()} - {"bias"}

    def _load(self, layer: Any, name: str, _: nn.Parameter, loaded: Tensor, shard: str | int | None = None) -> None:
        """Fill the tensor ``name`` of one part."""
        place = SHARDS[shard] if isinstance(shard, str) else shard or 0
        tensor, own = getattr(layer.parts[place], name, None), f"{self.paths[place]}.{name}"
        if tensor is None or tensor.shape != loaded.shape:
            wanted = "none" if tensor is None else tuple(tensor.shape)
            raise InputError(f"the export has {own!r} of {tuple(loaded.shape)} and its config.json asks for {wanted}")
        tensor.data.copy_(loaded)
        self.waiting.discard(own)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Let the products of all parts be those of vLLM, which prepares their weights next."""
        if self.waiting:
            raise InputError(f"the export has no tensor {min(self.waiting)!r}, which its config.json asks for")
        for name in self._names(layer):
            delattr(layer, name)
        layer.bias = None
        for part in layer.parts:
            for name in getattr(part, "products", ()):
                weight = getattr(part, name)
                part.add_module(f"{name}_proj", self.export.products.setdefault(id(weight), Product(weight)))
                delattr(part, name)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """``bias`` is none: every part has its own."""
        made = [part(x) for part in layer.parts]
        return made[0] if len(made) == 1 else torch.cat(made, -1)


class Product(nn.Module):
    """x (..., n) to x Wᵀ for W (m, n), by what vLLM has for dense linears."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight
        self.quant_method = UnquantizedLinearMethod()

    def forward(self, x: Tensor) -> Any:
        return self.quant_method.apply(self, x)


for _base in BASES.values():
    if _base in ModelRegistry.models:
        ModelRegistry.models[f"Rankfront{_base}"] = ModelRegistry.models[_base]
