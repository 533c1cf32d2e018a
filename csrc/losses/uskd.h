// Yang et al. 2023, "From Knowledge Distillation to Self-Knowledge Distillation" (USKD):
//   loss = alpha * sum_t -w_t log S_t  -  beta * sum_{j not a target} Z_j log S'_j
//        - mu * sum_j (0.9 y_j + 0.1 / C) log softmax(W)_j  +  ce_weight * CE
// with w_t = S_t^2 + V_t - mean of S_t^2 (losses/tf_nkd.h) and Z the Zipf weights 1/rank, over the
// classes ranked by the student's and the weak head's scores, without the targets, summing to 1.
#pragma once
#include "../core/stats.h"

namespace kdfuse {

template <class N>
struct UskdParams {
  N alpha, beta, mu, paper_rank, ce_weight;

  KDFUSE_MEMBER explicit UskdParams(const N* p)
      : alpha(p[0]), beta(p[1]), mu(p[2]), paper_rank(p[3]), ce_weight(p[4]) {}
};

// The divisors of the two scores in the ranking: w_j / weak + s_j / student.
// The released code ranks by the student's log-probability, the paper by its probability.
template <class R>
struct RankScale {
  R weak, student;
};

template <class R>
KDFUSE_HD RankScale<R> rank_scale(R weak_targets, R student_targets) {
  return {R(1) / (R(1) - weak_targets + R(1e-6)), R(1) / (R(1) - student_targets + R(1e-6))};
}

constexpr double kSmooth = 0.1;  // label smoothing of the weak head's cross-entropy

}  // namespace kdfuse
