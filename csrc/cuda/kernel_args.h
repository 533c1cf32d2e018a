// What a CUDA row pass is asked to do. It travels to the kernels by value.
#pragma once
#include "../core/limits.h"
#include "../core/stats.h"
#include "../core/types.h"

namespace kdfuse {

constexpr int kMaxLogits = kMaxStreams - 4;
constexpr int kMaxParams = kMaxStreams + 8;
constexpr int kMaxTopK = 8;  // teachers, where some are top-k ones
constexpr int kMaxBlocks = 4096;  // of a grid
constexpr int kBlockNumbers = 3;
constexpr int kMaxColumns = 256;  // the loss and its terms

// float or double numbers on the device, or none.
struct Numbers {
  const void* data;
  DType type;
  int64_t stride;  // 0: one number for all rows
};

KDFUSE_HD Numbers numbers_of(const Matrix& m) { return {m.data, m.type, m.stride}; }

// Numbers of the whole batch; every block has its own copy.
struct Batch {
  double valid;  // rows that count
  double scale;  // of each row's loss in what is returned
  double score_mean[2];  // of the label scores, over the valid rows
};

// What every pass over a batch needs, whatever its rows.
struct Call {
  int64_t rows;
  int classes;
  int num_terms;
  bool with_gradient;
  bool mean;  // over the denominator, or over the valid rows without one
  bool each_row;  // the loss of every row instead of their sum
  const int64_t* labels;  // or null
  int64_t label_stride;
  int64_t ignore_index;
  double divisor;  // the denominator where it is known on the host, else 0
  Numbers denominator, upstream;
  bool count_apart;  // each block counts the labels of a part of the rows
  double* partial;  // (blocks, columns): each block's sums of its rows' losses and terms
  double* of_blocks;  // (blocks, kBlockNumbers): its count, and the sums of its rows' label scores
  double* scores;  // (rows, 2), of the ops that need their batch mean
  unsigned ticket;  // where the blocks that have finished are counted
  void* loss;  // one number, or each row's
  void* terms;  // and the valid rows behind them
  DType type;  // of the loss and the terms
  uint64_t counts[kMaxColumns / 64];  // bit k: term k is a count, not a mean

  KDFUSE_MEMBER int columns() const { return 1 + num_terms; }
};

// Rows of any types, with any number of teachers.
struct Task : Call {
  int num_students, num_teachers;
  Matrix logits[kMaxLogits];  // of the students, then of the teachers
  Output gradients[kMaxLogits];  // of the students
  Matrix soft;  // class probabilities instead of labels, or no data
  bool sparse;  // some teacher is a top-k one
  TopK top_k[kMaxTopK];
  double params[kMaxParams];  // the op's own, see losses/<op>.h
  int team_bytes;  // of memory
  int held;  // this many of a row's inputs are kept in the team's memory
};

// Whether all logits have the type of the student's.
inline bool of_one_type(const Task& p) {
  for (int k = 1; k < p.num_students + p.num_teachers; ++k) {
    if (p.logits[k].type != p.logits[0].type) return false;
  }
  return true;
}

constexpr int kFastInputs = 4;  // of them at most 3 students

// Rows that lie alike on 16-byte boundaries, of students of one type: the logits of the students, then of the teachers,
// then class probabilities.
struct FastTask : Call {
  int inputs;
  const void* logits[kFastInputs];
  uint32_t steps[kFastInputs];  // bytes from row to row
  DType types[kFastInputs];  // as the team's memory has them
  TopK listed;  // of the only teacher, whose rows are then float32 in the team's memory
  DType listed_type;  // of the logits that it lists
  void* gradients[kFastInputs - 1];
  float params[12];  // the op's own; of a loss under teachers its Factors
  float ce_weight;  // of such a loss
  float temperature, step, own_step;  // T, log2(e) / T, and that of the student
  int squarings;  // 0, 1, 2: T is 1, 2, 4; negative: it is none of them
  float square_by_t, pull;  // of SLKD: the factor T^2, or 1, by T; the weight of what the student asks of SL-Ts
  bool hold;  // rows that are read twice stay in the block's memory
  bool whole;  // every row is of whole chunks, on 16-byte boundaries
  int shift;  // classes from a 16-byte boundary to the first row
  uint32_t guarded;  // from this row on, what lies behind a row may be no memory
};

// So few that a row is counted in 32 bits, though the grid goes some rows too far.
constexpr int64_t kMaxFastRows = int64_t{0xffffffff} - (1 << 17);

constexpr double kLog2OfE = 1.4426950408889634;
constexpr float kLog2e = static_cast<float>(kLog2OfE);

// Scratch of a call, in doubles: partial, of_blocks, and scores where there are some.
inline int64_t scratch_numbers(const Call& p, bool scored) {
  return int64_t{kMaxBlocks} * (p.columns() + kBlockNumbers) + (scored ? 2 * p.rows : 0);
}

inline void set_scratch(Call& p, double* scratch) {
  p.partial = scratch;
  p.of_blocks = scratch + int64_t{kMaxBlocks} * p.columns();
  p.scores = p.of_blocks + int64_t{kMaxBlocks} * kBlockNumbers;
}

static_assert(sizeof(Task) < 4096, "a kernel's arguments are limited to 4 KB");

}  // namespace kdfuse
