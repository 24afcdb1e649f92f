// Products of bfloat16 pairs by AMX, the tile instructions of Intel's processors since Sapphire Rapids. There are eight
// tiles, registers of up to 16 rows of 64 bytes; one instruction adds the product of A [rows, 16] and B [16, 16], both
// of Pairs, to C [rows, 16] in float32. A's rows run along k, B is as Right has it.
//
// A block of C is 2 x 2 tiles: every load of A or B serves two products. A, which Left has k-major, is turned into rows
// in each call: once for all its columns, of which the scorers ask for 32 at most, so that they turn A for each panel
// anew. The kernel takes the instructions as a type: AmxTiles runs them; PlainTiles does the same in C++ and refuses
// what a processor refuses, so that tests run the kernel on any processor.
#pragma once
#include <stdexcept>
#include <vector>

#include "operands.h"

namespace itm_fast {

constexpr int SIDE = 16;  // values in a row of a tile, and rows of B
typedef float SumRow __attribute__((vector_size(4 * SIDE)));
struct PairRow {
  alignas(64) Pair at[SIDE];
};

// What LDTILECFG reads: palette 1 has eight tiles, each of so many rows of so many bytes.
struct TileShapes {
  alignas(64) uint8_t palette = 1;
  uint8_t start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {TILE_ROWS, TILE_ROWS, TILE_ROWS, TILE_ROWS, TILE_ROWS, TILE_ROWS, SIDE, SIDE};
};
static_assert(sizeof(TileShapes) == 64);

#if defined(__AMX_BF16__)
// The instructions, as assembly, since GCC's intrinsics take tile numbers as text. The process must have the kernel's
// permission (itm_fast/_native/amx.py).
class AmxTiles {
 public:
  // This thread's tiles, configured until release(). Every exported function releases them (guarded() of threads.h):
  // torch's own kernels find the state they expect, and the core may sleep.
  static AmxTiles ready() {
    if (!configured) {
      static constexpr TileShapes shapes;
      asm volatile("ldtilecfg %0" ::"m"(shapes));
      configured = true;
    }
    return {};
  }
  static void release() {
    if (configured) asm volatile("tilerelease");
    configured = false;
  }
  template <int tile>
  void load(const void* rows, int64_t step) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(rows), "r"(step), "i"(tile) : "memory");
  }
  template <int tile>
  void store(void* rows, int64_t step) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(rows), "r"(step), "i"(tile) : "memory");
  }
  template <int c, int a, int b>
  void multiply_add() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(c), "i"(a), "i"(b));
  }

 private:
  static inline thread_local bool configured = false;
};
#endif

// The same in plain C++. A product of one element sums even and odd places of its pairs apart, from zero, and adds both
// to what is there, as the processor does; unlike it, it keeps numbers below the normal ones.
class PlainTiles {
 public:
  explicit PlainTiles(const TileShapes& s) : shape(s) {
    bool right = s.palette == 1 && !s.start_row;
    for (int t = 0; t < 16; ++t)
      right = right && s.rows[t] <= (t < 8 ? 16 : 0) && s.bytes[t] <= 64 && !s.rows[t] == !s.bytes[t] &&
              !(t < 14 && s.reserved[t]);
    if (!right) throw std::invalid_argument("no processor has tiles of these shapes");
  }
  template <int t>
  void load(const void* rows, int64_t step) {
    if (!shape.rows[t]) throw std::invalid_argument("the tile has no shape");
    std::memset(tile[t], 0, sizeof tile[t]);
    for (int r = 0; r < shape.rows[t]; ++r)
      std::memcpy(tile[t][r], static_cast<const char*>(rows) + r * step, shape.bytes[t]);
  }
  template <int t>
  void store(void* rows, int64_t step) {
    if (!shape.rows[t]) throw std::invalid_argument("the tile has no shape");
    for (int r = 0; r < shape.rows[t]; ++r)
      std::memcpy(static_cast<char*>(rows) + r * step, tile[t][r], shape.bytes[t]);
  }
  template <int c, int a, int b>
  void multiply_add() {
    static_assert(c != a && c != b && a != b);
    const uint16_t* bytes = shape.bytes;
    if (!shape.rows[c] || shape.rows[c] != shape.rows[a] || bytes[c] != bytes[b] || bytes[a] != 4 * shape.rows[b] ||
        bytes[c] % 4)
      throw std::invalid_argument("the tiles' shapes do not fit a product");
    for (int m = 0; m < shape.rows[c]; ++m)
      for (int n = 0; n < bytes[c] / 4; ++n) {
        float even = 0, odd = 0, sum;
        for (int k = 0; k < shape.rows[b]; ++k) {
          even += number(tile[a][m][k] << 16) * number(tile[b][k][n] << 16);
          odd += number(tile[a][m][k] & 0xffff0000) * number(tile[b][k][n] & 0xffff0000);
        }
        sum = number(tile[c][m][n]) + (even + odd);
        std::memcpy(&tile[c][m][n], &sum, sizeof sum);
      }
  }

 private:
  static float number(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
  }
  TileShapes shape;
  uint32_t tile[8][16][16] = {};
};

