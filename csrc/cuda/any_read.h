// The inputs of a row as a team reads them: its target, its logits and their peaks.
//
// The first read brings the inputs into the team's memory, as many as that holds; the others are read
// from the input each time.
#pragma once
#include "coefficients.h"
#include "listed.h"
#include "partition.h"

namespace kdfuse {

// The type's own exponential, base^x: exactly 0 at -inf, NaN stays NaN.
template <class T>
struct Base;

template <>
struct Base<float> {
  static constexpr float log = 0.693147180559945309417f;
};
template <>
struct Base<double> {
  static constexpr double log = 1;
};

// A call: inlined, it would make rows of doubles several times as long to compile.
KDFUSE_DEVICE_CALL double power(double x) { return std::exp(x); }

// The exponents of a row at one temperature, to the base of the type.
template <class T>
struct Units {
  T peak, step;

  KDFUSE_DEVICE_MEMBER T of(T x) const { return (x - peak) * step; }
  KDFUSE_DEVICE_MEMBER T natural(T x) const { return Base<T>::log * of(x); }
};

template <class T>
KDFUSE_DEVICE Units<T> units(T temperature, T peak) {
  return {peak, T(1) / (temperature * Base<T>::log)};
}

// The target of a row: one label (two for mixed labels of the ops that take two), or none.
template <class T>
struct Target {
  int count;
  int labels[2];
  T values[2];  // their probabilities
  bool soft;
  Source<T> source;  // of class probabilities, the labels' at 0
  T mass;  // of all class probabilities
};

template <class T, class S = Source<T>>
struct Logits {
  S source;  // labels at -inf
  T label[2];
  bool labelled;  // by one label, which then takes its part in the statistics
  Units<T> units, units1;  // at T and at T = 1
  Stats<T> stats;
  Split<T> at, at1;  // the softmax at T and at T = 1
  T far[2];  // u of the labels at T = 1

  KDFUSE_DEVICE_MEMBER T log_label(int k) const { return labelled ? at1.log_label : far[k] - at1.lse; }
};

KDFUSE_DEVICE Span span_of(const Task& p, int64_t row, bool vectors) {
  const Matrix& m = p.logits[0];
  const auto at = reinterpret_cast<uintptr_t>(m.data) + static_cast<uintptr_t>(row * m.stride * bytes_of(m.type));
  const int shift = vectors ? static_cast<int>(at >> log_bytes(m.type)) & (kChunk - 1) : 0;
  return {p.classes, shift, (p.classes + shift + kChunk - 1) / kChunk};
}

template <class T>
KDFUSE_DEVICE bool aligned(const char* row, DType type, const Span& span) {
  return sizeof(T) == sizeof(float) && (reinterpret_cast<uintptr_t>(row) - span.shift * bytes_of(type)) % 16 == 0;
}

// which: the input's place in the team's memory, if there is one for it.
template <class T>
KDFUSE_DEVICE Source<T> open(const Task& p, const Matrix& m, int64_t row, const Span& span, int which, T pad) {
  const char* const at = static_cast<const char*>(m.data) + row * m.stride * bytes_of(m.type);
  return {at, m.type, aligned<T>(at, m.type, span), which < p.held ? which : -1, pad, nullptr, 0, T(0), T(0)};
}

template <class T>
KDFUSE_DEVICE Sink<T> open(const Task& p, const Output& m, int64_t row, const Span& span) {
  char* const at = static_cast<char*>(m.data) + row * p.classes * bytes_of(m.type);
  return {at, m.type, aligned<T>(at, m.type, span)};
}

// Chunk i with another number for the labels that are in it.
template <class T>
KDFUSE_DEVICE void set_labels(const Target<T>& y, const Span& span, int i, T first, T second, T (&x)[kChunk]) {
  const unsigned a = static_cast<unsigned>(y.labels[0] - span.first(i));
  const unsigned b = static_cast<unsigned>(y.labels[1] - span.first(i));
  if (a >= kChunk && b >= kChunk) return;
#pragma unroll
  for (unsigned v = 0; v < kChunk; ++v) x[v] = v == a ? first : v == b ? second : x[v];
}

template <class T, class Team>
KDFUSE_DEVICE void read(const Team& team, const Task& p, const Source<T>& s, const Target<T>& y, const Span& span,
                        int i, T (&x)[kChunk]) {
  if (s.held >= 0) return get_held(team, p, s.held, span, i, x);
  read_input(s, span, i, x);
  set_labels(y, span, i, s.pad, s.pad, x);
}

// The whole chunks of the first read that hold no label: 64 bytes a thread are under way at once.
template <DType type, class Team>
KDFUSE_DEVICE float read_plain(const Team& team, const Task& p, const Source<float>& s, const Span& span, int a,
                               int b) {
  constexpr int kAhead = type == DType::f32 ? 2 : 4;
  float peak = -INFINITY;
#pragma unroll 1
  for (int i = team.rank(); i < span.chunks; i += kAhead * team.size()) {
    Raw raw[kAhead];
    bool there[kAhead];
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      const int k = i + u * team.size();
      there[u] = span.whole(k) && k != a && k != b;
      if (there[u]) raw[u] = fetch_vectors(s.row, type == DType::f32, span.first(k));
    }
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      if (!there[u]) continue;
      float x[kChunk];
      decode(type, raw[u], x);
#pragma unroll
      for (int v = 0; v < kChunk; ++v) peak = x[v] > peak ? x[v] : peak;
      if (s.held >= 0) hold(team, p, s.held, span, i + u * team.size(), x);
    }
  }
  return peak;
}

