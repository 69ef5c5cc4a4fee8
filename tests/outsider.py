"""What somebody without rankfront makes of exports. Run as a file: ``outsider.py WORK FOLDER...``.

WORK is a folder of its own to write to, with the token ids in ``ids.safetensors``. What opening each FOLDER in every
way gave is written to ``WORK/found.json``: ``{folder name: {way: result}}``, and tensors to ``WORK/NAME.safetensors``.
Needs torch and transformers alone, of any version.
"""

import importlib.util
import json
import os
import shutil
import sys
from pathlib import Path

sys.modules["rankfront"] = None  # whoever imports it fails, where it is installed too
os.environ["HF_HUB_OFFLINE"] = "1"
# ruff: noqa: E402, BLE001

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, pipeline


def refusal(opened):
    """What is raised, or None."""
    try:
        opened()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


@torch.no_grad()
def logits(model, ids):
    return model.eval()(input_ids=ids, use_cache=False).logits


def spoil(folder, to):
    """A copy of ``folder`` without one of its tensors."""
    shutil.copytree(folder, to)
    tensors = load_file(to / "model.safetensors")
    name = next(name for name in tensors if "proj" in name or "attn" in name)
    save_file({other: tensor for other, tensor in tensors.items() if other != name}, to / "model.safetensors")
    return name


@torch.no_grad()
def opened(folder, work, ids):
    """Every way of opening ``folder``."""
    found, tensors = {}, {}
    autos = (AutoConfig, AutoModel, AutoModelForCausalLM)
    found["refused"] = [
        refusal(lambda auto=auto: auto.from_pretrained(folder, trust_remote_code=False)) for auto in autos
    ]
    found["refused"].append(refusal(lambda: AutoModelForCausalLM.from_pretrained(folder)))
    found["refused"].append(refusal(lambda: pipeline("text-generation", str(folder))))
    trusted = {"trust_remote_code": True}
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, dtype="float32", **trusted)
    found["info"] = {kind: sorted(map(str, keys)) for kind, keys in info.items() if keys}
    found["class"] = type(model).__name__
    tensors["logits"] = logits(model, ids)
    tensors["generated"] = model.generate(input_ids=ids[:1, :4], max_new_tokens=6, do_sample=False, eos_token_id=-1)
    base = AutoModel.from_pretrained(folder, **trusted).eval()
    found["headless"] = type(base).__name__
    tensors["hidden"] = base(input_ids=ids, use_cache=False).last_hidden_state.clone()
    tensors["inner"] = model.base_model(input_ids=ids, use_cache=False).last_hidden_state.clone()
    tokenizer = AutoTokenizer.from_pretrained(folder, **trusted)
    found["plain tokenizer"] = type(AutoTokenizer.from_pretrained(folder)).__name__ == type(tokenizer).__name__
    tensors["encoded"] = tokenizer("the people", return_tensors="pt").input_ids
    generate = pipeline("text-generation", str(folder), **trusted)
    found["said"] = generate("the people", max_new_tokens=4, do_sample=False)[0]["generated_text"]
    config = AutoConfig.from_pretrained(folder, **trusted)
    by_config = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.bfloat16, **trusted)
    if importlib.util.find_spec("accelerate") is not None:  # as lm-eval opens a model
        placed = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", device_map={"": "cpu"}, **trusted)
        tensors["placed"] = logits(placed, ids)
    found["dtype"] = str(next(by_config.parameters()).dtype)
    half = by_config.half()
    found["half"] = str(next(half.parameters()).dtype)
    model.save_pretrained(work / f"{folder.name} again")
    again = AutoModelForCausalLM.from_pretrained(work / f"{folder.name} again", **trusted)
    tensors["again"] = logits(again, ids)
    found["files"] = sorted(os.listdir(work / f"{folder.name} again"))
    os.symlink(folder, work / f"{folder.name} link")
    tensors["linked"] = logits(AutoModelForCausalLM.from_pretrained(work / f"{folder.name} link", **trusted), ids)
    found["missing"] = spoil(folder, work / f"{folder.name} spoiled")
    found["spoiled"] = refusal(lambda: AutoModelForCausalLM.from_pretrained(work / f"{folder.name} spoiled", **trusted))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, work / f"{folder.name}.safetensors")
    return found


def main(work, *folders):
    transformers.utils.logging.set_verbosity_error()
    ids = load_file(Path(work) / "ids.safetensors")["ids"]
    found = {Path(folder).name: opened(Path(folder), Path(work), ids) for folder in folders}
    found["transformers"] = transformers.__version__
    found["ours"] = [name for name in sys.modules if name.partition(".")[0] == "rankfront" and sys.modules[name]]
    (Path(work) / "found.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
