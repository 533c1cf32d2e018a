// The kernels of each op as the launcher sees them.
#pragma once
#include "kernel_args.h"

namespace kdfuse {

constexpr int kTickets = 1 << 16;
// So that every row stays in registers: 255 for a thread of a fast block, 128 where two fit (pairs of 16-bit students);
// in fast warps 168 for bfloat16, 255 for the others.
constexpr int kFastBlock = 256;  // threads
constexpr int fast_warp_blocks(DType type) { return type == DType::bf16 ? 3 : 2; }  // of a multiprocessor
constexpr int kStreamBlock = 256, kGeneralBlock = 256;  // threads

// Of rows of one shape. A kernel may be missing.
struct FastKernels {
  int chunks = 0, thread_bytes = 0;  // of each thread; not of streams
  const void* warps = nullptr;  // a warp for each row
  const void* blocks = nullptr;
  const void* clusters = nullptr;
  const void* streams = nullptr;  // a block for each row, which it reads twice
};

struct GeneralKernels {
  const void *warps, *blocks, *wide;  // wide: in double
};

struct LossKernels {
  // Whether the rows of a call may be fast ones, as far as the op has a say; then it sets its own part of `fast`.
  bool (*set_fast)(const Task& p, FastTask& fast);
  FastKernels (*fast)(const Task& p);
  GeneralKernels (*general)();
  bool scored, sorted, fused;  // needs the batch mean of its label scores; sorts a row; has a fused teacher
};

#define KDFUSE_OTHER(name) LossKernels name##_kernels();
#include "../losses/all.def"

}  // namespace kdfuse
