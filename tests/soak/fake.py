"""A stand-in for the command line, for the soak's own test: it trains, and refuses, as it should but for one fault.

FAULT in the environment names the fault; without one it is sound.
"""

import json
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

FAULT = os.environ.get("FAULT", "")
EPOCHS = 3


def write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(content)
    partial.replace(path)


def weights(value: float) -> bytes:
    header = json.dumps({"weight": {"dtype": "F64", "shape": [1], "data_offsets": [0, 8]}}).encode()
    return struct.pack("<Q", len(header)) + header + struct.pack("<d", value)


def fail(text: str, code: int) -> int:
    print(f"advmoe: error: {text}", file=sys.stderr)
    return code


def stop(number: int, frame: object) -> None:
    if FAULT != "silent":
        fail("stopped", 128 + number)
    sys.exit(128 + number)


def train(run: Path, resumed: bool) -> int:
    last, metrics = run / "last" / "model.safetensors", run / "metrics.jsonl"
    if resumed and not last.exists():
        return fail(f"RUN must hold a checkpoint, got {run}", 2)
    if not resumed and last.exists():
        return fail(f"run_dir must be new, got {run}", 2)
    if resumed and FAULT == "traceback":
        raise RuntimeError("planted")
    if resumed and FAULT == "child":
        subprocess.Popen(
            [sys.executable, "-c", "import time; time.sleep(60)"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
    if resumed and FAULT == "hang":
        time.sleep(60)
    epoch = int(struct.unpack("<d", last.read_bytes()[-8:])[0]) if resumed else 0
    logged = metrics.read_text().splitlines()[:epoch] if resumed else []
    write(run / "config.yaml", b"{}")
    while epoch < EPOCHS:
        time.sleep(0.05)
        epoch += 1
        logged.append(json.dumps({"epoch": epoch, "seconds": time.time()}))
        write(metrics, "".join(f"{line}\n" for line in logged).encode())
        write(last, weights(epoch))
    write(run / "model.safetensors", weights(epoch + (resumed and FAULT == "numbers")))
    write(run / "manifest.json", json.dumps({"finished": "now"}).encode())
    return 0


def main(words: list[str]) -> int:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)
    if "--help" in words:
        print("  --training.epochs INT  epochs\n  --flag  a flag")
        return 0
    if words[:1] == ["train"] and "--print_config" not in words:
        name = "--resume" if "--resume" in words else "--run-dir"
        if name in words[:-1]:
            return train(Path(words[words.index(name) + 1]), name == "--resume")
    if FAULT == "long":
        return fail("no" * 1000, 2)
    if FAULT == "litter":
        Path("litter").touch()
    return fail("COMMAND must be train", 2)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
