/* Included by cpu_blocks.c: products of one or two rows of x with blocks of 4 to 6 bits (Q5_0, Q4_K, Q6_K), for AVX2.
 *
 * There the time goes into taking codes apart, of which a vector has room for eight. So 32 are taken at once, as bytes,
 * for eight groups of eight rows of W: each becomes a half that stands for a whole number, and halves are widened by the
 * load that reads them again. Weights are the same floats, and are added in the same order, as anywhere else: where a half
 * is more than its code, the offset takes that back, and is exact.
 */
#if VL == 8 && defined(__AVX2__) && defined(__F16C__)
#define GROUPS 8 /* of weights, that are taken apart at once */
#define RW 8     /* rows of W: the sums of four would wait for each other */

typedef struct {
  uint16_t codes[RW][GROUPS][GROUP]; /* halves: columns 0 to 7, 16 to 23, 8 to 15, 24 to 31 of each group */
  float scales[RW][2 * GROUPS];      /* of groups; of Q6_K of each 16 weights */
  float offsets[RW][2 * GROUPS];
} Panel;

INLINE int has_panel(const int64_t format) { return format == Q5_0 || format == Q4_K || format == Q6_K; }
INLINE __m256i all_bytes(int byte) { return _mm256_set1_epi8((char)byte); }
INLINE __m256i load32(const uint8_t *p) { return _mm256_loadu_si256((const __m256i *)p); }

/* Halves of which `low` and `high` are the bytes. */
INLINE void put_halves(__m256i low, __m256i high, uint16_t *out) {
  _mm256_storeu_si256((__m256i *)out, _mm256_unpacklo_epi8(low, high));
  _mm256_storeu_si256((__m256i *)(out + 16), _mm256_unpackhi_epi8(low, high));
}

/* The codes of a block, and 1024. */
INLINE void put_q5_0(const uint8_t *block, uint16_t *out) {
  const __m256i spread = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
  const __m256i which = _mm256_set1_epi64x((int64_t)0x8040201008040201);
  int32_t bits;
  memcpy(&bits, block + 2, 4);
  const __m256i h = _mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32(bits), spread), which);
  const __m256i sixteens = _mm256_and_si256(_mm256_cmpeq_epi8(h, which), all_bytes(16));
  const __m256i q = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)(block + 6)));
  const __m256i low = _mm256_and_si256(_mm256_srlv_epi64(q, _mm256_setr_epi64x(0, 0, 4, 4)), all_bytes(15));
  put_halves(_mm256_or_si256(low, sixteens), all_bytes(0x64), out);
}

/* The codes of group i. */
INLINE void put_q4_k(const uint8_t *block, int64_t i, uint16_t *out) {
  const __m128i low = _mm_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 0, -128, 0, -128, 0, -128, 0, -128);
  const __m128i high = _mm_setr_epi8(0, 60, 64, 66, 68, 69, 70, 71, 72, 72, 73, 73, 74, 74, 75, 75);
  const __m256i both = load32(block + 16 + 32 * (i >> 1)), right = _mm256_set1_epi32(4 * (i & 1));
  const __m256i q = _mm256_and_si256(_mm256_srlv_epi32(both, right), all_bytes(15));
  put_halves(_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(low), q),
             _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(high), q), out);
}

/* The codes of group i, and 256: a quarter of what their bytes are. */
INLINE void put_q6_k(const uint8_t *block, int64_t i, uint16_t *out) {
  const int64_t part = i >> 2, j = i & 3; /* of 128 weights; of 32 in it */
  const __m256i left = _mm256_set1_epi32(j < 2 ? 2 : 0), right = _mm256_set1_epi32(j < 2 ? 0 : 2);
  const __m256i low = _mm256_srlv_epi32(_mm256_sllv_epi32(load32(block + 64 * part + 32 * (j & 1)), left), right);
  const __m256i high = _mm256_sllv_epi32(load32(block + 128 + 32 * part), _mm256_set1_epi32((int32_t)(6 - 2 * j)));
  const __m256i q = _mm256_or_si256(_mm256_and_si256(low, all_bytes(0x3c)), _mm256_and_si256(high, all_bytes(0xc0)));
  put_halves(q, all_bytes(0x5c), out);
}

