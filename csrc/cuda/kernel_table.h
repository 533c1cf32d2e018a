// The kernels of each op as the launcher sees them.
#pragma once
#include "kernel_args.h"

namespace kdfuse {

enum class Loss { kd, dkd, nkd, tf_nkd, uskd, slkd };

constexpr int kTickets = 1 << 16;
// So that every row stays in registers: 255 for a thread of a fast block; in fast warps 168 for bfloat16, 255 for
// the others.
constexpr int kFastBlock = 256;  // threads
constexpr int fast_warp_blocks(DType type) { return type == DType::bf16 ? 3 : 2; }  // of a multiprocessor
constexpr int kStreamBlock = 256, kGeneralBlock = 256;  // threads

// Rows of one type with labels, or none. A kernel may be missing.
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

// variant: of kd whether there are labels, of slkd the number of SL-Ts less 1.
FastKernels fast_kd(DType type, int variant);
FastKernels fast_dkd(DType type, int variant);
FastKernels fast_nkd(DType type, int variant);
FastKernels fast_tf_nkd(DType type, int variant);
FastKernels fast_slkd(DType type, int variant);
GeneralKernels general_kd();
GeneralKernels general_dkd();
GeneralKernels general_nkd();
GeneralKernels general_tf_nkd();
GeneralKernels general_uskd();
GeneralKernels general_slkd();

}  // namespace kdfuse
