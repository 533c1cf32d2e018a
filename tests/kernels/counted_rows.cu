// The kernels whose instructions test_instructions.py counts.
#include "../losses/dkd.h"
#include "../losses/kd.h"
#include "kernels.h"

namespace kdfuse {
namespace {

template <Labels labels>
using Pairs = Shape<DType::bf16, 1, 1, labels>;
template <class Loss, Labels labels, class Team>
using Of = typename StudentKernels<Loss, Pairs<labels>>::template Rows<Team>;
using OfKd = StudentKernels<Kd, Pairs<Labels::hard>>;

template __global__ void fast_warps<Of<Kd, Labels::none, Warp>, fast_warp_blocks(DType::bf16)>(
    const __grid_constant__ FastTask);
template __global__ void fast_warps<Of<Kd, Labels::hard, Warp>, fast_warp_blocks(DType::bf16)>(
    const __grid_constant__ FastTask);
template __global__ void fast_warps<Of<Dkd, Labels::hard, Warp>, fast_warp_blocks(DType::bf16)>(
    const __grid_constant__ FastTask);
template __global__ void fast_blocks<OfKd::Rows<Block>, OfKd::kBlocks>(const __grid_constant__ FastTask);
template __global__ void fast_clusters<OfKd::Rows, OfKd::kBlocks>(const __grid_constant__ FastTask);

}  // namespace
}  // namespace kdfuse
