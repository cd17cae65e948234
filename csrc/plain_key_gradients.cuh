// dk and dv of plain calls (`is_plain`), and those of the prefix: straight loops over queries.
#pragma once

#include "plain_gradients.cuh"

namespace apt {

// Whether the prefix's own keys stay in registers: without it the compiler spills on 8.0 and 8.6, with it on 12.0. The host
// reserves the shared memory of a block without.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 1200
constexpr bool kHoldsPrefix = true;
#else
constexpr bool kHoldsPrefix = false;
#endif

// In each stage: log-sum-exp and delta of a tile's queries, then, for gates per query, where each one's gates are. Wide
// heads leave no registers to hold rows, and the prefix none for its values.
template <class T, int WIDTH, bool PREFIX>
using KeyCut = StraightCut<T, WIDTH, 2, (sizeof(T) == 2 && WIDTH <= 64 && (!PREFIX || kHoldsPrefix)),
                           (sizeof(T) == 2 && WIDTH <= 64 && !PREFIX), 4 * Cut<T, WIDTH, true>::COLS>;

// Whether straight loops are compiled. In one stage, and for the prefix of wide heads, the compiler spills registers.
template <int WIDTH, bool PREFIX>
constexpr bool kTakesKeys = WIDTH <= (PREFIX ? 64 : 128);

// Log-sum-exp, in base 2, and delta of the queries of a tile. One thread each loads a number of the next tile.
template <class C>
struct QueryNumbers {
    static_assert(2 * C::COLS <= C::THREADS, "a thread loads one number");
    const float* from;
    float *to, factor, past, held;
    int limit;

