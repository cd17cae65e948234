// Backward: the gradients of queries, of keys and values, and of the prefix.
#pragma once

#include "forward.cuh"

namespace apt {

// The products of one tile: c = own_a walked_a^T and r = own_b walked_b^T; `own` rows belong to this warp.
template <class C, class T>
APT_DEVICE void multiply_both(float (&c)[C::TILES][4], float (&r)[C::TILES][4], const T* own_a, const T* walked_a,
                              int dim, const T* own_b, const T* walked_b, int value_dim) {
    const int o = thread_index() / 32 * kWarpRows * C::STRIDE;
    clear(c);
    clear(r);
    multiply_transposed<C>(c, Rows<C, T>{own_a + o}, walked_a, dim);
    multiply_transposed<C>(r, Rows<C, T>{own_b + o}, walked_b, value_dim);
}

// dq of a tile of queries of one head: over the prefix, then over the visible tokens.
template <class T, int WIDTH>
APT_KERNEL((Cut<T, WIDTH, true>::THREADS)) query_gradient(APT_PROBLEM p) {
    if constexpr (kRuns<T>) {
        using C = Cut<T, WIDTH, true>;
        APT_SHARED(shared);
        T* const s_query = reinterpret_cast<T*>(shared);
        T* const s_grad = s_query + C::ROWS * C::STRIDE;
        T* const s_key = s_grad + C::ROWS * C::STRIDE;
        T* const s_value = s_key + C::COLS * C::STRIDE;
        const Lane lane;
        float* const scratch = reinterpret_cast<float*>(s_value + C::COLS * C::STRIDE) + lane.warp * C::SCRATCH;
        const int tile = query_tile<C>(p), row = tile * C::ROWS + lane.warp * kWarpRows;
        const int dim = static_cast<int>(p.head_dim), value_dim = static_cast<int>(p.value_dim);
        const Place at = query_place<C>(p);
        const Walk<C> walk(p, at, tile);
        const bool busy = row < p.queries, tensors = has_mask_tensors(p);
        const Query q[2] = {query_row<true>(p, at, row + lane.row), query_row<true>(p, at, row + lane.row + 8)};

        float dq[WIDTH / 8][4];
        clear(dq);
        load_tile<C>(s_query, p.query, at.b, at.h, tile * C::ROWS, C::ROWS, p.queries, dim);
        load_tile<C>(s_grad, p.grad_out, at.b, at.h, tile * C::ROWS, C::ROWS, p.queries, value_dim);
        walk.load(s_value, p, at, 0, false);
        for (int i = 0; i < walk.tiles; ++i) {
            walk.load(s_key, p, at, i, true);
            commit_copies();
            wait_for_copies<0>();
            sync_block();
            float c[C::TILES][4], r[C::TILES][4];
            if (busy) {
                multiply_both<C>(c, r, s_query, s_key, dim, s_grad, s_value, value_dim);
            }
            sync_block();
            if (i + 1 < walk.tiles) {
                walk.load(s_value, p, at, i + 1, false);
            }
            if (busy) {
                const int first = walk.column(i);
                const bool prefix = walk.is_prefix(i), check = !walk.is_whole(first);
                APT_UNROLL
                for (int j = 0; j < C::TILES; ++j) {
                    APT_UNROLL
                    for (int e = 0; e < 4; ++e) {
                        const int n = first + 8 * j + lane.column + e % 2;
                        const Query& own = q[e / 2];
                        if (prefix) {
                            const float g = weight(p, at.b, own.t, n);
                            c[j][e] = prefix_gradient(p, own, n, g, c[j][e], r[j][e]).ds * g;
                        } else {
                            c[j][e] = token_gradient(p, at, own, n, c[j][e], r[j][e], check, tensors).ds;
                        }
                    }
                }
                multiply<C>(dq, c, s_key, dim, scratch);
            }
            sync_block();
        }
        if (busy) {
            const float factor[2] = {p.scale, p.scale};
            store_rows<T>(p.grad_query, at.b, at.h, row, p.queries, 0, dim, dq, factor);
        }
    }
}

// Accumulators of a wide head do not fit: a block then owns a part of the columns of dk and dv.
template <int WIDTH>
constexpr int kParts = WIDTH > 128 ? WIDTH / 128 : 1;

// The rows that a block of `key_gradient` owns, and the units that it iterates over: batch rows, and in each the
// pairs of a head of the group and a tile of queries.
template <class C, bool PREFIX>
struct Share {
    int part, own, kv, out, split;  // `out`: the row of the result along its first dimension
    int b, b_end, first, end;       // batch rows; queries
    int unit, unit_end, query_tiles;