// Turns `height` columns of k-major pairs, a multiple of 4, into rows: out[r][k] = a[k * lda + r], 0 from k = depth on.
inline void turn_pairs(const Pair* a, int64_t lda, int64_t height, int64_t depth, PairRow* out) {
#if defined(__AVX512F__)
  for (int64_t r = 0; r < height && depth == SIDE; r += 4) {
    __m512i v[4];  // v[k] has places 4 x + k of k in its quarter x, four rows each
    const auto four = [&](int k) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(a + k * lda + r)); };
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      v[k] = _mm512_broadcast_i32x4(four(k));
      v[k] = _mm512_mask_broadcast_i32x4(v[k], 0x00f0, four(k + 4));
      v[k] = _mm512_mask_broadcast_i32x4(v[k], 0x0f00, four(k + 8));
      v[k] = _mm512_mask_broadcast_i32x4(v[k], 0xf000, four(k + 12));
    }
    const __m512i low0 = _mm512_unpacklo_epi32(v[0], v[1]), low2 = _mm512_unpacklo_epi32(v[2], v[3]);
    const __m512i high0 = _mm512_unpackhi_epi32(v[0], v[1]), high2 = _mm512_unpackhi_epi32(v[2], v[3]);
    _mm512_store_si512(out + r, _mm512_unpacklo_epi64(low0, low2));
    _mm512_store_si512(out + r + 1, _mm512_unpackhi_epi64(low0, low2));
    _mm512_store_si512(out + r + 2, _mm512_unpacklo_epi64(high0, high2));
    _mm512_store_si512(out + r + 3, _mm512_unpackhi_epi64(high0, high2));
  }
  if (depth == SIDE) return;
#endif
  for (int64_t r = 0; r < height; ++r)
    for (int64_t k = 0; k < SIDE; ++k) out[r].at[k] = k < depth ? a[k * lda + r] : Pair{};
}

// gemm.h's product by tiles. Every element adds up 16 pairs at a time in the order of k, wherever it stands.
template <class Tiles, class Begin, class End>
inline void multiply_by_tiles(Tiles tiles, int64_t M, int64_t N, int64_t K, Left<Pair> a, Right<Pair> b, Begin begin,
                              End end) {
  constexpr int64_t ROW = sizeof(PairRow);
  alignas(64) SumRow c[2][2][TILE_ROWS] = {};
  PairRow last[2 * SIDE];  // B's last rows with zeros below them, where they are no whole tile
  const int64_t steps = (K + SIDE - 1) / SIDE, blocks = (M + 2 * TILE_ROWS - 1) / (2 * TILE_ROWS);
  thread_local std::vector<PairRow> room;
  if (int64_t(room.size()) < 2 * TILE_ROWS * steps) room.resize(size_t(2 * TILE_ROWS * steps));
  PairRow* const rows = room.data();  // [step][2 tiles][TILE_ROWS]
  for (int64_t i = 0; i < M; i += 2 * TILE_ROWS) {
    const bool tall = M - i > TILE_ROWS;
    for (int64_t p = 0; p <= tall; ++p) {
      const int64_t at = i + p * TILE_ROWS, height = least(TILE_ROWS, round_up(M - at, ROW_STEP));
      const int64_t lda = a.ld ? a.ld : height;
      const Pair* const from = a.ld ? a.data + at : a.data + at * K;
      for (int64_t s = 0; s < steps; ++s)
        turn_pairs(from + s * SIDE * lda, lda, height, least(SIDE, K - s * SIDE), rows + (2 * s + p) * TILE_ROWS);
    }
    const int64_t count = least(2 * TILE_ROWS, M - i);
    for (int64_t j = 0; j < N; j += 2 * SIDE) {
      const bool wide = N - j > SIDE;
      for (int64_t r = 0; r < count; ++r)
        for (int v = 0; v <= wide; ++v) c[r / TILE_ROWS][v][r % TILE_ROWS] = begin(i + r, j + v * SIDE);
      tiles.template load<0>(c[0][0], ROW);
      tiles.template load<1>(c[0][1], ROW);
      tiles.template load<2>(c[1][0], ROW);
      tiles.template load<3>(c[1][1], ROW);
      for (int64_t s = 0; s < steps; ++s) {
        const Pair* from = b.data + s * SIDE * b.ld + j;
        int64_t ld = b.ld;
        if (const int64_t left = K - s * SIDE; left < SIDE) {
          std::memset(static_cast<void*>(last), 0, sizeof last);
          for (int64_t k = 0; k < left; ++k)
            std::memcpy(static_cast<void*>(last + 2 * k), from + k * ld, size_t(ROW * (1 + wide)));
          from = last[0].at;
          ld = 2 * SIDE;
        }
        tiles.template load<4>(rows + 2 * s * TILE_ROWS, ROW);
        tiles.template load<6>(from, 4 * ld);
        tiles.template multiply_add<0, 4, 6>();
        if (wide) {
          tiles.template load<7>(from + SIDE, 4 * ld);
          tiles.template multiply_add<1, 4, 7>();
        }
        if (tall) {
          tiles.template load<5>(rows + (2 * s + 1) * TILE_ROWS, ROW);
          tiles.template multiply_add<2, 5, 6>();
          if (wide) tiles.template multiply_add<3, 5, 7>();
        }
        if (b.next)  // this block's share of the next matrix
          for (int64_t k = s * SIDE + i / (2 * TILE_ROWS); k < least(K, (s + 1) * SIDE); k += blocks)
            for (int v = 0; v < 2; ++v) __builtin_prefetch(b.next + k * b.ld + j + v * SIDE, 0, 2);
      }
      tiles.template store<0>(c[0][0], ROW);
      tiles.template store<1>(c[0][1], ROW);
      tiles.template store<2>(c[1][0], ROW);
      tiles.template store<3>(c[1][1], ROW);
      for (int64_t r = 0; r < count; ++r)
        for (int v = 0; v <= wide; ++v) end(i + r, j + v * SIDE, c[r / TILE_ROWS][v][r % TILE_ROWS]);
    }
  }
}

}  // namespace itm_fast
