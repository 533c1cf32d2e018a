// The row pass of a team, part by part: a row's softmaxes, what they give, and its gradient.
//
// A row is gone through three times: for the peaks (any_read.h), for the sums, and for the gradient.
#pragma once
#include "any_read.h"

namespace kdfuse {

// The softmaxes of logits. add(i, x, e, more) adds the op's own sums over the rest to `more`.
template <int n, class T, class S, class Team, class F>
KDFUSE_DEVICE void exponentiate(const Team& team, const Task& p, const Target<T>& y, const Span& span, Logits<T, S>& z,
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
KDFUSE_DEVICE void add_weighted(T& sum, const T (&w)[kChunk], const Units<T>& units, const T (&x)[kChunk]) {
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
KDFUSE_DEVICE T ahead(const Target<T>& y, const Span& span, int i, T value, const T (&x)[kChunk]) {
  int count = 0;
  const int before = y.labels[0] - span.first(i);
#pragma unroll
  for (int v = 0; v < kChunk; ++v) count += !(x[v] < value) && (v < before || x[v] != value);
  return static_cast<T>(count);
}

template <class T, class Team>
KDFUSE_DEVICE Seen<T> see(const Team& team, const Task& p, const Target<T>& y, const Span& span, Logits<T>& z,
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

// A teacher's softmax, also at T = 1 where at_one; returns the sum over j != y of e_j (u_t,j - u_z,j), or without
// entropy of e_j u_z,j.
template <bool entropy = true, class T, class S, class Team>
KDFUSE_DEVICE T teach(const Team& team, const Task& p, const Target<T>& y, const Span& span, Logits<T, S>& t,
                      const Logits<T>& z, bool at_one = false) {
  T sums[1];
  exponentiate(team, p, y, span, t, at_one, sums, [&](int i, const T(&x)[kChunk], const T(&e)[kChunk], T* sum) {
    T other[kChunk];
    read(team, p, z.source, y, span, i, other);
#pragma unroll
    for (int v = 0; v < kChunk; ++v) {
      const T of_z = z.units.of(other[v]), gap = entropy ? t.units.of(x[v]) - of_z : of_z;
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
KDFUSE_DEVICE T add_cross_entropy(const Logits<T>& z, const Target<T>& y, T dot, T weight, Gradient<T>& g) {
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

// out += scale * e, for a scale other than 0: whatever a row without weight holds.
template <class T>
KDFUSE_DEVICE void add_exponentials(T (&out)[kChunk], T scale, const Units<T>& units, const T (&x)[kChunk]) {
  if (scale == T(0)) return;
#pragma unroll
  for (int v = 0; v < kChunk; ++v) out[v] += scale * power(units.of(x[v]));
}

// add(i, x, g) adds the op's own rows, weighted, to chunk i of the gradient; x: the logits. Each
// product is rounded by itself, so that equal rows with opposite factors cancel to exactly 0.
template <class T, class Team, class F>
KDFUSE_DEVICE void write_gradient(const Team& team, const Task& p, int which, int64_t row, const Target<T>& y,
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
KDFUSE_DEVICE void write_nothing(const Team& team, const Task& p, int64_t row, const Span& span) {
  write_no_values(team, p, row);
  if (!p.with_gradient) return;
  const T zeros[kChunk] = {};
  for (int s = 0; s < p.num_students; ++s) {
    const Sink<T> sink = open<T>(p, p.gradients[s], row, span);
#pragma unroll 1
    for (int i = team.rank(); i < span.chunks; i += team.size()) write_output(sink, span, i, zeros);
  }
}

}  // namespace kdfuse
