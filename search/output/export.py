"""Export: plan -> a folder that from_pretrained loads; verified after writing, in a fresh process."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from rankfront.methods import DENSE_OPTION, InputError, Storage, get_method
from rankfront.methods.checkpoint import describe
from rankfront.methods.dense import multiplied_out
from rankfront.methods.layers import Factored, set_module, weight_of
from rankfront.methods.loading import CODE_FILE, Replacements, tie_factors
from rankfront.methods.unfused import described, fuse, unfused_in
from rankfront.objectives import CAUSAL, Task, score
from rankfront.search import attributes as keys
from rankfront.search.atomic import new_folder, staged
from rankfront.search.attributes import Report
from rankfront.search.choices import AS_FACTORS, Format, Refit
from rankfront.search.errors import ExportError, Unwritable
from rankfront.search.inputs.model import quiet, read_config
from rankfront.search.inputs.source import Source
from rankfront.search.inputs.tasks import LOADING
from rankfront.search.measure.compressed_model import CompressedModel
from rankfront.search.measure.control import reported
from rankfront.search.measure.joining import separate
from rankfront.search.measure.refit import refitted
from rankfront.search.measure.setup import Setup
from rankfront.search.measure.timed_model import TimedModel
from rankfront.search.output import verify
from rankfront.search.output.card import Verified, card
from rankfront.search.output.control_check import warning
from rankfront.search.output.tensor_table import tensor_section
from rankfront.search.plain import without_folders
from rankfront.search.serve.vllm_plugin import check_export
from rankfront.search.storage.front import Row

AT_ONCE = "2GB"  # of a file where memory is short: what lies transposed is copied, a file at a time
TOLERANCE = 0.005  # relative difference in perplexity between the trial and the reloaded export


def export(
    setup: Setup, row: Row, out: Path, form: Format, refit: Refit = "none", dense: Report | None = None
) -> Verified:
    """Write the model of trial ``row`` to the new folder ``out``, verify it there, and only then name it ``out``.

    Refitted ``sequential``ly (see `refit`), the folder is verified against the model here rather than the trial.

    ``factored`` keeps the factors and loads after ``import rankfront.methods``; so does ``vllm``, and vLLM runs all of
    it too; ``dense`` multiplies them out and loads without us. ``dense`` is what was measured of the dense model on the
    report split, here where it is not given. A link as ``out`` is followed. Raises `InputError` where ``out`` is taken
    or vLLM cannot run the plan, `ExportError` where writing or verifying fails.
    """
    out = new_folder(out)
    check_origin(setup, row)
    compressed = CompressedModel(setup)
    with writing(out):
        if refit == "none":
            compressed.apply(row.plan)
            reports = _reported(compressed, row.report, dense)
            return _write_verified(compressed, row, out, form, row.figure("perplexity"), refit, reports)
        with refitted(compressed, row.plan):
            windows = setup.tokens["search"][: setup.config.trial_windows]
            measured = score(compressed.model, windows, task=setup.task).perplexity
            reports = _reported(compressed, None, dense)
            return _write_verified(compressed, row, out, form, measured, refit, reports)


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """Within, what fails of writing the folder ``out`` is `Unwritable`, in one line."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise Unwritable(f"writing {str(out)!r} failed ({error}): free some space or name another folder") from error


def check_origin(setup: Setup, row: Row) -> None:
    """Raise `InputError` where the plan of trial ``row`` was measured on other weights or text than are there now."""
    now = setup.origin()
    for name, value in row.plan.origin:
        if now.get(name) != value:
            raise InputError(
                f"trial {row.number} has {name} {value} and the run now {now.get(name)}: restore what changed"
            )


def _reported(compressed: CompressedModel, known: Report | None, dense: Report | None) -> tuple[Report, Report]:
    """What is reported of the model that runs, and of the dense one: as ``known``, else measured now."""

    def measured(report: Report | None) -> Report:
        if report is not None and not report.keys().isdisjoint({"continuations", "continuations_failure"}):
            return report
        setup = compressed.setup
        return reported(compressed.model, setup.tokens, compressed.tokenizer, task=setup.task)

    ours = measured(known)
    with compressed.dense():
        return ours, measured(dense)


