"""Teachers of which a row keeps k of its C logits, as a cache of teacher logits stores them.

Such a row stands for a whole one: its listed classes have the stored logits v, and every other
class has one logit f. With the softmax mass m of the classes left out, at the loss's temperature T,
    f = T * (log(m / (1 - m)) + logsumexp(v / T) - log(C - k)), so that they share m evenly
    f = -inf where m = 0, or where no mass is given: the k are renormalised
These are marginal smoothing and marginal re-norm of Shen and Xing 2022, "A Fast Knowledge
Distillation Framework for Visual Recognition" (FKD).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from . import backends, reference, sampled
from .checks import check_logits, positive

INDEX_TYPES = (torch.int64, torch.int32, torch.int16)
MASS_TYPES = (torch.float32, torch.float64)


@dataclass(frozen=True, eq=False)  # == of tensors is no bool
class SparseTeacher:
    """k of a teacher's C logits a row, which kd_loss, dkd_loss, nkd_loss and wttm_loss take.

    Args:
        values: (N, k) floating-point logits, in any order; 1 <= k < C. A class at -inf has
            probability 0: so rows of fewer classes are filled up, with any that are left.
        indices: (N, k) int64, int32 or int16: their classes, each at most once a row.
        mass: (N,) float32 or float64 in [0, 1): the softmax's mass of the classes left out, which
            they share evenly; None drops them. It belongs to one temperature: a loss at another
            one needs another mass. (float16 would round a mass near 1 to 1.)

    A cache that holds float16 values, int16 or int32 indices and a float32 mass takes 4k + 4 or
    6k + 4 bytes a row; the losses read them as they are, but for the indices, which become int64.
    A row that `ignore_index` marks may hold anything, classes out of range included.

    Raises:
        ValueError: shapes or devices that differ; in the losses and in `dense` on a CPU also a
            class out of range or listed twice, or a mass outside [0, 1). On a GPU a class out of
            range is a device-side assert, with backend="triton" the others are too; nothing waits
            for the device.
        TypeError: tensors of the wrong type.
    """

    values: Tensor
    indices: Tensor
    mass: Tensor | None = None

    def __post_init__(self) -> None:
        for name in ("values", "indices", "mass"):
            x = getattr(self, name)
            if not isinstance(x, Tensor) and (name != "mass" or x is not None):
                raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
        if not self.values.is_floating_point():
            raise TypeError(f"values must have a floating type, got {self.values.dtype}")
        if self.indices.dtype not in INDEX_TYPES:
            raise TypeError(
                f"indices must be int64, int32 or int16, got {self.indices.dtype}; "
                "use indices.long()"
            )
        shape = tuple(self.values.shape)
        if len(shape) != 2 or shape[1] < 1:
            raise ValueError(f"values must have shape (N, k), k at least 1, got {shape}")
        if self.indices.shape != self.values.shape:
            raise ValueError(
                f"indices must have the values' shape {shape}, got {tuple(self.indices.shape)}"
            )
        others = [("indices", self.indices)]
        if self.mass is not None:
            if self.mass.dtype not in MASS_TYPES:
                raise TypeError(
                    f"mass must be float32 or float64, got {self.mass.dtype}; use mass.float()"
                )
            if self.mass.shape != shape[:1]:
                raise ValueError(f"mass must have shape {shape[:1]}, got {tuple(self.mass.shape)}")
            others.append(("mass", self.mass))
        for name, x in others:
            if x.device != self.values.device:
                raise ValueError(
                    f"{name} is on {x.device}, values on {self.values.device}; move one of them"
                )

    @classmethod
    def top_k(
        cls,
        teacher: Tensor,  # (N, C)
        k: int,
        *,
        temperature: float,
        rest: str = "spread",
    ) -> "SparseTeacher":
        """The k largest of whole logits, without a gradient.

        Args:
            teacher: (N, C) floating-point logits, which the values keep.
            k: how many to keep, 1 <= k < C.
            temperature: T of the loss that the result is for.
            rest: "spread" keeps the others' mass of softmax(teacher / T); "drop" does not, and
                then T plays no part.

        Returns:
            values in falling order, int64 indices, and the mass (float64 for float64 logits, else
            float32), or None with "drop".
        """
        check_logits("teacher", teacher)
        positive("temperature", temperature)
        if rest not in ("spread", "drop"):
            raise ValueError(f"rest must be one of spread, drop, got {rest!r}")
        check_count("k", k, teacher.shape[1])
        teacher = teacher.detach()
        values, indices = teacher.topk(k, dim=1)
        if rest == "drop":
            return cls(values, indices)
        x = teacher.to(torch.promote_types(teacher.dtype, torch.float32))
        # Of the rest itself, not 1 - the sum of the k: a small mass keeps its digits.
        softmax = ((x - x.amax(1, keepdim=True)) / temperature).softmax(1)
        return cls(values, indices, softmax.scatter(1, indices, 0.0).sum(1))

    @classmethod
    def sample(
        cls,
        teacher: Tensor,  # (N, C)
        n: int,
        *,
        temperature: float,
        keep: int = 0,
        seed: int | Tensor,  # or (N,) int64
        target: Tensor | None = None,  # (N,) int64
        ignore_index: int = -100,
    ) -> "SparseTeacher":
        """n classes drawn from softmax(teacher / T), and the k largest as they are.

        Random sampling KD (Anshumann et al. 2025, "Sparse Logit Sampling", arXiv 2503.16870). Of
        the softmax's probabilities p the `keep` largest, and the label's where a target is given,
        stay exact; m, the mass of all others, is drawn: of n draws c_i of class i stand for m c_i /
        n, and for 0 of a class that was not drawn. In the mean over the draws this is p, which no
        choice of the largest is. So is a loss's gradient in the mean that of the whole teacher,
        where it is linear in p:
            kd_loss                    at this T
            wttm_loss                  at this T with weighted=False; the weight U is not linear
            dkd_loss                   at this T with a target: it divides by 1 - p_y
            nkd_loss                   at T = 1 with a target: it divides by 1 - p_y, and takes p_y
                                       at T = 1 from the logits that stand for p at this T
        The draws are stratified: each falls into its own of n equal parts of m. So the gradient's
        variance is at most that of the paper's independent draws, which falls as 1 / n; keeping
        the largest lowers it. A loss's value is above that of the whole teacher in the mean, by the
        entropy that the draws lack; nkd_loss has no such term.

        The draws are a function of the row's key, n, and its probabilities: the same in any batch
        and order of rows, and on any device but where the last bits of its softmax decide.
        Nothing waits for a GPU. A call takes several float64 and int64 tensors of (N, C).

        A row of a cache needs the drawn classes with their counts, 2 bytes each where 10 bits hold
        a class and 6 a count, and the kept ones with their probabilities.

        Args:
            teacher: (N, C) floating-point logits.
            n: draws of each row, at least 1.
            temperature: T of the loss that the result is for.
            keep: how many of the largest stay exact, 0 <= keep <= C - 2 (C - 3 with a target); of
                equal ones the first.
            seed: an int from 0 to 2^63 - 1, under which a row's key is its place in the batch, so
                that each batch wants another one; or a key for each row, as of (image, view).
            target: labels whose probability stays exact, too. Of class probabilities those of the
                class that the loss takes for the label, their argmax(1).
            ignore_index: rows with this target are drawn as if it were 0.

        Returns:
            values T * log of the probabilities, float64 for float64 logits, else float32; (N, k)
            with k = keep + n (+ 1 with a target), C - 1 at most: the exact classes, the drawn ones
            by falling count, then classes at -inf that were not drawn. No mass, unless k would be C
            or more: then that of the one class that has no place.

        Raises:
            ValueError: settings, shapes, devices, or a target outside the classes (on a GPU a
                device-side assert).
            TypeError: arguments of the wrong type.
        """
        check_logits("teacher", teacher)
        positive("temperature", temperature)
        sampled.check_counts(n, keep, target is not None, teacher.shape[1])
        keys = sampled.row_keys(seed, teacher)
        label = None
        if target is not None:
            label = sampled.label_of(target, teacher, ignore_index, backends.is_tracing())
        values, indices, mass = sampled.sample(
            teacher.detach(), n, temperature=temperature, keep=keep, label=label, keys=keys
        )
        dtype = torch.promote_types(teacher.dtype, torch.float32)
        return cls(values.to(dtype), indices, None if mass is None else mass.to(dtype))

    def dense(self, classes: int, temperature: float) -> Tensor:
        """(N, classes): the whole logits that these stand for in a loss at this temperature.

        float64 for float64 values, else float32. It defines what the losses compute; here the
        entries of every row are checked, as nothing says which rows count.
        """
        positive("temperature", temperature)
        check_count("values.shape[1]", self.values.shape[1], classes)
        every = torch.ones_like(self.values[:, 0], dtype=torch.bool)
        if not backends.is_tracing():
            check_entries("", self, classes, every)
        dtype = torch.promote_types(self.values.dtype, torch.float32)
        return spread(self.values.to(dtype), self.indices.long(), self.mass, classes, temperature)

    def bucket(self, student: Tensor, temperature: float) -> Tensor:
        """(N, C): the whole logits for a kd_loss that takes the classes left out as one.

        That is KL over k + 1 outcomes, the last one "none of the k" with the mass m, where the
        student has the sum of its probabilities: of what the teacher says of these classes among
        themselves nothing is invented, but nothing is learnt either. Here the mass is spread as
        the student spreads its own, so that they cancel; kd_loss has the value and the gradient of
        the k + 1 outcomes, but not the second derivative. The result holds for this student alone
        and is as large as its logits; on every backend it is made in plain PyTorch, in passes of
        its own over the student.

        Args:
            student: (N, C) logits, which get no gradient from here.
            temperature: T of the loss and of the mass.
        """
        check_logits("student", student)
        positive("temperature", temperature)
        if self.mass is None:
            raise ValueError(
                "mass is None, but a bucket holds the mass of the classes left out; make the "
                "teacher with it, as top_k(rest='spread') does"
            )
        check_sparse("teacher", self, student)
        if not backends.is_tracing():
            every = torch.ones_like(self.values[:, 0], dtype=torch.bool)
            check_entries("", self, student.shape[1], every)
        dtype = torch.promote_types(self.values.dtype, student.dtype)
        dtype = torch.promote_types(dtype, torch.float32)
        indices, mass = self.indices.long(), self.mass.double()[:, None]
        z = student.detach().to(dtype) / temperature
        listed = torch.zeros_like(z, dtype=torch.bool).scatter(1, indices, True)
        rest = reference.log_softmax(z, listed)
        # Where the student has no mass there, any spread of it gives the infinite loss.
        rest = torch.where(torch.isneginf(rest).all(1, keepdim=True), 0.0, rest)
        rest = rest + mass.log().to(dtype)
        kept = (self.values.to(dtype) / temperature).log_softmax(1) + (-mass).log1p().to(dtype)
        return temperature * rest.scatter(1, indices, kept)


def spread(
    values: Tensor,  # (N, k)
    indices: Tensor,  # (N, k) int64
    mass: Tensor | None,  # (N,)
    classes: int,
    temperature: float,
) -> Tensor:
    """The (N, C) logits of the module's first lines, in the values' type."""
    n, k = values.shape
    if mass is None:
        return values.new_full((n, classes), -math.inf).scatter(1, indices, values)
    m = mass.double()
    lse = (values.double() / temperature).logsumexp(1) - math.log(classes - k)
    fill = temperature * (m.log() - (-m).log1p() + lse)
    whole = fill.to(values.dtype)[:, None].expand(n, classes)
    return whole.scatter(1, indices, values)


def check_count(name: str, k: int, classes: int) -> None:
    if not 1 <= k < classes:
        raise ValueError(
            f"{name} is {k}, but of {classes} classes 1 to {classes - 1} can be listed; "
            "pass all of them as whole logits"
        )


def check_sparse(name: str, x: SparseTeacher, student: Tensor) -> None:
    """Against the student's shape and device; what the entries are is for `check_entries`."""
    n, k = x.values.shape
    if n != student.shape[0]:
        raise ValueError(
            f"{name}.values must have the student's {student.shape[0]} rows, got {(n, k)}"
        )
    check_count(f"{name}.values.shape[1]", k, student.shape[1])
    if x.values.device != student.device:
        raise ValueError(
            f"{name} is on {x.values.device}, the student on {student.device}; move one of them"
        )
    for part, y in (("values", x.values), ("mass", x.mass)):
        if y is not None and y.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{name}.{part} requires grad, but gets none from this loss; pass {part}.detach()"
            )


