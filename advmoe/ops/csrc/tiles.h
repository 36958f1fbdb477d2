// Convolutions of bf16 numbers by the tiles (AMX) of CPUs that have them.
//
// Filters lie as these read them: for each grid of a convolution and each 16 output channels, blocks of 32 numbers that a
// sum runs over; a block holds 16 pairs of these, a pair for each of the channels.

#pragma once

#include <utility>

#include "convolution.h"

#if ((defined(__AMX_TILE__) && defined(__AMX_BF16__)) || (defined(__AMXTILE__) && defined(__AMXBF16__))) && \
    defined(__AVX512BF16__) && defined(__AVX512BW__)
#define ADVMOE_TILES
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

constexpr int kChannels = 16, kDepth = 32, kBlock = kChannels * kDepth, kRows = 32;

// 32 numbers of each 16 pixels' inputs, for pixels that lie evenly apart, and where results go.
struct TiledGrid {
    bool straight;              // whether inputs are read where they lie, not gathered first
    int positions;              // pixels that are computed for a sample, some of them for nothing
    std::vector<int64_t> base;  // of each 16 of them: the first one's input in the frame
    int64_t apart;              // from one's input to the next one's
    std::vector<int64_t> at;    // each block's place in the input
    std::vector<int64_t> to;    // of each position: its place in the result, or -1
    int64_t filters;            // where its filters begin
};

int64_t rounded_up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

// Filters of a grid with `taps`: how many blocks there are for 16 channels, and numbers for all.
int64_t blocks_of(const Convolution& c, size_t taps) { return rounded_up(taps * c.c_in, kDepth) / kDepth; }
int64_t columns_of(const Convolution& c) { return rounded_up(c.c_out, kChannels) / kChannels; }
int64_t filters_of(const Convolution& c) {
    int64_t sum = 0;
    for (const Grid& grid : c.grids) sum += blocks_of(c, grid.offset.size()) * columns_of(c) * kBlock;
    return sum;
}

#if defined(ADVMOE_TILES)

TiledGrid tiled(const Convolution& c, const Grid& grid, int64_t filters) {
    TiledGrid result{};
    const int pixels = grid.rows * grid.cols;
    const auto place = [&](int row, int col) { return grid.out_first + row * grid.out_row + col * grid.out_col; };
    result.filters = filters;
    result.apart = grid.in_col;
    const bool whole_blocks = c.c_in % kDepth == 0 && !grid.offset.empty() && pixels > 0;
    // From the first pixel of a row on, the frame's pixels may be gone through as if they were one row.
    const int pitch = static_cast<int>(grid.in_row / grid.in_col), through = (grid.rows - 1) * pitch + grid.cols;
    if (whole_blocks && grid.cols % kChannels == 0) {
        result.straight = true;
        for (int row = 0; row < grid.rows; ++row)
            for (int col = 0; col < grid.cols; ++col) {
                if (col % kChannels == 0) result.base.push_back(row * grid.in_row + col * grid.in_col);
                result.to.push_back(place(row, col));
            }
    } else if (whole_blocks && grid.in_row % grid.in_col == 0 && 10 * pixels >= 7 * rounded_up(through, kChannels)) {
        result.straight = true;
        for (int p = 0; p < rounded_up(through, kChannels); ++p) {
            if (p % kChannels == 0) result.base.push_back(p * grid.in_col);
            result.to.push_back(p < through && p % pitch < grid.cols ? place(p / pitch, p % pitch) : -1);
        }
    } else {
        for (int row = 0; row < grid.rows; ++row)
            for (int col = 0; col < grid.cols; ++col) {
                result.base.push_back(row * grid.in_row + col * grid.in_col);
                result.to.push_back(place(row, col));
            }
    }
    result.positions = static_cast<int>(result.to.size());
    if (result.straight)
        for (const int64_t offset : grid.offset)
            for (int channel = 0; channel < c.c_in; channel += kDepth) result.at.push_back(offset + channel);
    else
        for (int64_t block = 0; block < blocks_of(c, grid.offset.size()); ++block) result.at.push_back(block * kDepth);
    return result;
}

