/* Parts of a file, read into memory, with the xxh3-64 of ranges of them. One call does it for many parts: a thread that
 * reads small parts would else wait for the interpreter's lock before and after each of them. Used by
 * kvservice_api/file_parts.py, which has the same in Python.
 *
 * Parts that do not follow one another are requested from the kernel together (Linux AIO), so that the drive has the next
 * request before it ends one, and they are summed in the order in which they come. Of a file without O_DIRECT the kernel
 * reads them one after another.
 */

#define Py_LIMITED_API 0x030B0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <errno.h>
#include <linux/aio_abi.h>
#include <pthread.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include "file_parts.h"
#include "xxh3.h"

enum {
    GAP_BYTES = 64 << 10, /* Between parts of one read. The number is also in file_parts.py. */
    VECTORS = 512,        /* Of one request, and one more at most; Linux takes 1024. */
    REQUESTS = 64         /* Of one thread that the kernel has at a time. */
};

static uint8_t gap[GAP_BYTES] __attribute__((aligned(4096))); /* The bytes there; they are not used. */

typedef struct {
    int64_t begin, end; /* In its part. */
} Range;

typedef struct {
    int64_t position;
    Py_buffer into, ranges;
    uint64_t *sums; /* One per range. */
    char *is_read;
} Part;

typedef struct {
    Part *first, *end;
    const struct iovec *vectors;
    int vector_count;
    int64_t begin, size;
} Request;

/* The request for the first of these parts, and for those after it that one system call reaches. Puts its vectors at
 * `vectors`, and returns their end. */
static struct iovec *make_request(Part *parts, Part *end_of_parts, struct iovec *vectors, Request *request) {
    struct iovec *const first = vectors;
    int64_t end = parts->position;
    Part *part = parts;
    for (; part < end_of_parts && vectors - first < VECTORS; part++) {
        if (part > parts && (part->position < end || part->position - end > GAP_BYTES)) break;
        if (part->position > end) *vectors++ = (struct iovec){gap, part->position - end};
        *vectors++ = (struct iovec){part->into.buf, part->into.len};
        end = part->position + part->into.len;
    }
    *request = (Request){parts, part, first, vectors - first, parts->position, end - parts->position};
    return vectors;
}

/* The parts of a request of which so many bytes were read. */
static void end_request(const Request *request, int64_t found) {
    for (Part *part = request->first; part < request->end; part++) {
        const Range *range = part->ranges.buf;
        uint64_t *sum = part->sums, *end = sum + part->ranges.len / (Py_ssize_t)sizeof *range;
        *part->is_read = found == request->size;
        for (; *part->is_read && sum < end; sum++, range++) {
            Sum begun;
            begin_sum(&begun, (const uint8_t *)part->into.buf + range->begin, range->end - range->begin);
            *sum = end_sum(&begun);
        }
    }
}

static pthread_once_t key_once = PTHREAD_ONCE_INIT;
static pthread_key_t queue_key; /* Of each thread: its aio_context_t, made with its first reads. */
static int has_key;

static void end_queue(void *queue) { syscall(SYS_io_destroy, (aio_context_t)queue); }

static void make_key(void) { has_key = !pthread_key_create(&queue_key, end_queue); }

/* 0 if the kernel has none for this thread: it may forbid them, or have too many. */
static aio_context_t queue_of_thread(void) {
    aio_context_t queue = 0;
    pthread_once(&key_once, make_key);
    if (!has_key) return 0;
    if (pthread_getspecific(queue_key)) return (aio_context_t)pthread_getspecific(queue_key);
    if (syscall(SYS_io_setup, REQUESTS, &queue)) return 0;
    if (!pthread_setspecific(queue_key, (void *)queue)) return queue;
    end_queue((void *)queue);
    return 0;
}

static void read_in_order(int fd, const Request *requests, const Request *end) {
    for (const Request *request = requests; request < end; request++) {
        int64_t found;
        do found = preadv(fd, request->vectors, request->vector_count, request->begin);
        while (found < 0 && errno == EINTR);
        end_request(request, found);
    }
}

