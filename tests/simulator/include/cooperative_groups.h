// The groups of threads that the kernels use beyond a block: the grid and the cluster.
#pragma once
#include "cuda_runtime.h"

namespace cooperative_groups {

class grid_group {
 public:
  static void sync(KDFUSE_CALLER) { simulator::sync_grid({"grid.sync", file, line}); }
};
inline grid_group this_grid() { return {}; }

class cluster_group {
 public:
  static unsigned num_blocks() { return simulator::cluster_size(); }
  static unsigned block_rank() { return simulator::block_index().x % simulator::cluster_size(); }
  static void barrier_arrive(KDFUSE_CALLER) { simulator::arrive_at_cluster({"cluster.barrier_arrive", file, line}); }
  static void barrier_wait(KDFUSE_CALLER) { simulator::wait_for_cluster({"cluster.barrier_wait", file, line}); }
  static void sync(KDFUSE_CALLER) {
    simulator::arrive_at_cluster({"cluster.sync", file, line});
    simulator::wait_for_cluster({"cluster.sync", file, line});
  }
  template <class T>
  static T* map_shared_rank(T* at, int block) {
    return static_cast<T*>(simulator::of_block(at, block));
  }
};
inline cluster_group this_cluster() { return {}; }

}  // namespace cooperative_groups