def _in_buffers(compressed: CompressedModel) -> int:
    """What the plan's integers and index bits count as, which are no parameters of a module."""
    treated = ((site, compressed.current.get(site.name, DENSE_OPTION)) for site in compressed.sites)
    used = (get_method(option.method).storage(site, option) for site, option in treated if option != DENSE_OPTION)
    return sum(used, Storage(0)).buffers


def _write_verified(
    compressed: CompressedModel,
    row: Row,
    out: Path,
    form: Format,
    measured: float,
    refit: Refit,
    reports: tuple[Report, Report],
) -> Verified:
    """Write what ``compressed`` runs, which has ``measured`` as its perplexity, reload it and compare."""
    setup = compressed.setup
    expected, buffers = compressed.dense_values, 0
    if form in AS_FACTORS:
        buffers = _in_buffers(compressed)
        expected = row.attributes[keys.PARAMETER_COUNT] - buffers
    with staged(out) as folder:
        wanted = _write(compressed, row, folder, form)
        windows = setup.tokens["search"][: setup.config.trial_windows]
        verified = verify_folder(folder, windows, setup.device, setup.source.trust_remote_code, setup.task)
        if verified.parameters != expected:
            raise ExportError(f"the export has {verified.parameters:,} parameters and the plan {expected:,}: not kept")
        check_same("export", verified, measured)
        line = warning(*reports, setup.config.data.control.label_by(without_folders))
        verified = replace(verified, parameters=verified.parameters + buffers, warning=line)
        text = card(setup, row, verified, form, refit, reports)
        if wanted is not None:
            sizes = {path: weight_of(compressed.dense_modules[path]).shape for path in wanted.modules}
            text += "\n" + tensor_section(folder, wanted, sizes)
        (folder / "README.md").write_text(text, encoding="utf-8")
    return verified


def _write(compressed: CompressedModel, row: Row, folder: Path, form: Format) -> Replacements | None:
    """Write the model to ``folder``; what of it is replaced, where it is ``factored``."""
    model: Any = compressed.model
    wanted = None
    model.config.dtype = next(model.parameters()).dtype
    if form in AS_FACTORS:
        wanted = write_factored(compressed, folder)
        if form == "vllm":
            check_export(model.config.model_type, wanted)
    else:
        _multiply_out(model, compressed.modules, compressed.dense_modules)
        fuse(model)
        with quiet():
            model.save_pretrained(folder)
        _save_whole_config(model.config, compressed.setup.source, folder)
    save_tokenizer(compressed.tokenizer, folder)
    (folder / "plan.json").write_text(row.plan.portable.to_json() + "\n", encoding="utf-8")
    return wanted


def _save_whole_config(own: Any, source: Source, folder: Path) -> None:
    """Where transformers' class knows the configuration alone whose part for text the model has, write that."""
    mapping, whole = LOADING[source.task].mapping, read_config(source)
    if type(own) not in mapping and type(whole) in mapping:
        whole.text_config, whole.architectures = own, own.architectures
        whole.save_pretrained(folder)


def write_factored(compressed: CompressedModel, folder: Path) -> Replacements:
    """Write the model as it runs, its configuration and the code that loads it; what of it is replaced."""
    model: Any = compressed.model
    wanted = _replacements(model, compressed)
    tie_factors(model, wanted)
    untouched = fuse(model, but=wanted.unfused)
    inside = tuple(f"{path}." for path in wanted.unfused)
    state = {name: _whole(own) if name.startswith(inside) else own for name, own in model.state_dict().items()}
    with quiet():  # names of tensors are those of modules
        size = {} if compressed.copies else {"max_shard_size": AT_ONCE}
        model.save_pretrained(folder, state_dict=state, save_original_format=False, **size)
    for path, module in untouched.items():
        set_module(model, path, module)
    describe(folder, model, wanted, compressed.setup.task.auto)
    return wanted


