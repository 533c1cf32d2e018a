// The teams of threads that work on one row together on a GPU: a warp, a block or a cluster of blocks.
// Their sums are the same for every thread and on every run.
#pragma once
#include <cooperative_groups.h>

#include <cstdint>

#include "grid.h"
#include "joint.h"

namespace kdfuse {

constexpr unsigned kWholeWarp = 0xffffffffu;
constexpr int kWarp = kLanes;
constexpr int kMaxBlock = 256;  // threads
constexpr int kMaxWarps = kMaxBlock / kWarp;
constexpr int kMaxCluster = 16;  // blocks

template <class Join, int kLanes, class T, int n>
__device__ __forceinline__ void join_lanes(T (&x)[n]) {
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) {
#pragma unroll
    for (int k = 0; k < n; ++k) x[k] = Join::join(x[k], __shfl_xor_sync(kWholeWarp, x[k], step));
  }
}

constexpr int kOctet = 8;  // lanes

// Of four numbers of each lane the k-th octet comes to have the k-th one joined: each half of the lanes goes on with
// half of them, and each quarter with one.
template <class Join, class T>
__device__ __forceinline__ T join_four(T a, T b, T c, T d) {
  const auto give = [](bool upper, T low, T high, int step) {
    return Join::join(upper ? high : low, __shfl_xor_sync(kWholeWarp, upper ? low : high, step));
  };
  const bool half = threadIdx.x & 16, quarter = threadIdx.x & 8;
  T mine[1] = {give(quarter, give(half, a, c, 16), give(half, b, d, 16), 8)};
  join_lanes<Join, kOctet>(mine);
  return mine[0];
}

template <class Join, class T, int kParts>
__device__ __forceinline__ T read_part(const T (&of_parts)[kMaxSums][kParts], int number, int part, int parts) {
  return part < parts ? of_parts[number][part] : Join::pad(of_parts[number][0]);
}

// The k-th and up to kEach - 1 more of n numbers, each of up to kParts parts that lie beside each other: all lanes come
// to have them joined.
template <class Join, int kParts, int k, class T, int n>
__device__ __forceinline__ void join_parts(const T (&of_parts)[kMaxSums][kParts], int parts, T (&x)[n]) {
  constexpr int kEach = kWarp / kParts, m = n - k < kEach ? n - k : kEach;
  const int lane = threadIdx.x % kWarp, part = lane % kParts, group = lane / kParts;
  const int number = m == 1 ? k : k + (m == kEach || group < m ? group : m - 1);
  T mine[1] = {read_part<Join>(of_parts, number, part, parts)};
  join_lanes<Join, kParts>(mine);
#pragma unroll
  for (int i = 0; i < m; ++i) x[k + i] = m == 1 ? mine[0] : __shfl_sync(kWholeWarp, mine[0], kParts * i);
  if constexpr (k + m < n) join_parts<Join, kParts, k + m>(of_parts, parts, x);
}

template <class Join, class T, int n>
__device__ __forceinline__ void join_warp(const Joint<Join, T, n>& of) {
  T(&x)[n] = of.x;
#pragma unroll
  for (int k = 0; k < n; k += 4) {
    if (k + 4 <= n) {
      const T mine = join_four<Join>(x[k], x[k + 1], x[k + 2], x[k + 3]);
#pragma unroll
      for (int i = 0; i < 4; ++i) x[k + i] = __shfl_sync(kWholeWarp, mine, kOctet * i);
    } else {
#pragma unroll
      for (int step = kWarp / 2; step > 0; step /= 2) {
#pragma unroll
        for (int i = k; i < n; ++i) x[i] = Join::join(x[i], __shfl_xor_sync(kWholeWarp, x[i], step));
      }
    }
  }
}

// Where parts lie beside each other, in two sets in turn: who writes one again has met everybody at the other one's
// barrier, since all have read it.
template <class Join, class T, int kParts>
__device__ __forceinline__ T (&parts_of(int turn)) [kMaxSums][kParts] {
  __shared__ T parts[2][kMaxSums][kParts];
  return parts[turn];
}

