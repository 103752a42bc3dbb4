// Linear layers as persistent, warp-specialised GEMMs with TMA, by CUTLASS's builders for sm_90a; the epilogues are visitor trees of
// linear_epilogue.h. Instantiated in linear_<number>.cu.
#pragma once

#include "cute/tensor.hpp"
#include "cutlass/cutlass.h"
#include "cutlass/epilogue/collective/collective_builder.hpp"
#include "cutlass/epilogue/fusion/operations.hpp"
#include "cutlass/gemm/collective/collective_builder.hpp"
#include "cutlass/gemm/device/gemm_universal_adapter.h"
#include "cutlass/gemm/kernel/gemm_universal.hpp"
#include "linear_epilogue.h"
#include "linear_run.h"

namespace smi {

namespace fusion = cutlass::epilogue::fusion;
using Row = cutlass::layout::RowMajor;
using Column = cutlass::layout::ColumnMajor;
using cute::Int;
using cute::Shape;
using cute::Stride;

constexpr int ALIGNMENT = 8;  // numbers: 16 bytes, the least that TMA takes
constexpr auto NEAREST = cutlass::FloatRoundStyle::round_to_nearest;

// 128 x 192 results, 64 along the contraction at a time. 192 divides the widths of all DeiT models (192, 384, 768 and four times these). The tensor
// cores need 768 cycles a step, in which 40 KB of operands arrive, 53 bytes a cycle; 64 x 192 would need 85 and 128 x 128 64, where a multiprocessor
// takes 64 at most.
using LargeTile = Shape<Int<128>, Int<192>, Int<64>>;
// For few rows: a third of the results, 384 cycles a step, in which 24 KB arrive.
using SmallTile = Shape<Int<64>, Int<128>, Int<64>>;
// A warpgroup a tile, two of which take turns: the epilogue of one runs behind the multiplications of the other.
struct PingPong {
    using Tile = LargeTile;
    using Mainloop = cutlass::gemm::KernelTmaWarpSpecializedPingpong;
    using Epilogue = cutlass::epilogue::TmaWarpSpecialized;
    using Scheduler = cutlass::gemm::PersistentScheduler;
};
struct SmallPingPong : PingPong {
    using Tile = SmallTile;
};
// Two warpgroups a tile, half of its sums each: for an epilogue that needs more registers than 192 sums a thread leave (GELU and its derivative).
struct Cooperative {
    using Tile = LargeTile;
    using Mainloop = cutlass::gemm::KernelTmaWarpSpecializedCooperative;
    using Epilogue = cutlass::epilogue::TmaWarpSpecializedCooperative;
    using Scheduler = cutlass::gemm::PersistentScheduler;
};
// The same, and multiprocessors take equal parts of all contractions; parts of one tile are added in a fixed order, so that bits repeat.
struct StreamK {
    using Tile = LargeTile;
    using Mainloop = cutlass::gemm::KernelTmaWarpSpecializedCooperative;
    using Epilogue = cutlass::epilogue::TmaWarpSpecializedCooperative;
    using Scheduler = cutlass::gemm::StreamKScheduler;
};
using Cluster = Shape<Int<2>, Int<1>, Int<1>>;  // two tiles of rows share each load of the weight

// F, a function of floats, on arrays of them, as CUTLASS's visitors want it.
template <class F, class Array>
struct Elementwise {
    template <class... Arrays>
    CUTLASS_HOST_DEVICE Array operator()(const Array& first, const Arrays&... rest) const {
        Array result;
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < Array::kElements; ++i) result[i] = F{}(first[i], rest[i]...);
        return result;
    }
};
template <class F>
struct Elementwise<F, float> {};  // only asked whether it has arguments of its own

