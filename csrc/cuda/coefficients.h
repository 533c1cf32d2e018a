// What a pass over a row has found, and what a loss concludes from it: the row's value and the
// coefficients of its gradient. For the rows of one student under teachers, or alone.
#pragma once
#include <type_traits>

#include "../core/device.h"
#include "../losses/taught.h"
#include "../losses/tf_nkd.h"
#include "grid.h"
#include "kernel_table.h"
#include "shape.h"

namespace kdfuse {

constexpr float kLn2 = 0.693147180559945309417f;

// The exponents of a row at one temperature, to base 2: u_j = step * x_j - origin, where u is about 0 at the
// row's peak. The product is not rounded, so that rows far from 0 lose nothing by it.
struct Exponents {
  float step, origin;

  KDFUSE_DEVICE_MEMBER float of(float x) const { return std::fma(x, step, -origin); }
  KDFUSE_DEVICE_MEMBER float natural(float x) const { return kLn2 * of(x); }
};

KDFUSE_DEVICE Exponents exponents(float step, float peak) { return {step, peak * step}; }

// Of a loss in fast rows: one of losses/taught.h, or tf-NKD, whose student has no teacher.
template <class Loss>
constexpr bool is_taught = !std::is_same_v<Loss, TfNkd>;

// What a row is summed up to, over the classes but the label, of a student z and teachers t: exponentials at their
// temperatures and at T = 1, Taught::mixed to base 2; of class probabilities their mass, and their product with the
// student's exponents at T = 1 to base 2; and how many classes come before the label.
template <class Loss, Labels labels, int teachers>
struct Sums {
  static constexpr bool kTaught = is_taught<Loss>, kTeacherAt1 = Loss::kTeacherAt1;
  static constexpr bool kApart = kTaught && !Loss::kStudentAt1;  // the student at T from the one at T = 1
  static constexpr bool kAt1 = labels != Labels::none || Loss::kStudentAt1;
  enum {
    student,
    teacher = student + kApart,
    mixed = teacher + teachers,
    teacher1 = mixed + teachers,
    student1 = teacher1 + kTeacherAt1,
    mass = student1 + kAt1,
    product = mass + (labels == Labels::soft),
    rank = product + (labels == Labels::soft),
    kCount = rank + (labels != Labels::none)
  };
};

// The label's natural exponents in the student's and in the teacher's row, at their temperatures and at T = 1.
template <int teachers>
struct Far {
  float student = -INFINITY, teacher[teachers > 0 ? teachers : 1], student1 = -INFINITY, teacher1 = -INFINITY;
};

// The loss, its own terms, cross-entropy, top-1 and top-5.
template <class Loss>
constexpr int columns_of = 1 + Loss::kTerms + 3;

template <int teachers>
struct Blend {
  float a, c;  // the factors of the student's exponentials at T and at T = 1
  float b[teachers > 0 ? teachers : 1];  // and of the teachers'
  float label;  // the entry of the label
  float q;  // the factor of class probabilities
};

template <class Loss, int teachers>
struct Conclusion {
  float values[columns_of<Loss>];
  Blend<teachers> gradient;
};

struct Hit {
  float top1, top5;
};

KDFUSE_DEVICE Hit hit_of(float label, float rank) {
  const bool number = label == label;
  return {number && rank < 1 ? 1.f : 0.f, number && rank < 5 ? 1.f : 0.f};
}

KDFUSE_DEVICE float from_lane(float value, int lane) { return __shfl_sync(0xffffffffu, value, lane); }

// The softmaxes of n sets of statistics. Each lane of a warp makes one of them: it is the longest piece of a
// row's arithmetic that is not done for every class.
template <int n>
KDFUSE_DEVICE void split_all(const Stats<float> (&x)[n], Split<float> (&out)[n]) {
  const int lane = threadIdx.x % 32;
  Stats<float> mine = x[0];
#pragma unroll
  for (int k = 1; k < n; ++k) mine = {lane == k ? x[k].sum : mine.sum, lane == k ? x[k].label : mine.label};
  const Split<float> s = split(mine);
#pragma unroll
  for (int k = 0; k < n; ++k) {
    out[k] = {from_lane(s.lse, k), from_lane(s.label, k), from_lane(s.rest, k), from_lane(s.log_label, k),
              from_lane(s.unit, k)};
  }
}

// The same of rows without a label, which are all rest.
template <int n>
KDFUSE_DEVICE void split_rest(const Stats<float> (&x)[n], Split<float> (&out)[n]) {
  const int lane = threadIdx.x % 32;
  float mine = x[0].sum;
#pragma unroll
  for (int k = 1; k < n; ++k) mine = lane == k ? x[k].sum : mine;
  const float log_sum = std::log(mine), unit = 1 / mine;
#pragma unroll
  for (int k = 0; k < n; ++k) out[k] = {from_lane(log_sum, k), 0, 1, -INFINITY, from_lane(unit, k)};
}

// A row's student and teachers from their sums, as far as the loss reads them.
template <class Loss, Labels labels, int teachers>
KDFUSE_DEVICE void taught(const float (&sums)[Sums<Loss, labels, teachers>::kCount], const Far<teachers>& far,
                          Taught<float> (&x)[teachers]) {
  using S = Sums<Loss, labels, teachers>;
  enum {
    kOwn,
    kTeacher = kOwn + (S::kApart && Loss::kSoftmaxAtT),
    kAt1 = kTeacher + teachers * Loss::kSoftmaxAtT,
    kTeacherAt1 = kAt1 + S::kAt1,
    kCount = kTeacherAt1 + S::kTeacherAt1
  };
  Stats<float> of[kCount];
  const Stats<float> z = {sums[S::kApart ? S::student : S::student1], S::kApart ? far.student : far.student1};
  if constexpr (S::kApart && Loss::kSoftmaxAtT) of[kOwn] = z;
#pragma unroll
  for (int k = 0; k < teachers; ++k) {
    x[k] = {z, {sums[S::teacher + k], far.teacher[k]}, {}, {}, {}, {}, kLn2 * sums[S::mixed + k]};
    if constexpr (Loss::kSoftmaxAtT) of[kTeacher + k] = x[k].t_sums;
  }
  if constexpr (S::kAt1) of[kAt1] = {sums[S::student1], far.student1};
  if constexpr (S::kTeacherAt1) of[kTeacherAt1] = {sums[S::teacher1], far.teacher1};
  Split<float> made[kCount];
  if constexpr (labels == Labels::hard) {
    split_all(of, made);
  } else {
    split_rest(of, made);
  }
#pragma unroll
  for (int k = 0; k < teachers; ++k) {
    if constexpr (S::kAt1) x[k].z1 = made[kAt1];
    if constexpr (S::kTeacherAt1) x[k].t1 = made[kTeacherAt1];
    if constexpr (Loss::kSoftmaxAtT) x[k].z = made[S::kApart ? kOwn : kAt1], x[k].t = made[kTeacher + k];
  }
}

// The launcher brings no row here that a weight of 0 should leave out.
template <class Loss, Labels labels, int teachers>
KDFUSE_DEVICE Conclusion<Loss, teachers> conclude(const FastTask& p,
                                                  const float (&sums)[Sums<Loss, labels, teachers>::kCount],
                                                  const Far<teachers>& far, Hit hit) {
  using S = Sums<Loss, labels, teachers>;
  Taught<float> x[teachers];
  taught<Loss, labels>(sums, far, x);
  const auto* const factors = reinterpret_cast<const typename Loss::template Factors<float>*>(p.params);
  Lesson<float, Loss::kTerms> row;
  Conclusion<Loss, teachers> found = {};
  Blend<teachers>& g = found.gradient;
#pragma unroll
  for (int k = 0; k < teachers; ++k) g.b[k] = Loss::template add<false>(factors[k], x[k], row);
  g.a = row.a, g.c = row.c, g.label = row.label;
  float ce = 0;
  if constexpr (labels == Labels::hard) {
    ce = cross_entropy(x[0].z1, 1.f, far.student1);
    g.c = std::fma(p.ce_weight, x[0].z1.unit, row.c), g.label = std::fma(-p.ce_weight, x[0].z1.rest, row.label);
  }
  if constexpr (labels == Labels::soft) {
    ce = cross_entropy(x[0].z1, sums[S::mass], kLn2 * sums[S::product]);
    g.c = std::fma(p.ce_weight * sums[S::mass], x[0].z1.unit, row.c), g.q = -p.ce_weight;
  }
  if constexpr (Loss::kStudentAt1) g.c += g.a, g.a = 0;
  found.values[0] = labels == Labels::none ? row.value : row.value + gated(p.ce_weight, ce);
#pragma unroll
  for (int k = 0; k < Loss::kTerms; ++k) found.values[1 + k] = row.terms_of_row[k];
  found.values[Loss::kTerms + 1] = ce;
  found.values[Loss::kTerms + 2] = hit.top1, found.values[Loss::kTerms + 3] = hit.top5;
  return found;
}

// The score: the label's probability, and its mean over the batch.
KDFUSE_DEVICE Conclusion<TfNkd, 0> conclude_alone(const FastTask& p, const Split<float>& at1, float far, Hit hit,
                                                  double score, double mean) {
  const TfNkdParams<float> q(p.params);
  const float w = static_cast<float>(smoothed_weight(score, 1., mean)), value = gated(w, -at1.log_label);
  const float ce = cross_entropy(at1, 1.f, far), c = q.weight * w + q.ce_weight;
  const float loss = gated(q.weight, value) + gated(q.ce_weight, ce);
  return {{loss, value, ce, hit.top1, hit.top5}, {0, c * at1.unit, {0}, -c * at1.rest, 0}};
}

// The exponentials of a class: at their temperatures, and the student's at T = 1.
template <int teachers>
struct Powers {
  float z, one, t[teachers > 0 ? teachers : 1];
};

// A student's row and its teachers', class by class.
// squarings: so many make one at T = 1 of an exponential at T, which is 1, 2 or 4; negative: T is any.
template <class Loss, Labels labels, int teachers, int squarings = -1>
struct Pair {
  using S = Sums<Loss, labels, teachers>;
  using E = Powers<teachers>;
  using G = Blend<teachers>;
  static constexpr int kLogits = 1 + teachers;
  Exponents z, z1, t[teachers > 0 ? teachers : 1], t1;  // at their temperatures and at T = 1

