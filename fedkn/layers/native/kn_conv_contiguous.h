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
