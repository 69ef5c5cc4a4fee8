#!/bin/sh
# Launch the demo study, look at its front, go on with it, export a plan, and generate a sentence with the exported model.
set -eu
cd "$(dirname "$0")/.."
echo "a first front of 3 trials:"
rankfront launch studies/demo.toml --trials 3
echo "the same study, gone on with where it stopped (with --workers 2, two trials would run at once in Ray workers):"
rankfront launch studies/demo.toml
rankfront report runs/demo
rm -rf exported/demo
rankfront export runs/demo --out exported/demo --max-parameters 0.95
python - <<'PYTHON'
import transformers

import rankfront.methods  # registers the loader of factored models

transformers.utils.logging.disable_progress_bar()
folder = "exported/demo"
model = transformers.AutoModelForCausalLM.from_pretrained(folder)
tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
ids = tokenizer("The capital of France is", return_tensors="pt")
print(tokenizer.decode(model.generate(**ids, max_new_tokens=24, do_sample=False)[0], skip_special_tokens=True))
PYTHON
echo "exported to exported/demo; the report page is runs/demo/report.html"
