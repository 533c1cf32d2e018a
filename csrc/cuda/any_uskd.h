// USKD for a team of threads. Its Zipf weights come from a sort of the row in the team's memory.
#pragma once
#include <type_traits>

#include "../losses/uskd.h"
#include "any_others.h"

namespace kdfuse {

// The classes of a row by falling key, then by rising class. Once they are sorted, the rank of class j stands at
// keys[j].
template <class T>
struct Ranking {
  using Key = std::conditional_t<sizeof(T) == sizeof(float), uint32_t, uint64_t>;
  Key* keys;
  uint16_t* classes;

  KDFUSE_DEVICE_MEMBER void sort_two(int i, int j) const {
    const Key a = keys[i], b = keys[j];
    const uint16_t of_a = classes[i], of_b = classes[j];
    if (a < b || (a == b && of_a < of_b)) return;
    keys[i] = b, keys[j] = a;
    classes[i] = of_b, classes[j] = of_a;
  }
};

// Numbers in falling order as unsigned integers in rising order; NaN comes first.
KDFUSE_DEVICE uint32_t falling(float x) {
  const uint32_t bits = as_bits(x == x ? x + 0.f : INFINITY);
  return bits >> 31 ? bits : ~(bits | 0x80000000u);
}

KDFUSE_DEVICE uint64_t falling(double x) {
  const double number = x == x ? x + 0. : INFINITY;
  uint64_t bits;
  memcpy(&bits, &number, sizeof(bits));
  return bits >> 63 ? bits : ~(bits | uint64_t{1} << 63);
}

// A bitonic sort of n entries. A merge begins with a comparison from both ends, so that every step puts the smaller
// entry first: what would fill n up to a power of 2 stays behind all, and needs no memory.
template <class T, class Team>
KDFUSE_DEVICE void bitonic_sort(const Team& team, const Ranking<T>& x, int n) {
#pragma unroll 1
  for (int size = 2; size / 2 < n; size *= 2) {
#pragma unroll 1
    for (int stride = size / 2; stride > 0; stride /= 2) {
      team.sync();
#pragma unroll 1
      for (int k = team.rank();; k += team.size()) {
        const int place = k & (stride - 1), first = 2 * (k - place), i = first + place;
        if (i >= n) break;
        const int j = stride == size / 2 ? first + size - 1 - place : i + stride;
        if (j < n) x.sort_two(i, j);
      }
    }
  }
  team.sync();
}

// The sort stands behind the rows that the team holds.
template <class T, class Team>
KDFUSE_DEVICE Ranking<T> sort_space(const Team& team, const Task& p) {
  auto* const keys = reinterpret_cast<typename Ranking<T>::Key*>(held_row<T>(team, p, p.held));
  return {keys, reinterpret_cast<uint16_t*>(keys + p.classes)};
}

// Ranks the classes by W_j / (1 - W_t) + s_j / (1 - s_t), with s the student's log-probabilities or
// probabilities.
template <class T, class Team>
KDFUSE_DEVICE void rank_classes(const Team& team, const Task& p, const Target<T>& y, const Span& span,
                                const Logits<T>& z, const Logits<T>& w, bool paper, const Ranking<T>& order) {
  T of_weak[2] = {0, 0}, of_student[2] = {0, 0};
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    if (k >= y.count) continue;
    of_weak[k] = std::exp(w.log_label(k));
    of_student[k] = paper ? std::exp(z.log_label(k)) : z.log_label(k);
  }
  const auto scale = rank_scale(of_weak[0] + of_weak[1], of_student[0] + of_student[1]);
  const T weak_unit = scale.weak * w.at1.unit;
  const T first = of_weak[0] * scale.weak + of_student[0] * scale.student;
  const T second = of_weak[1] * scale.weak + of_student[1] * scale.student;
#pragma unroll 1
  for (int i = team.rank(); i < span.chunks; i += team.size()) {
    T xz[kChunk], xw[kChunk], key[kChunk];
    read(team, p, z.source, y, span, i, xz);
    read(team, p, w.source, y, span, i, xw);
#pragma unroll
    for (int v = 0; v < kChunk; ++v) {
      const T own = paper ? power(z.units1.of(xz[v])) * z.at1.unit : z.units1.natural(xz[v]) - z.at1.lse;
      key[v] = power(w.units1.of(xw[v])) * weak_unit + own * scale.student;
    }
    set_labels(y, span, i, first, second, key);
#pragma unroll
    for (int v = 0; v < kChunk; ++v) {
      const int j = span.first(i) + v;
      if (j >= 0 && j < p.classes) order.keys[j] = falling(key[v]), order.classes[j] = static_cast<uint16_t>(j);
    }
  }
  bitonic_sort(team, order, p.classes);
#pragma unroll 1
  for (int r = team.rank(); r < p.classes; r += team.size()) order.keys[order.classes[r]] = r;
  team.sync();
}

