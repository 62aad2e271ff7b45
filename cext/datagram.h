/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * datagram.h: batches of UDP datagrams between sockets and the tap.
 */
#ifndef PYSPLICE_DATAGRAM_H
#define PYSPLICE_DATAGRAM_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "tap.h"

extern PyType_Spec packets_spec;

/* One PAYLOAD to the guest, which is datagrams of GSO_SIZE if that is not 0;
 * there is room for the headers of a datagram before it.  USO: the tap takes
 * them joined.  Returns 0 or -errno. */
int datagram_emit(struct tap *tap, const uint8_t *template,
		  size_t template_len, uint8_t *payload, size_t len,
		  size_t gso_size, size_t mtu, int uso);

/* As many of COUNT single datagrams as one frame can carry: they are as long as
 * the first, but for the last.  Returns how many; 0: none, each has to go by
 * itself; below 0: -errno, none went. */
int datagram_emit_many(struct tap *tap, const uint8_t *template,
		       size_t template_len, const struct iovec *payloads,
		       int count, size_t mtu);

#endif
