// Which kernel a call takes, in which shape, and the launch.
#include <cuda_runtime.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <tuple>

#include "launch.h"
#include "scale.h"
#include "team.h"
#include "tickets.h"

namespace kdfuse {
namespace {

// Rows, from which on a block counts a part of them, and all have to meet. Clusters count them all themselves: their
// rows are long.
constexpr int64_t kCountedApart = 16384;
constexpr int64_t kMaxStep = 0xffffffff;  // bytes from one fast row to the next
constexpr int kMaxSorted = 1 << 16;  // the longest row that is sorted
constexpr int kWarpBytes = 16 * 1024;  // of memory for a warp's inputs in general kernels at most

__global__ void __launch_bounds__(kMaxBlock) scale_rows(const __grid_constant__ Scaling s) {
  scale(s, int64_t{blockIdx.x} * blockDim.x + threadIdx.x, int64_t{gridDim.x} * blockDim.x);
}

// A launch, and how many teams of it the device can hold at a time.
struct Launch {
  const void* kernel = nullptr;
  int threads = 0, bytes = 0, cluster = 1, teams = 1;  // teams: of a block
  bool together = false;  // all blocks run at the same time
};

struct Device {
  int processors, memory, major;  // memory: of a block at most
};

// What is asked of the runtime once for each key. A failure is not kept.
template <class Key, class Value>
class Known {
 public:
  template <class F>
  Value get(const Key& key, F ask) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = known_.find(key);
    if (found != known_.end()) return found->second;
    const Value value = ask();
    known_.emplace(key, value);
    return value;
  }

