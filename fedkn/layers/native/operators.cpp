// The operators that PyTorch knows the kernels by; everything is compiled with this file.
//
// One translation unit: PyTorch's headers take longer to compile than all of the kernels.

#include <torch/library.h>

#include "first_convolution.h"
#include "group_norm.h"
#include "group_norm_contiguous.h"
#include "group_norm_pool.h"
#include "kn_conv.h"
#include "max_pool.h"

namespace fedkn::group_norm {

Tensor apply(const Tensor& x, int64_t groups, const Tensor& gain, const Tensor& shift, double eps,
             bool relu, bool pool) {
  const Tensor weight = gain.contiguous(), bias = shift.contiguous();
  if (pool) return PoolingFunction::apply(x, groups, weight, bias, eps, relu);
  return x.is_contiguous() ? contiguous::Function::apply(x, groups, weight, bias, eps, relu)
                           : Function::apply(x, groups, weight, bias, eps, relu);
}

}  // namespace fedkn::group_norm

TORCH_LIBRARY(fedkn_native, m) {
  m.def(
      "convolution(Tensor x, Tensor weight, Tensor? bias, int[2] stride, int[2] padding, "
      "int[2] dilation, int groups, int clients, int[]? keys, int level, float eps, bool relu, "
      "bool keeps_output) -> Tensor",
      &fedkn::convolution);
  m.def(
      "gradients(Tensor g, Tensor x, Tensor weight, Tensor? bias, int[2] stride, int[2] padding, "
      "int[2] dilation, int groups, int clients, int[]? keys, int level, float eps, bool relu, "
      "bool want_x, bool want_weight, bool want_bias) -> (Tensor, Tensor, Tensor)");
  m.def("max_pool(Tensor x) -> Tensor", &fedkn::max_pool::apply);
  m.def(
      "group_norm(Tensor x, int groups, Tensor weight, Tensor bias, float eps, bool relu, "
      "bool pool) -> Tensor",
      &fedkn::group_norm::apply);
  m.def("first_convolution(Tensor x, Tensor weight) -> Tensor", &fedkn::first_convolution::apply);
}
