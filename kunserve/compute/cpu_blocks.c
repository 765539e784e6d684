/* Matrices in blocks of codes: how 32 weights of a row are decoded, and the products with such a matrix. Included by
 * cpu_kernels.c.
 *
 * A weight is fma(code, scale, offset), or a small float times its scale: the same float that whoever dequantizes the file
 * would store, because a code times its scale is exact in float32. It is added as `linear` adds, in the same order, so that a product with blocks is
 * bitwise the product with the dequantized matrix, whatever else is in the batch. Layouts are ggml's (ggml-common.h).
 */
#define GROUP 32          /* weights that are decoded at once */
#define GV (GROUP / VL)   /* vectors of them */
#define AHEAD_BYTES (8 << 10) /* of codes, from what is decoded to what is fetched */
#define FEW 2             /* up to so many rows of x, weights are decoded into registers, once for all rows */

typedef struct { vf w[GV]; } Group; /* 32 weights, in the order of their columns */
#if VL == 16
#define NUMBERED ((vi){0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}) /* lanes */
#elif VL == 8
#define NUMBERED ((vi){0, 1, 2, 3, 4, 5, 6, 7})
#else
#define NUMBERED ((vi){0, 1, 2, 3})
#endif

enum {
  F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q4_K, Q5_K, Q6_K, MXFP4,
  A4_128, A4_64, A4_32, A8_128, A8_64, A8_32, F8_128, F8_64, F8_32, /* ours: kunserve/model/quant/blocks.py */
  NUM_FORMATS
}; /* the order of BLOCKS there */

INLINE vi splat_int(int32_t a) { return a - (vi){0}; }
/* The four halves at p, by way of memory: from there they are spread over a vector by the load alone, while the one port
 * that spreads registers is what decoding waits for. */
typedef struct { float f[4]; } Halves;
INLINE Halves read_halves(const uint8_t *p) {
  Halves h;
#if defined(__F16C__)
  __m128 v;
  __asm__("vcvtph2ps %1, %0" : "=x"(v) : "m"(*(const char(*)[8])p)); /* gcc 12 would load by itself, for one more */
  _mm_storeu_ps(h.f, v);
  __asm__("" : "+m"(h));
#else
  for (int i = 0; i < 4; i++) h.f[i] = half(p + 2 * i);
#endif
  return h;
}
INLINE vf affine(vi code, vf scale, vf offset) { return fma_(__builtin_convertvector(code, vf), scale, offset); }

/* Codes of 4 and of 5 bits, of which only the lowest bits count. `sixteen` are the weights of codes `first` to `first` + 15
 * where a vector has room. `turned` moves bit 4 - left of each lane to bit 4 (left is at most 4), with those above it;
 * `mixed` has the bits of `mask` from `high` and the others from `low`. Shifts are by vectors: by a number they cost two
 * steps. The high nibble of a byte has nothing above it. */
#if VL == 16
INLINE vf sixteen(int first, vf scale, vf offset) { return affine(NUMBERED + first, scale, offset); }
INLINE vf of_nibble(vi code, vf table, vf scale, vf offset) {
  return (vf)_mm512_permutexvar_ps((__m512i)code, (__m512)table);
}
INLINE vf of_high_nibble(vi q, vf table, vf scale, vf offset) { return of_nibble(q >> 4, table, scale, offset); }
INLINE vf of_five(vi code, vf table, vf table16, vf scale, vf offset) {
  return (vf)_mm512_permutex2var_ps((__m512)table, (__m512i)code, (__m512)table16);
}
INLINE vi turned(vi q, vi left) { return (vi)_mm512_rolv_epi32((__m512i)q, (__m512i)left); }
INLINE vi mixed(int mask, vi high, vi low) {
  return (vi)_mm512_ternarylogic_epi32(_mm512_set1_epi32(mask), (__m512i)high, (__m512i)low, 0xca);
}
#else
INLINE vf sixteen(int first, vf scale, vf offset) { return scale; }
INLINE vf of_nibble(vi code, vf table, vf scale, vf offset) { return affine(code & 15, scale, offset); }
INLINE vf of_high_nibble(vi q, vf table, vf scale, vf offset) { return affine(q >> 4, scale, offset); }
INLINE vf of_five(vi code, vf table, vf table16, vf scale, vf offset) { return affine(code & 31, scale, offset); }
INLINE vi turned(vi q, vi left) { return q >> (4 - left) << 4; }
INLINE vi mixed(int mask, vi high, vi low) { return (high & mask) | (low & ~mask); }
#endif

