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
