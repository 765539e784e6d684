/* Included by cpu_kernels.c, whose rules and kernels these are: a mixture of experts. A row's result is the sum over its
 * experts in the order of their numbers, whoever else chose them. */

/* logits (T, E) -> weights (T, E): softmax of each row, kept for the `num` largest and 0 for the others; of equals the
 * first is taken. normalize: those that are kept sum to 1. */
EXPORT void route(const float *logits, float *weights, int64_t T, int64_t E, int64_t num, int64_t normalize) {
  for (int64_t t = 0; t < T; t++, logits += E, weights += E) {
    float max = logits[0], all = 0, kept = 0;
    for (int64_t e = 1; e < E; e++) max = logits[e] > max ? logits[e] : max;
    for (int64_t e = 0; e < E; e++) {
      all += exp_(splat(logits[e] - max))[0];
      weights[e] = 0;
    }
    for (int64_t i = 0; i < num; i++) {
      int64_t best = -1;
      for (int64_t e = 0; e < E; e++)
        if (weights[e] == 0 && (best < 0 || logits[e] > logits[best])) best = e;
      /* What is so unlikely that it comes to 0 must not be taken twice; a row of NaN has no largest. */
      const float w = exp_(splat(logits[best] - max))[0];
      weights[best] = w == 0 ? 1e-38f : w;
      kept += weights[best];
    }
    const float total = normalize ? kept : all;
    for (int64_t e = 0; e < E; e++) weights[e] = weights[e] == 0 ? 0 : weights[e] / total;
  }
}

/* x (T, H), gate (T,) -> y (T, H): each row times the sigmoid of its number. */
EXPORT void gate_rows(const float *x, const float *gate, float *y, int64_t T, int64_t H) {
  for (int64_t t = 0; t < T; t++, x += H, y += H) {
    const float weight = (1.0f / (exp_(splat(-gate[t])) + 1.0f))[0];
    for (int64_t h = 0; h < H; h++) y[h] = x[h] * weight;
  }
}

/* The matrices (E, N, K) of all experts, their biases (E, N) or null; format and row_bytes as in Product. */
typedef struct {
  const uint8_t *w;
  const float *bias;
  int64_t format, row_bytes;
} Experts;

/* y (n, N) = x (n, K) @ the matrix of expert e, transposed, + its bias. */
static void expert_linear(const Experts *m, int64_t e, const float *x, float *y, int64_t n, int64_t N, int64_t K) {
  const float *bias = m->bias ? m->bias + e * N : 0;
  multiply_together(&(Product){m->format, x, bias, 0, m->w + e * N * m->row_bytes, y, n, N, K, N, m->row_bytes});
}

/* x (T, H), weights (T, E) -> y (T, H): the sum over the experts with a weight of weight * down(act(gate_up(x))).
 * gate_up (E, 2 * I, H) and down (E, H, I), their biases (E, 2 * I) and (E, H) or null. rows (T,), in (T, H),
 * inner (T, 3 * I) and out (T, H) are for its own use. */
EXPORT void experts(const float *x, const float *weights, const uint8_t *gate_up, const float *gate_up_bias,
                    int64_t gate_up_format, int64_t gate_up_bytes, const uint8_t *down, const float *down_bias,
                    int64_t down_format, int64_t down_bytes, float *y, int64_t *rows, float *in, float *inner, float *out,
                    int64_t T, int64_t E, int64_t H, int64_t I, int64_t kind, float limit, float alpha) {
  const Experts first = {gate_up, gate_up_bias, gate_up_format, gate_up_bytes};
  const Experts last = {down, down_bias, down_format, down_bytes};
  memset(y, 0, 4 * T * H);
  for (int64_t e = 0; e < E; e++) {
    int64_t n = 0;
    for (int64_t t = 0; t < T; t++)
      if (weights[t * E + e] != 0) rows[n++] = t;
    if (!n) continue;
    for (int64_t i = 0; i < n; i++) memcpy(in + i * H, x + rows[i] * H, 4 * H);
    float *activated = inner + 2 * I * T;
    expert_linear(&first, e, in, inner, n, 2 * I, H);
    act_and_mul(inner, activated, n, I, kind, limit, alpha);
    expert_linear(&last, e, activated, out, n, H, I);
    for (int64_t i = 0; i < n; i++) {
      const float w = weights[rows[i] * E + e];
      float *sum = y + rows[i] * H;
      for (int64_t h = 0; h < H; h++) sum[h] = sum[h] + out[i * H + h] * w;
    }
  }
}
