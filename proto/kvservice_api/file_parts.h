/* A part of the extension that copying.c begins. */

#pragma once

#include <Python.h>

PyObject *read_parts(PyObject *module, PyObject *arguments);
