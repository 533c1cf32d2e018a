// One row on the CPU: brought into scratch once in the type of computation T, with the label's entry
// and the padding at -inf, so that every loop runs over whole vectors and over the rest (j != y) alone.
#pragma once
#include <cstdlib>
#include <limits>
#include <new>

#include "../core/stats.h"
#include "../core/types.h"
#include "prefetch.h"
#include "simd.h"

namespace kdfuse {
namespace {  // each level compiles its own copy, none may leak into another

// Sums run in vectors of T for this many elements, 64 a lane, then in double: error stays flat in C.
constexpr int64_t kBlock = 64 * kFloatLanes;

inline int64_t padded(int64_t classes) { return (classes + kFloatLanes - 1) / kFloatLanes * kFloatLanes; }

// Per-thread rows of scratch; they stay allocated, so that a step allocates nothing.
template <class T>
class Scratch {
 public:
  T* rows(int64_t count, int64_t length) {
    const int64_t wanted = count * length;
    if (wanted > size_) {
      std::free(data_);
      data_ = static_cast<T*>(std::aligned_alloc(64, (wanted * sizeof(T) + 63) / 64 * 64));
      size_ = data_ ? wanted : 0;
      if (!data_) throw std::bad_alloc();
    }
    return data_;
  }
  ~Scratch() { std::free(data_); }

 private:
  T* data_ = nullptr;
  int64_t size_ = 0;
};

template <class T>
T row_max(const T* x, int64_t length) {
  auto m = load(x);
  for (int64_t i = Simd<T>::lanes; i < length; i += Simd<T>::lanes) m = maximum(m, load(x + i));
  return max_lanes(m);
}

template <class T, class S>
T copy_row(const S* from, int64_t classes, T* to, T pad) {
  constexpr int lanes = Simd<T>::lanes;
  auto m = fill<T>(-INFINITY);
  int64_t i = 0;
  for (; i + lanes <= classes; i += lanes) {
    const auto v = load_as(from + i, T());
    m = maximum(v, m);
    store(to + i, v);
  }
  if (i < classes) {
    S tail[kFloatLanes] = {};
    std::memcpy(tail, from + i, (classes - i) * sizeof(S));
    store(to + i, load_as(tail, T()));
    for (int64_t j = classes; j < i + lanes; ++j) to[j] = -INFINITY;
    m = maximum(load(to + i), m);
    for (int64_t j = classes; j < i + lanes; ++j) to[j] = pad;
  }
  for (int64_t j = (classes + lanes - 1) / lanes * lanes; j < padded(classes); ++j) to[j] = pad;
  return max_lanes(m);
}

template <class T>
T load_row(const Matrix& x, int64_t row, int64_t classes, T* to, T pad) {
  const int64_t at = row * x.stride;
  switch (x.type) {
    case DType::f32:
      return copy_row(static_cast<const float*>(x.data) + at, classes, to, pad);
    case DType::bf16:
      return copy_row(static_cast<const bf16*>(x.data) + at, classes, to, pad);
    case DType::f16:
      return copy_row(static_cast<const f16*>(x.data) + at, classes, to, pad);
    default:
      break;
  }
  // Rows of doubles are computed in double only.
  if constexpr (sizeof(T) == sizeof(double)) {
    return copy_row(static_cast<const double*>(x.data) + at, classes, to, pad);
  }
  return pad;
}

// Takes the labels out of a row in scratch; returns the rest's peak. Where nothing else is finite the
// highest label stands in for it, so that the row keeps its distribution.
template <class T>
T drop_labels(T* x, int64_t length, T peak, const int64_t* labels, int count, T* values) {
  bool again = false;
  T highest = -INFINITY;
  for (int k = 0; k < count; ++k) {
    values[k] = x[labels[k]];
    again |= !(values[k] < peak);
    highest = values[k] > highest ? values[k] : highest;
    x[labels[k]] = -INFINITY;
  }
  if (again) peak = row_max(x, length);
  return peak != -INFINITY ? peak : highest == -INFINITY ? T(0) : highest;
}

// The exponents of a row at T, as the loops have them: step * x - origin, to the base of the type.
// Every number that meets them takes them from here, so that all round alike.
template <class T>
struct Units {
  typedef typename Simd<T>::vec vec;
  double log_base;  // of one unit
  T step, origin;

  Units(double temperature, T peak)
      : log_base(Power<T>::log_base), step(static_cast<T>(1 / (temperature * log_base))), origin(peak * step) {}

