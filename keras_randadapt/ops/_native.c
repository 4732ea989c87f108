/* Transforms on a CPU, see native.py.

A program of native.py is applied to a few rows at a time, so that these stay in
the first-level cache through all operations: memory is read once and written
once. Rows are distributed to threads.

This file does not use Python, and Python cannot import it. native.py calls
`randadapt_apply` by ctypes, XLA calls `randadapt_xla_handler`, and TensorFlow
gets an operation when it loads this library.
*/

#include <dlfcn.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* The version of the format that native.py and this file share. */
#define FORMAT 1

/* This compiles a function for several generations of processors, and one is
   chosen when the library is loaded. Clang's version always chooses the
   oldest, so it is not used there. */
#if defined(__x86_64__) && defined(__gnu_linux__) && !defined(__clang__) && \
    __GNUC__ >= 12
#define FOR_EVERY_PROCESSOR                                       \
  __attribute__((target_clones("default", "arch=x86-64-v3",       \
                               "arch=x86-64-v4")))
#else
#define FOR_EVERY_PROCESSOR
#endif
#define INLINE static inline __attribute__((always_inline))

#define LANES 8
/* The floats of a block of rows. With a copy, they fill a part of the
   first-level cache. */
#define BLOCK 2048
#define CACHE_LINE 64
/* The rows of a product whose sums are in registers at a time. */
#define DENSE_ROWS 6
/* The floats that a thread takes at a time. */
#define SHARE 65536
/* The least number of shares for which starting a thread pays. */
#define SHARES_OF_THREAD 4
#define MAX_THREADS 256

typedef float vec __attribute__((vector_size(4 * LANES)));
/* The same in memory, where it need not be aligned. */
typedef float loose __attribute__((vector_size(4 * LANES), aligned(4),
                                   may_alias));
/* Two vectors, or one on processors with longer ones. */
typedef float wide __attribute__((vector_size(8 * LANES)));
typedef float loose_wide __attribute__((vector_size(8 * LANES), aligned(4),
                                        may_alias));

/* The operations have the same numbers in native.py. */
enum kind { RADIX, RUN, DENSE, GATHER, SCATTER, RESIZE, SCALE };

typedef struct {
  int32_t kind;
  int32_t input_dim;
  int32_t output_dim;
  /* The data are (outer, columns, right) and become (outer, rows, right). */
  int32_t outer;
  int32_t rows;
  int32_t columns;
  int32_t right;
  /* The place of its numbers among the floats, or of its index among the
     integers. It is -1 if there are none. */
  int32_t numbers;
  /* The place of a vector that the input is multiplied by first, or -1. */
  int32_t vector;
  /* The place of a number for the same purpose, or -1. */
  int32_t scale;
} operation;

typedef struct {
  int32_t input_dim;
  int32_t output_dim;
  int32_t largest_dim;
  int32_t count;
  operation operations[];
} program;

/* The rows of a matrix, of which each thread takes a share at a time. */
typedef struct {
  const program *program;
  const float *floats;
  const float *x;
  const float *before;
  const float *after;
  float *y;
  int64_t rows;
  int64_t share;
  atomic_llong next;
  atomic_int status;
} work;

/* OpenMP's function that runs a function in some threads and waits. */
typedef void parallel(void (*function)(void *), void *argument,
                      unsigned threads, unsigned flags);

INLINE vec load(const float *x) { return *(const loose *)x; }
INLINE void store(float *y, vec v) { *(loose *)y = v; }

#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(v, ...) __builtin_shufflevector(v, v, __VA_ARGS__)
#else
#define SHUFFLE(v, ...) \
  __builtin_shuffle(v, (int __attribute__((vector_size(32)))){__VA_ARGS__})
#endif

