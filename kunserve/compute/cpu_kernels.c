/* The decoder's operations on one CPU core, float32: called by cpu_ops.py, built at first use by cpu_kernels.py.
 *
 * One rule above all: batch invariance. A row's result is the same sequence of float operations whatever stands beside
 * it in the batch and however its prompt was cut into chunks, so that outputs are bitwise equal in every grouping.
 *  - linear: an output is VL partial sums along K (lane l: k = l, l + VL, ...) and one fixed tree over the lanes;
 *    tiles differ only in how many outputs they hold in registers.
 *  - attention: keys come in tiles of TT positions, aligned to multiples of TT; a score is one chain of FMAs along
 *    head_dim, a value one chain along positions; rows that see nothing of a tile are left untouched.
 * Therefore fused multiply-add is written out (fma_) and the file is compiled with -ffp-contract=off: the compiler must
 * not decide by itself, differently in each tile, what to fuse. A virtual device is one core: its thread is the only one,
 * unless idle devices help it (cpu_team.c).
 */
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if defined(__AVX512F__)
#define VL 16    /* floats of a vector */
#define MR 6     /* rows of x in a linear tile: MR * NR accumulators in 32 registers */
#define STREAM 5 /* up to so many rows of x, W is read row by row: memory is fastest as one stream */
#define FETCH 2  /* tiles of x, the last ones, that fetch W: the first have no line fill buffers to spare */
#define SR 8     /* rows of queries in a score tile, by two vectors */
#define PR 6     /* rows of queries in a value tile, by four vectors */
#else
#if defined(__AVX__)
#define VL 8
#else
#define VL 4
#endif
#define MR 3
#define STREAM 3
#define FETCH 4
#define SR 4
#define PR 2
#endif
#define NR 4               /* rows of W in a linear tile: four outputs are reduced at once */
#define KB 2048            /* longest run along K of one tile */
#define RUN 32             /* a run is a multiple of it */
#define AHEAD (36 << 8)    /* floats of W from what is read to what is fetched */
#define XBYTES (256 << 10) /* of x that stay in L2 while W passes */
#define TT 32              /* positions of keys in an attention tile */
#define RR 48              /* most query rows (tokens * heads of a KV head) that share an attention tile */
#define DMAX 256           /* largest head_dim */
#define L2 2               /* __builtin_prefetch's locality for "not into L1" */

typedef float vf __attribute__((vector_size(4 * VL)));
typedef int32_t vi __attribute__((vector_size(4 * VL)));
typedef float v4 __attribute__((vector_size(16)));
typedef int32_t i4 __attribute__((vector_size(16)));
typedef float vf_u __attribute__((vector_size(4 * VL), aligned(4), may_alias));
typedef float v4_u __attribute__((vector_size(16), aligned(4), may_alias));

#define INLINE static inline __attribute__((always_inline))
#define EXPORT __attribute__((visibility("default")))
#define UNROLL _Pragma("GCC unroll 16")
/* Hold a vector in a register: else the compiler reads it from memory again at each use, and loads become the limit. */
#if defined(__x86_64__)
#define KEEP(v, value) ({ v = (value); __asm__("" : "+v"(v)); })
#elif defined(__aarch64__)
#define KEEP(v, value) ({ v = (value); __asm__("" : "+w"(v)); })
#else
#define KEEP(v, value) ({ v = (value); })
#endif
#ifdef __clang__
#define SHUFFLE4(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#else
#define SHUFFLE4(a, b, i, j, k, l) __builtin_shuffle(a, b, (i4){i, j, k, l})
#endif

INLINE int64_t min_(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE vf load(const float *p) { return *(const vf_u *)p; }
INLINE void store(float *p, vf v) { *(vf_u *)p = v; }
INLINE v4 load4(const float *p) { return *(const v4_u *)p; }
INLINE void store4(float *p, v4 v) { *(v4_u *)p = v; }
INLINE vf splat(float a) { return a - (vf){0}; }
INLINE vf select_(vi mask, vf a, vf b) { return (vf)((mask & (vi)a) | (~mask & (vi)b)); }

INLINE vf fma_(vf a, vf b, vf c) {
#if defined(__AVX512F__)
  return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX__) && defined(__FMA__)
  return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
  return (vf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}

/* The first n < VL floats at p, then zeros. Never reads past them: what follows may not be mapped. */
INLINE vf load_tail(const float *p, int64_t n) {
#if VL == 16
  return (vf)_mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p);
#else
  float t[VL] = {0};
  memcpy(t, p, 4 * n);
  return load(t);
#endif
}

