"""torchvision's networks on a device: what deterministic training asks of them."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("pydantic")
pytest.importorskip("torchvision")
pytest.importorskip("yaml")

from on_gpu import MARKS

from kdfuse.engine.models import create
from kdfuse.engine.models.torchvision_models import DeterministicPool
from kdfuse.engine.recipe.run import Run
from kdfuse.engine.training.process import settings
from kdfuse.engine.training.speed import EXACT

pytestmark = MARKS
RUN = Run(epochs=1, batch=8, device="cuda", **EXACT)


def stepped(side, amp):
    """All weights of an AlexNet after one step, dropout included."""
    torch.manual_seed(0)
    network = create("torchvision:alexnet", 10).cuda()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    images = torch.randn(8, 3, side, side, generator=torch.Generator().manual_seed(1)).cuda()
    with torch.autocast("cuda", torch.bfloat16, enabled=amp):
        loss = F.cross_entropy(network(images), torch.arange(8, device="cuda"))
    loss.backward()
    first = network.features[0].weight
    assert first.grad.isfinite().all() and first.grad.any()
    optimizer.step()
    return torch.cat([parameter.detach().flatten() for parameter in network.parameters()]).cpu()


@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("side", [64, 224])
def test_alexnet_trains_deterministically(side, amp):
    with settings(RUN):
        assert torch.equal(stepped(side, amp), stepped(side, amp))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [(1, 1), (13, 9), (12, 12), (6, 6)])
def test_pooling_is_the_cpus(size, layout):
    source = torch.Generator().manual_seed(0)
    x = torch.randn(2, 64, *size, generator=source).to(memory_format=layout).requires_grad_()
    upstream = torch.randn(2, 64, 6, 6, generator=source)
    pool, found = DeterministicPool((6, 6)), []
    with settings(RUN):
        for device in ("cpu", "cuda"):
            made = pool(x.to(device))
            found.append((made.cpu(), torch.autograd.grad(made, x, upstream.to(device))[0]))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-6)
