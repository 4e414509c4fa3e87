/* Copies of slices, with their xxh3-64 checksums taken in the same pass: each KiB is read from memory once, summed,
 * and written from the first-level cache. Used by kvservice_api/copying.py, which has the same in Python.
 *
 * Large targets are written past the caches ("streaming"): their lines need not be read first. With AVX2 if the
 * processor has it.
 *
 * Only the limited API of Python 3.11: one file serves every later version.
 */

#define Py_LIMITED_API 0x030B0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "file_parts.h"
#include "socket_buffers.h"
#include "stream_copy.h"
#include "tls_contexts.h"

enum { ARGUMENTS = 5 }; /* A number for the arguments of its functions: copying.py uses no file of another one. */

int has_avx2;

typedef struct {
    int64_t source, offset, size, runs; /* The source's number, the slice's place in it, and how many runs are copied. */
} Slice;

typedef struct {
    int64_t target, offset, begin, rows, row_bytes, stride; /* `begin` counts within the slice. */
} Run;

typedef struct {
    Py_buffer *views;
    int64_t (*extents)[2]; /* Bytes that belong to it, counted from its `buf`. */
    Py_ssize_t count;
} Buffers;

static const uint8_t *begin_of(const Slice *slice, const Buffers *sources) {
    return (const uint8_t *)sources->views[slice->source].buf + slice->offset;
}

/* `next` is the slice that is copied after this one, or NULL. */
static uint64_t copy_slice(const uint8_t *source, size_t size, const Run *runs, size_t count, const Py_buffer *targets,
                           int summed, int streaming, const uint8_t *next) {
    Sum sum;
    begin_sum(&sum, source, size);
    for (const Run *run = runs; run < runs + count; run++) {
        if (run->rows == 0 || run->row_bytes == 0) continue;
        uint8_t *target = (uint8_t *)targets[run->target].buf + run->offset;
        size_t begin = run->begin, row_bytes = run->row_bytes;
        for (int64_t row = 0; row < run->rows; row++, target += run->stride, begin += row_bytes)
            for (size_t done = 0, size_now; done < row_bytes; done += size_now) {
                size_now = CHUNK - ((uintptr_t)(target + done) & 63); /* The next part begins at a cache line. */
                if (size_now > row_bytes - done) size_now = row_bytes - done;
                if (summed) sum_until(&sum, begin + done + size_now);
                copy_bytes(target + done, source + begin + done, size_now, streaming);
            }
    }
    if (!summed) return 0;
    sum_until(&sum, size);
    if (next) fetch_first(next);
    return end_sum(&sum);
}

/* Python */

static void release_buffers(Buffers *buffers) {
    for (Py_ssize_t at = 0; at < buffers->count; at++) PyBuffer_Release(&buffers->views[at]);
    PyMem_Free(buffers->views);
    PyMem_Free(buffers->extents);
}

static int get_buffers(PyObject *objects, int flags, Buffers *buffers) {
    Py_ssize_t count = PySequence_Size(objects);
    memset(buffers, 0, sizeof *buffers);
    if (count < 0) return -1;
    buffers->views = PyMem_Calloc(count + 1, sizeof *buffers->views);
    buffers->extents = PyMem_Calloc(count + 1, sizeof *buffers->extents);
    if (!buffers->views || !buffers->extents) {
        PyErr_NoMemory();
        return -1;
    }
    for (Py_ssize_t at = 0; at < count; at++) {
        Py_buffer *view = &buffers->views[at];
        PyObject *object = PySequence_GetItem(objects, at);
        int failed = !object || PyObject_GetBuffer(object, view, flags);
        Py_XDECREF(object);
        if (failed) return -1;
        buffers->count++;
        int64_t first = 0, end = view->itemsize;
        for (int axis = 0; axis < view->ndim; axis++) {
            if (view->shape[axis] == 0) end = first = 0, axis = view->ndim;
            else if (view->strides[axis] < 0) first += view->strides[axis] * (view->shape[axis] - 1);
            else end += view->strides[axis] * (view->shape[axis] - 1);
        }
        buffers->extents[at][0] = first;
        buffers->extents[at][1] = end;
    }
    return 0;
}

static int is_within(const Buffers *buffers, int64_t number, int64_t first, int64_t end) {
    return number >= 0 && number < buffers->count && first >= buffers->extents[number][0] && first <= end &&
           end <= buffers->extents[number][1];
}

