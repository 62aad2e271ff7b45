/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * sockio.c: reads the state of a host socket.  Owns nothing; compiles without
 * Python.h.
 */
#include "sockio.h"

#include <errno.h>
#include <linux/sock_diag.h>
#include <linux/sockios.h>
#include <linux/tcp.h>
#include <netinet/in.h>
#include <stddef.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>

#ifndef SO_MEMINFO
#define SO_MEMINFO 55
#endif

int sock_facts_read(int fd, struct sock_facts *facts)
{
	uint32_t mem[SK_MEMINFO_VARS] = {0};
	struct tcp_info info = {0};
	socklen_t len;
	int outq = 0;

	/* The queue first, its memory afterwards: a queue that drains between
	 * the two then shows W < Q, which the window takes for "no overhead
	 * seen", and never an overhead that is not there. */
	if (ioctl(fd, SIOCOUTQ, &outq))
		return -errno;
	facts->outq = outq;

	len = sizeof(mem);
	if (getsockopt(fd, SOL_SOCKET, SO_MEMINFO, mem, &len) == 0) {
		facts->sndbuf = mem[SK_MEMINFO_SNDBUF];
		facts->wmem_queued = mem[SK_MEMINFO_WMEM_QUEUED];
	} else {
		int sndbuf = 0;

		len = sizeof(sndbuf);
		if (getsockopt(fd, SOL_SOCKET, SO_SNDBUF, &sndbuf, &len))
			return -errno;
		facts->sndbuf = sndbuf;
		facts->wmem_queued = -1;
	}

	/* Older kernels fill in less of it */
	len = sizeof(info);
	if (getsockopt(fd, IPPROTO_TCP, TCP_INFO, &info, &len))
		return -errno;
	facts->snd_mss = info.tcpi_snd_mss;
	facts->rtt = info.tcpi_rtt;
	facts->last_data_sent = info.tcpi_last_data_sent;
	facts->snd_wnd = len >= offsetof(struct tcp_info, tcpi_snd_wnd) +
					sizeof(info.tcpi_snd_wnd) ?
				 (int64_t)info.tcpi_snd_wnd :
				 -1;
	return 0;
}
