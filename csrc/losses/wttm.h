// Zheng and Yang 2024, "Knowledge Distillation Based on Transformed Teacher Matching" (WTTM): the student at T = 1
// learns the teacher's powered softmax q = p^gamma / sum p^gamma, gamma = 1 / T, that is, the teacher at T:
//   loss = kd_weight * U * KL(q || softmax(z)) + ce_weight * CE
// with the row's weight U = sum_j p_j^gamma, or 1 (TTM).
// params: T, kd_weight, ce_weight, weighted (1, or 0)
#pragma once
#include "taught.h"

namespace kdfuse {

struct Wttm {
  static constexpr int kTerms = 1, kParams = 4, kCeWeight = 2;
  static constexpr bool kManyTeachers = false, kTakesTopK = true, kNeedsTarget = false;
  static constexpr bool kStudentAt1 = true, kTeacherAt1 = true, kEntropy = true, kSoftmaxAtT = true;

  template <class R>
  struct Factors {
    R kd_weight, gamma, weighted;
  };

  KDFUSE_MEMBER static bool reads(const double*, int) { return true; }
  static bool weighs_all(const double* p, int) { return p[1] != 0; }

  template <class R>
  KDFUSE_MEMBER static Factors<R> factors(const double* p, int) {
    return {R(p[1]), R(1) / R(p[0]), R(p[3])};
  }

  template <bool may_be_zero, class R>
  KDFUSE_MEMBER static R add(const Factors<R>& f, const Taught<R>& x, Lesson<R, kTerms>& row) {
    const Kl<R> pair = kl(x.z_sums, x.z, x.t_sums, x.t, x.mixed);
    // Of the exponents' two origins, the peak at T and at 1, gamma makes one: they cancel.
    const R of_row = f.weighted != R(0) ? std::exp(x.t.lse - f.gamma * x.t1.lse) : R(1);
    const R step = times<may_be_zero>(f.kd_weight, of_row);
    row.terms_of_row[0] = of_row * pair.value;
    row.value = gated(f.kd_weight, row.terms_of_row[0]);
    row.a = times<may_be_zero>(step, pair.a);
    row.label = times<may_be_zero>(step, pair.label);
    return -times<may_be_zero>(step, pair.b);
  }
};

}  // namespace kdfuse
