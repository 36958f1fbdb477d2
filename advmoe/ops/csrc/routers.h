// Routers in eval mode, and the probabilities of their choices.

#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "vectors.h"

namespace {

struct Router {
    int64_t channels, hidden, experts;
    const float *mean, *variance, *norm_weight, *norm_bias;  // (channels,)
    const float *weight, *bias;                              // (hidden, channels), (hidden,)
    const float *last_weight, *last_bias;                    // (experts, hidden), (experts,)
    double eps;

    std::vector<float> scale() const {
        std::vector<float> factor(channels);
        for (int64_t c = 0; c < channels; ++c)
            factor[c] = static_cast<float>(norm_weight[c] / std::sqrt(variance[c] + eps));
        return factor;
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

}  // namespace
