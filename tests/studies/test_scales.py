"""The three sizes, and the runs and measurements they make."""

import re
from dataclasses import replace

import pytest

from advmoe import tables
from advmoe.config import Config
from advmoe.recipes import SETTINGS, recipe
from advmoe.studies.catalogue import STUDIES
from advmoe.studies.claims import ENOUGH_SEEDS
from advmoe.studies.results import Results
from advmoe.studies.scales import COMPARED, PAPER_METHODS, scale_named

NAMES = ("smoke", "cpu", "paper")
# The names of recipes and those of the paper.
DATA = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "tiny-imagenet": "Tiny-ImageNet", "imagenet": "ImageNet"}
BACKBONES = {
    "resnet18": "ResNet-18", "wrn-28-10": "WRN-28-10", "vgg16": "VGG-16", "densenet40": "DenseNet",
    "deit-tiny": "DeiT-Tiny",
}  # fmt: skip
PAPER = {name: (DATA[data], BACKBONES[net]) for name, (data, net) in SETTINGS.items() if net}


def test_an_unknown_scale_is_refused():
    with pytest.raises(ValueError, match=r"^--scale must be one of smoke, cpu, paper, got 'huge'$"):
        scale_named("huge")


@pytest.mark.parametrize("setting", PAPER)
def test_the_paper_s_scale_is_its_recipes(setting):
    dataset, backbone = PAPER[setting]
    for method, name in (("at-dense", "AT (Dense)"), ("at-s-dense", "AT (S-Dense)"), ("at-moe", "AT (MoE)")):
        run = scale_named("paper").run(name, dataset=dataset, backbone=backbone)
        assert Config.from_dict(run.settings) == Config.from_dict(recipe(f"{setting}-{method}"))
    ours = Config.from_dict(scale_named("paper").run("AdvMoE", dataset=dataset, backbone=backbone).settings)
    assert ours == Config.from_dict(recipe(f"{setting}-advmoe"))


def test_the_paper_s_tables_are_all_its_settings_by_all_its_methods():
    rows = [
        row.run.labels
        for table in ("table1", "table3")
        for row in STUDIES[table].stages[0](scale_named("paper"), Results())
    ]
    settings = {(labels["paper_dataset"], labels["paper_backbone"], labels["method"]) for labels in rows}
    vision = {(*PAPER["imagenet-deit-tiny"], method) for method in ("AT (S-Dense)", "AT (MoE)", "AdvMoE")}
    convolutional = [where for setting, where in PAPER.items() if not setting.endswith("deit-tiny")]
    assert settings == vision | {(*where, method) for where in convolutional for method in COMPARED}
    assert len(rows) == len(settings)


def test_names_say_what_varies_and_what_it_runs_on():
    scale = scale_named("smoke")
    assert scale.run("AT (MoE)").name == "AT (MoE), ResNet-18 of width 8, digits at 16 pixels"
    run = scale.run("AdvMoE", backbone="WRN-28-10", experts=4, scale=0.8, more={"model": {"scale": 0.8}})
    assert run.name == "AdvMoE, N = 4, r = 0.8, WRN-10-1 of width 8, digits at 16 pixels"
    assert run.settings["model"]["scale"] == 0.8 and run.settings["model"]["name"] == "wrn-10-1"
    assert scale.run("AdvMoE", K=5).name == "AdvMoE, K = 5, ResNet-18 of width 8, digits at 16 pixels"
    assert scale.run("AdvMoE", variant="EMA").name == "AdvMoE, EMA, ResNet-18 of width 8, digits at 16 pixels"
    assert scale.run("AdvMoE", beta=3, K=5).name == "AdvMoE, beta = 3, K = 5, ResNet-18 of width 8, digits at 16 pixels"
    assert run.labels == {
        "method": "AdvMoE", "experts": 4, "scale": 0.8, "dataset": "digits at 16 pixels",
        "backbone": "WRN-10-1 of width 8", "routed": True, "paper_dataset": None, "paper_backbone": None,
    }  # fmt: skip
    cpu = scale_named("cpu").run("AT (Dense)").labels
    assert (cpu["dataset"], cpu["paper_dataset"]) == ("CIFAR-10 (JPEG)", "CIFAR-10")
    assert (cpu["backbone"], cpu["paper_backbone"], cpu["routed"]) == ("ResNet-18 of width 16", "ResNet-18", False)


def labels(overrides, scale="cpu", **where):
    return replace(scale_named(scale), overrides=overrides).run("AT (Dense)", **where).labels


