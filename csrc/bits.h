// A float32 number and its bits, for host and device.
#pragma once
#include <cstdint>
#include <cstring>

#include "row.h"

namespace kdfuse {

KDFUSE_HD float as_float(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
#endif
}

KDFUSE_HD uint32_t as_bits(float x) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(x);
#else
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(x));
  return bits;
#endif
}

}  // namespace kdfuse
