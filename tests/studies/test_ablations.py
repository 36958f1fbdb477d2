"""Attack steps in training, and convergence."""

from dataclasses import replace

import pytest

from advmoe.config import Config
from advmoe.studies.catalogue import STUDIES
from advmoe.studies.results import Results
from advmoe.studies.scales import scale_named


@pytest.mark.parametrize(
    ("scale", "eps"), [("cpu", "8/255"), ("paper", "8/255"), ("paper", "4/255"), ("smoke", 0.1)]
)  # fmt: skip
def test_k_steps_go_as_far_whatever_k(scale, eps):
    sized = replace(scale_named(scale), overrides={"threat": {"eps": eps}})
    rows = STUDIES["attack-steps"].stages[0](sized, Results())
    assert [row.run.labels["K"] for row in rows] == [1, 1, 1, 2, 2, 2, 5, 5, 5, 10, 10, 10]
    for row in rows:
        config = Config.from_dict(row.run.settings)
        assert config.training.attack_steps == row.run.labels["K"]
        far = config.training.attack_steps * config.training.step_size
        assert far == pytest.approx(1.25 * config.threat.eps)


def test_two_steps_are_the_runs_of_every_other_study():
    sized = scale_named("cpu")
    rows = STUDIES["attack-steps"].stages[0](sized, Results())
    usual = next(row.run for row in rows if row.run.labels["K"] == 2 and row.run.labels["method"] == "AdvMoE")
    assert Config.from_dict(usual.settings) == Config.from_dict(sized.run("AdvMoE").settings)


def test_convergence_is_the_loss_of_both_levels_epoch_by_epoch(row):
    def epoch(number, levels, robust):
        train = {part: {"ce": ce, "kl": kl, "accuracy": right} for part, (ce, kl, right) in levels.items()}
        return {"epoch": number, "seconds": 2.0 * number, "train": train, "val": {"robust_accuracy": robust}}

    epochs = [
        epoch(1, {"routers": (2.0, 0.5, 0.1), "experts": (1.5, 0.25, 0.2)}, 0.1),
        epoch(2, {"routers": (1.0, 0.5, 0.3), "experts": (0.5, 0.25, 0.4)}, 0.3),
    ]
    # A variant of Algorithm 1 may leave out a level in an epoch.
    epochs[1]["train"].pop("routers")
    plain = [epoch(1, {"all": (2.0, 0.0, 0.5)}, 0.2)]
    results = Results(
        [row({"method": "AdvMoE"}, {0: {"epochs": epochs}}), row({"method": "AT (MoE)"}, {0: {"epochs": plain}})]
    )
    outcome = STUDIES["convergence"].show(scale_named("smoke"), results)
    loss, right, validation = outcome.figures
    heights = {name: [point["y"] for point in series] for name, series in loss.data.items()}
    assert heights == {"AdvMoE: routers": [2.5, None], "AdvMoE: experts": [1.75, 0.75], "AT (MoE)": [2.0]}
    assert [point["y"] for point in right.data["AdvMoE: experts"]] == [20.0, 40.0]
    assert [point["y"] for point in validation.data["AdvMoE"]] == [10.0, 30.0]
    (claim,) = outcome.claims
    assert [(each["measure"], each["verdict"]) for each in claim["verdicts"]] == [
        ("routers", "undecided"), ("experts", "undecided"),
    ]  # fmt: skip
    # From 1.75 to 0.75; of the routers' level one epoch alone is known. One seed decides nothing.
    ends = [each["numbers"]["last epoch < first epoch"] for each in claim["verdicts"]]
    assert [(each["mean_more"], each["mean_less"], each["unit"]) for each in ends] == [
        (2.5, 2.5, "loss"), (1.75, 0.75, "loss"),
    ]  # fmt: skip
    first, second = outcome.tables[0]["rows"]
    assert (first["val"]["mean"], first["seconds"]["mean"]) == (30.0, 3.0)
    assert (second["val"]["mean"], second["seconds"]["mean"]) == (20.0, 2.0)
