// The sparse operations of a training step for CPUs. Plain C interface, called through ctypes; see cpp.py.
//
// Loops are written so that the compiler vectorises them for the machine at hand (-march=native); there is no
// intrinsic, so any architecture with a C++17 compiler and OpenMP will do. Every output element is computed by one
// thread in one fixed order: results do not depend on the number of threads.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

namespace {

using std::int64_t;
using std::uint16_t;
using std::uint32_t;
using std::uint8_t;

struct bfloat16 {
    uint16_t bits;
};

inline float from_bits(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline uint32_t to_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

inline float widen(float value) { return value; }
inline float widen(bfloat16 value) { return from_bits(static_cast<uint32_t>(value.bits) << 16); }

// Selection ------------------------------------------------------------------------------------------------------

// An integer that orders floats as they are ordered, with every NaN above infinity, so that it is selected and seen.
inline int32_t order_key(float value) {
    const int32_t bits = static_cast<int32_t>(to_bits(value));
    const int32_t key = bits ^ ((bits >> 31) & 0x7FFFFFFF);
    return value != value ? std::numeric_limits<int32_t>::max() : key;
}

// The largest key that at least k of n keys reach. Counting 32 times, all lanes at once, is several times faster than
// a quickselect, whose branches cannot be predicted.
inline int32_t kth_largest(const int32_t* keys, int64_t n, int64_t k) {
    int32_t low = std::numeric_limits<int32_t>::min(), high = std::numeric_limits<int32_t>::max();
    while (low < high) {
        const int32_t middle = static_cast<int32_t>((static_cast<int64_t>(low) + high + 1) >> 1);
        int32_t count = 0;
#pragma omp simd reduction(+ : count)
        for (int64_t i = 0; i < n; i++) count += keys[i] >= middle;
        if (count >= k) {
            low = middle;
        } else {
            high = middle - 1;
        }
    }
    return low;
}

struct Workspace {  // of one thread
    std::vector<int32_t> maxima, keys;
    std::vector<int64_t> cols;
};

// The k largest of a row, in the order of their columns.
//
// The row is cut into blocks. The k-th largest of the blocks' maxima is a lower bound for the k-th largest value, so
// only the k or so blocks that reach it can hold winners: the rest of the row is read once and never again.
template <int BLOCK, typename T>
void row_topk(const T* row, const float* bias, int64_t n, int64_t k, Workspace& work, int64_t* out_cols,
              float* out_values) {
    const int64_t n_blocks = (n + BLOCK - 1) / BLOCK, n_whole = n / BLOCK;
    int32_t* maxima = work.maxima.data();
    for (int64_t block = 0; block < n_blocks; block++) {
        const T* part = row + block * BLOCK;
        const float* part_bias = bias + block * BLOCK;
        int32_t largest = std::numeric_limits<int32_t>::min();
        if (block < n_whole) {
#pragma omp simd reduction(max : largest)
            for (int i = 0; i < BLOCK; i++) largest = std::max(largest, order_key(widen(part[i]) + part_bias[i]));
        } else {
            for (int64_t i = 0; i < n - block * BLOCK; i++) {
                largest = std::max(largest, order_key(widen(part[i]) + part_bias[i]));
            }
        }
        maxima[block] = largest;
    }
    const int32_t bound = n_blocks < k ? std::numeric_limits<int32_t>::min() : kth_largest(maxima, n_blocks, k);
    int32_t* keys = work.keys.data();
    int64_t* cols = work.cols.data();
    int64_t found = 0;
    for (int64_t block = 0; block < n_blocks; block++) {
        if (maxima[block] < bound) continue;
        const int64_t start = block * BLOCK, stop = std::min(n, start + BLOCK);
        int32_t candidates[BLOCK];
        for (int64_t i = start; i < stop; i++) candidates[i - start] = order_key(widen(row[i]) + bias[i]);
        for (int64_t i = start; i < stop; i++) {  // without a branch: whether an element wins cannot be predicted
            keys[found] = candidates[i - start];
            cols[found] = i;
            found += candidates[i - start] >= bound;
        }
    }
    const int32_t smallest = kth_largest(keys, found, k);
    int64_t ties = k;
    for (int64_t i = 0; i < found; i++) ties -= keys[i] > smallest;
    for (int64_t i = 0, written = 0; written < k; i++) {
        const bool tie = keys[i] == smallest;
        if (keys[i] < smallest || (tie && ties == 0)) continue;
        ties -= tie;
        out_cols[written] = cols[i];
        out_values[written] = widen(row[cols[i]]) + bias[cols[i]];
        written++;
    }
}

template <typename T>
void topk(const T* products, const float* bias, int64_t batch, int64_t n, int64_t k, int64_t* out_cols,
          float* out_values, int threads) {
#pragma omp parallel num_threads(threads)
    {
        Workspace work{std::vector<int32_t>(n / 16 + 1), std::vector<int32_t>(n + 1), std::vector<int64_t>(n + 1)};
#pragma omp for schedule(static)
        for (int64_t row = 0; row < batch; row++) {
            const auto run = [&](auto block) {
                row_topk<decltype(block)::value>(products + row * n, bias, n, k, work, out_cols + row * k,
                                                 out_values + row * k);
            };
            // About four times as many blocks as winners: a good bound, and few blocks to look into.
            if (n >= 4 * k * 256) {
                run(std::integral_constant<int, 256>{});
            } else if (n >= 4 * k * 64) {
                run(std::integral_constant<int, 64>{});
            } else {
                run(std::integral_constant<int, 16>{});
            }
        }
    }
}

constexpr int STRIP = 64;

// Calls visit(column, value) for every value above its threshold, in the order of columns.
template <typename T, typename Visit>
inline void visit_above(const T* row, const float* bias, const float* threshold, int64_t per_latent, int64_t n,
                        Visit visit) {
    const int64_t step = per_latent ? 1 : 0;
    for (int64_t start = 0; start < n; start += STRIP) {
        const int64_t size = std::min<int64_t>(STRIP, n - start);
        float values[STRIP];
        int any = 0;
        if (size == STRIP && per_latent) {
#pragma omp simd reduction(| : any)
            for (int i = 0; i < STRIP; i++) {
                values[i] = widen(row[start + i]) + bias[start + i];
                any |= !(values[i] <= threshold[start + i]);  // NaN counts, so that it is seen
            }
        } else if (size == STRIP) {
            const float bar = threshold[0];
#pragma omp simd reduction(| : any)
            for (int i = 0; i < STRIP; i++) {
                values[i] = widen(row[start + i]) + bias[start + i];
                any |= !(values[i] <= bar);
            }
        } else {
            for (int64_t i = 0; i < size; i++) values[i] = widen(row[start + i]) + bias[start + i];
            any = 1;
        }
        if (!any) continue;
        for (int64_t i = 0; i < size; i++) {
            if (!(values[i] <= threshold[(start + i) * step])) visit(start + i, values[i]);
        }
    }
}

template <typename T>
void count_above(const T* products, const float* bias, const float* threshold, int64_t per_latent, int64_t batch,
                 int64_t n, int64_t* counts, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < batch; row++) {
        int64_t count = 0;
        const T* values = products + row * n;
        if (per_latent) {
#pragma omp simd reduction(+ : count)
            for (int64_t i = 0; i < n; i++) count += !(widen(values[i]) + bias[i] <= threshold[i]);
        } else {
            const float bar = threshold[0];
#pragma omp simd reduction(+ : count)
            for (int64_t i = 0; i < n; i++) count += !(widen(values[i]) + bias[i] <= bar);
        }
        counts[row] = count;
    }
}

template <typename T>
void list_above(const T* products, const float* bias, const float* threshold, int64_t per_latent, int64_t batch,
                int64_t n, const int64_t* starts, int64_t first_row, int64_t* out_rows, int64_t* out_cols,
                float* out_values, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < batch; row++) {
        int64_t at = starts[row];
        visit_above(products + row * n, bias, threshold, per_latent, n, [&](int64_t col, float value) {
            out_rows[at] = first_row + row;
            out_cols[at] = col;
            out_values[at] = value;
            at++;
        });
    }
}

