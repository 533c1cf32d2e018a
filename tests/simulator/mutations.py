"""Faults that the simulator must find, put into a copy of csrc one at a time.

    python tests/simulator/mutations.py [PART OF A NAME ...]

Each is a change of the kernels or of their launcher that leaves most results right on a GPU most of
the time. It is compiled, calls that lead past it are executed under a few schedules, and what they
say is printed. Fails where one is not caught, or where its text is no longer in csrc.
"""

import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/kernels"), str(ROOT / "tests/simulator")]

import simulator  # noqa: E402
import torch  # noqa: E402
from calls import FULL, arguments, cast, compare, make, truth  # noqa: E402
from simulator import Gpu, device  # noqa: E402

from kdfuse import SparseTeacher  # noqa: E402

SEEDS = 4


@dataclass(frozen=True)
class Call:
    """name, rows, classes and type of a call, and the GPU that plays."""

    name: str
    n: int
    c: int
    dtype: torch.dtype = torch.bfloat16
    processors: int = 2
    teacher: torch.dtype | None = None  # its type, where that is another
    listed: int = 0  # logits of a top-k teacher

    def catches(self, library: Path) -> str:
        """What is wrong, or ""."""
        case = cast(make(self.name, self.n, self.c), self.dtype, self.teacher)
        lists = {}
        if self.listed:
            at = FULL[self.name]["temperature"]
            top = SparseTeacher.top_k(case.teachers[0], self.listed, temperature=at)
            case.teachers = [top.dense(self.c, at)]
            lists = {"indices": [top.indices], "masses": [top.mass]}
        inputs = list(arguments(self.name, case, **FULL[self.name]))
        if self.listed:
            inputs[1] = [top.values]
        upstream = torch.tensor([1.0, -2.0, 0.5]).double().repeat(self.n)[: self.n]
        for seed in range(SEEDS):
            gpu = Gpu(library, device(processors=self.processors), seed)
            try:
                got = gpu.run(self.name, *inputs, upstream=upstream, **lists)
                types = [x.dtype for x in case.students]
                gradients = [g.to(t) for g, t in zip(got.gradients, types, strict=True)]
                compare(self.name, case, upstream, got.loss, gradients, **FULL[self.name])
                got = gpu.run(self.name, *inputs, reduction="sum", **lists)
                true = truth(self.name, case, **FULL[self.name]).loss.sum()
                assert abs(got.loss.item() - true) < 1e-3 * abs(true), "another sum of the rows"
            except (AssertionError, RuntimeError) as error:
                return str(error).strip().split("\n")[0]
        return ""


WARPS, BLOCKS = Call("kd", 9, 41), Call("kd", 5, 1001)
SHORT = Call("kd", 30, 41, processors=1)  # several rows of a warp
LISTED = Call("kd", 5, 1001, listed=40)
CLUSTERS = Call("kd", 3, 8251, processors=16)
SLTS = Call("slkd", 5, 1001)  # whose sums follow each other
FUSED = Call("slkd", 3, 4203, processors=16)
SCORES = Call("tf_nkd", 9, 41)
FLOATS = Call("kd", 9, 33, torch.float32)
# Several rows of a block, in the general kernels.
MIXED = Call("kd", 9, 1101, torch.float16, processors=1, teacher=torch.float32)


@dataclass(frozen=True)
class Mutation:
    name: str
    file: str  # of csrc/cuda
    text: str
    instead: str
    calls: tuple[Call, ...]


JOIN = "  __syncthreads();\n  (join_warps"
TICKET = "atomicInc(ticket, gridDim.x - 1)"
FENCE = "      __threadfence();\n"

