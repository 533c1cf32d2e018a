// Zhao et al. 2022, "Decoupled Knowledge Distillation":
//   loss = square * (alpha * TCKD + beta * NCKD) + ce_weight * CE
#pragma once
#include "../core/stats.h"

namespace kdfuse {

template <class N>
struct DkdParams {
  N temperature, square, alpha, beta, ce_weight;

  KDFUSE_MEMBER explicit DkdParams(const N* p)
      : temperature(p[0]), square(p[1]), alpha(p[2]), beta(p[3]), ce_weight(p[4]) {}
};

template <class R>
struct DkdRow {
  R tckd, nckd;  // times square
  R a, b, label;  // of the student's and the teacher's exponentials; the entry of the label
};

// crossed: the sum over j != y of e_t,j (t_j - z_j).
template <class R, class N>
KDFUSE_HD DkdRow<R> dkd(const DkdParams<N>& p, const Stats<R>& zs, const Split<R>& z, const Stats<R>& ts,
                        const Split<R>& t, R crossed) {
  const R square = R(p.square), step = square / R(p.temperature);
  // log((1 - q_y) / (1 - p_y)) as a difference of log-sum-exps.
  const R rest_ratio = gated(t.rest, (lse_rest(ts) - t.lse) - (lse_rest(zs) - z.lse));
  const R tckd = gated(t.label, t.log_label - z.log_label) + rest_ratio;
  const Kl<R> others = kl_rest(zs, ts, crossed);
  // d TCKD / d z_j = -gap * p_j / (1 - p_y), and p_j / (1 - p_y) = e_j / sum.
  const R gap = z.label - t.label;
  const R spread = zs.sum > R(0) ? R(1) / zs.sum : R(0);
  return {square * tckd, square * others.value, step * (R(p.beta) * others.a - R(p.alpha) * gap * spread),
          -(step * (R(p.beta) * others.b)), step * R(p.alpha) * gap};
}

}  // namespace kdfuse
