// Hinton et al. 2015, "Distilling the Knowledge in a Neural Network", with K weighted teachers:
//   loss = kd_weight * square * sum_k w_k KL(softmax(t_k / T) || softmax(z / T)) + ce_weight * CE
// params: T, square (T^2, or 1), kd_weight, ce_weight, w_1 ... w_K
#pragma once
#include "taught.h"

namespace kdfuse {

struct Kd {
  static constexpr int kTerms = 1, kParams = 4, kCeWeight = 3;
  static constexpr bool kManyTeachers = true, kTakesTopK = true, kNeedsTarget = false;
  static constexpr bool kStudentAt1 = false, kTeacherAt1 = false, kEntropy = true, kSoftmaxAtT = true;

  template <class R>
  struct Factors {
    R weight, value, step;  // of the sum over the teachers; of this one in it; times T, of its derivative in the loss
  };

  KDFUSE_MEMBER static bool reads(const double* p, int k) { return p[4 + k] != 0; }
  static bool weighs_all(const double* p, int k) { return p[2] != 0 && p[4 + k] != 0; }

  template <class R>
  KDFUSE_MEMBER static Factors<R> factors(const double* p, int k) {
    const R square = R(p[1]), weight = R(p[2]), of_teacher = R(p[4 + k]);
    return {weight, of_teacher * square, weight * of_teacher * square / R(p[0])};
  }

  template <bool may_be_zero, class R>
  KDFUSE_MEMBER static R add(const Factors<R>& f, const Taught<R>& x, Lesson<R, kTerms>& row) {
    const Kl<R> pair = kl(x.z_sums, x.z, x.t_sums, x.t, x.mixed);
    R& term = row.terms_of_row[0];
    term += times<may_be_zero>(f.value, pair.value);
    row.value = times<may_be_zero>(f.weight, term);
    row.a += times<may_be_zero>(f.step, pair.a);
    row.label += times<may_be_zero>(f.step, pair.label);
    return -times<may_be_zero>(f.step, pair.b);
  }
};

}  // namespace kdfuse
