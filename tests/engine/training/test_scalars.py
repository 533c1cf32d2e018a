"""The numbers of a step: read where they were written, in the type that each reader takes."""

import pytest
import torch

from kdfuse.engine.training.scalars import Scalars

CPU = torch.device("cpu")


def test_what_was_read_before_changes_in_place():
    now = Scalars(CPU)
    now.write({"step": 1, "lr": 0.1})
    step, rate = now["step"], now.rate("lr")
    assert (float(step), float(rate), list(now)) == (1, 0.1, ["step", "lr"])
    now.write({"step": 2, "lr": 0.3})
    assert (float(step), float(rate)) == (2, 0.3)
    assert dict(now).keys() == {"step", "lr"} and len(now) == 2


def test_methods_read_float32_and_optimisers_the_number_itself():
    now = Scalars(CPU)
    now.write({"lr": 0.1})
    assert now["lr"].dtype == torch.float32 and now["lr"].shape == ()
    assert float(now.rate("lr")) == 0.1 != float(now["lr"])
    assert (now["lr"] * torch.ones((), dtype=torch.float32)).dtype == torch.float32


@pytest.mark.parametrize("other", [{"lr": 1.0}, {"lr": 1.0, "step": 1}, {"step": 1, "m": 0.5}])
def test_other_names_are_refused(other):
    now = Scalars(CPU)
    now.write({"step": 1, "lr": 0.1})
    with pytest.raises(ValueError, match=r"a step's numbers are \['step', 'lr'\], got"):
        now.write(other)
    assert float(now["step"]) == 1
