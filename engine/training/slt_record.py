"""Recording the self-learning teachers of a run, step by step as they learn."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
from torch import Tensor

from ..cache import header as headers
from ..cache.forms import form_of
from ..cache.growing import Growing
from ..cache.header import Header
from ..data.loaders import Loader
from ..data.manifest import Manifest
from ..data.plan import RECORD, SLTS, key, keys
from ..data.quarantine import Quarantine
from ..methods.parts.self_learning import SelfLearning
from ..recipe.load import Recipe
from ..run.lease import Lease, held
from .inputs import maker
from .learner import Learner
from .meters import Diverged
from .networks import Distiller
from .peers import together
from .ranks import Group
from .recorded import Told, begun, out_of_use, views_of

OPENING = "opening run.record"


def check_new(recipe: Recipe, out: Path) -> None:
    """Raise ValueError where a run that begins in `out` cannot begin its record."""
    folder = recipe.run.record
    if folder is None:
        return
    if folder.resolve() == out.resolve():
        raise ValueError(f"run.record: {folder} is the run's own folder; choose another")
    if (folder / headers.NAME).exists():
        raise ValueError(
            f"run.record: {folder} has a record already; go on with the run that began it "
            "(resume=true), or choose another folder"
        )


def slt_record(
    recipe: Recipe,
    group: Group,
    part: range,
    told: Told,
    networks: Distiller,
    loader: Loader,
    images: Manifest,
) -> SltRecord:
    """What takes what the SL-Ts of a recipe's own student say in the coming steps; all processes
    call it. ValueError for a form that does not fit the data."""
    run, method, network = recipe.run, recipe.method, recipe.slt or recipe.teacher
    assert network is not None
    cache = told.cache
    wraps = cache is not None and cache.header.views < told.epochs
    header = Header(
        form=form_of(recipe.cache, len(images.classes), getattr(method, "temperature", None)),
        views=told.epochs,
        steps=loader.steps,
        seed=told.seed,
        teachers=(network.name,) * method.slt_count,
        digest=told.weights(networks),
        numerics={
            "amp": run.amp,
            "tf32": run.tf32,
            "channels_last": run.channels_last,
            "compile": run.compiled,
        },
        facts={},
        slts={
            "method": method.model_dump(mode="json"),
            "optim": recipe.optim.model_dump(mode="json", exclude={"skip_limit"}),
            "normalize": network.normalize and network.normalize.model_dump(mode="json"),
            "epochs": run.epochs,
            "seed": run.seed,
            "again": cache.header.views if cache is not None and wraps else None,
        },
        **views_of(recipe, images, maker(loader), told.seed),
    )
    return SltRecord(recipe, header, group, part, networks.main, loader.quarantine)


class SltRecord:
    """Takes what the SL-Ts of a learner say together in each step, and writes it beside the steps.

    A thread encodes and writes a step's rows while the next step runs; from a GPU they come by a
    copy that nobody waits for. As a context it holds the record's folder.
    """

    def __init__(
        self,
        recipe: Recipe,
        header: Header,
        group: Group,
        part: range,
        learner: Learner,
        quarantine: Quarantine,
    ) -> None:
        """`part`: the places of each batch that this process has."""
        assert recipe.run.record is not None and isinstance(learner.method, SelfLearning)
        self.recipe, self.header, self.group, self.part = recipe, header, group, part
        self.folder, self.quarantine = recipe.run.record, quarantine
        self.method = learner.method
        self.steps = header.views * header.steps
        self._files = Growing(self.folder, header.layout(), group.all(part), group.rank)
        self._step = 0  # at hand
        self._kept: list[Callable[[], Tensor]] = []  # of its parts
        self._work: Future[None] | None = None
        self._lease: Lease | None = None
        learner.fused, learner.apart = self._take, self._apart

    def __enter__(self) -> SltRecord:
        """Raises CacheError where the folder has something else."""
        with ExitStack() as opened:
            together(self.group, OPENING, lambda: self._open(opened))
            self._pool = ThreadPoolExecutor(1, "record")
            opened.callback(self._files.drop)
            opened.callback(self._pool.shutdown)
            self._opened = opened.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._opened.close()

    def _open(self, opened: ExitStack) -> None:
        if not self.group.first:
            return
        self._lease = opened.enter_context(held(self.folder, self.group.world))
        if not begun(self.folder, self.header, "run.record"):
            headers.write(self.folder, self.header)

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Within, the SL-Ts say what belongs to this step of the run, counted from 0."""
        self._step, self._kept = number, []
        yield
        self._hand_over(partial(self._put, number, self._kept))

    def flush(self) -> None:
        """Have the rows of all steps until now on the disk."""
        self._settle()
        self._check_lease()
        self._files.flush()

    def finish(self, done: int, unreadable: list[dict[int, str]]) -> None:
        """Make the files of which all steps are among the first `done`, after every process has
        flushed; `unreadable` are the images that each has found."""
        if not self.group.first:
            return
        self._check_lease()
        found = {row: why for own in unreadable for row, why in own.items()}
        self._hand_over(lambda: self._files.finish(done, self._out_of_use(found)))
        if done == self.steps:  # before the run says that it is finished
            self._settle()

    def rewind(self, done: int) -> None:
        """Forget what lies behind the first `done` steps. CacheError where those are not there."""
        self._settle()
        self._files.drop()
        found: dict[int, str] = {}
        for own in self.group.all(self.quarantine.found()):
            found |= own
        together(
            self.group,
            OPENING,
            lambda: self._files.rewind(done, self._out_of_use(found)) if self.group.first else None,
        )

    def _take(self, slts: list[Tensor]) -> Tensor:
        """(N, C) float32: their fused logits, which go to the host as soon as they are made."""
        fused = self.method.fuse(slts).detach()
        self._kept.append(_on_its_way(fused))
        return fused

    @contextmanager
    def _apart(self) -> Iterator[None]:
        """Within, random numbers are those of the step's SL-Ts: a student draws the same where they
        are not there."""
        device = self.group.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            words = (self.recipe.run.seed, self.group.rank, SLTS, self._step, len(self._kept))
            torch.manual_seed(key(*words))
            yield

    def _put(self, step: int, kept: list[Callable[[], Tensor]]) -> None:
        fused, header = torch.cat([arrived() for arrived in kept]), self.header
        if not fused.isfinite().all():
            raise Diverged(
                f"run.record: the SL-Ts' logits in step {step + 1} are not finite, and no student "
                "could learn from them: stopped, checkpoints before it are kept; lower optim.lr or "
                "add optim.warmup_epochs"
            )
        view, within = divmod(step, header.steps)
        places = np.arange(self.part.start, self.part.stop) + within * header.batch
        of_rows = torch.from_numpy(keys(key(header.seed, view, RECORD), places))
        no_labels = torch.zeros(len(fused), dtype=torch.int64)
        self._files.put(step, header.form.encode(fused, no_labels, of_rows))

    def _hand_over(self, work: Callable[[], None]) -> None:
        """Have the thread work, behind what it does now. Raises what that came to."""
        self._settle()
        self._work = self._pool.submit(work)

    def _settle(self) -> None:
        work, self._work = self._work, None
        if work is not None:
            work.result()

    def _check_lease(self) -> None:
        if self._lease is not None:
            self._lease.check()

    def _out_of_use(self, found: dict[int, str]) -> Callable[[int, range], dict[int, str]]:
        assert self.header.slts is not None
        again = self.header.slts["again"] or self.header.views

        def of_steps(view: int, steps: range) -> dict[int, str]:
            data, header = self.recipe.data, self.header
            return out_of_use(self.quarantine.manifest, found, header, data, view % again, steps)

        return of_steps


def _on_its_way(fused: Tensor) -> Callable[[], Tensor]:
    """What gives the tensor on the host, and waits until it is there."""
    if fused.device.type == "cpu":
        return lambda: fused
    host = torch.empty(fused.shape, dtype=fused.dtype, pin_memory=True)
    host.copy_(fused, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def arrived() -> Tensor:
        copied.synchronize()
        return host

    return arrived
