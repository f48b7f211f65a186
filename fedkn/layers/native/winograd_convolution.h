// The 3x3 convolution by winograd.h, forward and backward, for tensors and autograd.

#pragma once

#include <new>

#include "winograd.h"
#include "winograd_filters.h"

namespace fedkn::winograd {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// One thread's room for numbers, kept between calls and aligned to the vectors: a convolution of
// small maps takes less time than the kernel needs to hand out its pages anew.
class Kept {
 public:
  float* get(int64_t size) {
    if (size > size_) {
      numbers_.reset(static_cast<float*>(::operator new(sizeof(float) * size, kAlignment)));
      size_ = size;
    }
    return numbers_.get();
  }

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Free {
    void operator()(float* numbers) const { ::operator delete(numbers, kAlignment); }
  };
  std::unique_ptr<float, Free> numbers_;
  int64_t size_ = 0;
};

Room room_for(const Shape& s) {
  thread_local Kept kept;
  const int64_t most = std::max(s.channels, s.filters), each = kPlaces * place_stride(kTiles, most);
  float* numbers = kept.get(2 * each + most);
  std::fill_n(numbers + 2 * each, most, 0.0f);
  return {numbers, numbers + each, numbers + 2 * each};
}

float* room_for_filters(int64_t size) {
  thread_local Kept kept;
  return kept.get(size);
}

// Transformed filters are 16/9 of the weights, and kept in the cache and by threads.
constexpr int64_t kMostChannels = 128;
// With fewer, transforming the filters takes longer than the convolution.
constexpr int64_t kLeastTiles = 8;

// The numbers of a vector by which maps of `size` (N, C, H, W) are convolved; 0: not by this.
int64_t winograd_lanes(IntArrayRef size, int64_t filters) {
  static const int64_t lanes = processors_lanes();
  const Shape s{size[0], size[1], filters, size[2], size[3]};
  const auto few = [](int64_t n) { return n % 8 == 0 && n > 0 && n <= kMostChannels; };
  return few(s.channels) && few(filters) && s.tiles() >= kLeastTiles ? lanes : 0;
}

constexpr auto kLast = at::MemoryFormat::ChannelsLast;

Shape shape_of(const Tensor& x, const Tensor& weight) {
  return {x.size(0), x.size(1), weight.size(0), x.size(2), x.size(3)};
}

// Calls f(from, until, room) for parts of all tiles, on all threads.
template <class F>
void each_part(const Shape& s, int64_t parts, F f) {
  const int64_t blocks = (s.tiles() + kTiles - 1) / kTiles;
  const int64_t each = (blocks + parts - 1) / parts * kTiles;
  at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    const Room room = room_for(s);
    for (int64_t part = begin; part < end; ++part) {
      f(part, std::min(part * each, s.tiles()), std::min((part + 1) * each, s.tiles()), room);
    }
  });
}

Tensor convolve_by(int64_t lanes, const Shape& s, const Tensor& x, const float* filters) {
  Tensor y = at::empty({s.samples, s.filters, s.height, s.width}, x.options(), kLast);
  const float* xs = x.const_data_ptr<float>();
  float* ys = y.data_ptr<float>();
  const int64_t blocks = (s.tiles() + kTiles - 1) / kTiles;
  each_part(s, blocks, [&](int64_t, int64_t from, int64_t until, const Room& room) {
    run(lanes, [&](auto level)
                   INLINED { convolve<decltype(level)>(s, xs, filters, ys, from, until, room); });
  });
  return y;
}

Tensor winograd_forward(const Tensor& x, const Tensor& weight, int64_t lanes) {
  const Shape s = shape_of(x, weight);
  const Tensor w = weight.contiguous(kLast);
  const float* ws = w.const_data_ptr<float>();
  const int64_t size = kPlaces * place_stride(s.channels, s.filters);
  float* filters = room_for_filters(size + 9 * s.filters);
  run(lanes, [&](auto level)
                 INLINED { transform_filters<decltype(level)>(s, ws, filters + size, filters); });
  return convolve_by(lanes, s, x, filters);
}

