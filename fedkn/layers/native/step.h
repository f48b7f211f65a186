// A local step's operations, recorded once and replayed: no Python and no autograd between them.
//
// fedkn.training.operations writes one down. Its tensors are numbered: first those that are always
// there, then the inputs of a step, then what the operations make, which is freed after its last
// use. The operations are PyTorch's and those of operators.cpp, in the order in which they were
// recorded, with the same arguments: so are the bits.

#pragma once

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/ScalarOps.h>
#include <torch/custom_class.h>

#include <mutex>
#include <numeric>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "common.h"

namespace fedkn::step {

using c10::IValue;

// How an argument is written down: a kind, then its value. A list is followed by its elements.
enum Kind : int64_t { kNone, kTensor, kInt, kFloat, kBool, kWord, kKey, kRate, kList };

// What changes from step to step.
struct Given {
  const int64_t* keys;
  const int64_t* seeds;
  double rate;
};

struct Argument {
  Kind kind;
  IValue value;       // where nothing in it changes
  int64_t place;      // of the tensor or key; of a rate, its sign
  bool last;          // whether the tensor is not needed any more
  c10::TypePtr type;  // of a list, its elements'
  std::vector<Argument> elements;
};

struct Operation {
  std::optional<c10::OperatorHandle> op;  // none: PyTorch's generator is seeded
  int64_t seed;
  std::vector<Argument> arguments;
  std::vector<std::vector<int64_t>> results;  // of each return, its tensor or tensors; -1: unused
  std::vector<int64_t> unused;                // tensors to be freed after it
};

class Step : public torch::CustomClassHolder {
 public:
  // The tensors that are always there; how many more there are, the inputs first.
  Step(std::vector<Tensor> kept, int64_t others)
      : kept_(static_cast<int64_t>(kept.size())), tensors_(std::move(kept)) {
    tensors_.resize(tensors_.size() + others);
  }

  // Adds the operation `name`, `overload`: its arguments by kind and value, and where its results
  // go. `floats` and `words` are what the arguments refer to by number.
  void add(const std::string& name, const std::string& overload, std::vector<int64_t> arguments,
           std::vector<double> floats, std::vector<std::string> words,
           std::vector<std::vector<int64_t>> results) {
    Operation operation{
        c10::Dispatcher::singleton().findSchemaOrThrow(name.c_str(), overload.c_str()),
        0,
        {},
        std::move(results),
        {}};
    const auto& formal = operation.op->schema().arguments();
    size_t at = 0;
    for (const auto& argument : formal) {
      operation.arguments.push_back(read(arguments, at, floats, words, argument.real_type()));
    }
    TORCH_CHECK(at == arguments.size(), name, " was written down with other arguments");
    operations_.push_back(std::move(operation));
    ready_ = false;
  }

  // Adds: PyTorch's generator is seeded with the given seed `number`.
  void seed(int64_t number) {
    operations_.push_back({std::nullopt, number, {}, {}, {}});
    ready_ = false;
  }

  // Takes steps, each on as many examples as `sizes` say of its batches, one step after another
  // from the beginning of `x` and `targets` to their end; with the keys of dropout and the seeds
  // of all these steps, and their learning rate.
  void take(const Tensor& x, const Tensor& targets, std::vector<int64_t> sizes,
            std::vector<int64_t> keys, std::vector<int64_t> seeds, double rate) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    if (!ready_) free_after_last_use();
    const int64_t examples = std::accumulate(sizes.begin(), sizes.end(), int64_t{0});
    const int64_t steps = x.size(0) / examples;
    const int64_t keys_each = keys.size() / steps, seeds_each = seeds.size() / steps;
    Given given{keys.data(), seeds.data(), rate};
    int64_t row = 0;
    try {
      for (int64_t step = 0; step < steps; ++step) {
        int64_t place = kept_;
        for (const int64_t size : sizes) {
          tensors_[place++] = x.narrow(0, row, size);
          tensors_[place++] = targets.narrow(0, row, size);
          row += size;
        }
        for (const Operation& operation : operations_) run(operation, given);
        given.keys += keys_each;
        given.seeds += seeds_each;
      }
    } catch (...) {
      for (size_t i = kept_; i < tensors_.size(); ++i) tensors_[i].reset();
      throw;
    }
  }

