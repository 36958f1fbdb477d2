"""Where tasks are done: by processes of this machine (`local`, `advmoe.pool`), by SLURM or by Ray; and the loop that
gives them their tasks, each after those that it needs.

A task is a value that can be pickled, with an `id` and the ids of those that it `needs`. It leaves its result in files
that all machines see, can be done again at any time, and goes on from what is there.
"""

from advmoe.engines.choice import ENGINES, EngineOptions
from advmoe.engines.ledger import Ledger
from advmoe.engines.schedule import Bug, Engine, MachineFailed, Skipped, Task, run

__all__ = ["ENGINES", "Bug", "Engine", "EngineOptions", "Ledger", "MachineFailed", "Skipped", "Task", "run"]
