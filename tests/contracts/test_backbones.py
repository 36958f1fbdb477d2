"""What every backbone promises in every kind and with every router: a new entry of the tables is tested by being there.

Axes: `N` images, `L` MoE layers. Sizes are the smallest that still send images along several pathways.
"""

from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from advmoe.export import export_model
from advmoe.models import Classifier, create_model, load_model, save_model, split_parameters
from advmoe.models.modes import frozen
from advmoe.models.resnet import ResNet
from advmoe.moe import LayerRouter, MoELayer, pathway, route, routers_of
from advmoe.native import without_kernels
from advmoe.tables import BACKBONES, KINDS, ROUTERS, Backbone, Router

pytestmark = pytest.mark.usefixtures("shallow_backbones")

CLASSES, IMAGES = 5, 6


@dataclass(frozen=True)
class Case:
    """A backbone as one kind of network and, where that is routed, with one router."""

    name: str
    kind: str = "moe"
    router: str = "layer"
    route_per: str = "image"

    def __str__(self) -> str:
        routing = (self.router, self.route_per) if KINDS[self.kind].routed else ()
        return "-".join([self.name, self.kind, *routing])

    def model(self, seed: int = 0) -> Classifier:
        """A model in eval mode, channels-last, whose batch norms have seen images: that spreads these over experts."""
        return deepcopy(_warmed(self, seed))

    @property
    def side(self) -> int:
        return BACKBONES.find(self.name).min_size

    def images(self, n: int = IMAGES, seed: int = 1) -> Tensor:
        """Images (N, 3, H, W) in [0, 1] that differ in brightness and colour."""
        generator = torch.Generator().manual_seed(seed)
        light = torch.rand(n, 3, 1, 1, generator=generator)
        noise = torch.rand(n, 3, self.side, self.side, generator=generator)
        return (0.7 * light + 0.3 * noise).contiguous(memory_format=torch.channels_last)


@cache
def _warmed(case: Case, seed: int) -> Classifier:
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = create_model(
            case.name, kind=case.kind, router=case.router, route_per=case.route_per, width=8, num_classes=CLASSES,
            input_size=case.side,
        ).to(memory_format=torch.channels_last)  # fmt: skip
        for attempt in range(6):
            model(case.images(16, seed=100 + attempt))
    return model.eval()


def cases() -> list[Case]:
    """Every backbone in every kind that it has, routed ones with every router and for every thing that is routed. Of
    routers that see pixels alone, whatever the backbone, the first backbone has all, the others one.
    """
    found, pixels = [], [router for router, each in ROUTERS.items() if each.pixels]
    for place, name in enumerate(BACKBONES.examples()):
        left_out = pixels[1:] if place else []
        tokens = BACKBONES.find(name).tokens
        for kind, facts in KINDS.items():
            if not facts.routed:
                found += [Case(name, kind)] if not (facts.masked and tokens) else []
                continue
            found += [Case(name, kind, router) for router in ROUTERS if router not in left_out]
            if tokens:
                found += [Case(name, kind, router, "token") for router, each in ROUTERS.items() if each.in_layers]
    return found


def some_pathways(model: nn.Module) -> Tensor:
    """Pathways (N, L) that send images to every expert."""
    layers = sum(isinstance(module, MoELayer) for module in model.modules())
    return (torch.arange(IMAGES)[:, None] + torch.arange(layers)) % 2


def gradients(model: nn.Module, logits: Tensor, x: Tensor) -> dict[str, Tensor]:
    """Of a loss of the logits, by what it is of: the images and the weights."""
    named = {"images": x, **{name: each for name, each in model.named_parameters() if each.requires_grad}}
    loss = F.cross_entropy(logits, torch.arange(len(x)) % CLASSES)
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


# The checks: each takes a case, and raises AssertionError where it breaks the promise.


def a_step_trains_every_part(case: Case, folder: Path) -> None:
    """One step of SGD has a finite loss, reaches every weight, and moves the backbone and the routers."""
    model, x = case.model().train(), case.images()
    psi, phi = split_parameters(model)
    learnt = model.routed and ROUTERS[case.router].learnt
    assert bool(phi) == learnt and len(psi) + len(phi) == len(list(model.parameters()))
    before = {name: each.detach().clone() for name, each in model.named_parameters()}
    loss = F.cross_entropy(model(x), torch.arange(IMAGES) % CLASSES)
    loss.backward()
    assert loss.isfinite()
    assert all(each.grad is not None and each.grad.isfinite().all() for each in model.parameters())
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    moved = {id(each) for name, each in model.named_parameters() if not each.equal(before[name])}
    assert any(id(each) in moved for each in psi) and any(id(each) in moved for each in phi) == bool(phi)


def weights_make_the_model(case: Case, folder: Path) -> None:
    """Another model with its state dict, and one of its files, have its logits to the bit."""
    model, other, x = case.model(), case.model(seed=1), case.images()
    with torch.no_grad():
        expected = model(x)
        assert not torch.equal(other(x), expected)
        other.load_state_dict(model.state_dict())
        assert torch.equal(other(x), expected)
        save_model(model, folder)
        assert torch.equal(load_model(folder).to(memory_format=torch.channels_last)(x), expected)


