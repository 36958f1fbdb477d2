"""Each check fails the model planted for it, with a value known by hand, and healthy models pass them all."""

import json
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from advmoe.evaluation.accuracy import evaluate
from advmoe.evaluation.checks import ALLOWABLE, CHECKS, Check, check, check_data, require_passed
from advmoe.models import create_model


class Threshold(nn.Module):
    """Logits (-s, s) with s = scale * (first pixel - 1/2), before `change`."""

    def __init__(self, scale=1.0, change=lambda logits: logits):
        super().__init__()
        self.scale, self.change = scale, change

    def forward(self, x):
        score = self.scale * (x[:, :1, 0, 0] - 0.5)
        return self.change(torch.cat([-score, score], 1))


def images(*first_pixels):
    x = torch.full((len(first_pixels), 1, 2, 2), 0.5)
    x[:, 0, 0, 0] = torch.tensor(first_pixels)
    return x


X, Y = images(0.2, 0.4, 0.9), torch.tensor([0, 1, 1])


def checked(predict, x=X, y=Y, **kwargs):
    return {each.name: each for each in check(predict, x, y, **kwargs)}


def failing(predict, x=X, y=Y, **kwargs):
    return [each.name for each in check(predict, x, y, **kwargs) if not each.passed]


def test_a_healthy_classifier_passes_with_these_values():
    checks = check(Threshold(), X, Y, num_classes=2)
    assert [(each.name, each.passed, each.value) for each in checks] == [(name, True, 0) for name in CHECKS]
    assert [each.detail for each in checks] == [
        "from 0.2 to 0.9",
        "2 classes in 3 images",
        "2 classes, from -0.4 to 0.4",
        "logits of two equal passes differ by 0 (limit 0)",
        "logits alone and in the batch differ by 0 (limit 0.0001)",
        "0 of 3 images have a gradient of exactly 0, 0 one of NaN or inf (limit 5% of the images)",
    ]


@pytest.mark.parametrize("kwargs", [{"kind": "dense"}, {"router": "layer"}, {"router": "embedding"}], ids=str)
def test_healthy_models_of_ours_pass(make_routed, make_images, kwargs):
    model = make_routed(**kwargs) if "router" in kwargs else _dense()
    x = make_images(16, seed=3)
    before, state = x.clone(), torch.get_rng_state()
    checks = check(model, x, torch.arange(16) % 5, num_classes=5)
    assert [each.name for each in checks] == list(CHECKS)
    assert all(each.passed for each in checks), checks
    require_passed(checks)
    assert torch.equal(x, before) and not x.requires_grad and torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())


def _dense():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return create_model("resnet18", kind="dense", num_classes=5, width=8, input_size=16).eval()


def test_a_plain_function_and_bf16_logits_are_checked_too():
    assert failing(lambda x: Threshold()(x)) == []
    assert failing(lambda x: Threshold()(x).bfloat16()) == []


# Pixels and labels


@pytest.mark.parametrize(
    ("x", "wrong", "detail"),
    [
        (images(0.5, math.nan, math.nan), 2, "pixels must lie in [0, 1], got NaN in image 1"),
        (images(0.5, 0.0, 3.0), 1, "pixels must lie in [0, 1], got values from 0 to 3"),
        (images(-0.25, 0.0, math.inf), 2, "pixels must lie in [0, 1], got values from -0.25 to inf"),
        (images(0.5, 1.0, 1 + 2**-23), 1, "pixels must lie in [0, 1], got values from 0.5 to 1.0000001"),
        (X.to(torch.uint8), 3, "pixels must be floating-point in [0, 1], got torch.uint8"),
        (X.long(), 3, "pixels must be uint8, or floating-point in [0, 1], got torch.int64"),
        (X[:, 0], 3, "images must be of shape (N, C, H, W), none of them 0, got (3, 2, 2)"),
    ],
)
def test_bad_pixels_are_not_shown_to_the_model(x, wrong, detail):
    checks = check(lambda x: pytest.fail("the model ran"), x, Y)
    assert [each.name for each in checks] == ["pixels", "labels"]
    assert checks[0] == Check("pixels", False, wrong, detail, fatal=True)


