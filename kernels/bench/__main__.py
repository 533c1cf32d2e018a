"""python -m kdfuse.kernels.bench: the microbenchmark, where only torch is installed."""

from .run import main

main()
