"""What can be chosen by name: one table for each field, each entry with all that the program asks about it.

The command line, its help, checks, reports and docs read these. They import no torch: what an entry builds is imported
when it is built. Attacks (`evaluation.suite`) and their losses (`attacks.pgd`) have tables beside their code.
"""

from advmoe.tables.backbones import BACKBONES, Backbone
from advmoe.tables.datasets import DATASETS, DataSet
from advmoe.tables.kinds import KINDS, Kind
from advmoe.tables.methods import ALTERNATIONS, METHODS, PAPER, Alternation, Level, Method, Part, levels
from advmoe.tables.routers import ROUTERS, Router
from advmoe.tables.table import Family, Table, lazily

__all__ = [
    "ALTERNATIONS", "BACKBONES", "DATASETS", "KINDS", "METHODS", "PAPER", "ROUTERS", "Alternation", "Backbone",
    "DataSet", "Family", "Kind", "Level", "Method", "Part", "Router", "Table", "lazily", "levels",
]  # fmt: skip
