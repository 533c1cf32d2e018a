// What a top-k teacher lists, and what it says of the other classes.
#pragma once
#include "../core/stats.h"

namespace kdfuse {

struct Entry {
  int index;  // the class
  float logit;
};

template <class T>
struct Unlisted {
  T fill = -INFINITY;  // their logit
  T shift = 0;  // what is taken from the listed ones
};

// With v the listed logits and m the mass of the others,
//   f = T * (log(m / (1 - m)) + log sum exp(v / T) - log(C - k)), or -inf without a mass.
// Far from 0 it would be rounded at the size of the logits; no loss sees a shift of a teacher.
// sum: of exp((v - origin) / T); others: C - k.
template <class T>
KDFUSE_DEVICE Unlisted<T> unlisted(T origin, T sum, T mass, T others, T temperature) {
  const T reach = T(32) * (temperature < T(1) ? temperature : T(1));
  Unlisted<T> of;
  of.shift = std::fabs(origin) > reach ? origin : T(0);
  of.fill = (origin - of.shift) + temperature * (std::log(mass) - std::log1p(-mass) + std::log(sum) - std::log(others));
  return of;
}

}  // namespace kdfuse