// Sums of a few weighted rows --------------------------------------------------------------------------------------

inline void add_rows(float* __restrict out, const float* __restrict matrix, const int64_t* ids, const float* weights,
                     const int64_t* order, int64_t begin, int64_t end, int64_t d) {
    const auto weight = [&](int64_t at) { return weights[order ? order[at] : at]; };
    int64_t at = begin;
    for (; at + 4 <= end; at += 4) {
        const float *a = matrix + ids[at] * d, *b = matrix + ids[at + 1] * d, *c = matrix + ids[at + 2] * d,
                    *e = matrix + ids[at + 3] * d;
        const float wa = weight(at), wb = weight(at + 1), wc = weight(at + 2), we = weight(at + 3);
#pragma omp simd
        for (int64_t i = 0; i < d; i++) out[i] += (wa * a[i] + wb * b[i]) + (wc * c[i] + we * e[i]);
    }
    for (; at < end; at++) {
        const float* a = matrix + ids[at] * d;
        const float wa = weight(at);
#pragma omp simd
        for (int64_t i = 0; i < d; i++) out[i] += wa * a[i];
    }
}

// The optimiser ----------------------------------------------------------------------------------------------------

inline uint32_t mix(uint32_t value) {  // moments.py: mix
    value = (value ^ (value >> 16)) * 0x7FEB352Du;
    value = (value ^ (value >> 15)) * 0x846CA68Bu;
    return value ^ (value >> 16);
}

