// The instructions of csrc/core/device.h over one table of inputs: 16-bit numbers all of them, or against all
// numbers that stand for something. As a library, for a host compiler, it hands out what the host twins give.
// Compiled by nvcc it is a program that runs the table on the GPU too and compares.
#include <cstdio>
#include <vector>

#include "../../csrc/core/device.h"

namespace {

using namespace kdfuse;

constexpr int kInstructions = 11;
const char* const kNames[kInstructions] = {"from_bf16",       "from_f16",       "to_bf16",    "larger f32",
                                           "larger bf16",     "larger f16",     "above bf16", "above f16",
                                           "add_counts bf16", "add_counts f16", "to_f16"};

KDFUSE_HD uint32_t run_one(int which, uint32_t a, uint32_t b) {
  switch (which) {
    case 0:
      return as_bits(from_bf16(a));
    case 1:
      return as_bits(from_f16(a));
    case 2:
      return to_bf16(as_float(a), as_float(b));
    case 3:
      return larger<DType::f32>(a, b);
    case 4:
      return larger<DType::bf16>(a, b);
    case 5:
      return larger<DType::f16>(a, b);
    case 6:
      return above<DType::bf16>(a, b);
    case 7:
      return above<DType::f16>(a, b);
    case 8:
      return add_counts<DType::bf16>(a, b);
    case 9:
      return add_counts<DType::f16>(a, b);
    default:
      return to_f16(as_float(a), as_float(b));
  }
}

}  // namespace

extern "C" void run_host(int which, const uint32_t* a, const uint32_t* b, uint32_t* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = run_one(which, a[i], b[i]);
}

#if defined(__CUDACC__)

namespace {

__global__ void run_device(int which, const uint32_t* a, const uint32_t* b, uint32_t* out, int64_t n) {
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < n; i += int64_t{gridDim.x} * blockDim.x) {
    out[i] = run_one(which, a[i], b[i]);
  }
}

bool is_nan(int which, uint32_t bits) {
  const float x = which == 2 || which == 4    ? from_bf16(bits & 0xffffu)
                  : which == 5 || which == 10 ? from_f16(bits & 0xffffu)
                                              : as_float(bits);
  return x != x;
}

// NaN are as good as each other, of whatever bits.
bool same(int which, uint32_t x, uint32_t y) {
  if (x == y) return true;
  if (which == 0 || which == 1 || which == 3) return is_nan(which, x) && is_nan(which, y);
  if (which > 5 && which < 10) return false;
  const auto half = [&](uint32_t p, uint32_t q) {
    return (p & 0xffffu) == (q & 0xffffu) || (is_nan(which, p) && is_nan(which, q));
  };
  return half(x, y) && half(x >> 16, y >> 16);
}

}  // namespace

// Words of two counts, 0 to 256 together.
std::vector<uint32_t> counts(int which, int step) {
  std::vector<uint32_t> words;
  for (uint32_t k = 0; k <= 128; ++k) {
    const float x = static_cast<float>(k), y = static_cast<float>(k * step % 129);
    const auto f16 = [](float v) {
      return v == 0 ? 0u : ((as_bits(v) >> 23) - 112) << 10 | (as_bits(v) >> 13 & 0x3ffu);
    };
    words.push_back(which == 8 ? to_bf16(x, y) : f16(x) | f16(y) << 16);
  }
  return words;
}

__global__ void run_power(const float* x, float* out, int n) {
  for (int i = threadIdx.x; i < n; i += blockDim.x) out[i] = power(x[i]);
}

// The largest relative error of 2^x over (-126, 1); its documentation promises 2^-22.
double error_of_power(float* x, float* out) {
  constexpr int n = 4096;
  std::vector<float> given(n), found(n);
  for (int i = 0; i < n; ++i) given[i] = 1 - 127.f * static_cast<float>(i) / n;
  cudaMemcpy(x, given.data(), 4 * n, cudaMemcpyHostToDevice);
  run_power<<<1, 256>>>(x, out, n);
  cudaMemcpy(found.data(), out, 4 * n, cudaMemcpyDeviceToHost);
  double most = 0;
  for (int i = 0; i < n; ++i)
    most = std::fmax(most, std::fabs(found[i] / std::exp2(static_cast<double>(given[i])) - 1));
  return most;
}

int main() {
  const uint32_t special[] = {0,      0x8000, 1,      0x8001, 0x7f80, 0xff80, 0x7fc0,
                              0x7c00, 0xfc00, 0x7e00, 0x3f80, 0xbf80, 0x3c00};
  std::vector<uint32_t> a, b;
  for (uint32_t x = 0; x < 1u << 16; ++x) {
    for (uint32_t y : special) a.push_back(x << 16 | y), b.push_back(y << 16 | x);
  }
  const int64_t n = static_cast<int64_t>(a.size());
  uint32_t *da, *db, *dout;
  cudaMalloc(&da, 4 * n), cudaMalloc(&db, 4 * n), cudaMalloc(&dout, 4 * n);
  const double error_at_most = error_of_power(reinterpret_cast<float*>(da), reinterpret_cast<float*>(dout));
  std::printf("power: relative error %.3g\n", error_at_most);
  int failed = error_at_most > 1. / (1 << 21);
  for (int which = 0; which < kInstructions; ++which) {
    const bool counted = which == 8 || which == 9;
    const auto& x = counted ? counts(which, 1) : a;
    const auto& y = counted ? counts(which, 7) : b;
    const int64_t m = static_cast<int64_t>(x.size());
    std::vector<uint32_t> host(m), device(m);
    run_host(which, x.data(), y.data(), host.data(), m);
    cudaMemcpy(da, x.data(), 4 * m, cudaMemcpyHostToDevice), cudaMemcpy(db, y.data(), 4 * m, cudaMemcpyHostToDevice);
    run_device<<<256, 256>>>(which, da, db, dout, m);
    cudaMemcpy(device.data(), dout, 4 * m, cudaMemcpyDeviceToHost);
    int64_t wrong = 0;
    for (int64_t i = 0; i < m; ++i) wrong += !same(which, host[i], device[i]);
    std::printf("%s: %lld of %lld differ\n", kNames[which], static_cast<long long>(wrong), static_cast<long long>(m));
    failed += wrong > 0;
  }
  const cudaError_t error = cudaDeviceSynchronize();
  if (error) std::printf("%s\n", cudaGetErrorString(error));
  return failed || error ? 1 : 0;
}

#endif
