"""The losses alone, as Hugging Face's `kernels` library loads them: python hub.py [FOLDER]

FOLDER/build has a variant for each kind of machine, a package: kernels/ without what measures it,
the libraries that `make install` built, if they are for such machines, and kdfuse's public names.
It imports nothing but torch, and Triton where that is. The namespaces of its ops are named after
all that is in it, so that any number of packages can be in one process, beside kdfuse.
"""

import base64
import hashlib
import json
import platform
import shutil
import sys
from pathlib import Path
from typing import Any

from kdfuse.kernels import backends

ROOT = Path(__file__).parent
KERNELS = ROOT / "kernels"
CPU, CUDA = KERNELS / "libkdfuse.so", KERNELS / "libkdfuse_cuda.so"
LEFT_OUT = ("bench", "selfcheck.py", "*.so", "__pycache__")
PYTHON_ALONE = ("cpu", "cuda", "rocm")
# The torch of TORCH_TARGET_VERSION in setup.py.
STABLE_ABI = "torch-stable-abi211"
VERSION = 0  # of what may still change


def cuda_backend(archs: list[str], runtime: int) -> tuple[str, dict[str, Any]]:
    """A variant's word for the CUDA of the build, and its metadata. archs: as in "sm_90"."""
    kinds = [arch.split("_") for arch in archs]
    names = [f"{n[:-1]}.{n[-1]}" + ("+PTX" if kind == "compute" else "") for kind, n in kinds]
    return f"cu{runtime // 1000}{runtime % 1000 // 10}", {"type": "cuda", "archs": names}


def contents(folder: Path) -> dict[str, bytes]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def package(build: Path, variant: str, backend: dict[str, Any], libraries: list[Path]) -> None:
    folder = build / variant
    shutil.copytree(KERNELS, folder / "kernels", ignore=shutil.ignore_patterns(*LEFT_OUT))
    for library in libraries:
        shutil.copy(library, folder / "kernels")
    names = (ROOT / "kdfuse/__init__.py").read_text().partition('"""\n\n')[2]
    folder.joinpath("__init__.py").write_text(f'"""Fused distillation losses."""\n\n{names}')

    made = hashlib.sha256(repr(contents(folder)).encode()).hexdigest()[:10]
    own = f"_kdfuse_{backend['type']}_{made}"
    namespace = folder / "kernels/namespace.py"
    namespace.write_text(namespace.read_text().replace('"kdfuse"', f'"{own}"'))

    digests = {
        name: base64.b64encode(hashlib.sha256(data).digest()).decode()
        for name, data in contents(folder).items()
    }
    metadata = {
        "id": own,
        "name": "kdfuse",
        "version": VERSION,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": backend,
        "digest": {"algorithm": "sha256", "files": digests},
    }
    folder.joinpath("metadata.json").write_text(json.dumps(metadata, indent=2))
    print(f"{variant}: {', '.join(x.name for x in libraries) or 'Python alone'}")


def main(out: Path) -> None:
    build = out / "build"
    shutil.rmtree(build, ignore_errors=True)
    for name in PYTHON_ALONE:
        package(build, f"torch-{name}", {"type": name}, [])
    machine = f"{platform.machine()}-{platform.system().lower()}"
    cpu, no_cpu = backends.compiled()
    if cpu is None:
        print(f"no compiled losses: {no_cpu}")
    else:
        package(build, f"{STABLE_ABI}-cpu-{machine}", {"type": "cpu"}, [CPU])
    cuda, no_cuda = backends.compiled_cuda()
    if cuda is None:
        print(f"no CUDA kernels: {no_cuda}")
    else:
        name, backend = cuda_backend(cuda.archs, cuda.runtime)
        package(build, f"{STABLE_ABI}-{name}-{machine}", backend, [CPU, CUDA])


if __name__ == "__main__":
    main(Path(sys.argv[1]) if sys.argv[1:] else ROOT / "dist/hub")
