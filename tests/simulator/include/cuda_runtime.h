// The part of CUDA that the kernels use, for a host compiler: the language's words, what every thread sees,
// and the runtime's calls. The standard library comes first: it uses some of these words as names.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

#include "../machine.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ thread_local  // a block is one thread of the host

// What a thread sees of its own place.
template <simulator::Index (*index)()>
struct Place {
  struct {
    operator unsigned() const { return index().x; }
  } x;
};
inline constexpr Place<simulator::thread_index> threadIdx;
inline constexpr Place<simulator::block_index> blockIdx;
inline constexpr Place<simulator::block_size> blockDim;
inline constexpr Place<simulator::grid_size> gridDim;

// Four words at once: the compiler here would take them one by one.
template <class T>
struct alignas(16) Four {
  T x, y, z, w;

  Four() = default;
  Four(T x, T y, T z, T w) : x(x), y(y), z(z), w(w) {}
  Four(const Four& other) { simulator::copy_16(this, &other); }
  Four& operator=(const Four& other) {
    simulator::copy_16(this, &other);
    return *this;
  }
};
using uint4 = Four<unsigned>;
using float4 = Four<float>;
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

// Each names where it was called, for reports.
#define KDFUSE_CALLER const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(KDFUSE_CALLER) { simulator::sync_block({"__syncthreads", file, line}); }
inline void __syncwarp(KDFUSE_CALLER) { simulator::sync_warp({"__syncwarp", file, line}); }
inline void __threadfence() { simulator::fence(); }

template <class T>
T shuffled(unsigned mask, T value, int lane, const simulator::Site& site) {
  static_assert(sizeof(T) <= 8, "one or two registers");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = simulator::shuffle(mask, bits, lane, site);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}
template <class T>
T __shfl_sync(unsigned mask, T value, int lane, KDFUSE_CALLER) {
  return shuffled(mask, value, lane % 32, {"__shfl_sync", file, line});
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int other, KDFUSE_CALLER) {
  return shuffled(mask, value, static_cast<int>(simulator::thread_index().x % 32) ^ other,
                  {"__shfl_xor_sync", file, line});
}

inline unsigned atomicInc(unsigned* at, unsigned limit) {
  const unsigned old = simulator::begin_atomic(at);
  simulator::end_atomic(at, old >= limit ? 0 : old + 1);
  return old;
}
template <class T>
T __ldg(const T* at) {
  return *at;
}
template <class T>
T __ldcg(const T* at) {
  return *at;
}

inline void __pipeline_memcpy_async(void* to, const void* from, size_t size, size_t zeros = 0) {
  simulator::copy_async(to, from, static_cast<unsigned>(size), static_cast<unsigned>(zeros));
}
inline void __pipeline_commit() { simulator::commit_copies(); }
inline void __pipeline_wait_prior(size_t groups) { simulator::wait_for_copies(static_cast<unsigned>(groups)); }

// The runtime.

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorCooperativeLaunchTooLarge = 720,
  cudaErrorLaunchFailure = 719,
  cudaErrorInvalidClusterSize = 912,
};
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};
enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
  cudaFuncAttributeNonPortableClusterSizeAllowed = 16,
};
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };
enum cudaLaunchAttributeID { cudaLaunchAttributeCooperative = 2, cudaLaunchAttributeClusterDimension = 4 };
enum cudaUserObjectFlags { cudaUserObjectNoDestructorSync = 1 };
enum cudaUserObjectRetainFlags { cudaGraphUserObjectMove = 1 };
using cudaStream_t = struct CUstream_st*;
using cudaGraph_t = struct CUgraph_st*;
using cudaUserObject_t = struct CUuserObject_st*;
using cudaHostFn_t = void (*)(void*);
#define CUDART_VERSION 13000

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    struct {
      unsigned x, y, z;
    } clusterDim;
    int cooperative;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};
struct cudaFuncAttributes {
  size_t sharedSizeBytes;
  int numRegs, ptxVersion, binaryVersion, maxDynamicSharedSizeBytes;
};

cudaError_t cudaSetDevice(int device);
cudaError_t cudaDriverGetVersion(int* version);
cudaError_t cudaGetLastError();
const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* facts, const void* kernel);
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value);
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* kernel, int threads, size_t bytes);
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void* kernel, const cudaLaunchConfig_t* config);
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, cudaStreamCaptureStatus* status, unsigned long long* id,
                                     cudaGraph_t* graph, const void*, const void*, size_t*);
cudaError_t cudaUserObjectCreate(cudaUserObject_t* object, void* given, cudaHostFn_t destroy, unsigned count,
                                 unsigned flags);
cudaError_t cudaGraphRetainUserObject(cudaGraph_t graph, cudaUserObject_t object, unsigned count, unsigned flags);

namespace simulator {
cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, const Body& body);

template <class F>
__attribute__((no_sanitize("thread"))) void call(const void* body) {
  (*static_cast<const F*>(body))();
}
}  // namespace simulator

// Its arguments are the threads' own copies, as a kernel's are.
template <class... Expected, class... Actual>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Expected...), Actual&&... arguments) {
  const auto body = [&]() __attribute__((no_sanitize("thread"))) { kernel(arguments...); };
  return simulator::launch(*config, reinterpret_cast<const void*>(kernel), {simulator::call<decltype(body)>, &body});
}