struct AddF { SMI_INLINE float operator()(float a, float b) const { return a + b; } };
struct GeluF { SMI_INLINE float operator()(float h) const { return gelu(h); } };
struct SavedF { SMI_INLINE float operator()(float h) const { return saved_of(h); } };
struct SlopeF { SMI_INLINE float operator()(float gradient, float saved) const { return times_slope(gradient, saved); } };
struct ResidualF { SMI_INLINE float operator()(float acc, float bias, float gamma, float other) const { return residual_of(acc, bias, gamma, other); } };
template <class T> using Add = Elementwise<AddF, T>;
template <class T> using Gelu = Elementwise<GeluF, T>;
template <class T> using Saved = Elementwise<SavedF, T>;
template <class T> using Slope = Elementwise<SlopeF, T>;
template <class T> using Residual = Elementwise<ResidualF, T>;

template <template <class> class F, class To, class... Children>
using Apply = fusion::Sm90EVT<fusion::Sm90Compute<F, To, float, NEAREST>, Children...>;

// [columns], the same in every row; null: a constant.
template <class Tile, class E>
using PerColumn = fusion::Sm90RowBroadcast<0, Tile, E, float>;

// Each kind: the layout of W, what is read beside x and W (Source), the visitor tree and its arguments.
template <class E, class T>
struct GeluLayer {
    using Number = E;
    using Turns = T;
    using Source = void;
    using Weight = Column;
    using Descriptor = cutlass::epilogue::collective::detail::EpilogueDescriptor<typename T::Tile, cutlass::epilogue::collective::EpilogueTileAuto, E, E,
                                                                                 typename T::Epilogue>;
    using Store = cutlass::epilogue::collective::detail::AuxStoreDescriptor<Descriptor, Row, E>;
    using SavedTensor = fusion::Sm90AuxStore<Store::Stages, typename Descriptor::EpilogueTile, E, NEAREST, typename Store::Stride,
                                             typename Store::SmemLayoutAtom, typename Store::CopyOpR2S>;
    using Tree = fusion::Sm90SplitTreeVisitor<Apply<Add, float, fusion::Sm90AccFetch, PerColumn<typename T::Tile, E>>, Apply<Gelu, E, fusion::Sm90SplitTreeFetch>,
                                              fusion::Sm90EVT<SavedTensor, Apply<Saved, E, fusion::Sm90SplitTreeFetch>>>;
    static typename Tree::Arguments arguments(const LinearParams& p) {
        return {
            {{}, {static_cast<const E*>(p.bias), E(0)}, {}},
            {{{}, {}}, {static_cast<E*>(p.saved), {p.columns, {}, 0}}},
            {{}, {}},
        };
    }
};

template <class E, class T>
struct ResidualLayer {
    using Number = E;
    using Turns = T;
    using Source = E;
    using Weight = Column;
    using Tree = Apply<Residual, E, fusion::Sm90AccFetch, PerColumn<typename T::Tile, E>, PerColumn<typename T::Tile, E>, fusion::Sm90SrcFetch<E>>;
    static typename Tree::Arguments arguments(const LinearParams& p) {
        return {{}, {static_cast<const E*>(p.bias), E(0)}, {static_cast<const E*>(p.gamma), E(1)}, {}, {}};
    }
};

template <class E, class T>
struct GeluGradient {
    using Number = E;
    using Turns = T;
    using Source = E;
    using Weight = Row;
    using Tree = Apply<Slope, E, fusion::Sm90AccFetch, fusion::Sm90SrcFetch<E>>;
    static typename Tree::Arguments arguments(const LinearParams&) { return {{}, {}, {}}; }
};

template <class L>
struct LinearGemm {
    using Layer = L;
    using E = typename Layer::Number;
    using T = typename Layer::Turns;
    using Tile = typename T::Tile;
    using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
        cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Tile, Cluster, cutlass::epilogue::collective::EpilogueTileAuto, float, float,
        typename Layer::Source, Row, ALIGNMENT, E, Row, ALIGNMENT, typename T::Epilogue, typename Layer::Tree>::CollectiveOp;
    using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
        cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, E, Row, ALIGNMENT, E, typename Layer::Weight, ALIGNMENT, float, Tile, Cluster,
        cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(sizeof(typename Epilogue::SharedStorage))>, typename T::Mainloop>::CollectiveOp;
    struct Kernel : cutlass::gemm::kernel::GemmUniversal<Shape<int, int, int, int>, Mainloop, Epilogue, typename T::Scheduler> {};  // a short name
    using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;

