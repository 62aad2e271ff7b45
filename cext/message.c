/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * message.c: datagrams to sockets.  Owns nothing.
 *
 * system calls (serve): sendmmsg sendmsg
 */
#include "message.h"

#include <errno.h>
#include <netinet/udp.h>
#include <string.h>

#ifndef UDP_SEGMENT
#define UDP_SEGMENT 103
#endif

/* The largest payload of an IP packet with a UDP header, IPv6 or not */
#define MESSAGE_MAX ((size_t)65535 - 40 - 8)
/* Larger datagrams may not fit the path, where a message of many fails as a
 * whole, and gain little */
#define JOIN_MAX ((size_t)1500 - 20 - 8)
#define JOIN_MIN 4

/* What the caller's ancillary data may take, and a UDP_SEGMENT behind it */
#define CONTROL_MAX 128

union control {
	char bytes[CONTROL_MAX + CMSG_SPACE(sizeof(int))];
	struct cmsghdr align;
};

void route_release(struct route *route)
{
	PyBuffer_Release(&route->address);
	PyBuffer_Release(&route->control);
}

/* The kernel gets the control data as it is, and checks it. */
int route_ok(const struct route *route)
{
	if ((size_t)route->address.len <= sizeof(struct sockaddr_in6) &&
	    route->control.len <= CONTROL_MAX)
		return 1;
	PyErr_SetString(PyExc_ValueError, "address or control data too long");
	return 0;
}

static void set_route(struct msghdr *msg, const struct route *route)
{
	msg->msg_name = route->address.len ? route->address.buf : NULL;
	msg->msg_namelen = (socklen_t)route->address.len;
	msg->msg_control = route->control.len ? route->control.buf : NULL;
	msg->msg_controllen = (size_t)route->control.len;
}

static void set_gso(struct msghdr *msg, union control *control, uint16_t size)
{
	size_t before = CMSG_ALIGN(msg->msg_controllen);
	struct cmsghdr *cmsg;

	memset(control, 0, sizeof(*control));
	if (msg->msg_controllen)
		memcpy(control->bytes, msg->msg_control, msg->msg_controllen);
	msg->msg_control = control;
	msg->msg_controllen = before + CMSG_SPACE(sizeof(size));
	cmsg = (struct cmsghdr *)(control->bytes + before);
	cmsg->cmsg_level = SOL_UDP;
	cmsg->cmsg_type = UDP_SEGMENT;
	cmsg->cmsg_len = CMSG_LEN(sizeof(size));
	memcpy(CMSG_DATA(cmsg), &size, sizeof(size));
}

/* How many datagrams a payload is. */
static size_t count_of(size_t len, size_t gso_size)
{
	return gso_size && len > gso_size ? (len + gso_size - 1) / gso_size : 1;
}

static int send_message(int fd, struct msghdr *msg)
{
	return sendmsg(fd, msg, MSG_DONTWAIT | MSG_NOSIGNAL) < 0 ? -errno : 0;
}

/* True for what the kernel says of a message that it cannot cut: over a path
 * with a smaller MTU, or without the offload. */
static int is_uncut(int error)
{
	return error == -EINVAL || error == -EMSGSIZE || error == -EIO ||
	       error == -EOPNOTSUPP;
}

int message_send_one(int fd, struct iovec *iov, size_t gso_size,
		    const struct route *route)
{
	struct msghdr msg = { .msg_iov = iov, .msg_iovlen = 1 };
	size_t count = count_of(iov->iov_len, gso_size), done = 0;
	size_t most = GSO_MAX * gso_size;
	union control control;
	struct iovec part;
	int error = 0, rc;

	set_route(&msg, route);
	if (count == 1)
		return send_message(fd, &msg);
	/* No kernel makes that many from one frame (UDP_MAX_SEGMENTS) */
	if (count > 2 * GSO_MAX)
		return -EINVAL;
	msg.msg_iov = &part;
	for (; done < iov->iov_len; done += part.iov_len) {
		part.iov_base = (uint8_t *)iov->iov_base + done;
		part.iov_len = iov->iov_len - done < most ?
				       iov->iov_len - done :
				       most;
		if (part.iov_len > gso_size)
			set_gso(&msg, &control, (uint16_t)gso_size);
		else
			set_route(&msg, route);
		rc = send_message(fd, &msg);
		if (rc == -EMSGSIZE && part.iov_len <= gso_size)
			return rc; /* The rest would fail too */
		if (is_uncut(rc) && most > gso_size) {
			/* One by one from here */
			most = gso_size;
			part.iov_len = 0;
			set_route(&msg, route);
			continue;
		}
		set_route(&msg, route);
		if (rc)
			error = rc;
	}
	return error;
}

/* How many of COUNT single datagrams can go as one message: some of one size,
 * and one that is shorter behind them.  0: too few to gain by it. */
