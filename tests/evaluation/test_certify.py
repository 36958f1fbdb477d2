"""`certify_run`: exact for half-spaces, bounds and an attack for others, and what is written."""

import json

import pytest
import torch
from safetensors.torch import load_file

from advmoe import load_run
from advmoe.config import Config
from advmoe.evaluation.certify import certify_run, shares, table
from advmoe.models import save_model
from advmoe.training.run import train


def trained(folder, router, method="at", name="resnet18", width=4):
    groups = {
        "model": {"name": name, "width": width, "router": router},
        "data": {"name": "digits", "train_examples": 128, "augment": False},
        "training": {"method": method, "epochs": 1, "batch_size": 64, "attack_steps": 1, "val_attack_steps": 1},
    }  # fmt: skip
    return train(Config.from_dict(groups), run_dir=folder / f"{name}-{router}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("certified")


def test_a_fixed_router_is_trained_by_at_and_certified(folder):
    run = trained(folder, "fixed-top")
    model = load_run(run)
    home, result = certify_run(run, num_examples=40, epsilons=[8 / 255, 2 / 255, 0.5])
    assert home == run and result["method"] == "exact" and result["bits"] == 1
    assert [each["eps"] for each in result["points"]] == sorted([8 / 255, 2 / 255, 0.5])
    # The top quarter's brightness of the images themselves, as far as pixels can move it to the threshold.
    x = load_test_images(result["index"])
    top = x[:, 0, : x.shape[2] // 4].double()
    away = top.mean((1, 2)) - model.router.thresholds.double()
    for point in result["points"]:
        room = torch.where((away > 0)[:, None, None], top, 1 - top).clamp_max(point["eps"]).mean((1, 2))
        kept = (away.abs() > room + 1e-6).double().mean().item()
        assert point["proved"] == pytest.approx(kept)
        assert point["proved"] + point["changed"] + point["unknown"] == pytest.approx(1)
        assert point["interval"][0] <= point["proved"] <= point["interval"][1]
        assert point["pathways"].get("1", 0) == pytest.approx(point["proved"])
    assert result["points"][-1]["changed"] > 0.9
    assert result["pathways_in_use"] == len(set((away > 0).tolist())) == 2 and "pathways in use: 2" in table(result)
    assert all(l2 >= linf for linf, l2 in zip(*result["radius"].values(), strict=True))
    assert json.loads((run / "certification.json").read_text())["points"] == result["points"]
    assert "exact radii" in table(result) and list(shares(result)) == ["2/255", "8/255", "0.5"]


def load_test_images(index):
    return load_digits_test().pixels(torch.tensor(index))


def load_digits_test():
    from advmoe import load_dataset

    return load_dataset("digits").test


@pytest.mark.parametrize("router", ["image", "layer"])
def test_other_routers_have_three_shares(folder, router):
    run = trained(folder, router)
    radii = [0.0, 0.01 / 255, 16 / 255]
    _, result = certify_run(run, num_examples=24, epsilons=radii, overrides={"attack": {"steps": 3}})
    zero, small, large = result["points"]
    assert result["method"] == "bounds" and "radius" not in result
    for each in result["points"]:
        assert each["proved"] + each["changed"] + each["unknown"] == pytest.approx(1)
        assert len(each["layers"]) == 16 and each["proved"] <= min(each["layers"])
    assert zero["proved"] > 0.9 and small["layers"][0] > 0.5 and large["proved"] == 0
    assert zero["changed"] == 0 and small["changed"] <= large["changed"]
    assert "0 to 15: 100.0" in table(result) and "pathways within reach" not in table(result)


def test_a_choice_that_nothing_can_change_is_not_called_changed(folder):
    run = trained(folder, "fixed-mean", name="wrn-10-1")
    weights = load_file(run / "model.safetensors")
    weights["router.threshold"] = torch.ones(1)  # of white: no image is brighter, and all take expert 0
    model = load_run(run)
    model.load_state_dict(weights)
    save_model(model, run)
    _, result = certify_run(run, num_examples=20, epsilons=[8 / 255, 1.0])
    assert result["pathways_in_use"] == 1
    assert [each["changed"] for each in result["points"]] == [0, 0]
    assert result["radius"]["linf"] == result["radius"]["l2"] == [None] * 20


def test_where_no_bounds_are_known_the_reason_is_told(folder):
    run = trained(folder, "layer", name="deit-tiny", width=8)
    _, result = certify_run(run, num_examples=8, epsilons=[0.0], overrides={"attack": {"steps": 2}})
    assert (result["method"], result["unbounded"]) == ("attack", "layer_norm")
    assert result["points"][0]["unknown"] == 1 and "layers" not in result["points"][0]
    assert "no bounds are known of layer_norm" in table(result)


def test_no_radii_and_plain_models_are_refused(folder):
    run = folder / "resnet18-fixed-top" if (folder / "resnet18-fixed-top").exists() else trained(folder, "fixed-top")
    with pytest.raises(ValueError, match=r"attacks to certify must be left out: .*got"):
        certify_run(folder / "resnet18-fixed-top", attacks=["pgd-5"])
    with pytest.raises(ValueError, match="epsilons must list at least one radius"):
        certify_run(run, epsilons=[])
