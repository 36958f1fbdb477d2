"""Every study by its name. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping

from advmoe.errors import InputError
from advmoe.studies.ablations import ATTACK_STEPS, CONVERGENCE
from advmoe.studies.efficiency import EFFICIENCY
from advmoe.studies.fig1b import FIG1B
from advmoe.studies.paper_figures import FIG2, FIG6, FIG7, FIG8
from advmoe.studies.paper_tables import TABLE1, TABLE2, TABLE3
from advmoe.studies.pathway import PATHWAY
from advmoe.studies.recipe_search import RECIPES
from advmoe.studies.section4 import FIG3, FIG4, FIG5
from advmoe.studies.study import Study
from advmoe.text import nearest, show

STUDIES: Mapping[str, Study] = {
    study.name: study
    for study in (
        TABLE1, TABLE2, TABLE3, FIG1B, FIG2, FIG3, FIG4, FIG5, FIG6, FIG7, FIG8, ATTACK_STEPS, CONVERGENCE,
        EFFICIENCY, RECIPES, PATHWAY,
    )
}  # fmt: skip


def study_named(name: str) -> Study:
    """The study of that name. Raises `ValueError`, which lists those there are."""
    if name not in STUDIES:
        rule = f"must be one of list, claims, {', '.join(STUDIES)}"
        raise InputError(f"NAME {rule}, got {show(name)}{nearest(name, STUDIES)}")
    return STUDIES[name]