constexpr int MANTISSA = 3;
constexpr int DROP = 23 - MANTISSA;

template <int EXPONENT>
inline float decode8(uint32_t magnitude, float scale) {
    constexpr uint32_t largest = ((1u << EXPONENT) - 1) << MANTISSA;
    const float value = from_bits((magnitude + (127u << MANTISSA) - largest) << DROP);
    return magnitude == 0 ? 0.0f : value * scale;
}

template <int EXPONENT>
inline uint32_t encode8(float magnitude, float scale, uint32_t noise) {
    constexpr int32_t largest = ((1 << EXPONENT) - 1) << MANTISSA;
    constexpr float smallest = 1.125f / static_cast<float>(1ull << ((1 << EXPONENT) - 1));
    const float ratio = magnitude / scale;
    int32_t code = static_cast<int32_t>((to_bits(ratio) + (noise & ((1u << DROP) - 1))) >> DROP);
    code += largest - (127 << MANTISSA);
    constexpr float per_unit = static_cast<float>(16777216.0 / static_cast<double>(smallest));
    code = ratio < smallest ? (static_cast<float>(noise & 0xFFFFFFu) < ratio * per_unit) : code;
    return static_cast<uint32_t>(code < 0 ? 0 : (code > largest ? largest : code));
}

struct AdamConstants {
    float rate, beta2, rest1, rest2, eps, correction2, scale;  // rest = 1 - beta
};

}  // namespace

extern "C" {

void topk_float(const float* products, const float* bias, int64_t batch, int64_t n, int64_t k, int64_t* cols,
                float* values, int threads) {
    topk(products, bias, batch, n, k, cols, values, threads);
}

void topk_bfloat16(const bfloat16* products, const float* bias, int64_t batch, int64_t n, int64_t k, int64_t* cols,
                   float* values, int threads) {
    topk(products, bias, batch, n, k, cols, values, threads);
}

void count_above_float(const float* products, const float* bias, const float* threshold, int64_t per_latent,
                       int64_t batch, int64_t n, int64_t* counts, int threads) {
    count_above(products, bias, threshold, per_latent, batch, n, counts, threads);
}

void count_above_bfloat16(const bfloat16* products, const float* bias, const float* threshold, int64_t per_latent,
                          int64_t batch, int64_t n, int64_t* counts, int threads) {
    count_above(products, bias, threshold, per_latent, batch, n, counts, threads);
}

void list_above_float(const float* products, const float* bias, const float* threshold, int64_t per_latent,
                      int64_t batch, int64_t n, const int64_t* starts, int64_t first_row, int64_t* rows, int64_t* cols,
                      float* values, int threads) {
    list_above(products, bias, threshold, per_latent, batch, n, starts, first_row, rows, cols, values, threads);
}

void list_above_bfloat16(const bfloat16* products, const float* bias, const float* threshold, int64_t per_latent,
                         int64_t batch, int64_t n, const int64_t* starts, int64_t first_row, int64_t* rows,
                         int64_t* cols, float* values, int threads) {
    list_above(products, bias, threshold, per_latent, batch, n, starts, first_row, rows, cols, values, threads);
}

// A counting sort: entries come by token, and stay so within a latent.
void by_latent(const int64_t* rows, const int64_t* cols, int64_t n, int64_t d_sae, int64_t* order, int64_t* tokens,
               int64_t* starts) {
    std::memset(starts, 0, sizeof(int64_t) * (d_sae + 1));
    for (int64_t i = 0; i < n; i++) starts[cols[i] + 1]++;
    for (int64_t latent = 0; latent < d_sae; latent++) starts[latent + 1] += starts[latent];
    std::vector<int64_t> next(starts, starts + d_sae);
    for (int64_t i = 0; i < n; i++) {
        const int64_t at = next[cols[i]]++;
        order[at] = i;
        tokens[at] = rows[i];
    }
}

void decode(const float* acts, const int64_t* starts, const int64_t* cols, const float* w_dec, const float* b_dec,
            int64_t batch, int64_t d, float* recons, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < batch; row++) {
        float* out = recons + row * d;
        std::memcpy(out, b_dec, sizeof(float) * d);
        add_rows(out, w_dec, cols, acts, nullptr, starts[row], starts[row + 1], d);
    }
}

