// The kernels of an op, for its <op>.cu. Compiled without contraction of products and sums: student ==
// teacher must give exactly 0. What may be one rounded operation says so.
#pragma once
#include <algorithm>
#include <cstring>

#include "any_rows.h"
#include "kernel_table.h"
#include "one_pass.h"
#include "one_pass_slkd.h"
#include "team.h"
#include "two_pass.h"

namespace kdfuse {
namespace {

__device__ unsigned tickets[kTickets];  // each is 0 again after a launch

template <class Rows, int kBlocks>
__global__ void __launch_bounds__(Warp::kTeams* kWarp, kBlocks) fast_warps(const __grid_constant__ FastTask p) {
  const Warp team(head_bytes(Warp::kTeams, p.columns()), kWarp * Rows::kThreadBytes);
  run_batch<Rows>(team, p, tickets);
}

template <class Rows, int kBlocks>
__global__ void __launch_bounds__(kFastBlock, kBlocks) fast_blocks(const __grid_constant__ FastTask p) {
  const Block team(head_bytes(1, p.columns()), 0);
  run_batch<Rows>(team, p, tickets);
}

template <template <class> class Rows, int kBlocks>
__global__ void __launch_bounds__(kFastBlock, kBlocks) fast_clusters(const __grid_constant__ FastTask p) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  const Cluster team(head_bytes(1, p.columns()), 0);
  run_batch<Rows<Cluster>>(team, p, tickets);
#endif
}

template <class Rows>
__global__ void __launch_bounds__(kStreamBlock, 3) fast_streams(const __grid_constant__ FastTask p) {
  const Block team(head_bytes(1, p.columns()), 0);
  run_batch<Rows>(team, p, tickets);
}

template <class Rows>
__global__ void __launch_bounds__(Warp::kTeams* kWarp, 2) general_warps(const __grid_constant__ Task p) {
  const Warp team(head_bytes(Warp::kTeams, p.columns()), p.team_bytes);
  run_batch<Rows>(team, p, tickets);
}

template <class Rows>
__global__ void __launch_bounds__(kGeneralBlock) general_blocks(const __grid_constant__ Task p) {
  const Block team(head_bytes(1, p.columns()), 0);
  run_batch<Rows>(team, p, tickets);
}

template <class Kernel>
const void* address(Kernel* kernel) {
  return reinterpret_cast<const void*>(kernel);
}

constexpr int kChunksOfStudent = 4;
template <DType type>
constexpr int kChunksOfSlkd = type == DType::f32 ? 1 : 2;

template <DType type>
using Type = std::integral_constant<DType, type>;

// make(Type<type>()) of a call's students. Float16, in which few train, has rows of one type alone.
template <class F>
FastKernels of_trained_type(DType type, F make) {
  return type == DType::bf16 ? make(Type<DType::bf16>()) : make(Type<DType::f32>());
}

template <class F>
FastKernels of_type(DType type, F make) {
  return type == DType::f16 ? make(Type<DType::f16>()) : of_trained_type(type, make);
}

// Of one student.
template <class Loss, class Shape>
struct StudentKernels {
  template <class Team>
  using Rows = Resident<Loss, Shape, kChunksOfStudent, Team>;
  static constexpr DType type = Shape::type;
  static constexpr bool kPair = !Shape::any && !Shape::soft && Shape::kInputs <= 2;
  // Of a multiprocessor.
  static constexpr int kWarpBlocks = kPair ? fast_warp_blocks(type) : 2;
  static constexpr int kBlocks = type != DType::f32 && Shape::kInputs <= 2 ? 2 : 1;

  static FastKernels get() {
    FastKernels k;
    k.chunks = kChunksOfStudent;
    k.thread_bytes = Rows<Block>::kThreadBytes;
    k.warps = address(fast_warps<Rows<Warp>, kWarpBlocks>);
    k.blocks = address(fast_blocks<Rows<Block>, kBlocks>);
    if constexpr (!Rows<Block>::kScored) k.clusters = address(fast_clusters<Rows, kBlocks>);
    if constexpr (kPair) k.streams = address(fast_streams<Streamed<Loss, Shape, Block>>);
    return k;
  }
};

template <DType type, int K>
struct SlkdKernels {
  template <class Team>
  using Rows = ResidentSlkd<type, K, kChunksOfSlkd<type>, Team>;

  static FastKernels get() {
    FastKernels k;
    k.chunks = kChunksOfSlkd<type>;
    k.thread_bytes = Rows<Block>::kThreadBytes;
    k.warps = address(fast_warps<Rows<Warp>, fast_warp_blocks(type)>);
    k.blocks = address(fast_blocks<Rows<Block>, 1>);
    k.clusters = address(fast_clusters<Rows, 1>);
    return k;
  }
};

template <RowFunction<float, Warp> warp, RowFunction<float, Block> block, RowFunction<double, Block> wide,
          RowFunction<float, Warp> warp_score = nullptr, RowFunction<float, Block> block_score = nullptr,
          RowFunction<double, Block> wide_score = nullptr>
GeneralKernels general_kernels() {
  return {address(general_warps<General<float, Warp, warp, warp_score>>),
          address(general_blocks<General<float, Block, block, block_score>>),
          address(general_blocks<General<double, Block, wide, wide_score>>)};
}

}  // namespace
}  // namespace kdfuse