/* The Hadamard transform across `size` vectors. */
INLINE void across(vec *v, int size) {
#pragma GCC unroll 16
  for (int h = 1; h < size; h *= 2) {
#pragma GCC unroll 16
    for (int i = 0; i < size; i++) {
      if (!(i & h)) {
        vec sum = v[i] + v[i + h];
        v[i + h] = v[i] - v[i + h];
        v[i] = sum;
      }
    }
  }
}

/* The Hadamard transform of order 8 within a vector. */
INLINE vec within(vec v) {
  const vec by1 = {1, -1, 1, -1, 1, -1, 1, -1};
  const vec by2 = {1, 1, -1, -1, 1, 1, -1, -1};
  const vec by4 = {1, 1, 1, 1, -1, -1, -1, -1};
  v = v * by1 + SHUFFLE(v, 1, 0, 3, 2, 5, 4, 7, 6);
  v = v * by2 + SHUFFLE(v, 2, 3, 0, 1, 6, 7, 4, 5);
  return v * by4 + SHUFFLE(v, 4, 5, 6, 7, 0, 1, 2, 3);
}

/* The Hadamard transform of order `size` along an axis. `right` is the distance
   of its coordinates, a multiple of 8. With `last`, the order is `8 * size`,
   along that axis and the 8 coordinates behind it. */
INLINE void radix(const float *x, float *y, const float *vector, float scale,
                  int64_t outer, int size, int64_t right, int last) {
  for (int64_t o = 0; o < outer; o++) {
    for (int64_t c = 0; c < right; c += LANES) {
      const int64_t start = o * size * right + c;
      vec v[16];
#pragma GCC unroll 16
      for (int i = 0; i < size; i++) {
        const int64_t at = start + i * right;
        v[i] = load(x + at);
        v[i] = vector ? v[i] * load(vector + at) : v[i] * scale;
      }
      across(v, size);
#pragma GCC unroll 16
      for (int i = 0; i < size; i++) {
        store(y + start + i * right, last ? within(v[i]) : v[i]);
      }
    }
  }
}

/* Computes `height` rows and 16 columns of a product. */
INLINE void dense_part(const float *x, float *y, const float *matrix,
                       int columns, int64_t right, int height) {
  wide sums[DENSE_ROWS];
#pragma GCC unroll 8
  for (int i = 0; i < height; i++) sums[i] = (wide){0};
  for (int j = 0; j < columns; j++) {
    const wide v = *(const loose_wide *)(x + j * right);
#pragma GCC unroll 8
    for (int i = 0; i < height; i++) sums[i] += matrix[i * columns + j] * v;
  }
#pragma GCC unroll 8
  for (int i = 0; i < height; i++) *(loose_wide *)(y + i * right) = sums[i];
}

INLINE void dense(const float *x, float *y, const float *matrix, int64_t outer,
                  int rows, int columns, int64_t right) {
  for (int64_t o = 0; o < outer; o++) {
    const float *from = x + o * columns * right;
    float *to = y + o * rows * right;
    int64_t c = 0;
    for (; c + 2 * LANES <= right; c += 2 * LANES) {
      int i = 0;
#define PART(height)                                                      \
  dense_part(from + c, to + i * right + c, matrix + i * columns, columns, \
             right, height)
      for (; i + DENSE_ROWS <= rows; i += DENSE_ROWS) PART(DENSE_ROWS);
      switch (rows - i) {
        case 5: PART(5); break;
        case 4: PART(4); break;
        case 3: PART(3); break;
        case 2: PART(2); break;
        case 1: PART(1); break;
      }
#undef PART
    }
    for (; c < right; c++) {
      for (int i = 0; i < rows; i++) {
        float sum = 0;
        for (int j = 0; j < columns; j++) {
          sum += matrix[i * columns + j] * from[j * right + c];
        }
        to[i * right + c] = sum;
      }
    }
  }
}

/* A product along the last axis. The matrix is transposed, and its rows are
   padded to a multiple of 8. */
