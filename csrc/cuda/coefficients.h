// What a pass over a row has found, and what a loss concludes from it: the row's value and the
// coefficients of its gradient. For the rows of one student and at most one teacher with a label.
#pragma once
#include <type_traits>

#include "../core/device.h"
#include "../losses/taught.h"
#include "../losses/tf_nkd.h"
#include "grid.h"
#include "kernel_table.h"

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

// What a row is summed up to, over the classes but the label, of a student z and a teacher t: exponentials at
// their temperatures and at T = 1, Taught::mixed to base 2, and how many classes come before the label.
template <class Loss, bool labelled>
struct Sums {
  static constexpr bool kTaught = is_taught<Loss>, kTeacherAt1 = Loss::kTeacherAt1;
  static constexpr bool kApart = kTaught && !Loss::kStudentAt1;  // the student at T from the one at T = 1
  static constexpr bool kAt1 = labelled || Loss::kStudentAt1;
  enum {
    student,
    teacher = student + kApart,
    mixed = teacher + kTaught,
    teacher1 = mixed + kTaught,
    student1 = teacher1 + kTeacherAt1,
    rank = student1 + kAt1,
    kCount = rank + labelled
  };
};

// The label's natural exponents in the student's and in the teacher's row, at their temperatures and at T = 1.
struct Far {
  float student = -INFINITY, teacher = -INFINITY, student1 = -INFINITY, teacher1 = -INFINITY;
};

// The loss, its own terms, cross-entropy, top-1 and top-5.
template <class Loss>
constexpr int columns_of = 1 + Loss::kTerms + 3;

struct Blend {
  float a, c, b;  // the factors of the student's exponentials at T and at T = 1, and of the teacher's
  float label;  // the entry of the label
};

template <class Loss>
struct Conclusion {
  float values[columns_of<Loss>];
  Blend gradient;
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

// A row's student and teacher from their sums, as far as the loss reads them.
template <class Loss, bool labelled>
KDFUSE_DEVICE Taught<float> taught(const float (&sums)[Sums<Loss, labelled>::kCount], const Far& far) {
  using S = Sums<Loss, labelled>;
  enum {
    kOwn,
    kTeacher = kOwn + (S::kApart && Loss::kSoftmaxAtT),
    kAt1 = kTeacher + Loss::kSoftmaxAtT,
    kTeacherAt1 = kAt1 + S::kAt1,
    kCount = kTeacherAt1 + S::kTeacherAt1
  };
  Stats<float> of[kCount];
  const Stats<float> z = {sums[S::kApart ? S::student : S::student1], S::kApart ? far.student : far.student1};
  const Stats<float> t = {sums[S::teacher], far.teacher};
  if constexpr (S::kApart && Loss::kSoftmaxAtT) of[kOwn] = z;
  if constexpr (Loss::kSoftmaxAtT) of[kTeacher] = t;
  if constexpr (S::kAt1) of[kAt1] = {sums[S::student1], far.student1};
  if constexpr (S::kTeacherAt1) of[kTeacherAt1] = {sums[S::teacher1], far.teacher1};
  Split<float> made[kCount];
  if constexpr (labelled) {
    split_all(of, made);
  } else {
    split_rest(of, made);
  }
  Taught<float> x = {z, t, {}, {}, {}, {}, kLn2 * sums[S::mixed]};
  if constexpr (S::kAt1) x.z1 = made[kAt1];
  if constexpr (S::kTeacherAt1) x.t1 = made[kTeacherAt1];
  if constexpr (Loss::kSoftmaxAtT) x.z = made[S::kApart ? kOwn : kAt1], x.t = made[kTeacher];
  return x;
}

// The launcher brings no row here that a weight of 0 should leave out.
template <class Loss, bool labelled>
KDFUSE_DEVICE Conclusion<Loss> conclude(const FastTask& p, const float (&sums)[Sums<Loss, labelled>::kCount],
                                        const Far& far, Hit hit) {
  const Taught<float> x = taught<Loss, labelled>(sums, far);
  const auto& factors = *reinterpret_cast<const typename Loss::template Factors<float>*>(p.params);
  Lesson<float, Loss::kTerms> row;
  const float b = Loss::template add<false>(factors, x, row);
  Conclusion<Loss> found = {};
  Blend& g = found.gradient;
  g = {row.a, row.c, b, row.label};
  float ce = 0;
  if constexpr (labelled) {
    ce = cross_entropy(x.z1, 1.f, far.student1);
    g.c = std::fma(p.ce_weight, x.z1.unit, row.c), g.label = std::fma(-p.ce_weight, x.z1.rest, row.label);
  }
  if constexpr (Loss::kStudentAt1) g.c += g.a, g.a = 0;
  found.values[0] = labelled ? row.value + gated(p.ce_weight, ce) : row.value;
#pragma unroll
  for (int k = 0; k < Loss::kTerms; ++k) found.values[1 + k] = row.terms_of_row[k];
  found.values[Loss::kTerms + 1] = ce;
  found.values[Loss::kTerms + 2] = hit.top1, found.values[Loss::kTerms + 3] = hit.top5;
  return found;
}

// The score: the label's probability, and its mean over the batch.
KDFUSE_DEVICE Conclusion<TfNkd> conclude_alone(const FastTask& p, const Split<float>& at1, float far, Hit hit,
                                               double score, double mean) {
  const TfNkdParams<float> q(p.params);
  const float w = static_cast<float>(smoothed_weight(score, 1., mean)), value = gated(w, -at1.log_label);
  const float ce = cross_entropy(at1, 1.f, far), c = q.weight * w + q.ce_weight;
  const float loss = gated(q.weight, value) + gated(q.ce_weight, ce);
  return {{loss, value, ce, hit.top1, hit.top5}, {0, c * at1.unit, 0, -c * at1.rest}};
}

// The exponentials of a class: at their temperatures, and the student's at T = 1.
struct Powers {
  float z, t, one;
};

// A student's row and its teacher's, class by class.
//
// squarings: so many make one at T = 1 of an exponential at T, which is 1, 2 or 4; negative: T is any.
template <class Loss, bool labelled, int squarings = -1>
struct Pair {
  using S = Sums<Loss, labelled>;
  Exponents z, t, z1, t1;  // at their temperatures and at T = 1