 private:
  static Argument read(const std::vector<int64_t>& from, size_t& at,
                       const std::vector<double>& floats, const std::vector<std::string>& words,
                       c10::TypePtr type) {
    while (type->kind() == c10::TypeKind::OptionalType) {
      type = type->expectRef<c10::OptionalType>().getElementType();
    }
    const Kind kind = static_cast<Kind>(from.at(at));
    const int64_t value = from.at(at + 1);
    at += 2;
    Argument read_{kind, {}, value, false, nullptr, {}};
    const bool real = type->kind() == c10::TypeKind::FloatType;
    switch (kind) {
      case kNone:
      case kTensor:
      case kKey:
        break;
      case kRate:
        read_.type = type;
        break;
      case kInt:
        read_.value = real ? IValue(static_cast<double>(value)) : IValue(value);
        break;
      case kFloat:
        read_.value = floats.at(value);
        break;
      case kBool:
        read_.value = value != 0;
        break;
      case kWord:
        if (type->kind() == c10::TypeKind::DeviceObjType) {
          read_.value = c10::Device(words.at(value));
        } else {
          read_.value = words.at(value);
        }
        break;
      case kList: {
        TORCH_CHECK(type->kind() == c10::TypeKind::ListType, "a list where there is none");
        const auto inner = type->expectRef<c10::ListType>().getElementType();
        read_.type = inner;
        bool constant = true;
        for (int64_t i = 0; i < value; ++i) {
          read_.elements.push_back(read(from, at, floats, words, inner));
          const Kind own = read_.elements.back().kind;
          constant = constant && own != kTensor && own != kKey && own != kRate;
        }
        const bool tensors = inner->kind() == c10::TypeKind::TensorType ||
                             inner->kind() == c10::TypeKind::OptionalType;
        if (constant && !tensors) {
          read_.value = list(read_, [](const Argument& element) { return element.value; });
          read_.kind = kInt;  // any that is `value` as it is
          read_.elements.clear();
        }
        break;
      }
    }
    if (read_.value.isScalar()) read_.value = number(read_.value.toScalar(), *type);
    return read_;
  }

  // A number as an operator takes it: one that stands for a tensor as such.
  static IValue number(const at::Scalar& value, const c10::Type& type) {
    if (type.kind() != c10::TypeKind::TensorType) return value;
    return at::native::wrapped_scalar_tensor(value);
  }

  // A list of the type that operators take apart: of ints, floats and booleans their own.
  template <class Of>
  static IValue list(const Argument& argument, Of of) {
    const auto collect = [&](auto values) {
      for (const Argument& element : argument.elements) {
        values.push_back(of(element).template to<typename decltype(values)::value_type>());
      }
      return IValue(std::move(values));
    };
    switch (argument.type->kind()) {
      case c10::TypeKind::IntType:
      case c10::TypeKind::SymIntType:
        return collect(c10::List<int64_t>());
      case c10::TypeKind::FloatType:
        return collect(c10::List<double>());
      case c10::TypeKind::BoolType:
        return collect(c10::List<bool>());
      case c10::TypeKind::TensorType:
        return collect(c10::List<Tensor>());
      case c10::TypeKind::OptionalType:
        return collect(c10::List<std::optional<Tensor>>());
      default: {
        c10::impl::GenericList values(argument.type);
        for (const Argument& element : argument.elements) values.push_back(of(element));
        return values;
      }
    }
  }

  IValue value_of(const Argument& argument, const Given& given) {
    switch (argument.kind) {
      case kTensor:
        return argument.last ? IValue(std::move(tensors_[argument.place]))
                             : IValue(tensors_[argument.place]);
      case kKey:
        return given.keys[argument.place];
      case kRate:
        return number(argument.place < 0 ? -given.rate : given.rate, *argument.type);
      case kList:
        return list(argument, [&](const Argument& element) { return value_of(element, given); });
      default:
        return argument.value;
    }
  }

  void run(const Operation& operation, const Given& given) {
    if (!operation.op) {
      at::Generator generator = at::detail::getDefaultCPUGenerator();
      const std::lock_guard<std::mutex> lock(generator.mutex());
      at::check_generator<at::CPUGeneratorImpl>(generator)->set_current_seed(
          static_cast<uint64_t>(given.seeds[operation.seed]));
      return;
    }
    stack_.clear();
    for (const Argument& argument : operation.arguments) {
      stack_.push_back(value_of(argument, given));
    }
    operation.op->callBoxed(&stack_);
    for (size_t i = 0; i < operation.results.size(); ++i) {
      const std::vector<int64_t>& places = operation.results[i];
      IValue& result = stack_.at(i);
      if (places.empty()) continue;  // a gradient that nobody wanted
      if (result.isTensor()) {
        if (places[0] >= 0) tensors_[places[0]] = std::move(result).toTensor();
      } else if (result.isTensorList()) {
        const auto found = result.toTensorList();
        for (size_t k = 0; k < places.size(); ++k) {
          if (places[k] >= 0) tensors_[places[k]] = found.get(k);
        }
      }
    }
    for (const int64_t place : operation.unused) tensors_[place].reset();
  }

  void free_after_last_use() {
    std::vector<bool> needed(tensors_.size());
    for (auto operation = operations_.rbegin(); operation != operations_.rend(); ++operation) {
      operation->unused.clear();
      for (const auto& places : operation->results) {
        for (const int64_t place : places) {
          if (place >= kept_ && !needed[place]) {
            operation->unused.push_back(place);
            needed[place] = true;
          }
        }
      }
      // From the last to the first, so that the last mention of a tensor is its last use.
      for (auto a = operation->arguments.rbegin(); a != operation->arguments.rend(); ++a) {
        mark(*a, needed);
      }
    }
    ready_ = true;
  }

  void mark(Argument& argument, std::vector<bool>& needed) const {
    for (auto e = argument.elements.rbegin(); e != argument.elements.rend(); ++e) mark(*e, needed);
    if (argument.kind != kTensor) return;
    argument.last = argument.place >= kept_ && !needed[argument.place];
    needed[argument.place] = true;
  }

  int64_t kept_;
  std::vector<Tensor> tensors_;
  std::vector<Operation> operations_;
  std::vector<IValue> stack_;
  bool ready_ = false;
};

}  // namespace fedkn::step
