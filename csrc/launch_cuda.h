// The CUDA kernels as the op sees them. No framework types, no CUDA headers.
#pragma once
#include "task.h"

namespace kdfuse {

enum class Loss { kd, dkd, nkd, tf_nkd, uskd, slkd };

// The longest rows that USKD sorts in a block's memory; more depends on the device.
constexpr int kMaxSorted = 1 << 14;

// Runs one op on the stream of a device: the rows' losses and gradients, then the totals. Nothing
// waits for the device. wide: compute in double. Returns "" or what went wrong.
const char* launch(Loss loss, Task task, const Totals& totals, bool wide, int device, void* stream);

// The architectures that the kernels were compiled for, as in "80,90,100".
const char* compiled_archs();

}  // namespace kdfuse
