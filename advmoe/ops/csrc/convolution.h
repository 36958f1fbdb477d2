// Convolutions of which each sample has its own expert, and their gradients.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "vectors.h"

namespace {

struct Shape {
    int64_t n;
    int32_t h, w, c_in, oh, ow, c_out, kh, kw, sh, sw, ph, pw, experts;
};

// Output pixels that lie on a grid, and which inputs each of them sums over.
struct Grid {
    int rows, cols;
    int64_t in_row, in_col;               // from one output pixel's first input to the next one's
    int64_t out_first, out_row, out_col;  // where outputs lie
    std::vector<int64_t> offset;          // of each tap's input from the first, in ascending order
    std::vector<int> weight;              // each tap's index among the filters'
};

// What is done to a sample: it is put into a frame of zeros, of which sums over filters are made. The gradient for the
// input is such a convolution of the output's gradient too, with a grid for each of the pixels that a stride tells apart, of
// which small images may have none.
struct Convolution {
    int rows, cols, c_in, c_out;   // of a sample, and the channels that are made
    int height, width, top, left;  // of the frame, and where the sample lies in it
    int64_t outputs;               // numbers of a sample's output
    int taps;                      // of a filter
    std::vector<Grid> grids;

    int64_t framed() const { return static_cast<int64_t>(height) * width * c_in; }
    int64_t numbers() const { return static_cast<int64_t>(rows) * cols * c_in; }

    // Calls `each` with every row of a sample in the frame, and what it holds in the sample.
    template <class Each>
    void by_rows(const Each& each) const {
        for (int row = 0; row < rows; ++row)
            each(((row + top) * static_cast<int64_t>(width) + left) * c_in, static_cast<int64_t>(row) * cols * c_in);
    }
    template <class T>
    void frame(const T* sample, T* framed) const {
        by_rows([&](int64_t to, int64_t from) { std::memcpy(framed + to, sample + from, sizeof(T) * cols * c_in); });
    }
};

Convolution ahead(const Shape& s) {
    const int width = s.w + 2 * s.pw, height = s.h + 2 * s.ph;
    Grid grid{s.oh, s.ow, static_cast<int64_t>(s.sh) * width * s.c_in, static_cast<int64_t>(s.sw) * s.c_in,
              0, static_cast<int64_t>(s.ow) * s.c_out, s.c_out, {}, {}};
    for (int ky = 0; ky < s.kh; ++ky)
        for (int kx = 0; kx < s.kw; ++kx) {
            grid.offset.push_back((static_cast<int64_t>(ky) * width + kx) * s.c_in);
            grid.weight.push_back(ky * s.kw + kx);
        }
    return {s.h, s.w, s.c_in, s.c_out, height, width, s.ph, s.pw,
            static_cast<int64_t>(s.oh) * s.ow * s.c_out, s.kh * s.kw, {grid}};
}

int floor_divide(int a, int b) { return a >= 0 ? a / b : -((b - 1 - a) / b); }

Convolution back(const Shape& s) {
    // Rows and columns of zeros around the gradient that a pixel at the edge may look at.
    const int top = -std::min(0, floor_divide(s.ph - s.kh + 1, s.sh)), left = -std::min(0, floor_divide(s.pw - s.kw + 1, s.sw));
    const int bottom = std::max(0, (s.h - 1 + s.ph) / s.sh - s.oh + 1), right = std::max(0, (s.w - 1 + s.pw) / s.sw - s.ow + 1);
    Convolution result{s.oh, s.ow, s.c_out, s.c_in, s.oh + top + bottom, s.ow + left + right, top, left,
                       static_cast<int64_t>(s.h) * s.w * s.c_in, s.kh * s.kw, {}};
    const int64_t width = result.width;
    for (int py = 0; py < s.sh; ++py)
        for (int px = 0; px < s.sw; ++px) {
            Grid grid{(s.h - py + s.sh - 1) / s.sh, (s.w - px + s.sw - 1) / s.sw, width * s.c_out, s.c_out,
                      (static_cast<int64_t>(py) * s.w + px) * s.c_in, static_cast<int64_t>(s.sh) * s.w * s.c_in,
                      static_cast<int64_t>(s.sw) * s.c_in, {}, {}};
            for (int ky = s.kh - 1; ky >= 0; --ky)
                for (int kx = s.kw - 1; kx >= 0; --kx) {
                    const int y = py + s.ph - ky, x = px + s.pw - kx, row = floor_divide(y, s.sh), col = floor_divide(x, s.sw);
                    if (row * s.sh != y || col * s.sw != x) continue;
                    grid.offset.push_back(((row + top) * width + col + left) * s.c_out);
                    grid.weight.push_back(ky * s.kw + kx);
                }
            result.grids.push_back(grid);
        }
    return result;
}

// Samples of one expert.
struct Group {
    int64_t expert, count;
    const int64_t* samples;
};

// Groups of at most `most` samples of one expert, and the order that they point into.
struct Groups {
    std::vector<int64_t> order;
    std::vector<Group> each;

