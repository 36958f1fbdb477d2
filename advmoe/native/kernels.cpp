// What a routed network spends its time on beside convolutions that a library does well, for CPUs: convolutions of which
// each sample has its own expert, and passes over activations that would otherwise be several.
//
// A plain C interface, so that nothing of PyTorch's is needed to compile it. Activations are channels-last: a sample is
// H x W pixels of C numbers. Every loop over samples is shared by `threads` threads and computes a sample the same way
// whatever the others are.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#else
constexpr int kLanes = 8;
#endif

template <int L>
struct VectorOf {
    typedef float type __attribute__((vector_size(L * 4), aligned(4), may_alias));
    typedef uint32_t bits __attribute__((vector_size(L * 4)));
    typedef uint16_t upper __attribute__((vector_size(L * 2), aligned(2), may_alias));
};
template <int L>
using Vector = typename VectorOf<L>::type;

// bf16 is the upper half of fp32.
struct Half {
    uint16_t bits;
};

template <int L>
inline Vector<L> load(const float* from) {
    return *reinterpret_cast<const Vector<L>*>(from);
}

template <int L>
inline Vector<L> load(const Half* from) {
    using Bits = typename VectorOf<L>::bits;
    const typename VectorOf<L>::upper upper = *reinterpret_cast<const typename VectorOf<L>::upper*>(from);
    const Bits bits = __builtin_convertvector(upper, Bits) << 16;
    Vector<L> values;
    std::memcpy(&values, &bits, sizeof values);
    return values;
}

template <int L>
inline void store(Vector<L> values, float* to) {
    *reinterpret_cast<Vector<L>*>(to) = values;
}

// To the nearest, ties to even; what is not a number stays so.
template <int L>
inline void store(Vector<L> values, Half* to) {
    using Bits = typename VectorOf<L>::bits;
    Bits bits;
    std::memcpy(&bits, &values, sizeof bits);
    const Bits quiet = (bits >> 16) | 0x40u, rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const Bits chosen = (bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded;
    *reinterpret_cast<typename VectorOf<L>::upper*>(to) = __builtin_convertvector(chosen, typename VectorOf<L>::upper);
}

inline float value_of(float x) { return x; }
inline float value_of(Half x) {
    const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

template <int L>
inline float total(Vector<L> v) {
    float sum = 0;
    for (int i = 0; i < L; ++i) sum += v[i];
    return sum;
}

// The mean over `pixels` of L channels, `channels` apart.
template <int L, class T>
void mean_of(const T* x, int64_t pixels, int64_t channels, float* out) {
    Vector<L> sum[4] = {};
    int64_t p = 0;
    for (; p + 4 <= pixels; p += 4)
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) sum[i] += load<L>(x + (p + i) * channels);
    for (; p < pixels; ++p) sum[0] += load<L>(x + p * channels);
    store<L>(((sum[0] + sum[1]) + (sum[2] + sum[3])) / static_cast<float>(pixels), out);
}

template <class T>
void pool(const T* x, int64_t n, int64_t pixels, int64_t channels, float* out, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < n; ++i) {
        const T* from = x + i * pixels * channels;
        float* to = out + i * channels;
        int64_t c = 0;
        for (; c + kLanes <= channels; c += kLanes) mean_of<kLanes>(from + c, pixels, channels, to + c);
        for (; c + 8 <= channels; c += 8) mean_of<8>(from + c, pixels, channels, to + c);
        for (; c < channels; ++c) {
            float sum = 0;
            for (int64_t p = 0; p < pixels; ++p) sum += value_of(from[p * channels + c]);
            to[c] = sum / static_cast<float>(pixels);
        }
    }
}

// out = max(y + shortcut, 0) for B x L of a sample's channels, and their mean over pixels; out may be y.
template <int L, int B, class T>
void rectify_channels(const T* y, const T* shortcut, int64_t pixels, int64_t channels, T* out, float* mean) {
    Vector<L> sum[B] = {};
    for (int64_t p = 0; p < pixels; ++p)
#pragma GCC unroll 4
        for (int b = 0; b < B; ++b) {
            const int64_t at = p * channels + b * L;
            Vector<L> v = load<L>(y + at);
            if (shortcut) v += load<L>(shortcut + at);
            store<L>(v < 0.0f ? Vector<L>{} : v, out + at);
            if (mean) sum[b] += load<L>(out + at);
        }
    if (mean)
        for (int b = 0; b < B; ++b) store<L>(sum[b] / static_cast<float>(pixels), mean + b * L);
}

// The gradient of what was rectified to x: g + branch + the mean's, where x is above 0; branch may be null.
template <int L, class T>
inline Vector<L> unrectified(const T* x, const T* g, const T* branch, Vector<L> spread, int64_t at) {
    Vector<L> r = load<L>(g + at) + spread;
    if (branch) r += load<L>(branch + at);
    return load<L>(x + at) <= 0.0f ? Vector<L>{} : r;
}

