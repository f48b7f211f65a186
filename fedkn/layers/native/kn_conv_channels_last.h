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