def kernels_change_nothing(case: Case, folder: Path) -> None:
    """Logits, pathways and gradients are the same without kernels, and with norms folded into convolutions."""
    model, x = case.model(), case.images().requires_grad_()

    def outputs() -> dict[str, Tensor]:
        logits = model(x)
        found = {"logits": logits.detach(), "pathway": pathway(model, x).double(), **gradients(model, logits, x)}
        with torch.no_grad():
            found["without gradients"] = model(x)
        with frozen(model):
            found["frozen"] = model(x)
            found["gradient when frozen"] = torch.autograd.grad(found["frozen"].square().sum(), x)[0]
        return {name: each.detach() for name, each in found.items()}

    fused = outputs()
    with without_kernels():
        plain = outputs()
    for name, value in plain.items():
        torch.testing.assert_close(
            fused[name], value, rtol=2e-4, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}"
        )
    for name in ("without gradients", "frozen"):
        torch.testing.assert_close(fused[name], fused["logits"], rtol=2e-4, atol=2e-5)


def ways_agree_with_the_definition(case: Case, folder: Path) -> None:
    """Computing the chosen experts alone gives what computing all and keeping the chosen does, gradients included."""
    model, x = case.model().double(), case.images().double().requires_grad_()
    if not model.routed:
        return
    for forced in (None, some_pathways(model)):
        results = []
        for mode in ("masked", "hard"):
            with route(mode, forced=forced) as routing:
                logits = model(x)
            results.append({"logits": logits, "pathway": routing.pathway(), **gradients(model, logits, x)})
        masked, hard = results
        for name, value in masked.items():
            torch.testing.assert_close(hard[name], value, msg=lambda text, name=name: f"{name}: {text}")
    if case.route_per == "image":
        with torch.no_grad(), route("gathered", forced=some_pathways(model)[:1]):
            torch.testing.assert_close(model(x[:1]), masked["logits"][:1])


def images_are_independent(case: Case, folder: Path) -> None:
    """Logits and pathway of an image are the same alone, in another order, and among other images."""
    model, x = case.model(), case.images()
    with torch.no_grad():
        logits, chosen = model(x), pathway(model, x)
        order = torch.arange(IMAGES - 1, -1, -1)
        company = torch.cat([case.images(3, seed=2), x[:1], 1 - x]).contiguous(memory_format=torch.channels_last)
        for others, at, expected in (
            (x[:1], slice(1), slice(1)),
            (x[order], order, slice(None)),
            (company, [3], slice(1)),
        ):
            torch.testing.assert_close(model(others)[at], logits[expected], rtol=1e-4, atol=1e-5)
            assert pathway(model, others)[at].equal(chosen[expected])


def files_compute_the_model(case: Case, folder: Path) -> None:
    """An exported program has the logits and pathways of PyTorch (see `export.compared`, which raises otherwise)."""
    model = case.model()
    report = export_model(model, folder / "net.pt2", format="torch-export", images=case.images(), threads=1)
    assert report["check"]["images"] == IMAGES and report["outputs"]["logits"] == [1, CLASSES]
    assert ("pathway" in report["outputs"]) == model.routed


CHECKS = [
    a_step_trains_every_part,
    weights_make_the_model,
    kernels_change_nothing,
    ways_agree_with_the_definition,
    images_are_independent,
    pytest.param(files_compute_the_model, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("case", cases(), ids=str)
@pytest.mark.parametrize("check", CHECKS)
def test_every_entry(check, case, tmp_path):
    check(case, tmp_path)


def test_every_family_has_an_example():
    assert all(family.example for family in BACKBONES.families)


# Entries from outside: one that keeps the promises, and for each table one that breaks one, which is caught.


class Bold(nn.Module):
    """A layer's router whose scores are twice those of a `LayerRouter` inside it, at a temperature that it learns."""

    def __init__(self, channels: int, num_experts: int, *, per_token: bool = False) -> None:
        super().__init__()
        self.per_token = per_token
        self.inner = LayerRouter(channels, num_experts, per_token=per_token)
        self.temperature = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.inner(x) / self.temperature
        return scores


class Comparing(LayerRouter):
    """A fault: scores are compared with those of the other images of the batch."""

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = super().forward(x)
        return scores - scores.mean(0)


class Centred(ResNet):
    """A fault: features are centred over the batch, in eval mode too."""

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = super().forward(x)
        return logits - logits.mean(0)


@pytest.mark.parametrize("check", CHECKS)
def test_a_router_in_layers_may_come_from_outside(check, tmp_path, monkeypatch):
    monkeypatch.setitem(ROUTERS, "bold", Router(layer=Bold))
    case = Case("resnet18", router="bold")
    routers = list(routers_of(case.model()))
    assert routers and all(type(router) is Bold for router in routers)
    check(case, tmp_path)
    check(replace(case, name="deit-tiny", route_per="token"), tmp_path)


def test_a_backbone_whose_logits_depend_on_the_batch_is_caught(tmp_path, monkeypatch):
    monkeypatch.setitem(BACKBONES, "centred", Backbone(partial(Centred, depths=(1, 1)), 64, "Centred"))
    with pytest.raises(AssertionError):
        images_are_independent(Case("centred", "dense"), tmp_path)


def test_a_router_whose_choice_depends_on_the_batch_is_caught(tmp_path, monkeypatch):
    monkeypatch.setitem(ROUTERS, "comparing", Router(layer=Comparing))
    with pytest.raises(AssertionError):
        images_are_independent(Case("resnet18", router="comparing"), tmp_path)
