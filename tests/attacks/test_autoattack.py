"""The adapter proposes what the official code does, bit for bit, and leaves nothing else behind."""

import logging
import sys
import warnings
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from torch import nn

from advmoe.attacks.autoattack import ATTACKS, autoattack, autoattack_attack, square
from advmoe.models import create_model
from advmoe.threat import ThreatModel

LINF, L2 = ThreatModel("linf", 0.3), ThreatModel("l2", 5.0)
NAMES = {"linf": "Linf", "l2": "L2"}


@pytest.fixture
def official():
    """The official package."""
    return pytest.importorskip("pyautoattack")


def directly(library, model, x, y, threat, seed, targets=9, **kwargs):
    """The official code, called as its documentation says, with `targets` classes to aim at."""
    attack = library.AutoAttack(model, norm=NAMES[threat.norm], eps=threat.eps, seed=seed, **kwargs)
    attack.apgd_targeted.n_target_classes = attack.fab.n_target_classes = targets
    with torch.random.fork_rng(devices=[]):
        return attack.run_standard_evaluation(x.contiguous(), y, batch_size=len(x))[0]


def robust_accuracy(model, x_adv, y):
    with torch.no_grad():
        return (model(x_adv).argmax(1) == y).float().mean().item()


@torch.no_grad()
def labelled(model, x, wrong=1):
    """The model's own classes for `x`, but for the first `wrong` images."""
    y = model(x).argmax(1)
    y[:wrong] = (y[:wrong] + 1) % model(x[:1]).shape[1]
    return y


