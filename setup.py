"""Builds the losses in C++ as two libraries beside kernels/library.py, without a symbol of Python:
libkdfuse.so, each file of row passes once for each SIMD level, and libkdfuse_cuda.so.

Without a C++ compiler or without torch the package installs all the same and runs on the reference.
Environment:
    KDFUSE_CUDA=0|1|auto     libkdfuse_cuda.so: never; or fail; or where nvcc and a CUDA build of
                             torch are there, else the reason is printed
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
from setuptools.command.bdist_wheel import bdist_wheel
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
    # Python's own flags ask for it: it would be most of the library
    "-g0",
    # GCC's AVX-512 headers
    "-Wno-maybe-uninitialized",
]
# The ops of csrc/losses/all.def that one source is compiled for, with their facts.
TAUGHT = re.findall(
    r"^KDFUSE_TAUGHT\((\w+), (\w+)\)", (ROOT / "csrc/losses/all.def").read_text(), re.M
)
# Those with the others: name, source and what is defined.
UNITS = [("others", "others", [])]
UNITS += [(op, "taught", [("KDFUSE_OP", op), ("KDFUSE_FACTS", facts)]) for op, facts in TAUGHT]
LEVELS = {"base": []}
if platform.machine() in ("x86_64", "AMD64"):
    LEVELS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    LEVELS["avx512"] = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"]
# Each is compiled for every unit: name, folder of its sources, what is defined, flags.
FACTS = ("facts", "csrc/losses", [], [])
PASSES = [(level, "csrc/cpu", [("KDFUSE_LEVEL", level)], flags) for level, flags in LEVELS.items()]

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
    """The compilation of the CUDA kernels, under way beside that of libkdfuse.so."""

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
        """Waits for the kernels and adds them to the library."""
        failed = [s for s in (r.result() for r in self.running) if s]
        if failed:
            raise NoCuda(f"nvcc failed with exit status {failed[0]}, see above")
        ext.extra_objects += self.objects
        ext.define_macros.append(("KDFUSE_CUDA_ARCHS", f'"{self.names}"'))
        ext.define_macros.append(("KDFUSE_CUDA_RUNTIME", str(self.version)))
        ext.library_dirs.append(self.runtime)


def _libraries() -> list[Extension]:
    # Found, not imported: setup.py runs several times for a wheel, and torch takes seconds.
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        if _required():
            raise ImportError("building the losses needs torch")
        print("kdfuse: no compiled losses: no module torch", file=sys.stderr)
        return []
    torch = Path(found.origin).parent
    sources = sorted((ROOT / "csrc").rglob("*.[hcd]*"))
    depends = ["setup.py", *(str(p.relative_to(ROOT)) for p in sources)]

    def library(name: str, sources: list[str], libraries: list[str]) -> Extension:
        return Extension(
            f"kdfuse.kernels.{name}",
            sources,
            depends=depends,
            include_dirs=[str(torch / "include")],
            library_dirs=[str(torch / "lib")],
            libraries=libraries,
            define_macros=[("TORCH_TARGET_VERSION", "0x020b000000000000")],
            extra_compile_args=FLAGS,
            language="c++",
        )

    # With the CUDA runtime inside, the library asks for a driver and for no toolkit.
    runtime = ["cudart_static", "dl", "rt", "pthread"]
    return [
        library("libkdfuse", ["csrc/cpu/ops.cpp", "csrc/sharded/ops.cpp"], ["torch_cpu"]),
        library("libkdfuse_cuda", ["csrc/cuda/ops.cpp"], ["torch_cpu", "torch_cuda", *runtime]),
    ]


class BuildLibraries(build_ext):
    """Builds libkdfuse and, where that can be, libkdfuse_cuda; what fails is left out."""

    def get_ext_filename(self, fullname: str) -> str:
        """Without the tag of a Python."""
        return f"{os.path.join(*fullname.split('.'))}.so"

    def build_extensions(self) -> None:
        cpu, cuda = self.extensions
        kernels = self.start_cuda()
        try:
            self.build(cpu, FACTS, *PASSES)
        except FAILURES as error:
            if _required():
                raise
            print(f"kdfuse: no compiled losses: {error}", file=sys.stderr)
            self.leave_out(cpu)
        if kernels is None or cpu.optional or not self.build_cuda(cuda, kernels):
            self.leave_out(cuda)

    def build_cuda(self, ext: Extension, kernels: Cuda) -> bool:
        # One that is newer than all sources may be of other architectures.
        marker = Path(self.build_temp) / "archs"
        if not (marker.is_file() and marker.read_text() == kernels.names):
            self.built(ext).unlink(missing_ok=True)
        try:
            kernels.join(ext)
            self.build(ext, FACTS)
        except (NoCuda, *FAILURES) as error:
            self.without_cuda(str(error), missing=False)
            return False
        marker.write_text(kernels.names)
        return True

    def build(self, ext: Extension, *kinds: tuple[str, str, list, list[str]]) -> None:
        """The library with each of these kinds of sources."""
        if not self.force and not newer_group([*ext.sources, *ext.depends], str(self.built(ext))):
            return

        def compiled(kind: tuple, name: str, source: str, defined: list) -> list[str]:
            folder, sources, of_kind, flags = kind
            return self.compiler.compile(
                [f"{sources}/{source}.cpp"],
                output_dir=os.path.join(self.build_temp, folder, name),
                macros=[*of_kind, *defined],
                extra_postargs=FLAGS + flags,
                depends=ext.depends,
            )

        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            running = [pool.submit(compiled, kind, *unit) for kind in kinds for unit in UNITS]
            for made in running:
                ext.extra_objects += made.result()
        self.build_extension(ext)

    def built(self, ext: Extension) -> Path:
        return Path(self.get_ext_fullpath(ext.name))

    def leave_out(self, ext: Extension) -> None:
        """One of an earlier build would be of other sources."""
        ext.optional = True
        self.built(ext).unlink(missing_ok=True)

    def copy_extensions_to_source(self) -> None:
        for ext in self.extensions:
            if not self.built(ext).exists():
                (ROOT / self.get_ext_filename(ext.name)).unlink(missing_ok=True)
        super().copy_extensions_to_source()

    def start_cuda(self) -> Cuda | None:
        wish = _cuda_wish()
        if wish == "0":
            return None
        try:
            return Cuda(self.build_temp)
        except NoCuda as error:
            self.without_cuda(str(error), missing=True)
            return None

    def without_cuda(self, why: str, *, missing: bool) -> None:
        """missing: something that the machine lacks, which only KDFUSE_CUDA=1 minds."""
        if _cuda_wish() == "1" or (_required() and not missing):
            raise SystemExit(f"kdfuse: the CUDA kernels cannot be built: {why}")
        print(f"kdfuse: no CUDA kernels: {why}", file=sys.stderr)


class Wheel(bdist_wheel):
    """Of the libraries, which serve every Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


def _packages() -> list[str]:
    """Every folder of the house; recipes are files of one of them."""
    folders = [p.parent for part in ("kernels", "engine") for p in (ROOT / part).rglob("*.py")]
    names = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    return ["kdfuse", "kdfuse.recipes", *(f"kdfuse.{name}" for name in sorted(names))]


setup(
    packages=_packages(),
    # The links make kdfuse/ whole, so that an editable install is one line on sys.path.
    package_data={
        "kdfuse.engine.report": ["templates/*"],
        "kdfuse.recipes": ["**/*.yaml"],
    },
    ext_modules=_libraries(),
    cmdclass={"build_ext": BuildLibraries, "bdist_wheel": Wheel},
)