template <class Join, class T, int n>
__device__ __forceinline__ void put_warp(const Joint<Join, T, n>& of, int turn) {
  T(&parts)[kMaxSums][kMaxWarps] = parts_of<Join, T, kMaxWarps>(turn);
  const int lane = threadIdx.x % kWarp, octet = lane / kOctet, warp = threadIdx.x / kWarp;
#pragma unroll
  for (int k = 0; k < n; k += 4) {
    if (k + 1 == n) {
      T mine[1] = {of.x[k]};
      join_lanes<Join, kWarp>(mine);
      if (lane == 0) parts[k][warp] = mine[0];
    } else {
      const auto at = [&](int i) { return of.x[k + i < n ? k + i : k]; };
      const T mine = join_four<Join>(at(0), at(1), at(2), at(3));
      if (lane % kOctet == 0 && k + octet < n) parts[k + octet][warp] = mine;
    }
  }
}

// Every warp joins the same numbers of the warps in the same order.
template <class Join, class T, int n>
__device__ __forceinline__ void join_warps(const Joint<Join, T, n>& of, int turn) {
  join_parts<Join, kMaxWarps, 0>(parts_of<Join, T, kMaxWarps>(turn), blockDim.x / kWarp, of.x);
}

template <class... Joints>
__device__ __forceinline__ void join_block(int turn, const Joints&... of) {
  (put_warp(of, turn), ...);
  __syncthreads();
  (join_warps(of, turn), ...);
}

extern __shared__ uint4 block_memory[];  // the batch, the teams' sums, then what the teams work in

// A thread's place in the grid, and what its block shares.
class Place {
 public:
  __device__ static int thread() { return threadIdx.x; }
  __device__ static int threads() { return blockDim.x; }
  __device__ static int block() { return blockIdx.x; }
  __device__ static int blocks() { return gridDim.x; }
  __device__ static void meet() {}  // of the team's blocks
  __device__ static void sync_block() { __syncthreads(); }
  __device__ static void sync_grid() { cooperative_groups::this_grid().sync(); }
  template <int n>
  __device__ static void sum_block(double (&x)[n]) {
    join_block(0, joint<Sum>(x));
    __syncthreads();
  }
  __device__ static void sum_lanes(double (&x)[1]) { join_lanes<Sum, kWarp>(x); }
  __device__ static Batch& batch() { return *reinterpret_cast<Batch*>(block_memory); }
  __device__ static double* block_sums() { return reinterpret_cast<double*>(block_memory) + sizeof(Batch) / 8; }
  // Whether this block is the last one of the grid to come here; it then sees what the others wrote.
  __device__ static bool is_last(unsigned* ticket) {
    __shared__ bool last;
    __syncthreads();
    if (threadIdx.x == 0) {  // one thread's fences stand for all that have met it at a barrier
      __threadfence();
      last = atomicInc(ticket, gridDim.x - 1) == gridDim.x - 1;  // ends at 0
      __threadfence();
    }
    __syncthreads();
    return last;
  }
};

class Warp : public Place {
 public:
  static constexpr int kTeams = 4;  // in a block

  __device__ Warp(int head, int bytes)
      : warp_(__shfl_sync(kWholeWarp, threadIdx.x / kWarp, 0)),  // the compiler sees that a warp has one
        memory_(reinterpret_cast<char*>(block_memory) + head + warp_ * bytes) {}
  __device__ static int teams() { return gridDim.x * kTeams; }
  __device__ int index() const { return blockIdx.x * kTeams + warp_; }
  __device__ static int rank() { return threadIdx.x % kWarp; }
  __device__ static int size() { return kWarp; }
  __device__ static int place() { return rank(); }
  __device__ static int places() { return kWarp; }
  __device__ static void sync() { __syncwarp(); }
  __device__ void* memory() const { return memory_; }
  __device__ double* sums(int columns) const { return block_sums() + warp_ * columns; }
  template <class... Joints>
  __device__ static void join(const Joints&... of) {
    (join_warp(of), ...);
  }
  template <class T, int n>
  __device__ static void max(T (&x)[n]) {
    join(joint<Max>(x));
  }
  template <class T, int n>
  __device__ static void sum(T (&x)[n]) {
    join(joint<Sum>(x));
  }

 private:
  int warp_;
  char* memory_;
};

