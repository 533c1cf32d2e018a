// The CUDA runtime that the launcher calls: devices of a few kinds, and launches that are run at once.
#include <set>

#include "include/cuda_runtime.h"
#include "simulator.h"
#include "world.h"

namespace simulator {
namespace {

Device device = {};  // the current one
int number = 0;
std::map<int, Device> devices;
uint64_t seed = 0, first_seed = 0;  // of the next launch, and of the call
using OnDevice = std::pair<const void*, int>;  // a kernel on a device, and what it has been allowed there
std::map<OnDevice, int> dynamic_bytes;
std::set<OnDevice> non_portable;
std::vector<Launched> launches;
std::string failure;
cudaError_t last = cudaSuccess;

cudaError_t done(cudaError_t error) {
  if (error) last = error;
  return error;
}

// Of a multiprocessor. Four warps at a time have a register file each, in parts of 256 registers.
constexpr int kRegistersOfFile = 16384, kFiles = 4, kRegistersOfPart = 256, kThreadsOfProcessor = 2048;

size_t allowed_bytes(const void* kernel) {
  const auto found = dynamic_bytes.find({kernel, number});
  return found == dynamic_bytes.end() ? 48 * 1024 : static_cast<size_t>(found->second);
}

// Code for this device, or for an older one.
bool has_code() { return device.built_for / 10 <= device.major; }

constexpr unsigned kPortable = 8;  // blocks of a cluster, which every device with clusters can have

bool is_allowed(const void* kernel, unsigned cluster) {
  return cluster <= kPortable || non_portable.count({kernel, number});
}

int blocks_of_processor(int threads, size_t bytes) {
  const int of_warp = (device.registers * kWarp + kRegistersOfPart - 1) / kRegistersOfPart * kRegistersOfPart;
  const int by_registers = kRegistersOfFile / of_warp * kFiles / (threads / kWarp);
  const int by_threads = kThreadsOfProcessor / threads;
  const int by_memory = static_cast<int>(device.memory_of_processor / (bytes + 1024));
  return std::min({by_registers, by_threads, by_memory});
}

}  // namespace

const Device& device_in_use() { return devices[number]; }
uint64_t seed_in_use() { return first_seed; }

std::vector<Region>& memory() {
  static std::vector<Region> regions;
  return regions;
}

Counts& counts() {
  static Counts all;
  return all;
}

cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, const Body& body) {
  Shape shape = {config.gridDim.x, config.blockDim.x, 1, config.dynamicSmemBytes, false};
  for (unsigned k = 0; k < config.numAttrs; ++k) {
    const auto& a = config.attrs[k];
    if (a.id == cudaLaunchAttributeClusterDimension) shape.cluster = a.val.clusterDim.x;
    if (a.id == cudaLaunchAttributeCooperative) shape.together = a.val.cooperative;
  }
  if (!has_code()) return done(cudaErrorNoKernelImageForDevice);
  if (shape.bytes > allowed_bytes(kernel) || shape.blocks == 0 || shape.threads == 0 || shape.threads % kWarp ||
      shape.blocks % shape.cluster || shape.cluster > device.cluster) {
    return done(cudaErrorInvalidConfiguration);
  }
  if (!is_allowed(kernel, shape.cluster)) return done(cudaErrorInvalidClusterSize);
  const int at_once = blocks_of_processor(static_cast<int>(shape.threads), shape.bytes) * device.processors;
  if (shape.together && static_cast<int>(shape.blocks) > at_once) return done(cudaErrorCooperativeLaunchTooLarge);
  if (shape.bytes + static_cast<size_t>(device.static_bytes) > static_cast<size_t>(device.memory)) {
    return done(cudaErrorInvalidConfiguration);
  }
  if (static_cast<int>(launches.size()) + 1 == device.refused) return done(cudaErrorLaunchFailure);
  launches.push_back({kernel, shape.blocks, shape.threads, shape.cluster, shape.bytes, shape.together,
                      non_portable.count({kernel, number}) > 0});
  if (!device.runs || !failure.empty()) return cudaSuccess;
  // A kernel whose code for an older architecture is empty.
  if (shape.cluster > 1 && device.built_for < 90) return cudaSuccess;
  failure = run_grid(shape, body, seed++);
  return cudaSuccess;
}

}  // namespace simulator

using namespace simulator;

cudaError_t cudaSetDevice(int which) {
  const auto found = devices.find(which);
  if (found == devices.end()) return done(cudaErrorInvalidValue);
  device = found->second, number = which;
  return cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}

