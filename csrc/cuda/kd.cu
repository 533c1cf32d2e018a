#include "kernels.h"

namespace kdfuse {

#define KDFUSE_ROWS(type) PairKernels<Loss::kd, type, true>::get()
#define KDFUSE_BARE_ROWS(type) PairKernels<Loss::kd, type, false>::get()
FastKernels fast_kd(DType type, int labelled) {
  return labelled ? KDFUSE_FOR_TYPE(type, KDFUSE_ROWS) : KDFUSE_FOR_TYPE(type, KDFUSE_BARE_ROWS);
}

GeneralKernels general_kd() {
  return general_kernels<kd_row<float, Warp>, kd_row<float, Block>, kd_row<double, Block>>();
}

}  // namespace kdfuse
