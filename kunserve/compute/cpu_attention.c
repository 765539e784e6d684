/* Included by cpu_kernels.c, whose rules and vectors these are: rotation, the KV blocks, and attention over them. */
#define SHARED_READ (32 << 10) /* positions times heads times head_dim, from which on KV heads are shared out */

/* ---- the KV blocks ------------------------------------------------------------------------------------------- */

/* `kv` of one layer, (num_blocks, 2, num_kv_heads, block_size, head_dim) numbers of a kind, and the width of the block
 * tables. Numbers of 16 bits are rounded where they are appended; read, they are floats. */
typedef struct {
  int64_t num_blocks, num_kv_heads, block_size, head_dim, W, kind;
} Blocks;

INLINE int64_t bytes_of(int64_t kind) { return kind == NUMBERS_32 ? 4 : 2; } /* of a number */

/* What becomes of scores: `window` tokens are seen, the query's own among them; a softcap of 0 is none. */
typedef struct {
  int64_t window;
  float softcap;
} Scores;

/* Rotate the first 2 * half of D elements; the others stay. */
INLINE void rotate(const float *x, const float *rope, float *y, int64_t half, int64_t D) {
  for (int64_t i = 0; i < half; i++) {
    const float a = x[i], b = x[i + half], cos = rope[i], sin = rope[i + half];
    y[i] = a * cos - b * sin;
    y[i + half] = b * cos + a * sin;
  }
  for (int64_t i = 2 * half; i < D; i++) y[i] = x[i];
}

/* Norm (if given) and rotate q in place; norm, rotate and append k; append v. -> 0, or 1 + the first bad token.
 * rope (max_positions, rotary_dim). is_whole: the norms are over all heads of q, and of k, together. */
EXPORT int64_t rotate_and_append(float *qkv, const float *rope, uint8_t *kv, const float *q_norm, const float *k_norm,
                                 const int32_t *positions, const int32_t *cu_seqlens_q, const int32_t *block_tables,
                                 int64_t B, int64_t W, int64_t num_blocks, int64_t num_kv_heads, int64_t block_size,
                                 int64_t head_dim, int64_t kind, int64_t num_heads, int64_t max_positions,
                                 int64_t rotary_dim, int64_t is_whole, float eps, float offset) {
  const int64_t D = head_dim, KH = num_kv_heads, H = num_heads, number = bytes_of(kind), head = block_size * D * number;
  float t[DMAX];
  for (int64_t b = 0; b < B; b++) {
    for (int64_t i = cu_seqlens_q[b]; i < cu_seqlens_q[b + 1]; i++) {
      const int64_t position = positions[i], block = position / block_size;
      if (position < 0 || position >= max_positions || block >= W) return i + 1;
      const int64_t id = block_tables[b * W + block];
      if (id < 0 || id >= num_blocks) return i + 1;
      float *x = qkv + i * (H + 2 * KH) * D;
      uint8_t *keys = kv + id * 2 * KH * head + position % block_size * D * number;
      if (is_whole && q_norm) norm_row(x, q_norm, x, H * D, eps, offset);
      if (is_whole && k_norm) norm_row(x + H * D, k_norm, x + H * D, KH * D, eps, offset);
      for (int64_t h = 0; h < H + KH; h++) {
        const float *norm = is_whole ? 0 : h < H ? q_norm : k_norm;
        if (norm) norm_row(x + h * D, norm, t, D, eps, offset);
        else memcpy(t, x + h * D, 4 * D);
        rotate(t, rope + position * rotary_dim, x + h * D, rotary_dim / 2, D);
      }
      for (int64_t h = 0; h < 2 * KH; h++) put(kind, x + (H + h) * D, keys + h * head, D);
    }
  }
  return 0;
}

/* ---- attention ----------------------------------------------------------------------------------------------- */

/* Query rows (token by token, head by head) that share a KV head, and what online softmax keeps of them. */
typedef struct {
  int64_t stride;                     /* of the rows of q, out and values: head_dim, rounded up to VL */
  int64_t position[RR];
  float q[RR * DMAX], out[RR * DMAX]; /* scaled queries; weighted sums of values */
  float p[RR][TT];                    /* scores, then weights, of the tile at hand */
  float keys[DMAX][TT];               /* the tile's keys, transposed */
  float values[TT * DMAX];            /* the tile's values, if they are of 16 bits or head_dim is no multiple of VL */
  float sum[RR][VL];                  /* lane sums of the weights */
  float max[RR + VL], scale[RR + VL]; /* largest score so far; what this tile multiplies out and sum with */
} Rows;

