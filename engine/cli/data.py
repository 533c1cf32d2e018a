"""The verbs kdfuse data digits, data glyphs and data check."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Write or check images.", no_args_is_help=True)


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
) -> None:
    """Decode every image below a folder, in tars too, and name those that cannot be read."""
    from ..data.check import check_folder

    faults = check_folder(root)
    for path, why in faults:
        print(f"{path}: {why}")
    if faults:
        raise ValueError(f"{len(faults)} unreadable images under {root}; replace or remove them")
    print(f"{root}: every image can be read")
