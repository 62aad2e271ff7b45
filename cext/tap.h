/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * tap.h: the type that drains and fills a tap.
 */
#ifndef PYSPLICE_TAP_H
#define PYSPLICE_TAP_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

/* What the types of the module share; one of it per module object. */
struct module_state {
	PyTypeObject *stream_type;
	PyTypeObject *tap_type;
	PyTypeObject *run_type;
	PyTypeObject *facts_type;
};

extern PyType_Spec tap_spec;

#endif