Tensor input_gradient(int64_t lanes, const Shape& s, const Tensor& g, const Tensor& weight) {
  const Tensor w = weight.contiguous(kLast);
  const float* ws = w.const_data_ptr<float>();
  float* filters = room_for_filters(kPlaces * place_stride(s.filters, s.channels));
  run(lanes, [&](auto level) INLINED { transform_turned<decltype(level)>(s, ws, filters); });
  return convolve_by(lanes, {s.samples, s.filters, s.channels, s.height, s.width}, g, filters);
}

Tensor weight_gradient(int64_t lanes, const Shape& s, const Tensor& g, const Tensor& x) {
  // A sum for each part, added up in their order: the same bits on any number of threads.
  const int64_t parts = std::clamp<int64_t>(s.tiles() / (16 * kTiles), 1, 16);
  const int64_t size = kPlaces * place_stride(s.filters, s.channels);
  float* sums = room_for_filters(parts * size);
  const float *xs = x.const_data_ptr<float>(), *gs = g.const_data_ptr<float>();
  each_part(s, parts, [&](int64_t part, int64_t from, int64_t until, const Room& room) {
    float* own = sums + part * size;
    std::fill_n(own, size, 0.0f);
    run(lanes, [&](auto level)
                   INLINED { add_gradient<decltype(level)>(s, xs, gs, own, from, until, room); });
  });
  Tensor dw = at::empty({s.filters, s.channels, 3, 3}, x.options(), kLast);
  float* dws = dw.data_ptr<float>();
  run(lanes,
      [&](auto level) INLINED { transform_filters_back<decltype(level)>(s, sums, parts, dws); });
  return dw;
}

// The gradients of x and of the weight, undefined where not wanted.
std::tuple<Tensor, Tensor> winograd_backward(const Tensor& upstream, const Tensor& x,
                                             const Tensor& weight, int64_t lanes,
                                             std::array<bool, 2> wanted) {
  const Shape s = shape_of(x, weight);
  const Tensor g = upstream.contiguous(kLast);
  return {wanted[0] ? input_gradient(lanes, s, g, weight) : Tensor(),
          wanted[1] ? weight_gradient(lanes, s, g, x) : Tensor()};
}

struct Function : torch::autograd::Function<Function> {
  static Tensor forward(AutogradContext* context, const Tensor& x, const Tensor& weight,
                        int64_t lanes) {
    at::AutoDispatchBelowADInplaceOrView guard;
    static const auto op = typed<decltype(winograd_forward)>("winograd_forward");
    context->save_for_backward({x, weight});
    context->saved_data["lanes"] = lanes;
    return op.call(x, weight, lanes);
  }

  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    const variable_list saved = context->get_saved_variables();
    const Tensor &g = gradients[0], &x = saved[0], &weight = saved[1];
    const std::array<bool, 2> wanted{context->needs_input_grad(0), context->needs_input_grad(1)};
    if (at::GradMode::is_enabled()) {  // rare: who differentiates a gradient
      auto [dx, dw, _] =
          at::convolution_backward(g, x, weight, c10::nullopt, {1, 1}, {1, 1}, {1, 1}, false,
                                   {0, 0}, 1, {wanted[0], wanted[1], false});
      return {dx, dw, Tensor()};
    }
    at::AutoDispatchBelowADInplaceOrView guard;
    static const auto op = typed<decltype(winograd_backward)>("winograd_backward");
    auto [dx, dw] = op.call(g, x, weight, context->saved_data["lanes"].toInt(), wanted);
    return {dx, dw, Tensor()};
  }
};

Tensor apply(const Tensor& x, const Tensor& weight, int64_t lanes) {
  return Function::apply(x, weight, lanes);
}

}  // namespace fedkn::winograd
