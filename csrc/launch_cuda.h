// The CUDA kernels as the op sees them. No framework types, no CUDA headers.
#pragma once
#include <string>

#include "task.h"

namespace kdfuse {

enum class Loss { kd, dkd, nkd, tf_nkd, uskd, slkd };

// Runs one op on a stream of a device: the rows' losses and gradients, then the totals. Nothing waits
// for the device. wide: compute in double. Returns "" or what went wrong.
std::string launch(Loss loss, Task task, const Totals& totals, bool wide, int device, void* stream);

}  // namespace kdfuse