@pytest.mark.parametrize(
    ("y", "wrong", "detail"),
    [
        ([0, 2, 12], 2, "labels must lie in 0..1, got 2 for image 1"),
        ([0, -1, 1], 1, "labels must lie in 0..1, got -1 for image 1"),
        ([0.0, 1.0, 1.0], 3, "labels must be integers in 0..1, got torch.float32"),
        ([True, False, True], 3, "labels must be integers in 0..1, got torch.bool"),
        ([0, 1], 3, "labels must be of shape (3,), one for each image, got (2,)"),
        ([[0], [1], [1]], 3, "labels must be of shape (3,), one for each image, got (3, 1)"),
    ],
)
def test_bad_labels(y, wrong, detail):
    checks = checked(Threshold(), y=torch.tensor(y))
    assert checks["labels"] == Check("labels", False, wrong, detail, fatal=True)
    assert list(checks) == list(CHECKS[:-1])  # no cross-entropy without classes


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
def test_labels_of_any_integer_type_pass(dtype):
    assert failing(Threshold(), y=Y.to(dtype)) == []
    assert failing(Threshold(), y=torch.tensor([0, 1, 200], dtype=torch.uint8)) == ["labels"]


def test_a_whole_data_set():
    pixels, labels = torch.rand(20, 3, 4, 4), torch.arange(20) % 10
    check_data(pixels, labels, 10)
    check_data((pixels * 255).to(torch.uint8), labels.to(torch.uint8), 10)
    check_data(pixels, torch.full((20,), 240, dtype=torch.uint8), 1000)
    check_data(pixels.half().contiguous(memory_format=torch.channels_last), labels, 1000)


def spoilt(tensor, value, *at):
    tensor = tensor.clone()
    tensor[at] = value
    return tensor


PIXELS, LABELS = torch.linspace(0, 1, 20 * 3 * 4 * 4).view(20, 3, 4, 4), torch.arange(20) % 10


@pytest.mark.parametrize(
    ("pixels", "labels", "message"),
    [
        (PIXELS[:0], LABELS[:0], "data must hold at least 1 example, and a class for each, got 0 images, 0 labels"),
        (PIXELS, LABELS[:3], "data must hold at least 1 example, and a class for each, got 20 images, 3 labels"),
        (spoilt(PIXELS, math.nan, 17, 1, 2, 3), LABELS, "pixels must lie in [0, 1], got NaN in image 17"),
        (spoilt(PIXELS, 2.5, 3, 0), LABELS, "pixels must lie in [0, 1], got values from 0 to 2.5"),
        (PIXELS * 255, LABELS, "pixels must lie in [0, 1], got values from 0 to 255"),
        (PIXELS.int(), LABELS, "pixels must be uint8, or floating-point in [0, 1], got torch.int32"),
        (PIXELS, spoilt(LABELS, 12, 3), "labels must lie in 0..9, got 12 for image 3"),
        (PIXELS, LABELS.float(), "labels must be integers in 0..9, got torch.float32"),
    ],
)
def test_a_whole_data_set_at_fault(pixels, labels, message):
    with pytest.raises(ValueError) as error:
        check_data(pixels, labels, 10)
    assert str(error.value) == message


# Logits


@pytest.mark.parametrize(
    ("change", "got"),
    [
        (lambda logits: logits[:, :1], "torch.float32 of shape (3, 1)"),
        (lambda logits: logits[:2], "torch.float32 of shape (2, 2)"),
        (lambda logits: logits.argmax(1), "torch.int64 of shape (3,)"),
        (lambda logits: (logits,), "a tuple"),
    ],
)
def test_logits_of_no_use_end_the_checks(change, got):
    checks = checked(Threshold(change=change))
    assert list(checks) == ["pixels", "labels", "logits"]
    assert checks["logits"].fatal
    assert checks["logits"].detail == f"logits must be floating-point of shape (3, K), K >= 2, got {got}"


def test_probabilities_are_no_logits():
    checks = checked(Threshold(change=lambda logits: logits.softmax(1)))
    detail = "logits must be taken before the softmax, got probabilities that sum to 1"
    assert checks["logits"] == Check("logits", False, 3, detail)
    assert [each.name for each in checks.values() if not each.passed] == ["logits"]