def test_labels_tell_what_the_user_sets():
    assert labels({"model": {"width": 32}})["backbone"] == "ResNet-18 of width 32"
    assert labels({"model": {"width": None}})["backbone"] == "ResNet-18"
    assert labels({"model": {"width": 48}}, "paper", backbone="DeiT-Tiny")["backbone"] == "DeiT-Tiny of width 48"
    assert labels({}, backbone="DenseNet")["backbone"] == "DenseNet of width 16"
    assert labels({}, "paper")["backbone"] == "ResNet-18"
    assert labels({"data": {"image_size": 16}})["dataset"] == "CIFAR-10 (JPEG) at 16 pixels"
    run = replace(scale_named("cpu"), overrides={"model": {"width": 32}}).run("AdvMoE")
    assert run.name == "AdvMoE, ResNet-18 of width 32, CIFAR-10 (JPEG)"


def test_other_images_or_another_threat_are_not_set_beside_the_paper():
    names = labels({"data": {"root": "/somewhere/food"}})
    assert (names["dataset"], names["paper_dataset"]) == ("food", None)
    names = labels({"data": {"root": "/somewhere/cifar10-jpeg/"}})
    assert (names["dataset"], names["paper_dataset"]) == ("CIFAR-10 (JPEG)", "CIFAR-10")
    for threat in ({"eps": "4/255"}, {"norm": "l2"}):
        assert labels({"threat": threat})["paper_dataset"] is None
    assert labels({"threat": {"eps": 8 / 255}})["paper_dataset"] == "CIFAR-10"  # the same, spelt otherwise


@pytest.mark.parametrize("scale", NAMES)
def test_no_label_states_what_settings_do(scale):
    """But for the names of backbones and data, whatever stands in a label is made from settings."""
    scale = scale_named(scale)
    for parts in (scale.datasets, scale.backbones):
        assert not any(re.search(r"width|pixel|image|epoch", part.label) for part in parts.values())


def test_a_run_starts_from_one_of_the_same_model_and_data_trained_its_own_way():
    scale = scale_named("smoke")
    more = {"model": {"scale": 0.8}, "training": {"lr": 0.3}}
    last = scale.run("router-robustified MoE, then its experts", more=more, scale=0.8)
    middle = last.start
    first = middle.start
    assert [run.labels["method"] for run in (first, middle)] == ["standard MoE", "router-robustified MoE"]
    assert first.start is None and first.name == "standard MoE, r = 0.8, ResNet-18 of width 8, digits at 16 pixels"
    methods = [run.settings["training"]["method"] for run in (first, middle, last)]
    assert methods == ["standard", "at-routers", "at-experts"]
    assert [run.settings["model"]["scale"] for run in (first, middle, last)] == [0.8, 0.8, 0.8]
    assert [run.settings["training"]["lr"] for run in (first, middle, last)] == [0.1, 0.1, 0.3]


def test_a_dense_start_of_sparse_models_of_any_scale_goes_without_it():
    scale = scale_named("smoke")
    for r in (0.5, 0.8):
        run = scale.run("AT (Sparse)", more={"model": {"scale": r}}, scale=r)
        assert run.name == f"AT (Sparse), r = {r}, ResNet-18 of width 8, digits at 16 pixels"
        assert (
            run.start.name == "AT (Dense), ResNet-18 of width 8, digits at 16 pixels"
            and "scale" not in run.start.labels
        )


def test_what_the_user_sets_holds_for_every_run():
    scale = replace(scale_named("smoke"), overrides={"training": {"lr": 0.7, "epochs": 1}, "data": {"image_size": 8}})
    run = scale.run("router-robustified MoE", more={"training": {"lr": 0.3}})
    for each in (run, run.start):
        assert each.settings["training"]["lr"] == 0.7 and each.settings["training"]["epochs"] == 1
        assert each.settings["data"]["image_size"] == 8 and each.settings["data"]["name"] == "digits"


def test_what_only_another_row_can_use_is_left_out_of_a_run():
    given = {"router_lr": 0.01, "finetune_lr": 0.02, "objective": "pgd-at", "lr": 0.3}
    scale = replace(scale_named("smoke"), overrides={"training": given})
    for method, taken in (
        ("AT (S-Dense)", {"objective", "lr"}), ("AT (MoE)", {"router_lr", "objective", "lr"}),
        ("AT (Sparse)", {"finetune_lr", "objective", "lr"}), ("standard MoE", {"router_lr", "lr"}),
        ("router-robustified MoE", {"router_lr", "objective", "lr"}),
    ):  # fmt: skip
        settings = scale.run(method).settings["training"]
        assert {name for name, value in given.items() if settings.get(name) == value} == taken, method
    routers = replace(scale_named("smoke"), overrides={"training": {"balance": 0.1, "radius": 1.0, "router_lr": 0.01}})
    for router, taken in (
        ("linear", {"balance", "radius", "router_lr"}),
        ("fixed-top", set()),
        ("layer", {"balance", "router_lr"}),
    ):
        settings = routers.run("AT (MoE)", more={"model": {"router": router}}).settings["training"]
        assert {name for name in ("balance", "radius", "router_lr") if name in settings} == taken
    assert routers.run("AT (Dense)").settings["training"].keys().isdisjoint({"balance", "radius", "router_lr"})
    with pytest.raises(ValueError, match=r"training.lr must be"):  # no row can have that: it is not left out
        Config.from_dict(replace(scale, overrides={"training": {"lr": -1.0}}).run("AT (MoE)").settings)


