// The simulator for tests: devices, their memory, and what became of the launches.
#pragma once
#include <cstddef>
#include <cstdint>

namespace simulator {

struct Device {
  int processors, major, memory, memory_of_processor;  // memory: bytes of a block at most
  unsigned cluster;  // blocks at most
  int built_for;  // the architecture of the code, as 90
  int static_bytes;  // of shared memory, of every kernel
  int registers;  // of a thread, of every kernel
  int failing;  // so many questions about kernels fail
  int refused;  // which of a call's launches fails, from 1 on
  int runs;  // or only takes launches down
};

struct Launched {
  const void* kernel;
  unsigned blocks, threads, cluster;
  size_t bytes;
  bool together, non_portable;  // non_portable: the kernel may have clusters of more than 8 blocks
};

// How often threads have met: each meeting once, whoever takes part; a shuffle is one of a warp.
struct Counts {
  uint64_t block_barriers, cluster_barriers, grid_barriers, warp_barriers, shuffles;
  uint64_t remote_stores;  // of threads, into other blocks' memory
};

}  // namespace simulator

extern "C" {
// number: what the launcher knows it by, and keeps what it has learnt.
void use_device(int number, const simulator::Device& device, uint64_t seed);
// filled: holds numbers already.
void add_memory(void* at, size_t bytes, const char* name, bool writable, bool filled);
void clear();
void destroy_graph(void* stream);  // into which it was captured
const char* failed();  // "" where nothing did
size_t launched(simulator::Launched* all, size_t most);
void counted(simulator::Counts* counts);  // since clear()
// Bytes of accesses: read in 16, written in 16, read and written in smaller ones.
void traffic(size_t which, uint64_t (*bytes)[4]);
}
