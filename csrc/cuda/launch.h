// The CUDA kernels as the op sees them. No framework types, no CUDA headers.
#pragma once
#include <string>

#include "kernel_table.h"

namespace kdfuse {

// Runs one op on a stream of a device, in one launch. Nothing waits for the device. wide: compute in double. Returns ""
// or what went wrong.
std::string launch(Loss loss, Task task, bool wide, int device, void* stream);

// Multiplies gradients by one number for all rows, or one for each; a factor that is 1 costs no traffic. halves: where
// the products of float32 gradients come to stand in float16; or null: in place.
std::string launch_scale(const Output* gradients, void* const* halves, int count, int64_t rows, int64_t classes,
                         const Numbers& factor, int device, void* stream);

// The newest CUDA that the driver supports, as 13000; 0 without a driver.
int driver_version();

}  // namespace kdfuse
