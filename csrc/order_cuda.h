// The order of logits, eight at a time: the peaks of rows and how many classes come before a label.
#pragma once
#include "packed.h"

namespace kdfuse {

// Peaks travel in words: two of 16-bit rows in one.
template <DType type, int n>
constexpr int peak_words = type == DType::f32 ? n : (n + 1) / 2;

template <DType type>
struct Larger {
  KDFUSE_MEMBER static uint32_t join(uint32_t a, uint32_t b) { return larger<type>(a, b); }
  KDFUSE_MEMBER static uint32_t pad(uint32_t any) { return any; }
};

// top: the peaks of n rows as largest_word() has left them.
template <DType type, int n, int m>
KDFUSE_HD void gather_peaks(const uint32_t (&top)[n], uint32_t (&words)[m]) {
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
KDFUSE_HD void spread_peaks(const uint32_t (&words)[m], float (&peak)[n]) {
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

    KDFUSE_MEMBER float total() const {
      if constexpr (!kPairs) return single;
      return single + unpack_one<type>(pairs) + unpack_one<type>(pairs >> 16);
    }
  };

  // label: as it comes.
  KDFUSE_MEMBER explicit Threshold(uint32_t label) : label_(label) {
    constexpr uint32_t sign = type == DType::f32 ? 0x80000000u : 0x8000u;
    // The next number below; NaN for -inf, above which stands all.
    below_ = (label & ~sign) == 0 ? sign + 1 : label & sign ? label + 1 : label - 1;
    if constexpr (kPairs) label_ |= label_ << 16, below_ |= below_ << 16;
  }

  // ties: those of the label's value come before it, that is, all that is not below it.
  KDFUSE_MEMBER void count(const Packed<type>& x, bool ties, Count& count) const {
    const uint32_t least = ties ? below_ : label_;
    if constexpr (kPairs) {
#pragma unroll
      for (const uint32_t w : x.w) count.pairs = add_pairs(count.pairs, above(w, least));
    } else {
#pragma unroll
      for (int v = 0; v < kChunk; ++v) {
        count.single = unpack(x, v) <= unpack_one<type>(least) ? count.single : count.single + 1;
      }
    }
  }

 private:
  // 1 for each of two numbers that is not at most the threshold.
  KDFUSE_MEMBER static uint32_t above(uint32_t two, uint32_t least) {
#if defined(__CUDA_ARCH__)
    uint32_t ones;
    if constexpr (type == DType::bf16) {
      asm("set.gtu.bf16x2.bf16x2 %0, %1, %2;" : "=r"(ones) : "r"(two), "r"(least));
    } else {
      asm("set.gtu.f16x2.f16x2 %0, %1, %2;" : "=r"(ones) : "r"(two), "r"(least));
    }
    return ones;
#else
    constexpr uint32_t one = type == DType::bf16 ? 0x3f80u : 0x3c00u;
    const float number = unpack_one<type>(least);
    const bool low = unpack_one<type>(two) <= number, high = unpack_one<type>(two >> 16) <= number;
    return (low ? 0 : one) | (high ? 0 : one) << 16;
#endif
  }

  KDFUSE_MEMBER static uint32_t add_pairs(uint32_t a, uint32_t b) {
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

  uint32_t label_, below_;
};

}  // namespace kdfuse