  // peak: of the student, then of the teachers.
  KDFUSE_DEVICE_MEMBER Pair(const FastTask& p, const float (&peak)[kLogits]) {
    z = exponents(p.own_step, peak[0]), z1 = exponents(kLog2e, peak[0]);
#pragma unroll
    for (int k = 0; k < teachers; ++k) t[k] = exponents(p.step, peak[1 + k]);
    t1 = exponents(kLog2e, peak[kLogits - 1]);
  }

  KDFUSE_DEVICE_MEMBER Far<teachers> far(const float (&label)[kLogits]) const {
    Far<teachers> far;
#pragma unroll
    for (float& teacher : far.teacher) teacher = -INFINITY;
    if constexpr (labels != Labels::hard) return far;
    far.student1 = z1.natural(label[0]);
    if constexpr (S::kApart) far.student = z.natural(label[0]);
#pragma unroll
    for (int k = 0; k < teachers; ++k) far.teacher[k] = t[k].natural(label[1 + k]);
    if constexpr (S::kTeacherAt1) far.teacher1 = t1.natural(label[kLogits - 1]);
    return far;
  }

  KDFUSE_DEVICE_MEMBER E powers(const float (&x)[kLogits]) const {
    E e = {};
    if constexpr (S::kApart) e.z = power(z.of(x[0]));
#pragma unroll
    for (int k = 0; k < teachers; ++k) e.t[k] = power(t[k].of(x[1 + k]));
    if constexpr (S::kAt1) e.one = S::kApart ? at_one(z1, x[0], e.z) : power(z1.of(x[0]));
    return e;
  }

