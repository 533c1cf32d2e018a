"""How far the gradient under a stored teacher is from that under the whole one, and at what size.

    python -m kdfuse.kernels.bench.teachers --out FILE.jsonl      measures, prints the table
    python -m kdfuse.kernels.bench.teachers --from FILE.jsonl     prints it

Made rows: the teacher's r-th probability is in proportion to r^-1 (flat) or r^-2 (peaked), its
classes in a random order; the student's logits are half of the teacher's and normal noise of 1.
The loss is kd_loss at T = 1 in float64. A sampled teacher is drawn once a view, here always from
the same logits, where a cache has another crop in each.
"""

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..kd import kd_loss
from ..sparse import SparseTeacher
from . import report
from .report import Record

CLASSES = (100, 1000, 21841)
SHAPES = {"peaked": 2.0, "flat": 1.0}  # by the exponent
ROWS, VIEWS = 32, 50
COUNT_BITS, REAL_BITS, MASS_BITS = 6, 16, 32  # a count up to 63, a float16, a float32


@dataclass(frozen=True)
class Form:
    """What is stored of a row; k or keep classes with their logit, n draws."""

    name: str
    teacher: Callable[[Tensor, Tensor, Tensor], SparseTeacher | Tensor]  # (t, z, a view's keys)
    exact: int = 0
    draws: int = 0
    mass: bool = False

    def bits(self, classes: int, drawn: float) -> float:
        """Of a row; drawn: how many classes besides the exact ones. A row ends with its draws."""
        index = math.ceil(math.log2(classes))
        exact = self.exact * (index + REAL_BITS)
        return exact + drawn * (index + COUNT_BITS) + MASS_BITS * self.mass


def top(name: str, k: int, rest: str) -> Form:
    def teacher(t: Tensor, z: Tensor, keys: Tensor) -> SparseTeacher | Tensor:
        few = SparseTeacher.top_k(
            t, k, temperature=1.0, rest="drop" if rest == "drop" else "spread"
        )
        return few.bucket(z, 1.0) if rest == "bucket" else few

    return Form(name, teacher, exact=k, mass=rest != "drop")


def drawn(n: int, keep: int) -> Form:
    def teacher(t: Tensor, z: Tensor, keys: Tensor) -> SparseTeacher:
        return SparseTeacher.sample(t, n, temperature=1.0, keep=keep, seed=keys)

    name = f"{n} draws" + (f" beside the top {keep}" if keep else "")
    return Form(name, teacher, exact=keep, draws=n)


FORMS = (
    top("top 10, the rest dropped", 10, "drop"),
    top("top 10, the rest spread", 10, "spread"),
    top("top 10, the rest in a bucket", 10, "bucket"),
    drawn(12, 0),
    drawn(50, 0),
    drawn(10, 5),
    drawn(40, 10),
)


def rows(classes: int, exponent: float, count: int) -> tuple[Tensor, Tensor]:
    """Logits (N, C) of teacher and student."""
    random = torch.Generator().manual_seed(classes)
    order = torch.rand(count, classes, generator=random).argsort(1)
    t = -exponent * (1.0 + order.double()).log()
    return t, t / 2 + torch.randn(count, classes, generator=random, dtype=torch.float64)


def gradient(teacher: SparseTeacher | Tensor, z: Tensor) -> Tensor:
    z = z.clone().requires_grad_()
    loss = kd_loss(z, teacher, temperature=1.0, reduction="sum")
    assert isinstance(loss, Tensor)
    return torch.autograd.grad(loss, z)[0]


def angle(g: Tensor, full: Tensor) -> float:
    """Degrees between the rows (N, C) of two gradients, their mean."""
    cosine = torch.nn.functional.cosine_similarity(g, full, dim=1)
    return cosine.clamp(max=1).acos().rad2deg().mean().item()


def measure(form: Form, classes: int, shape: str, count: int, views: int) -> Record:
    t, z = rows(classes, SHAPES[shape], count)
    full = gradient(t, z)
    total, first, listed, error = torch.zeros_like(z), 0.0, 0.0, 0.0
    views = views if form.draws else 1  # nothing else differs from view to view
    for view in range(views):
        teacher = form.teacher(t, z, torch.arange(count) * views + view)
        g = gradient(teacher, z)
        total += g
        first += angle(g, full) / views
        error += (g - full).square().sum(1).mean().item() / views
        if form.draws:
            assert isinstance(teacher, SparseTeacher)
            listed += (~teacher.values.isneginf()).sum(1).double().mean().item() / views
    record: Record = {"kind": "teacher", "form": form.name, "classes": classes, "shape": shape}
    record |= {
        "bytes": form.bits(classes, max(listed - form.exact, 0.0)) / 8,
        "listed": listed or form.exact,
        "angle": first,
        "angle_of_mean": angle(total, full),
        "views": views,
    }
    if form.draws:
        record["of_independent"] = error / of_independent(t, form.exact, form.draws)
    return record


def of_independent(t: Tensor, keep: int, n: int) -> float:
    """The variance of the probabilities, summed over the classes, were draws independent."""
    p = t.softmax(1).sort(1, descending=True).values[:, keep:]
    m = p.sum(1)
    return ((m * m - p.square().sum(1)) / n).mean().item()


def table(records: list[Record]) -> str:
    """In Markdown: a line a form, for each shape and number of classes bytes and angles."""
    kept = {(r["shape"], r["classes"], r["form"]): r for r in records if r["kind"] == "teacher"}
    parts = []
    for shape in dict.fromkeys(key[0] for key in kept):
        sizes = list(dict.fromkeys(key[1] for key in kept if key[0] == shape))
        grid = [[shape, *(f"C = {c}" for c in sizes)]]
        for form in dict.fromkeys(key[2] for key in kept):
            found = [kept[shape, c, form] for c in sizes]
            grid.append([form, *(cell(r) for r in found)])
        parts.append(report.in_markdown(grid))
    return "\n\n".join(parts)


def cell(r: Record) -> str:
    return f"{r['bytes']:.0f} B: {r['angle']:.1f}, {r['angle_of_mean']:.1f}"


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--classes", nargs="+", type=int, default=CLASSES)
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--views", type=int, default=VIEWS)
    parser.add_argument("--out", type=Path, help="append JSON lines to this file")
    parser.add_argument("--from", dest="read", nargs="+", type=Path, metavar="FILE")
    chosen = parser.parse_args(words)
    if chosen.read:
        print(table([record for _, record in report.each(chosen.read)]))
        return
    facts = {k: v for k, v in report.facts("cpu").items() if k != "byte_models"}
    found = [facts | {"rows": chosen.rows}]
    found += [
        measure(form, classes, shape, chosen.rows, chosen.views)
        for shape in SHAPES
        for classes in chosen.classes
        for form in FORMS
    ]
    if chosen.out:
        for record in found:
            report.append(chosen.out, record)
    print(table(found))


if __name__ == "__main__":
    main()