static int fits(const Slice *slices, int64_t slice_count, const Run *runs, int64_t run_count, const Buffers *sources,
                const Buffers *targets) {
    int64_t used = 0;
    for (const Slice *slice = slices; slice < slices + slice_count; slice++) {
        int64_t end;
        if (slice->size < 0 || slice->runs < 0 || slice->runs > run_count - used) return 0;
        if (__builtin_add_overflow(slice->offset, slice->size, &end)) return 0;
        if (!is_within(sources, slice->source, slice->offset, end)) return 0;
        for (const Run *run = runs + used; run < runs + used + slice->runs; run++) {
            int64_t bytes, span, first = run->offset, last;
            if (run->rows < 0 || run->row_bytes < 0 || run->begin < 0) return 0;
            if (run->target < 0 || run->target >= targets->count) return 0;
            if (run->rows == 0 || run->row_bytes == 0) continue;
            if (__builtin_mul_overflow(run->rows, run->row_bytes, &bytes) || run->begin > slice->size) return 0;
            if (bytes > slice->size - run->begin) return 0;
            if (__builtin_mul_overflow(run->rows - 1, run->stride, &span)) return 0;
            if (__builtin_add_overflow(run->offset, span, &last)) return 0;
            if (last < first) first = last, last = run->offset;
            if (__builtin_add_overflow(last, run->row_bytes, &last)) return 0;
            if (!is_within(targets, run->target, first, last)) return 0;
        }
        used += slice->runs;
    }
    return used == run_count;
}

static PyObject *copy_slices(PyObject *module, PyObject *given) {
    PyObject *source_objects, *target_objects;
    Py_buffer slice_table = {0}, run_table = {0}, sums = {0};
    Buffers sources = {0}, targets = {0};
    int streaming, is_done = 0;
    if (!PyArg_ParseTuple(given, "OOy*y*w*p", &source_objects, &target_objects, &slice_table, &run_table, &sums,
                          &streaming))
        return NULL;
    int64_t slice_count = slice_table.len / (int64_t)sizeof(Slice), run_count = run_table.len / (int64_t)sizeof(Run);
    if (get_buffers(source_objects, PyBUF_STRIDES, &sources)) goto end;
    if (get_buffers(target_objects, PyBUF_STRIDES | PyBUF_WRITABLE, &targets)) goto end;
    const Slice *slices = slice_table.buf;
    const Run *runs = run_table.buf;
    uint64_t *found = sums.buf;
    int summed = sums.len != 0;
    if ((summed && sums.len != slice_count * (int64_t)sizeof *found) || slice_table.len % sizeof(Slice) ||
        run_table.len % sizeof(Run) || !fits(slices, slice_count, runs, run_count, &sources, &targets)) {
        PyErr_SetString(PyExc_ValueError, "a slice or a run is outside its buffer");
        goto end;
    }
    Py_BEGIN_ALLOW_THREADS
    streaming = streaming && has_avx2;
    for (int64_t at = 0; at < slice_count; at++) {
        const uint8_t *next = at + 1 < slice_count ? begin_of(&slices[at + 1], &sources) : NULL;
        uint64_t sum = copy_slice(begin_of(&slices[at], &sources), slices[at].size, runs, slices[at].runs,
                                  targets.views, summed, streaming, next);
        if (summed) found[at] = sum;
        runs += slices[at].runs;
    }
#if HAS_X86
    if (streaming) _mm_sfence();
#endif
    Py_END_ALLOW_THREADS
    is_done = 1;
end:
    release_buffers(&sources);
    release_buffers(&targets);
    PyBuffer_Release(&slice_table);
    PyBuffer_Release(&run_table);
    PyBuffer_Release(&sums);
    if (!is_done) return NULL;
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"copy_slices", copy_slices, METH_VARARGS,
     "copy_slices(sources, targets, slices, runs, sums, streaming): `copy_slices` of kvservice_api/copying.py."},
    {"move_buffers", move_buffers, METH_VARARGS,
     "move_buffers(fd, watched_fd, is_sending, buffers, first, offset, sums, partial, streamed, turn_bytes, wait_s): why it ends,\n"
     "the first buffer that is not complete, how much of it has moved, how many bytes. See kvservice_api/socket_buffers.py."},
    {"read_ahead", read_ahead, METH_VARARGS,
     "read_ahead(make, buffer_bytes): the context that `make` returns. See kvservice_api/tls_contexts.py."},
    {"read_parts", read_parts, METH_VARARGS,
     "read_parts(fd, parts, sums): a byte per part, 1 if it was read. See kvservice_api/file_parts.py."},
    {NULL, NULL, 0, NULL},
};

static int begin_module(PyObject *module) {
#if HAS_X86
    __builtin_cpu_init();
    has_avx2 = __builtin_cpu_supports("avx2") != 0;
#endif
    return PyModule_AddIntConstant(module, "has_avx2", has_avx2) ||
                   PyModule_AddIntConstant(module, "arguments", ARGUMENTS)
               ? -1
               : 0;
}

static PyModuleDef_Slot module_slots[] = {{Py_mod_exec, begin_module}, {0, NULL}};

static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_copying", NULL, 0, methods, module_slots, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__copying(void) { return PyModuleDef_Init(&definition); }
