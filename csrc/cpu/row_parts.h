// What the row passes of all losses share: the target of a row, its cross-entropy, ranks and gradient.
#pragma once
#include "../core/limits.h"
#include "row.h"
#include "row_top_k.h"

namespace kdfuse {
namespace {  // each level compiles its own copy, none may leak into another

// The target of one row: one label (two for mixed labels of the ops that take two), or none.
template <class T>
struct Target {
  int count = 0;
  int64_t labels[2] = {-1, -1};
  double values[2] = {0, 0};  // the labels' probabilities
  const T* soft = nullptr;  // class probabilities without the labels', or null for a hard label
  double mass = 1;  // of all class probabilities
};

// wanted: how many labels a row of class probabilities is reduced to.
template <class T>
Target<T> read_target(const Problem& p, int64_t row, int wanted, T* soft) {
  Target<T> target;
  if (p.soft.data) {
    load_row(p.soft, row, p.classes, soft, T(0));
    double mass = 0;
    for (int64_t j = 0; j < p.classes; ++j) mass += soft[j];
    for (int k = 0; k < wanted; ++k) {
      int64_t best = 0;
      for (int64_t j = 1; j < p.classes; ++j) best = soft[j] > soft[best] ? j : best;
      if (k > 0 && !(soft[best] > T(0))) break;  // a mixed label of one class has one target
      target.labels[k] = best;
      target.values[k] = soft[best];
      target.count = k + 1;
      soft[best] = 0;
    }
    target.soft = soft;
    target.mass = mass;
  } else if (p.labels) {
    target.count = 1;
    target.labels[0] = p.labels[row];
    target.values[0] = 1;
  }
  return target;
}

inline bool ignored(const Problem& p, int64_t row) { return p.labels && p.labels[row] == p.ignore_index; }

// One set of logits of a row, with what was learnt from it.
template <class T>
struct Logits {
  T* x;  // the row, labels at -inf
  T peak;  // of the rest
  T label[2] = {};  // the labels' logits
  bool labelled;  // by one label, which then takes its part in the statistics
  Ahead ahead;  // where the next row's stand
  T* e = nullptr;  // exponentials at T
  T* e1 = nullptr;  // exponentials at T = 1 where they stand apart
  Unit unit = Unit::none;
  Stats<double> stats = {};
  Split<double> at = {}, at1 = {};  // the softmax at T and at T = 1

  double far[2] = {};  // u of the labels at T = 1

  double log_label(int k) const { return labelled ? at1.log_label : far[k] - at1.lse; }
  T single_label() const { return labelled ? label[0] : static_cast<T>(-INFINITY); }
};

// which: the student, where these logits get a gradient.
template <class T>
Logits<T> read_logits(const Problem& p, const Matrix& m, int64_t row, const Target<T>& target, T* x, int which = -1) {
  Logits<T> logits;
  logits.x = x;
  logits.ahead = next_row(p, m, row, which);
  logits.labelled = target.count == 1;
  const T peak = load_row(m, row, p.classes, x, static_cast<T>(-INFINITY));
  logits.peak = drop_labels(x, padded(p.classes), peak, target.labels, target.count, logits.label);
  return logits;
}

// What a row that is wanted at T and at 1 has for exponents at 1: those at T where e_j^T is taken.
template <class T>
Units<T> units_at_one(const Logits<T>& z, double temperature) {
  const Unit unit = unit_pass(temperature, true);
  const bool powers = unit == Unit::square || unit == Unit::fourth;
  return powers ? Units<T>(temperature, z.peak).raised(temperature) : Units<T>(1, z.peak);
}

// Exponentials and softmaxes of logits; e may be the row itself, e1 is used where T asks for it.
template <class T>
void exponentiate(const Problem& p, Logits<T>& z, double temperature, bool at_one, T* e, T* e1) {
  z.unit = unit_pass(temperature, at_one);
  z.e = e;
  z.e1 = e1;
  const Units<T> units(temperature, z.peak), units1 = units_at_one(z, temperature);
  const Sums sums = exponentials(z.unit, z.x, padded(p.classes), units, units1, e, e1, z.ahead);
  z.stats = {sums.sum, units.of_label(z.single_label())};
  z.at = split(z.stats);
  if (!at_one) return;
  z.at1 = temperature == 1 ? z.at : split(Stats<double>{sums.sum1, units1.of_label(z.single_label())});
  for (int k = 0; k < 2; ++k) z.far[k] = units1.of_label(z.label[k]);
}

// A teacher's exponentials, into e, and its softmax; returns the sum of e_j (u_t,j - u_z,j). own: the student's
// temperature.
template <class T>
double teach(const Problem& p, Logits<T>& t, double temperature, const Logits<T>& z, double own, T* e) {
  const Units<T> units(temperature, t.peak), of_z(own, z.peak);
  const Crossed sums = teacher_pass(t.x, units, z.x, of_z, padded(p.classes), e, t.ahead);
  t.e = e;
  t.stats = {sums.sum, units.of_label(t.single_label())};
  t.at = split(t.stats);
  return sums.crossed;
}

// The gradient of one row as it is collected: coefficients of the exponentials, further rows, labels.
template <class T>
struct Gradient {
  double a = 0, c = 0;
  double label[2] = {0, 0};
  Stream<T> streams[kMaxStreams];
  double scales[kMaxStreams];
  int count = 0;

