// A GPU's execution on the host, as the kernels see it. What a kernel calls is below: turns.cpp has how blocks
// and threads take turns, meetings.cpp how they wait for each other, memory.cpp what becomes of each access,
// runtime.cpp the CUDA runtime.
//
// Each block of a running grid is a thread of the host, so that its shared memory is that thread's own, and each
// thread of it is a fibre. One fibre runs at a time, of all blocks: which one is drawn from the schedule's seed.
#pragma once
#include <cstddef>
#include <cstdint>

namespace simulator {

struct Index {
  unsigned x, y, z;
};
// What every thread of a grid runs.
struct Body {
  void (*run)(const void*);
  const void* given;
};
struct Site {
  const char* what;
  const char* file;
  int line;
};

Index thread_index();
Index block_index();
Index block_size();
Index grid_size();
unsigned cluster_size();

void sync_warp(const Site& site);
void sync_block(const Site& site);
void sync_grid(const Site& site);
void arrive_at_cluster(const Site& site);
void wait_for_cluster(const Site& site);
uint64_t shuffle(unsigned mask, uint64_t value, int lane, const Site& site);
void* of_block(void* at, int block);  // the same place in the shared memory of another block of the cluster

void copy_16(void* to, const void* from);
void fence();
unsigned begin_atomic(unsigned* at);  // what stands there
void end_atomic(unsigned* at, unsigned value);

// 16 bytes into shared memory, the last `zeros` of them 0.
void copy_async(void* to, const void* from, unsigned bytes, unsigned zeros);
void commit_copies();
void wait_for_copies(unsigned groups);  // but the last `groups`

}  // namespace simulator
