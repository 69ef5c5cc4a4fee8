"""The model card of an export: what it is, how it is loaded, what was measured."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from rankfront.search import attributes as keys
from rankfront.search.attributes import Report, task_scores_of
from rankfront.search.choices import Format, Refit
from rankfront.search.inputs.source import Source
from rankfront.search.measure.setup import Setup
from rankfront.search.plain import markdown, without_folders
from rankfront.search.splits import PROMPTS
from rankfront.search.storage.front import Row

REFIT_NOTE = (
    "Its factors were refitted to what the compressed model before them makes; the trial's figures are without.\n"
)
FACTORED = """Its weights run as their factors. The folder has the code for that, `modeling_rankfront.py`.
It needs torch and transformers 5.0 or newer, and runs if you trust it (`pip install torch "transformers>=5"`):

```python
from transformers import AUTO, AutoTokenizer
model = AUTO.from_pretrained("THIS FOLDER", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("THIS FOLDER")
```

Where rankfront is installed, `import rankfront.methods` before that, and it needs no trust."""
LOAD: dict[Format, str] = {
    "dense": """```python
from transformers import AUTO, AutoTokenizer
model = AUTO.from_pretrained("THIS FOLDER")
tokenizer = AutoTokenizer.from_pretrained("THIS FOLDER")
```""",
    "factored": FACTORED,
    "vllm": f"{FACTORED} Then vLLM opens the folder too: `vllm serve THIS FOLDER`.",
}


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


def card(setup: Setup, row: Row, verified: Verified, form: Format, refit: Refit, reports: tuple[Report, Report]) -> str:
    """The model card: what this is, how to load it, what was measured, of dense too where it says what was lost."""
    search, data = setup.config.search, setup.config.data
    where, report, control = (
        markdown(split.label_by(without_folders)) for split in (data.search, data.report, data.control)
    )
    calibrated = markdown(data.calibrate.label_by(without_folders))
    figures = {name: f"{value:.6g}" for name, value in row.values.items()}
    figures |= {
        "parameters (kept fraction of the model)": f"{row.figure('parameters'):.4f}",
        "block_parameters (kept fraction of the blocks' matrices)": f"{row.attributes[keys.BLOCK_PARAMETERS]:.4f}",
        "stored values in this folder": f"{verified.parameters:,}",
        "bytes of its tensors": f"{verified.bytes:,}",
        f"perplexity, search split ({where}), reloaded": f"{verified.perplexity:.6g}",
    }
    texts = {
        "perplexity": f"report split ({report})",
        "control": f"control text ({control})",
    }
    ours, dense = reports
    for name, text in texts.items():
        if name in ours and name in dense:
            figures[f"perplexity, {text}"] = f"{ours[name]:.6g} (dense: {dense[name]:.6g})"
    if "error_rate" in ours and "error_rate" in dense:
        figures[f"error rate, {texts['perplexity']}"] = f"{ours['error_rate']:.6g} (dense: {dense['error_rate']:.6g})"
    before = task_scores_of(dense)
    for name, score in task_scores_of(ours).items():
        figures[f"task {name}"] = f"{score:.4g}" + (f" (dense: {before[name]:.4g})" if name in before else "")
    table = "\n".join(f"| {name} | {value} |" for name, value in figures.items())
    said = f"It {verified.warning}.\n\n" * bool(verified.warning) + _said(ours, dense)
    said += setup.task.scheme
    name = without_folders(setup.source.name)
    return f"""---
library_name: transformers
pipeline_tag: {setup.task.pipeline}
base_model: {json.dumps(name)}
{_licence(setup.source)}
tags:
- rankfront
- compressed
---

# {markdown(name)}, compressed

Trial {row.number} ({markdown(row.origin)}) of a rankfront {version("rankfront")} study with seed {search.seed},
format `{form}`, {setup.dtype}. `plan.json` has the method and level of every treated weight
({len(row.plan.choices)} of them).
{REFIT_NOTE if refit != "none" else ""}
{LOAD[form].replace("AUTO", setup.task.auto)}

| measured | value |
| --- | --- |
{table}

{said}

Calibrated on {data.calibrate.windows} windows of {calibrated}. Windows have {data.length} tokens; latency on
{setup.device}, as a ratio to the dense model in the same run.
The licence of the base model, {markdown(name)}, applies.
"""


def _said(ours: Report, dense: Report) -> str:
    """What dense and the exported model say after `PROMPTS`, as a block of text."""
    before, after = (
        [json.dumps(text, ensure_ascii=False) for text in report.get("continuations", ())] for report in (dense, ours)
    )
    if not before and not after:
        return ""
    texts = zip(PROMPTS, before, after, strict=False)
    lines = [f"{prompt}\n  dense:      {was}\n  compressed: {now}" for prompt, was, now in texts]
    return "\n".join(["The likeliest continuations:\n", "```", *lines, "```"])


def _licence(source: Source) -> str:
    """Lines of a card's header: the licence that the base model's own card names, where that is at hand."""
    file = Path(source.location) / "README.md"
    text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
    header = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    found = header and re.search(r"^license: *([\w.-]+) *$", header[1], re.MULTILINE)
    return f"license: {found[1]}" if found else "license: other\nlicense_name: that-of-the-base-model"
