// The row pass of the CUDA kernels on the host, for tests: a team of threads that meet at a barrier.
// A team of one is the plain loop; with more, every thread does its own share of a row.
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <thread>
#include <vector>

#include "../csrc/batch_cuda.h"
#include "../csrc/rows_cuda.h"
#include "../csrc/uskd_cuda.h"

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
  std::mutex mutex;
  std::condition_variable met;
  int waiting = 0;
  int64_t turns = 0;
};

class Crowd {
 public:
  Crowd(Place& place, int rank) : place_(place), rank_(rank) {}
  int rank() const { return rank_; }
  int size() const { return place_.size; }
  void sync() const { place_.meet(); }
  void* memory() const { return place_.memory.data(); }
  template <class T>
  T max(T x) const {
    T all[1] = {x};
    gather(all, [](T a, T b) { return b > a ? b : a; });
    return all[0];
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
using Row = void (*)(const Crowd&, const Task&, int64_t, const Span&);

template <class T>
void each_row(const Crowd& team, const Task& p, Row<T> run, bool nothing) {
  for (int64_t row = 0; row < p.rows; ++row) {
    const Span span = span_of(p, row, sizeof(T) == sizeof(float));
    if (!ignored(p, row)) {
      run(team, p, row, span);
    } else if (nothing) {
      write_nothing<T>(team, p, row, span);
    }
    team.sync();
  }
}

template <class T>
void run_op(int op, const Crowd& team, const Task& p, const Totals& totals) {
  static const Row<T> rows[] = {kd_row<T, Crowd>,     dkd_row<T, Crowd>,  nkd_row<T, Crowd>,
                                tf_nkd_row<T, Crowd>, uskd_row<T, Crowd>, slkd_row<T, Crowd>};
  count_rows(team, p);
  team.sync();
  if (op == 3 || op == 4) {
    each_row<T>(team, p, op == 3 ? tf_nkd_score<T, Crowd> : uskd_score<T, Crowd>, false);
    average_scores(team, p);
    team.sync();
  }
  each_row<T>(team, p, rows[op], true);
  for (int column = 0; column <= p.num_terms; ++column) total(team, p, totals, column);
}

}  // namespace
}  // namespace kdfuse

// A matrix as the tests hand it over: type 0 float32, 1 float64, 2 bfloat16, 3 float16.
struct Given {
  void* data;
  int64_t stride;
  int64_t type;
};

extern "C" int host_rows(int op, int threads, int held, int wide, int64_t rows, int64_t classes, int students,
                         int teachers, const Given* logits, const Given* gradients, const int64_t* labels,
                         const Given* soft, const double* params, int num_params, const double* denominator,
                         const Given* upstream, int reduction, int num_terms, const uint64_t* counts, void* loss,
                         void* terms) {
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
  Batch batch = {};
  std::vector<double> out(rows * (1 + num_terms)), scores(2 * rows);
  p.batch = &batch;
  p.out = out.data();
  p.scores = scores.data();
  p.held = held;
  for (p.sorted = 2; p.sorted < p.classes;) p.sorted *= 2;
  Totals totals = {loss, terms, wide ? DType::f64 : DType::f32, reduction == 0, {}};
  for (int k = 0; k < kMaxColumns / 64; ++k) totals.counts[k] = counts[k];

  const size_t size = wide ? 8 : 4;
  Place place(threads, (kNotes + size_t(held) * kChunk * max_chunks(p.classes)) * size + size_t(p.sorted) * 16);
  const auto work = [&](int rank) {
    const Crowd team(place, rank);
    wide ? run_op<double>(op, team, p, totals) : run_op<float>(op, team, p, totals);
  };
  std::vector<std::thread> others;
  for (int rank = 1; rank < threads; ++rank) others.emplace_back(work, rank);
  work(0);
  for (std::thread& thread : others) thread.join();
  return 0;
}
