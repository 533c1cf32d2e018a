"""Parts of the classes on a device, against the CPU."""

import pytest
import torch
from calls import FULL, IN_PARTS, Case, call, cast, make

import kdfuse
from kdfuse.kernels import backends

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]


def run(name, case, device):
    leaves = [x.to(device).requires_grad_() for x in case.students]
    student = kdfuse.ClassPart(leaves[0], 0, leaves[0].shape[1])
    teachers = [x.to(device) for x in case.teachers]
    given = Case([student, *leaves[1:]], teachers, case.target.to(device))
    denominator = torch.tensor(7.0, device=device)
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        loss, terms = call(name, given, return_terms=True, denominator=denominator, **FULL[name])
        gradients = torch.autograd.grad(loss, leaves)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return loss.cpu(), {k: v.cpu() for k, v in terms.items()}, [g.cpu() for g in gradients]


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64), ids=str)
@pytest.mark.parametrize("name", IN_PARTS)
def test_a_device_gives_what_the_cpu_gives_without_waiting(name, dtype):
    case = cast(make(name, 40, 1001), dtype)
    case.target[3] = -100
    torch.testing.assert_close(run(name, case, "cuda"), run(name, case, "cpu"))


@pytest.mark.skipif(bool(backends.backends()["cpu"]), reason="no compiled module")
def test_the_op_itself_takes_logits_on_a_device():
    case = cast(make("kd", 40, 1001), torch.float32)
    on_cpu, on_gpu = (
        torch.ops.kdfuse.kd_stats(
            [case.students[0].to(device)],
            [case.teachers[0].to(device)],
            case.target.to(device),
            0,
            1001,
            [4.0, 16.0, 1.0, 0.5, 1.0],
            -100,
        )
        for device in ("cpu", "cuda")
    )
    torch.testing.assert_close(on_gpu.cpu(), on_cpu, rtol=1e-5, atol=1e-5)
