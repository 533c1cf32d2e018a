"""The networks themselves: published layouts and sizes, their arithmetic, gradients, folding."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn, relu

from kdfuse.engine.models import NETWORKS as ALL
from kdfuse.engine.models import fold_batchnorm
from kdfuse.engine.models.cifar_resnet import NARROW, CifarResNet
from kdfuse.engine.models.plain import PLAIN
from kdfuse.engine.models.wrn import WideResNet

pytestmark = pytest.mark.slow(25)

NETWORKS = {name: make for name, make in ALL.items() if name not in PLAIN}  # see test_plain

LAYOUTS = json.loads((Path(__file__).with_name("network_layouts.json")).read_text())

# Stem and stages as channels@size, then the pooled channels, of images of 32 x 32.
SHAPES = {
    "16@32 16@32 32@16 64@8 64": """resnet8 resnet14 resnet20 resnet32 resnet38 resnet44 resnet56
        resnet110 resnet116 wrn_16_1 wrn_40_1""",
    "16@32 32@32 64@16 128@8 128": "resnet14x2 resnet38x2 resnet110x2 wrn_16_2 wrn_40_2",
    "32@32 64@32 128@16 256@8 256": "resnet8x4 resnet32x4 resnet38x4",
    "64@32 64@32 128@16 256@8 512@4 512": "ResNet18 ResNet34",
    "64@32 256@32 512@16 1024@8 2048@4 2048": "ResNet50",
    "64@32 128@16 256@8 512@4 512@4 512": "vgg8 vgg11 vgg13 vgg16 vgg19",
    "16@16 12@16 16@8 48@4 160@2 1280": "MobileNetV2",
    "32@16 24@16 32@8 96@4 320@2 1280": "MobileNetV2_1_0",
    "24@32 240@16 480@8 960@4 960": "ShuffleV1",
    "24@32 116@16 232@8 464@4 1024": "ShuffleV2",
    "24@32 176@16 352@8 704@4 1024": "ShuffleV2_1_5",
    "32@112 128@56 256@28 512@14 1024@7 1024": "MobileNetV1",  # of images of 224 x 224
}
SHAPES_OF = {name: shapes for shapes, names in SHAPES.items() for name in names.split()}

# Of each kind of block and shortcut; the others repeat more of them or have more channels.
KINDS = """resnet8 resnet14 wrn_16_1 wrn_16_2 resnet8x4 ResNet18 ResNet50 vgg8 vgg11 MobileNetV1
    MobileNetV2 MobileNetV2_1_0 ShuffleV1 ShuffleV2""".split()


def entries(layers, prefix=""):
    """Keys and shapes of a fixture: "path kind size" a layer, [range of blocks, layer ...]."""
    for layer in layers:
        if isinstance(layer, list):
            stage, _, span = layer[0].rpartition(".")
            first, _, last = span.partition("-")
            for block in range(int(first), int(last or first) + 1):
                yield from entries(layer[1:], f"{stage}.{block}.")
            continue
        path, kind, size = layer.split()
        shape = tuple(int(n) for n in size.split("x"))
        yield f"{prefix}{path}.weight", shape
        if kind != "conv":
            yield f"{prefix}{path}.bias", shape[:1]
        if kind == "bn":
            yield f"{prefix}{path}.running_mean", shape
            yield f"{prefix}{path}.running_var", shape
            yield f"{prefix}{path}.num_batches_tracked", ()


@pytest.mark.parametrize("name", LAYOUTS)
def test_published_layout(name):
    published = list(entries(LAYOUTS[name]["layers"]))
    with torch.device("meta"):
        model = NETWORKS[name](published[-1][1][0])
    assert [(key, tuple(tensor.shape)) for key, tensor in model.state_dict().items()] == published
    assert sum(p.numel() for p in model.parameters()) == LAYOUTS[name]["params"]
    assert len(published) == LAYOUTS[name]["keys"]


def test_layouts_are_of_the_published_networks():
    assert len(LAYOUTS) == 24 and set(LAYOUTS) < set(NETWORKS) == set(SHAPES_OF)
    assert LAYOUTS["resnet32x4"]["params"] == 7_433_860 and LAYOUTS["resnet56"]["keys"] == 344
    assert LAYOUTS["MobileNetV1"]["params"] == 4_231_976


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("resnet38", "0.570"),
        ("resnet116", "1.834"),
        ("resnet14x2", "0.704"),
        ("resnet38x2", "2.256"),
        ("resnet110x2", "6.911"),
        ("resnet38x4", "8.984"),
        ("MobileNetV2_1_0", "2.353"),
        ("ShuffleV2_1_5", "2.581"),
    ],
)
def test_parameters_of_networks_without_a_layout(name, millions):
    with torch.device("meta"):
        model = NETWORKS[name](100)
    assert f"{sum(p.numel() for p in model.parameters()) / 1e6:.3f}" == millions


def observe(model):
    """What passes each tap point of `model`, as lists by name, filled by forward passes."""
    seen = {name: [] for name in model.taps if name != "classifier"}
    for name, kept in seen.items():
        path, _, side = model.taps[name].partition(":")
        module = model.get_submodule(path)
        if side:
            assert side == "in"
            module.register_forward_pre_hook(lambda _, args, kept=kept: kept.append(args[0]))
        else:
            module.register_forward_hook(lambda _, args, output, kept=kept: kept.append(output))
    return seen


@pytest.mark.parametrize("name", NETWORKS)
def test_published_sizes(name):
    size = 224 if name == "MobileNetV1" else 32
    with torch.device("meta"):
        model = NETWORKS[name](10)
        seen = observe(model)
        logits = model(torch.empty(2, 3, size, size))
    assert logits.shape == (2, 10)

    *shapes, pooled = SHAPES_OF[name].split()
    points = ["stem", *(f"stage{i}" for i in range(1, len(shapes)))]
    expected = {"pooled": (2, int(pooled), 1, 1)}
    for point, shape in zip(points, shapes, strict=True):
        channels, height = map(int, shape.split("@"))
        expected[point] = expected[f"{point}.pre"] = (2, channels, height, height)
    if name.startswith("wrn"):
        del expected["stem.pre"]
    assert all(len(tensors) == 1 for tensors in seen.values())
    assert {point: tensor.shape for point, (tensor,) in seen.items()} == expected
    classifier = model.get_submodule(model.taps["classifier"])
    assert (classifier.in_features, classifier.out_features) == (int(pooled), 10)


@pytest.mark.parametrize("name", KINDS)
def test_a_gradient_for_every_parameter(name):
    torch.manual_seed(0)
    model = NETWORKS[name](10)
    size = 64 if name == "MobileNetV1" else 32
    logits = model(torch.randn(2, 3, size, size))
    F.cross_entropy(logits, torch.tensor([3, 7])).backward()
    # A BatchNorm takes away what the bias of a convolution adds: its gradient is rounding alone.
    idle = {f"{path}.bias" for path, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    for key, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), key
        assert parameter.grad.any() or key in idle, key


def worn(name, dtype=torch.float64):
    """A network whose BatchNorms have statistics and weights as after some training."""
    torch.manual_seed(0)
    model = NETWORKS[name](10)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_(0, 0.2)
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.3, 2)
    return model.to(dtype).eval()


class Layers:
    """Layers written out, with the weights that a network's state dict has at a path."""

    def __init__(self, model):
        self.of = dict(model.named_parameters()) | dict(model.named_buffers())

    def conv(self, path, x, stride=1, groups=1):
        weight, bias = self.of[f"{path}.weight"], self.of.get(f"{path}.bias")
        return F.conv2d(x, weight, bias, stride, weight.shape[-1] // 2, groups=groups)

    def depthwise(self, path, x, stride=1):
        return self.conv(path, x, stride, groups=x.shape[1])

    def bn(self, path, x):
        w, b, mean, var = (
            self.of[f"{path}.{leaf}"][:, None, None]
            for leaf in ("weight", "bias", "running_mean", "running_var")
        )
        return (x - mean) / (var + 1e-5).sqrt() * w + b

    def classify(self, path, x, points):
        points["pooled"] = x.mean((2, 3), keepdim=True)
        weight, bias = self.of[f"{path}.weight"], self.of[f"{path}.bias"]
        return points["pooled"].flatten(1) @ weight.T + bias


def keep(points, name, before):
    """The ReLU of `before`, both kept as points."""
    points[f"{name}.pre"], points[name] = before, relu(before)
    return points[name]


def shuffled(x, groups):
    """Channel i of group g goes to place i * groups + g."""
    size = x.shape[1] // groups
    return x[:, [g * size + i for i in range(size) for g in range(groups)]]


def resnet(net, x, points, blocks, convolutions, shortcut, classifier):
    x = keep(points, "stem", net.bn("bn1", net.conv("conv1", x)))
    for stage, count in enumerate(blocks, 1):
        for i in range(count):
            at = f"layer{stage}.{i}"
            stride = 2 if stage > 1 and i == 0 else 1
            out = x
            for k in range(1, convolutions + 1):
                # The 3 x 3 convolution strides: the first of two, the second of three.
                step = stride if k == convolutions - 1 else 1
                out = net.bn(f"{at}.bn{k}", net.conv(f"{at}.conv{k}", out, step))
                out = relu(out) if k < convolutions else out
            if f"{at}.{shortcut}.0.weight" in net.of:
                x = net.bn(f"{at}.{shortcut}.1", net.conv(f"{at}.{shortcut}.0", x, stride))
            x = keep(points, f"stage{stage}", out + x)
    return net.classify(classifier, x, points)


def wrn(net, x, points, blocks, widen):
    x = points["stem"] = net.conv("conv1", x)
    for stage in (1, 2, 3):
        for i in range(blocks):
            at = f"block{stage}.layer.{i}"
            stride = 2 if stage > 1 and i == 0 else 1
            normed = net.bn(f"{at}.bn1", x)
            if i == 0 and stage > 1:
                points[f"stage{stage - 1}.pre"] = normed
            out = relu(net.bn(f"{at}.bn2", net.conv(f"{at}.conv1", relu(normed), stride)))
            out = net.conv(f"{at}.conv2", out)
            if i == 0 and (stage > 1 or widen > 1):
                x = net.conv(f"{at}.convShortcut", relu(normed), stride)
            x = x + out
        points[f"stage{stage}"] = x
    points["stage3.pre"] = net.bn("bn1", x)
    return net.classify("fc", relu(points["stage3.pre"]), points)


def vgg(net, x, points, convolutions):
    halved = (0, 1, 2, 3) if x.shape[2] == 64 else (0, 1, 2)
    for block, count in enumerate(convolutions):
        for i in range(count):
            at = f"block{block}.{{}}".format
            x = net.bn(at(3 * i + 1), net.conv(at(3 * i), x))
            x = relu(x) if i < count - 1 else x
        x = keep(points, f"stage{block}" if block else "stem", x)
        x = F.max_pool2d(x, 2) if block in halved else x
    return net.classify("classifier", x, points)


def mobilenet_v1(net, x, points):
    x = keep(points, "stem", net.bn("model.0.1", net.conv("model.0.0", x, stride=2)))
    stages = {3: 1, 5: 2, 11: 3, 13: 4}
    for i in range(1, 14):
        at = f"model.{i}.{{}}".format
        stride = 2 if i in (2, 4, 6, 12) else 1
        x = relu(net.bn(at(1), net.depthwise(at(0), x, stride)))
        x = net.bn(at(4), net.conv(at(3), x))
        x = keep(points, f"stage{stages[i]}", x) if i in stages else relu(x)
    return net.classify("fc", x, points)


def mobilenet_v2(net, x, points):
    x = keep(points, "stem", net.bn("conv1.1", net.conv("conv1.0", x, stride=2)))
    stages = {1: 1, 2: 2, 4: 3, 6: 4}
    for group, (count, stride) in enumerate(
        ((1, 1), (2, 1), (3, 2), (4, 2), (3, 1), (3, 2), (1, 1))
    ):
        for i in range(count):
            at = f"blocks.{group}.{i}.conv.{{}}".format
            out = relu(net.bn(at(1), net.conv(at(0), x)))
            out = relu(net.bn(at(4), net.depthwise(at(3), out, stride if i == 0 else 1)))
            out = net.bn(at(7), net.conv(at(6), out))
            x = x + out if i else out
        if group in stages:
            points[f"stage{stages[group]}"] = points[f"stage{stages[group]}.pre"] = x
    x = relu(net.bn("conv2.1", net.conv("conv2.0", x)))
    return net.classify("classifier.0", x, points)


def shufflenet_v1(net, x, points):
    x = keep(points, "stem", net.bn("bn1", net.conv("conv1", x)))
    for stage, count in ((1, 4), (2, 8), (3, 4)):
        for i in range(count):
            at = f"layer{stage}.{i}"
            groups = 1 if (stage, i) == (1, 0) else 3
            out = relu(net.bn(f"{at}.bn1", net.conv(f"{at}.conv1", x, groups=groups)))
            out = net.depthwise(f"{at}.conv2", shuffled(out, groups), stride=2 if i == 0 else 1)
            out = net.conv(f"{at}.conv3", relu(net.bn(f"{at}.bn2", out)), groups=3)
            out = net.bn(f"{at}.bn3", out)
            pooled = F.avg_pool2d(F.pad(x, (1, 1, 1, 1)), 3, 2) if i == 0 else None
            out = torch.cat([out, pooled], 1) if i == 0 else out + x
            x = keep(points, f"stage{stage}", out)
    return net.classify("linear", x, points)


def shufflenet_v2(net, x, points):
    x = keep(points, "stem", net.bn("bn1", net.conv("conv1", x)))
    for stage, count in ((1, 4), (2, 8), (3, 4)):
        at = f"layer{stage}.0"
        left = net.bn(f"{at}.bn1", net.depthwise(f"{at}.conv1", x, stride=2))
        left = relu(net.bn(f"{at}.bn2", net.conv(f"{at}.conv2", left)))
        right = relu(net.bn(f"{at}.bn3", net.conv(f"{at}.conv3", x)))
        right = net.bn(f"{at}.bn4", net.depthwise(f"{at}.conv4", right, stride=2))
        right = relu(net.bn(f"{at}.bn5", net.conv(f"{at}.conv5", right)))
        x = shuffled(torch.cat([left, right], 1), 2)
        for i in range(1, count):
            at = f"layer{stage}.{i}"
            half = x.shape[1] // 2
            kept, out = x[:, :half], x[:, half:]
            out = relu(net.bn(f"{at}.bn1", net.conv(f"{at}.conv1", out)))
            out = net.bn(f"{at}.bn2", net.depthwise(f"{at}.conv2", out))
            out = net.bn(f"{at}.bn3", net.conv(f"{at}.conv3", out))
            points[f"stage{stage}.pre"] = torch.cat([kept, out], 1)
            x = points[f"stage{stage}"] = shuffled(torch.cat([kept, relu(out)], 1), 2)
    x = relu(net.bn("bn2", net.conv("conv2", x)))
    return net.classify("linear", x, points)


@pytest.mark.parametrize(
    ("name", "size", "arithmetic", "facts"),
    [
        ("resnet14", 32, resnet, ((2, 2, 2), 2, "downsample", "fc")),
        ("ResNet18", 16, resnet, ((2, 2, 2, 2), 2, "shortcut", "linear")),
        ("ResNet50", 16, resnet, ((3, 4, 6, 3), 3, "shortcut", "linear")),
        ("wrn_16_1", 32, wrn, (2, 1)),
        ("wrn_16_2", 32, wrn, (2, 2)),
        ("vgg8", 32, vgg, ((1, 1, 1, 1, 1),)),
        ("vgg11", 64, vgg, ((1, 1, 2, 2, 2),)),
        ("MobileNetV1", 64, mobilenet_v1, ()),
        ("MobileNetV2", 32, mobilenet_v2, ()),
        ("ShuffleV1", 32, shufflenet_v1, ()),
        ("ShuffleV2", 32, shufflenet_v2, ()),
    ],
)
def test_arithmetic_at_every_point_and_its_gradients(name, size, arithmetic, facts):
    model = worn(name)
    seen = observe(model)
    x = torch.randn(2, 3, size, size, dtype=torch.float64)
    logits, points = model(x), {}
    expected = arithmetic(Layers(model), x, points, *facts)
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)
    assert set(points) - set(seen) <= {"stem.pre"} and set(seen) <= set(points)
    for point, (tensor,) in seen.items():
        torch.testing.assert_close(tensor, points[point], rtol=1e-9, atol=1e-9)

    # A loss of every point, so that gradients enter and pass wherever a method may read.
    def gradients(features, logits):
        loss = sum(torch.tanh(t).square().mean() for t in (*features, logits))
        return torch.autograd.grad(loss, list(model.parameters()))

    names = sorted(seen)
    found = gradients([seen[point][0] for point in names], logits)
    wanted = gradients([points[point] for point in names], expected)
    for (key, _), *pair in zip(model.named_parameters(), found, wanted, strict=True):
        message = f"gradient of {key}: {{}}".format
        torch.testing.assert_close(*pair, rtol=1e-7, atol=1e-10, msg=message)


