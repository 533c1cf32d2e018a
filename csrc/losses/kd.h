// Hinton et al. 2015, "Distilling the Knowledge in a Neural Network", with K weighted teachers:
//   loss = kd_weight * square * sum_k w_k KL(softmax(t_k / T) || softmax(z / T)) + ce_weight * CE
#pragma once
#include "../row.h"

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

// Adds teacher k to the row; returns the coefficient of that teacher's exponentials. may_be_zero: a weight of 0
// leaves out what the teacher holds, whatever that is.
template <bool may_be_zero = true, class R>
KDFUSE_HD R kd_add(KdRow<R>& row, const Kl<R>& pair, R teacher_weight, R kd_weight, R square, R temperature) {
  const R step = kd_weight * teacher_weight * square / temperature;
  const auto times = [](R weight, R x) { return may_be_zero ? gated(weight, x) : weight * x; };
  row.value += times(teacher_weight * square, pair.value);
  row.a += times(step, pair.a);
  row.label += times(step, pair.label);
  return -times(step, pair.b);
}

}  // namespace kdfuse