/* Codes of 32 weights in 16 bytes: the first 16 are the low halves. */
INLINE Group halves4(const uint8_t *codes, vf s, vf o) {
  const vf table = sixteen(0, s, o);
  Group g;
  UNROLL for (int v = 0; v < GV / 2; v++) {
    vi q = bytes(codes + v * VL);
    g.w[v] = of_nibble(q, table, s, o);
    g.w[GV / 2 + v] = of_high_nibble(q, table, s, o);
  }
  return g;
}

INLINE Group halves5(const uint8_t *codes, const uint8_t *high, vf s, vf o) {
  uint32_t bits;
  memcpy(&bits, high, 4);
  const vf table = sixteen(0, s, o), table16 = sixteen(16, s, o);
  const vi all = splat_int((int32_t)bits);
  Group g;
  UNROLL for (int v = 0; v < GV / 2; v++) {
    vi q = bytes(codes + v * VL);
    g.w[v] = of_five(mixed(16, turned(all, 4 - v * VL - NUMBERED), q), table, table16, s, o);
    g.w[GV / 2 + v] = of_five(mixed(16, turned(all, -12 - v * VL - NUMBERED), q >> 4), table, table16, s, o);
  }
  return g;
}

/* What the 16 bytes at p stand for, by what the first 8 and the others are taken: 16 floats. */
INLINE void spread_scales(vi (*widened)(const uint8_t *), const uint8_t *p, float first, float others, float *out) {
  UNROLL for (int i = 0; i < 16; i += VL) {
    const vf by = select_(NUMBERED + i < splat_int(8), splat(first), splat(others));
    store(out + i, __builtin_convertvector(widened(p + i), vf) * by);
  }
}

/* Of a block of Q4_K or Q5_K: the scales of its 8 groups, then their offsets; each is 6 bits times a half. */
INLINE void scales_of_k(const uint8_t *block, float *out) {
  const uint32_t six = 0x3f3f3f3f, four = 0x0f0f0f0f, two = 0x03030303;
  uint32_t q[3];
  memcpy(q, block + 4, 12);
  const uint32_t codes[] = {q[0] & six, (q[2] & four) | (q[0] >> 6 & two) << 4,
                            q[1] & six, (q[2] >> 4 & four) | (q[1] >> 6 & two) << 4};
  spread_scales(bytes, (const uint8_t *)codes, half(block), -half(block + 2), out);
}

/* Of a block of Q6_K: a scale for each 16 weights. */
INLINE void scales_of_q6_k(const uint8_t *block, float *out) {
  const float d = half(block + 208);
  spread_scales(signed_bytes, block + 192, d, d, out);
}

INLINE Group group_of_q4_k(const uint8_t *block, int64_t i, const float *scales) {
  const vf s = splat(scales[i]), o = splat(scales[8 + i]), table = sixteen(0, s, o);
  const uint8_t *codes = block + 16 + 32 * (i >> 1);
  const vi shift = splat_int(4 * (i & 1));
  Group g;
  UNROLL for (int v = 0; v < GV; v++) g.w[v] = of_nibble(bytes(codes + v * VL) >> shift, table, s, o);
  return g;
}

