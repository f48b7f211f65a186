// Memory of a step's tensors, kept from step to step.
//
// The C library gives large blocks back, joins them and cuts them up again, which takes a seventh
// of a small network's step. Here a freed block waits for the next tensor of its size.

#pragma once

#include <c10/core/CPUAllocator.h>

#include <mutex>
#include <unordered_map>
#include <utility>
#include <vector>

namespace fedkn::step {

// PyTorch's allocator for the CPU, and in its place while a step is taken, in its thread alone.
class Memory final : public c10::Allocator {
 public:
  // Lets this thread's tensors have kept blocks.
  class InUse {
   public:
    InUse() : before_(used()) { used() = &instance(); }
    ~InUse() { used() = before_; }
    InUse(const InUse&) = delete;
    InUse& operator=(const InUse&) = delete;

   private:
    Memory* before_;
  };

  c10::DataPtr allocate(size_t size) override {
    if (!used() || size < kLeast) return base_->allocate(size);
    void* data = waiting(size);
    if (!data) {
      data = base_->raw_allocate(size);
      const std::lock_guard<std::mutex> lock(mutex_);
      sizes_[data] = size;
    }
    return {data, data, &release, c10::Device(c10::DeviceType::CPU)};
  }

  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t size) const override {
    base_->copy_data(to, from, size);
  }

 private:
  static constexpr size_t kLeast = 1 << 10;  // smaller ones the C library keeps itself
  static constexpr size_t kMost = 64 << 20;  // bytes that wait

  Memory() : base_(c10::GetCPUAllocator()) { c10::SetCPUAllocator(this); }

  // Never destroyed: tensors may outlive everything.
  static Memory& instance() {
    static Memory* memory = new Memory();
    return *memory;
  }

  static Memory*& used() {
    thread_local Memory* memory = nullptr;
    return memory;
  }

  // A kept block of this size; none: nullptr.
  void* waiting(size_t size) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = waiting_.find(size);
    if (found == waiting_.end() || found->second.empty()) return nullptr;
    void* data = found->second.back();
    found->second.pop_back();
    held_ -= size;
    return data;
  }

  // Of a block from here or, where PyTorch frees without saying whose it is, from anywhere.
  static void release(void* data) {
    Memory& memory = instance();
    if (data && !memory.keep(data)) memory.base_->raw_deallocate(data);
  }

  // Keeps the block for the next that asks for its size, if it is from here and there is room.
  bool keep(void* data) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = sizes_.find(data);
    if (found == sizes_.end()) return false;
    const size_t size = found->second;
    if (held_ + size > kMost) {
      sizes_.erase(found);
      return false;
    }
    waiting_[size].push_back(data);
    held_ += size;
    return true;
  }

  c10::Allocator* base_;
  std::mutex mutex_;
  std::unordered_map<void*, size_t> sizes_;  // of all blocks from here
  std::unordered_map<size_t, std::vector<void*>> waiting_;
  size_t held_ = 0;
};

}  // namespace fedkn::step
