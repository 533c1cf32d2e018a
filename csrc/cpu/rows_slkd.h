// The rows of SLKD on the CPU: a student and its SL-Ts under one teacher.
#pragma once
#include <alloca.h>

#include <algorithm>
#include <new>

#include "../losses/slkd.h"
#include "row_parts.h"

namespace kdfuse {
namespace {

// The fused teacher f = sum_k fusion_k s_k; a weight of 0 leaves its SL-T out, whatever it holds.
template <class T>
Logits<T> fuse(const Problem& p, const SlkdParams<double>& q, const Logits<T>* slts, int count, T* f) {
  const int64_t length = padded(p.classes);
  std::fill(f, f + length, T(0));
  Logits<T> fused;
  fused.x = f;
  double label = 0;
  for (int k = 0; k < count; ++k) {
    const T w = static_cast<T>(q.fusion[k]);
    if (w == T(0)) continue;
    label += q.fusion[k] * slts[k].label[0];
    for (int64_t i = 0; i < length; i += Simd<T>::lanes) store(f + i, load(f + i) + load(slts[k].x + i) * w);
  }
  fused.label[0] = static_cast<T>(label);
  fused.labelled = true;
  const T peak = row_max(f, length);
  fused.peak = peak != -INFINITY ? peak : label != -INFINITY ? fused.label[0] : T(0);
  return fused;
}

template <class T>
void slkd_row(const Problem& p, int64_t row, Scratch<T>& scratch) {
  const SlkdParams q(p.params);
  const int64_t length = padded(p.classes);
  const int slt_count = p.num_students - 1;
  T* const base = scratch.rows(8 + 2 * slt_count, length);
  const auto at = [&](int k) { return base + k * length; };
  const auto target = read_target(p, row, 1, at(0));
  auto z = read_logits(p, p.students[0], row, target, at(1), 0);
  auto t = read_teacher(p, p.teachers[0], row, target, at(4), q.temperature);
  Logits<T>* const slts = static_cast<Logits<T>*>(alloca(slt_count * sizeof(Logits<T>)));
  for (int k = 0; k < slt_count; ++k)
    new (&slts[k]) Logits<T>(read_logits(p, p.students[1 + k], row, target, at(8 + 2 * k), 1 + k));
  const Hits hit = rank_student(p, z, target, q.temperature);
  Hits* const slt_hits = static_cast<Hits*>(alloca(slt_count * sizeof(Hits)));
  for (int k = 0; k < slt_count; ++k) slt_hits[k] = rank_student(p, slts[k], target, q.temperature);
  auto f = fuse(p, q, slts, slt_count, at(6));
  f.ahead = z.ahead;
  centre(p, f, q.temperature);

  const double dot = target_dot(p, z, target, q.temperature);
  const double crossed = teach(p, t, q.temperature, z, q.temperature, at(5));
  const double fused_crossed = teach(p, f, q.temperature, z, q.temperature, at(7));
  exponentiate(p, z, q.temperature, true, at(2), at(3));
  const auto pair = kl(z.stats, z.at, t.stats, t.at, crossed);
  const auto fused = kl(z.stats, z.at, f.stats, f.at, fused_crossed);

  const double step = q.square / q.temperature;
  Gradient<T> g;
  const auto of_pair = gated(q.kd_weight, pair), of_fused = gated(q.fused_kd_weight, fused);
  g.a = step * (of_pair.a + of_fused.a);
  g.label[0] = step * (of_pair.label + of_fused.label);
  g.add(at(5), -step * of_pair.b);
  g.add(at(7), -step * of_fused.b);
  const double ce_weight = q.ce_weight + q.fused_ce_weight;
  const double ce = add_cross_entropy(z, target, dot, ce_weight, g);
  if (p.gradients) write_gradient(p, 0, row, q.temperature, z, g, target);

  // e_f,j (u_f,j - u_z,j - D), the direction in which the student pulls the SL-Ts.
  T* const pull = at(6);
  const Units<T> units(q.temperature, z.peak), of_f(q.temperature, f.peak), of_t(q.temperature, t.peak);
  if (!q.detach && p.gradients) {
    const T drift = static_cast<T>(fused.drift), log_base = static_cast<T>(units.log_base);
    const typename Simd<T>::vec zero = {};
    for (int64_t i = 0; i < length; i += Simd<T>::lanes) {
      const auto e = load(at(7) + i);
      store(pull + i, e > zero ? e * ((of_f.of(load(f.x + i)) - units.of(load(z.x + i))) * log_base - drift) : zero);
    }
  }

  double* out = p.out + row * (1 + p.num_terms);
  const double kd_value = q.square * pair.value, fused_value = q.square * fused.value;
  double loss = gated(ce_weight, ce) + gated(q.kd_weight, kd_value) + gated(q.fused_kd_weight, fused_value);
  const double values[] = {loss, kd_value, fused_value, ce, hit.top1, hit.top5};
  std::copy(values, values + 6, out);

  for (int k = 0; k < slt_count; ++k) {
    auto& s = slts[k];
    const double slt_dot = target_dot(p, s, target, q.temperature);
    const double slt_crossed = cross(at(5), t.x, of_t, s.x, Units<T>(q.temperature, s.peak), length);
    exponentiate(p, s, q.temperature, true, s.x, at(9 + 2 * k));
    const auto own = kl(s.stats, s.at, t.stats, t.at, slt_crossed);
    Gradient<T> gs;
    const auto asked = gated(q.kd_weight, own);
    gs.a = step * asked.a;
    gs.label[0] = step * asked.label;
    gs.add(at(5), -step * asked.b);
    if (!q.detach) {
      gs.add(pull, q.fusion[k] * step * of_fused.b);
      const double gap = gated(f.at.label, f.stats.label - z.stats.label - fused.drift);
      gs.label[0] += gated(q.fusion[k] * q.fused_kd_weight * step, gap);
    }
    const double slt_ce = add_cross_entropy(s, target, slt_dot, q.ce_weight, gs);
    if (p.gradients) write_gradient(p, 1 + k, row, q.temperature, s, gs, target);
    const double slt_kd = q.square * own.value;
    const double slt_values[] = {slt_kd, slt_ce, slt_hits[k].top1, slt_hits[k].top5};
    std::copy(slt_values, slt_values + 4, out + 6 + 4 * k);
    loss += gated(q.kd_weight, slt_kd) + gated(q.ce_weight, slt_ce);
  }
  out[0] = loss;
}

}  // namespace
}  // namespace kdfuse
