"""Top-1 and top-5 accuracy of the networks of a run, every validation image counted once."""

from collections.abc import Callable, Iterable
from contextlib import closing
from pathlib import Path

import torch
from torch import Tensor, nn

from ..data.batch import Batch
from ..data.loaders import make_loader
from ..data.loaders.feed import on_device
from ..data.sources import open_source
from ..run.past import checkpoints_of, recipe_of
from .build import build
from .meters import Diverged
from .networks import Distiller
from .process import settings
from .ranks import Group, join
from .speed import settled
from .trajectories import Trajectories


def hits(logits: Tensor, target: Tensor) -> Tensor:
    """Top-1 hits, top-5 hits, rows, and rows that are not finite: float64 (4,).

    Of equal logits the one of the lower class comes first, so that a constant output is no hit
    for every class; a row that is not finite is no hit at all.
    """
    own = logits.gather(1, target[:, None])  # logits (N, C), target (N,)
    classes = torch.arange(logits.shape[1], device=logits.device)
    ahead = (logits > own) | ((logits == own) & (classes < target[:, None]))
    rank = ahead.sum(1)
    fine = logits.isfinite().all(1)
    rows = torch.ones_like(fine)
    return torch.stack([(rank < 1) & fine, (rank < 5) & fine, rows, ~fine]).double().sum(1)


def accuracy(
    distiller: Distiller,
    networks: dict[str, tuple[nn.Module, str]],  # name: the network and its role
    batches: Iterable[Batch],  # this process's part of the validation set
    group: Group,
    look: Callable[[Batch, dict[str, Tensor]], None] | None = None,
) -> dict[str, dict[str, float]]:
    """{name: {"top1": percent, "top5": percent}} over all processes' batches.

    `look` gets each batch, with the networks' logits of its valid rows. Leaves the networks in
    evaluation mode. Raises Diverged when one gives NaN or infinity.
    """
    counts = torch.zeros(len(networks), 4, dtype=torch.float64, device=group.device)
    for network, _ in networks.values():
        network.eval()
    for batch in on_device(iter(batches), group.device):
        target = batch.target[: batch.valid]
        made: dict[str, Tensor] = {}
        for count, (name, (network, inputs)) in zip(counts, networks.items(), strict=True):
            made[name] = distiller.predict(network, inputs, batch.images)[: batch.valid]
            count += hits(made[name], target)
        if look is not None:
            look(batch, made)
    found = {}
    for name, row in zip(networks, group.sum(counts).tolist(), strict=True):
        top1, top5, rows, broken = row
        if broken:
            cure = (
                "its checkpoint is damaged or for other inputs"
                if name == "teacher"
                else "lower optim.lr or look at the data"
            )
            raise Diverged(
                f"{name}: the outputs for {int(broken)} of {int(rows)} images are not "
                f"finite; {cure}"
            )
        found[name] = {"top1": 100 * top1 / rows, "top5": 100 * top5 / rows}
    return found


def measure(
    distiller: Distiller,
    batches: Iterable[Batch],
    group: Group,
    trajectories: Trajectories | None = None,
) -> dict[str, float]:
    """Percent: top1 and top5 of the student; slt0_top1, ema_top1 and so on of the others. With
    `trajectories` also what `Trajectories.read` gives."""
    look = None if trajectories is None else trajectories.add
    found = accuracy(distiller, distiller.evaluated(), batches, group, look)
    student = found.pop("student")
    others = {f"{name}_{k}": v for name, row in found.items() for k, v in row.items()}
    return student | others | (trajectories.read(group) if trajectories is not None else {})


def evaluate(run: str | Path) -> dict[str, dict[str, float]]:
    """Evaluate the last and the best checkpoint of a run's folder again, and print the results.

    {"last": {...}, "best": {...}}, each as `measure` gives it, with the checkpoint's step.
    Raises FileNotFoundError for a folder that is no run, CheckpointError (a RuntimeError) when
    there is no checkpoint to use.
    """
    run = Path(run)
    recipe = recipe_of(run)
    results = {}
    group = join(recipe.run.device)
    recipe = settled(recipe, group.device)
    with settings(recipe.run):
        val_set = open_source(recipe.data, "val")
        distiller = build(recipe, len(val_set.classes), group.device)
        loader = make_loader(
            val_set,
            recipe.data,
            recipe.run.eval_batch,
            seed=recipe.run.seed,
            train=False,
            part=group.part(recipe.run.eval_batch, "run.eval_batch"),
            device=group.device,
        )
        with closing(loader) as val:
            for name, (weights, facts) in checkpoints_of(run).items():
                distiller.load(weights)
                found = measure(distiller, val.epoch(0), group)
                results[name] = {"step": facts["step"], **found}
                if group.first:
                    words = ", ".join(f"{k} {value:.2f}" for k, value in found.items())
                    print(f"{name} (step {facts['step']}): {words}", flush=True)
    return results
