"""Every method in two processes: nothing hangs or is left without a gradient, and both agree."""

import os
import subprocess
import sys
from pathlib import Path

import torch

from kdfuse.engine.methods import METHODS
from kdfuse.engine.training.classification import begin, step_of
from kdfuse.engine.training.ranks import join

HERE = Path(__file__)


def two_steps(name, group, folder):
    """The largest difference between the processes' trained weights after two steps."""
    from test_every_method import recipe_for

    recipe = recipe_for(name, folder)
    labels = torch.arange(64) % 10
    distiller, state = begin(recipe, group, 10, labels, {})
    step = step_of(distiller.train(), state)
    for number in range(2):
        generator = torch.Generator().manual_seed(2 * number + group.rank)
        images = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8, generator=generator)
        index = torch.arange(8) + 16 * number + 8 * group.rank
        terms = step(images, labels[index], index, 1.0)
        assert terms["loss"].isfinite()
    weights = torch.cat([p.detach().flatten() for p in distiller.parameters()])
    other = group.all(weights)[1 - group.rank]
    return (weights - other).abs().max().item()


def test_two_processes_of_every_method_have_the_same_weights(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, str(HERE), str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    lines = [line.split() for line in done.stdout.splitlines() if line.startswith("method ")]
    assert [name for _, name, _ in lines] == list(METHODS)
    assert all(float(difference) == 0 for _, _, difference in lines), lines


if __name__ == "__main__":
    ranks = join("cpu")
    for method in METHODS:
        difference = two_steps(method, ranks, Path(sys.argv[1]))
        if ranks.first:
            print("method", method, difference, flush=True)
