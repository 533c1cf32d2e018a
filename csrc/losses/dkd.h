// Zhao et al. 2022, "Decoupled Knowledge Distillation":
//   loss = square * (alpha * TCKD + beta * NCKD) + ce_weight * CE
// params: T, square (T^2, or 1), alpha, beta, ce_weight
#pragma once
#include "taught.h"

namespace kdfuse {

struct Dkd {
  static constexpr int kTerms = 2, kParams = 5, kCeWeight = 4;
  static constexpr bool kManyTeachers = false, kTakesTopK = true, kNeedsTarget = true;
  static constexpr bool kStudentAt1 = false, kTeacherAt1 = false, kEntropy = true, kSoftmaxAtT = true;

  template <class R>
  struct Factors {
    R square, alpha, beta, step_of_alpha, step_of_beta;  // a step: the weight times T, of its derivative in the loss
  };

  KDFUSE_MEMBER static bool reads(const double*, int) { return true; }
  static bool weighs_all(const double* p, int) { return p[2] != 0 || p[3] != 0; }

  template <class R>
  KDFUSE_MEMBER static Factors<R> factors(const double* p, int) {
    const R square = R(p[1]), step = square / R(p[0]), alpha = R(p[2]), beta = R(p[3]);
    return {square, alpha, beta, step * alpha, step * beta};
  }

  template <bool may_be_zero, class R>
  KDFUSE_MEMBER static R add(const Factors<R>& f, const Taught<R>& x, Lesson<R, kTerms>& row) {
    // log((1 - q_y) / (1 - p_y)) as a difference of log-sum-exps.
    const R rest_ratio = gated(x.t.rest, (lse_rest(x.t_sums) - x.t.lse) - (lse_rest(x.z_sums) - x.z.lse));
    const R tckd = gated(x.t.label, x.t.log_label - x.z.log_label) + rest_ratio;
    const Kl<R> others = kl_rest(x.z_sums, x.t_sums, x.mixed);
    // d TCKD / d z_j = -gap * p_j / (1 - p_y), and p_j / (1 - p_y) = e_j / sum.
    const R gap = x.z.label - x.t.label;
    const R spread = x.z_sums.sum > R(0) ? R(1) / x.z_sums.sum : R(0);
    row.terms_of_row[0] = f.square * tckd, row.terms_of_row[1] = f.square * others.value;
    row.value = gated(f.alpha, row.terms_of_row[0]) + gated(f.beta, row.terms_of_row[1]);
    // Without TCKD the teacher's label may hold anything.
    row.label = gated(f.step_of_alpha, gap);
    row.a = times<may_be_zero>(f.step_of_beta, others.a) - row.label * spread;
    return -times<may_be_zero>(f.step_of_beta, others.b);
  }
};

}  // namespace kdfuse