def test_logits_that_happen_to_sum_to_1_are_no_probabilities():
    # Logits (0.5 - p, p + 0.5): every row sums to 1, but that of p = 0.9 has a value below 0.
    assert failing(lambda x: torch.cat([0.5 - x[:, :1, 0, 0], x[:, :1, 0, 0] + 0.5], 1)) == []


def test_log_probabilities_are_noted_and_pass():
    checks = checked(Threshold(change=lambda logits: logits.log_softmax(1)))
    assert all(each.passed for each in checks.values())
    assert checks["logits"].detail.endswith("(log-probabilities, as good as logits)")


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_logits_that_are_not_finite(value):
    # Logits are -+0.3, -+0.1 and -+0.4: the last image alone has one above 0.35.
    checks = checked(Threshold(change=lambda logits: logits.masked_fill(logits > 0.35, value)))
    assert checks["logits"] == Check("logits", False, 1, "logits must be finite, got NaN or inf for 1 of 3 images")
    assert [checks[name].value for name in CHECKS[3:]] == [0, 0, 1 / 3]  # twice the same NaN is no difference
    assert not checks["gradients"].passed


@pytest.mark.parametrize(("num_classes", "fatal"), [(3, True), (None, False), (1, False)])
def test_the_number_of_classes(num_classes, fatal):
    checks = checked(Threshold(), num_classes=num_classes)
    assert checks["logits"].passed == (num_classes is None) and checks["logits"].fatal == fatal
    if num_classes is not None:
        assert checks["logits"].detail == f"logits must have the data's {num_classes} classes, got 2"


# Determinism


class Drifting(nn.Module):
    """Logits that grow by 1/4 with every pass."""

    def __init__(self, offset=0.0):
        super().__init__()
        self.calls, self.offset = 0, offset

    def forward(self, x):
        self.calls += 1
        return Threshold()(x) + self.offset + 0.25 * (self.calls - 1)


def test_a_second_pass_with_other_logits():
    checks = checked(Drifting())
    assert not checks["deterministic"].passed and checks["deterministic"].value == 0.25
    assert checks["deterministic"].detail == "logits of two equal passes differ by 0.25 (limit 0)"
    # The image at 1/2 has logits of 8: differences count relative to it.
    assert checked(Drifting(8), images(0.5, 0.5))["labels"].fatal
    assert checked(Drifting(8), images(0.5, 0.5), Y[:2])["deterministic"].value == 0.25 / 8


def test_noise_in_eval_mode():
    checks = checked(Threshold(change=lambda logits: logits + 1e-5 * torch.randn_like(logits)))
    assert not checks["deterministic"].passed and 0 < checks["deterministic"].value < 1e-3


def test_a_model_that_writes_into_its_input():
    x = X.clone()
    checks = checked(lambda x: Threshold()(x.sub_(0.1)), x)
    assert torch.equal(x, X)
    assert list(checks) == [*CHECKS[:3], "deterministic"] and checks["deterministic"].fatal
    assert "leave the pixels that it is given as they are" in checks["deterministic"].detail


# Independence of the batch


def test_a_mean_over_the_batch():
    # First pixels less 0.5, and less their mean in the batch: -0.3, -0.1, 0.4; alone all are 0.
    checks = checked(Threshold(change=lambda logits: logits - logits.mean(0)))
    assert not checks["batch-independent"].passed and checks["deterministic"].passed
    assert checks["batch-independent"].value == pytest.approx(0.4)


def test_the_batch_reversed():
    # Logits grow by the place in the batch: image 0 goes from place 0 to 2, and its own are below 1.
    checks = checked(Threshold(change=lambda logits: logits + torch.arange(len(logits))[:, None]))
    assert checks["batch-independent"].value == 2
    # Places 0 and 24 of 25 differ, and no image that is classified alone shows it: those are 0, 2, 4, ..., 22.
    place = lambda logits: logits + (torch.arange(len(logits)) == 24)[:, None]  # noqa: E731
    x = images(*torch.linspace(0.1, 0.9, 25).tolist())
    assert failing(Threshold(change=place), x, (x[:, 0, 0, 0] > 0.5).long()) == ["batch-independent"]


