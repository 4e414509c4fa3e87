/* OpenSSL's read-ahead for a context of Python's module `ssl`, which has no setting for it. Only public functions of
 * both are used: OpenSSL tells the one that it calls for each new context which context that is. Used by
 * kvservice_api/tls_contexts.py.
 */

#define Py_LIMITED_API 0x030B0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <dlfcn.h>

#include "tls_contexts.h"

enum { OF_CONTEXTS = 1, SET_READ_AHEAD = 41 }; /* CRYPTO_EX_INDEX_SSL_CTX, SSL_CTRL_SET_READ_AHEAD of OpenSSL 3. */

typedef void Noted(void *parent, void *data, void *all, int index, long number, void *given);

typedef struct {
    int (*get_index)(int, long, void *, Noted *, void *, void *); /* CRYPTO_get_ex_new_index */
    int (*free_index)(int, int);                                  /* CRYPTO_free_ex_index */
    long (*control)(void *, int, long, void *);                   /* SSL_CTX_ctrl */
    void (*set_buffer)(void *, size_t);                           /* SSL_CTX_set_default_read_buffer_len */
} OpenSsl;

/* Of this thread, as long as it is in `read_ahead`: other threads make contexts too. */
static _Thread_local void *made;
static _Thread_local int made_count;

static void note_context(void *parent, void *data, void *all, int index, long number, void *given) {
    if (parent == made) return; /* Also called for the index of another thread. */
    made = parent;
    made_count++;
}

/* The library that is loaded already: no other one makes Python's contexts. */
static int find_openssl(OpenSsl *found) {
    void *library = dlopen("libssl.so.3", RTLD_LAZY | RTLD_NOLOAD);
    if (!library) return 0;
    *(void **)&found->get_index = dlsym(library, "CRYPTO_get_ex_new_index");
    *(void **)&found->free_index = dlsym(library, "CRYPTO_free_ex_index");
    *(void **)&found->control = dlsym(library, "SSL_CTX_ctrl");
    *(void **)&found->set_buffer = dlsym(library, "SSL_CTX_set_default_read_buffer_len");
    dlclose(library); /* Python's module keeps it. */
    return found->get_index && found->free_index && found->control && found->set_buffer;
}

PyObject *read_ahead(PyObject *module, PyObject *given) {
    PyObject *make;
    Py_ssize_t buffer_bytes;
    OpenSsl openssl;
    if (!PyArg_ParseTuple(given, "On", &make, &buffer_bytes)) return NULL;
    if (buffer_bytes < 0) {
        PyErr_SetString(PyExc_ValueError, "a buffer has no negative size");
        return NULL;
    }
    if (!find_openssl(&openssl)) return PyObject_CallObject(make, NULL);
    made = NULL;
    made_count = 0;
    int index = openssl.get_index(OF_CONTEXTS, 0, NULL, note_context, NULL, NULL);
    PyObject *result = PyObject_CallObject(make, NULL);
    if (index >= 0) openssl.free_index(OF_CONTEXTS, index); /* OpenSSL calls it no more. */
    if (result && made_count == 1) { /* Else it is not known which one is the result. */
        openssl.control(made, SET_READ_AHEAD, 1, NULL);
        openssl.set_buffer(made, buffer_bytes);
    }
    made = NULL;
    return result;
}