/* The first position that a query at `position` sees. */
INLINE int64_t start_of(int64_t position, Scores how) {
  return position < how.window ? 0 : position - how.window + 1;
}

INLINE void transpose4(const int kind, const uint8_t *const *row, int64_t d, float (*out)[TT], int64_t t) {
  const int64_t at = d * bytes_of(kind);
  v4 a = wide4(kind, row[t] + at), b = wide4(kind, row[t + 1] + at);
  v4 c = wide4(kind, row[t + 2] + at), e = wide4(kind, row[t + 3] + at);
  v4 ab = SHUFFLE4(a, b, 0, 4, 1, 5), ce = SHUFFLE4(c, e, 0, 4, 1, 5);
  v4 ab2 = SHUFFLE4(a, b, 2, 6, 3, 7), ce2 = SHUFFLE4(c, e, 2, 6, 3, 7);
  store4(&out[d][t], SHUFFLE4(ab, ce, 0, 1, 4, 5));
  store4(&out[d + 1][t], SHUFFLE4(ab, ce, 2, 3, 6, 7));
  store4(&out[d + 2][t], SHUFFLE4(ab2, ce2, 0, 1, 4, 5));
  store4(&out[d + 3][t], SHUFFLE4(ab2, ce2, 2, 3, 6, 7));
}

/* The keys of a tile, transposed; those to be read next are fetched. */
INLINE void turn_keys(const int kind, Rows *s, const uint8_t *const *row, const uint8_t *const *ahead, int64_t D) {
  for (int64_t t = 0; t < TT; t += 4)
    for (int64_t d = 0; d < D; d += 4) {
      __builtin_prefetch(ahead[t + (d >> 2 & 3)] + (d & ~15) * bytes_of(kind), 0, L2);
      transpose4(kind, row, d, s->keys, t);
    }
}

INLINE void score_tile(const int mr, Rows *s, int64_t r, int64_t t, int64_t D) {
  vf acc[SR][2];
  UNROLL for (int i = 0; i < mr; i++) acc[i][0] = acc[i][1] = (vf){0};
  for (int64_t d = 0; d < D; d++) {
    vf k0, k1;
    KEEP(k0, load(&s->keys[d][t]));
    KEEP(k1, load(&s->keys[d][t + VL]));
    UNROLL for (int i = 0; i < mr; i++) {
      vf q = splat(s->q[(r + i) * s->stride + d]);
      acc[i][0] = fma_(q, k0, acc[i][0]);
      acc[i][1] = fma_(q, k1, acc[i][1]);
    }
  }
  UNROLL for (int i = 0; i < mr; i++) {
    store(&s->p[r + i][t], acc[i][0]);
    store(&s->p[r + i][t + VL], acc[i][1]);
  }
}

static void scores(Rows *s, int64_t r, int64_t end, int64_t D) {
  for (; r + SR <= end; r += SR)
    for (int64_t t = 0; t < TT; t += 2 * VL) score_tile(SR, s, r, t, D);
  for (; r + 3 <= end; r += 3)
    for (int64_t t = 0; t < TT; t += 2 * VL) score_tile(3, s, r, t, D);
  for (; r < end; r++)
    for (int64_t t = 0; t < TT; t += 2 * VL) score_tile(1, s, r, t, D);
}

/* Scores of rows [r, end) -> weights; maximum, sum and scale follow. `first` is the tile's first position.
 * Each of these rows sees something of the tile: a maximum of -inf would make its weights no numbers. */