 private:
  std::mutex mutex_;
  std::map<Key, Value> known_;
};

Device device_of(int device) {
  static Known<int, Device> known;
  return known.get(device, [device] {
    Device d;
    check(cudaDeviceGetAttribute(&d.processors, cudaDevAttrMultiProcessorCount, device));
    check(cudaDeviceGetAttribute(&d.memory, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    check(cudaDeviceGetAttribute(&d.major, cudaDevAttrComputeCapabilityMajor, device));
    return d;
  });
}

struct Kernel {
  int memory;  // of a block at most, beside its static one
  int compiled_for;  // the architecture of its PTX, as 90
};

Kernel kernel_of(const void* kernel, int device) {
  static Known<std::pair<const void*, int>, Kernel> known;
  return known.get({kernel, device}, [kernel, device] {
    cudaFuncAttributes facts;
    check(cudaFuncGetAttributes(&facts, kernel));
    const int memory = device_of(device).memory - static_cast<int>(facts.sharedSizeBytes);
    // As much as there is, once and for all: a limit set for one call could be below what another one needs.
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, memory));
    return Kernel{memory, facts.ptxVersion};
  });
}

// The code for an older architecture has no clusters: there the kernel is empty.
bool has_clusters(const void* kernel, int device) {
  return device_of(device).major >= 9 && kernel_of(kernel, device).compiled_for >= 90;
}

void fill(cudaLaunchConfig_t& config, cudaLaunchAttribute (&attributes)[2], const Launch& l, int blocks,
          cudaStream_t stream) {
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(l.threads);
  config.dynamicSmemBytes = l.bytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = 0;
  if (l.cluster > 1) {
    auto& a = attributes[config.numAttrs++];
    a.id = cudaLaunchAttributeClusterDimension;
    a.val.clusterDim.x = l.cluster, a.val.clusterDim.y = a.val.clusterDim.z = 1;
  }
  if (l.together) {
    auto& a = attributes[config.numAttrs++];
    a.id = cudaLaunchAttributeCooperative;
    a.val.cooperative = 1;
  }
}

// How many blocks run at a time; 0 where none can.
int blocks_at_once(const Launch& l, int device) {
  static Known<std::tuple<const void*, int, int, int, int>, int> known;
  const int blocks = known.get({l.kernel, device, l.threads, l.bytes, l.cluster}, [&l, device] {
    int blocks = 0;
    if (l.bytes > kernel_of(l.kernel, device).memory) return 0;
    if (l.cluster == 1) {
      check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, l.kernel, l.threads, l.bytes));
      return blocks * device_of(device).processors;
    }
    if (l.cluster > 8) check(cudaFuncSetAttribute(l.kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
    cudaLaunchConfig_t config = {};
    cudaLaunchAttribute attributes[2];
    fill(config, attributes, l, l.cluster, nullptr);
    check(cudaOccupancyMaxActiveClusters(&blocks, l.kernel, &config));
    return blocks * l.cluster;
  });
  return std::min(blocks, kMaxBlocks / l.cluster * l.cluster);
}

template <class... Arguments>
void enqueue(void (*kernel)(Arguments...), const Launch& l, int blocks, cudaStream_t stream,
             const Arguments&... arguments) {
  cudaLaunchConfig_t config = {};
  cudaLaunchAttribute attributes[2];
  fill(config, attributes, l, blocks, stream);
  check(cudaLaunchKernelEx(&config, kernel, arguments...));
}

template <class T>
void start(Launch l, T& task, int device, cudaStream_t stream) {
  task.ticket = Tickets::take(device, stream);
  task.count_apart = task.labels && task.rows > kCountedApart && l.cluster == 1;
  l.together |= task.count_apart;
  const int64_t teams_per_block = l.teams, wanted = (task.rows + teams_per_block - 1) / teams_per_block * l.cluster;
  const int blocks = static_cast<int>(std::clamp<int64_t>(wanted, l.cluster, blocks_at_once(l, device)));
  enqueue(reinterpret_cast<void (*)(T)>(const_cast<void*>(l.kernel)), l, blocks, stream, task);
}

LossKernels kernels_of(Loss loss) {
  switch (loss) {
#define KDFUSE_OTHER(name) \
  case Loss::name:         \
    return name##_kernels();
#include "../losses/all.def"
  }
  return {};
}

// Whether a call's rows are fast ones; then fast is that call.
bool make_fast(const LossKernels& of, const Task& p, FastTask& fast) {
  const int logits = p.num_students + p.num_teachers;
  fast.inputs = logits + (p.soft.data != nullptr);
  const DType type = p.logits[0].type;
  if (!of.set_fast || fast.inputs > kFastInputs || p.rows > kMaxFastRows) return false;
  const int64_t size = bytes_of(type), own = type == DType::bf16 ? 2 : 4;
  const auto first = reinterpret_cast<uintptr_t>(p.logits[0].data);
  static_cast<Call&>(fast) = p;
  fast.shift = static_cast<int>(first / size % kChunk);
  bool overlap = false;  // rows of an input
  for (int k = 0; k < fast.inputs; ++k) {
    const Matrix& m = k < logits ? p.logits[k] : p.soft;
    const int64_t bytes = bytes_of(m.type);
    if (m.type == DType::f64 || m.stride * bytes > kMaxStep) return false;
    fast.logits[k] = m.data, fast.steps[k] = static_cast<uint32_t>(m.stride * bytes), fast.types[k] = m.type;
    if (p.sparse && k == p.num_students && p.top_k[0].count > 0) {
      fast.listed = p.top_k[0], fast.listed_type = m.type, fast.types[k] = DType::f32;
      continue;
    }
    const auto at = reinterpret_cast<uintptr_t>(m.data) - static_cast<uintptr_t>(fast.shift * bytes);
    if (at % (kChunk * bytes) || (m.stride - p.classes) % kChunk) return false;
    if (k < p.num_students && m.type != type) return false;
    overlap |= m.stride < p.classes;
  }
  for (int k = 0; p.with_gradient && k < p.num_students; ++k) {
    const auto at = reinterpret_cast<uintptr_t>(p.gradients[k].data);
    if (at / own % kChunk != static_cast<uintptr_t>(fast.shift)) return false;
    fast.gradients[k] = p.gradients[k].data;
  }
  fast.whole = p.classes % kChunk == 0 && fast.shift == 0;
  fast.guarded = static_cast<uint32_t>(fast.whole ? p.rows : overlap ? 0 : p.rows - 1);
  return of.set_fast(p, fast);
}

int whole_warps(int threads) { return std::max(kWarp, (threads + kWarp - 1) / kWarp * kWarp); }

// Few short rows take a block each, so that a row is done sooner; many take a warp each. Longer rows take a
// block, then a cluster of them; rows beyond all registers are read twice.
bool shape_fast(const LossKernels& of, const FastKernels& k, FastTask& p, DType type, int device, Launch& l) {
  const Device& d = device_of(device);
  const int chunks = p.whole ? p.classes / kChunk : max_chunks(p.classes);
  l.together = of.scored;
  if (chunks <= kWarp * k.chunks && p.rows > 4 * d.processors) {
    l.kernel = k.warps, l.teams = Warp::kTeams, l.threads = Warp::kTeams * kWarp;
    l.bytes = head_bytes(Warp::kTeams, p.columns()) + l.threads * k.thread_bytes;
    return true;
  }
  const int head = head_bytes(1, p.columns());
  const int fewest = (chunks + kFastBlock - 1) / kFastBlock;  // chunks of a thread
  if (fewest <= k.chunks) {
    const int each = p.rows > 8 * d.processors ? k.chunks : fewest;
    l.kernel = k.blocks, l.threads = whole_warps((chunks + each - 1) / each);
    l.bytes = head + l.threads * k.thread_bytes;
    return true;
  }
  const bool clusters = k.clusters && has_clusters(k.clusters, device);
  for (l.cluster = 2; clusters && l.cluster <= kMaxCluster; l.cluster *= 2) {
    const int each = (chunks + l.cluster * k.chunks - 1) / (l.cluster * k.chunks);
    if (each > kFastBlock) continue;
    l.kernel = k.clusters, l.threads = whole_warps(each);
    l.bytes = head + l.threads * k.thread_bytes;
    if (blocks_at_once(l, device) > 0) return true;
  }
  l.cluster = 1;
  if (!k.streams) return false;
  l.kernel = k.streams, l.threads = kStreamBlock;
  const int rows = p.inputs;
  const int64_t row = int64_t{max_chunks(p.classes)} * rows * (type == DType::f32 ? 32 : 16);
  p.hold = p.with_gradient && head + row <= kernel_of(k.streams, device).memory;
  l.bytes = head + static_cast<int>(p.hold ? row : 0);
  return true;
}

void shape_general(const LossKernels& of, Task& p, bool wide, int device, Launch& l) {
  const GeneralKernels k = of.general();
  const int64_t number = wide ? sizeof(double) : sizeof(float);
  const int64_t row = number * kChunk * max_chunks(p.classes);
  const int64_t entry = of.sorted ? number + sizeof(uint16_t) : 0;  // of the sort that USKD makes
  const bool warps = !wide && p.classes <= kWarp * kChunk * 4;
  const int teams = warps ? Warp::kTeams : 1, head = head_bytes(teams, p.columns());
  const int64_t reserved = number * kNotes + (p.classes * entry + 15) / 16 * 16;
  l.kernel = warps ? k.warps : wide ? k.wide : k.blocks;
  const int64_t space = warps ? kWarpBytes : kernel_of(l.kernel, device).memory - head - reserved;
  if (space < 0 || (of.sorted && p.classes > kMaxSorted)) {
    throw Failure{"rows of " + std::to_string(p.classes) +
                  " classes are too long for the sort in uskd's CUDA kernel on this device; use backend='reference'"};
  }
  // Students, teachers, class probabilities and the fused SL-Ts, in this order.
  const int inputs = p.num_students + p.num_teachers + (p.soft.data != nullptr) + of.fused;
  p.held = static_cast<int>(std::min<int64_t>(inputs, space / row));
  p.team_bytes = static_cast<int>((reserved + p.held * row + 15) / 16 * 16);
  l.teams = teams;
  l.threads = warps ? teams * kWarp : std::min(whole_warps(max_chunks(p.classes) / 2), kGeneralBlock);
  l.bytes = head + teams * p.team_bytes;
  l.together = of.scored;
}

void launch_rows(Loss loss, Task p, bool wide, int device, cudaStream_t stream) {
  // The runtime inside this module keeps its own current device.
  check(cudaSetDevice(device));
  FastTask fast = {};
  Launch l;
  const LossKernels of = kernels_of(loss);
  if (!wide && make_fast(of, p, fast) && shape_fast(of, of.fast(p), fast, p.logits[0].type, device, l) &&
      blocks_at_once(l, device) > 0) {
    return start(l, fast, device, stream);
  }
  l = {};
  shape_general(of, p, wide, device, l);
  if (blocks_at_once(l, device) == 0) throw Failure{"this device has no room for a block of the kernel"};
  start(l, p, device, stream);
}

void launch_scales(const Output* gradients, void* const* halves, int count, int64_t rows, int64_t classes,
                   const Numbers& factor, int device, cudaStream_t stream) {
  check(cudaSetDevice(device));
  const int blocks = 8 * device_of(device).processors;
  for (int k = 0; k < count; k += kScaled) {
    Scaling s = {};
    s.count = std::min(kScaled, count - k), s.rows = rows, s.classes = classes, s.factor = factor;
    std::copy(gradients + k, gradients + k + s.count, s.gradients);
    if (halves) std::copy(halves + k, halves + k + s.count, s.halves);
    enqueue(scale_rows, {nullptr, kMaxBlock}, blocks, stream, s);
  }
}

}  // namespace

std::string launch(Loss loss, Task p, bool wide, int device, void* stream) {
  try {
    launch_rows(loss, p, wide, device, static_cast<cudaStream_t>(stream));
  } catch (const Failure& failure) {
    return failure.what;
  }
  return "";
}

std::string launch_scale(const Output* gradients, void* const* halves, int count, int64_t rows, int64_t classes,
                         const Numbers& factor, int device, void* stream) {
  if (rows == 0) return "";  // nothing to scale, and perhaps no factor either
  try {
    launch_scales(gradients, halves, count, rows, classes, factor, device, static_cast<cudaStream_t>(stream));
  } catch (const Failure& failure) {
    return failure.what;
  }
  return "";
}

int driver_version() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

}  // namespace kdfuse
