// GEMM factors as pairs of 16-bit integers. A GEMM sums over k: every row of its left factor and every column of its right one, a *line*, is
// rounded to whole multiples of its own step, so that its Euclidean norm is LEVELS of them. By Cauchy and Schwarz no sum then passes LEVELS^2 by much,
// half of what 32 bits hold, and rounding adds an error of about ERROR times the product of the two lines' norms.
#pragma once

#include <cmath>

#include "head.h"

#if defined(SMI_INTEGERS)

constexpr float LEVELS = 32767, ERROR = 1.25e-5f;  // 1 / (LEVELS sqrt(6)), if roundings are independent
constexpr float LEAST = 1e-15f;                    // shorter lines have the step of one of this norm, because of the range of their squares

struct Norms {
  float longest, all;  // of one line; of all numbers, NaN or infinite where one of them is
};

// Takes note of lines, and says how they are to be rounded.
class Lines {
 public:
  // The inverse of the steps of V lines with these sums of squares; the steps to `step`.
  vec inverse(vec squares, float* step) {
    total += squares;
    most = squares > most ? squares : most;
    const vec norm = sqrt(squares), length = norm > LEAST ? norm : broadcast(LEAST);
    store(step, length * (1 / LEVELS));
    return LEVELS / length;
  }

  Norms norms() const {
    float top = 0;
    for (int i = 0; i < V; ++i) top = most[i] > top ? most[i] : top;
    return {std::sqrt(top), std::sqrt(sum(total))};
  }

 private:
  vec most = {}, total = {};
};

// 2 V numbers of a row as two vectors: of bfloat16s the even and the odd ones, which takes no shuffle.
inline void halves(const float* from, vec* x) { x[0] = load(from), x[1] = load(from + V); }
inline void halves(ivec both, vec* x) { x[0] = vec(both << 16), x[1] = vec(both & int32_t(0xffff0000)); }
inline void halves(const bfloat16* from, vec* x) { halves(load(reinterpret_cast<const int32_t*>(from)), x); }

// Below, `step` gets the step of every line.

// Rows as lines, pairs of neighbours, transposed to [width / 2, columns]; columns past `rows` hold the last row again.
inline Norms transposed_pairs(Rows<const bfloat16> from, int rows, int width, Pair* to, int columns, float* step) {
  Lines lines;
  for (int t = 0; t < columns; t += V) {
    const bfloat16* row[V];
    for (int i = 0; i < V; ++i) row[i] = from[t + i < rows ? t + i : rows - 1];
    vec squares[4] = {}, x[2];
    for (int d = 0; d < width / 2; d += V) {
      __m256 block[V];
      for (int i = 0; i < V; ++i) block[i] = _mm256_loadu_ps(reinterpret_cast<const float*>(row[i]) + d);
      transpose_8x8(block);
      for (int i = 0; i < V; ++i) {
        halves(ivec(block[i]), x);
        squares[i % 2] += x[0] * x[0], squares[2 + i % 2] += x[1] * x[1];
        store(to + (d + i) * columns + t, ivec(block[i]));
      }
    }
    const vec inverse = lines.inverse(squares[0] + squares[1] + squares[2] + squares[3], step + t);
    for (Pair* at = to + t; at < to + width / 2 * columns; at += columns) {
      halves(load(at), x);
      store(at, pairs(x[0], x[1], inverse));
    }
  }
  return lines.norms();
}

// Columns as lines: N times 2 V of them, of rows [count], as pairs of rows [(count + 1) / 2, width]. Columns and steps are in the order of `halves`.
template <int N, class T>
inline void columns_of(Rows<const T> rows, int count, int width, Pair* to, float* step, Lines* lines) {
  static constexpr T none[N * NR] = {};
  vec squares[2][2 * N] = {}, inverse[2 * N], x[2], y[2];
  const auto next = [&](int t) { return t + 1 < count ? rows[t + 1] : none; };
  for (int t = 0; t < count; t += 2) {
    const T *one = rows[t], *other = next(t);
#pragma GCC unroll 2
    for (int i = 0; i < N; ++i) {
      halves(one + i * NR, x), halves(other + i * NR, y);
      squares[0][2 * i] += x[0] * x[0], squares[0][2 * i + 1] += x[1] * x[1];
      squares[1][2 * i] += y[0] * y[0], squares[1][2 * i + 1] += y[1] * y[1];
    }
  }
  for (int i = 0; i < 2 * N; ++i) inverse[i] = lines->inverse(squares[0][i] + squares[1][i], step + i * V);
  for (int t = 0; t < count; t += 2, to += width) {
    const T *one = rows[t], *other = next(t);
#pragma GCC unroll 2
    for (int i = 0; i < N; ++i) {
      halves(one + i * NR, x), halves(other + i * NR, y);
      store(to + i * NR, pairs(x[0], y[0], inverse[2 * i]));
      store(to + i * NR + V, pairs(x[1], y[1], inverse[2 * i + 1]));
    }
  }
}

// The same for all columns, a cache line of bfloat16s at a time.
template <class T>
inline Norms pairs_of_rows(Rows<const T> rows, int count, int width, Pair* to, float* step) {
  Lines lines;
  int d = 0;
  for (; d + 2 * NR <= width; d += 2 * NR, rows.at += 2 * NR) columns_of<2>(rows, count, width, to + d, step + d, &lines);
  if (d < width) columns_of<1>(rows, count, width, to + d, step + d, &lines);
  return lines.norms();
}

// Rows of floats as lines, pairs of neighbours, [rows, width / 2], at most BLOCK rows. There is room for the steps of whole vectors of them.
inline Norms pairs_of_neighbours(const float* from, int rows, int width, Pair* to, float* step) {
  Lines lines;
  float inverse[BLOCK];
  for (int t = 0; t < rows; t += V) {
    __m256 squares[V];
    for (int i = 0; i < V; ++i) {
      const float* row = from + (t + i < rows ? t + i : rows - 1) * width;
      vec one = {}, other = {};
      for (int d = 0; d < width; d += NR) {
        const vec x = load(row + d), y = load(row + d + V);
        one += x * x, other += y * y;
      }
      squares[i] = one + other;
    }
    transpose_8x8(squares);
    vec total = {};
    for (int i = 0; i < V; ++i) total += vec(squares[i]);
    store(inverse + t, lines.inverse(total, step + t));
  }
  for (int t = 0; t < rows; ++t)
    for (int d = t * width; d < (t + 1) * width; d += NR) store_pairs(to + d / 2, load(from + d) * inverse[t], load(from + d + V) * inverse[t]);
  return lines.norms();
}

// Integer dot products of lines, as floats: a row whose line on the left has this step times columns with those.
inline vec number(const int32_t* sums, float row, const float* column) {
  return __builtin_convertvector(load(sums), vec) * (row * load(column));
}

inline void give(const int32_t* sums, float row, const float* column, float* to, int width) {
  for (int d = 0; d < width; d += V) store(to + d, number(sums + d, row, column + d));
}

// Of columns in the order of `halves`, finite numbers. Returns V sums of their squares.
inline vec give(const int32_t* sums, float row, const float* column, bfloat16* to, int width) {
  vec squares = {};
  for (int d = 0; d < width; d += NR) {
    const vec even = number(sums + d, row, column + d), odd = number(sums + d + V, row, column + d + V);
    squares += even * even + odd * odd;
    store(reinterpret_cast<int32_t*>(to + d), ivec(rounded(even) | rounded(odd) << 16));
  }
  return squares;
}
#endif
