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