INLINE Group group_of_q5_k(const uint8_t *block, int64_t i, const float *scales) {
  const vf s = splat(scales[i]), o = splat(scales[8 + i]), table = sixteen(0, s, o), table16 = sixteen(16, s, o);
  const uint8_t *high = block + 16, *codes = block + 48 + 32 * (i >> 1);
  const vi shift = splat_int(4 * (i & 1)), left = splat_int(4 - i);
  Group g;
  UNROLL for (int v = 0; v < GV; v++) {
    vi q = mixed(16, turned(bytes(high + v * VL), left), bytes(codes + v * VL) >> shift);
    g.w[v] = of_five(q, table, table16, s, o);
  }
  return g;
}

INLINE Group group_of_q6_k(const uint8_t *block, int64_t i, const float *scales) {
  const int64_t part = i >> 2, j = i & 3; /* of 128 weights; of 32 in it */
  const uint8_t *low = block + 64 * part + 32 * (j & 1), *high = block + 128 + 32 * part;
  const vi shift = splat_int(4 * (j >> 1)), left = splat_int(4 - 2 * j);
  Group g;
  UNROLL for (int v = 0; v < GV; v++) {
    vi q = mixed(48, turned(bytes(high + v * VL), left), bytes(low + v * VL) >> shift) & 63;
    g.w[v] = __builtin_convertvector(q - 32, vf) * scales[2 * i + v * VL / 16];
  }
  return g;
}

INLINE Group group_of_numbers(const int is_bfloat, const uint8_t *p) {
  Group g;
  UNROLL for (int v = 0; v < GV; v++)
    g.w[v] = is_bfloat ? (vf)(pairs(p + 2 * VL * v) << 16) : halves(p + 2 * VL * v);
  return g;
}

INLINE float number(const uint8_t *p) {
  float f;
  memcpy(&f, p, 4);
  return f;
}

/* Blocks of ours: `per` groups in each. */
INLINE Group group_of_a4(const uint8_t *row, int64_t g, const int per) {
  const uint8_t *b = row + (8 + 16 * per) * (g / per);
  return halves4(b + 8 + 16 * (g % per), splat(number(b)), splat(number(b + 4)));
}

INLINE Group group_of_a8(const uint8_t *row, int64_t g, const int per) {
  const uint8_t *b = row + (8 + 32 * per) * (g / per), *codes = b + 8 + 32 * (g % per);
  const vf s = splat(number(b)), o = splat(number(b + 4));
  Group r;
  UNROLL for (int v = 0; v < GV; v++) r.w[v] = affine(bytes(codes + v * VL), s, o);
  return r;
}

/* A float of 8 bits (e4m3) is one of 16 but for where its exponent begins: shifted, it is 2**-8 of its value. */
INLINE vf of_f8(const uint8_t *codes) {
  const vi q = bytes(codes), h = (q & 0x80) << 8 | (q & 0x7f) << 7;
#if VL == 16
  const vf f = (vf)_mm512_cvtph_ps(_mm512_cvtepi32_epi16((__m512i)h));
#else
  uint16_t halves_[VL];
  for (int l = 0; l < VL; l++) halves_[l] = (uint16_t)h[l];
  const vf f = halves((const uint8_t *)halves_);
#endif
  return f * 256.0f;
}

INLINE Group group_of_f8(const uint8_t *row, int64_t g, const int per) {
  const uint8_t *b = row + (4 + 32 * per) * (g / per), *codes = b + 4 + 32 * (g % per);
  const vf s = splat(number(b));
  Group r;
  UNROLL for (int v = 0; v < GV; v++) r.w[v] = of_f8(codes + v * VL) * s;
  return r;
}