INLINE void dense_last(const float *x, float *y, const float *matrix,
                       int64_t outer, int rows, int columns) {
  const int padded = (rows + LANES - 1) / LANES * LANES;
  for (int64_t o = 0; o < outer; o++) {
    const float *from = x + o * columns;
    float *to = y + o * rows;
    for (int i = 0; i < rows; i += LANES) {
      vec sum = {0};
      for (int j = 0; j < columns; j++) {
        sum += from[j] * load(matrix + (int64_t)j * padded + i);
      }
      if (i + LANES <= rows) {
        store(to + i, sum);
      } else {
        for (int k = 0; i + k < rows; k++) to[i + k] = sum[k];
      }
    }
  }
}

INLINE void multiply(const float *x, float *y, const float *vector, float scale,
                     int64_t dim) {
  for (int64_t i = 0; i < dim; i++) y[i] = x[i] * (vector ? vector[i] : scale);
}

/* Applies one operation to one row. */
INLINE void apply_operation(const operation *op, const program *p,
                            const float *floats, const float *x, float *y) {
  const float *vector = op->vector < 0 ? NULL : floats + op->vector;
  const float scale = op->scale < 0 ? 1 : floats[op->scale];
  const float *matrix = op->kind == DENSE ? floats + op->numbers : NULL;
  const int32_t *index = op->kind == GATHER || op->kind == SCATTER
                             ? (const int32_t *)p + op->numbers
                             : NULL;
  switch (op->kind) {
    case RADIX:
#define ORDER(size) \
  case size: radix(x, y, vector, scale, op->outer, size, op->right, 0); break
      switch (op->rows) {
        ORDER(2);
        ORDER(4);
        ORDER(8);
        ORDER(16);
      }
#undef ORDER
      break;
    case RUN:
#define ORDER(size)                                                      \
  case LANES * size: radix(x, y, vector, scale, op->outer, size, LANES, 1); \
    break
      switch (op->rows) {
        ORDER(1);
        ORDER(2);
        ORDER(4);
        ORDER(8);
      }
#undef ORDER
      break;
    case DENSE:
      if (op->right == 1) {
        dense_last(x, y, matrix, op->outer, op->rows, op->columns);
      } else {
        dense(x, y, matrix, op->outer, op->rows, op->columns, op->right);
      }
      break;
    case GATHER:
      for (int i = 0; i < op->output_dim; i++) y[i] = x[index[i]];
      break;
    case SCATTER:
      memset(y, 0, sizeof(float) * op->output_dim);
      for (int i = 0; i < op->input_dim; i++) y[index[i]] = x[i];
      break;
    case RESIZE: {
      const int32_t common = op->input_dim < op->output_dim ? op->input_dim
                                                            : op->output_dim;
      memcpy(y, x, sizeof(float) * common);
      memset(y + common, 0, sizeof(float) * (op->output_dim - common));
      break;
    }
    case SCALE:
      multiply(x, y, vector, scale, op->output_dim);
      break;
  }
}

INLINE int in_place(int32_t kind) {
  return kind == RADIX || kind == RUN || kind == SCALE;
}

/* Prefetches a part of some memory. Otherwise memory would be idle while a
   row's operations work in cache. */
INLINE void fetch(const void *memory, int64_t bytes, int64_t part,
                  int64_t parts, const int writing) {
  const int64_t end = bytes * (part + 1) / parts;
  int64_t at = bytes * part / parts / CACHE_LINE * CACHE_LINE;
  for (; at < end; at += CACHE_LINE) {
    const char *line = (const char *)memory + at;
    /* Clang allows only literals as arguments. */
    if (writing) {
      __builtin_prefetch(line, 1, 3);
    } else {
      __builtin_prefetch(line, 0, 3);
    }
  }
}

