// The kernels of the CUDA row pass and their launches: a warp for each row of up to 1024 classes, a
// block for each longer one and for each row of doubles. Compiled without contraction of products
// and sums: student == teacher must give exactly 0.
#include <cuda_runtime.h>

#include <algorithm>
#include <cassert>

#include "batch_cuda.h"
#include "launch_cuda.h"
#include "rows_cuda.h"
#include "team_cuda.h"
#include "uskd_cuda.h"

namespace kdfuse {
namespace {

constexpr int kRowsOfWarps = 4;  // in a block
constexpr int kWarpClasses = 1024;  // the longest row of a warp
constexpr int kWarpBytes = 16 * 1024;  // of memory for its inputs at most
constexpr int kMaxSorted = 1 << 14;  // the longest row that is sorted

template <class T, class Team, class F>
__device__ __forceinline__ void row_or_nothing(const Team& team, const Task& p, int64_t row, F run) {
  const Span span = span_of(p, row, sizeof(T) == sizeof(float));
  if (ignored(p, row)) {
    write_nothing<T>(team, p, row, span);
  } else {
    run(team, p, row, span);
  }
}

template <void (*Row)(const Warp&, const Task&, int64_t, const Span&)>
__global__ void __launch_bounds__(kRowsOfWarps* kWarp, 4) warp_rows(const __grid_constant__ Task p, int bytes) {
  const int64_t row = int64_t{blockIdx.x} * kRowsOfWarps + threadIdx.x / kWarp;
  if (row < p.rows) row_or_nothing<float>(Warp(bytes), p, row, Row);
}

template <class T, void (*Row)(const Block&, const Task&, int64_t, const Span&)>
__global__ void __launch_bounds__(kMaxBlock) block_rows(const __grid_constant__ Task p, int) {
  row_or_nothing<T>(Block(), p, blockIdx.x, Row);
}

__global__ void __launch_bounds__(kMaxBlock) before_rows(const __grid_constant__ Task p) {
  const int64_t outside = count_rows(Block(), p);
  assert(outside == 0 && "kdfuse: target outside the classes; mark rows to skip with ignore_index");
  assert((!p.denominator.data || number(p.denominator, 0) > 0) && "kdfuse: denominator must be positive");
}

__global__ void __launch_bounds__(kMaxBlock) after_scores(const __grid_constant__ Task p) {
  average_scores(Block(), p);
}

__global__ void __launch_bounds__(kMaxBlock)
    after_rows(const __grid_constant__ Task p, const __grid_constant__ Totals totals) {
  total(Block(), p, totals, blockIdx.x);
}

static_assert(sizeof(Task) + sizeof(Totals) < 4096, "a kernel's arguments are limited to 4 KB");

using Kernel = void (*)(Task, int);

// One pass over the rows.
struct Pass {
  Kernel warps, blocks, wide;
};

struct Passes {
  Pass score, run;  // score: of the ops that need their batch mean
};

#define KDFUSE_PASS(row) \
  {warp_rows<row<float, Warp>>, block_rows<float, row<float, Block>>, block_rows<double, row<double, Block>>}

Passes passes_of(Loss loss) {
  const Pass none = {nullptr, nullptr, nullptr};
  switch (loss) {
    case Loss::kd:
      return {none, KDFUSE_PASS(kd_row)};
    case Loss::dkd:
      return {none, KDFUSE_PASS(dkd_row)};
    case Loss::nkd:
      return {none, KDFUSE_PASS(nkd_row)};
    case Loss::tf_nkd:
      return {KDFUSE_PASS(tf_nkd_score), KDFUSE_PASS(tf_nkd_row)};
    case Loss::uskd:
      return {KDFUSE_PASS(uskd_score), KDFUSE_PASS(uskd_row)};
    default:
      return {none, KDFUSE_PASS(slkd_row)};
  }
}

// The shape of a launch: threads of a block, its memory, and how much of a row that holds.
struct Shape {
  bool warps;
  int threads, bytes;  // bytes of one team
};

std::string shape_of(Task& p, Loss loss, bool wide, int device, Shape& shape) {
  int most = 0;
  cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  const int64_t number = wide ? sizeof(double) : sizeof(float), entry = wide ? 16 : 8;
  const int64_t row = number * kChunk * max_chunks(p.classes), own = number * kNotes;
  int64_t sorted = 0;
  if (loss == Loss::uskd) {
    for (sorted = 2; sorted < p.classes;) sorted *= 2;
  }
  shape.warps = !wide && p.classes <= kWarpClasses;
  const int64_t reserved = own + sorted * entry, for_sums = 4096;
  const int64_t space = shape.warps ? kWarpBytes : most - for_sums - reserved;
  if (space < 0 || sorted > kMaxSorted) {
    return "rows of " + std::to_string(p.classes) +
           " classes are too long for the sort in uskd's CUDA kernel on this device; use backend='reference'";
  }
  // Students, teachers, class probabilities and the fused SL-Ts, in this order.
  const int inputs = p.num_students + p.num_teachers + (p.soft.data != nullptr) + (loss == Loss::slkd);
  p.held = static_cast<int>(std::min<int64_t>(inputs, space / row));
  p.sorted = static_cast<int>(sorted);
  shape.bytes = static_cast<int>((reserved + p.held * row + 15) / 16 * 16);
  const int wanted = (max_chunks(p.classes) / 2 + kWarp - 1) / kWarp * kWarp;
  shape.threads = shape.warps ? kRowsOfWarps * kWarp : std::clamp(wanted, kWarp, kMaxBlock);
  return "";
}

void launch_pass(const Pass& pass, const Task& p, bool wide, const Shape& shape, cudaStream_t stream) {
  const int teams = shape.warps ? kRowsOfWarps : 1, bytes = shape.bytes * teams;
  const Kernel kernel = shape.warps ? pass.warps : wide ? pass.wide : pass.blocks;
  if (bytes > 48 * 1024) cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  const int64_t blocks = (p.rows + teams - 1) / teams;
  kernel<<<static_cast<unsigned>(blocks), shape.threads, bytes, stream>>>(p, shape.bytes);
}

}  // namespace

std::string launch(Loss loss, Task p, const Totals& totals, bool wide, int device, void* on_stream) {
  const auto stream = static_cast<cudaStream_t>(on_stream);
  const Passes passes = passes_of(loss);
  Shape shape;
  // The runtime inside this module keeps its own current device.
  if (const cudaError_t error = cudaSetDevice(device)) return cudaGetErrorString(error);
  const std::string refused = shape_of(p, loss, wide, device, shape);
  if (!refused.empty()) return refused;

  before_rows<<<1, kMaxBlock, 0, stream>>>(p);
  if (p.rows > 0 && passes.score.wide) {
    launch_pass(passes.score, p, wide, shape, stream);
    after_scores<<<1, kMaxBlock, 0, stream>>>(p);
  }
  if (p.rows > 0) launch_pass(passes.run, p, wide, shape, stream);
  after_rows<<<1 + p.num_terms, kMaxBlock, 0, stream>>>(p, totals);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? "" : cudaGetErrorString(error);
}

}  // namespace kdfuse