/* A block of MXFP4: a power of two in 8 bits (e8m0), then floats of 4 bits (e2m1). Doubled, these are whole numbers. */
INLINE Group group_of_mxfp4(const uint8_t *b) {
  static const int8_t doubled[] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
  const uint32_t half_scale = b[0] < 2 ? 0x00200000u << b[0] : (b[0] - 1u) << 23; /* the two least are subnormal */
  float scale;
  memcpy(&scale, &half_scale, 4);
  uint8_t values[GROUP];
#if defined(__SSSE3__)
  const __m128i q = _mm_loadu_si128((const __m128i *)(b + 1)), four = _mm_set1_epi8(15);
  const __m128i table = _mm_loadu_si128((const __m128i *)doubled);
  _mm_storeu_si128((__m128i *)values, _mm_shuffle_epi8(table, _mm_and_si128(q, four)));
  _mm_storeu_si128((__m128i *)values + 1, _mm_shuffle_epi8(table, _mm_and_si128(_mm_srli_epi16(q, 4), four)));
#else
  for (int i = 0; i < GROUP / 2; i++) {
    values[i] = (uint8_t)doubled[b[1 + i] & 15];
    values[GROUP / 2 + i] = (uint8_t)doubled[b[1 + i] >> 4];
  }
#endif
  Group g;
  UNROLL for (int v = 0; v < GV; v++) g.w[v] = __builtin_convertvector(signed_bytes(values + v * VL), vf) * scale;
  return g;
}

/* Formats with blocks of 256 have scales in codes: they are decoded where a block begins, or the run of groups does. */
INLINE void decode_scales(const int format, const uint8_t *row, int64_t g, int is_first, float *scales) {
  if (g & 7 && !is_first) return;
  if (format == Q4_K) scales_of_k(row + 144 * (g >> 3), scales);
  else if (format == Q5_K) scales_of_k(row + 176 * (g >> 3), scales);
  else if (format == Q6_K) scales_of_q6_k(row + 210 * (g >> 3), scales);
}

/* Weights 32 * g to 32 * g + 31 of a row; `scales` are what decode_scales left. */
INLINE Group decode(const int format, const uint8_t *row, int64_t g, const float *scales) {
  switch (format) {
    case F16: return group_of_numbers(0, row + 64 * g);
    case BF16: return group_of_numbers(1, row + 64 * g);
    case Q4_0: {
      const uint8_t *b = row + 18 * g;
      const vf d = splat(read_halves(b).f[0]);
      return halves4(b + 2, d, d * -8.0f);
    }
    case Q4_1: {
      const uint8_t *b = row + 20 * g;
      const Halves h = read_halves(b);
      return halves4(b + 4, splat(h.f[0]), splat(h.f[1]));
    }
    case Q5_0: {
      const uint8_t *b = row + 22 * g;
      const vf d = splat(read_halves(b).f[0]);
      return halves5(b + 6, b + 2, d, d * -16.0f);
    }
    case Q5_1: {
      const uint8_t *b = row + 24 * g;
      const Halves h = read_halves(b);
      return halves5(b + 8, b + 4, splat(h.f[0]), splat(h.f[1]));
    }
    case MXFP4: return group_of_mxfp4(row + 17 * g);
    case A4_128: return group_of_a4(row, g, 4);
    case A4_64: return group_of_a4(row, g, 2);
    case A4_32: return group_of_a4(row, g, 1);
    case A8_128: return group_of_a8(row, g, 4);
    case A8_64: return group_of_a8(row, g, 2);
    case A8_32: return group_of_a8(row, g, 1);
    case F8_128: return group_of_f8(row, g, 4);
    case F8_64: return group_of_f8(row, g, 2);
    case F8_32: return group_of_f8(row, g, 1);
    case Q4_K: return group_of_q4_k(row + 144 * (g >> 3), g & 7, scales);
    case Q5_K: return group_of_q5_k(row + 176 * (g >> 3), g & 7, scales);
    case Q6_K: return group_of_q6_k(row + 210 * (g >> 3), g & 7, scales);
    default: { /* Q8_0 */
      const uint8_t *b = row + 34 * g;
      const vf d = splat(read_halves(b).f[0]);
      Group r;
      UNROLL for (int v = 0; v < GV; v++) r.w[v] = __builtin_convertvector(signed_bytes(b + 2 + v * VL), vf) * d;
      return r;
    }
  }
}

