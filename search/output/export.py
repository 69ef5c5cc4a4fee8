"""Export: plan -> a folder that from_pretrained loads; verified after writing, in a fresh process."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from rankfront.methods import DENSE_OPTION, InputError, Storage, get_method
from rankfront.methods.checkpoint import RankfrontConfig, RankfrontQuantizer, tie_factors
from rankfront.methods.layers import Factored, set_module, weight_of
from rankfront.objectives import score
from rankfront.search import attributes as keys
from rankfront.search.atomic import new_folder, staged
from rankfront.search.attributes import Report
from rankfront.search.choices import Format, Refit
from rankfront.search.errors import ExportError
from rankfront.search.inputs.model import quiet
from rankfront.search.measure.compressed_model import CompressedModel
from rankfront.search.measure.control import reported
from rankfront.search.measure.joining import separate
from rankfront.search.measure.refit import refitted
from rankfront.search.measure.setup import Setup
from rankfront.search.measure.timed_model import TimedModel
from rankfront.search.output import verify
from rankfront.search.output.control_check import warning
from rankfront.search.plain import markdown
from rankfront.search.splits import PROMPTS
from rankfront.search.storage.front import Row

TOLERANCE = 0.005  # relative difference in perplexity between the trial and the reloaded export


REFIT_NOTE = (
    "Its factors were refitted to what the compressed model before them makes; the trial's figures are without.\n"
)


@dataclass(frozen=True)
class Verified:
    """What a fresh process measured on the folder just written.

    Attributes:
        perplexity: on the search split.
        parameters: stored values; integers count one each, index bits as `Storage.parameters` says.
        bytes: of its tensors.
        warning: what it loses on the control text that the report split hides, in one line.
        notes: what the format cost, a line each.
        reloaded: whether perplexity is that of the folder; of a GGUF file it is the model's before it was written.
    """

    perplexity: float
    parameters: int
    bytes: int
    warning: str | None = None
    notes: tuple[str, ...] = ()
    reloaded: bool = True


def export(
    setup: Setup, row: Row, out: Path, form: Format, refit: Refit = "none", dense: Report | None = None
) -> Verified:
    """Write the model of trial ``row`` to the new folder ``out``, verify it there, and only then name it ``out``.

    Refitted ``sequential``ly (see `refit`), the folder is verified against the model here rather than the trial.

    ``factored`` keeps the factors and loads after ``import rankfront.methods``; ``dense`` multiplies them out and
    loads without us. ``dense`` is what was measured of the dense model on the report split, here where it is not given.
    A link as ``out`` is followed. Raises `InputError` where ``out`` is taken, `ExportError` where writing or verifying
    fails.
    """
    out = new_folder(out)
    check_origin(setup, row)
    compressed = CompressedModel(setup)
    try:
        if refit == "none":
            compressed.apply(row.plan)
            reports = _reported(compressed, row.report, dense)
            return _write_verified(compressed, row, out, form, row.figure("perplexity"), refit, reports)
        with refitted(compressed, row.plan):
            measured = score(compressed.model, setup.tokens["search"][: setup.config.trial_windows]).perplexity
            reports = _reported(compressed, None, dense)
            return _write_verified(compressed, row, out, form, measured, refit, reports)
    except (OSError, SafetensorError) as error:
        raise ExportError(f"writing {str(out)!r} failed ({error}): free some space or name another folder") from error


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
        if report is not None and "continuations" in report:
            return report
        return reported(compressed.model, compressed.setup.tokens, compressed.tokenizer)

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
    if form == "factored":
        buffers = _in_buffers(compressed)
        expected = row.attributes[keys.PARAMETER_COUNT] - buffers
    with staged(out) as folder:
        _write(compressed, row, folder, form)
        windows = setup.tokens["search"][: setup.config.trial_windows]
        verified = verify_folder(folder, windows, setup.device, setup.source.trust_remote_code)
        if verified.parameters != expected:
            raise ExportError(f"the export has {verified.parameters:,} parameters and the plan {expected:,}: not kept")
        check_same("export", verified, measured)
        line = warning(*reports, setup.config.data.control.label)
        verified = replace(verified, parameters=verified.parameters + buffers, warning=line)
        (folder / "README.md").write_text(_card(setup, row, verified, form, refit, reports), encoding="utf-8")
    return verified


def _write(compressed: CompressedModel, row: Row, folder: Path, form: Format) -> None:
    model: Any = compressed.model
    model.config.dtype = next(model.parameters()).dtype
    if form == "factored":
        _mark(model, compressed)
    else:
        _multiply_out(model, compressed.modules, compressed.dense_modules)
    with quiet():
        model.save_pretrained(folder)
    save_tokenizer(compressed.tokenizer, folder)
    (folder / "plan.json").write_text(row.plan.to_json() + "\n", encoding="utf-8")


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


def _mark(model: Any, compressed: CompressedModel) -> None:
    """Describe the replaced modules in the model's configuration, so that loading rebuilds them."""
    joined = TimedModel(compressed).join()
    separate(compressed.modules.values())  # files hold every factor by itself
    config = RankfrontConfig(modules=compressed.layers, tied=_tied(model, compressed.layers), joined=joined)
    model.config.quantization_config = config
    model.hf_quantizer = RankfrontQuantizer(config)
    tie_factors(model, config)


