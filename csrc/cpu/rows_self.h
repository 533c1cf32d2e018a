// The rows of tf-NKD and USKD on the CPU: a student that teaches itself.
#pragma once
#include <algorithm>

#include "../losses/tf_nkd.h"
#include "../losses/uskd.h"
#include "row_parts.h"
#include "sort.h"

namespace kdfuse {
namespace {

// Of two labels neither is in the statistics: their logits join the softmax at T = 1 here.
template <class T>
void join_labels(Logits<T>& z, const Target<T>& target) {
  if (target.count < 2) return;
  double lse = z.at1.lse;
  for (const double label : z.far) {
    const double high = std::max(lse, label), low = std::min(lse, label);
    lse = low == -INFINITY ? high : high + std::log1p(std::exp(low - high));
  }
  z.at1.lse = lse;
  z.at1.unit = std::exp(-lse);
}

template <class T>
void label_scores(const Problem& p, int64_t row, Scratch<T>& scratch, bool squared) {
  const int64_t length = padded(p.classes);
  T* const base = scratch.rows(2, length);
  const auto target = read_target(p, row, 2, base);
  auto z = read_logits(p, p.students[0], row, target, base + length, 0);
  centre(p, z, 1);
  exponentiate(p, z, 1, true, z.x, z.x);
  join_labels(z, target);
  for (int k = 0; k < 2; ++k) {
    const double score = k < target.count ? std::exp(z.log_label(k)) : 0;
    p.scores[2 * row + k] = squared ? score * score : score;
  }
}

template <class T>
void tf_nkd_score(const Problem& p, int64_t row, Scratch<T>& scratch) {
  label_scores(p, row, scratch, false);
}

template <class T>
void uskd_score(const Problem& p, int64_t row, Scratch<T>& scratch) {
  label_scores(p, row, scratch, true);
}

// Adds weight * sum_t -w_t log S_t to the gradient; returns the sum.
template <class T>
double add_smoothed_target(const Problem& p, int64_t row, const Logits<T>& z, const Target<T>& target, double weight,
                           Gradient<T>& g) {
  double value = 0, total = 0;
  for (int k = 0; k < target.count; ++k) {
    const double w = smoothed_weight(p.scores[2 * row + k], target.values[k], p.score_mean[k]);
    value += gated(w, -z.log_label(k));
    total += w;
    g.label[k] -= weight * w;
  }
  g.c += weight * total * z.at1.unit;
  for (int k = 0; k < target.count; ++k) g.label[k] += weight * total * std::exp(z.log_label(k));
  return value;
}

template <class T>
void tf_nkd_row(const Problem& p, int64_t row, Scratch<T>& scratch) {
  const TfNkdParams q(p.params);
  const int64_t length = padded(p.classes);
  T* const base = scratch.rows(2, length);
  const auto target = read_target(p, row, 2, base);
  auto z = read_logits(p, p.students[0], row, target, base + length, 0);
  const Hits hit = rank_student(p, z, target, 1);
  const double dot = target_dot(p, z, target, 1);
  exponentiate(p, z, 1, true, z.x, z.x);
  join_labels(z, target);

  Gradient<T> g;
  const double value = add_smoothed_target(p, row, z, target, q.weight, g);
  const double ce = add_cross_entropy(z, target, dot, q.ce_weight, g);
  double* const out = p.out + row * (1 + p.num_terms);
  const double values[] = {gated(q.weight, value) + gated(q.ce_weight, ce), value, ce, hit.top1, hit.top5};
  std::copy(values, values + 5, out);
  if (p.gradients) write_gradient(p, 0, row, 1, z, g, target);
}

// Zipf weights 1/rank of the classes by falling key, the targets at 0, summing to 1.
template <class T>
void zipf(const T* keys, int64_t classes, const Target<T>& target, T* weights) {
  static thread_local Order<T> order;
  const auto* ranked = order.falling(keys, classes);
  for (int64_t r = 0; r < classes; ++r) weights[ranked[r].place] = T(1) / static_cast<T>(r + 1);
  double total = 0;
  for (int k = 0; k < target.count; ++k) weights[target.labels[k]] = 0;
  for (int64_t j = 0; j < classes; ++j) total += weights[j];
  const T scale = total > 0 ? static_cast<T>(1 / total) : T(0);
  for (int64_t j = 0; j < classes; ++j) weights[j] *= scale;
  for (int64_t j = classes; j < padded(classes); ++j) weights[j] = 0;
}

// keys_j = W_j / (1 - W_t) + s_j / (1 - s_t), with s the student's log-probabilities or probabilities.
template <class T>
void rank_keys(const Problem& p, const Logits<T>& z, const Logits<T>& w, const Target<T>& target, bool paper, T* keys) {
  const auto probability = [](const Logits<T>& x, int k) { return std::exp(x.log_label(k)); };
  const auto student = [&](int k) { return paper ? probability(z, k) : z.log_label(k); };
  double weak_targets = 0, student_targets = 0;
  for (int k = 0; k < target.count; ++k) {
    weak_targets += probability(w, k);
    student_targets += student(k);
  }
  const auto scale = rank_scale(weak_targets, student_targets);
  const T weak_scale = static_cast<T>(scale.weak * w.at1.unit), lse = static_cast<T>(z.at1.lse);
  const T student_scale = static_cast<T>(scale.student), unit = static_cast<T>(z.at1.unit);
  const Units<T> units(1, z.peak);
  const T log_base = static_cast<T>(units.log_base);
  for (int64_t j = 0; j < p.classes; ++j) {
    const T log_p = (z.x[j] * units.step - units.origin) * log_base - lse;
    keys[j] = w.e[j] * weak_scale + (paper ? z.e[j] * unit : log_p) * student_scale;
  }
  for (int k = 0; k < target.count; ++k) {
    keys[target.labels[k]] = static_cast<T>(probability(w, k) * scale.weak + student(k) * scale.student);
  }
}

template <class T>
void uskd_row(const Problem& p, int64_t row, Scratch<T>& scratch) {
  const UskdParams q(p.params);
  const int64_t length = padded(p.classes);
  T* const base = scratch.rows(6, length);
  const auto target = read_target(p, row, 2, base);
  auto z = read_logits(p, p.students[0], row, target, base + length, 0);
  auto w = read_logits(p, p.students[1], row, target, base + 2 * length, 1);
  const Hits hit = rank_student(p, z, target, 1);
  const double dot = target_dot(p, z, target, 1);
  centre(p, w, 1);

  // The weak head's cross-entropy against 0.9 y + 0.1 / C.
  const Units<T> units(1, z.peak), weak_units(1, w.peak);
  double plain = 0;
  for (int64_t j = 0; j < p.classes; ++j) {
    plain += j == target.labels[0] || j == target.labels[1] ? 0 : weak_units.of_label(w.x[j]);
  }
  for (int k = 0; k < target.count; ++k) plain += weak_units.of_label(w.label[k]);
  const double keep = 1 - kSmooth, share = kSmooth / p.classes, weak_mass = keep * target.mass + kSmooth;
  const double weak_dot = keep * target_dot(p, w, target, 1) + share * plain;

  exponentiate(p, w, 1, true, w.x, w.x);
  exponentiate(p, z, 1, true, base + 3 * length, z.x);
  join_labels(w, target);
  join_labels(z, target);
  T* const keys = base + 4 * length;
  T* const weights = base + 5 * length;
  rank_keys(p, z, w, target, q.paper_rank != 0, keys);
  zipf(keys, p.classes, target, weights);

  Gradient<T> g, gw;
  const double weak = weak_mass * w.at1.lse - weak_dot;
  gw.c = q.mu * weak_mass * w.at1.unit;
  for (int k = 0; k < target.count; ++k) {
    gw.label[k] = q.mu * (weak_mass * std::exp(w.log_label(k)) - keep * target.values[k] - share);
  }
  if (target.soft) gw.add(target.soft, -q.mu * keep);
  std::fill(keys, keys + length, T(1));
  gw.add(keys, -q.mu * share);

  const double others = z.stats.sum > 0 ? lse_rest(z.stats) - weighted(weights, z.x, units, length) : 0;
  const double smoothed = add_smoothed_target(p, row, z, target, q.alpha, g);
  g.c += z.stats.sum > 0 ? q.beta / z.stats.sum : 0;
  g.add(weights, -q.beta);
  const double ce = add_cross_entropy(z, target, dot, q.ce_weight, g);

  double* const out = p.out + row * (1 + p.num_terms);
  const double loss = gated(q.alpha, smoothed) + gated(q.beta, others) + gated(q.mu, weak) + gated(q.ce_weight, ce);
  const double values[] = {loss, smoothed, others, weak, ce, hit.top1, hit.top5};
  std::copy(values, values + 7, out);
  if (p.gradients) {
    write_gradient(p, 0, row, 1, z, g, target);
    write_gradient(p, 1, row, 1, w, gw, target);
  }
}

}  // namespace
}  // namespace kdfuse
