/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * sockio.h: what a host TCP socket says about itself, and
 * which ports are bound.
 */
#ifndef PYSPLICE_SOCKIO_H
#define PYSPLICE_SOCKIO_H

#include <stdint.h>

/* One reading of a socket's state; -1 where the kernel does not say. */
struct sock_facts {
	int64_t sndbuf;         /* SK_MEMINFO_SNDBUF, truesize bytes */
	int64_t wmem_queued;    /* SK_MEMINFO_WMEM_QUEUED, truesize bytes */
	int64_t outq;           /* SIOCOUTQ: unsent and unacknowledged bytes */
	int64_t snd_mss;        /* tcpi_snd_mss, bytes */
	int64_t snd_wnd;        /* tcpi_snd_wnd, bytes, scaled */
	int64_t rtt;            /* tcpi_rtt, microseconds */
	int64_t last_data_sent; /* tcpi_last_data_sent, milliseconds ago */
};

#define SOCK_FACTS_COUNT 7

/* Returns 0, or -errno if FD is no TCP socket.  With SND_MSS, the value of an
 * earlier reading, an empty queue costs one system call: the window depends on
 * nothing else then, and what was not asked for is -1. */
int sock_facts_read(int fd, int64_t snd_mss, struct sock_facts *facts);

#define PORTS_BYTES 8192

/* Set the bit of each local port that a socket of FAMILY and PROTOCOL listens
 * on (TCP) or is bound to without a peer (UDP), in the namespace of FD, a
 * NETLINK_SOCK_DIAG socket.  Sockets that are bound to the interface WITHOUT
 * are left out, by the kernel; 0: none are.  Returns 0 or -errno. */
int sock_ports_read(int fd, int family, int protocol, uint32_t without,
		    uint8_t ports[PORTS_BYTES]);

#endif
