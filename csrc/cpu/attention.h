// What the attention functions of attention.cpp are called with, by ctypes and by csrc/autograd.
#pragma once

#include "parallel.h"

struct AttentionParams {
  const void* qkv;         // element (b, t, j, h, d) at b * stride[0] + t * stride[1] + j * stride[2] + h * stride[3] + d
  int64_t stride[4];       // in elements
  const int64_t* index;    // [B, n] rows of qkv to attend among, or null: the first n
  const int64_t* lengths;  // [B], or null: all n are real
  void* out;               // [B, n, H * D]
  float* lse;              // [B, H, n], or null
  void* shares;            // `shares_of` numbers of the dtype of qkv, or null: unnormalised softmax weights, saved in place of lse
  const void* grad;        // like out; backward only
  void* dqkv;              // [B, L, 3, H, D]; backward only
  int64_t batch, rows, n, heads, width;  // rows: L
  float scale;
};

constexpr int ONE_BLOCK = 80;  // queries that are one block on any processor

// Numbers of unnormalised softmax weights, rows padded to whole tiles of any processor; 0 where lse is saved. They may be no more than the output,
// which backward does not read, and all queries must be one block.
inline int64_t shares_of(const AttentionParams& p) {
  const int64_t row = (p.n + 31) / 32 * 32;
  return row <= p.width && p.n <= ONE_BLOCK ? p.batch * p.heads * p.n * row : 0;
}

using AttentionFunction = void (*)(const AttentionParams*, Part);
