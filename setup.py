"""Builds kdfuse.kernels._C: the losses in C++, each file of row passes once for each SIMD level.

Without a C++ compiler or without torch the package installs all the same and runs on the reference.
Environment:
    KDFUSE_CUDA=0|1|auto     the CUDA part: never; or fail; or where nvcc and a CUDA build of torch
                             are there, else the reason is printed and the CPU part stands alone
    KDFUSE_CUDA_ARCHS        "80,90,100" (the default) or "native"; PTX of the last is added
    KDFUSE_REQUIRE_BUILD=1   any failure is fatal
"""

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CCompilerError, CompileError, ExecError, LinkError, PlatformError
from setuptools.modified import newer_group

ROOT = Path(__file__).parent
FLAGS = [
    "-std=c++17",
    "-O3",
    "-Wall",
    "-Wextra",
    "-fvisibility=hidden",
    # student == teacher must give exactly 0: a product may not be rounded on one side only
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    # GCC's AVX-512 headers
    "-Wno-maybe-uninitialized",
]
# The ops of csrc/losses/all.def that one source is compiled for, with their facts.
TAUGHT = re.findall(
    r"^KDFUSE_TAUGHT\((\w+), (\w+)\)", (ROOT / "csrc/losses/all.def").read_text(), re.M
)
LEVELS = {"base": []}
if platform.machine() in ("x86_64", "AMD64"):
    LEVELS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    LEVELS["avx512"] = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"]


NVCC_FLAGS = [
    "-std=c++17",
    "-O3",
    # student == teacher must give exactly 0, as above
    "-fmad=false",
    # 2 ulp instead of calls, which would spill
    "-prec-div=false",
    "-Xfatbin=-compress-all",
    # the device's loop pragmas are none of the host compiler's
    "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra,-Wno-unknown-pragmas",
]
FAILURES = (CCompilerError, CompileError, ExecError, LinkError, PlatformError)


class NoCuda(Exception):
    """Why the CUDA part cannot be built."""


def _required() -> bool:
    return os.environ.get("KDFUSE_REQUIRE_BUILD") == "1"


def _cuda_wish() -> str:
    wish = os.environ.get("KDFUSE_CUDA", "auto")
    if wish not in ("0", "1", "auto"):
        raise SystemExit(f"KDFUSE_CUDA={wish!r} is unknown; choose 0, 1 or auto")
    return wish


def _archs() -> list[str]:
    """Compute capabilities without their point, lowest first: ["80", "90", "100"]."""
    text = os.environ.get("KDFUSE_CUDA_ARCHS", "80,90,100")
    if text == "native":
        import torch

        if not torch.cuda.is_available():
            raise NoCuda("KDFUSE_CUDA_ARCHS=native, but torch sees no CUDA device")
        return ["{}{}".format(*torch.cuda.get_device_capability())]
    archs = re.split(r"[,; ]+", text.strip())
    if not all(re.fullmatch(r"\d{2,3}", arch) and int(arch) >= 80 for arch in archs):
        raise SystemExit(
            f"KDFUSE_CUDA_ARCHS={text!r}: give compute capabilities from 80 on as in '80,90', or "
            "'native'"
        )
    return sorted(archs, key=int)


def _nvcc() -> str:
    for home in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(home):
            path = Path(os.environ[home]) / "bin" / "nvcc"
            if not path.is_file():
                raise NoCuda(f"{home}={os.environ[home]} holds no bin/nvcc")
            return str(path)
    found = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if not found:
        raise NoCuda("nvcc is neither under CUDA_HOME nor on PATH; install the CUDA toolkit")
    return found


def _release(nvcc: str) -> tuple[int, int]:
    """Major and minor version of nvcc's CUDA."""
    told = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"release (\d+)\.(\d+)", told)
    if not found:
        raise NoCuda(f"{nvcc} --version names no release")
    return int(found[1]), int(found[2])


def _runtime_folder(nvcc: str) -> str:
    """Where nvcc has the static CUDA runtime."""
    command = [nvcc, "--dryrun", "-x", "cu", os.devnull, "-o", os.devnull]
    told = subprocess.run(command, capture_output=True, text=True, check=False).stderr
    folders = re.findall(r'"-L([^"]+)"', told)
    for top in re.findall(r"^#\$ TOP=(.+)$", told, re.MULTILINE):
        folders += [f"{top}/lib64", f"{top}/lib"]
    for folder in folders:
        if (Path(folder) / "libcudart_static.a").is_file():
            return folder
    raise NoCuda(f"libcudart_static.a is not beside {nvcc}")


