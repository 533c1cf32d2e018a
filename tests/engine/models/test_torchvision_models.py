"""torchvision's networks: pooling to more than one pixel, whose gradient has to repeat on a GPU."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from kdfuse.engine.models import Taps, create, fold_batchnorm
from kdfuse.engine.models.torchvision_models import DeterministicPool, pooled_by_products

SIZES = [
    ((14, 14), (7, 7)),
    ((12, 21), (6, 7)),
    ((13, 9), (6, 6)),
    ((7, 7), (7, 7)),
    ((1, 1), (6, 6)),  # of AlexNet on 64 pixels
    ((2, 3), (7, 7)),
    ((5, 11), (7, 6)),
]


@pytest.mark.parametrize(("size", "out"), SIZES)
def test_products_are_the_pooling_and_its_gradient(size, out):
    source = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, *size, dtype=torch.float64, generator=source, requires_grad=True)
    upstream = torch.randn(2, 3, *out, dtype=torch.float64, generator=source)
    found, wanted = pooled_by_products(x, out), F.adaptive_avg_pool2d(x, out)
    torch.testing.assert_close(found, wanted, rtol=1e-13, atol=1e-14)
    pair = [torch.autograd.grad(y, x, upstream)[0] for y in (found, wanted)]
    torch.testing.assert_close(*pair, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_summed_in_float32_under_autocast_too(dtype):
    x = torch.randn(2, 64, 13, 13, generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        found = pooled_by_products(x, (6, 6))
    assert found.dtype == dtype
    wanted = F.adaptive_avg_pool2d(x.double(), (6, 6))
    bound = 2e-6 if dtype == torch.float32 else 4e-3  # bfloat16: half a unit in the last place
    torch.testing.assert_close(found.double(), wanted, rtol=bound, atol=1e-6)


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.add(function.overloadpacket)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("side", [3, 6, 12])
def test_on_a_gpu_no_adaptive_pooling_is_called(side):
    """Shapes and devices alone, so that it runs without one."""
    adaptive = torch.ops.aten._adaptive_avg_pool2d
    for device, pooling in (("cpu", {adaptive}), ("cuda", set())):
        with FakeTensorMode(), Operations() as operations:
            made = DeterministicPool((6, 6))(torch.empty(2, 4, side, side, device=device))
            assert made.shape == (2, 4, 6, 6) and made.device.type == device
        assert operations.seen & {adaptive} == (pooling if side != 6 else set())
        products = operations.seen & {torch.ops.aten.mm, torch.ops.aten.bmm}
        assert bool(products) == (device == "cuda" and side != 6)


@pytest.fixture(scope="module")
def vgg11():
    torch.manual_seed(0)
    return create("torchvision:vgg11", 10).eval()


@pytest.mark.parametrize("side", [32, 224])
def test_vgg_is_torchvisions_to_the_last_bit_on_a_cpu(vgg11, side):
    images = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(1))
    images.requires_grad_()
    found = []
    own = vgg11.avgpool
    try:
        for pool in (own, nn.AdaptiveAvgPool2d((7, 7))):
            vgg11.avgpool = pool
            logits = vgg11(images)
            wrt = [images, vgg11.features[0].weight, vgg11.classifier[0].bias]
            found.append([logits, *torch.autograd.grad(logits.square().sum(), wrt)])
    finally:
        vgg11.avgpool = own
    assert type(own) is DeterministicPool and own.output_size == (7, 7)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_only_pooling_to_more_than_one_pixel_is_replaced():
    kinds = {}
    for name in ("alexnet", "vgg11_bn", "resnet18", "squeezenet1_1", "efficientnet_b0"):
        model = create(f"torchvision:{name}", 10)
        pools = [type(m) for m in model.modules() if isinstance(m, nn.AdaptiveAvgPool2d)]
        kinds[name] = {kind is DeterministicPool for kind in pools}
        assert model.state_dict().keys() == reference_keys(name)
    assert kinds.pop("alexnet") == kinds.pop("vgg11_bn") == {True}
    assert set(map(tuple, kinds.values())) == {(False,)}


def reference_keys(name):
    from torchvision.models import get_model

    with torch.device("meta"):
        return get_model(name, weights=None, num_classes=10).state_dict().keys()


def test_vgg_with_batchnorm_folds_with_its_taps():
    torch.manual_seed(0)
    model = create("torchvision:vgg11_bn", 10)
    model.classifier = nn.Linear(512 * 7 * 7, 10)  # its own has 120 million weights
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.3, 2)
    model = model.double().eval()
    taps = Taps(model, ["avgpool", "avgpool:in"])
    folded = fold_batchnorm(model)
    moved = taps.moved(folded)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    for side in (32, 224):  # a tracer that followed the branch would have one of the two
        images = torch.rand(1, 3, side, side, dtype=torch.float64)
        with torch.no_grad():
            wanted, kept = model(images), taps.take()
            found, moved_kept = folded(images), moved.take()
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
        assert moved_kept["avgpool"].shape == (1, 512, 7, 7)
        for name, value in kept.items():
            torch.testing.assert_close(moved_kept[name], value, rtol=1e-9, atol=1e-9)


def test_exported_and_compiled_alexnet_pools_as_it_does():
    torch.manual_seed(0)
    model = create("torchvision:alexnet", 10).eval()
    images = torch.rand(2, 3, 96, 96)
    batch = torch.export.Dim("batch")
    with torch.no_grad():
        wanted = model(images)
        program = torch.export.export(model, (images,), dynamic_shapes={"x": {0: batch}})
        torch.testing.assert_close(program.module()(images), wanted, rtol=1e-4, atol=1e-4)
        compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")
        torch.testing.assert_close(compiled(images), wanted, rtol=1e-4, atol=1e-4)
