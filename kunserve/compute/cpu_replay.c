/* Included by cpu_kernels.c: calls of kernels that were recorded (cpu_recording.py), made again in one call. Where tokens
 * stand is told anew; everything else is as it was. */

/* The order of KERNELS in cpu_recording.py. */
enum { LINEAR, RMS_NORM, ACT_AND_MUL, ROTATE_AND_APPEND, ATTENTION, ADD, ROUTE, EXPERTS, GATE_ROWS };

typedef struct {
  int64_t kernel;
  int64_t a[20]; /* its addresses and sizes, in their order */
  float f[2];    /* its floats, which come last */
} Call;

#define AT(i) ((void *)(intptr_t)a[i])

/* -> 0; or 1 + the first token that has no slot; or -1 - the first one that reads what its block table does not name. */
EXPORT int64_t replay(const Call *calls, int64_t num, const int32_t *positions, const int32_t *cu_seqlens_q,
                      const int32_t *block_tables, int64_t B, int64_t W) {
  for (const Call *c = calls; c < calls + num; c++) {
    const int64_t *a = c->a;
    int64_t bad = 0;
    switch (c->kernel) {
      case LINEAR: linear(AT(0), AT(1), AT(2), AT(3), AT(4), a[5], a[6], a[7], a[8], a[9], a[10]); break;
      case RMS_NORM: rms_norm(AT(0), AT(1), AT(2), a[3], a[4], c->f[0], c->f[1]); break;
      case ACT_AND_MUL: act_and_mul(AT(0), AT(1), a[2], a[3], a[4], c->f[0], c->f[1]); break;
      case ROTATE_AND_APPEND:
        bad = rotate_and_append(AT(0), AT(1), AT(2), AT(3), AT(4), positions, cu_seqlens_q, block_tables, B, W, a[10],
                                a[11], a[12], a[13], a[14], a[15], a[16], a[17], a[18], c->f[0], c->f[1]);
        if (bad) return bad;
        break;
      case ADD: add(AT(0), AT(1), AT(2), a[3]); break;
      case ROUTE: route(AT(0), AT(1), a[2], a[3], a[4], a[5]); break;
      case EXPERTS:
        experts(AT(0), AT(1), AT(2), AT(3), a[4], a[5], AT(6), AT(7), a[8], a[9], AT(10), AT(11), AT(12), AT(13), AT(14),
                a[15], a[16], a[17], a[18], a[19], c->f[0], c->f[1]);
        break;
      case GATE_ROWS: gate_rows(AT(0), AT(1), AT(2), a[3], a[4]); break;
      default: /* ATTENTION */
        bad = attention(AT(0), AT(1), AT(2), positions, cu_seqlens_q, block_tables, B, W, a[8], a[9], a[10], a[11],
                        a[12], a[13], a[14], AT(15), c->f[0], c->f[1]);
        if (bad) return -bad;
    }
  }
  return 0;
}
