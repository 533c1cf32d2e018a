// The row pass on the CPU, compiled once for each instruction-set level (KDFUSE_LEVEL). A row pass
// reads each input row once from memory; what follows stays in the caches.
#include <alloca.h>

#include <algorithm>
#include <new>

#include "losses/dkd.h"
#include "losses/kd.h"
#include "losses/nkd.h"
#include "losses/slkd.h"
#include "losses/tf_nkd.h"
#include "losses/uskd.h"
#include "row_parts.h"

namespace kdfuse {
namespace {

template <class T>
void kd_row(const Problem& p, int64_t row, Scratch<T>& scratch) {
  const KdParams q(p.params);
  const int64_t length = padded(p.classes);
  T* const base = scratch.rows(p.num_teachers + 4, length);
  const auto target = read_target(p, row, 1, base);
  auto z = read_logits(p, p.students[0], row, target, base + length, 0);
  const Hits hit = rank_student(p, z, target, q.temperature);
  const double dot = target_dot(p, z, target, q.temperature);
  exponentiate(p, z, q.temperature, target.count > 0, base + 2 * length, base + 3 * length);

  Gradient<T> g;
  KdRow<double> kd;
  for (int k = 0; k < p.num_teachers; ++k) {
    if (q.weights[k] == 0) continue;  // whatever it holds
    T* const x = base + (4 + k) * length;
    auto t = read_teacher(p, p.teachers[k], row, target, x, q.temperature);
    const double crossed = teach(p, t, z, q.temperature, x);
    const auto pair = kl(z.stats, z.at, t.stats, t.at, crossed);
    const double scale = kd_add(kd, pair, q.weights[k], q.kd_weight, q.square, q.temperature);
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
  T* const base = scratch.rows(5, length);
  const auto target = read_target(p, row, 1, base);
  auto z = read_logits(p, p.students[0], row, target, base + length, 0);
  auto t = read_teacher(p, p.teachers[0], row, target, base + 3 * length, q.temperature);
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
void zipf(const T* keys, int64_t classes, const Target<T>& target, T* weights, int64_t* order) {
  for (int64_t j = 0; j < classes; ++j) order[j] = j;
  std::sort(order, order + classes,
            [keys](int64_t i, int64_t j) { return keys[i] > keys[j] || (keys[i] == keys[j] && i < j); });
  for (int64_t r = 0; r < classes; ++r) weights[order[r]] = T(1) / static_cast<T>(r + 1);
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
  // An order must hold for NaN as well: it comes first.
  for (int64_t j = 0; j < p.classes; ++j) keys[j] = keys[j] == keys[j] ? keys[j] : static_cast<T>(INFINITY);
}

template <class T>
void uskd_row(const Problem& p, int64_t row, Scratch<T>& scratch) {
  const UskdParams q(p.params);
  const int64_t length = padded(p.classes);
  // The order is kept in 64-bit integers behind the rows of T.
  T* const base = scratch.rows(6 + 8 / sizeof(T), length);
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
  zipf(keys, p.classes, target, weights, reinterpret_cast<int64_t*>(base + 6 * length));

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

// The fused teacher f = sum_k fusion_k s_k; a weight of 0 leaves its SL-T out, whatever it holds.
template <class T>
Logits<T> fuse(const Problem& p, const SlkdParams& q, const Logits<T>* slts, int count, T* f) {
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
  const double crossed = teach(p, t, z, q.temperature, at(5));
  const double fused_crossed = teach(p, f, z, q.temperature, at(7));
  exponentiate(p, z, q.temperature, true, at(2), at(3));
  const auto pair = kl(z.stats, z.at, t.stats, t.at, crossed);
  const auto fused = kl(z.stats, z.at, f.stats, f.at, fused_crossed);

  const double step = q.square / q.temperature;
  Gradient<T> g;
  g.a = step * (q.kd_weight * pair.a + q.fused_kd_weight * fused.a);
  g.label[0] = step * (q.kd_weight * pair.label + q.fused_kd_weight * fused.label);
  g.add(at(5), -step * q.kd_weight * pair.b);
  g.add(at(7), -step * q.fused_kd_weight * fused.b);
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
    gs.a = step * q.kd_weight * own.a;
    gs.label[0] = step * q.kd_weight * own.label;
    gs.add(at(5), -step * q.kd_weight * own.b);
    if (!q.detach) {
      gs.add(pull, q.fusion[k] * slkd_extra(q, fused));
      gs.label[0] +=
          q.fusion[k] * q.fused_kd_weight * step * gated(f.at.label, f.stats.label - z.stats.label - fused.drift);
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

template <class T, void (*Row)(const Problem&, int64_t, Scratch<T>&)>
void each_row(const Problem& p, int64_t begin, int64_t end) {
  static thread_local Scratch<T> scratch;
  for (int64_t row = begin; row < end; ++row) {
    if (ignored(p, row)) {
      write_nothing(p, row);
    } else {
      Row(p, row, scratch);
    }
  }
}

template <void (*Float)(const Problem&, int64_t, Scratch<float>&),
          void (*Double)(const Problem&, int64_t, Scratch<double>&)>
void rows_of(const Problem& p, int64_t begin, int64_t end) {
  return p.wide ? each_row<double, Double>(p, begin, end) : each_row<float, Float>(p, begin, end);
}

}  // namespace

#define KDFUSE_JOIN_(a, b) a##b
#define KDFUSE_JOIN(a, b) KDFUSE_JOIN_(a, b)

RowPasses KDFUSE_JOIN(row_passes_, KDFUSE_LEVEL)() {
  return {
      {nullptr, rows_of<kd_row<float>, kd_row<double>>},
      {nullptr, rows_of<dkd_row<float>, dkd_row<double>>},
      {nullptr, rows_of<nkd_row<float>, nkd_row<double>>},
      {rows_of<tf_nkd_score<float>, tf_nkd_score<double>>, rows_of<tf_nkd_row<float>, tf_nkd_row<double>>},
      {rows_of<uskd_score<float>, uskd_score<double>>, rows_of<uskd_row<float>, uskd_row<double>>},
      {nullptr, rows_of<slkd_row<float>, slkd_row<double>>},
  };
}

}  // namespace kdfuse
