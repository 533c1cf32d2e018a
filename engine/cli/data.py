"""The verbs kdfuse data digits, data glyphs, data check and data shard."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

app = typer.Typer(help="Write, pack or check images.", no_args_is_help=True)


@app.command()
def digits(root: Annotated[Path, typer.Argument(metavar="DIR", help="folder to write")]) -> None:
    """Write scikit-learn's 1797 handwritten digits as an image folder."""
    from ..data.sources.digits import write_digits

    write_digits(root)
    print(root)


@app.command()
def glyphs(
    root: Annotated[Path, typer.Argument(metavar="DIR", help="folder to write into")],
    images: Annotated[
        int | None, typer.Option(min=1, help="training images; default: 50000")
    ] = None,
) -> None:
    """Draw characters of 100 classes, 32 x 32, from matplotlib's fonts: one file, in a minute."""
    from ..data.sources.glyphs import write_glyphs

    print(write_glyphs(root, images))


@app.command()
def check(
    root: Annotated[Path, typer.Argument(metavar="DIR", help="folder of images or tars")],
    out: Annotated[Path | None, typer.Option(help="write the list of all images here")] = None,
    against: Annotated[
        Path | None, typer.Option(help="such a list; name what differs from it")
    ] = None,
) -> None:
    """Decode every image below a folder, in tars too, and name those that cannot be read."""
    from ..data.check import check_folder
    from ..data.listing import differences, read_listing, write_listing
    from .bar import bar

    if out is not None and not out.parent.is_dir():
        raise FileNotFoundError(f"--out {out}: {out.parent} is not a folder; make it first")
    if out is not None and out.is_dir():
        raise ValueError(f"--out {out}: is a folder; name a file")
    if against is not None and not against.is_file():
        raise ValueError(f"--against {against}: there is no such file; --out FILE writes one")
    before = None if against is None else read_listing(against)
    with bar() as told:
        report = check_folder(root, told)
    for path, why in report.faults:
        print(f"{path}: {why}")
    for path, why in report.warnings:
        print(f"{path}: warning: {why}")
    differ = [] if before is None else differences(before, report.images)
    for name, what in differ:
        print(f"{root / name}: {what}")
    for line in report.summary():
        print(line)
    if out is not None:
        write_listing(report.images, out)
    wrong = []
    if report.faults:
        count = len(report.faults)
        wrong.append(f"{count} unreadable images or damaged tars under {root}; replace them")
    if differ:
        wrong.append(f"{len(differ)} images under {root} are not as in {against}")
    if wrong:
        raise ValueError("\n".join(wrong))
    print(f"{root}: every image can be read")


@app.command()
def shard(
    source: Annotated[Path, typer.Argument(help="folder: SOURCE/{train,val}/<class>/*.jpg")],
    target: Annotated[Path, typer.Argument(help="folder to make: TARGET/{train,val}/*.tar")],
    split: Annotated[
        Literal["train", "val"] | None, typer.Option(help="only this one; default: both")
    ] = None,
    shards: Annotated[int | None, typer.Option(min=1, help="tars of each split")] = None,
    shard_mb: Annotated[
        float | None, typer.Option(min=0.001, help="MB of the source in a tar; default: 256")
    ] = None,
    short_side: Annotated[
        int | None,
        typer.Option(min=1, help="make images whose short side is larger so small, pixels"),
    ] = None,
    quality: Annotated[
        int | None, typer.Option(min=1, max=100, help="of JPEGs made smaller; default: 90")
    ] = None,
    seed: Annotated[int, typer.Option(help="of the shuffle")] = 0,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="leave out images that cannot be read")
    ] = False,
) -> None:
    """Pack an image folder into shuffled tars, which data.source=tar reads."""
    from ..data.shard import Packing, shard_folder
    from ..data.sources.splits import SPLITS
    from .bar import bar

    packing = Packing(shards, shard_mb, short_side, quality, seed, skip_bad)
    with bar() as told:
        records = shard_folder(source, target, packing, (split,) if split else SPLITS, told)
    for record in records:
        place = target / record["plan"]["split"]
        for name, why in record["skipped"].items():
            print(f"{source / record['plan']['split'] / name}: left out: {why}")
        smaller = f", {record['resized']} made smaller" if record["plan"]["short_side"] else ""
        print(f"{place}: {record['images']} images in {len(record['shards'])} tars{smaller}")