template <int L, int B, class T>
void unrectify_channels(const T* x, const T* g, const T* branch, const float* mean, int64_t pixels, int64_t channels,
                        T* out) {
    Vector<L> spread[B] = {};
    if (mean)
        for (int b = 0; b < B; ++b) spread[b] = load<L>(mean + b * L) / static_cast<float>(pixels);
    for (int64_t p = 0; p < pixels; ++p)
#pragma GCC unroll 4
        for (int b = 0; b < B; ++b) {
            const int64_t at = p * channels + b * L;
            store<L>(unrectified<L>(x, g, branch, spread[b], at), out + at);
        }
}

// Samples of a batch that lie apart: row i of each part is sample members[i], or i where there are no members.
struct Places {
    int parts;
    const int64_t* const* members;
    const int64_t* counts;

    // Calls `each` with the part, the row in it and the sample, for all samples, shared by `threads` threads.
    template <class Each>
    void share(int threads, const Each& each) const {
#pragma omp parallel num_threads(threads)
        for (int part = 0; part < parts; ++part) {
#pragma omp for schedule(static) nowait
            for (int64_t i = 0; i < counts[part]; ++i) each(part, i, members ? members[part][i] : i);
        }
    }
    int64_t samples() const {
        int64_t sum = 0;
        for (int part = 0; part < parts; ++part) sum += counts[part];
        return sum;
    }
};

// Calls `each` with vectors of the channels, as many at a time as share cache lines.
template <class Each>
void by_channels(int64_t channels, const Each& each) {
    int64_t c = 0;
    for (; c + 4 * kLanes <= channels; c += 4 * kLanes) each(std::integral_constant<int, 4>{}, std::integral_constant<int, kLanes>{}, c);
    for (; c + 2 * kLanes <= channels; c += 2 * kLanes) each(std::integral_constant<int, 2>{}, std::integral_constant<int, kLanes>{}, c);
    for (; c + kLanes <= channels; c += kLanes) each(std::integral_constant<int, 1>{}, std::integral_constant<int, kLanes>{}, c);
    for (; c + 8 <= channels; c += 8) each(std::integral_constant<int, 1>{}, std::integral_constant<int, 8>{}, c);
}

// Batch norm in train mode, and the rectifier behind it.

// Per sample and channel: the sums over pixels of y - origin and of its square.
template <int L, int B, class T>
void moment_channels(const T* y, const float* origin, int64_t pixels, int64_t channels, float* sums, float* squares) {
    Vector<L> sum[B] = {}, square[B] = {}, from[B];
    for (int b = 0; b < B; ++b) from[b] = load<L>(origin + b * L);
    for (int64_t p = 0; p < pixels; ++p)
#pragma GCC unroll 4
        for (int b = 0; b < B; ++b) {
            const Vector<L> v = load<L>(y + p * channels + b * L) - from[b];
            sum[b] += v;
            square[b] += v * v;
        }
    for (int b = 0; b < B; ++b) {
        store<L>(sum[b], sums + b * L);
        store<L>(square[b], squares + b * L);
    }
}

// x = max(y * scale + shift + shortcut, 0), and its mean over pixels.
template <int L, int B, class T>
void norm_channels(const T* y, const float* scale, const float* shift, const T* shortcut, int64_t pixels,
                   int64_t channels, T* x, float* mean) {
    Vector<L> sum[B] = {}, factor[B], start[B];
    for (int b = 0; b < B; ++b) {
        factor[b] = load<L>(scale + b * L);
        start[b] = load<L>(shift + b * L);
    }
    for (int64_t p = 0; p < pixels; ++p)
#pragma GCC unroll 4
        for (int b = 0; b < B; ++b) {
            const int64_t at = p * channels + b * L;
            Vector<L> v = load<L>(y + at) * factor[b] + start[b];
            if (shortcut) v += load<L>(shortcut + at);
            store<L>(v < 0.0f ? Vector<L>{} : v, x + at);
            if (mean) sum[b] += load<L>(x + at);
        }
    if (mean)
        for (int b = 0; b < B; ++b) store<L>(sum[b] / static_cast<float>(pixels), mean + b * L);
}

// Per sample and channel, with r = g + branch + the mean's gradient where x is above 0: the sums of r and of
// r * (y - centre). r is kept in `kept`, if that is given.
template <int L, int B, class T>
void unnorm_sums(const T* y, const T* x, const T* g, const T* branch, const float* mean, const float* centre, int64_t pixels,
                 int64_t channels, T* kept, float* sums, float* products) {
    Vector<L> sum[B] = {}, product[B] = {}, spread[B] = {}, from[B];
    for (int b = 0; b < B; ++b) {
        from[b] = load<L>(centre + b * L);
        if (mean) spread[b] = load<L>(mean + b * L) / static_cast<float>(pixels);
    }
    for (int64_t p = 0; p < pixels; ++p)
#pragma GCC unroll 4
        for (int b = 0; b < B; ++b) {
            const int64_t at = p * channels + b * L;
            const Vector<L> r = unrectified<L>(x, g, branch, spread[b], at);
            if (kept) store<L>(r, kept + at);
            sum[b] += r;
            product[b] += r * (load<L>(y + at) - from[b]);
        }
    for (int b = 0; b < B; ++b) {
        store<L>(sum[b], sums + b * L);
        store<L>(product[b], products + b * L);
    }
}

