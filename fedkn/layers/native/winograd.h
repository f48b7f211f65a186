// The loops of a 3x3 convolution by Winograd's algorithm F(2x2, 3x3): 16 products for what
// takes 36.
//
// Every 2x2 tile of the output is A'[(G w G') . (B' d B)]A of its 4x4 patch d of the input, where .
// multiplies number by number: Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks",
// CVPR 2016, arXiv 1509.09308, section 4.1. So each of the 16 places is a product of matrices,
// tiles by channels times channels by filters. The gradients are its adjoints: the input's is the
// same convolution by the filters turned round, the filters' is G'[(A g A') . (B' d B)]G, summed
// over the tiles. Maps are channels last; vectors run over channels or filters.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "vectors.h"

namespace fedkn::winograd {

constexpr int64_t kPlaces = 16;  // of a patch
constexpr int64_t kTiles = 32;   // at once: what is made of them stays in the L2 cache
// Between the places: else all 16 would share a few sets of the L1 cache.
constexpr int64_t kGap = 16;

struct Shape {
  int64_t samples, channels, filters, height, width;

  int64_t down() const { return (height + 1) / 2; }
  int64_t across() const { return (width + 1) / 2; }
  int64_t tiles() const { return samples * down() * across(); }
  int64_t weights() const { return channels * filters; }
};

// Numbers from one place to the next, where each place has `rows` rows of `columns` numbers.
INLINE int64_t place_stride(int64_t rows, int64_t columns) { return rows * columns + kGap; }

// A tile's place in the maps, and the next.
struct Tile {
  int64_t sample, row, column;

  INLINED Tile(const Shape& s, int64_t number)
      : sample(number / s.across() / s.down()),
        row(number / s.across() % s.down()),
        column(number % s.across()) {}
  INLINE void next(const Shape& s) {
    if (++column < s.across()) return;
    column = 0;
    if (++row < s.down()) return;
    row = 0;
    ++sample;
  }
};

// Where the numbers of `size` x `size` pixels begin; outside the map they are `zeros`.
template <int64_t size>
struct Pixels {
  const float* at[size][size];

  INLINED Pixels(const Shape& s, const float* map, int64_t channels, int64_t top, int64_t left,
                 const float* zeros) {
    for (int64_t i = 0; i < size; ++i) {
      const bool inside = top + i >= 0 && top + i < s.height;
      const float* row = map + ((top + i) * s.width + left) * channels;
      for (int64_t j = 0; j < size; ++j) {
        at[i][j] = inside && left + j >= 0 && left + j < s.width ? row + j * channels : zeros;
      }
    }
  }
  INLINED const float* operator()(int64_t i, int64_t j) const { return at[i][j]; }
};

// The same where all are inside.
struct Inside {
  const float* first;
  int64_t row, pixel;

