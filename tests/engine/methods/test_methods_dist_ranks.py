"""DIST over two processes: with `gather` the relations are those of the whole batch."""

import pytest
import torch
import torch.distributed as dist
from processes import together
from steps import loss_of

from kdfuse.engine.methods import METHODS, Outputs
from kdfuse.engine.training.ranks import join

N, C = 8, 5


def losses_of(rows, gather):
    """Terms for some rows of a fixed batch, and the gradient for a weight that all rows share."""
    generator = torch.Generator().manual_seed(0)
    x, teacher = (2 * torch.randn(N, C, generator=generator) for _ in range(2))
    weight = torch.eye(C).requires_grad_()
    target = torch.arange(N)[rows] % C
    out = Outputs(student=x[rows] @ weight, teacher=teacher[rows])
    method = METHODS["dist"](temperature=2.0, gather=gather)
    out.features = method.features(out, target)
    loss, terms = loss_of(method, out, target)
    loss.backward()
    return {"gradient": weight.grad, "inter": terms["inter"], "intra": terms["intra"]}


def main(folder):
    """What each of the two processes does: the mean of its gradients is what DDP applies."""
    group = join("cpu")
    half = slice(group.rank * N // 2, (group.rank + 1) * N // 2)
    found = {}
    for gather in (False, True):
        found[gather] = losses_of(half, gather)
        dist.all_reduce(found[gather]["gradient"])
        found[gather]["gradient"] /= 2
    torch.save(found, folder / f"{group.rank}.pt")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dist")
    together(2, main, folder)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


def test_gathered_columns_are_those_of_one_process(ranks):
    whole = losses_of(slice(None), gather=True)  # without a process group: its own rows
    for found in ranks:
        torch.testing.assert_close(found[True]["gradient"], whole["gradient"])
        torch.testing.assert_close(found[True]["intra"], whole["intra"])
    assert torch.equal(ranks[0][True]["gradient"], ranks[1][True]["gradient"])
    rows = torch.stack([found[True]["inter"] for found in ranks])
    torch.testing.assert_close(rows.mean(), whole["inter"])


def test_columns_are_each_processs_own_otherwise(ranks):
    for rank, found in enumerate(ranks):
        half = slice(rank * N // 2, (rank + 1) * N // 2)
        torch.testing.assert_close(found[False]["intra"], losses_of(half, False)["intra"])
    whole = losses_of(slice(None), gather=False)
    assert (ranks[0][False]["gradient"] - whole["gradient"]).abs().max() > 1e-3
