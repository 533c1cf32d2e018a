// Eight classes of a row as they come from memory.
#pragma once
#include "partition.h"

namespace kdfuse {

template <DType type>
struct Packed {
  static constexpr int kUnits = type == DType::f32 ? 2 : 1;  // of 16 bytes
  uint32_t w[4 * kUnits];
};

// All classes at -inf.
template <DType type>
KDFUSE_DEVICE Packed<type> nothing() {
  constexpr uint32_t infinite = type == DType::f32 ? 0xff800000u : type == DType::bf16 ? 0xff80ff80u : 0xfc00fc00u;
  Packed<type> p;
#pragma unroll
  for (uint32_t& w : p.w) w = infinite;
  return p;
}

template <DType type>
KDFUSE_DEVICE float unpack(const Packed<type>& p, int v) {
  if constexpr (type == DType::f32) {
    return as_float(p.w[v]);
  } else {
    const uint32_t two = p.w[v / 2];
    if constexpr (type == DType::bf16) return as_float(v % 2 ? two & 0xffff0000u : two << 16);
    return from_f16(v % 2 ? two >> 16 : two & 0xffffu);
  }
}

template <DType type>
KDFUSE_DEVICE Packed<DType::f32> widened(const Packed<type>& p) {
  Packed<DType::f32> x;
#pragma unroll
  for (int v = 0; v < kChunk; ++v) x.w[v] = as_bits(unpack(p, v));
  return x;
}

template <DType type>
KDFUSE_DEVICE uint32_t load_bits(const void* row, int64_t j) {
  if constexpr (type == DType::f32) return static_cast<const uint32_t*>(row)[j];
  return static_cast<const uint16_t*>(row)[j];
}

// Puts a number into class v, which the compiler must know.
template <DType type>
KDFUSE_DEVICE void set_one(Packed<type>& x, int v, uint32_t bits) {
  if constexpr (type == DType::f32) {
    x.w[v] = bits;
  } else {
    uint32_t& w = x.w[v / 2];
    w = v % 2 ? (w & 0xffffu) | bits << 16 : (w & 0xffff0000u) | bits;
  }
}

template <DType type>
KDFUSE_DEVICE float load_one(const void* row, int64_t j) {
  return unpack_one<type>(load_bits<type>(row, j));
}

// Gradients have the logits' type, but float32 for float16, which would lose what lies below 6e-8
// before a loss scaler could lift it.
template <DType type>
constexpr DType gradient_type = type == DType::bf16 ? DType::bf16 : DType::f32;

template <DType type>
KDFUSE_DEVICE void store_one(void* row, int64_t j, float g) {
  if constexpr (type == DType::bf16) {
    static_cast<uint16_t*>(row)[j] = static_cast<uint16_t>(to_bf16(g, 0.f));
  } else {
    static_cast<float*>(row)[j] = g;
  }
}

// Eight gradients from class j on, which lies on a 16-byte boundary.
template <DType type>
KDFUSE_DEVICE void store_chunk(void* row, int64_t j, const float (&g)[kChunk]) {
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
KDFUSE_DEVICE Words load_held(const void* at) {
  const uint4 v = *static_cast<const uint4*>(at);
  return {{v.x, v.y, v.z, v.w}};
}

}  // namespace kdfuse