/* The sums of four vectors. Each is the same tree of halves, whatever the other three are: lane l and lane l + VL / 2,
 * and so on down to four lanes, of which it is (l0 + l2) + (l1 + l3). */
#if VL == 16
INLINE v4 sum4(vf a, vf b, vf c, vf d) { /* a step for all four at once: 14 instructions */
  __m512 p = (__m512)a, q = (__m512)b, r = (__m512)c, s = (__m512)d;
  __m512 pq = _mm512_shuffle_f32x4(p, q, 0x44) + _mm512_shuffle_f32x4(p, q, 0xee); /* quarters p02 p13 q02 q13 */
  __m512 rs = _mm512_shuffle_f32x4(r, s, 0x44) + _mm512_shuffle_f32x4(r, s, 0xee);
  __m512 t = _mm512_shuffle_f32x4(pq, rs, 0x88) + _mm512_shuffle_f32x4(pq, rs, 0xdd); /* p q r s, four lanes each */
  t += _mm512_permute_ps(t, 0x4e);
  t += _mm512_permute_ps(t, 0xb1);
  const __m512i firsts = _mm512_castsi128_si512(_mm_setr_epi32(0, 4, 8, 12));
  return (v4)_mm512_castps512_ps128(_mm512_permutexvar_ps(firsts, t));
}
#else
INLINE v4 fold4(vf v) {
#if VL == 8
  __m256 h = (__m256)v;
  return (v4)_mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
#else
  return v;
#endif
}

INLINE v4 sum4(vf a, vf b, vf c, vf d) {
  v4 p = fold4(a), q = fold4(b), r = fold4(c), s = fold4(d);
  v4 pq = SHUFFLE4(p, q, 0, 4, 1, 5) + SHUFFLE4(p, q, 2, 6, 3, 7); /* p02 q02 p13 q13 */
  v4 rs = SHUFFLE4(r, s, 0, 4, 1, 5) + SHUFFLE4(r, s, 2, 6, 3, 7);
  return SHUFFLE4(pq, rs, 0, 1, 4, 5) + SHUFFLE4(pq, rs, 2, 3, 6, 7);
}
#endif

INLINE float largest(vf a) {
#if VL == 16
  return _mm512_reduce_max_ps((__m512)a);
#else
  float m = a[0];
  for (int l = 1; l < VL; l++) m = a[l] > m ? a[l] : m;
  return m;
#endif
}

INLINE float sum(vf a) { return sum4(a, (vf){0}, (vf){0}, (vf){0})[0]; }

/* e**x within 1 ulp or so for x in [-86.6, 88]; 0 below, e**88 above, 1 at 0, NaN of NaN. */
INLINE vf exp_(vf x) {
  vi is_zero = x < splat(-86.6f), is_large = x > splat(88.0f);
  x = select_(is_zero, splat(0), select_(is_large, splat(88.0f), x));
  const vf magic = splat(12582912.0f); /* 1.5 * 2**23: adding it rounds to an integer */
  vf t = fma_(x, splat(1.44269504088896341f), magic), n = t - magic;
  vf r = fma_(n, splat(-0.693359375f), x);
  r = fma_(n, splat(2.12194440e-4f), r);
  vf p = splat(1.9875691500e-4f); /* Cephes expf: 1 + r + r**2 * P(r) on [-ln2 / 2, ln2 / 2] */
  p = fma_(p, r, splat(1.3981999507e-3f));
  p = fma_(p, r, splat(8.3334519073e-3f));
  p = fma_(p, r, splat(4.1665795894e-2f));
  p = fma_(p, r, splat(1.6666665459e-1f));
  p = fma_(p, r, splat(5.0000001201e-1f));
  p = fma_(p, r * r, r) + 1.0f;
  vf y = (vf)((vi)p + (((vi)t - (vi)magic) << 23));
  return select_(is_zero, splat(0), y);
}

