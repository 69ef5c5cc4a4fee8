"""Models in the formats of engines: of a trial, or of a folder that exists; verified before they get their name."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rankfront.methods import InputError
from rankfront.objectives import score
from rankfront.search import attributes as keys
from rankfront.search.atomic import new_folder, staged
from rankfront.search.choices import AS_FACTORS, Format, Refit
from rankfront.search.errors import ExportError
from rankfront.search.inputs.capacity import capacity_of
from rankfront.search.inputs.device import pick_device
from rankfront.search.inputs.model import count_parameters, load_model, load_tokenizer
from rankfront.search.inputs.resolve import resolve
from rankfront.search.inputs.source import Source
from rankfront.search.inputs.text import cut
from rankfront.search.measure.compressed_model import CompressedModel
from rankfront.search.measure.refit import refitted
from rankfront.search.measure.setup import Setup
from rankfront.search.names import BUNDLED
from rankfront.search.output.card import Verified
from rankfront.search.output.export import check_origin, check_same, save_tokenizer, verify_folder, writing
from rankfront.search.plain import markdown
from rankfront.search.plans.plan import Plan
from rankfront.search.serve import llama_cpp
from rankfront.search.serve.doors import DOORS
from rankfront.search.serve.writing import multiplied_out, write
from rankfront.search.splits import Split
from rankfront.search.storage.front import Row

WIDE = ("F32", "F16", "BF16")  # types that round too little to be seen in perplexity
TOLERANCE = 0.01  # relative difference in perplexity between llama.cpp and transformers, at those types
CHECKED = 64  # tokens that llama.cpp is asked about, one by one; a guess
WINDOWS, LENGTH = 2, 128  # of the text that a converted folder is verified on; guesses
GGUF = "model.gguf"


def export_served(setup: Setup, row: Row, out: Path, form: Format, kind: str, refit: Refit) -> Verified:
    """Write the model of trial ``row`` as ``form`` to the new folder ``out``; of ``gguf``, weights of type ``kind``.

    Raises `InputError` where ``out`` is taken or ``form`` cannot hold the plan, `ExportError` where writing or
    verifying fails.
    """
    out = new_folder(out)
    check_origin(setup, row)
    compressed = CompressedModel(setup)
    windows = setup.tokens["search"][: setup.config.trial_windows]
    with _running(compressed, row, refit, windows) as measured:
        stored = row.attributes[keys.PARAMETER_COUNT]
        title = f"Trial {row.number} ({markdown(row.origin)}) of a rankfront {version('rankfront')} study"
        return _write(
            compressed.model, setup.source, row.plan, stored, windows, measured, form, kind, title, out
        )  # fmt: skip


@contextmanager
def _running(compressed: CompressedModel, row: Row, refit: Refit, windows: Tensor) -> Iterator[float]:
    """Within, ``compressed`` runs the plan of ``row``; its perplexity on ``windows``."""
    if refit == "none":
        compressed.apply(row.plan)
        yield row.figure("perplexity")
    else:
        with refitted(compressed, row.plan):
            yield score(compressed.model, windows).perplexity


def convert_folder(
    folder: Path,
    form: Format,
    out: Path,
    kind: str = "F16",
    text: str = "pydoc",
    device: str = "auto",
    trust_remote_code: bool = False,
) -> Verified:
    """Write the model in ``folder``, which was exported, healed or sliced, as ``form`` to the new folder ``out``.

    Perplexity before and after is that of a few windows of ``text``. Raises as `export_served` does.
    """
    if form in AS_FACTORS:
        raise InputError("a folder that was exported is factored already, as for vLLM: convert it to another format")
    out = new_folder(out)
    source = resolve(str(folder), trust_remote_code)
    model = load_model(source, "auto", pick_device(device))
    file = folder / "plan.json"
    plan = Plan.from_json(file.read_text(encoding="utf-8"), str(file)) if file.is_file() else Plan(())
    positions = capacity_of(model).positions or LENGTH
    length = min(LENGTH, positions, getattr(model.config, "max_position_embeddings", LENGTH))
    windows = cut(load_tokenizer(source), {"text": Split(text, WINDOWS)}, length)["text"]
    measured = score(model, windows).perplexity
    title = f"Converted by rankfront {version('rankfront')}"
    return _write(model, source, plan, count_parameters(model), windows, measured, form, kind, title, out)


def _write(
    model: Any,
    source: Source,
    plan: Plan,
    stored: int,
    windows: Tensor,
    measured: float,
    form: Format,
    kind: str,
    title: str,
    out: Path,
) -> Verified:
    """Write ``model``, which stores so many values and has ``measured`` as its perplexity on ``windows`` (W, L)."""
    tokenizer = load_tokenizer(source)
    with writing(out), staged(out) as folder:
        written = write(model, form, folder, kind, tokenizer, _original(source, plan))
        sizes = f"the plan stores {stored:,} values as factors and this folder {written.values:,}"
        lost = multiplied_out(plan.by_site, form)
        notes = (*([sizes] if stored != written.values else []), *([lost] if lost else []), *written.notes)
        if form == "gguf":
            check = _in_llama_cpp(folder / GGUF, model, windows, kind)
            size = (folder / GGUF).stat().st_size
            verified = Verified(measured, written.values, size, notes=(*notes, check), reloaded=False)
        elif form == "openvino":
            save_tokenizer(tokenizer, folder)
            check = _in_openvino(folder, model, windows[:1])
            size = sum(file.stat().st_size for file in folder.glob("openvino_model.*"))
            verified = Verified(measured, written.values, size, notes=(*notes, check), reloaded=False)
        else:
            save_tokenizer(tokenizer, folder)
            trusted = source.trust_remote_code or form == "nemotron-nas"
            found = verify_folder(folder, windows, str(next(model.parameters()).device), trusted)
            check_same("export", found, measured)
            if found.parameters != written.values:
                raise ExportError(f"the export has {found.parameters:,} parameters: not kept")
            verified = Verified(found.perplexity, found.parameters, found.bytes, notes=notes)
        (folder / "plan.json").write_text(plan.portable.to_json() + "\n", encoding="utf-8")
        (folder / "README.md").write_text(_card(source, title, form, verified), encoding="utf-8")
        return verified


def _original(source: Source, plan: Plan) -> Path | None:
    """The GGUF file that the dense model came in, where it did."""
    if source.gguf is not None:
        return source.gguf
    name = dict(plan.origin).get("model", "")
    if name not in BUNDLED and not name.endswith(".gguf"):
        return None
    try:
        return resolve(name).gguf
    except InputError:  # it is not on this machine
        return None


def _exact(model: Any) -> Any:
    """``model`` as it runs in fp32: in 16 bits the perplexity of a poor plan is off by as much as engines may be."""
    return model if model.dtype == torch.float32 else copy.deepcopy(model).float()


def _in_llama_cpp(file: Path, model: Any, windows: Tensor, kind: str) -> str:
    """What llama.cpp makes of ``file``, in a line. Raises `ExportError` where it finds another perplexity than here."""
    if not llama_cpp.available():
        return "every tensor was read back; it was not run: with the extra llama-cpp, llama.cpp is asked too"
    engine = llama_cpp.LlamaCpp(file, windows.shape[1] + 1, torch.get_num_threads())
    there, here, count = engine.perplexities(_exact(model), windows[:1, : CHECKED + 1])
    if count and kind in WIDE and not abs(there / here - 1) <= TOLERANCE:
        raise ExportError(
            f"llama.cpp finds perplexity {there:.6g} and the model has {here:.6g} on the same {count} tokens, more than"
            f" {TOLERANCE:.0%} apart: not kept"
        )
    return (
        f"llama.cpp ({llama_cpp.installed()}) finds perplexity {there:.5g} on {count} tokens, transformers {here:.5g}"
    )


def _in_openvino(folder: Path, model: Any, windows: Tensor) -> str:
    """What OpenVINO makes of ``folder``, in a line. Raises `ExportError` where its perplexity is another than here."""
    from rankfront.search.serve.openvino_engine import OpenVino, installed

    there, here = OpenVino(folder, torch.get_num_threads()).perplexities(_exact(model), windows)
    if not abs(there / here - 1) <= TOLERANCE:
        raise ExportError(
            f"OpenVINO finds perplexity {there:.6g} and the model has {here:.6g} on the same {windows.numel()} tokens,"
            f" more than {TOLERANCE:.0%} apart: not kept"
        )
    return f"OpenVINO ({installed()}) finds perplexity {there:.5g} on {windows.numel()} tokens, transformers {here:.5g}"


RUN: Mapping[Format, str] = {
    "factored": "model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)",
    "dense": "model = AutoModelForCausalLM.from_pretrained(FOLDER)",
    "plain": "model = AutoModelForCausalLM.from_pretrained(FOLDER)",
    "nemotron-nas": "model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)",
    "gguf": f"llama-server --model FOLDER/{GGUF}",
    "vllm": "vllm serve FOLDER",
    "openvino": 'pipe = openvino_genai.LLMPipeline(FOLDER, "CPU")',
}


def _card(source: Source, title: str, form: Format, verified: Verified) -> str:
    """The model card: what this is, how to run it, what it stores."""
    reloaded = "reloaded" if verified.reloaded else "before it was written"
    lines = [
        f"# {markdown(Path(source.name).name if Path(source.name).is_dir() else source.name)}, compressed",
        "",
        f"{title}, format `{form}`: {DOORS[form].written}.",
        "`plan.json` has the method and level of every treated weight.",
        "",
        "```",
        RUN[form],
        "```",
        "",
        f"- {verified.parameters:,} stored values in {verified.bytes:,} bytes",
        f"- perplexity {verified.perplexity:.6g}, {reloaded}",
        *(f"- {note}" for note in verified.notes),
        "",
        "The licence of the original model applies.",
        "",
    ]
    return "\n".join(lines)
