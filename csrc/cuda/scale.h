// Stored gradients times the gradient of the loss. In training that is 1: it is read first, and nothing else is. Those
// of float16 students, which are float32, are rounded on the way.
#pragma once
#include "grid.h"
#include "vec8.h"

namespace kdfuse {

constexpr int kScaled = 16;  // gradients of a launch

struct Scaling {
  Output gradients[kScaled];  // (rows, classes), contiguous
  void* halves[kScaled];  // where they come to stand in float16, of float32 ones; or null: in place
  int count;
  int64_t rows, classes;
  Numbers factor;  // one, or one for each row
};

KDFUSE_DEVICE double scale_at(const Scaling& s, int64_t i) {
  return number(s.factor, s.factor.stride ? i / s.classes : 0);
}

// Elements [i, i + kChunk), which lie on a 16-byte boundary. Of one row mostly.
template <DType type>
KDFUSE_DEVICE void scale_chunk(const Scaling& s, void* data, void* halves, int64_t i) {
  Packed<type> x;
#pragma unroll
  for (int h = 0; h < Packed<type>::kUnits; ++h) {
    const Words words = load_held(static_cast<char*>(data) + i * bytes_of(type) + 16 * h);
#pragma unroll
    for (int w = 0; w < 4; ++w) x.w[4 * h + w] = words.w[w];
  }
  const bool one_row = !s.factor.stride || i % s.classes + kChunk <= s.classes;
  const auto first = static_cast<float>(scale_at(s, i));
  float out[kChunk];
#pragma unroll
  for (int v = 0; v < kChunk; ++v) {
    out[v] = unpack(x, v) * (one_row ? first : static_cast<float>(scale_at(s, i + v)));
  }
  if (halves) {
    store_words(static_cast<uint16_t*>(halves) + i,
                {{to_f16(out[0], out[1]), to_f16(out[2], out[3]), to_f16(out[4], out[5]), to_f16(out[6], out[7])}});
  } else {
    store_chunk<type>(data, i, out);
  }
}

template <class T>
KDFUSE_DEVICE void scale_each(const Scaling& s, T* data, int64_t i, int64_t end, int64_t step) {
#pragma unroll 1
  for (; i < end; i += step) data[i] *= static_cast<T>(scale_at(s, i));
}

// What one of `step` threads does to one gradient.
template <DType type>
KDFUSE_DEVICE void scale_some(const Scaling& s, void* data, void* halves, int64_t thread, int64_t step) {
  const int64_t n = s.rows * s.classes, chunks = n / kChunk;
#pragma unroll 1
  for (int64_t i = thread; i < chunks; i += step) scale_chunk<type>(s, data, halves, i * kChunk);
  const int64_t last = chunks * kChunk + thread;
  if (last >= n) return;
  const float g = load_one<type>(data, last) * static_cast<float>(scale_at(s, last));
  if (halves) {
    static_cast<uint16_t*>(halves)[last] = static_cast<uint16_t>(to_f16(g, 0.f));
  } else {
    store_one<type>(data, last, g);
  }
}

KDFUSE_DEVICE void scale(const Scaling& s, int64_t thread, int64_t step) {
  if (!s.halves[0] && !s.factor.stride && number(s.factor, 0) == 1) return;
  for (int k = 0; k < s.count; ++k) {
    const Output& g = s.gradients[k];
    if (g.type == DType::bf16) {
      scale_some<DType::bf16>(s, g.data, nullptr, thread, step);
    } else if (g.type == DType::f32) {
      scale_some<DType::f32>(s, g.data, s.halves[k], thread, step);
    } else {
      scale_each(s, static_cast<double*>(g.data), thread, s.rows * s.classes, step);
    }
  }
}

}  // namespace kdfuse
