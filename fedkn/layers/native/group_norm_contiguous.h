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
