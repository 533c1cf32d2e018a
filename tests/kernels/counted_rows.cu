// The kernels whose instructions test_instructions.py counts.
#include "kernels.h"

namespace kdfuse {
namespace {

template <Loss loss, bool labelled>
using OfWarp = typename PairKernels<loss, DType::bf16, labelled>::template Rows<Warp>;

template __global__ void fast_warps<OfWarp<Loss::kd, false>, fast_warp_blocks(DType::bf16)>(
    const __grid_constant__ FastTask);
template __global__ void fast_warps<OfWarp<Loss::kd, true>, fast_warp_blocks(DType::bf16)>(
    const __grid_constant__ FastTask);
template __global__ void fast_warps<OfWarp<Loss::dkd, true>, fast_warp_blocks(DType::bf16)>(
    const __grid_constant__ FastTask);

}  // namespace
}  // namespace kdfuse
