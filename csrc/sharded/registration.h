// The ops for rows in parts, as cpu/ops.cpp registers them with its own.
#pragma once
#include "../core/op_registration.h"

namespace kdfuse {

void define_parts(Registration& schemas);
void implement_parts(Registration& cpu);

}  // namespace kdfuse
