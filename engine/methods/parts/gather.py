"""The rows of all processes, for losses that compare the images of a batch with each other."""

import torch
import torch.distributed as dist
from torch import Tensor


def gathered(x: Tensor) -> Tensor:
    """`x` (n, ...) of every process, one behind the other in order of rank: (world * n, ...).

    Every process must have n rows. The gradient reaches the own rows alone, times the number of
    processes: when each takes the same loss of all rows, the mean of the processes' gradients,
    which is what DistributedDataParallel takes, is the gradient of that one loss. Without a process
    group, `x` itself.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return x
    world, rank, n = dist.get_world_size(), dist.get_rank(), x.shape[0]
    own = x.detach().contiguous()
    rows = own.new_empty((world * n, *x.shape[1:]))
    dist.all_gather_into_tensor(rows, own)
    if not x.requires_grad:
        return rows
    scaled = own + world * (x - own)  # the value of x to the last bit, `world` times its gradient
    return torch.cat((rows[: rank * n], scaled, rows[(rank + 1) * n :]))