/* tanh x: an odd polynomial near 0, where 1 - 2 / (e**2x + 1) would cancel (Cephes tanhf). */
INLINE vf tanh_(vf x) {
  const vi sign = (vi)x & (vi)(splat(-0.0f));
  vf a = (vf)((vi)x ^ sign), z = x * x;
  vf p = splat(-5.70498872745e-3f);
  p = fma_(p, z, splat(2.06390887954e-2f));
  p = fma_(p, z, splat(-5.37397155531e-2f));
  p = fma_(p, z, splat(1.33314422036e-1f));
  p = fma_(p, z, splat(-3.33332819422e-1f));
  vf far = (vf)((vi)(1.0f - 2.0f / (exp_(a + a) + 1.0f)) | sign);
  return select_(a < splat(0.625f), fma_(p * z, x, x), far);
}

INLINE vf softcap_(vf x, float cap) { return tanh_(x / cap) * cap; }

/* ---- linear: y = residual + x @ W.T + bias ------------------------------------------------------------------- */

typedef struct {
  const float *x, *w, *bias, *residual; /* of this tile; bias and residual may be null */
  float *y;
  int64_t K, W, Y;       /* row strides of x, of W, and of y and residual */
  int64_t num_k;         /* run along K */
  int is_first, is_last; /* run along K of these outputs */
  const float *ahead;    /* W that is read soon, fetched while this tile computes */
} Tile;

/* What a tile does with its sums: adds what the run before left, bias and residual. */
INLINE void finish(const int mr, const int nr, vf acc[MR][NR], const Tile *t) {
  const float *bias = t->is_last ? t->bias : 0, *residual = t->is_last ? t->residual : 0;
  if (nr == NR)
    UNROLL for (int i = 0; i < mr; i++) {
      v4 s = sum4(acc[i][0], acc[i][1], acc[i][2], acc[i][3]);
      float *y = t->y + i * t->Y;
      if (!t->is_first) s = load4(y) + s;
      if (bias) s = s + load4(bias);
      if (residual) s = load4(residual + i * t->Y) + s;
      store4(y, s);
    }
  else
    UNROLL for (int i = 0; i < mr; i += 4) {
      v4 s = sum4(acc[i][0], acc[min_(i + 1, mr - 1)][0], acc[min_(i + 2, mr - 1)][0], acc[min_(i + 3, mr - 1)][0]);
      for (int l = 0; l < 4 && i + l < mr; l++) {
        float *y = t->y + (i + l) * t->Y, e = s[l];
        if (!t->is_first) e = y[0] + e;
        if (bias) e = e + bias[0];
        if (residual) e = residual[(i + l) * t->Y] + e;
        y[0] = e;
      }
    }
}

INLINE void linear_tile(const int mr, const int nr, const int num_ahead, const Tile *t) {
  const float *x = t->x, *w = t->w, *ahead = t->ahead;
  const int64_t K = t->K, W = t->W, num_k = t->num_k;
  vf acc[MR][NR];
  UNROLL for (int i = 0; i < mr; i++) UNROLL for (int j = 0; j < NR; j++) acc[i][j] = (vf){0};
  int64_t k = 0;
  for (; k + VL <= num_k; k += VL) {
    UNROLL for (int j = 0; j < num_ahead; j++) __builtin_prefetch(ahead + k * num_ahead + j * VL, 0, L2);
    vf a[MR], b[NR]; /* the fewer stay in registers, the others come one by one */
    UNROLL for (int i = 0; i < mr && mr < nr; i++) KEEP(a[i], load(x + i * K + k));
    UNROLL for (int j = 0; j < nr && mr >= nr; j++) KEEP(b[j], load(w + j * W + k));
    if (mr < nr)
      UNROLL for (int j = 0; j < nr; j++) {
        KEEP(b[j], load(w + j * W + k));
        UNROLL for (int i = 0; i < mr; i++) acc[i][j] = fma_(a[i], b[j], acc[i][j]);
      }
    else
      UNROLL for (int i = 0; i < mr; i++) {
        KEEP(a[i], load(x + i * K + k));
        UNROLL for (int j = 0; j < nr; j++) acc[i][j] = fma_(a[i], b[j], acc[i][j]);
      }
  }
  if (k < num_k) {
    vf b[NR];
    UNROLL for (int j = 0; j < nr; j++) b[j] = load_tail(w + j * W + k, num_k - k);
    UNROLL for (int i = 0; i < mr; i++) {
      vf a = load_tail(x + i * K + k, num_k - k);
      UNROLL for (int j = 0; j < nr; j++) acc[i][j] = fma_(a, b[j], acc[i][j]);
    }
  }
  finish(mr, nr, acc, t);
}

