// What the attention functions of attention.cpp are called with, by ctypes and by csrc/autograd.
#pragma once

#include "parallel.h"

struct AttentionParams {
  const void* qkv;         // element (b, t, j, h, d) at b * stride[0] + t * stride[1] + j * stride[2] + h * stride[3] + d
  int64_t stride[4];       // in elements
  const int64_t* index;    // [B, n] rows of qkv to attend among, or null: the first n
  const int64_t* lengths;  // [B], or null: all n are real
  void* out;               // [B, n, H * D]
  float* lse;              // [B, H, n]; null where shares are
  void* shares;            // what backward needs of the softmax in the place of lse, or null: `shares_of` numbers of the dtype of qkv
  const void* grad;        // like out; backward only
  void* dqkv;              // [B, L, 3, H, D]; backward only
  int64_t batch, rows, n, heads, width;  // rows: L
  float scale;
};

// Numbers that shares take, rows padded to whole tiles of any processor, or 0 where lse is the better: they are kept where they are no more than the
// output, which backward does not read, and where all queries are one block.
inline int64_t shares_of(const AttentionParams& p) {
  return p.n <= p.width && p.n <= 80 ? p.batch * p.heads * p.n * ((p.n + 31) / 32 * 32) : 0;
}

using AttentionFunction = void (*)(const AttentionParams*, Part);
