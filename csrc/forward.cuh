// Forward: a block processes a tile of queries of one head over the prefix, then over the visible tokens.
#pragma once

#include "tile.cuh"

namespace apt {

APT_DEVICE constexpr int tiles_of(int64_t length, int size) { return static_cast<int>((length + size - 1) / size); }

// The column tiles of one tile of queries: those of the prefix, then those of the tokens.
template <class C>
struct Walk {
    int prefix_tiles, tiles, first, end;  // keys first .. end - 1
    int whole, whole_end;                 // keys that causality and window show to every query of the tile

    APT_DEVICE Walk(const Problem& p, const Place& at, int tile) : prefix_tiles(tiles_of(p.length, C::COLS)) {
        const int t = tile * C::ROWS;
        const int last = (t + C::ROWS < p.queries ? t + C::ROWS : int(p.queries)) - 1;
        first = first_key(p, at.base, t);
        end = end_key(p, at.base, last);
        narrow(p, at.b, tiles_of(p.queries, C::ROWS), tile, first, end);
        first = first / C::COLS * C::COLS;
        whole = first_key(p, at.base, last);
        whole_end = end_key(p, at.base, t);
        tiles = prefix_tiles + tiles_of(end - first, C::COLS);
    }
    APT_DEVICE bool is_prefix(int i) const { return i < prefix_tiles; }
    APT_DEVICE int column(int i) const {
        return is_prefix(i) ? i * C::COLS : first + (i - prefix_tiles) * C::COLS;
    }
    APT_DEVICE bool is_whole(int n) const { return n >= whole && n + C::COLS <= whole_end; }

    template <class T>
    APT_DEVICE void load(T* tile, const Problem& p, const Place& at, int i, bool keys) const {
        const int dim = static_cast<int>(keys ? p.head_dim : p.value_dim);
        if (is_prefix(i)) {
            load_tile<C>(tile, keys ? p.prefix_key : p.prefix_value, 0, at.kv, column(i), C::COLS, p.length, dim);
        } else {
            load_tile<C>(tile, keys ? p.key : p.value, at.b, at.kv, column(i), C::COLS, p.keys, dim);
        }
    }
};

// The block's tile of queries. Under a causal mask the last queries see the most keys, so they start first.
template <class C>
APT_DEVICE int query_tile(const Problem& p) {
    const int tiles = tiles_of(p.queries, C::ROWS);
    return tiles - 1 - block_index() % tiles;
}
template <class C>
APT_DEVICE Place query_place(const Problem& p) {
    const int bh = block_index() / tiles_of(p.queries, C::ROWS);
    return Place(p, bh / int(p.heads), bh % int(p.heads));
}

// The gate of prefix column m for both rows of a thread.
struct Weights {
    float g[2];
    APT_DEVICE Weights(const Problem& p, const Place& at, const Query (&q)[2], int m, bool per_query) {
        g[0] = weight(p, at.b, q[0].t, m);
        g[1] = per_query ? weight(p, at.b, q[1].t, m) : g[0];
    }
};

template <class C>
struct Softmax {
    float largest[2] = {-kInfinity, -kInfinity}, sum[2] = {0, 0};

    APT_DEVICE Softmax(const Problem& p, const Place& at) {
        if (p.sinks.data) {
            // Only one of the four lanes that share a row counts the sink.
            const float sink = reinterpret_cast<const float*>(p.sinks.data)[at.h * p.sinks.stride[3]] * kLog2E;
            for (int i = 0; i < 2; ++i) {
                largest[i] = sink;
                sum[i] = Lane().column == 0;
            }
        }
    }

    // From products to base-2 logits.
    APT_DEVICE static void logits(float (&c)[C::TILES][4], const Problem& p, const Place& at, const Query (&q)[2],
                                  int first, bool prefix, bool whole, bool tensors) {
        const Lane lane;
        const bool per_query = gate_per_query(p);
        APT_UNROLL
        for (int j = 0; j < C::TILES; ++j) {
            APT_UNROLL
            for (int e = 0; e < 2; ++e) {
                const int n = first + 8 * j + lane.column + e;
                if (prefix) {
                    const Weights w(p, at, q, n, per_query);
                    APT_UNROLL
                    for (int i = 0; i < 2; ++i) {
                        c[j][2 * i + e] = n < p.length ? logit(p, c[j][2 * i + e], w.g[i] * p.scale) : -kInfinity;
                    }
                } else {
                    APT_UNROLL
                    for (int i = 0; i < 2; ++i) {
                        const float x = logit(p, c[j][2 * i + e], p.scale);
                        c[j][2 * i + e] = masked(p, at, q[i], n, x, !whole, tensors);
                    }
                }
            }
        }
    }

