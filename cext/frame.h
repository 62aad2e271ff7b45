/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * frame.h: Ethernet frames, taken apart (frame_parse.c) and put together
 * (frame_build.c).
 */
#ifndef PYSPLICE_FRAME_H
#define PYSPLICE_FRAME_H

#include <stddef.h>
#include <stdint.h>

#include "wire.h"

#define VNET_HDR_LEN sizeof(struct vnet_header)
#define ETH_LEN sizeof(struct ethernet_header)
#define IP_MAX 65535                    /* the length field of an IP header */
#define FRAME_MAX (ETH_LEN + 65536)     /* the most that a tap can hand over */

/* Addresses and ports as they stand on the wire: source, destination, source
 * port, destination port.  12 bytes for IPv4, 36 for IPv6. */
#define KEY4_LEN 12
#define KEY6_LEN 36

/* A template is a frame up to and including the ports. */
#define PORTS_LEN 4
#define TEMPLATE4_LEN (ETH_LEN + sizeof(struct ipv4_header) + PORTS_LEN)
#define TEMPLATE6_LEN (ETH_LEN + sizeof(struct ipv6_header) + PORTS_LEN)
#define TCP_OPTIONS_MAX 40
#define HEADERS_MAX                                                            \
	(VNET_HDR_LEN + ETH_LEN + sizeof(struct ipv6_header) +                 \
	 sizeof(struct tcp_header) + TCP_OPTIONS_MAX)

enum tcp_flag {
	TCP_FIN = 0x01,
	TCP_SYN = 0x02,
	TCP_RST = 0x04,
	TCP_PSH = 0x08,
	TCP_ACK = 0x10,
};

enum frame_kind {
	FRAME_BAD,              /* to be dropped */
	FRAME_TCP,              /* a whole, valid TCP segment */
	FRAME_UDP,              /* a whole, valid UDP datagram, to a host or group */
	FRAME_OTHER,            /* anything else that is worth a look */
};

/* Why a frame is dropped. */
enum drop_reason {
	DROP_LENGTH,            /* it is shorter than it says, or has no header */
	DROP_CHECKSUM,
	DROP_FLAGS,             /* that no TCP sends */
	DROP_PORT,              /* 0 */
	DROP_ADDRESS,           /* that no packet comes from, or TCP goes to */
	DROP_FRAGMENT,          /* of a TCP segment */
	DROP_MAC,               /* it is for another station */
	DROP_REASONS,
};

struct segment {
	uint8_t key[KEY6_LEN];
	uint8_t key_len;
	uint8_t udp;
	uint8_t ttl;            /* or hop limit */
	uint8_t df;             /* not to be fragmented: DF is set, or IPv6 */
	uint8_t group;          /* sent to a multicast or broadcast MAC */
	uint8_t reason;         /* of FRAME_BAD: enum drop_reason */
	uint8_t flags;
	int8_t wscale;          /* from a SYN; -1: no such option */
	uint16_t mss;           /* from a SYN; 0: no such option */
	uint16_t window;        /* as on the wire, not scaled */
	uint32_t seq;
	uint32_t ack;
	uint32_t payload;       /* offset in the frame */
	uint32_t len;           /* of the payload, bytes */
};

/* Take FRAME apart (frame_parse.c).  TRUSTED: the checksum of layer 4 need not
 * be verified.  MAC is the address of this station, NULL: any.  *SEG is zeroed
 * first; it is filled if the result is FRAME_TCP or FRAME_UDP (of the latter,
 * without what only TCP has), and has the reason if it is FRAME_BAD. */
enum frame_kind frame_parse(const uint8_t *frame, size_t len, int trusted,
			    const uint8_t *mac, struct segment *seg);

/* frame_build.c: what is on the wire before the payload of one segment. */
struct tcp_fields {
	uint32_t seq;
	uint32_t ack;
	uint16_t window;
	uint8_t flags;
	const uint8_t *options; /* padded to whole words by the caller */
	size_t options_len;
};

/* The length of an Ethernet, IP and TCP header from this template, or 0 if
 * TEMPLATE has no valid length. */
size_t frame_headers_len(size_t template_len, size_t options_len);

/* Write vnet header (if OFFLOAD) and all headers to OUT, which has room for
 * HEADERS_MAX.  PAYLOAD_SUM is csum_add() of the payload, used without OFFLOAD
 * only.  With OFFLOAD and a payload longer than MSS the frame asks to be cut
 * into segments of MSS.  Returns the number of bytes written. */
size_t frame_build(uint8_t *out, const uint8_t *template, size_t template_len,
		   const struct tcp_fields *tcp, size_t payload_len,
		   uint64_t payload_sum, uint16_t mss, int offload);

/* The same for a UDP datagram: headers to OUT.  GSO_SIZE: cut it into datagrams
 * of that many bytes, 0: it is one. */
size_t frame_build_udp(uint8_t *out, const uint8_t *template,
		       size_t template_len, size_t payload_len,
		       uint64_t payload_sum, uint16_t gso_size, int offload);

/* Ethernet and IP header of one fragment: bytes FROM to FROM + LEN of the IP
 * payload, MORE: others follow.  OUT has room for HEADERS_MAX; no vnet header. */
size_t frame_build_fragment(uint8_t *out, const uint8_t *template,
			    size_t template_len, size_t from, size_t len,
			    int more, uint32_t ident);

/* The IP header's length, with that of a fragment if FRAGMENT. */
size_t frame_ip_len(size_t template_len, int fragment);

/* Write the checksum of a UDP datagram of LEN bytes that goes to where TEMPLATE
 * says. */
void frame_put_udp_check(const uint8_t *template, size_t template_len,
			 struct udp_header *udp, size_t len);

#endif
