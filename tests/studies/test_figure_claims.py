"""What the paper reads off figures 2, 6, 7 and 8, on made-up results of five seeds."""

import pytest

from advmoe.studies.figure_claims import by_scale, drops, pathway_claims, regimes
from advmoe.studies.results import Results


def verdicts(claims):
    return {claim["name"]: {each["measure"]: each["verdict"] for each in claim["verdicts"]} for claim in claims}


def swept(shares, less=0.0):
    """A sweep: robust accuracy by radius in 1/255, `less` in the worst case."""

    def curve(off):
        return {"points": [{"eps": radius / 255, "robust_accuracy": share - off} for radius, share in shares.items()]}

    return "sweep", {"curves": {"pgd-10": curve(0.0), "worst case": curve(less)}}, {}


def test_every_radius_of_figure_2_is_judged(row):
    """At 4/255 MoE is below, at 8/255 level under PGD and above in the worst case; at 0 nothing is attacked."""
    dense = {seed: {"sweep": swept({0: 0.9, 4: 0.6, 8: 0.3}, less=0.2)} for seed in range(5)}
    moe = {seed: {"sweep": swept({0: 0.8, 4: 0.5, 8: 0.3}, less=0.1)} for seed in range(5)}
    results = Results([row({"method": "AT (S-Dense)"}, dense), row({"method": "AT (MoE)"}, moe)])
    assert verdicts(drops(results)) == {
        "drop, 4/255": {"PGD": "holds", "worst of three": "undecided"},
        "drop, 8/255": {"PGD": "undecided", "worst of three": "does not hold"},
    }
    numbers = drops(results)[0]["verdicts"][0]["numbers"]["AT (MoE) < AT (S-Dense)"]
    assert numbers["mean_less"] == pytest.approx(0.5) and numbers["p_seeds"] == 1 / 32
    assert drops(Results()) == []


def test_a_radius_is_judged_by_its_images_where_all_sweeps_kept_them(row):
    """Of 100 images MoE loses 10, the same with every seed."""

    def kept(right):
        name, content, _ = swept({4: right / 100}, less=0.0)
        marks = [image < right for image in range(100)]
        images = {"index": list(range(100)), **{f"{attack}/{4 / 255!r}": marks for attack in content["curves"]}}
        return {"sweep": (name, content, {"sweep_examples": images})}

    dense = dict.fromkeys(range(5), kept(60))
    moe = dict.fromkeys(range(5), kept(50))
    (claim,) = drops(Results([row({"method": "AT (S-Dense)"}, dense), row({"method": "AT (MoE)"}, moe)]))
    for verdict in claim["verdicts"]:
        (numbers,) = verdict["numbers"].values()
        assert verdict["verdict"] == "holds" and numbers["images"] == 100 and numbers["p_crossed"] < 0.01
        assert numbers["mean_more"] == 0.6 and numbers["mean_less"] == 0.5
    moe[4] = {"sweep": swept({4: 0.5})}
    (claim,) = drops(Results([row({"method": "AT (S-Dense)"}, dense), row({"method": "AT (MoE)"}, moe)]))
    (numbers,) = claim["verdicts"][0]["numbers"].values()
    assert "images" not in numbers and numbers["p_seeds"] == 1 / 32


def traced(clean, attacked, mean, std, distinct, entropy, unchanged="1110"):
    """Pathways: the IoU's distributions, its mean and spread, and how many pathways there are."""
    parts = {"clean": clean, "adversarial": attacked}
    against = {
        kind: {"mean": mean, "std": std, "histogram": {"edges": [0, 0.5, 1], "shares": shares}}
        for kind, shares in parts.items()
    }
    arrays = {"index": list(range(8)), "unchanged": [mark == "1" for mark in 2 * unchanged]}
    content = {"clean": {"distinct": distinct, "entropy": entropy}, "against": against}
    return "pathways", content, {"pathways_examples": arrays}


