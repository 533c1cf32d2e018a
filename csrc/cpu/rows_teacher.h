// The rows of KD, DKD and NKD on the CPU: one student under teachers that are fixed.
#pragma once
#include <algorithm>

#include "../losses/dkd.h"
#include "../losses/kd.h"
#include "../losses/nkd.h"
#include "row_parts.h"

namespace kdfuse {
namespace {

template <class T>
void kd_row(const Problem& p, int64_t row, Scratch<T>& scratch) {
  const KdParams q(p.params);
  const int64_t length = padded(p.classes);
  T* const base = scratch.rows(p.num_teachers + 5, length);
  const auto target = read_target(p, row, 1, base);
  auto z = read_logits(p, p.students[0], row, target, base + length, 0);
  const Hits hit = rank_student(p, z, target, q.temperature);
  const double dot = target_dot(p, z, target, q.temperature);
  exponentiate(p, z, q.temperature, target.count > 0, base + 2 * length, base + 3 * length);

  Gradient<T> g;
  KdRow<double> kd;
  for (int k = 0; k < p.num_teachers; ++k) {
    if (q.weights[k] == 0) continue;  // whatever it holds
    T* const x = base + (5 + k) * length;
    auto t = read_any_teacher(p, k, row, target, x, base + 4 * length, q.temperature);
    const double crossed = teach(p, t, z, q.temperature, x);
    const auto pair = kl(z.stats, z.at, t.stats, t.at, crossed);
    const double scale = kd_add(kd, pair, kd_weight_of(q.weights[k], q.kd_weight, q.square, q.temperature));
    if (scale != 0) g.add(x, scale);
  }
  g.a = kd.a;
  g.label[0] = kd.label;
  const double ce = target.count ? add_cross_entropy(z, target, dot, q.ce_weight, g) : 0;

  double* const out = p.out + row * (1 + p.num_terms);
  const double values[] = {gated(q.kd_weight, kd.value) + gated(q.ce_weight, ce), kd.value, ce, hit.top1, hit.top5};
  std::copy(values, values + 5, out);
  if (p.gradients) write_gradient(p, 0, row, q.temperature, z, g, target);
}

template <class T>
void dkd_row(const Problem& p, int64_t row, Scratch<T>& scratch) {
  const DkdParams q(p.params);
  const int64_t length = padded(p.classes);
  T* const base = scratch.rows(4, length);
  const auto target = read_target(p, row, 1, base);
  auto z = read_logits(p, p.students[0], row, target, base + length, 0);
  auto t = read_teacher(p, p.teachers[0], row, target, base + 3 * length, q.temperature);
  const Hits hit = rank_student(p, z, target, q.temperature);
  const double dot = target_dot(p, z, target, q.temperature);
  const double crossed = teach(p, t, z, q.temperature, t.x);
  exponentiate(p, z, q.temperature, true, z.x, base + 2 * length);

  const auto r = dkd(q, z.stats, z.at, t.stats, t.at, crossed);
  Gradient<T> g;
  g.a = r.a;
  g.label[0] = r.label;
  g.add(t.x, r.b);
  const double ce = add_cross_entropy(z, target, dot, q.ce_weight, g);

  double* const out = p.out + row * (1 + p.num_terms);
  const double loss = gated(q.alpha, r.tckd) + gated(q.beta, r.nckd) + gated(q.ce_weight, ce);
  const double values[] = {loss, r.tckd, r.nckd, ce, hit.top1, hit.top5};
  std::copy(values, values + 6, out);
  if (p.gradients) write_gradient(p, 0, row, q.temperature, z, g, target);
}

template <class T>
void nkd_row(const Problem& p, int64_t row, Scratch<T>& scratch) {
  const NkdParams q(p.params);
  const int64_t length = padded(p.classes);
  T* const base = scratch.rows(6, length);
  const auto target = read_target(p, row, 1, base);
  auto z = read_logits(p, p.students[0], row, target, base + length, 0);
  auto t = read_any_teacher(p, 0, row, target, base + 3 * length, base + 5 * length, q.temperature);
  const Hits hit = rank_student(p, z, target, q.temperature);
  const double dot = target_dot(p, z, target, q.temperature);
  exponentiate(p, t, q.temperature, true, t.x, base + 4 * length);
  const double dotted = weighted(t.e, z.x, Units<T>(q.temperature, z.peak), length);
  exponentiate(p, z, q.temperature, true, z.x, base + 2 * length);

  const auto r = nkd(q, z.stats, z.at1.log_label, t.stats, t.at1.label, dotted);
  Gradient<T> g;
  g.a = r.a;
  g.c = r.weight * z.at1.unit;
  g.label[0] = r.weight * std::expm1(z.at1.log_label);
  g.add(t.e, r.b);
  const double ce = add_cross_entropy(z, target, dot, q.ce_weight, g);

  double* const out = p.out + row * (1 + p.num_terms);
  const double loss = r.target + gated(q.gamma, r.others) + gated(q.ce_weight, ce);
  const double values[] = {loss, r.target, r.others, ce, hit.top1, hit.top5};
  std::copy(values, values + 6, out);
  if (p.gradients) write_gradient(p, 0, row, q.temperature, z, g, target);
}

}  // namespace
}  // namespace kdfuse
