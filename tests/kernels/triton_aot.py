"""Ahead-of-time compilation of the Triton kernels, as a call on a GPU would compile them."""

import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kdfuse.kernels.table import OPS
from kdfuse.kernels.triton import call as triton_call
from kdfuse.kernels.triton import ops as triton_ops
from kdfuse.kernels.triton.launch import OPTIONS

TYPES = {
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
}
BIN = Path(triton.__file__).parent / "backends/nvidia/bin"


def launches(monkeypatch, name: str, *inputs) -> list[tuple]:
    """(kernel, args, constants, warps) of every launch of a call; nothing is run."""
    caught = []

    def catch(kernel, programs, args, constants, warps, at):
        caught.append((kernel, args, constants, warps))

    monkeypatch.setattr(triton_call, "launch", catch)
    triton_ops.run_op(OPS[name], *inputs)
    return caught


def kind_of(x):
    if isinstance(x, tuple):
        return tuple(kind_of(part) for part in x)
    if isinstance(x, Tensor):
        return TYPES[x.dtype]
    if x is None:
        return "constexpr"
    return "fp32" if isinstance(x, float) else "i32"


def paths(x, at: tuple):
    """The places of tensors and of None in nested arguments."""
    if isinstance(x, tuple):
        for k, part in enumerate(x):
            yield from paths(part, (*at, k))
    elif isinstance(x, Tensor) or x is None:
        yield at, x


def compile_for(arch: int, kernel, args: tuple, constants: tuple, warps: int, **options):
    names = kernel.arg_names
    signature = {n: kind_of(x) for n, x in zip(names, args, strict=False)}
    if "ignore" in signature:
        signature["ignore"] = "i64"
    signature |= {n: "constexpr" for n in names[len(args) :]}
    found = [pair for k, x in enumerate(args) for pair in paths(x, (k,))]
    fixed = {at: None for at, x in found if x is None}
    fixed |= {(len(args) + k,): x for k, x in enumerate(constants)}
    aligned = {at: [["tt.divisibility", 16]] for at, x in found if x is not None}
    source = ASTSource(kernel, signature, fixed, aligned)
    target = GPUTarget("cuda", arch, 32)
    return triton.compile(source, target=target, options={**OPTIONS, "num_warps": warps, **options})


class Code:
    """What cuobjdump and nvdisasm say of compiled code."""

    def __init__(self, compiled) -> None:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            usage = run("cuobjdump", "-res-usage", file.name)
            sass = run("nvdisasm", "-c", file.name)
        self.registers = int(re.search(r"REG:(\d+)", usage)[1])
        self.stack = int(re.search(r"STACK:(\d+)", usage)[1])
        names = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)", sass)
        self.names = Counter(names)
        self.sass = sass

    def count(self, pattern: str) -> int:
        return sum(n for name, n in self.names.items() if re.match(pattern, name))


def run(tool: str, *arguments: str) -> str:
    command = [str(BIN / tool), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
