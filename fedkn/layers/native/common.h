// What all the kernels are written with.

#pragma once

#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>

#include <cstdint>
#include <memory>
#include <string>

// One binary serves every x86 processor: the loader picks the widest version of each kernel. To
// ask for a level or a feature matters: "arch=haswell" matches Intel's processors alone.
#if !(defined(__x86_64__) && defined(__GNUC__) && defined(__linux__))
#define KERNEL
#elif __GNUC__ >= 12
#define KERNEL __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#elif defined(__clang__)  // compiles the above (16), but its loader never picks them
#define KERNEL __attribute__((target_clones("avx512bw", "avx2", "default")))
#else  // older gcc knows the levels not at all, and no features that go with avx512f
#define KERNEL __attribute__((target_clones("avx2", "default")))
#endif
#define INLINED __attribute__((always_inline))
#define INLINE inline INLINED

namespace fedkn {

using at::Tensor;
using c10::IntArrayRef;

// The operator of ours that is called so: through it who records operations sees its work.
template <class Signature>
auto typed(const char* name) {
  return c10::Dispatcher::singleton()
      .findSchemaOrThrow((std::string("fedkn_native::") + name).c_str(), "")
      .typed<Signature>();
}

// Room for `size` numbers, not zeroed.
template <class Number>
class Buffer {
 public:
  explicit Buffer(int64_t size) : numbers_(new Number[size]) {}
  Number* get() const { return numbers_.get(); }

 private:
  std::unique_ptr<Number[]> numbers_;
};

}  // namespace fedkn
