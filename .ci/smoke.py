"""What somebody does first who has advmoe installed and no clone of it, by the Python of that installation.

python .ci/smoke.py VERSION
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ADVMOE = Path(sys.executable).with_name("advmoe")
TINY = ["--model.width", "4", "--data.train_examples", "64", "--training.epochs", "1", "--training.batch_size", "32"]


def call(*words: str, code: int = 0, says: str = "", **environment: str) -> str:
    """What the command line prints; it must end with `code` and, other than 0, in one line that holds `says`."""
    # A PYTHONPATH would put a clone before the installation.
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [ADVMOE, *words], capture_output=True, text=True, timeout=600, env={**inherited, **environment}
    )
    print(f"advmoe {words[0]}: {done.returncode} {done.stderr.strip()}")
    lines = done.stderr.splitlines()
    if done.returncode != code or says not in done.stderr or (code and len(lines) != 1):
        sys.exit(f"must end with {code} and {says!r}, got {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout


def main(version: str) -> None:
    """Try it all."""
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        if (printed := call("--version").strip()) != f"advmoe {version}":
            sys.exit(f"must be advmoe {version}, got {printed}")
        if "imagenet-deit-tiny" not in (printed := call("recipes")):
            sys.exit(f"must hold imagenet-deit-tiny, got\n{printed}")
        if "advmoe-image-mod" not in (printed := call("zoo", "list")):
            sys.exit(f"must hold advmoe-image-mod, got\n{printed}")
        call("cost", "zoo:advmoe", "--batch", "1", "--seconds", "0")
        # A cache of its own, so that the C++ sources are those of the installation.
        call("train", "--config", "digits-advmoe", "--run-dir", "run", *TINY, XDG_CACHE_HOME=folder)
        kernels = json.loads(Path("run", "manifest.json").read_text())["kernels"]
        print(f"kernels: {kernels}")
        if sys.platform == "linux" and shutil.which("c++") and kernels != "advmoe":
            sys.exit(f"must have compiled its kernels, got {kernels}")
        measure = ["evaluate", "run", "--num-examples", "20", "--attack.steps", "2"]
        call(*measure, XDG_CACHE_HOME=folder)
        if "ADVMOE_NATIVE=0" not in (printed := call(*measure, ADVMOE_NATIVE="0")):
            sys.exit(f"must do without kernels, got\n{printed}")


if __name__ == "__main__":
    main(*sys.argv[1:])