static void softmax(Rows *s, int64_t r, int64_t end, int64_t first, Scores how) {
  static const int32_t lanes[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  vi lane;
  memcpy(&lane, lanes, sizeof lane);
  const vf minus_inf = splat(-__builtin_inff());
  float old[RR + VL];
  memcpy(old, s->max, sizeof old);
  for (int64_t i = r; i < end; i++) {
    const int32_t seen = (int32_t)min_(s->position[i] + 1 - first, TT);
    const int32_t unseen = (int32_t)(first < start_of(s->position[i], how) ? start_of(s->position[i], how) - first : 0);
    vf top = splat(s->max[i]);
    for (int32_t t = 0; t < TT; t += VL) {
      vf x = load(&s->p[i][t]);
      if (how.softcap > 0) store(&s->p[i][t], x = softcap_(x, how.softcap));
      if (seen < t + VL) store(&s->p[i][t], x = select_(lane + t < seen - (vi){0}, x, minus_inf));
      if (unseen > t) store(&s->p[i][t], x = select_(lane + t < unseen - (vi){0}, minus_inf, x));
      top = select_(x > top, x, top);
    }
    s->max[i] = largest(top);
  }
  for (int64_t i = r; i < end; i += VL) store(s->scale + i, exp_(load(old + i) - load(s->max + i)));
  for (int64_t i = r; i < end; i++) {
    vf m = splat(s->max[i]), total = {0};
    for (int64_t t = 0; t < TT; t += VL) {
      vf p = exp_(load(&s->p[i][t]) - m);
      store(&s->p[i][t], p);
      total = total + p;
    }
    store(s->sum[i], fma_(load(s->sum[i]), splat(s->scale[i]), total));
  }
}

/* `number`: the bytes of one that is fetched. */
INLINE void value_tile(const int mr, const int nv, const int number, Rows *s, int64_t r, int64_t d,
                       const float *const *row, const uint8_t *const *ahead, int64_t n) {
  vf acc[PR][4];
  UNROLL for (int i = 0; i < mr; i++)
    UNROLL for (int j = 0; j < nv; j++) acc[i][j] = load(&s->out[(r + i) * s->stride + d + j * VL]) * s->scale[r + i];
  for (int64_t t = 0; t < n; t++) {
    vf v[4];
    UNROLL for (int j = 0; j < nv; j++) {
      if (j * VL % 16 == 0) __builtin_prefetch(ahead[t] + (d + j * VL) * number, 0, L2);
      v[j] = load(row[t] + d + j * VL);
    }
    UNROLL for (int i = 0; i < mr; i++) {
      vf p = splat(s->p[r + i][t]);
      UNROLL for (int j = 0; j < nv; j++) acc[i][j] = fma_(p, v[j], acc[i][j]);
    }
  }
  UNROLL for (int i = 0; i < mr; i++)
    UNROLL for (int j = 0; j < nv; j++) store(&s->out[(r + i) * s->stride + d + j * VL], acc[i][j]);
}

INLINE void value_rows(const int mr, const int number, Rows *s, int64_t r, int64_t D, const float *const *row,
                       const uint8_t *const *ahead, int64_t n) {
  int64_t d = 0;
  for (; d + 4 * VL <= D; d += 4 * VL) value_tile(mr, 4, number, s, r, d, row, ahead, n);
  for (; d < D; d += VL) value_tile(mr, 1, number, s, r, d, row, ahead, n);
}

INLINE void values(const int number, Rows *s, int64_t r, int64_t end, int64_t D, const float *const *row,
                   const uint8_t *const *ahead, int64_t n) {
  for (; r + PR <= end; r += PR) value_rows(PR, number, s, r, D, row, ahead, n);
#if PR > 3
  for (; r + 3 <= end; r += 3) value_rows(3, number, s, r, D, row, ahead, n);
#endif
  for (; r < end; r++) value_rows(1, number, s, r, D, row, ahead, n);
}

/* Of a tile, whose keys have become weights: what rows [r, end) get from its n values. Where these are no floats, or D is
 * no multiple of VL, they are put into s->values first. */
INLINE void add_values(const int kind, Rows *s, int64_t r, int64_t end, int64_t D, const uint8_t *const *row,
                       const uint8_t *const *ahead, int64_t n) {
  const float *wide_row[TT];
  for (int64_t t = 0; t < n; t++) {
    wide_row[t] = (const float *)row[t];
    if (kind == NUMBERS_32 && D % VL == 0) continue;
    widen(kind, row[t], s->values + t * s->stride, D);
    wide_row[t] = s->values + t * s->stride;
  }
  values((int)bytes_of(kind), s, r, end, D, wide_row, ahead, n);
}

/* The two steps of a tile that read it, each by itself for a kind of numbers. */
#define READERS(kind) \
  static void turn_keys_##kind(Rows *s, const uint8_t *const *row, const uint8_t *const *ahead, int64_t D) { \
    turn_keys(kind, s, row, ahead, D); \
  } \
  static void add_values_##kind(Rows *s, int64_t r, int64_t end, int64_t D, const uint8_t *const *row, \
                                const uint8_t *const *ahead, int64_t n) { \
    add_values(kind, s, r, end, D, row, ahead, n); \
  }
READERS(NUMBERS_32) READERS(NUMBERS_16) READERS(NUMBERS_B16)
static const struct {
  void (*turn_keys)(Rows *, const uint8_t *const *, const uint8_t *const *, int64_t);
  void (*add_values)(Rows *, int64_t, int64_t, int64_t, const uint8_t *const *, const uint8_t *const *, int64_t);
} KINDS[] = {
  {turn_keys_NUMBERS_32, add_values_NUMBERS_32},
  {turn_keys_NUMBERS_16, add_values_NUMBERS_16},
  {turn_keys_NUMBERS_B16, add_values_NUMBERS_B16}};

