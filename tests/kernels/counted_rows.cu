// The kernels whose instructions test_instructions.py counts.
#include "../losses/dkd.h"
#include "../losses/kd.h"
#include "kernels.h"

namespace kdfuse {
namespace {

template <class Loss, bool labelled, class Team>
using Of = typename PairKernels<Loss, DType::bf16, labelled>::template Rows<Team>;

template __global__ void fast_warps<Of<Kd, false, Warp>, fast_warp_blocks(DType::bf16)>(
    const __grid_constant__ FastTask);
template __global__ void fast_warps<Of<Kd, true, Warp>, fast_warp_blocks(DType::bf16)>(
    const __grid_constant__ FastTask);
template __global__ void fast_warps<Of<Dkd, true, Warp>, fast_warp_blocks(DType::bf16)>(
    const __grid_constant__ FastTask);
template __global__ void fast_blocks<Of<Kd, true, Block>, fast_blocks_of(DType::bf16)>(const __grid_constant__ FastTask);
template __global__ void fast_clusters<PairKernels<Kd, DType::bf16, true>::Rows, fast_blocks_of(DType::bf16)>(
    const __grid_constant__ FastTask);

}  // namespace
}  // namespace kdfuse
