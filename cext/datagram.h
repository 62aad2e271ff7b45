/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * datagram.h: batches of UDP datagrams between sockets and the tap.
 */
#ifndef PYSPLICE_DATAGRAM_H
#define PYSPLICE_DATAGRAM_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

extern PyType_Spec packets_spec;

/* Ancillary data for send(): see _cext.pyi. */
PyObject *datagram_ancillary(PyObject *module, PyObject *args);

#endif
