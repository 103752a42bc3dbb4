// Attention, one head at a time: everything a head needs lies in a core's own cache, scores for BLOCK queries at a time. The mathematics are in
// kernels/attention/README.md.
#include "attention_in_bfloat16s.h"
#include "attention_in_integers.h"

namespace {

// Queries of a block: whole panels of columns, as many in each block, so that no short one is left over.
inline int block_of(int count) {
  const int panels = padded(count > 0 ? count : 1) / NR, most = BLOCK / NR, blocks = (panels + most - 1) / most;
  return (panels + blocks - 1) / blocks * NR;
}

// Where all queries are one block, a head's matrices are copied to the same memory one after the other, when they are needed: what a GEMM reads and
// writes then fits into the first-level cache.
template <class T>
void forward_in_floats(const Head<T>& head) {
  const AttentionParams& params = head.p;
  const int count = head.count, width = head.width, size = block_of(count);
  const bool once = count <= size;
  const size_t whole = size_t(count) * width, part = size_t(size) * width;
  float* qt = scratch(2 * whole + 2 * part + size_t(count) * size + MR * width);
  float *weights = qt + part, *space = weights + size_t(count) * size, *k = space + MR * width, *v = once ? k : k + whole, *q = once ? k : v + whole;
  float inverse[BLOCK];
  Left keys;
  for (int first = 0; first < count; first += size) {
    const int block = count - first < size ? count - first : size, columns = padded(block);
    transposed(head, head.input(0), first, block, params.scale, q, qt, columns);
    if (first == 0) keys = head.read(head.input(1), 0, count, k);
    if (first == 0) head.expect(head.input(2));
    product<false>(count, columns, width, keys, qt, columns, weights, columns);
    softmax(weights, count, columns, block, inverse, params.shares ? head.shares() : nullptr, params.lse ? head.lse() + first : nullptr);
    if (first == 0) head.copied(head.input(2), 0, count, v);
    if (once) head.expect(head.input(0), params.stride[3]), head.expect(head.input(1), params.stride[3]);
    product_by_rows(block, width, count, {weights, 1, columns}, v, width, space,
                    [&](int i, const float* sums) { head.give(sums, inverse[i], head.output()[first + i]); });
  }
}

// P is what forward saved, or is recomputed from lse; the sums of P dP need no output. Rows that are no token's are not touched.
template <class T>
void backward_in_floats(const Head<T>& head) {
  const AttentionParams& params = head.p;
  const int count = head.count, width = head.width, size = block_of(count);
  const bool once = count <= size;
  const size_t whole = size_t(count) * width, part = size_t(size) * width, scores = size_t(count) * size;
  float* turned = scratch(4 * whole + 3 * part + 2 * scores + MR * width);
  float *weights = turned + part, *dscores = weights + scores, *space = dscores + scores, *grad = space + MR * width, *q = grad + part;
  float *v = q + part, *k = v + whole, *dk = k + whole, *dv = dk + whole, lse[BLOCK];
  Left values;
  for (int first = 0; first < count; first += size) {
    const int block = count - first < size ? count - first : size, columns = padded(block);
    transposed(head, head.gradient(), first, block, 1, grad, turned, columns);
    if (first == 0) values = head.read(head.input(2), 0, count, v);
    if (once) head.expect(head.input(0));
    product<false>(count, columns, width, values, turned, columns, dscores, columns);
    if (params.shares) {
      softmax_backward(head.shares(), weights, dscores, count, columns, params.scale);
    } else {
      transpose(head.copied(head.input(0), first, block, q), block, width, params.scale, turned, columns);
      if (first == 0) head.copied(head.input(1), 0, count, k);
      product<false>(count, columns, width, {k, width, 1}, turned, columns, weights, columns);
      for (int t = 0; t < columns; ++t) lse[t] = t < block ? head.lse()[first + t] : 0;
      shares_again(weights, count, columns, lse);
      softmax_backward(weights, weights, dscores, count, columns, params.scale);
    }
    head.copied(head.gradient(), first, block, grad);
    const Left p = {weights, columns, 1}, ds = {dscores, columns, 1}, turned_ds = {dscores, 1, columns};
    const auto give = [&](int j, int from) {
      return [&head, from, rows = head.found(j)](int i, const float* sums) { head.give(sums, 1, rows[from + i]); };
    };
    if (once) {
      if (params.shares) head.expect(head.input(1));
      product_by_rows(count, width, block, p, grad, width, space, give(2, 0));
      if (params.shares) head.copied(head.input(0), 0, count, q);
      head.expect(head.gradient(), params.width);
      product_by_rows(count, width, block, ds, q, width, space, give(1, 0));
      if (params.shares) {
        k = q;
        head.copied(head.input(1), 0, count, k);
      }
      head.expect(head.input(2), params.stride[3]);
      product_by_rows(count, width, count, turned_ds, k, width, space, give(0, 0));
      return;
    }
    product_by_rows(block, width, count, turned_ds, k, width, space, give(0, first));
    if (first == 0) {
      product<false>(count, width, block, ds, q, width, dk, width);
      product<false>(count, width, block, p, grad, width, dv, width);
    } else {
      product<true>(count, width, block, ds, q, width, dk, width);
      product<true>(count, width, block, p, grad, width, dv, width);
    }
  }
  for (int t = 0; t < count; ++t) {
    head.give(dk + t * width, 1, head.found(1)[t]);
    head.give(dv + t * width, 1, head.found(2)[t]);
  }
}

template <class T>
void forward_head(const AttentionParams& params, int64_t task) {
  const Head<T> head(params, task);
  if (!forward_in_pairs(head)) forward_in_floats(head);
  for (int t = head.count; t < params.n; ++t) {
    memset(head.output()[t], 0, params.width * sizeof(T));
    if (params.lse) head.lse()[t] = 0;
  }
}

template <class T>
void backward_head(const AttentionParams& params, int64_t task) {
  const Head<T> head(params, task);
  if (!backward_in_pairs(head)) backward_in_floats(head);
}

template <void (*HEAD)(const AttentionParams&, int64_t)>
void heads(const AttentionParams& p, Part part) {
  const int64_t first = part.first(p.batch * p.heads);
  share(part.last(p.batch * p.heads) - first, 8. * p.n * p.n * p.width, [&](int64_t begin, int64_t end) {
    for (int64_t task = first + begin; task < first + end; ++task) HEAD(p, task);
  });
}

}  // namespace

extern "C" int64_t smi_attention_shares(const AttentionParams* p) { return shares_of(*p); }

#define EXPORT(dtype, T)                                                                                                    \
  extern "C" void smi_attention_forward_##dtype(const AttentionParams* p, Part part) { heads<forward_head<T>>(*p, part); }  \
  extern "C" void smi_attention_backward_##dtype(const AttentionParams* p, Part part) { heads<backward_head<T>>(*p, part); }
EXPORT(float32, float)
EXPORT(bfloat16, bfloat16)
EXPORT(float16, _Float16)
