// The teams of threads that work on one row together on a GPU. Their sums are the same for every
// thread and on every run.
#pragma once
#include <cstdint>

namespace kdfuse {

constexpr unsigned kWholeWarp = 0xffffffffu;
constexpr int kWarp = 32;
constexpr int kMaxBlock = 512;  // threads of one row
constexpr int kMaxSums = 4;

template <class T, int n>
__device__ __forceinline__ void sum_warp(T (&x)[n]) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) {
#pragma unroll
    for (int k = 0; k < n; ++k) x[k] += __shfl_xor_sync(kWholeWarp, x[k], step);
  }
}

template <class T>
__device__ __forceinline__ T max_warp(T x) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) {
    const T other = __shfl_xor_sync(kWholeWarp, x, step);
    x = other > x ? other : x;
  }
  return x;
}

extern __shared__ uint4 team_memory[];  // of all teams of the block

class Warp {
 public:
  __device__ explicit Warp(int bytes) : first_(threadIdx.x / kWarp * (bytes / sizeof(uint4))) {}
  __device__ int rank() const { return threadIdx.x % kWarp; }
  __device__ int size() const { return kWarp; }
  __device__ void sync() const { __syncwarp(); }
  __device__ void* memory() const { return team_memory + first_; }
  template <class T>
  __device__ T max(T x) const {
    return max_warp(x);
  }
  template <class T, int n>
  __device__ void sum(T (&x)[n]) const {
    sum_warp(x);
  }

 private:
  int first_;
};

class Block {
 public:
  __device__ int rank() const { return threadIdx.x; }
  __device__ int size() const { return blockDim.x; }
  __device__ void sync() const { __syncthreads(); }
  __device__ void* memory() const { return team_memory; }

  template <class T>
  __device__ T max(T x) const {
    __shared__ T of_warps[kMaxBlock / kWarp];
    x = max_warp(x);
    if (threadIdx.x % kWarp == 0) of_warps[threadIdx.x / kWarp] = x;
    __syncthreads();
    for (unsigned k = 0; k < blockDim.x / kWarp; ++k) x = of_warps[k] > x ? of_warps[k] : x;
    __syncthreads();
    return x;
  }

  template <class T, int n>
  __device__ void sum(T (&x)[n]) const {
    static_assert(n <= kMaxSums, "of_warps is too small");
    __shared__ T of_warps[kMaxBlock / kWarp][kMaxSums];
    sum_warp(x);
    if (threadIdx.x % kWarp == 0) {
#pragma unroll
      for (int k = 0; k < n; ++k) of_warps[threadIdx.x / kWarp][k] = x[k];
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < n; ++k) {
      x[k] = 0;
      for (unsigned warp = 0; warp < blockDim.x / kWarp; ++warp) x[k] += of_warps[warp][k];
    }
    __syncthreads();
  }
};

}  // namespace kdfuse
