"""How long it takes to sample the own text of smollm2-135m, in an empty cache.

python studies/own_text.py [--tokens 57344] [--threads 2]
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from common import provenance

from rankfront.search.inputs.own_text import OwnText
from rankfront.search.inputs.resolve import resolve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=57_344)
    parser.add_argument("--threads", type=int, default=2)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    source = resolve("smollm2-135m")  # unpacked before the clock starts
    with TemporaryDirectory() as folder:
        started = time.perf_counter()
        OwnText(source, "bfloat16", "cpu", Path(folder))(0, asked.tokens)
        print(f"{asked.tokens:,} tokens in {time.perf_counter() - started:.0f} s", provenance())


if __name__ == "__main__":
    main()
