"""What an installation without extras does: trains, evaluates, exports, and says which extra each other thing needs.

python .ci/without-extras.py
"""

import importlib
import pkgutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from smoke import TINY, call

import advmoe

EXTRAS = (
    "huggingface_hub",
    "matplotlib",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "optuna",
    "pyautoattack",
    "ray",
    "submitit",
    "tensorboard",
    "triton",
)


def main() -> None:
    """Try it all."""
    for module in pkgutil.walk_packages(advmoe.__path__, "advmoe."):
        if module.name.endswith("__main__"):
            continue
        try:
            importlib.import_module(module.name)
        except ModuleNotFoundError as error:
            if error.name not in EXTRAS:
                raise
    for name in advmoe.__all__:
        getattr(advmoe, name)
    with tempfile.TemporaryDirectory() as folder:
        run = str(Path(folder, "run"))
        call("train", "--config", "digits-advmoe", "--run-dir", run, *TINY)
        call("evaluate", run, "--num-examples", "20", "--attack.steps", "2")
        call("export", run, "--format", "torch-export", "--out", str(Path(folder, "model.pt2")))
        other = ["--run-dir", str(Path(folder, "other")), "--tensorboard"]
        space = Path(folder, "space.yaml")
        space.write_text("training.lr: {low: 0.01, high: 0.2}\n")
        lacking = {
            "export": ["export", run, "--out", str(Path(folder, "model.onnx"))],
            "autoattack": ["evaluate", run, "--attacks", "autoattack", "--num-examples", "20"],
            "slurm": ["evaluate", run, "--engine", "slurm"],
            "ray": ["evaluate", run, "--engine", "ray"],
            "search": ["search", str(space), "--config", "digits-advmoe", "--out", str(Path(folder, "search"))],
            "figures": ["report", run, "-o", str(Path(folder, "report.html"))],
            "hub": ["push", run, "somebody/something"],
            "triton": ["train", "--config", "digits-advmoe", *other[:2], "--training.compute", "kernel", *TINY],
            "tensorboard": ["train", "--config", "digits-advmoe", *other, *TINY],
        }
        with ThreadPoolExecutor(2) as pool:
            for done in [
                pool.submit(call, *words, code=2, says=f"advmoe[{extra}]") for extra, words in lacking.items()
            ]:
                done.result()
    print("without extras: as it must be")


if __name__ == "__main__":
    main()