@pytest.mark.parametrize("name", KINDS)
def test_fold_keeps_the_outputs(name):
    model = worn(name)
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    calls = Counter(n.target for n in fx.symbolic_trace(model).graph.nodes if n.op == "call_module")
    assert set(calls.values()) == {1}
    relus = [(path, m) for path, m in model.named_modules() if isinstance(m, nn.ReLU)]
    assert all(path in calls and not m.inplace for path, m in relus)

    folded = fold_batchnorm(model)
    with torch.no_grad():
        expected = model(x)
        error = (folded(x) - expected).abs().max() / expected.abs().max()
    assert error < 1e-10
    left = {path for path, m in folded.named_modules() if isinstance(m, nn.BatchNorm2d)}
    alone = set()  # pre-activation: behind a sum, which no convolution can absorb
    if name.startswith("wrn"):
        alone = {path for path, _ in model.named_modules() if path.endswith("bn1")}
        # A widened first stage starts with a convolution in its shortcut: no sum is left here.
        alone -= {"block1.layer.0.bn1"} if name.endswith("_2") else set()
    assert left == alone


def test_one_folded_vgg_has_the_sizes_that_pool_differently():
    model = worn("vgg8")
    folded = fold_batchnorm(model)
    for size in (32, 64, 96):
        x = torch.randn(1, 3, size, size, dtype=torch.float64)
        torch.testing.assert_close(folded(x), model(x), rtol=1e-9, atol=1e-9)


