// The kernels whose times model.py predicts.
#include "../losses/kd.h"
#include "kernels.h"

namespace kdfuse {

FastKernels modelled(int k) {
  if (k == 0) return PairKernels<Kd, DType::bf16, true>::get();
  if (k == 1) return PairKernels<Kd, DType::f32, true>::get();
  return SlkdKernels<DType::bf16, 2>::get();
}

}  // namespace kdfuse
