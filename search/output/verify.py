"""Reload an exported folder and measure it. Run as a file, in a process of its own, by `export`.

Takes FOLDER TOKENS DEVICE THREADS TRUST, where TRUST is 1 if Python code that comes with the model may run, and prints
``{"perplexity": x, "parameters": n, "bytes": b}``. It does not import rankfront: the folder is seen to load without us.
"""

from __future__ import annotations

import json
import math
import sys


def main(folder: str, tokens: str, device: str, threads: str, trust: str) -> None:
    """Measure ``folder`` on the windows (W, L) in the safetensors file ``tokens``."""
    import torch
    import transformers
    from safetensors.torch import load_file

    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(int(threads))
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", output_loading_info=True, trust_remote_code=trust == "1"
    )
    wrong = {kind.removesuffix("_keys"): str(min(keys)) for kind, keys in info.items() if keys}
    if wrong:
        sys.exit(f"tensors do not fit the model: {', '.join(f'{kind} {key}' for kind, key in wrong.items())}")
    model = model.to(device).eval()
    windows = load_file(tokens)["windows"].to(device)
    total = 0.0
    with torch.inference_mode():
        for ids in windows:
            logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1].float()
            total += float(torch.nn.functional.cross_entropy(logits, ids[1:], reduction="sum"))
    predicted = windows.shape[0] * (windows.shape[1] - 1)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    held = {tensor.data_ptr(): tensor.nbytes for tensor in model.state_dict().values()}
    found = {"perplexity": math.exp(total / predicted), "parameters": parameters, "bytes": sum(held.values())}
    print(json.dumps(found))


if __name__ == "__main__":
    # As a file, its own folder comes first on the path, and would offer `search` modules under bare names.
    sys.path.pop(0)
    main(*sys.argv[1:])
