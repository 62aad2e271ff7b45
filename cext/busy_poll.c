/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * busy_poll.c: looks for readable descriptors without sleeping.  Owns nothing;
 * how long to look, and whether at all, is decided in loop.py.
 *
 * system calls (serve): poll ppoll
 */
#include "busy_poll.h"

#include <poll.h>
#include <time.h>

#define FDS_MAX 8

static long long now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1000000000LL + now.tv_nsec;
}

/* busy_poll(fds, microseconds) -> bits by position, of those that are readable */
PyObject *busy_poll(PyObject *module, PyObject *args)
{
	struct pollfd fds[FDS_MAX];
	Py_ssize_t count;
	unsigned long bits = 0;
	PyObject *tuple;
	long long until;
	int usec, n;

	(void)module;
	if (!PyArg_ParseTuple(args, "O!i:busy_poll", &PyTuple_Type, &tuple,
			      &usec))
		return NULL;
	count = PyTuple_Size(tuple);
	if (count > FDS_MAX) {
		PyErr_SetString(PyExc_ValueError, "too many descriptors");
		return NULL;
	}
	for (Py_ssize_t i = 0; i < count; i++) {
		fds[i] = (struct pollfd){
			.fd = (int)PyLong_AsLong(PyTuple_GetItem(tuple, i)),
			.events = POLLIN,
		};
		if (PyErr_Occurred())
			return NULL;
	}
	until = now_ns() + usec * 1000LL;
	do
		n = poll(fds, (nfds_t)count, 0);
	while (!n && now_ns() < until);
	for (Py_ssize_t i = 0; n > 0 && i < count; i++)
		if (fds[i].revents)
			bits |= 1ul << i;
	return PyLong_FromUnsignedLong(bits);
}
