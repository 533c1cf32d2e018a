// One pass over a batch by a whole grid: the count of the rows that count, each team's rows, and the
// totals, in one launch. Sums over the batch run in double and in a fixed order.
//
// A team knows its place in the grid beside its row: index() of teams(), thread() of threads() in a
// block, block() of blocks(); batch() and block_sums() are its block's, sums() its own.
#pragma once
#include <cassert>

#include "kernel_args.h"

namespace kdfuse {

constexpr int kLanes = 32;  // of a warp

// Of a block's memory, for the batch and the sums of its teams.
KDFUSE_HD int head_bytes(int teams, int columns) {
  return static_cast<int>((sizeof(Batch) + sizeof(double) * teams * columns + 15) / 16 * 16);
}

KDFUSE_DEVICE double number(const Numbers& n, int64_t row) {
  return n.type == DType::f64 ? static_cast<const double*>(n.data)[row * n.stride]
                              : static_cast<const float*>(n.data)[row * n.stride];
}

KDFUSE_DEVICE bool ignored(const Call& p, int64_t row) {
  return p.labels && p.labels[row * p.label_stride] == p.ignore_index;
}

// The rows that count, of those from `first` on in steps: labels outside the classes stop the kernel. Several
// labels are on their way at a time: their latency is what this costs.
KDFUSE_DEVICE double count_rows(const Call& p, int64_t first, int64_t step) {
  constexpr int kAhead = 8;
  if (!p.labels) return first == 0 ? static_cast<double>(p.rows) : 0.;
  int valid = 0;
#pragma unroll 1
  for (int64_t row = first; row < p.rows; row += kAhead * step) {
    int64_t y[kAhead];
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      const int64_t at = row + u * step;
      y[u] = at < p.rows ? p.labels[at * p.label_stride] : p.ignore_index;
    }
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      const bool counts = y[u] != p.ignore_index;
      assert((!counts || (y[u] >= 0 && y[u] < p.classes)) &&
             "kdfuse: target outside the classes; mark rows to skip with ignore_index");
      valid += counts;
    }
  }
  return valid;
}

// Numbers that other blocks have written.
KDFUSE_DEVICE double fresh(const double* x) { return __ldcg(x); }

// The sums over all blocks of a number of each, which comes back to every thread of the grid; at: of kBlockNumbers.
template <int n, class Team>
KDFUSE_DEVICE void sum_grid(const Team& team, const Call& p, int at, double (&x)[n]) {
  team.sum_block(x);
  if (team.thread() < n) {
    double* const own = p.of_blocks + static_cast<int64_t>(team.block()) * kBlockNumbers + at;
#pragma unroll
    for (int k = 0; k < n; ++k) {
      if (team.thread() == k) own[k] = x[k];
    }
  }
  team.sync_grid();
#pragma unroll
  for (double& sum : x) sum = 0;
#pragma unroll 1
  for (int b = team.thread(); b < team.blocks(); b += team.threads()) {
#pragma unroll
    for (int k = 0; k < n; ++k) x[k] += fresh(p.of_blocks + static_cast<int64_t>(b) * kBlockNumbers + at + k);
  }
  team.sum_block(x);
}

// Every block counts for itself: the labels are few beside the logits, and nothing has to be waited for. Of many
// rows each counts a part.
template <class Team>
KDFUSE_DEVICE void open_batch(const Team& team, const Call& p) {
  double valid[1];
  if (p.count_apart) {
    const int64_t thread = static_cast<int64_t>(team.block()) * team.threads() + team.thread();
    valid[0] = count_rows(p, thread, static_cast<int64_t>(team.blocks()) * team.threads());
    sum_grid(team, p, 0, valid);
  } else {
    valid[0] = count_rows(p, team.thread(), team.threads());
    team.sum_block(valid);
  }
  if (team.thread() == 0) {
    const double rows = p.divisor > 0 ? p.divisor : valid[0] > 1 ? valid[0] : 1.;
    const double divisor = p.denominator.data ? number(p.denominator, 0) : rows;
    assert(divisor > 0 && "kdfuse: denominator must be positive");
    team.batch() = {valid[0], p.mean ? 1 / divisor : 1., {0, 0}};
  }
#pragma unroll 1
  for (int k = team.thread(); k < Team::kTeams * p.columns(); k += team.threads()) team.block_sums()[k] = 0;
  team.sync_block();
}

// What a row's loss counts for in what is differentiated.
template <class T, class Team>
KDFUSE_DEVICE T row_weight(const Team& team, const Call& p, int64_t row) {
  const double scale = team.batch().scale;
  return static_cast<T>(p.upstream.data ? scale * number(p.upstream, row) : scale);
}

KDFUSE_DEVICE void put(void* to, DType type, int64_t i, double value) {
  if (type == DType::f64) {
    static_cast<double*>(to)[i] = value;
  } else {
    static_cast<float*>(to)[i] = static_cast<float>(value);
  }
}

// The k-th of n numbers, bit by bit of k: a chain of choices would be made a table in local memory.
template <int n>
KDFUSE_DEVICE float pick(const float (&values)[n], int k) {
  static_assert(n <= 8, "three bits");
  const auto of = [&](int i) { return values[i < n ? i : n - 1]; };
  const auto one = [&](int i) { return k & 1 ? of(i + 1) : of(i); };
  const auto two = [&](int i) { return i + 2 < n && k & 2 ? one(i + 2) : one(i); };
  return n > 4 && k & 4 ? two(4) : two(0);
}