def _whole(tensor: Tensor) -> Tensor:
    """A copy where ``tensor`` is a part of a larger one: files hold no views."""
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write ``tokenizer``; an OSError where that fails."""
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:  # the tokenizers library raises a bare Exception where the disk is full
        raise OSError(str(error)) from error


def check_same(what: str, verified: Verified, measured: float) -> None:
    """Raise `ExportError` where a fresh process has another perplexity than was ``measured`` here."""
    if not abs(verified.perplexity / measured - 1) <= TOLERANCE:
        raise ExportError(
            f"the {what}'s perplexity is {verified.perplexity:.6g} and was {measured:.6g} here on the same"
            f" tokens, more than {TOLERANCE:.1%} apart: not kept"
        )


def _replacements(model: Any, compressed: CompressedModel) -> Replacements:
    """What the folder says of the replaced modules, so that loading rebuilds them."""
    joined = TimedModel(compressed).join()
    separate(compressed.modules.values())  # files hold every factor by itself
    treated = {
        path: module
        for path, module in unfused_in(model).items()
        if any(layer.startswith(f"{path}.") for layer in compressed.layers)
    }
    return Replacements(compressed.layers, _tied(model, compressed.layers), joined, described(treated))


def _tied(model: nn.Module, treated: Iterable[str]) -> dict[str, str]:
    """Name of a tensor -> name of the first that is the very same, in the modules at ``treated``."""
    first: dict[int, str] = {}
    tied = {}
    order = {name: number for number, (name, _) in enumerate(model.named_modules(remove_duplicate=False))}
    for path in sorted(treated, key=order.__getitem__):
        for name, tensor in model.get_submodule(path).state_dict(keep_vars=True).items():
            known = first.setdefault(id(tensor), f"{path}.{name}")
            if known != f"{path}.{name}":
                tied[f"{path}.{name}"] = known
    return tied


def _multiply_out(model: nn.Module, modules: dict[str, nn.Module], dense_modules: dict[str, nn.Module]) -> None:
    """Put plain dense modules back, with the weights that the factors multiply to; shared factors stay shared."""
    products: dict[tuple[int, ...], nn.Parameter] = {}
    for path, module in modules.items():
        dense, factored = cast(Any, dense_modules[path]), cast(Factored, module)
        key = tuple(id(each) for name, each in module.named_parameters() if name != "bias") or (id(module),)
        if key not in products:
            products[key] = _frozen(multiplied_out(factored, dense, "weight"), dense)
        dense.weight = products[key]
        if factored.full_bias() is not None and getattr(dense, "bias", None) is not None:
            dense.bias = _frozen(multiplied_out(factored, dense, "bias"), dense)
        set_module(model, path, dense)


def _frozen(tensor: Tensor, like: Any) -> nn.Parameter:
    return nn.Parameter(tensor.to(like.weight.device, like.weight.dtype).contiguous(), requires_grad=False)


def verify_folder(folder: Path, windows: Tensor, device: str, trust_remote_code: bool, task: Task = CAUSAL) -> Verified:
    """Reload ``folder`` in a fresh process, count its parameters and score ``windows`` (W, L).

    A factored one is loaded by the code that it carries, which this process wrote.
    """
    tokens = folder / ".tokens"  # within what is dropped after a kill; no loader looks at it
    modules = folder / ".modules"  # where transformers copies that code to; otherwise into its cache, for good
    trusted = trust_remote_code or (folder / CODE_FILE).is_file()
    try:
        save_file({name: tensor.contiguous().clone() for name, tensor in task.frozen(windows).items()}, tokens)
        command = [
            sys.executable,
            verify.__file__,
            str(folder),
            str(tokens),
            device,
            str(torch.get_num_threads()),
            str(int(trusted)),
            task.auto,
        ]
        environment = os.environ | {"HF_MODULES_CACHE": str(modules)}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    finally:
        tokens.unlink(missing_ok=True)
        shutil.rmtree(modules, ignore_errors=True)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ExportError(f"the written folder does not load in a fresh process ({reason}): not kept")
    return Verified(**json.loads(done.stdout))