def linear(classes, scale=1.0, size=8, seed=0):
    """A linear classifier of size x size images, in train mode."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * size * size, classes))
    generator = torch.Generator().manual_seed(seed)
    model[1].weight.data = scale * torch.randn(classes, 3 * size * size, generator=generator)
    model[1].bias.data.zero_()
    return model


def images(n, size=8, seed=0):
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def make_model(make_routed, shallow_backbones):
    """Small ResNets of ten classes by kind."""

    def make(kind):
        if kind == "moe":
            return make_routed(num_classes=10, width=4)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return create_model("resnet18", num_classes=10, kind="dense", width=4, input_size=16).eval()

    return make


@pytest.fixture
def stages(official, monkeypatch):
    """The official ensembles made from here on iterate less; holds each attack that ran with its number of images."""
    ran, complete = [], official.AutoAttack._set_version

    def set_version(ensemble, version):
        complete(ensemble, version)
        ensemble.apgd.n_iter = ensemble.apgd_targeted.n_iter = ensemble.fab.n_iter = 4
        ensemble.square.n_queries = 30
        for name in ("apgd", "apgd_targeted", "fab", "square"):
            attack = getattr(ensemble, name)
            attack.perturb = partial(counted, name, attack.perturb)

    def counted(name, perturb, x, y):
        ran.append((name, len(x)))
        return perturb(x, y)

    monkeypatch.setattr(official.AutoAttack, "_set_version", set_version)
    return ran


@pytest.mark.parametrize(
    "threat",
    [
        pytest.param(ThreatModel("linf", 0.02), id="linf"),
        pytest.param(ThreatModel("l2", 0.4), id="l2", marks=pytest.mark.slow),  # each attack agrees in l2 below
    ],
)
@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_standard_proposals_are_the_official_ones(official, stages, make_model, make_images, kind, threat):
    model, x = make_model(kind).requires_grad_(False), make_images(6, seed=3)
    y = labelled(model, x)
    proposals = autoattack(model, x, y, threat=threat, seed=7)
    ours = list(stages)
    expected = directly(official, model, x, y, threat, 7)
    assert torch.equal(proposals.x_adv, expected)
    assert torch.equal(proposals.x_adv[0], x[0])  # misclassified, hence not attacked
    assert stages == ours * 2 and [name for name, _ in ours] == ["apgd", "apgd_targeted", "fab", "square"]
    # APGD-T breaks some of the five that are right which APGD-CE did not, and some outlast every attack.
    counts = [count for _, count in ours]
    assert counts[0] == 5 >= counts[1] > counts[2] >= counts[3] > 0
    assert 0 < robust_accuracy(model, proposals.x_adv, y) == robust_accuracy(model, expected, y)
    assert proposals.flags == ()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fab-t", "square"])
def test_each_later_attack_agrees_on_a_routed_model(official, make_routed, make_images, name):
    model, x = make_routed().requires_grad_(False), make_images(2, seed=4)
    y = labelled(model, x, wrong=0)
    proposals = autoattack(model, x, y, threat=LINF, seed=1, version="custom", attacks=(name,))
    expected = directly(official, model, x, y, LINF, 1, targets=4, version="custom", attacks=[name])
    assert torch.equal(proposals.x_adv, expected) and robust_accuracy(model, expected, y) < 1


@pytest.mark.slow
def test_every_attack_of_the_standard_ensemble_runs_on_ten_classes(official):
    model, x, threat = linear(10).requires_grad_(False), images(2, seed=2), ThreatModel("linf", 0.02)
    y = labelled(model, x)
    proposals = autoattack(model, x, y, threat=threat, seed=0)
    assert torch.equal(proposals.x_adv, directly(official, model, x, y, threat, 0))
    assert robust_accuracy(model, proposals.x_adv, y) == 0.5  # so that none was skipped for want of images
    assert proposals.flags == ()


@pytest.mark.parametrize("name", ATTACKS)
def test_each_attack_agrees_in_l2(official, name):
    model, x = linear(10).requires_grad_(False), images(3, seed=2)
    y = labelled(model, x, wrong=0)
    proposals = autoattack(model, x, y, threat=L2, seed=2, version="custom", attacks=[name])
    expected = directly(official, model, x, y, L2, 2, version="custom", attacks=[name])
    assert torch.equal(proposals.x_adv, expected) and robust_accuracy(model, expected, y) < 1


@pytest.mark.parametrize("threat", [LINF, L2], ids=["linf", "l2"])
def test_square_is_the_official_one_and_needs_no_gradients(official, threat):
    model, x = linear(4, scale=0.1), images(4)
    y = labelled(model, x)

    def predict(pixels):
        assert not torch.is_grad_enabled() and pixels.is_contiguous()
        return model(pixels)

    strided = x.contiguous(memory_format=torch.channels_last)
    proposals = square(predict, strided, y, threat=threat, seed=5, queries=40)
    attack = official.AutoAttack(model, norm=NAMES[threat.norm], eps=threat.eps, seed=5)
    attack.square.n_queries = 40
    with torch.random.fork_rng(devices=[]):
        assert torch.equal(proposals.x_adv, attack.square.perturb(x, y))
    assert robust_accuracy(model, proposals.x_adv, y) < 0.75 and proposals.flags == ()


def test_attack_of_one_part_with_its_settings_on_record(official):
    model, x = linear(4), images(3)
    y = labelled(model, x)
    attack = autoattack_attack(model, threat=LINF)
    assert (attack.name, [part.name for part in attack.parts], attack.flags) == ("autoattack", ["autoattack"], ())
    names = ["apgd-ce", "apgd-t", "fab-t", "square"]
    assert attack.settings == {"version": "standard", "library": "pyautoattack 0.2.0", "attacks": names}
    proposals = attack.parts[0].run(x, y, 3)
    assert torch.equal(proposals.x_adv, autoattack(model, x, y, threat=LINF, seed=3).x_adv)
    custom = autoattack_attack(model, threat=LINF, version="custom", attacks=("square",))
    assert custom.name == "autoattack-custom" and custom.settings["attacks"] == ["square"]
    assert set(autoattack_attack(model, threat=LINF, version="plus").settings["attacks"]) == set(ATTACKS)


def test_warnings_become_flags_and_are_not_printed(official, capfd, monkeypatch):
    logger = logging.getLogger("auto-attack")
    monkeypatch.setattr(logger, "level", logging.DEBUG)
    before = logger.level, list(logger.handlers), logger.propagate, logger.disabled
    base = linear(4)

    def flat(x):  # rounded pixels: no gradient; softmax: probabilities in place of logits
        return base(x.round() + 0 * x).softmax(1)

    x = images(3)
    y = labelled(flat, x, wrong=0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        proposals = autoattack(
            flat, x, y, threat=ThreatModel("linf", 1e-4), seed=0, version="custom", attacks=("apgd-dlr",)
        )
    assert proposals.flags == (
        "it seems that the output is a probability distribution, please be sure that the logits are used!",
        "there are 3 points with zero gradient! This might lead to unreliable evaluation with gradient-based attacks."
        " (5 times)",
    )
    assert capfd.readouterr() == ("", "") and caught == []
    assert (logger.level, logger.handlers, logger.propagate, logger.disabled) == before


def test_only_the_official_code_s_own_warnings_are_taken(official, monkeypatch):
    base, check = linear(4), official.checks.check_square_sr
    x = images(2)

    def talking(x):
        warnings.warn("of the model", UserWarning, stacklevel=1)
        return base(x)

    # Without a logger it warns by `warnings`.
    monkeypatch.setattr(official.checks, "check_square_sr", lambda *_, **__: check({"clean": 1, "a": 0.9, "square": 0}))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        y = labelled(base, x)
        proposals = autoattack(talking, x, y, threat=LINF, seed=0, version="custom", attacks=("apgd-ce",))
    assert [flag[:53] for flag in proposals.flags] == ["Square Attack has decreased the robust accuracy of 90"]
    assert {str(each.message) for each in caught} == {"of the model"}


def test_one_dynamic_model_does_not_taint_the_next(official):
    base, x = linear(4), images(2)
    y = labelled(base, x)
    settings = {"threat": LINF, "seed": 0, "version": "custom", "attacks": ("apgd-ce",)}

    def dynamic(x):  # purifies its input by a gradient step of size 0
        with torch.enable_grad():
            inner = x.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(base(inner).sum(), inner)
        return base(x + 0 * gradient)

    said = "it seems to be a dynamic defense! The evaluation with AutoAttack might be insufficient."
    assert autoattack(dynamic, x, y, threat=LINF, seed=0, version="custom", attacks=["apgd-ce"]).flags == (said,)
    assert autoattack(base, x, y, **settings).flags == ()
    assert autoattack(dynamic, x, y, **settings).flags == (said,)


class Fails(nn.Module):
    """A linear classifier that raises at its call number `at`, in parts with modes of their own."""

    def __init__(self, at=None):
        super().__init__()
        self.body, self.drop, self.at, self.calls = linear(4), nn.Dropout(0.5), at, 0

    def forward(self, x):
        self.calls += 1
        if self.calls == self.at:
            raise RuntimeError("stop")
        assert not self.training and not self.drop.training and not any(p.requires_grad for p in self.parameters())
        return self.drop(self.body(x))


# Call 8 is the one made under a trace function: one for K, five and one for earlier checks come first.
@pytest.mark.parametrize("at", [None, 1, 8, 30])
def test_everything_is_restored_also_after_an_exception(official, at):
    model, x = Fails(at), images(2)
    model.train()
    model.drop.eval()
    model.body[1].bias.requires_grad_(False)
    y = labelled(model.body, x, wrong=0)

    def trace(*_):
        return None

    logger = logging.getLogger("auto-attack")
    before = logger.level, list(logger.handlers), logger.propagate, logger.disabled
    torch.manual_seed(11)
    random_state, original = torch.get_rng_state(), sys.gettrace()
    sys.settrace(trace)
    try:
        try:
            autoattack(model, x, y, threat=LINF, seed=0, version="custom", attacks=("fab",))
            failed = False
        except RuntimeError:
            failed = True
        traced = sys.gettrace()
    finally:
        sys.settrace(original)
    assert failed == (at is not None) and traced is trace
    assert torch.equal(torch.get_rng_state(), random_state)
    assert (logger.level, logger.handlers, logger.propagate, logger.disabled) == before
    assert model.training and model.body.training and not model.drop.training
    assert [p.requires_grad for p in model.parameters()] == [True, False]
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("threat", [LINF, L2], ids=["linf", "l2"])
@pytest.mark.parametrize(
    ("classes", "flags"),
    [
        (2, ("2 classes are too few for apgd-t (needs 4)", "2 classes allow only 1 of 9 targets")),
        (3, ("3 classes are too few for apgd-t (needs 4)", "3 classes allow only 2 of 9 targets")),
        (4, ("4 classes allow only 3 of 9 targets",)),
        (9, ("9 classes allow only 8 of 9 targets",)),
    ],
)
def test_few_classes_are_capped_and_labelled(official, classes, flags, threat):
    model, x = linear(classes), images(3, seed=1)
    y = labelled(model, x)
    proposals = autoattack(model, x, y, threat=threat, seed=0)
    assert proposals.flags[: len(flags)] == tuple(f"not standard AutoAttack: {flag}" for flag in flags)
    assert not any("possible" in flag for flag in proposals.flags)
    assert robust_accuracy(model, proposals.x_adv, y) == 0


def test_two_classes_run_where_nothing_breaks(official, stages):
    model, x = linear(2), images(2)
    y = labelled(model, x, wrong=0)
    small = ThreatModel("linf", 1e-6)
    proposals = autoattack(model, x, y, threat=small, seed=0, version="custom", attacks=("apgd-dlr", "fab", "fab-t"))
    assert proposals.flags == (
        "not custom AutoAttack: 2 classes are too few for apgd-dlr (needs 3)",
        "not custom AutoAttack: 2 classes allow only 1 of 9 targets",
    )
    assert torch.equal(proposals.x_adv, x)
    rand = autoattack(linear(5), x, labelled(linear(5), x, wrong=0), threat=LINF, seed=0, version="rand", num_classes=5)
    assert rand.flags == ()  # no attack of this version has targets


@pytest.mark.parametrize("count", [0, 1, 3])
def test_any_number_of_images_right_or_wrong(official, count):
    model, x = linear(4), images(3)[:count]
    right, wrong = labelled(model, images(3), 0)[:count], labelled(model, images(3), 3)[:count]
    for run in (
        lambda y: autoattack(model, x, y, threat=LINF, seed=0),
        lambda y: square(model, x, y, threat=LINF, seed=0, queries=300),
    ):
        assert torch.equal(run(wrong).x_adv, x)
        x_adv = run(right).x_adv
        assert x_adv.shape == x.shape and (x_adv - x).abs().le(0.3 + 1e-6).all()
        assert count == 0 or robust_accuracy(model, x_adv, right) == 0


def test_labels_of_small_integers_are_classes_not_masks(official):
    model, x = linear(4), images(3)
    y = labelled(model, x)
    narrow = autoattack(model, x, y.to(torch.uint8), threat=LINF, seed=0).x_adv
    assert torch.equal(narrow, autoattack(model, x, y, threat=LINF, seed=0).x_adv)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"version": "fast"}, "version must be one of standard, plus, rand, custom, got 'fast'"),
        ({"attacks": ("fab",)}, "attacks must be left out unless version is custom, got ('fab',) with 'standard'"),
        *(
            (
                {"version": "custom", "attacks": attacks},
                "attacks must be names out of apgd-ce, apgd-dlr, fab, square, apgd-t, fab-t for version custom, "
                f"got {attacks!r}",
            )
            for attacks in (("fab", "pgd"), (), None, "fab")
        ),
    ],
)
def test_unknown_names_are_refused(official, settings, text):
    with pytest.raises(ValueError) as error:
        autoattack(linear(4), images(1), torch.tensor([0]), threat=LINF, seed=0, **settings)
    assert str(error.value) == text
    with pytest.raises(ValueError) as error:
        autoattack_attack(linear(4), threat=LINF, **settings)
    assert str(error.value) == text


def test_unusable_input_is_refused(official):
    model, x, y = linear(4), images(2), torch.tensor([0, 1])
    cases = [
        (x, y[:1], {}, "labels must be of shape (2,), one for each image, got (1,)"),
        (x, y + 3, {}, "labels must lie in 0..3, got 4 for image 1"),
        (x + 1, y, {}, "pixels must lie in [0, 1], got values from 1"),
        (x, y, {"threat": 0.1}, "threat must be a ThreatModel(norm, eps), got 0.1"),
        (x, y, {"num_classes": 1}, "num_classes must be >= 2, got 1"),
        (
            x, y, {"version": "custom", "attacks": ["apgd-t"], "num_classes": 3},
            "attacks must hold one that 3 classes are enough for, got apgd-t",
        ),
    ]  # fmt: skip
    for images_, classes, settings, text in cases:
        with pytest.raises(ValueError) as error:
            autoattack(model, images_, classes, **{"threat": LINF, "seed": 0, **settings})
        assert str(error.value).startswith(text)
    for attack in (autoattack, partial(square, queries=1)):
        with pytest.raises(ValueError, match="x and y must be tensors, got list and Tensor"):
            attack(model, [[0.5]], y, threat=LINF, seed=0)
        with pytest.raises(ValueError, match=r"labels must lie in 0\.\.3, got 9 for image 0"):
            attack(model, x, y + 9, threat=LINF, seed=0)
    with pytest.raises(ValueError, match="queries must be >= 1, got 0"):
        square(model, x, y, threat=LINF, seed=0, queries=0)


def test_a_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    x, y = images(1), torch.tensor([0])
    for run in (
        lambda: autoattack(linear(4), x, y, threat=LINF, seed=0),
        lambda: square(linear(4), x, y, threat=LINF, seed=0, queries=1),
        lambda: autoattack_attack(linear(4), threat=LINF),
    ):
        with pytest.raises(ValueError) as error:
            run()
        text = str(error.value)
        assert text.startswith("autoattack needs the extra autoattack: pip install 'advmoe[autoattack]', got: ")
        assert "\n" not in text


@pytest.mark.parametrize("attacks", [["apgd-dlr", "fab"], ["fab-t"]], ids=lambda names: "+".join(names))
def test_a_bar_counts_the_passes_to_about_its_end(official, monkeypatch, attacks):
    model, x, threat = linear(5).requires_grad_(False), images(2, seed=2), ThreatModel("linf", 0.001)
    total, passes = [], []

    @contextmanager
    def counting(what, number, **_):
        total.append(number)
        yield lambda: passes.append(1)

    monkeypatch.setattr(sys.modules[autoattack.__module__], "counting", counting)
    autoattack(model, x, labelled(model, x, wrong=0), threat=threat, seed=0, version="custom", attacks=attacks)
    assert abs(len(passes) - total[0]) < 0.03 * total[0]  # nothing breaks at so small a radius


def test_a_bar_counts_the_queries_of_square(official, monkeypatch):
    model, x = linear(10).requires_grad_(False), images(2, seed=2)
    passes = []

    @contextmanager
    def counting(what, number, **_):
        assert (what, number) == ("square", 200)
        yield lambda: passes.append(1)

    monkeypatch.setattr(sys.modules[autoattack.__module__], "counting", counting)
    square(model, x, labelled(model, x, wrong=0), threat=ThreatModel("linf", 0.001), seed=0, queries=200)
    assert 200 <= len(passes) <= 205


@pytest.mark.parametrize("threat", [LINF, L2])
def test_half_precision_is_attacked_in_fp32(official, threat):
    model, x = linear(4).eval(), images(4).half()
    y = labelled(model, x.float(), wrong=0)
    seen = []

    def predict(z):
        seen.append(z.dtype)
        return model(z.float()).half()

    for proposals in (
        autoattack(predict, x, y, threat=threat, seed=0, version="custom", attacks=["apgd-ce"]),
        square(predict, x, y, threat=threat, seed=0, queries=20),
    ):
        assert proposals.x_adv.dtype == torch.float16 and proposals.x_adv.isfinite().all()
    assert set(seen) == {torch.float16}
    broken = autoattack(predict, x, y, threat=threat, seed=0, version="custom", attacks=["apgd-ce"]).x_adv
    assert robust_accuracy(model, broken.float(), y) < 1
