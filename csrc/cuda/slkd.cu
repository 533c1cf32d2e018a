#include "kernels.h"

namespace kdfuse {

#define KDFUSE_ONE(type) SlkdKernels<type, 1>::get()
#define KDFUSE_TWO(type) SlkdKernels<type, 2>::get()
FastKernels fast_slkd(DType type, int more) {
  return more ? KDFUSE_FOR_TYPE(type, KDFUSE_TWO) : KDFUSE_FOR_TYPE(type, KDFUSE_ONE);
}

GeneralKernels general_slkd() {
  return general_kernels<slkd_row<float, Warp>, slkd_row<float, Block>, slkd_row<double, Block>>();
}

}  // namespace kdfuse