/* A tile of mr rows, each count unrolled by itself: `name` is for `nr` outputs and `num_ahead` vectors. */
#define ROWS(mr, nr, num_ahead) case mr: linear_tile(mr, nr, num_ahead, t); break;
#if MR == 6
#define MORE_ROWS(nr, num_ahead) ROWS(4, nr, num_ahead) ROWS(5, nr, num_ahead) ROWS(6, nr, num_ahead)
#else
#define MORE_ROWS(nr, num_ahead)
#endif
#define TILE(name, nr, num_ahead) \
  static __attribute__((noinline)) void name(int64_t rows, const Tile *t) { \
    switch (rows) { ROWS(1, nr, num_ahead) ROWS(2, nr, num_ahead) ROWS(3, nr, num_ahead) MORE_ROWS(nr, num_ahead) } \
  }
TILE(tile_1_0, 1, 0) TILE(tile_1_1, 1, 1)
TILE(tile_4_0, 4, 0) TILE(tile_4_1, 4, 1) TILE(tile_4_2, 4, 2) TILE(tile_4_4, 4, 4)
static void (*const TILES1[])(int64_t, const Tile *) = {tile_1_0, tile_1_1};
static void (*const TILES4[])(int64_t, const Tile *) = {tile_4_0, tile_4_1, tile_4_2, 0, tile_4_4};

/* All rows m of x (they fit in L2) by all rows of W, which pass once: tile of W by run of K by tile of x. */
static void linear_rows(const float *x, const float *w, const float *bias, const float *residual, float *y,
                        int64_t M, int64_t N, int64_t K, int64_t Y, int64_t num_k) {
  const int64_t num_tiles = (M + MR - 1) / MR;
  for (int64_t n = 0; n < N;) {
    const int64_t nr = M > STREAM && n + NR <= N ? NR : 1;
    for (int64_t k = 0; k < K; k += num_k) {
      Tile t = {.K = K, .W = K, .Y = Y, .num_k = min_(num_k, K - k), .is_first = k == 0, .is_last = k + num_k >= K};
      t.w = w + n * K + k;
      t.bias = bias ? bias + n : 0;
      t.ahead = w + n * K + k * nr + AHEAD; /* in order of address; past the end of W is mostly what is read next */
      int64_t ahead = nr; /* vectors to fetch per step along k, over the last tiles of x */
      for (int64_t i = 0, m = 0; i < num_tiles; i++) {
        const int64_t tiles_left = num_tiles - i, mr = (M - m + tiles_left - 1) / tiles_left; /* as even as can be */
        t.x = x + m * K + k;
        t.y = y + m * Y + n;
        t.residual = residual ? residual + m * Y + n : 0;
        const int64_t num_ahead = tiles_left > FETCH ? 0 : (ahead + tiles_left - 1) / tiles_left;
        (nr == NR ? TILES4 : TILES1)[num_ahead](mr, &t);
        t.ahead += num_ahead * t.num_k;
        ahead -= num_ahead;
        m += mr;
      }
    }
    n += nr;
  }
}

/* Length of a run along K: of K alone; whole groups, so that matrices in blocks have the same. */
INLINE int64_t run_along(int64_t K) {
  const int64_t num_runs = (K + KB - 1) / KB;
  return ((K + num_runs - 1) / num_runs + RUN - 1) / RUN * RUN;
}

INLINE int64_t rows_in_l2(int64_t K) {
  const int64_t rows = XBYTES / 4 / K / MR * MR;
  return rows < 2 * MR ? 2 * MR : rows;
}

/* As `linear` (cpu_team.c) of a matrix of floats, by this thread. */
static void multiply_floats(const float *x, const float *w, const float *bias, const float *residual, float *y,
                            int64_t M, int64_t N, int64_t K, int64_t Y) {
  const int64_t num_k = run_along(K), rows = rows_in_l2(K);
  for (int64_t m = 0; m < M; m += rows)
    linear_rows(x + m * K, w, bias, residual ? residual + m * Y : 0, y + m * Y, min_(rows, M - m), N, K, Y, num_k);
}

/* ---- norm, activation ---------------------------------------------------------------------------------------- */

