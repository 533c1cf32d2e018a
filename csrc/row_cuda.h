// The row pass of a team, part by part: the row's target, its peaks, its softmaxes and its gradient.
//
// A row is gone through three times: for the peaks, which brings it into the team's memory as far as
// that holds it, for the sums, and for the gradient. What is not held is read again.
#pragma once
#include "chunk.h"

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

KDFUSE_HD float power(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return std::exp2(x);
#endif
}

KDFUSE_HD double power(double x) { return std::exp(x); }

// The exponents of a row at one temperature, to the base of the type.
template <class T>
struct Units {
  T peak, step;

  KDFUSE_MEMBER T of(T x) const { return (x - peak) * step; }
  KDFUSE_MEMBER T natural(T x) const { return Base<T>::log * of(x); }
};

template <class T>
KDFUSE_HD Units<T> units(T temperature, T peak) {
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

  KDFUSE_MEMBER T log_label(int k) const { return labelled ? at1.log_label : far[k] - at1.lse; }
};

KDFUSE_HD Span span_of(const Task& p, int64_t row, bool vectors) {
  const Matrix& m = p.logits[0];
  const auto at = reinterpret_cast<uintptr_t>(m.data) + static_cast<uintptr_t>(row * m.stride * bytes_of(m.type));
  const int shift = vectors ? static_cast<int>(at >> log_bytes(m.type)) & (kChunk - 1) : 0;
  return {p.classes, shift, (p.classes + shift + kChunk - 1) / kChunk};
}

template <class T>
KDFUSE_HD bool aligned(const char* row, DType type, const Span& span) {
  return sizeof(T) == sizeof(float) && (reinterpret_cast<uintptr_t>(row) - span.shift * bytes_of(type)) % 16 == 0;
}

// which: the input's place in the team's memory, if there is one for it.
template <class T>
KDFUSE_HD Source<T> open(const Task& p, const Matrix& m, int64_t row, const Span& span, int which, T pad) {
  const char* const at = static_cast<const char*>(m.data) + row * m.stride * bytes_of(m.type);
  return {at, m.type, aligned<T>(at, m.type, span), which < p.held ? which : -1, pad};
}

template <class T>
KDFUSE_HD Sink<T> open(const Task& p, const Output& m, int64_t row, const Span& span) {
  char* const at = static_cast<char*>(m.data) + row * p.classes * bytes_of(m.type);
  return {at, m.type, aligned<T>(at, m.type, span)};
}

// Chunk i with another number for the labels that are in it.
template <class T>
KDFUSE_HD void set_labels(const Target<T>& y, const Span& span, int i, T first, T second, T (&x)[kChunk]) {
  const unsigned a = static_cast<unsigned>(y.labels[0] - span.first(i));
  const unsigned b = static_cast<unsigned>(y.labels[1] - span.first(i));
  if (a >= kChunk && b >= kChunk) return;
#pragma unroll
  for (unsigned v = 0; v < kChunk; ++v) x[v] = v == a ? first : v == b ? second : x[v];
}

template <class T, class Team>
KDFUSE_HD void read(const Team& team, const Task& p, const Source<T>& s, const Target<T>& y, const Span& span, int i,
                    T (&x)[kChunk]) {
  if (s.held >= 0) return get_held(team, p, s.held, span, i, x);
  read_input(s, span, i, x);
  set_labels(y, span, i, s.pad, s.pad, x);
}

