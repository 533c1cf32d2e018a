"""Networks: by name, checkpoint import and its messages, stage taps, folding."""

import argparse
import copy
import io
import os
import tarfile

import numpy as np
import pytest
import torch
from torch import nn

from kdfuse.engine.methods.method import stage_names
from kdfuse.engine.models import FoldError, Taps, Until, create, fold_batchnorm, points, shapes
from kdfuse.engine.run import checkpoint


def trained(name="resnet8", num_classes=10, seed=0):
    """A network whose BatchNorms have other statistics and weights than at the start."""
    torch.manual_seed(seed)
    model = create(name, num_classes)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_(0, 0.2)
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.3, 2)
    return model


def assert_same(model, other):
    for (key, a), (_, b) in zip(
        model.state_dict().items(), other.state_dict().items(), strict=True
    ):
        assert torch.equal(a, b), key


def test_initial_weights():
    torch.manual_seed(0)
    model = create("resnet32x4", 100)
    weight = model.layer3[0].conv1.weight  # fan in 128 * 9, fan out 256 * 9
    assert abs(weight.std().item() / (2 / (256 * 9)) ** 0.5 - 1) < 0.01
    assert torch.equal(model.bn1.weight, torch.ones(32)) and not model.bn1.bias.any()


def test_forward_is_the_published_arithmetic():
    model = trained("resnet14").double().eval()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)

    def norm(bn, v):
        scale = bn.weight / (bn.running_var + bn.eps).sqrt()
        return v * scale[:, None, None] + (bn.bias - bn.running_mean * scale)[:, None, None]

    def conv(layer, v, stride=1, padding=1):
        return torch.conv2d(v, layer.weight, None, stride, padding)

    y = norm(model.bn1, conv(model.conv1, x)).clamp(min=0)
    for stage, stride in ((model.layer1, 1), (model.layer2, 2), (model.layer3, 2)):
        for i, block in enumerate(stage):
            step = stride if i == 0 else 1
            z = norm(block.bn1, conv(block.conv1, y, step)).clamp(min=0)
            z = norm(block.bn2, conv(block.conv2, z))
            if block.downsample is not None:
                y = norm(block.downsample[1], conv(block.downsample[0], y, step, 0))
            y = (z + y).clamp(min=0)
    assert y.shape == (2, 64, 8, 8)
    expected = y.mean((2, 3)) @ model.fc.weight.T + model.fc.bias
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)


def test_other_image_sizes_and_one_compiled_graph():
    model = trained()
    assert model(torch.randn(2, 3, 40, 24)).shape == (2, 10)
    x = torch.randn(2, 3, 32, 32)
    expected = model.eval()(x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected)


def test_torchvision():
    model = create("torchvision:resnet18", 7)
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 7)
    assert sum(p.numel() for p in model.parameters()) == 11_689_512 - (1000 - 7) * 513


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("resnet18", "did you mean torchvision:resnet18"),
        ("resnet32x5", "resnet32x4"),
        ("torchvision:resnet19", "torchvision:resnet18"),
        ("nothing-like-it", "Known: resnet8,"),
        ("torchvision:inception_v3", "auxiliary outputs"),
    ],
)
def test_unknown_name(name, hint):
    with pytest.raises(ValueError, match=f"name: .*{name}.*{hint}"):
        create(name, 10)


def test_one_class_is_refused():
    with pytest.raises(ValueError, match="num_classes: 1;"):
        create("resnet8", 1)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"model": state, "epoch": 240, "best_acc": np.float32(72.3)},
        lambda state: {"state_dict": state, "best": np.float64(1), "n": np.int64(3)},
        lambda state: {"model": {f"module.{k}": v for k, v in state.items()}},
        lambda state: {f"_orig_mod.{k}": v for k, v in state.items()},
        lambda state: {f"module._orig_mod.{k}": v for k, v in state.items()},
    ],
    ids=["raw", "model", "state_dict", "module", "compiled", "both"],
)
def test_checkpoint_formats(wrap, tmp_path):
    model = trained()
    torch.save(wrap(model.state_dict()), tmp_path / "weights.pth")
    assert_same(create("resnet8", 10, tmp_path / "weights.pth"), model)


