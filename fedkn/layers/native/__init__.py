"""The fused CPU kernels: their C++ sources, how they are built, and whom they serve.

``*.h`` and ``operators.cpp``   the kernels; `operators.cpp` names every operator
``sources.py``                  what is compiled, in a checkout as in a bundle of Python files alone
``bundled.py``                  the same as Python: ``python -m fedkn.layers.native`` writes it
``library.py``                  building, loading, and which tensors they take

The kernel-normalized convolution (``kn_conv*.h``): what `fedkn.layers.kernel.backends.plain` does
in a dozen passes over the map is two passes forward and three backward, around PyTorch's own
convolution. The equations and their names are those of plain.py; the dropout generator is that of
dropout.py, bit for bit. Then what the rivals' small networks spend their time on: GroupNorm with
ReLU and pooling, max-pooling, and the convolution of images.

float32, contiguous or channels last; sums that cancel are taken in double.
"""