/* Columns [k, k + num_k) of nr rows, `row_bytes` apart, as floats: out (nr, num_k). */
INLINE void decode_rows(const int format, const uint8_t *w, int64_t row_bytes, int64_t nr, int64_t k, int64_t num_k,
                        float *out) {
  float scales[16];
  for (int64_t j = 0; j < nr; j++, w += row_bytes, out += num_k)
    for (int64_t i = 0; i < num_k; i += GROUP) {
      decode_scales(format, w, (k + i) / GROUP, i == 0, scales);
      const Group g = decode(format, w, (k + i) / GROUP, scales);
      UNROLL for (int v = 0; v < GV; v++) store(out + i + v * VL, g.w[v]);
    }
}

/* As linear_tile, with weights that are decoded on their way into registers; `codes` are rows of W. */
INLINE void block_tile(const int format, const int mr, const int nr, const uint8_t *codes, int64_t row_bytes, int64_t k,
                       const Tile *t) {
  vf acc[MR][NR];
  UNROLL for (int i = 0; i < mr; i++) UNROLL for (int j = 0; j < NR; j++) acc[i][j] = (vf){0};
  float scales[NR][16];
  const float *x = t->x;
  const int pair = VL == 8 && mr == 1 && nr == NR ? 2 : 1; /* by turns: the sums of one row wait for each other */
  const int64_t K = t->K, first = k / GROUP, end = first + t->num_k / GROUP, step = nr * (row_bytes / (K / GROUP));
  const uint8_t *ahead = codes + AHEAD_BYTES;
  for (int64_t g = first; g < end; g++, x += GROUP, ahead += step) {
    __builtin_prefetch(ahead, 0, L2);
    if (nr == NR) __builtin_prefetch(ahead + 64, 0, L2); /* a step is up to 80 bytes of 4-bit codes */
    UNROLL for (int j = 0; j < nr; j += pair) {
      Group w[2];
      UNROLL for (int p = 0; p < pair; p++) {
        decode_scales(format, codes + (j + p) * row_bytes, g, g == first, scales[j + p]);
        w[p] = decode(format, codes + (j + p) * row_bytes, g, scales[j + p]);
      }
      UNROLL for (int v = 0; v < GV; v++)
        UNROLL for (int p = 0; p < pair; p++)
          UNROLL for (int i = 0; i < mr; i++) acc[i][j + p] = fma_(load(x + i * K + v * VL), w[p].w[v], acc[i][j + p]);
    }
  }
  finish(mr, nr, acc, t);
}

#include "cpu_few_rows.c"

typedef void RowDecoder(const uint8_t *, int64_t, int64_t, int64_t, int64_t, float *);
typedef void BlockTile(int64_t, int64_t, const uint8_t *, int64_t, int64_t, const Tile *);
#define TILES(f, mr) \
  if (nr == RW && has_panel(f)) panel_tile(f, mr, codes, row_bytes, k, t); \
  else if (nr == NR) block_tile(f, mr, NR, codes, row_bytes, k, t); \
  else block_tile(f, mr, 1, codes, row_bytes, k, t);
#define FORMAT(f) \
  static __attribute__((noinline)) void rows_##f(const uint8_t *w, int64_t row_bytes, int64_t nr, int64_t k, \
                                                 int64_t num_k, float *out) { \
    decode_rows(f, w, row_bytes, nr, k, num_k, out); \
  } \
  static __attribute__((noinline)) void tile_##f(int64_t mr, int64_t nr, const uint8_t *codes, int64_t row_bytes, \
                                                 int64_t k, const Tile *t) { \
    if (mr == 1) { TILES(f, 1) } else { TILES(f, 2) } \
  }
