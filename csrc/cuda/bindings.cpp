// The only file that sees torch, through its stable ABI: the libraries run with every later torch and every Python. It is compiled once for each
// library of csrc/build.py, with that library's operations.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>

#include "attention_run.h"
#include "linear_run.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void* current_stream(int32_t device) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
    return stream;
}

#ifdef SMI_ATTENTION

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
    const auto stream = static_cast<cudaStream_t>(current_stream(device));
    const cudaError_t error = smi::with_compiled_width(p.width, [&]<int BD>() { return smi::run_attention<BD>(p, backward, stream); });
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

#endif
#ifdef SMI_LINEAR

constexpr int64_t MOST_ROWS = INT32_MAX - 1024;  // of a tensor map, and of the sizes in int32

int attribute(cudaDeviceAttr which, int32_t device) {
    int value = 0;
    const cudaError_t error = cudaDeviceGetAttribute(&value, which, device);
    STD_TORCH_CHECK(error == cudaSuccess, "linear: ", cudaGetErrorString(error));
    return value;
}

const void* expect_operand(const std::optional<Tensor>& x, const char* name, std::initializer_list<int64_t> shape, const Tensor& like) {
    if (!x) return nullptr;
    STD_TORCH_CHECK(x->is_cuda() && x->get_device_index() == like.get_device_index(), name, " must be on the CUDA device of x");
    bool fits = x->scalar_type() == like.scalar_type() && x->is_contiguous() && x->dim() == static_cast<int64_t>(shape.size());
    for (int64_t i = 0; fits && i < x->dim(); ++i) fits = x->size(i) == shape.begin()[i];
    STD_TORCH_CHECK(fits, name, " has the wrong shape, dtype or strides");
    STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(x->data_ptr()) % 16 == 0, name, " must start at a multiple of 16 bytes");
    return x->data_ptr();
}

// x [rows, depth], weight [columns, depth] or, `transposed`, [depth, columns]; out [rows, columns].
smi::LinearParams params_of(const Tensor& x, const Tensor& weight, bool transposed, const Tensor& out, int64_t division) {
    const ScalarType type = x.scalar_type();
    STD_TORCH_CHECK(type == ScalarType::BFloat16 || type == ScalarType::Half, "x must be bfloat16 or float16");
    STD_TORCH_CHECK(x.dim() == 2 && weight.dim() == 2, "x and weight must be matrices");
    const int64_t rows = x.size(0), depth = x.size(1), columns = weight.size(transposed ? 1 : 0);
    STD_TORCH_CHECK(rows >= 1 && rows <= MOST_ROWS, "x must have 1 to ", MOST_ROWS, " rows");
    STD_TORCH_CHECK(depth >= 8 && depth % 8 == 0 && columns >= 8 && columns % 8 == 0 && depth <= MOST_ROWS && columns <= MOST_ROWS,
                    "the sizes of weight must be multiples of 8");
    const int32_t device = x.get_device_index();
    STD_TORCH_CHECK(x.is_cuda() && attribute(cudaDevAttrComputeCapabilityMajor, device) == 9 && attribute(cudaDevAttrComputeCapabilityMinor, device) == 0,
                    "x must be on a CUDA device of compute capability 9.0");
    STD_TORCH_CHECK(division >= 0 && division <= static_cast<int64_t>(smi::Division::stream_k), "division must be 0, 1 or 2, not ", division);
    smi::LinearParams p{};
    p.x = expect_operand(x, "x", {rows, depth}, x);
    p.weight = expect_operand(weight, "weight", {transposed ? depth : columns, transposed ? columns : depth}, x);
    p.out = const_cast<void*>(expect_operand(out, "out", {rows, columns}, x));
    p.rows = static_cast<int>(rows);
    p.columns = static_cast<int>(columns);
    p.depth = static_cast<int>(depth);
    p.division = static_cast<smi::Division>(division);
    p.multiprocessors = attribute(cudaDevAttrMultiProcessorCount, device);
    return p;
}

