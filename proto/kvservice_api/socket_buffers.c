/* Bytes between a socket and buffers, with the xxh3-64 of each buffer, taken from the piece that was just moved: it is
 * in the cache then. Used by kvservice_api/socket_buffers.py, which has the same in Python.
 */

#define Py_LIMITED_API 0x030B0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <errno.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <time.h>

#include "socket_buffers.h"
#include "stream_copy.h"

enum {
    PIECE_BYTES = 512 << 10,   /* In one system call, and summed after it. */
    STAGE_BYTES = 256 << 10,   /* In one that goes through the stage, which the second-level cache holds. */
    LOW_BYTES = 256 << 10,     /* Waited for, if so many are missing: each wait costs as much as copying 50 KiB. */
    BUFFERS = 512              /* In one call. */
};

/* What is streamed is received here, in the second-level cache, and summed and copied from here past the caches: a
 * kernel's copy to memory that is in no cache takes longer than both. */
static _Thread_local uint8_t stage[STAGE_BYTES] __attribute__((aligned(64)));

enum { MOVED, BLOCKED, ENDED }; /* Why a call returns. The numbers are also in socket_buffers.py. */

typedef struct { /* The checksum of a buffer that is there in part. */
    uint64_t lanes[8];
    uint64_t summed;
} Partial;

typedef struct {
    int fd, watched, is_sending, is_staged;
    int64_t turn_bytes;
    double end_s;
    Py_buffer *buffers;
    Py_ssize_t count, at;
    size_t offset; /* In the buffer `at`. */
    int64_t moved;
    uint64_t *sums; /* Of the buffers, or NULL. */
    Sum sum;        /* Of the buffer `at`. */
} Move;

static double now_s(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec + now.tv_nsec * 1e-9;
}

static void begin_buffer(Move *move) {
    if (move->sums && move->at < move->count)
        begin_sum(&move->sum, move->buffers[move->at].buf, move->buffers[move->at].len);
}

/* `count` more bytes have moved; and pass buffers that are complete, or empty. */
static void advance(Move *move, size_t count) {
    move->moved += count;
    while (move->at < move->count) {
        size_t rest = move->buffers[move->at].len - move->offset, now = count < rest ? count : rest;
        move->offset += now;
        count -= now;
        if (now < rest) {
            if (move->sums) sum_until(&move->sum, move->offset / BLOCK * BLOCK);
            return;
        }
        if (move->sums) move->sums[move->at] = end_sum(&move->sum);
        move->at++;
        move->offset = 0;
        begin_buffer(move);
    }
}

/* As `advance`, for bytes that are in the stage. */
static void advance_staged(Move *move, size_t count) {
    for (const uint8_t *from = stage, *end = stage + count; from < end;) {
        uint8_t *target = move->buffers[move->at].buf;
        size_t begin = move->offset, rest = move->buffers[move->at].len - begin, now = end - from;
        if (now > rest) now = rest;
        size_t head = -begin & (BLOCK - 1); /* The rest of a block of which a part came before. */
        if (head > now) head = now;
        copy_bytes(target + begin, from, head, 1);
        sum_until(&move->sum, (begin + head) / BLOCK * BLOCK);
        move->sum.input = from - begin; /* Whole blocks are summed in the stage, the others in their place. */
        for (size_t done = head, part; done < now; done += part) {
            part = CHUNK - ((uintptr_t)(target + begin + done) & 63); /* The next part begins at a cache line. */
            if (part > now - done) part = now - done;
            sum_until(&move->sum, (begin + done + part) / BLOCK * BLOCK);
            copy_bytes(target + begin + done, from + done, part, 1);
        }
        move->sum.input = target;
        from += now;
        advance(move, now);
    }
}

static size_t next_vector(const Move *move, struct iovec *vector, int *used) {
    size_t most = move->is_staged ? STAGE_BYTES : PIECE_BYTES, size = 0, offset = move->offset;
    *used = 0;
    for (Py_ssize_t at = move->at; at < move->count && size < most && *used < BUFFERS; at++, offset = 0) {
        size_t now = move->buffers[at].len - offset;
        if (now > most - size) now = most - size;
        vector[(*used)++] = (struct iovec){(char *)move->buffers[at].buf + offset, now};
        size += now;
    }
    if (move->is_staged) vector[0] = (struct iovec){stage, size}, *used = 1;
    return size;
}

static int is_ready(int fd) {
    struct pollfd one = {fd, POLLIN, 0};
    return poll(&one, 1, 0) != 0;
}

/* Whether the call itself waits for the socket, and not each system call. A socket that takes a part of a piece is full:
 * that part is summed while the other side makes room. */
static int waits_here(const Move *move) {
    return move->watched >= 0 || (move->is_sending && move->sums);
}

/* Whether the socket can move bytes before the time is over or the watched descriptor, if any, is readable. */
static int can_move(const Move *move) {
    double rest_s = move->end_s - now_s();
    if (!waits_here(move) || rest_s <= 0) return 0;
    struct pollfd both[2] = {{move->fd, move->is_sending ? POLLOUT : POLLIN, 0}, {move->watched, POLLIN, 0}};
    return poll(both, 2, (int)(rest_s * 1e3) + 1) > 0 && both[0].revents && !both[1].revents;
}

