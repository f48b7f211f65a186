// The 3x3 convolution of an image with few channels, forward and its filters' gradients.
//
// A network's first layer: its input has one to four channels, channels last, too few to fill the
// vectors of PyTorch's kernels, which take two to four times as long. Vectors run over the filters.

#pragma once

#include "vectors.h"

namespace fedkn::first_convolution {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct Shape {
  int64_t samples, channels, height, width, filters;

  Shape(const Tensor& x, int64_t filters_)
      : samples(x.size(0)),
        channels(x.size(1)),
        height(x.size(2)),
        width(x.size(3)),
        filters(filters_) {}
  int64_t size() const { return height * width * channels; }
  int64_t line() const { return (width + 2) * channels; }  // of the padded sample
  int64_t padded() const { return (height + 2) * line(); }
};

// The sample in a frame of zeros, so that no window needs a question.
void pad(const Shape& s, const float* x, float* out) {
  std::fill(out, out + s.padded(), 0.0f);
  for (int64_t r = 0; r < s.height; ++r) {
    std::copy_n(x + r * s.width * s.channels, s.width * s.channels,
                out + (r + 1) * s.line() + s.channels);
  }
}

constexpr int64_t kPixels = 4;  // at once, so that a filter's number is loaded once for all

// Filters [from, from + lanes) of `n` <= kPixels pixels; `w` is (9 * channels, filters).
template <int64_t lanes, int64_t channels, int64_t n>
INLINE void convolve_pixels(const Shape& s, const float* x, const float* w, float* y) {
  using V = typename Vector<lanes>::Type;
  V sums[n] = {};
  for (int64_t row = 0; row < 3; ++row) {
    const float* line = x + row * s.line();
#pragma GCC unroll 12
    for (int64_t k = 0; k < 3 * channels; ++k, w += s.filters) {
      const V weight = load<V>(w);
#pragma GCC unroll 4
      for (int64_t p = 0; p < n; ++p) sums[p] += line[p * channels + k] * weight;
    }
  }
#pragma GCC unroll 4
  for (int64_t p = 0; p < n; ++p) store(y + p * s.filters, sums[p]);
}

template <int64_t lanes, int64_t channels>
INLINE void convolve_sample(const Shape& s, const float* x, const float* w, float* y) {
  for (int64_t r = 0; r < s.height; ++r) {
    for (int64_t from = 0; from < s.filters; from += lanes) {
      const float* in = x + r * s.line();
      float* out = y + r * s.width * s.filters + from;
      int64_t c = 0;
      for (; c + kPixels <= s.width; c += kPixels) {
        convolve_pixels<lanes, channels, kPixels>(s, in + c * channels, w + from,
                                                  out + c * s.filters);
      }
      for (; c < s.width; ++c) {
        convolve_pixels<lanes, channels, 1>(s, in + c * channels, w + from, out + c * s.filters);
      }
    }
  }
}

// dw, (9 * channels, filters), += the sample's part. One row of the map at a time in registers.
template <int64_t lanes, int64_t channels>
INLINE void add_gradient(const Shape& s, const float* x, const float* g, float* dw) {
  using V = typename Vector<lanes>::Type;
  for (int64_t from = 0; from < s.filters; from += lanes) {
    for (int64_t r = 0; r < s.height; ++r) {
      const float* upstream = g + r * s.width * s.filters + from;
      for (int64_t row = 0; row < 3; ++row) {
        const float* line = x + (r + row) * s.line();
        V sums[3 * channels] = {};
        for (int64_t c = 0; c < s.width; ++c, line += channels) {
          const V h = load<V>(upstream + c * s.filters);
#pragma GCC unroll 12
          for (int64_t k = 0; k < 3 * channels; ++k) sums[k] += line[k] * h;
        }
        float* own = dw + row * 3 * channels * s.filters + from;
#pragma GCC unroll 12
        for (int64_t k = 0; k < 3 * channels; ++k) {
          store(own + k * s.filters, load<V>(own + k * s.filters) + sums[k]);
        }
      }
    }
  }
}

// Calls f(level, channels) with both as constants, for the widest vectors that the filters fill.
template <class F>
void with_constants(const Shape& s, F f) {
  static const int64_t widest = processors_lanes();
  const int64_t lanes = s.filters % Wide::lanes ? std::min(widest, Narrow::lanes) : widest;
  run(lanes, [&](auto level) INLINED {
    if (s.channels == 1) f(level, std::integral_constant<int64_t, 1>());
    if (s.channels == 2) f(level, std::integral_constant<int64_t, 2>());
    if (s.channels == 3) f(level, std::integral_constant<int64_t, 3>());
    if (s.channels == 4) f(level, std::integral_constant<int64_t, 4>());
  });
}

void convolve(const Shape& s, const float* x, const float* w, float* y) {
  with_constants(s, [&](auto level, auto channels)
                        INLINED { convolve_sample<level.lanes, channels.value>(s, x, w, y); });
}

void gradient(const Shape& s, const float* x, const float* g, float* dw) {
  with_constants(s, [&](auto level, auto channels)
                        INLINED { add_gradient<level.lanes, channels.value>(s, x, g, dw); });
}

// (O, C, 3, 3) as (3, 3, C, O), which is (9 * C, O).
Tensor by_tap(const Tensor& weight) { return weight.permute({2, 3, 1, 0}).contiguous(); }

// Calls f(n, the sample n in its frame) for all samples.
template <class F>
void each_padded(const Shape& s, const Tensor& x, F f) {
  const float* xs = x.const_data_ptr<float>();
  at::parallel_for(0, s.samples, 1, [&](int64_t from, int64_t until) {
    const Buffer<float> padded(s.padded());
    for (int64_t n = from; n < until; ++n) {
      pad(s, xs + n * s.size(), padded.get());
      f(n, padded.get());
    }
  });
}

Tensor first_convolution_forward(const Tensor& x, const Tensor& weight) {
  const Shape s(x, weight.size(0));
  Tensor y = at::empty({s.samples, s.filters, s.height, s.width}, x.options(),
                       at::MemoryFormat::ChannelsLast);
  const Tensor taps = by_tap(weight);
  const float* w = taps.const_data_ptr<float>();
  float* ys = y.data_ptr<float>();
  each_padded(s, x, [&](int64_t n, const float* padded) {
    convolve(s, padded, w, ys + n * s.height * s.width * s.filters);
  });
  return y;
}

// The gradient of the weight.
Tensor first_convolution_backward(const Tensor& upstream, const Tensor& x, const Tensor& weight) {
  const Shape s(x, weight.size(0));
  const Tensor g = upstream.contiguous(at::MemoryFormat::ChannelsLast);
  // A sum for each sample, added up in their order: the same bits on any number of threads.
  Tensor parts = at::zeros({s.samples, 3, 3, s.channels, s.filters}, x.options());
  const float* gs = g.const_data_ptr<float>();
  float* dws = parts.data_ptr<float>();
  each_padded(s, x, [&](int64_t n, const float* padded) {
    gradient(s, padded, gs + n * s.height * s.width * s.filters,
             dws + n * 9 * s.channels * s.filters);
  });
  return parts.sum(0).permute({3, 2, 0, 1});
}

struct Function : torch::autograd::Function<Function> {
  static Tensor forward(AutogradContext* context, const Tensor& x, const Tensor& weight) {
    at::AutoDispatchBelowADInplaceOrView guard;
    static const auto op = typed<decltype(first_convolution_forward)>("first_convolution_forward");
    context->save_for_backward({x, weight});
    return op.call(x, weight);
  }

  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    const variable_list saved = context->get_saved_variables();
    const Tensor &x = saved[0], &weight = saved[1];
    const bool want_x = context->needs_input_grad(0);
    if (want_x || at::GradMode::is_enabled()) {  // rare: images have no gradients
      auto [dx, dw, _] =
          at::convolution_backward(gradients[0], x, weight, c10::nullopt, {1, 1}, {1, 1}, {1, 1},
                                   false, {0, 0}, 1, {want_x, context->needs_input_grad(1), false});
      return {dx, dw};
    }
    at::AutoDispatchBelowADInplaceOrView guard;
    static const auto op =
        typed<decltype(first_convolution_backward)>("first_convolution_backward");
    return {Tensor(), op.call(gradients[0], x, weight)};
  }
};

Tensor apply(const Tensor& x, const Tensor& weight) { return Function::apply(x, weight); }

}  // namespace fedkn::first_convolution
