// The host side of the linear layers without a GPU or a driver: what CUTLASS would launch for given sizes, which tensor maps it would encode, and what
// the epilogues compute, by walking the visitor trees that the kernels are made of. TMA and the multiplications themselves are not emulated. Compiled by
// nvcc, of which only the host's half is run.
#include "../cuda/linear_gemm.cuh"

namespace {

using namespace smi;

struct Map {  // of a tensor in global memory, as cuTensorMapEncodeTiled takes it; innermost first
    const void* address;
    uint64_t sizes[5], pitches[5];  // numbers; bytes, of all but the innermost
    uint32_t box[5], rank, swizzle, type;
};

struct Launch {
    bool possible;
    uint64_t workspace;
    uint32_t grid[3], shared, stages, threads, maps;
    Map map[8];
};

Launch found;

CUresult encode(CUtensorMap*, CUtensorMapDataType type, cuuint32_t rank, void* address, const cuuint64_t* sizes, const cuuint64_t* pitches, const cuuint32_t* box,
                const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle swizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
    Map& map = found.map[found.maps++];
    map = {address, {}, {}, {}, rank, static_cast<uint32_t>(swizzle), static_cast<uint32_t>(type)};
    for (uint32_t i = 0; i < rank; ++i) map.sizes[i] = sizes[i], map.box[i] = box[i], map.pitches[i] = i ? pitches[i - 1] : 0;
    return CUDA_SUCCESS;
}

template <class G>
void describe(const LinearParams& p) {
    using Kernel = typename G::Kernel;
    const auto arguments = G::arguments(p);
    found = {};
    found.possible = G::Gemm::can_implement(arguments) == cutlass::Status::kSuccess;
    found.workspace = G::Gemm::get_workspace_size(arguments);
    const auto params = Kernel::to_underlying_arguments(arguments, p.workspace);
    const dim3 grid = Kernel::get_grid_shape(params);
    found.grid[0] = grid.x, found.grid[1] = grid.y, found.grid[2] = grid.z;
    found.shared = Kernel::SharedStorageSize;
    found.stages = G::Mainloop::DispatchPolicy::Stages;
    found.threads = Kernel::MaxThreadsPerBlock;
}

// One result of a visitor tree: acc and the tensors of its arguments at row m, column n.
struct Place {
    float acc;
    int64_t m, n, columns;
    const void* other;
};

template <int I, class Arguments>
const auto& argument(const Arguments& all) {
    if constexpr (requires { all.op_0; }) {
        if constexpr (I == 0) return all.op_0;
        if constexpr (I == 1) return all.op_1;
        if constexpr (I == 2) return all.op_2;
        if constexpr (I == 3) return all.op_3;
    } else {
        return cute::get<I>(all);
    }
}

template <class Node>
struct Walk;

template <>
struct Walk<fusion::Sm90AccFetch> {
    template <class A>
    static float at(const A&, const Place& place) { return place.acc; }
};

template <class E>
struct Walk<fusion::Sm90SrcFetch<E>> {
    template <class A>
    static E at(const A&, const Place& place) { return static_cast<const E*>(place.other)[place.m * place.columns + place.n]; }
};

template <class Tile, class E>
struct Walk<PerColumn<Tile, E>> {
    template <class A>
    static E at(const A& argument, const Place& place) { return argument.ptr_row ? argument.ptr_row[place.n] : argument.null_default; }
};

template <int STAGES, class Tile, class E, auto ROUND, class Stride, class Layout, class Copy, int ALIGNED, bool NULLABLE, class Child>
struct Walk<fusion::Sm90EVT<fusion::Sm90AuxStore<STAGES, Tile, E, ROUND, Stride, Layout, Copy, ALIGNED, NULLABLE>, Child>> {
    template <class A>
    static E at(const A& arguments, const Place& place) {
        const E value = Walk<Child>::at(argument<0>(arguments), place);
        const auto& store = argument<1>(arguments);
        if (store.ptr_aux) store.ptr_aux[place.m * cute::get<0>(store.dAux) + place.n] = value;
        return value;
    }
};

template <template <class> class F, class To, auto ROUND, class... Children>
struct Walk<fusion::Sm90EVT<fusion::Sm90Compute<F, To, float, ROUND>, Children...>> {
    template <class A>
    static To at(const A& arguments, const Place& place) {
        using One = cutlass::Array<float, 1>;
        const auto one = [](float x) { One a; a[0] = x; return a; };
        return [&]<size_t... I>(std::index_sequence<I...>) {
            const One result = F<One>{}(one(static_cast<float>(Walk<Children>::at(argument<I>(arguments), place)))...);
            return cutlass::NumericConverter<To, float, ROUND>{}(result[0]);
        }(std::index_sequence_for<Children...>{});
    }
};

template <class Input, class Output, class Aux>
struct Walk<fusion::Sm90SplitTreeVisitor<Input, Output, Aux>> {
    template <class A>
    static auto at(const A& arguments, Place place) {
        place.acc = Walk<Input>::at(argument<0>(arguments), place);
        Walk<Aux>::at(argument<1>(arguments), place);
        return Walk<Output>::at(argument<2>(arguments), place);
    }
};

template <class G>
void epilogue(const LinearParams& p, const float* acc) {
    using Layer = typename G::Layer;
    auto* out = static_cast<typename Layer::Number*>(p.out);
    const auto arguments = Layer::arguments(p);
    for (int64_t m = 0; m < p.rows; ++m) {
        for (int64_t n = 0; n < p.columns; ++n) {
            out[m * p.columns + n] = Walk<typename Layer::Tree>::at(arguments, {acc[m * p.columns + n], m, n, p.columns, p.other});
        }
    }
}

template <class F>
void with_kernel(int kind, Division division, F f) {  // in bfloat16; float16 differs in the last conversion only
    if (kind == 0) with_gemm<Linear::gelu, Number::bf16>(division, f);
    if (kind == 1) with_gemm<Linear::residual, Number::bf16>(division, f);
    if (kind == 2) with_gemm<Linear::gelu_gradient, Number::bf16>(division, f);
}

}  // namespace

// In place of the CUDA runtime's, which asks the driver.
extern "C" cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** function, unsigned int, unsigned long long, cudaDriverEntryPointQueryResult* result) {
    *function = reinterpret_cast<void*>(encode);
    *result = cudaDriverEntryPointSuccess;
    return cudaSuccess;
}

// What would be launched; kind: as Linear of csrc/cuda/linear.h.
extern "C" const void* smi_linear_launch(int kind, const LinearParams* p) {
    with_kernel(kind, p->division, [&]<class G>(G) { describe<G>(*p); });
    return &found;
}

// out, and what is saved, from acc [rows, columns] by the visitor tree.
extern "C" void smi_linear_epilogue(int kind, const LinearParams* p, const float* acc) {
    with_kernel(kind, p->division, [&]<class G>(G) { epilogue<G>(*p, acc); });
}
