// The order of a row's keys: a stable radix sort, which unlike a comparing one has no branches to miss.
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

namespace kdfuse {
namespace {  // each level compiles its own copy, none may leak into another

template <class T>
class Order {
 public:
  using Bits = typename std::conditional<sizeof(T) == 8, uint64_t, uint32_t>::type;
  struct Entry {
    Bits bits;
    int32_t place;
  };

  // Entries by falling key, equal keys by rising place, NaN first; valid until the next call.
  const Entry* falling(const T* keys, int64_t count) {
    if (static_cast<int64_t>(from_.size()) < count) from_.resize(count), to_.resize(count);
    uint32_t histogram[kPasses][kDigits] = {};
    for (int64_t j = 0; j < count; ++j) {
      const Bits bits = rising(keys[j]);
      from_[j] = {bits, static_cast<int32_t>(j)};
      for (int pass = 0; pass < kPasses; ++pass) ++histogram[pass][digit(bits, pass)];
    }
    for (int pass = 0; pass < kPasses; ++pass) {
      uint32_t start = 0;
      for (uint32_t& slot : histogram[pass]) start += std::exchange(slot, start);
      for (int64_t j = 0; j < count; ++j) to_[histogram[pass][digit(from_[j].bits, pass)]++] = from_[j];
      std::swap(from_, to_);
    }
    return from_.data();
  }

 private:
  static constexpr int kWidth = 8, kDigits = 1 << kWidth, kPasses = sizeof(T);

  static int digit(Bits bits, int pass) { return (bits >> (pass * kWidth)) & (kDigits - 1); }

  // Bits that rise as the key falls; NaN gives the least.
  static Bits rising(T key) {
    constexpr Bits sign = Bits(1) << (8 * sizeof(T) - 1);
    if (key != key) return 0;
    key += T(0);  // -0 and 0 are equal
    Bits bits;
    std::memcpy(&bits, &key, sizeof(bits));
    return bits & sign ? bits : static_cast<Bits>(~(bits | sign));
  }

  std::vector<Entry> from_, to_;
};

}  // namespace
}  // namespace kdfuse