    static typename Gemm::Arguments arguments(const LinearParams& p) {
        typename Kernel::StrideB weight;
        if constexpr (std::is_same_v<typename Layer::Weight, Column>) {
            weight = {p.depth, {}, 0};
        } else {
            weight = {{}, p.columns, 0};
        }
        typename Gemm::Arguments arguments{
            cutlass::gemm::GemmUniversalMode::kGemm,
            {p.rows, p.columns, p.depth, 1},
            {static_cast<const E*>(p.x), {p.depth, {}, 0}, static_cast<const E*>(p.weight), weight},
            {Layer::arguments(p), nullptr, {p.columns, {}, 0}, static_cast<E*>(p.out), {p.columns, {}, 0}},
        };
        if constexpr (!std::is_void_v<typename Layer::Source>) arguments.epilogue.ptr_C = static_cast<const E*>(p.other);
        arguments.hw_info.sm_count = p.multiprocessors;
        if constexpr (std::is_same_v<T, StreamK>) {
            arguments.scheduler.decomposition_mode = cutlass::gemm::kernel::detail::PersistentTileSchedulerSm90StreamKParams::DecompositionMode::StreamK;
        }
        return arguments;
    }
};

template <Linear KIND, class E, class T>
using LayerOf = std::conditional_t<KIND == Linear::gelu, GeluLayer<E, T>, std::conditional_t<KIND == Linear::residual, ResidualLayer<E, T>, GeluGradient<E, T>>>;

template <Number NUMBER>
using Element = std::conditional_t<NUMBER == Number::bf16, cutlass::bfloat16_t, cutlass::half_t>;

// f(the kernel). Only `residual` has stream-K: its epilogue is short, its contraction long.
template <Linear KIND, Number NUMBER, class F>
auto with_gemm(Division division, F f) {
    if (division == Division::small) return f(LinearGemm<LayerOf<KIND, Element<NUMBER>, SmallPingPong>>{});
    if constexpr (KIND == Linear::residual) {
        if (division == Division::stream_k) return f(LinearGemm<LayerOf<KIND, Element<NUMBER>, StreamK>>{});
    }
    if constexpr (KIND == Linear::gelu) return f(LinearGemm<LayerOf<KIND, Element<NUMBER>, Cooperative>>{});
    else return f(LinearGemm<LayerOf<KIND, Element<NUMBER>, PingPong>>{});
}

template <Linear KIND, Number NUMBER>
size_t LinearKernels<KIND, NUMBER>::workspace_bytes(const LinearParams& p) {
    return with_gemm<KIND, NUMBER>(p.division, [&]<class G>(G) { return G::Gemm::get_workspace_size(G::arguments(p)); });
}

template <Linear KIND, Number NUMBER>
const char* LinearKernels<KIND, NUMBER>::run(const LinearParams& p, cudaStream_t stream) {
    return with_gemm<KIND, NUMBER>(p.division, [&]<class G>(G) -> const char* {
        const typename G::Gemm::Arguments arguments = G::arguments(p);
        typename G::Gemm gemm;
        cutlass::Status status = G::Gemm::can_implement(arguments);
        if (status == cutlass::Status::kSuccess) status = gemm.initialize(arguments, p.workspace, stream);
        if (status == cutlass::Status::kSuccess) status = gemm.run(stream);
        return status == cutlass::Status::kSuccess ? nullptr : cutlass::cutlassGetStatusString(status);
    });
}

}  // namespace smi
