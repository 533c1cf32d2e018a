#include "kernels.h"

namespace kdfuse {
namespace {

template <int K>
struct Rows {
  template <DType type>
  FastKernels operator()(Type<type>) const {
    return SlkdKernels<type, K>::get();
  }
};

FastKernels fast(const Task& p) {
  const DType type = p.logits[0].type;
  return p.num_students == 2 ? of_type(type, Rows<1>()) : of_type(type, Rows<2>());
}

// A weight of 0 leaves out what a row holds, whatever that is: the fast rows multiply.
bool set_fast(const Task& p, FastTask& fast) {
  const SlkdParams q(p.params);
  const int slts = p.num_students - 1;
  if (slts > 2 || !of_one_type(p) || p.soft.data || q.kd_weight == 0 || q.fused_kd_weight == 0 ||
      std::count(q.fusion, q.fusion + slts, 0.))
    return false;
  std::copy(p.params, p.params + 7 + slts, fast.params);
  fast.square_by_t = static_cast<float>(q.square / q.temperature);
  fast.pull = q.detach ? 0.f : static_cast<float>(q.fused_kd_weight * q.square / q.temperature);
  fast.step = fast.own_step = static_cast<float>(kLog2OfE / q.temperature);
  return true;
}

GeneralKernels general() {
  return general_kernels<slkd_row<float, Warp>, slkd_row<float, Block>, slkd_row<double, Block>>();
}

}  // namespace

LossKernels slkd_kernels() { return {set_fast, fast, general, false, false, true}; }

}  // namespace kdfuse
