// The row pass of the CUDA kernels on the host, for tests: a team of threads that meet at a barrier.
// A team of one is the plain loop; with more, every thread does its own share of a row.
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <thread>
#include <vector>

#include "../../csrc/general.h"
#include "../../csrc/resident.h"
#include "../../csrc/resident_slkd.h"
#include "../../csrc/scale_cuda.h"
#include "../../csrc/streamed.h"

namespace kdfuse {
namespace {

constexpr int kSlots = 8;

struct Place {
  explicit Place(int size, size_t bytes) : size(size), memory(bytes / 16 + 1), slots(size * kSlots) {}

  void meet() {
    std::unique_lock<std::mutex> lock(mutex);
    const int64_t turn = turns;
    if (++waiting == size) {
      waiting = 0;
      ++turns;
      met.notify_all();
    } else {
      met.wait(lock, [&] { return turns != turn; });
    }
  }

  struct alignas(16) Block {
    unsigned char bytes[16];
  };
  const int size;
  std::vector<Block> memory;
  std::vector<double> slots;
  Batch batch = {};
  double sums[kMaxColumns] = {};
  std::mutex mutex;
  std::condition_variable met;
  int waiting = 0;
  int64_t turns = 0;
};

// A grid of one block with one team.
class Crowd {
 public:
  static constexpr int kTeams = 1;

  Crowd(Place& place, int rank) : place_(place), rank_(rank) {}
  int thread() const { return rank_; }
  int threads() const { return size(); }
  int block() const { return 0; }
  int blocks() const { return 1; }
  int index() const { return 0; }
  int teams() const { return 1; }
  int place() const { return rank_; }
  int places() const { return size(); }
  void sync_block() const { sync(); }
  void sync_grid() const { sync(); }
  template <int n>
  void sum_block(double (&x)[n]) const {
    sum(x);
  }
  Batch& batch() const { return place_.batch; }
  double* block_sums() const { return place_.sums; }
  double* sums(int) const { return place_.sums; }
  bool is_last(unsigned*) const {
    sync();
    return true;
  }
  int rank() const { return rank_; }
  int size() const { return place_.size; }
  void sync() const { place_.meet(); }
  void* memory() const { return place_.memory.data(); }
  template <class T, int n>
  void max(T (&x)[n]) const {
    gather(x, [](T a, T b) { return b > a ? b : a; });
  }
  template <class Join, class T, int n>
  void join(T (&x)[n]) const {
    gather(x, [](T a, T b) { return Join::join(a, b); });
  }
  template <class T, int n>
  void sum(T (&x)[n]) const {
    gather(x, [](T a, T b) { return a + b; });
  }

 private:
  template <class T, int n, class F>
  void gather(T (&x)[n], F join) const {
    static_assert(n <= kSlots, "too few slots");
    for (int k = 0; k < n; ++k) place_.slots[rank_ * kSlots + k] = x[k];
    sync();
    for (int k = 0; k < n; ++k) {
      x[k] = static_cast<T>(place_.slots[k]);
      for (int r = 1; r < size(); ++r) x[k] = join(x[k], static_cast<T>(place_.slots[r * kSlots + k]));
    }
    sync();
  }

  Place& place_;
  int rank_;
};

template <class T>
void run_op(int op, const Crowd& team, const Task& p) {
  unsigned* const ticket = nullptr;
  switch (op) {
    case 0:
      return run_batch<General<T, Crowd, kd_row<T, Crowd>, nullptr>>(team, p, ticket);
    case 1:
      return run_batch<General<T, Crowd, dkd_row<T, Crowd>, nullptr>>(team, p, ticket);
    case 2:
      return run_batch<General<T, Crowd, nkd_row<T, Crowd>, nullptr>>(team, p, ticket);
    case 3:
      return run_batch<General<T, Crowd, tf_nkd_row<T, Crowd>, tf_nkd_score<T, Crowd>>>(team, p, ticket);
    case 4:
      return run_batch<General<T, Crowd, uskd_row<T, Crowd>, uskd_score<T, Crowd>>>(team, p, ticket);
    default:
      return run_batch<General<T, Crowd, slkd_row<T, Crowd>, nullptr>>(team, p, ticket);
  }
}

enum Path { kGeneral, kResident, kStreamed };

template <Loss loss, DType type, bool labelled, int chunks>
void run_pair(Path path, const Crowd& team, const FastTask& p) {
  unsigned* const ticket = nullptr;
  if (path == kStreamed) return run_batch<Streamed<loss, type, labelled, Crowd>>(team, p, ticket);
  run_batch<Resident<loss, type, labelled, chunks, Crowd>>(team, p, ticket);
}

template <DType type, int chunks>
void run_fast(int op, Path path, int slts, const Crowd& team, const FastTask& p) {
  switch (op) {
    case 0:
      return p.labels ? run_pair<Loss::kd, type, true, chunks>(path, team, p)
                      : run_pair<Loss::kd, type, false, chunks>(path, team, p);
    case 1:
      return run_pair<Loss::dkd, type, true, chunks>(path, team, p);
    case 2:
      return run_pair<Loss::nkd, type, true, chunks>(path, team, p);
    case 3:
      return run_pair<Loss::tf_nkd, type, true, chunks>(path, team, p);
    default:
      return slts == 1 ? run_batch<ResidentSlkd<type, 1, chunks, Crowd>>(team, p, nullptr)
                       : run_batch<ResidentSlkd<type, 2, chunks, Crowd>>(team, p, nullptr);
  }
}

constexpr int kFewChunks = 4, kManyChunks = 140;  // of a thread: as on a device, and for a team of one

void run_fast(int op, Path path, int slts, const Crowd& team, const FastTask& p, DType type) {
  const bool few = max_chunks(p.classes) <= kFewChunks * team.size();
  const auto run = type == DType::bf16  ? few ? run_fast<DType::bf16, kFewChunks> : run_fast<DType::bf16, kManyChunks>
                   : type == DType::f16 ? few ? run_fast<DType::f16, kFewChunks> : run_fast<DType::f16, kManyChunks>
                   : few                ? run_fast<DType::f32, kFewChunks>
                                        : run_fast<DType::f32, kManyChunks>;
  run(op, path, slts, team, p);
}

}  // namespace
}  // namespace kdfuse