// The filters (c_out, kh, kw, c_in) of each expert as the units read them.
void pack(const Shape& s, const Convolution& c, bool backward, const Half* filters, Half* out, int threads) {
    const int64_t columns = columns_of(c), size = static_cast<int64_t>(s.c_out) * c.taps * s.c_in;
    // From one input of the convolution to the next, and from one output.
    const int64_t in = backward ? static_cast<int64_t>(c.taps) * s.c_in : 1;
    const int64_t across = backward ? 1 : static_cast<int64_t>(c.taps) * s.c_in;
    const int64_t of_expert = filters_of(c);
#pragma omp parallel for collapse(2) schedule(static) num_threads(threads)
    for (int64_t e = 0; e < s.experts; ++e)
        for (int64_t column = 0; column < columns; ++column) {
            int64_t begin = 0;
            for (const Grid& grid : c.grids) {
                const int64_t sums = grid.offset.size() * c.c_in, blocks = blocks_of(c, grid.offset.size());
                Half* to = out + e * of_expert + begin + column * blocks * kBlock;
                const int channels = static_cast<int>(std::min<int64_t>(kChannels, c.c_out - column * kChannels));
                std::memset(to, 0, blocks * kBlock * sizeof(Half));
                const auto source = [&](int64_t sum) {
                    const int64_t tap = grid.weight[sum / c.c_in], channel = sum % c.c_in;
                    return filters + e * size + tap * s.c_in + channel * in + column * kChannels * across;
                };
                for (int64_t sum = 0; sum < sums; sum += 2) {
                    Half* pair = to + sum / 2 * 2 * kChannels;
                    const Half* first = source(sum);
                    const Half* second = sum + 1 < sums ? source(sum + 1) : nullptr;
                    if (second == first + 1)
                        for (int k = 0; k < channels; ++k) std::memcpy(pair + 2 * k, first + k * across, 2 * sizeof(Half));
                    else
                        for (int k = 0; k < channels; ++k) {
                            pair[2 * k] = first[k * across];
                            if (second) pair[2 * k + 1] = second[k * across];
                        }
                }
                begin += blocks * columns * kBlock;
            }
        }
}

// Sums for 32 pixels and 32 channels: `a` holds 16 pixels' inputs each, `apart` from one another, of which the second may be
// null, and the filters of 16 channels each.
struct Operands {
    const Half *a[2], *filters[2];
    int64_t apart;
    const int64_t* at;
    int64_t blocks;
};

struct alignas(64) TileShapes {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Compilers do not know what the instructions for tiles read.
inline void all_written() { asm volatile("" ::: "memory"); }

struct Tiles {
    Tiles() {
        const TileShapes shapes;
        all_written();
        _tile_loadconfig(&shapes);
    }
    ~Tiles() { _tile_release(); }

    void sums(const Operands& o, float* out) const {
        const int64_t apart = o.apart * sizeof(Half);
        constexpr int kApart = 2 * kChannels * sizeof(float);
        all_written();
        _tile_zero(0);
        _tile_zero(1);
        if (!o.a[1]) {
            for (int64_t i = 0; i < o.blocks; ++i) {
                _tile_loadd(4, o.a[0] + o.at[i], apart);
                _tile_loadd(6, o.filters[0] + i * kBlock, 64);
                _tile_loadd(7, o.filters[1] + i * kBlock, 64);
                _tile_dpbf16ps(0, 4, 6);
                _tile_dpbf16ps(1, 4, 7);
            }
            _tile_stored(0, out, kApart);
            _tile_stored(1, out + kChannels, kApart);
            return;
        }
        _tile_zero(2);
        _tile_zero(3);
        for (int64_t i = 0; i < o.blocks; ++i) {
            _tile_loadd(4, o.a[0] + o.at[i], apart);
            _tile_loadd(6, o.filters[0] + i * kBlock, 64);
            _tile_loadd(5, o.a[1] + o.at[i], apart);
            _tile_loadd(7, o.filters[1] + i * kBlock, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(3, 5, 7);
        }
        _tile_stored(0, out, kApart);
        _tile_stored(1, out + kChannels, kApart);
        _tile_stored(2, out + kRows * kChannels, kApart);
        _tile_stored(3, out + kRows * kChannels + kChannels, kApart);
    }
};

// Programs must ask before they may use tiles.
bool tiles_allowed() {
    constexpr long kAsk = 0x1023, kTileData = 18;
    return syscall(SYS_arch_prctl, kAsk, kTileData) == 0;
}

// Of bf16 numbers: filters as `pack` writes them, fp32 bias (E, c_out padded to 32) or null.
struct TileUnits {
    const Convolution& c;
    const Half* filters;
    const float* bias;
    std::vector<TiledGrid> grids;
    int64_t columns, of_expert, most = 1, panel = 0;

    struct Own {
        Tiles tiles;
        Room<Half> panel;
        Room<float> results;
        explicit Own(const TileUnits& units) : tiles(), panel(units.panel), results(kRows * 2 * kChannels) {}
    };

    TileUnits(const Convolution& convolution, const Half* f, const float* b)
        : c(convolution), filters(f), bias(b), columns(columns_of(c)), of_expert(filters_of(c)) {
        int64_t begin = 0;
        for (const Grid& grid : c.grids) {
            grids.push_back(tiled(c, grid, begin));
            const int64_t blocks = blocks_of(c, grid.offset.size());
            begin += blocks * columns * kBlock;
            if (grids.back().straight || !grids.back().positions) continue;
            panel = std::max(panel, kPanel * blocks * kDepth);
            most = std::max<int64_t>(most, kPanel / grids.back().positions);
        }
    }

