// The order of logits, eight at a time: the peaks of rows and how many classes come before a label.
#pragma once
#include "vec8.h"

namespace kdfuse {

// The largest number of a chunk, and `top`, as it comes: of 16-bit rows one in each half of the word.
template <DType type>
KDFUSE_DEVICE uint32_t largest_word(const Packed<type>& x, uint32_t top) {
#pragma unroll
  for (const uint32_t w : x.w) top = larger<type>(top, w);
  return top;
}

// The larger of such a word's numbers.
template <DType type>
KDFUSE_DEVICE float largest_number(uint32_t top) {
  if constexpr (type == DType::f32) return as_float(top);
  const float a = unpack_one<type>(top), b = unpack_one<type>(top >> 16);
  return b > a || a != a ? b : a;
}

// Peaks travel in words: two of 16-bit rows in one.
template <DType type, int n>
constexpr int peak_words = type == DType::f32 ? n : (n + 1) / 2;

template <DType type>
struct Larger {
  KDFUSE_DEVICE_MEMBER static uint32_t join(uint32_t a, uint32_t b) { return larger<type>(a, b); }
  KDFUSE_DEVICE_MEMBER static uint32_t pad(uint32_t any) { return any; }
};

// top: the peaks of n rows as largest_word() has left them.
template <DType type, int n, int m>
KDFUSE_DEVICE void gather_peaks(const uint32_t (&top)[n], uint32_t (&words)[m]) {
#pragma unroll
  for (int k = 0; k < m; ++k) {
    if constexpr (type == DType::f32) {
      words[k] = top[k];
    } else {
      // Both rows' halves beside each other: the larger of each row's stands in its own half.
      const uint32_t a = top[2 * k], b = 2 * k + 1 < n ? top[2 * k + 1] : a;
      words[k] = larger<type>((a & 0xffffu) | b << 16, a >> 16 | (b & 0xffff0000u));
    }
  }
}

template <DType type, int n, int m>
KDFUSE_DEVICE void spread_peaks(const uint32_t (&words)[m], float (&peak)[n]) {
#pragma unroll
  for (int k = 0; k < n; ++k) {
    peak[k] = type == DType::f32 ? as_float(words[k]) : unpack_one<type>(words[k / 2] >> (k % 2 ? 16 : 0));
  }
}

// What comes before a label: larger numbers, NaN, and of the chunks before the label's equal ones too. 16-bit
// numbers are compared two at a time where the device does that.
template <DType type>
class Threshold {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  static constexpr bool kPairs = type == DType::f16;
#else
  static constexpr bool kPairs = type != DType::f32;
#endif

 public:
  // Counts of one thread: of pairs while they fit into their type, 256 at least.
  struct Count {
    uint32_t pairs = 0;
    float single = 0;

    KDFUSE_DEVICE_MEMBER float total() const {
      if constexpr (!kPairs) return single;
      return single + unpack_one<type>(pairs) + unpack_one<type>(pairs >> 16);
    }
  };

  // label: as it comes.
  KDFUSE_DEVICE_MEMBER explicit Threshold(uint32_t label) : label_(label) {
    constexpr uint32_t sign = type == DType::f32 ? 0x80000000u : 0x8000u;
    // The next number below; NaN for -inf, above which stands all.
    below_ = (label & ~sign) == 0 ? sign + 1 : label & sign ? label + 1 : label - 1;
    if constexpr (kPairs) label_ |= label_ << 16, below_ |= below_ << 16;
  }

  // ties: those of the label's value come before it, that is, all that is not below it.
  KDFUSE_DEVICE_MEMBER void count(const Packed<type>& x, bool ties, Count& count) const {
    const uint32_t least = ties ? below_ : label_;
    if constexpr (kPairs) {
#pragma unroll
      for (const uint32_t w : x.w) count.pairs = add_counts<type>(count.pairs, above<type>(w, least));
    } else {
#pragma unroll
      for (int v = 0; v < kChunk; ++v) {
        count.single = unpack(x, v) <= unpack_one<type>(least) ? count.single : count.single + 1;
      }
    }
  }

 private:
  uint32_t label_, below_;
};

}  // namespace kdfuse
