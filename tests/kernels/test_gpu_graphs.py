"""The CUDA kernels in streams and CUDA graphs, under torch.compile, autocast and DDP."""

import subprocess
import sys

import pytest
import torch
from calls import FULL, NAMES, Case, arguments, call, cast, make
from on_gpu import MARKS, run, same_bits, sorts, to_gpu
from test_gpu_runtime import case_of, loss_of

import kdfuse

pytestmark = MARKS


def captured(name: str, case: Case):
    """A graph of a forward and backward pass of `case`, with what it writes."""

    def step():
        loss = loss_of(name, case)
        return loss, torch.autograd.grad(loss, case.students)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss, gradients = step()
    return graph, loss, gradients


def fill(case: Case, other: Case) -> None:
    with torch.no_grad():
        new = (*other.students, *other.teachers, other.target)
        for x, y in zip((*case.students, *case.teachers, case.target), new, strict=True):
            x.copy_(y)


SIZES = [(70, 1000), (1030, 100), (20000, 100), (3, 21841)]


@pytest.mark.parametrize("n, c", SIZES)
@pytest.mark.parametrize("name", NAMES)
def test_graph_replays_on_new_logits(name, n, c):
    if name == "uskd" and not sorts(c, torch.float32):
        pytest.skip("too long for the sort")
    case = case_of(name, n, c)
    graph, loss, gradients = captured(name, case)
    for seed in (1, 2, 3):
        other = to_gpu(cast(make(name, n, c, seed=seed), torch.float32))
        other.target[::5] = -100
        fill(case, other)
        graph.replay()
        got = (loss.cpu(), {}, [g.cpu() for g in gradients])
        same_bits(got, run(name, other, "cuda", **FULL[name]))


@pytest.mark.parametrize("name", NAMES)
def test_two_graphs_replay_beside_each_other(name):
    """On two streams at a time: each launch counts its blocks in a place of its own."""
    cases = [case_of(name, 1030, 500, seed=seed) for seed in (1, 2)]
    true = [run(name, case, "cuda", **FULL[name]) for case in cases]
    graphs = [captured(name, case) for case in cases]
    streams = [torch.cuda.Stream() for _ in graphs]
    torch.cuda.synchronize()
    for _ in range(20):
        for (graph, _, _), stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    for (_, loss, gradients), want in zip(graphs, true, strict=True):
        same_bits((loss.cpu(), {}, [g.cpu() for g in gradients]), want)


@pytest.mark.parametrize("name", NAMES)
def test_streams_beside_each_other(name):
    cases = [case_of(name, 1030, 500, seed=seed) for seed in (1, 2, 3)]
    true = [run(name, case, "cuda", **FULL[name]) for case in cases]
    streams = [torch.cuda.Stream() for _ in cases]
    made: list = [None] * len(cases)
    torch.cuda.synchronize()
    for _ in range(20):
        for k, (case, stream) in enumerate(zip(cases, streams, strict=True)):
            with torch.cuda.stream(stream):
                loss = loss_of(name, case)
                made[k] = loss, torch.autograd.grad(loss, case.students)
    torch.cuda.synchronize()
    for (loss, gradients), want in zip(made, true, strict=True):
        same_bits((loss.detach().cpu(), {}, [g.cpu() for g in gradients]), want)


@pytest.mark.parametrize("name", NAMES)
def test_another_stream(name):
    case = cast(make(name, 1030, 1000), torch.float32)
    true = run(name, to_gpu(case), "cuda", **FULL[name])
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(20_000_000)  # what follows on another stream would read too early
        got = run(name, to_gpu(case), "cuda", **FULL[name])
    same_bits(got, true)


@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name):
    case = cast(make(name, 6, 9), torch.float32)
    students, teachers, target, params = arguments(name, case, **FULL[name])
    on_gpu = to_gpu(Case(students, teachers, target))
    op = getattr(torch.ops.kdfuse, name).default
    for grad in (False, True):
        students = [x.detach().requires_grad_(grad) for x in on_gpu.students]
        lists = (students, on_gpu.teachers, [], [])
        torch.library.opcheck(op, (*lists, on_gpu.target, None, None, None, params, 1, -100, False))
    gradients = [torch.randn(6, 9, device="cuda") for _ in range(2)]
    factor = torch.tensor(2.0, device="cuda")
    torch.library.opcheck(torch.ops.kdfuse.scale_.default, (gradients, factor))
    torch.library.opcheck(torch.ops.kdfuse.scale_to_half.default, (gradients, factor))


