// Ops of a namespace that is named when a library is loaded, so that one library serves kdfuse and any copy of it in
// the same process. By the C functions of torch's stable ABI: its C++ macros take a namespace that is compiled in.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>
#include <torch/csrc/stable/library.h>

namespace kdfuse {

class Registration {
 public:
  using Boxed = void (*)(StableIValue*, uint64_t, uint64_t);

  // Of schemas, which a namespace has once.
  explicit Registration(const char* name) : ok_(!aoti_torch_library_init_def(name, "kdfuse", 0, &library_)) {}

  // Of what runs on tensors of a dispatch key, as "CPU".
  Registration(const char* name, const char* key)
      : ok_(!aoti_torch_library_init_impl(name, key, "kdfuse", 0, &library_)) {}

  void def(const char* schema) { ok_ = ok_ && !aoti_torch_library_def(library_, schema); }

  // TORCH_BOX makes one.
  void impl(const char* op, Boxed run) { ok_ = ok_ && !torch_library_impl(library_, op, run, TORCH_ABI_VERSION); }

  // Whether torch took all of it.
  bool ok() const { return ok_; }

 private:
  TorchLibraryHandle library_ = nullptr;  // never given back: torch would forget the ops
  bool ok_;
};

}  // namespace kdfuse