// dy = r * scale + (y - centre) * slope + offset. Where r was kept, `kept` holds it.
template <int L, int B, class T>
void unnorm_channels(const T* y, const T* x, const T* g, const T* branch, const float* mean, const T* kept, const float* centre,
                     const float* scale, const float* slope, const float* offset, int64_t pixels, int64_t channels,
                     T* dy) {
    Vector<L> spread[B] = {}, from[B], factor[B], tilt[B], start[B];
    for (int b = 0; b < B; ++b) {
        from[b] = load<L>(centre + b * L);
        factor[b] = load<L>(scale + b * L);
        tilt[b] = load<L>(slope + b * L);
        start[b] = load<L>(offset + b * L);
        if (mean) spread[b] = load<L>(mean + b * L) / static_cast<float>(pixels);
    }
    for (int64_t p = 0; p < pixels; ++p)
#pragma GCC unroll 4
        for (int b = 0; b < B; ++b) {
            const int64_t at = p * channels + b * L;
            const Vector<L> r = kept ? load<L>(kept + at) : unrectified<L>(x, g, branch, spread[b], at);
            store<L>(r * factor[b] + (load<L>(y + at) - from[b]) * tilt[b] + start[b], dy + at);
        }
}

struct Size {
    int64_t pixels, channels;
    int64_t row() const { return pixels * channels; }
};

template <class T>
void rectify(const Places& places, const Size& s, const T* const* y, const T* shortcut, T* out, float* pooled,
             int threads) {
    places.share(threads, [&](int part, int64_t i, int64_t n) {
        by_channels(s.channels, [&](auto vectors, auto lanes, int64_t c) {
            const int64_t at = n * s.row() + c;
            rectify_channels<lanes(), vectors()>(y[part] + i * s.row() + c, shortcut ? shortcut + at : nullptr,
                                                 s.pixels, s.channels, out + at,
                                                 pooled ? pooled + n * s.channels + c : nullptr);
        });
    });
}

template <class T>
void unrectify(const Places& places, const Size& s, const T* x, const T* g, const T* branch, const float* pooled,
               T* const* dy, int threads) {
    places.share(threads, [&](int part, int64_t i, int64_t n) {
        by_channels(s.channels, [&](auto vectors, auto lanes, int64_t c) {
            const int64_t at = n * s.row() + c;
            unrectify_channels<lanes(), vectors()>(x + at, g + at, branch ? branch + at : nullptr,
                                                   pooled ? pooled + n * s.channels + c : nullptr, s.pixels,
                                                   s.channels, dy[part] + i * s.row() + c);
        });
    });
}

// The sum over samples of numbers (n, channels).
std::vector<double> over_samples(const std::vector<float>& each, int64_t channels) {
    std::vector<double> total(channels, 0);
    for (size_t i = 0; i < each.size(); ++i) total[i % channels] += each[i];
    return total;
}

template <class T>
void norm(const Places& places, const Size& s, const T* const* y, const float* weight, const float* bias, double eps,
          const T* shortcut, T* x, float* pooled, double* mean, double* variance, int threads) {
    const int64_t samples = places.samples();
    std::vector<float> sums(samples * s.channels), squares(samples * s.channels), origin(s.channels), scale(s.channels),
        shift(s.channels);
    // Of differences from some value of the channel: a large mean would drown the squares.
    for (int64_t c = 0; c < s.channels; ++c) origin[c] = value_of(y[0][c]);
    places.share(threads, [&](int part, int64_t i, int64_t n) {
        by_channels(s.channels, [&](auto vectors, auto lanes, int64_t c) {
            moment_channels<lanes(), vectors()>(y[part] + i * s.row() + c, &origin[c], s.pixels, s.channels,
                                                &sums[n * s.channels + c], &squares[n * s.channels + c]);
        });
    });
    const std::vector<double> sum = over_samples(sums, s.channels), square = over_samples(squares, s.channels);
    const double count = static_cast<double>(samples) * s.pixels;
    for (int64_t c = 0; c < s.channels; ++c) {
        const double difference = sum[c] / count, spread = square[c] / count - difference * difference;
        mean[c] = difference + origin[c];
        variance[c] = spread < 0 ? 0 : spread;
        const double factor = weight[c] / std::sqrt(variance[c] + eps);
        scale[c] = static_cast<float>(factor);
        shift[c] = static_cast<float>(bias[c] - mean[c] * factor);
    }
    places.share(threads, [&](int part, int64_t i, int64_t n) {
        by_channels(s.channels, [&](auto vectors, auto lanes, int64_t c) {
            const int64_t at = n * s.row() + c;
            norm_channels<lanes(), vectors()>(y[part] + i * s.row() + c, &scale[c], &shift[c],
                                              shortcut ? shortcut + at : nullptr, s.pixels, s.channels, x + at,
                                              pooled ? pooled + n * s.channels + c : nullptr);
        });
    });
}

