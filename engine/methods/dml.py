"""Deep mutual learning: networks that are trained side by side and learn from each other."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from ...kernels import reference
from ...kernels.kd import kd_loss
from .method import Method, Now, Outputs, Terms, with_terms


class DML(Method):
    """For the student and each peer i: ce_weight * CE_i + kd_weight * mean_j T^2 KL(p_j || p_i).

    Zhang et al., CVPR 2018, "Deep Mutual Learning"; j runs over the other networks. All are trained
    in one step from the same predictions, where the paper updates one after the other. The peers
    are the recipe's `slt` network, `peers` times, each with random weights of its own.
    """

    name: Literal["dml"] = "dml"

    peers: int = Field(1, ge=1, description="how many networks beside the student")
    temperature: float = Field(1.0, gt=0, description="T of all networks' probabilities")
    ce_weight: float = Field(1.0, ge=0, description="weight of each network's cross-entropy")
    kd_weight: float = Field(1.0, ge=0, description="weight of the mean KL from the others")
    detach: bool = Field(True, description="false: a network's loss also reaches the others")

    @property
    def slt_count(self) -> int:
        return self.peers

    @property
    def takes_soft_labels(self) -> bool:
        return True

    def loss(self, out: Outputs, target: Tensor, now: Now) -> tuple[Tensor, Terms]:
        networks = {"": out.student, **{f"slt{i}_": slt for i, slt in enumerate(out.slts)}}
        losses: list[Tensor] = []
        terms: Terms = {}
        for name, own in networks.items():
            others = [logits for logits in networks.values() if logits is not own]
            loss, found = with_terms(
                kd_loss(
                    own,
                    [other.detach() for other in others],
                    target,
                    temperature=self.temperature,
                    kd_weight=self.kd_weight if self.detach else 0.0,
                    ce_weight=self.ce_weight,
                    return_terms=True,
                )
            )
            losses.append(loss if self.detach else loss + self.kd_weight * self._kl(others, own))
            terms |= {f"{name}{term}": value for term, value in found.items() if term != "rows"}
            terms["rows"] = found["rows"]
        return sum(losses[1:], start=losses[0]), terms

    def _kl(self, others: list[Tensor], own: Tensor) -> Tensor:
        """Batch mean of T^2 KL(p_j || p_i), the mean over j, with both sides' gradient."""
        own, *others = ((z.float() / self.temperature).log_softmax(1) for z in (own, *others))
        first, *rest = (reference.kl(other, own).mean() for other in others)
        return self.temperature**2 * sum(rest, start=first) / len(others)