    APT_DEVICE QueryNumbers(const Problem& p, const Place& at, float* numbers) : to(numbers + thread_index()) {
        const int64_t row = (at.b * p.heads + at.h) * p.queries;
        const bool is_delta = thread_index() >= C::COLS;
        const int column = thread_index() % C::COLS;
        from = reinterpret_cast<const float*>(is_delta ? p.delta.data : p.logsumexp.data) + row + column;
        factor = is_delta ? 1 : kLog2E;
        // Past the last query probabilities are zero.
        past = is_delta ? 0 : kInfinity;
        limit = static_cast<int>(p.queries) - column;
    }
    APT_DEVICE void issue(int first) { held = first < limit ? from[first] : past; }
    APT_DEVICE void prepare(int, int stage) {
        if (thread_index() < 2 * C::COLS) {
            to[stage * 4 * C::COLS] = held * factor;
        }
    }
};

// Call `body` with the place of each of the thread's pairs, and log-sum-exp and delta of its query.
template <class C, class Body>
APT_DEVICE void each_pair(const float* numbers, Body body) {
    const Lane lane;
    APT_UNROLL
    for (int j = 0; j < C::TILES; ++j) {
        const float2 l = load_float2(numbers + 8 * j + lane.column);
        const float2 d = load_float2(numbers + C::COLS + 8 * j + lane.column);
        APT_UNROLL
        for (int e = 0; e < 4; ++e) {
            body(j, e, e % 2 ? l.y : l.x, e % 2 ? d.y : d.x);
        }
    }
}

// The kinds of tiles. `gradients` turns the products c = k.q and r = v.dO into the left sides of dv's and dk's products;
// `numbers` are those of the stage.

// Tokens of a kind of plain_tiles.cuh.
template <class C, class Kind>
struct TokenGradients : Kind {
    APT_DEVICE void gradients(float (&c)[C::TILES][4], float (&r)[C::TILES][4], int first, const float* numbers) {
        const float scale = this->logits(c, first);
        each_pair<C>(numbers, [&](int j, int e, float logsumexp, float delta) {
            c[j][e] = exp2_flushed(c[j][e] * scale - logsumexp);
            r[j][e] = c[j][e] * (r[j][e] - delta);
        });
    }
};

// Prefix columns whose gate is the same for all queries of a batch row; also sums of the gate's gradient.
template <class C>
struct RowGateGradients {
    static constexpr bool CHECK = true;
    float scale, g[2], by_logit[2] = {0, 0}, by_value[2] = {0, 0};
    APT_DEVICE RowGateGradients(const Problem& p, int b, int row)
        : scale(p.scale * kLog2E), g{weight(p, b, 0, row), weight(p, b, 0, row + 8)} {}
    APT_DEVICE void prepare(int, int) {}
    APT_DEVICE void gradients(float (&c)[C::TILES][4], float (&r)[C::TILES][4], int, const float* numbers) {
        const float factor[2] = {g[0] * scale, g[1] * scale};
        each_pair<C>(numbers, [&](int j, int e, float logsumexp, float delta) {
            const float x = c[j][e] * factor[e / 2] - logsumexp, probability = exp2_flushed(x);
            const float dz = probability * (r[j][e] * g[e / 2] - delta);
            by_logit[e / 2] += dz * c[j][e];
            by_value[e / 2] += probability * r[j][e];
            c[j][e] = probability * g[e / 2];
            r[j][e] = dz * g[e / 2];
        });
    }
};

// Prefix columns with a gate for each query.
template <class C>
struct QueryGateGradients {
    static constexpr bool CHECK = true;
    const Problem& p;
    int b, m[2];
    float *numbers, lambda;
    APT_DEVICE QueryGateGradients(const Problem& p, int b, int row, float* numbers)
        : p(p), b(b), numbers(numbers), lambda(layer_scale(p)) {
        // Rows past the prefix are not stored; they read the gate of the last one.
        const int last = static_cast<int>(p.length) - 1;
        m[0] = row < last ? row : last;
        m[1] = row + 8 < last ? row + 8 : last;
    }
    APT_DEVICE static const float** rows(const float* numbers) {
        return reinterpret_cast<const float**>(const_cast<float*>(numbers) + 2 * C::COLS);
    }
    APT_DEVICE void prepare(int first, int stage) {
        const int i = thread_index(), t = first + i, last = static_cast<int>(p.queries) - 1;
        if (i < C::COLS) {
            rows(numbers + stage * 4 * C::COLS)[i] = gate_row(p, b, t < last ? t : last);
        }
    }
    APT_DEVICE void gradients(float (&c)[C::TILES][4], float (&r)[C::TILES][4], int, const float* numbers) {
        const Lane lane;
        const float factor = p.scale * kLog2E;
        each_pair<C>(numbers, [&](int j, int e, float logsumexp, float delta) {
            const float g = lambda * sigmoid(rows(numbers)[8 * j + lane.column + e % 2][m[e / 2]]);
            const float x = c[j][e] * (g * factor) - logsumexp, probability = exp2_flushed(x);
            const float dz = probability * (r[j][e] * g - delta);
            c[j][e] = probability * g;
            r[j][e] = dz * g;
        });
    }
};

// What a warp accumulates of dk and dv, and the tiles that its products read. The gradients of outputs follow the
// queries in each stage.
template <class C, class T>
struct KeyGradient {
    typename C::First key;
    typename C::Second value;
    const Memory<C, T>& memory;
    int stage = 0;
    float dk[C::HEAD / 8][4], dv[C::HEAD / 8][4];

    template <class Kind>
    struct Extra {
        QueryNumbers<C>& numbers;
        Kind& kind;
        APT_DEVICE void issue(int first) { numbers.issue(first); }
        APT_DEVICE void prepare(int first, int stage) {
            numbers.prepare(first, stage);
            kind.prepare(first, stage);
        }
    };

