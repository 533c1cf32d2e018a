// The parts of rows of tf-NKD and SLKD: the loss of each row from the statistics of all its classes, and the gradient
// of one part of them.
#pragma once
#include "../losses/tf_nkd.h"
#include "each_row.h"

namespace kdfuse {
namespace {  // each level compiles its own copy, none may leak into another

inline SplitPlan tf_nkd_plan(const double*) { return {}; }
inline SplitPlan slkd_plan(const double* params) {
  const double temperature = SlkdParams(params).temperature;
  return {temperature, temperature, false, true, true};
}

template <class T>
void split_tf_nkd_row(const SplitProblem& p, int64_t row, Scratch<T>& scratch) {
  const TfNkdParams q(p.params);
  T* const base = scratch.rows(1, padded(p.classes));
  const double* const in = p.merged + row * p.layout.width();
  const auto target = split_target<T>(p, row);
  const Merged whole = merged(in + p.layout.of_set(0), 1);
  auto z = known(p, whole, base);

  const double w = smoothed_weight(p.scores[2 * row], 1., p.score_mean[0]);
  const double value = gated(w, -z.at1.log_label);
  Gradient<T> g;
  g.c = q.weight * w * z.at1.unit;
  g.label[0] = q.weight * w * std::expm1(z.at1.log_label);
  const double ce = add_cross_entropy(z, target, whole.label - whole.peak, q.ce_weight, g);

  double* const out = p.out + row * (1 + p.num_terms);
  const SplitHits hit = hits(in + p.layout.of_ranks(0));
  const double values[] = {gated(q.weight, value) + gated(q.ce_weight, ce), value, ce, hit.top1, hit.top5};
  std::copy(values, values + 5, out);
  if (!p.gradients) return;
  const Factors factors = make_part(p, z, p.students[0], row, target, 1, true, base, 0);
  write_part(p, 0, row, 1, z, g, target, factors);
}

template <class T>
void split_slkd_row(const SplitProblem& p, int64_t row, Scratch<T>& scratch) {
  const SlkdParams q(p.params);
  const SplitLayout& layout = p.layout;
  const int64_t length = padded(p.classes);
  const int slt_count = p.num_students - 1;
  T* const base = scratch.rows(p.num_students + 4, length);
  T *const x_t = base + p.num_students * length, *const x_f = x_t + length, *const pull = x_f + length;
  T* const spare = pull + length;
  const double* const in = p.merged + row * layout.width();
  const auto target = split_target<T>(p, row);
  Logits<T> students[kMaxStreams];
  Merged wholes[kMaxStreams];
  for (int k = 0; k < p.num_students; ++k) {
    wholes[k] = merged(in + layout.of_set(k), q.temperature);
    students[k] = known(p, wholes[k], base + k * length);
  }
  const Merged whole_f = merged(in + layout.of_set(p.num_students + 1), q.temperature);
  auto t = known(p, merged(in + layout.of_set(p.num_students), q.temperature), x_t), f = known(p, whole_f, x_f);
  auto& z = students[0];
  const auto pair = kl(z.stats, z.at, t.stats, t.at, in[layout.of_pair(0)]);
  const auto fused = kl(z.stats, z.at, f.stats, f.at, in[layout.of_pair(1)]);

  const double step = q.square / q.temperature;
  // The student reads its own row last: `pull` needs the logits of z beside the exponentials of f.
  Factors of_t = {}, of_f = {}, factors = {};
  if (p.gradients) {
    of_t = make_part(p, t, p.teachers[0], row, target, q.temperature, false, spare);
    double away = 0;
    for (int k = 0; k < slt_count; ++k) {
      auto& s = students[1 + k];
      const double moved = read_part(p, s, p.students[1 + k], row, target, q.temperature, 1 + k);
      away += gated(q.fusion[k], moved);
    }
    fuse(p, q, students + 1, slt_count, x_f);
    f.peak = static_cast<T>(whole_f.peak - away);
    f.ahead = z.ahead = next_row(p, p.students[0], row, 0);
    away += centred(p, f, q.temperature);
    read_part(p, z, p.students[0], row, target, q.temperature, 0);
    const Units<T> units_f(q.temperature, f.peak), units_z(q.temperature, z.peak);
    const double drift_f = drift_of(f, whole_f.peak - away, q.temperature).at;
    const double drift_z = drift_of(z, z.peak, q.temperature).at;
    const T log_base = static_cast<T>(units_z.log_base), drift = static_cast<T>(fused.drift + (drift_f - drift_z));
    const typename Simd<T>::vec zero = {};
    for (int64_t i = 0; !q.detach && i < length; i += Simd<T>::lanes) {
      const auto u = units_f.of(load(x_f + i)), e = power(u);
      store(pull + i, e > zero ? e * ((u - units_z.of(load(z.x + i))) * log_base - drift) : zero);
    }
    of_f = exponentials_of(p, f, whole_f.peak - away, q.temperature, false, spare);
    factors = exponentials_of(p, z, static_cast<double>(z.peak), q.temperature, true, spare);
  }

  Gradient<T> g;
  const auto of_pair = gated(q.kd_weight, pair), of_fused = gated(q.fused_kd_weight, fused);
  g.a = step * (of_pair.a + of_fused.a);
  g.label[0] = step * (of_pair.label + of_fused.label);
  g.add(x_t, gated(-step * of_pair.b, of_t.at));
  g.add(x_f, gated(-step * of_fused.b, of_f.at));
  const double ce_weight = q.ce_weight + q.fused_ce_weight;
  const double ce = add_cross_entropy(z, target, wholes[0].label - wholes[0].peak, ce_weight, g);
  if (p.gradients) write_part(p, 0, row, q.temperature, z, g, target, factors);

  double* const out = p.out + row * (1 + p.num_terms);
  const double kd_value = q.square * pair.value, fused_value = q.square * fused.value;
  double loss = gated(ce_weight, ce) + gated(q.kd_weight, kd_value) + gated(q.fused_kd_weight, fused_value);
  const SplitHits hit = hits(in + layout.of_ranks(0));
  const double values[] = {loss, kd_value, fused_value, ce, hit.top1, hit.top5};
  std::copy(values, values + 6, out);

  for (int k = 0; k < slt_count; ++k) {
    auto& s = students[1 + k];
    const auto own = kl(s.stats, s.at, t.stats, t.at, in[layout.of_pair(2 + k)]);
    Gradient<T> gs;
    const auto asked = gated(q.kd_weight, own);
    gs.a = step * asked.a;
    gs.label[0] = step * asked.label;
    gs.add(x_t, gated(-step * asked.b, of_t.at));
    if (!q.detach) {
      gs.add(pull, gated(q.fusion[k] * step * of_fused.b, of_f.at));
      const double gap = gated(f.at.label, f.stats.label - z.stats.label - fused.drift);
      gs.label[0] += gated(q.fusion[k] * q.fused_kd_weight * step, gap);
    }
    const double slt_ce = add_cross_entropy(s, target, wholes[1 + k].label - wholes[1 + k].peak, q.ce_weight, gs);
    if (p.gradients) {
      const double peak = static_cast<double>(s.peak);
      const Factors of_s = exponentials_of(p, s, peak, q.temperature, true, spare);
      write_part(p, 1 + k, row, q.temperature, s, gs, target, of_s);
    }
    const double slt_kd = q.square * own.value;
    const SplitHits slt_hit = hits(in + layout.of_ranks(1 + k));
    const double slt_values[] = {slt_kd, slt_ce, slt_hit.top1, slt_hit.top5};
    std::copy(slt_values, slt_values + 4, out + 6 + 4 * k);
    loss += gated(q.kd_weight, slt_kd) + gated(q.ce_weight, slt_ce);
  }
  out[0] = loss;
}

}  // namespace
}  // namespace kdfuse
