/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * sockio.c: reads the state of sockets.  Owns nothing; compiles without
 * Python.h.
 *
 * system calls (serve): ioctl getsockopt sendto recvfrom
 */
#include "sockio.h"

#include <arpa/inet.h>
#include <errno.h>
#include <linux/inet_diag.h>
#include <linux/netlink.h>
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

int sock_facts_read(int fd, int64_t snd_mss, struct sock_facts *facts)
{
	uint32_t mem[SK_MEMINFO_VARS] = {0};
	struct tcp_info info = {0};
	socklen_t len = sizeof(mem);
	int outq = 0, known;

	known = getsockopt(fd, SOL_SOCKET, SO_MEMINFO, mem, &len) == 0;
	if (known && !mem[SK_MEMINFO_WMEM_QUEUED] && snd_mss > 0) {
		*facts = (struct sock_facts){
			.sndbuf = mem[SK_MEMINFO_SNDBUF],
			.snd_mss = snd_mss,
			.snd_wnd = -1,
			.rtt = -1,
			.last_data_sent = -1,
		};
		return 0;
	}
	if (!known || mem[SK_MEMINFO_WMEM_QUEUED]) {
		/* The queue first, its memory afterwards: a queue that drains
		 * between the two then shows W < Q, which the window takes for
		 * "no overhead seen", and never an overhead that is not
		 * there. */
		if (ioctl(fd, SIOCOUTQ, &outq))
			return -errno;
		len = sizeof(mem);
		if (known)
			known = getsockopt(fd, SOL_SOCKET, SO_MEMINFO, mem,
					   &len) == 0;
	}
	facts->outq = outq;
	if (known) {
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

#define TCP_CLOSE_BIT (1u << 7)
#define TCP_LISTEN_BIT (1u << 10)

int sock_ports_read(int fd, int family, int protocol, uint32_t without,
		    uint8_t ports[PORTS_BYTES])
{
	/* A program that stops at its end accepts, one that jumps beyond it
	 * does not (inet_diag_bc_run()): another interface leads straight to
	 * the end, this one to the jump */
	struct {
		struct nlmsghdr header;
		struct inet_diag_req_v2 diag;
		struct nlattr filter;
		struct inet_diag_bc_op op;
		uint32_t ifindex;
		struct inet_diag_bc_op beyond;
	} request = {
		.filter = {
			.nla_len = sizeof(request.filter) +
				   sizeof(request.op) +
				   sizeof(request.ifindex) +
				   sizeof(request.beyond),
			.nla_type = INET_DIAG_REQ_BYTECODE,
		},
		.op = {
			.code = INET_DIAG_BC_DEV_COND,
			.yes = sizeof(request.op) + sizeof(without),
			.no = 2 * sizeof(request.op) + sizeof(without),
		},
		.beyond = {
			.code = INET_DIAG_BC_JMP,
			.yes = sizeof(request.op),
			.no = 2 * sizeof(request.op),
		},
		.ifindex = without,
		.header = {
			.nlmsg_len = without ? sizeof(request) :
					       sizeof(request.header) +
						       sizeof(request.diag),
			.nlmsg_type = SOCK_DIAG_BY_FAMILY,
			.nlmsg_flags = NLM_F_REQUEST | NLM_F_DUMP,
		},
		.diag = {
			.sdiag_family = (uint8_t)family,
			.sdiag_protocol = (uint8_t)protocol,
			.idiag_states = protocol == IPPROTO_TCP ?
						TCP_LISTEN_BIT :
						TCP_CLOSE_BIT,
		},
	};
	union {
		struct nlmsghdr header;
		char bytes[32768];
	} answer;

	if (send(fd, &request, request.header.nlmsg_len, MSG_DONTWAIT) < 0)
		return -errno;
	for (;;) {
		ssize_t n = recv(fd, &answer, sizeof(answer), MSG_DONTWAIT);
		struct nlmsghdr *header = &answer.header;
		size_t left = (size_t)n;

		if (n < 0)
			return -errno;
		for (; NLMSG_OK(header, left);
		     header = NLMSG_NEXT(header, left)) {
			const struct inet_diag_msg *msg = NLMSG_DATA(header);
			uint16_t port;

			if (header->nlmsg_type == NLMSG_DONE)
				return 0;
			if (header->nlmsg_type == NLMSG_ERROR) {
				const struct nlmsgerr *error =
					NLMSG_DATA(header);

				return error->error;
			}
			if (header->nlmsg_type != SOCK_DIAG_BY_FAMILY)
				continue;
			port = ntohs(msg->id.idiag_sport);
			ports[port / 8] |= (uint8_t)(1u << port % 8);
		}
	}
}