  vec of(vec x) const { return fma(x, fill<T>(step), fill<T>(-origin)); }
  // u of one logit.
  double of_label(T x) const {
    return log_base * std::fma(static_cast<double>(x), static_cast<double>(step), -static_cast<double>(origin));
  }
  // Those of the exponentials raised to `exponent`, that is, at a temperature divided by it.
  Units raised(double exponent) const {
    Units units = *this;
    units.log_base *= exponent;
    return units;
  }
};

// Subtracts the peak from a row where step * x - origin would lose it: far from 0, and without fused
// multiply-add everywhere. Returns the new peak.
template <class T>
T centre(T* x, int64_t length, T peak, double temperature) {
  const double reach = 4096 * (temperature < 1 ? temperature : 1);
  if (kFused && std::fabs(static_cast<double>(peak)) < reach) return peak;
  for (int64_t i = 0; i < length; i += Simd<T>::lanes) store(x + i, load(x + i) - peak);
  return T(0);
}

// How a pass gets the exponentials at T = 1 from those at T: not at all, as their square, as their
// fourth power, or as exponentials of their own in a second row.
enum class Unit { none, square, fourth, apart };

inline Unit unit_pass(double temperature, bool wanted) {
  if (!wanted || temperature == 1) return Unit::none;
  return temperature == 2 ? Unit::square : temperature == 4 ? Unit::fourth : Unit::apart;
}

struct Sums {
  double sum = 0, sum1 = 0;  // at T, and at T = 1 where `unit` makes them
};

// e = exponentials of x at T and their sum; at T = 1 as U says, into e1 where that is apart.
template <Unit U, class T>
Sums exponentials(const T* x, int64_t length, Units<T> at, Units<T> at1, T* e, T* e1, Ahead ahead) {
  Sums sums;
  for (int64_t start = 0; start < length; start += kBlock) {
    const int64_t end = start + kBlock < length ? start + kBlock : length;
    typename Simd<T>::vec sum = {}, sum1 = {};
    for (int64_t i = start; i < end; i += Simd<T>::lanes) {
      ahead.touch(i);
      const auto v = load(x + i);
      const auto w = power(at.of(v));
      store(e + i, w);
      sum += w;
      if constexpr (U == Unit::apart) {
        const auto w1 = power(at1.of(v));
        store(e1 + i, w1);
        sum1 += w1;
      } else if constexpr (U == Unit::fourth) {
        const auto square = w * w;
        sum1 = fma(square, square, sum1);
      } else if constexpr (U == Unit::square) {
        sum1 = fma(w, w, sum1);
      }
    }
    sums.sum += sum_lanes(sum);
    if constexpr (U != Unit::none) sums.sum1 += sum_lanes(sum1);
  }
  return sums;
}

template <class T>
Sums exponentials(Unit unit, const T* x, int64_t length, Units<T> at, Units<T> at1, T* e, T* e1, Ahead ahead) {
  switch (unit) {
    case Unit::none:
      return exponentials<Unit::none>(x, length, at, at1, e, e1, ahead);
    case Unit::square:
      return exponentials<Unit::square>(x, length, at, at1, e, e1, ahead);
    case Unit::fourth:
      return exponentials<Unit::fourth>(x, length, at, at1, e, e1, ahead);
    default:
      return exponentials<Unit::apart>(x, length, at, at1, e, e1, ahead);
  }
}

// sum of e_j (u_t,j - u_z,j), where e_j = 0 contributes exactly 0.
template <class T>
double cross(const T* e, const T* t, Units<T> at, const T* z, Units<T> of_z, int64_t length) {
  double total = 0;
  const typename Simd<T>::vec zero = {};
  for (int64_t start = 0; start < length; start += kBlock) {
    const int64_t end = start + kBlock < length ? start + kBlock : length;
    auto sum = zero;
    for (int64_t i = start; i < end; i += Simd<T>::lanes) {
      const auto w = load(e + i);
      sum += w > zero ? w * (at.of(load(t + i)) - of_z.of(load(z + i))) : zero;
    }
    total += sum_lanes(sum);
  }
  return at.log_base * total;
}

struct Crossed {
  double sum = 0, crossed = 0;  // of e_j, and of e_j (u_t,j - u_z,j)
};

// A teacher's exponentials and sum together with its cross sum against z; e may be t itself.
template <class T>
Crossed teacher_pass(const T* t, Units<T> at, const T* z, Units<T> of_z, int64_t length, T* e, Ahead ahead) {
  Crossed sums;
  const typename Simd<T>::vec zero = {};
  for (int64_t start = 0; start < length; start += kBlock) {
    const int64_t end = start + kBlock < length ? start + kBlock : length;
    auto sum = zero, crossed = zero;
    for (int64_t i = start; i < end; i += Simd<T>::lanes) {
      ahead.touch(i);
      const auto u = at.of(load(t + i));
      const auto w = power(u);
      const auto gap = u - of_z.of(load(z + i));
      store(e + i, w);
      sum += w;
      crossed = w > zero ? fma(w, gap, crossed) : crossed;
    }
    sums.sum += sum_lanes(sum);
    sums.crossed += at.log_base * sum_lanes(crossed);
  }
  return sums;
}

// sum of w_j u_j, where w_j = 0 contributes exactly 0.
template <class T>
double weighted(const T* w, const T* x, Units<T> at, int64_t length) {
  double total = 0;
  const typename Simd<T>::vec zero = {};
  for (int64_t start = 0; start < length; start += kBlock) {
    const int64_t end = start + kBlock < length ? start + kBlock : length;
    auto sum = zero;
    for (int64_t i = start; i < end; i += Simd<T>::lanes) {
      const auto v = load(w + i);
      sum += v != zero ? v * at.of(load(x + i)) : zero;
    }
    total += sum_lanes(sum);
  }
  return at.log_base * total;
}

// How many classes come before the label in the order of logits: ties go to the lower index, NaN
// comes before any number; more than there are before a label that is NaN, which is never right.
template <class T>
int64_t rank_of(const T* x, int64_t length, int64_t label, T value) {
  constexpr int lanes = Simd<T>::lanes;
  typename Simd<T>::ints count = {}, lane;
  for (int i = 0; i < lanes; ++i) lane[i] = i;
  const int64_t first = label / lanes * lanes;
  for (int64_t i = 0; i < first; i += lanes) count -= ~(load(x + i) < value);
  const auto shared = load(x + first);
  count -= ~(shared < value) & (lane < static_cast<typename Simd<T>::lane>(label - first));
  count -= ~(shared <= value) & (lane > static_cast<typename Simd<T>::lane>(label - first));
  for (int64_t i = first + lanes; i < length; i += lanes) count -= ~(load(x + i) <= value);
  int64_t rank = 0;
  for (int i = 0; i < lanes; ++i) rank += count[i];
  return value == value ? rank : std::numeric_limits<int64_t>::max();
}

// One summand of a gradient row: scale * row.
template <class T>
struct Stream {
  const T* row;
  T scale;
};

// out_j = a e_j + sum_m scale_m row_m,j + c (e_j at T = 1); the labels are written by the caller.
// Each product is rounded by itself, so that equal rows with opposite factors cancel to exactly 0.
template <Unit U, int M, class T, class O>
void combine(const T* e, T a, T c, const Stream<T>* streams, int count, int64_t classes, O* out) {
  constexpr int lanes = Simd<T>::lanes;
  const int total = M < 0 ? count : M;
  const auto factor = fill<T>(c);
  const auto at = [&](int64_t i) {
    const auto v = load(e + i);
    auto g = v * a;
    for (int m = 0; m < total; ++m) g += load(streams[m].row + i) * streams[m].scale;
    if constexpr (U == Unit::fourth) {
      const auto square = v * v;
      g = fma(square * factor, square, g);
    } else if constexpr (U == Unit::square) {
      g = fma(v * factor, v, g);
    }
    return g;
  };
  int64_t i = 0;
  for (; i + lanes <= classes; i += lanes) store_as(out + i, at(i));
  if (i < classes) {
    O tail[kFloatLanes];
    store_as(tail, at(i));
    std::memcpy(out + i, tail, (classes - i) * sizeof(O));
  }
}

template <Unit U, class T, class O>
void combine(const T* e, T a, T c, const Stream<T>* streams, int count, int64_t classes, O* out) {
  if (count == 1) return combine<U, 1>(e, a, c, streams, count, classes, out);
  if (count == 2) return combine<U, 2>(e, a, c, streams, count, classes, out);
  return combine<U, -1>(e, a, c, streams, count, classes, out);
}

template <class T, class O>
void combine(Unit unit, const T* e, T a, T c, const Stream<T>* streams, int count, int64_t classes, O* out) {
  if (unit == Unit::square) return combine<Unit::square>(e, a, c, streams, count, classes, out);
  if (unit == Unit::fourth) return combine<Unit::fourth>(e, a, c, streams, count, classes, out);
  return combine<Unit::none>(e, a, c, streams, count, classes, out);
}

}  // namespace
}  // namespace kdfuse
