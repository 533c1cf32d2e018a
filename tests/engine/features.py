"""Feature methods in tests: outputs made by hand, formulas to compare with, steps of a recipe."""

import torch
from sklearn.datasets import load_digits
from steps import step_with
from tiny import tiny
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kdfuse.engine.methods import METHODS, Networks, Outputs
from kdfuse.engine.training.build import build

TARGET = torch.tensor([0, 3, 6, 2, 2, 5])


def normal(*shape, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def outputs(student, teacher, n=6, dtype=torch.float64):
    """Positive features of n images, as behind a ReLU, for (C, H, W) or (C,) at each tap."""
    taps = [
        {
            f"stage{i}": normal(n, *s, seed=10 * role + i, dtype=dtype).abs()
            for i, s in enumerate(at)
        }
        for role, at in enumerate((student, teacher))
    ]
    for feature in taps[0].values():
        feature.requires_grad_()
    logits = [normal(n, 7, seed=90 + i, dtype=dtype) for i in range(2)]
    return Outputs(
        logits[0].requires_grad_(), logits[1], student_taps=taps[0], teacher_taps=taps[1]
    )


def with_head(method, out):
    """The head that the method builds for these outputs, and the outputs with what it made."""
    shapes = {
        role: {name: x[:1].shape for name, x in taps.items()}
        for role, taps in (("student", out.student_taps), ("teacher", out.teacher_taps))
    }
    head = method.head(Networks(7, torch.nn.Identity(), shapes=shapes))
    if head is not None:
        torch.manual_seed(0)
        head.to(out.student.dtype)
        out.head = head(out, TARGET, TARGET)
    return head


def leaves(out):
    return list(out.student_taps.values())


def check(method, out, formulas, rtol=1e-4, atol=1e-6):
    """The method's features and their gradients are those of float64 `formulas(out)` by name."""
    found, expected = method.features(out, TARGET), formulas(out)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert value.shape == () and value.dtype == torch.float32
        torch.testing.assert_close(value.double(), expected[name], rtol=rtol, atol=0)
        pair = [
            torch.autograd.grad(loss, leaves(out), retain_graph=True)
            for loss in (value, expected[name])
        ]
        for actual, wanted in zip(*pair, strict=True):
            assert wanted.abs().max() > 0
            scale = float(wanted.abs().max())
            torch.testing.assert_close(actual, wanted, rtol=rtol, atol=atol + rtol * scale)


class Largest(TorchDispatchMode):
    """How many numbers the largest tensor has that is made inside."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(found) if isinstance(x, torch.Tensor)]
        self.numbers = max([self.numbers, *sizes])
        return found


def largest(method, out):
    """The numbers of the largest tensor that the features' forward and backward pass makes."""
    with Largest() as mode:
        sum(method.features(out, TARGET).values()).backward()
    return mode.numbers


def check_compiled(method, out):
    """One graph, and in float32 the values and gradients of the eager form."""
    out.head = {name: x.detach().requires_grad_() for name, x in out.head.items()}
    wrt = list(out.head.values()) or leaves(out)
    made = []
    for features in (
        method.features,
        torch.compile(method.features, fullgraph=True, backend="aot_eager", dynamic=False),
    ):
        found = features(out, TARGET)
        made.append([*found.values(), *torch.autograd.grad(sum(found.values()), wrt)])
    for eager, compiled in zip(*made, strict=True):
        torch.testing.assert_close(compiled, eager)


def check_learns(name, terms, floor=0.0, **options):
    """Twenty steps on digits bring the method's own losses nearer to `floor`; all is trained."""
    recipe = tiny(
        None,
        {"name": name, "ce_weight": 0.1, **options},  # a random teacher and the labels disagree
        data={"source": "synthetic", "classes": 10, "subset": None},
        teacher={"name": "resnet8x4"},
    )
    torch.manual_seed(0)
    distiller = build(recipe, 10, torch.device("cpu"), torch.arange(16) % 10)
    distiller.prepare(())
    distiller.train()
    digits = load_digits()
    images = torch.tensor(digits.images[:16] * 15, dtype=torch.uint8)
    images = images.repeat_interleave(2, 1).repeat_interleave(2, 2)[:, None].expand(-1, 3, -1, -1)
    labels = torch.tensor(digits.target[:16])
    optimizer = torch.optim.Adam(distiller.parameters(), lr=2e-3)
    step = step_with(optimizer, distiller)
    found = [step(images, labels, torch.arange(16)) for _ in range(20)]
    for term in terms:
        # Measured: 0.44 of the first at most, over seeds and instruction sets.
        assert float(found[-1][term]) - floor < 0.8 * (float(found[0][term]) - floor), term
    assert {"loss", "ce", "top1", "top5", "rows", *terms} <= found[0].keys()
    assert METHODS[name].uses_teacher
    for parameter in distiller.parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0
    return distiller