class Block : public Place {
 public:
  static constexpr int kTeams = 1;

  __device__ Block(int head, int) : memory_(reinterpret_cast<char*>(block_memory) + head) {}
  __device__ static int teams() { return gridDim.x; }
  __device__ static int index() { return blockIdx.x; }
  __device__ static int rank() { return threadIdx.x; }
  __device__ static int size() { return blockDim.x; }
  __device__ static int place() { return threadIdx.x; }
  __device__ static int places() { return blockDim.x; }
  __device__ static void sync() { __syncthreads(); }
  __device__ void* memory() const { return memory_; }
  __device__ static double* sums(int) { return block_sums(); }
  template <class... Joints>
  __device__ void join(const Joints&... of) const {
    join_block(turn_, of...);
    turn_ ^= 1;
  }
  template <class T, int n>
  __device__ void max(T (&x)[n]) const {
    join(joint<Max>(x));
  }
  template <class T, int n>
  __device__ void sum(T (&x)[n]) const {
    join(joint<Sum>(x));
  }

 private:
  char* memory_;
  mutable int turn_ = 0;
};

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
// Blocks that read each other's memory. Every block sends its own numbers to all.
class Cluster : public Place {
 public:
  static constexpr int kTeams = 1;

  __device__ Cluster(int head, int)
      : memory_(reinterpret_cast<char*>(block_memory) + head),
        blocks_(cooperative_groups::cluster_group::num_blocks()),
        block_(cooperative_groups::cluster_group::block_rank()),
        sends_(__shfl_sync(kWholeWarp, threadIdx.x / kWarp, 0) == 0) {
    cooperative_groups::cluster_group::barrier_arrive();
  }
  // Before the first join: a block that has not begun has no memory to write to.
  __device__ static void meet() { cooperative_groups::cluster_group::barrier_wait(); }
  __device__ int teams() const { return gridDim.x / blocks_; }
  __device__ int index() const { return blockIdx.x / blocks_; }
  __device__ int rank() const { return block_ * blockDim.x + threadIdx.x; }
  __device__ int size() const { return blocks_ * blockDim.x; }
  __device__ static int place() { return threadIdx.x; }
  __device__ static int places() { return blockDim.x; }
  __device__ static void sync() { cooperative_groups::cluster_group::sync(); }
  __device__ void* memory() const { return memory_; }
  __device__ static double* sums(int) { return block_sums(); }
  template <class... Joints>
  __device__ void join(const Joints&... of) const {
    (put_warp(of, turn_), ...);
    __syncthreads();
    if (sends_) (send(of), ...);
    sync();
    (join_blocks(of), ...);
    turn_ ^= 1;
  }
  template <int n>
  __device__ void sum(float (&x)[n]) const {
    join(joint<Sum>(x));
  }

 private:
  // One warp joins its block's numbers, each in some of its lanes, and sends them to every block.
  template <class Join, class T, int n>
  __device__ void send(const Joint<Join, T, n>&) const {
    constexpr int kEach = kWarp / kMaxWarps;
    const int lane = threadIdx.x % kWarp, part = lane % kMaxWarps;
#pragma unroll
    for (int first = 0; first < n; first += kEach) {
      const int k = first + lane / kMaxWarps;
      T mine[1] = {read_part<Join>(parts_of<Join, T, kMaxWarps>(turn_), k < n ? k : first, part, blockDim.x / kWarp)};
      join_lanes<Join, kMaxWarps>(mine);
      T* const at = &parts_of<Join, T, kMaxCluster>(turn_)[k < n ? k : first][block_];
#pragma unroll
      for (int to = part; to < kMaxCluster; to += kMaxWarps) {
        if (to < blocks_ && k < n) *cooperative_groups::cluster_group::map_shared_rank(at, to) = mine[0];
      }
    }
  }
  template <class Join, class T, int n>
  __device__ void join_blocks(const Joint<Join, T, n>& of) const {
    join_parts<Join, kMaxCluster, 0>(parts_of<Join, T, kMaxCluster>(turn_), blocks_, of.x);
  }

  char* memory_;
  int blocks_, block_;
  bool sends_;
  mutable int turn_ = 0;
};
#endif

}  // namespace kdfuse