// The Zipf weights of chunk i before they are made to sum to 1: 1 / rank, the targets' at 0.
template <class T>
KDFUSE_DEVICE void zipf(const Ranking<T>& order, const Target<T>& y, const Span& span, int i, T (&x)[kChunk]) {
#pragma unroll
  for (int v = 0; v < kChunk; ++v) {
    const int j = span.first(i) + v;
    x[v] = j >= 0 && j < span.classes ? T(1) / static_cast<T>(order.keys[j] + 1) : T(0);
  }
  set_labels(y, span, i, T(0), T(0), x);
}

template <class T, class Team>
KDFUSE_DEVICE void uskd_row(const Team& team, const Task& p, int64_t row, const Span& span) {
  const UskdParams q(p.params);
  const T weight = row_weight<T>(team, p, row), beta = T(q.beta);
  const auto y = read_target<T>(team, p, row, span, 2);
  auto z = read_logits<T>(team, p, 0, row, y, span, T(1));
  auto w = read_logits<T>(team, p, 1, row, y, span, T(1));
  const auto seen = see(team, p, y, span, z, true);

  // The weak head's cross-entropy against 0.9 y + 0.1 / C: the sums of u_j and of y_j u_j.
  T plain[2];
  exponentiate(team, p, y, span, w, true, plain, [&](int i, const T(&x)[kChunk], const T(&)[kChunk], T* sum) {
    T ones[kChunk], soft[kChunk];
#pragma unroll
    for (int v = 0; v < kChunk; ++v) ones[v] = span.first(i) + v >= 0 && span.first(i) + v < p.classes;
    set_labels(y, span, i, T(0), T(0), ones);
    add_weighted(sum[0], ones, w.units1, x);
    if (!y.soft) return;
    read(team, p, y.source, y, span, i, soft);
    add_weighted(sum[1], soft, w.units1, x);
  });
  T all = Base<T>::log * plain[0], dot = Base<T>::log * plain[1];
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    if (k < y.count) all += w.far[k], dot += gated(y.values[k], w.far[k]);
  }
  const T keep = T(1 - kSmooth), share = T(kSmooth) / p.classes, weak_mass = keep * y.mass + T(kSmooth);
  join_labels(w, y);
  join_labels(z, y);

  const Ranking<T> order = sort_space<T>(team, p);
  rank_classes(team, p, y, span, z, w, q.paper_rank != 0, order);
  T sums[2] = {0, 0};  // of the Zipf weights, and of them times u_j
#pragma unroll 1
  for (int i = team.rank(); i < span.chunks; i += team.size()) {
    T share_of[kChunk], x[kChunk];
    zipf(order, y, span, i, share_of);
    read(team, p, z.source, y, span, i, x);
#pragma unroll
    for (int v = 0; v < kChunk; ++v) sums[0] += share_of[v];
    add_weighted(sums[1], share_of, z.units1, x);
  }
  team.sum(sums);
  const T unit = sums[0] > T(0) ? T(1) / sums[0] : T(0);

  const T weak = weak_mass * w.at1.lse - (keep * dot + share * all);
  const T others = z.stats.sum > T(0) ? lse_rest(z.stats) - Base<T>::log * sums[1] * unit : T(0);
  Gradient<T> g = {}, gw = {0, T(q.mu) * weak_mass * w.at1.unit, -T(q.mu) * keep, {0, 0}};
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    if (k >= y.count) continue;
    gw.label[k] = T(q.mu) * (weak_mass * std::exp(w.log_label(k)) - keep * y.values[k] - share);
  }
  const T smoothed = add_smoothed_target(team, p, row, z, y, T(q.alpha), g);
  g.c += z.stats.sum > T(0) ? beta / z.stats.sum : T(0);
  const T ce = add_cross_entropy(z, y, seen.dot, T(q.ce_weight), g);
  const T loss = gated(T(q.alpha), smoothed) + gated(beta, others) + gated(T(q.mu), weak) + gated(T(q.ce_weight), ce);
  write_values(team, p, row, 0, {loss, smoothed, others, weak, ce, seen.top1, seen.top5});
  if (!p.with_gradient) return;
  write_gradient(team, p, 0, row, y, span, z, g, weight, [&](int i, const T(&)[kChunk], T(&out)[kChunk]) {
    T share_of[kChunk];
    zipf(order, y, span, i, share_of);
#pragma unroll
    for (int v = 0; v < kChunk; ++v) out[v] -= weight * beta * unit * share_of[v];
  });
  write_gradient(team, p, 1, row, y, span, w, gw, weight, [&](int, const T(&)[kChunk], T(&out)[kChunk]) {
#pragma unroll
    for (int v = 0; v < kChunk; ++v) out[v] -= weight * T(q.mu) * share;
  });
}

}  // namespace kdfuse
