/* Included by cpu_kernels.c: threads that work together. A leader's products are cut along the rows of W, its attention by
 * KV heads, and whoever helps takes pieces as well. No output depends on who computes it, and none on its neighbours:
 * results are the same.
 *
 * A helper is in a job only between two counts of `inside`, and looks after the first whether the job is still open;
 * the leader closes it and then waits until nobody is inside. So nobody touches a job's memory when its product returns.
 */
#include <time.h>
#if defined(__linux__)
#include <sys/prctl.h>
#endif

#define PIECE (128 << 10) /* weights times rows of x of a piece, about: some microseconds */
#define SHARED (256 << 10) /* of a product from which on it is cut */
#define MOST_CREDIT_NS 3000000 /* about what help gives in a token of a small model */
#define LEAST_REST 64 /* jobs without help once it has cost more than it gave; doubled each time, up to MOST_REST */
#define MOST_REST 8192
#define SPIN_NS 50000 /* for which a helper looks for a job before it lets others onto its core */
#define LOOKS 64      /* between two looks at the clock */
#define NAP_NS 50000   /* for which it does then */
#define SLEEP_NS 1000000 /* or while the leader rests from it */

enum { FLOATS = -1 }; /* the format of a matrix that is not in blocks; kunserve/compute/cpu_ops.py knows it, too */

typedef struct {
  int64_t format; /* of `w`; FLOATS: none */
  const float *x, *bias, *residual;
  const uint8_t *w;
  float *y;
  int64_t M, N, K, Y, row_bytes;
} Product;

typedef struct {
  _Atomic int64_t job;              /* odd while there is one */
  _Atomic int64_t next;             /* row of W, or KV head, that nobody has taken */
  _Atomic int32_t helpers, inside;  /* threads that look for jobs; that are in one */
  _Atomic int64_t num_helped;       /* pieces that helpers have computed */
  Work *work;                       /* what is done with `data`, in pieces of `piece` until `end` */
  const void *data;
  int64_t end, piece;
  _Atomic int64_t alone;            /* jobs to come without help */
  int64_t rest;                     /* those after help has cost more once again */
  int64_t credit_ns;                /* that help has given beyond what it has cost, lately */
} Team;

static _Thread_local Team *led; /* whose leader the thread is, if any */

static void multiply(const void *product, int64_t n, int64_t N) {
  const Product *p = product;
  const uint8_t *w = p->w + n * p->row_bytes;
  const float *bias = p->bias ? p->bias + n : 0, *residual = p->residual ? p->residual + n : 0;
  if (p->format == FLOATS) multiply_floats(p->x, (const float *)w, bias, residual, p->y + n, p->M, N, p->K, p->Y);
  else multiply_blocks(p->format, p->x, w, bias, residual, p->y + n, p->M, N, p->K, p->Y, p->row_bytes);
}

/* Take pieces until there are none, or `leave` is set. */
static void take_pieces(Team *team, const _Atomic int32_t *leave) {
  const int64_t end = team->end, piece = team->piece;
  while (!leave || !atomic_load_explicit(leave, memory_order_relaxed)) {
    const int64_t n = atomic_fetch_add(&team->next, piece);
    if (n >= end) return;
    team->work(team->data, n, min_(piece, end - n));
    if (leave) atomic_fetch_add(&team->num_helped, 1);
  }
}

static void nap(int64_t ns) { nanosleep(&(struct timespec){.tv_nsec = ns}, 0); }