    Groups(const int64_t* choice, int64_t n, int64_t experts, int64_t most) {
        order.reserve(n);
        std::vector<int64_t> first{0};
        for (int64_t e = 0; e < experts; ++e) {
            for (int64_t i = 0; i < n; ++i)
                if (choice[i] == e) order.push_back(i);
            first.push_back(order.size());
        }
        for (int64_t e = 0; e < experts; ++e)
            for (int64_t i = first[e]; i < first[e + 1]; i += most)
                each.push_back({e, std::min(most, first[e + 1] - i), order.data() + i});
    }
};

// Memory of a thread's own that begins where a cache line does, zeros at first.
template <class T>
struct Room {
    std::vector<unsigned char> bytes;
    T* begin;

    explicit Room(size_t numbers) : bytes(numbers * sizeof(T) + 64, 0) {
        begin = reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(bytes.data()) + 63) & ~uintptr_t{63});
    }
};

// Convolves all samples, each by the filters of its expert: `fill` puts a sample into its frame, `Units` (below, and in
// tiles.h) make sums of it, `done` has the sample's result.
template <class Units, class T, class Fill, class Done>
void convolve(const Convolution& c, const Units& units, const int64_t* choice, int64_t n, int64_t experts, T* out,
              int threads, const Fill& fill, const Done& done) {
    const Groups groups(choice, n, experts, units.together());
#pragma omp parallel num_threads(threads)
    {
        Room<T> frames(c.framed() * units.together() + units.beyond());
        typename Units::Own own(units);
        std::vector<T*> to(units.together());
#pragma omp for schedule(static)
        for (size_t g = 0; g < groups.each.size(); ++g) {
            const Group& group = groups.each[g];
            for (int64_t i = 0; i < group.count; ++i) {
                fill(group.samples[i], frames.begin + i * c.framed());
                to[i] = out + group.samples[i] * c.outputs;
            }
            units.run(own, frames.begin, group.expert, group.count, to.data());
            for (int64_t i = 0; i < group.count; ++i) done(group.samples[i], to[i]);
        }
    }
}

// B x L output channels of T pixels: a register each. Pixels beyond the last are computed again and not stored.
template <int L, int B, int T>
void vector_tile(const Grid& grid, const float* in, const float* filters, const float* bias, int c_in, int c_out_padded,
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
            const V value = sum[t][b];
            const int left = c_out - b * L;
            if (left >= L)
                *reinterpret_cast<V*>(to[t] + b * L) = value;
            else if (left > 0)
                std::memcpy(to[t] + b * L, &value, left * sizeof(float));
        }
}

// Of fp32 numbers: filters (E, taps, c_in, c_out padded to whole vectors of 8), bias (E, c_out padded) or null.
struct VectorUnits {
    struct Own {
        explicit Own(const VectorUnits&) {}
    };
    const Convolution& c;
    const float *filters, *bias;
    int padded;

    VectorUnits(const Convolution& convolution, const float* f, const float* b)
        : c(convolution), filters(f), bias(b), padded((c.c_out + 7) / 8 * 8) {}

    int64_t together() const { return 1; }
    int64_t beyond() const { return 0; }

    void run(Own&, const float* framed, int64_t expert, int64_t, float* const* out) const {
        const float* of_expert = filters + expert * c.taps * c.c_in * padded;
        const float* shifts = bias ? bias + expert * padded : nullptr;
        for (const Grid& grid : c.grids)
            for (int first = 0; first < padded;) {
                const int wide = padded - first;
                const float* shift = shifts ? shifts + first : nullptr;
                if (wide >= 2 * kLanes)
                    first += pixels<kLanes, 2>(grid, framed, of_expert, shift, first, *out);
                else if (wide >= kLanes)
                    first += pixels<kLanes, 1>(grid, framed, of_expert, shift, first, *out);
                else
                    first += pixels<8, 1>(grid, framed, of_expert, shift, first, *out);
            }
    }

   private:
    template <int L, int B>
    int pixels(const Grid& grid, const float* in, const float* of_expert, const float* shift, int first, float* out) const {
        constexpr int kPixels = 8;
        for (int pixel = 0; pixel < grid.rows * grid.cols; pixel += kPixels)
            vector_tile<L, B, kPixels>(grid, in, of_expert + first, shift, c.c_in, padded, c.c_out - first, pixel, out + first);
        return L * B;
    }
};

}  // namespace
