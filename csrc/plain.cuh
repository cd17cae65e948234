// Forward of plain calls (`is_plain`): a straight loop for each kind of tile, without a branch on the call's settings.
#pragma once

#include "plain_tiles.cuh"

namespace apt {

// What a warp accumulates over the tiles, and where the block's tiles are.
template <class C, class T>
struct Accumulator {
    const T *own, *s_key, *s_value;
    float* scratch;
    Softmax<C> softmax;
    float out[C::HEAD / 8][4];

    // Process tiles of one kind: the values are copied during the first product, the next keys during the second one.
    template <class Kind>
    APT_DEVICE void pass(Span span, Source<C, T>& keys, Source<C, T>& values, Kind kind) {
        int next = span.start();
        if (next >= span.end) {
            return;
        }
        keys.template issue<Kind::CHECK>(next);
        while (next < span.end) {
            const int first = next;
            keys.complete();
            sync_block();
            values.template issue<Kind::CHECK>(first);
            kind.prepare(first);
            float c[C::TILES][4], rescale[2];
            clear(c);
            multiply_transposed<C, true>(c, Rows<C, T>{own}, s_key, C::HEAD);
            values.complete();
            sync_block();
            next = span.after(first, C::COLS);
            // After the last tile the same keys are copied again: cheaper than a branch.
            keys.template issue<Kind::CHECK>(next < span.end ? next : first);
            const float scale = kind.logits(c, first);
            softmax.probabilities(c, scale, rescale);
            multiply_rows(out, rescale);
            kind.weigh(c);
            multiply<C>(out, c, s_value, C::HEAD, scratch);
        }
        wait_for_copies<0>();
    }
};

template <class T, int WIDTH>
APT_KERNEL((Cut<T, WIDTH, false>::THREADS)) plain_forward(APT_PROBLEM p) {
    if constexpr (kRuns<T> && WIDTH <= 128) {
        using C = Cut<T, WIDTH, false>;
        APT_SHARED(shared);
        T* const s_query = reinterpret_cast<T*>(shared);
        T* const s_key = s_query + C::ROWS * C::STRIDE;
        T* const s_value = s_key + C::COLS * C::STRIDE;
        float* const scratches = reinterpret_cast<float*>(s_value + C::COLS * C::STRIDE);
        const Lane lane;
        const int tile = query_tile<C>(p), row = tile * C::ROWS + lane.warp * kWarpRows;
        const Place at = query_place<C>(p);
        const Query q[2] = {query_row<false>(p, at, row + lane.row), query_row<false>(p, at, row + lane.row + 8)};
        Accumulator<C, T> sum{s_query + lane.warp * kWarpRows * C::STRIDE, s_key, s_value,
                              scratches + lane.warp * C::SCRATCH, Softmax<C>(p, at)};
        clear(sum.out);
        load_tile<C>(s_query, p.query, at.b, at.h, tile * C::ROWS, C::ROWS, p.queries, WIDTH);
        pass_all<C>(sum, p, at, tile, q, s_key, s_value, scratches + C::WARPS * C::SCRATCH);
        if (row < p.queries) {
            sum.softmax.template store<T>(p, at, row, sum.out);
        }
    }
}

}  // namespace apt