static void relax(void) {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

static int64_t now_ns(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1000000000 + t.tv_nsec;
}

/* Where other processes have the helper's core, its pieces come late, and help costs more than it gives: do without for
 * a while, the longer the more often that happens. One late piece is no reason: who streams a token has the core for a
 * moment, and the next hundred pieces come in time. Returns how many jobs are to come without help. */
EXPORT int64_t judge_help(Team *team, int64_t gained_ns, int64_t waited_ns) {
  team->credit_ns = min_(team->credit_ns + gained_ns - waited_ns, MOST_CREDIT_NS);
  if (team->credit_ns == MOST_CREDIT_NS) team->rest = 0;
  if (team->credit_ns < 0) {
    team->credit_ns = 0;
    team->rest = team->rest ? min_(2 * team->rest, MOST_REST) : LEAST_REST;
    atomic_store(&team->alone, team->rest);
  }
  return team->alone;
}

static void share(Work *work, const void *data, int64_t end, int64_t piece) {
  Team *team = led;
  if (!team || piece >= end || !atomic_load(&team->helpers) || team->alone > 0) {
    if (team && team->alone > 0) atomic_fetch_sub(&team->alone, 1);
    work(data, 0, end);
    return;
  }
  const int64_t start = now_ns(), helped_before = atomic_load(&team->num_helped);
  team->work = work;
  team->data = data;
  team->end = end;
  team->piece = piece;
  atomic_store(&team->next, 0);
  atomic_fetch_add(&team->job, 1);
  take_pieces(team, 0);
  atomic_fetch_add(&team->job, 1);
  const int64_t done = now_ns();
  int64_t waited = 0;
  if (atomic_load(&team->inside)) {
    while (atomic_load(&team->inside)) relax();
    waited = now_ns() - done;
  }
  const int64_t helped = atomic_load(&team->num_helped) - helped_before;
  const int64_t own = (end + piece - 1) / piece - helped; /* none if helpers took all */
  judge_help(team, (done - start) * helped / (own > 0 ? own : 1), waited);
}

/* Compute a product, with whoever helps this thread. */
static void multiply_together(const Product *p) {
  const int64_t rows = min_(PIECE / (p->K * min_(p->M, 16)), p->N / 4) / NR * NR;
  share(multiply, p, p->N, p->M * p->N * p->K < SHARED ? p->N : rows < 8 * NR ? 8 * NR : rows);
}

/* x (M, K), w (N, K), bias (N,) or null, residual (M, N) or null -> y (M, N); rows of the last two are Y floats apart, those
 * of w row_bytes. Of a w in blocks K is a multiple of 32. */
EXPORT void linear(const float *x, const uint8_t *w, const float *bias, const float *residual, float *y,
                   int64_t M, int64_t N, int64_t K, int64_t Y, int64_t format, int64_t row_bytes) {
  multiply_together(&(Product){format, x, bias, residual, w, y, M, N, K, Y, row_bytes});
}

EXPORT int64_t team_bytes(void) { return sizeof(Team); }
EXPORT int64_t pieces_helped(Team *team) { return atomic_load(&team->num_helped); }

/* Let this thread's products be computed with `team`, zeroed memory at first; null: by itself. */
EXPORT void lead(Team *team) { led = team; }

/* Take part in the work of the team's leader until `leave` is set; what was begun is finished. */
EXPORT void help(Team *team, const _Atomic int32_t *leave) {
  atomic_fetch_add(&team->helpers, 1);
  int64_t last = 0, awake_until = now_ns() + SPIN_NS;
#if defined(__linux__)
  prctl(PR_SET_TIMERSLACK, 1); /* else a nap takes twice as long */
#endif
  for (int64_t looks = 1; !atomic_load(leave); looks++) {
    const int64_t job = atomic_load(&team->job);
    if (job & 1 && job != last) {
      atomic_fetch_add(&team->inside, 1);
      if (atomic_load(&team->job) == job) take_pieces(team, leave);
      atomic_fetch_sub(&team->inside, 1);
      last = job;
      awake_until = now_ns() + SPIN_NS;
    } else if (atomic_load(&team->alone) > 0) nap(SLEEP_NS);
    else if (looks % LOOKS == 0 && now_ns() > awake_until) nap(NAP_NS);
    else relax();
  }
  atomic_fetch_sub(&team->helpers, 1);
}
