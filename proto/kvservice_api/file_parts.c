/* Parts of a file, read into memory, with the xxh3-64 of ranges of them. One call does it for many parts: a thread that
 * reads small parts would else wait for the interpreter's lock before and after each of them. Used by
 * kvservice_api/file_parts.py, which has the same in Python.
 */

#define Py_LIMITED_API 0x030B0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <errno.h>
#include <sys/uio.h>

#include "file_parts.h"
#include "xxh3.h"

enum {
    GAP_BYTES = 64 << 10, /* Between parts of one read. The number is also in file_parts.py. */
    VECTORS = 512         /* In one system call, and one more at most; Linux takes 1024. */
};

static uint8_t gap[GAP_BYTES] __attribute__((aligned(4096))); /* The bytes there; they are not used. */

typedef struct {
    int64_t begin, end; /* In its part. */
} Range;

typedef struct {
    int64_t position;
    Py_buffer into, ranges;
} Part;

/* Fill the first of these parts, and those after it that one system call reaches. Returns how many; `is_read` is whether
 * all bytes were there. */
static Py_ssize_t read_run(int fd, const Part *parts, Py_ssize_t count, int *is_read) {
    struct iovec vectors[VECTORS + 1];
    int64_t begin = parts->position, end = begin, found;
    Py_ssize_t used = 0;
    int vector_count = 0;
    for (; used < count && vector_count < VECTORS; used++) {
        const Part *part = &parts[used];
        if (used && (part->position < end || part->position - end > GAP_BYTES)) break;
        if (part->position > end) vectors[vector_count++] = (struct iovec){gap, part->position - end};
        vectors[vector_count++] = (struct iovec){part->into.buf, part->into.len};
        end = part->position + part->into.len;
    }
    do found = preadv(fd, vectors, vector_count, begin);
    while (found < 0 && errno == EINTR);
    *is_read = found == end - begin;
    return used;
}

static int get_parts(PyObject *objects, Part *parts, Py_ssize_t count, Py_ssize_t *got, int64_t sum_count) {
    for (Py_ssize_t at = 0; at < count; at++) {
        Part *part = &parts[at];
        PyObject *object = PySequence_GetItem(objects, at);
        long long position;
        int failed = !object || !PyArg_ParseTuple(object, "Lw*y*", &position, &part->into, &part->ranges);
        Py_XDECREF(object);
        if (failed) return -1;
        part->position = position;
        *got = at + 1;
        const Range *ranges = part->ranges.buf;
        int64_t range_count = part->ranges.len / (int64_t)sizeof *ranges;
        int is_right = part->position >= 0 && part->position <= INT64_MAX - part->into.len;
        if (part->ranges.len % sizeof *ranges) is_right = 0;
        for (const Range *range = ranges; is_right && range < ranges + range_count; range++)
            is_right = range->begin >= 0 && range->begin <= range->end && range->end <= part->into.len;
        sum_count -= range_count;
        if (!is_right || sum_count < 0 || (at == count - 1 && sum_count)) {
            PyErr_SetString(PyExc_ValueError, "a part is outside any file, or a range outside its part");
            return -1;
        }
    }
    return 0;
}

PyObject *read_parts(PyObject *module, PyObject *given) {
    PyObject *objects, *result = NULL;
    Py_buffer sums = {0};
    Part *parts = NULL;
    Py_ssize_t got = 0, count;
    int fd;
    if (!PyArg_ParseTuple(given, "iOw*", &fd, &objects, &sums)) return NULL;
    if ((count = PySequence_Size(objects)) < 0) goto end;
    parts = PyMem_Calloc(count + 1, sizeof *parts);
    result = PyBytes_FromStringAndSize(NULL, count);
    if (!parts || !result) {
        PyErr_NoMemory();
        goto failed;
    }
    if (get_parts(objects, parts, count, &got, sums.len / (int64_t)sizeof(uint64_t))) goto failed;
    char *are_read = PyBytes_AsString(result);
    Py_BEGIN_ALLOW_THREADS
    uint64_t *found = sums.buf;
    for (Py_ssize_t at = 0; at < count;) {
        int is_read;
        Py_ssize_t end = at + read_run(fd, &parts[at], count - at, &is_read);
        for (; at < end; at++) {
            const Range *ranges = parts[at].ranges.buf, *after = ranges + parts[at].ranges.len / (Py_ssize_t)sizeof *ranges;
            are_read[at] = is_read;
            for (const Range *range = ranges; range < after; range++, found++) {
                Sum sum;
                if (!is_read) continue;
                begin_sum(&sum, (const uint8_t *)parts[at].into.buf + range->begin, range->end - range->begin);
                *found = end_sum(&sum);
            }
        }
    }
    Py_END_ALLOW_THREADS
    goto end;
failed:
    Py_CLEAR(result);
end:
    for (Py_ssize_t at = 0; at < got; at++) {
        PyBuffer_Release(&parts[at].into);
        PyBuffer_Release(&parts[at].ranges);
    }
    PyMem_Free(parts);
    PyBuffer_Release(&sums);
    return result;
}