def check_entries(name: str, x: SparseTeacher, classes: int, valid: Tensor) -> None:
    """For the reference: classes and mass of the valid rows.

    On a GPU a device-side assert, so that nothing waits for the device.
    """
    prefix = f"{name}." if name else ""
    index = x.indices.long()
    outside = ((index < 0) | (index >= classes)) & valid[:, None]
    ordered, place = index.sort(dim=1, stable=True)
    again = torch.zeros_like(outside)
    repeated = (ordered[:, 1:] == ordered[:, :-1]) & valid[:, None]
    again = again.scatter(1, place[:, 1:], repeated)
    wrong = torch.zeros_like(valid)
    if x.mass is not None:
        wrong = ((x.mass < 0) | (x.mass >= 1)) & valid  # NaN reaches the loss, as in logits
    if index.device.type != "cpu":
        torch._assert_async(~outside.any(), "kdfuse: indices of a teacher outside the classes")
        torch._assert_async(~again.any(), "kdfuse: indices of a teacher repeat a class")
        torch._assert_async(~wrong.any(), "kdfuse: mass of a teacher outside [0, 1)")
        return
    for bad, text in (
        (outside, f"outside the {classes} classes"),
        (again, "listed twice in its row; list a class once"),
    ):
        if bad.any():
            row, column = bad.nonzero()[0].tolist()
            value = int(index[row, column])
            raise ValueError(f"{prefix}indices[{row}, {column}] is {value}, {text}")
    if x.mass is not None and wrong.any():
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"{prefix}mass[{row}] is {x.mass[row].item():g}, outside [0, 1); it is the softmax's "
            "mass of the classes left out"
        )