class Cuda:
    """The compilation of the CUDA kernels, under way beside that of the CPU part."""

    def __init__(self, folder: str) -> None:
        import torch

        if not torch.version.cuda:
            raise NoCuda(f"torch {torch.__version__} is built without CUDA")
        archs, self.nvcc = _archs(), _nvcc()
        release = _release(self.nvcc)
        if release[0] != int(torch.version.cuda.split(".")[0]):
            # The runtime to be linked would ask for a newer driver than torch's does, or an older.
            raise NoCuda(
                f"{self.nvcc} is of CUDA {release[0]}.{release[1]} and torch of CUDA "
                f"{torch.version.cuda}; point CUDA_HOME to a toolkit of torch's major version"
            )
        self.version = 1000 * release[0] + 10 * release[1]
        self.runtime = _runtime_folder(self.nvcc)
        self.names = " ".join([*(f"sm_{arch}" for arch in archs), f"compute_{archs[-1]}"])
        # Each from its own PTX: clusters and packed comparisons are not in that of 80.
        self.gencodes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs[:-1]]
        last = archs[-1]
        self.gencodes += [f"-gencode=arch=compute_{last},code=[sm_{last},compute_{last}]"]
        target = Path(folder) / "cuda" / "-".join(archs)
        target.mkdir(parents=True, exist_ok=True)
        # What the kernels do not include would only have them built again.
        used = [
            str(p.relative_to(ROOT))
            for folder in ("core", "cuda", "losses")
            for p in sorted((ROOT / "csrc" / folder).glob("*.[hd]*"))
            if not p.match("op_*.h")
        ]
        # The longest first, so that they end together.
        units = []
        for op, facts in TAUGHT:
            defined = [f"-DKDFUSE_OP={op}", f"-DKDFUSE_FACTS={facts}"]
            units.append((op, "csrc/cuda/taught.cu", defined))
        names = sorted(p.stem for p in (ROOT / "csrc/cuda").glob("*.cu") if p.stem != "taught")
        units += [(name, f"csrc/cuda/{name}.cu", []) for name in names]
        self.objects, self.stale = [], []
        for name, source, defined in units:
            made = str(target / f"{name}.o")
            self.objects.append(made)
            if newer_group([source, "setup.py", *used], made):
                self.stale.append((source, made, defined))
        self.pool = ThreadPoolExecutor(os.cpu_count() or 1)
        self.running = [self.pool.submit(self.compile, *unit) for unit in self.stale]

    def compile(self, source: str, made: str, defined: list[str]) -> int:
        command = [self.nvcc, "-c", source, "-o", made, *defined, *NVCC_FLAGS, *self.gencodes]
        print(" ".join(command), flush=True)
        status = subprocess.run(command, check=False).returncode
        if status:
            Path(made).unlink(missing_ok=True)
        return status

    def join(self, ext: Extension) -> None:
        """Waits for the kernels and adds them to the extension."""
        failed = [s for s in (r.result() for r in self.running) if s]
        if failed:
            raise NoCuda(f"nvcc failed with exit status {failed[0]}, see above")
        ext.sources.append("csrc/cuda/ops.cpp")
        ext.extra_objects += self.objects
        ext.define_macros.append(("KDFUSE_CUDA_ARCHS", f'"{self.names}"'))
        ext.define_macros.append(("KDFUSE_CUDA_RUNTIME", str(self.version)))
        ext.library_dirs.append(self.runtime)
        ext.libraries += ["torch_cuda", "cudart_static", "dl", "rt", "pthread"]