/* Keys of KV head h at positions [first, first + TT), those from `end` on repeating the last. -> 0, or 1 if unnamed. */
INLINE int locate(const Blocks *c, const int32_t *table, const uint8_t *kv, int64_t h, int64_t first, int64_t end,
                  const uint8_t **row) {
  const int64_t key = c->head_dim * bytes_of(c->kind), head = c->block_size * key, n = min_(TT, end - first);
  if (n <= 0) return 1;
  int64_t i = first / c->block_size, o = first % c->block_size;
  for (int64_t t = 0; t < n; i++, o = 0) {
    if (i >= c->W || table[i] < 0 || table[i] >= c->num_blocks) return 1;
    const uint8_t *keys = kv + (table[i] * 2 * c->num_kv_heads + h) * head;
    for (; t < n && o < c->block_size; t++, o++) row[t] = keys + o * key;
  }
  for (int64_t t = n; t < TT; t++) row[t] = row[n - 1];
  return 0;
}

/* A sequence's keys of one KV head that some rows pass over: positions [start, end) of a block table; start at a tile's
 * first, so that tiles do not depend on how tokens were cut into chunks. */
typedef struct {
  const int32_t *table;
  int64_t h, start, end;
} Span;

/* `num` rows over their span; of `next`, the first tile is fetched at the end. -> 0, or 1 if a block is not named. */
static int attend(Rows *s, int64_t num, const Blocks *c, const uint8_t *kv, Span span, Span next, Scores how) {
  const int64_t D = c->head_dim, values_at = c->num_kv_heads * c->block_size * D * bytes_of(c->kind); /* from its key */
  const uint8_t *tiles[2][TT]; /* the tile at hand and the one to fetch meanwhile, by turns */
  for (int64_t i = 0; i < num; i++) {
    memset(s->out + i * s->stride, 0, 4 * s->stride);
    memset(s->sum[i], 0, sizeof s->sum[i]);
    s->max[i] = -__builtin_inff();
  }
  if (locate(c, span.table, kv, span.h, span.start, span.end, tiles[span.start / TT % 2])) return 1;
  for (int64_t first = span.start, r = 0, last = 0; first < span.end; first += TT) {
    const int64_t n = min_(TT, span.end - first);
    const uint8_t **row = tiles[first / TT % 2], **ahead = tiles[1 - first / TT % 2];
    if (first + TT < span.end) {
      if (locate(c, span.table, kv, span.h, first + TT, span.end, ahead)) return 1;
    } else if (next.end <= 0 || locate(c, next.table, kv, next.h, next.start, next.end, ahead)) {
      ahead = row;
    }
    /* Rows [r, last) see something of this tile: those before it end earlier, those behind it begin later. */
    while (r < num && s->position[r] < first) r++;
    while (last < num && start_of(s->position[last], how) < first + TT) last++;
    KINDS[c->kind].turn_keys(s, row, ahead, D);
    scores(s, r, last, D);
    softmax(s, r, last, first, how);
    const uint8_t *value[TT], *value_ahead[TT];
    for (int64_t t = 0; t < n; t++) {
      value[t] = row[t] + values_at;
      value_ahead[t] = ahead[t] + values_at;
    }
    KINDS[c->kind].add_values(s, r, last, D, value, value_ahead, n);
  }
  return 0;
}

/* A row's weighted sum of values, divided by the sum of its weights; a sink is a weight without a value. */
INLINE void divide(const Rows *s, int64_t r, const float *sink, float *y, int64_t D) {
  float total = sum(load(s->sum[r])), share = 1.0f;
  if (sink) {
    const float max = s->max[r] > *sink ? s->max[r] : *sink;
    share = exp_(splat(s->max[r] - max))[0];
    total = total * share + exp_(splat(*sink - max))[0];
  }
  for (int64_t d = 0; d < D; d++) y[d] = s->out[r * s->stride + d] * share / total;
}

/* What `attention` is asked for. `bad` becomes the least number that it may return, unless there is none. */
typedef struct {
  const float *qkv;
  const uint8_t *kv;
  float *out;
  const int32_t *positions, *cu_seqlens_q, *block_tables;
  int64_t B, num_heads;
  Blocks c;
  Scores how;
  const float *sinks;
  float scale;
  _Atomic int64_t *bad;
} Attention;

