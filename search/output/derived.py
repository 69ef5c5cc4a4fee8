"""The folder of a model that was made of an export: trained, or cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from rankfront.methods.checkpoint import RankfrontConfig, contents, describe
from rankfront.methods.layers import weight_of
from rankfront.methods.loading import Replacements
from rankfront.methods.unfused import fuse
from rankfront.search.atomic import staged
from rankfront.search.errors import ExportError
from rankfront.search.inputs.model import count_parameters, dense_skeleton, load_tokenizer, quiet
from rankfront.search.inputs.source import Source
from rankfront.search.output.export import check_same, save_tokenizer, verify_folder
from rankfront.search.output.tensor_table import tensor_section, without_section
from rankfront.search.plain import markdown
from rankfront.search.plans.plan import Plan

RECORD = "healing.json"


def write_derived(
    model: Any,
    source: Source,
    plan: Plan,
    held: Tensor,
    perplexity: float,
    what: str,
    section: str,
    record: str | None,
    out: Path,
) -> None:
    """Write ``model``, reload it in a fresh process and compare, and only then name the folder ``out``.

    ``perplexity`` is the model's on ``held`` (W, L). The card is that of the export ``source`` with one more
    ``section``; ``record`` says how the model was healed, if it was. Raises `ExportError` where the folder differs.
    """
    with staged(out) as folder:
        found: Any = contents(model.config)
        fuse(model, but=found.get("unfused", ()))
        with quiet():
            model.save_pretrained(folder)
        wanted = Replacements(found["modules"], found["tied"], found["joined"], found.get("unfused", {}))
        if isinstance(getattr(model.config, "quantization_config", None), RankfrontConfig):  # written by an older one
            describe(folder, model, wanted)
        save_tokenizer(load_tokenizer(source), folder)
        (folder / "plan.json").write_text(plan.portable.to_json() + "\n", encoding="utf-8")
        if record is not None:
            (folder / RECORD).write_text(record, encoding="utf-8")
        verified = verify_folder(folder, held, str(next(model.parameters()).device), source.trust_remote_code)
        check_same(f"{what} folder", verified, perplexity)
        if verified.parameters != count_parameters(model):
            raise ExportError(f"the {what} folder has {verified.parameters:,} parameters: not kept")
        card = Path(source.location) / "README.md"
        before = card.read_text(encoding="utf-8") if card.is_file() else f"# {markdown(source.name)}\n"
        dense = dense_skeleton(source)
        sizes = {path: weight_of(dense.get_submodule(path)).shape for path in wanted.modules}
        parts = [without_section(before).rstrip(), section.rstrip(), tensor_section(folder, wanted, sizes)]
        (folder / "README.md").write_text("\n\n".join(parts), encoding="utf-8")
