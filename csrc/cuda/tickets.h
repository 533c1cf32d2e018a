// Where launches count their finished blocks (Place::is_last). Launches of one stream follow each other and share
// a place. So do those that a capture takes from one stream, in a place of their own, as a graph may run beside the
// stream; they give it back when the last graph with them is gone.
#pragma once
#include <cuda_runtime.h>

#include <map>
#include <mutex>
#include <tuple>
#include <vector>

#include "failure.h"
#include "kernel_table.h"

namespace kdfuse {
namespace {

class Tickets {
 public:
  static unsigned take(int device, cudaStream_t stream) {
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    unsigned long long capture = 0;
    cudaGraph_t graph = nullptr;
#if CUDART_VERSION >= 13000
    check(cudaStreamGetCaptureInfo(stream, &status, &capture, &graph, nullptr, nullptr, nullptr));
#else
    check(cudaStreamGetCaptureInfo_v2(stream, &status, &capture, &graph));
#endif
    const Key key(device, stream, status == cudaStreamCaptureStatusActive ? capture + 1 : 0);
    Tickets& all = Tickets::all();
    const std::lock_guard<std::mutex> lock(all.mutex_);
    const auto known = all.taken_.find(key);
    if (known != all.taken_.end()) return known->second;
    if (graph) leave_with(graph, key);  // before a number is taken, which a failure would keep
    return all.taken_[key] = all.next(device);
  }

 private:
  using Key = std::tuple<int, cudaStream_t, unsigned long long>;  // the capture's number, from 1 on; 0: none

  // Never destroyed: graphs may be, after everything else.
  static Tickets& all() {
    static Tickets& tickets = *new Tickets;
    return tickets;
  }

  unsigned next(int device) {
    auto& free = free_[device];
    if (!free.empty()) {
      const unsigned ticket = free.back();
      free.pop_back();
      return ticket;
    }
    if (used_[device] == kTickets) throw Failure{"more than 65536 streams and captured graphs on one device"};
    return used_[device]++;
  }

  static void leave_with(cudaGraph_t graph, const Key& key) {
    cudaUserObject_t object = nullptr;
    Key* const kept = new Key(key);
    const cudaError_t error = cudaUserObjectCreate(&object, kept, give_back, 1, cudaUserObjectNoDestructorSync);
    if (error) delete kept;
    check(error);
    check(cudaGraphRetainUserObject(graph, object, 1, cudaGraphUserObjectMove));
  }

  static void give_back(void* kept) {
    const Key* const key = static_cast<Key*>(kept);
    Tickets& all = Tickets::all();
    const std::lock_guard<std::mutex> lock(all.mutex_);
    const auto found = all.taken_.find(*key);
    if (found != all.taken_.end()) {
      all.free_[std::get<0>(*key)].push_back(found->second);
      all.taken_.erase(found);
    }
    delete key;
  }

  std::mutex mutex_;
  std::map<Key, unsigned> taken_;
  std::map<int, std::vector<unsigned>> free_;
  std::map<int, unsigned> used_;
};

}  // namespace
}  // namespace kdfuse
