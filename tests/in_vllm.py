"""Run by a Python that has vLLM: for each folder of the command line, a line of JSON with what it says to ids.json.

``said`` are its likeliest tokens after each prompt, ``known`` the logarithms of the probabilities of the prompt's own;
``refused`` is the error of a folder that does not open.
"""

import json
import sys
from pathlib import Path

NEW = 12


def main(ids: str, *folders: str) -> None:
    from vllm import LLM, SamplingParams

    prompts = [{"prompt_token_ids": each} for each in json.loads(Path(ids).read_text(encoding="utf-8"))]
    greedy = SamplingParams(temperature=0, max_tokens=NEW, min_tokens=NEW, ignore_eos=True)
    scored = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    for folder in folders:
        try:
            model = LLM(folder, trust_remote_code=True, dtype="float32", max_model_len=64, enforce_eager=True)
        except Exception as error:  # noqa: BLE001
            print("FOUND", json.dumps({"refused": str(error)}), flush=True)
            continue
        said = [list(each.outputs[0].token_ids) for each in model.generate(prompts, greedy)]
        known = []
        for each in model.generate(prompts, scored):
            pairs = zip(each.prompt_token_ids[1:], each.prompt_logprobs[1:], strict=True)
            known.append([found[token].logprob for token, found in pairs])
        print("FOUND", json.dumps({"said": said, "known": known}), flush=True)
        del model


if __name__ == "__main__":
    main(*sys.argv[1:])