FOR_EVERY_PROCESSOR
static void apply_to_rows(const work *w, int64_t first, int64_t end, float *one,
                          float *other) {
  const program *p = w->program;
  const int64_t block = p->largest_dim < BLOCK ? BLOCK / p->largest_dim : 1;
  for (int64_t row = first; row < end; row += block) {
    const int64_t n = end - row < block ? end - row : block;
    const float *x = w->x + row * p->input_dim;
    float *result = w->y + row * p->output_dim;
    if (w->before) {
      for (int64_t i = 0; i < n; i++) {
        multiply(x + i * p->input_dim, one + i * p->input_dim, w->before, 1,
                 p->input_dim);
      }
      x = one;
    }
    const float *following = w->x + (row + n) * p->input_dim;
    const int64_t left = end - row - n < block ? end - row - n : block;
    const int64_t input_bytes = sizeof(float) * left * p->input_dim;
    const int64_t output_bytes = sizeof(float) * n * p->output_dim;
    for (int32_t k = 0; k < p->count; k++) {
      const operation *op = p->operations + k;
      float *y = result;
      if (k + 1 < p->count || w->after) {
        y = (x == one) == in_place(op->kind) ? one : other;
      }
      for (int64_t i = 0; i < n; i++) {
        const int64_t part = k * n + i;
        fetch(following, input_bytes, part, n * p->count, 0);
        if (k + 1 < p->count) {
          fetch(result, output_bytes, part, n * (p->count - 1), 1);
        }
        apply_operation(op, p, w->floats, x + i * op->input_dim,
                        y + i * op->output_dim);
      }
      x = y;
    }
    if (w->after) {
      for (int64_t i = 0; i < n; i++) {
        multiply(x + i * p->output_dim, result + i * p->output_dim, w->after, 1,
                 p->output_dim);
      }
    }
  }
}

static void do_shares(void *argument) {
  work *w = argument;
  const int32_t largest = w->program->largest_dim;
  const size_t size = largest < BLOCK ? BLOCK : largest;
  float *space = malloc(2 * sizeof(float) * size + CACHE_LINE);
  if (!space) {
    w->status = -1;
    return;
  }
  float *aligned =
      (float *)(((uintptr_t)space + CACHE_LINE - 1) / CACHE_LINE * CACHE_LINE);
  int64_t first;
  while ((first = atomic_fetch_add(&w->next, w->share)) < w->rows) {
    const int64_t end = first + w->share;
    apply_to_rows(w, first, end < w->rows ? end : w->rows, aligned,
                  aligned + size);
  }
  free(space);
}

static void *thread(void *argument) {
  do_shares(argument);
  return NULL;
}

int32_t randadapt_format(void) { return FORMAT; }

/* Applies a program to the rows of a matrix. It returns 0, or -1 if there is
   not enough memory.

   `before` and `after` may be NULL. If `run_parallel` is NULL, threads are
   started here. */
int randadapt_apply(const int32_t *integers, const float *floats,
                    const float *x, const float *before, const float *after,
                    float *y, int64_t rows, int32_t threads,
                    parallel *run_parallel) {
  const program *p = (const program *)integers;
  const int64_t shares = rows * p->largest_dim / SHARE;
  const int64_t worth = run_parallel ? shares : shares / SHARES_OF_THREAD;
  int64_t count = threads < worth ? threads : worth;
  if (count > MAX_THREADS) count = MAX_THREADS;
  work w = {.program = p,
            .floats = floats,
            .x = x,
            .before = before,
            .after = after,
            .y = y,
            .rows = rows,
            .share = SHARE / p->largest_dim + 1};
  if (count > 1 && run_parallel) {
    run_parallel(do_shares, &w, (unsigned)count, 0);
    return w.status;
  }
  pthread_t others[MAX_THREADS];
  int64_t started = 0;
  while (started + 1 < count &&
         !pthread_create(&others[started], NULL, thread, &w)) {
    started++;
  }
  do_shares(&w);
  for (int64_t i = 0; i < started; i++) pthread_join(others[i], NULL);
  return w.status;
}

/* The parts of XLA's typed interface for foreign functions that are used here.
   All structures of its C ABI begin with their size. */

