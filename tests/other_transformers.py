"""Make environments with torch and other versions of transformers, without rankfront, and print their interpreters.

    export RANKFRONT_OTHER_PYTHONS=$(python tests/other_transformers.py FOLDER 5.0.0 5.16.0)
    python -m pytest tests/test_folder.py

Torch is installed once, in the environment ``FOLDER/torch``, in the version that runs this.
"""

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import torch


def environment(folder: Path, package: str) -> Path:
    """The interpreter of a new environment at ``folder`` that has ``package``; of one that is there, as it is."""
    python = folder / "bin" / "python"
    if not folder.exists():
        venv.create(folder, with_pip=True)
        shared = folder.parent / "torch"
        if folder != shared:
            packages = sysconfig.get_path("purelib", vars={"base": str(shared)})
            own = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
            (own / "torch.pth").write_text(f"{packages}\n", encoding="utf-8")
        subprocess.run([python, "-m", "pip", "install", "-q", package], check=True, stdout=sys.stderr)
    return python


def main(folder: str, *versions: str) -> None:
    place = Path(folder).resolve()
    environment(place / "torch", f"torch=={torch.__version__.partition('+')[0]}")
    found = [environment(place / f"transformers-{each}", f"transformers=={each}") for each in versions]
    print(os.pathsep.join(map(str, found)))


if __name__ == "__main__":
    main(*sys.argv[1:])