template <class T>
void unnorm(const Places& places, const Size& s, const T* const* y, const T* x, const T* g, const T* branch,
            const float* pooled, const float* weight, double eps, const double* mean, const double* variance, T* kept,
            T* const* dy, float* weight_gradient, float* bias_gradient, int threads) {
    const int64_t samples = places.samples();
    std::vector<float> sums(samples * s.channels), products(samples * s.channels), centre(mean, mean + s.channels),
        scale(s.channels), slope(s.channels), offset(s.channels);
    places.share(threads, [&](int part, int64_t i, int64_t n) {
        by_channels(s.channels, [&](auto vectors, auto lanes, int64_t c) {
            const int64_t at = n * s.row() + c, number = n * s.channels + c;
            unnorm_sums<lanes(), vectors()>(y[part] + i * s.row() + c, x + at, g + at, branch ? branch + at : nullptr,
                                            pooled ? pooled + number : nullptr, &centre[c], s.pixels, s.channels,
                                            kept ? kept + at : nullptr, &sums[number], &products[number]);
        });
    });
    const std::vector<double> sum = over_samples(sums, s.channels), product = over_samples(products, s.channels);
    const double count = static_cast<double>(samples) * s.pixels;
    for (int64_t c = 0; c < s.channels; ++c) {
        const double narrowed = 1 / std::sqrt(variance[c] + eps), factor = weight[c] * narrowed;
        bias_gradient[c] = static_cast<float>(sum[c]);
        weight_gradient[c] = static_cast<float>(product[c] * narrowed);
        scale[c] = static_cast<float>(factor);
        slope[c] = static_cast<float>(-factor * narrowed * narrowed * product[c] / count);
        offset[c] = static_cast<float>(-factor * sum[c] / count);
    }
    places.share(threads, [&](int part, int64_t i, int64_t n) {
        by_channels(s.channels, [&](auto vectors, auto lanes, int64_t c) {
            const int64_t at = n * s.row() + c, there = i * s.row() + c;
            unnorm_channels<lanes(), vectors()>(y[part] + there, x + at, g + at, branch ? branch + at : nullptr,
                                                pooled ? pooled + n * s.channels + c : nullptr,
                                                kept ? kept + at : nullptr, &centre[c], &scale[c], &slope[c],
                                                &offset[c], s.pixels, s.channels, dy[part] + there);
        });
    });
}

template <class T>
float product(const T* a, const T* b, int64_t count) {
    Vector<kLanes> sum[4] = {};
    int64_t i = 0;
    for (; i + 4 * kLanes <= count; i += 4 * kLanes)
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) sum[j] += load<kLanes>(a + i + j * kLanes) * load<kLanes>(b + i + j * kLanes);
    for (; i + kLanes <= count; i += kLanes) sum[0] += load<kLanes>(a + i) * load<kLanes>(b + i);
    float rest = 0;
    for (; i < count; ++i) rest += value_of(a[i]) * value_of(b[i]);
    return total<kLanes>((sum[0] + sum[1]) + (sum[2] + sum[3])) + rest;
}

template <class T>
void multiply(const T* a, const T* b, int64_t n, int64_t row, float* products, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < n; ++i) products[i] = product(a + i * row, b + i * row, row);
}

template <class T>
void unsplit(const Places& places, const T* const* gradients, const T* x, int64_t row, T* out, float* dots,
             int threads) {
    places.share(threads, [&](int part, int64_t i, int64_t n) {
        const T* g = gradients[part] + i * row;
        std::memcpy(out + n * row, g, row * sizeof(T));
        dots[n] = product(g, x + n * row, row);
    });
}

struct Router {
    int64_t channels, hidden, experts;
    const float *mean, *variance, *norm_weight, *norm_bias;  // (channels,)
    const float *weight, *bias;                              // (hidden, channels), (hidden,)
    const float *last_weight, *last_bias;                    // (experts, hidden), (experts,)
    double eps;

    std::vector<float> scale() const {
        std::vector<float> made(channels);
        for (int64_t c = 0; c < channels; ++c)
            made[c] = static_cast<float>(norm_weight[c] / std::sqrt(variance[c] + eps));
        return made;
    }
};

// The scores of one sample; `normed` is room for its features.
void score_sample(const Router& r, const float* scale, const float* p, float* normed, float* h, float* scores) {
    for (int64_t c = 0; c < r.channels; ++c) normed[c] = (p[c] - r.mean[c]) * scale[c] + r.norm_bias[c];
    for (int64_t j = 0; j < r.hidden; ++j) {
        const float v = product(normed, r.weight + j * r.channels, r.channels) + r.bias[j];
        h[j] = v < 0 ? 0 : v;
    }
    for (int64_t e = 0; e < r.experts; ++e) scores[e] = product(h, r.last_weight + e * r.hidden, r.hidden) + r.last_bias[e];
}

