// Hinton et al. 2015, "Distilling the Knowledge in a Neural Network", with K weighted teachers:
//   loss = kd_weight * square * sum_k w_k KL(softmax(t_k / T) || softmax(z / T)) + ce_weight * CE
#pragma once
#include "../core/stats.h"

namespace kdfuse {

template <class N>
struct KdParams {
  N temperature, square, kd_weight, ce_weight;  // square: T^2, or 1
  const N* weights;  // K teacher weights follow in the op's list

  KDFUSE_MEMBER explicit KdParams(const N* p)
      : temperature(p[0]), square(p[1]), kd_weight(p[2]), ce_weight(p[3]), weights(p + 4) {}
};

template <class R>
struct KdRow {
  R value = 0;  // square * sum_k w_k KL_k
  R a = 0, label = 0;  // of the student's exponentials; the entry of the label
};

// What one teacher's KL counts for in the row's value and, times T, in the derivative of its loss.
template <class R>
struct KdWeight {
  R value, step;
};

template <class R>
KDFUSE_HD KdWeight<R> kd_weight_of(R teacher_weight, R kd_weight, R square, R temperature) {
  return {teacher_weight * square, kd_weight * teacher_weight * square / temperature};
}

// Adds a teacher to the row; returns the coefficient of that teacher's exponentials. may_be_zero: a weight of 0
// leaves out what the teacher holds, whatever that is.
template <bool may_be_zero = true, class R>
KDFUSE_HD R kd_add(KdRow<R>& row, const Kl<R>& pair, const KdWeight<R>& weight) {
  const auto times = [](R w, R x) { return may_be_zero ? gated(w, x) : w * x; };
  row.value += times(weight.value, pair.value);
  row.a += times(weight.step, pair.a);
  row.label += times(weight.step, pair.label);
  return -times(weight.step, pair.b);
}

}  // namespace kdfuse