def _extension() -> Extension | None:
    # Found, not imported: setup.py runs several times for a wheel, and torch takes seconds.
    found = {name: importlib.util.find_spec(name) for name in ("torch", "pybind11")}
    absent = [name for name, spec in found.items() if spec is None or spec.origin is None]
    if absent:
        if _required():
            raise ImportError(f"building the losses needs {' and '.join(absent)}")
        print(f"kdfuse: no compiled losses: no module {' and '.join(absent)}", file=sys.stderr)
        return None
    import pybind11

    torch_root = Path(found["torch"].origin).parent
    return Extension(
        "kdfuse.kernels._C",
        ["csrc/cpu/ops.cpp", "csrc/sharded/ops.cpp"],
        depends=[str(p.relative_to(ROOT)) for p in sorted((ROOT / "csrc").rglob("*.[hcd]*"))],
        include_dirs=[str(torch_root / "include"), pybind11.get_include()],
        library_dirs=[str(torch_root / "lib")],
        libraries=["torch_cpu"],
        define_macros=[("TORCH_TARGET_VERSION", "0x020b000000000000")],
        extra_compile_args=FLAGS,
        language="c++",
    )


class BuildLevels(build_ext):
    """Adds the row passes of every SIMD level and of CUDA; a failed part is left out."""

    def build_extension(self, ext: Extension) -> None:
        cuda = self.start_cuda()
        # Sources that did not change may have been built with other parts.
        marker, parts = Path(self.build_temp) / "parts", cuda.names if cuda else "cpu"
        if not (marker.is_file() and marker.read_text() == parts):
            self.force = True
        try:
            units = [("others", "csrc/cpu/others.cpp", [])]
            for op, facts in TAUGHT:
                defined = [("KDFUSE_OP", op), ("KDFUSE_FACTS", facts)]
                units.append((op, "csrc/cpu/taught.cpp", defined))

            def compiled(level: str, name: str, source: str, defined: list) -> list[str]:
                return self.compiler.compile(
                    [source],
                    output_dir=os.path.join(self.build_temp, level, name),
                    macros=[("KDFUSE_LEVEL", level), *defined],
                    extra_postargs=FLAGS + LEVELS[level],
                    depends=ext.depends,
                )

            with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
                running = [
                    pool.submit(compiled, level, *unit) for level in LEVELS for unit in units
                ]
                for made in running:
                    ext.extra_objects += made.result()
            if not (cuda and self.build_with(cuda, ext)):
                super().build_extension(ext)
            marker.write_text(parts)
        except FAILURES as error:
            if _required():
                raise
            print(f"kdfuse: no compiled losses: {error}", file=sys.stderr)
            ext.extra_objects.clear()
            ext.optional = True
            shutil.rmtree(self.build_temp, ignore_errors=True)

    def start_cuda(self) -> Cuda | None:
        wish = _cuda_wish()
        if wish == "0":
            return None
        try:
            return Cuda(self.build_temp)
        except NoCuda as error:
            self.without_cuda(str(error), missing=True)
            return None

    def build_with(self, cuda: Cuda, ext: Extension) -> bool:
        """Builds the extension with its CUDA part; False, and as it was, where that fails."""
        kept = {k: list(v) for k, v in vars(ext).items() if isinstance(v, list)}
        try:
            cuda.join(ext)
            super().build_extension(ext)
            return True
        except (NoCuda, *FAILURES) as error:
            vars(ext).update(kept)
            self.without_cuda(str(error), missing=False)
            return False

    def without_cuda(self, why: str, *, missing: bool) -> None:
        """missing: something that the machine lacks, which only KDFUSE_CUDA=1 minds."""
        if _cuda_wish() == "1" or (_required() and not missing):
            raise SystemExit(f"kdfuse: the CUDA part cannot be built: {why}")
        print(f"kdfuse: no CUDA kernels: {why}", file=sys.stderr)


KERNELS = ["", ".bench", ".sharded", ".triton"]
ENGINE = [
    "",
    ".bench",
    ".bench.data",
    ".bench.step",
    ".cli",
    ".data",
    ".data.loaders",
    ".data.sources",
    ".detection",
    ".methods",
    ".methods.parts",
    ".models",
    ".recipe",
    ".report",
    ".run",
    ".training",
]
extension = _extension()
setup(
    packages=[
        "kdfuse",
        *(f"kdfuse.kernels{part}" for part in KERNELS),
        *(f"kdfuse.engine{part}" for part in ENGINE),
        "kdfuse.recipes",
    ],
    # The links make kdfuse/ whole, so that an editable install is one line on sys.path.
    package_data={
        "kdfuse.kernels": ["*.pyi"],
        "kdfuse.engine.report": ["templates/*"],
        "kdfuse.recipes": ["**/*.yaml"],
    },
    ext_modules=[extension] if extension else [],
    cmdclass={"build_ext": BuildLevels},
)
