#include "kernels.h"

namespace kdfuse {
namespace {

GeneralKernels general() {
  return general_kernels<uskd_row<float, Warp>, uskd_row<float, Block>, uskd_row<double, Block>,
                         uskd_score<float, Warp>, uskd_score<float, Block>, uskd_score<double, Block>>();
}

}  // namespace

LossKernels uskd_kernels() { return {nullptr, nullptr, general, true, true, false}; }

}  // namespace kdfuse