def test_batch_norm_in_train_mode():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
    x, y = torch.rand(8, 1, 2, 2), torch.arange(8) % 3
    assert failing(model.train(), x, y) == ["batch-independent"]
    assert failing(model.eval(), x, y) == []
    model.insert(4, nn.BatchNorm1d(16))
    detail = checked(model.train(), x, y)["batch-independent"].detail
    assert "got an error for one of 1: ValueError: Expected more than 1 value per channel" in detail


def test_logits_squeezed_when_alone():
    independence = checked(Threshold(change=lambda logits: logits.squeeze()))["batch-independent"]
    assert independence.detail == "logits must be (N, K) for every batch, got torch.float32 of shape (2,) for one of 1"
    assert independence.to_dict()["value"] is None


def test_one_image_has_no_other_batch():
    independence = checked(Threshold(), X[:1], Y[:1])["batch-independent"]
    assert independence.passed and independence.detail == "1 image: no other batch to compare with"


# Routing


@pytest.fixture
def shared(make_routed, make_images):
    """A routed model whose experts are copies of one another: its logits do not tell which were chosen."""
    return make_routed(router="embedding", experts_init="shared"), make_images(16, seed=3), torch.arange(16) % 5


def test_a_pathway_that_depends_on_the_batch_alone(shared):
    model, x, y = shared
    assert failing(model, x, y) == []
    model.router.register_forward_hook(lambda module, args, scores: [each - each.mean(0) for each in scores])
    checks = checked(model, x, y)
    assert [name for name in CHECKS if not checks[name].passed] == ["batch-independent"]
    assert checks["batch-independent"].value < 1e-4
    # Alone, all scores are 0 and expert 0 is chosen; in the batch each head sends some images to expert 1.
    assert "; images that take another pathway: 12 (router scores up to " in checks["batch-independent"].detail


def test_a_pathway_that_is_drawn_anew(shared):
    model, x, y = shared
    torch.manual_seed(0)
    model.router.register_forward_hook(lambda module, args, scores: [torch.randn_like(each) for each in scores])
    checks = checked(model, x, y)
    assert [name for name in CHECKS if not checks[name].passed] == ["deterministic", "batch-independent"]
    assert checks["deterministic"].value < 1e-4
    assert "images that take another pathway: 16 " in checks["deterministic"].detail


def test_the_distance_of_scores_where_pathways_part(shared):
    model, x, y = shared
    passes = []

    def swap(module, args, scores):
        """Layer 3 of image 2 prefers expert 0 by 0.75 in the first pass alone, and all later layers follow suit."""
        passes.append((len(args[0]), torch.is_grad_enabled()))
        planted = [torch.tensor([0.0, 1.0]).repeat(len(args[0]), 1) for _ in scores]
        if len(passes) == 1:
            planted[3][2] = torch.tensor([0.75, 0.0])
            planted[4][2] = torch.tensor([5.0, 0.0])
        return planted

    model.router.register_forward_hook(swap)
    detail = checked(model, x, y)["deterministic"].detail
    assert detail.endswith("; images that take another pathway: 1 (router scores up to 0.75 apart)")
    assert passes == [(16, False), (16, False), *[(1, False)] * 12, (16, False), (16, True)]


# Gradients


@pytest.mark.parametrize(("saturated", "passed"), [(0, True), (1, True), (2, False), (20, False)])
def test_saturated_logits(saturated, passed):
    # Logits 320 apart leave the wrong class a probability of exactly 0; logits 8 apart do not.
    x = images(*[0.9] * saturated, *[0.51] * (20 - saturated))
    gradients = checked(Threshold(400), x, torch.ones(20, dtype=torch.long))["gradients"]
    assert (gradients.passed, gradients.value) == (passed, saturated / 20)
    assert gradients.detail.startswith(f"{saturated} of 20 images have a gradient of exactly 0, 0 one of NaN or inf")
    # Saturated on the wrong class, the cross-entropy still has its gradient.
    assert checked(Threshold(400), x, torch.zeros(20, dtype=torch.long))["gradients"].value == 0


