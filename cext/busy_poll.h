/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * busy_poll.h: readable descriptors, looked for without sleeping.
 */
#ifndef PYSPLICE_BUSY_POLL_H
#define PYSPLICE_BUSY_POLL_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

PyObject *busy_poll(PyObject *module, PyObject *args);

#endif
