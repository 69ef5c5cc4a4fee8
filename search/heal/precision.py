"""What healing computes in: fp32 masters, and products in bfloat16 where the hardware has them."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from rankfront.search.inputs.device import pick_dtype


class Precision:
    """fp32 throughout, or bfloat16 products by autocast; fp16, which overflows in training, never."""

    def __init__(self, device: str, dtype: str = "auto") -> None:
        self.kind = torch.device(device).type
        self.half = dtype == "bfloat16" or (dtype == "auto" and pick_dtype("auto", device) == "bfloat16")

    def context(self) -> AbstractContextManager[Any]:
        """Within, products run in the chosen precision."""
        return torch.autocast(self.kind, torch.bfloat16, cache_enabled=False) if self.half else nullcontext()

    def prepared(self, model: Any) -> Any:
        """``model`` as it is, or in fp32 where nothing else multiplies."""
        if not self.half:
            for parameter in model.parameters():
                parameter.data = parameter.data.float()
        return model
