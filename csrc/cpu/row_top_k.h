// A row of a top-k teacher on the CPU: whole logits in scratch, made of the few that are stored. As
// kernels/sparse.py has it, with T the loss's temperature, m the mass of the classes left out and v the
// values of the k listed ones, every other class has the logit
//   f = T * (log(m / (1 - m)) + log sum exp(v / T) - log(C - k)), or -inf without a mass.
#pragma once
#include <algorithm>

#include "row.h"

namespace kdfuse {
namespace {  // each level compiles its own copy, none may leak into another

// f less the peak of the values.
template <class T>
double fill_logit(const T* values, int64_t count, T peak, double mass, int64_t others, double temperature) {
  double sum = 0;
  for (int64_t j = 0; j < count; ++j) sum += std::exp((static_cast<double>(values[j]) - peak) / temperature);
  return temperature * (std::log(mass) - std::log1p(-mass) + std::log(sum) - std::log(static_cast<double>(others)));
}

// The row, padded with -inf, and its peak. values: room for one more row.
template <class T>
T load_top_k(const Matrix& x, const TopK& listed, int64_t row, int64_t classes, double temperature, T* to, T* values) {
  const T none = static_cast<T>(-INFINITY);
  const int64_t count = listed.count;
  T peak = load_row(x, row, count, values, none), fill = none;
  if (listed.mass.data) {
    const T origin = std::isfinite(static_cast<double>(peak)) ? peak : T(0);
    const double above = fill_logit(values, count, origin, mass_at(listed, row), classes - count, temperature);
    // Far from 0 the fill would be rounded at the size of the logits; no loss sees a shift of a teacher.
    const double reach = 32 * (temperature < 1 ? temperature : 1);
    const T shift = std::fabs(static_cast<double>(origin)) > reach ? origin : T(0);
    for (int64_t j = 0; j < count; ++j) values[j] -= shift;
    fill = static_cast<T>((origin - shift) + above);
    peak -= shift;
  }
  std::fill(to, to + classes, fill);
  std::fill(to + classes, to + padded(classes), none);
  const int64_t* const place = listed.classes + row * listed.stride;
  for (int64_t j = 0; j < count; ++j) to[place[j]] = values[j];
  return fill > peak ? fill : peak;
}

}  // namespace
}  // namespace kdfuse
