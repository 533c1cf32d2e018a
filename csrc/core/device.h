// Every PTX instruction of the kernels, each beside its host twin: the same function of the same bits. Logits come
// in words: a float32 number, or two of 16 bits.
#pragma once
#include <cuda_pipeline_primitives.h>

#include <cstdint>
#include <cstring>

#include "stats.h"
#include "types.h"

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

// 2^x: exactly 0 at -inf, NaN stays NaN.
KDFUSE_HD float power(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return std::exp2(x);
#endif
}

KDFUSE_HD float from_bf16(uint32_t bits) { return as_float(bits << 16); }

KDFUSE_HD float from_f16(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(static_cast<uint16_t>(bits)));
  return x;
#else
  const uint32_t sign = (bits & 0x8000u) << 16, body = (bits & 0x7fffu) << 13;
  // The exponent's bias is moved by a multiplication, which turns subnormals right as well.
  const uint32_t finite = as_bits(as_float(body) * 5.192296858534828e33f);
  return as_float(sign | ((bits & 0x7c00u) == 0x7c00u ? body | 0x7f800000u : finite));
#endif
}

// Two bfloat16 numbers, rounded to nearest even; NaN stays NaN.
KDFUSE_HD uint32_t to_bf16(float low, float high) {
#if defined(__CUDA_ARCH__)
  uint32_t both;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
#else
  const auto narrow = [](float x) {
    const uint32_t w = as_bits(x);
    return x != x ? 0x7fffu : (w + 0x7fffu + ((w >> 16) & 1u)) >> 16;
  };
  return narrow(high) << 16 | narrow(low);
#endif
}

// Two float16 numbers, in the same way; beyond their range they are infinite.
KDFUSE_HD uint32_t to_f16(float low, float high) {
#if defined(__CUDA_ARCH__)
  uint32_t both;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
#else
  const auto narrow = [](float x) {
    const uint32_t w = as_bits(x), sign = w >> 16 & 0x8000u, body = w & 0x7fffffffu;
    if (x != x) return 0x7fffu;
    if (body >= 0x477ff000u) return sign | 0x7c00u;  // 65520
    // Below 2^-14 the sum with 1/2 is rounded where the subnormals' last bit stands.
    if (body < 0x38800000u) return sign | (as_bits(as_float(body) + 0.5f) - as_bits(0.5f));
    return sign | (body - 0x38000000u + 0xfffu + (body >> 13 & 1u)) >> 13;
  };
  return narrow(high) << 16 | narrow(low);
#endif
}

// A number as it comes, from the lower half of a word where it has 16 bits.
template <DType type>
KDFUSE_HD float unpack_one(uint32_t bits) {
  if constexpr (type == DType::f32) return as_float(bits);
  return type == DType::bf16 ? from_bf16(bits) : from_f16(bits & 0xffffu);
}

KDFUSE_HD float unpack_one(DType type, uint32_t bits) {
  return type == DType::f32    ? unpack_one<DType::f32>(bits)
         : type == DType::bf16 ? unpack_one<DType::bf16>(bits)
                               : unpack_one<DType::f16>(bits);
}

// The larger of two words' numbers, one by one; a number beside NaN.
template <DType type>
KDFUSE_HD uint32_t larger(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
  uint32_t c;
  if constexpr (type == DType::f32) {
    asm("max.f32 %0, %1, %2;" : "=f"(reinterpret_cast<float&>(c)) : "f"(as_float(a)), "f"(as_float(b)));
  } else if constexpr (type == DType::bf16) {
    asm("max.bf16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
  } else {
    asm("max.f16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
  }
  return c;
#else
  // Of two NaN the canonical one; +0 is larger than -0.
  const auto of = [](uint32_t x, uint32_t y) {
    const float fx = unpack_one<type>(x), fy = unpack_one<type>(y);
    if (fx != fx && fy != fy) return type == DType::f32 ? 0x7fffffffu : 0x7fffu;
    if (fx == fy) return x & y;
    return fx != fx || fy > fx ? y : x;
  };
  if constexpr (type == DType::f32) return of(a, b);
  return of(a >> 16, b >> 16) << 16 | of(a & 0xffffu, b & 0xffffu);
#endif
}

// 1 for each of a word's two numbers that is not at most the threshold's, in their own type.
template <DType type>
KDFUSE_HD uint32_t above(uint32_t two, uint32_t threshold) {
  static_assert(type != DType::f32, "two numbers in a word");
#if defined(__CUDA_ARCH__)
  uint32_t ones;
  if constexpr (type == DType::bf16) {
    asm("set.gtu.bf16x2.bf16x2 %0, %1, %2;" : "=r"(ones) : "r"(two), "r"(threshold));
  } else {
    asm("set.gtu.f16x2.f16x2 %0, %1, %2;" : "=r"(ones) : "r"(two), "r"(threshold));
  }
  return ones;
#else
  constexpr uint32_t one = type == DType::bf16 ? 0x3f80u : 0x3c00u;
  const bool low = unpack_one<type>(two) <= unpack_one<type>(threshold);
  const bool high = unpack_one<type>(two >> 16) <= unpack_one<type>(threshold >> 16);
  return (low ? 0 : one) | (high ? 0 : one) << 16;
#endif
}

// Sums of counts: whole numbers up to 256, which both types hold.
template <DType type>
KDFUSE_HD uint32_t add_counts(uint32_t a, uint32_t b) {
  static_assert(type != DType::f32, "two numbers in a word");
#if defined(__CUDA_ARCH__)
  uint32_t c;
  if constexpr (type == DType::bf16) {
    asm("add.rn.bf16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
  } else {
    asm("add.rn.f16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
  }
  return c;
#else
  const auto sum = [](uint32_t x, uint32_t y) {
    const float s = unpack_one<type>(x) + unpack_one<type>(y);
    if (type == DType::bf16) return as_bits(s) >> 16;
    return s == 0 ? 0u : ((as_bits(s) >> 23) - 112) << 10 | (as_bits(s) >> 13 & 0x3ffu);
  };
  return sum(a & 0xffffu, b & 0xffffu) | sum(a >> 16, b >> 16) << 16;
#endif
}

// The same address or distance, which the compiler is to hold in a register: it would make it again for every use, and
// takes 16-byte stores apart where it knows how a row's place and its shift hang together.
template <class T>
KDFUSE_DEVICE T kept(T at) {
#if defined(__CUDA_ARCH__)
  asm("" : "+l"(at));
#endif
  return at;
}

// 16 bytes from global to shared memory, on the way until wait_for_copies().
KDFUSE_DEVICE void copy_async(void* to, const void* from) {
#if defined(__CUDA_ARCH__)
  const auto at = static_cast<unsigned>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(at), "l"(from) : "memory");
#else
  __pipeline_memcpy_async(to, from, 16);
#endif
}

// Ends a group of this thread's copies.
KDFUSE_DEVICE void commit_copies() { __pipeline_commit(); }

// For all of this thread's groups but the last one.
KDFUSE_DEVICE void wait_for_copies() { __pipeline_wait_prior(1); }

}  // namespace kdfuse