void score(const Router& r, const float* pooled, int64_t n, float* hidden, float* scores, int threads) {
    const std::vector<float> scale = r.scale();
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> normed(r.channels);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < n; ++i)
            score_sample(r, scale.data(), pooled + i * r.channels, normed.data(), hidden + i * r.hidden,
                         scores + i * r.experts);
    }
}

// The first of the largest, what is not a number being the largest, as PyTorch has it.
int64_t largest(const float* scores, int64_t count) {
    int64_t best = 0;
    for (int64_t e = 1; e < count; ++e)
        if (!std::isnan(scores[best]) && (std::isnan(scores[e]) || scores[e] > scores[best])) best = e;
    return best;
}

void unscore(const Router& r, const float* hidden, const float* gradient, int64_t n, float* pooled, int threads) {
    const std::vector<float> scale = r.scale();
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < n; ++i) {
        const float *h = hidden + i * r.hidden, *g = gradient + i * r.experts;
        float* p = pooled + i * r.channels;
        std::fill(p, p + r.channels, 0.0f);
        for (int64_t j = 0; j < r.hidden; ++j) {
            if (h[j] <= 0) continue;
            float back = 0;
            for (int64_t e = 0; e < r.experts; ++e) back += g[e] * r.last_weight[e * r.hidden + j];
            for (int64_t c = 0; c < r.channels; ++c) p[c] += back * r.weight[j * r.channels + c];
        }
        for (int64_t c = 0; c < r.channels; ++c) p[c] *= scale[c];
    }
}

// The probability that softmax gives the chosen of a sample's scores, and its gradient.
void gate(const float* scores, const int64_t* choice, int64_t n, int64_t experts, float* probability) {
    for (int64_t i = 0; i < n; ++i) {
        const float *each = scores + i * experts, most = each[largest(each, experts)];
        float sum = 0;
        for (int64_t e = 0; e < experts; ++e) sum += std::exp(each[e] - most);
        probability[i] = std::exp(each[choice[i]] - most) / sum;
    }
}

void ungate(const float* scores, const int64_t* choice, const float* gradient, int64_t n, int64_t experts, float* out) {
    for (int64_t i = 0; i < n; ++i) {
        const float *each = scores + i * experts, most = each[largest(each, experts)];
        float sum = 0, *to = out + i * experts;
        for (int64_t e = 0; e < experts; ++e) sum += to[e] = std::exp(each[e] - most);
        const float chosen = to[choice[i]] / sum, weight = gradient[i] * chosen;
        for (int64_t e = 0; e < experts; ++e) to[e] = weight * ((e == choice[i] ? 1 : 0) - to[e] / sum);
    }
}

// Output pixels that lie on a grid, and which inputs each of them sums over.
struct Grid {
    int rows, cols;
    int64_t in_row, in_col;              // from one output pixel's first input to the next one's
    int64_t out_first, out_row, out_col; // where outputs lie
    std::vector<int64_t> offset;         // of each tap's input from the first
    std::vector<int> weight;             // each tap's index among the filters'
};

// B x L output channels of T pixels: a register each. Pixels beyond the last are computed again and not stored.
template <int L, int B, int T>
void tile(const Grid& grid, const float* in, const float* filters, const float* bias, int c_in, int c_out_padded,
          int c_out, int first_pixel, float* out) {
    using V = Vector<L>;
    const int count = std::min(T, grid.rows * grid.cols - first_pixel);
    const float* base[T];
    float* to[T];
    for (int t = 0; t < T; ++t) {
        const int pixel = first_pixel + std::min(t, count - 1);
        const int row = pixel / grid.cols, col = pixel % grid.cols;
        base[t] = in + row * grid.in_row + col * grid.in_col;
        to[t] = out + grid.out_first + row * grid.out_row + col * grid.out_col;
    }
    V sum[T][B];
    for (int b = 0; b < B; ++b) {
        const V start = bias ? load<L>(bias + b * L) : V{};
        for (int t = 0; t < T; ++t) sum[t][b] = start;
    }
    for (size_t tap = 0; tap < grid.offset.size(); ++tap) {
        const float* w = filters + static_cast<int64_t>(grid.weight[tap]) * c_in * c_out_padded;
        const int64_t at = grid.offset[tap];
        const float* from[T];
        for (int t = 0; t < T; ++t) from[t] = base[t] + at;
        for (int c = 0; c < c_in; ++c, w += c_out_padded) {
            V weights[B];
#pragma GCC unroll 4
            for (int b = 0; b < B; ++b) weights[b] = load<L>(w + b * L);
#pragma GCC unroll 16
            for (int t = 0; t < T; ++t) {
                const float x = from[t][c];
#pragma GCC unroll 4
                for (int b = 0; b < B; ++b) sum[t][b] += weights[b] * x;
            }
        }
    }
    for (int t = 0; t < count; ++t)
        for (int b = 0; b < B; ++b) {
            const V made = sum[t][b];
            const int left = c_out - b * L;
            if (left >= L)
                *reinterpret_cast<V*>(to[t] + b * L) = made;
            else if (left > 0)
                std::memcpy(to[t] + b * L, &made, left * sizeof(float));
        }
}

