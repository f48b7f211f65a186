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