/* Returns only once the kernel has ended all requests: until then it writes into their memory. */
static void read_together(aio_context_t queue, int fd, const Request *requests, const Request *end) {
    struct iocb blocks[REQUESTS], *submitted[REQUESTS];
    struct io_event events[REQUESTS];
    int running = 0;
    while (requests < end || running) {
        int count = 0;
        /* A batch is submitted once the one before has ended: each block is free then. */
        for (; !running && requests + count < end && count < REQUESTS; count++) {
            const Request *request = &requests[count];
            blocks[count] = (struct iocb){
                .aio_data = (uint64_t)(uintptr_t)request,
                .aio_lio_opcode = IOCB_CMD_PREADV,
                .aio_fildes = fd,
                .aio_buf = (uint64_t)(uintptr_t)request->vectors,
                .aio_nbytes = request->vector_count,
                .aio_offset = request->begin,
            };
            submitted[count] = &blocks[count];
        }
        if (count) {
            running = syscall(SYS_io_submit, queue, count, submitted);
            if (running <= 0) { /* Not even the first one: the caller reads its parts alone. */
                running = 0;
                end_request(requests++, -1);
                continue;
            }
            requests += running;
        }
        int ended = syscall(SYS_io_getevents, queue, 1, running, events, NULL); /* Fails only by a signal. */
        for (int at = 0; at < ended; at++) end_request((const Request *)(uintptr_t)events[at].data, events[at].res);
        if (ended > 0) running -= ended;
    }
}

static int get_parts(PyObject *objects, Part *parts, Py_ssize_t count, Py_ssize_t *got, uint64_t *sums,
                     int64_t sum_count, char *are_read) {
    for (Py_ssize_t at = 0; at < count; at++) {
        Part *part = &parts[at];
        PyObject *object = PySequence_GetItem(objects, at);
        long long position;
        int failed = !object || !PyArg_ParseTuple(object, "Lw*y*", &position, &part->into, &part->ranges);
        Py_XDECREF(object);
        if (failed) return -1;
        part->position = position;
        part->sums = sums;
        part->is_read = &are_read[at];
        *got = at + 1;
        const Range *ranges = part->ranges.buf;
        int64_t range_count = part->ranges.len / (int64_t)sizeof *ranges;
        int is_right = part->position >= 0 && part->position <= INT64_MAX - part->into.len;
        if (part->ranges.len % sizeof *ranges) is_right = 0;
        for (const Range *range = ranges; is_right && range < ranges + range_count; range++)
            is_right = range->begin >= 0 && range->begin <= range->end && range->end <= part->into.len;
        sums += range_count;
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
    Request *requests = NULL, *last;
    struct iovec *vectors = NULL, *free_vectors;
    Py_ssize_t got = 0, count;
    int fd;
    if (!PyArg_ParseTuple(given, "iOw*", &fd, &objects, &sums)) return NULL;
    if ((count = PySequence_Size(objects)) < 0) goto end;
    parts = PyMem_Calloc(count + 1, sizeof *parts);
    requests = last = PyMem_Calloc(count + 1, sizeof *requests);
    vectors = free_vectors = PyMem_Calloc(2 * count + 1, sizeof *vectors);
    result = PyBytes_FromStringAndSize(NULL, count);
    if (!parts || !requests || !vectors || !result) {
        PyErr_NoMemory();
        goto failed;
    }
    if (get_parts(objects, parts, count, &got, sums.buf, sums.len / (int64_t)sizeof(uint64_t), PyBytes_AsString(result)))
        goto failed;
    Py_BEGIN_ALLOW_THREADS
    for (Part *part = parts; part < parts + count; part = last++->end)
        free_vectors = make_request(part, parts + count, free_vectors, last);
    aio_context_t queue = last - requests > 1 ? queue_of_thread() : 0;
    if (queue) read_together(queue, fd, requests, last);
    else read_in_order(fd, requests, last);
    Py_END_ALLOW_THREADS
    goto end;
failed:
    Py_CLEAR(result);
end:
    for (Py_ssize_t at = 0; at < got; at++) {
        PyBuffer_Release(&parts[at].into);
        PyBuffer_Release(&parts[at].ranges);
    }
    PyMem_Free(vectors);
    PyMem_Free(requests);
    PyMem_Free(parts);
    PyBuffer_Release(&sums);
    return result;
}