FORMAT(F16) FORMAT(BF16) FORMAT(Q8_0) FORMAT(Q4_0) FORMAT(Q4_1) FORMAT(Q5_0) FORMAT(Q5_1)
FORMAT(Q4_K) FORMAT(Q5_K) FORMAT(Q6_K) FORMAT(MXFP4)
FORMAT(A4_128) FORMAT(A4_64) FORMAT(A4_32) FORMAT(A8_128) FORMAT(A8_64) FORMAT(A8_32)
FORMAT(F8_128) FORMAT(F8_64) FORMAT(F8_32)
#define BOTH(f) [f] = {rows_##f, tile_##f}
static const struct { RowDecoder *rows; BlockTile *tile; } FORMATS[NUM_FORMATS] = {
  BOTH(F16), BOTH(BF16), BOTH(Q8_0), BOTH(Q4_0), BOTH(Q4_1), BOTH(Q5_0), BOTH(Q5_1), BOTH(Q4_K), BOTH(Q5_K), BOTH(Q6_K),
  BOTH(MXFP4),
  BOTH(A4_128), BOTH(A4_64), BOTH(A4_32), BOTH(A8_128), BOTH(A8_64), BOTH(A8_32),
  BOTH(F8_128), BOTH(F8_64), BOTH(F8_32)};

/* Rows of x that fit in L2 by all rows of W: four rows of W become floats, a run of K at a time, for all rows of x. */
static void block_rows(int64_t format, const uint8_t *w, int64_t row_bytes, Tile t, int64_t M, int64_t N, int64_t K,
                       int64_t num_k) {
  float panel[NR * KB];
  const Tile all = t;
  const int64_t num_tiles = (M + MR - 1) / MR;
  for (int64_t n = 0, nr; n < N; n += nr) {
    nr = M <= FEW && n + RW <= N && has_panel(format) ? RW : n + NR <= N ? NR : 1;
    for (int64_t k = 0; k < K; k += num_k) {
      t = all;
      t.num_k = t.W = min_(num_k, K - k);
      t.is_first = k == 0;
      t.is_last = k + num_k >= K;
      t.x += k;
      t.y += n;
      if (t.bias) t.bias += n;
      if (t.residual) t.residual += n;
      const uint8_t *codes = w + n * row_bytes;
      if (M <= FEW) {
        FORMATS[format].tile(M, nr, codes, row_bytes, k, &t);
        continue;
      }
      FORMATS[format].rows(codes, row_bytes, nr, k, t.num_k, panel);
      t.w = panel;
      for (int64_t i = 0, m = 0; i < num_tiles; i++) {
        const int64_t mr = (M - m + num_tiles - i - 1) / (num_tiles - i);
        (nr == NR ? TILES4 : TILES1)[0](mr, &t);
        t.x += mr * t.K;
        t.y += mr * t.Y;
        if (t.residual) t.residual += mr * t.Y;
        m += mr;
      }
    }
  }
}

/* As `linear` (cpu_team.c) of a matrix in blocks, by this thread. */
static void multiply_blocks(int64_t format, const float *x, const uint8_t *w, const float *bias, const float *residual,
                            float *y, int64_t M, int64_t N, int64_t K, int64_t Y, int64_t row_bytes) {
  const int64_t num_k = run_along(K), rows = rows_in_l2(K);
  for (int64_t m = 0; m < M; m += rows) {
    Tile t = {.x = x + m * K, .bias = bias, .residual = residual ? residual + m * Y : 0, .y = y + m * Y, .K = K, .Y = Y};
    block_rows(format, w, row_bytes, t, min_(rows, M - m), N, K, num_k);
  }
}

/* Rows `indices` of a matrix in blocks as floats: out (num_rows, K). Indices null: the first ones. */
EXPORT void take_rows(int64_t format, const uint8_t *w, const int32_t *indices, float *out, int64_t num_rows, int64_t K,
                      int64_t row_bytes) {
  for (int64_t i = 0; i < num_rows; i++)
    FORMATS[format].rows(w + (indices ? indices[i] : i) * row_bytes, row_bytes, 1, 0, K, out + i * K);
}
