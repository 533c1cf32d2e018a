"""Facts of the compiled part; loading it registers torch.ops.kdfuse."""

compiler: str
cuda_archs: list[str]  # of the CUDA kernels, as in "sm_90"; empty where they were not built
cuda_runtime: int  # that the kernels were built with, as 13000; 0 where they were not
cuda_driver: int  # the newest that the driver supports, as 13000; 0 without one

def levels() -> list[str]: ...
def level() -> str: ...
def set_level(name: str) -> None: ...