typedef struct extension {
  size_t size;
  int type;
  struct extension *next;
} extension;

typedef struct {
  size_t size;
  extension *extensions;
  int major;
  int minor;
} xla_version;

typedef struct {
  size_t size;
  xla_version version;
  uint32_t traits;
} xla_metadata;

typedef struct {
  extension base;
  xla_metadata *metadata;
} metadata_extension;

typedef struct {
  size_t size;
  extension *extensions;
  const char *message;
  int code;
} xla_error;

typedef struct {
  size_t size;
  extension *extensions;
  void *error;
} xla_deletion;

typedef struct {
  size_t size;
  extension *extensions;
  void *context;
  int64_t *count;
} xla_threads;

typedef struct {
  size_t size;
  extension *extensions;
  xla_version version;
  const void *internal;
  void *(*create_error)(xla_error *);
  void *message_of_error;
  void (*delete_error)(xla_deletion *);
  void *others[9];
  void *(*count_threads)(xla_threads *);
} xla_interface;

typedef struct {
  size_t size;
  extension *extensions;
  int dtype;
  void *data;
  int64_t rank;
  int64_t *dims;
} xla_buffer;

typedef struct {
  size_t size;
  extension *extensions;
  int64_t count;
  int *types;
  void **values;
} xla_values;

typedef struct {
  size_t size;
  extension *extensions;
  const xla_interface *interface;
  void *context;
  int stage;
  xla_values arguments;
  xla_values results;
} xla_call;

enum { METADATA = 1, EXECUTE = 3, RESOURCE_EXHAUSTED = 8, UNIMPLEMENTED = 12 };
/* The newest version of XLA's interface that is known to have these
   structures. */
enum { XLA_MAJOR = 0, XLA_MINOR = 3 };

static void *xla_failure(const xla_call *call, const char *message, int code) {
  xla_error error = {sizeof error, NULL, message, code};
  return call->interface->create_error(&error);
}

/* The number of threads that XLA may use. Limits of XLA thus hold here too. */
static int32_t xla_thread_count(const xla_call *call) {
  int64_t count = 1;
  xla_threads threads = {sizeof threads, NULL, call->context, &count};
  if (call->interface->size < sizeof(xla_interface)) return 1;
  void *error = call->interface->count_threads(&threads);
  if (error) {
    /* XLA has no thread pool, so only the calling thread is used. */
    xla_deletion deletion = {sizeof deletion, NULL, error};
    call->interface->delete_error(&deletion);
    return 1;
  }
  return count < MAX_THREADS ? (int32_t)count : MAX_THREADS;
}

/* XLA's call. Its arguments are a matrix, and the integers and the floats of a
   program. */
void *randadapt_xla_handler(xla_call *call) {
  for (extension *e = call->extensions; e; e = e->next) {
    if (e->type == METADATA) {
      xla_metadata *metadata = ((metadata_extension *)e)->metadata;
      /* Old versions of XLA have no interface here. */
      const xla_interface *interface = call->interface;
      const int older = interface && interface->version.major == XLA_MAJOR &&
                        interface->version.minor < XLA_MINOR;
      metadata->version.major = XLA_MAJOR;
      metadata->version.minor = older ? interface->version.minor : XLA_MINOR;
      metadata->traits = 0;
      return NULL;
    }
  }
  if (call->stage != EXECUTE) return NULL;
  if (call->size < sizeof(xla_call) || call->arguments.count != 3 ||
      call->results.count != 1) {
    return xla_failure(call, "randadapt: called in another way", UNIMPLEMENTED);
  }
  const xla_buffer *x = call->arguments.values[0];
  const xla_buffer *integers = call->arguments.values[1];
  const xla_buffer *floats = call->arguments.values[2];
  const xla_buffer *y = call->results.values[0];
  int64_t rows = 1;
  for (int64_t i = 0; i + 1 < x->rank; i++) rows *= x->dims[i];
  if (randadapt_apply(integers->data, floats->data, x->data, NULL, NULL,
                      y->data, rows, xla_thread_count(call), NULL)) {
    return xla_failure(call, "randadapt: out of memory", RESOURCE_EXHAUSTED);
  }
  return NULL;
}