static void note_bad(const Attention *a, int64_t bad) {
  int64_t least = atomic_load(a->bad);
  while ((!least || bad < least) && !atomic_compare_exchange_weak(a->bad, &least, bad));
}

/* Of tokens [i, last) of sequence b, heads [q, q + num_q), which share a KV head; `next`: what is read after it. */
static int attend_heads(const Attention *a, Rows *s, int64_t i, int64_t last, int64_t q, int64_t num_q, Span span,
                        Span next) {
  const int64_t D = a->c.head_dim, stride = (a->num_heads + 2 * a->c.num_kv_heads) * D, num = (last - i) * num_q;
  for (int64_t r = 0; r < num; r++) {
    const float *x = a->qkv + (i + r / num_q) * stride + (q + r % num_q) * D;
    for (int64_t d = 0; d < D; d++) s->q[r * s->stride + d] = x[d] * a->scale;
    s->position[r] = a->positions[i + r / num_q];
  }
  if (attend(s, num, &a->c, a->kv, span, next, a->how)) return 1;
  for (int64_t r = 0; r < num; r++) {
    const int64_t h = q + r % num_q;
    divide(s, r, a->sinks ? a->sinks + h : 0, a->out + ((i + r / num_q) * a->num_heads + h) * D, D);
  }
  return 0;
}

/* All tokens, of so many KV heads from `first` on. */
static void attend_kv_heads(const void *attention, int64_t first, int64_t num) {
  const Attention *a = attention;
  const int64_t D = a->c.head_dim, W = a->c.W, group = a->num_heads / a->c.num_kv_heads;
  const int64_t heads = min_(group, RR), tokens = RR / heads, begin = first * group, end = (first + num) * group;
  const int32_t *ends = a->cu_seqlens_q, *positions = a->positions;
  Rows s;
  s.stride = (D + VL - 1) / VL * VL;
  if (D % VL) memset(s.values, 0, sizeof s.values); /* the padding of rows stays zero */
  for (int64_t b = 0; b < a->B; b++) {
    for (int64_t i = ends[b], last; i < ends[b + 1]; i = last) {
      last = min_(i + tokens, ends[b + 1]);
      for (int64_t q = begin, num_q; q < end; q += num_q) {
        num_q = min_(heads, group - q % group);
        const int64_t start = start_of(positions[i], a->how) / TT * TT;
        const Span span = {a->block_tables + b * W, q / group, start, positions[last - 1] + 1};
        Span next = {span.table, (q + num_q) / group, start, span.end};
        if (q + num_q == end) { /* the next tokens: of this sequence or of the next */
          next.h = first;
          if (last == ends[b + 1]) next.table += W;
          next.end = last < ends[a->B] && next.table < a->block_tables + a->B * W ? positions[last] + 1 : 0;
          next.start = next.end > 0 ? start_of(positions[last], a->how) / TT * TT : 0;
        }
        if (attend_heads(a, &s, i, last, q, num_q, span, next)) {
          note_bad(a, i + 1);
          return;
        }
      }
    }
  }
}

/* q of qkv (T, (H + 2 * KH) * D) over the blocks -> out (T, H * D). -> 0, or 1 + the first token of a bad sequence.
 * sinks (H,) or null; window and softcap: see Scores. */
EXPORT int64_t attention(const float *qkv, const uint8_t *kv, float *out, const int32_t *positions,
                         const int32_t *cu_seqlens_q, const int32_t *block_tables, int64_t B, int64_t W,
                         int64_t num_blocks, int64_t num_kv_heads, int64_t block_size, int64_t head_dim, int64_t kind,
                         int64_t num_heads, int64_t window, const float *sinks, float scale, float softcap) {
  _Atomic int64_t bad = 0;
  const Attention a = {.qkv = qkv, .kv = kv, .out = out, .positions = positions, .cu_seqlens_q = cu_seqlens_q,
                       .block_tables = block_tables, .B = B, .num_heads = num_heads,
                       .c = {num_blocks, num_kv_heads, block_size, head_dim, W, kind}, .how = {window, softcap},
                       .sinks = sinks, .scale = scale, .bad = &bad};
  int64_t num_read = 0; /* positions, by each token */
  for (int64_t b = 0; b < B; b++)
    if (cu_seqlens_q[b] < cu_seqlens_q[b + 1])
      num_read += (cu_seqlens_q[b + 1] - cu_seqlens_q[b]) * min_(positions[cu_seqlens_q[b + 1] - 1] + 1, window);
  share(attend_kv_heads, &a, num_kv_heads, num_read * num_heads * head_dim < SHARED_READ ? num_kv_heads : 1);
  return atomic_load(&bad);
}
