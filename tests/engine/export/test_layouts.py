"""Weights under timm's and torchvision's names: their own networks take them and say the same."""

import sys

import pytest
import torch
import torchvision
from tiny import tiny
from torch import nn

from kdfuse.engine.cli.export import export
from kdfuse.engine.export.chosen import spec_of
from kdfuse.engine.export.layouts import OTHERWISE, Twin, laid_out
from kdfuse.engine.models import create
from kdfuse.engine.recipe.schema import SLT, Network
from kdfuse.engine.run.past import checkpoints_of
from kdfuse.engine.training.start import train

pytestmark = pytest.mark.slow(25)


def told(network):
    """The network with numbers in all of its tensors that change what it says."""
    generator = torch.Generator().manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low in ((module.running_mean, -0.5), (module.running_var, 0.5)):
                tensor.uniform_(low, low + 1, generator=generator)
            for tensor, low in ((module.weight, 0.5), (module.bias, -0.5)):
                tensor.data.uniform_(low, low + 1, generator=generator)
    return network.eval()


def theirs(layout, name, **options):
    """The library's own network of 10 classes, not by way of the engine."""
    if layout == "torchvision":
        return torchvision.models.get_model(name, num_classes=10)
    timm = pytest.importorskip("timm")
    return timm.create_model(name, num_classes=10, **options)


@pytest.mark.parametrize(
    ("name", "layout", "their_name", "options"),
    [
        ("torchvision:shufflenet_v2_x0_5", "torchvision", "shufflenet_v2_x0_5", {}),
        ("torchvision:vgg11_bn", "torchvision", "vgg11_bn", {}),
        ("torchvision:resnet18", "timm", "resnet18", {}),
        ("torchvision:resnet50", "timm", "resnet50", {}),
        ("torchvision:densenet121", "timm", "densenet121", {}),
        ("torchvision:mobilenet_v2", "timm", "mobilenetv2_100", {}),
        ("timm:resnet18", "torchvision", "resnet18", {}),
        ("timm:mobilenetv2_100", "torchvision", "mobilenet_v2", {}),
        ("timm:mobilenetv3_small_050", "timm", "mobilenetv3_small_050", {}),
        ("MobileNetV1", "timm", "mobilenetv1_100", {"act_layer": "relu"}),
    ],
)
def test_the_librarys_network_says_the_same(name, layout, their_name, options):
    if "timm" in (layout, name.partition(":")[0]):
        pytest.importorskip("timm")
    own = told(create(name, 10))
    twin, weights = laid_out(name, own.state_dict(), 10, layout)
    assert twin == Twin(layout, their_name, options)
    network = theirs(layout, their_name, **options).eval()
    network.load_state_dict(weights, strict=True)
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted, found = own(images), network(images)
    assert wanted.std() > 1e-3
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("resnet8", "timm"),
        ("ResNet18", "torchvision"),
        ("MobileNetV1", "torchvision"),
        ("torchvision:vgg11_bn", "timm"),  # of the same name and another shape
        ("torchvision:shufflenet_v2_x0_5", "timm"),
        ("timm:deit_tiny_patch16_224", "torchvision"),
    ],
)
def test_networks_that_the_library_has_not_are_refused(name, layout):
    if "timm" in (layout, name.partition(":")[0]):
        pytest.importorskip("timm")
    held = create(name, 10).state_dict()
    told = f"layout = '{layout}': {layout} has no network with the weights of {name}; it has those "
    with pytest.raises(ValueError, match=f"^{told}of {layout}:NAME, .*Without --layout"):
        laid_out(name, held, 10, layout)


def test_every_network_of_a_run_is_known_by_its_name():
    also = {"small": {"method": {"name": "kd"}, "student": {"name": "resnet20"}}}
    recipe = tiny(None, {"name": "slkd", "slts": 2}, data={"root": "unused"}, also=also)
    named = {"student": "resnet8", "ema": "resnet8", "small_student": "resnet20"}
    for name, wanted in (named | {"slt1": "resnet14"}).items():
        taught = recipe.model_copy(update={"teacher": Network(name="resnet14")})
        assert spec_of(taught, name).name == wanted
    own = recipe.model_copy(update={"slt": SLT(name="wrn_16_1")})
    assert spec_of(own, "slt0").name == "wrn_16_1"


@pytest.fixture(scope="module")
def run(few, tmp_path_factory):
    """A run of a network that both libraries have, under two names."""
    folder = tmp_path_factory.mktemp("run") / "mobile"
    return train(
        tiny(
            few,
            data={"source": "folder", "size": 32, "subset": 8},
            student={"name": "torchvision:mobilenet_v2"},
            run={"epochs": 1, "batch": 16},
        ),
        folder,
    )


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize(
    ("layout", "name"), [("torchvision", "mobilenet_v2"), ("timm", "mobilenetv2_100")]
)
def test_a_runs_student_loads_into_the_librarys_network(run, tmp_path, kd, layout, name, suffix):
    network = theirs(layout, name).eval()
    if suffix == ".safetensors":
        load = pytest.importorskip("safetensors.torch").load_file
    else:
        load = torch.load
    out = tmp_path / f"student{suffix}"
    result = kd("export", run, out, "--layout", layout, "--check", "all")
    assert result.code == 0, result.err
    network.load_state_dict(load(out), strict=True)
    own = create("torchvision:mobilenet_v2", 10)
    own.load_state_dict(checkpoints_of(run)["best"][0]["student"])
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(network(images), own.eval()(images), rtol=1e-4, atol=1e-5)


def test_a_librarys_network_that_computes_something_else_is_refused(run, tmp_path, monkeypatch):
    """Names and shapes are the same, the activation is not."""
    pytest.importorskip("timm")
    other = Twin("timm", "mobilenetv2_100", {"act_layer": "silu"})
    monkeypatch.setitem(OTHERWISE, "torchvision:mobilenet_v2", other)
    with pytest.raises(ValueError, match="not the run's network"):
        export(run, tmp_path / "student.pt", layout="timm")
    assert not list(tmp_path.iterdir())


def test_misuse_is_named(run, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="layout = 'keras': timm or torchvision"):
        export(run, tmp_path / "student.pt", layout="keras")
    with pytest.raises(
        ValueError, match=r"layout = 'timm': names weights, .*student.pt2 is a prog"
    ):
        export(run, tmp_path / "student.pt2", layout="timm")
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match="layout = 'timm': needs timm .*: pip install timm"):
        export(run, tmp_path / "student.pt", layout="timm")
    assert not list(tmp_path.iterdir())
