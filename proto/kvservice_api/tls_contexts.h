/* A part of the extension that copying.c begins. */

#pragma once

#include <Python.h>

PyObject *read_ahead(PyObject *module, PyObject *arguments);
