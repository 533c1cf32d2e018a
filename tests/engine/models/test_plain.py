"""Dirac convolutions and JointRD's networks with and without shortcuts."""

import copy

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import fx, nn

from kdfuse.engine.models import fold_batchnorm, plain
from kdfuse.engine.models.dirac import DiracConv2d, dirac_init_, fold_dirac
from kdfuse.engine.models.plain import PLAIN, ReluFirstResNet, everywhere, ordinary, released

pytestmark = pytest.mark.slow(15)

# in, out, kernel, stride, padding: as in the networks, then kernels that no network has.
SHAPES = [
    (4, 4, 3, 1, 1),
    (4, 4, 3, 2, 1),
    (3, 5, 1, 1, 0),
    (5, 3, 1, 2, 0),
    (3, 4, (3, 1), (1, 2), (1, 0)),
    (2, 2, (2, 4), 1, 0),
]
BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}
ONES = {depth: [[1] * n for n in blocks] for depth, blocks in BLOCKS.items()}
NONE = {depth: [[0] * n for n in blocks] for depth, blocks in BLOCKS.items()}
RELEASED = {
    18: [[0, 0], [1, 0], [1, 0], [1, 0]],
    34: [[0, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0, 0, 0], [1, 0, 0]],
    50: [[0, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0, 0, 0], [1, 0, 0]],
}
DIRAC = ["", "_dirac", "_dirac_normalised", "_dirac_init"]


@pytest.fixture
def narrow(monkeypatch):
    """Networks with an eighth of their channels."""
    monkeypatch.setattr(plain, "_WIDTHS", (8, 16, 32, 64))


def random_dirac(shape, normalised=False, seed=0):
    """A float64 DiracConv2d whose alpha, beta and W are far from the start."""
    torch.manual_seed(seed)
    *size, stride, padding = shape
    conv = DiracConv2d(*size, stride, padding, normalised=normalised).double()
    for parameter in conv.parameters():
        nn.init.normal_(parameter)
    return conv


def build(name, num_classes=10, seed=0):
    """A float64 network; its BatchNorms and Dirac scales are not those of the start."""
    torch.manual_seed(seed)
    model = PLAIN[name](num_classes).double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.2)
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.3, 2)
        elif isinstance(module, DiracConv2d):
            nn.init.uniform_(module.alpha, 0.5, 1.5)
            nn.init.uniform_(module.beta, 0.1, 0.3)
    return model.eval()


def images(n=2, size=16, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, size, size, dtype=torch.float64, generator=generator)


