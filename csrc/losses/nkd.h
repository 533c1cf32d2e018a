// Yang et al. 2023, "From Knowledge Distillation to Self-Knowledge Distillation":
//   loss = -V_y log S_y - gamma * square * sum_{j != y} V'_j log S'_j + ce_weight * CE
// with V_y and S_y at T = 1 and the softmaxes V', S' of the rest at temperature T. The second term
// is a cross-entropy: the teacher's entropy stays in.
// params: T, square (T^2, or 1), gamma, ce_weight
#pragma once
#include "taught.h"

namespace kdfuse {

struct Nkd {
  static constexpr int kTerms = 2, kParams = 4, kCeWeight = 3;
  static constexpr bool kManyTeachers = false, kTakesTopK = true, kNeedsTarget = true;
  static constexpr bool kStudentAt1 = false, kTeacherAt1 = true, kEntropy = false, kSoftmaxAtT = false;

  template <class R>
  struct Factors {
    R square, gamma, step;
  };

  KDFUSE_MEMBER static bool reads(const double*, int) { return true; }
  static bool weighs_all(const double* p, int) { return p[2] != 0; }

  template <class R>
  KDFUSE_MEMBER static Factors<R> factors(const double* p, int) {
    return {R(p[1]), R(p[2]), R(p[2]) * R(p[1]) / R(p[0])};
  }

  template <bool may_be_zero, class R>
  KDFUSE_MEMBER static R add(const Factors<R>& f, const Taught<R>& x, Lesson<R, kTerms>& row) {
    const R weight = x.t1.label;
    R &target = row.terms_of_row[0], &others = row.terms_of_row[1], b = 0;
    target = gated(weight, -x.z1.log_label);
    row.c = weight * x.z1.unit;
    row.label = -weight * x.z1.rest;
    if (x.t_sums.sum != R(0)) {
      b = R(1) / x.t_sums.sum;
      const bool reached = x.z_sums.sum != R(0);
      others = reached ? f.square * (lse_rest(x.z_sums) - x.mixed * b) : R(INFINITY);
      row.a = reached ? f.step / x.z_sums.sum : R(0);
    }
    row.value = target + gated(f.gamma, others);
    return -f.step * b;
  }
};

}  // namespace kdfuse
