"""What follows from which examples survive which attacks, worked by hand."""

import pytest
import torch

from advmoe.config import AttackConfig
from advmoe.evaluation.outcomes import Measurement, applicable, gradient_passes, make_job, masking_gap, summary
from advmoe.threat import ThreatModel


def test_the_worst_case_is_the_conjunction():
    robust = {"clean": [1, 1, 1, 1, 0], "pgd-5": [1, 0, 1, 1, 0], "pgd-5-soft": [0, 1, 1, 1, 0]}
    result = summary({name: torch.tensor(values).bool() for name, values in robust.items()})
    assert result == {
        "clean_accuracy": pytest.approx(0.8),
        "robust_accuracy": {"pgd-5": pytest.approx(0.6), "pgd-5-soft": pytest.approx(0.6)},
        "worst_case": pytest.approx(0.4),  # the third and fourth: no single attack shows it
        "num_examples": 5,
    }


def test_the_gap_is_measured_from_the_strongest_plain_pgd():
    survivors = {
        "clean": [1, 1, 1, 1, 0],
        "pgd-2": [1, 1, 1, 0, 0],
        "pgd-50": [1, 1, 0, 0, 0],  # the strongest: 2 of 5
        "pgd-50-margin": [1, 0, 0, 0, 0],
        "pgd-50-soft": [0, 1, 0, 0, 0],
    }
    robust = {name: torch.tensor(each).bool() for name, each in survivors.items()}
    assert masking_gap(robust) == pytest.approx(0.4)  # nothing outlasts all
    assert masking_gap({name: robust[name] for name in ("clean", "pgd-2", "pgd-50")}) == 0
    assert masking_gap({name: robust[name] for name in ("clean", "pgd-50-margin")}) is None


def test_passes_are_those_of_the_pgd_that_the_gap_starts_from_and_of_all_attacks():
    numbers = {"pgd-2": (0.6, 2), "pgd-50": (0.4, 50), "pgd-50-margin": (0.2, 50), "routed": (0.1, 1460)}
    entries = {name: {"robust_accuracy": ra, "gradient_passes": made} for name, (ra, made) in numbers.items()}
    entries["autoattack"] = {"skipped": "of no use"}
    assert gradient_passes(entries) == {"straight_through": 50, "worst_case": 1562}
    del entries["pgd-2"], entries["pgd-50"]
    assert gradient_passes(entries) == {"straight_through": None, "worst_case": 1510}
    entries["routed"]["gradient_passes"] = None  # begun by an earlier version
    assert gradient_passes(entries) == {"straight_through": None, "worst_case": None}


def test_a_batch_of_no_image_is_an_error():
    with pytest.raises(ValueError, match=r"^batch_size must be a whole number >= 1, got 0$"):
        Measurement(threat=ThreatModel(), attack=AttackConfig(), batch_size=0)


@pytest.mark.parametrize("eot", ["3", [2], 2.5, float("nan"), True, 0])
def test_draws_to_be_averaged_are_a_whole_number(eot):
    with pytest.raises(ValueError, match=r"^eot must be a whole number >= 1, got "):
        Measurement(threat=ThreatModel(), attack=AttackConfig(), eot=eot)


def test_routed_adds_nothing_for_a_plain_model():
    def plain(x):
        return x.flatten(1)[:, :2]

    data = torch.rand(2, 1, 2, 2), torch.tensor([0, 1])
    attack = AttackConfig(steps=3)
    names = ("routed", "pgd"), ("routed",)
    for attacks in names:
        measurement = Measurement(threat=ThreatModel(), attack=attack, attacks=attacks, batch_size=1, seed=4)
        job, wanted = make_job(plain, data, measurement, torch.device("cpu"))
        assert (job.batch_size, job.seed, job.setting.routed) == (1, 4, False)
        if "pgd" in attacks:
            assert wanted == ("routed", "pgd-3") and applicable(wanted, job) == ("pgd-3",)
        else:
            with pytest.raises(ValueError, match="attacks must hold more than routed"):
                applicable(wanted, job)
