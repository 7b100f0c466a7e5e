// CPU kernels of the row-wise updates of expert tables: each touched row is read once, updated with the gradient that is
// made from its factors, and written. A row is owned by one thread.

#include "rows.h"

using namespace titan_peer;

namespace {

// The noise of stochastic rounding: a hash of (seed, row, element), so a step can be repeated bit for bit.
inline uint32_t hash(uint64_t key) {
    key ^= key >> 33;
    key *= 0xff51afd7ed558ccdULL;
    key ^= key >> 33;
    key *= 0xc4ceb9fe1a85ec53ULL;
    return uint32_t(key >> 32);
}
inline void narrow(float v, uint64_t, float& out) { out = v; }
inline void narrow(float v, uint64_t key, bfloat16& out) {
    uint32_t bits;
    std::memcpy(&bits, &v, 4);
    out.bits = uint16_t((bits + (hash(key) & 0xffff)) >> 16);
}

// What the steps that a row has missed have done to it (ops/missed_steps.py): factors of both moments and of the
// weights, and how far it has moved, in units of its last update.
struct Missed {
    int64_t steps;
    float beta1, beta2, decay, moved;
};

struct MissedSteps {
    int32_t* last_use;  // [N], or null: rows are not brought up to date
    int64_t step;
    const float* table;  // [length, 4]: the factors of 0, 1, ... missed steps
    int64_t length;
    float log2_beta1, log2_beta2, log2_decay;

    void prefetch_row(int64_t row) const {
        if (last_use) __builtin_prefetch(last_use + row, 1, 3);
    }
    // The steps that a row has missed; from now on it has missed none.
    Missed take(int64_t row) const {
        if (!last_use) return {0, 1, 1, 1, 0};
        const int64_t steps = step - 1 - last_use[row], known = std::min(steps, length - 1);
        last_use[row] = int32_t(step);
        const float* f = table + 4 * known;
        if (steps == known) return {steps, f[0], f[1], f[2], f[3]};
        const float rest = float(steps - known), decay = std::exp2(rest * log2_decay);
        return {steps, f[0] * std::exp2(rest * log2_beta1), f[1] * std::exp2(rest * log2_beta2), f[2] * decay, f[3] * decay};
    }
};

// The table whose rows are updated, and with what; the same for all kinds of updates.
struct Update {
    Factors factors;
    const int32_t* row_ids;
    int64_t R;
    MissedSteps missed;
    float grad_scale, step_size, decay, eps;
    uint64_t seed;
    int threads;

    int64_t width() const { return factors.E * factors.D; }
    // The noise of a row's first element.
    uint64_t key(int64_t row) const { return (seed * 0x9e3779b97f4a7c15ULL) ^ (uint64_t(row) * width() * 3); }
};

// ---- AdamW

struct Betas {
    float beta1, beta2;
};

template <bool Behind, class Param, class Moment>
inline void adamw_row(Param* __restrict p, Moment* __restrict m, Moment* __restrict v, const float* __restrict g,
                      const Update& a, const Betas& b, const Missed& missed, uint64_t key) {
    const int64_t width = a.width();
    const float moved = a.step_size * missed.moved;
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) {
        float gi = g[i] * a.grad_scale, mi = widen(m[i]), vi = widen(v[i]), pi = widen(p[i]);
        if (Behind) {
            pi = pi * missed.decay - moved * mi / (std::sqrt(vi) + a.eps);
            mi *= missed.beta1;
            vi *= missed.beta2;
        }
        mi += (1.0f - b.beta1) * (gi - mi);
        vi = vi * b.beta2 + (1.0f - b.beta2) * gi * gi;
        pi = pi * a.decay - a.step_size * mi / (std::sqrt(vi) + a.eps);
        narrow(pi, key + 3 * i, p[i]);
        narrow(mi, key + 3 * i + 1, m[i]);
        narrow(vi, key + 3 * i + 2, v[i]);
    }
}

// With one second moment, the mean square of the row's gradient.
template <class Param, class Moment>
inline void adamw_row(Param* __restrict p, Moment* __restrict m, float& v, const float* __restrict g, const Update& a,
                      const Betas& b, const Missed& missed, uint64_t key) {
    const int64_t width = a.width();
    const float square = dot(g, g, width) * a.grad_scale * a.grad_scale / float(width);
    const float moved = a.step_size * missed.moved / (std::sqrt(v) + a.eps);
    v = v * missed.beta2 * b.beta2 + (1.0f - b.beta2) * square;
    const float rate = a.step_size / (std::sqrt(v) + a.eps);
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) {
        float gi = g[i] * a.grad_scale, mi = widen(m[i]);
        float pi = widen(p[i]) * missed.decay - moved * mi;
        mi *= missed.beta1;
        mi += (1.0f - b.beta1) * (gi - mi);
        narrow(pi * a.decay - rate * mi, key + 3 * i, p[i]);
        narrow(mi, key + 3 * i + 1, m[i]);
    }
}

