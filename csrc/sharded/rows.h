// The statistics of one part of the classes on the CPU, and what its gradient rows have in common.
//
// What is exchanged is relative to the peaks themselves, the loops' exponents to a rounded origin
// (Units). Their difference is a row's drift: u of the loops = u of the statistics + drift.
#pragma once
#include <algorithm>
#include <cmath>

#include "../cpu/row_parts.h"
#include "../cpu/rows_slkd.h"
#include "../losses/slkd.h"
#include "types.h"

namespace kdfuse {
namespace {  // each level compiles its own copy, none may leak into another

// What the statistics depend on.
struct SplitPlan {
  double own = 1, temperature = 1;  // of the students and of the teachers
  bool teacher_at_1 = false;  // at T = 1 too
  bool entropy = true;  // a pair holds the teacher's exponent
  bool slkd = false;  // has a fused teacher
  bool (*reads)(const double* params, int teacher) = nullptr;  // null: every one
};

// The label where this part holds it, else none.
template <class T>
Target<T> split_target(const SplitProblem& p, int64_t row) {
  Target<T> target;
  const int64_t at = p.labels ? p.labels[row] - p.first : -1;
  if (at < 0 || at >= p.classes) return target;
  target.count = 1;
  target.labels[0] = at;
  target.values[0] = 1;
  return target;
}

// Whether a comes before b among the largest: NaN before any number.
template <class T>
bool above(T a, T b) {
  return a > b || (a != a && b == b);
}

// Few blocks of a row hold one of its largest, and one comparison of vectors passes over the others.
template <class T>
void largest(const T* x, int64_t length, double* top) {
  constexpr int lanes = Simd<T>::lanes, last = SplitLayout::top - 1;
  constexpr int64_t block = 16 * kFloatLanes;
  T five[SplitLayout::top];
  std::fill(five, five + SplitLayout::top, static_cast<T>(-INFINITY));
  for (int64_t start = 0; start < length; start += block) {
    const int64_t end = std::min(start + block, length);
    const auto least = fill<T>(five[last]);
    typename Simd<T>::ints beyond = {};
    for (int64_t i = start; i < end; i += lanes) beyond |= ~(load(x + i) <= least);
    typename Simd<T>::lane any = 0;
    for (int k = 0; k < lanes; ++k) any |= beyond[k];
    if (!any) continue;
    for (int64_t i = start; i < end; ++i) {
      if (!above(x[i], five[last])) continue;
      int place = last;
      for (; place > 0 && above(x[i], five[place - 1]); --place) five[place] = five[place - 1];
      five[place] = x[i];
    }
  }
  std::copy(five, five + SplitLayout::top, top);
}

// Makes a row fit for exponentials; returns what was subtracted from it.
template <class T>
double centred(const Problem& p, Logits<T>& x, double temperature) {
  const T before = x.peak;
  centre(p, x, temperature);
  return static_cast<double>(before) - static_cast<double>(x.peak);
}

struct Drift {
  double at, at1;  // at T and at T = 1
};

// peak: the one that the statistics are relative to, as the row has it.
template <class T>
Drift drift_of(const Logits<T>& x, double peak, double temperature) {
  const auto of = [&](const Units<T>& units) {
    return units.log_base * std::fma(peak, static_cast<double>(units.step), -static_cast<double>(units.origin));
  };
  return {of(Units<T>(temperature, x.peak)), of(units_at_one(x, temperature))};
}

// Exponentials in e (and e1), which may be the row itself.
template <class T>
Sums sum_up(const Problem& p, Logits<T>& x, double temperature, bool at_one, T* e, T* e1) {
  x.unit = unit_pass(temperature, at_one);
  x.e = e;
  x.e1 = e1;
  const Units<T> units(temperature, x.peak);
  Sums sums = exponentials(x.unit, x.x, padded(p.classes), units, units_at_one(x, temperature), e, e1, x.ahead);
  if (at_one && temperature == 1) sums.sum1 = sums.sum;
  return sums;
}

template <class T>
void pack_set(const Logits<T>& x, Sums sums, double moved, double label, double temperature, double* set) {
  const Drift drift = drift_of(x, x.peak, temperature);
  set[0] = sums.sum == 0 ? -INFINITY : static_cast<double>(x.peak) + moved;
  set[1] = sums.sum * std::exp(-drift.at);
  set[2] = sums.sum1 * std::exp(-drift.at1);
  set[3] = label;
}

// gap: the sum of e_t (u_t - u_z), or of e_t u_z, as the loops have it; sum: of e_t.
template <class T>
double pair_of(const SplitPlan& plan, const Logits<T>& t, const Logits<T>& z, double sum, double gap) {
  const double of_t = drift_of(t, t.peak, plan.temperature).at, of_z = drift_of(z, z.peak, plan.own).at;
  return std::exp(-of_t) * (gap - gated(sum, plan.entropy ? of_t - of_z : of_z));
}

template <class T>
void split_stats(const SplitProblem& p, const SplitPlan& plan, int64_t row, Scratch<T>& scratch) {
  const SplitLayout& at = p.layout;
  double* const out = p.packed + row * at.width();
  std::fill(out, out + at.width(), 0.);
  out[0] = p.labels && !ignored(p, row) ? static_cast<double>(p.labels[row] - p.first) : -1;
  out[1] = static_cast<double>(p.classes);
  if (ignored(p, row)) return;

  const int64_t length = padded(p.classes);
  const double own = plan.own, temperature = plan.temperature;
  T* const base = scratch.rows(p.num_students + 4, length);
  T *const e = base + p.num_students * length, *const spare = e + length, *const other = spare + length;
  const auto target = split_target<T>(p, row);
  const auto label_of = [&](const Logits<T>& x, double moved) {
    return target.count ? static_cast<double>(x.label[0]) + moved : -INFINITY;
  };

  Logits<T> students[kMaxStreams];
  double moved[kMaxStreams], labels[kMaxStreams];
  for (int k = 0; k < p.num_students; ++k) {
    auto& z = students[k] = read_logits(p, p.students[k], row, target, base + k * length, k);
    labels[k] = label_of(z, 0);
    double* const ranks = out + at.of_ranks(k);
    largest(z.x, length, ranks);
    if (target.count) {
      const bool number = z.label[0] == z.label[0];
      const int64_t rank = number ? rank_of(z.x, length, target.labels[0], z.label[0]) : SplitLayout::top;
      ranks[SplitLayout::top] = static_cast<double>(std::min<int64_t>(rank, SplitLayout::top));
    }
    moved[k] = centred(p, z, own);
  }

  for (int k = 0; k < p.num_teachers; ++k) {
    if (plan.reads && !plan.reads(p.params, k)) continue;
    auto t = read_logits(p, p.teachers[k], row, target, other);
    const double label = label_of(t, 0), away = centred(p, t, temperature);
    Sums sums;
    double gap;
    const Units<T> of_z(own, students[0].peak);
    if (plan.entropy && !plan.teacher_at_1) {
      gap = teach(p, t, temperature, students[0], own, e);
      sums.sum = t.stats.sum;
    } else {
      sums = sum_up(p, t, temperature, plan.teacher_at_1, e, spare);
      gap = plan.entropy ? cross(e, t.x, Units<T>(temperature, t.peak), students[0].x, of_z, length)
                         : weighted(e, students[0].x, of_z, length);
    }
    pack_set(t, sums, away, label, temperature, out + at.of_set(p.num_students + k));
    out[at.of_pair(k)] = pair_of(plan, t, students[0], sums.sum, gap);
    for (int s = 1; s < p.num_students; ++s) {  // SLKD's teacher has the SL-Ts too
      const Units<T> of_t(temperature, t.peak), of_s(temperature, students[s].peak);
      gap = cross(e, t.x, of_t, students[s].x, of_s, length);
      out[at.of_pair(1 + s)] = pair_of(plan, t, students[s], sums.sum, gap);
    }
  }
  if (plan.slkd) {
    const SlkdParams q(p.params);
    auto f = fuse(p, q, students + 1, p.num_students - 1, other);
    double away = 0;
    for (int k = 1; k < p.num_students; ++k) away += gated(q.fusion[k - 1], moved[k]);
    f.ahead = students[0].ahead;
    f.labelled = target.count == 1;
    const double label = label_of(f, away);
    away += centred(p, f, temperature);
    Sums sums;
    const double gap = teach(p, f, temperature, students[0], own, e);
    sums.sum = f.stats.sum;
    pack_set(f, sums, away, label, temperature, out + at.of_set(p.num_students + 1));
    out[at.of_pair(1)] = pair_of(plan, f, students[0], sums.sum, gap);
  }
  for (int k = 0; k < p.num_students; ++k) {
    auto& z = students[k];
    const Sums sums = sum_up(p, z, own, p.labels != nullptr, z.x, spare);
    pack_set(z, sums, moved[k], labels[k], own, out + at.of_set(k));
  }
}

// The logits of one set with the statistics of the whole row; the part's own row is not read yet.
template <class T>
Logits<T> known(const SplitProblem& p, const Merged& whole, T* x) {
  Logits<T> logits;
  logits.x = x;
  logits.peak = static_cast<T>(whole.peak);
  logits.labelled = p.labels != nullptr;
  logits.stats = whole.stats;
  logits.at = whole.at;
  logits.at1 = whole.at1;
  return logits;
}

// Reads this part of a row, without the label; returns what was subtracted from it.
template <class T>
double read_part(const Problem& p, Logits<T>& x, const Matrix& m, int64_t row, const Target<T>& target,
                 double temperature, int which) {
  x.ahead = next_row(p, m, row, which);
  load_row(m, row, p.classes, x.x, static_cast<T>(-INFINITY));
  if (target.count) {
    x.label[0] = x.x[target.labels[0]];
    x.x[target.labels[0]] = -INFINITY;
  }
  return centred(p, x, temperature);
}

// They take coefficients of the statistics' exponentials to those of the loops'.
struct Factors {
  double at, at1;  // at T and at T = 1
};

// Makes the exponentials of a row that is read, in its own place.
template <class T>
Factors exponentials_of(const Problem& p, Logits<T>& x, double peak, double temperature, bool at_one, T* e1) {
  sum_up(p, x, temperature, at_one, x.x, e1);
  const Drift drift = drift_of(x, peak, temperature);
  return {std::exp(-drift.at), std::exp(-drift.at1)};
}

template <class T>
Factors make_part(const Problem& p, Logits<T>& x, const Matrix& m, int64_t row, const Target<T>& target,
                  double temperature, bool at_one, T* e1, int which = -1) {
  read_part(p, x, m, row, target, temperature, which);
  return exponentials_of(p, x, x.peak, temperature, at_one, e1);
}

template <class T>
void write_part(const SplitProblem& p, int which, int64_t row, double temperature, const Logits<T>& z, Gradient<T>& g,
                const Target<T>& target, Factors factors) {
  g.a *= factors.at;
  g.c *= factors.at1;
  write_gradient(p, which, row, temperature, z, g, target);
}

struct SplitHits {
  double top1, top5;
};

inline SplitHits hits(const double* ranks) {
  const double rank = ranks[SplitLayout::top];
  return {rank < 1 ? 1. : 0., rank < 5 ? 1. : 0.};
}

}  // namespace
}  // namespace kdfuse
