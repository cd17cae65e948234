// One element of the scores: the gate, the mask, dropout, and their gradients. Logits are in base 2.
#pragma once

#include "platform.cuh"

namespace apt {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
constexpr float kInfinity = __builtin_huge_valf();

// The batch row and the heads of a block.
struct Place {
    int b, h, kv;
    int64_t base;  // position of query 0 among the keys
    APT_DEVICE Place(const Problem& p, int b, int h) : b(b), h(h), kv(h / int(p.group)), base(p.offset) {
        if (p.query_offset.data) {
            base = reinterpret_cast<const int64_t*>(p.query_offset.data)[b * p.query_offset.stride[3]];
        }
    }
};

// Values that are the same for all elements of one query's row.
struct Query {
    int t, first, end;  // the query, and the keys that causality and window let it see
    uint32_t key;       // of dropout
    float logsumexp;    // in base 2
    float delta;
};

APT_DEVICE int within(int64_t i, int64_t limit) { return static_cast<int>(i < 0 ? 0 : i > limit ? limit : i); }

APT_DEVICE int first_key(const Problem& p, int64_t base, int t) { return within(base + t - p.left, p.keys); }
APT_DEVICE int end_key(const Problem& p, int64_t base, int t) { return within(base + t + p.right + 1, p.keys); }

// The random numbers of apt_kernels/impl/dropout.py.
APT_DEVICE uint32_t mix(uint32_t x) {
    x ^= x >> 16;
    x *= 0x7feb352du;
    x ^= x >> 15;
    x *= 0x846ca68bu;
    return x ^ (x >> 16);
}
APT_DEVICE uint32_t row_key(const Problem& p, const Place& at, int t) {
    if (!p.seed.data) {
        return 0;
    }
    const uint64_t seed = *reinterpret_cast<const uint64_t*>(p.seed.data);
    const uint32_t key = mix(mix(static_cast<uint32_t>(seed)) ^ static_cast<uint32_t>(seed >> 32));
    return mix(mix(key + static_cast<uint32_t>(at.b * p.heads + at.h)) + static_cast<uint32_t>(t));
}
APT_DEVICE bool kept(const Problem& p, uint32_t key, int column) {
    return !p.seed.data || int(mix(key ^ (uint32_t(column) * 0x9e3779b9u)) >> 8) >= p.threshold;
}

// A query's row; past the last query it sees nothing and its probabilities are zero.
template <bool BACKWARD>
APT_DEVICE Query query_row(const Problem& p, const Place& at, int t) {
    const bool real = t < p.queries;
    Query q{t, 0, 0, row_key(p, at, t), kInfinity, 0};
    if (real) {
        q.first = first_key(p, at.base, t);
        q.end = end_key(p, at.base, t);
        if constexpr (BACKWARD) {
            const int64_t row = (at.b * p.heads + at.h) * p.queries + t;
            q.logsumexp = reinterpret_cast<const float*>(p.logsumexp.data)[row] * kLog2E;
            q.delta = reinterpret_cast<const float*>(p.delta.data)[row];
        }
    }
    return q;
}

// Whether each query of a batch row has its own gate.
APT_BOTH bool gate_per_query(const Problem& p) {
    return p.gate_index.data ? p.gate_index.stride[3] != 0 : p.gate.data && p.gate.stride[2] != 0;
}

// The gate logits of a query.
APT_DEVICE const float* gate_row(const Problem& p, int b, int t) {
    int64_t row = b * p.gate.stride[1] + t * p.gate.stride[2];
    if (p.gate_index.data) {
        const int64_t* index = reinterpret_cast<const int64_t*>(p.gate_index.data);
        row = index[b * p.gate_index.stride[2] + t * p.gate_index.stride[3]] * p.gate.stride[2];
    }
    return reinterpret_cast<const float*>(p.gate.data) + row;
}
APT_DEVICE float sigmoid(float x) { return reciprocal(1 + exp2_flushed(-x * kLog2E)); }
APT_DEVICE float layer_scale(const Problem& p) {
    return p.layer_scale.data ? *reinterpret_cast<const float*>(p.layer_scale.data) : 1;
}

// g = lambda * sigmoid(gate) of prefix column m.
APT_DEVICE float weight(const Problem& p, int b, int t, int m) {
    const bool gated = p.gate.data && t < p.queries && m < p.length;
    return (gated ? sigmoid(gate_row(p, b, t)[m * p.gate.stride[3]]) : 1) * layer_scale(p);
}

// The logit of a product s, `scale` times it, soft-capped.
APT_DEVICE float logit(const Problem& p, float s, float scale) {
    return p.softcap != 0 ? tanhf(s * (scale / p.softcap)) * (p.softcap * kLog2E) : s * (scale * kLog2E);
}

APT_DEVICE float load_number(const Array& a, int64_t o) {
    switch (a.type) {
        case kHalf:
            return to_float(reinterpret_cast<const half_t*>(a.data)[o]);
        case kBFloat16:
            return to_float(reinterpret_cast<const bfloat_t*>(a.data)[o]);
        case kDouble:
            return static_cast<float>(reinterpret_cast<const double*>(a.data)[o]);
        default:
            return reinterpret_cast<const float*>(a.data)[o];
    }
}

APT_BOTH bool has_mask_tensors(const Problem& p) {
    return p.key_padding.data || p.query_segments.data || p.dense.data || p.bias.data;
}

// Token logit x of query q and key n with the bias, or -inf where the key is hidden.
APT_DEVICE float masked(const Problem& p, const Place& at, const Query& q, int n, float x, bool check, bool tensors) {
    if (check && (n < q.first || n >= q.end)) {
        return -kInfinity;
    }
    if (!tensors) {
        return x;
    }
    if (q.t >= p.queries || n >= p.keys) {
        return -kInfinity;
    }
    if (p.key_padding.data && !p.key_padding.data[at.b * p.key_padding.stride[2] + n * p.key_padding.stride[3]]) {
        return -kInfinity;
    }
    if (p.query_segments.data) {
        const auto* query = reinterpret_cast<const int64_t*>(p.query_segments.data);
        const auto* key = reinterpret_cast<const int64_t*>(p.key_segments.data);
        if (query[at.b * p.query_segments.stride[2] + q.t * p.query_segments.stride[3]] !=
            key[at.b * p.key_segments.stride[2] + n * p.key_segments.stride[3]]) {
            return -kInfinity;
        }
    }
    if (p.dense.data) {
        const int64_t* s = p.dense.stride;
        if (!p.dense.data[at.b * s[0] + at.h * s[1] + q.t * s[2] + n * s[3]]) {
            return -kInfinity;
        }
    }
    if (p.bias.data) {
        const int64_t* s = p.bias.stride;
        x += load_number(p.bias, at.b * s[0] + at.h * s[1] + q.t * s[2] + n * s[3]) * kLog2E;
    }
    return x;
}

// Gradients of one element, from s = q.k and r = dO.v: the probability after dropout, the gradient of the logit after
// (dz) and before (ds) bias and soft-cap, and what the element adds to the gradient of its gate.
struct Gradient {
    float p, dz, ds, dg;
};

APT_DEVICE float uncapped(const Problem& p, float dz, float x) {
    if (p.softcap == 0) {
        return dz;
    }
    const float tanh = x / (p.softcap * kLog2E);
    return dz * (1 - tanh * tanh);
}

APT_DEVICE Gradient token_gradient(const Problem& p, const Place& at, const Query& q, int n, float s, float r,
                                   bool check, bool tensors) {
    const float x = logit(p, s, p.scale);
    const float probability = exp2f(masked(p, at, q, n, x, check, tensors) - q.logsumexp);
    const bool keep = kept(p, q.key, static_cast<int>(p.length) + n);
    const float dz = probability * ((keep ? r * p.kept : 0) - q.delta);
    return {keep ? probability : 0, dz, uncapped(p, dz, x), 0};
}

APT_DEVICE Gradient prefix_gradient(const Problem& p, const Query& q, int m, float g, float s, float r) {
    const float x = logit(p, s, g * p.scale);
    const float probability = m < p.length ? exp2f(x - q.logsumexp) : 0;
    const bool keep = kept(p, q.key, m);
    r = keep ? r * p.kept : 0;
    const float dz = uncapped(p, probability * (r * g - q.delta), x);
    return {keep ? probability : 0, dz, dz, dz * s * p.scale + probability * r};
}

// The part of a range that padding and segments leave visible for tile `tile` of `tiles`, batch row `b`.
APT_DEVICE void narrow(const Problem& p, int b, int tiles, int tile, int& first, int& end) {
    if (p.ranges.data) {
        const int32_t* range = reinterpret_cast<const int32_t*>(p.ranges.data) + 2 * (int64_t(b) * tiles + tile);
        first = first > range[0] ? first : range[0];
        end = end < range[1] ? end : range[1];
    }
    if (first >= end) {
        first = end = 0;
    }
}

}  // namespace apt
