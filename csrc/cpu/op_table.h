// The ops of each instruction-set level (KDFUSE_LEVEL): kd_base(), kd_avx2(), ...; each is compiled by itself.
#pragma once
#include "../core/types.h"

#define KDFUSE_JOIN_(a, b) a##_##b
#define KDFUSE_JOIN(a, b) KDFUSE_JOIN_(a, b)

namespace kdfuse {

#define KDFUSE_OTHER(name) \
  OpOnCpu name##_base();   \
  OpOnCpu name##_avx2();   \
  OpOnCpu name##_avx512();
#include "../losses/all.def"

}  // namespace kdfuse
