// The kernels of one element type and padded head size, APT_TYPE and APT_WIDTH; compiled once for each.
#include "dispatch.h"
#include "sums.cuh"

namespace apt {

using T = APT_TYPE;
constexpr int kWidth = APT_WIDTH;

template <>
Tile tile<T, kWidth>(Kernel kernel) {
    using Forward = Cut<T, kWidth, false>;
    using Backward = Cut<T, kWidth, true>;
    if (kernel == Kernel::forward) {
        return {Forward::ROWS, Forward::COLS, Forward::SHARED};
    }
    return {Backward::ROWS, Backward::COLS, Backward::SHARED};
}

template <>
void run<T, kWidth>(Kernel kernel, const Problem& p, void* stream) {
    using Forward = Cut<T, kWidth, false>;
    using Backward = Cut<T, kWidth, true>;
    const int64_t kv_heads = p.heads / p.group, bh = p.batch * p.heads;
    auto tiles = [](int64_t length, int size) { return (length + size - 1) / size; };
    auto backward = [&](auto* function, int64_t blocks) {
        launch(function, blocks, Backward::THREADS, Backward::SHARED, p, stream);
    };
    switch (kernel) {
        case Kernel::forward:
            return launch(attention_forward<T, kWidth>, tiles(p.queries, Forward::ROWS) * bh, Forward::THREADS,
                          Forward::SHARED, p, stream);
        case Kernel::query:
            return backward(query_gradient<T, kWidth>, tiles(p.queries, Backward::ROWS) * bh);
        case Kernel::key_value:
            return backward(key_gradient<T, kWidth, false>,
                            tiles(p.keys, Backward::ROWS) * kv_heads * p.batch * kParts<kWidth>);
        case Kernel::prefix:
            return backward(key_gradient<T, kWidth, true>, tiles(p.length, Backward::ROWS) * kv_heads * p.splits *
                                                               tiles(p.batch, int(p.chunk)) * kParts<kWidth>);
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
