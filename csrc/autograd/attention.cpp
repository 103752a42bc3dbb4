// smi::attention_eager, attention for the CPU as one operation whose gradient is C++ too: where the arithmetic takes a millisecond, Python's autograd
// costs a third of that. For backward it saves unnormalised softmax weights or lse, as csrc/cpu/attention.h chooses.
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/basic_ops.h>
#include <torch/library.h>

#include <cmath>

#include "../cpu/attention.h"

namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Integers = std::optional<Tensor>;

enum Which { FORWARD, BACKWARD };
AttentionFunction functions[2][3];  // for float32, bfloat16 and float16

void run(Which which, const Tensor& qkv, const AttentionParams& params) {
  const at::ScalarType type = qkv.scalar_type();
  TORCH_CHECK(type == at::kFloat || type == at::kBFloat16 || type == at::kHalf, "attention_eager: qkv must be float32, bfloat16 or float16");
  functions[which][type == at::kFloat ? 0 : type == at::kBFloat16 ? 1 : 2](&params, {0, 1, 1});
}

bool integers(const Integers& x, int64_t dims, int64_t batch) {
  return !x || ((x->scalar_type() == at::kInt || x->scalar_type() == at::kLong) && x->is_cpu() && x->dim() == dims && x->size(0) == batch);
}

// Whether all of x lie in [lowest, end): what is beyond would be read and written beyond the memory.
void check_range(const char* name, const Integers& x, int64_t lowest, int64_t end) {
  if (!x || !x->numel()) return;
  const Tensor wide = x->to(at::kLong).contiguous();
  const int64_t* at = wide.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < wide.numel(); ++i)
    TORCH_CHECK_INDEX(lowest <= at[i] && at[i] < end, "attention: ", name, " must lie from ", lowest, " to ", end - 1, ", got ", at[i]);
}

void check(const Tensor& qkv, const Integers& index, const Integers& lengths) {
  const bool fits = qkv.is_cpu() && qkv.dim() == 5 && qkv.size(2) == 3 && qkv.size(1) > 0 && qkv.size(3) > 0 && qkv.size(4) > 0 &&
                    integers(index, 2, qkv.size(0)) && (!index || (index->size(1) > 0 && index->size(1) <= qkv.size(1))) &&
                    integers(lengths, 1, qkv.size(0));
  TORCH_CHECK_VALUE(fits, "attention_eager: qkv must be [B, L, 3, H, D], index integers [B, n], n <= L, lengths integers [B]");
  check_range("index", index, 0, qkv.size(1));
  check_range("lengths", lengths, 0, (index ? index->size(1) : qkv.size(1)) + 1);
}

AttentionParams params_of(const Tensor& qkv, const Tensor& index, const Tensor& lengths, double scale) {
  AttentionParams p{};
  p.qkv = qkv.const_data_ptr();
  for (int i = 0; i < 4; ++i) p.stride[i] = qkv.stride(i);
  p.batch = qkv.size(0), p.rows = qkv.size(1), p.heads = qkv.size(3), p.width = qkv.size(4);
  p.n = index.defined() ? index.size(1) : p.rows;
  if (index.defined()) p.index = index.const_data_ptr<int64_t>();
  if (lengths.defined()) p.lengths = lengths.const_data_ptr<int64_t>();
  p.scale = float(scale);
  return p;
}

// out; and what backward needs, if it is wanted, to `kept`.
Tensor forward(const Tensor& qkv, const Tensor& index, const Tensor& lengths, double scale, Tensor* kept) {
  AttentionParams p = params_of(qkv, index, lengths, scale);
  const Tensor out = at::empty({p.batch, p.n, p.heads * p.width}, qkv.options());
  p.out = out.mutable_data_ptr();
  if (const int64_t shares = kept ? shares_of(p) : 0) {
    *kept = at::empty({shares}, qkv.options());
    p.shares = kept->mutable_data_ptr();
  } else if (kept) {
    *kept = at::empty({p.batch, p.heads, p.n}, qkv.options().dtype(at::kFloat));
    p.lse = kept->mutable_data_ptr<float>();
  }
  run(FORWARD, qkv, p);
  return out;
}