    // From logits, `scale` times c, to probabilities against the new maximum; returns the factor for the earlier sums.
    APT_DEVICE void probabilities(float (&c)[C::TILES][4], float scale, float (&rescale)[2]) {
        APT_UNROLL
        for (int i = 0; i < 2; ++i) {
            float most = -kInfinity;
            APT_UNROLL
            for (int j = 0; j < C::TILES; ++j) {
                most = fmaxf(most, fmaxf(c[j][2 * i], c[j][2 * i + 1]));
            }
            most = fmaxf(largest[i], max_over_row(most) * scale);
            rescale[i] = exp2_flushed(largest[i] - most);
            largest[i] = most;
            float added = 0;
            APT_UNROLL
            for (int j = 0; j < C::TILES; ++j) {
                APT_UNROLL
                for (int e = 0; e < 2; ++e) {
                    c[j][2 * i + e] = exp2_flushed(c[j][2 * i + e] * scale - most);
                    added += c[j][2 * i + e];
                }
            }
            sum[i] = sum[i] * rescale[i] + added;
        }
    }

    // The weights of the values: probabilities after dropout, times the gate on prefix columns.
    APT_DEVICE static void drop(float (&c)[C::TILES][4], const Problem& p, const Place& at, const Query (&q)[2],
                                int first, bool prefix) {
        if (!prefix && !p.seed.data) {
            return;
        }
        const Lane lane;
        const bool per_query = gate_per_query(p);
        const int offset = prefix ? 0 : static_cast<int>(p.length);
        APT_UNROLL
        for (int j = 0; j < C::TILES; ++j) {
            APT_UNROLL
            for (int e = 0; e < 2; ++e) {
                const int n = first + 8 * j + lane.column + e;
                APT_UNROLL
                for (int i = 0; i < 2; ++i) {
                    c[j][2 * i + e] = kept(p, q[i].key, offset + n) ? c[j][2 * i + e] : 0;
                }
                if (prefix) {
                    const Weights w(p, at, q, n, per_query);
                    c[j][e] *= w.g[0];
                    c[j][2 + e] *= w.g[1];
                }
            }
        }
    }

    // Store the outputs of the warp's rows and their logsumexp.
    template <class T, int COLUMNS>
    APT_DEVICE void store(const Problem& p, const Place& at, int row, const float (&out)[COLUMNS][4]) const {
        const Lane lane;
        float factor[2];
        APT_UNROLL
        for (int i = 0; i < 2; ++i) {
            const float total = sum_over_row(sum[i]);
            const int t = row + lane.row + 8 * i;
            factor[i] = p.kept / total;
            if (lane.column == 0 && t < p.queries) {
                const int64_t o = (at.b * p.heads + at.h) * p.queries + t;
                reinterpret_cast<float*>(p.logsumexp.data)[o] = (largest[i] + log2f(total)) * kLn2;
            }
        }
        store_rows<T>(p.out, at.b, at.h, row, p.queries, 0, int(p.value_dim), out, factor);
    }
};

template <class T, int WIDTH>
APT_KERNEL((Cut<T, WIDTH, false>::THREADS)) attention_forward(APT_PROBLEM p) {
    if constexpr (kRuns<T>) {
        using C = Cut<T, WIDTH, false>;
        APT_SHARED(shared);
        T* const s_query = reinterpret_cast<T*>(shared);
        T* const s_key = s_query + C::ROWS * C::STRIDE;
        T* const s_value = s_key + C::COLS * C::STRIDE;
        const Lane lane;
        float* const scratch = reinterpret_cast<float*>(s_value + C::COLS * C::STRIDE) + lane.warp * C::SCRATCH;
        const int tile = query_tile<C>(p), row = tile * C::ROWS + lane.warp * kWarpRows;
        const int dim = static_cast<int>(p.head_dim), value_dim = static_cast<int>(p.value_dim);
        const Place at = query_place<C>(p);
        const Walk<C> walk(p, at, tile);
        const bool busy = row < p.queries, tensors = has_mask_tensors(p);
        const Query q[2] = {query_row<false>(p, at, row + lane.row), query_row<false>(p, at, row + lane.row + 8)};

        float out[WIDTH / 8][4];
        clear(out);
        Softmax<C> softmax(p, at);
        load_tile<C>(s_query, p.query, at.b, at.h, tile * C::ROWS, C::ROWS, p.queries, dim);
        walk.load(s_key, p, at, 0, true);
        commit_copies();
        for (int i = 0; i < walk.tiles; ++i) {
            walk.load(s_value, p, at, i, false);
            commit_copies();
            wait_for_copies<1>();
            sync_block();
            float c[C::TILES][4];
            clear(c);
            if (busy) {
                multiply_transposed<C>(c, Rows<C, T>{s_query + lane.warp * kWarpRows * C::STRIDE}, s_key, dim);
            }
            sync_block();
            if (i + 1 < walk.tiles) {
                walk.load(s_key, p, at, i + 1, true);
            }
            commit_copies();
            const int first = walk.column(i);
            const bool prefix = walk.is_prefix(i);
            float rescale[2];
            if (busy) {
                Softmax<C>::logits(c, p, at, q, first, prefix, walk.is_whole(first), tensors);
                softmax.probabilities(c, 1, rescale);
                Softmax<C>::drop(c, p, at, q, first, prefix);
                multiply_rows(out, rescale);
            }
            wait_for_copies<1>();
            sync_block();
            if (busy) {
                multiply<C>(out, c, s_value, value_dim, scratch);
            }
            sync_block();
        }
        if (busy) {
            softmax.template store<T>(p, at, row, out);
        }
    }
}

}  // namespace apt