/* An operation for TensorFlow, with the parts of its C interface for operations
   and kernels that are used here (tensorflow/c/ops.h and kernels.h). */

#define FOR_EVERY_FUNCTION(DO)                                               \
  DO(void *, TF_NewOpDefinitionBuilder, (const char *name))                  \
  DO(void, TF_OpDefinitionBuilderAddAttr, (void *op, const char *spec))      \
  DO(void, TF_OpDefinitionBuilderAddInput, (void *op, const char *spec))     \
  DO(void, TF_OpDefinitionBuilderAddOutput, (void *op, const char *spec))    \
  DO(void, TF_OpDefinitionBuilderSetShapeInferenceFunction,                  \
     (void *op, void (*function)(void *, void *)))                           \
  DO(void, TF_ShapeInferenceContextSetUnknownShape,                          \
     (void *context, void *status))                                          \
  DO(void, TF_RegisterOpDefinition, (void *op, void *status))                \
  DO(void *, TF_NewKernelBuilder,                                            \
     (const char *op, const char *device, void *(*create)(void *),           \
      void (*compute)(void *, void *), void (*destroy)(void *)))             \
  DO(void, TF_RegisterKernelBuilder,                                         \
     (const char *name, void *builder, void *status))                        \
  DO(void *, TF_NewStatus, (void))                                           \
  DO(void, TF_DeleteStatus, (void *status))                                  \
  DO(int, TF_GetCode, (const void *status))                                  \
  DO(void, TF_SetStatus, (void *status, int code, const char *message))      \
  DO(void, TF_OpKernelConstruction_GetAttrInt32,                             \
     (void *context, const char *name, int32_t *value, void *status))        \
  DO(void, TF_OpKernelConstruction_Failure, (void *context, void *status))   \
  DO(void, TF_OpKernelContext_Failure, (void *context, void *status))        \
  DO(void, TF_GetInput,                                                      \
     (void *context, int index, void **tensor, void *status))                \
  DO(void *, TF_AllocateOutput,                                              \
     (void *context, int index, int dtype, const int64_t *dims, int rank,    \
      size_t bytes, void *status))                                           \
  DO(int, TF_NumDims, (const void *tensor))                                  \
  DO(int64_t, TF_Dim, (const void *tensor, int axis))                        \
  DO(void *, TF_TensorData, (const void *tensor))                            \
  DO(void, TF_DeleteTensor, (void *tensor))

#define MEMBER(result, name, arguments) result(*name) arguments;
static struct { FOR_EVERY_FUNCTION(MEMBER) } tf;
#undef MEMBER

enum { TF_FLOAT = 1 };
enum { TF_OK, TF_INVALID_ARGUMENT = 3, TF_RESOURCE_EXHAUSTED = 8 };

/* The state of a kernel is the number of threads that it may use. */
static void *tensorflow_create(void *context) {
  void *status = tf.TF_NewStatus();
  int32_t *threads = malloc(sizeof *threads);
  if (threads) {
    tf.TF_OpKernelConstruction_GetAttrInt32(context, "threads", threads,
                                            status);
  } else {
    tf.TF_SetStatus(status, TF_RESOURCE_EXHAUSTED, "randadapt: out of memory");
  }
  if (tf.TF_GetCode(status) != TF_OK) {
    tf.TF_OpKernelConstruction_Failure(context, status);
  }
  tf.TF_DeleteStatus(status);
  return threads;
}

