"""Accuracies of a classifier whose every answer is known by hand, and what an evaluation leaves alone."""

import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from advmoe.attacks.base import Attack, AttackPart, Proposals
from advmoe.config import AttackConfig, Pixels
from advmoe.data import ImageSet
from advmoe.errors import InputError
from advmoe.evaluation import accuracy
from advmoe.evaluation.accuracy import assess, evaluate
from advmoe.evaluation.outcomes import Measurement, outcomes, summary
from advmoe.evaluation.scoring import device_of, run_attack
from advmoe.evaluation.subject import Options
from advmoe.moe.routing import active_routing
from advmoe.threat import ThreatModel


class Threshold(nn.Module):
    """Class 1 where the first pixel exceeds 1/2, class 0 below."""

    def forward(self, x):
        score = 10 * (x[:, :1, 0, 0] - 0.5)
        return torch.cat([-score, score], 1)


# First pixel (of 255) and label. Within eps = 26/255 of the threshold 127.5 an image can be turned over.
#            robust      wrong       turned      robust    turned     robust (154 - 26 = 128 > 127.5)
PLANTED = [(250, 1), (200, 0), (140, 1), (10, 0), (110, 0), (154, 1)]
THREAT = ThreatModel("linf", 26 / 255)


def timeless(result):
    """A result without what differs from run to run."""
    for report in result["attacks"].values():
        report.pop("seconds")
    return result


def planted():
    images = torch.randint(0, 256, (6, 1, 2, 2), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images[:, 0, 0, 0] = torch.tensor([pixel for pixel, _ in PLANTED], dtype=torch.uint8)
    return ImageSet(images, torch.tensor([label for _, label in PLANTED]))


def test_planted_accuracies():
    result = evaluate(Threshold(), planted(), threat=THREAT, steps=20, step_size=0.02, restarts=2, seed=3)
    reports, checks = result.pop("attacks"), result.pop("checks")
    report, on_margin = reports["pgd-20"], reports["pgd-20-margin"]
    assert result == {
        "clean_accuracy": pytest.approx(5 / 6),
        "robust_accuracy": {"pgd-20": pytest.approx(3 / 6), "pgd-20-margin": pytest.approx(3 / 6)},
        "worst_case": pytest.approx(3 / 6),
        "masking_gap": 0,
        "gradient_passes": {"straight_through": 40, "worst_case": 80},
        "num_examples": 6,
        "threat": {"norm": "linf", "eps": 26 / 255},
        "attack": {
            "steps": 20,
            "step_size": 0.02,
            "restarts": 2,
            "pathways": 32,
            "queries": 25000,
            "batch_size": 250,
            "seed": 3,
        },
    }
    assert all(check["passed"] for check in checks)
    assert report.pop("seconds") > 0 and on_margin.pop("seconds") > 0
    assert on_margin == report | {"settings": {"steps": 20, "step_size": 0.02, "restarts": 2, "loss": "margin"}}
    assert report == {
        "robust_accuracy": pytest.approx(3 / 6),
        "interval": [pytest.approx(0.188, abs=1e-3), pytest.approx(0.812, abs=1e-3)],  # Wilson's, for 3 of 6
        "examples": 6,
        # The clean pass over 6; 20 steps on the 5 that are right, whose 3 survivors are started on again; passes that
        # decide what a restart is for (5 and, after the last, 3) and the final score of all 5.
        "model_calls": {"forward": 6 + 20 * 5 + 5 + 20 * 3 + 3 + 5, "gradient": 20 * 5 + 20 * 3},
        "gradient_passes": 40,
        "seed": 3,
        "flags": {},
        "parts": {"pgd": {"attempted": 5, "broken": 2}},
        "settings": {"steps": 20, "step_size": 0.02, "restarts": 2, "loss": "ce"},
    }


def test_examples_tell_what_became_of_each():
    attack = AttackConfig(steps=20, step_size=Pixels(0.02))
    measurement = Measurement(threat=THREAT, attack=attack, attacks=["pgd-20", "pgd-9-margin"])
    examples = assess(lambda _: Threshold(), planted(), measurement).examples
    assert examples["label"].tolist() == [1, 0, 1, 0, 0, 1]
    assert examples["clean_correct"].tolist() == [True, False, True, True, True, True]
    assert examples["clean_predicted"].tolist() == [1, 1, 1, 0, 0, 1]
    assert examples["pathway"].shape == (6, 0)
    for name in ("pgd-20", "pgd-9-margin"):
        assert examples[f"robust/{name}"].tolist() == [True, False, False, True, False, True]
        assert examples[f"predicted/{name}"].tolist() == [1, 1, 0, 0, 1, 1]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["pgd-0"], r"attacks must be one of routed.*pgd-STEPS.*, got 'pgd-0'"),
        (["autoatack"], "attacks must be one of .*got 'autoatack'"),
        (["autoattack:square+"], r"attacks must name parts of AutoAttack \(apgd-ce, .*\), got ''"),
        (["autoattack:apgd-ce+cube"], r"attacks must name parts of AutoAttack \(apgd-ce, .*\), got 'cube'"),
        (["pgd-5-soft"], "must not name soft routing for a model without MoE layers, got 'pgd-5-soft'"),
        (["pgd-5-dlr"], "attacks must not use the loss dlr for less than 3 classes, got 'pgd-5-dlr' for 2"),
        (["autoattack:apgd-dlr"], "must not use the loss dlr for less than 3 classes, got 'autoattack:apgd-dlr' for 2"),
    ],
)
def test_an_attack_that_cannot_be_made_is_named(names, message):
    with pytest.raises(ValueError, match=message):
        evaluate(Threshold(), planted(), attacks=names)