    // Process tiles of one kind.
    template <class Kind>
    APT_DEVICE void pass(Span span, Source<C, T>& queries, Source<C, T>& grads, QueryNumbers<C>& numbers, Kind& kind) {
        Extra<Kind> extra{numbers, kind};
        pass_tiles<Kind::CHECK, 2>(span, stage, queries, grads, extra, [&](int first, int now, auto) {
            const T* const query = memory.tiles + now * 2 * C::TILE;
            float c[C::TILES][4], r[C::TILES][4];
            clear(c);
            clear(r);
            multiply_transposed<C, true>(c, key, query, C::HEAD);
            multiply_transposed<C, true>(r, value, query + C::TILE, C::HEAD);
            kind.gradients(c, r, first, memory.numbers + now * 4 * C::COLS);
            multiply<C>(dv, c, query + C::TILE, C::HEAD, memory.scratch);
            multiply<C>(dk, r, query, C::HEAD, memory.scratch);
        });
    }
};

// As `key_gradient`, of both or of one of dk and dv.
template <class T, int WIDTH, bool PREFIX>
APT_KERNEL((Cut<T, WIDTH, true>::THREADS)) plain_key_gradient(APT_PROBLEM p) {
    if constexpr (kRuns<T> && kRunsStages<2> && kTakesKeys<WIDTH, PREFIX>) {
        using C = KeyCut<T, WIDTH, PREFIX>;
        using To = std::conditional_t<PREFIX, float, T>;
        APT_SHARED(shared);
        const Memory<C, T> memory(shared);
        const Lane lane;
        const int length = static_cast<int>(PREFIX ? p.length : p.keys);
        const Share<C, PREFIX> share(p, 1);
        const int row = share.own + lane.warp * kWarpRows, from = PREFIX ? 0 : share.b;
        const auto key = own_rows<typename C::First, C>(memory.own, PREFIX ? p.prefix_key : p.key, from, share.kv,
                                                         share.own, length);
        const auto value = own_rows<typename C::Second, C>(memory.own + C::SECOND, PREFIX ? p.prefix_value : p.value,
                                                            from, share.kv, share.own, length);
        KeyGradient<C, T> sum{key, value, memory};
        clear(sum.dk);
        clear(sum.dv);
        // The tiles of the queries of one head.
        auto over = [&](int b, int head, auto process) {
            const Place at(p, b, share.kv * int(p.group) + head);
            Source<C, T> queries(memory.tiles, p.query, b, at.h, p.queries);
            Source<C, T> grads(memory.tiles + C::TILE, p.grad_out, b, at.h, p.queries);
            QueryNumbers<C> numbers(p, at, memory.numbers);
            process(queries, grads, numbers);
        };
        if constexpr (PREFIX) {
            for (int b = share.b; b < share.b_end; ++b) {
                auto over_units = [&](auto& kind) {
                    for (int unit = share.unit; unit < share.unit_end;) {
                        const int head = unit / share.query_tiles, first = unit - head * share.query_tiles;
                        const int left = share.unit_end - unit, tiles = share.query_tiles - first;
                        const int count = tiles < left ? tiles : left;
                        over(b, head, [&](auto& queries, auto& grads, auto& numbers) {
                            const Span span{first * C::COLS, (first + count) * C::COLS, -1, -1};
                            sum.pass(span, queries, grads, numbers, kind);
                        });
                        unit += count;
                    }
                };
                if (gate_per_query(p)) {
                    QueryGateGradients<C> kind(p, b, row + lane.row, memory.numbers);
                    over_units(kind);
                } else {
                    RowGateGradients<C> kind(p, b, row + lane.row);
                    over_units(kind);
                    const float dg[2] = {kind.by_logit[0] * p.scale + kind.by_value[0],
                                         kind.by_logit[1] * p.scale + kind.by_value[1]};
                    store_gate_sums(p, share, b, row, dg);
                }
            }
        } else {
            const Place at(p, share.b, 0);
            const int last = (share.own + C::ROWS < length ? share.own + C::ROWS : length) - 1;
            // For each key, the queries that see it.
            auto seen_by = [&](int n) {
                return Query{n, within(n - p.right - at.base, p.queries), within(n + p.left - at.base + 1, p.queries)};
            };
            const Query rows[2] = {seen_by(row + lane.row), seen_by(row + lane.row + 8)};
            int whole = tiles_of(seen_by(last).first, C::COLS) * C::COLS;
            const int end = seen_by(share.own).end / C::COLS * C::COLS;
            whole = whole < end ? whole : end;
            const float scale = p.scale * kLog2E;
            TokenGradients<C, EdgeTokens<C>> edge{{scale, rows}};
            TokenGradients<C, WholeTokens<C>> inner{{scale}};
            for (int head = 0; head < p.group; ++head) {
                over(share.b, head, [&](auto& queries, auto& grads, auto& numbers) {
                    sum.pass({share.first, share.end, whole, end}, queries, grads, numbers, edge);
                    sum.pass({whole, end, -1, -1}, queries, grads, numbers, inner);
                });
            }
        }
        if (row < length) {
            const float factor[2] = {p.scale, p.scale}, one[2] = {1, 1};
            if (p.grad_key.data) {
                store_rows<To>(p.grad_key, share.out, share.kv, row, length, 0, WIDTH, sum.dk, factor);
            }
            if (p.grad_value.data) {
                store_rows<To>(p.grad_value, share.out, share.kv, row, length, 0, WIDTH, sum.dv, one);
            }
        }
    }
}

}  // namespace apt