def test_checkpoint_pickled_under_numpy_1(tmp_path):
    buffer = io.BytesIO()
    held = {"model": trained().state_dict(), "best_acc": np.float64(72.34)}
    torch.save(held, buffer, _use_new_zipfile_serialization=False)
    data = buffer.getvalue()
    assert data.count(b"numpy._core.multiarray") == 1
    path = tmp_path / "old.pth"
    path.write_bytes(data.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n"))
    assert_same(create("resnet8", 10, path), trained())


def test_checkpoint_without_the_step_counters(tmp_path):
    state = {k: v for k, v in trained().state_dict().items() if "num_batches" not in k}
    torch.save(state, tmp_path / "old.pth")
    assert_same(create("resnet8", 10, tmp_path / "old.pth"), trained())


def test_checkpoint_of_a_run(tmp_path):
    model = trained()
    folder = tmp_path / "checkpoints"
    best = checkpoint.save(folder, "best", {"student": model.state_dict(), "step": 3}, {})
    for path in (tmp_path, best, best / "state.pt", str(tmp_path)):
        assert_same(create("resnet8", 10, path), model)
    data = bytearray((best / "state.pt").read_bytes())
    data[len(data) // 2] ^= 1
    (best / "state.pt").write_bytes(data)
    with pytest.raises(ValueError, match=r"state\.pt does not match its checksum"):
        create("resnet8", 10, tmp_path)
    with pytest.raises(FileNotFoundError, match="neither state.pt nor checkpoints/best"):
        create("resnet8", 10, folder)


def test_a_run_whose_best_was_being_replaced_is_a_teacher(tmp_path):
    """Killed between the two renames: the folder `best` is only there as what it replaces."""
    model = trained()
    best = checkpoint.save(tmp_path / "checkpoints", "best", {"student": model.state_dict()}, {})
    replaced = best.rename(best.with_name("best.old-123"))
    best.with_name("best.tmp-123").mkdir()
    for path in (tmp_path, best):
        assert_same(create("resnet8", 10, path), model)
    data = bytearray((replaced / "state.pt").read_bytes())
    data[len(data) // 2] ^= 1
    (replaced / "state.pt").write_bytes(data)
    with pytest.raises(ValueError, match=r"best\.old-123: state\.pt does not match its checksum"):
        create("resnet8", 10, tmp_path)
    (replaced / "sha256.json").write_text("[")
    with pytest.raises(ValueError, match=r"best\.old-123: sha256\.json is damaged"):
        create("resnet8", 10, tmp_path)


def test_other_number_of_classes(tmp_path):
    torch.save(create("resnet8", 10).state_dict(), tmp_path / "ten.pth")
    with pytest.raises(ValueError, match="ten.pth: has 10 classes, asked for 100$"):
        create("resnet8", 100, tmp_path / "ten.pth")
    torch.save(create("torchvision:squeezenet1_1", 3).state_dict(), tmp_path / "conv.pth")
    with pytest.raises(ValueError, match="has 3 classes, asked for 5$"):
        create("torchvision:squeezenet1_1", 5, tmp_path / "conv.pth")


def test_mismatch_is_counted_and_the_right_network_named(tmp_path):
    torch.save(create("resnet14", 10).state_dict(), tmp_path / "x.pth")
    with pytest.raises(ValueError) as caught:
        create("resnet8x4", 10, tmp_path / "x.pth")
    text = str(caught.value)
    assert "does not fit resnet8x4 with 10 classes: 5 keys missing, 36 unexpected, 46 of" in text
    assert "missing: layer1.0.downsample.0.weight, layer1.0.downsample.1.weight" in text
    assert "unexpected: layer1.1.conv1.weight" in text
    assert "conv1.weight is (16, 3, 3, 3), needs (32, 3, 3, 3)" in text
    assert "(43 more)" in text
    assert "it fits resnet14 with 10 classes" in text

    torch.save(create("torchvision:resnet34", 6).state_dict(), tmp_path / "y.pth")
    with pytest.raises(ValueError, match="it fits torchvision:resnet34 with 6 classes"):
        create("resnet8", 10, tmp_path / "y.pth")
    torch.save({"a": torch.zeros(2, 2)}, tmp_path / "z.pth")
    with pytest.raises(ValueError, match="47 keys missing, 1 unexpected, 0 of") as caught:
        create("resnet8", 10, tmp_path / "z.pth")
    assert "it fits" not in str(caught.value)


def test_what_is_not_a_checkpoint(tmp_path):
    path = tmp_path / "x"

    def refused(match, error=ValueError):
        with pytest.raises(error, match=f"checkpoint .*x: {match}"):
            create("resnet8", 10, path)

    refused("no such file", FileNotFoundError)
    torch.save(trained().state_dict(), path)
    data = path.read_bytes()
    with tarfile.open(tmp_path / "x.tar", "w:gz") as archive:
        archive.add(path, "x")
    for junk in (b"", b"<html>not found</html>", data[: len(data) // 2], bytes(1000)):
        path.write_bytes(junk)
        refused("not a PyTorch checkpoint, or a damaged one")
    path.write_bytes((tmp_path / "x.tar").read_bytes())
    refused("a tar archive; unpack it")
    for empty in ({}, {"epoch": 3, "model": {}}, {"model": {"a": 1}}):
        torch.save(empty, path)
        refused("no state dict in it.*student, model, state_dict; it holds the keys")
    torch.save([1, 2], path)
    refused("no state dict.*list")


def test_code_in_a_checkpoint_is_refused(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "ran"),))

    path = tmp_path / "x.pth"
    torch.save({"model": trained().state_dict(), "bomb": Bomb()}, path)
    with pytest.raises(ValueError, match="refused, loading it could run code: it holds posix"):
        create("resnet8", 10, path)
    torch.save({"model": trained().state_dict(), "opt": argparse.Namespace(lr=1)}, path)
    with pytest.raises(ValueError, match=r"refused.*argparse\.Namespace"):
        create("resnet8", 10, path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("name", "channels"),
    [
        ("resnet14", [16, 32, 64]),
        ("resnet8x4", [64, 128, 256]),
        ("torchvision:resnet18", [64, 128, 256, 512]),
        ("torchvision:resnext50_32x4d", [256, 512, 1024, 2048]),
    ],
)
def test_stages(name, channels):
    model = create(name, 10)
    keys, before = list(model.state_dict()), copy.deepcopy(model.state_dict())
    found = shapes(model, stage_names(points(model)), 64)
    assert [shape[1] for shape in found.values()] == channels
    assert model.training and type(model.get_submodule("layer1")) is nn.Sequential
    assert list(model.state_dict()) == keys
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_points_that_are_not_there_are_refused_with_the_nearest():
    with pytest.raises(ValueError, match="tap 'features.30': .*AlexNet; did you mean features"):
        Taps(create("torchvision:alexnet", 10), ["features.30"])
    with pytest.raises(ValueError, match="tap 'stage4': no such point of CifarResNet; did"):
        Taps(create("resnet8", 10), ["stage4"])
    assert points(create("torchvision:alexnet", 10)) == {}


def test_any_module_path_is_a_point_and_so_is_its_input():
    model = create("torchvision:alexnet", 10).eval()
    taps = Taps(model, ["features.5", "features.6:in", "classifier.6:in", "classifier.6"])
    with torch.no_grad():
        logits = model(torch.randn(2, 3, 64, 64))
    kept = taps.take()
    assert torch.equal(kept["features.5"], kept["features.6:in"])
    assert kept["classifier.6:in"].shape == (2, 4096)
    assert torch.equal(kept["classifier.6"], logits)


@pytest.mark.parametrize("name", ["torchvision:resnet18", "torchvision:resnet50"])
def test_torchvision_pre_activations_are_not_overwritten(name):
    model = trained(name).eval()
    taps = Taps(model, ["stem.pre", "stem", "stage2.pre", "stage2"])
    with torch.no_grad():
        model(torch.randn(2, 3, 64, 64))
    kept = taps.take()
    for stage in ("stem", "stage2"):
        assert (kept[f"{stage}.pre"] < 0).any()
        torch.testing.assert_close(kept[f"{stage}.pre"].relu(), kept[stage])


def test_timm_models_by_prefix_with_their_own_points():
    pytest.importorskip("timm")
    with pytest.raises(
        ValueError, match="timm has no model 'resnet18dd'; did you mean timm:resnet"
    ):
        create("timm:resnet18dd", 10)
    model = create("timm:resnet18", 10).eval()
    found = shapes(model, [*stage_names(points(model)), "layer2.1.act2:in"], 64)
    assert [shape[1] for shape in found.values()] == [64, 128, 256, 512, 128]
    assert [shape[2] for shape in found.values()] == [16, 8, 4, 2, 8]
    assert points(create("timm:swin_tiny_patch4_window7_224", 10)) == {}  # maps are (N, H, W, C)
    vit = create("timm:deit_tiny_patch16_224", 10)
    assert shapes(vit, ["blocks.10"], 224)["blocks.10"] == (1, 197, 192)
    assert vit.head.out_features == 10


def test_a_tap_that_the_network_overwrites_is_an_error():
    class Adds(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(3, 3)

        def forward(self, x):
            y = self.first(x)
            y += 1
            return y

    model = Adds()
    taps = Taps(model, ["first"])
    model(torch.randn(2, 3))
    with pytest.raises(RuntimeError, match="tap first: the network overwrites"):
        taps.take()


def test_what_a_dry_run_changes_it_changes_back():
    model = create("torchvision:resnet18", 10)
    shapes(model, ["stage1.pre"], 32)
    assert all(module.inplace for module in model.modules() if isinstance(module, nn.ReLU))


def test_a_point_that_the_network_reads_itself_is_named():
    inner = Until(create("resnet8", 10), "stage3")
    with pytest.raises(ValueError, match="the network reads that point itself"):
        Taps(inner, ["network.layer3.0.relu2"])


def test_taps_stay_in_a_folded_network():
    model = trained("resnet20").eval()
    taps = Taps(model, ["stage1", "stage3", "pooled"])
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        model(x)
        expected = taps.take()
        folded = fold_batchnorm(model)
        moved = taps.moved(folded)
        folded(x)
    for name, value in moved.take().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-4)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())


@pytest.mark.parametrize("compiled", [False, True])
def test_tap_reads_the_stage_once_and_carries_gradient(compiled):
    model = trained().eval()
    x = torch.randn(2, 3, 32, 32)
    stem = torch.relu(model.bn1(model.conv1(x)))
    expected = model.layer2(model.layer1(stem))
    runs = []
    model.layer2.register_forward_pre_hook(lambda *_: runs.append(1))
    taps = Taps(model, ["layer2"])
    if compiled:
        torch.compiler.reset()  # dynamo takes what it has of the class, hooks or not
        model.compile(fullgraph=True, backend="aot_eager")
    logits = model(x)
    output = taps.take()["layer2"]
    torch.testing.assert_close(output, expected)
    assert len(runs) == 1
    (output.square().mean() + logits.mean()).backward()
    assert model.layer1[0].conv1.weight.grad.abs().sum() > 0
    with pytest.raises(RuntimeError, match="tap layer2: no forward pass"):
        taps.take()
    model(2 * x)
    assert not torch.equal(taps.take()["layer2"], output)


def test_tap_inside_a_larger_compiled_step():
    model = trained().eval()
    taps = Taps(model, ["layer2"])

    def step(x):
        logits = model(x)
        return logits, taps.take()["layer2"].mean((2, 3))

    x = torch.randn(2, 3, 32, 32)
    expected = step(x)
    result = torch.compile(step, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(result, expected)


def test_a_tapped_model_can_be_copied():
    model = trained()
    taps = Taps(model, ["layer1"])
    model(torch.randn(2, 3, 32, 32))
    twin = copy.deepcopy(model)
    assert_same(twin, model)
    output = taps.take()["layer1"]
    model(torch.randn(2, 3, 32, 32))
    twin(torch.randn(3, 3, 32, 32))
    assert taps.take()["layer1"].shape == output.shape


def test_tap_is_not_lost_to_the_compiled_graph_of_another_network():
    """Networks of one class share compiled graphs; a tap must not be lost in one without it."""
    x = torch.randn(2, 3, 32, 32)
    plain, tapped, third = trained(seed=1), trained(seed=2), trained(seed=3)
    first, last = Taps(tapped, ["layer2"]), Taps(third, ["layer2"])
    for model in (plain, tapped, third):
        model.eval().compile(fullgraph=True, backend="aot_eager")
    for _ in range(2):
        for model in (plain, tapped, third):
            model(x)
        stem = torch.relu(third.bn1(third.conv1(x)))
        expected = third.layer2(third.layer1(stem)).detach()
        third(x)
        torch.testing.assert_close(last.take()["layer2"], expected)
        assert not torch.equal(first.take()["layer2"], expected)
        plain(x)
        with pytest.raises(RuntimeError, match="no forward pass"):
            first.take()


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("name", ["resnet20", "resnet8x4", "torchvision:resnet18"])
def test_fold_keeps_the_outputs(name, dtype, bound):
    model = trained(name).to(dtype)
    x = torch.randn(2, 3, 32, 32, dtype=dtype)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    folded = fold_batchnorm(model)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    assert not folded.training and not any(p.requires_grad for p in folded.parameters())
    assert model.training and all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(before[key], t) for key, t in model.state_dict().items())
    with torch.no_grad():
        expected = model.eval()(x)
        error = (folded(x) - expected).abs().max() / expected.abs().max()
    assert error < bound


def test_fold_works_in_mobilenet_and_keeps_the_layout_of_the_weights():
    model = trained("torchvision:mobilenet_v2").to(memory_format=torch.channels_last)
    folded = fold_batchnorm(model)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    weights = [m.weight for m in folded.modules() if isinstance(m, nn.Conv2d)]
    assert all(w.is_contiguous(memory_format=torch.channels_last) for w in weights)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(folded(x), model.eval()(x), rtol=1e-3, atol=1e-4)


def test_fold_refuses_what_it_cannot_trace():
    class Branching(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(FoldError, match="Branching cannot be traced by torch.fx"):
        fold_batchnorm(Branching())


def test_fold_refuses_a_shared_convolution():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)
            self.first, self.second = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

        def forward(self, x):
            return self.second(self.conv(self.first(self.conv(x))))

    with pytest.raises(FoldError, match="Shared calls conv 2 times"):
        fold_batchnorm(Shared())
