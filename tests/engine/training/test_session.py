"""A loop of one's own over a recipe's parts."""

import pytest
import torch
from same import assert_same
from tiny import tiny

from kdfuse.engine import Recipe, session, train
from kdfuse.engine.run.checkpoint import load
from kdfuse.engine.run.past import read_run

pytestmark = pytest.mark.slow(10)


@pytest.mark.parametrize("method", ["kd", "slkd"])
def test_a_loop_over_all_steps_is_what_train_does(tmp_path, method):
    recipe = tiny(tmp_path / "digits", method, run={"speed": "exact"}, data={"mixup": 0.4})
    whole = train(recipe, tmp_path / "run")
    with session(recipe) as found:
        for epoch in range(recipe.run.epochs):
            for batch in found.batches(epoch):
                terms = found.step(batch)
                assert terms["loss"].ndim == 0 and not terms["loss"].requires_grad
            means = found.means()
            last = found.evaluate()
        state = found.student.state_dict()
        batch = next(found.batches(recipe.run.epochs))
        with pytest.raises(ValueError, match="lr: the schedule is of run.epochs = 2, and"):
            found.step(batch)
    for use in (found.means, found.evaluate, lambda: found.step(batch), lambda: found.student):
        with pytest.raises(RuntimeError, match="the session is over"):
            use()
    held, _ = load(whole / "checkpoints" / f"step-{2 * found.steps:08d}")
    assert_same(dict(state), dict(held["student"]))
    record = read_run(whole).last
    assert {name: record[name] for name in last} == last
    assert means["loss"] > 0


def weights(network):
    return torch.cat([p.detach().reshape(-1) for p in network.parameters()])


def test_a_rate_of_ones_own(tmp_path):
    recipe = tiny(tmp_path / "digits", run={"speed": "exact"})
    with session(recipe) as found:
        before = weights(found.student)
        found.step(next(found.batches(0)), lr=0.0)
        assert torch.equal(weights(found.student), before)
        found.step(next(found.batches(0)), lr=0.1)
        assert not torch.equal(weights(found.student), before)


def test_a_teacher_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="trained_by: digits/ce:resnet20 is not trained first"):
        with session(Recipe.load("digits/kd")):
            pass