// Latent by latent, so that its decoder row stays in cache and each token's gradient is read once for both results.
void decode_grads(const float* grad, const float* acts, const int64_t* order, const int64_t* tokens,
                  const int64_t* starts, const float* w_dec, int64_t d_sae, int64_t d, float* grad_acts,
                  float* grad_w_dec, int threads) {
#pragma omp parallel for num_threads(threads) schedule(dynamic, 32)
    for (int64_t latent = 0; latent < d_sae; latent++) {
        float* __restrict out = grad_w_dec + latent * d;
        const float* __restrict row = w_dec + latent * d;
        std::memset(out, 0, sizeof(float) * d);
        for (int64_t at = starts[latent]; at < starts[latent + 1]; at++) {
            const float* __restrict vector = grad + tokens[at] * d;
            const float act = acts[order[at]];
            float dot = 0;
#pragma omp simd reduction(+ : dot)
            for (int64_t i = 0; i < d; i++) {
                dot += vector[i] * row[i];
                out[i] += act * vector[i];
            }
            grad_acts[order[at]] = dot;
        }
    }
}

void sum_per_latent(const float* weights, const int64_t* order, const int64_t* tokens, const int64_t* starts,
                    const float* vectors, int64_t d_sae, int64_t d, float* sums, int threads) {
#pragma omp parallel for num_threads(threads) schedule(dynamic, 32)
    for (int64_t latent = 0; latent < d_sae; latent++) {
        float* out = sums + latent * d;
        std::memset(out, 0, sizeof(float) * d);
        add_rows(out, vectors, tokens, weights, order, starts[latent], starts[latent + 1], d);
    }
}

void entry_dots(const float* vectors, const float* rows, const int64_t* starts, const int64_t* cols, int64_t batch,
                int64_t d, float* dots, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t token = 0; token < batch; token++) {
        const float* vector = vectors + token * d;
        for (int64_t at = starts[token]; at < starts[token + 1]; at++) {
            const float* row = rows + cols[at] * d;
            float dot = 0;
#pragma omp simd reduction(+ : dot)
            for (int64_t i = 0; i < d; i++) dot += vector[i] * row[i];
            dots[at] = dot;
        }
    }
}

// Per row: the component along the unit row (if there is one), and the squared norm of the rest.
void row_norms(const float* grad, const float* unit_rows, int64_t n_rows, int64_t d, float* along, float* squares,
               int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < n_rows; row++) {
        const float* g = grad + row * d;
        float sum = 0;
        if (unit_rows) {
            const float* u = unit_rows + row * d;
            float dot = 0;
#pragma omp simd reduction(+ : dot)
            for (int64_t i = 0; i < d; i++) dot += g[i] * u[i];
            along[row] = dot;
#pragma omp simd reduction(+ : sum)
            for (int64_t i = 0; i < d; i++) sum += (g[i] - dot * u[i]) * (g[i] - dot * u[i]);
        } else {
#pragma omp simd reduction(+ : sum)
            for (int64_t i = 0; i < d; i++) sum += g[i] * g[i];
        }
        squares[row] = sum;
    }
}

