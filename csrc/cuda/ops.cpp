// The ops on CUDA tensors: checks, allocation and one launch of the kernels on torch's current stream.
//
// Only torch's stable ABI is used. Nothing waits for the device: what depends on the values of tensors
// (the range of labels, the denominator, the number of valid rows) is found there.
#define USE_CUDA  // for the declaration of torch's current CUDA stream
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "../core/op_registration.h"
#include "../core/op_top_k.h"
#include "../core/said.h"
#include "../losses/op_facts.h"
#include "launch.h"

namespace kdfuse {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Result = std::tuple<Tensor, Tensor, std::vector<Tensor>>;

Numbers numbers(const std::optional<Tensor>& x, int64_t rows, const char* name) {
  if (!x) return {nullptr, DType::f64, 0};
  if (x->dim() > 1 || (x->numel() != 1 && x->numel() != rows)) {
    refuse(std::string(name) + " must have 1 or N numbers in at most one dimension");
  }
  const DType type = type_of(*x);
  if (type != DType::f32 && type != DType::f64) refuse(std::string(name) + " must be float32 or float64");
  return {x->data_ptr(), type, x->numel() == 1 ? 0 : x->stride(0)};
}

void check_device(const Tensor& x, int device, const char* name) {
  if (!x.is_cuda() || x.get_device_index() != device) {
    refuse(std::string(name) + " must be on the student's device, cuda:" + std::to_string(device));
  }
}

void set_target(Task& p, const Tensor& target) {
  if (target.dim() == 2) {
    p.soft = matrix(target, p.rows, p.classes, "target");
    return;
  }
  if (target.scalar_type() != ScalarType::Long || target.dim() != 1 || target.size(0) != p.rows) {
    refuse("target must be int64 class indices of shape (" + std::to_string(p.rows) + ",) or class probabilities");
  }
  p.labels = static_cast<const int64_t*>(target.data_ptr());
  p.label_stride = target.stride(0);
}

void set_terms(Task& p, const OpFacts& facts) {
  p.num_terms = facts.terms(p.num_students);
  for (int k = 0; k < p.num_terms; ++k) {
    if (facts.counts(k)) p.counts[k / 64] |= uint64_t{1} << (k % 64);
  }
}

template <Loss loss>
Result run(std::vector<Tensor> students, std::vector<Tensor> teachers, std::vector<Tensor> indices,
           std::vector<Tensor> masses, std::optional<Tensor> target, std::optional<Tensor> denominator,
           std::optional<double> divisor, std::optional<Tensor> upstream, std::vector<double> params, int64_t reduction,
           int64_t ignore_index, bool with_gradient) {
  const OpFacts facts = facts_of(loss);
  check_call(facts, students, teachers, target.has_value(), params);
  if (!facts.takes_top_k) refuse_sparse(indices, masses);
  const Tensor& student = students[0];
  const int device = student.get_device_index();
  const int64_t rows = student.size(0), classes = student.size(1);
  if (classes > std::numeric_limits<int>::max() / 16) refuse("too many classes: " + std::to_string(classes));
  for (const Tensor& x : students) check_device(x, device, "student and SL-Ts");
  for (const Tensor& x : teachers) check_device(x, device, "teacher");
  for (const Tensor& x : indices) {
    if (x.numel() > 0) check_device(x, device, "teacher.indices");
  }
  for (const Tensor& x : masses) {
    if (x.numel() > 0) check_device(x, device, "teacher.mass");
  }
  if (target) check_device(*target, device, "target");
  if (denominator) check_device(*denominator, device, "denominator");
  if (upstream) check_device(*upstream, device, "upstream");
  const torch::stable::accelerator::DeviceGuard guard(device);

  Task p = {};
  p.rows = rows;
  p.classes = static_cast<int>(classes);
  p.num_students = static_cast<int>(students.size());
  p.num_teachers = static_cast<int>(teachers.size());
  const auto student_rows = matrices(students, rows, classes, "student and SL-Ts");
  const auto top_k = top_k_of(teachers, indices, masses, rows, classes);
  if (!top_k.empty() && top_k.size() > kMaxTopK) {
    refuse("at most " + std::to_string(kMaxTopK) +
           " teachers on a GPU where some are top-k ones; pass the others whole");
  }
  p.sparse = !top_k.empty();
  std::copy(top_k.begin(), top_k.end(), p.top_k);
  const auto teacher_rows = teacher_matrices(teachers, top_k, rows, classes);
  std::copy(student_rows.begin(), student_rows.end(), p.logits);
  std::copy(teacher_rows.begin(), teacher_rows.end(), p.logits + students.size());
  bool wide = false;
  for (int k = 0; k < p.num_students + p.num_teachers; ++k) wide |= p.logits[k].type == DType::f64;
  if (target) set_target(p, *target);
  if (!wide && p.soft.data && p.soft.type == DType::f64) refuse("target in float64 needs logits in float64");
  p.ignore_index = ignore_index;
  std::copy(params.begin(), params.end(), p.params);
  p.mean = reduction == kMean;
  p.denominator = numbers(denominator, 1, "denominator");
  p.divisor = divisor.value_or(0);
  if (p.mean && divisor && !(*divisor > 0)) refuse("denominator must be positive, got " + std::to_string(*divisor));
  p.upstream = numbers(upstream, rows, "upstream");
  set_terms(p, facts);

  std::vector<Tensor> gradients;
  p.with_gradient = with_gradient;
  for (size_t k = 0; with_gradient && k < students.size(); ++k) {
    // float16 would lose what lies below 6e-8 before a loss scaler could lift it.
    const auto type = student_rows[k].type == DType::f16 ? ScalarType::Float : students[k].scalar_type();
    gradients.push_back(torch::stable::new_empty(student, {rows, classes}, type));
    p.gradients[k] = {gradients.back().data_ptr(), type_of(gradients.back())};
  }
  const auto real = wide ? ScalarType::Double : ScalarType::Float;
  const std::vector<int64_t> shape(reduction == kNone ? 1 : 0, rows);
  Tensor value = torch::stable::new_empty(student, shape, real);
  Tensor terms = torch::stable::new_empty(student, {p.num_terms + 1}, real);
  p.loss = value.data_ptr();
  p.terms = terms.data_ptr();
  p.type = wide ? DType::f64 : DType::f32;
  p.each_row = reduction == kNone;

  Tensor scratch = torch::stable::new_empty(student, {scratch_numbers(p, facts.scored)}, ScalarType::Double);
  set_scratch(p, static_cast<double*>(scratch.data_ptr()));

  void* stream = nullptr;
  if (aoti_torch_get_current_cuda_stream(device, &stream)) refuse("torch has no current CUDA stream");
  const std::string failed = launch(loss, p, wide, device, stream);
  if (!failed.empty()) throw std::runtime_error("kdfuse: " + failed);
  return {value, terms, gradients};
}

// Gradients (N, C) times a number, or one for each row: into `halves`, one for each, or in place where there are none.
void multiply(const std::vector<Tensor>& gradients, const std::vector<Tensor>& halves, const Tensor& factor) {
  if (gradients.empty()) return;
  const Tensor& first = gradients[0];
  const int device = first.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  check_device(factor, device, "factor");
  std::vector<Output> outputs;
  std::vector<void*> into;
  for (const Tensor& g : gradients) {
    check_device(g, device, "gradients");
    if (g.dim() != 2 || g.size(0) != first.size(0) || g.size(1) != first.size(1) || !g.is_contiguous()) {
      refuse("gradients must be contiguous and of one shape (N, C)");
    }
    if (g.scalar_type() == ScalarType::Half) refuse("gradients must be float32, bfloat16 or float64");
    outputs.push_back({g.data_ptr(), type_of(g)});
  }
  for (const Tensor& half : halves) into.push_back(half.data_ptr());
  void* stream = nullptr;
  if (aoti_torch_get_current_cuda_stream(device, &stream)) refuse("torch has no current CUDA stream");
  const std::string failed =
      launch_scale(outputs.data(), into.empty() ? nullptr : into.data(), static_cast<int>(outputs.size()),
                   first.size(0), first.size(1), numbers(factor, first.size(0), "factor"), device, stream);
  if (!failed.empty()) throw std::runtime_error("kdfuse: " + failed);
}

// Of gradients that nobody else has seen.
void scale(std::vector<Tensor> gradients, Tensor factor) { multiply(gradients, {}, factor); }

std::vector<Tensor> scale_to_half(std::vector<Tensor> gradients, Tensor factor) {
  std::vector<Tensor> halves;
  for (const Tensor& g : gradients) {
    if (g.dim() != 2 || g.scalar_type() != ScalarType::Float) refuse("gradients must be (N, C) and float32");
    halves.push_back(torch::stable::new_empty(g, {g.size(0), g.size(1)}, ScalarType::Half));
  }
  multiply(gradients, halves, factor);
  return halves;
}

bool registered(const char* name) {
  Registration cuda(name, "CUDA");
  cuda.impl("scale_", TORCH_BOX(&scale));
  cuda.impl("scale_to_half", TORCH_BOX(&scale_to_half));
#define KDFUSE_OTHER(name) cuda.impl(#name, TORCH_BOX(&run<Loss::name>));
#include "../losses/all.def"
  return cuda.ok();
}

}  // namespace
}  // namespace kdfuse

// What the library says of itself to kernels/library.py, by ctypes: it has no symbol of Python.
extern "C" {

// Makes the ops run on CUDA tensors, in the namespace that libkdfuse.so has. 0 where torch refuses.
KDFUSE_SAID int kdfuse_register(const char* name) { return kdfuse::registered(name); }

// That the kernels were built for, as in "sm_90 compute_90".
KDFUSE_SAID const char* kdfuse_cuda_archs() { return KDFUSE_CUDA_ARCHS; }

// The CUDA that they were built with, as 13000.
KDFUSE_SAID int kdfuse_cuda_runtime() { return KDFUSE_CUDA_RUNTIME; }

// The newest CUDA that the driver supports, as 13000; 0 without one.
KDFUSE_SAID int kdfuse_cuda_driver() { return kdfuse::driver_version(); }
}
