"""Load a model and its tokenizer, with every weight that its checkpoint holds, or its skeleton without weights."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoTokenizer
from transformers import modeling_gguf_pytorch_utils as gguf_reader

from rankfront.methods import InputError, nearest
from rankfront.methods.checkpoint import QUANT_METHOD, whole_class
from rankfront.methods.factored import dense_config
from rankfront.methods.layers import set_module
from rankfront.methods.loading import KEY, Replacements
from rankfront.methods.unfused import unfuse
from rankfront.search.inputs.apart import take_apart
from rankfront.search.inputs.checkpoint import check_whole, hold_two, tensor_files
from rankfront.search.inputs.converted import bytes_to_convert, converted
from rankfront.search.inputs.device import out_of_memory
from rankfront.search.inputs.memory import ample
from rankfront.search.inputs.source import WEIGHT_FILES, Source, check_unpacked
from rankfront.search.inputs.tasks import LOADING, check_task
from rankfront.search.names import BUNDLED

MOST_VALUES = (
    64  # for each byte of a checkpoint: two are what four bits hold, and an export keeps a few percent of them
)
SPARE_VALUES = 2**28  # values that any model may hold beside, such as masks that are not saved: a gibibyte in fp32
MOST_LAYERS = 10_000  # above any published model, below what takes minutes to construct: a guess


def load_model(source: Source, dtype: torch.dtype | Literal["auto"], device: str, apart: bool = True) -> Any:
    """The model in evaluation mode, weights in ``dtype`` on ``device``, no gradients.

    ``auto`` is the dtype of the checkpoint. Modules that hold several matrices in one tensor are taken ``apart``.

    On a CPU weights are mapped from the checkpoint where they are loaded as they are there; in another dtype they are
    held, or where there is no room for that, mapped from a copy in the cache."""
    if source.gguf:
        check_unpacked(source)
    config = read_config(source)
    check_task(source.name, source.task, config)
    _check_size(source, config)
    method = quantisation(config)
    quantised = None if method == QUANT_METHOD else method
    if dtype != "auto" and method is None:
        source = _as_mapped(source, config, dtype, torch.device(device))
    model = load_whole(source, source.location, quantised, dtype=dtype, **source.arguments)
    model = model.to(device).eval().requires_grad_(False)
    if apart:
        _share_modules(model)
        take_apart(model)
    return model


def _as_mapped(source: Source, config: Any, dtype: torch.dtype, device: torch.device) -> Source:
    """``source``, or where its weights are of another dtype and there is no room for them, its copy in ``dtype``."""
    with loading(source, "weights"):
        files = tensor_files(source.location, **source.hub_arguments)
        if ample(bytes_to_convert(files, dtype), device):
            return source
        model = _empty(source, copy.deepcopy(config), dtype=dtype)
        own = [".".join(name.split(".")[-2:]) for name, tensor in model.named_parameters() if tensor.dtype != dtype]
        kept = (model._keep_in_fp32_modules, model._keep_in_fp32_modules_strict)
        return converted(source, files, dtype, {*own, *(name for names in kept for name in names or ())})


def converts(source: Source, dtype: torch.dtype) -> bool:
    """Whether the checkpoint has weights of another dtype than ``dtype``."""
    with loading(source, "weights"):
        return bytes_to_convert(tensor_files(source.location, **source.hub_arguments), dtype) > 0


def _share_modules(model: nn.Module) -> None:
    """Let linears with the very same weight, in several blocks (Zamba's), be one module: who looks at it sees all of
    its uses."""
    first: dict[int, nn.Module] = {}
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            known = first.setdefault(id(module.weight), module)
            if known is not module and type(known) is type(module) and known.bias is module.bias:
                set_module(model, path, known)


def load_tokenizer(source: Source) -> Any:
    """The model's own tokenizer, from the same place."""
    with loading(source, "tokenizer"):
        return AutoTokenizer.from_pretrained(source.location, **source.arguments)


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


def skeleton(source: Source) -> Any:
    """The model without its weights, for shapes and names alone: loads in about a second at any size. Modules are
    taken apart as in the loaded one.

    Table and head are tied as they are in the loaded model: where the configuration ties them and the checkpoint holds
    two different matrices, they are two.
    """
    config = read_config(source)
    check_task(source.name, source.task, config)
    _refuse_compressed(source, config)
    model = _empty(source, config)
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is not None and head.weight is table.weight:
        names = {module: name for name, module in model.named_modules()}
        pair = [_saved_names(model, f"{names[module]}.weight") for module in (table, head)]
        with loading(source, "weights"):
            untied = hold_two(source.location, pair[0], pair[1], len(table.weight), **source.hub_arguments)
        if untied:
            _untie(config)
            model = _empty(source, config)
    take_apart(model)
    return model


def dense_skeleton(source: Source) -> Any:
    """The dense model of a factored export, without weights."""
    config = read_config(source)
    model, found = _empty(source, dense_config(config)), Replacements.of(config)
    unfuse(model, {} if found is None else found.unfused)
    take_apart(model)
    return model


def read_config(source: Source) -> Any:
    """The model's transformers configuration."""
    with loading(source, "configuration"):
        config = AutoConfig.from_pretrained(source.location, **source.arguments)
        layers = getattr(config.get_text_config(), "num_hidden_layers", 0)
    if isinstance(layers, int) and layers > MOST_LAYERS:
        raise InputError(
            f"model {source.name!r} has {layers:,} layers by its config.json, more than {MOST_LAYERS:,}: restore it"
        )
    return config


def load_whole(source: Source, location: str | Path, quantised: str | None = None, **arguments: Any) -> Any:
    """The model at ``location`` with every weight from its checkpoint; `InputError` where one is not.

    Of a ``.bin`` file transformers reads tensors alone (``weights_only``): no pickle of a stranger runs.
    """
    with loading(source, "weights", quantised):
        # Tensors of another shape are let through to `check_whole`, which names them; transformers does not.
        model, info = LOADING[source.task].auto.from_pretrained(
            location, output_loading_info=True, ignore_mismatched_sizes=True, **arguments
        )
    check_whole(source.name, model, info, LOADING[source.task].dropped)
    if getattr(model.config, "rescale_every", 0):  # RWKV halves weights in place, which could overflow in fp16
        model.config.rescale_every = 0  # factors in their place would not be
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    if hasattr(head, "weight") and hasattr(table, "weight") and head.weight is not table.weight:
        _untie(model.config)
    return model


def _untie(config: Any) -> None:
    """Let ``config`` say that table and head are two matrices: what is saved with it loads both."""
    for part in (config, config.get_text_config()):
        part.tie_word_embeddings = False


def _check_size(source: Source, config: Any) -> None:
    """Raise `InputError` where a configuration on disk asks for far more than its checkpoint could fill: transformers
    would allocate all of it before it looked."""
    folder = Path(source.location)
    if not folder.is_dir():
        return
    held = sum(file.stat().st_size for pattern in WEIGHT_FILES for file in folder.glob(pattern))
    empty = _empty(source, config)
    values = sum(tensor.numel() for tensor in (*empty.parameters(), *empty.buffers()))
    if values > MOST_VALUES * held + SPARE_VALUES:
        raise InputError(
            f"model {source.name!r} has {values:,} values by its config.json, and its checkpoint {held:,} bytes:"
            " restore the config.json that belongs to it"
        )


def _empty(source: Source, config: Any, **more: Any) -> Any:
    wanted = LOADING[source.task]
    of_part = None if type(config) in wanted.mapping else whole_class(type(config), wanted.auto.__name__)
    with loading(source, "configuration"), torch.device("meta"):
        if of_part is not None:
            return of_part._from_config(config, **more)
        return wanted.auto.from_config(config, trust_remote_code=source.trust_remote_code, **more)


def _saved_names(model: Any, name: str) -> tuple[str, str]:
    """What a checkpoint may call the tensor ``name``: those of a model without a head leave its prefix out."""
    return name, name.removeprefix(f"{model.base_model_prefix}.")


def _refuse_compressed(source: Source, config: Any) -> None:
    """Raise `InputError` where the checkpoint holds no plain weights, which are what methods treat."""
    method = quantisation(config)
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


def quantisation(config: Any) -> str | None:
    """By which method the checkpoint of a model is quantised, or None; a factored export by `QUANT_METHOD`."""
    if getattr(config, KEY, None) is not None:
        return QUANT_METHOD
    settings = getattr(config, "quantization_config", None)
    if not settings:
        return None
    method = settings.get("quant_method") if isinstance(settings, dict) else getattr(settings, "quant_method", None)
    return str(getattr(method, "value", method) or "bitsandbytes")  # which alone did without the name at first


@contextmanager
def loading(source: Source, what: str, quantised: str | None = None) -> Iterator[None]:
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


def count_parameters(model: nn.Module) -> int:
    """Stored values: every parameter once, however many modules share it."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_bytes(model: nn.Module) -> int:
    """Bytes of what is saved of a model, each tensor once: integers and supports, which are no parameters, too."""
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in model.state_dict().values()}.values())
