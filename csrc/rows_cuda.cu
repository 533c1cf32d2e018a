// The kernels of the CUDA row pass and their launches: a warp for each row of up to 1024 classes, a
// block for each longer one, and for every row of doubles.
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
constexpr int kWarpBytes = 16 * 1024;  // of memory at most, beside the sort
constexpr int kBatchThreads = kMaxBlock;

struct KdRow {};

template <class Op, class T, class Team>
__device__ __forceinline__ void one_row(const Team& team, const Task& p, int64_t row) {
  const Span span = span_of(p, row, sizeof(T) == sizeof(float));
  if (Op::scores) {
    if (!ignored(p, row)) Op::template run<T>(team, p, row, span);
  } else if (ignored(p, row)) {
    write_nothing<T>(team, p, row, span);
  } else {
    Op::template run<T>(team, p, row, span);
  }
}

template <class Op>
__global__ void __launch_bounds__(kRowsOfWarps* kWarp) rows_of_warps(const __grid_constant__ Task p, int bytes) {
  const Warp team(bytes);
  const int64_t row = int64_t{blockIdx.x} * kRowsOfWarps + threadIdx.x / kWarp;
  if (row < p.rows) one_row<Op, float>(team, p, row);
}

template <class Op, class T>
__global__ void __launch_bounds__(kMaxBlock) rows_of_blocks(const __grid_constant__ Task p) {
  one_row<Op, T>(Block(), p, blockIdx.x);
}

__global__ void __launch_bounds__(kBatchThreads) count(const __grid_constant__ Task p) {
  const int64_t outside = count_rows(Block(), p);
  assert(outside == 0 && "kdfuse: target outside the classes; mark rows to skip with ignore_index");
  assert((!p.denominator.data || number(p.denominator, 0) > 0) && "kdfuse: denominator must be positive");
}

__global__ void __launch_bounds__(kBatchThreads) average(const __grid_constant__ Task p) { average_scores(Block(), p); }

__global__ void __launch_bounds__(kBatchThreads) add_up(const __grid_constant__ Task p,
                                                        const __grid_constant__ Totals totals) {
  total(Block(), p, totals, blockIdx.x);
}

#define KDFUSE_OP(Name, function, is_scores)                                                                \
  struct Name {                                                                                             \
    static constexpr bool scores = is_scores;                                                               \
    template <class T, class Team>                                                                          \
    static __device__ __forceinline__ void run(const Team& team, const Task& p, int64_t row, const Span& span) { \
      function(team, p, row, span);                                                                         \
    }                                                                                                       \
  }
