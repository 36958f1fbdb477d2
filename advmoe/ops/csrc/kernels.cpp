// What a routed network spends its time on beside convolutions that a library does well, for CPUs: convolutions of which
// each sample has its own expert, and passes over activations that would otherwise be several.
//
// A plain C interface, so that nothing of PyTorch's is needed to compile it. Activations are channels-last: a sample is
// H x W pixels of C numbers. Every loop over samples is shared by `threads` threads and computes a sample the same way
// whatever the others are.

#include <algorithm>
#include <cstdint>
#include <cstdlib>

#include "activations.h"
#include "convolution.h"
#include "routers.h"
#include "tiles.h"

namespace {

// What becomes of a convolution's output: nothing, or max(output + shortcut, 0) and its mean over pixels in `pooled`; both
// may be null.
struct Finish {
    int64_t rectified;
    const void* shortcut;
    float* pooled;
};

// What the output of a convolution became, `y`, the gradients of that beside the first, and where the shortcut's is put; all
// may be null.
struct Unfinish {
    const void *y, *branch;
    const float* pooled;
    void* dshortcut;
};

// Calls `run` with what computes convolutions of T.
template <class Run>
void with_units(const Convolution& c, const float* filters, const float* bias, const Run& run) {
    run(VectorUnits(c, filters, bias));
}
template <class Run>
void with_units(const Convolution& c, const Half* filters, const float* bias, const Run& run) {
#if defined(ADVMOE_TILES)
    run(TileUnits(c, filters, bias));
#else
    std::abort();  // nobody may ask for it
#endif
}

template <class T>
void convolve_all(const Shape& s, const T* x, const int64_t* choice, const T* filters, const float* bias,
                  const Finish& finish, T* y, int threads) {
    const Convolution c = ahead(s);
    const int64_t pixels = static_cast<int64_t>(s.oh) * s.ow;
    const T* shortcut = static_cast<const T*>(finish.shortcut);
    with_units(c, filters, bias, [&](const auto& units) {
        convolve(c, units, choice, s.n, s.experts, y, threads,
                 [&](int64_t n, T* framed) { c.frame(x + n * c.numbers(), framed); },
                 [&](int64_t n, T* image) {
                     if (!finish.rectified) return;
                     by_channels(s.c_out, [&](auto vectors, auto lanes, int64_t at) {
                         rectify_channels<lanes(), vectors()>(image + at, shortcut ? shortcut + n * c.outputs + at : nullptr,
                                                              pixels, s.c_out, image + at,
                                                              finish.pooled ? finish.pooled + n * s.c_out + at : nullptr);
                     });
                 });
    });
}

template <class T>
void convolve_all_backward(const Shape& s, const T* g, const Unfinish& unfinish, const int64_t* choice, const T* filters,
                           const T* x, T* dx, float* dots, int threads) {
    const Convolution c = back(s);
    const int64_t pixels = static_cast<int64_t>(s.oh) * s.ow;
    const T *y = static_cast<const T*>(unfinish.y), *branch = static_cast<const T*>(unfinish.branch);
    T* dshortcut = static_cast<T*>(unfinish.dshortcut);
    // The gradient of a row, or all rows, of what was rectified; `at` is its place among all numbers.
    const auto unfinished = [&](int64_t n, int64_t at, int64_t of, T* to) {
        by_channels(s.c_out, [&](auto vectors, auto lanes, int64_t channel) {
            const int64_t first = at + channel;
            unrectify_channels<lanes(), vectors()>(y + first, g + first, branch ? branch + first : nullptr,
                                                   unfinish.pooled ? unfinish.pooled + n * s.c_out + channel : nullptr, pixels, of,
                                                   s.c_out, to + channel);
        });
    };
    with_units(c, filters, nullptr, [&](const auto& units) {
        convolve(c, units, choice, s.n, s.experts, dx, threads,
                 [&](int64_t n, T* framed) {
                     const int64_t at = n * c.numbers();
                     if (!y) return c.frame(g + at, framed);
                     if (!dshortcut)
                         return c.by_rows([&](int64_t to, int64_t from) { unfinished(n, at + from, s.ow, framed + to); });
                     unfinished(n, at, pixels, dshortcut + at);
                     c.frame(dshortcut + at, framed);
                 },
                 [&](int64_t n, T* image) {
                     if (dots) dots[n] = product(image, x + n * c.outputs, c.outputs);
                 });
    });
}

// How many samples chose an expert that there is not.
int64_t wrong_choices(const Shape& s, const int64_t* choice) {
    return std::count_if(choice, choice + s.n, [&](int64_t e) { return e < 0 || e >= s.experts; });
}

template <class T>
void layer(const Router& r, const float* pooled, const Shape& s, const T* x, const T* filters, const float* bias,
           const Finish& finish, T* y, float* scores, int64_t* choice, int threads) {
    const std::vector<float> scale = r.scale();
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> normed(r.channels), hidden(r.hidden);
#pragma omp for schedule(static)
        for (int64_t n = 0; n < s.n; ++n) {
            float* each = scores + n * r.experts;
            score_sample(r, scale.data(), pooled + n * r.channels, normed.data(), hidden.data(), each);
            choice[n] = largest(each, r.experts);
        }
    }
    convolve_all(s, x, choice, filters, bias, finish, y, threads);
}

}  // namespace

