"""Networks of the package timm, with random weights: each is converted, or says why not, and computes what it did."""

import importlib.abc
import importlib.machinery
import importlib.util
import sys

import pytest
import torch

from advmoe import to_moe

pytestmark = pytest.mark.slow

# By family; the side of the images where it is not 64.
NETWORKS = [
    name
    for line in (
        "resnet18 resnetv2_50 resnext26ts seresnext26ts resnest14d res2net50_14w_8s ecaresnet26t skresnet18",
        "gcresnext26ts resnetaa34d resnetblur18 densenet121 dla34 dpn48b hrnet_w18_small vovnet39a",
        "ese_vovnet19b_dw cspresnet50 darknet17 inception_v3:96 inception_next_atto xception41 selecsls42",
        "regnetx_002 regnety_002 repvgg_a0 rexnet_100 efficientnet_b0 tf_efficientnet_b0 tf_efficientnetv2_b0",
        "efficientnet_cc_b0_4e mixnet_s tf_mixnet_s mnasnet_050 mobilenetv2_050 mobilenetv3_small_050",
        "tf_mobilenetv3_small_minimal_100 fbnetc_100 spnasnet_100 hardcorenas_a lcnet_050 tinynet_e ghostnet_050",
        "mobileone_s0 mobilenetv4_conv_small convnext_atto convnextv2_atto edgenext_xx_small mobilevit_xxs",
        "mobilevitv2_050 fastvit_t8 repvit_m0_9 nf_resnet50 dm_nfnet_f0 nf_regnet_b0 efficientvit_b0",
        "poolformer_s12 convmixer_768_32 ghostnetv2_100 starnet_s1",
    )
    for name in line.split()
]


class _Anything(type):
    """A class that has any attribute."""

    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return f"{cls.__name__}.{name}"


class _Stub(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """torchvision with empty classes: timm imports names of it that these networks do not use."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torchvision":
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        def attribute(name):
            if name.startswith("__"):
                raise AttributeError(name)
            return _Anything(name, (), {})

        module.__getattr__ = attribute


@pytest.fixture(scope="module")
def timm():
    if importlib.util.find_spec("timm") is None:
        pytest.skip("timm is not installed")
    stub, before = _Stub(), set(sys.modules)
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError):  # its builds fit one build of PyTorch
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        sys.meta_path.insert(0, stub)
    try:
        import timm

        yield timm
    finally:
        if stub in sys.meta_path:
            sys.meta_path.remove(stub)
            for name in [name for name in set(sys.modules) - before if name.partition(".")[0] == "torchvision"]:
                del sys.modules[name]


@pytest.mark.parametrize("network", NETWORKS)
def test_it_is_converted_or_says_why_not_and_computes_the_same(timm, network):
    name, _, side = network.partition(":")
    torch.manual_seed(0)
    net = timm.create_model(name, num_classes=5).eval()
    x = torch.rand(2, 3, int(side or 64), int(side or 64))
    with torch.no_grad():
        expected = net(x)
    there = {each for each, module in net.named_modules() if isinstance(module, torch.nn.Conv2d)}
    model = to_moe(net, example=x, inplace=True).eval()
    conversion = model.conversion
    assert {*conversion.converted, *conversion.skipped} == there
    assert conversion.converted and all(conversion.skipped.values())
    with torch.no_grad():
        logits = model(x)
    torch.testing.assert_close(logits, expected, atol=float(1e-3 * expected.abs().max()), rtol=0)
