// Backward of plain calls (`is_plain`): straight loops, as in plain.cuh.
#pragma once

#include "gradients.cuh"
#include "plain_tiles.cuh"

namespace apt {

// How a block's shared memory is divided. STAGES pairs of tiles are in it at once: two where copies are asynchronous,
// else one. The block's own rows, of two tensors, come first, unless registers hold them. Then float32's scratch, and
// FLOATS numbers for each stage.
template <class T, int WIDTH, int STAGES, bool HOLDS_FIRST, bool HOLDS_SECOND, int FLOATS>
struct StraightCut : Cut<T, WIDTH, true> {
    using C = Cut<T, WIDTH, true>;
    using First = std::conditional_t<HOLDS_FIRST, HeldRows<C, T>, Rows<C, T>>;
    using Second = std::conditional_t<HOLDS_SECOND, HeldRows<C, T>, Rows<C, T>>;
    static constexpr int OWN = C::ROWS * C::STRIDE, TILE = C::COLS * C::STRIDE;
    static constexpr int SECOND = HOLDS_FIRST ? 0 : OWN, TILES_START = HOLDS_SECOND ? SECOND : SECOND + OWN;
    static constexpr int TILES_END = TILES_START + 2 * STAGES * TILE, ELEMENTS = TILES_END > OWN ? TILES_END : OWN;
    static constexpr int SHARED = ELEMENTS * int(sizeof(T)) + C::WARPS * C::SCRATCH * int(sizeof(float)) +
                                  STAGES * FLOATS * int(sizeof(float));
};

// float32 holds no rows in registers; in one stage, and of wide heads, those of gradients would leave too few.
template <class T, int WIDTH, int STAGES>
using QueryCut = StraightCut<T, WIDTH, STAGES, sizeof(T) == 2, (sizeof(T) == 2 && WIDTH <= 64 && STAGES > 1),
                             RowGate<Cut<T, WIDTH, true>>::SIZE>;

// The pointers into a block's shared memory.
template <class C, class T>
struct Memory {
    T *own, *tiles;
    float *scratch, *numbers;  // the scratch is this warp's
    APT_DEVICE Memory(char* shared) : own(reinterpret_cast<T*>(shared)), tiles(own + C::TILES_START) {
        float* const scratches = reinterpret_cast<float*>(own + C::ELEMENTS);
        scratch = scratches + Lane().warp * C::SCRATCH;
        numbers = scratches + C::WARPS * C::SCRATCH;
    }
};

// The warp's own rows of a head: the block loads its tile from row `first`.
template <class Left, class C, class T>
APT_DEVICE Left own_rows(T* to, const Array& from, int b, int h, int first, int64_t limit) {
    load_tile<C>(to, from, b, h, first, C::ROWS, limit, C::HEAD);
    commit_copies();
    wait_for_copies<0>();
    sync_block();
    const Left rows{to + Lane().warp * kWarpRows * C::STRIDE};
    sync_block();
    return rows;
}

// Process the tiles of a span, in pairs. The next ones are copied meanwhile, into the other stage or into registers.
// `extra` reads and stores what else a tile needs; `body` receives its first column, its stage, and what it calls once it
// has registers for the second tile.
template <bool CHECK, int STAGES, class C, class T, class Extra, class Body>
APT_DEVICE void pass_tiles(const Span& span, int& stage, Source<C, T>& a, Source<C, T>& b, Extra& extra, Body body) {
    int next = span.start();
    if (next >= span.end) {
        return;
    }
    auto issue = [&](int first) {
        a.template issue<CHECK>(first, stage * 2 * C::TILE);
        extra.issue(first);
    };
    auto issue_second = [&](int first) { b.template issue<CHECK>(first, stage * 2 * C::TILE); };
    issue(next);
    issue_second(next);
    while (next < span.end) {
        const int first = next, now = stage;
        extra.prepare(first, now);
        a.complete(now * 2 * C::TILE);
        b.complete(now * 2 * C::TILE);
        sync_block();
        next = span.after(first, C::COLS);
        stage = STAGES - 1 - stage;
        // After the last tile it is copied again: cheaper than a branch.
        const int ahead = next < span.end ? next : first;
        issue(ahead);
        if constexpr (STAGES > 1) {
            issue_second(ahead);
        } else {
            // Without it the compiler moves loads behind the products.
            sync_warp();
        }
        body(first, now, [&] {
            if constexpr (STAGES == 1) {
                issue_second(ahead);
                sync_warp();
            }
        });
        if constexpr (STAGES == 1) {
            sync_block();
        }
    }
    wait_for_copies<0>();
}

// What a warp accumulates of dq, and the tiles that its products read. The values follow the keys in each stage.
template <class C, class T, int STAGES>
struct QueryGradient {
    typename C::First query;
    typename C::Second grad;
    const T* s_key;
    float* scratch;
    float logsumexp[2], delta[2];
    int stage = 0;
    float dq[C::HEAD / 8][4];

    // Process tiles of one kind.
    template <class Kind>
    APT_DEVICE void pass(Span span, Source<C, T>& keys, Source<C, T>& values, Kind kind) {
        pass_tiles<Kind::CHECK, STAGES>(span, stage, keys, values, kind, [&](int first, int now, auto registers_are_free) {
            const T* const key = s_key + now * 2 * C::TILE;
            float c[C::TILES][4], r[C::TILES][4];
            clear(c);
            clear(r);
            multiply_transposed<C, true>(c, query, key, C::HEAD);
            multiply_transposed<C, true>(r, grad, key + C::TILE, C::HEAD);
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
            registers_are_free();
            multiply<C>(dq, c, key, C::HEAD, scratch);
        });
    }
};

// dq of a tile of queries of one head: over the prefix, then over the visible tokens.
template <class T, int WIDTH, int STAGES>
APT_KERNEL((Cut<T, WIDTH, true>::THREADS)) plain_query_gradient(APT_PROBLEM p) {
    if constexpr (kRuns<T> && kRunsStages<STAGES> && WIDTH <= 128) {
        using C = QueryCut<T, WIDTH, STAGES>;
        APT_SHARED(shared);
        const Memory<C, T> memory(shared);
        const Lane lane;
        const int tile = query_tile<C>(p), first = tile * C::ROWS, row = first + lane.warp * kWarpRows;
        const Place at = query_place<C>(p);
        const Query q[2] = {query_row<true>(p, at, row + lane.row), query_row<true>(p, at, row + lane.row + 8)};
        const auto query = own_rows<typename C::First, C>(memory.own, p.query, at.b, at.h, first, p.queries);
        const auto grad = own_rows<typename C::Second, C>(memory.own + C::SECOND, p.grad_out, at.b, at.h, first, p.queries);
        QueryGradient<C, T, STAGES> sum{query, grad, memory.tiles, memory.scratch,
                                        {q[0].logsumexp, q[1].logsumexp}, {q[0].delta, q[1].delta}};
        clear(sum.dq);
        pass_all<C>(sum, p, at, tile, q, memory.tiles, memory.tiles + C::TILE, memory.numbers);
        if (row < p.queries) {
            const float factor[2] = {p.scale, p.scale};
            store_rows<T>(p.grad_query, at.b, at.h, row, p.queries, 0, WIDTH, sum.dq, factor);
        }
    }
}

}  // namespace apt
