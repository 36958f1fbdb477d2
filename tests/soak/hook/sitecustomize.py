"""Loaded by Python itself at the start of a command that the soak runs: kills it at its n-th file operation.

SOAK_HOOK holds `OPERATION SIGNAL FOLDER NOTES`: the command gets SIGNAL before its OPERATION-th file operation inside
FOLDER (0: never). The folder NOTES tells how many there were (`operations`), that there was one (`begun`), and that the
command was killed (`killed`). Processes that it starts are not counted.
"""

import atexit
import os
import sys

WATCHED = {
    "open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.scandir",
    "os.listdir", "os.utime", "os.chmod", "shutil.rmtree", "shutil.move",
}  # fmt: skip


def watch(operation: int, signal: int, folder: str, notes: str) -> None:
    home, seen, inside = os.getpid(), 0, False

    def note(name: str, text: str) -> None:
        with open(os.path.join(notes, name), "w") as file:
            file.write(text)

    def hear(event: str, arguments: tuple) -> None:
        nonlocal seen, inside
        if event not in WATCHED or inside or os.getpid() != home or not arguments:
            return
        path = arguments[0]
        if not isinstance(path, str | bytes | os.PathLike):
            return
        inside = True
        try:
            whole = os.path.abspath(os.fsdecode(path))
            if whole.startswith(folder) and not whole.startswith((notes, os.path.join(folder, ".tmp"))):
                seen += 1
                if seen == 1:
                    note("begun", event)
                if seen == operation:
                    note("killed", str(signal))
                    os.kill(home, signal)
        finally:
            inside = False

    def told() -> None:
        if os.getpid() == home:
            note("operations", str(seen))

    atexit.register(told)
    sys.addaudithook(hear)


if hook := os.environ.pop("SOAK_HOOK", None):
    number, which, where, kept = hook.split(" ", 3)
    watch(int(number), int(which), where, kept)
