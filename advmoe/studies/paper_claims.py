"""Every claim that the paper makes, and those made here beyond it: where it stands, and which study tests it.

Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass

BEYOND = "beyond the paper"


@dataclass(frozen=True)
class PaperClaim:
    """A claim, and which of the judgements in a study's `study.json` speak of it."""

    statement: str
    place: str
    """In the paper."""
    study: str
    claim: str
    """Its name there; what follows a comma names the setting: data, backbone, r, K."""
    comparisons: tuple[str, ...] = ()
    """Those of the judgement's that the claim is made of; all where there are none."""
    measure: str = ""
    """What a measure's name must begin with."""
    setting: str = ""
    """What a setting must hold."""


_TABLE1, _TABLE2, _TABLE3, _FIG8 = (f"sec. 5.2, {part}" for part in ("table 1", "table 2", "table 3", "fig. 8"))
_MOE = "AT (MoE) < AT (S-Dense)"
_OURS = "AT (S-Dense) < AdvMoE"

PAPER_CLAIMS: tuple[PaperClaim, ...] = (
    PaperClaim("AT (MoE) is less robust than AT (S-Dense)", f"abstract; {_TABLE1}", "table1", "ordering", (_MOE,)),
    PaperClaim("AdvMoE is more robust than AT (S-Dense)", _TABLE1, "table1", "ordering", (_OURS,)),
    PaperClaim(
        "AdvMoE is more robust than AT (Sparse)", _TABLE1, "table1", "above-other-baselines",
        ("AT (Sparse) < AdvMoE",),
    ),
    PaperClaim(
        "AdvMoE is more robust than AT (MoE)", _TABLE1, "table1", "above-other-baselines",
        ("AT (MoE) < AdvMoE",),
    ),
    PaperClaim("AdvMoE is more robust than AT (Dense)", f"abstract; {_TABLE1}", "table1", "above-dense"),
    PaperClaim(
        "AdvMoE is 1 to 4 points above AT (Dense): one at least", f"abstract; {_TABLE1}", "table1",
        "above-dense-by-a-point",
    ),
    PaperClaim(
        "AdvMoE is 1 to 5 points above AT (S-Dense), AT (Sparse) and AT (MoE): one at least", _TABLE1, "table1",
        "above-baselines-by-a-point",
    ),
    PaperClaim(
        "With WRN-28-10 AdvMoE is above AT (Dense) on all data", _TABLE1, "table1", "above-dense",
        setting="WRN-28-10",
    ),
    PaperClaim(
        "AdvMoE saves more than half of AT (Dense)'s inference", f"abstract; {_TABLE1}",
        "table1", "half-the-cost",
    ),
    PaperClaim(
        "Under AutoAttack AT (MoE) is less robust than AT (S-Dense)", _TABLE2, "table2", "ordering", (_MOE,),
        "AutoAttack",
    ),
    PaperClaim(
        "Under AutoAttack AdvMoE is more robust than AT (S-Dense)", _TABLE2, "table2", "ordering", (_OURS,),
        "AutoAttack",
    ),
    PaperClaim(
        "Under AutoAttack AdvMoE is more robust than AT (Sparse)", _TABLE2, "table2", "above-other-baselines",
        ("AT (Sparse) < AdvMoE",), "AutoAttack",
    ),
    PaperClaim(
        "Under AutoAttack AdvMoE is more robust than AT (MoE)", _TABLE2, "table2", "above-other-baselines",
        ("AT (MoE) < AdvMoE",), "AutoAttack",
    ),
    PaperClaim(
        "Under AutoAttack AdvMoE is more robust than AT (Dense)", _TABLE2, "table2", "above-dense", (),
        "AutoAttack",
    ),
    PaperClaim("On a ViT AdvMoE is more robust than AT (MoE)", _TABLE3, "table3", "vit-above-at"),
    PaperClaim("On a ViT AdvMoE is a point or more above AT (MoE)", _TABLE3, "table3", "vit-by-a-point"),
    PaperClaim(
        "On a ViT AdvMoE is at most a point less accurate on clean images than AT (MoE)", _TABLE3, "table3",
        "vit-keeps-accuracy",
    ),
    PaperClaim(
        "AT makes each kind of network more robust than standard training", "sec. 1, fig. 1b",
        "fig1b", "at-makes-robust",
    ),
    PaperClaim("Unlike Dense and S-Dense, MoE falls behind under AT", "sec. 1, fig. 1b", "fig1b", "ordering", (_MOE,)),
    PaperClaim(
        "MoE is at most a point below S-Dense, its lower bound, where both are trained without attacks",
        "sec. 3, fig. 1b",
        "fig1b", "s-dense-is-the-lower-bound",
    ),
    PaperClaim("AdvMoE is more robust than AT (Dense)", "sec. 1, fig. 1b", "fig1b", "above-dense"),
    PaperClaim("AT (MoE) is less robust than AT (S-Dense) at every radius", "sec. 3, fig. 2", "fig2", "drop"),
    PaperClaim(
        "AT (MoE) is less robust than AT (S-Dense) at the radius trained for", "sec. 3, fig. 2", "fig2",
        "ordering", (_MOE,),
    ),
    PaperClaim(
        "Robust routers make a standard MoE more robust (insight 1)", "sec. 4, fig. 3", "fig3", "insight-1",
        ("standard MoE < router-robustified MoE",),
    ),
    PaperClaim(
        "Robust routers alone do not reach AT (S-Dense) (insight 1)", "sec. 4, fig. 3", "fig3", "insight-1",
        ("router-robustified MoE < AT (S-Dense)",),
    ),
    PaperClaim("Robust routers do more than a robust mask", "sec. 4, fig. 3", "fig3", "above-the-mask"),
    PaperClaim(
        "More than half of what robust routers withstand fools the prediction (insight 2)", "sec. 4, fig. 4", "fig4",
        "insight-2", ("1 both survive < 3 only prediction fails, of images right clean",),
    ),
    PaperClaim(
        "Robust routers make the prediction more robust (insight 2)", "sec. 4, fig. 4", "fig4", "insight-2",
        ("standard MoE < router-robustified MoE",),
    ),
    PaperClaim(
        "Experts robustified after routers make the model more robust (insight 3)", "sec. 4, fig. 5", "fig5",
        "insight-3", ("router-robustified MoE < router-robustified MoE, then its experts",),
    ),
    PaperClaim(
        "Experts robustified after routers make the routers less robust (insight 3)", "sec. 4, fig. 5", "fig5",
        "insight-3", ("routers robust after < routers robust before",),
    ),
    PaperClaim(
        "AdvMoE converges, as far as both levels' training losses fall from the first epoch to the last",
        "sec. 4; app. C", "convergence", "converges",
    ),
    PaperClaim(
        "AT (MoE)'s routers are more fragile than AdvMoE's", "sec. 5.2, fig. 6", "fig6", "routers-of-at-moe-are-fragile"
    ),
    PaperClaim("AdvMoE's IoU with the static mask is closer to 0", "sec. 5.2, fig. 6", "fig6", "far-from-the-mask"),
    PaperClaim("AdvMoE's pathways are more diverse", "sec. 5.2, fig. 6", "fig6", "diverse-pathways"),
    PaperClaim("With N < 8 and r from 0.5 to 0.9 AdvMoE is above AT (Dense)", "sec. 5.2, fig. 7", "fig7", "moe-regime"),
    PaperClaim(
        "With N of 8 or more and r < 0.5 AdvMoE is below AT (Dense)", "sec. 5.2, fig. 7",
        "fig7", "ineffective-regime",
    ),
    PaperClaim("More experts are harder to make robust", "sec. 5.2, fig. 7", "fig7", "more-experts-are-harder"),
    PaperClaim("At every r AdvMoE is more robust than AT (S-Dense)", _FIG8, "fig8", "ordering", (_OURS,)),
    PaperClaim(
        "At every r AdvMoE is more robust than AT (Sparse) and AT (MoE)", _FIG8, "fig8",
        "above-other-baselines",
    ),
    PaperClaim("At every r AdvMoE is more robust than AT (Dense)", _FIG8, "fig8", "above-dense"),
    PaperClaim("What AdvMoE gains rises with r", _FIG8, "fig8", "gain-rises"),
    PaperClaim(
        "AT (MoE) is less robust than AT (S-Dense) whatever the attack steps in training", "sec. 5.2; app. C",
        "attack-steps", "ordering", (_MOE,),
    ),
    PaperClaim(
        "AdvMoE is more robust than AT (S-Dense) whatever the attack steps in training", "sec. 5.2; app. C",
        "attack-steps", "ordering", (_OURS,),
    ),
    PaperClaim("AdvMoE takes roughly twice the time of AT", "sec. 6", "efficiency", "twice-the-time"),
    PaperClaim(
        "A way to alternate that takes at most 1.3 of AT (MoE)'s time loses at most a point to the paper's", BEYOND,
        "efficiency", "advmoe-at-the-price-of-at",
    ),
    PaperClaim(
        "A way to alternate is at most a point below AT (S-Dense)", BEYOND, "efficiency", "no-worse-than-s-dense"
    ),
    PaperClaim(
        "The recipe best on validation images is more robust than AT (S-Dense)", BEYOND, "recipes", "worst-case-recipe"
    ),
    PaperClaim(
        "The routed arm best on validation images is more robust than AT (S-Dense)", BEYOND, "pathway",
        "worst-case-pathway",
    ),
    PaperClaim(
        "Taught by Dense that arm is more robust than S-Dense taught so", BEYOND, "pathway", "worst-case-taught"
    ),
)  # fmt: skip