    int64_t together() const { return most; }
    // Pixels of no meaning are read behind the last frame.
    int64_t beyond() const {
        int64_t most_apart = 0;
        for (const TiledGrid& grid : grids)
            if (grid.straight) most_apart = std::max(most_apart, grid.apart);
        return kChannels * most_apart;
    }

    void run(Own& own, const Half* framed, int64_t expert, int64_t count, Half* const* out) const {
        const Half* of_this = filters + expert * of_expert;
        const float* shift = bias ? bias + expert * rounded_up(c.c_out, 2 * kChannels) : nullptr;
        for (size_t g = 0; g < grids.size(); ++g) {
            if (grids[g].straight)
                for (int64_t i = 0; i < count; ++i)
                    straight(own, grids[g], framed + i * c.framed(), of_this + grids[g].filters, shift, out[i]);
            else
                gathered(own, grids[g], c.grids[g], framed, of_this + grids[g].filters, shift, count, out);
        }
    }

   private:
    static constexpr int kPanel = 64;

    void straight(Own& own, const TiledGrid& t, const Half* framed, const Half* f, const float* shift, Half* out) const {
        Half* to[kRows];
        for (int first = 0; first < t.positions; first += kRows) {
            for (int r = 0; r < kRows; ++r)
                to[r] = first + r < t.positions && t.to[first + r] >= 0 ? out + t.to[first + r] : nullptr;
            const Half* a = framed + t.base[first / kChannels];
            const size_t next = first / kChannels + 1;
            channels(own, t, {a, next < t.base.size() ? framed + t.base[next] : nullptr}, t.apart, f, shift, to);
        }
    }

    void gathered(Own& own, const TiledGrid& t, const Grid& grid, const Half* framed, const Half* f, const float* shift,
                  int64_t count, Half* const* out) const {
        const int64_t rows = count * t.positions, wide = t.at.size() * kDepth;
        Half* to[kPanel];
        for (int64_t first = 0; first < rows; first += kPanel) {
            const int64_t here = std::min<int64_t>(kPanel, rows - first);
            for (int64_t r = 0; r < kPanel; ++r) {
                to[r] = nullptr;
                if (r >= here) continue;
                const int64_t sample = (first + r) / t.positions, position = (first + r) % t.positions;
                to[r] = out[sample] + t.to[position];
                gather(grid, framed + sample * c.framed() + t.base[position], own.panel.begin + r * wide, wide);
            }
            for (int64_t r = 0; r < here; r += kRows) {
                const Half* a = own.panel.begin + r * wide;
                channels(own, t, {a, r + kChannels < here ? a + kChannels * wide : nullptr}, wide, f, shift, to + r);
            }
        }
    }

    // A pixel's inputs side by side, and zeros up to `wide` of them.
    void gather(const Grid& grid, const Half* from, Half* to, int64_t wide) const {
        Half* const end_of_row = to + wide;
        for (size_t tap = 0; tap < grid.offset.size();) {
            size_t end = tap + 1;
            while (end < grid.offset.size() && grid.offset[end] == grid.offset[end - 1] + c.c_in) ++end;
            const Half* run = from + grid.offset[tap];
            const int64_t numbers = (end - tap) * c.c_in;
            int64_t i = 0;
            for (; i + kDepth <= numbers; i += kDepth) std::memcpy(to + i, run + i, kDepth * sizeof(Half));
            for (; i < numbers; ++i) to[i] = run[i];
            to += numbers;
            tap = end;
        }
        std::fill(to, end_of_row, Half{0});
    }

    // All output channels of 32 pixels.
    void channels(Own& own, const TiledGrid& t, std::pair<const Half*, const Half*> a, int64_t apart, const Half* f,
                  const float* shift, Half* const* to) const {
        const int64_t blocks = t.at.size(), column = blocks * kBlock;
        for (int64_t i = 0; i < columns; i += 2) {
            const Half* other = i + 1 < columns ? f + (i + 1) * column : f + i * column;
            own.tiles.sums({{a.first, a.second}, {f + i * column, other}, apart, t.at.data(), blocks}, own.results.begin);
            const int64_t left = c.c_out - i * kChannels;
            const __mmask32 there = left >= 2 * kChannels ? ~__mmask32{0} : (__mmask32{1} << left) - 1;
            const __m512 low = shift ? _mm512_loadu_ps(shift + i * kChannels) : _mm512_setzero_ps();
            const __m512 high = shift ? _mm512_loadu_ps(shift + (i + 1) * kChannels) : _mm512_setzero_ps();
            for (int r = 0; r < kRows; ++r) {
                if (!to[r]) continue;
                const float* row = own.results.begin + r * 2 * kChannels;
                const __m512bh both = _mm512_cvtne2ps_pbh(_mm512_add_ps(_mm512_load_ps(row + kChannels), high),
                                                          _mm512_add_ps(_mm512_load_ps(row), low));
                _mm512_mask_storeu_epi16(to[r] + i * kChannels, there, (__m512i)both);
            }
        }
    }
};

#endif

}  // namespace
