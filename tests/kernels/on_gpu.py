"""The tests' calls on a GPU, with the CPU ops as the oracle."""

from collections.abc import Callable

import pytest
import torch
from calls import FULL, PAIR, Case, call
from torch import Tensor

from kdfuse import SparseTeacher
from kdfuse.kernels import backends

WHY_NOT = backends.backends()["cuda"] or backends.backends()["cpu"]
MARKS = [pytest.mark.gpu, pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)]
RANKS = {torch.bfloat16: 257, torch.float16: 2048}  # that the logits of `make` keep apart


def sorts(c: int, dtype: torch.dtype) -> bool:
    """Whether the GPU has room for uskd's sort of a row."""
    return backends.fits_sort(torch.empty(1, c, dtype=dtype, device="cuda"))


def move(x):
    """To the device, with every row where it was in its storage: strides and offsets are kept."""
    if x is None:
        return None
    if isinstance(x, SparseTeacher):
        return SparseTeacher(move(x.values), move(x.indices), move(x.mass))
    if x.is_contiguous():
        return x.cuda()
    whole = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage()).cuda()
    return whole.as_strided(x.shape, x.stride(), x.storage_offset())


def to_gpu(case: Case) -> Case:
    students, teachers = [move(x) for x in case.students], [move(x) for x in case.teachers]
    return Case(students, teachers, move(case.target))


def run(name: str, case: Case, backend: str, upstream: Tensor | None = None, **settings):
    """Loss, terms and gradients, on the CPU."""
    students = [x.detach().requires_grad_() for x in case.students]
    loss, terms = call(
        name,
        Case(students, case.teachers, case.target),
        backend=backend,
        return_terms=True,
        **settings,
    )
    above = torch.ones_like(loss) if upstream is None else upstream.to(loss)
    gradients = torch.autograd.grad(loss, students, above)
    return loss.cpu(), {k: v.cpu() for k, v in terms.items()}, [g.cpu() for g in gradients]


def compare(name: str, case: Case, upstream: Tensor | None = None, backend="cuda", **settings):
    """A call on the device against the same on the CPU."""
    pair = PAIR.get(name, {}) if case.students[0].shape[1] == 2 else {}
    settings = {**FULL[name], **pair, **settings}
    true = run(name, case, "cpu", upstream, **settings)
    got = run(name, to_gpu(case), backend, upstream, **settings)
    wide = true[0].dtype == torch.float64
    loose = {"rtol": 1e-11, "atol": 1e-11} if wide else {"rtol": 5e-5, "atol": 1e-5}
    torch.testing.assert_close(got[0], true[0], equal_nan=True, **loose)
    assert got[1].keys() == true[1].keys()
    for key, value in true[1].items():
        torch.testing.assert_close(got[1][key], value, equal_nan=True, msg=key, **loose)
    # What a row's gradient is multiplied by: its rounding errors are as large.
    weight = 1.0 if upstream is None else upstream.abs().max().item()
    if settings.get("reduction", "mean") == "mean":
        weight /= max(true[1]["rows"].item(), 1.0)
    relative = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float64: 1e-10}
    for a, b in zip(got[2], true[2], strict=True):
        step = 6e-8 if a.dtype == torch.float16 else 0.0  # of its smallest numbers
        torch.testing.assert_close(
            a,
            b,
            rtol=relative.get(a.dtype, 5e-5),
            atol=weight * (1e-12 if wide else 1e-6) + step,
            equal_nan=True,
        )
    return got


def same_bits(first, second) -> None:
    """Of two results of `run`."""
    assert torch.equal(first[0], second[0])
    for a, b in zip(first[2], second[2], strict=True):
        assert torch.equal(a, b)


def kernels_of(work: Callable[[], object]) -> list[str]:
    """Names of the kernels, copies and fills that `work` puts on the device."""
    from torch.profiler import ProfilerActivity, profile

    work()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        work()
        torch.cuda.synchronize()
    on_gpu = torch.autograd.DeviceType.CUDA
    return [e.name for e in seen.events() if e.device_type == on_gpu and not e.is_user_annotation]
