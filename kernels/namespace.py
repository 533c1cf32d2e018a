"""The namespaces of torch.ops that this copy of the losses has; one of `make hub` has others."""

COMPILED = "kdfuse"  # of the libraries, for CPU and CUDA
TRITON = f"{COMPILED}_triton"