cudaError_t cudaGetLastError() {
  const cudaError_t error = last;
  last = cudaSuccess;
  return error;
}

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorCooperativeLaunchTooLarge:
      return "too many blocks in cooperative launch";
    case cudaErrorLaunchFailure:
      return "unspecified launch failure";
    case cudaErrorNoKernelImageForDevice:
      return "no kernel image is available for execution on the device";
    case cudaErrorInvalidClusterSize:
      return "cluster misconfiguration";
    case cudaErrorMemoryAllocation:
      return "out of memory";
    default:
      return "invalid argument";
  }
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount            ? device.processors
           : attribute == cudaDevAttrComputeCapabilityMajor       ? device.major
           : attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin ? device.memory
                                                                  : 0;
  return cudaSuccess;
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* facts, const void* kernel) {
  if (devices[number].failing > 0 && devices[number].failing-- > 0) return done(cudaErrorMemoryAllocation);
  if (!has_code()) return done(cudaErrorNoKernelImageForDevice);
  const int allowed = static_cast<int>(allowed_bytes(kernel));
  *facts = {static_cast<size_t>(device.static_bytes), device.registers, device.built_for, device.built_for, allowed};
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) {
    if (value < 0 || value + device.static_bytes > device.memory) return done(cudaErrorInvalidValue);
    dynamic_bytes[{kernel, number}] = value;
  }
  if (attribute == cudaFuncAttributeNonPortableClusterSizeAllowed && value) non_portable.insert({kernel, number});
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* kernel, int threads, size_t bytes) {
  *blocks = bytes > allowed_bytes(kernel) ? 0 : blocks_of_processor(threads, bytes + device.static_bytes);
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void* kernel, const cudaLaunchConfig_t* config) {
  const unsigned size = config->attrs[0].val.clusterDim.x;
  if (!is_allowed(kernel, size)) return done(cudaErrorInvalidClusterSize);
  int blocks = 0;
  cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, static_cast<int>(config->blockDim.x),
                                                config->dynamicSmemBytes);
  *clusters = size > device.cluster ? 0 : blocks * device.processors / static_cast<int>(size);
  return cudaSuccess;
}

// Odd streams are being captured, each pair of numbers into a graph of its own.
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, cudaStreamCaptureStatus* status, unsigned long long* id,
                                     cudaGraph_t* graph, const void*, const void*, size_t*) {
  const auto number = reinterpret_cast<uintptr_t>(stream);
  if (number % 2 == 0) return cudaSuccess;
  *status = cudaStreamCaptureStatusActive, *id = number / 2, *graph = reinterpret_cast<cudaGraph_t>(number);
  return cudaSuccess;
}

struct CUuserObject_st {
  void* given;
  cudaHostFn_t destroy;
};

namespace {
std::multimap<cudaGraph_t, CUuserObject_st> owned;
}

cudaError_t cudaUserObjectCreate(cudaUserObject_t* object, void* given, cudaHostFn_t destroy, unsigned, unsigned) {
  *object = new CUuserObject_st{given, destroy};
  return cudaSuccess;
}

cudaError_t cudaGraphRetainUserObject(cudaGraph_t graph, cudaUserObject_t object, unsigned, unsigned) {
  owned.emplace(graph, *object);
  delete object;
  return cudaSuccess;
}

// For the tests.

void use_device(int which, const Device& of, uint64_t of_seed) { devices[which] = of, seed = first_seed = of_seed; }

void add_memory(void* at, size_t bytes, const char* name, bool writable, bool filled) {
  memory().push_back({static_cast<char*>(at), bytes, name, writable, false, filled});
}

void clear() {
  memory().clear();
  launches.clear();
  failure.clear();
  counts() = {};
}
const char* failed() { return failure.c_str(); }
size_t launched(Launched* all, size_t most) {
  for (size_t k = 0; k < std::min(most, launches.size()); ++k) all[k] = launches[k];
  return launches.size();
}
void counted(Counts* all) { *all = counts(); }
void traffic(size_t which, uint64_t (*bytes)[4]) {
  const Region& r = memory()[which];
  (*bytes)[0] = r.read, (*bytes)[1] = r.written, (*bytes)[2] = r.read_singly, (*bytes)[3] = r.written_singly;
}
void destroy_graph(void* stream) {
  const auto [first, last] = owned.equal_range(static_cast<cudaGraph_t>(stream));
  for (auto it = first; it != last; ++it) it->second.destroy(it->second.given);
  owned.erase(first, last);
}