MUTATIONS = [
    Mutation(
        "a team's memory taken again too early",
        "any_rows.h",
        "    of_row(team_, p_, row, span);\n    team_.sync();\n",
        "    of_row(team_, p_, row, span);\n",
        (MIXED,),
    ),
    Mutation("a barrier missing: numbers of warps", "team.h", JOIN, "  (join_warps", (BLOCKS,)),
    Mutation(
        "sets of a block that do not alternate",
        "team.h",
        "    join_block(turn_, of...);\n    turn_ ^= 1;\n",
        "    join_block(turn_, of...);\n",
        (SLTS,),
    ),
    Mutation(
        "sets of a cluster that do not alternate",
        "team.h",
        "    (join_blocks(of), ...);\n    turn_ ^= 1;\n",
        "    (join_blocks(of), ...);\n",
        (FUSED,),
    ),
    Mutation("no cluster barrier at entry", "grid.h", "  team.meet();\n", "", (CLUSTERS,)),
    Mutation(
        "a write to blocks that may not have begun",
        "kernels.h",
        "  run_batch<Rows<Cluster>>(team, p, tickets);\n",
        "  float early[1] = {0};\n  team.sum(early);\n"
        "  run_batch<Rows<Cluster>>(team, p, tickets);\n",
        (CLUSTERS,),
    ),
    Mutation(
        "a cluster left while others still write",
        "kernels.h",
        "  run_batch<Rows<Cluster>>(team, p, tickets);\n",
        "  run_batch<Rows<Cluster>>(team, p, tickets);\n"
        "  *cooperative_groups::cluster_group::map_shared_rank(team.sums(1), 0) = 0;\n",
        (CLUSTERS,),
    ),
    Mutation(
        "no cluster barrier in a join",
        "team.h",
        "    sync();\n    (join_blocks",
        "    (join_blocks",
        (CLUSTERS,),
    ),
    Mutation("a wait dropped", "aligned_row.h", "    wait_for_copies();\n", "", (WARPS,)),
    Mutation(
        "a group of copies not ended", "aligned_row.h", "    commit_copies();\n", "", (WARPS,)
    ),
    Mutation("a row copied over another", "aligned_row.h", "    stage_.turn();\n", "", (SHORT,)),
    Mutation(
        "a block's numbers sent before all are there",
        "team.h",
        "    (put_warp(of, turn_), ...);\n    __syncthreads();\n",
        "    (put_warp(of, turn_), ...);\n",
        (CLUSTERS,),
    ),
    Mutation(
        "a copy past the tensor's end",
        "launch.cu",
        "overlap ? 0 : p.rows - 1);",
        "overlap ? 0 : p.rows);",
        (FLOATS,),
    ),
    Mutation(
        "a mask off by one: before the row",
        "prefetch.h",
        "for (int v = 0; v < span.shift; ++v) drop(0, v);",
        "for (int v = 1; v < span.shift; ++v) drop(0, v);",
        (WARPS,),
    ),
    Mutation(
        "a mask off by one: behind the row",
        "prefetch.h",
        "unread ? 0 : span.classes - first;",
        "unread ? 0 : span.classes - first + 1;",
        (WARPS,),
    ),
    Mutation(
        "an unaligned tail stored whole",
        "one_pass.h",
        "if (at.span.whole(i)) store_chunk<type>(to, at.span.first(i), out);",
        "if (at.span.first(i) >= 0) store_chunk<type>(to, at.span.first(i), out);",
        (WARPS,),
    ),
    Mutation("a stale ticket", "team.h", TICKET, "atomicInc(ticket, gridDim.x)", (WARPS,)),
    Mutation(
        "no fence before the ticket",
        "team.h",
        FENCE + "      last =",
        "      last =",
        (WARPS,),
    ),
    Mutation(
        "no fence behind the ticket",
        "team.h",
        "// ends at 0\n" + FENCE,
        "// ends at 0\n",
        (WARPS,),
    ),
    Mutation(
        "a block's scores that others read too early",
        "grid.h",
        "  team.sync_grid();\n",
        "  if (at == 0) team.sync_grid();\n",
        (SCORES,),
    ),
    Mutation("no barrier of the grid", "grid.h", "  team.sync_grid();\n", "", (SCORES,)),
    Mutation(
        "a batch's numbers read too early",
        "grid.h",
        "team.block_sums()[k] = 0;\n  team.sync_block();\n",
        "team.block_sums()[k] = 0;\n",
        (WARPS,),
    ),
    Mutation(
        "sums of blocks in each other's places",
        "grid.h",
        "p.partial[static_cast<int64_t>(team.block()) * columns + k] = sum;",
        "p.partial[static_cast<int64_t>(team.block()) * (columns - 1) + k] = sum;",
        (WARPS,),
    ),
    Mutation(
        "a barrier that some threads miss",
        "grid.h",
        "  if (!team.is_last(tickets + p.ticket)) return;\n",
        "  if (team.thread() == 1) return;\n  if (!team.is_last(tickets + p.ticket)) return;\n",
        (BLOCKS,),
    ),
    Mutation(
        "a shuffle that leaves lanes out",
        "team.h",
        "for (int step = kLanes / 2; step > 0; step /= 2) {",
        "for (int step = kLanes / 2; step > 1; step /= 2) {",
        (BLOCKS,),
    ),
    Mutation(
        "a list over places that their threads have not filled",
        "listed_row.h",
        "    stage.fill(which, span, next_.fill);\n    Warp::sync();\n",
        "    stage.fill(which, span, next_.fill);\n",
        (LISTED,),
    ),
    Mutation(
        "a list that is read before all of it is there",
        "listed_row.h",
        "    Warp::sync();\n    const int place",
        "    const int place",
        (LISTED,),
    ),
    Mutation(
        "a list in the places of another warp",
        "prefetch.h",
        "    if (static_cast<unsigned>(owner) >= kLanes) return;\n",
        "",
        (LISTED,),
    ),
    Mutation(
        "a row too many",
        "aligned_row.h",
        "    if (row < rows()) {\n      const char* from",
        "    if (row <= rows()) {\n      const char* from",
        (WARPS,),
    ),
    Mutation(
        "static memory forgotten by the launcher",
        "launch.cu",
        "device_of(device).memory - static_cast<int>(facts.sharedSizeBytes)",
        "device_of(device).memory",
        (WARPS,),
    ),
]