def test_pathways_far_from_the_mask_and_diverse(row):
    def results(ours, theirs):
        rows = {"AdvMoE": ours, "AT (MoE)": theirs}
        return Results(
            [row({"method": name}, {seed: {"pathways": each} for seed in range(5)}) for name, each in rows.items()]
        )

    # Closer to 0, wider, flatter, with more pathways; moved by the attack as far.
    wide, narrow = traced([0.5, 0.5], [0.5, 0.5], 0.2, 0.2, 9, 3.0), traced([0.9, 0.1], [0.9, 0.1], 0.4, 0.1, 4, 1.0)
    told = verdicts(pathway_claims(results(wide, narrow)))
    assert told == {
        "routers-of-at-moe-are-fragile": {"PGD": "undecided", "shift of the IoU under PGD": "undecided"},
        "far-from-the-mask": {"IoU, clean": "holds", "IoU under PGD": "holds"},
        "diverse-pathways": dict.fromkeys(
            ("spread of the IoU", "peak of the IoU", "distinct pathways", "entropy"), "holds"
        ),
    }
    swapped = verdicts(pathway_claims(results(narrow, wide)))
    assert {each for name in ("far-from-the-mask", "diverse-pathways") for each in swapped[name].values()} == {
        "does not hold"
    }
    # Half of their images change bins, none of ours.
    moved = traced([0.5, 0.5], [1.0, 0.0], 0.4, 0.1, 4, 1.0, unchanged="0000")
    fragile = pathway_claims(results(wide, moved))[0]
    assert [each["verdict"] for each in fragile["verdicts"]] == ["holds", "holds"]
    shift = fragile["verdicts"][1]["numbers"]["AdvMoE < AT (MoE)"]
    assert (shift["mean_more"], shift["mean_less"]) == (0.5, 0.0)
    bits = pathway_claims(results(wide, narrow))[2]["verdicts"][3]["numbers"]["AT (MoE) < AdvMoE"]
    assert (bits["unit"], bits["mean_more"], bits["mean_less"]) == ("bits", 3.0, 1.0)


@pytest.fixture
def row_of(row, evaluated):
    """Makes a row of five seeds that is right on so many tenths of 100 images, on one tenth less in the worst case."""

    def make(method, right, **labels):
        attacks = {"pgd-10": ("1" * right + "0" * (10 - right)) * 10, "pgd-10-margin": ("0" + "1" * 9) * 10}
        measured = {"accuracy": evaluated("1" * 100, attacks)}
        return row({"method": method, **labels}, dict.fromkeys(range(5), measured))

    return make


def test_the_regimes_of_experts_and_their_size(row_of):
    """Above AT (Dense) with few experts of some size, below it with many small ones; elsewhere nothing is claimed."""
    right = {(2, 0.2): 4, (2, 0.5): 8, (4, 0.5): 6, (8, 0.2): 2, (8, 0.5): 3}
    moe = [row_of("AdvMoE", number, experts=n, scale=r) for (n, r), number in right.items()]
    dense = [row_of("AT (Dense)", 7, experts=n) for n in (2, 4, 8)]
    told = verdicts(regimes(Results([*dense, *moe])))
    assert {name: each["PGD"] for name, each in told.items()} == {
        "moe-regime, N = 2, r = 0.5": "holds", "moe-regime, N = 4, r = 0.5": "does not hold",
        "ineffective-regime, N = 8, r = 0.2": "holds", "more-experts-are-harder, r = 0.2": "holds",
        "more-experts-are-harder, r = 0.5": "holds",
    }  # fmt: skip
    claims = {claim["name"]: claim for claim in regimes(Results([*dense, *moe]))}
    (name,) = claims["moe-regime, N = 2, r = 0.5"]["verdicts"][0]["numbers"]
    assert name == "AT (Dense) < AdvMoE, N = 2, r = 0.5"
    assert verdicts(regimes(Results(moe[:1]))) == {}


def test_what_advmoe_gains_with_r(row_of):
    right = {0.2: {"AT (S-Dense)": 3, "AdvMoE": 3}, 0.8: {"AT (S-Dense)": 4, "AdvMoE": 8}}
    rows = [row_of(name, number, scale=r) for r, each in right.items() for name, number in each.items()]
    told = verdicts(by_scale(Results([row_of("AT (Dense)", 5), *rows]), ", here"))
    assert told["above-dense, here, r = 0.8"]["PGD"] == "holds"
    assert told["above-dense, here, r = 0.2"]["PGD"] == "does not hold"
    assert told["gain-rises, here"] == {"PGD": "holds", "worst case": "holds"}
    one = by_scale(Results([row_of("AT (Dense)", 5), *rows[:2]]), "")
    assert not any(claim["name"].startswith("gain-rises") for claim in one)
