#include "kernels.h"

namespace kdfuse {

#define KDFUSE_ROWS(type) PairKernels<Loss::nkd, type, true>::get()
FastKernels fast_nkd(DType type, int) { return KDFUSE_FOR_TYPE(type, KDFUSE_ROWS); }

GeneralKernels general_nkd() {
  return general_kernels<nkd_row<float, Warp>, nkd_row<float, Block>, nkd_row<double, Block>>();
}

}  // namespace kdfuse