def test_gradients_that_are_not_finite():
    x = X.clone()
    x[1, 0, 1, 1] = 0  # where the square root is infinitely steep
    gradients = checked(lambda x: Threshold()(x) * x[:, 0, 1, 1, None].sqrt().add(1), x)["gradients"]
    assert (gradients.passed, gradients.value) == (False, 1 / 3)
    assert gradients.detail.startswith("0 of 3 images have a gradient of exactly 0, 1 one of NaN or inf")


@pytest.mark.parametrize("change", [lambda logits: logits.detach(), lambda logits: F.one_hot(logits.argmax(1)) * 9.0])
def test_no_gradient_at_all(change):
    checks = checked(Threshold(change=change))
    assert (checks["gradients"].passed, checks["gradients"].value) == (False, 1)
    assert checks["gradients"].detail == "no gradient reaches the pixels: the model must be differentiable"


def test_gradients_of_parameters_alone_are_none_either():
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    checks = checked(lambda x: model(x.detach()))
    assert checks["gradients"].value == 1 and model[1].weight.grad is None


# Going on


FAILED = [
    Check("pixels", True, 0, "fine"),
    Check("logits", False, 3, "probabilities"),
    Check("gradients", False, 0.5, "half are 0"),
]


def test_what_failed_and_how_to_go_on():
    with pytest.raises(ValueError) as error:
        require_passed(FAILED)
    assert str(error.value) == (
        "model and data must pass the checks made before an attack, got logits: probabilities; gradients: half are 0; "
        "to go on all the same: --allow logits --allow gradients"
    )
    with pytest.raises(ValueError, match=r"got gradients: half are 0; to go on all the same: --allow gradients$"):
        require_passed(FAILED, "logits")
    require_passed(FAILED, ["logits", "gradients"])
    require_passed(FAILED, ALLOWABLE)
    require_passed([])


def test_fatal_findings_cannot_be_allowed():
    fatal = Check("logits", False, 3, "a tuple", fatal=True)
    with pytest.raises(ValueError, match=r"got logits: a tuple; this must be mended first$"):
        require_passed([*FAILED[:1], fatal, *FAILED[2:]], ALLOWABLE)


@pytest.mark.parametrize(
    ("name", "reason"), [("gradient", ""), ("pixels", " (bad data give no result)"), ("labels", " (bad data give no")]
)
def test_names_that_cannot_be_allowed(name, reason):
    with pytest.raises(ValueError) as error:
        require_passed([], ["logits", name])
    known = "logits, deterministic, batch-independent, gradients"
    assert str(error.value).startswith(f"allow must name checks of {known}{reason}")
    assert str(error.value).endswith(f"got {name!r}")


def test_the_record_is_plain_json():
    records = [each.to_dict() for each in check(Threshold(change=lambda logits: logits.squeeze()), X, Y)]
    assert json.loads(json.dumps(records, allow_nan=False)) == records
    assert list(records[0]) == ["name", "passed", "value", "detail"]


@pytest.mark.parametrize("largest", [0, 2])
def test_a_model_that_does_not_take_the_images(largest):
    def refuses(x):
        if len(x) > largest:
            raise TypeError(f"no more\nthan {largest}")
        return torch.zeros(len(x), 2)

    size = 1 if largest == 0 else 3  # the first image alone shows whether a model is routed, then come all of them
    message = rf"^model must take images \({size}, 1, 2, 2\) without an error, got TypeError: no more than {largest}$"
    with pytest.raises(ValueError, match=message):
        evaluate(refuses, (X, Y), steps=1)


def test_a_model_that_takes_no_pixels_with_a_gradient():
    def by_numpy(x):
        return torch.from_numpy(Threshold()(x).numpy())

    gradients = checked(by_numpy)["gradients"]
    start = "where they require a gradient, model must take images (3, 1, 2, 2) without an error, got RuntimeError: "
    assert (gradients.passed, gradients.value) == (False, 1) and gradients.detail.startswith(start)
    with pytest.raises(ValueError, match=r"^model and data must pass the checks .*--allow gradients$"):
        evaluate(by_numpy, (X, Y), steps=1)


def test_lack_of_memory_is_no_mistake_of_the_model():
    def hungry(x):
        raise torch.OutOfMemoryError("no memory")

    with pytest.raises(torch.OutOfMemoryError):
        check(hungry, X, Y)
