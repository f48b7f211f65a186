"""The C++ sources as Python: what lies beside this module, for bundles of Python files alone.

Below the mark it is written by ``python -m fedkn.layers.native``: change the ``.h`` and
``.cpp`` files and run that.
"""

from __future__ import annotations

__all__ = ["HEADING", "sources"]

HEADING = "//// "
"""What the line with a file's name begins with."""


def sources() -> dict[str, str]:
    """Return the text of every source by its name, sorted."""
    parts = _TABLE.removeprefix("\n").split(HEADING)[1:]
    return {name: text for name, _, text in (part.partition("\n") for part in parts)}


_TABLE = """
//// common.h
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
//// first_convolution.h
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
//// group_norm.h
// GroupNorm and the ReLU after it, forward and backward, on maps laid out channels last.
//
// Two passes forward and two backward, sample by sample, so that the second finds its map in the
// cache. Pre-activations are computed again in the backward pass, which is cheaper than reading
// them.

#pragma once

#include <cstring>
#include <numeric>

#include "common.h"

namespace fedkn::group_norm {

constexpr int64_t kColumns = 32;  // at once in registers
constexpr int64_t kRows = 64;     // summed in float before they are added up in double

// A sample is a matrix: as many whole pixels to a row as make its width a multiple of kColumns.
// What is left of it, fewer pixels than a row has, goes number by number.
struct Shape {
  int64_t samples, channels, pixels, groups, width, rows;
  std::vector<int32_t> channel, group;  // of each column: divisions are dear

  Shape(const Tensor& x, int64_t groups_) {
    samples = x.size(0), channels = x.size(1), pixels = x.size(2) * x.size(3), groups = groups_;
    width = std::lcm(channels, kColumns);
    rows = pixels / (width / channels);
    for (int64_t i = 0; i < width; ++i) {
      channel.push_back(static_cast<int32_t>(i % channels));
      group.push_back(static_cast<int32_t>(i % channels / each()));
    }
  }
  int64_t size() const { return channels * pixels; }
  int64_t whole() const { return rows * width; }
  int64_t each() const { return channels / groups; }
};

// Per column: what the passes over the map need.
struct Columns {
  std::vector<float> mean, scale, shift, offset, slope;

  explicit Columns(int64_t width)
      : mean(width), scale(width), shift(width), offset(width), slope(width) {}

  void set(const Shape& s, const float* means, const float* inverse, const float* weight,
           const float* bias) {
    for (int64_t i = 0; i < s.width; ++i) {
      const int32_t c = s.channel[i], group = s.group[i];
      mean[i] = means[group], scale[i] = weight[c] * inverse[group], shift[i] = bias[c];
    }
  }
};

KERNEL void column_sums(const Shape& s, const float* __restrict x, double* __restrict sum,
                        double* __restrict square) {
  for (int64_t tile = 0; tile < s.width; tile += kColumns) {
    double t[kColumns] = {}, q[kColumns] = {};
    for (int64_t r = 0; r < s.rows; ++r) {
      const float* __restrict v = x + r * s.width + tile;
#pragma omp simd
      for (int64_t i = 0; i < kColumns; ++i) {
        const double u = v[i];
        t[i] += u;
        q[i] += u * u;
      }
    }
    std::memcpy(sum + tile, t, sizeof t);
    std::memcpy(square + tile, q, sizeof q);
  }
  for (int64_t i = 0; i < s.size() - s.whole(); ++i) {
    const double u = x[s.whole() + i];
    sum[i] += u;
    square[i] += u * u;
  }
}

// Mean and inverse deviation of `count` numbers from their sum and their sum of squares.
void moments_of(double total, double squares, double count, double eps, float* mean,
                float* inverse) {
  const double m = total / count, v = squares / count - m * m;
  *mean = static_cast<float>(m);
  *inverse = static_cast<float>(1.0 / std::sqrt((v < 0.0 ? 0.0 : v) + eps));
}

void moments(const Shape& s, const double* sum, const double* square, double eps, float* mean,
             float* inverse) {
  const double count = static_cast<double>(s.each() * s.pixels);
  std::vector<double> total(s.groups), squares(s.groups);
  for (int64_t i = 0; i < s.width; ++i) {
    total[s.group[i]] += sum[i];
    squares[s.group[i]] += square[i];
  }
  for (int64_t group = 0; group < s.groups; ++group) {
    moments_of(total[group], squares[group], count, eps, mean + group, inverse + group);
  }
}

template <bool relu>
INLINE void normalize(const Shape& s, const Columns& columns, const float* __restrict x,
                      float* __restrict y) {
  const float* __restrict mean = columns.mean.data();
  const float* __restrict scale = columns.scale.data();
  const float* __restrict shift = columns.shift.data();
  for (int64_t at = 0; at < s.size(); at += s.width, x += s.width, y += s.width) {
    const int64_t width = std::min(s.width, s.size() - at);
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) {
      const float v = (x[i] - mean[i]) * scale[i] + shift[i];
      y[i] = relu && v < 0.0f ? 0.0f : v;
    }
  }
}

// The gradient before the activation.
template <bool relu>
INLINE float upstream(float g, float deviation, float scale, float shift) {
  return relu && deviation * scale + shift <= 0.0f ? 0.0f : g;
}

// Sums over the pixels of u and u * (x - mean), u the gradient before the activation.
template <bool relu>
INLINE void gradient_sums(const Shape& s, const Columns& columns, const float* __restrict x,
                          const float* __restrict g, double* __restrict plain,
                          double* __restrict centred) {
  for (int64_t tile = 0; tile < s.width; tile += kColumns) {
    const float* __restrict mean = columns.mean.data() + tile;
    const float* __restrict scale = columns.scale.data() + tile;
    const float* __restrict shift = columns.shift.data() + tile;
    for (int64_t begin = 0; begin < s.rows; begin += kRows) {
      float t[kColumns] = {}, q[kColumns] = {};
      for (int64_t r = begin; r < std::min(begin + kRows, s.rows); ++r) {
        const float* __restrict v = x + r * s.width + tile;
        const float* __restrict h = g + r * s.width + tile;
#pragma omp simd
        for (int64_t i = 0; i < kColumns; ++i) {
          const float d = v[i] - mean[i], u = upstream<relu>(h[i], d, scale[i], shift[i]);
          t[i] += u;
          q[i] += u * d;
        }
      }
      for (int64_t i = 0; i < kColumns; ++i) {
        plain[tile + i] += t[i];
        centred[tile + i] += q[i];
      }
    }
  }
  for (int64_t i = 0; i < s.size() - s.whole(); ++i) {
    const float d = x[s.whole() + i] - columns.mean[i];
    const float u = upstream<relu>(g[s.whole() + i], d, columns.scale[i], columns.shift[i]);
    plain[i] += u;
    centred[i] += u * d;
  }
}

template <bool relu>
INLINE void input_gradient(const Shape& s, const Columns& columns, const float* __restrict x,
                           const float* __restrict g, float* __restrict dx) {
  const float* __restrict mean = columns.mean.data();
  const float* __restrict scale = columns.scale.data();
  const float* __restrict shift = columns.shift.data();
  const float* __restrict offset = columns.offset.data();
  const float* __restrict slope = columns.slope.data();
  for (int64_t at = 0; at < s.size(); at += s.width) {
    const int64_t width = std::min(s.width, s.size() - at);
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) {
      const float d = x[at + i] - mean[i], h = g[at + i];  // loaded whatever the sign: no branch
      const float u = upstream<relu>(h, d, scale[i], shift[i]);
      dx[at + i] = u * scale[i] + (d * slope[i] + offset[i]);
    }
  }
}

KERNEL void normalize_all(const Shape& s, const Columns& columns, const float* x, float* y,
                          bool relu) {
  relu ? normalize<true>(s, columns, x, y) : normalize<false>(s, columns, x, y);
}

KERNEL void gradient_sums_all(const Shape& s, const Columns& columns, const float* x,
                              const float* g, double* plain, double* centred, bool relu) {
  relu ? gradient_sums<true>(s, columns, x, g, plain, centred)
       : gradient_sums<false>(s, columns, x, g, plain, centred);
}

KERNEL void input_gradient_all(const Shape& s, const Columns& columns, const float* x,
                               const float* g, float* dx, bool relu) {
  relu ? input_gradient<true>(s, columns, x, g, dx) : input_gradient<false>(s, columns, x, g, dx);
}

// Normalizes sample by sample, as write(shape, columns, n, x) does for sample n; returns the means
// and the inverse deviations, (samples, groups).
template <class Write>
std::tuple<Tensor, Tensor> normalize_by(const Tensor& x, int64_t groups, const Tensor& weight,
                                        const Tensor& bias, double eps, Write write) {
  const Shape s(x, groups);
  Tensor mean = at::empty({s.samples, groups}, x.options()), inverse = at::empty_like(mean);
  const float *xs = x.const_data_ptr<float>(), *w = weight.const_data_ptr<float>(),
              *b = bias.const_data_ptr<float>();
  float *means = mean.data_ptr<float>(), *inverses = inverse.data_ptr<float>();
  at::parallel_for(0, s.samples, 1, [&](int64_t from, int64_t until) {
    std::vector<double> sums(2 * s.width);
    Columns columns(s.width);
    for (int64_t n = from; n < until; ++n) {
      float *m = means + n * groups, *r = inverses + n * groups;
      const float* own = xs + n * s.size();
      column_sums(s, own, sums.data(), sums.data() + s.width);
      moments(s, sums.data(), sums.data() + s.width, eps, m, r);
      columns.set(s, m, r, w, b);
      write(s, columns, n, own);
    }
  });
  return {mean, inverse};
}

// What a backward pass starts from, beside the gradient of the output.
struct Given {
  const Tensor &x, &mean, &inverse, &weight, &bias;
  int64_t groups;
  bool want_x;
};

// The gradients of x, weight and bias. sums_of(shape, columns, n, x, plain, centred) adds up, for
// sample n and by column, u and u * (x - mean), u the gradient before the activation;
// gradient_of(shape, columns, n, x, dx) writes u * scale + (x - mean) * slope + offset.
template <class Sums, class Gradient>
std::tuple<Tensor, Tensor, Tensor> gradients_by(const Given& given, Sums sums_of,
                                                Gradient gradient_of) {
  const Tensor &x = given.x, &weight = given.weight, &bias = given.bias;
  const int64_t groups = given.groups;
  const Shape s(x, groups);
  Tensor dx = given.want_x ? at::empty_like(x) : Tensor();
  std::vector<double> sums(2 * s.samples * s.channels);
  const float *xs = x.const_data_ptr<float>(), *w = weight.const_data_ptr<float>(),
              *b = bias.const_data_ptr<float>(), *means = given.mean.const_data_ptr<float>(),
              *inverses = given.inverse.const_data_ptr<float>();
  float* dxs = given.want_x ? dx.data_ptr<float>() : nullptr;
  at::parallel_for(0, s.samples, 1, [&](int64_t from, int64_t until) {
    std::vector<double> plain(s.width), centred(s.width), total(groups), energy(groups);
    Columns columns(s.width);
    for (int64_t n = from; n < until; ++n) {
      const float *m = means + n * groups, *r = inverses + n * groups;
      const int64_t at = n * s.size();
      columns.set(s, m, r, w, b);
      std::fill(plain.begin(), plain.end(), 0.0);
      std::fill(centred.begin(), centred.end(), 0.0);
      sums_of(s, columns, n, xs + at, plain.data(), centred.data());
      double *db = sums.data() + 2 * n * s.channels, *dw = db + s.channels;
      for (int64_t i = 0; i < s.width; ++i) {
        db[s.channel[i]] += plain[i];
        dw[s.channel[i]] += centred[i] * r[s.group[i]];
      }
      if (!given.want_x) continue;
      std::fill(total.begin(), total.end(), 0.0);
      std::fill(energy.begin(), energy.end(), 0.0);
      for (int64_t c = 0; c < s.channels; ++c) {
        total[s.group[c]] += w[c] * db[c];
        energy[s.group[c]] += w[c] * dw[c];
      }
      const double count = static_cast<double>(s.each() * s.pixels);
      for (int64_t i = 0; i < s.width; ++i) {
        const int32_t group = s.group[i];
        columns.offset[i] = static_cast<float>(-total[group] * r[group] / count);
        columns.slope[i] = static_cast<float>(-energy[group] * r[group] * r[group] / count);
      }
      gradient_of(s, columns, n, xs + at, dxs + at);
    }
  });
  Tensor dweight = at::empty_like(weight), dbias = at::empty_like(bias);
  float *dws = dweight.data_ptr<float>(), *dbs = dbias.data_ptr<float>();
  for (int64_t c = 0; c < s.channels; ++c) {
    double db = 0.0, dw = 0.0;
    for (int64_t n = 0; n < s.samples; ++n) {
      db += sums[2 * n * s.channels + c];
      dw += sums[(2 * n + 1) * s.channels + c];
    }
    dbs[c] = static_cast<float>(db), dws[c] = static_cast<float>(dw);
  }
  return {dx, dweight, dbias};
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& x, int64_t groups, const Tensor& weight,
                                           const Tensor& bias, double eps, bool relu) {
  Tensor y = at::empty_like(x);
  float* ys = y.data_ptr<float>();
  auto [mean, inverse] =
      normalize_by(x, groups, weight, bias, eps,
                   [&](const Shape& s, const Columns& columns, int64_t n, const float* own) {
                     normalize_all(s, columns, own, ys + n * s.size(), relu);
                   });
  return {y, mean, inverse};
}

std::tuple<Tensor, Tensor, Tensor> backward(const Given& given, const Tensor& upstream, bool relu) {
  const Tensor g = upstream.contiguous(at::MemoryFormat::ChannelsLast);
  const float* gs = g.const_data_ptr<float>();
  return gradients_by(
      given,
      [&](const Shape& s, const Columns& columns, int64_t n, const float* x, double* plain,
          double* centred) {
        gradient_sums_all(s, columns, x, gs + n * s.size(), plain, centred, relu);
      },
      [&](const Shape& s, const Columns& columns, int64_t n, const float* x, float* dx) {
        input_gradient_all(s, columns, x, gs + n * s.size(), dx, relu);
      });
}

}  // namespace fedkn::group_norm
//// group_norm_autograd.h
// GroupNorm, ReLU and pooling for autograd: one function over operators that nothing hides.
//
// Who records a step (step.h) sees the operators, forward and backward, as PyTorch's own.

#pragma once

#include <torch/csrc/autograd/autograd.h>

#include "group_norm.h"
#include "group_norm_contiguous.h"
#include "group_norm_pool.h"

namespace fedkn::group_norm {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

using Four = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using Three = std::tuple<Tensor, Tensor, Tensor>;
using ForwardSignature = Four(const Tensor&, int64_t, const Tensor&, const Tensor&, double, bool,
                              bool);
using BackwardSignature = Three(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                const Tensor&, const Tensor&, const std::optional<Tensor>&, int64_t,
                                bool, bool);

// y, mean, inverse deviation and, where it pools, the places of the winners.
Four group_norm_forward(const Tensor& x, int64_t groups, const Tensor& weight, const Tensor& bias,
                        double eps, bool relu, bool pool) {
  if (pool) return pooling_forward(x, groups, weight, bias, eps, relu);
  auto [y, mean, inverse] = x.is_contiguous()
                                ? contiguous::forward(x, groups, weight, bias, eps, relu)
                                : forward(x, groups, weight, bias, eps, relu);
  return {y, mean, inverse, Tensor()};
}

// The gradients of x (undefined unless wanted), weight and bias.
Three group_norm_backward(const Tensor& g, const Tensor& x, const Tensor& weight,
                          const Tensor& bias, const Tensor& mean, const Tensor& inverse,
                          const std::optional<Tensor>& winner, int64_t groups, bool relu,
                          bool want_x) {
  const Given given{x, mean, inverse, weight, bias, groups, want_x};
  if (winner) return pooling_backward(given, g, *winner);
  return x.is_contiguous() ? contiguous::backward(given, g, relu) : backward(given, g, relu);
}

// Gradients of gradients are rare, so autograd's own.
variable_list by_autograd(AutogradContext* context, const variable_list& saved,
                          const variable_list& gradients) {
  // Aliases: where x depends on the gain, that way is no concern of this layer's.
  const Tensor x = saved[0].view_as(saved[0]), weight = saved[1].view_as(saved[1]),
               bias = saved[2].view_as(saved[2]);
  const Tensor* own[] = {&x, &weight, &bias};
  Tensor y = at::group_norm(x, context->saved_data["groups"].toInt(), weight, bias,
                            context->saved_data["eps"].toDouble());
  if (context->saved_data["relu"].toBool()) y = y.relu();
  if (saved[5].defined()) y = at::max_pool2d(y, {2, 2});
  constexpr int places[] = {0, 2, 3};  // of x, weight and bias among the arguments
  variable_list sources, found(7);
  for (int i = 0; i < 3; ++i) {
    if (context->needs_input_grad(i)) sources.push_back(*own[i]);
  }
  const variable_list first = torch::autograd::grad({y}, sources, gradients, true, true);
  size_t next = 0;
  for (int i = 0; i < 3; ++i) {
    if (context->needs_input_grad(i)) found[places[i]] = first[next++];
  }
  return found;
}

struct Function : torch::autograd::Function<Function> {
  static Tensor forward(AutogradContext* context, const Tensor& x, int64_t groups,
                        const Tensor& weight, const Tensor& bias, double eps, bool relu,
                        bool pool) {
    at::AutoDispatchBelowADInplaceOrView guard;
    static const auto op = typed<ForwardSignature>("group_norm_forward");
    auto [y, mean, inverse, winner] = op.call(x, groups, weight, bias, eps, relu, pool);
    context->save_for_backward({x, weight, bias, mean, inverse, winner});
    context->saved_data["groups"] = groups;
    context->saved_data["eps"] = eps;
    context->saved_data["relu"] = relu;
    return y;
  }

  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    const variable_list saved = context->get_saved_variables();
    if (at::GradMode::is_enabled()) return by_autograd(context, saved, gradients);
    at::AutoDispatchBelowADInplaceOrView guard;
    static const auto op = typed<BackwardSignature>("group_norm_backward");
    std::optional<Tensor> winner;
    if (saved[5].defined()) winner = saved[5];
    auto [dx, dweight, dbias] =
        op.call(gradients[0], saved[0], saved[1], saved[2], saved[3], saved[4], winner,
                context->saved_data["groups"].toInt(), context->saved_data["relu"].toBool(),
                context->needs_input_grad(0));
    return {dx, Tensor(), dweight, dbias, Tensor(), Tensor(), Tensor()};
  }
};

Tensor apply(const Tensor& x, int64_t groups, const Tensor& gain, const Tensor& shift, double eps,
             bool relu, bool pool) {
  return Function::apply(x, groups, gain.contiguous(), shift.contiguous(), eps, relu, pool);
}

}  // namespace fedkn::group_norm
//// group_norm_contiguous.h
// GroupNorm and the ReLU after it, forward and backward, on maps laid out (N, C, H, W).
//
// A group is one piece of memory here, a channel a piece of that. This is the layout of several
// clients' maps side by side (`fedkn.layers.side_by_side`).

#pragma once

#include "common.h"
#include "group_norm.h"

namespace fedkn::group_norm::contiguous {

struct Maps {
  int64_t samples, channels, pixels, groups;

  Maps(const Tensor& x, int64_t groups_)
      : samples(x.size(0)), channels(x.size(1)), pixels(x.size(2) * x.size(3)), groups(groups_) {}
  int64_t each() const { return channels / groups; }
};

// How a channel is normalized: (x - mean) * scale + shift.
struct Line {
  float mean, scale, shift;

  INLINED float operator()(float x) const { return (x - mean) * scale + shift; }
};

KERNEL void sums(const float* __restrict x, int64_t n, double* total, double* squares) {
  double t[kColumns] = {}, q[kColumns] = {};
  int64_t begin = 0;
  for (; begin + kColumns <= n; begin += kColumns) {
#pragma omp simd
    for (int64_t i = 0; i < kColumns; ++i) {
      const double u = x[begin + i];
      t[i] += u;
      q[i] += u * u;
    }
  }
  for (int64_t i = 0; begin + i < n; ++i) {
    const double u = x[begin + i];
    t[i] += u;
    q[i] += u * u;
  }
  *total = *squares = 0.0;
  for (int64_t i = 0; i < kColumns; ++i) *total += t[i], *squares += q[i];
}

template <bool relu>
INLINE void normalize_channel(const Line& line, int64_t n, const float* __restrict x,
                              float* __restrict y) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const float v = line(x[i]);
    y[i] = relu && v < 0.0f ? 0.0f : v;
  }
}

KERNEL void normalize(const Line& line, int64_t n, const float* x, float* y, bool relu) {
  relu ? normalize_channel<true>(line, n, x, y) : normalize_channel<false>(line, n, x, y);
}

// Sums of u and u * (x - mean), u the gradient before the activation.
template <bool relu>
INLINE void sums_of_channel(const Line& line, int64_t n, const float* __restrict x,
                            const float* __restrict g, double* plain, double* centred) {
  constexpr int64_t kBlock = kRows * kColumns;  // in float before they are added up in double
  *plain = *centred = 0.0;
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    float t = 0.0f, q = 0.0f;
    const int64_t until = std::min(begin + kBlock, n);
#pragma omp simd reduction(+ : t, q)
    for (int64_t i = begin; i < until; ++i) {
      const float d = x[i] - line.mean, u = upstream<relu>(g[i], d, line.scale, line.shift);
      t += u;
      q += u * d;
    }
    *plain += t, *centred += q;
  }
}

KERNEL void gradient_sums(const Line& line, int64_t n, const float* x, const float* g, bool relu,
                          double* plain, double* centred) {
  relu ? sums_of_channel<true>(line, n, x, g, plain, centred)
       : sums_of_channel<false>(line, n, x, g, plain, centred);
}

// u * scale + (x - mean) * slope + offset.
template <bool relu>
INLINE void gradient_of_channel(const Line& line, float slope, float offset, int64_t n,
                                const float* __restrict x, const float* __restrict g,
                                float* __restrict dx) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const float d = x[i] - line.mean, h = g[i];  // loaded whatever the sign: no branch
    dx[i] = upstream<relu>(h, d, line.scale, line.shift) * line.scale + (d * slope + offset);
  }
}

KERNEL void input_gradient(const Line& line, float slope, float offset, int64_t n, const float* x,
                           const float* g, bool relu, float* dx) {
  relu ? gradient_of_channel<true>(line, slope, offset, n, x, g, dx)
       : gradient_of_channel<false>(line, slope, offset, n, x, g, dx);
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& x, int64_t groups, const Tensor& weight,
                                           const Tensor& bias, double eps, bool relu) {
  const Maps s(x, groups);
  Tensor y = at::empty_like(x);
  Tensor mean = at::empty({s.samples, groups}, x.options()), inverse = at::empty_like(mean);
  const float *xs = x.const_data_ptr<float>(), *w = weight.const_data_ptr<float>(),
              *b = bias.const_data_ptr<float>();
  float *ys = y.data_ptr<float>(), *means = mean.data_ptr<float>(),
        *inverses = inverse.data_ptr<float>();
  const int64_t size = s.each() * s.pixels;
  at::parallel_for(0, s.samples * groups, 1, [&](int64_t from, int64_t until) {
    for (int64_t at = from; at < until; ++at) {
      double total, squares;
      sums(xs + at * size, size, &total, &squares);
      moments_of(total, squares, static_cast<double>(size), eps, means + at, inverses + at);
      for (int64_t i = 0; i < s.each(); ++i) {
        const int64_t c = at % groups * s.each() + i, map = (at * s.each() + i) * s.pixels;
        const Line line{means[at], w[c] * inverses[at], b[c]};
        normalize(line, s.pixels, xs + map, ys + map, relu);
      }
    }
  });
  return {y, mean, inverse};
}

std::tuple<Tensor, Tensor, Tensor> backward(const Given& given, const Tensor& upstream, bool relu) {
  const Tensor &x = given.x, &weight = given.weight, &bias = given.bias;
  const Maps s(x, given.groups);
  const Tensor g = upstream.contiguous();
  Tensor dx = given.want_x ? at::empty_like(x) : Tensor();
  Tensor plain = at::empty({s.samples, s.channels}, x.options().dtype(at::kDouble));
  Tensor centred = at::empty_like(plain);
  const float *xs = x.const_data_ptr<float>(), *w = weight.const_data_ptr<float>(),
              *b = bias.const_data_ptr<float>(), *gs = g.const_data_ptr<float>(),
              *means = given.mean.const_data_ptr<float>(),
              *inverses = given.inverse.const_data_ptr<float>();
  float* dxs = given.want_x ? dx.data_ptr<float>() : nullptr;
  double *ts = plain.data_ptr<double>(), *qs = centred.data_ptr<double>();
  at::parallel_for(0, s.samples * s.groups, 1, [&](int64_t from, int64_t until) {
    for (int64_t at = from; at < until; ++at) {
      const double r = inverses[at], count = static_cast<double>(s.each() * s.pixels);
      double total = 0.0, energy = 0.0;
      const auto line = [&](int64_t c) { return Line{means[at], w[c] * inverses[at], b[c]}; };
      for (int64_t i = 0; i < s.each(); ++i) {
        const int64_t map = at * s.each() + i, c = at % s.groups * s.each() + i;
        gradient_sums(line(c), s.pixels, xs + map * s.pixels, gs + map * s.pixels, relu, ts + map,
                      qs + map);
        qs[map] *= r;
        total += w[c] * ts[map];
        energy += w[c] * qs[map];
      }
      if (!given.want_x) continue;
      const auto offset = static_cast<float>(-total * r / count);
      const auto slope = static_cast<float>(-energy * r * r / count);
      for (int64_t i = 0; i < s.each(); ++i) {
        const int64_t map = (at * s.each() + i) * s.pixels, c = at % s.groups * s.each() + i;
        input_gradient(line(c), slope, offset, s.pixels, xs + map, gs + map, relu, dxs + map);
      }
    }
  });
  return {dx, centred.sum(0).to(at::kFloat), plain.sum(0).to(at::kFloat)};
}

}  // namespace fedkn::group_norm::contiguous
//// group_norm_pool.h
// GroupNorm, the ReLU after it and 2x2 max-pooling, forward and backward, channels last.
//
// The map before the pooling is never written: forward, each window is normalized as it is pooled,
// and backward, its gradient is known from the winner's place and the pooled gradient.

#pragma once

#include "common.h"
#include "group_norm.h"
#include "max_pool.h"

namespace fedkn::group_norm {

using max_pool::kNobody;
using max_pool::largest;
using max_pool::Winner;

// Channels of a window are taken kLanes at a time.
constexpr int64_t kLanes = 8;

// The numbers of a window, for kLanes of its channels.
struct Window {
  const float *a, *b, *c, *d;

  INLINED Window(const Shape& s, int64_t width, const float* x, int64_t row, int64_t column)
      : a(x + (2 * row * width + 2 * column) * s.channels),
        b(a + s.channels),
        c(a + width * s.channels),
        d(c + s.channels) {}
};

template <int64_t lanes, bool relu>
INLINE void normalize_window(const Columns& columns, const Window& w, int64_t from, float* y,
                             int32_t* winner) {
  const float* __restrict mean = columns.mean.data() + from;
  const float* __restrict scale = columns.scale.data() + from;
  const float* __restrict shift = columns.shift.data() + from;
  const float* __restrict a = w.a + from;
  const float* __restrict b = w.b + from;
  const float* __restrict c = w.c + from;
  const float* __restrict d = w.d + from;
  float* __restrict out = y + from;
  int32_t* __restrict place = winner + from;
#pragma omp simd
  for (int64_t i = 0; i < lanes; ++i) {
    const float m = mean[i], k = scale[i], t = shift[i];
    const Winner best =
        largest((a[i] - m) * k + t, (b[i] - m) * k + t, (c[i] - m) * k + t, (d[i] - m) * k + t);
    const bool dead = relu && best.value <= 0.0f;
    out[i] = relu && best.value < 0.0f ? 0.0f : best.value;
    place[i] = dead ? kNobody : best.place;
  }
}

template <int64_t lanes, bool relu>
INLINE void normalize_windows(const Shape& s, int64_t width, const Columns& columns, const float* x,
                              float* y, int32_t* winner) {
  const int64_t rows = s.pixels / width / 2;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t q = 0; q < width / 2; ++q, y += s.channels, winner += s.channels) {
      const Window w(s, width, x, r, q);
      for (int64_t from = 0; from < s.channels; from += lanes) {
        normalize_window<lanes, relu>(columns, w, from, y, winner);
      }
    }
  }
}

KERNEL void normalize_and_pool(const Shape& s, int64_t width, const Columns& columns,
                               const float* x, float* y, int32_t* winner, bool relu) {
  if (s.channels % (2 * kLanes)) {
    relu ? normalize_windows<kLanes, true>(s, width, columns, x, y, winner)
         : normalize_windows<kLanes, false>(s, width, columns, x, y, winner);
  } else {
    relu ? normalize_windows<2 * kLanes, true>(s, width, columns, x, y, winner)
         : normalize_windows<2 * kLanes, false>(s, width, columns, x, y, winner);
  }
}

// Sums over a window's channels of u and u * (x - mean), u the gradient of its winner.
template <int64_t lanes>
INLINE void add_window(const Columns& columns, const Window& w, int64_t from, const float* g,
                       const int32_t* winner, float* plain, float* centred) {
  const float* __restrict mean = columns.mean.data() + from;
  const float* __restrict a = w.a + from;
  const float* __restrict b = w.b + from;
  const float* __restrict c = w.c + from;
  const float* __restrict d = w.d + from;
  const float* __restrict h = g + from;
  const int32_t* __restrict place = winner + from;
  float* __restrict t = plain + from;
  float* __restrict q = centred + from;
#pragma omp simd
  for (int64_t i = 0; i < lanes; ++i) {
    // All are loaded, whoever won: no branch.
    const float va = a[i], vb = b[i], vc = c[i], vd = d[i], hi = h[i];
    const int32_t k = place[i];
    float v = k == 0 ? va : vb;
    v = k == 2 ? vc : v;
    v = k == 3 ? vd : v;
    const float u = k == kNobody ? 0.0f : hi;
    t[i] += u;
    q[i] += u * (v - mean[i]);
  }
}

template <int64_t lanes>
INLINE void winners_sums(const Shape& s, int64_t width, const Columns& columns, const float* x,
                         const float* g, const int32_t* winner, double* plain, double* centred) {
  const int64_t rows = s.pixels / width / 2;
  std::vector<float> sums(2 * s.channels);
  for (int64_t r = 0; r < rows; ++r) {
    std::fill(sums.begin(), sums.end(), 0.0f);
    for (int64_t j = 0; j < width / 2; ++j, g += s.channels, winner += s.channels) {
      const Window w(s, width, x, r, j);
      for (int64_t from = 0; from < s.channels; from += lanes) {
        add_window<lanes>(columns, w, from, g, winner, sums.data(), sums.data() + s.channels);
      }
    }
    for (int64_t i = 0; i < s.channels; ++i) {
      plain[i] += sums[i];
      centred[i] += sums[s.channels + i];
    }
  }
}

KERNEL void pooled_gradient_sums(const Shape& s, int64_t width, const Columns& columns,
                                 const float* x, const float* g, const int32_t* winner,
                                 double* plain, double* centred) {
  if (s.channels % (2 * kLanes)) {
    winners_sums<kLanes>(s, width, columns, x, g, winner, plain, centred);
  } else {
    winners_sums<2 * kLanes>(s, width, columns, x, g, winner, plain, centred);
  }
}

template <int64_t lanes>
INLINE void window_gradients(const Shape& s, int64_t width, const Columns& columns, const float* x,
                             const float* g, const int32_t* winner, float* dx) {
  const int64_t rows = s.pixels / width / 2;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t j = 0; j < width / 2; ++j, g += s.channels, winner += s.channels) {
      const Window w(s, width, x, r, j);
      for (int64_t from = 0; from < s.channels; from += lanes) {
        const float* __restrict mean = columns.mean.data() + from;
        const float* __restrict scale = columns.scale.data() + from;
        const float* __restrict offset = columns.offset.data() + from;
        const float* __restrict slope = columns.slope.data() + from;
        const float* __restrict a = w.a + from;
        const float* __restrict b = w.b + from;
        const float* __restrict c = w.c + from;
        const float* __restrict d = w.d + from;
        float* __restrict da = dx + (w.a - x) + from;
        float* __restrict db = dx + (w.b - x) + from;
        float* __restrict dc = dx + (w.c - x) + from;
        float* __restrict dd = dx + (w.d - x) + from;
        const float* __restrict h = g + from;
        const int32_t* __restrict place = winner + from;
#pragma omp simd
        for (int64_t i = 0; i < lanes; ++i) {
          const int32_t k = place[i];
          const float m = mean[i], l = slope[i], o = offset[i], u = h[i] * scale[i];
          const float ua = k == 0 ? u : 0.0f, ub = k == 1 ? u : 0.0f, uc = k == 2 ? u : 0.0f,
                      ud = k == 3 ? u : 0.0f;
          da[i] = ((a[i] - m) * l + o) + ua;
          db[i] = ((b[i] - m) * l + o) + ub;
          dc[i] = ((c[i] - m) * l + o) + uc;
          dd[i] = ((d[i] - m) * l + o) + ud;
        }
      }
    }
  }
}

KERNEL void pooled_input_gradient(const Shape& s, int64_t width, const Columns& columns,
                                  const float* x, const float* g, const int32_t* winner,
                                  float* dx) {
  if (s.channels % (2 * kLanes)) {
    window_gradients<kLanes>(s, width, columns, x, g, winner, dx);
  } else {
    window_gradients<2 * kLanes>(s, width, columns, x, g, winner, dx);
  }
}

// As `forward`, and the places of the winners.
std::tuple<Tensor, Tensor, Tensor, Tensor> pooling_forward(const Tensor& x, int64_t groups,
                                                           const Tensor& weight, const Tensor& bias,
                                                           double eps, bool relu) {
  constexpr auto last = at::MemoryFormat::ChannelsLast;
  Tensor y = at::empty({x.size(0), x.size(1), x.size(2) / 2, x.size(3) / 2}, x.options(), last);
  Tensor winner = at::empty(y.sizes(), x.options().dtype(at::kInt), last);
  float* ys = y.data_ptr<float>();
  int32_t* winners = winner.data_ptr<int32_t>();
  auto [mean, inverse] =
      normalize_by(x, groups, weight, bias, eps,
                   [&](const Shape& s, const Columns& columns, int64_t n, const float* own) {
                     const int64_t at = n * s.size() / 4;
                     normalize_and_pool(s, x.size(3), columns, own, ys + at, winners + at, relu);
                   });
  return {y, mean, inverse, winner};
}

std::tuple<Tensor, Tensor, Tensor> pooling_backward(const Given& given, const Tensor& upstream,
                                                    const Tensor& winner) {
  const Tensor g = upstream.contiguous(at::MemoryFormat::ChannelsLast);
  const float* gs = g.const_data_ptr<float>();
  const int32_t* winners = winner.const_data_ptr<int32_t>();
  const int64_t width = given.x.size(3);
  return gradients_by(
      given,
      [&](const Shape& s, const Columns& columns, int64_t n, const float* xs, double* plain,
          double* centred) {
        const int64_t at = n * s.size() / 4;
        pooled_gradient_sums(s, width, columns, xs, gs + at, winners + at, plain, centred);
      },
      [&](const Shape& s, const Columns& columns, int64_t n, const float* xs, float* dxs) {
        const int64_t at = n * s.size() / 4;
        pooled_input_gradient(s, width, columns, xs, gs + at, winners + at, dxs);
      });
}

}  // namespace fedkn::group_norm
//// kn_conv.h
// Forward and backward of the kernel-normalized convolution, as one operator.
//
// Its autograd function is in C++ too, which spares every layer the way through Python.

#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "kn_conv_channels_last.h"
#include "kn_conv_contiguous.h"
#include "plan.h"
#include "winograd_convolution.h"

namespace fedkn {

Tensor centred(const Tensor& weight) { return weight.sub(weight.mean({1, 2, 3}, true)); }

// Filters one after the other in memory, whatever the order of their own elements.
Tensor in_order(const Tensor& weight) {
  const bool fits = weight.is_contiguous() || weight.is_contiguous(at::MemoryFormat::ChannelsLast);
  return fits ? weight : weight.contiguous();
}

KERNEL void sum_filters(const Plan& p, const float* __restrict w, int64_t size,
                        float* __restrict sums) {
  constexpr int64_t kRow = 64, kRows = 4;
  for (int64_t o = 0; o < p.all_filters(); ++o, w += size) {
    // Sums of `kRows` weights in float, which costs no digits that matter, and the rest in double.
    double sum = 0.0;
    int64_t i = 0;
    while (i + kRow <= size) {
      alignas(64) float row[kRow] = {};
      for (int64_t k = 0; k < kRows && i + kRow <= size; ++k, i += kRow) {
        for (int64_t j = 0; j < kRow; ++j) row[j] += w[i + j];
      }
#pragma omp simd reduction(+ : sum)
      for (int64_t j = 0; j < kRow; ++j) sum += row[j];
    }
#pragma omp simd reduction(+ : sum)
    for (int64_t j = i; j < size; ++j) sum += w[j];
    sums[o] = static_cast<float>(sum);
  }
}

KERNEL void subtract_from_filters(const Plan& p, const float* __restrict amounts, int64_t size,
                                  float* __restrict dw) {
  for (int64_t o = 0; o < p.all_filters(); ++o, dw += size) {
    for (int64_t i = 0; i < size; ++i) dw[i] -= amounts[o];
  }
}

// Sum of (batch, clients * filters) over the batch, into the first.
KERNEL void sum_samples(const Plan& p, float* rows) {
  const int64_t filters = p.all_filters();
  for (int64_t n = 1; n < p.batch(); ++n) {
    for (int64_t o = 0; o < filters; ++o) rows[o] += rows[n * filters + o];
  }
  if (p.samples == 0) std::fill(rows, rows + filters, 0.0f);
}

// The filters' sums, zero where the filters are centred; then the bias, zero where there is none.
Tensor per_filter(const Plan& p, const Tensor& weight, const std::optional<Tensor>& bias) {
  Tensor values = at::zeros({2, p.all_filters()}, weight.options());
  float* sums = values.data_ptr<float>();
  if (!p.centred) {
    const Tensor w = in_order(weight);
    sum_filters(p, w.const_data_ptr<float>(), w.numel() / std::max<int64_t>(1, p.all_filters()),
                sums);
  }
  if (bias) {
    const Tensor b = bias->contiguous();
    std::copy_n(b.const_data_ptr<float>(), p.all_filters(), sums + p.all_filters());
  }
  return values;
}

// The vectors by which winograd.h takes the layer's convolution; 0: it is PyTorch's.
int64_t own_lanes(const Plan& p) {
  constexpr std::array<int64_t, 2> one{1, 1}, three{3, 3};
  const bool plain = p.last && p.clients * p.groups == 1 && p.kernel == three && p.stride == one &&
                     p.padding == one && p.dilation == one;
  if (!plain) return 0;
  return winograd::winograd_lanes({p.samples, p.channels, p.height, p.width}, p.filters);
}

Tensor convolve(const Plan& p, const Tensor& x, const Tensor& weight) {
  if (const int64_t lanes = own_lanes(p)) {
    return winograd::winograd_forward(x, p.centred ? centred(weight) : weight, lanes);
  }
  return at::convolution(x, p.centred ? centred(weight) : weight, {}, p.stride, p.padding,
                         p.dilation, false, {0, 0}, p.clients * p.groups);
}

// Returns y, the map to keep (y or z; undefined unless keep), and mean and scale as one tensor,
// (2, samples, positions).
// `values` are those of `per_filter`.
std::tuple<Tensor, Tensor, Tensor> forward(const Plan& p, const Tensor& input, const Tensor& weight,
                                           const Tensor& values, bool keep) {
  const Tensor x = input.contiguous(p.format());
  Tensor z = convolve(p, x, weight).contiguous(p.format());
  Tensor y = keep && !p.keeps_y ? at::empty_like(z) : z;
  Tensor moment_maps = at::empty({2, p.samples, p.positions()}, x.options());
  const float *s = values.const_data_ptr<float>(), *b = s + p.all_filters(),
              *xs = x.const_data_ptr<float>();
  float *zs = z.data_ptr<float>(), *ys = y.data_ptr<float>();
  float* means = moment_maps.data_ptr<float>();
  float* scales = means + p.samples * p.positions();
  at::parallel_for(0, p.samples, 1, [&](int64_t from, int64_t until) {
    const int64_t pixels = p.pixels(), positions = p.positions();
    const Buffer<double> maps(2 * pixels + p.rows * p.width + 2 * positions);
    const Buffer<int64_t> lanes(p.last && p.masked ? 4 * p.channels : 0);
    Mask mask;
    double *total = maps.get(), *squares = total + pixels, *scratch = squares + pixels;
    double *sum = scratch + p.rows * p.width, *square = sum + positions;
    for (int64_t n = from; n < until; ++n) {
      const float* sample = xs + n * p.channels * pixels;
      float *m = means + n * positions, *r = scales + n * positions;
      for (const bool exact : {p.last, true}) {
        if (p.last) {
          channel_sums_last(p, n, sample, lanes.get(), total, squares);
        } else {
          channel_sums(p, n, sample, exact, mask, total, squares);
        }
        box(p, total, scratch, sum);
        box(p, squares, scratch, square);
        if (!moments(p, sum, square, m, r) || exact) break;
      }
      const int64_t at = n * p.filters * positions, own = n % p.clients * p.filters;
      (p.last ? epilogue_last : epilogue)(p, zs + at, ys + at, m, r, s + own, b + own);
    }
  });
  return {y, keep ? (p.keeps_y ? y : z) : Tensor(), moment_maps};
}

struct Wanted {
  bool x, weight, bias;
};

std::tuple<Tensor, Tensor, Tensor> backward(const Plan& p, const Tensor& upstream,
                                            const Tensor& input, const Tensor& weight,
                                            const Tensor& values, const Tensor& output,
                                            const Tensor& moment_maps, Wanted wanted) {
  const Tensor x = input.contiguous(p.format()), g = upstream.contiguous(p.format());
  const int64_t pixels = p.pixels(), positions = p.positions();
  Tensor dz = at::empty_like(g), dx, dw;
  Tensor db = at::empty({std::max<int64_t>(1, p.batch()), p.all_filters()}, g.options());
  const Buffer<float> dsum(db.numel());
  const Buffer<double> spread(wanted.x ? p.samples * 2 * pixels : 0);
  const float *s = values.const_data_ptr<float>(), *b = s + p.all_filters(),
              *gs = g.const_data_ptr<float>();
  const float* outputs = output.const_data_ptr<float>();
  const float* means = moment_maps.const_data_ptr<float>();
  const float* scales = means + p.samples * positions;
  float *dzs = dz.data_ptr<float>(), *dbs = db.data_ptr<float>();
  std::vector<char> far(p.samples, 1);
  at::parallel_for(0, p.samples, 1, [&](int64_t from, int64_t until) {
    const Buffer<float> maps(2 * positions);
    const Buffer<double> doubles(2 * positions + p.rows * p.width);
    float *energy = maps.get(), *dmean = energy + positions;
    double *offset = doubles.get(), *slope = offset + positions, *scratch = slope + positions;
    for (int64_t n = from; n < until; ++n) {
      const int64_t at = n * p.filters * positions, own = n % p.clients * p.filters;
      const float *m = means + n * positions, *r = scales + n * positions;
      (p.last ? reduce_gradient_last : reduce_gradient)(
          p, gs + at, outputs + at, m, r, s + own, b + own, dzs + at, energy, dmean,
          dbs + n * p.filters, dsum.get() + n * p.filters);
      if (!wanted.x) continue;
      far[n] = through_moments(p, m, r, energy, dmean, offset, slope);
      unbox(p, offset, scratch, spread.get() + 2 * n * pixels);
      unbox(p, slope, scratch, spread.get() + (2 * n + 1) * pixels);
    }
  });
  if (const int64_t lanes = own_lanes(p)) {
    std::tie(dx, dw) = winograd::winograd_backward(dz, x, p.centred ? centred(weight) : weight,
                                                   lanes, {wanted.x, wanted.weight});
  } else if (wanted.x || wanted.weight) {
    std::tie(dx, dw, std::ignore) = at::convolution_backward(
        dz, x, p.centred ? centred(weight) : weight, c10::nullopt, p.stride, p.padding, p.dilation,
        false, {0, 0}, p.clients * p.groups, {wanted.x, wanted.weight, false});
  }
  if (wanted.weight && p.centred) {
    dw = centred(dw);
  } else if (wanted.weight) {
    dw = in_order(dw);
    sum_samples(p, dsum.get());
    subtract_from_filters(p, dsum.get(), dw.numel() / std::max<int64_t>(1, p.all_filters()),
                          dw.data_ptr<float>());
  }
  if (wanted.x) {
    dx = dx.contiguous(p.format());
    const float* xs = x.const_data_ptr<float>();
    float* dxs = dx.data_ptr<float>();
    at::parallel_for(0, p.samples, 1, [&](int64_t from, int64_t until) {
      Mask mask;
      const Buffer<int64_t> lanes(p.last && p.masked ? 4 * p.channels : 0);
      for (int64_t n = from; n < until; ++n) {
        const int64_t at = n * p.channels * pixels;
        const double *offset = spread.get() + 2 * n * pixels, *slope = offset + pixels;
        if (p.last) {
          add_through_statistics_last(p, n, xs + at, dxs + at, offset, slope, lanes.get());
        } else {
          add_through_statistics(p, n, xs + at, dxs + at, offset, slope, far[n], mask);
        }
      }
    });
  }
  if (wanted.bias) {
    sum_samples(p, dbs);
    db = db.select(0, 0);
  }
  return {dx, dw, wanted.bias ? db : Tensor()};
}

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// The operators by which autograd goes, for who records a step (step.h).
using ForwardSignature = std::tuple<Tensor, Tensor, Tensor, Tensor>(
    const Tensor&, const Tensor&, const std::optional<Tensor>&, IntArrayRef, IntArrayRef,
    IntArrayRef, int64_t, int64_t, at::OptionalIntArrayRef, int64_t, double, bool, bool);
using BackwardSignature = std::tuple<Tensor, Tensor, Tensor>(
    const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
    IntArrayRef, IntArrayRef, IntArrayRef, int64_t, int64_t, at::OptionalIntArrayRef, int64_t,
    double, bool, bool, std::array<bool, 3>);
using GradientsSignature = std::tuple<Tensor, Tensor, Tensor>(
    const Tensor&, const Tensor&, const Tensor&, const std::optional<Tensor>&, IntArrayRef,
    IntArrayRef, IntArrayRef, int64_t, int64_t, at::OptionalIntArrayRef, int64_t, double, bool,
    bool, bool, bool);

// y, the map kept for the backward pass, the moments and the values per filter.
std::tuple<Tensor, Tensor, Tensor, Tensor> convolution_forward(
    const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, IntArrayRef stride,
    IntArrayRef padding, IntArrayRef dilation, int64_t groups, int64_t clients,
    at::OptionalIntArrayRef keys, int64_t level, double eps, bool relu, bool keeps_output) {
  const Plan p = make_plan(x, weight, stride, padding, dilation, groups, clients, keys, level, eps,
                           relu, keeps_output);
  const Tensor values = per_filter(p, weight, bias);
  auto [y, output, moment_maps] = forward(p, x, weight, values, true);
  return {y, output, moment_maps, values};
}

// The gradients of x, weight and bias, undefined where not wanted.
std::tuple<Tensor, Tensor, Tensor> convolution_backward(
    const Tensor& g, const Tensor& x, const Tensor& weight, const Tensor& output,
    const Tensor& moment_maps, const Tensor& values, IntArrayRef stride, IntArrayRef padding,
    IntArrayRef dilation, int64_t groups, int64_t clients, at::OptionalIntArrayRef keys,
    int64_t level, double eps, bool relu, bool keeps_output, std::array<bool, 3> wanted) {
  const Plan p = make_plan(x, weight, stride, padding, dilation, groups, clients, keys, level, eps,
                           relu, keeps_output);
  return backward(p, g, x, weight, values, output, moment_maps, {wanted[0], wanted[1], wanted[2]});
}

// The plan of a pass, kept for the pass backward, and its keys as operators take them.
struct Kept : torch::CustomClassHolder {
  explicit Kept(const Plan& plan) : p(plan), list(plan.keys.begin(), plan.keys.end()) {}
  at::OptionalIntArrayRef keys() const {
    return p.masked ? at::OptionalIntArrayRef(list) : std::nullopt;
  }
  bool keeps_output() const { return p.keeps_y && !p.relu; }
  Plan p;
  std::vector<int64_t> list;
};

// Derivatives of gradients are rare: fedkn.layers.native takes them from the definition.
std::tuple<Tensor, Tensor, Tensor> differentiable(const Kept& kept, const Tensor& g,
                                                  const Tensor& x, const Tensor& weight,
                                                  const std::optional<Tensor>& bias,
                                                  Wanted wanted) {
  static const auto op = typed<GradientsSignature>("gradients");
  const Plan& p = kept.p;
  return op.call(g, x, weight, bias, p.stride, p.padding, p.dilation, p.groups, p.clients,
                 kept.keys(), p.level, p.eps, p.relu, wanted.x, wanted.weight, wanted.bias);
}

struct Convolution : public torch::autograd::Function<Convolution> {
  static Tensor forward(AutogradContext* context, const Tensor& x, const Tensor& weight,
                        const std::optional<Tensor>& bias, const Plan& p) {
    at::AutoDispatchBelowADInplaceOrView guard;
    static const auto op = typed<ForwardSignature>("convolution_forward");
    auto kept = c10::make_intrusive<Kept>(p);
    auto [y, output, moment_maps, values] =
        op.call(x, weight, bias, p.stride, p.padding, p.dilation, p.groups, p.clients, kept->keys(),
                p.level, p.eps, p.relu, kept->keeps_output());
    context->save_for_backward({x, weight, bias ? *bias : Tensor(), output, moment_maps, values});
    context->saved_data["plan"] = c10::IValue::make_capsule(std::move(kept));
    return y;
  }

  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    const auto holder = context->saved_data["plan"].toCapsule();
    const Kept& kept = *static_cast<const Kept*>(holder.get());
    const Plan& p = kept.p;
    const variable_list saved = context->get_saved_variables();
    const Tensor &g = gradients[0], &x = saved[0], &weight = saved[1];
    std::optional<Tensor> bias;
    if (saved[2].defined()) bias = saved[2];
    const Wanted wanted{context->needs_input_grad(0), context->needs_input_grad(1),
                        bias && context->needs_input_grad(2)};
    Tensor dx, dw, db;
    if (at::GradMode::is_enabled()) {
      std::tie(dx, dw, db) = differentiable(kept, g, x, weight, bias, wanted);
    } else {
      at::AutoDispatchBelowADInplaceOrView guard;
      static const auto op = typed<BackwardSignature>("convolution_backward");
      std::tie(dx, dw, db) =
          op.call(g, x, weight, saved[3], saved[4], saved[5], p.stride, p.padding, p.dilation,
                  p.groups, p.clients, kept.keys(), p.level, p.eps, p.relu, kept.keeps_output(),
                  std::array<bool, 3>{wanted.x, wanted.weight, wanted.bias});
    }
    return {dx, dw, db, Tensor()};
  }
};

Tensor convolution(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                   IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation, int64_t groups,
                   int64_t clients, at::OptionalIntArrayRef keys, int64_t level, double eps,
                   bool relu, bool keeps_output) {
  const Plan p = make_plan(x, weight, stride, padding, dilation, groups, clients, keys, level, eps,
                           relu, keeps_output);
  if (at::GradMode::is_enabled() &&
      (x.requires_grad() || weight.requires_grad() || (bias && bias->requires_grad()))) {
    return Convolution::apply(x, weight, bias, p);
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return std::get<0>(forward(p, x, weight, per_filter(p, weight, bias), false));
}

}  // namespace fedkn
//// kn_conv_channels_last.h
// The loops over maps laid out channels last, (N, H, W, C), in memory.

#pragma once

#include <algorithm>
#include <cstdint>

#include "plan.h"

namespace fedkn {

// The generator counts in (N, C, H, W) order whatever the layout, so four consecutive pixels of a
// channel share a word. Lanes of `group` (up to four) pixels from `pixel` on, all channels each; a
// lane is the upper 16 bits of its number, as wide as the doubles that it goes with.
INLINE void draw_pixels(const Plan& p, int64_t sample, int64_t pixel, int64_t group,
                        int64_t* __restrict lanes) {
  const int64_t channels = p.channels, pixels = p.pixels();
  const uint64_t base = p.start(sample) + kGamma;
  if (pixels % 4 == 0) {  // then the four pixels of a word are the same ones in every channel
    const uint64_t first = base + kGamma * static_cast<uint64_t>(pixel / 4);
    const uint64_t step = kGamma * static_cast<uint64_t>(pixels / 4);
    for (int64_t c = 0; c < channels; ++c) {
      const uint64_t z = finalised(first + step * static_cast<uint64_t>(c));
      lanes[c] = static_cast<int64_t>(z << 48);
      lanes[channels + c] = static_cast<int64_t>(z << 32);
      lanes[2 * channels + c] = static_cast<int64_t>(z << 16);
      lanes[3 * channels + c] = static_cast<int64_t>(z);
    }
    return;
  }
  for (int64_t j = 0; j < group; ++j) {
    for (int64_t c = 0; c < channels; ++c) {
      const auto element = static_cast<uint64_t>(c * pixels + pixel + j);
      const uint64_t z = finalised(base + kGamma * (element >> 2));
      lanes[j * channels + c] = static_cast<int64_t>(z << (48 - 16 * (element & 3)));
    }
  }
}

INLINE int64_t wide_threshold(const Plan& p) { return (p.level - kLevels / 2) * (1ll << 48); }

KERNEL void channel_sums_last(const Plan& p, int64_t sample, const float* __restrict x,
                              int64_t* __restrict lanes, double* __restrict total,
                              double* __restrict squares) {
  const int64_t channels = p.channels, pixels = p.pixels(), least = wide_threshold(p);
  for (int64_t begin = 0; begin < pixels; begin += 4) {
    const int64_t group = std::min<int64_t>(4, pixels - begin);
    if (p.masked) draw_pixels(p, sample, begin, group, lanes);
    for (int64_t j = 0; j < group; ++j) {
      const float* __restrict v = x + (begin + j) * channels;
      const int64_t* __restrict k = lanes + j * channels;
      double t = 0.0, q = 0.0;
      if (p.masked) {
#pragma omp simd reduction(+ : t, q)
        for (int64_t c = 0; c < channels; ++c) {
          const double value = v[c];  // loaded whether it is kept or not: no branch
          const double u = k[c] >= least ? value : 0.0;
          t += u;
          q += u * u;
        }
      } else {
#pragma omp simd reduction(+ : t, q)
        for (int64_t c = 0; c < channels; ++c) {
          const double u = v[c];
          t += u;
          q += u * u;
        }
      }
      total[begin + j] = t;
      squares[begin + j] = q;
    }
  }
}

KERNEL void epilogue_last(const Plan& p, float* z, float* y, const float* __restrict mean,
                          const float* __restrict scale, const float* __restrict sums,
                          const float* __restrict bias) {
  const int64_t filters = p.filters;
  for (int64_t i = 0; i < p.positions(); ++i, z += filters, y += filters) {
    const float m = mean[i], r = scale[i];
    if (p.relu) {
#pragma omp simd
      for (int64_t o = 0; o < filters; ++o) {
        const float v = (z[o] - m * sums[o]) * r + bias[o];
        y[o] = v < 0.0f ? 0.0f : v;
      }
    } else {
#pragma omp simd
      for (int64_t o = 0; o < filters; ++o) {
        const float v = z[o] - m * sums[o];
        z[o] = v;
        y[o] = v * r + bias[o];
      }
    }
  }
}

KERNEL void reduce_gradient_last(const Plan& p, const float* __restrict g,
                                 const float* __restrict output, const float* __restrict mean,
                                 const float* __restrict scale, const float* __restrict sums,
                                 const float* __restrict bias, float* __restrict dz,
                                 float* __restrict energy, float* __restrict dmean,
                                 float* __restrict db, float* __restrict dsum) {
  const int64_t filters = p.filters;
  const float floor = p.relu ? 0.0f : -std::numeric_limits<float>::infinity();
  std::fill(db, db + filters, 0.0f);
  std::fill(dsum, dsum + filters, 0.0f);
  for (int64_t i = 0; i < p.positions(); ++i, g += filters, output += filters, dz += filters) {
    const float m = mean[i], r = scale[i];
    float e = 0.0f, t = 0.0f;
    if (p.keeps_y) {
#pragma omp simd reduction(+ : e, t)
      for (int64_t o = 0; o < filters; ++o) {
        const float value = output[o], upstream = g[o];  // loaded whatever the sign: no branch
        const float u = value > floor ? upstream : 0.0f, d = u * r;
        e += u * (value - bias[o]);
        t += d * sums[o];
        dz[o] = d;
        db[o] += u;
        dsum[o] += d * m;
      }
    } else {
#pragma omp simd reduction(+ : e, t)
      for (int64_t o = 0; o < filters; ++o) {
        const float d = g[o] * r;
        e += d * output[o];
        t += d * sums[o];
        dz[o] = d;
        db[o] += g[o];
        dsum[o] += d * m;
      }
    }
    energy[i] = e;
    dmean[i] = -t;
  }
}

KERNEL void add_through_statistics_last(const Plan& p, int64_t sample, const float* __restrict x,
                                        float* __restrict dx, const double* __restrict offset,
                                        const double* __restrict slope, int64_t* __restrict lanes) {
  const int64_t channels = p.channels, pixels = p.pixels(), least = wide_threshold(p);
  for (int64_t begin = 0; begin < pixels; begin += 4) {
    const int64_t group = std::min<int64_t>(4, pixels - begin);
    if (p.masked) draw_pixels(p, sample, begin, group, lanes);
    for (int64_t j = 0; j < group; ++j) {
      const int64_t i = begin + j;
      const double a = offset[i], q = slope[i];
      const float* __restrict v = x + i * channels;
      const int64_t* __restrict k = lanes + j * channels;
      float* __restrict d = dx + i * channels;
      if (p.masked) {
        for (int64_t c = 0; c < channels; ++c) {
          const double u = a + q * v[c], before = d[c];
          d[c] = static_cast<float>(before + (k[c] >= least ? u : 0.0));
        }
      } else {
        for (int64_t c = 0; c < channels; ++c) d[c] += static_cast<float>(a + q * v[c]);
      }
    }
  }
}

}  // namespace fedkn
//// kn_conv_contiguous.h
// The loops over maps laid out (N, C, H, W) in memory.

#pragma once

#include <algorithm>
#include <cstdint>

#include "plan.h"

namespace fedkn {

// Where a tile of pixels is the whole plane, several channels share one call of the generator.
INLINE int64_t channels_at_once(const Plan& p, int64_t tile) {
  return tile == p.pixels() ? std::max<int64_t>(1, kTile / tile) : 1;
}

// Sums over the channels of a tile of `n` pixels, in Number; `v` steps by `pixels` per channel.
template <class Number>
INLINE void add_channels(int64_t channels, int64_t pixels, int64_t n, const float* __restrict v,
                         const Lane* __restrict k, int16_t least, Number* __restrict t,
                         Number* __restrict q) {
  for (int64_t c = 0; c < channels; ++c, v += pixels, k += k ? pixels : 0) {
    if (k) {
      for (int64_t i = 0; i < n; ++i) {
        const float value = v[i];  // loaded whether it is kept or not: no branch
        const Number u = k[i] >= least ? value : 0.0f;
        t[i] += u;
        q[i] += u * u;
      }
    } else {
      for (int64_t i = 0; i < n; ++i) {
        const Number u = v[i];
        t[i] += u;
        q[i] += u * u;
      }
    }
  }
}

// `exact`: all in double. Else kGroup channels at a time in float, and their sums in double.
KERNEL void channel_sums(const Plan& p, int64_t sample, const float* __restrict x, bool exact,
                         Mask& mask, double* __restrict total, double* __restrict squares) {
  constexpr int64_t kGroup = 16;
  alignas(64) float sums[2 * kTile];
  const int64_t pixels = p.pixels();
  std::fill(total, total + pixels, 0.0);
  std::fill(squares, squares + pixels, 0.0);
  for (int64_t begin = 0; begin < pixels; begin += kTile) {
    const int64_t tile = std::min(kTile, pixels - begin);
    const int64_t block = channels_at_once(p, tile);
    double* __restrict t = total + begin;
    double* __restrict q = squares + begin;
    float* __restrict ft = sums, * __restrict fq = sums + kTile;
    int64_t pending = 0;
    for (int64_t c0 = 0; c0 < p.channels; c0 += block) {
      const int64_t count = std::min(block, p.channels - c0);
      const float* v = x + c0 * pixels + begin;
      const Lane* k = nullptr;
      if (p.masked) k = draw(p, sample, c0 * pixels + begin, (count - 1) * pixels + tile, mask);
      if (exact) {
        add_channels(count, pixels, tile, v, k, threshold(p), t, q);
        continue;
      }
      if (!pending) std::fill(ft, ft + tile, 0.0f), std::fill(fq, fq + tile, 0.0f);
      add_channels(count, pixels, tile, v, k, threshold(p), ft, fq);
      pending += count;
      if (pending >= kGroup || c0 + count == p.channels) {
        for (int64_t i = 0; i < tile; ++i) t[i] += ft[i];
        for (int64_t i = 0; i < tile; ++i) q[i] += fq[i];
        pending = 0;
      }
    }
  }
}

// In place on z, which becomes z - mean * S; y may be z itself.
KERNEL void epilogue(const Plan& p, float* z, float* y, const float* __restrict mean,
                     const float* __restrict scale, const float* sums, const float* bias) {
  const int64_t n = p.positions();
  for (int64_t o = 0; o < p.filters; ++o, z += n, y += n) {
    const float sum = p.centred ? 0.0f : sums[o], shift = bias ? bias[o] : 0.0f;
    if (p.relu) {
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) {
        const float v = (z[i] - mean[i] * sum) * scale[i] + shift;
        y[i] = v < 0.0f ? 0.0f : v;
      }
    } else {
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) {
        const float v = z[i] - mean[i] * sum;
        z[i] = v;
        y[i] = v * scale[i] + shift;
      }
    }
  }
}

// One pass over g: dz, and all sums of it that the gradients need.
KERNEL void reduce_gradient(const Plan& p, const float* __restrict g,
                            const float* __restrict output, const float* __restrict mean,
                            const float* __restrict scale, const float* sums, const float* bias,
                            float* __restrict dz, float* __restrict energy, float* __restrict dmean,
                            float* __restrict db, float* __restrict dsum) {
  const int64_t n = p.positions();
  std::fill(energy, energy + n, 0.0f);
  std::fill(dmean, dmean + n, 0.0f);
  for (int64_t o = 0; o < p.filters; ++o, g += n, output += n, dz += n) {
    const float sum = p.centred ? 0.0f : sums[o], shift = bias ? bias[o] : 0.0f;
    const float floor = p.relu ? 0.0f : -std::numeric_limits<float>::infinity();
    float b = 0.0f, m = 0.0f;
    if (p.keeps_y) {
#pragma omp simd reduction(+ : b, m)
      for (int64_t i = 0; i < n; ++i) {
        const float value = output[i], upstream = g[i];  // loaded whatever the sign: no branch
        const float u = value > floor ? upstream : 0.0f, d = u * scale[i];
        energy[i] += u * (value - shift);
        dz[i] = d;
        dmean[i] -= d * sum;
        b += u;
        m += d * mean[i];
      }
    } else {
#pragma omp simd reduction(+ : b, m)
      for (int64_t i = 0; i < n; ++i) {
        const float d = g[i] * scale[i];
        energy[i] += d * output[i];
        dz[i] = d;
        dmean[i] -= d * sum;
        b += g[i];
        m += d * mean[i];
      }
    }
    db[o] = b;
    dsum[o] = m;
  }
}

// dx += mask * (offset + slope * x), with B' of what reaches mean and variance.
template <class Number>
INLINE void add_lines(int64_t channels, int64_t pixels, int64_t n, const float* __restrict v,
                      const Lane* __restrict k, int16_t least, const Number* __restrict a,
                      const Number* __restrict q, float* __restrict d) {
  for (int64_t c = 0; c < channels; ++c, v += pixels, d += pixels, k += k ? pixels : 0) {
    if (k) {
      for (int64_t i = 0; i < n; ++i) {
        const float u = static_cast<float>(a[i] + q[i] * v[i]), before = d[i];
        d[i] = before + (k[i] >= least ? u : 0.0f);
      }
    } else {
      for (int64_t i = 0; i < n; ++i) d[i] += static_cast<float>(a[i] + q[i] * v[i]);
    }
  }
}

KERNEL void add_through_statistics(const Plan& p, int64_t sample, const float* __restrict x,
                                   float* __restrict dx, const double* __restrict offset,
                                   const double* __restrict slope, bool exact, Mask& mask) {
  alignas(64) float lines[2 * kTile];
  const int64_t pixels = p.pixels();
  for (int64_t begin = 0; begin < pixels; begin += kTile) {
    const int64_t tile = std::min(kTile, pixels - begin);
    const int64_t block = channels_at_once(p, tile);
    float* __restrict fa = lines, * __restrict fq = lines + kTile;
    std::copy(offset + begin, offset + begin + tile, fa);
    std::copy(slope + begin, slope + begin + tile, fq);
    for (int64_t c0 = 0; c0 < p.channels; c0 += block) {
      const int64_t count = std::min(block, p.channels - c0), at = c0 * pixels + begin;
      const Lane* k = nullptr;
      if (p.masked) k = draw(p, sample, at, (count - 1) * pixels + tile, mask);
      if (exact) {
        add_lines(count, pixels, tile, x + at, k, threshold(p), offset + begin, slope + begin,
                  dx + at);
      } else {
        add_lines(count, pixels, tile, x + at, k, threshold(p), fa, fq, dx + at);
      }
    }
  }
}

}  // namespace fedkn
//// max_pool.h
// 2x2 max-pooling with stride 2, forward and backward, in either layout of the maps.
//
// Kept for the backward pass is which of a window's four numbers won, not the map; the gradient is
// written once instead of being added to zeros.

#pragma once

#include <torch/csrc/autograd/autograd.h>

#include "common.h"

namespace fedkn::max_pool {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr int32_t kNobody = 4;

// The largest of a window's numbers and its place, the first of several equal ones; a NaN wins, as
// in PyTorch. Written in choices between values, which the compiler vectorizes.
struct Winner {
  float value;
  int32_t place;
};

INLINE Winner largest(float a, float b, float c, float d) {
  const float ab = a > b ? a : b, cd = c > d ? c : d, most = ab > cd ? ab : cd;
  int32_t place = 3;
  place = c == most ? 2 : place;
  place = b == most ? 1 : place;
  place = a == most ? 0 : place;
  const bool odd = (a != a) | (b != b) | (c != c) | (d != d);
  return {odd ? a + b + c + d : most, place};
}

struct Shape {
  int64_t planes, height, width, each;  // `each` numbers lie side by side for every pixel
  int64_t rows, columns;

  Shape(IntArrayRef x, bool last) {
    planes = last ? x[0] : x[0] * x[1];
    each = last ? x[1] : 1;
    height = x[2], width = x[3], rows = height / 2, columns = width / 2;
  }
  int64_t size() const { return height * width * each; }
  int64_t pooled() const { return rows * columns * each; }
};

bool channels_last(const Tensor& x) {
  return !x.is_contiguous() && x.is_contiguous(at::MemoryFormat::ChannelsLast);
}

at::MemoryFormat format(bool last) {
  return last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
}

// One row of windows; `each` is 1 where the layout is contiguous, so that its loop is over pixels.
template <bool keep>
INLINE void pool_row(const Shape& s, const float* __restrict upper, const float* __restrict lower,
                     float* __restrict y, int32_t* __restrict winner) {
  if (s.each == 1) {
#pragma omp simd
    for (int64_t i = 0; i < s.columns; ++i) {
      const Winner w = largest(upper[2 * i], upper[2 * i + 1], lower[2 * i], lower[2 * i + 1]);
      y[i] = w.value;
      if (keep) winner[i] = w.place;
    }
    return;
  }
  const int64_t n = s.each;
  for (int64_t j = 0; j < s.columns; ++j, upper += 2 * n, lower += 2 * n, y += n, winner += n) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      const Winner w = largest(upper[i], upper[n + i], lower[i], lower[n + i]);
      y[i] = w.value;
      if (keep) winner[i] = w.place;
    }
  }
}

KERNEL void pool(const Shape& s, const float* x, float* y, int32_t* winner, bool keep) {
  const int64_t row = s.width * s.each, pooled = s.columns * s.each;
  for (int64_t r = 0; r < s.rows; ++r, x += 2 * row, y += pooled, winner += pooled) {
    keep ? pool_row<true>(s, x, x + row, y, winner) : pool_row<false>(s, x, x + row, y, winner);
  }
}

INLINE void spread_row(const Shape& s, const float* __restrict g, const int32_t* __restrict winner,
                       float* __restrict upper, float* __restrict lower) {
  if (s.each == 1) {
#pragma omp simd
    for (int64_t i = 0; i < s.columns; ++i) {
      const float h = g[i];
      const int32_t w = winner[i];
      const float a = w == 0 ? h : 0.0f, b = w == 1 ? h : 0.0f;
      upper[2 * i] = a;
      upper[2 * i + 1] = b;
    }
#pragma omp simd
    for (int64_t i = 0; i < s.columns; ++i) {
      const float h = g[i];
      const int32_t w = winner[i];
      const float c = w == 2 ? h : 0.0f, d = w == 3 ? h : 0.0f;
      lower[2 * i] = c;
      lower[2 * i + 1] = d;
    }
    return;
  }
  const int64_t n = s.each;
  for (int64_t j = 0; j < s.columns; ++j, upper += 2 * n, lower += 2 * n, g += n, winner += n) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      const float h = g[i];
      const int32_t w = winner[i];
      const float a = w == 0 ? h : 0.0f, b = w == 1 ? h : 0.0f, c = w == 2 ? h : 0.0f,
                  d = w == 3 ? h : 0.0f;
      upper[i] = a;
      upper[n + i] = b;
      lower[i] = c;
      lower[n + i] = d;
    }
  }
}

KERNEL void spread(const Shape& s, const float* g, const int32_t* winner, float* dx) {
  const int64_t row = s.width * s.each, pooled = s.columns * s.each;
  const int64_t odd = (s.width - 2 * s.columns) * s.each;
  for (int64_t r = 0; r < s.rows; ++r, dx += 2 * row, g += pooled, winner += pooled) {
    spread_row(s, g, winner, dx, dx + row);
    std::fill(dx + row - odd, dx + row, 0.0f);
    std::fill(dx + 2 * row - odd, dx + 2 * row, 0.0f);
  }
  if (s.height > 2 * s.rows) std::fill(dx, dx + row, 0.0f);
}

std::tuple<Tensor, Tensor> forward(const Tensor& x, bool keep) {
  const bool last = channels_last(x);
  const Shape s(x.sizes(), last);
  Tensor y = at::empty({x.size(0), x.size(1), s.rows, s.columns}, x.options(), format(last));
  Tensor winner = keep ? at::empty_like(y, y.options().dtype(at::kInt)) : Tensor();
  const float* xs = x.const_data_ptr<float>();
  float* ys = y.data_ptr<float>();
  int32_t* winners = keep ? winner.data_ptr<int32_t>() : nullptr;
  at::parallel_for(0, s.planes, 1, [&](int64_t from, int64_t until) {
    for (int64_t n = from; n < until; ++n) {
      pool(s, xs + n * s.size(), ys + n * s.pooled(), keep ? winners + n * s.pooled() : nullptr,
           keep);
    }
  });
  return {y, winner};
}

std::tuple<Tensor, Tensor> max_pool_forward(const Tensor& x) { return forward(x, true); }

Tensor max_pool_backward(const Tensor& upstream, const Tensor& winner, IntArrayRef size,
                         bool last) {
  const Tensor g = upstream.contiguous(format(last));
  Tensor dx = at::empty(size, g.options(), format(last));
  const Shape s(size, last);
  const float* gs = g.const_data_ptr<float>();
  const int32_t* winners = winner.const_data_ptr<int32_t>();
  float* dxs = dx.data_ptr<float>();
  at::parallel_for(0, s.planes, 1, [&](int64_t from, int64_t until) {
    for (int64_t n = from; n < until; ++n) {
      spread(s, gs + n * s.pooled(), winners + n * s.pooled(), dxs + n * s.size());
    }
  });
  return dx;
}

struct Function : torch::autograd::Function<Function> {
  static Tensor forward(AutogradContext* context, const Tensor& x) {
    at::AutoDispatchBelowADInplaceOrView guard;
    static const auto op = typed<decltype(max_pool_forward)>("max_pool_forward");
    auto [y, winner] = op.call(x);
    context->save_for_backward({winner});
    context->saved_data["size"] = x.sizes();
    context->saved_data["last"] = channels_last(x);
    return y;
  }

  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    const Tensor winner = context->get_saved_variables()[0];
    const std::vector<int64_t> size = context->saved_data["size"].toIntVector();
    if (at::GradMode::is_enabled()) {  // gradients of gradients: rare, and linear in g
      Tensor places = winner.to(at::kLong);
      const Tensor columns = at::arange(winner.size(3), places.options()).mul(2);
      const Tensor rows = at::arange(winner.size(2), places.options()).mul(2).unsqueeze(1);
      places = rows.add(places.div(2, "floor")).mul(size[3]).add(columns).add(places.remainder(2));
      return {at::zeros({size[0], size[1], size[2] * size[3]}, gradients[0].options())
                  .scatter_add(2, places.flatten(2), gradients[0].flatten(2))
                  .view(size)};
    }
    at::AutoDispatchBelowADInplaceOrView guard;
    static const auto op = typed<decltype(max_pool_backward)>("max_pool_backward");
    return {op.call(gradients[0], winner, size, context->saved_data["last"].toBool())};
  }
};

Tensor apply(const Tensor& x) {
  if (at::GradMode::is_enabled() && x.requires_grad()) return Function::apply(x);
  at::AutoDispatchBelowADInplaceOrView guard;
  return std::get<0>(forward(x, false));
}

}  // namespace fedkn::max_pool
//// operators.cpp
// The operators that PyTorch knows the kernels by; everything is compiled with this file.
//
// One translation unit: PyTorch's headers take longer to compile than all of the kernels.

#include <torch/library.h>

#include "first_convolution.h"
#include "group_norm_autograd.h"
#include "kn_conv.h"
#include "max_pool.h"
#include "step.h"
#include "winograd_convolution.h"

TORCH_LIBRARY(fedkn_native, m) {
  m.def(
      "convolution(Tensor x, Tensor weight, Tensor? bias, int[2] stride, int[2] padding, "
      "int[2] dilation, int groups, int clients, int[]? keys, int level, float eps, bool relu, "
      "bool keeps_output) -> Tensor",
      &fedkn::convolution);
  m.def(
      "convolution_forward(Tensor x, Tensor weight, Tensor? bias, int[2] stride, int[2] padding, "
      "int[2] dilation, int groups, int clients, int[]? keys, int level, float eps, bool relu, "
      "bool keeps_output) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "convolution_backward(Tensor g, Tensor x, Tensor weight, Tensor output, Tensor moments, "
      "Tensor values, int[2] stride, int[2] padding, int[2] dilation, int groups, int clients, "
      "int[]? keys, int level, float eps, bool relu, bool keeps_output, bool[3] wanted) -> "
      "(Tensor, Tensor, Tensor)");
  m.def(
      "gradients(Tensor g, Tensor x, Tensor weight, Tensor? bias, int[2] stride, int[2] padding, "
      "int[2] dilation, int groups, int clients, int[]? keys, int level, float eps, bool relu, "
      "bool want_x, bool want_weight, bool want_bias) -> (Tensor, Tensor, Tensor)");
  m.def("max_pool(Tensor x) -> Tensor", &fedkn::max_pool::apply);
  m.def("max_pool_forward(Tensor x) -> (Tensor, Tensor)");
  m.def("max_pool_backward(Tensor g, Tensor winner, int[] size, bool last) -> Tensor");
  m.def(
      "group_norm(Tensor x, int groups, Tensor weight, Tensor bias, float eps, bool relu, "
      "bool pool) -> Tensor",
      &fedkn::group_norm::apply);
  m.def(
      "group_norm_forward(Tensor x, int groups, Tensor weight, Tensor bias, float eps, bool relu, "
      "bool pool) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "group_norm_backward(Tensor g, Tensor x, Tensor weight, Tensor bias, Tensor mean, "
      "Tensor inverse, Tensor? winner, int groups, bool relu, bool want_x) -> "
      "(Tensor, Tensor, Tensor)");
  m.def("first_convolution(Tensor x, Tensor weight) -> Tensor", &fedkn::first_convolution::apply);
  m.def("first_convolution_forward(Tensor x, Tensor weight) -> Tensor");
  m.def("first_convolution_backward(Tensor g, Tensor x, Tensor weight) -> Tensor");
  m.def("winograd_lanes(int[] size, int filters) -> int", &fedkn::winograd::winograd_lanes);
  m.def("winograd(Tensor x, Tensor weight, int lanes) -> Tensor", &fedkn::winograd::apply);
  m.def("winograd_forward(Tensor x, Tensor weight, int lanes) -> Tensor");
  m.def(
      "winograd_backward(Tensor g, Tensor x, Tensor weight, int lanes, bool[2] wanted) -> "
      "(Tensor, Tensor)");
  m.class_<fedkn::step::Step>("Step")
      .def(torch::init<std::vector<fedkn::Tensor>, int64_t>())
      .def("add", &fedkn::step::Step::add)
      .def("seed", &fedkn::step::Step::seed)
      .def("take", &fedkn::step::Step::take);
}

TORCH_LIBRARY_IMPL(fedkn_native, CPU, m) {
  m.impl("convolution_forward", &fedkn::convolution_forward);
  m.impl("convolution_backward", &fedkn::convolution_backward);
  m.impl("max_pool_forward", &fedkn::max_pool::max_pool_forward);
  m.impl("max_pool_backward", &fedkn::max_pool::max_pool_backward);
  m.impl("group_norm_forward", &fedkn::group_norm::group_norm_forward);
  m.impl("group_norm_backward", &fedkn::group_norm::group_norm_backward);
  m.impl("first_convolution_forward", &fedkn::first_convolution::first_convolution_forward);
  m.impl("first_convolution_backward", &fedkn::first_convolution::first_convolution_backward);
  m.impl("winograd_forward", &fedkn::winograd::winograd_forward);
  m.impl("winograd_backward", &fedkn::winograd::winograd_backward);
}
//// plan.h
// The geometry of a layer, the dropout generator, the box filter.

#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <vector>

#include "common.h"

namespace fedkn {

constexpr uint64_t kGamma = 0x9E3779B97F4A7C15ull;
constexpr int64_t kLevels = 1 << 16;
constexpr int64_t kTile = 4096;  // elements handled at once, so that the working set stays in L1/L2

// Several clients, each with filters and masks of its own, lie side by side in the channels: x is
// (batch, clients * channels, …), y (batch, clients * filters, …). A sample is one client's.
struct Plan {
  int64_t clients;
  int64_t samples, channels, height, width;  // x
  int64_t filters, rows, columns;            // y
  std::array<int64_t, 2> kernel, stride, padding, dilation;
  int64_t groups;
  bool masked, centred, relu;
  bool keeps_y;                // y is the map kept for the backward pass, not z
  bool last;                   // whether maps are laid out channels last in memory
  std::vector<uint64_t> keys;  // one for each client; empty unless masked
  int64_t level;
  double first, second;  // weights of the unit's sum and sum of squares
  double eps;

  at::MemoryFormat format() const {
    return last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
  }
  int64_t pixels() const { return height * width; }
  int64_t positions() const { return rows * columns; }
  int64_t all_filters() const { return clients * filters; }
  int64_t batch() const { return samples / clients; }
  uint64_t words() const { return (channels * height * width + 3) / 4; }
  // Where the mask of a sample starts in its client's sequence.
  uint64_t start(int64_t sample) const {
    return keys[sample % clients] + kGamma * static_cast<uint64_t>(sample / clients) * words();
  }
};

Plan make_plan(const Tensor& x, const Tensor& weight, IntArrayRef stride, IntArrayRef padding,
               IntArrayRef dilation, int64_t groups, int64_t clients, at::OptionalIntArrayRef keys,
               int64_t level, double eps, bool relu, bool keeps_output) {
  Plan p;
  p.clients = clients;
  p.samples = x.size(0) * clients, p.channels = x.size(1) / clients;
  p.height = x.size(2), p.width = x.size(3);
  p.filters = weight.size(0) / clients;
  int64_t out[2];
  for (int d = 0; d < 2; ++d) {
    p.kernel[d] = weight.size(2 + d);
    p.stride[d] = stride[d], p.padding[d] = padding[d], p.dilation[d] = dilation[d];
    out[d] = (x.size(2 + d) + 2 * padding[d] - dilation[d] * (p.kernel[d] - 1) - 1) / stride[d] + 1;
  }
  p.rows = out[0], p.columns = out[1];
  p.groups = groups;
  p.masked = keys.has_value();
  p.centred = !p.masked && groups == 1;
  p.relu = relu;
  p.keeps_y = relu || keeps_output;
  // As PyTorch's own convolution chooses.
  p.last = clients == 1 && (x.suggest_memory_format() == at::MemoryFormat::ChannelsLast ||
                            weight.suggest_memory_format() == at::MemoryFormat::ChannelsLast);
  if (keys) p.keys.assign(keys->begin(), keys->end());
  p.level = level;
  p.eps = eps;
  const double n = static_cast<double>(p.channels * p.kernel[0] * p.kernel[1]);
  const double keep = 1.0 - static_cast<double>(level) / kLevels;
  p.first = p.masked ? 1.0 / (n * keep) : 1.0 / n;
  p.second = p.masked ? 1.0 / (n * keep * keep) : (1.0 + (1.0 - keep) / keep * (1.0 - 1.0 / n)) / n;
  return p;
}

// What the generator writes: a lane of 16 bits per element, kept where it reaches the threshold.
struct Mask {
  alignas(64) uint64_t words[kTile / 4 + 2];
};
// Without may_alias the compiler could assume that the lanes are not the words just written.
using Lane __attribute__((may_alias)) = int16_t;

INLINE int16_t threshold(const Plan& p) { return static_cast<int16_t>(p.level - kLevels / 2); }

INLINE uint64_t finalised(uint64_t z) {
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  return z ^ (z >> 31);
}

// Lanes of the elements [start, start + count) of one sample, count <= kTile.
INLINE const Lane* draw(const Plan& p, int64_t sample, int64_t start, int64_t count, Mask& mask) {
  const int64_t from = start / 4, until = (start + count + 3) / 4;
  const uint64_t base = p.start(sample) + kGamma * static_cast<uint64_t>(from + 1);
  for (int64_t i = 0; i < until - from; ++i) {
    mask.words[i] = finalised(base + kGamma * static_cast<uint64_t>(i));
  }
  return reinterpret_cast<const Lane*>(mask.words) + (start - from * 4);
}

// Calls f(k, from, until, offset) with the output columns (or rows) [from, until) whose tap k lies
// inside the input, at index * stride + offset.
template <class F>
INLINE void taps(const Plan& p, int d, int64_t inputs, int64_t outputs, F f) {
  for (int64_t k = 0; k < p.kernel[d]; ++k) {
    const int64_t offset = k * p.dilation[d] - p.padding[d], s = p.stride[d];
    const int64_t from = offset >= 0 ? 0 : (-offset + s - 1) / s;
    const int64_t until = offset >= inputs ? 0 : std::min(outputs, (inputs - 1 - offset) / s + 1);
    if (from < until) f(from, until, offset);
  }
}

// Sum of `map` over each window. `scratch` holds rows * width doubles.
KERNEL void box(const Plan& p, const double* __restrict map, double* __restrict scratch,
                double* __restrict out) {
  const int64_t w = p.width, s = p.stride[1];
  std::fill(scratch, scratch + p.rows * w, 0.0);
  taps(p, 0, p.height, p.rows, [&](int64_t from, int64_t until, int64_t offset) INLINED {
    for (int64_t i = from; i < until; ++i) {
      const double* __restrict a = map + (i * p.stride[0] + offset) * w;
      double* __restrict b = scratch + i * w;
      for (int64_t j = 0; j < w; ++j) b[j] += a[j];
    }
  });
  std::fill(out, out + p.positions(), 0.0);
  taps(p, 1, w, p.columns, [&](int64_t from, int64_t until, int64_t offset) INLINED {
    for (int64_t i = 0; i < p.rows; ++i) {
      const double* __restrict a = scratch + i * w + offset;
      double* __restrict b = out + i * p.columns;
      if (s == 1) {
        for (int64_t j = from; j < until; ++j) b[j] += a[j];
      } else {
        for (int64_t j = from; j < until; ++j) b[j] += a[j * s];
      }
    }
  });
}

// The transpose of `box`.
KERNEL void unbox(const Plan& p, const double* __restrict map, double* __restrict scratch,
                  double* __restrict out) {
  const int64_t w = p.width, s = p.stride[1];
  std::fill(scratch, scratch + p.rows * w, 0.0);
  taps(p, 1, w, p.columns, [&](int64_t from, int64_t until, int64_t offset) INLINED {
    for (int64_t i = 0; i < p.rows; ++i) {
      double* __restrict a = scratch + i * w + offset;
      const double* __restrict b = map + i * p.columns;
      if (s == 1) {
        for (int64_t j = from; j < until; ++j) a[j] += b[j];
      } else {
        for (int64_t j = from; j < until; ++j) a[j * s] += b[j];
      }
    }
  });
  std::fill(out, out + p.pixels(), 0.0);
  taps(p, 0, p.height, p.rows, [&](int64_t from, int64_t until, int64_t offset) INLINED {
    for (int64_t i = from; i < until; ++i) {
      double* __restrict a = out + (i * p.stride[0] + offset) * w;
      const double* __restrict b = scratch + i * w;
      for (int64_t j = 0; j < w; ++j) a[j] += b[j];
    }
  });
}

// Whether a mean is so many deviations from zero that float sums would lose its variance's digits.
constexpr double kFar = 32.0;

// Mean and scale from the sums; returns whether some mean is far.
KERNEL bool moments(const Plan& p, const double* __restrict total, const double* __restrict squares,
                    float* __restrict mean, float* __restrict scale) {
  const auto eps = static_cast<float>(p.eps);
  double most = -1.0;
#pragma omp simd reduction(max : most)
  for (int64_t i = 0; i < p.positions(); ++i) {
    const double m = total[i] * p.first, m2 = m * m;
    const double v = squares[i] * p.second - m2;
    const double excess = m2 - kFar * v;
    most = excess > most ? excess : most;
    mean[i] = static_cast<float>(m);
    scale[i] = 1.0f / std::sqrt(static_cast<float>(v > 0.0 ? v : 0.0) + eps);
  }
  return most > 0.0;
}

// What reaches sum and sum of squares through mean and variance; returns as `moments` does.
KERNEL bool through_moments(const Plan& p, const float* __restrict mean,
                            const float* __restrict scale, const float* __restrict energy,
                            const float* __restrict dmean, double* __restrict offset,
                            double* __restrict slope) {
  float most = 0.0f;
#pragma omp simd reduction(max : most)
  for (int64_t i = 0; i < p.positions(); ++i) {
    const double m = mean[i], r = scale[i], dvar = -0.5 * r * r * energy[i];
    const float ratio = mean[i] * mean[i] * scale[i] * scale[i];
    most = ratio > most ? ratio : most;
    offset[i] = (dmean[i] - 2.0 * dvar * m) * p.first;
    slope[i] = 2.0 * dvar * p.second;
  }
  return most > kFar;
}

}  // namespace fedkn
//// step.h
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
//// vectors.h
// Vectors of the processor's width, for kernels in which how much fits into the registers is part
// of the code: for these the compiler's target_clones will not do.

#pragma once

#include <cstdint>
#include <cstring>

#include "common.h"

namespace fedkn {

// How wide the vectors are and how many numbers of a product are kept in registers: for 32
// registers of 16 numbers, and for 16 of 8.
struct Wide {
  static constexpr int64_t lanes = 16, rows = 8;
};
struct Narrow {
  static constexpr int64_t lanes = 8, rows = 4;
};

template <int64_t lanes>
struct Vector {
  typedef float Type __attribute__((vector_size(4 * lanes)));
};

// A vector begins where it begins: not aligned.
template <class V>
INLINE V load(const float* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class V>
INLINE void store(float* p, const V& v) {
  std::memcpy(p, &v, sizeof v);
}

#if defined(__x86_64__) && defined(__GNUC__)
#define WIDE __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")))
#define NARROW __attribute__((target("avx2,fma")))

// The numbers of a vector of this processor; 0: it has none of these.
inline int64_t processors_lanes() {
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 0;
  const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return wide ? Wide::lanes : Narrow::lanes;
}
#else
#define WIDE
#define NARROW

inline int64_t processors_lanes() { return 0; }
#endif

template <class F>
WIDE void run_wide(F f) {
  f(Wide());
}
template <class F>
NARROW void run_narrow(F f) {
  f(Narrow());
}

// Calls f(level), compiled for vectors of so many numbers.
template <class F>
void run(int64_t lanes, F f) {
  if (lanes == Wide::lanes) return run_wide(f);
  if (lanes == Narrow::lanes) return run_narrow(f);
  f(Narrow());  // by whatever the processor has
}

}  // namespace fedkn
//// winograd.h
// The loops of a 3x3 convolution by Winograd's algorithm F(2x2, 3x3): 16 products for what
// takes 36.
//
// Every 2x2 tile of the output is A'[(G w G') . (B' d B)]A of its 4x4 patch d of the input, where .
// multiplies number by number: Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks",
// CVPR 2016, arXiv 1509.09308, section 4.1. So each of the 16 places is a product of matrices,
// tiles by channels times channels by filters. The gradients are its adjoints: the input's is the
// same convolution by the filters turned round, the filters' is G'[(A g A') . (B' d B)]G, summed
// over the tiles. Maps are channels last; vectors run over channels or filters.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "vectors.h"

namespace fedkn::winograd {

constexpr int64_t kPlaces = 16;  // of a patch
constexpr int64_t kTiles = 32;   // at once: what is made of them stays in the L2 cache
// Between the places: else all 16 would share a few sets of the L1 cache.
constexpr int64_t kGap = 16;

struct Shape {
  int64_t samples, channels, filters, height, width;

  int64_t down() const { return (height + 1) / 2; }
  int64_t across() const { return (width + 1) / 2; }
  int64_t tiles() const { return samples * down() * across(); }
  int64_t weights() const { return channels * filters; }
};

// Numbers from one place to the next, where each place has `rows` rows of `columns` numbers.
INLINE int64_t place_stride(int64_t rows, int64_t columns) { return rows * columns + kGap; }

// A tile's place in the maps, and the next.
struct Tile {
  int64_t sample, row, column;

  INLINED Tile(const Shape& s, int64_t number)
      : sample(number / s.across() / s.down()),
        row(number / s.across() % s.down()),
        column(number % s.across()) {}
  INLINE void next(const Shape& s) {
    if (++column < s.across()) return;
    column = 0;
    if (++row < s.down()) return;
    row = 0;
    ++sample;
  }
};

// Where the numbers of `size` x `size` pixels begin; outside the map they are `zeros`.
template <int64_t size>
struct Pixels {
  const float* at[size][size];

  INLINED Pixels(const Shape& s, const float* map, int64_t channels, int64_t top, int64_t left,
                 const float* zeros) {
    for (int64_t i = 0; i < size; ++i) {
      const bool inside = top + i >= 0 && top + i < s.height;
      const float* row = map + ((top + i) * s.width + left) * channels;
      for (int64_t j = 0; j < size; ++j) {
        at[i][j] = inside && left + j >= 0 && left + j < s.width ? row + j * channels : zeros;
      }
    }
  }
  INLINED const float* operator()(int64_t i, int64_t j) const { return at[i][j]; }
};

// The same where all are inside.
struct Inside {
  const float* first;
  int64_t row, pixel;

  INLINED const float* operator()(int64_t i, int64_t j) const {
    return first + i * row + j * pixel;
  }
};

// B' d B of a patch d, for `channels` channels, to out + place * stride.
template <int64_t lanes, class Of>
INLINE void transform_patch(const Of& of, int64_t channels, float* out, int64_t stride) {
  using V = typename Vector<lanes>::Type;
  for (int64_t c = 0; c < channels; c += lanes) {
    V t[4][4];
#pragma GCC unroll 4
    for (int64_t j = 0; j < 4; ++j) {
      const V a = load<V>(of(0, j) + c), b = load<V>(of(1, j) + c), d = load<V>(of(2, j) + c),
              e = load<V>(of(3, j) + c);
      t[0][j] = a - d, t[1][j] = b + d, t[2][j] = d - b, t[3][j] = b - e;
    }
#pragma GCC unroll 4
    for (int64_t i = 0; i < 4; ++i) {
      float* p = out + 4 * i * stride + c;
      store<V>(p, t[i][0] - t[i][2]);
      store<V>(p + stride, t[i][1] + t[i][2]);
      store<V>(p + 2 * stride, t[i][2] - t[i][1]);
      store<V>(p + 3 * stride, t[i][1] - t[i][3]);
    }
  }
}

// A g A' of a tile's gradient g.
template <int64_t lanes, class Of>
INLINE void transform_gradient(const Of& of, int64_t channels, float* out, int64_t stride) {
  using V = typename Vector<lanes>::Type;
  for (int64_t c = 0; c < channels; c += lanes) {
    const V a = load<V>(of(0, 0) + c), b = load<V>(of(0, 1) + c), d = load<V>(of(1, 0) + c),
            e = load<V>(of(1, 1) + c);
    const V left[4] = {a, a + d, a - d, -d}, right[4] = {b, b + e, b - e, -e};
#pragma GCC unroll 4
    for (int64_t i = 0; i < 4; ++i) {
      float* p = out + 4 * i * stride + c;
      store<V>(p, left[i]);
      store<V>(p + stride, left[i] + right[i]);
      store<V>(p + 2 * stride, left[i] - right[i]);
      store<V>(p + 3 * stride, -right[i]);
    }
  }
}

// A' m A, a tile of the output at `y`; what of it lies outside the map is left out.
template <int64_t lanes>
INLINE void transform_tile(const Shape& s, const Tile& tile, const float* m, int64_t stride,
                           float* y) {
  using V = typename Vector<lanes>::Type;
  const int64_t pixel = s.filters, row = s.width * pixel;
  const bool right = 2 * tile.column + 1 < s.width, below = 2 * tile.row + 1 < s.height;
  for (int64_t c = 0; c < s.filters; c += lanes) {
    V top[4], bottom[4];
#pragma GCC unroll 4
    for (int64_t j = 0; j < 4; ++j) {
      const float* p = m + j * stride + c;
      const V b = load<V>(p + 4 * stride), d = load<V>(p + 8 * stride);
      top[j] = load<V>(p) + (b + d);
      bottom[j] = (b - d) - load<V>(p + 12 * stride);
    }
    store<V>(y + c, top[0] + (top[1] + top[2]));
    if (right) store<V>(y + pixel + c, (top[1] - top[2]) - top[3]);
    if (!below) continue;
    store<V>(y + row + c, bottom[0] + (bottom[1] + bottom[2]));
    if (right) store<V>(y + row + pixel + c, (bottom[1] - bottom[2]) - bottom[3]);
  }
}

// Three factors: the strides of a's rows and inner dimension, those of b's and of out's rows.
struct Strides {
  int64_t row, inner, b, out;
};

// out (rows, lanes * vectors) = or += the sum over k of a[row][k] * b[k][column].
template <int64_t lanes, int64_t rows, int64_t vectors, bool add>
INLINE void multiply_block(int64_t inner, const Strides& at, const float* a, const float* b,
                           float* out) {
  using V = typename Vector<lanes>::Type;
  V sums[rows][vectors];
#pragma GCC unroll 8
  for (int64_t r = 0; r < rows; ++r) {
#pragma GCC unroll 2
    for (int64_t v = 0; v < vectors; ++v) {
      sums[r][v] = add ? load<V>(out + r * at.out + v * lanes) : V{};
    }
  }
  for (int64_t k = 0; k < inner; ++k, a += at.inner, b += at.b) {
    V numbers[vectors];
#pragma GCC unroll 2
    for (int64_t v = 0; v < vectors; ++v) numbers[v] = load<V>(b + v * lanes);
#pragma GCC unroll 8
    for (int64_t r = 0; r < rows; ++r) {
      const float factor = a[r * at.row];
#pragma GCC unroll 2
      for (int64_t v = 0; v < vectors; ++v) sums[r][v] += factor * numbers[v];
    }
  }
#pragma GCC unroll 8
  for (int64_t r = 0; r < rows; ++r) {
#pragma GCC unroll 2
    for (int64_t v = 0; v < vectors; ++v) store<V>(out + r * at.out + v * lanes, sums[r][v]);
  }
}

template <int64_t lanes, int64_t each, int64_t vectors, bool add>
INLINE void multiply_by(int64_t rows, int64_t inner, int64_t columns, const Strides& at,
                        const float* a, const float* b, float* out) {
  for (int64_t c = 0; c < columns; c += lanes * vectors) {
    for (int64_t r = 0; r < rows; r += each) {
      multiply_block<lanes, each, vectors, add>(inner, at, a + r * at.row, b + c,
                                                out + r * at.out + c);
    }
  }
}

constexpr int64_t kRows = 8;  // rows come in eights, columns too

template <class Level, bool add>
INLINE void multiply(int64_t rows, int64_t inner, int64_t columns, const Strides& at,
                     const float* a, const float* b, float* out) {
  if (columns % (2 * Level::lanes) == 0) {
    multiply_by<Level::lanes, Level::rows, 2, add>(rows, inner, columns, at, a, b, out);
  } else if (columns % Level::lanes == 0) {
    multiply_by<Level::lanes, kRows, 1, add>(rows, inner, columns, at, a, b, out);
  } else {
    multiply_by<8, kRows, 1, add>(rows, inner, columns, at, a, b, out);
  }
}

// Calls f(lanes), a constant that divides `channels`.
template <class Level, class F>
INLINE void with_lanes(int64_t channels, F f) {
  if (channels % Level::lanes) {
    f(std::integral_constant<int64_t, 8>());
  } else {
    f(std::integral_constant<int64_t, Level::lanes>());
  }
}

// Room for what is made of kTiles tiles, and a pixel of zeros.
struct Room {
  float *patches, *products;
  const float* zeros;
};

// The transformed patches of tiles [from, from + count), (place, tile, channel).
template <class Level>
INLINE void transform_patches(const Shape& s, const float* x, int64_t from, int64_t count,
                              const Room& room) {
  const int64_t channels = s.channels, row = s.width * channels;
  const int64_t stride = place_stride(kTiles, channels);
  with_lanes<Level>(channels, [&](auto lanes) INLINED {
    Tile tile(s, from);
    for (int64_t t = 0; t < count; ++t, tile.next(s)) {
      const int64_t top = 2 * tile.row - 1, left = 2 * tile.column - 1;
      const float* map = x + tile.sample * s.height * row;
      float* out = room.patches + t * channels;
      if (top >= 0 && left >= 0 && top + 4 <= s.height && left + 4 <= s.width) {
        const Inside of{map + top * row + left * channels, row, channels};
        transform_patch<lanes.value>(of, channels, out, stride);
      } else {
        const Pixels<4> of(s, map, channels, top, left, room.zeros);
        transform_patch<lanes.value>(of, channels, out, stride);
      }
    }
  });
}

// Tiles [from, until) of y (N, H, W, O), the convolution of x (N, H, W, C) by the transformed
// filters (place, C, O).
template <class Level>
INLINE void convolve(const Shape& s, const float* x, const float* filters, float* y, int64_t from,
                     int64_t until, const Room& room) {
  const int64_t in = place_stride(kTiles, s.channels), out = place_stride(kTiles, s.filters);
  for (int64_t begin = from; begin < until; begin += kTiles) {
    const int64_t count = std::min(kTiles, until - begin);
    const int64_t rows = (count + kRows - 1) / kRows * kRows;
    transform_patches<Level>(s, x, begin, count, room);
    for (int64_t place = 0; place < kPlaces; ++place) {
      float* patches = room.patches + place * in;
      std::fill(patches + count * s.channels, patches + rows * s.channels, 0.0f);
      multiply<Level, false>(rows, s.channels, s.filters, {s.channels, 1, s.filters, s.filters},
                             patches, filters + place * place_stride(s.channels, s.filters),
                             room.products + place * out);
    }
    with_lanes<Level>(s.filters, [&](auto lanes) INLINED {
      Tile tile(s, begin);
      for (int64_t t = 0; t < count; ++t, tile.next(s)) {
        const int64_t pixel = (tile.sample * s.height + 2 * tile.row) * s.width + 2 * tile.column;
        transform_tile<lanes.value>(s, tile, room.products + t * s.filters, out,
                                    y + pixel * s.filters);
      }
    });
  }
}

// What tiles [from, until) of x and of the gradient g (N, H, W, O) are to the transformed filters'
// gradient (place, O, C), added to `sums`.
template <class Level>
INLINE void add_gradient(const Shape& s, const float* x, const float* g, float* sums, int64_t from,
                         int64_t until, const Room& room) {
  const int64_t in = place_stride(kTiles, s.channels), out = place_stride(kTiles, s.filters);
  for (int64_t begin = from; begin < until; begin += kTiles) {
    const int64_t count = std::min(kTiles, until - begin);
    transform_patches<Level>(s, x, begin, count, room);
    with_lanes<Level>(s.filters, [&](auto lanes) INLINED {
      Tile tile(s, begin);
      for (int64_t t = 0; t < count; ++t, tile.next(s)) {
        const Pixels<2> of(s, g + tile.sample * s.height * s.width * s.filters, s.filters,
                           2 * tile.row, 2 * tile.column, room.zeros);
        transform_gradient<lanes.value>(of, s.filters, room.products + t * s.filters, out);
      }
    });
    for (int64_t place = 0; place < kPlaces; ++place) {
      multiply<Level, true>(s.filters, count, s.channels, {1, s.filters, s.channels, s.channels},
                            room.products + place * out, room.patches + place * in,
                            sums + place * place_stride(s.filters, s.channels));
    }
  }
}

}  // namespace fedkn::winograd
//// winograd_convolution.h
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
//// winograd_filters.h
// The filters of winograd.h: their way to the 16 places of a patch, and their gradients' way back.

#pragma once

#include <cstdint>

#include "winograd.h"

namespace fedkn::winograd {

// G w G' of filters that lie beside each other in memory, `size` of them: taps[tap * step + i] to
// out[place * stride + i].
template <class Level>
INLINE void transform_taps(const float* taps, int64_t step, int64_t size, bool turned, float* out,
                           int64_t stride) {
  with_lanes<Level>(size, [&](auto lanes) INLINED {
    using V = typename Vector<lanes.value>::Type;
    for (int64_t i = 0; i < size; i += lanes.value) {
      V t[4][3];
#pragma GCC unroll 3
      for (int64_t j = 0; j < 3; ++j) {
        const auto tap = [&](int64_t row) INLINED {
          const int64_t number = 3 * row + j;
          return load<V>(taps + (turned ? 8 - number : number) * step + i);
        };
        const V a = tap(0), b = tap(1) * 0.5f, c = tap(2), half = (a + c) * 0.5f;
        t[0][j] = a, t[1][j] = half + b, t[2][j] = half - b, t[3][j] = c;
      }
#pragma GCC unroll 4
      for (int64_t r = 0; r < 4; ++r) {
        float* p = out + 4 * r * stride + i;
        const V half = (t[r][0] + t[r][2]) * 0.5f, b = t[r][1] * 0.5f;
        store<V>(p, t[r][0]);
        store<V>(p + stride, half + b);
        store<V>(p + 2 * stride, half - b);
        store<V>(p + 3 * stride, t[r][2]);
      }
    }
  });
}

// The transformed filters (place, C, O) of weights (O, 9, C). `room` holds 9 * O numbers.
template <class Level>
INLINE void transform_filters(const Shape& s, const float* weight, float* room, float* out) {
  const int64_t stride = place_stride(s.channels, s.filters);
  for (int64_t c = 0; c < s.channels; ++c) {
    for (int64_t tap = 0; tap < 9; ++tap) {
      const float* p = weight + tap * s.channels + c;
      for (int64_t o = 0; o < s.filters; ++o) room[tap * s.filters + o] = p[o * 9 * s.channels];
    }
    transform_taps<Level>(room, s.filters, s.filters, false, out + c * s.filters, stride);
  }
}

// The transformed filters (place, O, C), turned round, by which gradients go back to the input.
template <class Level>
INLINE void transform_turned(const Shape& s, const float* weight, float* out) {
  const int64_t stride = place_stride(s.filters, s.channels);
  for (int64_t o = 0; o < s.filters; ++o) {
    transform_taps<Level>(weight + o * 9 * s.channels, s.channels, s.channels, true,
                          out + o * s.channels, stride);
  }
}

// G' u G of the sums of `parts` transformed gradients u, (part, place, O, C): taps (O, 9, C).
template <class Level>
INLINE void transform_filters_back(const Shape& s, const float* sums, int64_t parts, float* taps) {
  const int64_t stride = place_stride(s.filters, s.channels), part = kPlaces * stride;
  with_lanes<Level>(s.channels, [&](auto lanes) INLINED {
    using V = typename Vector<lanes.value>::Type;
    for (int64_t o = 0; o < s.filters; ++o) {
      for (int64_t c = 0; c < s.channels; c += lanes.value) {
        const auto sum = [&](int64_t place) INLINED {
          const float* p = sums + place * stride + o * s.channels + c;
          V total = load<V>(p);
          for (int64_t n = 1; n < parts; ++n) total += load<V>(p + n * part);
          return total;
        };
        V t[3][4];
#pragma GCC unroll 4
        for (int64_t j = 0; j < 4; ++j) {
          const V a = sum(j), b = sum(4 + j), d = sum(8 + j), e = sum(12 + j);
          const V half = (b + d) * 0.5f;
          t[0][j] = a + half, t[1][j] = (b - d) * 0.5f, t[2][j] = half + e;
        }
        float* p = taps + o * 9 * s.channels + c;
#pragma GCC unroll 3
        for (int64_t r = 0; r < 3; ++r) {
          const V half = (t[r][1] + t[r][2]) * 0.5f;
          store<V>(p + 3 * r * s.channels, t[r][0] + half);
          store<V>(p + (3 * r + 1) * s.channels, (t[r][1] - t[r][2]) * 0.5f);
          store<V>(p + (3 * r + 2) * s.channels, half + t[r][3]);
        }
      }
    }
  });
}

}  // namespace fedkn::winograd
"""
