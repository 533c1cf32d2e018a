// Calls that were recorded (call.cpp), run again by a program of their own, as the compiler's sanitizers want it: each
// tensor is memory of its own, and what comes out has to be the same bits.
//
//     replay FILE     says what went wrong; leaves with the number of calls that did
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "record.h"
#include "simulator.h"

using namespace simulator;

namespace {

struct Tensor {
  uintptr_t was;
  std::string name;
  std::vector<char> expected;
  char* at;
};

template <class T>
T get(FILE* file) {
  T x;
  if (std::fread(&x, sizeof(x), 1, file) != 1) std::abort();
  return x;
}

std::vector<char> get_bytes(FILE* file) {
  std::vector<char> bytes(get<uint64_t>(file));
  if (!bytes.empty() && std::fread(bytes.data(), 1, bytes.size(), file) != bytes.size()) std::abort();
  return bytes;
}

std::string get_text(FILE* file) {
  const auto bytes = get_bytes(file);
  return {bytes.begin(), bytes.end()};
}

class Call {
 public:
  explicit Call(FILE* file) {
    device_ = get<Device>(file), seed_ = get<uint64_t>(file);
    asked_ = get<Asked>(file);
    const auto count = get<uint64_t>(file);
    for (uint64_t k = 0; k < count; ++k) {
      Tensor t;
      t.was = get<uintptr_t>(file), t.name = get_text(file), writable_.push_back(get<bool>(file));
      const auto bytes = get_bytes(file);
      t.expected = get_bytes(file);
      // Aligned as PyTorch's memory is, and not a byte longer than the tensor.
      if (posix_memalign(reinterpret_cast<void**>(&t.at), 64, bytes.size())) std::abort();
      std::memcpy(t.at, bytes.data(), bytes.size());
      tensors_.push_back(t);
    }
    logits_ = given(file), gradients_ = given(file), soft_ = given(file), denominator_ = given(file);
    upstream_ = given(file);
    listed_ = lists(file);
    params_ = numbers<double>(file), counts_ = numbers<uint64_t>(file);
  }

  ~Call() {
    for (const Tensor& t : tensors_) std::free(t.at);
  }

  // "" or what went wrong.
  std::string run() {
    Asked a = asked_;
    const auto first = [](auto& all) { return all.empty() ? nullptr : all.data(); };
    a.logits = first(logits_), a.gradients = first(gradients_), a.listed = first(listed_);
    a.soft = first(soft_), a.denominator = first(denominator_), a.upstream = first(upstream_);
    a.params = first(params_), a.counts = first(counts_);
    a.labels = static_cast<const int64_t*>(moved(a.labels));
    a.scratch = static_cast<double*>(moved(a.scratch));
    a.loss = moved(a.loss), a.terms = moved(a.terms);
    clear();
    use_device(static_cast<int>(a.device), device_, seed_);
    for (size_t k = 0; k < tensors_.size(); ++k) {
      add_memory(tensors_[k].at, tensors_[k].expected.size(), tensors_[k].name.c_str(), writable_[k], false);
    }
    const std::string said = ::run(a);
    if (!said.empty()) return said;
    if (*failed()) return failed();
    for (const Tensor& t : tensors_) {
      if (t.name != "scratch" && std::memcmp(t.at, t.expected.data(), t.expected.size())) return "another " + t.name;
    }
    return "";
  }

 private:
  void* moved(const void* was) const {
    const auto at = reinterpret_cast<uintptr_t>(was);
    for (const Tensor& t : tensors_) {
      if (was && at >= t.was && at <= t.was + t.expected.size()) return t.at + (at - t.was);
    }
    return nullptr;
  }

  std::vector<Given> given(FILE* file) const {
    auto all = numbers<Given>(file);
    for (Given& g : all) g.data = moved(g.data);
    return all;
  }

  std::vector<Listed> lists(FILE* file) const {
    auto all = numbers<Listed>(file);
    for (Listed& x : all) {
      x.classes = static_cast<const int64_t*>(moved(x.classes)), x.mass.data = moved(x.mass.data);
    }
    return all;
  }

  template <class T>
  static std::vector<T> numbers(FILE* file) {
    const auto bytes = get_bytes(file);
    std::vector<T> all(bytes.size() / sizeof(T));
    if (!all.empty()) std::memcpy(static_cast<void*>(all.data()), bytes.data(), bytes.size());
    return all;
  }

  Device device_;
  uint64_t seed_;
  Asked asked_;
  std::vector<Tensor> tensors_;
  std::vector<bool> writable_;
  std::vector<Given> logits_, gradients_, soft_, denominator_, upstream_;
  std::vector<Listed> listed_;
  std::vector<double> params_;
  std::vector<uint64_t> counts_;
};

}  // namespace

int main(int count, char** words) {
  if (count != 2) return 2;
  FILE* const file = std::fopen(words[1], "rb");
  if (!file) return 2;
  int number = 0, wrong = 0;
  for (int next; (next = std::fgetc(file)) != EOF; ++number) {
    std::ungetc(next, file);
    Call call(file);
    const std::string said = call.run();
    if (said.empty()) continue;
    std::printf("call %d: %s\n", number, said.c_str());
    ++wrong;
  }
  std::printf("%d calls, %d wrong\n", number, wrong);
  return wrong ? 1 : 0;
}
