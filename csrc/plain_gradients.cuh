// Backward of plain calls (`is_plain`): straight loops, as in plain.cuh.
#pragma once

#include "plain_tiles.cuh"

namespace apt {

// How `plain_query_gradient` divides a block's shared memory. STAGES tiles of keys and of values are in it at once: two
// where copies are asynchronous, else one. The block's own rows come first, unless registers hold them: float32 keeps
// those of queries and of gradients, wide heads in one stage those of gradients.
template <class T, int WIDTH, int STAGES>
struct QueryCut : Cut<T, WIDTH, true> {
    using C = Cut<T, WIDTH, true>;
    static constexpr bool HOLDS_GRAD = C::HALF && (STAGES > 1 || WIDTH <= 64);
    using QueryRows = std::conditional_t<C::HALF, HeldRows<C, T>, Rows<C, T>>;
    using GradRows = std::conditional_t<HOLDS_GRAD, HeldRows<C, T>, Rows<C, T>>;
    static constexpr int OWN = C::ROWS * C::STRIDE, TILE = C::COLS * C::STRIDE;
    static constexpr int GRAD = C::HALF ? 0 : OWN, KEY = HOLDS_GRAD ? 0 : GRAD + OWN;
    static constexpr int TILES_END = KEY + 2 * STAGES * TILE, ELEMENTS = TILES_END > OWN ? TILES_END : OWN;
    static constexpr int SHARED = ELEMENTS * int(sizeof(T)) + C::WARPS * C::SCRATCH * int(sizeof(float)) +
                                  STAGES * RowGate<C>::SIZE * int(sizeof(float));
};

// What a warp accumulates of dq, and the tiles that its products read. The values follow the keys in each stage.
template <class C, class T, int STAGES>
struct QueryGradient {
    static constexpr int TILE = C::TILE;
    typename C::QueryRows query;
    typename C::GradRows grad;
    const T* s_key;
    float* scratch;
    float logsumexp[2], delta[2];
    int stage = 0;
    float dq[C::HEAD / 8][4];

    // Process tiles of one kind. The next tile is copied meanwhile, into the other stage or into registers.
    template <class Kind>
    APT_DEVICE void pass(Span span, Source<C, T>& keys, Source<C, T>& values, Kind kind) {
        int next = span.start();
        if (next >= span.end) {
            return;
        }
        auto issue = [&](int first) {
            keys.template issue<Kind::CHECK>(first, stage * 2 * TILE);
            values.template issue<Kind::CHECK>(first, stage * 2 * TILE);
        };
        issue(next);
        while (next < span.end) {
            const int first = next, now = stage * 2 * TILE;
            kind.prepare(first, stage);
            keys.complete(now);
            values.complete(now);
            sync_block();
            next = span.after(first, C::COLS);
            stage = STAGES - 1 - stage;
            // After the last tile it is copied again: cheaper than a branch.
            issue(next < span.end ? next : first);
            const T* const key = s_key + now;
            float c[C::TILES][4], r[C::TILES][4];
            clear(c);
            clear(r);
            multiply_transposed<C, true>(c, query, key, C::HEAD);
            multiply_transposed<C, true>(r, grad, key + TILE, C::HEAD);
            const float scale = kind.logits(c, first);
            kind.weigh(r);
            APT_UNROLL
            for (int j = 0; j < C::TILES; ++j) {
                APT_UNROLL
                for (int e = 0; e < 4; ++e) {
                    c[j][e] = exp2_flushed(c[j][e] * scale - logsumexp[e / 2]) * (r[j][e] - delta[e / 2]);
                }
            }
            kind.weigh(c);
            multiply<C>(dq, c, key, C::HEAD, scratch);
            if constexpr (STAGES == 1) {
                sync_block();
            }
        }
        wait_for_copies<0>();
    }
};

// dq of a tile of queries of one head: over the prefix, then over the visible tokens.
template <class T, int WIDTH, int STAGES>
APT_KERNEL((Cut<T, WIDTH, true>::THREADS)) plain_query_gradient(APT_PROBLEM p) {
    if constexpr (kRuns<T> && kRunsStages<STAGES> && WIDTH <= 128) {
        using C = QueryCut<T, WIDTH, STAGES>;
        APT_SHARED(shared);
        T* const s_own = reinterpret_cast<T*>(shared);
        T* const s_key = s_own + C::KEY;
        float* const scratches = reinterpret_cast<float*>(s_own + C::ELEMENTS);
        const Lane lane;
        const int tile = query_tile<C>(p), row = tile * C::ROWS + lane.warp * kWarpRows;
        const Place at = query_place<C>(p);
        const Query q[2] = {query_row<true>(p, at, row + lane.row), query_row<true>(p, at, row + lane.row + 8)};
        auto load = [&](T* to, const Array& from) {
            load_tile<C>(to, from, at.b, at.h, tile * C::ROWS, C::ROWS, p.queries, WIDTH);
            commit_copies();
            wait_for_copies<0>();
            sync_block();
            return to + lane.warp * kWarpRows * C::STRIDE;
        };
        const typename C::QueryRows query{load(s_own, p.query)};
        sync_block();
        const typename C::GradRows grad{load(s_own + C::GRAD, p.grad_out)};
        sync_block();
        QueryGradient<C, T, STAGES> sum{query, grad, s_key, scratches + lane.warp * C::SCRATCH,
                                        {q[0].logsumexp, q[1].logsumexp}, {q[0].delta, q[1].delta}};
        clear(sum.dq);
        pass_all<C>(sum, p, at, tile, q, s_key, s_key + C::TILE, scratches + C::WARPS * C::SCRATCH);
        if (row < p.queries) {
            const float factor[2] = {p.scale, p.scale};
            store_rows<T>(p.grad_query, at.b, at.h, row, p.queries, 0, WIDTH, sum.dq, factor);
        }
    }
}

}  // namespace apt
