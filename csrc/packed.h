// Eight classes of a row as they come from memory.
#pragma once
#include "chunk.h"

namespace kdfuse {

template <DType type>
struct Packed {
  static constexpr int kUnits = type == DType::f32 ? 2 : 1;  // of 16 bytes
  uint32_t w[4 * kUnits];
};

// All classes at -inf.
template <DType type>
KDFUSE_HD Packed<type> nothing() {
  constexpr uint32_t infinite = type == DType::f32 ? 0xff800000u : type == DType::bf16 ? 0xff80ff80u : 0xfc00fc00u;
  Packed<type> p;
#pragma unroll
  for (uint32_t& w : p.w) w = infinite;
  return p;
}

template <DType type>
KDFUSE_HD float unpack(const Packed<type>& p, int v) {
  if constexpr (type == DType::f32) {
    return as_float(p.w[v]);
  } else {
    const uint32_t two = p.w[v / 2];
    if constexpr (type == DType::bf16) return as_float(v % 2 ? two & 0xffff0000u : two << 16);
    return from_f16(v % 2 ? two >> 16 : two & 0xffffu);
  }
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
  const auto of = [](float x, float y) { return x != x ? y : y > x ? y : x; };
  if (type == DType::f32) return as_bits(of(as_float(a), as_float(b)));
  if (type == DType::bf16) {
    const uint32_t high = as_bits(of(as_float(a & 0xffff0000u), as_float(b & 0xffff0000u)));
    return high | as_bits(of(as_float(a << 16), as_float(b << 16))) >> 16;
  }
  const auto pick = [&](uint32_t x, uint32_t y) {
    const float fx = from_f16(x), fy = from_f16(y);
    return fx != fx || fy > fx ? y : x;
  };
  return pick(a >> 16, b >> 16) << 16 | pick(a & 0xffffu, b & 0xffffu);
#endif
}

// The largest of a chunk's numbers.
template <DType type>
KDFUSE_HD float peak_of(const Packed<type>& p) {
  uint32_t top = p.w[0];
#pragma unroll
  for (const uint32_t w : p.w) top = larger<type>(top, w);
  if constexpr (type == DType::f32) return as_float(top);
  Packed<type> both = {};
  both.w[0] = top;
  const float a = unpack(both, 0), b = unpack(both, 1);
  return b > a || a != a ? b : a;
}

template <DType type>
KDFUSE_HD uint32_t largest_word(const Packed<type>& p, uint32_t top) {
#pragma unroll
  for (const uint32_t w : p.w) top = larger<type>(top, w);
  return top;
}

// A number as it comes, from the lower half of a word where it has 16 bits.
template <DType type>
KDFUSE_HD float unpack_one(uint32_t bits) {
  if constexpr (type == DType::f32) return as_float(bits);
  return type == DType::bf16 ? from_bf16(bits) : from_f16(bits & 0xffffu);
}

template <DType type>
KDFUSE_HD uint32_t load_bits(const void* row, int64_t j) {
  if constexpr (type == DType::f32) return static_cast<const uint32_t*>(row)[j];
  return static_cast<const uint16_t*>(row)[j];
}

// Puts a number into class v, which the compiler must know.
template <DType type>
KDFUSE_HD void set_one(Packed<type>& x, int v, uint32_t bits) {
  if constexpr (type == DType::f32) {
    x.w[v] = bits;
  } else {
    uint32_t& w = x.w[v / 2];
    w = v % 2 ? (w & 0xffffu) | bits << 16 : (w & 0xffff0000u) | bits;
  }
}

template <DType type>
KDFUSE_HD float load_one(const void* row, int64_t j) {
  return unpack_one<type>(load_bits<type>(row, j));
}

// Gradients have the logits' type, but float32 for float16, which would lose what lies below 6e-8
// before a loss scaler could lift it.
template <DType type>
constexpr DType gradient_type = type == DType::bf16 ? DType::bf16 : DType::f32;

template <DType type>
KDFUSE_HD void store_one(void* row, int64_t j, float g) {
  if constexpr (type == DType::bf16) {
    static_cast<uint16_t*>(row)[j] = static_cast<uint16_t>(to_bf16(g, 0.f));
  } else {
    static_cast<float*>(row)[j] = g;
  }
}

// Eight gradients from class j on, which lies on a 16-byte boundary.
template <DType type>
KDFUSE_HD void store_chunk(void* row, int64_t j, const float (&g)[kChunk]) {
  if constexpr (type == DType::bf16) {
    store_words(static_cast<uint16_t*>(row) + j,
                {{to_bf16(g[0], g[1]), to_bf16(g[2], g[3]), to_bf16(g[4], g[5]), to_bf16(g[6], g[7])}});
  } else {
    float* const at = static_cast<float*>(row) + j;
    store_words(at, {{as_bits(g[0]), as_bits(g[1]), as_bits(g[2]), as_bits(g[3])}});
    store_words(at + 4, {{as_bits(g[4]), as_bits(g[5]), as_bits(g[6]), as_bits(g[7])}});
  }
}

// What this thread has left in its block's memory.
KDFUSE_HD Words load_held(const void* at) {
#if defined(__CUDA_ARCH__)
  const uint4 v = *static_cast<const uint4*>(at);
  return {{v.x, v.y, v.z, v.w}};
#else
  Words words;
  std::memcpy(&words, at, sizeof(words));
  return words;
#endif
}

}  // namespace kdfuse
