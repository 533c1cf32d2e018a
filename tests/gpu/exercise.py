"""Forward and backward passes of every loss on every path of the CUDA kernels, on little data: what
compute-sanitizer looks at. Values are tested elsewhere (test_gpu.py).
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))

from calls import FULL, NAMES, WITH_TOP_K, Case, call, cast, make, probabilities
from on_gpu import move  # noqa: E402

from kdfuse import SparseTeacher

f32, bf16, f16, f64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
# Rows of a warp, of a block, of a cluster, and read twice; of odd lengths, so that they lie in
# every way on 16-byte boundaries.
SIZES = ((1100, 41), (3, 101), (2, 13001), (1, 200003))


def drive(name: str, case: Case, **settings) -> None:
    students, teachers = map(move, case.students), map(move, case.teachers)
    case = Case(list(students), list(teachers), move(case.target))
    case.students = [x.requires_grad_() for x in case.students]
    for stored in (True, False):
        for reduction in ("mean", "none"):
            more = {"reduction": reduction, "stored_gradient": stored, **settings}
            loss = call(name, case, backend="cuda", **{**FULL[name], **more})
            torch.autograd.grad(loss, case.students, torch.full_like(loss, 0.5))


def main() -> None:
    for name in NAMES:
        for n, c in SIZES:
            for dtype in (f32, bf16, f16, f64):
                if (name == "uskd" and c > 8192) or (dtype == f64 and c > 13001):
                    continue
                case = cast(make(name, n, c), dtype)
                case.target[1::3] = -100
                drive(name, case)
        if name != "dkd":
            case = cast(make(name, 3, 41), f32)
            case.target = probabilities(3, 41).float()
            drive(name, case)
    for teachers in (2, 20):
        drive("kd", cast(make("kd", 3, 1500, teachers=teachers), bf16, f32))
    for count in (1, 3):
        drive("slkd", cast(make("slkd", 3, 101, slts=count), f32), fusion=[1 / count] * count)
    for name in WITH_TOP_K:
        case = cast(make(name, 3, 101), f32)
        indices = torch.stack([torch.randperm(101)[:7] for _ in range(3)])
        mass = torch.tensor([0.0, 0.25, 0.5])
        case.teachers = [SparseTeacher(case.teachers[0].gather(1, indices), indices, mass)]
        drive(name, case)
    drive("kd", cast(make("kd", 17000, 9), bf16))  # its rows are counted by all blocks
    torch.cuda.synchronize()
    print("exercised")


if __name__ == "__main__":
    main()