  KDFUSE_DEVICE_MEMBER Pair(const FastTask& p, float peak, float of_teacher) {
    z = exponents(p.own_step, peak), t = exponents(p.step, of_teacher);
    z1 = exponents(kLog2e, peak), t1 = exponents(kLog2e, of_teacher);
  }

  KDFUSE_DEVICE_MEMBER Far far(float label, float of_teacher) const {
    Far far;
    if constexpr (labelled) far.student1 = z1.natural(label);
    if constexpr (labelled && S::kApart) far.student = z.natural(label);
    if constexpr (labelled && S::kTaught) far.teacher = t.natural(of_teacher);
    if constexpr (labelled && S::kTeacherAt1) far.teacher1 = t1.natural(of_teacher);
    return far;
  }

  KDFUSE_DEVICE_MEMBER Powers powers(float x, float of_teacher) const {
    Powers e = {S::kApart ? power(z.of(x)) : 0.f, S::kTaught ? power(t.of(of_teacher)) : 0.f, 0.f};
    if constexpr (S::kAt1) e.one = S::kApart ? at_one(z1, x, e.z) : power(z1.of(x));
    return e;
  }

  KDFUSE_DEVICE_MEMBER Powers add(float x, float of_teacher, float (&sums)[S::kCount]) const {
    const Powers e = powers(x, of_teacher);
    if constexpr (S::kAt1) sums[S::student1] += e.one;
    if constexpr (S::kTaught) {
      const float uz = S::kApart ? z.of(x) : z1.of(x), ut = t.of(of_teacher), gap = Loss::kEntropy ? ut - uz : uz;
      if constexpr (S::kApart) sums[S::student] += e.z;
      sums[S::teacher] += e.t;
      sums[S::mixed] = e.t > 0 ? std::fma(e.t, gap, sums[S::mixed]) : sums[S::mixed];
      if constexpr (S::kTeacherAt1) sums[S::teacher1] += at_one(t1, of_teacher, e.t);
    }
    return e;
  }

  // An exponential at T = 1, of a class whose one at T is e.
  KDFUSE_DEVICE_MEMBER static float at_one(const Exponents& of, float x, float e) {
    if constexpr (squarings < 0) return power(of.of(x));
    if constexpr (squarings > 0) e *= e;
    return squarings == 2 ? e * e : e;
  }

  KDFUSE_DEVICE_MEMBER static float combine(const Blend& g, const Powers& e) {
    if constexpr (!S::kTaught) return g.c * e.one;
    if constexpr (!S::kApart) return g.c * e.one + g.b * e.t;
    if constexpr (labelled) return std::fma(g.a, e.z, std::fma(g.b, e.t, g.c * e.one));
    return combine_bare(g, e);
  }

  // Where nothing is at T = 1. Each product is rounded by itself, so that equal rows with opposite factors cancel
  // to exactly 0.
  KDFUSE_DEVICE_MEMBER static float combine_bare(const Blend& g, const Powers& e) { return g.a * e.z + g.b * e.t; }

  KDFUSE_DEVICE_MEMBER static bool is_bare(const Blend& g) { return S::kApart && g.c == 0; }
};

KDFUSE_DEVICE Blend weighted(Blend g, float weight) {
  g.a *= weight, g.b *= weight, g.c *= weight, g.label *= weight;
  return g;
}

}  // namespace kdfuse
