// What a CUDA row pass is asked to do. It travels to the kernels by value.
#pragma once
#include "row.h"
#include "row_limits.h"
#include "rows.h"

namespace kdfuse {

constexpr int kMaxLogits = kMaxStreams - 4;
constexpr int kMaxParams = kMaxStreams + 8;
constexpr int kMaxColumns = 256;  // the loss and its terms

// float or double numbers on the device, or none.
struct Numbers {
  const void* data;
  DType type;
  int64_t stride;  // 0: one number for all rows
};

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
  Numbers denominator, upstream;
  const double* counted;  // the valid rows, where a kernel before this one has counted them, or null
  double* partial;  // (blocks, columns): each block's sums of its rows' losses and terms
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
  bool sparse;  // some teacher's logits are top-k ones
  double params[kMaxParams];  // the op's own, see losses/<op>.h
  int team_bytes;  // of memory
  int held;  // this many of a row's inputs are kept in the team's memory
  int sorted;  // length of the sort that USKD makes in the team's memory
};

constexpr int kFastInputs = 4;  // of them at most 3 students

// Rows that are all of one type, lie alike on 16-byte boundaries and have labels, or none: the logits
// of the students, then of the teacher.
struct FastTask : Call {
  const void* logits[kFastInputs];
  int64_t strides[kFastInputs];
  void* gradients[kFastInputs - 1];
  float params[12];
  bool hold;  // rows that are read twice stay in the block's memory
};

static_assert(sizeof(Task) < 4096, "a kernel's arguments are limited to 4 KB");

}  // namespace kdfuse