extern "C" {

// Changes with the functions below, so that nothing calls what an older file holds.
int advmoe_kernels() { return 3; }

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
// used twice (branch may be null), and of `pooled`, if that is unfinish.
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
// into `dshortcut`, which may be null.
void advmoe_unnorm_fp32(const Places* places, const Size* size, const float* const* y, const float* x, const float* g,
                        const float* branch, const float* pooled, const float* weight, double eps, const double* mean,
                        const double* variance, float* dshortcut, float* const* dy, float* weight_gradient,
                        float* bias_gradient, int threads) {
    unnorm(*places, *size, y, x, g, branch, pooled, weight, eps, mean, variance, dshortcut, dy, weight_gradient,
           bias_gradient, threads);
}
void advmoe_unnorm_bf16(const Places* places, const Size* size, const Half* const* y, const Half* x, const Half* g,
                        const Half* branch, const float* pooled, const float* weight, double eps, const double* mean,
                        const double* variance, Half* dshortcut, Half* const* dy, float* weight_gradient,
                        float* bias_gradient, int threads) {
    unnorm(*places, *size, y, x, g, branch, pooled, weight, eps, mean, variance, dshortcut, dy, weight_gradient,
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

// y = the sum over experts of weights (n, experts) times what each made, `every` (n, pixels, experts, channels).
void advmoe_mix_fp32(const float* every, const float* weights, int64_t n, int64_t experts, const Size* size, float* y,
                     int threads) {
    mix(every, weights, n, experts, *size, y, threads);
}
void advmoe_mix_bf16(const Half* every, const float* weights, int64_t n, int64_t experts, const Size* size, Half* y,
                     int threads) {
    mix(every, weights, n, experts, *size, y, threads);
}

// The gradients of the above for `every` and the weights, by that of y.
void advmoe_unmix_fp32(const float* g, const float* every, const float* weights, int64_t n, int64_t experts,
                       const Size* size, float* dx, float* weight_gradient, int threads) {
    unmix(g, every, weights, n, experts, *size, dx, weight_gradient, threads);
}
void advmoe_unmix_bf16(const Half* g, const Half* every, const float* weights, int64_t n, int64_t experts,
                       const Size* size, Half* dx, float* weight_gradient, int threads) {
    unmix(g, every, weights, n, experts, *size, dx, weight_gradient, threads);
}

// Scores (n, experts) of pooled features (n, channels): a batch norm in eval mode, a linear layer, ReLU, whose result
// (n, hidden) is put out, and a linear layer.
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

// Whether bf16 convolutions may be called for: this CPU has tiles, and the system lets a program use them, which asks here.
int advmoe_tiles() {
#if defined(ADVMOE_TILES)
    return tiles_allowed();
#else
    return 0;
#endif
}

// bf16 filters (E, c_out, kh, kw, c_in) as tiles read them, ahead or `backward`, put into `out`, if that is given; the
// numbers that they take.
int64_t advmoe_pack_bf16(const Shape* shape, int backward, const Half* filters, Half* out, int threads) {
    const Shape& s = *shape;
    const Convolution c = backward ? back(s) : ahead(s);
#if defined(ADVMOE_TILES)
    if (out) pack(s, c, backward, filters, out, threads);
#endif
    return s.experts * filters_of(c);
}

// y[n] = x[n] * filters[choice[n]] + bias[choice[n]], and what becomes of that. In fp32 filters are (E, kh, kw, c_in, c_out
// padded to whole vectors of 8) and bias (E, c_out padded) or null; in bf16 filters are packed, and bias is fp32, padded to 32.
// Returns how many samples chose an expert that there is not; then nothing is computed.
int64_t advmoe_convolve_fp32(const Shape* shape, const float* x, const int64_t* choice, const float* filters,
                             const float* bias, const Finish* finish, float* y, int threads) {
    const int64_t wrong = wrong_choices(*shape, choice);
    if (!wrong) convolve_all(*shape, x, choice, filters, bias, *finish, y, threads);
    return wrong;
}
int64_t advmoe_convolve_bf16(const Shape* shape, const Half* x, const int64_t* choice, const Half* filters,
                             const float* bias, const Finish* finish, Half* y, int threads) {
    const int64_t wrong = wrong_choices(*shape, choice);
    if (!wrong) convolve_all(*shape, x, choice, filters, bias, *finish, y, threads);
    return wrong;
}

// A whole layer without gradients: scores of `pooled` features, the choice, and its convolution.
void advmoe_layer_fp32(const Router* router, const float* pooled, const Shape* shape, const float* x,
                       const float* filters, const float* bias, const Finish* finish, float* y, float* scores,
                       int64_t* choice, int threads) {
    layer(*router, pooled, *shape, x, filters, bias, *finish, y, scores, choice, threads);
}
void advmoe_layer_bf16(const Router* router, const float* pooled, const Shape* shape, const Half* x, const Half* filters,
                       const float* bias, const Finish* finish, Half* y, float* scores, int64_t* choice, int threads) {
    layer(*router, pooled, *shape, x, filters, bias, *finish, y, scores, choice, threads);
}

// The gradient for x of a convolution, and, where `dots` is given, its product with x: fp32 filters are (E, kh, kw, c_out,
// c_in padded).
void advmoe_convolve_backward_fp32(const Shape* shape, const float* g, const Unfinish* unfinish, const int64_t* choice,
                                   const float* filters, const float* x, float* dx, float* dots, int threads) {
    convolve_all_backward(*shape, g, *unfinish, choice, filters, x, dx, dots, threads);
}
void advmoe_convolve_backward_bf16(const Shape* shape, const Half* g, const Unfinish* unfinish, const int64_t* choice,
                                   const Half* filters, const Half* x, Half* dx, float* dots, int threads) {
    convolve_all_backward(*shape, g, *unfinish, choice, filters, x, dx, dots, threads);
}

}  // extern "C"
