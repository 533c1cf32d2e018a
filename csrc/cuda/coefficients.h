// What a pass over a row has found, and what each loss concludes from it: the row's value and the
// coefficients of its gradient. For the rows of one student and at most one teacher with a label.
#pragma once
#include "../core/device.h"
#include "../losses/dkd.h"
#include "../losses/kd.h"
#include "../losses/nkd.h"
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

// What a row is summed up to, over the classes but the label, of a student z and a teacher t: exponentials at
// T and at T = 1, the teacher's exponentials times a difference of exponents (u_z for NKD, u_t - u_z for the
// others), and how many classes come before the label.
template <Loss loss, bool labelled>
struct Sums {
  static constexpr bool kAtT = loss != Loss::tf_nkd, kAt1 = labelled, kTeacherAt1 = loss == Loss::nkd;
  enum {
    student,
    teacher = student + kAtT,
    mixed = teacher + kAtT,
    teacher1 = mixed + kAtT,
    student1 = teacher1 + kTeacherAt1,
    rank = student1 + kAt1,
    kCount = rank + labelled
  };
};

// The label's natural exponents in the student's and in the teacher's row, at T and at T = 1.
struct Far {
  float student = -INFINITY, teacher = -INFINITY, student1 = -INFINITY, teacher1 = -INFINITY;
};

template <Loss loss>
constexpr int columns_of = loss == Loss::kd || loss == Loss::tf_nkd ? 5 : 6;

template <Loss loss>
struct Conclusion {
  float values[columns_of<loss>];  // the loss, then its terms
  float a, c, b;  // of the student's exponentials at T and at T = 1, and of the teacher's
  float label;  // the gradient at the label
};

struct Hit {
  float top1, top5;
};

KDFUSE_DEVICE Hit hit_of(float label, float rank) {
  const bool number = label == label;
  return {number && rank < 1 ? 1.f : 0.f, number && rank < 5 ? 1.f : 0.f};
}

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
    const auto of = [k](float value) { return __shfl_sync(0xffffffffu, value, k); };
    out[k] = {of(s.lse), of(s.label), of(s.rest), of(s.log_label), of(s.unit)};
  }
}

// The same of two rows without a label, which are all rest.
KDFUSE_DEVICE void split_rest(float z, float t, Split<float> (&out)[2]) {
  const float mine = threadIdx.x % 2 ? t : z, log_sum = std::log(mine), unit = 1 / mine;
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    out[k] = {__shfl_sync(0xffffffffu, log_sum, k), 0, 1, -INFINITY, __shfl_sync(0xffffffffu, unit, k)};
  }
}

// The launcher brings no row here that a weight of 0 should leave out.
template <Loss loss, bool labelled>
KDFUSE_DEVICE Conclusion<loss> conclude(const FastTask& p, const float (&sums)[Sums<loss, labelled>::kCount],
                                        const Far& far, Hit hit) {
  using S = Sums<loss, labelled>;
  const float mixed = kLn2 * sums[S::mixed];
  const Stats<float> z = {sums[S::student], far.student}, t = {sums[S::teacher], far.teacher};
  if constexpr (!labelled) {
    const KdParams<float> q(p.params);
    KdRow<float> row;
    Split<float> of[2];
    split_rest(z.sum, t.sum, of);
    const auto pair = kl(z, of[0], t, of[1], mixed);
    const float b = kd_add<false>(row, pair, p.kd);
    return {{q.kd_weight * row.value, row.value, 0, 0, 0}, row.a, 0, b, 0};
  } else if constexpr (loss == Loss::nkd) {
    const NkdParams<float> q(p.params);
    Split<float> of[2];
    split_all<2>({{sums[S::student1], far.student1}, {sums[S::teacher1], far.teacher1}}, of);
    const auto row = nkd(q, z, of[0].log_label, t, of[1].label, mixed);
    const float ce = cross_entropy(of[0], 1.f, far.student1), c = row.weight + q.ce_weight;
    const float value = row.target + q.gamma * row.others + gated(q.ce_weight, ce);
    return {{value, row.target, row.others, ce, hit.top1, hit.top5}, row.a, c * of[0].unit, row.b, -c * of[0].rest};
  } else {
    Split<float> of[3];
    split_all<3>({z, t, {sums[S::student1], far.student1}}, of);
    const float ce = cross_entropy(of[2], 1.f, far.student1);
    if constexpr (loss == Loss::kd) {
      const KdParams<float> q(p.params);
      KdRow<float> row;
      const auto pair = kl(z, of[0], t, of[1], mixed);
      const float b = kd_add<false>(row, pair, p.kd);
      const float value = q.kd_weight * row.value + gated(q.ce_weight, ce);
      const float at_label = row.label - q.ce_weight * of[2].rest;
      return {{value, row.value, ce, hit.top1, hit.top5}, row.a, q.ce_weight * of[2].unit, b, at_label};
    } else {
      static_assert(loss == Loss::dkd, "a loss with a teacher");
      const DkdParams<float> q(p.params);
      const auto row = dkd(q, z, of[0], t, of[1], mixed);
      const float value = gated(q.alpha, row.tckd) + gated(q.beta, row.nckd) + gated(q.ce_weight, ce);
      const float at_label = row.label - q.ce_weight * of[2].rest;
      return {{value, row.tckd, row.nckd, ce, hit.top1, hit.top5}, row.a, q.ce_weight * of[2].unit, row.b, at_label};
    }
  }
}

