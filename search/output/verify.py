"""Reload an exported folder and measure it. Run as a file, in a process of its own, by `export`.

Takes FOLDER TOKENS DEVICE THREADS TRUST AUTO, where TRUST is 1 if Python code that comes with the model may run and
AUTO is the class of transformers that loads it, and prints
``{"perplexity": x, "parameters": n, "bytes": b}``. It does not import rankfront: the folder is seen to load without us.
"""

from __future__ import annotations

import json
import math
import sys


def main(folder: str, tokens: str, device: str, threads: str, trust: str, auto: str) -> None:
    """Measure ``folder`` on what the safetensors file ``tokens`` holds: rows that it is called with, ``input_ids``
    (W, L) and the like; ``targets`` (W, P); and the ``positions`` (W, P) that these are predicted at."""
    import torch
    import transformers
    from safetensors.torch import load_file

    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(int(threads))
    model, info = getattr(transformers, auto).from_pretrained(
        folder, dtype="auto", output_loading_info=True, trust_remote_code=trust == "1"
    )
    wrong = {kind.removesuffix("_keys"): str(min(keys)) for kind, keys in info.items() if keys}
    if wrong:
        sys.exit(f"tensors do not fit the model: {', '.join(f'{kind} {key}' for kind, key in wrong.items())}")
    model = model.to(device).eval()
    given = {name: tensor.to(device) for name, tensor in load_file(tokens).items()}
    targets, positions = given.pop("targets"), given.pop("positions")
    cached = {"use_cache": False} if auto == "AutoModelForCausalLM" else {}
    total = 0.0
    with torch.inference_mode():
        for row in range(len(targets)):
            logits = model(**{name: tensor[row][None] for name, tensor in given.items()}, **cached).logits[0]
            predicted = logits.reshape(-1, logits.shape[-1])[positions[row]].float()  # of a class there is one row
            total += float(torch.nn.functional.cross_entropy(predicted, targets[row], reduction="sum"))
    predicted_tokens = targets.numel()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    held = {tensor.data_ptr(): tensor.nbytes for tensor in model.state_dict().values()}
    found = {"perplexity": math.exp(total / predicted_tokens), "parameters": parameters, "bytes": sum(held.values())}
    print(json.dumps(found))


if __name__ == "__main__":
    # As a file, its own folder comes first on the path, and would offer `search` modules under bare names.
    sys.path.pop(0)
    main(*sys.argv[1:])
