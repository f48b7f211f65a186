"""KernelNorm and the kernel-normalized convolution. Read `definition` first: it is the equations.

``definition``                 the papers' equations as code, units and shapes
``layer``                      KNConv1d, KNConv2d, KernelNorm1d, KernelNorm2d
``padding``, ``dropout``       what is done to x before: paddings, and the key of its mask
``dispatch``                   which backend computes a convolution; ``explanation`` says why
``backends/``                  the ways to compute it
``units``                      KernelNorm's gradient by hand
``autograd``                   what gradients by hand are to autograd
``statistics``                 mean and variance of every unit, without unfolding
``small_units``                units of few elements, in evaluation
``settings``                   what a layer does, in numbers

A training step of a KNConv, x (N, C, H, W) in float32 on a CPU with a C++ compiler::

    layer.KNConv.forward(x)
      padding.place(x)                     pads what a convolution cannot; where the units lie
      dropout.draw_key()                   an integer: the whole mask is a function of it
      dispatch.convolution(x, w, b)        the first row of TABLE that serves:
        backends.cpp.forward(x, w, b)        C++ from here, its backward pass too

and without one, where backends.plain serves::

        autograd.by_hand(plain)
          backends.plain.forward(x, w, b)    z = conv(x, w) - mean * sum(w), y = z * scale + b
            statistics                       channels first, then a box filter
          backends.plain.backward(g)         dx, dw, db
"""