def test_a_standard_model_is_trained_longer_where_epochs_are_few():
    scale = replace(scale_named("cpu"), overrides={"training": {"epochs": 2}})
    robust = scale.run("router-robustified MoE")
    assert robust.settings["training"]["epochs"] == 2 and robust.start.settings["training"]["epochs"] == 12
    assert scale.run("standard Dense").settings["training"]["epochs"] == 12
    paper = scale_named("paper")
    assert (
        paper.run("standard MoE").settings["training"]["epochs"] == paper.run("AT (MoE)").settings["training"]["epochs"]
    )


def test_plain_models_are_attacked_by_the_choices_of_the_network_that_they_are_compared_with():
    """ResNet-18 of two experts has 16 choices to change, which is what `restarts` makes up for without a number."""
    scale = scale_named("cpu")

    def third(run, **more):
        return scale.accuracy(run, **more).options["attacks"][2]

    assert third(scale.run("AT (Dense)")) == "restarts" and third(scale.run("AT (Dense)"), experts=4) == "restarts:48"
    four = {"model": {"num_experts": 4}}
    assert third(scale.run("AT (S-Dense)", more=four)) == third(scale.run("AT (S-Dense)", more=four), experts=2)
    assert third(scale.run("AT (S-Dense)", more=four)) == "restarts:48"
    assert third(scale.run("AT (S-Dense)", backbone="WRN-28-10")) == "restarts:6"
    assert third(scale.run("AdvMoE"), experts=4) == "pgd-soft"


def test_one_backbone_s_unknown_layers_leave_the_usual_number(monkeypatch):
    monkeypatch.setitem(tables.BACKBONES, "resnet18", replace(tables.BACKBONES["resnet18"], moe_layers=None))
    scale = scale_named("cpu")
    assert scale.accuracy(scale.run("AT (Dense)"), experts=9).options["attacks"][2] == "restarts"


@pytest.mark.parametrize("name", NAMES)
def test_what_is_measured_fits_the_model(name):
    scale = scale_named(name)
    plain, routed = scale.run("AT (S-Dense)"), scale.run("AT (MoE)")
    assert scale.accuracy(plain).options["attacks"] == ["pgd", "pgd-margin", "restarts"]
    assert scale.accuracy(routed).options["attacks"] == ["pgd", "pgd-margin", "pgd-soft", "routed"]
    assert scale.accuracy(plain).options["num_examples"] == scale.examples
    _, attack, examples = scale.autoattack
    assert scale.under_autoattack().options == {"attacks": [attack], "num_examples": examples}
    for run, third in ((plain, f"restarts-{plain.settings['attack']['steps']}"), (routed, "pgd-soft")):
        sweep = scale.sweep(run).options
        assert sweep["attacks"] == ["pgd", "pgd-margin", third]  # of as many steps
        assert sweep["epsilons"][0] == 0 and sweep["epsilons"] == sorted(set(sweep["epsilons"]))
        eps = Config.from_dict(run.settings).threat.eps
        assert float(eps) in sweep["epsilons"] and max(sweep["epsilons"]) == 2 * eps  # the very radius trained for
    assert scale.dissect().options["attacks"] == ["pgd", "pgd-soft"]
    assert scale.pathways(plain).against is plain and scale.pace(routed).against is routed


def test_every_method_has_a_start_that_there_is():
    for name, method in PAPER_METHODS.items():
        seen = {name}
        while method.start is not None:
            assert method.start not in seen  # no circle
            seen.add(method.start)
            method = PAPER_METHODS[method.start]
    assert set(COMPARED) <= set(PAPER_METHODS)


def test_a_test_over_seeds_has_five_wherever_one_is_to_decide():
    assert [scale_named(name).seeds for name in NAMES] == [1, ENOUGH_SEEDS, ENOUGH_SEEDS] and ENOUGH_SEEDS == 5


def test_a_sparse_network_trained_without_attacks_is_pruned_for_clean_accuracy():
    for name in NAMES:
        training = Config.from_dict(scale_named(name).run("standard Sparse").settings).training
        assert (training.method, training.beta, training.attack_steps) == ("sparse", 0, 1)
        assert training.step_size < 1e-5
