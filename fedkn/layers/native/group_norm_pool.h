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