  INLINED const float* operator()(int64_t i, int64_t j) const {
    return first + i * row + j * pixel;
  }
};

// B' d B of a patch d, for `channels` channels, to out + place * stride.
template <int64_t lanes, class Of>
INLINE void transform_patch(const Of& of, int64_t channels, float* out, int64_t stride) {
  using V = typename Vector<lanes>::Type;
  for (int64_t c = 0; c < channels; c += lanes) {
    V t[4][4];
#pragma GCC unroll 4
    for (int64_t j = 0; j < 4; ++j) {
      const V a = load<V>(of(0, j) + c), b = load<V>(of(1, j) + c), d = load<V>(of(2, j) + c),
              e = load<V>(of(3, j) + c);
      t[0][j] = a - d, t[1][j] = b + d, t[2][j] = d - b, t[3][j] = b - e;
    }
#pragma GCC unroll 4
    for (int64_t i = 0; i < 4; ++i) {
      float* p = out + 4 * i * stride + c;
      store<V>(p, t[i][0] - t[i][2]);
      store<V>(p + stride, t[i][1] + t[i][2]);
      store<V>(p + 2 * stride, t[i][2] - t[i][1]);
      store<V>(p + 3 * stride, t[i][1] - t[i][3]);
    }
  }
}

// A g A' of a tile's gradient g.
template <int64_t lanes, class Of>
INLINE void transform_gradient(const Of& of, int64_t channels, float* out, int64_t stride) {
  using V = typename Vector<lanes>::Type;
  for (int64_t c = 0; c < channels; c += lanes) {
    const V a = load<V>(of(0, 0) + c), b = load<V>(of(0, 1) + c), d = load<V>(of(1, 0) + c),
            e = load<V>(of(1, 1) + c);
    const V left[4] = {a, a + d, a - d, -d}, right[4] = {b, b + e, b - e, -e};
#pragma GCC unroll 4
    for (int64_t i = 0; i < 4; ++i) {
      float* p = out + 4 * i * stride + c;
      store<V>(p, left[i]);
      store<V>(p + stride, left[i] + right[i]);
      store<V>(p + 2 * stride, left[i] - right[i]);
      store<V>(p + 3 * stride, -right[i]);
    }
  }
}

// A' m A, a tile of the output at `y`; what of it lies outside the map is left out.
template <int64_t lanes>
INLINE void transform_tile(const Shape& s, const Tile& tile, const float* m, int64_t stride,
                           float* y) {
  using V = typename Vector<lanes>::Type;
  const int64_t pixel = s.filters, row = s.width * pixel;
  const bool right = 2 * tile.column + 1 < s.width, below = 2 * tile.row + 1 < s.height;
  for (int64_t c = 0; c < s.filters; c += lanes) {
    V top[4], bottom[4];
#pragma GCC unroll 4
    for (int64_t j = 0; j < 4; ++j) {
      const float* p = m + j * stride + c;
      const V b = load<V>(p + 4 * stride), d = load<V>(p + 8 * stride);
      top[j] = load<V>(p) + (b + d);
      bottom[j] = (b - d) - load<V>(p + 12 * stride);
    }
    store<V>(y + c, top[0] + (top[1] + top[2]));
    if (right) store<V>(y + pixel + c, (top[1] - top[2]) - top[3]);
    if (!below) continue;
    store<V>(y + row + c, bottom[0] + (bottom[1] + bottom[2]));
    if (right) store<V>(y + row + pixel + c, (bottom[1] - bottom[2]) - bottom[3]);
  }
}

// Three factors: the strides of a's rows and inner dimension, those of b's and of out's rows.
struct Strides {
  int64_t row, inner, b, out;
};

// out (rows, lanes * vectors) = or += the sum over k of a[row][k] * b[k][column].
template <int64_t lanes, int64_t rows, int64_t vectors, bool add>
INLINE void multiply_block(int64_t inner, const Strides& at, const float* a, const float* b,
                           float* out) {
  using V = typename Vector<lanes>::Type;
  V sums[rows][vectors];
#pragma GCC unroll 8
  for (int64_t r = 0; r < rows; ++r) {
#pragma GCC unroll 2
    for (int64_t v = 0; v < vectors; ++v) {
      sums[r][v] = add ? load<V>(out + r * at.out + v * lanes) : V{};
    }
  }
  for (int64_t k = 0; k < inner; ++k, a += at.inner, b += at.b) {
    V numbers[vectors];
#pragma GCC unroll 2
    for (int64_t v = 0; v < vectors; ++v) numbers[v] = load<V>(b + v * lanes);
#pragma GCC unroll 8
    for (int64_t r = 0; r < rows; ++r) {
      const float factor = a[r * at.row];
#pragma GCC unroll 2
      for (int64_t v = 0; v < vectors; ++v) sums[r][v] += factor * numbers[v];
    }
  }
#pragma GCC unroll 8
  for (int64_t r = 0; r < rows; ++r) {
#pragma GCC unroll 2
    for (int64_t v = 0; v < vectors; ++v) store<V>(out + r * at.out + v * lanes, sums[r][v]);
  }
}

template <int64_t lanes, int64_t each, int64_t vectors, bool add>
INLINE void multiply_by(int64_t rows, int64_t inner, int64_t columns, const Strides& at,
                        const float* a, const float* b, float* out) {
  for (int64_t c = 0; c < columns; c += lanes * vectors) {
    for (int64_t r = 0; r < rows; r += each) {
      multiply_block<lanes, each, vectors, add>(inner, at, a + r * at.row, b + c,
                                                out + r * at.out + c);
    }
  }
}

constexpr int64_t kRows = 8;  // rows come in eights, columns too

template <class Level, bool add>
INLINE void multiply(int64_t rows, int64_t inner, int64_t columns, const Strides& at,
                     const float* a, const float* b, float* out) {
  if (columns % (2 * Level::lanes) == 0) {
    multiply_by<Level::lanes, Level::rows, 2, add>(rows, inner, columns, at, a, b, out);
  } else if (columns % Level::lanes == 0) {
    multiply_by<Level::lanes, kRows, 1, add>(rows, inner, columns, at, a, b, out);
  } else {
    multiply_by<8, kRows, 1, add>(rows, inner, columns, at, a, b, out);
  }
}

// Calls f(lanes), a constant that divides `channels`.
template <class Level, class F>
INLINE void with_lanes(int64_t channels, F f) {
  if (channels % Level::lanes) {
    f(std::integral_constant<int64_t, 8>());
  } else {
    f(std::integral_constant<int64_t, Level::lanes>());
  }
}

// Room for what is made of kTiles tiles, and a pixel of zeros.
struct Room {
  float *patches, *products;
  const float* zeros;
};

// The transformed patches of tiles [from, from + count), (place, tile, channel).
template <class Level>
INLINE void transform_patches(const Shape& s, const float* x, int64_t from, int64_t count,
                              const Room& room) {
  const int64_t channels = s.channels, row = s.width * channels;
  const int64_t stride = place_stride(kTiles, channels);
  with_lanes<Level>(channels, [&](auto lanes) INLINED {
    Tile tile(s, from);
    for (int64_t t = 0; t < count; ++t, tile.next(s)) {
      const int64_t top = 2 * tile.row - 1, left = 2 * tile.column - 1;
      const float* map = x + tile.sample * s.height * row;
      float* out = room.patches + t * channels;
      if (top >= 0 && left >= 0 && top + 4 <= s.height && left + 4 <= s.width) {
        const Inside of{map + top * row + left * channels, row, channels};
        transform_patch<lanes.value>(of, channels, out, stride);
      } else {
        const Pixels<4> of(s, map, channels, top, left, room.zeros);
        transform_patch<lanes.value>(of, channels, out, stride);
      }
    }
  });
}

// Tiles [from, until) of y (N, H, W, O), the convolution of x (N, H, W, C) by the transformed
// filters (place, C, O).
template <class Level>
INLINE void convolve(const Shape& s, const float* x, const float* filters, float* y, int64_t from,
                     int64_t until, const Room& room) {
  const int64_t in = place_stride(kTiles, s.channels), out = place_stride(kTiles, s.filters);
  for (int64_t begin = from; begin < until; begin += kTiles) {
    const int64_t count = std::min(kTiles, until - begin);
    const int64_t rows = (count + kRows - 1) / kRows * kRows;
    transform_patches<Level>(s, x, begin, count, room);
    for (int64_t place = 0; place < kPlaces; ++place) {
      float* patches = room.patches + place * in;
      std::fill(patches + count * s.channels, patches + rows * s.channels, 0.0f);
      multiply<Level, false>(rows, s.channels, s.filters, {s.channels, 1, s.filters, s.filters},
                             patches, filters + place * place_stride(s.channels, s.filters),
                             room.products + place * out);
    }
    with_lanes<Level>(s.filters, [&](auto lanes) INLINED {
      Tile tile(s, begin);
      for (int64_t t = 0; t < count; ++t, tile.next(s)) {
        const int64_t pixel = (tile.sample * s.height + 2 * tile.row) * s.width + 2 * tile.column;
        transform_tile<lanes.value>(s, tile, room.products + t * s.filters, out,
                                    y + pixel * s.filters);
      }
    });
  }
}

// What tiles [from, until) of x and of the gradient g (N, H, W, O) are to the transformed filters'
// gradient (place, O, C), added to `sums`.
template <class Level>
INLINE void add_gradient(const Shape& s, const float* x, const float* g, float* sums, int64_t from,
                         int64_t until, const Room& room) {
  const int64_t in = place_stride(kTiles, s.channels), out = place_stride(kTiles, s.filters);
  for (int64_t begin = from; begin < until; begin += kTiles) {
    const int64_t count = std::min(kTiles, until - begin);
    transform_patches<Level>(s, x, begin, count, room);
    with_lanes<Level>(s.filters, [&](auto lanes) INLINED {
      Tile tile(s, begin);
      for (int64_t t = 0; t < count; ++t, tile.next(s)) {
        const Pixels<2> of(s, g + tile.sample * s.height * s.width * s.filters, s.filters,
                           2 * tile.row, 2 * tile.column, room.zeros);
        transform_gradient<lanes.value>(of, s.filters, room.products + t * s.filters, out);
      }
    });
    for (int64_t place = 0; place < kPlaces; ++place) {
      multiply<Level, true>(s.filters, count, s.channels, {1, s.filters, s.channels, s.channels},
                            room.products + place * out, room.patches + place * in,
                            sums + place * place_stride(s.filters, s.channels));
    }
  }
}

}  // namespace fedkn::winograd
