"""What the methods share that compare the images of a batch with each other."""

from pydantic import Field
from torch import Tensor

from ..method import Outputs
from .feature import FeatureMethod
from .gather import gathered


class RelationMethod(FeatureMethod):
    """A feature method whose pairs are rows (B, d), one an image."""

    gather: bool = Field(
        False, description="compare the images of all processes; false: each process its own"
    )

    @property
    def gathers(self) -> bool:
        return self.gather

    def pairs(self, out: Outputs) -> list[tuple[Tensor, Tensor]]:
        return [
            (self._rows(student), self._rows(teacher)) for student, teacher in super().pairs(out)
        ]

    def _rows(self, features: Tensor) -> Tensor:
        rows = features.flatten(1)
        return gathered(rows) if self.gather else rows