// One step of Adam. `kind` says how moments are kept: 0 fp32, 1 bf16, 2 eight bits with a scale per row. With
// `along`, that component is taken out of the gradient and the parameter's rows are restored to norm 1.
void adam(float* param, const float* grad, const float* along, void* exp_avg, void* exp_avg_sq, float* avg_scale,
          float* sq_scale, int kind, int64_t n_rows, int64_t d, const AdamConstants* constants, uint32_t seed,
          int threads) {
    const AdamConstants c = *constants;
    const uint32_t seed1 = mix(seed), seed2 = mix(seed + 1);
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> buffer1(d), buffer2(d);
#pragma omp for schedule(static)
        for (int64_t row = 0; row < n_rows; row++) {
            const int64_t offset = row * d;
            float* __restrict p = param + offset;
            const float* __restrict g = grad + offset;
            const float out = along ? along[row] : 0.0f;
            float *m, *v;
            if (kind == 0) {
                m = static_cast<float*>(exp_avg) + offset;
                v = static_cast<float*>(exp_avg_sq) + offset;
            } else {
                m = buffer1.data();
                v = buffer2.data();
                if (kind == 1) {
                    const bfloat16* m16 = static_cast<bfloat16*>(exp_avg) + offset;
                    const bfloat16* v16 = static_cast<bfloat16*>(exp_avg_sq) + offset;
#pragma omp simd
                    for (int64_t i = 0; i < d; i++) {
                        m[i] = widen(m16[i]);
                        v[i] = widen(v16[i]);
                    }
                } else {
                    const uint8_t* m8 = static_cast<uint8_t*>(exp_avg) + offset;
                    const uint8_t* v8 = static_cast<uint8_t*>(exp_avg_sq) + offset;
                    const float ms = avg_scale[row], vs = sq_scale[row];
#pragma omp simd
                    for (int64_t i = 0; i < d; i++) {
                        const float magnitude = decode8<4>(m8[i] & 0x7Fu, ms);
                        m[i] = m8[i] & 0x80u ? -magnitude : magnitude;
                        v[i] = decode8<5>(v8[i], vs);
                    }
                }
            }
            float norm = 0;
#pragma omp simd reduction(+ : norm)
            for (int64_t i = 0; i < d; i++) {
                const float gradient = (g[i] - out * p[i]) * c.scale;
                const float first = m[i] + c.rest1 * (gradient - m[i]);
                const float second = c.beta2 * v[i] + c.rest2 * gradient * gradient;
                m[i] = first;
                v[i] = second;
                const float moved = p[i] - c.rate * (first / (std::sqrt(second / c.correction2) + c.eps));
                p[i] = moved;
                norm += moved * moved;
            }
            if (along) {
                const float factor = 1.0f / std::max(std::sqrt(norm), 1e-12f);
#pragma omp simd
                for (int64_t i = 0; i < d; i++) p[i] *= factor;
            }
            const uint32_t first_element = static_cast<uint32_t>(offset);
            if (kind == 1) {
                uint16_t* m16 = static_cast<uint16_t*>(exp_avg) + offset;
                uint16_t* v16 = static_cast<uint16_t*>(exp_avg_sq) + offset;
#pragma omp simd
                for (int64_t i = 0; i < d; i++) {
                    const uint32_t element = first_element + static_cast<uint32_t>(i);
                    m16[i] = static_cast<uint16_t>((to_bits(m[i]) + (mix(seed1 + element) & 0xFFFFu)) >> 16);
                    v16[i] = static_cast<uint16_t>((to_bits(v[i]) + (mix(seed2 + element) & 0xFFFFu)) >> 16);
                }
            } else if (kind == 2) {
                float ms = 0, vs = 0;
#pragma omp simd reduction(max : ms, vs)
                for (int64_t i = 0; i < d; i++) {
                    ms = std::max(ms, std::fabs(m[i]));
                    vs = std::max(vs, v[i]);
                }
                avg_scale[row] = ms;
                sq_scale[row] = vs;
                const float md = std::max(ms, std::numeric_limits<float>::min());
                const float vd = std::max(vs, std::numeric_limits<float>::min());
                uint8_t* m8 = static_cast<uint8_t*>(exp_avg) + offset;
                uint8_t* v8 = static_cast<uint8_t*>(exp_avg_sq) + offset;
#pragma omp simd
                for (int64_t i = 0; i < d; i++) {
                    const uint32_t element = first_element + static_cast<uint32_t>(i);
                    const uint32_t sign = m[i] < 0 ? 0x80u : 0u;
                    m8[i] = static_cast<uint8_t>(encode8<4>(std::fabs(m[i]), md, mix(seed1 + element)) | sign);
                    v8[i] = static_cast<uint8_t>(encode8<5>(v[i], vd, mix(seed2 + element)));
                }
            }
        }
    }
}

}  // extern "C"