  KDFUSE_DEVICE_MEMBER E add(const float (&x)[kLogits], float (&sums)[S::kCount]) const {
    const E e = powers(x);
    if constexpr (S::kAt1) sums[S::student1] += e.one;
    if constexpr (S::kApart) sums[S::student] += e.z;
    if constexpr (S::kTaught) {
#pragma unroll
      for (int k = 0; k < teachers; ++k) {
        const float uz = S::kApart ? z.of(x[0]) : z1.of(x[0]), ut = t[k].of(x[1 + k]);
        const float gap = Loss::kEntropy ? ut - uz : uz;
        sums[S::teacher + k] += e.t[k];
        sums[S::mixed + k] = e.t[k] > 0 ? std::fma(e.t[k], gap, sums[S::mixed + k]) : sums[S::mixed + k];
      }
    }
    if constexpr (S::kTeacherAt1) sums[S::teacher1] += at_one(t1, x[kLogits - 1], e.t[0]);
    return e;
  }

  // A class's probability in the target.
  KDFUSE_DEVICE_MEMBER void add_probability(float x, float q, float (&sums)[S::kCount]) const {
    sums[S::mass] += q;
    sums[S::product] = q != 0 ? std::fma(q, z1.of(x), sums[S::product]) : sums[S::product];
  }

  // An exponential at T = 1, of a class whose one at T is e.
  KDFUSE_DEVICE_MEMBER static float at_one(const Exponents& of, float x, float e) {
    if constexpr (squarings < 0) return power(of.of(x));
    if constexpr (squarings > 0) e *= e;
    return squarings == 2 ? e * e : e;
  }

  KDFUSE_DEVICE_MEMBER static float combine(const G& g, const E& e) {
    if constexpr (teachers == 0) return g.c * e.one;
    if constexpr (!S::kApart) return g.c * e.one + g.b[0] * e.t[0];
    if constexpr (labels == Labels::none) return combine_bare(g, e);
    float sum = g.c * e.one;
#pragma unroll
    for (int k = teachers - 1; k >= 0; --k) sum = std::fma(g.b[k], e.t[k], sum);
    return std::fma(g.a, e.z, sum);
  }

  // Where nothing is at T = 1. Each product is rounded by itself, so that equal rows with opposite factors cancel
  // to exactly 0.
  KDFUSE_DEVICE_MEMBER static float combine_bare(const G& g, const E& e) {
    float sum = g.a * e.z;
#pragma unroll
    for (int k = 0; k < teachers; ++k) sum += g.b[k] * e.t[k];
    return sum;
  }

  KDFUSE_DEVICE_MEMBER static bool is_bare(const G& g) { return S::kApart && g.c == 0; }
};

template <int teachers>
KDFUSE_DEVICE Blend<teachers> weighted(Blend<teachers> g, float weight) {
  g.a *= weight, g.c *= weight, g.label *= weight, g.q *= weight;
#pragma unroll
  for (float& b : g.b) b *= weight;
  return g;
}

}  // namespace kdfuse