// The whole chunks of the first read that hold no label: kAhead loads of a thread are under way at once.
template <DType type, class Team>
KDFUSE_HD float read_plain(const Team& team, const Task& p, const Source<float>& s, const Span& span, int a, int b) {
  constexpr int kAhead = 4;
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
KDFUSE_HD float read_plain(const Team& team, const Task& p, const Source<float>& s, const Span& span, int a, int b) {
  if (!s.vectors) return -INFINITY;
  if (s.type == DType::f32) return read_plain<DType::f32>(team, p, s, span, a, b);
  if (s.type == DType::bf16) return read_plain<DType::bf16>(team, p, s, span, a, b);
  return read_plain<DType::f16>(team, p, s, span, a, b);
}

template <class Team>
KDFUSE_HD double read_plain(const Team&, const Task&, const Source<double>&, const Span&, int, int) {
  return -INFINITY;
}

// The first read: keeps the row where it is to be held; returns the largest number but the labels'.
template <class T, class Team>
KDFUSE_HD T read_first(const Team& team, const Task& p, const Source<T>& s, const Target<T>& y, const Span& span) {
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
  return team.max(peak);
}

// The first class with the largest of the probabilities that are not labels yet, and their sum.
template <class T, class Team>
KDFUSE_HD int find_label(const Team& team, const Task& p, const Target<T>& y, const Span& span, T& sum) {
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
  found = -team.max(team.max(largest) == largest ? -found : -p.classes);
  return found < p.classes ? found : 0;  // NaN everywhere: any label does
}

// wanted: how many labels a row of class probabilities is reduced to.
template <class T, class Team>
KDFUSE_HD Target<T> read_target(const Team& team, const Task& p, int64_t row, const Span& span, int wanted) {
  Target<T> y = {0, {kNowhere, kNowhere}, {0, 0}, false, {}, 1};
  if (p.labels) {
    y.count = 1;
    y.labels[0] = static_cast<int>(p.labels[row * p.label_stride]);
    y.values[0] = 1;
  }
  if (!p.soft.data) return y;
  y.soft = true;
  y.source = open<T>(p, p.soft, row, span, p.num_students + p.num_teachers, T(0));
  for (; y.count < wanted; ++y.count) {
    T sum = 0;
    const int label = find_label(team, p, y, span, sum);
    const T value = element(y.source, label);
    if (y.count == 0) y.mass = sum;
    if (y.count == 1 && !(value > T(0))) break;  // a mixed label of one class has one target
    y.labels[y.count] = label;
    y.values[y.count] = value;
  }
  read_first(team, p, y.source, y, span);
  return y;
}

KDFUSE_HD bool ignored(const Task& p, int64_t row) {
  return p.labels && p.labels[row * p.label_stride] == p.ignore_index;
}

// What a row holds where its labels are -inf: where nothing else is finite the highest label stands
// in for the peak, so that the row keeps its distribution.
template <class T>
KDFUSE_HD T stand_in(T peak, const Target<T>& y, const T (&label)[2]) {
  T highest = -INFINITY;
  for (int k = 0; k < 2; ++k) highest = k < y.count && label[k] > highest ? label[k] : highest;
  return peak != T(-INFINITY) ? peak : highest == T(-INFINITY) ? T(0) : highest;
}

// Logits before anything is known but their labels.
template <class T>
KDFUSE_HD Logits<T> open_logits(const Task& p, int which, int64_t row, const Target<T>& y, const Span& span) {
  Logits<T> x = {};
  x.source = open<T>(p, p.logits[which], row, span, which, T(-INFINITY));
  x.labelled = y.count == 1;
  for (int k = 0; k < 2; ++k) x.label[k] = k < y.count ? element(x.source, y.labels[k]) : T(0);
  return x;
}

template <class T, class S>
KDFUSE_HD void set_peak(Logits<T, S>& x, const Target<T>& y, T temperature, T peak) {
  peak = stand_in(peak, y, x.label);
  x.units = units(temperature, peak);
  x.units1 = units(T(1), peak);
}

template <class T, class Team>
KDFUSE_HD Logits<T> read_logits(const Team& team, const Task& p, int which, int64_t row, const Target<T>& y,
                                const Span& span, T temperature) {
  Logits<T> x = open_logits<T>(p, which, row, y, span);
  set_peak(x, y, temperature, read_first(team, p, x.source, y, span));
  return x;
}

// The softmaxes of logits. add(i, x, e, more) adds the op's own sums over the rest to `more`.
template <int n, class T, class S, class Team, class F>
KDFUSE_HD void exponentiate(const Team& team, const Task& p, const Target<T>& y, const Span& span, Logits<T, S>& z,
                            bool at_one, T (&more)[n], F add) {
  T sums[n + 2] = {};
#pragma unroll 1
  for (int i = team.rank(); i < span.chunks; i += team.size()) {
    T x[kChunk], e[kChunk];
    read(team, p, z.source, y, span, i, x);
#pragma unroll
    for (int v = 0; v < kChunk; ++v) {
      e[v] = power(z.units.of(x[v]));
      sums[n] += e[v];
      if (at_one) sums[n + 1] += power(z.units1.of(x[v]));
    }
    add(i, x, e, sums);
  }
  team.sum(sums);
#pragma unroll
  for (int k = 0; k < n; ++k) more[k] = sums[k];
  const T label = z.labelled ? z.label[0] : T(-INFINITY);
  z.stats = {sums[n], z.units.natural(label)};
  z.at = split(z.stats);
  if (!at_one) return;
  z.at1 = split(Stats<T>{sums[n + 1], z.units1.natural(label)});
#pragma unroll
  for (int k = 0; k < 2; ++k) z.far[k] = z.units1.natural(z.label[k]);
}

// sum += w_j u_j, where w_j = 0 contributes exactly 0.
template <class T>
KDFUSE_HD void add_weighted(T& sum, const T (&w)[kChunk], const Units<T>& units, const T (&x)[kChunk]) {
#pragma unroll
  for (int v = 0; v < kChunk; ++v) sum = w[v] != T(0) ? std::fma(w[v], units.of(x[v]), sum) : sum;
}

// What a student's exponentials come with: the label's rank and the dot product of its target.
template <class T>
struct Seen {
  T dot;  // sum over j of y_j u_j at T = 1
  T top1, top5;
};

// How many classes of chunk i come before the label in the order of logits: ties go to the lower
// index, NaN comes before any number.
template <class T>
KDFUSE_HD T ahead(const Target<T>& y, const Span& span, int i, T value, const T (&x)[kChunk]) {
  int count = 0;
  const int before = y.labels[0] - span.first(i);
#pragma unroll
  for (int v = 0; v < kChunk; ++v) count += !(x[v] < value) && (v < before || x[v] != value);
  return static_cast<T>(count);
}

template <class T, class Team>
KDFUSE_HD Seen<T> see(const Team& team, const Task& p, const Target<T>& y, const Span& span, Logits<T>& z,
                      bool at_one) {
  T sums[2];
  exponentiate(team, p, y, span, z, at_one, sums, [&](int i, const T(&x)[kChunk], const T(&)[kChunk], T* sum) {
    if (y.count > 0) sum[0] += ahead(y, span, i, z.label[0], x);
    if (!y.soft) return;
    T q[kChunk];
    read(team, p, y.source, y, span, i, q);
    add_weighted(sum[1], q, z.units1, x);
  });
  if (y.count == 0) return {0, 0, 0};
  T rank = sums[0], dot = Base<T>::log * sums[1];
  // The places before the row's first class are at -inf and tie with such a label.
  if (z.label[0] == T(-INFINITY)) rank -= span.shift;
  if (y.count == 2 && !(z.label[1] < z.label[0])) rank += y.labels[1] < y.labels[0] || z.label[1] != z.label[0];
  // Of two labels the other is at -inf in its chunk, and ties there with a label at -inf.
  if (y.count == 2 && z.label[0] == T(-INFINITY) && y.labels[1] < y.labels[0]) rank -= 1;
#pragma unroll
  for (int k = 0; k < 2; ++k) dot += k < y.count ? gated(y.values[k], z.far[k]) : T(0);
  const bool number = z.label[0] == z.label[0];
  return {dot, T(number && rank < 1), T(number && rank < 5)};
}

// A teacher's softmax; returns the sum over j != y of e_j (u_t,j - u_z,j).
template <class T, class S, class Team>
KDFUSE_HD T teach(const Team& team, const Task& p, const Target<T>& y, const Span& span, Logits<T, S>& t,
                  const Logits<T>& z) {
  T sums[1];
  exponentiate(team, p, y, span, t, false, sums, [&](int i, const T(&x)[kChunk], const T(&e)[kChunk], T* sum) {
    T other[kChunk];
    read(team, p, z.source, y, span, i, other);
#pragma unroll
    for (int v = 0; v < kChunk; ++v) {
      const T gap = t.units.of(x[v]) - z.units.of(other[v]);
      sum[0] = e[v] > T(0) ? std::fma(e[v], gap, sum[0]) : sum[0];
    }
  });
  return Base<T>::log * sums[0];
}

// The gradient of one row in its coefficients, weighted by what the row counts for.
template <class T>
struct Gradient {
  T a, c;  // of the exponentials at T and at T = 1
  T soft;  // of the class probabilities
  T label[2];
};

// Adds weight * CE at T = 1 to the gradient; returns CE.
template <class T>
KDFUSE_HD T add_cross_entropy(const Logits<T>& z, const Target<T>& y, T dot, T weight, Gradient<T>& g) {
  const T value = cross_entropy(z.at1, y.mass, dot);
  if (weight == T(0)) return value;
  g.c += weight * y.mass * z.at1.unit;
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    if (k < y.count) g.label[k] += weight * (y.mass * std::exp(z.log_label(k)) - y.values[k]);
  }
  g.soft -= weight;
  return value;
}