def compiled(mutation: Mutation | None, folder: Path, base: Path | None) -> Path:
    csrc = folder / "csrc"
    shutil.copytree(ROOT / "csrc", csrc)
    units = sorted({call.name for call in mutation.calls}) if mutation else simulator.UNITS
    if mutation:
        file = csrc / "cuda" / mutation.file
        text = file.read_text()
        assert text.count(mutation.text) == 1, (
            f"{mutation.name}: its text stands {text.count(mutation.text)} times in {file.name}"
        )
        file.write_text(text.replace(mutation.text, mutation.instead))
        if mutation.file in ("launch.cu", "team.h", "grid.h"):
            units = [*units, "launch"]
    return simulator.build(folder, csrc=csrc, units=units, base=base)


def main() -> None:
    torch.set_num_threads(1)
    chosen = [m for m in MUTATIONS if not sys.argv[1:] or any(w in m.name for w in sys.argv[1:])]
    missed = []
    with tempfile.TemporaryDirectory() as kept:
        base = Path(kept)
        whole = compiled(None, base, None)
        for call in {call for mutation in chosen for call in mutation.calls}:
            assert not (said := call.catches(whole)), f"without a fault: {call}: {said}"
        for mutation in chosen:
            with tempfile.TemporaryDirectory() as folder:
                library = compiled(mutation, Path(folder), base)
                said = next(filter(None, (c.catches(library) for c in mutation.calls)), "")
            print(f"{'caught' if said else 'MISSED'}  {mutation.name}: {said[:150]}", flush=True)
            missed += [mutation.name] if not said else []
    print(f"{len(chosen) - len(missed)} of {len(chosen)} faults were caught")
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