template <int L, int B, int T>
void tiles(const Grid& grid, const float* in, const float* filters, const float* bias, int c_in, int c_out_padded,
           int c_out, float* out) {
    for (int pixel = 0; pixel < grid.rows * grid.cols; pixel += T)
        tile<L, B, T>(grid, in, filters, bias, c_in, c_out_padded, c_out, pixel, out);
}

void convolve(const Grid& grid, const float* in, const float* filters, const float* bias, int c_in, int c_out_padded,
              int c_out, float* out) {
    for (int first = 0; first < c_out_padded;) {
        const float* shift = bias ? bias + first : nullptr;
        const int wide = c_out_padded - first;
        if (wide >= 2 * kLanes) {
            tiles<kLanes, 2, 8>(grid, in, filters + first, shift, c_in, c_out_padded, c_out - first, out + first);
            first += 2 * kLanes;
        } else if (wide >= kLanes) {
            tiles<kLanes, 1, 8>(grid, in, filters + first, shift, c_in, c_out_padded, c_out - first, out + first);
            first += kLanes;
        } else {
            tiles<8, 1, 8>(grid, in, filters + first, shift, c_in, c_out_padded, c_out - first, out + first);
            first += 8;
        }
    }
}

struct Shape {
    int64_t n;
    int32_t h, w, c_in, oh, ow, c_out, kh, kw, sh, sw, ph, pw, experts;
};

// The convolution of one sample after another.
struct Ahead {
    const Shape s;
    const int padded, width, height;
    Grid grid;

    explicit Ahead(const Shape& shape)
        : s(shape), padded((s.c_out + 7) / 8 * 8), width(s.w + 2 * s.pw), height(s.h + 2 * s.ph),
          grid{s.oh, s.ow, static_cast<int64_t>(s.sh) * width * s.c_in, static_cast<int64_t>(s.sw) * s.c_in,
               0, static_cast<int64_t>(s.ow) * s.c_out, s.c_out, {}, {}} {
        for (int ky = 0; ky < s.kh; ++ky)
            for (int kx = 0; kx < s.kw; ++kx) {
                grid.offset.push_back((static_cast<int64_t>(ky) * width + kx) * s.c_in);
                grid.weight.push_back(ky * s.kw + kx);
            }
    }

    // Numbers of a sample with its frame of zeros, which each thread fills anew inside.
    size_t framed() const { return static_cast<size_t>(height) * width * s.c_in; }

    void convolve_sample(const float* x, int64_t n, int64_t expert, const float* filters, const float* bias,
                         float* framed, float* y) const {
        const float* from = x + n * s.h * s.w * s.c_in;
        for (int row = 0; row < s.h; ++row)
            std::memcpy(framed + ((row + s.ph) * static_cast<int64_t>(width) + s.pw) * s.c_in,
                        from + static_cast<int64_t>(row) * s.w * s.c_in, sizeof(float) * s.w * s.c_in);
        convolve(grid, framed, filters + expert * s.kh * s.kw * s.c_in * padded, bias ? bias + expert * padded : nullptr,
                 s.c_in, padded, s.c_out, y + n * s.oh * s.ow * s.c_out);
    }
};

int floor_divide(int a, int b) { return a >= 0 ? a / b : -((b - 1 - a) / b); }

}  // namespace