static void set_low(const Move *move) {
    int64_t missing = -(int64_t)move->offset;
    for (Py_ssize_t at = move->at; at < move->count && missing < LOW_BYTES; at++) missing += move->buffers[at].len;
    int low = missing < LOW_BYTES ? (int)missing : LOW_BYTES;
    setsockopt(move->fd, SOL_SOCKET, SO_RCVLOWAT, &low, sizeof low);
}

/* Returns why it ends; -1 with `errno` for an error. */
static int move_on(Move *move) {
    struct iovec vector[BUFFERS];
    int64_t next_look = move->turn_bytes;
    int flags = waits_here(move) ? MSG_DONTWAIT : move->is_sending ? 0 : MSG_WAITALL;
    advance(move, 0);
    while (move->at < move->count) {
        struct msghdr message = {0};
        int used;
        size_t size = next_vector(move, vector, &used);
        message.msg_iov = vector;
        message.msg_iovlen = used;
        ssize_t count = move->is_sending ? sendmsg(move->fd, &message, flags | MSG_NOSIGNAL)
                                         : recvmsg(move->fd, &message, flags);
        if (count < 0) {
            if (errno == EINTR) return BLOCKED;
            if (errno != EAGAIN && errno != EWOULDBLOCK) return -1;
            if (move->watched >= 0 && !move->is_sending) set_low(move);
            if (!can_move(move)) return BLOCKED;
            continue;
        }
        if (count == 0) return ENDED;
        if (move->is_staged) advance_staged(move, count);
        else advance(move, count);
        if (!waits_here(move) && (size_t)count < size) return BLOCKED; /* A signal, or the socket's time limit. */
        if (move->watched >= 0 && move->moved >= next_look) {
            if (is_ready(move->watched)) return MOVED;
            next_look = move->moved + move->turn_bytes;
        }
        if (now_s() >= move->end_s) return MOVED;
    }
    return MOVED;
}

static int get_buffers(PyObject *objects, Py_ssize_t first, Move *move) {
    Py_ssize_t count = PySequence_Size(objects);
    if (count < 0) return -1;
    if (first < 0 || first > count) {
        PyErr_SetString(PyExc_ValueError, "there are not so many buffers");
        return -1;
    }
    count = count - first < BUFFERS ? count - first : BUFFERS;
    if (!(move->buffers = PyMem_Calloc(count + 1, sizeof *move->buffers))) {
        PyErr_NoMemory();
        return -1;
    }
    for (; move->count < count; move->count++) {
        PyObject *object = PySequence_GetItem(objects, first + move->count);
        if (!object) return -1;
        int flags = move->is_sending ? PyBUF_SIMPLE : PyBUF_WRITABLE;
        int failed = PyObject_GetBuffer(object, &move->buffers[move->count], flags);
        Py_DECREF(object);
        if (failed) return -1;
    }
    return 0;
}

PyObject *move_buffers(PyObject *module, PyObject *given) {
    PyObject *objects, *result = NULL;
    Py_buffer sums = {0}, partial = {0};
    Py_ssize_t first, offset;
    long long turn_bytes;
    double wait_s;
    Move move = {0};
    Partial kept;
    if (!PyArg_ParseTuple(given, "iipOnnw*w*pLd", &move.fd, &move.watched, &move.is_sending, &objects, &first, &offset,
                          &sums, &partial, &move.is_staged, &turn_bytes, &wait_s))
        return NULL;
    if (get_buffers(objects, first, &move)) goto end;
    if (sums.len) {
        if (sums.len / (Py_ssize_t)sizeof *move.sums < first + move.count || partial.len != sizeof kept) {
            PyErr_SetString(PyExc_ValueError, "there is not one checksum for each buffer");
            goto end;
        }
        move.sums = (uint64_t *)sums.buf + first;
    }
    begin_buffer(&move);
    if (offset) {
        if (offset < 0 || !move.count || offset >= move.buffers[0].len) {
            PyErr_SetString(PyExc_ValueError, "the offset is outside the first buffer");
            goto end;
        }
        move.offset = offset;
        if (move.sums) {
            memcpy(&kept, partial.buf, sizeof kept);
            if (kept.summed > (size_t)offset || kept.summed % BLOCK) {
                PyErr_SetString(PyExc_ValueError, "the checksum's state is not of this offset");
                goto end;
            }
            memcpy(move.sum.lanes, kept.lanes, sizeof kept.lanes);
            move.sum.summed = kept.summed;
        }
    }
    move.turn_bytes = turn_bytes;
    move.is_staged = move.is_staged && has_avx2 && move.sums && !move.is_sending;
    int why, error;
    Py_BEGIN_ALLOW_THREADS
    move.end_s = now_s() + wait_s;
    why = move_on(&move);
    error = errno;
#if HAS_X86
    if (move.is_staged) _mm_sfence();
#endif
    Py_END_ALLOW_THREADS
    if (why < 0) {
        errno = error;
        PyErr_SetFromErrno(PyExc_OSError);
        goto end;
    }
    if (move.sums && move.offset) {
        memcpy(kept.lanes, move.sum.lanes, sizeof kept.lanes);
        kept.summed = move.sum.summed;
        memcpy(partial.buf, &kept, sizeof kept);
    }
    result = Py_BuildValue("innL", why, first + move.at, (Py_ssize_t)move.offset, (long long)move.moved);
end:
    for (Py_ssize_t at = 0; at < move.count; at++) PyBuffer_Release(&move.buffers[at]);
    PyMem_Free(move.buffers);
    PyBuffer_Release(&sums);
    PyBuffer_Release(&partial);
    return result;
}
