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
