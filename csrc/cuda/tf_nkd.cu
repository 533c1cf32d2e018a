#include "kernels.h"

namespace kdfuse {

#define KDFUSE_ROWS(type) PairKernels<Loss::tf_nkd, type, true>::get()
FastKernels fast_tf_nkd(DType type, int) { return KDFUSE_FOR_TYPE(type, KDFUSE_ROWS); }

GeneralKernels general_tf_nkd() {
  return general_kernels<tf_nkd_row<float, Warp>, tf_nkd_row<float, Block>, tf_nkd_row<double, Block>,
                         tf_nkd_score<float, Warp>, tf_nkd_score<float, Block>, tf_nkd_score<double, Block>>();
}

}  // namespace kdfuse