template <class Team>
KDFUSE_DEVICE float read_plain(const Team& team, const Task& p, const Source<float>& s, const Span& span, int a,
                               int b) {
  if (!s.vectors) return -INFINITY;
  if (s.type == DType::f32) return read_plain<DType::f32>(team, p, s, span, a, b);
  if (s.type == DType::bf16) return read_plain<DType::bf16>(team, p, s, span, a, b);
  return read_plain<DType::f16>(team, p, s, span, a, b);
}

template <class Team>
KDFUSE_DEVICE double read_plain(const Team&, const Task&, const Source<double>&, const Span&, int, int) {
  return -INFINITY;
}

template <class T, class Team>
KDFUSE_DEVICE T highest(const Team& team, T x) {
  T all[1] = {x};
  team.max(all);
  return all[0];
}

// The first read: keeps the row where it is to be held; returns the largest number but the labels'.
template <class T, class Team>
KDFUSE_DEVICE T read_first(const Team& team, const Task& p, const Source<T>& s, const Target<T>& y, const Span& span) {
  const int a = span.chunk_of(y.labels[0]), b = span.chunk_of(y.labels[1]);
  T peak = read_plain(team, p, s, span, a, b);
#pragma unroll 1
  for (int i = team.rank(); i < span.chunks; i += team.size()) {
    if (s.vectors && span.whole(i) && i != a && i != b) continue;
    T x[kChunk];
    read_input(s, span, i, x);
    set_labels(y, span, i, s.pad, s.pad, x);
#pragma unroll
    for (int v = 0; v < kChunk; ++v) peak = x[v] > peak ? x[v] : peak;
    if (s.held >= 0) hold(team, p, s.held, span, i, x);
  }
  return highest(team, peak);
}

// The first class with the largest of the probabilities that are not labels yet, and their sum.
template <class T, class Team>
KDFUSE_DEVICE int find_label(const Team& team, const Task& p, const Target<T>& y, const Span& span, T& sum) {
  T largest = -INFINITY, sums[1] = {0};
  int found = p.classes;
#pragma unroll 1
  for (int i = team.rank(); i < span.chunks; i += team.size()) {
    T x[kChunk];
    read_input(y.source, span, i, x);
    set_labels(y, span, i, T(-INFINITY), T(-INFINITY), x);
#pragma unroll
    for (int v = 0; v < kChunk; ++v) {
      const int j = span.first(i) + v;
      if (j < 0 || j >= span.classes) continue;
      sums[0] += x[v];
      if (x[v] > largest) largest = x[v], found = j;
    }
  }
  team.sum(sums);
  sum = sums[0];
  found = -highest(team, highest(team, largest) == largest ? -found : -p.classes);
  return found < p.classes ? found : 0;  // NaN everywhere: any label does
}

// wanted: how many labels a row of class probabilities is reduced to.
template <class T, class Team>
KDFUSE_DEVICE Target<T> read_target(const Team& team, const Task& p, int64_t row, const Span& span, int wanted) {
  Target<T> y = {0, {kNowhere, kNowhere}, {0, 0}, false, {}, 1};
  if (p.labels) {
    y.count = 1;
    y.labels[0] = static_cast<int>(p.labels[row * p.label_stride]);
    y.values[0] = 1;
  }
  if (!p.soft.data) return y;
  y.soft = true;
  y.source = open<T>(p, p.soft, row, span, p.num_students + p.num_teachers, T(0));
  y.count = 1;
  y.labels[0] = find_label(team, p, y, span, y.mass);
  y.values[0] = element(y.source, y.labels[0]);
  if (wanted == 2) {
    T left;
    const int label = find_label(team, p, y, span, left);
    const T value = element(y.source, label);
    // A mixed label of one class has one target.
    if (value > T(0)) y.count = 2, y.labels[1] = label, y.values[1] = value;
  }
  read_first(team, p, y.source, y, span);
  return y;
}

