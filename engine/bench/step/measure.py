"""Measures cases: they, the steps that they are made of and their peers take turns in one run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from ....kernels.bench.report import Record
from ....kernels.bench.timing import quantile
from ...recipe.run import Run
from ...training.captured import WARM_UP
from ...training.compiled import GRAPHS, Compilations
from ...training.process import settings
from . import gauges, memory, peer, plain
from .cases import Case, parts
from .ours import Images, Step, loss_of, work_of
from .player import BLOCKS, Player

CALLS = 20  # of a loss, or of what reads answers, which are short, for one of a step


class Bench:
    """All players of a run, by what they are of: case, peer, loss, reading, matrix product."""

    def __init__(
        self,
        device: torch.device,
        kind: str | None,
        workers: int | None,
        compilations: Compilations,
    ) -> None:
        """`kind` of the peers: fp32, bf16 or None for no peers."""
        self.device, self.kind, self.workers = device, kind, workers
        self.compilations = compilations
        self.images = Images(device)
        self.cases: dict[Any, Player] = {}
        self.losses: dict[Any, Player] = {}
        self.readings: dict[Any, Player] = {}
        self.peers: dict[Any, Player] = {}
        self.loops: dict[Any, plain.Loop] = {}
        self.peaks: dict[str, Player] = {}
        self.products: dict[str, gauges.Matmul] = {}
        self.counts: dict[Any, Record] = {}

    def enter(self, case: Case, seconds: float, whole: bool) -> None:
        """Make a case ready, and unless it is only a part of others, all it is held against."""
        if case.key not in self.cases:
            self.enter_step(case, seconds)
        if not whole:
            return
        for kind in gauges.matmul_types(case.recipe.run.amp, self.device):
            if kind not in self.peaks:
                self.products[kind] = gauges.Matmul(kind, self.device)
                self.peaks[kind] = self.player(self.products[kind], peer.usual, seconds)
        if self.kind is None or case.without is not None or peer.why_not(case):
            return
        workers = case.recipe.data.workers if self.workers is None else self.workers
        loop = peer.peer_of(case, self.images, self.kind == "bf16", workers)
        self.loops[case.key] = loop
        self.peers[case.key] = self.player(loop, peer.usual, seconds, guarded=False)

    def enter_step(self, case: Case, seconds: float) -> None:
        on_gpu, run = self.device.type == "cuda", case.recipe.run
        self.images.of(case)
        before = gauges.held() if on_gpu else 0
        with settings(run):
            step = work_of(case, self.images)
            if run.capture:  # the first steps are no graph yet
                for _ in range(WARM_UP + 1):
                    step()
        compiled = self.compilations.seconds
        found = self.cases[case.key] = self.player(step, partial(settings, run), seconds)
        compiled = self.compilations.seconds - compiled
        counts: Record = {"compile_s": compiled} if run.compile else {}
        with settings(run):
            if on_gpu:
                counts["memory_mb"] = gauges.peak_memory(step, before) / 1e6
                counts["launches"] = gauges.launches(step)
                counts["host_ms"] = gauges.host_seconds(step) * 1e3
            # Counting keeps torch.compile from its compiled code, and a graph shows no ops: what
            # is counted is eager.
            eager = work_of(bare(case), self.images) if run.compile or run.capture else step
            counts["flops"] = gauges.flops(eager)
            if not (run.compile or run.capture):
                counts["ops"] = gauges.ops(eager)
            loss = loss_of(step, case) if isinstance(step, Step) else None
            answers = step.answers if isinstance(step, Step) else None
        self.counts[case.key] = counts
        if loss is not None:
            once = partial(repeat, loss)
            self.losses[case.key] = self.player(once, found.process, seconds / 10)
        if answers:
            once = partial(repeat, answers)
            self.readings[case.key] = self.player(once, found.process, seconds / 10)

    def player(
        self, step: Callable[[], Any], process: Any, seconds: float, guarded: bool = True
    ) -> Player:
        made = Player(step, process, guarded)
        made.warm_up(self.device, seconds)
        return made

    def play(self) -> None:
        """A block each in turn, a case and its peer one after the other: a drift meets all."""
        for _ in range(BLOCKS):
            for key, player in self.cases.items():
                player.block(self.device)
                for group in (self.peers, self.losses, self.readings):
                    if key in group:
                        group[key].block(self.device)
            for player in self.peaks.values():
                player.block(self.device)

    def record(self, case: Case) -> Record:
        """All that was measured of a case; what does not apply to it is left out."""
        recipe, run, player = case.recipe, case.recipe.run, self.cases[case.key]
        seconds, counts = player.median, self.counts[case.key]
        kinds = gauges.matmul_types(run.amp, self.device)
        peak, kind = max((self.products[k].flops / min(self.peaks[k].seconds), k) for k in kinds)
        found: Record = {"kind": "step", "case": case.name, "recipe": case.written}
        roles = {"student": None if case.forward else recipe.student, "teacher": recipe.teacher}
        found |= {role: network.name for role, network in roles.items() if network}
        found |= {"device": self.device.type, "batch": run.batch, "size": recipe.data.size}
        found |= {"classes": case.classes, **configured(run)}
        found |= {"images_per_s": run.batch / seconds, "step_ms": seconds * 1e3}
        fast, slow = (quantile(player.seconds, q) for q in (0.2, 0.8))
        found |= {"step_ms_p20": fast * 1e3, "step_ms_p80": slow * 1e3}
        found |= {"images_per_s_p20": run.batch / slow, "images_per_s_p80": run.batch / fast}
        found |= {"blocks": len(player.seconds), "steps_of_block": player.steps}
        found |= counts | {"matmul_type": kind, "matmul_tflops": peak / 1e12}
        found |= {"mfu": counts["flops"] / seconds / peak}
        if self.device.type == "cpu":
            found["host_ms"] = found["step_ms"]
        if shares := [(self.cases[part.key], part, n) for part, n in parts(case)]:
            for ending, q in (("", 0.5), ("_p20", 0.2), ("_p80", 0.8)):
                times = {part.name: quantile(own.seconds, q) * 1e3 for own, part, _ in shares}
                found[f"parts_ms{ending}"] = times
            found["share_of_parts"] = sum(own.median * n for own, _, n in shares) / seconds
        if case.key in self.losses:
            alone = self.losses[case.key].median / CALLS
            found |= {"loss_ms": alone * 1e3, "loss_share": alone / seconds}
        if case.key in self.readings:
            alone = self.readings[case.key].median / CALLS
            found |= {"reading_ms": alone * 1e3, "reading_share": alone / seconds}
        if run.compile:
            shared = {case.key, *(part.key for part, _ in parts(case))}
            found["compile_s"] = sum(self.counts[key].get("compile_s", 0.0) for key in shared)
        return found | self.beside(case) | self.against(case, seconds)

    def beside(self, case: Case) -> Record:
        """The words that a case has on top of another one, and its speed over that one's."""
        if case.without is None:
            return {}
        rate, without = (
            one.recipe.run.batch / self.cases[one.key].median for one in (case, case.without)
        )
        return {"beside": list(case.words), "times_without": rate / without}

    def against(self, case: Case, seconds: float) -> Record:
        """What a case's peer came to, or why it has none; one that stands beside another case
        shares its peer."""
        if self.kind is None:
            return {}
        whose = case.without or case
        if whose.key not in self.peers:
            return {"peer_absent": peer.why_not(whose)}
        if not peer.same(whose, case):
            return {"peer_absent": f"no plain loop was measured with {' '.join(case.words)}"}
        own, loop = self.peers[whose.key], self.loops[whose.key]
        return {
            "peer": self.kind,
            "peer_images_per_s": case.recipe.run.batch / own.median,
            "peer_workers": loop.batches.loader.num_workers,
            "peer_waiting": loop.batches.waited / loop.spent,
            "times_peer": own.median / seconds,
        }


