// Passes over activations: pools, rectifiers, batch norms, and the samples of experts that lie apart.

#pragma once

#include <cmath>
#include <type_traits>
#include <vector>

#include "vectors.h"

namespace {

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

// The mean was over `all` pixels.
template <int L, int B, class T>
void unrectify_channels(const T* x, const T* g, const T* branch, const float* mean, int64_t all, int64_t pixels,
                        int64_t channels, T* out) {
    Vector<L> spread[B] = {};
    if (mean)
        for (int b = 0; b < B; ++b) spread[b] = load<L>(mean + b * L) / static_cast<float>(all);
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
// r * (y - centre). r, the gradient for the shortcut, is put into `dshortcut`, which may be null.
template <int L, int B, class T>
void unnorm_sums(const T* y, const T* x, const T* g, const T* branch, const float* mean, const float* centre, int64_t pixels,
                 int64_t channels, T* dshortcut, float* sums, float* products) {
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
            if (dshortcut) store<L>(r, dshortcut + at);
            sum[b] += r;
            product[b] += r * (load<L>(y + at) - from[b]);
        }
    for (int b = 0; b < B; ++b) {
        store<L>(sum[b], sums + b * L);
        store<L>(product[b], products + b * L);
    }
}

// dy = r * scale + (y - centre) * slope + offset. Where r is stored, `dshortcut` holds it.
template <int L, int B, class T>
void unnorm_channels(const T* y, const T* x, const T* g, const T* branch, const float* mean, const T* dshortcut,
                     const float* centre, const float* scale, const float* slope, const float* offset, int64_t pixels, int64_t channels,
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
            const Vector<L> r = dshortcut ? load<L>(dshortcut + at) : unrectified<L>(x, g, branch, spread[b], at);
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
                                                   pooled ? pooled + n * s.channels + c : nullptr, s.pixels, s.pixels,
                                                   s.channels, dy[part] + i * s.row() + c);
        });
    });
}

// The sum over samples of numbers (n, channels).
std::vector<double> over_samples(const std::vector<float>& each, int64_t channels) {
    std::vector<double> total(channels, 0);
    for (auto row = each.begin(); row != each.end(); row += channels)
        for (int64_t c = 0; c < channels; ++c) total[c] += row[c];
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
            const float* pooled, const float* weight, double eps, const double* mean, const double* variance, T* dshortcut,
            T* const* dy, float* weight_gradient, float* bias_gradient, int threads) {
    const int64_t samples = places.samples();
    std::vector<float> sums(samples * s.channels), products(samples * s.channels), centre(mean, mean + s.channels),
        scale(s.channels), slope(s.channels), offset(s.channels);
    places.share(threads, [&](int part, int64_t i, int64_t n) {
        by_channels(s.channels, [&](auto vectors, auto lanes, int64_t c) {
            const int64_t at = n * s.row() + c, number = n * s.channels + c;
            unnorm_sums<lanes(), vectors()>(y[part] + i * s.row() + c, x + at, g + at, branch ? branch + at : nullptr,
                                            pooled ? pooled + number : nullptr, &centre[c], s.pixels, s.channels,
                                            dshortcut ? dshortcut + at : nullptr, &sums[number], &products[number]);
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
                                                dshortcut ? dshortcut + at : nullptr, &centre[c], &scale[c], &slope[c],
                                                &offset[c], s.pixels, s.channels, dy[part] + there);
        });
    });
}

// y = the sum over experts of weights[n, e] times a pixel's e-th `channels` numbers in `every`.
template <class T>
void mix(const T* every, const float* weights, int64_t n, int64_t experts, const Size& s, T* y, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < n; ++i)
        for (int64_t p = i * s.pixels; p < (i + 1) * s.pixels; ++p)
            by_channels(s.channels, [&](auto vectors, auto lanes, int64_t c) {
                Vector<lanes()> sum[vectors()] = {};
                for (int64_t e = 0; e < experts; ++e)
                    for (int b = 0; b < vectors(); ++b)
                        sum[b] += weights[i * experts + e] * load<lanes()>(every + (p * experts + e) * s.channels + c + b * lanes());
                for (int b = 0; b < vectors(); ++b) store<lanes()>(sum[b], y + p * s.channels + c + b * lanes());
            });
}

// The gradients of the above for `every` and for the weights, by that of y.
template <class T>
void unmix(const T* g, const T* every, const float* weights, int64_t n, int64_t experts, const Size& s, T* dx,
           float* weight_gradient, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t number = 0; number < n * experts; ++number) {
        const int64_t i = number / experts, e = number % experts, apart = experts * s.channels;
        const int64_t first = i * s.pixels * apart + e * s.channels;
        float dot = 0;
        by_channels(s.channels, [&](auto vectors, auto lanes, int64_t c) {
            Vector<lanes()> sum[vectors()] = {};
            for (int64_t p = 0; p < s.pixels; ++p)
                for (int b = 0; b < vectors(); ++b) {
                    const int64_t at = first + p * apart + c + b * lanes();
                    const Vector<lanes()> r = load<lanes()>(g + i * s.row() + p * s.channels + c + b * lanes());
                    sum[b] += r * load<lanes()>(every + at);
                    store<lanes()>(weights[number] * r, dx + at);
                }
            for (int b = 0; b < vectors(); ++b) dot += total<lanes()>(sum[b]);
        });
        weight_gradient[number] = dot;
    }
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

}  // namespace
