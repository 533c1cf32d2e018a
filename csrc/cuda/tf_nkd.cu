#include "kernels.h"

namespace kdfuse {
namespace {

#define KDFUSE_ROWS(type) StudentKernels<TfNkd, Shape<type, 1, 0>>::get()
FastKernels fast(const Task& p, const FastTask&) { return KDFUSE_FOR_TYPE(p.logits[0].type, KDFUSE_ROWS); }

bool set_fast(const Task& p, FastTask& fast) {
  if (p.soft.data) return false;
  std::copy(p.params, p.params + 2, fast.params);
  return true;
}

GeneralKernels general() {
  return general_kernels<tf_nkd_row<float, Warp>, tf_nkd_row<float, Block>, tf_nkd_row<double, Block>,
                         tf_nkd_score<float, Warp>, tf_nkd_score<float, Block>, tf_nkd_score<double, Block>>();
}

}  // namespace

LossKernels tf_nkd_kernels() { return {set_fast, fast, general, true, false, false}; }

}  // namespace kdfuse
