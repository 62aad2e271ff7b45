/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * message.h: datagrams to sockets, each with an address and ancillary data.
 */
#ifndef PYSPLICE_MESSAGE_H
#define PYSPLICE_MESSAGE_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <netinet/in.h>
#include <stdint.h>
#include <sys/socket.h>
#include <sys/uio.h>

#define BATCH 64                        /* messages in one system call */
/* Datagrams that one message may carry (UDP_MAX_SEGMENTS of older kernels) */
#define GSO_MAX 64

/* Where datagrams go: a socket address, and ancillary data (cmsg(3)) that says
 * from which address, by which interface and with which hop limit. */
struct route {
	Py_buffer address;
	Py_buffer control;
};

void route_release(struct route *route);

/* True unless address or control data are too long; then ValueError is set. */
int route_ok(const struct route *route);

/* Send a payload, which is datagrams of GSO_SIZE each: joined if the kernel
 * takes that, else one by one.  Returns 0 or the last -errno. */
int message_send_one(int fd, struct iovec *iov, size_t gso_size,
		     const struct route *route);

/* Send COUNT payloads; with JOINS, datagrams of one size in one message.
 * Returns how many went out, or -errno of the first. */
int message_send(int fd, struct iovec *iov, const uint16_t *gso_size, int count,
		 const struct route *route, int joins);

/* Ancillary data for these: see _cext.pyi. */
PyObject *message_ancillary(PyObject *module, PyObject *args);

#endif
