// The kernels whose instructions test_instructions.py counts.
#include "../losses/dkd.h"
#include "../losses/kd.h"
#include "kernels.h"

namespace kdfuse {
namespace {

template <class Loss, bool labelled>
using OfWarp = typename PairKernels<Loss, DType::bf16, labelled>::template Rows<Warp>;

template __global__ void fast_warps<OfWarp<Kd, false>, fast_warp_blocks(DType::bf16)>(const __grid_constant__ FastTask);
template __global__ void fast_warps<OfWarp<Kd, true>, fast_warp_blocks(DType::bf16)>(const __grid_constant__ FastTask);
template __global__ void fast_warps<OfWarp<Dkd, true>, fast_warp_blocks(DType::bf16)>(const __grid_constant__ FastTask);

}  // namespace
}  // namespace kdfuse