def _tied(model: nn.Module, treated: Iterable[str]) -> dict[str, str]:
    """Name of a tensor -> name of the first that is the very same, in the modules at ``treated``."""
    first: dict[int, str] = {}
    tied = {}
    order = {name: number for number, (name, _) in enumerate(model.named_modules())}
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
            matrix = _padded(factored.matrix(), weight_of(dense).shape)
            stored = matrix.T if type(dense).__name__ == "Conv1D" else matrix
            products[key] = _frozen(stored, dense)
        dense.weight = products[key]
        bias = factored.full_bias()
        if bias is not None and getattr(dense, "bias", None) is not None:
            dense.bias = _frozen(_padded(bias, dense.bias.shape), dense)
        set_module(model, path, dense)


def _padded(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """``tensor`` with zeros after it up to ``shape``."""
    padding = [zeros for size, wanted in zip(tensor.shape, shape, strict=True) for zeros in (wanted - size, 0)]
    return nn.functional.pad(tensor, padding[::-1])


def _frozen(tensor: Tensor, like: Any) -> nn.Parameter:
    return nn.Parameter(tensor.to(like.weight.device, like.weight.dtype).contiguous(), requires_grad=False)


def verify_folder(folder: Path, windows: Tensor, device: str, trust_remote_code: bool) -> Verified:
    """Reload ``folder`` in a fresh process, count its parameters and score ``windows`` (W, L)."""
    tokens = folder / ".tokens"  # within what is dropped after a kill; no loader looks at it
    try:
        save_file({"windows": windows.contiguous()}, tokens)
        command = [
            sys.executable,
            verify.__file__,
            str(folder),
            str(tokens),
            device,
            str(torch.get_num_threads()),
            str(int(trust_remote_code)),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    finally:
        tokens.unlink(missing_ok=True)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ExportError(f"the written folder does not load in a fresh process ({reason}): not kept")
    return Verified(**json.loads(done.stdout))


def _card(
    setup: Setup, row: Row, verified: Verified, form: Format, refit: Refit, reports: tuple[Report, Report]
) -> str:
    """The model card: what this is, how to load it, what was measured, of dense too where it says what was lost."""
    search, data = setup.config.search, setup.config.data
    figures = {name: f"{value:.6g}" for name, value in row.values.items()}
    figures |= {
        "parameters (kept fraction of the model)": f"{row.figure('parameters'):.4f}",
        "block_parameters (kept fraction of the block linears)": f"{row.attributes[keys.BLOCK_PARAMETERS]:.4f}",
        "stored values in this folder": f"{verified.parameters:,}",
        "bytes of its tensors": f"{verified.bytes:,}",
        f"perplexity, search split ({markdown(data.search.label)}), reloaded": f"{verified.perplexity:.6g}",
    }
    texts = {
        "perplexity": f"report split ({markdown(data.report.label)})",
        "control": f"control text ({markdown(data.control.label)})",
    }
    ours, dense = reports
    for name, text in texts.items():
        if name in ours and name in dense:
            figures[f"perplexity, {text}"] = f"{ours[name]:.6g} (dense: {dense[name]:.6g})"
    table = "\n".join(f"| {name} | {value} |" for name, value in figures.items())
    said = f"It {verified.warning}.\n\n" * bool(verified.warning) + _said(ours, dense)
    load = "import rankfront.methods\n" if form == "factored" else ""
    return f"""# {markdown(setup.config.model.name)}, compressed

Trial {row.number} ({markdown(row.origin)}) of a rankfront {version("rankfront")} study with seed {search.seed},
format `{form}`, {setup.dtype}. `plan.json` has the method and level of every treated weight
({len(row.plan.choices)} of them).
{REFIT_NOTE if refit != "none" else ""}
```python
{load}from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("THIS FOLDER")
tokenizer = AutoTokenizer.from_pretrained("THIS FOLDER")
```

| measured | value |
| --- | --- |
{table}

{said}

Windows of {data.length} tokens; latency on {setup.device}, as a ratio to the dense model in the same run.
The licence of the original model applies.
"""


def _said(ours: Report, dense: Report) -> str:
    """What dense and the exported model say after `PROMPTS`, as a block of text."""
    before, after = (
        [json.dumps(text, ensure_ascii=False) for text in report.get("continuations", ())] for report in (dense, ours)
    )
    texts = zip(PROMPTS, before, after, strict=False)
    lines = [f"{prompt}\n  dense:      {was}\n  compressed: {now}" for prompt, was, now in texts]
    return "\n".join(["The likeliest continuations:\n", "```", *lines, "```"])
