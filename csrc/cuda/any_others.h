// The rows of tf-NKD and SLKD, written once for any team of threads. `row` is one that counts.
#pragma once
#include "../losses/slkd.h"
#include "any_row.h"

namespace kdfuse {

// Of two labels neither is in the statistics: their logits join the softmax at T = 1 here.
template <class T>
KDFUSE_DEVICE void join_labels(Logits<T>& z, const Target<T>& y) {
  if (y.count < 2) return;
  T lse = z.at1.lse;
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    const T label = z.far[k], high = lse > label ? lse : label, low = lse > label ? label : lse;
    lse = low == T(-INFINITY) ? high : high + std::log1p(std::exp(low - high));
  }
  z.at1.lse = lse;
  z.at1.unit = std::exp(-lse);
}

template <class T, class Team>
KDFUSE_DEVICE void label_scores(const Team& team, const Task& p, int64_t row, const Span& span, bool squared) {
  const auto y = read_target<T>(team, p, row, span, 2);
  auto z = read_logits<T>(team, p, 0, row, y, span, T(1));
  T none[1];
  exponentiate(team, p, y, span, z, true, none, [](int, const T(&)[kChunk], const T(&)[kChunk], T*) {});
  join_labels(z, y);
  T scores[2];
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    scores[k] = k < y.count ? std::exp(z.log_label(k)) : T(0);
    if (squared) scores[k] *= scores[k];
  }
  put_scores(team, p, row, scores[0], scores[1]);
}

template <class T, class Team>
KDFUSE_DEVICE void tf_nkd_score(const Team& team, const Task& p, int64_t row, const Span& span) {
  label_scores<T>(team, p, row, span, false);
}

template <class T, class Team>
KDFUSE_DEVICE void uskd_score(const Team& team, const Task& p, int64_t row, const Span& span) {
  label_scores<T>(team, p, row, span, true);
}

// Adds weight * sum_t -w_t log S_t to the gradient; returns the sum.
template <class T, class Team>
KDFUSE_DEVICE T add_smoothed_target(const Team& team, const Task& p, int64_t row, const Logits<T>& z,
                                    const Target<T>& y, T weight, Gradient<T>& g) {
  T value = 0, total = 0;
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    if (k >= y.count) continue;
    const T w = smoothed_weight(T(p.scores[2 * row + k]), y.values[k], T(team.batch().score_mean[k]));
    value += gated(w, -z.log_label(k));
    total += w;
    g.label[k] -= weight * w;
  }
  g.c += weight * total * z.at1.unit;
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    if (k < y.count) g.label[k] += weight * total * std::exp(z.log_label(k));
  }
  return value;
}

template <class T, class Team>
KDFUSE_DEVICE void tf_nkd_row(const Team& team, const Task& p, int64_t row, const Span& span) {
  const TfNkdParams q(p.params);
  const auto y = read_target<T>(team, p, row, span, 2);
  auto z = read_logits<T>(team, p, 0, row, y, span, T(1));
  const auto seen = see(team, p, y, span, z, true);
  join_labels(z, y);

  Gradient<T> g = {};
  const T value = add_smoothed_target(team, p, row, z, y, T(q.weight), g);
  const T ce = add_cross_entropy(z, y, seen.dot, T(q.ce_weight), g);
  const T loss = gated(T(q.weight), value) + gated(T(q.ce_weight), ce);
  write_values(team, p, row, 0, {loss, value, ce, seen.top1, seen.top5});
  if (!p.with_gradient) return;
  write_gradient(team, p, 0, row, y, span, z, g, row_weight<T>(team, p, row),
                 [](int, const T(&)[kChunk], T(&)[kChunk]) {});
}

// The fused teacher f = sum_k fusion_k s_k; a weight of 0 leaves its SL-T out, whatever it holds.
template <class T>
struct Fused {
  int64_t row;
  const double* fusion;
  int held;
};

template <class T, class Team>
KDFUSE_DEVICE void fuse(const Team& team, const Task& p, const Fused<T>& f, const Target<T>& y, const Span& span, int i,
                        T (&x)[kChunk]) {
#pragma unroll
  for (int v = 0; v < kChunk; ++v) x[v] = 0;
#pragma unroll 1
  for (int k = 1; k < p.num_students; ++k) {
    const T weight = T(f.fusion[k - 1]);
    if (weight == T(0)) continue;
    T s[kChunk];
    read(team, p, open<T>(p, p.logits[k], f.row, span, k, T(-INFINITY)), y, span, i, s);
#pragma unroll
    for (int v = 0; v < kChunk; ++v) x[v] += weight * s[v];
  }
}

template <class T, class Team>
KDFUSE_DEVICE void read(const Team& team, const Task& p, const Fused<T>& f, const Target<T>& y, const Span& span, int i,
                        T (&x)[kChunk]) {
  if (f.held >= 0) return get_held(team, p, f.held, span, i, x);
  fuse(team, p, f, y, span, i, x);
}

// After the first read of every SL-T.
template <class T, class Team>
KDFUSE_DEVICE Logits<T, Fused<T>> read_fused(const Team& team, const Task& p, const SlkdParams<double>& q, int64_t row,
                                             const Target<T>& y, const Span& span) {
  const int place = p.num_students + p.num_teachers + (p.soft.data != nullptr);
  Logits<T, Fused<T>> f = {};
  f.source = {row, q.fusion, place < p.held ? place : -1};
  f.labelled = true;
#pragma unroll 1
  for (int k = 1; k < p.num_students; ++k) {
    const auto s = open<T>(p, p.logits[k], row, span, k, T(-INFINITY));
    f.label[0] += gated(T(q.fusion[k - 1]), element(s, y.labels[0]));
  }
  T peak = -INFINITY;
#pragma unroll 1
  for (int i = team.rank(); i < span.chunks; i += team.size()) {
    T x[kChunk];
    fuse(team, p, f.source, y, span, i, x);
#pragma unroll
    for (int v = 0; v < kChunk; ++v) peak = x[v] > peak ? x[v] : peak;
    if (f.source.held >= 0) hold(team, p, f.source.held, span, i, x);
  }
  set_peak(f, y, T(q.temperature), highest(team, peak));
  return f;
}