template <smi::Linear KIND, smi::Number NUMBER>
void launch(smi::LinearParams p, const Tensor& x) {
    using Kernels = smi::LinearKernels<KIND, NUMBER>;
    const int32_t device = x.get_device_index();
    torch::stable::accelerator::DeviceGuard guard(device);
    const auto bytes = static_cast<int64_t>(Kernels::workspace_bytes(p));
    std::optional<Tensor> workspace;  // from torch's allocator: in stream order, and part of a graph that is being captured
    if (bytes > 0) {
        workspace = torch::stable::new_empty(x, {bytes}, ScalarType::Byte);
        p.workspace = workspace->data_ptr();
    }
    const char* error = Kernels::run(p, static_cast<cudaStream_t>(current_stream(device)));
    STD_TORCH_CHECK(error == nullptr, "linear: ", error);
}

template <smi::Linear KIND>
void run_linear(const smi::LinearParams& p, const Tensor& x) {
    if (x.scalar_type() == ScalarType::BFloat16) {
        launch<KIND, smi::Number::bf16>(p, x);
    } else {
        launch<KIND, smi::Number::fp16>(p, x);
    }
}

void linear_gelu(Tensor x, Tensor weight, std::optional<Tensor> bias, Tensor out, std::optional<Tensor> saved, int64_t division) {
    smi::LinearParams p = params_of(x, weight, false, out, division);
    p.bias = expect_operand(bias, "bias", {p.columns}, x);
    p.saved = const_cast<void*>(expect_operand(saved, "saved", {p.rows, p.columns}, x));
    run_linear<smi::Linear::gelu>(p, x);
}

void linear_residual(Tensor x, Tensor weight, std::optional<Tensor> bias, std::optional<Tensor> gamma, Tensor residual, Tensor out, int64_t division) {
    smi::LinearParams p = params_of(x, weight, false, out, division);
    p.bias = expect_operand(bias, "bias", {p.columns}, x);
    p.gamma = expect_operand(gamma, "gamma", {p.columns}, x);
    p.other = expect_operand(residual, "residual", {p.rows, p.columns}, x);
    run_linear<smi::Linear::residual>(p, x);
}

void linear_gelu_gradient(Tensor grad, Tensor weight, Tensor saved, Tensor out, int64_t division) {
    smi::LinearParams p = params_of(grad, weight, true, out, division);
    p.other = expect_operand(saved, "saved", {p.rows, p.columns}, grad);
    run_linear<smi::Linear::gelu_gradient>(p, grad);
}

#endif

}  // namespace

// Fragments: both libraries add to one namespace.
STABLE_TORCH_LIBRARY_FRAGMENT(smi_cuda, m) {
#ifdef SMI_ATTENTION
    m.def("attention_forward(Tensor qkv, Tensor? index, Tensor? lengths, float scale, Tensor(a!) out, Tensor(b!) lse) -> ()");
    m.def("attention_backward(Tensor dout, Tensor qkv, Tensor? index, Tensor? lengths, Tensor out, Tensor lse, float scale, Tensor(a!) dqkv) -> ()");
#endif
#ifdef SMI_LINEAR
    m.def("linear_gelu(Tensor x, Tensor weight, Tensor? bias, Tensor(a!) out, Tensor(b!)? saved, int division) -> ()");
    m.def("linear_residual(Tensor x, Tensor weight, Tensor? bias, Tensor? gamma, Tensor residual, Tensor(a!) out, int division) -> ()");
    m.def("linear_gelu_gradient(Tensor grad, Tensor weight, Tensor saved, Tensor(a!) out, int division) -> ()");
#endif
}

STABLE_TORCH_LIBRARY_IMPL(smi_cuda, CUDA, m) {
#ifdef SMI_ATTENTION
    m.impl("attention_forward", TORCH_BOX(&attention_forward));
    m.impl("attention_backward", TORCH_BOX(&attention_backward));
#endif
#ifdef SMI_LINEAR
    m.impl("linear_gelu", TORCH_BOX(&linear_gelu));
    m.impl("linear_residual", TORCH_BOX(&linear_residual));
    m.impl("linear_gelu_gradient", TORCH_BOX(&linear_gelu_gradient));
#endif
}