// What a row holds where its labels are -inf: where nothing else is finite the highest label stands
// in for the peak, so that the row keeps its distribution.
template <class T>
KDFUSE_DEVICE T stand_in(T peak, const Target<T>& y, const T (&label)[2]) {
  T highest = -INFINITY;
  for (int k = 0; k < 2; ++k) highest = k < y.count && label[k] > highest ? label[k] : highest;
  return peak != T(-INFINITY) ? peak : highest == T(-INFINITY) ? T(0) : highest;
}

// Logits before anything is known but their labels.
template <class T>
KDFUSE_DEVICE Logits<T> open_logits(const Source<T>& source, const Target<T>& y) {
  Logits<T> x = {};
  x.source = source;
  x.labelled = y.count == 1;
  for (int k = 0; k < 2; ++k) x.label[k] = k < y.count ? element(x.source, y.labels[k]) : T(0);
  return x;
}

template <class T>
KDFUSE_DEVICE Logits<T> open_logits(const Task& p, int which, int64_t row, const Target<T>& y, const Span& span) {
  return open_logits(open<T>(p, p.logits[which], row, span, which, T(-INFINITY)), y);
}

template <class T, class S>
KDFUSE_DEVICE void set_peak(Logits<T, S>& x, const Target<T>& y, T temperature, T peak) {
  peak = stand_in(peak, y, x.label);
  x.units = units(temperature, peak);
  x.units1 = units(T(1), peak);
}

template <class T, class Team>
KDFUSE_DEVICE Logits<T> read_logits(const Team& team, const Task& p, int which, int64_t row, const Target<T>& y,
                                    const Span& span, T temperature) {
  Logits<T> x = open_logits<T>(p, which, row, y, span);
  set_peak(x, y, temperature, read_first(team, p, x.source, y, span));
  return x;
}

// The k-th teacher of an op with one student; of a top-k one what fill_teachers() has noted.
template <class T, class Team>
KDFUSE_DEVICE Source<T> open_teacher(const Team& team, const Task& p, int k, int64_t row, const Span& span) {
  Source<T> s = open<T>(p, p.logits[1 + k], row, span, 1 + k, T(-INFINITY));
  if (!p.sparse || p.top_k[k].count == 0) return s;
  s.vectors = false;
  s.listed = p.top_k[k].classes + row * p.top_k[k].stride;
  s.count = static_cast<int>(p.top_k[k].count);
  s.fill = notes<T>(team, k)[4], s.shift = notes<T>(team, k)[5];
  return s;
}

template <class T, class Team>
KDFUSE_DEVICE void fill_teachers(const Team& team, const Task& p, int64_t row, const Span& span, T temperature) {
  if (!p.sparse) return;
#pragma unroll 1
  for (int k = 0; k < p.num_teachers; ++k) {
    const TopK& listed = p.top_k[k];
    if (listed.count == 0) continue;
    const Source<T> s = open<T>(p, p.logits[1 + k], row, span, 1 + k, T(-INFINITY));
    T peak = -INFINITY, sum[1] = {0};
#pragma unroll 1
    for (int64_t i = team.rank(); i < listed.count; i += team.size()) {
      const int64_t at = listed.classes[row * listed.stride + i];
      assert(at >= 0 && at < p.classes && "kdfuse: an index of a top-k teacher is outside the classes");
      const T value = stored(s, i);
      peak = value > peak ? value : peak;
    }
    peak = highest(team, peak);
    const T origin = peak - peak == T(0) ? peak : T(0);
    Unlisted<T> of;
    if (listed.mass.data) {
#pragma unroll 1
      for (int64_t i = team.rank(); i < listed.count; i += team.size()) {
        sum[0] += std::exp((stored(s, i) - origin) / temperature);
      }
      team.sum(sum);
      const T mass = static_cast<T>(number(numbers_of(listed.mass), row));
      of = unlisted(origin, sum[0], mass, static_cast<T>(p.classes - listed.count), temperature);
    }
    if (team.rank() == 0) notes<T>(team, k)[4] = of.fill, notes<T>(team, k)[5] = of.shift;
  }
  team.sync();
}

}  // namespace kdfuse