// out += scale * e_f,j (u_f,j - u_z,j - D), the direction in which the student pulls the SL-Ts.
template <class T, class Team>
KDFUSE_DEVICE void add_pull(const Team& team, const Task& p, const Target<T>& y, const Span& span, int i,
                            const Logits<T>& z, const Logits<T, Fused<T>>& f, T drift, T scale, T (&out)[kChunk]) {
  T x[kChunk], of_z[kChunk];
  read(team, p, f.source, y, span, i, x);
  read(team, p, z.source, y, span, i, of_z);
#pragma unroll
  for (int v = 0; v < kChunk; ++v) {
    const T e = power(f.units.of(x[v]));
    const T gap = Base<T>::log * (f.units.of(x[v]) - z.units.of(of_z[v])) - drift;
    out[v] += e > T(0) ? scale * (e * gap) : T(0);
  }
}

template <class T, class Team>
KDFUSE_DEVICE void slkd_row(const Team& team, const Task& p, int64_t row, const Span& span) {
  const SlkdParams q(p.params);
  const T temperature = T(q.temperature), square = T(q.square), kd_weight = T(q.kd_weight);
  const T weight = row_weight<T>(team, p, row), step = square / temperature, fused_weight = T(q.fused_kd_weight);
  const auto y = read_target<T>(team, p, row, span, 1);
  auto z = read_logits<T>(team, p, 0, row, y, span, temperature);
  auto t = read_logits<T>(team, p, p.num_students, row, y, span, temperature);
#pragma unroll 1
  for (int k = 1; k < p.num_students; ++k) {
    const T peak = read_first(team, p, open_logits<T>(p, k, row, y, span).source, y, span);
    if (team.rank() == 0) notes<T>(team, k)[0] = peak;
  }
  auto f = read_fused(team, p, q, row, y, span);
  const auto seen = see(team, p, y, span, z, true);
  const T crossed = teach(team, p, y, span, t, z), fused_crossed = teach(team, p, y, span, f, z);
  const auto pair = kl(z.stats, z.at, t.stats, t.at, crossed);
  const auto fused = kl(z.stats, z.at, f.stats, f.at, fused_crossed);

  const auto of_pair = gated(kd_weight, pair), of_fused = gated(fused_weight, fused);
  Gradient<T> g = {step * (of_pair.a + of_fused.a), 0, 0, {step * (of_pair.label + of_fused.label), 0}};
  const T ce_weight = T(q.ce_weight + q.fused_ce_weight);
  const T ce = add_cross_entropy(z, y, seen.dot, ce_weight, g);
  if (p.with_gradient) {
    const T b = weight * (-step * of_pair.b), of_f = weight * (-step * of_fused.b);
    write_gradient(team, p, 0, row, y, span, z, g, weight, [&](int i, const T(&)[kChunk], T(&out)[kChunk]) {
      T x[kChunk];
      read(team, p, t.source, y, span, i, x);
      add_exponentials(out, b, t.units, x);
      read(team, p, f.source, y, span, i, x);
      add_exponentials(out, of_f, f.units, x);
    });
  }
  const T kd_value = square * pair.value, fused_value = square * fused.value;
  T loss = gated(ce_weight, ce) + gated(kd_weight, kd_value) + gated(fused_weight, fused_value);
  write_values(team, p, row, 1, {kd_value, fused_value, ce, seen.top1, seen.top5});

  team.sync();
#pragma unroll 1
  for (int k = 1; k < p.num_students; ++k) {
    auto s = open_logits<T>(p, k, row, y, span);
    set_peak(s, y, temperature, notes<T>(team, k)[0]);
    const auto of_s = see(team, p, y, span, s, true);
    const T slt_crossed = teach(team, p, y, span, t, s);
    const auto own = kl(s.stats, s.at, t.stats, t.at, slt_crossed);
    const auto asked = gated(kd_weight, own);
    Gradient<T> gs = {step * asked.a, 0, 0, {step * asked.label, 0}};
    const T reach = q.detach ? T(0) : T(q.fusion[k - 1]);
    gs.label[0] += gated(reach * fused_weight * step * f.at.label, f.stats.label - z.stats.label - fused.drift);
    const T slt_ce = add_cross_entropy(s, y, of_s.dot, T(q.ce_weight), gs);
    if (p.with_gradient) {
      const T b = weight * (-step * asked.b), pull = weight * reach * step * of_fused.b;
      write_gradient(team, p, k, row, y, span, s, gs, weight, [&](int i, const T(&)[kChunk], T(&out)[kChunk]) {
        T x[kChunk];
        read(team, p, t.source, y, span, i, x);
        add_exponentials(out, b, t.units, x);
        if (pull != T(0)) add_pull(team, p, y, span, i, z, f, fused.drift, pull, out);
      });
    }
    const T slt_kd = square * own.value;
    write_values(team, p, row, 2 + 4 * k, {slt_kd, slt_ce, of_s.top1, of_s.top5});
    loss += gated(kd_weight, slt_kd) + gated(T(q.ce_weight), slt_ce);
  }
  write_values(team, p, row, 0, {loss});
}

}  // namespace kdfuse