    APT_DEVICE Share(const Problem& p, int parts) {
        const int length = static_cast<int>(PREFIX ? p.length : p.keys), tiles = tiles_of(length, C::ROWS);
        const int kv_heads = static_cast<int>(p.heads / p.group);
        int i = block_index();
        part = i % parts;
        i /= parts;
        own = i % tiles * C::ROWS;
        i /= tiles;
        kv = i % kv_heads;
        out = i / kv_heads;
        first = 0;
        end = static_cast<int>(p.queries);
        if constexpr (PREFIX) {
            split = out % int(p.splits);
            b = out / int(p.splits) * int(p.chunk);
            b_end = b + p.chunk < p.batch ? b + int(p.chunk) : int(p.batch);
            query_tiles = tiles_of(end, C::COLS);
            const int share = tiles_of(p.group * query_tiles, p.splits);
            unit = split * share;
            unit_end = unit + share < p.group * query_tiles ? unit + share : int(p.group) * query_tiles;
        } else {
            split = 0;
            b = out;
            b_end = b + 1;
            const Place at(p, b, 0);
            const int last = own + C::ROWS < length ? own + C::ROWS : length;
            first = within(own - p.right - at.base, p.queries);
            end = within(last + p.left - at.base, p.queries);
            narrow(p, b, tiles, own / C::ROWS, first, end);
            first = first / C::COLS * C::COLS;
            query_tiles = tiles_of(end - first, C::COLS);
            unit = 0;
            unit_end = int(p.group) * query_tiles;
        }
    }
};

// Store what the warp's prefix columns, from `row` on, add to the gradient of their gates, if it is wanted.
template <class C>
APT_DEVICE void store_gate_sums(const Problem& p, const Share<C, true>& share, int b, int row, const float (&dg)[2]) {
    const Lane lane;
    if (!p.sums.data) {
        return;
    }
    APT_UNROLL
    for (int i = 0; i < 2; ++i) {
        const float sum = sum_over_row(dg[i]);
        const int m = row + lane.row + 8 * i;
        if (lane.column == 0 && m < p.length) {
            const int64_t* s = p.sums.stride;
            reinterpret_cast<float*>(p.sums.data)[share.split * s[0] + b * s[1] + share.kv * s[2] + m * s[3]] = sum;
        }
    }
}

// dk and dv of a tile of keys of one key head, over the queries of its group that see them; or, for the prefix, partial
// sums of dPk and dPv over a chunk of batch rows or a split of one, and of the gradient of a gate that all queries of a row share.
template <class T, int WIDTH, bool PREFIX>
APT_KERNEL((Cut<T, WIDTH, true>::THREADS)) key_gradient(APT_PROBLEM p) {
    if constexpr (kRuns<T>) {
        using C = Cut<T, WIDTH, true>;
        using To = std::conditional_t<PREFIX, float, T>;
        constexpr int PARTS = kParts<WIDTH>, COLUMNS = WIDTH / PARTS;
        APT_SHARED(shared);
        T* const s_key = reinterpret_cast<T*>(shared);
        T* const s_value = s_key + C::ROWS * C::STRIDE;
        T* const s_query = s_value + C::ROWS * C::STRIDE;
        T* const s_grad = s_query + C::COLS * C::STRIDE;
        const Lane lane;
        float* const scratches = reinterpret_cast<float*>(s_grad + C::COLS * C::STRIDE);
        Query* const s_rows = reinterpret_cast<Query*>(scratches + C::WARPS * C::SCRATCH);
        float* const scratch = scratches + lane.warp * C::SCRATCH;
        const int dim = static_cast<int>(p.head_dim), value_dim = static_cast<int>(p.value_dim);
        const int length = static_cast<int>(PREFIX ? p.length : p.keys);
        Share<C, PREFIX> share(p, PARTS);
        const int row = share.own + lane.warp * kWarpRows, column = share.part * COLUMNS;
        const bool busy = row < length, tensors = has_mask_tensors(p), per_query = gate_per_query(p);

        float dk[COLUMNS / 8][4], dv[COLUMNS / 8][4];
        clear(dk);
        clear(dv);
        const int from = PREFIX ? 0 : share.b;
        load_tile<C>(s_key, PREFIX ? p.prefix_key : p.key, from, share.kv, share.own, C::ROWS, length, dim);
        load_tile<C>(s_value, PREFIX ? p.prefix_value : p.value, from, share.kv, share.own, C::ROWS, length, value_dim);
        for (int b = share.b; b < share.b_end; ++b) {
            float dg[2] = {0, 0}, shared_g[2] = {1, 1};
            if (PREFIX && !per_query) {
                shared_g[0] = weight(p, b, 0, row + lane.row);
                shared_g[1] = weight(p, b, 0, row + lane.row + 8);
            }
            for (int unit = share.unit; unit < share.unit_end; ++unit) {
                const Place at(p, b, share.kv * int(p.group) + unit / share.query_tiles);
                const int first = share.first + unit % share.query_tiles * C::COLS;
                load_tile<C>(s_query, p.query, b, at.h, first, C::COLS, p.queries, dim);
                load_tile<C>(s_grad, p.grad_out, b, at.h, first, C::COLS, p.queries, value_dim);
                commit_copies();
                for (int i = thread_index(); i < C::COLS; i += C::THREADS) {
                    s_rows[i] = query_row<true>(p, at, first + i);
                }
                wait_for_copies<0>();
                sync_block();
                if (busy) {
                    float c[C::TILES][4], r[C::TILES][4];
                    multiply_both<C>(c, r, s_key, s_query, dim, s_value, s_grad, value_dim);
                    APT_UNROLL
                    for (int j = 0; j < C::TILES; ++j) {
                        APT_UNROLL
                        for (int e = 0; e < 4; ++e) {
                            const Query q = s_rows[8 * j + lane.column + e % 2];
                            const int n = row + lane.row + e / 2 * 8;
                            if constexpr (PREFIX) {
                                const float g = per_query ? weight(p, b, q.t, n) : shared_g[e / 2];
                                const Gradient found = prefix_gradient(p, q, n, g, c[j][e], r[j][e]);
                                c[j][e] = found.p * g;
                                r[j][e] = found.ds * g;
                                dg[e / 2] += found.dg;
                            } else {
                                const Gradient found =
                                    token_gradient(p, at, q, n, c[j][e], r[j][e], true, tensors);
                                c[j][e] = found.p;
                                r[j][e] = found.ds;
                            }
                        }
                    }
                    if (p.grad_value.data) {
                        multiply<C>(dv, c, s_grad + column, value_dim - column, scratch);
                    }
                    if (p.grad_key.data) {
                        multiply<C>(dk, r, s_query + column, dim - column, scratch);
                    }
                }
                sync_block();
            }
            if constexpr (PREFIX) {
                if (share.part == 0 && busy) {
                    store_gate_sums(p, share, b, row, dg);
                }
            }
        }
        wait_for_copies<0>();
        if (busy) {
            const float key_factor[2] = {p.scale, p.scale}, value_factor[2] = {p.kept, p.kept};
            if (p.grad_key.data) {
                store_rows<To>(p.grad_key, share.out, share.kv, row, length, column, dim, dk, key_factor);
            }
            if (p.grad_value.data) {
                store_rows<To>(p.grad_value, share.out, share.kv, row, length, column, value_dim, dv, value_factor);
            }
        }
    }
}

}  // namespace apt
