/* Included by cpu_kernels.c, whose vectors these are: numbers of 8 and 16 bits, widened and rounded. */

/* VL integers or halves at p, widened. Written out: gcc 12 takes vectors of bytes apart, byte by byte. */
#if VL == 16
INLINE vi bytes(const uint8_t *p) { return (vi)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p)); }
INLINE vi signed_bytes(const uint8_t *p) { return (vi)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)); }
INLINE vi pairs(const uint8_t *p) { return (vi)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)); }
INLINE vf halves(const uint8_t *p) { return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }
#elif defined(__AVX2__) && defined(__F16C__)
INLINE vi bytes(const uint8_t *p) { return (vi)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p)); }
INLINE vi signed_bytes(const uint8_t *p) { return (vi)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)); }
INLINE vi pairs(const uint8_t *p) { return (vi)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)); }
INLINE vf halves(const uint8_t *p) { return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)); }
#else
typedef uint8_t u8s __attribute__((vector_size(VL), aligned(1), may_alias));
typedef int8_t s8s __attribute__((vector_size(VL), aligned(1), may_alias));
typedef uint16_t u16s __attribute__((vector_size(2 * VL), aligned(1), may_alias));
typedef _Float16 f16s __attribute__((vector_size(2 * VL), aligned(1), may_alias));
INLINE vi bytes(const uint8_t *p) { return __builtin_convertvector(*(const u8s *)p, vi); }
INLINE vi signed_bytes(const uint8_t *p) { return __builtin_convertvector(*(const s8s *)p, vi); }
INLINE vi pairs(const uint8_t *p) { return __builtin_convertvector(*(const u16s *)p, vi); }
INLINE vf halves(const uint8_t *p) { return __builtin_convertvector(*(const f16s *)p, vf); }
#endif
/* Not by a cast where AVX512-FP16 has one: that instruction waits for what was in its register before. */
INLINE float half(const uint8_t *p) {
#if defined(__F16C__)
  uint16_t h;
  memcpy(&h, p, 2);
  return _cvtsh_ss(h);
#else
  _Float16 h;
  memcpy(&h, p, 2);
  return (float)h;
#endif
}

/* ---- numbers of 16 bits ------------------------------------------------------------------------------------ */

enum { NUMBERS_32, NUMBERS_16, NUMBERS_B16 }; /* float32, float16, bfloat16: the order of KV_DTYPES in cpu_ops.py */

/* VL numbers of 16 bits at p, four of any, and one. */
INLINE vf wide(const int kind, const uint8_t *p) { return kind == NUMBERS_16 ? halves(p) : (vf)(pairs(p) << 16); }

INLINE v4 wide4(const int kind, const uint8_t *p) {
  if (kind == NUMBERS_32) return load4((const float *)p);
#if defined(__F16C__) && defined(__SSE4_1__)
  const __m128i q = _mm_loadl_epi64((const __m128i *)p);
  return kind == NUMBERS_16 ? (v4)_mm_cvtph_ps(q) : (v4)_mm_slli_epi32(_mm_cvtepu16_epi32(q), 16);
#else
  uint16_t q[4];
  memcpy(q, p, 8);
  if (kind == NUMBERS_B16) {
    uint32_t bits[4];
    for (int i = 0; i < 4; i++) bits[i] = (uint32_t)q[i] << 16;
    return load4((const float *)bits);
  }
  return (v4){half(p), half(p + 2), half(p + 4), half(p + 6)};
#endif
}

/* n numbers, a multiple of 4, as floats. */
INLINE void widen(const int kind, const uint8_t *p, float *out, int64_t n) {
  int64_t i = 0;
  for (; kind != NUMBERS_32 && i + VL <= n; i += VL) store(out + i, wide(kind, p + 2 * i));
  for (; i < n; i += 4) store4(out + i, wide4(kind, p + (kind == NUMBERS_32 ? 4 : 2) * i));
}

/* The nearest number of 16 bits, of two the even one; what is too large is infinite. */
INLINE uint16_t rounded(const int kind, float x) {
  uint16_t h;
  if (kind == NUMBERS_16) {
#if defined(__F16C__)
    return (uint16_t)_cvtss_sh(x, 0);
#else
    const _Float16 f = (_Float16)x;
    memcpy(&h, &f, 2);
    return h;
#endif
  }
  uint32_t bits;
  memcpy(&bits, &x, 4);
  const int is_nan = (bits & 0x7fffffff) > 0x7f800000;
  h = (uint16_t)(is_nan ? bits >> 16 | 64 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  return h;
}

/* n floats as they are stored. */
INLINE void put(const int kind, const float *x, uint8_t *out, int64_t n) {
  if (kind == NUMBERS_32) memcpy(out, x, 4 * n);
  else
    for (int64_t i = 0; i < n; i++) {
      const uint16_t h = rounded(kind, x[i]);
      memcpy(out + 2 * i, &h, 2);
    }
}