def test_steps_too_short_for_the_ball_are_flagged():
    result = evaluate(Threshold(), planted(), threat=THREAT, steps=2, step_size=0.05)
    flag = "2 steps of 0.05 cannot cross the ball from its centre to its edge, 26/255"
    assert result["attacks"]["pgd-2"]["flags"] == {flag: 1}


def test_a_failed_check_stops_the_attack_unless_allowed():
    class Probabilities(Threshold):
        def forward(self, x):
            return super().forward(x).softmax(1)

    with pytest.raises(ValueError, match=r"logits: .*--allow logits"):
        evaluate(Probabilities(), planted(), threat=THREAT)
    result = evaluate(Probabilities(), planted(), threat=THREAT, steps=2, allow=["logits", "gradients"])
    assert not next(check for check in result["checks"] if check["name"] == "logits")["passed"]


def test_proposals_are_brought_back_into_the_ball_and_scored_again():
    def liar(x, y, seed):
        """Claims the other class's pixel, far outside the ball, and one that is no number."""
        wild = torch.where(y[:, None, None, None] == 1, -5.0, 5.0).expand_as(x).clone()
        wild[0] = torch.nan
        return Proposals(wild)

    x, y = planted().pixels(slice(None)), planted().labels
    attack = Attack("liar", (AttackPart("lie", liar),))
    found = run_attack(attack, Threshold(), x, y, threat=THREAT, purpose=(0,))
    assert ((found.x_adv - x).abs() <= THREAT.eps + 1e-6).all() and ((found.x_adv >= 0) & (found.x_adv <= 1)).all()
    assert torch.equal(found.x_adv[0], x[0])  # no numbers: the clean image stands
    assert torch.equal(found.x_adv[1], x[1])  # wrong without an attack: left alone
    assert found.robust.tolist() == [True, False, False, True, False, True]
    assert found.parts == [{"name": "lie", "attempted": 5, "broken": 2}]


@pytest.mark.parametrize("batch_size", [1, 4, 6])
def test_outcomes_are_per_example_and_in_order(batch_size):
    attack = AttackConfig(steps=20, step_size=Pixels(0.02))
    robust = outcomes(Threshold(), planted(), Measurement(threat=THREAT, attack=attack, batch_size=batch_size))
    assert robust["clean"].tolist() == [True, False, True, True, True, True]
    assert robust["pgd-20"].tolist() == [True, False, False, True, False, True]


def test_a_radius_of_0_is_clean_accuracy():
    result = evaluate(Threshold(), planted(), threat=ThreatModel("linf", 0), steps=3)
    assert result["robust_accuracy"]["pgd-3"] == result["clean_accuracy"]


def test_bytes_and_pixels_agree():
    data = planted()
    pixels = (data.images.float() / 255, data.labels)
    assert timeless(evaluate(Threshold(), data, threat=THREAT, steps=5)) == timeless(
        evaluate(Threshold(), pixels, threat=THREAT, steps=5)
    )