extern "C" {

// Changes with the functions below, so that nothing calls what an older file holds.
int advmoe_kernels() { return 1; }

// out[n, c] = the mean of x[n, :, c].
void advmoe_pool_fp32(const float* x, int64_t n, int64_t pixels, int64_t channels, float* out, int threads) {
    pool(x, n, pixels, channels, out, threads);
}
void advmoe_pool_bf16(const Half* x, int64_t n, int64_t pixels, int64_t channels, float* out, int threads) {
    pool(x, n, pixels, channels, out, threads);
}

// out = max(y + shortcut, 0), samples in order, and its mean over pixels in `pooled` (n, channels); shortcut and pooled may
// be null. Here and below channels are whole vectors of 8, and what has parts lies apart, at `places`.
void advmoe_rectify_fp32(const Places* places, const Size* size, const float* const* y, const float* shortcut, float* out,
                         float* pooled, int threads) {
    rectify(*places, *size, y, shortcut, out, pooled, threads);
}
void advmoe_rectify_bf16(const Places* places, const Size* size, const Half* const* y, const Half* shortcut, Half* out,
                         float* pooled, int threads) {
    rectify(*places, *size, y, shortcut, out, pooled, threads);
}

// The gradient for y (in its parts) and for the shortcut of the above, by that of its result x, which are two where x was
// used twice (branch may be null), and of `pooled`, if that is given.
void advmoe_unrectify_fp32(const Places* places, const Size* size, const float* x, const float* g, const float* branch,
                           const float* pooled, float* const* dy, int threads) {
    unrectify(*places, *size, x, g, branch, pooled, dy, threads);
}
void advmoe_unrectify_bf16(const Places* places, const Size* size, const Half* x, const Half* g, const Half* branch,
                           const float* pooled, Half* const* dy, int threads) {
    unrectify(*places, *size, x, g, branch, pooled, dy, threads);
}

// Batch norm in train mode: x = max(norm(y) + shortcut, 0), its mean over pixels in `pooled`, and each channel's mean and
// variance over the batch; shortcut and pooled may be null.
void advmoe_norm_fp32(const Places* places, const Size* size, const float* const* y, const float* weight,
                      const float* bias, double eps, const float* shortcut, float* x, float* pooled, double* mean,
                      double* variance, int threads) {
    norm(*places, *size, y, weight, bias, eps, shortcut, x, pooled, mean, variance, threads);
}
void advmoe_norm_bf16(const Places* places, const Size* size, const Half* const* y, const float* weight,
                      const float* bias, double eps, const Half* shortcut, Half* x, float* pooled, double* mean,
                      double* variance, int threads) {
    norm(*places, *size, y, weight, bias, eps, shortcut, x, pooled, mean, variance, threads);
}

// The gradients of the above for y, weight and bias, by those of x (as above) and of `pooled`; that for the shortcut is put
// into `kept`, which may be null.
void advmoe_unnorm_fp32(const Places* places, const Size* size, const float* const* y, const float* x, const float* g,
                        const float* branch, const float* pooled, const float* weight, double eps, const double* mean,
                        const double* variance, float* kept, float* const* dy, float* weight_gradient,
                        float* bias_gradient, int threads) {
    unnorm(*places, *size, y, x, g, branch, pooled, weight, eps, mean, variance, kept, dy, weight_gradient,
           bias_gradient, threads);
}
void advmoe_unnorm_bf16(const Places* places, const Size* size, const Half* const* y, const Half* x, const Half* g,
                        const Half* branch, const float* pooled, const float* weight, double eps, const double* mean,
                        const double* variance, Half* kept, Half* const* dy, float* weight_gradient,
                        float* bias_gradient, int threads) {
    unnorm(*places, *size, y, x, g, branch, pooled, weight, eps, mean, variance, kept, dy, weight_gradient,
           bias_gradient, threads);
}

// products[n] = <a[n], b[n]>.
void advmoe_products_fp32(const float* a, const float* b, int64_t n, int64_t row, float* products, int threads) {
    multiply(a, b, n, row, products, threads);
}
void advmoe_products_bf16(const Half* a, const Half* b, int64_t n, int64_t row, float* products, int threads) {
    multiply(a, b, n, row, products, threads);
}

// Rows of each part go back to their places; dots[n] is a row's product with x[n].
void advmoe_unsplit_fp32(const Places* places, const float* const* gradients, const float* x, int64_t row, float* out,
                         float* dots, int threads) {
    unsplit(*places, gradients, x, row, out, dots, threads);
}
void advmoe_unsplit_bf16(const Places* places, const Half* const* gradients, const Half* x, int64_t row, Half* out,
                         float* dots, int threads) {
    unsplit(*places, gradients, x, row, out, dots, threads);
}

// Scores (n, experts) of pooled features (n, channels): a batch norm in eval mode, a linear layer, ReLU, whose result
// (n, hidden) is kept, and a linear layer.
void advmoe_score(const Router* router, const float* pooled, int64_t n, float* hidden, float* scores, int threads) {
    score(*router, pooled, n, hidden, scores, threads);
}

// The gradient of the above for the pooled features, by that of the scores.
void advmoe_unscore(const Router* router, const float* hidden, const float* gradient, int64_t n, float* pooled,
                    int threads) {
    unscore(*router, hidden, gradient, n, pooled, threads);
}


// The probability of each sample's choice among its scores (n, experts), and the gradient for the scores by that of it.
void advmoe_gate(const float* scores, const int64_t* choice, int64_t n, int64_t experts, float* probability) {
    gate(scores, choice, n, experts, probability);
}
void advmoe_ungate(const float* scores, const int64_t* choice, const float* gradient, int64_t n, int64_t experts,
                   float* out) {
    ungate(scores, choice, gradient, n, experts, out);
}

// y[n] = x[n] * filters[choice[n]] + bias[choice[n]]. Filters (E, kh, kw, c_in, c_out padded to whole vectors of 8),
// bias (E, c_out padded) or null. Returns how many samples chose an expert that there is not; then nothing is computed.
int64_t advmoe_convolve(const Shape* shape, const float* x, const int64_t* choice, const float* filters,
                        const float* bias, float* y, int threads) {
    const Shape s = *shape;
    const int64_t wrong = std::count_if(choice, choice + s.n, [&](int64_t e) { return e < 0 || e >= s.experts; });
    if (wrong) return wrong;
    const Ahead ahead(s);
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> framed(ahead.framed());
#pragma omp for schedule(static)
        for (int64_t n = 0; n < s.n; ++n) ahead.convolve_sample(x, n, choice[n], filters, bias, framed.data(), y);
    }
    return 0;
}

