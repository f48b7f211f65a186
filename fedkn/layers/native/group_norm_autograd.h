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