  // A scale of 0 leaves the row out, whatever it holds.
  void add(const T* row, double scale) {
    if (scale == 0) return;
    streams[count].row = row;
    scales[count++] = scale;
  }
};

// Adds weight * CE at T = 1 to the gradient; returns CE. dot: sum over j of y_j u_j.
template <class T>
double add_cross_entropy(const Logits<T>& z, const Target<T>& target, double dot, double weight, Gradient<T>& g) {
  const double value = cross_entropy(z.at1, target.mass, dot);
  if (weight == 0) return value;
  g.c += weight * target.mass * z.at1.unit;
  for (int k = 0; k < target.count; ++k) {
    g.label[k] += weight * (target.mass * std::exp(z.log_label(k)) - target.values[k]);
  }
  if (target.soft) g.add(target.soft, -weight);
  return value;
}

// sum over j of y_j u_j at T = 1, from a row that still holds its logits.
template <class T>
double target_dot(const Problem& p, const Logits<T>& z, const Target<T>& target, double temperature) {
  const Units<T> units = units_at_one(z, temperature);
  double dot = target.soft ? weighted(target.soft, z.x, units, padded(p.classes)) : 0;
  for (int k = 0; k < target.count; ++k) dot += gated(target.values[k], units.of_label(z.label[k]));
  return dot;
}

struct Hits {
  double top1 = 0, top5 = 0;
};

// From a row that still holds its logits as they came.
template <class T>
Hits hits(const Problem& p, const Logits<T>& z, const Target<T>& target) {
  if (target.count == 0) return {};
  if (target.count == 2) z.x[target.labels[1]] = z.label[1];
  const int64_t rank = rank_of(z.x, padded(p.classes), target.labels[0], z.label[0]);
  if (target.count == 2) z.x[target.labels[1]] = -INFINITY;
  return {rank < 1 ? 1. : 0., rank < 5 ? 1. : 0.};
}

template <class T>
void centre(const Problem& p, Logits<T>& z, double temperature) {
  const T peak = centre(z.x, padded(p.classes), z.peak, temperature);
  if (peak == z.peak) return;
  for (T& label : z.label) label -= z.peak;
  z.peak = peak;
}

// The label's ranks, and then a row that is fit for exponentials.
template <class T>
Hits rank_student(const Problem& p, Logits<T>& z, const Target<T>& target, double temperature) {
  const Hits hit = hits(p, z, target);
  centre(p, z, temperature);
  return hit;
}

template <class T>
Logits<T> read_teacher(const Problem& p, const Matrix& m, int64_t row, const Target<T>& target, T* x,
                       double temperature) {
  Logits<T> t = read_logits(p, m, row, target, x);
  centre(p, t, temperature);
  return t;
}

// For the ops that take top-k teachers as well, which: the teacher's place in the list. spare: a row of
// scratch for the values of a top-k teacher.
template <class T>
Logits<T> read_any_teacher(const Problem& p, int which, int64_t row, const Target<T>& target, T* x, T* spare,
                           double temperature) {
  const Matrix& m = p.teachers[which];
  if (!p.top_k || p.top_k[which].count == 0) return read_teacher(p, m, row, target, x, temperature);
  Logits<T> t;
  t.x = x;
  t.ahead = next_row(p, m, row);
  t.ahead.bytes = 0;  // no place for each class: a loop over these would run far beyond the row
  t.labelled = target.count == 1;
  const T peak = load_top_k(m, p.top_k[which], row, p.classes, temperature, x, spare);
  t.peak = drop_labels(x, padded(p.classes), peak, target.labels, target.count, t.label);
  centre(p, t, temperature);
  return t;
}

template <class T, class O>
void write_as(const Logits<T>& z, Gradient<T>& g, const Target<T>& target, int64_t classes, T a, T c, O* out) {
  combine(z.unit, z.e, a, c, g.streams, g.count, classes, out);
  for (int k = 0; k < target.count; ++k) {
    O lanes[kFloatLanes];
    store_as(lanes, fill<T>(static_cast<T>(g.label[k])));
    out[target.labels[k]] = lanes[0];
  }
}

template <class T>
void write_gradient(const Problem& p, int which, int64_t row, double temperature, const Logits<T>& z, Gradient<T>& g,
                    const Target<T>& target) {
  if (z.unit == Unit::apart) g.add(z.e1, g.c);
  const double weight = p.upstream[row];
  const T a = static_cast<T>(weight * (temperature == 1 ? g.a + g.c : g.a)), c = static_cast<T>(weight * g.c);
  for (int m = 0; m < g.count; ++m) g.streams[m].scale = static_cast<T>(weight * g.scales[m]);
  for (double& label : g.label) label *= weight;
  const Output& out = p.gradients[which];
  const int64_t at = row * p.classes;
  switch (out.type) {
    case DType::f32:
      return write_as(z, g, target, p.classes, a, c, static_cast<float*>(out.data) + at);
    case DType::bf16:
      return write_as(z, g, target, p.classes, a, c, static_cast<bf16*>(out.data) + at);
    case DType::f64:
      if constexpr (sizeof(T) == sizeof(double)) {
        return write_as(z, g, target, p.classes, a, c, static_cast<double*>(out.data) + at);
      }
      return;
    case DType::f16:
      return;  // never asked for: the gradient of float16 logits is stored in float32
  }
}

// A row that takes no part: no loss, no gradient.
inline void write_nothing(const Problem& p, int64_t row) {
  double* out = p.out + row * (1 + p.num_terms);
  for (int k = 0; k <= p.num_terms; ++k) out[k] = 0;
  for (int s = 0; p.gradients && s < p.num_students; ++s) {
    const Output& g = p.gradients[s];
    const int64_t size = p.classes * size_of(g.type);
    std::memset(static_cast<char*>(g.data) + row * size, 0, size);
  }
}

}  // namespace
}  // namespace kdfuse
