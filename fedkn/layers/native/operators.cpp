// The operators that PyTorch knows the kernels by; everything is compiled with this file.
//
// One translation unit: PyTorch's headers take longer to compile than all of the kernels.

#include <torch/library.h>

#include "first_convolution.h"
#include "group_norm_autograd.h"
#include "kn_conv.h"
#include "max_pool.h"
#include "step.h"
#include "winograd_convolution.h"

TORCH_LIBRARY(fedkn_native, m) {
  m.def(
      "convolution(Tensor x, Tensor weight, Tensor? bias, int[2] stride, int[2] padding, "
      "int[2] dilation, int groups, int clients, int[]? keys, int level, float eps, bool relu, "
      "bool keeps_output) -> Tensor",
      &fedkn::convolution);
  m.def(
      "convolution_forward(Tensor x, Tensor weight, Tensor? bias, int[2] stride, int[2] padding, "
      "int[2] dilation, int groups, int clients, int[]? keys, int level, float eps, bool relu, "
      "bool keeps_output) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "convolution_backward(Tensor g, Tensor x, Tensor weight, Tensor output, Tensor moments, "
      "Tensor values, int[2] stride, int[2] padding, int[2] dilation, int groups, int clients, "
      "int[]? keys, int level, float eps, bool relu, bool keeps_output, bool[3] wanted) -> "
      "(Tensor, Tensor, Tensor)");
  m.def(
      "gradients(Tensor g, Tensor x, Tensor weight, Tensor? bias, int[2] stride, int[2] padding, "
      "int[2] dilation, int groups, int clients, int[]? keys, int level, float eps, bool relu, "
      "bool want_x, bool want_weight, bool want_bias) -> (Tensor, Tensor, Tensor)");
  m.def("max_pool(Tensor x) -> Tensor", &fedkn::max_pool::apply);
  m.def("max_pool_forward(Tensor x) -> (Tensor, Tensor)");
  m.def("max_pool_backward(Tensor g, Tensor winner, int[] size, bool last) -> Tensor");
  m.def(
      "group_norm(Tensor x, int groups, Tensor weight, Tensor bias, float eps, bool relu, "
      "bool pool) -> Tensor",
      &fedkn::group_norm::apply);
  m.def(
      "group_norm_forward(Tensor x, int groups, Tensor weight, Tensor bias, float eps, bool relu, "
      "bool pool) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "group_norm_backward(Tensor g, Tensor x, Tensor weight, Tensor bias, Tensor mean, "
      "Tensor inverse, Tensor? winner, int groups, bool relu, bool want_x) -> "
      "(Tensor, Tensor, Tensor)");
  m.def("first_convolution(Tensor x, Tensor weight) -> Tensor", &fedkn::first_convolution::apply);
  m.def("first_convolution_forward(Tensor x, Tensor weight) -> Tensor");
  m.def("first_convolution_backward(Tensor g, Tensor x, Tensor weight) -> Tensor");
  m.def("winograd_lanes(int[] size, int filters) -> int", &fedkn::winograd::winograd_lanes);
  m.def("winograd(Tensor x, Tensor weight, int lanes) -> Tensor", &fedkn::winograd::apply);
  m.def("winograd_forward(Tensor x, Tensor weight, int lanes) -> Tensor");
  m.def(
      "winograd_backward(Tensor g, Tensor x, Tensor weight, int lanes, bool[2] wanted) -> "
      "(Tensor, Tensor)");
  m.class_<fedkn::step::Step>("Step")
      .def(torch::init<std::vector<fedkn::Tensor>, int64_t>())
      .def("add", &fedkn::step::Step::add)
      .def("seed", &fedkn::step::Step::seed)
      .def("take", &fedkn::step::Step::take);
}

TORCH_LIBRARY_IMPL(fedkn_native, CPU, m) {
  m.impl("convolution_forward", &fedkn::convolution_forward);
  m.impl("convolution_backward", &fedkn::convolution_backward);
  m.impl("max_pool_forward", &fedkn::max_pool::max_pool_forward);
  m.impl("max_pool_backward", &fedkn::max_pool::max_pool_backward);
  m.impl("group_norm_forward", &fedkn::group_norm::group_norm_forward);
  m.impl("group_norm_backward", &fedkn::group_norm::group_norm_backward);
  m.impl("first_convolution_forward", &fedkn::first_convolution::first_convolution_forward);
  m.impl("first_convolution_backward", &fedkn::first_convolution::first_convolution_backward);
  m.impl("winograd_forward", &fedkn::winograd::winograd_forward);
  m.impl("winograd_backward", &fedkn::winograd::winograd_backward);
}
