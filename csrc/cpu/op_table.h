// The ops of each instruction-set level (KDFUSE_LEVEL): kd_base(), kd_avx2(), ...; each is compiled by itself.
#pragma once
#include "../core/paste.h"
#include "../core/types.h"

namespace kdfuse {

#define KDFUSE_OTHER(name) \
  OpOnCpu name##_base();   \
  OpOnCpu name##_avx2();   \
  OpOnCpu name##_avx512();
#include "../losses/all.def"

}  // namespace kdfuse