@pytest.fixture
def routed(make_routed, make_images):
    """A routed model, and images labelled by it, so that its clean accuracy is 1."""
    model, x = make_routed(router="embedding"), make_images(16, seed=5)
    with torch.no_grad():
        return model, x, model(x).argmax(1)


def test_a_routed_model_faces_soft_routing_too(routed):
    model, x, y = routed
    threat, attack = ThreatModel("linf", 4 / 255), AttackConfig(steps=3, step_size=Pixels(2 / 255))
    robust = outcomes(model, (x, y), Measurement(threat=threat, attack=attack, batch_size=16))
    assert list(robust) == ["clean", "pgd-3", "pgd-3-soft"]
    assert robust["clean"].all()
    worst = summary(robust)["worst_case"]
    assert worst == (robust["pgd-3"] & robust["pgd-3-soft"]).float().mean().item()
    # The two ways find different examples here, and the model as deployed decided both.
    assert not torch.equal(robust["pgd-3"], robust["pgd-3-soft"])


def test_gradients_come_from_soft_routing_and_the_score_from_hard(routed):
    model, x, y = routed
    modes = []

    def note(module, args):
        modes.append((active_routing().mode, torch.is_grad_enabled()))

    handle = model.backbone.register_forward_pre_hook(note)
    outcomes(model, (x, y), Measurement(threat=ThreatModel("linf", 1 / 255), attack=AttackConfig(steps=2)))
    handle.remove()
    # A look for MoE layers; clean; for each attack who is right, two steps (hard, then soft) and the score.
    hard, soft, score = [("hard", True)] * 2, [("soft", True)] * 2, ("hard", False)
    assert modes == [score, score, score, *hard, score, score, *soft, score]


def test_the_model_is_measured_in_eval_mode_and_restored(routed):
    model, x, y = routed
    expected = timeless(evaluate(model, (x, y), steps=2))
    model.train().backbone.stem.eval()
    model.backbone.classifier.weight.requires_grad_(False)
    modes, wanted = [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    assert timeless(evaluate(model, (x, y), steps=2)) == expected
    assert [m.training for m in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == wanted
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_restored_after_a_failure_too():
    class Failing(Threshold):
        def forward(self, x):
            seen.append((self.training, torch.backends.cudnn.allow_tf32))
            raise RuntimeError("planned")

    seen, model, tf32 = [], Failing(), torch.backends.cudnn.allow_tf32
    try:
        torch.backends.cudnn.allow_tf32 = True
        with pytest.raises(ValueError, match="RuntimeError: planned"):
            evaluate(model, planted())
        assert seen == [(False, False)]
        assert model.training and torch.backends.cudnn.allow_tf32
    finally:
        torch.backends.cudnn.allow_tf32 = tf32


def test_the_same_seed_gives_the_same_attack(routed):
    model, x, y = routed
    starts = []
    for seed in (0, 0, 1):
        seen = []
        handle = model.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0].detach().clone()))
        outcomes(model, (x, y), Measurement(threat=ThreatModel(), attack=AttackConfig(steps=1), seed=seed))
        handle.remove()
        starts.append(seen[3])  # after the look for MoE layers, the clean pass, and the one that tells who is right
    assert torch.equal(starts[0], starts[1]) and not torch.equal(starts[0], starts[2])


@pytest.mark.parametrize("data", [(torch.empty(0, 1, 2, 2), torch.empty(0, dtype=torch.long)), "ImageSet"])
def test_empty_data_is_an_error(data):
    if data == "ImageSet":
        data = ImageSet(torch.empty(0, 1, 2, 2, dtype=torch.uint8), torch.empty(0, dtype=torch.long))
    with pytest.raises(ValueError, match=r"data must hold at least 1 example.*got 0 images, 0 labels"):
        evaluate(Threshold(), data)


def test_pixels_outside_the_range_are_an_error():
    data = planted()
    with pytest.raises(ValueError, match=r"pixels must lie in \[0, 1\]"):
        evaluate(Threshold(), (data.images.float(), data.labels))


@pytest.mark.parametrize("names", [["pgd-1", "autoattack"], ["pgd-1", "routed"]])
def test_a_missing_extra_is_named_before_anything_runs(routed, names, monkeypatch):
    model, x, y = routed
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    calls = []
    model.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    with pytest.raises(ValueError, match=r"extra autoattack.*pip install 'advmoe\[autoattack\]'"):
        evaluate(model, (x, y), attacks=names)
    assert calls == [1]  # the look for MoE layers
    if "routed" in names:  # without queries nothing of it is needed
        evaluate(model, (x, y), attacks=["routed"], steps=1, queries=0)


