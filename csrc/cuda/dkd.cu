#include "kernels.h"

namespace kdfuse {

#define KDFUSE_ROWS(type) PairKernels<Loss::dkd, type, true>::get()
FastKernels fast_dkd(DType type, int) { return KDFUSE_FOR_TYPE(type, KDFUSE_ROWS); }

GeneralKernels general_dkd() {
  return general_kernels<dkd_row<float, Warp>, dkd_row<float, Block>, dkd_row<double, Block>>();
}

}  // namespace kdfuse