def delta(weight):
    """1 where a channel passes itself on through the kernel's centre."""
    out = torch.zeros_like(weight)
    out[:, :, weight.shape[2] // 2, weight.shape[3] // 2] = torch.eye(*weight.shape[:2])
    return out


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dirac_conv_is_its_formula(shape, normalised):
    conv = random_dirac(shape, normalised)
    x = torch.randn(2, shape[0], 6, 7, dtype=torch.float64)
    output = conv(x)
    upstream = torch.randn_like(output)
    output.backward(upstream)

    w, a, b = (p.detach() for p in (conv.weight, conv.alpha, conv.beta))
    norm = (w**2).sum((1, 2, 3), keepdim=True).sqrt() if normalised else torch.ones(1)
    hat = w / norm
    column = (slice(None), None, None, None)
    columns = F.unfold(x, conv.kernel_size, padding=conv.padding, stride=conv.stride)
    effective = a[column] * delta(w) + b[column] * hat
    torch.testing.assert_close(
        output.flatten(2), effective.flatten(1) @ columns, rtol=1e-12, atol=1e-12
    )

    gradient = torch.einsum("nop,nkp->ok", upstream.flatten(2), columns).view_as(w)
    along = (gradient * hat).sum((1, 2, 3))
    expected = b[column] * gradient
    if normalised:
        expected = b[column] * (gradient - hat * along[column]) / norm
    torch.testing.assert_close(conv.weight.grad, expected, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(conv.beta.grad, along, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(conv.alpha.grad, (gradient * delta(w)).sum((1, 2, 3)))


@pytest.mark.parametrize("normalised", [False, True])
def test_dirac_conv_gradcheck(normalised):
    conv = random_dirac((3, 2, 3, 2, 1), normalised)
    names = [name for name, _ in conv.named_parameters()]

    def call(x, *values):
        return torch.func.functional_call(conv, dict(zip(names, values, strict=True)), (x,))

    x = torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(call, (x, *conv.parameters()))
    assert torch.autograd.gradgradcheck(call, (x, *conv.parameters()))


def test_dirac_conv_at_the_start():
    conv = DiracConv2d(4, 6, 3, padding=1)
    assert sorted(dict(conv.named_parameters())) == ["alpha", "beta", "weight"]
    assert not conv.state_dict().keys() - dict(conv.named_parameters()).keys()
    assert torch.equal(conv.alpha, torch.ones(6)) and torch.equal(conv.beta, torch.full((6,), 0.1))
    assert set(conv.no_weight_decay) == {"alpha", "beta"}
    with torch.no_grad():
        conv.beta.zero_()
        x = torch.randn(2, 4, 5, 5)
        assert torch.equal(conv(x)[:, :4], x) and not conv(x)[:, 4:].any()


def test_dirac_init_starts_near_the_identity():
    torch.manual_seed(0)
    conv = ordinary(64, 64, 3, 1)
    before = conv.weight.detach().clone()
    assert dirac_init_(conv.weight) is conv.weight and conv.weight.requires_grad
    torch.testing.assert_close(conv.weight.detach(), delta(before) + 0.1 * before)
    x = torch.randn(8, 64, 16, 16)
    with torch.no_grad():
        moved = (conv(x) - x).norm() / x.norm()
    assert abs(moved / (0.1 * 2**0.5) - 1) < 0.1  # W has 9 * 64 inputs of variance 2 / (9 * 64)

    same = DiracConv2d(64, 64, 3, padding=1)
    same.load_state_dict({"weight": before, "alpha": same.alpha, "beta": same.beta})
    torch.testing.assert_close(conv(x), same(x), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"weight: \(3, 3\)"):
        dirac_init_(torch.zeros(3, 3))


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fold_of_one_layer(shape, normalised):
    conv = random_dirac(shape, normalised)
    conv.weight.requires_grad_(False)
    state = torch.get_rng_state()
    folded = fold_dirac(conv)
    assert torch.equal(state, torch.get_rng_state())
    assert type(folded) is nn.Conv2d and not folded.weight.requires_grad
    assert list(folded.state_dict()) == ["weight"]
    x = torch.randn(2, shape[0], 6, 7, dtype=torch.float64)
    torch.testing.assert_close(folded(x), conv(x), rtol=1e-10, atol=1e-10)


def test_fold_keeps_shared_layers_shared_and_the_layout():
    conv = random_dirac((4, 4, 3, 1, 1)).to(memory_format=torch.channels_last)
    model = nn.Sequential(conv, nn.ReLU(), nn.Sequential(conv)).eval()
    folded = fold_dirac(model)
    assert folded[0] is folded[2][0] and not folded[0].training
    assert folded[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert model[0] is conv and model[2][0] is conv
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    torch.testing.assert_close(folded(x), model(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["plain18_dirac", "imagenet_plain50_none_dirac_normalised"])
def test_folds_of_a_network(name, narrow):
    model, x = build(name), images(size=32)
    keys = list(model.state_dict())
    with torch.no_grad():
        expected = model(x)
        folded = fold_dirac(model)
        assert not any(isinstance(m, DiracConv2d) for m in folded.modules())
        assert list(folded.state_dict()) == [
            k for k in keys if "alpha" not in k and "beta" not in k
        ]
        assert folded.taps == model.taps and list(model.state_dict()) == keys
        torch.testing.assert_close(folded(x), expected, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(fx.symbolic_trace(model)(x), expected)
        whole = fold_batchnorm(folded)
        assert not any(isinstance(m, nn.BatchNorm2d) for m in whole.modules())
        torch.testing.assert_close(whole(x), expected, rtol=1e-9, atol=1e-9)


def of_params(name, num_classes=100):
    with torch.device("meta"):
        return sum(p.numel() for p in PLAIN[name](num_classes).parameters())


@pytest.mark.parametrize(
    ("depth", "resnet", "unused", "projections", "dirac_channels"),
    [
        # Dirac channels: two convolutions a block; in bottlenecks one of them is 4 times as wide.
        (18, 11_220_132, 0, (64 * 128, 128 * 256, 256 * 512), 4 * (64 + 128 + 256 + 512)),
        (
            34,
            21_328_292,
            0,
            (64 * 128, 128 * 256, 256 * 512),
            2 * (3 * 64 + 4 * 128 + 6 * 256 + 3 * 512),
        ),
        # Stage 1 widens 64 to 256 channels: the released plain network keeps that projection,
        # unused, and so counts as many parameters as its teacher.
        (
            50,
            23_705_252,
            64 * 256 + 2 * 256,
            (256 * 512, 512 * 1024, 1024 * 2048),
            5 * (3 * 64 + 4 * 128 + 6 * 256 + 3 * 512),
        ),
    ],
)
def test_parameter_counts(depth, resnet, unused, projections, dirac_channels):
    assert of_params(f"jointrd_resnet{depth}") == resnet
    assert of_params(f"plain{depth}") == resnet - unused
    widths = (128, 256, 512) if depth < 50 else (512, 1024, 2048)
    bare = resnet - unused - sum(projections) - 2 * sum(widths)
    assert of_params(f"plain{depth}_none") == bare
    stem = 3 * 64 * (7 * 7 - 3 * 3)
    for start, scales in zip(DIRAC, (0, 2, 2, 0), strict=True):
        extra = scales * dirac_channels
        assert of_params(f"plain{depth}{start}") == resnet - unused + extra
        assert of_params(f"plain{depth}_none{start}") == bare + extra
        assert of_params(f"imagenet_plain{depth}_none{start}") == bare + extra + stem


@pytest.mark.parametrize("depth", [18, 34, 50])
def test_imagenet_teachers_are_torchvisions_resnets(depth):
    model = build(f"imagenet_jointrd_resnet{depth}")
    peer = torchvision.models.get_model(f"resnet{depth}", num_classes=10).double().eval()
    assert list(model.state_dict()) == list(peer.state_dict())
    peer.load_state_dict(model.state_dict())
    mine, theirs = images(size=64).requires_grad_(), images(size=64).requires_grad_()
    output, expected = model(mine), peer(theirs)
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
    output.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-9, atol=1e-12)


def by_hand(state, x, depth, flags, normalised=False):
    """The network's taps and logits from its state dict alone; ReLU comes first in a block."""

    def conv(path, v, stride, padding):
        w = state[f"{path}.weight"]
        if f"{path}.alpha" in state:
            length = w.flatten(1).norm(dim=1) if normalised else 1
            a, b = state[f"{path}.alpha"], state[f"{path}.beta"] / length
            w = a[:, None, None, None] * delta(w) + b[:, None, None, None] * w
        return torch.conv2d(v, w, None, stride, padding)

    def norm(path, v):
        weight, bias, mean, var = (
            state[f"{path}.{leaf}"] for leaf in ("weight", "bias", "running_mean", "running_var")
        )
        scale = weight / (var + 1e-5).sqrt()
        return v * scale[:, None, None] + (bias - mean * scale)[:, None, None]

    seen = {}
    x = seen["stem.pre"] = norm("bn1", conv("conv1", x, 1, 1))
    for i, stage in enumerate(flags):
        for j, flag in enumerate(stage):
            path, stride = f"layer{i + 1}.{j}", 2 if i and not j else 1
            x = x.clamp(min=0)
            if depth == 50:
                y = norm(f"{path}.bn1", conv(f"{path}.conv1", x, 1, 0)).clamp(min=0)
                y = norm(f"{path}.bn2", conv(f"{path}.conv2", y, stride, 1)).clamp(min=0)
                y = norm(f"{path}.bn3", conv(f"{path}.conv3", y, 1, 0))
            else:
                y = norm(f"{path}.bn1", conv(f"{path}.conv1", x, stride, 1)).clamp(min=0)
                y = norm(f"{path}.bn2", conv(f"{path}.conv2", y, 1, 1))
            if flag and y.shape != x.shape:
                x = norm(f"{path}.downsample.1", conv(f"{path}.downsample.0", x, stride, 0))
            x = x + y if flag else y
        seen[f"stage{i + 1}.pre"] = x
    seen |= {key.removesuffix(".pre"): v.clamp(min=0) for key, v in seen.items()}
    seen["pooled"] = seen["stage4"].mean((2, 3), keepdim=True)
    return seen, seen["pooled"].flatten(1) @ state["fc.weight"].T + state["fc.bias"]


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("jointrd_resnet18", ONES),
        ("jointrd_resnet34", ONES),
        ("jointrd_resnet50", ONES),
        ("plain18_dirac_init", RELEASED),
        ("plain34_dirac", RELEASED),
        ("plain50", RELEASED),
        ("plain50_dirac_normalised", RELEASED),
        ("plain18_none", NONE),
        ("plain50_none_dirac", NONE),
    ],
)
def test_forward_and_taps_by_hand(name, flags, narrow):
    model, x = build(name), images()
    depth = next(d for d in (18, 34, 50) if str(d) in name)
    seen, logits = by_hand(model.state_dict(), x, depth, flags[depth], "normalised" in name)

    read = {}

    def keep(point, from_input):
        def hook(module, inputs, output):
            assert point not in read, f"{point} ran twice"
            read[point] = inputs[0] if from_input else output

        return hook

    for point, path in model.taps.items():
        module = model.get_submodule(path.removesuffix(":in"))
        module.register_forward_hook(keep(point, path.endswith(":in")))
    with torch.no_grad():
        output = model(x)
    torch.testing.assert_close(output, logits, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(read.pop("classifier"), logits, rtol=1e-9, atol=1e-9)
    assert read.keys() == seen.keys()
    for point, feature in seen.items():
        torch.testing.assert_close(read[point], feature, rtol=1e-9, atol=1e-9, msg=point)
    width = 4 if depth == 50 else 1
    sizes = [tuple(seen[f"stage{i}"].shape[1:]) for i in (1, 2, 3, 4)]
    assert sizes == [
        (8 * width, 16, 16),
        (16 * width, 8, 8),
        (32 * width, 4, 4),
        (64 * width, 2, 2),
    ]


@pytest.mark.parametrize("name", ["jointrd_resnet18", "plain50_none", "imagenet_plain34"])
def test_forward_from_a_stage_is_the_rest_of_the_forward(name, narrow):
    model, x = build(name), images()
    read = {}
    for point in ("stage1.pre", "stage2.pre", "stage3.pre", "stage4.pre"):
        model.get_submodule(model.taps[point].removesuffix(":in")).register_forward_pre_hook(
            lambda _, inputs, point=point: read.setdefault(point, inputs[0])
        )
    with torch.no_grad():
        logits = model(x)
        for stage in (1, 2, 3):
            last, again = model.forward_from(read[f"stage{stage}.pre"], stage)
            assert torch.equal(again, logits) and torch.equal(last, read["stage4.pre"])
    for stage in (0, 4):
        with pytest.raises(ValueError, match=f"stage: {stage}"):
            model.forward_from(x, stage)


def test_the_students_gradient_comes_through_the_teacher():
    student, teacher = (
        build("plain18_none"),
        build("jointrd_resnet18", seed=1).requires_grad_(False),
    )
    read = []
    student.layer2[0].relu.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    student(images())
    last, logits = teacher.forward_from(read[0], 1)
    assert last.shape == (2, 512, 2, 2) and logits.shape == (2, 10)
    F.cross_entropy(logits, torch.tensor([1, 2])).backward()
    reached = {name for name, p in student.named_parameters() if p.grad is not None}
    assert reached == {
        n for n, _ in student.named_parameters() if n.startswith(("conv1", "bn1", "layer1"))
    }
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize(
    "name",
    [
        "jointrd_resnet50",
        "plain18_dirac",
        "plain34_none_dirac_normalised",
        "plain50",
        "plain50_dirac",
        "imagenet_plain50_none_dirac_init",
    ],
)
def test_every_parameter_learns(name, narrow):
    torch.manual_seed(0)
    model = PLAIN[name](10)
    x = torch.randn(2, 3, 32, 32) if "imagenet" not in name else torch.randn(2, 3, 64, 64)
    F.cross_entropy(model(x), torch.tensor([1, 2])).backward()
    idle = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not idle


def test_dirac_layers_are_the_last_two_of_each_block():
    with torch.device("meta"):
        for name in ("plain34_dirac", "plain50_none_dirac", "imagenet_plain50_dirac_normalised"):
            model = PLAIN[name](10)
            layers = {path for path, m in model.named_modules() if isinstance(m, DiracConv2d)}
            last = ("conv2", "conv3") if "50" in name else ("conv1", "conv2")
            convs = {path for path, m in model.named_modules() if isinstance(m, nn.Conv2d)}
            assert layers == {p for p in convs if p.startswith("layer") and p.endswith(last)}
            assert {model.get_submodule(p).normalised for p in layers} == {"normalised" in name}


def test_initial_weights():
    torch.manual_seed(0)
    dirac = PLAIN["plain18_dirac"](10).layer3[0].conv1
    once = PLAIN["plain18_dirac_init"](10).layer3[0].conv1
    started = once.weight.detach() - delta(once.weight.detach())
    expected = (2 / (256 * 9)) ** 0.5  # fan out
    assert abs(dirac.weight.std().item() / expected - 1) < 0.01
    assert abs(started.std().item() / (0.1 * expected) - 1) < 0.01
    assert type(once) is nn.Conv2d


def test_names():
    depths, stems = (18, 34, 50), ("", "imagenet_")
    students = {
        f"plain{d}{none}{start}" for d in depths for none in ("", "_none") for start in DIRAC
    }
    teachers = {f"jointrd_resnet{d}" for d in depths}
    assert set(PLAIN) == {stem + name for stem in stems for name in students | teachers}
    assert all(released(d) == RELEASED[d] and everywhere(d) == ONES[d] for d in depths)


def test_one_compiled_graph_and_other_image_sizes(narrow):
    model = build("plain18_dirac")
    x = torch.randn(2, 3, 24, 16, dtype=torch.float64)
    with torch.no_grad():
        expected = model(x)
        compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), expected)


def test_flags_and_depth_are_checked():
    with pytest.raises(ValueError, match="depth: 20 is not one of 18, 34, 50"):
        ReluFirstResNet(20, [], ordinary, False, 10)
    for flags in ([[1, 1]] * 3, [[1, 1]] * 3 + [[1, 1, 1]], [[1, 1]] * 3 + [[1, 2]]):
        with pytest.raises(ValueError, match="shortcuts: .* depth 18 needs a 0 or 1 .* 2, 2, 2, 2"):
            ReluFirstResNet(18, flags, ordinary, False, 10)