// A whole layer without gradients: scores of `pooled` features, the choice, its convolution with bias, the shortcut if
// there is one, the rectifier, and if `next` is given the mean of the result over its pixels.
void advmoe_layer(const Router* router, const float* pooled, const Shape* shape, const float* x, const float* filters,
                  const float* bias, const float* shortcut, float* y, float* next, float* scores, int64_t* choice,
                  int threads) {
    const Router r = *router;
    const Shape s = *shape;
    const Ahead ahead(s);
    const std::vector<float> scale = r.scale();
    const int64_t pixels = static_cast<int64_t>(s.oh) * s.ow;
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> framed(ahead.framed()), normed(r.channels), hidden(r.hidden);
#pragma omp for schedule(static)
        for (int64_t n = 0; n < s.n; ++n) {
            float* each = scores + n * r.experts;
            score_sample(r, scale.data(), pooled + n * r.channels, normed.data(), hidden.data(), each);
            choice[n] = largest(each, r.experts);
            ahead.convolve_sample(x, n, choice[n], filters, bias, framed.data(), y);
            by_channels(s.c_out, [&](auto vectors, auto lanes, int64_t c) {
                const int64_t at = n * pixels * s.c_out + c;
                rectify_channels<lanes(), vectors()>(y + at, shortcut ? shortcut + at : nullptr, pixels, s.c_out,
                                                     y + at, next ? next + n * s.c_out + c : nullptr);
            });
        }
    }
}

// The gradient for x of the above, and, where `dots` is given, its product with x: filters (E, kh, kw, c_out, c_in padded).
void advmoe_convolve_backward(const Shape* shape, const float* g, const int64_t* choice, const float* filters,
                              const float* x, float* dx, float* dots, int threads) {
    const Shape s = *shape;
    const int padded = (s.c_in + 7) / 8 * 8;
    // Rows and columns of zeros around the gradient that a pixel at the edge may look at.
    const int top = -std::min(0, floor_divide(s.ph - s.kh + 1, s.sh)), left = -std::min(0, floor_divide(s.pw - s.kw + 1, s.sw));
    const int bottom = std::max(0, (s.h - 1 + s.ph) / s.sh - s.oh + 1), right = std::max(0, (s.w - 1 + s.pw) / s.sw - s.ow + 1);
    const int width = s.ow + left + right, height = s.oh + top + bottom;
    std::vector<Grid> grids;
    for (int py = 0; py < std::min(s.sh, s.h); ++py)
        for (int px = 0; px < std::min(s.sw, s.w); ++px) {
            Grid grid{(s.h - py + s.sh - 1) / s.sh, (s.w - px + s.sw - 1) / s.sw, static_cast<int64_t>(width) * s.c_out,
                      s.c_out, (static_cast<int64_t>(py) * s.w + px) * s.c_in,
                      static_cast<int64_t>(s.sh) * s.w * s.c_in, static_cast<int64_t>(s.sw) * s.c_in, {}, {}};
            for (int ky = 0; ky < s.kh; ++ky)
                for (int kx = 0; kx < s.kw; ++kx) {
                    const int y = py + s.ph - ky, x = px + s.pw - kx;
                    if (floor_divide(y, s.sh) * s.sh != y || floor_divide(x, s.sw) * s.sw != x) continue;
                    grid.offset.push_back(((floor_divide(y, s.sh) + top) * static_cast<int64_t>(width) +
                                           floor_divide(x, s.sw) + left) * s.c_out);
                    grid.weight.push_back(ky * s.kw + kx);
                }
            grids.push_back(grid);
        }
    const int64_t filter = static_cast<int64_t>(s.kh) * s.kw * s.c_out * padded;
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> framed(static_cast<size_t>(height) * width * s.c_out);
#pragma omp for schedule(static)
        for (int64_t n = 0; n < s.n; ++n) {
            const float* from = g + n * s.oh * s.ow * s.c_out;
            for (int row = 0; row < s.oh; ++row)
                std::memcpy(framed.data() + ((row + top) * static_cast<int64_t>(width) + left) * s.c_out,
                            from + static_cast<int64_t>(row) * s.ow * s.c_out, sizeof(float) * s.ow * s.c_out);
            for (const Grid& grid : grids)
                convolve(grid, framed.data(), filters + choice[n] * filter, nullptr, s.c_out, padded, s.c_in,
                         dx + n * s.h * s.w * s.c_in);
            const int64_t size = static_cast<int64_t>(s.h) * s.w * s.c_in;
            if (dots) dots[n] = product(dx + n * size, x + n * size, size);
        }
    }
}

}  // extern "C"