SMALLEST = "ResNet18 wrn_16_1 vgg8 MobileNetV1 MobileNetV2 ShuffleV1 ShuffleV2".split()


@pytest.mark.parametrize("name", SMALLEST)
def test_other_image_sizes_and_one_compiled_graph(name):
    model = worn(name, torch.float32)
    x = torch.randn(2, 3, 40, 24)
    expected = model(x)
    assert expected.shape == (2, 10)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-4)


def test_first_weights():
    torch.manual_seed(0)

    def spread(model, path):
        return model.get_submodule(path).weight.std().item()

    close = pytest.approx
    wide = NETWORKS["ResNet18"](100)
    assert spread(wide, "layer3.0.conv1") == close((2 / (9 * 256)) ** 0.5, rel=0.01)
    assert spread(NETWORKS["wrn_40_2"](100), "block3.layer.0.conv1") == close(
        (2 / (9 * 128)) ** 0.5, rel=0.02
    )
    for name, conv, fan_out, classifier in (
        ("vgg8", "block3.0", 9 * 512, "classifier"),
        ("MobileNetV2", "blocks.6.0.conv.3", 9 * 480, "classifier.0"),  # depthwise
    ):
        model = NETWORKS[name](100)
        assert spread(model, conv) == close((2 / fan_out) ** 0.5, rel=0.03)
        assert spread(model, classifier) == close(0.01, rel=0.02)
    zero = (
        NETWORKS["vgg8"](10).block2[0].bias,
        NETWORKS["vgg8"](10).classifier.bias,
        NETWORKS["wrn_16_1"](10).fc.bias,
    )
    assert not any(bias.any() for bias in zero)
    # PyTorch's own: uniform within 1 / sqrt(fan in).
    for name, conv, fan_in in (
        ("ShuffleV1", "layer2.3.conv1", 160),
        ("ShuffleV2", "conv2", 464),
        ("MobileNetV1", "model.9.3", 512),
    ):
        weight = NETWORKS[name](10).get_submodule(conv).weight.abs()
        assert 0.99 < weight.max() * fan_in**0.5 <= 1


def test_depths_that_make_no_network():
    with pytest.raises(ValueError, match="depth: 15 is not 6 n \\+ 2"):
        CifarResNet(15, NARROW, 10)
    with pytest.raises(ValueError, match="depth: 38 is not 6 n \\+ 4"):
        WideResNet(38, 1, 10)
