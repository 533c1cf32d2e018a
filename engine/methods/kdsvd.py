"""Distillation by singular value decomposition (Lee et al. 2018): how stages relate to the next."""

from collections.abc import Mapping
from itertools import pairwise
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from .method import Networks, Outputs, Points, Role, Terms
from .parts.maps import MapMethod, map_shapes

MORE = 3  # of the student's vectors, among which the teacher's find their partners
EPS = 1e-4  # eigenvalues nearer than this share of their sum do not turn each other's vectors


class KDSVD(MapMethod):
    """sum over consecutive stages of |R_S - R_T|^2 / N, R = exp(-(v_i - v'_j)^2 / 8).

    v (W,) and v' (W',) are the right singular vectors of two stages' maps of one image, each map
    written as a (C * H) x W matrix: the teacher's first `rank`, and of the student's first rank + 3
    those that are nearest to them, with the teacher's sign. Both are multiplied by the teacher's
    singular values, which have norm 1. Weight as in RepDistiller and mdistiller.

    Two choices go beyond the released code. The sign of a singular vector is whatever a library
    gives, and R depends on it: here the sum of each of the teacher's is positive. The larger map is
    pooled to the smaller, where the released code fails. A GPU is waited for once a map.
    """

    name: Literal["kdsvd"] = "kdsvd"
    waits: ClassVar[bool] = True

    rank: int = Field(1, ge=1, description="how many of the teacher's vectors are compared")

    def reads(self, points: Mapping[Role, Points]) -> dict[Role, tuple[str, ...]]:
        found = super().reads(points)
        if len(found["student"]) < 2:
            raise ValueError(
                "method kdsvd relates stages to the next, and reads only "
                f"{', '.join(found['student'])} of the student; name two points or more with "
                "method.student_taps and method.teacher_taps"
            )
        return found

    def head(self, networks: Networks) -> nn.Module | None:
        """None. ValueError for maps that have no `rank` singular vectors."""
        width = min(shape[3] for pair in map_shapes(networks) for shape in pair)
        if self.rank > width:
            raise ValueError(
                f"method.rank: {self.rank} singular vectors of a map that is {width} wide; set it "
                f"to at most {width} or name larger maps with method.student_taps"
            )
        return None

    def features(self, out: Outputs, target: Tensor) -> Terms:
        stages = [partners(s, t, self.rank) for s, t in self.pairs(out)]
        losses = []
        for (s_before, t_before), (s, t) in pairwise(stages):
            difference = relation(s, s_before) - relation(t, t_before)
            losses.append(difference.square().sum() / len(difference))
        return {"kdsvd": torch.stack(losses).sum()}


def partners(student: Tensor, teacher: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Vectors (N, W, rank) of both maps (N, C, H, W), the student's beside the teacher's."""
    s, _ = right_vectors(student, rank + MORE)
    t, values = right_vectors(teacher, rank)
    t = torch.where(t.sum(1, keepdim=True) < 0, -t, t)
    cosine = s.detach().mT @ t
    nearest = F.one_hot(cosine.abs().argmax(1), s.shape[2]).mT
    scale = F.normalize(values, dim=1)[:, None]
    return s @ (nearest * cosine.sign()) * scale, t * scale


def right_vectors(maps: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Right vectors (N, W, count) and singular values (N, count), the first, of (C * H) x W maps M.

    The vectors are the eigenvectors v_i of P = M'M, W x W and far smaller than M. With their
    eigenvalues as shares of the sum, |M|^2 = 1, the derivative is written out:

        dv_j = sum_i v_i (v_i' dP v_j) f(lambda_j - lambda_i),    f(gap) = gap^3 / (gap^4 + EPS^4)

    That of eigh has f = 1 / gap, which has no bound where two eigenvalues meet, as in an empty map.
    Here |f| <= 3^(3/4) / (4 EPS) < 0.57 / EPS, and as |dP| <= 2 |M| |dM| in Frobenius norms,
    |dV| <= 1.14 |dM| / (EPS |M|); so |grad M| <= 1.14 |grad V| / (EPS |M|) for any loss.
    f is less than 1 / gap by at most its (EPS / gap)^4. From a gap of 1.2e-3 on that is less than
    what float32 loses by rounding the eigenvalues, 6e-8 / gap; from 7e-3 on it is less than 6e-8.
    """
    matrices = maps.flatten(1, 2)
    norm = torch.linalg.vector_norm(matrices.detach(), dim=(1, 2), keepdim=True).clamp(min=1e-12)
    matrices = matrices / norm  # a scale leaves the vectors as they are
    product = matrices.mT @ matrices
    values, vectors = (x.flip(-1) for x in torch.linalg.eigh(product.detach()))
    first = vectors[..., :count]
    gap = values[:, None, :count] - values[:, :, None]
    change = vectors.mT @ (product - product.detach()) @ first  # 0, and its derivative is not
    first = first + vectors @ (gap**3 / (gap**4 + EPS**4) * change)
    return first, values[:, :count].clamp(min=0).sqrt() * norm[:, 0]


def relation(vectors: Tensor, before: Tensor) -> Tensor:  # (N, W, k), (N, W', k)
    return (-(vectors[:, :, None] - before[:, None]).square() / 8).exp()  # (N, W, W', k)