static int joinable(const struct iovec *iov, int count)
{
	size_t unit = iov[0].iov_len, len = unit;
	int n = 1;

	if (!unit || unit > JOIN_MAX)
		return 0;
	while (n < count && n < GSO_MAX && iov[n].iov_len &&
	       iov[n].iov_len <= unit && iov[n - 1].iov_len == unit &&
	       len + iov[n].iov_len <= MESSAGE_MAX)
		len += iov[n++].iov_len;
	return n < JOIN_MIN ? 0 : n;
}

/* COUNT datagrams as one message; their number, or -errno. */
static int send_joined(int fd, struct iovec *iov, int count,
		       const struct route *route)
{
	struct msghdr msg = { .msg_iov = iov, .msg_iovlen = (size_t)count };
	union control control;
	int rc;

	set_route(&msg, route);
	set_gso(&msg, &control, (uint16_t)iov[0].iov_len);
	rc = send_message(fd, &msg);
	return rc ? rc : count;
}

/* COUNT datagrams, each as a message of its own, in one call; how many were
 * sent, or -errno of the first. */
static int send_plain(int fd, struct iovec *iov, int count,
		      const struct route *route)
{
	struct mmsghdr msgs[BATCH];
	int n;

	memset(msgs, 0, (size_t)count * sizeof(msgs[0]));
	for (int i = 0; i < count; i++) {
		set_route(&msgs[i].msg_hdr, route);
		msgs[i].msg_hdr.msg_iov = &iov[i];
		msgs[i].msg_hdr.msg_iovlen = 1;
	}
	n = sendmmsg(fd, msgs, (unsigned)count, MSG_DONTWAIT | MSG_NOSIGNAL);
	return n < 0 ? -errno : n;
}

int message_send(int fd, struct iovec *iov, const uint16_t *gso_size,
		 int count, const struct route *route, int joins)
{
	int done = 0;

	while (done < count) {
		struct iovec *next = iov + done;
		int single = 0, part, n;

		while (single < count - done && single < BATCH &&
		       count_of(next[single].iov_len,
				gso_size[done + single]) == 1)
			single++;
		if (!single) {
			part = 1;
			n = message_send_one(fd, next, gso_size[done], route);
			n = n < 0 ? n : 1;
		} else if (joins && (part = joinable(next, single))) {
			n = send_joined(fd, next, part, route);
			if (is_uncut(n)) {
				joins = 0;
				continue;
			}
		} else {
			part = 1;
			while (part < single &&
			       !(joins && joinable(next + part, single - part)))
				part++;
			n = send_plain(fd, next, part, route);
		}
		if (n < 0)
			return done ? done : n;
		done += n;
		if (n < part)
			break;
	}
	return done;
}

static void put_cmsg(char *bytes, size_t *len, int level, int type,
		     const void *data, size_t size)
{
	struct cmsghdr *cmsg = (struct cmsghdr *)(bytes + *len);

	cmsg->cmsg_level = level;
	cmsg->cmsg_type = type;
	cmsg->cmsg_len = CMSG_LEN(size);
	memcpy(CMSG_DATA(cmsg), data, size);
	*len += CMSG_SPACE(size);
}

/* ancillary(family, source, interface, hops) -> bytes */
PyObject *message_ancillary(PyObject *module, PyObject *args)
{
	int family, interface, hops, ipv4;
	union control control = {0};
	Py_ssize_t source_len;
	const char *source;
	size_t len = 0;

	(void)module;
	if (!PyArg_ParseTuple(args, "iy#ii:ancillary", &family, &source,
			      &source_len, &interface, &hops))
		return NULL;
	ipv4 = family == AF_INET;
	if ((!ipv4 && family != AF_INET6) ||
	    (source_len && source_len != (ipv4 ? 4 : 16))) {
		PyErr_SetString(PyExc_ValueError, "bad family or source");
		return NULL;
	}
	if ((source_len || interface) && ipv4) {
		struct in_pktinfo info = { .ipi_ifindex = interface };

		if (source_len)
			memcpy(&info.ipi_spec_dst, source, 4);
		put_cmsg(control.bytes, &len, IPPROTO_IP, IP_PKTINFO, &info,
			 sizeof(info));
	} else if (source_len || interface) {
		struct in6_pktinfo info = {
			.ipi6_ifindex = (unsigned)interface,
		};

		if (source_len)
			memcpy(&info.ipi6_addr, source, 16);
		put_cmsg(control.bytes, &len, IPPROTO_IPV6, IPV6_PKTINFO,
			 &info, sizeof(info));
	}
	if (hops)
		put_cmsg(control.bytes, &len, ipv4 ? IPPROTO_IP : IPPROTO_IPV6,
			 ipv4 ? IP_TTL : IPV6_HOPLIMIT, &hops, sizeof(hops));
	return PyBytes_FromStringAndSize(control.bytes, (Py_ssize_t)len);
}

