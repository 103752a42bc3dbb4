// The only file that sees torch, through its stable ABI: the library runs with every later torch and every Python.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>

#include "attention_run.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void expect_buffer(const Tensor& x, const char* name, int64_t dimensions, ScalarType type, const Tensor& qkv) {
    STD_TORCH_CHECK(x.is_cuda() && x.get_device_index() == qkv.get_device_index(), name, " must be on the CUDA device of qkv");
    STD_TORCH_CHECK(x.dim() == dimensions && x.scalar_type() == type && x.is_contiguous(), name, " has the wrong shape, dtype or strides");
    STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(x.data_ptr()) % 16 == 0 || dimensions < 3, name, " must start at a multiple of 16 bytes");
}

bool expect_integers(const Tensor& x, const char* name, int64_t dimensions, const Tensor& qkv) {
    const bool wide = x.scalar_type() == ScalarType::Long;
    expect_buffer(x, name, dimensions, wide ? ScalarType::Long : ScalarType::Int, qkv);
    STD_TORCH_CHECK(x.size(0) == qkv.size(0), name, " must have one row per image");
    return wide;
}

smi::AttentionParams params_of(const Tensor& qkv, const std::optional<Tensor>& index, const std::optional<Tensor>& lengths, const Tensor& out, const Tensor& lse,
                               double scale) {
    const ScalarType type = qkv.scalar_type();
    STD_TORCH_CHECK(type == ScalarType::BFloat16 || type == ScalarType::Half, "qkv must be bfloat16 or float16");
    expect_buffer(qkv, "qkv", 5, type, qkv);
    smi::AttentionParams p{};
    p.qkv = qkv.data_ptr();
    p.batch = static_cast<int>(qkv.size(0));
    p.rows = p.tokens = static_cast<int>(qkv.size(1));
    p.heads = static_cast<int>(qkv.size(3));
    p.width = static_cast<int>(qkv.size(4));
    p.scale = static_cast<float>(scale);
    p.number = type == ScalarType::BFloat16 ? smi::Number::bf16 : smi::Number::fp16;
    if (index) {
        p.wide_index = expect_integers(*index, "index", 2, qkv);
        p.index = index->data_ptr();
        p.tokens = static_cast<int>(index->size(1));
    }
    if (lengths) {
        p.wide_lengths = expect_integers(*lengths, "lengths", 1, qkv);
        p.lengths = lengths->data_ptr();
    }
    STD_TORCH_CHECK(qkv.size(2) == 3 && p.width >= 8 && p.width % 8 == 0 && p.width <= smi::MOST_WIDTH, "qkv must be [B, L, 3, H, D], D a multiple of 8 up to ",
                    smi::MOST_WIDTH);
    const int most = smi::with_compiled_width(p.width, []<int BD>() { return smi::most_tokens(BD); });
    STD_TORCH_CHECK(p.tokens >= 1 && p.tokens <= most, "1 to ", most, " tokens fit at this width, these are ", p.tokens);
    expect_buffer(out, "out", 3, type, qkv);
    expect_buffer(lse, "lse", 3, ScalarType::Float, qkv);
    STD_TORCH_CHECK(out.numel() == static_cast<int64_t>(p.batch) * p.tokens * p.heads * p.width, "out must be [B, n, H * D]");
    STD_TORCH_CHECK(lse.numel() == static_cast<int64_t>(p.batch) * p.tokens * p.heads, "lse must be [B, H, n]");
    p.out = out.data_ptr();
    p.lse = static_cast<float*>(lse.data_ptr());
    return p;
}

void run(const smi::AttentionParams& p, bool backward, int32_t device) {
    if (p.batch == 0 || p.heads == 0) return;
    torch::stable::accelerator::DeviceGuard guard(device);
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
    const cudaError_t error = smi::with_compiled_width(
        p.width, [&]<int BD>() { return smi::run_attention<BD>(p, backward, static_cast<cudaStream_t>(stream)); });
    STD_TORCH_CHECK(error == cudaSuccess, "attention ", backward ? "backward" : "forward", ": ", cudaGetErrorString(error));
}

void attention_forward(Tensor qkv, std::optional<Tensor> index, std::optional<Tensor> lengths, double scale, Tensor out, Tensor lse) {
    run(params_of(qkv, index, lengths, out, lse, scale), false, qkv.get_device_index());
}

void attention_backward(Tensor dout, Tensor qkv, std::optional<Tensor> index, std::optional<Tensor> lengths, Tensor out, Tensor lse, double scale, Tensor dqkv) {
    smi::AttentionParams p = params_of(qkv, index, lengths, out, lse, scale);
    expect_buffer(dout, "dout", 3, qkv.scalar_type(), qkv);
    expect_buffer(dqkv, "dqkv", 5, qkv.scalar_type(), qkv);
    STD_TORCH_CHECK(dout.numel() == out.numel() && dqkv.numel() == qkv.numel(), "dout must have the shape of out, dqkv that of qkv");
    p.dout = dout.data_ptr();
    p.dqkv = dqkv.data_ptr();
    run(p, true, qkv.get_device_index());
}

}  // namespace

STABLE_TORCH_LIBRARY(smi_cuda, m) {
    m.def("attention_forward(Tensor qkv, Tensor? index, Tensor? lengths, float scale, Tensor(a!) out, Tensor(b!) lse) -> ()");
    m.def("attention_backward(Tensor dout, Tensor qkv, Tensor? index, Tensor? lengths, Tensor out, Tensor lse, float scale, Tensor(a!) dqkv) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(smi_cuda, CUDA, m) {
    m.impl("attention_forward", TORCH_BOX(&attention_forward));
    m.impl("attention_backward", TORCH_BOX(&attention_backward));
}
