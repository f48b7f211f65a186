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
