"""The package of `make hub`, loaded by Hugging Face's `kernels` beside the installed kdfuse."""

import ast
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from calls import FULL, NAMES, WITH_TEACHER, call, make

import kdfuse
from kdfuse.kernels import backends
from kdfuse.kernels.namespace import COMPILED
from kdfuse.kernels.table import OPS

pytest.importorskip("kernels")

pytestmark = pytest.mark.slow(15)

ROOT = Path(__file__).resolve().parents[2]
CPU, NO_CPU = backends.compiled()
needs_library = pytest.mark.skipif(CPU is None, reason=NO_CPU)


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    subprocess.run([sys.executable, str(ROOT / "hub.py"), str(folder)], check=True)
    return folder


@pytest.fixture(scope="module")
def on_cpu(hub):
    from kernels import get_local_kernel

    return get_local_kernel(hub, backend="cpu")


@pytest.fixture(scope="module")
def python_alone(hub):
    from kernels import get_local_kernel

    return get_local_kernel(hub / "build/torch-cuda")


def test_kernels_reads_every_variant(hub):
    from kernels._rust import Digest, DigestAlgorithm, Metadata
    from kernels.variants import parse_variant

    variants = sorted((hub / "build").iterdir())
    assert {"torch-cpu", "torch-cuda", "torch-rocm"} <= {folder.name for folder in variants}
    found = {folder: Metadata.read_from_file(folder / "metadata.json") for folder in variants}
    for folder, metadata in found.items():
        assert parse_variant(folder.name).variant_str == folder.name
        assert str(metadata.name) == "kdfuse" and metadata.id.isidentifier()
        made = Digest.hash_variant(DigestAlgorithm.SHA256, folder)
        metadata.digest.validate(made)
    assert len({metadata.id for metadata in found.values()}) == len(variants)


def test_nothing_is_imported_but_torch_and_triton(hub):
    files = list((hub / "build/torch-cuda").rglob("*.py"))
    assert len(files) > 20
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [name.name for name in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            for name in names:
                top = name.split(".")[0]
                assert top in sys.stdlib_module_names | {"torch", "triton"}, f"{file.name}: {name}"


def loss_of(module, name, case, **settings):
    """As kdfuse's own, with another module's function."""
    (student, *others), teachers = case.students, case.teachers
    loss = getattr(module, f"{name}_loss")
    if name == "slkd":
        return loss(student, teachers[0], others, case.target, **settings)
    between = teachers[:1] if name in WITH_TEACHER else others
    return loss(student, *between, case.target, **settings)


@needs_library
@pytest.mark.parametrize("name", NAMES)
def test_a_loss_is_that_of_kdfuse_and_of_the_reference(name, on_cpu):
    assert on_cpu.__name__ != "kdfuse" and on_cpu.backends()["cpu"] == ""
    case = make(name, 24, 33)
    students = [x.requires_grad_() for x in case.students]

    def value_and_gradients(loss):
        return [loss.detach(), *torch.autograd.grad(loss, students)]

    got = value_and_gradients(loss_of(on_cpu, name, case, **FULL[name]))
    same = value_and_gradients(call(name, case, backend="cpu", **FULL[name]))
    near = value_and_gradients(call(name, case, backend="reference", **FULL[name]))
    assert all(torch.equal(a, b) for a, b in zip(got, same, strict=True))
    torch.testing.assert_close(got, near, rtol=1e-10, atol=1e-12)


def ops_of(namespace):
    """The ops of a namespace, by their own names."""
    whole = torch._C._dispatch_get_all_op_names()
    return {name.split("::")[1] for name in whole if name.startswith(f"{namespace}::")}


@needs_library
def test_each_copy_has_ops_of_its_own(on_cpu, python_alone):
    own = sys.modules[f"{on_cpu.__name__}.kernels.namespace"]
    assert own.COMPILED == on_cpu.__name__ != COMPILED
    assert ops_of(own.COMPILED) == ops_of(COMPILED) > set(OPS)
    assert not ops_of(python_alone.__name__)
    assert kdfuse.kernels.library is not sys.modules[f"{on_cpu.__name__}.kernels.library"]


@needs_library
def test_compile_is_one_graph(on_cpu):
    torch._dynamo.reset()
    case = make("kd", 8, 9)
    loss = torch.compile(on_cpu.kd_loss, fullgraph=True, backend="aot_eager")
    z = case.students[0].requires_grad_()
    ((got,), (kept,)) = (
        torch.autograd.grad(f(z, case.teachers[0], case.target), z) for f in (loss, kdfuse.kd_loss)
    )
    assert torch.equal(got, kept)


def test_python_alone_names_what_is_missing(python_alone):
    reasons = python_alone.backends()
    assert "no libkdfuse.so" in reasons["cpu"] and "no libkdfuse.so" in reasons["cuda"]
    case = make("kd", 8, 9)
    with pytest.raises(RuntimeError, match="backend='cpu' cannot run here: .*no libkdfuse.so"):
        loss_of(python_alone, "kd", case, backend="cpu")
    got = loss_of(python_alone, "kd", case, **FULL["kd"])
    assert torch.equal(got, call("kd", case, backend="reference", **FULL["kd"]))


def test_a_variant_with_cuda_kernels_is_named_after_its_cuda():
    cuda_backend = runpy.run_path(str(ROOT / "hub.py"))["cuda_backend"]
    name, backend = cuda_backend(["sm_80", "sm_90", "sm_100", "compute_100"], 12080)
    assert name == "cu128"
    assert backend == {"type": "cuda", "archs": ["8.0", "9.0", "10.0", "10.0+PTX"]}
