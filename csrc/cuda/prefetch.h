// A row on its way from memory to registers: each thread of a team copies its own chunks into its own
// places in the block's memory, a row ahead of its use. No other thread touches them, so nothing here
// needs a barrier; a place takes single elements, where a register could not be indexed.
#pragma once
#include <cuda_pipeline_primitives.h>

#include "vec8.h"

namespace kdfuse {

KDFUSE_DEVICE void copy_async(void* to, const void* from) {
#if defined(__CUDA_ARCH__)
  const auto at = static_cast<unsigned>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(at), "l"(from) : "memory");
#else
  __pipeline_memcpy_async(to, from, 16);
#endif
}

// The first `bytes` of 16, and zeros.
KDFUSE_DEVICE void copy_part_async(void* to, const void* from, int bytes) {
#if defined(__CUDA_ARCH__)
  const auto at = static_cast<unsigned>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(at), "l"(from), "r"(bytes) : "memory");
#else
  __pipeline_memcpy_async(to, from, 16, 16 - bytes);
#endif
}

KDFUSE_DEVICE void wait_for_copies() {
  __pipeline_commit();
  __pipeline_wait_prior(0);
}

// kInputs rows of logits at a time, kChunks chunks of each by a thread: chunk u * size + rank is its u-th.
template <DType type, int kInputs, int kChunks, class Team>
class Stage {
 public:
  static constexpr int kBytes = kInputs * kChunks * Packed<type>::kUnits * 16;  // of a thread

  KDFUSE_DEVICE_MEMBER explicit Stage(const Team& team)
      : team_(team), base_(static_cast<char*>(team.memory()) + 16 * team.place()), step_(16 * team.places()) {}

  // Whether any thread's u-th chunk is in the row.
  KDFUSE_DEVICE_MEMBER bool has(const Span& span, int u) const { return u == 0 || u * team_.size() < span.chunks; }
  KDFUSE_DEVICE_MEMBER int chunk(int u) const { return u * team_.size() + team_.rank(); }

  // Before the first row: what no chunk comes to takes no part.
  KDFUSE_DEVICE_MEMBER void clear() const {
#pragma unroll
    for (int u = 0; u < kChunks; ++u) drop(u);
  }

  // rows: class 0 of each input. Nothing behind a row is read, which may be the last of its memory; before it lie
  // bytes of the same 16.
  KDFUSE_DEVICE_MEMBER void fetch(const char* const (&rows)[kInputs], const Span& span) const {
    const int first = (kChunk * team_.rank() - span.shift) * kSize;
    const int inner = static_cast<unsigned>(span.classes + span.shift) / kChunk;
#pragma unroll
    for (int u = 0; u < kChunks; ++u) {
      if (!has(span, u) || chunk(u) >= inner) continue;
      const int64_t at = first + u * (kChunk * kSize) * static_cast<int64_t>(team_.size());
#pragma unroll
      for (int k = 0; k < kInputs; ++k) {
#pragma unroll
        for (int h = 0; h < kUnits; ++h) copy_async(place(k, u, h), rows[k] + at + 16 * h);
      }
    }
    if (inner < span.chunks && inner % team_.size() == team_.rank()) fetch_last(rows, span, inner);
  }

  // The part of a row's last chunk that is in the row.
  KDFUSE_DEVICE_MEMBER void fetch_last(const char* const (&rows)[kInputs], const Span& span, int inner) const {
    const int u = inner / team_.size(), left = (span.classes - span.first(inner)) * kSize;
    const int64_t at = static_cast<int64_t>(span.first(inner)) * kSize;
#pragma unroll
    for (int k = 0; k < kInputs; ++k) {
#pragma unroll
      for (int h = 0; h < kUnits; ++h) {
        if (left <= 16 * h) continue;
        copy_part_async(place(k, u, h), rows[k] + at + 16 * h, left < 16 * h + 16 ? left - 16 * h : 16);
      }
    }
  }

  // The places that the row's first and last chunk have outside the row take no part, nor does a chunk that
  // only other rows have.
  KDFUSE_DEVICE_MEMBER void trim(const Span& span) const {
    const int last = span.chunks - 1, inside = span.classes - span.first(last);
    if (span.shift > 0 && team_.rank() == 0) {
#pragma unroll 1
      for (int v = 0; v < span.shift; ++v) drop(0, v);
    }
    if (inside < kChunk && last % team_.size() == team_.rank()) {
#pragma unroll 1
      for (int v = inside; v < kChunk; ++v) drop(last / team_.size(), v);
    }
    if (span.chunks < max_chunks(span.classes) && span.chunks % team_.size() == team_.rank()) {
      drop(span.chunks / team_.size());
    }
  }

  // Class v of the u-th chunk, in every input.
  KDFUSE_DEVICE_MEMBER void drop(int u, int v) const {
#pragma unroll
    for (int k = 0; k < kInputs; ++k) {
      char* const at = element(k, u, v);
      if constexpr (type == DType::f32) {
        *reinterpret_cast<float*>(at) = -INFINITY;
      } else {
        *reinterpret_cast<uint16_t*>(at) = static_cast<uint16_t>(nothing<type>().w[0]);
      }
    }
  }

  KDFUSE_DEVICE_MEMBER float peek(int k, int u, int v) const { return load_one<type>(element(k, u, v), 0); }

  KDFUSE_DEVICE_MEMBER Packed<type> take(int k, int u) const {
    Packed<type> x;
#pragma unroll
    for (int h = 0; h < Packed<type>::kUnits; ++h) {
      const Words words = load_held(place(k, u, h));
#pragma unroll
      for (int i = 0; i < 4; ++i) x.w[4 * h + i] = words.w[i];
    }
    return x;
  }

 private:
  static constexpr int kSize = type == DType::f32 ? 4 : 2, kUnits = Packed<type>::kUnits;

  KDFUSE_DEVICE_MEMBER char* place(int k, int u, int h) const {
    return base_ + ((k * kChunks + u) * Packed<type>::kUnits + h) * step_;
  }
  KDFUSE_DEVICE_MEMBER char* element(int k, int u, int v) const { return place(k, u, v * kSize / 16) + v * kSize % 16; }
  // The u-th chunk, in every input.
  KDFUSE_DEVICE_MEMBER void drop(int u) const {
    const uint32_t w = nothing<type>().w[0];
#pragma unroll
    for (int k = 0; k < kInputs; ++k) {
#pragma unroll
      for (int h = 0; h < Packed<type>::kUnits; ++h) store_words(place(k, u, h), {{w, w, w, w}});
    }
  }

  const Team& team_;
  char* base_;
  int step_;
};

}  // namespace kdfuse