Tensor backward(const Tensor& given, const Tensor& qkv, const Integers& chosen, const Integers& real, double scale, const Tensor& kept) {
  check(qkv, chosen, real);
  const Tensor grad = given.contiguous(), index = chosen ? *chosen : Tensor(), lengths = real ? *real : Tensor();
  AttentionParams p = params_of(qkv, index, lengths, scale);
  const int64_t shares = shares_of(p);
  const bool fits = qkv.stride(4) == 1 && grad.is_cpu() && grad.scalar_type() == qkv.scalar_type() && kept.is_cpu() && kept.is_contiguous() &&
                    grad.sizes() == at::IntArrayRef({p.batch, p.n, p.heads * p.width}) &&
                    kept.numel() == (shares ? shares : p.batch * p.heads * p.n) && kept.scalar_type() == (shares ? qkv.scalar_type() : at::kFloat);
  TORCH_CHECK_VALUE(fits, "attention_eager_backward: grad and what was kept do not fit qkv");
  TORCH_CHECK_VALUE((!chosen || index.is_contiguous()) && (!real || lengths.is_contiguous()), "attention_eager_backward: index must be contiguous");
  const bool whole = !index.defined() && !lengths.defined();  // then every row is written
  const Tensor dqkv = whole ? at::empty(qkv.sizes(), qkv.options()) : at::zeros(qkv.sizes(), qkv.options());
  p.grad = grad.const_data_ptr();
  p.dqkv = dqkv.mutable_data_ptr();
  if (shares) {
    p.shares = kept.mutable_data_ptr();
  } else {
    p.lse = kept.mutable_data_ptr<float>();
  }
  run(BACKWARD, qkv, p);
  return dqkv;
}

Tensor rows_of(const Tensor& qkv) { return qkv.stride(4) == 1 ? qkv : qkv.contiguous(); }
Tensor wide(const Integers& x) { return x ? x->to(at::kLong).contiguous() : Tensor(); }
Integers maybe(const Tensor& x) { return x.defined() ? Integers(x) : std::nullopt; }

struct Attention : torch::autograd::Function<Attention> {
  static Tensor forward(AutogradContext* ctx, const Tensor& qkv, const Integers& index, const Integers& lengths, double scale) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    const Tensor rows = rows_of(qkv), chosen = wide(index), real = wide(lengths);
    Tensor kept;
    const Tensor out = ::forward(rows, chosen, real, scale, &kept);
    ctx->save_for_backward({rows, chosen, real, kept});
    ctx->saved_data["scale"] = scale;
    ctx->set_materialize_grads(false);
    return out;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list found(4);
    if (!grads[0].defined()) return found;
    const variable_list saved = ctx->get_saved_variables();
    {
      const at::NoGradGuard guard;  // through the dispatcher: a gradient may be a batch of them, negated lazily, a fake
      static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("smi::attention_eager_backward", "").typed<decltype(::backward)>();
      found[0] = op.call(grads[0], saved[0], maybe(saved[1]), maybe(saved[2]), ctx->saved_data["scale"].toDouble(), saved[3]);
    }
    if (at::GradMode::is_enabled()) {  // with create_graph: say so where somebody differentiates this
      found[0] = found[0].detach().set_requires_grad(true);
      found[0] = (*std::make_shared<torch::autograd::DelayedError>("attention can be differentiated once, not twice", 1))({found[0]})[0];
    }
    return found;
  }
};

Tensor attention_eager(const Tensor& qkv, const Integers& index, const Integers& lengths, std::optional<double> given) {
  check(qkv, index, lengths);
  const double scale = given ? *given : 1 / std::sqrt(double(qkv.size(4)));
  if (at::GradMode::is_enabled() && qkv.requires_grad()) return Attention::apply(qkv, index, lengths, scale);
  const at::AutoDispatchBelowADInplaceOrView guard;
  return forward(rows_of(qkv), wide(index), wide(lengths), scale, nullptr);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(smi, m) {
  m.def("attention_eager(Tensor qkv, Tensor? index, Tensor? lengths, float? scale) -> Tensor");
  m.def("attention_eager_backward(Tensor grad, Tensor qkv, Tensor? index, Tensor? lengths, float scale, Tensor kept) -> Tensor");
  m.impl("attention_eager_backward", torch::dispatch(c10::DispatchKey::CPU, backward));
  m.impl("attention_eager", torch::dispatch(c10::DispatchKey::CPU, attention_eager));
  m.impl("attention_eager", torch::dispatch(c10::DispatchKey::AutogradCPU, attention_eager));
}

extern "C" void smi_use_attention(const AttentionFunction* six) {
  for (int i = 0; i < 6; ++i) functions[i / 3][i % 3] = six[i];
}