static void tensorflow_apply(const int32_t *threads, void *context,
                             void **inputs, void *status) {
  void *x = inputs[0];
  const program *p = tf.TF_TensorData(inputs[1]);
  if (tf.TF_NumDims(x) != 2 || tf.TF_Dim(x, 1) != p->input_dim) {
    tf.TF_SetStatus(status, TF_INVALID_ARGUMENT,
                    "randadapt: `x` must be a matrix of the input dimension");
    return;
  }
  const int64_t dims[2] = {tf.TF_Dim(x, 0), p->output_dim};
  const size_t bytes = sizeof(float) * dims[0] * dims[1];
  void *y = tf.TF_AllocateOutput(context, 0, TF_FLOAT, dims, 2, bytes, status);
  if (tf.TF_GetCode(status) != TF_OK) return;
  if (randadapt_apply(tf.TF_TensorData(inputs[1]), tf.TF_TensorData(inputs[2]),
                      tf.TF_TensorData(x), NULL, NULL, tf.TF_TensorData(y),
                      dims[0], *threads, NULL)) {
    tf.TF_SetStatus(status, TF_RESOURCE_EXHAUSTED, "randadapt: out of memory");
  }
  tf.TF_DeleteTensor(y);
}

static void tensorflow_compute(void *kernel, void *context) {
  void *status = tf.TF_NewStatus();
  void *inputs[3] = {NULL};
  for (int i = 0; i < 3 && tf.TF_GetCode(status) == TF_OK; i++) {
    tf.TF_GetInput(context, i, &inputs[i], status);
  }
  if (tf.TF_GetCode(status) == TF_OK) {
    tensorflow_apply(kernel, context, inputs, status);
  }
  if (tf.TF_GetCode(status) != TF_OK) {
    tf.TF_OpKernelContext_Failure(context, status);
  }
  for (int i = 0; i < 3; i++) {
    if (inputs[i]) tf.TF_DeleteTensor(inputs[i]);
  }
  tf.TF_DeleteStatus(status);
}

/* TensorFlow takes operations that register themselves while it loads a
   library. A second registration would end the process, so tensorflow.py says
   when to register. */
__attribute__((constructor)) static void tensorflow_register(void) {
  if (!getenv("_KERAS_RANDADAPT_REGISTER")) return;
  void *library = dlopen("libtensorflow_framework.so.2", RTLD_NOLOAD | RTLD_LAZY);
  if (!library) return;
  int complete = 1;
#define FIND(result, name, arguments)                  \
  *(void **)&tf.name = dlsym(library, #name);          \
  complete = complete && tf.name;
  FOR_EVERY_FUNCTION(FIND)
#undef FIND
  /* The library stays in memory; this only restores its reference count. */
  dlclose(library);
  if (!complete) return;
  void *status = tf.TF_NewStatus();
  void *op = tf.TF_NewOpDefinitionBuilder("KerasRandadaptTransform");
  tf.TF_OpDefinitionBuilderAddInput(op, "x: float");
  tf.TF_OpDefinitionBuilderAddInput(op, "integers: int32");
  tf.TF_OpDefinitionBuilderAddInput(op, "floats: float");
  /* These are for the gradient, which is the same operation with these as
     `integers` and `floats`. */
  tf.TF_OpDefinitionBuilderAddInput(op, "transposed_integers: int32");
  tf.TF_OpDefinitionBuilderAddInput(op, "transposed_floats: float");
  tf.TF_OpDefinitionBuilderAddOutput(op, "y: float");
  tf.TF_OpDefinitionBuilderAddAttr(op, "threads: int");
  tf.TF_OpDefinitionBuilderSetShapeInferenceFunction(
      op, tf.TF_ShapeInferenceContextSetUnknownShape);
  tf.TF_RegisterOpDefinition(op, status);
  if (tf.TF_GetCode(status) == TF_OK) {
    void *kernel =
        tf.TF_NewKernelBuilder("KerasRandadaptTransform", "CPU",
                               tensorflow_create, tensorflow_compute, free);
    tf.TF_RegisterKernelBuilder("KerasRandadaptTransform", kernel, status);
  }
  tf.TF_DeleteStatus(status);
}
