#include "kernels.h"

namespace kdfuse {

GeneralKernels general_uskd() {
  return general_kernels<uskd_row<float, Warp>, uskd_row<float, Block>, uskd_row<double, Block>,
                         uskd_score<float, Warp>, uskd_score<float, Block>, uskd_score<double, Block>>();
}

}  // namespace kdfuse