@pytest.mark.parametrize("backend", ("aot_eager", "inductor"))
@pytest.mark.parametrize("name", NAMES)
def test_compile_is_one_graph(name, backend):
    case = to_gpu(cast(make(name, 33, 100), torch.float32))
    true = run(name, case, "cuda", **FULL[name])
    students = [x.detach().requires_grad_() for x in case.students]
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend=backend)
    def step(students, teachers, target):
        return call(name, Case(students, teachers, target), backend="cuda", **FULL[name])

    loss = step(students, case.teachers, case.target)
    gradients = torch.autograd.grad(loss, students)
    assert torch.equal(loss.detach().cpu(), true[0])
    for a, b in zip(gradients, true[2], strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-6, atol=1e-9)


def test_autocast_leaves_the_logits_types():
    torch.manual_seed(0)
    layer = torch.nn.Linear(16, 100, device="cuda")
    x, y = torch.randn(70, 16, device="cuda"), torch.randint(0, 100, (70,), device="cuda")
    teacher = torch.randn(70, 100, device="cuda")
    with torch.autocast("cuda", dtype=torch.bfloat16):
        z = layer(x)
        loss = kdfuse.kd_loss(z, teacher, y, ce_weight=0.3, backend="cuda")
    assert z.dtype == torch.bfloat16 and loss.dtype == torch.float32
    loss.backward()
    made = layer.weight.grad.clone()
    layer.weight.grad = None
    student = z.detach().requires_grad_()
    outside = kdfuse.kd_loss(student, teacher, y, ce_weight=0.3, backend="cuda")
    outside.backward()
    assert torch.equal(outside.detach(), loss.detach())
    with torch.autocast("cuda", dtype=torch.bfloat16):
        layer(x).backward(student.grad)
    assert torch.equal(layer.weight.grad, made)


def test_ddp_of_one_process_gives_the_same_bits(monkeypatch):
    if not (torch.distributed.is_available() and torch.distributed.is_nccl_available()):
        pytest.skip("torch has no NCCL")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "lo")  # one process needs no network
    torch.manual_seed(0)
    layer = torch.nn.Linear(16, 100, device="cuda")
    x, y = torch.randn(70, 16, device="cuda"), torch.randint(0, 100, (70,), device="cuda")
    teacher = torch.randn(70, 100, device="cuda")

    def gradients(network):
        layer.zero_grad(set_to_none=True)
        kdfuse.kd_loss(network(x), teacher, y, ce_weight=0.3, backend="cuda").backward()
        return [p.grad.clone() for p in layer.parameters()]

    alone = gradients(layer)
    torch.distributed.init_process_group(
        "nccl", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    try:
        wrapped = torch.nn.parallel.DistributedDataParallel(layer, device_ids=[0])
        for _ in range(2):
            for a, b in zip(gradients(wrapped), alone, strict=True):
                assert torch.equal(a, b)
    finally:
        torch.distributed.destroy_process_group()


STOPS = {
    "a label outside the classes": "y[2] = 10",
    "a label below 0": "y[2] = -1",
    "a denominator of 0": "more['denominator'] = torch.zeros((), device='cuda')",
}


@pytest.mark.parametrize("change", STOPS.values(), ids=list(STOPS))
def test_what_only_the_device_can_see_stops_it(change):
    code = (
        "import torch, kdfuse; more = {}; z = torch.randn(4, 10, device='cuda');"
        f"y = torch.tensor([0, 1, 3, 2], device='cuda'); {change};"
        "kdfuse.kd_loss(z, z, y, backend='cuda', **more); torch.cuda.synchronize()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    said = "denominator must be positive" if "denom" in change else "target outside the classes"
    assert done.returncode != 0 and said in done.stdout + done.stderr


@pytest.mark.parametrize("divisor", (0.0, -1.0, float("nan")))
def test_a_number_that_is_no_denominator_is_refused(divisor):
    z, params = torch.randn(4, 10, device="cuda"), [4.0, 16.0, 1.0, 0.0, 1.0]
    with pytest.raises(RuntimeError, match="denominator must be positive"):
        torch.ops.kdfuse.kd([z], [z], [], [], None, None, divisor, None, params, 1, -100, False)


def test_other_devices_are_refused():
    z, t = torch.randn(4, 10, device="cuda"), torch.randn(4, 10)
    with pytest.raises(ValueError, match="cpu"):
        kdfuse.kd_loss(z, t, backend="cuda")
    with pytest.raises(ValueError, match="backend='cuda' cannot take logits on cpu"):
        kdfuse.kd_loss(t, t, backend="cuda")