def measure(
    cases: Sequence[Case],
    device: torch.device,
    seconds: float,
    kind: str | None,
    workers: int | None,
    compilations: Compilations,
    keep: Callable[[Record], None],
) -> None:
    """Hands a record of each case to `keep`; each is timed for about so many seconds."""
    bench = Bench(device, kind, workers, compilations)
    if any(case.recipe.run.compile for case in cases):
        allow_graphs(cases)
    for case in cases:
        print(f"preparing {case.label}", flush=True)
        bench.enter(case, seconds, whole=True)
        for part, _ in parts(case):
            bench.enter(part, seconds, whole=False)
    print(f"measuring {len(bench.cases)} steps and {len(bench.peers)} peers", flush=True)
    bench.play()
    for loop in bench.loops.values():
        loop.batches.close()
    on_cpu = memory.of(cases) if device.type == "cpu" else [None] * len(cases)
    for case, peak in zip(cases, on_cpu, strict=True):
        keep(bench.record(case) | ({} if peak is None else {"memory_mb": peak / 1e6}))


def configured(run: Run) -> Record:
    only = {"compile_only": list(run.compile_only)} if run.compile_only else {}
    found = {"amp": run.amp, "compile": run.compile, **only, "channels_last": run.channels_last}
    others = {"capture": run.capture, "accumulate": run.accumulate if run.accumulate > 1 else 0}
    return found | {name: value for name, value in others.items() if value}


def bare(case: Case) -> Case:
    run = case.recipe.run.model_copy(update={"compile": False, "capture": False})
    return Case(case.name, case.recipe.model_copy(update={"run": run}), case.written, case.forward)


def allow_graphs(cases: Sequence[Case]) -> None:
    """Dynamo counts graphs over all networks of a class, here over those of all cases."""
    import torch._dynamo.config as dynamo

    counted = [part for case in cases for part in (case, *(own for own, _ in parts(case)))]
    networks = sum(
        2 + len(c.recipe.learners("")) * (1 + c.recipe.method.slt_count) for c in counted
    )
    dynamo.recompile_limit = max(dynamo.recompile_limit, GRAPHS * networks)


def repeat(short: Callable[[], Any]) -> None:
    for _ in range(CALLS):
        short()