KDFUSE_HD double number(const Numbers& n, int64_t row) {
  return n.type == DType::f64 ? static_cast<const double*>(n.data)[row * n.stride]
                              : static_cast<const float*>(n.data)[row * n.stride];
}

// What a row's loss counts for in what is differentiated.
template <class T>
KDFUSE_HD T row_weight(const Task& p, int64_t row) {
  return static_cast<T>(p.upstream.data ? p.batch->scale * number(p.upstream, row) : p.batch->scale);
}

// out += scale * e, for a scale other than 0: whatever a row without weight holds.
template <class T>
KDFUSE_HD void add_exponentials(T (&out)[kChunk], T scale, const Units<T>& units, const T (&x)[kChunk]) {
  if (scale == T(0)) return;
#pragma unroll
  for (int v = 0; v < kChunk; ++v) out[v] += scale * power(units.of(x[v]));
}

// add(i, x, g) adds the op's own rows, weighted, to chunk i of the gradient; x: the logits. Each
// product is rounded by itself, so that equal rows with opposite factors cancel to exactly 0.
template <class T, class Team, class F>
KDFUSE_HD void write_gradient(const Team& team, const Task& p, int which, int64_t row, const Target<T>& y,
                              const Span& span, const Logits<T>& z, const Gradient<T>& g, T weight, F add) {
  const Sink<T> sink = open<T>(p, p.gradients[which], row, span);
  const T a = weight * g.a, c = weight * g.c, soft = weight * g.soft;
#pragma unroll 1
  for (int i = team.rank(); i < span.chunks; i += team.size()) {
    T x[kChunk], out[kChunk];
    read(team, p, z.source, y, span, i, x);
#pragma unroll
    for (int v = 0; v < kChunk; ++v) out[v] = 0;
    add_exponentials(out, a, z.units, x);
    add(i, x, out);
    add_exponentials(out, c, z.units1, x);
    if (y.soft && soft != T(0)) {
      T q[kChunk];
      read(team, p, y.source, y, span, i, q);
#pragma unroll
      for (int v = 0; v < kChunk; ++v) out[v] += soft * q[v];
    }
    set_labels(y, span, i, weight * g.label[0], weight * g.label[1], out);
    write_output(sink, span, i, out);
  }
}

// A row that takes no part: no loss, no gradient.
template <class T, class Team>
KDFUSE_HD void write_nothing(const Team& team, const Task& p, int64_t row, const Span& span) {
  for (int k = team.rank(); k <= p.num_terms; k += team.size()) p.out[row * (1 + p.num_terms) + k] = 0;
  if (!p.with_gradient) return;
  const T zeros[kChunk] = {};
  for (int s = 0; s < p.num_students; ++s) {
    const Sink<T> sink = open<T>(p, p.gradients[s], row, span);
#pragma unroll 1
    for (int i = team.rank(); i < span.chunks; i += team.size()) write_output(sink, span, i, zeros);
  }
}

// The row's loss and terms, from one of the team.
template <int n, class T, class Team>
KDFUSE_HD void write_values(const Team& team, const Task& p, int64_t row, int first, const T (&values)[n]) {
  if (team.rank() != 0) return;
#pragma unroll
  for (int k = 0; k < n; ++k) p.out[row * (1 + p.num_terms) + first + k] = values[k];
}

}  // namespace kdfuse