// Numbers of a row that counts, from column `first` on: column 0 is its loss, the others its terms. Each thread
// of the team's first has one.
template <int n, class Team>
KDFUSE_DEVICE void add_values(const Team& team, const Call& p, int first, const float (&values)[n]) {
  if (team.size() >= n) {
    if (team.rank() < n) team.sums(p.columns())[first + team.rank()] += pick(values, team.rank());
  } else if (team.rank() == 0) {  // of the host's
    for (int k = 0; k < n; ++k) team.sums(p.columns())[first + k] += values[k];
  }
}

template <int n, class Team>
KDFUSE_DEVICE void add_values(const Team& team, const Call& p, int first, const double (&values)[n]) {
  if (team.rank() != 0) return;
#pragma unroll
  for (int k = 0; k < n; ++k) team.sums(p.columns())[first + k] += values[k];
}

template <int n, class T, class Team>
KDFUSE_DEVICE void write_values(const Team& team, const Call& p, int64_t row, int first, const T (&values)[n]) {
  add_values(team, p, first, values);
  if (first == 0 && p.each_row && team.rank() == 0) put(p.loss, p.type, row, values[0]);
}

template <class Team>
KDFUSE_DEVICE void write_no_values(const Team& team, const Call& p, int64_t row) {
  if (p.each_row && team.rank() == 0) put(p.loss, p.type, row, 0);
}

// A row's label scores, kept for its second reading and summed up.
template <class Team>
KDFUSE_DEVICE void put_scores(const Team& team, const Call& p, int64_t row, double first, double second) {
  if (team.rank() != 0) return;
  p.scores[2 * row] = first, p.scores[2 * row + 1] = second;
  double* const sums = team.sums(p.columns());
  sums[0] += first, sums[1] += second;
}

// The means of the label scores, after every team has put its rows'.
template <class Team>
KDFUSE_DEVICE void average_scores(const Team& team, const Call& p) {
  team.sync_block();
  double sums[2] = {0, 0};
  const int columns = p.columns();
  if (team.thread() < Team::kTeams) {
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      double& sum = team.block_sums()[team.thread() * columns + k];
      sums[k] = sum, sum = 0;
    }
  }
  sum_grid(team, p, 1, sums);
  const double valid = team.batch().valid > 1 ? team.batch().valid : 1;
  team.sync_block();
  if (team.thread() == 0) team.batch().score_mean[0] = sums[0] / valid, team.batch().score_mean[1] = sums[1] / valid;
  team.sync_block();
}

// The last block adds up what all have summed, a warp a column.
template <class Team>
KDFUSE_DEVICE void close_batch(const Team& team, const Call& p, unsigned* tickets) {
  const int columns = p.columns();
  team.sync_block();
#pragma unroll 1
  for (int k = team.thread(); k < columns; k += team.threads()) {
    double sum = 0;
#pragma unroll 1
    for (int t = 0; t < Team::kTeams; ++t) sum += team.block_sums()[t * columns + k];
    p.partial[static_cast<int64_t>(team.block()) * columns + k] = sum;
  }
  if (!team.is_last(tickets + p.ticket)) return;
  const double valid = team.batch().valid;
  const int lane = team.thread() % kLanes, warps = team.threads() / kLanes;
#pragma unroll 1
  for (int k = team.thread() / kLanes; k < columns; k += warps) {
    double sum[1] = {0};
#pragma unroll 4
    for (int b = lane; b < team.blocks(); b += kLanes) {
      sum[0] += fresh(p.partial + static_cast<int64_t>(b) * columns + k);
    }
    team.sum_lanes(sum);
    if (lane != 0) continue;
    if (k == 0) {
      if (!p.each_row) put(p.loss, p.type, 0, sum[0] * team.batch().scale);
      put(p.terms, p.type, p.num_terms, valid);
    } else {
      const bool count = p.counts[(k - 1) / 64] >> ((k - 1) % 64) & 1;
      put(p.terms, p.type, k - 1, count || valid < 1 ? sum[0] : sum[0] / valid);
    }
  }
}

// The rows of a team in the order in which it works on them, a grid's length apart; then rows that there are not.
template <class Index, bool twice>
class Order {
 public:
  template <class Team>
  KDFUSE_DEVICE_MEMBER Order(const Team& team, Index rows)
      : first_(team.index()), step_(team.teams()), rows_(rows), next_(first_) {}

  KDFUSE_DEVICE_MEMBER Index take() {
    const Index row = next_;
    next_ += step_;
    if (twice && !again_ && next_ >= rows_) next_ = first_, again_ = true;
    return row;
  }

 private:
  Index first_, step_, rows_, next_;
  bool again_ = false;
};

// A batch in one launch. While a row is worked on the next two may be on their way.
template <class Rows, class Team, class Task>
KDFUSE_DEVICE void run_batch(const Team& team, const Task& p, unsigned* tickets) {
  Rows rows(team, p);
  using Index = typename Rows::Index;
  const auto count = static_cast<Index>(p.rows);
  Order<Index, Rows::kScored> ahead(team, count);
  rows.fetch(ahead.take());
  rows.fetch(ahead.take());
  open_batch(team, p);
  team.meet();
  rows.begin();
  const Index first = team.index(), step = team.teams();
  if constexpr (Rows::kScored) {
#pragma unroll 1
    for (Index row = first; row < count; row += step) rows.score(row, ahead.take());
    average_scores(team, p);
  }
#pragma unroll 1
  for (Index row = first; row < count; row += step) rows.run(row, ahead.take());
  close_batch(team, p, tickets);
}

}  // namespace kdfuse