template <class Param, class Moment>
void adamw(Param* param, Moment* exp_avg, Moment* exp_avg_sq, float* row_second_moment, const Update& a, const Betas& b) {
    const int64_t width = a.width();
#pragma omp parallel num_threads(a.threads)
    {
        std::vector<float> gradient(width);
#pragma omp for schedule(dynamic, 256)
        for (int64_t r = 0; r < a.R; ++r) {
            if (r + 1 < a.R) {
                const int64_t next = a.row_ids[r + 1] * width;
                a.missed.prefetch_row(a.row_ids[r + 1]);
                prefetch_to_write(param + next, width * sizeof(Param));
                prefetch_to_write(exp_avg + next, width * sizeof(Moment));
                if (exp_avg_sq) prefetch_to_write(exp_avg_sq + next, width * sizeof(Moment));
            }
            a.factors.row(r, gradient.data());
            const int64_t row = a.row_ids[r], first = row * width;
            const Missed missed = a.missed.take(row);
            if (!exp_avg_sq)
                adamw_row(param + first, exp_avg + first, row_second_moment[row], gradient.data(), a, b, missed, a.key(row));
            else if (missed.steps > 0)
                adamw_row<true>(param + first, exp_avg + first, exp_avg_sq + first, gradient.data(), a, b, missed, a.key(row));
            else
                adamw_row<false>(param + first, exp_avg + first, exp_avg_sq + first, gradient.data(), a, b, missed, a.key(row));
        }
    }
}

// ---- normalized momentum

constexpr float kDamping = 1e-4f;  // as DAMPING and ITERATIONS of ops/reference.py
constexpr int kIterations = 20;

// out = a b, all [E, E].
inline void multiply(const float* a, const float* b, float* __restrict out, int64_t E) {
    std::fill(out, out + E * E, 0.0f);
    for (int64_t i = 0; i < E; ++i)
        for (int64_t k = 0; k < E; ++k) add_scaled(out + i * E, b + k * E, a[i * E + k], E);
}

// The inverse root of a symmetric positive definite [E, E], by coupled Newton-Schulz iterations.
struct InverseRoot {
    int64_t E;
    std::vector<float> y, z, t, next;

    explicit InverseRoot(int64_t size) : E(size), y(size * size), z(size * size), t(size * size), next(size * size) {}
    const float* of(const std::vector<float>& a) {
        float trace = 0;
        for (int64_t e = 0; e < E; ++e) trace += a[e * E + e];
        for (int64_t i = 0; i < E * E; ++i) y[i] = a[i] / trace, z[i] = i % (E + 1) == 0;
        for (int step = 0; step < kIterations; ++step) {
            multiply(z.data(), y.data(), t.data(), E);
            for (int64_t i = 0; i < E * E; ++i) t[i] = (i % (E + 1) == 0 ? 1.5f : 0.0f) - 0.5f * t[i];
            multiply(y.data(), t.data(), next.data(), E);
            std::swap(y, next);
            multiply(t.data(), z.data(), next.data(), E);
            std::swap(z, next);
        }
        const float scale = 1.0f / std::sqrt(trace);
        for (float& value : z) value *= scale;
        return z.data();
    }
};

// The inverse root of a block's mean squares and products, [E, E]; u is [E, D].
inline const float* inverse_root(const float* u, int64_t E, int64_t D, float eps, std::vector<float>& a, InverseRoot& root) {
    float trace = 0;
    for (int64_t e = 0; e < E; ++e)
        for (int64_t f = 0; f < E; ++f) {
            a[e * E + f] = dot(u + e * D, u + f * D, D) / float(std::max(E, D));
            if (e == f) trace += a[e * E + f];
        }
    const float floor = std::max(eps * eps, 1e-37f);
    if (E == 1) {
        a[0] = 1.0f / std::sqrt(a[0] + floor);
        return a.data();
    }
    for (int64_t e = 0; e < E; ++e) a[e * E + e] += floor + kDamping * trace / float(E);
    return root.of(a);
}

