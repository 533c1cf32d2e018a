"""A full decode of every image under a folder, to find bad files before a run does."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .images import EXTENSIONS, UnreadableError, decode


def check_folder(root: Path) -> list[tuple[Path, str]]:
    """Unreadable image files anywhere under root, sorted, each with the reason.

    Every file is decoded whole, on all cores. FileNotFoundError where root is not a folder,
    ValueError where it holds no image.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is not a folder; name the folder of the images")
    paths = sorted(
        os.path.join(folder, name)
        for folder, _, names in os.walk(root, followlinks=True)
        for name in names
        if name.lower().endswith(EXTENSIONS)
    )
    if not paths:
        raise ValueError(f"{root} holds no image ({', '.join(EXTENSIONS)})")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        reasons = list(pool.map(_fault, paths))
    return [(Path(path), why) for path, why in zip(paths, reasons, strict=True) if why is not None]


def _fault(path: str) -> str | None:
    try:
        decode(path)
    except UnreadableError as error:
        return str(error)
    return None
