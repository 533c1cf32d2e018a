#include "kernels.h"

namespace kdfuse {
namespace {

struct Rows {
  template <DType type>
  FastKernels operator()(Type<type>) const {
    return StudentKernels<TfNkd, Shape<type, 1, 0>>::get();
  }
};

FastKernels fast(const Task& p) { return of_type(p.logits[0].type, Rows()); }

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
