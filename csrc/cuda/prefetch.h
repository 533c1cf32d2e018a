// Rows on their way from memory to registers: each thread of a team copies its own chunks into its own
// places in the block's memory, two rows ahead of their use. No other thread touches them, so nothing here
// needs a barrier; a place takes single elements, where a register could not be indexed.
#pragma once
#include "vec8.h"

namespace kdfuse {

// kInputs rows of logits at a time, kChunks chunks of each by a thread: chunk u * size + rank is its u-th. There are
// two sets of places; all but turn() and clear() see one.
template <DType type, int kInputs, int kChunks, class Team>
class Stage {
 public:
  static constexpr int kBytes = 2 * kInputs * kChunks * Packed<type>::kUnits * 16;  // of a thread

  KDFUSE_DEVICE_MEMBER explicit Stage(const Team& team)
      : team_(team),
        base_(static_cast<char*>(team.memory()) + 16 * team.place()),
        step_(16 * team.places()),
        other_(kBytes / 2 * team.places()) {}

  // To the other set.
  KDFUSE_DEVICE_MEMBER void turn() {
    base_ += other_;
    other_ = -other_;
  }

  // Whether any thread's u-th chunk is in the row.
  KDFUSE_DEVICE_MEMBER bool has(const Span& span, int u) const { return u == 0 || u * team_.size() < span.chunks; }
  KDFUSE_DEVICE_MEMBER int chunk(int u) const { return u * team_.size() + team_.rank(); }

  // Before the first row: what no chunk comes to takes no part.
  KDFUSE_DEVICE_MEMBER void clear() {
#pragma unroll
    for (int set = 0; set < 2; ++set, turn()) {
#pragma unroll
      for (int u = 0; u < kChunks; ++u) drop(u);
    }
  }

  // The first `chunks` chunks. rows: class 0 of each input. What the first and the last chunk have outside the row
  // comes along: it is of the same 32 bytes, which are memory of the tensor.
  KDFUSE_DEVICE_MEMBER void fetch(const char* const (&rows)[kInputs], const Span& span, int chunks) const {
    const int first = (kChunk * team_.rank() - span.shift) * kSize;
    const char* from[kInputs];
#pragma unroll
    for (int k = 0; k < kInputs; ++k) from[k] = kept(rows[k] + first);
#pragma unroll
    for (int u = 0; u < kChunks; ++u) {
      if (chunk(u) >= chunks) continue;
      const int64_t at = u * (kChunk * kSize) * static_cast<int64_t>(team_.size());
#pragma unroll
      for (int k = 0; k < kInputs; ++k) {
#pragma unroll
        for (int h = 0; h < Packed<type>::kUnits; ++h) copy_async(place(k, u, h), from[k] + at + 16 * h);
      }
    }
  }

  // The places that the row's first and last chunk have outside the row take no part, nor does a chunk that
  // only other rows have. unread: the last chunk has not been fetched; it comes class by class, bits(k, j).
  template <class F>
  KDFUSE_DEVICE_MEMBER void trim(const Span& span, bool unread, F bits) const {
    const int last = span.chunks - 1, first = span.first(last);
    if (last % team_.size() == team_.rank()) {
#pragma unroll 1
      for (int v = unread ? 0 : span.classes - first; v < kChunk; ++v) {
        if (static_cast<unsigned>(first + v) < static_cast<unsigned>(span.classes)) {
#pragma unroll
          for (int k = 0; k < kInputs; ++k) put(k, last / team_.size(), v, bits(k, first + v));
        } else {
          drop(last / team_.size(), v);
        }
      }
    }
    if (span.shift > 0 && team_.rank() == 0) {
#pragma unroll 1
      for (int v = 0; v < span.shift; ++v) drop(0, v);
    }
    if (span.chunks < max_chunks(span.classes) && span.chunks % team_.size() == team_.rank()) {
      drop(span.chunks / team_.size());
    }
  }

  // Class v of the u-th chunk, in every input.
  KDFUSE_DEVICE_MEMBER void drop(int u, int v) const {
#pragma unroll
    for (int k = 0; k < kInputs; ++k) put(k, u, v, nothing<type>().w[0]);
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
  static constexpr int kSize = type == DType::f32 ? 4 : 2;

  KDFUSE_DEVICE_MEMBER char* place(int k, int u, int h) const {
    return base_ + ((k * kChunks + u) * Packed<type>::kUnits + h) * step_;
  }
  KDFUSE_DEVICE_MEMBER char* element(int k, int u, int v) const { return place(k, u, v * kSize / 16) + v * kSize % 16; }
  KDFUSE_DEVICE_MEMBER void put(int k, int u, int v, uint32_t bits) const {
    char* const at = element(k, u, v);
    if constexpr (type == DType::f32) {
      *reinterpret_cast<uint32_t*>(at) = bits;
    } else {
      *reinterpret_cast<uint16_t*>(at) = static_cast<uint16_t>(bits);
    }
  }
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
  int step_, other_;  // bytes to the next place, and to the other set
};

}  // namespace kdfuse