template <class Param, class Moment>
void normalized(Param* param, Moment* momentum, const Update& a, float beta) {
    const int64_t width = a.width(), E = a.factors.E, D = a.factors.D;
#pragma omp parallel num_threads(a.threads)
    {
        std::vector<float> gradient(width), products(E * E), turned(D);
        InverseRoot root(E);
        float* __restrict u = gradient.data();
#pragma omp for schedule(dynamic, 256)
        for (int64_t r = 0; r < a.R; ++r) {
            if (r + 1 < a.R) {
                const int64_t next = a.row_ids[r + 1] * width;
                a.missed.prefetch_row(a.row_ids[r + 1]);
                prefetch_to_write(param + next, width * sizeof(Param));
                if (momentum) prefetch_to_write(momentum + next, width * sizeof(Moment));
            }
            a.factors.row(r, u);
            const int64_t row = a.row_ids[r];
            const Missed missed = a.missed.take(row);
            const uint64_t key = a.key(row);
#pragma omp simd
            for (int64_t i = 0; i < width; ++i) u[i] *= a.grad_scale;
            if (momentum) {
                Moment* __restrict m = momentum + row * width;
#pragma omp simd
                for (int64_t i = 0; i < width; ++i) {
                    const float old = widen(m[i]) * missed.beta1, mi = old + (1.0f - beta) * (u[i] - old);
                    narrow(mi, key + 3 * i + 1, m[i]);
                    u[i] = mi + (1.0f - beta) * (u[i] - mi);  // Nesterov's look ahead
                }
            }
            const float* scale = inverse_root(u, E, D, a.eps, products, root);
            Param* __restrict p = param + row * width;
            const float decay = a.decay * missed.decay;
            for (int64_t e = 0; e < E; ++e) {
                std::fill(turned.begin(), turned.end(), 0.0f);
                for (int64_t f = 0; f < E; ++f) add_scaled(turned.data(), u + f * D, scale[e * E + f], D);
                const uint64_t first = key + 3 * e * D;
#pragma omp simd
                for (int64_t d = 0; d < D; ++d)
                    narrow(widen(p[e * D + d]) * decay - a.step_size * turned[d], first + 3 * d, p[e * D + d]);
            }
        }
    }
}

}  // namespace

extern "C" {

// dtype codes of param and moments: 0 float32, 1 bfloat16. row_second_moment [N] replaces exp_avg_sq when that is null.
// step_size, root_correction: lr / (1 - beta1^t) and sqrt(1 - beta2^t); decay: 1 - lr * weight_decay. last_use and what
// follows it: null and anything, if missed steps are not made good.
void titan_peer_rowwise_adamw(int64_t param_dtype, int64_t moment_dtype, void* param, void* exp_avg, void* exp_avg_sq,
                              float* row_second_moment, const int32_t* order, const int32_t* row_ids,
                              const int32_t* run_starts, int64_t R, const float* weights, const float* vectors,
                              int64_t K, int64_t E, int64_t D, float grad_scale, float step_size, float beta1,
                              float beta2, float eps, float decay, float root_correction, int32_t* last_use,
                              int64_t step, const float* table, int64_t length, float log2_beta1, float log2_beta2,
                              float log2_decay, uint64_t seed, int64_t threads) {
    const MissedSteps missed{last_use, step, table, length, log2_beta1, log2_beta2, log2_decay};
    // m / c1 / (sqrt(v / c2) + eps) = m (sqrt(c2) / c1) / (sqrt(v) + eps sqrt(c2)): one division per element
    const Update update{{order, run_starts, weights, vectors, K, E, D}, row_ids, R, missed, grad_scale,
                        step_size * root_correction, decay, eps * root_correction, seed, int(threads)};
    auto run = [&](auto p, auto m) {
        using Param = decltype(p);
        using Moment = decltype(m);
        adamw(static_cast<Param*>(param), static_cast<Moment*>(exp_avg), static_cast<Moment*>(exp_avg_sq),
              row_second_moment, update, {beta1, beta2});
    };
    if (param_dtype == 0)
        moment_dtype == 0 ? run(float(), float()) : run(float(), bfloat16());
    else
        moment_dtype == 0 ? run(bfloat16(), float()) : run(bfloat16(), bfloat16());
}

// momentum: null for none. step_size: lr times the root mean square that an update has.
void titan_peer_rowwise_normalized(int64_t param_dtype, int64_t momentum_dtype, void* param, void* momentum,
                                   const int32_t* order, const int32_t* row_ids, const int32_t* run_starts, int64_t R,
                                   const float* weights, const float* vectors, int64_t K, int64_t E, int64_t D,
                                   float grad_scale, float step_size, float beta, float eps, float decay,
                                   int32_t* last_use, int64_t step, const float* table, int64_t length,
                                   float log2_beta1, float log2_beta2, float log2_decay, uint64_t seed,
                                   int64_t threads) {
    const MissedSteps missed{last_use, step, table, length, log2_beta1, log2_beta2, log2_decay};
    const Update update{{order, run_starts, weights, vectors, K, E, D}, row_ids, R, missed, grad_scale, step_size, decay,
                        eps, seed, int(threads)};
    auto run = [&](auto p, auto m) {
        using Param = decltype(p);
        using Moment = decltype(m);
        normalized(static_cast<Param*>(param), static_cast<Moment*>(momentum), update, beta);
    };
    if (param_dtype == 0)
        momentum_dtype == 0 ? run(float(), float()) : run(float(), bfloat16());
    else
        momentum_dtype == 0 ? run(bfloat16(), float()) : run(bfloat16(), bfloat16());
}

}  // extern "C"