/* Scales of blocks first to end - 1 of Q5_0, and offsets: code + 1024 is 16 + 1024 too much. */
INLINE void put_scales_of_q5_0(const uint8_t *blocks, int64_t first, int64_t end, float *scales, float *offsets) {
  uint16_t some[GROUPS] = {0};
  const int is_whole = end - first == GROUPS;
  for (int64_t i = first; i < end && !is_whole; i++) memcpy(some + i, blocks + 22 * i, 2);
  UNROLL for (int i = 0; i < GROUPS; i += 4) {
    uint64_t four = 0;
    UNROLL for (int j = 0; j < 4; j++) {
      uint16_t one;
      memcpy(&one, is_whole ? blocks + 22 * (i + j) : (const uint8_t *)(some + i + j), 2);
      four |= (uint64_t)one << 16 * j;
    }
    const v4 s = (v4)_mm_cvtph_ps(_mm_cvtsi64_si128((int64_t)four));
    store4(scales + i, s);
    store4(offsets + i, s * -(1024.0f + 16));
  }
}

/* Groups first to end - 1 of a row's piece, as row j of the panel. */
INLINE void put_piece(const int format, const uint8_t *blocks, int64_t first, int64_t end, int64_t j, Panel *p) {
  float of_k[16];
  if (format == Q5_0) put_scales_of_q5_0(blocks, first, end, p->scales[j], p->offsets[j]);
  else if (format == Q4_K) {
    scales_of_k(blocks, of_k);
    store(p->scales[j], load(of_k));
    store(p->offsets[j], load(of_k + 8));
  } else {
    scales_of_q6_k(blocks, of_k);
    UNROLL for (int i = 0; i < 16; i += VL) {
      store(p->scales[j] + i, load(of_k + i));
      store(p->offsets[j] + i, load(of_k + i) * -(256.0f + 32));
    }
  }
  for (int64_t i = first; i < end; i++)
    if (format == Q5_0) put_q5_0(blocks + 22 * i, p->codes[j][i]);
    else if (format == Q4_K) put_q4_k(blocks, i, p->codes[j][i]);
    else put_q6_k(blocks, i, p->codes[j][i]);
}

/* What the tile `t` and those beside it do with the sums of RW rows of W. */
INLINE void finish_all(const int mr, vf acc[RW / NR][MR][NR], Tile t) {
  UNROLL for (int part = 0; part < RW / NR; part++) {
    finish(mr, NR, acc[part], &t);
    t.y += NR;
    if (t.bias) t.bias += NR;
    if (t.residual) t.residual += NR;
  }
}

/* As block_tile, of RW rows of W. */
INLINE void panel_tile(const int format, const int mr, const uint8_t *codes, int64_t row_bytes, int64_t k, const Tile *t) {
  static const int order[] = {0, 2, 1, 3};
  const int per = format == Q6_K ? 2 : 1; /* scales of a group */
  vf acc[RW / NR][MR][NR];
  UNROLL for (int j = 0; j < RW; j++) UNROLL for (int m = 0; m < mr; m++) acc[j / NR][m][j % NR] = (vf){0};
  Panel p;
  const float *x = t->x;
  const int64_t K = t->K, first = k / GROUP, end = first + t->num_k / GROUP, step = RW * (row_bytes / (K / GROUP));
  const uint8_t *ahead = codes + AHEAD_BYTES + step * first;
  for (int64_t g = first / GROUPS * GROUPS; g < end; g += GROUPS) {
    const int64_t from = g < first ? first - g : 0, to = min_(end - g, GROUPS);
    for (int64_t j = 0; j < RW; j++) put_piece(format, codes + j * row_bytes + row_bytes * g / (K / GROUP), from, to, j, &p);
    __asm__("" : "+m"(p));
    for (int64_t i = from; i < to; i++, x += GROUP, ahead += step) {
      UNROLL for (int b = 0; b < RW * 27; b += 64) __builtin_prefetch(ahead + b, 0, L2);
      UNROLL for (int j = 0; j < RW; j++)
        UNROLL for (int v = 0; v < GV; v++) {
          const int64_t s = per * i + per * v / GV;
          const vf whole = halves((const uint8_t *)(p.codes[j][i] + VL * order[v]));
          const vf w = fma_(whole, splat(p.scales[j][s]), splat(p.offsets[j][s]));
          UNROLL for (int m = 0; m < mr; m++)
            acc[j / NR][m][j % NR] = fma_(load(x + m * K + v * VL), w, acc[j / NR][m][j % NR]);
        }
    }
  }
  finish_all(mr, acc, *t);
}
#else
#define RW NR
INLINE int has_panel(const int64_t format) { return 0; }
INLINE void panel_tile(const int format, const int mr, const uint8_t *codes, int64_t row_bytes, int64_t k, const Tile *t) {}
#endif
