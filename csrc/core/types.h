// What a row pass is asked to do, and what each op is on the CPU. No framework types.
#pragma once
#include <cstddef>
#include <cstdint>

namespace kdfuse {

enum class DType { f32, f64, bf16, f16 };

struct Matrix {
  const void* data = nullptr;  // (rows, classes), unit stride along the classes
  int64_t stride = 0;  // elements from row to row
  DType type = DType::f32;
};

// What a top-k teacher has beside the Matrix of its values, (rows, count).
struct TopK {
  const int64_t* classes = nullptr;  // (rows, count) distinct classes, unit stride along a row
  int64_t stride = 0;  // elements from row to row
  int64_t count = 0;  // fewer than there are classes; 0: the teacher's logits are whole
  Matrix mass;  // (rows, 1) float or double, of the classes that are not listed; no data: they have none
};

static inline double mass_at(const TopK& x, int64_t row) {
  const int64_t at = row * x.mass.stride;
  return x.mass.type == DType::f64 ? static_cast<const double*>(x.mass.data)[at]
                                   : static_cast<double>(static_cast<const float*>(x.mass.data)[at]);
}

struct Output {
  void* data;  // (rows, classes), contiguous
  DType type;
};

struct Problem {
  int64_t rows, classes;
  const Matrix* students;  // logits that get a gradient
  int num_students;
  const Matrix* teachers;  // logits that do not
  int num_teachers;
  const TopK* top_k;  // one for each teacher, or null where all are whole
  const Output* gradients;  // one for each student, or null
  const int64_t* labels;  // (rows), or null
  Matrix soft;  // (rows, classes) class probabilities instead of labels, or no data
  int64_t ignore_index;
  const double* params;  // the op's own, see losses/<op>.h
  const double* upstream;  // the weight of each row's loss in what is differentiated
  int num_terms;
  double* out;  // (rows, 1 + num_terms): the row's loss, then its terms
  double* scores;  // (rows, 2): label scores of the ops that need their batch mean
  double score_mean[2];  // over the valid rows
  bool wide;  // compute in double
};

// The ops, in the order of losses/all.def.
enum class Loss {
#define KDFUSE_OTHER(name) name,
#include "../losses/all.def"
};

// What an op takes, and what it reports.
struct OpFacts {
  bool (*fits)(size_t students, size_t teachers, size_t params);
  int (*terms)(int students);
  bool (*counts)(int term);  // it counts rows; else it is a mean over them
  bool takes_top_k, needs_target;
  bool scored;  // needs the batch mean of its label scores
  bool fused;  // has a fused teacher
};

struct RowPass {
  // Rows [begin, end) of scores, for the ops that need their batch mean; null for the others.
  void (*score)(const Problem&, int64_t begin, int64_t end);
  // Rows [begin, end) of out and of the gradients.
  void (*run)(const Problem&, int64_t begin, int64_t end);
};

struct SplitProblem;  // sharded/types.h

// The same for one part of the classes; null where an op needs whole rows.
struct SplitPass {
  void (*stats)(const SplitProblem&, int64_t begin, int64_t end);
  void (*run)(const SplitProblem&, int64_t begin, int64_t end);
};

struct OpOnCpu {
  RowPass rows;
  SplitPass parts;
};

OpOnCpu op_on_cpu(Loss loss);  // of the level in use

}  // namespace kdfuse
