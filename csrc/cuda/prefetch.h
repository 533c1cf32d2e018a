// Rows on their way from memory to registers: each thread of a team copies its own chunks into its own
// places in the block's memory, two rows ahead of their use. No other thread touches them, so nothing here
// needs a barrier, but for fill_class(); a place takes single elements, where a register could not be indexed.
#pragma once
#include "shape.h"
#include "vec8.h"

namespace kdfuse {

// The rows of a shape's inputs, kChunks chunks of each by a thread: chunk u * size + rank is its u-th. There are two
// sets of places; all but turn() and clear() see one.
template <class Shape, int kChunks, class Team>
class Stage {
  static constexpr DType type = Shape::type;
  static constexpr int kInputs = Shape::kInputs;
  // Units of 16 bytes that a chunk of the k-th input may take, and that those before it take.
  KDFUSE_DEVICE_MEMBER static constexpr int units(int k) {
    return k < Shape::kStudents ? Packed<type>::kUnits : Packed<Shape::others>::kUnits;
  }
  KDFUSE_DEVICE_MEMBER static constexpr int units_before(int k) {
    return k < Shape::kStudents ? k * units(0) : Shape::kStudents * units(0) + (k - Shape::kStudents) * units(kInputs);
  }

 public:
  static constexpr int kBytes =
      2 * kChunks * 16 *
      (Shape::kStudents * Packed<type>::kUnits + Shape::kOthers * Packed<Shape::others>::kUnits);  // of a thread

  KDFUSE_DEVICE_MEMBER Stage(const Team& team, const FastTask& p)
      : team_(team),
        p_(p),
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
    const int first = kChunk * team_.rank() - span.shift;
    const char* from[kInputs];
#pragma unroll
    for (int k = 0; k < kInputs; ++k) from[k] = kept(rows[k] + first * size_of(k));
#pragma unroll
    for (int u = 0; u < kChunks; ++u) {
      if (chunk(u) >= chunks) continue;
      const int64_t at = u * kChunk * static_cast<int64_t>(team_.size());
#pragma unroll
      for (int k = 0; k < kInputs; ++k) {
        if (is_listed(k)) continue;
#pragma unroll
        for (int h = 0; h < units(k); ++h) {
          if (h * 16 < kChunk * size_of(k)) copy_async(place(k, u, h), from[k] + at * size_of(k) + 16 * h);
        }
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
          for (int k = 0; k < kInputs; ++k) {
            if (!is_listed(k)) put(k, last / team_.size(), v, bits(k, first + v));
          }
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
    for (int k = 0; k < kInputs; ++k) put(k, u, v, absent(k));
  }

  // A top-k teacher's row before its list: this thread's chunks of the k-th input at one logit.
  KDFUSE_DEVICE_MEMBER void fill(int k, const Span& span, float logit) const {
    const uint32_t w = as_bits(logit);
#pragma unroll
    for (int u = 0; u < kChunks; ++u) {
      if (chunk(u) >= span.chunks) continue;
#pragma unroll
      for (int h = 0; h < units(k); ++h) store_words(place(k, u, h), {{w, w, w, w}});
    }
  }
  // Then the logit of a class, where it is in a chunk of this warp's threads; they have to meet before and after.
  KDFUSE_DEVICE_MEMBER void fill_class(int k, const Span& span, int j, float logit) const {
    const int i = span.chunk_of(j), owner = i % team_.size() - team_.rank() + team_.rank() % kLanes;
    if (static_cast<unsigned>(owner) >= kLanes) return;
    const int lanes = 16 * (owner - team_.rank() % kLanes);
    *reinterpret_cast<uint32_t*>(element(k, i / team_.size(), j - span.first(i)) + lanes) = as_bits(logit);
  }

  // Whether the k-th input is a top-k teacher, whose rows nobody copies.
  KDFUSE_DEVICE_MEMBER bool is_listed(int k) const {
    return Shape::any && k == Shape::kStudents && p_.listed.count > 0;
  }

  // Of a student.
  KDFUSE_DEVICE_MEMBER float peek(int k, int u, int v) const { return load_one<type>(element(k, u, v), 0); }

  KDFUSE_DEVICE_MEMBER Packed<type> take(int k, int u) const { return raw<type>(k, u); }

  // Of the others, from 0 on.
  KDFUSE_DEVICE_MEMBER Packed<Shape::others> take_other(int i, int u) const {
    const int k = Shape::kStudents + i;
    if constexpr (Shape::any) {
      if (type_of(k) == DType::bf16) return widened(raw<DType::bf16>(k, u));
      if (type_of(k) == DType::f16) return widened(raw<DType::f16>(k, u));
    }
    return raw<Shape::others>(k, u);
  }

  KDFUSE_DEVICE_MEMBER DType type_of(int k) const { return Shape::any && k >= Shape::kStudents ? p_.types[k] : type; }

 private:
  KDFUSE_DEVICE_MEMBER int size_of(int k) const { return type_of(k) == DType::f32 ? 4 : 2; }

  template <DType stored>
  KDFUSE_DEVICE_MEMBER Packed<stored> raw(int k, int u) const {
    Packed<stored> x;
#pragma unroll
    for (int h = 0; h < Packed<stored>::kUnits; ++h) {
      const Words words = load_held(place(k, u, h));
#pragma unroll
      for (int i = 0; i < 4; ++i) x.w[4 * h + i] = words.w[i];
    }
    return x;
  }

  KDFUSE_DEVICE_MEMBER char* place(int k, int u, int h) const {
    return base_ + (units_before(k) * kChunks + u * units(k) + h) * step_;
  }
  KDFUSE_DEVICE_MEMBER char* element(int k, int u, int v) const {
    const int at = v * size_of(k);
    return place(k, u, at / 16) + at % 16;
  }
  KDFUSE_DEVICE_MEMBER void put(int k, int u, int v, uint32_t bits) const {
    char* const at = element(k, u, v);
    if (size_of(k) == 4) {
      *reinterpret_cast<uint32_t*>(at) = bits;
    } else {
      *reinterpret_cast<uint16_t*>(at) = static_cast<uint16_t>(bits);
    }
  }

  // What takes no part: a logit at -inf, a probability of 0.
  KDFUSE_DEVICE_MEMBER uint32_t absent(int k) const {
    if (k >= Shape::kLogits) return 0;
    const DType of = type_of(k);
    return of == DType::f32    ? nothing<DType::f32>().w[0]
           : of == DType::bf16 ? nothing<DType::bf16>().w[0]
                               : nothing<DType::f16>().w[0];
  }

  // The u-th chunk, in every input.
  KDFUSE_DEVICE_MEMBER void drop(int u) const {
#pragma unroll
    for (int k = 0; k < kInputs; ++k) {
      const uint32_t w = absent(k);
#pragma unroll
      for (int h = 0; h < units(k); ++h) store_words(place(k, u, h), {{w, w, w, w}});
    }
  }

  const Team& team_;
  const FastTask& p_;
  char* base_;
  int step_, other_;  // bytes to the next place, and to the other set
};

}  // namespace kdfuse
