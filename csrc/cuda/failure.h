// A call of the CUDA runtime that failed, on its way to the op. Nothing of it is kept: the next call asks again.
#pragma once
#include <cuda_runtime.h>

#include <string>

namespace kdfuse {
namespace {

struct Failure {
  std::string what;
};

inline void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // the runtime keeps it otherwise, for somebody else's call
  throw Failure{cudaGetErrorString(error)};
}

}  // namespace
}  // namespace kdfuse
