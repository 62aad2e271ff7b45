/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * wire.h: the headers of a frame as they stand on the wire.  Every field is
 * made of bytes, so a header may lie at any address.
 */
#ifndef PYSPLICE_WIRE_H
#define PYSPLICE_WIRE_H

#include <assert.h>
#include <stdint.h>
#include <string.h>

/* Numbers in network byte order */
typedef struct {
	uint8_t byte[2];
} be16;

typedef struct {
	uint8_t byte[4];
} be32;

static inline uint16_t get16(be16 v)
{
	return (uint16_t)(v.byte[0] << 8 | v.byte[1]);
}

static inline uint32_t get32(be32 v)
{
	return (uint32_t)v.byte[0] << 24 | (uint32_t)v.byte[1] << 16 |
	       (uint32_t)v.byte[2] << 8 | v.byte[3];
}

static inline be16 put16(uint16_t v)
{
	return (be16){ { (uint8_t)(v >> 8), (uint8_t)v } };
}

static inline be32 put32(uint32_t v)
{
	return (be32){ { (uint8_t)(v >> 24), (uint8_t)(v >> 16),
			 (uint8_t)(v >> 8), (uint8_t)v } };
}

/* A checksum is computed in the byte order of memory (csum.h) */
static inline be16 put_check(uint16_t check)
{
	be16 field;

	memcpy(&field, &check, sizeof(field));
	return field;
}

#define ETHERTYPE_IPV4 0x0800
#define ETHERTYPE_IPV6 0x86dd

struct ethernet_header {
	uint8_t destination[6];
	uint8_t source[6];
	be16 type;
};

#define IPV4_DONT_FRAGMENT 0x4000
#define IPV4_MORE_FRAGMENTS 0x2000
#define IPV4_FRAGMENT_MASK 0x3fff       /* MF and the offset */

struct ipv4_header {
	uint8_t version_ihl;
	uint8_t tos;
	be16 total_len;
	be16 ident;
	be16 fragment;                  /* flags, offset in words of 8 bytes */
	uint8_t ttl;
	uint8_t protocol;
	be16 check;
	uint8_t source[4];
	uint8_t destination[4];
};

#define PROTO_HOPOPTS 0
#define PROTO_TCP 6
#define PROTO_UDP 17
#define PROTO_FRAGMENT 44
#define PROTO_DSTOPTS 60

struct ipv6_header {
	be32 version_class_flow;
	be16 payload_len;
	uint8_t next_header;
	uint8_t hop_limit;
	uint8_t source[16];
	uint8_t destination[16];
};

/* What hop-by-hop and destination options begin with */
struct ipv6_options_header {
	uint8_t next_header;
	uint8_t len;                    /* beyond the first 8 bytes, in 8s */
};

#define IPV6_MORE_FRAGMENTS 1

struct ipv6_fragment_header {
	uint8_t next_header;
	uint8_t reserved;
	be16 offset_more;               /* offset in bytes, a multiple of 8 */
	be32 ident;
};

#define TCP_OPTION_END 0
#define TCP_OPTION_NOP 1
#define TCP_OPTION_MSS 2
#define TCP_OPTION_WSCALE 3
#define TCP_WSCALE_MAX 14               /* RFC 7323, section 2.3 */

struct tcp_header {
	be16 source;
	be16 destination;
	be32 seq;
	be32 ack;
	uint8_t data_offset;            /* in words of 4 bytes, upper half */
	uint8_t flags;
	be16 window;
	be16 check;
	be16 urgent;
};

struct udp_header {
	be16 source;
	be16 destination;
	be16 len;
	be16 check;
};

static_assert(sizeof(struct ethernet_header) == 14, "no padding");
static_assert(sizeof(struct ipv4_header) == 20, "no padding");
static_assert(sizeof(struct ipv6_header) == 40, "no padding");
static_assert(sizeof(struct ipv6_fragment_header) == 8, "no padding");
static_assert(sizeof(struct tcp_header) == 20, "no padding");
static_assert(sizeof(struct udp_header) == 8, "no padding");

/* struct virtio_net_hdr of the virtio specification, 5.1.6, without the
 * num_buffers field: what a tap with IFF_VNET_HDR puts before each frame.
 * Numbers are in the host's byte order. */
struct vnet_header {
	uint8_t flags;
	uint8_t gso_type;
	uint16_t hdr_len;
	uint16_t gso_size;
	uint16_t csum_start;
	uint16_t csum_offset;
};

static_assert(sizeof(struct vnet_header) == 10, "no padding");

#define VNET_F_NEEDS_CSUM 1
#define VNET_F_DATA_VALID 2
#define VNET_GSO_NONE 0
#define VNET_GSO_TCPV4 1
#define VNET_GSO_TCPV6 4
#define VNET_GSO_UDP_L4 5

#endif