// A matrix as the tests hand it over: type 0 float32, 1 float64, 2 bfloat16, 3 float16.
struct Given {
  void* data;
  int64_t stride;
  int64_t type;
};

// What a top-k teacher has beside its values; count 0: its logits are whole.
struct Listed {
  const int64_t* classes;
  int64_t count;
  Given mass;
};

// path: see Path; hold: of the streamed rows.
extern "C" int host_rows(int op, int path, int hold, int threads, int held, int wide, int64_t rows, int64_t classes,
                         int students, int teachers, const Given* logits, const Given* gradients, const Listed* listed,
                         const int64_t* labels, const Given* soft, const double* params, int num_params,
                         const double* denominator, const Given* upstream, int reduction, int num_terms,
                         const uint64_t* counts, void* loss, void* terms) {
  using namespace kdfuse;
  Task p = {};
  p.rows = rows;
  p.classes = static_cast<int>(classes);
  p.num_students = students;
  p.num_teachers = teachers;
  p.num_terms = num_terms;
  for (int k = 0; k < students + teachers; ++k) {
    p.logits[k] = {logits[k].data, logits[k].stride, static_cast<DType>(logits[k].type)};
  }
  p.sparse = listed != nullptr;
  for (int k = 0; listed && k < teachers; ++k) {
    const Matrix mass = {listed[k].mass.data, listed[k].mass.stride, static_cast<DType>(listed[k].mass.type)};
    p.top_k[k] = {listed[k].classes, listed[k].count, listed[k].count, mass};
  }
  p.with_gradient = gradients != nullptr;
  for (int k = 0; gradients && k < students; ++k) {
    p.gradients[k] = {gradients[k].data, static_cast<DType>(gradients[k].type)};
  }
  p.labels = labels;
  p.label_stride = 1;
  p.ignore_index = -100;
  if (soft) p.soft = {soft->data, soft->stride, static_cast<DType>(soft->type)};
  for (int k = 0; k < num_params; ++k) p.params[k] = params[k];
  p.mean = reduction == 1;
  p.denominator = {denominator, DType::f64, 0};
  if (upstream) p.upstream = {upstream->data, static_cast<DType>(upstream->type), upstream->stride};
  std::vector<double> partial(1 + num_terms), scores(2 * rows);
  p.partial = partial.data();
  p.scores = scores.data();
  p.loss = loss;
  p.terms = terms;
  p.type = wide ? DType::f64 : DType::f32;
  p.each_row = reduction == 0;
  for (int k = 0; k < kMaxColumns / 64; ++k) p.counts[k] = counts[k];
  p.held = held;
  for (p.sorted = 2; p.sorted < p.classes;) p.sorted *= 2;
  FastTask fast = {};
  static_cast<Call&>(fast) = p;
  for (int k = 0; path != kGeneral && k < students + teachers; ++k) {
    fast.logits[k] = p.logits[k].data, fast.strides[k] = p.logits[k].stride;
    if (gradients && k < students) fast.gradients[k] = p.gradients[k].data;
  }
  if (path != kGeneral) set_params(fast, params, num_params, op != 3);
  fast.hold = hold;
  fast.whole = classes % kChunk == 0 && logits[0].stride % kChunk == 0;

  const size_t size = wide ? 8 : 4, chunks = max_chunks(p.classes);
  const size_t general = (kNotes + size_t(held) * kChunk * chunks) * size + size_t(p.sorted) * 16;
  Place place(threads, path == kGeneral ? general : kFastInputs * 32 * (size_t(threads) * kManyChunks + chunks));
  const auto work = [&](int rank) {
    const Crowd team(place, rank);
    if (path != kGeneral) return run_fast(op, static_cast<Path>(path), students - 1, team, fast, p.logits[0].type);
    wide ? run_op<double>(op, team, p) : run_op<float>(op, team, p);
  };
  std::vector<std::thread> others;
  for (int rank = 1; rank < threads; ++rank) others.emplace_back(work, rank);
  work(0);
  for (std::thread& thread : others) thread.join();
  return 0;
}

extern "C" void host_scale(void* gradient, int type, int64_t rows, int64_t classes, const Given* factor, int threads) {
  using namespace kdfuse;
  Scaling s = {};
  s.gradients[0] = {gradient, static_cast<DType>(type)};
  s.count = 1, s.rows = rows, s.classes = classes;
  s.factor = {factor->data, static_cast<DType>(factor->type), factor->stride};
  for (int thread = 0; thread < threads; ++thread) scale(s, thread, threads);
}
