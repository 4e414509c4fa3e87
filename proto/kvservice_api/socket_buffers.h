/* A part of the extension that copying.c begins. */

#pragma once

#include <Python.h>

PyObject *move_buffers(PyObject *module, PyObject *arguments);
