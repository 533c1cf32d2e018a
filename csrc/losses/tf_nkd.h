// The teacher-free form of NKD (Yang et al. 2023, first version), one or two target classes t:
//   loss = weight * sum_t -w_t log S_t + ce_weight * CE,   w_t = S_t + V_t - mean over the batch of S_t
// with V the label's value (1, or the two values of a mixed label) and w_t = 0 where V_t = 0.
// USKD squares S_t in w_t. w is a constant to the gradient.
#pragma once
#include "../core/stats.h"

namespace kdfuse {

template <class N>
struct TfNkdParams {
  N weight, ce_weight;

  KDFUSE_MEMBER explicit TfNkdParams(const N* p) : weight(p[0]), ce_weight(p[1]) {}
};

// As a loss of fast rows sees it, see taught.h.
struct TfNkd {
  static constexpr int kTerms = 1;
  static constexpr bool kStudentAt1 = false, kTeacherAt1 = false;
};

template <class R>
KDFUSE_HD R smoothed_weight(R score, R label_value, R batch_mean) {
  return label_value == R(0) ? R(0) : score + label_value - batch_mean;
}

}  // namespace kdfuse