INLINE void norm_row(const float *x, const float *w, float *y, int64_t n, float eps, float offset) {
  vf a = {0}, b = {0};
  int64_t i = 0;
  for (; i + 2 * VL <= n; i += 2 * VL) {
    vf u = load(x + i), v = load(x + i + VL);
    a = fma_(u, u, a);
    b = fma_(v, v, b);
  }
  for (; i < n; i += VL) {
    vf u = n - i < VL ? load_tail(x + i, n - i) : load(x + i);
    a = fma_(u, u, a);
  }
  const float scale = 1.0f / __builtin_sqrtf(sum(a + b) / (float)n + eps);
  for (i = 0; i < n; i++) y[i] = x[i] * scale * (offset + w[i]);
}

/* x (T, H), w (H,) -> y (T, H). */
EXPORT void rms_norm(const float *x, const float *w, float *y, int64_t T, int64_t H, float eps, float offset) {
  for (int64_t t = 0; t < T; t++) norm_row(x + t * H, w, y + t * H, H, eps, offset);
}

enum { SILU, GELU_TANH, CLAMPED_SWIGLU }; /* the order of ACTIVATIONS in kunserve/model/config.py */

INLINE vf act_mul(const int kind, vf gate, vf up, float limit, float alpha) {
  if (kind == SILU) return gate / (exp_(-gate) + 1.0f) * up;
  if (kind == GELU_TANH) {
    vf inner = (gate + 0.044715f * (gate * gate * gate)) * 0.79788456080286536f; /* sqrt(2 / pi) */
    return 0.5f * gate * (tanh_(inner) + 1.0f) * up;
  }
  const vf top = splat(limit);
  gate = select_(gate > top, top, gate);
  up = select_(up > top, top, select_(up < -top, -top, up));
  return (up + 1.0f) * (gate / (exp_(gate * -alpha) + 1.0f));
}

INLINE void act_rows(const int kind, const float *gate_up, float *y, int64_t T, int64_t I, float limit, float alpha) {
  for (int64_t t = 0; t < T; t++, gate_up += 2 * I, y += I) {
    int64_t i = 0;
    for (; i + VL <= I; i += VL) store(y + i, act_mul(kind, load(gate_up + i), load(gate_up + I + i), limit, alpha));
    if (i < I) {
      vf v = act_mul(kind, load_tail(gate_up + i, I - i), load_tail(gate_up + I + i, I - i), limit, alpha);
      memcpy(y + i, &v, 4 * (I - i));
    }
  }
}

/* gate_up (T, 2 * I) -> y (T, I). limit and alpha are of CLAMPED_SWIGLU. */
EXPORT void act_and_mul(const float *gate_up, float *y, int64_t T, int64_t I, int64_t kind, float limit, float alpha) {
  if (kind == SILU) act_rows(SILU, gate_up, y, T, I, limit, alpha);
  else if (kind == GELU_TANH) act_rows(GELU_TANH, gate_up, y, T, I, limit, alpha);
  else act_rows(CLAMPED_SWIGLU, gate_up, y, T, I, limit, alpha);
}

/* z = x + y, of n numbers each. */
EXPORT void add(const float *x, const float *y, float *z, int64_t n) {
  for (int64_t i = 0; i < n; i++) z[i] = x[i] + y[i];
}

/* cap * tanh(x / cap) of n numbers, in place. */
EXPORT void softcap(float *x, int64_t n, float cap) {
  int64_t i = 0;
  for (; i + VL <= n; i += VL) store(x + i, softcap_(load(x + i), cap));
  if (i < n) {
    vf v = softcap_(load_tail(x + i, n - i), cap);
    memcpy(x + i, &v, 4 * (n - i));
  }
}

/* Work on `data` of which [first, first + num) is to be done; `share` (cpu_team.c) has all of [0, end) done in such pieces
 * by this thread and those who help it, or at once by this one where a piece is all. */
typedef void Work(const void *data, int64_t first, int64_t num);
static void share(Work *work, const void *data, int64_t end, int64_t piece);

/* Numbers of 16 bits; rotation, the KV blocks, attention; matrices in blocks; threads that help each other; experts;
 * calls that are made again: in this unit, because they share what is above. */
#include "cpu_halves.c"
#include "cpu_attention.c"
#include "cpu_blocks.c"
#include "cpu_team.c"
#include "cpu_experts.c"
#include "cpu_replay.c"