// The score: the label's probability, and its mean over the batch.
KDFUSE_DEVICE Conclusion<Loss::tf_nkd> conclude_alone(const FastTask& p, const Split<float>& at1, float far, Hit hit,
                                                      double score, double mean) {
  const TfNkdParams<float> q(p.params);
  const float w = static_cast<float>(smoothed_weight(score, 1., mean)), value = gated(w, -at1.log_label);
  const float ce = cross_entropy(at1, 1.f, far), c = q.weight * w + q.ce_weight;
  const float loss = gated(q.weight, value) + gated(q.ce_weight, ce);
  return {{loss, value, ce, hit.top1, hit.top5}, 0, c * at1.unit, 0, -c * at1.rest};
}

// A student's row and its teacher's, class by class.
template <Loss loss, bool labelled>
struct Pair {
  using S = Sums<loss, labelled>;
  Exponents z, t, z1, t1;  // at T and at T = 1

  struct Powers {
    float z, t, one;
  };

  KDFUSE_DEVICE_MEMBER Pair(const FastTask& p, float peak, float of_teacher) {
    z = exponents(p.step, peak), t = exponents(p.step, of_teacher);
    z1 = exponents(kLog2e, peak), t1 = exponents(kLog2e, of_teacher);
  }

  KDFUSE_DEVICE_MEMBER Far far(float label, float of_teacher) const {
    Far far;
    if constexpr (labelled) far.student1 = z1.natural(label);
    if constexpr (labelled && S::kAtT) far.student = z.natural(label), far.teacher = t.natural(of_teacher);
    if constexpr (S::kTeacherAt1) far.teacher1 = t1.natural(of_teacher);
    return far;
  }

  KDFUSE_DEVICE_MEMBER Powers powers(float x, float of_teacher) const {
    return {S::kAtT ? power(z.of(x)) : 0.f, S::kAtT ? power(t.of(of_teacher)) : 0.f, labelled ? power(z1.of(x)) : 0.f};
  }

  KDFUSE_DEVICE_MEMBER Powers add(float x, float of_teacher, float (&sums)[S::kCount]) const {
    Powers e = {0, 0, 0};
    if constexpr (labelled) sums[S::student1] += e.one = power(z1.of(x));
    if constexpr (S::kAtT) {
      const float uz = z.of(x), ut = t.of(of_teacher), gap = loss == Loss::nkd ? uz : ut - uz;
      sums[S::student] += e.z = power(uz);
      sums[S::teacher] += e.t = power(ut);
      sums[S::mixed] = e.t > 0 ? std::fma(e.t, gap, sums[S::mixed]) : sums[S::mixed];
      if constexpr (S::kTeacherAt1) sums[S::teacher1] += power(t1.of(of_teacher));
    }
    return e;
  }

  KDFUSE_DEVICE_MEMBER static float combine(const Conclusion<loss>& g, const Powers& e) {
    if constexpr (!S::kAtT) return g.c * e.one;
    if constexpr (labelled) return std::fma(g.a, e.z, std::fma(g.b, e.t, g.c * e.one));
    return combine_bare(g, e);
  }

  // Where nothing is at T = 1. Each product is rounded by itself, so that equal rows with opposite factors cancel
  // to exactly 0.
  KDFUSE_DEVICE_MEMBER static float combine_bare(const Conclusion<loss>& g, const Powers& e) {
    return g.a * e.z + g.b * e.t;
  }

  KDFUSE_DEVICE_MEMBER static bool is_bare(const Conclusion<loss>& g) { return S::kAtT && g.c == 0; }
};

template <Loss loss>
KDFUSE_DEVICE Conclusion<loss> weighted(Conclusion<loss> g, float weight) {
  g.a *= weight, g.b *= weight, g.c *= weight, g.label *= weight;
  return g;
}

}  // namespace kdfuse
