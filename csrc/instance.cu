// The kernels of one element type and padded head size, APT_TYPE and APT_WIDTH; compiled once for each.
#include <algorithm>
#include <iterator>

#include "dispatch.h"
#include "plain.cuh"
#include "plain_gradients.cuh"
#include "plain_key_gradients.cuh"
#include "sums.cuh"

namespace apt {

using T = APT_TYPE;
constexpr int kWidth = APT_WIDTH;

template <>
Tile tile<T, kWidth>(Kernel kernel) {
    using Forward = Cut<T, kWidth, false>;
    using Backward = Cut<T, kWidth, true>;
    switch (kernel) {
        case Kernel::forward:
            return {Forward::ROWS, Forward::COLS, Forward::SHARED, {Forward::SHARED, Forward::SHARED}};
        case Kernel::query:
            return {Backward::ROWS, Backward::COLS, Backward::SHARED,
                    {QueryCut<T, kWidth, 1>::SHARED, QueryCut<T, kWidth, 2>::SHARED}};
        case Kernel::key_value:
            return {Backward::ROWS, Backward::COLS, Backward::SHARED, {0, KeyCut<T, kWidth, false>::SHARED}};
        case Kernel::prefix:
            return {Backward::ROWS, Backward::COLS, Backward::SHARED, {0, KeyCut<T, kWidth, true>::SHARED}};
        default:
            return {Backward::ROWS, Backward::COLS, Backward::SHARED, {}};
    }
}

template <>
bool is_plain<T, kWidth>(Kernel kernel, const Problem& p) {
    const Array* loaded[] = {&p.query, &p.key, &p.value, &p.prefix_key, &p.prefix_value, &p.grad_out};
    if (kWidth > 128 || (kWidth > 64 && gate_per_query(p) && !has_asynchronous_copies())) {
        return false;
    }
    switch (kernel) {
        case Kernel::forward:
        case Kernel::query:
            break;
        case Kernel::key_value:
        case Kernel::prefix:
            if (!has_asynchronous_copies() || (kernel == Kernel::prefix && !kTakesKeys<kWidth, true>)) {
                return false;
            }
            break;
        default:
            return false;
    }
    return p.head_dim == kWidth && p.value_dim == kWidth && p.softcap == 0 && !p.seed.data && !has_mask_tensors(p) &&
           p.scale > 0 && (!p.gate.data || p.gate.stride[3] == 1 || p.length == 1) &&
           std::all_of(std::begin(loaded), std::end(loaded), [](const Array* a) {
               return !a->data || (a->vectors && a->stride[2] <= kFarthestRow / int64_t(sizeof(T)));
           });
}

template <>
void run<T, kWidth>(Kernel kernel, const Problem& p, void* stream) {
    using Forward = Cut<T, kWidth, false>;
    using Backward = Cut<T, kWidth, true>;
    const bool plain = is_plain<T, kWidth>(kernel, p);
    const int64_t kv_heads = p.heads / p.group, bh = p.batch * p.heads;
    auto tiles = [](int64_t length, int size) { return (length + size - 1) / size; };
    auto backward = [&](auto* function, int64_t blocks) {
        launch(function, blocks, Backward::THREADS, Backward::SHARED, p, stream);
    };
    // Launch the straight kernel if the call is plain, else the general one.
    const bool two = has_asynchronous_copies();
    auto either = [&](auto* straight, auto* general, int64_t blocks) {
        const int shared = plain ? tile<T, kWidth>(kernel).plain[two] : Backward::SHARED;
        launch(plain ? straight : general, blocks, Backward::THREADS, shared, p, stream);
    };
    switch (kernel) {
        case Kernel::forward:
            return launch(plain ? plain_forward<T, kWidth> : attention_forward<T, kWidth>,
                          tiles(p.queries, Forward::ROWS) * bh, Forward::THREADS,
                          Forward::SHARED, p, stream);
        case Kernel::query:
            return either(two ? plain_query_gradient<T, kWidth, 2> : plain_query_gradient<T, kWidth, 1>,
                          query_gradient<T, kWidth>, tiles(p.queries, Backward::ROWS) * bh);
        case Kernel::key_value:
            return either(plain_key_gradient<T, kWidth, false>, key_gradient<T, kWidth, false>,
                          tiles(p.keys, Backward::ROWS) * kv_heads * p.batch * kParts<kWidth>);
        case Kernel::prefix:
            return either(plain_key_gradient<T, kWidth, true>, key_gradient<T, kWidth, true>,
                          tiles(p.length, Backward::ROWS) * kv_heads * p.splits * tiles(p.batch, int(p.chunk)) *
                              kParts<kWidth>);
        case Kernel::gate:
            return backward(summed_gradient<T, kWidth, true>,
                            tiles(p.queries, Backward::ROWS) * tiles(p.length, Backward::COLS) * p.batch);
        case Kernel::bias: {
            const int64_t* s = p.sums.stride;
            return backward(summed_gradient<T, kWidth, false>,
                            (s[3] ? tiles(p.keys, Backward::COLS) : 1) * (s[2] ? tiles(p.queries, Backward::ROWS) : 1) *
                                (s[1] ? p.heads : 1) * (s[0] ? p.batch : 1));
        }
        case Kernel::delta:
            return launch(row_deltas<T>, tiles(bh * p.queries, kRowThreads / 32), kRowThreads, 0, p, stream);
        case Kernel::index:
            return launch(indexed_sum<float>, tiles(p.length, kRowThreads) * p.splits, kRowThreads, 0, p, stream);
    }
}

}  // namespace apt
