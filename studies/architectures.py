"""Every type of transformers' causal language models, built tiny from its configuration, through a study and an export.

    python studies/architectures.py [--only a,b] [--again works|part|fails] [--seconds 120]

Of each type, in a process of its own: whether it builds, and why not; the share of its blocks' weights that are sites,
at the widths of its default configuration; which joint methods numbers accept; a study of three random trials; whether
factors of full rank at every site, and joint treatments at their full level, leave the logits alone, and a joint
treatment is what its stand-in at one weight is; an export, reloaded: the same logits; the same text with a cache and
without. Finished types are kept in studies/results/architectures.jsonl, the last row of each counts, and are not run
again unless they are named or have the state that ``--again`` names.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("RANKFRONT_CACHE", tempfile.mkdtemp(prefix="rankfront-architectures-"))
os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

from common import RESULTS, Cell, keep_cells, provenance, read_cells, sources  # noqa: E402

del sys.modules["common"]  # of the tests there is one too, whose helpers make tiny models and launch studies of them
sys.path.insert(0, str(ROOT / "tests"))

import pytest  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES  # noqa: E402

LAWS, TINY = (importlib.import_module(name) for name in ("architecture_laws", "tiny"))
# What people run: the types of the models that are downloaded and named most, of today and of the last years.
USED = [
    "apertus", "arcee", "bamba", "bitnet", "bloom", "codegen", "cohere", "cohere2", "dbrx", "deepseek_v2",
    "deepseek_v3", "deepseek_v32", "dots1", "ernie4_5", "ernie4_5_moe", "exaone4", "falcon", "falcon_h1",
    "falcon_mamba", "gemma", "gemma2", "gemma3", "gemma3_text", "gemma3n", "gemma3n_text", "gemma4", "gemma4_text",
    "glm", "glm4", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa", "gpt2", "gpt_bigcode", "gpt_neo", "gpt_neox",
    "gpt_oss", "gptj", "granite", "granitemoe", "granitemoehybrid", "helium", "hunyuan_v1_dense", "hunyuan_v1_moe",
    "internlm3", "jamba", "kimi_linear", "lfm2", "lfm2_moe", "llama", "llama4", "llama4_text", "longcat_flash",
    "mamba", "mamba2", "mimo_v2_flash", "minicpm3", "minimax", "minimax_m2", "ministral", "ministral3", "mistral",
    "mixtral", "mpt", "nemotron", "nemotron_h", "olmo", "olmo2", "olmo3", "olmoe", "openai-gpt", "opt", "phi",
    "phi3", "phimoe", "qwen2", "qwen2_moe", "qwen3", "qwen3_5", "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_5_text",
    "qwen3_moe", "qwen3_next", "rwkv", "seed_oss", "smollm3", "stablelm", "starcoder2", "xglm", "zamba2",
]  # fmt: skip
WHOLE = 0.9  # share of the blocks' weights from which a type is called treated; the rest are convolutions and tables


def examined(name: str, seconds: int) -> Cell:
    """The row of one type, from a process of its own, which has ``seconds`` of the processor."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.close(reader)
        os.setpgid(0, 0)
        signal.setitimer(signal.ITIMER_PROF, seconds)
        with os.fdopen(writer, "w") as out, pytest.MonkeyPatch.context() as patch:
            json.dump(LAWS.Examined(name, patch).row(), out)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as found:
        text = found.read()
    _, status = os.waitpid(child, 0)
    ended = f"ended by {signal.Signals(status & 127).name}" if status & 127 else f"ended with code {status >> 8}"
    row = json.loads(text) if text else {"built": True, "failed": {"process": ended}}
    package = TINY.BESIDE.get(name)
    with_it = {"beside": f"{package} {version(package)}"} if package and row["built"] else {}
    return {"type": name, **row, **with_it}


def state(row: Mapping[str, Any]) -> str:
    """``works``, ``part`` (something of it stays dense, or one step of many goes wrong), ``fails`` or ``unbuilt``."""
    if not row["built"]:
        return "unbuilt"
    steps = row["failed"].keys()
    if steps - {"cache"}:
        return "fails"
    return "part" if steps or row.get("reached_coverage", row["coverage"]) < WHOLE else "works"


def reason(row: Mapping[str, Any]) -> str:
    """One line."""
    said = [f"{step}: {why}" for step, why in row.get("failed", {}).items()]
    if row.get("coverage", 1) < WHOLE:
        said.append("; ".join(row["left"][:2]))
    return "; ".join(said).replace("|", "/")[:240]


def lines(rows: list[Cell]) -> Iterator[str]:
    yield "| type | used | state | coverage | joint methods | what is missing |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for row in sorted(rows, key=lambda row: (row["type"] not in USED, row["type"])):
        share = f"{row['coverage']:.1%}" if "coverage" in row else ""
        used = "yes" if row["type"] in USED else ""
        yield f"| {row['type']} | {used} | {state(row)} | {share} | {', '.join(row.get('joint', []))} | {reason(row)} |"


PAGE = """# Every type of causal language models of transformers {version}

{counts}

`works`: everything that is looked at holds, and at least {whole:.0%} of the values of the blocks' matrices that text
reaches are sites, at the widths of the type's default configuration. `part`: less of it is treated, or decoding with a
cache gives another text. The column `coverage` is of all of them, also of those that no text reaches, such as the
cross-attention of a decoder without its encoder. What is looked at is said at the top of `studies/architectures.py`.

{lines}

Installed beside what `constraints.txt` pins: {beside}.

Command: `python studies/architectures.py`

{sources}
"""


def write_page(rows: list[Cell]) -> None:
    shown = [row for row in rows if row["type"] in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES]
    counts = Counter(map(state, shown))
    of_used = Counter(state(row) for row in shown if row["type"] in USED)
    said = [
        f"{len(shown)} types: {counts['works']} work, {counts['part']} in part, {counts['fails']} fail,"
        f" {counts['unbuilt']} were not built.",
        f"Of the {sum(of_used.values())} that people use {of_used['works']} work, {of_used['part']} in part,"
        f" {of_used['fails']} fail, {of_used['unbuilt']} were not built.",
    ]
    page = PAGE.format(
        version=transformers.__version__, counts=" ".join(said), whole=WHOLE, lines="\n".join(lines(shown)),
        beside="; ".join(f"{row['beside']} for {row['type']}" for row in shown if "beside" in row) or "nothing",
        sources=sources(shown, lambda row: row["type"], ", "),
    )  # fmt: skip
    (RESULTS / "architectures.md").write_text(page, encoding="utf-8")
    print("\n".join(said))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="")
    parser.add_argument("--again", default="", help="states, such as part,fails")
    parser.add_argument("--seconds", type=int, default=120)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    file = RESULTS / "architectures.jsonl"
    known = {row["type"]: row for row in read_cells(file)}
    with pytest.MonkeyPatch.context() as patch:  # whatever is imported on the way, is before processes are forked
        LAWS.Examined("llama", patch).row()
    wanted = arguments.only.split(",") if arguments.only else [*USED, *MODEL_FOR_CAUSAL_LM_MAPPING_NAMES]
    for name in dict.fromkeys(wanted):
        if name not in known or arguments.only or state(known[name]) in arguments.again.split(","):
            row = examined(name, arguments.seconds) | {"from": provenance()}
            keep_cells(file, [row])
            known[name] = row
            print(f"{name}: {state(row)} {reason(row)}", flush=True)
    write_page(list(known.values()))


if __name__ == "__main__":
    main()