def test_attacks_may_be_one_string():
    assert Options(attacks="pgd-1, pgd-2,").attacks == ["pgd-1", "pgd-2"]
    told = evaluate(Threshold(), planted(), attacks="pgd-1, pgd-2,", threat=ThreatModel("linf", 0.1))
    assert list(told["robust_accuracy"]) == ["pgd-1", "pgd-2"]


@pytest.mark.parametrize("threat", [("linf", 0.1), "linf", 0.1, {"norm": "linf"}])
def test_a_threat_of_another_kind_is_refused(threat):
    with pytest.raises(ValueError, match=r"^threat must be a ThreatModel\(norm, eps\), got "):
        evaluate(Threshold(), planted(), threat=threat)


@pytest.mark.parametrize("attacks", [[], "", " , "])
def test_no_attack_at_all_is_refused(attacks):
    with pytest.raises(ValueError, match=r"^attacks must name at least one attack, got none$"):
        evaluate(Threshold(), planted(), attacks=attacks)


@pytest.mark.parametrize("attacks", [5, torch.sin, b"pgd-1"])
def test_attacks_of_another_kind_are_refused(attacks):
    with pytest.raises(ValueError, match=r"^attacks must be names and functions in a list, got "):
        evaluate(Threshold(), planted(), attacks=attacks)


def test_what_is_measured_is_fp32_whichever_flags_are_set():
    conv, matmul = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    before = conv.fp32_precision, matmul.fp32_precision
    seen = []

    class Watching(Threshold):
        def forward(self, x):
            seen.append((conv.fp32_precision, matmul.fp32_precision))
            return super().forward(x)

    try:
        for precision in ("tf32", "ieee"):  # of these the second cannot be read by the older names
            conv.fp32_precision, matmul.fp32_precision = precision, "tf32"
            evaluate(Watching(), planted(), threat=THREAT, steps=1, step_size=0.2)
            assert (conv.fp32_precision, matmul.fp32_precision) == (precision, "tf32")
    finally:
        conv.fp32_precision, matmul.fp32_precision = before
    assert seen and all(each[1] == "ieee" and each[0] in ("ieee", "none") for each in seen)


def test_by_default_images_are_put_where_the_module_is(monkeypatch):
    class Elsewhere(nn.Module):
        def __init__(self, buffer):
            super().__init__()
            tensor = torch.ones(1, device="meta")
            if buffer:
                self.register_buffer("b", tensor)
            else:
                self.p = nn.Parameter(tensor)

    assert device_of(Elsewhere(False)) == device_of(Elsewhere(True)) == torch.device("meta")
    assert device_of(nn.Identity()) == device_of(lambda x: x) == torch.device("cpu")
    chosen = []
    monkeypatch.setattr(
        accuracy, "assess", lambda *_, execution, **__: chosen.append(execution.devices()) or SimpleNamespace(result={})
    )
    for model in (Elsewhere(False), nn.Identity(), lambda x: x):
        evaluate(model, planted())
    evaluate(Elsewhere(False), planted(), device="cpu")
    assert chosen == [[torch.device(name)] for name in ("meta", "cpu", "cpu", "cpu")]


X, Y = torch.rand(4, 3, 2, 2), torch.tensor([0, 1, 2, 0])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"data": None}, r"^data must be \(pixels"), ({"data": ((X, Y), (X, Y))}, r"^data must be \(pixels"),
        ({"batch_size": 2.5}, "^batch_size must be a whole number, got 2.5"),
        ({"allow": None}, "^allow must be names of checks, got None"),
        ({"device": "foo"}, "^device must be one that PyTorch knows, got 'foo'"),
        ({"seed": 0.5}, "^a seed must be a whole number, got 0.5"),
    ],
)  # fmt: skip
def test_what_evaluate_is_given_is_checked(changed, message):
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    with torch.no_grad():  # so that it is wrong about every image, of which none is attacked
        model[1].bias.copy_(torch.tensor([-9.0, 0.0, -9.0]))
    wrong = Y.clone().fill_(2)
    for labels in (Y, wrong):
        given = {"model": model, "data": (X, labels), "attacks": "pgd-1", **changed}
        with pytest.raises(InputError, match=message):
            evaluate(**given)
